//! One lookup: asking servers in turn until one answers.
//!
//! Each attempt is a UDP query with a new random id and port to the next server, with growing patience.
//! Answers to earlier attempts still count, because a slow server is not a dead one. A truncated answer
//! is followed by the same question over TCP.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::net::IpAddr;

use super::message::{Answer, Question};
use super::random::Random;
use super::tcp::{Connection, DEADLINE_MILLIS, Outcome};
use super::{FailureKind, MAX_ADDRESSES, Transmit, Transport};
use crate::frame::Time;

/// The port of DNS; its upper byte is zero.
pub(super) const SERVER_PORT: u8 = 53;

/// How often a question is asked.
const MAX_ATTEMPTS: u8 = 6;

/// Patience with each server when it is first asked, in milliseconds; doubles up to four times this.
const FIRST_PATIENCE_MILLIS: u64 = 1_000;
const MAX_DOUBLINGS: usize = 2;

/// Lowest local port. IANA leaves the ports from here on to everybody.
const FIRST_LOCAL_PORT: u16 = 49_152;

/// Packets that may wait to be sent. More are lost, as packets may be.
const MAX_OUTGOING: usize = 64;

/// Length of a UDP header in bytes.
const UDP_HEADER_LEN: u16 = 8;

/// What an exchange needs to ask.
pub(super) struct Line<'a> {
    pub(super) servers: &'a [IpAddr],
    pub(super) random: &'a mut Random,
    pub(super) outgoing: &'a mut VecDeque<Transmit>,
}

impl Line<'_> {
    fn send(&mut self, server: IpAddr, transport: Transport, bytes: Vec<u8>) {
        if self.outgoing.len() < MAX_OUTGOING {
            self.outgoing.push_back(Transmit {
                server,
                transport,
                bytes,
            });
        }
    }

    /// A query nobody can predict.
    fn ask(&mut self, server: IpAddr) -> Asked {
        Asked {
            server,
            id: self.random.next_u16(),
            local_port: self.random.next_u16() | FIRST_LOCAL_PORT,
        }
    }
}

/// A good answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// At most [`MAX_ADDRESSES`].
    pub(super) addresses: Vec<IpAddr>,
    /// Seconds; `None` if there are no addresses.
    pub(super) ttl: Option<u32>,
}

impl Found {
    /// Reads a message as a good answer to a question; `None` if it is anything else.
    pub(super) fn read(question: &Question, id: u16, message: &[u8]) -> Option<Self> {
        read_answer(question, id, message)?.ok()
    }
}

/// Reads a message as an answer; `None` if it does not answer this question.
fn read_answer(question: &Question, id: u16, message: &[u8]) -> Option<Result<Found, Answer>> {
    let mut addresses = Vec::new();
    let mut collect = |address| {
        if addresses.len() < MAX_ADDRESSES {
            addresses.push(address);
        }
    };
    let ttl = match question.read_answer(id, message, &mut collect)? {
        Answer::Addresses(ttl) => Some(ttl),
        Answer::NoData => None,
        other => return Some(Err(other)),
    };
    Some(Ok(Found { addresses, ttl }))
}

/// What has become of an exchange.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// It goes on.
    Waiting,
    /// It goes on, and the packet made no sense.
    Ignored,
    /// It has come to a result.
    Over(Result<Found, FailureKind>),
}

/// A query that is out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Asked {
    server: IpAddr,
    id: u16,
    local_port: u16,
}

/// A lookup under way.
pub(super) struct Exchange {
    /// The record that it is for.
    pub(super) record: u32,
    question: Question,
    /// The UDP queries so far; the last one is the current attempt.
    asked: Vec<Asked>,
    /// The TCP connection, while there is one.
    tcp: Option<(Asked, Connection)>,
    /// When the attempt is given up.
    give_up_at: Time,
    /// What was wrong with the last server.
    failure: FailureKind,
}

impl core::fmt::Debug for Exchange {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Exchange")
            .field("record", &self.record)
            .field("asked", &self.asked)
            .field("tcp", &self.tcp)
            .finish_non_exhaustive()
    }
}

impl Exchange {
    /// Asks the first server. There must be one, or the exchange only waits to be given up.
    pub(super) fn begin(record: u32, question: Question, line: &mut Line<'_>, now: Time) -> Self {
        let mut exchange = Self {
            record,
            question,
            asked: Vec::new(),
            tcp: None,
            give_up_at: now,
            failure: FailureKind::Timeout,
        };
        exchange.ask_next(line, now);
        exchange
    }

    /// When [`Self::tend`] has something to do.
    pub(super) fn deadline(&self) -> Time {
        let tcp = self
            .tcp
            .as_ref()
            .and_then(|(_, connection)| connection.deadline());
        tcp.map_or(self.give_up_at, |time| time.min(self.give_up_at))
    }

    /// Whether a packet with these addresses and ports may be an answer.
    pub(super) fn has_asked(&self, server: IpAddr, transport: Transport, local_port: u16) -> bool {
        let fits = |asked: &Asked| (asked.server, asked.local_port) == (server, local_port);
        match transport {
            Transport::Udp => self.asked.iter().any(fits),
            Transport::Tcp => self.tcp.as_ref().is_some_and(|(asked, _)| fits(asked)),
        }
    }

    /// Sends what is due and gives up on servers that are silent.
    pub(super) fn tend(&mut self, line: &mut Line<'_>, now: Time) -> Step {
        if now >= self.give_up_at {
            if let Some((_, connection)) = &mut self.tcp {
                connection.abort();
                let _ = self.send_segments(line, now);
            }
            return self.fail(FailureKind::Timeout, line, now);
        }
        if self.send_segments(line, now).is_err() {
            return self.fail(FailureKind::Timeout, line, now);
        }
        Step::Waiting
    }

