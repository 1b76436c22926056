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
//!
//! # Names
//!
//! The names of a tree are given to the resolver before the tree is compiled. When what a name stands for has
//! changed, the rules that are in force are compiled again (a *refresh*), apart from commits and beside them, one address
//! after the other. A change while rules are being compiled lets that go on and has them compiled once more, behind those of
//! other addresses: names that change all the time cannot keep anybody's rules from coming into force.

use alloc::borrow::Cow;
use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use firewall::config::DEFAULT_MTU;
use firewall::resolver::{FailureKind, NameView, Resolver, UserHosts};
use firewall::rule::{Action, HostName, RuleChain};
use firewall::ruleset::{Compiler, HostLookup, HostPolicy, HostState, Progress, RuleEnvironment};
use firewall::{Downstream, Engine, GATEWAY_MAC, MappedAddress, Time, UplinkConfig};
use litemap::LiteMap;
use qubes::address_text::parse_canonical;
use qubes::dns_report;
use qubes::qubesdb::{Path, Sink};
use qubes::reload::{Reload, ReloadProgress};
use qubes::rule_text::RuleText;
use qubes::settings::{NetworkSettings, Problem, Setting};
use qubes::store::{Event, HandledPath, Store};
use xenstore::ConfigEvent;

use crate::snapshot::{Name, Rules};

/// Resolver addresses that clients use when nothing else is said: Qubes' own.
const VIRTUAL_RESOLVERS: [Ipv4Addr; 2] =
    [Ipv4Addr::new(10, 139, 1, 1), Ipv4Addr::new(10, 139, 1, 2)];

/// Addresses whose rules may wait for their turn; a later commit of the same address adds nothing.
const MAX_WAITING: usize = 4096;

/// What settings are put in force in.
pub struct Target {
    /// Decides frames.
    pub engine: Engine,
    /// Knows what names stand for.
    pub resolver: Resolver,
}

/// The rules of one address as they are in force.
#[derive(Debug, Default)]
struct Live {
    /// The rules, if they were understood.
    chain: Option<Arc<RuleChain>>,
    /// Why everything is refused, if it is.
    refused: Option<String>,
    /// When the compilation began that is in force.
    begun: u64,
    /// The last commit's key and number to report.
    handled: Option<(HandledPath, u64)>,
}

/// A rule set on its way into force.
#[derive(Debug)]
enum Job {
    Reading(IpAddr, Reload),
    Compiling(Compilation),
}

impl Job {
    const fn address(&self) -> IpAddr {
        match self {
            Self::Reading(address, _) => *address,
            Self::Compiling(compilation) => compilation.address,
        }
    }
}

/// A rule chain that is being compiled.
#[derive(Debug)]
struct Compilation {
    address: IpAddr,
    chain: Arc<RuleChain>,
    compiler: Compiler<Arc<RuleChain>>,
    /// When it began.
    begun: u64,
}

impl Compilation {
    fn new(address: IpAddr, chain: Arc<RuleChain>, begun: u64) -> Self {
        let compiler = Compiler::new(Arc::clone(&chain));
        Self {
            address,
            chain,
            compiler,
            begun,
        }
    }
}

/// What the rest of the world may be told about the rules of one address.
#[derive(Debug)]
pub struct Report {
    /// The address.
    pub client: IpAddr,
    /// The key and the value that tell which commit is in force, if there is a commit.
    pub handled: Option<(HandledPath, u64)>,
    /// Everything that should be below [`dns_report::directory`]: what the names in the rules stand for.
    pub names: Vec<(Path, String)>,
}

