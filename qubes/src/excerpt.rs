//! A short, printable piece of a text that we do not trust.
//!
//! Error messages show what was wrong with a rule. They end up on a console, so the bytes are escaped
//! and few.

use core::fmt;

/// Bytes kept of the text.
const KEPT: usize = 24;

/// The start of a text. Prints escaped, with `...` if the text went on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Excerpt {
    /// Zero behind `len`.
    bytes: [u8; KEPT],
    len: usize,
    is_cut: bool,
}

impl Excerpt {
    /// The first 24 bytes of `text`.
    pub fn new(text: &[u8]) -> Self {
        let len = text.len().min(KEPT);
        let mut bytes = [0; KEPT];
        for (kept, byte) in bytes.iter_mut().zip(text) {
            *kept = *byte;
        }
        Self {
            bytes,
            len,
            is_cut: text.len() > KEPT,
        }
    }
}

impl fmt::Display for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kept = self.bytes.get(..self.len).unwrap_or(&[]);
        f.write_str("'")?;
        for byte in kept {
            write!(f, "{}", byte.escape_ascii())?;
        }
        f.write_str(if self.is_cut { "'..." } else { "'" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    #[test]
    fn control_bytes_are_escaped_and_long_texts_cut() {
        assert_eq!(
            Excerpt::new(b"a\x1b[31m'\n\xff").to_string(),
            r"'a\x1b[31m\'\n\xff'"
        );
        assert_eq!(
            Excerpt::new(&[b'x'; 24]).to_string(),
            "'xxxxxxxxxxxxxxxxxxxxxxxx'"
        );
        assert_eq!(
            Excerpt::new(&[b'x'; 25]).to_string(),
            "'xxxxxxxxxxxxxxxxxxxxxxxx'..."
        );
    }
}
