//! The real guest: [`Guest`] is the [`Hypervisor`] of the image, [`BootContext`] is all that the kernel starts with.
//!
//! # What the kernel gets
//!
//! ```text
//! xen::entry_point!(main);
//! fn main(mut boot: Boot) -> ! {
//!     let heap = boot.take_heap(bytes from boot.usable_bytes());   // give it to the global allocator
//!     let context = BootContext::new(boot)?;                       // Xen found, rings attached
//!     kernel::run(context.guest, context.console, context.store, ...)
//! }
//! ```
//!
//! * `guest: Guest`: grants, copies, events, time, pages. Beside the trait: [`Guest::wall_clock`],
//!   [`Guest::limit_memory`], [`Guest::free_grants`].
//! * `console: ConsoleRing`: a [`ByteStream`](crate::stream::ByteStream) that takes what fits and never waits; its `port()` belongs in the
//!   list of [`Hypervisor::wait`], so that input and room for output wake the loop.
//! * `store: StoreRing`: the `ByteStream` to xenstore and its `port()`. It sends its own notifications.
//! * `command_line`, `xen_version`, `entropy`, `wall_clock`, and `entry_time`, the system time of the image's
//!   first instruction: `guest.now().since(entry_time)` is the uptime.
//!
//! The ports of the two rings must never be closed. The domain ends by [`crate::shutdown::shut_down`] or, on a
//! panic, by [`crate::shutdown::die`].
//!
//! # Trust
//!
//! Xen and dom0's toolstack are trusted; peers reach only pages that are granted to them and pages of theirs that we
//! map, all behind [`SharedPage`]. Nothing here looks at their content.

use alloc::boxed::Box;
use core::fmt;
use core::ptr::NonNull;
use core::time::Duration;

use crate::abi::grant::{GNTMAP_HOST_MAP, GnttabMapGrantRef, GnttabUnmapGrantRef};
use crate::abi::memory::{
    HVM_PARAM_CONSOLE_EVTCHN, HVM_PARAM_CONSOLE_PFN, HVM_PARAM_STORE_EVTCHN, HVM_PARAM_STORE_PFN,
    XENMAPSPACE_GRANT_TABLE, XENMAPSPACE_SHARED_INFO,
};
use crate::abi::sched::POLL_PORTS;
use crate::boot::Boot;
use crate::clock::{Clock, TimeInfo, wall_clock_base};
use crate::console::{self, ConsoleRing};
use crate::copy::CopyBuffer;
use crate::cpu;
use crate::discovery::{Discovery, DiscoveryError};
use crate::entropy::{self, Entropy};
use crate::grant::GrantTable;
use crate::hole::{HoleAllocator, HoleFrame};
use crate::hypercall::{self, EventBatch, SEND_EVENTS};
use crate::hypervisor::{Access, CopyOp, Hypervisor, HypervisorCounters};
use crate::memory::PagePool;
use crate::page::{GrantedPage, MappedPage, PAGE_SIZE, Page, Port};
use crate::shared::SharedPage;
use crate::shared_info::SharedInfo;
use crate::store::StoreRing;
use crate::types::{DomId, Errno, GrantRef, GrantStatus, PortNumber, Time};

/// Frames of grant table, of 512 references each: a backend that copies needs none for its clients.
const GRANT_FRAMES: u32 = 8;
/// Frames of grant table for a domain of at least [`LARGE_MEMORY`].
const GRANT_FRAMES_LARGE: u32 = 16;
/// Bytes of RAM from which on there may be many uplinks' worth of pages to grant.
const LARGE_MEMORY: u64 = 128 * 1024 * 1024;
/// The longest sleep when not every port can be watched without race.
const UNWATCHED_SLEEP: Duration = Duration::from_millis(10);

