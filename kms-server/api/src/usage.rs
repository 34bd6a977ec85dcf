//! What connections, principals and the server hold of calls under way, each within its bound.
//!
//! The octets of a request count for its connection, its principal and the server until the call is
//! answered. Calls that are answered by a stream count for their principal until the stream ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Context;
use std::time::Duration;

use futures::task::AtomicWaker;
use kms_base::bounds::{Bound, Limits};
use tonic::Status;

/// A number of octets or calls that one connection, one principal or the server holds.
#[derive(Debug, Default)]
struct Held(AtomicU64);

impl Held {
    fn take(&self, number: u64, most: u64) -> bool {
        let before = self.0.fetch_add(number, Ordering::Relaxed);
        let fits = before.saturating_add(number) <= most;
        if !fits {
            self.0.fetch_sub(number, Ordering::Relaxed);
        }
        fits
    }

    fn give_back(&self, number: u64) {
        self.0.fetch_sub(number, Ordering::Relaxed);
    }
}

/// What is counted over all connections of a principal.
#[derive(Debug, Default)]
pub(crate) struct PrincipalUse {
    octets: Held,
    answer_streams: Held,
}

/// What is counted of a connection, and the way to end it.
#[derive(Debug, Default)]
pub(crate) struct ConnectionUse {
    octets: Held,
    principal: Arc<PrincipalUse>,
    /// A call of any kind has arrived.
    called: AtomicBool,
    /// A call of a principal that the island knows has arrived.
    known: AtomicBool,
    cut: AtomicBool,
    waker: AtomicWaker,
}

impl ConnectionUse {
    /// For a connection of a principal. All connections of that principal share `principal`.
    pub(crate) fn new(principal: Arc<PrincipalUse>) -> Self {
        Self { principal, ..Self::default() }
    }

    /// Ends the connection: the server reads nothing more from it, sends the answers that it has,
    /// and closes it.
    pub(crate) fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Notes a call of any kind.
    pub(crate) fn note_called(&self) {
        self.called.store(true, Ordering::Relaxed);
    }

    /// Whether a call has arrived.
    pub(crate) fn has_called(&self) -> bool {
        self.called.load(Ordering::Relaxed)
    }

    /// Whether a call of a principal that the island knows has arrived. Such a connection keeps its
    /// place.
    pub(crate) fn is_known(&self) -> bool {
        self.known.load(Ordering::Relaxed)
    }

    /// Notes a call of a principal that the island knows.
    pub(crate) fn note_known(&self) {
        self.known.store(true, Ordering::Relaxed);
    }

    /// Whether the connection is to end. If not, the task is woken when it is to end.
    pub(crate) fn is_cut(&self, context: &Context<'_>) -> bool {
        self.waker.register(context.waker());
        self.cut.load(Ordering::Acquire)
    }
}

/// Octets of a request, which count until the reservation is dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    connection: Arc<ConnectionUse>,
    server: Arc<Held>,
    octets: u64,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.connection.octets.give_back(self.octets);
        self.connection.principal.octets.give_back(self.octets);
        self.server.give_back(self.octets);
    }
}

impl Reservation {
    /// Makes the octets of both count until this reservation is dropped.
    pub(crate) fn join(&mut self, mut other: Self) {
        self.octets = self.octets.saturating_add(std::mem::take(&mut other.octets));
    }
}

/// A place among the calls of a principal that are answered by a stream.
pub(crate) struct AnswerPlace(Arc<PrincipalUse>);

impl Drop for AnswerPlace {
    fn drop(&mut self) {
        self.0.answer_streams.give_back(1);
    }
}

/// The bounds of requests, and what the server as a whole holds of them. Clones share what is
/// counted.
#[derive(Clone)]
pub(crate) struct RequestBounds {
    limits: Arc<Limits>,
    server: Arc<Held>,
}

impl RequestBounds {
    /// With these limits.
    pub(crate) fn new(limits: Arc<Limits>) -> Self {
        Self { limits, server: Arc::default() }
    }

    /// The value of a bound.
    pub(crate) fn of(&self, bound: Bound) -> u64 {
        self.limits.of(bound)
    }

    /// The value of a bound on time.
    pub(crate) fn time(&self, bound: Bound) -> Duration {
        self.limits.time(bound)
    }

    /// A place for a call that is answered by a stream.
    ///
    /// # Errors
    /// The principal has as many of them as it may have.
    pub(crate) fn answer_stream(&self, connection: &ConnectionUse) -> Result<AnswerPlace, Status> {
        let principal = Arc::clone(&connection.principal);
        if !principal.answer_streams.take(1, self.limits.answer_streams_per_principal) {
            return Err(self.met(Bound::AnswerStreamsPerPrincipal, "too many calls are being answered", COME_BACK));
        }
        Ok(AnswerPlace(principal))
    }

    /// Counts octets of a request until the reservation is dropped.
    ///
    /// # Errors
    /// Connection, principal or server hold too many octets of requests.
    pub(crate) fn reserve(&self, connection: &Arc<ConnectionUse>, octets: u64) -> Result<Reservation, Status> {
        let refuse = |bound| self.met(bound, "unanswered requests hold too many octets", COME_BACK);
        if !connection.octets.take(octets, self.limits.request_octets_per_connection) {
            return Err(refuse(Bound::RequestOctetsPerConnection));
        }
        if !connection.principal.octets.take(octets, self.limits.request_octets_per_principal) {
            connection.octets.give_back(octets);
            return Err(refuse(Bound::RequestOctetsPerPrincipal));
        }
        if !self.server.take(octets, self.limits.request_octets) {
            connection.octets.give_back(octets);
            connection.principal.octets.give_back(octets);
            return Err(refuse(Bound::RequestOctets));
        }
        Ok(Reservation { connection: Arc::clone(connection), server: Arc::clone(&self.server), octets })
    }

    /// The refusal for a bound that is met, which is counted.
    pub(crate) fn met(&self, bound: Bound, what: &str, retry_after: Duration) -> Status {
        bound.met(&self.limits, what, retry_after).into()
    }

    /// The octets of requests that the whole server holds.
    #[cfg(test)]
    pub(crate) fn held(&self) -> u64 {
        self.server.0.load(Ordering::Relaxed)
    }
}

/// The number as a bound has it.
pub(crate) fn wide(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

/// When to try again where a call of the same principal must be answered first.
pub(crate) const COME_BACK: Duration = Duration::from_secs(1);
