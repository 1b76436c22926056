//! The building blocks of the packet path one by one, for benches (workload W20 of `performance.md`).
//!
//! Behind the feature `blocks`, which only `cargo xtask bench` turns on: nothing else may call these.
//! They are the functions that the engine uses, with flows numbered as in `performance.md` section 2.

use crate::address::{Address, V4};
use crate::conntrack::flow::{Flow, Key, Ticks};
use crate::conntrack::table::FlowTable;
use crate::frame::Time;
use crate::hash::{HashKey, Random};
use crate::nat;
use crate::wire::checksum;
use crate::wire::transport::Kind;

/// The uplink's address, 10.138.0.1.
const UPLINK: u32 = 0x0a8a_0001;

/// The client's, 10.137.0.2.
const CLIENT: u32 = 0x0a89_0002;

/// Protocol number of TCP.
const TCP: u8 = 6;

/// A flow table with nothing around it.
#[derive(Debug)]
pub struct Table {
    flows: FlowTable<V4>,
    random: Random,
    key: HashKey,
}

/// How flow `i` comes in.
fn key(i: u32) -> Key<V4> {
    let server = 0x5d00_0001 + ((7919_u32.wrapping_mul(i) & 0x7ffe) | ((i >> 15) << 15));
    Key {
        src: CLIENT,
        dst: server,
        ports: (1024 + (i & 0x7fff)) << 16 | 443,
        protocol: TCP,
    }
}

/// How its replies do.
fn reply(i: u32) -> Key<V4> {
    let mut reply = key(i).reversed();
    reply.dst = UPLINK;
    reply
}

impl Table {
    /// An empty table for `flows` flows.
    pub fn new(flows: u32) -> Self {
        let key = |number| HashKey::new(number, !number);
        Self {
            flows: FlowTable::new(flows, 2, key(1), key(2)),
            random: Random::new(key(3)),
            key: key(4),
        }
    }

    /// The hash of flow `i`'s key.
    #[inline(always)]
    pub fn hash(&self, i: u32) -> u64 {
        let own = key(i);
        V4::key_hash(&self.key, own.src, own.dst, own.ports, own.protocol)
    }

    /// Looks flow `i` up; returns its number.
    #[inline(always)]
    pub fn find(&self, i: u32) -> Option<u32> {
        self.flows.find(&key(i), false)
    }

    /// Adds flow `i`; returns its number.
    #[inline(always)]
    pub fn insert(&mut self, i: u32, now: Time) -> Option<u32> {
        let (original, reply) = (key(i), reply(i));
        let places = [&original, &reply].map(|key| self.flows.place(key));
        let now = Ticks::at(now);
        let flow = Flow::new(&original, &reply, now);
        self.flows
            .insert(&flow, places, now)
            .ok()
            .map(|(number, _)| number)
    }

    /// Removes a flow by its number.
    #[inline(always)]
    pub fn remove(&mut self, number: u32) {
        self.flows.remove(number);
    }

    /// Chooses the port that flow `i` leaves with; `None` if none is left.
    #[inline(always)]
    pub fn choose_port(&mut self, i: u32, now: Time) -> Option<u16> {
        let original = key(i);
        let (flows, random) = (&mut self.flows, &mut self.random);
        let to = original.dst;
        let chosen = nat::translate(
            flows,
            random,
            Kind::Tcp,
            &original,
            to,
            UPLINK,
            Ticks::at(now),
        )?;
        Some(crate::wire::low16(chosen.reply.ports))
    }
}

/// Whether a header's checksum is right.
#[inline(always)]
pub fn header_is_right(header: &[u8; 20]) -> bool {
    checksum::header_is_right(header)
}

/// A checksum field after the words that sum to `old` became words that sum to `new`.
#[inline(always)]
pub fn update(field: u16, old: u64, new: u64) -> u16 {
    checksum::apply(field, checksum::delta(old, new))
}

/// The checksum field for bytes.
#[inline(always)]
pub fn field(bytes: &[u8]) -> u16 {
    checksum::field(checksum::add_bytes(0, bytes))
}
