//! Memory that outlives a unit test's shared pages.

use core::cell::UnsafeCell;
use core::ptr::NonNull;

use crate::page::{PAGE_SIZE, Page};
use crate::shared::SharedPage;

#[repr(C, align(4096))]
struct Aligned(UnsafeCell<[u8; PAGE_SIZE]>);

/// One zeroed page of host memory, to be looked at through [`SharedPage`]s. Leaked: tests are short.
pub(crate) struct SharedMemory(&'static Aligned);

impl SharedMemory {
    pub(crate) fn new() -> Self {
        Self(Box::leak(Box::new(Aligned(UnsafeCell::new(
            [0; PAGE_SIZE],
        )))))
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        NonNull::new(self.0.0.get().cast()).unwrap()
    }

    /// Another view of the same bytes, as a peer would have.
    pub(crate) fn page(&self) -> SharedPage {
        // SAFETY: leaked, aligned by its type, and only ever reached through volatile copies.
        unsafe { SharedPage::new(self.base()) }
    }
}

/// A page of host memory as owned memory.
pub(crate) fn host_page() -> Page {
    let memory = SharedMemory::new();
    // SAFETY: fresh, leaked, aligned, and this is its only pointer.
    unsafe { Page::from_raw(memory.base().cast()) }
}
