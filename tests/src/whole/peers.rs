//! A netvm and clients that connect through xenstore, as drivers do.

use etherparse::PacketBuilder;
use netback::VifTag;
use netfront::UplinkKeys;
use xen::fake::FakeMachine;
use xen::{DomId, GrantRef, PortNumber};
use xenstore::fake::{FakeBackend, FakeFrontend, FakeStore, Toolstack, VifConfig};

use super::VM;
use crate::client::{Client, Received};
use crate::netvm::{Netvm, Taken};

/// The MAC address of every backend's side.
pub const BACKEND_MAC: [u8; 6] = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];

/// Bytes of a MAC address in text.
#[must_use]
pub fn mac_of(text: &str) -> [u8; 6] {
    let mut bytes = [0; 6];
    for (byte, part) in bytes.iter_mut().zip(text.split(':')) {
        *byte = u8::from_str_radix(part, 16).unwrap();
    }
    bytes
}

/// A UDP datagram in an Ethernet frame.
#[must_use]
pub fn datagram(
    macs: ([u8; 6], [u8; 6]),
    source: ([u8; 4], u16),
    destination: ([u8; 4], u16),
    payload: &[u8],
) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(macs.0, macs.1)
        .ipv4(source.0, destination.0, 64)
        .udp(source.1, destination.1);
    let mut frame = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut frame, payload).unwrap();
    frame
}

/// Address and port.
pub type Place = ([u8; 4], u16);

/// Source and destination of a UDP datagram in a frame, and its payload; `None` if it is something else.
#[must_use]
pub fn parts(frame: &[u8]) -> Option<(Place, Place, Vec<u8>)> {
    let packet = etherparse::SlicedPacket::from_ethernet(frame).ok()?;
    let etherparse::NetSlice::Ipv4(ip) = packet.net? else {
        return None;
    };
    let etherparse::TransportSlice::Udp(udp) = packet.transport? else {
        return None;
    };
    let header = ip.header();
    Some((
        (header.source(), udp.source_port()),
        (header.destination(), udp.destination_port()),
        udp.payload().to_vec(),
    ))
}

/// The uplink's other end: a netvm that serves the VM's vif.
pub struct NetvmSide {
    /// The device.
    pub vif: VifConfig,
    store: FakeStore,
    backend: FakeBackend,
    rings: Option<Netvm>,
    taken: Vec<Taken>,
    leaving: bool,
    /// Takes nothing and answers nothing, as a netvm that hangs.
    pub stalled: bool,
}

impl NetvmSide {
    /// Attaches the VM to the netvm `id`; it offers the device at once.
    #[must_use]
    pub fn attach(store: &FakeStore, id: DomId) -> Self {
        let mut vif = VifConfig::new(id, VM, 0);
        vif.mac = "00:16:3e:5e:6c:00".into();
        vif.ip = Some("10.137.0.5".into());
        Toolstack::new(store.clone()).attach(&vif);
        let backend = FakeBackend::new(store.clone(), vif.clone());
        backend.offer();
        Self {
            vif,
            store: store.clone(),
            backend,
            rings: None,
            taken: Vec::new(),
            leaving: false,
            stalled: false,
        }
    }

    /// Asks for the end, as dom0 does: state 5 on the netvm's side.
    pub fn leave(&mut self) {
        self.leaving = true;
        self.backend.set_state(5);
    }

    /// Whether the device is gone; removes its last nodes.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        let state = self.backend.frontend("state");
        let over = self.leaving && self.rings.is_none() && state.as_deref() == Some("6");
        if over {
            Toolstack::new(self.store.clone()).finish_detach(&self.vif);
        }
        over
    }

    /// Whether both sides are connected.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.rings.is_some()
    }

    fn number(&self, key: &str) -> u32 {
        self.backend.frontend(key).unwrap().parse().unwrap()
    }

    /// Connects and disconnects as the VM does, and takes its frames.
    pub fn poll(&mut self, machine: &FakeMachine) {
        if self.stalled {
            return;
        }
        let state = self.backend.frontend("state").unwrap_or_default();
        match (state.as_str(), &mut self.rings) {
            ("4", None) if !self.leaving => {
                let keys = UplinkKeys {
                    tx_ring_ref: GrantRef(self.number("tx-ring-ref")),
                    rx_ring_ref: GrantRef(self.number("rx-ring-ref")),
                    event_channel: PortNumber(self.number("event-channel")),
                };
                self.rings = Some(Netvm::connect(machine, self.vif.backend, VM, keys));
                self.backend.set_state(4);
            }
            ("4", Some(rings)) => {
                let notified = rings.was_notified();
                if notified {
                    self.taken.extend(rings.take());
                    rings.answer_all();
                }
            }
            ("5" | "6", _) => {
                if let Some(rings) = self.rings.take() {
                    rings.close();
                    self.backend.set_state(6);
                }
            }
            _ => {}
        }
    }

    /// Looks at the rings again after [`NetvmSide::stalled`].
    pub fn wake(&mut self) {
        if let Some(rings) = &mut self.rings {
            self.taken.extend(rings.take());
            rings.answer_all();
        }
    }

    /// Frames that the VM sent so far.
    pub fn take(&mut self) -> Vec<Taken> {
        std::mem::take(&mut self.taken)
    }

    /// Sends a frame to the VM.
    pub fn deliver(&mut self, frame: &[u8]) {
        self.rings.as_mut().expect("no uplink").deliver(frame);
    }
}

