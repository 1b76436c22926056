//! One incoming call on its data channel, of which we are the client.
//!
//! ```text
//! OPENING -> GREETING -> [ INPUT ] -> RUNNING -> ENDING: output, end of stdout, end of stderr, exit code -> close
//! ```
//!
//! We greet at once, because some callers wait for that. Input is read all the time and forgotten where nobody wants
//! it, so a caller that writes much before it reads is never stuck; and its end is never waited for, because a caller
//! at a terminal keeps it open.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;

use xen::Time;
use xen::stream::ByteStream;

use super::frames::{Frames, Piece};
use super::message::{DATA_MAX, Kind};
use super::output::Output;
use super::service::Plan;
use super::{Command, Host, Step, Uplink, VERSION_OLDEST, date, exit, words};
use crate::vchan::channels::{Activity, Channels, Phase};

/// How long a call may take until its channel is there. dom0 gives up after 5 seconds.
pub const CONNECT_WAIT: Duration = Duration::from_secs(10);
/// How long the peer's greeting may take.
pub const GREETING_WAIT: Duration = Duration::from_secs(10);
/// How long the first line of input may take. A call that waits holds a slot.
pub const INPUT_WAIT: Duration = Duration::from_secs(60);
/// How long the uplink may take to become connected; dom0 waits 10 seconds.
pub const UPLINK_WAIT: Duration = Duration::from_secs(3);
/// How soon an uplink that became connected is noticed; the host does not tell.
const UPLINK_LOOK: Duration = Duration::from_millis(50);
/// How long a caller may leave output unread before its call is given up.
pub const STALLED: Duration = Duration::from_secs(10);
/// The longest line of input in bytes.
pub const LINE_MAX: usize = 4096;
/// Input handled in one poll, in pieces of at most 2 KiB, so that others get their turn.
const PIECES_PER_POLL: u32 = 128;

/// How a call ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// With an exit code that was sent.
    Done(u8),
    /// The channel or its greeting never came.
    NeverCame,
    /// The caller closed, or broke the protocol.
    Lost,
    /// The caller stopped reading.
    Stalled,
}

/// What a poll came to.
#[derive(Clone, Copy, Debug)]
pub enum Progress {
    /// It goes on.
    Going(Activity),
    /// It is over; close the channel and report the end to dom0.
    Over(End),
}

#[derive(Debug)]
enum State {
    Opening {
        until: Time,
    },
    Greeting {
        until: Time,
        version: Vec<u8>,
    },
    Input {
        until: Time,
        line: Vec<u8>,
        wanted: Wanted,
    },
    AwaitingUplink {
        until: Time,
    },
    Running {
        words: Vec<String>,
        cursor: u64,
    },
    Ending(u8),
}

/// What the first line of input is for.
#[derive(Clone, Copy, Debug)]
enum Wanted {
    Command,
    Date,
}

/// An incoming call.
#[derive(Debug)]
pub struct Call<C> {
    channel: C,
    state: State,
    plan: Plan,
    frames: Frames,
    /// No more input comes, or none was promised.
    input_ended: bool,
    output: Output,
    /// When the caller took output last, or there was none.
    took_at: Time,
}

/// The message was not one that a caller may send.
struct Violation;

impl<C: ByteStream> Call<C> {
    /// A call whose channel was just looked for. `silent`: the caller wants an exit code and nothing else.
    pub fn new(channel: C, plan: Plan, silent: bool, now: Time) -> Self {
        Self {
            channel,
            state: State::Opening {
                until: now.plus(CONNECT_WAIT),
            },
            plan,
            frames: Frames::new(DATA_MAX),
            input_ended: silent,
            output: Output::new(silent),
            took_at: now,
        }
    }

    /// The channel, to close it.
    pub fn into_channel(self) -> C {
        self.channel
    }

    /// The channel, to learn its port.
    pub const fn channel(&self) -> &C {
        &self.channel
    }

    /// Output that was lost for want of room.
    pub const fn lost(&self) -> u64 {
        self.output.lost()
    }

