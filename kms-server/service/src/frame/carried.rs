//! Keys in frames that a head-end asks for: only what this server wrapped for a transfer under way.
//!
//! A head-end may have recorded the wrap of a key that it knows, or have asked a meter's vendor for
//! one. Under the keys in the HSM it would bring that key back, and be past the HSM and every
//! policy from then on. So policy is not asked about it alone.

use std::{collections::HashMap, sync::Arc};

use kms_dlms::{KeyCarrier, ServiceRequest};
use kms_domain::{Meter, PrincipalId, SystemTitle};

use super::{PlainContent, PlainFrame};
use crate::island::Island;
use crate::transfer::{Brought, TransferService};
use kms_authz::Caller;
use kms_base::error::ServiceError;

/// What the transfers under way bring to the meters of a call.
pub(super) type UnderWay = Arc<HashMap<SystemTitle, Brought>>;

/// Makes anew what is under way to the meters for which a frame carries a key. Wraps by RFC 3394
/// are the same each time.
pub(super) async fn under_way(
    island: &Arc<Island>,
    caller: &Caller,
    frames: &[PlainFrame],
) -> Result<UnderWay, ServiceError> {
    let carries =
        |frame: &&PlainFrame| matches!(&frame.content, PlainContent::Apdu { apdu, .. } if carrier(apdu).is_some());
    let titles: Vec<SystemTitle> = frames.iter().filter(carries).map(|frame| frame.meter).collect();
    if titles.is_empty() {
        return Ok(UnderWay::default());
    }
    TransferService::new(island.clone()).brought(caller, titles.into_iter()).await.map(Arc::new)
}

/// Refuses a frame with such a `carrier` of a key or a secret, unless it is the very `key_transfer`
/// of the caller's transfer, with any invoke id.
///
/// # Errors
/// Whatever policy permits: the frame carries something else.
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
