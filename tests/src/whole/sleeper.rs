//! A hypervisor that remembers how its domain went to sleep.

use std::time::Duration;

use xen::fake::FakeHypervisor;
use xen::{
    Access, CopyOp, DomId, Errno, GrantRef, GrantStatus, GrantedPage, Hypervisor,
    HypervisorCounters, MappedPage, Page, Port, PortNumber, Time,
};

/// What a sleep was for.
#[derive(Clone, Debug)]
pub struct Sleep {
    /// The ports that end it.
    pub ports: Vec<PortNumber>,
    /// The time that ends it.
    pub deadline: Option<Time>,
}

/// The fake hypervisor, with a memory of the last sleep.
#[derive(Debug)]
pub struct Sleeper {
    inner: FakeHypervisor,
    asleep: Option<Sleep>,
}

impl Sleeper {
    /// Around a domain's own view.
    #[must_use]
    pub const fn new(inner: FakeHypervisor) -> Self {
        Self {
            inner,
            asleep: None,
        }
    }

    /// Forgets the last sleep: the domain runs now.
    pub fn wake(&mut self) {
        self.asleep = None;
        self.inner.refresh_time();
    }

    /// The last sleep since [`Sleeper::wake`].
    #[must_use]
    pub const fn asleep(&self) -> Option<&Sleep> {
        self.asleep.as_ref()
    }
}

impl Hypervisor for Sleeper {
    fn own_domid(&self) -> DomId {
        self.inner.own_domid()
    }
    fn now(&self) -> Time {
        self.inner.now()
    }
    fn refresh_time(&mut self) -> Time {
        self.inner.refresh_time()
    }
    fn running_time(&self) -> Option<Duration> {
        self.inner.running_time()
    }
    fn allocate(&mut self) -> Option<Page> {
        self.inner.allocate()
    }
    fn release(&mut self, page: Page) {
        self.inner.release(page);
    }
    fn free_pages(&self) -> usize {
        self.inner.free_pages()
    }
    fn grant(&mut self, peer: DomId, page: Page, access: Access) -> Result<GrantedPage, Page> {
        self.inner.grant(peer, page, access)
    }
    fn revoke(&mut self, granted: GrantedPage) -> Result<Page, GrantedPage> {
        self.inner.revoke(granted)
    }
    fn map(&mut self, peer: DomId, gref: GrantRef) -> Result<MappedPage, GrantStatus> {
        self.inner.map(peer, gref)
    }
    fn unmap(&mut self, mapped: MappedPage) {
        self.inner.unmap(mapped);
    }
    fn grant_copy(&mut self, ops: &mut [CopyOp], pages: &mut [Page]) {
        self.inner.grant_copy(ops, pages);
    }
    fn allocate_port(&mut self, peer: DomId) -> Result<Port, Errno> {
        self.inner.allocate_port(peer)
    }
    fn bind_port(&mut self, peer: DomId, remote: PortNumber) -> Result<Port, Errno> {
        self.inner.bind_port(peer, remote)
    }
    fn close_port(&mut self, port: Port) {
        self.inner.close_port(port);
    }
    fn notify(&mut self, ports: &[PortNumber]) {
        self.inner.notify(ports);
    }
    fn take_pending(&mut self, port: PortNumber) -> bool {
        self.inner.take_pending(port)
    }
    fn wait(&mut self, ports: &[PortNumber], deadline: Option<Time>) {
        self.inner.wait(ports, deadline);
        self.asleep = Some(Sleep {
            ports: ports.to_vec(),
            deadline,
        });
    }
    fn counters(&self) -> HypervisorCounters {
        self.inner.counters()
    }
}
