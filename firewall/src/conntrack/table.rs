//! The flow table of one address family: fixed memory, fair shares, a stated order of eviction.
//!
//! Flows lie in a pool; the [index](super::index) finds them by either direction's key. Idle flows are
//! found by a timer wheel of 128 slots of about a second: a flow is linked where it would idle
//! out, or a round later if that is further away, and linked again when its slot comes and it has been
//! seen meanwhile. No packet touches the wheel. A lookup treats an overdue flow as absent, so the wheel
//! decides only when memory comes back.
//!
//! # When the table is full
//!
//! Every owner (client address) may use what nobody else needs. Without a free entry, room is made by
//! an owner that holds its fair share or more, which is the capacity divided by the owners that have
//! flows: the new flow's own owner if it does, else another one. There the oldest *transient* flow
//! goes: unreplied, not yet assured, or closing. Without those it is the oldest other one, where up to
//! four flows seen within the last minute are passed over. So a flood of one
//! client costs only that client's flows.
//!
//! The free list runs through entries that may still be linked in a slot of the wheel: they keep their
//! place there, and a new flow inherits it. It is then looked at once too early or at most a round too
//! late.
//!
//! # What has idled out
//!
//! Many flows can idle out within a second, so that costs little: the flow is *retired*, which takes it
//! out of every count and puts its entry in a list. It stays in the index and in its owner's list until
//! somebody needs the entry, or until a packet with its key finds it: it is overdue, and ends for good. So
//! the work to take a flow apart is done once for every flow that starts, and never in a burst.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use self::shares::{EMPTY, Links, Owner};
use self::wheel::SLOTS;
use super::flow::{Flow, Key, LIVE, ON_WHEEL, REMAPPED, RETIRED, Ticks};
use super::index::{Index, Location, Place, Reference};
use crate::address::Address;
use crate::config::{MAX_FLOWS, MIN_FLOWS};
use crate::hash::HashKey;
use crate::nat::Mappings;
use crate::wire::high16;

mod shares;
mod wheel;

/// No entry.
const NONE: u32 = u32::MAX;

/// Who must make room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoRoom;

/// The table.
#[derive(Debug)]
pub(crate) struct FlowTable<A: Address> {
    /// Grows within what was allocated at the start, so that memory is not touched before it is needed.
    flows: Vec<Flow<A>>,
    capacity: u32,
    index: Index,
    key: HashKey,
    free: u32,
    /// Entries of flows that have idled out, linked as in a slot of the wheel.
    retired: u32,
    live: u32,
    owners: Box<[Owner]>,
    /// Owners that have flows.
    active_owners: u32,
    /// Where the search for an owner with too many flows goes on.
    owner_cursor: usize,
    slots: Box<[u32]>,
    /// The slot, counted from the start of time, that was emptied last.
    slot_done: u32,
    /// Flows of emptied slots that were not looked at yet.
    due: u32,
    started: bool,
    /// Changes whenever a flow is removed: numbers found before may mean something else now.
    removals: u64,
    pub(crate) mappings: Mappings<A>,
}