/// The settings in force.
pub struct Settings {
    store: Store,
    network: NetworkSettings,
    /// Our MAC address on the uplink while there is one.
    uplink_mac: Option<[u8; 6]>,
    /// Our side of the uplink as the engine has it.
    uplink: Option<UplinkConfig>,
    host_policy: HostPolicy,
    live: LiteMap<IpAddr, Live>,
    /// Commits that wait for their turn.
    waiting: VecDeque<IpAddr>,
    job: Option<Job>,
    /// Addresses whose rules are in force and must be compiled again.
    stale: VecDeque<IpAddr>,
    refresh: Option<Compilation>,
    /// Counts changes of names and compilations, to tell which came first.
    sequence: u64,
    /// Addresses that [`Settings::next_report`] has news of, each once.
    reports: VecDeque<IpAddr>,
    /// All existing settings have been seen once.
    complete: bool,
    /// Told to the operator already.
    told: Vec<Problem>,
}

impl Settings {
    /// No settings: everything is dropped. `host_policy` says what names without addresses do to their rules.
    #[must_use]
    pub fn new(host_policy: HostPolicy) -> Self {
        Self {
            store: Store::default(),
            network: NetworkSettings::default(),
            uplink_mac: None,
            uplink: None,
            host_policy,
            live: LiteMap::new(),
            waiting: VecDeque::new(),
            job: None,
            stale: VecDeque::new(),
            refresh: None,
            sequence: 0,
            reports: VecDeque::new(),
            complete: false,
            told: Vec::new(),
        }
    }

    /// Takes in a change. What it means is put in force at once, rules within the next [`Settings::step`]s.
    pub fn change(&mut self, target: &mut Target, event: ConfigEvent, now: Time) {
        match event {
            ConfigEvent::Written { key, value } => self.store.written(&key, &value),
            ConfigEvent::Removed { key } => {
                self.store.removed(&key);
                if let Some(address) = tree_address(&key) {
                    self.forget(target, address);
                }
            }
            ConfigEvent::Unusable { key, reason } => {
                if let Some(address) = tree_address(&key) {
                    self.cancel(address);
                    target.resolver.forget(address);
                    self.refuse(&mut target.engine, address, None, reason.to_string());
                }
            }
            ConfigEvent::Ready => self.complete(target, now),
        }
        self.follow(target, now);
    }

    /// dom0's keys, for a source that writes them itself; call [`Settings::follow`] afterwards.
    pub const fn keys(&mut self) -> &mut Store {
        &mut self.store
    }

    /// All existing settings have been seen: what is missing now is missing.
    pub fn complete(&mut self, target: &mut Target, now: Time) {
        self.complete = true;
        self.apply_network(target, now);
    }

    /// Puts in force what changed in the keys, rules within the next [`Settings::step`]s.
    pub fn follow(&mut self, target: &mut Target, now: Time) {
        while let Some(event) = self.store.next_event() {
            match event {
                Event::SettingsChanged => {
                    self.apply_network(target, now);
                    // `specialtarget=dns` means the resolvers that are known now.
                    // What could not even be read stays refused.
                    let readable = self.live.iter().filter(|(_, live)| live.chain.is_some());
                    let all: Vec<IpAddr> = readable.map(|(address, _)| *address).collect();
                    for address in all {
                        self.enqueue(address);
                    }
                    self.start_again();
                }
                Event::ConnectedChanged => self.apply_network(target, now),
                Event::MappedChanged => self.apply_mapped(&mut target.engine),
                Event::Commit(address) => self.enqueue(address),
            }
        }
        if self.store.is_crowded() {
            let attached: Vec<IpAddr> = target
                .engine
                .clients()
                .flat_map(|client| client.addresses)
                .collect();
            self.store
                .forget_detached(|address| attached.contains(&address));
        }
    }

    /// The uplink came (with our MAC address on it) or went.
    pub fn set_uplink(&mut self, target: &mut Target, mac: Option<[u8; 6]>, now: Time) {
        self.uplink_mac = mac;
        self.apply_network(target, now);
    }

    fn enqueue(&mut self, address: IpAddr) {
        if !self.waiting.contains(&address) && self.waiting.len() < MAX_WAITING {
            self.waiting.push_back(address);
        }
    }

