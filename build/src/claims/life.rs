//! Claims about coming and going: of clients, of the uplink, of the firewall itself.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::{Claim, PROBE, clients, must, ping};
use crate::lab::internet::WEB;
use crate::lab::link::{Job, Progress};
use crate::lab::topology::ClientSpec;
use crate::lab::world::LabWorld;
use crate::observe::snapshot;

/// A client that downloads steadily, to see whether others disturb it.
///
/// At a modest rate: all domains of the lab share one emulated processor, and a transfer at full speed would starve
/// the toolstack, which is not what is to be seen.
struct Flow {
    job: Job,
}

impl Flow {
    /// Starts downloading in a client; a line for each second.
    fn start(world: &LabWorld, client: &str) -> Result<Self> {
        let command = format!("iperf3 -c {WEB} -R -b 2M -t 600 -i 1 --forceflush");
        let mut job = world
            .guest(client)?
            .start(&command, Duration::from_secs(900))?;
        job.wait_output("bits/sec", world.lab.patience(PROBE))?;
        Ok(Self { job })
    }

    /// Must still flow: within a while comes a second in which bytes came.
    fn must_flow(&mut self, world: &LabWorld, when: &str) -> Result<()> {
        // What was written before this moment is no sign of life.
        while let Progress::Wrote(_) = self.job.next(Duration::from_millis(1))? {}
        let deadline = Instant::now() + world.lab.patience(Duration::from_secs(15));
        let mut text = String::new();
        while Instant::now() < deadline {
            match self.job.next(Duration::from_millis(200))? {
                Progress::Wrote(bytes) => text.push_str(&String::from_utf8_lossy(&bytes)),
                Progress::Ended(..) => break,
                Progress::Quiet => {}
            }
            let alive = |line: &str| line.contains("bits/sec") && !line.contains(" 0.00 bits/sec");
            if text.lines().any(alive) {
                return Ok(());
            }
        }
        must(false, || {
            format!("the other client's download stalled {when}: {text}")
        })
    }

    fn stop(self) -> Result<()> {
        self.job.kill()
    }
}

/// A client leaves and returns, another is created, and nobody notices.
pub const HOTPLUG: Claim = Claim {
    name: "hotplug",
    title: "A client is detached and attached again, a third is created; the running download goes on",
    check: hotplug,
};

fn hotplug(world: &mut LabWorld) -> Result<Vec<String>> {
    let mut flow = Flow::start(world, "c1")?;
    let detached = world.detach("c2")?;
    flow.must_flow(world, "after c2 was detached")?;
    let attached = world.attach("c2")?;
    ping(world, "c2")?;
    flow.must_flow(world, "after c2 came back")?;
    let number = u8::try_from(clients(world).len())? + 1;
    let third = ClientSpec::numbered(number);
    let name = third.name.clone();
    world.add_client(third)?;
    ping(world, &name)?;
    flow.must_flow(world, "after a third client came")?;
    flow.stop()?;
    world.remove_client(&name)?;
    Ok(vec![
        format!(
            "c2: xl network-detach {} ms, network-attach {} ms, pings again",
            detached.guest_ms, attached.guest_ms
        ),
        format!("{name}: created, pings; the download of c1 flowed throughout"),
    ])
}

/// Hypervisor resources that clients hold: mappings, and watches.
fn held(world: &LabWorld) -> Result<(u64, u64, u64, usize)> {
    let seen = snapshot(world)?;
    let maps = seen
        .counter("xen.maps")
        .saturating_sub(seen.counter("xen.unmaps"));
    Ok((
        maps,
        seen.counter("store.watches"),
        seen.memory.pool_free_bytes,
        seen.clients.len(),
    ))
}

/// A client that is destroyed leaves nothing behind.
pub const CLIENT_DESTROYED: Claim = Claim {
    name: "client-destroyed",
    title: "A client that is destroyed in the middle of its traffic leaves nothing behind",
    check: client_destroyed,
};

fn client_destroyed(world: &mut LabWorld) -> Result<Vec<String>> {
    let before = held(world)?;
    let number = u8::try_from(clients(world).len())? + 1;
    let spec = ClientSpec::numbered(number);
    let name = spec.name.clone();
    world.add_client(spec)?;
    let flow = Flow::start(world, &name)?;
    let with = held(world)?;
    world.remove_client(&name)?;
    drop(flow);
    std::thread::sleep(world.lab.patience(Duration::from_secs(1)));
    ping(world, "c1")?;
    let after = held(world)?;
    must(with.0 == before.0 + 2 && with.3 == before.3 + 1, || {
        format!("with the client: {with:?}, before: {before:?}")
    })?;
    must(
        (after.0, after.1, after.3) == (before.0, before.1, before.3),
        || format!("(mappings, watches, pool, clients): {before:?} before, {after:?} after"),
    )?;
    let folder = format!("{}/backend", world.firewall()?.xenstore());
    let left = world
        .lab
        .run(&format!("xenstore-ls -f {folder} | grep -c state"), PROBE)?;
    must(left.stdout.trim() == before.3.to_string(), || {
        format!("backend folders left: {}", left.stdout.trim())
    })?;
    Ok(vec![format!(
        "mappings {} → {} → {}, watches {} → {} → {}",
        before.0, with.0, after.0, before.1, with.1, after.1
    )])
}

