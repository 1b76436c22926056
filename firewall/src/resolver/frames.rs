//! The resolver's packets as frames on the uplink.
//!
//! Answers are looked for in frames that the engine says are for us and that belong to no flow. Whatever
//! is not exactly an answer to something that was asked is left to the caller.

use alloc::vec;
use alloc::vec::Vec;
use core::net::IpAddr;

use super::{Resolver, Transmit, Transport};
use crate::address::{Address, V4, V6};
use crate::config::UplinkConfig;
use crate::frame::{Checksum, Frame, Time};
use crate::wire::ipv4::Parts;
use crate::wire::{checksum, ethernet, get_u16, ipv4, ipv6, protocol, put_u16, transport};

/// Hop limit of our packets.
const HOPS: u8 = 64;

impl Transport {
    const fn protocol(self) -> u8 {
        match self {
            Self::Udp => protocol::UDP,
            Self::Tcp => protocol::TCP,
        }
    }

    /// Where the checksum is, in bytes from the start of the header.
    const fn checksum_offset(self) -> usize {
        match self {
            Self::Udp => 6,
            Self::Tcp => 16,
        }
    }
}

impl Transmit {
    /// The whole Ethernet frame with right checksums, to be sent on the uplink. `None` if we have no
    /// address there in the server's family.
    pub fn frame(&self, uplink: &UplinkConfig) -> Option<Vec<u8>> {
        match self.server {
            IpAddr::V4(server) => {
                self.frame_between::<V4>(uplink, uplink.ip4.into(), server.into())
            }
            IpAddr::V6(server) => {
                self.frame_between::<V6>(uplink, uplink.ip6?.into(), server.into())
            }
        }
    }

    fn frame_between<A: Address>(
        &self,
        uplink: &UplinkConfig,
        own: IpAddr,
        server: IpAddr,
    ) -> Option<Vec<u8>> {
        let (src, dst) = (A::from_ip(own)?, A::from_ip(server)?);
        let len = u16::try_from(self.bytes.len()).ok()?;
        let mut frame = vec![0; ethernet::HEADER + A::HEADER_LEN + self.bytes.len()];
        let (header, packet) = frame.split_first_chunk_mut()?;
        ethernet::set_addresses(
            header,
            &ethernet::addresses(uplink.next_hop_mac, uplink.mac),
        );
        put_u16(header, 12, A::ETHERTYPE);
        let number = self.transport.protocol();
        A::write_header(packet, src, dst, number, len, HOPS);
        let payload = packet.get_mut(A::HEADER_LEN..)?;
        payload.copy_from_slice(&self.bytes);
        let pseudo = transport::pseudo_sum(src, dst, number, u32::from(len));
        // The field itself is zero. A UDP sum of zero would mean that there is none.
        let field = match checksum::field(checksum::add_bytes(pseudo, payload)) {
            0 => 0xffff,
            field => field,
        };
        put_u16(payload, self.transport.checksum_offset(), field);
        Some(frame)
    }
}

impl Resolver {
    /// Takes a frame from the uplink, if it is addressed to us and may be an answer to something that was
    /// asked. Returns whether it was; otherwise it is the caller's.
    pub fn receive_frame(&mut self, frame: &Frame<'_>, uplink: &UplinkConfig, now: Time) -> bool {
        let Some(header) = frame.head.first_chunk() else {
            return false;
        };
        if !frame.head.starts_with(&uplink.mac) {
            return false;
        }
        let own6 = uplink.ip6.and_then(|own| V6::from_ip(own.into()));
        match ethernet::ethertype(header) {
            ethernet::TYPE_IPV4 => match ipv4::take_apart(frame.head, frame.len) {
                Ok(parts) if parts.network.dst == uplink.ip4.to_bits() => {
                    self.receive_parts(&parts, frame.checksum, now)
                }
                _ => false,
            },
            ethernet::TYPE_IPV6 => match ipv6::take_apart(frame.head, frame.len) {
                Ok(parts) if Some(parts.network.dst) == own6 => {
                    self.receive_parts(&parts, frame.checksum, now)
                }
                _ => false,
            },
            _ => false,
        }
    }

