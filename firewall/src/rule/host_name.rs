//! Host names as rules name them: which ones there can be, and which ones DNS can have.
//!
//! Source: `qubes-policy.md` 2.5; RFC 1035 2.3.4.

use alloc::sync::Arc;
use core::fmt;

/// Longest host name that DNS can carry, in bytes of text without a final dot (RFC 1035 2.3.4).
const MAX_DNS_NAME_LEN: usize = 253;

/// Longest label of a host name in bytes (RFC 1035 2.3.4).
const MAX_DNS_LABEL_LEN: usize = 63;

/// A host name as a rule gives it: not empty, made of `a-z 0-9 - . _`.
///
/// dom0 checks the characters and nothing else, so a name may still be impossible in DNS; see
/// [`HostName::is_resolvable`]. Cloning shares the text.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostName(Arc<str>);

impl HostName {
    /// Takes a name; upper case is folded, because names in DNS have no case.
    ///
    /// # Errors
    ///
    /// [`HostNameError`] for an empty name or a character that a name cannot have.
    pub fn new(text: &str) -> Result<Self, HostNameError> {
        if text.is_empty() {
            return Err(HostNameError::Empty);
        }
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
        if !text.bytes().all(allowed) {
            return Err(HostNameError::BadCharacter);
        }
        if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Ok(Self(Arc::from(text.to_ascii_lowercase())));
        }
        Ok(Self(Arc::from(text)))
    }

    /// The name in lower case.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether DNS could have an answer: the lengths fit, no label is empty (but one final dot is
    /// fine) and the last label is not a number.
    ///
    /// Names that end in a number (`10.1`, `0x7f.1`) are what a C library would read as an address.
    /// Here they are names that never resolve (`qubes-policy.md` 2.5).
    pub fn is_resolvable(&self) -> bool {
        let name = self.0.strip_suffix('.').unwrap_or(&self.0);
        let mut last = name;
        for label in name.split('.') {
            if !(1..=MAX_DNS_LABEL_LEN).contains(&label.len()) {
                return false;
            }
            last = label;
        }
        name.len() <= MAX_DNS_NAME_LEN && !is_number(last)
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a C library reads `label` as a number: decimal or octal digits, or `0x` and hex digits.
fn is_number(label: &str) -> bool {
    let all_hex = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    label.bytes().all(|byte| byte.is_ascii_digit()) || label.strip_prefix("0x").is_some_and(all_hex)
}

/// Why a text is not a host name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostNameError {
    /// There is no text.
    Empty,
    /// A byte is not one of `A-Z a-z 0-9 - . _`.
    BadCharacter,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_have_only_name_characters() {
        assert_eq!(HostName::new(""), Err(HostNameError::Empty));
        assert_eq!(HostName::new("a b"), Err(HostNameError::BadCharacter));
        assert_eq!(HostName::new("ä.example"), Err(HostNameError::BadCharacter));
        assert_eq!(
            HostName::new("WWW.Example").unwrap().as_str(),
            "www.example"
        );
    }

    #[test]
    fn names_that_dns_cannot_have_are_known() {
        let resolvable = |text: &str| HostName::new(text).unwrap().is_resolvable();
        assert!(resolvable("www.example.com"));
        assert!(resolvable("_sip._udp.example.com."));
        assert!(resolvable("1.2.example"));
        for numeric in ["10.1", "127.1", "0x7f.1", "010.0.0.1", "1.2.3.4", "1.0x"] {
            assert!(!resolvable(numeric), "{numeric}");
        }
        for broken in ["a..b", ".a", ".", "a.."] {
            assert!(!resolvable(broken), "{broken}");
        }
        assert!(!resolvable(&"a".repeat(64)));
        assert!(resolvable(&["a"; 127].join(".")));
        assert!(!resolvable(&["a"; 128].join(".")));
    }
}
