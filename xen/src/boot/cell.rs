//! Statics that are written during boot, by one thread.

use core::cell::UnsafeCell;

/// A static that boot code, Rust or assembly, writes through its address.
#[repr(transparent)]
pub(super) struct BootCell<T>(UnsafeCell<T>);

// SAFETY: there is one processor and no interrupt, so never two accesses at a time; each access through `get` argues
// for itself that no reference is in its way.
unsafe impl<T> Sync for BootCell<T> {}

impl<T> BootCell<T> {
    pub(super) const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// The address of the value.
    pub(super) const fn get(&self) -> *mut T {
        self.0.get()
    }
}
