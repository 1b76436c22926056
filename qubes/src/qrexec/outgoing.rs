//! The one call that we make at a time: to a service of dom0, or of a qube that dom0 chooses.
//!
//! ```text
//! ASKED (dom0 may ask a person, so this takes minutes) -> OPENING, as server -> TALKING -> exit code
//! ```
//!
//! Source: QubesOS core-qrexec `agent/qrexec-client-vm.c`.

use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;

use xen::Time;
use xen::stream::{ByteStream, StreamError};

use super::frames::{Frames, Piece};
use super::message::{self, CallPort, Ident, Kind, Stream};
use super::{VERSION_OLDEST, exit};
use crate::vchan::channels::{Activity, Channels, Phase};
use crate::vchan::layout::Orders;

/// How long dom0 may take to accept or refuse.
pub const ASK_WAIT: Duration = Duration::from_secs(300);
/// How long the service may take to connect; dom0 waits 5 seconds for us.
pub const CONNECT_WAIT: Duration = Duration::from_secs(10);
/// How long the service may be silent.
pub const SILENCE: Duration = Duration::from_secs(60);
/// Bytes of the service's output that are kept.
pub const KEEP: usize = 4096;
/// Bytes of input that a call may have.
pub const INPUT_MAX: usize = 4096;
/// The longest name of a service with its argument.
pub const SERVICE_MAX: usize = 256;

/// Why a call was not begun.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CallError {
    /// There is no control channel.
    NotConnected,
    /// Another call is under way, or its answer was not taken.
    Busy,
    /// The target's or service's name is too long, empty, or not of printable ASCII without spaces; or too much input.
    Malformed,
}

/// How a call of ours ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// The service's exit code; [`exit::REFUSED`] when dom0 refused, `None` when it never said.
    pub exit: Option<u8>,
    /// The beginning of its standard output, at most [`KEEP`] bytes.
    pub output: Vec<u8>,
}

impl Answer {
    /// An answer without output.
    pub(super) const fn only(exit: Option<u8>) -> Self {
        Self {
            exit,
            output: Vec::new(),
        }
    }
}

#[derive(Debug)]
enum State<C> {
    Asked { until: Time },
    Opening { channel: C, until: Time },
    Talking { channel: C, until: Time },
}

/// A call of ours.
#[derive(Debug)]
pub struct Outgoing<C> {
    ident: Ident,
    state: State<C>,
    /// Set once dom0 has accepted.
    call: Option<CallPort>,
    input: Vec<u8>,
    talk: Talk,
}

/// The conversation on the data channel.
#[derive(Debug)]
struct Talk {
    frames: Frames,
    send: Vec<u8>,
    sent: usize,
    heard: Heard,
}

/// What the service has said so far.
#[derive(Debug, Default)]
struct Heard {
    greeting: Vec<u8>,
    greeted: bool,
    output: Vec<u8>,
    output_ended: bool,
    code: Vec<u8>,
    exit: Option<u8>,
}

/// What a poll came to.
#[derive(Debug)]
pub enum Progress {
    /// It goes on.
    Going(Activity),
    /// It is over.
    Over(Answer),
}

/// Whether a name can stand in a trigger message.
fn is_name(name: &str, longest: usize) -> bool {
    !name.is_empty() && name.len() <= longest && name.bytes().all(|byte| byte.is_ascii_graphic())
}

/// A call's description, checked.
#[derive(Debug)]
pub struct Request {
    pub(super) target: String,
    pub(super) service: String,
    input: Vec<u8>,
}

impl Request {
    /// Checks names and size for a protocol version.
    ///
    /// # Errors
    ///
    /// [`CallError::Malformed`].
    pub fn new(version: u32, target: &str, service: &str, input: &[u8]) -> Result<Self, CallError> {
        let (target_max, service_max) = if version < 3 {
            (31, 63)
        } else {
            (63, SERVICE_MAX)
        };
        let fine = is_name(target, target_max)
            && is_name(service, service_max)
            && input.len() <= INPUT_MAX;
        if !fine {
            return Err(CallError::Malformed);
        }
        Ok(Self {
            target: target.into(),
            service: service.into(),
            input: input.to_vec(),
        })
    }
}

impl<C: ByteStream> Outgoing<C> {
    /// A call that dom0 was just asked for.
    pub fn new(ident: Ident, request: Request, now: Time) -> Self {
        Self {
            ident,
            state: State::Asked {
                until: now.plus(ASK_WAIT),
            },
            call: None,
            input: request.input,
            talk: Talk {
                frames: Frames::new(message::DATA_MAX),
                send: Vec::new(),
                sent: 0,
                heard: Heard::default(),
            },
        }
    }

    /// Whether dom0 means this call, and has not accepted it before.
    pub fn is_asked(&self, ident: &[u8]) -> bool {
        self.ident.is(ident) && matches!(self.state, State::Asked { .. })
    }

    /// The data channel that dom0 named, to report its end.
    pub const fn call(&self) -> Option<CallPort> {
        self.call
    }