    /// Gives the engine everything that the network settings say.
    fn apply_network(&mut self, target: &mut Target, now: Time) {
        self.network = NetworkSettings::from_lookup(|key| self.store.get(key));
        let network = &self.network;
        let engine = &mut target.engine;
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
        let reached = |server: &&IpAddr| uplink.as_ref().is_some_and(|own| reaches(own, server));
        let servers: Vec<IpAddr> = network.resolvers.iter().filter(reached).copied().collect();
        let is_new = uplink.is_some() && self.uplink != uplink;
        target.resolver.set_servers(&servers, is_new, now);
        self.uplink = uplink;
        self.tell_problems();
    }

    /// Our side of the uplink, while there is one.
    #[must_use]
    pub const fn uplink(&self) -> Option<&UplinkConfig> {
        self.uplink.as_ref()
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
                xen::warn!("settings: {problem}");
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

    /// Moves one commit and one refresh one step nearer to being in force.
    pub fn step(&mut self, target: &mut Target, now: Time) {
        self.step_refresh(target);
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
            Job::Reading(address, reload) => self.read(target, address, reload, now),
            Job::Compiling(compilation) => self.compile(target, compilation).map(Job::Compiling),
        };
    }

    /// Moves one refresh one step nearer to being in force.
    pub fn step_refresh(&mut self, target: &mut Target) {
        let refresh = match self.refresh.take() {
            Some(refresh) => refresh,
            None => {
                let Some(address) = self.stale.pop_front() else {
                    return;
                };
                // The resolver knows the names of the rules that are about to come into force: those first.
                if matches!(&self.job, Some(Job::Compiling(own)) if own.address == address) {
                    return self.stale.push_back(address);
                }
                let live = self.live.get(&address);
                let Some(chain) = live.and_then(|live| live.chain.clone()) else {
                    return;
                };
                Compilation::new(address, chain, self.next_sequence())
            }
        };
        self.refresh = self.compile(target, refresh);
    }

