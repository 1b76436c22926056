//! The uplink's task: finds the device, serves it until it is replaced, and finds the next one.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::time::Duration;

use xen::{DomId, Time, error, info, warn};

use super::machine::{Step, View, next_step};
use super::{
    BACK_OFF_FIRST, BACK_OFF_LAST, CLOSE_STEP, SLOW_BACKEND, STABLE, Uplink, UplinkEvent,
    UplinkFeatures, UplinkOffer, UplinkRings,
};
use crate::backend::keys::{belongs_to, feature, index, mac, number};
use crate::control_plane::Event;
use crate::limiter::Bucket;
use crate::state::XenbusState;
use crate::store::{Error, Store, Watch};
use crate::wire::ErrorCode;

/// Where our devices are, relative to our home.
const ROOT: &str = "device/vif";
/// How long to pause after the store refused what must not fail.
const PAUSE: Duration = Duration::from_secs(5);
/// How long to wait for the event that tells a watch to be set.
const FIRST_EVENT: Duration = Duration::from_secs(1);
/// Reactions to the backend's state that are allowed at once, and how often one more.
const REACTION_BURST: u32 = 16;
const REACTION_INTERVAL: Duration = Duration::from_millis(250);
/// Log lines that the uplink may cause at once, and how often one more.
const LOG_BURST: u32 = 16;
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Which device, at which backend. Another backend is another device, whatever the handle.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Device {
    handle: u16,
    backend: DomId,
    /// The backend's folder, absolute.
    folder: String,
}

/// Why a session ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ended {
    /// The device is gone, or another one has taken its place.
    Replaced,
    /// The store does not let us serve it.
    Lost,
}

/// The task of the uplink. Never ends.
pub(crate) async fn run(store: Store, uplink: Rc<Uplink>) {
    let watch = loop {
        match store.watch(ROOT).await {
            Ok(watch) => break watch,
            Err(reason) => error!("uplink: cannot watch {ROOT}: {reason}"),
        }
        store.sleep(PAUSE).await;
    };
    let mut finder = Finder {
        store,
        watch,
        complaint: None,
    };
    loop {
        let (device, state) = finder.find().await;
        info!(
            "uplink: device {} at domain {}",
            device.handle, device.backend
        );
        let session = Session::new(finder.store.clone(), Rc::clone(&uplink), device, state);
        let ended = session.serve(&finder.watch).await;
        uplink.forget();
        // Had the device been removed, the event would be here already.
        if ended == Ended::Lost && !finder.watch.is_dirty() {
            finder.store.sleep(PAUSE).await;
        }
    }
}

struct Finder {
    store: Store,
    /// On all our devices.
    watch: Watch,
    /// What was complained about last, to say it once.
    complaint: Option<String>,
}

impl Finder {
    /// Waits until there is a usable device, and returns it with the state of its frontend node.
    async fn find(&mut self) -> (Device, XenbusState) {
        loop {
            let _ = self.watch.take();
            match first_device(&self.store).await {
                Ok(Some(found)) => {
                    self.complaint = None;
                    return found;
                }
                Ok(None) => self.complaint = None,
                Err(complaint) => {
                    if self.complaint.as_ref() != Some(&complaint) {
                        error!("uplink: {complaint}");
                    }
                    self.complaint = Some(complaint);
                }
            }
            // Also without a change: the store itself may have had trouble.
            let deadline = self
                .complaint
                .as_ref()
                .map(|_| self.store.now().plus(PAUSE));
            let dirty = || self.watch.is_dirty().then_some(());
            self.store.context.until(deadline, dirty).await;
        }
    }
}

/// The device with the lowest handle.
async fn first_device(store: &Store) -> Result<Option<(Device, XenbusState)>, String> {
    let names = match store.list(ROOT).await {
        Ok(names) => names,
        Err(Error::NOT_FOUND) => return Ok(None),
        Err(reason) => return Err(reason.to_string()),
    };
    let Some(handle) = names.iter().filter_map(|name| index(name)).min() else {
        return Ok(None);
    };
    identify(store, handle).await.map(Some)
}

