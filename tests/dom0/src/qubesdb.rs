//! The QubesDB daemon of one VM.
//!
//! One thread, blocking sends, and no forgiveness: what ends the real daemon ends this one with a [`Death`], which is
//! a failure of the product. It is checked with real daemons (4.2.10, 4.3.3) in the description of the protocol.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use qubes::vchan::{Channels, Orders, Phase};
use xen::DomId;
use xen::stream::ByteStream;

use crate::wire::{HeaderBuffer, qdb};

/// The vchan port.
const PORT: u32 = 111;

/// What the VM did that ends the daemon for good.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Death {
    /// Closed between connecting and the end of the dump: taken for the death of the domain.
    ClosedBeforeSync,
    /// Asked for a second dump.
    SecondMultiread,
    /// Removed what is not there.
    MissingKey(String),
    /// Wrote a value of this many bytes.
    ValueTooLong(usize),
    /// A path that breaks the rules.
    BadPath(String),
    /// A type that has no place on this link.
    BadType(u8),
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "qubesdb-daemon exits: {self:?}")
    }
}

/// What has happened, for a test to compare.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    /// Connections on which the dump was asked for.
    pub dumps: u64,
    /// Pushes sent.
    pub pushed: u64,
    /// Acknowledgements of pushes.
    pub acknowledged: u64,
    /// Writes of the VM carried out.
    pub written: u64,
    /// Removals of the VM carried out.
    pub removed: u64,
    /// Operations of the VM answered with an error that the daemon survives.
    pub refused: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Nobody is connected.
    Offering,
    /// Connected, and the dump was not asked for.
    Silent,
    /// The dump is being sent.
    Dumping,
    Synced,
}

/// The daemon. `C` is the channel type.
#[derive(Debug)]
pub struct Daemon<C> {
    vm: DomId,
    entries: BTreeMap<String, Vec<u8>>,
    channel: Option<C>,
    state: State,
    received: Vec<u8>,
    /// What is being sent, in the blocking sends of the real daemon: a message each, the dump as one.
    send: VecDeque<Vec<u8>>,
    /// Bytes of the first one that were sent.
    sent: usize,
    /// Something was sent to its end since the last read.
    read_next: bool,
    buffer: HeaderBuffer,
    /// Pushes whose acknowledgement may still come, oldest first.
    unacknowledged: Vec<String>,
    seen: Seen,
    /// Bytes that one poll reads and writes at most: a slow daemon.
    pace: usize,
}

impl<C: ByteStream> Daemon<C> {
    /// A daemon for `vm`, with an empty database.
    #[must_use]
    pub fn new(vm: DomId) -> Self {
        Self {
            vm,
            entries: BTreeMap::new(),
            channel: None,
            state: State::Offering,
            received: Vec::new(),
            send: VecDeque::new(),
            sent: 0,
            read_next: false,
            buffer: HeaderBuffer::default(),
            unacknowledged: Vec::new(),
            seen: Seen::default(),
            pace: usize::MAX,
        }
    }

    /// Makes the daemon slow: so many bytes in either direction per poll.
    pub const fn set_pace(&mut self, bytes: usize) {
        self.pace = bytes;
    }

    /// What has happened so far.
    #[must_use]
    pub const fn seen(&self) -> Seen {
        self.seen
    }

    /// The channel, to wait for it.
    pub const fn channel(&self) -> Option<&C> {
        self.channel.as_ref()
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<&[u8]> {
        self.entries.get(path).map(Vec::as_slice)
    }

    /// Whether the VM has the whole database and everything since.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.state == State::Synced && self.send.is_empty()
    }

    /// Writes a key, as qubesd does, and pushes it.
    pub fn write(&mut self, path: &str, value: &[u8]) {
        self.entries.insert(path.into(), value.into());
        self.push(qdb::WRITE, path, value);
    }

    /// Removes a key, or everything below a path that ends with `/`. Pushed only if there was something.
    pub fn remove(&mut self, path: &str) {
        if self.forget(path) {
            self.push(qdb::RM, path, b"");
        }
    }

