//! The channels to dom0 of Qubes OS: QubesDB, which configures us, and qrexec, through which dom0 runs commands here.
//!
//! The protocols are `qubes`'s; here they get the hypervisor, xenstore, the settings and the operator's commands. One
//! iteration does, in this order: QubesDB ([`QubesLink::follow_keys`]), so that nothing decides by old keys; calls
//! ([`QubesLink::serve_calls`]); what both want from xenstore ([`QubesLink::exchange`]).
//!
//! # Trust and bounds
//!
//! As in [`qubes::vchan`], [`qubes::qubesdb`] and [`qubes::qrexec`]: a peer can spoil its own channel only, every poll ends
//! after a bounded number of messages, and nothing here waits. Requests to xenstore are bounded by
//! [`qubes::vchan::channels::REQUESTS_MAX`].

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use firewall::Time as FilterTime;
use qubes::dns_report;
use qubes::qrexec::{Agent, Host};
use qubes::qubesdb::Link;
use qubes::vchan::directory::Token;
use qubes::vchan::{Activity, Channel, Registry, StoreRequest, XenChannels};
use xen::{DomId, Hypervisor, PortNumber, Time};
use xenstore::{ControlPlane, NodeAnswer, NodeRequest};

use crate::filter::Filter;
use crate::observe;
use crate::snapshot::Counter;

/// Reports to QubesDB in one iteration.
const REPORTS_PER_STEP: usize = 16;
/// Where dom0's tools look for what is wrong with the rules; dom0 writes it empty before our start.
const ERROR_KEY: &str = "/qubes-iptables-error";

/// QubesDB and qrexec over vchan.
#[derive(Debug)]
pub struct QubesLink {
    registry: Registry,
    database: Link<Channel>,
    agent: Agent<Channel>,
    /// The first dump of this boot was whole.
    complete: bool,
    /// What [`ERROR_KEY`] says.
    told: String,
    /// What the last polls want next.
    wishes: [Activity; 2],
}

impl Default for QubesLink {
    fn default() -> Self {
        Self::new()
    }
}

impl QubesLink {
    /// Connects to QubesDB from the first [`QubesLink::follow_keys`] on, and serves calls from the first
    /// [`QubesLink::serve_calls`] on.
    #[must_use]
    pub fn new() -> Self {
        Self {
            registry: Registry::new(),
            database: Link::new(),
            agent: Agent::new(),
            complete: false,
            told: String::new(),
            wishes: [Activity::again(), Activity::default()],
        }
    }

    /// Takes in what dom0 has written, and tells it what is in force. Returns whether dom0's QubesDB was found.
    pub fn follow_keys<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        filter: &mut Filter,
        now: FilterTime,
    ) -> bool {
        self.registry.tend(hv);
        let mut channels = XenChannels {
            hypervisor: hv,
            registry: &mut self.registry,
        };
        let activity = self.database.poll(&mut channels, filter.keys());
        if self.database.is_ready() && !self.complete {
            self.complete = true;
            filter.settings_complete(now);
        }
        filter.follow_keys(now);
        self.report(filter);
        let again = if self.database.wants_poll() {
            Activity::again()
        } else {
            Activity::default()
        };
        self.wishes[0] = activity.and(again);
        self.database
            .channel()
            .is_some_and(|channel| channel.port().is_some())
    }

    /// Whether [`Filter::next_report`] finds somebody to tell: such news is a reason not to sleep.
    #[must_use]
    pub fn can_report(&self) -> bool {
        self.database.is_ready()
    }

    /// Writes what dom0's tools want to know of rules that came into force. What finds no room is left out: it is news,
    /// not state.
    fn report(&mut self, filter: &mut Filter) {
        if !self.can_report() {
            return;
        }
        if filter.has_report() {
            let refusal = filter.refusal();
            let client = self.database.client();
            // A change of our netvm makes dom0 empty the key, and commit all rules again: a refusal is told again then.
            let news = !refusal.is_empty() || !self.told.is_empty();
            if news && client.write(ERROR_KEY, refusal.as_bytes()).is_ok() {
                self.told = refusal;
            }
        }
        for _ in 0..REPORTS_PER_STEP {
            let Some(report) = filter.next_report() else {
                return;
            };
            let client = self.database.client();
            if let Some((path, count)) = report.handled {
                let _ = client.write(&path.to_string(), count.to_string().as_bytes());
            }
            let _ = client.remove_below(&dns_report::directory(report.client));
            for (path, value) in &report.names {
                let _ = client.write(path.as_str(), value.as_bytes());
            }
        }
    }

    /// Moves calls on; their commands run in `host`.
    pub fn serve_calls<H: Hypervisor>(&mut self, hv: &mut H, host: &mut impl Host) {
        let mut channels = XenChannels {
            hypervisor: hv,
            registry: &mut self.registry,
        };
        let activity = self.agent.poll(&mut channels, host);
        let again = if self.agent.wants_poll() {
            Activity::again()
        } else {
            Activity::default()
        };
        self.wishes[1] = activity.and(again);
    }

    /// Hands requests to xenstore, and its answers to the channels.
    pub fn exchange(&mut self, control: &mut ControlPlane, own: DomId) {
        while let Some(answer) = control.next_answer() {
            match answer {
                NodeAnswer::Fired(token) => self.registry.fired(Token(token)),
                NodeAnswer::Read(token, content) => {
                    self.registry.answer(Token(token), content.as_deref());
                }
            }
            // Whoever waits for this looks at once.
            self.wishes[0].more = true;
        }
        while let Some(request) = self.registry.next_request() {
            control.submit(match request {
                StoreRequest::Publish {
                    path,
                    value,
                    reader,
                } => NodeRequest::Publish {
                    path,
                    value,
                    owner: own,
                    reader,
                },
                StoreRequest::Remove { path } => NodeRequest::Remove { path },
                StoreRequest::Watch { path, token } => NodeRequest::Watch {
                    path,
                    token: token.0,
                },
                StoreRequest::Unwatch { token, .. } => NodeRequest::Unwatch { token: token.0 },
                StoreRequest::Read { path, token } => NodeRequest::Read {
                    path,
                    token: token.0,
                },
            });
        }
    }

    /// Gives QubesDB up, before it was found: the configuration comes from elsewhere. Call [`QubesLink::exchange`] once more.
    pub fn close<H: Hypervisor>(&mut self, hv: &mut H) {
        let mut channels = XenChannels {
            hypervisor: hv,
            registry: &mut self.registry,
        };
        self.database.close(&mut channels);
        self.agent.close(&mut channels);
    }

    /// Whether there is more to do at once.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.wishes.iter().any(|wish| wish.more)
    }

    /// When there is something to do even if nothing comes.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        let wishes = self.wishes.iter().filter_map(|wish| wish.deadline);
        wishes.chain(self.registry.deadline()).min()
    }

    /// The ports to wait for.
    pub fn ports(&self) -> impl Iterator<Item = PortNumber> + '_ {
        let database = self.database.channel().into_iter();
        database
            .chain(self.agent.channels())
            .filter_map(Channel::port)
    }

    /// What happened so far.
    pub(crate) fn counters(&self) -> Vec<Counter> {
        let mut counters = observe::qubesdb(&self.database.counters());
        counters.extend(observe::qrexec(&self.agent.counters()));
        counters
    }

    /// Pages that peers still hold although their channel is over.
    #[must_use]
    pub const fn parked_pages(&self) -> usize {
        self.registry.parked_pages()
    }
}
