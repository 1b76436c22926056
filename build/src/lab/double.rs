//! dom0's Qubes daemons in the lab: our own double of them, over real vchans.
//!
//! The program (`tests/dom0`) is a QubesDB daemon and a qrexec daemon for one domain. It is put into dom0 when it is
//! wanted, is kept running beside the domain, and carries out scenarios: see `dom0_double::scenario` for what one can
//! say. What would end the real daemons ends it, and then every later scenario is a failure of the firewall.

use std::fmt::Display;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::Lab;
use super::link::Output;
use crate::claims::NotSo;

/// Where the program is put in dom0.
const PROGRAM: &str = "/lab/run/dom0-double";
/// How long a small command in dom0 may take.
const COMMAND: Duration = Duration::from_secs(30);

/// The daemons of one domain, running.
#[derive(Debug)]
pub struct Double {
    domid: u32,
    pid: u32,
}

/// Statements of a scenario that were carried out, with their times.
#[derive(Debug, Clone, Default)]
pub struct Played {
    steps: Vec<(String, u64)>,
}

impl Played {
    /// Milliseconds that the statement took whose text begins so; the last one, if there are several.
    #[must_use]
    pub fn milliseconds(&self, statement: &str) -> Option<u64> {
        self.steps
            .iter()
            .rev()
            .find(|(text, _)| text.starts_with(statement))
            .map(|(_, time)| *time)
    }

    /// How many statements were carried out.
    #[must_use]
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Whether there were none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }
}

impl Double {
    /// Puts the program into dom0.
    ///
    /// # Errors
    ///
    /// If it cannot be read or written.
    pub fn install(lab: &Lab, program: &Path) -> Result<()> {
        let content =
            std::fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
        lab.put(PROGRAM, 0o755, &content)
    }

    /// Has dom0 talk to itself, which shows that grants, events and xenstore are used rightly; a line for each size.
    ///
    /// # Errors
    ///
    /// What goes wrong, which is the lab's fault.
    pub fn loopback(lab: &Lab) -> Result<Vec<String>> {
        let output = lab.run(&format!("{PROGRAM} --loopback"), Duration::from_secs(60))?;
        let played = verdict(&output)?;
        Ok(played.steps.into_iter().map(|(text, _)| text).collect())
    }

    /// Has `count` clients with this address come and go behind a domain, quickly: the double is toolstack and
    /// frontend. Returns the longest time that one took, in milliseconds.
    ///
    /// # Errors
    ///
    /// [`NotSo`] if the backend does not take part.
    pub fn cycles(
        lab: &Lab,
        backend: u32,
        count: u32,
        (address, gateway): (Ipv4Addr, Ipv4Addr),
        limit: Duration,
    ) -> Result<u64> {
        let output = lab.run(
            &format!("{PROGRAM} --cycles {count} --domid {backend} --address {address} --gateway {gateway}"),
            limit,
        )?;
        let played = verdict(&output)?;
        played.milliseconds("the longest").context("no time")
    }

    /// Starts the daemons for a domain, with a database. The domain must not run yet: the real ones offer QubesDB
    /// before it is unpaused.
    ///
    /// # Errors
    ///
    /// If they do not come up.
    pub fn start(lab: &Lab, domid: u32, greeting: &str, database: &str) -> Result<Self> {
        let path = database_path(domid);
        lab.put(&path, 0o644, database.as_bytes())?;
        let script = Self::start_command(&domid.to_string(), greeting, &path);
        lab.ask(&script, COMMAND)?;
        Self::running(lab, domid)
    }

    /// The same as part of a script that runs in dom0, after which [`Double::running`] finds them. `id` is the domain's
    /// number or a shell variable that holds it, `database` a file.
    #[must_use]
    pub fn start_command(id: &str, greeting: &str, database: &str) -> String {
        let (socket, log) = (socket(id), log(id));
        format!(
            "rm -f {socket}
            {PROGRAM} --domid {id} --greeting {greeting} --socket {socket} --database {database} > {log} 2>&1 &
            echo $! > /lab/run/double.pid
            n=0
            until [ -S {socket} ]; do n=$((n+1)); [ $n -lt 500 ] || {{ cat {log}; exit 1; }}; sleep 0.01; done"
        )
    }

    /// The part of a script that waits for the greeting of qrexec.
    #[must_use]
    pub fn greeting_command(id: &str) -> String {
        format!(
            "printf 'limit 60000\\nwait qrexec\\n' > /lab/run/greeting
            {PROGRAM} --send {} /lab/run/greeting > /dev/null || {{ cat {}; exit 1; }}",
            socket(id),
            log(id)
        )
    }

