//! The byte traces of the protocol's description, and the pitfalls that can be seen in bytes.
//!
//! The other side is played by hand here: the test writes what dom0 writes and compares every byte that comes back.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;
use core::time::Duration;

use xen::DomId;
use xen::stream::ByteStream;

use super::{Agent, Command, Host, Output, Step, Uplink, exit};
use crate::vchan::channels::{Channels, Phase};
use crate::vchan::layout::Orders;
use crate::vchan::pipes::{Net, PipeChannel, PipeChannels};

const VM: DomId = DomId(7);
const HELLO_3: &[u8] = b"\x00\x03\0\0\x04\0\0\0\x03\0\0\0";
const HELLO_4: &[u8] = b"\x00\x03\0\0\x04\0\0\0\x04\0\0\0";
const STDOUT_END: &[u8] = b"\x91\x01\0\0\0\0\0\0";
const STDERR_END: &[u8] = b"\x92\x01\0\0\0\0\0\0";
const STDIN_END: &[u8] = b"\x90\x01\0\0\0\0\0\0";
const TERMINATED_513: &[u8] = b"\x11\x02\0\0\x08\0\0\0\0\0\0\0\x01\x02\0\0";

/// A firewall that knows a few commands.
struct Firewall {
    uplink: Uplink,
    events: Vec<String>,
}

impl Host for Firewall {
    fn run(&mut self, command: &Command<'_>, out: &mut Output) -> Step {
        self.events.push(command.words.join(" "));
        match command.words {
            ["status"] => {
                let _ = out.stdout().write_str("fine\n");
                Step::Exit(exit::OK)
            }
            ["flood"] => {
                let _ = out.stdout().write_str(&"x".repeat(200_000));
                Step::Exit(exit::OK)
            }
            ["long"] => {
                for number in 0..200 {
                    let _ = writeln!(out.stdout(), "line {}", command.cursor + number);
                }
                match command.cursor {
                    19_800.. => Step::Exit(exit::OK),
                    cursor => Step::Again(cursor + 200),
                }
            }
            _ => {
                let _ = out.stderr().write_str("unknown command; try help\n");
                Step::Exit(exit::UNKNOWN)
            }
        }
    }

    fn uplink(&self) -> Uplink {
        self.uplink
    }

    fn suspending(&mut self) {
        self.events.push("suspending".into());
    }

    fn resumed(&mut self) {
        self.events.push("resumed".into());
    }

    fn told_time(&mut self, unix_seconds: i64) {
        self.events.push(alloc::format!("time {unix_seconds}"));
    }
}

struct Bench {
    net: Net,
    dom0: PipeChannels,
    vm: PipeChannels,
    agent: Agent<PipeChannel>,
    firewall: Firewall,
    control: PipeChannel,
}

fn message(kind: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    [&kind.to_le_bytes()[..], &len.to_le_bytes(), payload].concat()
}

fn exit_code(code: u8) -> Vec<u8> {
    message(0x193, &[code, 0, 0, 0])
}

fn refusal(text: &str, code: u8) -> Vec<u8> {
    [
        &message(0x192, text.as_bytes()),
        STDOUT_END,
        STDERR_END,
        &exit_code(code),
    ]
    .concat()
}

impl Bench {
    fn new() -> Self {
        let net = Net::default();
        let (mut dom0, vm) = (net.domain(DomId::DOM0), net.domain(VM));
        let control = dom0.connect(VM, 512).unwrap();
        let mut bench = Self {
            dom0,
            vm,
            net,
            agent: Agent::new(),
            firewall: Firewall {
                uplink: Uplink::Absent,
                events: Vec::new(),
            },
            control,
        };
        bench.greet();
        bench
    }

    /// Both greet on the control channel.
    fn greet(&mut self) {
        self.poll();
        assert_eq!(self.dom0.progress(&mut self.control), Phase::Open);
        self.poll();
        assert_eq!(self.heard(), HELLO_3, "the agent greets first");
        self.say(HELLO_4);
    }

