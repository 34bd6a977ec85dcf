//! I4 by the audit log, after every test on an island: no counter was allocated twice, whatever the
//! test is about. hsm-sim checks nonces itself. This check works on every module, and it also
//! covers leases, whose counters no token of the island uses.

use std::collections::BTreeMap;

use kms_proto::v1::{AuditRecord, audit_record::Event};
use kms_store::Store;
use prost::Message as _;

/// Whose counters: meter or group, security setup, key type and version, client title. That of
/// meters with equal keys is recorded meter by meter.
type Counted = (u64, u64, u32, String, u32, Vec<u8>);

/// Every range of counters on the record, and what it was for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Allocated(BTreeMap<Counted, Vec<(u64, u64, &'static str)>>);

impl Allocated {
    fn add(&mut self, record: AuditRecord) {
        match record.event {
            Some(Event::KeysGranted(granted)) => {
                let encryption =
                    granted.key_types.iter().position(|key_type| ["GUEK", "GBEK"].contains(&key_type.as_str()));
                for meter in granted.meters.iter().filter(|meter| meter.lease_count > 0) {
                    let at = encryption.expect("a lease is for an encryption key");
                    let counted = (
                        meter.meter,
                        meter.group,
                        meter.security_setup,
                        granted.key_types[at].clone(),
                        meter.versions[at],
                        granted.client_title.to_vec(),
                    );
                    self.range(counted, meter.lease_first, meter.lease_count, "lease");
                }
            }
            Some(Event::FramesProtected(protected)) => {
                for frame in protected.frames {
                    let counted = (
                        frame.meter,
                        0,
                        frame.security_setup,
                        "GUEK".to_owned(),
                        frame.key_version,
                        frame.client_title.to_vec(),
                    );
                    self.range(counted, frame.invocation_counter, 1, "frame");
                }
            }
            Some(Event::TransfersAdvanced(advanced)) => {
                for step in advanced.advances {
                    for counter in &step.invocation_counters {
                        let counted = (
                            step.meter,
                            0,
                            step.security_setup,
                            "GUEK".to_owned(),
                            step.guek_version,
                            step.client_title.to_vec(),
                        );
                        self.range(counted, *counter, 1, "transfer");
                    }
                }
            }
            _ => {}
        }
    }

    fn range(&mut self, counted: Counted, first: u32, count: u32, what: &'static str) {
        self.0.entry(counted).or_default().push((first.into(), u64::from(first) + u64::from(count), what));
    }

    /// Two ranges that share a counter, if there are such.
    fn repeated(mut self) -> Option<String> {
        for (counted, ranges) in &mut self.0 {
            ranges.sort_unstable();
            if let Some(pair) = ranges.windows(2).find(|pair| pair[1].0 < pair[0].1) {
                return Some(format!("counters of {counted:?} were handed out twice (I4): {pair:?}"));
            }
        }
        None
    }
}

/// Looks through the whole log of an island. A test that ends with its database away has nothing to
/// look at.
pub(crate) async fn repeated_counters(store: &dyn Store) -> Option<String> {
    let mut allocated = Allocated::default();
    for tail in store.audit_tails().await.ok()? {
        let mut next = 0;
        while next <= tail.sequence {
            let page = store.audit_of_writer(tail.writer, next, 1_000).await.ok()?;
            // Records that a test has deleted.
            let Some(last) = page.last() else { break };
            next = last.sequence + 1;
            for row in &page {
                if let Ok(record) = AuditRecord::decode(row.record.as_slice()) {
                    allocated.add(record);
                }
            }
        }
    }
    allocated.repeated()
}

#[cfg(test)]
mod tests {
    use kms_proto::v1::{
        FramesProtected, GrantedMeter, KeysGranted, ProtectedFrame, TransferAdvance, TransfersAdvanced,
    };

    use super::*;

    fn repeated(events: &[Event]) -> bool {
        let mut allocated = Allocated::default();
        for event in events {
            allocated.add(AuditRecord { event: Some(event.clone()), ..AuditRecord::default() });
        }
        allocated.repeated().is_some()
    }

    #[test]
    fn a_counter_that_is_allocated_twice_is_found() {
        let lease = |lease_first, lease_count| {
            let meters = vec![GrantedMeter {
                meter: 7,
                versions: vec![2, 3],
                lease_first,
                lease_count,
                ..GrantedMeter::default()
            }];
            Event::KeysGranted(KeysGranted {
                key_types: vec!["GAK".to_owned(), "GUEK".to_owned()],
                meters,
                ..KeysGranted::default()
            })
        };
        let frame = |meter, invocation_counter| {
            let frames =
                vec![ProtectedFrame { meter, invocation_counter, key_version: 3, ..ProtectedFrame::default() }];
            Event::FramesProtected(FramesProtected { frames, ..FramesProtected::default() })
        };
        let step = |invocation_counters| {
            let advances =
                vec![TransferAdvance { meter: 7, guek_version: 3, invocation_counters, ..TransferAdvance::default() }];
            Event::TransfersAdvanced(TransfersAdvanced { advances, ..TransfersAdvanced::default() })
        };
        assert!(!repeated(&[lease(1, 10), frame(7, 11), step(vec![12, 13]), frame(8, 5), lease(14, 1)]));
        for again in [lease(10, 5), frame(7, 10), frame(7, 11), step(vec![13]), step(vec![20, 20])] {
            assert!(repeated(&[lease(1, 10), frame(7, 11), step(vec![12, 13]), again.clone()]), "{again:?}");
        }
    }
}
