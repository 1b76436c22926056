//! What dom0 says, put in force: network settings and rule sets, from whichever source.
//!
//! # The seam
//!
//! A source of settings is anything that produces [`ConfigEvent`]s: changes of keys with QubesDB's names, and a
//! commit marker behind each rewrite of a rule tree. On plain Xen `xenstore` makes them out of `vm-data/`; QubesDB's
//! client feeds the same store. From there on nothing knows where a key came from.
//!
//! # Rules
//!
//! A commit is read and compiled in small steps between bursts of frames, one address at a time; until it is done
//! the rules before it stay in force. A tree that cannot be understood, or is too large, refuses everything from
//! its client: visibly, in `rules` and with one log line. Committing the same tree again is a reload.

use alloc::borrow::Cow;
use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use firewall::config::DEFAULT_MTU;
use firewall::rule::{Action, RuleChain};
use firewall::ruleset::{Compiler, HostPolicy, NoHosts, Progress, RuleEnvironment};
use firewall::{Downstream, Engine, GATEWAY_MAC, MappedAddress, UplinkConfig};
use litemap::LiteMap;
use qubes::address_text::parse_canonical;
use qubes::qubesdb::Sink;
use qubes::reload::{Reload, ReloadProgress};
use qubes::rule_text::RuleText;
use qubes::settings::{NetworkSettings, Problem, Setting};
use qubes::store::{Event, Store};
use xen::Time;
use xenstore::ConfigEvent;

use crate::snapshot::Rules;

/// Resolver addresses that clients use when nothing else is said: Qubes' own.
const VIRTUAL_RESOLVERS: [Ipv4Addr; 2] =
    [Ipv4Addr::new(10, 139, 1, 1), Ipv4Addr::new(10, 139, 1, 2)];

/// Addresses whose rules may wait for their turn; a later commit of the same address adds nothing.
const MAX_WAITING: usize = 4096;

/// The rules of one address as they are in force.
#[derive(Debug)]
enum Live {
    /// Understood and compiled.
    Chain(Arc<RuleChain>),
    /// Everything is refused, for this reason.
    Refused(String),
}

/// A rule set on its way into force.
#[derive(Debug)]
enum Job {
    Reading(IpAddr, Reload),
    Compiling(IpAddr, Arc<RuleChain>, Compiler<Arc<RuleChain>>),
}

/// The settings in force.
pub struct Settings {
    store: Store,
    network: NetworkSettings,
    /// Our MAC address on the uplink while there is one.
    uplink_mac: Option<[u8; 6]>,
    live: LiteMap<IpAddr, Live>,
    waiting: VecDeque<IpAddr>,
    job: Option<Job>,
    /// All existing settings have been seen once.
    complete: bool,
    /// Told to the operator already.
    told: Vec<Problem>,
}

impl Default for Settings {
    fn default() -> Self {
        Self::new()
    }
}

impl Settings {
    /// No settings: everything is dropped.
    #[must_use]
    pub fn new() -> Self {
        Self {
            store: Store::default(),
            network: NetworkSettings::default(),
            uplink_mac: None,
            live: LiteMap::new(),
            waiting: VecDeque::new(),
            job: None,
            complete: false,
            told: Vec::new(),
        }
    }

    /// Takes in a change. What it means is put in force at once, rules within the next [`Settings::step`]s.
    pub fn change(&mut self, engine: &mut Engine, event: ConfigEvent, now: Time) {
        let _ = now;
        match event {
            ConfigEvent::Written { key, value } => self.store.written(&key, &value),
            ConfigEvent::Removed { key } => {
                self.store.removed(&key);
                if let Some(address) = tree_address(&key) {
                    self.forget(engine, address);
                }
            }
            ConfigEvent::Unusable { key, reason } => {
                if let Some(address) = tree_address(&key) {
                    self.refuse(engine, address, reason.to_string());
                }
            }
            ConfigEvent::Ready => {
                self.complete = true;
                self.apply_network(engine);
            }
        }
        while let Some(event) = self.store.next_event() {
            match event {
                Event::SettingsChanged => {
                    self.apply_network(engine);
                    // `specialtarget=dns` means the resolvers that are known now.
                    let all: Vec<IpAddr> = self.live.keys().copied().collect();
                    for address in all {
                        self.enqueue(address);
                    }
                }
                Event::ConnectedChanged => self.apply_network(engine),
                Event::MappedChanged => self.apply_mapped(engine),
                Event::Commit(address) => self.enqueue(address),
            }
        }
        if self.store.is_crowded() {
            let attached: Vec<IpAddr> = engine
                .clients()
                .flat_map(|client| client.addresses)
                .collect();
            self.store
                .forget_detached(|address| attached.contains(&address));
        }
    }

