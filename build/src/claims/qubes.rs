//! Claims about Qubes OS: QubesDB, qrexec, and the life of a qube as dom0 sees it.
//!
//! dom0's daemons are our double (`tests/dom0`) over real vchans. It is as strict as the real ones: what ends a real
//! daemon fails the claim, and so does a call that is not ended exactly once.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::{Claim, PROBE, TRANSFER, clients, must, ping};
use crate::lab::internet::{BLOCKED, ECHO, ECHO_PORT, WEB};
use crate::lab::topology::{ClientSpec, FIREWALL, FirewallKind, FirewallSpec};
use crate::lab::world::LabWorld;
use crate::observe::snapshot;

/// How soon a shutdown request must be acknowledged, in milliseconds of guest time, with the time that two programs of
/// dom0 need on a busy machine. Qubes waits for a minute.
const ACKNOWLEDGED_WITHIN_MS: u64 = 2_000;

/// Calls one after the other: more than dom0 has ports.
const IN_SEQUENCE: u32 = 300;
/// Calls at once.
const AT_ONCE: u32 = 20;

/// The line of a call of a command, as `qrexec-client` makes it.
const STATUS: &str = "user:status";

/// Whether a client gets through to an address.
fn connects(world: &LabWorld, client: &str, address: Ipv4Addr) -> Result<bool> {
    let command = format!("lab connect {address} {ECHO_PORT} --timeout-ms 3000");
    let output = world.run(client, &command, PROBE)?;
    Ok(output.value("result") == Some("connected"))
}

/// Waits until a client gets through, or does not any more.
fn becomes(world: &LabWorld, client: &str, address: Ipv4Addr, wanted: bool) -> Result<()> {
    let deadline = Instant::now() + world.lab.patience(Duration::from_secs(10));
    while connects(world, client, address)? != wanted {
        must(Instant::now() < deadline, || {
            format!("{client} to {address}: still the other way")
        })?;
    }
    Ok(())
}

/// The firewall starts as in Qubes OS.
pub const START: Claim = Claim {
    name: "qubes-start",
    title: "The firewall takes everything from QubesDB and greets dom0's qrexec daemon",
    check: start,
};

fn start(world: &mut LabWorld) -> Result<Vec<String>> {
    let played = world.play("wait synced\nwait qrexec\nwait acknowledged\n", TRANSFER)?;
    let seen = snapshot(world)?;
    must(seen.source == "qubesdb" && seen.missing.is_empty(), || {
        format!("source {}, missing {:?}", seen.source, seen.missing)
    })?;
    let folder = format!("{}/vm-data", world.firewall()?.xenstore());
    let own = world
        .lab
        .run(&format!("xenstore-ls {folder} 2>/dev/null | wc -l"), PROBE)?;
    must(own.stdout.trim() == "0", || {
        format!("there are settings in xenstore: {}", own.stdout)
    })?;
    for client in clients(world) {
        ping(world, &client)?;
    }
    Ok(vec![format!(
        "{} statements of dom0 carried out; all clients ping",
        played.len()
    )])
}

/// A rule set takes effect at its commit and not before.
pub const COMMIT: Claim = Claim {
    name: "qubes-commit",
    title: "Rules are removed and written one by one; the old ones hold until the commit, then the new ones",
    check: commit,
};

