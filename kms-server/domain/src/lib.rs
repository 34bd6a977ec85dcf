//! Meters, key slots, key versions and counters: the rules of the key management system, pure,
//! without I/O and without a clock.
//!
//! What a caller passes in is already parsed: a type that exists is right. Bytes enter through the
//! `parse` functions and `from_...` functions of this crate, and through `from_row` for what the
//! database holds.

mod acceptance;
mod approval;
mod campaign;
mod counter;
mod diversification;
mod error;
mod exposure;
mod group;
mod history;
mod id;
mod key;
mod key_type;
mod meter;
mod principal;
mod profile;
mod proposal;
mod quota;
mod retention;
mod root;
mod row;
mod seal;
mod secret;
mod shipment;
mod slot;
mod time;
mod transfer;
mod turns;

pub use acceptance::{KeyAcceptance, Remedy, Verdict};
pub use approval::{Approval, ApprovalError, ApprovalTerms, Approvals, Quorum};
pub use campaign::{
    Campaign, CampaignAction, CampaignContent, CampaignError, CampaignName, CampaignSelection, CampaignState,
    CampaignTerms, MaintenanceWindow, MaintenanceWindows, Plan, PlanChain, PlannedWave, Task, TaskEnd, TaskError,
    TaskState, TaskStep, TaskWork, WaveCounts, WaveDecision, WavePlanner, WaveResult, WaveSize, WaveTally, Weekdays,
};
pub use counter::{
    ChunkSize, CounterCap, CounterDomain, CounterError, CounterKey, CounterOwnership, CounterScope, CounterState,
    CounterUse, Counters, DealError, HourlyUse, Lease, LiveChunk, Reservation,
};
pub use diversification::{DiversificationContext, KeyDerivation};
pub use error::ParseError;
pub use exposure::{Exposure, ExposureReason, Party, SharedExposures};
pub use group::{BegunRotation, Group, GroupError, GroupRotation, MemberCounts, RotationStage, SwitchThreshold};
pub use history::{CounterJump, DatabaseHistory, Timeline};
pub use id::{
    CampaignId, CounterDomainId, DeviceTypeId, FlagId, GrantId, GroupId, IslandName, KeyVersionNumber, Owner,
    OwnerKind, PrincipalId, ProposalId, RequestId, Role, SecuritySetupId, SystemTitle, TransferId, WriterId,
};
pub use key::{CounterPlace, Evidence, KeyMaterial, KeyOrigin, KeyState, KeyVersion, Transport, WrappedKey};
pub use key_type::{KeyClass, KeyLength, KeyShape, KeyType, SecuritySuite};
pub use meter::{
    DeviceProfileName, DeviceType, KeyVersionId, Meter, MeterClass, MeterStatus, check_batch, check_serial,
};
pub use principal::{
    ClassRoots, DiversificationRoot, Enrolment, Island, IslandKind, PersonName, Principal, PrincipalCertificate,
    PrincipalStatus, TransportCertificate,
};
pub use profile::{
    ClientProfile, CounterProfile, DeviceProfile, KeyProfile, NewKeyOrigin, OnNewKey, ProfileError, ProfileKeyType,
    SetupProfile, Shipped,
};
pub use proposal::{
    DestroyRoot, Proposal, ProposalContent, ProposalEnd, ProposalError, ProposalState, ProposedAction, RaiseCounter,
    RecertifyPrincipal, RootKind,
};
pub use quota::{QuotaExceeded, QuotaHour, QuotaLimit, QuotaName, QuotaUse};
pub use retention::{ExpiredKeys, Retention};
pub use root::{
    PassPage, RootEntry, RootError, RootId, RootLedger, RootPurpose, RootRotation, RootRotationState, RootStanding,
    RowPlace,
};
pub use row::RowError;
pub use seal::{FingerprintKey, Generation, RowId, RowSeal, SealError, SealKey, SealKeys, SealRootKey, row_digest};
pub use secret::EncodedSecret;
pub use shipment::{
    LONGEST_SHIPMENT_LINE, OaepHash, ShipmentDevice, ShipmentHeader, ShipmentLineError, ShipmentTrailer,
    ShippedCounter, ShippedKey,
};
pub use slot::{Confirmation, Grantable, NewKeyVersion, Slot, SlotError, Slots, Standing};
pub use time::UnixMillis;
pub use transfer::{
    Answer, CHALLENGE, CampaignTask, ExchangePurpose, Finding, KeyPair, MOST_CANDIDATES, MOST_KEK_CANDIDATES,
    MOST_UNFIT, MOST_VERSIONS, Next, Observation, OrderedKeys, Outcome, SharedKey, Stage, Step, Transfer,
    TransferError, TransferForm, TransferKey, TransferOrder,
};
pub use turns::{Turns, Waiting};
