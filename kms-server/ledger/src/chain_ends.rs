//! Chains of writers: where the chains of others end, which of them the first record of a new chain
//! closes, and which are closed before their audit key is retired (docs/formats.md).

use std::{collections::HashSet, sync::Arc};

use kms_domain::{UnixMillis, WriterId};
use kms_proto::v1::{AuditRecord, ClosedChain, WriterOpened, audit_record::Event};
use kms_store::{AuditFilter, AuditTail, StoreError};
use prost::Message as _;

use super::{
    chain::{AuditKeys, ChainHead},
    shared::Shared,
};

impl Shared {
    /// Begins the chain of a new writer. Its first record closes the chains of writers that are
    /// gone (docs/formats.md).
    pub(super) async fn open_chain(&self, keys: &AuditKeys) -> Result<(ChainHead, AuditRecord), StoreError> {
        let writer = WriterId::from_octets(uuid::Uuid::new_v4().as_bytes())
            .map_err(|error| StoreError::Corrupt { what: error.to_string() })?;
        let closed = self.unclosed().await?;
        self.store.register_server(writer, &self.settings.server).await?;
        if let Ok(mut current) = self.writer.lock() {
            *current = Some(writer);
        }
        let head = ChainHead::new(writer, Arc::clone(keys.current()));
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let event = WriterOpened {
            server: self.settings.server.clone(),
            version,
            closed,
            audit_key_version: head.key_version().into(),
            policy_sha256: self.settings.policy_sha256.map(|digest| digest.to_vec().into()).unwrap_or_default(),
        };
        Ok((head, AuditRecord { event: Some(Event::WriterOpened(event)), ..Default::default() }))
    }

    /// The ends of chains whose writers are gone, and which the first record of no later chain
    /// closes.
    async fn unclosed(&self) -> Result<Vec<ClosedChain>, StoreError> {
        let silence = i64::try_from(self.settings.silence.as_millis()).unwrap_or(i64::MAX);
        let servers = self.store.servers().await?.into_iter();
        let alive: HashSet<WriterId> = servers
            .filter(|server| server.silent_ms < silence && server.name != self.settings.server)
            .map(|server| server.writer)
            .collect();
        let tails = self.store.audit_tails().await?;
        // A writer that counted as gone may have continued: its chain is closed again where it ends
        // now.
        let mut known = HashSet::new();
        for tail in &tails {
            let first = self.store.audit_of_writer(tail.writer, 0, 1).await?;
            known.extend(first.iter().flat_map(|first| closed_in(&first.record)));
        }
        let oldest = self.seal.load().oldest();
        let mut closed = Vec::new();
        for tail in
            tails.iter().filter(|tail| !alive.contains(&tail.writer) && !known.contains(&(tail.writer, tail.sequence)))
        {
            // I5: an end under a retired key is not vouched for, because whoever learned that key
            // could have made it. Ends from before the retirement were closed then.
            if oldest <= 1 || self.end_version(tail).await?.is_some_and(|version| version >= oldest) {
                closed.push(closed_chain(tail));
            }
        }
        Ok(closed)
    }

    /// The time of the last record, and the newest time of a record or heartbeat. None: there was
    /// no server before.
    pub(super) async fn last_sign(&self) -> Result<Option<(UnixMillis, UnixMillis)>, StoreError> {
        let newest =
            self.store.audit_page(&AuditFilter { newest_first: true, ..AuditFilter::default() }, None, 1).await?;
        let Some(last) = newest.first().map(|row| row.record.time) else { return Ok(None) };
        let heard = self.store.servers().await?.into_iter().map(|server| server.heartbeat).max().unwrap_or(last);
        Ok(Some((last, last.max(heard))))
    }

    /// The version of the audit key that links the last record of a chain. None: this server knows
    /// no such key.
    async fn end_version(&self, tail: &AuditTail) -> Result<Option<u8>, StoreError> {
        let end = self.store.audit_of_writer(tail.writer, tail.sequence.saturating_sub(1), 2).await?;
        let (previous, last) = match end.as_slice() {
            [only] if tail.sequence == 0 => ([0; 32], only),
            [before, last, ..] => (before.chain, last),
            _ => return Ok(None),
        };
        Ok(self.audit_keys.load().version_of(&previous, &last.record, &last.chain))
    }

    /// The ends of the chains of other writers that end with an audit key below `oldest` and are
    /// still accepted.
    pub(super) async fn ends_below(&self, oldest: u8) -> Result<Vec<ClosedChain>, StoreError> {
        let (own, accepted) = (self.writer(), self.seal.load().oldest());
        let mut ends = Vec::new();
        // Records that say that these chains were closed do not count: whoever can write the
        // database could have put them there.
        for tail in self.store.audit_tails().await?.into_iter().filter(|tail| Some(tail.writer) != own) {
            if self.end_version(&tail).await?.is_some_and(|version| version >= accepted && version < oldest) {
                ends.push(closed_chain(&tail));
            }
        }
        Ok(ends)
    }
}

fn closed_chain(tail: &AuditTail) -> ClosedChain {
    ClosedChain {
        writer: tail.writer.octets().to_vec().into(),
        last_sequence: tail.sequence,
        chain: tail.chain.to_vec().into(),
    }
}

/// The chains that the first record of another chain closes: each writer, and the number of its
/// last record.
fn closed_in(record: &[u8]) -> Vec<(WriterId, u64)> {
    let Some(Event::WriterOpened(opened)) = AuditRecord::decode(record).ok().and_then(|record| record.event) else {
        return Vec::new();
    };
    opened
        .closed
        .into_iter()
        .filter_map(|chain| Some((WriterId::from_octets(&chain.writer).ok()?, chain.last_sequence)))
        .collect()
}
