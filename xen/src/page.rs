//! Pages and ports as owned values, so that misuse does not compile.
//!
//! None of these types gives its resource back on drop: giving back needs the hypervisor, and may
//! fail (a peer can hold a granted page). Dropping one leaks it, which is safe; the drivers' tests
//! count pages, grants, mappings and ports to show that nothing leaks.

use core::fmt;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

use crate::shared::SharedPage;
use crate::types::{DomId, GrantRef, PortNumber};

/// The size of a page in bytes.
pub const PAGE_SIZE: usize = 4096;

/// A page of our own memory that nobody else can reach: 4,096 bytes, read and written as a slice.
pub struct Page {
    base: NonNull<[u8; PAGE_SIZE]>,
}

// SAFETY: a `Page` is the unique owner of plain bytes (obligation 1 of `from_raw`); moving it between threads
// moves that ownership. Only host tests have threads.
unsafe impl Send for Page {}

impl Page {
    /// Takes ownership of a page.
    ///
    /// # Safety
    ///
    /// 1. `base` is page aligned, valid for reads and writes of 4,096 initialised bytes for as long as the
    ///    program runs, and no other pointer to it is used while this value (or what it turns into) lives.
    #[must_use]
    pub(crate) const unsafe fn from_raw(base: NonNull<[u8; PAGE_SIZE]>) -> Self {
        Self { base }
    }

    /// The page's address, for hypercalls and for the pool that it goes back to.
    pub(crate) const fn base(&self) -> NonNull<[u8; PAGE_SIZE]> {
        self.base
    }
}

impl Deref for Page {
    type Target = [u8; PAGE_SIZE];
    fn deref(&self) -> &Self::Target {
        // SAFETY: valid and unaliased (obligation 1 of `from_raw`); the borrow of `self` bounds the reference.
        unsafe { self.base.as_ref() }
    }
}

impl DerefMut for Page {
    fn deref_mut(&mut self) -> &mut Self::Target {
        // SAFETY: as in `deref`, and `&mut self` makes it exclusive.
        unsafe { self.base.as_mut() }
    }
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Page({:p})", self.base)
    }
}

/// A page of ours that a peer may read, or read and write, until it is revoked.
///
/// Given back by [`crate::Hypervisor::revoke`].
#[derive(Debug)]
pub struct GrantedPage {
    pub(crate) page: Page,
    pub(crate) shared: SharedPage,
    pub(crate) gref: GrantRef,
    pub(crate) peer: DomId,
}

impl GrantedPage {
    /// The reference to tell the peer.
    #[must_use]
    pub const fn gref(&self) -> GrantRef {
        self.gref
    }

    /// The peer that it was granted to.
    #[must_use]
    pub const fn peer(&self) -> DomId {
        self.peer
    }
}

/// A peer's page, mapped into a hole of our address space. Given back by [`crate::Hypervisor::unmap`].
#[derive(Debug)]
pub struct MappedPage {
    pub(crate) shared: SharedPage,
    /// Xen's handle, for unmap.
    pub(crate) handle: u32,
    pub(crate) peer: DomId,
}

impl MappedPage {
    /// The domain whose page this is.
    #[must_use]
    pub const fn peer(&self) -> DomId {
        self.peer
    }
}

/// Memory behind a ring: ours and granted (frontend), or a peer's and mapped (backend).
pub trait RingMemory {
    /// The only way to reach the bytes.
    fn shared(&self) -> &SharedPage;
}

impl RingMemory for GrantedPage {
    fn shared(&self) -> &SharedPage {
        &self.shared
    }
}

impl RingMemory for MappedPage {
    fn shared(&self) -> &SharedPage {
        &self.shared
    }
}

/// An event channel port that we own. Closed by [`crate::Hypervisor::close_port`].
#[derive(Debug, PartialEq, Eq)]
pub struct Port {
    pub(crate) number: PortNumber,
}

impl Port {
    /// The port's number, to tell a peer or to list for a wait.
    #[must_use]
    pub const fn number(&self) -> PortNumber {
        self.number
    }
}
