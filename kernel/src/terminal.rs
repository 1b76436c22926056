//! The PV console as a terminal: lines in, text out, never waiting for the reader.
//!
//! Output is queued in bounded memory and moved to the ring as dom0 empties it; what does not fit the
//! queue is dropped whole and counted, so that a stalled console daemon costs nothing but its own text.
//! Input is edited only as far as needed (backspace, end of line); other control characters are ignored.

use alloc::collections::VecDeque;

use xen::stream::{ByteStream, StreamError};

/// Bytes of output waiting for the ring, at most.
pub const QUEUE_BYTES: usize = 64 * 1024;
/// Bytes of one input line, at most; a longer one is thrown away whole.
pub const INPUT_BYTES: usize = 256;

/// An input line: printable ASCII without its end.
pub type InputLine = heapless::String<INPUT_BYTES>;

/// A line-oriented terminal over a byte stream.
pub struct Terminal {
    output: VecDeque<u8>,
    input: InputLine,
    /// The current input line was too long and is being skipped.
    skipping: bool,
    dropped_bytes: u64,
}

impl Default for Terminal {
    fn default() -> Self {
        Self::new()
    }
}

impl Terminal {
    /// An empty terminal. Its queue is allocated as output comes, never beyond [`QUEUE_BYTES`].
    #[must_use]
    pub const fn new() -> Self {
        Self {
            output: VecDeque::new(),
            input: InputLine::new(),
            skipping: false,
            dropped_bytes: 0,
        }
    }

    /// Bytes of output that found no room.
    #[must_use]
    pub const fn dropped_bytes(&self) -> u64 {
        self.dropped_bytes
    }

    /// Bytes of output that the queue has room for.
    #[must_use]
    pub fn room(&self) -> usize {
        QUEUE_BYTES.saturating_sub(self.output.len())
    }

    /// Queues one line of text and its end (carriage return and line feed), or drops it whole.
    pub fn print_line(&mut self, line: &str) {
        if line.len().saturating_add(2) > self.room() {
            self.dropped_bytes = self
                .dropped_bytes
                .saturating_add(u64::try_from(line.len()).unwrap_or(u64::MAX));
            return;
        }
        self.output.extend(line.bytes());
        self.output.extend(*b"\r\n");
    }

    /// Moves queued output into the stream and reads input. Calls `on_line` for each line that ended.
    ///
    /// At most [`INPUT_BYTES`] bytes of input are read in one call.
    ///
    /// # Errors
    ///
    /// The stream's; queued output stays.
    pub fn pump(
        &mut self,
        stream: &mut impl ByteStream,
        mut on_line: impl FnMut(&str),
    ) -> Result<(), StreamError> {
        self.flush(stream)?;
        let mut bytes = [0u8; INPUT_BYTES];
        let count = stream.read(&mut bytes)?;
        for byte in bytes.get(..count).unwrap_or_default() {
            match *byte {
                b'\r' | b'\n' => {
                    if !self.skipping && !self.input.is_empty() {
                        on_line(&self.input);
                    }
                    self.input.clear();
                    self.skipping = false;
                }
                0x08 | 0x7f => {
                    self.input.pop();
                }
                b' '..=b'~' => self.skipping |= self.input.push(char::from(*byte)).is_err(),
                _ => {}
            }
        }
        Ok(())
    }

    /// Moves queued output into the stream as far as it takes it.
    ///
    /// # Errors
    ///
    /// The stream's; what was not taken stays queued.
    pub fn flush(&mut self, stream: &mut impl ByteStream) -> Result<(), StreamError> {
        while !self.output.is_empty() {
            let (first, _) = self.output.as_slices();
            let taken = stream.write(first)?;
            if taken == 0 {
                break;
            }
            for _ in 0..taken.min(self.output.len()) {
                self.output.pop_front();
            }
        }
        Ok(())
    }

    /// Whether output waits for the reader.
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::{String, ToString};
    use alloc::vec::Vec;

    struct Pipe {
        input: VecDeque<u8>,
        output: Vec<u8>,
        room: usize,
    }

    impl ByteStream for Pipe {
        fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
            let count = buffer.len().min(self.input.len());
            for byte in &mut buffer[..count] {
                *byte = self.input.pop_front().unwrap();
            }
            Ok(count)
        }
        fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError> {
            let count = bytes.len().min(self.room);
            self.output.extend(&bytes[..count]);
            self.room -= count;
            Ok(count)
        }
    }

    fn pipe(input: &[u8], room: usize) -> Pipe {
        Pipe {
            input: input.iter().copied().collect(),
            output: Vec::new(),
            room,
        }
    }

    fn lines(terminal: &mut Terminal, pipe: &mut Pipe) -> Vec<String> {
        let mut lines = Vec::new();
        while !pipe.input.is_empty() {
            terminal
                .pump(pipe, |line| lines.push(line.to_string()))
                .unwrap();
        }
        lines
    }

    #[test]
    fn lines_are_split_edited_and_cleaned() {
        let mut pipe = pipe(b"status\r\n\ndrox\x08ps\n\x1bhelp\r", 0);
        assert_eq!(
            lines(&mut Terminal::new(), &mut pipe),
            ["status", "drops", "help"]
        );
    }

    #[test]
    fn an_overlong_line_is_skipped_and_the_next_one_works() {
        let mut input = Vec::from([b'a'; 3 * INPUT_BYTES]);
        input.extend(b"\nhelp\n");
        assert_eq!(lines(&mut Terminal::new(), &mut pipe(&input, 0)), ["help"]);
    }

    #[test]
    fn m3_output_waits_for_room_and_a_full_queue_drops_whole_lines() {
        let mut terminal = Terminal::new();
        let mut pipe = pipe(b"", 5);
        terminal.print_line("hello world");
        terminal.flush(&mut pipe).unwrap();
        assert_eq!(pipe.output, b"hello");
        pipe.room = 100;
        terminal.flush(&mut pipe).unwrap();
        assert_eq!(pipe.output, b"hello world\r\n");

        let line = "x".repeat(1022);
        for _ in 0..65 {
            terminal.print_line(&line);
        }
        assert_eq!(terminal.room(), 0);
        assert_eq!(terminal.dropped_bytes(), 1022);
    }
}
