//! A codec, a store and a deployment by somebody who knows `towline-core` alone. Each is checked with its kit.

pub mod codec;
pub mod deployment;
pub mod store;
