//! Frames that wait for a client's buffers: bounded in frames, pages and time.
//!
//! Pages are counted, not bytes, because pages are what a queue holds back from everybody else.

use alloc::collections::VecDeque;

use xen::packet::Segments;
use xen::{Checksum, Fragment, Gso, Hypervisor, PAGE_SIZE, Time};

use crate::{QUEUE_EXPIRY, QUEUE_FRAMES, QUEUE_PAGES, SEGMENTS_PATIENCE};

/// A frame that waits, without its pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Item {
    /// Bytes of the frame.
    pub(crate) len: u32,
    pub(crate) checksum: Checksum,
    pub(crate) gso: Option<Gso>,
    /// How it is to be cut, if it is; its first `header_pages` fragments are the prepared headers.
    pub(crate) segments: Option<Segments>,
    pub(crate) header_pages: u8,
    /// Fragments, header pages included.
    pub(crate) fragments: u8,
    /// Since when it waits.
    pub(crate) since: Time,
    /// It has waited for room for all its segments for as long as it may; now those go that have room.
    pub(crate) impatient: bool,
}

impl Item {
    /// The rx slots that it needs, extras included.
    pub(crate) fn needed_slots(&self) -> u32 {
        let len = usize::try_from(self.len).unwrap_or(usize::MAX);
        let slots = match self.segments {
            Some(segments) => segments.count(len),
            None => len
                .div_ceil(PAGE_SIZE)
                .saturating_add(usize::from(self.gso.is_some())),
        };
        u32::try_from(slots).unwrap_or(u32::MAX)
    }

    /// At least as many operations as sending it takes: a piece ends where a slot or a fragment does.
    pub(crate) fn most_ops(&self) -> usize {
        let slots = usize::try_from(self.needed_slots()).unwrap_or(usize::MAX);
        let headers = if self.segments.is_some() { slots } else { 0 };
        slots
            .saturating_add(headers)
            .saturating_add(usize::from(self.fragments))
    }

    /// When something must be done about it at the latest.
    fn deadline(&self) -> Time {
        let patient = self.segments.is_some() && !self.impatient;
        self.since.plus(if patient {
            SEGMENTS_PATIENCE
        } else {
            QUEUE_EXPIRY
        })
    }
}

/// The queue of one client. Allocated once.
#[derive(Debug)]
pub(crate) struct Queue {
    items: VecDeque<Item>,
    /// Fragments of all items, in order.
    fragments: VecDeque<Fragment>,
}

