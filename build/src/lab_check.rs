//! Does the lab itself work? Checks that hold for any firewall of the lab.
//!
//! They need nothing but what clients and dom0 see, so they run against the
//! Linux stand-in: what holds there shows that the lab is right, and what the
//! image does differently is then the image's doing.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::lab::internet::{
    BLOCKED, DNS6, ECHO, ECHO_PORT, ECHO6, VIRTUAL_DNS, WEB, WEB_NAME, WEB6, WHOAMI_PORT,
};
use crate::lab::link::{Job, Output, Progress};
use crate::lab::topology::{ClientSpec, FIREWALL, FIREWALL6};
use crate::lab::world::LabWorld;
use crate::screen::{BAD, GOOD, paint, seconds};

/// How long a small command may take.
const COMMAND: Duration = Duration::from_secs(30);

/// How long a download may take; TCG moves some Mbit/s when the host is busy.
const TRANSFER: Duration = Duration::from_secs(180);

/// How long to listen for what must not come.
const SILENCE: Duration = Duration::from_secs(2);

/// Something that the lab must be able to show.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    /// Short name in words joined by dashes.
    pub name: &'static str,
    /// What is shown, in one sentence.
    pub title: &'static str,
    /// Shows it; returns what was measured, a line each.
    pub run: fn(&mut LabWorld) -> Result<Vec<String>>,
}

/// Runs the checks whose names contain `filter`, with a line for each; says
/// whether all held.
///
/// # Errors
///
/// If there is no such check.
pub fn run(world: &mut LabWorld, filter: &str) -> Result<bool> {
    let mut good = true;
    let mut any = false;
    for check in CHECKS.iter().filter(|check| check.name.contains(filter)) {
        any = true;
        let begun = Instant::now();
        let result = (check.run)(world);
        let time = seconds(begun.elapsed());
        match result {
            Ok(notes) => {
                anstream::println!("{} {} ({time})", paint(GOOD, "SUCCESS"), check.name);
                for note in notes {
                    println!("    {note}");
                }
            }
            Err(error) => {
                good = false;
                anstream::println!(
                    "{} {} ({time}): {error:#}",
                    paint(BAD, "FAILURE"),
                    check.name
                );
            }
        }
    }
    ensure!(any, "no check is called {filter:?}");
    Ok(good)
}

/// All checks, in an order that leaves the world as it was.
pub const CHECKS: &[Check] = &[
    Check {
        name: "nat-ping",
        title: "Pings of every client leave with the firewall's address.",
        run: nat_ping,
    },
    Check {
        name: "nat-ports",
        title: "Servers see TCP and UDP come from the firewall.",
        run: nat_ports,
    },
    Check {
        name: "dns",
        title: "Virtual resolvers answer over UDP and TCP.",
        run: dns,
    },
    Check {
        name: "ipv6",
        title: "Ping, TCP and DNS work over IPv6, from the firewall's address.",
        run: ipv6,
    },
    Check {
        name: "download",
        title: "Every client downloads 8 MiB unharmed.",
        run: download,
    },
    Check {
        name: "refuse",
        title: "A forbidden connection is refused at once with ICMP 3/13, for one client only; the rules change while running.",
        run: refuse,
    },
    Check {
        name: "isolation",
        title: "Clients cannot reach each other, and forged sources die.",
        run: isolation,
    },
    Check {
        name: "reattach",
        title: "A client is detached and attached while another has traffic.",
        run: reattach,
    },
    Check {
        name: "third-client",
        title: "A client is created while another has traffic, and gets through.",
        run: third_client,
    },
];

fn names(world: &LabWorld) -> Vec<String> {
    world
        .topology()
        .clients
        .iter()
        .map(|client| client.name.clone())
        .collect()
}

fn two_clients(world: &LabWorld) -> Result<(String, String)> {
    match names(world).as_slice() {
        [first, second, ..] => Ok((first.clone(), second.clone())),
        _ => bail!("two clients are needed"),
    }
}

/// Starts to watch the firewall's uplink in dom0.
fn watch_uplink(world: &LabWorld) -> Result<Job> {
    let vif = format!("vif{}.0", world.firewall()?.domid);
    let mut job = world
        .lab
        .dom0()
        .start(&format!("lab capture {vif}"), TRANSFER)?;
    job.wait_output("capturing", world.lab.patience(COMMAND))?;
    Ok(job)
}

/// Ends a watch and returns its lines.
fn seen(job: Job) -> Result<Vec<String>> {
    job.kill()?;
    Ok(job.wait()?.stdout.lines().map(str::to_owned).collect())
}

