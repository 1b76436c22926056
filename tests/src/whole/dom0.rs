//! dom0's end of the channels: the double's daemons over vchan, their nodes in the common xenstore.

use std::collections::VecDeque;

use qubes::vchan::channels::{Channel, Channels, Phase, Registry, XenChannels};
use qubes::vchan::directory::{StoreRequest, Token};
use qubes::vchan::{OpenError, Orders};
use xen::fake::FakeHypervisor;
use xen::{DomId, Hypervisor, Time};
use xenstore::fake::{Access, FakeStore};

struct Watch {
    path: String,
    token: Token,
    /// The value that was there when it last fired.
    seen: Option<String>,
}

/// dom0's channels.
pub struct Dom0Channels {
    hypervisor: FakeHypervisor,
    registry: Registry,
    store: FakeStore,
    watches: Vec<Watch>,
    /// Watches that fire first of all, as every new one does.
    new: VecDeque<Token>,
}

impl Dom0Channels {
    /// No channels yet.
    #[must_use]
    pub fn new(hypervisor: FakeHypervisor, store: FakeStore) -> Self {
        Self {
            hypervisor,
            registry: Registry::new(),
            store,
            watches: Vec::new(),
            new: VecDeque::new(),
        }
    }

    fn xen(&mut self) -> XenChannels<'_, FakeHypervisor> {
        XenChannels {
            hypervisor: &mut self.hypervisor,
            registry: &mut self.registry,
        }
    }

    /// Watches held.
    #[must_use]
    pub const fn watches(&self) -> usize {
        self.watches.len()
    }

    /// What the daemons' main loops do beside polling the protocols.
    pub fn serve(&mut self) {
        self.hypervisor.wait(&[], None);
        self.registry.tend(&mut self.hypervisor);
        let home = |path: &str| match path.strip_prefix('/') {
            Some(_) => path.to_owned(),
            None => format!("/local/domain/0/{path}"),
        };
        while let Some(request) = self.registry.next_request() {
            match request {
                StoreRequest::Publish {
                    path,
                    value,
                    reader,
                } => {
                    let readers = [(reader, Access::Read)];
                    self.store
                        .create(&home(&path), &value, DomId::DOM0, &readers, Access::None);
                }
                StoreRequest::Remove { path } => {
                    self.store.remove(&home(&path));
                }
                StoreRequest::Watch { path, token } => {
                    let path = home(&path);
                    let seen = self.store.read(&path);
                    self.watches.push(Watch { path, token, seen });
                    self.new.push_back(token);
                }
                StoreRequest::Unwatch { token, .. } => {
                    self.watches.retain(|watch| watch.token != token);
                    self.new.retain(|new| *new != token);
                }
                StoreRequest::Read { path, token } => {
                    let value = self.store.read(&home(&path));
                    self.registry
                        .answer(token, value.as_ref().map(String::as_bytes));
                }
            }
        }
        while let Some(token) = self.new.pop_front() {
            self.registry.fired(token);
        }
        for watch in &mut self.watches {
            let value = self.store.read(&watch.path);
            if value != watch.seen {
                watch.seen = value;
                self.registry.fired(watch.token);
            }
        }
    }
}

impl Channels for Dom0Channels {
    type Channel = Channel;
    fn listen(&mut self, peer: DomId, port: u32, orders: Orders) -> Result<Channel, OpenError> {
        self.xen().listen(peer, port, orders)
    }
    fn connect(&mut self, server: DomId, port: u32) -> Result<Channel, OpenError> {
        self.xen().connect(server, port)
    }
    fn progress(&mut self, channel: &mut Channel) -> Phase {
        self.xen().progress(channel)
    }
    fn flush(&mut self, channel: &mut Channel) {
        self.xen().flush(channel);
    }
    fn close(&mut self, channel: Channel) {
        self.xen().close(channel);
    }
    fn now(&self) -> Time {
        self.hypervisor.now()
    }
    fn deadline(&self, channel: &Channel) -> Option<Time> {
        channel.deadline()
    }
}
