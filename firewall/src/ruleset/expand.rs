//! From rules to pairs of a rule and one destination prefix.
//!
//! Host names become the addresses they stand for and `specialtarget=dns` becomes our resolvers, so
//! that everything after this step knows only prefixes.

use alloc::vec::Vec;
use core::fmt::Debug;
use core::net::{Ipv4Addr, Ipv6Addr};

use super::{CompileError, HostPolicy, HostState, MAX_LINES, RuleEnvironment};
use crate::rule::{Action, Destination, HostName, Rule, Traffic};

/// An address as a number, and what a family needs to be compiled.
pub(super) trait AddressBits: Copy + Debug + Default + Ord {
    /// Bits in an address.
    const WIDTH: u8;

    /// The highest address of the network of `self`, its lowest address, with `length` bits.
    fn last_of_prefix(self, length: u8) -> Self;

    /// The address after this one, if there is one.
    fn next(self) -> Option<Self>;

    /// The lowest address and the length of a destination that is a prefix of this family.
    fn prefix_of(destination: &Destination) -> Option<(Self, u8)>;

    /// Our resolvers in this family.
    fn resolvers(environment: &RuleEnvironment<'_>, each: &mut dyn FnMut(Self));

    /// The addresses of a host in this family.
    fn host(
        environment: &RuleEnvironment<'_>,
        name: &HostName,
        each: &mut dyn FnMut(Self),
    ) -> HostState;
}

impl AddressBits for u32 {
    const WIDTH: u8 = 32;

    fn last_of_prefix(self, length: u8) -> Self {
        self | Self::MAX.checked_shr(u32::from(length)).unwrap_or(0)
    }

    fn next(self) -> Option<Self> {
        self.checked_add(1)
    }

    fn prefix_of(destination: &Destination) -> Option<(Self, u8)> {
        match destination {
            Destination::Prefix4(prefix) => Some((prefix.address().to_bits(), prefix.length())),
            _ => None,
        }
    }

    fn resolvers(environment: &RuleEnvironment<'_>, each: &mut dyn FnMut(Self)) {
        environment
            .resolvers4
            .iter()
            .for_each(|address| each(address.to_bits()));
    }

    fn host(
        environment: &RuleEnvironment<'_>,
        name: &HostName,
        each: &mut dyn FnMut(Self),
    ) -> HostState {
        let mut each = |address: Ipv4Addr| each(address.to_bits());
        environment.hosts.addresses4(name, &mut each)
    }
}

impl AddressBits for u128 {
    const WIDTH: u8 = 128;

    fn last_of_prefix(self, length: u8) -> Self {
        self | Self::MAX.checked_shr(u32::from(length)).unwrap_or(0)
    }

    fn next(self) -> Option<Self> {
        self.checked_add(1)
    }

    fn prefix_of(destination: &Destination) -> Option<(Self, u8)> {
        match destination {
            Destination::Prefix6(prefix) => Some((prefix.address().to_bits(), prefix.length())),
            _ => None,
        }
    }

    fn resolvers(environment: &RuleEnvironment<'_>, each: &mut dyn FnMut(Self)) {
        environment
            .resolvers6
            .iter()
            .for_each(|address| each(address.to_bits()));
    }

    fn host(
        environment: &RuleEnvironment<'_>,
        name: &HostName,
        each: &mut dyn FnMut(Self),
    ) -> HostState {
        let mut each = |address: Ipv6Addr| each(address.to_bits());
        environment.hosts.addresses6(name, &mut each)
    }
}

/// A rule and one of its destinations. The order is by address, then from the shortest prefix to the
/// longest, then by rule: a prefix comes before everything inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Entry<A> {
    /// Lowest address of the prefix.
    pub(super) address: A,
    /// Prefix length in bits.
    pub(super) length: u8,
    /// Position of the rule in its chain; not its number, which may have gaps.
    pub(super) rule: u16,
}

/// Appends an entry for every destination of `rule`, which stands at `position` in its chain.
///
/// # Errors
///
/// Those of [`CompileError`]; some entries may have been appended then.
pub(super) fn expand<A: AddressBits>(
    rule: &Rule,
    position: u16,
    environment: &RuleEnvironment<'_>,
    entries: &mut Vec<Entry<A>>,
) -> Result<(), CompileError> {
    let mut fits = true;
    let mut push = |address: A, length: u8| {
        if entries.len() < MAX_LINES {
            entries.push(Entry {
                address,
                length,
                rule: position,
            });
        } else {
            fits = false;
        }
    };
    // Only resolvers, if the rule is about them.
    let mut push_target = |address: A, length: u8| {
        if !matches!(rule.traffic, Traffic::Dns(_)) {
            return push(address, length);
        }
        let last = address.last_of_prefix(length);
        A::resolvers(environment, &mut |resolver| {
            if (address..=last).contains(&resolver) {
                push(resolver, A::WIDTH);
            }
        });
    };
    match &rule.destination {
        Destination::Any => push_target(A::default(), 0),
        Destination::Host(name) => {
            // An unresolved drop rule reaches everything, which its addresses are part of.
            let mut count = 0;
            let mut add = |address| {
                count += 1;
                push_target(address, A::WIDTH);
            };
            let state = A::host(environment, name, &mut add);
            if environment.host_policy == HostPolicy::Strict && count == 0 {
                return Err(CompileError::HostWithoutAddress(rule.number));
            }
            if state == HostState::Unresolved && rule.action == Action::Drop {
                push_target(A::default(), 0);
            }
        }
        // A prefix of the other family cannot be in the chain, and would match nothing.
        prefix => {
            if let Some((address, length)) = A::prefix_of(prefix) {
                push_target(address, length);
            }
        }
    }
    if fits {
        Ok(())
    } else {
        Err(CompileError::TooManyDestinations(rule.number))
    }
}