/// A client qube.
pub struct ClientSide {
    /// The device.
    pub vif: VifConfig,
    store: FakeStore,
    frontend: FakeFrontend,
    rings: Option<Client>,
    received: Vec<Received>,
    leaving: bool,
    /// Does nothing at all, as a frontend without a driver.
    pub idle: bool,
}

impl ClientSide {
    /// Attaches the client `id` with this address; it connects as soon as the VM offers the device.
    #[must_use]
    pub fn attach(store: &FakeStore, id: DomId, handle: u16, address: &str) -> Self {
        let mut vif = VifConfig::new(VM, id, handle);
        vif.ip = Some(address.into());
        Toolstack::new(store.clone()).attach(&vif);
        let frontend = FakeFrontend::new(store.clone(), vif.clone());
        Self {
            vif,
            store: store.clone(),
            frontend,
            rings: None,
            received: Vec::new(),
            leaving: false,
            idle: false,
        }
    }

    /// Asks the VM to give the device up, as dom0 does.
    pub fn leave(&mut self) {
        self.leaving = true;
        Toolstack::new(self.store.clone()).request_detach(&self.vif);
    }

    /// Closes the device from the frontend's side, which stays attached.
    pub fn close(&mut self) {
        self.frontend.set_state(5);
    }

    /// Whether the VM has removed its folder; removes the last nodes.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        let over =
            self.leaving && self.rings.is_none() && !self.store.exists(&self.vif.backend_folder());
        if over {
            Toolstack::new(self.store.clone()).finish_detach(&self.vif);
        }
        over
    }

    /// Whether both sides are connected.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.rings.is_some() && self.frontend.backend_state().as_deref() == Some("4")
    }

    /// The state of the VM's side.
    #[must_use]
    pub fn backend_state(&self) -> Option<String> {
        self.frontend.backend_state()
    }

    /// Connects and disconnects as the VM does, and takes its frames.
    pub fn poll(&mut self, machine: &FakeMachine) {
        if self.idle {
            return;
        }
        let state = self.frontend.backend_state().unwrap_or_default();
        match (state.as_str(), &mut self.rings) {
            ("2", None) if !self.leaving => {
                let client = Client::new(machine, self.vif.frontend, VM);
                let parameters = client.parameters(VifTag(0));
                self.frontend.publish();
                for (key, value) in [
                    ("tx-ring-ref", parameters.tx_ref.0),
                    ("rx-ring-ref", parameters.rx_ref.0),
                    ("event-channel", parameters.event_channel.0),
                ] {
                    self.frontend.write(key, &value.to_string());
                }
                self.frontend.set_state(4);
                self.rings = Some(client);
            }
            ("4", Some(rings)) => {
                if rings.posted() == 0 {
                    rings.post(8);
                }
                if rings.was_notified() {
                    rings.reap();
                    self.received.extend(rings.receive());
                }
            }
            ("5", Some(_)) => self.frontend.set_state(6),
            ("6" | "", _) => {
                if let Some(rings) = self.rings.take() {
                    rings.close();
                }
                if self.frontend.write("state", "6") && !self.leaving {
                    self.frontend.set_state(1);
                }
            }
            _ => {}
        }
    }

    /// The rings, to misuse them.
    pub fn rings(&mut self) -> &mut Client {
        self.rings.as_mut().expect("no vif")
    }

    /// Frames received so far.
    pub fn take(&mut self) -> Vec<Received> {
        std::mem::take(&mut self.received)
    }

    /// Sends a UDP datagram.
    pub fn send(&mut self, port: u16, destination: ([u8; 4], u16), payload: &[u8]) {
        let source: std::net::Ipv4Addr = self.vif.ip.as_ref().unwrap().parse().unwrap();
        let macs = (mac_of(&self.vif.mac), BACKEND_MAC);
        let frame = datagram(macs, (source.octets(), port), destination, payload);
        self.rings.as_mut().expect("no vif").transmit(&frame);
    }
}
