//! The device that carries the control channel.
//!
//! In dom0 it is a virtio-serial port, found by name; in a guest it is the PV
//! console, put into raw mode so that nothing is echoed, translated or cut at
//! the line discipline's 4,096 bytes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use lab_agent::protocol::Reply;
use nix::fcntl::OFlag;
use nix::sys::termios;

/// How long to wait for a device that a driver is about to create.
const DEVICE_PATIENCE: Duration = Duration::from_secs(60);

/// Pause between two looks at a channel whose other end is not connected.
const IDLE: Duration = Duration::from_millis(20);

/// Finds the device of the virtio-serial port called `name`, waiting for it.
///
/// # Errors
///
/// `NotFound` if it has not appeared within a minute.
pub(crate) fn find_virtio_port(name: &str) -> io::Result<PathBuf> {
    let deadline = Instant::now() + DEVICE_PATIENCE;
    loop {
        if let Ok(ports) = fs::read_dir("/sys/class/virtio-ports") {
            for port in ports.flatten() {
                let given = fs::read_to_string(port.path().join("name")).unwrap_or_default();
                let device = Path::new("/dev").join(port.file_name());
                if given.trim() == name && device.exists() {
                    return Ok(device);
                }
            }
        }
        if Instant::now() > deadline {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("no virtio port {name}"),
            ));
        }
        thread::sleep(IDLE);
    }
}

/// Opens a terminal device for bytes, not for a person.
///
/// # Errors
///
/// Those of opening the device and of changing its mode.
pub(crate) fn open_raw_tty(path: &Path) -> io::Result<File> {
    let tty = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NOCTTY.bits())
        .open(path)?;
    let mut mode = termios::tcgetattr(&tty)?;
    termios::cfmakeraw(&mut mode);
    termios::tcsetattr(&tty, termios::SetArg::TCSANOW, &mode)?;
    Ok(tty)
}

/// Both directions of the control channel; replies from many threads take turns.
#[derive(Debug)]
pub(crate) struct Port {
    reader: Mutex<File>,
    writer: Mutex<File>,
}

impl Port {
    /// Takes over an open device.
    ///
    /// # Errors
    ///
    /// If the handle cannot be duplicated for the second direction.
    pub(crate) fn new(device: File) -> io::Result<Self> {
        Ok(Self {
            writer: Mutex::new(device.try_clone()?),
            reader: Mutex::new(device),
        })
    }

    /// Writes one message as one line; blocks while the host is away.
    pub(crate) fn reply(&self, reply: &Reply) {
        let line = format!("{reply}\n");
        if let Ok(mut writer) = self.writer.lock() {
            // A channel that is gone takes the whole lab with it; nobody is
            // left to tell.
            let _ = writer.write_all(line.as_bytes());
        }
    }

    /// Reads the next bytes; waits, also while the other end is disconnected.
    ///
    /// # Errors
    ///
    /// If the device fails for good.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut reader = self
            .reader
            .lock()
            .map_err(|_| io::Error::other("poisoned port"))?;
        loop {
            match reader.read(buffer) {
                // A virtio port reads as ended while no host is connected.
                Ok(0) => thread::sleep(IDLE),
                Ok(len) => return Ok(len),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}
