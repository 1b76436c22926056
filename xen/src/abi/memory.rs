//! Guest-physical memory operations and HVM parameters. `xen-sys` has none of this.
//!
//! Source: Xen `public/memory.h`, `public/hvm/hvm_op.h`, `public/hvm/params.h`.

use super::assert_layout;

/// Returns how many pages the domain has. Argument: a domain id (`u16`).
pub(crate) const XENMEM_CURRENT_RESERVATION: u32 = 3;
/// Puts a page of Xen's at a guest frame. Argument: [`AddToPhysmap`].
pub(crate) const XENMEM_ADD_TO_PHYSMAP: u32 = 7;
/// Space of [`AddToPhysmap`]: the shared info page, index 0.
pub(crate) const XENMAPSPACE_SHARED_INFO: u32 = 0;
/// Space of [`AddToPhysmap`]: frames of our grant table by index.
pub(crate) const XENMAPSPACE_GRANT_TABLE: u32 = 1;

/// `xen_add_to_physmap`, 24 bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct AddToPhysmap {
    pub(crate) domid: u16,
    pub(crate) size: u16,
    pub(crate) space: u32,
    pub(crate) idx: u64,
    pub(crate) gpfn: u64,
}
assert_layout!(AddToPhysmap, size 24, domid at 0, size at 2, space at 4, idx at 8, gpfn at 16);

/// Reads a parameter. Argument: [`HvmParam`].
pub(crate) const HVMOP_GET_PARAM: u32 = 1;
/// Frame of the xenstore ring.
pub(crate) const HVM_PARAM_STORE_PFN: u32 = 1;
/// Our port to xenstore.
pub(crate) const HVM_PARAM_STORE_EVTCHN: u32 = 2;
/// Frame of the console ring.
pub(crate) const HVM_PARAM_CONSOLE_PFN: u32 = 17;
/// Our port to the console daemon.
pub(crate) const HVM_PARAM_CONSOLE_EVTCHN: u32 = 18;

/// `xen_hvm_param`, 16 bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct HvmParam {
    pub(crate) domid: u16,
    pub(crate) padding: u16,
    pub(crate) index: u32,
    pub(crate) value: u64,
}
assert_layout!(HvmParam, size 16, domid at 0, index at 4, value at 8);
