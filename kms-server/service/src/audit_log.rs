//! Reading the audit log.

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use bytes::Bytes;
use kms_domain::{PrincipalId, SystemTitle, UnixMillis};
use kms_proto::v1::{AuditRecord, WorkOrderChanged, WorkOrderCreated, audit_record::Event};
use kms_store::{AuditCursor, AuditFilter, AuditRow};
use prost::Message as _;

use crate::island::IslandContext;
use kms_authz::{Action, Caller};
use kms_base::error::ServiceError;

/// A query of the log.
#[derive(Clone, Debug, Default)]
pub struct LogQuery {
    /// Caused by this principal.
    pub principal: Option<PrincipalId>,
    /// Naming this meter.
    pub meter: Option<SystemTitle>,
    /// From this time on.
    pub from: Option<UnixMillis>,
    /// Before this time.
    pub to: Option<UnixMillis>,
    /// Continues after an earlier page of the same query.
    pub after: Option<LogPlace>,
    /// The most records of a page.
    pub limit: usize,
    /// The newest first.
    pub newest_first: bool,
}

/// A page of records. It can be empty although more follow, because one call reads a limited number
/// of records.
#[derive(Clone, Debug, Default)]
pub struct LogPage {
    /// The records.
    pub records: Vec<AuditRecord>,
    /// Where the next page begins; `None` after the last page.
    pub next: Option<LogPlace>,
}

/// The position of a query, and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogPlace {
    /// It continues after this record, in the order of the query.
    pub behind: AuditCursor,
    /// The last record of the query.
    pub last: AuditCursor,
}

impl LogPlace {
    const fn whole(newest_first: bool) -> Self {
        Self::between(newest_first, i64::MIN, i64::MAX)
    }

    /// From the first to the last of these records, or in reverse.
    const fn between(newest_first: bool, first: i64, last: i64) -> Self {
        match newest_first {
            true => Self { behind: AuditCursor(last.saturating_add(1)), last: AuditCursor(first) },
            false => Self { behind: AuditCursor(first.saturating_sub(1)), last: AuditCursor(last) },
        }
    }
}

/// Reads the log of an island.
#[derive(Clone)]
pub struct AuditLog {
    island: Arc<IslandContext>,
}

impl AuditLog {
    /// The log of an island.
    pub const fn new(island: Arc<IslandContext>) -> Self {
        Self { island }
    }

    /// A page of records in the order of the log, independent of the clock: each server's records
    /// come in the order of its chain. The times of a query select by the records' times. The
    /// scrubber checks whether the log is complete.
    ///
    /// # Errors
    /// Not permitted, a record that does not decode, or the database is unavailable.
    #[boxed]
    pub async fn list(&self, caller: &Caller, query: &LogQuery) -> Result<LogPage, ServiceError> {
        self.island.require(caller, &Action::ListAuditRecords).await?;
        let mut page = LogPage::default();
        let Some(mut reader) = Reader::new(&self.island, query).await? else { return Ok(page) };
        let (mut read, mut octets) = (0, 0);
        while !reader.end && read < MOST_READ {
            for row in reader.next().await? {
                read += 1;
                let record = AuditRecord::decode(row.record.record.as_slice()).map_err(|_| {
                    ServiceError::Internal("an audit record does not decode: run `kms audit scrub`".to_owned())
                })?;
                if query.matches(&record) {
                    octets += row.record.record.len();
                    // A record of an import is large. The answer must stay below the message size
                    // of clients.
                    if !page.records.is_empty() && (page.records.len() >= query.limit || octets > MOST_OCTETS) {
                        return Ok(page);
                    }
                    page.records.push(record);
                }
                page.next = Some(LogPlace { behind: row.cursor, ..reader.place });
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
        self.from.is_none_or(|from| record.time_ms >= from.0)
            && self.to.is_none_or(|to| record.time_ms < to.0)
            && self.principal.as_ref().is_none_or(|principal| record.principal == principal.to_string())
            && self.meter.is_none_or(|meter| names(record, meter))
    }
}

/// Whether a record names a meter: in its event, or as a written row.
fn names(record: &AuditRecord, meter: SystemTitle) -> bool {
    let octets = meter.octets();
    let number = u64::from_be_bytes(octets);
    let is = |other: &Bytes| other.as_ref() == octets;
    let in_event = match &record.event {
        Some(Event::KeysGranted(event)) => event.meters.iter().any(|granted| granted.meter == number),
        Some(Event::FramesProtected(event)) => event.frames.iter().any(|frame| frame.meter == number),
        Some(Event::MetersChanged(event)) => event.meters.iter().any(is),
        Some(Event::WorkOrderCreated(WorkOrderCreated { work: Some(work), .. }))
        | Some(Event::WorkOrderChanged(WorkOrderChanged { work: Some(work), .. })) => work.meters.contains(&number),
        Some(Event::SecurityEvent(event)) => is(&event.meter),
        Some(Event::KeysDestroyed(event)) => event.keys.iter().any(|keys| keys.kind == METER && is(&keys.owner)),
        _ => false,
    };
    in_event || record.row_writes.iter().any(|write| write.kind == METER && is(&write.id))
}

/// Reads the log in its order, or in reverse, between two places.
struct Reader<'a> {
    island: &'a IslandContext,
    newest_first: bool,
    place: LogPlace,
    end: bool,
}

impl<'a> Reader<'a> {
    /// A reader for a query; `None`: the log has nothing for it.
    async fn new(island: &'a IslandContext, query: &LogQuery) -> Result<Option<Self>, ServiceError> {
        let place = match query.after {
            Some(place) => place,
            None if query.from.is_none() && query.to.is_none() => LogPlace::whole(query.newest_first),
            None => match island.store.audit_range(query.from, query.to).await? {
                // If the end of the query is open, records that are written from now on belong to
                // it.
                Some((AuditCursor(first), _)) if query.to.is_none() => {
                    LogPlace::between(query.newest_first, first, i64::MAX)
                }
                Some((_, AuditCursor(last))) if query.from.is_none() => {
                    LogPlace::between(query.newest_first, i64::MIN, last)
                }
                Some((AuditCursor(first), AuditCursor(last))) => LogPlace::between(query.newest_first, first, last),
                None => return Ok(None),
            },
        };
        Ok(Some(Self { island, newest_first: query.newest_first, place, end: false }))
    }

