//! The 72-byte header of every message: read leniently, written from types that are valid by construction.
//!
//! Layout: type (1 byte), path (64 bytes, ends at the first NUL, anything behind), 3 bytes of padding that **are** on
//! the wire, payload length (4 bytes, little endian). The payload follows.

use alloc::vec::Vec;
use core::fmt;

use super::VALUE_MAX;
use super::path::{PATH_MAX, Path};

/// Bytes of a header.
pub const HEADER: usize = 72;
const PATH_AT: usize = 1;
const LENGTH_AT: usize = 68;

const CMD_WRITE: u8 = 1;
const CMD_MULTIREAD: u8 = 2;
const CMD_RM: u8 = 4;
const RESP_OK: u8 = 7;
const RESP_ERROR_NOENT: u8 = 8;
const RESP_ERROR: u8 = 9;
const RESP_MULTIREAD: u8 = 11;

/// What a message from dom0 is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A key was written.
    Write,
    /// A key, or everything below a path that ends with `/`, was removed.
    Remove,
    /// An entry of the dump, or its end when the path is empty.
    Entry,
    /// Our operation was carried out.
    Ok,
    /// Our operation was refused.
    Error,
    /// Anything else, with its number. Skipped.
    Other(u8),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Write => "Write",
            Self::Remove => "Remove",
            Self::Entry => "Entry",
            Self::Ok => "Ok",
            Self::Error => "Error",
            Self::Other(number) => return write!(f, "message {number}"),
        })
    }
}

/// A header from dom0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// The path's bytes, zero behind `path_len`.
    path: [u8; PATH_MAX],
    path_len: usize,
    /// Bytes of payload that follow.
    pub payload: u32,
}

impl Header {
    /// Reads a header. Whatever the bytes, the result has a length.
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER]) -> Self {
        let (kind, rest) = match bytes.split_first() {
            Some((kind, rest)) => (*kind, rest),
            None => (0, &[][..]),
        };
        let kind = match kind {
            CMD_WRITE => Kind::Write,
            CMD_RM => Kind::Remove,
            RESP_MULTIREAD => Kind::Entry,
            RESP_OK => Kind::Ok,
            RESP_ERROR | RESP_ERROR_NOENT => Kind::Error,
            other => Kind::Other(other),
        };
        let mut path = [0; PATH_MAX];
        let mut path_len = 0;
        for (to, from) in path
            .iter_mut()
            .zip(rest)
            .take_while(|(_, from)| **from != 0)
        {
            *to = *from;
            path_len += 1;
        }
        let mut length = [0; 4];
        if let Some(field) = bytes.get(LENGTH_AT..) {
            length.copy_from_slice(field);
        }
        Self {
            kind,
            path,
            path_len,
            payload: u32::from_le_bytes(length),
        }
    }

    /// The path up to its first NUL; `None` when it is no text.
    #[must_use]
    pub fn path(&self) -> Option<&str> {
        self.path
            .get(..self.path_len)
            .and_then(|bytes| core::str::from_utf8(bytes).ok())
    }
}

/// Appends a header. Unused bytes of the path and the padding are zero.
fn push_header(out: &mut Vec<u8>, kind: u8, path: &str, payload: u32) {
    let mut header = [0; HEADER];
    if let Some(first) = header.first_mut() {
        *first = kind;
    }
    if let Some(field) = header.get_mut(PATH_AT..PATH_AT + PATH_MAX) {
        for (to, from) in field.iter_mut().zip(path.bytes()) {
            *to = from;
        }
    }
    if let Some(field) = header.get_mut(LENGTH_AT..) {
        field.copy_from_slice(&payload.to_le_bytes());
    }
    out.extend_from_slice(&header);
}

/// A value that dom0's daemon takes: at most [`VALUE_MAX`] bytes and no NUL.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Value(Vec<u8>);

