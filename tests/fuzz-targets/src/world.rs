//! A firewall with an uplink and two clients, and the time.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use firewall::{
    Checksum, ClientConfig, ClientId, Frame, Gso, Iface, Limits, Mac, Time, Verdict, Work,
};
use kernel::filter::{Filter, Options};
use qubes::qubesdb::Sink;

use crate::judge;

/// Our MAC address on the uplink.
pub const UPLINK_MAC: Mac = [0, 0x16, 0x3e, 0, 0, 1];
/// The MAC address of both clients.
pub const CLIENT_MAC: Mac = [0, 0x16, 0x3e, 0, 0, 2];
/// The MAC address of a backend.
pub const GATEWAY_MAC: Mac = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];
/// Our addresses on the uplink.
pub const OWN4: Ipv4Addr = Ipv4Addr::new(10, 138, 0, 1);
/// The same.
pub const OWN6: Ipv6Addr = Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0x8a, 1);
/// A server that rules allow.
pub const SERVER4: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 34);
/// The same.
pub const SERVER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x34);
/// Flows of either family.
const FLOWS: u32 = 64;
/// Frames that the filter may make by itself because of one frame: pieces of a datagram of 64 KiB, and errors.
const MADE_MOST: usize = 256;

/// The address of a client.
#[must_use]
pub fn client4(id: u16) -> Ipv4Addr {
    Ipv4Addr::new(10, 137, 0, if id == 0 { 10 } else { 11 })
}

/// The same.
#[must_use]
pub fn client6(id: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0x89, 10 + id)
}

/// What left the filter.
#[derive(Clone, Debug)]
pub struct Sent {
    /// Where.
    pub egress: Iface,
    /// The whole frame.
    pub frame: Vec<u8>,
}

/// How much went through, to show that a target reaches what it is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Reached {
    /// Frames from clients that left by the uplink.
    pub up: u32,
    /// Frames from the uplink that reached a client.
    pub down: u32,
    /// Frames that the filter made by itself.
    pub made: u32,
    /// Frames that went nowhere.
    pub stopped: u32,
}

impl core::ops::AddAssign for Reached {
    fn add_assign(&mut self, other: Self) {
        self.up += other.up;
        self.down += other.down;
        self.made += other.made;
        self.stopped += other.stopped;
    }
}

/// The subject with its surroundings.
pub struct World {
    filter: Filter,
    /// The time.
    pub now: Time,
    /// Everything that left since it was looked at.
    pub sent: Vec<Sent>,
    /// How much went through.
    pub reached: Reached,
    /// Client 1 may not send anything at the moment.
    forbidden: bool,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// Both clients may reach anything with TCP 443, UDP and ICMP; client 0 also has a rule by name.
    #[must_use]
    pub fn new() -> Self {
        let limits = Limits {
            flows4: FLOWS,
            flows6: FLOWS,
            clients: 2,
            ..Limits::default()
        };
        let mut world = Self {
            filter: Filter::new(limits, [7; 32], Options::default()),
            now: Time::from_secs(1000),
            sent: Vec::new(),
            reached: Reached::default(),
            forbidden: false,
        };
        for (key, value) in [
            ("/qubes-ip", OWN4.to_string()),
            ("/qubes-ip6", OWN6.to_string()),
            ("/qubes-gateway", "10.138.0.254".into()),
            ("/qubes-gateway6", "fd09::fe".into()),
            ("/qubes-netvm-gateway", "10.137.0.1".into()),
            ("/qubes-netvm-gateway6", "fd09::89:1".into()),
            ("/qubes-primary-dns", "10.139.1.1".into()),
            ("/qubes-secondary-dns", "10.139.1.2".into()),
        ] {
            world.filter.keys().written(key, value.as_bytes());
        }
        for id in 0..2 {
            let addresses = vec![IpAddr::V4(client4(id)), IpAddr::V6(client6(id))];
            let client = ClientConfig {
                id: ClientId(id),
                domid: id + 3,
                mac: CLIENT_MAC,
                addresses,
                mtu: 1500,
            };
            world.filter.attach_client(client).expect("there is room");
            world.allow(id);
        }
        world.filter.settings_complete(world.now);
        world.filter.set_uplink(Some(UPLINK_MAC), world.now);
        world.settle();
        world
    }

