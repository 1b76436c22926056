//! Host memory for the pages of fake domains.
//!
//! A [`Page`] has no lifetime, so memory behind one must never go away while a value of it may exist. Pages come
//! from a free list of the thread and return to it only as owned `Page`s, when a machine is dropped that has them
//! in a pool. What a test leaks stays allocated, so no test can reach freed memory.

use core::cell::{RefCell, UnsafeCell};
use core::ptr::NonNull;
use std::vec::Vec;

use crate::page::{PAGE_SIZE, Page};

/// What fresh memory holds: something that a test notices when a peer gets to see it.
const FRESH: u8 = 0xA5;

#[repr(C, align(4096))]
struct Memory(UnsafeCell<[u8; PAGE_SIZE]>);

/// Pages that no machine uses; freed with their thread.
struct Arena(Vec<Page>);

impl Drop for Arena {
    fn drop(&mut self) {
        for page in self.0.drain(..) {
            let memory = page.base().cast::<Memory>();
            // SAFETY: `take` leaked this box and made the only `Page` of it, which was consumed here.
            drop(unsafe { Box::from_raw(memory.as_ptr()) });
        }
    }
}

std::thread_local! {
    static FREE: RefCell<Arena> = const { RefCell::new(Arena(Vec::new())) };
}

/// A page that nobody else has, with whatever content.
pub(super) fn take() -> Page {
    FREE.with_borrow_mut(|arena| arena.0.pop())
        .unwrap_or_else(|| {
            let memory = Box::leak(Box::new(Memory(UnsafeCell::new([FRESH; PAGE_SIZE]))));
            let base = NonNull::from(memory).cast();
            // SAFETY: aligned by its type, leaked until `Arena::drop` gets the page back, and this is its only pointer.
            unsafe { Page::from_raw(base) }
        })
}

/// Takes pages back, for another machine of this thread.
pub(super) fn give_back(pages: impl Iterator<Item = Page>) {
    // A thread that is ending may have dropped its arena; then the pages are leaked.
    let _ = FREE.try_with(|arena| arena.borrow_mut().0.extend(pages));
}
