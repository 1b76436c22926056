//! The resolver's TCP against an independent implementation, smoltcp, over a line that loses packets.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test program"
)]

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};

use firewall::Time;
use firewall::resolver::{Resolver, Transmit, Transport};
use firewall::rule::HostName;
use firewall::ruleset::{HostLookup, HostState};
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr, Ipv4Packet, Ipv4Repr, TcpPacket};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 139, 1, 1);
const OWN: Ipv4Addr = Ipv4Addr::new(10, 137, 0, 6);
const USER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 137, 0, 10));
const NAME: &str = "many.example";

/// IP packets to and from the server.
#[derive(Default)]
struct Line {
    to_server: VecDeque<Vec<u8>>,
    from_server: VecDeque<Vec<u8>>,
}

struct Arrived(Vec<u8>);

impl RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Leaving<'a>(&'a mut VecDeque<Vec<u8>>);

impl TxToken for Leaving<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push_back(packet);
        result
    }
}

impl Device for Line {
    type RxToken<'a> = Arrived;
    type TxToken<'a> = Leaving<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Arrived, Leaving<'_>)> {
        let packet = self.to_server.pop_front()?;
        Some((Arrived(packet), Leaving(&mut self.from_server)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Leaving<'_>> {
        Some(Leaving(&mut self.from_server))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = 1500;
        capabilities
    }
}

/// A DNS server that truncates every answer by UDP and gives `addresses` of them by TCP.
struct Server {
    line: Line,
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: smoltcp::iface::SocketHandle,
    addresses: u16,
    answers: u32,
}

impl Server {
    fn new(addresses: u16) -> Self {
        let mut line = Line::default();
        let mut interface =
            Interface::new(Config::new(HardwareAddress::Ip), &mut line, Instant::ZERO);
        interface.update_ip_addrs(|list| {
            list.push(IpCidr::new(IpAddress::Ipv4(SERVER), 24)).unwrap();
        });
        interface
            .routes_mut()
            .add_default_ipv4_route(SERVER)
            .unwrap();
        let buffer = || tcp::SocketBuffer::new(vec![0; 32 * 1024]);
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(tcp::Socket::new(buffer(), buffer()));
        Self {
            line,
            interface,
            sockets,
            handle,
            addresses,
            answers: 0,
        }
    }

    fn poll(&mut self, now: Time) {
        let now = Instant::from_micros(i64::try_from(now.as_nanos() / 1000).unwrap());
        self.interface.poll(now, &mut self.line, &mut self.sockets);
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
        if !socket.is_open() {
            socket.listen(53).unwrap();
        }
        let query = socket.can_recv().then(|| {
            socket.recv(|bytes| match bytes {
                [high, low, rest @ ..] => {
                    let len = usize::from(u16::from_be_bytes([*high, *low]));
                    match rest.get(..len) {
                        Some(query) => (2 + len, Some(query.to_vec())),
                        None => (0, None),
                    }
                }
                _ => (0, None),
            })
        });
        if let Some(Ok(Some(query))) = query {
            let answer = answer(&query, self.addresses);
            let len = u16::try_from(answer.len()).unwrap();
            assert_eq!(socket.send_slice(&len.to_be_bytes()), Ok(2));
            assert_eq!(socket.send_slice(&answer), Ok(answer.len()));
            self.answers += 1;
        }
        self.interface.poll(now, &mut self.line, &mut self.sockets);
    }
}

/// The answer to a query, with the header's truncation bit clear.
fn answer(query: &[u8], addresses: u16) -> Vec<u8> {
    let mut message = query.to_vec();
    message[2..4].copy_from_slice(&[0x81, 0x80]);
    message[6..8].copy_from_slice(&addresses.to_be_bytes());
    for number in 0..addresses {
        message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 0, 0, 4, 192, 0]);
        message.extend(number.to_be_bytes());
    }
    message
}

/// The datagram that says that the answer to a query does not fit.
fn truncated(query: &[u8]) -> Vec<u8> {
    let mut datagram = query.to_vec();
    datagram.swap(0, 2);
    datagram.swap(1, 3);
    datagram[10] = 0x83;
    datagram
}

/// Makes an IP packet with a right checksum out of a TCP segment.
fn packet(segment: &Transmit) -> Vec<u8> {
    let mut bytes = segment.bytes.clone();
    TcpPacket::new_unchecked(&mut bytes)
        .fill_checksum(&IpAddress::Ipv4(OWN), &IpAddress::Ipv4(SERVER));
    let header = Ipv4Repr {
        src_addr: OWN,
        dst_addr: SERVER,
        next_header: smoltcp::wire::IpProtocol::Tcp,
        payload_len: bytes.len(),
        hop_limit: 64,
    };
    let mut packet = vec![0; 20 + bytes.len()];
    header.emit(
        &mut Ipv4Packet::new_unchecked(&mut packet),
        &Default::default(),
    );
    packet[20..].copy_from_slice(&bytes);
    packet
}

/// Looks the name up over a line that loses every packet for which `is_lost` says so; returns the number
/// of addresses found and the server.
fn look_up(addresses: u16, mut is_lost: impl FnMut() -> bool) -> (usize, Server, Time) {
    let mut server = Server::new(addresses);
    let mut resolver = Resolver::new([3; 32], false);
    let name = HostName::new(NAME).unwrap();
    resolver.set_servers(&[SERVER.into()], false, Time::ZERO);
    resolver.set_names(USER, [&name], Time::ZERO);
    let mut now = Time::ZERO;
    while resolver.next_changed().is_none() {
        assert!(now < Time::from_secs(120), "no answer");
        resolver.poll(now);
        while let Some(transmit) = resolver.next_transmit() {
            match transmit.transport {
                Transport::Udp => {
                    let datagram = truncated(&transmit.bytes);
                    assert!(resolver.receive(SERVER.into(), Transport::Udp, &datagram, now));
                }
                Transport::Tcp if is_lost() => {}
                Transport::Tcp => server.line.to_server.push_back(packet(&transmit)),
            }
        }
        server.poll(now);
        while let Some(packet) = server.line.from_server.pop_front() {
            if !is_lost() {
                let packet = Ipv4Packet::new_checked(&packet).unwrap();
                resolver.receive(SERVER.into(), Transport::Tcp, packet.payload(), now);
            }
        }
        now = now.plus_nanos(10_000_000);
    }
    let mut found = 0;
    let state = resolver
        .hosts_of(USER)
        .addresses4(&name, &mut |_| found += 1);
    assert_eq!(state, HostState::Resolved);
    // What is left to send ends the connection at the server too.
    while let Some(transmit) = resolver.next_transmit() {
        server.line.to_server.push_back(packet(&transmit));
    }
    server.poll(now);
    (found, server, now)
}

#[test]
fn answer_of_many_segments_comes_over_tcp_and_the_connection_ends() {
    let (found, mut server, now) = look_up(900, || false);
    assert_eq!(found, 64);
    assert_eq!(server.answers, 1);
    assert!(now < Time::from_secs(1), "{now:?}");
    let socket = server.sockets.get_mut::<tcp::Socket<'_>>(server.handle);
    assert!(
        matches!(socket.state(), tcp::State::Closed | tcp::State::Listen),
        "{}",
        socket.state()
    );
}

#[test]
fn lost_packets_delay_the_answer_and_do_not_prevent_it() {
    for seed in 0..40 {
        let mut state: u32 = seed;
        let is_lost = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16).is_multiple_of(6)
        };
        assert_eq!(look_up(300, is_lost).0, 64, "seed {seed}");
    }
}
