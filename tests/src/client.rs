//! A client qube's frontend.

use std::collections::VecDeque;

use netback::{ConnectParameters, FrontendFeatures, VifTag};
use xen::fake::{FakeHypervisor, FakeMachine};
use xen::netif::{
    Extra, ExtraKind, GsoType, RX_WORDS, RxFlags, RxRequest, RxResponse, TX_WORDS, TxFlags,
    TxRequest, TxResponse, status,
};
use xen::page::RingMemory;
use xen::{Access, DomId, GrantRef, GrantedPage, Hypervisor, Port, SharedPage};

use crate::raw::{self, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};

/// All features that a Linux frontend has.
pub const LINUX: FrontendFeatures = FrontendFeatures {
    rx_copy: true,
    rx_notify: true,
    sg: true,
    gso_tcpv4: true,
    gso_tcpv6: true,
    no_csum_offload: false,
    ipv6_csum_offload: true,
};

/// One piece of a frame to transmit: its bytes, and where they stand in a page of their own.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Byte offset in the page.
    pub offset: u16,
    /// The data; may be empty.
    pub bytes: Vec<u8>,
}

/// A frame received from the backend.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Received {
    /// All bytes, slot after slot.
    pub bytes: Vec<u8>,
    /// The flags of the first slot.
    pub flags: RxFlags,
    /// Segment size and family, if there was a GSO extra.
    pub gso: Option<(u16, GsoType)>,
    /// Slots used, extras included.
    pub slots: usize,
    /// A slot reported an error: the bytes are worth nothing.
    pub failed: bool,
}

/// A tx slot without an answer.
#[derive(Debug)]
struct Sent {
    /// `None` for an extra.
    id: Option<u16>,
    page: Option<GrantedPage>,
}

/// A client qube: its domain, its rings, and its side of the event channel.
#[derive(Debug)]
pub struct Client {
    /// The client's own view of the machine.
    pub hv: FakeHypervisor,
    /// Its domain.
    pub id: DomId,
    /// Its features, for [`Client::parameters`].
    pub features: FrontendFeatures,
    backend: DomId,
    tx: GrantedPage,
    rx: GrantedPage,
    port: Port,
    /// The next tx request; public so that a hostile test can lie about it.
    pub tx_prod: u32,
    tx_published: u32,
    /// The next tx response.
    pub tx_cons: u32,
    sent: VecDeque<Sent>,
    /// The next rx request.
    pub rx_prod: u32,
    rx_published: u32,
    rx_cons: u32,
    posted: VecDeque<(u16, GrantedPage)>,
    next_id: u16,
    /// What the backend answered to data slots since the last look, in order.
    pub statuses: Vec<i16>,
}

impl Client {
    /// A client with empty rings, its port allocated for `backend`.
    #[must_use]
    pub fn new(machine: &FakeMachine, id: DomId, backend: DomId) -> Self {
        let mut hv = machine.domain(id);
        let mut ring = || {
            let mut page = hv.allocate().unwrap();
            page.fill(0);
            let ring = hv.grant(backend, page, Access::ReadWrite).unwrap();
            ring.shared().write_u32(REQ_EVENT, 1);
            ring.shared().write_u32(RSP_EVENT, 1);
            ring
        };
        let (tx, rx) = (ring(), ring());
        let port = hv.allocate_port(backend).unwrap();
        Self {
            hv,
            id,
            features: LINUX,
            backend,
            tx,
            rx,
            port,
            tx_prod: 0,
            tx_published: 0,
            tx_cons: 0,
            sent: VecDeque::new(),
            rx_prod: 0,
            rx_published: 0,
            rx_cons: 0,
            posted: VecDeque::new(),
            // Windows sets high bits in its ids.
            next_id: 0xf000,
            statuses: Vec::new(),
        }
    }

    /// What the backend needs to connect.
    #[must_use]
    pub fn parameters(&self, tag: VifTag) -> ConnectParameters {
        ConnectParameters {
            tag,
            peer: self.id,
            tx_ref: self.tx.gref(),
            rx_ref: self.rx.gref(),
            event_channel: self.port.number(),
            features: self.features,
            mtu: 1500,
        }
    }

    /// The tx ring's page, to write nonsense into.
    #[must_use]
    pub const fn tx_ring(&self) -> &GrantedPage {
        &self.tx
    }

    /// The rx ring's page, to write nonsense into.
    #[must_use]
    pub const fn rx_ring(&self) -> &GrantedPage {
        &self.rx
    }

    fn tx_page(&self) -> &SharedPage {
        self.tx.shared()
    }

    /// Whether the backend notified us since the last look.
    pub fn was_notified(&mut self) -> bool {
        self.hv.take_pending(self.port.number())
    }

