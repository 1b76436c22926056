//! Address translation: which port or identifier a flow leaves with, and who else must use the same.
//!
//! A flow keeps its source port when replies to it can then be told from those of every other flow. If
//! not, another port of the same class is chosen at random, with a bounded number of attempts. A client
//! port that once had to change keeps its new number towards every destination while any of its flows
//! lives (endpoint-independent mapping); only such ports need an entry in [`Mappings`]. When that table
//! is full the mapping is not remembered, which only matters to hole punching.
//!
//! Source: `qubes-policy.md` 3.9; RFC 4787 (REQ-1), RFC 5382, RFC 5508.

use alloc::boxed::Box;
use alloc::vec;
use core::ops::RangeInclusive;

use crate::address::Address;
use crate::conntrack::flow::{Key, Ticks};
use crate::conntrack::index::{Index, Place, Reference};
use crate::conntrack::table::FlowTable;
use crate::hash::{HashKey, Random};
use crate::wire::transport::Kind;
use crate::wire::{high16, low16, low32};

/// Ports that are tried before a flow is refused.
const ATTEMPTS: u32 = 64;

/// The ports that a port may be exchanged for.
const fn port_class(port: u16) -> RangeInclusive<u16> {
    match port {
        0..512 => 1..=511,
        512..1024 => 600..=1023,
        _ => 1024..=65_535,
    }
}

/// How a new flow leaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Translation<A> {
    /// The key of its replies.
    pub(crate) reply: Key<A>,
    /// Where that key belongs.
    pub(crate) place: Place,
    /// Whether it leaves with another port or identifier than it came with.
    pub(crate) remapped: bool,
}

/// Chooses how packets with the key `original` leave for `destination` from the address `own`.
///
/// Returns `None` if no port is left.
#[inline(always)]
pub(crate) fn translate<A: Address>(
    table: &mut FlowTable<A>,
    random: &mut Random,
    kind: Kind,
    original: &Key<A>,
    destination: A,
    own: A,
    now: Ticks,
) -> Option<Translation<A>> {
    let port = high16(original.ports);
    if table.mappings.used == 0 {
        let reply = reply_with(original, destination, own, port);
        let place = table.place(&reply);
        if table.find_at(place, &reply, true).is_none() {
            return Some(Translation {
                reply,
                place,
                remapped: false,
            });
        }
    }
    let ways = Ways {
        original: *original,
        destination,
        own,
    };
    choose(table, random, kind, &ways, now)
}

/// The key of replies to packets that leave with a source port.
#[inline(always)]
fn reply_with<A: Address>(original: &Key<A>, destination: A, own: A, port: u16) -> Key<A> {
    Key {
        src: destination,
        dst: own,
        ports: u32::from(low16(original.ports)) << 16 | u32::from(port),
        protocol: original.protocol,
    }
}

/// Between which addresses a port is chosen.
struct Ways<A> {
    original: Key<A>,
    destination: A,
    own: A,
}

/// [`translate`], when another port may be needed.
#[cold]
#[inline(never)]
fn choose<A: Address>(
    table: &mut FlowTable<A>,
    random: &mut Random,
    kind: Kind,
    ways: &Ways<A>,
    now: Ticks,
) -> Option<Translation<A>> {
    let original = &ways.original;
    let source_port = high16(original.ports);
    let known = table
        .mappings
        .get(original.src, source_port, original.protocol);
    let mut attempt = |port: u16| {
        let reply = reply_with(original, ways.destination, ways.own, port);
        let place = table.place(&reply);
        table
            .reply_is_free(place, &reply, now)
            .then_some(Translation {
                reply,
                place,
                remapped: port != source_port,
            })
    };
    if let Some(translation) = known.and_then(&mut attempt) {
        return Some(translation);
    }
    if let Some(translation) = attempt(source_port) {
        return Some(translation);
    }
    let class = match kind {
        Kind::Tcp | Kind::Udp => port_class(source_port),
        Kind::Request | Kind::Reply => 0..=u16::MAX,
        Kind::Error | Kind::OtherIcmp | Kind::Other => return None,
    };
    let size = u32::from(*class.end() - *class.start()) + 1;
    (0..ATTEMPTS).find_map(|_| {
        let offset = (u64::from(low32(random.next())) * u64::from(size)) >> 32;
        attempt(class.start().wrapping_add(low16(low32(offset))))
    })
}

/// A client port that leaves as another one.
#[derive(Clone, Copy, Debug, Default)]
struct Mapping<A> {
    src: A,
    /// Flows that use it.
    flows: u32,
    next_free: u32,
    port: u16,
    external: u16,
    protocol: u8,
}

/// The mappings in use.
#[derive(Debug)]
pub(crate) struct Mappings<A> {
    pool: Box<[Mapping<A>]>,
    index: Index,
    key: HashKey,
    free: u32,
    used: u32,
}

impl<A: Address> Mappings<A> {
    pub(crate) fn new(capacity: u32, key: HashKey) -> Self {
        let mut mappings = Self {
            pool: vec![Mapping::default(); usize::try_from(capacity).unwrap_or(0)]
                .into_boxed_slice(),
            // Half a flow's worth of references each.
            index: Index::new(capacity / 2 + 1),
            key,
            free: 0,
            used: 0,
        };
        mappings.clear();
        mappings
    }

