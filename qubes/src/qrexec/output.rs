//! A call's output: framed as it is written, bounded, sent as the caller takes it.

use alloc::vec::Vec;
use core::fmt;

use xen::stream::{ByteStream, StreamError};

use super::message::{self, CHUNK, HEADER, Stream};

/// Bytes, with headers, that may wait for the caller. What a command writes beyond is lost.
pub const OUTPUT_MAX: usize = 64 * 1024;
/// Kept free for the end of the call: a note that output was lost, two ends of streams, an exit code.
const RESERVE: usize = 256;

/// Collects what a command writes to its caller, in order.
#[derive(Debug)]
pub struct Output {
    bytes: Vec<u8>,
    /// Bytes at the front that were sent.
    sent: usize,
    /// The data message at the end that can still grow: its stream and where its header is.
    open: Option<(Stream, usize)>,
    /// The caller wants nothing but the exit code.
    silent: bool,
    lost: u64,
}

impl Output {
    /// Nothing written. A `silent` one forgets what is written but for the exit code.
    #[must_use]
    pub const fn new(silent: bool) -> Self {
        Self {
            bytes: Vec::new(),
            sent: 0,
            open: None,
            silent,
            lost: 0,
        }
    }

    /// The caller's standard output.
    pub const fn stdout(&mut self) -> Writer<'_> {
        Writer {
            output: self,
            stream: Stream::Stdout,
        }
    }

    /// The caller's standard error.
    pub const fn stderr(&mut self) -> Writer<'_> {
        Writer {
            output: self,
            stream: Stream::Stderr,
        }
    }

    /// Bytes that can still be written, in one piece, before some are lost.
    #[must_use]
    pub const fn room(&self) -> usize {
        let chunks = OUTPUT_MAX / CHUNK + 2;
        OUTPUT_MAX.saturating_sub(self.bytes.len() + chunks * HEADER + RESERVE)
    }

    /// Bytes that were written without room for them.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.lost
    }

    /// Whether everything written was sent.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Appends the greeting of a channel.
    pub(super) fn greet(&mut self) {
        message::push_hello(&mut self.bytes);
    }

    /// Appends the end of both streams, unless silent, and the exit code.
    pub(super) fn finish(&mut self, code: u8) {
        self.open = None;
        if !self.silent {
            message::push_end(&mut self.bytes, Stream::Stdout);
            message::push_end(&mut self.bytes, Stream::Stderr);
        }
        message::push_exit_code(&mut self.bytes, code);
    }

    /// Sends what fits. Returns whether anything was taken.
    pub(super) fn send<S: ByteStream>(&mut self, stream: &mut S) -> Result<bool, StreamError> {
        self.open = None;
        let mut moved = false;
        loop {
            let rest = self.bytes.get(self.sent..).unwrap_or_default();
            if rest.is_empty() {
                // Shrunk, so that an idle call does not keep the room of its largest output.
                self.bytes = Vec::new();
                self.sent = 0;
                return Ok(moved);
            }
            let written = stream.write(rest)?;
            if written == 0 {
                return Ok(moved);
            }
            moved = true;
            self.sent = self.sent.saturating_add(written);
        }
    }

    /// Appends bytes of a stream; false when not all of them had room.
    fn append(&mut self, stream: Stream, mut bytes: &[u8], limit: usize) -> bool {
        if self.silent {
            return true;
        }
        while !bytes.is_empty() {
            let at = match self.open {
                Some((open, at))
                    if open == stream && self.bytes.len().saturating_sub(at) < HEADER + CHUNK =>
                {
                    at
                }
                _ => {
                    let at = self.bytes.len();
                    message::push_data_header(&mut self.bytes, stream);
                    self.open = Some((stream, at));
                    at
                }
            };
            let begin = at.saturating_add(HEADER);
            let in_chunk = (begin + CHUNK).saturating_sub(self.bytes.len());
            let room = limit.saturating_sub(self.bytes.len()).min(in_chunk);
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.bytes.extend_from_slice(now);
            let len = self.bytes.len().saturating_sub(begin);
            if len == 0 {
                // A message without bytes would end the stream.
                self.bytes.truncate(at);
                self.open = None;
            } else {
                message::set_len(&mut self.bytes, at, len);
            }
            if now.is_empty() {
                self.lost = self
                    .lost
                    .saturating_add(u64::try_from(later.len()).unwrap_or(u64::MAX));
                return false;
            }
            bytes = later;
        }
        true
    }

    /// Appends a line to the caller's standard error from the reserve, for the agent itself.
    pub(super) fn note(&mut self, text: &str) {
        self.append(Stream::Stderr, text.as_bytes(), OUTPUT_MAX);
        self.append(Stream::Stderr, b"\n", OUTPUT_MAX);
    }
}