    /// Writes a request as it is, unpublished. Its response is expected to carry its id.
    pub fn put_request(&mut self, request: TxRequest) {
        self.put_words(request.encode());
        self.sent.push_back(Sent {
            id: Some(request.id),
            page: None,
        });
    }

    /// Writes an extra-info slot as it is, unpublished.
    pub fn put_extra(&mut self, words: [u32; TX_WORDS]) {
        self.put_words(words);
        self.sent.push_back(Sent {
            id: None,
            page: None,
        });
    }

    fn put_words(&mut self, words: [u32; TX_WORDS]) {
        self.tx_page()
            .write_words(raw::slot(self.tx_prod, TX_WORDS), words);
        self.tx_prod = self.tx_prod.wrapping_add(1);
    }

    /// Grants a page with `bytes` at `offset` for reading. Given back with the response.
    fn lend(&mut self, piece: &Piece) -> GrantedPage {
        let mut page = self.hv.allocate().unwrap();
        let start = usize::from(piece.offset);
        page[start..start + piece.bytes.len()].copy_from_slice(&piece.bytes);
        self.hv.grant(self.backend, page, Access::ReadOnly).unwrap()
    }

    /// Writes the slots of a frame, unpublished, and returns the ids of its data slots.
    pub fn put_frame(
        &mut self,
        pieces: &[Piece],
        flags: u16,
        gso: Option<(u16, GsoType)>,
    ) -> Vec<u16> {
        let total: usize = pieces.iter().map(|piece| piece.bytes.len()).sum();
        let mut ids = Vec::new();
        for (index, piece) in pieces.iter().enumerate() {
            let page = self.lend(piece);
            let first = index == 0;
            let mut slot_flags = if first { flags } else { 0 };
            if index + 1 < pieces.len() {
                slot_flags |= TxFlags::MORE_DATA;
            }
            if first && gso.is_some() {
                slot_flags |= TxFlags::EXTRA_INFO;
            }
            let size = if first { total } else { piece.bytes.len() };
            self.next_id = self.next_id.wrapping_add(1);
            ids.push(self.next_id);
            self.put_request(TxRequest {
                gref: page.gref(),
                offset: piece.offset,
                flags: TxFlags(slot_flags),
                id: self.next_id,
                size: size as u16,
            });
            self.sent.back_mut().unwrap().page = Some(page);
            if first && let Some((size, family)) = gso {
                let [head, payload] = Extra::encode_gso(size, family);
                self.put_extra([head, payload, 0]);
            }
        }
        ids
    }

    /// Writes and publishes a frame of one slot, or of full pages if it is longer.
    pub fn transmit(&mut self, frame: &[u8]) {
        let pieces: Vec<Piece> = frame
            .chunks(4096)
            .map(|bytes| Piece {
                offset: 0,
                bytes: bytes.to_vec(),
            })
            .collect();
        self.put_frame(&pieces, 0, None);
        self.publish();
    }

    /// Tx slots that are free.
    #[must_use]
    pub fn tx_free(&self) -> usize {
        raw::SLOTS as usize - self.sent.len()
    }

    /// Shows the backend what was written to both rings, and notifies it if it wants that.
    pub fn publish(&mut self) {
        let (old, new) = (self.tx_published, self.tx_prod);
        let mut notify = raw::publish(self.tx_page(), REQ_PROD, REQ_EVENT, old, new);
        self.tx_published = new;
        let (old, new) = (self.rx_published, self.rx_prod);
        notify |= raw::publish(self.rx.shared(), REQ_PROD, REQ_EVENT, old, new);
        self.rx_published = new;
        if notify {
            self.hv.notify(&[self.port.number()]);
        }
    }

    /// Takes all tx responses. Each must answer the slot that it stands in, and revoking must succeed.
    ///
    /// Returns how many there were.
    pub fn reap(&mut self) -> usize {
        let produced = self.tx_page().read_u32(RSP_PROD);
        let count = produced.wrapping_sub(self.tx_cons);
        assert!(
            count as usize <= self.sent.len(),
            "more responses than requests"
        );
        for _ in 0..count {
            let words = self.tx_page().read_words(raw::slot(self.tx_cons, TX_WORDS));
            let response = TxResponse::decode(words);
            assert_eq!(words[1..], [0, 0], "the rest of a response leaks something");
            self.tx_cons = self.tx_cons.wrapping_add(1);
            let sent = self.sent.pop_front().unwrap();
            match sent.id {
                Some(id) => {
                    assert_eq!(response.id, id, "response out of order");
                    self.statuses.push(response.status);
                }
                None => assert_eq!(response.status, status::NULL, "answer to an extra"),
            }
            if let Some(page) = sent.page {
                let page = self
                    .hv
                    .revoke(page)
                    .expect("backend holds a page it has answered");
                self.hv.release(page);
            }
        }
        self.tx_page()
            .write_u32(RSP_EVENT, self.tx_cons.wrapping_add(1));
        count as usize
    }

