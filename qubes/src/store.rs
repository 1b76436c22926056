//! What dom0 has told us: every key, and which firewall trees are committed.
//!
//! There is no reading over QubesDB's link, only one dump and then a stream of changes, so the VM keeps
//! its own copy. This store takes both (see [`Sink`]) and says what they mean as [`Event`]s.
//!
//! # Commits
//!
//! dom0 rewrites a firewall tree key by key and then writes the bare `/qubes-firewall/<address>`. Only
//! that commits: the tree as it is then replaces the one in force. Before it, and if it never comes, the
//! old one stays. The end of a dump commits every tree in it. A tree that a later dump lacks stays in
//! force too: dom0 never takes one away, so its absence means that dom0's copy was lost.
//!
//! # Trust and bounds
//!
//! dom0 is trusted, but nothing it sends may exhaust memory. The store has a budget in bytes. A rule
//! that does not fit makes its tree [`TreeError::Incomplete`](crate::firewall_tree::TreeError), which
//! blocks that client; any other key that does not fit keeps its old value and is counted. dom0 leaves
//! the trees of clients that went away in place, so [`Store::forget_detached`] must be called when
//! [`Store::is_crowded`]; a forgotten client that comes back is silently dropped until dom0 commits its
//! rules again, which it does at every start of a client.
//!
//! Source: `qubes-policy.md` 1.1 to 1.4.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use core::fmt;
use core::net::{IpAddr, Ipv4Addr};

use litemap::LiteMap;

use crate::address_text::{AddressText, family, parse_canonical, parse_ipv4};
use crate::firewall_tree::TreeKey;
use crate::qubesdb::Sink;
use crate::reload::Reload;
use crate::settings;
use crate::tree_store::Tree;

/// Default budget of a store in bytes.
pub const DEFAULT_BUDGET: usize = 2 << 20;

/// What a key costs besides its path and value, in bytes: its share of map nodes, rounded up.
const KEY_COST: usize = 64;

/// What a firewall target costs besides its trees, in bytes.
const TARGET_COST: usize = 160;

/// Targets that one call of [`Store::forget_detached`] looks at.
const FORGET_BATCH: usize = 256;

const FIREWALL: &str = "/qubes-firewall/";
const MAPPED: &str = "/mapped-ip/";

/// Something that the rest of the firewall must act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A key of [`settings::NetworkSettings`] may have changed.
    SettingsChanged,
    /// `/connected-ips` or `/connected-ips6` was written or removed.
    ConnectedChanged,
    /// Something below `/mapped-ip/` changed.
    MappedChanged,
    /// The tree of this client address was committed: read it with [`Store::reload`].
    Commit(IpAddr),
}

/// A client address that hides behind another one, out of `/mapped-ip/<real>/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedAddress {
    /// The address that rules, routes and the outside use.
    pub real: Ipv4Addr,
    /// The address that the client believes to have.
    pub visible: Ipv4Addr,
    /// The gateway that the client believes to have.
    pub visible_gateway: Ipv4Addr,
}

/// The trees of one client address.
#[derive(Debug, Default)]
struct Target {
    /// As dom0's keys are.
    current: Arc<Tree>,
    /// As the dump under way has them so far.
    dumped: Option<Arc<Tree>>,
    /// In force; `None` before the first commit.
    committed: Option<Arc<Tree>>,
    /// Position in the order of commits.
    sequence: u64,
    /// Commits that no event has told of yet.
    waiting: u64,
    /// Commits told of, whose rules are not in force yet.
    working: u64,
    /// Commits whose rules are in force.
    handled: u64,
}

impl Target {
    fn cost(&self) -> usize {
        let committed = self.committed.as_ref();
        let unshared = committed.filter(|committed| !Arc::ptr_eq(committed, &self.current));
        TARGET_COST
            + self.current.cost()
            + self.dumped.as_ref().map_or(0, |tree| tree.cost())
            + unshared.map_or(0, |tree| tree.cost())
    }
}

/// The keys outside firewall trees.
type Keys = LiteMap<Box<str>, Box<[u8]>>;