/// Everything that the kernel starts with.
#[derive(Debug)]
pub struct BootContext {
    /// The hypervisor.
    pub guest: Guest,
    /// The console.
    pub console: ConsoleRing,
    /// Xenstore.
    pub store: StoreRing,
    /// The command line: printable ASCII, at most 4,096 bytes.
    pub command_line: &'static str,
    /// System time at the image's first instruction.
    pub entry_time: Time,
    /// Universal time since 1970 at boot, if Xen knows it.
    pub wall_clock: Option<Duration>,
    /// Xen's major and minor version.
    pub xen_version: (u16, u16),
    /// Whether each reading of the counter traps into Xen.
    pub tsc_emulated: bool,
    /// The seed for hash keys and the like.
    pub entropy: Entropy,
}

/// Why the guest cannot start. Nothing is left half done that would matter: the caller can only die.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BootError {
    /// No Xen, or no way to call it.
    Discovery(DiscoveryError),
    /// Xen does not tell our domain id.
    NoDomId,
    /// The memory map has no room for Xen's pages.
    NoHole,
    /// No RAM is left for pages.
    NoMemory,
    /// The shared info page cannot be mapped.
    SharedInfo(Errno),
    /// Not even one frame of grant table can be mapped.
    GrantTable(Errno),
    /// The toolstack gave us no xenstore.
    NoStore,
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Discovery(DiscoveryError::NoXen) => {
                f.write_str("no Xen here: this image runs only as a PVH guest of Xen")
            }
            Self::Discovery(DiscoveryError::UnknownVendor(vendor)) => {
                f.write_str("no known hypercall instruction for processor vendor ")?;
                vendor
                    .iter()
                    .try_for_each(|byte| write!(f, "{}", byte.escape_ascii()))
            }
            Self::NoDomId => f.write_str("Xen does not tell our domain id"),
            Self::NoHole => f.write_str("no hole below 4 GiB in the memory map"),
            Self::NoMemory => f.write_str("no memory left for pages"),
            Self::SharedInfo(errno) => write!(f, "cannot map the shared info page: {errno}"),
            Self::GrantTable(errno) => write!(f, "cannot map the grant table: {errno}"),
            Self::NoStore => f.write_str("no xenstore ring"),
        }
    }
}

impl BootContext {
    /// Brings up shared info, clock, grant table, console and xenstore ring. Needs the heap.
    ///
    /// # Errors
    ///
    /// [`BootError`]; the domain cannot run.
    pub fn new(boot: Boot) -> Result<Self, BootError> {
        let found = boot.found.map_err(BootError::Discovery)?;
        let domid = found.domid.ok_or(BootError::NoDomId)?;
        // Attached before the rest, so that it can say what goes wrong there.
        let console = attach_console();
        let (entry_tsc, command_line) = (boot.entry_tsc, boot.command_line());
        let guest = Guest::new(boot, &found, domid)?;
        let store = attach_store().ok_or(BootError::NoStore)?;
        let info = TimeInfo::read(guest.shared.page());
        let entry_time = Time(info.at(entry_tsc)).min(guest.now());
        let wall_clock = guest.wall_clock();
        let nanos =
            |duration: Option<Duration>| duration.map_or(0, |time| u64::from(time.subsec_nanos()));
        let entropy = entropy::gather(&[entry_tsc, guest.now().0, nanos(wall_clock)]);
        Ok(Self {
            guest,
            console,
            store,
            command_line,
            entry_time,
            wall_clock,
            xen_version: (found.major, found.minor),
            tsc_emulated: found.tsc_emulated,
            entropy,
        })
    }
}

/// A ring page and port that the toolstack set up, if it did: frame 0 and all ones mean that it did not.
fn toolstack_ring(frame_index: u32, port_index: u32) -> Option<(u32, PortNumber)> {
    let frame = hypercall::hvm_param(frame_index).ok()?;
    let port = hypercall::hvm_param(port_index).ok()?;
    // The frame must lie below 4 GiB, where page tables end.
    let frame = u32::try_from(frame)
        .ok()
        .filter(|frame| (1..1 << 20).contains(frame))?;
    let port = u32::try_from(port).ok().filter(|port| *port != 0)?;
    Some((frame, PortNumber(port)))
}

