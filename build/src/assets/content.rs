//! What goes into the root archives of dom0 and the guests.
//!
//! Scripts live in `build/lab/`; the addresses and servers of the "internet"
//! come from [`crate::lab::internet`]; programs and modules are listed here.

use crate::lab::internet;

/// Programs from the Debian packages, put into `/bin`.
pub const DOM0_PROGRAMS: &[&str] = &[
    "xl",
    "xenstored",
    "xenconsoled",
    "xenconsole",
    "xen-init-dom0",
    "xentop",
    "lsevtchn",
    "xenstore",
    "iperf3",
];

/// Programs of a client.
pub const GUEST_PROGRAMS: &[&str] = &["iperf3"];

/// Programs that only a Linux firewall needs, beside a client's.
pub const FIREWALL_PROGRAMS: &[&str] = &["xl", "xenstore", "nft", "conntrack"];

/// Loaded at run time, so in nobody's `NEEDED` list: without it the background
/// half of `xl create` aborts ("libgcc_s.so.1 must be installed for
/// pthread_cancel to work"), and a guest's power-off goes unnoticed.
pub const EXTRA_LIBRARIES: &[&str] = &["libgcc_s.so.1"];

/// The names under which the one program `xenstore` acts.
pub const XENSTORE_NAMES: &[&str] = &[
    "chmod", "exists", "list", "ls", "read", "rm", "watch", "write",
];

/// Modules of dom0: Xen's interfaces, the uplink backend, the "internet", the
/// control port.
pub const DOM0_MODULES: &[&str] = &[
    "xen-privcmd",
    "xenfs",
    "xen-evtchn",
    "xen-gntdev",
    "xen-gntalloc",
    "xen-netback",
    "dummy",
    "virtio_pci",
    "virtio_console",
];

/// Modules of a client: the frontend, and what a hostile program would use.
pub const GUEST_MODULES: &[&str] = &[
    "xen-netfront",
    "xenfs",
    "xen-evtchn",
    "xen-gntalloc",
    "xen-gntdev",
    "xen-privcmd",
];

/// Modules that only a Linux firewall needs, beside a client's.
pub const FIREWALL_MODULES: &[&str] = &[
    "xen-netback",
    "nf_tables",
    "nf_conntrack",
    "nft_ct",
    "nft_nat",
    "nft_masq",
    "nft_chain_nat",
    "nft_reject_inet",
    "nf_conntrack_netlink",
];

/// Packages beside the hypervisor, its tools and the kernel, whose names hold
/// version numbers.
pub const PACKAGES: &[&str] = &[
    "xenstore-utils",
    "busybox-static",
    "libc6",
    "libgcc-s1",
    "iperf3",
    "nftables",
    "conntrack",
];

/// A text file of a root archive.
#[derive(Debug, Clone)]
pub struct Text {
    /// Absolute path.
    pub path: &'static str,
    /// Permission bits.
    pub mode: u32,
    /// Its content.
    pub content: String,
}

fn script(path: &'static str, content: &str) -> Text {
    Text {
        path,
        mode: 0o755,
        content: content.to_owned(),
    }
}

fn plain(path: &'static str, content: impl Into<String>) -> Text {
    Text {
        path,
        mode: 0o644,
        content: content.into(),
    }
}

/// Files of dom0.
#[must_use]
pub fn dom0_texts() -> Vec<Text> {
    vec![
        script("init", include_str!("../../lab/dom0-init")),
        script(
            "etc/xen/scripts/vif-lab",
            include_str!("../../lab/vif-route"),
        ),
        plain("etc/xen/xl.conf", ""),
        plain(
            "etc/lab/settings",
            format!(
                "role=dom0\nip={}\nip6={}\n",
                internet::UPLINK,
                internet::UPLINK6
            ),
        ),
        plain("etc/lab/addresses", internet::interface_addresses()),
        plain("etc/lab/services", internet::service_arguments()),
        plain("etc/lab/web", internet::web_addresses()),
        plain("etc/lab/iperf", internet::iperf_addresses()),
    ]
}

/// Files of every Linux guest.
#[must_use]
pub fn guest_texts() -> Vec<Text> {
    vec![
        script("init", include_str!("../../lab/guest-init")),
        script("etc/lab/link-up", include_str!("../../lab/link-up")),
    ]
}

/// Files of a Linux firewall, beside a guest's.
#[must_use]
pub fn firewall_texts() -> Vec<Text> {
    vec![
        script("etc/lab/firewall-up", include_str!("../../lab/firewall-up")),
        script(
            "etc/xen/scripts/vif-fw",
            include_str!("../../lab/vif-route"),
        ),
        plain("etc/xen/xl.conf", ""),
        plain(
            "etc/lab/firewall.nft",
            include_str!("../../lab/firewall.nft"),
        ),
    ]
}
