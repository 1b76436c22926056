//! The control channel, and all calls together.
//!
//! ```text
//! DOWN -> ADVERTISED -> greet first -> greeted -> RUN ... -> the channel is over -> everything down -> DOWN
//! ```
//!
//! dom0's daemon waits for our greeting, and while it waits the start of this qube may be waiting for it. When it goes
//! away we advertise again, for ever: nothing else brings qrexec back.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::time::Duration;

use xen::stream::{ByteStream, StreamError};
use xen::{DomId, Time};

use super::call::{self, Call, End};
use super::cmdline;
use super::frames::{Frames, Piece};
use super::message::{self, CallPort, Ident, Kind, Terminated};
use super::outgoing::{self, Answer, CallError, Outgoing, Request};
use super::service::{self, Plan};
use super::{Host, PORT, VERSION, VERSION_OLDEST, exit};
use crate::vchan::channels::{Activity, Channels, Phase};
use crate::vchan::layout::Orders;

/// Calls that run at once. Each maps up to 33 pages of its caller and binds a port.
pub const CALLS_MAX: usize = 8;
/// Calls that wait for one of the others to end.
pub const WAITING_MAX: usize = 32;
/// How long a call waits before dom0 is told that it is over; dom0 gives up after 5 seconds.
pub const WAITING_FOR: Duration = Duration::from_secs(4);
/// The longest command line in bytes that is looked at. Stock agents cannot take more either.
pub const COMMAND_MAX: usize = 4096;
/// Bytes for dom0 that may wait. Above it no further message of dom0 is read.
const SEND_MAX: usize = 4096;
/// The longest message that is skipped, in bytes, whatever it is. After a longer one the channel is made anew.
const SKIP_MAX: u32 = 128 * 1024;
/// Pieces of messages handled in one poll.
const PIECES_PER_POLL: u32 = 128;
/// The pause before advertising again, doubled up to [`PAUSE_LONGEST`] while no greeting comes.
const PAUSE_FIRST: Duration = Duration::from_millis(50);
const PAUSE_LONGEST: Duration = Duration::from_secs(5);
/// How soon a call that found no resources is tried again.
const TRY_AGAIN: Duration = Duration::from_millis(50);

/// What happened, since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Times that dom0 greeted us on a control channel.
    pub connections: u64,
    /// Calls that dom0 asked for.
    pub calls: u64,
    /// Calls that ended with an exit code.
    pub done: u64,
    /// Calls whose channel or greeting never came, or for which there was no room in time.
    pub never_came: u64,
    /// Calls whose caller closed early or broke the protocol.
    pub lost: u64,
    /// Calls whose caller stopped reading.
    pub stalled: u64,
    /// Ends of calls that were reported to dom0.
    pub terminated: u64,
    /// Messages of dom0 that make no sense: skipped.
    pub unexpected: u64,
    /// Bytes of output that were lost for want of room.
    pub output_lost: u64,
}

/// The control channel while there is one.
#[derive(Debug)]
struct Control<C> {
    channel: C,
    /// Our greeting was queued.
    greeted: bool,
    /// The lower of both versions, once dom0 has greeted.
    version: Option<u32>,
    inbox: Inbox,
    send: Vec<u8>,
    sent: usize,
    /// Something strange was logged on this channel.
    complained: bool,
}

/// Collects messages of dom0.
#[derive(Debug)]
struct Inbox {
    frames: Frames,
    body: Vec<u8>,
}

/// A call that waits for its turn.
#[derive(Debug)]
struct Waiting {
    port: CallPort,
    peer: DomId,
    plan: Plan,
    silent: bool,
    until: Time,
}

#[derive(Debug)]
struct Running<C> {
    port: CallPort,
    call: Call<C>,
}

/// The qrexec agent over whatever channels there are. `C` is the channel type.
#[derive(Debug)]
pub struct Agent<C> {
    control: Option<Control<C>>,
    retry_at: Time,
    pause: Duration,
    calls: Vec<Running<C>>,
    waiting: VecDeque<Waiting>,
    try_at: Time,
    outgoing: Option<Outgoing<C>>,
    answer: Option<Answer>,
    next_ident: u32,
    /// A call of ours was begun since the last poll.
    called: bool,
    counters: Counters,
}

impl<C: ByteStream> Agent<C> {
    /// An agent that advertises itself at its first poll.
    #[must_use]
    pub fn new() -> Self {
        Self {
            control: None,
            retry_at: Time(0),
            pause: PAUSE_FIRST,
            calls: Vec::new(),
            waiting: VecDeque::new(),
            try_at: Time(0),
            outgoing: None,
            answer: None,
            next_ident: 1,
            called: false,
            counters: Counters::default(),
        }
    }