/// A page that the toolstack put at `frame`, in the reserved area that is mapped like all of 4 GiB.
fn toolstack_page(frame: u32) -> Option<SharedPage> {
    let address = usize::try_from(frame).ok()?.checked_mul(PAGE_SIZE)?;
    let base = NonNull::new(core::ptr::with_exposed_provenance_mut(address))?;
    // SAFETY: the toolstack's ring pages are outside of the RAM that the pool knows, mapped for good, and reached
    // only through this type.
    Some(unsafe { SharedPage::new(base) })
}

fn attach_console() -> ConsoleRing {
    let attached = toolstack_ring(HVM_PARAM_CONSOLE_PFN, HVM_PARAM_CONSOLE_EVTCHN).and_then(
        |(frame, port)| {
            let page = toolstack_page(frame)?;
            console::remember(frame, port);
            Some(ConsoleRing::attach(page, port))
        },
    );
    attached.unwrap_or_else(ConsoleRing::absent)
}

fn attach_store() -> Option<StoreRing> {
    let (frame, port) = toolstack_ring(HVM_PARAM_STORE_PFN, HVM_PARAM_STORE_EVTCHN)?;
    Some(StoreRing::attach(toolstack_page(frame)?, port))
}

/// The hypervisor as seen by this domain.
pub struct Guest {
    domid: DomId,
    ram_bytes: u64,
    shared: SharedInfo,
    clock: Clock,
    pool: PagePool,
    hole: HoleAllocator,
    grants: GrantTable,
    copies: CopyBuffer,
    events: Box<EventBatch>,
    /// All but `hypercalls` and `events_sent`, which the rings advance too.
    counters: HypervisorCounters,
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guest")
            .field("domid", &self.domid)
            .field("free_pages", &self.pool.free())
            .finish_non_exhaustive()
    }
}

impl Guest {
    fn new(boot: Boot, found: &Discovery, domid: DomId) -> Result<Self, BootError> {
        let ram_bytes = boot.ram_bytes;
        let mut hole = HoleAllocator::new(boot.hole.ok_or(BootError::NoHole)?);
        // SAFETY: `Boot` vouches for the regions, and is consumed here.
        let mut pool = unsafe { PagePool::new(boot.regions) };
        latch(&mut pool, found.hypercall_msr)?;

        let frame = hole.allocate().ok_or(BootError::NoHole)?;
        // SAFETY: the frame is an empty one of the hole.
        unsafe { hypercall::add_to_physmap(XENMAPSPACE_SHARED_INFO, 0, frame.number()) }
            .map_err(BootError::SharedInfo)?;
        let base = pointer(frame).ok_or(BootError::NoHole)?;
        // SAFETY: mapped just now, never unmapped, and its frame is never given back.
        let shared = unsafe { SharedInfo::new(base) };
        shared.mask_all();
        let clock = Clock::new(shared.page());
        let grants = grant_table(&mut hole, ram_bytes)?;
        Ok(Self {
            domid,
            ram_bytes,
            shared,
            clock,
            pool,
            hole,
            grants,
            copies: CopyBuffer::new(),
            events: Box::new(EventBatch::new()),
            counters: HypervisorCounters::default(),
        })
    }

    /// Universal time since 1970, if Xen knows it. Follows changes of the host's clock: for timestamps only.
    #[must_use]
    pub fn wall_clock(&self) -> Option<Duration> {
        let base = wall_clock_base(self.shared.page())?;
        Some(base.saturating_add(Duration::from_nanos(self.clock.last().0)))
    }

