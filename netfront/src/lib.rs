#![no_std]
#![forbid(unsafe_code)]
//! The frontend of the uplink vif: frames to the netvm and back.
//!
//! # What it is for
//!
//! [`Uplink`] owns the two rings towards the netvm, the pages in them and the event channel. Received frames come
//! in pages that the netvm wrote and can no longer reach; frames are transmitted by granting their very
//! pages, read-only, until the netvm has answered. `netback`'s crate text shows the main loop that drives both.
//!
//! The xenbus handshake is the caller's: publish [`Uplink::keys`] after [`Uplink::connect`].
//!
//! # What it trusts
//!
//! Nothing that the netvm writes. A response is copied out once and looked up by what we know: by its slot (rx)
//! or by an id that must be in flight (tx). A frame with a mistake is dropped and counted, its buffers are
//! posted again; what no correct backend does is [`DeviceBroken`]: tear down and connect anew.
//!
//! The netvm sees whole pages. Before a page is granted, everything but the frame is cleared ([`xen::Page`]
//! remembers what was written); a page that the netvm still holds when it should not goes to the
//! [`Quarantine`] and is never used until it can be revoked.
//!
//! # What bounds it
//!
//! 256 slots per ring; one page per slot; the page pool. Nothing is allocated after [`Uplink::connect`].
//!
//! Source: Xen `public/io/netif.h`, `public/io/ring.h`.

extern crate alloc;

mod counters;
mod error;
mod quarantine;
mod receive;
mod transmit;
mod uplink;

use core::time::Duration;

pub use counters::{ReceiveDrops, UplinkCounters};
pub use error::{ConnectError, DeviceBroken, TxError};
pub use quarantine::Quarantine;
pub use uplink::{BackendFeatures, Uplink, UplinkKeys, UplinkParameters};
pub use xen::packet::Segments;

/// Tx slots that must be free before clients' frames are taken in again: one frame of any kind fits.
pub const TX_RESUME_SLOTS: usize = 19;
/// Receive buffers that are posted at least.
pub const MIN_RX_BUFFERS: u32 = 64;
/// Tx responses that are let come in without a notification, as long as there are slots enough.
pub const TX_EVENT_AFTER: u32 = 32;
/// How often to look for tx responses that nobody notified about.
pub const SWEEP_INTERVAL: Duration = Duration::from_millis(10);
/// How far the sweep slows down while the netvm does not answer.
pub const MAX_SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Pages that the netvm still held when it had answered, after which the device is given up.
pub const MAX_HELD_GRANTS: u32 = 8;
/// Segments that one GSO frame may be cut into for a netvm that does not take GSO.
pub const MAX_SEGMENTS: usize = 64;
/// Pages that posting rx buffers leaves in the pool.
pub const RESERVED_PAGES: usize = 19;
