//! Obeys the xenbus handshakes: connects and disconnects the drivers, and tells the engine who is there.
//!
//! Each client vif gets the lowest free number; the engine, the data path and the views know it by that. A number is
//! free again as soon as its vif is disconnected; the tag of each connection is new, so that nothing of an old one
//! is taken for the new one's.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::net::IpAddr;

use firewall::{ClientConfig, ClientId, Engine};
use litemap::LiteMap;
use netback::{ConnectParameters, FrontendFeatures, Vif};
use netfront::{BackendFeatures, Uplink, UplinkParameters};
use xen::{DomId, Hypervisor};
use xenstore::{
    BackendEvent, ControlPlane, UplinkEvent, UplinkOffer, UplinkRings, VifFeatures, VifId,
    VifParameters,
};

use crate::data_path::{DataPath, Fault, tag};

/// MTU of every link, in bytes of IP packet.
const MTU: u16 = firewall::config::DEFAULT_MTU;

/// A client whose vif is connected.
#[derive(Clone, Debug)]
pub struct Connected {
    /// Its number.
    pub id: ClientId,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// What changed for the settings' sake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// Nothing that matters to the engine's addresses.
    None,
    /// There is another uplink, or none any more.
    Uplink,
}

/// The connected devices.
#[derive(Debug, Default)]
pub struct Devices {
    clients: LiteMap<VifId, Connected>,
    uplink: Option<UplinkOffer>,
    connections: u16,
    /// Receive buffers to post towards the uplink.
    rx_buffers: u32,
}

impl Devices {
    /// No devices; the uplink will get `rx_buffers` receive buffers.
    #[must_use]
    pub fn new(rx_buffers: u32) -> Self {
        Self {
            rx_buffers,
            ..Self::default()
        }
    }

    /// The uplink that is connected.
    #[must_use]
    pub const fn uplink(&self) -> Option<&UplinkOffer> {
        self.uplink.as_ref()
    }

    /// The connected client behind a device.
    #[must_use]
    pub fn client(&self, device: &VifId) -> Option<&Connected> {
        self.clients.get(device)
    }

    /// The lowest number that no client has.
    fn free_id(&self, engine: &Engine) -> Option<ClientId> {
        (0..engine.limits().clients)
            .map(ClientId)
            .find(|id| self.clients.values().all(|client| client.id != *id))
    }

