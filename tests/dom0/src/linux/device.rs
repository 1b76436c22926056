//! The devices through which Linux gives programs grants and event channels, and the memory behind them.
//!
//! Trusted: the kernel. The memory is shared with the VM, which may write it at any time; it is reached by volatile
//! copies of single words and bytes, and by atomic instructions on single bytes, never as a reference.
#![allow(
    unsafe_code,
    reason = "ioctl and mmap are unsafe; nothing else in this crate is"
)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicU8, Ordering};

use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::ring::Memory;

/// Bytes of a page.
const PAGE: usize = 4096;
/// `GNTALLOC_FLAG_WRITABLE`.
const WRITABLE: u16 = 1;
/// `UNMAP_NOTIFY_CLEAR_BYTE | UNMAP_NOTIFY_SEND_EVENT`.
const CLEAR_AND_SEND: u32 = 3;

/// `struct ioctl_gntalloc_alloc_gref`, for one page.
#[repr(C)]
#[derive(Debug)]
struct AllocateGrant {
    domid: u16,
    flags: u16,
    count: u32,
    index: u64,
    gref: u32,
    pad: u32,
}

/// `struct ioctl_gntdev_map_grant_ref`, for one page.
#[repr(C)]
#[derive(Debug)]
struct MapGrant {
    count: u32,
    pad: u32,
    index: u64,
    domid: u32,
    gref: u32,
}

/// `struct ioctl_gntalloc_dealloc_gref` and `struct ioctl_gntdev_unmap_grant_ref`.
#[repr(C)]
#[derive(Debug)]
struct Forget {
    index: u64,
    count: u32,
    pad: u32,
}

/// `struct ioctl_gntalloc_unmap_notify` and its twin of gntdev.
#[repr(C)]
#[derive(Debug)]
struct UnmapNotify {
    index: u64,
    action: u32,
    event_channel_port: u32,
}

const _: () = assert!(size_of::<AllocateGrant>() == 24 && size_of::<MapGrant>() == 24);
const _: () = assert!(size_of::<Forget>() == 16 && size_of::<UnmapNotify>() == 16);

/// `_IOC(_IOC_NONE, group, number, size)`.
const fn request(group: u8, number: u8, size: usize) -> u64 {
    ((size as u64) << 16) | ((group as u64) << 8) | number as u64
}

/// Calls a device with a structure of the size that the request names. Returns what the device returns.
fn control<T>(file: &File, group: u8, number: u8, argument: &mut T) -> io::Result<i32> {
    let request = request(group, number, size_of::<T>());
    // SAFETY: `argument` is a live, exclusive structure of exactly the size that the request announces, laid out as the
    // kernel's header says (asserted above); the kernel writes inside it only.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, core::ptr::from_mut(argument)) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// What a page came from, to give it back.
#[derive(Debug)]
enum Origin {
    /// Ours, granted to the VM.
    Granted,
    /// The VM's, mapped.
    Mapped,
}

/// A page shared with the VM.
#[derive(Debug)]
pub struct Page {
    base: NonNull<u8>,
    file: Rc<File>,
    index: u64,
    origin: Origin,
    gref: u32,
}

impl Page {
    fn map(file: &Rc<File>, index: u64, origin: Origin, gref: u32) -> io::Result<Self> {
        let len = NonZeroUsize::new(PAGE).ok_or_else(|| io::Error::other("no length"))?;
        let offset = i64::try_from(index).map_err(io::Error::other)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice, of the device that was just asked for it.
        let base = unsafe {
            mmap(
                None,
                len,
                protection,
                MapFlags::MAP_SHARED,
                file.as_fd(),
                offset,
            )
        };
        Ok(Self {
            base: base?.cast(),
            file: Rc::clone(file),
            index,
            origin,
            gref,
        })
    }

    /// The grant reference.
    #[must_use]
    pub const fn gref(&self) -> u32 {
        self.gref
    }

    /// When this page goes, the kernel clears the byte at `offset` and sends an event on `port`: also if we crash.
    ///
    /// # Errors
    ///
    /// The device's.
    pub fn notify_when_gone(&self, offset: u64, port: u32) -> io::Result<()> {
        let mut argument = UnmapNotify {
            index: self.index + offset,
            action: CLEAR_AND_SEND,
            event_channel_port: port,
        };
        control(&self.file, b'G', 7, &mut argument).map(|_| ())
    }

    /// The address of `len` bytes at `offset`.
    fn at(&self, offset: usize, len: usize) -> NonNull<u8> {
        assert!(offset + len <= PAGE, "outside of the page");
        // SAFETY: inside the mapping (asserted), which lives as long as `self`.
        unsafe { self.base.add(offset) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and nobody keeps an address beyond a call.
        let _ = unsafe { munmap(self.base.cast(), PAGE) };
        let mut argument = Forget {
            index: self.index,
            count: 1,
            pad: 0,
        };
        let number = match self.origin {
            Origin::Granted => 6,
            Origin::Mapped => 1,
        };
        // The program has no use for the error, and the kernel cleans up when the device is closed.
        let _ = control(&self.file, b'G', number, &mut argument);
    }
}

impl Memory for Page {
    fn read_u32(&self, offset: usize) -> u32 {
        assert!(offset.is_multiple_of(4), "unaligned");
        // SAFETY: inside the mapping (`at`) and aligned. The VM may write at the same time; a word is always whole.
        unsafe { self.at(offset, 4).cast::<u32>().read_volatile() }
    }

    fn write_u32(&self, offset: usize, value: u32) {
        assert!(offset.is_multiple_of(4), "unaligned");
        // SAFETY: as in `read_u32`.
        unsafe { self.at(offset, 4).cast::<u32>().write_volatile(value) }
    }

    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        let from = self.at(offset, to.len());
        for (index, byte) in to.iter_mut().enumerate() {
            // SAFETY: inside the mapping (`at` checked the whole range).
            let address = unsafe { from.add(index) };
            // SAFETY: as above; a byte is always whole.
            *byte = unsafe { address.read_volatile() };
        }
    }

    fn write_bytes(&self, offset: usize, from: &[u8]) {
        let to = self.at(offset, from.len());
        for (index, byte) in from.iter().enumerate() {
            // SAFETY: inside the mapping (`at` checked the whole range).
            let address = unsafe { to.add(index) };
            // SAFETY: as above.
            unsafe { address.write_volatile(*byte) };
        }
    }

    fn or_byte(&self, offset: usize, bits: u8) {
        let address = self.at(offset, 1);
        // SAFETY: inside the mapping, and bytes need no alignment; the VM's accesses to it are single bytes too.
        let byte = unsafe { AtomicU8::from_ptr(address.as_ptr()) };
        byte.fetch_or(bits, Ordering::SeqCst);
    }

    fn take_bits(&self, offset: usize, bits: u8) -> u8 {
        let address = self.at(offset, 1);
        // SAFETY: as in `or_byte`.
        let byte = unsafe { AtomicU8::from_ptr(address.as_ptr()) };
        byte.fetch_and(!bits, Ordering::SeqCst) & bits
    }
}

/// The devices, open.
#[derive(Debug)]
pub struct Devices {
    grants: Rc<File>,
    maps: Rc<File>,
    events: File,
}

fn open(path: &str) -> io::Result<File> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))
}