    /// The daemons that a script has started.
    ///
    /// # Errors
    ///
    /// If it has not.
    pub fn running(lab: &Lab, domid: u32) -> Result<Self> {
        let said = lab.ask("cat /lab/run/double.pid", COMMAND)?;
        let pid = said.trim().parse().context("no process number")?;
        Ok(Self { domid, pid })
    }

    /// Carries out a scenario within `limit` (stretched on slow machines).
    ///
    /// # Errors
    ///
    /// [`NotSo`] if the firewall does something else than the scenario wants, or has ended a daemon.
    pub fn play(&self, lab: &Lab, scenario: &str, limit: Duration) -> Result<Played> {
        let path = format!("/lab/run/scenario-{}", self.domid);
        lab.put(&path, 0o644, scenario.as_bytes())?;
        let socket = socket(self.domid);
        let output = lab.run(&format!("{PROGRAM} --send {socket} {path}"), limit)?;
        verdict(&output).map_err(|error| self.with_last_words(lab, error))
    }

    /// Ends the daemons, as a crash of theirs would.
    ///
    /// # Errors
    ///
    /// If the lab is gone.
    pub fn kill(self, lab: &Lab) -> Result<()> {
        let (pid, socket) = (self.pid, socket(self.domid));
        lab.run(
            &format!("kill -9 {pid}; while kill -0 {pid} 2>/dev/null; do sleep 0.02; done; rm -f {socket}"),
            COMMAND,
        )
        .map(drop)
    }

    /// A double that has ended says why on its own output only.
    fn with_last_words(&self, lab: &Lab, error: anyhow::Error) -> anyhow::Error {
        let log = lab
            .run(&format!("tail -n 5 {}", log(self.domid)), COMMAND)
            .map(|output| output.stdout)
            .unwrap_or_default();
        let ended = log
            .lines()
            .rev()
            .find_map(|line| line.strip_prefix("FAILURE "));
        match ended {
            Some(why) if !error.is::<NotSo>() => NotSo(why.to_owned()).into(),
            _ => error,
        }
    }
}

fn socket(domid: impl Display) -> String {
    format!("/lab/run/double-{domid}")
}

fn database_path(domid: impl Display) -> String {
    format!("/lab/run/database-{domid}")
}

fn log(domid: impl Display) -> String {
    format!("/var/log/double-{domid}.log")
}

/// Reads what the program says.
fn verdict(output: &Output) -> Result<Played> {
    let mut played = Played::default();
    for line in output.stdout.lines() {
        if let Some(done) = line.strip_prefix("did ") {
            played.steps.push(step(done));
        } else if let Some(what) = line.strip_prefix("FAILURE ") {
            return Err(NotSo(what.to_owned()).into());
        }
    }
    if output.is_success() {
        return Ok(played);
    }
    bail!(
        "dom0's double ended with {:?}: {}",
        output.exit,
        super::console::last_lines(&output.stdout, 5)
    )
}

/// Splits `text [N ms]`.
fn step(done: &str) -> (String, u64) {
    let parsed = done.strip_suffix(" ms]").and_then(|rest| {
        let (text, time) = rest.rsplit_once(" [")?;
        Some((text.to_owned(), time.parse().ok()?))
    });
    parsed.unwrap_or_else(|| (done.to_owned(), 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lab_agent::protocol::Exit;

    fn said(stdout: &str, code: i32) -> Output {
        Output {
            stdout: stdout.into(),
            code,
            exit: Exit::Code(code),
            guest_ms: 1,
        }
    }

    #[test]
    fn times_of_statements_are_read() {
        let played = verdict(&said(
            "did wait synced [12 ms]\ndid call 0 user:status [3 ms]\nSUCCESS\n",
            0,
        ))
        .unwrap();
        assert_eq!(played.milliseconds("wait synced"), Some(12));
        assert_eq!(played.milliseconds("call 0"), Some(3));
        assert_eq!(played.milliseconds("rules"), None);
    }

    #[test]
    fn what_the_firewall_did_is_a_failure_and_what_the_lab_did_an_error() {
        let failed = verdict(&said("FAILURE qubesdb-daemon exits: SecondMultiread\n", 1));
        assert!(failed.unwrap_err().is::<NotSo>());
        let broken = verdict(&said("ERROR /dev/xen/evtchn: no such file\n", 2));
        assert!(!broken.unwrap_err().is::<NotSo>());
    }
}
