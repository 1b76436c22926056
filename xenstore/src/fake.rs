//! A xenstored for host tests: nodes with owners, watches, transactions, quotas, and links of any chunking.
//!
//! It follows the C daemon where our code could notice: a write fires watches before its reply, identical events that
//! are still queued are merged, creating nodes needs write access to the parent, removal fires for the removed
//! node and exactly-watched ones below it, transactions conflict when a node that they touched changed. Everything
//! runs inside [`FakeLink`]'s methods, so tests decide the order of all that happens.
//!
//! For tests only: it panics on misuse.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use xen::DomId;
use xen::stream::{ByteStream, StreamError};

mod daemon;
mod toolstack;
mod tree;

use daemon::Daemon;
pub use toolstack::{FakeBackend, FakeFrontend, Toolstack, VifConfig};
pub use tree::Access;

/// A handle to the fake daemon, with dom0's powers.
#[derive(Clone, Default)]
pub struct FakeStore {
    daemon: Rc<RefCell<Daemon>>,
}

impl FakeStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a domain's home as libxl does, with the folders that the domain may write.
    pub fn introduce(&self, domain: DomId) {
        let home = format!("/local/domain/{domain}");
        self.create(&home, "", domain, &[(domain, Access::Read)], Access::None);
        // The home itself is dom0's; the domain may read it.
        self.set_owner(&home, DomId::DOM0);
        self.write(&format!("{home}/name"), &format!("domain-{domain}"));
        self.write(&format!("{home}/memory/target"), "16384");
        self.write(&format!("{home}/control"), "");
        self.write(&format!("{home}/device"), "");
        for folder in [
            "data",
            "drivers",
            "error",
            "control/shutdown",
            "control/feature-poweroff",
            "control/feature-reboot",
            "control/sysrq",
        ] {
            self.create(&format!("{home}/{folder}"), "", domain, &[], Access::None);
        }
    }

    /// Connects a domain.
    #[must_use]
    pub fn connect(&self, domain: DomId) -> FakeLink {
        self.daemon.borrow_mut().connect(domain.0);
        FakeLink {
            daemon: Rc::clone(&self.daemon),
            domain: domain.0,
            chunking: Chunking::Whole,
            inbox: VecDeque::new(),
            broken: false,
        }
    }

    /// Creates or overwrites a node with these permissions. Parents that are missing inherit theirs.
    pub fn create(
        &self,
        path: &str,
        value: &str,
        owner: DomId,
        readers: &[(DomId, Access)],
        others: Access,
    ) {
        let readers: Vec<_> = readers
            .iter()
            .map(|&(domain, access)| (domain.0, access))
            .collect();
        self.daemon
            .borrow_mut()
            .create(path, value.as_bytes(), owner.0, &readers, others);
    }

    fn set_owner(&self, path: &str, owner: DomId) {
        self.daemon.borrow_mut().set_owner(path, owner.0);
    }

    /// Writes a node as dom0.
    pub fn write(&self, path: &str, value: &str) {
        self.write_bytes(path, value.as_bytes());
    }

    /// Writes a node as dom0.
    pub fn write_bytes(&self, path: &str, value: &[u8]) {
        self.daemon
            .borrow_mut()
            .write(0, path, value)
            .unwrap_or_else(|error| panic!("{path}: {error}"));
    }

    /// Writes a node as any domain; whether that was allowed.
    pub fn write_as(&self, domain: DomId, path: &str, value: &[u8]) -> bool {
        self.daemon
            .borrow_mut()
            .write(domain.0, path, value)
            .is_ok()
    }

    /// Removes a node as any domain; whether that was allowed.
    pub fn remove_as(&self, domain: DomId, path: &str) -> bool {
        self.daemon.borrow_mut().remove(domain.0, path).is_ok()
    }

    /// Removes a node as dom0; whether its parent existed.
    pub fn remove(&self, path: &str) -> bool {
        self.remove_as(DomId::DOM0, path)
    }

    /// Carries out several changes of dom0 at once: their events fire together at the end.
    pub fn atomically(&self, changes: impl FnOnce(&Self)) {
        self.daemon.borrow_mut().hold_events();
        changes(self);
        self.daemon.borrow_mut().release_events();
    }

    /// A node's value as text.
    #[must_use]
    pub fn read(&self, path: &str) -> Option<String> {
        let value = self.daemon.borrow().tree.value(path)?.to_vec();
        Some(String::from_utf8_lossy(&value).into_owned())
    }

    /// Whether a node exists.
    #[must_use]
    pub fn exists(&self, path: &str) -> bool {
        self.read(path).is_some()
    }

    /// The names of a node's children.
    #[must_use]
    pub fn list(&self, path: &str) -> Vec<String> {
        self.daemon.borrow().tree.children(path)
    }

    /// All paths, for comparing a before with an after.
    #[must_use]
    pub fn all_paths(&self) -> Vec<String> {
        self.daemon.borrow().tree.paths()
    }

    /// Watches that a domain holds.
    #[must_use]
    pub fn watches(&self, domain: DomId) -> usize {
        self.daemon.borrow().connection(domain.0).watches.len()
    }

    /// Transactions that a domain has open.
    #[must_use]
    pub fn transactions(&self, domain: DomId) -> usize {
        self.daemon.borrow().connection(domain.0).transactions.len()
    }

    /// Requests that a domain has made.
    #[must_use]
    pub fn requests(&self, domain: DomId) -> u64 {
        self.daemon.borrow().connection(domain.0).requests
    }

    /// The most requests of a domain that were ever unanswered or not yet delivered at a time.
    #[must_use]
    pub fn most_outstanding(&self, domain: DomId) -> usize {
        self.daemon.borrow().connection(domain.0).most_outstanding
    }

    /// Bytes and events waiting to be read by a domain.
    #[must_use]
    pub fn undelivered(&self, domain: DomId) -> usize {
        self.daemon.borrow().connection(domain.0).outbox.len()
    }

    /// Nodes that a domain owns.
    #[must_use]
    pub fn owned(&self, domain: DomId) -> usize {
        self.daemon.borrow().tree.owned(domain.0)
    }

    /// What was written, as (domain, path, value), since this was asked last.
    pub fn take_journal(&self) -> Vec<(DomId, String, String)> {
        let journal = std::mem::take(&mut self.daemon.borrow_mut().journal);
        journal
            .into_iter()
            .map(|(domain, path, value)| (DomId(domain), path, value))
            .collect()
    }

    /// Watches that each domain may hold. The default is the C daemon's.
    pub fn set_watch_quota(&self, quota: usize) {
        self.daemon.borrow_mut().watch_quota = quota;
    }

    /// Nodes that each domain may own. The default is the C daemon's.
    pub fn set_node_quota(&self, quota: usize) {
        self.daemon.borrow_mut().node_quota = quota;
    }

    /// Stops (or lets go on) handling requests.
    pub fn freeze(&self, frozen: bool) {
        self.daemon.borrow_mut().frozen = frozen;
    }

    /// Requests handled in one call of a link's method; none means all.
    pub fn set_pace(&self, pace: Option<usize>) {
        self.daemon.borrow_mut().pace = pace;
    }

    /// Whether the first event of a watch is queued before the reply to the watch, instead of after.
    pub fn set_event_before_watch_reply(&self, before: bool) {
        self.daemon.borrow_mut().event_first = before;
    }

    /// Refuses the next request of this type whose path ends so, with this error name.
    pub fn fail_next(&self, kind: u32, path_end: &str, error: &'static str) {
        self.daemon
            .borrow_mut()
            .faults
            .push_back((kind, path_end.to_owned(), error));
    }

    /// Forgets refusals that were asked for and have not happened.
    pub fn clear_faults(&self) {
        self.daemon.borrow_mut().faults.clear();
    }

    /// Calls back before each request is handled: with its type and absolute path, and dom0's powers.
    pub fn on_request(&self, hook: impl FnMut(&Self, u32, &str) + 'static) {
        self.daemon.borrow_mut().hook = Some(Box::new(hook));
    }

    /// Puts raw bytes into a domain's stream.
    pub fn inject(&self, domain: DomId, bytes: &[u8]) {
        self.daemon
            .borrow_mut()
            .connection_mut(domain.0)
            .outbox
            .push_back(bytes.to_vec());
    }

    /// A domain is destroyed: its home vanishes.
    pub fn destroy(&self, domain: DomId) {
        self.remove(&format!("/local/domain/{domain}"));
    }
}

