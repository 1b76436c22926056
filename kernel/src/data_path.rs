//! Frames between the rings: one iteration of the data path.
//!
//! ```text
//! client tx ring -> copy batch -> engine -> uplink tx ring        payload: one grant copy, then the very page is granted
//! uplink rx ring ->               engine -> copy batch -> client rx ring      payload: one grant copy
//! ```
//!
//! The engine sees headers in place and gives a verdict; nothing else here looks into a frame except for
//! [`crate::egress`], which fits it to what the receiver can take. All copies of an iteration, of all clients and
//! both directions, are one hypercall; all notifications are another.
//!
//! # Fairness and bounds
//!
//! Clients are served in turn, each for at most 32 frames or 64 KiB an iteration (deficit round robin in
//! `netback`), the uplink for at most [`UPLINK_BURSTS`] bursts. What the uplink's ring cannot take stays in the clients'
//! rings. Everything is allocated when a device connects.
//!
//! A peer that breaks its ring becomes a [`Fault`], which costs that peer alone.

use alloc::boxed::Box;
use alloc::vec::Vec;

use firewall::{ClientId, Iface, Verdict, Work};
use heapless::Vec as Bounded;
use netback::{Batch, Budget, Vif, VifTag};
use netfront::{Quarantine, Uplink};
use xen::packet::HEADER_LEN;
use xen::{Frame, Hypervisor, PortNumber, Time};

use crate::egress;
use crate::filter::Filter;

/// Frames that the engine sees at once.
pub const BURST: usize = 32;
/// Bursts taken from the uplink in one iteration.
pub const UPLINK_BURSTS: usize = 2;
/// Copy operations in the batch.
pub const BATCH_OPS: usize = 512;
/// Copy operations that must be free before a burst is taken from the uplink.
const BURST_ROOM: usize = 64;
/// Iterations without a frame after which a client that went quiet is asked to notify us again.
const QUIET_ITERATIONS: u8 = 16;

/// Counts of the main loop. Plain increments, kept always.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoopCounters {
    /// Iterations that moved at least one frame.
    pub busy_iterations: u64,
    /// Iterations that found nothing.
    pub idle_iterations: u64,
    /// Frames taken from clients.
    pub from_clients: u64,
    /// Frames taken from the uplink.
    pub from_uplink: u64,
    /// Frames handed to the uplink.
    pub to_uplink: u64,
    /// Frames handed to clients, sent or queued.
    pub to_clients: u64,
    /// Packets that the frames handed on are on a wire: a GSO frame counts as its segments.
    pub packets: u64,
    /// Frames that the receiver's driver refused (its counters say why).
    pub refused: u64,
    /// Frames for a receiver that is not connected.
    pub unreachable: u64,
    /// Frames made by the engine for which no page was free.
    pub no_page: u64,
}

impl LoopCounters {
    /// Frames taken from all peers.
    #[must_use]
    pub const fn taken(&self) -> u64 {
        self.from_clients.wrapping_add(self.from_uplink)
    }
}

/// A connected client.
struct Client {
    vif: Vif,
    /// Its ring may hold frames: it notified us, or had frames when last looked at.
    ready: bool,
    /// Iterations without a frame since.
    quiet: u8,
    /// Reported as broken; nothing is done for it until it is disconnected.
    faulted: bool,
}

/// A peer whose rings can no longer be served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// A client, with what it did.
    Client(ClientId, netback::PeerError),
    /// The uplink, with what it did.
    Uplink(netfront::DeviceBroken),
}

/// The drivers, the engine and the buffers between them.
pub struct DataPath {
    /// What decides frames; the control plane configures it.
    pub filter: Filter,
    clients: Vec<Option<Client>>,
    uplink: Option<Uplink>,
    uplink_faulted: bool,
    batch: Batch,
    /// Containers for one burst, used again and again.
    frames: Box<[Frame]>,
    /// Pages that a former uplink still holds.
    quarantine: Quarantine,
    /// Which client is served first.
    turn: usize,
    faults: Bounded<Fault, 16>,
    counters: LoopCounters,
}

