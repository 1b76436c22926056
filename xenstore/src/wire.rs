//! The xenstore message codec: a 16-byte header and at most 4,096 bytes of payload.
//!
//! The header is four little-endian words: type, request id, transaction id, payload length. Requests are
//! checked here before a single byte exists, because xenstored ignores a domain for ever after one
//! message that is too long. Replies are gathered from whatever pieces the ring delivers.
//!
//! Trusts nothing about the bytes it reads: a length above the limit is an error, everything else is data.
//!
//! Source: Xen `public/io/xs_wire.h`, `docs/misc/xenstore.txt`.

use alloc::format;
use alloc::vec::Vec;
use core::fmt::Write as _;

use xen::DomId;

/// Bytes of a header.
pub const HEADER_LEN: usize = 16;
/// Most bytes of a payload (`XENSTORE_PAYLOAD_MAX`).
pub const PAYLOAD_MAX: usize = 4096;
/// Most bytes of a path that starts with `/` (`XENSTORE_ABS_PATH_MAX`).
pub const ABSOLUTE_PATH_MAX: usize = 3072;
/// Most bytes of a path that does not (`XENSTORE_REL_PATH_MAX`).
pub const RELATIVE_PATH_MAX: usize = 2048;

/// Message types (`XS_*`), as far as they are used here.
pub mod kind {
    /// List children.
    pub const DIRECTORY: u32 = 1;
    /// Read a value.
    pub const READ: u32 = 2;
    /// Set a watch.
    pub const WATCH: u32 = 4;
    /// Remove a watch.
    pub const UNWATCH: u32 = 5;
    /// Start a transaction.
    pub const TRANSACTION_START: u32 = 6;
    /// Commit or abandon a transaction.
    pub const TRANSACTION_END: u32 = 7;
    /// Write a value.
    pub const WRITE: u32 = 11;
    /// Create an empty node.
    pub const MKDIR: u32 = 12;
    /// Remove a node and everything below it.
    pub const RM: u32 = 13;
    /// Set a node's owner and who else may do what.
    pub const SET_PERMS: u32 = 14;
    /// A watch fired (from the store, unasked).
    pub const WATCH_EVENT: u32 = 15;
    /// The reply to a request that failed.
    pub const ERROR: u32 = 16;
    /// Remove all watches and transactions of this connection.
    pub const RESET_WATCHES: u32 = 21;
    /// List children from a byte offset on.
    pub const DIRECTORY_PART: u32 = 22;
}

/// What stands in front of every message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// One of [`kind`].
    pub kind: u32,
    /// Chosen by the requester, echoed in the reply; 0 in watch events.
    pub request: u32,
    /// The transaction, 0 for none.
    pub transaction: u32,
    /// Bytes of payload that follow.
    pub len: u32,
}

impl Header {
    /// The header as bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let words = [self.kind, self.request, self.transaction, self.len];
        for (chunk, word) in bytes.chunks_exact_mut(4).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Reads a header. Every bit pattern is one; the length is checked by [`Decoder`].
    #[must_use]
    pub const fn decode(bytes: [u8; HEADER_LEN]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
        Self {
            kind: u32::from_le_bytes([a, b, c, d]),
            request: u32::from_le_bytes([e, f, g, h]),
            transaction: u32::from_le_bytes([i, j, k, l]),
            len: u32::from_le_bytes([m, n, o, p]),
        }
    }
}

/// Why a request cannot be sent. Nothing was sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RequestError {
    /// The path is empty, ends with `/`, has `//` or a character outside `A-Za-z0-9-/_@`.
    InvalidPath,
    /// The path is longer than [`ABSOLUTE_PATH_MAX`] or [`RELATIVE_PATH_MAX`].
    PathTooLong,
    /// The payload would be longer than [`PAYLOAD_MAX`].
    PayloadTooLong,
}

