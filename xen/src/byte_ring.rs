//! One direction of a byte ring in a shared page: free-running indices, masked by a power-of-two size.
//!
//! Our own index is private; the peer's is read once per call and compared with ours, and a distance that cannot
//! be ends the stream. The xenstore and console rings are two of these each; both peers are dom0's daemons,
//! trusted, yet a corrupted index must not make us loop.
//!
//! Source: Xen `public/io/xs_wire.h`, `public/io/console.h`.

use crate::shared::{SharedPage, full_fence, read_fence, write_fence};
use crate::stream::StreamError;

/// Where a ring lies in its page, all offsets in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingPlace {
    /// The first data byte.
    pub(crate) data: usize,
    /// Data bytes, a power of two.
    pub(crate) size: u32,
    /// The consumer's index (`u32`).
    pub(crate) consumer: usize,
    /// The producer's index (`u32`).
    pub(crate) producer: usize,
}

impl RingPlace {
    /// Where the byte of a running index is, and how many bytes follow without wrapping.
    const fn run(&self, index: u32) -> (usize, usize) {
        let at = index & (self.size - 1);
        (self.data + at as usize, (self.size - at) as usize)
    }
}

/// The end that writes.
#[derive(Debug)]
pub(crate) struct Outgoing {
    place: RingPlace,
    produced: u32,
}

impl Outgoing {
    /// Goes on where the ring's producer index stands.
    pub(crate) fn attach(page: &SharedPage, place: RingPlace) -> Self {
        Self {
            place,
            produced: page.read_u32(place.producer),
        }
    }

    /// Writes what fits; returns how many bytes. The peer sees them at once, but is not notified here.
    pub(crate) fn write(&mut self, page: &SharedPage, bytes: &[u8]) -> Result<usize, StreamError> {
        let used = self
            .produced
            .wrapping_sub(page.read_u32(self.place.consumer));
        let room = self.place.size.checked_sub(used).ok_or(StreamError)?;
        // The consumer is done with the room before we write into it.
        full_fence();
        let count = bytes.len().min(room as usize);
        let (at, straight) = self.place.run(self.produced);
        let (first, rest) = bytes
            .get(..count)
            .unwrap_or_default()
            .split_at(count.min(straight));
        page.write_bytes(at, first);
        page.write_bytes(self.place.data, rest);
        write_fence();
        #[expect(clippy::cast_possible_truncation, reason = "at most the ring's size")]
        let advance = count as u32;
        self.produced = self.produced.wrapping_add(advance);
        page.write_u32(self.place.producer, self.produced);
        Ok(count)
    }

    /// Bytes that a write would take now; 0 when the peer's index is impossible.
    pub(crate) fn room(&self, page: &SharedPage) -> usize {
        let used = self
            .produced
            .wrapping_sub(page.read_u32(self.place.consumer));
        self.place.size.saturating_sub(used) as usize
    }

    /// Whether the peer has taken everything, as far as its index says.
    pub(crate) fn is_drained(&self, page: &SharedPage) -> bool {
        page.read_u32(self.place.consumer) == self.produced
    }
}

/// What a read brought.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Received {
    /// Bytes read.
    pub(crate) count: usize,
    /// The ring had been full, so the peer may wait to be told about the room.
    pub(crate) was_full: bool,
}

/// The end that reads.
#[derive(Debug)]
pub(crate) struct Incoming {
    place: RingPlace,
    consumed: u32,
}

impl Incoming {
    /// Goes on where the ring's consumer index stands.
    pub(crate) fn attach(page: &SharedPage, place: RingPlace) -> Self {
        Self {
            place,
            consumed: page.read_u32(place.consumer),
        }
    }

