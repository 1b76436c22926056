//! The compiled form against the reference, on random chains and on chosen ones.

use super::*;
use crate::rule::{
    Destination, DnsTransport, PortRange, Prefix4, Prefix6, Rule, RuleChain, Traffic,
};
use alloc::vec;
use alloc::vec::Vec;
use proptest::prelude::*;

/// Names `h0`, `h1`, ... with their state and the last bytes of their addresses.
#[derive(Clone, Debug)]
struct Hosts(Vec<(bool, Vec<u8>)>);

impl Hosts {
    fn visit(&self, name: &HostName, mut each: impl FnMut(u8)) -> HostState {
        let index: usize = name.as_str()[1..].parse().unwrap();
        let (resolved, addresses) = &self.0[index];
        addresses.iter().for_each(|&last| each(last));
        if *resolved {
            HostState::Resolved
        } else {
            HostState::Unresolved
        }
    }
}

impl HostLookup for Hosts {
    fn addresses4(&self, name: &HostName, each: &mut dyn FnMut(Ipv4Addr)) -> HostState {
        self.visit(name, |last| each(address4(last)))
    }

    fn addresses6(&self, name: &HostName, each: &mut dyn FnMut(Ipv6Addr)) -> HostState {
        self.visit(name, |last| each(address6(last)))
    }
}

/// One of a few addresses that share prefixes of many lengths, the extremes included.
fn address4(seed: u8) -> Ipv4Addr {
    match seed {
        0 => Ipv4Addr::UNSPECIFIED,
        255 => Ipv4Addr::BROADCAST,
        _ => Ipv4Addr::from_bits(u32::from(seed & 0x0f) << 28 | u32::from(seed >> 4) & 7),
    }
}

fn address6(seed: u8) -> Ipv6Addr {
    match seed {
        0 => Ipv6Addr::UNSPECIFIED,
        255 => Ipv6Addr::from_bits(u128::MAX),
        _ => Ipv6Addr::from_bits(u128::from(seed & 0x0f) << 124 | u128::from(seed >> 4) & 7),
    }
}

fn ports() -> impl Strategy<Value = PortRange> {
    let port = prop_oneof![
        Just(0u16),
        Just(53),
        Just(65535),
        50u16..60,
        65530u16..65535
    ];
    (port.clone(), port)
        .prop_map(|(one, other)| PortRange::new(one.min(other), one.max(other)).unwrap())
}

fn traffic() -> impl Strategy<Value = Traffic> {
    prop_oneof![
        Just(Traffic::Any),
        proptest::option::of(ports()).prop_map(|ports| Traffic::Tcp { ports }),
        proptest::option::of(ports()).prop_map(|ports| Traffic::Udp { ports }),
        ports().prop_map(|ports| Traffic::TcpOrUdp { ports }),
        proptest::option::of(0u8..4).prop_map(|icmp_type| Traffic::Icmp { icmp_type }),
        Just(Traffic::Icmp {
            icmp_type: Some(255)
        }),
        Just(Traffic::Dns(DnsTransport::Both)),
        Just(Traffic::Dns(DnsTransport::Tcp)),
        Just(Traffic::Dns(DnsTransport::Udp)),
    ]
}

fn destination(family: Family) -> impl Strategy<Value = Destination> {
    let length = match family {
        Family::Ipv4 => prop_oneof![Just(0u8), Just(32), 1u8..5, 28u8..32],
        Family::Ipv6 => prop_oneof![Just(0u8), Just(128), 1u8..5, 124u8..128],
    };
    let prefix = (any::<u8>(), length).prop_map(move |(seed, length)| match family {
        Family::Ipv4 => Destination::Prefix4(Prefix4::new(address4(seed), length).unwrap()),
        Family::Ipv6 => Destination::Prefix6(Prefix6::new(address6(seed), length).unwrap()),
    });
    let host = prop_oneof![Just("h0"), Just("h1"), Just("h2"), Just("h3")]
        .prop_map(|name| Destination::Host(HostName::new(name).unwrap()));
    prop_oneof![1 => Just(Destination::Any), 6 => prefix, 2 => host]
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![Just(Action::Accept), Just(Action::Drop)]
}