impl Queue {
    pub(crate) fn new() -> Self {
        Self {
            items: VecDeque::with_capacity(QUEUE_FRAMES),
            fragments: VecDeque::with_capacity(QUEUE_PAGES),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Whether one more frame of that many pages may wait.
    pub(crate) fn fits(&self, pages: usize) -> bool {
        self.items.len() < QUEUE_FRAMES && self.fragments.len().saturating_add(pages) <= QUEUE_PAGES
    }

    /// Appends a frame that [`Queue::fits`].
    pub(crate) fn push(&mut self, mut item: Item, fragments: impl Iterator<Item = Fragment>) {
        let before = self.fragments.len();
        self.fragments.extend(fragments);
        let count = self.fragments.len().wrapping_sub(before);
        item.fragments = u8::try_from(count).unwrap_or(u8::MAX);
        self.items.push_back(item);
    }

    /// The frame that has waited longest.
    pub(crate) fn head(&self) -> Option<&Item> {
        self.items.front()
    }

    /// As [`Queue::head`], to change it.
    pub(crate) fn head_mut(&mut self) -> Option<&mut Item> {
        self.items.front_mut()
    }

    /// Takes the frame that has waited longest. Its fragments must all be taken.
    pub(crate) fn pop(&mut self) -> Option<(Item, impl Iterator<Item = Fragment> + '_)> {
        let item = self.items.pop_front()?;
        let count = usize::from(item.fragments).min(self.fragments.len());
        Some((item, self.fragments.drain(..count)))
    }

    /// Drops the frame that has waited longest.
    pub(crate) fn drop_head<H: Hypervisor + ?Sized>(&mut self, hv: &mut H) {
        if let Some((_, fragments)) = self.pop() {
            for fragment in fragments {
                hv.release(fragment.into_page());
            }
        }
    }

    /// Drops everything.
    pub(crate) fn clear<H: Hypervisor + ?Sized>(&mut self, hv: &mut H) {
        self.items.clear();
        while let Some(fragment) = self.fragments.pop_front() {
            hv.release(fragment.into_page());
        }
    }

    /// The rx slots that the frame at the head needs.
    pub(crate) fn needed_slots(&self) -> Option<u32> {
        let item = self.head()?;
        // One is enough for some of the segments.
        Some(if item.impatient {
            1
        } else {
            item.needed_slots()
        })
    }

    /// When something must be done about the frame at the head at the latest.
    pub(crate) fn deadline(&self) -> Option<Time> {
        self.head().map(Item::deadline)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use core::num::NonZeroU16;

    use std::vec::Vec;
    use xen::fake::{FakeHypervisor, FakeMachine, Resources};
    use xen::netif::GsoType;
    use xen::{DomId, Frame};

    use super::*;

    const US: DomId = DomId(1);

    fn item(len: u32) -> Item {
        Item {
            len,
            checksum: Checksum::Unverified,
            gso: None,
            segments: None,
            header_pages: 0,
            fragments: 0,
            since: Time(0),
            impatient: false,
        }
    }

    fn frame(hv: &mut FakeHypervisor, pages: usize) -> Frame {
        let mut frame = Frame::new();
        for _ in 0..pages {
            let page = hv.allocate().unwrap();
            frame.push(page, 0, 100).unwrap();
        }
        frame
    }

    #[test]
    fn needed_slots_count_pages_and_the_extra() {
        assert_eq!(item(1).needed_slots(), 1);
        assert_eq!(item(4096).needed_slots(), 1);
        assert_eq!(item(4097).needed_slots(), 2);
        let gso = NonZeroU16::new(1448).map(|size| Gso {
            size,
            family: GsoType::TcpV4,
        });
        assert_eq!(
            Item {
                gso,
                ..item(65_535)
            }
            .needed_slots(),
            17
        );
        let segments = Some(Segments {
            header_len: 54,
            payload_len: 1000,
            checksum: Checksum::Blank,
        });
        assert_eq!(
            Item {
                segments,
                ..item(54 + 3001)
            }
            .needed_slots(),
            4
        );
    }

    #[test]
    fn frames_leave_in_order_with_their_own_pages() {
        let machine = FakeMachine::new();
        let mut hv = machine.domain(US);
        let mut queue = Queue::new();
        for pages in [1u8, 3, 2] {
            let mut frame = frame(&mut hv, pages.into());
            queue.push(item(u32::from(pages) * 100), frame.drain());
        }
        for pages in [1u8, 3, 2] {
            let (item, fragments) = queue.pop().unwrap();
            assert_eq!((item.len, item.fragments), (u32::from(pages) * 100, pages));
            let fragments: Vec<Fragment> = fragments.collect();
            assert_eq!(fragments.len(), usize::from(pages));
            for fragment in fragments {
                hv.release(fragment.into_page());
            }
        }
        assert!(queue.pop().is_none());
        assert_eq!(machine.resources(US), Resources::default());
    }

    #[test]
    fn frames_and_pages_are_bounded_without_growing() {
        let machine = FakeMachine::new();
        let mut hv = machine.domain(US);
        let mut queue = Queue::new();
        let room = (queue.items.capacity(), queue.fragments.capacity());
        while queue.fits(1) {
            let mut frame = frame(&mut hv, 1);
            queue.push(item(100), frame.drain());
        }
        assert_eq!(queue.len(), QUEUE_FRAMES);
        queue.clear(&mut hv);
        while queue.fits(7) {
            let mut frame = frame(&mut hv, 7);
            queue.push(item(700), frame.drain());
        }
        assert_eq!(queue.len(), QUEUE_PAGES / 7);
        queue.drop_head(&mut hv);
        assert!(queue.fits(7));
        assert_eq!((queue.items.capacity(), queue.fragments.capacity()), room);
        queue.clear(&mut hv);
        assert_eq!(machine.resources(US), Resources::default());
    }

    /// What a silent client costs in memory, rings aside (R4 asks for at most 16 KiB).
    #[test]
    fn a_client_costs_less_than_eight_kib() {
        let queue = Queue::new();
        let bytes = size_of::<crate::Vif>()
            + queue.items.capacity() * size_of::<Item>()
            + queue.fragments.capacity() * size_of::<Fragment>();
        assert!(bytes < 8192, "{bytes}");
    }
}