    pub(crate) fn clear(&mut self) {
        self.index.clear();
        self.used = 0;
        self.free = 0;
        for (mapping, next) in self.pool.iter_mut().zip(1..) {
            *mapping = Mapping::default();
            mapping.next_free = next;
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of_val::<[Mapping<A>]>(&self.pool) + self.index.bytes()
    }

    fn get_pool(&self, number: u32) -> Option<&Mapping<A>> {
        self.pool.get(usize::try_from(number).ok()?)
    }

    fn get_pool_mut(&mut self, number: u32) -> Option<&mut Mapping<A>> {
        self.pool.get_mut(usize::try_from(number).ok()?)
    }

    fn hash(key: &HashKey, src: A, port: u16, protocol: u8) -> u64 {
        A::key_hash(key, src, A::default(), u32::from(port), protocol)
    }

    fn find(&self, src: A, port: u16, protocol: u8) -> (Place, Option<u32>) {
        let place = self.index.place(Self::hash(&self.key, src, port, protocol));
        let found = self.index.find(place, |reference| {
            self.get_pool(reference.entry()).is_some_and(|mapping| {
                mapping.src == src && mapping.port == port && mapping.protocol == protocol
            })
        });
        (place, found.map(Reference::entry))
    }

    /// The port that a client port leaves as, if it had to change.
    pub(crate) fn get(&self, src: A, port: u16, protocol: u8) -> Option<u16> {
        if self.used == 0 {
            return None;
        }
        let (_, found) = self.find(src, port, protocol);
        Some(self.get_pool(found?)?.external)
    }

    /// Notes that one more flow uses a mapping; returns false if there is no room for it, or if the
    /// client port leaves as yet another one.
    pub(crate) fn hold(&mut self, src: A, port: u16, protocol: u8, external: u16) -> bool {
        let (place, found) = self.find(src, port, protocol);
        if let Some(mapping) = found.and_then(|number| self.get_pool_mut(number)) {
            let same = mapping.external == external;
            mapping.flows += u32::from(same);
            return same;
        }
        let number = self.free;
        let Some(mapping) = self.get_pool(number) else {
            return false;
        };
        let next = mapping.next_free;
        let (pool, key) = (&self.pool, &self.key);
        let inserted = self
            .index
            .insert(place, Reference::new(number, false), |other| {
                usize::try_from(other.entry())
                    .ok()
                    .and_then(|at| pool.get(at))
                    .map_or(0, |own| Self::hash(key, own.src, own.port, own.protocol))
            });
        if inserted.is_none() {
            return false;
        }
        self.free = next;
        self.used += 1;
        if let Some(mapping) = self.get_pool_mut(number) {
            *mapping = Mapping {
                src,
                flows: 1,
                next_free: 0,
                port,
                external,
                protocol,
            };
        }
        true
    }

    /// Notes that one flow less uses a mapping.
    pub(crate) fn release(&mut self, src: A, port: u16, protocol: u8) {
        let (place, Some(number)) = self.find(src, port, protocol) else {
            return;
        };
        let free = self.free;
        let Some(mapping) = self.get_pool_mut(number) else {
            return;
        };
        mapping.flows = mapping.flows.saturating_sub(1);
        if mapping.flows > 0 {
            return;
        }
        mapping.next_free = free;
        self.free = number;
        self.used = self.used.saturating_sub(1);
        self.index.remove(place, Reference::new(number, false));
    }

    #[cfg(test)]
    pub(crate) const fn len(&self) -> u32 {
        self.used
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapping_lives_as_long_as_its_flows() {
        let mut mappings = Mappings::<u32>::new(4, HashKey::new(1, 2));
        assert!(mappings.hold(1, 5000, 17, 6000) && mappings.hold(1, 5000, 17, 6000));
        assert!(!mappings.hold(1, 5000, 17, 6001));
        assert_eq!(mappings.get(1, 5000, 17), Some(6000));
        assert_eq!(mappings.get(1, 5000, 6), None);
        mappings.release(1, 5000, 17);
        assert_eq!(mappings.get(1, 5000, 17), Some(6000));
        mappings.release(1, 5000, 17);
        assert_eq!((mappings.get(1, 5000, 17), mappings.len()), (None, 0));
    }

    #[test]
    fn full_table_of_mappings_refuses_more() {
        let mut mappings = Mappings::<u32>::new(4, HashKey::new(1, 2));
        for port in 0..4 {
            assert!(mappings.hold(1, port, 17, 6000));
        }
        assert!(!mappings.hold(1, 4, 17, 6000));
        mappings.release(1, 2, 17);
        assert!(mappings.hold(1, 4, 17, 6000));
    }

    #[test]
    fn ports_stay_in_their_class() {
        assert_eq!(port_class(0), 1..=511);
        assert_eq!(port_class(511), 1..=511);
        assert_eq!(port_class(512), 600..=1023);
        assert_eq!(port_class(1024), 1024..=65_535);
    }
}
