//! Settings below `vm-data`, watched while we run and delivered as a stream of changes.
//!
//! Keys have the names that QubesDB uses, and values are QubesDB's: `vm-data/qubes-ip` is delivered as
//! `/qubes-ip`. One thing differs: xenstored does not allow `.` and `:` in a path, so an address or MAC that is
//! part of a key is written with `_` for `.` and `-` for `:`. In `vm-data/qubes-firewall/10_137_0_6/0000` the address is
//! delivered as `10.137.0.6`, in `.../fd09-24ef-4179--a89-6/0000` as `fd09:24ef:4179::a89:6`. This concerns the component
//! below `qubes-firewall`, `mapped-ip` and `net-config` and no other.
//!
//! # Order and consistency
//!
//! 1. At start everything is read, then [`ConfigEvent::Ready`] follows. Settings may also all be missing.
//! 2. A single key that changes later is delivered as [`ConfigEvent::Written`] or [`ConfigEvent::Removed`].
//! 3. A rule tree, `qubes-firewall/<address>`, is delivered whole, in QubesDB's order: [`ConfigEvent::Removed`] for
//!    `/qubes-firewall/<address>/` (with the slash: everything below), `Written` for each key in
//!    ascending order, and then the commit marker, `Written` for `/qubes-firewall/<address>` itself. A tree that is
//!    gone ends with `Removed` for `/qubes-firewall/<address>` instead.
//!
//! QubesDB's writer ends a rewrite of a tree with a commit marker. A person with `xenstore-write` does not, so any
//! change in a tree counts as one: after the last change the tree must have been quiet for [`QUIET_PERIOD`] (at most
//! [`QUIET_LIMIT`] after the first), then it is read whole. Should the watch fire again while it is being
//! read, what was read is thrown away and reading starts again: xenstored puts a watch event in front of every
//! reply that could show the change, so a reading without an event is a snapshot. (A transaction would give
//! the same, but the daemon refuses one that touches more than 1,024 nodes, and a tree may have 10,000 rules.)
//!
//! # Bounds
//!
//! [`MAX_KEYS`], [`MAX_KEY_LEN`], [`MAX_VALUE_LEN`] and [`MAX_TREE_BYTES`]; a tree that exceeds one is delivered as
//! [`ConfigEvent::Unusable`], other keys that do are left out with a log line. Re-reading is
//! merged: at most one reading is in flight.

use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;

/// How long a rule tree must have been quiet before it is read.
pub const QUIET_PERIOD: Duration = Duration::from_millis(50);
/// How long changes without a pause may put the reading off.
pub const QUIET_LIMIT: Duration = Duration::from_secs(1);
/// Keys outside of rule trees, and rule trees, that are followed.
pub const MAX_KEYS: usize = 1024;
/// Keys in one rule tree.
pub const MAX_TREE_KEYS: usize = 10_100;
/// Bytes of all keys and values of one rule tree.
pub const MAX_TREE_BYTES: usize = 1024 * 1024;
/// Bytes of one delivered key.
pub const MAX_KEY_LEN: usize = 256;
/// Bytes of one value: QubesDB's limit.
pub const MAX_VALUE_LEN: usize = 3072;

/// A change of the settings. Keys start with `/` and are spelled as in QubesDB.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ConfigEvent {
    /// The key has this value now. Also delivered when the value is the same as before.
    Written {
        /// Which key.
        key: String,
        /// Its value: any bytes, at most [`MAX_VALUE_LEN`].
        value: Vec<u8>,
    },
    /// The key is gone; if it ends with `/`, everything below it.
    Removed {
        /// Which key.
        key: String,
    },
    /// A rule tree exists but cannot be read whole (too large, or forbidden): its rules must count as
    /// unusable.
    Unusable {
        /// The tree, `/qubes-firewall/<address>`.
        key: String,
        /// Why.
        reason: &'static str,
    },
    /// Everything that existed at start has been delivered.
    Ready,
}