    /// The uplink came (with our MAC address on it) or went.
    pub fn set_uplink(&mut self, engine: &mut Engine, mac: Option<[u8; 6]>) {
        self.uplink_mac = mac;
        self.apply_network(engine);
    }

    fn enqueue(&mut self, address: IpAddr) {
        if !self.waiting.contains(&address) && self.waiting.len() < MAX_WAITING {
            self.waiting.push_back(address);
        }
    }

    /// Gives the engine everything that the network settings say.
    fn apply_network(&mut self, engine: &mut Engine) {
        self.network = NetworkSettings::from_lookup(|key| self.store.get(key));
        let network = &self.network;
        engine.set_downstream(Downstream {
            gateway4: network.client_gateway4,
            gateway6: network.client_gateway6,
        });
        let upstream: Vec<Ipv4Addr> = resolvers4(network);
        if network.virtual_resolvers.is_empty() {
            engine.set_dns(&VIRTUAL_RESOLVERS, &upstream);
        } else {
            engine.set_dns(&network.virtual_resolvers, &upstream);
        }
        let connected4 = network.connected4.iter().copied().map(IpAddr::V4);
        let connected6 = network.connected6.iter().copied().map(IpAddr::V6);
        let configured: Vec<IpAddr> = connected4.chain(connected6).collect();
        engine.set_configured(&configured);
        let uplink = match (self.uplink_mac, network.uplink4) {
            (Some(mac), Some(ip4)) => Some(UplinkConfig {
                mac,
                next_hop_mac: GATEWAY_MAC,
                ip4,
                gateway4: network.uplink_gateway4,
                ip6: network.uplink6,
                gateway6: network.uplink_gateway6,
                mtu: DEFAULT_MTU,
            }),
            _ => None,
        };
        engine.set_uplink(uplink);
        self.tell_problems();
    }

    fn apply_mapped(&self, engine: &mut Engine) {
        let mut reals: Vec<Ipv4Addr> = self.store.mapped_reals().collect();
        reals.dedup();
        let mapped: Vec<MappedAddress> = reals
            .into_iter()
            .filter_map(|real| self.store.mapped(real))
            .map(|mapped| MappedAddress {
                real: mapped.real,
                visible: mapped.visible,
                visible_gateway: mapped.visible_gateway,
            })
            .collect();
        engine.set_mapped(&mapped);
    }

    /// Names each problem once, when it appears.
    fn tell_problems(&mut self) {
        if !self.complete {
            return;
        }
        let problems: Vec<Problem> = self.problems().collect();
        for problem in &problems {
            if !self.told.contains(problem) {
                log::warn!("settings: {problem}");
            }
        }
        self.told = problems;
    }

