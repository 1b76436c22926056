//! Clients that come and go quickly: toolstack and frontend in one, in dom0.
//!
//! `xl` and a guest's driver need half a second for what this does in some milliseconds, by the same steps: the
//! toolstack's nodes, real grants and a real event channel, a frame there and its answer back, and the end in one of
//! four ways. The backend cannot tell it from a client, except that its domain number is 0.
//!
//! Source: Xen `public/io/{netif,ring,xenbus}.h`; `shared/spec/xen-lab.md` section 5 for the toolstack's order.

use std::io;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use super::device::{Devices, Page};
use super::ring::Memory as _;
use super::xenstore::Xenstore;

/// How long the backend may take for any step, as libxl has it.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often to look; oftener, looking itself would need the processor that everybody shares.
const LOOK: Duration = Duration::from_millis(25);
/// The first device number: far from those that `xl` gives.
const FIRST_HANDLE: u32 = 900;
/// Clients at once: each waits most of the time.
const AT_ONCE: u8 = 8;

const INITIALISING: &str = "1";
const INIT_WAIT: &str = "2";
const CONNECTED: &str = "4";
const CLOSING: &str = "5";
const CLOSED: &str = "6";

/// Offsets in a ring's page.
const REQ_PROD: usize = 0;
const REQ_EVENT: usize = 4;
const RSP_PROD: usize = 8;
const RSP_EVENT: usize = 12;
const SLOTS: usize = 64;

/// How a client goes.
#[derive(Clone, Copy, Debug)]
enum End {
    /// It is detached: its driver closes.
    Detached,
    /// Its domain is destroyed: its folder vanishes first.
    Destroyed,
    /// It closes, begins again, and is detached then.
    Reconnecting,
    /// It never connected.
    NeverThere,
}

/// A connected frontend.
struct Frontend {
    tx: Page,
    rx: Page,
    frame: Page,
    buffer: Page,
    port: u32,
}

/// One device number, at which clients come and go.
#[derive(Debug)]
struct Client {
    devices: Devices,
    xenstore: Xenstore,
    backend: u16,
    handle: u32,
    mac: [u8; 6],
    address: Ipv4Addr,
    gateway: Ipv4Addr,
}

fn late(what: &str, begun: Instant) -> io::Result<()> {
    if begun.elapsed() < PATIENCE {
        sleep(LOOK);
        return Ok(());
    }
    Err(io::Error::other(format!(
        "{what}: nothing within {} s",
        PATIENCE.as_secs()
    )))
}

/// Has `count` clients come and go behind the domain `backend`, some of them at once, each in the next of four ways.
///
/// They have addresses from `address` on; the backend's own is `gateway`. Returns the longest time that one took.
///
/// # Errors
///
/// What is missing in dom0, and what the backend did not do in time, with the number of the client.
pub fn run(count: u32, backend: u16, address: Ipv4Addr, gateway: Ipv4Addr) -> io::Result<Duration> {
    let next = AtomicU32::new(0);
    let lane = |index: u8| -> io::Result<Duration> {
        let mut client = Client::new(backend, index, address, gateway)?;
        let mut longest = Duration::ZERO;
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(longest);
            }
            // The lanes keep step with each other, so each sees all ways only if they do not divide by their number.
            let turn = number.wrapping_add(number / u32::from(AT_ONCE));
            let end = match turn % 4 {
                0 => End::Detached,
                1 => End::Destroyed,
                2 => End::Reconnecting,
                _ => End::NeverThere,
            };
            let begun = Instant::now();
            client.come_and_go(end).map_err(|error| {
                // The others need not go on.
                next.store(count, Ordering::Relaxed);
                io::Error::other(format!("client {number}, {end:?}: {error}"))
            })?;
            longest = longest.max(begun.elapsed());
        }
    };
    thread::scope(|scope| {
        let lanes: Vec<_> = (0..AT_ONCE)
            .map(|index| scope.spawn(move || lane(index)))
            .collect();
        let mut longest = Duration::ZERO;
        for lane in lanes {
            let ended = lane.join().map_err(|_| io::Error::other("a lane died"))?;
            longest = longest.max(ended?);
        }
        // As libxl does with a folder that has become empty.
        Xenstore::connect()?.remove(&format!("/local/domain/{backend}/backend/vif/0"))?;
        Ok(longest)
    })
}