    async fn next(&mut self) -> Result<Vec<AuditRow>, ServiceError> {
        let filter = AuditFilter { newest_first: self.newest_first, ..AuditFilter::default() };
        let mut rows = self.island.store.audit_page(&filter, Some(self.place.behind), PAGE).await?;
        self.end = rows.len() < usize::try_from(PAGE).unwrap_or_default();
        let last = self.place.last;
        let within = |row: &AuditRow| if self.newest_first { row.cursor >= last } else { row.cursor <= last };
        if let Some(at) = rows.iter().position(|row| !within(row)) {
            rows.truncate(at);
            self.end = true;
        }
        self.place.behind = rows.last().map_or(self.place.behind, |row| row.cursor);
        Ok(rows)
    }
}

/// The kind of meters' rows.
const METER: u32 = 1;
const PAGE: u32 = 200;
/// About the most records that one call reads.
const MOST_READ: usize = 20_000;
/// About the octets of one answer.
const MOST_OCTETS: usize = 2 << 20;

#[cfg(test)]
mod tests {
    use kms_proto::v1::{ClockJumped, MetersChanged};
    use kms_store::Reads;

    use super::*;
    use crate::testing::{TestIsland, island_tests, meter, sample};
    use kms_base::clock;

    const DAY: i64 = 86_400_000;

    /// A record of a change of a meter by a server.
    async fn change(island: &IslandContext, number: u64) {
        let event = MetersChanged {
            meters: vec![meter(number).octets().to_vec().into()],
            change: "test".to_owned(),
            ..MetersChanged::default()
        };
        let act = island.committer.act_in_test(
            kms_ledger::Actor::server(kms_ledger::ServerAct::TEST),
            Reads::default(),
            move |view| {
                view.append(Event::MetersChanged(event.clone()));
                Ok(())
            },
        );
        act.await.unwrap();
    }

    /// All records that the auditor is shown for a query, page by page.
    async fn walk(island: &TestIsland, mut query: LogQuery) -> Vec<AuditRecord> {
        let log = AuditLog::new(island.island.clone());
        let mut all = Vec::new();
        loop {
            let page = log.list(&island.auditor, &query).await.unwrap();
            all.extend(page.records);
            query.after = page.next;
            if page.next.is_none() {
                return all;
            }
        }
    }

    fn jumps(records: &[AuditRecord]) -> Vec<(String, i64)> {
        let jumps = records.iter().filter_map(|record| match &record.event {
            Some(Event::ClockJumped(ClockJumped { compared_with, expected_ms, observed_ms })) => {
                // To the minute: the test takes its time.
                Some((compared_with.clone(), (observed_ms - expected_ms + DAY / 2).div_euclid(DAY)))
            }
            _ => None,
        });
        jumps.collect()
    }

