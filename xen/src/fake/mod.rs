//! A fake machine for host tests: several domains that share grants, mappings, event channels and a clock.
//!
//! [`FakeMachine::domain`] gives a [`FakeHypervisor`] for each domain, so a driver under test and its peer, correct or
//! hostile, run side by side in one thread. The machine answers with Xen's statuses, refuses what Xen refuses, and
//! counts what each domain has not given back ([`Resources`]), so that a leak fails a test exactly.
//!
//! # What a test can do to a driver
//!
//! * [`FakeMachine::fail`]: make the nth operation of a kind fail.
//! * [`FakeMachine::hold`]: keep a granted page busy, as a backend does that has it mapped.
//! * [`FakeMachine::before_next_copy`]: change the world between a driver's checks and its copy.
//! * [`FakeMachine::race`]: change a word of shared memory all the time from another thread.
//! * [`FakeMachine::kill`]: end a domain.
//! * Write rings with [`crate::SharedPage`] directly, through a page that the peer's side granted.
//!
//! Time stands still unless a test moves it with [`FakeMachine::advance`]; [`crate::Hypervisor::wait`] returns at once.
//!
//! A mistake of the test itself, such as closing a port twice, panics.
#![expect(
    clippy::panic,
    reason = "a mistake found here is one of a test and must stop it"
)]

mod arena;
mod hypervisor;
mod world;

use core::cell::RefCell;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use core::time::Duration;
use std::boxed::Box;
use std::rc::Rc;

pub use hypervisor::FakeHypervisor;
pub use world::{Limits, Operation, Resources};

use crate::page::GrantedPage;
use crate::types::{DomId, GrantRef, PortNumber, Time};
use world::{Domain, Fault, World};

/// Several domains and the hypervisor between them. Clones are the same machine.
#[derive(Clone)]
pub struct FakeMachine {
    world: Rc<RefCell<World>>,
}

impl Default for FakeMachine {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeMachine {
    /// A machine without domains, its clock at one second.
    #[must_use]
    pub fn new() -> Self {
        Self {
            world: Rc::new(RefCell::new(World {
                domains: Vec::new(),
                clock: 1_000_000_000,
            })),
        }
    }

    /// The hypervisor as domain `id` sees it. The domain is made with the usual [`Limits`] if there is none yet.
    #[must_use]
    pub fn domain(&self, id: DomId) -> FakeHypervisor {
        self.domain_with(id, Limits::default())
    }

    /// As [`FakeMachine::domain`], with other limits if the domain is made by this call.
    #[must_use]
    pub fn domain_with(&self, id: DomId, limits: Limits) -> FakeHypervisor {
        let index = self.world.borrow_mut().add(id, limits);
        FakeHypervisor::new(Rc::clone(&self.world), id, index)
    }

    fn with<T>(&self, id: DomId, f: impl FnOnce(&mut Domain) -> T) -> T {
        match self.world.borrow_mut().find(id) {
            Some(domain) => f(domain),
            None => panic!("there is no domain {id}"),
        }
    }

    /// What the domain has not given back.
    #[must_use]
    pub fn resources(&self, id: DomId) -> Resources {
        self.with(id, |domain| domain.resources())
    }

    /// Notifications that a port received so far; none if it is closed.
    #[must_use]
    pub fn notifications(&self, id: DomId, port: PortNumber) -> u64 {
        self.with(id, |domain| {
            domain.port(port).map_or(0, |port| port.received)
        })
    }

    /// Whether a port's pending bit is set, without clearing it; false if the port is closed.
    #[must_use]
    pub fn is_pending(&self, id: DomId, port: PortNumber) -> bool {
        self.with(id, |domain| {
            domain.port(port).is_some_and(|port| port.pending)
        })
    }

    /// The present time. Domains see it with their next wait or refresh.
    #[must_use]
    pub fn now(&self) -> Time {
        Time(self.world.borrow().clock)
    }

    /// Lets time pass.
    pub fn advance(&self, by: Duration) {
        let mut world = self.world.borrow_mut();
        world.clock = Time(world.clock).plus(by).0;
    }