    /// Keeps the domain from ever touching more than `bytes` of its RAM, image and heap included.
    ///
    /// What Xen does not back is left out at boot already; this is for a limit that is told otherwise, such as
    /// `memory/target` in xenstore (times 1,024). Call it early: pages once handed out are not taken back.
    ///
    /// # Errors
    ///
    /// How many pages too many are in use already, or will be, since heap and image are counted whole.
    pub fn limit_memory(&mut self, bytes: u64) -> Result<(), usize> {
        let excess = self.ram_bytes.saturating_sub(bytes);
        let pages = usize::try_from(excess.div_ceil(PAGE_SIZE as u64)).unwrap_or(usize::MAX);
        let taken = self.pool.set_aside(pages);
        self.ram_bytes = self
            .ram_bytes
            .saturating_sub(taken as u64 * PAGE_SIZE as u64);
        match pages.saturating_sub(taken) {
            0 => Ok(()),
            missing => Err(missing),
        }
    }

    /// RAM of the domain in bytes: what the memory map has and Xen backs, less what [`Guest::limit_memory`] gave up.
    #[must_use]
    pub const fn ram_bytes(&self) -> u64 {
        self.ram_bytes
    }

    /// Grant references left.
    #[must_use]
    pub fn free_grants(&self) -> usize {
        self.grants.free()
    }

    /// Whether there is a reason not to sleep.
    fn has_pending(&self, ports: &[PortNumber]) -> bool {
        ports.iter().any(|port| self.shared.is_pending(*port))
    }
}

/// A hole frame as a pointer: page tables show it at its own address, writable and not executable.
fn pointer(frame: HoleFrame) -> Option<NonNull<u8>> {
    let address = usize::try_from(frame.address()).ok()?;
    NonNull::new(core::ptr::with_exposed_provenance_mut(address))
}

/// Makes Xen note that we run in 64-bit mode, and fill in the wall clock, by the one action that does both.
///
/// That action asks for the hypercall page, which Xen writes once and we never call; its page goes back to the pool.
fn latch(pool: &mut PagePool, msr: u32) -> Result<(), BootError> {
    let scratch = pool.allocate().ok_or(BootError::NoMemory)?;
    let address = scratch.frame().saturating_mul(PAGE_SIZE as u64);
    // SAFETY: CPUID named this register; Xen writes only to the scratch page, which is ours alone.
    unsafe { cpu::write_msr(msr, address) };
    pool.release(scratch);
    Ok(())
}

/// Maps the grant table into the hole, as large as wanted or as Xen allows.
fn grant_table(hole: &mut HoleAllocator, ram_bytes: u64) -> Result<GrantTable, BootError> {
    let wanted = if ram_bytes >= LARGE_MEMORY {
        GRANT_FRAMES_LARGE
    } else {
        GRANT_FRAMES
    };
    let mut base = None;
    let mut mapped = 0;
    for index in 0..wanted {
        // Frames of a hole that nothing was given back to are consecutive.
        let frame = hole.allocate().ok_or(BootError::NoHole)?;
        // SAFETY: the frame is an empty one of the hole.
        let added = unsafe {
            hypercall::add_to_physmap(XENMAPSPACE_GRANT_TABLE, u64::from(index), frame.number())
        };
        match (added, base) {
            (Ok(()), None) => base = pointer(frame),
            (Ok(()), Some(_)) => {}
            (Err(errno), None) => return Err(BootError::GrantTable(errno)),
            (Err(_), Some(_)) => {
                hole.release(frame);
                break;
            }
        }
        mapped = index.saturating_add(1);
    }
    let base = base.ok_or(BootError::NoHole)?;
    // SAFETY: `mapped` consecutive frames of our grant table, never unmapped; only this value writes them.
    Ok(unsafe { GrantTable::new(base, mapped) })
}

impl Hypervisor for Guest {
    fn own_domid(&self) -> DomId {
        self.domid
    }

    fn now(&self) -> Time {
        self.clock.last()
    }

    fn refresh_time(&mut self) -> Time {
        self.clock.refresh(self.shared.page())
    }