    fn poll(&mut self) {
        for _ in 0..200 {
            if !self.agent.poll(&mut self.vm, &mut self.firewall).more {
                return;
            }
        }
        panic!("the agent does not come to rest");
    }

    /// What dom0 finds on the control channel.
    fn heard(&mut self) -> Vec<u8> {
        self.poll();
        drain(&mut self.control)
    }

    fn say(&mut self, bytes: &[u8]) {
        assert_eq!(
            self.control.write(bytes),
            Ok(bytes.len()),
            "it fits the ring at once"
        );
        self.poll();
    }

    /// dom0 offers a data channel on port 513 and asks for a call.
    fn call(&mut self, kind: u32, line: &str) -> PipeChannel {
        let server = self.dom0.listen(VM, 513, Orders::QREXEC_DATA).unwrap();
        let numbers = [0, 0, 0, 0, 1, 2, 0, 0];
        let exec = message(kind, &[&numbers, line.as_bytes(), b"\0"].concat());
        self.say(&exec);
        server
    }

    /// Makes a whole call with `input`; returns what came on the data channel, until it was closed.
    fn whole_call(&mut self, kind: u32, line: &str, input: &[u8]) -> Vec<u8> {
        let mut data = self.call(kind, line);
        let mut sent = [HELLO_4, input].concat();
        let mut heard = Vec::new();
        for _ in 0..10_000 {
            if let Ok(written) = data.write(&sent) {
                sent.drain(..written);
            }
            self.poll();
            heard.extend(drain(&mut data));
            if self.dom0.progress(&mut data) == Phase::Closed {
                heard.extend(drain(&mut data));
                return heard;
            }
        }
        panic!("the call does not end");
    }
}

fn drain(stream: &mut PipeChannel) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(read @ 1..) = stream.read(&mut buffer) {
        all.extend_from_slice(&buffer[..read]);
    }
    all
}

#[test]
fn trace_a_qvm_run_through_vmshell() {
    for line in [
        "user:QUBESRPC qubes.VMShell+ dom0",
        "user:QUBESRPC qubes.VMShell dom0",
    ] {
        let mut bench = Bench::new();
        let input = message(0x190, b"status; exit\n");
        let heard = bench.whole_call(0x200, line, &input);
        let expected = [
            HELLO_3,
            &message(0x191, b"fine\n"),
            STDOUT_END,
            STDERR_END,
            &exit_code(0),
        ];
        assert_eq!(heard, expected.concat());
        assert_eq!(bench.heard(), TERMINATED_513);
    }
}

#[test]
fn trace_a_raw_command() {
    let mut bench = Bench::new();
    let exec = b"\x00\x02\0\0\x14\0\0\0\0\0\0\0\x01\x02\0\0user:status\0";
    let mut data = bench.dom0.listen(VM, 513, Orders::QREXEC_DATA).unwrap();
    bench.say(exec);
    assert_eq!(drain(&mut data), HELLO_3, "we greet at once");
    data.write(HELLO_3).unwrap();
    bench.poll();
    let expected = [
        &message(0x191, b"fine\n"),
        STDOUT_END,
        STDERR_END,
        &exit_code(0),
    ];
    assert_eq!(drain(&mut data), expected.concat());
    assert_eq!(bench.heard(), TERMINATED_513);
}

#[test]
fn trace_b_set_date_time() {
    let mut bench = Bench::new();
    let input = [&message(0x190, b"2026-11-23T04:39:00+00:00\n"), STDIN_END].concat();
    let heard = bench.whole_call(0x200, "root:QUBESRPC qubes.SetDateTime dom0", &input);
    assert_eq!(
        heard,
        [HELLO_3, STDOUT_END, STDERR_END, &exit_code(0)].concat()
    );
    assert_eq!(bench.firewall.events, ["time 1795408740"]);
    let input = [&message(0x190, b"tomorrow"), STDIN_END].concat();
    let heard = bench.whole_call(0x200, "root:QUBESRPC qubes.SetDateTime dom0", &input);
    assert!(heard.ends_with(&exit_code(1)));
}

