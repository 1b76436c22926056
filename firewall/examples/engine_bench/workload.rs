//! The workloads of `performance.md` section 2 that are the engine's: the world before, the frames, and
//! what must become of each.

use std::net::{IpAddr, Ipv4Addr};

use firewall::rule::Action;
use firewall::{
    ClientConfig, ClientId, Downstream, DropReason, Engine, Frame, Gso, GsoFamily, Iface, Limits,
    Time, UplinkConfig, Verdict, Work,
};

use crate::Failure;
use crate::packet::{
    ACK, FIN, ICMP, OWN_MAC, SYN, Segment, TCP, UDP, UPLINK4, UPLINK6, datagram, fragment, frame,
    packet, port, server, source,
};
use crate::rules::compiled;

/// Frames of one run.
pub(crate) const PACKETS: u32 = 4096;

/// The virtual resolver, and the real one behind it.
const RESOLVERS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 139, 1, 1), Ipv4Addr::new(9, 9, 9, 9)];

/// What must become of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Up,
    Down(u16),
    Drop(DropReason),
    Reject(DropReason),
    Held,
    /// As other frames to the uplink.
    ReplacedUp,
}

impl Fate {
    fn is(self, verdict: Verdict) -> bool {
        let verdict_of_it = match self {
            Self::Up => Verdict::Forward {
                egress: Iface::Uplink,
            },
            Self::Down(id) => Verdict::Forward {
                egress: Iface::Client(ClientId(id)),
            },
            Self::Drop(reason) => Verdict::Drop(reason),
            Self::Reject(reason) => Verdict::Reject(reason),
            Self::Held => Verdict::Held,
            Self::ReplacedUp => Verdict::Replaced {
                egress: Iface::Uplink,
            },
        };
        verdict == verdict_of_it
    }
}

/// A frame that arrives.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) ingress: Iface,
    pub(crate) bytes: Vec<u8>,
    /// Bytes of the frame behind its head, and what it asks to have cut.
    pub(crate) gso: Option<(u32, Gso)>,
    pub(crate) fate: Fate,
}

/// What is run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Established {
        udp: bool,
        v6: bool,
        down: bool,
        large: bool,
    },
    New,
    Refused,
    Spoof,
    Full,
    Dns {
        down: bool,
    },
    Echo,
    Unreachable,
    Life,
    Gso,
    Fragments(Order),
    Flood,
    Mix,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Forward,
    Backward,
    Overlapping,
}

const KINDS: &[(&str, Kind)] = {
    const fn established(udp: bool, v6: bool, down: bool) -> Kind {
        Kind::Established {
            udp,
            v6,
            down,
            large: false,
        }
    }
    &[
        ("est-up", established(false, false, false)),
        ("est-down", established(false, false, true)),
        ("udp-up", established(true, false, false)),
        ("udp-down", established(true, false, true)),
        ("est6-up", established(false, true, false)),
        ("est6-down", established(false, true, true)),
        (
            "large",
            Kind::Established {
                udp: false,
                v6: false,
                down: false,
                large: true,
            },
        ),
        ("new", Kind::New),
        ("refused", Kind::Refused),
        ("spoof", Kind::Spoof),
        ("full", Kind::Full),
        ("dns-up", Kind::Dns { down: false }),
        ("dns-down", Kind::Dns { down: true }),
        ("echo", Kind::Echo),
        ("unreachable", Kind::Unreachable),
        ("life", Kind::Life),
        ("gso", Kind::Gso),
        ("frag", Kind::Fragments(Order::Forward)),
        ("frag-reversed", Kind::Fragments(Order::Backward)),
        ("frag-overlap", Kind::Fragments(Order::Overlapping)),
        ("flood", Kind::Flood),
        ("imix", Kind::Mix),
    ]
};

/// A workload with its parameters.
pub(crate) struct Plan {
    kind: Kind,
    flows: u32,
    clients: u16,
    rules: u16,
}

impl Plan {
    pub(crate) fn new(name: &str, flows: u32, clients: u16, rules: u16) -> Result<Self, Failure> {
        let found = KINDS.iter().find(|(own, _)| *own == name);
        let (_, kind) = found.ok_or_else(|| format!("no workload {name}"))?;
        Ok(Self {
            kind: *kind,
            flows,
            clients,
            rules,
        })
    }

    fn is_v6(&self) -> bool {
        matches!(self.kind, Kind::Established { v6: true, .. })
    }

