//! A global allocator that wipes what it frees.
//!
//! It is the net below what is done by hand: the broker's arena holds every secret between
//! operations, and the other programs wipe the buffers that a password passes through. A library
//! that copies a byte of one to the heap (a TLS stack reading a key, an HTTP or a JSON parser)
//! leaves nothing behind when it frees the copy. Memory that is never freed is never wiped.

#![allow(unsafe_code, reason = "an allocator is unsafe by its trait")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::{hint, ptr};

/// The system allocator, wiping each block before it is freed.
#[derive(Debug, Default)]
pub struct ZeroOnFree;

// SAFETY: every call is passed on to `System` with the layout it was made with; only the
// contents of blocks that the caller has given up are changed.
unsafe impl GlobalAlloc for ZeroOnFree {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps `GlobalAlloc::alloc`'s contract, which is `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps `GlobalAlloc::alloc_zeroed`'s contract, which is `System`'s.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller gives up a live block of `layout.size()` bytes.
        unsafe { ptr::write_bytes(block, 0, layout.size()) };
        // The optimiser knows that nobody reads a block after free() and would drop the stores.
        let block = hint::black_box(block);
        // SAFETY: `block` came from `System` with this layout.
        unsafe { System.dealloc(block, layout) };
    }

    // `realloc` is left to the default: allocate, copy, `dealloc` above. System's realloc would
    // move a block and free the old place unwiped.
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grown_block_keeps_its_contents() {
        let layout = Layout::array::<u8>(16).unwrap();
        // SAFETY: the layout is not of size zero.
        let block = unsafe { ZeroOnFree.alloc(layout) };
        assert!(!block.is_null());
        // SAFETY: 16 bytes were allocated.
        unsafe { ptr::write_bytes(block, 7, 16) };
        // SAFETY: `block` is live, made by this allocator with `layout`.
        let block = unsafe { ZeroOnFree.realloc(block, layout, 4096) };
        assert!(!block.is_null());
        // SAFETY: the first 16 bytes were copied by `realloc`.
        let copied = unsafe { std::slice::from_raw_parts(block, 16) };
        assert_eq!(copied, [7; 16]);
        // SAFETY: `block` has the alignment of `layout` and 4096 bytes.
        unsafe { ZeroOnFree.dealloc(block, Layout::array::<u8>(4096).unwrap()) };
    }
}
