//! Request/response rings in one shared page, for both roles.
//!
//! Layout: `req_prod u32@0, req_event u32@4, rsp_prod u32@8, rsp_event u32@12`, padding to 64 bytes,
//! then the slots. Requests and responses share slots; indices run free and are masked on use.
//!
//! # Trust
//!
//! The peer may write anything anywhere in the page at any time. Our own indices are private copies and
//! never read back; the peer's are read once and compared with ours, and an impossible distance is
//! an error that ends the ring. Slots are copied out word by word, once. The event indices only decide
//! whether somebody is notified: a peer that lies there costs itself latency or us one notification.
//!
//! Source: Xen `public/io/ring.h`.

use crate::page::RingMemory;
use crate::shared::{full_fence, read_fence, write_fence};

const REQ_PROD: usize = 0;
const REQ_EVENT: usize = 4;
const RSP_PROD: usize = 8;
const RSP_EVENT: usize = 12;
const SLOTS: usize = 64;

/// Slots in a ring of 8- or 12-byte slots: the largest power of two that fits behind the header.
pub const RING_SIZE: u32 = 256;

/// What a peer did that no correct peer does. The ring is unusable afterwards.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RingError {
    /// The peer's producer index is further ahead than the ring allows (or went backwards).
    ImpossibleProducer,
}

/// The byte offset of slot `index` for slots of `WORDS` 32-bit words.
const fn slot_offset<const WORDS: usize>(index: u32) -> usize {
    SLOTS + (index & (RING_SIZE - 1)) as usize * WORDS * 4
}

/// Whether publishing `old..new` crossed the peer's event index, so that it wants a notification.
const fn crossed(new: u32, old: u32, event: u32) -> bool {
    new.wrapping_sub(event) < new.wrapping_sub(old)
}

/// The backend's end: takes requests, gives responses. `WORDS` is the slot size in 32-bit words.
#[derive(Debug)]
pub struct BackRing<M, const WORDS: usize> {
    memory: M,
    /// Next request to take.
    req_cons: u32,
    /// Next response to write.
    rsp_prod: u32,
    /// What the peer was told of `rsp_prod`.
    rsp_published: u32,
}

impl<M: RingMemory, const WORDS: usize> BackRing<M, WORDS> {
    const FITS: () = assert!(slot_offset::<WORDS>(RING_SIZE - 1) + WORDS * 4 <= 4096);

    /// Takes over a ring as the frontend left it: work goes on after the last response.
    ///
    /// # Errors
    ///
    /// Gives the memory back when the indices are further apart than the ring is long.
    pub fn attach(memory: M) -> Result<Self, M> {
        let () = Self::FITS;
        let rsp_prod = memory.shared().read_u32(RSP_PROD);
        let req_prod = memory.shared().read_u32(REQ_PROD);
        if req_prod.wrapping_sub(rsp_prod) > RING_SIZE {
            return Err(memory);
        }
        Ok(Self {
            memory,
            req_cons: rsp_prod,
            rsp_prod,
            rsp_published: rsp_prod,
        })
    }

    /// Gives the memory back for unmapping.
    pub fn into_memory(self) -> M {
        self.memory
    }

    /// How many requests wait. Reads the peer's index once.
    ///
    /// # Errors
    ///
    /// [`RingError::ImpossibleProducer`] when the peer claims more than the ring can hold. Nothing is consumed.
    pub fn available(&self) -> Result<u32, RingError> {
        let produced = self.memory.shared().read_u32(REQ_PROD);
        let waiting = produced.wrapping_sub(self.req_cons);
        // Requests whose answer was not published still occupy slots, so they bound what can be waiting.
        let unanswered = self.req_cons.wrapping_sub(self.rsp_published);
        if waiting > RING_SIZE.saturating_sub(unanswered) {
            return Err(RingError::ImpossibleProducer);
        }
        read_fence();
        Ok(waiting)
    }

    /// Copies the request `ahead` places after the next one. Read each request once and keep the copy.
    #[must_use]
    pub fn request(&self, ahead: u32) -> [u32; WORDS] {
        self.memory
            .shared()
            .read_words(slot_offset::<WORDS>(self.req_cons.wrapping_add(ahead)))
    }

    /// Consumes `count` requests, which [`BackRing::available`] reported.
    pub fn consume(&mut self, count: u32) {
        self.req_cons = self.req_cons.wrapping_add(count);
    }

