//! Who is attached where, with which addresses and rules: everything that dom0 decides.
//!
//! A [`Source`] is an attached client address with its rules; flows refer to it by number. It has an
//! *epoch*, a number that never repeats: flows remember the epoch of their verdict, and a different one
//! means that the rules must be asked again. An epoch older than the source's *birth* means that the
//! flow is over, because vif or uplink have changed since. So the cost of a change does not depend on
//! the number of flows.
//!
//! Bounds: vifs and sources have fixed maxima; rules of addresses that are not attached wait in a map
//! that only dom0 can fill.
//!
//! Source: `qubes-policy.md` 1.4, 3.5, 5; `performance.md` 5.7.

mod nodes;
mod vif;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::net::IpAddr;
use litemap::LiteMap;

use crate::config::{AttachError, ClientConfig, MappedAddress};
use crate::frame::ClientId;
use crate::ruleset::CompiledRules;

use nodes::{Change, Nodes};

pub(crate) use nodes::Routed;
pub(crate) use vif::{Fake, Vif};

/// No source, no vif.
pub(crate) const NONE: u16 = u16::MAX;

/// The rules of an address.
#[derive(Debug, Default)]
pub(crate) enum Rules {
    /// dom0 has never given any: silent drop.
    #[default]
    Absent,
    /// They cannot be understood: reject everything.
    Invalid,
    /// In force.
    Compiled(CompiledRules),
}

/// An attached client address.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) epoch: u32,
    /// Flows from before are over.
    pub(crate) birth: u32,
    /// The vif that packets to the address go to, or [`NONE`].
    pub(crate) vif: u16,
    /// Vifs that have the address: an HVM has two.
    vifs: Vec<u16>,
    address: IpAddr,
    pub(crate) rules: Rules,
}

/// Everything that dom0 decides about clients.
#[derive(Debug)]
pub(crate) struct Registry {
    pub(crate) vifs: Box<[Option<Box<Vif>>]>,
    pub(crate) sources: Vec<Source>,
    /// Numbers of sources that can be used again.
    free_sources: Vec<u16>,
    max_sources: u16,
    nodes: Nodes,
    dormant: LiteMap<IpAddr, Rules>,
    mapped: Vec<MappedAddress>,
    configured: Vec<IpAddr>,
    epoch: u32,
}

/// Most attached addresses for a number of vifs.
pub(crate) const fn max_sources(vifs: u16) -> u16 {
    match vifs.checked_mul(4) {
        Some(count) if count < NONE => count,
        _ => NONE - 1,
    }
}

impl Registry {
    pub(crate) fn new(vifs: u16) -> Self {
        Self {
            vifs: (0..vifs).map(|_| None).collect(),
            sources: Vec::new(),
            free_sources: Vec::new(),
            max_sources: max_sources(vifs),
            nodes: Nodes::new(),
            dormant: LiteMap::new(),
            mapped: Vec::new(),
            configured: Vec::new(),
            epoch: 1,
        }
    }

    #[inline(always)]
    pub(crate) fn vif(&self, id: u16) -> Option<&Vif> {
        self.vifs.get(usize::from(id))?.as_deref()
    }

    #[inline(always)]
    pub(crate) fn vif_mut(&mut self, id: u16) -> Option<&mut Vif> {
        self.vifs.get_mut(usize::from(id))?.as_deref_mut()
    }

    /// The attached vifs in the order of their numbers.
    pub(crate) fn vifs(&self) -> impl Iterator<Item = (ClientId, &Vif)> {
        self.vifs
            .iter()
            .zip(0_u16..)
            .filter_map(|(vif, id)| Some((ClientId(id), vif.as_deref()?)))
    }

    #[inline(always)]
    pub(crate) fn source(&self, number: u16) -> Option<&Source> {
        self.sources.get(usize::from(number))
    }

    fn source_mut(&mut self, number: u16) -> Option<&mut Source> {
        self.sources.get_mut(usize::from(number))
    }

    // Epochs.

