//! The chains of all writers: read in order and checked link by link. A successor closes a chain.

use std::collections::HashMap;

use kms_domain::WriterId;
use kms_proto::v1::{AuditRecord, ClosedChain, RowWrite, ScrubFinding, audit_record::Event};
use kms_store::AuditAppend;
use prost::Message as _;

use crate::island::IslandContext;
use crate::keys::seal::held_audit_key;
use kms_base::error::ServiceError;
use kms_ledger::{AuditKeys, AuditLeaf};

/// All chains, up to the last record that was read.
pub(super) struct Chains<'a> {
    island: &'a IslandContext,
    keys: AuditKeys,
    /// The oldest version of the audit key whose links are accepted, as it was before the first
    /// record was read.
    oldest: u32,
    /// Whether links are checked; further passes only read what was recorded.
    check: bool,
    chains: HashMap<WriterId, Chain>,
    /// Writers that have more to read, the next one last.
    open: Vec<WriterId>,
    closings: Vec<Closing>,
    records: u64,
    findings: Vec<ScrubFinding>,
}

/// One writer's chain, up to the last record that was read.
#[derive(Clone, Copy, Default)]
struct Chain {
    next_sequence: u64,
    value: [u8; 32],
    /// The version of the audit key that makes the next link; 0 before the first record, which
    /// names it.
    next_key: u32,
    /// How many records are links of the chain.
    linked: u64,
    /// The version of the audit key that made the last of these links.
    linked_with: u32,
    /// No more links are checked.
    end: End,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum End {
    #[default]
    Open,
    /// Found broken: reported once.
    Broken,
    /// Its key is not in this server's tokens: reported once.
    NoKey,
}

/// A record that closes another chain.
struct Closing {
    /// The writer of the record, and its number.
    by: WriterId,
    at: u64,
    closed: ClosedChain,
}

impl<'a> Chains<'a> {
    pub(super) fn new(island: &'a IslandContext, check: bool) -> Self {
        let (keys, oldest) = ((*island.committer.audit_keys()).clone(), island.committer.seal_keys().oldest().into());
        Self {
            island,
            keys,
            oldest,
            check,
            chains: HashMap::new(),
            open: Vec::new(),
            closings: Vec::new(),
            records: 0,
            findings: Vec::new(),
        }
    }

    pub(super) const fn records_read(&self) -> u64 {
        self.records
    }

    /// Reads a page of records, in each writer's order; false when all present records were read. A
    /// later call finds newer records.
    pub(super) async fn step(&mut self, mut note: impl FnMut(&RowWrite)) -> Result<bool, ServiceError> {
        if self.open.is_empty() {
            let tails = self.island.store.audit_tails().await?;
            let unread = tails
                .iter()
                .filter(|tail| self.chains.get(&tail.writer).is_none_or(|chain| chain.next_sequence <= tail.sequence));
            self.open = unread.map(|tail| tail.writer).collect();
            if self.open.is_empty() {
                return Ok(false);
            }
        }
        let Some(writer) = self.open.last().copied() else { return Ok(false) };
        let mut chain = self.chains.get(&writer).copied().unwrap_or_default();
        let page = self.island.store.audit_of_writer(writer, chain.next_sequence, PAGE).await?;
        if page.is_empty() {
            self.open.pop();
        }
        for row in page {
            self.records += 1;
            let record = AuditRecord::decode(row.record.as_slice());
            if self.check && chain.end == End::Open {
                self.link(writer, &mut chain, &row, record.as_ref().ok()).await?;
            }
            chain.next_sequence = row.sequence.saturating_add(1);
            chain.value = row.chain;
            if let Ok(record) = record {
                record.row_writes.iter().for_each(&mut note);
                let closed = match record.event {
                    Some(Event::WriterOpened(opened)) => opened.closed,
                    Some(Event::AuditKeyChanged(changed)) => changed.closed,
                    _ => Vec::new(),
                };
                self.closings.extend(closed.into_iter().map(|closed| Closing { by: writer, at: row.sequence, closed }));
            }
        }
        self.chains.insert(writer, chain);
        Ok(true)
    }

    /// Checks the next record of a chain and adds a finding if it is not a link of the chain.
    async fn link(
        &mut self,
        writer: WriterId,
        chain: &mut Chain,
        row: &AuditAppend,
        record: Option<&AuditRecord>,
    ) -> Result<(), ServiceError> {
        let version = match record.and_then(|record| record.event.as_ref()) {
            Some(Event::WriterOpened(opened)) if row.sequence == 0 => opened.audit_key_version.max(1),
            _ => chain.next_key,
        };
        match self.next_link(chain, row, record, version).await? {
            Ok(next_key) => {
                *chain = Chain { next_key, linked: row.sequence.saturating_add(1), linked_with: version, ..*chain }
            }
            Err(Objection { end, reason }) => {
                chain.end = end;
                let detail = format!("record {}: {reason}", row.sequence);
                self.findings.push(if end == End::NoKey { unchecked(writer, detail) } else { broken(writer, detail) });
            }
        }
        Ok(())
    }

