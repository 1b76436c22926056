//! The rows of `qubes-policy.md` 2.4 and 2.5, and random texts.

use super::*;
use proptest::prelude::*;
use std::format;
use std::string::{String, ToString};
use std::vec;
use std::vec::Vec;

fn parse(family: Family, text: &str) -> Result<Option<Rule>, RuleErrorKind> {
    let number = RuleNumber::new(7).unwrap();
    parse_rule(number, family, text.as_bytes()).map_err(|error| error.kind)
}

fn canonical(family: Family, text: &str) -> String {
    RuleText(&parse(family, text).unwrap().unwrap()).to_string()
}

fn kind(text: &str) -> RuleErrorKind {
    parse(Family::Ipv4, text).unwrap_err()
}

/// `qubes-policy.md` 2.4.
#[test]
fn canonical_rules_print_as_they_were_written() {
    for text in [
        "action=accept",
        "action=drop proto=icmp",
        "action=accept specialtarget=dns",
        "action=drop proto=tcp specialtarget=dns",
        "action=accept dst4=192.0.2.0/24 proto=tcp dstports=80-80",
        "action=accept dsthost=updates.example.org proto=udp dstports=8000-8100",
        "action=accept proto=icmp icmptype=8",
    ] {
        assert_eq!(canonical(Family::Ipv4, text), text);
    }
    let text = "action=drop dst6=2001:db8:8000::/37 proto=tcp";
    assert_eq!(canonical(Family::Ipv6, text), text);
}

/// The lenient rows of `qubes-policy.md` 2.5.
#[test]
fn accepted_variants_mean_the_canonical_rule() {
    for (text, meaning) in [
        ("proto=tcp action=drop", "action=drop proto=tcp"),
        (
            "action=drop dst4=10.1.2.3/08",
            "action=drop dst4=10.0.0.0/8",
        ),
        ("action=drop dst4=10.1.2.3", "action=drop dst4=10.1.2.3/32"),
        ("action=drop dstports=443", "action=drop dstports=443-443"),
        ("action=drop dstports=1-2", "action=drop dstports=1-2"),
        (
            "action=drop icmptype=255",
            "action=drop proto=icmp icmptype=255",
        ),
        (
            "action=drop specialtarget=dns dstports=53 proto=udp",
            "action=drop proto=udp specialtarget=dns",
        ),
        (
            "action=drop specialtarget=dns dstports=53-53",
            "action=drop specialtarget=dns",
        ),
    ] {
        assert_eq!(canonical(Family::Ipv4, text), meaning);
    }
    let mapped = "action=drop dst6=::FFFF:1.2.3.4";
    assert_eq!(
        canonical(Family::Ipv6, mapped),
        "action=drop dst6=::ffff:102:304/128"
    );
}

/// `qubes-policy.md` 2.2, 2.5 and vector P096.
#[test]
fn impossible_dns_rules_never_match() {
    for text in [
        "action=accept proto=icmp specialtarget=dns",
        "action=accept specialtarget=dns icmptype=8",
        "action=accept specialtarget=dns dstports=50-60",
        "action=accept proto=tcp specialtarget=dns dstports=54",
    ] {
        assert_eq!(parse(Family::Ipv4, text), Ok(None), "{text}");
    }
}

/// The blocking rows of `qubes-policy.md` 2.5.
#[test]
fn malformed_rules_are_errors_with_a_reason() {
    use RuleErrorKind as E;
    let bad = |option, text: &str| E::BadValue(option, Excerpt::new(text.as_bytes()));
    for (text, expected) in [
        ("proto=tcp", E::NoAction),
        ("action=ACCEPT", bad(OptionName::Action, "ACCEPT")),
        ("action=", bad(OptionName::Action, "")),
        ("", E::EmptyOption),
        (" action=accept", E::EmptyOption),
        ("action=accept ", E::EmptyOption),
        ("action=accept  proto=tcp", E::EmptyOption),
        ("action=accept\tproto=tcp", E::BadByte(9)),
        ("action=accept dsthost=ex\u{e4}mple", E::BadByte(0xc3)),
        ("action=accept tcp", E::NotAnOption(Excerpt::new(b"tcp"))),
        (
            "action=accept foo=1",
            E::UnknownOption(Excerpt::new(b"foo")),
        ),
        (
            "action=accept expire=1",
            E::UnknownOption(Excerpt::new(b"expire")),
        ),
        (
            "action=accept dpi=1",
            E::UnknownOption(Excerpt::new(b"dpi")),
        ),
        (
            "action=accept Proto=tcp",
            E::UnknownOption(Excerpt::new(b"Proto")),
        ),
        ("action=accept =", E::UnknownOption(Excerpt::new(b""))),
        (
            "action=accept action=accept",
            E::Repeated(OptionName::Action),
        ),
        (
            "action=accept proto=tcp proto=tcp",
            E::Repeated(OptionName::Proto),
        ),
        ("action=accept dst6=::/0", E::WrongFamily(OptionName::Dst6)),
        (
            "action=accept dst4=1.2.3.4 dsthost=a",
            E::SeveralDestinations,
        ),
        ("action=accept dst4=1.2.3.4 dst6=::", E::SeveralDestinations),
        ("action=accept proto=icmp dstports=1", E::PortsWithIcmp),
        ("action=accept dstports=1 icmptype=1", E::PortsWithIcmp),
        ("action=accept proto=tcp icmptype=1", E::TypeWithoutIcmp),
        ("action=accept dsthost=a=b", bad(OptionName::DstHost, "a=b")),
        ("action=accept dsthost=", bad(OptionName::DstHost, "")),
        ("action=accept proto=sctp", bad(OptionName::Proto, "sctp")),
        ("action=accept proto=6", bad(OptionName::Proto, "6")),
        (
            "action=accept specialtarget=foo",
            bad(OptionName::SpecialTarget, "foo"),
        ),
        (
            "action=accept icmptype=256",
            bad(OptionName::IcmpType, "256"),
        ),
        ("action=accept icmptype=+1", bad(OptionName::IcmpType, "+1")),
    ] {
        assert_eq!(kind(text), expected, "{text}");
    }
    assert_eq!(
        parse(Family::Ipv6, "action=accept dst4=1.2.3.4"),
        Err(E::WrongFamily(OptionName::Dst4))
    );
}