fn nat_ping(world: &mut LabWorld) -> Result<Vec<String>> {
    let source = format!("in ipv4 {FIREWALL} > {WEB} ");
    for name in names(world) {
        let watch = watch_uplink(world)?;
        world.ask(&name, &format!("ping -c 3 -W 10 {WEB}"), COMMAND)?;
        let requests: Vec<String> = seen(watch)?
            .into_iter()
            .filter(|line| line.starts_with("in ") && line.contains("type=8"))
            .collect();
        let translated = requests.iter().all(|line| line.starts_with(&source));
        ensure!(
            requests.len() >= 3 && translated,
            "the uplink sees {requests:?}"
        );
    }
    Ok(Vec::new())
}

/// Asks a server who we are.
fn whoami(world: &LabWorld, name: &str, command: &str, firewall: IpAddr) -> Result<()> {
    let seen = world.ask(name, command, COMMAND)?;
    let right = seen.contains(&firewall.to_string());
    ensure!(right, "{name}: `{command}` says {seen}");
    Ok(())
}

/// Asks a resolver for the web server's address.
fn resolve(world: &LabWorld, name: &str, how: &str, address: IpAddr) -> Result<()> {
    let command = format!("lab resolve {WEB_NAME} {how}");
    let answer = world.ask(name, &command, COMMAND)?;
    let right = answer.starts_with(&address.to_string());
    ensure!(right, "{name}: `{command}` says {answer}");
    Ok(())
}

fn nat_ports(world: &mut LabWorld) -> Result<Vec<String>> {
    for name in names(world) {
        let datagram = format!("lab udp {ECHO} {WHOAMI_PORT} hello");
        whoami(world, &name, &datagram, FIREWALL.into())?;
        let stream = format!("nc -w 10 {ECHO} {WHOAMI_PORT}");
        whoami(world, &name, &stream, FIREWALL.into())?;
    }
    Ok(Vec::new())
}

fn dns(world: &mut LabWorld) -> Result<Vec<String>> {
    for name in names(world) {
        for server in VIRTUAL_DNS {
            resolve(world, &name, &format!("--server {server}"), WEB.into())?;
            resolve(
                world,
                &name,
                &format!("--tcp --server {server}"),
                WEB.into(),
            )?;
        }
    }
    Ok(Vec::new())
}

fn ipv6(world: &mut LabWorld) -> Result<Vec<String>> {
    for name in names(world) {
        world.ask(&name, &format!("ping -6 -c 2 -W 10 {WEB6}"), COMMAND)?;
        let stream = format!("nc -w 10 {ECHO6} {WHOAMI_PORT}");
        whoami(world, &name, &stream, FIREWALL6.into())?;
        resolve(
            world,
            &name,
            &format!("--aaaa --server {DNS6}"),
            WEB6.into(),
        )?;
    }
    Ok(Vec::new())
}

fn download(world: &mut LabWorld) -> Result<Vec<String>> {
    let expected = world.lab.ask("sha256sum < /srv/www/8m.bin", COMMAND)?;
    let mut notes = Vec::new();
    for name in names(world) {
        let fetch = format!("wget -q -O - http://{WEB}/8m.bin | sha256sum");
        let output = world.run(&name, &fetch, TRANSFER)?;
        let whole = output.stdout.trim() == expected.trim();
        ensure!(whole, "{name} got {} instead of {expected}", output.stdout);
        notes.push(format!(
            "{name}: 8 MiB in {} ms of guest time",
            output.guest_ms
        ));
    }
    Ok(notes)
}

/// Connects to the forbidden address until it goes (or does not), as `wanted`:
/// rules take effect a moment after they are written.
fn connect_until(world: &LabWorld, client: &str, wanted: bool) -> Result<Output> {
    let command = format!("lab connect {BLOCKED} {ECHO_PORT}");
    for _ in 0..50 {
        let output = world.run(client, &command, COMMAND)?;
        if output.is_success() == wanted {
            return Ok(output);
        }
    }
    bail!(
        "{client}: connections {} for long",
        if wanted { "fail" } else { "succeed" }
    )
}

fn refuse(world: &mut LabWorld) -> Result<Vec<String>> {
    let (first, second) = two_clients(world)?;
    let before = world
        .topology()
        .client(&first)
        .context("no client")?
        .clone();
    let rule = format!("action=drop dst4={BLOCKED}/32 proto=tcp dstports=1-1024");
    world.set_client_rules(&first, "drop", &[&rule, "action=accept"])?;
    let refused = connect_until(world, &first, false)?;
    connect_until(world, &second, true)?;
    let rules: Vec<&str> = before.rules.iter().map(String::as_str).collect();
    world.set_client_rules(&first, &before.policy, &rules)?;
    connect_until(world, &first, true)?;
    let firewall = FIREWALL.to_string();
    let as_qubes =
        refused.value("icmp") == Some("3/13") && refused.value("from") == Some(firewall.as_str());
    ensure!(as_qubes, "refused by {}", refused.stdout);
    Ok(vec![format!(
        "refused after {} ms",
        refused.value("ms").unwrap_or("?")
    )])
}