    /// The statuses of data slots answered since the last call.
    pub fn take_statuses(&mut self) -> Vec<i16> {
        self.reap();
        std::mem::take(&mut self.statuses)
    }

    /// Posts and publishes `count` rx buffers.
    pub fn post(&mut self, count: usize) {
        for _ in 0..count {
            let page = self.hv.allocate().unwrap();
            let page = self
                .hv
                .grant(self.backend, page, Access::ReadWrite)
                .unwrap();
            self.next_id = self.next_id.wrapping_add(1);
            let gref = page.gref();
            self.post_buffer(self.next_id, gref, page);
        }
        self.publish();
    }

    /// Posts one rx buffer whose request says what it likes, unpublished. `page` is given back with the response.
    pub fn post_buffer(&mut self, id: u16, gref: GrantRef, page: GrantedPage) {
        let words = RxRequest { id, gref }.encode();
        self.rx
            .shared()
            .write_words(raw::slot(self.rx_prod, RX_WORDS), words);
        self.rx_prod = self.rx_prod.wrapping_add(1);
        self.posted.push_back((id, page));
    }

    /// Grants a page of ours to the backend, for hostile buffers.
    pub fn grant_page(&mut self, access: Access) -> GrantedPage {
        let page = self.hv.allocate().unwrap();
        self.hv.grant(self.backend, page, access).unwrap()
    }

    /// Gives a granted page back.
    pub fn take_back(&mut self, page: GrantedPage) {
        let page = self.hv.revoke(page).expect("the page is in use");
        self.hv.release(page);
    }

    /// Rx buffers that the backend has.
    #[must_use]
    pub fn posted(&self) -> usize {
        self.posted.len()
    }

    /// Takes all received frames. Each response must carry the id of its slot.
    pub fn receive(&mut self) -> Vec<Received> {
        let produced = self.rx.shared().read_u32(RSP_PROD);
        let mut frames = Vec::new();
        while self.rx_cons != produced {
            frames.push(self.receive_one(produced));
        }
        self.rx
            .shared()
            .write_u32(RSP_EVENT, self.rx_cons.wrapping_add(1));
        frames
    }

    fn next_response(&mut self, produced: u32) -> ([u32; RX_WORDS], u16, xen::Page) {
        assert_ne!(self.rx_cons, produced, "incomplete frame published");
        let words = self
            .rx
            .shared()
            .read_words(raw::slot(self.rx_cons, RX_WORDS));
        self.rx_cons = self.rx_cons.wrapping_add(1);
        let (id, page) = self.posted.pop_front().expect("response without a buffer");
        let page = self
            .hv
            .revoke(page)
            .expect("backend holds a buffer it has answered");
        (words, id, page)
    }

    fn receive_one(&mut self, produced: u32) -> Received {
        let mut frame = Received {
            bytes: Vec::new(),
            flags: RxFlags(0),
            gso: None,
            slots: 0,
            failed: false,
        };
        loop {
            let (words, id, page) = self.next_response(produced);
            let response = RxResponse::decode(words);
            assert_eq!(response.id, id, "response with another slot's id");
            match usize::try_from(response.status) {
                Ok(len) => {
                    let start = usize::from(response.offset);
                    frame.bytes.extend_from_slice(&page[start..start + len]);
                }
                Err(_) => frame.failed = true,
            }
            self.hv.release(page);
            frame.slots += 1;
            if frame.slots == 1 {
                frame.flags = response.flags;
                if response.flags.has(RxFlags::EXTRA_INFO) {
                    let ([head, payload], _, page) = self.next_response(produced);
                    self.hv.release(page);
                    frame.slots += 1;
                    let extra = Extra::decode(head, payload);
                    assert!(!extra.more, "one extra is what we send");
                    match extra.kind {
                        ExtraKind::Gso { size, family } => {
                            frame.gso = Some((size, family.unwrap()))
                        }
                        other => panic!("unexpected extra {other:?}"),
                    }
                }
            }
            if !response.flags.has(RxFlags::MORE_DATA) {
                return frame;
            }
        }
    }

    /// Gives everything back; the backend must have disconnected.
    pub fn close(mut self) {
        let pages: Vec<GrantedPage> = self
            .sent
            .drain(..)
            .filter_map(|sent| sent.page)
            .chain(self.posted.drain(..).map(|(_, page)| page))
            .chain([self.tx, self.rx])
            .collect();
        for page in pages {
            let page = self.hv.revoke(page).expect("the backend still uses a page");
            self.hv.release(page);
        }
        self.hv.close_port(self.port);
    }
}
