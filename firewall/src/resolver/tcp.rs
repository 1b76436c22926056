//! One question over TCP: connect, ask, read one answer, abort.
//!
//! This is used only when an answer did not fit a datagram. It is not a general TCP: the query fits one
//! segment, the answer is read in order and segments that arrive early are dropped for the server to
//! send again, and the connection ends with a reset as soon as the answer is whole, so that nothing
//! lingers. That keeps it small enough to be looked through, which a full stack would not be.
//!
//! Trust: segments may be forged by anybody who can send to us. Their addresses and ports were checked
//! by the caller; here their numbers must fit exactly (a reset or data that is not the next byte has no
//! effect), with a first number of ours that is random.
//!
//! Bounds: [`MAX_ANSWER`] bytes, [`MAX_SENDS`] transmissions of anything, [`DEADLINE_MILLIS`] in all.
//!
//! Source: RFC 9293 sections 3.1, 3.4, 3.5, 3.10; RFC 7766 section 8 (length prefix).

use alloc::vec::Vec;

use crate::frame::Time;

/// Longest answer that is read, in bytes. DNS answers with a hundred addresses have a few thousand.
const MAX_ANSWER: usize = 16 * 1024;

/// Length of the number before a message that says how long it is, in bytes.
const PREFIX_LEN: usize = 2;

/// How often a segment is sent before the server counts as dead.
const MAX_SENDS: u8 = 4;

/// Time before a segment is sent again for the first time; doubles each time.
const FIRST_RESEND_MILLIS: u64 = 500;

/// Time for everything, in milliseconds.
pub(super) const DEADLINE_MILLIS: u64 = 6_000;

/// Segment size that we announce: fits the smallest IPv6 MTU.
const MSS: u16 = 1220;

/// Length of a header without options in bytes.
const HEADER_LEN: usize = 20;

// Flags.
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;

/// Where the connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A SYN is out.
    Connecting,
    /// The query is out, or its answer on its way in.
    Asking,
    /// There is nothing more to send or to receive.
    Over,
}

/// What a connection has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It goes on.
    Open,
    /// The answer is whole.
    Answered,
    /// There will be no answer.
    Failed,
}

/// A connection that asks one question.
#[derive(Debug)]
pub(super) struct Connection {
    local_port: u16,
    server_port: u16,
    state: State,
    /// The query with its length before it.
    query: Vec<u8>,
    /// What has come of the answer, with its length before it.
    received: Vec<u8>,
    /// Sequence number of the query's first byte.
    query_sequence: u32,
    /// Whether the server has acknowledged the query.
    is_query_acknowledged: bool,
    /// The next sequence number expected of the server.
    expected: u32,
    /// A segment is due, at this time.
    send_at: Option<Time>,
    /// How often the SYN or the query has been sent.
    sends: u8,
    /// A reset is due.
    reset: bool,
}

/// The fields of a received segment that matter here.
struct Segment<'a> {
    sequence: u32,
    acknowledgement: u32,
    flags: u8,
    payload: &'a [u8],
}

impl<'a> Segment<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let header: &[u8; HEADER_LEN] = bytes.first_chunk()?;
        let [
            _,
            _,
            _,
            _,
            s0,
            s1,
            s2,
            s3,
            a0,
            a1,
            a2,
            a3,
            offset,
            flags,
            ..,
        ] = *header;
        let header_len = usize::from(offset >> 4) * 4;
        Some(Self {
            sequence: u32::from_be_bytes([s0, s1, s2, s3]),
            acknowledgement: u32::from_be_bytes([a0, a1, a2, a3]),
            flags,
            payload: bytes.get(header_len.max(HEADER_LEN)..)?,
        })
    }

    const fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }
}

impl Connection {
    /// Begins to connect. `query` is a DNS message; `first` a random number.
    pub(super) fn new(
        local_port: u16,
        server_port: u16,
        query: &[u8],
        first: u32,
        now: Time,
    ) -> Self {
        // A query is a header, a name of at most 255 bytes and 4 more.
        let len = u16::try_from(query.len()).unwrap_or(u16::MAX);
        let mut prefixed = Vec::from(len.to_be_bytes());
        prefixed.extend(query);
        Self {
            local_port,
            server_port,
            state: State::Connecting,
            query: prefixed,
            received: Vec::new(),
            query_sequence: first.wrapping_add(1),
            is_query_acknowledged: false,
            expected: 0,
            send_at: Some(now),
            sends: 0,
            reset: false,
        }
    }

    /// The answer, once there is one.
    pub(super) fn answer(&self) -> &[u8] {
        self.received.get(PREFIX_LEN..).unwrap_or(&[])
    }

    /// Takes a segment from the server.
    pub(super) fn receive(&mut self, bytes: &[u8], now: Time) -> Outcome {
        let Some(segment) = Segment::read(bytes) else {
            return Outcome::Open;
        };
        match self.state {
            State::Connecting => self.receive_connecting(&segment, now),
            State::Asking => self.receive_asking(&segment, now),
            State::Over => Outcome::Open,
        }
    }

    fn receive_connecting(&mut self, segment: &Segment<'_>, now: Time) -> Outcome {
        // Only an answer to our SYN, and to no other, has any effect.
        if !segment.has(ACK) || segment.acknowledgement != self.query_sequence {
            return Outcome::Open;
        }
        if segment.has(RST) {
            return self.end(Outcome::Failed, false);
        }
        if segment.has(SYN) {
            self.state = State::Asking;
            self.expected = segment.sequence.wrapping_add(1);
            self.sends = 0;
            self.send_at = Some(now);
        }
        Outcome::Open
    }