    /// Moves the call on as far as possible.
    pub fn poll<N, H>(&mut self, channels: &mut N, host: &mut H) -> Progress
    where
        N: Channels<Channel = C>,
        H: Host,
    {
        let now = channels.now();
        let phase = channels.progress(&mut self.channel);
        if let State::Opening { until } = self.state {
            if phase == Phase::Opening {
                if now >= until {
                    return Progress::Over(End::NeverCame);
                }
                let next = Activity::at(channels.deadline(&self.channel));
                return Progress::Going(next.and(Activity::at(Some(until))));
            }
            self.output.greet();
            self.state = State::Greeting {
                until: now.plus(GREETING_WAIT),
                version: Vec::new(),
            };
        }
        let progress = self.work(now, host);
        channels.flush(&mut self.channel);
        progress
    }

    /// Reads, acts, writes.
    fn work<H: Host>(&mut self, now: Time, host: &mut H) -> Progress {
        let mut pieces = 0;
        while pieces < PIECES_PER_POLL {
            match self.frames.next(&mut self.channel) {
                Ok(Some(piece)) => {
                    let taken = take(&mut self.state, &mut self.input_ended, &piece);
                    if taken.is_err() {
                        return Progress::Over(End::Lost);
                    }
                }
                Ok(None) => break,
                Err(_) => return Progress::Over(End::Lost),
            }
            pieces += 1;
            // What follows the greeting or the line belongs to the next state.
            self.advance(now, host);
        }
        // Sent, acted, sent: a command that has more to say gets its next turn as soon as all is taken.
        for _ in 0..2 {
            self.advance(now, host);
            match self.output.send(&mut self.channel) {
                Ok(moved) if moved || self.output.is_empty() => self.took_at = now,
                Ok(_) => {}
                Err(_) => return Progress::Over(End::Lost),
            }
        }
        if let State::Ending(code) = self.state
            && self.output.is_empty()
        {
            return Progress::Over(End::Done(code));
        }
        if !self.output.is_empty() && now >= self.took_at.plus(STALLED) {
            return Progress::Over(End::Stalled);
        }
        if matches!(self.state, State::Greeting { until, .. } if now >= until) {
            return Progress::Over(End::NeverCame);
        }
        Progress::Going(Activity {
            more: pieces == PIECES_PER_POLL || self.has_work(),
            deadline: self.deadline(now),
        })
    }

    /// Whether the next poll finds something to do without an event.
    const fn has_work(&self) -> bool {
        matches!(self.state, State::Running { .. }) && self.output.is_empty()
    }

    fn deadline(&self, now: Time) -> Option<Time> {
        let of_state = match self.state {
            State::Opening { until }
            | State::Greeting { until, .. }
            | State::Input { until, .. } => Some(until),
            State::AwaitingUplink { until } => Some(until.min(now.plus(UPLINK_LOOK))),
            State::Running { .. } | State::Ending(_) => None,
        };
        let of_output = (!self.output.is_empty()).then(|| self.took_at.plus(STALLED));
        Activity::at(of_state).and(Activity::at(of_output)).deadline
    }

    /// Takes every step that needs no more input and no more room.
    fn advance<H: Host>(&mut self, now: Time, host: &mut H) {
        match &mut self.state {
            State::Greeting { version, .. } if version.len() == 4 => self.begin(now, host),
            State::Input {
                until,
                line,
                wanted,
            } => {
                let whole = self.input_ended || line.ends_with(b"\n") || line.len() > LINE_MAX;
                if whole || now >= *until {
                    let (line, wanted) = (core::mem::take(line), *wanted);
                    self.use_line(&line, wanted, host);
                }
            }
            State::AwaitingUplink { until } => match host.uplink() {
                Uplink::Absent | Uplink::Connected => self.end(exit::OK),
                Uplink::Connecting if now >= *until => {
                    self.output.note("the uplink is not connected yet");
                    self.end(exit::NOT_YET);
                }
                Uplink::Connecting => {}
            },
            State::Running { words, cursor } if self.output.is_empty() => {
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                let command = Command {
                    words: &words,
                    cursor: *cursor,
                };
                let lost_before = self.output.lost();
                let step = host.run(&command, &mut self.output);
                if lost_before == 0 && self.output.lost() > 0 {
                    self.output.note("output was cut here: too much at once");
                }
                match step {
                    Step::Again(next) => *cursor = next,
                    Step::Exit(code) => self.end(code),
                }
            }
            _ => {}
        }
    }