    fn running_time(&self) -> Option<Duration> {
        let [running, ..] = hypercall::runstate().ok()?.time;
        Some(Duration::from_nanos(running))
    }

    fn allocate(&mut self) -> Option<Page> {
        self.pool.allocate()
    }

    fn release(&mut self, page: Page) {
        self.pool.release(page);
    }

    fn free_pages(&self) -> usize {
        self.pool.free()
    }

    fn grant(&mut self, peer: DomId, page: Page, access: Access) -> Result<GrantedPage, Page> {
        let Ok(frame) = u32::try_from(page.frame()) else {
            return Err(page);
        };
        let Some(gref) = self.grants.grant(peer, frame, access) else {
            return Err(page);
        };
        self.counters.grants = self.counters.grants.wrapping_add(1);
        // SAFETY: the page is RAM that stays mapped, and while granted is reached only through this value: `page` goes
        // into the same struct, which offers no slice.
        let shared = unsafe { SharedPage::new(page.base().cast()) };
        Ok(GrantedPage {
            page,
            shared,
            gref,
            peer,
        })
    }

    fn revoke(&mut self, granted: GrantedPage) -> Result<Page, GrantedPage> {
        let Ok(access) = self.grants.revoke(granted.gref) else {
            self.counters.revokes_busy = self.counters.revokes_busy.wrapping_add(1);
            return Err(granted);
        };
        self.counters.revokes = self.counters.revokes.wrapping_add(1);
        let GrantedPage { mut page, peer, .. } = granted;
        if access == Access::ReadWrite {
            page.note_writer(peer);
        }
        Ok(page)
    }

    fn map(&mut self, peer: DomId, gref: GrantRef) -> Result<MappedPage, GrantStatus> {
        let frame = self.hole.allocate().ok_or(GrantStatus::GENERAL_ERROR)?;
        let mut argument = GnttabMapGrantRef {
            host_addr: frame.address(),
            flags: GNTMAP_HOST_MAP,
            gref: gref.0,
            dom: peer.0,
            status: GrantStatus::NOT_DONE.0,
            ..GnttabMapGrantRef::default()
        };
        // SAFETY: the frame is an empty one of the hole and ours.
        let called = unsafe { hypercall::map_grant(&mut argument) };
        let status = GrantStatus(argument.status);
        if called.is_err() {
            // Xen could not even read the argument. Whatever is at the frame now, it is not used again.
            return Err(status);
        }
        if !status.is_ok() {
            self.hole.release(frame);
            return Err(status);
        }
        let base = pointer(frame).ok_or(GrantStatus::GENERAL_ERROR)?;
        self.counters.maps = self.counters.maps.wrapping_add(1);
        Ok(MappedPage {
            // SAFETY: mapped just now, until `unmap` consumes the value; only reached through it.
            shared: unsafe { SharedPage::new(base) },
            handle: argument.handle,
            peer,
        })
    }

    fn unmap(&mut self, mapped: MappedPage) {
        let address = mapped.shared.address();
        let mut argument = GnttabUnmapGrantRef {
            host_addr: address,
            handle: mapped.handle,
            status: GrantStatus::NOT_DONE.0,
            ..GnttabUnmapGrantRef::default()
        };
        // SAFETY: the only value that reached the page was moved here and ends here.
        let called = unsafe { hypercall::unmap_grant(&mut argument) };
        if called.is_ok() && GrantStatus(argument.status).is_ok() {
            self.counters.unmaps = self.counters.unmaps.wrapping_add(1);
            self.hole.reclaim(address);
        }
        // Otherwise something may still be there, and mapping over it would kill us: the frame is given up. The
        // counters of maps and unmaps show it.
    }

