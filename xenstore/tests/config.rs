//! Settings below `vm-data`, over the fake store.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends where its expectation does"
)]

mod kit;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kit::{Bench, SELF};
use xenstore::config::{MAX_KEYS, MAX_TREE_BYTES, MAX_VALUE_LEN, QUIET_PERIOD};
use xenstore::wire::kind;
use xenstore::{ConfigEvent, Options};

fn path(key: &str) -> String {
    format!("/local/domain/{SELF}/vm-data/{key}")
}

fn new() -> Bench {
    Bench::new(Options {
        backend: false,
        uplink: false,
        control: false,
        ..Options::default()
    })
}

/// A bench with these keys from the start, all delivered.
fn with(keys: &[(&str, &str)]) -> Bench {
    let mut bench = new();
    for (key, value) in keys {
        bench.store.write(&path(key), value);
    }
    bench.settle();
    assert_eq!(bench.config.last(), Some(&ConfigEvent::Ready));
    bench
}

fn written(key: &str, value: &str) -> ConfigEvent {
    ConfigEvent::Written {
        key: key.to_owned(),
        value: value.as_bytes().to_vec(),
    }
}

fn removed(key: &str) -> ConfigEvent {
    ConfigEvent::Removed {
        key: key.to_owned(),
    }
}

fn rest(bench: &mut Bench) -> Vec<ConfigEvent> {
    bench.pass(QUIET_PERIOD);
    std::mem::take(&mut bench.config)
}

#[test]
fn no_settings_at_all_are_ready_at_once_and_may_come_later() {
    let mut bench = with(&[]);
    assert_eq!(std::mem::take(&mut bench.config), [ConfigEvent::Ready]);
    bench.store.write(&path("qubes-ip"), "10.137.0.5");
    bench.settle();
    assert_eq!(bench.config, [written("/qubes-ip", "10.137.0.5")]);
}

#[test]
fn settings_that_exist_are_delivered_in_qubesdbs_spelling_and_order() {
    let bench = with(&[
        ("qubes-ip", "10.137.0.5"),
        ("connected-ips", ""),
        ("mapped-ip/10_137_0_6/visible-ip", "10.137.0.6"),
        ("net-config/00-16-3e-5e-6c-00/ip", "10.137.0.5"),
        ("qubes-service/some_service-name", "1"),
        ("qubes-firewall/10_137_0_6/policy", "drop"),
        ("qubes-firewall/10_137_0_6/0001", "action=drop"),
        ("qubes-firewall/10_137_0_6/0000", "action=accept"),
        ("qubes-firewall/fd09-24ef-4179--a89-6/policy", "accept"),
    ]);
    assert_eq!(
        bench.config,
        [
            written("/connected-ips", ""),
            written("/mapped-ip/10.137.0.6/visible-ip", "10.137.0.6"),
            written("/net-config/00:16:3e:5e:6c:00/ip", "10.137.0.5"),
            written("/qubes-ip", "10.137.0.5"),
            written("/qubes-service/some_service-name", "1"),
            removed("/qubes-firewall/10.137.0.6/"),
            written("/qubes-firewall/10.137.0.6/0000", "action=accept"),
            written("/qubes-firewall/10.137.0.6/0001", "action=drop"),
            written("/qubes-firewall/10.137.0.6/policy", "drop"),
            written("/qubes-firewall/10.137.0.6", ""),
            removed("/qubes-firewall/fd09:24ef:4179::a89:6/"),
            written("/qubes-firewall/fd09:24ef:4179::a89:6/policy", "accept"),
            written("/qubes-firewall/fd09:24ef:4179::a89:6", ""),
            ConfigEvent::Ready,
        ]
    );
}

#[test]
fn a_change_of_one_key_reads_that_key_only() {
    let mut bench = with(&[("qubes-ip", "10.137.0.5"), ("qubes-gateway", "10.137.0.2")]);
    bench.config.clear();
    let before = bench.store.requests(SELF);
    bench.store.write(&path("qubes-ip"), "10.137.0.9");
    bench.settle();
    assert_eq!(bench.config, [written("/qubes-ip", "10.137.0.9")]);
    assert_eq!(bench.store.requests(SELF) - before, 2);
}

#[test]
fn removed_keys_and_folders_are_told_key_by_key() {
    let mut bench = with(&[("a/b", "1"), ("a/c/d", "2"), ("ab", "3"), ("e", "4")]);
    bench.config.clear();
    bench.store.remove(&path("a"));
    bench.settle();
    assert_eq!(
        std::mem::take(&mut bench.config),
        [removed("/a/b"), removed("/a/c/d")]
    );
    bench.store.remove(&format!("/local/domain/{SELF}/vm-data"));
    bench.settle();
    assert_eq!(bench.config, [removed("/ab"), removed("/e")]);
}

