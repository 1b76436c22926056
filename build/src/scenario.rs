//! Results of checks: one line each as they come, a table at the end, or JSON.
//!
//! Four outcomes, after Xen's own test framework: `SUCCESS`; `SKIP`, which says why;
//! `FAILURE`, the product's fault; `ERROR`, ours: the test could not be carried out.
//! Only a run without `FAILURE` and `ERROR` is good.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use kernel::snapshot::DATA_MARK;

use crate::claims::{Claim, NotSo};
use crate::lab::world::LabWorld;
use crate::screen::{BAD, BOLD, DIM, GOOD, Screen, WARN, paint, seconds};

/// Lines of the firewall's console that are shown with a claim that failed.
const LAST_WORDS: usize = 16;

/// How a check ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE", tag = "outcome", content = "reason")]
pub enum Outcome {
    /// It held.
    Success,
    /// It was not carried out, for this reason.
    Skip(String),
    /// It could not be carried out.
    Error(String),
    /// It does not hold.
    Failure(String),
}

impl Outcome {
    /// What a check's result means.
    #[must_use]
    pub fn of<T>(result: &Result<T>) -> Self {
        match result {
            Ok(_) => Self::Success,
            Err(error) if error.is::<NotSo>() => Self::Failure(format!("{error:#}")),
            Err(error) => Self::Error(format!("{error:#}")),
        }
    }

    fn word(&self) -> &'static str {
        match self {
            Self::Success => "SUCCESS",
            Self::Skip(_) => "SKIP",
            Self::Error(_) => "ERROR",
            Self::Failure(_) => "FAILURE",
        }
    }

    fn reason(&self) -> Option<&str> {
        match self {
            Self::Success => None,
            Self::Skip(reason) | Self::Error(reason) | Self::Failure(reason) => Some(reason),
        }
    }

    fn painted(&self) -> String {
        let style = match self {
            Self::Success => GOOD,
            Self::Skip(_) => WARN,
            Self::Error(_) | Self::Failure(_) => BAD,
        };
        paint(style, &format!("{:<7}", self.word()))
    }
}

/// A check that was carried out, or not.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// Where it belongs: `host`, `lab`, ...
    pub group: &'static str,
    /// Its name.
    pub name: String,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// What was seen, a line each.
    pub seen: Vec<String>,
}

/// All results of a run.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    entries: Vec<Entry>,
    #[serde(skip)]
    quiet: bool,
}

impl Report {
    /// An empty report; a quiet one prints nothing before its end.
    #[must_use]
    pub fn new(quiet: bool) -> Self {
        Self {
            entries: Vec::new(),
            quiet,
        }
    }

    /// Adds a result and prints its line.
    pub fn add(
        &mut self,
        group: &'static str,
        name: &str,
        outcome: Outcome,
        time: Duration,
        seen: Vec<String>,
    ) {
        if !self.quiet {
            anstream::println!(
                "{} {group}/{name} {}",
                outcome.painted(),
                paint(DIM, &format!("({})", seconds(time)))
            );
            for line in seen
                .iter()
                .map(String::as_str)
                .chain(outcome.reason().into_iter().flat_map(str::lines))
            {
                anstream::println!("          {line}");
            }
        }
        self.entries.push(Entry {
            group,
            name: name.to_owned(),
            outcome,
            seconds: time.as_secs_f64(),
            seen,
        });
    }

    /// Carries out a check that returns what it saw, and adds its result. Returns whether it held.
    pub fn check(
        &mut self,
        group: &'static str,
        name: &str,
        check: impl FnOnce() -> Result<Vec<String>>,
    ) -> bool {
        let begun = Instant::now();
        let result = check();
        let outcome = Outcome::of(&result);
        let held = outcome == Outcome::Success;
        self.add(
            group,
            name,
            outcome,
            begun.elapsed(),
            result.unwrap_or_default(),
        );
        held
    }

