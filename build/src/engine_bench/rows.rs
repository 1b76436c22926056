//! The rows of the engine's bench: which workload, with which goal of `performance.md` 1.1, and what peers
//! need for the same, as that document quotes them.

/// What a row must be.
#[derive(Clone, Copy, Debug)]
pub(super) enum Goal {
    /// At most this many.
    Most(f64),
    /// At most this often the count of another row.
    Ratio(f64, &'static str),
    /// As another row, but for this many.
    Same(f64, &'static str),
    /// There is none; the figure is for comparison.
    None,
}

/// What is run, and what of it is counted.
#[derive(Clone, Copy, Debug)]
pub(super) enum Run {
    /// Workload, flows, clients, rules, as the program takes them; the packet path is counted.
    Frames([&'static str; 4]),
    /// The same; the control plane is counted.
    Control([&'static str; 4]),
    /// The same; the longest call of the control plane is counted.
    Longest([&'static str; 4]),
    /// A building block.
    Block(&'static str),
}

impl Run {
    /// How many flows it begins with.
    pub(super) fn flows(&self) -> u32 {
        match self {
            Self::Frames([_, flows, ..])
            | Self::Control([_, flows, ..])
            | Self::Longest([_, flows, ..]) => flows.parse().unwrap_or(0),
            Self::Block(_) => 0,
        }
    }
}

/// A row of the table of instruction counts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    /// The goal's number, or the workload's.
    pub(super) id: &'static str,
    /// What it is called; unique.
    pub(super) name: &'static str,
    pub(super) run: Run,
    pub(super) goal: Goal,
    /// What a peer needs for the same, as `performance.md` quotes it.
    pub(super) peer: &'static str,
}

const fn row(
    id: &'static str,
    name: &'static str,
    run: [&'static str; 4],
    goal: Goal,
    peer: &'static str,
) -> Row {
    Row {
        id,
        name,
        run: Run::Frames(run),
        goal,
        peer,
    }
}

/// A row without goal and peers.
const fn other(id: &'static str, name: &'static str, run: Run) -> Row {
    Row {
        id,
        name,
        run,
        goal: Goal::None,
        peer: "",
    }
}

/// A building block.
const fn block(name: &'static str, block: &'static str) -> Row {
    other("W20", name, Run::Block(block))
}

const LINUX_EST: &str = "Linux nftables 8,800; Click 750; mirage-nat 22,800";
const LINUX_NEW: &str = "Linux 29,700 to 38,400; mirage-nat 74,500";

/// The rows in the order of the goals, then of the workloads.
pub(super) const ROWS: &[Row] = &[
    row(
        "P1",
        "established TCP, up",
        ["est-up", "1024", "250", "50"],
        Goal::Most(400.0),
        LINUX_EST,
    ),
    row(
        "P1",
        "established TCP, down",
        ["est-down", "1024", "250", "50"],
        Goal::Most(400.0),
        "",
    ),
    row(
        "P2",
        "established UDP, up",
        ["udp-up", "1024", "250", "50"],
        Goal::Most(340.0),
        "",
    ),
    row(
        "P2",
        "established UDP, down",
        ["udp-down", "1024", "250", "50"],
        Goal::Most(340.0),
        "",
    ),
    row(
        "P3",
        "established TCP, 1500 bytes",
        ["large", "1024", "250", "50"],
        Goal::Same(2.0, "established TCP, up"),
        "Linux 8,980; mirage-nat 23,500",
    ),
    row(
        "P7",
        "new TCP flow, 1 client",
        ["new", "1024", "1", "50"],
        Goal::Most(1400.0),
        LINUX_NEW,
    ),
    row(
        "P7",
        "new TCP flow, 250 clients",
        ["new", "1024", "250", "50"],
        Goal::Most(1400.0),
        "",
    ),
    row(
        "P9",
        "spoofed source",
        ["spoof", "1024", "250", "50"],
        Goal::Most(250.0),
        "",
    ),
    row(
        "P9",
        // What somebody sends in numbers is dropped: the rate limit of ICMP errors has long been used up.
        "refused by a rule, one client's flood",
        ["refused-limited", "1024", "1", "50"],
        Goal::Most(700.0),
        "",
    ),
    row(
        "P10",
        "established, 1 rule",
        ["est-up", "1024", "1", "1"],
        Goal::None,
        "",
    ),
    row(
        "P10",
        "established, 10,000 rules",
        ["est-up", "1024", "1", "10000"],
        Goal::Same(0.1, "established, 1 rule"),
        "",
    ),
    row(
        "P10",
        "new, 1 rule",
        ["new", "1024", "1", "1"],
        Goal::None,
        "Linux 2.8 us",
    ),
    row(
        "P10",
        "new, 10,000 rules",
        ["new", "1024", "1", "10000"],
        Goal::Ratio(1.3, "new, 1 rule"),
        "Linux 85.5 us",
    ),
    row(
        "P11",
        "established, 1 client",
        ["est-up", "1024", "1", "50"],
        Goal::None,
        "",
    ),
    row(
        "P11",
        "established, 250 clients",
        ["est-up", "1024", "250", "50"],
        Goal::Ratio(1.02, "established, 1 client"),
        "",
    ),
    row(
        "P11",
        "new, 250 clients",
        ["new", "1024", "250", "50"],
        Goal::Ratio(1.02, "new TCP flow, 1 client"),
        "Linux x 1.10",
    ),
    row(
        "P12",
        "established, 1 flow",
        ["est-up", "1", "1", "50"],
        Goal::None,
        "",
    ),
    row(
        "P12",
        "established, 65,536 flows",
        ["est-up", "65536", "250", "50"],
        Goal::Ratio(1.03, "established, 1 flow"),
        "mirage-nat x 5",
    ),
    row(
        "P12",
        "established, 1,048,576 flows",
        ["est-up", "1048576", "250", "50"],
        Goal::Ratio(1.03, "established, 1 flow"),
        "",
    ),
    row(
        "P16",
        "expiry, per flow",
        ["expire", "16384", "250", "50"],
        Goal::Most(40.0),
        "",
    ),
    Row {
        id: "P16",
        name: "expiry of 1,048,576 idle flows, per flow",
        run: Run::Control(["idle", "1048576", "250", "50"]),
        goal: Goal::Most(40.0),
        peer: "",
    },
    Row {
        id: "P16",
        name: "expiry, most in one turn of the main loop",
        run: Run::Longest(["idle", "16384", "250", "50"]),
        goal: Goal::Most(2000.0),
        peer: "",
    },
    row(
        "P17",
        "established, others' packets in a flood",
        ["under-flood", "65536", "250", "50"],
        Goal::Ratio(1.03, "established, 65,536 flows"),
        "",
    ),
    row(
        "P18",
        "full table, every flow new",
        ["full", "16384", "250", "50"],
        Goal::Ratio(1.15, "new TCP flow, 250 clients"),
        "",
    ),
    other(
        "W3",
        "established UDP, 65,536 flows",
        Run::Frames(["udp-up", "65536", "250", "50"]),
    ),
    other(
        "W3",
        "UDP without checksum, up",
        Run::Frames(["udp-unsummed-up", "1024", "250", "50"]),
    ),
    other(
        "W3",
        "UDP without checksum, down",
        Run::Frames(["udp-unsummed-down", "1024", "250", "50"]),
    ),
    row(
        "W4",
        "established IPv6, up",
        ["est6-up", "1024", "250", "50"],
        Goal::None,
        "",
    ),
    row(
        "W4",
        "established IPv6, down",
        ["est6-down", "1024", "250", "50"],
        Goal::None,
        "",
    ),
    other(
        "W4",
        "established IPv6, 65,536 flows",
        Run::Frames(["est6-up", "65536", "250", "50"]),
    ),
    other(
        "W5",
        "new TCP flow, 65,536 live flows",
        Run::Frames(["new", "65536", "250", "50"]),
    ),
    other(
        "W5",
        "new, 1,000 rules",
        Run::Frames(["new", "1024", "1", "1000"]),
    ),
    other(
        "W6",
        "refused by a rule, ICMP error built",
        Run::Frames(["refused", "1024", "250", "50"]),
    ),
    other(
        "W6",
        "refused by a rule, ICMP errors limited",
        Run::Frames(["refused-limited", "1024", "250", "50"]),
    ),
    row(
        "W8",
        "DNS to a virtual resolver",
        ["dns-up", "1024", "250", "50"],
        Goal::None,
        "",
    ),
    row(
        "W8",
        "DNS answer",
        ["dns-down", "1024", "250", "50"],
        Goal::None,
        "",
    ),
    other(
        "W8",
        "DNS over TCP to a virtual resolver",
        Run::Frames(["dns-tcp-up", "1024", "250", "50"]),
    ),
    other(
        "W8",
        "DNS over TCP, answer",
        Run::Frames(["dns-tcp-down", "1024", "250", "50"]),
    ),
    row(
        "W9",
        "echo request of a flow",
        ["echo", "1024", "250", "50"],
        Goal::None,
        "",
    ),
    other(
        "W9",
        "echo reply of a flow",
        Run::Frames(["echo-down", "1024", "250", "50"]),
    ),
    row(
        "W9",
        "unreachable with a translated TCP header",
        ["unreachable", "1024", "250", "50"],
        Goal::None,
        "",
    ),
    row(
        "W10",
        "connections from SYN to FIN, per packet",
        ["life", "0", "250", "50"],
        Goal::None,
        "",
    ),
    row(
        "W11",
        "64 KiB TCP frame, headers only",
        ["gso", "64", "250", "50"],
        Goal::None,
        "",
    ),
    other(
        "W12",
        "cutting 64 KiB, receiver sums (kernel)",
        Run::Block("cut-blank"),
    ),
    other(
        "W12",
        "cutting 64 KiB, we sum (kernel)",
        Run::Block("cut-summed"),
    ),
    row(
        "W13",
        "fragments in order",
        ["frag", "0", "250", "50"],
        Goal::None,
        "",
    ),
    row(
        "W13",
        "fragments in reverse",
        ["frag-reversed", "0", "250", "50"],
        Goal::None,
        "",
    ),
    row(
        "W13",
        "fragments that overlap",
        ["frag-overlap", "0", "250", "50"],
        Goal::None,
        "",
    ),
    row(
        "W15",
        "every other packet a flood's",
        ["flood", "16384", "250", "50"],
        Goal::None,
        "",
    ),
    row(
        "W18",
        "mixed sizes, 1 % new flows",
        ["imix", "16384", "250", "50"],
        Goal::None,
        "",
    ),
    other(
        "W17",
        "replacing 50 rules, in all",
        Run::Control(["replace", "1024", "250", "50"]),
    ),
    other(
        "W17",
        "replacing 50 rules, longest step",
        Run::Longest(["replace", "1024", "250", "50"]),
    ),
    other(
        "W17",
        "replacing 1,000 rules, in all",
        Run::Control(["replace", "1024", "250", "1000"]),
    ),
    other(
        "W17",
        "replacing 1,000 rules, longest step",
        Run::Longest(["replace", "1024", "250", "1000"]),
    ),
    other(
        "W17",
        "replacing 10,000 rules, in all",
        Run::Control(["replace", "1024", "250", "10000"]),
    ),
    other(
        "W17",
        "replacing 10,000 rules, longest step",
        Run::Longest(["replace", "1024", "250", "10000"]),
    ),
    other(
        "W19",
        "rule lookup, 1 rule",
        Run::Frames(["lookup", "0", "0", "1"]),
    ),
    other(
        "W19",
        "rule lookup, 50 rules",
        Run::Frames(["lookup", "0", "0", "50"]),
    ),
    other(
        "W19",
        "rule lookup, 250 rules",
        Run::Frames(["lookup", "0", "0", "250"]),
    ),
    other(
        "W19",
        "rule lookup, 1,000 rules",
        Run::Frames(["lookup", "0", "0", "1000"]),
    ),
    other(
        "W19",
        "rule lookup, 10,000 rules",
        Run::Frames(["lookup", "0", "0", "10000"]),
    ),
    block("hash of a key", "hash"),
    block("table lookup, present", "lookup"),
    block("table lookup, absent", "lookup-absent"),
    block("table insertion", "insert"),
    block("table removal", "remove"),
    block("port allocator, port is free", "port"),
    block("port allocator, port is taken", "port-taken"),
    block("header checksum, check", "header-check"),
    block("checksum, incremental update", "checksum-update"),
    block("checksum of 1,460 bytes", "checksum-1460"),
    row(
        "peer",
        "smoltcp: read and write a TCP packet",
        ["smoltcp", "1024", "250", "50"],
        Goal::None,
        "at 1500 bytes 3,350",
    ),
    row(
        "peer",
        "etherparse: read and write a TCP packet",
        ["etherparse", "1024", "250", "50"],
        Goal::None,
        "",
    ),
];

/// A row of nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Time {
    pub(super) id: &'static str,
    pub(super) name: &'static str,
    pub(super) run: [&'static str; 4],
    pub(super) goal: Goal,
    /// What a peer needs for the same, as `performance.md` quotes it.
    pub(super) peer: &'static str,
}

const fn time(
    id: &'static str,
    name: &'static str,
    run: [&'static str; 4],
    goal: Goal,
    peer: &'static str,
) -> Time {
    Time {
        id,
        name,
        run,
        goal,
        peer,
    }
}

/// The rows of nanoseconds. What a goal refers to comes first.
pub(super) const TIMES: &[Time] = &[
    time(
        "P12",
        "established, 1 flow",
        ["est-up", "1", "1", "50"],
        Goal::None,
        "",
    ),
    time(
        "P4",
        "established, 1,024 flows",
        ["est-up", "1024", "250", "50"],
        Goal::Most(40.0),
        "VPP 96; OPTE 320; Linux 743",
    ),
    time(
        "P5",
        "established, 65,536 flows",
        ["est-up", "65536", "250", "50"],
        Goal::Most(50.0),
        "VPP 302; Linux 1,230",
    ),
    time(
        "P6",
        "established, 1,048,576 flows",
        ["est-up", "1048576", "250", "50"],
        Goal::Most(70.0),
        "",
    ),
    time(
        "P12",
        "established, 1,048,576 flows against 1",
        ["est-up", "1048576", "250", "50"],
        Goal::Ratio(4.0, "established, 1 flow"),
        "Linux x 1.6 at 65,536",
    ),
    time(
        "P8",
        "new flow, 65,536 flows",
        ["new", "65536", "250", "50"],
        Goal::Most(220.0),
        "VPP 1,200; Linux 2,900",
    ),
];

/// What compiling rules may take: rules, bytes for each, microseconds in one go.
pub(super) const COMPILATIONS: &[(&str, Option<(f64, f64)>)] = &[
    ("1", None),
    ("50", Some((96.0, 60.0))),
    ("250", None),
    ("1000", Some((96.0, 600.0))),
    ("10000", Some((96.0, 8000.0))),
];
