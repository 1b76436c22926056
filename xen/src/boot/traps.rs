//! Processor exceptions: all are fatal, and all say what and where before the domain ends.
//!
//! Interrupts are never enabled, so nothing else comes through the table. Every gate switches to the exception stack,
//! so that a stack that ran into its guard is reported like any other fault instead of resetting the machine.
//!
//! Source: Intel SDM volume 3, chapters 6 and 7.

use core::arch::{asm, global_asm};
use core::fmt;

use super::cell::BootCell;
use super::image;
use crate::shutdown::die;

/// Exceptions that the architecture defines.
const VECTORS: usize = 32;
const _: () = assert!(size_of::<[[u64; 2]; VECTORS]>() == 32 * 16);
/// Bytes between two stubs.
const STUB_BYTES: u64 = 16;

/// Selector of the 64-bit code segment.
const CODE_SELECTOR: u16 = 8;
/// Selector of the data segment.
const DATA_SELECTOR: u16 = 16;
/// Selector of the task state segment.
const TASK_SELECTOR: u16 = 24;

/// Descriptor of the code segment: 64-bit, execute and read, accessed.
const CODE: u64 = 0x00AF_9B00_0000_FFFF;
/// Descriptor of the data segment: read and write, accessed.
const DATA: u64 = 0x00CF_9300_0000_FFFF;

/// A gate: present, privilege 0, interrupt gate, first stack of the task state segment.
const GATE_FLAGS: u64 = 0x8E01;

/// Null, code, data, and two words of task state segment.
#[unsafe(link_section = ".bss.sealed.gdt")]
static GDT: BootCell<[u64; 5]> = BootCell::new([0; 5]);

#[unsafe(link_section = ".bss.sealed.idt")]
static IDT: BootCell<[[u64; 2]; VECTORS]> = BootCell::new([[0; 2]; VECTORS]);

/// 104 bytes; only the first interrupt stack, in words 9 and 10, and the absent I/O map count.
#[unsafe(link_section = ".bss.sealed.tss")]
static TSS: BootCell<[u32; 26]> = BootCell::new([0; 26]);

/// What LGDT and LIDT take.
#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

unsafe extern "C" {
    static exception_stubs: u8;
}

global_asm!(
    r#"
    .pushsection .text.exceptions, "ax", @progbits
    .balign 16
exception_stubs:
    # Vectors with an error code: 8, 10 to 14, 17, 21, 29, 30. The others get a zero in its place.
    .irp vector, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    .balign 16
    .if ((0x60227D00 >> \vector) & 1) == 0
    pushq $0
    .endif
    pushq $\vector
    jmp exception_common
    .endr

    .balign 16
exception_common:
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rbx
    pushq %rbp
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    cld
    movq %rsp, %rdi
    call {report}
    ud2
    .popsection
"#,
    report = sym report,
    options(att_syntax)
);

