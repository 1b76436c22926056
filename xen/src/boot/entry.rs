//! The first instructions: from the state that PVH leaves the processor in to Rust in long mode.
//!
//! At entry: 32-bit protected mode without paging, `ebx` the address of the start info, `esp` unusable, interrupts off.
//! The loader has zeroed what the file does not hold. The directories are filled as `page_tables` describes; CR0 gets
//! write protection at once, so that read-only means read-only for us too.
//!
//! Source: Xen `docs/misc/pvh.pandoc`, `public/elfnote.h`; Intel SDM volume 3, 9.8.5.

use core::arch::global_asm;

use super::cell::BootCell;
use super::page_tables::{ENTRIES, Table};

/// The tables, as the entry code and the processor see them. Sealed read-only after boot.
#[repr(C, align(4096))]
pub(super) struct Tables {
    /// PML4: one entry.
    pub(super) root: Table,
    /// One entry for each directory.
    pub(super) pointers: Table,
    /// Four directories of 2 MiB entries: 4 GiB.
    pub(super) directories: [Table; 4],
    /// The first 2 MiB page by page.
    pub(super) low: Table,
}

/// Filled by the entry code and then by [`super::start`].
#[unsafe(link_section = ".bss.sealed.page_tables")]
pub(super) static TABLES: BootCell<Tables> = BootCell::new(Tables {
    root: [0; ENTRIES],
    pointers: [0; ENTRIES],
    directories: [[0; ENTRIES]; 4],
    low: [0; ENTRIES],
});

/// The time stamp counter at the first instruction.
pub(super) static ENTRY_TSC: BootCell<u64> = BootCell::new(0);
/// The address of the start info.
pub(super) static START_INFO: BootCell<u32> = BootCell::new(0);

global_asm!(
    // The note that tells Xen (and `qemu -kernel`) where to enter. Eight bytes of address suit both.
    r#"
    .pushsection .note.Xen, "a", @note
    .balign 4
    .long 4, 8, {phys32_entry}
    .asciz "Xen"
    .quad portcullis_entry
    .popsection

    .pushsection .rodata.boot, "a", @progbits
    .balign 8
boot_gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF
    .quad 0x00CF93000000FFFF
boot_gdt_end:
boot_gdt_pointer:
    .word boot_gdt_end - boot_gdt - 1
    .long boot_gdt
    .balign 4
boot_mxcsr:
    .long 0x1F80                    # round to nearest, all exceptions masked
    .popsection

    .pushsection .text.entry, "ax", @progbits
    .code32
    .globl portcullis_entry
    .type portcullis_entry, @function
portcullis_entry:
    cli
    cld
    movl $stack_top, %esp
    rdtsc
    movl %eax, {entry_tsc}
    movl %edx, {entry_tsc} + 4
    movl %ebx, {start_info}

    # Root -> pointers -> four directories.
    movl ${tables}, %edi
    leal 0x1000 + 0x23(%edi), %eax
    movl %eax, (%edi)
    leal 0x2000 + 0x23(%edi), %eax
    xorl %ecx, %ecx
2:  movl %eax, 0x1000(%edi, %ecx, 8)
    addl $0x1000, %eax
    incl %ecx
    cmpl $4, %ecx
    jne 2b

    # 2,048 entries of 2 MiB: present, writable, accessed, dirty, large; not executable but for the first.
    movl $0xE3, %eax
    xorl %edx, %edx
    xorl %ecx, %ecx
3:  movl %eax, 0x2000(%edi, %ecx, 8)
    movl %edx, 0x2004(%edi, %ecx, 8)
    movl $0x80000000, %edx
    addl $0x200000, %eax
    incl %ecx
    cmpl $2048, %ecx
    jne 3b

    movl %edi, %cr3
    movl $0x620, %eax               # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $0xC0000080, %ecx          # EFER: LME, NXE
    movl $0x900, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x80010033, %eax          # PG, WP, NE, ET, MP, PE
    movl %eax, %cr0
    lgdt boot_gdt_pointer
    ljmp $8, $4f

    .code64
4:  movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    fninit                          # FPU and SSE state at entry are not specified
    ldmxcsr boot_mxcsr
    xorl %ebp, %ebp
    call {start}
    ud2
    .size portcullis_entry, . - portcullis_entry
    .popsection
"#,
    phys32_entry = const 18,
    entry_tsc = sym ENTRY_TSC,
    start_info = sym START_INFO,
    tables = sym TABLES,
    start = sym super::start,
    options(att_syntax)
);

const _: () = assert!(xen_sys::XEN_ELFNOTE_PHYS32_ENTRY == 18);
