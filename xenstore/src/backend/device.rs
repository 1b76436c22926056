//! One client vif from discovery to removal.
//!
//! The task reads what changed, asks [`next_step`] what to do, does it, and waits. It ends when our folder is gone;
//! whatever else happens it only ever waits.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::time::Duration;

use xen::{Time, error, info, warn};

use super::keys::{FrontendKeys, Identity, Value};
use super::machine::{Step, View, lifts_ban, next_step};
use super::{
    BackendEvent, CLOSE_DEADLINE, OFFER_HOLD, REACTION_BURST, REACTION_INTERVAL, REMOVAL_HOLD,
    VifCell, VifParameters,
};
use crate::control_plane::Event;
use crate::limiter::Bucket;
use crate::state::XenbusState;
use crate::store::{Error, Store, Watch};
use crate::wire::ErrorCode;

/// What we can do, written before state 2. Values are exactly `0` or `1`: one frontend reads them in base 2.
///
/// No page flipping, split event channels, multiple queues, control ring, multicast filter or XDP headroom: absent
/// means no.
///
/// As few nodes as possible: a domain may own 1,000 by default, and the toolstack makes 13 of ours for each vif. With
/// these five that is enough for 55 clients; for more, dom0's xenstored must be started with a larger quota.
const FEATURES: [(&str, &[u8]); 5] = [
    ("feature-sg", b"1"),
    ("feature-gso-tcpv4", b"1"),
    ("feature-gso-tcpv6", b"1"),
    ("feature-ipv6-csum-offload", b"1"),
    ("feature-rx-copy", b"1"),
];

/// How long to pause after the store failed in a way that may pass: conflicts without end, or its own trouble.
const STORE_PAUSE: Duration = Duration::from_secs(1);
/// How long a refused vif is left alone.
const REFUSED_PAUSE: Duration = Duration::from_secs(5);
/// Log lines that a vif may cause at once, and how often one more.
const LOG_BURST: u32 = 8;
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Why a vif's task ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ended {
    /// Our folder is gone.
    Gone,
    /// The toolstack has put a new device in the place of this one.
    Replaced,
    /// The store failed us in a way that says nothing about the device.
    Lost,
}

/// A vif while its task lives.
pub(super) struct Vif {
    store: Store,
    cell: Rc<VifCell>,
    /// Our folder, relative to our home.
    folder: String,
    own: XenbusState,
    peer: XenbusState,
    online: bool,
    refused: bool,
    barred: bool,
    /// The kernel has mapped the rings.
    attached: bool,
    identity: Option<Identity>,
    /// On the frontend's state.
    watch: Option<Watch>,
    /// Until when state 2 is held.
    hold: Option<Time>,
    /// Until when a frontend may take to close.
    close_by: Option<Time>,
    /// When to read again what the store could not tell, or what made us refuse.
    read_again: Option<Time>,
    reactions: Bucket,
    log_lines: Bucket,
}

impl Vif {
    pub(super) fn new(store: Store, cell: Rc<VifCell>) -> Self {
        let device = cell.device();
        let now = store.now();
        Self {
            folder: format!("backend/vif/{}/{}", device.client, device.handle),
            store,
            cell,
            own: XenbusState::Initialising,
            peer: XenbusState::Unknown,
            online: true,
            refused: false,
            barred: false,
            attached: false,
            identity: None,
            watch: None,
            hold: None,
            close_by: None,
            read_again: None,
            reactions: Bucket::new(REACTION_BURST, REACTION_INTERVAL, now),
            log_lines: Bucket::new(LOG_BURST, LOG_INTERVAL, now),
        }
    }

    /// Serves the vif until its folder is gone. Rings and watch are given back by then.
    pub(super) async fn serve(mut self) -> Ended {
        let ended = loop {
            if let Err(ended) = self.turn().await {
                break ended;
            }
        };
        self.detach().await;
        ended
    }

