//! A few blocking requests on xenstored's socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Where xenstored listens.
const SOCKETS: [&str; 2] = ["/run/xenstored/socket", "/var/run/xenstored/socket"];
const READ: u32 = 2;
const TRANSACTION_START: u32 = 6;
const TRANSACTION_END: u32 = 7;
const WRITE: u32 = 11;
const MKDIR: u32 = 12;
const RM: u32 = 13;
const SET_PERMS: u32 = 14;
const WATCH_EVENT: u32 = 15;
const ERROR: u32 = 16;
/// The longest payload.
const PAYLOAD_MAX: usize = 4096;

/// A connection to xenstored.
#[derive(Debug)]
pub struct Xenstore {
    socket: UnixStream,
    next: u32,
    /// The running transaction; 0 for none.
    transaction: u32,
}

impl Xenstore {
    /// Connects.
    ///
    /// # Errors
    ///
    /// When xenstored does not listen.
    pub fn connect() -> io::Result<Self> {
        let mut error = io::Error::other("no socket");
        for path in SOCKETS {
            match UnixStream::connect(path) {
                Ok(socket) => {
                    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
                    return Ok(Self {
                        socket,
                        next: 1,
                        transaction: 0,
                    });
                }
                Err(failed) => error = io::Error::new(failed.kind(), format!("{path}: {failed}")),
            }
        }
        Err(error)
    }

    /// The value of a node; `None` when there is none.
    ///
    /// # Errors
    ///
    /// The connection's.
    pub fn read(&mut self, path: &str) -> io::Result<Option<Vec<u8>>> {
        self.request(READ, &[path.as_bytes(), b"\0"].concat())
    }

    /// Writes a node and lets nobody but `reader` read it.
    ///
    /// # Errors
    ///
    /// The connection's, or xenstored's refusal.
    pub fn publish(&mut self, path: &str, value: &str, reader: u16) -> io::Result<()> {
        let refused = || io::Error::other(format!("{path}: refused"));
        self.request(WRITE, &[path.as_bytes(), b"\0", value.as_bytes()].concat())?
            .ok_or_else(refused)?;
        let permissions = format!("{path}\0n0\0r{reader}\0");
        self.request(SET_PERMS, permissions.as_bytes())?
            .ok_or_else(refused)?;
        Ok(())
    }

    /// Writes a node.
    ///
    /// # Errors
    ///
    /// The connection's, or xenstored's refusal.
    pub fn write(&mut self, path: &str, value: &str) -> io::Result<()> {
        self.request(WRITE, &[path.as_bytes(), b"\0", value.as_bytes()].concat())?
            .map(drop)
            .ok_or_else(|| io::Error::other(format!("{path}: refused")))
    }

    /// Makes a folder that belongs to `owner` and that `reader` may read; what is created in it inherits that.
    ///
    /// # Errors
    ///
    /// The connection's, or xenstored's refusal.
    pub fn folder(&mut self, path: &str, owner: u16, reader: u16) -> io::Result<()> {
        let refused = || io::Error::other(format!("{path}: refused"));
        self.request(MKDIR, &[path.as_bytes(), b"\0"].concat())?
            .ok_or_else(refused)?;
        let permissions = format!("{path}\0n{owner}\0r{reader}\0");
        self.request(SET_PERMS, permissions.as_bytes())?
            .map(drop)
            .ok_or_else(refused)
    }

    /// Does something in one transaction, again if another client was faster. Ours never are at once.
    ///
    /// # Errors
    ///
    /// Those of `action`, and if it never succeeds.
    pub fn together(
        &mut self,
        mut action: impl FnMut(&mut Self) -> io::Result<()>,
    ) -> io::Result<()> {
        /// Transactions that change the children of one folder undo each other, for ever if there are many.
        static ALONE: Mutex<()> = Mutex::new(());
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..100 {
            let refused = || io::Error::other("no transaction");
            let id = self
                .request(TRANSACTION_START, b"\0")?
                .ok_or_else(refused)?;
            let id = String::from_utf8_lossy(&id);
            self.transaction = id
                .trim_end_matches('\0')
                .parse()
                .map_err(io::Error::other)?;
            let done = action(self);
            let end: &[u8] = if done.is_ok() { b"T\0" } else { b"F\0" };
            let ended = self.request(TRANSACTION_END, end);
            self.transaction = 0;
            done?;
            if ended?.is_some() {
                return Ok(());
            }
        }
        Err(io::Error::other("a transaction never succeeds"))
    }

    /// Removes a node with what is below it. It may be gone.
    ///
    /// # Errors
    ///
    /// The connection's.
    pub fn remove(&mut self, path: &str) -> io::Result<()> {
        self.request(RM, &[path.as_bytes(), b"\0"].concat())
            .map(|_| ())
    }

    /// One request; `None` when xenstored answers with an error.
    fn request(&mut self, kind: u32, payload: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        let len = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let header = [kind, id, self.transaction, len]
            .map(u32::to_ne_bytes)
            .concat();
        self.socket.write_all(&[&header, payload].concat())?;
        loop {
            let mut header = [0; 16];
            self.socket.read_exact(&mut header)?;
            let word = |index| crate::wire::word(&header, index);
            let len = usize::try_from(word(3)).map_err(io::Error::other)?;
            if len > PAYLOAD_MAX {
                return Err(io::Error::other("xenstored has lost its step"));
            }
            let mut body = vec![0; len];
            self.socket.read_exact(&mut body)?;
            match word(0) {
                WATCH_EVENT => {}
                ERROR => return Ok(None),
                _ if word(1) == id => return Ok(Some(body)),
                _ => return Err(io::Error::other("answer to another request")),
            }
        }
    }
}