impl DataPath {
    /// A data path without devices.
    #[must_use]
    pub fn new(filter: Filter) -> Self {
        let mut frames = Vec::with_capacity(BURST);
        frames.resize_with(BURST, Frame::new);
        Self {
            filter,
            clients: Vec::new(),
            uplink: None,
            uplink_faulted: false,
            batch: Batch::new(BATCH_OPS),
            frames: frames.into_boxed_slice(),
            quarantine: Quarantine::new(),
            turn: 0,
            faults: Bounded::new(),
            counters: LoopCounters::default(),
        }
    }

    /// Takes over a connected vif under a number that is free.
    pub fn connect_client(&mut self, id: ClientId, vif: Vif) {
        let index = usize::from(id.0);
        if self.clients.len() <= index {
            self.clients.resize_with(index.saturating_add(1), || None);
        }
        if let Some(slot) = self.clients.get_mut(index) {
            debug_assert!(slot.is_none(), "client number in use");
            *slot = Some(Client {
                vif,
                ready: true,
                quiet: 0,
                faulted: false,
            });
        }
    }

    /// Disconnects a client's vif. An unknown number is ignored.
    pub fn disconnect_client<H: Hypervisor>(&mut self, hv: &mut H, id: ClientId) {
        let slot = self.clients.get_mut(usize::from(id.0));
        if let Some(client) = slot.and_then(Option::take) {
            client.vif.disconnect(hv);
        }
    }

    /// Takes over the connected uplink.
    pub fn connect_uplink<H: Hypervisor>(&mut self, hv: &mut H, uplink: Uplink) {
        self.disconnect_uplink(hv);
        self.uplink = Some(uplink);
        self.uplink_faulted = false;
    }

    /// Disconnects the uplink, if there is one. Pages that the netvm still holds are kept aside.
    pub fn disconnect_uplink<H: Hypervisor>(&mut self, hv: &mut H) {
        if let Some(uplink) = self.uplink.take() {
            uplink.disconnect(hv, &mut self.quarantine);
        }
    }

    /// The uplink's driver.
    #[must_use]
    pub const fn uplink(&self) -> Option<&Uplink> {
        self.uplink.as_ref()
    }

    /// A client's driver.
    #[must_use]
    pub fn vif(&self, id: ClientId) -> Option<&Vif> {
        let slot = self.clients.get(usize::from(id.0))?;
        slot.as_ref().map(|client| &client.vif)
    }

    /// The drivers of all connected clients.
    pub fn vifs(&self) -> impl Iterator<Item = (ClientId, &Vif)> {
        self.clients.iter().zip(0..).filter_map(|(slot, number)| {
            let client = slot.as_ref()?;
            Some((ClientId(number), &client.vif))
        })
    }

