//! What is to happen in dom0, and what the VM is to show, as text.
//!
//! One statement a line; `#` begins a comment. Words are separated by spaces; the last argument of a statement takes
//! the rest of its line.
//!
//! | statement | meaning |
//! | --- | --- |
//! | `network NAME ADDRESS GATEWAY MAC` | the keys of a VM with a netvm that provides network |
//! | `client ADDRESS GATEWAY` | what a client's start writes before its rules |
//! | `rules ADDRESS` | rewrite a client's rules: those in the following `NNNN TEXT` lines |
//! | `key PATH [VALUE]`, `remove PATH` | one key |
//! | `rewrite` | every key again, as a change of the netvm does |
//! | `wait synced`, `wait qrexec`, `wait acknowledged` | until the VM has the dump, has greeted, has answered all |
//! | `wait key PATH VALUE` | until the VM has written it |
//! | `allow SERVICE EXIT OUTPUT` | let the VM call a service of dom0 |
//! | `call EXIT LINE` | call, and require this exit status. `closed:BYTES` or `open:BYTES` before `LINE`: so much input |
//! | `shell EXIT COMMAND` | as `qvm-run` does, with `COMMAND; exit` on the input |
//! | `just EXIT LINE` | call without input and output |
//! | `expect TEXT`, `expect-error TEXT` | the last call's output, or error output, contains this |
//! | `sequence COUNT EXIT LINE` | so many calls one after the other |
//! | `parallel COUNT EXIT LINE` | so many calls at once |
//! | `first BYTES EXIT LINE` | call with so much input, all of it written before any output is read |
//! | `quiet EXIT LINE` | call while nobody reads; the status is what the caller sees, 255 without an exit code |
//! | `drop qubesdb`, `drop qrexec` | dom0 loses the channel and comes back |
//! | `sleep MILLISECONDS` | let time pass |
//! | `limit MILLISECONDS` | how long each later statement may take; 10,000 at first |

use std::fmt::Write;
use std::time::Duration;

use qubes::vchan::Channels;
use xen::Time;
use xen::stream::ByteStream;

use crate::caller::{Input, Outcome, Report, Spec};
use crate::dom0::{Dom0, Rules};
use crate::service::Response;

/// One statement.
#[derive(Clone, Debug)]
enum Step {
    Network(String, String, String, String),
    Client(String, String),
    Rules(Rules),
    Key(String, String),
    Remove(String),
    Rewrite,
    WaitSynced,
    WaitQrexec,
    WaitAcknowledged,
    WaitKey(String, String),
    Allow(String, Response),
    Calls {
        count: usize,
        at_once: usize,
        status: u8,
        spec: Spec,
    },
    Expect {
        error: bool,
        text: String,
    },
    DropQubesDb,
    DropQrexec,
    Sleep(Duration),
    Limit(Duration),
}

/// A scenario.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Line number, text, meaning.
    steps: Vec<(usize, String, Step)>,
}

/// Splits off the first word.
fn word(text: &str) -> Result<(&str, &str), String> {
    let text = text.trim_start();
    if text.is_empty() {
        return Err("something is missing".into());
    }
    Ok(text.split_once(' ').unwrap_or((text, "")))
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is no number here"))
}

/// Bytes of input, in lines, so that a service that wants a line gets one.
fn filler(len: usize) -> Vec<u8> {
    (0..len)
        .map(|index| if index % 64 == 63 { b'\n' } else { b'x' })
        .collect()
}

/// `[closed:BYTES|open:BYTES] LINE`.
fn spec(text: &str) -> Result<Spec, String> {
    let (first, rest) = word(text)?;
    if let Some(len) = first.strip_prefix("closed:") {
        return Ok(Spec::new(rest).with_input(Input::Closed(filler(number(len)?))));
    }
    if let Some(len) = first.strip_prefix("open:") {
        return Ok(Spec::new(rest).with_input(Input::Open(filler(number(len)?))));
    }
    Ok(Spec::new(text))
}

/// `EXIT LINE`.
fn calls(text: &str, count: usize, at_once: usize) -> Result<Step, String> {
    let (status, line) = word(text)?;
    Ok(Step::Calls {
        count,
        at_once,
        status: number(status)?,
        spec: spec(line)?,
    })
}

