//! The firewall without its drivers: frames and settings in, verdicts and frames of our own out.
//!
//! One composition of the engine, the resolver and the settings, with the time as an argument and no hypervisor in it.
//! The data path runs it between rings, `cargo xtask fwsim` between capture files; what the one decides the other does.
//!
//! # Names in rules
//!
//! The resolver's queries leave as frames of our own, and its answers are taken out of what comes from the uplink before
//! the engine sees it. Queries of clients and the answers to them go through the engine like everything else and are
//! shown to the resolver on their way out. An answer that teaches the resolver something new is passed on only after
//! the client's rules were compiled again, so that the client's first packet to what it was told is accepted. That
//! is done at once, as nearly always, while no more than [`AT_ONCE`] steps were needed between two [`Filter::tick`]s; otherwise the
//! answer waits ([`Verdict::Held`]) while steps are done between bursts, as one of at most [`MAX_DELAYED`]; with more
//! than that it is passed on early and the client may have to try again.
//!
//! Without names in any rule none of this costs more than one comparison for each batch; with them, frames are told from
//! others by their protocol and port ([`firewall::resolver::sight`]).
//!
//! # Trust
//!
//! As in `firewall` and in [`crate::settings`], whose bounds hold here, too.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use firewall::resolver::{Resolver, Sight, Transport, sight};
use firewall::ruleset::HostPolicy;
use firewall::{
    AttachError, Checksum, ClientConfig, ClientId, Engine, Frame, Generated, Iface, Limits, Time,
    UplinkConfig, Verdict, Work,
};
use qubes::store::Store;
use xenstore::ConfigEvent;

pub use crate::offload::complete_bytes as complete_checksum;
use crate::settings::{Report, Settings, Target};
use crate::snapshot::Rules;

/// Compilation steps that answers to clients may cause at once between two ticks.
const AT_ONCE: usize = 8;
/// Answers that wait for rules to be compiled.
const MAX_DELAYED: usize = 32;
/// The longest answer that is made to wait, in bytes of frame.
const MAX_DELAYED_LEN: usize = 2048;

/// Switches on the kernel command line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Whether addresses in answers to clients count for names in their rules (`dns-learn=off`: no).
    pub learn: bool,
    /// What a name without addresses does (`parity=strict`: everything from its client is refused, as on Linux).
    pub host_policy: HostPolicy,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            learn: true,
            host_policy: HostPolicy::PerRule,
        }
    }
}

impl Options {
    /// Reads the switches out of a command line. Everything else on it is somebody else's: dom0 puts words for Linux
    /// there.
    #[must_use]
    pub fn from_command_line(line: &str) -> Self {
        let mut options = Self::default();
        for word in line.split_ascii_whitespace() {
            match word {
                "dns-learn=off" => options.learn = false,
                "parity=strict" => options.host_policy = HostPolicy::Strict,
                _ => {}
            }
        }
        options
    }
}

/// An answer to a client that waits for the rules of the client.
struct Delayed {
    egress: Iface,
    frame: Vec<u8>,
    /// The client's addresses.
    users: Vec<IpAddr>,
    /// What their rules must know.
    mark: u64,
}

impl Delayed {
    fn is_ready(&self, settings: &Settings) -> bool {
        self.users
            .iter()
            .all(|user| settings.is_since(*user, self.mark))
    }
}

/// Engine, resolver and settings as one.
pub struct Filter {
    target: Target,
    settings: Settings,
    delayed: VecDeque<Delayed>,
    /// Compilation steps that may still be done at once.
    at_once: usize,
    /// The frame that was generated last.
    frame: Vec<u8>,
}

impl Filter {
    /// A filter without uplink, clients or settings. Allocates all tables of the data path. `seed` must be unpredictable:
    /// hash keys, ports and ids come from it.
    #[must_use]
    pub fn new(limits: Limits, seed: [u8; 32], options: Options) -> Self {
        Self {
            target: Target {
                engine: Engine::new(limits, seed),
                // Another generator than any of the engine's: neither says anything about the other.
                resolver: Resolver::new(seed, options.learn),
            },
            settings: Settings::new(options.host_policy),
            delayed: VecDeque::new(),
            at_once: AT_ONCE,
            frame: Vec::new(),
        }
    }

    /// The packet engine, to look at.
    #[must_use]
    pub const fn engine(&self) -> &Engine {
        &self.target.engine
    }

    /// The resolver, to look at.
    #[must_use]
    pub const fn resolver(&self) -> &Resolver {
        &self.target.resolver
    }