/// A bounded copy of dom0's keys.
#[derive(Debug)]
pub struct Store {
    keys: Keys,
    /// The keys of the dump under way.
    dumped: Option<Keys>,
    targets: LiteMap<IpAddr, Target>,
    /// Every target by its position in the order of commits.
    by_sequence: LiteMap<u64, IpAddr>,
    next_sequence: u64,
    /// Targets with commits that no event has told of yet, each once.
    commits: VecDeque<IpAddr>,
    settings_changed: bool,
    connected_changed: bool,
    mapped_changed: bool,
    budget: usize,
    cost: usize,
    refused: u64,
}

/// What a path below `/qubes-firewall/` is about.
enum FirewallPath<'a> {
    /// `/qubes-firewall/<address>`.
    Marker(IpAddr),
    /// `/qubes-firewall/<address>/<key>`; the key may be empty in a removal.
    Key(IpAddr, &'a str),
    /// No address: no client can have these rules.
    Nobody,
}

impl<'a> FirewallPath<'a> {
    /// Reads what follows `/qubes-firewall/`.
    fn new(rest: &'a str) -> Self {
        let (address, key) = match rest.split_once('/') {
            Some((address, key)) => (address, Some(key)),
            None => (rest, None),
        };
        match (parse_canonical(address), key) {
            (Some(address), Some(key)) => Self::Key(address, key),
            (Some(address), None) => Self::Marker(address),
            (None, _) => Self::Nobody,
        }
    }
}

impl Default for Store {
    fn default() -> Self {
        Self::new(DEFAULT_BUDGET)
    }
}

impl Store {
    /// An empty store that may take about `budget` bytes.
    pub const fn new(budget: usize) -> Self {
        Self {
            keys: LiteMap::new(),
            dumped: None,
            targets: LiteMap::new(),
            by_sequence: LiteMap::new(),
            next_sequence: 0,
            commits: VecDeque::new(),
            settings_changed: false,
            connected_changed: false,
            mapped_changed: false,
            budget,
            cost: 0,
            refused: 0,
        }
    }

    /// The value of a key outside firewall trees.
    pub fn get(&self, path: &str) -> Option<&[u8]> {
        self.keys.get(path).map(|value| &**value)
    }

    /// The next thing to act on. Commits come in the order of their first, each address once.
    pub fn next_event(&mut self) -> Option<Event> {
        if core::mem::take(&mut self.settings_changed) {
            return Some(Event::SettingsChanged);
        }
        if core::mem::take(&mut self.connected_changed) {
            return Some(Event::ConnectedChanged);
        }
        if core::mem::take(&mut self.mapped_changed) {
            return Some(Event::MappedChanged);
        }
        let address = self.commits.pop_front()?;
        if let Some(target) = self.targets.get_mut(&address) {
            target.working += core::mem::take(&mut target.waiting);
        }
        Some(Event::Commit(address))
    }

    /// Starts to read the committed tree of a client address. `None` if nothing was ever committed: the
    /// client is then silently dropped.
    pub fn reload(&self, address: IpAddr) -> Option<Reload> {
        let tree = self.targets.get(&address)?.committed.as_ref()?;
        Some(Reload::new(family(address), Arc::clone(tree)))
    }

    /// Notes that the commits told of so far are in force, or were refused as a whole, and returns the
    /// key and the number that report it. `None` if there is nothing new to report.
    pub fn handled(&mut self, address: IpAddr) -> Option<(HandledPath, u64)> {
        let target = self.targets.get_mut(&address)?;
        let working = core::mem::take(&mut target.working);
        target.handled += working;
        (working > 0).then_some((HandledPath(address), target.handled))
    }

    /// The mapping of a client address, if dom0 gave both keys of it. It is in effect only if `visible`
    /// differs from `real`.
    pub fn mapped(&self, real: Ipv4Addr) -> Option<MappedAddress> {
        let value = |name: &str| {
            let path = alloc::format!("{MAPPED}{real}/{name}");
            parse_ipv4(self.get(&path)?)
        };
        Some(MappedAddress {
            real,
            visible: value("visible-ip")?,
            visible_gateway: value("visible-gateway")?,
        })
    }

    /// The real addresses of all known mappings, in effect or not, some perhaps twice.
    pub fn mapped_reals(&self) -> impl Iterator<Item = Ipv4Addr> {
        below(&self.keys, MAPPED).filter_map(|(path, _)| {
            let (address, _) = path.strip_prefix(MAPPED)?.split_once('/')?;
            address.parse().ok()
        })
    }

    /// Memory in bytes, about.
    pub const fn cost(&self) -> usize {
        self.cost
    }