fn commit(world: &mut LabWorld) -> Result<Vec<String>> {
    let c1 = world.topology().client("c1").context("c1 is gone")?.ip;
    let tree = format!("/qubes-firewall/{c1}");
    must(connects(world, "c1", BLOCKED)?, || {
        format!("c1 does not reach {BLOCKED} to begin with")
    })?;
    let halfway = format!(
        "remove {tree}/\nkey {tree}/policy drop\nkey {tree}/0003 action=drop dst4={BLOCKED}/32\nkey {tree}/0007 action=accept\nwait acknowledged\n"
    );
    world.play(&halfway, PROBE)?;
    std::thread::sleep(world.lab.patience(Duration::from_millis(500)));
    must(connects(world, "c1", BLOCKED)?, || {
        "rules without their commit are enforced already".to_owned()
    })?;
    world.play(&format!("key {tree}\nwait acknowledged\n"), PROBE)?;
    becomes(world, "c1", BLOCKED, false)?;
    // The rules behind the gap in the numbers are there.
    must(connects(world, "c1", ECHO)?, || {
        format!("c1 does not reach {ECHO} under the new rules")
    })?;
    let seen = snapshot(world)?;
    let numbers: Vec<u16> = seen
        .rules
        .iter()
        .find(|rules| rules.address == std::net::IpAddr::V4(c1))
        .map(|rules| rules.rules.iter().map(|(number, _)| *number).collect())
        .unwrap_or_default();
    must(numbers == [3, 7], || format!("rules in force: {numbers:?}"))?;
    world.set_client_rules("c1", "drop", &["action=accept"])?;
    becomes(world, "c1", BLOCKED, true)?;
    Ok(vec![
        "enforced before the commit: the old rules; after it: numbers 3 and 7, with the gap".into(),
    ])
}

/// A client starts while the firewall runs.
pub const CLIENT_STARTS: Claim = Claim {
    name: "qubes-client-starts",
    title: "A third qube starts behind the running firewall: keys, rules, vif, rules again",
    check: client_starts,
};

fn client_starts(world: &mut LabWorld) -> Result<Vec<String>> {
    let spec = ClientSpec::numbered(3)
        .with_rules(&[&format!("action=drop dst4={BLOCKED}/32"), "action=accept"]);
    world.add_client(spec)?;
    ping(world, "c3")?;
    must(!connects(world, "c3", BLOCKED)?, || {
        "c3 reaches what its rules forbid".to_owned()
    })?;
    must(connects(world, "c3", ECHO)?, || {
        format!("c3 does not reach {ECHO}")
    })?;
    for client in ["c1", "c2"] {
        ping(world, client)?;
    }
    Ok(vec![
        "c3 pings, is refused where its rules say so, and the others are undisturbed".into(),
    ])
}

/// The netvm changes.
pub const NETVM: Claim = Claim {
    name: "qubes-netvm",
    title: "The netvm changes: vif away, every key and rule set written again, vif back; rules hold throughout",
    check: netvm,
};

fn netvm(world: &mut LabWorld) -> Result<Vec<String>> {
    let forbid = format!("action=drop dst4={BLOCKED}/32");
    world.set_client_rules("c1", "drop", &[&forbid, "action=accept"])?;
    becomes(world, "c1", BLOCKED, false)?;
    let firewall = world.firewall()?.clone();
    let vif = world
        .topology()
        .firewall
        .domain()
        .and_then(|domain| domain.vifs.into_iter().next())
        .context("the firewall has no uplink")?;
    let detached = world.lab.detach(&firewall, 0)?;
    must(detached.is_success(), || {
        format!("xl network-detach: {}", detached.stdout)
    })?;
    // Without a netvm dom0 still reaches the firewall.
    world.play(&format!("call 0 {STATUS}\n"), PROBE)?;
    world.play("limit 30000\nrewrite\nwait acknowledged\n", PROBE)?;
    let attached = world.lab.attach(&firewall, &vif)?;
    must(attached.is_success(), || {
        format!("xl network-attach: {}", attached.stdout)
    })?;
    world.play(
        "call 0 root:QUBESRPC qubes.WaitForNetworkUplink dom0\n",
        PROBE,
    )?;
    let begun = Instant::now();
    for client in clients(world) {
        while let Err(error) = ping(world, &client) {
            if begun.elapsed() > world.lab.patience(Duration::from_secs(20)) {
                return Err(error);
            }
        }
    }
    must(!connects(world, "c1", BLOCKED)?, || {
        "c1's rules are gone".to_owned()
    })?;
    world.set_client_rules("c1", "drop", &["action=accept"])?;
    becomes(world, "c1", BLOCKED, true)?;
    Ok(vec![
        "all clients ping through the new uplink, and what was forbidden still is".into(),
    ])
}

