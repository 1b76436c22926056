//! The timer wheel: which flows have idled out.

use super::{FlowTable, NONE, as_index};
use crate::address::Address;
use crate::conntrack::flow::{IN_ASSURED_LIST, LIVE, ON_WHEEL, REMAPPED, RETIRED, Ticks};

/// Slots of the wheel, a power of two.
pub(super) const SLOTS: u32 = 128;

/// Ticks in a slot, as a power of two: about 1.07 seconds.
const SLOT_SHIFT: u32 = 2;

impl<A: Address> FlowTable<A> {
    /// Links a flow where it idles out.
    #[inline(always)]
    pub(super) fn link_timer(&mut self, number: u32, deadline: Ticks, now: Ticks) {
        if !self.started {
            self.started = true;
            self.slot_done = now.0 >> SLOT_SHIFT;
        }
        // One slot later than the deadline's, so that the flow is overdue when the slot is emptied.
        let wanted = (deadline.0 >> SLOT_SHIFT).wrapping_add(1);
        let ahead = wanted.wrapping_sub(self.slot_done).clamp(1, SLOTS - 1);
        let slot = self.slot_done.wrapping_add(ahead) & (SLOTS - 1);
        let Some(head) = self.slots.get_mut(as_index(slot)) else {
            return;
        };
        let next = core::mem::replace(head, number);
        if let Some(flow) = self.flows.get_mut(as_index(number)) {
            flow.timer_next = next;
            flow.flags |= ON_WHEEL;
        }
    }

    /// Retires the flows that have idled out, and takes the next other one out of the wheel whose slot
    /// has come. The caller must give it to [`Self::keep`] or [`Self::remove`]. Returns `None` when
    /// nothing is left to do by `now`, or `budget` entries were looked at. Counts what it retired in
    /// `expired`.
    pub(crate) fn next_due(
        &mut self,
        now: Ticks,
        budget: &mut u32,
        expired: &mut u64,
    ) -> Option<u32> {
        loop {
            let found = self.retire(now, budget, expired);
            if found.is_some() || self.due != NONE {
                return found;
            }
            let slot_now = now.0 >> SLOT_SHIFT;
            let behind = slot_now.wrapping_sub(self.slot_done) & (u32::MAX >> SLOT_SHIFT);
            if !self.started || behind == 0 || behind > u32::MAX >> (SLOT_SHIFT + 1) {
                return None;
            }
            // After a long pause one round empties every slot.
            if behind > SLOTS {
                self.slot_done = slot_now.wrapping_sub(SLOTS);
            }
            self.slot_done = self.slot_done.wrapping_add(1);
            let slot = self.slot_done & (SLOTS - 1);
            if let Some(head) = self.slots.get_mut(as_index(slot)) {
                self.due = core::mem::replace(head, NONE);
            }
        }
    }

    /// Goes through the flows of emptied slots, as [`Self::next_due`] says.
    #[inline(always)]
    fn retire(&mut self, now: Ticks, budget: &mut u32, expired: &mut u64) -> Option<u32> {
        loop {
            let gone = self.retire_plain(now, *budget);
            *budget -= gone;
            *expired = expired.wrapping_add(u64::from(gone));
            // One that is not plain, unless nothing is left.
            let number = self.due;
            let flow = self.flows.get_mut(as_index(number))?;
            *budget = budget.checked_sub(1)?;
            self.due = flow.timer_next;
            flow.flags &= !ON_WHEEL;
            if flow.flags & LIVE == 0 {
                continue;
            }
            if !flow.is_overdue(now) {
                return Some(number);
            }
            *expired = expired.wrapping_add(1);
            self.remove(number);
        }
    }

    /// Retires flows of emptied slots up to the first one that needs more than that; says how many. Apart
    /// from its caller, so that the loop has the registers.
    #[inline(never)]
    fn retire_plain(&mut self, now: Ticks, budget: u32) -> u32 {
        let (flows, owners) = (&mut *self.flows, &mut *self.owners);
        let (mut number, mut retired) = (self.due, self.retired);
        let mut left = budget;
        while left > 0
            && let Some(flow) = flows.get_mut(as_index(number))
        {
            let flags = flow.flags;
            if flags & (LIVE | REMAPPED) != LIVE || !flow.is_overdue(now) {
                break;
            }
            left -= 1;
            let next = core::mem::replace(&mut flow.timer_next, retired);
            retired = number;
            number = next;
            flow.flags = flags & IN_ASSURED_LIST | RETIRED;
            if let Some(owner) = owners.get_mut(usize::from(flow.owner)) {
                owner.flows = owner.flows.wrapping_sub(1);
                if owner.flows == 0 {
                    core::hint::cold_path();
                    self.active_owners -= 1;
                }
            }
        }
        self.due = number;
        self.retired = retired;
        let gone = budget - left;
        self.live = self.live.wrapping_sub(gone);
        gone
    }

    /// Puts a flow back into the wheel.
    pub(crate) fn keep(&mut self, number: u32, now: Ticks) {
        if let Some(flow) = self.get(number) {
            self.link_timer(number, flow.deadline(now), now);
        }
    }

    /// When [`Self::next_due`] can next have something, if ever.
    pub(crate) fn next_deadline(&self) -> Option<Ticks> {
        if self.live == 0 {
            return None;
        }
        if self.due != NONE {
            return Some(Ticks(self.slot_done << SLOT_SHIFT));
        }
        let next = (1..=SLOTS).find(|ahead| {
            let slot = self.slot_done.wrapping_add(*ahead) & (SLOTS - 1);
            self.slots
                .get(as_index(slot))
                .is_some_and(|head| *head != NONE)
        });
        next.map(|ahead| Ticks(self.slot_done.wrapping_add(ahead) << SLOT_SHIFT))
    }
}
