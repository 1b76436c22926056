use super::shares::RECENT;
use super::*;
use crate::address::V4;
use crate::conntrack::flow::REPLIED;
use crate::wire::protocol::UDP;
use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use proptest::prelude::*;

const START: Ticks = Ticks(1_000_000);

fn key(owner: u16, number: u32) -> Key<V4> {
    Key {
        src: 0x0a89_0000 + u32::from(owner),
        dst: 0x5d00_0000 + number,
        ports: 0x1388_0035,
        protocol: UDP,
    }
}

fn reply_key(owner: u16, number: u32) -> Key<V4> {
    let port = 1024 + u32::from(owner);
    Key {
        src: 0x5d00_0000 + number,
        dst: 0x0a8a_0001,
        ports: 0x0035 << 16 | port,
        protocol: UDP,
    }
}

fn table(owners: u16) -> FlowTable<V4> {
    FlowTable::new(MIN_FLOWS, owners, HashKey::new(1, 2), HashKey::new(3, 4))
}

fn add(table: &mut FlowTable<V4>, owner: u16, number: u32, now: Ticks) -> Option<u32> {
    let (original, reply) = (key(owner, number), reply_key(owner, number));
    let mut flow = Flow::new(&original, &reply, now);
    flow.owner = owner;
    flow.follow_datagram(false, now);
    let places = [table.place(&original), table.place(&reply)];
    table
        .insert(&flow, places, now)
        .ok()
        .map(|(number, _)| number)
}

/// As the engine does when a reply has come.
fn reply(table: &mut FlowTable<V4>, number: u32, now: Ticks) {
    let flow = table.get_mut(number).unwrap();
    flow.follow_datagram(true, now);
    flow.sides_mut(true).0.seen = now;
    table.settle(number);
}

fn has(table: &FlowTable<V4>, owner: u16, number: u32) -> bool {
    let original = table.find(&key(owner, number), false);
    assert_eq!(original, table.find(&reply_key(owner, number), true));
    // A retired flow is found, too, but is over.
    original.is_some_and(|number| table.get(number).unwrap().flags & LIVE != 0)
}

#[test]
fn flow_is_found_in_both_directions_until_it_is_removed() {
    let mut table = table(1);
    let number = add(&mut table, 0, 7, START).unwrap();
    assert!(has(&table, 0, 7) && !has(&table, 0, 8));
    assert_eq!(table.find(&key(0, 7), true), None);
    table.remove(number);
    table.remove(number);
    assert!(!has(&table, 0, 7));
    assert_eq!((table.len(), table.flows_of(0)), (0, 0));
}

#[test]
fn flood_of_one_owner_costs_only_that_owner() {
    let mut table = table(2);
    for number in 0..20 {
        let flow = add(&mut table, 1, number, START).unwrap();
        reply(&mut table, flow, START);
    }
    for number in 0..10 * MIN_FLOWS {
        add(&mut table, 0, number, START).unwrap();
    }
    assert_eq!(table.len(), MIN_FLOWS);
    assert_eq!(table.flows_of(1), 20);
    assert!((0..20).all(|number| has(&table, 1, number)));
}

#[test]
fn owner_below_its_share_takes_from_one_above() {
    let mut table = table(2);
    for number in 0..MIN_FLOWS {
        add(&mut table, 0, number, START).unwrap();
    }
    for number in 0..MIN_FLOWS / 2 {
        add(&mut table, 1, number, START).unwrap();
    }
    assert_eq!(
        (table.flows_of(0), table.flows_of(1)),
        (MIN_FLOWS / 2, MIN_FLOWS / 2)
    );
    // Equal shares: now each pays for itself.
    add(&mut table, 1, MIN_FLOWS, START).unwrap();
    assert_eq!(
        (table.flows_of(0), table.flows_of(1)),
        (MIN_FLOWS / 2, MIN_FLOWS / 2)
    );
    assert!(!has(&table, 1, 0) && has(&table, 1, MIN_FLOWS));
}

