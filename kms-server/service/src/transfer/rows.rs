//! The rows that acts on transfers read.

use std::sync::Arc;

use kms_domain::{GroupId, Meter, SystemTitle};
use kms_store::{Reads, RowKind};

use super::error::denied;
use crate::campaign::task_reads;
use kms_base::error::ServiceError;
use kms_ledger::View;

/// The meter's row, in the transaction.
pub(super) fn own_meter(view: &mut View<'_, '_>, title: SystemTitle) -> Result<Arc<Meter>, ServiceError> {
    view.meter(title)?.ok_or_else(|| denied(title))
}

/// The name of a group's row.
pub(super) fn group_row(group: GroupId) -> (RowKind, Vec<u8>) {
    (RowKind::Group, group.0.to_be_bytes().to_vec())
}

/// Adds the tasks that the transfers of these meters belong to.
pub(super) fn extend_by_tasks<'a>(reads: &mut Reads, meters: impl Iterator<Item = &'a Arc<Meter>>) {
    for meter in meters {
        if let Some(task) = meter.transfer.as_ref().and_then(|transfer| transfer.campaign) {
            reads.extend(&task_reads(task.campaign, [meter.title]));
        }
    }
}