impl Client {
    fn new(backend: u16, index: u8, first: Ipv4Addr, gateway: Ipv4Addr) -> io::Result<Self> {
        let address = Ipv4Addr::from_bits(u32::from(first).wrapping_add(index.into()));
        Ok(Self {
            devices: Devices::open()?,
            xenstore: Xenstore::connect()?,
            backend,
            handle: FIRST_HANDLE + u32::from(index),
            mac: [0x00, 0x16, 0x3e, 0x5e, 0x6d, index],
            address,
            gateway,
        })
    }

    fn backend_folder(&self) -> String {
        format!(
            "/local/domain/{}/backend/vif/0/{}",
            self.backend, self.handle
        )
    }

    fn frontend_folder(&self) -> String {
        format!("/local/domain/0/device/vif/{}", self.handle)
    }

    fn come_and_go(&mut self, end: End) -> io::Result<()> {
        self.attach()?;
        self.await_state(INIT_WAIT)?;
        let mut frontend = None;
        if !matches!(end, End::NeverThere) {
            frontend = Some(self.connect()?);
        }
        if matches!(end, End::Reconnecting) {
            self.set_state(CLOSING)?;
            self.set_state(CLOSED)?;
            self.await_state(CLOSED)?;
            self.set_state(INITIALISING)?;
            self.await_state(INIT_WAIT)?;
            self.release(frontend.take());
            frontend = Some(self.connect()?);
        }
        let (folder, own) = (self.backend_folder(), self.frontend_folder());
        let destroyed = matches!(end, End::Destroyed);
        self.xenstore.together(|store| {
            if destroyed {
                store.remove(&own)?;
            }
            store.write(&format!("{folder}/online"), "0")?;
            store.write(&format!("{folder}/state"), CLOSING)
        })?;
        if !destroyed {
            self.set_state(CLOSED)?;
        }
        let begun = Instant::now();
        while self.xenstore.read(&format!("{folder}/state"))?.is_some() {
            late("the folder is not removed", begun)?;
        }
        self.release(frontend);
        self.xenstore.remove(&own)
    }

    /// What libxl writes.
    fn attach(&mut self) -> io::Result<()> {
        let (folder, own) = (self.backend_folder(), self.frontend_folder());
        let (backend, address) = (self.backend, self.address.to_string());
        let handle = self.handle.to_string();
        let mac = self.mac.map(|octet| format!("{octet:02x}")).join(":");
        self.xenstore.together(|store| {
            store.folder(&own, 0, backend)?;
            for (key, value) in [
                ("backend", folder.as_str()),
                ("backend-id", &backend.to_string()),
                ("state", "1"),
                ("handle", &handle),
                ("mac", &mac),
                ("trusted", "1"),
                ("mtu", "1500"),
            ] {
                store.write(&format!("{own}/{key}"), value)?;
            }
            store.folder(
                &format!("/local/domain/{backend}/backend/vif/0"),
                0,
                backend,
            )?;
            store.folder(&folder, backend, 0)?;
            for (key, value) in [
                ("frontend", own.as_str()),
                ("frontend-id", "0"),
                ("online", "1"),
                ("state", "1"),
                ("script", "/etc/xen/scripts/vif-fw"),
                ("mac", &mac),
                ("ip", &address),
                ("bridge", "xenbr0"),
                ("handle", &handle),
                ("type", "vif"),
                ("hotplug-status", ""),
            ] {
                store.write(&format!("{folder}/{key}"), value)?;
            }
            Ok(())
        })
    }

