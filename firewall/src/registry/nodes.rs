//! What is known about single addresses, attached or not: one table for both families.
//!
//! The data path asks only for packets that no flow knows. One table, so that its code is in the image once. What is in it
//! is dom0's choice, not that of clients, so an unkeyed hash does.

use core::net::IpAddr;

use hashbrown::HashMap;

use super::Registry;
use super::vif::{AddressList, Vif};
use crate::address::{Address, V4, V6};

/// What is known about an address.
#[derive(Clone, Copy, Debug, Default)]
struct Node {
    /// Plus one; zero for none.
    source: u16,
    configured: bool,
    mapped: bool,
}

impl Node {
    const fn is_unused(self) -> bool {
        self.source == 0 && !self.configured && !self.mapped
    }
}

/// Something new about an address.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    /// The source that it is attached as, if any.
    Source(Option<u16>),
    /// Whether it is one of ours.
    Configured(bool),
    /// Whether a client believes in another one instead.
    Mapped(bool),
}

/// An address of either family: whether it is IPv4, and its bits.
type Key = (bool, V6);

const fn key4(address: V4) -> Key {
    (true, V6(0, address as u64))
}

const fn key6(address: V6) -> Key {
    (false, address)
}

fn key(address: IpAddr) -> Key {
    match address {
        IpAddr::V4(address) => key4(address.to_bits()),
        IpAddr::V6(address) => key6(V6::from_octets(&address.octets())),
    }
}

/// The addresses about which anything is known.
#[derive(Debug)]
pub(super) struct Nodes {
    table: HashMap<Key, Node>,
    /// No IPv4 address outside of these two is in the table.
    span4: (V4, V4),
}

impl Nodes {
    pub(super) fn new() -> Self {
        Self {
            table: HashMap::new(),
            span4: (V4::MAX, 0),
        }
    }

    #[inline(never)]
    fn get(&self, key: Key) -> Option<&Node> {
        self.table.get(&key)
    }

    /// Notes something about an address; one about which nothing is left to know is forgotten.
    pub(super) fn change(&mut self, address: IpAddr, change: Change) {
        if let IpAddr::V4(address) = address {
            let (first, last) = self.span4;
            self.span4 = (first.min(address.to_bits()), last.max(address.to_bits()));
        }
        let key = key(address);
        let node = self.table.entry(key).or_default();
        match change {
            Change::Source(source) => node.source = source.map_or(0, |own| own.wrapping_add(1)),
            Change::Configured(is) => node.configured = is,
            Change::Mapped(is) => node.mapped = is,
        }
        if node.is_unused() {
            self.table.remove(&key);
        }
    }

    /// The source that an address is attached as.
    pub(super) fn source(&self, address: IpAddr) -> Option<u16> {
        self.get(key(address))?.source.checked_sub(1)
    }
}

/// A family's part of the registry.
pub(crate) trait Routed: Address {
    /// The vif's addresses of the family.
    fn list(vif: &Vif) -> &AddressList<Self>;
    #[doc(hidden)]
    fn node(registry: &Registry, address: Self) -> NodeView;
}

/// What the data path may know about an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NodeView {
    /// The vif that has it.
    pub(crate) attached: bool,
    /// Whether it may neither come from the uplink nor go there.
    pub(crate) guarded: bool,
}

impl From<Option<&Node>> for NodeView {
    fn from(node: Option<&Node>) -> Self {
        Self {
            attached: node.is_some_and(|node| node.source != 0),
            // A node exists only for a reason.
            guarded: node.is_some(),
        }
    }
}

impl Routed for V4 {
    #[inline(always)]
    fn list(vif: &Vif) -> &AddressList<Self> {
        &vif.addresses4
    }

    #[inline]
    fn node(registry: &Registry, address: Self) -> NodeView {
        // Clients' addresses are neighbours, and most packets go to none of them: two comparisons tell.
        let (first, last) = registry.nodes.span4;
        if address < first || last < address {
            return None.into();
        }
        registry.nodes.get(key4(address)).into()
    }
}

impl Routed for V6 {
    #[inline(always)]
    fn list(vif: &Vif) -> &AddressList<Self> {
        &vif.addresses6
    }

    fn node(registry: &Registry, address: Self) -> NodeView {
        registry.nodes.get(key6(address)).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_is_known_until_the_last_reason_is_gone() {
        let mut nodes = Nodes::new();
        let (low, high): (IpAddr, IpAddr) =
            ("10.0.0.1".parse().unwrap(), "10.0.0.9".parse().unwrap());
        nodes.change(high, Change::Source(Some(7)));
        nodes.change(low, Change::Source(Some(0)));
        nodes.change(high, Change::Mapped(true));
        assert_eq!((nodes.source(low), nodes.source(high)), (Some(0), Some(7)));
        nodes.change(high, Change::Source(None));
        assert_eq!((nodes.source(high), nodes.table.len()), (None, 2));
        nodes.change(high, Change::Mapped(false));
        nodes.change(low, Change::Configured(false));
        // The same bits in the other family are another address.
        let other = "::a00:1".parse().unwrap();
        nodes.change(other, Change::Configured(true));
        assert_eq!(nodes.source(other), None);
        nodes.change(other, Change::Configured(false));
        assert_eq!((nodes.source(low), nodes.table.len()), (Some(0), 1));
    }
}
