//! The grammar of the command line in `EXEC_CMDLINE` and `JUST_EXEC`.
//!
//! ```text
//! line       := user ":" [ "nogui:" ] command NUL
//! command    := "QUBESRPC " descriptor " " source [ " " target-type " " target ]  |  anything else
//! descriptor := name [ "+" argument ]
//! ```
//!
//! Everything in it comes from dom0 and was checked by policy; the source is dom0's own statement.

/// What a line asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Line<'a> {
    /// A service.
    Service {
        /// Its name, 1 to 255 bytes.
        name: &'a str,
        /// Its argument; empty when there is none, with or without a `+`.
        argument: &'a str,
        /// The calling domain's name.
        source: &'a str,
    },
    /// A command as typed in dom0.
    Raw(&'a str),
}

/// Why a line asks for nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Malformed {
    /// It does not end with a NUL, or has one earlier.
    Terminator,
    /// It is no UTF-8.
    Text,
    /// It has no `:` behind a user.
    User,
    /// What follows `QUBESRPC` lacks a service's name or its source.
    Service,
}

impl Malformed {
    /// One line for the caller.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Terminator => "command line does not end with its only NUL byte",
            Self::Text => "command line is not UTF-8",
            Self::User => "command line does not begin with `user:`",
            Self::Service => "command line is not `QUBESRPC service[+argument] source`",
        }
    }
}

/// Parses the bytes behind the two numbers of the message.
///
/// # Errors
///
/// [`Malformed`]: the caller gets exit code 125.
pub fn parse(bytes: &[u8]) -> Result<Line<'_>, Malformed> {
    let text = bytes.strip_suffix(&[0]).ok_or(Malformed::Terminator)?;
    if text.contains(&0) {
        return Err(Malformed::Terminator);
    }
    let text = core::str::from_utf8(text).map_err(|_| Malformed::Text)?;
    let (user, command) = text.split_once(':').ok_or(Malformed::User)?;
    if user.is_empty() {
        return Err(Malformed::User);
    }
    let command = command.strip_prefix("nogui:").unwrap_or(command);
    match command.strip_prefix("QUBESRPC") {
        Some(call) => service(call),
        None => Ok(Line::Raw(command)),
    }
}

/// Parses what follows `QUBESRPC`.
fn service(call: &str) -> Result<Line<'_>, Malformed> {
    let call = call.strip_prefix(' ').ok_or(Malformed::Service)?;
    let (descriptor, rest) = call.split_once(' ').ok_or(Malformed::Service)?;
    let source = rest.split(' ').next().unwrap_or_default();
    let (name, argument) = descriptor.split_once('+').unwrap_or((descriptor, ""));
    if name.is_empty() || name.len() > 255 || source.is_empty() {
        return Err(Malformed::Service);
    }
    Ok(Line::Service {
        name,
        argument,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call<'a>(name: &'a str, argument: &'a str, source: &'a str) -> Result<Line<'a>, Malformed> {
        Ok(Line::Service {
            name,
            argument,
            source,
        })
    }

    #[test]
    fn r2_with_and_without_a_plus_is_the_same_call() {
        for line in [
            &b"user:QUBESRPC qubes.WaitForSession dom0\0"[..],
            b"user:QUBESRPC qubes.WaitForSession+ dom0\0",
            b"root:nogui:QUBESRPC qubes.WaitForSession+ dom0\0",
            b"user:QUBESRPC qubes.WaitForSession dom0 name fw\0",
            b"user:QUBESRPC qubes.WaitForSession+ dom0 keyword adminvm\0",
        ] {
            assert_eq!(parse(line), call("qubes.WaitForSession", "", "dom0"));
        }
        assert_eq!(
            parse(b"user:QUBESRPC qubes.VMExec+a+b work\0"),
            call("qubes.VMExec", "a+b", "work")
        );
    }

    #[test]
    fn anything_else_is_a_raw_command() {
        assert_eq!(parse(b"user:status\0"), Ok(Line::Raw("status")));
        assert_eq!(parse(b"user:nogui:echo a:b\0"), Ok(Line::Raw("echo a:b")));
        assert_eq!(parse(b"user:\0"), Ok(Line::Raw("")));
    }

    #[test]
    fn malformed_lines_are_named() {
        for (line, reason) in [
            (&b"status\0"[..], Malformed::User),
            (b":status\0", Malformed::User),
            (b"user:status", Malformed::Terminator),
            (b"user:sta\0tus\0", Malformed::Terminator),
            (b"", Malformed::Terminator),
            (b"user:\xff\0", Malformed::Text),
            (b"user:QUBESRPC\0", Malformed::Service),
            (b"user:QUBESRPCx y\0", Malformed::Service),
            (b"user:QUBESRPC qubes.VMShell\0", Malformed::Service),
            (b"user:QUBESRPC qubes.VMShell \0", Malformed::Service),
            (b"user:QUBESRPC  dom0\0", Malformed::Service),
            (b"user:QUBESRPC +x dom0\0", Malformed::Service),
        ] {
            assert_eq!(parse(line), Err(reason), "{}", line.escape_ascii());
        }
    }

    #[test]
    fn names_of_services_have_at_most_255_bytes() {
        let line = alloc::format!("user:QUBESRPC {} dom0\0", "x".repeat(255));
        assert!(parse(line.as_bytes()).is_ok());
        let line = alloc::format!("user:QUBESRPC {} dom0\0", "x".repeat(256));
        assert_eq!(parse(line.as_bytes()), Err(Malformed::Service));
    }
}