impl Devices {
    /// Opens all three.
    ///
    /// # Errors
    ///
    /// Which of them is missing.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            grants: Rc::new(open("/dev/xen/gntalloc")?),
            maps: Rc::new(open("/dev/xen/gntdev")?),
            events: open("/dev/xen/evtchn")?,
        })
    }

    /// A zeroed page of ours that `domid` may read and write.
    ///
    /// # Errors
    ///
    /// The device's, for instance when the module's limit is reached.
    pub fn grant(&self, domid: u16) -> io::Result<Page> {
        let mut argument = AllocateGrant {
            domid,
            flags: WRITABLE,
            count: 1,
            index: 0,
            gref: 0,
            pad: 0,
        };
        control(&self.grants, b'G', 5, &mut argument)?;
        Page::map(&self.grants, argument.index, Origin::Granted, argument.gref)
    }

    /// A page of `domid`'s.
    ///
    /// # Errors
    ///
    /// The device's, for instance when it was not granted to us.
    pub fn map(&self, domid: u16, gref: u32) -> io::Result<Page> {
        let mut argument = MapGrant {
            count: 1,
            pad: 0,
            index: 0,
            domid: domid.into(),
            gref,
        };
        control(&self.maps, b'G', 0, &mut argument)?;
        Page::map(&self.maps, argument.index, Origin::Mapped, gref)
    }

    /// A new port that `domid` may bind to.
    ///
    /// # Errors
    ///
    /// The device's.
    pub fn allocate_port(&self, domid: u16) -> io::Result<u32> {
        let mut argument = u32::from(domid);
        let port = control(&self.events, b'E', 2, &mut argument)?;
        u32::try_from(port).map_err(io::Error::other)
    }

    /// A new port bound to `remote` of `domid`.
    ///
    /// # Errors
    ///
    /// The device's, for instance when that port is not for us.
    pub fn bind_port(&self, domid: u16, remote: u32) -> io::Result<u32> {
        let mut argument = [u32::from(domid), remote];
        let port = control(&self.events, b'E', 1, &mut argument)?;
        u32::try_from(port).map_err(io::Error::other)
    }

    /// Closes a port.
    pub fn close_port(&self, mut port: u32) {
        let _ = control(&self.events, b'E', 3, &mut port);
    }

    /// Sends an event. The other end may be gone.
    pub fn notify(&self, mut port: u32) {
        let _ = control(&self.events, b'E', 4, &mut port);
    }

    /// The descriptor to wait on for events.
    #[must_use]
    pub const fn events(&self) -> &File {
        &self.events
    }

    /// Takes the ports that have events and lets them have more. Call it when [`Devices::events`] is readable.
    ///
    /// # Errors
    ///
    /// The device's.
    pub fn take_events(&self) -> io::Result<()> {
        let mut ports = [0u8; 4 * 256];
        let read = (&self.events).read(&mut ports)?;
        // Written back, a port may have an event again.
        let taken = ports.get(..read).unwrap_or_default();
        (&self.events).write_all(taken)
    }
}
