//! What the drivers cost in instructions per packet.
//!
//! Drives small frames through `netback` and `netfront` back to back, in bursts of 32, one direction at a time: from
//! ring to ring, with completions, reposted buffers, the loop itself and an engine's edit of the header.
//!
//! All that is measured happens below the two functions named `measured_*`; the fake hypervisor's methods are never
//! inlined and not counted. `tests/examples/driver_cost.sh` runs this under callgrind and prints the sums.
//!
//! Usage: `driver_cost up|down [frames]`
#![expect(
    clippy::unwrap_used,
    reason = "a measurement stops when something is wrong"
)]

use netback::{Batch, Budget, Vif, VifTag};
use netfront::{Quarantine, Uplink, UplinkParameters};
use tests::client::{Client, Piece};
use tests::frames::pattern;
use tests::netvm::Netvm;
use tests::router::{FIRST_CLIENT, LINUX, NETVM, ROUTER};
use xen::fake::{FakeHypervisor, FakeMachine};
use xen::{Frame, Hypervisor, PortNumber};

/// Frames in a burst.
const BURST: usize = 32;

struct Drivers {
    hv: FakeHypervisor,
    uplink: Uplink,
    vif: Vif,
    batch: Batch,
    frame: Frame,
    ports: Vec<PortNumber>,
}

/// One iteration of the main loop for client to uplink, without an engine.
#[inline(never)]
fn measured_up(drivers: &mut Drivers) -> usize {
    let Drivers {
        hv,
        uplink,
        vif,
        batch,
        frame,
        ports,
    } = drivers;
    uplink.reclaim(hv).unwrap();
    batch.limit_uplink_slots(uplink.tx_free_slots());
    vif.receive(hv, batch, Budget::default()).unwrap();
    batch.copy(hv, |_| {});
    let mut frames = 0;
    while batch.next_frame(hv, frame).is_some() {
        // What an engine does at least: it edits the header.
        frame.header_mut(34);
        uplink.send(hv, frame).unwrap();
        frames += 1;
    }
    ports.clear();
    ports.extend(uplink.publish());
    ports.extend(vif.publish(batch));
    hv.notify(ports);
    frames
}

/// One iteration of the main loop for uplink to client, without an engine.
#[inline(never)]
fn measured_down(drivers: &mut Drivers) -> usize {
    let Drivers {
        hv,
        uplink,
        vif,
        batch,
        frame,
        ports,
    } = drivers;
    let mut frames = 0;
    while uplink.receive(hv, frame).unwrap() {
        frame.header_mut(34);
        vif.send(hv, batch, frame).unwrap();
        frames += 1;
    }
    batch.copy(hv, |_| {});
    batch.recycle(|page| uplink.recycle(hv, page));
    uplink.refill(hv);
    ports.clear();
    ports.extend(uplink.publish());
    ports.extend(vif.publish(batch));
    hv.notify(ports);
    frames
}

fn up(drivers: &mut Drivers, client: &mut Client, netvm: &mut Netvm, frames: usize) {
    let piece = [Piece {
        offset: 0,
        bytes: pattern(64, 1),
    }];
    let mut done = 0;
    while done < frames {
        for _ in 0..BURST {
            client.put_frame(&piece, 0, None);
        }
        client.publish();
        done += measured_up(drivers);
        client.take_statuses();
        netvm.take();
        netvm.answer_all();
    }
}

fn down(drivers: &mut Drivers, client: &mut Client, netvm: &mut Netvm, frames: usize) {
    let bytes = pattern(64, 1);
    client.post(BURST);
    let mut done = 0;
    while done < frames {
        for _ in 0..BURST {
            netvm.put_slot(&bytes, 0, 0);
        }
        netvm.publish();
        done += measured_down(drivers);
        client.receive();
        client.post(BURST);
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let direction = arguments.next().unwrap_or_else(|| "up".into());
    let frames = arguments
        .next()
        .map_or(1_000_000, |count| count.parse().unwrap());
    let machine = FakeMachine::new();
    let mut hv = machine.domain(ROUTER);
    let parameters = UplinkParameters {
        backend: NETVM,
        features: LINUX,
        rx_buffers: 256,
    };
    let uplink = Uplink::connect(&mut hv, &parameters).unwrap();
    let mut netvm = Netvm::connect(&machine, NETVM, ROUTER, uplink.keys());
    // The peers' share is not measured: no need to read what they get.
    netvm.reads = false;
    let mut client = Client::new(&machine, FIRST_CLIENT, ROUTER);
    let vif = Vif::connect(&mut hv, &client.parameters(VifTag(0))).unwrap();
    let mut drivers = Drivers {
        hv,
        uplink,
        vif,
        batch: Batch::new(512),
        frame: Frame::new(),
        ports: Vec::with_capacity(2),
    };
    let _ = drivers.uplink.publish();
    match direction.as_str() {
        "down" => down(&mut drivers, &mut client, &mut netvm, frames),
        _ => up(&mut drivers, &mut client, &mut netvm, frames),
    }
    let counters = drivers.hv.counters();
    println!(
        "{direction}: {} frames received from the client, {} sent to it; {} copy batches, {} hypercalls",
        drivers.vif.counters().received_frames,
        drivers.vif.counters().sent_frames,
        counters.copy_batches,
        counters.hypercalls,
    );
    drivers.vif.disconnect(&mut drivers.hv);
    netvm.close();
    drivers
        .uplink
        .disconnect(&mut drivers.hv, &mut Quarantine::new());
}
