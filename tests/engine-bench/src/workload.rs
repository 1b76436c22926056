//! The workloads of `performance.md` section 2 that are the engine's: the frames, and what must become of
//! each. The world before is [`crate::world`]'s.

use std::net::{IpAddr, Ipv4Addr};

use firewall::{ClientId, DropReason, Frame, Gso, GsoFamily, Iface, Verdict, Work};

use crate::Failure;
use crate::packet::{
    ACK, FIN, ICMP, SYN, Segment, TCP, UDP, UPLINK4, UPLINK6, datagram, fragment, frame, packet_in,
    port, pretend_len, server, source, unsum,
};

/// Frames of one run.
pub const PACKETS: u32 = 4096;

/// Flows that stay in use while others idle out (W16).
pub(crate) const BUSY_FLOWS: u32 = 1024;

/// The virtual resolver, and the real one behind it.
pub(crate) const RESOLVERS: [Ipv4Addr; 2] =
    [Ipv4Addr::new(10, 139, 1, 1), Ipv4Addr::new(9, 9, 9, 9)];

/// What must become of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// To the uplink.
    Up,
    /// To this client.
    Down(u16),
    /// Dropped for this reason.
    Drop(DropReason),
    /// Dropped for this reason, with an ICMP error.
    Reject(DropReason),
    /// Kept until more of it comes.
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
pub struct Arrival {
    /// Where it comes from.
    pub ingress: Iface,
    /// The frame, or its head.
    pub bytes: Vec<u8>,
    /// Bytes of the frame behind its head, and what it asks to have cut.
    pub(crate) gso: Option<(u32, Gso)>,
    /// What must become of it.
    pub fate: Fate,
}

/// What is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Established {
        udp: bool,
        v6: bool,
        down: bool,
        large: bool,
    },
    /// UDP without checksums.
    Unsummed {
        down: bool,
    },
    New,
    Refused {
        /// Whether ICMP errors are limited.
        limited: bool,
    },
    Spoof,
    Full,
    Dns {
        tcp: bool,
        down: bool,
    },
    Echo {
        down: bool,
    },
    Unreachable,
    Life,
    Gso,
    Fragments(Order),
    Flood,
    Mix,
    /// Some flows are in use, the others idle out.
    Idle,
}

/// How fragments arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
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
    const fn dns(tcp: bool, down: bool) -> Kind {
        Kind::Dns { tcp, down }
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
        ("udp-unsummed-up", Kind::Unsummed { down: false }),
        ("udp-unsummed-down", Kind::Unsummed { down: true }),
        ("refused", Kind::Refused { limited: false }),
        ("refused-limited", Kind::Refused { limited: true }),
        ("spoof", Kind::Spoof),
        ("full", Kind::Full),
        ("dns-up", dns(false, false)),
        ("dns-down", dns(false, true)),
        ("dns-tcp-up", dns(true, false)),
        ("dns-tcp-down", dns(true, true)),
        ("echo", Kind::Echo { down: false }),
        ("echo-down", Kind::Echo { down: true }),
        ("unreachable", Kind::Unreachable),
        ("life", Kind::Life),
        ("gso", Kind::Gso),
        ("frag", Kind::Fragments(Order::Forward)),
        ("frag-reversed", Kind::Fragments(Order::Backward)),
        ("frag-overlap", Kind::Fragments(Order::Overlapping)),
        ("flood", Kind::Flood),
        ("imix", Kind::Mix),
        ("idle", Kind::Idle),
    ]
};

/// A workload with its parameters.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub(crate) kind: Kind,
    pub(crate) flows: u32,
    pub(crate) clients: u16,
    pub(crate) rules: u16,
}

/// The generator of `performance.md` section 2, shifted.
fn random() -> impl Iterator<Item = u32> {
    let mut x = 1_u32;
    std::iter::from_fn(move || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        Some(x >> 8)
    })
}