    /// Attaches a vif.
    ///
    /// # Errors
    ///
    /// [`AttachError`]; nothing has changed then.
    pub fn attach_client(&mut self, client: ClientConfig) -> Result<(), AttachError> {
        self.target.engine.attach_client(client)
    }

    /// Detaches a vif. An unknown number is ignored.
    pub fn detach_client(&mut self, id: ClientId) {
        self.target.engine.detach_client(id);
        self.delayed
            .retain(|delayed| delayed.egress != Iface::Client(id));
    }

    /// The uplink came (with our MAC address on it) or went.
    pub fn set_uplink(&mut self, mac: Option<[u8; 6]>, now: Time) {
        self.settings.set_uplink(&mut self.target, mac, now);
    }

    /// Takes in a change of the settings. Rules come into force within the next [`Filter::tick`]s.
    pub fn change(&mut self, event: ConfigEvent, now: Time) {
        self.settings.change(&mut self.target, event, now);
    }

    /// dom0's keys, for a source that writes them itself; call [`Filter::follow_keys`] afterwards.
    pub const fn keys(&mut self) -> &mut Store {
        self.settings.keys()
    }

    /// Puts in force what changed in the keys.
    pub fn follow_keys(&mut self, now: Time) {
        self.settings.follow(&mut self.target, now);
    }

    /// All existing settings have been seen: what is missing now is missing.
    pub fn settings_complete(&mut self, now: Time) {
        self.settings.complete(&mut self.target, now);
    }

