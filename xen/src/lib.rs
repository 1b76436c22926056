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
//! | [`stream`] | byte rings (xenstore, console) behind one trait |
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

extern crate alloc;

pub mod hypervisor;
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