    /// Problems that matter: on plain Xen only our address is needed, the rest has a meaning when absent.
    fn problems(&self) -> impl Iterator<Item = Problem> + '_ {
        self.network.problems.iter().copied().filter(|problem| {
            matches!(
                problem,
                Problem::Malformed(_) | Problem::Missing(Setting::Ip | Setting::PrimaryDns)
            )
        })
    }

    /// The keys of settings that are missing and waited for.
    #[must_use]
    pub fn missing(&self) -> Vec<Cow<'static, str>> {
        self.problems()
            .filter_map(|problem| match problem {
                Problem::Missing(setting) => Some(Cow::Borrowed(setting.key())),
                Problem::Malformed(_) => None,
            })
            .collect()
    }

    /// Our own addresses.
    #[must_use]
    pub const fn own_addresses(&self) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
        (self.network.uplink4, self.network.uplink6)
    }

    /// Moves one rule set one step nearer to being in force.
    pub fn step(&mut self, engine: &mut Engine, now: Time) {
        let _ = now;
        let job = match self.job.take() {
            Some(job) => job,
            None => loop {
                let Some(address) = self.waiting.pop_front() else {
                    return;
                };
                if let Some(reload) = self.store.reload(address) {
                    break Job::Reading(address, reload);
                }
            },
        };
        self.job = match job {
            Job::Reading(address, reload) => self.read(engine, address, reload),
            Job::Compiling(address, chain, compiler) => {
                self.compile(engine, address, chain, compiler)
            }
        };
    }

    /// When [`Settings::step`] is to be called next; at once while there is work.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        (self.job.is_some() || !self.waiting.is_empty()).then_some(Time(0))
    }

    fn read(&mut self, engine: &mut Engine, address: IpAddr, reload: Reload) -> Option<Job> {
        match reload.step(Reload::STEP_KEYS) {
            ReloadProgress::Working(more) => Some(Job::Reading(address, more)),
            ReloadProgress::Done(chain) => {
                let chain = Arc::new(chain);
                let compiler = Compiler::new(Arc::clone(&chain));
                Some(Job::Compiling(address, chain, compiler))
            }
            ReloadProgress::Failed(error) => {
                self.refuse(engine, address, error.to_string());
                None
            }
        }
    }

    fn compile(
        &mut self,
        engine: &mut Engine,
        address: IpAddr,
        chain: Arc<RuleChain>,
        compiler: Compiler<Arc<RuleChain>>,
    ) -> Option<Job> {
        let resolvers4 = resolvers4(&self.network);
        let environment = RuleEnvironment {
            resolvers4: &resolvers4,
            resolvers6: &[],
            hosts: &NoHosts,
            host_policy: HostPolicy::PerRule,
        };
        match compiler.step(&environment, Compiler::<Arc<RuleChain>>::STEP_BUDGET) {
            Progress::Working(more) => Some(Job::Compiling(address, chain, more)),
            Progress::Done(rules) => {
                engine.set_rules(address, rules);
                self.live.insert(address, Live::Chain(chain));
                self.store.handled(address);
                None
            }
            Progress::Failed(error) => {
                self.refuse(engine, address, error.to_string());
                None
            }
        }
    }

    /// Refuses everything from an address, with one log line.
    fn refuse(&mut self, engine: &mut Engine, address: IpAddr, reason: String) {
        engine.set_rules_invalid(address);
        self.store.handled(address);
        log::warn!("rules of {address}: everything refused: {reason}");
        self.live.insert(address, Live::Refused(reason));
    }

    /// The tree of an address is gone: everything from it is dropped.
    fn forget(&mut self, engine: &mut Engine, address: IpAddr) {
        engine.remove_rules(address);
        self.live.remove(&address);
        self.waiting.retain(|waiting| *waiting != address);
        if matches!(&self.job, Some(Job::Reading(of, _) | Job::Compiling(of, _, _)) if *of == address)
        {
            self.job = None;
        }
    }

    /// The rules in force, of all clients or of one.
    #[must_use]
    pub fn rules(&self, client: Option<IpAddr>) -> Vec<Rules> {
        self.live
            .iter()
            .filter(|(address, _)| client.is_none_or(|client| client == **address))
            .map(|(address, live)| match live {
                Live::Refused(reason) => Rules {
                    address: *address,
                    error: Some(reason.clone()),
                    policy: Cow::Borrowed("drop"),
                    rules: Vec::new(),
                },
                Live::Chain(chain) => Rules {
                    address: *address,
                    error: None,
                    policy: Cow::Borrowed(match chain.policy() {
                        Action::Accept => "accept",
                        Action::Drop => "drop",
                    }),
                    rules: chain
                        .rules()
                        .iter()
                        .map(|rule| (rule.number.get(), RuleText(rule).to_string()))
                        .collect(),
                },
            })
            .collect()
    }
}

/// Our resolvers with IPv4 addresses.
fn resolvers4(network: &NetworkSettings) -> Vec<Ipv4Addr> {
    let v4 = |address: &IpAddr| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    };
    network.resolvers.iter().filter_map(v4).collect()
}

/// The address in `/qubes-firewall/<address>`, exactly.
fn tree_address(key: &str) -> Option<IpAddr> {
    parse_canonical(key.strip_prefix("/qubes-firewall/")?)
}