/// Reads which backend a device has, and our own state in it.
async fn identify(store: &Store, handle: u16) -> Result<(Device, XenbusState), String> {
    let read = |key: &str| store.read(&format!("{ROOT}/{handle}/{key}"));
    let (folder, backend, state) = (read("backend"), read("backend-id"), read("state"));
    let (folder, backend, state) = (folder.await, backend.await, state.await);
    let backend = backend
        .ok()
        .and_then(|id| number(&id))
        .and_then(|id| u16::try_from(id).ok())
        .map(DomId)
        .ok_or_else(|| format!("device {handle} has no usable backend-id"))?;
    let folder = folder
        .ok()
        .and_then(|path| String::from_utf8(path).ok())
        .filter(|path| belongs_to(path, backend))
        .ok_or_else(|| format!("device {handle} has no usable backend path"))?;
    let state = state
        .map(|state| XenbusState::parse(&state))
        .unwrap_or_default();
    Ok((
        Device {
            handle,
            backend,
            folder,
        },
        state,
    ))
}

/// One device at one backend.
struct Session {
    store: Store,
    uplink: Rc<Uplink>,
    device: Device,
    own: XenbusState,
    peer: XenbusState,
    /// The kernel has rings for this device.
    attached: bool,
    carrier: bool,
    stale: bool,
    /// On the backend's state.
    watch: Option<Watch>,
    /// When to look again whether the device is the same.
    look_again: Option<Time>,
    /// When to read the backend's state again, which the store could not tell.
    read_again: Option<Time>,
    /// When the backend's time for the current step is over.
    expires: Option<Time>,
    retry_at: Option<Time>,
    back_off: Duration,
    /// When we connected.
    connected_at: Option<Time>,
    slow_logged: bool,
    reactions: Bucket,
    log_lines: Bucket,
}

impl Session {
    fn new(store: Store, uplink: Rc<Uplink>, device: Device, state: XenbusState) -> Self {
        let now = store.now();
        // A predecessor of ours (kexec, soft reset) may have left the device connected: close it first.
        let own = match state {
            XenbusState::Connected | XenbusState::Closing | XenbusState::Closed => state,
            _ => XenbusState::Initialising,
        };
        Self {
            store,
            uplink,
            device,
            own,
            peer: XenbusState::Unknown,
            attached: false,
            carrier: false,
            stale: false,
            watch: None,
            look_again: None,
            read_again: None,
            expires: None,
            retry_at: None,
            back_off: BACK_OFF_FIRST,
            connected_at: None,
            slow_logged: false,
            reactions: Bucket::new(REACTION_BURST, REACTION_INTERVAL, now),
            log_lines: Bucket::new(LOG_BURST, LOG_INTERVAL, now),
        }
    }

    /// Serves the device until it is gone or replaced. The kernel has no rings for it by then.
    async fn serve(mut self, devices: &Watch) -> Ended {
        let path = format!("{}/state", self.device.folder);
        let watch = match self.store.watch(&path).await {
            Ok(watch) => watch,
            Err(reason) => {
                error!("uplink: cannot watch the backend: {reason}");
                return Ended::Lost;
            }
        };
        // Nothing is decided before the backend's state is known; the first event leads to reading it.
        let deadline = self.store.now().plus(FIRST_EVENT);
        self.store
            .context
            .until(Some(deadline), || watch.is_dirty().then_some(()))
            .await;
        self.watch = Some(watch);
        let mut ended = self.inherited().await;
        while ended.is_ok() {
            ended = self.turn(devices).await;
        }
        self.detach().await;
        ended.err().unwrap_or(Ended::Lost)
    }

