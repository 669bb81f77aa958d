//! The fakes pass the kits: the macros as a user writes them.

mod common;

use std::sync::Arc;

use common::Harness;
use towline_core::testing::{CountingAllocator, FakeStore, XorCodec};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

towline_core::codec_conformance!(xor, XorCodec);
towline_core::codec_conformance!(shared, Arc::new(XorCodec));
towline_core::store_conformance!(memory, async { FakeStore::new() });
towline_core::store_conformance!(kept_alive, async { (FakeStore::new(), "a directory") });
towline_core::deployment_conformance!(one_replica, async { Harness::new(1) });
towline_core::deployment_conformance!(three_replicas, async { Harness::new(3) });
