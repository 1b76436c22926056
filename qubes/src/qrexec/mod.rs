//! qrexec: the agent through which dom0 runs commands and services in this qube.
//!
//! # Shape
//!
//! | module | what |
//! | --- | --- |
//! | [`message`] | headers and the messages that we send; what ends dom0's daemon cannot be built |
//! | [`frames`] | the byte stream cut into pieces of messages, in bounded memory |
//! | [`cmdline`] | the grammar of the command line |
//! | [`words`] | a shell line, or a `VMExec` argument, as words |
//! | [`service`] | which service wants what |
//! | [`date`] | the time text of one service |
//! | [`output`] | a call's output, framed and bounded |
//! | [`call`] | one incoming call on its data channel |
//! | [`outgoing`] | the one call that we make |
//! | [`agent`] | the control channel, and all calls together |
//!
//! What a command does is behind [`Host`].
//!
//! # Trust
//!
//! The control channel is dom0's; what it says was checked by policy. A data channel may lead to another qube, which can
//! spoil its own call only. dom0's daemon in turn survives little: it dies of a port outside 513..=768, of a message
//! that does not fit a ring, of types out of place. It also loses one of 256 slots for good when a call gets no
//! [`CONNECTION_TERMINATED`](message::Terminated), so every call gets exactly one.
//!
//! # Bounds
//!
//! [`agent::CALLS_MAX`] calls at once and [`agent::WAITING_MAX`] waiting, each with at most [`output::OUTPUT_MAX`]
//! bytes of output and [`call::LINE_MAX`] of input. A reader that stopped reading loses its call after
//! [`call::STALLED`].
//!
//! Source: QubesOS core-qrexec `libqrexec/qrexec.h`, `agent/*`, `daemon/*`.

pub mod agent;
pub mod call;
pub mod cmdline;
pub mod date;
pub mod frames;
pub mod message;
pub mod outgoing;
pub mod output;
pub mod service;
pub mod words;

pub use agent::{Agent, Counters};
pub use outgoing::{Answer, CallError};
pub use output::Output;

/// The vchan port of the control channel, with us as the server and dom0 as the client.
pub const PORT: u32 = 512;

/// The protocol version that we announce. dom0 of R4.3 echoes whatever we say, and a version 4 agent's messages
/// would end the daemon of R4.2, so the version that both speak.
pub const VERSION: u32 = 3;

/// The oldest version of a peer that we talk to.
pub const VERSION_OLDEST: u32 = 2;

/// Exit codes with a meaning of their own.
pub mod exit {
    /// Done.
    pub const OK: u8 = 0;
    /// The command was called the wrong way.
    pub const USAGE: u8 = 2;
    /// Not now: what was waited for did not come.
    pub const NOT_YET: u8 = 3;
    /// The call cannot be run, e.g. because its command line is malformed.
    pub const CANNOT_RUN: u8 = 125;
    /// Refused.
    pub const REFUSED: u8 = 126;
    /// No such service or command.
    pub const UNKNOWN: u8 = 127;
}

/// A command as a call brought it.
#[derive(Clone, Copy, Debug)]
pub struct Command<'a> {
    /// The words, at least one.
    pub words: &'a [&'a str],
    /// 0 at first, then what the last [`Step::Again`] said.
    pub cursor: u64,
}

/// What a command did in one step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// It is over, with this exit code.
    Exit(u8),
    /// It has more to say. It is called again with this cursor once the caller has taken the output so far.
    Again(u64),
}

/// Where the uplink stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Uplink {
    /// There is none: no netvm.
    Absent,
    /// There is one that is not connected yet.
    Connecting,
    /// Connected.
    Connected,
}

/// What calls act on: implemented by the kernel.
pub trait Host {
    /// Runs one step of a command. It must not wait; what it writes beyond the room in `out` is lost.
    ///
    /// Unknown commands: one line on stderr and [`exit::UNKNOWN`]. Wrong use: one line on stderr and [`exit::USAGE`].
    fn run(&mut self, command: &Command<'_>, out: &mut Output) -> Step;

    /// Where the uplink stands.
    fn uplink(&self) -> Uplink;

    /// The computer is about to sleep. Nothing essential may stop.
    fn suspending(&mut self);

    /// The computer has slept: clocks may have jumped, timers want a refresh.
    fn resumed(&mut self);

    /// Somebody in dom0 says that it is this many seconds after 1970 (UTC).
    fn told_time(&mut self, unix_seconds: i64);
}

#[cfg(test)]
mod traces;
