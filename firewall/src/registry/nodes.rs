//! What is known about single addresses, attached or not: a sorted list for each family.
//!
//! The data path asks only for packets that no flow knows. A list and not a hash table: there are as many addresses as
//! dom0 says, so a search takes ten steps for a thousand clients, no client chooses what is in it, and the table's code
//! would be in the image twice.

use alloc::vec::Vec;
use core::net::IpAddr;

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

/// The addresses of one family about which anything is known, in order.
#[derive(Debug)]
struct Sorted<A>(Vec<(A, Node)>);

impl<A: Address> Sorted<A> {
    /// Where an address is, or where it would be.
    fn place(&self, address: A) -> Result<usize, usize> {
        self.0.binary_search_by(|(own, _)| own.cmp(&address))
    }

    fn get(&self, address: A) -> Option<&Node> {
        // Clients' addresses are neighbours, and most packets go to none of them: two comparisons tell.
        let (first, last) = (self.0.first()?, self.0.last()?);
        if address < first.0 || last.0 < address {
            return None;
        }
        let at = self.place(address).ok()?;
        self.0.get(at).map(|(_, node)| node)
    }

    fn change(&mut self, address: A, change: Change) {
        let at = match self.place(address) {
            Ok(at) => at,
            Err(at) => {
                self.0.insert(at, (address, Node::default()));
                at
            }
        };
        let Some((_, node)) = self.0.get_mut(at) else {
            return;
        };
        match change {
            Change::Source(source) => node.source = source.map_or(0, |own| own.wrapping_add(1)),
            Change::Configured(is) => node.configured = is,
            Change::Mapped(is) => node.mapped = is,
        }
        if node.is_unused() {
            self.0.remove(at);
        }
    }
}

/// The addresses of both families.
#[derive(Debug)]
pub(super) struct Nodes {
    of4: Sorted<V4>,
    of6: Sorted<V6>,
}

impl Nodes {
    pub(super) const fn new() -> Self {
        Self {
            of4: Sorted(Vec::new()),
            of6: Sorted(Vec::new()),
        }
    }

    /// Notes something about an address; one about which nothing is left to know is forgotten.
    pub(super) fn change(&mut self, address: IpAddr, change: Change) {
        if let Some(address) = V4::from_ip(address) {
            self.of4.change(address, change);
        } else if let Some(address) = V6::from_ip(address) {
            self.of6.change(address, change);
        }
    }

    /// The source that an address is attached as.
    pub(super) fn source(&self, address: IpAddr) -> Option<u16> {
        let node = match (V4::from_ip(address), V6::from_ip(address)) {
            (Some(address), _) => self.of4.get(address),
            (_, Some(address)) => self.of6.get(address),
            (None, None) => None,
        };
        node.and_then(|node| node.source.checked_sub(1))
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

    fn node(registry: &Registry, address: Self) -> NodeView {
        registry.nodes.of4.get(address).into()
    }
}

impl Routed for V6 {
    #[inline(always)]
    fn list(vif: &Vif) -> &AddressList<Self> {
        &vif.addresses6
    }

    fn node(registry: &Registry, address: Self) -> NodeView {
        registry.nodes.of6.get(address).into()
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
        assert_eq!((nodes.source(high), nodes.of4.0.len()), (None, 2));
        nodes.change(high, Change::Mapped(false));
        nodes.change(low, Change::Configured(false));
        assert_eq!((nodes.source(low), nodes.of4.0.len()), (Some(0), 1));
    }
}