fn chain(family: Family) -> impl Strategy<Value = RuleChain> {
    let rule = (1u16..4, action(), destination(family), traffic());
    (action(), proptest::collection::vec(rule, 0..60)).prop_map(move |(policy, rules)| {
        let mut number = 0;
        let rules = rules
            .into_iter()
            .map(|(gap, action, destination, traffic)| {
                number += gap;
                Rule {
                    number: RuleNumber::new(number).unwrap(),
                    action,
                    destination,
                    traffic,
                }
            })
            .collect();
        RuleChain::new(family, policy, rules).unwrap()
    })
}

fn hosts() -> impl Strategy<Value = Hosts> {
    let host = (any::<bool>(), proptest::collection::vec(any::<u8>(), 0..4));
    proptest::collection::vec(host, 4).prop_map(Hosts)
}

fn upper() -> impl Strategy<Value = UpperLayer> {
    let port = prop_oneof![
        Just(0u16),
        Just(65535),
        49u16..61,
        65529u16..65535,
        any::<u16>()
    ];
    prop_oneof![
        port.clone().prop_map(|port| UpperLayer::Tcp { port }),
        port.prop_map(|port| UpperLayer::Udp { port }),
        prop_oneof![0u8..5, Just(255)].prop_map(|icmp_type| UpperLayer::Icmp { icmp_type }),
        Just(UpperLayer::Other),
        Just(UpperLayer::Unknown),
    ]
}

/// Compiles in steps of `budget` units.
fn compile_in_steps(
    chain: &RuleChain,
    environment: &RuleEnvironment<'_>,
    budget: u32,
) -> CompiledRules {
    let mut compiler = Compiler::new(chain);
    for _ in 0..100_000 {
        match compiler.step(environment, budget) {
            Progress::Working(more) => compiler = more,
            Progress::Done(rules) => return rules,
            Progress::Failed(error) => panic!("{error}"),
        }
    }
    panic!("no end");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn compiled_ipv4_chain_decides_like_the_reference(
        chain in chain(Family::Ipv4),
        hosts in hosts(),
        resolvers in proptest::collection::vec(any::<u8>(), 0..3),
        budget in prop_oneof![Just(u32::MAX), 1u32..40],
        flows in proptest::collection::vec((any::<u8>(), upper()), 200),
    ) {
        let resolvers4: Vec<_> = resolvers.into_iter().map(address4).collect();
        let environment = RuleEnvironment {
            resolvers4: &resolvers4,
            resolvers6: &[],
            hosts: &hosts,
            host_policy: HostPolicy::PerRule,
        };
        let rules = compile_in_steps(&chain, &environment, budget);
        for (seed, upper) in flows {
            let destination = address4(seed);
            prop_assert_eq!(
                rules.decide4(destination, upper),
                linear::decide4(&chain, &environment, destination, upper),
                "{} {:?}", destination, upper
            );
        }
    }

    #[test]
    fn compiled_ipv6_chain_decides_like_the_reference(
        chain in chain(Family::Ipv6),
        hosts in hosts(),
        resolvers in proptest::collection::vec(any::<u8>(), 0..3),
        budget in prop_oneof![Just(u32::MAX), 1u32..40],
        flows in proptest::collection::vec((any::<u8>(), upper()), 200),
    ) {
        let resolvers6: Vec<_> = resolvers.into_iter().map(address6).collect();
        let environment = RuleEnvironment {
            resolvers4: &[],
            resolvers6: &resolvers6,
            hosts: &hosts,
            host_policy: HostPolicy::PerRule,
        };
        let rules = compile_in_steps(&chain, &environment, budget);
        for (seed, upper) in flows {
            let destination = address6(seed);
            prop_assert_eq!(
                rules.decide6(destination, upper),
                linear::decide6(&chain, &environment, destination, upper),
                "{} {:?}", destination, upper
            );
        }
    }
}

