//! Finding devices below `backend/vif`.
//!
//! The watch is set first and fires once at once, so what exists already is found the same way as what comes
//! later. Event paths are hints about where to look, never facts: a hint about a device that has a task makes that
//! task look; one about a place without a task is checked, and gets a task if a device is there. Too many hints at
//! once mean a full listing.
//!
//! `backend/vif` and its parents belong to dom0, which removes them with their last device; the watch stays.

use alloc::format;
use alloc::rc::Rc;
use alloc::vec::Vec;
use core::time::Duration;

use xen::{DomId, Time, error};

use super::device::{Ended, Vif};
use super::keys::index;
use super::{Place, Vifs};
use crate::MAX_VIFS;
use crate::client::Dirty;
use crate::state::XenbusState;
use crate::store::{Error, Store, Watch};
use crate::table::Table;
use crate::wire::ErrorCode;

/// Where devices are, relative to our home.
const ROOT: &str = "backend/vif";
/// The largest domain id of a real domain (`DOMID_FIRST_RESERVED` - 1).
const LAST_DOMAIN: u16 = 0x7FEF;
/// How long to pause after the store failed in a way that may pass.
const STORE_PAUSE: Duration = Duration::from_secs(5);

/// What an event path is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Hint {
    /// The folder of all devices, or above.
    Root,
    /// One client's folder.
    Client(DomId),
    /// A device's folder; with whether the change matters to a device that is being served.
    Device(Place, bool),
    /// Nothing that could be a device.
    Junk,
}

fn hint(path: &str) -> Hint {
    let Some(below) = path.strip_prefix(ROOT) else {
        return Hint::Junk;
    };
    let mut parts = below.split('/').skip(1);
    let Some(client) = parts.next() else {
        return Hint::Root;
    };
    let Some(client) = index(client).filter(|&client| client <= LAST_DOMAIN) else {
        return Hint::Junk;
    };
    let Some(handle) = parts.next() else {
        return Hint::Client(DomId(client));
    };
    let Some(handle) = index(handle) else {
        return Hint::Junk;
    };
    // Our own writes come back as events; only these two paths tell something about the toolstack.
    let matters = matches!((parts.next(), parts.next()), (None | Some("online"), None));
    Hint::Device((DomId(client), handle), matters)
}

/// The task that finds devices and starts their tasks. Never ends.
pub(crate) async fn discover(store: Store, vifs: Rc<Vifs>) {
    let watch = loop {
        match store.watch_paths(ROOT).await {
            Ok(watch) => break watch,
            Err(reason) => error!("{ROOT}: cannot watch: {reason}"),
        }
        store.sleep(STORE_PAUSE).await;
    };
    let mut discovery = Discovery {
        store,
        vifs,
        watch,
        crowded: false,
        again: None,
    };
    loop {
        discovery.turn().await;
    }
}

/// Whose folders to look into after the list of clients was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Listing {
    /// All of them.
    Everyone,
    /// Those that have no device yet.
    Newcomers,
}

struct Discovery {
    store: Store,
    vifs: Rc<Vifs>,
    watch: Watch,
    /// Devices were left out because there are too many.
    crowded: bool,
    /// When to look everywhere again, because the store failed.
    again: Option<Time>,
}

impl Discovery {
    async fn turn(&mut self) {
        let room = || self.crowded && self.vifs.len() < MAX_VIFS;
        let recheck = || !self.vifs.recheck.borrow().is_empty();
        let probe =
            || (self.watch.is_dirty() || recheck() || self.vifs.lost.get() || room()).then_some(());
        let due = self.store.context.until(self.again, probe).await.is_none();
        let room = room();
        let mut dirty = self.watch.take();
        if self.vifs.lost.take() {
            self.look_again_later();
        }
        if due {
            self.again = None;
        }
        if room || due {
            self.crowded = false;
            dirty = Dirty::Anything;
        }
        let mut places = self.vifs.recheck.take();
        let mut clients = Table::new();
        let mut root = None;
        match dirty {
            Dirty::Clean => {}
            Dirty::Anything => {
                self.touch_absent(|_| true);
                root = Some(Listing::Everyone);
            }
            Dirty::Paths(paths) => {
                for path in &paths {
                    match hint(path) {
                        Hint::Root => root = Some(Listing::Newcomers),
                        Hint::Client(client) => clients.insert(client, ()),
                        Hint::Device(place, matters) => {
                            self.touch(place, matters);
                            places.insert(place, ());
                        }
                        Hint::Junk => {}
                    }
                }
            }
        }
        self.look(places, clients, root).await;
    }

    fn look_again_later(&mut self) {
        self.again = self.again.or(Some(self.store.now().plus(STORE_PAUSE)));
    }