/// Every service that dom0 may call.
pub const SERVICES: Claim = Claim {
    name: "qubes-services",
    title: "Every service and command that dom0 may call ends as it should, once",
    check: services,
};

/// As the scenario of the host tests has them; what the commands say is looked at here, too.
const CALLS_OF_DOM0: &str = "\
shell 0 status
expect uplink
shell 0 clients
expect 10.137.0.6
shell 0 drops
shell 0 version
shell 127 frobnicate
shell 0 
call 0 user:status
call 127 user:frobnicate
call 0 user:QUBESRPC qubes.WaitForSession dom0
call 0 user:QUBESRPC qubes.WaitForSession+ dom0
call 0 root:QUBESRPC qubes.SuspendPreAll dom0
call 0 root:QUBESRPC qubes.SuspendPre dom0
call 0 root:QUBESRPC qubes.SuspendPost dom0
call 0 root:QUBESRPC qubes.SuspendPostAll dom0
call 0 root:QUBESRPC qubes.WaitForNetworkUplink dom0
call 0 root:QUBESRPC qubes.ResizeDisk+private dom0
call 0 user:QUBESRPC qubes.VMExec+status dom0
call 127 user:QUBESRPC qubes.GetAppmenus dom0
call 126 user:QUBESRPC qubes.VMShell work
call 125 malformed
just 0 user:QUBESRPC qubes.WaitForSession dom0
just 127 user:QUBESRPC qubes.Nothing dom0
just 0 user:status
call 0 open:0 user:status
";

fn services(world: &mut LabWorld) -> Result<Vec<String>> {
    let played = world.play(CALLS_OF_DOM0, TRANSFER)?;
    let first = played.milliseconds("shell 0 status").unwrap_or_default();
    Ok(vec![format!(
        "{} statements; qvm-run -p fw status took {first} ms",
        played.len()
    )])
}

/// Much input that nobody wants.
pub const INPUT: Claim = Claim {
    name: "qubes-input",
    title: "8 MiB of input to a command are taken, or left when the command has ended, and traffic flows meanwhile",
    check: input,
};

fn input(world: &mut LabWorld) -> Result<Vec<String>> {
    let mut traffic = world
        .guest("c1")?
        .start(&format!("ping -i 0.2 {WEB}"), Duration::from_secs(600))?;
    traffic.wait_output("bytes from", world.lab.patience(PROBE))?;
    let played = world.play(
        "limit 300000\ncall 127 closed:8388608 user:QUBESRPC qubes.VMShell dom0\ncall 0 open:8388608 user:status\ncall 0 closed:8388608 user:QUBESRPC qubes.WaitForSession dom0\n",
        Duration::from_secs(600),
    )?;
    traffic.kill()?;
    let pings = traffic.wait()?.stdout;
    let answers = pings
        .lines()
        .filter(|line| line.contains("bytes from"))
        .count();
    must(answers > 3, || format!("{answers} pings got an answer"))?;
    let times: Vec<String> = ["call 127", "call 0 open", "call 0 closed"]
        .iter()
        .filter_map(|call| played.milliseconds(call))
        .map(|time| format!("{time} ms"))
        .collect();
    Ok(vec![format!(
        "8 MiB each: {}; c1 pinged {answers} times meanwhile",
        times.join(", ")
    )])
}

/// Many calls.
pub const CALLS: Claim = Claim {
    name: "qubes-calls",
    title: "300 calls in sequence and 20 at once; every port comes back",
    check: calls,
};

