//! Frames that the engine makes itself, until the caller takes them.
//!
//! A ring of bytes with a list of frames in it, both of fixed size. A frame lies in one piece: when it
//! does not fit before the end of the ring, the rest of the ring is skipped. Nothing is overwritten;
//! what does not fit is refused and the caller counts it.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use crate::frame::Iface;

/// Most frames that wait at once.
const MAX_FRAMES: usize = 512;

/// Room for one frame: a full Ethernet frame of the standard MTU.
pub(crate) const MIN_BYTES: usize = 8 * 1024;

/// A frame that the engine made. Its checksums are complete.
#[derive(Debug)]
pub struct Generated<'a> {
    /// Where to send it.
    pub egress: Iface,
    /// The whole Ethernet frame.
    pub bytes: &'a [u8],
}

#[derive(Clone, Copy, Debug)]
struct Record {
    start: u32,
    len: u32,
    egress: Iface,
}

/// The frames in order.
#[derive(Debug)]
pub(crate) struct Outbox {
    /// Grows within what was reserved, so that memory which no frame has needed yet is not touched.
    bytes: Vec<u8>,
    /// Bytes that were reserved.
    size: usize,
    /// Where the next frame starts.
    write: usize,
    records: Box<[Record]>,
    first: usize,
    count: usize,
}

impl Outbox {
    pub(crate) fn new(bytes: usize) -> Self {
        let empty = Record {
            start: 0,
            len: 0,
            egress: Iface::Uplink,
        };
        let size = bytes.max(MIN_BYTES);
        Self {
            bytes: Vec::with_capacity(size),
            size,
            write: 0,
            records: vec![empty; MAX_FRAMES].into_boxed_slice(),
            first: 0,
            count: 0,
        }
    }

    /// Where a frame of `len` bytes can lie, if anywhere.
    fn place(&self, len: usize) -> Option<usize> {
        if self.count == self.records.len() || len > self.size {
            return None;
        }
        let Some(oldest) = self.oldest() else {
            return Some(0);
        };
        let read = usize::try_from(oldest.start).ok()?;
        if self.write > read {
            if len <= self.size - self.write {
                Some(self.write)
            } else {
                (len <= read).then_some(0)
            }
        } else {
            (len <= read.checked_sub(self.write)?).then_some(self.write)
        }
    }

    fn oldest(&self) -> Option<Record> {
        (self.count > 0).then(|| self.records.get(self.first).copied())?
    }

    /// Adds a frame of `len` bytes, for the caller to write all of them; `None` if there is no room.
    pub(crate) fn add(&mut self, egress: Iface, len: usize) -> Option<&mut [u8]> {
        let start = self.place(len)?;
        let record_len = u32::try_from(len).ok()?;
        let record_start = u32::try_from(start).ok()?;
        if self.bytes.len() < start + len {
            self.bytes.resize(start + len, 0);
        }
        let room = self.bytes.get_mut(start..start + len)?;
        *self
            .records
            .get_mut((self.first + self.count) % MAX_FRAMES)? = Record {
            start: record_start,
            len: record_len,
            egress,
        };
        self.count += 1;
        self.write = start + len;
        Some(room)
    }

    /// Whether `frames` frames of at most `len` bytes each certainly fit.
    pub(crate) fn has_room(&self, frames: usize, len: usize) -> bool {
        // At most one frame's length is lost at the wrap, and at most another at each end.
        let needed = frames.saturating_add(2).saturating_mul(len);
        self.records.len() - self.count >= frames && self.free_bytes() >= needed
    }

    fn free_bytes(&self) -> usize {
        let Some(oldest) = self.oldest() else {
            return self.size;
        };
        let read = usize::try_from(oldest.start).unwrap_or(0);
        if self.write > read {
            self.size - self.write + read
        } else {
            read - self.write
        }
    }

    /// Takes the oldest frame. Its bytes stay until the next change.
    pub(crate) fn pop(&mut self) -> Option<Generated<'_>> {
        let record = self.oldest()?;
        self.first = (self.first + 1) % MAX_FRAMES;
        self.count -= 1;
        let start = usize::try_from(record.start).ok()?;
        let len = usize::try_from(record.len).ok()?;
        let bytes = self.bytes.get(start..start.checked_add(len)?)?;
        Some(Generated {
            egress: record.egress,
            bytes,
        })
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.count == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::VecDeque;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    #[test]
    fn full_outbox_refuses_and_keeps_what_it_has() {
        let mut outbox = Outbox::new(MIN_BYTES);
        let mut stored = 0_u8;
        while let Some(room) = outbox.add(Iface::Uplink, 1000) {
            room.fill(stored);
            stored += 1;
        }
        assert_eq!(stored, 8);
        for expected in 0..stored {
            assert!(outbox.pop().unwrap().bytes.iter().all(|b| *b == expected));
        }
        assert!(outbox.pop().is_none());
    }

    proptest! {
        #[test]
        fn behaves_as_a_queue(steps in prop::collection::vec((any::<bool>(), 1_usize..3000), 1..400)) {
            let mut outbox = Outbox::new(MIN_BYTES);
            let mut model: VecDeque<Vec<u8>> = VecDeque::new();
            let mut number = 0_u8;
            for (push, len) in steps {
                if push {
                    number = number.wrapping_add(1);
                    let room = outbox.has_room(1, len);
                    let added = outbox.add(Iface::Uplink, len);
                    let stored = added.map(|room| room.fill(number)).is_some();
                    prop_assert!(stored || !room);
                    if stored {
                        model.push_back(vec![number; len]);
                    }
                } else {
                    let popped = outbox.pop().map(|frame| frame.bytes.to_vec());
                    prop_assert_eq!(popped, model.pop_front());
                }
                prop_assert_eq!(outbox.is_empty(), model.is_empty());
            }
        }
    }
}
