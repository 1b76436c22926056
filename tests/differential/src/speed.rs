//! What a packet costs the Linux kernel as a firewall: the peer of `cargo xtask bench`.
//!
//! The frames are those of the engine's own workloads W1 and W5, the rules `Rules(50)` for each of 250
//! clients, in the ruleset that the differential test loads. A packet that is written to a TUN device goes
//! through the whole packet path before the write returns, so the processor time of this thread around the
//! writes is the packet's. The write itself is not the firewall's: the same is measured with packets that the
//! kernel drops at the door, because of their header checksum, and taken off. What remains is routing,
//! filtering, tracking, translating, and the uplink's queue.
//!
//! This flatters Linux: its drivers, and the copies between domains, are not in it.

use std::fmt::Write as _;
use std::thread;

use anyhow::{Context as _, Result, anyhow, bail};
use engine_bench::rules;
use engine_bench::workload::{Arrival, Plan};
use firewall::Iface;
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use smoltcp::phy::{Device as _, Medium, RxToken as _, TunTapInterface, TxToken as _};
use smoltcp::time::Instant;

use crate::kernel::{configure, enter, run};
use crate::rules::{Proto, Rule, Target, Tree};
use crate::ruleset::{self, Clients};
use crate::world::World;

/// Clients of the workloads.
const CLIENTS: u16 = 250;

/// Rules of each.
const RULES: u16 = 50;

/// Established flows.
const FLOWS: u32 = 1024;

/// Packets between two looks at the clock: fewer than the uplink's queue holds.
const BATCH: usize = 256;

/// Rounds of the workload's 4,096 frames.
const ROUNDS: u32 = 4;

/// The interface to the outside, and our address.
const UPLINK: &str = "eth0";
const OWN: &str = "10.138.0.1";

/// Nanoseconds of processor time for each packet, median of batches.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    /// Written, and dropped at the door.
    write: f64,
    /// Routed by a kernel without rules.
    routed: f64,
    /// Of established flows, filtered and translated.
    established: f64,
    /// The first ones of their flows.
    new: f64,
}

impl Figures {
    pub(crate) fn json(self) -> Value {
        json!({
            "outcome": "success",
            "clients": CLIENTS,
            "rules": RULES,
            "flows": FLOWS,
            "write_nanos": self.write,
            "routed_nanos": self.routed,
            "established_nanos": self.established,
            "new_nanos": self.new,
        })
    }

    pub(crate) fn text(self) -> String {
        let mut text = format!(
            "nanoseconds of processor time per packet, {CLIENTS} clients, {RULES} rules each\n"
        );
        for (what, nanos) in [
            ("routed without rules", self.routed),
            ("established flow", self.established),
            ("new flow", self.new),
        ] {
            let alone = nanos - self.write;
            let _ = writeln!(
                text,
                "{what:<24} {nanos:>8.0}, without the write {alone:>8.0}"
            );
        }
        text
    }
}

/// Measures all of it, in namespaces of its own.
///
/// # Errors
///
/// If the kernel cannot be set up, or a packet does not get through.
pub(crate) fn measure() -> Result<Figures> {
    let plan = |name| Plan::new(name, FLOWS, CLIENTS, RULES).map_err(|error| anyhow!("{error}"));
    let (established, new) = (plan("est-up")?, plan("new")?);
    let (write, routed) = in_namespace(move || {
        let mut router = Router::new(false)?;
        let mut broken = established.arrivals();
        for arrival in &mut broken {
            arrival.bytes[24] ^= 0xff;
        }
        let whole = established.arrivals();
        let (mut door, mut through) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            door.extend(router.time(&broken, 0)?);
            through.extend(router.time(&whole, whole.len())?);
        }
        Ok((median(door), median(through)))
    })?;
    let (established, new) = in_namespace(move || {
        let mut router = Router::new(true)?;
        let before: Vec<Arrival> = established.warm_up().collect();
        router.send(&before)?;
        let (mut old, mut fresh) = (Vec::new(), Vec::new());
        let whole = established.arrivals();
        for round in 0..ROUNDS {
            old.extend(router.time(&whole, whole.len())?);
            let flows = new.arrivals_of_round(round);
            fresh.extend(router.time(&flows, flows.len())?);
        }
        Ok((median(old), median(fresh)))
    })?;
    Ok(Figures {
        write,
        routed,
        established,
        new,
    })
}

/// Runs this in a namespace that goes away with its thread.
fn in_namespace<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let thread = thread::spawn(move || {
        enter()?;
        work()
    });
    thread.join().map_err(|_| anyhow!("a thread crashed"))?
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn vif(client: u16) -> String {
    format!("vif{}.0", client + 1)
}

/// The kernel, with a device for each client and the uplink.
struct Router {
    uplink: TunTapInterface,
    vifs: Vec<TunTapInterface>,
}

