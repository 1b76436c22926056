//! Which service wants what.
//!
//! A firewall has no service that clients need; it must end every call promptly and correctly. What shows or touches
//! its state is for dom0 alone, whatever policy says.
//!
//! | service | answer |
//! | --- | --- |
//! | `qubes.WaitForSession`, `qubes.ResizeDisk` | 0 at once (there is no session and no disk to wait for) |
//! | `qubes.WaitForNetworkUplink` | 0 when the uplink is connected or absent, 3 after [`super::call::UPLINK_WAIT`] |
//! | `qubes.SuspendPre`, `…PreAll`, `qubes.SuspendPost`, `…PostAll` | 0, after telling the host |
//! | `qubes.VMShell`, `qubes.VMRootShell` | the first line of input is a command |
//! | `qubes.VMExec`, `qubes.VMExecGUI`, `qubes.VMRootExec` | the argument is a command |
//! | `qubes.SetDateTime` | 0 when the first line of input is a time, else 1 |
//! | anything else | 127 |

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use xen::DomId;

use super::cmdline::{Line, Malformed};
use super::exit;
use super::words;

/// What is to be done for a call.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Plan {
    /// Nothing; it ends with this code.
    Exit(u8),
    /// One line on stderr, and this code.
    Refuse(u8, String),
    /// Wait for the uplink.
    AwaitUplink,
    /// Tell the host that the computer is about to sleep.
    Suspend,
    /// Tell the host that the computer has slept.
    Resume,
    /// Run the command in the first line of input.
    ShellLine,
    /// Take the time in the first line of input.
    Date,
    /// Run these words, at least one.
    Command(Vec<String>),
}

impl Plan {
    /// The refusal of a line that could not be parsed.
    #[must_use]
    pub fn malformed(reason: Malformed) -> Self {
        Self::Refuse(exit::CANNOT_RUN, reason.reason().into())
    }

    /// What to do with the words of a command line, once they are known.
    #[must_use]
    pub fn for_words(words: Result<Vec<String>, words::WordsError>) -> Self {
        match words {
            Ok(words) if words.is_empty() => Self::Exit(exit::OK),
            Ok(words) => Self::Command(words),
            Err(error) => Self::Refuse(exit::USAGE, error.reason().into()),
        }
    }
}

/// Whether a service shows or touches our state, so that only dom0 may call it.
fn is_for_dom0(name: &str) -> bool {
    !matches!(name, "qubes.WaitForSession" | "qubes.ResizeDisk")
}

/// Decides what to do. `peer` is the domain to which the data channel leads.
#[must_use]
pub fn plan(line: Result<Line<'_>, Malformed>, peer: DomId) -> Plan {
    let (name, argument, source) = match line {
        Err(reason) => return Plan::malformed(reason),
        Ok(Line::Raw(_)) if peer != DomId::DOM0 => {
            return refuse_stranger("a raw command");
        }
        Ok(Line::Raw(command)) => return Plan::for_words(words::from_line(command.as_bytes())),
        Ok(Line::Service {
            name,
            argument,
            source,
        }) => (name, argument, source),
    };
    let plan = match name {
        "qubes.WaitForSession" | "qubes.ResizeDisk" => Plan::Exit(exit::OK),
        "qubes.WaitForNetworkUplink" => Plan::AwaitUplink,
        "qubes.SuspendPre" | "qubes.SuspendPreAll" => Plan::Suspend,
        "qubes.SuspendPost" | "qubes.SuspendPostAll" => Plan::Resume,
        "qubes.VMShell" | "qubes.VMRootShell" => Plan::ShellLine,
        "qubes.VMExec" | "qubes.VMExecGUI" | "qubes.VMRootExec" => {
            Plan::for_words(words::from_vmexec(argument))
        }
        "qubes.SetDateTime" => Plan::Date,
        _ => {
            let reason = format!("{name}: this qube has no such service");
            return Plan::Refuse(exit::UNKNOWN, reason);
        }
    };
    if is_for_dom0(name) && (source != "dom0" || peer != DomId::DOM0) {
        return refuse_stranger(name);
    }
    plan
}

