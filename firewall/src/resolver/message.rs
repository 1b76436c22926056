//! DNS messages, as far as a stub resolver needs them: queries for addresses, and their answers.
//!
//! Answers come from the network and may hold anything. Counts in a message are not believed: reading
//! stops at the end of the bytes, after [`MAX_RECORDS`] records or [`MAX_ALIASES`] aliases, whichever
//! comes first. Nothing is allocated.
//!
//! Source: RFC 1035 section 4, RFC 2181 section 8, RFC 3596.

use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::name::Name;
use crate::rule::Family;

/// Length of the header in bytes.
const HEADER_LEN: usize = 12;

/// Most records of the answer section that are looked at.
const MAX_RECORDS: usize = 256;

/// Most aliases (CNAME records) that are followed.
const MAX_ALIASES: usize = 16;

const TYPE_A: u16 = 1;
const TYPE_CNAME: u16 = 5;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;

// Bits of the third and fourth header byte, as one number.
const RESPONSE: u16 = 0x8000;
const OPCODE: u16 = 0x7800;
const TRUNCATED: u16 = 0x0200;
const RECURSION_DESIRED: u16 = 0x0100;
const RCODE: u16 = 0x000f;

const RCODE_NO_ERROR: u16 = 0;
const RCODE_NO_SUCH_NAME: u16 = 3;

/// What is asked: the addresses of a name in one family.
#[derive(Clone, Copy)]
pub(super) struct Question {
    pub(super) name: Name,
    pub(super) family: Family,
}

/// What an answer to our question says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The name has addresses, which were handed out one by one. They hold for this many seconds.
    Addresses(u32),
    /// The name exists and has no address of the family.
    NoData,
    /// There is no such name.
    NoSuchName,
    /// The answer did not fit: ask by TCP.
    Truncated,
    /// The server cannot say (this is its response code), or what it says makes no sense (zero).
    Failure(u8),
}

/// The type of the records that hold addresses of a family.
const fn record_type(family: Family) -> u16 {
    match family {
        Family::Ipv4 => TYPE_A,
        Family::Ipv6 => TYPE_AAAA,
    }
}

fn u16_at(message: &[u8], position: usize) -> Option<u16> {
    let bytes = message.get(position..)?.first_chunk()?;
    Some(u16::from_be_bytes(*bytes))
}

impl Question {
    /// Appends a query with recursion desired.
    pub(super) fn write(&self, id: u16, message: &mut Vec<u8>) {
        let counts = [1, 0, 0, 0];
        for number in [id, RECURSION_DESIRED].into_iter().chain(counts) {
            message.extend(number.to_be_bytes());
        }
        message.extend(self.name.as_bytes());
        message.push(0);
        message.extend(record_type(self.family).to_be_bytes());
        message.extend(CLASS_IN.to_be_bytes());
    }

    /// Reads a message as a query of somebody else: its id and its question, if it is a query for
    /// addresses and nothing else.
    pub(super) fn read(message: &[u8]) -> Option<(u16, Self)> {
        let flags = u16_at(message, 2)?;
        let (question, _) = Self::read_section(message)?;
        (flags & (RESPONSE | OPCODE) == 0).then_some((u16_at(message, 0)?, question))
    }

    /// Reads the question section, which must hold one question for addresses; also says where the
    /// answer section begins.
    fn read_section(message: &[u8]) -> Option<(Self, usize)> {
        let (name, position) = Name::read(message, HEADER_LEN)?;
        let family = match u16_at(message, position)? {
            TYPE_A => Family::Ipv4,
            TYPE_AAAA => Family::Ipv6,
            _ => return None,
        };
        let is_one = u16_at(message, 4)? == 1 && u16_at(message, position + 2)? == CLASS_IN;
        is_one.then_some((Self { name, family }, position + 4))
    }

