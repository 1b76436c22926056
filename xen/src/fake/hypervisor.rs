//! One domain's view of the fake machine.

use core::cell::RefCell;
use core::fmt;
use core::time::Duration;
use std::rc::Rc;

use super::world::{Domain, World};
use crate::hypervisor::{Access, CopyOp, Hypervisor, HypervisorCounters};
use crate::page::{GrantedPage, MappedPage, Page, Port};
use crate::shared::SharedPage;
use crate::types::{DomId, Errno, GrantRef, GrantStatus, PortNumber, Time};

/// Elements that one copy hypercall takes, as with the real one.
const COPY_BATCH: usize = 256;

/// The hypervisor as one fake domain sees it. Several of them may stand for the same domain.
pub struct FakeHypervisor {
    world: Rc<RefCell<World>>,
    id: DomId,
    index: usize,
    now: Time,
}

impl FakeHypervisor {
    pub(super) fn new(world: Rc<RefCell<World>>, id: DomId, index: usize) -> Self {
        let now = Time(world.borrow().clock);
        Self {
            world,
            id,
            index,
            now,
        }
    }

    fn with<T>(&self, f: impl FnOnce(&mut Domain) -> T) -> T {
        match self.world.borrow_mut().domains.get_mut(self.index) {
            Some(domain) => f(domain),
            None => panic!("domain {} is gone", self.id),
        }
    }
}

impl fmt::Debug for FakeHypervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FakeHypervisor(domain {})", self.id)
    }
}

// Nothing here is inlined, so that a profile can tell the drivers from the fake.
impl Hypervisor for FakeHypervisor {
    #[inline(never)]
    fn own_domid(&self) -> DomId {
        self.id
    }

    #[inline(never)]
    fn now(&self) -> Time {
        self.now
    }

    #[inline(never)]
    fn refresh_time(&mut self) -> Time {
        self.now = Time(self.world.borrow().clock);
        self.now
    }

    fn running_time(&self) -> Option<Duration> {
        // Nothing else runs on this machine, and nobody sleeps for real.
        Some(Duration::from_nanos(self.now.0))
    }

    #[inline(never)]
    fn allocate(&mut self) -> Option<Page> {
        self.with(Domain::allocate)
    }

    #[inline(never)]
    fn release(&mut self, page: Page) {
        self.with(|domain| domain.pool.push(page));
    }

    #[inline(never)]
    fn free_pages(&self) -> usize {
        self.with(|domain| domain.free_pages())
    }

    #[inline(never)]
    fn grant(&mut self, peer: DomId, page: Page, access: Access) -> Result<GrantedPage, Page> {
        let granted = self.with(|domain| {
            let gref = domain.grant(peer, &page, access);
            domain.counters.grants += u64::from(gref.is_some());
            gref
        });
        let Some(gref) = granted else {
            return Err(page);
        };
        // SAFETY: the page is aligned and its memory outlives this value (`arena`); it goes into the `GrantedPage`,
        // which hands out no reference to it.
        let shared = unsafe { SharedPage::new(page.base().cast()) };
        Ok(GrantedPage {
            page,
            shared,
            gref,
            peer,
        })
    }

    #[inline(never)]
    fn revoke(&mut self, granted: GrantedPage) -> Result<Page, GrantedPage> {
        let access = self.with(|domain| {
            let access = domain.revoke(granted.gref);
            domain.counters.revokes += u64::from(access.is_some());
            domain.counters.revokes_busy += u64::from(access.is_none());
            access
        });
        let GrantedPage { mut page, peer, .. } = match access {
            Some(_) => granted,
            None => return Err(granted),
        };
        if access == Some(Access::ReadWrite) {
            page.note_writer(peer);
        }
        Ok(page)
    }

    #[inline(never)]
    fn map(&mut self, peer: DomId, gref: GrantRef) -> Result<MappedPage, GrantStatus> {
        let mapped = self.world.borrow_mut().map(self.index, peer, gref);
        let (base, handle) = mapped?;
        self.with(|domain| {
            domain.counters.hypercalls += 1;
            domain.counters.maps += 1;
        });
        // SAFETY: `base` is a granted page, which cannot be revoked while this mapping exists.
        let shared = unsafe { SharedPage::new(base) };
        Ok(MappedPage {
            shared,
            handle,
            peer,
        })
    }

    #[inline(never)]
    fn unmap(&mut self, mapped: MappedPage) {
        self.world.borrow_mut().unmap(self.index, mapped.handle);
        self.with(|domain| {
            domain.counters.hypercalls += 1;
            domain.counters.unmaps += 1;
        });
    }

    #[inline(never)]
    fn grant_copy(&mut self, ops: &mut [CopyOp], pages: &mut [Page]) {
        if ops.is_empty() {
            return;
        }
        let hook = self.with(|domain| domain.before_next_copy.take());
        if let Some(hook) = hook {
            hook();
        }
        let mut bytes = 0u64;
        let mut world = self.world.borrow_mut();
        for op in ops.iter_mut() {
            op.status = world.copy(self.index, op, pages);
            bytes += u64::from(op.len);
        }
        drop(world);
        let batches = ops.len().div_ceil(COPY_BATCH) as u64;
        self.with(|domain| {
            domain.counters.hypercalls += batches;
            domain.counters.copy_batches += batches;
            domain.counters.copy_elements += ops.len() as u64;
            domain.counters.copy_bytes += bytes;
        });
    }

    #[inline(never)]
    fn allocate_port(&mut self, peer: DomId) -> Result<Port, Errno> {
        self.with(|domain| domain.counters.hypercalls += 1);
        let number = self.world.borrow_mut().allocate_port(self.index, peer)?;
        Ok(Port { number })
    }

    #[inline(never)]
    fn bind_port(&mut self, peer: DomId, remote: PortNumber) -> Result<Port, Errno> {
        self.with(|domain| domain.counters.hypercalls += 1);
        let number = self
            .world
            .borrow_mut()
            .bind_port(self.index, peer, remote)?;
        Ok(Port { number })
    }

    #[inline(never)]
    fn close_port(&mut self, port: Port) {
        self.with(|domain| domain.counters.hypercalls += 1);
        self.world.borrow_mut().close_port(self.index, port.number);
    }

    #[inline(never)]
    fn notify(&mut self, ports: &[PortNumber]) {
        if ports.is_empty() {
            return;
        }
        let mut world = self.world.borrow_mut();
        for port in ports {
            world.notify(self.index, *port);
        }
        drop(world);
        self.with(|domain| {
            domain.counters.hypercalls += 1;
            domain.counters.events_sent += ports.len() as u64;
        });
    }

    #[inline(never)]
    fn take_pending(&mut self, port: PortNumber) -> bool {
        self.with(|domain| {
            let pending = domain
                .port(port)
                .is_some_and(|port| core::mem::take(&mut port.pending));
            domain.counters.events_received += u64::from(pending);
            pending
        })
    }

    #[inline(never)]
    fn wait(&mut self, _ports: &[PortNumber], _deadline: Option<Time>) {
        self.with(|domain| {
            domain.counters.hypercalls += 1;
            domain.counters.polls += 1;
        });
        self.refresh_time();
    }

    #[inline(never)]
    fn counters(&self) -> HypervisorCounters {
        self.with(|domain| domain.counters)
    }
}