    /// The channel, to close it.
    pub fn into_channel(self) -> Option<C> {
        match self.state {
            State::Asked { .. } => None,
            State::Opening { channel, .. } | State::Talking { channel, .. } => Some(channel),
        }
    }

    /// The channel, to learn its port.
    pub const fn channel(&self) -> Option<&C> {
        match &self.state {
            State::Asked { .. } => None,
            State::Opening { channel, .. } | State::Talking { channel, .. } => Some(channel),
        }
    }

    /// dom0 accepted: serves the data channel. False when that was impossible.
    pub fn accepted<N: Channels<Channel = C>>(&mut self, channels: &mut N, call: CallPort) -> bool {
        self.call = Some(call);
        let Some(peer) = call.peer() else {
            return false;
        };
        match channels.listen(peer, call.port(), Orders::QREXEC_DATA) {
            Ok(channel) => {
                let until = channels.now().plus(CONNECT_WAIT);
                self.state = State::Opening { channel, until };
                true
            }
            Err(_) => false,
        }
    }

    /// Moves the call on as far as possible.
    pub fn poll<N: Channels<Channel = C>>(&mut self, channels: &mut N) -> Progress {
        let now = channels.now();
        let (channel, until) = match &mut self.state {
            State::Asked { until } => {
                return if now >= *until {
                    Progress::Over(Answer::only(None))
                } else {
                    Progress::Going(Activity::at(Some(*until)))
                };
            }
            State::Opening { channel, until } => {
                if channels.progress(channel) == Phase::Opening {
                    return if now >= *until {
                        Progress::Over(Answer::only(None))
                    } else {
                        Progress::Going(Activity::at(Some(*until)))
                    };
                }
                let meanwhile = State::Asked { until: now };
                if let State::Opening { channel, .. } =
                    core::mem::replace(&mut self.state, meanwhile)
                {
                    let until = now.plus(SILENCE);
                    self.state = State::Talking { channel, until };
                }
                self.talk.begin(&core::mem::take(&mut self.input));
                return Progress::Going(Activity::again());
            }
            State::Talking { channel, until } => (channel, until),
        };
        channels.progress(channel);
        let moved = self.talk.work(channel);
        channels.flush(channel);
        match moved {
            Ok(true) => *until = now.plus(SILENCE),
            Ok(false) if now < *until => {}
            _ => return Progress::Over(self.talk.answer()),
        }
        if self.talk.is_over() {
            return Progress::Over(self.talk.answer());
        }
        Progress::Going(Activity::at(Some(*until)))
    }
}

impl Talk {
    /// Greets first, as a caller must, then says all there is to say.
    fn begin(&mut self, input: &[u8]) {
        message::push_hello(&mut self.send);
        message::push_data(&mut self.send, Stream::Stdin, input);
        message::push_end(&mut self.send, Stream::Stdin);
    }

    const fn is_over(&self) -> bool {
        self.heard.exit.is_some() && self.heard.output_ended
    }

    fn answer(&mut self) -> Answer {
        Answer {
            exit: self.heard.exit,
            output: core::mem::take(&mut self.heard.output),
        }
    }

    /// Sends and receives. Returns whether anything moved.
    fn work<S: ByteStream>(&mut self, stream: &mut S) -> Result<bool, StreamError> {
        let mut moved = false;
        // What the service had to say before it closed counts even if it closed before it read everything.
        let rest = self.send.get(self.sent..).unwrap_or_default();
        if let Ok(written) = stream.write(rest) {
            self.sent = self.sent.saturating_add(written);
            moved = written > 0;
        }
        for _ in 0..128 {
            let Some(piece) = self.frames.next(stream)? else {
                break;
            };
            self.heard.take(&piece)?;
            moved = true;
        }
        Ok(moved)
    }
}

impl Heard {
    fn take(&mut self, piece: &Piece<'_>) -> Result<(), StreamError> {
        if !self.greeted {
            if piece.header.kind != Kind::Hello || piece.header.len != 4 {
                return Err(StreamError);
            }
            self.greeting.extend_from_slice(piece.bytes);
            if piece.last {
                let version = message::word(&self.greeting, 0).unwrap_or_default();
                if version < VERSION_OLDEST {
                    return Err(StreamError);
                }
                self.greeted = true;
            }
            return Ok(());
        }
        match piece.header.kind {
            Kind::Stdout if piece.header.len == 0 => self.output_ended = true,
            Kind::Stdout => {
                let room = KEEP.saturating_sub(self.output.len());
                self.output.extend(piece.bytes.iter().take(room));
            }
            Kind::Stderr | Kind::Stdin => {}
            Kind::ExitCode => {
                let room = 4usize.saturating_sub(self.code.len());
                self.code.extend(piece.bytes.iter().take(room));
                if piece.last {
                    // Callers see the lowest eight bits; a code without bytes is none.
                    self.exit = (self.code.len() == 4)
                        .then(|| self.code.first().copied())
                        .flatten();
                    if self.exit.is_none() {
                        return Err(StreamError);
                    }
                }
            }
            _ => return Err(StreamError),
        }
        Ok(())
    }
}

/// What a refused call comes to.
pub(super) const fn refused() -> Answer {
    Answer::only(Some(exit::REFUSED))
}
