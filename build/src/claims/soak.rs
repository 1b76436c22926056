//! Clients that come and go a thousand times, and what is left of them.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::{Claim, PROBE, must, ping};
use crate::lab::double::Double;
use crate::lab::topology::FIREWALL;
use crate::lab::world::{LabWorld, quote};
use crate::observe::snapshot;

/// Attach and detach cycles in all.
const CYCLES: u32 = 1000;
/// Of these with `xl`, by a Linux guest.
const BY_XL: u32 = 50;
/// How much the heap may have grown, in bytes: log lines that are kept differ in length. A leak of the smallest block
/// (16 bytes) by each of the clients would be twice as much.
const HEAP_SLACK: u64 = 8_000;
/// Cycles before the counting starts: tables grow to their size once.
const WARM_UP: u32 = 8;
/// How long the quick ones may take in all.
const QUICK: Duration = Duration::from_secs(900);
/// How long those by `xl` may take in all.
const BY_XL_LIMIT: Duration = Duration::from_secs(300);
/// The first address of the clients that come and go quickly.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 137, 0, 210);

/// A thousand clients leave nothing behind.
pub const SOAK: Claim = Claim {
    name: "qubes-soak",
    title: "1,000 clients come and go: memory, grants, event channels, watches and nodes are as before",
    check: soak,
};

/// What is held at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    /// Bytes of the heap in use.
    heap: u64,
    /// Bytes of the packet pool that are free.
    pool: u64,
    grants: u64,
    mappings: u64,
    watches: u64,
    clients: usize,
    /// Event channels as Xen counts them.
    ports: usize,
    /// xenstore nodes that belong to the firewall, as the quota counts them.
    nodes: usize,
}

impl Held {
    fn now(world: &LabWorld) -> Result<Self> {
        let domid = world.firewall()?.domid;
        let seen = snapshot(world)?;
        let open =
            |given: &str, taken: &str| seen.counter(given).saturating_sub(seen.counter(taken));
        let count = |command: &str| -> Result<usize> {
            let said = world.lab.ask(command, PROBE)?;
            said.trim()
                .parse()
                .with_context(|| format!("{command}: {said}"))
        };
        Ok(Self {
            heap: seen.memory.heap_used_bytes,
            pool: seen.memory.pool_free_bytes,
            grants: open("xen.grants", "xen.revokes"),
            mappings: open("xen.maps", "xen.unmaps"),
            watches: seen.counter("store.watches"),
            clients: seen.clients.len(),
            ports: count(&format!("lsevtchn {domid} | wc -l"))?,
            nodes: count(&format!(
                "xenstore-ls -fp / | grep -c '(n{domid},\\|(n{domid})'"
            ))?,
        })
    }

    /// What must be the same before and after. Grants of the uplink's rx ring and pages in flight depend on the moment.
    fn lasting(&self) -> (u64, u64, usize, usize, usize) {
        (
            self.mappings,
            self.watches,
            self.clients,
            self.ports,
            self.nodes,
        )
    }
}

fn soak(world: &mut LabWorld) -> Result<Vec<String>> {
    let domid = world.firewall()?.domid;
    let quick = |world: &LabWorld, count| {
        Double::cycles(&world.lab, domid, count, (ADDRESS, FIREWALL), QUICK)
    };
    world.write_rules(ADDRESS.into(), "drop", &["action=accept"])?;
    quick(world, WARM_UP)?;
    world.detach("c2")?;
    world.attach("c2")?;
    let before = settled(world)?;

    let begun = Instant::now();
    let longest = quick(world, CYCLES - BY_XL)?;
    let quick_time = begun.elapsed();
    let middle = settled(world)?;
    let begun = Instant::now();
    by_xl(world, "c2")?;
    let xl_time = begun.elapsed();
    world.wait_for_link("c2")?;
    let after = settled(world)?;

    must(
        before.lasting() == middle.lasting() && before.lasting() == after.lasting(),
        || format!("before {before:?}\nafter the quick ones {middle:?}\nafter {after:?}"),
    )?;
    must(after.heap <= before.heap + HEAP_SLACK, || {
        format!(
            "heap: {} bytes before, {} then, {} after",
            before.heap, middle.heap, after.heap
        )
    })?;
    must(
        after.pool >= before.pool && after.grants <= before.grants,
        || format!("before {before:?}, after {after:?}"),
    )?;
    for client in ["c1", "c2"] {
        ping(world, client)?;
    }
    Ok(vec![
        format!(
            "{} quick ones in {:.0} s (the longest {longest} ms), {BY_XL} by xl in {:.0} s",
            CYCLES - BY_XL,
            quick_time.as_secs_f64(),
            xl_time.as_secs_f64()
        ),
        line("heap bytes in use", before.heap, after.heap),
        line("pool bytes free", before.pool, after.pool),
        line("grants", before.grants, after.grants),
        line("mapped pages", before.mappings, after.mappings),
        line("event channels", before.ports, after.ports),
        line("watches", before.watches, after.watches),
        line("xenstore nodes", before.nodes, after.nodes),
    ])
}

fn line<T: std::fmt::Display>(what: &str, before: T, after: T) -> String {
    format!("{what}: {before} before, {after} after")
}

/// What is held when nothing is on its way any more.
fn settled(world: &LabWorld) -> Result<Held> {
    let mut last = Held::now(world)?;
    for _ in 0..20 {
        std::thread::sleep(world.lab.patience(Duration::from_millis(500)));
        let now = Held::now(world)?;
        if now == last {
            break;
        }
        last = now;
    }
    Ok(last)
}

/// Detaches and attaches a guest's interface again and again, without waiting for the guest.
fn by_xl(world: &LabWorld, name: &str) -> Result<()> {
    let topology = world.topology();
    let client = topology.client(name).context("no such client")?;
    let words: Vec<String> = client
        .vif(&topology.firewall)
        .words()
        .iter()
        .map(|word| quote(word))
        .collect();
    let output = world.lab.run(
        &format!(
            "number=$(xl network-list {name} | tail -n 1 | cut -d ' ' -f 1)
            n=0; while [ $n -lt {BY_XL} ]; do n=$((n+1))
            xl network-detach {name} $number && xl network-attach {name} {} || {{ echo \"cycle $n\"; exit 1; }}
            done",
            words.join(" ")
        ),
        BY_XL_LIMIT,
    )?;
    must(output.is_success(), || output.stdout.clone())
}
