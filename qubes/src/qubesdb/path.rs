//! Keys that we may write or remove, valid by construction.
//!
//! Source: QubesOS core-qubesdb `daemon/db-cmds.c` (`verify_hdr`): a bad path ends dom0's daemon.

use core::fmt;

/// The longest path in bytes, without the terminating NUL.
pub const PATH_MAX: usize = 63;

/// Why a text is no path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PathError {
    /// Longer than [`PATH_MAX`] bytes.
    TooLong,
    /// Does not begin with `/`, ends with `/`, or has a character outside `[A-Za-z0-9_./:@-]`.
    Malformed,
}

/// A key: 2 to 63 bytes, begins with `/`, does not end with `/`, allowed characters only.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Path {
    /// Zero behind `len`.
    bytes: [u8; PATH_MAX],
    len: u8,
}

const fn is_allowed(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'/' | b'.' | b':' | b'@' | b'-')
}

impl Path {
    /// Checks a text.
    ///
    /// # Errors
    ///
    /// [`PathError`], with its reason.
    pub fn new(text: &str) -> Result<Self, PathError> {
        let len = u8::try_from(text.len()).map_err(|_| PathError::TooLong)?;
        let mut bytes = [0; PATH_MAX];
        let Some(place) = bytes.get_mut(..text.len()) else {
            return Err(PathError::TooLong);
        };
        place.copy_from_slice(text.as_bytes());
        let well_formed = len >= 2
            && text.starts_with('/')
            && !text.ends_with('/')
            && text.bytes().all(is_allowed);
        if well_formed {
            Ok(Self { bytes, len })
        } else {
            Err(PathError::Malformed)
        }
    }

    /// The path as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.bytes
            .get(..usize::from(self.len))
            .and_then(|bytes| core::str::from_utf8(bytes).ok())
            .unwrap_or_default()
    }

    /// Whether this key lies below `directory`, which has no slash at its end: `/a/b` is below `/a`, `/ab` is not.
    #[must_use]
    pub fn is_below(&self, directory: &str) -> bool {
        self.as_str()
            .strip_prefix(directory)
            .is_some_and(|rest| rest.starts_with('/'))
    }
}

impl fmt::Debug for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;

    #[test]
    fn q7_paths_that_end_the_daemon_cannot_be_built() {
        for bad in [
            "", "/", "a", "qubes-ip", "/a/", "/a b", "/a\0", "/ä", "/a,b", "/a'", "/a\n", "/{x}",
            "-/a",
        ] {
            assert_eq!(Path::new(bad), Err(PathError::Malformed), "{bad:?}");
        }
        let longest: String = core::iter::once('/')
            .chain(core::iter::repeat_n('x', 62))
            .collect();
        assert_eq!(Path::new(&longest).map(|path| path.as_str().len()), Ok(63));
        let longer: String = core::iter::once('/')
            .chain(core::iter::repeat_n('x', 63))
            .collect();
        assert_eq!(Path::new(&longer), Err(PathError::TooLong));
        let longest_ever: String = core::iter::once('/')
            .chain(core::iter::repeat_n('x', 300))
            .collect();
        assert_eq!(Path::new(&longest_ever), Err(PathError::TooLong));
    }

    #[test]
    fn paths_of_the_firewall_are_fine() {
        for good in [
            "/qubes-iptables-error",
            "/dns/10.137.0.9/example.com",
            "/qubes-firewall-handled/fd09:24ef:4179::a89:a",
        ] {
            assert_eq!(Path::new(good).expect("allowed").as_str(), good);
        }
    }

    #[test]
    fn below_means_behind_a_slash() {
        let path = Path::new("/dns/10.0.0.1/a").unwrap();
        assert!(path.is_below("/dns"));
        assert!(path.is_below("/dns/10.0.0.1"));
        assert!(!path.is_below("/dns/10.0.0"));
        assert!(!path.is_below("/dns/10.0.0.1/a"));
    }
}