fn calls(world: &mut LabWorld) -> Result<Vec<String>> {
    let before = held(world)?;
    let played = world.play(
        &format!(
            "limit 300000\nsequence {IN_SEQUENCE} 0 {STATUS}\nparallel {AT_ONCE} 0 {STATUS}\nparallel {AT_ONCE} 0 user:QUBESRPC qubes.WaitForSession dom0\nsequence 20 127 user:frobnicate\n"
        ),
        Duration::from_secs(600),
    )?;
    let after = held(world)?;
    must(before == after, || {
        format!("(mapped pages, watches): {before:?} before, {after:?} after")
    })?;
    let sequence = played.milliseconds("sequence 300").unwrap_or_default();
    let parallel = played.milliseconds("parallel").unwrap_or_default();
    Ok(vec![format!(
        "{IN_SEQUENCE} in sequence in {sequence} ms, {AT_ONCE} at once in {parallel} ms; mapped pages and watches as before"
    )])
}

/// Mapped pages and watches, once nothing is on its way.
fn held(world: &LabWorld) -> Result<(u64, u64)> {
    std::thread::sleep(world.lab.patience(Duration::from_millis(300)));
    let seen = snapshot(world)?;
    let maps = seen
        .counter("xen.maps")
        .saturating_sub(seen.counter("xen.unmaps"));
    Ok((maps, seen.counter("store.watches")))
}

/// dom0 loses its channels.
pub const CHANNELS_LOST: Claim = Claim {
    name: "qubes-channels-lost",
    title: "dom0 closes QubesDB and qrexec again and again; both come back, also with rules changed meanwhile",
    check: channels_lost,
};

fn channels_lost(world: &mut LabWorld) -> Result<Vec<String>> {
    let c1 = world.topology().client("c1").context("c1 is gone")?.ip;
    let begun = Instant::now();
    world.play(
        &format!(
            "limit 30000
            drop qubesdb
            call 0 {STATUS}
            wait synced
            drop qrexec
            wait qrexec
            call 0 {STATUS}
            drop qubesdb
            rules {c1}
              0000 action=drop dst4={BLOCKED}/32
              0001 action=accept
            drop qrexec
            wait synced
            wait qrexec
            call 0 {STATUS}
            drop qubesdb
            wait synced
            drop qrexec
            wait qrexec
            drop qrexec
            wait qrexec
            call 0 {STATUS}
            "
        ),
        TRANSFER,
    )?;
    let time = begun.elapsed();
    becomes(world, "c1", BLOCKED, false)?;
    world.set_client_rules("c1", "drop", &["action=accept"])?;
    becomes(world, "c1", BLOCKED, true)?;
    Ok(vec![format!(
        "QubesDB lost 3 times, qrexec 4 times in {:.1} s; the rules of meanwhile are in force",
        time.as_secs_f64()
    )])
}

/// dom0's daemons end and come back.
pub const DAEMONS_RESTARTED: Claim = Claim {
    name: "qubes-daemons-restarted",
    title: "dom0's daemons are killed: the rules hold; they are started again: changes take effect again",
    check: daemons_restarted,
};

fn daemons_restarted(world: &mut LabWorld) -> Result<Vec<String>> {
    let forbid = format!("action=drop dst4={BLOCKED}/32");
    world.set_client_rules("c1", "drop", &[&forbid, "action=accept"])?;
    becomes(world, "c1", BLOCKED, false)?;
    world.stop_double()?;
    std::thread::sleep(world.lab.patience(Duration::from_secs(1)));
    for client in clients(world) {
        ping(world, &client)?;
    }
    must(
        !connects(world, "c1", BLOCKED)? && connects(world, "c1", ECHO)?,
        || "without dom0's daemons other rules hold than before".to_owned(),
    )?;
    world.restart_double()?;
    let played = world.play("limit 60000\nwait synced\nwait qrexec\n", TRANSFER)?;
    must(!connects(world, "c1", BLOCKED)?, || {
        "the same rules, read again, are not the same".to_owned()
    })?;
    world.set_client_rules("c1", "drop", &["action=accept"])?;
    becomes(world, "c1", BLOCKED, true)?;
    world.play(&format!("call 0 {STATUS}\n"), PROBE)?;
    Ok(vec![format!(
        "back after {} ms (QubesDB) and {} ms more (qrexec)",
        played.milliseconds("wait synced").unwrap_or_default(),
        played.milliseconds("wait qrexec").unwrap_or_default()
    )])
}