fn refuse_stranger(what: &str) -> Plan {
    Plan::Refuse(exit::REFUSED, format!("{what} is accepted from dom0 only"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qrexec::cmdline;

    fn planned(line: &str, peer: u16) -> Plan {
        let bytes = [line.as_bytes(), b"\0"].concat();
        plan(cmdline::parse(&bytes), DomId(peer))
    }

    fn words(words: &[&str]) -> Plan {
        Plan::Command(words.iter().map(|word| String::from(*word)).collect())
    }

    #[test]
    fn every_service_of_the_table_is_planned() {
        for (line, expected) in [
            ("user:QUBESRPC qubes.WaitForSession dom0", Plan::Exit(0)),
            ("root:QUBESRPC qubes.ResizeDisk+root dom0", Plan::Exit(0)),
            ("root:QUBESRPC qubes.SuspendPreAll dom0", Plan::Suspend),
            ("root:QUBESRPC qubes.SuspendPre+ dom0", Plan::Suspend),
            ("root:QUBESRPC qubes.SuspendPostAll dom0", Plan::Resume),
            ("root:QUBESRPC qubes.SuspendPost+ dom0", Plan::Resume),
            ("user:QUBESRPC qubes.VMShell+ dom0", Plan::ShellLine),
            (
                "user:QUBESRPC qubes.VMShell+WaitForSession dom0",
                Plan::ShellLine,
            ),
            ("root:QUBESRPC qubes.VMRootShell dom0", Plan::ShellLine),
            (
                "user:QUBESRPC qubes.VMExec+rules+----json dom0",
                words(&["rules", "--json"]),
            ),
            (
                "user:QUBESRPC qubes.VMExecGUI+status dom0",
                words(&["status"]),
            ),
            (
                "user:QUBESRPC qubes.VMRootExec+status dom0",
                words(&["status"]),
            ),
            ("root:QUBESRPC qubes.SetDateTime dom0", Plan::Date),
            ("user:status", words(&["status"])),
            (
                "user:rules 10.137.0.9; exit",
                words(&["rules", "10.137.0.9"]),
            ),
            ("user:", Plan::Exit(0)),
        ] {
            assert_eq!(planned(line, 0), expected, "{line}");
        }
    }

    #[test]
    fn r10_the_uplink_service_is_implemented() {
        assert_eq!(
            planned("root:QUBESRPC qubes.WaitForNetworkUplink dom0", 0),
            Plan::AwaitUplink
        );
    }

    #[test]
    fn unknown_services_are_127_for_everybody() {
        for service in [
            "qubes.SetMonitorLayout",
            "qubes.SetGuiMode",
            "qubes.DetachPciDevice+x",
            "qubes.GetAppmenus",
            "qubes.PostInstall",
            "qubes.GetImageRGBA",
            "qubes.GetDate+nanoseconds",
            "qubes.SyncNtpClock",
            "qubes.UpdatesProxy",
            "qubes.Filecopy",
            "a",
        ] {
            for (source, peer) in [("dom0", 0), ("work", 7)] {
                let plan = planned(&format!("user:QUBESRPC {service} {source}"), peer);
                assert!(matches!(plan, Plan::Refuse(exit::UNKNOWN, _)), "{service}");
            }
        }
    }

    #[test]
    fn other_qubes_are_refused_what_shows_or_touches_our_state() {
        for service in [
            "qubes.VMShell+",
            "qubes.VMExec+status",
            "qubes.SetDateTime",
            "qubes.SuspendPost",
            "qubes.WaitForNetworkUplink",
        ] {
            for (source, peer) in [("work", 7), ("work", 0), ("dom0", 7)] {
                let plan = planned(&format!("user:QUBESRPC {service} {source}"), peer);
                assert!(matches!(plan, Plan::Refuse(exit::REFUSED, _)), "{service}");
            }
        }
        assert!(matches!(
            planned("user:status", 7),
            Plan::Refuse(exit::REFUSED, _)
        ));
        assert_eq!(
            planned("user:QUBESRPC qubes.WaitForSession work", 7),
            Plan::Exit(0)
        );
    }

    #[test]
    fn malformed_lines_are_125_and_bad_encodings_2() {
        for line in ["status", "user:QUBESRPC", "user:QUBESRPC x"] {
            assert!(
                matches!(planned(line, 0), Plan::Refuse(exit::CANNOT_RUN, _)),
                "{line}"
            );
        }
        assert!(matches!(
            planned("user:QUBESRPC qubes.VMExec+-x dom0", 0),
            Plan::Refuse(exit::USAGE, _)
        ));
        assert!(matches!(
            planned("user:'a", 0),
            Plan::Refuse(exit::USAGE, _)
        ));
    }
}
