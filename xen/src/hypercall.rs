//! Hypercalls: the one instruction that enters Xen, and a typed function for each operation that we use.
//!
//! The instruction is inline and chosen at boot ([`select`]); the hypercall page that Xen can fill with stubs is
//! not called (XSA-466). Before the choice, and on a machine without Xen, every call answers `ENOSYS`.
//!
//! Registers: number in `rax`, arguments in `rdi`, `rsi`, `rdx` (nothing here needs more), result in `rax`. Debug
//! builds of Xen poison argument registers, so all five are declared clobbered; flags and memory too. Pointers are
//! virtual addresses that Xen walks with our page tables, valid for the duration of the call.
//!
//! Source: Xen `public/arch-x86/xen-x86_64.h`; `xen-sys` for the numbers.

use core::arch::asm;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::abi::event::{
    EVTCHNOP_alloc_unbound, EVTCHNOP_bind_interdomain, EVTCHNOP_close, EVTCHNOP_send,
    evtchn_alloc_unbound, evtchn_bind_interdomain, evtchn_close, evtchn_send,
};
use crate::abi::grant::{
    GNTTABOP_COPY, GNTTABOP_MAP_GRANT_REF, GNTTABOP_UNMAP_GRANT_REF, GnttabCopy, GnttabMapGrantRef,
    GnttabUnmapGrantRef,
};
use crate::abi::memory::{
    AddToPhysmap, HVMOP_GET_PARAM, HvmParam, XENMEM_ADD_TO_PHYSMAP, XENMEM_CURRENT_RESERVATION,
};
use crate::abi::sched::{
    SCHEDOP_poll, SCHEDOP_shutdown, SCHEDOP_yield, sched_poll, sched_shutdown,
};
use crate::abi::vcpu::{HYPERVISOR_VCPU_OP, RunstateInfo, VCPUOP_GET_RUNSTATE_INFO};
use crate::abi::{
    __HYPERVISOR_event_channel_op, __HYPERVISOR_grant_table_op, __HYPERVISOR_hvm_op,
    __HYPERVISOR_memory_op, __HYPERVISOR_multicall, __HYPERVISOR_sched_op, multicall_entry,
};
use crate::discovery::CallInstruction;
use crate::types::{DomId, Errno, PortNumber, Time};

/// No instruction chosen yet.
const NONE: u8 = 0;
const VMCALL: u8 = 1;
const VMMCALL: u8 = 2;
static INSTRUCTION: AtomicU8 = AtomicU8::new(NONE);

/// `-ENOSYS`, what every call answers before [`select`].
const NO_XEN: i64 = -38;

/// Counters that rings without access to the guest value also advance. One thread: plain load and store.
static HYPERCALLS: AtomicU64 = AtomicU64::new(0);
static EVENTS_SENT: AtomicU64 = AtomicU64::new(0);

/// Chooses the instruction for all later calls.
pub(crate) fn select(instruction: CallInstruction) {
    let choice = match instruction {
        CallInstruction::Vmcall => VMCALL,
        CallInstruction::Vmmcall => VMMCALL,
    };
    INSTRUCTION.store(choice, Ordering::Relaxed);
}

/// Whether calls can reach Xen.
pub(crate) fn is_selected() -> bool {
    INSTRUCTION.load(Ordering::Relaxed) != NONE
}

/// Hypercalls made so far.
pub(crate) fn count() -> u64 {
    HYPERCALLS.load(Ordering::Relaxed)
}

/// Notifications sent so far.
pub(crate) fn events_sent() -> u64 {
    EVENTS_SENT.load(Ordering::Relaxed)
}

fn add(counter: &AtomicU64, amount: u64) {
    let sum = counter.load(Ordering::Relaxed).wrapping_add(amount);
    counter.store(sum, Ordering::Relaxed);
}