    fn receive_parts<A: Address>(
        &mut self,
        parts: &Parts<'_, A>,
        state: Checksum,
        now: Time,
    ) -> bool {
        let network = &parts.network;
        let carried = match network.protocol {
            protocol::UDP => Transport::Udp,
            protocol::TCP => Transport::Tcp,
            _ => return false,
        };
        let len = usize::try_from(network.transport_len());
        if network.is_fragment || network.opaque || len != Ok(parts.transport.len()) {
            return false;
        }
        let server = network.src.to_ip();
        let local_port = get_u16(parts.transport, 2);
        if !local_port.is_some_and(|port| self.is_ours(server, carried, port)) {
            return false;
        }
        let is_right = match state {
            Checksum::Blank | Checksum::Validated => true,
            Checksum::Unverified => transport::checksum_is_right(
                (network.src, network.dst),
                network.protocol,
                network.transport_len(),
                parts.transport,
            ),
        };
        is_right && self.receive(server, carried, parts.transport, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::HostName;
    use core::net::{Ipv4Addr, Ipv6Addr};

    const OWN: Ipv4Addr = Ipv4Addr::new(10, 137, 0, 6);
    const OWN6: Ipv6Addr = Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 6);
    const MAC: [u8; 6] = [0, 0x16, 0x3e, 0x5e, 0x6c, 0];

    fn uplink() -> UplinkConfig {
        UplinkConfig {
            ip6: Some(OWN6),
            ..UplinkConfig::new(MAC, OWN)
        }
    }

    fn asking(server: &str) -> (Resolver, Transmit) {
        let mut resolver = Resolver::new([7; 32], true);
        resolver.set_servers(&[server.parse().unwrap()], false, Time::ZERO);
        let user = Ipv4Addr::new(10, 137, 0, 10).into();
        resolver.set_names(user, [&HostName::new("a.example").unwrap()], Time::ZERO);
        resolver.poll(Time::ZERO);
        let query = resolver.next_transmit().unwrap();
        (resolver, query)
    }

    /// The frame with the answer to a query frame of ours: no addresses.
    fn answer(query: &[u8]) -> Vec<u8> {
        let mut frame = Vec::from(query);
        let (ethernet, packet) = frame.split_at_mut(14);
        ethernet.rotate_left(6);
        ethernet[..].copy_from_slice(&[&query[6..12], &query[..6], &query[12..14]].concat());
        let header = if query[12] == 8 { 20 } else { 40 };
        let (ip, udp) = packet.split_at_mut(header);
        let addresses = &mut ip[if header == 20 { 12 } else { 8 }..];
        let half = addresses.len() / 2;
        addresses.rotate_left(half);
        udp[..4].rotate_left(2);
        // Flags are a word of their own: what the sum gains there the checksum loses.
        udp[10..12].copy_from_slice(&[0x81, 0x80]);
        let change = checksum::delta(0x0100, 0x8180);
        let field = get_u16(udp, 6).unwrap();
        put_u16(udp, 6, checksum::apply(field, change));
        frame
    }

    fn deliver(resolver: &mut Resolver, frame: &mut [u8], checksum: Checksum) -> bool {
        let frame = Frame {
            checksum,
            ..Frame::whole(frame)
        };
        resolver.receive_frame(&frame, &uplink(), Time::ZERO)
    }

    #[test]
    fn query_leaves_as_a_right_frame_and_its_answer_comes_in() {
        for server in ["10.139.1.1", "fd09::53"] {
            let (mut resolver, query) = asking(server);
            let frame = query.frame(&uplink()).unwrap();
            assert_eq!(frame[..6], crate::frame::GATEWAY_MAC);
            assert_eq!(frame[6..12], MAC);
            let mut answer = answer(&frame);
            assert!(
                deliver(&mut resolver, &mut answer, Checksum::Unverified),
                "{server}"
            );
            assert_eq!(resolver.counters().resolved, 1, "{server}");
        }
    }

    /// Sums computed outside of this program for 10.137.0.6:50000 to 10.139.1.1:53, one byte of payload.
    #[test]
    fn checksums_are_right() {
        let transmit = Transmit {
            server: "10.139.1.1".parse().unwrap(),
            transport: Transport::Udp,
            bytes: Vec::from([0xc3, 0x50, 0, 53, 0, 9, 0, 0, 0x41]),
        };
        let frame = transmit.frame(&uplink()).unwrap();
        assert_eq!(frame[24..26], [0x24, 0xb6]);
        assert_eq!(frame[40..42], [0xe5, 0x3b]);
    }

    #[test]
    fn frames_that_are_not_whole_or_not_for_us_are_left_alone() {
        let (mut resolver, query) = asking("10.139.1.1");
        let good = answer(&query.frame(&uplink()).unwrap());
        let with = |position: usize, byte: u8| {
            let mut frame = good.clone();
            frame[position] ^= byte;
            ipv4::set_checksum(&mut frame[14..]);
            frame
        };
        for (claim, mut frame) in [
            ("another MAC address", with(5, 1)),
            ("another type", with(13, 1)),
            ("a fragment", with(20, 0x20)),
            ("another protocol", with(23, 1)),
            ("another source", with(29, 1)),
            ("another destination", with(33, 1)),
            ("another port", with(37, 1)),
            ("a wrong checksum", with(50, 1)),
            ("cut short", good[..40].to_vec()),
            ("nothing", Vec::new()),
        ] {
            assert!(
                !deliver(&mut resolver, &mut frame, Checksum::Unverified),
                "{claim}"
            );
        }
        // Somebody vouches for the checksum.
        let mut blank = good.clone();
        put_u16(&mut blank, 40, 0x1234);
        assert!(deliver(&mut resolver, &mut blank, Checksum::Blank));
        assert_eq!(resolver.counters().resolved, 1);
    }

    #[test]
    fn without_an_address_in_the_family_nothing_is_sent() {
        let (_, query) = asking("fd09::53");
        assert_eq!(query.frame(&UplinkConfig::new(MAC, OWN)), None);
    }
}
