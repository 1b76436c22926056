//! The byte stream cut into pieces of messages.
//!
//! A message may be as long as the ring, or claim to be longer than memory. So it is handed on in pieces, and whoever
//! wants it whole keeps what it can afford.

use xen::stream::{ByteStream, StreamError};

use super::message::{HEADER, Header};

/// The longest piece in bytes.
const PIECE: usize = 2048;

/// Part of a message.
#[derive(Debug)]
pub struct Piece<'a> {
    /// The message's header.
    pub header: Header,
    /// Whether this is its first piece.
    pub first: bool,
    /// The next bytes of its payload; empty only for a message without payload.
    pub bytes: &'a [u8],
    /// Whether the message is whole with this.
    pub last: bool,
}

/// Cuts a stream.
#[derive(Debug)]
pub struct Frames {
    header: [u8; HEADER],
    /// Bytes of the header that have arrived.
    have: usize,
    /// The message that is arriving.
    current: Option<Current>,
    /// The longest payload that a message may announce, in bytes.
    longest: u32,
    piece: [u8; PIECE],
}

#[derive(Clone, Copy, Debug)]
struct Current {
    header: Header,
    left: u32,
    begun: bool,
}

impl Frames {
    /// At the beginning of a stream whose messages have at most `longest` bytes of payload.
    #[must_use]
    pub const fn new(longest: u32) -> Self {
        Self {
            header: [0; HEADER],
            have: 0,
            current: None,
            longest,
            piece: [0; PIECE],
        }
    }

    /// Reads the next piece; `None` when nothing more has arrived.
    ///
    /// # Errors
    ///
    /// The stream is over, and a message that was not whole will never be; or a message is longer than any may be, so
    /// that the stream has lost its step.
    pub fn next<S: ByteStream>(
        &mut self,
        stream: &mut S,
    ) -> Result<Option<Piece<'_>>, StreamError> {
        let Some(current) = self.begin(stream)? else {
            return Ok(None);
        };
        let wanted = usize::try_from(current.left).map_or(PIECE, |left| left.min(PIECE));
        let mut read = 0;
        if wanted > 0 {
            read = stream.read(self.piece.get_mut(..wanted).unwrap_or_default())?;
            if read == 0 {
                return Ok(None);
            }
        }
        let left = current
            .left
            .saturating_sub(u32::try_from(read).unwrap_or(u32::MAX));
        let last = left == 0;
        self.current = (!last).then_some(Current {
            left,
            begun: true,
            ..current
        });
        Ok(Some(Piece {
            header: current.header,
            first: !current.begun,
            bytes: self.piece.get(..read).unwrap_or_default(),
            last,
        }))
    }

    /// The message that is arriving; reads its header first if need be.
    fn begin<S: ByteStream>(&mut self, stream: &mut S) -> Result<Option<Current>, StreamError> {
        if self.current.is_some() {
            return Ok(self.current);
        }
        while let Some(missing) = self.header.get_mut(self.have..)
            && !missing.is_empty()
        {
            let read = stream.read(missing)?;
            if read == 0 {
                return Ok(None);
            }
            self.have = self.have.saturating_add(read);
        }
        self.have = 0;
        let header = Header::decode(self.header);
        if header.len > self.longest {
            return Err(StreamError);
        }
        self.current = Some(Current {
            header,
            left: header.len,
            begun: false,
        });
        Ok(self.current)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qrexec::message::Kind;
    use crate::vchan::pipes::pipes;
    use alloc::vec::Vec;

    /// Feeds `bytes` in portions and collects whole messages.
    fn read(bytes: &[u8], portion: usize) -> Vec<(Kind, Vec<u8>)> {
        let (mut far, mut near) = pipes(1 << 20);
        let mut frames = Frames::new(65_536);
        let (mut out, mut body) = (Vec::new(), Vec::new());
        for portion in bytes.chunks(portion) {
            far.put(portion);
            while let Some(piece) = frames.next(&mut near).unwrap() {
                assert_eq!(piece.first, body.is_empty());
                body.extend_from_slice(piece.bytes);
                if piece.last {
                    out.push((piece.header.kind, core::mem::take(&mut body)));
                }
            }
        }
        assert!(body.is_empty());
        drop(far);
        assert!(frames.next(&mut near).is_err());
        out
    }

    #[test]
    fn messages_come_out_whole_however_the_bytes_arrive() {
        let mut bytes = Vec::new();
        for (kind, len) in [(0x300u32, 4usize), (0x190, 0), (0x190, 65_536), (0x7777, 3)] {
            bytes.extend(kind.to_le_bytes());
            bytes.extend(u32::try_from(len).unwrap().to_le_bytes());
            bytes.extend((0..len).map(|index| u8::try_from(index % 253).unwrap()));
        }
        let expected = read(&bytes, usize::MAX);
        assert_eq!(
            expected
                .iter()
                .map(|(kind, body)| (*kind, body.len()))
                .collect::<Vec<_>>(),
            [
                (Kind::Hello, 4),
                (Kind::Stdin, 0),
                (Kind::Stdin, 65_536),
                (Kind::Other(0x7777), 3)
            ]
        );
        for portion in [1, 7, 8, 9, 1000, 4096] {
            assert!(read(&bytes, portion) == expected, "{portion}");
        }
    }
}