/// Enters Xen.
///
/// # Safety
///
/// 1. Addresses among the arguments point to what this operation reads and writes, valid for the whole call.
/// 2. The operation does not change memory that Rust references cover, other than through those arguments.
unsafe fn enter(number: u32, first: u64, second: u64, third: u64) -> Result<u64, Errno> {
    let mut result = u64::from(number);
    match INSTRUCTION.load(Ordering::Relaxed) {
        VMCALL => {
            // SAFETY: Xen is there and this is its instruction (`select`); the rest by our caller's obligations.
            unsafe {
                asm!("vmcall", inlateout("rax") result, inlateout("rdi") first => _, inlateout("rsi") second => _,
                    inlateout("rdx") third => _, lateout("r10") _, lateout("r8") _, options(nostack));
            }
        }
        VMMCALL => {
            // SAFETY: as above.
            unsafe {
                asm!("vmmcall", inlateout("rax") result, inlateout("rdi") first => _, inlateout("rsi") second => _,
                    inlateout("rdx") third => _, lateout("r10") _, lateout("r8") _, options(nostack));
            }
        }
        _ => result = NO_XEN.cast_unsigned(),
    }
    add(&HYPERCALLS, 1);
    let signed = result.cast_signed();
    if signed < 0 {
        return Err(Errno(
            i32::try_from(signed.wrapping_neg()).unwrap_or(i32::MAX),
        ));
    }
    Ok(result)
}

/// The address of an argument, as Xen wants it.
fn address<T>(argument: &mut T) -> u64 {
    core::ptr::from_mut(argument).expose_provenance() as u64
}

/// Puts a page of Xen's (`space`, `index`) at guest frame `frame`.
///
/// # Safety
///
/// 1. `frame` is not RAM that anything uses: Xen frees what was there.
pub(crate) unsafe fn add_to_physmap(space: u32, index: u64, frame: u64) -> Result<(), Errno> {
    let mut argument = AddToPhysmap {
        domid: DomId::SELF.0,
        size: 0,
        space,
        idx: index,
        gpfn: frame,
    };
    // SAFETY: the argument is what this command takes; memory in use stays as it is (obligation 1).
    unsafe {
        enter(
            __HYPERVISOR_memory_op,
            u64::from(XENMEM_ADD_TO_PHYSMAP),
            address(&mut argument),
            0,
        )
    }
    .map(drop)
}

/// How many pages Xen counts as this domain's: RAM that is backed, and some special pages.
pub(crate) fn current_reservation() -> Result<u64, Errno> {
    let mut argument = DomId::SELF.0;
    // SAFETY: the argument is what this command takes; it changes nothing.
    unsafe {
        enter(
            __HYPERVISOR_memory_op,
            u64::from(XENMEM_CURRENT_RESERVATION),
            address(&mut argument),
            0,
        )
    }
}

/// Reads an HVM parameter of our own domain.
pub(crate) fn hvm_param(index: u32) -> Result<u64, Errno> {
    let mut argument = HvmParam {
        domid: DomId::SELF.0,
        padding: 0,
        index,
        value: 0,
    };
    // SAFETY: the argument is what this command takes; it changes nothing else.
    unsafe {
        enter(
            __HYPERVISOR_hvm_op,
            u64::from(HVMOP_GET_PARAM),
            address(&mut argument),
            0,
        )
    }?;
    Ok(argument.value)
}

/// Allocates a port that `peer` may bind to.
pub(crate) fn allocate_port(peer: DomId) -> Result<PortNumber, Errno> {
    let mut argument = evtchn_alloc_unbound {
        dom: DomId::SELF.0,
        remote_dom: peer.0,
        port: 0,
    };
    // SAFETY: the argument is what this command takes; beyond it only event bits change, which are atomics.
    unsafe {
        enter(
            __HYPERVISOR_event_channel_op,
            u64::from(EVTCHNOP_alloc_unbound),
            address(&mut argument),
            0,
        )
    }?;
    Ok(PortNumber(argument.port))
}