/// Checks a path against the rules of xenstored. Note that `.` and `:` are not allowed.
///
/// # Errors
///
/// [`RequestError::InvalidPath`] or [`RequestError::PathTooLong`].
pub fn check_path(path: &str) -> Result<(), RequestError> {
    let max = if path.starts_with('/') {
        ABSOLUTE_PATH_MAX
    } else {
        RELATIVE_PATH_MAX
    };
    if path.len() > max {
        return Err(RequestError::PathTooLong);
    }
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_@".contains(&byte);
    let well_formed = !path.is_empty()
        && (path == "/" || !path.ends_with('/'))
        && !path.contains("//")
        && path.bytes().all(allowed);
    if well_formed {
        Ok(())
    } else {
        Err(RequestError::InvalidPath)
    }
}

/// A request. Paths without a leading `/` are relative to our own `/local/domain/<domid>`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request<'a> {
    /// List the names of a node's children.
    Directory(&'a str),
    /// As [`Request::Directory`], from a byte offset of the list on, for lists longer than a payload.
    DirectoryPart(&'a str, usize),
    /// Read a node's value.
    Read(&'a str),
    /// Write a node's value, creating the node and its parents when missing.
    Write(&'a str, &'a [u8]),
    /// Create an empty node when missing.
    MakeDirectory(&'a str),
    /// Remove a node and everything below it.
    Remove(&'a str),
    /// Let the first domain own a node, the second one read it, and nobody else do anything.
    Share(&'a str, DomId, DomId),
    /// Watch a node and everything below it; the token comes back in each event.
    Watch(&'a str, &'a str),
    /// Undo a [`Request::Watch`] with the same path and token.
    Unwatch(&'a str, &'a str),
    /// Start a transaction.
    TransactionStart,
    /// End a transaction: commit, or throw away.
    TransactionEnd(bool),
    /// Remove all watches and transactions of this domain, left behind by a predecessor.
    ResetWatches,
}

impl Request<'_> {
    /// The message type, one of [`kind`]; a successful reply has the same.
    #[must_use]
    pub const fn kind(&self) -> u32 {
        match self {
            Self::Directory(_) => kind::DIRECTORY,
            Self::DirectoryPart(..) => kind::DIRECTORY_PART,
            Self::Read(_) => kind::READ,
            Self::Write(..) => kind::WRITE,
            Self::MakeDirectory(_) => kind::MKDIR,
            Self::Remove(_) => kind::RM,
            Self::Share(..) => kind::SET_PERMS,
            Self::Watch(..) => kind::WATCH,
            Self::Unwatch(..) => kind::UNWATCH,
            Self::TransactionStart => kind::TRANSACTION_START,
            Self::TransactionEnd(_) => kind::TRANSACTION_END,
            Self::ResetWatches => kind::RESET_WATCHES,
        }
    }

    /// The whole message, ready to be sent once it has a request id. `transaction` is 0 outside of one.
    ///
    /// # Errors
    ///
    /// [`RequestError`] when the store would refuse it, or worse.
    pub fn encode(&self, transaction: u32) -> Result<Encoded, RequestError> {
        let mut payload = Vec::new();
        match *self {
            Self::Directory(path)
            | Self::Read(path)
            | Self::MakeDirectory(path)
            | Self::Remove(path) => {
                push_path(&mut payload, path)?;
            }
            Self::DirectoryPart(path, offset) => {
                push_path(&mut payload, path)?;
                push_text(&mut payload, &decimal(offset));
            }
            Self::Write(path, value) => {
                push_path(&mut payload, path)?;
                if value.len() > PAYLOAD_MAX {
                    return Err(RequestError::PayloadTooLong);
                }
                payload.extend_from_slice(value);
            }
            Self::Share(path, owner, reader) => {
                push_path(&mut payload, path)?;
                push_text(&mut payload, &format!("n{owner}"));
                push_text(&mut payload, &format!("r{reader}"));
            }
            Self::Watch(path, token) | Self::Unwatch(path, token) => {
                push_path(&mut payload, path)?;
                push_text(&mut payload, token);
            }
            Self::TransactionStart | Self::ResetWatches => payload.push(0),
            Self::TransactionEnd(commit) => push_text(&mut payload, if commit { "T" } else { "F" }),
        }
        let len = u32::try_from(payload.len()).map_err(|_| RequestError::PayloadTooLong)?;
        if payload.len() > PAYLOAD_MAX {
            return Err(RequestError::PayloadTooLong);
        }
        let header = Header {
            kind: self.kind(),
            request: 0,
            transaction,
            len,
        };
        Ok(Encoded { header, payload })
    }
}

/// A request that passed all checks and waits to be sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Encoded {
    header: Header,
    payload: Vec<u8>,
}

impl Encoded {
    /// The message type, one of [`kind`]; a successful reply has the same.
    #[must_use]
    pub const fn kind(&self) -> u32 {
        self.header.kind
    }

    /// The bytes to send, with this request id.
    #[must_use]
    pub fn into_bytes(mut self, request: u32) -> Vec<u8> {
        self.header.request = request;
        let mut bytes = Vec::with_capacity(HEADER_LEN.saturating_add(self.payload.len()));
        bytes.extend_from_slice(&self.header.encode());
        bytes.append(&mut self.payload);
        bytes
    }
}

fn push_path(payload: &mut Vec<u8>, path: &str) -> Result<(), RequestError> {
    check_path(path)?;
    push_text(payload, path);
    Ok(())
}

fn push_text(payload: &mut Vec<u8>, text: &str) {
    payload.extend_from_slice(text.as_bytes());
    payload.push(0);
}

fn decimal(number: usize) -> alloc::string::String {
    let mut text = alloc::string::String::new();
    // Writing to a string cannot fail.
    let _ = write!(text, "{number}");
    text
}

/// A whole message from the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// Its payload, at most [`PAYLOAD_MAX`] bytes.
    pub payload: Vec<u8>,
}

/// The store announced a payload longer than [`PAYLOAD_MAX`]: the stream cannot be followed any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OversizeMessage {
    /// The announced length in bytes.
    pub len: u32,
}

/// Gathers messages from pieces of any size.
#[derive(Debug, Default)]
pub struct Decoder {
    header: [u8; HEADER_LEN],
    /// Bytes of `header` that have arrived.
    filled: usize,
    payload: Vec<u8>,
}

impl Decoder {
    /// Takes bytes from the front of `input` until a message is complete or `input` is empty.
    ///
    /// # Errors
    ///
    /// [`OversizeMessage`]; the decoder must not be used any more.
    pub fn feed(&mut self, input: &mut &[u8]) -> Result<Option<Message>, OversizeMessage> {
        if let Some(gap) = self.header.get_mut(self.filled..) {
            let take = gap.len().min(input.len());
            let (now, later) = input.split_at(take);
            for (to, from) in gap.iter_mut().zip(now) {
                *to = *from;
            }
            self.filled = self.filled.saturating_add(take);
            *input = later;
        }
        if self.filled < HEADER_LEN {
            return Ok(None);
        }
        let header = Header::decode(self.header);
        let oversize = OversizeMessage { len: header.len };
        let len = usize::try_from(header.len).map_err(|_| oversize)?;
        if len > PAYLOAD_MAX {
            return Err(oversize);
        }
        let take = len.saturating_sub(self.payload.len()).min(input.len());
        let (now, later) = input.split_at(take);
        self.payload.extend_from_slice(now);
        *input = later;
        if self.payload.len() < len {
            return Ok(None);
        }
        self.filled = 0;
        Ok(Some(Message {
            header,
            payload: core::mem::take(&mut self.payload),
        }))
    }
}

/// The strings of a payload that is a sequence of NUL-terminated strings. A missing last NUL is forgiven.
pub fn strings(payload: &[u8]) -> impl Iterator<Item = &[u8]> {
    let body = payload.strip_suffix(&[0]).unwrap_or(payload);
    let whole = !payload.is_empty();
    body.split(|&byte| byte == 0).filter(move |_| whole)
}

/// Path and token of a watch event, when it has both and they are text.
#[must_use]
pub fn watch_event(payload: &[u8]) -> Option<(&str, &str)> {
    let mut strings = strings(payload);
    let path = core::str::from_utf8(strings.next()?).ok()?;
    let token = core::str::from_utf8(strings.next()?).ok()?;
    Some((path, token))
}

/// Why the store refused a request (`xsd_errors`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ErrorCode {
    /// `EINVAL`, and every name that is not known.
    Invalid,
    /// `EACCES`.
    AccessDenied,
    /// `EEXIST`.
    Exists,
    /// `EISDIR`.
    IsDirectory,
    /// `ENOENT`.
    NotFound,
    /// `ENOMEM`.
    NoMemory,
    /// `ENOSPC`: a quota.
    NoSpace,
    /// `EIO`.
    Io,
    /// `ENOTEMPTY`.
    NotEmpty,
    /// `ENOSYS`: the daemon does not know the request.
    NotSupported,
    /// `EROFS`.
    ReadOnly,
    /// `EBUSY`.
    Busy,
    /// `EAGAIN`: the transaction met a conflict.
    Again,
    /// `EISCONN`.
    IsConnected,
    /// `E2BIG`: too many watches, or a list that needs [`Request::DirectoryPart`].
    TooBig,
    /// `EPERM`.
    NotPermitted,
}

