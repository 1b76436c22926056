#![no_std]
#![forbid(unsafe_code)]
//! The backend of one client vif: requests to frames, frames to responses.
//!
//! # What it is for
//!
//! Each client qube has a [`Vif`]. Its frames are taken out of the tx ring with [`Vif::receive`] and frames
//! for it are put into its rx buffers with [`Vif::send`]. Both only append copy operations to a
//! [`Batch`] that all vifs share; [`Batch::copy`] carries them out in one hypercall, and
//! [`Batch::next_frame`] then gives the received frames one by one, in pages of ours.
//!
//! # How the main loop drives it
//!
//! One iteration, with `netfront`'s uplink on the other side:
//!
//! ```text
//! uplink.reclaim(hv)                       pages of transmitted frames come back
//! while uplink.receive(hv, frame)          frames of the netvm, already in pages of ours
//!     verdict -> vif.send(hv, batch, frame)          copy operations only
//! batch.limit_uplink_slots(uplink.tx_free_slots())   back-pressure: take no more than can go out
//! for each vif that is ready or has a queue:
//!     vif.flush(hv, batch)                 queued frames first
//!     vif.receive(hv, batch, budget)       copy operations only
//! batch.copy(hv, |failure| vif(failure.tag()).amend(failure))     the one hypercall for all of it
//! while batch.next_frame(hv, frame)        frames of the clients, already in pages of ours
//!     verdict -> uplink.send(hv, frame)              grants the very pages they were copied into
//!              | vif.send(hv, batch, frame)          goes with the next iteration's copy
//!              | frame.release(hv)
//! batch.recycle(|page| uplink.recycle(hv, page))     pages that were copied out of
//! uplink.refill(hv)
//! ports = uplink.publish() + every vif.publish(batch)
//! hv.notify(ports)                         one hypercall for all peers
//! if nothing was done and batch.is_empty():
//!     arm everything; if nothing came in meanwhile, hv.wait(ports, earliest deadline)
//!     (a vif that is held back says that there is work, and can only do it when the uplink has slots again: sleep)
//! ```
//!
//! Responses are written when requests are taken, but published only when their copies are done
//! ([`Vif::publish`] knows); a failed copy amends its response first.
//!
//! # What it trusts
//!
//! Nothing that the client writes. Each slot is copied out once, then checked; indices are our private copies.
//! A frame with a mistake is answered with an error and counted ([`ReceiveErrors`]); what no correct
//! frontend does is a [`PeerError`], after which this vif serves nothing until it is disconnected.
//!
//! # What bounds it
//!
//! The constants below; the budget of each call; the batch's room; the page pool's reserve. Nothing is allocated
//! after [`Vif::connect`] and [`Batch::new`].
//!
//! Source: Xen `public/io/netif.h`, `public/io/ring.h`; limits as Linux netback has them.

extern crate alloc;

mod batch;
mod chain;
mod counters;
mod error;
mod queue;
mod receive;
mod segments;
mod send;
mod vif;

use core::time::Duration;

pub use batch::{Batch, Failure, VifTag};
pub use counters::{ReceiveErrors, SendDrops, VifCounters};
pub use error::{ConnectError, PeerError, Ring, SendDrop, Sent};
pub use vif::{Budget, ConnectParameters, FrontendFeatures, Vif};
pub use xen::packet::Segments;

/// Data slots that a client's frame may have. One more than a frontend needs, for careless ones.
pub const MAX_DATA_SLOTS: usize = 19;
/// Data slots from which on a frame is an attack and not a mistake. Between the two it is dropped.
pub const FATAL_DATA_SLOTS: usize = 33;
/// Extra-info slots that one frame may have.
pub const MAX_EXTRAS: usize = 4;
/// Bytes that a frame may be longer than the MTU: an Ethernet header and one tag.
pub const LINK_HEADER_LEN: usize = 18;
/// Frames that may wait for one client's buffers.
pub const QUEUE_FRAMES: usize = 64;
/// Pages that frames waiting for one client may hold (256 KiB).
pub const QUEUE_PAGES: usize = 64;
/// How long a frame may wait for the client's buffers.
pub const QUEUE_EXPIRY: Duration = Duration::from_secs(1);
/// After this long without taking a frame that waits, a client is stalled: its frames are dropped at once.
pub const STALL_AFTER: Duration = Duration::from_secs(10);
/// How often to look for buffers of a client that does not notify about them (`feature-rx-notify` = 0).
pub const RX_POLL_INTERVAL: Duration = Duration::from_millis(5);
/// How long segments wait for enough buffers for all of them, before those that fit go alone.
pub const SEGMENTS_PATIENCE: Duration = Duration::from_millis(20);
/// Segments that one GSO frame may be cut into.
pub const MAX_SEGMENTS: usize = 64;
/// The byte budget that a client may carry over to its next turn.
pub const MAX_DEFICIT: u32 = 128 * 1024;
/// Failed frame copies in a row after which a client is given up.
pub const MAX_COPY_FAILURES: u32 = 256;
/// Pages that queueing for clients leaves in the pool: a client that takes nothing must not starve the others.
pub const QUEUE_RESERVED_PAGES: usize = 64;
/// Pages that receiving from clients leaves in the pool, so that one GSO frame can always pass.
pub const RESERVED_PAGES: usize = 19;