    /// Looks, decides, acts or waits: once.
    async fn turn(&mut self) -> Result<(), Ended> {
        self.look_at_folder().await?;
        if self.identity.is_none() && self.online && !self.refused {
            self.identify().await?;
        }
        self.look_at_peer().await;
        if let Some(reason) = self.fault() {
            return self.give_up(&reason).await;
        }
        let step = next_step(&self.view());
        if step != Step::Wait && self.held() {
            self.wait().await;
            return Ok(());
        }
        match step {
            Step::Wait => {
                self.wait().await;
                Ok(())
            }
            Step::Offer => self.offer().await,
            Step::Connect => self.connect().await,
            Step::Restart => {
                self.close().await?;
                self.finish().await?;
                self.offer().await
            }
            Step::Close => self.close().await,
            Step::Finish => self.finish().await,
            Step::Remove => self.remove().await,
        }
    }

    fn view(&self) -> View {
        View {
            own: self.own,
            peer: self.peer,
            online: self.online,
            refused: self.refused,
            barred: self.barred,
            expired: self.close_by.is_some_and(|by| by <= self.store.now()),
        }
    }

    /// Whether state 2 must be held a little longer for the toolstack to see; not against its own wish.
    fn held(&self) -> bool {
        self.online
            && self.own == XenbusState::InitWait
            && self.hold.is_some_and(|until| self.store.now() < until)
    }

    /// Reads the toolstack's wishes when something in our folder changed.
    async fn look_at_folder(&mut self) -> Result<(), Ended> {
        let again = self.refused && self.should_read_again();
        if !self.cell.folder_changed.take() && !again {
            return Ok(());
        }
        if again {
            self.read_again = None;
        }
        let state = self.store.read(&self.path("state"));
        let online = self.store.read(&self.path("online"));
        let (state, online) = (state.await, online.await);
        match state {
            Err(Error::NOT_FOUND) => return Err(Ended::Gone),
            // We never write 1: this is a new device.
            Ok(state) if state == b"1" && self.own != XenbusState::Initialising => {
                return Err(Ended::Replaced);
            }
            _ => {}
        }
        if self.own == XenbusState::Initialising {
            // Not offered yet: whatever changed may concern who the client is, or why it was refused.
            self.identity = None;
            self.watch = None;
            self.refused = false;
        }
        match online {
            Ok(value) => self.online = value != b"0",
            Err(Error::NOT_FOUND) => self.online = false,
            Err(_) => {}
        }
        Ok(())
    }

    /// Learns who the client is and watches its state; refuses the vif when that fails.
    async fn identify(&mut self) -> Result<(), Ended> {
        let identity = Identity::parse(
            self.cell.device().client,
            self.read_all(&self.folder, Identity::KEYS).await,
        );
        let identity = match identity {
            Ok(identity) => identity,
            Err(reason) => {
                self.refuse(&reason.to_string());
                return Ok(());
            }
        };
        let path = format!("{}/state", identity.frontend);
        let watch = match self.store.watch(&path).await {
            Ok(watch) => watch,
            Err(Error::Refused(ErrorCode::TooBig)) => {
                self.refuse("no watch left");
                return Ok(());
            }
            Err(reason) => {
                self.refuse(&reason.to_string());
                return Ok(());
            }
        };
        let mut status = self.cell.status.borrow_mut();
        status.mac = Some(identity.mac);
        status.addresses.clone_from(&identity.addresses);
        drop(status);
        self.watch = Some(watch);
        self.identity = Some(identity);
        Ok(())
    }

    fn should_read_again(&self) -> bool {
        self.read_again.is_some_and(|time| time <= self.store.now())
    }

    /// Leaves the vif alone until the toolstack removes or corrects it, or for a while: a quota may have room by then.
    fn refuse(&mut self, reason: &str) {
        if self.cell.status.borrow().trouble.as_deref() != Some(reason) {
            error!("{}: refused: {reason}", self.cell.device());
        }
        self.refused = true;
        self.read_again = Some(self.store.now().plus(REFUSED_PAUSE));
        self.cell.status.borrow_mut().trouble = Some(reason.to_string());
    }

