//! What dom0 asks of the domain as a whole: shut down, reboot, and the odd system request.
//!
//! A command in `control/shutdown` is acknowledged by writing an empty value, then acted upon. What we can do is
//! advertised first (`control/feature-poweroff`, `control/feature-reboot`): the toolstack of Qubes refuses a
//! command that is not. Suspend is not advertised; should it be asked for, it is acknowledged and ignored.
//!
//! Source: libxl (`libxl_domain.c`), Xen `docs/misc/xenstore-paths.pandoc`.

use alloc::string::String;

/// How the domain shall end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shutdown {
    /// Power off.
    Poweroff,
    /// Halt: for a domain the same as power off.
    Halt,
    /// Reboot.
    Reboot,
}

/// A request of dom0 to the domain as a whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ControlEvent {
    /// Who we are: told once, after the store has answered for the first time.
    Identity {
        /// The domain's name; empty when not readable. At most 64 characters, printable.
        name: String,
        /// `memory/target` in KiB, when readable.
        memory_target_kib: Option<u64>,
    },
    /// End now. Already acknowledged.
    Shutdown(Shutdown),
    /// A `control/sysrq` character. Already cleared.
    SysRq(u8),
}
