//! The run itself: captured frames through the firewall that the kernel runs, at the captures' own pace.
//!
//! # Time
//!
//! Frames are taken in the order of their time stamps, those with the same in the order in which the files were named.
//! The clock jumps from one to the next; what is due in between (lookups of names, flows that idle out) happens at
//! its time. Nothing happens after the last frame or change. When more than [`MAX_STEPS`] things are due in one gap, the rest
//! of it is skipped.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::IpAddr;

use anyhow::{Result, anyhow, bail};
use firewall::{
    Checksum, ClientConfig, ClientId, DropReason, FlowView, Frame, Iface, Limits, Time, Verdict,
    Work,
};
use kernel::filter::{self, Filter, Options};
use xenstore::ConfigEvent;

use super::capture::{Captured, Writer};
use super::config::{UPLINK, Vif};
use super::packet::{self, Content, Upper};
use super::report::{Fate, Frame as Taken, Made, Nat, Report, RuleName};

/// The clock when the first frame comes, in nanoseconds: as if the firewall had been up for a while.
const START: u64 = 1_000_000_000_000;

/// Things that may be due between two frames.
const MAX_STEPS: u32 = 100_000;

/// Steps of work that may follow from one frame or one change.
const MAX_WORK: u32 = 10_000_000;

/// The least that the clock moves on between two things that are due, in nanoseconds.
const MIN_STEP: u64 = 1_000_000;

/// Flows and fragments that may be expired in one step.
const EXPIRIES: u32 = 4096;

/// Bytes of a frame that the engine sees in one piece, as with the drivers: a page.
const HEAD: usize = 4096;

const MTU: u16 = firewall::config::DEFAULT_MTU;

/// How a firewall is made.
pub struct Setup<'a> {
    /// Sizes of the engine's tables.
    pub limits: Limits,
    /// All randomness comes from it.
    pub seed: [u8; 32],
    /// Switches of the kernel command line.
    pub options: Options,
    /// The clients.
    pub vifs: &'a [Vif],
    /// Our MAC address on the uplink.
    pub uplink_mac: [u8; 6],
}

/// Something that happens.
pub enum Event {
    /// A frame comes in on an interface, numbered as [`Replay::names`] has them.
    Frame(usize, Captured),
    /// dom0 changes keys.
    Change(u64, Vec<ConfigEvent>),
}

impl Event {
    /// When it happens, in nanoseconds since 1970.
    #[must_use]
    pub const fn time(&self) -> u64 {
        match self {
            Self::Frame(_, captured) => captured.time,
            Self::Change(time, _) => *time,
        }
    }
}

/// A firewall between capture files.
pub struct Replay<W> {
    filter: Filter,
    /// Names of the interfaces: clients in the order of their numbers, then the uplink.
    names: Vec<String>,
    report: Report<W>,
    writers: BTreeMap<usize, Writer>,
    /// The engine's clock.
    now: Time,
    /// What the captures' clock shows when the engine's shows [`START`].
    origin: u64,
    /// Input frames so far.
    frames: u64,
}

/// What was made because of one event.
#[derive(Default)]
struct Cause {
    /// The input frame.
    number: Option<u64>,
    /// What it carries goes on here, as frames of ours.
    onward: Option<Iface>,
    /// It was an answer to the resolver, which may ask on because of it.
    is_answer: bool,
}

impl<W: Write> Replay<W> {
    /// Sets up the firewall: dom0's keys, the clients, the uplink. `origin` is the time of the first event, in nanoseconds
    /// since 1970; `writers` are the captures that are made, as many as there are interfaces.
    ///
    /// # Errors
    ///
    /// If a client cannot be attached, or those of the output.
    pub fn new(
        setup: &Setup<'_>,
        keys: Vec<ConfigEvent>,
        origin: u64,
        report: Report<W>,
        writers: Vec<Writer>,
    ) -> Result<Self> {
        let mut replay = Self {
            filter: Filter::new(setup.limits, setup.seed, setup.options),
            names: names(setup.vifs),
            report,
            writers: writers.into_iter().enumerate().collect(),
            now: Time::from_nanos(START),
            origin,
            frames: 0,
        };
        replay.filter.set_uplink(Some(setup.uplink_mac), replay.now);
        for key in keys {
            replay.filter.change(key, replay.now);
        }
        for (vif, id) in setup.vifs.iter().zip(0_u16..) {
            let client = ClientConfig {
                id: ClientId(id),
                domid: vif.domid,
                mac: vif.mac,
                addresses: vif.addresses.clone(),
                mtu: MTU,
            };
            let attached = replay.filter.attach_client(client);
            attached.map_err(|error| anyhow!("vif {}: {error}", vif.name))?;
        }
        replay.settle(&Cause::default())?;
        Ok(replay)
    }

    /// Lets something happen.
    ///
    /// # Errors
    ///
    /// Those of the output.
    pub fn happen(&mut self, event: Event) -> Result<()> {
        self.advance(event.time())?;
        match event {
            Event::Change(_, keys) => {
                for key in keys {
                    self.filter.change(key, self.now);
                }
                self.settle(&Cause::default())
            }
            Event::Frame(index, captured) => self.take(index, captured),
        }
    }

