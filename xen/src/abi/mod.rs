//! Mirrors of Xen's public headers: numbers and `repr(C)` structures, with sizes and offsets asserted at compile time.
//!
//! Numbers of hypercalls, commands and shutdown reasons, and the event channel, scheduler and shared-info
//! structures come from the crate `xen-sys`, as far as it is right; grant tables, memory operations, HVM
//! parameters, the PVH start info and CPUID leaves are missing there and are written here. Of `xen-sys`
//! nothing executable is used: its hypercall shims corrupt the red zone, use the discouraged hypercall page and pass
//! the fifth argument in the wrong register, and its `sched_op` passes the reason by value.
//!
//! All structures are those of the 64-bit ABI, little endian. Constants keep the header's names.
//!
//! Source: Xen `public/*.h`, `public/arch-x86/*.h`; the numbers as listed in our specification of the platform.

pub(crate) mod cpuid;
pub(crate) mod event;
pub(crate) mod grant;
pub(crate) mod memory;
pub(crate) mod sched;
pub(crate) mod shared_info;
pub(crate) mod start_info;
pub(crate) mod vcpu;

pub(crate) use xen_sys::{
    __HYPERVISOR_event_channel_op, __HYPERVISOR_grant_table_op, __HYPERVISOR_hvm_op,
    __HYPERVISOR_memory_op, __HYPERVISOR_multicall, __HYPERVISOR_sched_op,
    multicall_entry,
};

/// Asserts at compile time the size of a structure and the offsets of its fields, in bytes.
macro_rules! assert_layout {
    ($type:ty, size $size:literal $(, $field:ident at $offset:literal)* $(,)?) => {
        const _: () = {
            assert!(size_of::<$type>() == $size);
            $(assert!(core::mem::offset_of!($type, $field) == $offset);)*
        };
    };
}
pub(crate) use assert_layout;

assert_layout!(multicall_entry, size 64, op at 0, result at 8, args at 16);

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers of the specification, typed in from there, against what `xen-sys` says.
    #[test]
    fn hypercall_numbers_are_those_of_the_specification() {
        let pairs = [
            (__HYPERVISOR_memory_op, 12),
            (__HYPERVISOR_multicall, 13),
            (__HYPERVISOR_grant_table_op, 20),
            (__HYPERVISOR_sched_op, 29),
            (__HYPERVISOR_event_channel_op, 32),
            (__HYPERVISOR_hvm_op, 34),
        ];
        for (ours, specified) in pairs {
            assert_eq!(ours, specified);
        }
    }

    #[test]
    fn command_numbers_are_those_of_the_specification() {
        let pairs = [
            (event::EVTCHNOP_bind_interdomain, 0),
            (event::EVTCHNOP_close, 3),
            (event::EVTCHNOP_send, 4),
            (event::EVTCHNOP_alloc_unbound, 6),
            (sched::SCHEDOP_yield, 0),
            (sched::SCHEDOP_shutdown, 2),
            (sched::SCHEDOP_poll, 3),
            (sched::SHUTDOWN_poweroff, 0),
            (sched::SHUTDOWN_reboot, 1),
            (sched::SHUTDOWN_crash, 3),
            (xen_sys::XEN_ELFNOTE_PHYS32_ENTRY, 18),
        ];
        for (ours, specified) in pairs {
            assert_eq!(ours, specified);
        }
    }
}