#[test]
fn a_persons_rule_is_committed_after_a_quiet_period() {
    let mut bench = with(&[("qubes-firewall/10_137_0_6/policy", "drop")]);
    bench.config.clear();
    bench
        .store
        .write(&path("qubes-firewall/10_137_0_6/0000"), "action=accept");
    bench.pass(QUIET_PERIOD / 2);
    bench
        .store
        .write(&path("qubes-firewall/10_137_0_6/0001"), "action=drop");
    bench.pass(QUIET_PERIOD * 3 / 4);
    assert!(bench.config.is_empty(), "still changing a moment ago");
    bench.pass(QUIET_PERIOD / 4);
    assert_eq!(
        bench.config,
        [
            removed("/qubes-firewall/10.137.0.6/"),
            written("/qubes-firewall/10.137.0.6/0000", "action=accept"),
            written("/qubes-firewall/10.137.0.6/0001", "action=drop"),
            written("/qubes-firewall/10.137.0.6/policy", "drop"),
            written("/qubes-firewall/10.137.0.6", ""),
        ]
    );
}

#[test]
fn a_marker_commits_too_also_with_unchanged_rules() {
    let mut bench = with(&[("qubes-firewall/10_137_0_6/policy", "drop")]);
    bench.config.clear();
    bench.store.write(&path("qubes-firewall/10_137_0_6"), "x");
    let events = rest(&mut bench);
    assert_eq!(events.len(), 3);
    assert_eq!(events[2], written("/qubes-firewall/10.137.0.6", "x"));
}

#[test]
fn trees_are_committed_one_by_one() {
    let mut bench = with(&[
        ("qubes-firewall/10_137_0_6/policy", "drop"),
        ("qubes-firewall/10_137_0_7/policy", "drop"),
    ]);
    bench.config.clear();
    bench
        .store
        .write(&path("qubes-firewall/10_137_0_7/policy"), "accept");
    let events = rest(&mut bench);
    assert!(events.iter().all(|event| match event {
        ConfigEvent::Written { key, .. } | ConfigEvent::Removed { key } =>
            key.contains("10.137.0.7"),
        _ => false,
    }));
    bench
        .store
        .write(&path("qubes-firewall/10_137_0_8/policy"), "accept");
    assert_eq!(
        rest(&mut bench).last(),
        Some(&written("/qubes-firewall/10.137.0.8", ""))
    );
}

#[test]
fn a_tree_that_is_removed_ends_without_a_marker() {
    let keys = [
        ("qubes-firewall/10_137_0_6/policy", "drop"),
        ("qubes-firewall/10_137_0_6/0000", "action=drop"),
    ];
    let gone = [
        removed("/qubes-firewall/10.137.0.6/"),
        removed("/qubes-firewall/10.137.0.6"),
    ];
    for victim in ["qubes-firewall/10_137_0_6", "qubes-firewall", ""] {
        let mut bench = with(&keys);
        bench.config.clear();
        bench.store.remove(path(victim).trim_end_matches('/'));
        assert_eq!(rest(&mut bench), gone, "{victim}");
        bench
            .store
            .write(&path("qubes-firewall/10_137_0_6/policy"), "accept");
        assert_eq!(rest(&mut bench).len(), 3, "{victim}");
    }
}

#[test]
fn a_tree_that_changes_while_it_is_read_is_never_delivered_torn() {
    let mut bench = new();
    for number in 0..40 {
        bench.store.write(
            &path(&format!("qubes-firewall/10_137_0_6/{number:04}")),
            "old",
        );
    }
    bench.settle();
    bench.config.clear();
    let mut reads = 0;
    let mut rewritten = false;
    bench.store.on_request(move |store, kind, path| {
        reads += u32::from(kind == kind::READ);
        if reads == 20 && !rewritten && path.contains("firewall") {
            rewritten = true;
            store.atomically(|store| {
                for number in 0..40 {
                    store.write(
                        &self::path(&format!("qubes-firewall/10_137_0_6/{number:04}")),
                        "new",
                    );
                }
            });
        }
    });
    bench
        .store
        .write(&path("qubes-firewall/10_137_0_6/policy"), "drop");
    bench.pass(Duration::from_secs(1));
    let mut values = BTreeMap::<Vec<u8>, usize>::new();
    for event in &bench.config {
        if let ConfigEvent::Written { value, .. } = event {
            *values.entry(value.clone()).or_default() += 1;
        }
    }
    assert_eq!(values.get(&b"new"[..]), Some(&40));
    assert_eq!(values.get(&b"old"[..]), None);
}