    /// Reads the frontend's state when it changed, as often as the limit allows.
    async fn look_at_peer(&mut self) {
        let (Some(identity), Some(watch)) = (&self.identity, &self.watch) else {
            return;
        };
        if !(watch.is_dirty() || self.should_read_again()) || !self.reactions.take(self.store.now())
        {
            return;
        }
        let _ = watch.take();
        self.read_again = None;
        let peer = match self
            .store
            .read(&format!("{}/state", identity.frontend))
            .await
        {
            Ok(value) => XenbusState::parse(&value),
            Err(Error::Refused(ErrorCode::NotFound | ErrorCode::AccessDenied)) => {
                XenbusState::Unknown
            }
            Err(_) => {
                // The store's own trouble says nothing about the frontend.
                self.read_again = Some(self.store.now().plus(STORE_PAUSE));
                return;
            }
        };
        self.peer = peer;
        self.barred &= !lifts_ban(peer);
        self.cell.status.borrow_mut().peer = peer;
    }

    /// The kernel's report that the rings in use are broken.
    fn fault(&self) -> Option<String> {
        let fault = self.cell.fault.borrow_mut().take();
        fault.filter(|_| self.attached)
    }

    /// Waits until something that a decision depends on may have changed.
    async fn wait(&mut self) {
        let now = self.store.now();
        let next_reaction = self.reactions.next(now);
        let hold = self.hold.filter(|_| self.own == XenbusState::InitWait);
        let times = [self.close_by, hold, self.read_again, Some(next_reaction)];
        let deadline = times.into_iter().flatten().filter(|&time| time > now).min();
        let probe = || {
            let fault = self.attached && self.cell.fault.borrow().is_some();
            let may_react = next_reaction <= self.store.now();
            let peer = may_react && self.watch.as_ref().is_some_and(Watch::is_dirty);
            (self.cell.folder_changed.get() || fault || peer).then_some(())
        };
        self.store.context.until(deadline, probe).await;
    }

    /// Publishes what we can do, and state 2, at once.
    async fn offer(&mut self) -> Result<(), Ended> {
        let first = self.own == XenbusState::Initialising;
        let offered = self
            .store
            .transaction(async |transaction| {
                let mut writes = Vec::new();
                if !first {
                    writes.push(transaction.remove(&self.path("error")));
                }
                for (key, value) in FEATURES {
                    writes.push(transaction.write(&self.path(key), value));
                }
                writes.push(transaction.write(
                    &self.path("state"),
                    XenbusState::InitWait.as_text().as_bytes(),
                ));
                for write in writes {
                    write.await?;
                }
                Ok(())
            })
            .await;
        match offered {
            Ok(()) => {
                self.enter(XenbusState::InitWait);
                self.hold = first.then(|| self.store.now().plus(OFFER_HOLD));
                Ok(())
            }
            Err(Error::Conflict) => {
                self.store.sleep(STORE_PAUSE).await;
                Ok(())
            }
            Err(reason) if first && !is_gone(reason) => {
                self.refuse(&reason.to_string());
                Ok(())
            }
            Err(reason) => Err(self.lost(reason)),
        }
    }

    /// Reads the frontend's keys and lets the kernel connect.
    async fn connect(&mut self) -> Result<(), Ended> {
        let Some(identity) = self.identity.clone() else {
            return Err(Ended::Gone);
        };
        let keys =
            match FrontendKeys::parse(&self.read_all(&identity.frontend, FrontendKeys::KEYS).await)
            {
                Ok(keys) => keys,
                Err(reason) => return self.give_up(&reason.to_string()).await,
            };
        let parameters = VifParameters {
            mac: identity.mac,
            addresses: identity.addresses,
            tx_ring: keys.tx_ring,
            rx_ring: keys.rx_ring,
            port: keys.port,
            features: keys.features,
        };
        let device = self.cell.device();
        self.cell.expect_answer();
        self.store
            .context
            .emit(Event::Backend(BackendEvent::Connect { device, parameters }))
            .await;
        let answer = || self.cell.answer.borrow_mut().take();
        match self.store.context.until(None, answer).await {
            Some(Ok(())) => {}
            Some(Err(reason)) => return self.give_up(&reason).await,
            None => return Err(Ended::Gone),
        }
        self.attached = true;
        // A courtesy to tools that look: nobody waits for it.
        let courtesy = self.store.write(&self.path("hotplug-status"), b"connected");
        self.write_state(XenbusState::Connected).await?;
        let _ = courtesy.await;
        self.cell.status.borrow_mut().trouble = None;
        Ok(())
    }

