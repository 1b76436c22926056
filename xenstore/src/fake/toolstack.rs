//! What dom0's toolstack and the peers of our devices do to the store, step by step.
//!
//! Source: the sequences that `xl` and Linux were seen to write.

use xen::DomId;

use super::{Access, FakeStore};

/// One vif between two domains.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VifConfig {
    /// The domain whose device it is.
    pub frontend: DomId,
    /// The domain that serves it.
    pub backend: DomId,
    /// The device's number.
    pub handle: u16,
    /// The device's MAC address.
    pub mac: String,
    /// The device's addresses, if any are configured.
    pub ip: Option<String>,
}

impl VifConfig {
    /// A vif with an address and a MAC made from its client's domain id.
    #[must_use]
    pub fn new(backend: DomId, frontend: DomId, handle: u16) -> Self {
        Self {
            frontend,
            backend,
            handle,
            mac: format!(
                "00:16:3e:5e:{:02x}:{:02x}",
                frontend.0 >> 8,
                frontend.0 & 0xFF
            ),
            ip: Some(format!("10.137.{}.{}", frontend.0 >> 8, frontend.0 & 0xFF)),
        }
    }

    /// The frontend's folder.
    #[must_use]
    pub fn frontend_folder(&self) -> String {
        format!("/local/domain/{}/device/vif/{}", self.frontend, self.handle)
    }

    /// The backend's folder.
    #[must_use]
    pub fn backend_folder(&self) -> String {
        format!(
            "/local/domain/{}/backend/vif/{}/{}",
            self.backend, self.frontend, self.handle
        )
    }
}

/// dom0's toolstack.
#[derive(Clone)]
pub struct Toolstack {
    store: FakeStore,
}

impl Toolstack {
    /// The toolstack of this store.
    #[must_use]
    pub const fn new(store: FakeStore) -> Self {
        Self { store }
    }

    /// Writes both folders at once, with state 1 on both sides.
    pub fn attach(&self, vif: &VifConfig) {
        let store = &self.store;
        let (front, back) = (vif.frontend_folder(), vif.backend_folder());
        store.atomically(|store| {
            // dom0 makes the parents of the backend's folder, readable for the backend.
            let parents = format!("/local/domain/{}/backend", vif.backend);
            for parent in [
                parents.clone(),
                format!("{parents}/vif"),
                format!("{parents}/vif/{}", vif.frontend),
            ] {
                if !store.exists(&parent) {
                    store.create(
                        &parent,
                        "",
                        DomId::DOM0,
                        &[(vif.backend, Access::Read)],
                        Access::None,
                    );
                }
            }
            let readers = [(vif.backend, Access::Read)];
            store.create(&front, "", vif.frontend, &readers, Access::None);
            let values = [
                ("backend", back.clone()),
                ("backend-id", vif.backend.to_string()),
                ("state", "1".to_owned()),
                ("handle", vif.handle.to_string()),
                ("mac", vif.mac.clone()),
                ("trusted", "1".to_owned()),
            ];
            for (key, value) in values {
                store.create(
                    &format!("{front}/{key}"),
                    &value,
                    vif.frontend,
                    &readers,
                    Access::None,
                );
            }
            store.create(
                &format!("{front}/mtu"),
                "1500",
                vif.backend,
                &[(vif.frontend, Access::Read)],
                Access::None,
            );
            let readers = [(vif.frontend, Access::Read)];
            store.create(&back, "", vif.backend, &readers, Access::None);
            let values = [
                ("frontend", Some(front.clone())),
                ("frontend-id", Some(vif.frontend.to_string())),
                ("online", Some("1".to_owned())),
                ("state", Some("1".to_owned())),
                (
                    "script",
                    Some("/etc/xen/scripts/vif-route-qubes".to_owned()),
                ),
                ("mac", Some(vif.mac.clone())),
                ("ip", vif.ip.clone()),
                ("bridge", Some("xenbr0".to_owned())),
                ("handle", Some(vif.handle.to_string())),
                ("type", Some("vif".to_owned())),
                ("hotplug-status", Some(String::new())),
            ];
            for (key, value) in values {
                if let Some(value) = value {
                    store.create(
                        &format!("{back}/{key}"),
                        &value,
                        vif.backend,
                        &readers,
                        Access::None,
                    );
                }
            }
        });
    }

    /// Asks the backend to give the device up.
    pub fn request_detach(&self, vif: &VifConfig) {
        let back = vif.backend_folder();
        self.store.atomically(|store| {
            store.write(&format!("{back}/online"), "0");
            if store.read(&format!("{back}/state")).as_deref() != Some("6") {
                store.write(&format!("{back}/state"), "5");
            }
        });
    }