/// dom0's shutdown request.
pub const SHUTDOWN: Claim = Claim {
    name: "qubes-shutdown",
    title: "control/feature-poweroff is 1, and a shutdown request is acknowledged within milliseconds",
    check: shutdown,
};

fn shutdown(world: &mut LabWorld) -> Result<Vec<String>> {
    let control = format!("{}/control", world.firewall()?.xenstore());
    // Qubes' libxl asks for these before it requests anything, and never writes a suspend request without the third.
    let features = world.lab.ask(
        &format!("for f in poweroff reboot suspend; do echo \"$f=$(xenstore-read {control}/feature-$f 2>/dev/null)\"; done"),
        PROBE,
    )?;
    let words: Vec<&str> = features.split_whitespace().collect();
    must(
        words.starts_with(&["poweroff=1", "reboot=1"]) && !words.contains(&"suspend=1"),
        || format!("features: {words:?}"),
    )?;
    let asked = world.lab.run(
        &format!(
            "xenstore-write {control}/shutdown poweroff; n=0
            while [ -n \"$(xenstore-read {control}/shutdown 2>/dev/null)\" ]
            do n=$((n+1)); [ $n -lt 500 ] || exit 1; done"
        ),
        PROBE,
    )?;
    must(
        asked.is_success() && asked.guest_ms < ACKNOWLEDGED_WITHIN_MS,
        || format!("acknowledged after {} ms, if at all", asked.guest_ms),
    )?;
    let deadline = Instant::now() + world.lab.patience(Duration::from_secs(20));
    while world.lab.xl("domid fw")?.is_success() {
        must(Instant::now() < deadline, || {
            "the domain does not end".to_owned()
        })?;
        std::thread::sleep(Duration::from_millis(100));
    }
    world.forget_firewall()?;
    for client in clients(world) {
        world.detach(&client)?;
    }
    world.start_firewall()?;
    for client in clients(world) {
        world.attach(&client)?;
        ping(world, &client)?;
    }
    Ok(vec![format!(
        "acknowledged after {} ms of guest time, two programs of dom0 included; started again, all clients ping",
        asked.guest_ms
    )])
}

/// How long a start takes. The last claim: it leaves neither a firewall nor attached clients.
pub const TIMES: Claim = Claim {
    name: "qubes-times",
    title: "From xl create to qrexec's greeting and to the first forwarded packet, with a Linux firewall beside",
    check: times,
};

fn times(world: &mut LabWorld) -> Result<Vec<String>> {
    world.stop_firewall()?;
    for client in clients(world) {
        world.detach(&client)?;
    }
    let ours = world.timed_start("c1", WEB)?;
    world.stop_firewall()?;
    world.detach("c1")?;
    let image = world.replace_firewall(FirewallSpec::new(FirewallKind::Linux))?;
    let linux = world.timed_start("c1", WEB);
    world.stop_firewall()?;
    world.detach("c1")?;
    world.replace_firewall(image)?;
    let linux = linux?;
    let greeted = ours.greeted_ms.context("no greeting")?;
    must(ours.forwarded_ms < linux.forwarded_ms, || {
        format!("{ours:?}, Linux {linux:?}")
    })?;
    Ok(vec![
        format!(
            "Portcullis: greeting {greeted} ms after xl create, first packet of c1 at the uplink after {} ms",
            ours.forwarded_ms
        ),
        format!(
            "Linux (busybox and nftables only, nothing of Qubes): first packet after {} ms; by dom0's clock, {FIREWALL} each time",
            linux.forwarded_ms
        ),
    ])
}
