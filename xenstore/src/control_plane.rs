//! The one value that the kernel owns: client, executor and all tasks.
//!
//! # How to drive it
//!
//! ```text
//! loop {
//!     let moved = control_plane.poll(&mut ring, now)?;     // an error is final: end the domain as crashed
//!     if moved.any() { notify the store's port }
//!     while let Some(event) = control_plane.next_event() {
//!         obey it, at once
//!         control_plane.connected(device) ...              // answers may also come later
//!     }
//!     ... data path ...
//!     wait until a port is pending or control_plane.deadline() has come
//! }
//! ```
//!
//! Taking an event promises to obey it before the next call of [`ControlPlane::poll`]. A task waits until its
//! event was taken, so that "unmap before the state is written" holds by construction. `poll` is cheap when nothing
//! happened; after answering, call it again in the same iteration.

use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;

use xen::Time;
use xen::stream::ByteStream;

use crate::backend::{BackendEvent, VifId, VifStatus, Vifs};
use crate::client::{Counters, Fatal, Moved};
use crate::config::ConfigEvent;
use crate::control::ControlEvent;
use crate::frontend::{Uplink, UplinkEvent, UplinkRings, UplinkStatus};
use crate::nodes::{NodeAnswer, NodeRequest, Nodes};
use crate::store::Store;
use crate::task::{Context, Tasks};
use crate::{backend, config, control, frontend, nodes};

/// How often [`ControlPlane::poll`] lets tasks and stream take turns before the main loop gets its turn again.
const MAX_EXCHANGES: usize = 16;

/// Something that the kernel must act upon.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// A client vif.
    Backend(BackendEvent),
    /// The uplink.
    Uplink(UplinkEvent),
    /// The domain as a whole.
    Control(ControlEvent),
    /// The settings.
    Config(ConfigEvent),
}

/// Which parts to run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Serve client vifs.
    pub backend: bool,
    /// Run the uplink.
    pub uplink: bool,
    /// Advertise and follow `control/`.
    pub control: bool,
    /// Follow the settings below this path, e.g. `vm-data`.
    pub config: Option<&'static str>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            backend: true,
            uplink: true,
            control: true,
            config: Some("vm-data"),
        }
    }
}

/// The control plane of the domain.
pub struct ControlPlane {
    context: Rc<Context>,
    tasks: Tasks,
    vifs: Rc<Vifs>,
    uplink: Rc<Uplink>,
    nodes: Rc<Nodes>,
    /// The task for [`Nodes`] runs.
    serves_nodes: bool,
}

impl ControlPlane {
    /// A control plane whose tasks start with the first call of [`ControlPlane::poll`].
    #[must_use]
    pub fn new(options: Options) -> Self {
        let context = Context::new();
        let vifs = Rc::new(Vifs::default());
        let uplink = Rc::new(Uplink::default());
        let this = Self {
            context,
            tasks: Tasks::default(),
            vifs,
            uplink,
            nodes: Rc::default(),
            serves_nodes: false,
        };
        this.start(options);
        this
    }

    /// Spawns the fixed tasks.
    fn start(&self, options: Options) {
        let store = self.store();
        // Sent before anything else, so that no watch of ours is swept away by it. Old daemons do not know it.
        drop(store.reset_watches());
        // There is room for all of these: they are the first.
        if options.control {
            let _ = store.spawn(control::run(store.clone()));
        }
        if options.uplink {
            let _ = store.spawn(frontend::run(store.clone(), Rc::clone(&self.uplink)));
        }
        if options.backend {
            let _ = store.spawn(backend::discover(store.clone(), Rc::clone(&self.vifs)));
        }
        if let Some(root) = options.config {
            let _ = store.spawn(config::run(store.clone(), root));
        }
    }

