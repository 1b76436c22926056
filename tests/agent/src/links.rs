//! `lab links`: what udev does for network interfaces on a full system.
//!
//! A vif that is detached and attached again is a new interface without
//! addresses. The kernel announces links on a netlink group; each announcement
//! only makes us look at `/sys/class/net`, so nothing in it needs parsing.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read as _;
use std::process::{Command, ExitCode};

use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket,
};

use crate::Outcome;

/// Group of link announcements (`RTMGRP_LINK` in `linux/rtnetlink.h`).
const LINK_GROUP: u32 = 1;

/// Runs `lab links SCRIPT`, for ever.
pub(crate) fn command(mut arguments: lexopt::Parser) -> Outcome {
    let script = arguments.value()?;
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    bind(
        std::os::fd::AsRawFd::as_raw_fd(&netlink),
        &NetlinkAddr::new(0, LINK_GROUP),
    )?;
    let mut announcements = File::from(netlink);
    let mut known = HashSet::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let present = ethernet_links();
        for (name, _) in present.difference(&known) {
            match Command::new(&script).arg(name).status() {
                Ok(status) if status.success() => {}
                Ok(status) => eprintln!("lab links: {}: {status}", name.display()),
                Err(error) => eprintln!("lab links: {}: {error}", name.display()),
            }
        }
        known = present;
        // An overrun (ENOBUFS) also means that there is something to look at.
        if let Ok(0) = announcements.read(&mut buffer) {
            return Ok(ExitCode::FAILURE);
        }
    }
}

/// Name and index of every `eth*`; a link that comes back has a new index.
fn ethernet_links() -> HashSet<(OsString, String)> {
    let Ok(links) = fs::read_dir("/sys/class/net") else {
        return HashSet::new();
    };
    links
        .flatten()
        .filter(|link| link.file_name().to_string_lossy().starts_with("eth"))
        .filter_map(|link| {
            let index = fs::read_to_string(link.path().join("ifindex")).ok()?;
            Some((link.file_name(), index))
        })
        .collect()
}