#[test]
fn oldest_unreplied_flow_goes_first_and_recent_replied_ones_last() {
    let mut table = table(1);
    for number in 0..MIN_FLOWS {
        let flow = add(&mut table, 0, number, START).unwrap();
        if number != 100 && number != 200 {
            reply(&mut table, flow, START);
            assert!(table.get(flow).unwrap().flags & REPLIED != 0);
        }
    }
    let later = START.plus(RECENT + 1);
    // Flow 0 was seen lately.
    let first = table.find(&key(0, 0), false).unwrap();
    reply(&mut table, first, later);
    for (new, gone) in [(1000, 100), (1001, 200), (1002, 1000), (1003, 1001)] {
        add(&mut table, 0, new, later).unwrap();
        assert!(!has(&table, 0, gone), "{gone}");
    }
    for number in [1002, 1003] {
        let flow = table.find(&key(0, number), false).unwrap();
        reply(&mut table, flow, later);
    }
    for (new, gone) in [(2000, 1), (2001, 2)] {
        let flow = add(&mut table, 0, new, later).unwrap();
        reply(&mut table, flow, later);
        assert!(!has(&table, 0, gone) && has(&table, 0, 0), "{gone}");
    }
}

/// How many flows have idled out by `now`; the others are kept, as the engine does.
fn expire(table: &mut FlowTable<V4>, now: Ticks) -> u64 {
    let (mut budget, mut expired) = (u32::MAX, 0);
    while let Some(number) = table.next_due(now, &mut budget, &mut expired) {
        table.keep(number, now);
    }
    expired
}

#[test]
fn idle_flow_expires_soon_after_its_timeout_and_a_used_one_lives() {
    let mut table = table(1);
    for number in 0..10 {
        add(&mut table, 0, number, START).unwrap();
    }
    let timeout = Ticks::in_seconds(30);
    assert_eq!(expire(&mut table, START.plus(timeout)), 0);
    let used = table.find(&key(0, 3), false).unwrap();
    table.get_mut(used).unwrap().sides_mut(false).0.seen = START.plus(timeout);
    let deadline = table.next_deadline().unwrap();
    assert!(deadline.since(START) <= timeout + 12);
    assert_eq!(expire(&mut table, START.plus(timeout + 12)), 9);
    assert!(has(&table, 0, 3));
    assert_eq!(expire(&mut table, START.plus(2 * timeout + 12)), 1);
    assert_eq!(table.next_deadline(), None);
}

#[test]
fn long_pause_expires_everything_at_once() {
    let mut table = table(1);
    for number in 0..100 {
        add(&mut table, 0, number, START).unwrap();
    }
    assert_eq!(expire(&mut table, START.plus(10_000_000)), 100);
}

#[test]
fn entry_that_is_used_again_does_not_expire_with_its_predecessor() {
    let mut table = table(1);
    let old = add(&mut table, 0, 1, START).unwrap();
    let later = START.plus(Ticks::in_seconds(29));
    table.remove(old);
    assert_eq!(add(&mut table, 0, 2, later), Some(old));
    assert_eq!(expire(&mut table, START.plus(Ticks::in_seconds(33))), 0);
    assert!(has(&table, 0, 2));
    assert_eq!(expire(&mut table, later.plus(Ticks::in_seconds(160))), 1);
}

