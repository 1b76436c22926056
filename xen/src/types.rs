//! Identifiers and small values of the Xen interface, each its own type where a swap would compile.

use core::fmt;
use core::time::Duration;

/// A domain identifier, `0..=0x7FEF` for real domains.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DomId(pub u16);

impl DomId {
    /// The control domain.
    pub const DOM0: Self = Self(0);
    /// The calling domain itself, in hypercall arguments (`DOMID_SELF`).
    pub const SELF: Self = Self(0x7FF0);
}

impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A grant reference: an index into the granting domain's grant table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GrantRef(pub u32);

/// The number of an event channel port of some domain, without ownership (see [`crate::Port`]).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PortNumber(pub u32);

/// Xen system time: nanoseconds since the host booted. Monotonic.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Time(pub u64);

impl Time {
    /// The time `after` later, saturating at the end of time.
    #[must_use]
    pub const fn plus(self, after: Duration) -> Self {
        let nanos = after.as_nanos();
        if nanos > u64::MAX as u128 {
            return Self(u64::MAX);
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "compared with u64::MAX above"
        )]
        Self(self.0.saturating_add(nanos as u64))
    }

    /// How long `self` is after `earlier`; zero when it is not.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// An error that a hypercall returned, as the positive errno number (Linux numbering).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Errno(pub i32);

impl Errno {
    /// Operation not permitted.
    pub const EPERM: Self = Self(1);
    /// No such object.
    pub const ENOENT: Self = Self(2);
    /// No such domain.
    pub const ESRCH: Self = Self(3);
    /// Out of memory.
    pub const ENOMEM: Self = Self(12);
    /// Bad address.
    pub const EFAULT: Self = Self(14);
    /// Invalid argument.
    pub const EINVAL: Self = Self(22);
    /// No space left: a table of the hypervisor is full.
    pub const ENOSPC: Self = Self(28);
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "errno {}", self.0)
    }
}

/// The per-element status of a grant operation. Zero is success.
///
/// Source: `grant_table.h` (`GNTST_*`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct GrantStatus(pub i16);

impl GrantStatus {
    /// Success.
    pub const OKAY: Self = Self(0);
    /// Undefined or contended entry.
    pub const GENERAL_ERROR: Self = Self(-1);
    /// The domain is gone or wrong.
    pub const BAD_DOMAIN: Self = Self(-2);
    /// The reference is beyond the peer's table.
    pub const BAD_GNTREF: Self = Self(-3);
    /// Not granted to us, or a write to a read-only grant.
    pub const PERMISSION_DENIED: Self = Self(-8);
    /// Offset and length cross a page.
    pub const BAD_COPY_ARG: Self = Self(-10);
    /// What [`crate::CopyOp`] starts with, so that an element that Xen never reached is noticed.
    pub const NOT_DONE: Self = Self(i16::MIN);

    /// Whether the operation succeeded.
    #[must_use]
    pub const fn is_ok(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for GrantStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "grant status {}", self.0)
    }
}
