//! The line protocol between the host and the helper program.
//!
//! Every message is one line of printable ASCII that contains the marker `@@`.
//! Text around it does no harm: a guest's port is its console, so kernel
//! messages may stand between two messages or even before one in the same
//! line. Payload is escaped (commands, output) or base64 (files, console
//! bytes), so both directions are byte-exact.
//!
//! ```text
//! host  -> @@PING <id>
//! host  -> @@RUN <id> <timeout s> <command, escaped>
//! host  -> @@KILL <id>
//! host  -> @@PUT <id> <octal mode> <path, escaped>   @@DATA <id> <base64>   @@DONE <id>
//! host  -> @@OPEN <domid> <tty path>   @@SEND <domid> <base64>
//! agent -> @@READY <name>
//! agent -> @@PONG <id>
//! agent -> @@OUT <id> <chunk, escaped>
//! agent -> @@END <id> <exit code | timeout | killed> <ms of guest time>
//! agent -> @@CON <domid> <base64>
//! ```
//!
//! `@@RUN` does not block: several commands run at once, told apart by their
//! id, which the host never uses twice. `@@OPEN` makes the agent in dom0 a
//! relay to the console of another domain; opening one twice changes nothing, so
//! a host that comes back after a snapshot simply opens it again. An empty
//! `@@CON` says that the console is gone with its domain.
//!
//! Bounds: the host keeps a line below [`MAX_LINE`] bytes; a longer one is
//! thrown away by [`LineAssembler`], so a wild console cannot fill memory.
//! A message that does not parse is `None`, never an error that stops the
//! stream.

use std::fmt::{self, Write as _};

use data_encoding::BASE64;

/// Longest line in bytes, without the line end, that either side accepts.
pub const MAX_LINE: usize = 256 * 1024;

/// Largest piece of a file, in bytes, that one `@@DATA` or `@@SEND` line carries.
pub const MAX_PIECE: usize = 36 * 1024;

/// Exit code reported for a command that had to be killed at its timeout.
pub const CODE_TIMEOUT: i32 = 124;

/// Exit code reported for a command that the host asked to kill.
pub const CODE_KILLED: i32 = 137;

/// What the host asks of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Are you there? Answered by [`Reply::Pong`] with the same number.
    Ping(u64),
    /// Runs a shell command.
    Run {
        /// Number of the job, chosen by the host.
        id: u64,
        /// Seconds after which the command's process group is killed.
        timeout_s: u64,
        /// Text for `/bin/sh -c`.
        command: String,
    },
    /// Kills the process group of a job.
    Kill(u64),
    /// Begins a file; it replaces `path` when [`Request::Done`] arrives.
    Put {
        /// Number of the job, chosen by the host.
        id: u64,
        /// Permission bits.
        mode: u32,
        /// Absolute path.
        path: String,
    },
    /// The next piece of a file.
    Data {
        /// Number given with [`Request::Put`].
        id: u64,
        /// At most [`MAX_PIECE`] bytes.
        bytes: Vec<u8>,
    },
    /// Ends a file.
    Done(u64),
    /// Starts relaying the console of a domain.
    Open {
        /// The domain.
        domid: u32,
        /// Its pty in dom0.
        tty: String,
    },
    /// Types bytes on a relayed console.
    Send {
        /// The domain.
        domid: u32,
        /// At most [`MAX_PIECE`] bytes.
        bytes: Vec<u8>,
    },
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The shell's exit code; 128 plus the signal number when a signal ended it.
    Code(i32),
    /// Killed by the agent at the timeout.
    Timeout,
    /// Killed because the host asked.
    Killed,
}

impl Exit {
    /// The exit code, with the customary numbers for a killed command.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Timeout => CODE_TIMEOUT,
            Self::Killed => CODE_KILLED,
        }
    }
}

