//! Pages that a netvm still holds after they were answered or after their device is gone.

use alloc::vec::Vec;

use xen::{GrantedPage, Hypervisor};

/// Granted pages that could not be revoked yet. They are no one's until they can be.
///
/// The kernel owns one, passes it to [`crate::Uplink::disconnect`], and calls [`Quarantine::sweep`] about
/// once a second while it is not empty. What bounds it is the page pool: a page in here is missing there.
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

    /// An empty quarantine that holds `pages` pages without allocating.
    pub(crate) fn with_room(pages: usize) -> Self {
        Self {
            held: Vec::with_capacity(pages),
        }
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
        let mut index = 0usize;
        while index < self.held.len() {
            // The last one takes its place, or it goes back to the end and is looked at again later.
            let granted = self.held.swap_remove(index);
            match free(hv, granted) {
                Ok(()) => {}
                Err(granted) => {
                    self.held.push(granted);
                    let last = self.held.len().wrapping_sub(1);
                    self.held.swap(index, last);
                    index = index.wrapping_add(1);
                }
            }
        }
        self.held.len()
    }

    /// Takes a page that could not be revoked.
    pub(crate) fn hold(&mut self, granted: GrantedPage) {
        self.held.push(granted);
    }

    /// Revokes a page and gives it back to the pool, or keeps it.
    pub(crate) fn take_back<H: Hypervisor + ?Sized>(&mut self, hv: &mut H, granted: GrantedPage) {
        if let Err(granted) = free(hv, granted) {
            self.held.push(granted);
        }
    }

    /// Takes over what another one holds.
    pub(crate) fn absorb(&mut self, mut other: Self) {
        self.held.append(&mut other.held);
    }
}

/// Revokes a page and gives it back to the pool.
fn free<H: Hypervisor + ?Sized>(hv: &mut H, granted: GrantedPage) -> Result<(), GrantedPage> {
    let page = hv.revoke(granted)?;
    hv.release(page);
    Ok(())
}
