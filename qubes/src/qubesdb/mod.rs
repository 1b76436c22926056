//! QubesDB: the keys that dom0 holds for this qube, and the few that we write for tools to read.
//!
//! # Shape
//!
//! | module | what |
//! | --- | --- |
//! | [`path`] | keys that may be written; what dom0's daemon would not survive cannot be built |
//! | [`message`] | the 72-byte header, read leniently and written strictly |
//! | [`receiver`] | the byte stream cut into messages, in bounded memory |
//! | [`outbox`] | our own writes and removals, and which of our keys dom0 holds |
//! | [`client`] | the protocol on one connection after another |
//! | [`link`] | the client and its vchan: connecting, and connecting again |
//!
//! # Trust
//!
//! dom0 is trusted for what it says, not for being there or being of our version: unknown messages are skipped,
//! values beyond the limit are handed on in a form that no parser accepts, a lost connection is made again while the
//! rules in force stay. In the other direction dom0's daemon is fragile: it is a single process per qube
//! that exits for good on most protocol errors, and then firewall changes no longer arrive. So the encoder takes
//! only types that are valid by construction, and a removal is sent only for keys that are known to exist.
//!
//! # Bounds
//!
//! One message in the making, [`outbox::QUEUE_MAX`] operations of ours, [`outbox::SHADOW_MAX`] keys of ours, a send
//! buffer of [`client::SEND_BUFFER`] bytes. The keys of dom0 are the sink's to bound.
//!
//! Source: QubesOS core-qubesdb `include/qubesdb.h`, `daemon/db-cmds.c`.

pub mod client;
pub mod link;
pub mod message;
pub mod outbox;
pub mod path;
pub mod receiver;

pub use client::{Client, Counters, Sink};
pub use link::Link;
pub use outbox::WriteError;
pub use path::{Path, PathError};

/// The vchan port of QubesDB, with dom0 as the server.
pub const PORT: u32 = 111;

/// The longest value in bytes: one more kills dom0's daemon.
pub const VALUE_MAX: usize = 3071;

/// What a sink gets in place of a value that is longer than [`VALUE_MAX`].
///
/// Values never contain a NUL, so nothing parses this one, and what depends on it fails closed.
pub const OVERSIZE_VALUE: &[u8] = b"\0";