impl Plan {
    /// The names of all workloads.
    pub fn names() -> impl Iterator<Item = &'static str> {
        KINDS.iter().map(|(name, _)| *name)
    }

    /// A workload by its name, with `flows` flows that exist before, and `rules` rules for each client.
    ///
    /// # Errors
    ///
    /// If there is no such workload.
    pub fn new(name: &str, flows: u32, clients: u16, rules: u16) -> Result<Self, Failure> {
        let found = KINDS.iter().find(|(own, _)| *own == name);
        let (_, kind) = found.ok_or_else(|| format!("no workload {name}"))?;
        Ok(Self {
            kind: *kind,
            flows,
            clients,
            rules,
        })
    }

    /// How many flows exist before.
    pub fn flows(&self) -> u32 {
        self.flows
    }

    /// Whether its frames start flows, so that it must not be repeated in the same world.
    pub(crate) fn makes_flows(&self) -> bool {
        matches!(self.kind, Kind::New | Kind::Full | Kind::Flood | Kind::Mix)
    }

    pub(crate) fn is_v6(&self) -> bool {
        matches!(self.kind, Kind::Established { v6: true, .. })
    }

    pub(crate) fn is_udp(&self) -> bool {
        matches!(
            self.kind,
            Kind::Established { udp: true, .. }
                | Kind::Unsummed { .. }
                | Kind::Dns { tcp: false, .. }
        )
    }

    /// The frames that are measured.
    pub fn arrivals(&self) -> Vec<Arrival> {
        self.arrivals_of_round(0)
    }

    /// The frames that are measured in one of many rounds: new flows are new in each.
    pub fn arrivals_of_round(&self, round: u32) -> Vec<Arrival> {
        let known = random()
            .zip(0..PACKETS)
            .map(|(x, at)| (x, x % self.flows.max(1), at));
        let first = self.flows + round * PACKETS;
        let fresh = first..first + PACKETS;
        let count = usize::try_from(PACKETS).unwrap_or(0);
        match self.kind {
            Kind::Established { down, large, .. } => known
                .map(|(_, i, _)| match self.is_udp() {
                    true => self.udp(i, down),
                    false => self.data(i, down, if large { 1460 } else { 10 }),
                })
                .collect(),
            Kind::Unsummed { down } => known.map(|(_, i, _)| self.udp(i, down)).collect(),
            Kind::New | Kind::Full => fresh.map(|i| self.syn(i, Fate::Up)).collect(),
            Kind::Refused { .. } => fresh
                .map(|i| self.syn(i, Fate::Reject(DropReason::Rule)))
                .collect(),
            Kind::Spoof => fresh.map(|i| self.spoofed(i)).collect(),
            Kind::Dns { tcp: true, down } => known
                .map(|(_, i, _)| self.data(i, down, if down { 100 } else { 10 }))
                .collect(),
            Kind::Dns { tcp: false, down } => known.map(|(_, i, _)| self.udp(i, down)).collect(),
            Kind::Echo { down } => known.map(|(_, i, _)| self.echo(i, down)).collect(),
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
            Kind::Mix => known.map(|(x, i, at)| self.mixed(x, i, at)).collect(),
            Kind::Idle => known
                .map(|(x, _, _)| self.data(self.flows + x % BUSY_FLOWS, false, 10))
                .collect(),
        }
    }

    /// `count` flows that the first client makes up, of random addresses and ports.
    pub fn floods(&self, count: u32) -> impl Iterator<Item = Arrival> + '_ {
        random().zip(0..count).map(|(x, at)| self.flood(x, at))
    }

    /// Whether a frame is the flooding client's.
    pub fn is_flooder(arrival: &Arrival) -> bool {
        arrival.ingress == Iface::Client(ClientId(0))
    }

    fn client(&self, i: u32) -> u16 {
        u16::try_from(i % u32::from(self.clients)).unwrap_or(0)
    }

    /// A frame of flow `i`, or one like it.
    fn arrival(
        &self,
        i: u32,
        down: bool,
        number: u8,
        dst: IpAddr,
        transport: impl FnOnce(&mut Vec<u8>),
    ) -> Arrival {
        let client = self.client(i);
        let ends = match (down, self.is_v6()) {
            (true, false) => (dst, UPLINK4.into()),
            (true, true) => (dst, UPLINK6.into()),
            (false, v6) => (source(u32::from(client), v6), dst),
        };
        Arrival {
            ingress: if down {
                Iface::Uplink
            } else {
                Iface::Client(ClientId(client))
            },
            bytes: frame(down, ends, number, transport),
            gso: None,
            fate: if down { Fate::Down(client) } else { Fate::Up },
        }
    }

    /// The other end of flow `i`, as its frames in one direction name it, and its port.
    fn other_end(&self, i: u32, down: bool) -> (IpAddr, u16) {
        match (self.kind, down) {
            (Kind::Dns { .. }, false) => (RESOLVERS[0].into(), 53),
            (Kind::Dns { .. }, true) => (RESOLVERS[1].into(), 53),
            _ => (server(i, self.is_v6()), 443),
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
            Kind::New | Kind::Full | Kind::Refused { .. } | Kind::Spoof
        );
        let (address, number) = self.other_end(i, down);
        // With one address for all, clients' ports must differ.
        let own = port(i);
        let segment = Segment {
            ports: if down { (number, own) } else { (own, number) },
            seq,
            ack,
            flags,
            payload,
            // A lone SYN is as short as it can be.
            scaling: flags & SYN != 0 && scaling,
        };
        self.arrival(i, down, TCP, address, |bytes| segment.write(bytes))
    }

    fn syn(&self, i: u32, fate: Fate) -> Arrival {
        Arrival {
            fate,
            ..self.tcp(i, false, (1000, 0), SYN, 0)
        }
    }

    pub(crate) fn handshake(&self, i: u32) -> [Arrival; 4] {
        [
            self.tcp(i, false, (1000, 0), SYN, 0),
            self.tcp(i, true, (5000, 1001), SYN | ACK, 0),
            self.tcp(i, false, (1001, 5001), ACK, 0),
            // Its window, which is scaled now.
            self.tcp(i, true, (5001, 1001), ACK, 0),
        ]
    }

    /// A frame of `imix`.
    fn mixed(&self, x: u32, i: u32, at: u32) -> Arrival {
        const PAYLOADS: [usize; 12] = [10, 10, 10, 10, 10, 10, 10, 540, 540, 540, 540, 1460];
        if at % 100 == 99 {
            return self.syn(self.flows + at, Fate::Up);
        }
        let payload = PAYLOADS.get(usize::try_from(at % 12).unwrap_or(0));
        self.data(i, x & 0x40 != 0, payload.copied().unwrap_or(0))
    }

    /// A segment that stays where it is in the window however often it is sent.
    fn data(&self, i: u32, down: bool, payload: usize) -> Arrival {
        let numbers = if down { (5001, 1001) } else { (1001, 5001) };
        self.tcp(i, down, numbers, ACK, payload)
    }

    pub(crate) fn udp(&self, i: u32, down: bool) -> Arrival {
        let (address, number) = self.other_end(i, down);
        let own = port(i);
        let ports = if down { (number, own) } else { (own, number) };
        let mut arrival = self.arrival(i, down, UDP, address, |bytes| datagram(bytes, ports, 22));
        if matches!(self.kind, Kind::Unsummed { .. }) {
            unsum(&mut arrival.bytes);
        }
        arrival
    }

    fn spoofed(&self, i: u32) -> Arrival {
        let honest = self.syn(i + 1, Fate::Drop(DropReason::SpoofedSource));
        Arrival {
            ingress: Iface::Client(ClientId(self.client(i))),
            ..honest
        }
    }

    pub(crate) fn echo(&self, i: u32, down: bool) -> Arrival {
        let kind = if down { 0 } else { 8 };
        self.arrival(i, down, ICMP, server(i, false), |bytes| {
            bytes.extend_from_slice(&[kind, 0, 0, 0]);
            bytes.extend_from_slice(&port(i).to_be_bytes());
            bytes.extend_from_slice(&[0, 1, 1, 2, 3, 4, 5, 6, 7, 8]);
        })
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
        let ends = (UPLINK4.into(), server(i, false));
        let quoted = frame(false, ends, TCP, |bytes| segment.write(bytes));
        let router = Ipv4Addr::new(198, 18, 255, 1);
        self.arrival(i, true, ICMP, router.into(), |bytes| {
            bytes.extend_from_slice(&[3, 1, 0, 0, 0, 0, 0, 0]);
            bytes.extend_from_slice(packet_in(&quoted));
        })
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
        pretend_len(&mut arrival.bytes, total);
        let gso = Gso {
            mss: 1448,
            family: GsoFamily::V4,
        };
        arrival.gso = Some((u32::from(total) + 14, gso));
        arrival
    }

    /// A datagram in three parts.
    fn fragments(&self, i: u32, order: Order) -> Vec<Arrival> {
        let whole = self.arrival(i, false, UDP, server(i, false), |bytes| {
            datagram(bytes, (port(i), 443), 1192);
        });
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
            bytes: fragment(&whole.bytes, from, to, id),
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
        self.arrival(i, false, TCP, server.into(), |bytes| segment.write(bytes))
    }
}

impl Arrival {
    /// The frame as the engine takes it.
    pub fn work(&mut self) -> Work<'_> {
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
    ///
    /// # Errors
    ///
    /// If that is something else.
    pub fn check(self, verdict: Verdict) -> Result<(), Failure> {
        match self.is(verdict) {
            true => Ok(()),
            false => Err(format!("{verdict:?} instead of {self:?}").into()),
        }
    }
}