    /// Writes that did not fit.
    pub const fn refused(&self) -> u64 {
        self.refused
    }

    /// Whether more than half of the budget is used: time for [`Self::forget_detached`].
    pub const fn is_crowded(&self) -> bool {
        self.cost > self.budget / 2
    }

    /// Forgets the trees and mappings of clients that are not attached, those committed longest ago first,
    /// until a quarter of the budget is in use. Returns how many addresses were forgotten. The work of
    /// one call is bounded; call again while it helps.
    pub fn forget_detached(&mut self, is_attached: impl Fn(IpAddr) -> bool) -> usize {
        let mut forgotten = 0;
        for _ in 0..FORGET_BATCH.min(self.by_sequence.len()) {
            if self.cost <= self.budget / 4 {
                break;
            }
            let Some((&sequence, &address)) = self.by_sequence.first() else {
                break;
            };
            self.by_sequence.remove(&sequence);
            if is_attached(address) {
                // Out of the way of later calls.
                self.put_last(address);
                continue;
            }
            if let Some(target) = self.targets.remove(&address) {
                self.cost -= target.cost();
            }
            self.commits.retain(|&waiting| waiting != address);
            self.remove_below(&alloc::format!("{MAPPED}{}/", AddressText(address)));
            forgotten += 1;
        }
        forgotten
    }

    fn put_last(&mut self, address: IpAddr) {
        if let Some(target) = self.targets.get_mut(&address) {
            target.sequence = self.next_sequence;
            self.by_sequence.insert(self.next_sequence, address);
            self.next_sequence += 1;
        }
    }

    fn write_key(&mut self, path: &str, value: &[u8]) {
        let cost = |value: &[u8]| KEY_COST + path.len() + value.len();
        let keys = self.dumped.as_mut().unwrap_or(&mut self.keys);
        let old = keys.get(path).map_or(0, |value| cost(value));
        if self.cost - old + cost(value) > self.budget {
            self.refused += 1;
            return;
        }
        self.cost = self.cost - old + cost(value);
        keys.insert(Box::from(path), Box::from(value));
        if self.dumped.is_none() {
            self.note_change(path);
        }
    }

    /// Removes one key outside firewall trees.
    fn remove_key(&mut self, path: &str) {
        if let Some(value) = self.keys.remove(path) {
            self.cost -= KEY_COST + path.len() + value.len();
            self.note_change(path);
        }
    }

    /// Removes the keys outside firewall trees that begin with `directory`.
    fn remove_below(&mut self, directory: &str) {
        loop {
            let first = below(&self.keys, directory).next();
            let Some(path) = first.map(|(path, _)| path.clone()) else {
                return;
            };
            self.remove_key(&path);
        }
    }

    fn note_change(&mut self, path: &str) {
        self.connected_changed |= settings::is_connected_key(path);
        self.settings_changed |= settings::is_setting(path);
        self.mapped_changed |= path.starts_with(MAPPED);
    }

    fn write_tree(&mut self, address: IpAddr, key: &str, value: &[u8]) {
        let is_dump = self.dumped.is_some();
        let is_known = self.targets.contains_key(&address);
        if !is_known && self.cost + TARGET_COST > self.budget {
            // Without a tree the client is dropped, which is as closed as can be.
            self.refused += 1;
            return;
        }
        let budget = self.budget;
        let others = self.cost - self.targets.get(&address).map_or(0, Target::cost);
        let target = self.targets.entry(address).or_default();
        let shared = if is_dump {
            target.dumped.get_or_insert_default()
        } else {
            &mut target.current
        };
        // If the tree is in force too, this makes a copy of it. dom0 never causes that: it removes a
        // tree before it writes to it.
        let tree = Arc::make_mut(shared);
        let growth = tree.cost_of(value.len());
        if others + target.cost() + growth > budget {
            self.refused += 1;
            let shared = target.dumped.as_mut().unwrap_or(&mut target.current);
            Arc::make_mut(shared).mark_incomplete();
        } else {
            let shared = target.dumped.as_mut().unwrap_or(&mut target.current);
            Arc::make_mut(shared).write(TreeKey::new(key), value);
        }
        self.cost = others + target.cost();
        if !is_known {
            self.put_last(address);
        }
    }

