//! Addresses that clients are told, for names in their rules.
//!
//! A client's query is remembered for a few seconds; only an answer to it teaches anything, once. What
//! was learned belongs to one client address and one name.

use alloc::vec::Vec;
use core::net::IpAddr;

use litemap::LiteMap;

use super::Changed;
use super::record::AddressPool;
use crate::frame::Time;

/// Queries of one client that are remembered at a time. A new one takes the place of the oldest.
const MAX_QUERIES: usize = 16;

/// How long a query is remembered, in seconds.
const QUERY_SECS: u64 = 10;

/// Most addresses learned for one client address.
const MAX_LEARNED_EACH: usize = 256;

/// Most addresses learned in all.
const MAX_LEARNED: usize = 8_192;

/// What a rule's name and a client's address are to each other: the address, and the record of the name.
pub(super) type Use = (IpAddr, u32);

/// What an answer must match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClientQuery {
    /// The server it went to.
    pub(super) server: IpAddr,
    /// The client's port.
    pub(super) port: u16,
    /// The id of the message.
    pub(super) id: u16,
}

/// A query that was sent.
#[derive(Clone, Copy, Debug)]
struct Watched {
    query: ClientQuery,
    rule: Use,
    until: Time,
}

/// Queries under way and what answers have taught.
#[derive(Debug, Default)]
pub(super) struct Learner {
    /// By the address that the client asks from, oldest first.
    queries: LiteMap<IpAddr, Vec<Watched>>,
    learned: LiteMap<Use, AddressPool>,
    /// Addresses in all of `learned`.
    count: usize,
    /// No address expires before this.
    next_expiry: Option<Time>,
}

impl Learner {
    /// Remembers a query for a name in a rule.
    pub(super) fn watch(&mut self, client: IpAddr, query: ClientQuery, rule: Use, now: Time) {
        let queries = self.queries.entry(client).or_default();
        queries.retain(|watched| watched.until > now && watched.query != query);
        if queries.len() >= MAX_QUERIES {
            queries.remove(0);
        }
        queries.push(Watched {
            query,
            rule,
            until: now.plus_secs(QUERY_SECS),
        });
    }

    /// Takes out the query that an answer is for: which rule it was about.
    pub(super) fn answered(
        &mut self,
        client: IpAddr,
        query: ClientQuery,
        now: Time,
    ) -> Option<Use> {
        let queries = self.queries.get_mut(&client)?;
        let fits = |watched: &Watched| watched.query == query && watched.until > now;
        let index = queries.iter().position(fits)?;
        Some(queries.remove(index).rule)
    }

    /// Learns addresses, as far as there is room; returns whether any is new.
    pub(super) fn learn(&mut self, rule: Use, addresses: &[IpAddr], until: Time) -> bool {
        if addresses.is_empty() {
            return false;
        }
        let room = (MAX_LEARNED_EACH.saturating_sub(self.count_of(rule.0)))
            .min(MAX_LEARNED.saturating_sub(self.count));
        let pool = self.learned.entry(rule).or_default();
        let before = pool.len();
        let mut is_new = false;
        for &address in addresses {
            if pool.len() < before + room || pool.iter().any(|known| known == address) {
                is_new |= pool.see(address, until);
            }
        }
        self.count += pool.len() - before;
        self.next_expiry = Some(self.next_expiry.map_or(until, |time| time.min(until)));
        is_new
    }

    /// The addresses learned for a name in a client's rules.
    pub(super) fn addresses(&self, rule: Use) -> impl Iterator<Item = IpAddr> {
        self.learned
            .get(&rule)
            .into_iter()
            .flat_map(AddressPool::iter)
    }

    /// Forgets what a client address has learned for names other than `records`, which are in order.
    pub(super) fn retain(&mut self, user: IpAddr, records: &[u32]) {
        let stays = |rule: Use| rule.0 != user || records.binary_search(&rule.1).is_ok();
        self.learned.retain(|rule, _| stays(*rule));
        self.count = self.learned.values().map(AddressPool::len).sum();
        for (_, queries) in self.queries.iter_mut() {
            queries.retain(|watched| stays(watched.rule));
        }
        self.queries.retain(|_, queries| !queries.is_empty());
    }

    /// Forgets addresses whose time has come, and notes whose rules that affects.
    pub(super) fn expire(&mut self, now: Time, changed: &mut Changed) {
        if self.next_expiry.is_none_or(|time| time > now) {
            return;
        }
        for ((user, _), pool) in self.learned.iter_mut() {
            if pool.expire(now) {
                changed.insert(*user);
            }
        }
        self.learned.retain(|_, pool| !pool.is_empty());
        self.count = self.learned.values().map(AddressPool::len).sum();
        self.next_expiry = self
            .learned
            .values()
            .filter_map(AddressPool::next_expiry)
            .min();
    }

    /// When [`Self::expire`] may have something to do.
    pub(super) const fn next_expiry(&self) -> Option<Time> {
        self.next_expiry
    }

    fn count_of(&self, user: IpAddr) -> usize {
        let pools = self.learned.iter().filter(|(rule, _)| rule.0 == user);
        pools.map(|(_, pool)| pool.len()).sum()
    }
}