    /// The free-running index of the next request: how many were consumed, modulo 2^32.
    #[must_use]
    pub const fn consumed(&self) -> u32 {
        self.req_cons
    }

    /// Requests consumed and not answered yet.
    #[must_use]
    pub const fn unanswered(&self) -> u32 {
        self.req_cons.wrapping_sub(self.rsp_prod)
    }

    /// Writes the next response; the peer sees it after [`BackRing::publish`].
    ///
    /// Without an unanswered request there is no slot and nothing is written: a bug of ours, never the peer's doing.
    pub fn respond(&mut self, response: [u32; WORDS]) {
        debug_assert!(self.unanswered() > 0, "response without a request");
        if self.unanswered() > 0 {
            self.memory
                .shared()
                .write_words(slot_offset::<WORDS>(self.rsp_prod), response);
            self.rsp_prod = self.rsp_prod.wrapping_add(1);
        }
    }

    /// The free-running index that the next response will get: a mark for [`BackRing::publish_until`] and
    /// [`BackRing::amend`].
    #[must_use]
    pub const fn produced(&self) -> u32 {
        self.rsp_prod
    }

    /// Rewrites the response with the given index, if it was written and not published yet.
    ///
    /// Returns whether it was. A driver may write responses before it knows how the copies behind them
    /// ended, and amend those that failed.
    pub fn amend(&mut self, index: u32, response: [u32; WORDS]) -> bool {
        let unpublished = self.rsp_prod.wrapping_sub(self.rsp_published);
        let open = index.wrapping_sub(self.rsp_published) < unpublished;
        if open {
            self.memory
                .shared()
                .write_words(slot_offset::<WORDS>(index), response);
        }
        open
    }

    /// Shows the peer all responses written so far. Returns whether it wants a notification.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        self.publish_until(self.rsp_prod)
    }

    /// Shows the peer the responses before index `end`, and no later ones. Returns whether it wants a notification.
    ///
    /// An `end` that is published already, or was not written yet, publishes nothing.
    #[must_use]
    pub fn publish_until(&mut self, end: u32) -> bool {
        let (old, new) = (self.rsp_published, end);
        let unpublished = self.rsp_prod.wrapping_sub(old);
        if old == new || new.wrapping_sub(old) > unpublished {
            return false;
        }
        write_fence();
        self.memory.shared().write_u32(RSP_PROD, new);
        self.rsp_published = new;
        full_fence();
        crossed(new, old, self.memory.shared().read_u32(RSP_EVENT))
    }

    /// Asks for a notification once `wanted` (at least 1) requests wait, then looks again.
    ///
    /// Returns whether that many wait already: then there may be no notification and the caller must go on.
    ///
    /// # Errors
    ///
    /// As [`BackRing::available`].
    pub fn arm(&mut self, wanted: u32) -> Result<bool, RingError> {
        let wanted = wanted.max(1);
        self.memory
            .shared()
            .write_u32(REQ_EVENT, self.req_cons.wrapping_add(wanted));
        full_fence();
        Ok(self.available()? >= wanted)
    }
}

/// The frontend's end: gives requests, takes responses. `WORDS` is the slot size in 32-bit words.
#[derive(Debug)]
pub struct FrontRing<M, const WORDS: usize> {
    memory: M,
    /// Next request to write.
    req_prod: u32,
    /// What the peer was told of `req_prod`.
    req_published: u32,
    /// Next response to take.
    rsp_cons: u32,
}

impl<M: RingMemory, const WORDS: usize> FrontRing<M, WORDS> {
    const FITS: () = assert!(slot_offset::<WORDS>(RING_SIZE - 1) + WORDS * 4 <= 4096);

    /// Starts a ring in a zeroed page that the peer has not been told about yet.
    pub fn new(memory: M) -> Self {
        let () = Self::FITS;
        memory.shared().write_u32(REQ_PROD, 0);
        memory.shared().write_u32(RSP_PROD, 0);
        memory.shared().write_u32(REQ_EVENT, 1);
        memory.shared().write_u32(RSP_EVENT, 1);
        Self {
            memory,
            req_prod: 0,
            req_published: 0,
            rsp_cons: 0,
        }
    }

    /// The memory, to learn its grant reference.
    pub const fn memory(&self) -> &M {
        &self.memory
    }

