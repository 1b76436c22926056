//! Operations on a virtual processor: how long ours has run.
//!
//! `xen-sys` does not have them. Source: Xen `public/vcpu.h`.

use super::assert_layout;

/// The hypercall.
pub(crate) const HYPERVISOR_VCPU_OP: u32 = 24;

/// Fills in a [`RunstateInfo`].
pub(crate) const VCPUOP_GET_RUNSTATE_INFO: u32 = 4;

/// `struct vcpu_runstate_info`.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct RunstateInfo {
    pub(crate) state: i32,
    pub(crate) padding: u32,
    /// When the state was entered, in nanoseconds of system time.
    pub(crate) state_entry_time: u64,
    /// Nanoseconds spent running, runnable, blocked and offline.
    pub(crate) time: [u64; 4],
}

assert_layout!(RunstateInfo, size 48, state at 0, state_entry_time at 8, time at 16);
