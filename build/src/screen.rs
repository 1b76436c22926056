//! What a person sees: steps, progress bars, tables.
//!
//! Progress goes to standard error, results to standard output. On a terminal
//! steps are animated and coloured; elsewhere each is one plain line, so that a
//! log stays readable. Colour obeys `NO_COLOR` and the like (by `anstream`).

use std::borrow::Cow;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressStyle};

/// Good news.
pub const GOOD: Style = AnsiColor::Green.on_default().bold();
/// Bad news.
pub const BAD: Style = AnsiColor::Red.on_default().bold();
/// Neither.
pub const WARN: Style = AnsiColor::Yellow.on_default();
/// A heading.
pub const BOLD: Style = Style::new().bold();
/// Something of minor interest.
pub const DIM: Style = Style::new().dimmed();

/// How often an animated step moves.
const TICK: Duration = Duration::from_millis(120);

/// Paints text for one of the streams of `anstream`.
#[must_use]
pub fn paint(style: Style, text: &str) -> String {
    format!("{style}{text}{style:#}")
}

/// The person's screen, or a log.
#[derive(Debug, Clone, Copy)]
pub struct Screen {
    animated: bool,
    quiet: bool,
}

impl Screen {
    /// Finds out whether a person is watching.
    #[must_use]
    pub fn new() -> Self {
        Self {
            animated: std::io::stderr().is_terminal(),
            quiet: false,
        }
    }

    /// The same, but without progress (for machine-readable output).
    #[must_use]
    pub fn silenced(self) -> Self {
        Self {
            quiet: true,
            ..self
        }
    }

    /// Whether lines can be redrawn.
    #[must_use]
    pub fn is_animated(&self) -> bool {
        self.animated && !self.quiet
    }

    /// Prints a remark between steps.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            anstream::eprintln!("{} {text}", paint(DIM, "--"));
        }
    }

    /// Prints something that the person should not overlook.
    pub fn warn(&self, text: &str) {
        anstream::eprintln!("{} {text}", paint(WARN, "note:"));
    }

    /// Begins a step of unknown length.
    #[must_use]
    pub fn step(&self, text: impl Into<Cow<'static, str>>) -> Step {
        let text = text.into();
        let bar = if self.is_animated() {
            let bar = ProgressBar::new_spinner()
                .with_style(
                    ProgressStyle::with_template("{spinner} {msg} {elapsed}")
                        .unwrap_or_else(|_| ProgressStyle::default_spinner()),
                )
                .with_message(text.clone());
            bar.enable_steady_tick(TICK);
            bar
        } else {
            ProgressBar::hidden()
        };
        Step {
            text,
            bar,
            begun: Instant::now(),
            quiet: self.quiet,
            open: true,
        }
    }

    /// Begins a step that moves a known number of bytes.
    #[must_use]
    pub fn bytes(&self, text: impl Into<Cow<'static, str>>, total: u64) -> Step {
        let text = text.into();
        let bar = if self.is_animated() {
            ProgressBar::new(total)
                .with_style(
                    ProgressStyle::with_template(
                        "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
                    )
                    .unwrap_or_else(|_| ProgressStyle::default_bar())
                    .progress_chars("=> "),
                )
                .with_message(text.clone())
        } else {
            ProgressBar::hidden()
        };
        Step {
            text,
            bar,
            begun: Instant::now(),
            quiet: self.quiet,
            open: true,
        }
    }
}

impl Default for Screen {
    fn default() -> Self {
        Self::new()
    }
}

/// A step that is being taken; dropped without [`Step::done`], it failed.
#[derive(Debug)]
pub struct Step {
    text: Cow<'static, str>,
    bar: ProgressBar,
    begun: Instant,
    quiet: bool,
    open: bool,
}

impl Step {
    /// Shows what the step is busy with.
    pub fn busy(&self, detail: &str) {
        self.bar.set_message(format!("{}: {detail}", self.text));
    }

    /// Shows how many bytes have been moved.
    pub fn position(&self, bytes: u64) {
        self.bar.set_position(bytes);
    }

    /// Time since the step began.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Ends the step well; `detail` may be empty.
    pub fn done(mut self, detail: &str) {
        let detail = if detail.is_empty() {
            String::new()
        } else {
            format!(": {detail}")
        };
        self.close(&paint(GOOD, "ok"), &detail);
    }

    /// Ends the step without a word: whoever took it says how it went.
    pub fn forget(mut self) {
        self.open = false;
        self.bar.finish_and_clear();
    }

    fn close(&mut self, verdict: &str, detail: &str) {
        self.open = false;
        self.bar.finish_and_clear();
        if !self.quiet {
            let time = paint(DIM, &format!("({})", seconds(self.begun.elapsed())));
            anstream::eprintln!("{verdict} {}{detail} {time}", self.text);
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if self.open {
            self.close(&paint(BAD, "failed"), "");
        }
    }
}

/// A duration in seconds with one decimal.
#[must_use]
pub fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// A size in bytes as a person reads it.
#[must_use]
pub fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
