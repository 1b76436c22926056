//! Host names in rules: resolved by ourselves, and learned from answers that clients receive.
//!
//! A stub resolver without sockets and without a clock. The owner tells it the names of each client's
//! rules and our resolvers, hands it the packets that servers send to its ports, and sends what it asks
//! for. It says which clients' rules are to be compiled again, and what their names stand for.
//!
//! # Looking up
//!
//! Every name is asked for at once in the family of the rule chain, by UDP, server after server with
//! growing patience; by TCP when the answer was truncated. A good answer is asked for again when its
//! time to live ends, which counts as at least [`MIN_TTL_SECS`] and at most [`MAX_TTL_SECS`]. Addresses
//! stay for [`KEEP_SECS`] beyond that, so that names that change their addresses all the time do not
//! break running connections. So does the answer as a whole when later lookups fail. After that the
//! name is unresolved. Failures show in [`Resolver::names`].
//!
//! # Learning
//!
//! Names in content networks have other addresses every time one asks, so the client's answer differs
//! from ours. When a client asks one of our resolvers for a name in its rules and gets an answer, the
//! addresses in it count for that name and that client, until their time to live and [`KEEP_SECS`] have
//! passed. Only UDP answers are looked at, and only for queries that the client has sent: same server,
//! ports, id, name and type. Aliases count if the answer holds the whole chain from the name in the
//! rule. It can be switched off.
//!
//! # Trust
//!
//! Whoever controls the answers for a name controls what rules with that name let through; that is what
//! rules by name mean. Everybody else must guess a random port and id. Answers are parsed with bounds,
//! see `message.rs`.
//!
//! # Bounds
//!
//! [`MAX_NAMES`] names, [`MAX_ADDRESSES`] addresses each, [`MAX_LOOKUPS`] lookups at a time; what a
//! client learns is bounded per client. A name that finds no room stays unresolved and is counted.
//!
//! Source: `qubes-policy.md` 4.4; RFC 1035, RFC 5452 (forgery), RFC 7766 (TCP).

mod clients;
mod exchange;
mod frames;
mod learn;
mod message;
mod name;
mod random;
mod record;
mod tcp;
mod view;
mod watch;

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::net::IpAddr;

use litemap::LiteMap;

use crate::frame::Time;
use crate::rule::{Family, HostName};

use exchange::{Exchange, Line, SERVER_PORT, Step};
use learn::Learner;
use message::Question;
use name::Name;
use random::Random;
use record::{Lookup, Record};

pub use record::Failure;
pub use view::{NameView, UserHosts};
pub use watch::{Sight, sight};

/// Most names, each in one family, that are kept.
pub const MAX_NAMES: usize = 1024;

/// Most addresses of one name in one family.
pub const MAX_ADDRESSES: usize = 64;

/// Most lookups at a time.
pub const MAX_LOOKUPS: usize = 16;

/// Most resolvers of ours that are used.
pub const MAX_SERVERS: usize = 4;

/// A shorter time to live counts as this, in seconds.
pub const MIN_TTL_SECS: u64 = 30;

/// A longer time to live counts as this, in seconds.
pub const MAX_TTL_SECS: u64 = 3_600;

/// How long addresses and answers stay after their time to live, in seconds.
pub const KEEP_SECS: u64 = 3_600;

/// How long it is believed that a name has no address, in seconds.
const NO_DATA_TTL_SECS: u64 = 300;

/// Pause after the first failed lookup of a name, in seconds; doubles up to the one below.
const FIRST_RETRY_SECS: u64 = 5;
const MAX_RETRY_SECS: u64 = 300;

/// A commit asks again for names that were asked for longer ago than this, in seconds. dom0 commits
/// twice when a client starts.
const ASK_AGAIN_SECS: u64 = 5;

/// What carries a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Protocol 17.
    Udp,
    /// Protocol 6.
    Tcp,
}

/// A packet to send to a resolver of ours, from our own address on the uplink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// Where it goes.
    pub server: IpAddr,
    /// The protocol.
    pub transport: Transport,
    /// The UDP datagram or TCP segment with its header. The checksum is zero, for the owner to fill in.
    pub bytes: Vec<u8>,
}

/// Why a lookup failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// No server answered in time.
    Timeout,
    /// The name does not exist.
    NoSuchName,
    /// A server could not answer; its response code, or zero for an answer that makes no sense.
    ServerFailure(u8),
    /// DNS cannot have the name, so nobody is asked.
    ImpossibleName,
}

