//! The dom0 side of a call that the VM makes: a service in dom0, client of the VM's data channel.

use std::time::Duration;

use qubes::vchan::{Channels, Phase};
use xen::Time;
use xen::stream::ByteStream;

use crate::caller::Violation;
use crate::wire::{qrexec, qrexec_message, take_qrexec, word};

/// How long dom0 waits for the VM to offer the channel.
const CONNECT_WAIT: Duration = Duration::from_secs(5);

/// What a service in dom0 answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Response {
    /// Its output.
    pub stdout: Vec<u8>,
    /// Its exit code.
    pub exit: u8,
}

/// The running service.
#[derive(Debug)]
pub struct Service<C> {
    response: Response,
    channel: Option<C>,
    began: Time,
    received: Vec<u8>,
    greeted: bool,
    input: Vec<u8>,
    input_ended: bool,
    send: Vec<u8>,
    sent: usize,
}

/// How a service ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Served {
    /// It took all the input and its answer was read to the end.
    Answered(Vec<u8>),
    /// The VM never offered the channel, or closed early.
    Abandoned,
}

impl<C: ByteStream> Service<C> {
    /// A service that looks for the VM's channel.
    pub const fn new(response: Response, channel: C, now: Time) -> Self {
        Self {
            response,
            channel: Some(channel),
            began: now,
            received: Vec::new(),
            greeted: false,
            input: Vec::new(),
            input_ended: false,
            send: Vec::new(),
            sent: 0,
        }
    }

    /// The channel, to wait for it.
    pub const fn channel(&self) -> Option<&C> {
        self.channel.as_ref()
    }

    /// The channel, to close it.
    pub fn into_channel(self) -> Option<C> {
        self.channel
    }

    /// Moves on; the end when it is over.
    ///
    /// # Errors
    ///
    /// [`Violation`].
    pub fn poll<N: Channels<Channel = C>>(
        &mut self,
        channels: &mut N,
    ) -> Result<Option<Served>, Violation> {
        let now = channels.now();
        let Some(channel) = &mut self.channel else {
            return Ok(None);
        };
        if channels.progress(channel) == Phase::Opening {
            if now.since(self.began) < CONNECT_WAIT {
                return Ok(None);
            }
            return Ok(Some(self.close(channels, Served::Abandoned)));
        }
        let mut over = false;
        let mut buffer = [0; 4096];
        loop {
            match channel.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => self
                    .received
                    .extend_from_slice(buffer.get(..read).unwrap_or_default()),
                Err(_) => {
                    over = true;
                    break;
                }
            }
        }
        while let Some((kind, payload)) = take_qrexec(&mut self.received) {
            self.take(kind, &payload)?;
        }
        let Some(channel) = &mut self.channel else {
            return Ok(None);
        };
        let rest = self.send.get(self.sent..).unwrap_or_default();
        self.sent += channel.write(rest).unwrap_or_default();
        channels.flush(channel);
        if self.input_ended && self.sent == self.send.len() {
            let input = core::mem::take(&mut self.input);
            return Ok(Some(self.close(channels, Served::Answered(input))));
        }
        if over {
            return Ok(Some(self.close(channels, Served::Abandoned)));
        }
        Ok(None)
    }

    fn close<N: Channels<Channel = C>>(&mut self, channels: &mut N, served: Served) -> Served {
        if let Some(channel) = self.channel.take() {
            channels.close(channel);
        }
        served
    }

    fn take(&mut self, kind: u32, payload: &[u8]) -> Result<(), Violation> {
        if !self.greeted {
            if kind != qrexec::HELLO || payload.len() != 4 || word(payload, 0) < 2 {
                return Err(Violation::Greeting);
            }
            self.greeted = true;
            // The service side greets second, and ends its error output at once.
            self.send
                .extend(qrexec_message(qrexec::HELLO, &4u32.to_le_bytes()));
            self.send.extend(qrexec_message(qrexec::STDERR, b""));
            return Ok(());
        }
        if kind != qrexec::STDIN {
            return Err(Violation::Type(kind));
        }
        if payload.is_empty() {
            self.input_ended = true;
            if !self.response.stdout.is_empty() {
                self.send
                    .extend(qrexec_message(qrexec::STDOUT, &self.response.stdout));
            }
            self.send.extend(qrexec_message(qrexec::STDOUT, b""));
            let code = u32::from(self.response.exit).to_le_bytes();
            self.send.extend(qrexec_message(qrexec::EXIT_CODE, &code));
        } else if self.input_ended {
            return Err(Violation::AfterEnd(kind));
        }
        self.input.extend_from_slice(payload);
        Ok(())
    }
}