    /// Writes and commits a rule tree for both addresses of a client.
    pub fn rules(&mut self, id: u16, rules: &[&[u8]]) {
        for address in [client4(id).to_string(), client6(id).to_string()] {
            let tree = format!("/qubes-firewall/{address}");
            let keys = self.filter.keys();
            keys.removed(&format!("{tree}/"));
            keys.written(&format!("{tree}/policy"), b"drop");
            for (number, rule) in rules.iter().enumerate() {
                keys.written(&format!("{tree}/{number:04}"), rule);
            }
            keys.written(&tree, b"");
        }
        self.filter.follow_keys(self.now);
        self.settle();
    }

    /// The usual rules.
    pub fn allow(&mut self, id: u16) {
        let mut rules: Vec<&[u8]> = vec![
            b"action=accept proto=tcp dstports=443-443",
            b"action=accept proto=udp",
            b"action=accept proto=icmp",
        ];
        if id == 0 {
            rules.push(b"action=accept dsthost=web.example");
        }
        if id == 1 {
            self.forbidden = false;
        }
        self.rules(id, &rules);
    }

    /// Forbids client 1 everything: from now on nothing of it may leave, and nothing may reach it but errors of ours.
    pub fn forbid(&mut self) {
        self.rules(1, &[]);
        self.forbidden = true;
    }

    /// Lets time pass.
    pub fn pass(&mut self, seconds: u64) {
        self.now = self.now.plus_secs(seconds);
        self.settle();
    }

    /// Does what is due.
    fn settle(&mut self) {
        // Nothing that is due may go on for ever.
        for _ in 0..10_000 {
            let busy = self.filter.tick(self.now, 64);
            self.collect(None);
            if !busy {
                return;
            }
        }
        panic!("the filter does not come to rest");
    }

    /// Gives the filter a frame.
    pub fn give(&mut self, ingress: Iface, frame: &[u8], checksum: Checksum, gso: Option<Gso>) {
        let mut head = frame.to_vec();
        let mut work = [Work {
            ingress,
            frame: Frame {
                head: &mut head,
                len: u32::try_from(frame.len()).expect("no frame is that long"),
                checksum,
                gso,
            },
            verdict: Verdict::Local,
        }];
        self.filter.process(&mut work, self.now);
        let [work] = work;
        let (verdict, state) = (work.verdict, work.frame.checksum);
        let len = usize::try_from(work.frame.len).expect("a length");
        assert!(len <= frame.len(), "a frame in place grew");
        head.truncate(len);
        if let Verdict::Forward { egress } = verdict {
            self.judge_way(ingress, egress);
            match egress {
                Iface::Uplink => self.reached.up += 1,
                Iface::Client(_) => self.reached.down += 1,
            }
            judge::forwarded(egress, frame, &head, (checksum, state));
            self.sent.push(Sent {
                egress,
                frame: head,
            });
        } else {
            self.reached.stopped += 1;
        }
        self.collect(Some(ingress));
        let flows = self.filter.engine().flow_count();
        assert!(flows <= 2 * FLOWS, "more flows than there is room for");
    }

    /// Where a frame may go.
    fn judge_way(&self, ingress: Iface, egress: Iface) {
        match (ingress, egress) {
            (Iface::Client(id), Iface::Uplink) => {
                assert!(
                    !(self.forbidden && id == ClientId(1)),
                    "a frame of a client whose rules forbid everything left"
                );
            }
            (Iface::Uplink, Iface::Client(id)) => {
                assert!(
                    !(self.forbidden && id == ClientId(1)),
                    "a frame reached a client whose flows were cut"
                );
            }
            (from, to) => panic!("a frame went from {from:?} to {to:?}"),
        }
    }

    /// Takes what the filter made by itself.
    fn collect(&mut self, because_of: Option<Iface>) {
        let mut count = 0;
        while let Some(made) = self.filter.next_generated() {
            count += 1;
            assert!(count <= MADE_MOST, "too many frames of our own");
            judge::made(made.egress, made.bytes);
            self.reached.made += 1;
            // Datagrams that were put together take the ways of frames; errors go back or to us.
            if let (Some(Iface::Client(from)), Iface::Client(to)) = (because_of, made.egress) {
                assert_eq!(from, to, "a client was made to hear another one");
            }
            self.sent.push(Sent {
                egress: made.egress,
                frame: made.bytes.to_vec(),
            });
        }
    }
}
