#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]
//! Thin composition of the drivers and the engine; the only crate that knows both a ring and a rule.
//!
//! # Shape
//!
//! | module | what |
//! | --- | --- |
//! | [`machine`] | [`Firewall`](machine::Firewall): one step of the whole, called in a loop |
//! | [`data_path`] | frames from ring to ring: drivers, copy batch, filter |
//! | [`filter`] | engine, resolver and settings as one, without drivers; what `xtask fwsim` runs, too |
//! | [`devices`] | obeys the xenbus handshakes: connects and disconnects drivers |
//! | [`settings`] | what dom0 says, put in force: addresses, resolvers, rules |
//! | [`source`] | whether QubesDB or xenstore configures us |
//! | [`qubes_link`], `operator` | QubesDB and qrexec, and what calls from dom0 act on |
//! | [`snapshot`] | everything that can be seen from outside, as one encodable value |
//! | [`command`] | the operator's commands, which render a snapshot |
//! | `rates` | bits a second of each client |
//! | `json` | the same for programs |
//! | [`terminal`], [`logger`] | the console: lines in, text and log lines out, all bounded |
//! | [`plan`] | how memory is shared out |
//! | [`pace`] | when to let frames gather before looking again |
//!
//! The library runs over any [`xen::Hypervisor`]: in the image over Xen, in tests over the fake. The image's
//! binary (`main.rs`, feature `image`) adds the entry, the heap and the panic handler, and nothing else.

extern crate alloc;

#[cfg(feature = "blocks")]
#[doc(hidden)]
pub mod blocks;
pub mod command;
pub mod data_path;
pub mod devices;
mod egress;
pub mod filter;
mod json;
pub mod logger;
pub mod machine;
mod observe;
mod offload;
mod operator;
pub mod pace;
pub mod plan;
pub mod qubes_link;
mod rates;
pub mod settings;
pub mod snapshot;
pub mod source;
pub mod terminal;
