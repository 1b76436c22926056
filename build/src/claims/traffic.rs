//! Claims about traffic that is allowed: it gets through, translated, and cheaply.

use std::time::Duration;

use anyhow::{Context as _, Result};
use kernel::snapshot::Snapshot;

use super::{Claim, PROBE, TRANSFER, clients, must};
use crate::lab::internet::{
    self, DOWNLOAD_BYTES, ECHO, ECHO_PORT, MANY, MANY_NAME, SINK_PORT, VIRTUAL_DNS, WEB, WEB_NAME,
    WHOAMI_PORT,
};
use crate::lab::topology::FIREWALL;
use crate::lab::world::LabWorld;
use crate::observe::snapshot;

/// Bytes of the upload.
const UPLOAD_MIB: u64 = 8;

/// The most hypercalls for each packet in a steady transfer.
const HYPERCALLS_PER_PACKET: f64 = 0.25;

/// Each client reaches an address behind the uplink, where it is seen with the firewall's address.
pub const NAT: Claim = Claim {
    name: "nat",
    title: "Each client pings an address behind the uplink, which sees the firewall as the source",
    check: nat,
};

fn nat(world: &mut LabWorld) -> Result<Vec<String>> {
    let mut seen = Vec::new();
    let uplink_vif = format!("vif{}.0", world.firewall()?.domid);
    for client in clients(world) {
        let mut capture = world.lab.dom0().start(
            &format!("lab capture {uplink_vif} --seconds 60"),
            Duration::from_secs(90),
        )?;
        capture.wait_output("capturing", world.lab.patience(PROBE))?;
        let ping = world.run(&client, &format!("ping -c 3 -W 5 {WEB}"), PROBE)?;
        must(ping.is_success(), || {
            format!("{client} gets no answer from {WEB}:\n{}", ping.stdout)
        })?;
        capture.kill()?;
        let frames = capture.wait()?.stdout;
        let as_firewall = format!("{FIREWALL} > {WEB}");
        let requests = frames.lines().filter(|line| line.contains("icmp type=8"));
        let (ours, others): (Vec<&str>, Vec<&str>) =
            requests.partition(|line| line.contains(&as_firewall));
        must(ours.len() >= 3 && others.is_empty(), || {
            format!("the uplink did not see three requests of {FIREWALL}:\n{frames}")
        })?;
        let times = ping.stdout.lines().last().unwrap_or_default();
        seen.push(format!(
            "{client}: 3 answers from {WEB}, seen there as {FIREWALL}; {times}"
        ));
    }
    for client in clients(world) {
        let address = world.topology().client(&client).context("gone")?.ip;
        let output = world.run(&client, &format!("lab udp {ECHO} {WHOAMI_PORT} who"), PROBE)?;
        let text = output.value("text").unwrap_or_default().to_owned();
        must(text.starts_with(&FIREWALL.to_string()), || {
            format!("a server saw {client} ({address}) as {text:?}")
        })?;
    }
    Ok(seen)
}

/// Each client resolves names through its virtual resolver addresses, which the firewall translates.
pub const DNS: Claim = Claim {
    name: "dns",
    title: "Each client resolves a name at its virtual DNS address, over UDP and TCP",
    check: dns,
};

fn dns(world: &mut LabWorld) -> Result<Vec<String>> {
    let mut seen = Vec::new();
    for client in clients(world) {
        for server in VIRTUAL_DNS {
            for transport in ["", " --tcp"] {
                let command = format!("lab resolve {WEB_NAME} --server {server}{transport}");
                let output = world.run(&client, &command, PROBE)?;
                must(
                    output.is_success() && output.stdout.contains(&WEB.to_string()),
                    || format!("{client}: `{command}` says {:?}", output.stdout),
                )?;
            }
        }
        let command = format!("lab resolve {MANY_NAME} --server {} --tcp", VIRTUAL_DNS[0]);
        let output = world.run(&client, &command, PROBE)?;
        let count = output.stdout.matches("192.0.2.").count();
        must(count == usize::try_from(MANY)?, || {
            format!("{client}: {count} of {MANY} addresses in a long answer over TCP")
        })?;
        seen.push(format!(
            "{client}: {WEB_NAME} is {WEB}, asked at {} and {}, over UDP and TCP",
            VIRTUAL_DNS[0], VIRTUAL_DNS[1]
        ));
    }
    Ok(seen)
}

/// Each client downloads a file, which arrives whole.
pub const DOWNLOAD: Claim = Claim {
    name: "download",
    title: "Each client downloads 8 MiB over HTTP; the checksums agree at both ends",
    check: download,
};

fn download(world: &mut LabWorld) -> Result<Vec<String>> {
    let mut seen = Vec::new();
    let url = format!("http://{WEB}/8m.bin");
    let there = world
        .lab
        .ask(&format!("wget -q -O - {url} | sha256sum"), TRANSFER)?;
    let there = there
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned();
    for client in clients(world) {
        let output = world.run(
            &client,
            &format!("wget -q -O - {url} | sha256sum"),
            TRANSFER,
        )?;
        let here = output.stdout.split_whitespace().next().unwrap_or_default();
        must(output.is_success() && here == there, || {
            format!("{client} got {here:?}, the server has {there:?}")
        })?;
        seen.push(format!(
            "{client}: {} MiB in {}.{:03} s of guest time, sha256 {}…",
            DOWNLOAD_BYTES >> 20,
            output.guest_ms / 1000,
            output.guest_ms % 1000,
            here.get(..16).unwrap_or(here)
        ));
    }
    Ok(seen)
}