    /// Obeys an event of a client vif.
    pub fn backend<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        data: &mut DataPath,
        control: &mut ControlPlane,
        event: BackendEvent,
    ) {
        match event {
            BackendEvent::Connect { device, parameters } => {
                match self.connect(hv, data, device, &parameters) {
                    Ok(()) => {
                        control.connected(device);
                        xen::info!("{device}: connected, {}", List(&parameters.addresses));
                    }
                    Err(reason) => {
                        xen::warn!("{device}: refused: {reason}");
                        control.connect_failed(device, &reason);
                    }
                }
            }
            BackendEvent::Disconnect { device } => {
                if let Some(client) = self.clients.remove(&device) {
                    data.filter.detach_client(client.id);
                    data.disconnect_client(hv, client.id);
                }
            }
        }
    }

    fn connect<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        data: &mut DataPath,
        device: VifId,
        parameters: &VifParameters,
    ) -> Result<(), String> {
        let id = self
            .free_id(data.filter.engine())
            .ok_or_else(|| String::from("too many clients"))?;
        self.connections = self.connections.wrapping_add(1);
        let vif = Vif::connect(
            hv,
            &ConnectParameters {
                tag: tag(id, self.connections),
                peer: device.client,
                tx_ref: parameters.tx_ring,
                rx_ref: parameters.rx_ring,
                event_channel: parameters.port,
                features: frontend_features(parameters.features),
                mtu: MTU,
            },
        )
        .map_err(|error| error.to_string())?;
        let attached = data.filter.attach_client(ClientConfig {
            id,
            domid: device.client.0,
            mac: parameters.mac,
            addresses: parameters.addresses.clone(),
            mtu: MTU,
        });
        if let Err(error) = attached {
            vif.disconnect(hv);
            return Err(error.to_string());
        }
        data.connect_client(id, vif);
        let client = Connected {
            id,
            mac: parameters.mac,
            addresses: parameters.addresses.clone(),
        };
        self.clients.insert(device, client);
        Ok(())
    }

    /// Obeys an event of the uplink.
    pub fn uplink_event<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        data: &mut DataPath,
        control: &mut ControlPlane,
        event: UplinkEvent,
    ) -> Change {
        match event {
            UplinkEvent::Prepare(offer) => {
                let parameters = UplinkParameters {
                    backend: offer.backend,
                    features: backend_features(&offer),
                    rx_buffers: self.rx_buffers,
                };
                match Uplink::connect(hv, &parameters) {
                    Ok(uplink) => {
                        let keys = uplink.keys();
                        data.connect_uplink(hv, uplink);
                        control.uplink_prepared(UplinkRings {
                            tx_ring: keys.tx_ring_ref,
                            rx_ring: keys.rx_ring_ref,
                            port: keys.event_channel,
                        });
                        self.uplink = Some(offer);
                        Change::Uplink
                    }
                    Err(error) => {
                        xen::warn!("uplink: not connected: {error}");
                        control.uplink_failed(&error.to_string());
                        Change::None
                    }
                }
            }
            UplinkEvent::Carrier(up) => {
                if let (true, Some(offer)) = (up, &self.uplink) {
                    xen::info!("uplink: connected to domain {}", offer.backend);
                }
                Change::None
            }
            UplinkEvent::Disconnect => {
                data.disconnect_uplink(hv);
                self.uplink = None;
                xen::info!("uplink: disconnected");
                Change::Uplink
            }
        }
    }

    /// Gives up peers whose rings can no longer be served. One log line each.
    pub fn report_faults(&self, data: &mut DataPath, control: &mut ControlPlane) {
        while let Some(fault) = data.take_fault() {
            match fault {
                Fault::Client(id, error) => {
                    let broken = self.clients.iter().find(|(_, client)| client.id == id);
                    if let Some((device, _)) = broken {
                        xen::warn!("{device}: given up: {error}");
                        control.broken(*device, &error.to_string());
                    }
                }
                Fault::Uplink(error) => {
                    xen::warn!("uplink: given up: {error}");
                    control.uplink_failed(&error.to_string());
                }
            }
        }
    }

    /// The domain that the uplink leads to.
    #[must_use]
    pub fn uplink_domain(&self) -> Option<DomId> {
        self.uplink.as_ref().map(|offer| offer.backend)
    }
}

fn frontend_features(features: VifFeatures) -> FrontendFeatures {
    FrontendFeatures {
        // The handshake refuses frontends that do not ask for it.
        rx_copy: true,
        rx_notify: features.rx_notify,
        sg: features.scatter_gather,
        gso_tcpv4: features.gso_tcpv4,
        gso_tcpv6: features.gso_tcpv6,
        no_csum_offload: !features.checksum_ipv4,
        ipv6_csum_offload: features.checksum_ipv6,
    }
}

fn backend_features(offer: &UplinkOffer) -> BackendFeatures {
    BackendFeatures {
        // The handshake refuses backends that do not offer it.
        rx_copy: true,
        sg: offer.features.scatter_gather,
        gso_tcpv4: offer.features.gso_tcpv4,
        gso_tcpv6: offer.features.gso_tcpv6,
        ipv6_csum_offload: offer.features.checksum_ipv6,
    }
}

/// Addresses for a log line.
struct List<'a>(&'a [IpAddr]);

impl core::fmt::Display for List<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        if self.0.is_empty() {
            return f.write_str("without an address");
        }
        for (index, address) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { " " };
            write!(f, "{separator}{address}")?;
        }
        Ok(())
    }
}
