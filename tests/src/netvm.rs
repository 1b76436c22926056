//! The uplink's backend in the netvm.

use std::collections::VecDeque;

use netfront::UplinkKeys;
use xen::fake::{FakeHypervisor, FakeMachine};
use xen::netif::{
    Extra, ExtraKind, GsoType, RX_WORDS, RxFlags, RxRequest, RxResponse, TX_WORDS, TxFlags,
    TxRequest, TxResponse, status,
};
use xen::page::RingMemory;
use xen::{CopyDirection, CopyOp, DomId, GrantRef, GrantStatus, Hypervisor, MappedPage, Port};

use crate::raw::{self, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};

/// A frame that the frontend transmitted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Taken {
    /// All bytes, slot after slot.
    pub bytes: Vec<u8>,
    /// The flags of the first slot.
    pub flags: TxFlags,
    /// Segment size and family, if there was a GSO extra.
    pub gso: Option<(u16, GsoType)>,
    /// The data slots, with their own lengths.
    pub slots: Vec<TxRequest>,
}

/// A netvm: its domain, the mapped rings, and its side of the event channel.
#[derive(Debug)]
pub struct Netvm {
    /// The netvm's own view of the machine.
    pub hv: FakeHypervisor,
    /// Whether [`Netvm::take`] reads what is in the frames. A hostile netvm has lost track of what it may still read.
    pub reads: bool,
    frontend: DomId,
    tx: MappedPage,
    rx: MappedPage,
    port: Port,
    tx_cons: u32,
    /// The next tx response; public so that a hostile test can lie about it.
    pub tx_rsp: u32,
    tx_rsp_published: u32,
    /// Taken and not answered: the id, or `None` for an extra.
    unanswered: VecDeque<Option<u16>>,
    rx_cons: u32,
    /// The next rx response.
    pub rx_rsp: u32,
    rx_rsp_published: u32,
}

impl Netvm {
    /// Connects to the frontend in domain `frontend`, as a backend does when it sees state 4.
    #[must_use]
    pub fn connect(machine: &FakeMachine, id: DomId, frontend: DomId, keys: UplinkKeys) -> Self {
        let mut hv = machine.domain(id);
        let tx = hv.map(frontend, keys.tx_ring_ref).unwrap();
        let rx = hv.map(frontend, keys.rx_ring_ref).unwrap();
        let port = hv.bind_port(frontend, keys.event_channel).unwrap();
        Self {
            hv,
            reads: true,
            frontend,
            tx,
            rx,
            port,
            tx_cons: 0,
            tx_rsp: 0,
            tx_rsp_published: 0,
            unanswered: VecDeque::new(),
            rx_cons: 0,
            rx_rsp: 0,
            rx_rsp_published: 0,
        }
    }

    /// The tx ring's page, to write nonsense into.
    #[must_use]
    pub const fn tx_ring(&self) -> &MappedPage {
        &self.tx
    }

    /// The rx ring's page, to write nonsense into.
    #[must_use]
    pub const fn rx_ring(&self) -> &MappedPage {
        &self.rx
    }

    /// Whether the frontend notified us since the last look.
    pub fn was_notified(&mut self) -> bool {
        self.hv.take_pending(self.port.number())
    }

    fn copy(
        &mut self,
        direction: CopyDirection,
        gref: GrantRef,
        offset: u16,
        data: &mut [u8],
    ) -> GrantStatus {
        if data.is_empty() {
            return GrantStatus::OKAY;
        }
        let mut pages = [self.hv.allocate().unwrap()];
        pages[0][..data.len()].copy_from_slice(data);
        let mut ops = [CopyOp {
            direction,
            peer: self.frontend,
            gref,
            peer_offset: offset,
            page: 0,
            offset: 0,
            len: data.len() as u16,
            status: GrantStatus::NOT_DONE,
        }];
        self.hv.grant_copy(&mut ops, &mut pages);
        data.copy_from_slice(&pages[0][..data.len()]);
        let [page] = pages;
        self.hv.release(page);
        ops[0].status
    }

