//! The Linux kernel as a firewall: a network namespace with TUN devices in the place of vifs.
//!
//! A packet that is written to a TUN device goes through the whole of the kernel's packet path before
//! the write returns, so everything that it causes can be read at once, without waiting. For that the
//! devices have no queues: what waits in one may be sent later, by another thread.
//!
//! Each rule set gets a namespace of its own, made by the thread that runs it: nothing of one rule set
//! (tracked flows, waiting fragments) is left for the next, and nothing outside is touched. The
//! namespace goes away when its devices are closed and the thread has moved on.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, Ipv6Addr};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, unshare};
use smoltcp::phy::{Device as _, Medium, RxToken as _, TunTapInterface, TxToken as _};
use smoltcp::time::Instant;

use crate::pace;
use crate::ruleset;
use crate::world::{CLIENTS, GATEWAY4, GATEWAY6, OWN4, OWN6, World};

/// The interface to the outside.
const UPLINK: &str = "eth0";

/// What every vif has, by its Ethernet address.
const LINK_LOCAL: &str = "fe80::fcff:ffff:feff:ffff";

/// Routes to addresses of our own (`RTF_LOCAL`).
const LOCAL_ROUTE: u32 = 0x8000_0000;

/// How long the kernel may take to set itself up.
const PATIENCE: Duration = Duration::from_secs(10);

/// Room for a packet; longer ones than this are never made.
const DEVICE_MTU: u16 = 4000;

/// What Linux would do by itself, and limits that the engine is not compared by (D8).
const SETTINGS: [(&str, &str); 16] = [
    ("ipv4/ip_forward", "1"),
    ("ipv4/icmp_ratemask", "0"),
    ("ipv4/icmp_ratelimit", "0"),
    ("ipv4/icmp_msgs_per_sec", "1000000000"),
    ("ipv4/icmp_msgs_burst", "1000000000"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/conf/all/accept_source_route", "0"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
    ("ipv6/icmp/ratelimit", "0"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv6/conf/default/forwarding", "1"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/auto_flowlabels", "0"),
];

/// Where a packet is: 0 is the uplink, 1 and up are the clients.
pub(crate) type Port = usize;

/// A namespace that filters.
#[derive(Debug)]
pub(crate) struct Kernel {
    devices: Vec<TunTapInterface>,
}

/// Why this machine cannot do it, if it cannot.
pub(crate) fn obstacle() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("not root, who alone may make network namespaces".to_owned());
    }
    for program in ["nft", "ip", "tc"] {
        if !command(program)
            .arg("-V")
            .output()
            .is_ok_and(|output| output.status.success())
        {
            return Some(format!("the program {program} is missing"));
        }
    }
    let trial = thread::spawn(|| -> Result<()> {
        enter()?;
        run("ip", &["-batch", "-"], "tuntap add dev trial mode tun\n")?;
        run(
            "nft",
            &["-f", "-"],
            "table inet t { chain c { type nat hook postrouting priority 100; masquerade; }; }\n",
        )
    });
    match trial.join() {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(format!("{error:#}")),
        Err(_) => Some("the trial crashed".to_owned()),
    }
}

/// A program by its name, also where the path of a plain user does not look.
fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

/// Moves this thread to a new namespace.
pub(crate) fn enter() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("network namespaces are not allowed here")
}

/// Makes the namespace of this thread forward, without limits of its own.
pub(crate) fn configure() -> Result<()> {
    for (name, value) in SETTINGS {
        let path = format!("/proc/sys/net/{name}");
        fs::write(&path, value).with_context(|| format!("cannot write {path}"))?;
    }
    Ok(())
}

