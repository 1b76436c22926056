//! The qrexec daemon of one VM, with the clients and services that it starts in dom0.
//!
//! One thread and no forgiveness: what ends the real daemon is a [`Failure`], and so is what it survives but must not
//! happen, such as two ends of one call. The daemon hands out 256 ports in turn, so a wrong end is never mistaken.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use qubes::vchan::{Channels, Orders, Phase};
use xen::stream::ByteStream;
use xen::{DomId, Time};

use crate::caller::{Caller, Report, Spec, Violation};
use crate::service::{Response, Served, Service};
use crate::wire::{qrexec, qrexec_message, take_qrexec, word};

/// The control channel's port.
const CONTROL: u32 = 512;
/// The first and the last port of data channels.
const PORTS: (u32, u32) = (513, 768);
/// How long a port may stay taken after its call is over for the caller.
pub const TERMINATED_WAIT: Duration = Duration::from_secs(15);

/// What the VM did wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Failure {
    /// The daemon exits: a type that has no place on the control channel.
    BadType(u32),
    /// The daemon exits: a length that the type does not have.
    BadLength(u32, usize),
    /// The daemon exits: the end of a call on a port that is none.
    BadPort(u32),
    /// The daemon exits: the VM's greeting is no greeting, or too old.
    Greeting,
    /// A call was ended that does not run: the second time, or never made.
    EndOfNothing(u32),
    /// A call was ended while its data channel was still open.
    EndBeforeClose(u32),
    /// A call was over for its caller, but the VM never ended it: its port is lost.
    NoEnd(String),
    /// What the VM said on a data channel.
    Data(String, Violation),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadType(_) | Self::BadLength(..) | Self::BadPort(_) | Self::Greeting => {
                write!(f, "qrexec-daemon exits: {self:?}")
            }
            _ => write!(f, "qrexec: {self:?}"),
        }
    }
}

/// What the daemon answers to the VM's greeting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Greeting {
    /// This version, whatever the VM said (R4.2: 3).
    Version(u32),
    /// What the VM said (R4.3).
    Echo,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Looks for the VM's offer.
    Connecting,
    /// Waits for the VM's greeting.
    Greeting,
    Running,
}

/// Who uses a port.
#[derive(Debug)]
enum User<C> {
    Caller(Caller<C>),
    Service(Service<C>),
    /// Over in dom0 since then; the VM has not said so.
    Over(Time),
}

#[derive(Debug)]
struct Slot<C> {
    line: String,
    user: User<C>,
}

/// The daemon. `C` is the channel type.
#[derive(Debug)]
pub struct Daemon<C> {
    vm: DomId,
    greeting: Greeting,
    control: Option<C>,
    state: State,
    received: Vec<u8>,
    send: Vec<u8>,
    sent: usize,
    slots: BTreeMap<u32, Slot<C>>,
    next_port: u32,
    reports: Vec<Report>,
    served: Vec<(String, Served)>,
    services: BTreeMap<String, Response>,
    connections: u64,
}

impl<C: ByteStream> Daemon<C> {
    /// A daemon for `vm`.
    #[must_use]
    pub fn new(vm: DomId, greeting: Greeting) -> Self {
        Self {
            vm,
            greeting,
            control: None,
            state: State::Connecting,
            received: Vec::new(),
            send: Vec::new(),
            sent: 0,
            slots: BTreeMap::new(),
            next_port: PORTS.0,
            reports: Vec::new(),
            served: Vec::new(),
            services: BTreeMap::new(),
            connections: 0,
        }
    }

    /// Lets the VM call a service of dom0. All others are refused.
    pub fn allow(&mut self, service: &str, response: Response) {
        self.services.insert(service.into(), response);
    }