    /// Reads the answer to this question with this id, and hands out the addresses in it, each of the
    /// question's family. `None` if the message is something else.
    pub(super) fn read_answer(
        &self,
        id: u16,
        message: &[u8],
        each: &mut dyn FnMut(IpAddr),
    ) -> Option<Answer> {
        let flags = u16_at(message, 2)?;
        let (asked, start) = Self::read_section(message)?;
        let is_ours = u16_at(message, 0)? == id
            && flags & (RESPONSE | OPCODE) == RESPONSE
            && asked.name == self.name
            && asked.family == self.family;
        if !is_ours {
            return None;
        }
        if flags & TRUNCATED != 0 {
            return Some(Answer::Truncated);
        }
        let count = usize::from(u16_at(message, 6)?).min(MAX_RECORDS);
        let section = Section {
            message,
            start,
            count,
        };
        Some(match flags & RCODE {
            RCODE_NO_ERROR => self.read_addresses(&section, each),
            RCODE_NO_SUCH_NAME => Answer::NoSuchName,
            code => Answer::Failure(u8::try_from(code).unwrap_or(0)),
        })
    }

    fn read_addresses(&self, section: &Section<'_>, each: &mut dyn FnMut(IpAddr)) -> Answer {
        // From a piece of an answer nothing follows, least of all that there are no addresses.
        if section.records().count() < section.count {
            return Answer::Failure(0);
        }
        let mut ttl = u32::MAX;
        let Some(owner) = section.follow_aliases(self.name, &mut ttl) else {
            return Answer::Failure(0);
        };
        let mut found = false;
        for record in section.records() {
            if record.class != CLASS_IN || record.name != owner {
                continue;
            }
            let address = match (self.family, record.kind) {
                (Family::Ipv4, TYPE_A) => address4(record.data),
                (Family::Ipv6, TYPE_AAAA) => address6(record.data),
                _ => continue,
            };
            let Some(address) = address else {
                return Answer::Failure(0);
            };
            found = true;
            ttl = ttl.min(record.ttl);
            each(address);
        }
        if found {
            Answer::Addresses(ttl)
        } else {
            Answer::NoData
        }
    }
}

fn address4(data: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(data)
        .ok()
        .map(|bytes| Ipv4Addr::from(bytes).into())
}

fn address6(data: &[u8]) -> Option<IpAddr> {
    <[u8; 16]>::try_from(data)
        .ok()
        .map(|bytes| Ipv6Addr::from(bytes).into())
}

/// The answer section of a message.
struct Section<'a> {
    message: &'a [u8],
    start: usize,
    count: usize,
}

/// A resource record.
struct Record<'a> {
    name: Name,
    kind: u16,
    class: u16,
    /// Seconds. A value with the highest bit set counts as zero (RFC 2181 section 8).
    ttl: u32,
    data: &'a [u8],
    /// Where `data` begins in the message: names in it may be compressed.
    data_start: usize,
}

impl<'a> Section<'a> {
    /// The records, up to the first one that cannot be read.
    fn records(&self) -> impl Iterator<Item = Record<'a>> {
        let message = self.message;
        let mut position = self.start;
        (0..self.count).map_while(move |_| {
            let (name, fixed) = Name::read(message, position)?;
            let ttl = u32::from_be_bytes(*message.get(fixed + 4..)?.first_chunk()?);
            let data_start = fixed + 10;
            let data_len = usize::from(u16_at(message, fixed + 8)?);
            position = data_start + data_len;
            Some(Record {
                name,
                kind: u16_at(message, fixed)?,
                class: u16_at(message, fixed + 2)?,
                ttl: i32::try_from(ttl).map_or(0, |_| ttl),
                data: message.get(data_start..position)?,
                data_start,
            })
        })
    }

    /// The name that `name` is an alias of in the end, which may be itself. Lowers `ttl` to that of the
    /// aliases. `None` if the aliases make no sense.
    fn follow_aliases(&self, name: Name, ttl: &mut u32) -> Option<Name> {
        let mut owner = name;
        let mut followed = 0;
        loop {
            let before = followed;
            // Servers list aliases in order, so one pass usually follows all of them.
            for record in self.records() {
                if (record.kind, record.class) == (TYPE_CNAME, CLASS_IN) && record.name == owner {
                    (owner, _) = Name::read(self.message, record.data_start)?;
                    *ttl = record.ttl.min(*ttl);
                    followed += 1;
                    if followed > MAX_ALIASES {
                        return None;
                    }
                }
            }
            if followed == before {
                return Some(owner);
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
