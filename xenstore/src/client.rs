//! Requests, replies and watches over a byte stream, without waiting.
//!
//! Requests are encoded when submitted (so that one over a limit is refused then), sent in that order, at most
//! [`MAX_OUTSTANDING`] unanswered at a time, and matched with their replies by request id. Up to [`MAX_QUEUED`] wait
//! behind those; then the caller gets its message back, to try again later. Watch events may
//! come at any point, also before the reply to the write that caused them; each only marks its watch as dirty.
//!
//! Trusts the store to follow the protocol, but notices when it does not: an oversize message, a reply to nothing, a
//! reply of another type, impossible ring indices and a minute of silence are [`Fatal`]. There is no way to
//! start the connection anew, so the domain should end.
//!
//! Source: Xen `docs/misc/xenstore.txt`, `docs/misc/xenstore-ring.txt`.

use alloc::borrow::ToOwned;
use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::time::Duration;

use xen::Time;
use xen::stream::ByteStream;

use crate::table::Table;
use crate::wire::{self, Decoder, Encoded, ErrorCode, Message, Request, RequestError, kind};
use crate::{MAX_HINT_LEN, MAX_HINTS, MAX_OUTSTANDING, MAX_QUEUED, MAX_WATCHES, SILENCE_LIMIT};

/// Bytes read from the stream in one call of [`Client::pump`] at most: a few rings full.
const READ_BUDGET: usize = 16 * 1024;
/// Bytes read at once.
const READ_CHUNK: usize = 1024;
/// How much silence one call of [`Client::pump`] can count: a longer gap means that the domain was paused.
const SILENCE_STEP: Duration = Duration::from_secs(2);
/// How soon to look again while a reply is outstanding.
const SILENCE_CHECK: Duration = Duration::from_secs(1);

/// Why the connection to xenstored is lost for good.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fatal {
    /// The ring's indices are impossible, or the stream was closed.
    Stream,
    /// The store announced a message of this many bytes of payload.
    Oversize {
        /// The announced length.
        len: u32,
    },
    /// A message of this type that is neither a watch event nor a reply.
    UnknownType {
        /// The type.
        kind: u32,
    },
    /// A reply to a request that is not outstanding.
    UnknownRequest {
        /// Its request id.
        request: u32,
    },
    /// A reply whose type is not that of its request.
    WrongType {
        /// The type of the request.
        expected: u32,
        /// The type of the reply.
        found: u32,
    },
    /// No reply for [`SILENCE_LIMIT`] although one was due.
    Silence,
}

impl fmt::Display for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stream => f.write_str("xenstore: the ring is broken"),
            Self::Oversize { len } => write!(f, "xenstore: a message of {len} bytes"),
            Self::UnknownType { kind } => write!(f, "xenstore: a message of unknown type {kind}"),
            Self::UnknownRequest { request } => {
                write!(f, "xenstore: a reply to unknown request {request}")
            }
            Self::WrongType { expected, found } => {
                write!(
                    f,
                    "xenstore: a reply of type {found} to a request of type {expected}"
                )
            }
            Self::Silence => f.write_str("xenstore: no reply for 60 s"),
        }
    }
}

/// Why a watch was not accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WatchError {
    /// The queue is full: try again after replies have come.
    Full,
    /// We hold [`MAX_WATCHES`] already.
    TooManyWatches,
    /// The request can never be sent.
    Request(RequestError),
}

/// How many bytes one call moved. The caller notifies the store when any were.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Moved {
    /// Bytes taken from the stream.
    pub read: usize,
    /// Bytes put into the stream.
    pub written: usize,
}

impl Moved {
    /// Counts more bytes in.
    pub(crate) const fn add(&mut self, more: Self) {
        self.read = self.read.saturating_add(more.read);
        self.written = self.written.saturating_add(more.written);
    }

    /// Whether any byte moved.
    #[must_use]
    pub const fn any(self) -> bool {
        self.read != 0 || self.written != 0
    }
}

/// What the client has done since it was made. Plain counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Requests sent.
    pub requests: u64,
    /// Replies received, also error replies.
    pub replies: u64,
    /// Error replies among them.
    pub errors: u64,
    /// Watch events received for a watch of ours.
    pub watch_events: u64,
    /// Watch events that named no watch of ours, or were not well formed.
    pub stray_events: u64,
}

