//! What dom0 says, read from a folder: client vifs, and keys as one file each.
//!
//! A file's path below `qubesdb/` is its key, its content the value; one newline at its end does not belong to the value. A
//! folder that stands for an address below `qubes-firewall/` is that client's rule tree. Everything is checked against
//! QubesDB's own limits, so that nothing is replayed that dom0 could not write.
//!
//! Source: `qubes-policy.md` 1.1 to 1.5.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use qubes::qubesdb::{self, PathError, VALUE_MAX};
use xenstore::ConfigEvent;

/// The name of the interface that is not a client's.
pub const UPLINK: &str = "uplink";

/// The folder of keys in a configuration.
const KEYS: &str = "qubesdb";

/// The file of client vifs in a configuration.
const VIFS: &str = "vifs";

/// The folder of rule trees among the keys.
const TREES: &str = "/qubes-firewall/";

/// The key that shows that a folder holds all keys and not only those that change.
const PROOF: &str = "/qubes-ip";

/// The highest domain id that a client can have.
const LAST_DOMID: u16 = 32_752;

/// The most clients, as many as the engine can number.
const MAX_VIFS: usize = 1024;

/// A client vif.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vif {
    /// Its name, here and in the names of capture files.
    pub name: String,
    /// The client's domain id.
    pub domid: u16,
    /// The client's MAC address.
    pub mac: [u8; 6],
    /// The addresses that it may use.
    pub addresses: Vec<IpAddr>,
}

/// Reads the client vifs of a configuration.
///
/// # Errors
///
/// If the file cannot be read, or a line makes no sense or contradicts another one; the error names the line.
pub fn read_vifs(config: &Path) -> Result<Vec<Vif>> {
    let path = config.join(VIFS);
    let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
    let mut vifs: Vec<Vif> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let vif = read_vif(line).and_then(|vif| {
            let is_known = vifs.iter().any(|known| known.name == vif.name);
            ensure!(!is_known, "there is a vif {} already", vif.name);
            Ok(vif)
        });
        vifs.push(vif.with_context(|| format!("{}: line {}", path.display(), number + 1))?);
    }
    ensure!(
        vifs.len() <= MAX_VIFS,
        "{}: {} vifs, at most {MAX_VIFS} are possible",
        path.display(),
        vifs.len()
    );
    Ok(vifs)
}

fn read_vif(line: &str) -> Result<Vif> {
    let mut words = line.split_whitespace();
    let (Some(name), Some(domid), Some(mac)) = (words.next(), words.next(), words.next()) else {
        bail!("a vif is: name, domain id, MAC, addresses");
    };
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    ensure!(
        name != UPLINK && !name.starts_with('.') && name.bytes().all(is_plain),
        "{name:?} cannot be the name of a vif"
    );
    let domid: u16 = domid
        .parse()
        .ok()
        .filter(|domid| *domid <= LAST_DOMID)
        .with_context(|| format!("{domid:?} is no domain id"))?;
    let mac = parse_mac(mac).with_context(|| format!("{mac:?} is no MAC address"))?;
    let address = |word: &str| {
        let parsed = word.parse::<IpAddr>();
        parsed
            .ok()
            .with_context(|| format!("{word:?} is no address"))
    };
    let addresses = words.map(address).collect::<Result<Vec<_>>>()?;
    let distinct: BTreeSet<_> = addresses.iter().collect();
    ensure!(
        distinct.len() == addresses.len(),
        "an address stands there twice"
    );
    Ok(Vif {
        name: name.to_owned(),
        domid,
        mac,
        addresses,
    })
}

/// Six groups of two hexadecimal digits with colons between them.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut groups = text.split(':');
    let mut mac = [0; 6];
    for byte in &mut mac {
        let group = groups.next()?;
        let is_hex = group.len() == 2 && group.bytes().all(|digit| digit.is_ascii_hexdigit());
        *byte = u8::from_str_radix(group, 16).ok().filter(|_| is_hex)?;
    }
    groups.next().is_none().then_some(mac)
}

