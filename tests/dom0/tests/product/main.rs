//! The product's QubesDB client and qrexec agent against the double of dom0.

mod against_reference;
mod over_pipes;
mod over_xen;
mod world;