/// Binds a port of ours to one that `peer` allocated for us.
pub(crate) fn bind_port(peer: DomId, remote: PortNumber) -> Result<PortNumber, Errno> {
    let mut argument = evtchn_bind_interdomain {
        remote_dom: peer.0,
        remote_port: remote.0,
        local_port: 0,
    };
    // SAFETY: as in `allocate_port`.
    unsafe {
        enter(
            __HYPERVISOR_event_channel_op,
            u64::from(EVTCHNOP_bind_interdomain),
            address(&mut argument),
            0,
        )
    }?;
    Ok(PortNumber(argument.local_port))
}

/// Closes a port of ours.
pub(crate) fn close_port(port: PortNumber) -> Result<(), Errno> {
    let mut argument = evtchn_close { port: port.0 };
    // SAFETY: as in `allocate_port`.
    unsafe {
        enter(
            __HYPERVISOR_event_channel_op,
            u64::from(EVTCHNOP_close),
            address(&mut argument),
            0,
        )
    }
    .map(drop)
}

/// Notifies the other end of a port of ours.
pub(crate) fn send_event(port: PortNumber) -> Result<(), Errno> {
    add(&EVENTS_SENT, 1);
    let mut argument = evtchn_send { port: port.0 };
    // SAFETY: as in `allocate_port`.
    unsafe {
        enter(
            __HYPERVISOR_event_channel_op,
            u64::from(EVTCHNOP_send),
            address(&mut argument),
            0,
        )
    }
    .map(drop)
}

/// Ports that one [`send_events`] can notify.
pub(crate) const SEND_EVENTS: usize = 64;

/// The memory of a [`send_events`] call: its entries and their arguments.
pub(crate) struct EventBatch {
    entries: [multicall_entry; SEND_EVENTS],
    ports: [evtchn_send; SEND_EVENTS],
}

impl EventBatch {
    pub(crate) const fn new() -> Self {
        const ENTRY: multicall_entry = multicall_entry {
            op: 0,
            result: 0,
            args: [0; 6],
        };
        const PORT: evtchn_send = evtchn_send { port: 0 };
        Self {
            entries: [ENTRY; SEND_EVENTS],
            ports: [PORT; SEND_EVENTS],
        }
    }
}

/// Notifies the other ends of at most [`SEND_EVENTS`] ports with one multicall; more are not notified.
///
/// Each entry's own result is not looked at: a peer that is gone is noticed elsewhere.
pub(crate) fn send_events(batch: &mut EventBatch, ports: &[PortNumber]) -> Result<(), Errno> {
    let mut count = 0u64;
    for ((entry, argument), port) in batch.entries.iter_mut().zip(&mut batch.ports).zip(ports) {
        argument.port = port.0;
        entry.op = u64::from(__HYPERVISOR_event_channel_op);
        entry.result = 0;
        entry.args = [u64::from(EVTCHNOP_send), address(argument), 0, 0, 0, 0];
        count = count.wrapping_add(1);
    }
    add(&EVENTS_SENT, count);
    // SAFETY: `count` entries are filled in, each with the address of its own argument in `batch`, which outlives the
    // call; Xen writes results into the entries and nothing else of ours but event bits.
    unsafe {
        enter(
            __HYPERVISOR_multicall,
            address(&mut batch.entries),
            count,
            0,
        )
    }
    .map(drop)
}

/// Sleeps until one of `ports` (at most 128) is pending, `deadline` has come, or for no reason.
pub(crate) fn poll(ports: &mut [u32], deadline: Option<Time>) -> Result<(), Errno> {
    let mut argument = sched_poll {
        ports: ports.as_mut_ptr(),
        // More than 128 is refused by Xen, so saturating loses nothing.
        nr_ports: u32::try_from(ports.len()).unwrap_or(u32::MAX),
        // Zero would mean no deadline.
        timeout: deadline.map_or(0, |deadline| deadline.0.max(1)),
    };
    // SAFETY: the argument and the ports it points to live until the call returns; Xen only reads them.
    unsafe {
        enter(
            __HYPERVISOR_sched_op,
            u64::from(SCHEDOP_poll),
            address(&mut argument),
            0,
        )
    }
    .map(drop)
}