    /// Loses the connection, for instance because the process is restarted with its database.
    ///
    /// In the middle of a dump this would be the daemon's own fault, so it waits for its end.
    pub fn disconnect<N: Channels<Channel = C>>(&mut self, channels: &mut N) {
        self.close(channels);
    }

    /// Moves on as far as possible.
    ///
    /// # Errors
    ///
    /// [`Death`]: the VM has done what ends the real daemon.
    pub fn poll<N: Channels<Channel = C>>(&mut self, channels: &mut N) -> Result<(), Death> {
        let Some(channel) = &mut self.channel else {
            self.channel = channels.listen(self.vm, PORT, Orders::PAGES).ok();
            return Ok(());
        };
        if channels.progress(channel) == Phase::Opening {
            return Ok(());
        }
        if self.state == State::Offering {
            self.state = State::Silent;
        }
        let mut pace = [self.pace; 2];
        let outcome = loop {
            match self.step(&mut pace) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(end) => break Err(end),
            }
        };
        if let Some(channel) = &mut self.channel {
            channels.flush(channel);
        }
        match outcome {
            Err(End::Dead(death)) => Err(death),
            Err(End::Closed) if matches!(self.state, State::Silent | State::Dumping) => {
                Err(Death::ClosedBeforeSync)
            }
            Err(End::Closed) => {
                self.close(channels);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Sends or receives something. False when nothing could be done now.
    fn step(&mut self, [to_send, to_read]: &mut [usize; 2]) -> Result<bool, End> {
        let Some(channel) = &mut self.channel else {
            return Ok(false);
        };
        // A blocking send: nothing is read before it is over. Then there is one look at what has arrived.
        let was_sent = core::mem::take(&mut self.read_next);
        if let Some(message) = self.send.front()
            && !was_sent
        {
            let rest = message.get(self.sent..).unwrap_or_default();
            let piece = rest.get(..*to_send).unwrap_or(rest);
            let written = channel.write(piece).map_err(|_| End::Closed)?;
            self.sent += written;
            *to_send -= written.min(*to_send);
            if self.sent == message.len() {
                self.send.pop_front();
                self.sent = 0;
                self.read_next = true;
                if self.state == State::Dumping {
                    self.state = State::Synced;
                }
            }
            return Ok(written > 0);
        }
        let mut buffer = [0; 512];
        let wanted = buffer.len().min(*to_read);
        let place = buffer.get_mut(..wanted).unwrap_or_default();
        let read = channel.read(place).map_err(|_| End::Closed)?;
        *to_read -= read.min(*to_read);
        self.received
            .extend_from_slice(place.get(..read).unwrap_or_default());
        while self.take_message()? {}
        Ok(read > 0 || (!self.send.is_empty() && *to_send > 0 && was_sent))
    }

    /// Handles one whole message. False when none is there.
    fn take_message(&mut self) -> Result<bool, End> {
        let Some(header) = self.received.get(..qdb::HEADER) else {
            return Ok(false);
        };
        let kind = header.first().copied().unwrap_or_default();
        let field = header.get(1..qdb::PATH).unwrap_or_default();
        let path: Vec<u8> = field
            .iter()
            .copied()
            .take_while(|byte| *byte != 0)
            .collect();
        let path = String::from_utf8_lossy(&path).into_owned();
        let len = header.get(68..).map_or(0, |len| crate::wire::word(len, 0));
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        self.verify(kind, &path, len)?;
        let Some(payload) = self.received.get(qdb::HEADER..qdb::HEADER + len) else {
            return Ok(false);
        };
        let payload = payload.to_vec();
        self.received.drain(..qdb::HEADER + len);
        self.handle(kind, &path, &payload)?;
        Ok(true)
    }

    /// What the real daemon checks before it looks at the payload.
    fn verify(&mut self, kind: u8, path: &str, len: usize) -> Result<(), End> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_/.:@-".contains(&byte);
        if !path.bytes().all(allowed) || path.starts_with('-') {
            return Err(Death::BadPath(path.into()).into());
        }
        match kind {
            qdb::WRITE if !path.starts_with('/') || path.ends_with('/') => {
                Err(Death::BadPath(path.into()).into())
            }
            qdb::WRITE if len >= qdb::TOO_LONG => Err(Death::ValueTooLong(len).into()),
            qdb::RM if !path.starts_with('/') => Err(Death::BadPath(path.into()).into()),
            qdb::MULTIREAD if self.state != State::Silent => Err(Death::SecondMultiread.into()),
            qdb::WRITE | qdb::MULTIREAD | qdb::RM | qdb::OK | qdb::ERROR => Ok(()),
            other => Err(Death::BadType(other).into()),
        }
    }

    fn handle(&mut self, kind: u8, path: &str, payload: &[u8]) -> Result<(), End> {
        match kind {
            qdb::MULTIREAD => self.dump(),
            qdb::WRITE if payload.contains(&0) => self.refuse(path),
            qdb::WRITE => {
                self.entries.insert(path.into(), payload.into());
                self.seen.written += 1;
                self.answer(qdb::OK, path);
            }
            qdb::RM if !payload.is_empty() => self.refuse(path),
            qdb::RM => {
                if !self.forget(path) {
                    return Err(Death::MissingKey(path.into()).into());
                }
                self.seen.removed += 1;
                self.answer(qdb::OK, path);
            }
            qdb::OK => {
                // Acknowledgements may be left out, but come in order.
                if let Some(index) = self.unacknowledged.iter().position(|pushed| pushed == path) {
                    self.unacknowledged.drain(..=index);
                    self.seen.acknowledged += 1;
                }
            }
            _ => self.seen.refused += 1,
        }
        Ok(())
    }

    /// The whole database in descending order, then the end marker.
    fn dump(&mut self) {
        self.seen.dumps += 1;
        let mut dump = Vec::new();
        for (path, value) in self.entries.iter().rev() {
            dump.extend(self.buffer.message(qdb::MULTIREAD_ENTRY, path, value));
        }
        dump.extend(self.buffer.message(qdb::MULTIREAD_ENTRY, "", b""));
        self.send.push_back(dump);
        self.state = State::Dumping;
    }

    fn answer(&mut self, kind: u8, path: &str) {
        let message = self.buffer.message(kind, path, b"");
        self.send.push_back(message);
    }

    fn refuse(&mut self, path: &str) {
        self.seen.refused += 1;
        self.answer(qdb::ERROR, path);
    }

    fn push(&mut self, kind: u8, path: &str, value: &[u8]) {
        // What changes during the dump is pushed after it; before it, it is part of it.
        if matches!(self.state, State::Dumping | State::Synced) {
            let message = self.buffer.message(kind, path, value);
            self.send.push_back(message);
            self.unacknowledged.push(path.into());
            self.seen.pushed += 1;
        }
    }

    /// Removes; false when there was nothing.
    fn forget(&mut self, path: &str) -> bool {
        if path.ends_with('/') {
            let before = self.entries.len();
            self.entries.retain(|key, _| !key.starts_with(path));
            self.entries.len() < before
        } else {
            self.entries.remove(path).is_some()
        }
    }

    fn close<N: Channels<Channel = C>>(&mut self, channels: &mut N) {
        if let Some(channel) = self.channel.take() {
            channels.close(channel);
        }
        self.state = State::Offering;
        self.received.clear();
        self.send.clear();
        self.sent = 0;
        self.read_next = false;
        self.unacknowledged.clear();
    }
}

/// Why a poll stopped.
enum End {
    /// The VM closed.
    Closed,
    Dead(Death),
}

impl From<Death> for End {
    fn from(death: Death) -> Self {
        Self::Dead(death)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qubes::vchan::pipes::{Net, PipeChannel, PipeChannels};

    const VM: DomId = DomId(7);

    struct Bench {
        daemon: Daemon<PipeChannel>,
        dom0: PipeChannels,
        vm: PipeChannels,
        channel: PipeChannel,
    }

    fn message(kind: u8, path: &[u8], value: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; qdb::HEADER];
        bytes[0] = kind;
        bytes[1..=path.len()].copy_from_slice(path);
        bytes[68..].copy_from_slice(&u32::try_from(value.len()).unwrap().to_le_bytes());
        bytes.extend(value);
        bytes
    }