/// The keys of one rule tree, without the path of the tree.
type Tree = BTreeMap<String, Vec<u8>>;

/// All keys that dom0 has written.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Keys {
    plain: BTreeMap<String, Vec<u8>>,
    /// By what stands for the address.
    trees: BTreeMap<String, Tree>,
}

impl Keys {
    /// Reads the keys of a configuration. `config` is the folder around `qubesdb/`; for convenience it may also be such a
    /// folder itself.
    ///
    /// # Errors
    ///
    /// If something cannot be read, or cannot be a key or a value of QubesDB.
    pub fn read(config: &Path) -> Result<Self> {
        let inner = config.join(KEYS);
        let folder = if inner.is_dir() {
            inner
        } else {
            ensure!(config.is_dir(), "{}: not a folder", config.display());
            ensure!(
                !config.join(VIFS).exists(),
                "{}: not a folder",
                inner.display()
            );
            config.to_owned()
        };
        let mut keys = Self::default();
        keys.read_folder(&folder, "")?;
        Ok(keys)
    }

    fn read_folder(&mut self, folder: &Path, key: &str) -> Result<()> {
        let what = || format!("{}", folder.display());
        for entry in fs::read_dir(folder).with_context(what)? {
            let path = entry.with_context(what)?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let name = name.with_context(|| format!("{}: not a key", path.display()))?;
            let key = format!("{key}/{name}");
            if let Err(error) = qubesdb::Path::new(&key) {
                let why = match error {
                    PathError::TooLong => "too long",
                    PathError::Malformed => "a character that keys do not have",
                };
                bail!("{}: not a key of QubesDB: {why}", path.display());
            }
            let kind = fs::metadata(&path).with_context(|| format!("{}", path.display()))?;
            if kind.is_dir() {
                // The folder of a tree is the tree, be it empty.
                if let Some(address) = key.strip_prefix(TREES).filter(|rest| !rest.contains('/')) {
                    self.trees.entry(address.to_owned()).or_default();
                }
                self.read_folder(&path, &key)?;
            } else {
                ensure!(
                    kind.is_file(),
                    "{}: neither file nor folder",
                    path.display()
                );
                self.add(&key, read_value(&path)?);
            }
        }
        Ok(())
    }

    fn add(&mut self, key: &str, value: Vec<u8>) {
        match key.strip_prefix(TREES) {
            None => {
                self.plain.insert(key.to_owned(), value);
            }
            Some(rest) => match rest.split_once('/') {
                // The commit marker of a tree without keys.
                None => {
                    self.trees.entry(rest.to_owned()).or_default();
                }
                Some((address, rest)) => {
                    let tree = self.trees.entry(address.to_owned()).or_default();
                    tree.insert(rest.to_owned(), value);
                }
            },
        }
    }