    /// Looks at these devices, then at the clients that there are, then into these clients' folders: each device and each
    /// folder once.
    ///
    /// The usual case comes first: events have named the device, and its task starts while the folders are listed.
    async fn look(
        &mut self,
        mut places: Table<Place, ()>,
        mut clients: Table<DomId, ()>,
        mut root: Option<Listing>,
    ) {
        let mut folders = None;
        loop {
            for (place, ()) in places {
                self.consider(place).await;
            }
            places = Table::new();
            if let Some(listing) = root.take() {
                let listed = self.list(ROOT).await;
                if listing == Listing::Newcomers {
                    self.touch_absent(|&(client, _)| !listed.contains(&client.0));
                }
                for client in listed.into_iter().map(DomId) {
                    // The folders of clients that have a device already announce new ones themselves.
                    if listing == Listing::Everyone || !self.serves(client) {
                        clients.insert(client, ());
                    }
                }
            }
            // Complete by now: the list of clients is read in the first round.
            let folders = folders.get_or_insert_with(|| core::mem::take(&mut clients).into_iter());
            let Some((client, ())) = folders.next() else {
                return;
            };
            for place in self.devices_of(client).await {
                places.insert(place, ());
            }
        }
    }

    async fn devices_of(&mut self, client: DomId) -> Vec<Place> {
        let listed = self.list(&format!("{ROOT}/{client}")).await;
        self.touch_absent(|&(other, handle)| other == client && !listed.contains(&handle));
        listed.into_iter().map(|handle| (client, handle)).collect()
    }

    /// The numeric names in a folder; none when it is not there.
    async fn list(&mut self, path: &str) -> Vec<u16> {
        let names = match self.store.list(path).await {
            Ok(names) => names,
            Err(reason) => {
                self.note_failure(reason);
                Vec::new()
            }
        };
        names
            .iter()
            .filter_map(|name| index(name))
            .filter(|&number| number <= LAST_DOMAIN)
            .collect()
    }

    /// A missing folder is an answer; any other failure is worth another look.
    fn note_failure(&mut self, reason: Error) {
        if !matches!(
            reason,
            Error::Refused(ErrorCode::NotFound | ErrorCode::AccessDenied)
        ) {
            self.look_again_later();
        }
    }

    fn serves(&self, client: DomId) -> bool {
        self.vifs
            .by_place
            .borrow()
            .keys()
            .any(|&(other, _)| other == client)
    }

    /// Tells a device's task, if there is one, that something changed in its folder. While the device is not
    /// offered yet any change may be the one that it lacks.
    fn touch(&self, place: Place, matters: bool) {
        if let Some(cell) = self.vifs.at(place)
            && (matters || cell.status.borrow().own == XenbusState::Unknown)
        {
            cell.folder_changed.set(true);
            self.store.context.wake();
        }
    }

    fn touch_absent(&self, absent: impl Fn(&Place) -> bool) {
        let places: Vec<Place> = self
            .vifs
            .by_place
            .borrow()
            .keys()
            .copied()
            .filter(absent)
            .collect();
        for place in places {
            self.touch(place, true);
        }
    }

    /// Starts a task for a device that has none, if it is really there and there is room.
    async fn consider(&mut self, place: Place) {
        if self.vifs.at(place).is_some() {
            return;
        }
        let (client, handle) = place;
        if let Err(reason) = self
            .store
            .read(&format!("{ROOT}/{client}/{handle}/state"))
            .await
        {
            return self.note_failure(reason);
        }
        if self.vifs.len() >= MAX_VIFS {
            if !self.crowded {
                error!(
                    "vif{client}.{handle}: not served, {MAX_VIFS} vifs are already; waits for one to leave"
                );
            }
            self.crowded = true;
            return;
        }
        let cell = self.vifs.register(place);
        let device = cell.device();
        let vifs = Rc::clone(&self.vifs);
        let vif = Vif::new(self.store.clone(), Rc::clone(&cell));
        let served = self.store.spawn(async move {
            let ended = vif.serve().await;
            vifs.forget(
                device,
                ended == Ended::Replaced || cell.folder_changed.get(),
            );
        });
        if served.is_err() {
            error!("{device}: not served, no task left");
            self.vifs.forget(device, false);
            self.crowded = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_paths_are_hints_about_places() {
        assert_eq!(hint("backend/vif"), Hint::Root);
        assert_eq!(hint("backend/vif/7"), Hint::Client(DomId(7)));
        let place = (DomId(7), 1);
        for (tail, matters) in [
            ("", true),
            ("/online", true),
            ("/state", false),
            ("/online/x", false),
        ] {
            assert_eq!(
                hint(&format!("backend/vif/7/1{tail}")),
                Hint::Device(place, matters),
                "{tail}"
            );
        }
        for junk in [
            "",
            "backend",
            "backend/vif/x",
            "backend/vif/07/0",
            "backend/vif/32752",
            "backend/vif/7/x",
        ] {
            assert_eq!(hint(junk), Hint::Junk, "{junk}");
        }
    }
}
