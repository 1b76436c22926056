//! The protocol on one connection after another.
//!
//! ```text
//! connected -> ask for the dump -> entries ... -> end of dump -> READY: writes, removals, answers
//! ```
//!
//! The dump is asked for at once and the connection is never given up before its end: dom0's daemon takes that for
//! the death of the domain and exits. A second dump on a connection is just as fatal, so there is no way to ask
//! for one; to start over, the connection is made again.

use alloc::vec::Vec;

use xen::stream::{ByteStream, StreamError};

use super::message::{self, Header, Kind};
use super::outbox::{Outbox, WriteError};
use super::receiver::Receiver;
use crate::vchan::channels::Activity;

/// Bytes that may wait to be sent. An acknowledgement that does not fit is left out, which dom0 tolerates.
pub const SEND_BUFFER: usize = 8192;
/// Our own operations join what waits only below this, so that they leave room for acknowledgements.
const OWN_SHARE: usize = 1024;
/// Messages handled in one call, so that others get their turn.
const MESSAGES_PER_CALL: u32 = 256;

/// Who keeps the keys. Called in the order of dom0's changes.
pub trait Sink {
    /// A dump begins: collect its entries apart from the keys in force. An unfinished earlier dump is void.
    fn dump_started(&mut self);
    /// A key has this value, which is empty, any bytes, or [`super::OVERSIZE_VALUE`]. Part of the dump between
    /// [`Sink::dump_started`] and [`Sink::dump_ended`].
    fn written(&mut self, path: &str, value: &[u8]);
    /// A key was removed, or everything below it when `path` ends with `/`.
    fn removed(&mut self, path: &str);
    /// The dump is whole: its keys replace all others.
    fn dump_ended(&mut self);
}

/// What happened, since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Dumps begun.
    pub dumps_started: u64,
    /// Dumps that arrived whole.
    pub dumps: u64,
    /// Entries in dumps.
    pub entries: u64,
    /// Writes that dom0 pushed.
    pub writes: u64,
    /// Removals that dom0 pushed.
    pub removals: u64,
    /// Operations of ours that dom0 carried out.
    pub carried_out: u64,
    /// Operations of ours that dom0 refused.
    pub refused: u64,
    /// Values beyond the limit.
    pub oversize: u64,
    /// Messages that make no sense where they came: skipped.
    pub unexpected: u64,
    /// Acknowledgements left out for want of room.
    pub unacknowledged: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Disconnected,
    Syncing,
    Ready,
}

/// The VM's side of QubesDB.
#[derive(Debug)]
pub struct Client {
    state: State,
    receiver: Receiver,
    outbox: Outbox,
    /// Bytes to send; the first `sent` of them were.
    send: Vec<u8>,
    sent: usize,
    counters: Counters,
    /// Something strange was logged on this connection.
    complained: bool,
}