    /// Whether the VM has greeted.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.state == State::Running
    }

    /// How often the VM has greeted.
    #[must_use]
    pub const fn connections(&self) -> u64 {
        self.connections
    }

    /// Calls that are not over on both sides.
    #[must_use]
    pub fn taken_ports(&self) -> usize {
        self.slots.len()
    }

    /// Calls that are over on both sides since the last time.
    pub fn take_reports(&mut self) -> Vec<Report> {
        core::mem::take(&mut self.reports)
    }

    /// Calls of the VM that are over on both sides since the last time.
    pub fn take_served(&mut self) -> Vec<(String, Served)> {
        core::mem::take(&mut self.served)
    }

    /// All channels, to wait for them.
    pub fn channels(&self) -> impl Iterator<Item = &C> {
        let data = self.slots.values().filter_map(|slot| match &slot.user {
            User::Caller(caller) => caller.channel(),
            User::Service(service) => service.channel(),
            User::Over(_) => None,
        });
        self.control.iter().chain(data)
    }

    /// Begins a call: offers the data channel, then asks the VM. False when no port is free or nobody listens.
    pub fn call<N: Channels<Channel = C>>(&mut self, channels: &mut N, spec: Spec) -> bool {
        if self.state != State::Running {
            return false;
        }
        let Some(port) = self.free_port() else {
            return false;
        };
        let Ok(channel) = channels.listen(self.vm, port, Orders::QREXEC_DATA) else {
            return false;
        };
        let kind = if spec.just {
            qrexec::JUST_EXEC
        } else {
            qrexec::EXEC_CMDLINE
        };
        let mut payload = 0u32.to_le_bytes().to_vec();
        payload.extend(port.to_le_bytes());
        payload.extend(spec.line.bytes());
        payload.push(0);
        self.send.extend(qrexec_message(kind, &payload));
        let line = spec.line.clone();
        let user = User::Caller(Caller::new(spec, channel, channels.now()));
        self.slots.insert(port, Slot { line, user });
        true
    }

    /// Sends any bytes on the control channel, as a daemon of another version might.
    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.send.extend(bytes);
    }

    /// Loses the control channel and every call, and connects again.
    pub fn disconnect<N: Channels<Channel = C>>(&mut self, channels: &mut N) {
        for (_, slot) in core::mem::take(&mut self.slots) {
            // Dropping a caller would leave its channel open for ever.
            close_user(slot.user, channels);
        }
        if let Some(control) = self.control.take() {
            channels.close(control);
        }
        self.state = State::Connecting;
        self.received.clear();
        self.send.clear();
        self.sent = 0;
    }

    /// Moves everything on as far as possible.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn poll<N: Channels<Channel = C>>(&mut self, channels: &mut N) -> Result<(), Failure> {
        self.poll_users(channels)?;
        let Some(control) = &mut self.control else {
            self.control = channels.connect(self.vm, CONTROL).ok();
            return Ok(());
        };
        if channels.progress(control) == Phase::Opening {
            return Ok(());
        }
        if self.state == State::Connecting {
            self.state = State::Greeting;
        }
        let open = self.exchange();
        self.take_messages(channels)?;
        let rest = self.send.get(self.sent..).unwrap_or_default();
        if let Some(control) = &mut self.control {
            self.sent += control.write(rest).unwrap_or_default();
            channels.flush(control);
        }
        if !open {
            self.disconnect(channels);
        }
        Ok(())
    }

    /// Reads what has arrived. False when the channel is over.
    fn exchange(&mut self) -> bool {
        let Some(control) = &mut self.control else {
            return false;
        };
        let mut buffer = [0; 4096];
        loop {
            match control.read(&mut buffer) {
                Ok(0) => return true,
                Ok(read) => self
                    .received
                    .extend_from_slice(buffer.get(..read).unwrap_or_default()),
                Err(_) => return false,
            }
        }
    }

    fn take_messages<N: Channels<Channel = C>>(&mut self, channels: &mut N) -> Result<(), Failure> {
        while let Some((kind, payload)) = take_qrexec(&mut self.received) {
            if self.state == State::Greeting {
                self.greeted(kind, &payload)?;
                continue;
            }
            match kind {
                qrexec::CONNECTION_TERMINATED => self.terminated(channels, &payload)?,
                qrexec::TRIGGER_SERVICE3 => self.triggered(channels, &payload)?,
                _ => return Err(Failure::BadType(kind)),
            }
        }
        Ok(())
    }

    fn greeted(&mut self, kind: u32, payload: &[u8]) -> Result<(), Failure> {
        let version = word(payload, 0);
        if kind != qrexec::HELLO || payload.len() != 4 || version < 2 {
            return Err(Failure::Greeting);
        }
        let answer = match self.greeting {
            Greeting::Version(version) => version,
            Greeting::Echo => version,
        };
        self.send
            .extend(qrexec_message(qrexec::HELLO, &answer.to_le_bytes()));
        self.state = State::Running;
        self.connections += 1;
        Ok(())
    }

    /// The VM says that a call is over.
    fn terminated<N: Channels<Channel = C>>(
        &mut self,
        channels: &mut N,
        payload: &[u8],
    ) -> Result<(), Failure> {
        if payload.len() != 8 {
            return Err(Failure::BadLength(
                qrexec::CONNECTION_TERMINATED,
                payload.len(),
            ));
        }
        let (domain, port) = (word(payload, 0), word(payload, 1));
        if !(PORTS.0..=PORTS.1).contains(&port) {
            return Err(Failure::BadPort(port));
        }
        let Some(mut slot) = self.slots.remove(&port).filter(|_| domain == 0) else {
            return Err(Failure::EndOfNothing(port));
        };
        let User::Caller(caller) = &mut slot.user else {
            close_user(slot.user, channels);
            return Ok(());
        };
        let report = caller.ended(channels);
        match report.map_err(|violation| Failure::Data(slot.line, violation))? {
            Some(report) => {
                self.reports.push(report);
                Ok(())
            }
            None => Err(Failure::EndBeforeClose(port)),
        }
    }

    /// The VM wants to call a service.
    fn triggered<N: Channels<Channel = C>>(
        &mut self,
        channels: &mut N,
        payload: &[u8],
    ) -> Result<(), Failure> {
        if payload.len() <= 96 {
            return Err(Failure::BadLength(qrexec::TRIGGER_SERVICE3, payload.len()));
        }
        let ident = payload.get(64..96).unwrap_or_default();
        let service = payload.get(96..).unwrap_or_default();
        let name = service
            .split_last()
            .filter(|(last, name)| **last == 0 && !name.is_empty());
        let name = name.map(|(_, name)| String::from_utf8_lossy(name).into_owned());
        let response = name.as_ref().filter(|_| is_ident(ident));
        let response = response.and_then(|name| self.services.get(name)).cloned();
        let port = self.free_port();
        let (Some(response), Some(port), Some(name)) = (response, port, name) else {
            self.send
                .extend(qrexec_message(qrexec::SERVICE_REFUSED, ident));
            return Ok(());
        };
        let Ok(channel) = channels.connect(self.vm, port) else {
            return Ok(());
        };
        let mut accept = 0u32.to_le_bytes().to_vec();
        accept.extend(port.to_le_bytes());
        accept.extend(ident);
        self.send
            .extend(qrexec_message(qrexec::SERVICE_CONNECT, &accept));
        let service = Service::new(response, channel, channels.now());
        let slot = Slot {
            line: name,
            user: User::Service(service),
        };
        self.slots.insert(port, slot);
        Ok(())
    }

    fn poll_users<N: Channels<Channel = C>>(&mut self, channels: &mut N) -> Result<(), Failure> {
        let now = channels.now();
        for slot in self.slots.values_mut() {
            let failed = |violation| Failure::Data(slot.line.clone(), violation);
            match &mut slot.user {
                User::Caller(caller) => {
                    if let Some(report) = caller.poll(channels).map_err(failed)? {
                        self.reports.push(report);
                        slot.user = User::Over(now);
                    }
                }
                User::Service(service) => {
                    if let Some(served) = service.poll(channels).map_err(failed)? {
                        self.served.push((slot.line.clone(), served));
                        slot.user = User::Over(now);
                    }
                }
                User::Over(since) if now.since(*since) > TERMINATED_WAIT => {
                    return Err(Failure::NoEnd(slot.line.clone()));
                }
                User::Over(_) => {}
            }
        }
        Ok(())
    }

    /// The next free port, in turn.
    fn free_port(&mut self) -> Option<u32> {
        for _ in PORTS.0..=PORTS.1 {
            let port = self.next_port;
            self.next_port = if port == PORTS.1 { PORTS.0 } else { port + 1 };
            if !self.slots.contains_key(&port) {
                return Some(port);
            }
        }
        None
    }
}

/// Whether the daemon takes an ident: allowed characters, a NUL, and only NULs behind it.
fn is_ident(field: &[u8]) -> bool {
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"_.- ".contains(byte);
    let name = field.iter().take_while(|byte| **byte != 0).count();
    name < field.len()
        && field.iter().take(name).all(allowed)
        && field.iter().skip(name).all(|byte| *byte == 0)
}

/// Closes what a slot still has open.
fn close_user<N: Channels>(user: User<N::Channel>, channels: &mut N) {
    let channel = match user {
        User::Caller(caller) => caller.into_channel(),
        User::Service(service) => service.into_channel(),
        User::Over(_) => None,
    };
    if let Some(channel) = channel {
        channels.close(channel);
    }
}
