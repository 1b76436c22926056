//! What a person, or a machine, is told.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::differences::{self, Case};
use crate::replay::{Disagreement, Tally};
use crate::script::Script;
use crate::seen::Seen;

/// What must have happened at least once for a run to prove anything.
const NEEDED: &[&str] = &[
    "accepted",
    "new",
    "established up",
    "established down",
    "related up",
    "related down",
    "invalid up",
    "invalid down",
    "fragments accepted",
    "fragments held",
    "dropped",
    "dropped: spoofed-source",
    "dropped: guarded-source",
    "dropped: guarded-destination",
    "dropped: martian-source",
    "dropped: to-client",
    "dropped: unsolicited",
    "dropped: no-rules",
    "dropped: multicast",
    "nat: port kept",
    "nat: port changed",
    "answered up",
    "other protocol accepted",
    "idle flow alive",
    "idle flow over",
];

/// The same for IPv4 alone.
const NEEDED4: &[&str] = &[
    "DNS redirected",
    "cut into fragments",
    "dropped: no-resolver",
    "dropped: source-routed",
    "rejected with ICMP 3/13 up",
    "rejected with ICMP 3/10 up",
    "rejected with ICMP 3/4 up",
    "rejected with ICMP 11/0 up",
    "rejected with ICMP 11/0 down",
];

/// The same for IPv6 alone.
const NEEDED6: &[&str] = &[
    "answered down",
    "extension header accepted",
    "rejected with ICMP 1/1 up",
    "rejected with ICMP 2/0 up",
    "rejected with ICMP 3/0 up",
    "rejected with ICMP 3/0 down",
];

/// Everything that a run has found.
#[derive(Debug, Default)]
pub(crate) struct Total {
    pub(crate) rule_sets: u64,
    pub(crate) packets: u64,
    pub(crate) coverage: Tally,
    pub(crate) differences: Tally,
    pub(crate) seconds: f64,
    pub(crate) failure: Option<String>,
}

impl Total {
    pub(crate) fn add(&mut self, findings: &crate::replay::Findings) {
        self.rule_sets += 1;
        self.packets += findings.packets;
        for (to, from) in [
            (&mut self.coverage, &findings.coverage),
            (&mut self.differences, &findings.differences),
        ] {
            for (name, count) in from {
                *to.entry(name.clone()).or_default() += count;
            }
        }
    }

    /// What never happened and should have.
    pub(crate) fn gaps(&self) -> Vec<String> {
        let both = ["IPv4", "IPv6"];
        let families = both
            .iter()
            .flat_map(|family| NEEDED.iter().map(move |own| (*family, *own)));
        let single = [("IPv4", NEEDED4), ("IPv6", NEEDED6)];
        let single = single
            .into_iter()
            .flat_map(|(family, all)| all.iter().map(move |own| (family, *own)));
        let mut gaps: Vec<String> = families
            .chain(single)
            .map(|(family, own)| format!("{family} {own}"))
            .filter(|name| !self.coverage.contains_key(name))
            .map(|name| format!("never happened: {name}"))
            .collect();
        let listed = differences::ALL.iter().map(|own| own.name);
        let idle = listed.filter(|name| !self.differences.contains_key(*name));
        gaps.extend(idle.map(|name| format!("intended difference that never applied: {name}")));
        gaps
    }

    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(
            out,
            "{} rule sets, {} packets through the kernel and the engine in {:.1} s",
            self.rule_sets, self.packets, self.seconds
        );
        let _ = writeln!(out, "\nThey agree on:");
        for (name, count) in &self.coverage {
            let _ = writeln!(out, "{count:>9}  {name}");
        }
        let _ = writeln!(out, "\nIntended differences:");
        for own in differences::ALL {
            let count = self.differences.get(own.name).copied().unwrap_or(0);
            let _ = writeln!(
                out,
                "{count:>9}  {}: {} ({})",
                own.name, own.what, own.reason
            );
        }
        out
    }

    pub(crate) fn json(&self, seed: u64) -> Value {
        let list: Vec<Value> = differences::ALL
            .iter()
            .map(|own| {
                json!({
                    "name": own.name,
                    "what": own.what,
                    "reason": own.reason,
                    "count": self.differences.get(own.name).copied().unwrap_or(0),
                })
            })
            .collect();
        json!({
            "outcome": if self.failure.is_some() { "failure" } else { "success" },
            "seed": seed,
            "rule_sets": self.rule_sets,
            "packets": self.packets,
            "seconds": self.seconds,
            "coverage": self.coverage,
            "differences": list,
            "failure": self.failure,
        })
    }
}

/// A disagreement with all that is needed to see it.
pub(crate) fn failure(script: &Script, found: &Disagreement, packets: usize) -> String {
    let mut out = String::new();
    let sizes = match script.factor {
        Some(_) => "--rule-sets 0 --timed 1".to_owned(),
        None => format!("--rule-sets 1 --packets-per-set {packets}"),
    };
    let _ = writeln!(
        out,
        "kernel and engine disagree; to see it again: differential --seed {} {sizes}",
        script.seed
    );
    let _ = writeln!(
        out,
        "shortest context, uplink MTU {}, resolvers {:?}:",
        script.world.uplink_mtu, script.world.resolvers
    );
    for (address, tree) in &script.world.trees {
        let used = script.steps.iter().any(|step| step.packet.src == *address);
        if used {
            let _ = writeln!(out, "  rules of {address}: {:?}", tree.keys());
        }
    }
    for (number, step) in script.steps.iter().enumerate().take(found.step + 1) {
        let from = if step.port == 0 {
            "uplink".to_owned()
        } else {
            format!("client {}", step.port)
        };
        if let Some(change) = &step.change {
            let _ = writeln!(out, "  change: {change:?}");
        }
        let _ = writeln!(
            out,
            "  packet {number} at {} ms from {from}, flow {:?}: {:?}",
            step.at, step.flow, step.packet
        );
        let own = |flow: usize| script.flows.get(flow).map_or(0, |flow| flow.sport);
        for bytes in step.packet.bytes(&own) {
            let _ = writeln!(out, "    {}", hex(&bytes));
        }
    }
    let _ = writeln!(out, "{}", found.text);
    out
}

/// What the two did with a packet.
pub(crate) fn describe(case: &Case<'_>) -> String {
    format!(
        "the engine says {:?}\nkernel sends {}\nengine sends {}",
        case.verdict,
        list(case.kernel),
        list(case.engine)
    )
}

/// What left, with every field that is compared.
pub(crate) fn list(seen: &[Seen]) -> String {
    if seen.is_empty() {
        return "nothing".to_owned();
    }
    let lines = seen.iter().map(|own| {
        format!(
            "\n  to {}: {} -> {} protocol {} {:?} checksum {:?} header checksum {} largest {:?}\n    header {}\n    transport {}\n    quote {:?}",
            own.port,
            own.src,
            own.dst,
            own.protocol,
            own.icmp().map(|(kind, code)| format!("ICMP {kind}/{code}")),
            own.sum,
            own.header_sum,
            own.largest,
            hex(&own.header),
            hex(&own.transport),
            own.quote.as_ref().map(|own| (own.sum, own.bytes.len(), hex(&own.bytes))),
        )
    });
    lines.collect()
}

/// Bytes to read, cut where they become dull.
fn hex(bytes: &[u8]) -> String {
    let shown: String = bytes
        .iter()
        .take(96)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    if bytes.len() > 96 {
        format!("{shown}... ({} bytes)", bytes.len())
    } else {
        shown
    }
}