    fn is_udp(&self) -> bool {
        matches!(
            self.kind,
            Kind::Established { udp: true, .. } | Kind::Dns { .. }
        )
    }

    /// An engine with its clients and their rules, and every flow that must exist before.
    pub(crate) fn world(&self) -> Result<Engine, Failure> {
        let room = match self.kind {
            Kind::Full => self.flows,
            _ => (self.flows + 4 * PACKETS).next_multiple_of(65_536),
        };
        let mut engine = Engine::new(
            Limits {
                flows4: if self.is_v6() { 1024 } else { room },
                flows6: if self.is_v6() { room } else { 1024 },
                clients: 256,
                outbox_bytes: 1 << 20,
                icmp_rate: None,
                ..Limits::default()
            },
            [42; 32],
        );
        engine.set_uplink(Some(UplinkConfig {
            ip6: Some(UPLINK6),
            gateway6: Some("fd09:24ef:4179::a8a:2".parse()?),
            ..UplinkConfig::new(OWN_MAC, UPLINK4)
        }));
        engine.set_downstream(Downstream {
            gateway4: Some(UPLINK4),
            gateway6: Some(UPLINK6),
        });
        engine.set_dns(&RESOLVERS[..1], &RESOLVERS[1..]);
        let last = if self.kind == Kind::Refused {
            Action::Drop
        } else {
            Action::Accept
        };
        for id in 0..self.clients {
            let addresses = [false, true].map(|v6| source(u32::from(id), v6)).to_vec();
            engine.attach_client(ClientConfig {
                id: ClientId(id),
                domid: id + 1,
                mac: OWN_MAC,
                addresses: addresses.clone(),
                mtu: 1500,
            })?;
            for address in addresses {
                engine.set_rules(address, compiled(self.rules, last, address)?);
            }
        }
        for mut arrival in self.before() {
            let fate = arrival.fate;
            let mut work = arrival.work();
            let now = Time::from_secs(1000);
            work.verdict = engine.process(work.ingress, &mut work.frame, now);
            fate.check(work.verdict)?;
        }
        Ok(engine)
    }

