//! Settings below `vm-data`, watched while we run and delivered as a stream of changes.
//!
//! Keys have the names that QubesDB uses, and values are QubesDB's: `vm-data/qubes-ip` is delivered as
//! `/qubes-ip`. One thing differs: xenstored does not allow `.` and `:` in a path, so an address or MAC that is
//! part of a key is written with `_` for `.` and `-` for `:`. In `vm-data/qubes-firewall/10_137_0_6/0000` the address is
//! delivered as `10.137.0.6`, in `.../fd09-24ef-4179--a89-6/0000` as `fd09:24ef:4179::a89:6`. This concerns the component
//! below `qubes-firewall`, `mapped-ip` and `net-config` and no other.
//!
//! # Order and consistency
//!
//! 1. At start everything is read, then [`ConfigEvent::Ready`] follows. Settings may also all be missing.
//! 2. A single key that changes later is delivered as [`ConfigEvent::Written`] or [`ConfigEvent::Removed`].
//! 3. A rule tree, `qubes-firewall/<address>`, is delivered whole, in QubesDB's order: [`ConfigEvent::Removed`] for
//!    `/qubes-firewall/<address>/` (with the slash: everything below), `Written` for each key in
//!    ascending order, and then the commit marker, `Written` for `/qubes-firewall/<address>` itself. A tree that is
//!    gone ends with `Removed` for `/qubes-firewall/<address>` instead.
//!
//! QubesDB's writer ends a rewrite of a tree with a commit marker. A person with `xenstore-write` does not, so any
//! change in a tree counts as one: after the last change the tree must have been quiet for [`QUIET_PERIOD`] (at most
//! [`QUIET_LIMIT`] after the first), then it is read whole. Should the watch fire again while it is being
//! read, what was read is thrown away and reading starts again: xenstored puts a watch event in front of every
//! reply that could show the change, so a reading without an event is a snapshot. (A transaction would give
//! the same, but the daemon refuses one that touches more than 1,024 nodes, and a tree may have 10,000 rules.)
//!
//! # Bounds
//!
//! [`MAX_KEYS`], [`MAX_KEY_LEN`], [`MAX_VALUE_LEN`] and [`MAX_TREE_BYTES`]; a tree that exceeds one is delivered as
//! [`ConfigEvent::Unusable`], other keys that do are left out with a log line. Re-reading is
//! merged: at most one reading is in flight.

use alloc::collections::{BinaryHeap, VecDeque};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::time::Duration;

use xen::{Time, error, warn};

use crate::MAX_OUTSTANDING;
use crate::client::Dirty;
use crate::control_plane::Event;
use crate::store::{Error, Reply, Store, Watch};
use crate::table::Table;
use crate::wire::ErrorCode;

/// How long a rule tree must have been quiet before it is read.
pub const QUIET_PERIOD: Duration = Duration::from_millis(50);
/// How long changes without a pause may put the reading off.
pub const QUIET_LIMIT: Duration = Duration::from_secs(1);
/// Keys outside of rule trees, and rule trees, that are followed.
pub const MAX_KEYS: usize = 1024;
/// Keys in one rule tree.
pub const MAX_TREE_KEYS: usize = 10_100;
/// Bytes of all keys and values of one rule tree.
pub const MAX_TREE_BYTES: usize = 512 * 1024;
/// Bytes of one delivered key.
pub const MAX_KEY_LEN: usize = 256;
/// Bytes of one value: QubesDB's limit.
pub const MAX_VALUE_LEN: usize = 3072;

/// The folder of rule trees.
const TREES: &str = "qubes-firewall";
/// Folders whose children are named by an address or a MAC.
const ADDRESS_FOLDERS: [&str; 3] = [TREES, "mapped-ip", "net-config"];
/// Levels of folders that are followed.
const MAX_DEPTH: usize = 8;
/// How long to pause before trying again to set the watch.
const WATCH_PAUSE: Duration = Duration::from_secs(5);
/// How long to wait for the event that tells the watch to be set.
const FIRST_EVENT: Duration = Duration::from_secs(1);
/// After how many readings in vain a rule tree that never rests is mentioned in the log.
const RESTLESS: u32 = 16;

