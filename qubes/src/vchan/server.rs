//! The server's end: our memory, granted to the peer, and a port that it may bind to.
//!
//! A server tells nobody: whoever opens one publishes its grant reference and port (see [`super::directory`]).
//! There is no grant with unmap notification for a domain that dies; a dead domain's ports close, which is as good.

use alloc::vec::Vec;

use xen::stream::{ByteStream, StreamError};
use xen::{Access, DomId, GrantRef, GrantedPage, Hypervisor, Port, PortNumber};

use super::OpenError;
use super::duplex::{Duplex, Peer};
use super::layout::Orders;

/// A channel of which we are the server.
#[derive(Debug)]
pub struct Server {
    duplex: Duplex<GrantedPage>,
    gref: GrantRef,
    port: Port,
}

/// Grants one zeroed page. References of 0 are refused: clients take them for "missing".
fn grant_zeroed<H: Hypervisor>(hypervisor: &mut H, peer: DomId) -> Option<GrantedPage> {
    let mut page = hypervisor.allocate()?;
    page.fill(0);
    let granted = match hypervisor.grant(peer, page, Access::ReadWrite) {
        Ok(granted) => granted,
        Err(page) => {
            hypervisor.release(page);
            return None;
        }
    };
    if granted.gref() == GrantRef(0) {
        // Nobody has heard of it, so the peer cannot be using it.
        if let Ok(page) = hypervisor.revoke(granted) {
            hypervisor.release(page);
        }
        return None;
    }
    Some(granted)
}

/// Takes grants back; those that the peer still uses go to `parked`, to be tried again.
pub(crate) fn take_back<H: Hypervisor>(
    hypervisor: &mut H,
    pages: impl IntoIterator<Item = GrantedPage>,
    parked: &mut Vec<GrantedPage>,
) {
    for granted in pages {
        match hypervisor.revoke(granted) {
            Ok(page) => hypervisor.release(page),
            Err(granted) => parked.push(granted),
        }
    }
}

impl Server {
    /// Takes pages and a port for a channel to `peer` and lays out the control page.
    ///
    /// # Errors
    ///
    /// [`OpenError::Exhausted`]; everything taken was given back.
    pub fn open<H: Hypervisor>(
        hypervisor: &mut H,
        peer: DomId,
        orders: Orders,
    ) -> Result<Self, OpenError> {
        let mut pages = Vec::with_capacity(orders.pages());
        let all = orders.pages().saturating_add(1);
        while pages.len() < all {
            match grant_zeroed(hypervisor, peer) {
                Some(granted) => pages.push(granted),
                None => break,
            }
        }
        let port = if pages.len() == all {
            hypervisor.allocate_port(peer).ok()
        } else {
            None
        };
        let control = if port.is_some() { pages.pop() } else { None };
        let (Some(port), Some(control)) = (port, control) else {
            // Never advertised, so no page is in use; nothing can be left over.
            take_back(hypervisor, pages, &mut Vec::new());
            return Err(OpenError::Exhausted);
        };
        let grants: Vec<u32> = pages.iter().map(|granted| granted.gref().0).collect();
        let gref = control.gref();
        Ok(Self {
            duplex: Duplex::serve(control, pages, &grants, orders),
            gref,
            port,
        })
    }

    /// The control page's grant reference, to publish as `ring-ref`.
    #[must_use]
    pub const fn ring_ref(&self) -> GrantRef {
        self.gref
    }

    /// Our port, to publish as `event-channel` and to wait for.
    #[must_use]
    pub const fn port(&self) -> PortNumber {
        self.port.number()
    }

    /// What the client's live byte says.
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

    /// Ends the channel. Pages that the peer still has mapped go to `parked` and must be tried again.
    pub fn close<H: Hypervisor>(self, hypervisor: &mut H, parked: &mut Vec<GrantedPage>) {
        let (control, pages) = self.duplex.close();
        hypervisor.notify(&[self.port.number()]);
        hypervisor.close_port(self.port);
        take_back(hypervisor, pages.into_iter().chain([control]), parked);
    }
}

impl ByteStream for Server {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        self.duplex.read(buffer)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError> {
        self.duplex.write(bytes)
    }
}