#[test]
fn trace_c_wait_for_session_with_and_without_plus() {
    for line in [
        "user:QUBESRPC qubes.WaitForSession+ dom0",
        "user:QUBESRPC qubes.WaitForSession dom0",
    ] {
        let mut bench = Bench::new();
        let input = [&message(0x190, b"user"), STDIN_END].concat();
        let heard = bench.whole_call(0x200, line, &input);
        assert_eq!(
            heard,
            [HELLO_3, STDOUT_END, STDERR_END, &exit_code(0)].concat()
        );
        assert_eq!(bench.heard(), TERMINATED_513);
    }
}

#[test]
fn trace_d_unknown_service() {
    let mut bench = Bench::new();
    let heard = bench.whole_call(0x200, "user:QUBESRPC qubes.GetAppmenus dom0", b"");
    let text = "qubes.GetAppmenus: this qube has no such service\n";
    assert_eq!(heard, [HELLO_3, &refusal(text, 127)].concat());
    assert_eq!(bench.heard(), TERMINATED_513);
}

#[test]
fn trace_e_just_exec_is_answered_with_the_exit_code_alone() {
    for (line, code) in [
        ("user:QUBESRPC qubes.VMShell+ dom0", 0),
        ("user:status", 0),
        ("user:QUBESRPC qubes.Nothing dom0", 127),
        ("malformed", 125),
    ] {
        let mut bench = Bench::new();
        let heard = bench.whole_call(0x201, line, b"");
        assert_eq!(heard, [HELLO_3, &exit_code(code)].concat(), "{line}");
        assert_eq!(bench.heard(), TERMINATED_513);
    }
}

#[test]
fn trace_f_our_own_call_accepted_and_refused() {
    let mut bench = Bench::new();
    let now = bench.vm.now();
    bench
        .agent
        .call("dom0", "qubes.FeaturesRequest", b"", now)
        .unwrap();
    let trigger = bench.heard();
    assert_eq!(trigger[..8], *b"\x12\x02\0\0\x76\0\0\0");
    let ident = trigger[72..104].to_vec();
    assert_eq!(ident[..11], *b"PC00000001\0");
    let accept = message(0x202, &[&[0, 0, 0, 0, 1, 2, 0, 0], &ident[..]].concat());
    let mut data = bench.dom0.connect(VM, 513).unwrap();
    bench.say(&accept);
    assert_eq!(bench.dom0.progress(&mut data), Phase::Open);
    bench.poll();
    assert_eq!(
        drain(&mut data),
        [HELLO_3, STDIN_END].concat(),
        "a caller greets first"
    );
    let answer = [
        HELLO_4,
        STDERR_END,
        &message(0x191, b"done"),
        STDOUT_END,
        &exit_code(0),
    ];
    data.write(&answer.concat()).unwrap();
    assert_eq!(bench.heard(), TERMINATED_513);
    let answer = bench.agent.take_answer().unwrap();
    assert_eq!((answer.exit, &answer.output[..]), (Some(0), &b"done"[..]));

    bench
        .agent
        .call("@default", "qubes.GetDate+nanoseconds", b"", now)
        .unwrap();
    let trigger = bench.heard();
    bench.say(&message(0x203, &trigger[72..104]));
    assert_eq!(bench.agent.take_answer().unwrap().exit, Some(exit::REFUSED));
    assert!(bench.heard().is_empty(), "a refusal has no end to report");
}

#[test]
fn r1_an_accepted_call_that_nobody_made_is_ended() {
    let mut bench = Bench::new();
    let accept = message(
        0x202,
        &[&[0, 0, 0, 0, 1, 2, 0, 0][..], b"FW0001", &[0; 26]].concat(),
    );
    bench.say(&accept);
    assert_eq!(bench.heard(), TERMINATED_513);
}

