//! What the firewall says about itself, read as data.
//!
//! The firewall's console command `snapshot` gives out everything it counts and knows,
//! encoded; claims and benches compare two of these. Prose on the console is for
//! people and never read here.

use anyhow::{Context as _, Result, ensure};
use data_encoding::HEXLOWER;
use kernel::snapshot::{BEGIN_MARK, DATA_MARK, END_MARK, Snapshot};

use crate::lab::world::LabWorld;

/// Asks the running firewall for a snapshot.
///
/// # Errors
///
/// If it does not answer, or what it sends is damaged or of another version.
pub fn snapshot(world: &LabWorld) -> Result<Snapshot> {
    // A console that drops text under load damages one answer, not the next.
    let first = ask(world);
    match first {
        Ok(snapshot) => Ok(snapshot),
        Err(_) => ask(world),
    }
}

fn ask(world: &LabWorld) -> Result<Snapshot> {
    let text = world.console("snapshot", END_MARK)?;
    read(&text)
}

/// Reads a snapshot out of what the console said.
fn read(text: &str) -> Result<Snapshot> {
    let begin = text.rfind(BEGIN_MARK).context("no snapshot")?;
    let text = text.get(begin..).unwrap_or_default();
    let mut lines = text.lines();
    let announced: usize = lines
        .next()
        .and_then(|line| line.strip_prefix(BEGIN_MARK)?.trim().parse().ok())
        .context("the snapshot's first line is damaged")?;
    let mut bytes = Vec::with_capacity(announced);
    for line in lines.filter_map(|line| line.trim_end().strip_prefix(DATA_MARK)) {
        let part = HEXLOWER
            .decode(line.as_bytes())
            .context("a line of the snapshot is damaged")?;
        bytes.extend(part);
    }
    ensure!(
        bytes.len() == announced,
        "the snapshot has {} bytes of {announced}",
        bytes.len()
    );
    Snapshot::decode(&bytes).map_err(anyhow::Error::msg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_with_a_missing_line_is_refused() {
        let text = format!(
            "{BEGIN_MARK} 65\n{DATA_MARK}{}\n{END_MARK}\n",
            "00".repeat(64)
        );
        assert!(
            read(&text)
                .unwrap_err()
                .to_string()
                .contains("64 bytes of 65")
        );
        assert!(read("status page").is_err());
    }
}