/// How many bytes a link moves in one call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Chunking {
    /// As many as asked for, and as the ring holds.
    Whole,
    /// At most this many.
    Bytes(usize),
    /// A random number, also none, from this seed.
    Random(u64),
}

/// One domain's end of the connection.
pub struct FakeLink {
    daemon: Rc<RefCell<Daemon>>,
    domain: u16,
    chunking: Chunking,
    inbox: VecDeque<u8>,
    broken: bool,
}

/// Bytes that a ring of the real thing holds in each direction.
const RING_LEN: usize = 1024;

impl FakeLink {
    /// Sets how many bytes are moved in one call.
    pub fn set_chunking(&mut self, chunking: Chunking) {
        self.chunking = chunking;
    }

    /// Makes every later call fail.
    pub fn break_stream(&mut self) {
        self.broken = true;
    }

    fn limit(&mut self, wanted: usize) -> usize {
        match &mut self.chunking {
            Chunking::Whole => wanted.min(RING_LEN),
            Chunking::Bytes(most) => wanted.min(*most),
            Chunking::Random(state) => {
                // xorshift64
                *state ^= *state << 13;
                *state ^= *state >> 7;
                *state ^= *state << 17;
                wanted.min(usize::try_from(*state % 40).unwrap_or(0))
            }
        }
    }

