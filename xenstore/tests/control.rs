//! Shutdown and system requests, over the fake store.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends where its expectation does"
)]

mod kit;

use std::time::Duration;

use kit::{Bench, SELF};
use xenstore::wire::kind;
use xenstore::{ControlEvent, Options, Shutdown};

fn bench() -> Bench {
    let mut bench = Bench::new(Options {
        backend: false,
        uplink: false,
        config: None,
        ..Options::default()
    });
    bench.settle();
    assert_eq!(
        bench.control.remove(0),
        ControlEvent::Identity {
            name: "domain-5".to_owned(),
            memory_target_kib: Some(16384)
        }
    );
    assert!(bench.control.is_empty());
    bench
}

fn path(key: &str) -> String {
    format!("/local/domain/{SELF}/control/{key}")
}

#[test]
fn what_we_can_do_is_advertised_and_suspend_is_not() {
    let bench = bench();
    assert_eq!(
        bench.store.read(&path("feature-poweroff")).as_deref(),
        Some("1")
    );
    assert_eq!(
        bench.store.read(&path("feature-reboot")).as_deref(),
        Some("1")
    );
    assert_eq!(bench.store.read(&path("feature-suspend")), None);
    assert_eq!(bench.store.watches(SELF), 2);
}

#[test]
fn p14_a_command_is_acknowledged_and_then_told() {
    for (command, shutdown) in [
        ("poweroff", Shutdown::Poweroff),
        ("halt", Shutdown::Halt),
        ("reboot", Shutdown::Reboot),
    ] {
        let mut bench = bench();
        bench.store.write(&path("shutdown"), command);
        bench.settle();
        assert_eq!(bench.store.read(&path("shutdown")).as_deref(), Some(""));
        assert_eq!(bench.control, [ControlEvent::Shutdown(shutdown)]);
    }
}

#[test]
fn p14_other_commands_are_acknowledged_and_ignored() {
    for command in [
        "suspend",
        "crash",
        "s3",
        "Poweroff",
        "poweroff\n",
        "x",
        &"y".repeat(2000),
    ] {
        let mut bench = bench();
        bench.store.write(&path("shutdown"), command);
        bench.settle();
        assert_eq!(
            bench.store.read(&path("shutdown")).as_deref(),
            Some(""),
            "{command}"
        );
        assert!(bench.control.is_empty(), "{command}");
    }
}

#[test]
fn a_command_from_before_our_start_counts() {
    let mut bench = Bench::new(Options {
        backend: false,
        uplink: false,
        config: None,
        ..Options::default()
    });
    bench.store.write(&path("shutdown"), "poweroff");
    bench.settle();
    assert_eq!(bench.control[1], ControlEvent::Shutdown(Shutdown::Poweroff));
}

#[test]
fn a_command_that_cannot_be_acknowledged_is_obeyed_all_the_same() {
    let mut bench = bench();
    bench
        .store
        .fail_next(kind::WRITE, "control/shutdown", "EACCES");
    bench.store.write(&path("shutdown"), "reboot");
    bench.settle();
    assert_eq!(bench.control, [ControlEvent::Shutdown(Shutdown::Reboot)]);
}

#[test]
fn a_command_that_is_overwritten_while_being_acknowledged_is_not_lost() {
    let mut bench = bench();
    let mut once = true;
    bench.store.on_request(move |store, kind, _| {
        if kind == kind::TRANSACTION_END && once {
            once = false;
            store.write(&path("shutdown"), "reboot");
        }
    });
    bench.store.write(&path("shutdown"), "poweroff");
    bench.settle();
    assert_eq!(bench.control, [ControlEvent::Shutdown(Shutdown::Reboot)]);
}

#[test]
fn a_sysrq_key_is_cleared_and_told() {
    let mut bench = bench();
    bench.store.write(&path("sysrq"), "m");
    bench.settle();
    assert_eq!(bench.store.read(&path("sysrq")).as_deref(), Some(""));
    assert_eq!(bench.control, [ControlEvent::SysRq(b'm')]);
    bench.store.write(&path("sysrq"), "more than one");
    bench.pass(Duration::from_secs(5));
    assert_eq!(bench.control.len(), 1);
}
