//! The nodes of the fake store.

use std::collections::BTreeMap;
use std::ops::Bound;

/// What a domain that is not the owner may do with a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Nothing.
    None,
    /// Read.
    Read,
    /// Read and write.
    Both,
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    value: Vec<u8>,
    owner: u16,
    others: Access,
    listed: Vec<(u16, Access)>,
    /// Changes with every change of the node or its list of children.
    generation: u64,
}

impl Node {
    fn access(&self, domain: u16) -> Access {
        if domain == 0 || domain == self.owner {
            return Access::Both;
        }
        let listed = self.listed.iter().find(|(listed, _)| *listed == domain);
        listed.map_or(self.others, |(_, access)| *access)
    }
}

/// What a change touched: path, and whether only watches on exactly this path fire.
pub(super) type Fired = Vec<(String, bool)>;

#[derive(Clone, Debug)]
pub(super) struct Tree {
    nodes: BTreeMap<String, Node>,
    generation: u64,
}

impl Default for Tree {
    fn default() -> Self {
        let root = Node {
            value: Vec::new(),
            owner: 0,
            others: Access::None,
            listed: Vec::new(),
            generation: 0,
        };
        Self {
            nodes: BTreeMap::from([("/".to_owned(), root)]),
            generation: 0,
        }
    }
}

pub(super) fn parent(path: &str) -> Option<&str> {
    let (parent, _) = path.rsplit_once('/')?;
    match (parent, path) {
        (_, "/") => None,
        ("", _) => Some("/"),
        _ => Some(parent),
    }
}

fn below(path: &str) -> String {
    if path == "/" {
        path.to_owned()
    } else {
        format!("{path}/")
    }
}

impl Tree {
    fn tick(&mut self) -> u64 {
        self.generation += 1;
        self.generation
    }

    pub(super) fn value(&self, path: &str) -> Option<&[u8]> {
        self.nodes.get(path).map(|node| &*node.value)
    }

    pub(super) fn generation(&self, path: &str) -> Option<u64> {
        self.nodes.get(path).map(|node| node.generation)
    }

    pub(super) fn paths(&self) -> Vec<String> {
        self.nodes.keys().cloned().collect()
    }

    pub(super) fn owned(&self, domain: u16) -> usize {
        self.nodes
            .values()
            .filter(|node| node.owner == domain)
            .count()
    }

    fn descendants(&self, path: &str) -> impl Iterator<Item = &String> {
        let prefix = below(path);
        let range = (Bound::Excluded(prefix.clone()), Bound::Unbounded);
        self.nodes
            .range(range)
            .map(|(path, _)| path)
            .take_while(move |path| path.starts_with(&prefix))
    }

    pub(super) fn children(&self, path: &str) -> Vec<String> {
        let prefix = below(path);
        let names = self
            .descendants(path)
            .filter_map(|path| path.strip_prefix(&prefix));
        names
            .filter(|name| !name.contains('/'))
            .map(str::to_owned)
            .collect()
    }

    pub(super) fn may_read(&self, domain: u16, path: &str) -> bool {
        self.nodes
            .get(path)
            .is_some_and(|node| node.access(domain) != Access::None)
    }

    /// Whether a watch of this domain sees events for this node.
    pub(super) fn may_watch(&self, domain: u16, path: &str) -> bool {
        self.may_read(domain, path)
            || parent(path).is_some_and(|parent| self.may_read(domain, parent))
    }