    /// Whether the next changes could run out of epochs. Then every flow must be forgotten and
    /// [`Self::restart_epochs`] called.
    pub(crate) fn epochs_are_exhausted(&self) -> bool {
        self.epoch > u32::MAX - 0x4_0000
    }

    pub(crate) fn restart_epochs(&mut self) {
        self.epoch = 1;
        for source in &mut self.sources {
            source.epoch = 1;
            source.birth = 0;
        }
    }

    fn next_epoch(&mut self) -> u32 {
        self.epoch = self.epoch.wrapping_add(1);
        self.epoch
    }

    /// Asks the rules again about every flow.
    fn recheck_all(&mut self) {
        let epoch = self.next_epoch();
        for source in &mut self.sources {
            source.epoch = epoch;
        }
    }

    /// Ends every flow.
    pub(crate) fn cut_all(&mut self) {
        let epoch = self.next_epoch();
        for source in &mut self.sources {
            source.epoch = epoch;
            source.birth = epoch;
        }
    }

    fn cut(&mut self, number: u16) {
        let epoch = self.next_epoch();
        if let Some(source) = self.source_mut(number) {
            source.epoch = epoch;
            source.birth = epoch;
        }
    }

    // Clients.

    pub(crate) fn attach(&mut self, config: ClientConfig) -> Result<(), AttachError> {
        match self.vifs.get(usize::from(config.id.0)) {
            None => return Err(AttachError::NumberOutOfRange),
            Some(Some(_)) => return Err(AttachError::NumberInUse),
            Some(None) => {}
        }
        let mut addresses = config.addresses.clone();
        let mut seen = Vec::new();
        addresses.retain(|address| {
            let new = !seen.contains(address);
            seen.push(*address);
            new
        });
        let missing = addresses
            .iter()
            .filter(|address| self.nodes.source(**address).is_none())
            .count();
        if self.sources.len() - self.free_sources.len() + missing > usize::from(self.max_sources) {
            return Err(AttachError::TooManyAddresses);
        }
        let mut vif = Vif::new(&config, &addresses);
        let mut numbers = Vec::new();
        for address in addresses {
            let number = self.join(address, config.id.0);
            numbers.push(number);
            vif.push(address, number);
        }
        vif.fake = self.fake_of(&vif);
        if let Some(slot) = self.vifs.get_mut(usize::from(config.id.0)) {
            *slot = Some(Box::new(vif));
        }
        for number in numbers {
            self.choose_vif(number);
        }
        self.mark_shared();
        // Flows to the addresses are over now, whoever they belong to.
        self.recheck_all();
        Ok(())
    }

    /// Adds a vif to the source of an address, which is made if it does not exist.
    fn join(&mut self, address: IpAddr, vif: u16) -> u16 {
        let number = match self.nodes.source(address) {
            Some(number) => number,
            None => self.new_source(address),
        };
        if let Some(source) = self.source_mut(number) {
            source.vifs.push(vif);
        }
        self.cut(number);
        number
    }

    fn new_source(&mut self, address: IpAddr) -> u16 {
        let source = Source {
            epoch: 0,
            birth: 0,
            vif: NONE,
            vifs: Vec::new(),
            address,
            rules: self.dormant.remove(&address).unwrap_or_default(),
        };
        let number = match self.free_sources.pop() {
            Some(number) => {
                if let Some(slot) = self.source_mut(number) {
                    *slot = source;
                }
                number
            }
            None => {
                let number = u16::try_from(self.sources.len()).unwrap_or(NONE);
                self.sources.push(source);
                number
            }
        };
        self.nodes.change(address, Change::Source(Some(number)));
        number
    }