/// A change of the settings. Keys start with `/` and are spelled as in QubesDB.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ConfigEvent {
    /// The key has this value now. Also delivered when the value is the same as before.
    Written {
        /// Which key.
        key: String,
        /// Its value: any bytes, at most [`MAX_VALUE_LEN`].
        value: Vec<u8>,
    },
    /// The key is gone; if it ends with `/`, everything below it.
    Removed {
        /// Which key.
        key: String,
    },
    /// A rule tree exists but cannot be read whole (too large, or forbidden): its rules must count as
    /// unusable.
    Unusable {
        /// The tree, `/qubes-firewall/<address>`.
        key: String,
        /// Why.
        reason: &'static str,
    },
    /// Everything that existed at start has been delivered.
    Ready,
}

/// The task that follows the settings. Never ends.
pub(crate) async fn run(store: Store, root: &'static str) {
    let watch = loop {
        match store.watch_paths(root).await {
            Ok(watch) => break watch,
            Err(reason) => error!("{root}: cannot watch: {reason}"),
        }
        store.sleep(WATCH_PAUSE).await;
    };
    let deadline = store.now().plus(FIRST_EVENT);
    store
        .context
        .until(Some(deadline), || watch.is_dirty().then_some(()))
        .await;
    let _ = watch.take();
    let mut reader = Reader::new(store, root, watch);
    reader.read_everything().await;
    reader.check_trees().await;
    reader.read_due_trees(true).await;
    reader.deliver([ConfigEvent::Ready]).await;
    loop {
        reader.turn().await;
    }
}

/// A rule tree that has been delivered, or will be.
#[derive(Clone, Copy, Default)]
struct Tree {
    /// When it changed first and last, since it was read.
    changed: Option<(Time, Time)>,
    /// Readings in vain since it was delivered.
    vain: u32,
}

impl Tree {
    fn touch(&mut self, now: Time) {
        let (first, _) = self.changed.unwrap_or((now, now));
        self.changed = Some((first, now));
    }

    /// When it shall be read.
    fn due(&self) -> Option<Time> {
        self.changed
            .map(|(first, last)| first.plus(QUIET_LIMIT).min(last.plus(QUIET_PERIOD)))
    }
}

/// What a path below the root is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Topic<'a> {
    /// The root itself.
    Everything,
    /// The folder of rule trees.
    Trees,
    /// The rule tree of this address, as it is spelled in the store.
    Tree(&'a str),
    /// Any other key, or folder of keys.
    Plain(&'a str),
}

fn topic<'a>(root: &str, path: &'a str) -> Option<Topic<'a>> {
    let below = path.strip_prefix(root)?;
    if below.is_empty() {
        return Some(Topic::Everything);
    }
    let below = below.strip_prefix('/')?;
    let mut parts = below.split('/');
    Some(match (parts.next(), parts.next()) {
        (Some(TREES), None) => Topic::Trees,
        (Some(TREES), Some(address)) => Topic::Tree(address),
        _ => Topic::Plain(below),
    })
}

/// The key that a path below the root is delivered as.
fn key(below: &str) -> String {
    let mut key = String::with_capacity(below.len().saturating_add(1));
    let mut in_address_folder = false;
    for (position, part) in below.split('/').enumerate() {
        key.push('/');
        if position == 1 && in_address_folder {
            key.extend(part.chars().map(|character| match character {
                '_' => '.',
                '-' => ':',
                other => other,
            }));
        } else {
            key.push_str(part);
        }
        in_address_folder = position == 0 && ADDRESS_FOLDERS.contains(&part);
    }
    key
}

/// All of a rule tree at one moment.
struct Snapshot {
    /// The value of the tree's own node.
    marker: Vec<u8>,
    /// Names and values, ascending.
    rules: Vec<(String, Vec<u8>)>,
}

struct Reader {
    store: Store,
    root: &'static str,
    watch: Watch,
    /// Keys outside of rule trees that were delivered, as spelled in the store below the root.
    keys: Table<String, ()>,
    trees: Table<String, Tree>,
}

impl Reader {
    const fn new(store: Store, root: &'static str, watch: Watch) -> Self {
        Self {
            store,
            root,
            watch,
            keys: Table::new(),
            trees: Table::new(),
        }
    }

    /// Waits for a change, or for a tree to have rested, and delivers what follows from it.
    async fn turn(&mut self) {
        let due = self.trees.values().filter_map(Tree::due).min();
        self.store
            .context
            .until(due, || self.watch.is_dirty().then_some(()))
            .await;
        self.follow_changes().await;
        self.read_due_trees(false).await;
    }

