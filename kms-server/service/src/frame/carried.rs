//! Keys inside frames that a head-end sends: only those that this server wrapped for an unfinished
//! transfer.
//!
//! A head-end may have recorded the wrap of a key that it knows, or may have it from the meter's
//! vendor. A frame that carries this wrap would give the meter a key that the head-end knows. From
//! then on the head-end would need neither the HSM nor a policy. So a permit of the policy is not
//! enough for such a frame.

use std::{collections::HashMap, sync::Arc};

use kms_dlms::{KeyCarrier, ServiceRequest};
use kms_domain::{Meter, PrincipalId, SystemTitle};

use crate::island::IslandContext;
use crate::transfer::{Brought, TransferService};
use kms_authz::Caller;
use kms_base::error::ServiceError;

/// What the unfinished transfers bring to the meters of a call.
pub(super) type UnderWay = Arc<HashMap<SystemTitle, Brought>>;

/// Makes once more what the unfinished transfers bring to the meters for which an APDU carries a
/// key. RFC 3394 gives the same wrap each time.
pub(super) async fn under_way(
    island: &Arc<IslandContext>,
    caller: &Caller,
    apdus: &[(SystemTitle, &[u8])],
) -> Result<UnderWay, ServiceError> {
    let titles: Vec<SystemTitle> =
        apdus.iter().filter(|(_, apdu)| carrier(apdu).is_some()).map(|(title, _)| *title).collect();
    if titles.is_empty() {
        return Ok(UnderWay::default());
    }
    TransferService::new(island.clone()).brought(caller, titles.into_iter()).await.map(Arc::new)
}

/// Refuses a frame whose request carries a key or a secret (`carrier`), unless it is the
/// `key_transfer` of the caller's own transfer. The invoke id may differ.
///
/// # Errors
/// The frame carries another key or a secret, whether policy permits the frame or not.
pub(super) fn check(
    carrier: Option<KeyCarrier>,
    apdu: &[u8],
    meter: &Meter,
    caller: &PrincipalId,
    under_way: &UnderWay,
) -> Result<(), ServiceError> {
    match carrier {
        None => Ok(()),
        Some(KeyCarrier::Other(what)) => Err(ServiceError::FailedPrecondition {
            reason: format!(
                "the frame carries a key or a secret, or a way to one ({what}), which no frame of a head-end's own does"
            ),
            next_step: "order a transfer of the key; what no transfer brings is changed on site".to_owned(),
        }),
        Some(KeyCarrier::KeyTransfer) => {
            let transfer = meter.transfer.as_ref().filter(|transfer| transfer.head_end == *caller);
            let brought = transfer.and_then(|transfer| {
                under_way
                    .get(&meter.title)
                    .filter(|brought| (brought.transfer, brought.step) == (transfer.id, transfer.step))
            });
            if brought.is_some_and(|brought| same_but_for_the_invoke_id(apdu, &brought.request)) {
                return Ok(());
            }
            Err(ServiceError::FailedPrecondition {
                reason: "the key in the frame is not the one that a transfer under way brings to this meter now".to_owned(),
                next_step: "order a transfer in the form WRAPPED_KEY, and send what its step has in key_transfer_argument; or in the form FRAMES".to_owned(),
            })
        }
    }
}

fn carrier(apdu: &[u8]) -> Option<KeyCarrier> {
    ServiceRequest::parse(apdu).ok().and_then(|request| request.carries_key(apdu))
}

/// action-request-normal: tag, choice, invoke-id-and-priority, and the rest.
fn same_but_for_the_invoke_id(apdu: &[u8], request: &[u8]) -> bool {
    apdu.len() == request.len() && apdu.get(..2) == request.get(..2) && apdu.get(3..) == request.get(3..)
}
