//! What dom0 asks of the domain as a whole: shut down, reboot, and the odd system request.
//!
//! A command in `control/shutdown` is acknowledged by writing an empty value, then acted upon. What we can do is
//! advertised first (`control/feature-poweroff`, `control/feature-reboot`): the toolstack of Qubes refuses a
//! command that is not. Suspend is not advertised; should it be asked for, it is acknowledged and ignored.
//!
//! Source: libxl (`libxl_domain.c`), Xen `docs/misc/xenstore-paths.pandoc`.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::time::Duration;

use xen::{error, info, warn};

use crate::client::Dirty;
use crate::control_plane::Event;
use crate::store::{Error, Store, Watch};

/// Where dom0 asks us to end.
const SHUTDOWN: &str = "control/shutdown";
/// Where dom0 presses keys.
const SYSRQ: &str = "control/sysrq";
/// Bytes of a name or an unknown command that are told further.
const MAX_NAME_LEN: usize = 64;
/// How long to pause before trying again to set a watch.
const WATCH_PAUSE: Duration = Duration::from_secs(5);

/// How the domain shall end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shutdown {
    /// Power off.
    Poweroff,
    /// Halt: for a domain the same as power off.
    Halt,
    /// Reboot.
    Reboot,
}

/// A request of dom0 to the domain as a whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ControlEvent {
    /// Who we are: told once, after the store has answered for the first time.
    Identity {
        /// The domain's name; empty when not readable. At most 64 characters, printable.
        name: String,
        /// `memory/target` in KiB, when readable.
        memory_target_kib: Option<u64>,
    },
    /// End now. Already acknowledged.
    Shutdown(Shutdown),
    /// A `control/sysrq` character. Already cleared.
    SysRq(u8),
}

/// The task that follows `control/`. Never ends.
pub(crate) async fn run(store: Store) {
    // Before anything else: without it dom0 of Qubes OS does not even ask for the end.
    for feature in ["control/feature-poweroff", "control/feature-reboot"] {
        if let Err(reason) = store.write(feature, b"1").await {
            error!("{feature}: cannot write: {reason}");
        }
    }
    introduce(&store).await;
    let shutdown = watch(&store, SHUTDOWN).await;
    let sysrq = watch(&store, SYSRQ).await;
    loop {
        let probe = || (shutdown.is_dirty() || sysrq.is_dirty()).then_some(());
        store.context.until(None, probe).await;
        let (asked, pressed) = (
            shutdown.take() != Dirty::Clean,
            sysrq.take() != Dirty::Clean,
        );
        if asked {
            obey(&store).await;
        }
        if pressed {
            press(&store).await;
        }
    }
}

/// Tells the kernel who we are.
async fn introduce(store: &Store) {
    let (name, target) = (store.read("name"), store.read("memory/target"));
    let name = name.await.unwrap_or_default();
    let name = name
        .iter()
        .filter(|byte| byte.is_ascii_graphic())
        .take(MAX_NAME_LEN);
    let name = name.map(|&byte| char::from(byte)).collect();
    let target = target.await.ok();
    let memory_target_kib =
        target.and_then(|value| core::str::from_utf8(&value).ok()?.parse().ok());
    let identity = ControlEvent::Identity {
        name,
        memory_target_kib,
    };
    store.context.emit(Event::Control(identity)).await;
}

async fn watch(store: &Store, path: &str) -> Watch {
    loop {
        match store.watch(path).await {
            Ok(watch) => return watch,
            Err(reason) => error!("{path}: cannot watch: {reason}"),
        }
        store.sleep(WATCH_PAUSE).await;
    }
}

/// Reads a shutdown command, acknowledges it, and passes it on.
async fn obey(store: &Store) {
    let Some(command) = take(store, SHUTDOWN).await else {
        return;
    };
    let shutdown = match command.as_slice() {
        b"poweroff" => Shutdown::Poweroff,
        b"halt" => Shutdown::Halt,
        b"reboot" => Shutdown::Reboot,
        _ => {
            let text: String = command
                .iter()
                .take(MAX_NAME_LEN)
                .map(|byte| byte.escape_ascii().to_string())
                .collect();
            warn!("{SHUTDOWN}: ignoring the command \"{text}\"");
            return;
        }
    };
    info!("{SHUTDOWN}: {shutdown:?}");
    store
        .context
        .emit(Event::Control(ControlEvent::Shutdown(shutdown)))
        .await;
}

async fn press(store: &Store) {
    if let Some(&[key]) = take(store, SYSRQ).await.as_deref() {
        store
            .context
            .emit(Event::Control(ControlEvent::SysRq(key)))
            .await;
    }
}

/// Reads a command and writes an empty value in its place, which acknowledges it; in one transaction, so that a
/// command which comes in between is not lost. Nothing when there is none, as after our own acknowledgement.
async fn take(store: &Store, path: &str) -> Option<Vec<u8>> {
    let taken = store
        .transaction(async |transaction| {
            let value = match transaction.read(path).await {
                Err(Error::NOT_FOUND) => Vec::new(),
                other => other?,
            };
            if !value.is_empty() {
                transaction.write(path, b"").await?;
            }
            Ok(value)
        })
        .await;
    match taken {
        Ok(value) => Some(value).filter(|value| !value.is_empty()),
        Err(reason) => {
            warn!("{path}: cannot acknowledge: {reason}");
            store
                .read(path)
                .await
                .ok()
                .filter(|value| !value.is_empty())
        }
    }
}