    /// The ports of all devices.
    pub fn ports(&self) -> impl Iterator<Item = PortNumber> + '_ {
        let uplink = self.uplink.iter().map(Uplink::port);
        uplink.chain(self.connected().map(|client| client.vif.port()))
    }

    /// What the loop did so far.
    #[must_use]
    pub const fn counters(&self) -> &LoopCounters {
        &self.counters
    }

    /// Pages that a former uplink still holds.
    #[must_use]
    pub fn quarantined_pages(&self) -> usize {
        self.quarantine.len()
    }

    /// Takes the next peer that must be given up.
    pub fn take_fault(&mut self) -> Option<Fault> {
        self.faults.pop()
    }

    fn connected(&self) -> impl Iterator<Item = &Client> {
        self.clients.iter().filter_map(Option::as_ref)
    }

    /// Clears the pending bits of all devices' ports and notes who has work.
    pub fn take_events<H: Hypervisor>(&mut self, hv: &mut H) {
        if let Some(uplink) = &self.uplink {
            // The uplink's rings are looked at in every iteration anyway.
            let _ = hv.take_pending(uplink.port());
        }
        for client in self.clients.iter_mut().filter_map(Option::as_mut) {
            // A broken client's bit stays set, so that it cannot wake us again.
            if !client.faulted && hv.take_pending(client.vif.port()) {
                client.ready = true;
                client.quiet = 0;
            }
        }
    }

    /// Moves frames once. Returns whether there was anything to do; if not, [`DataPath::arm`] and sleep.
    pub fn iterate<H: Hypervisor>(&mut self, hv: &mut H) -> bool {
        let now = hv.now();
        let taken = self.take_from_uplink(hv, now) + self.take_from_clients(hv);
        let copying = !self.batch.is_empty();
        if copying {
            let clients = &mut self.clients;
            self.batch.copy(hv, |failure| {
                if let Some(client) = client_of_tag(clients, failure.tag()) {
                    client.vif.amend(failure);
                }
            });
            self.pass_on_clients_frames(hv, now);
        }
        self.send_generated(hv);
        self.finish(hv);
        if taken > 0 || copying {
            self.counters.busy_iterations = self.counters.busy_iterations.wrapping_add(1);
            return true;
        }
        self.counters.idle_iterations = self.counters.idle_iterations.wrapping_add(1);
        !self.batch.is_empty()
    }

    /// Uplink to clients: verdicts, then copy operations. Returns how many frames were taken.
    fn take_from_uplink<H: Hypervisor>(&mut self, hv: &mut H, now: Time) -> u32 {
        let mut taken = 0u32;
        for _ in 0..UPLINK_BURSTS {
            if self.uplink_faulted || self.batch.room() < BURST_ROOM {
                break;
            }
            let Some(uplink) = &mut self.uplink else {
                break;
            };
            let mut count = 0usize;
            let mut result = uplink.reclaim(hv).map(|_| false);
            if result.is_ok() {
                for frame in &mut self.frames {
                    result = uplink.receive(hv, frame);
                    if result != Ok(true) {
                        break;
                    }
                    count = count.wrapping_add(1);
                }
            }
            if let Err(error) = result {
                self.uplink_faulted = true;
                let _ = self.faults.push(Fault::Uplink(error));
            }
            if count == 0 {
                break;
            }
            self.decide(hv, count, now, |_| Iface::Uplink);
            taken = taken.wrapping_add(u32::try_from(count).unwrap_or(0));
        }
        self.counters.from_uplink = self.counters.from_uplink.wrapping_add(taken.into());
        taken
    }

    /// Queued frames to clients, and clients' frames into the batch. Returns how many were taken.
    fn take_from_clients<H: Hypervisor>(&mut self, hv: &mut H) -> u32 {
        let slots = match &self.uplink {
            // Without an uplink frames are still taken: clients are to be told that it is absent.
            None => usize::MAX,
            Some(uplink) => uplink.tx_free_slots(),
        };
        self.batch.limit_uplink_slots(slots);
        let count = self.clients.len();
        if count == 0 {
            return 0;
        }
        self.turn = self.turn.wrapping_add(1) % count;
        let mut taken = 0u32;
        let (late, early) = self.clients.split_at_mut(self.turn);
        for (offset, slot) in early.iter_mut().chain(late).enumerate() {
            let Some(client) = slot else { continue };
            if client.faulted || !(client.ready || client.vif.queued_frames() > 0) {
                continue;
            }
            let result = client
                .vif
                .flush(hv, &mut self.batch)
                .and_then(|()| client.vif.receive(hv, &mut self.batch, Budget::default()))
                .and_then(|frames| client.keep_or_arm(frames));
            match result {
                Ok(frames) => taken = taken.wrapping_add(frames),
                Err(error) => {
                    client.faulted = true;
                    let index = self.turn.wrapping_add(offset) % count;
                    let id = ClientId(u16::try_from(index).unwrap_or(u16::MAX));
                    let _ = self.faults.push(Fault::Client(id, error));
                }
            }
        }
        self.counters.from_clients = self.counters.from_clients.wrapping_add(taken.into());
        taken
    }

    /// Clients' frames that the batch brought: verdicts, and out to the uplink or back.
    fn pass_on_clients_frames<H: Hypervisor>(&mut self, hv: &mut H, now: Time) {
        let mut from = [ClientId(0); BURST];
        loop {
            let mut count = 0usize;
            for (frame, from) in self.frames.iter_mut().zip(&mut from) {
                let Some(tag) = self.batch.next_frame(hv, frame) else {
                    break;
                };
                *from = client_id(tag);
                count = count.wrapping_add(1);
            }
            if count == 0 {
                return;
            }
            let source = |index: usize| {
                from.get(index)
                    .map_or(Iface::Uplink, |id| Iface::Client(*id))
            };
            self.decide(hv, count, now, source);
        }
    }

    /// Asks the engine about the first `count` containers and sends them where it says.
    fn decide<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        count: usize,
        now: Time,
        source: impl Fn(usize) -> Iface,
    ) {
        let mut work: Bounded<Work<'_>, BURST> = Bounded::new();
        for (index, frame) in self.frames.iter_mut().take(count).enumerate() {
            let ingress = source(index);
            let len = u32::try_from(frame.len()).unwrap_or(u32::MAX);
            let (checksum, gso) = (egress::checksum_in(frame), egress::gso_in(frame));
            let head = frame.header_for_edit(HEADER_LEN);
            let item = Work {
                ingress,
                frame: firewall::Frame {
                    head,
                    len,
                    checksum,
                    gso,
                },
                verdict: Verdict::Local,
            };
            // There are as many places as containers.
            let _ = work.push(item);
        }
        self.filter
            .process(&mut work, firewall::Time::from_nanos(now.0));
        let mut verdicts: Bounded<_, BURST> = Bounded::new();
        for item in &work {
            let _ = verdicts.push((item.verdict, item.frame.checksum, item.frame.gso));
        }
        drop(work);
        for (index, (verdict, checksum, gso)) in verdicts.into_iter().enumerate() {
            let Some(frame) = self.frames.get_mut(index) else {
                break;
            };
            match verdict {
                Verdict::Forward { egress } => {
                    egress::state_out(frame, checksum, gso);
                    let mut out = Exits {
                        clients: &mut self.clients,
                        uplink: self.uplink.as_mut(),
                        batch: &mut self.batch,
                        counters: &mut self.counters,
                    };
                    out.send(hv, egress, frame);
                }
                Verdict::Drop(_)
                | Verdict::Reject(_)
                | Verdict::Local
                | Verdict::Deliver
                | Verdict::Held
                | Verdict::Replaced { .. } => frame.release(hv),
            }
        }
    }

    /// Sends the frames that the engine made itself.
    fn send_generated<H: Hypervisor>(&mut self, hv: &mut H) {
        let Some(frame) = self.frames.first_mut() else {
            return;
        };
        while let Some(made) = self.filter.next_generated() {
            if !frame.fill(hv, made.bytes) {
                self.counters.no_page = self.counters.no_page.wrapping_add(1);
                continue;
            }
            let mut out = Exits {
                clients: &mut self.clients,
                uplink: self.uplink.as_mut(),
                batch: &mut self.batch,
                counters: &mut self.counters,
            };
            out.send(hv, made.egress, frame);
        }
    }

    /// Buffers back to the uplink, everything written shown to the peers, and all of them notified at once.
    fn finish<H: Hypervisor>(&mut self, hv: &mut H) {
        let mut ports: Bounded<PortNumber, 128> = Bounded::new();
        if let Some(uplink) = &mut self.uplink {
            self.batch.recycle(|page| uplink.recycle(hv, page));
            uplink.refill(hv);
            if let Some(port) = uplink.publish() {
                let _ = ports.push(port);
            }
        }
        for client in self.clients.iter_mut().filter_map(Option::as_mut) {
            if let Some(port) = client.vif.publish(&self.batch)
                && ports.push(port).is_err()
            {
                hv.notify(&ports);
                ports.clear();
                let _ = ports.push(port);
            }
        }
        if !ports.is_empty() {
            hv.notify(&ports);
        }
    }

    /// Asks all peers for notifications before sleeping. Returns whether there is work already: do not sleep then.
    pub fn arm(&mut self) -> bool {
        let mut work = !self.batch.is_empty();
        if let Some(uplink) = &mut self.uplink
            && !self.uplink_faulted
        {
            // A broken ring is work, too: the next iteration reports it.
            work |= uplink.arm().unwrap_or(true);
        }
        for client in self.clients.iter_mut().filter_map(Option::as_mut) {
            if client.faulted || !client.ready {
                continue;
            }
            let more = client.vif.arm().unwrap_or(true);
            client.ready = more;
            // Frames that wait for slots or pages of the uplink's are no reason to stay awake: its notification is, and this
            // client stays ready for that.
            work |= more && !client.vif.is_held_back();
        }
        work
    }

    /// When [`DataPath::iterate`] must be called even if nobody notifies us.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        let vifs = self.connected().filter_map(|client| client.vif.deadline());
        let uplink = self.uplink.as_ref().and_then(Uplink::deadline);
        vifs.chain(uplink).min()
    }

    /// Gives pages back to the pool that a former uplink has let go of meanwhile.
    pub fn sweep_quarantine<H: Hypervisor>(&mut self, hv: &mut H) {
        if !self.quarantine.is_empty() {
            self.quarantine.sweep(hv);
        }
    }
}

