//! The daemon's side of the protocol.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::FakeStore;
use super::tree::{Access, Fired, Tree};
use crate::wire::{Decoder, Header, Message, PAYLOAD_MAX, check_path, kind, strings};

type Hook = Box<dyn FnMut(&FakeStore, u32, &str)>;

pub(super) struct Daemon {
    pub(super) tree: Tree,
    connections: BTreeMap<u16, Connection>,
    pub(super) journal: Vec<(u16, String, String)>,
    pub(super) faults: VecDeque<(u32, String, &'static str)>,
    pub(super) hook: Option<Hook>,
    pub(super) frozen: bool,
    pub(super) pace: Option<usize>,
    pub(super) event_first: bool,
    pub(super) watch_quota: usize,
    pub(super) node_quota: usize,
    held: Option<Vec<(u16, Vec<u8>)>>,
}

impl Default for Daemon {
    fn default() -> Self {
        Self {
            tree: Tree::default(),
            connections: BTreeMap::new(),
            journal: Vec::new(),
            faults: VecDeque::new(),
            hook: None,
            frozen: false,
            pace: None,
            event_first: false,
            watch_quota: 128,
            node_quota: 1000,
            held: None,
        }
    }
}

/// Transactions that a domain may have open.
const TRANSACTION_QUOTA: usize = 10;

#[derive(Default)]
pub(super) struct Connection {
    pub(super) decoder: Decoder,
    /// Messages to the domain; the first may have been delivered in part.
    pub(super) outbox: VecDeque<Vec<u8>>,
    delivered: usize,
    pub(super) watches: Vec<FakeWatch>,
    pub(super) transactions: BTreeMap<u32, Transaction>,
    next_transaction: u32,
    pub(super) requests: u64,
    pub(super) most_outstanding: usize,
}

pub(super) struct FakeWatch {
    /// Absolute.
    node: String,
    relative: bool,
    token: String,
}

impl FakeWatch {
    fn covers(&self, path: &str, exact: bool) -> bool {
        let rest = path.strip_prefix(self.node.as_str());
        rest.is_some_and(|rest| rest.is_empty() || (!exact && rest.starts_with('/')))
    }
}

pub(super) struct Transaction {
    /// The whole store as this transaction sees it.
    tree: Tree,
    touched: BTreeSet<String>,
    before: Tree,
    changes: Vec<Change>,
}

enum Change {
    Write(String, Vec<u8>),
    Remove(String),
}

impl Connection {
    pub(super) fn deliver(&mut self, buffer: &mut [u8]) -> usize {
        let mut filled = 0;
        while filled < buffer.len()
            && let Some(first) = self.outbox.front()
        {
            let rest = &first[self.delivered..];
            let count = rest.len().min(buffer.len() - filled);
            buffer[filled..filled + count].copy_from_slice(&rest[..count]);
            filled += count;
            self.delivered += count;
            if self.delivered == first.len() {
                self.outbox.pop_front();
                self.delivered = 0;
            }
        }
        filled
    }

    /// Queues an event, unless the same is queued already and not on its way.
    fn queue_event(&mut self, message: Vec<u8>) {
        let on_its_way = usize::from(self.delivered > 0);
        if !self
            .outbox
            .iter()
            .skip(on_its_way)
            .any(|queued| *queued == message)
        {
            self.outbox.push_back(message);
        }
    }
}

fn message(kind: u32, request: u32, transaction: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut bytes = Header {
        kind,
        request,
        transaction,
        len,
    }
    .encode()
    .to_vec();
    bytes.extend_from_slice(payload);
    bytes
}

fn home(domain: u16) -> String {
    format!("/local/domain/{domain}")
}

fn absolute(domain: u16, path: &str) -> String {
    if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("{}/{path}", home(domain))
    }
}

fn text(bytes: &[u8]) -> Result<&str, &'static str> {
    std::str::from_utf8(bytes).map_err(|_| "EINVAL")
}

impl Daemon {
    pub(super) fn connect(&mut self, domain: u16) {
        self.connections.insert(
            domain,
            Connection {
                next_transaction: 1,
                ..Connection::default()
            },
        );
    }

    pub(super) fn connection(&self, domain: u16) -> &Connection {
        &self.connections[&domain]
    }

    pub(super) fn connection_mut(&mut self, domain: u16) -> &mut Connection {
        self.connections.entry(domain).or_default()
    }