    /// Both have greeted: does what the plan says.
    fn begin<H: Host>(&mut self, now: Time, host: &mut H) {
        let input = |wanted| State::Input {
            until: now.plus(INPUT_WAIT),
            line: Vec::new(),
            wanted,
        };
        match core::mem::replace(&mut self.plan, Plan::Exit(exit::OK)) {
            Plan::Exit(code) => self.end(code),
            Plan::Refuse(code, reason) => self.refuse(code, &reason),
            Plan::Suspend => {
                host.suspending();
                self.end(exit::OK);
            }
            Plan::Resume => {
                host.resumed();
                self.end(exit::OK);
            }
            Plan::AwaitUplink => {
                self.state = State::AwaitingUplink {
                    until: now.plus(UPLINK_WAIT),
                };
            }
            Plan::ShellLine => self.state = input(Wanted::Command),
            Plan::Date => self.state = input(Wanted::Date),
            Plan::Command(words) => self.state = State::Running { words, cursor: 0 },
        }
    }

    /// The first line of input is there, or what there is of it.
    fn use_line<H: Host>(&mut self, line: &[u8], wanted: Wanted, host: &mut H) {
        let complete = self.input_ended || line.ends_with(b"\n");
        if !complete {
            let reason = if line.len() > LINE_MAX {
                format!("the first line of input is longer than {LINE_MAX} bytes")
            } else {
                String::from("no command came; write one line, for example `help`")
            };
            return self.refuse(exit::USAGE, &reason);
        }
        match wanted {
            Wanted::Date => {
                let time = core::str::from_utf8(line).ok().and_then(date::parse);
                match time {
                    Some(seconds) => {
                        host.told_time(seconds);
                        self.end(exit::OK);
                    }
                    None => self.refuse(1, "expected a time like 2026-11-23T04:39:00+00:00"),
                }
            }
            Wanted::Command => match Plan::for_words(words::from_line(line)) {
                Plan::Command(words) => self.state = State::Running { words, cursor: 0 },
                Plan::Refuse(code, reason) => self.refuse(code, &reason),
                _ => self.end(exit::OK),
            },
        }
    }

    fn refuse(&mut self, code: u8, reason: &str) {
        self.output.note(reason);
        self.end(code);
    }

    fn end(&mut self, code: u8) {
        self.output.finish(code);
        self.state = State::Ending(code);
    }
}

/// Takes a piece of a message from the caller.
fn take(state: &mut State, input_ended: &mut bool, piece: &Piece<'_>) -> Result<(), Violation> {
    if let State::Greeting { version, .. } = state {
        if piece.header.kind != Kind::Hello || piece.header.len != 4 {
            return Err(Violation);
        }
        version.extend_from_slice(piece.bytes);
        if piece.last {
            let number = super::message::word(version, 0).ok_or(Violation)?;
            if number < VERSION_OLDEST {
                return Err(Violation);
            }
        }
        return Ok(());
    }
    match piece.header.kind {
        Kind::Stdin => {
            if piece.header.len == 0 {
                *input_ended = true;
            } else if let State::Input { line, .. } = state
                && !*input_ended
                && !line.ends_with(b"\n")
            {
                let up_to = piece.bytes.iter().position(|byte| *byte == b'\n');
                let len = up_to.map_or(piece.bytes.len(), |at| at.saturating_add(1));
                let room = (LINE_MAX + 1).saturating_sub(line.len());
                line.extend(piece.bytes.iter().take(len.min(room)));
            }
            Ok(())
        }
        Kind::Stdout | Kind::Stderr | Kind::ExitCode => Ok(()),
        _ => Err(Violation),
    }
}
