//! The two wire formats, written a second time on purpose: an error in the product's codec must not hide in ours.

/// QubesDB message types.
pub mod qdb {
    /// Write a key.
    pub const WRITE: u8 = 1;
    /// Ask for the dump.
    pub const MULTIREAD: u8 = 2;
    /// Remove a key or a subtree.
    pub const RM: u8 = 4;
    /// Done.
    pub const OK: u8 = 7;
    /// No such key.
    pub const ERROR_NOENT: u8 = 8;
    /// Refused.
    pub const ERROR: u8 = 9;
    /// An entry of the dump.
    pub const MULTIREAD_ENTRY: u8 = 11;
    /// Bytes of a header.
    pub const HEADER: usize = 72;
    /// Bytes of the path field, with its NUL.
    pub const PATH: usize = 64;
    /// The size of the daemon's buffer: a value of this many bytes ends it.
    pub const TOO_LONG: usize = 3072;
}

/// qrexec message types.
pub mod qrexec {
    /// Input of a service.
    pub const STDIN: u32 = 0x190;
    /// Output of a service.
    pub const STDOUT: u32 = 0x191;
    /// Error output of a service.
    pub const STDERR: u32 = 0x192;
    /// Exit code of a service.
    pub const EXIT_CODE: u32 = 0x193;
    /// Run with input and output.
    pub const EXEC_CMDLINE: u32 = 0x200;
    /// Run without.
    pub const JUST_EXEC: u32 = 0x201;
    /// The VM's call was accepted.
    pub const SERVICE_CONNECT: u32 = 0x202;
    /// The VM's call was refused.
    pub const SERVICE_REFUSED: u32 = 0x203;
    /// A call of dom0's is over.
    pub const CONNECTION_TERMINATED: u32 = 0x211;
    /// The VM wants to call a service.
    pub const TRIGGER_SERVICE3: u32 = 0x212;
    /// First on every channel.
    pub const HELLO: u32 = 0x300;
    /// The longest payload of a data message.
    pub const DATA_MAX: usize = 65_536;
}

/// A qrexec message.
#[must_use]
pub fn qrexec_message(kind: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut message = kind.to_le_bytes().to_vec();
    message.extend(len.to_le_bytes());
    message.extend(payload);
    message
}

/// The `index`-th 32-bit word of some bytes; 0 beyond their end.
#[must_use]
pub fn word(bytes: &[u8], index: usize) -> u32 {
    let mut word = [0; 4];
    for (to, from) in word.iter_mut().zip(bytes.iter().skip(index * 4)) {
        *to = *from;
    }
    u32::from_le_bytes(word)
}

/// Takes a whole qrexec message off the front of `bytes`, if it is there.
pub fn take_qrexec(bytes: &mut Vec<u8>) -> Option<(u32, Vec<u8>)> {
    if bytes.len() < 8 {
        return None;
    }
    let (kind, len) = (word(bytes, 0), word(bytes, 1));
    let end = usize::try_from(len).ok()?.checked_add(8)?;
    if bytes.len() < end {
        return None;
    }
    let message: Vec<u8> = bytes.drain(..end).collect();
    Some((kind, message.get(8..).unwrap_or_default().to_vec()))
}

/// A QubesDB header that the daemon sends: like the C structure that it reuses, with the last path's tail behind the
/// new path and whatever lies in the padding.
#[derive(Debug)]
pub struct HeaderBuffer {
    bytes: [u8; qdb::HEADER],
}

impl Default for HeaderBuffer {
    fn default() -> Self {
        Self {
            bytes: [0xdb; qdb::HEADER],
        }
    }
}

impl HeaderBuffer {
    /// Puts a message together.
    pub fn message(&mut self, kind: u8, path: &str, payload: &[u8]) -> Vec<u8> {
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let path = path.bytes().chain([0]);
        for (to, from) in self.bytes.iter_mut().zip([kind].into_iter().chain(path)) {
            *to = from;
        }
        for (to, from) in self.bytes.iter_mut().skip(68).zip(len.to_le_bytes()) {
            *to = from;
        }
        // The path field always ends with a NUL.
        if let Some(last) = self.bytes.get_mut(qdb::PATH) {
            *last = 0;
        }
        self.bytes.iter().chain(payload).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_keep_the_tail_of_the_last_path() {
        let mut buffer = HeaderBuffer::default();
        let first = buffer.message(qdb::MULTIREAD_ENTRY, "/name", b"fw");
        assert_eq!(first.len(), 74);
        let end = buffer.message(qdb::MULTIREAD_ENTRY, "", b"");
        assert_eq!(end[..7], *b"\x0b\0name\0");
        assert_eq!(end[65..68], [0xdb; 3]);
        assert_eq!(end[68..], [0; 4]);
    }

    #[test]
    fn qrexec_messages_are_taken_whole() {
        let mut bytes = qrexec_message(qrexec::STDIN, b"abc");
        bytes.extend(&qrexec_message(qrexec::HELLO, &3u32.to_le_bytes())[..7]);
        assert_eq!(
            take_qrexec(&mut bytes),
            Some((qrexec::STDIN, b"abc".to_vec()))
        );
        assert_eq!(take_qrexec(&mut bytes), None);
        assert_eq!(bytes.len(), 7);
    }
}