#[test]
fn bad_addresses_and_ports_are_errors() {
    for value in [
        "1.2.3",
        "1.2.3.4.5",
        "01.2.3.4",
        "1.2.3.256",
        "1.2.3.4/33",
        "1.2.3.4/",
        "1.2.3.4/-1",
        "1.2.3.4/8/8",
        "1.2.3.4/255.0.0.0",
        "/8",
        "",
        "10.1",
        "0x7f.0.0.1",
        "1.2.3.4/+8",
    ] {
        let error = kind(&format!("action=accept dst4={value}"));
        assert!(
            matches!(error, RuleErrorKind::BadValue(OptionName::Dst4, _)),
            "{value}"
        );
    }
    for value in [
        "::/129",
        ":::",
        "1.2.3.4",
        "fe80::1%1",
        "::g",
        "",
        "2001:db8::/",
    ] {
        let text = format!("action=accept dst6={value}");
        let error = parse(Family::Ipv6, &text).unwrap_err();
        assert!(
            matches!(error, RuleErrorKind::BadValue(OptionName::Dst6, _)),
            "{value}"
        );
    }
    for value in [
        "", "-", "2-1", "65536", "1-65536", "1-2-3", "-1", "1-", "http", "1,2", "+1",
    ] {
        let error = kind(&format!("action=accept dstports={value}"));
        assert!(
            matches!(error, RuleErrorKind::BadValue(OptionName::DstPorts, _)),
            "{value}"
        );
    }
}

#[test]
fn errors_name_the_rule_and_print_no_raw_bytes() {
    let number = RuleNumber::new(12).unwrap();
    let text = |bytes: &[u8]| {
        parse_rule(number, Family::Ipv4, bytes)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        text(b"action=accept dpi=x"),
        "rule 0012: unknown option 'dpi'"
    );
    assert_eq!(
        text(b"action=accept proto=gopher"),
        "rule 0012: bad value 'gopher' for proto"
    );
    assert_eq!(
        text(b"action=\x1b[2J"),
        "rule 0012: byte 0x1b is not allowed"
    );
}

fn word() -> impl Strategy<Value = String> {
    prop_oneof![
        "action=(accept|drop)",
        "dst4=[0-9./]{0,18}",
        "dst4=[0-9]{1,3}\\.[0-9]{1,2}\\.0\\.[0-9]{1,2}(/[0-9]{1,2})?",
        "dst6=[0-9a-fA-F:./]{0,20}",
        "dst6=[0-9a-f]{1,4}::[0-9a-f]{1,4}(/[0-9]{1,3})?",
        "dsthost=[a-z0-9._-]{0,12}",
        "proto=(tcp|udp|icmp|sctp)",
        "specialtarget=dns",
        "dstports=[0-9]{0,5}-?[0-9]{0,5}",
        "icmptype=[0-9]{0,3}",
        "[a-z]{0,6}=?[a-z]{0,3}",
    ]
}

/// Texts that are often rules, and often nearly.
fn text() -> impl Strategy<Value = Vec<u8>> {
    let words = proptest::collection::vec(word(), 0..5);
    let likely = ("action=(accept|drop)", words).prop_map(|(action, words)| {
        let words = core::iter::once(action).chain(words);
        words.collect::<Vec<_>>().join(" ").into_bytes()
    });
    prop_oneof![4 => likely, 1 => proptest::collection::vec(any::<u8>(), 0..80)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn any_rule_that_is_read_prints_as_a_text_for_the_same_rule(
        text in text(),
        is_ipv6 in any::<bool>(),
    ) {
        let family = if is_ipv6 { Family::Ipv6 } else { Family::Ipv4 };
        let number = RuleNumber::new(0).unwrap();
        match parse_rule(number, family, &text) {
            Ok(Some(rule)) => {
                let printed = RuleText(&rule).to_string();
                let again = parse_rule(number, family, printed.as_bytes());
                prop_assert_eq!(again, Ok(Some(rule)), "{}", printed);
            }
            Ok(None) => {}
            Err(error) => prop_assert!(error.to_string().bytes().all(|b| (b' '..=b'~').contains(&b))),
        }
    }
}
