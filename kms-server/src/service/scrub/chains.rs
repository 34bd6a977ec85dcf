//! The chains of all writers: read in order, checked link by link, and closed by their successors.

use std::collections::{HashMap, HashSet};

use kms_domain::WriterId;
use kms_proto::v1::{AuditRecord, ClosedChain, RowWrite, ScrubFinding, audit_record::Event};
use kms_store::AuditAppend;
use prost::Message as _;

use crate::{
    audit::{AuditKeys, AuditLeaf},
    error::ServiceError,
    island::Island,
};

/// All chains, as far as they were read.
pub(super) struct Chains<'a> {
    island: &'a Island,
    keys: &'a AuditKeys,
    /// Whether links are checked; further passes only read what was recorded.
    check: bool,
    chains: HashMap<WriterId, Chain>,
    /// Writers that have more to read, the next one last.
    open: Vec<WriterId>,
    /// Which writer closed which chain.
    closed: Vec<(WriterId, ClosedChain)>,
    records: u64,
    findings: Vec<ScrubFinding>,
}

/// One writer's chain, as far as it was read.
#[derive(Clone, Copy, Default)]
struct Chain {
    next_sequence: u64,
    value: [u8; 32],
    /// The version of the audit key that makes the next link; 0 before the first record, which names it.
    key_version: u32,
    /// Found broken: told once.
    broken: bool,
}

impl<'a> Chains<'a> {
    pub(super) fn new(island: &'a Island, keys: &'a AuditKeys, check: bool) -> Self {
        Self { island, keys, check, chains: HashMap::new(), open: Vec::new(), closed: Vec::new(), records: 0, findings: Vec::new() }
    }

    pub(super) const fn records_read(&self) -> u64 {
        self.records
    }

    /// Reads a page of records, in each writer's order; false when all that is there now was read. The next call finds what came since.
    pub(super) async fn step(&mut self, mut note: impl FnMut(&RowWrite)) -> Result<bool, ServiceError> {
        if self.open.is_empty() {
            let tails = self.island.store.audit_tails().await?;
            let unread = tails.iter().filter(|tail| self.chains.get(&tail.writer).is_none_or(|chain| chain.next_sequence <= tail.sequence));
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
            if self.check && !chain.broken {
                match self.link(&chain, &row, record.as_ref().ok()) {
                    Ok(key_version) => chain.key_version = key_version,
                    Err(reason) => {
                        chain.broken = true;
                        self.findings.push(broken(writer, format!("record {}: {reason}", row.sequence)));
                    }
                }
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
                self.closed.extend(closed.into_iter().map(|closed| (writer, closed)));
            }
        }
        self.chains.insert(writer, chain);
        Ok(true)
    }

    /// Whether a record is the next link of its writer's chain: the version of the audit key that makes the link after it.
    fn link(&self, chain: &Chain, row: &AuditAppend, record: Option<&AuditRecord>) -> Result<u32, String> {
        if row.sequence != chain.next_sequence {
            return Err(format!("{} records before it are missing", row.sequence - chain.next_sequence));
        }
        let Some(record) = record else { return Err("it does not decode".to_owned()) };
        let version = match &record.event {
            Some(Event::WriterOpened(opened)) if row.sequence == 0 => opened.audit_key_version.max(1),
            _ => chain.key_version,
        };
        let Some(key) = u8::try_from(version).ok().and_then(|version| self.keys.get(version)) else {
            return Err(format!("it is linked with version {version} of the audit key, and this server's tokens have no such version of the seal root"));
        };
        if key.next(&chain.value, &AuditLeaf::of(&row.record)) != row.chain {
            return Err("its chain value is not that of the record and the one before it".to_owned());
        }
        if record.writer.as_ref() != row.writer.octets() || record.sequence != row.sequence {
            return Err("it names another writer or number".to_owned());
        }
        let kind = record.event.as_ref().map_or(0, crate::audit::event_kind);
        if record.time_ms != row.time.0 || kind != row.kind {
            return Err("its columns are not what it says".to_owned());
        }
        if row.sequence == 0 && !matches!(record.event, Some(Event::WriterOpened(_))) {
            return Err("it does not open the chain".to_owned());
        }
        match &record.event {
            Some(Event::AuditKeyChanged(changed)) if changed.version < version => Err("it goes back to an earlier version of the audit key".to_owned()),
            Some(Event::AuditKeyChanged(changed)) => Ok(changed.version),
            _ => Ok(version),
        }
    }

    /// What does not fit of the chains: links, and ends that are not where a successor saw them.
    pub(super) async fn finish(&mut self) -> Result<Vec<ScrubFinding>, ServiceError> {
        let mut findings = std::mem::take(&mut self.findings);
        for (_, closed) in &self.closed {
            let Ok(writer) = WriterId::from_octets(&closed.writer) else { continue };
            let end = self.island.store.audit_of_writer(writer, closed.last_sequence, 1).await?;
            let reason = match end.as_slice() {
                // A server that was silent for a while, and taken for gone, may go on: its records stay links of its chain.
                [last, ..] if last.sequence == closed.last_sequence && last.chain.as_slice() == closed.chain => continue,
                [last, ..] if last.sequence == closed.last_sequence => format!("record {} is not the one that a successor saw", closed.last_sequence),
                _ => format!("it was cut off before record {}, where a successor closed it", closed.last_sequence),
            };
            findings.push(broken(writer, reason));
        }
        findings.extend(self.unbelieved());
        Ok(findings)
    }

    /// I5: chains whose end anyone could have made who learned an audit key that was retired. An end is believed if its key is, or if a chain that is
    /// believed closed it: servers close no such ends after the retirement.
    fn unbelieved(&self) -> Vec<ScrubFinding> {
        let oldest = u32::from(self.island.committer.seal_keys().oldest());
        let sound = self.chains.iter().filter(|(_, chain)| !chain.broken && chain.key_version >= oldest);
        let mut believed: HashSet<WriterId> = sound.map(|(writer, _)| *writer).collect();
        loop {
            let closed = self.closed.iter().filter(|(closer, _)| believed.contains(closer));
            let ends = closed.filter_map(|(_, closed)| Some((WriterId::from_octets(&closed.writer).ok()?, closed.last_sequence)));
            let whole =
                ends.filter(|(writer, last)| self.chains.get(writer).is_some_and(|chain| !chain.broken && last.checked_add(1) == Some(chain.next_sequence)));
            let more: Vec<WriterId> = whole.map(|(writer, _)| writer).filter(|writer| !believed.contains(writer)).collect();
            if more.is_empty() {
                break;
            }
            believed.extend(more);
        }
        // A broken chain was told already.
        let rest = self.chains.iter().filter(|(writer, chain)| !chain.broken && !believed.contains(*writer));
        rest.map(|(writer, chain)| {
            broken(*writer, format!("it ends with version {} of the audit key, which was retired, and no chain that is believed closed it", chain.key_version))
        })
        .collect()
    }
}

fn broken(writer: WriterId, detail: String) -> ScrubFinding {
    ScrubFinding { kind: 0, id: writer.octets().to_vec().into(), finding: "broken-chain".to_owned(), detail }
}

/// Records of one page. A record of an import has 40 KiB.
const PAGE: u32 = 64;