    pub(super) fn create(
        &mut self,
        path: &str,
        value: &[u8],
        owner: u16,
        readers: &[(u16, Access)],
        others: Access,
    ) {
        self.write(0, path, value)
            .unwrap_or_else(|error| panic!("{path}: {error}"));
        self.tree.set_permissions(path, owner, readers, others);
    }

    pub(super) fn set_owner(&mut self, path: &str, owner: u16) {
        self.tree.set_owner(path, owner);
    }

    pub(super) fn write(
        &mut self,
        domain: u16,
        path: &str,
        value: &[u8],
    ) -> Result<(), &'static str> {
        check_path(path).map_err(|_| "EINVAL")?;
        let fired = self.tree.write(domain, path, value, self.node_quota)?;
        self.journal.push((
            domain,
            path.to_owned(),
            String::from_utf8_lossy(value).into_owned(),
        ));
        // Outside of a transaction only the written node itself fires.
        self.fire(&fired[..1]);
        Ok(())
    }

    pub(super) fn remove(&mut self, domain: u16, path: &str) -> Result<(), &'static str> {
        check_path(path).map_err(|_| "EINVAL")?;
        let fired = self.tree.check_remove(domain, path)?;
        // As in the daemon: events first, while the permissions can still be seen.
        self.fire(&fired);
        self.tree.remove(path);
        Ok(())
    }

    fn fire(&mut self, fired: &[(String, bool)]) {
        let mut events = Vec::new();
        for (path, exact) in fired {
            for (&domain, connection) in &self.connections {
                if !self.tree.may_watch(domain, path) {
                    continue;
                }
                let hit = connection
                    .watches
                    .iter()
                    .filter(|watch| watch.covers(path, *exact));
                events.extend(hit.map(|watch| (domain, event(domain, path, watch))));
            }
        }
        match &mut self.held {
            Some(held) => held.append(&mut events),
            None => self.queue_events(events),
        }
    }

    fn queue_events(&mut self, events: Vec<(u16, Vec<u8>)>) {
        for (domain, event) in events {
            self.connection_mut(domain).queue_event(event);
        }
    }

    pub(super) fn hold_events(&mut self) {
        self.held = Some(Vec::new());
    }

    pub(super) fn release_events(&mut self) {
        let held = self.held.take().unwrap_or_default();
        self.queue_events(held);
    }

    /// The absolute path that a request is about, or nothing.
    pub(super) fn path_of(domain: u16, message: &Message) -> String {
        let path = strings(&message.payload).next().unwrap_or_default();
        absolute(domain, &String::from_utf8_lossy(path))
    }

    pub(super) fn handle(&mut self, domain: u16, request: &Message) {
        let header = request.header;
        let path = Self::path_of(domain, request);
        let fault = self
            .faults
            .iter()
            .position(|(kind, end, _)| *kind == header.kind && path.ends_with(end.as_str()));
        let reply = match fault.and_then(|at| self.faults.remove(at)) {
            Some((_, _, error)) => {
                // Whatever it answers, the daemon has ended the transaction.
                if header.kind == kind::TRANSACTION_END {
                    self.connection_mut(domain)
                        .transactions
                        .remove(&header.transaction);
                }
                Err(error)
            }
            None => self.carry_out(domain, request),
        };
        let connection = self.connection_mut(domain);
        connection.requests += 1;
        let (kind, payload) = match reply {
            Ok(payload) => (header.kind, payload),
            Err(error) => (kind::ERROR, format!("{error}\0").into_bytes()),
        };
        let reply = message(kind, header.request, header.transaction, &payload);
        let late_event = connection
            .watches
            .last()
            .filter(|_| header.kind == kind::WATCH && kind == kind::WATCH);
        let late_event = late_event.map(|watch| event(domain, &watch.node.clone(), watch));
        match late_event {
            Some(event) if self.event_first => {
                let connection = self.connection_mut(domain);
                connection.queue_event(event);
                connection.outbox.push_back(reply);
            }
            Some(event) => {
                let connection = self.connection_mut(domain);
                connection.outbox.push_back(reply);
                connection.queue_event(event);
            }
            None => self.connection_mut(domain).outbox.push_back(reply),
        }
        let connection = self.connection_mut(domain);
        let replies = connection
            .outbox
            .iter()
            .filter(|queued| queued[0..4] != kind::WATCH_EVENT.to_le_bytes());
        connection.most_outstanding = connection.most_outstanding.max(replies.count());
    }

    fn carry_out(&mut self, domain: u16, request: &Message) -> Result<Vec<u8>, &'static str> {
        let id = request.header.transaction;
        let mut words = strings(&request.payload);
        let first = words.next().unwrap_or_default();
        let path = || -> Result<String, &'static str> {
            let path = text(first)?;
            check_path(path).map_err(|_| "EINVAL")?;
            Ok(absolute(domain, path))
        };
        if id != 0 && !self.connection(domain).transactions.contains_key(&id) {
            return Err("ENOENT");
        }
        let ok = || Ok(b"OK\0".to_vec());
        match request.header.kind {
            kind::READ => {
                let path = path()?;
                self.view(domain, id, &path)
                    .read(domain, &path)
                    .map(<[u8]>::to_vec)
            }
            kind::DIRECTORY => {
                let list = self.list(domain, id, &path()?)?;
                if list.len() > PAYLOAD_MAX {
                    Err("E2BIG")
                } else {
                    Ok(list)
                }
            }
            kind::DIRECTORY_PART => {
                let path = path()?;
                let offset: usize = text(words.next().ok_or("EINVAL")?)?
                    .parse()
                    .map_err(|_| "EINVAL")?;
                self.list_part(domain, id, &path, offset)
            }
            kind::WRITE => {
                let value = request.payload.get(first.len() + 1..).unwrap_or_default();
                self.write_in(domain, id, &path()?, value)?;
                ok()
            }
            kind::MKDIR => {
                let path = path()?;
                if self.view(domain, id, &path).value(&path).is_none() {
                    self.write_in(domain, id, &path, b"")?;
                }
                ok()
            }
            kind::RM => {
                self.remove_in(domain, id, &path()?)?;
                ok()
            }
            kind::SET_PERMS => {
                let path = path()?;
                // `n7` owns; `r0`, `w0` and `b0` may read, write, and both.
                let permission = |word: &[u8]| -> Result<(u8, u16), &'static str> {
                    let (kind, id) = word.split_first().ok_or("EINVAL")?;
                    let id = text(id)?.parse().map_err(|_| "EINVAL")?;
                    Ok((*kind, id))
                };
                let (others, owner) = permission(words.next().ok_or("EINVAL")?)?;
                if others != b'n' {
                    return Err("EINVAL");
                }
                let mut readers = Vec::new();
                for word in words {
                    let (kind, id) = permission(word)?;
                    match kind {
                        b'r' => readers.push((id, Access::Read)),
                        b'b' => readers.push((id, Access::Both)),
                        _ => return Err("EINVAL"),
                    }
                }
                if !self.tree.is_owner(domain, &path) {
                    return Err("EACCES");
                }
                self.tree
                    .set_permissions(&path, owner, &readers, Access::None);
                ok()
            }
            kind::WATCH => {
                let node = path()?;
                let token = text(words.next().ok_or("EINVAL")?)?.to_owned();
                let quota = self.watch_quota;
                let watches = &mut self.connection_mut(domain).watches;
                if watches
                    .iter()
                    .any(|watch| watch.node == node && watch.token == token)
                {
                    return Err("EEXIST");
                }
                if watches.len() >= quota {
                    return Err("E2BIG");
                }
                watches.push(FakeWatch {
                    node,
                    relative: !first.starts_with(b"/"),
                    token,
                });
                ok()
            }
            kind::UNWATCH => {
                let node = path()?;
                let token = text(words.next().ok_or("EINVAL")?)?;
                let watches = &mut self.connection_mut(domain).watches;
                let at = watches
                    .iter()
                    .position(|watch| watch.node == node && watch.token == token);
                watches.remove(at.ok_or("ENOENT")?);
                ok()
            }
            kind::TRANSACTION_START if id != 0 => Err("EBUSY"),
            kind::TRANSACTION_START => {
                let tree = self.tree.clone();
                let connection = self.connection_mut(domain);
                if connection.transactions.len() >= TRANSACTION_QUOTA {
                    return Err("ENOSPC");
                }
                let id = connection.next_transaction;
                connection.next_transaction += 1;
                let before = tree.clone();
                let transaction = Transaction {
                    tree,
                    before,
                    touched: BTreeSet::new(),
                    changes: Vec::new(),
                };
                connection.transactions.insert(id, transaction);
                Ok(format!("{id}\0").into_bytes())
            }
            kind::TRANSACTION_END => {
                let transaction = self
                    .connection_mut(domain)
                    .transactions
                    .remove(&id)
                    .ok_or("ENOENT")?;
                if first == b"T" {
                    self.commit(domain, transaction)?;
                }
                ok()
            }
            kind::RESET_WATCHES => {
                let connection = self.connection_mut(domain);
                connection.watches.clear();
                connection.transactions.clear();
                ok()
            }
            _ => Err("ENOSYS"),
        }
    }

    /// The store as a request sees it, noting that it looked.
    fn view(&mut self, domain: u16, id: u32, path: &str) -> &Tree {
        if id == 0 {
            return &self.tree;
        }
        let connection = self.connections.entry(domain).or_default();
        match connection.transactions.get_mut(&id) {
            Some(transaction) => {
                transaction.touched.insert(path.to_owned());
                &transaction.tree
            }
            None => &self.tree,
        }
    }

    fn list(&mut self, domain: u16, id: u32, path: &str) -> Result<Vec<u8>, &'static str> {
        let tree = self.view(domain, id, path);
        tree.read(domain, path)?;
        Ok(tree
            .children(path)
            .into_iter()
            .flat_map(|name| (name + "\0").into_bytes())
            .collect())
    }

    fn list_part(
        &mut self,
        domain: u16,
        id: u32,
        path: &str,
        offset: usize,
    ) -> Result<Vec<u8>, &'static str> {
        let list = self.list(domain, id, path)?;
        let generation = self.view(domain, id, path).generation(path).unwrap_or(0);
        let mut part = format!("{generation}\0").into_bytes();
        let rest = list.get(offset..).ok_or("EINVAL")?;
        let mut taken = 0;
        for name in rest.split_inclusive(|&byte| byte == 0) {
            if part.len() + name.len() >= PAYLOAD_MAX {
                break;
            }
            part.extend_from_slice(name);
            taken += name.len();
        }
        if taken == rest.len() {
            part.push(0);
        }
        Ok(part)
    }

    fn write_in(
        &mut self,
        domain: u16,
        id: u32,
        path: &str,
        value: &[u8],
    ) -> Result<(), &'static str> {
        if id == 0 {
            return self.write(domain, path, value);
        }
        let quota = self.node_quota;
        let transaction = self
            .connection_mut(domain)
            .transactions
            .get_mut(&id)
            .ok_or("ENOENT")?;
        let fired = transaction.tree.write(domain, path, value, quota)?;
        transaction
            .touched
            .extend(fired.into_iter().map(|(path, _)| path));
        transaction
            .changes
            .push(Change::Write(path.to_owned(), value.to_vec()));
        Ok(())
    }

    fn remove_in(&mut self, domain: u16, id: u32, path: &str) -> Result<(), &'static str> {
        if id == 0 {
            return self.remove(domain, path);
        }
        let transaction = self
            .connection_mut(domain)
            .transactions
            .get_mut(&id)
            .ok_or("ENOENT")?;
        transaction.tree.check_remove(domain, path)?;
        transaction.tree.remove(path);
        transaction.touched.insert(path.to_owned());
        transaction.changes.push(Change::Remove(path.to_owned()));
        Ok(())
    }

    fn commit(&mut self, domain: u16, transaction: Transaction) -> Result<(), &'static str> {
        let same =
            |path: &String| transaction.before.generation(path) == self.tree.generation(path);
        if !transaction.touched.iter().all(same) {
            return Err("EAGAIN");
        }
        let mut all_fired = Fired::new();
        for change in transaction.changes {
            match change {
                Change::Write(path, value) => {
                    let fired = self.tree.write(domain, &path, &value, self.node_quota)?;
                    self.journal
                        .push((domain, path, String::from_utf8_lossy(&value).into_owned()));
                    // In a transaction parents that got a child count as changed, too.
                    all_fired.extend(fired);
                }
                Change::Remove(path) => {
                    let fired = self.tree.check_remove(domain, &path)?;
                    self.fire(&fired);
                    self.tree.remove(&path);
                }
            }
        }
        let mut seen = BTreeSet::new();
        all_fired.retain(|(path, _)| seen.insert(path.clone()));
        self.fire(&all_fired);
        Ok(())
    }
}

fn event(domain: u16, path: &str, watch: &FakeWatch) -> Vec<u8> {
    let shown = if watch.relative {
        let home = home(domain);
        path.strip_prefix(&home)
            .map_or(path, |path| path.trim_start_matches('/'))
    } else {
        path
    };
    message(
        kind::WATCH_EVENT,
        0,
        0,
        format!("{shown}\0{}\0", watch.token).as_bytes(),
    )
}
