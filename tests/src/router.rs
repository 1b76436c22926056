//! `netback` and `netfront` joined by the main loop that the kernel uses.
//!
//! [`Router::iterate`] is the worked example of how the drivers are driven; the verdict is a closure.

use netback::{Batch, Budget, PeerError, Vif, VifTag};
use netfront::{BackendFeatures, DeviceBroken, Quarantine, Uplink, UplinkParameters};
use xen::fake::{FakeHypervisor, FakeMachine, Resources};
use xen::{DomId, Frame, Hypervisor, PortNumber};

use crate::client::Client;
use crate::netvm::Netvm;

/// The router's domain.
pub const ROUTER: DomId = DomId(7);
/// The netvm's domain.
pub const NETVM: DomId = DomId(2);
/// The first client's domain; further ones follow.
pub const FIRST_CLIENT: DomId = DomId(10);

/// All features that a Linux backend has.
pub const LINUX: BackendFeatures = BackendFeatures {
    rx_copy: true,
    sg: true,
    gso_tcpv4: true,
    gso_tcpv6: true,
    ipv6_csum_offload: true,
};

/// Where a frame comes from or goes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// The netvm.
    Uplink,
    /// The client with this index.
    Client(usize),
}

/// The drivers of one uplink and some clients.
#[derive(Debug)]
pub struct Router {
    /// The router's view of the machine.
    pub hv: FakeHypervisor,
    /// The uplink.
    pub uplink: Option<Uplink>,
    /// The clients' vifs.
    pub vifs: Vec<Option<Vif>>,
    /// The copies of an iteration.
    pub batch: Batch,
    /// Pages that a former netvm holds.
    pub quarantine: Quarantine,
    /// What broke, in order.
    pub client_errors: Vec<(usize, PeerError)>,
    /// Why the uplink broke.
    pub uplink_error: Option<DeviceBroken>,
    /// Frames that a driver refused.
    pub refused: usize,
    frame: Frame,
}

impl Router {
    /// A router without devices.
    #[must_use]
    pub fn new(machine: &FakeMachine) -> Self {
        Self {
            hv: machine.domain(ROUTER),
            uplink: None,
            vifs: Vec::new(),
            batch: Batch::new(512),
            quarantine: Quarantine::new(),
            client_errors: Vec::new(),
            uplink_error: None,
            refused: 0,
            frame: Frame::new(),
        }
    }

    /// Connects the uplink to a new netvm.
    pub fn connect_uplink(&mut self, machine: &FakeMachine, features: BackendFeatures) -> Netvm {
        self.connect_uplink_to(machine, NETVM, features)
    }

    /// Connects the uplink to a new netvm in domain `backend`.
    pub fn connect_uplink_to(
        &mut self,
        machine: &FakeMachine,
        backend: DomId,
        features: BackendFeatures,
    ) -> Netvm {
        let parameters = UplinkParameters {
            backend,
            features,
            rx_buffers: 128,
        };
        let mut uplink = Uplink::connect(&mut self.hv, &parameters).unwrap();
        let netvm = Netvm::connect(machine, backend, ROUTER, uplink.keys());
        let _ = uplink.publish();
        self.uplink = Some(uplink);
        netvm
    }

    /// Connects a client's vif.
    pub fn connect_client(&mut self, client: &Client) {
        let index = u32::try_from(self.vifs.len()).unwrap();
        let vif = Vif::connect(&mut self.hv, &client.parameters(VifTag(index))).unwrap();
        self.vifs.push(Some(vif));
    }

    /// One iteration of the main loop. `verdict` may edit the frame and says where it goes.
    ///
    /// Returns whether anything was done; if not, nothing is left to do until a peer does something.
    pub fn iterate(&mut self, mut verdict: impl FnMut(Side, &mut Frame) -> Option<Side>) -> bool {
        let mut busy = self.take_from_uplink(&mut verdict);
        let slots = self
            .uplink
            .as_ref()
            .map_or(usize::MAX, Uplink::tx_free_slots);
        self.batch.limit_uplink_slots(slots);
        busy |= self.take_from_clients();
        busy |= !self.batch.is_empty();
        let vifs = &mut self.vifs;
        self.batch.copy(&mut self.hv, |failure| {
            if let Some(vif) = find(vifs, failure.tag()) {
                vif.amend(failure);
            }
        });
        let mut frame = std::mem::take(&mut self.frame);
        while let Some(tag) = self.batch.next_frame(&mut self.hv, &mut frame) {
            let from = Side::Client(usize::try_from(tag.0).unwrap());
            let to = verdict(from, &mut frame);
            self.send(&mut frame, to);
        }
        self.frame = frame;
        self.finish();
        busy || !self.batch.is_empty()
    }

    fn take_from_uplink(
        &mut self,
        verdict: &mut impl FnMut(Side, &mut Frame) -> Option<Side>,
    ) -> bool {
        let mut frame = std::mem::take(&mut self.frame);
        let mut taken = false;
        while let Some(uplink) = &mut self.uplink
            && self.batch.room() >= 64
        {
            let result = uplink
                .reclaim(&mut self.hv)
                .and_then(|_| uplink.receive(&mut self.hv, &mut frame));
            match result {
                Ok(true) => {
                    taken = true;
                    let to = verdict(Side::Uplink, &mut frame);
                    self.send(&mut frame, to);
                }
                Ok(false) => break,
                Err(error) => {
                    self.uplink_error = Some(error);
                    self.disconnect_uplink();
                }
            }
        }
        self.frame = frame;
        taken
    }

