//! A kernel for tests: drives a control plane over the fake store, answers its events, and checks at every step that
//! the promises of the interface hold.
#![allow(dead_code, reason = "each test file uses its own part of the kit")]

use std::collections::BTreeMap;
use std::time::Duration;

use xen::{DomId, GrantRef, PortNumber, Time};
use xenstore::fake::{FakeLink, FakeStore, Toolstack, VifConfig};
use xenstore::{
    BackendEvent, ConfigEvent, ControlEvent, ControlPlane, Event, Options, UplinkEvent,
    UplinkRings, VifId, VifParameters,
};

/// The domain under test.
pub(crate) const SELF: DomId = DomId(5);
/// The domain behind the uplink.
pub(crate) const NETVM: DomId = DomId(2);

/// How the kernel answers a request to connect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Answer {
    /// It works.
    Yes,
    /// It does not.
    No,
    /// The test answers later.
    Later,
}

pub(crate) struct Bench {
    pub(crate) store: FakeStore,
    pub(crate) toolstack: Toolstack,
    pub(crate) link: FakeLink,
    pub(crate) plane: ControlPlane,
    pub(crate) now: Time,
    /// How vifs are answered, and the uplink.
    pub(crate) vif_answer: Answer,
    pub(crate) uplink_answer: Answer,
    /// Vifs whose rings are mapped, with what they were connected with.
    pub(crate) mapped: BTreeMap<VifId, VifParameters>,
    /// Vifs that wait for the test's answer.
    pub(crate) asked: BTreeMap<VifId, VifParameters>,
    pub(crate) connects: u64,
    pub(crate) disconnects: u64,
    /// Whether the uplink has rings.
    pub(crate) uplink_rings: bool,
    pub(crate) carrier: bool,
    pub(crate) prepares: u64,
    pub(crate) uplink_events: Vec<UplinkEvent>,
    pub(crate) control: Vec<ControlEvent>,
    pub(crate) config: Vec<ConfigEvent>,
}

impl Bench {
    /// A domain that serves vifs and nothing else.
    pub(crate) fn backend() -> Self {
        Self::new(Options {
            uplink: false,
            control: false,
            config: None,
            ..Options::default()
        })
    }

    /// A domain that has an uplink and nothing else.
    pub(crate) fn uplink() -> Self {
        Self::new(Options {
            backend: false,
            control: false,
            config: None,
            ..Options::default()
        })
    }

    pub(crate) fn new(options: Options) -> Self {
        let store = FakeStore::new();
        store.introduce(SELF);
        store.introduce(NETVM);
        let link = store.connect(SELF);
        Self {
            toolstack: Toolstack::new(store.clone()),
            link,
            store,
            plane: ControlPlane::new(options),
            now: Time(1_000_000_000),
            vif_answer: Answer::Yes,
            uplink_answer: Answer::Yes,
            mapped: BTreeMap::new(),
            asked: BTreeMap::new(),
            connects: 0,
            disconnects: 0,
            uplink_rings: false,
            carrier: false,
            prepares: 0,
            uplink_events: Vec::new(),
            control: Vec::new(),
            config: Vec::new(),
        }
    }

    /// Runs until nothing moves any more, without time passing.
    pub(crate) fn settle(&mut self) {
        for _ in 0..200_000 {
            let moved = self.plane.poll(&mut self.link, self.now).unwrap();
            let mut any = moved.any();
            while let Some(event) = self.plane.next_event() {
                any = true;
                self.obey(event);
            }
            let pending = self.store.undelivered(SELF) > 0;
            let due = self
                .plane
                .deadline()
                .is_some_and(|deadline| deadline <= self.now);
            if !any && !pending && !due {
                return;
            }
        }
        panic!("does not settle");
    }

    /// Lets time pass, visiting every deadline on the way.
    pub(crate) fn pass(&mut self, duration: Duration) {
        let end = self.now.plus(duration);
        self.settle();
        while self.now < end {
            let next = self.plane.deadline().unwrap_or(end).min(end);
            self.now = next.max(Time(self.now.0 + 1));
            self.settle();
        }
    }

    pub(crate) fn pass_millis(&mut self, millis: u64) {
        self.pass(Duration::from_millis(millis));
    }

    pub(crate) fn obey(&mut self, event: Event) {
        match event {
            Event::Backend(BackendEvent::Connect { device, parameters }) => {
                assert!(
                    !self.mapped.contains_key(&device),
                    "{device} connected twice"
                );
                self.connects += 1;
                match self.vif_answer {
                    Answer::Yes => {
                        self.mapped.insert(device, parameters);
                        self.plane.connected(device);
                    }
                    Answer::No => self.plane.connect_failed(device, "the test says no"),
                    Answer::Later => {
                        self.asked.insert(device, parameters);
                    }
                }
            }
            Event::Backend(BackendEvent::Disconnect { device }) => {
                assert!(
                    self.mapped.remove(&device).is_some(),
                    "{device} disconnected without rings"
                );
                self.disconnects += 1;
            }
            Event::Uplink(event) => {
                self.uplink_events.push(event);
                match event {
                    UplinkEvent::Prepare(_) => {
                        assert!(!self.uplink_rings, "the uplink has rings already");
                        self.prepares += 1;
                        match self.uplink_answer {
                            Answer::Yes => {
                                self.uplink_rings = true;
                                self.plane.uplink_prepared(rings());
                            }
                            Answer::No => self.plane.uplink_failed("the test says no"),
                            Answer::Later => {}
                        }
                    }
                    UplinkEvent::Carrier(up) => {
                        assert!(self.uplink_rings && up && !self.carrier);
                        self.carrier = true;
                    }
                    UplinkEvent::Disconnect => {
                        assert!(self.uplink_rings, "the uplink has no rings");
                        self.uplink_rings = false;
                        self.carrier = false;
                    }
                }
            }
            Event::Control(event) => self.control.push(event),
            Event::Config(event) => self.config.push(event),
        }
    }

    /// Answers the oldest vif that waits.
    pub(crate) fn answer_late(&mut self) {
        let (device, parameters) = self.asked.pop_first().unwrap();
        self.mapped.insert(device, parameters);
        self.plane.connected(device);
    }

    /// Our own state in a vif's folder.
    pub(crate) fn own_state(&self, vif: &VifConfig) -> Option<String> {
        self.store.read(&format!("{}/state", vif.backend_folder()))
    }

    /// The uplink's own state.
    pub(crate) fn uplink_state(&self) -> Option<String> {
        self.store
            .read(&format!("/local/domain/{SELF}/device/vif/0/state"))
    }

    /// The values that we wrote to this path since the journal was taken last.
    pub(crate) fn own_writes(&self, path: &str) -> Vec<String> {
        let journal = self.store.take_journal();
        journal
            .into_iter()
            .filter(|(domain, written, _)| *domain == SELF && written == path)
            .map(|(.., value)| value)
            .collect()
    }
}

pub(crate) fn rings() -> UplinkRings {
    UplinkRings {
        tx_ring: GrantRef(100),
        rx_ring: GrantRef(101),
        port: PortNumber(30),
    }
}

/// A client's vif served by us.
pub(crate) fn client_vif(client: u16) -> VifConfig {
    VifConfig::new(SELF, DomId(client), 0)
}
