//! Why a transfer does not begin or go on.

use std::time::Duration;

use crate::{KeyType, SecuritySetupId, SlotError, TransferId, UnixMillis};

/// Why a transfer does not begin or go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// One transfer of a meter at a time.
    #[error("another transfer of this meter is under way: {id}")]
    UnderWay {
        /// The other transfer.
        id: TransferId,
        /// When another transfer may replace it.
        not_after: UnixMillis,
    },
    /// The transfer has ended, or never existed.
    #[error("this transfer of the meter is not under way: it has ended or never existed")]
    NotUnderWay,
    /// A late or repeated report.
    #[error("the report is for another step: the transfer is at step {at}")]
    OtherStep {
        /// Its step.
        at: u32,
    },
    /// An earlier transfer left it unknown which version the meter holds.
    #[error("an earlier transfer left it unknown which version of its {key_type} the meter holds")]
    InDoubt {
        /// The key type.
        key_type: KeyType,
    },
    /// An urgent transfer, or a transfer of a KEK, would add one more version that the meter may
    /// hold.
    #[error("the meter may hold any of {most} or more versions of its {key_type}: no further version is added")]
    TooManyCandidates {
        /// The key type.
        key_type: KeyType,
        /// The bound.
        most: usize,
    },
    /// The slot has the most versions that may be not destroyed.
    #[error(
        "{most} or more versions of the meter's {key_type} are not destroyed yet: one more is delivered once a day. Versions before a proven version are \
         destroyed after the retention time"
    )]
    SlotFull {
        /// The key type.
        key_type: KeyType,
        /// The bound.
        most: usize,
        /// How long until one more is delivered.
        wait: Duration,
    },
    /// A KEK is proven by a GUEK only.
    #[error("a KEK is not transferred alone, but together with the GUEK that proves it")]
    KekAlone,
    /// GUEK, GAK and KEK belong to the meter itself.
    #[error("a {key_type} belongs to the meter and is not shared: order a new version of the meter's own key")]
    NotShared {
        /// The key type.
        key_type: KeyType,
    },
    /// So many transfers were begun that the sequence has no moment left for another.
    #[error("the meter's sequence is used up: enrol it under a new system title")]
    SequenceUsedUp,
    /// There is no key to wrap under.
    #[error("the meter has no KEK in security setup {setup}")]
    NoKek {
        /// The security setup.
        setup: SecuritySetupId,
    },
    /// No exchange is possible.
    #[error("the meter has no GUEK and GAK in security setup {setup}")]
    NoKeys {
        /// The security setup.
        setup: SecuritySetupId,
    },
    /// The meter is quarantined or retired.
    #[error("the meter is {status}: its keys are not transferred")]
    Status {
        /// Its status.
        status: &'static str,
    },
    /// The slot refuses.
    #[error(transparent)]
    Slot(#[from] SlotError),
}