    fn take_from_clients(&mut self) -> bool {
        let mut taken = false;
        for (index, slot) in self.vifs.iter_mut().enumerate() {
            let Some(vif) = slot else { continue };
            self.hv.take_pending(vif.port());
            let before = vif.counters().received_slots;
            let result = vif
                .flush(&mut self.hv, &mut self.batch)
                .and_then(|()| vif.receive(&mut self.hv, &mut self.batch, Budget::default()));
            taken |= vif.counters().received_slots != before;
            if let Err(error) = result {
                self.client_errors.push((index, error));
                if let Some(vif) = slot.take() {
                    vif.disconnect(&mut self.hv);
                }
            }
        }
        taken
    }

    /// Sends the frame in the container where the verdict says, or drops it.
    pub fn send(&mut self, frame: &mut Frame, to: Option<Side>) {
        let sent = match to {
            Some(Side::Uplink) => match &mut self.uplink {
                Some(uplink) => uplink.send(&mut self.hv, frame).is_ok(),
                None => false,
            },
            Some(Side::Client(index)) => match self.vifs.get_mut(index) {
                Some(Some(vif)) => vif.send(&mut self.hv, &mut self.batch, frame).is_ok(),
                _ => false,
            },
            None => true,
        };
        self.refused += usize::from(!sent);
        frame.release(&mut self.hv);
    }

    /// Gives buffers back, shows the peers what was written, and notifies all of them at once.
    pub fn finish(&mut self) {
        let mut ports: Vec<PortNumber> = Vec::new();
        match &mut self.uplink {
            Some(uplink) => {
                let hv = &mut self.hv;
                self.batch.recycle(|page| uplink.recycle(hv, page));
                uplink.refill(&mut self.hv);
                ports.extend(uplink.publish());
            }
            None => self.batch.recycle(|page| self.hv.release(page)),
        }
        for vif in self.vifs.iter_mut().flatten() {
            ports.extend(vif.publish(&self.batch));
        }
        self.hv.notify(&ports);
    }

    /// Iterates until there is nothing to do, then arms everything.
    pub fn run(&mut self, mut verdict: impl FnMut(Side, &mut Frame) -> Option<Side>) {
        loop {
            while self.iterate(&mut verdict) {}
            let mut more = false;
            if let Some(uplink) = &mut self.uplink {
                more |= uplink.arm().unwrap_or(true);
            }
            for vif in self.vifs.iter_mut().flatten() {
                let work = vif.arm().unwrap_or(true);
                more |= work && !vif.is_held_back();
            }
            if !more {
                self.hv.wait(&[], None);
                return;
            }
        }
    }

    /// The only client's vif.
    ///
    /// # Panics
    ///
    /// When it is not connected.
    pub fn vif(&mut self) -> &mut Vif {
        self.vifs[0].as_mut().unwrap()
    }

    /// Disconnects the uplink.
    pub fn disconnect_uplink(&mut self) {
        if let Some(uplink) = self.uplink.take() {
            uplink.disconnect(&mut self.hv, &mut self.quarantine);
        }
    }

    /// Disconnects everything. Peers that hold pages must have let them go.
    pub fn close(&mut self) {
        self.disconnect_uplink();
        for vif in self.vifs.iter_mut().filter_map(Option::take) {
            vif.disconnect(&mut self.hv);
        }
        self.batch.discard(&mut self.hv);
        self.frame.release(&mut self.hv);
        self.quarantine.sweep(&mut self.hv);
    }
}

fn find(vifs: &mut [Option<Vif>], tag: VifTag) -> Option<&mut Vif> {
    vifs.get_mut(usize::try_from(tag.0).ok()?)?.as_mut()
}

/// Everything between all clients and the uplink, unchanged: clients to the uplink, the uplink to the first client.
#[must_use]
pub fn straight(from: Side, _frame: &mut Frame) -> Option<Side> {
    match from {
        Side::Uplink => Some(Side::Client(0)),
        Side::Client(_) => Some(Side::Uplink),
    }
}

/// Fails if the domain has anything that it did not give back.
///
/// # Panics
///
/// As it says.
pub fn assert_nothing_left(machine: &FakeMachine, id: DomId) {
    assert_eq!(machine.resources(id), Resources::default(), "domain {id}");
}

/// One client, one netvm and the router between them.
#[derive(Debug)]
pub struct World {
    /// The machine.
    pub machine: FakeMachine,
    /// The drivers.
    pub router: Router,
    /// The client.
    pub client: Client,
    /// The netvm.
    pub netvm: Netvm,
}

impl World {
    /// Connects a Linux client and a Linux netvm.
    #[must_use]
    pub fn new() -> Self {
        Self::with(crate::client::LINUX, LINUX)
    }

    /// Connects peers with other features.
    #[must_use]
    pub fn with(
        client_features: netback::FrontendFeatures,
        netvm_features: BackendFeatures,
    ) -> Self {
        let machine = FakeMachine::new();
        let mut router = Router::new(&machine);
        let netvm = router.connect_uplink(&machine, netvm_features);
        let mut client = Client::new(&machine, FIRST_CLIENT, ROUTER);
        client.features = client_features;
        router.connect_client(&client);
        Self {
            machine,
            router,
            client,
            netvm,
        }
    }

    /// Runs the router until it is idle.
    pub fn run(&mut self) {
        self.router.run(straight);
    }

    /// Ends everything in good order and checks that nobody has anything left.
    pub fn close(mut self) {
        self.netvm.close();
        self.router.close();
        self.client.close();
        assert_nothing_left(&self.machine, ROUTER);
        assert_nothing_left(&self.machine, NETVM);
        assert_nothing_left(&self.machine, FIRST_CLIENT);
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}
