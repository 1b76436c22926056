//! Frames out of decisions: mostly right, so that they get far.

use core::net::IpAddr;

use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder, PacketBuilderStep};
use firewall::{ClientId, Iface};

use crate::bytes::Bytes;
use crate::world::{
    CLIENT_MAC, GATEWAY_MAC, OWN4, OWN6, SERVER4, SERVER6, UPLINK_MAC, client4, client6,
};

/// Ports that meet each other.
const PORTS: [u16; 5] = [443, 40_000, 40_001, 53, 1024];

/// Where a frame comes from.
pub fn ingress(bytes: &mut Bytes<'_>) -> Iface {
    bytes.pick(&[
        Iface::Client(ClientId(0)),
        Iface::Client(ClientId(1)),
        Iface::Uplink,
    ])
}

/// The addresses of a frame that comes in there, as a rule believable.
fn addresses(ingress: Iface, bytes: &mut Bytes<'_>) -> (IpAddr, IpAddr) {
    let v6 = bytes.byte() & 1 == 1;
    let choose = |v6: bool, four: core::net::Ipv4Addr, six: core::net::Ipv6Addr| {
        if v6 {
            IpAddr::V6(six)
        } else {
            IpAddr::V4(four)
        }
    };
    let server = choose(v6, SERVER4, SERVER6);
    let own = choose(v6, OWN4, OWN6);
    let resolver = choose(v6, [10, 139, 1, 1].into(), SERVER6);
    let client = |id: u16| choose(v6, client4(id), client6(id));
    match ingress {
        Iface::Uplink => (
            bytes.pick(&[server, server, resolver, client(0)]),
            bytes.pick(&[own, own, own, client(0)]),
        ),
        Iface::Client(id) => (
            bytes.pick(&[client(id.0), client(id.0), client(id.0), client(1 - id.0)]),
            bytes.pick(&[server, server, resolver, own, client(1 - id.0)]),
        ),
    }
}

/// The start of a packet.
fn step(
    ingress: Iface,
    ends: (IpAddr, IpAddr),
    hops: u8,
) -> Option<PacketBuilderStep<etherparse::IpHeaders>> {
    let (from, to) = match ingress {
        Iface::Uplink => (GATEWAY_MAC, UPLINK_MAC),
        Iface::Client(_) => (CLIENT_MAC, GATEWAY_MAC),
    };
    let link = PacketBuilder::ethernet2(from, to);
    match ends {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            Some(link.ipv4(source.octets(), destination.octets(), hops))
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            Some(link.ipv6(source.octets(), destination.octets(), hops))
        }
        _ => None,
    }
}

/// A frame with right checksums.
pub fn frame(ingress: Iface, bytes: &mut Bytes<'_>) -> Vec<u8> {
    let ends = addresses(ingress, bytes);
    let hops = bytes.pick(&[64, 64, 64, 64, 255, 64, 1, 0]);
    let kind = bytes.byte() % 4;
    let (sport, dport) = (bytes.pick(&PORTS), bytes.pick(&PORTS));
    let payload = bytes.some(48);
    packet(ingress, ends, hops, kind, (sport, dport), bytes, payload)
}

/// A frame of a kind: 0 TCP, 1 UDP, 2 echo, 3 an ICMP error about `payload`.
pub fn packet(
    ingress: Iface,
    ends: (IpAddr, IpAddr),
    hops: u8,
    kind: u8,
    (sport, dport): (u16, u16),
    bytes: &mut Bytes<'_>,
    payload: &[u8],
) -> Vec<u8> {
    let mut frame = Vec::new();
    let Some(step) = step(ingress, ends, hops) else {
        return frame;
    };
    let v6 = ends.0.is_ipv6();
    match kind {
        0 => {
            let mut tcp = step.tcp(sport, dport, u32::from(bytes.word()), bytes.word());
            let flags = bytes.byte();
            if flags & 1 != 0 {
                tcp = tcp.syn();
            }
            if flags & 2 != 0 {
                tcp = tcp.ack(u32::from(bytes.word()));
            }
            if flags & 4 != 0 {
                tcp = tcp.fin();
            }
            if flags & 8 != 0 {
                tcp = tcp.rst();
            }
            tcp.write(&mut frame, payload).expect("a vector grows");
        }
        1 => step
            .udp(sport, dport)
            .write(&mut frame, payload)
            .expect("a vector grows"),
        2 | 3 => {
            let [id, sequence] = [sport.to_be_bytes(), dport.to_be_bytes()];
            let rest = if kind == 2 {
                [id[0], id[1], sequence[0], sequence[1]]
            } else {
                [0, 0, 5, 0xdc]
            };
            let (type4, type6) = if kind == 2 {
                bytes.pick(&[(8, 128), (0, 129), (13, 133)])
            } else {
                bytes.pick(&[(3, 1), (11, 3), (3, 2), (5, 137), (12, 4)])
            };
            let code = bytes.pick(&[0, 1, 3, 4, 13]);
            if v6 {
                let unknown = Icmpv6Type::Unknown {
                    type_u8: type6,
                    code_u8: code,
                    bytes5to8: rest,
                };
                let packet = step.icmpv6(unknown);
                packet.write(&mut frame, payload).expect("a vector grows");
            } else {
                let unknown = Icmpv4Type::Unknown {
                    type_u8: type4,
                    code_u8: code,
                    bytes5to8: rest,
                };
                let packet = step.icmpv4(unknown);
                packet.write(&mut frame, payload).expect("a vector grows");
            }
        }
        other => unreachable!("kind {other}"),
    }
    frame
}

/// Changes some bytes.
pub fn damage(frame: &mut [u8], bytes: &mut Bytes<'_>) {
    for _ in 0..bytes.byte() % 4 {
        let at = usize::from(bytes.word()) % frame.len().max(1);
        let by = bytes.byte();
        if let Some(byte) = frame.get_mut(at) {
            *byte ^= by;
        }
    }
}