impl Client {
    /// A client without a connection.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            state: State::Disconnected,
            receiver: Receiver::new(),
            outbox: Outbox::new(),
            send: Vec::new(),
            sent: 0,
            counters: Counters {
                dumps_started: 0,
                dumps: 0,
                entries: 0,
                writes: 0,
                removals: 0,
                carried_out: 0,
                refused: 0,
                oversize: 0,
                unexpected: 0,
                unacknowledged: 0,
            },
            complained: false,
        }
    }

    /// A new connection: asks for the dump.
    pub fn connected(&mut self, sink: &mut impl Sink) {
        self.disconnected();
        self.complained = false;
        message::push_dump_request(&mut self.send);
        self.state = State::Syncing;
        self.counters.dumps_started = self.counters.dumps_started.wrapping_add(1);
        sink.dump_started();
    }

    /// The connection is over. The keys stay as they are.
    pub fn disconnected(&mut self) {
        self.state = State::Disconnected;
        self.receiver = Receiver::new();
        self.send.clear();
        self.sent = 0;
        self.outbox.disconnected();
    }

    /// Whether the dump of this connection is whole.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.state == State::Ready
    }

    /// Whether something was written since the last poll that could be sent at once.
    #[must_use]
    pub fn wants_poll(&self) -> bool {
        self.is_ready() && self.send.is_empty() && self.outbox.can_send()
    }

    /// What happened so far.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// Our own writes and removals.
    #[must_use]
    pub const fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// Writes a key of ours, now or when a connection is ready; dom0 forgets it when this domain ends.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; nothing was taken.
    pub fn write(&mut self, path: &str, value: &[u8]) -> Result<(), WriteError> {
        self.outbox.write(path, value)
    }

    /// Removes everything below a directory of ours, if dom0 holds anything there when the turn comes.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; nothing was taken.
    pub fn remove_below(&mut self, directory: &str) -> Result<(), WriteError> {
        self.outbox.remove_below(directory)
    }

    /// Sends what fits and handles what has arrived.
    ///
    /// # Errors
    ///
    /// The stream is over or has lost its step: close it and call [`Client::disconnected`].
    pub fn poll<S: ByteStream>(
        &mut self,
        stream: &mut S,
        sink: &mut impl Sink,
    ) -> Result<Activity, StreamError> {
        if self.state == State::Disconnected {
            return Err(StreamError);
        }
        let mut handled = 0;
        while handled < MESSAGES_PER_CALL {
            let may_close = self.state == State::Ready;
            let Some(message) = self.receiver.next(stream, may_close)? else {
                break;
            };
            handled = handled.wrapping_add(1);
            let header = message.header;
            Handler {
                state: &mut self.state,
                outbox: &mut self.outbox,
                counters: &mut self.counters,
                send: &mut self.send,
                complained: &mut self.complained,
            }
            .handle(&header, message.value, sink);
        }
        self.flush(stream)?;
        Ok(Activity {
            more: handled == MESSAGES_PER_CALL,
            deadline: None,
        })
    }

    /// Sends until nothing is left or the ring is full.
    fn flush<S: ByteStream>(&mut self, stream: &mut S) -> Result<(), StreamError> {
        loop {
            if self.state == State::Ready {
                self.outbox.send(&mut self.send, OWN_SHARE);
            }
            let rest = self.send.get(self.sent..).unwrap_or_default();
            if rest.is_empty() {
                self.send.clear();
                self.sent = 0;
                return Ok(());
            }
            let written = stream.write(rest)?;
            if written == 0 {
                // Room for later acknowledgements is made here, so that the buffer's length is what waits.
                self.send.drain(..self.sent.min(self.send.len()));
                self.sent = 0;
                return Ok(());
            }
            self.sent = self.sent.saturating_add(written);
        }
    }
}

impl Default for Client {
    fn default() -> Self {
        Self::new()
    }
}

/// The parts of a client that a message changes.
struct Handler<'a> {
    state: &'a mut State,
    outbox: &'a mut Outbox,
    counters: &'a mut Counters,
    send: &'a mut Vec<u8>,
    complained: &'a mut bool,
}

impl Handler<'_> {
    fn handle(&mut self, header: &Header, value: &[u8], sink: &mut impl Sink) {
        let Some(path) = header.path() else {
            return self.skip(header, "a path that is no text");
        };
        if value == super::OVERSIZE_VALUE {
            bump(&mut self.counters.oversize);
            self.complain(header, "a value that is too long");
        }
        match (header.kind, *self.state) {
            (Kind::Entry, State::Syncing) if path.is_empty() => {
                *self.state = State::Ready;
                bump(&mut self.counters.dumps);
                self.outbox.dump_ended();
                sink.dump_ended();
            }
            (Kind::Entry, State::Syncing) => {
                bump(&mut self.counters.entries);
                self.outbox.dumped(path);
                sink.written(path, value);
            }
            // dom0 pushes nothing before the end of the dump; if another version did, it would belong to the dump.
            (Kind::Write, state) if !path.is_empty() => {
                bump(&mut self.counters.writes);
                if state == State::Syncing {
                    self.outbox.dumped(path);
                } else {
                    self.outbox.pushed(path);
                }
                sink.written(path, value);
                self.acknowledge(path);
            }
            (Kind::Remove, _) if !path.is_empty() => {
                bump(&mut self.counters.removals);
                self.outbox.removed(path);
                sink.removed(path);
                self.acknowledge(path);
            }
            (Kind::Ok, State::Ready) if self.outbox.answered(path, true) => {
                bump(&mut self.counters.carried_out);
            }
            (Kind::Error, State::Ready) if self.outbox.answered(path, false) => {
                bump(&mut self.counters.refused);
                self.complain(header, "our operation was refused");
            }
            _ => self.skip(header, "nothing that belongs here"),
        }
    }

    fn skip(&mut self, header: &Header, why: &str) {
        bump(&mut self.counters.unexpected);
        self.complain(header, why);
    }

    /// Logs the first strange thing on a connection.
    fn complain(&mut self, header: &Header, why: &str) {
        if !core::mem::replace(self.complained, true) {
            let (kind, path) = (header.kind, header.path().unwrap_or_default());
            xen::warn!("qubesdb: {kind} \"{path}\": {why}; further ones are counted only");
        }
    }

    fn acknowledge(&mut self, path: &str) {
        if self.send.len() < SEND_BUFFER {
            message::push_acknowledgement(self.send, path);
        } else {
            bump(&mut self.counters.unacknowledged);
        }
    }
}

