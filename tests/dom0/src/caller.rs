//! The dom0 side of one call into the VM: what `qrexec-client` does on the data channel, of which it is the server.
//!
//! Checks the order in which the VM speaks; anything out of place is a [`Violation`].

use std::fmt;
use std::time::Duration;

use qubes::vchan::{Channels, Phase};
use xen::Time;
use xen::stream::ByteStream;

use crate::wire::{qrexec, qrexec_message, take_qrexec, word};

/// How long `qrexec-client` waits for the VM to connect.
pub const CONNECT_WAIT: Duration = Duration::from_secs(5);

/// What the caller does with the service's input.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Input {
    /// Sends these bytes and ends the input.
    Closed(Vec<u8>),
    /// Sends these bytes and keeps the input open, like somebody at a terminal.
    Open(Vec<u8>),
}

/// A call to make.
#[derive(Clone, Debug)]
pub struct Spec {
    /// `user:command` or `user:QUBESRPC service source`.
    pub line: String,
    /// Wants nothing but the exit code.
    pub just: bool,
    /// The input.
    pub input: Input,
    /// The version in the caller's greeting: 3 on R4.2, 4 on R4.3.
    pub version: u32,
    /// Reads no output before all input is written.
    pub writes_first: bool,
    /// Never reads what the service says.
    pub never_reads: bool,
    /// Closes after this many bytes of input were taken.
    pub leaves_after: Option<usize>,
}

impl Spec {
    /// An ordinary call with an open, empty input.
    #[must_use]
    pub fn new(line: &str) -> Self {
        Self {
            line: line.into(),
            just: false,
            input: Input::Open(Vec::new()),
            version: 4,
            writes_first: false,
            never_reads: false,
            leaves_after: None,
        }
    }

    /// The same with another input.
    #[must_use]
    pub fn with_input(self, input: Input) -> Self {
        Self { input, ..self }
    }

    /// The same without input and output.
    #[must_use]
    pub fn just(self) -> Self {
        Self { just: true, ..self }
    }
}

/// The VM said something out of place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Violation {
    /// Something came before a greeting, or the greeting is malformed or too old.
    Greeting,
    /// A message longer than the version allows.
    TooLong(usize),
    /// Output after the end of its stream.
    AfterEnd(u32),
    /// An exit code before both streams had ended.
    EarlyExitCode,
    /// An exit code that is not 4 bytes long.
    ExitCodeLength(usize),
    /// Anything after the exit code.
    AfterExitCode(u32),
    /// A type that a service does not send, or output although only the exit code was wanted.
    Type(u32),
    /// A message that was not whole when the channel was closed.
    Truncated,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "data channel: {self:?}")
    }
}

/// How a call ended for its caller.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The exit status that the caller sees: the lowest eight bits of the code.
    Exit(u8),
    /// The VM never connected: status 125 after five seconds.
    NeverConnected,
    /// The VM closed without an exit code: status 255.
    NoExitCode,
    /// The caller itself went away.
    Left,
}

/// The running call.
#[derive(Debug)]
pub struct Caller<C> {
    spec: Spec,
    channel: Option<C>,
    began: Time,
    connected_after: Option<Duration>,
    send: Vec<u8>,
    sent: usize,
    received: Vec<u8>,
    greeted: bool,
    ended: [bool; 2],
    code: Option<u8>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

/// What a call has produced.
#[derive(Clone, Debug)]
pub struct Report {
    /// The call.
    pub line: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Output.
    pub stdout: Vec<u8>,
    /// Error output.
    pub stderr: Vec<u8>,
    /// From the offer to the VM's connecting.
    pub connected_after: Option<Duration>,
    /// From the offer to the end.
    pub took: Duration,
    /// Bytes of input, with headers, that the VM's side took.
    pub input_taken: usize,
}

impl<C: ByteStream> Caller<C> {
    /// A caller whose channel is offered.
    pub fn new(spec: Spec, channel: C, now: Time) -> Self {
        let mut send = qrexec_message(qrexec::HELLO, &spec.version.to_le_bytes());
        if !spec.just {
            let (bytes, end) = match &spec.input {
                Input::Closed(bytes) => (bytes, true),
                Input::Open(bytes) => (bytes, false),
            };
            // The largest messages that the version allows, so that the VM must take them in pieces.
            for chunk in bytes.chunks(qrexec::DATA_MAX) {
                send.extend(qrexec_message(qrexec::STDIN, chunk));
            }
            if end {
                send.extend(qrexec_message(qrexec::STDIN, b""));
            }
        }
        Self {
            spec,
            channel: Some(channel),
            began: now,
            connected_after: None,
            send,
            sent: 0,
            received: Vec::new(),
            greeted: false,
            ended: [false; 2],
            code: None,
            stdout: Vec::new(),
            stderr: Vec::new(),
        }
    }

    /// The channel, to wait for it.
    pub const fn channel(&self) -> Option<&C> {
        self.channel.as_ref()
    }

