#![no_std]
#![forbid(unsafe_code)]
//! The packet engine of Portcullis: parsing, tracking, translation, rules.
//!
//! Pure: no I/O, no clock, no randomness of its own. The owner feeds frames to [`Engine::process`] with
//! the time and carries out the [`Verdict`]; it tells the engine about uplink, clients and rules
//! through the `set_` and `attach_` functions. All tables of the data path are allocated by
//! [`Engine::new`]; processing a frame never allocates.
//!
//! Trust: frames come from clients and from the uplink and may hold anything. Addresses, rules and
//! sizes come from dom0.

extern crate alloc;

mod address;
#[cfg(feature = "blocks")]
#[doc(hidden)]
pub mod blocks;
pub mod config;
mod conntrack;
pub mod engine;
mod fragment;
pub mod frame;
mod hash;
mod limiter;
mod nat;
pub mod outbox;
mod registry;
pub mod resolver;
pub mod rule;
pub mod ruleset;
pub mod verdict;
pub mod view;
mod wire;

pub use config::{
    AttachError, ClientConfig, Downstream, IcmpRate, Limits, MappedAddress, UplinkConfig,
};
pub use engine::{Engine, Work};
pub use frame::{Checksum, ClientId, Frame, GATEWAY_MAC, Gso, GsoFamily, Iface, Mac, Time};
pub use outbox::Generated;
pub use verdict::{Counters, DropCounters, DropReason, Verdict};
pub use view::{ClientView, FlowCursor, FlowState, FlowView};
