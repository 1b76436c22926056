//! A client vif: its addresses, what it believes in, and what passed it.

use alloc::vec::Vec;
use core::net::IpAddr;

use super::NONE;
use crate::address::{Address, V4, V6};
use crate::config::ClientConfig;
use crate::frame::Mac;
use crate::limiter::Bucket;
use crate::verdict::DropCounters;
use crate::wire::ethernet::{self, Addresses};

/// Addresses of one family, the first one apart because it is nearly always the only one.
#[derive(Debug)]
pub(crate) struct AddressList<A> {
    first: A,
    first_source: u16,
    more: Vec<(A, u16)>,
}

impl<A: Address> AddressList<A> {
    pub(super) const fn new(empty: A) -> Self {
        Self {
            first: empty,
            first_source: NONE,
            more: Vec::new(),
        }
    }

    pub(super) fn push(&mut self, address: A, source: u16) {
        if self.first_source == NONE {
            self.first = address;
            self.first_source = source;
        } else {
            self.more.push((address, source));
        }
    }

    /// Whether there is any address.
    pub(crate) const fn is_used(&self) -> bool {
        self.first_source != NONE
    }

    /// The source that an address stands for.
    #[inline(always)]
    pub(crate) fn source(&self, address: A) -> Option<u16> {
        if self.first == address && self.first_source != NONE {
            return Some(self.first_source);
        }
        if self.more.is_empty() {
            return None;
        }
        self.source_among_more(address)
    }

    #[cold]
    fn source_among_more(&self, address: A) -> Option<u16> {
        let found = self.more.iter().find(|(own, _)| *own == address)?;
        Some(found.1)
    }

    /// The first address, if there is any.
    pub(super) fn first(&self) -> Option<A> {
        self.is_used().then_some(self.first)
    }

    fn sources(&self) -> impl Iterator<Item = u16> + '_ {
        let first = (self.first_source != NONE).then_some(self.first_source);
        first
            .into_iter()
            .chain(self.more.iter().map(|(_, source)| *source))
    }
}

/// An address that a client believes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fake {
    pub(crate) real: V4,
    pub(crate) visible: V4,
    pub(crate) gateway: V4,
}

/// A client vif.
#[derive(Debug)]
pub(crate) struct Vif {
    /// Addresses of frames to the client.
    pub(crate) link: Addresses,
    pub(crate) mtu: u16,
    /// Another vif has one of its addresses.
    pub(crate) shared: bool,
    pub(crate) fake: Option<Fake>,
    pub(crate) addresses4: AddressList<V4>,
    pub(crate) addresses6: AddressList<V6>,
    pub(crate) frames_up: u64,
    pub(crate) bytes_up: u64,
    pub(crate) frames_down: u64,
    pub(crate) bytes_down: u64,
    pub(crate) errors: Bucket,
    pub(crate) domid: u16,
    pub(crate) mac: Mac,
    pub(crate) drops: DropCounters,
    addresses: Vec<IpAddr>,
}

impl Vif {
    /// A vif to which no source has been added yet.
    pub(super) fn new(config: &ClientConfig, addresses: &[IpAddr]) -> Self {
        Self {
            link: ethernet::addresses(config.mac, ethernet::OWN_CLIENT_SIDE),
            mtu: config.mtu,
            shared: false,
            fake: None,
            addresses4: AddressList::new(0),
            addresses6: AddressList::new(V6(0, 0)),
            frames_up: 0,
            bytes_up: 0,
            frames_down: 0,
            bytes_down: 0,
            errors: Bucket::default(),
            domid: config.domid,
            mac: config.mac,
            drops: DropCounters::default(),
            addresses: addresses.to_vec(),
        }
    }

    /// Adds the source of one of its addresses.
    pub(super) fn push(&mut self, address: IpAddr, source: u16) {
        if let Some(address) = V4::from_ip(address) {
            self.addresses4.push(address, source);
        } else if let Some(address) = V6::from_ip(address) {
            self.addresses6.push(address, source);
        }
    }

    pub(crate) fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Its sources of both families.
    pub(crate) fn sources(&self) -> impl Iterator<Item = u16> + '_ {
        self.addresses4.sources().chain(self.addresses6.sources())
    }
}