/// Hypercalls for each packet between two snapshots, and what they consisted of.
///
/// A packet is what it is on a wire: a GSO frame counts as its segments.
fn hypercalls_per_packet(before: &Snapshot, after: &Snapshot) -> (f64, String) {
    let grown = |name: &str| after.counter(name).saturating_sub(before.counter(name));
    let frames = grown("loop.to-uplink").saturating_add(grown("loop.to-clients"));
    let packets = grown("loop.packets");
    let parts = [
        ("copies", "xen.copy-batches"),
        ("polls", "xen.polls"),
        ("events in calls of their own or joined", "xen.events-sent"),
    ]
    .map(|(word, name)| format!("{word} {}", grown(name)))
    .join(", ");
    let hypercalls = grown("xen.hypercalls");
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let ratio = hypercalls as f64 / packets.max(1) as f64;
    (
        ratio,
        format!("{packets} packets in {frames} frames, {hypercalls} hypercalls ({parts})"),
    )
}

/// A steady transfer needs few hypercalls.
pub const HYPERCALLS: Claim = Claim {
    name: "hypercalls",
    title: "A steady transfer needs at most 0.25 hypercalls per packet, down and up",
    check: hypercalls,
};

fn hypercalls(world: &mut LabWorld) -> Result<Vec<String>> {
    let mut seen = Vec::new();
    let down = format!("wget -q -O /dev/null http://{WEB}/8m.bin");
    let up = upload_command();
    for (direction, command) in [("download", down), ("upload", up)] {
        let before = snapshot(world)?;
        let output = world.run("c1", &command, TRANSFER)?;
        must(output.is_success(), || {
            format!("the {direction} failed: {}", output.stdout)
        })?;
        let after = snapshot(world)?;
        let (ratio, details) = hypercalls_per_packet(&before, &after);
        let line = format!("{direction}: {ratio:.3} hypercalls per packet; {details}");
        must(ratio <= HYPERCALLS_PER_PACKET, || line.clone())?;
        seen.push(line);
    }
    Ok(seen)
}

fn upload_command() -> String {
    format!(
        "dd if=/dev/zero bs=65536 count={} 2>/dev/null | nc -w 20 {ECHO} {SINK_PORT}",
        UPLOAD_MIB * 16
    )
}

/// A client's upload arrives at the far end.
pub const UPLOAD: Claim = Claim {
    name: "upload",
    title: "A client uploads 1 MiB through an echo server and gets back what it sent",
    check: upload,
};

fn upload(world: &mut LabWorld) -> Result<Vec<String>> {
    // A pattern that no wrong order of pages would leave unchanged.
    let make = "seq 1 150000 | head -c 1048576";
    let sum = world.ask("c1", &format!("{make} | sha256sum"), PROBE)?;
    let echoed = world.run(
        "c1",
        &format!("{make} | nc -w 10 {ECHO} {ECHO_PORT} | head -c 1048576 | sha256sum"),
        TRANSFER,
    )?;
    must(echoed.stdout == sum, || {
        format!("sent {}, got back {}", sum.trim(), echoed.stdout.trim())
    })?;
    Ok(vec![format!(
        "1 MiB there and back in {} ms",
        echoed.guest_ms
    )])
}

/// The firewall answers pings of its clients and offers nothing else.
pub const PING_GATEWAY: Claim = Claim {
    name: "gateway",
    title: "The firewall answers a client's ping and refuses everything else with ICMP 3/10",
    check: ping_gateway,
};

fn ping_gateway(world: &mut LabWorld) -> Result<Vec<String>> {
    let ping = world.run("c1", &format!("ping -c 2 -W 5 {FIREWALL}"), PROBE)?;
    must(ping.is_success(), || format!("no answer: {}", ping.stdout))?;
    let tcp = world.run("c1", &format!("lab connect {FIREWALL} 22"), PROBE)?;
    must(
        tcp.value("icmp") == Some("3/10") && tcp.value("from") == Some(&FIREWALL.to_string()),
        || format!("TCP to the firewall: {}", tcp.stdout),
    )?;
    let dns = world.run(
        "c1",
        &format!("lab udp {} 53 x --timeout-ms 100", internet::DNS),
        PROBE,
    )?;
    // The real resolver is an ordinary destination: reached, whatever it makes of our nonsense.
    must(dns.value("result") != Some("refused"), || {
        format!("UDP to the real resolver: {}", dns.stdout)
    })?;
    Ok(vec![format!(
        "ping answered; TCP 22 refused with ICMP 3/10 from {FIREWALL} in {} ms",
        tcp.value("ms").unwrap_or("?")
    )])
}
