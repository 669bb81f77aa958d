//! The cookbook composes Towline's crates: an embedded trainer that really trains, an inference server that takes
//! new weights while it answers, the command line `towline`, and recipes. Not published.

pub mod adapter;
pub mod bridge;
pub mod cli;
pub mod client;
pub mod embedded;
pub mod engine;
mod pipeline;
mod process;
mod quickstart;
pub mod recipes;
mod rollout;
pub mod server;
mod store;
mod train;
