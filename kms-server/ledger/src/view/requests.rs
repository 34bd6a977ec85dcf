//! Requests that were answered before, as an act sees them: their rows are sealed (I5).

use kms_domain::UnixMillis;
use kms_store::{Lookup, RequestKey, RequestRow};

use super::{View, not_read};
use crate::staged::StagedRequest;
use kms_base::error::ServiceError;

/// What the row of a request says, once its seal was verified.
pub(crate) struct KnownRequest {
    pub(crate) digest: [u8; 32],
    pub(crate) outcome: Vec<u8>,
    /// The end of the time in which it can be repeated; `None` in a row of a version that did not
    /// seal it.
    pub(crate) expires: Option<UnixMillis>,
}

impl View<'_, '_> {
    /// What was answered to a request, if it was executed: see [`Self::asked`].
    ///
    /// # Errors
    /// The row was not read yet.
    pub(crate) fn request(&mut self, key: &RequestKey) -> Result<Option<KnownRequest>, ServiceError> {
        if let Some(row) = self.draft.requests.get(key) {
            return Ok(Some(KnownRequest {
                digest: row.digest,
                outcome: row.outcome.clone(),
                expires: Some(row.expires),
            }));
        }
        match self.draft.read.request(key) {
            Lookup::Present(row) => self.open_request(key, row).map(Some),
            Lookup::Absent => Ok(None),
            Lookup::NotRead => {
                self.draft.missing.requests.push(key.clone());
                Err(not_read())
            }
        }
    }

    /// Remembers what was answered to a request. `by_record`: the name of the act's first record
    /// becomes the outcome.
    pub(crate) fn put_request(&mut self, key: RequestKey, row: RequestRow, by_record: bool) {
        self.staged.requests.push(StagedRequest { key, row, by_record });
    }

    /// Opens a request's row, as this island wrote it, and removes the seal (I5). Without the seal,
    /// whoever writes the database could have an old grant executed again under another request,
    /// past I2 and I4.
    fn open_request(&mut self, key: &RequestKey, row: &RequestRow) -> Result<KnownRequest, ServiceError> {
        let RequestRow { digest, outcome, expires } = row;
        let opened = outcome.split_first_chunk::<16>().and_then(|(seal, outcome)| {
            let (principal, request, chunk) = (&key.principal, key.request, key.chunk);
            let timed = self.draft.seal.accept(seal.as_slice(), |seal| {
                seal.seal_request(principal, request, chunk, digest, *expires, outcome)
            });
            let known = timed
                || self.draft.seal.accept(seal.as_slice(), |seal| {
                    seal.seal_untimed_request(principal, request, chunk, digest, outcome)
                });
            known.then(|| KnownRequest {
                digest: *digest,
                outcome: outcome.to_vec(),
                expires: timed.then_some(*expires),
            })
        });
        match opened {
            Some(known) => Ok(known),
            None => {
                self.note_refused_row(format!("the row of request {} does not verify", key.request));
                Err(ServiceError::denied(self.actor.action))
            }
        }
    }
}
