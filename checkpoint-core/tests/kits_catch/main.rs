//! The tests of the kits: each law catches a back end that is broken in just that way.

mod codec;
#[path = "../common/mod.rs"]
mod common;
mod deployment;
mod store;

use towline_core::testing::CountingAllocator;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;
