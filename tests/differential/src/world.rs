//! The addresses on both sides, and what varies from one rule set to the next.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::rules::Tree;
use crate::script::{Change, Flow};

/// A client vif.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Client {
    /// The interface in the kernel.
    pub(crate) name: &'static str,
    pub(crate) domid: u16,
    pub(crate) addresses: &'static [IpAddr],
    pub(crate) mtu: u16,
}

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

/// An address in the network that Qubes gives clients.
const fn q6(low: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(0xfd09, 0x24ef, 0x4179, 0, 0, 0, 0xa89, low))
}

/// Our addresses, towards clients and the uplink.
pub(crate) const OWN4: IpAddr = v4(10, 137, 0, 6);
pub(crate) const OWN6: IpAddr = q6(6);
/// The netvm's.
pub(crate) const GATEWAY4: IpAddr = v4(10, 137, 0, 5);
pub(crate) const GATEWAY6: IpAddr = q6(5);

pub(crate) const CLIENTS: [Client; 4] = [
    Client {
        name: "vif3.0",
        domid: 3,
        addresses: &[v4(10, 137, 0, 10), q6(0xa)],
        mtu: 1500,
    },
    Client {
        name: "vif4.0",
        domid: 4,
        addresses: &[v4(10, 137, 0, 11), q6(0xb)],
        mtu: 1500,
    },
    Client {
        name: "vif7.0",
        domid: 7,
        addresses: &[v4(10, 138, 12, 34)],
        mtu: 1500,
    },
    Client {
        name: "vif9.0",
        domid: 9,
        addresses: &[v4(10, 137, 0, 30), v4(192, 168, 77, 7), q6(0x1e)],
        mtu: 1400,
    },
];

/// Addresses of qubes that are configured and not attached.
pub(crate) const ABSENT: [IpAddr; 2] = [v4(10, 137, 0, 20), q6(0x14)];

/// The resolver addresses that clients use.
pub(crate) const VIRTUAL_RESOLVERS: [Ipv4Addr; 2] =
    [Ipv4Addr::new(10, 139, 1, 1), Ipv4Addr::new(10, 139, 1, 2)];

/// Everybody out there.
pub(crate) const SERVERS4: [IpAddr; 8] = [
    v4(1, 2, 3, 4),
    v4(93, 184, 216, 34),
    v4(93, 184, 216, 35),
    v4(192, 168, 1, 1),
    v4(9, 9, 9, 9),
    v4(10, 139, 1, 1),
    v4(10, 139, 1, 2),
    v4(169, 254, 7, 7),
];

const fn doc6(a: u16, b: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, a, 0, 0, 0, 0, b))
}

pub(crate) const SERVERS6: [IpAddr; 5] = [
    doc6(0, 1),
    doc6(0x8000, 1),
    doc6(0x8000, 2),
    doc6(0x9000, 3),
    q6(0x77),
];

/// Names that rules use, with their addresses; `None` if nobody knows.
pub(crate) const HOSTS: [(&str, Option<&[IpAddr]>); 4] = [
    (
        "two.example.com",
        Some(&[SERVERS4[1], SERVERS4[2], SERVERS6[1], SERVERS6[2]]),
    ),
    ("old.example.com", Some(&[SERVERS4[0]])),
    ("new_only.example.com", Some(&[SERVERS6[0], SERVERS6[3]])),
    ("dead.example.com", None),
];

/// What is different in each rule set.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) uplink_mtu: u16,
    /// The resolvers that really answer.
    pub(crate) resolvers: Vec<Ipv4Addr>,
    /// The rules of each client address.
    pub(crate) trees: Vec<(IpAddr, Tree)>,
}

impl World {
    /// Changes what dom0 has changed.
    pub(crate) fn apply(&mut self, change: &Change) {
        match change {
            Change::Rules(number, tree) => {
                if let Some((_, own)) = self.trees.get_mut(*number) {
                    own.clone_from(tree);
                }
            }
            Change::Resolvers(resolvers) => self.resolvers.clone_from(resolvers),
        }
    }

    /// Whether the rules that are in force let a flow start, as `qubes-policy.md` 2.2 has them.
    pub(crate) fn allows(&self, flow: &Flow, remote: IpAddr) -> bool {
        let tree = self.trees.iter().find(|(own, _)| *own == flow.client);
        tree.is_some_and(|(_, tree)| tree.allows(flow, remote, &self.resolvers))
    }

    /// Where a packet to `dst` ends up if it is DNS to a virtual resolver.
    pub(crate) fn after_dns(&self, dst: IpAddr) -> Option<IpAddr> {
        let at = VIRTUAL_RESOLVERS
            .iter()
            .position(|own| IpAddr::V4(*own) == dst)?;
        let count = self.resolvers.len();
        let real = self.resolvers.get(at.checked_rem(count)?)?;
        Some(IpAddr::V4(*real))
    }
}

/// Our address of a family.
pub(crate) const fn own(v6: bool) -> IpAddr {
    if v6 { OWN6 } else { OWN4 }
}