/// A client reboots: its old vif goes, its new one comes.
pub const CLIENT_REBOOTS: Claim = Claim {
    name: "client-reconnects",
    title: "A client's driver is unbound and bound again; its vif closes and connects anew",
    check: client_reboots,
};

fn client_reboots(world: &mut LabWorld) -> Result<Vec<String>> {
    let before = snapshot(world)?;
    let output = world.run(
        "c2",
        "d=$(basename $(readlink /sys/class/net/eth0/device)); cd /sys/bus/xen/drivers/vif && echo $d > unbind && sleep 1 && echo $d > bind",
        PROBE,
    )?;
    must(output.is_success(), || {
        format!("unbind and bind: {}", output.stdout)
    })?;
    world.wait_for_link("c2")?;
    ping(world, "c2")?;
    let after = snapshot(world)?;
    let maps = after
        .counter("xen.maps")
        .saturating_sub(before.counter("xen.maps"));
    let unmaps = after
        .counter("xen.unmaps")
        .saturating_sub(before.counter("xen.unmaps"));
    must(maps == 2 && unmaps == 2, || {
        format!("{maps} pages mapped, {unmaps} unmapped, not 2 and 2")
    })?;
    Ok(vec![format!(
        "closed and connected again in {} ms of guest time",
        output.guest_ms
    )])
}

/// The uplink goes and comes back.
pub const UPLINK_REATTACHED: Claim = Claim {
    name: "uplink-reattached",
    title: "The uplink is detached (clients are told) and attached again; traffic flows again",
    check: uplink_reattached,
};

fn uplink_reattached(world: &mut LabWorld) -> Result<Vec<String>> {
    let firewall = world.firewall()?.clone();
    let detached = world.lab.detach(&firewall, 0)?;
    must(detached.is_success(), || {
        format!("xl network-detach: {}", detached.stdout)
    })?;
    let without = world.run(
        "c1",
        &format!("lab connect {WEB} 80 --timeout-ms 2000"),
        PROBE,
    )?;
    must(without.value("icmp") == Some("3/0"), || {
        format!("without an uplink: {}", without.stdout.trim())
    })?;
    let vif = world
        .topology()
        .firewall
        .domain()
        .and_then(|domain| domain.vifs.into_iter().next())
        .context("the firewall has no uplink")?;
    let attached = world.lab.attach(&firewall, &vif)?;
    must(attached.is_success(), || {
        format!("xl network-attach: {}", attached.stdout)
    })?;
    let begun = Instant::now();
    let deadline = world.lab.patience(Duration::from_secs(20));
    while let Err(error) = ping(world, "c1") {
        if begun.elapsed() > deadline {
            return Err(error);
        }
    }
    ping(world, "c2")?;
    Ok(vec![format!(
        "without: ICMP 3/0 after {} ms; both clients ping again after it is back",
        without.value("ms").unwrap_or("?")
    )])
}

/// The firewall is replaced under its clients.
pub const FIREWALL_RESTARTED: Claim = Claim {
    name: "firewall-restarted",
    title: "The firewall is destroyed and created anew; its clients are attached again and work",
    check: firewall_restarted,
};

fn firewall_restarted(world: &mut LabWorld) -> Result<Vec<String>> {
    world.stop_firewall()?;
    for client in clients(world) {
        world.detach(&client)?;
    }
    let begun = Instant::now();
    world.start_firewall()?;
    for client in clients(world) {
        world.attach(&client)?;
    }
    for client in clients(world) {
        ping(world, &client)?;
    }
    Ok(vec![format!(
        "all clients ping {:.1} s after the new firewall was created",
        begun.elapsed().as_secs_f64()
    )])
}

/// dom0's shutdown request is followed at once.
pub const SHUTDOWN: Claim = Claim {
    name: "shutdown",
    title: "A shutdown request of dom0 is acknowledged and followed at once",
    check: shutdown,
};

fn shutdown(world: &mut LabWorld) -> Result<Vec<String>> {
    let output = world.lab.xl("shutdown -w fw")?;
    must(output.is_success() && output.guest_ms < 10_000, || {
        format!("xl shutdown -w: {} ms, {}", output.guest_ms, output.stdout)
    })?;
    // xl destroys the domain in the background once it has ended.
    let gone = |world: &LabWorld| anyhow::Ok(!world.lab.xl("domid fw")?.is_success());
    let deadline = Instant::now() + world.lab.patience(Duration::from_secs(20));
    while !gone(world)? && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(100));
    }
    must(gone(world)?, || "the domain is still there".to_owned())?;
    world.forget_firewall()?;
    for client in clients(world) {
        world.detach(&client)?;
    }
    world.start_firewall()?;
    for client in clients(world) {
        world.attach(&client)?;
        ping(world, &client)?;
    }
    Ok(vec![format!("xl shutdown -w took {} ms", output.guest_ms)])
}