/// A request that was submitted; redeemed with [`Client::take_reply`] or given up with [`Client::abandon`].
#[derive(PartialEq, Eq, Debug)]
pub struct Ticket(u32);

/// A watch that was submitted; ended with [`Client::unwatch`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WatchId(u32);

/// What a watch has seen since it was asked last.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Dirty {
    /// Nothing.
    #[default]
    Clean,
    /// Something at or below these paths; only for watches with hints.
    Paths(Vec<String>),
    /// Something, anywhere at or below the watched path.
    Anything,
}

struct Pending {
    kind: u32,
    state: State,
    /// Nobody waits for the reply any more.
    abandoned: bool,
}

enum State {
    Queued(Encoded),
    Sent,
    Done(Result<Vec<u8>, ErrorCode>),
}

struct Watch {
    path: String,
    hints: bool,
    dirty: Dirty,
}

/// The client's side of a xenstore connection.
#[derive(Default)]
pub struct Client {
    decoder: Decoder,
    /// The message being written, and how much of it is out.
    output: Vec<u8>,
    output_done: usize,
    queue: VecDeque<u32>,
    pending: Table<u32, Pending>,
    outstanding: usize,
    last_request: u32,
    watches: Table<u32, Watch>,
    last_watch: u32,
    silence: Duration,
    last_pump: Option<Time>,
    fatal: Option<Fatal>,
    news: bool,
    counters: Counters,
}

impl Client {
    /// A client with nothing to say yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Queues a request.
    ///
    /// # Errors
    ///
    /// Gives the message back when the queue is full: try again after replies have come.
    pub fn submit(&mut self, message: Encoded) -> Result<Ticket, Encoded> {
        if self.queue.len() >= MAX_QUEUED {
            return Err(message);
        }
        Ok(self.enqueue(message))
    }

    /// Queues a request that gives a resource back, however full the queue is. Their number is bounded by the
    /// resources held, and nobody waits for the reply.
    pub fn submit_release(&mut self, message: Encoded) {
        let ticket = self.enqueue(message);
        self.abandon(&ticket);
    }

    fn enqueue(&mut self, message: Encoded) -> Ticket {
        let id = self.unused_id();
        self.last_request = id;
        self.queue.push_back(id);
        let pending = Pending {
            kind: message.kind(),
            state: State::Queued(message),
            abandoned: false,
        };
        self.pending.insert(id, pending);
        Ticket(id)
    }

    /// The next request id: never 0, which watch events have, and never one still in use after a wrap.
    fn unused_id(&self) -> u32 {
        let mut id = self.last_request;
        loop {
            id = id.wrapping_add(1);
            if id != 0 && !self.pending.contains(&id) {
                return id;
            }
        }
    }

    /// Takes the reply of a request, once it has come: the payload, or why the store refused.
    pub fn take_reply(&mut self, ticket: &Ticket) -> Option<Result<Vec<u8>, ErrorCode>> {
        match self.pending.get(&ticket.0)?.state {
            State::Done(_) => {}
            State::Queued(_) | State::Sent => return None,
        }
        match self.pending.remove(&ticket.0)?.state {
            State::Done(reply) => Some(reply),
            State::Queued(_) | State::Sent => None,
        }
    }

    /// Tells that nobody waits for this reply. The request is sent all the same.
    pub fn abandon(&mut self, ticket: &Ticket) {
        if let Some(pending) = self.pending.get_mut(&ticket.0) {
            pending.abandoned = true;
            if matches!(pending.state, State::Done(_)) {
                self.pending.remove(&ticket.0);
            }
        }
    }

    /// Sets a watch on a node and everything below it. With `hints` the paths of events are remembered, up to
    /// [`MAX_HINTS`] of them. The watch starts dirty as soon as the store's first event comes.
    ///
    /// The reply, through the ticket, may be an error (`E2BIG`: quota); the watch must then be given back as well.
    ///
    /// # Errors
    ///
    /// [`WatchError`]; nothing is queued.
    pub fn watch(&mut self, path: &str, hints: bool) -> Result<(WatchId, Ticket), WatchError> {
        if self.watches.len() >= MAX_WATCHES {
            return Err(WatchError::TooManyWatches);
        }
        let id = self.unused_watch();
        let message = Request::Watch(path, &id.to_string())
            .encode(0)
            .map_err(WatchError::Request)?;
        let ticket = self.submit(message).map_err(|_| WatchError::Full)?;
        self.last_watch = id;
        let watch = Watch {
            path: path.to_owned(),
            hints,
            dirty: Dirty::Clean,
        };
        self.watches.insert(id, watch);
        Ok((WatchId(id), ticket))
    }