#[test]
fn a_tree_that_never_rests_is_read_once_a_second_at_most_and_in_the_end() {
    let mut bench = with(&[("qubes-firewall/10_137_0_6/policy", "drop")]);
    bench.config.clear();
    for round in 0..200 {
        bench.store.write(
            &path("qubes-firewall/10_137_0_6/0000"),
            &format!("round {round}"),
        );
        bench.pass_millis(40);
    }
    let commits = |bench: &Bench| {
        let marker = written("/qubes-firewall/10.137.0.6", "");
        bench
            .config
            .iter()
            .filter(|&event| *event == marker)
            .count()
    };
    assert!((6..=8).contains(&commits(&bench)), "{}", commits(&bench));
    let events = rest(&mut bench);
    assert!(events.contains(&written("/qubes-firewall/10.137.0.6/0000", "round 199")));
}

#[test]
fn a_storm_of_changes_is_merged_into_one_reading() {
    let mut bench = new();
    for number in 0..300 {
        bench.store.write(&path(&format!("key-{number}")), "1");
    }
    bench.settle();
    let before = bench.store.requests(SELF);
    bench.config.clear();
    for round in 0..50 {
        for number in 0..300 {
            bench
                .store
                .write(&path(&format!("key-{number}")), &round.to_string());
        }
    }
    bench.settle();
    assert!(bench.store.requests(SELF) - before < 1300);
    assert_eq!(
        bench
            .config
            .iter()
            .filter(|event| **event == written("/key-299", "49"))
            .count(),
        1
    );
}

#[test]
fn a_tree_of_ten_thousand_rules_is_read_in_parts() {
    let mut bench = new();
    for number in 0..10_000 {
        bench.store.write(
            &path(&format!("qubes-firewall/10_137_0_6/{number:04}")),
            "action=accept",
        );
    }
    bench.settle();
    assert_eq!(bench.config.len(), 10_003);
    assert_eq!(
        bench.config[10_000],
        written("/qubes-firewall/10.137.0.6/9999", "action=accept")
    );
}

#[test]
fn a_tree_that_cannot_be_used_is_said_to_be_so() {
    let unusable = |events: &[ConfigEvent]| {
        events.iter().any(|event| matches!(event, ConfigEvent::Unusable { key, .. } if key == "/qubes-firewall/10.137.0.6"))
    };
    // A rule that is too long.
    let mut bench = with(&[(
        "qubes-firewall/10_137_0_6/0000",
        &"x".repeat(MAX_VALUE_LEN + 1),
    )]);
    assert!(unusable(&bench.config));
    bench.config.clear();
    bench
        .store
        .write(&path("qubes-firewall/10_137_0_6/0000"), "action=drop");
    assert_eq!(rest(&mut bench).len(), 3);
    // A tree that is too large.
    let mut bench = new();
    for number in 0..=MAX_TREE_BYTES / 3000 {
        bench.store.write(
            &path(&format!("qubes-firewall/10_137_0_6/{number:04}")),
            &"x".repeat(3000),
        );
    }
    bench.settle();
    assert!(unusable(&bench.config));
    // A rule that we may not read.
    let mut bench = with(&[]);
    bench
        .store
        .fail_next(kind::READ, "10_137_0_6/0000", "EACCES");
    bench
        .store
        .write(&path("qubes-firewall/10_137_0_6/0000"), "action=drop");
    assert!(unusable(&rest(&mut bench)));
}

#[test]
fn keys_over_a_limit_are_left_out_and_the_others_live() {
    let mut bench = with(&[]);
    bench.config.clear();
    bench
        .store
        .write(&path("long"), &"x".repeat(MAX_VALUE_LEN + 1));
    bench.store.write(&path(&"k".repeat(300)), "1");
    bench.store.write(&path("a/b/c/d/e/f/g/h/i/j/k"), "1");
    bench.store.write(&path("good"), "1");
    bench.settle();
    assert!(bench.config.contains(&written("/good", "1")));
    assert!(bench.config.len() <= 2, "{:?}", bench.config);
    for number in 0..2000 {
        bench.store.write(&path(&format!("many/{number}")), "1");
    }
    bench.settle();
    let keys = bench.config.iter().filter_map(|event| match event {
        ConfigEvent::Written { key, .. } => Some(key),
        _ => None,
    });
    assert_eq!(keys.collect::<BTreeSet<_>>().len(), MAX_KEYS);
}