impl Value {
    /// Checks a value. `None` when it is too long or contains a NUL.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Option<Self> {
        (bytes.len() <= VALUE_MAX && !bytes.contains(&0)).then(|| Self(bytes.to_vec()))
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The one request for a dump on a connection. A second one ends dom0's daemon; only the client's start sends it.
pub(super) fn push_dump_request(out: &mut Vec<u8>) {
    push_header(out, CMD_MULTIREAD, "", 0);
}

/// Our write.
pub(super) fn push_write(out: &mut Vec<u8>, path: &Path, value: &Value) {
    let length = u32::try_from(value.0.len()).unwrap_or_default();
    push_header(out, CMD_WRITE, path.as_str(), length);
    out.extend_from_slice(&value.0);
}

/// Our removal of everything below `path`, which must hold something in dom0.
pub(super) fn push_remove_below(out: &mut Vec<u8>, path: &Path) {
    let mut text = alloc::string::String::from(path.as_str());
    text.push('/');
    push_header(out, CMD_RM, &text, 0);
}

/// Our acknowledgement of a write or removal of dom0's: its own path, if that is one that dom0's daemon survives.
///
/// Leaving an acknowledgement out is tolerated, so nothing is risked.
pub(super) fn push_acknowledgement(out: &mut Vec<u8>, path: &str) {
    if Path::new(path.strip_suffix('/').unwrap_or(path)).is_ok() {
        push_header(out, RESP_OK, path, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as dom0 sends them, with junk where junk is allowed.
    fn header(kind: u8, path: &[u8], payload: u32) -> [u8; HEADER] {
        let mut bytes = [0xdb; HEADER];
        bytes[0] = kind;
        bytes[1..=path.len()].copy_from_slice(path);
        bytes[1 + path.len()] = 0;
        bytes[68..].copy_from_slice(&payload.to_le_bytes());
        bytes
    }

    #[test]
    fn q2_stale_bytes_behind_the_path_and_junk_padding_are_ignored() {
        let read = Header::decode(&header(11, b"/qubes-ip", 10));
        assert_eq!(
            (read.kind, read.path(), read.payload),
            (Kind::Entry, Some("/qubes-ip"), 10)
        );
        // The end marker as it really arrives: the previous key's tail is still there.
        let mut end = header(11, b"", 0);
        end[1..8].copy_from_slice(b"\0name\0\0");
        let read = Header::decode(&end);
        assert_eq!(
            (read.kind, read.path(), read.payload),
            (Kind::Entry, Some(""), 0)
        );
    }

    #[test]
    fn q1_headers_have_72_bytes_with_zeroed_padding() {
        let mut out = Vec::new();
        push_dump_request(&mut out);
        assert_eq!(out.len(), 72);
        assert_eq!(out[0], 2);
        assert!(out[1..].iter().all(|byte| *byte == 0));
        let mut out = Vec::new();
        push_acknowledgement(&mut out, "/connected-ips");
        let mut expected = [0; 72];
        expected[0] = 7;
        expected[1..15].copy_from_slice(b"/connected-ips");
        assert_eq!(out, expected);
        let mut out = Vec::new();
        push_write(
            &mut out,
            &Path::new("/qubes-iptables-error").unwrap(),
            &Value::new(b"bad").unwrap(),
        );
        let mut expected = [0; 75];
        expected[0] = 1;
        expected[1..22].copy_from_slice(b"/qubes-iptables-error");
        expected[68] = 3;
        expected[72..].copy_from_slice(b"bad");
        assert_eq!(out, expected);
    }

    #[test]
    fn q7_values_that_end_the_daemon_cannot_be_built() {
        assert!(Value::new(&[b'x'; 3071]).is_some());
        assert!(Value::new(&[b'x'; 3072]).is_none());
        assert!(Value::new(b"a\0b").is_none());
        assert!(Value::new(b"").is_some());
    }

    #[test]
    fn q7_a_path_that_ends_the_daemon_is_not_acknowledged() {
        for bad in ["", "/a b", "x", "/", "/\u{e4}", "//"] {
            let mut out = Vec::new();
            push_acknowledgement(&mut out, bad);
            assert!(out.is_empty(), "{bad:?}");
        }
        let mut out = Vec::new();
        push_acknowledgement(&mut out, "/qubes-firewall/10.137.0.9/");
        assert_eq!(&out[..29], b"\x07/qubes-firewall/10.137.0.9/\0");
    }

    #[test]
    fn a_path_without_a_nul_is_cut_at_63_bytes() {
        let mut bytes = [b'x'; HEADER];
        bytes[0] = 1;
        bytes[1] = b'/';
        assert_eq!(Header::decode(&bytes).path().map(str::len), Some(63));
    }

    #[test]
    fn a_path_that_is_no_text_is_none() {
        assert_eq!(Header::decode(&header(1, b"/\xff\xfe", 0)).path(), None);
    }
}