    /// Tokens count up, so that events still on their way for a watch that was removed meet no other.
    fn unused_watch(&self) -> u32 {
        let mut id = self.last_watch;
        loop {
            id = id.wrapping_add(1);
            if !self.watches.contains(&id) {
                return id;
            }
        }
    }

    /// Gives a watch back.
    pub fn unwatch(&mut self, watch: WatchId) {
        if let Some(entry) = self.watches.remove(&watch.0) {
            // Cannot fail: the same path and token were encoded when the watch was set.
            if let Ok(message) = Request::Unwatch(&entry.path, &watch.0.to_string()).encode(0) {
                self.submit_release(message);
            }
        }
    }

    /// Takes what a watch has seen.
    pub fn take_dirty(&mut self, watch: WatchId) -> Dirty {
        self.watches
            .get_mut(&watch.0)
            .map(|entry| core::mem::take(&mut entry.dirty))
            .unwrap_or_default()
    }

    /// Whether a watch has seen something.
    #[must_use]
    pub fn is_dirty(&self, watch: WatchId) -> bool {
        self.watches
            .get(&watch.0)
            .is_some_and(|entry| entry.dirty != Dirty::Clean)
    }

    /// Whether something came since this was asked last that a waiting task could want: a reply, room in the
    /// queue, or a watch that became dirty.
    pub fn take_news(&mut self) -> bool {
        core::mem::take(&mut self.news)
    }

    /// As [`Client::take_news`], without forgetting.
    #[must_use]
    pub const fn has_news(&self) -> bool {
        self.news
    }

    /// Moves bytes both ways, as far as the stream and the limits allow.
    ///
    /// # Errors
    ///
    /// [`Fatal`]; every later call returns the same.
    pub fn pump<S: ByteStream + ?Sized>(
        &mut self,
        stream: &mut S,
        now: Time,
    ) -> Result<Moved, Fatal> {
        if let Some(fatal) = self.fatal {
            return Err(fatal);
        }
        let moved = self
            .exchange(stream)
            .and_then(|moved| self.watch_silence(now).map(|()| moved));
        self.fatal = moved.err();
        moved
    }

    fn exchange<S: ByteStream + ?Sized>(&mut self, stream: &mut S) -> Result<Moved, Fatal> {
        let mut moved = Moved::default();
        // Reading and writing take turns: the daemon stops reading while we do not take its replies.
        loop {
            let now = Moved {
                read: self.receive(stream)?,
                written: self.send(stream)?,
            };
            moved.add(now);
            if !now.any() || moved.read >= READ_BUDGET {
                return Ok(moved);
            }
        }
    }

    fn receive<S: ByteStream + ?Sized>(&mut self, stream: &mut S) -> Result<usize, Fatal> {
        let mut buffer = [0; READ_CHUNK];
        let count = stream.read(&mut buffer).map_err(|_| Fatal::Stream)?;
        let mut input = buffer.get(..count).ok_or(Fatal::Stream)?;
        while !input.is_empty() {
            let message = self
                .decoder
                .feed(&mut input)
                .map_err(|error| Fatal::Oversize { len: error.len })?;
            if let Some(message) = message {
                self.accept(message)?;
            }
        }
        Ok(count)
    }

    fn send<S: ByteStream + ?Sized>(&mut self, stream: &mut S) -> Result<usize, Fatal> {
        let mut total = 0_usize;
        loop {
            if self.output_done >= self.output.len() && !self.load_next() {
                return Ok(total);
            }
            let rest = self.output.get(self.output_done..).unwrap_or_default();
            let count = stream.write(rest).map_err(|_| Fatal::Stream)?;
            if count == 0 {
                return Ok(total);
            }
            self.output_done = self.output_done.saturating_add(count);
            total = total.saturating_add(count);
        }
    }

