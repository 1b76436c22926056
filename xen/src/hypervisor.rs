//! What a driver may ask of Xen: one trait, implemented by the real guest and by the fake.
//!
//! Everything is synchronous and single threaded. Methods take `&mut self`; the kernel owns one value
//! and lends it to each driver in turn.

use core::time::Duration;

use crate::page::{GrantedPage, MappedPage, Page, Port};
use crate::types::{DomId, Errno, GrantRef, GrantStatus, PortNumber, Time};

/// What a peer may do with a page that we grant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// The peer may read.
    ReadOnly,
    /// The peer may read and write.
    ReadWrite,
}

/// Which way a grant copy moves bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CopyDirection {
    /// From the peer's granted page into a page of ours.
    FromPeer,
    /// From a page of ours into the peer's granted page.
    ToPeer,
}

/// One element of a grant copy: up to a page of bytes between a peer's grant and a page of ours.
///
/// `page` is the index of our page in the slice given to [`Hypervisor::grant_copy`].
#[derive(Clone, Copy, Debug)]
pub struct CopyOp {
    /// Which way.
    pub direction: CopyDirection,
    /// The domain that granted `gref`.
    pub peer: DomId,
    /// The peer's page.
    pub gref: GrantRef,
    /// Byte offset in the peer's page.
    pub peer_offset: u16,
    /// Our page: an index into the slice of pages of the call.
    pub page: u16,
    /// Byte offset in our page.
    pub offset: u16,
    /// Bytes to copy, `1..=4096`; neither side may cross its page's end.
    pub len: u16,
    /// Filled in by the call. Start with [`GrantStatus::NOT_DONE`].
    pub status: GrantStatus,
}

/// How often each kind of hypercall was made. Plain increments, kept always.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HypervisorCounters {
    /// All hypercalls, whatever their kind; a multicall counts once.
    pub hypercalls: u64,
    /// Grant copy hypercalls (batches).
    pub copy_batches: u64,
    /// Elements in them.
    pub copy_elements: u64,
    /// Bytes in them.
    pub copy_bytes: u64,
    /// Notifications sent, also those inside a multicall.
    pub events_sent: u64,
    /// Ports found pending when looked at.
    pub events_received: u64,
    /// Times that the domain went to sleep in a poll.
    pub polls: u64,
    /// Grants given.
    pub grants: u64,
    /// Grants taken back.
    pub revokes: u64,
    /// Revokes refused because the peer still used the page.
    pub revokes_busy: u64,
    /// Peer pages mapped.
    pub maps: u64,
    /// Peer pages unmapped.
    pub unmaps: u64,
}

/// The seam between the drivers and Xen.
pub trait Hypervisor {
    /// Our own domain id.
    fn own_domid(&self) -> DomId;

    /// The time as sampled last: at the end of [`Hypervisor::wait`] and by [`Hypervisor::refresh_time`].
    ///
    /// Cheap; constant in between, so that one iteration of the main loop has one time.
    fn now(&self) -> Time;

    /// Samples the clock again and returns it. May trap (tens of microseconds under emulation).
    fn refresh_time(&mut self) -> Time;

    /// How long the domain has had the processor so far, without the time that it waited for it or slept. Enters Xen.
    ///
    /// `None` when Xen does not tell.
    fn running_time(&self) -> Option<Duration>;

    /// Takes a page out of the pool. Its content is unspecified but initialised; never another
    /// domain's secrets that a peer may not see: whoever grants it must clear what it did not write.
    ///
    /// Returns `None` when the pool is empty.
    fn allocate(&mut self) -> Option<Page>;

    /// Gives a page back to the pool.
    fn release(&mut self, page: Page);

    /// Pages left in the pool.
    fn free_pages(&self) -> usize;

    /// Grants a page of ours to `peer`.
    ///
    /// # Errors
    ///
    /// Gives the page back when no grant reference is free.
    fn grant(&mut self, peer: DomId, page: Page, access: Access) -> Result<GrantedPage, Page>;

    /// Takes a grant back. A page that `peer` could write is [noted](Page::note_writer) as such.
    ///
    /// # Errors
    ///
    /// Gives the grant back when the peer, or a copy in flight, still uses the page. Keep it and try
    /// again later; it must not be reused.
    fn revoke(&mut self, granted: GrantedPage) -> Result<Page, GrantedPage>;

    /// Maps a peer's page for reading and writing.
    ///
    /// # Errors
    ///
    /// Xen's status, or [`GrantStatus::GENERAL_ERROR`] when no hole is left. Nothing is mapped.
    fn map(&mut self, peer: DomId, gref: GrantRef) -> Result<MappedPage, GrantStatus>;

    /// Unmaps a peer's page.
    fn unmap(&mut self, mapped: MappedPage);

    /// Carries out copies, in order, and fills in every element's `status`.
    ///
    /// Elements that name no page of the slice, or leave a page, get [`GrantStatus::BAD_COPY_ARG`] without
    /// reaching Xen. Any number of elements; Xen is entered once per 256. Consecutive elements of one peer page
    /// are cheaper.
    fn grant_copy(&mut self, ops: &mut [CopyOp], pages: &mut [Page]);

    /// Allocates a port that `peer` may bind to.
    ///
    /// # Errors
    ///
    /// Xen's, e.g. `ENOSPC` when the domain has all the ports it may have.
    fn allocate_port(&mut self, peer: DomId) -> Result<Port, Errno>;

    /// Binds a new port of ours to a port that `peer` allocated for us. It starts pending.
    ///
    /// # Errors
    ///
    /// Xen's, e.g. `EINVAL` when that port was not allocated for us or is in use.
    fn bind_port(&mut self, peer: DomId, remote: PortNumber) -> Result<Port, Errno>;

    /// Closes a port.
    fn close_port(&mut self, port: Port);

    /// Notifies whoever is bound to the other end of each port. One hypercall for all of them.
    ///
    /// Errors are ignored: a peer that is gone is noticed through xenstore.
    fn notify(&mut self, ports: &[PortNumber]);

    /// Clears the port's pending bit and tells whether it was set. A full barrier: what the peer
    /// published before its notification is visible afterwards.
    fn take_pending(&mut self, port: PortNumber) -> bool;

    /// Sleeps until one of `ports` is pending or `deadline` has come, and refreshes the time.
    ///
    /// May return early for any reason. At most the first 128 ports are watched without race.
    fn wait(&mut self, ports: &[PortNumber], deadline: Option<Time>);

    /// What was done so far.
    fn counters(&self) -> HypervisorCounters;
}
