//! The few processor instructions that have no name in Rust, one function each.
//!
//! Nothing here knows about Xen; what may trap is said at each function.

use core::arch::asm;
use core::arch::x86_64::__cpuid_count;

/// The four registers of a CPUID leaf: EAX, EBX, ECX, EDX.
pub(crate) type CpuidLeaf = [u32; 4];

/// Reads a CPUID leaf. Always traps into Xen: tens of microseconds under emulation.
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> CpuidLeaf {
    let result = __cpuid_count(leaf, subleaf);
    [result.eax, result.ebx, result.ecx, result.edx]
}

/// Reads the time stamp counter, after all earlier loads. May trap (`tsc_mode` of the domain).
///
/// RDTSCP is avoided: some emulators report its exit wrongly, and Xen then kills the domain.
pub(crate) fn tsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: LFENCE and RDTSC have no effect on memory; CR4.TSD is clear.
    unsafe {
        asm!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nostack, nomem, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Asks for a random number from the entropy source itself. `None`: it has none ready.
///
/// # Safety
///
/// 1. CPUID says that the processor has RDSEED; otherwise it faults.
pub(crate) unsafe fn rdseed() -> Option<u64> {
    let (value, ready): (u64, u8);
    // SAFETY: the instruction exists (obligation 1) and touches only the named registers and flags.
    unsafe {
        asm!("rdseed {}", "setc {}", out(reg) value, out(reg_byte) ready, options(nostack, nomem));
    }
    (ready != 0).then_some(value)
}

/// Asks for a random number from the processor's generator. `None`: it has none ready.
///
/// # Safety
///
/// 1. CPUID says that the processor has RDRAND; otherwise it faults.
pub(crate) unsafe fn rdrand() -> Option<u64> {
    let (value, ready): (u64, u8);
    // SAFETY: the instruction exists (obligation 1) and touches only the named registers and flags.
    unsafe {
        asm!("rdrand {}", "setc {}", out(reg) value, out(reg_byte) ready, options(nostack, nomem));
    }
    (ready != 0).then_some(value)
}

/// Writes a byte to an I/O port. Traps into Xen, which drops what no device takes.
///
/// # Safety
///
/// 1. Privilege level 0.
/// 2. Whatever listens at `port` does not touch our memory.
#[cfg(not(test))]
pub(crate) unsafe fn out_byte(port: u16, value: u8) {
    // SAFETY: allowed by obligation 1, harmless by obligation 2.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nostack, nomem, preserves_flags));
    }
}

/// Writes a model specific register.
///
/// # Safety
///
/// 1. Privilege level 0, and the register exists.
/// 2. The value leaves memory and control flow as the compiler expects them.
pub(crate) unsafe fn write_msr(register: u32, value: u64) {
    // Truncation on purpose: the instruction takes the value in two halves.
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    let low = u32::from_le_bytes([a, b, c, d]);
    let high = u32::from_le_bytes([e, f, g, h]);
    // SAFETY: by the caller's obligations. Memory is not declared untouched: a register may make Xen write some.
    unsafe {
        asm!("wrmsr", in("ecx") register, in("eax") low, in("edx") high, options(nostack, preserves_flags));
    }
}

/// Stops the processor for good. Interrupts are off, so nothing resumes it; Xen powers the domain off.
#[cfg(not(test))]
pub(crate) fn halt() -> ! {
    loop {
        // SAFETY: interrupts stay off and nothing runs afterwards; at privilege level 0 HLT does not fault.
        unsafe {
            asm!("cli", "hlt", options(nostack, nomem));
        }
    }
}
