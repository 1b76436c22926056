//! Sequences of dom0's operations and what they lead to.

use super::*;
use crate::firewall_tree::TreeError;
use crate::rule_text::RuleText;
use proptest::prelude::*;
use std::format;
use std::string::{String, ToString};
use std::vec;
use std::vec::Vec;

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn events(store: &mut Store) -> Vec<Event> {
    core::iter::from_fn(|| store.next_event()).collect()
}

/// Rewrites the tree of a client as dom0 does.
fn rewrite(store: &mut Store, client: &str, rules: &[&str]) {
    store.removed(&format!("/qubes-firewall/{client}/"));
    store.written(&format!("/qubes-firewall/{client}/policy"), b"drop");
    for (number, rule) in rules.iter().enumerate() {
        let path = format!("/qubes-firewall/{client}/{number:04}");
        store.written(&path, rule.as_bytes());
    }
    store.written(&format!("/qubes-firewall/{client}"), b"");
}

/// The rules in force, or why there are none.
fn live(store: &Store, client: &str) -> Option<Result<Vec<String>, TreeError>> {
    let chain = store.reload(address(client))?.finish();
    Some(chain.map(|chain| {
        chain
            .rules()
            .iter()
            .map(|rule| RuleText(rule).to_string())
            .collect()
    }))
}

const A: &str = "10.137.0.10";
const B: &str = "fd09:24ef:4179::a89:a";

#[test]
fn old_rules_stay_in_force_until_the_commit() {
    let mut store = Store::default();
    assert_eq!(live(&store, A), None);
    rewrite(&mut store, A, &["action=accept"]);
    assert_eq!(events(&mut store), [Event::Commit(address(A))]);
    store.removed("/qubes-firewall/10.137.0.10/");
    store.written("/qubes-firewall/10.137.0.10/policy", b"drop");
    store.written("/qubes-firewall/10.137.0.10/0000", b"action=drop");
    assert_eq!(live(&store, A), Some(Ok(vec!["action=accept".into()])));
    assert_eq!(events(&mut store), []);
    store.written("/qubes-firewall/10.137.0.10", b"");
    assert_eq!(live(&store, A), Some(Ok(vec!["action=drop".into()])));
}

#[test]
fn families_commit_on_their_own() {
    let mut store = Store::default();
    rewrite(&mut store, A, &["action=accept"]);
    rewrite(&mut store, B, &["action=nonsense"]);
    let commits = [Event::Commit(address(A)), Event::Commit(address(B))];
    assert_eq!(events(&mut store), commits);
    assert!(live(&store, A).unwrap().is_ok());
    assert!(live(&store, B).unwrap().is_err());
}

#[test]
fn handled_counts_every_commit_once_it_is_in_force() {
    let mut store = Store::default();
    rewrite(&mut store, A, &[]);
    rewrite(&mut store, A, &[]);
    assert_eq!(store.handled(address(A)), None);
    assert_eq!(events(&mut store), [Event::Commit(address(A))]);
    // This one is not part of what is being handled.
    rewrite(&mut store, A, &[]);
    let (path, count) = store.handled(address(A)).unwrap();
    assert_eq!(path.to_string(), "/qubes-firewall-handled/10.137.0.10");
    assert_eq!(count, 2);
    assert_eq!(store.handled(address(A)), None);
    assert_eq!(events(&mut store), [Event::Commit(address(A))]);
    assert_eq!(store.handled(address(A)).unwrap().1, 3);
}

#[test]
fn end_of_the_dump_commits_every_tree_in_it() {
    let mut store = Store::default();
    store.dump_started();
    // Reverse order, with and without the marker.
    store.written("/qubes-ip", b"10.137.0.6");
    store.written("/qubes-firewall/fd09:24ef:4179::a89:a/policy", b"drop");
    store.written("/qubes-firewall/10.137.0.10/policy", b"drop");
    store.written("/qubes-firewall/10.137.0.10/0000", b"action=accept");
    store.written("/qubes-firewall/10.137.0.10", b"");
    assert_eq!(events(&mut store), []);
    assert_eq!(store.get("/qubes-ip"), None);
    assert_eq!(live(&store, A), None);
    store.dump_ended();
    assert_eq!(
        events(&mut store),
        [
            Event::SettingsChanged,
            Event::ConnectedChanged,
            Event::MappedChanged,
            Event::Commit(address(A)),
            Event::Commit(address(B)),
        ]
    );
    assert_eq!(store.get("/qubes-ip"), Some(&b"10.137.0.6"[..]));
    assert_eq!(live(&store, A), Some(Ok(vec!["action=accept".into()])));
    assert_eq!(live(&store, B), Some(Ok(vec![])));
}

