//! The Linux kernel of this machine beside the engine: `differential --speed`, never gating.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::show::number;
use crate::host;
use crate::screen::Screen;
use crate::workspace::Workspace;

/// What came of it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Linux {
    /// It could be measured.
    Measured(Figures),
    /// It could not.
    Skipped {
        /// Why.
        reason: String,
    },
}

/// Nanoseconds of processor time for each packet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Figures {
    clients: u32,
    rules: u32,
    flows: u32,
    /// Written to the kernel and dropped at its door.
    write_nanos: f64,
    /// Routed without rules.
    routed_nanos: f64,
    established_nanos: f64,
    new_nanos: f64,
}

/// Lets the kernel decide the workloads W1 and W5.
pub(super) fn measure(workspace: &Workspace, screen: &Screen) -> Linux {
    let step = screen.step("Timing the Linux kernel with the same rules and frames");
    let measured = host::prepare_namespaces(screen).and_then(|()| run(workspace.root()));
    step.done("");
    measured.unwrap_or_else(|error| Linux::Skipped {
        reason: format!("{error:#}"),
    })
}

fn run(root: &Path) -> Result<Linux> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(program)
        .args(["run", "--release", "--quiet", "--package", "differential"])
        .args(["--", "--speed", "--json"])
        .current_dir(root)
        .stdin(Stdio::null())
        .output()
        .context("cannot run the differential test")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let found = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("no result: {}", said.trim()))?;
    read(found)
}

fn read(found: Value) -> Result<Linux> {
    let text = |name| found.get(name).and_then(Value::as_str).unwrap_or_default();
    match text("outcome") {
        "success" => Ok(Linux::Measured(serde_json::from_value(found)?)),
        "skipped" => Ok(Linux::Skipped {
            reason: text("reason").to_owned(),
        }),
        other => bail!("it says {other:?}"),
    }
}

impl Figures {
    /// Shows them beside the engine's own nanoseconds.
    pub(super) fn print(&self, established: Option<f64>, new: Option<f64>) {
        anstream::println!(
            "  {} clients with {} rules each, {} established flows; processor time, on TUN devices, the write to them ({:.0} ns) taken off",
            self.clients,
            self.rules,
            self.flows,
            self.write_nanos
        );
        anstream::println!(
            "  {:<48} {:>11} {:>9} {:>9}",
            "nanoseconds per packet, median",
            "Linux",
            "engine",
            "ratio"
        );
        for (what, linux, own) in [
            ("routing alone, no rules", self.routed_nanos, None),
            ("established flow", self.established_nanos, established),
            ("new flow", self.new_nanos, new),
        ] {
            let linux = linux - self.write_nanos;
            anstream::println!(
                "  {what:<48} {linux:>11.1} {:>9} {:>9}",
                number(own),
                number(own.map(|own| linux / own))
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn figures_and_reasons_are_read() {
        let skipped = read(json!({ "outcome": "skipped", "reason": "not root" })).unwrap();
        assert!(matches!(skipped, Linux::Skipped { reason } if reason == "not root"));
        let figures = json!({
            "outcome": "success", "clients": 250, "rules": 50, "flows": 1024,
            "write_nanos": 400.0, "routed_nanos": 600.0, "established_nanos": 1200.5, "new_nanos": 4000.0,
        });
        let Linux::Measured(figures) = read(figures).unwrap() else {
            panic!("not measured");
        };
        assert_eq!((figures.clients, figures.established_nanos), (250, 1200.5));
        assert!(read(json!({ "outcome": "failure" })).is_err());
    }
}