fn statement(verb: &str, rest: &str) -> Result<Step, String> {
    Ok(match verb {
        "network" => {
            let (name, rest) = word(rest)?;
            let (own, rest) = word(rest)?;
            let (gateway, mac) = word(rest)?;
            Step::Network(name.into(), own.into(), gateway.into(), mac.trim().into())
        }
        "client" => {
            let (address, gateway) = word(rest)?;
            Step::Client(address.into(), gateway.trim().into())
        }
        "rules" => Step::Rules(Rules {
            address: rest.trim().into(),
            rules: Vec::new(),
        }),
        "key" => {
            let (path, value) = word(rest)?;
            Step::Key(path.into(), value.into())
        }
        "remove" => Step::Remove(rest.trim().into()),
        "rewrite" => Step::Rewrite,
        "wait" => match word(rest)? {
            ("synced", _) => Step::WaitSynced,
            ("qrexec", _) => Step::WaitQrexec,
            ("acknowledged", _) => Step::WaitAcknowledged,
            ("key", rest) => {
                let (path, value) = word(rest)?;
                Step::WaitKey(path.into(), value.into())
            }
            (other, _) => return Err(format!("cannot wait for {other:?}")),
        },
        "allow" => {
            let (service, rest) = word(rest)?;
            let (exit, output) = word(rest)?;
            let response = Response {
                stdout: output.into(),
                exit: number(exit)?,
            };
            Step::Allow(service.into(), response)
        }
        "call" => calls(rest, 1, 1)?,
        "just" => match calls(rest, 1, 1)? {
            Step::Calls { status, spec, .. } => Step::Calls {
                count: 1,
                at_once: 1,
                status,
                spec: spec.just(),
            },
            other => other,
        },
        "first" => {
            let (len, rest) = word(rest)?;
            let (status, line) = word(rest)?;
            Step::Calls {
                count: 1,
                at_once: 1,
                status: number(status)?,
                spec: Spec {
                    writes_first: true,
                    ..Spec::new(line).with_input(Input::Closed(filler(number(len)?)))
                },
            }
        }
        "quiet" => match calls(rest, 1, 1)? {
            Step::Calls { status, spec, .. } => Step::Calls {
                count: 1,
                at_once: 1,
                status,
                spec: Spec {
                    never_reads: true,
                    ..spec
                },
            },
            other => other,
        },
        "shell" => {
            let (status, command) = word(rest)?;
            let input = Input::Open(format!("{command}; exit\n").into_bytes());
            Step::Calls {
                count: 1,
                at_once: 1,
                status: number(status)?,
                spec: Spec::new("user:QUBESRPC qubes.VMShell+ dom0").with_input(input),
            }
        }
        "sequence" => {
            let (count, rest) = word(rest)?;
            calls(rest, number(count)?, 1)?
        }
        "parallel" => {
            let (count, rest) = word(rest)?;
            let count = number(count)?;
            calls(rest, count, count)?
        }
        "expect" | "expect-error" => Step::Expect {
            error: verb == "expect-error",
            text: rest.into(),
        },
        "drop" => match rest.trim() {
            "qubesdb" => Step::DropQubesDb,
            "qrexec" => Step::DropQrexec,
            other => return Err(format!("cannot drop {other:?}")),
        },
        "sleep" => Step::Sleep(Duration::from_millis(number(rest.trim())?)),
        "limit" => Step::Limit(Duration::from_millis(number(rest.trim())?)),
        other => return Err(format!("{other:?} is no statement")),
    })
}

impl Scenario {
    /// Reads a scenario.
    ///
    /// # Errors
    ///
    /// The line's number and what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut steps: Vec<(usize, String, Step)> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
            if let Ok(number) = verb.parse()
                && let Some((_, _, Step::Rules(rules))) = steps.last_mut()
            {
                rules.rules.push((number, rest.into()));
                continue;
            }
            let step =
                statement(verb, rest).map_err(|error| format!("line {}: {error}", index + 1))?;
            steps.push((index + 1, line.into(), step));
        }
        Ok(Self { steps })
    }
}

/// What a poll of a [`Runner`] came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Progress {
    /// Goes on.
    Going,
    /// This statement is done.
    Did(String),
    /// All statements are done.
    Finished,
}

/// Carries a scenario out.
#[derive(Debug)]
pub struct Runner {
    scenario: Scenario,
    at: usize,
    limit: Duration,
    began: Option<Time>,
    started: usize,
    reports: Vec<Report>,
}

impl Runner {
    /// At the scenario's first statement.
    #[must_use]
    pub const fn new(scenario: Scenario) -> Self {
        Self {
            scenario,
            at: 0,
            limit: Duration::from_secs(10),
            began: None,
            started: 0,
            reports: Vec::new(),
        }
    }

    /// Carries out as much of the present statement as is possible now.
    ///
    /// # Errors
    ///
    /// What was expected and did not happen, with its line.
    pub fn poll<N>(
        &mut self,
        dom0: &mut Dom0<N::Channel>,
        channels: &mut N,
    ) -> Result<Progress, String>
    where
        N: Channels,
        N::Channel: ByteStream,
    {
        let Some((line, text, step)) = self.scenario.steps.get(self.at).cloned() else {
            return Ok(Progress::Finished);
        };
        let now = channels.now();
        let began = *self.began.get_or_insert(now);
        let place = |error: String| format!("line {line} ({text}): {error}");
        if self
            .carry_out(&step, dom0, channels, now.since(began))
            .map_err(place)?
        {
            self.at += 1;
            self.began = None;
            let mut did = text;
            let _ = write!(did, " [{} ms]", now.since(began).as_millis());
            return Ok(Progress::Did(did));
        }
        if now.since(began) > self.limit {
            let state = format!(
                "nothing after {} ms; QubesDB {:?}, ports taken {}",
                self.limit.as_millis(),
                dom0.qubesdb.seen(),
                dom0.qrexec.taken_ports()
            );
            return Err(place(state));
        }
        Ok(Progress::Going)
    }