    /// What happened so far.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// Whether dom0 has greeted us.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.version().is_some()
    }

    /// Calls that run, and calls that wait.
    #[must_use]
    pub fn load(&self) -> (usize, usize) {
        (self.calls.len(), self.waiting.len())
    }

    /// All channels, to learn their ports.
    pub fn channels(&self) -> impl Iterator<Item = &C> {
        let control = self.control.iter().map(|control| &control.channel);
        let calls = self.calls.iter().map(|running| running.call.channel());
        let outgoing = self.outgoing.iter().filter_map(Outgoing::channel);
        control.chain(calls).chain(outgoing)
    }

    /// Calls a service: `target` is `dom0`, a qube's name or a keyword such as `@default`.
    ///
    /// # Errors
    ///
    /// [`CallError`]; nothing was begun.
    pub fn call(
        &mut self,
        target: &str,
        service: &str,
        input: &[u8],
        now: Time,
    ) -> Result<(), CallError> {
        if self.outgoing.is_some() || self.answer.is_some() {
            return Err(CallError::Busy);
        }
        let Some(control) = &mut self.control else {
            return Err(CallError::NotConnected);
        };
        let version = control.version.ok_or(CallError::NotConnected)?;
        if control.send.len() > SEND_MAX {
            return Err(CallError::Busy);
        }
        let request = Request::new(version, target, service, input)?;
        let ident = Ident::new(self.next_ident);
        self.next_ident = self.next_ident.wrapping_add(1);
        let (target, service) = (&request.target, &request.service);
        message::push_trigger(&mut control.send, version, target, service, ident);
        self.outgoing = Some(Outgoing::new(ident, request, now));
        self.called = true;
        Ok(())
    }

    /// Whether [`Agent::poll`] should be called before sleeping, because a call was begun since.
    #[must_use]
    pub const fn wants_poll(&self) -> bool {
        self.called
    }

    /// How the call that we made ended, once.
    pub const fn take_answer(&mut self) -> Option<Answer> {
        self.answer.take()
    }

    /// Moves everything on as far as possible.
    pub fn poll<N, H>(&mut self, channels: &mut N, host: &mut H) -> Activity
    where
        N: Channels<Channel = C>,
        H: Host,
    {
        self.called = false;
        let control = self.poll_control(channels);
        let calls = self.poll_calls(channels, host);
        let outgoing = self.poll_outgoing(channels);
        let waiting = self.start_waiting(channels);
        // Ends of calls are reported in the same iteration.
        if self.flush_control(channels).is_err() {
            self.tear_down(channels);
        }
        control.and(calls).and(outgoing).and(waiting)
    }

    /// Closes everything, for the end of the program.
    pub fn close<N: Channels<Channel = C>>(&mut self, channels: &mut N) {
        self.tear_down(channels);
    }

    fn version(&self) -> Option<u32> {
        self.control.as_ref().and_then(|control| control.version)
    }

    fn poll_control<N: Channels<Channel = C>>(&mut self, channels: &mut N) -> Activity {
        let Some(control) = &mut self.control else {
            return self.advertise(channels);
        };
        if channels.progress(&mut control.channel) == Phase::Opening {
            return Activity::default();
        }
        if !control.greeted {
            control.greeted = true;
            message::push_hello(&mut control.send);
        }
        match self.read_control(channels) {
            Ok(more) => Activity {
                more,
                deadline: None,
            },
            Err(_) => {
                xen::warn!("qrexec: the control channel is over; advertising again");
                self.tear_down(channels);
                Activity::at(Some(self.retry_at))
            }
        }
    }

    fn advertise<N: Channels<Channel = C>>(&mut self, channels: &mut N) -> Activity {
        let now = channels.now();
        if now >= self.retry_at {
            match channels.listen(DomId::DOM0, PORT, Orders::QREXEC_CONTROL) {
                Ok(channel) => {
                    self.control = Some(Control {
                        channel,
                        greeted: false,
                        version: None,
                        inbox: Inbox {
                            frames: Frames::new(SKIP_MAX),
                            body: Vec::new(),
                        },
                        send: Vec::new(),
                        sent: 0,
                        complained: false,
                    });
                    return Activity::again();
                }
                Err(_) => self.back_off(now),
            }
        }
        Activity::at(Some(self.retry_at))
    }

    fn back_off(&mut self, now: Time) {
        self.retry_at = now.plus(self.pause);
        self.pause = self.pause.saturating_mul(2).min(PAUSE_LONGEST);
    }

    /// Reads messages until nothing is left; returns whether it stopped for another reason.
    fn read_control<N: Channels<Channel = C>>(
        &mut self,
        channels: &mut N,
    ) -> Result<bool, StreamError> {
        for _ in 0..PIECES_PER_POLL {
            let Some(control) = &mut self.control else {
                return Ok(false);
            };
            if control.send.len().saturating_sub(control.sent) > SEND_MAX {
                // dom0 does not read; its next event says that it does.
                return Ok(false);
            }
            let Some(piece) = control.inbox.frames.next(&mut control.channel)? else {
                return Ok(false);
            };
            let body = &mut control.inbox.body;
            if let Some((kind, len)) = collect(body, &piece) {
                let body = core::mem::take(body);
                self.handle(channels, kind, len, &body)?;
            }
        }
        Ok(true)
    }

    /// Acts on a whole message; `body` is at most its first bytes, `len` its true length.
    fn handle<N: Channels<Channel = C>>(
        &mut self,
        channels: &mut N,
        kind: Kind,
        len: u32,
        body: &[u8],
    ) -> Result<(), StreamError> {
        if self.version().is_none() {
            return self.greeted_by(kind, body);
        }
        let call = message::word(body, 0)
            .zip(message::word(body, 1))
            .and_then(|(domain, port)| CallPort::new(domain, port));
        match (kind, call) {
            (Kind::ExecCmdline | Kind::JustExec, Some(port)) => {
                let cut = usize::try_from(len).is_ok_and(|len| len > body.len());
                let line = body.get(8..).unwrap_or_default();
                self.asked(channels.now(), port, kind == Kind::JustExec, line, cut);
                // At once, so that a burst of calls fills the running places first and the waiting ones then.
                let _ = self.start_waiting(channels);
            }
            (Kind::ServiceConnect, Some(port)) => {
                let ident = body.get(8..40).unwrap_or_default();
                self.accepted(channels, port, ident);
            }
            (Kind::ServiceRefused, _) => {
                let ident = body.get(..32).unwrap_or_default();
                if self
                    .outgoing
                    .as_ref()
                    .is_some_and(|call| call.is_asked(ident))
                {
                    self.outgoing = None;
                    self.answer = Some(outgoing::refused());
                }
            }
            _ => {
                bump(&mut self.counters.unexpected);
                let complained = self.control.as_mut().map(|control| &mut control.complained);
                if complained.is_some_and(|complained| !core::mem::replace(complained, true)) {
                    xen::warn!("qrexec: {kind} skipped; further ones are counted only");
                }
            }
        }
        Ok(())
    }

    fn greeted_by(&mut self, kind: Kind, body: &[u8]) -> Result<(), StreamError> {
        let version = message::word(body, 0).filter(|_| body.len() == 4);
        let Some(version) = version.filter(|_| kind == Kind::Hello) else {
            return Err(StreamError);
        };
        if version < VERSION_OLDEST {
            return Err(StreamError);
        }
        if let Some(control) = &mut self.control {
            control.version = Some(version.min(VERSION));
        }
        self.pause = PAUSE_FIRST;
        bump(&mut self.counters.connections);
        xen::info!(
            "qrexec: dom0 has connected, protocol {}",
            version.min(VERSION)
        );
        Ok(())
    }

    /// dom0 asks for a call.
    fn asked(&mut self, now: Time, port: CallPort, silent: bool, line: &[u8], cut: bool) {
        bump(&mut self.counters.calls);
        let Some(peer) = port.peer() else {
            bump(&mut self.counters.never_came);
            return self.terminated(port);
        };
        if self.waiting.len() >= WAITING_MAX {
            bump(&mut self.counters.never_came);
            return self.terminated(port);
        }
        let plan = if cut {
            let reason = "the command line is longer than 4096 bytes";
            Plan::Refuse(exit::CANNOT_RUN, reason.into())
        } else {
            service::plan(cmdline::parse(line), peer)
        };
        self.waiting.push_back(Waiting {
            port,
            peer,
            plan,
            silent,
            until: now.plus(WAITING_FOR),
        });
    }

    /// dom0 accepts a call of ours.
    fn accepted<N: Channels<Channel = C>>(
        &mut self,
        channels: &mut N,
        port: CallPort,
        ident: &[u8],
    ) {
        let serving = match &mut self.outgoing {
            Some(call) if call.is_asked(ident) => call.accepted(channels, port),
            _ => {
                // Given up meanwhile, or never made.
                return self.terminated(port);
            }
        };
        if !serving {
            self.outgoing = None;
            self.answer = Some(Answer::only(None));
            self.terminated(port);
        }
    }

    fn poll_calls<N, H>(&mut self, channels: &mut N, host: &mut H) -> Activity
    where
        N: Channels<Channel = C>,
        H: Host,
    {
        let mut activity = Activity::default();
        let mut index = 0;
        while let Some(running) = self.calls.get_mut(index) {
            match running.call.poll(channels, host) {
                call::Progress::Going(next) => {
                    activity = activity.and(next);
                    index = index.saturating_add(1);
                }
                call::Progress::Over(end) => {
                    let running = self.calls.swap_remove(index);
                    self.count(end, running.call.lost());
                    channels.close(running.call.into_channel());
                    self.terminated(running.port);
                }
            }
        }
        activity
    }

    const fn count(&mut self, end: End, lost: u64) {
        let counter = match end {
            End::Done(_) => &mut self.counters.done,
            End::NeverCame => &mut self.counters.never_came,
            End::Lost => &mut self.counters.lost,
            End::Stalled => &mut self.counters.stalled,
        };
        bump(counter);
        self.counters.output_lost = self.counters.output_lost.wrapping_add(lost);
    }

    fn poll_outgoing<N: Channels<Channel = C>>(&mut self, channels: &mut N) -> Activity {
        let Some(call) = &mut self.outgoing else {
            return Activity::default();
        };
        match call.poll(channels) {
            outgoing::Progress::Going(next) => next,
            outgoing::Progress::Over(answer) => {
                self.answer = Some(answer);
                if let Some(call) = self.outgoing.take() {
                    let port = call.call();
                    if let Some(channel) = call.into_channel() {
                        channels.close(channel);
                    }
                    if let Some(port) = port {
                        self.terminated(port);
                    }
                }
                Activity::default()
            }
        }
    }

    /// Gives waiting calls the places that are free, and ends those that waited too long.
    fn start_waiting<N: Channels<Channel = C>>(&mut self, channels: &mut N) -> Activity {
        let now = channels.now();
        let mut started = false;
        while self.calls.len() < CALLS_MAX && now >= self.try_at {
            let Some(next) = self.waiting.pop_front() else {
                break;
            };
            match channels.connect(next.peer, next.port.port()) {
                Ok(channel) => {
                    let call = Call::new(channel, next.plan, next.silent, now);
                    let port = next.port;
                    self.calls.push(Running { port, call });
                    started = true;
                }
                Err(_) => {
                    self.waiting.push_front(next);
                    self.try_at = now.plus(TRY_AGAIN);
                }
            }
        }
        while let Some(port) = self
            .waiting
            .front()
            .filter(|next| now >= next.until)
            .map(|next| next.port)
        {
            self.waiting.pop_front();
            bump(&mut self.counters.never_came);
            self.terminated(port);
        }
        let deadline = self.waiting.front().map(|next| {
            if self.calls.len() < CALLS_MAX {
                self.try_at.min(next.until)
            } else {
                next.until
            }
        });
        Activity {
            more: started,
            deadline,
        }
    }

    /// Tells dom0 that a call's port is free.
    fn terminated(&mut self, port: CallPort) {
        if let Some(control) = &mut self.control {
            message::push_terminated(&mut control.send, Terminated(port));
            bump(&mut self.counters.terminated);
        }
    }

    fn flush_control<N: Channels<Channel = C>>(
        &mut self,
        channels: &mut N,
    ) -> Result<(), StreamError> {
        let Some(control) = self.control.as_mut().filter(|control| control.greeted) else {
            return Ok(());
        };
        let rest = control.send.get(control.sent..).unwrap_or_default();
        if !rest.is_empty() {
            let written = control.channel.write(rest)?;
            control.sent = control.sent.saturating_add(written);
        }
        if control.sent >= control.send.len() {
            control.send.clear();
            control.sent = 0;
        }
        channels.flush(&mut control.channel);
        Ok(())
    }

    /// The control channel is over: dom0 has forgotten every call, so no end may be reported on the next channel.
    fn tear_down<N: Channels<Channel = C>>(&mut self, channels: &mut N) {
        for running in self.calls.drain(..) {
            channels.close(running.call.into_channel());
        }
        self.waiting.clear();
        if let Some(call) = self.outgoing.take() {
            self.answer = Some(Answer::only(None));
            if let Some(channel) = call.into_channel() {
                channels.close(channel);
            }
        }
        if let Some(control) = self.control.take() {
            channels.close(control.channel);
        }
        self.back_off(channels.now());
    }
}

impl<C: ByteStream> Default for Agent<C> {
    fn default() -> Self {
        Self::new()
    }
}

/// Keeps the beginning of a message. Returns its kind and true length when it is whole.
fn collect(body: &mut Vec<u8>, piece: &Piece<'_>) -> Option<(Kind, u32)> {
    if piece.first {
        body.clear();
    }
    let room = (COMMAND_MAX + 8).saturating_sub(body.len());
    body.extend(piece.bytes.iter().take(room));
    piece.last.then_some((piece.header.kind, piece.header.len))
}

const fn bump(counter: &mut u64) {
    *counter = counter.wrapping_add(1);
}