    island_tests! {
        async fn the_log_has_an_order_of_its_own_and_jumps_are_on_the_record(island) {
            island.deliver(&sample("generic-suite0", 5)).await;
            clock::testing::set_ahead(DAY);
            change(&island.island, 1).await;
            clock::testing::set_ahead(0);
            change(&island.island, 2).await;

            // All of it, the records of a time that has not come too, as it was written.
            let all = walk(&island, LogQuery { limit: 3, ..LogQuery::default() }).await;
            let writer = island.island.committer.writer().unwrap();
            let of_chain: Vec<_> = all.iter().filter(|record| record.writer == writer.octets().as_slice()).map(|record| record.sequence).collect();
            assert_eq!(of_chain, (0..of_chain.len() as u64).collect::<Vec<_>>());
            let mut back = walk(&island, LogQuery { limit: 4, newest_first: true, ..LogQuery::default() }).await;
            assert!(matches!(back.first().unwrap().event, Some(Event::MetersChanged(_))), "the last that was done is the newest");
            back.reverse();
            assert_eq!(all, back);
            assert!(all.iter().any(|record| record.time_ms > IslandContext::now().0), "what was written while the clock was ahead is shown");

            // Both jumps, each before what was done then.
            let mut by_process = jumps(&all);
            // Where the database's clock was compared in the meantime, it says the same.
            by_process.retain(|(compared_with, _)| compared_with == "process");
            assert_eq!(by_process, [("process".to_owned(), 1), ("process".to_owned(), -1)]);
            let mut told = 0;
            for pair in all.windows(2) {
                if pair[1].time_ms < pair[0].time_ms {
                    assert!(matches!(pair[1].event, Some(Event::ClockJumped(_))), "a chain goes backwards behind a record of it only");
                    told += 1;
                }
            }
            assert_eq!(told, 1);

            // Times select by what the records say.
            let later = walk(&island, LogQuery { limit: 3, from: Some(IslandContext::now().after(DAY / 2)), ..LogQuery::default() }).await;
            let expected: Vec<_> = all.iter().filter(|record| record.time_ms > IslandContext::now().after(DAY / 2).0).cloned().collect();
            assert_eq!(later, expected);
            assert!(later.iter().any(|record| matches!(record.event, Some(Event::MetersChanged(_)))));
            let query = LogQuery { limit: 3, to: Some(IslandContext::now().after(DAY / 2)), newest_first: true, ..LogQuery::default() };
            assert_eq!(walk(&island, query).await.len() + later.len(), walk(&island, LogQuery { limit: 100, ..LogQuery::default() }).await.len());
            let nothing = LogQuery { limit: 3, from: Some(IslandContext::now().after(5 * DAY)), ..LogQuery::default() };
            assert_eq!(walk(&island, nothing).await, []);
            let of_meter = walk(&island, LogQuery { limit: 3, meter: Some(meter(1)), ..LogQuery::default() }).await;
            assert_eq!(of_meter.len(), 2, "its import and its change");
        }

        async fn refusals_outside_of_acts_are_written_and_those_of_acts_are_not_counted_again(island) {
            let (asked, principal) = (Action::ListAuditRecords, island.head_end.principal.clone());
            let outside = island.island.require(&island.head_end, &asked).await.unwrap_err();
            assert!(matches!(outside, ServiceError::PermissionDenied { recorded: false, .. }), "the place where it leaves counts it");
            let actor = kms_ledger::Actor::caller(&island.head_end, None, "addPrincipal");
            let act = island.island.committer.act_in_test(actor, Reads::default(), |_| Err::<(), _>(ServiceError::denied("addPrincipal")));
            let inside = act.await.map(|committed| committed.value).unwrap_err();
            assert!(matches!(inside, ServiceError::PermissionDenied { recorded: true, .. }));

            for _ in 0..1_000 {
                island.island.committer.refused(Some(&principal), asked.name(), outside.to_string());
            }
            let refused = async || {
                let events = island.log().await.into_iter().filter_map(|record| match record {
                    AuditRecord { principal: by, event: Some(Event::Refused(event)), .. } if by == principal.to_string() => Some(event),
                    _ => None,
                });
                events.collect::<Vec<_>>()
            };
            // By itself, although nobody acts.
            let mut all = refused().await;
            while !all.iter().any(|event| event.action == asked.name()) {
                tokio::task::yield_now().await;
                all = refused().await;
            }
            assert_eq!(all.iter().map(|event| event.action.as_str()).collect::<Vec<_>>(), ["addPrincipal", asked.name()], "{all:?}");
            assert_eq!(all[0].count, 1);
            assert!((1..=1_000).contains(&all[1].count) && all[1].reason.contains("not permitted"), "{all:?}");
        }

        async fn a_server_whose_clock_is_behind_the_log_says_so_when_it_starts(island) {
            island.deliver(&sample("generic-suite0", 1)).await;
            clock::testing::set_ahead(-3 * DAY);
            let late = island.another_server().await;
            change(&late, 1).await;
            let all = walk(&island, LogQuery { limit: 100, ..LogQuery::default() }).await;
            let writer = late.committer.writer().unwrap();
            let told: Vec<_> = all.into_iter().filter(|record| record.writer == writer.octets().as_slice()).collect();
            // The database's clock says the same, where it is compared.
            assert!(jumps(&told).contains(&("log".to_owned(), -3)), "{told:?}");
        }
    }
}