/// Writes to one of the two streams.
#[derive(Debug)]
pub struct Writer<'a> {
    output: &'a mut Output,
    stream: Stream,
}

impl fmt::Write for Writer<'_> {
    /// Fails once bytes are lost, so that whoever renders a long table can stop.
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let limit = OUTPUT_MAX - RESERVE;
        if self.output.append(self.stream, text.as_bytes(), limit) {
            Ok(())
        } else {
            Err(fmt::Error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vchan::pipes::pipes;
    use core::fmt::Write;

    fn wire(output: &mut Output) -> Vec<u8> {
        let (mut far, mut near) = pipes(1 << 20);
        output.send(&mut near).unwrap();
        far.take()
    }

    #[test]
    fn r9_both_streams_end_before_the_exit_code() {
        let mut output = Output::new(false);
        output.stdout().write_str("o").unwrap();
        output.stdout().write_str("k").unwrap();
        output.stderr().write_str("!").unwrap();
        output.finish(5);
        assert_eq!(
            wire(&mut output),
            [
                &[0x91, 1, 0, 0, 2, 0, 0, 0][..],
                b"ok",
                &[0x92, 1, 0, 0, 1, 0, 0, 0],
                b"!",
                &[0x91, 1, 0, 0, 0, 0, 0, 0],
                &[0x92, 1, 0, 0, 0, 0, 0, 0],
                &[0x93, 1, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0],
            ]
            .concat()
        );
    }

    #[test]
    fn a_silent_answer_is_the_exit_code_alone() {
        let mut output = Output::new(true);
        output.stdout().write_str("nobody reads this").unwrap();
        output.note("nor this");
        output.finish(0);
        assert_eq!(wire(&mut output), [0x93, 1, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn writing_nothing_does_not_end_the_stream() {
        let mut output = Output::new(false);
        output.stdout().write_str("").unwrap();
        assert!(wire(&mut output).is_empty());
    }

    #[test]
    fn output_beyond_the_room_is_lost_and_counted() {
        let mut output = Output::new(false);
        let room = output.room();
        assert!(output.stdout().write_str(&"x".repeat(room)).is_ok());
        assert!(output.stdout().write_str(&"y".repeat(OUTPUT_MAX)).is_err());
        assert!(output.lost() > 0);
        output.note("cut");
        output.finish(0);
        let bytes = wire(&mut output);
        assert!(bytes.len() <= OUTPUT_MAX);
        let mut rest = &bytes[..];
        let mut total = 0u64;
        let mut noted = false;
        while !rest.is_empty() {
            let len = usize::try_from(u32::from_le_bytes(rest[4..8].try_into().unwrap())).unwrap();
            assert!(len <= CHUNK);
            total += if rest[0] == 0x91 {
                u64::try_from(len).unwrap()
            } else {
                0
            };
            noted |= &rest[8..8 + len] == b"cut\n";
            rest = &rest[8 + len..];
        }
        assert_eq!(
            total + output.lost(),
            u64::try_from(room + OUTPUT_MAX).unwrap()
        );
        assert!(noted, "the reserve is for the note");
    }

    #[test]
    fn a_message_that_was_sent_does_not_grow() {
        let (mut far, mut near) = pipes(1 << 20);
        let mut output = Output::new(false);
        output.stdout().write_str("a").unwrap();
        output.send(&mut near).unwrap();
        output.stdout().write_str("b").unwrap();
        output.send(&mut near).unwrap();
        assert_eq!(
            far.take(),
            b"\x91\x01\0\0\x01\0\0\0a\x91\x01\0\0\x01\0\0\0b"
        );
    }
}
