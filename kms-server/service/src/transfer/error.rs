//! Refusals of transfers.

use kms_domain::{KeyType, SystemTitle, TransferError};

use kms_base::error::ServiceError;

/// The same answer for an unknown meter and for one that the caller may not use.
pub(super) fn denied(meter: SystemTitle) -> ServiceError {
    ServiceError::denied(format!("transferKey with meter {meter}"))
}

/// A refusal of the state machine, with the next step.
pub(super) fn refused(error: &TransferError) -> ServiceError {
    let next_step = match error {
        TransferError::SlotFull { wait, .. } => {
            return ServiceError::ResourceExhausted { reason: error.to_string(), retry_after: *wait };
        }
        TransferError::UnderWay { .. } => "wait for its end, or withdraw it",
        TransferError::NotUnderWay | TransferError::OtherStep { .. } => {
            "check the transfer with `kms meter show`; report its present step only"
        }
        TransferError::InDoubt { .. } => {
            "probe the meter first; or, where a policy permits it, order an urgent transfer, which adds a candidate"
        }
        TransferError::TooManyCandidates { key_type: KeyType::KEK, .. } => {
            "rotate the GUEK until a transfer is proven, which shows the KEK that the meter holds; then order the KEK"
        }
        TransferError::TooManyCandidates { .. } => {
            "probe the meter: when it has shown which version it holds, order the key again"
        }
        TransferError::KekAlone => "order the KEK: its GUEK is delivered with it",
        TransferError::NotShared { .. } => "order a new version of the meter's own key",
        TransferError::SequenceUsedUp => "replace the meter: a new system title has a sequence of its own",
        TransferError::NoKek { .. } | TransferError::NoKeys { .. } => "import or enrol the meter's keys",
        TransferError::Status { .. } => "ask an officer to change the status of the meter",
        TransferError::Slot(_) => "look at the meter's slots with `kms meter show`",
    };
    ServiceError::FailedPrecondition { reason: error.to_string(), next_step: next_step.to_owned() }
}