    /// Reads what is there, at most `buffer.len()` bytes.
    pub(crate) fn read(
        &mut self,
        page: &SharedPage,
        buffer: &mut [u8],
    ) -> Result<Received, StreamError> {
        let waiting = page
            .read_u32(self.place.producer)
            .wrapping_sub(self.consumed);
        if waiting > self.place.size {
            return Err(StreamError);
        }
        read_fence();
        let count = buffer.len().min(waiting as usize);
        let (at, straight) = self.place.run(self.consumed);
        let (first, rest) = buffer
            .get_mut(..count)
            .unwrap_or_default()
            .split_at_mut(count.min(straight));
        page.read_bytes(at, first);
        page.read_bytes(self.place.data, rest);
        // The bytes are out before the producer may overwrite them.
        full_fence();
        #[expect(clippy::cast_possible_truncation, reason = "at most the ring's size")]
        let advance = count as u32;
        self.consumed = self.consumed.wrapping_add(advance);
        page.write_u32(self.place.consumer, self.consumed);
        Ok(Received {
            count,
            was_full: waiting == self.place.size && count > 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::SharedMemory;

    const PLACE: RingPlace = RingPlace {
        data: 1024,
        size: 1024,
        consumer: 2048,
        producer: 2052,
    };

    /// Both ends of one ring whose indices start at `start`.
    fn ring(memory: &SharedMemory, start: u32) -> (Outgoing, Incoming) {
        let page = memory.page();
        page.write_u32(PLACE.consumer, start);
        page.write_u32(PLACE.producer, start);
        (
            Outgoing::attach(&page, PLACE),
            Incoming::attach(&page, PLACE),
        )
    }

    #[test]
    fn bytes_arrive_in_order_across_the_end_and_index_overflow() {
        let memory = SharedMemory::new();
        let page = memory.page();
        let (mut out, mut input) = ring(&memory, u32::MAX - 700);
        let sent: Vec<u8> = (0..5000u32).map(|value| (value % 251) as u8).collect();
        let mut received: Vec<u8> = Vec::new();
        let mut left = &sent[..];
        while received.len() < sent.len() {
            let taken = out.write(&page, left).unwrap();
            left = &left[taken..];
            let mut buffer = [0; 300];
            let count = input.read(&page, &mut buffer).unwrap().count;
            received.extend(&buffer[..count]);
        }
        assert_eq!(received, sent);
        assert!(out.is_drained(&page));
    }

    #[test]
    fn a_full_ring_takes_nothing_more_and_is_reported_as_full() {
        let memory = SharedMemory::new();
        let page = memory.page();
        let (mut out, mut input) = ring(&memory, 10);
        assert_eq!(out.write(&page, &[7; 2000]), Ok(1024));
        assert_eq!(out.write(&page, &[7; 1]), Ok(0));
        let mut buffer = [0; 1];
        let full = Received {
            count: 1,
            was_full: true,
        };
        assert_eq!(input.read(&page, &mut buffer), Ok(full));
        assert!(!input.read(&page, &mut buffer).unwrap().was_full);
        assert_eq!(out.write(&page, &[7; 5]), Ok(2));
    }

    #[test]
    fn impossible_peer_indices_end_the_stream_and_touch_nothing() {
        let memory = SharedMemory::new();
        let page = memory.page();
        let (mut out, mut input) = ring(&memory, 0);
        page.write_u32(PLACE.consumer, 1);
        assert_eq!(out.write(&page, &[1]), Err(StreamError));
        page.write_u32(PLACE.producer, 1025);
        assert_eq!(input.read(&page, &mut [0; 4]), Err(StreamError));
        assert_eq!(page.read_u32(PLACE.producer), 1025);
        assert_eq!(page.read_u32(PLACE.consumer), 1);
    }

    #[test]
    fn data_never_leaves_its_place_in_the_page() {
        let memory = SharedMemory::new();
        let page = memory.page();
        let (mut out, _) = ring(&memory, 1000);
        out.write(&page, &[0xAA; 1024]).unwrap();
        let mut bytes = [0; 4096];
        page.read_bytes(0, &mut bytes);
        assert!(bytes[..1024].iter().all(|byte| *byte == 0));
        assert!(bytes[1024..2048].iter().all(|byte| *byte == 0xAA));
        assert!(bytes[2056..].iter().all(|byte| *byte == 0));
    }
}