const WEB: UpperLayer = UpperLayer::Tcp { port: 443 };

fn rule(number: u16, action: Action, destination: Destination, traffic: Traffic) -> Rule {
    Rule {
        number: RuleNumber::new(number).unwrap(),
        action,
        destination,
        traffic,
    }
}

fn environment(hosts: &dyn HostLookup) -> RuleEnvironment<'_> {
    RuleEnvironment {
        resolvers4: &[],
        resolvers6: &[],
        hosts,
        host_policy: HostPolicy::PerRule,
    }
}

fn by(number: u16) -> RuleRef {
    RuleRef::Number(RuleNumber::new(number).unwrap())
}

#[test]
fn chain_without_rules_is_its_policy() {
    for policy in [Action::Accept, Action::Drop] {
        let chain = RuleChain::new(Family::Ipv4, policy, Vec::new()).unwrap();
        let rules = CompiledRules::compile(&chain, &environment(&NoHosts)).unwrap();
        let decision = rules.decide4(Ipv4Addr::new(1, 2, 3, 4), WEB);
        assert_eq!(decision.action, policy);
        assert_eq!(decision.rule, RuleRef::Policy);
    }
}

#[test]
fn deny_all_and_the_wrong_family_drop() {
    let rules = CompiledRules::deny_all(Family::Ipv4);
    assert_eq!(rules.decide4(Ipv4Addr::BROADCAST, WEB), NOTHING);
    assert_eq!(rules.decide6(Ipv6Addr::LOCALHOST, WEB), NOTHING);
    let accept = RuleChain::new(Family::Ipv6, Action::Accept, Vec::new()).unwrap();
    let rules = CompiledRules::compile(&accept, &environment(&NoHosts)).unwrap();
    assert_eq!(rules.decide4(Ipv4Addr::LOCALHOST, WEB), NOTHING);
}

const NOTHING: Decision = Decision {
    action: Action::Drop,
    rule: RuleRef::Policy,
};

/// `qubes-policy.md` 4.4 items 2 and 3, vectors P105 to P107.
#[test]
fn unresolved_accept_matches_nothing_and_unresolved_drop_everything() {
    let hosts = Hosts(vec![(false, vec![]), (true, vec![])]);
    let decide = |action, name, traffic| {
        let host = Destination::Host(HostName::new(name).unwrap());
        let rest = rule(1, Action::Accept, Destination::Any, Traffic::Any);
        let chain = vec![rule(0, action, host, traffic), rest];
        let chain = RuleChain::new(Family::Ipv4, Action::Drop, chain).unwrap();
        let rules = CompiledRules::compile(&chain, &environment(&hosts)).unwrap();
        rules.decide4(Ipv4Addr::new(1, 2, 3, 4), WEB).rule
    };
    assert_eq!(decide(Action::Accept, "h0", Traffic::Any), by(1));
    assert_eq!(decide(Action::Drop, "h0", Traffic::Any), by(0));
    assert_eq!(
        decide(Action::Drop, "h0", Traffic::Udp { ports: None }),
        by(1)
    );
    assert_eq!(decide(Action::Drop, "h1", Traffic::Any), by(1));
}

/// `qubes-policy.md` 10.1, D2.
#[test]
fn unknown_upper_layer_fits_rules_that_drop_and_not_those_that_accept() {
    let tcp = Traffic::Tcp { ports: None };
    let first = |action| {
        let chain = vec![
            rule(0, action, Destination::Any, tcp),
            rule(1, Action::Accept, Destination::Any, Traffic::Any),
        ];
        let chain = RuleChain::new(Family::Ipv6, Action::Drop, chain).unwrap();
        let rules = CompiledRules::compile(&chain, &environment(&NoHosts)).unwrap();
        rules.decide6(Ipv6Addr::LOCALHOST, UpperLayer::Unknown).rule
    };
    assert_eq!(first(Action::Drop), by(0));
    assert_eq!(first(Action::Accept), by(1));
}