    pub(crate) fn detach(&mut self, id: ClientId) {
        let Some(vif) = self.vifs.get_mut(usize::from(id.0)).and_then(Option::take) else {
            return;
        };
        for number in vif.sources() {
            self.cut(number);
            let Some(source) = self.source_mut(number) else {
                continue;
            };
            source.vifs.retain(|own| *own != id.0);
            if !source.vifs.is_empty() {
                self.choose_vif(number);
                continue;
            }
            source.vif = NONE;
            let address = source.address;
            let rules = core::mem::take(&mut source.rules);
            if !matches!(rules, Rules::Absent) {
                self.dormant.insert(address, rules);
            }
            self.nodes.change(address, Change::Source(None));
            self.free_sources.push(number);
        }
        self.mark_shared();
    }

    /// Sends what goes to a source to its vif with the highest domid.
    fn choose_vif(&mut self, number: u16) {
        let Some(source) = self.source(number) else {
            return;
        };
        let best = source
            .vifs
            .iter()
            .copied()
            .max_by_key(|id| self.vif(*id).map(|vif| vif.domid));
        if let Some(source) = self.source_mut(number) {
            source.vif = best.unwrap_or(NONE);
        }
    }

    fn mark_shared(&mut self) {
        let sources = &self.sources;
        for vif in self.vifs.iter_mut().flatten() {
            let shared = vif.sources().any(|number| {
                sources
                    .get(usize::from(number))
                    .is_some_and(|source| source.vifs.len() > 1)
            });
            vif.shared = shared;
        }
    }

    /// Notes which of several vifs with an address is in use.
    pub(crate) fn use_vif(&mut self, number: u16, vif: u16) {
        if let Some(source) = self.source_mut(number) {
            source.vif = vif;
        }
    }

    // Rules.

    pub(crate) fn set_rules(&mut self, address: IpAddr, rules: Rules) {
        match self.nodes.source(address) {
            Some(number) => {
                let epoch = self.next_epoch();
                if let Some(source) = self.source_mut(number) {
                    source.rules = rules;
                    source.epoch = epoch;
                }
            }
            None if matches!(rules, Rules::Absent) => {
                self.dormant.remove(&address);
            }
            None => {
                self.dormant.insert(address, rules);
            }
        }
    }

    // Guards and fake addresses.

    pub(crate) fn set_configured(&mut self, addresses: &[IpAddr]) {
        for address in core::mem::take(&mut self.configured) {
            self.nodes.change(address, Change::Configured(false));
        }
        for address in addresses {
            self.nodes.change(*address, Change::Configured(true));
        }
        self.configured = addresses.to_vec();
        self.recheck_all();
    }

    pub(crate) fn set_mapped(&mut self, mapped: &[MappedAddress]) {
        for old in core::mem::take(&mut self.mapped) {
            self.nodes
                .change(IpAddr::V4(old.real), Change::Mapped(false));
        }
        for new in mapped {
            self.nodes
                .change(IpAddr::V4(new.real), Change::Mapped(true));
        }
        self.mapped = mapped.to_vec();
        for at in 0..self.vifs.len() {
            let fake = self
                .vifs
                .get(at)
                .and_then(|vif| self.fake_of(vif.as_deref()?));
            if let Some(vif) = self.vifs.get_mut(at).and_then(Option::as_deref_mut) {
                vif.fake = fake;
            }
        }
        self.recheck_all();
    }