    /// All 4,096 bytes that the netvm can see of a page granted to it.
    pub fn dump(&mut self, gref: GrantRef) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        let status = self.copy(CopyDirection::FromPeer, gref, 0, &mut bytes);
        assert_eq!(status, GrantStatus::OKAY);
        bytes
    }

    fn next_request(&mut self, produced: u32) -> [u32; TX_WORDS] {
        assert_ne!(self.tx_cons, produced, "incomplete frame published");
        let words = self
            .tx
            .shared()
            .read_words(raw::slot(self.tx_cons, TX_WORDS));
        self.tx_cons = self.tx_cons.wrapping_add(1);
        words
    }

    /// Takes all transmitted frames and reads their bytes; nothing is answered yet.
    pub fn take(&mut self) -> Vec<Taken> {
        let produced = self.tx.shared().read_u32(REQ_PROD);
        assert!(produced.wrapping_sub(self.tx_cons) <= raw::SLOTS);
        let mut frames = Vec::new();
        while self.tx_cons != produced {
            frames.push(self.take_one(produced));
        }
        self.tx
            .shared()
            .write_u32(REQ_EVENT, self.tx_cons.wrapping_add(1));
        frames
    }

    fn take_one(&mut self, produced: u32) -> Taken {
        let first = TxRequest::decode(self.next_request(produced));
        self.unanswered.push_back(Some(first.id));
        let mut gso = None;
        if first.flags.has(TxFlags::EXTRA_INFO) {
            let [head, payload, _] = self.next_request(produced);
            self.unanswered.push_back(None);
            let extra = Extra::decode(head, payload);
            assert!(!extra.more, "one extra is what we send");
            match extra.kind {
                ExtraKind::Gso { size, family } => gso = Some((size, family.unwrap())),
                other => panic!("unexpected extra {other:?}"),
            }
        }
        let mut slots = vec![first];
        while slots.last().unwrap().flags.has(TxFlags::MORE_DATA) {
            let next = TxRequest::decode(self.next_request(produced));
            self.unanswered.push_back(Some(next.id));
            slots.push(next);
        }
        let rest: u16 = slots[1..].iter().map(|slot| slot.size).sum();
        slots[0].size = first
            .size
            .checked_sub(rest)
            .expect("fragments longer than the frame");
        let mut bytes = Vec::new();
        for slot in &slots {
            let mut piece = vec![0; usize::from(slot.size)];
            if !self.reads {
                bytes.extend(piece);
                continue;
            }
            let status = self.copy(CopyDirection::FromPeer, slot.gref, slot.offset, &mut piece);
            assert_eq!(status, GrantStatus::OKAY);
            bytes.extend(piece);
        }
        Taken {
            bytes,
            flags: first.flags,
            gso,
            slots,
        }
    }

    /// Tx slots taken and not answered.
    #[must_use]
    pub fn unanswered(&self) -> usize {
        self.unanswered.len()
    }

    /// Answers the oldest `count` tx slots and publishes that.
    pub fn answer(&mut self, count: usize) {
        for _ in 0..count.min(self.unanswered.len()) {
            let response = match self.unanswered.pop_front().unwrap() {
                Some(id) => TxResponse {
                    id,
                    status: status::OKAY,
                },
                None => TxResponse {
                    id: 0,
                    status: status::NULL,
                },
            };
            self.put_tx_response(response);
        }
        self.publish();
    }

    /// Answers all tx slots and publishes that.
    pub fn answer_all(&mut self) {
        self.answer(usize::MAX);
    }

    /// Writes a tx response as it is, unpublished.
    pub fn put_tx_response(&mut self, response: TxResponse) {
        let at = raw::slot(self.tx_rsp, TX_WORDS);
        self.tx.shared().write_words(at, response.encode());
        self.tx_rsp = self.tx_rsp.wrapping_add(1);
    }

    /// Shows the frontend what was written to both rings, and notifies it if it wants that.
    pub fn publish(&mut self) {
        let (old, new) = (self.tx_rsp_published, self.tx_rsp);
        let mut notify = raw::publish(self.tx.shared(), RSP_PROD, RSP_EVENT, old, new);
        self.tx_rsp_published = new;
        let (old, new) = (self.rx_rsp_published, self.rx_rsp);
        notify |= raw::publish(self.rx.shared(), RSP_PROD, RSP_EVENT, old, new);
        self.rx_rsp_published = new;
        if notify {
            self.hv.notify(&[self.port.number()]);
        }
    }

    /// Rx buffers that the frontend has posted and that are not used.
    #[must_use]
    pub fn buffers(&self) -> u32 {
        self.rx
            .shared()
            .read_u32(REQ_PROD)
            .wrapping_sub(self.rx_cons)
    }

    /// Takes the next rx buffer.
    pub fn take_buffer(&mut self) -> RxRequest {
        assert_ne!(self.buffers(), 0, "no rx buffer is posted");
        let words = self
            .rx
            .shared()
            .read_words(raw::slot(self.rx_cons, RX_WORDS));
        self.rx_cons = self.rx_cons.wrapping_add(1);
        RxRequest::decode(words)
    }

    /// Writes an rx response as it is, unpublished.
    pub fn put_rx_words(&mut self, words: [u32; RX_WORDS]) {
        let at = raw::slot(self.rx_rsp, RX_WORDS);
        self.rx.shared().write_words(at, words);
        self.rx_rsp = self.rx_rsp.wrapping_add(1);
    }

    /// Writes `bytes` at `offset` into the next buffer and answers it, unpublished. Returns the buffer.
    pub fn put_slot(&mut self, bytes: &[u8], offset: u16, flags: u16) -> RxRequest {
        let buffer = self.take_buffer();
        let status = self.copy(
            CopyDirection::ToPeer,
            buffer.gref,
            offset,
            &mut bytes.to_vec(),
        );
        assert_eq!(status, GrantStatus::OKAY);
        self.put_rx_words(
            RxResponse {
                id: buffer.id,
                offset,
                flags: RxFlags(flags),
                status: bytes.len() as i16,
            }
            .encode(),
        );
        buffer
    }

    /// Puts a frame of several pieces (offset, bytes) into the ring, unpublished.
    pub fn put_frame(
        &mut self,
        pieces: &[(u16, Vec<u8>)],
        flags: u16,
        gso: Option<(u16, GsoType)>,
    ) {
        for (index, (offset, bytes)) in pieces.iter().enumerate() {
            let mut slot_flags = if index == 0 { flags } else { 0 };
            if index + 1 < pieces.len() {
                slot_flags |= RxFlags::MORE_DATA;
            }
            if index == 0 && gso.is_some() {
                slot_flags |= RxFlags::EXTRA_INFO;
            }
            self.put_slot(bytes, *offset, slot_flags);
            if index == 0
                && let Some((size, family)) = gso
            {
                self.take_buffer();
                self.put_rx_words(Extra::encode_gso(size, family));
            }
        }
    }

    /// Puts and publishes a frame of full pages.
    pub fn deliver(&mut self, frame: &[u8]) {
        let pieces: Vec<_> = frame
            .chunks(4096)
            .map(|bytes| (0, bytes.to_vec()))
            .collect();
        self.put_frame(&pieces, 0, None);
        self.publish();
    }

    /// Writes over a granted page, whole, as a netvm may that has it writable.
    pub fn scribble(&mut self, gref: GrantRef, byte: u8) -> GrantStatus {
        self.copy(CopyDirection::ToPeer, gref, 0, &mut [byte; 4096])
    }

    /// Unmaps the rings and closes the port.
    pub fn close(mut self) {
        self.hv.unmap(self.tx);
        self.hv.unmap(self.rx);
        self.hv.close_port(self.port);
    }
}