    /// Gives the memory back for revocation.
    pub fn into_memory(self) -> M {
        self.memory
    }

    /// Slots free for requests.
    #[must_use]
    pub const fn free(&self) -> u32 {
        RING_SIZE.saturating_sub(self.outstanding())
    }

    /// Requests written whose response was not consumed.
    #[must_use]
    pub const fn outstanding(&self) -> u32 {
        self.req_prod.wrapping_sub(self.rsp_cons)
    }

    /// The slot, `0..256`, that the next request goes to.
    #[must_use]
    pub const fn next_slot(&self) -> u32 {
        self.req_prod & (RING_SIZE - 1)
    }

    /// Writes the next request; the peer sees it after [`FrontRing::publish`]. With no free slot nothing is written.
    pub fn request(&mut self, request: [u32; WORDS]) {
        debug_assert!(self.free() > 0, "request without a free slot");
        if self.free() > 0 {
            self.memory
                .shared()
                .write_words(slot_offset::<WORDS>(self.req_prod), request);
            self.req_prod = self.req_prod.wrapping_add(1);
        }
    }

    /// Shows the peer all requests written so far. Returns whether it wants a notification.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.req_published, self.req_prod);
        if old == new {
            return false;
        }
        write_fence();
        self.memory.shared().write_u32(REQ_PROD, new);
        self.req_published = new;
        full_fence();
        crossed(new, old, self.memory.shared().read_u32(REQ_EVENT))
    }

    /// How many responses wait. Reads the peer's index once.
    ///
    /// # Errors
    ///
    /// [`RingError::ImpossibleProducer`] when the peer claims more responses than it was given requests.
    pub fn available(&self) -> Result<u32, RingError> {
        let produced = self.memory.shared().read_u32(RSP_PROD);
        let waiting = produced.wrapping_sub(self.rsp_cons);
        if waiting > self.req_published.wrapping_sub(self.rsp_cons) {
            return Err(RingError::ImpossibleProducer);
        }
        read_fence();
        Ok(waiting)
    }

    /// Copies the response `ahead` places after the next one. Read each response once and keep the copy.
    #[must_use]
    pub fn response(&self, ahead: u32) -> [u32; WORDS] {
        self.memory
            .shared()
            .read_words(slot_offset::<WORDS>(self.rsp_cons.wrapping_add(ahead)))
    }

    /// The slot, `0..256`, of the response `ahead` places after the next one.
    #[must_use]
    pub const fn response_slot(&self, ahead: u32) -> u32 {
        self.rsp_cons.wrapping_add(ahead) & (RING_SIZE - 1)
    }

    /// Consumes `count` responses, which [`FrontRing::available`] reported.
    pub fn consume(&mut self, count: u32) {
        self.rsp_cons = self.rsp_cons.wrapping_add(count);
    }

    /// Asks for a notification once `wanted` (at least 1) responses wait, then looks again.
    ///
    /// Returns whether that many wait already.
    ///
    /// # Errors
    ///
    /// As [`FrontRing::available`].
    pub fn arm(&mut self, wanted: u32) -> Result<bool, RingError> {
        let wanted = wanted.max(1);
        self.memory
            .shared()
            .write_u32(RSP_EVENT, self.rsp_cons.wrapping_add(wanted));
        full_fence();
        Ok(self.available()? >= wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::SharedPage;
    use crate::testing::SharedMemory;

    /// Ring memory that a test also reaches as the peer.
    struct Memory(SharedPage);

    impl RingMemory for Memory {
        fn shared(&self) -> &SharedPage {
            &self.0
        }
    }

    fn back(memory: &SharedMemory) -> BackRing<Memory, 2> {
        BackRing::attach(Memory(memory.page())).ok().unwrap()
    }

    fn front(memory: &SharedMemory) -> FrontRing<Memory, 2> {
        FrontRing::new(Memory(memory.page()))
    }

    #[test]
    fn requests_and_responses_cross_in_order_over_the_index_wrap() {
        let memory = SharedMemory::new();
        let mut front = front(&memory);
        let start = u32::MAX - 100;
        (front.req_prod, front.req_published, front.rsp_cons) = (start, start, start);
        memory.page().write_u32(REQ_PROD, start);
        memory.page().write_u32(RSP_PROD, start);
        let mut back = back(&memory);
        for round in 0..600u32 {
            front.request([round, !round]);
            let _ = front.publish();
            assert_eq!(back.available(), Ok(1));
            assert_eq!(back.request(0), [round, !round]);
            back.consume(1);
            back.respond([round + 1, 7]);
            let _ = back.publish();
            assert_eq!(front.available(), Ok(1));
            assert_eq!(front.response(0), [round + 1, 7]);
            front.consume(1);
        }
        assert_eq!((front.free(), back.unanswered()), (RING_SIZE, 0));
    }

    #[test]
    fn a_backend_refuses_indices_that_are_too_far_apart() {
        let memory = SharedMemory::new();
        memory.page().write_u32(REQ_PROD, 257);
        assert!(BackRing::<_, 2>::attach(Memory(memory.page())).is_err());
        memory.page().write_u32(REQ_PROD, 256);
        let mut back = back(&memory);
        assert_eq!(back.available(), Ok(256));
        memory.page().write_u32(REQ_PROD, 257);
        assert_eq!(back.available(), Err(RingError::ImpossibleProducer));
        memory.page().write_u32(REQ_PROD, 256);
        back.consume(200);
        for _ in 0..200 {
            back.respond([0, 0]);
        }
        // The peer cannot have used a slot again whose response it was not shown.
        memory.page().write_u32(REQ_PROD, 257);
        assert_eq!(back.available(), Err(RingError::ImpossibleProducer));
        let _ = back.publish();
        assert_eq!(back.available(), Ok(57));
    }

    #[test]
    fn responses_are_shown_as_far_as_told_and_amended_until_then() {
        let memory = SharedMemory::new();
        memory.page().write_u32(REQ_PROD, 10);
        let mut back = back(&memory);
        back.consume(10);
        for number in 0..10 {
            assert_eq!(back.produced(), number);
            back.respond([number, 0]);
        }
        assert!(!back.publish_until(11), "index 11 was not written");
        assert_eq!(memory.page().read_u32(RSP_PROD), 0);
        memory.page().write_u32(RSP_EVENT, 4);
        assert!(
            back.publish_until(4),
            "the peer waits for the fourth response"
        );
        assert_eq!(memory.page().read_u32(RSP_PROD), 4);
        assert!(!back.publish_until(3), "it is not taken back");
        assert!(!back.amend(3, [99, 99]), "the peer may have read it");
        assert!(back.amend(4, [99, 99]));
        assert!(!back.amend(10, [99, 99]), "it was not written");
        assert!(!back.publish());
        assert_eq!(memory.page().read_u32(RSP_PROD), 10);
        let slot = |index| memory.page().read_words::<2>(slot_offset::<2>(index));
        assert_eq!((slot(3), slot(4), slot(5)), ([3, 0], [99, 99], [5, 0]));
    }

    #[test]
    fn a_frontend_refuses_more_responses_than_it_published_requests() {
        let memory = SharedMemory::new();
        let mut front = front(&memory);
        front.request([1, 1]);
        front.request([2, 2]);
        memory.page().write_u32(RSP_PROD, 1);
        assert_eq!(
            front.available(),
            Err(RingError::ImpossibleProducer),
            "not published yet"
        );
        let _ = front.publish();
        assert_eq!(front.available(), Ok(1));
        memory.page().write_u32(RSP_PROD, 3);
        assert_eq!(front.available(), Err(RingError::ImpossibleProducer));
        memory.page().write_u32(RSP_PROD, u32::MAX);
        assert_eq!(front.available(), Err(RingError::ImpossibleProducer));
    }

    #[test]
    fn arming_asks_for_the_next_and_looks_again() {
        let memory = SharedMemory::new();
        let mut back = back(&memory);
        let mut front = front(&memory);
        assert_eq!(back.arm(1), Ok(false));
        front.request([0, 0]);
        assert!(front.publish(), "the first request after arming notifies");
        front.request([0, 0]);
        assert!(!front.publish(), "further ones do not");
        assert_eq!(
            back.arm(1),
            Ok(true),
            "what came in meanwhile is not slept over"
        );
        back.consume(2);
        assert_eq!(back.arm(3), Ok(false));
        for number in 0..3 {
            front.request([0, 0]);
            assert_eq!(front.publish(), number == 2, "only the third was asked for");
        }
    }
}