#[test]
fn r1_a_call_without_a_channel_is_ended() {
    let mut bench = Bench::new();
    let numbers = [0, 0, 0, 0, 1, 2, 0, 0];
    bench.say(&message(0x200, &[&numbers[..], b"user:status\0"].concat()));
    bench.net.pass(Duration::from_secs(9));
    assert!(bench.heard().is_empty());
    bench.net.pass(Duration::from_secs(2));
    assert_eq!(bench.heard(), TERMINATED_513);
    assert_eq!(bench.net.open_ends(), 2, "the control channel's");
}

#[test]
fn r1_a_call_whose_peer_is_no_domain_is_ended() {
    let mut bench = Bench::new();
    let numbers = [0, 0, 1, 0, 1, 2, 0, 0];
    bench.say(&message(0x200, &[&numbers[..], b"user:status\0"].concat()));
    assert_eq!(bench.heard(), message(0x211, &numbers));
}

#[test]
fn r7_a_call_on_a_port_that_dom0_cannot_mean_is_left_alone() {
    let mut bench = Bench::new();
    for port in [0u32, 512, 769, u32::MAX] {
        let payload = [&[0; 4][..], &port.to_le_bytes(), b"user:status\0"].concat();
        bench.say(&message(0x200, &payload));
        bench.say(&message(
            0x202,
            &[&[0; 4][..], &port.to_le_bytes(), &[b'x'; 32]].concat(),
        ));
    }
    bench.net.pass(Duration::from_secs(60));
    assert!(bench.heard().is_empty());
    assert_eq!(bench.agent.counters().unexpected, 8);
}

#[test]
fn r5_losing_the_control_channel_advertises_a_new_one() {
    let mut bench = Bench::new();
    let _data = bench.call(0x200, "user:QUBESRPC qubes.VMShell dom0");
    assert_eq!(bench.agent.load(), (1, 0));
    let mut dom0 = bench.dom0.clone();
    let fresh = dom0.connect(VM, 512).unwrap();
    dom0.close(core::mem::replace(&mut bench.control, fresh));
    bench.poll();
    assert_eq!(bench.agent.load(), (0, 0), "dom0 has forgotten the call");
    bench.net.pass(Duration::from_secs(1));
    bench.greet();
    assert!(
        bench.heard().is_empty(),
        "no end of a call that the new channel does not know"
    );
    let heard = bench.whole_call(0x200, "user:status", b"");
    assert!(heard.ends_with(&exit_code(0)));
}

#[test]
fn r6_a_daemon_of_version_1_or_without_a_greeting_is_left() {
    for first in [
        message(0x300, &[1, 0, 0, 0]),
        message(0x300, &[3, 0, 0, 0, 0]),
        message(0x300, b""),
        message(0x200, &[0; 20]),
    ] {
        let mut bench = Bench::new();
        let mut dom0 = bench.dom0.clone();
        let fresh = dom0.connect(VM, 512).unwrap();
        dom0.close(core::mem::replace(&mut bench.control, fresh));
        bench.net.pass(Duration::from_secs(1));
        bench.poll();
        bench.net.pass(Duration::from_secs(1));
        bench.poll();
        assert_eq!(bench.dom0.progress(&mut bench.control), Phase::Open);
        assert_eq!(bench.heard(), HELLO_3);
        bench.say(&first);
        assert_eq!(bench.dom0.progress(&mut bench.control), Phase::Closed);
    }
}

#[test]
fn unknown_and_repeated_messages_are_skipped_and_wild_lengths_end_the_channel() {
    let mut bench = Bench::new();
    bench.say(HELLO_3);
    bench.say(&message(0x204, &[7; 50_000]));
    bench.say(&message(0x211, &[0; 8]));
    assert_eq!(bench.agent.counters().unexpected, 3);
    assert!(
        bench
            .whole_call(0x200, "user:status", b"")
            .ends_with(&exit_code(0))
    );
    let mut wild = message(0x204, b"");
    wild[4..8].copy_from_slice(&200_000u32.to_le_bytes());
    bench.say(&wild);
    assert_eq!(bench.dom0.progress(&mut bench.control), Phase::Closed);
}