    fn serve(&mut self) {
        let mut handled = 0;
        loop {
            let (frozen, pace) = {
                let daemon = self.daemon.borrow();
                (daemon.frozen, daemon.pace)
            };
            if frozen || pace.is_some_and(|pace| handled >= pace) {
                return;
            }
            let Some(message) = self.next_request() else {
                return;
            };
            handled += 1;
            let hook = self.daemon.borrow_mut().hook.take();
            if let Some(mut hook) = hook {
                let path = Daemon::path_of(self.domain, &message);
                let store = FakeStore {
                    daemon: Rc::clone(&self.daemon),
                };
                hook(&store, message.header.kind, &path);
                let mut daemon = self.daemon.borrow_mut();
                if daemon.hook.is_none() {
                    daemon.hook = Some(hook);
                }
            }
            self.daemon.borrow_mut().handle(self.domain, &message);
        }
    }

    fn next_request(&mut self) -> Option<crate::wire::Message> {
        let mut daemon = self.daemon.borrow_mut();
        let decoder = &mut daemon.connection_mut(self.domain).decoder;
        while !self.inbox.is_empty() {
            let bytes = self.inbox.make_contiguous();
            let mut input = &*bytes;
            let message = decoder
                .feed(&mut input)
                .unwrap_or_else(|error| panic!("{error:?}"));
            let rest = input.len();
            let taken = self.inbox.len() - rest;
            self.inbox.drain(..taken);
            if message.is_some() {
                return message;
            }
        }
        None
    }
}

impl ByteStream for FakeLink {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        if self.broken {
            return Err(StreamError);
        }
        self.serve();
        let limit = self.limit(buffer.len());
        let mut daemon = self.daemon.borrow_mut();
        Ok(daemon
            .connection_mut(self.domain)
            .deliver(&mut buffer[..limit]))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError> {
        if self.broken {
            return Err(StreamError);
        }
        let room = RING_LEN - self.inbox.len();
        let count = self.limit(bytes.len()).min(room);
        self.inbox.extend(&bytes[..count]);
        self.serve();
        Ok(count)
    }
}