/// What an agent says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// The agent has started.
    Ready(String),
    /// Answer to [`Request::Ping`].
    Pong(u64),
    /// Output of a job, both streams merged, in pieces that need not be lines.
    Out {
        /// Number of the job.
        id: u64,
        /// The bytes as the command wrote them.
        bytes: Vec<u8>,
    },
    /// The last message of a job.
    End {
        /// Number of the job.
        id: u64,
        /// How it ended.
        exit: Exit,
        /// Milliseconds it took by the guest's own clock.
        guest_ms: u64,
    },
    /// Output of a relayed console.
    Console {
        /// The domain.
        domid: u32,
        /// The bytes as the domain wrote them.
        bytes: Vec<u8>,
    },
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ping(id) => write!(f, "@@PING {id}"),
            Self::Run {
                id,
                timeout_s,
                command,
            } => {
                write!(f, "@@RUN {id} {timeout_s} {}", escape(command.as_bytes()))
            }
            Self::Kill(id) => write!(f, "@@KILL {id}"),
            Self::Put { id, mode, path } => {
                write!(f, "@@PUT {id} {mode:o} {}", escape(path.as_bytes()))
            }
            Self::Data { id, bytes } => write!(f, "@@DATA {id} {}", BASE64.encode(bytes)),
            Self::Done(id) => write!(f, "@@DONE {id}"),
            Self::Open { domid, tty } => write!(f, "@@OPEN {domid} {tty}"),
            Self::Send { domid, bytes } => write!(f, "@@SEND {domid} {}", BASE64.encode(bytes)),
        }
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready(name) => write!(f, "@@READY {name}"),
            Self::Pong(id) => write!(f, "@@PONG {id}"),
            Self::Out { id, bytes } => write!(f, "@@OUT {id} {}", escape(bytes)),
            Self::End { id, exit, guest_ms } => match exit {
                Exit::Code(code) => write!(f, "@@END {id} {code} {guest_ms}"),
                Exit::Timeout => write!(f, "@@END {id} timeout {guest_ms}"),
                Exit::Killed => write!(f, "@@END {id} killed {guest_ms}"),
            },
            Self::Console { domid, bytes } => write!(f, "@@CON {domid} {}", BASE64.encode(bytes)),
        }
    }
}

impl Request {
    /// Finds a request in a line; `None` if there is none or it is damaged.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let (verb, rest) = message(line)?;
        let (number, tail) = split_word(rest);
        let id: u64 = number.parse().ok()?;
        let domid = || u32::try_from(id).ok();
        Some(match verb {
            "PING" => Self::Ping(id),
            "RUN" => {
                let (timeout, command) = split_word(tail);
                Self::Run {
                    id,
                    timeout_s: timeout.parse().ok()?,
                    command: String::from_utf8(unescape(command)).ok()?,
                }
            }
            "KILL" => Self::Kill(id),
            "PUT" => {
                let (mode, path) = split_word(tail);
                Self::Put {
                    id,
                    mode: u32::from_str_radix(mode, 8).ok()?,
                    path: String::from_utf8(unescape(path)).ok()?,
                }
            }
            "DATA" => Self::Data {
                id,
                bytes: BASE64.decode(tail.as_bytes()).ok()?,
            },
            "DONE" => Self::Done(id),
            "OPEN" => Self::Open {
                domid: domid()?,
                tty: tail.to_owned(),
            },
            "SEND" => Self::Send {
                domid: domid()?,
                bytes: BASE64.decode(tail.as_bytes()).ok()?,
            },
            _ => return None,
        })
    }
}

impl Reply {
    /// Finds a reply in a line; `None` if there is none or it is damaged.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let (verb, rest) = message(line)?;
        if verb == "READY" {
            return Some(Self::Ready(rest.to_owned()));
        }
        let (number, tail) = split_word(rest);
        let id: u64 = number.parse().ok()?;
        Some(match verb {
            "PONG" => Self::Pong(id),
            "OUT" => Self::Out {
                id,
                bytes: unescape(tail),
            },
            "END" => {
                let (exit, ms) = split_word(tail);
                let exit = match exit {
                    "timeout" => Exit::Timeout,
                    "killed" => Exit::Killed,
                    code => Exit::Code(code.parse().ok()?),
                };
                Self::End {
                    id,
                    exit,
                    guest_ms: ms.parse().ok()?,
                }
            }
            "CON" => Self::Console {
                domid: u32::try_from(id).ok()?,
                bytes: BASE64.decode(tail.as_bytes()).ok()?,
            },
            _ => return None,
        })
    }
}

/// Verb and rest of the last message in a line.
///
/// The last one, because a guest that was interrupted while writing leaves a
/// torn message before the whole one.
fn message(line: &str) -> Option<(&str, &str)> {
    let start = line.rfind("@@")?;
    Some(split_word(line.get(start.checked_add(2)?..)?))
}

fn split_word(text: &str) -> (&str, &str) {
    text.split_once(' ').unwrap_or((text, ""))
}

/// Turns bytes into printable ASCII without the marker.
///
/// Backslash, control characters, bytes above 126 and the second of two `@`
/// become `\xNN` (newline `\n`), everything else stays readable.
#[must_use]
pub fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let mut previous = 0;
    for &byte in bytes {
        match byte {
            b'\n' => text.push_str("\\n"),
            b'\\' => text.push_str("\\\\"),
            b'@' if previous == b'@' => text.push_str("\\x40"),
            0x20..=0x7e => text.push(char::from(byte)),
            other => {
                // Writing to a String cannot fail.
                let _ = write!(text, "\\x{other:02x}");
            }
        }
        previous = byte;
    }
    text
}

