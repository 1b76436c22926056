//! Batches of frames, and the choice of a way for each frame.
//!
//! Nearly every frame is a plain packet of a running flow, or of one that starts: `shortcut.rs` and
//! `opening.rs` decide those. Everything else goes the long way of `arrival.rs`.

use super::core::{Core, NO_FLOW};
use super::shortcut::{self, Meta};
use super::{Engine, Work, opening};
use crate::address::{V4, V6};
use crate::conntrack::flow::{Flow, Ticks};
use crate::conntrack::index::Place;
use crate::frame::{ClientId, Frame, Iface, Time};
use crate::verdict::Verdict;
use crate::wire::plain;

/// Stands for the client of a frame that comes from none.
const NO_CLIENT: ClientId = ClientId(u16::MAX);

/// Frames from which on a batch is worth two stages.
const MIN_STAGED: usize = 8;

/// Frames that are looked up before the first of them is decided.
const MAX_STAGED: usize = 32;

/// Flows whose entries and places in the index do not fit a cache of 2 MiB any more.
const MANY_FLOWS: u32 = (2 << 20) / 160;

/// How a frame starts.
enum Start {
    /// An IPv4 header without options.
    V4,
    V6,
    /// Anything else.
    Other,
}

#[inline(always)]
fn start_of(frame: &Frame<'_>) -> Start {
    match frame.head.first_chunk().map(plain::start_word) {
        Some(plain::START_V4) => Start::V4,
        Some(word) if word & 0x00f0_ffff == plain::START_V6 => Start::V6,
        _ => Start::Other,
    }
}

/// Notes where a frame goes, if that is known; says whether it is.
#[inline(always)]
fn send(verdict: &mut Verdict, egress: Option<Iface>) -> bool {
    match egress {
        Some(egress) => {
            *verdict = Verdict::Forward { egress };
            true
        }
        None => false,
    }
}

/// The client that a frame comes from, if any, and whether it goes to one.
#[inline(always)]
const fn side_of(ingress: Iface) -> (ClientId, bool) {
    match ingress {
        Iface::Client(id) => (id, false),
        Iface::Uplink => (NO_CLIENT, true),
    }
}

impl Engine {
    /// Sends a plain packet of an established flow on, or decides one that may start a flow; says whether
    /// the packet was decided. The directions of IPv4 are compiled apart, because they are the bulk.
    #[inline(always)]
    pub(super) fn take(
        &mut self,
        ingress: Iface,
        frame: &mut Frame<'_>,
        verdict: &mut Verdict,
        now: Time,
        ticks: Ticks,
    ) -> bool {
        match (start_of(frame), ingress) {
            (Start::V4, Iface::Client(id)) => {
                let Some(key) = shortcut::read(&self.core, frame.head, frame.len, false) else {
                    core::hint::cold_path();
                    *verdict = self.decide_unknown(ingress, frame, now, false);
                    return true;
                };
                let place = self.flows4.place(&key);
                let Some(flow) = self.flows4.find_mut_at(place, &key, false) else {
                    core::hint::cold_path();
                    *verdict = self.open4(id, frame, Some(place), now);
                    return true;
                };
                let (core, parts) = (&mut self.core, Meta::of(frame));
                send(verdict, shortcut::pass(core, flow, id, parts, ticks, false))
            }
            (Start::V4, Iface::Uplink) => {
                let Some(key) = shortcut::read(&self.core, frame.head, frame.len, true) else {
                    return false;
                };
                let place = self.flows4.place(&key);
                let Some(flow) = self.flows4.find_mut_at(place, &key, true) else {
                    return false;
                };
                let (core, parts) = (&mut self.core, Meta::of(frame));
                send(
                    verdict,
                    shortcut::pass(core, flow, NO_CLIENT, parts, ticks, true),
                )
            }
            (Start::V6, _) => {
                if !send(verdict, self.take6(ingress, frame, ticks)) {
                    core::hint::cold_path();
                    *verdict = self.decide_unknown(ingress, frame, now, true);
                }
                true
            }
            (Start::Other, _) => false,
        }
    }

    #[inline(never)]
    fn take6(&mut self, ingress: Iface, frame: &mut Frame<'_>, now: Ticks) -> Option<Iface> {
        let core = &mut self.core;
        let reply = side_of(ingress).1;
        let key = shortcut::read(core, frame.head, frame.len, reply)?;
        let place = self.flows6.place(&key);
        let flow = self.flows6.find_mut_at(place, &key, reply)?;
        pass6(core, flow, ingress, Meta::of(frame), now)
    }

    /// Decides a packet that may be the first of a flow. `is_new` says that no flow was found for it, or
    /// that nobody has looked.
    #[inline(never)]
    fn decide_unknown(
        &mut self,
        ingress: Iface,
        frame: &mut Frame<'_>,
        now: Time,
        is_new: bool,
    ) -> Verdict {
        match (start_of(frame), ingress) {
            (Start::V4, Iface::Client(id)) if opening::is_worth_it::<V4>(frame.head, is_new) => {
                self.open4(id, frame, None, now)
            }
            (Start::V6, Iface::Client(id)) if opening::is_worth_it::<V6>(frame.head, is_new) => {
                self.open6(id, frame, now)
            }
            _ => self.decide_fully(ingress, frame, now),
        }
    }

