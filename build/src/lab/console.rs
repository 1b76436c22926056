//! The PV console of a domain, as a transcript that can be waited on.
//!
//! Positions count all bytes since the console was opened, so they stay valid
//! although only the last [`KEPT`] bytes are kept.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use lab_agent::protocol::{MAX_PIECE, Request};

use super::link::Link;

/// How many bytes of a transcript are kept.
const KEPT: usize = 4 << 20;

#[derive(Debug, Default)]
struct Transcript {
    bytes: VecDeque<u8>,
    /// Position of the first byte that is kept.
    start: usize,
    closed: bool,
}

impl Transcript {
    fn end(&self) -> usize {
        self.start.saturating_add(self.bytes.len())
    }

    fn text_from(&self, position: usize) -> String {
        let skip = position.saturating_sub(self.start);
        let bytes: Vec<u8> = self.bytes.iter().skip(skip).copied().collect();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }
}

#[derive(Debug)]
struct Shared {
    domid: u32,
    transcript: Mutex<Transcript>,
    changed: Condvar,
    link: Link,
}

/// A handle to a console; clones share it.
#[derive(Debug, Clone)]
pub struct Console(Arc<Shared>);

impl Console {
    /// A console whose bytes travel by `link` (the one to dom0).
    #[must_use]
    pub fn new(domid: u32, link: Link) -> Self {
        Self(Arc::new(Shared {
            domid,
            transcript: Mutex::default(),
            changed: Condvar::new(),
            link,
        }))
    }

    /// Takes bytes that the domain wrote; none means that it is gone.
    pub fn feed(&self, bytes: &[u8]) {
        let mut transcript = self.lock();
        if bytes.is_empty() {
            transcript.closed = true;
        }
        transcript.bytes.extend(bytes);
        let surplus = transcript.bytes.len().saturating_sub(KEPT);
        transcript.bytes.drain(..surplus);
        transcript.start = transcript.start.saturating_add(surplus);
        drop(transcript);
        self.0.changed.notify_all();
    }

    /// Types bytes.
    ///
    /// # Errors
    ///
    /// If the channel to dom0 is gone.
    pub fn send(&self, bytes: &[u8]) -> Result<()> {
        for piece in bytes.chunks(MAX_PIECE) {
            self.0.link.send(&Request::Send {
                domid: self.0.domid,
                bytes: piece.to_vec(),
            })?;
        }
        Ok(())
    }

    /// Types a line and returns the position before its answer.
    ///
    /// # Errors
    ///
    /// If the channel to dom0 is gone.
    pub fn send_line(&self, line: &str) -> Result<usize> {
        let position = self.position();
        self.send(format!("{line}\n").as_bytes())?;
        Ok(position)
    }

    /// The position after everything written so far.
    #[must_use]
    pub fn position(&self) -> usize {
        self.lock().end()
    }

    /// Whether the domain's console has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// The text since a position, without carriage returns.
    #[must_use]
    pub fn text_from(&self, position: usize) -> String {
        self.lock().text_from(position)
    }

    /// Waits until `find` sees what it wants in the text since `position`.
    ///
    /// # Errors
    ///
    /// If the time is over or the domain is gone; the error quotes the last lines.
    pub fn wait<T>(
        &self,
        position: usize,
        timeout: Duration,
        what: &str,
        mut find: impl FnMut(&str) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + timeout;
        let mut transcript = self.lock();
        loop {
            let text = transcript.text_from(position);
            if let Some(found) = find(&text) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if transcript.closed || left.is_zero() {
                let why = if transcript.closed {
                    "the domain ended"
                } else {
                    "in vain"
                };
                bail!(
                    "waited for {what}, {why}; its console says last:\n{}",
                    last_lines(&text, 20)
                );
            }
            (transcript, _) = self
                .0
                .changed
                .wait_timeout(transcript, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until the text since `position` contains `needle`.
    ///
    /// # Errors
    ///
    /// As [`Console::wait`].
    pub fn wait_for(&self, position: usize, timeout: Duration, needle: &str) -> Result<String> {
        self.wait(position, timeout, &format!("{needle:?}"), |text| {
            text.contains(needle).then(|| text.to_owned())
        })
    }

    fn lock(&self) -> MutexGuard<'_, Transcript> {
        self.0
            .transcript
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last `count` lines of a text.
#[must_use]
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines
        .get(lines.len().saturating_sub(count)..)
        .unwrap_or_default()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console() -> Console {
        Console::new(3, Link::new("test", |_| Ok(())))
    }

    #[test]
    fn a_wait_sees_only_what_comes_after_its_position() {
        let console = console();
        console.feed(b"ready\r\n");
        let position = console.position();
        assert!(console.wait_for(position, Duration::ZERO, "ready").is_err());
        console.feed(b"ready again\r\n");
        assert_eq!(
            console.wait_for(position, Duration::ZERO, "ready").unwrap(),
            "ready again\n"
        );
    }

    #[test]
    fn positions_survive_the_loss_of_old_bytes() {
        let console = console();
        console.feed(&vec![b'x'; KEPT]);
        let position = console.position();
        console.feed(b"end");
        assert_eq!(console.text_from(position), "end");
        assert_eq!(console.text_from(0).len(), KEPT);
    }

    #[test]
    fn a_wait_ends_with_the_domain() {
        let console = console();
        console.feed(b"panic: no memory\n");
        console.feed(b"");
        let error = console
            .wait_for(0, Duration::from_secs(100), "ready")
            .unwrap_err();
        assert!(error.to_string().contains("panic: no memory"));
    }
}