fn isolation(world: &mut LabWorld) -> Result<Vec<String>> {
    let (first, second) = two_clients(world)?;
    let target = world.topology().client(&second).context("no client")?.ip;
    let mut arriving = world.guest(&second)?.start("lab capture eth0", TRANSFER)?;
    arriving.wait_output("capturing", world.lab.patience(COMMAND))?;
    let leaving = watch_uplink(world)?;
    let connect = format!("lab connect {target} 22 --timeout-ms 3000");
    let connected = world.run(&first, &connect, COMMAND)?;
    for source in [FIREWALL, target, "10.137.0.99".parse()?] {
        let content = format!("--udp 5000:{ECHO_PORT} --count 3");
        let forge = format!("lab forge eth0 --src {source} --dst {ECHO} {content}");
        world.ask(&first, &forge, COMMAND)?;
    }
    std::thread::sleep(world.lab.patience(SILENCE));
    let from_clients = |line: &String| {
        line.starts_with("in ipv4 10.137.0.") && !line.contains(&format!(" {FIREWALL} >"))
    };
    let arrived: Vec<String> = seen(arriving)?.into_iter().filter(from_clients).collect();
    let forged = |line: &String| line.contains(" udp 5000 > ");
    let left: Vec<String> = seen(leaving)?.into_iter().filter(forged).collect();
    ensure!(!connected.is_success(), "{first} reaches {second}");
    ensure!(arrived.is_empty(), "{second} sees {arrived:?}");
    ensure!(left.is_empty(), "the uplink sees forged packets: {left:?}");
    Ok(Vec::new())
}

/// Starts a TCP connection in a client that shows every disturbance.
fn heartbeat(world: &LabWorld, name: &str) -> Result<Job> {
    let command = format!("lab heartbeat {ECHO} {ECHO_PORT}");
    let mut job = world
        .guest(name)?
        .start(&command, world.lab.patience(TRANSFER))?;
    job.wait_output("beat=2 ", world.lab.patience(COMMAND))?;
    Ok(job)
}

/// Ends the connection, demands that it lived to the end, and tells its longest
/// gap.
fn undisturbed(world: &LabWorld, name: &str, mut job: Job) -> Result<String> {
    let mut behind = job.next(Duration::ZERO)?;
    while matches!(behind, Progress::Wrote(_)) {
        behind = job.next(Duration::ZERO)?;
    }
    if let Progress::Ended(exit, _) = behind {
        bail!("the connection of {name} ended: {exit:?}");
    }
    // One more beat, which comes after all that happened.
    match job.next(world.lab.patience(COMMAND))? {
        Progress::Wrote(_) => {}
        Progress::Ended(exit, _) => bail!("the connection of {name} ended: {exit:?}"),
        Progress::Quiet => bail!("the connection of {name} stands still"),
    }
    job.kill()?;
    let beats = job.wait()?.stdout;
    let gaps = beats
        .lines()
        .filter_map(|line| line.split_once("ms=")?.1.parse::<u64>().ok());
    let longest = gaps.max().context("no heartbeat")?;
    Ok(format!(
        "{name}: longest gap {longest} ms in {} beats",
        beats.lines().count()
    ))
}

fn reattach(world: &mut LabWorld) -> Result<Vec<String>> {
    let (first, second) = two_clients(world)?;
    let traffic = heartbeat(world, &second)?;
    let detached = world.detach(&first)?;
    let alone = world.run(&first, &format!("ping -c 1 -W 2 {WEB}"), COMMAND)?;
    let attached = world.attach(&first)?;
    world.ask(&first, &format!("ping -c 2 -W 10 {WEB}"), COMMAND)?;
    let gap = undisturbed(world, &second, traffic)?;
    ensure!(!alone.is_success(), "{first} still has a network");
    let times = format!(
        "detach {} ms, attach {} ms",
        detached.guest_ms, attached.guest_ms
    );
    Ok(vec![times, gap])
}

fn third_client(world: &mut LabWorld) -> Result<Vec<String>> {
    let (_, second) = two_clients(world)?;
    let client = ClientSpec::numbered(99);
    let name = client.name.clone();
    let traffic = heartbeat(world, &second)?;
    world.add_client(client)?;
    let create_ms = world.client(&name)?.create_ms;
    world.ask(&name, &format!("ping -c 2 -W 10 {WEB}"), COMMAND)?;
    let gap = undisturbed(world, &second, traffic)?;
    world.remove_client(&name)?;
    Ok(vec![format!("xl create {create_ms} ms"), gap])
}