    /// Leaves a connection that a predecessor had: 5, then the table leads by way of 6 to 1.
    async fn inherited(&mut self) -> Result<(), Ended> {
        self.uplink.note_device(self.device.backend);
        self.uplink.note_own(self.own);
        if self.own == XenbusState::Initialising {
            return Ok(());
        }
        self.say(|| info!("uplink: resetting a device that was used before"));
        self.write_state(XenbusState::Closing).await
    }

    /// Looks, decides, acts or waits: once.
    async fn turn(&mut self, devices: &Watch) -> Result<(), Ended> {
        self.look_at_device(devices).await?;
        self.look_at_peer().await;
        if self.attached
            && let Some(Err(reason)) = self.uplink.answer.take()
        {
            return self.give_up(&reason).await;
        }
        self.note_slowness();
        match next_step(&self.view()) {
            Step::Wait => {
                self.wait(devices).await;
                Ok(())
            }
            Step::Connect => self.connect().await,
            Step::RaiseCarrier => {
                self.carrier = true;
                self.store
                    .context
                    .emit(Event::Uplink(UplinkEvent::Carrier(true)))
                    .await;
                Ok(())
            }
            Step::Close => {
                self.say(|| warn!("uplink: the backend has dropped us"));
                self.close().await
            }
            Step::Finish => self.finish().await,
            Step::Reopen => self.reopen().await,
        }
    }

    fn view(&self) -> View {
        let reached = |time: Option<Time>| time.is_some_and(|time| time <= self.store.now());
        View {
            own: self.own,
            peer: self.peer,
            carrier: self.carrier,
            stale: self.stale,
            may_retry: self.retry_at.is_none() || reached(self.retry_at),
            expired: reached(self.expires),
        }
    }

    /// Checks that the device is still the same one, when anything below our devices changed.
    async fn look_at_device(&mut self, devices: &Watch) -> Result<(), Ended> {
        let again = self.look_again.is_some_and(|time| time <= self.store.now());
        if !devices.is_dirty() && !again {
            return Ok(());
        }
        let _ = devices.take();
        self.look_again = None;
        let (device, state) = match first_device(&self.store).await {
            Ok(Some(found)) => found,
            Ok(None) => return Err(Ended::Replaced),
            Err(_) => {
                // The store's own trouble, or a device that is not complete: no reason to let go of this one yet.
                self.look_again = Some(self.store.now().plus(BACK_OFF_FIRST));
                return Ok(());
            }
        };
        // State 1 while ours is another: the toolstack has made a new device, maybe at the same backend.
        let reset = state == XenbusState::Initialising && self.own != XenbusState::Initialising;
        if device != self.device || reset {
            Err(Ended::Replaced)
        } else {
            Ok(())
        }
    }

    /// Reads the backend's state when it changed, as often as the limit allows.
    async fn look_at_peer(&mut self) {
        let Some(watch) = &self.watch else { return };
        let again = self.read_again.is_some_and(|time| time <= self.store.now());
        if !(watch.is_dirty() || again) || !self.reactions.take(self.store.now()) {
            return;
        }
        let _ = watch.take();
        self.read_again = None;
        let peer = match self
            .store
            .read(&format!("{}/state", self.device.folder))
            .await
        {
            Ok(value) => XenbusState::parse(&value),
            Err(Error::Refused(ErrorCode::NotFound | ErrorCode::AccessDenied)) => {
                XenbusState::Unknown
            }
            Err(_) => {
                // The store's own trouble says nothing about the backend.
                self.read_again = Some(self.store.now().plus(BACK_OFF_FIRST));
                return;
            }
        };
        self.stale &= peer == self.peer;
        self.peer = peer;
        self.uplink.note_peer(peer);
    }

    fn note_slowness(&mut self) {
        let waiting = self.own == XenbusState::Connected && !self.carrier && !self.slow_logged;
        if waiting && self.slow_at().is_some_and(|time| time <= self.store.now()) {
            self.slow_logged = true;
            self.say(|| warn!("uplink: the backend has not connected for 10 s"));
        }
    }

