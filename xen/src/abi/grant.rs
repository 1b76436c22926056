//! Grant table operations and entries, version 1. `xen-sys` has none of this.
//!
//! Source: Xen `public/grant_table.h`.

use super::assert_layout;

/// Maps peers' pages. Argument: [`GnttabMapGrantRef`].
pub(crate) const GNTTABOP_MAP_GRANT_REF: u32 = 0;
/// Unmaps them. Argument: [`GnttabUnmapGrantRef`].
pub(crate) const GNTTABOP_UNMAP_GRANT_REF: u32 = 1;
/// Copies between pages. Argument: [`GnttabCopy`].
pub(crate) const GNTTABOP_COPY: u32 = 5;

/// Flag of an entry: the peer may access the page.
pub(crate) const GTF_PERMIT_ACCESS: u16 = 1;
/// Flag of an entry: the peer may only read.
pub(crate) const GTF_READONLY: u16 = 1 << 2;
/// Flag of an entry, set by Xen: in use for reading.
pub(crate) const GTF_READING: u16 = 1 << 3;
/// Flag of an entry, set by Xen: in use for writing.
pub(crate) const GTF_WRITING: u16 = 1 << 4;

/// Flag of a map: make the page reachable at `host_addr`.
pub(crate) const GNTMAP_HOST_MAP: u32 = 1 << 1;

/// Flag of a copy: the source is a grant reference.
pub(crate) const GNTCOPY_SOURCE_GREF: u16 = 1 << 0;
/// Flag of a copy: the destination is a grant reference.
pub(crate) const GNTCOPY_DEST_GREF: u16 = 1 << 1;

/// Bytes of a version 1 entry: `flags u16@0, domid u16@2, frame u32@4`.
pub(crate) const ENTRY_BYTES: usize = 8;
/// Offset of the domain id in an entry.
pub(crate) const ENTRY_DOMID: usize = 2;
/// Offset of the frame number in an entry.
pub(crate) const ENTRY_FRAME: usize = 4;
/// References below this are the toolstack's (console and xenstore among them).
pub(crate) const GNTTAB_NR_RESERVED_ENTRIES: u32 = 8;

/// One end of a copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub(crate) struct CopyEnd {
    /// A grant reference in the low 32 bits, or a frame number of ours.
    pub(crate) frame: u64,
    /// Who granted it, or `DOMID_SELF`.
    pub(crate) domid: u16,
    /// Bytes into the page.
    pub(crate) offset: u16,
    pub(crate) padding: u32,
}
assert_layout!(CopyEnd, size 16, frame at 0, domid at 8, offset at 10);

/// One element of a copy (`gnttab_copy`, 40 bytes).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub(crate) struct GnttabCopy {
    pub(crate) source: CopyEnd,
    pub(crate) dest: CopyEnd,
    pub(crate) len: u16,
    pub(crate) flags: u16,
    pub(crate) status: i16,
    pub(crate) padding: u16,
}
assert_layout!(GnttabCopy, size 40, source at 0, dest at 16, len at 32, flags at 34, status at 36);

/// `gnttab_map_grant_ref`, 32 bytes.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct GnttabMapGrantRef {
    pub(crate) host_addr: u64,
    pub(crate) flags: u32,
    pub(crate) gref: u32,
    pub(crate) dom: u16,
    pub(crate) status: i16,
    pub(crate) handle: u32,
    pub(crate) dev_bus_addr: u64,
}
assert_layout!(
    GnttabMapGrantRef, size 32,
    host_addr at 0, flags at 8, gref at 12, dom at 16, status at 18, handle at 20, dev_bus_addr at 24,
);

/// `gnttab_unmap_grant_ref`, 24 bytes.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct GnttabUnmapGrantRef {
    pub(crate) host_addr: u64,
    pub(crate) dev_bus_addr: u64,
    pub(crate) handle: u32,
    pub(crate) status: i16,
    pub(crate) padding: u16,
}
assert_layout!(
    GnttabUnmapGrantRef, size 24,
    host_addr at 0, dev_bus_addr at 8, handle at 16, status at 20,
);