    /// Removes what is left: the frontend's folder, and every parent that is empty.
    pub fn finish_detach(&self, vif: &VifConfig) {
        let store = &self.store;
        store.atomically(|store| {
            store.remove(&vif.frontend_folder());
            store.remove(&vif.backend_folder());
            let backend = format!("/local/domain/{}/backend", vif.backend);
            let parents = [
                format!("{backend}/vif/{}", vif.frontend),
                format!("{backend}/vif"),
                backend,
                format!("/local/domain/{}/device/vif", vif.frontend),
            ];
            for parent in parents {
                if store.exists(&parent) && store.list(&parent).is_empty() {
                    store.remove(&parent);
                }
            }
        });
    }

    /// The first part of destroying the frontend's domain: its folder goes before the backend is asked.
    pub fn destroy_frontend(&self, vif: &VifConfig) {
        self.store.remove(&vif.frontend_folder());
        self.request_detach(vif);
    }
}

/// A client's netfront, as far as the store sees it.
#[derive(Clone)]
pub struct FakeFrontend {
    store: FakeStore,
    vif: VifConfig,
}

impl FakeFrontend {
    /// The frontend of this vif.
    #[must_use]
    pub const fn new(store: FakeStore, vif: VifConfig) -> Self {
        Self { store, vif }
    }

    /// Writes a key into its own folder; whether that was allowed.
    pub fn write(&self, key: &str, value: &str) -> bool {
        let path = format!("{}/{key}", self.vif.frontend_folder());
        self.store
            .write_as(self.vif.frontend, &path, value.as_bytes())
    }

    /// Removes a key.
    pub fn remove(&self, key: &str) {
        self.store.remove_as(
            self.vif.frontend,
            &format!("{}/{key}", self.vif.frontend_folder()),
        );
    }

    /// Writes its state.
    pub fn set_state(&self, state: u8) {
        self.write("state", &state.to_string());
    }

    /// The backend's state as it reads it.
    #[must_use]
    pub fn backend_state(&self) -> Option<String> {
        self.store
            .read(&format!("{}/state", self.vif.backend_folder()))
    }

    /// Writes what Linux writes before it connects.
    pub fn publish(&self) {
        self.store.atomically(|_| {
            for (key, value) in [
                ("tx-ring-ref", "8"),
                ("rx-ring-ref", "9"),
                ("event-channel", "17"),
                ("request-rx-copy", "1"),
                ("feature-rx-notify", "1"),
                ("feature-sg", "1"),
                ("feature-gso-tcpv4", "1"),
                ("feature-gso-tcpv6", "1"),
                ("feature-ipv6-csum-offload", "1"),
            ] {
                self.write(key, value);
            }
        });
    }

    /// Publishes its keys and goes to state 4.
    pub fn connect(&self) {
        self.publish();
        self.set_state(4);
    }
}

/// The netvm's netback, as far as the store sees it.
#[derive(Clone)]
pub struct FakeBackend {
    store: FakeStore,
    vif: VifConfig,
}

impl FakeBackend {
    /// The backend of this vif.
    #[must_use]
    pub const fn new(store: FakeStore, vif: VifConfig) -> Self {
        Self { store, vif }
    }

    /// Writes a key into its own folder.
    pub fn write(&self, key: &str, value: &str) {
        let path = format!("{}/{key}", self.vif.backend_folder());
        self.store
            .write_as(self.vif.backend, &path, value.as_bytes());
    }

    /// Writes its state.
    pub fn set_state(&self, state: u8) {
        self.write("state", &state.to_string());
    }

    /// Writes what Linux offers, and state 2.
    pub fn offer(&self) {
        for (key, value) in [
            ("feature-sg", "1"),
            ("feature-gso-tcpv4", "1"),
            ("feature-gso-tcpv6", "1"),
            ("feature-ipv6-csum-offload", "1"),
            ("feature-rx-copy", "1"),
            ("feature-rx-flip", "0"),
            ("feature-split-event-channels", "1"),
            ("multi-queue-max-queues", "2"),
        ] {
            self.write(key, value);
        }
        self.set_state(2);
    }

    /// A key of the frontend's folder as it reads it.
    #[must_use]
    pub fn frontend(&self, key: &str) -> Option<String> {
        self.store
            .read(&format!("{}/{key}", self.vif.frontend_folder()))
    }
}
