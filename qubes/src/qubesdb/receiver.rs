//! The byte stream from dom0 cut into messages, in bounded memory.

use alloc::vec::Vec;

use xen::stream::{ByteStream, StreamError};

use super::message::{HEADER, Header};
use super::{OVERSIZE_VALUE, VALUE_MAX};

/// A payload length, in bytes, that no QubesDB of any version has: the stream has lost its step.
pub const NONSENSE: u32 = 1 << 20;

/// A message whose payload has arrived.
#[derive(Debug)]
pub struct Message<'a> {
    /// Its header.
    pub header: Header,
    /// Its payload, or [`OVERSIZE_VALUE`].
    pub value: &'a [u8],
}

/// Collects one message after the other.
#[derive(Debug)]
pub struct Receiver {
    header: [u8; HEADER],
    /// Bytes of the header that have arrived.
    have: usize,
    /// The header, once it is whole.
    decoded: Option<Header>,
    body: Vec<u8>,
    /// Payload bytes that are still to come.
    left: u32,
}

impl Receiver {
    /// At the beginning of a stream.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            header: [0; HEADER],
            have: 0,
            decoded: None,
            body: Vec::new(),
            left: 0,
        }
    }

    /// Reads until a message is whole or nothing more has arrived; then `None`.
    ///
    /// A payload beyond [`VALUE_MAX`] is skipped; the message comes with [`OVERSIZE_VALUE`]. So is one beyond
    /// [`NONSENSE`] unless `may_close`, because closing during the dump would end dom0's daemon.
    ///
    /// # Errors
    ///
    /// The stream is over, or has lost its step and should be closed. A message that was not whole is lost.
    pub fn next<S: ByteStream>(
        &mut self,
        stream: &mut S,
        may_close: bool,
    ) -> Result<Option<Message<'_>>, StreamError> {
        while self.decoded.is_none() {
            let Some(missing) = self
                .header
                .get_mut(self.have..)
                .filter(|rest| !rest.is_empty())
            else {
                self.begin_body();
                break;
            };
            let read = stream.read(missing)?;
            if read == 0 {
                return Ok(None);
            }
            self.have = self.have.saturating_add(read);
        }
        let Some(header) = self.decoded else {
            return Ok(None);
        };
        if may_close && header.payload > NONSENSE {
            return Err(StreamError);
        }
        while self.left > 0 {
            if !self.read_body(stream, header.payload)? {
                return Ok(None);
            }
        }
        self.decoded = None;
        self.have = 0;
        let value = if is_oversize(header.payload) {
            OVERSIZE_VALUE
        } else {
            &self.body
        };
        Ok(Some(Message { header, value }))
    }

    fn begin_body(&mut self) {
        let header = Header::decode(&self.header);
        self.left = header.payload;
        self.body.clear();
        self.decoded = Some(header);
    }

    /// Reads a piece of the payload; false when nothing has arrived.
    fn read_body<S: ByteStream>(
        &mut self,
        stream: &mut S,
        payload: u32,
    ) -> Result<bool, StreamError> {
        let mut piece = [0; 512];
        let wanted = usize::try_from(self.left).map_or(piece.len(), |left| left.min(piece.len()));
        let Some(place) = piece.get_mut(..wanted) else {
            return Ok(false);
        };
        let read = stream.read(place)?;
        if read == 0 {
            return Ok(false);
        }
        if !is_oversize(payload) {
            self.body
                .extend_from_slice(place.get(..read).unwrap_or_default());
        }
        self.left = self
            .left
            .saturating_sub(u32::try_from(read).unwrap_or(u32::MAX));
        Ok(true)
    }
}

impl Default for Receiver {
    fn default() -> Self {
        Self::new()
    }
}