    /// Writes everything out.
    ///
    /// # Errors
    ///
    /// Those of the output.
    pub fn finish(self) -> Result<W> {
        for writer in self.writers.into_values() {
            writer.finish()?;
        }
        self.report.finish()
    }

    /// The captures' clock.
    const fn time(&self) -> u64 {
        let elapsed = self.now.as_nanos().saturating_sub(START);
        self.origin.saturating_add(elapsed)
    }

    /// Moves the clock to a time, in nanoseconds since 1970.
    fn advance(&mut self, time: u64) -> Result<()> {
        let elapsed = time.saturating_sub(self.origin);
        let target = Time::from_nanos(START.saturating_add(elapsed)).max(self.now);
        for _ in 0..MAX_STEPS {
            let Some(due) = self.filter.next_deadline(self.now) else {
                break;
            };
            let next = due.max(self.now.plus_nanos(MIN_STEP));
            if next >= target {
                break;
            }
            self.now = next;
            self.settle(&Cause::default())?;
        }
        self.now = target;
        self.report.expire(self.time())
    }

    /// Does all the work that there is now.
    fn settle(&mut self, cause: &Cause) -> Result<()> {
        for _ in 0..MAX_WORK {
            self.send_made(cause)?;
            if !self.filter.tick(self.now, EXPIRIES) {
                return self.send_made(cause);
            }
        }
        bail!("the firewall does not come to rest: please report this");
    }

    /// Sends the frames that the firewall made.
    fn send_made(&mut self, cause: &Cause) -> Result<()> {
        let time = self.time();
        while let Some(made) = self.filter.next_generated() {
            let index = index_of(made.egress, &self.names);
            let content = Content::of(made.bytes);
            let kind = if cause.onward == Some(made.egress) && !is_icmp_error(&content) {
                "forwarded"
            } else {
                kind_of(&content)
            };
            self.report.made(&Made {
                kind,
                time,
                // Otherwise a question that happens to be due now.
                cause: cause
                    .number
                    .filter(|_| kind != "dns-query" || cause.is_answer),
                out: self.names.get(index).map_or("", String::as_str),
                content,
                len: made.bytes.len(),
            })?;
            if let Some(writer) = self.writers.get_mut(&index) {
                writer.write(time, made.bytes)?;
            }
        }
        Ok(())
    }

    /// Takes an input frame.
    fn take(&mut self, index: usize, captured: Captured) -> Result<()> {
        self.frames += 1;
        let taken = Taken {
            number: self.frames,
            time: captured.time,
            iface: self.names.get(index).cloned().unwrap_or_default(),
        };
        let came = Content::of(&captured.bytes);
        let mut bytes = captured.bytes;
        let (verdict, ingress) = self.process(index, &mut bytes);
        let mut cause = Cause {
            number: Some(taken.number),
            is_answer: verdict == Verdict::Deliver,
            ..Cause::default()
        };
        let mut fate = self.fate(verdict, ingress, &came);
        match verdict {
            Verdict::Forward { egress } => {
                let left = Content::of(&bytes);
                fate.nat = came
                    .packet()
                    .zip(left.packet())
                    .and_then(|(a, b)| Nat::between(a, b));
                let out = index_of(egress, &self.names);
                if let Some(writer) = self.writers.get_mut(&out) {
                    writer.write(captured.time, &bytes)?;
                }
            }
            Verdict::Replaced { egress } => cause.onward = Some(egress),
            Verdict::Held if came.fragment().is_none() => {
                // An answer of DNS that waits until rules know it.
                let left = Content::of(&bytes);
                fate.nat = came
                    .packet()
                    .zip(left.packet())
                    .and_then(|(a, b)| Nat::between(a, b));
            }
            _ => {}
        }
        if verdict == Verdict::Held && came.fragment().is_some() {
            self.report.held(taken, came.fragment());
            return self.settle(&cause);
        }
        // The line of a frame stands before those of the frames that it caused.
        if verdict != Verdict::Held {
            self.report.frame(&taken, came.fragment(), &fate)?;
            return self.settle(&cause);
        }
        let flow = self.flow_of(&came);
        let client = flow.and_then(|flow| self.client_with(flow.source.0));
        fate.out = client.and_then(|client| self.names.get(client).cloned());
        cause.onward = client.map(|client| Iface::Client(ClientId(number_of(client))));
        self.report.frame(&taken, None, &fate)?;
        self.settle(&cause)
    }