fn as_index(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

impl<A: Address> FlowTable<A> {
    /// A table for `capacity` flows of at most `owners` owners.
    pub(crate) fn new(capacity: u32, owners: u16, key: HashKey, mapping_key: HashKey) -> Self {
        let capacity = capacity.clamp(MIN_FLOWS, MAX_FLOWS);
        let owner = Owner {
            transient: EMPTY,
            assured: EMPTY,
            flows: 0,
        };
        Self {
            flows: Vec::with_capacity(as_index(capacity)),
            capacity,
            index: Index::new(capacity),
            key,
            free: NONE,
            retired: NONE,
            live: 0,
            owners: vec![owner; usize::from(owners)].into_boxed_slice(),
            active_owners: 0,
            owner_cursor: 0,
            slots: vec![NONE; as_index(SLOTS)].into_boxed_slice(),
            slot_done: 0,
            due: NONE,
            started: false,
            removals: 0,
            mappings: Mappings::new(capacity / 32 + 16, mapping_key),
        }
    }

    /// Flows that are alive, overdue ones that were not found yet included.
    pub(crate) const fn len(&self) -> u32 {
        self.live
    }

    /// How many flows fit.
    pub(crate) const fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Bytes of memory, everything included.
    pub(crate) fn bytes(&self) -> usize {
        as_index(self.capacity) * size_of::<Flow<A>>()
            + self.index.bytes()
            + size_of_val::<[Owner]>(&self.owners)
            + size_of_val::<[u32]>(&self.slots)
            + self.mappings.bytes()
    }

    /// A number that changes whenever a flow is removed.
    pub(crate) const fn removals(&self) -> u64 {
        self.removals
    }

    /// Flows of one owner.
    pub(crate) fn flows_of(&self, owner: u16) -> u32 {
        let owner = self.owners.get(usize::from(owner));
        owner.map_or(0, |owner| owner.flows)
    }

    #[inline(always)]
    pub(crate) fn place(&self, key: &Key<A>) -> Place {
        let hash = A::key_hash(&self.key, key.src, key.dst, key.ports, key.protocol);
        self.index.place(hash)
    }

    /// Finds a flow by the key of one direction.
    #[inline(always)]
    pub(crate) fn find(&self, key: &Key<A>, reply: bool) -> Option<u32> {
        self.find_at(self.place(key), key, reply)
    }

    /// Finds a flow, with the place of its key, to change it.
    #[inline(always)]
    pub(crate) fn find_mut_at(
        &mut self,
        place: Place,
        key: &Key<A>,
        reply: bool,
    ) -> Option<(u32, &mut Flow<A>)> {
        match self.index.likely(place) {
            Some(reference) if self.is_key_of(reference, key, reply) => {
                let number = reference.entry();
                Some((number, self.flows.get_mut(as_index(number))?))
            }
            None if !self.index.is_overflowed(place) => None,
            _ => {
                let key = *key;
                let number = self.find_among_all(place, &key, reply)?;
                Some((number, self.get_mut(number)?))
            }
        }
    }

    /// Finds a flow, with the place of its key.
    #[inline(always)]
    pub(crate) fn find_at(&self, place: Place, key: &Key<A>, reply: bool) -> Option<u32> {
        match self.index.likely(place) {
            Some(reference) if self.is_key_of(reference, key, reply) => Some(reference.entry()),
            None if !self.index.is_overflowed(place) => None,
            _ => {
                // A copy that only this way needs: the key itself can stay in registers.
                let key = *key;
                self.find_among_all(place, &key, reply)
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn find_among_all(&self, place: Place, key: &Key<A>, reply: bool) -> Option<u32> {
        let found = self
            .index
            .find(place, |reference| self.is_key_of(reference, key, reply));
        found.map(Reference::entry)
    }

    #[inline(always)]
    fn is_key_of(&self, reference: Reference, key: &Key<A>, reply: bool) -> bool {
        self.get(reference.entry()).is_some_and(|flow| {
            let half = flow.side(reply);
            // The other direction's reference may be met by chance: the flow is the right one then, too.
            A::same_pair((half.src, half.dst), (key.src, key.dst))
                && half.ports == key.ports
                && flow.protocol == key.protocol
        })
    }

    /// Whether replies with this key can be told from those of every other flow. An overdue flow
    /// that stands in the way is removed.
    pub(crate) fn reply_is_free(&mut self, place: Place, reply: &Key<A>, now: Ticks) -> bool {
        match self.find_at(place, reply, true) {
            None => true,
            Some(number) => {
                let overdue = self.get(number).is_none_or(|flow| flow.is_overdue(now));
                if overdue {
                    self.remove(number);
                }
                overdue
            }
        }
    }

    #[inline(always)]
    pub(crate) fn get(&self, number: u32) -> Option<&Flow<A>> {
        self.flows.get(as_index(number))
    }

    #[inline(always)]
    pub(crate) fn get_mut(&mut self, number: u32) -> Option<&mut Flow<A>> {
        self.flows.get_mut(as_index(number))
    }

    /// Adds a flow whose keys are not in the table and belong to these places. Returns its number, and
    /// whether another flow had to make room.
    ///
    /// # Errors
    ///
    /// [`NoRoom`], if its keys do not fit the index even after others made room.
    #[inline(always)]
    pub(crate) fn insert(
        &mut self,
        flow: &Flow<A>,
        [original, reply]: [Place; 2],
        now: Ticks,
    ) -> Result<(u32, bool), NoRoom> {
        let unused = u32::try_from(self.flows.len()).unwrap_or(NONE);
        let fresh = self.free == NONE && unused < self.capacity;
        let evicted = self.free == NONE && !fresh && self.make_room(flow.owner, now)?;
        let number = if fresh { unused } else { self.free };
        let mut on_wheel = 0;
        if fresh {
            self.flows.push(*flow);
        } else {
            let Some(entry) = self.flows.get_mut(as_index(number)) else {
                return Err(NoRoom);
            };
            self.free = entry.list_next;
            on_wheel = entry.flags & ON_WHEEL;
            let timer_next = entry.timer_next;
            *entry = *flow;
            entry.timer_next = timer_next;
        }
        // Only now: to make room, the index may ask for the key of the reference before.
        let locations = self.index_both(number, [original, reply]);
        let Some(entry) = self.flows.get_mut(as_index(number)) else {
            return Err(NoRoom);
        };
        let Some(locations) = locations else {
            entry.flags = on_wheel;
            self.put_free(number);
            return Err(NoRoom);
        };
        entry.set_locations(locations);
        entry.flags |= ON_WHEEL;
        if on_wheel == 0 {
            let timeout = entry.timeout();
            self.link_timer(number, now.plus(timeout.wrapping_add(1)), now);
        }
        self.live += 1;
        if let Some(owner) = self.owners.get_mut(usize::from(flow.owner)) {
            self.active_owners += u32::from(owner.flows == 0);
            owner.flows += 1;
        }
        self.link_owner(number);
        Ok((number, evicted))
    }

    /// Puts both directions of a flow into the index, or none.
    #[inline(always)]
    fn index_both(&mut self, number: u32, [original, reply]: [Place; 2]) -> Option<[Location; 2]> {
        let first = Reference::new(number, false);
        let original_at = self.index_insert(original, first)?;
        match self.index_insert(reply, Reference::new(number, true)) {
            Some(reply_at) => Some([original_at, reply_at]),
            None => {
                self.index.remove(original, first);
                None
            }
        }
    }

    #[inline(always)]
    fn index_insert(&mut self, place: Place, reference: Reference) -> Option<Location> {
        let flows = &self.flows;
        let key = &self.key;
        self.index.insert(place, reference, |other| {
            flows.get(as_index(other.entry())).map_or(0, |flow| {
                let half = flow.side(other.is_reply());
                A::key_hash(key, half.src, half.dst, half.ports, flow.protocol)
            })
        })
    }

    /// Removes a flow. Its entry can be used again at once. Returns whether the flow was alive.
    pub(crate) fn remove(&mut self, number: u32) -> bool {
        let Some(flow) = self.get(number) else {
            return false;
        };
        if flow.flags & LIVE == 0 {
            if flow.flags & RETIRED != 0 {
                // Its entry stays in the list of retired ones.
                self.take_apart(number);
            }
            return false;
        }
        self.end(number);
        true
    }

    /// Removes a live flow.
    #[inline(always)]
    fn end(&mut self, number: u32) {
        let free = self.free;
        let Some(flow) = self.flows.get_mut(as_index(number)) else {
            return;
        };
        // Used only when the entry is free.
        let links = Links::of(flow);
        let remapped = flow.flags & REMAPPED != 0;
        Self::unindex(&mut self.index, &self.key, number, flow);
        flow.list_next = free;
        self.free = number;
        self.removals = self.removals.wrapping_add(1);
        self.unlink(links);
        self.count_out(links.owner);
        if remapped {
            self.release_mapping(number);
        }
    }

    /// Takes a retired flow out of the index and out of its owner's list.
    #[inline(always)]
    fn take_apart(&mut self, number: u32) {
        let Some(flow) = self.flows.get_mut(as_index(number)) else {
            return;
        };
        let links = Links::of(flow);
        Self::unindex(&mut self.index, &self.key, number, flow);
        self.removals = self.removals.wrapping_add(1);
        self.unlink(links);
    }

    /// Takes both directions of a flow out of the index, and all flags but that of the wheel from it.
    #[inline(always)]
    fn unindex(index: &mut Index, key: &HashKey, number: u32, flow: &mut Flow<A>) {
        for reply in [false, true] {
            let reference = Reference::new(number, reply);
            if !index.remove_at(flow.location(reply), reference) {
                Self::remove_by_key(index, key, flow, reference);
            }
        }
        flow.flags &= ON_WHEEL;
    }

    /// Takes a direction of a flow out of the index whose place is not known.
    #[cold]
    #[inline(never)]
    fn remove_by_key(index: &mut Index, key: &HashKey, flow: &Flow<A>, reference: Reference) {
        let own = flow.key(reference.is_reply());
        let hash = A::key_hash(key, own.src, own.dst, own.ports, own.protocol);
        index.remove(index.place(hash), reference);
    }

    /// One live flow of an owner less.
    #[inline(always)]
    fn count_out(&mut self, owner: u16) {
        if let Some(owner) = self.owners.get_mut(usize::from(owner)) {
            owner.flows = owner.flows.saturating_sub(1);
            self.active_owners -= u32::from(owner.flows == 0);
        }
        self.live = self.live.saturating_sub(1);
    }

    #[cold]
    #[inline(never)]
    fn release_mapping(&mut self, number: u32) {
        if let Some(flow) = self.flows.get(as_index(number)) {
            let original = flow.side(false);
            self.mappings
                .release(original.src, high16(original.ports), flow.protocol);
        }
    }

    /// Removes everything.
    pub(crate) fn clear(&mut self) {
        self.removals = self.removals.wrapping_add(1);
        self.index.clear();
        self.mappings.clear();
        self.free = NONE;
        self.retired = NONE;
        self.live = 0;
        self.active_owners = 0;
        self.due = NONE;
        self.slots.fill(NONE);
        for owner in &mut self.owners {
            owner.transient = EMPTY;
            owner.assured = EMPTY;
            owner.flows = 0;
        }
        self.flows.clear();
    }

    fn put_free(&mut self, number: u32) {
        let next = self.free;
        if let Some(flow) = self.get_mut(number) {
            flow.list_next = next;
            self.free = number;
        }
    }
}

#[cfg(test)]
mod tests;