#[test]
fn v5_the_largest_command_line_fits_the_ring_and_is_refused_with_125() {
    let mut bench = Bench::new();
    let line = alloc::format!("user:{}", "a ".repeat(32_000));
    let heard = bench.whole_call(0x200, &line, b"");
    assert_eq!(
        heard,
        [
            HELLO_3,
            &refusal("the command line is longer than 4096 bytes\n", 125)
        ]
        .concat()
    );
    let line = alloc::format!("user:QUBESRPC qubes.Nothing+{} dom0", "a".repeat(3000));
    let heard = bench.whole_call(0x200, &line, b"");
    assert!(heard.ends_with(&exit_code(127)));
}

#[test]
fn r8_a_call_ends_while_its_input_stays_open() {
    let mut bench = Bench::new();
    let heard = bench.whole_call(
        0x200,
        "user:QUBESRPC qubes.VMShell dom0",
        &message(0x190, b"status\nmore input"),
    );
    assert!(heard.ends_with(&exit_code(0)));
    let heard = bench.whole_call(0x200, "user:status", b"");
    assert!(heard.ends_with(&exit_code(0)));
}

#[test]
fn r4_the_line_ends_before_its_newline_however_it_arrives() {
    let mut bench = Bench::new();
    let mut data = bench.call(0x200, "user:QUBESRPC qubes.VMShell dom0");
    data.write(HELLO_4).unwrap();
    for piece in [&b"sta"[..], b"tus; ex", b"it", b"\r\nversion\n"] {
        data.write(&message(0x190, piece)).unwrap();
        bench.poll();
    }
    assert_eq!(bench.firewall.events, ["status"]);
}

#[test]
fn input_that_never_comes_ends_the_call_with_a_hint() {
    let mut bench = Bench::new();
    let mut data = bench.call(0x200, "user:QUBESRPC qubes.VMShell dom0");
    data.write(HELLO_4).unwrap();
    bench.poll();
    bench.net.pass(Duration::from_secs(61));
    bench.poll();
    let heard = drain(&mut data);
    assert!(heard.ends_with(&exit_code(exit::USAGE)));
    let long = message(0x190, &[b'a'; 5000]);
    let _ = bench.heard();
    let heard = bench.whole_call(0x200, "user:QUBESRPC qubes.VMShell dom0", &long);
    assert!(heard.ends_with(&exit_code(exit::USAGE)));
}

#[test]
fn r10_the_uplink_is_waited_for_and_then_given_up() {
    for (uplink, code) in [
        (Uplink::Absent, 0),
        (Uplink::Connected, 0),
        (Uplink::Connecting, 3),
    ] {
        let mut bench = Bench::new();
        bench.firewall.uplink = uplink;
        let mut data = bench.call(0x200, "root:QUBESRPC qubes.WaitForNetworkUplink dom0");
        data.write(HELLO_4).unwrap();
        bench.poll();
        assert_eq!(
            bench.agent.load().0,
            usize::from(uplink == Uplink::Connecting)
        );
        bench.net.pass(Duration::from_millis(3001));
        bench.poll();
        assert!(drain(&mut data).ends_with(&exit_code(code)), "{uplink:?}");
    }
    let mut bench = Bench::new();
    bench.firewall.uplink = Uplink::Connecting;
    let mut data = bench.call(0x200, "root:QUBESRPC qubes.WaitForNetworkUplink dom0");
    data.write(HELLO_4).unwrap();
    bench.poll();
    bench.firewall.uplink = Uplink::Connected;
    bench.poll();
    assert!(drain(&mut data).ends_with(&exit_code(0)));
}

#[test]
fn suspend_services_reach_the_host() {
    let mut bench = Bench::new();
    for service in [
        "SuspendPreAll",
        "SuspendPre",
        "SuspendPost",
        "SuspendPostAll",
    ] {
        let line = alloc::format!("root:QUBESRPC qubes.{service} dom0");
        assert!(
            bench
                .whole_call(0x200, &line, STDIN_END)
                .ends_with(&exit_code(0))
        );
    }
    assert_eq!(
        bench.firewall.events,
        ["suspending", "suspending", "resumed", "resumed"]
    );
}