/// Waits until the kernel knows its IPv6 addresses as its own: it adds them to its routes later, from a
/// thread of its own.
fn await_addresses() -> Result<()> {
    let hex = |address: Ipv6Addr| -> String {
        address
            .octets()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    };
    let IpAddr::V6(own) = OWN6 else {
        bail!("{OWN6} is no IPv6 address");
    };
    let wanted = [
        (hex(own), 1 + CLIENTS.len()),
        (hex(LINK_LOCAL.parse()?), CLIENTS.len()),
    ];
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let routes = fs::read_to_string("/proc/thread-self/net/ipv6_route")?;
        let is_there = |(address, count): &(String, usize)| {
            let local = routes.lines().filter(|line| {
                let flags = line.split_whitespace().nth(8).unwrap_or_default();
                let flags = u32::from_str_radix(flags, 16).unwrap_or_default();
                line.starts_with(address.as_str()) && flags & LOCAL_ROUTE != 0
            });
            local.count() >= *count
        };
        if wanted.iter().all(is_there) {
            return Ok(());
        }
        if std::time::Instant::now() > deadline {
            bail!("the kernel does not take its IPv6 addresses");
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Runs a program with this standard input.
pub(crate) fn run(program: &str, arguments: &[&str], input: &str) -> Result<()> {
    let mut child = command(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{program}: {}\nit was given:\n{input}", said.trim());
    }
    Ok(())
}

impl Kernel {
    /// Moves this thread to a new namespace that is set up for `world`.
    pub(crate) fn new(world: &World, factor: Option<u64>) -> Result<Self> {
        enter()?;
        configure()?;
        if let Some(factor) = factor {
            pace::divide_timeouts(factor)?;
        }
        run("ip", &["-batch", "-"], &Self::devices_batch())?;
        let names = [UPLINK]
            .into_iter()
            .chain(CLIENTS.iter().map(|client| client.name));
        let devices = names
            .map(|name| {
                TunTapInterface::new(name, Medium::Ip)
                    .with_context(|| format!("cannot open the TUN device {name}"))
            })
            .collect::<Result<Vec<_>>>()?;
        run("ip", &["-batch", "-"], &Self::routes_batch(world))?;
        run("nft", &["-f", "-"], &ruleset::text(world))?;
        let names = [UPLINK]
            .into_iter()
            .chain(CLIENTS.iter().map(|client| client.name));
        let queues = names.map(|name| format!("qdisc replace dev {name} root noqueue\n"));
        run("tc", &["-batch", "-"], &queues.collect::<String>())?;
        await_addresses()?;
        let mut kernel = Self { devices };
        // What the kernel says when an interface comes up.
        kernel.collect();
        Ok(kernel)
    }

    fn devices_batch() -> String {
        let mut batch = String::from("link set lo up\n");
        let names = [UPLINK]
            .into_iter()
            .chain(CLIENTS.iter().map(|client| client.name));
        for name in names {
            let group = if name == UPLINK { 1 } else { 2 };
            let _ = writeln!(batch, "tuntap add dev {name} mode tun");
            // Opened while it is this large, so that longer packets can be read later.
            let _ = writeln!(
                batch,
                "link set dev {name} mtu {DEVICE_MTU} group {group} multicast off addrgenmode none"
            );
        }
        batch
    }

    fn routes_batch(world: &World) -> String {
        let mut batch = String::new();
        let _ = writeln!(batch, "link set dev {UPLINK} mtu {} up", world.uplink_mtu);
        let own = |device: &str| {
            format!("address add {OWN4} dev {device}\naddress add {OWN6} dev {device} nodad")
        };
        let _ = writeln!(batch, "{}", own(UPLINK));
        let _ = writeln!(
            batch,
            "route add default via {GATEWAY4} dev {UPLINK} onlink"
        );
        let _ = writeln!(
            batch,
            "route add default via {GATEWAY6} dev {UPLINK} onlink"
        );
        for client in CLIENTS {
            let name = client.name;
            let _ = writeln!(batch, "link set dev {name} mtu {} up", client.mtu);
            let _ = writeln!(batch, "{}", own(name));
            let _ = writeln!(batch, "address add {LINK_LOCAL}/64 dev {name} nodad");
            for address in client.addresses {
                let metric = 32752 - client.domid;
                let _ = writeln!(batch, "route add {address} dev {name} metric {metric}");
            }
        }
        batch
    }

    /// Brings rules and resolvers up to date.
    ///
    /// # Errors
    ///
    /// If `nft` does not take them.
    pub(crate) fn update(&mut self, world: &World) -> Result<()> {
        run("nft", &["-f", "-"], &ruleset::update(world))
    }

    /// Gives packets to the kernel and returns all that leaves because of them.
    pub(crate) fn exchange(&mut self, port: Port, packets: &[Vec<u8>]) -> Vec<(Port, Vec<u8>)> {
        let mut seen = Vec::new();
        for packet in packets {
            if let Some(token) = self.devices[port].transmit(Instant::ZERO) {
                token.consume(packet.len(), |room| room.copy_from_slice(packet));
            }
            seen.extend(self.collect());
        }
        seen
    }

    fn collect(&mut self) -> Vec<(Port, Vec<u8>)> {
        let mut seen = Vec::new();
        for (port, device) in self.devices.iter_mut().enumerate() {
            while let Some((token, _)) = device.receive(Instant::ZERO) {
                let packet = token.consume(<[u8]>::to_vec);
                if !is_own_talk(&packet) {
                    seen.push((port, packet));
                }
            }
        }
        seen
    }
}

/// Whether a packet is about multicast groups that the kernel itself has joined (RFC 3810), or a
/// redirect of its own: it cannot be told not to send those, and nobody may get any
/// (`qubes-policy.md` 3.7).
fn is_own_talk(packet: &[u8]) -> bool {
    let to_listeners = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x16];
    let own = LINK_LOCAL.parse::<Ipv6Addr>().map(|own| own.octets());
    packet.first().is_some_and(|first| first >> 4 == 6)
        && (packet.get(24..40) == Some(&to_listeners)
            || packet.get(40) == Some(&137)
                && packet.get(8..24) == own.as_ref().ok().map(|own| &own[..]))
}
