//! What is known about one name in one family.

use alloc::vec::Vec;
use core::net::IpAddr;

use super::{FailureKind, KEEP_SECS, MAX_ADDRESSES};
use crate::frame::Time;
use crate::rule::{Family, HostName};

/// Addresses with the time until which each is good. Bounded: when full, a new one takes the place of
/// the one that would go first.
#[derive(Debug, Default)]
pub(super) struct AddressPool {
    addresses: Vec<(IpAddr, Time)>,
}

impl AddressPool {
    /// Adds an address, or prolongs it; returns whether the set of addresses has changed.
    pub(super) fn see(&mut self, address: IpAddr, until: Time) -> bool {
        if let Some((_, old)) = self
            .addresses
            .iter_mut()
            .find(|(known, _)| *known == address)
        {
            *old = until.max(*old);
            return false;
        }
        if self.addresses.len() < MAX_ADDRESSES {
            self.addresses.push((address, until));
        } else if let Some(first) = self.addresses.iter_mut().min_by_key(|(_, until)| *until) {
            *first = (address, until);
        }
        true
    }

    /// Takes out what is no longer good; returns whether that was anything.
    pub(super) fn expire(&mut self, now: Time) -> bool {
        let before = self.addresses.len();
        self.addresses.retain(|&(_, until)| until > now);
        self.addresses.len() != before
    }

    /// When [`Self::expire`] next has something to do.
    pub(super) fn next_expiry(&self) -> Option<Time> {
        self.addresses.iter().map(|&(_, until)| until).min()
    }

    /// The addresses.
    pub(super) fn iter(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().map(|&(address, _)| address)
    }

    pub(super) fn len(&self) -> usize {
        self.addresses.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }
}

/// Lookups that went wrong, since the last one that did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What was wrong with the last one.
    pub kind: FailureKind,
    /// When the first one ended.
    pub since: Time,
    /// How many there were.
    pub count: u32,
}

/// Whether and when a name is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lookup {
    /// DNS cannot have the name.
    Never,
    /// At this time.
    At(Time),
    /// As soon as there is a server and room.
    Queued,
    /// Now.
    Running,
}

/// A name in one family, with its addresses and its lookups.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) name: HostName,
    pub(super) family: Family,
    /// The client addresses whose rules have the name. Never empty.
    pub(super) users: Vec<IpAddr>,
    pub(super) pool: AddressPool,
    /// Until when the last good answer counts; `None` if there is none that does.
    pub(super) resolved_until: Option<Time>,
    pub(super) failure: Option<Failure>,
    pub(super) lookup: Lookup,
    /// When the last lookup began.
    pub(super) asked_at: Option<Time>,
    /// Where the record is in the schedule.
    pub(super) scheduled_at: Option<Time>,
}

impl Record {
    pub(super) fn new(name: HostName, family: Family, user: IpAddr, now: Time) -> Self {
        let is_possible = name.is_resolvable();
        let impossible = Failure {
            kind: FailureKind::ImpossibleName,
            since: now,
            count: 1,
        };
        Self {
            name,
            family,
            users: Vec::from([user]),
            pool: AddressPool::default(),
            resolved_until: None,
            failure: (!is_possible).then_some(impossible),
            lookup: if is_possible {
                Lookup::At(now)
            } else {
                Lookup::Never
            },
            asked_at: None,
            scheduled_at: None,
        }
    }

    /// Takes the addresses of a good answer, which may be none; returns whether rules are affected.
    pub(super) fn succeed(&mut self, addresses: &[IpAddr], ttl_secs: u64, now: Time) -> bool {
        let until = now.plus_secs(ttl_secs + KEEP_SECS);
        let was_resolved = self.resolved_until.replace(until).is_some();
        self.failure = None;
        let mut changed = !was_resolved;
        for &address in addresses {
            changed |= self.pool.see(address, until);
        }
        changed
    }

    /// Notes that a lookup has failed. What was known before stays until its time.
    pub(super) fn fail(&mut self, kind: FailureKind, now: Time) {
        let (since, count) = match self.failure {
            Some(failure) => (failure.since, failure.count),
            None => (now, 0),
        };
        self.failure = Some(Failure {
            kind,
            since,
            count: count.saturating_add(1),
        });
    }

    /// Forgets what is no longer good; returns whether rules are affected.
    pub(super) fn expire(&mut self, now: Time) -> bool {
        let is_stale = self.resolved_until.is_some_and(|until| until <= now);
        if is_stale {
            self.resolved_until = None;
        }
        self.pool.expire(now) || is_stale
    }

    /// When something is to be done next.
    pub(super) fn wake_at(&self) -> Option<Time> {
        let lookup_at = match self.lookup {
            Lookup::At(time) => Some(time),
            Lookup::Never | Lookup::Queued | Lookup::Running => None,
        };
        let times = [lookup_at, self.resolved_until, self.pool.next_expiry()];
        times.into_iter().flatten().min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::Ipv4Addr;

    fn address(number: u32) -> IpAddr {
        Ipv4Addr::from_bits(number).into()
    }

    #[test]
    fn full_pool_gives_up_the_address_that_would_go_first() {
        let mut pool = AddressPool::default();
        for number in 0..u32::try_from(MAX_ADDRESSES).unwrap() {
            assert!(pool.see(address(number), Time::from_secs(u64::from(number) + 100)));
        }
        assert!(!pool.see(address(0), Time::from_secs(1000)));
        assert!(pool.see(address(9999), Time::from_secs(1001)));
        assert_eq!(pool.len(), MAX_ADDRESSES);
        assert!(pool.iter().any(|known| known == address(0)));
        assert!(!pool.iter().any(|known| known == address(1)));
        assert!(pool.iter().any(|known| known == address(9999)));
    }

    #[test]
    fn addresses_expire_at_their_time() {
        let mut pool = AddressPool::default();
        pool.see(address(1), Time::from_secs(10));
        pool.see(address(2), Time::from_secs(20));
        assert_eq!(pool.next_expiry(), Some(Time::from_secs(10)));
        assert!(!pool.expire(Time::from_secs(9)));
        assert!(pool.expire(Time::from_secs(10)));
        assert_eq!(pool.len(), 1);
    }

    #[test]
    fn failure_keeps_the_last_good_answer_for_a_bounded_time() {
        let name = HostName::new("a.example").unwrap();
        let mut record = Record::new(name, Family::Ipv4, address(1), Time::ZERO);
        assert!(record.succeed(&[address(2)], 60, Time::ZERO));
        assert!(!record.succeed(&[address(2)], 60, Time::from_secs(60)));
        record.fail(FailureKind::Timeout, Time::from_secs(120));
        record.fail(FailureKind::Timeout, Time::from_secs(130));
        let failure = record.failure.unwrap();
        assert_eq!((failure.count, failure.since), (2, Time::from_secs(120)));
        assert!(!record.expire(Time::from_secs(120 + KEEP_SECS - 1)));
        assert!(record.resolved_until.is_some() && !record.pool.is_empty());
        assert!(record.expire(Time::from_secs(120 + KEEP_SECS)));
        assert!(record.resolved_until.is_none() && record.pool.is_empty());
    }
}