    const fn next_sequence(&mut self) -> u64 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// Whether [`Settings::step`] has work.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.job.is_some() || !self.waiting.is_empty() || self.is_refreshing()
    }

    fn is_refreshing(&self) -> bool {
        self.refresh.is_some() || !self.stale.is_empty()
    }

    /// What names in the rules of an address stand for has changed: they are compiled again in the next
    /// [`Settings::step`]s.
    pub fn names_changed(&mut self, address: IpAddr) {
        self.next_sequence();
        if !self.stale.contains(&address) && self.stale.len() < MAX_WAITING {
            self.stale.push_back(address);
        }
    }

    /// A mark for [`Settings::is_since`].
    #[must_use]
    pub const fn mark(&self) -> u64 {
        self.sequence
    }

    /// Whether the rules in force for an address know everything that [`Settings::names_changed`] told before `mark`.
    #[must_use]
    pub fn is_since(&self, address: IpAddr, mark: u64) -> bool {
        let refreshing = |own: &Compilation| own.address == address;
        let waits = self.stale.contains(&address) || self.refresh.as_ref().is_some_and(refreshing);
        !waits || self.live.get(&address).is_none_or(|live| live.begun > mark)
    }

    /// Starts compilations under way from the beginning.
    fn start_again(&mut self) {
        if let Some(Job::Compiling(own)) = &mut self.job {
            own.compiler = Compiler::new(Arc::clone(&own.chain));
        }
        if let Some(own) = &mut self.refresh {
            own.compiler = Compiler::new(Arc::clone(&own.chain));
        }
    }

    fn read(
        &mut self,
        target: &mut Target,
        address: IpAddr,
        reload: Reload,
        now: Time,
    ) -> Option<Job> {
        match reload.step(Reload::STEP_KEYS) {
            ReloadProgress::Working(more) => Some(Job::Reading(address, more)),
            ReloadProgress::Done(chain) => {
                // From here on the resolver knows the new names, not the old ones: no refresh of the old rules.
                self.cancel_refresh(address);
                if !target.resolver.set_names(address, chain.host_names(), now) {
                    xen::warn!("rules of {address}: too many names; some stay unresolved");
                }
                let begun = self.next_sequence();
                let chain = Arc::new(chain);
                Some(Job::Compiling(Compilation::new(address, chain, begun)))
            }
            ReloadProgress::Failed(error) => {
                self.cancel_refresh(address);
                target.resolver.forget(address);
                self.refuse(&mut target.engine, address, None, error.to_string());
                None
            }
        }
    }

    /// Compiles one step further; returns what is left to do.
    fn compile(&mut self, target: &mut Target, compilation: Compilation) -> Option<Compilation> {
        let Compilation {
            address,
            chain,
            compiler,
            begun,
        } = compilation;
        let resolvers4 = resolvers4(&self.network);
        let environment = RuleEnvironment {
            resolvers4: &resolvers4,
            resolvers6: &[],
            hosts: &target.resolver.hosts_of(address),
            host_policy: self.host_policy,
        };
        match compiler.step(&environment, Compiler::<Arc<RuleChain>>::STEP_BUDGET) {
            Progress::Working(compiler) => {
                return Some(Compilation {
                    address,
                    chain,
                    compiler,
                    begun,
                });
            }
            Progress::Done(rules) => {
                target.engine.set_rules(address, rules);
                self.put(address, Some(chain), None);
            }
            Progress::Failed(error) => {
                self.refuse(&mut target.engine, address, Some(chain), error.to_string());
            }
        }
        if let Some(live) = self.live.get_mut(&address) {
            live.begun = begun;
        }
        None
    }

    /// Refuses everything from an address. One log line, unless that is so already.
    fn refuse(
        &mut self,
        engine: &mut Engine,
        address: IpAddr,
        chain: Option<Arc<RuleChain>>,
        reason: String,
    ) {
        engine.set_rules_invalid(address);
        let known = self
            .live
            .get(&address)
            .and_then(|live| live.refused.as_ref());
        if known != Some(&reason) {
            xen::warn!("rules of {address}: everything refused: {reason}");
        }
        self.put(address, chain, Some(reason));
    }

    /// Notes what is in force for an address.
    fn put(&mut self, address: IpAddr, chain: Option<Arc<RuleChain>>, refused: Option<String>) {
        let handled = self.store.handled(address);
        let live = self.live.entry(address).or_default();
        live.chain = chain;
        live.refused = refused;
        live.handled = handled.or(live.handled);
        if !self.reports.contains(&address) && self.reports.len() < MAX_WAITING {
            self.reports.push_back(address);
        }
    }

    /// The tree of an address is gone: everything from it is dropped.
    fn forget(&mut self, target: &mut Target, address: IpAddr) {
        target.engine.remove_rules(address);
        target.resolver.forget(address);
        self.live.remove(&address);
        self.cancel(address);
        self.reports.retain(|reported| *reported != address);
    }

    /// Forgets commits and refreshes of an address that are not in force yet.
    fn cancel(&mut self, address: IpAddr) {
        self.waiting.retain(|waiting| *waiting != address);
        if self
            .job
            .as_ref()
            .is_some_and(|job| job.address() == address)
        {
            self.job = None;
        }
        self.cancel_refresh(address);
    }

    fn cancel_refresh(&mut self, address: IpAddr) {
        self.stale.retain(|stale| *stale != address);
        if self
            .refresh
            .as_ref()
            .is_some_and(|own| own.address == address)
        {
            self.refresh = None;
        }
    }

    /// Whether [`Settings::next_report`] has something to say.
    #[must_use]
    pub fn has_report(&self) -> bool {
        !self.reports.is_empty()
    }

    /// What QubesDB is to be told: the next address whose rules came into force or whose names changed.
    pub fn next_report(&mut self, resolver: &Resolver) -> Option<Report> {
        let client = self.reports.pop_front()?;
        let hosts = resolver.hosts_of(client);
        let report = |known: NameView<'_>| {
            let path = dns_report::path(client, known.name)?;
            Some((
                path,
                dns_report::value(addresses(client, &hosts, known.name)),
            ))
        };
        Some(Report {
            client,
            handled: self.live.get(&client).and_then(|live| live.handled),
            names: resolver.names_of(client).filter_map(report).collect(),
        })
    }

    /// What `/qubes-iptables-error` says: nothing while all rules are understood, else which client's are not and why, and
    /// how many more there are.
    #[must_use]
    pub fn refusal(&self) -> String {
        let mut refused = self
            .live
            .iter()
            .filter_map(|(address, live)| Some((address, live.refused.as_ref()?)));
        let Some((address, reason)) = refused.next() else {
            return String::new();
        };
        match refused.count() {
            0 => alloc::format!("rules of {address}: {reason}"),
            more => alloc::format!("rules of {address}: {reason} (and of {more} more)"),
        }
    }

    /// The rules in force, of all clients or of one.
    #[must_use]
    pub fn rules(&self, client: Option<IpAddr>, resolver: &Resolver) -> Vec<Rules> {
        self.live
            .iter()
            .filter(|(address, _)| client.is_none_or(|client| client == **address))
            .map(|(address, live)| {
                let chain = live.chain.as_deref();
                Rules {
                    address: *address,
                    error: live.refused.clone(),
                    policy: Cow::Borrowed(match chain.map(RuleChain::policy) {
                        Some(Action::Accept) => "accept",
                        Some(Action::Drop) | None => "drop",
                    }),
                    rules: chain
                        .map_or(&[][..], RuleChain::rules)
                        .iter()
                        .map(|rule| (rule.number.get(), RuleText(rule).to_string()))
                        .collect(),
                    names: names(*address, resolver),
                }
            })
            .collect()
    }
}

