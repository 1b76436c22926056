//! The state that all domains of a fake machine share: grants, mappings, event channels, the clock.
//!
//! Statuses and rules are those of Xen as far as a driver can tell: who may use which grant, what a copy may
//! touch, which port may be bound. Not modelled: upcalls, grant transfers, limits other than [`Limits`].

use core::ptr::NonNull;
use std::boxed::Box;
use std::collections::VecDeque;
use std::vec::Vec;

use super::arena;
use crate::hypervisor::{Access, CopyDirection, CopyOp, HypervisorCounters};
use crate::page::{PAGE_SIZE, Page};
use crate::types::{DomId, Errno, GrantRef, GrantStatus, PortNumber};

/// References that the toolstack uses; ours start behind them.
const RESERVED_GRANTS: usize = 8;
/// Ports that a domain is born with (0 is never used, 1 xenstore, 2 console).
const RESERVED_PORTS: usize = 3;

/// What a fake domain may have at most.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Pages in its pool.
    pub pages: usize,
    /// Grant references.
    pub grants: usize,
    /// Pages of others that it maps.
    pub maps: usize,
    /// Event channel ports.
    pub ports: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pages: 4096,
            grants: 4096,
            maps: 512,
            ports: 1023,
        }
    }
}

/// What a domain has taken and not given back. All zero when nothing leaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Resources {
    /// Pages out of the pool, wherever they are.
    pub pages: usize,
    /// Grants not revoked.
    pub grants: usize,
    /// Pages of others still mapped.
    pub maps: usize,
    /// Ports not closed.
    pub ports: usize,
}

/// An operation of one domain that a test can make fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// [`crate::Hypervisor::allocate`]: the pool is empty.
    Allocate,
    /// [`crate::Hypervisor::grant`]: no reference is free.
    Grant,
    /// [`crate::Hypervisor::revoke`]: the page is busy.
    Revoke,
    /// [`crate::Hypervisor::map`]: no hole is left.
    Map,
    /// One element of [`crate::Hypervisor::grant_copy`], with this status.
    Copy(GrantStatus),
    /// [`crate::Hypervisor::allocate_port`]: no port is free.
    AllocatePort,
    /// [`crate::Hypervisor::bind_port`]: the port is not for us.
    BindPort,
}

/// Makes one operation fail, after `skip` others of its kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    pub(super) operation: Operation,
    pub(super) skip: u64,
    pub(super) times: u64,
}

#[derive(Clone, Copy)]
pub(super) struct Grant {
    base: NonNull<[u8; PAGE_SIZE]>,
    peer: DomId,
    access: Access,
    /// Mappings of it that exist.
    mapped: u32,
    /// The test pretends that the peer uses it.
    pub(super) held: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Channel {
    /// Waits for `peer` to bind to it, or `peer` has gone.
    Unbound { peer: DomId },
    /// Joined to a port of another domain.
    Joined { domain: DomId, port: PortNumber },
}

pub(super) struct Port {
    channel: Channel,
    pub(super) pending: bool,
    /// Notifications that arrived, those that found it pending included.
    pub(super) received: u64,
}

pub(super) struct Domain {
    pub(super) id: DomId,
    pub(super) alive: bool,
    pub(super) limits: Limits,
    pub(super) pool: Vec<Page>,
    pages_made: usize,
    pub(super) grants: Vec<Option<Grant>>,
    free_grants: VecDeque<u32>,
    /// Granter and reference of what is mapped, by handle.
    maps: Vec<Option<(DomId, GrantRef)>>,
    pub(super) ports: Vec<Option<Port>>,
    pub(super) faults: Vec<Fault>,
    pub(super) before_next_copy: Option<Box<dyn FnOnce()>>,
    pub(super) counters: HypervisorCounters,
}

impl Domain {
    fn new(id: DomId, limits: Limits) -> Self {
        let mut ports = Vec::new();
        ports.resize_with(RESERVED_PORTS, || None);
        Self {
            id,
            alive: true,
            limits,
            pool: Vec::new(),
            pages_made: 0,
            grants: Vec::new(),
            free_grants: VecDeque::new(),
            maps: Vec::new(),
            ports,
            faults: Vec::new(),
            before_next_copy: None,
            counters: HypervisorCounters::default(),
        }
    }

