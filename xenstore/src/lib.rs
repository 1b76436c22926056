//! The control plane: a xenstore client, the xenbus handshakes of both device roles, shutdown requests
//! and settings.
//!
//! Everything is sans-I/O and never blocks: the kernel's main loop lends the byte stream and the time to
//! [`ControlPlane::poll`], takes [`Event`]s out and answers them.
//!
//! # Shape
//!
//! | module | what |
//! | --- | --- |
//! | [`wire`] | the message codec |
//! | [`client`] | requests, replies and watches over a byte stream |
//! | [`task`] | the tiny executor: clock, deadlines, events, tasks |
//! | [`store`] | the typed, awaitable face of the client that device code is written against |
//! | [`backend`] | client vifs: discovery and the backend's side of the xenbus handshake |
//! | [`frontend`] | the uplink: the frontend's side |
//! | [`control`] | `control/shutdown` and its neighbours |
//! | [`config`] | settings below `vm-data`, as a stream of changes |
//! | [`nodes`] | nodes that are no device's, on behalf of the kernel |
//! | [`control_plane`] | the one value that the kernel owns |
//! | `fake` | a xenstored, toolstack and peers for host tests (feature `fake`) |
//!
//! # Why tasks
//!
//! Each device, and each watched subtree, is an `async fn` that reads like the specification
//! (`store.read(path).await?`). The alternative, a hand-written state machine for each step between two
//! replies, was weighed: a handshake has some ten such steps, each with its own error path, and the state
//! that matters (own state, peer state, `online`) would drown among them. What *is* a state machine in the
//! specification stays one here: the decision tables are pure functions ([`backend::machine`],
//! [`frontend::machine`]) that tests can drive through every combination.
//!
//! The executor has no wakers and needs no `unsafe`: whenever something happened that could concern any
//! task (a reply, a watch that became dirty, a deadline, an answer of the kernel) every task is polled once
//! more, and each looks at its own condition. With the hundred tasks that the limits allow this costs
//! microseconds, on the control plane only; in return there is no way to lose a wake-up.
//!
//! # What is trusted
//!
//! xenstored and the toolstack (dom0) are trusted to be honest, not to be quick or well-formed: all
//! values are parsed strictly and nothing panics. Nodes in a client's own folder are attacker-controlled at any
//! time. See [`backend`].
//!
//! # What bounds it
//!
//! The constants below. Nothing here grows with what a peer does: watch events are merged into one flag (or a
//! short list of paths) per watch, replies exist only for requests of ours, at most [`MAX_OUTSTANDING`] at a
//! time, and each task has at most one event waiting for the kernel.
//!
//! Source: Xen `docs/misc/xenstore.txt`, `docs/misc/xenstore-ring.txt`, `public/io/xs_wire.h`,
//! `public/io/xenbus.h`, `public/io/netif.h`.
#![cfg_attr(not(any(test, feature = "fake")), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

use core::time::Duration;

pub mod backend;
pub mod client;
pub mod config;
pub mod control;
pub mod control_plane;
#[cfg(any(test, feature = "fake"))]
#[expect(
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test support: misuse and broken invariants shall end the test"
)]
pub mod fake;
pub mod frontend;
mod limiter;
pub mod nodes;
pub mod state;
pub mod store;
mod table;
pub mod task;
pub mod wire;

pub use backend::{BackendEvent, VifFeatures, VifId, VifParameters, VifStatus};
pub use client::{Client, Fatal};
pub use config::ConfigEvent;
pub use control::{ControlEvent, Shutdown};
pub use control_plane::{ControlPlane, Event, Options};
pub use frontend::{UplinkEvent, UplinkFeatures, UplinkOffer, UplinkRings, UplinkStatus};
pub use nodes::{NodeAnswer, NodeRequest};
pub use state::XenbusState;
pub use store::{Error, Store};

/// Requests sent to xenstored and not yet answered. The daemon stops reading at 20.
pub const MAX_OUTSTANDING: usize = 8;
/// Requests waiting behind those. A task that finds the queue full waits for room.
pub const MAX_QUEUED: usize = 64;
/// Watches that we hold at a time: xenstored's own default quota for a domain.
pub const MAX_WATCHES: usize = 128;
/// Paths remembered for one watch until its task looks; more turn into "anything may have changed".
pub const MAX_HINTS: usize = 64;
/// Bytes of a path remembered as a hint; a longer one turns into "anything may have changed".
pub const MAX_HINT_LEN: usize = 256;
/// Client vifs served at a time. Further ones stay in state 1 until one leaves.
pub const MAX_VIFS: usize = 100;
/// Tasks: one for each vif, the fixed ones, and a few of the kernel's own.
pub const MAX_TASKS: usize = MAX_VIFS + 20;
/// An outstanding request older than this means that xenstored ignores us: there is no way back.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// Transactions open at a time; more wait. The daemon's default quota for a domain is 10.
pub const MAX_TRANSACTIONS: usize = 4;
/// How often a transaction that met a conflict is tried before the caller is told.
pub const TRANSACTION_ATTEMPTS: usize = 10;
/// Bytes of a directory listing gathered from parts; a longer listing is refused.
pub const MAX_DIRECTORY_LEN: usize = 128 * 1024;