    /// Closes because the frontend did something impossible. It must start anew before it is connected again.
    async fn give_up(&mut self, reason: &str) -> Result<(), Ended> {
        self.barred = true;
        self.cell.status.borrow_mut().trouble = Some(reason.to_string());
        self.say(|device| warn!("{device}: closed: {reason}"));
        let note = self.store.write(&self.path("error"), reason.as_bytes());
        let closed = self.close().await;
        let _ = note.await;
        closed
    }

    /// Stops the data path and says so.
    async fn close(&mut self) -> Result<(), Ended> {
        self.detach().await;
        self.write_state(XenbusState::Closing).await?;
        self.close_by = Some(self.store.now().plus(CLOSE_DEADLINE));
        Ok(())
    }

    /// Ends in state 6, by way of 5.
    async fn finish(&mut self) -> Result<(), Ended> {
        if self.own != XenbusState::Closing {
            self.close().await?;
        }
        self.write_state(XenbusState::Closed).await
    }

    /// Removes our folder, as the toolstack asked. It waits for state 6 first, and may have written another one over
    /// ours. It gets time to see it, in which it may also lose its patience: what it puts there then is not ours.
    async fn remove(&mut self) -> Result<(), Ended> {
        self.write_state(XenbusState::Closed).await?;
        self.store.sleep(REMOVAL_HOLD).await;
        match self.store.read(&self.path("state")).await {
            Err(Error::NOT_FOUND) => return Err(Ended::Gone),
            Ok(state) if state == b"1" => return Err(Ended::Replaced),
            _ => {}
        }
        if let Err(reason) = self.store.remove(&self.folder).await
            && reason != Error::NOT_FOUND
        {
            self.say(|device| error!("{device}: cannot remove the folder: {reason}"));
        }
        Err(Ended::Gone)
    }

    /// Lets the kernel unmap the rings, if it has mapped them.
    async fn detach(&mut self) {
        if core::mem::take(&mut self.attached) {
            let device = self.cell.device();
            self.store
                .context
                .emit(Event::Backend(BackendEvent::Disconnect { device }))
                .await;
            self.say(|device| info!("{device}: disconnected"));
        }
    }

    /// Writes our state. The parents belong to dom0, so this cannot bring a removed folder back to life.
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
            Err(reason) => Err(self.lost(reason)),
        }
    }

    /// What a failed write to our folder means: that it is gone, or nothing that we could mend.
    fn lost(&mut self, reason: Error) -> Ended {
        if is_gone(reason) {
            return Ended::Gone;
        }
        self.say(|device| error!("{device}: cannot write to its folder: {reason}"));
        Ended::Lost
    }

    fn enter(&mut self, state: XenbusState) {
        self.own = state;
        if state != XenbusState::Closing {
            self.close_by = None;
        }
        self.cell.status.borrow_mut().own = state;
    }

    fn path(&self, key: &str) -> String {
        format!("{}/{key}", self.folder)
    }

    /// Reads several keys of a folder in one go. Missing and unreadable ones give `None`.
    async fn read_all<const N: usize>(&self, folder: &str, keys: [&str; N]) -> [Value; N] {
        let replies = keys.map(|key| self.store.read(&format!("{folder}/{key}")));
        let mut values = [const { None }; N];
        for (value, reply) in values.iter_mut().zip(replies) {
            *value = reply.await.ok();
        }
        values
    }

    /// Logs, unless this vif has caused too many lines already.
    fn say(&mut self, line: impl FnOnce(super::VifId)) {
        if self.log_lines.take(self.store.now()) {
            line(self.cell.device());
        }
    }
}

/// Whether this error is what a removed folder looks like: its parents are not ours to write.
const fn is_gone(error: Error) -> bool {
    matches!(
        error,
        Error::Refused(ErrorCode::NotFound | ErrorCode::AccessDenied)
    )
}
