//! Claims about traffic that is not allowed: refused or dropped, for a reason that can be read.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{Claim, PROBE, must};
use crate::lab::internet::{BLOCKED, ECHO, ECHO_PORT, WEB};
use crate::lab::topology::FIREWALL;
use crate::lab::world::LabWorld;
use crate::observe::snapshot;

/// The rule that every new qube has.
const ACCEPT_ALL: &str = "action=accept";

/// How soon a refusal must come and a change of rules must work, in milliseconds of guest time.
const AT_ONCE_MS: u64 = 1000;

/// What the rules of one client forbid is refused; the other client, whose rules allow it, gets through.
pub const REJECT: Claim = Claim {
    name: "reject",
    title: "What a client's rules forbid is refused at once with ICMP 3/13; the other client gets through",
    check: reject,
};

fn reject(world: &mut LabWorld) -> Result<Vec<String>> {
    let forbid = format!("action=drop dst4={BLOCKED}/32");
    world.set_client_rules("c1", "drop", &[&forbid, ACCEPT_ALL])?;
    let result = refused_and_allowed(world);
    world.set_client_rules("c1", "drop", &[ACCEPT_ALL])?;
    result
}

/// Whether `c1` is refused at [`BLOCKED`] at once, and `c2` is not.
pub(super) fn refused_and_allowed(world: &LabWorld) -> Result<Vec<String>> {
    let connect = format!("lab connect {BLOCKED} {ECHO_PORT}");
    // The rules take effect a moment after they were written; until then the connection succeeds.
    let mut refused = world.run("c1", &connect, PROBE)?;
    for _ in 0..20 {
        if refused.value("result") == Some("refused") {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        refused = world.run("c1", &connect, PROBE)?;
    }
    let ms: u64 = refused.value("ms").unwrap_or("9999").parse()?;
    must(
        refused.value("icmp") == Some("3/13")
            && refused.value("from") == Some(&FIREWALL.to_string())
            && ms < AT_ONCE_MS,
        || format!("c1 to {BLOCKED}: {}", refused.stdout.trim()),
    )?;
    let udp = world.run("c1", &format!("lab udp {BLOCKED} {ECHO_PORT} x"), PROBE)?;
    must(udp.value("icmp") == Some("3/13"), || {
        format!("c1 to {BLOCKED} over UDP: {}", udp.stdout.trim())
    })?;
    let allowed = world.run("c2", &connect, PROBE)?;
    must(allowed.value("result") == Some("connected"), || {
        format!("c2 to {BLOCKED}: {}", allowed.stdout.trim())
    })?;
    let elsewhere = world.run("c1", &format!("lab connect {ECHO} {ECHO_PORT}"), PROBE)?;
    must(elsewhere.value("result") == Some("connected"), || {
        format!("c1 to {ECHO}: {}", elsewhere.stdout.trim())
    })?;
    Ok(vec![
        format!("c1 to {BLOCKED}: refused with ICMP 3/13 from {FIREWALL} after {ms} ms"),
        format!("c2 to {BLOCKED}: connected; c1 to {ECHO}: connected"),
    ])
}

/// Clients cannot reach each other, and forged sources die; both are counted.
pub const ISOLATION: Claim = Claim {
    name: "isolation",
    title: "Clients cannot reach each other; a forged source dies; both are counted under their reason",
    check: isolation,
};

fn isolation(world: &mut LabWorld) -> Result<Vec<String>> {
    const FORGED: u64 = 5;
    let c2 = world.topology().client("c2").context("c2 is gone")?.ip;
    let uplink_vif = format!("vif{}.0", world.firewall()?.domid);
    let before = snapshot(world)?;
    let mut at_uplink = world.lab.dom0().start(
        &format!("lab capture {uplink_vif} --seconds 60"),
        Duration::from_secs(90),
    )?;
    at_uplink.wait_output("capturing", world.lab.patience(PROBE))?;
    let mut at_c2 = world
        .guest("c2")?
        .start("lab capture eth0 --seconds 60", Duration::from_secs(90))?;
    at_c2.wait_output("capturing", world.lab.patience(PROBE))?;

    let connect = world.run(
        "c1",
        &format!("lab connect {c2} 4242 --timeout-ms 1500"),
        PROBE,
    )?;
    must(connect.value("result") == Some("timeout"), || {
        format!("c1 to c2: {}", connect.stdout.trim())
    })?;
    let forge = |source: &str| {
        format!("lab forge eth0 --src {source} --dst {WEB} --udp 4000:4001 --count {FORGED}")
    };
    world.ask("c1", &forge(&c2.to_string()), PROBE)?;
    world.ask("c1", &forge("192.0.2.77"), PROBE)?;
    // Something honest behind it: when it has arrived, so has all before it.
    let ping = world.run("c1", &format!("ping -c 1 -W 5 {WEB}"), PROBE)?;
    must(ping.is_success(), || "c1 cannot ping any more".to_owned())?;
    at_uplink.kill()?;
    at_c2.kill()?;
    let (uplink_saw, c2_saw) = (at_uplink.wait()?.stdout, at_c2.wait()?.stdout);
    let after = snapshot(world)?;

    must(!uplink_saw.contains("4000 > 4001"), || {
        format!("forged packets reached the uplink:\n{uplink_saw}")
    })?;
    must(!c2_saw.contains("4242"), || {
        format!("c1's packets reached c2:\n{c2_saw}")
    })?;
    let c1: std::net::IpAddr = world
        .topology()
        .client("c1")
        .context("c1 is gone")?
        .ip
        .into();
    let grown = |reason: &str| {
        let count = |snapshot: &kernel::snapshot::Snapshot| {
            snapshot
                .client(c1)
                .map_or(0, |client| client.dropped(reason))
        };
        (
            after.dropped(reason).saturating_sub(before.dropped(reason)),
            count(&after).saturating_sub(count(&before)),
        )
    };
    let (spoofed, spoofed_c1) = grown("spoofed-source");
    // Any Linux guest may add router solicitations of its own, whose link-local source is no address of its vif: so c1's
    // count is the one that is compared, and the sum may be larger.
    must(spoofed_c1 >= 2 * FORGED && spoofed >= spoofed_c1, || {
        format!(
            "spoofed-source of c1 grew by {spoofed_c1} (all: {spoofed}), not by {} at least",
            2 * FORGED
        )
    })?;
    let (to_client, to_client_c1) = grown("to-client");
    must(to_client >= 1 && to_client_c1 == to_client, || {
        format!("to-client grew by {to_client} (c1: {to_client_c1})")
    })?;
    Ok(vec![
        format!("c1 to c2: no answer; drop reason to-client +{to_client}"),
        format!(
            "{} forged packets: none seen outside; drop reason spoofed-source of c1 +{spoofed_c1}",
            2 * FORGED
        ),
    ])
}

/// Rules change while everything runs: running connections that they forbid end, others live on.
pub const RULE_CHANGE: Claim = Claim {
    name: "rule-change",
    title: "Rules of a client change while it runs and take effect without a restart",
    check: rule_change,
};

fn rule_change(world: &mut LabWorld) -> Result<Vec<String>> {
    let result = change_rules(world);
    world.set_client_rules("c1", "drop", &[ACCEPT_ALL])?;
    result
}

fn change_rules(world: &mut LabWorld) -> Result<Vec<String>> {
    let connect = |address: std::net::Ipv4Addr| format!("lab connect {address} {ECHO_PORT}");
    let before = world.run("c1", &connect(ECHO), PROBE)?;
    must(before.value("result") == Some("connected"), || {
        format!("c1 to {ECHO} before: {}", before.stdout.trim())
    })?;
    // Two running connections: one to what will be forbidden, one to what stays allowed.
    let talk = |address: std::net::Ipv4Addr| {
        format!("(while :; do echo tick; sleep 0.2; done) | nc {address} {ECHO_PORT}")
    };
    let mut doomed = world
        .guest("c1")?
        .start(&talk(ECHO), Duration::from_secs(120))?;
    let mut spared = world
        .guest("c1")?
        .start(&talk(BLOCKED), Duration::from_secs(120))?;
    let patience = world.lab.patience(PROBE);
    doomed.wait_output("tick", patience)?;
    spared.wait_output("tick", patience)?;

    let forbid = format!("action=drop dst4={ECHO}/32");
    world.set_client_rules("c1", "drop", &[&forbid, ACCEPT_ALL])?;
    std::thread::sleep(world.lab.patience(Duration::from_millis(500)));
    let refused = world.run("c1", &connect(ECHO), PROBE)?;
    must(refused.value("icmp") == Some("3/13"), || {
        format!("c1 to {ECHO} after the change: {}", refused.stdout.trim())
    })?;
    drain(&mut doomed)?;
    drain(&mut spared)?;
    std::thread::sleep(Duration::from_secs(2));
    let (cut, alive) = (drain(&mut doomed)?, drain(&mut spared)?);
    doomed.kill()?;
    spared.kill()?;
    must(cut == 0, || {
        format!("the forbidden connection still carried {cut} bytes")
    })?;
    must(alive > 0, || "the allowed connection died, too".to_owned())?;

    world.set_client_rules("c1", "drop", &[ACCEPT_ALL])?;
    std::thread::sleep(world.lab.patience(Duration::from_millis(500)));
    let again = world.run("c1", &connect(ECHO), PROBE)?;
    must(again.value("result") == Some("connected"), || {
        format!(
            "c1 to {ECHO} after the change back: {}",
            again.stdout.trim()
        )
    })?;
    Ok(vec![
        "new connections refused, then allowed again".to_owned(),
        format!(
            "the running connection that became forbidden was cut; the other carried {alive} bytes meanwhile"
        ),
    ])
}

/// Bytes that a job wrote since it was last asked.
fn drain(job: &mut crate::lab::link::Job) -> Result<usize> {
    let mut bytes = 0;
    loop {
        match job.next(Duration::from_millis(50))? {
            crate::lab::link::Progress::Wrote(more) => bytes += more.len(),
            crate::lab::link::Progress::Ended(..) | crate::lab::link::Progress::Quiet => {
                return Ok(bytes);
            }
        }
    }
}

/// A rule set that cannot be understood refuses everything from its client, visibly, and from no other.
pub const BAD_RULES: Claim = Claim {
    name: "bad-rules",
    title: "Rules that cannot be understood refuse everything from their client alone, visibly",
    check: bad_rules,
};

fn bad_rules(world: &mut LabWorld) -> Result<Vec<String>> {
    world.set_client_rules("c1", "drop", &[ACCEPT_ALL, "action=acceptt"])?;
    std::thread::sleep(world.lab.patience(Duration::from_millis(500)));
    let result = (|| {
        let refused = world.run("c1", &format!("lab connect {ECHO} {ECHO_PORT}"), PROBE)?;
        must(refused.value("icmp") == Some("3/13"), || {
            format!("c1 under unusable rules: {}", refused.stdout.trim())
        })?;
        let other = world.run("c2", &format!("lab connect {ECHO} {ECHO_PORT}"), PROBE)?;
        must(other.value("result") == Some("connected"), || {
            format!("c2 beside c1's unusable rules: {}", other.stdout.trim())
        })?;
        let c1 = world.topology().client("c1").context("c1 is gone")?.ip;
        let shown = snapshot(world)?;
        let error = shown
            .rules
            .iter()
            .find(|rules| rules.address == std::net::IpAddr::V4(c1))
            .and_then(|rules| rules.error.clone());
        must(
            error.as_ref().is_some_and(|error| error.contains("0001")),
            || format!("the snapshot does not name the rule: {error:?}"),
        )?;
        Ok(vec![format!(
            "c1 refused, c2 not; shown: {}",
            error.unwrap_or_default()
        )])
    })();
    world.set_client_rules("c1", "drop", &[ACCEPT_ALL])?;
    result
}

/// A setting that is missing is named and waited for.
pub const MISSING_SETTING: Claim = Claim {
    name: "missing-setting",
    title: "A missing setting is named and waited for, and works as soon as it comes",
    check: missing_setting,
};

fn missing_setting(world: &mut LabWorld) -> Result<Vec<String>> {
    let key = format!("{}/vm-data/qubes-ip", world.firewall()?.xenstore());
    world.lab.ask(&format!("xenstore-rm {key}"), PROBE)?;
    std::thread::sleep(world.lab.patience(Duration::from_millis(300)));
    let without = snapshot(world)?;
    let ping = world.run("c1", &format!("ping -c 1 -W 1 {WEB}"), PROBE)?;
    world.write_setting("qubes-ip", &FIREWALL.to_string())?;
    std::thread::sleep(world.lab.patience(Duration::from_millis(300)));
    must(
        without.missing.iter().any(|name| name == "/qubes-ip"),
        || format!("missing settings shown: {:?}", without.missing),
    )?;
    must(!ping.is_success(), || {
        "a ping got out without an address".to_owned()
    })?;
    let again = world.run("c1", &format!("ping -c 1 -W 5 {WEB}"), PROBE)?;
    must(again.is_success(), || {
        format!("after it came back: {}", again.stdout)
    })?;
    Ok(vec![
        "without /qubes-ip nothing leaves and the snapshot names it; with it, traffic flows".into(),
    ])
}
