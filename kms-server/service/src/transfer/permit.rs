//! What policy is asked before a step of a transfer (I8).

use kms_domain::{KeyType, Meter, Transfer, TransferForm};

use super::{error::denied, step::Order};
use crate::campaign::check_task;
use kms_authz::{Action, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Asker, Permit, View};

/// I8: policy decides on the meter's class and the key type. The KEK has an action of its own.
pub(super) fn permits_order(asker: &Asker, meter: &Meter, order: &Order) -> Result<(), ServiceError> {
    permits(asker, meter, order.key_type, order.form, order.urgent, order.task.is_some())
}

pub(super) fn permits_transfer(asker: &Asker, meter: &Meter, transfer: &Transfer) -> Result<(), ServiceError> {
    if transfer.head_end != asker.principal().id {
        return Err(denied(meter.title));
    }
    let key_type = transfer.keys.first().map(|key| key.key_type);
    permits(asker, meter, key_type, transfer.form, false, transfer.campaign.is_some())
}

/// [`permits_transfer`], in the transaction. If the transfer belongs to a task of a campaign, the
/// caller must still hold the task lease.
pub(super) fn permits_step(
    view: &mut View<'_, '_>,
    permit: &Permit,
    meter: &Meter,
    transfer: &Transfer,
) -> Result<(), ServiceError> {
    permits_transfer(permit.asker(), meter, transfer)?;
    transfer.campaign.map_or(Ok(()), |task| check_task(view, task, meter.title, &permit.principal().id))
}

fn permits(
    asker: &Asker,
    meter: &Meter,
    key_type: Option<KeyType>,
    form: TransferForm,
    urgent: bool,
    campaign: bool,
) -> Result<(), ServiceError> {
    let in_frames = form == TransferForm::Frames;
    let action = match key_type {
        None => Action::ProbeKeys { campaign },
        Some(KeyType::KEK) => Action::TransferMasterKey { in_frames, urgent, campaign },
        Some(key_type) => Action::TransferKey { key_type, in_frames, urgent, campaign },
    };
    let permitted = meter.class.status.may_grant() && asker.permits(&action, &Resource::Meters(&meter.class));
    if permitted { Ok(()) } else { Err(denied(meter.title)) }
}