    async fn follow_changes(&mut self) {
        let (mut everything, mut trees, mut plain) = (false, false, Table::new());
        match self.watch.take() {
            Dirty::Clean => {}
            Dirty::Anything => {
                (everything, trees) = (true, true);
                let now = self.store.now();
                self.trees.values_mut().for_each(|tree| tree.touch(now));
            }
            Dirty::Paths(paths) => {
                for path in &paths {
                    match topic(self.root, path) {
                        Some(Topic::Everything) => (everything, trees) = (true, true),
                        Some(Topic::Trees) => trees = true,
                        Some(Topic::Tree(address)) => self.touch(address),
                        Some(Topic::Plain(below)) => plain.insert(below.to_string(), ()),
                        None => {}
                    }
                }
            }
        }
        if everything {
            self.read_everything().await;
        } else {
            for (below, ()) in plain {
                self.read_plain(&below).await;
            }
        }
        if trees {
            self.check_trees().await;
        }
    }

    fn touch(&mut self, address: &str) {
        let now = self.store.now();
        if let Some(tree) = self.trees.get_mut(address) {
            tree.touch(now);
        } else if self.trees.len().saturating_add(self.keys.len()) < MAX_KEYS {
            let mut tree = Tree::default();
            tree.touch(now);
            self.trees.insert(address.to_string(), tree);
        } else {
            warn!(
                "{}: too many keys, ignoring the rules of {address}",
                self.root
            );
        }
    }

    /// Finds trees that are new or gone. One that is known and still there announces its own changes: had it been
    /// removed with its parents and written again, the writing would have caused an event for it.
    async fn check_trees(&mut self) {
        let listed = self.store.list(&self.path(TREES)).await.unwrap_or_default();
        let gone: Vec<String> = self
            .trees
            .keys()
            .filter(|address| !listed.contains(address))
            .cloned()
            .collect();
        let new = listed
            .iter()
            .filter(|address| !self.trees.contains(*address))
            .cloned();
        for address in new.chain(gone).collect::<Vec<_>>() {
            self.touch(&address);
        }
    }

    /// Reads and delivers all keys outside of rule trees.
    async fn read_everything(&mut self) {
        self.read_plain("").await;
    }