    fn slow_at(&self) -> Option<Time> {
        self.connected_at.map(|since| since.plus(SLOW_BACKEND))
    }

    async fn wait(&mut self, devices: &Watch) {
        let now = self.store.now();
        let next_reaction = self.reactions.next(now);
        let times = [
            self.expires,
            self.retry_at,
            self.slow_at(),
            self.look_again,
            self.read_again,
            Some(next_reaction),
        ];
        let deadline = times.into_iter().flatten().filter(|&time| time > now).min();
        let probe = || {
            let fault = self.attached && self.uplink.answer.borrow().is_some();
            let may_react = next_reaction <= self.store.now();
            let peer = may_react && self.watch.as_ref().is_some_and(Watch::is_dirty);
            (devices.is_dirty() || fault || peer).then_some(())
        };
        self.store.context.until(deadline, probe).await;
    }

    /// Takes the backend's offer.
    async fn connect(&mut self) -> Result<(), Ended> {
        let offer = match self.read_offer().await {
            Ok(offer) => offer,
            Err(reason) => {
                self.say(|| error!("uplink: cannot connect: {reason}"));
                self.delay();
                return self.finish().await;
            }
        };
        self.uplink.answer.take();
        self.uplink.note_attempt();
        self.store
            .context
            .emit(Event::Uplink(UplinkEvent::Prepare(offer)))
            .await;
        let answer = || self.uplink.answer.take();
        match self.store.context.until(None, answer).await {
            Some(Ok(rings)) => {
                self.attached = true;
                self.publish(&rings).await
            }
            Some(Err(reason)) => {
                self.say(|| error!("uplink: cannot connect: {reason}"));
                self.delay();
                Ok(())
            }
            None => Err(Ended::Lost),
        }
    }

    async fn read_offer(&self) -> Result<UplinkOffer, String> {
        let keys = [
            "feature-rx-copy",
            "feature-sg",
            "feature-gso-tcpv4",
            "feature-gso-tcpv6",
            "feature-ipv6-csum-offload",
        ];
        let replies = keys.map(|key| self.store.read(&format!("{}/{key}", self.device.folder)));
        let address = self.store.read(&self.path("mac"));
        let mut features = [false; 5];
        for (present, reply) in features.iter_mut().zip(replies) {
            *present = feature(reply.await.ok().as_deref());
        }
        let [rx_copy, scatter_gather, gso_tcpv4, gso_tcpv6, checksum_ipv6] = features;
        let mac = address
            .await
            .ok()
            .and_then(|text| mac(&text))
            .ok_or("no usable mac")?;
        if !rx_copy {
            return Err("the backend does not offer feature-rx-copy".to_string());
        }
        Ok(UplinkOffer {
            backend: self.device.backend,
            handle: self.device.handle,
            mac,
            features: UplinkFeatures {
                scatter_gather,
                gso_tcpv4,
                gso_tcpv6,
                checksum_ipv6,
            },
        })
    }

    /// Writes our keys and state 4 at once.
    async fn publish(&mut self, rings: &UplinkRings) -> Result<(), Ended> {
        let queues = self
            .store
            .read(&format!("{}/multi-queue-max-queues", self.device.folder))
            .await
            .is_ok();
        let numbers = [
            ("tx-ring-ref", rings.tx_ring.0),
            ("rx-ring-ref", rings.rx_ring.0),
            ("event-channel", rings.port.0),
            ("request-rx-copy", 1),
            ("feature-rx-notify", 1),
            ("feature-sg", 1),
            ("feature-gso-tcpv4", 1),
            ("feature-gso-tcpv6", 1),
            ("feature-ipv6-csum-offload", 1),
        ];
        let queues = queues.then_some(("multi-queue-num-queues", 1));
        let state = ("state", 4);
        let published = self
            .store
            .transaction(async |transaction| {
                let all = numbers.iter().chain(&queues).chain([&state]);
                let writes: Vec<_> = all
                    .map(|(key, value)| {
                        transaction.write(&self.path(key), value.to_string().as_bytes())
                    })
                    .collect();
                for write in writes {
                    write.await?;
                }
                Ok(())
            })
            .await;
        match published {
            Ok(()) => {
                self.enter(XenbusState::Connected);
                self.connected_at = Some(self.store.now());
                self.slow_logged = false;
                self.say(|| info!("uplink: rings published"));
                Ok(())
            }
            Err(reason) => {
                self.say(|| error!("uplink: cannot publish the rings: {reason}"));
                self.detach().await;
                self.delay();
                Ok(())
            }
        }
    }