    /// Asks the firewall about a frame; `bytes` are then what leaves.
    fn process(&mut self, index: usize, bytes: &mut Vec<u8>) -> (Verdict, Iface) {
        let ingress = if index + 1 == self.names.len() {
            Iface::Uplink
        } else {
            Iface::Client(ClientId(number_of(index)))
        };
        let (checksum, gso) = packet::offload(bytes);
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let seen = bytes.len().min(HEAD);
        let mut work = [Work {
            ingress,
            frame: Frame {
                head: bytes.get_mut(..seen).unwrap_or_default(),
                len,
                checksum,
                gso,
            },
            verdict: Verdict::Local,
        }];
        self.filter.process(&mut work, self.now);
        let [work] = work;
        let (verdict, checksum) = (work.verdict, work.frame.checksum);
        let len = usize::try_from(work.frame.len).unwrap_or(usize::MAX);
        if matches!(verdict, Verdict::Forward { .. } | Verdict::Held) {
            bytes.truncate(len);
            // As on a wire.
            if checksum == Checksum::Blank {
                filter::complete_checksum(bytes);
            }
        }
        (verdict, ingress)
    }

    /// What a verdict means, except for the translation of a frame that is forwarded as it is.
    fn fate(&self, verdict: Verdict, ingress: Iface, came: &Content) -> Fate {
        let engine = self.filter.engine();
        let flow = self.flow_of(came);
        let asked = engine.last_rule().map(|rule| match rule {
            firewall::ruleset::RuleRef::Number(number) => RuleName::Number(number.get()),
            firewall::ruleset::RuleRef::Policy => RuleName::Policy("policy"),
        });
        let refused = |verdict: &'static str, reason: DropReason| Fate {
            rule: asked.filter(|_| matches!(reason, DropReason::Rule | DropReason::Policy)),
            ..Fate::end(verdict, reason.name())
        };
        let of_flow = flow.map(|flow| match flow.rule {
            Some(number) => RuleName::Number(number),
            None => RuleName::Policy("policy"),
        });
        let accepted = Fate {
            verdict: "accept",
            reason: None,
            rule: of_flow.or(asked),
            nat: None,
            out: None,
        };
        match verdict {
            Verdict::Forward { egress } => Fate {
                out: self.names.get(index_of(egress, &self.names)).cloned(),
                ..accepted
            },
            Verdict::Replaced { egress } => Fate {
                out: self.names.get(index_of(egress, &self.names)).cloned(),
                nat: flow.and_then(|flow| Nat::of_flow(&flow, ingress == Iface::Uplink)),
                ..accepted
            },
            Verdict::Held => accepted,
            Verdict::Drop(reason) => refused("drop", reason),
            Verdict::Reject(reason) => refused("reject", reason),
            Verdict::Deliver => Fate::end("local", "answer-to-us"),
            Verdict::Local => Fate::end("local", local_reason(came)),
        }
    }

    /// The flow that the last frame belonged to.
    fn flow_of(&self, came: &Content) -> Option<FlowView> {
        let family = came.family()?;
        self.filter.engine().last_flow(family, self.now)
    }

    /// The client that has an address.
    fn client_with(&self, address: IpAddr) -> Option<usize> {
        let mut clients = self.filter.engine().clients();
        let client = clients.find(|client| client.addresses.contains(&address))?;
        Some(usize::from(client.id.0))
    }
}

/// The names of all interfaces: clients, then the uplink.
#[must_use]
pub fn names(vifs: &[Vif]) -> Vec<String> {
    let clients = vifs.iter().map(|vif| vif.name.clone());
    clients.chain([UPLINK.to_owned()]).collect()
}

fn index_of(iface: Iface, names: &[String]) -> usize {
    match iface {
        Iface::Client(ClientId(id)) => usize::from(id),
        Iface::Uplink => names.len().saturating_sub(1),
    }
}

fn number_of(index: usize) -> u16 {
    u16::try_from(index).unwrap_or(u16::MAX)
}

/// What a frame for the firewall itself was.
const fn local_reason(content: &Content) -> &'static str {
    match content {
        Content::Arp => "arp",
        Content::Ip(packet) => match packet.upper {
            // No other datagram for us is answered; the last fragment does not say what it is.
            _ if packet.fragment.is_some() => "ping",
            Upper::Icmp(135, ..) => "neighbour-discovery",
            Upper::Icmp(..) => "ping",
            _ => "for-us",
        },
        Content::Other => "for-us",
    }
}

/// Whether it is an ICMP error, which answers a frame even if the frame goes on.
const fn is_icmp_error(content: &Content) -> bool {
    matches!(kind_of(content).as_bytes(), b"icmp-error")
}

/// What a frame of ours is.
const fn kind_of(content: &Content) -> &'static str {
    match content {
        Content::Arp => "arp-reply",
        Content::Other => "other",
        Content::Ip(packet) => match (packet.src, packet.upper) {
            (IpAddr::V4(_), Upper::Icmp(3 | 11 | 12, ..))
            | (IpAddr::V6(_), Upper::Icmp(1..=4, ..)) => "icmp-error",
            (_, Upper::Icmp(0 | 129, ..)) => "echo-reply",
            // Nothing else of our own is as large.
            _ if packet.fragment.is_some() => "echo-reply",
            (_, Upper::Icmp(136, ..)) => "neighbour-advertisement",
            (_, Upper::Ports(_, 53)) => "dns-query",
            _ => "other",
        },
    }
}