/// What the resolver has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Lookups begun.
    pub lookups: u64,
    /// Lookups that ended with addresses or the certainty that there are none.
    pub resolved: u64,
    /// Lookups that ended otherwise.
    pub failed: u64,
    /// Packets from a server that were not the answer to anything asked.
    pub unexpected: u64,
    /// Names that found no room.
    pub refused_names: u64,
    /// Answers to clients that taught an address.
    pub learned: u64,
}

/// Names of rules and what they stand for.
#[derive(Debug)]
pub struct Resolver {
    random: Random,
    servers: Vec<IpAddr>,
    records: LiteMap<u32, Record>,
    by_name: LiteMap<(Family, HostName), u32>,
    next_record: u32,
    /// When which record has something to do.
    schedule: LiteMap<(Time, u32), ()>,
    /// The records of each client address.
    users: LiteMap<IpAddr, Vec<u32>>,
    /// Names to be looked up as soon as there is a server and room. Some may be gone since.
    queue: VecDeque<u32>,
    exchanges: Vec<Exchange>,
    outgoing: VecDeque<Transmit>,
    /// Client addresses whose rules must be compiled again.
    changed: Changed,
    learner: Option<Learner>,
    counters: Counters,
}

/// Client addresses whose rules must be compiled again, in order, each once.
#[derive(Debug, Default)]
struct Changed(Vec<IpAddr>);

impl Changed {
    fn insert(&mut self, user: IpAddr) {
        if let Err(position) = self.0.binary_search(&user) {
            self.0.insert(position, user);
        }
    }

    fn extend(&mut self, users: &[IpAddr]) {
        for user in users {
            self.insert(*user);
        }
    }

    fn remove(&mut self, user: IpAddr) {
        self.0.retain(|known| *known != user);
    }

    fn pop(&mut self) -> Option<IpAddr> {
        (!self.0.is_empty()).then(|| self.0.remove(0))
    }
}

/// The family of the rules for a client address.
const fn family_of(address: IpAddr) -> Family {
    match address {
        IpAddr::V4(_) => Family::Ipv4,
        IpAddr::V6(_) => Family::Ipv6,
    }
}

/// A time to live as it counts.
fn clamp_ttl(seconds: u32) -> u64 {
    u64::from(seconds).clamp(MIN_TTL_SECS, MAX_TTL_SECS)
}

impl Resolver {
    /// A resolver without names and servers. `seed` must be unpredictable to the network; `learn` says
    /// whether answers to clients count.
    pub fn new(seed: [u8; 32], learn: bool) -> Self {
        Self {
            random: Random::new(seed),
            servers: Vec::new(),
            records: LiteMap::new(),
            by_name: LiteMap::new(),
            next_record: 0,
            schedule: LiteMap::new(),
            users: LiteMap::new(),
            queue: VecDeque::new(),
            exchanges: Vec::new(),
            outgoing: VecDeque::new(),
            changed: Changed::default(),
            learner: learn.then(Learner::default),
            counters: Counters::default(),
        }
    }

    /// Takes new resolvers of ours, the first [`MAX_SERVERS`] of them, in order of preference. If they
    /// differ from the old ones, or `is_new_uplink` says that they may mean something else now, lookups
    /// under way are given up and every name is asked for again.
    pub fn set_servers(&mut self, servers: &[IpAddr], is_new_uplink: bool, now: Time) {
        let servers: Vec<_> = servers.iter().copied().take(MAX_SERVERS).collect();
        if servers == self.servers && !is_new_uplink {
            return;
        }
        self.servers = servers;
        self.outgoing.clear();
        for exchange in self.exchanges.drain(..) {
            if let Some(record) = self.records.get_mut(&exchange.record) {
                record.lookup = Lookup::Queued;
                self.queue.push_back(exchange.record);
            }
        }
        let keys: Vec<_> = self.records.keys().copied().collect();
        for key in keys {
            self.ask_at(key, now);
        }
    }