    /// The daemon's answer for a node that is missing: not found, unless even that is none of the domain's business.
    fn missing(&self, domain: u16, path: &str) -> &'static str {
        let mut ancestor = parent(path);
        while let Some(path) = ancestor {
            if self.nodes.contains_key(path) {
                return if self.may_read(domain, path) {
                    "ENOENT"
                } else {
                    "EACCES"
                };
            }
            ancestor = parent(path);
        }
        "ENOENT"
    }

    pub(super) fn read(&self, domain: u16, path: &str) -> Result<&[u8], &'static str> {
        let node = self
            .nodes
            .get(path)
            .ok_or_else(|| self.missing(domain, path))?;
        if node.access(domain) == Access::None {
            Err("EACCES")
        } else {
            Ok(&node.value)
        }
    }

    pub(super) fn write(
        &mut self,
        domain: u16,
        path: &str,
        value: &[u8],
        quota: usize,
    ) -> Result<Fired, &'static str> {
        let generation = self.tick();
        if domain != 0 && value.len() > 2000 {
            return Err("ENOSPC");
        }
        if let Some(node) = self.nodes.get_mut(path) {
            if node.access(domain) != Access::Both {
                return Err("EACCES");
            }
            value.clone_into(&mut node.value);
            node.generation = generation;
            return Ok(vec![(path.to_owned(), false)]);
        }
        let mut missing = vec![path.to_owned()];
        let mut ancestor = parent(path).ok_or("EINVAL")?;
        while !self.nodes.contains_key(ancestor) {
            missing.push(ancestor.to_owned());
            ancestor = parent(ancestor).ok_or("EINVAL")?;
        }
        if domain != 0 && self.owned(domain) + missing.len() > quota {
            return Err("ENOSPC");
        }
        let ancestor = ancestor.to_owned();
        let existing = self.nodes.get_mut(&ancestor).ok_or("EINVAL")?;
        if existing.access(domain) != Access::Both {
            return Err("EACCES");
        }
        existing.generation = generation;
        let mut template = existing.clone();
        if domain != 0 {
            template.owner = domain;
        }
        let mut fired = vec![(path.to_owned(), false)];
        for path in missing {
            self.nodes.insert(
                path.clone(),
                Node {
                    value: Vec::new(),
                    ..template.clone()
                },
            );
            fired.push((path, false));
        }
        if let Some(node) = self.nodes.get_mut(path) {
            value.clone_into(&mut node.value);
        }
        fired.push((ancestor, false));
        Ok(fired)
    }

    /// What a removal would fire, or why it is refused. Nothing at all when the node is missing already.
    pub(super) fn check_remove(&self, domain: u16, path: &str) -> Result<Fired, &'static str> {
        let Some(node) = self.nodes.get(path) else {
            let parent = parent(path).ok_or("EINVAL")?;
            return if self.nodes.contains_key(parent) {
                Ok(Vec::new())
            } else {
                Err("ENOENT")
            };
        };
        if node.access(domain) != Access::Both {
            return Err("EACCES");
        }
        let mut fired = vec![(path.to_owned(), false)];
        fired.extend(self.descendants(path).map(|path| (path.clone(), true)));
        Ok(fired)
    }

    pub(super) fn remove(&mut self, path: &str) {
        let generation = self.tick();
        let doomed: Vec<String> = self.descendants(path).cloned().collect();
        for path in doomed {
            self.nodes.remove(&path);
        }
        self.nodes.remove(path);
        if let Some(parent) = parent(path).and_then(|parent| self.nodes.get_mut(parent)) {
            parent.generation = generation;
        }
    }

    /// Whether a domain may change who may do what with a node.
    pub(super) fn is_owner(&self, domain: u16, path: &str) -> bool {
        let owner = self.nodes.get(path).map(|node| node.owner);
        owner.is_some_and(|owner| domain == 0 || domain == owner)
    }

    pub(super) fn set_permissions(
        &mut self,
        path: &str,
        owner: u16,
        listed: &[(u16, Access)],
        others: Access,
    ) {
        let generation = self.tick();
        if let Some(node) = self.nodes.get_mut(path) {
            node.owner = owner;
            node.others = others;
            node.listed = listed.to_vec();
            node.generation = generation;
        }
    }

    pub(super) fn set_owner(&mut self, path: &str, owner: u16) {
        if let Some(node) = self.nodes.get_mut(path) {
            node.owner = owner;
        }
    }
}
