//! What the firewall promises, as things to see happen in the lab.
//!
//! A [`Claim`] drives real traffic of real guests through the running firewall and says what it saw. The demo
//! shows the main ones to a person, the test runs them all; both call the same code, so that what is
//! shown is what is tested. Each claim leaves the world as it found it.
//!
//! A claim that does not hold ends with [`NotSo`]: the product's fault. Any other error is the lab's.

pub mod hostile;
pub mod life;
pub mod names;
pub mod policy;
pub mod qubes;
pub mod soak;
pub mod traffic;

use std::fmt;
use std::time::Duration;

use anyhow::Result;

use crate::lab::internet::WEB;
use crate::lab::world::LabWorld;

/// How long a probe in a guest may take, on the reference machine.
const PROBE: Duration = Duration::from_secs(20);

/// How long a transfer of some megabytes may take.
const TRANSFER: Duration = Duration::from_secs(120);

/// Something that the firewall promises.
#[derive(Clone, Copy)]
pub struct Claim {
    /// Its name in reports and on the command line.
    pub name: &'static str,
    /// What is promised, for a person.
    pub title: &'static str,
    /// Sees it happen; returns what was seen, a line each.
    pub check: fn(&mut LabWorld) -> Result<Vec<String>>,
}

/// The claims that the demo shows, in its order.
pub const MAIN: &[Claim] = &[
    traffic::NAT,
    traffic::DNS,
    traffic::DOWNLOAD,
    policy::REJECT,
    policy::ISOLATION,
    life::HOTPLUG,
    policy::RULE_CHANGE,
];

/// The claims that only the test checks.
pub const MORE: &[Claim] = &[
    traffic::UPLOAD,
    traffic::PING_GATEWAY,
    policy::BAD_RULES,
    names::NAMES,
    policy::MISSING_SETTING,
    life::CLIENT_DESTROYED,
    life::CLIENT_REBOOTS,
    life::UPLINK_REATTACHED,
    hostile::FRAMES,
    hostile::SABOTAGE,
    life::FIREWALL_RESTARTED,
    life::SHUTDOWN,
];

/// The claims about cost, which are checked by the instruction clock: there they give the same numbers on any host.
pub const COST: &[Claim] = &[traffic::HYPERCALLS];

/// The claims about Qubes OS: the settings come from QubesDB, and dom0 calls by qrexec.
pub const QUBES: &[Claim] = &[
    qubes::START,
    traffic::NAT,
    policy::REJECT,
    qubes::COMMIT,
    qubes::CLIENT_STARTS,
    qubes::NETVM,
    qubes::SERVICES,
    qubes::INPUT,
    qubes::CALLS,
    qubes::CHANNELS_LOST,
    qubes::DAEMONS_RESTARTED,
    soak::SOAK,
    qubes::SHUTDOWN,
    qubes::TIMES,
];

/// A promise was not kept.
#[derive(Debug)]
pub struct NotSo(pub String);

impl fmt::Display for NotSo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NotSo {}

/// Ends a claim as not kept unless `so`.
///
/// # Errors
///
/// [`NotSo`] with the text.
pub fn must(so: bool, otherwise: impl FnOnce() -> String) -> Result<()> {
    if so {
        Ok(())
    } else {
        Err(NotSo(otherwise()).into())
    }
}

/// One echo through the firewall and back.
fn ping(world: &LabWorld, client: &str) -> Result<()> {
    let output = world.run(client, &format!("ping -c 1 -W 10 {WEB}"), PROBE)?;
    must(output.is_success(), || {
        format!("{client} cannot ping: {}", output.stdout)
    })
}

/// The names of all clients, in order.
fn clients(world: &LabWorld) -> Vec<String> {
    world
        .topology()
        .clients
        .iter()
        .map(|client| client.name.clone())
        .collect()
}
