//! Meters, key slots, key versions and counters: the rules of the key management system, pure,
//! without I/O and without a clock.
//!
//! Callers pass parsed values: a value of a type of this crate is valid. Octets and texts enter
//! through the `parse` and `from_...` functions of this crate, rows of the database through
//! `from_row`.

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
mod invitation;
mod island;
mod key;
mod key_type;
mod known_key;
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
mod slots;
mod time;
mod transfer;
mod turns;
mod work_order;

pub use acceptance::{KeyAcceptance, Remedy, Verdict};
pub use approval::{Approval, ApprovalError, ApprovalTerms, Approvals, Quorum};
pub use campaign::action::{CampaignAction, TaskStep, TaskWork};
pub use campaign::plan::{CampaignSelection, Plan, PlanChain, PlannedWave, WavePlanner, WaveSize};
pub use campaign::task::{Task, TaskEnd, TaskError};
pub use campaign::terms::{CampaignName, CampaignTerms};
pub use campaign::wave::{TaskState, WaveCounts, WaveResult, WaveTally};
pub use campaign::window::{MaintenanceWindow, MaintenanceWindows, Weekdays};
pub use campaign::{Campaign, CampaignContent, CampaignError, CampaignState, WaveDecision};
pub use counter::chunk::{AllocateError, ChunkSize, Lease, LiveChunk, Reservation};
pub use counter::state::{
    CounterCap, CounterError, CounterKey, CounterOwnership, CounterScope, CounterState, CounterUse, HourlyUse,
};
pub use counter::{CounterDomain, Counters};
pub use diversification::{DiversificationContext, KeyDerivation};
pub use error::ParseError;
pub use exposure::{Exposure, ExposureReason, Party, SharedExposures};
pub use group::{BegunRotation, Group, GroupError, GroupRotation, MemberCounts, RotationStage, SwitchThreshold};
pub use history::{CounterJump, DatabaseHistory, Timeline};
pub use id::{
    CampaignId, CounterDomainId, DeviceTypeId, FlagId, GrantId, GroupId, IslandName, KeyVersionNumber, Owner,
    OwnerKind, PrincipalId, ProposalId, RequestId, Role, SecuritySetupId, SystemTitle, TransferId, WorkOrderId,
    WriterId,
};
pub use invitation::code::{CodeId, CodeSecret, EnrolmentCode, code_digest};
pub use invitation::{EnrolledDevice, Invitation, InvitationEnd, InvitationState, Occasion};
pub use island::{ClassRoots, DiversificationRoot, Island, IslandKind};
pub use key::{CounterPlace, Evidence, KeyMaterial, KeyOrigin, KeyState, KeyVersion, Transport, WrappedKey};
pub use key_type::{KeyClass, KeyLength, KeyShape, KeyType, SecuritySuite};
pub use known_key::{IndexedExposure, IndexedParty, KnownBy, KnownKey, Reach};
pub use meter::{
    DeviceProfileName, DeviceType, KeyVersionId, Meter, MeterClass, MeterStatus, check_batch, check_serial,
};
pub use principal::{
    Assurance, Enrolment, PersonName, Principal, PrincipalCertificate, PrincipalStatus, TransportCertificate,
};
pub use profile::file::ProfileError;
pub use profile::{
    ClientProfile, CounterProfile, DeviceProfile, KeyProfile, NewKeyOrigin, OnNewKey, ProfileKeyType, SetupProfile,
    Shipped,
};
pub use proposal::{
    DestroyRoot, Proposal, ProposalContent, ProposalEnd, ProposalError, ProposalState, ProposedAction, RaiseCounter,
    RecertifyPrincipal, RootKind,
};
pub use quota::{QuotaExceeded, QuotaHour, QuotaLimit, QuotaName, QuotaUse};
pub use retention::{ExpiredKeys, Retention};
pub use root::rotation::{PassPage, RootRotation, RootRotationState, RowPlace};
pub use root::{RootEntry, RootError, RootId, RootLedger, RootPurpose, RootStanding};
pub use row::RowError;
pub use seal::{FingerprintKey, Generation, RowId, RowSeal, SealError, SealKey, SealKeys, SealRootKey, row_digest};
pub use secret::EncodedSecret;
pub use shipment::{
    LONGEST_SHIPMENT_LINE, OaepHash, ShipmentDevice, ShipmentHeader, ShipmentLineError, ShipmentTrailer,
    ShippedCounter, ShippedKey,
};
pub use slot::{Confirmation, Grantable, NewKeyVersion, Slot, SlotError, Standing};
pub use slots::Slots;
pub use time::UnixMillis;
pub use transfer::error::TransferError;
pub use transfer::order::{MOST_CANDIDATES, MOST_KEK_CANDIDATES, MOST_VERSIONS, OrderedKeys, TransferOrder};
pub use transfer::state::{
    Answer, CHALLENGE, CampaignTask, ExchangePurpose, KeyPair, SharedKey, Stage, Transfer, TransferForm, TransferKey,
};
pub use transfer::{Finding, MOST_UNFIT, Next, Observation, Outcome, Step};
pub use turns::{Turns, Waiting};
pub use work_order::{
    NotOrdered, Place, PlaceSalt, WorkOrder, WorkOrderContent, WorkOrderEnd, WorkOrderError, WorkOrderState,
    WorkOrderTask, WorkOrderTasks,
};