    /// Whether the step is done.
    fn carry_out<N: Channels>(
        &mut self,
        step: &Step,
        dom0: &mut Dom0<N::Channel>,
        channels: &mut N,
        elapsed: Duration,
    ) -> Result<bool, String> {
        match step {
            Step::Network(name, own, gateway, mac) => dom0.network(name, own, gateway, mac),
            Step::Client(address, gateway) => dom0.client(address, gateway),
            Step::Rules(rules) => dom0.rules(rules.clone()),
            Step::Key(path, value) => dom0.key(path, value),
            Step::Remove(path) => dom0.qubesdb.remove(path),
            Step::Rewrite => dom0.rewrite(),
            Step::WaitSynced => return Ok(dom0.qubesdb.is_synced()),
            Step::WaitQrexec => return Ok(dom0.qrexec.is_connected()),
            Step::WaitAcknowledged => {
                let seen = dom0.qubesdb.seen();
                return Ok(dom0.qubesdb.is_synced() && seen.acknowledged == seen.pushed);
            }
            Step::WaitKey(path, value) => {
                return Ok(dom0.qubesdb.get(path) == Some(value.as_bytes()));
            }
            Step::Allow(service, response) => dom0.qrexec.allow(service, response.clone()),
            Step::Calls {
                count,
                at_once,
                status,
                spec,
            } => return self.calls(dom0, channels, (*count, *at_once), *status, spec),
            Step::Expect { error, text } => self.expect(*error, text)?,
            Step::DropQubesDb => {
                // In the middle of a dump the daemon itself would be at fault.
                if !dom0.qubesdb.is_synced() {
                    return Ok(false);
                }
                dom0.qubesdb.disconnect(channels);
            }
            Step::DropQrexec => dom0.qrexec.disconnect(channels),
            Step::Sleep(duration) => return Ok(elapsed >= *duration),
            Step::Limit(limit) => self.limit = *limit,
        }
        Ok(true)
    }

    /// Makes calls; true when all of them are over on both sides.
    fn calls<N: Channels>(
        &mut self,
        dom0: &mut Dom0<N::Channel>,
        channels: &mut N,
        (count, at_once): (usize, usize),
        status: u8,
        spec: &Spec,
    ) -> Result<bool, String> {
        if self.started == 0 {
            self.reports.clear();
        }
        self.reports.extend(dom0.qrexec.take_reports());
        if let Some(report) = self
            .reports
            .iter()
            .find(|report| seen_status(report) != status)
        {
            return Err(format!(
                "status {} ({:?}); output {:?}; errors {:?}",
                seen_status(report),
                report.outcome,
                String::from_utf8_lossy(&report.stdout),
                String::from_utf8_lossy(&report.stderr)
            ));
        }
        while self.started < count && self.started - self.reports.len() < at_once {
            // The next call of a sequence is made only when dom0 knows that the last one's port is free.
            if (at_once == 1 && dom0.qrexec.taken_ports() > 0)
                || !dom0.qrexec.call(channels, spec.clone())
            {
                return Ok(false);
            }
            self.started += 1;
        }
        let over = self.reports.len() == count && dom0.qrexec.taken_ports() == 0;
        if over {
            self.started = 0;
        }
        Ok(over)
    }

    fn expect(&self, error: bool, text: &str) -> Result<(), String> {
        let Some(report) = self.reports.last() else {
            return Err("there was no call before".into());
        };
        let bytes = if error {
            &report.stderr
        } else {
            &report.stdout
        };
        let said = String::from_utf8_lossy(bytes);
        if said.contains(text) {
            Ok(())
        } else {
            Err(format!("not in {said:?}"))
        }
    }

    /// The reports of the last `call`, `sequence` or `parallel`.
    #[must_use]
    pub fn reports(&self) -> &[Report] {
        &self.reports
    }
}

/// The exit status that the caller sees.
#[must_use]
pub fn seen_status(report: &Report) -> u8 {
    match report.outcome {
        Outcome::Exit(code) => code,
        Outcome::NeverConnected => 125,
        Outcome::NoExitCode | Outcome::Left => 255,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (text, error) in [
            ("wait for godot", "line 1: cannot wait for \"for\""),
            ("\nfly", "line 2: \"fly\" is no statement"),
            ("call x user:a", "line 1: \"x\" is no number here"),
            ("# fine\ncall", "line 2: something is missing"),
            ("0000 action=accept", "line 1: \"0000\" is no statement"),
        ] {
            assert_eq!(Scenario::parse(text).err().as_deref(), Some(error));
        }
    }

    #[test]
    fn numbered_lines_belong_to_the_rules_before_them() {
        let text =
            "rules 10.137.0.9\n  0000 action=accept proto=tcp\n  0007 action=drop\nwait synced\n";
        let scenario = Scenario::parse(text).unwrap();
        assert_eq!(scenario.steps.len(), 2);
        let Step::Rules(rules) = &scenario.steps[0].2 else {
            panic!("not rules");
        };
        assert_eq!(rules.rules[1], (7, "action=drop".into()));
    }
}
