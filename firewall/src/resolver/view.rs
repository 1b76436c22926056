//! What the names stand for: to rules that are compiled, and to people.

use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Resolver;
use super::record::{Failure, Record};
use crate::rule::{Family, HostName};
use crate::ruleset::{HostLookup, HostState};

/// What is known about a name in one family, for people to see.
#[derive(Clone, Copy, Debug)]
pub struct NameView<'a> {
    /// The name.
    pub name: &'a HostName,
    /// The family.
    pub family: Family,
    /// Whether a good answer counts, be it a recent one or one from before a failure.
    pub state: HostState,
    /// How many addresses we know from our own lookups.
    pub addresses: usize,
    /// The failure since the last good answer.
    pub failure: Option<Failure>,
}

impl Resolver {
    /// The names as the rules of one client address may use them.
    pub const fn hosts_of(&self, user: IpAddr) -> UserHosts<'_> {
        UserHosts {
            resolver: self,
            user,
        }
    }

    /// Every name, for people to see.
    pub fn names(&self) -> impl Iterator<Item = NameView<'_>> {
        self.records.values().map(Record::view)
    }

    /// The names in the rules of a client address that found room, each once.
    pub fn names_of(&self, user: IpAddr) -> impl Iterator<Item = NameView<'_>> {
        let keys = self.users.get(&user).map_or(&[][..], Vec::as_slice);
        keys.iter()
            .filter_map(|key| self.records.get(key))
            .map(Record::view)
    }
}

/// Whether the last good answer for a record counts.
const fn state_of(record: &Record) -> HostState {
    match record.resolved_until {
        Some(_) => HostState::Resolved,
        None => HostState::Unresolved,
    }
}

impl Record {
    fn view(&self) -> NameView<'_> {
        NameView {
            name: &self.name,
            family: self.family,
            state: state_of(self),
            addresses: self.pool.len(),
            failure: self.failure,
        }
    }
}

/// What names stand for in the rules of one client address: what we have found out, and what the client
/// has learned.
#[derive(Clone, Copy, Debug)]
pub struct UserHosts<'a> {
    resolver: &'a Resolver,
    user: IpAddr,
}

impl UserHosts<'_> {
    fn visit(&self, family: Family, name: &HostName, each: &mut dyn FnMut(IpAddr)) -> HostState {
        let resolver = self.resolver;
        let key = resolver.key_of(family, name);
        let record = key.and_then(|key| resolver.records.get(&key));
        let (Some(key), Some(record)) = (key, record) else {
            return HostState::Unresolved;
        };
        record.pool.iter().for_each(&mut *each);
        if let Some(learner) = &resolver.learner {
            learner.addresses((self.user, key)).for_each(each);
        }
        state_of(record)
    }
}

impl HostLookup for UserHosts<'_> {
    fn addresses4(&self, name: &HostName, each: &mut dyn FnMut(Ipv4Addr)) -> HostState {
        self.visit(Family::Ipv4, name, &mut |address| {
            if let IpAddr::V4(address) = address {
                each(address);
            }
        })
    }

    fn addresses6(&self, name: &HostName, each: &mut dyn FnMut(Ipv6Addr)) -> HostState {
        self.visit(Family::Ipv6, name, &mut |address| {
            if let IpAddr::V6(address) = address {
                each(address);
            }
        })
    }
}