    /// Whether a test wants this operation to fail now.
    pub(super) fn fails(&mut self, matches: impl Fn(Operation) -> bool) -> Option<Operation> {
        let mut failing = None;
        for fault in &mut self.faults {
            if !matches(fault.operation) || fault.times == 0 {
                continue;
            }
            if fault.skip > 0 {
                fault.skip -= 1;
            } else {
                fault.times -= 1;
                failing = Some(fault.operation);
                break;
            }
        }
        self.faults.retain(|fault| fault.times > 0);
        failing
    }

    pub(super) fn fails_at(&mut self, operation: Operation) -> bool {
        !self.faults.is_empty() && self.fails(|other| other == operation).is_some()
    }

    pub(super) fn allocate(&mut self) -> Option<Page> {
        if self.fails_at(Operation::Allocate) {
            return None;
        }
        self.pool.pop().or_else(|| {
            (self.pages_made < self.limits.pages).then(|| {
                self.pages_made += 1;
                arena::take()
            })
        })
    }

    pub(super) fn free_pages(&self) -> usize {
        self.pool.len() + self.limits.pages.saturating_sub(self.pages_made)
    }

    pub(super) fn grant(&mut self, peer: DomId, page: &Page, access: Access) -> Option<GrantRef> {
        if self.fails_at(Operation::Grant) {
            return None;
        }
        let entry = Grant {
            base: page.base(),
            peer,
            access,
            mapped: 0,
            held: false,
        };
        // Fresh references first, then the one that was given back longest ago, so that stale ones fail.
        if self.grants.len() < self.limits.grants {
            self.grants.push(Some(entry));
            return u32::try_from(self.grants.len() - 1 + RESERVED_GRANTS)
                .ok()
                .map(GrantRef);
        }
        let gref = GrantRef(self.free_grants.pop_front()?);
        *self.grant_slot(gref)? = Some(entry);
        Some(gref)
    }

    fn grant_slot(&mut self, gref: GrantRef) -> Option<&mut Option<Grant>> {
        let index = usize::try_from(gref.0).ok()?.checked_sub(RESERVED_GRANTS)?;
        self.grants.get_mut(index)
    }

    pub(super) fn granted(&mut self, gref: GrantRef) -> Option<&mut Grant> {
        self.grant_slot(gref)?.as_mut()
    }

    /// Takes a grant back and tells what it allowed; `None` while a peer uses it.
    pub(super) fn revoke(&mut self, gref: GrantRef) -> Option<Access> {
        if self.fails_at(Operation::Revoke) {
            return None;
        }
        let slot = self.grant_slot(gref)?;
        let grant = slot.take_if(|grant| grant.mapped == 0 && !grant.held)?;
        self.free_grants.push_back(gref.0);
        Some(grant.access)
    }

    /// The page of a grant, if `by` may use it that way; else Xen's status.
    fn usable(
        &mut self,
        gref: GrantRef,
        by: DomId,
        write: bool,
    ) -> Result<&mut Grant, GrantStatus> {
        if !self.alive {
            return Err(GrantStatus::BAD_DOMAIN);
        }
        let slot = self.grant_slot(gref).ok_or(GrantStatus::BAD_GNTREF)?;
        let grant = slot.as_mut().ok_or(GrantStatus::GENERAL_ERROR)?;
        if grant.peer != by || (write && grant.access == Access::ReadOnly) {
            return Err(GrantStatus::PERMISSION_DENIED);
        }
        Ok(grant)
    }

    fn new_port(&mut self, channel: Channel, pending: bool) -> Result<PortNumber, Errno> {
        let port = Port {
            channel,
            pending,
            received: 0,
        };
        let free = self
            .ports
            .iter()
            .skip(RESERVED_PORTS)
            .position(Option::is_none);
        let index = match free {
            Some(index) => index + RESERVED_PORTS,
            None if self.ports.len() <= self.limits.ports => {
                self.ports.push(None);
                self.ports.len() - 1
            }
            None => return Err(Errno::ENOSPC),
        };
        if let Some(slot) = self.ports.get_mut(index) {
            *slot = Some(port);
        }
        u32::try_from(index)
            .map(PortNumber)
            .map_err(|_| Errno::ENOSPC)
    }

