//! QEMU's monitor, as far as snapshots need it.
//!
//! One JSON object per line; events come in between and are skipped.
//! Source: QEMU `docs/interop/qmp-spec.rst`.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// How long a command may take; none does more than switch a state.
const COMMAND: Duration = Duration::from_secs(120);

/// How long the machine may take to be written or read.
const TRANSFER: Duration = Duration::from_secs(600);

/// No limit for writing the machine, in bytes per second; the default is that
/// of a network.
const BANDWIDTH: u64 = 1 << 40;

/// A connection to the monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Greets the monitor.
    ///
    /// # Errors
    ///
    /// If it does not answer as expected.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(COMMAND))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
        };
        qmp.message()?;
        qmp.execute("qmp_capabilities", &Value::Null)?;
        Ok(qmp)
    }

    /// Lets the machine run.
    ///
    /// # Errors
    ///
    /// If QEMU refuses.
    pub fn resume(&mut self) -> Result<()> {
        self.execute("cont", &Value::Null).map(drop)
    }

    /// Stops the machine and writes its whole state to a file; it stays stopped.
    ///
    /// `name` is relative to QEMU's folder and must need no quoting.
    ///
    /// # Errors
    ///
    /// If QEMU cannot, as with some nested guests under KVM.
    pub fn save(&mut self, name: &Path) -> Result<()> {
        self.execute("stop", &Value::Null)?;
        self.execute(
            "migrate-set-parameters",
            &json!({ "max-bandwidth": BANDWIDTH }),
        )?;
        let target = format!("exec:cat > {}", name.display());
        self.execute("migrate", &json!({ "uri": target }))?;
        let deadline = Instant::now() + TRANSFER;
        loop {
            let state = self.execute("query-migrate", &Value::Null)?;
            match state.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("QEMU could not save the machine: {state}"),
                _ if Instant::now() > deadline => {
                    bail!("saving the machine takes too long: {state}")
                }
                _ => thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Waits until a machine that was started from a snapshot is read, and lets
    /// it run.
    ///
    /// # Errors
    ///
    /// If the snapshot does not fit this QEMU.
    pub fn finish_restore(&mut self) -> Result<()> {
        let deadline = Instant::now() + TRANSFER;
        loop {
            let state = self.execute("query-status", &Value::Null)?;
            match state.get("status").and_then(Value::as_str) {
                Some("inmigrate") if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(10));
                }
                Some("running") => return Ok(()),
                Some("paused" | "prelaunch" | "postmigrate") => return self.resume(),
                _ => bail!("the snapshot was not restored: {state}"),
            }
        }
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut request = json!({ "execute": command });
        if let (false, Some(request)) = (arguments.is_null(), request.as_object_mut()) {
            request.insert("arguments".into(), arguments.clone());
        }
        writeln!(self.stream.get_mut(), "{request}").context("QEMU's monitor is gone")?;
        loop {
            let answer = self.message()?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
        }
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        let len = self
            .stream
            .read_line(&mut line)
            .context("QEMU's monitor does not answer")?;
        if len == 0 {
            bail!("QEMU's monitor is gone");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