    /// Leaves a backend that broke the rings.
    async fn give_up(&mut self, reason: &str) -> Result<(), Ended> {
        self.say(|| warn!("uplink: closed: {reason}"));
        self.close().await
    }

    async fn close(&mut self) -> Result<(), Ended> {
        self.detach().await;
        self.delay();
        self.write_state(XenbusState::Closing).await
    }

    async fn finish(&mut self) -> Result<(), Ended> {
        self.detach().await;
        if self.own != XenbusState::Closing {
            self.delay();
        }
        self.write_state(XenbusState::Closed).await
    }

    /// Begins anew, unless the toolstack is about to take the device away.
    async fn reopen(&mut self) -> Result<(), Ended> {
        let online = self
            .store
            .read(&format!("{}/online", self.device.folder))
            .await;
        if online.is_ok_and(|value| value == b"0") {
            self.retry_at = Some(self.store.now().plus(BACK_OFF_FIRST));
            return Ok(());
        }
        self.stale = self.peer == XenbusState::Closed;
        self.retry_at = None;
        self.write_state(XenbusState::Initialising).await
    }

    /// Spaces attempts out: the pause doubles, and is short again after a connection that lasted.
    fn delay(&mut self) {
        let now = self.store.now();
        if self
            .connected_at
            .take()
            .is_some_and(|since| now.since(since) >= STABLE)
        {
            self.back_off = BACK_OFF_FIRST;
        }
        let retry_at = now.plus(self.back_off);
        if self.retry_at.is_none_or(|earlier| earlier <= now) {
            self.retry_at = Some(retry_at);
            self.back_off = self.back_off.saturating_mul(2).min(BACK_OFF_LAST);
        }
    }

    /// Lets the kernel give up its rings, if it has any.
    async fn detach(&mut self) {
        self.carrier = false;
        if core::mem::take(&mut self.attached) {
            self.store
                .context
                .emit(Event::Uplink(UplinkEvent::Disconnect))
                .await;
            self.uplink.answer.take();
        }
    }

    async fn write_state(&mut self, state: XenbusState) -> Result<(), Ended> {
        match self
            .store
            .write(&self.path("state"), state.as_text().as_bytes())
            .await
        {
            Ok(()) => {
                self.enter(state);
                Ok(())
            }
            Err(reason) => {
                // A device that is gone cannot be written: its parent belongs to dom0.
                if !matches!(
                    reason,
                    Error::Refused(ErrorCode::NotFound | ErrorCode::AccessDenied)
                ) {
                    self.say(|| error!("uplink: cannot write the state: {reason}"));
                }
                Err(Ended::Lost)
            }
        }
    }

    fn enter(&mut self, state: XenbusState) {
        self.own = state;
        self.expires = (state != XenbusState::Connected).then(|| self.store.now().plus(CLOSE_STEP));
        self.uplink.note_own(state);
    }

    fn path(&self, key: &str) -> String {
        format!("{ROOT}/{}/{key}", self.device.handle)
    }

    /// Logs, unless the uplink has caused too many lines already.
    fn say(&mut self, line: impl FnOnce()) {
        if self.log_lines.take(self.store.now()) {
            line();
        }
    }
}