impl Client {
    /// Notes whether the vif had frames, and asks a quiet one for notifications even while others are busy.
    fn keep_or_arm(&mut self, frames: u32) -> Result<u32, netback::PeerError> {
        if frames > 0 {
            self.quiet = 0;
            return Ok(frames);
        }
        self.quiet = self.quiet.saturating_add(1);
        if self.quiet >= QUIET_ITERATIONS {
            self.quiet = 0;
            self.ready = self.vif.arm()?;
        }
        Ok(0)
    }
}

/// The tag of a connection: the client's number, and a count that makes it a new name each time.
#[must_use]
pub fn tag(id: ClientId, connection: u16) -> VifTag {
    VifTag(u32::from(id.0) | u32::from(connection) << 16)
}

/// The client's number in a tag.
fn client_id(tag: VifTag) -> ClientId {
    let [low, high, _, _] = tag.0.to_le_bytes();
    ClientId(u16::from_le_bytes([low, high]))
}

fn client_of_tag(clients: &mut [Option<Client>], tag: VifTag) -> Option<&mut Client> {
    let client = clients.get_mut(usize::from(client_id(tag).0))?.as_mut()?;
    (client.vif.tag() == tag).then_some(client)
}

/// How many packets a frame is on a wire.
fn wire_packets(frame: &Frame) -> u64 {
    /// Ethernet, IPv4 and TCP without options.
    const HEADERS: usize = 54;
    let Some(gso) = frame.gso else { return 1 };
    let payload = frame.len().saturating_sub(HEADERS);
    u64::try_from(payload.div_ceil(usize::from(gso.size.get()))).unwrap_or(1)
}

