//! The guest side of the Xen ABI, and the only home of `unsafe` beside the kernel's entry.
//!
//! # Shape
//!
//! | module | what |
//! | --- | --- |
//! | [`types`] | identifiers that must not be mixed up: [`DomId`], [`GrantRef`], [`PortNumber`], [`Time`] |
//! | [`hypervisor`] | the [`Hypervisor`] trait: everything a driver may ask of Xen |
//! | [`page`] | [`Page`] (ours alone), [`GrantedPage`] (a peer may touch it), [`MappedPage`] (a peer's) |
//! | [`shared`] | [`SharedPage`]: volatile, copy-once access to memory that a peer writes at the same time |
//! | [`ring`] | request/response rings for both roles, with private indices |
//! | [`netif`] | the slots of the network protocol, encoded and decoded byte by byte |
//! | [`packet`] | [`Frame`]: what both drivers pass on, a frame in pages of ours |
//! | [`log_line`] | macros for log lines, of less code than those of the `log` crate |
//! | [`stream`] | byte rings (xenstore, console) behind one trait |
//! | `guest` | the real [`Hypervisor`]: grants, events, time; what the image starts with. Feature `guest` |
//! | `boot` | PVH entry, page tables, exceptions, start info. Feature `guest` |
//! | `console`, `store` | the rings that the toolstack gives every domain. Feature `guest` |
//! | `shutdown` | the ends of the domain. Feature `guest` |
//!
//! # The type states of a page
//!
//! A [`Page`] is owned memory: it derefs to its 4,096 bytes and nobody else can reach it. Granting
//! consumes it; the resulting [`GrantedPage`] offers no slice, only a [`SharedPage`]. Revoking gives
//! the `Page` back, or refuses while the peer still holds it. A driver therefore cannot read a page
//! that its peer may still change, nor hand out one that it is still reading.
//!
//! Grant copies take `&mut [Page]` and name pages by their index in that slice, so the borrow
//! checker knows that nobody looks at a page while Xen writes it.
#![cfg_attr(not(any(test, feature = "fake")), no_std)]
#![cfg_attr(
    not(feature = "guest"),
    allow(
        dead_code,
        reason = "the host uses what the fake and the tests need; only the image uses everything"
    )
)]

extern crate alloc;

// The guest side compiles for tests too, so that its pure parts are tested on the host; what needs the image's linker
// script or privilege level 0 is left out there.
macro_rules! guest_modules {
    ($($(#[$attribute:meta])* $visibility:vis mod $name:ident;)*) => {
        $(
            #[cfg(all(target_arch = "x86_64", any(test, feature = "guest")))]
            $(#[$attribute])*
            $visibility mod $name;
        )*
    };
}

guest_modules! {
    pub(crate) mod abi;
    pub mod boot;
    pub(crate) mod byte_ring;
    pub(crate) mod clock;
    pub mod console;
    pub(crate) mod copy;
    pub(crate) mod cpu;
    pub mod discovery;
    pub mod entropy;
    pub(crate) mod grant;
    pub mod guest;
    pub(crate) mod hole;
    pub(crate) mod hypercall;
    pub mod memory;
    pub(crate) mod shared_info;
    pub mod shutdown;
    pub mod store;
}

#[cfg(any(test, feature = "fake"))]
pub mod fake;
#[cfg(test)]
mod testing;

pub mod hypervisor;
pub mod log_line;
pub mod netif;
pub mod packet;
pub mod page;
pub mod ring;
pub mod shared;
pub mod stream;
pub mod types;

pub use hypervisor::{Access, CopyDirection, CopyOp, Hypervisor, HypervisorCounters};
pub use packet::{Checksum, Fragment, Frame, Gso};
pub use page::{GrantedPage, MappedPage, PAGE_SIZE, Page, Port};
pub use shared::SharedPage;
pub use types::{DomId, Errno, GrantRef, GrantStatus, PortNumber, Time};