    /// Makes the domain's next operation of this kind fail, after `skip` that are as usual.
    pub fn fail(&self, id: DomId, operation: Operation, skip: u64) {
        self.fail_times(id, operation, skip, 1);
    }

    /// Makes `times` operations of this kind fail, after `skip` that are as usual.
    pub fn fail_times(&self, id: DomId, operation: Operation, skip: u64, times: u64) {
        let fault = Fault {
            operation,
            skip,
            times,
        };
        self.with(id, |domain| domain.faults.push(fault));
    }

    /// Forgets all failures asked for.
    pub fn heal(&self, id: DomId) {
        self.with(id, |domain| domain.faults.clear());
    }

    /// Pretends that the peer uses a page that domain `id` granted, or has ended to.
    ///
    /// Returns whether there is such a grant.
    pub fn hold(&self, id: DomId, gref: GrantRef, held: bool) -> bool {
        self.with(id, |domain| match domain.granted(gref) {
            Some(grant) => {
                grant.held = held;
                true
            }
            None => false,
        })
    }

    /// Pretends that all pages that domain `id` has granted at present are in use, or no longer.
    pub fn hold_all(&self, id: DomId, held: bool) {
        self.with(id, |domain| {
            for grant in domain.grants.iter_mut().flatten() {
                grant.held = held;
            }
        });
    }

    /// Calls `f` at the start of the next grant copy that the domain makes.
    pub fn before_next_copy(&self, id: DomId, f: impl FnOnce() + 'static) {
        self.with(id, |domain| domain.before_next_copy = Some(Box::new(f)));
    }

    /// Ends a domain: copies from and to it fail, its channels fall apart. What it has mapped stays in use
    /// until it is unmapped, as with a domain whose remains Xen could not free yet.
    pub fn kill(&self, id: DomId) {
        self.world.borrow_mut().kill(id);
    }

    /// Runs `body` while another thread writes `values` in turn to the word at byte `offset` of a granted page.
    ///
    /// # Panics
    ///
    /// When the word is not inside the page, or there are no values.
    pub fn race<T>(
        page: &GrantedPage,
        offset: usize,
        values: &[u32],
        body: impl FnOnce() -> T,
    ) -> T {
        assert!(offset <= 4092 && offset.is_multiple_of(4) && !values.is_empty());
        let base = page.page.base().cast::<u32>();
        // SAFETY: `offset` is inside the page, which stays granted while `page` is borrowed.
        let word = unsafe { base.byte_add(offset) };
        // SAFETY: aligned and valid (above); while a page is granted, only whole words are read and written in it.
        let word = unsafe { AtomicU32::from_ptr(word.as_ptr()) };
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for value in values.iter().cycle() {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    word.store(*value, Ordering::Relaxed);
                }
            });
            let ended = Stop(&stop);
            let result = body();
            drop(ended);
            result
        })
    }
}

