//! Session grants: asked for as a head-end does, and a sample of the answers opened and verified
//! after the clock has stopped.

use std::{
    cell::{Cell, RefCell},
    time::Duration,
};

use bytes::Bytes;
use kms_client::{
    KeyType, RequestId, SystemTitle,
    proto::{Envelope, OpenSessionRequest, OpenSessionsRequest, Purpose, SessionTerms},
};

use crate::{
    Failure,
    island::{HeadEnd, Island, request_id, title},
    measure::{Random, Run},
};

/// The head-end's requests. Each measurement has one of its own.
pub(crate) struct Grants<'a> {
    island: &'a Island,
    head_end: &'a HeadEnd,
    turn: Cell<u64>,
    /// Keys that came so far, of batches that are not finished too.
    pub(crate) keys: Cell<u64>,
    sample: RefCell<Vec<Sample>>,
}

/// An answer that is kept.
struct Sample {
    request: Bytes,
    meters: Vec<u64>,
    envelopes: Vec<Envelope>,
}

impl<'a> Grants<'a> {
    pub(crate) const fn new(island: &'a Island) -> Self {
        Self::of(island, &island.head_end)
    }

    /// Of another head-end than the island's first.
    pub(crate) const fn of(island: &'a Island, head_end: &'a HeadEnd) -> Self {
        Self { island, head_end, turn: Cell::new(0), keys: Cell::new(0), sample: RefCell::new(Vec::new()) }
    }

    /// Single calls, so many in flight.
    pub(crate) async fn singles(&self, lanes: usize, time: Duration, meters: u64) -> Result<Run, Failure> {
        let random = RefCell::new(Random::new(1));
        let run = self.island.load.in_flight(lanes, time, || self.single(random.borrow_mut().up_to(meters))).await?;
        self.verify_sample().map(|()| run)
    }

    /// Single calls, so many a second.
    pub(crate) async fn paced(&self, rate: u32, time: Duration, meters: u64) -> Result<Run, Failure> {
        let random = RefCell::new(Random::new(2));
        let run = self.island.load.paced(rate, time, || self.single(random.borrow_mut().up_to(meters))).await?;
        self.verify_sample().map(|()| run)
    }

    /// Batches, so many in flight, of the meters that `next` gives; until it gives none, or the
    /// time is over.
    pub(crate) async fn batches(&self, time: Duration, next: impl FnMut() -> Vec<u64>) -> Result<Run, Failure> {
        let next = RefCell::new(next);
        let batch = || {
            let meters = (next.borrow_mut())();
            async move { if meters.is_empty() { Ok(None) } else { self.batch(meters).await.map(Some) } }
        };
        let run = self.island.load.in_flight(CALLS, time, batch).await?;
        self.verify_sample().map(|()| run)
    }

    async fn single(&self, number: u64) -> Result<Option<u64>, Failure> {
        let turn = self.turn.replace(self.turn.get() + 1);
        let request = request_id();
        let message = OpenSessionRequest {
            request_id: request.clone(),
            meter: title(number).to_vec().into(),
            terms: Some(self.terms()),
        };
        let answer = self.head_end.connection(turn)?.grants().open_session(message).await?.into_inner();
        if answer.envelopes.is_empty() {
            return Err("a grant without an envelope".into());
        }
        if turn.is_multiple_of(SAMPLED) {
            self.sample.borrow_mut().push(Sample { request, meters: vec![number], envelopes: answer.envelopes });
        }
        Ok(Some(KEYS))
    }

    /// The keys that came.
    pub(crate) async fn batch(&self, meters: Vec<u64>) -> Result<u64, Failure> {
        let turn = self.turn.replace(self.turn.get() + 1);
        let request = request_id();
        let message = OpenSessionsRequest {
            request_id: request.clone(),
            meters: meters.iter().map(|number| title(*number).to_vec().into()).collect(),
            terms: Some(self.terms()),
            first_chunk: 0,
        };
        let mut chunks = self.head_end.connection(turn)?.grants().open_sessions(message).await?.into_inner();
        let (mut received, mut count) = (0, 0);
        let mut kept = None;
        while let Some(chunk) = chunks.message().await? {
            if let Some(refusal) = chunk.refusals.first() {
                return Err(format!("meter {} was refused: {}", hex::encode(&refusal.meter), refusal.message).into());
            }
            if chunk.envelopes.is_empty() {
                return Err("a chunk without an envelope".into());
            }
            (received, count) = (received + 1, chunk.chunk_count);
            // Chunks are equally large, but for the last one.
            self.keys.set(self.keys.get() + KEYS * meters.len() as u64 / u64::from(count.max(1)));
            kept.get_or_insert(chunk.envelopes);
        }
        if received != count || count == 0 {
            return Err(format!("{received} of {count} chunks came").into());
        }
        if let Some(envelopes) = kept.filter(|_| turn.is_multiple_of(BATCHES_SAMPLED)) {
            self.sample.borrow_mut().push(Sample { request, envelopes, meters: meters.clone() });
        }
        Ok(KEYS * meters.len() as u64)
    }

    fn terms(&self) -> SessionTerms {
        SessionTerms {
            purpose: Purpose::Read.into(),
            client_title: self.head_end.client_title.octets().to_vec().into(),
            ..SessionTerms::default()
        }
    }

    /// Opens what was kept: each envelope is genuine, answers its request, and has two keys and
    /// counters of each meter, in order.
    fn verify_sample(&self) -> Result<(), Failure> {
        let head_end = self.head_end;
        for sample in self.sample.take() {
            let options = head_end.options.clone().answering(RequestId::from_octets(&sample.request)?);
            let opened = head_end.key.open_all(&sample.envelopes, &options)?;
            if opened.meters.is_empty() {
                return Err("an envelope without keys".into());
            }
            for (entry, asked) in opened.meters.iter().zip(&sample.meters) {
                let has = |key_type| entry.key(key_type).is_some_and(|key| key.key.expose().len() == 16);
                if entry.meter != SystemTitle::from_octets(&title(*asked))?
                    || !has(KeyType::GUEK)
                    || !has(KeyType::GAK)
                    || entry.counters.is_none()
                {
                    return Err(format!("the envelope does not hold what was asked for meter {}", entry.meter).into());
                }
            }
        }
        Ok(())
    }
}

/// GUEK and GAK.
pub(crate) const KEYS: u64 = 2;
/// Batches in flight.
const CALLS: usize = 2;
/// One answer in so many is opened.
const SAMPLED: u64 = 500;
const BATCHES_SAMPLED: u64 = 10;
