//! dom0's side of the Qubes protocols: a QubesDB daemon and a qrexec daemon for one VM, as strict as the real ones.
//!
//! # Shape
//!
//! | module | what |
//! | --- | --- |
//! | [`wire`] | both wire formats, independent of the product's |
//! | [`qubesdb`] | the QubesDB daemon |
//! | [`qrexec`] | the qrexec daemon, with [`caller`] (dom0 calls the VM) and [`service`] (the VM calls dom0) |
//! | [`dom0`] | both daemons, and what qubesd writes through them |
//! | [`scenario`] | what is to happen and to be seen, as text |
//!
//! vchans in the lab. Nothing waits; time is read from the channels.
//!
//! # Strictness
//!
//! What ends a real daemon for good ends the test, and so do mistakes that a real daemon survives but a product must
//! not make, such as reporting the end of a call twice.
#![deny(unsafe_code)]

pub mod caller;
pub mod dom0;
pub mod linux;
pub mod qrexec;
pub mod qubesdb;
pub mod scenario;
pub mod service;
pub mod wire;
