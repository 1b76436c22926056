//! What must hold of every frame that leaves, seen with smoltcp's packet types.

use core::net::IpAddr;

use firewall::{Checksum, Iface};
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv4Packet, Icmpv6Packet, IpAddress,
    IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket, UdpPacket,
};

use crate::world::{CLIENT_MAC, GATEWAY_MAC, OWN4, OWN6, UPLINK_MAC, client4, client6};

/// Whether the transport checksum of a packet is right; `None` when that cannot be seen from this packet alone.
fn transport_is_right(
    protocol: IpProtocol,
    source: IpAddress,
    destination: IpAddress,
    payload: &[u8],
) -> Option<bool> {
    match protocol {
        IpProtocol::Tcp => {
            let packet = TcpPacket::new_checked(payload).ok()?;
            Some(packet.verify_checksum(&source, &destination))
        }
        IpProtocol::Udp => {
            let packet = UdpPacket::new_checked(payload).ok()?;
            // A shorter length than the packet's is something that we must not repair.
            (usize::from(packet.len()) == payload.len())
                .then(|| packet.verify_checksum(&source, &destination))
        }
        IpProtocol::Icmp => Some(Icmpv4Packet::new_checked(payload).ok()?.verify_checksum()),
        IpProtocol::Icmpv6 => {
            let (IpAddress::Ipv6(source), IpAddress::Ipv6(destination)) = (source, destination)
            else {
                return None;
            };
            let packet = Icmpv6Packet::new_checked(payload).ok()?;
            Some(packet.verify_checksum(&source, &destination))
        }
        _ => None,
    }
}

/// A frame as the judge sees it.
struct Seen {
    source: IpAddr,
    destination: IpAddr,
    hops: u8,
    /// As [`transport_is_right`].
    is_right: Option<bool>,
}

/// Takes an IP frame apart; `None` for anything else, or if it cannot be.
fn see(frame: &[u8]) -> Option<Seen> {
    let ethernet = EthernetFrame::new_checked(frame).ok()?;
    match ethernet.ethertype() {
        EthernetProtocol::Ipv4 => {
            let packet = Ipv4Packet::new_checked(ethernet.payload()).ok()?;
            if packet.version() != 4 || !packet.verify_checksum() {
                return None;
            }
            let (source, destination) = (packet.src_addr(), packet.dst_addr());
            let is_whole = packet.frag_offset() == 0 && !packet.more_frags();
            let is_right = is_whole
                .then(|| {
                    let ends = (source.into(), destination.into());
                    transport_is_right(packet.next_header(), ends.0, ends.1, packet.payload())
                })
                .flatten();
            Some(Seen {
                source: source.into(),
                destination: destination.into(),
                hops: packet.hop_limit(),
                is_right,
            })
        }
        EthernetProtocol::Ipv6 => {
            let packet = Ipv6Packet::new_checked(ethernet.payload()).ok()?;
            if packet.version() != 6 {
                return None;
            }
            let (source, destination) = (packet.src_addr(), packet.dst_addr());
            let ends = (source.into(), destination.into());
            Some(Seen {
                source: source.into(),
                destination: destination.into(),
                hops: packet.hop_limit(),
                is_right: transport_is_right(
                    packet.next_header(),
                    ends.0,
                    ends.1,
                    packet.payload(),
                ),
            })
        }
        _ => None,
    }
}

/// The right link addresses, and an IP packet that the receiver may see.
fn reachable(egress: Iface, frame: &[u8]) -> Seen {
    let ethernet = EthernetFrame::new_checked(frame).expect("what leaves is an Ethernet frame");
    let (from, to) = match egress {
        Iface::Uplink => (UPLINK_MAC, GATEWAY_MAC),
        Iface::Client(_) => (GATEWAY_MAC, CLIENT_MAC),
    };
    assert_eq!(ethernet.src_addr(), EthernetAddress(from), "link source");
    assert_eq!(ethernet.dst_addr(), EthernetAddress(to), "link destination");
    see(frame).expect("what leaves is an IP packet with a right header")
}

fn is_own(address: IpAddr) -> bool {
    address == IpAddr::V4(OWN4) || address == IpAddr::V6(OWN6)
}

fn is_of(id: u16, address: IpAddr) -> bool {
    address == IpAddr::V4(client4(id)) || address == IpAddr::V6(client6(id))
}

/// A frame that was rewritten in place: `before` came in, `after` goes out; the checksums' states likewise.
pub fn forwarded(egress: Iface, before: &[u8], after: &[u8], states: (Checksum, Checksum)) {
    let seen = reachable(egress, after);
    match egress {
        Iface::Uplink => assert!(is_own(seen.source), "{} left untranslated", seen.source),
        Iface::Client(id) => {
            assert!(is_of(id.0, seen.destination), "a frame for another client");
        }
    }
    assert!(seen.hops > 0, "a packet without hops left");
    let was = see(before).expect("only what can be understood goes on");
    assert_eq!(seen.hops.checked_add(1), Some(was.hops), "one hop less");
    let complete = !matches!(states.0, Checksum::Blank) && !matches!(states.1, Checksum::Blank);
    if complete && was.is_right == Some(true) {
        assert_eq!(seen.is_right, Some(true), "a right checksum became wrong");
    }
}

/// A frame that the filter made by itself.
pub fn made(egress: Iface, frame: &[u8]) {
    let ethernet = EthernetFrame::new_checked(frame).expect("what leaves is an Ethernet frame");
    if ethernet.ethertype() == EthernetProtocol::Arp {
        assert!(matches!(egress, Iface::Client(_)), "ARP on the uplink");
        return;
    }
    let seen = reachable(egress, frame);
    match egress {
        Iface::Uplink => assert!(is_own(seen.source), "{} left untranslated", seen.source),
        Iface::Client(id) => {
            let link_local =
                matches!(seen.destination, IpAddr::V6(own) if own.is_unicast_link_local());
            assert!(
                is_of(id.0, seen.destination) || link_local,
                "a frame for another client"
            );
        }
    }
    assert!(frame.len() <= 1514, "a frame of our own above the MTU");
}
