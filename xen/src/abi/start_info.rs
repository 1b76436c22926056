//! The PVH start info and its tables. `xen-sys` has only the PV one.
//!
//! Source: Xen `public/arch-x86/hvm/start_info.h`.

use super::assert_layout;

/// `magic` of [`HvmStartInfo`].
pub(crate) const XEN_HVM_START_MAGIC_VALUE: u32 = 0x336E_C578;
/// Type of a [`HvmMemmapEntry`]: usable memory.
pub(crate) const XEN_HVM_MEMMAP_TYPE_RAM: u32 = 1;

/// `hvm_start_info`, 56 bytes since version 1, 40 in version 0.
#[repr(C)]
pub(crate) struct HvmStartInfo {
    pub(crate) magic: u32,
    pub(crate) version: u32,
    pub(crate) flags: u32,
    pub(crate) nr_modules: u32,
    pub(crate) modlist_paddr: u64,
    pub(crate) cmdline_paddr: u64,
    pub(crate) rsdp_paddr: u64,
    pub(crate) memmap_paddr: u64,
    pub(crate) memmap_entries: u32,
    pub(crate) reserved: u32,
}
assert_layout!(
    HvmStartInfo, size 56,
    magic at 0, version at 4, flags at 8, nr_modules at 12, modlist_paddr at 16, cmdline_paddr at 24,
    rsdp_paddr at 32, memmap_paddr at 40, memmap_entries at 48, reserved at 52,
);

/// `hvm_memmap_table_entry`, 24 bytes.
#[repr(C)]
pub(crate) struct HvmMemmapEntry {
    pub(crate) addr: u64,
    pub(crate) size: u64,
    pub(crate) kind: u32,
    pub(crate) reserved: u32,
}
assert_layout!(HvmMemmapEntry, size 24, addr at 0, size at 8, kind at 16, reserved at 20);