    /// The value of a key outside rule trees.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&[u8]> {
        self.plain.get(key).map(Vec::as_slice)
    }

    /// What a firewall is told that starts with these keys: all of them, each tree that has keys committed.
    #[must_use]
    pub fn dump(&self) -> Vec<ConfigEvent> {
        let mut events: Vec<_> = self
            .plain
            .iter()
            .map(|(key, value)| written(key, value))
            .collect();
        for (address, tree) in self.in_order(|_, tree| !tree.is_empty()) {
            write_tree(&mut events, address, tree);
        }
        events.push(ConfigEvent::Ready);
        events
    }

    /// These keys after dom0 has written those in `change`: they alone, if [`PROOF`] is among them. That dom0 writes
    /// at every start and never removes, so without it the others stay as they are.
    #[must_use]
    pub fn changed_by(&self, mut change: Self) -> Self {
        if change.get(PROOF).is_none() {
            for (key, value) in &self.plain {
                let entry = change.plain.entry(key.clone());
                entry.or_insert_with(|| value.clone());
            }
            for (address, tree) in &self.trees {
                let entry = change.trees.entry(address.clone());
                entry.or_insert_with(|| tree.clone());
            }
        }
        change
    }

    /// What a firewall is told when dom0 replaces these keys by `new`: keys that are gone removed, keys that are new or
    /// different written, trees that differ removed, written and committed. A tree that is gone is removed and not
    /// committed: the rules stay in force, as with QubesDB.
    #[must_use]
    pub fn changes(&self, new: &Self) -> Vec<ConfigEvent> {
        let gone = self
            .plain
            .keys()
            .filter(|key| !new.plain.contains_key(*key));
        let mut events: Vec<_> = gone
            .cloned()
            .map(|key| ConfigEvent::Removed { key })
            .collect();
        for (key, value) in &new.plain {
            if self.plain.get(key) != Some(value) {
                events.push(written(key, value));
            }
        }
        for address in self
            .trees
            .keys()
            .filter(|address| !new.trees.contains_key(*address))
        {
            events.push(removed(address));
        }
        for (address, tree) in new.in_order(|address, tree| self.trees.get(address) != Some(tree)) {
            events.push(removed(address));
            write_tree(&mut events, address, tree);
        }
        events
    }

    /// The trees that are wanted, IPv4 first, as dom0 writes them.
    fn in_order(&self, wanted: impl Fn(&str, &Tree) -> bool) -> Vec<(&str, &Tree)> {
        let trees = self
            .trees
            .iter()
            .filter(|(address, tree)| wanted(address, tree));
        let mut trees: Vec<_> = trees
            .map(|(address, tree)| (address.as_str(), tree))
            .collect();
        trees.sort_by_key(|(address, _)| address.contains(':'));
        trees
    }
}

/// The content of a file without one newline at its end.
fn read_value(path: &Path) -> Result<Vec<u8>> {
    let mut value = fs::read(path).with_context(|| format!("{}", path.display()))?;
    value.pop_if(|last| *last == b'\n');
    ensure!(
        value.len() <= VALUE_MAX,
        "{}: {} bytes, a value has {VALUE_MAX} at most",
        path.display(),
        value.len()
    );
    ensure!(
        !value.contains(&0),
        "{}: a value cannot have a zero byte",
        path.display()
    );
    Ok(value)
}

fn written(key: &str, value: &[u8]) -> ConfigEvent {
    ConfigEvent::Written {
        key: key.to_owned(),
        value: value.to_owned(),
    }
}

fn removed(address: &str) -> ConfigEvent {
    ConfigEvent::Removed {
        key: format!("{TREES}{address}/"),
    }
}