fn is_oversize(payload: u32) -> bool {
    usize::try_from(payload).is_ok_and(|payload| payload > VALUE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qubesdb::message::Kind;
    use alloc::collections::VecDeque;
    use alloc::string::String;

    /// Bytes that arrive in portions of a fixed size.
    struct Portions {
        bytes: VecDeque<u8>,
        portion: usize,
        ready: usize,
    }

    impl ByteStream for Portions {
        fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
            if self.bytes.is_empty() {
                return Err(StreamError);
            }
            let read = buffer.len().min(self.ready).min(self.bytes.len());
            for byte in buffer.iter_mut().take(read) {
                *byte = self.bytes.pop_front().unwrap();
            }
            self.ready = if read == 0 {
                self.portion
            } else {
                self.ready - read
            };
            Ok(read)
        }

        fn write(&mut self, _: &[u8]) -> Result<usize, StreamError> {
            Ok(0)
        }
    }

    fn message(kind: u8, path: &str, value: &[u8]) -> Vec<u8> {
        let mut bytes = [0; HEADER];
        bytes[0] = kind;
        bytes[1..=path.len()].copy_from_slice(path.as_bytes());
        bytes[68..].copy_from_slice(&u32::try_from(value.len()).unwrap().to_le_bytes());
        bytes.iter().chain(value).copied().collect()
    }

    fn read_all(bytes: &[u8], portion: usize) -> Vec<(Kind, String, Vec<u8>)> {
        read_some(bytes, portion, true)
    }

    fn read_some(bytes: &[u8], portion: usize, may_close: bool) -> Vec<(Kind, String, Vec<u8>)> {
        let mut stream = Portions {
            bytes: bytes.iter().copied().collect(),
            portion,
            ready: portion,
        };
        let mut receiver = Receiver::new();
        let mut out = Vec::new();
        loop {
            match receiver.next(&mut stream, may_close) {
                Ok(Some(message)) => out.push((
                    message.header.kind,
                    message.header.path().unwrap().into(),
                    message.value.to_vec(),
                )),
                Ok(None) => {}
                Err(StreamError) => return out,
            }
        }
    }

    #[test]
    fn messages_come_out_whole_however_the_bytes_arrive() {
        let bytes: Vec<u8> = [
            message(11, "/qubes-ip", b"10.137.0.5"),
            message(1, "/qubes-firewall/10.137.0.9", b""),
            message(1, "/long", &[b'v'; 3071]),
            message(4, "/qubes-firewall/10.137.0.9/", b""),
        ]
        .concat();
        let expected = read_all(&bytes, usize::MAX);
        assert_eq!(expected.len(), 4);
        assert_eq!(
            expected[2],
            (Kind::Write, "/long".into(), [b'v'; 3071].to_vec())
        );
        for portion in [1, 3, 71, 72, 73, 100, 1000] {
            assert_eq!(read_all(&bytes, portion), expected, "{portion}");
        }
    }

    #[test]
    fn an_oversize_value_is_skipped_and_the_next_message_is_read() {
        let bytes = [
            message(1, "/big", &[b'v'; 70_000]),
            message(1, "/next", b"1"),
        ]
        .concat();
        let read = read_all(&bytes, 999);
        assert_eq!(
            read[0],
            (Kind::Write, "/big".into(), OVERSIZE_VALUE.to_vec())
        );
        assert_eq!(read[1], (Kind::Write, "/next".into(), b"1".to_vec()));
    }

    #[test]
    fn a_length_that_makes_no_sense_ends_the_stream_only_when_closing_is_safe() {
        let mut bytes = message(1, "/wild", b"");
        bytes[68..].copy_from_slice(&(NONSENSE + 1).to_le_bytes());
        bytes.extend(core::iter::repeat_n(0, 1 << 20));
        bytes.push(0);
        bytes.extend(message(1, "/next", b"1"));
        assert!(read_some(&bytes, 4096, true).is_empty());
        let read = read_some(&bytes, 4096, false);
        assert_eq!(read[1], (Kind::Write, "/next".into(), b"1".to_vec()));
    }

    #[test]
    fn a_truncated_header_is_lost_with_its_stream() {
        assert!(read_all(&message(1, "/x", b"")[..71], 10).is_empty());
    }
}
