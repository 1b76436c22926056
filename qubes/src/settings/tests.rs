//! Settings as dom0 writes them, and as it should not.

use super::*;
use proptest::prelude::*;
use std::string::ToString;
use std::vec;

/// The environment of the packet vectors of `qubes-policy.md` section 9.
const FIXTURE: [(&str, &str); 12] = [
    ("/qubes-ip", "10.137.0.6"),
    ("/qubes-gateway", "10.137.0.5"),
    ("/qubes-ip6", "fd09:24ef:4179::a89:6"),
    ("/qubes-gateway6", "fd09:24ef:4179::a89:5"),
    ("/qubes-netvm-gateway", "10.137.0.6"),
    ("/qubes-netvm-gateway6", "fd09:24ef:4179::a89:6"),
    ("/qubes-primary-dns", "10.139.1.1"),
    ("/qubes-secondary-dns", "10.139.1.2"),
    ("/qubes-netvm-primary-dns", "10.139.1.1"),
    ("/qubes-netvm-secondary-dns", "10.139.1.2"),
    ("/connected-ips", "10.137.0.10 10.137.0.11 192.168.1.128"),
    ("/connected-ips6", "fd09:24ef:4179::a89:a"),
];

fn read(keys: &[(&str, &'static str)]) -> NetworkSettings {
    NetworkSettings::from_lookup(|key| {
        let (_, value) = keys.iter().find(|(name, _)| *name == key)?;
        Some(value.as_bytes())
    })
}

fn with(key: &'static str, value: &'static str) -> NetworkSettings {
    let mut keys = vec![(key, value)];
    keys.extend(FIXTURE);
    read(&keys)
}

#[test]
fn complete_settings_are_read() {
    let settings = with("/qubes-netvm-network", "10.137.0.5");
    assert_eq!(settings.problems, []);
    assert!(settings.is_network_provider);
    assert_eq!(settings.uplink4, Some(Ipv4Addr::new(10, 137, 0, 6)));
    assert_eq!(settings.uplink_gateway4, Some(Ipv4Addr::new(10, 137, 0, 5)));
    let own6: Ipv6Addr = "fd09:24ef:4179::a89:6".parse().unwrap();
    assert_eq!(settings.uplink6, Some(own6));
    assert_eq!(settings.client_gateway6, Some(own6));
    assert_eq!(settings.connected4.len(), 3);
    assert_eq!(settings.connected6.len(), 1);
    assert_eq!(settings.resolvers.len(), 2);
    let identity: Vec<_> = settings
        .virtual_resolvers
        .iter()
        .map(|&address| (address, DnsTarget::Resolver(address)))
        .collect();
    assert_eq!(settings.dns_map(), identity);
}

#[test]
fn missing_settings_are_named() {
    let problems = read(&[]).problems;
    let keys: Vec<_> = problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        keys,
        [
            "/qubes-ip is missing",
            "/qubes-gateway is missing",
            "/qubes-primary-dns is missing",
            "/qubes-netvm-network is missing",
            "/qubes-netvm-gateway is missing",
            "/qubes-netvm-primary-dns is missing",
            "/connected-ips is missing",
        ]
    );
}

#[test]
fn empty_list_is_not_missing() {
    let settings = read(&[("/connected-ips", "")]);
    assert!(settings.connected4.is_empty());
    assert!(
        !settings
            .problems
            .contains(&Problem::Missing(Setting::ConnectedIps))
    );
}

#[test]
fn white_space_is_ignored_and_bad_list_entries_are_left_out() {
    assert_eq!(
        read(&[("/qubes-ip", " 10.0.0.1\n")]).uplink4,
        Some(Ipv4Addr::new(10, 0, 0, 1))
    );
    let settings = read(&[("/connected-ips", "  10.0.0.1 x  10.0.0.2 ")]);
    let expected = [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)];
    assert_eq!(settings.connected4, expected);
    assert!(
        settings
            .problems
            .contains(&Problem::Malformed(Setting::ConnectedIps))
    );
}

#[test]
fn malformed_address_is_absent_and_named() {
    let settings = read(&[("/qubes-ip", "10.0.0.300"), ("/qubes-gateway6", "10.0.0.1")]);
    assert_eq!((settings.uplink4, settings.uplink_gateway6), (None, None));
    assert!(settings.problems.contains(&Problem::Malformed(Setting::Ip)));
    assert!(
        settings
            .problems
            .contains(&Problem::Malformed(Setting::Gateway6))
    );
    assert!(!settings.problems.contains(&Problem::Missing(Setting::Ip)));
}

#[test]
fn override_for_our_interface_comes_before_the_plain_keys() {
    let keys = [
        ("/qubes-mac", "00:16:3E:5E:6C:00"),
        ("/qubes-ip", "10.137.0.6"),
        ("/qubes-gateway", "10.137.0.5"),
        ("/qubes-ip6", "fd09::6"),
        ("/net-config/00:16:3e:5e:6c:00/ip", "192.0.2.1"),
        ("/net-config/00:16:3e:5e:6c:00/gateway", "192.0.2.254"),
    ];
    let settings = read(&keys);
    assert_eq!(settings.uplink_mac, Some([0, 0x16, 0x3e, 0x5e, 0x6c, 0]));
    assert_eq!(settings.uplink4, Some(Ipv4Addr::new(192, 0, 2, 1)));
    assert_eq!(
        settings.uplink_gateway4,
        Some(Ipv4Addr::new(192, 0, 2, 254))
    );
    assert_eq!(settings.uplink6, None);
    // Without the address there is no override.
    let settings = read(&keys[..4]);
    assert_eq!(settings.uplink4, Some(Ipv4Addr::new(10, 137, 0, 6)));
}

#[test]
fn mac_addresses_have_six_groups_of_two_digits() {
    assert_eq!(
        parse_mac(b"fe:ff:ff:ff:ff:ff"),
        Some([0xfe, 255, 255, 255, 255, 255])
    );
    for text in [
        "",
        "fe:ff:ff:ff:ff",
        "fe:ff:ff:ff:ff:ff:ff",
        "+e:ff:ff:ff:ff:ff",
        "fe-ff",
    ] {
        assert_eq!(parse_mac(text.as_bytes()), None, "{text}");
    }
}

#[test]
fn our_address_towards_clients_falls_back_to_the_uplink_address() {
    let settings = read(&[("/qubes-ip", "10.137.0.6")]);
    assert_eq!(settings.client_gateway4, settings.uplink4);
}

proptest! {
    #[test]
    fn no_value_is_a_panic(values in proptest::collection::vec(
        prop_oneof!["[0-9a-f.: \\n]{0,60}".prop_map(std::string::String::into_bytes),
            proptest::collection::vec(any::<u8>(), 0..60)],
        Setting::ALL.len(),
    )) {
        let settings = NetworkSettings::from_lookup(|key| {
            let index = Setting::ALL.iter().position(|setting| setting.key() == key)?;
            values.get(index).map(Vec::as_slice)
        });
        prop_assert!(settings.virtual_resolvers.len() <= 2);
        prop_assert_eq!(settings.dns_map().len(), settings.virtual_resolvers.len());
    }
}
