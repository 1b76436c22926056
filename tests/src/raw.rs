//! Rings as bytes.
//!
//! Source: Xen `public/io/ring.h`, `public/io/netif.h`.

use xen::SharedPage;
use xen::shared::full_fence;

/// Byte offset of the request producer index.
pub const REQ_PROD: usize = 0;
/// Byte offset of the index at which the backend wants to be notified.
pub const REQ_EVENT: usize = 4;
/// Byte offset of the response producer index.
pub const RSP_PROD: usize = 8;
/// Byte offset of the index at which the frontend wants to be notified.
pub const RSP_EVENT: usize = 12;
/// Slots of both rings.
pub const SLOTS: u32 = 256;

/// The byte offset of a slot of `words` 32-bit words.
#[must_use]
pub const fn slot(index: u32, words: usize) -> usize {
    64 + (index % SLOTS) as usize * words * 4
}

/// Publishes producer index `new` at `at`, which was `old`. Returns whether the peer, whose event index is at
/// `event`, wants to be notified.
pub fn publish(page: &SharedPage, at: usize, event: usize, old: u32, new: u32) -> bool {
    page.write_u32(at, new);
    full_fence();
    let wanted = page.read_u32(event);
    new.wrapping_sub(wanted) < new.wrapping_sub(old)
}