/// Lets other domains run.
pub(crate) fn yield_now() {
    // SAFETY: takes no argument and changes no memory. It cannot fail.
    let _ = unsafe { enter(__HYPERVISOR_sched_op, u64::from(SCHEDOP_yield), 0, 0) };
}

/// How long processor 0, our only one, has been in which state.
pub(crate) fn runstate() -> Result<RunstateInfo, Errno> {
    let mut info = RunstateInfo::default();
    // SAFETY: the argument is what this command fills in.
    unsafe {
        enter(
            HYPERVISOR_VCPU_OP,
            u64::from(VCPUOP_GET_RUNSTATE_INFO),
            0,
            address(&mut info),
        )
    }
    .map(|_| info)
}

/// Ends the domain for `reason` (`SHUTDOWN_*`). Returns only when there is no Xen.
pub(crate) fn shut_down(reason: u32) {
    let mut argument = sched_shutdown { reason };
    // SAFETY: the argument is what this command takes. What it returns if it returns does not matter.
    let _ = unsafe {
        enter(
            __HYPERVISOR_sched_op,
            u64::from(SCHEDOP_shutdown),
            address(&mut argument),
            0,
        )
    };
}

/// Maps a peer's page.
///
/// # Safety
///
/// 1. `argument.host_addr` is the address of an empty hole frame that the caller owns.
pub(crate) unsafe fn map_grant(argument: &mut GnttabMapGrantRef) -> Result<(), Errno> {
    // SAFETY: the argument is what this command takes; the frame it fills is nobody's (obligation 1).
    unsafe {
        enter(
            __HYPERVISOR_grant_table_op,
            u64::from(GNTTABOP_MAP_GRANT_REF),
            address(argument),
            1,
        )
    }
    .map(drop)
}

/// Unmaps a peer's page.
///
/// # Safety
///
/// 1. Nothing reads or writes `argument.host_addr` any more.
pub(crate) unsafe fn unmap_grant(argument: &mut GnttabUnmapGrantRef) -> Result<(), Errno> {
    // SAFETY: the argument is what this command takes; the frame it empties is unused (obligation 1).
    unsafe {
        enter(
            __HYPERVISOR_grant_table_op,
            u64::from(GNTTABOP_UNMAP_GRANT_REF),
            address(argument),
            1,
        )
    }
    .map(drop)
}

/// Copies between peers' grants and frames of ours.
///
/// # Safety
///
/// 1. Every end that names a frame of ours names one that the caller owns exclusively for the duration of the call.
pub(crate) unsafe fn copy_grants(elements: &mut [GnttabCopy]) -> Result<(), Errno> {
    let count = elements.len() as u64;
    // SAFETY: `count` elements of the right layout; Xen writes their status, and memory that the caller owns
    // (obligation 1).
    unsafe {
        enter(
            __HYPERVISOR_grant_table_op,
            u64::from(GNTTABOP_COPY),
            elements.as_mut_ptr().expose_provenance() as u64,
            count,
        )
    }
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_xen_a_call_answers_enosys_and_is_counted() {
        let before = count();
        assert_eq!(hvm_param(1), Err(Errno(38)));
        assert!(count() > before);
    }

    #[test]
    fn a_batch_of_events_is_capped_at_its_entries() {
        let mut batch = EventBatch::new();
        let ports: alloc::vec::Vec<PortNumber> = (0..100).map(PortNumber).collect();
        assert!(send_events(&mut batch, &ports).is_err());
        assert_eq!(batch.ports[63].port, 63);
        assert_eq!(batch.entries[63].args[0], 4);
        assert_eq!(batch.entries[63].args[1], &raw const batch.ports[63] as u64);
    }
}