    /// Hands over something to do with a node that is no device's. The first one starts the task for it.
    pub fn submit(&mut self, request: NodeRequest) {
        if !self.serves_nodes {
            let store = self.store();
            let task = nodes::run(store.clone(), Rc::clone(&self.nodes));
            self.serves_nodes = store.spawn(task).is_ok();
        }
        self.nodes.submit(request);
        self.context.wake();
    }

    /// What came of what was submitted, in the order in which it came.
    pub fn next_answer(&mut self) -> Option<NodeAnswer> {
        self.nodes.next_answer()
    }

    /// Moves bytes between us and xenstored and runs the tasks that this, or the time, concerns. Never waits.
    ///
    /// Notify the store's port when any bytes moved. `now` must not go backwards.
    ///
    /// # Errors
    ///
    /// [`Fatal`]: the connection is lost for good, and every later call says so again.
    pub fn poll<S: ByteStream + ?Sized>(
        &mut self,
        stream: &mut S,
        now: Time,
    ) -> Result<Moved, Fatal> {
        self.context.set_now(now);
        let mut total = Moved::default();
        for _ in 0..MAX_EXCHANGES {
            total.add(self.context.client.borrow_mut().pump(stream, now)?);
            if !self.tasks.run(&self.context) {
                return Ok(total);
            }
        }
        // What the tasks asked for last goes out now; what came in makes the deadline "at once".
        total.add(self.context.client.borrow_mut().pump(stream, now)?);
        Ok(total)
    }

    /// The next event. Taking it promises to obey it before the next call of [`ControlPlane::poll`].
    pub fn next_event(&mut self) -> Option<Event> {
        self.context.take_event()
    }

    /// When [`ControlPlane::poll`] must be called even if nothing arrives from the store.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        let silence = self.context.client.borrow().deadline();
        match (silence, self.context.deadline()) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        }
    }

    /// Answers [`BackendEvent::Connect`]: the rings are mapped and the data path runs.
    ///
    /// An answer for a vif that does not wait for one is ignored.
    pub fn connected(&mut self, device: VifId) {
        self.vifs.answer(device, Ok(()));
        self.context.wake();
    }

    /// Answers [`BackendEvent::Connect`]: it did not work, and everything was undone. The vif is closed and
    /// stays so until the frontend starts again.
    pub fn connect_failed(&mut self, device: VifId, reason: &str) {
        self.vifs.answer(device, Err(String::from(reason)));
        self.context.wake();
    }

    /// Reports that a connected vif's rings are unusable. [`BackendEvent::Disconnect`] follows; the vif is closed and
    /// stays so until the frontend starts again.
    pub fn broken(&mut self, device: VifId, reason: &str) {
        self.vifs.report(device, reason);
        self.context.wake();
    }

    /// Answers [`UplinkEvent::Prepare`]: these are the rings.
    pub fn uplink_prepared(&mut self, rings: UplinkRings) {
        self.uplink.answer(Ok(rings));
        self.context.wake();
    }

    /// Answers [`UplinkEvent::Prepare`] with failure, or reports that the rings in use are broken. In the second case
    /// [`UplinkEvent::Disconnect`] follows. Another attempt is made after a pause.
    pub fn uplink_failed(&mut self, reason: &str) {
        self.uplink.answer(Err(String::from(reason)));
        self.context.wake();
    }

    /// How all client vifs stand, in ascending order.
    #[must_use]
    pub fn vifs(&self) -> Vec<VifStatus> {
        self.vifs.status()
    }

    /// How the uplink stands.
    #[must_use]
    pub fn uplink(&self) -> UplinkStatus {
        self.uplink.status()
    }

    /// What the client has done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.context.client.borrow().counters()
    }

    /// Watches held now.
    #[must_use]
    pub fn watch_count(&self) -> usize {
        self.context.client.borrow().watch_count()
    }

    /// A handle to the store, for tasks of the kernel's own.
    #[must_use]
    pub fn store(&self) -> Store {
        Store {
            context: Rc::clone(&self.context),
        }
    }
}