/// Ends the racing thread also when the test's body panics.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl core::fmt::Debug for FakeMachine {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let domains = self.world.borrow().domains.len();
        write!(f, "FakeMachine({domains} domains)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::{Access, CopyDirection, CopyOp, Hypervisor};
    use crate::page::RingMemory;
    use crate::types::{Errno, GrantStatus};

    const A: DomId = DomId(3);
    const B: DomId = DomId(5);

    fn two() -> (FakeMachine, FakeHypervisor, FakeHypervisor) {
        let machine = FakeMachine::new();
        let (a, b) = (machine.domain(A), machine.domain(B));
        (machine, a, b)
    }

    fn op(direction: CopyDirection, gref: GrantRef) -> CopyOp {
        CopyOp {
            direction,
            peer: A,
            gref,
            peer_offset: 100,
            page: 0,
            offset: 4000,
            len: 96,
            status: GrantStatus::NOT_DONE,
        }
    }

    #[test]
    fn a_copy_moves_bytes_both_ways() {
        let (machine, mut a, mut b) = two();
        let mut source = a.allocate().unwrap();
        source[100..196].fill(7);
        let granted = a.grant(B, source, Access::ReadWrite).unwrap();
        let mut pages = [b.allocate().unwrap()];
        let mut ops = [op(CopyDirection::FromPeer, granted.gref())];
        b.grant_copy(&mut ops, &mut pages);
        assert_eq!(ops[0].status, GrantStatus::OKAY);
        assert_eq!(pages[0][4000..], [7; 96]);
        pages[0][4000..].fill(9);
        ops[0].direction = CopyDirection::ToPeer;
        b.grant_copy(&mut ops, &mut pages);
        let page = a.revoke(granted).unwrap();
        assert_eq!(page[100..196], [9; 96]);
        a.release(page);
        b.release(pages.into_iter().next().unwrap());
        assert_eq!(machine.resources(A), Resources::default());
        assert_eq!(machine.resources(B), Resources::default());
        assert_eq!(b.counters().copy_elements, 2);
    }

    #[test]
    fn copies_that_xen_refuses_are_refused() {
        let (machine, mut a, mut b) = two();
        let mut pages = [b.allocate().unwrap()];
        let mut status = |op: CopyOp| {
            let mut ops = [op];
            b.grant_copy(&mut ops, &mut pages);
            ops[0].status
        };
        let page = a.allocate().unwrap();
        let read_only = a.grant(B, page, Access::ReadOnly).unwrap();
        let page = a.allocate().unwrap();
        let others = a.grant(DomId(9), page, Access::ReadWrite).unwrap();
        let page = a.allocate().unwrap();
        let revoked = a.grant(B, page, Access::ReadWrite).unwrap();
        let stale = revoked.gref();
        a.revoke(revoked).unwrap();
        let to = CopyDirection::ToPeer;
        let from = CopyDirection::FromPeer;
        assert_eq!(status(op(from, read_only.gref())), GrantStatus::OKAY);
        assert_eq!(
            status(op(to, read_only.gref())),
            GrantStatus::PERMISSION_DENIED
        );
        assert_eq!(
            status(op(from, others.gref())),
            GrantStatus::PERMISSION_DENIED
        );
        assert_eq!(status(op(from, stale)), GrantStatus::GENERAL_ERROR);
        assert_eq!(
            status(op(from, GrantRef(u32::MAX))),
            GrantStatus::BAD_GNTREF
        );
        assert_eq!(status(op(from, GrantRef(0))), GrantStatus::BAD_GNTREF);
        let crossing = CopyOp {
            len: 97,
            ..op(from, read_only.gref())
        };
        assert_eq!(status(crossing), GrantStatus::BAD_COPY_ARG);
        let elsewhere = CopyOp {
            page: 1,
            ..op(from, read_only.gref())
        };
        assert_eq!(status(elsewhere), GrantStatus::BAD_COPY_ARG);
        let nobody = CopyOp {
            peer: DomId(77),
            ..op(from, read_only.gref())
        };
        assert_eq!(status(nobody), GrantStatus::BAD_DOMAIN);
        machine.fail(B, Operation::Copy(GrantStatus(-12)), 1);
        assert_eq!(status(op(from, read_only.gref())), GrantStatus::OKAY);
        assert_eq!(status(op(from, read_only.gref())), GrantStatus(-12));
        assert_eq!(status(op(from, read_only.gref())), GrantStatus::OKAY);
        machine.kill(A);
        assert_eq!(status(op(from, read_only.gref())), GrantStatus::BAD_DOMAIN);
    }

    #[test]
    fn a_mapped_or_held_page_cannot_be_revoked() {
        let (machine, mut a, mut b) = two();
        let page = a.allocate().unwrap();
        let granted = a.grant(B, page, Access::ReadWrite).unwrap();
        let mapped = b.map(A, granted.gref()).unwrap();
        granted.shared().write_u32(8, 0x1234);
        assert_eq!(mapped.shared().read_u32(8), 0x1234);
        let granted = a.revoke(granted).unwrap_err();
        b.unmap(mapped);
        machine.hold(A, granted.gref(), true);
        let granted = a.revoke(granted).unwrap_err();
        machine.hold_all(A, false);
        let page = a.revoke(granted).unwrap();
        a.release(page);
        assert_eq!(a.counters().revokes_busy, 2);
        assert_eq!(machine.resources(A), Resources::default());
        assert_eq!(machine.resources(B), Resources::default());
    }

    #[test]
    fn mapping_needs_a_writable_grant_and_room() {
        let machine = FakeMachine::new();
        let mut a = machine.domain(A);
        let mut b = machine.domain_with(
            B,
            Limits {
                maps: 1,
                ..Limits::default()
            },
        );
        let page = a.allocate().unwrap();
        let read_only = a.grant(B, page, Access::ReadOnly).unwrap();
        assert_eq!(
            b.map(A, read_only.gref()).unwrap_err(),
            GrantStatus::PERMISSION_DENIED
        );
        let page = a.allocate().unwrap();
        let granted = a.grant(B, page, Access::ReadWrite).unwrap();
        let mapped = b.map(A, granted.gref()).unwrap();
        assert_eq!(
            b.map(A, granted.gref()).unwrap_err(),
            GrantStatus::GENERAL_ERROR
        );
        b.unmap(mapped);
    }

    #[test]
    fn a_port_is_bound_once_and_only_by_whom_it_is_for() {
        let (machine, mut a, mut b) = two();
        let theirs = a.allocate_port(B).unwrap();
        assert_eq!(
            machine.domain(DomId(9)).bind_port(A, theirs.number()),
            Err(Errno::EINVAL)
        );
        let ours = b.bind_port(A, theirs.number()).unwrap();
        assert_eq!(b.bind_port(A, theirs.number()), Err(Errno::EINVAL));
        assert!(b.take_pending(ours.number()), "a bound port starts pending");
        assert!(!b.take_pending(ours.number()));
        a.notify(&[theirs.number()]);
        assert!(b.take_pending(ours.number()));
        assert_eq!(machine.notifications(B, ours.number()), 1);
        b.close_port(ours);
        a.notify(&[theirs.number()]);
        a.close_port(theirs);
        assert_eq!(machine.resources(A), Resources::default());
        assert_eq!(machine.resources(B), Resources::default());
    }

    #[test]
    fn pools_grants_and_ports_run_out() {
        let machine = FakeMachine::new();
        let limits = Limits {
            pages: 2,
            grants: 1,
            maps: 0,
            ports: 3,
        };
        let mut a = machine.domain_with(A, limits);
        let (first, second) = (a.allocate().unwrap(), a.allocate().unwrap());
        assert_eq!(a.free_pages(), 0);
        assert!(a.allocate().is_none());
        let granted = a.grant(B, first, Access::ReadOnly).unwrap();
        let second = a.grant(B, second, Access::ReadOnly).unwrap_err();
        let port = a.allocate_port(B).unwrap();
        assert_eq!(a.allocate_port(B), Err(Errno::ENOSPC));
        let used = Resources {
            pages: 2,
            grants: 1,
            maps: 0,
            ports: 1,
        };
        assert_eq!(machine.resources(A), used);
        a.close_port(port);
        a.release(second);
        let first = a.revoke(granted).unwrap();
        a.release(first);
        assert_eq!(machine.resources(A), Resources::default());
    }

    #[test]
    fn the_world_can_change_just_before_a_copy() {
        let (machine, mut a, mut b) = two();
        let page = a.allocate().unwrap();
        let granted = a.grant(B, page, Access::ReadWrite).unwrap();
        let mut ops = [op(CopyDirection::FromPeer, granted.gref())];
        let killer = machine.clone();
        machine.before_next_copy(B, move || killer.kill(A));
        let mut pages = [b.allocate().unwrap()];
        b.grant_copy(&mut ops, &mut pages);
        assert_eq!(ops[0].status, GrantStatus::BAD_DOMAIN);
    }

    #[test]
    fn time_moves_only_when_told() {
        let machine = FakeMachine::new();
        let mut a = machine.domain(A);
        let start = a.now();
        machine.advance(Duration::from_millis(3));
        assert_eq!(a.now(), start);
        a.wait(&[], None);
        assert_eq!(a.now().since(start), Duration::from_millis(3));
    }
}
