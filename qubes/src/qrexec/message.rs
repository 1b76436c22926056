//! Headers and the messages that we send.
//!
//! Every message is a type (4 bytes), a length (4 bytes), both little endian, and that many bytes.

use alloc::vec::Vec;
use core::fmt;

use xen::DomId;

use super::VERSION;

/// Bytes of a header.
pub const HEADER: usize = 8;
/// The longest payload of a data message, in bytes, in either version.
pub const DATA_MAX: u32 = 65_536;
/// The longest payload of a data message that we send: right for version 2 too, and small beside the ring.
pub const CHUNK: usize = 4096;
/// Bytes of an ident on the wire, with its NUL.
const IDENT: usize = 32;
/// Bytes of a target's or a version 2 service's name on the wire, with its NUL.
const NAME: usize = 64;

/// The type of a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Caller to service: bytes, or the end of them when empty.
    Stdin,
    /// Service to caller.
    Stdout,
    /// Service to caller.
    Stderr,
    /// Service to caller: 4 bytes.
    ExitCode,
    /// Run with input and output.
    ExecCmdline,
    /// Run without.
    JustExec,
    /// Our call was accepted: be the server for it.
    ServiceConnect,
    /// Our call was refused.
    ServiceRefused,
    /// First on every channel.
    Hello,
    /// Anything else.
    Other(u32),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stdin => "Stdin",
            Self::Stdout => "Stdout",
            Self::Stderr => "Stderr",
            Self::ExitCode => "ExitCode",
            Self::ExecCmdline => "ExecCmdline",
            Self::JustExec => "JustExec",
            Self::ServiceConnect => "ServiceConnect",
            Self::ServiceRefused => "ServiceRefused",
            Self::Hello => "Hello",
            Self::Other(number) => return write!(f, "message {number:#x}"),
        })
    }
}

impl Kind {
    const fn from_wire(number: u32) -> Self {
        match number {
            0x190 => Self::Stdin,
            0x191 => Self::Stdout,
            0x192 => Self::Stderr,
            0x193 => Self::ExitCode,
            0x200 => Self::ExecCmdline,
            0x201 => Self::JustExec,
            0x202 => Self::ServiceConnect,
            0x203 => Self::ServiceRefused,
            0x300 => Self::Hello,
            other => Self::Other(other),
        }
    }
}

/// A header that a peer sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Its type.
    pub kind: Kind,
    /// Bytes of payload that follow, as the peer says.
    pub len: u32,
}

impl Header {
    /// Reads a header.
    #[must_use]
    pub fn decode(bytes: [u8; HEADER]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self {
            kind: Kind::from_wire(u32::from_le_bytes([a, b, c, d])),
            len: u32::from_le_bytes([e, f, g, h]),
        }
    }
}

/// Reads the `index`-th little-endian word of a payload.
pub(super) fn word(payload: &[u8], index: usize) -> Option<u32> {
    let at = index.checked_mul(4)?;
    let bytes = payload.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// The data channel of one call, as dom0 named it: the peer and a port out of 513..=768.
///
/// Any other port in a message of ours would end dom0's daemon.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CallPort {
    domain: u32,
    port: u32,
}

impl CallPort {
    /// `None` for a port that dom0 cannot have meant.
    #[must_use]
    pub const fn new(domain: u32, port: u32) -> Option<Self> {
        match port {
            513..=768 => Some(Self { domain, port }),
            _ => None,
        }
    }

    /// The peer, if the number can be a domain's.
    #[must_use]
    pub fn peer(self) -> Option<DomId> {
        let domain = u16::try_from(self.domain).ok()?;
        (domain < DomId::SELF.0).then_some(DomId(domain))
    }

    /// The vchan port.
    #[must_use]
    pub const fn port(self) -> u32 {
        self.port
    }
}

/// What tells dom0 that a call's port is free again. The only way to say it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Terminated(pub CallPort);

fn push_header(out: &mut Vec<u8>, kind: u32, len: usize) {
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&u32::try_from(len).unwrap_or_default().to_le_bytes());
}

/// Appends the greeting.
pub(super) fn push_hello(out: &mut Vec<u8>) {
    push_header(out, 0x300, 4);
    out.extend_from_slice(&VERSION.to_le_bytes());
}

/// Appends the end of a call.
pub(super) fn push_terminated(out: &mut Vec<u8>, Terminated(call): Terminated) {
    push_header(out, 0x211, 8);
    out.extend_from_slice(&call.domain.to_le_bytes());
    out.extend_from_slice(&call.port.to_le_bytes());
}

/// Which of the three data streams.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stream {
    /// To a service that we call.
    Stdin,
    /// To our caller.
    Stdout,
    /// To our caller.
    Stderr,
}

impl Stream {
    const fn number(self) -> u32 {
        match self {
            Self::Stdin => 0x190,
            Self::Stdout => 0x191,
            Self::Stderr => 0x192,
        }
    }
}

/// Appends the header of a data message whose length is filled in later by [`set_len`].
pub(super) fn push_data_header(out: &mut Vec<u8>, stream: Stream) {
    push_header(out, stream.number(), 0);
}

/// Sets the length of the message whose header begins at `at`.
pub(super) fn set_len(out: &mut [u8], at: usize, len: usize) {
    let len = u32::try_from(len).unwrap_or_default().to_le_bytes();
    if let Some(field) = out.get_mut(at.wrapping_add(4)..at.wrapping_add(HEADER)) {
        field.copy_from_slice(&len);
    }
}

/// Appends the end of a stream.
pub(super) fn push_end(out: &mut Vec<u8>, stream: Stream) {
    push_header(out, stream.number(), 0);
}

