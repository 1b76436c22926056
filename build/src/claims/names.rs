//! Claims about names in rules, with the lab's resolvers, one of whose answers is too long for UDP.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{Claim, PROBE, must};
use crate::lab::internet::{BLOCKED, MANY, MANY_NAME, VIRTUAL_DNS, WEB, WEB_NAME};
use crate::lab::world::LabWorld;
use crate::observe::snapshot;

/// The rule that every new qube has.
const ACCEPT_ALL: &str = "action=accept";

/// A name that nobody has.
const NOBODY: &str = "nobody.lab";

/// A rule by name lets a client reach the server of that name and no other.
pub const NAMES: Claim = Claim {
    name: "names",
    title: "A rule by name lets HTTP to the server of that name through and to no other; states of names are shown",
    check: names,
};

fn names(world: &mut LabWorld) -> Result<Vec<String>> {
    let web = format!("action=accept dsthost={WEB_NAME} proto=tcp dstports=80-80");
    let many = format!("action=accept dsthost={MANY_NAME} proto=udp");
    let nobody = format!("action=accept dsthost={NOBODY}");
    let rules = [&web, &many, &nobody, "action=accept specialtarget=dns"];
    world.set_client_rules("c1", "drop", &rules)?;
    let result = by_name(world);
    world.set_client_rules("c1", "drop", &[ACCEPT_ALL])?;
    result
}

fn by_name(world: &LabWorld) -> Result<Vec<String>> {
    let c1: IpAddr = world
        .topology()
        .client("c1")
        .context("c1 is gone")?
        .ip
        .into();
    // Each client's answer passes while its rules have names.
    let resolve = format!("lab resolve {WEB_NAME} --server {}", VIRTUAL_DNS[0]);
    let answer = world.run("c1", &resolve, PROBE)?;
    must(answer.stdout.contains(&WEB.to_string()), || {
        format!("c1: `{resolve}` says {:?}", answer.stdout)
    })?;
    // Lookups take a few packets; the one over TCP some more.
    let mut known = Vec::new();
    for _ in 0..20 {
        let shown = snapshot(world)?;
        let rules = shown.rules.into_iter().find(|rules| rules.address == c1);
        known = rules.map_or_else(Vec::new, |rules| rules.names);
        if known.len() == 3 && known.iter().all(|name| name.state != "pending") {
            break;
        }
        std::thread::sleep(world.lab.patience(Duration::from_millis(100)));
    }
    let found = |wanted: &str| known.iter().find(|name| name.name == wanted);
    let is = |wanted: &str, state: &str, count: usize| {
        found(wanted).is_some_and(|name| name.state == state && name.addresses.len() == count)
    };
    must(
        is(WEB_NAME, "resolved", 1)
            && is(MANY_NAME, "resolved", usize::try_from(MANY)?)
            && is(NOBODY, "unresolved: no such name", 0),
        || format!("names shown: {known:?}"),
    )?;
    let fetch = |address| format!("wget -q -O - http://{address}/hello.txt");
    let fetched = world.run("c1", &fetch(WEB), PROBE)?;
    must(fetched.is_success(), || {
        format!("c1 cannot fetch from {WEB_NAME}: {fetched:?}")
    })?;
    let refused = world.run("c1", &format!("lab connect {BLOCKED} 80"), PROBE)?;
    must(refused.value("icmp") == Some("3/13"), || {
        format!("c1 to {BLOCKED}: {}", refused.stdout.trim())
    })?;
    let other = world.run("c2", &format!("lab connect {BLOCKED} 80"), PROBE)?;
    must(other.value("result") == Some("connected"), || {
        format!("c2 to {BLOCKED}: {}", other.stdout.trim())
    })?;
    Ok(vec![
        format!(
            "c1 with a rule for {WEB_NAME}: HTTP to {WEB} works, to {BLOCKED} refused with ICMP 3/13"
        ),
        format!(
            "{MANY_NAME}: {MANY} addresses, by an answer over TCP; {NOBODY}: no such name, shown"
        ),
    ])
}