impl ErrorCode {
    /// Reads the payload of a [`kind::ERROR`] reply.
    #[must_use]
    pub fn parse(payload: &[u8]) -> Self {
        match payload.strip_suffix(&[0]).unwrap_or(payload) {
            b"EACCES" => Self::AccessDenied,
            b"EEXIST" => Self::Exists,
            b"EISDIR" => Self::IsDirectory,
            b"ENOENT" => Self::NotFound,
            b"ENOMEM" => Self::NoMemory,
            b"ENOSPC" => Self::NoSpace,
            b"EIO" => Self::Io,
            b"ENOTEMPTY" => Self::NotEmpty,
            b"ENOSYS" => Self::NotSupported,
            b"EROFS" => Self::ReadOnly,
            b"EBUSY" => Self::Busy,
            b"EAGAIN" => Self::Again,
            b"EISCONN" => Self::IsConnected,
            b"E2BIG" => Self::TooBig,
            b"EPERM" => Self::NotPermitted,
            _ => Self::Invalid,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use alloc::vec;

    #[test]
    fn a_read_request_is_these_bytes() {
        let message = Request::Read("domid").encode(0).unwrap().into_bytes(7);
        assert_eq!(message, b"\x02\0\0\0\x07\0\0\0\0\0\0\0\x06\0\0\0domid\0");
    }

    #[test]
    fn a_value_is_not_terminated_but_path_and_token_are() {
        let write = Request::Write("a", b"v")
            .encode(0x0102)
            .unwrap()
            .into_bytes(1);
        assert_eq!(write, b"\x0b\0\0\0\x01\0\0\0\x02\x01\0\0\x03\0\0\0a\0v");
        let payload = |request: Request<'_>| request.encode(3).unwrap().payload;
        assert_eq!(payload(Request::Watch("a", "7")), b"a\x007\0");
        assert_eq!(payload(Request::TransactionEnd(false)), b"F\0");
        let share = Request::Share("a", DomId(7), DomId(0));
        assert_eq!(payload(share), b"a\0n7\0r0\0");
        assert_eq!(payload(Request::DirectoryPart("a", 4000)), b"a\x004000\0");
    }

    #[test]
    fn p9_a_request_over_a_limit_is_refused_before_any_byte_is_written() {
        let relative = |len: usize| "x".repeat(len);
        let absolute = |len: usize| String::from("/") + &"x".repeat(len - 1);
        assert!(Request::Read(&relative(2048)).encode(0).is_ok());
        assert_eq!(
            Request::Read(&relative(2049)).encode(0),
            Err(RequestError::PathTooLong)
        );
        assert!(Request::Read(&absolute(3072)).encode(0).is_ok());
        assert_eq!(
            Request::Read(&absolute(3073)).encode(0),
            Err(RequestError::PathTooLong)
        );
        assert!(Request::Write("a", &[0; PAYLOAD_MAX - 2]).encode(0).is_ok());
        for len in [PAYLOAD_MAX - 1, PAYLOAD_MAX, PAYLOAD_MAX + 1, 1 << 20] {
            assert_eq!(
                Request::Write("a", &vec![0; len]).encode(0),
                Err(RequestError::PayloadTooLong)
            );
        }
        let token = "t".repeat(PAYLOAD_MAX);
        assert_eq!(
            Request::Watch("a", &token).encode(0),
            Err(RequestError::PayloadTooLong)
        );
    }

    #[test]
    fn paths_that_xenstored_refuses_are_refused_here() {
        for path in [
            "",
            "a/",
            "/a/",
            "a//b",
            "//",
            "a.b",
            "10.137.0.6",
            "a:b",
            "a b",
            "a\0",
            "ü",
            "a\n",
        ] {
            assert_eq!(check_path(path), Err(RequestError::InvalidPath), "{path:?}");
        }
        for path in [
            "/",
            "a",
            "/a/b",
            "@releaseDomain",
            "device/vif/0/feature-sg",
            "a_b-C9",
        ] {
            assert_eq!(check_path(path), Ok(()), "{path:?}");
        }
    }

    #[test]
    fn p8_messages_are_gathered_across_every_byte_boundary() {
        let messages = [
            Message {
                header: Header {
                    kind: kind::READ,
                    request: 9,
                    transaction: 0,
                    len: 5,
                },
                payload: b"value".to_vec(),
            },
            Message {
                header: Header {
                    kind: kind::WATCH_EVENT,
                    request: 0,
                    transaction: 0,
                    len: 4,
                },
                payload: b"a\x001\0".to_vec(),
            },
            Message {
                header: Header {
                    kind: kind::READ,
                    request: 10,
                    transaction: 0,
                    len: 0,
                },
                payload: Vec::new(),
            },
        ];
        let mut bytes = Vec::new();
        for message in &messages {
            bytes.extend_from_slice(&message.header.encode());
            bytes.extend_from_slice(&message.payload);
        }
        for first in 0..=bytes.len() {
            for second in first..=bytes.len() {
                let mut decoder = Decoder::default();
                let mut seen = Vec::new();
                for mut piece in [&bytes[..first], &bytes[first..second], &bytes[second..]] {
                    while !piece.is_empty() {
                        seen.extend(decoder.feed(&mut piece).unwrap());
                    }
                }
                assert_eq!(seen, messages, "cut at {first} and {second}");
            }
        }
    }

    #[test]
    fn p8_an_oversize_length_is_an_error_not_an_allocation() {
        for len in [4097, u32::MAX] {
            let header = Header {
                kind: kind::READ,
                request: 1,
                transaction: 0,
                len,
            };
            let bytes = header.encode();
            assert_eq!(
                Decoder::default().feed(&mut &bytes[..]),
                Err(OversizeMessage { len })
            );
        }
    }

    #[test]
    fn strings_split_at_nul_and_forgive_a_missing_end() {
        let all = |payload| strings(payload).collect::<Vec<_>>();
        assert_eq!(all(b""), Vec::<&[u8]>::new());
        assert_eq!(all(b"\0"), [b""]);
        assert_eq!(all(b"a\0bc\0"), [&b"a"[..], b"bc"]);
        assert_eq!(all(b"a\0bc"), [&b"a"[..], b"bc"]);
        assert_eq!(all(b"5\0a\0\0"), [&b"5"[..], b"a", b""]);
    }

    #[test]
    fn a_watch_event_needs_path_and_token_in_text() {
        assert_eq!(watch_event(b"a/b\x0012\0"), Some(("a/b", "12")));
        assert_eq!(watch_event(b"a/b\x0012\x003\0"), Some(("a/b", "12")));
        for junk in [&b""[..], b"a", b"a\0", b"\xFF\x001\0", b"a\0\xFF\0"] {
            assert_eq!(watch_event(junk), None, "{junk:?}");
        }
    }

    #[test]
    fn unknown_errors_count_as_invalid() {
        assert_eq!(ErrorCode::parse(b"ENOENT\0"), ErrorCode::NotFound);
        assert_eq!(ErrorCode::parse(b"EAGAIN"), ErrorCode::Again);
        for junk in [&b""[..], b"ENOTHING\0", b"\xFF", b"ENOENT\0\0"] {
            assert_eq!(ErrorCode::parse(junk), ErrorCode::Invalid);
        }
    }
}