    /// Decides a batch of frames, in order, and rewrites those that go on. Take what [`Filter::next_generated`] has
    /// afterwards.
    pub fn process(&mut self, work: &mut [Work<'_>], now: Time) {
        let resolver = &self.target.resolver;
        if resolver.is_waiting() || resolver.is_watching() {
            self.process_with_names(work, now);
        } else {
            self.target.engine.process_batch(work, now);
        }
    }

    /// The same while frames may be about names.
    #[inline(never)]
    fn process_with_names(&mut self, work: &mut [Work<'_>], now: Time) {
        let mut rest = work;
        loop {
            // Everything before the next frame that may matter is a batch as any other.
            let found = rest.iter().enumerate().find_map(|(index, item)| {
                sight(item.ingress, &item.frame).map(|sight| (index, sight))
            });
            let Some((index, sight)) = found else {
                return self.target.engine.process_batch(rest, now);
            };
            let Some((plain, tail)) = rest.split_at_mut_checked(index) else {
                return;
            };
            self.target.engine.process_batch(plain, now);
            let Some((item, tail)) = tail.split_first_mut() else {
                return;
            };
            self.process_one(item, sight, now);
            rest = tail;
        }
    }

    /// Decides a frame to or from a resolver.
    fn process_one(&mut self, item: &mut Work<'_>, sight: Sight, now: Time) {
        let Target { engine, resolver } = &mut self.target;
        if item.ingress == Iface::Uplink
            && resolver.is_waiting()
            && let Some(uplink) = self.settings.uplink()
            && resolver.receive_frame(&item.frame, uplink, now)
        {
            item.verdict = Verdict::Deliver;
            resolver.poll(now);
            self.follow_names();
            return;
        }
        engine.process_batch(core::slice::from_mut(item), now);
        if sight.transport != Transport::Udp || !resolver.is_watching() {
            return;
        }
        let Some(flow) = engine.last_flow(sight.family, now) else {
            return;
        };
        match (item.ingress, item.verdict) {
            (Iface::Client(id), Verdict::Forward { .. }) => {
                resolver.see_query(&item.frame, &flow, engine.client_addresses(id), now);
            }
            (Iface::Uplink, Verdict::Forward { egress })
                if resolver.see_answer(&item.frame, &flow, now) =>
            {
                self.teach(item, egress);
            }
            _ => {}
        }
    }

    /// Puts what an answer has taught in force before the client gets it.
    #[cold]
    fn teach(&mut self, item: &mut Work<'_>, egress: Iface) {
        self.follow_names();
        let Iface::Client(id) = egress else { return };
        let delayed = Delayed {
            egress,
            frame: Vec::new(),
            users: Vec::from(self.target.engine.client_addresses(id)),
            mark: self.settings.mark(),
        };
        while !delayed.is_ready(&self.settings) {
            if self.at_once == 0 {
                if self.delayed.len() < MAX_DELAYED
                    && let Some(frame) = copy(&item.frame)
                {
                    self.delayed.push_back(Delayed { frame, ..delayed });
                    item.verdict = Verdict::Held;
                }
                return;
            }
            self.at_once -= 1;
            self.settings.step_refresh(&mut self.target);
        }
    }

    /// Has the rules compiled again whose names stand for something else now.
    fn follow_names(&mut self) {
        while let Some(address) = self.target.resolver.next_changed() {
            self.settings.names_changed(address);
        }
    }

    /// Lets time pass and moves everything on that is under way, one small step; expires at most `expiries` flows and
    /// fragments. Returns whether there is more to do now: frames to send, or the next step.
    pub fn tick(&mut self, now: Time, expiries: u32) -> bool {
        self.at_once = AT_ONCE;
        self.settings.step(&mut self.target, now);
        let resolver = &mut self.target.resolver;
        if resolver.next_deadline().is_some_and(|due| due <= now) {
            resolver.poll(now);
        }
        self.follow_names();
        let expiring = self.target.engine.tick(now, expiries);
        expiring || self.settings.is_busy() || self.has_generated()
    }

    /// When [`Filter::tick`] must be called even if nothing comes.
    #[must_use]
    pub fn next_deadline(&self, now: Time) -> Option<Time> {
        if self.settings.is_busy() {
            return Some(now);
        }
        let engine = self.target.engine.next_deadline(now);
        let resolver = self.target.resolver.next_deadline();
        engine.into_iter().chain(resolver).min()
    }

    /// Whether [`Filter::next_generated`] has a frame.
    #[must_use]
    pub fn has_generated(&self) -> bool {
        self.target.engine.has_generated()
            || self.target.resolver.has_transmit()
            || self.delayed.iter().any(|own| own.is_ready(&self.settings))
    }

    /// Takes the next frame that we send by ourselves: the engine's, answers that had to wait, the resolver's queries.
    /// Checksums in it are complete. Call until `None` after every [`Filter::process`] and [`Filter::tick`].
    pub fn next_generated(&mut self) -> Option<Generated<'_>> {
        let Target { engine, resolver } = &mut self.target;
        if engine.has_generated() {
            return engine.next_generated();
        }
        let ready = |own: &Delayed| own.is_ready(&self.settings);
        if let Some(delayed) = self.delayed.iter().position(ready)
            && let Some(delayed) = self.delayed.remove(delayed)
        {
            self.frame = delayed.frame;
            return Some(Generated {
                egress: delayed.egress,
                bytes: &self.frame,
            });
        }
        while let Some(transmit) = resolver.next_transmit() {
            let uplink = self.settings.uplink();
            if engine.may_leave_for(transmit.server)
                && let Some(frame) = uplink.and_then(|own| transmit.frame(own))
            {
                self.frame = frame;
                return Some(Generated {
                    egress: Iface::Uplink,
                    bytes: &self.frame,
                });
            }
        }
        None
    }

    /// Whose rules were refused and why; nothing while all are in force.
    #[must_use]
    pub fn refusal(&self) -> String {
        self.settings.refusal()
    }

    /// Whether [`Filter::next_report`] has something to say.
    #[must_use]
    pub fn has_report(&self) -> bool {
        self.settings.has_report()
    }

    /// What QubesDB is to be told next about rules and names. Without a reader nothing is lost but the news.
    pub fn next_report(&mut self) -> Option<Report> {
        self.settings.next_report(&self.target.resolver)
    }

    /// The rules in force, of all clients or of one.
    #[must_use]
    pub fn rules(&self, client: Option<IpAddr>) -> Vec<Rules> {
        self.settings.rules(client, &self.target.resolver)
    }

    /// The settings: what is missing, our own addresses.
    #[must_use]
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Our own addresses.
    #[must_use]
    pub const fn own_addresses(&self) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
        self.settings.own_addresses()
    }

    /// Our side of the uplink, while there is one.
    #[must_use]
    pub const fn uplink(&self) -> Option<&UplinkConfig> {
        self.settings.uplink()
    }
}

/// A whole frame with complete checksums; `None` if it is too long or not all at hand.
fn copy(frame: &Frame<'_>) -> Option<Vec<u8>> {
    let len = usize::try_from(frame.len).ok()?;
    let mut bytes = Vec::from(frame.head.get(..len.min(MAX_DELAYED_LEN))?);
    if bytes.len() != len || frame.gso.is_some() {
        return None;
    }
    if frame.checksum == Checksum::Blank && !complete_checksum(&mut bytes) {
        return None;
    }
    Some(bytes)
}