    /// Takes the names in the rules of a client address, in place of the ones before. Names that are
    /// known keep their addresses and are asked for again.
    ///
    /// Returns whether there was room for all. A name without room is unresolved.
    pub fn set_names<'a>(
        &mut self,
        user: IpAddr,
        names: impl IntoIterator<Item = &'a HostName>,
        now: Time,
    ) -> bool {
        let family = family_of(user);
        let old = self.users.remove(&user).unwrap_or_default();
        let mut keys: Vec<u32> = Vec::new();
        let mut is_room = true;
        for name in names {
            match self.use_name(family, name, user, now) {
                Some(key) => {
                    // New names have growing keys, so this is nearly always the end.
                    if let Err(at) = keys.binary_search(&key) {
                        keys.insert(at, key);
                    }
                }
                None => {
                    is_room = false;
                    self.counters.refused_names += 1;
                }
            }
        }
        for key in old {
            if keys.binary_search(&key).is_err() {
                self.unuse(key, user);
            }
        }
        if let Some(learner) = &mut self.learner {
            learner.retain(user, &keys);
        }
        if !keys.is_empty() {
            self.users.insert(user, keys);
        }
        is_room
    }

    /// Forgets a client address and what it has learned.
    pub fn forget(&mut self, user: IpAddr) {
        for key in self.users.remove(&user).unwrap_or_default() {
            self.unuse(key, user);
        }
        if let Some(learner) = &mut self.learner {
            learner.retain(user, &[]);
        }
        self.changed.remove(user);
    }

    /// The record of a name, if there is one.
    fn key_of(&self, family: Family, name: &HostName) -> Option<u32> {
        let key = |known: &(Family, HostName)| (known.0, &known.1).cmp(&(family, name));
        self.by_name.get_by(key).copied()
    }

    fn use_name(
        &mut self,
        family: Family,
        name: &HostName,
        user: IpAddr,
        now: Time,
    ) -> Option<u32> {
        if let Some(key) = self.key_of(family, name) {
            let record = self.records.get_mut(&key)?;
            if !record.users.contains(&user) {
                record.users.push(user);
            }
            let is_recent = |asked: Time| asked.plus_secs(ASK_AGAIN_SECS) > now;
            if !record.asked_at.is_some_and(is_recent) {
                self.ask_at(key, now);
            }
            return Some(key);
        }
        if self.records.len() >= MAX_NAMES {
            return None;
        }
        let key = self.next_record;
        self.next_record = key.checked_add(1)?;
        let record = Record::new(name.clone(), family, user, now);
        self.records.insert(key, record);
        self.by_name.insert((family, name.clone()), key);
        self.reschedule(key);
        Some(key)
    }

    fn unuse(&mut self, key: u32, user: IpAddr) {
        let Some(record) = self.records.get_mut(&key) else {
            return;
        };
        record.users.retain(|&other| other != user);
        if !record.users.is_empty() {
            return;
        }
        if let Some(record) = self.records.remove(&key) {
            if let Some(time) = record.scheduled_at {
                self.schedule.remove(&(time, key));
            }
            self.by_name.remove(&(record.family, record.name));
        }
        self.exchanges.retain(|exchange| exchange.record != key);
    }

    /// Makes a name due for a lookup, unless one is under way or the name is impossible.
    fn ask_at(&mut self, key: u32, time: Time) {
        if let Some(record) = self.records.get_mut(&key)
            && let Lookup::At(_) = record.lookup
        {
            record.lookup = Lookup::At(time);
            self.reschedule(key);
        }
    }

    /// Puts a record where it belongs in the schedule.
    fn reschedule(&mut self, key: u32) {
        let Some(record) = self.records.get_mut(&key) else {
            return;
        };
        if let Some(old) = record.scheduled_at {
            self.schedule.remove(&(old, key));
        }
        record.scheduled_at = record.wake_at();
        if let Some(new) = record.scheduled_at {
            self.schedule.insert((new, key), ());
        }
    }

    /// Does what is due. Call at [`Self::next_deadline`], and after anything else here was called.
    pub fn poll(&mut self, now: Time) {
        while let Some((&(time, key), ())) = self.schedule.first()
            && time <= now
        {
            self.wake(key, now);
        }
        let mut index = 0;
        while let Some(exchange) = self.exchanges.get_mut(index) {
            let mut line = Line {
                servers: &self.servers,
                random: &mut self.random,
                outgoing: &mut self.outgoing,
            };
            let step = exchange.tend(&mut line, now);
            if !self.finish(index, step, now) {
                index += 1;
            }
        }
        self.start_lookups(now);
        if let Some(learner) = &mut self.learner {
            learner.expire(now, &mut self.changed);
        }
    }

    /// When [`Self::poll`] next has something to do.
    pub fn next_deadline(&self) -> Option<Time> {
        // Names that wait for a server or for room can be asked for as soon as there are both.
        if !self.queue.is_empty() && !self.servers.is_empty() && self.exchanges.len() < MAX_LOOKUPS
        {
            return Some(Time::ZERO);
        }
        let exchanges = self.exchanges.iter().map(Exchange::deadline).min();
        let schedule = self.schedule.first().map(|(&(time, _), ())| time);
        let learned = self.learner.as_ref().and_then(Learner::next_expiry);
        [exchanges, schedule, learned].into_iter().flatten().min()
    }

    /// The next packet to send. Call until `None` after [`Self::poll`] and [`Self::receive`].
    pub fn next_transmit(&mut self) -> Option<Transmit> {
        self.outgoing.pop_front()
    }

    /// Whether [`Self::next_transmit`] has a packet.
    pub fn has_transmit(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// The next client address whose rules must be compiled again, because its names stand for something
    /// else now.
    pub fn next_changed(&mut self) -> Option<IpAddr> {
        self.changed.pop()
    }

    /// Forgets what is no longer good in one record, and queues it for its lookup if that is due.
    fn wake(&mut self, key: u32, now: Time) {
        let Some(record) = self.records.get_mut(&key) else {
            return;
        };
        if record.expire(now) {
            self.changed.extend(&record.users);
        }
        if matches!(record.lookup, Lookup::At(time) if time <= now) {
            record.lookup = Lookup::Queued;
            self.queue.push_back(key);
        }
        self.reschedule(key);
    }

    fn start_lookups(&mut self, now: Time) {
        while self.exchanges.len() < MAX_LOOKUPS && !self.servers.is_empty() {
            let Some(key) = self.queue.pop_front() else {
                return;
            };
            // The record may be gone.
            let Some(record) = self.records.get_mut(&key) else {
                continue;
            };
            let Some(name) = Name::of_host(&record.name) else {
                continue;
            };
            record.lookup = Lookup::Running;
            record.asked_at = Some(now);
            let question = Question {
                name,
                family: record.family,
            };
            let mut line = Line {
                servers: &self.servers,
                random: &mut self.random,
                outgoing: &mut self.outgoing,
            };
            self.exchanges
                .push(Exchange::begin(key, question, &mut line, now));
            self.counters.lookups += 1;
        }
    }

    /// Whether a packet with these addresses and ports is for [`Self::receive`].
    pub fn is_ours(&self, server: IpAddr, transport: Transport, local_port: u16) -> bool {
        let is_asked = |exchange: &Exchange| exchange.has_asked(server, transport, local_port);
        self.exchanges.iter().any(is_asked)
    }

    /// Takes the UDP datagram or TCP segment, with its header and a checksum that was verified, that
    /// `server` has sent to our address. Returns whether it was used; a packet that answers nothing may
    /// still belong to a client whose translated port is the same.
    pub fn receive(
        &mut self,
        server: IpAddr,
        transport: Transport,
        bytes: &[u8],
        now: Time,
    ) -> bool {
        let local_port = match bytes.first_chunk() {
            Some(&[0, SERVER_PORT, high, low]) => u16::from_be_bytes([high, low]),
            _ => return false,
        };
        let mut is_ours = false;
        for index in 0..self.exchanges.len() {
            let Some(exchange) = self.exchanges.get_mut(index) else {
                break;
            };
            if !exchange.has_asked(server, transport, local_port) {
                continue;
            }
            is_ours = true;
            let mut line = Line {
                servers: &self.servers,
                random: &mut self.random,
                outgoing: &mut self.outgoing,
            };
            let step = match transport {
                Transport::Udp => exchange.receive_udp(server, local_port, bytes, &mut line, now),
                Transport::Tcp => exchange.receive_tcp(bytes, &mut line, now),
            };
            // Two lookups may have drawn the same port.
            if step != Step::Ignored {
                self.finish(index, step, now);
                return true;
            }
        }
        self.counters.unexpected += u64::from(is_ours);
        false
    }

    /// Takes the result out of an exchange, if it has come to one; returns whether it has.
    fn finish(&mut self, index: usize, step: Step, now: Time) -> bool {
        let Step::Over(result) = step else {
            return false;
        };
        let key = self.exchanges.swap_remove(index).record;
        let Some(record) = self.records.get_mut(&key) else {
            return true;
        };
        let pause_millis = match result {
            Ok(found) => {
                self.counters.resolved += 1;
                let ttl = match found.ttl {
                    Some(ttl) => clamp_ttl(ttl),
                    None => NO_DATA_TTL_SECS,
                };
                if record.succeed(&found.addresses, ttl, now) {
                    self.changed.extend(&record.users);
                }
                // Up to a tenth early, so that names do not stay in step.
                ttl * 900 + self.random.below(ttl * 100)
            }
            Err(kind) => {
                self.counters.failed += 1;
                record.fail(kind, now);
                let doublings = record.failure.map_or(0, |failure| failure.count - 1);
                let pause = FIRST_RETRY_SECS << doublings.min(16);
                let pause = pause.min(MAX_RETRY_SECS);
                pause * 1000 + self.random.below(pause * 100)
            }
        };
        record.lookup = Lookup::At(now.plus_nanos(pause_millis * 1_000_000));
        self.reschedule(key);
        true
    }

    /// What the resolver has done.
    pub const fn counters(&self) -> &Counters {
        &self.counters
    }
}

#[cfg(test)]
mod tests;
