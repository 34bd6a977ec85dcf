//! What the audit log says, for tests: events are chosen by what they are, never by their number.

use kms_proto::v1::{AuditRecord, audit_record::Event};
use kms_store::AuditFilter;
use prost::Message as _;

use super::TestIsland;

impl TestIsland {
    /// All records, oldest first.
    pub(crate) async fn log(&self) -> Vec<AuditRecord> {
        let (mut records, mut after) = (Vec::new(), None);
        loop {
            let page = self.island.store.audit_page(&AuditFilter::default(), after, 1_000).await.unwrap();
            let Some(last) = page.last() else { return records };
            after = Some(last.cursor);
            records.extend(page.iter().map(|row| AuditRecord::decode(row.record.record.as_slice()).unwrap()));
        }
    }

    /// What `pick` takes from the events of all records, oldest first.
    pub(crate) async fn recorded<T>(&self, pick: impl Fn(Event) -> Option<T>) -> Vec<T> {
        self.log().await.into_iter().filter_map(|record| pick(record.event?)).collect()
    }
}
