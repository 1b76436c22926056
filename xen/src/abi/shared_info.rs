//! Offsets in the shared info page. Only offsets: Xen writes the page while we look, so it never becomes a reference.
//!
//! Source: Xen `public/xen.h`. The structures of `xen-sys` confirm the numbers, but for the clock's flags, which it
//! declares as padding.

use super::assert_layout;
use xen_sys::{shared_info, vcpu_info, vcpu_time_info};

/// `vcpu_info[0].time`, 32 bytes.
pub(crate) const TIME: usize = 32;
/// `version u32` in the time structure; odd while Xen writes.
pub(crate) const TIME_VERSION: usize = TIME;
/// `tsc_timestamp u64`.
pub(crate) const TIME_TSC_TIMESTAMP: usize = TIME + 8;
/// `system_time u64`, nanoseconds.
pub(crate) const TIME_SYSTEM_TIME: usize = TIME + 16;
/// `tsc_to_system_mul u32`.
pub(crate) const TIME_TSC_TO_SYSTEM_MUL: usize = TIME + 24;
/// `tsc_shift i8`, lowest byte of this word; then flags and padding.
pub(crate) const TIME_TSC_SHIFT: usize = TIME + 28;
/// `evtchn_pending[64] u64`.
pub(crate) const EVTCHN_PENDING: usize = 2048;
/// `evtchn_mask[64] u64`.
pub(crate) const EVTCHN_MASK: usize = 2560;
/// Words of pending and mask bits.
pub(crate) const EVTCHN_WORDS: usize = 64;
/// `wc_version u32`; odd while Xen writes.
pub(crate) const WC_VERSION: usize = 3072;
/// `wc_sec u32`, low half.
pub(crate) const WC_SEC: usize = 3076;
/// `wc_nsec u32`.
pub(crate) const WC_NSEC: usize = 3080;
/// `wc_sec_hi u32`, high half.
pub(crate) const WC_SEC_HI: usize = 3084;

assert_layout!(
    shared_info, size 3136,
    vcpu_info at 0, evtchn_pending at 2048, evtchn_mask at 2560, wc_version at 3072, wc_sec at 3076, wc_nsec at 3080,
    wc_sec_hi at 3084, arch at 3088,
);
assert_layout!(vcpu_info, size 64, evtchn_upcall_pending at 0, evtchn_upcall_mask at 1, evtchn_pending_sel at 8, time at 32);
assert_layout!(
    vcpu_time_info, size 32,
    version at 0, tsc_timestamp at 8, system_time at 16, tsc_to_system_mul at 24, tsc_shift at 28,
);