    /// Whether a record is the next link of its writer's chain: the version of the audit key that
    /// makes the link after it.
    async fn next_link(
        &mut self,
        chain: &Chain,
        row: &AuditAppend,
        record: Option<&AuditRecord>,
        version: u32,
    ) -> Result<Result<u32, Objection>, ServiceError> {
        let objection = |reason: &str| Ok(Err(Objection { end: End::Broken, reason: reason.to_owned() }));
        if row.sequence != chain.next_sequence {
            return objection(&format!(
                "{} records before it are missing",
                row.sequence.saturating_sub(chain.next_sequence)
            ));
        }
        let Some(record) = record else { return objection("it does not decode") };
        if row.sequence == 0 && !matches!(record.event, Some(Event::WriterOpened(_))) {
            return objection("it does not open the chain");
        }
        self.fetch_key(version).await?;
        let Some(key) = u8::try_from(version).ok().and_then(|version| self.keys.get(version)) else {
            let reason = format!(
                "this server's tokens lack version {version} of the seal root, whose audit key links it; scrub on a server that has it"
            );
            return Ok(Err(Objection { end: End::NoKey, reason }));
        };
        if key.next(&chain.value, &AuditLeaf::of(&row.record)) != row.chain {
            return objection("its chain value is not that of the record and the one before it");
        }
        if record.writer.as_ref() != row.writer.octets() || record.sequence != row.sequence {
            return objection("it names another writer or number");
        }
        let kind = record.event.as_ref().map_or(0, kms_ledger::event_kind);
        if record.time_ms != row.time.0 || kind != row.kind {
            return objection("its columns are not what it says");
        }
        match &record.event {
            Some(Event::AuditKeyChanged(changed)) if changed.version < version => {
                objection("it goes back to an earlier version of the audit key")
            }
            Some(Event::AuditKeyChanged(changed)) => Ok(Ok(changed.version)),
            _ => Ok(Ok(version)),
        }
    }

    /// Has the HSM compute a missing audit key: of a version that was replaced before this server
    /// started, or of one that came into use after the scrub began.
    async fn fetch_key(&mut self, version: u32) -> Result<(), ServiceError> {
        if let Ok(version) = u8::try_from(version)
            && self.keys.get(version).is_none()
            && let Some(key) = held_audit_key(&self.island.hsm, version).await?
        {
            self.keys = self.keys.clone().with(key);
        }
        Ok(())
    }

    /// The findings: links that do not fit, and ends that are not where a successor saw them.
    pub(super) async fn finish(&mut self) -> Result<Vec<ScrubFinding>, ServiceError> {
        let mut findings = std::mem::take(&mut self.findings);
        for Closing { closed, .. } in &self.closings {
            let Ok(writer) = WriterId::from_octets(&closed.writer) else { continue };
            let end = self.island.store.audit_of_writer(writer, closed.last_sequence, 1).await?;
            let reason = match end.as_slice() {
                // A server that was silent, and whose chain was closed for it, may continue: its
                // records stay links of its chain.
                [last, ..] if last.sequence == closed.last_sequence && last.chain.as_slice() == closed.chain => {
                    continue;
                }
                [last, ..] if last.sequence == closed.last_sequence => {
                    format!("record {} is not the one that a successor saw", closed.last_sequence)
                }
                _ => format!("it was cut off before record {}, where a successor closed it", closed.last_sequence),
            };
            findings.push(broken(writer, reason));
        }
        findings.extend(self.unbelieved());
        Ok(findings)
    }

    /// I5: records that an attacker with a retired audit key could have made. A chain is accepted
    /// if its last link is made with an accepted key. Otherwise it is accepted up to the end at
    /// which an accepted record closed it: after the retirement of a key, servers close no such
    /// chains.
    fn unbelieved(&self) -> Vec<ScrubFinding> {
        let sound =
            |chain: &Chain| if chain.linked_with >= self.oldest || chain.end == End::NoKey { chain.linked } else { 0 };
        let mut believed: HashMap<WriterId, u64> =
            self.chains.iter().map(|(writer, chain)| (*writer, sound(chain))).collect();
        let mut grew = true;
        while std::mem::take(&mut grew) {
            for Closing { by, at, closed } in &self.closings {
                if believed.get(by).is_none_or(|records| at >= records) {
                    continue;
                }
                let Ok(writer) = WriterId::from_octets(&closed.writer) else { continue };
                if let (Some(chain), Some(known)) = (self.chains.get(&writer), believed.get_mut(&writer)) {
                    let records = closed.last_sequence.saturating_add(1).min(chain.linked);
                    grew |= records > *known;
                    *known = records.max(*known);
                }
            }
        }
        let doubted = self.chains.iter().filter_map(|(writer, chain)| {
            let first = believed.get(writer).copied().filter(|records| *records < chain.linked)?;
            let version = chain.linked_with;
            Some(broken(
                *writer,
                format!("from record {first} on: linked with version {version} of the audit key, which was retired, and closed by nothing that is believed"),
            ))
        });
        doubted.collect()
    }
}

/// Why a record is no link of its chain.
struct Objection {
    end: End,
    reason: String,
}

fn unchecked(writer: WriterId, detail: String) -> ScrubFinding {
    ScrubFinding { kind: 0, id: writer.octets().to_vec().into(), finding: "unchecked-chain".to_owned(), detail }
}

fn broken(writer: WriterId, detail: String) -> ScrubFinding {
    ScrubFinding { kind: 0, id: writer.octets().to_vec().into(), finding: "broken-chain".to_owned(), detail }
}

/// Records of one page. A record of an import has 40 KiB.
const PAGE: u32 = 64;
