//! Sends a script through both, packet by packet, and compares.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use firewall::Verdict;

use crate::differences::{self, Case};
use crate::engine::Engine;
use crate::kernel::Kernel;
use crate::pace;
use crate::packet::{Body, ICMP, ICMPV6, TCP, UDP};
use crate::report::{describe, list};
use crate::script::{Script, Step};
use crate::seen::{self, Seen, Sum};
use crate::world::World;

// TCP flags.
const FIN: u8 = 1;
const RST: u8 = 4;

/// Stands for the flow of a packet that belongs to none of the script.
const STRAY: usize = usize::MAX;

/// How often something happened.
pub(crate) type Tally = BTreeMap<String, u64>;

/// Two that should agree and do not.
#[derive(Debug)]
pub(crate) struct Disagreement {
    /// The number of the step.
    pub(crate) step: usize,
    /// What is wrong.
    pub(crate) text: String,
}

/// What a run of a script found.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// Packets that went through both.
    pub(crate) packets: u64,
    pub(crate) coverage: Tally,
    pub(crate) differences: Tally,
    pub(crate) disagreement: Option<Disagreement>,
    /// The machine was too slow for a timed script: this proves nothing.
    pub(crate) late: bool,
}

/// What is known about the ports of one side.
#[derive(Debug, Default)]
struct Side {
    /// What each flow has outside.
    outside: HashMap<usize, u16>,
    /// Who has which port, towards whom.
    taken: HashMap<(u8, u16, IpAddr, u16), usize>,
}

struct Replay<'a> {
    script: &'a Script,
    /// When something was last sent in each flow of a timed script, in milliseconds of the engine.
    last_at: HashMap<usize, u64>,
    /// How long nothing was sent in the flow of this packet.
    waited: Duration,
    /// What is in force now.
    world: World,
    /// Where flows go that have begun, after translation.
    remotes: HashMap<usize, IpAddr>,
    /// Flows that newer rules forbid (D5).
    forbidden: HashSet<usize>,
    /// Where they go: what comes from there may be of one of them in the kernel, whatever the script says.
    left: HashSet<(u8, IpAddr)>,
    kernel_side: Side,
    engine_side: Side,
    /// Flows that the two know differently, for a reason.
    retired: HashSet<usize>,
    /// Where the kernel has translations that the engine has not.
    occupied: HashSet<(u8, IpAddr)>,
    /// Where packets without ports that are of no flow of the script have gone: they started flows, too.
    strays: HashSet<(u8, IpAddr)>,
    /// Flows with a segment that ends them.
    ended: HashSet<usize>,
    /// Flows of which something has passed.
    begun: HashSet<usize>,
    findings: Findings,
}

/// Runs a script.
///
/// # Errors
///
/// If the kernel cannot be set up.
pub(crate) fn run(script: &Script) -> Result<Findings> {
    let mut kernel = Kernel::new(&script.world, script.factor)?;
    let mut engine = Engine::new(&script.world, script.seed)?;
    let mut replay = Replay {
        script,
        last_at: HashMap::new(),
        waited: Duration::ZERO,
        world: script.world.clone(),
        remotes: HashMap::new(),
        forbidden: HashSet::new(),
        left: HashSet::new(),
        kernel_side: Side::default(),
        engine_side: Side::default(),
        retired: HashSet::new(),
        occupied: HashSet::new(),
        strays: HashSet::new(),
        ended: HashSet::new(),
        begun: HashSet::new(),
        findings: Findings::default(),
    };
    let start = Instant::now();
    for (number, step) in script.steps.iter().enumerate() {
        if let Some(factor) = script.factor {
            let then = start + Duration::from_millis(step.at) / u32::try_from(factor)?;
            thread::sleep(then.saturating_duration_since(Instant::now()));
            if then.elapsed() > pace::LATE {
                replay.findings.late = true;
                break;
            }
            engine.advance_to(step.at);
            replay.waited = replay.waited_for(step);
            // A flow that has idled out may start again with another port.
            replay.ended.extend(step.flow);
        }
        if let Some(change) = &step.change {
            replay.world.apply(change);
            kernel.update(&replay.world)?;
            engine.update(&replay.world, change)?;
            replay.note_forbidden();
            // New rules may end these in the engine alone (D5), and nobody keeps books about them.
            let strays = std::mem::take(&mut replay.strays);
            replay.occupied.extend(strays);
        }
        let step = &replay.readdressed(step);
        if replay.is_in_vain(step) {
            continue;
        }
        if let Err(text) = replay.step(&mut kernel, &mut engine, step) {
            replay.findings.disagreement = Some(Disagreement { step: number, text });
            break;
        }
    }
    Ok(replay.findings)
}