#[test]
fn second_dump_replaces_keys_and_keeps_lost_trees_in_force() {
    let mut store = Store::default();
    store.written("/qubes-ip", b"10.137.0.6");
    rewrite(&mut store, A, &["action=accept"]);
    rewrite(&mut store, B, &["action=accept"]);
    events(&mut store);
    // A dump that breaks off changes nothing.
    store.dump_started();
    store.written("/qubes-firewall/10.137.0.10/policy", b"accept");
    let cost = store.cost();
    store.dump_started();
    assert!(store.cost() < cost);
    store.written("/qubes-gateway", b"10.137.0.5");
    store.written("/qubes-firewall/10.137.0.10/policy", b"drop");
    store.dump_ended();
    assert_eq!(store.get("/qubes-ip"), None);
    assert_eq!(store.get("/qubes-gateway"), Some(&b"10.137.0.5"[..]));
    assert_eq!(live(&store, A), Some(Ok(vec![])));
    assert_eq!(live(&store, B), Some(Ok(vec!["action=accept".into()])));
    let commits: Vec<_> = events(&mut store)
        .into_iter()
        .filter(|event| matches!(event, Event::Commit(_)))
        .collect();
    assert_eq!(commits, [Event::Commit(address(A))]);
}

#[test]
fn removals_take_a_key_or_a_subtree_and_never_a_sibling() {
    let mut store = Store::default();
    for path in ["/a", "/a/b", "/a/b/c", "/ab", "/a-b"] {
        store.written(path, b"");
    }
    store.removed("/a/");
    let left: Vec<_> = ["/a", "/a/b", "/a/b/c", "/ab", "/a-b"]
        .map(|path| store.get(path).is_some())
        .into();
    assert_eq!(left, [true, false, false, true, true]);
    store.removed("/a");
    store.removed("/nothing");
    store.removed("/nothing/");
    assert_eq!(store.get("/a"), None);
    let mut store = Store::default();
    rewrite(&mut store, "10.137.0.1", &["action=drop"]);
    rewrite(&mut store, A, &["action=accept"]);
    store.removed("/qubes-firewall/10.137.0.1/");
    store.written("/qubes-firewall/10.137.0.10", b"");
    store.written("/qubes-firewall/10.137.0.1", b"");
    assert_eq!(live(&store, A), Some(Ok(vec!["action=accept".into()])));
    assert_eq!(live(&store, "10.137.0.1"), Some(Err(TreeError::NoPolicy)));
}

#[test]
fn one_rule_can_be_removed_and_everything_at_once() {
    let mut store = Store::default();
    rewrite(&mut store, A, &["action=accept", "action=drop"]);
    store.removed("/qubes-firewall/10.137.0.10/0000");
    store.written("/qubes-firewall/10.137.0.10", b"");
    assert_eq!(live(&store, A), Some(Ok(vec!["action=drop".into()])));
    store.written("/qubes-ip", b"10.137.0.6");
    store.removed("/");
    assert_eq!(store.get("/qubes-ip"), None);
    assert_eq!(live(&store, A), Some(Ok(vec!["action=drop".into()])));
    store.written("/qubes-firewall/10.137.0.10", b"");
    assert_eq!(live(&store, A), Some(Err(TreeError::NoPolicy)));
}

#[test]
fn deeper_keys_block_and_go_with_their_directory() {
    let mut store = Store::default();
    rewrite(&mut store, A, &["action=accept"]);
    store.written("/qubes-firewall/10.137.0.10/0000/x", b"");
    store.written("/qubes-firewall/10.137.0.10", b"");
    assert!(matches!(live(&store, A), Some(Err(TreeError::BadKey(_)))));
    store.removed("/qubes-firewall/10.137.0.10/0000/");
    store.written("/qubes-firewall/10.137.0.10", b"");
    assert_eq!(live(&store, A), Some(Ok(vec!["action=accept".into()])));
}

#[test]
fn trees_of_what_is_no_address_are_ignored() {
    let mut store = Store::default();
    for name in ["", "x", "10.137.0.010", "FD09::1", "10.137.0.10.1"] {
        rewrite(&mut store, name, &["action=accept"]);
    }
    assert_eq!(events(&mut store), []);
    assert_eq!(store.cost(), 0);
}

#[test]
fn changes_of_settings_and_lists_are_told_apart() {
    let mut store = Store::default();
    for (path, event) in [
        ("/qubes-primary-dns", Some(Event::SettingsChanged)),
        (
            "/net-config/00:16:3e:5e:6c:00/ip",
            Some(Event::SettingsChanged),
        ),
        ("/connected-ips", Some(Event::ConnectedChanged)),
        ("/connected-ips6", Some(Event::ConnectedChanged)),
        (
            "/mapped-ip/10.137.0.30/visible-ip",
            Some(Event::MappedChanged),
        ),
        ("/qubes-timezone", None),
    ] {
        store.written(path, b"x");
        assert_eq!(events(&mut store), Vec::from_iter(event), "{path}");
        store.removed(path);
        assert_eq!(events(&mut store), Vec::from_iter(event), "{path}");
        store.removed(path);
        assert_eq!(events(&mut store), [], "{path}");
    }
}