    /// Reads and delivers a key and all keys below it.
    async fn read_plain(&mut self, below: &str) {
        let found = self.collect(below).await;
        let below_it = |key: &String| {
            let rest = key.strip_prefix(below);
            below.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let gone: Vec<String> = self
            .keys
            .keys()
            .filter(|key| below_it(key) && !found.contains(*key))
            .cloned()
            .collect();
        for key in &gone {
            self.keys.remove(key);
        }
        let mut events: Vec<ConfigEvent> = gone
            .iter()
            .map(|gone| ConfigEvent::Removed { key: key(gone) })
            .collect();
        for (path, value) in found {
            let known = self.keys.contains(&path);
            if !known && self.keys.len().saturating_add(self.trees.len()) >= MAX_KEYS {
                warn!("{}: too many keys, ignoring {path}", self.root);
                continue;
            }
            events.push(ConfigEvent::Written {
                key: key(&path),
                value,
            });
            self.keys.insert(path, ());
        }
        self.deliver(events).await;
    }

    /// Reads a key and all keys below it, rule trees apart. A folder without a value of its own is no key.
    async fn collect(&self, below: &str) -> Table<String, Vec<u8>> {
        let mut found = Table::new();
        let mut open = VecDeque::from([below.to_string()]);
        while !open.is_empty() && found.len() <= MAX_KEYS {
            // Each node takes two requests; as many at once as may be outstanding.
            let batch = open.len().min(MAX_OUTSTANDING / 2);
            let nodes: Vec<_> = (0..batch)
                .map_while(|_| open.pop_front())
                .map(|below| {
                    let path = self.path(&below);
                    (self.store.read(&path), self.store.list_short(&path), below)
                })
                .collect();
            for (value, children, below) in nodes {
                let (value, children) = (value.await, children.await);
                let children = match children {
                    Err(Error::Refused(ErrorCode::TooBig)) => {
                        self.store.list(&self.path(&below)).await
                    }
                    other => other,
                };
                let children = children.unwrap_or_default();
                if let Ok(value) = value
                    && !below.is_empty()
                    && (!value.is_empty() || children.is_empty())
                {
                    if value.len() > MAX_VALUE_LEN || below.len() >= MAX_KEY_LEN {
                        warn!(
                            "{}: a key or value is too long, ignoring {below:.64}",
                            self.root
                        );
                    } else {
                        found.insert(below.clone(), value);
                    }
                }
                let deep = below.split('/').count() >= MAX_DEPTH;
                let children = children
                    .iter()
                    .filter(|child| !(deep || below.is_empty() && *child == TREES));
                let room = MAX_KEYS.saturating_sub(open.len());
                open.extend(children.take(room).map(|child| join(&below, child)));
            }
        }
        found
    }

    /// Reads and delivers the trees that have rested; at start all of them.
    async fn read_due_trees(&mut self, all: bool) {
        let now = self.store.now();
        let due = |tree: &Tree| tree.due().is_some_and(|due| all || due <= now);
        let due: Vec<String> = self
            .trees
            .iter()
            .filter(|(_, tree)| due(tree))
            .map(|(address, _)| address.clone())
            .collect();
        for address in due {
            self.read_tree(&address).await;
        }
    }

    /// Reads a tree and delivers it, unless it changed meanwhile.
    async fn read_tree(&mut self, address: &str) {
        if let Some(tree) = self.trees.get_mut(address) {
            tree.changed = None;
        }
        let snapshot = self.snapshot(address).await;
        self.follow_changes().await;
        let Some(tree) = self.trees.get_mut(address) else {
            return;
        };
        if tree.changed.is_some() {
            tree.vain = tree.vain.saturating_add(1);
            if tree.vain.checked_rem(RESTLESS) == Some(0) {
                warn!(
                    "{}: the rules of {address} change all the time; the old ones stay",
                    self.root
                );
            }
            return;
        }
        tree.vain = 0;
        let tree_key = key(&join(TREES, address));
        let below = ConfigEvent::Removed {
            key: format!("{tree_key}/"),
        };
        let events = match snapshot {
            Ok(Some(snapshot)) => {
                let written = |(name, value)| ConfigEvent::Written {
                    key: format!("{tree_key}/{name}"),
                    value,
                };
                let rules = snapshot.rules.into_iter().map(written);
                let commit = ConfigEvent::Written {
                    key: tree_key.clone(),
                    value: snapshot.marker,
                };
                [below].into_iter().chain(rules).chain([commit]).collect()
            }
            Ok(None) => {
                self.trees.remove(address);
                Vec::from([below, ConfigEvent::Removed { key: tree_key }])
            }
            Err(reason) => Vec::from([
                below,
                ConfigEvent::Unusable {
                    key: tree_key,
                    reason,
                },
            ]),
        };
        self.deliver(events).await;
    }

    /// Reads a tree whole; `None` when there is none.
    async fn snapshot(&self, address: &str) -> Result<Option<Snapshot>, &'static str> {
        let path = self.path(&join(TREES, address));
        let marker = self.store.read(&path);
        let names = self.store.list(&path).await;
        let marker = marker.await;
        let (marker, names) = match (marker, names) {
            (Err(Error::NOT_FOUND), _) | (_, Err(Error::NOT_FOUND)) => return Ok(None),
            (Ok(marker), Ok(names)) => (marker, names),
            _ => return Err("cannot be read"),
        };
        if names.len() > MAX_TREE_KEYS {
            return Err("too many rules");
        }
        // A heap's code is a tenth of a sort's.
        let names = BinaryHeap::from(names).into_sorted_vec();
        let mut bytes = 0_usize;
        let mut rules = Vec::with_capacity(names.len());
        let mut window: VecDeque<(String, Reply<Vec<u8>>)> = VecDeque::new();
        let mut names = names.into_iter();
        loop {
            while window.len() < MAX_OUTSTANDING
                && let Some(name) = names.next()
            {
                let reply = self.store.read(&format!("{path}/{name}"));
                window.push_back((name, reply));
            }
            let Some((name, reply)) = window.pop_front() else {
                break;
            };
            let value = match reply.await {
                Ok(value) => value,
                // Removed meanwhile: the event that tells so makes us read again.
                Err(Error::NOT_FOUND) => continue,
                Err(_) => return Err("cannot be read"),
            };
            bytes = bytes.saturating_add(name.len()).saturating_add(value.len());
            if value.len() > MAX_VALUE_LEN || name.len() > MAX_KEY_LEN || bytes > MAX_TREE_BYTES {
                return Err("too large");
            }
            rules.push((name, value));
        }
        Ok(Some(Snapshot { marker, rules }))
    }

    fn path(&self, below: &str) -> String {
        join(self.root, below)
    }

    async fn deliver(&self, events: impl IntoIterator<Item = ConfigEvent>) {
        self.store
            .context
            .emit_all(events.into_iter().map(Event::Config))
            .await;
    }
}

fn join(folder: &str, name: &str) -> String {
    match (folder.is_empty(), name.is_empty()) {
        (true, _) => name.to_string(),
        (_, true) => folder.to_string(),
        _ => format!("{folder}/{name}"),
    }
}