    /// Makes the next queued request the one being written, if the limit allows another.
    fn load_next(&mut self) -> bool {
        if self.outstanding >= MAX_OUTSTANDING {
            return false;
        }
        while let Some(id) = self.queue.pop_front() {
            self.news = true;
            let Some(pending) = self.pending.get_mut(&id) else {
                continue;
            };
            let State::Queued(message) = core::mem::replace(&mut pending.state, State::Sent) else {
                continue;
            };
            self.output = message.into_bytes(id);
            self.output_done = 0;
            self.outstanding = self.outstanding.saturating_add(1);
            self.counters.requests = self.counters.requests.saturating_add(1);
            return true;
        }
        false
    }

    fn accept(&mut self, message: Message) -> Result<(), Fatal> {
        let header = message.header;
        if header.kind == kind::WATCH_EVENT {
            self.note_event(&message.payload);
            return Ok(());
        }
        if header.kind > kind::DIRECTORY_PART {
            return Err(Fatal::UnknownType { kind: header.kind });
        }
        let unknown = Fatal::UnknownRequest {
            request: header.request,
        };
        let pending = self.pending.get_mut(&header.request).ok_or(unknown)?;
        if !matches!(pending.state, State::Sent) {
            return Err(unknown);
        }
        let reply = if header.kind == kind::ERROR {
            self.counters.errors = self.counters.errors.saturating_add(1);
            Err(ErrorCode::parse(&message.payload))
        } else if header.kind == pending.kind {
            Ok(message.payload)
        } else {
            return Err(Fatal::WrongType {
                expected: pending.kind,
                found: header.kind,
            });
        };
        self.counters.replies = self.counters.replies.saturating_add(1);
        self.outstanding = self.outstanding.saturating_sub(1);
        self.silence = Duration::ZERO;
        if pending.abandoned {
            self.pending.remove(&header.request);
        } else {
            pending.state = State::Done(reply);
            self.news = true;
        }
        Ok(())
    }

    fn note_event(&mut self, payload: &[u8]) {
        let watch = wire::watch_event(payload).and_then(|(path, token)| {
            let id = token.parse::<u32>().ok()?;
            Some((path, self.watches.get_mut(&id)?))
        });
        let Some((path, watch)) = watch else {
            self.counters.stray_events = self.counters.stray_events.saturating_add(1);
            return;
        };
        self.counters.watch_events = self.counters.watch_events.saturating_add(1);
        self.news |= watch.dirty == Dirty::Clean;
        watch.note(path);
    }

    /// Counts how long a reply has been due. A gap between two calls counts little: the whole domain may have
    /// been paused.
    fn watch_silence(&mut self, now: Time) -> Result<(), Fatal> {
        let gap = self
            .last_pump
            .map_or(Duration::ZERO, |last| now.since(last));
        self.last_pump = Some(now);
        if self.outstanding == 0 {
            self.silence = Duration::ZERO;
            return Ok(());
        }
        self.silence = self.silence.saturating_add(gap.min(SILENCE_STEP));
        if self.silence >= SILENCE_LIMIT {
            Err(Fatal::Silence)
        } else {
            Ok(())
        }
    }

    /// When [`Client::pump`] must be called even if nothing arrives: while a reply is due.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        (self.outstanding > 0).then(|| self.last_pump.unwrap_or_default().plus(SILENCE_CHECK))
    }

    /// Whether nothing is queued or outstanding.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.outstanding == 0
    }

    /// Watches held.
    #[must_use]
    pub fn watch_count(&self) -> usize {
        self.watches.len()
    }

    /// Requests sent and not yet answered.
    #[must_use]
    pub const fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// What was done so far.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }
}

impl Watch {
    fn note(&mut self, path: &str) {
        let dirty = core::mem::take(&mut self.dirty);
        self.dirty = match dirty {
            _ if !self.hints || path.len() > MAX_HINT_LEN => Dirty::Anything,
            Dirty::Anything => Dirty::Anything,
            Dirty::Clean => Dirty::Paths(Vec::from([path.to_owned()])),
            Dirty::Paths(paths) if paths.iter().any(|known| known == path) => Dirty::Paths(paths),
            Dirty::Paths(paths) if paths.len() >= MAX_HINTS => Dirty::Anything,
            Dirty::Paths(mut paths) => {
                paths.push(path.to_owned());
                Dirty::Paths(paths)
            }
        };
    }
}