    /// A VM that has connected and, if wanted, has the dump.
    fn bench(synced: bool) -> Bench {
        let net = Net::default();
        let (mut dom0, mut vm) = (net.domain(DomId::DOM0), net.domain(VM));
        let mut daemon = Daemon::new(VM);
        daemon.write("/name", b"fw");
        daemon.poll(&mut dom0).unwrap();
        let mut channel = vm.connect(DomId::DOM0, PORT).unwrap();
        assert_eq!(vm.progress(&mut channel), Phase::Open);
        let mut bench = Bench {
            daemon,
            dom0,
            vm,
            channel,
        };
        if synced {
            assert_eq!(bench.send(&message(qdb::MULTIREAD, b"", b"")), Ok(()));
            assert_eq!(bench.read().len(), 72 + 2 + 72);
            assert!(bench.daemon.is_synced());
        }
        bench
    }

    impl Bench {
        fn send(&mut self, bytes: &[u8]) -> Result<(), Death> {
            self.channel.write(bytes).unwrap();
            self.daemon.poll(&mut self.dom0)
        }

        fn read(&mut self) -> Vec<u8> {
            let mut buffer = [0; 8192];
            let read = self.channel.read(&mut buffer).unwrap();
            buffer[..read].to_vec()
        }
    }

    #[test]
    fn the_rows_that_end_the_daemon_end_this_one() {
        let longest = [b"/".as_slice(), &[b'x'; 62]].concat();
        for (bytes, death) in [
            (message(8, b"/name", b""), Death::BadType(8)),
            (message(2, b"", b""), Death::SecondMultiread),
            (
                message(4, b"/missing", b""),
                Death::MissingKey("/missing".into()),
            ),
            (
                message(4, b"/dns/a/", b""),
                Death::MissingKey("/dns/a/".into()),
            ),
            (message(1, b"/a", &[b'v'; 3072]), Death::ValueTooLong(3072)),
            (message(1, b"/a b", b""), Death::BadPath("/a b".into())),
            (message(1, b"a", b""), Death::BadPath("a".into())),
            (message(1, b"/a/", b""), Death::BadPath("/a/".into())),
            (message(0, b"/name", b""), Death::BadType(0)),
            (message(3, b"/name", b""), Death::BadType(3)),
            (message(5, b"/name", b""), Death::BadType(5)),
            (message(10, b"/name", b""), Death::BadType(10)),
        ] {
            assert_eq!(bench(true).send(&bytes), Err(death));
        }
        assert_eq!(
            bench(true).send(&message(1, &longest, &[b'v'; 3071])),
            Ok(())
        );
    }

