//! Names inside DNS messages: read with bounds, compared without case.
//!
//! A name may continue elsewhere in the message by a compression pointer, and hostile messages point in
//! circles. A pointer is followed only to a place before the one it was reached from, so reading ends
//! after at most one visit to every byte.
//!
//! Source: RFC 1035 sections 2.3.4, 3.1 and 4.1.4.

use crate::rule::HostName;

/// Longest name on the wire in bytes, without the final zero.
const MAX_LEN: usize = 254;

/// Longest label in bytes.
const MAX_LABEL_LEN: u8 = 63;

/// A name in wire form, lower case, uncompressed, without the final zero. 255 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Name {
    /// Zero behind `len`, so that names compare as a whole.
    bytes: [u8; MAX_LEN],
    len: u8,
}

impl Name {
    /// The root, to which labels are added.
    const ROOT: Self = Self {
        bytes: [0; MAX_LEN],
        len: 0,
    };

    /// The name of a host; `None` if DNS cannot have it.
    pub(super) fn of_host(host: &HostName) -> Option<Self> {
        if !host.is_resolvable() {
            return None;
        }
        let mut name = Self::ROOT;
        for label in labels(host) {
            name.push(label.as_bytes())?;
        }
        Some(name)
    }

    /// Reads the name at `position` in `message`; also says where what follows it begins.
    pub(super) fn read(message: &[u8], position: usize) -> Option<(Self, usize)> {
        let mut name = Self::ROOT;
        let mut position = position;
        // Where the part being read began, and where the record goes on.
        let mut part = position;
        let mut after = None;
        loop {
            let first = *message.get(position)?;
            match first {
                0 => return Some((name, after.unwrap_or(position + 1))),
                1..=MAX_LABEL_LEN => {
                    let end = position + 1 + usize::from(first);
                    name.push(message.get(position + 1..end)?)?;
                    position = end;
                }
                0xc0.. => {
                    let low = *message.get(position + 1)?;
                    let target = usize::from(first & 0x3f) << 8 | usize::from(low);
                    if target >= part {
                        return None;
                    }
                    after = after.or(Some(position + 2));
                    part = target;
                    position = target;
                }
                _ => return None,
            }
        }
    }

    /// The name in wire form, without the final zero.
    pub(super) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or(&[])
    }

    /// Whether this is the name of `host`. Does not allocate.
    pub(super) fn is_host(&self, host: &HostName) -> bool {
        let mut rest = self.as_bytes();
        for label in labels(host) {
            let same = rest.split_first().and_then(|(&len, tail)| {
                let is_len = usize::from(len) == label.len();
                tail.strip_prefix(label.as_bytes()).filter(|_| is_len)
            });
            match same {
                Some(tail) => rest = tail,
                None => return false,
            }
        }
        rest.is_empty()
    }

    /// Adds a label in lower case; `None` if the name becomes too long.
    fn push(&mut self, label: &[u8]) -> Option<()> {
        let start = usize::from(self.len);
        let (len, text) = self
            .bytes
            .get_mut(start..start + 1 + label.len())?
            .split_first_mut()?;
        *len = u8::try_from(label.len()).ok()?;
        for (to, from) in text.iter_mut().zip(label) {
            *to = from.to_ascii_lowercase();
        }
        self.len = u8::try_from(start + 1 + label.len()).ok()?;
        Some(())
    }
}

/// The labels of a host name; a final dot ends the last one.
fn labels(host: &HostName) -> impl Iterator<Item = &str> {
    let text = host.as_str();
    text.strip_suffix('.').unwrap_or(text).split('.')
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use alloc::vec;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    fn host(text: &str) -> HostName {
        HostName::new(text).unwrap()
    }

    #[test]
    fn host_names_become_labels() {
        let name = Name::of_host(&host("www.example.com")).unwrap();
        assert_eq!(name.as_bytes(), b"\x03www\x07example\x03com");
        assert!(Name::of_host(&host("www.example.com.")).unwrap() == name);
        assert!(Name::of_host(&host("a..b")).is_none());
        assert!(Name::of_host(&host("127.1")).is_none());
    }

    #[test]
    fn comparison_ignores_case_and_a_final_dot_and_nothing_else() {
        let (name, end) = Name::read(b"\x03WwW\x07example\x00rest", 0).unwrap();
        assert_eq!(end, 13);
        for (text, same) in [
            ("www.example", true),
            ("www.example.", true),
            ("ww.wexample", false),
            ("www.example.com", false),
            ("www", false),
            ("www.exampl", false),
            ("wwwexample", false),
        ] {
            assert_eq!(name.is_host(&host(text)), same, "{text}");
        }
        // A dot inside a label is not a border of labels.
        let (dotted, _) = Name::read(b"\x0bwww.example\x00", 0).unwrap();
        assert!(!dotted.is_host(&host("www.example")));
    }

    #[test]
    fn pointers_lead_backwards_only() {
        let message = b"\x03com\x00\x07example\xc0\x00\x03www\xc0\x05";
        let (name, end) = Name::read(message, 15).unwrap();
        assert!(name.is_host(&host("www.example.com")));
        assert_eq!(end, message.len());
        // To itself, in a circle, forwards, past the end.
        assert!(Name::read(b"\xc0\x00", 0).is_none());
        assert!(Name::read(b"\x01a\xc0\x00", 0).is_none());
        assert!(Name::read(b"\x01a\xc0\x04\x01b\xc0\x00", 4).is_none());
        assert!(Name::read(b"\xc0\x02\x00", 0).is_none());
        assert!(Name::read(b"\x00\xc0", 1).is_none());
        assert!(Name::read(b"\x00\xff\xff", 1).is_none());
    }

    #[test]
    fn long_and_reserved_labels_are_refused() {
        assert!(Name::read(b"\x40", 0).is_none());
        assert!(Name::read(b"\x80\x00", 0).is_none());
        assert!(Name::read(b"\x05abc\x00", 0).is_none());
        let label = |text: &mut Vec<u8>, len: u8| {
            text.push(len);
            text.extend(core::iter::repeat_n(b'x', usize::from(len)));
        };
        let mut message = Vec::new();
        for len in [63, 63, 63, 61] {
            label(&mut message, len);
        }
        message.push(0);
        assert_eq!(message.len(), 255);
        assert!(Name::read(&message, 0).is_some());
        let mut longer = vec![1, b'y'];
        longer.extend(message);
        assert!(Name::read(&longer, 0).is_none());
    }

    proptest! {
        #[test]
        fn no_message_is_a_panic_or_endless(
            message in proptest::collection::vec(
                prop_oneof![Just(0xc0u8), Just(0), 0u8..20, any::<u8>()], 0..300),
            position in 0usize..310,
        ) {
            if let Some((name, end)) = Name::read(&message, position) {
                prop_assert!(name.as_bytes().len() <= MAX_LEN);
                prop_assert!(end <= message.len());
            }
        }

        #[test]
        fn names_are_read_back(labels in proptest::collection::vec("[a-z][a-z0-9-]{0,20}", 1..8)) {
            let text: String = labels.join(".");
            let name = Name::of_host(&host(&text)).unwrap();
            let mut message = Vec::from(name.as_bytes());
            message.push(0);
            let (read, end) = Name::read(&message, 0).unwrap();
            prop_assert!(read == name && end == message.len());
            prop_assert!(read.is_host(&host(&text)));
        }
    }
}
