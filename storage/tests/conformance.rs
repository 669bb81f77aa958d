//! The store laws of core, on every store of this crate.

use std::sync::Arc;

use towline_storage::{Memory, ObjectAdapter};

towline_core::store_conformance!(memory, async { Memory::new() });

towline_core::store_conformance!(adapter, async {
    ObjectAdapter::new(Arc::new(object_store::memory::InMemory::new()))
});

#[cfg(feature = "local")]
towline_core::store_conformance!(local, async {
    let dir = tempfile::tempdir().unwrap();
    (towline_storage::Local::open(dir.path()).unwrap(), dir)
});
