//! The uplink: we are the frontend of the vif below `device/vif` with the lowest handle.
//!
//! One task walks the table of [`machine`]: it waits for the backend's features, lets the kernel create the
//! rings, publishes them, and follows the backend from then on: closing, crashing, coming back, or being replaced
//! by another one (the netvm was changed). The uplink may be absent at boot and for any time later.
//!
//! # Trust
//!
//! `device/vif` is written by the toolstack (which backend) and us. The backend's folder is written by the backend,
//! which may lie: features are parsed strictly (absent or junk is "no"), its state is only ever one
//! of nine values, and after a fault attempts to reconnect are spaced out ([`BACK_OFF_FIRST`] doubling to
//! [`BACK_OFF_LAST`]).
//!
//! Source: Xen `public/io/netif.h`, `public/io/xenbus.h`.

use alloc::string::String;
use core::cell::{Cell, RefCell};
use core::time::Duration;

use xen::{DomId, GrantRef, PortNumber};

use crate::state::XenbusState;

pub mod machine;
mod uplink;

pub(crate) use uplink::run;

/// How long to wait for each answer of the backend while closing.
pub const CLOSE_STEP: Duration = Duration::from_secs(5);
/// The pause before the first attempt to reconnect.
pub const BACK_OFF_FIRST: Duration = Duration::from_secs(1);
/// The longest pause between attempts.
pub const BACK_OFF_LAST: Duration = Duration::from_secs(60);
/// A connection that lasted this long makes the next pause short again.
pub const STABLE: Duration = Duration::from_secs(60);
/// A backend that has not connected after this time is mentioned in the log.
pub const SLOW_BACKEND: Duration = Duration::from_secs(10);

/// What the uplink's backend offers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UplinkFeatures {
    /// It takes tx frames of several slots.
    pub scatter_gather: bool,
    /// It takes TCP segmentation offload frames over IPv4.
    pub gso_tcpv4: bool,
    /// It takes TCP segmentation offload frames over IPv6.
    pub gso_tcpv6: bool,
    /// It takes IPv6 frames with a blank checksum. (IPv4 ones are always allowed.)
    pub checksum_ipv6: bool,
}

/// A backend that is ready for our rings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UplinkOffer {
    /// The backend's domain: whom to grant to.
    pub backend: DomId,
    /// Our device number, usually 0.
    pub handle: u16,
    /// Our MAC address.
    pub mac: [u8; 6],
    /// What the backend can do.
    pub features: UplinkFeatures,
}

/// The kernel's rings for the uplink.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UplinkRings {
    /// The tx ring's page.
    pub tx_ring: GrantRef,
    /// The rx ring's page.
    pub rx_ring: GrantRef,
    /// Our port, allocated for the backend.
    pub port: PortNumber,
}

/// What the kernel must do for the uplink.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UplinkEvent {
    /// Create the rings and the port and post rx buffers, then answer with
    /// [`ControlPlane::uplink_prepared`](crate::ControlPlane::uplink_prepared) or
    /// [`ControlPlane::uplink_failed`](crate::ControlPlane::uplink_failed).
    /// The backend may use the rings as soon as the answer is out, before `Carrier(true)`.
    Prepare(UplinkOffer),
    /// The backend has connected (`true`); `Disconnect` implies `false`.
    Carrier(bool),
    /// Stop the data path and revoke all grants (quarantine what the backend still holds), before polling
    /// again. Only ever follows a `Prepare` that was answered with `uplink_prepared`.
    Disconnect,
}

/// How the uplink stands, for the operator.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UplinkStatus {
    /// The backend's domain, when there is an uplink device.
    pub backend: Option<DomId>,
    /// Our state.
    pub own: XenbusState,
    /// The backend's state as read last.
    pub peer: XenbusState,
    /// How often the rings were prepared.
    pub attempts: u32,
}

/// What the uplink's task shares with the kernel.
#[derive(Default)]
pub(crate) struct Uplink {
    pub(crate) status: Cell<UplinkStatus>,
    pub(crate) answer: RefCell<Option<Result<UplinkRings, String>>>,
}

impl Uplink {
    pub(crate) fn answer(&self, answer: Result<UplinkRings, String>) {
        *self.answer.borrow_mut() = Some(answer);
    }

    pub(crate) fn status(&self) -> UplinkStatus {
        self.status.get()
    }

    fn update(&self, change: impl FnOnce(&mut UplinkStatus)) {
        let mut status = self.status.get();
        change(&mut status);
        self.status.set(status);
    }

    /// There is no device.
    fn forget(&self) {
        self.update(|status| {
            *status = UplinkStatus {
                attempts: status.attempts,
                ..UplinkStatus::default()
            };
        });
    }

    fn note_device(&self, backend: DomId) {
        self.update(|status| status.backend = Some(backend));
    }

    fn note_own(&self, own: XenbusState) {
        self.update(|status| status.own = own);
    }

    fn note_peer(&self, peer: XenbusState) {
        self.update(|status| status.peer = peer);
    }

    fn note_attempt(&self) {
        self.update(|status| status.attempts = status.attempts.saturating_add(1));
    }
}