    pub(super) fn port(&mut self, port: PortNumber) -> Option<&mut Port> {
        let index = usize::try_from(port.0).ok()?;
        self.ports.get_mut(index)?.as_mut()
    }

    pub(super) fn resources(&self) -> Resources {
        Resources {
            pages: self.pages_made - self.pool.len(),
            grants: self.grants.iter().flatten().count(),
            maps: self.maps.iter().flatten().count(),
            ports: self.ports.iter().flatten().count(),
        }
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        arena::give_back(self.pool.drain(..));
    }
}

pub(super) struct World {
    pub(super) domains: Vec<Domain>,
    /// Nanoseconds since the machine started.
    pub(super) clock: u64,
}

impl World {
    pub(super) fn index_of(&self, id: DomId) -> Option<usize> {
        self.domains.iter().position(|domain| domain.id == id)
    }

    pub(super) fn add(&mut self, id: DomId, limits: Limits) -> usize {
        self.index_of(id).unwrap_or_else(|| {
            self.domains.push(Domain::new(id, limits));
            self.domains.len() - 1
        })
    }

    pub(super) fn find(&mut self, id: DomId) -> Option<&mut Domain> {
        self.domains.iter_mut().find(|domain| domain.id == id)
    }

    /// Maps a page of `granter` for domain `by`. Returns where it is, and the handle.
    pub(super) fn map(
        &mut self,
        by: usize,
        granter: DomId,
        gref: GrantRef,
    ) -> Result<(NonNull<u8>, u32), GrantStatus> {
        let domain = self.domains.get_mut(by).ok_or(GrantStatus::BAD_DOMAIN)?;
        let own = domain.id;
        let full = domain.maps.iter().flatten().count() >= domain.limits.maps;
        if full || domain.fails_at(Operation::Map) {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        let grant = self
            .find(granter)
            .ok_or(GrantStatus::BAD_DOMAIN)?
            .usable(gref, own, true)?;
        grant.mapped += 1;
        let base = grant.base.cast();
        let domain = self.domains.get_mut(by).ok_or(GrantStatus::BAD_DOMAIN)?;
        domain.maps.push(Some((granter, gref)));
        let handle =
            u32::try_from(domain.maps.len() - 1).map_err(|_| GrantStatus::GENERAL_ERROR)?;
        Ok((base, handle))
    }

    pub(super) fn unmap(&mut self, by: usize, handle: u32) {
        let mapped = self
            .domains
            .get_mut(by)
            .and_then(|domain| domain.maps.get_mut(usize::try_from(handle).ok()?)?.take());
        let grant = mapped.and_then(|(granter, gref)| self.find(granter)?.granted(gref));
        match grant {
            Some(grant) => grant.mapped -= 1,
            None => panic!("unmap of handle {handle}, which is not mapped"),
        }
    }

    /// Carries out one copy of domain `by`.
    pub(super) fn copy(&mut self, by: usize, op: &CopyOp, pages: &[Page]) -> GrantStatus {
        let fits = |offset: u16| usize::from(offset) + usize::from(op.len) <= PAGE_SIZE;
        let Some(page) = pages.get(usize::from(op.page)) else {
            return GrantStatus::BAD_COPY_ARG;
        };
        if !fits(op.offset) || !fits(op.peer_offset) || op.len == 0 {
            return GrantStatus::BAD_COPY_ARG;
        }
        let Some(domain) = self.domains.get_mut(by) else {
            return GrantStatus::BAD_DOMAIN;
        };
        if !domain.faults.is_empty()
            && let Some(Operation::Copy(status)) =
                domain.fails(|operation| matches!(operation, Operation::Copy(_)))
        {
            return status;
        }
        let own = domain.id;
        let write = op.direction == CopyDirection::ToPeer;
        let Some(granter) = self.find(op.peer) else {
            return GrantStatus::BAD_DOMAIN;
        };
        let theirs = match granter.usable(op.gref, own, write) {
            Ok(grant) => grant.base.cast::<u8>(),
            Err(status) => return status,
        };
        // SAFETY: `peer_offset` plus `len` stays in the page, which lives as long as its grant.
        let theirs = unsafe { theirs.add(usize::from(op.peer_offset)) };
        // SAFETY: `offset` plus `len` stays in the page, which is borrowed.
        let ours = unsafe { page.base().cast::<u8>().add(usize::from(op.offset)) };
        let (from, to) = if write {
            (ours, theirs)
        } else {
            (theirs, ours)
        };
        // SAFETY: both ranges are valid (above). `ours` is behind the caller's `&mut [Page]`, so nobody refers to it;
        // `theirs` is granted, so only volatile copies reach it. They may be the same page: `copy` allows overlap.
        unsafe { from.copy_to(to, usize::from(op.len)) };
        GrantStatus::OKAY
    }

    pub(super) fn allocate_port(&mut self, by: usize, peer: DomId) -> Result<PortNumber, Errno> {
        let domain = self.domains.get_mut(by).ok_or(Errno::ESRCH)?;
        if domain.fails_at(Operation::AllocatePort) {
            return Err(Errno::ENOSPC);
        }
        // What a new port's pending bit says is unknown.
        domain.new_port(Channel::Unbound { peer }, true)
    }

    pub(super) fn bind_port(
        &mut self,
        by: usize,
        peer: DomId,
        remote: PortNumber,
    ) -> Result<PortNumber, Errno> {
        let domain = self.domains.get_mut(by).ok_or(Errno::ESRCH)?;
        let own = domain.id;
        if domain.fails_at(Operation::BindPort) {
            return Err(Errno::EINVAL);
        }
        let other = self
            .find(peer)
            .filter(|other| other.alive)
            .ok_or(Errno::ESRCH)?;
        let reserved = Channel::Unbound { peer: own };
        other
            .port(remote)
            .filter(|port| port.channel == reserved)
            .ok_or(Errno::EINVAL)?;
        let joined = Channel::Joined {
            domain: peer,
            port: remote,
        };
        let domain = self.domains.get_mut(by).ok_or(Errno::ESRCH)?;
        let local = domain.new_port(joined, true)?;
        if let Some(port) = self.find(peer).and_then(|other| other.port(remote)) {
            port.channel = Channel::Joined {
                domain: own,
                port: local,
            };
        }
        Ok(local)
    }

    pub(super) fn close_port(&mut self, by: usize, port: PortNumber) {
        let Some(domain) = self.domains.get_mut(by) else {
            return;
        };
        let own = domain.id;
        let index = usize::try_from(port.0).unwrap_or(usize::MAX);
        match domain.ports.get_mut(index).and_then(Option::take) {
            Some(closed) => self.part(own, closed.channel),
            None => panic!("close of {port:?}, which is not open"),
        }
    }

    /// Makes the other end of a closed channel unbound.
    fn part(&mut self, own: DomId, channel: Channel) {
        if let Channel::Joined { domain, port } = channel
            && let Some(other) = self.find(domain).and_then(|domain| domain.port(port))
        {
            other.channel = Channel::Unbound { peer: own };
        }
    }

    pub(super) fn notify(&mut self, by: usize, port: PortNumber) {
        let channel = self
            .domains
            .get_mut(by)
            .and_then(|domain| domain.port(port))
            .map(|port| port.channel);
        if let Some(Channel::Joined { domain, port }) = channel
            && let Some(other) = self.find(domain).and_then(|domain| domain.port(port))
        {
            other.pending = true;
            other.received += 1;
        }
    }

    /// Ends a domain: its grants can no longer be used, its channels fall apart. What it has mapped stays busy.
    pub(super) fn kill(&mut self, id: DomId) {
        let Some(domain) = self.find(id) else {
            return;
        };
        domain.alive = false;
        let channels: Vec<Channel> = domain
            .ports
            .iter()
            .flatten()
            .map(|port| port.channel)
            .collect();
        for channel in channels {
            self.part(id, channel);
        }
    }
}