    #[test]
    fn the_rows_that_it_survives_are_survived() {
        for bytes in [
            message(7, b"/unsolicited", b""),
            message(9, b"/unsolicited", b""),
            message(4, b"/name", b"payload"),
            message(1, b"/a", b"a\0b"),
        ] {
            assert_eq!(bench(true).send(&bytes), Ok(()));
        }
        let mut bench = bench(true);
        assert_eq!(bench.send(&message(1, b"/a", b"1")), Ok(()));
        assert_eq!(bench.read()[..4], *b"\x07/a\0");
        assert_eq!(bench.daemon.get("/a"), Some(&b"1"[..]));
        assert_eq!(bench.send(&message(4, b"/a", b"")), Ok(()));
        assert_eq!(bench.daemon.get("/a"), None);
    }

    #[test]
    fn q6_closing_before_the_end_of_the_dump_ends_the_daemon() {
        let Bench {
            mut daemon,
            mut dom0,
            mut vm,
            channel,
        } = bench(false);
        daemon.poll(&mut dom0).unwrap();
        vm.close(channel);
        assert_eq!(daemon.poll(&mut dom0), Err(Death::ClosedBeforeSync));
        let Bench {
            mut daemon,
            mut dom0,
            mut vm,
            channel,
        } = bench(true);
        vm.close(channel);
        assert_eq!(daemon.poll(&mut dom0), Ok(()));
        daemon.poll(&mut dom0).unwrap();
        assert!(daemon.channel().is_some(), "it offers again");
    }
}
