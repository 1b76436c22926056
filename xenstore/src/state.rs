//! The states of a xenbus device, as both sides publish them in their `state` node.
//!
//! Source: Xen `public/io/xenbus.h`.

use core::fmt;

/// The state of one side of a device.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[repr(u8)]
pub enum XenbusState {
    /// The node is missing, unreadable or not one of the numbers below.
    #[default]
    Unknown = 0,
    /// The side has not begun.
    Initialising = 1,
    /// The backend has published its features and waits for the frontend.
    InitWait = 2,
    /// The frontend has published its rings (other device classes; ignored here).
    Initialised = 3,
    /// The data path may run.
    Connected = 4,
    /// The side is about to stop.
    Closing = 5,
    /// The side has stopped.
    Closed = 6,
    /// Only used by an extension that we do not offer.
    Reconfiguring = 7,
    /// Only used by an extension that we do not offer.
    Reconfigured = 8,
}

impl XenbusState {
    /// Reads the value of a `state` node: exactly one ASCII digit `1..=8`, anything else is `Unknown`.
    #[must_use]
    pub const fn parse(value: &[u8]) -> Self {
        match value {
            b"1" => Self::Initialising,
            b"2" => Self::InitWait,
            b"3" => Self::Initialised,
            b"4" => Self::Connected,
            b"5" => Self::Closing,
            b"6" => Self::Closed,
            b"7" => Self::Reconfiguring,
            b"8" => Self::Reconfigured,
            _ => Self::Unknown,
        }
    }

    /// The value to write into a `state` node.
    #[must_use]
    pub const fn as_text(self) -> &'static str {
        match self {
            Self::Unknown => "0",
            Self::Initialising => "1",
            Self::InitWait => "2",
            Self::Initialised => "3",
            Self::Connected => "4",
            Self::Closing => "5",
            Self::Closed => "6",
            Self::Reconfiguring => "7",
            Self::Reconfigured => "8",
        }
    }
}

impl fmt::Display for XenbusState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?} ({})", self.as_text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_single_digit_from_one_to_eight_is_a_state() {
        for (digit, state) in [
            (b"1", XenbusState::Initialising),
            (b"4", XenbusState::Connected),
        ] {
            assert_eq!(XenbusState::parse(digit), state);
            assert_eq!(state.as_text().as_bytes(), digit);
        }
        for junk in [
            &b""[..],
            b"0",
            b"9",
            b"4x",
            b"-1",
            b" 4",
            b"4\0",
            b"04",
            b"99999999999",
            &[0xFF; 1900],
        ] {
            assert_eq!(XenbusState::parse(junk), XenbusState::Unknown, "{junk:?}");
        }
    }
}