/// Appends bytes of a stream in chunks; an empty slice appends nothing.
pub(super) fn push_data(out: &mut Vec<u8>, stream: Stream, bytes: &[u8]) {
    for chunk in bytes.chunks(CHUNK) {
        push_header(out, stream.number(), chunk.len());
        out.extend_from_slice(chunk);
    }
}

/// Appends an exit code.
pub(super) fn push_exit_code(out: &mut Vec<u8>, code: u8) {
    push_header(out, 0x193, 4);
    out.extend_from_slice(&u32::from(code).to_le_bytes());
}

/// Names one of our calls until dom0 has answered: up to 31 of `[0-9A-Za-z_.- ]`, here always `PC` and 8 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ident([u8; IDENT]);

impl Ident {
    /// The ident of the `number`-th call.
    #[must_use]
    pub fn new(number: u32) -> Self {
        let mut bytes = [0; IDENT];
        let digits = b"0123456789ABCDEF";
        let text = (0..8).rev().map(|place| {
            let nibble = number.wrapping_shr(place * 4) & 0xf;
            let index = usize::try_from(nibble).unwrap_or_default();
            digits.get(index).copied().unwrap_or(b'0')
        });
        for (to, from) in bytes.iter_mut().zip(b"PC".iter().copied().chain(text)) {
            *to = from;
        }
        Self(bytes)
    }

    /// Whether a payload's field is this ident.
    #[must_use]
    pub fn is(&self, field: &[u8]) -> bool {
        field == self.0
    }
}

/// Appends a name, zero padded to `size`. The caller has checked its length.
fn push_padded(out: &mut Vec<u8>, name: &str, size: usize) {
    let padding = size.saturating_sub(name.len());
    out.extend(name.bytes().take(size));
    out.extend(core::iter::repeat_n(0, padding));
}

/// Appends our request for a service, in the layout of `version` (the lower of both peers').
pub(super) fn push_trigger(
    out: &mut Vec<u8>,
    version: u32,
    target: &str,
    service: &str,
    ident: Ident,
) {
    if version < 3 {
        push_header(out, 0x210, NAME + IDENT + IDENT);
        push_padded(out, service, NAME);
        push_padded(out, target, IDENT);
        out.extend_from_slice(&ident.0);
    } else {
        push_header(out, 0x212, (NAME + IDENT + 1).saturating_add(service.len()));
        push_padded(out, target, NAME);
        out.extend_from_slice(&ident.0);
        out.extend_from_slice(service.as_bytes());
        out.push(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r6_the_greeting_says_version_3() {
        let mut out = Vec::new();
        push_hello(&mut out);
        assert_eq!(out, [0, 3, 0, 0, 4, 0, 0, 0, 3, 0, 0, 0]);
    }

    #[test]
    fn r7_ports_that_end_the_daemon_cannot_be_said() {
        for port in [0, 111, 512, 769, u32::MAX] {
            assert_eq!(CallPort::new(0, port), None);
        }
        let mut out = Vec::new();
        push_terminated(&mut out, Terminated(CallPort::new(7, 513).unwrap()));
        assert_eq!(out, [0x11, 2, 0, 0, 8, 0, 0, 0, 7, 0, 0, 0, 1, 2, 0, 0]);
    }

    #[test]
    fn peers_are_domains() {
        assert_eq!(CallPort::new(0, 513).unwrap().peer(), Some(DomId(0)));
        assert_eq!(
            CallPort::new(0x7fef, 513).unwrap().peer(),
            Some(DomId(0x7fef))
        );
        assert_eq!(CallPort::new(0x7ff0, 513).unwrap().peer(), None);
        assert_eq!(CallPort::new(0x1_0000, 513).unwrap().peer(), None);
    }

    #[test]
    fn r3_the_trigger_of_version_3_has_target_ident_service() {
        let mut out = Vec::new();
        push_trigger(&mut out, 3, "dom0", "qubes.FeaturesRequest", Ident::new(1));
        assert_eq!(out[..8], [0x12, 2, 0, 0, 0x76, 0, 0, 0]);
        assert_eq!(&out[8..13], b"dom0\0");
        assert!(out[12..72].iter().all(|byte| *byte == 0));
        assert_eq!(&out[72..83], b"PC00000001\0");
        assert!(out[82..104].iter().all(|byte| *byte == 0));
        assert_eq!(&out[104..], b"qubes.FeaturesRequest\0");
        assert_eq!(out.len(), 8 + 0x76);
    }

    #[test]
    fn r3_the_trigger_of_version_2_has_service_target_ident() {
        let mut out = Vec::new();
        push_trigger(&mut out, 2, "dom0", "qubes.GetDate", Ident::new(0xabc));
        assert_eq!(out[..8], [0x10, 2, 0, 0, 128, 0, 0, 0]);
        assert_eq!(&out[8..22], b"qubes.GetDate\0");
        assert_eq!(&out[72..77], b"dom0\0");
        assert_eq!(&out[104..115], b"PC00000ABC\0");
        assert_eq!(out.len(), 136);
    }

    #[test]
    fn headers_are_little_endian() {
        let read = Header::decode([0x00, 0x02, 0, 0, 0x2a, 0, 0, 0]);
        assert_eq!((read.kind, read.len), (Kind::ExecCmdline, 42));
        assert_eq!(Header::decode([0xff; 8]).kind, Kind::Other(u32::MAX));
    }

    #[test]
    fn data_is_sent_in_chunks_that_version_2_takes() {
        let mut out = Vec::new();
        push_data(&mut out, Stream::Stdin, &[7; 5000]);
        assert_eq!(out.len(), 5000 + 2 * HEADER);
        assert_eq!(out[..8], [0x90, 1, 0, 0, 0, 0x10, 0, 0]);
    }
}