/// Where frames leave, borrowed apart from the engine and the containers.
struct Exits<'a> {
    clients: &'a mut [Option<Client>],
    uplink: Option<&'a mut Uplink>,
    batch: &'a mut Batch,
    counters: &'a mut LoopCounters,
}

impl Exits<'_> {
    /// Sends a frame; the container is empty afterwards.
    fn send<H: Hypervisor>(&mut self, hv: &mut H, to: Iface, frame: &mut Frame) {
        let packets = wire_packets(frame);
        let sent = match to {
            Iface::Uplink => self.uplink.as_mut().map(|uplink| {
                let sent = egress::to_uplink(hv, uplink, frame);
                if sent {
                    self.counters.to_uplink = self.counters.to_uplink.wrapping_add(1);
                }
                sent
            }),
            Iface::Client(id) => {
                let slot = self.clients.get_mut(usize::from(id.0));
                slot.and_then(Option::as_mut).map(|client| {
                    let sent = egress::to_client(hv, &mut client.vif, self.batch, frame);
                    if sent {
                        self.counters.to_clients = self.counters.to_clients.wrapping_add(1);
                    }
                    sent
                })
            }
        };
        match sent {
            Some(true) => self.counters.packets = self.counters.packets.wrapping_add(packets),
            Some(false) => self.counters.refused = self.counters.refused.wrapping_add(1),
            None => self.counters.unreachable = self.counters.unreachable.wrapping_add(1),
        }
        frame.release(hv);
    }
}
