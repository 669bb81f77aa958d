//! An allocator that counts, so that a law can hold a decoder to its bound.

#![expect(
    unsafe_code,
    reason = "an allocator is an unsafe trait; every call is passed to the system's unchanged"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, with a count for each thread. Memory that C libraries take is not seen.
///
/// A test crate installs it; without it, the laws that need it say that they were skipped.
/// ```
/// use towline_core::testing::CountingAllocator;
///
/// #[global_allocator]
/// static ALLOCATOR: CountingAllocator = CountingAllocator;
///
/// let (_, peak) = CountingAllocator::measure(|| vec![0u8; 1000]);
/// assert!(peak.unwrap() >= 1000);
/// ```
#[derive(Debug, Clone, Copy, Default)]
#[expect(clippy::exhaustive_structs, reason = "a static of it is written as its name alone")]
pub struct CountingAllocator;

thread_local! {
    // No destructor and no lazy start: safe to touch from within an allocator.
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

impl CountingAllocator {
    /// Runs `work` and tells how many bytes above the start this thread held at once; `None` if the allocator is
    /// not installed.
    pub fn measure<R>(work: impl FnOnce() -> R) -> (R, Option<usize>) {
        let before = LIVE.get();
        PEAK.set(before);
        drop(std::hint::black_box(Box::new(0u8)));
        let installed = PEAK.get() > before;
        PEAK.set(before);
        let result = work();
        let peak = usize::try_from(PEAK.get() - before).unwrap_or(0);
        (result, installed.then_some(peak))
    }
}

fn count(grown: usize, shrunk: usize) {
    // A layout never exceeds isize::MAX. A thread that is ending has no counters any more.
    let change = grown.cast_signed() - shrunk.cast_signed();
    let live = LIVE.try_with(|live| {
        live.set(live.get().wrapping_add(change));
        live.get()
    });
    if let Ok(live) = live {
        let _ended = PEAK.try_with(|peak| peak.set(peak.get().max(live)));
    }
}

// SAFETY: each method passes its arguments to `System` as they are and returns what it returns; counting touches
// nothing but two cells of this thread and does not allocate.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller keeps the contract of `alloc`, which is the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: as above; the block came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size());
        // SAFETY: as above; the block came from `System`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}