/// What the stubs and the processor pushed, lowest address first.
#[repr(C)]
struct Frame {
    r15: u64,
    r14: u64,
    r13: u64,
    r12: u64,
    r11: u64,
    r10: u64,
    r9: u64,
    r8: u64,
    rdi: u64,
    rsi: u64,
    rbp: u64,
    rbx: u64,
    rdx: u64,
    rcx: u64,
    rax: u64,
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// The low and high word of a gate to `handler`.
const fn gate(handler: u64) -> [u64; 2] {
    let low = (handler & 0xFFFF)
        | (CODE_SELECTOR as u64) << 16
        | GATE_FLAGS << 32
        | (handler >> 16 & 0xFFFF) << 48;
    [low, handler >> 32]
}

/// The two words of a descriptor of an available 64-bit task state segment at `base`.
const fn task_descriptor(base: u64) -> [u64; 2] {
    let limit = (size_of::<[u32; 26]>() - 1) as u64;
    let low = limit | (base & 0xFF_FFFF) << 16 | 0x89 << 40 | (base >> 24 & 0xFF) << 56;
    [low, base >> 32]
}

/// Fills the tables and makes the processor use them.
///
/// # Safety
///
/// 1. Called once, at boot, before the tables are sealed.
pub(super) unsafe fn install() {
    let stubs = (&raw const exception_stubs).expose_provenance() as u64;
    let mut gates = [[0; 2]; VECTORS];
    let mut handler = stubs;
    for entry in &mut gates {
        *entry = gate(handler);
        handler = handler.wrapping_add(STUB_BYTES);
    }
    let [stack_low, stack_high] = {
        let [a, b, c, d, e, f, g, h] = image::exception_stack_top_address().to_le_bytes();
        [
            u32::from_le_bytes([a, b, c, d]),
            u32::from_le_bytes([e, f, g, h]),
        ]
    };
    let mut task = [0; 26];
    [task[9], task[10], task[25]] = [stack_low, stack_high, 104 << 16];
    let [task_low, task_high] = task_descriptor(TSS.get().expose_provenance() as u64);

    // SAFETY: nothing else accesses it (obligation 1).
    unsafe { IDT.get().write(gates) };
    // SAFETY: as above.
    unsafe { TSS.get().write(task) };
    // SAFETY: as above.
    unsafe { GDT.get().write([0, CODE, DATA, task_low, task_high]) };
    let gdt = TablePointer {
        limit: 5 * 8 - 1,
        base: GDT.get().expose_provenance() as u64,
    };
    let idt = TablePointer {
        limit: 32 * 16 - 1,
        base: IDT.get().expose_provenance() as u64,
    };
    // SAFETY: both pointers describe valid tables. The new code and data segments are those in use, at the same places
    // in the table, so nothing changes for running code; the task register is loaded with an available segment.
    unsafe {
        asm!(
            "lgdt [{gdt}]",
            "lidt [{idt}]",
            "mov ss, {data:x}",
            "ltr {task:x}",
            gdt = in(reg) &raw const gdt,
            idt = in(reg) &raw const idt,
            data = in(reg) DATA_SELECTOR,
            task = in(reg) TASK_SELECTOR,
            options(nostack, preserves_flags),
        );
    }
}

/// Reads the address of the last page fault.
fn fault_address() -> u64 {
    let address;
    // SAFETY: reading CR2 has no effect.
    unsafe { asm!("mov {}, cr2", out(reg) address, options(nostack, nomem, preserves_flags)) };
    address
}

/// The name of an exception, as manuals write it.
struct Name(u64);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            0 => "#DE divide error",
            1 => "#DB debug",
            2 => "NMI",
            3 => "#BP breakpoint",
            6 => "#UD invalid opcode",
            8 => "#DF double fault",
            10 => "#TS invalid task state segment",
            11 => "#NP segment not present",
            12 => "#SS stack segment fault",
            13 => "#GP general protection fault",
            14 => "#PF page fault",
            16 => "#MF floating point error",
            17 => "#AC alignment check",
            18 => "#MC machine check",
            19 => "#XM SIMD floating point error",
            vector => return write!(f, "exception {vector}"),
        };
        f.write_str(name)
    }
}

/// Describes the fault and ends the domain.
extern "C" fn report(frame: &Frame) -> ! {
    let address = fault_address();
    let cause = match (frame.vector, address) {
        (14, 0..4096) => ": null pointer",
        // A push into the guard is a page fault whose own push went to the exception stack.
        (8 | 14, address) if image::is_in_guard(address) => ": stack overflow",
        _ => "",
    };
    die(format_args!(
        "\nportcullis: processor exception {}{cause}\n  \
         error {:#x} rip {:#x} rsp {:#x} rflags {:#x} cr2 {address:#x} cs {:#x} ss {:#x}\n  \
         rax {:x} rbx {:x} rcx {:x} rdx {:x} rsi {:x} rdi {:x} rbp {:x}\n  \
         r8 {:x} r9 {:x} r10 {:x} r11 {:x} r12 {:x} r13 {:x} r14 {:x} r15 {:x}",
        Name(frame.vector),
        frame.error,
        frame.rip,
        frame.rsp,
        frame.rflags,
        frame.cs,
        frame.ss,
        frame.rax,
        frame.rbx,
        frame.rcx,
        frame.rdx,
        frame.rsi,
        frame.rdi,
        frame.rbp,
        frame.r8,
        frame.r9,
        frame.r10,
        frame.r11,
        frame.r12,
        frame.r13,
        frame.r14,
        frame.r15,
    ))
}
