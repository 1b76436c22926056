//! A small xenstore for host tests: just what advertising and finding channels needs, with permissions.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::RefCell;

use xen::DomId;

use super::channels::Registry;
use super::directory::{StoreRequest, Token};

#[derive(Debug)]
struct Node {
    value: String,
    owner: DomId,
    reader: DomId,
}

#[derive(Debug)]
struct Watch {
    domain: DomId,
    path: String,
    token: Token,
}

#[derive(Debug, Default)]
struct World {
    nodes: BTreeMap<String, Node>,
    watches: Vec<Watch>,
    fired: VecDeque<(DomId, Token)>,
}

/// The nodes of all domains. Clones are the same store.
#[derive(Clone, Debug, Default)]
pub struct FakeDirectory {
    world: Rc<RefCell<World>>,
}

impl World {
    /// Fires the watches on `path` and on what lies above it.
    fn changed(&mut self, path: &str) {
        for watch in &self.watches {
            let below = path.strip_prefix(watch.path.as_str());
            if below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) {
                self.fired.push_back((watch.domain, watch.token));
            }
        }
    }

    fn remove(&mut self, path: &str) {
        let gone: Vec<String> = self
            .nodes
            .keys()
            .filter(|node| {
                node.strip_prefix(path)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            })
            .cloned()
            .collect();
        for node in gone {
            self.nodes.remove(&node);
            self.changed(&node);
        }
    }
}

impl FakeDirectory {
    /// Does what a domain's registry asks for, and tells it what happened. Call it in turn for all domains.
    ///
    /// Returns whether the registry was told anything.
    pub fn serve(&self, own: DomId, registry: &mut Registry) -> bool {
        let mut told = false;
        let mut world = self.world.borrow_mut();
        while let Some(request) = registry.next_request() {
            match request {
                StoreRequest::Publish {
                    path,
                    value,
                    reader,
                } => {
                    let path = format!("/local/domain/{own}/{path}");
                    let node = Node {
                        value,
                        owner: own,
                        reader,
                    };
                    world.nodes.insert(path.clone(), node);
                    world.changed(&path);
                }
                StoreRequest::Remove { path } => {
                    world.remove(&format!("/local/domain/{own}/{path}"));
                }
                StoreRequest::Watch { path, token } => {
                    world.fired.push_back((own, token));
                    world.watches.push(Watch {
                        domain: own,
                        path,
                        token,
                    });
                }
                StoreRequest::Unwatch { token, .. } => {
                    world
                        .watches
                        .retain(|watch| (watch.domain, watch.token) != (own, token));
                }
                StoreRequest::Read { path, token } => {
                    let node = world.nodes.get(&path).filter(|node| {
                        own == DomId::DOM0 || own == node.owner || own == node.reader
                    });
                    told = true;
                    registry.answer(token, node.map(|node| node.value.as_bytes()));
                }
            }
        }
        let mut others = VecDeque::new();
        for (domain, token) in world.fired.drain(..) {
            if domain == own {
                told = true;
                registry.fired(token);
            } else {
                others.push_back((domain, token));
            }
        }
        world.fired = others;
        told
    }

    /// Every node with its value, for comparison.
    #[must_use]
    pub fn nodes(&self) -> Vec<(String, String)> {
        let world = self.world.borrow();
        world
            .nodes
            .iter()
            .map(|(path, node)| (path.clone(), node.value.clone()))
            .collect()
    }

    /// Watches of all domains.
    #[must_use]
    pub fn watches(&self) -> usize {
        self.world.borrow().watches.len()
    }
}
