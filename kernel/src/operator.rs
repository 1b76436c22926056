//! What dom0's calls act on: the operator's commands, and the few things that Qubes OS tells a qube.

use core::fmt::Write as _;

use qubes::qrexec::{self, Command, Host, Output, Step, exit};

use crate::command;
use crate::machine::{Firewall, MachineView};

/// The firewall as calls see it.
pub(crate) struct Operator<'a> {
    pub(crate) firewall: &'a Firewall,
    pub(crate) machine: MachineView,
}

impl Host for Operator<'_> {
    fn run(&mut self, command: &Command<'_>, out: &mut Output) -> Step {
        let line = command.words.join(" ");
        // Writing to an output does not fail: what has no room is counted there.
        match command::parse(&line) {
            Ok(None) => Step::Exit(exit::OK),
            Err(error) => {
                let _ = writeln!(out.stderr(), "{error}");
                Step::Exit(error.exit_code())
            }
            Ok(Some(invocation)) => {
                let text = self.firewall.run(&self.machine, &invocation);
                write_from(&text, command.cursor, out)
            }
        }
    }

    fn uplink(&self) -> qrexec::Uplink {
        self.firewall.uplink_state()
    }

    fn suspending(&mut self) {
        xen::info!("dom0 is about to suspend the computer");
    }

    fn resumed(&mut self) {
        xen::info!("dom0 has resumed the computer");
    }

    fn told_time(&mut self, unix_seconds: i64) {
        xen::info!("dom0 says that it is {unix_seconds} s since 1970");
    }
}

/// Writes what there is room for of `text` from byte `cursor` on. A text that is longer is made anew for the next piece, and
/// may have changed by then; that is what a view of something live is like.
fn write_from(text: &str, cursor: u64, out: &mut Output) -> Step {
    let start = usize::try_from(cursor).unwrap_or(usize::MAX);
    let mut end = start.saturating_add(out.room()).min(text.len());
    while end > start && !text.is_char_boundary(end) {
        end -= 1;
    }
    let piece = text.get(start..end).unwrap_or_default();
    let _ = out.stdout().write_str(piece);
    if end < text.len() && !piece.is_empty() {
        Step::Again(u64::try_from(end).unwrap_or(u64::MAX))
    } else {
        Step::Exit(exit::OK)
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::String;

    use super::*;

    #[test]
    fn long_output_comes_in_pieces_that_make_up_the_whole() {
        let text: String = (0..40_000)
            .map(|number| alloc::format!("{number}\u{e9} "))
            .collect();
        let (mut cursor, mut pieces, mut total) = (0, 0, 0);
        loop {
            let mut out = Output::new(false);
            let room = out.room();
            let step = write_from(&text, cursor, &mut out);
            assert_eq!(out.lost(), 0);
            pieces += 1;
            match step {
                Step::Again(next) => {
                    assert!(next > cursor && next - cursor <= u64::try_from(room).unwrap());
                    total += next - cursor;
                    cursor = next;
                }
                Step::Exit(code) => {
                    total += u64::try_from(text.len()).unwrap() - cursor;
                    assert_eq!(code, exit::OK);
                    break;
                }
            }
        }
        assert_eq!(total, u64::try_from(text.len()).unwrap());
        assert!(pieces > 3);
    }
}