/// The inverse of [`escape`]; an unknown escape is kept as it stands.
#[must_use]
pub fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let (byte, used) = match (first, tail) {
            (b'\\', [b'n', ..]) => (b'\n', 1),
            (b'\\', [b'\\', ..]) => (b'\\', 1),
            (b'\\', [b'x', high, low, ..]) => match (hex(*high), hex(*low)) {
                (Some(high), Some(low)) => (high << 4 | low, 3),
                _ => (first, 0),
            },
            _ => (first, 0),
        };
        bytes.push(byte);
        rest = tail.get(used..).unwrap_or_default();
    }
    bytes
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|value| u8::try_from(value).ok())
}

/// Cuts a byte stream into lines, tolerating carriage returns.
#[derive(Debug, Default)]
pub struct LineAssembler {
    partial: Vec<u8>,
    overlong: bool,
}

impl LineAssembler {
    /// Takes the next bytes and hands every completed line to `each`.
    ///
    /// Bytes that are not UTF-8 become replacement characters; messages are
    /// ASCII, so only foreign text is affected. A line longer than
    /// [`MAX_LINE`] is dropped whole.
    pub fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(&str)) {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            let (body, complete) = match piece.split_last() {
                Some((b'\n', body)) => (body, true),
                _ => (piece, false),
            };
            if self.partial.len().saturating_add(body.len()) > MAX_LINE {
                self.overlong = true;
                self.partial.clear();
            } else if !self.overlong {
                self.partial.extend_from_slice(body);
            }
            if complete {
                if !self.overlong {
                    let line = String::from_utf8_lossy(&self.partial);
                    each(line.trim_end_matches('\r'));
                }
                self.partial.clear();
                self.overlong = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaped_bytes_come_back_unchanged_and_never_hold_the_marker() {
        let all: Vec<u8> = (0..=255).chain(*b"@@END 1 0 0\n@@@").collect();
        let text = escape(&all);
        assert!(text.bytes().all(|byte| (0x20..0x7f).contains(&byte)));
        assert!(!text.contains("@@"));
        assert_eq!(unescape(&text), all);
    }

    #[test]
    fn requests_survive_the_line() {
        let requests = [
            Request::Ping(7),
            Request::Run {
                id: 1,
                timeout_s: 30,
                command: "echo a\necho 'b  c'".into(),
            },
            Request::Kill(1),
            Request::Put {
                id: 3,
                mode: 0o755,
                path: "/tmp/a b".into(),
            },
            Request::Data {
                id: 3,
                bytes: vec![0, 255, 10],
            },
            Request::Done(3),
            Request::Open {
                domid: 2,
                tty: "/dev/pts/1".into(),
            },
            Request::Send {
                domid: 2,
                bytes: b"status\n".to_vec(),
            },
        ];
        for request in requests {
            assert_eq!(Request::parse(&request.to_string()), Some(request));
        }
    }

    #[test]
    fn replies_survive_the_line_and_kernel_noise_before_it() {
        let replies = [
            Reply::Ready("c1".into()),
            Reply::Pong(9),
            Reply::Out {
                id: 4,
                bytes: b"\x1b[1mhi\xff\n".to_vec(),
            },
            Reply::End {
                id: 4,
                exit: Exit::Code(0),
                guest_ms: 12,
            },
            Reply::End {
                id: 4,
                exit: Exit::Timeout,
                guest_ms: 9000,
            },
            Reply::End {
                id: 4,
                exit: Exit::Killed,
                guest_ms: 1,
            },
            Reply::Console {
                domid: 5,
                bytes: b"boot\r\n".to_vec(),
            },
        ];
        for reply in replies {
            let noisy = format!("[    1.25] random: crng init done {reply}");
            assert_eq!(Reply::parse(&noisy), Some(reply));
        }
    }

    #[test]
    fn foreign_lines_are_no_messages() {
        for line in [
            "",
            "@@",
            "@@END",
            "@@END x 0 0",
            "@@END 1 zero 0",
            "hello",
            "@@CON 1 %%%",
        ] {
            assert_eq!(Reply::parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn lines_are_assembled_across_reads_and_overlong_ones_are_dropped() {
        let mut assembler = LineAssembler::default();
        let mut lines = Vec::new();
        assembler.feed(b"one\r\ntw", |line| lines.push(line.to_owned()));
        assembler.feed(b"o\n", |line| lines.push(line.to_owned()));
        assembler.feed(&vec![b'x'; MAX_LINE + 1], |line| {
            lines.push(line.to_owned())
        });
        assembler.feed(b"tail\nthree\n", |line| lines.push(line.to_owned()));
        assert_eq!(lines, ["one", "two", "three"]);
    }
}