    fn receive_asking(&mut self, segment: &Segment<'_>, now: Time) -> Outcome {
        if segment.has(RST) {
            return if segment.sequence == self.expected {
                self.end(Outcome::Failed, false)
            } else {
                Outcome::Open
            };
        }
        if !segment.has(ACK) || segment.has(SYN) {
            return Outcome::Open;
        }
        let query_end = self.query_end();
        let is_known = segment.acknowledgement == self.query_sequence;
        if segment.acknowledgement == query_end {
            self.is_query_acknowledged = true;
        } else if !is_known {
            // It acknowledges what we never sent.
            return Outcome::Open;
        }
        if self.is_query_acknowledged && self.send_at.is_some_and(|time| time > now) {
            self.send_at = None;
        }
        if segment.payload.is_empty() && !segment.has(FIN) {
            return Outcome::Open;
        }
        // Whatever it is, the server learns how far we are.
        self.send_at = Some(now);
        // Old bytes at the front are cut off; a gap is not filled later.
        let old = self.expected.wrapping_sub(segment.sequence);
        let new = usize::try_from(old)
            .ok()
            .and_then(|old| segment.payload.get(old..));
        let Some(new) = new else {
            return Outcome::Open;
        };
        let room = (PREFIX_LEN + MAX_ANSWER).saturating_sub(self.received.len());
        let taken = new.get(..room).unwrap_or(new);
        self.received.extend(taken);
        self.expected = self
            .expected
            .wrapping_add(u32::try_from(taken.len()).unwrap_or(0));
        let Some(prefix) = self.received.first_chunk() else {
            return self.open_unless(segment.has(FIN));
        };
        let len = usize::from(u16::from_be_bytes(*prefix));
        if len > MAX_ANSWER {
            return self.end(Outcome::Failed, true);
        }
        if self.received.len() >= PREFIX_LEN + len {
            self.received.truncate(PREFIX_LEN + len);
            return self.end(Outcome::Answered, true);
        }
        self.open_unless(segment.has(FIN))
    }

    /// The answer is not whole: it never will be if the server has closed.
    fn open_unless(&mut self, is_closed: bool) -> Outcome {
        if is_closed {
            self.end(Outcome::Failed, true)
        } else {
            Outcome::Open
        }
    }

    /// Gives up, as the caller has decided. A reset may be left to send.
    pub(super) fn abort(&mut self) {
        let is_open = self.state == State::Asking;
        self.end(Outcome::Failed, is_open);
    }

    fn end(&mut self, outcome: Outcome, reset: bool) -> Outcome {
        self.state = State::Over;
        self.send_at = None;
        self.reset = reset;
        outcome
    }

    /// When [`Self::next_segment`] has something to say.
    pub(super) fn deadline(&self) -> Option<Time> {
        self.send_at
    }

    /// The segment that is due, if one is, without its checksum. `Err` if the server does not react.
    pub(super) fn next_segment(&mut self, now: Time) -> Result<Option<Vec<u8>>, ()> {
        if core::mem::take(&mut self.reset) {
            return Ok(Some(self.segment(RST | ACK, self.query_end(), &[])));
        }
        if self.send_at.is_none_or(|time| time > now) {
            return Ok(None);
        }
        if self.state == State::Asking && self.is_query_acknowledged {
            self.send_at = None;
            return Ok(Some(self.segment(ACK, self.query_end(), &[])));
        }
        if self.sends >= MAX_SENDS {
            self.abort();
            return Err(());
        }
        let wait = FIRST_RESEND_MILLIS << self.sends;
        self.sends += 1;
        self.send_at = Some(now.plus_nanos(wait * 1_000_000));
        Ok(Some(match self.state {
            State::Connecting => self.segment(SYN, self.query_sequence.wrapping_sub(1), &[]),
            _ => self.segment(ACK | PSH, self.query_sequence, &self.query),
        }))
    }

    /// The sequence number after the query.
    fn query_end(&self) -> u32 {
        let len = u32::try_from(self.query.len()).unwrap_or(0);
        self.query_sequence.wrapping_add(len)
    }

    fn segment(&self, flags: u8, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let room = (PREFIX_LEN + MAX_ANSWER).saturating_sub(self.received.len());
        let window = u16::try_from(room).unwrap_or(u16::MAX);
        let acknowledgement = if flags & ACK == 0 { 0 } else { self.expected };
        let is_syn = flags & SYN != 0;
        // In words of four bytes; a SYN carries the segment size.
        let header_words: u8 = if is_syn { 6 } else { 5 };
        let mut bytes = Vec::with_capacity(HEADER_LEN + 4 + payload.len());
        bytes.extend(self.local_port.to_be_bytes());
        bytes.extend(self.server_port.to_be_bytes());
        bytes.extend(sequence.to_be_bytes());
        bytes.extend(acknowledgement.to_be_bytes());
        bytes.extend([header_words << 4, flags]);
        bytes.extend(window.to_be_bytes());
        // The checksum, which covers addresses that are not known here, and the urgent pointer.
        bytes.extend([0; 4]);
        if is_syn {
            bytes.extend([2, 4]);
            bytes.extend(MSS.to_be_bytes());
        }
        bytes.extend(payload);
        bytes
    }
}

#[cfg(test)]
mod tests;