    /// Carries out a claim in the lab.
    pub fn claim(
        &mut self,
        screen: &Screen,
        group: &'static str,
        world: &mut LabWorld,
        claim: &Claim,
    ) -> bool {
        let step = (!self.quiet).then(|| screen.step(claim.title));
        let held = self.check(group, claim.name, || {
            (claim.check)(world).map_err(|error| with_last_words(world, error))
        });
        if let Some(step) = step {
            step.forget();
        }
        held
    }

    /// Notes that a check is not carried out, and why.
    pub fn skip(&mut self, group: &'static str, name: &str, reason: &str) {
        self.add(
            group,
            name,
            Outcome::Skip(reason.to_owned()),
            Duration::ZERO,
            Vec::new(),
        );
    }

    /// All results so far.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Whether nothing failed.
    #[must_use]
    pub fn is_good(&self) -> bool {
        !self
            .entries
            .iter()
            .any(|entry| matches!(entry.outcome, Outcome::Failure(_) | Outcome::Error(_)))
    }

    /// Prints the table of all results and the closing line.
    ///
    /// The last line, `N passed, N failed, N skipped`, is for programs that read logs.
    pub fn print_summary(&self, total: Duration) {
        let width = self
            .entries
            .iter()
            .map(|entry| entry.group.len() + 1 + entry.name.len())
            .max()
            .unwrap_or(0);
        anstream::println!("\n{}", paint(BOLD, "Summary"));
        for entry in &self.entries {
            let name = format!("{}/{}", entry.group, entry.name);
            let reason = match &entry.outcome {
                Outcome::Success => "",
                other => other
                    .reason()
                    .and_then(|reason| reason.lines().next())
                    .unwrap_or(""),
            };
            anstream::println!(
                "  {} {name:<width$} {:>9}  {reason}",
                entry.outcome.painted(),
                seconds(Duration::from_secs_f64(entry.seconds))
            );
        }
        let count = |wanted: fn(&Outcome) -> bool| {
            self.entries
                .iter()
                .filter(|entry| wanted(&entry.outcome))
                .count()
        };
        anstream::println!("  in {}", seconds(total));
        anstream::println!(
            "{} passed, {} failed, {} skipped",
            count(|outcome| *outcome == Outcome::Success),
            count(|outcome| matches!(outcome, Outcome::Failure(_) | Outcome::Error(_))),
            count(|outcome| matches!(outcome, Outcome::Skip(_)))
        );
    }
}

/// Adds what the firewall said last to the error of a claim, without hiding whose fault it is.
fn with_last_words(world: &LabWorld, error: anyhow::Error) -> anyhow::Error {
    let Ok(firewall) = world.firewall() else {
        return error;
    };
    let said = firewall.console.text_from(0);
    let lines: Vec<&str> = said
        .lines()
        .filter(|line| !line.starts_with(DATA_MARK))
        .collect();
    let from = lines.len().saturating_sub(LAST_WORDS);
    let last = lines.get(from..).unwrap_or_default().join("\n");
    let text = format!("{error:#}\nthe firewall said last:\n{last}");
    if error.is::<NotSo>() {
        NotSo(text).into()
    } else {
        anyhow::anyhow!(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::claims::must;

    #[test]
    fn a_broken_promise_is_a_failure_and_anything_else_an_error() {
        let mut report = Report::new(true);
        assert!(report.check("t", "good", || Ok(vec!["seen".into()])));
        assert!(report.is_good());
        report.skip("t", "left out", "no time");
        assert!(report.is_good());
        assert!(!report.check("t", "bad", || {
            must(false, || "not so".into())?;
            Ok(Vec::new())
        }));
        assert!(!report.check("t", "broken", || anyhow::bail!("no lab")));
        let outcomes: Vec<_> = report
            .entries()
            .iter()
            .map(|entry| entry.outcome.word())
            .collect();
        assert_eq!(outcomes, ["SUCCESS", "SKIP", "FAILURE", "ERROR"]);
        assert!(!report.is_good());
    }
}