#[test]
fn strict_host_policy_refuses_the_chain() {
    let hosts = Hosts(vec![(true, vec![])]);
    let host = Destination::Host(HostName::new("h0").unwrap());
    let chain = vec![rule(5, Action::Accept, host, Traffic::Any)];
    let chain = RuleChain::new(Family::Ipv4, Action::Drop, chain).unwrap();
    let strict = RuleEnvironment {
        host_policy: HostPolicy::Strict,
        ..environment(&hosts)
    };
    let error = CompiledRules::compile(&chain, &strict).unwrap_err();
    let number = RuleNumber::new(5).unwrap();
    assert_eq!(error, CompileError::HostWithoutAddress(number));
}

#[test]
fn too_many_destinations_are_an_error_that_names_the_rule() {
    struct Many;
    impl HostLookup for Many {
        fn addresses4(&self, _: &HostName, each: &mut dyn FnMut(Ipv4Addr)) -> HostState {
            (0..150).for_each(|number| each(Ipv4Addr::from_bits(number)));
            HostState::Resolved
        }
        fn addresses6(&self, _: &HostName, _: &mut dyn FnMut(Ipv6Addr)) -> HostState {
            HostState::Resolved
        }
    }
    let host = Destination::Host(HostName::new("many").unwrap());
    let rules = |count| {
        let list = (0..count).map(|n| rule(n, Action::Accept, host.clone(), Traffic::Any));
        let chain = RuleChain::new(Family::Ipv4, Action::Drop, list.collect()).unwrap();
        CompiledRules::compile(&chain, &environment(&Many))
    };
    assert!(rules(133).is_ok());
    let number = RuleNumber::new(133).unwrap();
    assert_eq!(
        rules(134).unwrap_err(),
        CompileError::TooManyDestinations(number)
    );
}

/// Ten thousand rules about the same destination: the port lists must not take quadratic time.
#[test]
fn largest_chain_on_one_destination_decides_like_the_reference() {
    let list = (0..10_000u16).map(|n| {
        let ports = if n % 2 == 0 {
            PortRange::single(n.wrapping_mul(13))
        } else {
            PortRange::new(n, 60_000 + n / 4).unwrap()
        };
        let traffic = if n % 3 == 0 {
            Traffic::Udp { ports: Some(ports) }
        } else {
            Traffic::TcpOrUdp { ports }
        };
        rule(n, Action::Accept, Destination::Any, traffic)
    });
    let chain = RuleChain::new(Family::Ipv4, Action::Drop, list.collect()).unwrap();
    let environment = environment(&NoHosts);
    let rules = CompiledRules::compile(&chain, &environment).unwrap();
    for port in (0..=65_535).step_by(97) {
        for upper in [UpperLayer::Tcp { port }, UpperLayer::Udp { port }] {
            let destination = Ipv4Addr::LOCALHOST;
            let expected = linear::decide4(&chain, &environment, destination, upper);
            assert_eq!(rules.decide4(destination, upper), expected, "{upper:?}");
        }
    }
}

#[test]
fn protocol_numbers_follow_the_family() {
    let upper = |family, protocol| UpperLayer::from_protocol(family, protocol, 8);
    let icmp = UpperLayer::Icmp { icmp_type: 8 };
    assert_eq!(upper(Family::Ipv4, 1), icmp);
    assert_eq!(upper(Family::Ipv6, 58), icmp);
    assert_eq!(upper(Family::Ipv6, 1), UpperLayer::Other);
    assert_eq!(upper(Family::Ipv4, 58), UpperLayer::Other);
    assert_eq!(upper(Family::Ipv4, 17), UpperLayer::Udp { port: 8 });
    assert_eq!(
        UpperLayer::from_protocol(Family::Ipv4, 1, 256),
        UpperLayer::Unknown
    );
}
