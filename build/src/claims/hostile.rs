//! Claims about misuse: malformed frames cost only themselves, and the test itself notices a broken firewall.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::{Claim, NotSo, PROBE, must, policy, traffic};
use crate::lab::internet::WEB;
use crate::lab::world::LabWorld;
use crate::observe::snapshot;

/// Malformed frames are dropped under a named reason and cost nobody else anything.
pub const FRAMES: Claim = Claim {
    name: "malformed-frames",
    title: "Malformed frames of a client are dropped, each under its reason; everything else works",
    check: frames,
};

/// Ethernet header from a client to the firewall, up to the type.
const TO_FIREWALL: &str = "feffffffffff00163e5e6c06";

fn frames(world: &mut LabWorld) -> Result<Vec<String>> {
    // Source 10.137.0.6 in each; what is wrong with it, and the reason that it must be counted under.
    let cases = [
        (
            "an unknown protocol",
            "88b5",
            "0102030405060708090a0b0c0d0e0f1011121314151617181920",
            "not-ip",
        ),
        ("IPv4 cut short", "0800", "450000280000", "malformed-ipv4"),
        (
            "a wrong IPv4 header checksum",
            "0800",
            "4500001c00010000401100000a890006c63364010fa00fa100080000",
            "bad-header-checksum",
        ),
    ];
    let before = snapshot(world)?;
    for (_, kind, body, _) in cases {
        let frame = format!("{TO_FIREWALL}{kind}{body}");
        world.ask("c1", &format!("lab frame eth0 {frame}"), PROBE)?;
    }
    for client in ["c1", "c2"] {
        let ping = world.run(client, &format!("ping -c 1 -W 5 {WEB}"), PROBE)?;
        must(ping.is_success(), || {
            format!("{client} cannot ping: {}", ping.stdout)
        })?;
    }
    let after = snapshot(world)?;
    let mut seen = Vec::new();
    for (what, _, _, reason) in cases {
        let grown = after.dropped(reason).saturating_sub(before.dropped(reason));
        must(grown >= 1, || {
            let changed: Vec<String> = after
                .drops
                .iter()
                .filter(|counter| counter.value > before.dropped(&counter.name))
                .map(|counter| counter.name.to_string())
                .collect();
            format!("{what}: {reason} did not grow; these did: {changed:?}")
        })?;
        seen.push(format!("{what}: {reason} +{grown}"));
    }
    Ok(seen)
}

/// The firewall is broken on purpose, and the claims notice.
pub const SABOTAGE: Claim = Claim {
    name: "sabotage",
    title: "The firewall is broken on purpose in three ways, and the other claims notice each",
    check: sabotage,
};

fn sabotage(world: &mut LabWorld) -> Result<Vec<String>> {
    let mut seen = Vec::new();

    // 1. The firewall stands still: nothing gets through.
    let domid = world.firewall()?.domid;
    world.lab.xl(&format!("pause {domid}"))?;
    let paused = world.run("c1", &format!("ping -c 1 -W 1 {WEB}"), PROBE)?;
    world.lab.xl(&format!("unpause {domid}"))?;
    must(!paused.is_success(), || {
        "a ping passed a firewall that stood still: the clients do not go through it".to_owned()
    })?;
    seen.push("paused: the ping of claim nat fails".to_owned());

    // 2. Its rules say nothing of what is to be refused: the claim must find the hole.
    world.set_client_rules("c1", "drop", &["action=accept"])?;
    std::thread::sleep(world.lab.patience(Duration::from_millis(300)));
    noticed(policy::refused_and_allowed(world), "reject")?;
    seen.push("rules without the refusal: claim reject fails".to_owned());

    // 3. It sends DNS to a place without a resolver.
    let good = world
        .image_settings()
        .into_iter()
        .filter(|(key, _)| key.ends_with("ary-dns") && !key.contains("netvm"))
        .collect::<Vec<_>>();
    for (key, _) in &good {
        world.write_setting(key, "198.51.100.99")?;
    }
    std::thread::sleep(world.lab.patience(Duration::from_millis(300)));
    let result = (traffic::DNS.check)(world);
    for (key, value) in &good {
        world.write_setting(key, value)?;
    }
    std::thread::sleep(world.lab.patience(Duration::from_millis(300)));
    noticed(result, "dns")?;
    seen.push("DNS sent elsewhere: claim dns fails".to_owned());
    Ok(seen)
}

/// The claim must have failed, and by the product's fault.
fn noticed(result: Result<Vec<String>>, claim: &str) -> Result<()> {
    match result {
        Ok(_) => bail!("the claim {claim} holds on a broken firewall: it cannot fail"),
        Err(error) if error.is::<NotSo>() => Ok(()),
        Err(error) => Err(error).context("the sabotaged claim met another error"),
    }
}