    /// A plain IPv4 packet of a client that seems to have no flow. `known` is where its key belongs, if
    /// it was looked up.
    #[inline(never)]
    fn open4(
        &mut self,
        id: ClientId,
        frame: &mut Frame<'_>,
        known: Option<Place>,
        now: Time,
    ) -> Verdict {
        let (core, flows) = (&mut self.core, &mut self.flows4);
        core.last_rule = None;
        core.last_flow = NO_FLOW;
        let ingress = Iface::Client(id);
        match opening::decide(core, flows, id, frame, known, now) {
            Some(verdict) => {
                self.account(ingress, frame.len, verdict);
                verdict
            }
            None => self.decide_fully(ingress, frame, now),
        }
    }

    /// [`Self::open4`] for IPv6.
    #[inline(never)]
    fn open6(&mut self, id: ClientId, frame: &mut Frame<'_>, now: Time) -> Verdict {
        let (core, flows) = (&mut self.core, &mut self.flows6);
        core.last_rule = None;
        core.last_flow = NO_FLOW;
        let ingress = Iface::Client(id);
        match opening::decide(core, flows, id, frame, None, now) {
            Some(verdict) => {
                self.account(ingress, frame.len, verdict);
                verdict
            }
            None => self.decide_fully(ingress, frame, now),
        }
    }

    /// Decides a batch of frames, in order, as [`Self::process`] would.
    ///
    /// With many frames, and more flows than fit a cache, the flows of all frames are looked up before
    /// any frame is decided, so that the processor waits for memory once and not for every frame.
    pub fn process_batch(&mut self, work: &mut [Work<'_>], now: Time) {
        if work.len() < MIN_STAGED || self.flow_count() < MANY_FLOWS {
            return self.process_singly(work, now);
        }
        for batch in work.chunks_mut(MAX_STAGED) {
            self.process_staged(batch, now);
        }
    }

    /// One frame after the other.
    #[inline(never)]
    fn process_singly(&mut self, work: &mut [Work<'_>], now: Time) {
        let ticks = Ticks::at(now);
        for item in work {
            let (ingress, frame) = (item.ingress, &mut item.frame);
            if !self.take(ingress, frame, &mut item.verdict, now, ticks) {
                core::hint::cold_path();
                item.verdict = self.decide_fully(item.ingress, &mut item.frame, now);
            }
        }
    }

    /// The two stages of [`Self::process_batch`].
    #[inline(never)]
    fn process_staged(&mut self, batch: &mut [Work<'_>], now: Time) {
        let mut located = [NO_FLOW; MAX_STAGED];
        for (slot, item) in located.iter_mut().zip(batch.iter()) {
            if let Some(number) = self.locate(item.ingress, &item.frame) {
                *slot = number;
            }
        }
        let ticks = Ticks::at(now);
        let removals = self.removals();
        let mut left = batch.iter_mut();
        for number in located {
            let Some(item) = left.next() else { return };
            let egress = self.pass(number, item.ingress, &mut item.frame, ticks);
            if send(&mut item.verdict, egress) {
                continue;
            }
            core::hint::cold_path();
            item.verdict = match number {
                NO_FLOW => self.decide_unknown(item.ingress, &mut item.frame, now, true),
                _ => self.decide_fully(item.ingress, &mut item.frame, now),
            };
            // Only the long way removes flows; then numbers may mean something else.
            if removals != self.removals() {
                break;
            }
        }
        self.process_singly(left.into_slice(), now);
    }

    fn removals(&self) -> (u64, u64) {
        (self.flows4.removals(), self.flows6.removals())
    }

    /// Finds the flow of a plain packet.
    #[inline(always)]
    fn locate(&self, ingress: Iface, frame: &Frame<'_>) -> Option<u32> {
        let (core, head, reply) = (&self.core, &*frame.head, side_of(ingress).1);
        match start_of(frame) {
            Start::V4 => {
                let key = shortcut::read(core, head, frame.len, reply)?;
                self.flows4.find(&key, reply)
            }
            Start::V6 => {
                let key = shortcut::read(core, head, frame.len, reply)?;
                self.flows6.find(&key, reply)
            }
            Start::Other => None,
        }
    }

    /// Sends a plain packet along its flow.
    #[inline(always)]
    fn pass(
        &mut self,
        number: u32,
        ingress: Iface,
        frame: &mut Frame<'_>,
        now: Ticks,
    ) -> Option<Iface> {
        let (core, start, parts) = (&mut self.core, start_of(frame), Meta::of(frame));
        match (start, ingress) {
            (Start::V4, Iface::Client(id)) => {
                let flow = (number, self.flows4.get_mut(number)?);
                shortcut::pass(core, flow, id, parts, now, false)
            }
            (Start::V4, Iface::Uplink) => {
                let flow = (number, self.flows4.get_mut(number)?);
                shortcut::pass(core, flow, NO_CLIENT, parts, now, true)
            }
            (Start::V6, _) => {
                let flow = (number, self.flows6.get_mut(number)?);
                pass6(core, flow, ingress, parts, now)
            }
            (Start::Other, _) => None,
        }
    }
}

/// [`shortcut::pass`] for IPv6.
#[inline(never)]
fn pass6(
    core: &mut Core,
    flow: (u32, &mut Flow<V6>),
    ingress: Iface,
    parts: (&mut [u8], Meta<'_>),
    now: Ticks,
) -> Option<Iface> {
    let (id, reply) = side_of(ingress);
    shortcut::pass(core, flow, id, parts, now, reply)
}