    fn commit(&mut self, address: IpAddr) {
        let is_known = self.targets.contains_key(&address);
        if !is_known && self.cost + TARGET_COST > self.budget {
            self.refused += 1;
            return;
        }
        let others = self.cost - self.targets.get(&address).map_or(0, Target::cost);
        let target = self.targets.entry(address).or_default();
        target.committed = Some(Arc::clone(&target.current));
        if target.waiting == 0 {
            self.commits.push_back(address);
        }
        target.waiting += 1;
        self.cost = others + target.cost();
        if is_known {
            self.by_sequence.remove(&target.sequence);
        }
        self.put_last(address);
    }

    fn remove_tree_keys(&mut self, address: IpAddr, key: &str) {
        let others = self.cost - self.targets.get(&address).map_or(0, Target::cost);
        let Some(target) = self.targets.get_mut(&address) else {
            return;
        };
        if key.is_empty() {
            target.current = Arc::default();
        } else if key.ends_with('/') {
            Arc::make_mut(&mut target.current).remove_below(key);
        } else {
            Arc::make_mut(&mut target.current).remove(TreeKey::new(key));
        }
        self.cost = others + target.cost();
    }
}

/// The keys that begin with `directory`, which ends with a slash.
fn below<'a>(keys: &'a Keys, directory: &'a str) -> impl Iterator<Item = (&'a Box<str>, &'a [u8])> {
    let (Ok(first) | Err(first)) = keys.find_index(directory);
    (first..)
        .map_while(|index| keys.get_indexed(index))
        .take_while(move |(path, _)| path.starts_with(directory))
        .map(|(path, value)| (path, &**value))
}

impl Sink for Store {
    fn dump_started(&mut self) {
        self.drop_dump();
        self.dumped = Some(LiteMap::new());
    }

    fn written(&mut self, path: &str, value: &[u8]) {
        let Some(rest) = path.strip_prefix(FIREWALL) else {
            return self.write_key(path, value);
        };
        match FirewallPath::new(rest) {
            FirewallPath::Key(address, key) => self.write_tree(address, key, value),
            // The end of the dump commits everything in it.
            FirewallPath::Marker(address) if self.dumped.is_none() => self.commit(address),
            FirewallPath::Marker(_) | FirewallPath::Nobody => {}
        }
    }

    fn removed(&mut self, path: &str) {
        if let Some(rest) = path.strip_prefix(FIREWALL)
            && !rest.is_empty()
        {
            if let FirewallPath::Key(address, key) = FirewallPath::new(rest) {
                self.remove_tree_keys(address, key);
            }
            return;
        }
        if !path.ends_with('/') {
            return self.remove_key(path);
        }
        self.remove_below(path);
        if FIREWALL.starts_with(path) {
            let addresses: alloc::vec::Vec<_> = self.targets.keys().copied().collect();
            for address in addresses {
                self.remove_tree_keys(address, "");
            }
        }
    }

    fn dump_ended(&mut self) {
        let Some(keys) = self.dumped.take() else {
            return;
        };
        self.cost -= cost_of_keys(&self.keys);
        self.keys = keys;
        self.settings_changed = true;
        self.connected_changed = true;
        self.mapped_changed = true;
        let addresses: alloc::vec::Vec<_> = self.targets.keys().copied().collect();
        for address in addresses {
            let Some(target) = self.targets.get_mut(&address) else {
                continue;
            };
            let before = target.cost();
            target.current = target.dumped.take().unwrap_or_default();
            let is_commit = !target.current.is_empty();
            self.cost = self.cost - before + target.cost();
            if is_commit {
                self.commit(address);
            }
        }
    }
}

impl Store {
    /// Forgets a dump that did not end.
    fn drop_dump(&mut self) {
        if let Some(keys) = self.dumped.take() {
            self.cost -= cost_of_keys(&keys);
            for (_, target) in self.targets.iter_mut() {
                self.cost -= target.dumped.take().map_or(0, |tree| tree.cost());
            }
        }
    }
}

fn cost_of_keys(keys: &Keys) -> usize {
    keys.iter()
        .map(|(path, value)| KEY_COST + path.len() + value.len())
        .sum()
}

/// The key that tells tools how many commits of a client address are in force:
/// `/qubes-firewall-handled/<address>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandledPath(IpAddr);

impl fmt::Display for HandledPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/qubes-firewall-handled/{}", AddressText(self.0))
    }
}

#[cfg(test)]
mod tests;