    fn await_state(&mut self, wanted: &str) -> io::Result<()> {
        let path = format!("{}/state", self.backend_folder());
        let begun = Instant::now();
        loop {
            let state = self.xenstore.read(&path)?.unwrap_or_default();
            if state == wanted.as_bytes() {
                return Ok(());
            }
            let state = String::from_utf8_lossy(&state).into_owned();
            late(&format!("backend state {state:?}, not {wanted}"), begun)?;
        }
    }

    fn set_state(&mut self, state: &str) -> io::Result<()> {
        self.xenstore
            .write(&format!("{}/state", self.frontend_folder()), state)
    }

    /// What netfront does: rings, then a question of which the answer shows that frames flow both ways.
    fn connect(&mut self) -> io::Result<Frontend> {
        let grant = || self.devices.grant(self.backend);
        let frontend = Frontend {
            tx: grant()?,
            rx: grant()?,
            frame: grant()?,
            buffer: grant()?,
            port: self.devices.allocate_port(self.backend)?,
        };
        for ring in [&frontend.tx, &frontend.rx] {
            ring.write_u32(REQ_EVENT, 1);
            ring.write_u32(RSP_EVENT, 1);
        }
        // An rx request: id, padding, grant.
        frontend.rx.write_u32(SLOTS, 0);
        frontend.rx.write_u32(SLOTS + 4, frontend.buffer.gref());
        frontend.rx.write_u32(REQ_PROD, 1);
        let own = self.frontend_folder();
        let numbers = [
            ("tx-ring-ref", frontend.tx.gref()),
            ("rx-ring-ref", frontend.rx.gref()),
            ("event-channel", frontend.port),
            ("request-rx-copy", 1),
            ("feature-rx-notify", 1),
            ("feature-sg", 1),
        ];
        self.xenstore.together(|store| {
            numbers.iter().try_for_each(|(key, number)| {
                store.write(&format!("{own}/{key}"), &number.to_string())
            })?;
            store.write(&format!("{own}/state"), CONNECTED)
        })?;
        self.await_state(CONNECTED)?;
        self.ask(&frontend)?;
        Ok(frontend)
    }

    /// Asks for the gateway's link address.
    fn ask(&self, frontend: &Frontend) -> io::Result<()> {
        let mut frame = [0xff; 6].to_vec();
        frame.extend(self.mac);
        frame.extend([0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(self.mac);
        frame.extend(self.address.octets());
        frame.extend([0; 6]);
        frame.extend(self.gateway.octets());
        let len = u32::try_from(frame.len()).map_err(io::Error::other)?;
        frontend.frame.write_bytes(0, &frame);
        // A tx request: grant; offset and flags; id and size.
        frontend.tx.write_u32(SLOTS, frontend.frame.gref());
        frontend.tx.write_u32(SLOTS + 4, 0);
        frontend.tx.write_u32(SLOTS + 8, len << 16);
        fence(Ordering::SeqCst);
        frontend.tx.write_u32(REQ_PROD, 1);
        self.devices.notify(frontend.port);
        let begun = Instant::now();
        while frontend.rx.read_u32(RSP_PROD) == 0 || frontend.tx.read_u32(RSP_PROD) == 0 {
            late("no answer to an ARP question", begun)?;
        }
        let mut answer = [0; 42];
        frontend.buffer.read_bytes(0, &mut answer);
        let [.., operation, _, _, _, _, _, _, a, b, c, d] =
            answer.first_chunk::<32>().copied().unwrap_or([0; 32]);
        if operation == 2 && [a, b, c, d] == self.gateway.octets() {
            return Ok(());
        }
        Err(io::Error::other(format!("an odd answer: {answer:02x?}")))
    }

    fn release(&self, frontend: Option<Frontend>) {
        if let Some(frontend) = frontend {
            self.devices.close_port(frontend.port);
        }
    }
}