    /// What makes the flows that exist before.
    fn before(&self) -> Box<dyn Iterator<Item = Arrival> + '_> {
        let flows = 0..self.flows;
        match self.kind {
            Kind::Refused | Kind::Spoof | Kind::Life | Kind::Fragments(_) => {
                Box::new(std::iter::empty())
            }
            _ if self.is_udp() => {
                Box::new(flows.flat_map(|i| [self.udp(i, false), self.udp(i, true)]))
            }
            Kind::Echo => Box::new(flows.map(|i| self.echo(i))),
            _ => Box::new(flows.flat_map(|i| self.handshake(i))),
        }
    }

    /// The frames that are measured.
    pub(crate) fn arrivals(&self) -> Vec<Arrival> {
        let mut x = 1_u32;
        let random = std::iter::from_fn(move || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            Some(x >> 8)
        });
        let count = usize::try_from(PACKETS).unwrap_or(0);
        let known = random
            .zip(0..PACKETS)
            .map(|(x, at)| (x, x % self.flows.max(1), at));
        let fresh = self.flows..self.flows + PACKETS;
        match self.kind {
            Kind::Established { down, large, .. } => known
                .map(|(_, i, _)| match self.is_udp() {
                    true => self.udp(i, down),
                    false => self.data(i, down, if large { 1460 } else { 10 }),
                })
                .collect(),
            Kind::New | Kind::Full => fresh.map(|i| self.syn(i, Fate::Up)).collect(),
            Kind::Refused => fresh
                .map(|i| self.syn(i, Fate::Reject(DropReason::Rule)))
                .collect(),
            Kind::Spoof => fresh.map(|i| self.spoofed(i)).collect(),
            Kind::Dns { down } => known.map(|(_, i, _)| self.udp(i, down)).collect(),
            Kind::Echo => known.map(|(_, i, _)| self.echo(i)).collect(),
            Kind::Unreachable => known.map(|(_, i, _)| self.unreachable(i)).collect(),
            Kind::Life => (0..).flat_map(|i| self.life(i)).take(count).collect(),
            Kind::Gso => known.map(|(_, i, _)| self.gso(i)).collect(),
            Kind::Fragments(order) => (0..)
                .flat_map(|i| self.fragments(i, order))
                .take(count / 3 * 3)
                .collect(),
            // Every other packet is the attacker's, the first client's.
            Kind::Flood => known
                .map(|(x, i, at)| match at % 2 {
                    0 => self.data(i, false, 10),
                    _ => self.flood(x, at),
                })
                .collect(),
            Kind::Mix => known
                .map(|(x, i, at)| match at % 100 {
                    99 => self.syn(self.flows + at, Fate::Up),
                    _ => self.data(
                        i,
                        x & 0x40 != 0,
                        [10, 10, 10, 10, 10, 10, 10, 540, 540, 540, 540, 1460]
                            .get(usize::try_from(at % 12).unwrap_or(0))
                            .copied()
                            .unwrap_or(0),
                    ),
                })
                .collect(),
        }
    }

    fn client(&self, i: u32) -> u16 {
        u16::try_from(i % u32::from(self.clients)).unwrap_or(0)
    }

    /// A frame of flow `i`, or one like it.
    fn arrival(&self, i: u32, down: bool, number: u8, dst: IpAddr, transport: Vec<u8>) -> Arrival {
        let client = self.client(i);
        let (src, dst) = match (down, self.is_v6()) {
            (true, false) => (dst, UPLINK4.into()),
            (true, true) => (dst, UPLINK6.into()),
            (false, v6) => (source(u32::from(client), v6), dst),
        };
        let packet = packet(src, dst, number, transport);
        Arrival {
            ingress: if down {
                Iface::Uplink
            } else {
                Iface::Client(ClientId(client))
            },
            bytes: frame(down, &packet),
            gso: None,
            fate: if down { Fate::Down(client) } else { Fate::Up },
        }
    }

    fn tcp(
        &self,
        i: u32,
        down: bool,
        (seq, ack): (u32, u32),
        flags: u8,
        payload: usize,
    ) -> Arrival {
        let scaling = !matches!(
            self.kind,
            Kind::New | Kind::Full | Kind::Refused | Kind::Spoof
        );
        let ports = if down { (443, port(i)) } else { (port(i), 443) };
        let segment = Segment {
            ports,
            seq,
            ack,
            flags,
            payload,
            // A lone SYN is as short as it can be.
            scaling: flags & SYN != 0 && scaling,
        };
        self.arrival(i, down, TCP, server(i, self.is_v6()), segment.bytes())
    }

    fn syn(&self, i: u32, fate: Fate) -> Arrival {
        Arrival {
            fate,
            ..self.tcp(i, false, (1000, 0), SYN, 0)
        }
    }

    fn handshake(&self, i: u32) -> [Arrival; 4] {
        [
            self.tcp(i, false, (1000, 0), SYN, 0),
            self.tcp(i, true, (5000, 1001), SYN | ACK, 0),
            self.tcp(i, false, (1001, 5001), ACK, 0),
            // Its window, which is scaled now.
            self.tcp(i, true, (5001, 1001), ACK, 0),
        ]
    }

    /// A segment that stays where it is in the window however often it is sent.
    fn data(&self, i: u32, down: bool, payload: usize) -> Arrival {
        let numbers = if down { (5001, 1001) } else { (1001, 5001) };
        self.tcp(i, down, numbers, ACK, payload)
    }

    fn udp(&self, i: u32, down: bool) -> Arrival {
        let dns = matches!(self.kind, Kind::Dns { .. });
        let number = if dns { 53 } else { 443 };
        let server = match (dns, down) {
            (false, _) => server(i, self.is_v6()),
            (true, false) => RESOLVERS[0].into(),
            (true, true) => RESOLVERS[1].into(),
        };
        // One address for all: clients' ports must differ.
        let own = port(i);
        let ports = if down { (number, own) } else { (own, number) };
        self.arrival(i, down, UDP, server, datagram(ports, 22))
    }

    fn spoofed(&self, i: u32) -> Arrival {
        let honest = self.syn(i + 1, Fate::Drop(DropReason::SpoofedSource));
        Arrival {
            ingress: Iface::Client(ClientId(self.client(i))),
            ..honest
        }
    }

    fn echo(&self, i: u32) -> Arrival {
        let mut message = vec![8, 0, 0, 0];
        message.extend(port(i).to_be_bytes());
        message.extend([0, 1, 1, 2, 3, 4, 5, 6, 7, 8]);
        self.arrival(i, false, ICMP, server(i, false), message)
    }

    /// A router says that the segment of flow `i` could not be delivered.
    fn unreachable(&self, i: u32) -> Arrival {
        let segment = Segment {
            ports: (port(i), 443),
            seq: 1001,
            ack: 5001,
            flags: ACK,
            payload: 0,
            scaling: false,
        };
        let quoted = packet(UPLINK4.into(), server(i, false), TCP, segment.bytes());
        let message = [&[3, 1, 0, 0, 0, 0, 0, 0], &quoted[..]].concat();
        self.arrival(
            i,
            true,
            ICMP,
            Ipv4Addr::new(198, 18, 255, 1).into(),
            message,
        )
    }

    /// A connection from its first to its last segment.
    fn life(&self, i: u32) -> Vec<Arrival> {
        let mut all: Vec<Arrival> = self.handshake(i).into();
        let (mut up, mut down) = (1001, 5001);
        for _ in 0..8 {
            all.push(self.tcp(i, false, (up, down), ACK, 10));
            up += 10;
            all.push(self.tcp(i, true, (down, up), ACK, 10));
            down += 10;
        }
        all.push(self.tcp(i, false, (up, down), FIN | ACK, 0));
        all.push(self.tcp(i, true, (down, up + 1), FIN | ACK, 0));
        all.push(self.tcp(i, false, (up + 1, down + 1), ACK, 0));
        all
    }

    /// 64 KiB in one frame; the engine sees the headers.
    fn gso(&self, i: u32) -> Arrival {
        let mut arrival = self.data(i, false, 0);
        let total = 65_535_u16;
        arrival.bytes.splice(16..18, total.to_be_bytes());
        arrival.bytes.splice(24..26, [0, 0]);
        let header = arrival.bytes.get(14..34).unwrap_or_default().to_vec();
        let field = crate::packet::field(&header);
        arrival.bytes.splice(24..26, field.to_be_bytes());
        let gso = Gso {
            mss: 1448,
            family: GsoFamily::V4,
        };
        arrival.gso = Some((u32::from(total) + 14, gso));
        arrival
    }

    /// A datagram in three parts.
    fn fragments(&self, i: u32, order: Order) -> Vec<Arrival> {
        let whole = self.arrival(
            i,
            false,
            UDP,
            server(i, false),
            datagram((port(i), 443), 1192),
        );
        let packet = whole.bytes.get(14..).unwrap_or_default();
        let id = u16::try_from(i & 0xffff).unwrap_or(0);
        let second = if order == Order::Overlapping {
            392
        } else {
            400
        };
        let mut parts = vec![(0, 400), (second, 800), (800, 1200)];
        if order == Order::Backward {
            parts.reverse();
        }
        let overlap = Fate::Drop(DropReason::FragmentOverlap);
        let fates = match order {
            // The datagram is dropped with its second part; the third one waits for another.
            Order::Overlapping => [Fate::Held, overlap, Fate::Held],
            _ => [Fate::Held, Fate::Held, Fate::ReplacedUp],
        };
        let parts = parts.into_iter().zip(fates);
        let arrivals = parts.map(|((from, to), fate)| Arrival {
            ingress: whole.ingress,
            bytes: frame(false, &fragment(packet, from, to, id)),
            gso: None,
            fate,
        });
        arrivals.collect()
    }

    /// A new flow of the first client to an address that nobody could guess.
    fn flood(&self, x: u32, at: u32) -> Arrival {
        let i = (self.flows + at) * u32::from(self.clients);
        let segment = Segment {
            ports: (1024 + u16::try_from(x & 0x7fff).unwrap_or(0), 443),
            seq: 1000,
            ack: 0,
            flags: SYN,
            payload: 0,
            scaling: false,
        };
        let server = Ipv4Addr::from_bits(0x5e00_0000 | x & 0xff_ffff);
        self.arrival(i, false, TCP, server.into(), segment.bytes())
    }
}

impl Arrival {
    /// The frame as the engine takes it.
    pub(crate) fn work(&mut self) -> Work<'_> {
        let mut frame = Frame::whole(&mut self.bytes);
        if let Some((len, gso)) = self.gso {
            frame.len = len;
            frame.gso = Some(gso);
            frame.checksum = firewall::Checksum::Blank;
        }
        Work {
            ingress: self.ingress,
            frame,
            verdict: Verdict::Held,
        }
    }
}

impl Fate {
    /// Compares what became of a frame with what must.
    pub(crate) fn check(self, verdict: Verdict) -> Result<(), Failure> {
        match self.is(verdict) {
            true => Ok(()),
            false => Err(format!("{verdict:?} instead of {self:?}").into()),
        }
    }
}
