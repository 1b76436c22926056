//! How long a firewall takes from its creation to its first packet, by dom0's clock.
//!
//! The image is started by one script in dom0, which does what qubesd does: create, offer QubesDB, unpause, wait for
//! qrexec's greeting, attach the client. So nothing of this machine is in the times. The Linux stand-in is driven from
//! here, which adds some tenths of a second to its several; its rules are fed when its agent answers, as the agent of a
//! real `sys-firewall` reads them when it has started.
//!
//! The client tries to ping all the time. The first request at the uplink, with the firewall's address, ends the watch.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::double::Double;
use super::topology::{FIREWALL, FirewallKind, IMAGE_PATH};
use super::world::{GREETING, LabWorld, quote};

/// How long a start may take.
const START: Duration = Duration::from_secs(120);
/// How long a small command may take.
const COMMAND: Duration = Duration::from_secs(30);

/// Shell functions: dom0's clock, and a watch for the first forwarded packet on an interface.
const FUNCTIONS: &str = "now() { read up rest < /proc/uptime; echo $up; }
watch() {
    rm -f /lab/run/watch
    mkfifo /lab/run/watch
    lab capture $1 --seconds 100 > /lab/run/watch &
    capture=$!
    while read -r line; do
        case $line in *WANTED*) echo forwarded=$(now); break ;; esac
    done < /lab/run/watch
    kill $capture
}
";

/// Times since the begin of `xl create`, in milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct StartTimes {
    /// Until qrexec's greeting; `None` for a firewall that has none.
    pub greeted_ms: Option<u64>,
    /// Until the first packet of the client was seen at the uplink.
    pub forwarded_ms: u64,
}

/// Reads `name=seconds` lines that a script wrote.
fn time(said: &str, name: &str) -> Result<f64> {
    said.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
        .and_then(|text| text.trim().parse().ok())
        .with_context(|| format!("no time {name} in {said:?}"))
}

fn since(said: &str, begin: f64, name: &str) -> Result<u64> {
    let elapsed = Duration::try_from_secs_f64(time(said, name)? - begin)?;
    Ok(u64::try_from(elapsed.as_millis())?)
}

impl LabWorld {
    /// Starts the firewall of the topology with `client` attached as soon as it may be, and that one pinging `target`.
    ///
    /// # Errors
    ///
    /// If one is running, or no packet comes through.
    pub fn timed_start(
        &mut self,
        client: &str,
        target: impl std::fmt::Display,
    ) -> Result<StartTimes> {
        let job = self.guest(client)?.start(
            // Nothing is forked before there is an interface: all domains share one emulated processor.
            &format!(
                "rm -f /run/never; mkfifo /run/never; pause() {{ read -t 0.02 nothing <> /run/never; }}
                until set -- /sys/class/net/eth*; [ -e $1 ]; do pause; done
                until ping -c 1 -W 1 {target} > /dev/null 2>&1; do pause; done"
            ),
            Duration::from_secs(180),
        )?;
        let wanted = format!("in ipv4 {FIREWALL} > {target} ");
        let times = if self.topology().firewall.kind == FirewallKind::Linux {
            self.timed_linux(client, &wanted)
        } else {
            self.timed_image(client, &wanted)
        };
        job.kill()?;
        times
    }

    /// The words of `xl network-attach` for a client.
    fn attach_words(&self, client: &str) -> Result<String> {
        let vif = self.spec(client)?.vif(&self.topology().firewall);
        let words: Vec<String> = vif.words().iter().map(|word| quote(word)).collect();
        Ok(format!("{} {}", quote(client), words.join(" ")))
    }

    fn timed_image(&mut self, client: &str, wanted: &str) -> Result<StartTimes> {
        let spec = self.topology().firewall.domain().context("no firewall")?;
        if let FirewallKind::Image(path) = &self.topology().firewall.kind {
            self.lab.put(IMAGE_PATH, 0o644, &std::fs::read(path)?)?;
        }
        let pvh_linux = self.lab.base().qemu.pvh_linux;
        let configuration = spec.configuration(pvh_linux);
        self.lab
            .put("/lab/run/timed.cfg", 0o644, configuration.as_bytes())?;
        self.lab
            .put("/lab/run/timed.keys", 0o644, self.database().as_bytes())?;
        let mut script = FUNCTIONS.replace("WANTED", &quote(wanted));
        let start = Double::start_command("$id", GREETING, "/lab/run/timed.keys");
        let greeting = Double::greeting_command("$id");
        let (name, attach) = (quote(&spec.name), self.attach_words(client)?);
        // Writing to a String cannot fail.
        let _ = write!(
            script,
            "echo begin=$(now)
            xl create -p /lab/run/timed.cfg > /dev/null || exit 1
            id=$(xl domid {name})
            {start}
            watch vif$id.0 &
            watching=$!
            echo unpaused=$(now)
            xl unpause {name}
            {greeting}
            echo greeted=$(now)
            xl network-attach {attach} || exit 1
            wait $watching"
        );
        let said = self.lab.ask(&script, START)?;
        let firewall = self.lab.find(&spec.name, false)?;
        let double = Double::running(&self.lab, firewall.domid)?;
        self.adopt(firewall, Some(double));
        let begin = time(&said, "begin")?;
        Ok(StartTimes {
            greeted_ms: Some(since(&said, begin, "greeted")?),
            forwarded_ms: since(&said, begin, "forwarded")?,
        })
    }

    fn timed_linux(&mut self, client: &str, wanted: &str) -> Result<StartTimes> {
        let begin = time(
            &self
                .lab
                .ask(&format!("{FUNCTIONS} echo begin=$(now)"), COMMAND)?,
            "begin",
        )?;
        self.start_firewall()?;
        let domid = self.firewall()?.domid;
        let functions = FUNCTIONS.replace("WANTED", &quote(wanted));
        let watch = self
            .lab
            .dom0()
            .start(&format!("{functions} watch vif{domid}.0"), START)?;
        let attach = self.attach_words(client)?;
        self.lab
            .ask(&format!("xl network-attach {attach}"), COMMAND)?;
        let said = watch.wait()?.stdout;
        Ok(StartTimes {
            greeted_ms: None,
            forwarded_ms: since(&said, begin, "forwarded")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_subtracted() {
        let said = "begin=100.25\nnoise\ngreeted=100.75\n";
        let begin = time(said, "begin").unwrap();
        assert_eq!(since(said, begin, "greeted").unwrap(), 500);
        assert!(since(said, begin, "forwarded").is_err());
        assert!(since(said, 101.0, "greeted").is_err());
    }
}