#[test]
fn mapping_needs_both_of_its_keys() {
    let mut store = Store::default();
    let real = Ipv4Addr::new(10, 137, 0, 30);
    store.written("/mapped-ip/10.137.0.30/visible-ip", b"192.168.1.128");
    assert_eq!(store.mapped(real), None);
    store.written("/mapped-ip/10.137.0.30/visible-gateway", b"192.168.1.1");
    let expected = MappedAddress {
        real,
        visible: Ipv4Addr::new(192, 168, 1, 128),
        visible_gateway: Ipv4Addr::new(192, 168, 1, 1),
    };
    assert_eq!(store.mapped(real), Some(expected));
    let reals: Vec<_> = store.mapped_reals().collect();
    assert_eq!(reals, [real, real]);
}

#[test]
fn tree_that_does_not_fit_is_blocked_until_it_is_rewritten() {
    let mut store = Store::new(4096);
    let long = format!("action=drop dsthost={}", "x".repeat(3000));
    rewrite(&mut store, A, &["action=accept", &long, &long]);
    assert_eq!(live(&store, A), Some(Err(TreeError::Incomplete)));
    assert!(store.refused() > 0);
    rewrite(&mut store, A, &["action=accept"]);
    assert_eq!(live(&store, A), Some(Ok(vec!["action=accept".into()])));
}

#[test]
fn key_that_does_not_fit_keeps_its_old_value() {
    let mut store = Store::new(1024);
    store.written("/connected-ips", b"10.137.0.10");
    store.written("/connected-ips", &[b'1'; 2000]);
    assert_eq!(store.get("/connected-ips"), Some(&b"10.137.0.10"[..]));
    assert_eq!(store.refused(), 1);
}

#[test]
fn detached_clients_are_forgotten_oldest_first() {
    let mut store = Store::new(100_000);
    for number in 0..200 {
        let client = format!("10.138.0.{number}");
        rewrite(&mut store, &client, &["action=accept"]);
        let path = format!("/mapped-ip/{client}/visible-ip");
        store.written(&path, client.as_bytes());
    }
    assert!(store.is_crowded());
    let attached = address("10.138.0.0");
    assert!(store.forget_detached(|address| address == attached) > 0);
    assert!(!store.is_crowded());
    assert!(live(&store, "10.138.0.0").is_some());
    assert_eq!(live(&store, "10.138.0.1"), None);
    assert_eq!(store.get("/mapped-ip/10.138.0.1/visible-ip"), None);
    assert!(live(&store, "10.138.0.199").is_some());
    assert!(store.get("/mapped-ip/10.138.0.199/visible-ip").is_some());
}

/// Operations as text, so that failures can be read.
#[derive(Clone, Debug)]
enum Operation {
    Write(String, Vec<u8>),
    Remove(String),
    DumpStart,
    DumpEnd,
    Poll,
    Forget,
}

fn path() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "/qubes-firewall/10\\.137\\.0\\.[1-3](/(policy|000[0-3]|0000/x|junk))?",
        2 => "/(qubes-ip|connected-ips|mapped-ip/10\\.137\\.0\\.[1-3]/visible-ip)",
        1 => "[/a-z0-9.:@_-]{0,63}",
    ]
}

fn operation() -> impl Strategy<Value = Operation> {
    let value = prop_oneof![
        Just(b"action=accept".to_vec()),
        Just(b"drop".to_vec()),
        proptest::collection::vec(any::<u8>(), 0..600),
        Just(b"\0".to_vec()),
    ];
    prop_oneof![
        8 => (path(), value).prop_map(|(path, value)| Operation::Write(path, value)),
        3 => (path(), any::<bool>()).prop_map(|(mut path, subtree)| {
            if subtree && !path.ends_with('/') {
                path.push('/');
            }
            Operation::Remove(path)
        }),
        1 => Just(Operation::DumpStart),
        1 => Just(Operation::DumpEnd),
        2 => Just(Operation::Poll),
        1 => Just(Operation::Forget),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_sequence_of_operations_breaks_the_budget_or_the_books(
        operations in proptest::collection::vec(operation(), 0..200),
        budget in 500usize..20_000,
    ) {
        let mut store = Store::new(budget);
        for operation in operations {
            match operation {
                Operation::Write(path, value) => store.written(&path, &value),
                Operation::Remove(path) => store.removed(&path),
                Operation::DumpStart => store.dump_started(),
                Operation::DumpEnd => store.dump_ended(),
                Operation::Forget => {
                    store.forget_detached(|_| false);
                }
                Operation::Poll => {
                    for event in events(&mut store) {
                        if let Event::Commit(address) = event {
                            prop_assert!(store.reload(address).is_some());
                            prop_assert!(store.handled(address).is_some());
                        }
                    }
                }
            }
            let trees: usize = store.targets.values().map(Target::cost).sum();
            let keys = cost_of_keys(&store.keys) + store.dumped.as_ref().map_or(0, cost_of_keys);
            prop_assert_eq!(store.cost(), trees + keys);
            // Writing to a tree that is in force copies it before its growth is known.
            prop_assert!(store.cost() <= 2 * budget, "{} of {}", store.cost(), budget);
            prop_assert_eq!(store.by_sequence.len(), store.targets.len());
        }
    }
}
