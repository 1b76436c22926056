//! vchan: a byte stream between two domains, over shared pages and one event channel.
//!
//! # Shape
//!
//! | module | what |
//! | --- | --- |
//! | [`layout`] | the control page: offsets, ring orders, what a client refuses |
//! | [`memory`] | how a shared page is reached: single copies, never a reference |
//! | [`duplex`] | the two byte rings of an established channel, for both roles |
//! | [`server`], [`client`] | set-up and clean-up over the hypervisor, one file per role |
//! | [`directory`] | what goes into and comes out of xenstore, as plain paths and values |
//! | [`channels`] | both roles behind one trait, so that the protocols above also run over pipes |
//! | `pipes`, `fake_directory` | for host tests: channels in memory, and a small xenstore (feature `fake`) |
//!
//! # Trust
//!
//! The peer writes into the control page whenever it likes. Our own indices are private; the peer's are read
//! once and compared with ours; orders and grant references are read once, at connect. A peer can make its
//! channel useless, and nothing else. A peer that lies in the notification bytes costs one notification.
//!
//! # Bounds
//!
//! A channel owns at most [`MAPPED_PAGES_MAX`] pages beside the control page. Nothing here waits.
//!
//! Source: Xen `public/io/libxenvchan.h`, and what Qubes' libvchan adds (advertisement removed on the first
//! connect, clients that wait for the `event-channel` key only).

pub mod channels;
pub mod client;
pub mod directory;
pub mod duplex;
#[cfg(any(test, feature = "fake"))]
pub mod fake_directory;
pub mod layout;
pub mod memory;
#[cfg(any(test, feature = "fake"))]
pub mod pipes;
pub mod server;

#[cfg(test)]
mod over_fake;
#[cfg(test)]
pub(crate) mod testing;

pub use channels::{Activity, Channel, Channels, Phase, Registry, XenChannels};
pub use directory::StoreRequest;
pub use duplex::{Duplex, Role};
pub use layout::{Order, Orders};
pub use memory::SharedBytes;

/// Ring pages that one channel may have, both directions together; 64 is an order of 17 on both sides.
///
/// The protocol allows 512. No Qubes program asks for more than 32, and every page costs a hole or a grant.
pub const MAPPED_PAGES_MAX: usize = 64;

/// Why a channel could not be set up. Everything taken for it was given back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenError {
    /// Out of pages, grant references, ports, holes or places in the request queue. Later may work.
    Exhausted,
    /// The peer's control page or its advertisement makes no sense, or belongs to a channel that is over.
    Stale,
}
