//! A shell line, or the argument of `qubes.VMExec`, as the words of a command.
//!
//! There is no shell here: a line is one command. What tools of dom0 add is taken off (`; exit`), quotes are honoured,
//! because `qvm-run` quotes its arguments.

use alloc::string::String;
use alloc::vec::Vec;

/// The most words that a command may have.
pub const WORDS_MAX: usize = 32;

/// Why there are no words.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WordsError {
    /// A quote or a backslash without its end, or bytes that are no UTF-8.
    Unreadable,
    /// More than [`WORDS_MAX`].
    TooMany,
    /// An escape of `VMExec` that is none.
    Escape,
}

impl WordsError {
    /// One line for the caller.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Unreadable => {
                "unbalanced quote, or not UTF-8; write one command with plain words"
            }
            Self::TooMany => "too many words; no command takes that many",
            Self::Escape => {
                "argument is not encoded as qubes.VMExec wants it (`--` or `-HH` with upper-case digits)"
            }
        }
    }
}

/// The words of a shell line. An empty line has none.
///
/// # Errors
///
/// [`WordsError`].
pub fn from_line(line: &[u8]) -> Result<Vec<String>, WordsError> {
    let line = core::str::from_utf8(line).map_err(|_| WordsError::Unreadable)?;
    let line = line.trim_ascii();
    // `qvm-run` appends this so that the shell ends even while its input stays open.
    let line = match line.strip_suffix("exit").map(str::trim_ascii_end) {
        Some(rest) if rest.ends_with(';') || rest.is_empty() => rest,
        _ => line,
    };
    split(line.trim_end_matches(';').trim_ascii())
}

/// Splits at white space outside of quotes.
fn split(line: &str) -> Result<Vec<String>, WordsError> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            '\'' => quoted(&mut characters, '\'', word.get_or_insert_default())?,
            '"' => quoted(&mut characters, '"', word.get_or_insert_default())?,
            '\\' => {
                let next = characters.next().ok_or(WordsError::Unreadable)?;
                word.get_or_insert_default().push(next);
            }
            space if space.is_ascii_whitespace() => push(&mut words, word.take())?,
            other => word.get_or_insert_default().push(other),
        }
    }
    push(&mut words, word)?;
    Ok(words)
}

/// Appends what stands before the closing quote.
fn quoted(
    characters: &mut core::str::Chars<'_>,
    quote: char,
    word: &mut String,
) -> Result<(), WordsError> {
    loop {
        match characters.next().ok_or(WordsError::Unreadable)? {
            character if character == quote => return Ok(()),
            '\\' if quote == '"' => {
                word.push(characters.next().ok_or(WordsError::Unreadable)?);
            }
            character => word.push(character),
        }
    }
}

fn push(words: &mut Vec<String>, word: Option<String>) -> Result<(), WordsError> {
    if let Some(word) = word {
        if words.len() >= WORDS_MAX {
            return Err(WordsError::TooMany);
        }
        words.push(word);
    }
    Ok(())
}

/// The words of a `qubes.VMExec` argument: joined by `+`, other bytes than `[A-Za-z0-9_.]` as `-HH`, `-` as `--`.
///
/// # Errors
///
/// [`WordsError`].
pub fn from_vmexec(argument: &str) -> Result<Vec<String>, WordsError> {
    let mut words = Vec::new();
    for encoded in argument.split('+') {
        push(&mut words, Some(decode(encoded)?))?;
    }
    Ok(words)
}

fn decode(encoded: &str) -> Result<String, WordsError> {
    let mut bytes = Vec::with_capacity(encoded.len());
    let mut rest = encoded.bytes();
    while let Some(byte) = rest.next() {
        let decoded = match byte {
            b'-' => match rest.next() {
                Some(b'-') => b'-',
                Some(high) => {
                    let low = rest.next().and_then(digit).ok_or(WordsError::Escape)?;
                    let high = digit(high).ok_or(WordsError::Escape)?;
                    high.wrapping_mul(16).wrapping_add(low)
                }
                None => return Err(WordsError::Escape),
            },
            plain if plain.is_ascii_alphanumeric() || matches!(plain, b'_' | b'.') => plain,
            _ => return Err(WordsError::Escape),
        };
        bytes.push(decoded);
    }
    String::from_utf8(bytes).map_err(|_| WordsError::Unreadable)
}

/// The value of an upper-case hexadecimal digit.
const fn digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte.wrapping_sub(b'0')),
        b'A'..=b'F' => Some(byte.wrapping_sub(b'A').wrapping_add(10)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_qvm_run_appends_is_taken_off() {
        for line in [
            "status; exit\n",
            "status;exit",
            "status ; exit \r\n",
            "status",
            "  status  \n",
            "status;",
        ] {
            assert_eq!(from_line(line.as_bytes()).unwrap(), ["status"], "{line:?}");
        }
        for empty in ["", "\n", "exit\n", "; exit\n", " ; exit"] {
            assert!(from_line(empty.as_bytes()).unwrap().is_empty(), "{empty:?}");
        }
        assert_eq!(from_line(b"rules exit").unwrap(), ["rules", "exit"]);
        assert_eq!(from_line(b"preexit").unwrap(), ["preexit"]);
    }

    #[test]
    fn quotes_and_backslashes_join() {
        assert_eq!(
            from_line(br#"rules '10.0.0.1' --json"#).unwrap(),
            ["rules", "10.0.0.1", "--json"]
        );
        assert_eq!(
            from_line(br#"a"b \" c"'d e'\ f"#).unwrap(),
            [r#"ab " cd e f"#]
        );
        assert_eq!(from_line(b"a ''").unwrap(), ["a", ""]);
        for bad in [&b"'a"[..], b"\"a", b"a\\", b"\"a\\", b"\xff"] {
            assert_eq!(from_line(bad), Err(WordsError::Unreadable));
        }
    }

    #[test]
    fn words_are_bounded() {
        assert!(from_line("w ".repeat(WORDS_MAX).as_bytes()).is_ok());
        assert_eq!(
            from_line("w ".repeat(WORDS_MAX + 1).as_bytes()),
            Err(WordsError::TooMany)
        );
        assert_eq!(
            from_vmexec(&"w+".repeat(WORDS_MAX)),
            Err(WordsError::TooMany)
        );
    }

    #[test]
    fn vmexec_arguments_are_decoded() {
        assert_eq!(
            from_vmexec("rules+10.137.0.9+----json").unwrap(),
            ["rules", "10.137.0.9", "--json"]
        );
        assert_eq!(from_vmexec("a-20b-2Bc+").unwrap(), ["a b+c", ""]);
        assert_eq!(from_vmexec("-C3-A4").unwrap(), ["\u{e4}"]);
        for bad in ["-", "-2", "-2b", "-g0", "a b", "a/b", "-zz"] {
            assert_eq!(from_vmexec(bad), Err(WordsError::Escape), "{bad}");
        }
        assert_eq!(from_vmexec("-FF"), Err(WordsError::Unreadable));
    }
}
