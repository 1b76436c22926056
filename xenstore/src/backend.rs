//! Client vifs: we are the backend of every device that the toolstack puts below `backend/vif`.
//!
//! For each device one task walks the table of [`machine`]: it publishes what we can do, waits for the
//! frontend, reads its keys, lets the kernel connect, and closes again when the frontend, the toolstack or the
//! kernel wants that. Another task finds devices: it lists `backend/vif/<domid>/<handle>` once and
//! follows the watch from then on; the folder and all its parents may vanish and return.
//!
//! # Trust
//!
//! Our own folder `backend/vif/<domid>/<handle>` is written by the toolstack and us: who the client is (domid,
//! MAC, addresses) comes from there only, and `frontend-id` must agree with the path. The frontend's folder is
//! written by the client at any time: each value is read once, parsed strictly, and whatever is wrong costs
//! the client its own vif and one log line.
//!
//! # Bounds
//!
//! At most [`MAX_VIFS`](crate::MAX_VIFS) devices. Reactions to a frontend's state are limited by a token
//! bucket ([`REACTION_BURST`], [`REACTION_INTERVAL`]); what the toolstack wants is never delayed by it.
//! A removal is done [`CLOSE_DEADLINE`] after it was asked for, whatever the frontend does.
//!
//! Source: Xen `public/io/netif.h`, `public/io/xenbus.h`; libxl's expectations of a backend in a driver domain.

use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};
use core::fmt;
use core::net::IpAddr;
use core::time::Duration;

use xen::{DomId, GrantRef, PortNumber};

use crate::state::XenbusState;
use crate::table::Table;

mod device;
mod discovery;
pub mod keys;
pub mod machine;

pub(crate) use discovery::discover;

/// How long a frontend may take to close before we go on without it.
pub const CLOSE_DEADLINE: Duration = Duration::from_secs(3);
/// How long state 2 is held after a device was first offered, so that the toolstack sees it.
pub const OFFER_HOLD: Duration = Duration::from_millis(100);
/// How long state 6 is held before our folder is removed: a toolstack that finds the folder gone when it comes to read
/// the state takes the removal for a failure, and the device stays in its books.
pub const REMOVAL_HOLD: Duration = Duration::from_millis(200);
/// Reactions to a frontend's state that a device may use up at once.
pub const REACTION_BURST: u32 = 16;
/// One more reaction is granted after this time.
pub const REACTION_INTERVAL: Duration = Duration::from_millis(250);
/// Addresses that one vif may have.
pub const MAX_ADDRESSES: usize = 16;

/// One client vif, for the time that it exists.
///
/// A device that is detached and attached again with the same domid and handle is another vif.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VifId {
    /// The client's domain, as the path of our folder says.
    pub client: DomId,
    /// The device's number in that domain.
    pub handle: u16,
    /// Counts up with every device found.
    pub generation: u32,
}

impl fmt::Display for VifId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vif{}.{}", self.client, self.handle)
    }
}

/// What a client's frontend says about itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VifFeatures {
    /// It notifies us when it posts rx buffers; otherwise its rx ring must be polled by timer.
    pub rx_notify: bool,
    /// It takes rx frames of several slots.
    pub scatter_gather: bool,
    /// It takes TCP segmentation offload frames over IPv4.
    pub gso_tcpv4: bool,
    /// It takes TCP segmentation offload frames over IPv6.
    pub gso_tcpv6: bool,
    /// It takes IPv4 frames with a blank checksum.
    pub checksum_ipv4: bool,
    /// It takes IPv6 frames with a blank checksum.
    pub checksum_ipv6: bool,
}

/// Everything that is needed to connect a vif.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VifParameters {
    /// The client's MAC address (from our folder: trusted).
    pub mac: [u8; 6],
    /// The client's addresses (from our folder: trusted), in the toolstack's order; possibly none.
    pub addresses: Vec<IpAddr>,
    /// The tx ring's page. Not equal to `rx_ring`.
    pub tx_ring: GrantRef,
    /// The rx ring's page.
    pub rx_ring: GrantRef,
    /// The client's event channel port for both rings.
    pub port: PortNumber,
    /// What the frontend can do.
    pub features: VifFeatures,
}