#[test]
fn a_caller_that_stops_reading_loses_its_call_and_nobody_elses() {
    let mut bench = Bench::new();
    let mut data = bench.call(0x200, "user:long");
    data.write(HELLO_4).unwrap();
    for _ in 0..100 {
        bench.poll();
    }
    assert_eq!(bench.agent.load().0, 1, "the ring is full");
    bench.net.pass(Duration::from_secs(11));
    bench.poll();
    assert_eq!(bench.agent.load().0, 0);
    assert_eq!(bench.agent.counters().stalled, 1);
    assert_eq!(bench.heard(), TERMINATED_513);
}

#[test]
fn a_long_output_in_steps_arrives_whole_and_a_flood_is_cut_with_a_note() {
    let mut bench = Bench::new();
    let heard = bench.whole_call(0x200, "user:long", b"");
    let lines = heard.windows(5).filter(|window| window == b"line ").count();
    assert_eq!(lines, 20_000);
    let heard = bench.whole_call(0x200, "user:flood", b"");
    assert!(heard.ends_with(&[STDOUT_END, STDERR_END, &exit_code(0)].concat()));
    assert!(String::from_utf8_lossy(&heard).contains("output was cut here"));
    assert!(heard.len() < 70_000);
}

#[test]
fn a_data_channel_that_breaks_the_protocol_is_closed_and_ended() {
    for input in [
        message(0x300, &[1, 0, 0, 0]),
        message(0x300, &[3, 0]),
        message(0x190, b"before the greeting"),
        [HELLO_4, &message(0x204, b"?")].concat(),
        [HELLO_4, HELLO_4].concat(),
        [
            HELLO_4,
            &0x190u32.to_le_bytes(),
            &65_537u32.to_le_bytes(),
            b"...",
        ]
        .concat(),
    ] {
        let mut bench = Bench::new();
        let mut data = bench.call(0x200, "user:QUBESRPC qubes.VMShell dom0");
        data.write(&input).unwrap();
        bench.poll();
        assert_eq!(bench.dom0.progress(&mut data), Phase::Closed);
        assert_eq!(bench.heard(), TERMINATED_513);
        assert_eq!(bench.agent.counters().lost, 1);
    }
}

#[test]
fn calls_beyond_the_limit_wait_and_are_ended_when_they_waited_too_long() {
    let mut bench = Bench::new();
    let numbers = |port: u16| [&[0; 4][..], &u32::from(port).to_le_bytes()].concat();
    for port in 513..=768 {
        bench.say(&message(
            0x200,
            &[&numbers(port)[..], b"user:status\0"].concat(),
        ));
    }
    // 8 run, 32 wait, 216 were ended at once.
    assert_eq!(bench.agent.load(), (8, 32));
    let mut ended = bench.heard().len() / 16;
    assert_eq!(ended, 216);
    bench.net.pass(Duration::from_secs(5));
    ended += bench.heard().len() / 16;
    assert_eq!(ended, 248);
    bench.net.pass(Duration::from_secs(6));
    ended += bench.heard().len() / 16;
    assert_eq!(ended, 256, "every call was ended once");
    assert_eq!(bench.agent.counters().terminated, 256);
}

#[test]
fn any_bytes_on_the_control_channel_are_survived() {
    let mut state = 99u32;
    for _ in 0..300 {
        let mut bench = Bench::new();
        let noise: Vec<u8> = (0..2000)
            .map(|index| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let byte = state.to_be_bytes()[0];
                // Mostly plausible headers, so that more than the first check is reached.
                match index % 8 {
                    1 => 2,
                    2 | 3 | 5 | 6 | 7 => 0,
                    _ => byte & 0x33,
                }
            })
            .collect();
        bench.say(&noise);
        bench.net.pass(Duration::from_secs(20));
        bench.poll();
    }
}