impl Router {
    /// Sets the namespace of this thread up.
    fn new(filter: bool) -> Result<Self> {
        configure()?;
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")
            .context("cannot switch IPv6 off")?;
        let names: Vec<String> = (0..CLIENTS).map(vif).collect();
        let all = || names.iter().map(String::as_str).chain([UPLINK]);
        let mut batch = String::from("link set lo up\n");
        for name in all() {
            let group = if name == UPLINK { 1 } else { 2 };
            let _ = writeln!(batch, "tuntap add dev {name} mode tun");
            let _ = writeln!(batch, "link set dev {name} group {group} multicast off");
        }
        run("ip", &["-batch", "-"], &batch)?;
        let open = |name: &str| {
            TunTapInterface::new(name, Medium::Ip)
                .with_context(|| format!("cannot open the TUN device {name}"))
        };
        let uplink = open(UPLINK)?;
        let vifs = names.iter().map(|name| open(name)).collect::<Result<_>>()?;
        let clients = Clients {
            attached: names.iter().cloned().zip(client_addresses()).collect(),
            absent: Vec::new(),
        };
        let mut batch = String::new();
        for name in all() {
            let _ = writeln!(batch, "link set dev {name} up");
            let _ = writeln!(batch, "address add {OWN} dev {name}");
        }
        for (name, address) in &clients.attached {
            let _ = writeln!(batch, "route add {address} dev {name}");
        }
        let _ = writeln!(batch, "route add default dev {UPLINK}");
        run("ip", &["-batch", "-"], &batch)?;
        let queues = all().map(|name| format!("qdisc replace dev {name} root noqueue\n"));
        run("tc", &["-batch", "-"], &queues.collect::<String>())?;
        if filter {
            let rules = ruleset::text_for(&world(&clients), &clients, &[false]);
            run("nft", &["-f", "-"], &rules)?;
        }
        Ok(Self { uplink, vifs })
    }

    /// Nanoseconds per packet of each batch, of which `passing` packets must get to the uplink in all.
    fn time(&mut self, arrivals: &[Arrival], passing: usize) -> Result<Vec<f64>> {
        let (mut nanos, mut passed) = (Vec::new(), 0);
        for batch in arrivals.chunks(BATCH) {
            let begin = processor_nanos()?;
            for arrival in batch {
                self.write(arrival)?;
            }
            let spent = processor_nanos()? - begin;
            passed += self.collect();
            nanos.push(spent / batch.len() as f64);
        }
        if passed != passing {
            bail!("{passed} packets came through, not {passing}");
        }
        Ok(nanos)
    }

    fn send(&mut self, arrivals: &[Arrival]) -> Result<()> {
        for arrival in arrivals {
            self.write(arrival)?;
            self.collect();
        }
        Ok(())
    }

    fn write(&mut self, arrival: &Arrival) -> Result<()> {
        let device = match arrival.ingress {
            Iface::Uplink => &mut self.uplink,
            Iface::Client(id) => self
                .vifs
                .get_mut(usize::from(id.0))
                .context("a client without a device")?,
        };
        let packet = &arrival.bytes[14..];
        let token = device.transmit(Instant::ZERO).context("no room")?;
        token.consume(packet.len(), |room| room.copy_from_slice(packet));
        Ok(())
    }

    /// Takes what came to the uplink.
    fn collect(&mut self) -> usize {
        let mut seen = 0;
        while let Some((token, _)) = self.uplink.receive(Instant::ZERO) {
            seen += token.consume(|packet| usize::from(packet.first() == Some(&0x45)));
        }
        seen
    }
}

fn processor_nanos() -> Result<f64> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    Ok(time.tv_sec() as f64 * 1e9 + time.tv_nsec() as f64)
}

fn client_addresses() -> impl Iterator<Item = std::net::IpAddr> {
    (0..CLIENTS).map(|client| Plan::client_address(client).into())
}

/// `Rules(50)` for everybody.
fn world(clients: &Clients) -> World {
    let rule = |target, proto, ports| Rule {
        accept: true,
        target,
        proto,
        ports,
        icmp_type: None,
        dns: false,
    };
    let mut all: Vec<Rule> = rules::lines(RULES)
        .map(|line| {
            let (address, length) = line.network;
            let proto = match line.protocols {
                (true, true) => None,
                (true, false) => Some(Proto::Tcp),
                (false, _) => Some(Proto::Udp),
            };
            let target = Target::Network(address.into(), length);
            rule(target, proto, Some(line.ports))
        })
        .collect();
    all.push(rule(Target::Any, None, None));
    let trees = clients.attached.iter().map(|(_, address)| {
        let tree = Tree::Rules {
            accept_policy: false,
            rules: all.clone(),
        };
        (*address, tree)
    });
    World {
        uplink_mtu: 1500,
        resolvers: Vec::new(),
        trees: trees.collect(),
    }
}
