//! Reading along: what clients ask the resolvers of their rules, and what these answer.
//!
//! Trust: a client may ask anything, and whoever can send from a resolver's address may answer anything. Only an answer to
//! a query that this client has sent counts, and it counts for this client's rules only.
//!
//! Bounds: those of [`Learner`](super::learn::Learner).

use alloc::vec::Vec;
use core::net::IpAddr;

use super::exchange::Found;
use super::learn::ClientQuery;
use super::message::Question;
use super::name::Name;
use super::{KEEP_SECS, Resolver, clamp_ttl, family_of};
use crate::frame::Time;

impl Resolver {
    /// Whether queries of a client with these addresses are worth showing to [`Self::client_query`].
    pub fn is_learning(&self, users: &[IpAddr]) -> bool {
        self.learner.is_some() && users.iter().any(|user| self.users.contains_key(user))
    }

    /// Sees a DNS message that a client sends to `server`, after DNS translation, by UDP. `client` and
    /// `port` are its source, `users` all addresses of the client. The source is one of them.
    pub fn client_query(
        &mut self,
        (client, port): (IpAddr, u16),
        users: &[IpAddr],
        server: IpAddr,
        message: &[u8],
        now: Time,
    ) {
        if !self.is_learning(users) || !self.servers.contains(&server) {
            return;
        }
        let Some((id, question)) = Question::read(message) else {
            return;
        };
        // The rules that an answer is for are those of the client's address in the family asked for.
        for user in users
            .iter()
            .filter(|user| family_of(**user) == question.family)
        {
            let keys = self.users.get(user).map_or(&[][..], Vec::as_slice);
            let is_asked = |key: &&u32| {
                let record = self.records.get(*key);
                record.is_some_and(|record| question.name.is_host(&record.name))
            };
            if let (Some(&key), Some(learner)) = (keys.iter().find(is_asked), &mut self.learner) {
                let query = ClientQuery { server, port, id };
                learner.watch(client, query, (*user, key), now);
            }
        }
    }

    /// Sees a DNS message that `server` sends to a client, before it is delivered. Returns whether
    /// [`Self::next_changed`] has news: the message should not be delivered before the rules know them,
    /// or the client will be refused what it was just told.
    pub fn client_answer(
        &mut self,
        (client, port): (IpAddr, u16),
        server: IpAddr,
        message: &[u8],
        now: Time,
    ) -> bool {
        let (Some(learner), Some(&[high, low])) = (&mut self.learner, message.first_chunk()) else {
            return false;
        };
        let id = u16::from_be_bytes([high, low]);
        let query = ClientQuery { server, port, id };
        let Some((user, key)) = learner.answered(client, query, now) else {
            return false;
        };
        let Some(record) = self.records.get(&key) else {
            return false;
        };
        let Some(name) = Name::of_host(&record.name) else {
            return false;
        };
        let question = Question {
            name,
            family: record.family,
        };
        let Some(found) = Found::read(&question, id, message) else {
            return false;
        };
        let until = now.plus_secs(found.ttl.map_or(0, clamp_ttl) + KEEP_SECS);
        let is_new = learner.learn((user, key), &found.addresses, until);
        self.counters.learned += u64::from(is_new);
        if is_new {
            self.changed.insert(user);
        }
        is_new
    }
}