/// The policy, the other keys in order, the commit marker.
fn write_tree(events: &mut Vec<ConfigEvent>, address: &str, tree: &Tree) {
    let (first, others): (Vec<_>, Vec<_>) = tree.iter().partition(|(key, _)| *key == "policy");
    for (key, value) in first.into_iter().chain(others) {
        events.push(written(&format!("{TREES}{address}/{key}"), value));
    }
    events.push(written(&format!("{TREES}{address}"), b""));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(list: &[(&str, &str)]) -> Keys {
        let mut keys = Keys::default();
        for (key, value) in list {
            keys.add(key, value.as_bytes().to_owned());
        }
        keys
    }

    fn told(events: &[ConfigEvent]) -> Vec<String> {
        let text = |event: &ConfigEvent| match event {
            ConfigEvent::Written { key, value } => {
                format!("{key}={}", String::from_utf8_lossy(value))
            }
            ConfigEvent::Removed { key } => format!("-{key}"),
            other => format!("{other:?}"),
        };
        events.iter().map(text).collect()
    }

    #[test]
    fn vif_lines_are_read_and_wrong_ones_say_why() {
        let vif = read_vif("c1 7 00:16:3e:5e:6c:0A 10.137.0.10 fd09::a").unwrap();
        assert_eq!((vif.name.as_str(), vif.domid), ("c1", 7));
        assert_eq!(vif.mac, [0, 0x16, 0x3e, 0x5e, 0x6c, 10]);
        assert_eq!(vif.addresses.len(), 2);
        assert!(
            read_vif("c1 7 00:16:3e:5e:6c:0a")
                .unwrap()
                .addresses
                .is_empty()
        );
        for (line, reason) in [
            ("c1 7", "a vif is: name, domain id, MAC, addresses"),
            ("c1 seven 00:16:3e:5e:6c:0a", "\"seven\" is no domain id"),
            ("c1 32753 00:16:3e:5e:6c:0a", "\"32753\" is no domain id"),
            (
                "c1 7 00:16:3e:5e:6c",
                "\"00:16:3e:5e:6c\" is no MAC address",
            ),
            ("c1 7 00:16:3e:5e:6c:0a x", "\"x\" is no address"),
            (
                "c1 7 00:16:3e:5e:6c:0a ::1 ::1",
                "an address stands there twice",
            ),
            (
                "uplink 7 00:16:3e:5e:6c:0a",
                "\"uplink\" cannot be the name of a vif",
            ),
            (
                "../c 7 00:16:3e:5e:6c:0a",
                "\"../c\" cannot be the name of a vif",
            ),
        ] {
            assert_eq!(read_vif(line).unwrap_err().to_string(), reason);
        }
    }

    #[test]
    fn dump_commits_every_tree_that_has_keys() {
        let keys = keys(&[
            ("/qubes-firewall/fd09::a/policy", "drop"),
            ("/qubes-firewall/10.137.0.10/0000", "action=accept"),
            ("/qubes-firewall/10.137.0.10/policy", "drop"),
            ("/qubes-firewall/10.137.0.11", ""),
            ("/qubes-ip", "10.137.0.6"),
        ]);
        let expected = [
            "/qubes-ip=10.137.0.6",
            "/qubes-firewall/10.137.0.10/policy=drop",
            "/qubes-firewall/10.137.0.10/0000=action=accept",
            "/qubes-firewall/10.137.0.10=",
            "/qubes-firewall/fd09::a/policy=drop",
            "/qubes-firewall/fd09::a=",
            "Ready",
        ];
        assert_eq!(told(&keys.dump()), expected);
    }

    #[test]
    fn keys_without_our_address_are_only_those_that_change() {
        let old = keys(&[
            ("/qubes-ip", "10.137.0.6"),
            ("/a", "1"),
            ("/qubes-firewall/10.0.0.1/policy", "drop"),
            ("/qubes-firewall/10.0.0.2/policy", "drop"),
        ]);
        let change = keys(&[("/a", "2"), ("/qubes-firewall/10.0.0.2/policy", "accept")]);
        let expected = [
            "/a=2",
            "-/qubes-firewall/10.0.0.2/",
            "/qubes-firewall/10.0.0.2/policy=accept",
            "/qubes-firewall/10.0.0.2=",
        ];
        let new = old.changed_by(change);
        assert_eq!(told(&old.changes(&new)), expected);
        let all = keys(&[("/qubes-ip", "10.137.0.6")]);
        assert_eq!(old.changed_by(all.clone()), all);
    }

    #[test]
    fn changes_touch_only_what_differs() {
        let old = keys(&[
            ("/a", "1"),
            ("/b", "1"),
            ("/c", "1"),
            ("/qubes-firewall/10.0.0.1/policy", "drop"),
            ("/qubes-firewall/10.0.0.2/policy", "drop"),
            ("/qubes-firewall/10.0.0.3/policy", "drop"),
        ]);
        let new = keys(&[
            ("/b", "1"),
            ("/c", "2"),
            ("/d", ""),
            ("/qubes-firewall/10.0.0.1/policy", "drop"),
            ("/qubes-firewall/10.0.0.2/policy", "accept"),
            ("/qubes-firewall/10.0.0.4", ""),
        ]);
        let expected = [
            "-/a",
            "/c=2",
            "/d=",
            "-/qubes-firewall/10.0.0.3/",
            "-/qubes-firewall/10.0.0.2/",
            "/qubes-firewall/10.0.0.2/policy=accept",
            "/qubes-firewall/10.0.0.2=",
            "-/qubes-firewall/10.0.0.4/",
            "/qubes-firewall/10.0.0.4=",
        ];
        assert_eq!(told(&old.changes(&new)), expected);
        assert!(new.changes(&new).is_empty());
    }
}