const fn bump(counter: &mut u64) {
    *counter = counter.wrapping_add(1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qubesdb::message::HEADER;
    use crate::vchan::pipes::{End, pipes};
    use alloc::format;
    use alloc::string::String;

    /// Writes down what it is told.
    #[derive(Default)]
    struct Log(Vec<String>);

    impl Sink for Log {
        fn dump_started(&mut self) {
            self.0.push("start".into());
        }
        fn written(&mut self, path: &str, value: &[u8]) {
            self.0.push(format!("{path}={}", value.escape_ascii()));
        }
        fn removed(&mut self, path: &str) {
            self.0.push(format!("-{path}"));
        }
        fn dump_ended(&mut self) {
            self.0.push("end".into());
        }
    }

    fn message(kind: u8, path: &str, value: &[u8]) -> Vec<u8> {
        let mut bytes = [0xaa; HEADER];
        bytes[0] = kind;
        bytes[1..=path.len()].copy_from_slice(path.as_bytes());
        bytes[1 + path.len()] = 0;
        bytes[68..].copy_from_slice(&u32::try_from(value.len()).unwrap().to_le_bytes());
        bytes.iter().chain(value).copied().collect()
    }

    /// A client that has its (empty) dump.
    fn ready(capacity: usize) -> (Client, End, End, Log) {
        let (mut dom0, mut ours) = pipes(capacity);
        let mut client = Client::new();
        let mut log = Log::default();
        client.connected(&mut log);
        client.poll(&mut ours, &mut log).unwrap();
        assert_eq!(dom0.take().len(), HEADER);
        dom0.put(&message(11, "", b""));
        client.poll(&mut ours, &mut log).unwrap();
        assert!(client.is_ready());
        log.0.clear();
        (client, dom0, ours, log)
    }

    #[test]
    fn q6_the_dump_is_asked_for_before_anything_else() {
        let (mut dom0, mut ours) = pipes(4096);
        let mut client = Client::new();
        let mut log = Log::default();
        client.write("/dns/a/x", b"1").unwrap();
        client.connected(&mut log);
        client.poll(&mut ours, &mut log).unwrap();
        let mut request = [0; HEADER];
        request[0] = 2;
        assert_eq!(dom0.take(), request);
        dom0.put(&message(11, "/b", b"2"));
        dom0.put(&message(11, "/a", b""));
        client.poll(&mut ours, &mut log).unwrap();
        assert!(
            dom0.take().is_empty(),
            "our writes wait for the end of the dump"
        );
        dom0.put(&message(11, "", b""));
        client.poll(&mut ours, &mut log).unwrap();
        assert_eq!(log.0, ["start", "/b=2", "/a=", "end"]);
        assert_eq!(dom0.take()[..10], *b"\x01/dns/a/x\0");
    }

    #[test]
    fn pushes_are_acknowledged_with_their_own_path() {
        let (mut client, mut dom0, mut ours, mut log) = ready(4096);
        dom0.put(&message(4, "/qubes-firewall/10.137.0.9/", b""));
        dom0.put(&message(1, "/qubes-firewall/10.137.0.9", b""));
        client.poll(&mut ours, &mut log).unwrap();
        assert_eq!(
            log.0,
            [
                "-/qubes-firewall/10.137.0.9/",
                "/qubes-firewall/10.137.0.9="
            ]
        );
        let answers = dom0.take();
        assert_eq!(answers.len(), 2 * HEADER);
        assert_eq!(&answers[..29], b"\x07/qubes-firewall/10.137.0.9/\0");
        assert_eq!(
            &answers[HEADER..HEADER + 28],
            b"\x07/qubes-firewall/10.137.0.9\0"
        );
    }

    #[test]
    fn q3_messages_of_unexpected_types_are_skipped_with_their_payload() {
        let (mut client, mut dom0, mut ours, mut log) = ready(1 << 20);
        for kind in (0..=255u8).filter(|kind| ![1, 4].contains(kind)) {
            dom0.put(&message(kind, "/some/path", b"payload"));
        }
        dom0.put(&message(1, "/after", b"1"));
        while client.poll(&mut ours, &mut log).unwrap().more {}
        assert_eq!(log.0, ["/after=1"]);
        assert_eq!(client.counters().unexpected, 254);
    }

    #[test]
    fn q3_any_header_bytes_are_survived() {
        let (mut client, mut dom0, mut ours, mut log) = ready(1 << 20);
        let mut state = 7u32;
        for _ in 0..5000 {
            let mut bytes = [0u8; HEADER];
            for byte in &mut bytes {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = state.to_be_bytes()[0];
            }
            bytes[70..].fill(0);
            bytes[69] &= 0x0f;
            dom0.put(&bytes);
        }
        while client
            .poll(&mut ours, &mut log)
            .is_ok_and(|activity| activity.more)
        {}
    }

    #[test]
    fn q5_a_dom0_that_does_not_read_never_stops_us_from_reading() {
        let (mut client, mut dom0, mut ours, mut log) = ready(4096);
        for number in 0..2000 {
            dom0.put(&message(
                1,
                "/connected-ips",
                format!("{number}").as_bytes(),
            ));
        }
        while client.poll(&mut ours, &mut log).unwrap().more {}
        assert_eq!(log.0.len(), 2000);
        assert!(client.counters().unacknowledged > 1700);
        assert!(
            client.send.len() <= SEND_BUFFER + HEADER,
            "what waits is bounded"
        );
        assert_eq!(
            dom0.take().len(),
            4096,
            "the ring was full of acknowledgements"
        );
        // Once dom0 reads again, what was begun is finished and the next push is acknowledged.
        let mut total = 4096;
        for _ in 0..4 {
            client.poll(&mut ours, &mut log).unwrap();
            total += dom0.take().len();
        }
        assert_eq!(total % HEADER, 0);
        dom0.put(&message(1, "/name", b"fw"));
        client.poll(&mut ours, &mut log).unwrap();
        assert_eq!(dom0.take().len(), HEADER);
    }

    #[test]
    fn q4_the_end_of_the_stream_is_an_error_and_a_new_connection_starts_over() {
        let (mut client, dom0, mut ours, mut log) = ready(4096);
        client.write("/dns/a/x", b"1").unwrap();
        drop(dom0);
        assert!(client.poll(&mut ours, &mut log).is_err());
        client.disconnected();
        assert!(!client.is_ready());
        let (mut dom0, mut ours) = pipes(4096);
        client.connected(&mut log);
        client.poll(&mut ours, &mut log).unwrap();
        assert_eq!(dom0.take()[0], 2);
        dom0.put(&message(11, "", b""));
        client.poll(&mut ours, &mut log).unwrap();
        assert_eq!(
            dom0.take()[..10],
            *b"\x01/dns/a/x\0",
            "not answered, so sent again"
        );
    }

    #[test]
    fn oversize_values_arrive_as_something_that_no_parser_takes() {
        let (mut client, mut dom0, mut ours, mut log) = ready(4096);
        dom0.put(&message(1, "/qubes-firewall/10.0.0.1/0000", &[b'a'; 5000]));
        client.poll(&mut ours, &mut log).unwrap();
        assert_eq!(log.0, ["/qubes-firewall/10.0.0.1/0000=\\x00"]);
        assert_eq!(client.counters().oversize, 1);
    }
}