/// The class of a port, within which another may be chosen.
const fn class(port: u16) -> u8 {
    match port {
        0..512 => 0,
        512..1024 => 1,
        _ => 2,
    }
}

impl Replay<'_> {
    /// How long nothing was sent in the flow of a step, and notes that something is now.
    fn waited_for(&mut self, step: &Step) -> Duration {
        let before = step
            .flow
            .and_then(|flow| self.last_at.insert(flow, step.at));
        Duration::from_millis(step.at - before.unwrap_or(step.at))
    }

    /// Where a flow goes that starts now, or has gone since it started.
    fn remote(&self, number: usize) -> Option<IpAddr> {
        let flow = self.script.flows.get(number)?;
        let is_dns = flow.dport == 53 && matches!(flow.protocol, TCP | UDP);
        let now = || match self.world.after_dns(flow.server) {
            Some(remote) if is_dns => remote,
            _ => flow.server,
        };
        Some(self.remotes.get(&number).copied().unwrap_or_else(now))
    }

    /// A step with the address of whoever answers now: another one after a change of resolvers.
    fn readdressed(&self, step: &Step) -> Step {
        let mut step = step.clone();
        step.flow = self.forbidden_without_ports(&step).or(step.flow);
        if step.port == 0
            && let Some(number) = step.flow
            && let Some(flow) = self.script.flows.get(number)
            && step.packet.src == flow.remote
            && let Some(remote) = self.remote(number)
        {
            step.packet.src = remote;
        }
        step
    }

    /// The forbidden flow that a packet belongs to although the script does not say so: without ports
    /// all packets between two addresses are of one flow.
    fn forbidden_without_ports(&self, step: &Step) -> Option<usize> {
        let packet = &step.packet;
        if matches!(packet.protocol, TCP | UDP | ICMP | ICMPV6) {
            return None;
        }
        self.forbidden.iter().copied().find(|number| {
            let flow = &self.script.flows[*number];
            let same = if step.port == 0 {
                self.remote(*number) == Some(packet.src)
            } else {
                (flow.client, flow.server) == (packet.src, packet.dst)
            };
            same && flow.protocol == packet.protocol
        })
    }

    /// Whether the rules that are in force allow a flow.
    fn allows(&self, number: usize) -> bool {
        match (self.script.flows.get(number), self.remote(number)) {
            (Some(flow), Some(remote)) => self.world.allows(flow, remote),
            _ => true,
        }
    }

    /// Whether the rules that are in force would allow a flow if it began now.
    fn allows_anew(&self, number: usize) -> bool {
        self.script.flows.get(number).is_some_and(|flow| {
            let is_dns = flow.dport == 53 && matches!(flow.protocol, TCP | UDP);
            let remote = self.world.after_dns(flow.server).filter(|_| is_dns);
            self.world.allows(flow, remote.unwrap_or(flow.server))
        })
    }

    /// Finds the running flows that a change of rules should end.
    fn note_forbidden(&mut self) {
        let begun: Vec<usize> = self.begun.iter().copied().collect();
        let forbidden = begun.into_iter().filter(|flow| !self.allows(*flow));
        let forbidden: Vec<usize> = forbidden.collect();
        for number in &forbidden {
            if let (Some(flow), Some(remote)) =
                (self.script.flows.get(*number), self.remote(*number))
            {
                self.left.insert((flow.protocol, remote));
            }
        }
        self.forbidden.extend(forbidden);
    }

    /// Whether the two are known to start from different states.
    fn is_in_vain(&self, step: &Step) -> bool {
        let is_begun = |flow: &usize| self.begun.contains(flow);
        // Forbidden, and allowed again, or as a new one to the resolver of now: one of them has forgotten it.
        let is_back = |flow: usize| {
            self.forbidden.contains(&flow) && (self.allows(flow) || self.allows_anew(flow))
        };
        let remote = step.flow.and_then(|flow| self.remote(flow));
        let dst = remote.unwrap_or(step.packet.dst);
        // An error is about packets of its flow.
        let flow = step.flow.and_then(|flow| self.script.flows.get(flow));
        let protocols = [step.packet.protocol, flow.map_or(0, |own| own.protocol)];
        let is_occupied = |address: IpAddr| {
            let at = |protocol| self.occupied.contains(&(protocol, address));
            protocols.into_iter().any(at)
        };
        let quoted = match &step.packet.body {
            Body::Error { quote, .. } => self.left.contains(&(quote.protocol, quote.dst)),
            _ => false,
        };
        let at = |protocol| self.left.contains(&(protocol, step.packet.src));
        let is_left = step.port == 0 && (quoted || protocols.into_iter().any(at));
        step.flow
            .is_some_and(|flow| self.retired.contains(&flow) || is_back(flow))
            || !step.flow.as_ref().is_some_and(is_begun)
                && (is_occupied(dst) || is_occupied(step.packet.src) || is_left)
    }

    /// What a flow has outside on one side.
    fn outside(&self, side: &Side, flow: usize) -> u16 {
        let own = || self.script.flows.get(flow).map_or(0, |flow| flow.sport);
        side.outside.get(&flow).copied().unwrap_or_else(own)
    }

    fn step(
        &mut self,
        kernel: &mut Kernel,
        engine: &mut Engine,
        step: &Step,
    ) -> Result<(), String> {
        let for_kernel = step
            .packet
            .bytes(&|flow| self.outside(&self.kernel_side, flow));
        let for_engine = step
            .packet
            .bytes(&|flow| self.outside(&self.engine_side, flow));
        let by_kernel = kernel.exchange(step.port, &for_kernel);
        let by_engine = engine.exchange(step.port, &for_engine);
        self.findings.packets += 1;
        let inside = step
            .flow
            .and_then(|flow| self.script.flows.get(flow))
            .map(|own| own.sport);
        let renamed = |side: &Side| {
            let flow = step.flow?;
            Some((self.outside(side, flow), inside?))
        };
        let mut kernel_seen = seen::all(
            &by_kernel,
            step.port,
            &step.packet,
            renamed(&self.kernel_side),
        );
        let mut engine_seen = seen::all(
            &by_engine.sent,
            step.port,
            &step.packet,
            renamed(&self.engine_side),
        );
        self.learn(step, &kernel_seen, &engine_seen)?;
        for seen in kernel_seen.iter_mut().chain(&mut engine_seen) {
            seen.outside = None;
        }
        // A segment that ends a connection frees its port, and may be the other side's.
        if let Body::Tcp(tcp) = &step.packet.body
            && tcp.flags & (FIN | RST) != 0
        {
            self.ended.extend(step.flow);
        }
        let protocol = step.packet.protocol;
        if step.flow.is_none()
            && !matches!(protocol, TCP | UDP | ICMP | ICMPV6)
            && engine_seen.iter().any(|own| own.port == 0)
        {
            self.strays.insert((protocol, step.packet.dst));
        }
        let verdict = by_engine.verdict;
        if step.packet.split.is_some() {
            // The specification fixes the largest piece, not every cut; the kernel may keep the cuts
            // that it got, or make pieces of the least MTU of IPv6.
            let most = for_engine.iter().map(Vec::len).max();
            for seen in &mut engine_seen {
                if seen.largest > most && seen.port != step.port {
                    return Err(format!(
                        "pieces of {:?} bytes of pieces of {most:?}",
                        seen.largest
                    ));
                }
                seen.largest = None;
            }
            for seen in &mut kernel_seen {
                seen.largest = None;
            }
        }
        // The kernel tracks a source routed packet before it drops it; the engine does not.
        // The engine tracks a segment with a wrong checksum that it lets pass; the kernel does not.
        let untracked = step.packet.options.first() == Some(&0x83);
        if untracked || step.packet.damage == crate::packet::Damage::TransportChecksum {
            self.retire(step);
        }
        let forbidden = step.flow.is_some_and(|own| self.forbidden.contains(&own));
        // Another client may have got the port that the flow had outside.
        let forwarded = engine_seen.iter().any(|own| {
            let flow = step.flow.and_then(|flow| self.script.flows.get(flow));
            own.port != step.port
                && (own.port == 0 || flow.is_some_and(|flow| flow.port == own.port))
        });
        if forbidden && forwarded {
            return Err(format!(
                "the rules forbid the flow since a change; the engine says {verdict:?} and sends {}",
                list(&engine_seen)
            ));
        }
        if kernel_seen == engine_seen {
            agrees_with_itself(step, verdict, &engine_seen)?;
            self.cover(step, verdict, &engine_seen);
            return Ok(());
        }
        let case = Case {
            step,
            kernel: &kernel_seen,
            engine: &engine_seen,
            verdict,
            forbidden,
            timed: self.script.factor.is_some(),
        };
        match differences::ALL.iter().find(|own| (own.applies)(&case)) {
            Some(difference) => {
                // What the kernel alone sent to the uplink has a translation, which may be in the way.
                let sent_out = kernel_seen.iter().any(|own| own.port == 0);
                if step.port == 0 || sent_out {
                    let ends = [step.packet.src, step.packet.dst];
                    self.occupied
                        .extend(ends.map(|own| (step.packet.protocol, own)));
                }
                *self
                    .findings
                    .differences
                    .entry(difference.name.to_owned())
                    .or_default() += 1;
                self.retire(step);
                Ok(())
            }
            None => Err(describe(&case)),
        }
    }

    /// From here on the two know different things about the flow of a step, and about what is sent to
    /// the port that it has outside.
    fn retire(&mut self, step: &Step) {
        if let Some(number) = step.flow
            && let Some(remote) = self.remote(number)
        {
            self.retired.insert(number);
            self.occupied
                .insert((self.script.flows[number].protocol, remote));
        }
    }

    /// Notes the port that a flow has got outside.
    fn learn(&mut self, step: &Step, kernel: &[Seen], engine: &[Seen]) -> Result<(), String> {
        let Some(number) = step.flow.filter(|_| step.port > 0) else {
            // Ports are taken all the same.
            for (side, seen) in [
                (&mut self.kernel_side, kernel),
                (&mut self.engine_side, engine),
            ] {
                for own in seen.iter().filter(|own| own.port == 0) {
                    if let (Some(port), Some(pair)) =
                        (own.outside, own.transport.first_chunk::<4>())
                    {
                        let far = match own.protocol {
                            TCP | UDP => u16::from_be_bytes([pair[2], pair[3]]),
                            _ => u16::from_be_bytes([pair[0], pair[1]]),
                        };
                        side.taken
                            .entry((own.protocol, port, own.dst, far))
                            .or_insert(STRAY);
                    }
                }
            }
            return Ok(());
        };
        let Some(flow) = self.script.flows.get(number) else {
            return Ok(());
        };
        let one = |seen: &[Seen]| {
            seen.first()
                .filter(|own| own.port == 0)
                .and_then(|own| own.outside)
        };
        let (Some(by_kernel), Some(by_engine)) = (one(kernel), one(engine)) else {
            return Ok(());
        };
        let known = self.kernel_side.outside.contains_key(&number);
        let own = flow.sport;
        let remote = self.remote(number).unwrap_or(flow.remote);
        let tuple = |port: u16| (flow.protocol, port, remote, flow.dport);
        if !known && (by_kernel == own) != (by_engine == own) {
            // One of them had to choose: that must have a reason on its side.
            let (side, port) = if by_kernel == own {
                (&self.engine_side, by_engine)
            } else {
                (&self.kernel_side, by_kernel)
            };
            let reused = self
                .script
                .flows
                .iter()
                .enumerate()
                .any(|(other, flow_of)| {
                    flow_of.client == flow.client
                        && flow_of.sport == own
                        && flow_of.protocol == flow.protocol
                        && side.outside.get(&other) == Some(&port)
                });
            if !side.taken.contains_key(&tuple(own)) && !reused {
                return Err(format!(
                    "one keeps port {own}, the other does not: kernel {by_kernel}, engine {by_engine}"
                ));
            }
        }
        let is_query = matches!(flow.protocol, ICMP | ICMPV6);
        if !is_query
            && [by_kernel, by_engine]
                .iter()
                .any(|port| class(*port) != class(own))
        {
            return Err(format!(
                "port {own} leaves its class: kernel {by_kernel}, engine {by_engine}"
            ));
        }
        for (name, side, port) in [
            ("kernel", &mut self.kernel_side, by_kernel),
            ("engine", &mut self.engine_side, by_engine),
        ] {
            let before = side.outside.insert(number, port);
            if before.is_some_and(|before| before != port) && !self.ended.contains(&number) {
                return Err(format!(
                    "{name}: the flow changes its port from {before:?} to {port}"
                ));
            }
            let holder = side.taken.insert(tuple(port), number);
            if let Some(holder) = holder.filter(|holder| ![number, STRAY].contains(holder))
                && !self.ended.contains(&holder)
            {
                return Err(format!(
                    "{name}: port {port} stands for two flows, {holder} and {number}"
                ));
            }
        }
        if !known {
            let kept = by_engine == own && by_kernel == own;
            self.count(
                if kept {
                    "nat: port kept"
                } else {
                    "nat: port changed"
                },
                flow.is_v6(),
            );
        }
        Ok(())
    }

    fn count(&mut self, what: &str, v6: bool) {
        let family = if v6 { "IPv6" } else { "IPv4" };
        *self
            .findings
            .coverage
            .entry(format!("{family} {what}"))
            .or_default() += 1;
    }

    /// Notes that something of a flow has passed.
    fn begin(&mut self, number: usize) {
        if let Some(remote) = self.remote(number) {
            self.remotes.insert(number, remote);
        }
        self.begun.insert(number);
    }

    /// Counts what the two agree on.
    fn cover(&mut self, step: &Step, verdict: Verdict, seen: &[Seen]) {
        let v6 = step.packet.is_v6();
        let up = step.port > 0;
        if self.waited > Duration::from_secs(5) && !up {
            let fate = if seen.is_empty() { "over" } else { "alive" };
            self.count(&format!("idle flow {fate}"), v6);
        }
        let way = if up { "up" } else { "down" };
        match verdict {
            Verdict::Forward { .. } | Verdict::Replaced { .. } => {
                self.count("accepted", v6);
                let is_error = matches!(step.packet.body, Body::Error { .. });
                match step.flow {
                    _ if is_error => self.count(&format!("related {way}"), v6),
                    Some(flow) if self.begun.contains(&flow) => {
                        self.count(&format!("established {way}"), v6);
                    }
                    Some(flow) if up => {
                        self.begin(flow);
                        self.count("new", v6);
                    }
                    // To the port of another flow that has begun.
                    _ => self.count("new", v6),
                }
                if step.packet.split.is_some() {
                    self.count("fragments accepted", v6);
                } else if seen.iter().any(|own| own.largest.is_some()) {
                    self.count("cut into fragments", v6);
                }
                if !v6 && up && seen.iter().any(|own| own.dst != step.packet.dst) {
                    self.count("DNS redirected", v6);
                }
                match step.packet.protocol {
                    TCP | UDP | ICMP | ICMPV6 => {}
                    _ => self.count("other protocol accepted", v6),
                }
                if !step.packet.extensions.is_empty() {
                    self.count("extension header accepted", v6);
                }
            }
            Verdict::Reject(_) => {
                for own in seen {
                    if let Some((kind, code)) = own.icmp() {
                        self.count(&format!("rejected with ICMP {kind}/{code} {way}"), v6);
                    }
                }
            }
            Verdict::Drop(reason) => {
                self.count("dropped", v6);
                if differences::INVALID.contains(&reason) {
                    self.count(&format!("invalid {way}"), v6);
                }
                self.count(&format!("dropped: {}", reason.name()), v6);
            }
            Verdict::Local => self.count(&format!("answered {way}"), v6),
            Verdict::Held => self.count("fragments held", v6),
            Verdict::Deliver => self.count("delivered", v6),
        }
        if step.packet.split.is_some() {
            self.count("fragmented", v6);
        }
    }
}

/// The engine's word and deed must agree, and what it makes must be well formed.
fn agrees_with_itself(step: &Step, verdict: Verdict, seen: &[Seen]) -> Result<(), String> {
    let damaged = step.packet.damage != crate::packet::Damage::None;
    let expected = match verdict {
        Verdict::Forward { .. } | Verdict::Replaced { .. } => !seen.is_empty(),
        // A datagram whose last fragment comes twice, or after the overlap that killed it, ends with a
        // verdict about the fragment.
        Verdict::Held | Verdict::Drop(_) => seen.is_empty() || step.packet.split.is_some(),
        Verdict::Reject(_) => seen.iter().all(|own| own.port == step.port),
        Verdict::Local => !seen.is_empty() && seen.iter().all(|own| own.port == step.port),
        Verdict::Deliver => false,
    };
    if !expected {
        return Err(format!("the engine says {verdict:?} and sends {seen:#?}"));
    }
    let wrong = seen
        .iter()
        .any(|own| !own.header_sum || own.sum == Sum::Wrong);
    if wrong && !damaged {
        return Err(format!("both send a wrong checksum: {seen:#?}"));
    }
    Ok(())
}