    /// The channel, to close it.
    pub fn into_channel(self) -> Option<C> {
        self.channel
    }

    /// The VM says that the call is over: its last words, and the report.
    ///
    /// `None` when the channel is still open on the VM's side, which it must not be.
    ///
    /// # Errors
    ///
    /// [`Violation`].
    pub fn ended<N: Channels<Channel = C>>(
        &mut self,
        channels: &mut N,
    ) -> Result<Option<Report>, Violation> {
        let phase = match &mut self.channel {
            Some(channel) => channels.progress(channel),
            None => Phase::Closed,
        };
        match phase {
            Phase::Open => Ok(None),
            // It will not come any more; the caller would find out after five seconds.
            Phase::Opening => Ok(Some(self.close(channels, Outcome::NeverConnected))),
            Phase::Closed => self.poll(channels),
        }
    }

    /// Moves on; a report when the call is over for the caller.
    ///
    /// # Errors
    ///
    /// [`Violation`].
    pub fn poll<N: Channels<Channel = C>>(
        &mut self,
        channels: &mut N,
    ) -> Result<Option<Report>, Violation> {
        let now = channels.now();
        let Some(channel) = &mut self.channel else {
            return Ok(None);
        };
        if channels.progress(channel) == Phase::Opening {
            if now.since(self.began) < CONNECT_WAIT {
                return Ok(None);
            }
            return Ok(Some(self.close(channels, Outcome::NeverConnected)));
        }
        self.connected_after.get_or_insert(now.since(self.began));
        let rest = self.send.get(self.sent..).unwrap_or_default();
        // The VM may have closed already; what it said before still counts.
        self.sent += channel.write(rest).unwrap_or_default();
        if self
            .spec
            .leaves_after
            .is_some_and(|after| self.sent >= after.min(self.send.len()))
        {
            channels.flush(channel);
            return Ok(Some(self.close(channels, Outcome::Left)));
        }
        let waits =
            self.spec.never_reads || (self.spec.writes_first && self.sent < self.send.len());
        let mut over = false;
        if waits {
            over = channels.progress(channel) == Phase::Closed;
        } else {
            let mut buffer = [0; 4096];
            loop {
                match channel.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(read) => self
                        .received
                        .extend_from_slice(buffer.get(..read).unwrap_or_default()),
                    Err(_) => {
                        over = true;
                        break;
                    }
                }
            }
        }
        channels.flush(channel);
        while let Some((kind, payload)) = take_qrexec(&mut self.received) {
            self.take(kind, payload)?;
        }
        if !over {
            return Ok(None);
        }
        if !self.received.is_empty() && !waits {
            return Err(Violation::Truncated);
        }
        let outcome = self.code.map_or(Outcome::NoExitCode, Outcome::Exit);
        Ok(Some(self.close(channels, outcome)))
    }

    /// Closes on the caller's side.
    fn close<N: Channels<Channel = C>>(&mut self, channels: &mut N, outcome: Outcome) -> Report {
        if let Some(channel) = self.channel.take() {
            channels.close(channel);
        }
        Report {
            line: self.spec.line.clone(),
            outcome,
            stdout: core::mem::take(&mut self.stdout),
            stderr: core::mem::take(&mut self.stderr),
            connected_after: self.connected_after,
            took: channels.now().since(self.began),
            input_taken: self.sent,
        }
    }

    fn take(&mut self, kind: u32, payload: Vec<u8>) -> Result<(), Violation> {
        if !self.greeted {
            if kind != qrexec::HELLO || payload.len() != 4 || word(&payload, 0) < 2 {
                return Err(Violation::Greeting);
            }
            self.greeted = true;
            return Ok(());
        }
        if self.code.is_some() {
            return Err(Violation::AfterExitCode(kind));
        }
        let longest = if self.spec.version < 3 {
            4096
        } else {
            qrexec::DATA_MAX
        };
        if payload.len() > longest {
            return Err(Violation::TooLong(payload.len()));
        }
        let stream = match kind {
            qrexec::EXIT_CODE => {
                if payload.len() != 4 {
                    return Err(Violation::ExitCodeLength(payload.len()));
                }
                if !self.spec.just && self.ended != [true; 2] {
                    return Err(Violation::EarlyExitCode);
                }
                self.code = payload.first().copied();
                return Ok(());
            }
            _ if self.spec.just => return Err(Violation::Type(kind)),
            qrexec::STDOUT => 0,
            qrexec::STDERR => 1,
            _ => return Err(Violation::Type(kind)),
        };
        let Some(ended) = self.ended.get_mut(stream) else {
            return Err(Violation::Type(kind));
        };
        if *ended {
            return Err(Violation::AfterEnd(kind));
        }
        *ended = payload.is_empty();
        let all = if stream == 0 {
            &mut self.stdout
        } else {
            &mut self.stderr
        };
        all.extend(payload);
        Ok(())
    }
}