/// What the kernel must do for a client vif.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BackendEvent {
    /// Map the rings and bind the port, then answer with
    /// [`ControlPlane::connected`](crate::ControlPlane::connected) or
    /// [`ControlPlane::connect_failed`](crate::ControlPlane::connect_failed). The vif's task stands still until then.
    Connect {
        /// Which vif.
        device: VifId,
        /// Its rings and what it can do.
        parameters: VifParameters,
    },
    /// Stop the data path, unmap the rings and close the port, before polling again: the next state that we write
    /// tells the client that we are done. Only ever follows a `Connect` that was answered with `connected`.
    Disconnect {
        /// Which vif.
        device: VifId,
    },
}

/// How a vif stands, for the operator.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VifStatus {
    /// Which vif.
    pub device: VifId,
    /// The state that we wrote last; `Unknown` while the device is being looked at, or was refused.
    pub own: XenbusState,
    /// The frontend's state as read last.
    pub peer: XenbusState,
    /// The client's MAC address, once known.
    pub mac: Option<[u8; 6]>,
    /// The client's addresses, once known.
    pub addresses: Vec<IpAddr>,
    /// Why the vif was refused or closed by us, if it was.
    pub trouble: Option<String>,
}

/// What a vif's task shares with discovery and the kernel.
pub(crate) struct VifCell {
    status: RefCell<VifStatus>,
    /// Something changed in our folder.
    folder_changed: Cell<bool>,
    /// The task stands at a `Connect`.
    asked: Cell<bool>,
    /// The kernel's answer to it.
    answer: RefCell<Option<Result<(), String>>>,
    /// The kernel's report that the rings are broken.
    fault: RefCell<Option<String>>,
}

impl VifCell {
    fn new(device: VifId) -> Self {
        let status = VifStatus {
            device,
            own: XenbusState::Unknown,
            peer: XenbusState::Unknown,
            mac: None,
            addresses: Vec::new(),
            trouble: None,
        };
        Self {
            status: RefCell::new(status),
            folder_changed: Cell::new(true),
            asked: Cell::new(false),
            answer: RefCell::default(),
            fault: RefCell::default(),
        }
    }

    fn device(&self) -> VifId {
        self.status.borrow().device
    }

    /// Forgets answers and reports that concern an earlier attempt.
    fn expect_answer(&self) {
        self.answer.take();
        self.fault.take();
        self.asked.set(true);
    }
}

/// All vifs that have a task.
#[derive(Default)]
pub(crate) struct Vifs {
    by_place: RefCell<Table<Place, Rc<VifCell>>>,
    /// Places whose task ended and where a new device may be already.
    recheck: RefCell<Table<Place, ()>>,
    /// A task ended because the store failed; its device may still be there.
    lost: Cell<bool>,
    last_generation: Cell<u32>,
}

/// Where a device is: client domain and handle.
type Place = (DomId, u16);

impl Vifs {
    /// The vif's cell, unless another generation has taken its place.
    fn get(&self, device: VifId) -> Option<Rc<VifCell>> {
        let cell = self.at((device.client, device.handle))?;
        (cell.device() == device).then_some(cell)
    }

    fn at(&self, place: Place) -> Option<Rc<VifCell>> {
        self.by_place.borrow().get(&place).map(Rc::clone)
    }

    fn len(&self) -> usize {
        self.by_place.borrow().len()
    }

    fn register(&self, (client, handle): Place) -> Rc<VifCell> {
        let generation = self.last_generation.get().wrapping_add(1);
        self.last_generation.set(generation);
        let cell = Rc::new(VifCell::new(VifId {
            client,
            handle,
            generation,
        }));
        self.by_place
            .borrow_mut()
            .insert((client, handle), Rc::clone(&cell));
        cell
    }

    fn forget(&self, device: VifId, recheck: bool) {
        let place = (device.client, device.handle);
        self.by_place.borrow_mut().remove(&place);
        if recheck {
            self.recheck.borrow_mut().insert(place, ());
        }
    }

    pub(crate) fn answer(&self, device: VifId, answer: Result<(), String>) {
        if let Some(vif) = self.get(device).filter(|vif| vif.asked.take()) {
            *vif.answer.borrow_mut() = Some(answer);
        }
    }

    pub(crate) fn report(&self, device: VifId, reason: &str) {
        if let Some(vif) = self.get(device) {
            *vif.fault.borrow_mut() = Some(String::from(reason));
        }
    }

    pub(crate) fn status(&self) -> Vec<VifStatus> {
        let by_place = self.by_place.borrow();
        by_place
            .values()
            .map(|vif| vif.status.borrow().clone())
            .collect()
    }
}