/// What is known about the names in the rules of an address.
fn names(client: IpAddr, resolver: &Resolver) -> Vec<Name> {
    let hosts = resolver.hosts_of(client);
    let view = |known: NameView<'_>| Name {
        name: known.name.to_string(),
        state: Cow::Borrowed(state_word(&known)),
        addresses: addresses(client, &hosts, known.name),
    };
    resolver.names_of(client).map(view).collect()
}

/// What a name stands for in the rules of an address.
fn addresses(client: IpAddr, hosts: &UserHosts<'_>, name: &HostName) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    let mut add = |address: IpAddr| {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    };
    match client {
        IpAddr::V4(_) => hosts.addresses4(name, &mut |own| add(own.into())),
        IpAddr::V6(_) => hosts.addresses6(name, &mut |own| add(own.into())),
    };
    addresses
}

/// How it stands with a name, in words.
const fn state_word(known: &NameView<'_>) -> &'static str {
    match (known.state, known.failure) {
        (HostState::Resolved, None) => "resolved",
        (HostState::Resolved, Some(_)) => "resolved, but the last lookup failed",
        (HostState::Unresolved, None) => "pending",
        (HostState::Unresolved, Some(failure)) => match failure.kind {
            FailureKind::Timeout => "unresolved: no answer",
            FailureKind::NoSuchName => "unresolved: no such name",
            FailureKind::ServerFailure(_) => "unresolved: the server failed",
            FailureKind::ImpossibleName => "unresolved: not a name that DNS can have",
        },
    }
}

/// Whether a resolver can be reached over the uplink: over IPv6 only with an address and a next hop of that family.
const fn reaches(uplink: &UplinkConfig, server: &IpAddr) -> bool {
    match server {
        IpAddr::V4(_) => true,
        IpAddr::V6(_) => uplink.ip6.is_some() && uplink.gateway6.is_some(),
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
