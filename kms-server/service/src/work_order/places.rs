//! The daily retention pass removes the places of work orders that have been over for long: they
//! often are persons' homes, and nobody needs them any more. The rest of an order stays, as the log
//! does.

use kms_domain::{UnixMillis, WorkOrder, WorkOrderId};
use kms_proto::v1::{PlacesRemoved, audit_record::Event};
use kms_store::{Reads, RowKind};

use crate::island::IslandContext;
use kms_base::error::ServiceError;
use kms_ledger::{Decision, ServerAct, work_order_columns, work_order_row};

/// Reads all orders once, adds search columns that were lost, and removes the places that are due
/// at `now`. `None`: it is not certain what time it is, and no place is removed. Returns how many
/// it removed. Every page with changes is one act with one record (I2).
///
/// # Errors
/// The database cannot be reached, or the server is busy. What was done before is committed and
/// recorded.
pub(crate) async fn remove_places(island: &IslandContext, now: Option<UnixMillis>) -> Result<u64, ServiceError> {
    let days = u32::try_from(island.limits.work_order_place_days).unwrap_or(u32::MAX);
    let after_ms = i64::from(days).saturating_mul(DAY_MS);
    let (mut removed, mut after): (u64, Option<Vec<u8>>) = (0, None);
    loop {
        let page = island.store.sealed_page(RowKind::WorkOrder, after.as_deref(), PAGE).await?;
        let Some((last, _)) = page.last() else { return Ok(removed) };
        after = Some(last.clone());
        // The seals are not checked here: this only chooses rows, which the act reads again and
        // verifies (I5), and search columns decide nothing. So the server need not remember each
        // order that there ever was. The scrub reports rows that do not verify.
        let orders: Vec<WorkOrder> = page
            .iter()
            .filter_map(|(id, row)| {
                let id = std::str::from_utf8(id).ok().and_then(|id| WorkOrderId::parse(id).ok())?;
                WorkOrder::from_row(id, row.body.clone().into()).ok()
            })
            .collect();
        let columns: Vec<_> = orders.iter().map(work_order_columns).collect();
        let missing = island.store.complete_work_orders(&columns).await?;
        if missing > 0 {
            tracing::warn!(missing, "work orders were missing in the list of work orders and were added");
        }
        let Some(now) = now else { continue };
        let due = orders.into_iter().filter_map(|mut order| order.remove_place(after_ms, now).then_some(order.id));
        let due: Vec<WorkOrderId> = due.collect();
        if due.is_empty() {
            continue;
        }
        let reads = Reads { sealed: due.iter().map(work_order_row).collect(), ..Reads::default() };
        let act = island.committer.act(ServerAct::REMOVE_PLACES, reads, move |view| {
            let mut work_order_ids = Vec::new();
            for id in &due {
                // An error means that the row does not verify and is left as it is (I5), or that it
                // is read for the next attempt.
                let Some(order) = view.work_order(id).ok().flatten() else { continue };
                let mut order = (*order).clone();
                if order.remove_place(after_ms, now) {
                    work_order_ids.push(id.to_string());
                    view.put_work_order(order)?;
                }
            }
            let count = work_order_ids.len() as u64;
            if count == 0 {
                return Ok(Decision::unchanged(0));
            }
            // I2.
            let entry = view.append(Event::PlacesRemoved(PlacesRemoved { days, work_order_ids }));
            Ok(Decision::recorded(entry, count))
        });
        removed += act.await?.value;
    }
}

/// Orders that are read, and at most written, at once.
const PAGE: u32 = 256;
const DAY_MS: i64 = 86_400_000;
