//! Consoles of other domains, relayed by the agent in dom0.
//!
//! xenconsoled gives every domain a pty and writes its name into xenstore.
//! The relay is the only reader of that pty; it ends with the domain.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use lab_agent::protocol::Reply;

use crate::port::{self, Port};

/// The consoles that are being relayed, by domain.
#[derive(Debug, Clone)]
pub(crate) struct Relays {
    port: Arc<Port>,
    open: Arc<Mutex<HashMap<u32, mpsc::Sender<Vec<u8>>>>>,
}

impl Relays {
    /// No relays yet.
    pub(crate) fn new(port: Arc<Port>) -> Self {
        Self {
            port,
            open: Arc::default(),
        }
    }

    /// Starts relaying; a second call for a live console changes nothing.
    ///
    /// A console that cannot be opened is reported as ended.
    pub(crate) fn open(&self, domid: u32, tty: &Path) {
        let Ok(mut open) = self.open.lock() else {
            return;
        };
        if open.contains_key(&domid) {
            return;
        }
        let Ok((reader, writer)) =
            port::open_raw_tty(tty).and_then(|tty| Ok((tty.try_clone()?, tty)))
        else {
            self.ended(domid);
            return;
        };
        let (typed, keyboard) = mpsc::channel();
        open.insert(domid, typed);
        drop(open);
        let relays = self.clone();
        thread::spawn(move || relays.read(domid, reader));
        // A thread of its own: a domain that does not read its console must
        // not hold up the control channel.
        thread::spawn(move || type_in(&keyboard, writer));
    }

    /// Types bytes on a console; without one they are lost, as on a real line.
    pub(crate) fn send(&self, domid: u32, bytes: Vec<u8>) {
        if let Ok(open) = self.open.lock()
            && let Some(typed) = open.get(&domid)
        {
            let _ = typed.send(bytes);
        }
    }

    fn read(&self, domid: u32, mut tty: File) {
        let mut buffer = vec![0; 16 * 1024];
        // xenconsoled closes its side when the domain is gone: end or EIO.
        while let Ok(len @ 1..) = tty.read(&mut buffer) {
            let bytes = buffer.get(..len).unwrap_or_default().to_vec();
            self.port.reply(&Reply::Console { domid, bytes });
        }
        if let Ok(mut open) = self.open.lock() {
            open.remove(&domid);
        }
        self.ended(domid);
    }

    fn ended(&self, domid: u32) {
        self.port.reply(&Reply::Console {
            domid,
            bytes: Vec::new(),
        });
    }
}

fn type_in(keyboard: &mpsc::Receiver<Vec<u8>>, mut tty: File) {
    for bytes in keyboard {
        if tty.write_all(&bytes).is_err() {
            return;
        }
    }
}
