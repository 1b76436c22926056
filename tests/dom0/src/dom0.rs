//! Both daemons of one VM, and what qubesd does through them.

use std::fmt;

use qubes::vchan::Channels;
use xen::DomId;
use xen::stream::ByteStream;

use crate::qrexec::{self, Failure, Greeting};
use crate::qubesdb::{self, Death};

/// The VM has failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fatal {
    /// On QubesDB.
    QubesDb(Death),
    /// On qrexec.
    Qrexec(Failure),
}

impl fmt::Display for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::QubesDb(death) => death.fmt(f),
            Self::Qrexec(failure) => failure.fmt(f),
        }
    }
}

/// The rules of one client address: number and text, in the order of the user's list.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rules {
    /// The client's real address, as text.
    pub address: String,
    /// Number and text; numbers may have gaps.
    pub rules: Vec<(u32, String)>,
}

/// dom0 as one VM sees it. `C` is the channel type.
#[derive(Debug)]
pub struct Dom0<C> {
    /// The QubesDB daemon.
    pub qubesdb: qubesdb::Daemon<C>,
    /// The qrexec daemon.
    pub qrexec: qrexec::Daemon<C>,
    /// The keys outside of rules that were written through [`Dom0::key`], in order.
    keys: Vec<(String, String)>,
    trees: Vec<Rules>,
}

impl<C: ByteStream> Dom0<C> {
    /// dom0 for `vm`, with empty databases.
    #[must_use]
    pub fn new(vm: DomId, greeting: Greeting) -> Self {
        Self {
            qubesdb: qubesdb::Daemon::new(vm),
            qrexec: qrexec::Daemon::new(vm, greeting),
            keys: Vec::new(),
            trees: Vec::new(),
        }
    }

    /// Moves both daemons on. QubesDB first, as it must not wait.
    ///
    /// # Errors
    ///
    /// [`Fatal`]: the VM has failed.
    pub fn poll<N: Channels<Channel = C>>(&mut self, channels: &mut N) -> Result<(), Fatal> {
        self.qubesdb.poll(channels).map_err(Fatal::QubesDb)?;
        self.qrexec.poll(channels).map_err(Fatal::Qrexec)
    }

    /// All channels, to wait for them.
    pub fn channels(&self) -> impl Iterator<Item = &C> {
        self.qubesdb
            .channel()
            .into_iter()
            .chain(self.qrexec.channels())
    }

    /// Writes a key.
    pub fn key(&mut self, path: &str, value: &str) {
        self.qubesdb.write(path, value.as_bytes());
        match self.keys.iter_mut().find(|(known, _)| known == path) {
            Some((_, known)) => *known = value.into(),
            None => self.keys.push((path.into(), value.into())),
        }
    }

    /// Writes the keys of a VM that has a netvm and provides network.
    pub fn network(&mut self, name: &str, own: &str, gateway: &str, mac: &str) {
        for (path, value) in [
            ("/name", name),
            ("/type", "StandaloneVM"),
            ("/qubes-vm-type", "ProxyVM"),
            ("/default-user", "user"),
            ("/qubes-vm-updateable", "True"),
            ("/qubes-vm-persistence", "full"),
            ("/qubes-base-template", ""),
            ("/qubes-debug-mode", "0"),
            ("/qubes-timezone", "Europe/Warsaw"),
            ("/qubes-netvm-network", own),
            ("/qubes-netvm-gateway", own),
            ("/qubes-netvm-netmask", "255.255.255.255"),
            ("/qubes-netvm-primary-dns", "10.139.1.1"),
            ("/qubes-netvm-secondary-dns", "10.139.1.2"),
            ("/qubes-mac", mac),
            ("/qubes-ip", own),
            ("/qubes-netmask", "255.255.255.255"),
            ("/qubes-gateway", gateway),
            ("/qubes-primary-dns", "10.139.1.1"),
            ("/qubes-secondary-dns", "10.139.1.2"),
            ("/qubes-block-devices", ""),
            ("/qubes-usb-devices", ""),
            ("/qubes-iptables-error", ""),
            ("/qubes-service/meminfo-writer", "0"),
        ] {
            self.key(path, value);
        }
        self.key("/qubes-random-seed", &"c2VlZA".repeat(14));
    }

    /// Writes what a client's start writes before its rules.
    pub fn client(&mut self, address: &str, gateway: &str) {
        let connected = match self.qubesdb.get("/connected-ips") {
            Some(others) if !others.is_empty() => {
                format!("{} {address}", String::from_utf8_lossy(others))
            }
            _ => address.into(),
        };
        self.key("/connected-ips", &connected);
        self.key("/connected-ips6", "");
        self.key(&format!("/mapped-ip/{address}/visible-ip"), address);
        self.key(&format!("/mapped-ip/{address}/visible-gateway"), gateway);
    }

    /// Rewrites a client's rules: removal of the old ones, policy, rules, commit.
    pub fn rules(&mut self, rules: Rules) {
        self.write_rules(&rules);
        match self
            .trees
            .iter_mut()
            .find(|known| known.address == rules.address)
        {
            Some(known) => *known = rules,
            None => self.trees.push(rules),
        }
    }

    /// Rewrites every key one by one, identical or not, as a change of the netvm does. Rules are absent in between.
    pub fn rewrite(&mut self) {
        for (path, value) in self.keys.clone() {
            self.qubesdb.write(&path, value.as_bytes());
        }
        for rules in self.trees.clone() {
            self.write_rules(&rules);
        }
    }

    fn write_rules(&mut self, rules: &Rules) {
        let base = format!("/qubes-firewall/{}", rules.address);
        self.qubesdb.remove(&format!("{base}/"));
        self.qubesdb.write(&format!("{base}/policy"), b"drop");
        for (number, text) in &rules.rules {
            self.qubesdb
                .write(&format!("{base}/{number:04}"), text.as_bytes());
        }
        self.qubesdb.write(&base, b"");
    }
}
