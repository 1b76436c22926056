//! The client's end: the server's memory, mapped, and a port bound to the server's.
//!
//! The mapping stays valid when the server dies, until we unmap.

use alloc::vec::Vec;

use xen::stream::{ByteStream, StreamError};
use xen::{DomId, GrantRef, Hypervisor, MappedPage, Port, PortNumber};

use super::OpenError;
use super::duplex::{Duplex, Peer};
use super::layout::Offer;

/// A channel of which we are the client.
#[derive(Debug)]
pub struct Client {
    duplex: Duplex<MappedPage>,
    port: Port,
}

/// Maps the control page and every ring page behind it.
fn map_all<H: Hypervisor>(
    hypervisor: &mut H,
    server: DomId,
    ring_ref: GrantRef,
) -> Result<Duplex<MappedPage>, OpenError> {
    let control = hypervisor
        .map(server, ring_ref)
        .map_err(|_| OpenError::Stale)?;
    let mut pages = Vec::new();
    let failure = match Offer::read(&control) {
        Err(error) => error,
        Ok(offer) => {
            for gref in &offer.grants {
                match hypervisor.map(server, *gref) {
                    Ok(page) => pages.push(page),
                    Err(_) => break,
                }
            }
            if pages.len() == offer.grants.len() {
                return Ok(Duplex::join(control, pages, offer.orders));
            }
            OpenError::Exhausted
        }
    };
    for page in pages {
        hypervisor.unmap(page);
    }
    hypervisor.unmap(control);
    Err(failure)
}

impl Client {
    /// Connects to the channel that `server` advertises.
    ///
    /// # Errors
    ///
    /// [`OpenError::Stale`] when the advertisement does not lead to a channel that waits for its client,
    /// [`OpenError::Exhausted`] when we lack a hole. Everything taken was given back.
    pub fn connect<H: Hypervisor>(
        hypervisor: &mut H,
        server: DomId,
        ring_ref: GrantRef,
        remote: PortNumber,
    ) -> Result<Self, OpenError> {
        if ring_ref.0 == 0 || remote.0 == 0 {
            return Err(OpenError::Stale);
        }
        // The port first: a dead server's port cannot be bound, and then its memory is not worth mapping.
        let port = hypervisor
            .bind_port(server, remote)
            .map_err(|_| OpenError::Stale)?;
        match map_all(hypervisor, server, ring_ref) {
            Ok(duplex) => {
                let mut client = Self { duplex, port };
                client.flush(hypervisor);
                Ok(client)
            }
            Err(error) => {
                hypervisor.close_port(port);
                Err(error)
            }
        }
    }

    /// Our port, to wait for.
    #[must_use]
    pub const fn port(&self) -> PortNumber {
        self.port.number()
    }

    /// What the server's live byte says.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.duplex.peer()
    }

    /// Sends the event that became due, if one did.
    pub fn flush<H: Hypervisor>(&mut self, hypervisor: &mut H) {
        if self.duplex.take_event() {
            hypervisor.notify(&[self.port.number()]);
        }
    }

    /// Ends the channel and gives everything back.
    pub fn close<H: Hypervisor>(self, hypervisor: &mut H) {
        let (control, pages) = self.duplex.close();
        hypervisor.notify(&[self.port.number()]);
        hypervisor.close_port(self.port);
        for page in pages {
            hypervisor.unmap(page);
        }
        hypervisor.unmap(control);
    }
}

impl ByteStream for Client {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        self.duplex.read(buffer)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError> {
        self.duplex.write(bytes)
    }
}