    /// Takes a datagram that [`Self::has_asked`] said yes to.
    pub(super) fn receive_udp(
        &mut self,
        server: IpAddr,
        local_port: u16,
        bytes: &[u8],
        line: &mut Line<'_>,
        now: Time,
    ) -> Step {
        // Over TCP already: nothing that comes by UDP is better.
        if self.tcp.is_some() {
            return Step::Ignored;
        }
        let Some(message) = udp_payload(bytes) else {
            return Step::Ignored;
        };
        let fits = |asked: &&Asked| (asked.server, asked.local_port) == (server, local_port);
        for &asked in self.asked.iter().filter(fits) {
            match read_answer(&self.question, asked.id, message) {
                None => {}
                Some(Ok(found)) => return Step::Over(Ok(found)),
                Some(Err(Answer::Truncated)) => {
                    self.connect(server, line, now);
                    return self.tend(line, now);
                }
                Some(Err(Answer::NoSuchName)) => {
                    return Step::Over(Err(FailureKind::NoSuchName));
                }
                // A server that was given up on says that it cannot help: no news.
                Some(Err(_)) if self.asked.last() != Some(&asked) => return Step::Waiting,
                Some(Err(answer)) => return self.fail(failure(answer), line, now),
            }
        }
        Step::Ignored
    }

    /// Takes a segment that [`Self::has_asked`] said yes to.
    pub(super) fn receive_tcp(&mut self, bytes: &[u8], line: &mut Line<'_>, now: Time) -> Step {
        let Some((asked, connection)) = &mut self.tcp else {
            return Step::Ignored;
        };
        match connection.receive(bytes, now) {
            Outcome::Open => self.tend(line, now),
            Outcome::Failed => {
                let _ = self.send_segments(line, now);
                self.fail(FailureKind::ServerFailure(0), line, now)
            }
            Outcome::Answered => {
                let answer = read_answer(&self.question, asked.id, connection.answer());
                let _ = self.send_segments(line, now);
                match answer {
                    Some(Ok(found)) => Step::Over(Ok(found)),
                    Some(Err(Answer::NoSuchName)) => Step::Over(Err(FailureKind::NoSuchName)),
                    Some(Err(answer)) => self.fail(failure(answer), line, now),
                    None => self.fail(FailureKind::ServerFailure(0), line, now),
                }
            }
        }
    }

    /// Goes on to the next attempt, if there is one left.
    fn fail(&mut self, kind: FailureKind, line: &mut Line<'_>, now: Time) -> Step {
        // That a server was silent says less than what another one said.
        if kind != FailureKind::Timeout || self.failure == FailureKind::Timeout {
            self.failure = kind;
        }
        self.tcp = None;
        if self.asked.len() >= usize::from(MAX_ATTEMPTS) {
            return Step::Over(Err(self.failure));
        }
        self.ask_next(line, now);
        Step::Waiting
    }

    /// Sends a UDP query to the next server.
    fn ask_next(&mut self, line: &mut Line<'_>, now: Time) {
        let attempt = self.asked.len();
        let count = line.servers.len().max(1);
        let doublings = (attempt / count).min(MAX_DOUBLINGS);
        let patience = FIRST_PATIENCE_MILLIS << doublings;
        self.give_up_at = now.plus_nanos(patience * 1_000_000);
        let Some(&server) = line.servers.get(attempt % count) else {
            return;
        };
        let asked = line.ask(server);
        self.asked.push(asked);
        let mut bytes = Vec::with_capacity(64);
        bytes.extend(asked.local_port.to_be_bytes());
        bytes.extend([0, SERVER_PORT]);
        // The length comes below; the checksum covers addresses that are not known here.
        bytes.extend([0; 4]);
        self.question.write(asked.id, &mut bytes);
        let len = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        if let Some(field) = bytes.get_mut(4..6) {
            field.copy_from_slice(&len.to_be_bytes());
        }
        line.send(server, Transport::Udp, bytes);
    }

    /// Opens a TCP connection to the server that truncated its answer.
    fn connect(&mut self, server: IpAddr, line: &mut Line<'_>, now: Time) {
        let asked = line.ask(server);
        let mut query = Vec::new();
        self.question.write(asked.id, &mut query);
        let first = line.random.next_u32();
        let port = u16::from(SERVER_PORT);
        let connection = Connection::new(asked.local_port, port, &query, first, now);
        self.tcp = Some((asked, connection));
        self.give_up_at = now.plus_nanos(DEADLINE_MILLIS * 1_000_000);
    }

    /// Sends the segments that are due. `Err` if the server does not react.
    fn send_segments(&mut self, line: &mut Line<'_>, now: Time) -> Result<(), ()> {
        let Some((asked, connection)) = &mut self.tcp else {
            return Ok(());
        };
        while let Some(segment) = connection.next_segment(now)? {
            line.send(asked.server, Transport::Tcp, segment);
        }
        Ok(())
    }
}

/// What is wrong with a server that gave an answer without use.
const fn failure(answer: Answer) -> FailureKind {
    match answer {
        Answer::Failure(code) => FailureKind::ServerFailure(code),
        _ => FailureKind::ServerFailure(0),
    }
}

/// The payload of a datagram, if its length is right.
fn udp_payload(bytes: &[u8]) -> Option<&[u8]> {
    let &[_, _, _, _, high, low] = bytes.first_chunk()?;
    let len = u16::from_be_bytes([high, low]);
    bytes.get(usize::from(UDP_HEADER_LEN)..usize::from(len))
}