#[test]
fn clear_leaves_an_empty_table_that_works() {
    let mut table = table(1);
    for number in 0..MIN_FLOWS {
        add(&mut table, 0, number, START).unwrap();
    }
    table.clear();
    assert_eq!((table.len(), table.flows_of(0)), (0, 0));
    for number in 0..MIN_FLOWS {
        add(&mut table, 0, number, START).unwrap();
    }
    assert_eq!(table.len(), MIN_FLOWS);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn whatever_happens_counts_agree_and_bounds_hold(
        steps in prop::collection::vec((0_u8..5, 0_u16..4, 0_u32..400, 0_u32..40), 1..1500)
    ) {
        let mut table = table(4);
        let mut now = START;
        for (what, owner, number, ticks) in steps {
            match what {
                0..=2 if !has(&table, owner, number) => {
                    // As the engine does with a flow that is over.
                    if let Some(old) = table.find(&key(owner, number), false) {
                        prop_assert!(!table.remove(old));
                    }
                    prop_assert!(add(&mut table, owner, number, now).is_some());
                }
                3 => {
                    if let Some(flow) = table.find(&key(owner, number), false) {
                        if ticks & 1 == 0 { table.remove(flow); } else { reply(&mut table, flow, now) }
                    }
                }
                _ => {
                    now = now.plus(ticks);
                    expire(&mut table, now);
                }
            }
            prop_assert!(table.len() <= table.capacity());
            let sum: u32 = (0..4).map(|own| table.flows_of(own)).sum();
            prop_assert_eq!(sum, table.len());
        }
        let live: BTreeSet<_> = (0..4_u16)
            .flat_map(|owner| (0..400).map(move |number| (owner, number)))
            .filter(|(owner, number)| has(&table, *owner, *number))
            .collect();
        prop_assert_eq!(live.len(), usize::try_from(table.len()).unwrap());
        // Every list holds exactly its owner's flows, and retired ones of it.
        for owner in 0..4_u16 {
            let lists = table.owners[usize::from(owner)];
            let mut listed = Vec::new();
            for list in [lists.transient, lists.assured] {
                let mut at = list.first;
                while at != NONE {
                    let flow = table.get(at).unwrap();
                    prop_assert!(flow.flags & (LIVE | RETIRED) != 0);
                    if flow.flags & LIVE != 0 {
                        listed.push(at);
                    }
                    prop_assert_eq!(flow.owner, owner);
                    at = flow.list_next;
                }
            }
            prop_assert_eq!(u32::try_from(listed.len()).unwrap(), table.flows_of(owner));
        }
    }
}

#[test]
fn retired_flows_make_room_before_any_live_one() {
    let mut table = table(2);
    for number in 0..MIN_FLOWS / 2 {
        add(&mut table, 0, number, START).unwrap();
    }
    let later = START.plus(Ticks::in_seconds(40));
    for number in 0..MIN_FLOWS / 2 {
        add(&mut table, 1, number, later).unwrap();
    }
    assert_eq!(expire(&mut table, later), u64::from(MIN_FLOWS / 2));
    assert_eq!((table.flows_of(0), table.len()), (0, MIN_FLOWS / 2));
    // A packet with the key of a retired flow ends it for good, wherever it is in the list.
    let old = table.find(&key(0, 5), false).unwrap();
    assert!(!table.remove(old));
    assert_eq!(table.find(&key(0, 5), false), None);
    for number in 1000..1000 + MIN_FLOWS / 2 {
        add(&mut table, 0, number, later).unwrap();
    }
    assert_eq!(
        (table.flows_of(0), table.flows_of(1), table.len()),
        (MIN_FLOWS / 2, MIN_FLOWS / 2, MIN_FLOWS)
    );
    assert!((0..MIN_FLOWS / 2).all(|number| has(&table, 1, number)));
    assert!((0..MIN_FLOWS / 2).all(|number| table.find(&key(0, number), false).is_none()));
}

#[test]
fn index_that_is_far_too_small_refuses_flows_and_loses_none() {
    let mut table = table(1);
    // Three buckets of twelve references.
    table.index = Index::new(4);
    let mut inside = BTreeSet::new();
    let (mut refused, mut x) = (0, 1_u32);
    for _ in 0..20_000 {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let number = (x >> 8) % 40;
        match table.find(&key(0, number), false) {
            Some(flow) => {
                assert!(inside.remove(&number) && table.remove(flow));
            }
            None if add(&mut table, 0, number, START).is_some() => {
                assert!(inside.insert(number));
            }
            None => refused += 1,
        }
        assert!((0..40).all(|number| has(&table, 0, number) == inside.contains(&number)));
    }
    assert!(refused > 100, "{refused}");
    let live = u32::try_from(inside.len()).unwrap();
    assert_eq!((table.len(), table.flows_of(0)), (live, live));
}