    fn grant_copy(&mut self, ops: &mut [CopyOp], pages: &mut [Page]) {
        let counts = self.copies.run(ops, pages, |elements| {
            // SAFETY: ends of ours name pages of `pages`, which is borrowed exclusively.
            unsafe { hypercall::copy_grants(elements) }
        });
        let counters = &mut self.counters;
        counters.copy_batches = counters.copy_batches.wrapping_add(counts.batches);
        counters.copy_elements = counters.copy_elements.wrapping_add(counts.elements);
        counters.copy_bytes = counters.copy_bytes.wrapping_add(counts.bytes);
    }

    fn allocate_port(&mut self, peer: DomId) -> Result<Port, Errno> {
        let number = hypercall::allocate_port(peer)?;
        Ok(Port { number })
    }

    fn bind_port(&mut self, peer: DomId, remote: PortNumber) -> Result<Port, Errno> {
        let number = hypercall::bind_port(peer, remote)?;
        Ok(Port { number })
    }

    fn close_port(&mut self, port: Port) {
        // Fails only for a port that is not ours, and a `Port` is.
        let _ = hypercall::close_port(port.number);
        // Xen leaves the bit as it was; the next owner of this number should not find it set.
        let _ = self.shared.take_pending(port.number);
    }

    fn notify(&mut self, ports: &[PortNumber]) {
        // Errors mean that the peer is gone or going.
        match ports {
            [] => {}
            [port] => {
                let _ = hypercall::send_event(*port);
            }
            ports => {
                for chunk in ports.chunks(SEND_EVENTS) {
                    let _ = hypercall::send_events(&mut self.events, chunk);
                }
            }
        }
    }

    fn take_pending(&mut self, port: PortNumber) -> bool {
        let pending = self.shared.take_pending(port);
        self.counters.events_received = self
            .counters
            .events_received
            .wrapping_add(u64::from(pending));
        pending
    }

    fn wait(&mut self, ports: &[PortNumber], deadline: Option<Time>) {
        let now = self.now();
        let due = deadline.is_some_and(|deadline| deadline <= now);
        // Looking first saves the hypercall when there is work already.
        if !due && !self.has_pending(ports) {
            let mut watched = [0; POLL_PORTS];
            let mut count = 0usize;
            for (slot, port) in watched.iter_mut().zip(ports) {
                *slot = port.0;
                count = count.saturating_add(1);
            }
            let soon = now.plus(UNWATCHED_SLEEP);
            let deadline = if ports.len() > count {
                Some(deadline.map_or(soon, |deadline| deadline.min(soon)))
            } else {
                deadline
            };
            self.counters.polls = self.counters.polls.wrapping_add(1);
            let watched = watched.get_mut(..count).unwrap_or_default();
            if hypercall::poll(watched, deadline).is_err() {
                // A port in the list is closed: a bug of ours, which must not turn into a busy loop. With an empty list
                // any event still wakes us; one that came before is noticed after a short sleep.
                let soon = self.refresh_time().plus(UNWATCHED_SLEEP);
                let _ = hypercall::poll(
                    &mut [],
                    Some(deadline.map_or(soon, |deadline| deadline.min(soon))),
                );
            }
        }
        self.refresh_time();
    }

    fn counters(&self) -> HypervisorCounters {
        HypervisorCounters {
            hypercalls: hypercall::count(),
            events_sent: hypercall::events_sent(),
            ..self.counters
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn an_unknown_vendor_is_named_without_control_characters() {
        let error = BootError::Discovery(DiscoveryError::UnknownVendor(*b"Foo\x1b\0 Bar!!!"));
        assert_eq!(
            error.to_string(),
            "no known hypercall instruction for processor vendor Foo\\x1b\\x00 Bar!!!"
        );
    }

    #[test]
    fn without_xen_there_is_no_toolstack_ring() {
        assert!(toolstack_ring(HVM_PARAM_STORE_PFN, HVM_PARAM_STORE_EVTCHN).is_none());
        let console = attach_console();
        assert_eq!(console.port(), None);
    }
}
