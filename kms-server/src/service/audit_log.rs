//! The audit log, for reading.

use std::sync::Arc;

use bytes::Bytes;
use kms_domain::{PrincipalId, SystemTitle, UnixMillis};
use kms_proto::v1::{AuditRecord, audit_record::Event};
use kms_store::{AuditCursor, AuditFilter, AuditRow};
use prost::Message as _;

use crate::{
    authz::{Action, Caller},
    error::ServiceError,
    island::Island,
};

/// What to list.
#[derive(Clone, Debug, Default)]
pub struct LogQuery {
    /// Caused by this principal.
    pub principal: Option<PrincipalId>,
    /// Naming this meter.
    pub meter: Option<SystemTitle>,
    /// From then on.
    pub from: Option<UnixMillis>,
    /// Before then.
    pub to: Option<UnixMillis>,
    /// Behind this place, in the order that is asked for.
    pub after: Option<AuditCursor>,
    /// At most so many records.
    pub limit: usize,
    /// The newest first.
    pub newest_first: bool,
}

/// A page of records. It can be empty although more follow: one call reads so many records and no more.
#[derive(Clone, Debug, Default)]
pub struct LogPage {
    /// The records.
    pub records: Vec<AuditRecord>,
    /// Where the next page goes on; `None` behind the last.
    pub next: Option<AuditCursor>,
}

/// Reads the log of an island.
#[derive(Clone)]
pub struct AuditLog {
    island: Arc<Island>,
}

impl AuditLog {
    /// Of an island.
    pub const fn new(island: Arc<Island>) -> Self {
        Self { island }
    }

    /// A page of records, in the order of their times. Whether the log is whole is for the scrubber to say.
    ///
    /// # Errors
    /// Not permitted, a record that does not decode, or the database is away.
    pub async fn list(&self, caller: &Caller, query: &LogQuery) -> Result<LogPage, ServiceError> {
        self.island.require(caller, &Action::ListAuditRecords).await?;
        let mut reader = Reader { island: &self.island, query, cursor: query.after, window_ms: FIRST_WINDOW_MS, end: false };
        let mut page = LogPage::default();
        let (mut read, mut octets) = (0, 0);
        while !reader.end && read < MOST_READ {
            for row in reader.next().await? {
                read += 1;
                let record = AuditRecord::decode(row.record.record.as_slice())
                    .map_err(|_| ServiceError::Internal("an audit record does not decode: run `kms audit scrub`".to_owned()))?;
                if query.matches(&record) {
                    octets += row.record.record.len();
                    // A record of an import is large; an answer stays below what clients take.
                    if !page.records.is_empty() && (page.records.len() >= query.limit || octets > MOST_OCTETS) {
                        return Ok(page);
                    }
                    page.records.push(record);
                }
                page.next = Some(row.cursor);
            }
        }
        if reader.end {
            page.next = None;
        }
        Ok(page)
    }
}

impl LogQuery {
    fn matches(&self, record: &AuditRecord) -> bool {
        self.principal.as_ref().is_none_or(|principal| record.principal == principal.to_string()) && self.meter.is_none_or(|meter| names(record, meter))
    }
}

/// Whether a record names a meter: in its event, or as a row that was written.
fn names(record: &AuditRecord, meter: SystemTitle) -> bool {
    let octets = meter.octets();
    let number = u64::from_be_bytes(octets);
    let is = |other: &Bytes| other.as_ref() == octets;
    let in_event = match &record.event {
        Some(Event::KeysGranted(event)) => event.meters.iter().any(|granted| granted.meter == number),
        Some(Event::FramesProtected(event)) => event.frames.iter().any(|frame| frame.meter == number),
        Some(Event::MetersChanged(event)) => event.meters.iter().any(is),
        Some(Event::SecurityEvent(event)) => is(&event.meter),
        Some(Event::KeysDestroyed(event)) => event.keys.iter().any(|keys| keys.kind == METER && is(&keys.owner)),
        _ => false,
    };
    in_event || record.row_writes.iter().any(|write| write.kind == METER && is(&write.id))
}

/// Reads in either order. The database lists in order of time; backwards, the log is read in windows of time that grow where little
/// happened and shrink where much did.
struct Reader<'a> {
    island: &'a Island,
    query: &'a LogQuery,
    cursor: Option<AuditCursor>,
    window_ms: i64,
    end: bool,
}

impl Reader<'_> {
    async fn next(&mut self) -> Result<Vec<AuditRow>, ServiceError> {
        if self.query.newest_first { self.backwards().await } else { self.forwards().await }
    }

    async fn forwards(&mut self) -> Result<Vec<AuditRow>, ServiceError> {
        let filter = AuditFilter { from: self.query.from, before: self.query.to, ..AuditFilter::default() };
        let rows = self.island.store.audit_page(&filter, self.cursor, PAGE).await?;
        self.end = rows.len() < usize::try_from(PAGE).unwrap_or_default();
        self.cursor = rows.last().map(|row| row.cursor).or(self.cursor);
        Ok(rows)
    }

    async fn backwards(&mut self) -> Result<Vec<AuditRow>, ServiceError> {
        // Behind the newest record that there can be.
        let newest = self.query.to.unwrap_or_else(|| Island::now().after(CLOCKS_APART_MS));
        let behind = |cursor: AuditCursor| if cursor.id == BEFORE_ALL { cursor.time } else { cursor.time.after(1) };
        let before = self.cursor.map_or(newest, |cursor| newest.min(behind(cursor)));
        let oldest = match self.query.from {
            Some(from) => from,
            None => self.island.store.audit_page(&AuditFilter::default(), None, 1).await?.first().map_or(before, |row| row.cursor.time),
        };
        let from = before.after(-self.window_ms).max(oldest);
        let filter = AuditFilter { from: Some(from), before: Some(before), ..AuditFilter::default() };
        let mut rows = Vec::new();
        let mut after = None;
        loop {
            let page = self.island.store.audit_page(&filter, after, PAGE).await?;
            let full = page.len() == usize::try_from(PAGE).unwrap_or_default();
            after = page.last().map(|row| row.cursor);
            rows.extend(page);
            if !full {
                break;
            }
            if rows.len() >= MOST_IN_WINDOW && self.window_ms > 1 {
                self.window_ms = (self.window_ms / 8).max(1);
                return Ok(Vec::new());
            }
        }
        if let Some(cursor) = self.cursor {
            rows.retain(|row| row.cursor < cursor);
        }
        rows.reverse();
        self.end = from <= oldest;
        // The place before all that was read; an empty window moves it too.
        self.cursor = Some(AuditCursor { time: from, id: BEFORE_ALL });
        if rows.len() < MOST_IN_WINDOW / 8 {
            self.window_ms = self.window_ms.saturating_mul(8);
        }
        Ok(rows)
    }
}

/// No record has this number: a cursor with it stands before all records of its time.
const BEFORE_ALL: i64 = i64::MIN;
/// The kind of meters' rows.
const METER: u32 = 1;
const PAGE: u32 = 200;
/// Records that one call reads at most, about.
const MOST_READ: usize = 20_000;
/// Octets of one answer, about.
const MOST_OCTETS: usize = 2 << 20;
const FIRST_WINDOW_MS: i64 = 60_000;
const MOST_IN_WINDOW: usize = 1_000;
/// How far the clocks of servers may differ.
const CLOCKS_APART_MS: i64 = 300_000;