    /// The fake address of a vif: only its first IPv4 address can have one.
    fn fake_of(&self, vif: &Vif) -> Option<Fake> {
        let real = vif.addresses4.first()?;
        let mapped = self.mapped.iter().find(|own| own.real.to_bits() == real)?;
        (mapped.visible != mapped.real).then_some(Fake {
            real,
            visible: mapped.visible.to_bits(),
            gateway: mapped.visible_gateway.to_bits(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{Address as _, V4};
    use crate::config::DEFAULT_MTU;

    fn client(id: u16, domid: u16, addresses: &[&str]) -> ClientConfig {
        ClientConfig {
            id: ClientId(id),
            domid,
            mac: [0, 0x16, 0x3e, 0x5e, 0x6c, 0],
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            mtu: DEFAULT_MTU,
        }
    }

    fn v4(text: &str) -> V4 {
        V4::from_ip(text.parse().unwrap()).unwrap()
    }

    #[test]
    fn every_address_of_a_vif_counts_in_any_order() {
        let mut registry = Registry::new(4);
        registry
            .attach(client(
                0,
                3,
                &["fd09::a", "10.137.0.10", "10.137.0.12", "fd09::b"],
            ))
            .unwrap();
        let vif = registry.vif(0).unwrap();
        assert!(vif.addresses4.source(v4("10.137.0.10")).is_some());
        assert!(vif.addresses4.source(v4("10.137.0.12")).is_some());
        assert!(vif.addresses4.source(v4("0.0.0.0")).is_none());
        assert_eq!(vif.sources().count(), 4);
        assert!(V4::node(&registry, v4("10.137.0.12")).attached);
    }

    #[test]
    fn shared_address_stays_guarded_until_its_last_vif_is_gone() {
        let mut registry = Registry::new(4);
        registry.attach(client(0, 3, &["10.137.0.10"])).unwrap();
        registry.attach(client(1, 9, &["10.137.0.10"])).unwrap();
        let source = registry
            .vif(0)
            .unwrap()
            .addresses4
            .source(v4("10.137.0.10"))
            .unwrap();
        assert!(registry.vif(0).unwrap().shared && registry.vif(1).unwrap().shared);
        assert_eq!(registry.source(source).unwrap().vif, 1);
        registry.detach(ClientId(1));
        assert_eq!(registry.source(source).unwrap().vif, 0);
        assert!(!registry.vif(0).unwrap().shared);
        assert!(V4::node(&registry, v4("10.137.0.10")).guarded);
        registry.detach(ClientId(0));
        assert!(!V4::node(&registry, v4("10.137.0.10")).guarded);
    }

    #[test]
    fn rules_outlive_the_vif_and_flows_do_not() {
        let mut registry = Registry::new(4);
        let address = "10.137.0.10".parse().unwrap();
        registry.set_rules(address, Rules::Invalid);
        registry.attach(client(0, 3, &["10.137.0.10"])).unwrap();
        assert!(matches!(registry.source(0).unwrap().rules, Rules::Invalid));
        let before = registry.source(0).unwrap().epoch;
        registry.detach(ClientId(0));
        registry.attach(client(2, 4, &["10.137.0.10"])).unwrap();
        assert!(matches!(registry.source(0).unwrap().rules, Rules::Invalid));
        assert!(registry.source(0).unwrap().birth > before);
    }

    #[test]
    fn numbers_in_use_or_out_of_range_are_refused() {
        let mut registry = Registry::new(1);
        assert_eq!(
            registry.attach(client(1, 3, &[])),
            Err(AttachError::NumberOutOfRange)
        );
        registry.attach(client(0, 3, &[])).unwrap();
        assert_eq!(
            registry.attach(client(0, 3, &[])),
            Err(AttachError::NumberInUse)
        );
        registry.detach(ClientId(0));
        let five = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"];
        assert_eq!(
            registry.attach(client(0, 3, &five)),
            Err(AttachError::TooManyAddresses)
        );
        assert!(registry.attach(client(0, 3, &five[1..])).is_ok());
    }

    #[test]
    fn fake_address_needs_a_different_visible_one() {
        let mut registry = Registry::new(2);
        registry.attach(client(0, 3, &["10.137.0.30"])).unwrap();
        let mapped = |visible: &str| MappedAddress {
            real: "10.137.0.30".parse().unwrap(),
            visible: visible.parse().unwrap(),
            visible_gateway: "192.168.1.1".parse().unwrap(),
        };
        registry.set_mapped(&[mapped("10.137.0.30")]);
        assert_eq!(registry.vif(0).unwrap().fake, None);
        registry.set_mapped(&[mapped("192.168.1.128")]);
        assert_eq!(
            registry.vif(0).unwrap().fake.unwrap().visible,
            v4("192.168.1.128")
        );
        registry.detach(ClientId(0));
        assert!(V4::node(&registry, v4("10.137.0.30")).guarded);
    }
}
