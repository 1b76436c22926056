//! Fair shares: which flow makes room when the table is full, and the lists of each owner's flows.

use super::{FlowTable, NONE, NoRoom, as_index};
use crate::address::Address;
use crate::conntrack::flow::{Flow, IN_ASSURED_LIST, RETIRED, Ticks};

/// Flows that are passed over because they were seen lately.
const SECOND_CHANCES: u32 = 4;

/// What lately means: about a minute.
pub(super) const RECENT: u32 = 224;

/// A list of flows, oldest first.
#[derive(Clone, Copy, Debug)]
pub(super) struct List {
    pub(super) first: u32,
    pub(super) last: u32,
}

pub(super) const EMPTY: List = List {
    first: NONE,
    last: NONE,
};

/// The flows of one owner.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    pub(super) transient: List,
    pub(super) assured: List,
    pub(super) flows: u32,
}

/// Where a flow is in which list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Links {
    previous: u32,
    next: u32,
    pub(super) owner: u16,
    assured: bool,
}

impl Links {
    #[inline(always)]
    pub(super) fn of<A: Address>(flow: &Flow<A>) -> Self {
        Self {
            previous: flow.list_previous,
            next: flow.list_next,
            owner: flow.owner,
            assured: flow.flags & IN_ASSURED_LIST != 0,
        }
    }
}

impl<A: Address> FlowTable<A> {
    /// Makes one entry free; says whether a live flow had to go.
    #[inline(never)]
    pub(super) fn make_room(&mut self, for_owner: u16, now: Ticks) -> Result<bool, NoRoom> {
        let number = self.retired;
        if let Some(flow) = self.get(number) {
            let retired = flow.flags & RETIRED != 0;
            self.retired = flow.timer_next;
            if retired {
                self.take_apart(number);
            }
            self.put_free(number);
            return Ok(false);
        }
        self.evict(for_owner, now).ok_or(NoRoom)?;
        Ok(true)
    }

    /// Ends a live flow.
    #[inline(always)]
    fn evict(&mut self, for_owner: u16, now: Ticks) -> Option<()> {
        let share = (self.capacity / self.active_owners.max(1)).max(1);
        let own = usize::from(for_owner);
        let victim = match self.owners.get(own) {
            Some(owner) if owner.flows >= share => match owner.transient.first {
                NONE => self.victim(own, now)?,
                first => first,
            },
            _ => {
                let above = self.owner_above(share)?;
                self.victim(above, now)?
            }
        };
        self.end(victim);
        Some(())
    }

    /// The next owner that holds at least a fair share. One exists when the table is full.
    fn owner_above(&mut self, share: u32) -> Option<usize> {
        let is_above = |at: &usize| {
            let owner = self.owners.get(*at);
            owner.is_some_and(|owner| owner.flows >= share)
        };
        let start = self.owner_cursor;
        let found = (start..self.owners.len()).chain(0..start).find(is_above)?;
        self.owner_cursor = found;
        Some(found)
    }

    /// Which flow of an owner goes.
    #[cold]
    fn victim(&mut self, owner: usize, now: Ticks) -> Option<u32> {
        let lists = self.owners.get(owner)?;
        match lists.transient.first {
            NONE => self.assured_victim(owner, lists.assured.first, now),
            first => Some(first),
        }
    }

    /// Which flow goes of an owner that has no transient ones.
    #[cold]
    #[inline(never)]
    fn assured_victim(&mut self, owner: usize, mut number: u32, now: Ticks) -> Option<u32> {
        for _ in 0..SECOND_CHANCES {
            let flow = self.get(number)?;
            let [original, reply] = &flow.half;
            if now.since(original.seen).min(now.since(reply.seen)) > RECENT {
                return Some(number);
            }
            // To the end of the list, as the youngest.
            self.relink(number);
            number = self.owners.get(owner)?.assured.first;
        }
        Some(number)
    }

    /// Moves a flow between its owner's lists after its state has changed.
    #[inline(always)]
    pub(crate) fn settle(&mut self, number: u32) {
        let Some(flow) = self.get(number) else { return };
        if flow.is_transient() == (flow.flags & IN_ASSURED_LIST != 0) {
            self.relink(number);
        }
    }

    /// Moves a flow to the end of the list that it belongs in now.
    #[inline(never)]
    fn relink(&mut self, number: u32) {
        self.unlink_owner(number);
        self.link_owner(number);
    }

    /// Appends a flow to the list of its owner that it belongs in.
    #[inline(always)]
    pub(super) fn link_owner(&mut self, number: u32) {
        let Some(flow) = self.flows.get_mut(as_index(number)) else {
            return;
        };
        let Some(owner) = self.owners.get_mut(usize::from(flow.owner)) else {
            return;
        };
        let list = if flow.is_transient() {
            flow.flags &= !IN_ASSURED_LIST;
            &mut owner.transient
        } else {
            flow.flags |= IN_ASSURED_LIST;
            &mut owner.assured
        };
        let previous = core::mem::replace(&mut list.last, number);
        flow.list_next = NONE;
        flow.list_previous = previous;
        match self.flows.get_mut(as_index(previous)) {
            Some(previous) => previous.list_next = number,
            None => list.first = number,
        }
    }

    /// Takes a flow out of its owner's list.
    fn unlink_owner(&mut self, number: u32) {
        if let Some(flow) = self.get(number) {
            self.unlink(Links::of(flow));
        }
    }

    #[inline(always)]
    pub(super) fn unlink(&mut self, links: Links) {
        let Links {
            previous,
            next,
            owner,
            assured,
        } = links;
        let Some(owner) = self.owners.get_mut(usize::from(owner)) else {
            return;
        };
        let list = if assured {
            &mut owner.assured
        } else {
            &mut owner.transient
        };
        match self.flows.get_mut(as_index(previous)) {
            Some(previous) => previous.list_next = next,
            None => list.first = next,
        }
        match self.flows.get_mut(as_index(next)) {
            Some(next) => next.list_previous = previous,
            None => list.last = previous,
        }
    }
}
