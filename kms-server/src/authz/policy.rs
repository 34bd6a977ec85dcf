//! Decisions of the Cedar policies (I8): default deny, and whatever fails denies.
//!
//! Decisions are made for classes of meters and remembered: a decision that is known costs about
//! 100 ns, a new one 50 µs. What changes between two calls is part of the key (the principal's
//! revision) or is checked elsewhere (time, revocation, which class a meter is of: its sealed row
//! says so).

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::{BuildHasher, Hash, RandomState};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{PoisonError, RwLock};

use aws_lc_rs::digest::{self, SHA256};
use cedar_policy::{
    Authorizer, Context, Entities, Entity, EntityId, EntityTypeName, EntityUid, PolicyId, PolicySet, Request,
    RestrictedExpression, Schema, ValidationMode, Validator,
};
use kms_domain::{DeviceType, Group, IslandName, KeyType, MeterClass, ParseError, PrincipalId, Role};
use kms_proto::v1;
use miette::Diagnostic;

use super::quota::{self, Quotas};
use crate::error::ServiceError;

/// A validated set of policies, with the decisions that it has made so far. To change policies,
/// load another one: a decision never outlives the set that made it.
pub struct Policy {
    schema: Schema,
    policies: PolicySet,
    authorizer: Authorizer,
    quotas: Quotas,
    digest: [u8; 32],
    decisions: Decisions,
}

impl Policy {
    /// The policies of a directory (every `*.cedar` file in it, and `quotas.toml`), or without one
    /// those that the server ships with.
    ///
    /// # Errors
    /// A file cannot be read, parsed, or validated strictly against the schema; the error names
    /// file, line and column. A directory without policies is refused: it is more likely a wrong
    /// path than a wish to deny everything.
    pub fn load(directory: Option<&Path>) -> Result<Self, PolicyError> {
        let shipped = || (PathBuf::from(Quotas::FILE), Quotas::SHIPPED.to_owned());
        match directory {
            Some(directory) => Self::from_files(read_directory(directory)?, quota::read(directory)?),
            None => Self::from_files(
                SHIPPED.iter().map(|(name, text)| (PathBuf::from(name), (*text).to_owned())).collect(),
                shipped(),
            ),
        }
    }

    /// The policies and the quotas of texts, each with the name that errors call it by.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn from_files(
        files: Vec<(PathBuf, String)>,
        (quotas_path, quotas_text): (PathBuf, String),
    ) -> Result<Self, PolicyError> {
        let (schema, _warnings) = Schema::from_cedarschema_str(SCHEMA)
            .map_err(|error| PolicyError::at(Path::new("meterkms.cedarschema"), SCHEMA, &error))?;
        let validator = Validator::new(schema.clone());
        let mut policies = PolicySet::new();
        let mut hash = digest::Context::new(&SHA256);
        let quotas = Quotas::parse(&quotas_text).map_err(|error| error.at(quotas_path.clone()))?;
        for (path, text) in &files {
            let parsed = PolicySet::from_str(text).map_err(|error| PolicyError::at(path, text, &error))?;
            if parsed.templates().next().is_some() {
                return Err(PolicyError::Template { path: path.clone() });
            }
            // File by file, so that an error's position is one of the file.
            if let Some(error) = validator.validate(&parsed, ValidationMode::Strict).validation_errors().next() {
                return Err(PolicyError::at(path, text, error));
            }
            for policy in parsed.policies() {
                let id = PolicyId::new(format!("{}/{}", path.display(), policy.id()));
                policies.add(policy.new_id(id)).map_err(|error| PolicyError::at(path, text, &error))?;
            }
        }
        let quotas_name = PathBuf::from(Quotas::FILE);
        for (path, text) in files.iter().chain([&(quotas_name, quotas_text)]) {
            for part in [path.to_string_lossy().as_bytes(), text.as_bytes()] {
                hash.update(&(part.len() as u64).to_be_bytes());
                hash.update(part);
            }
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(hash.finish().as_ref());
        Ok(Self { schema, policies, authorizer: Authorizer::new(), quotas, digest, decisions: Decisions::default() })
    }

    /// SHA-256 over names and texts of the policies and quotas: which set decided.
    pub const fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The quotas that what is permitted counts against.
    pub const fn quotas(&self) -> &Quotas {
        &self.quotas
    }

    /// Whether the principal may do this.
    // I8: what is not permitted, what fails to evaluate, and what does not fit the schema is
    // denied.
    pub fn permits(&self, principal: &PrincipalFacts, action: &Action, resource: &Resource<'_>) -> Decision {
        self.decisions.of(principal, action, resource, || {
            self.decide(principal, action, resource).unwrap_or_else(|error| {
                tracing::error!(%error, action = action.name(), principal = %principal.principal, "a policy decision failed, so the request is denied");
                Decision::Deny
            })
        })
    }

    /// As [`Self::permits`], as a result.
    ///
    /// # Errors
    /// Permission denied, naming the action.
    pub fn require(
        &self,
        principal: &PrincipalFacts,
        action: &Action,
        resource: &Resource<'_>,
    ) -> Result<(), ServiceError> {
        match self.permits(principal, action, resource) {
            Decision::Permit => Ok(()),
            Decision::Deny => Err(ServiceError::denied(action.to_string())),
        }
    }

    fn decide(
        &self,
        principal: &PrincipalFacts,
        action: &Action,
        resource: &Resource<'_>,
    ) -> Result<Decision, EvaluationError> {
        let island = principal.principal.island();
        let caller = principal.uid()?;
        let mut entities = vec![
            entity(uid("Island", island.as_str())?, [("name", text(island.as_str()))])?,
            principal_entity(&principal.principal)?,
        ];
        let target = match resource {
            Resource::Island => uid("Island", island.as_str())?,
            Resource::Meters(class) => {
                let target = uid("MeterClass", "class")?;
                let groups = class
                    .groups
                    .iter()
                    .map(|group| RestrictedExpression::new_long(i64::try_from(group.0).unwrap_or(i64::MAX)));
                let mut attributes = vec![
                    ("island", RestrictedExpression::new_entity_uid(uid("Island", island.as_str())?)),
                    ("manufacturer", text(class.vendor.as_str())),
                    ("device_profile", text(class.profile.as_str())),
                    ("status", text(class.status.name())),
                    ("groups", RestrictedExpression::new_set(groups)),
                ];
                if let Some(head_end) = &class.head_end {
                    attributes.push((
                        "head_end",
                        RestrictedExpression::new_entity_uid(uid("HeadEnd", &head_end.to_string())?),
                    ));
                    if *head_end != principal.principal {
                        entities.push(principal_entity(head_end)?);
                    }
                }
                entities.push(entity(target.clone(), attributes)?);
                target
            }
            Resource::Group(group) => {
                let target = uid("MeterGroup", &group.number.to_string())?;
                let attributes = [
                    ("island", RestrictedExpression::new_entity_uid(uid("Island", island.as_str())?)),
                    ("number", RestrictedExpression::new_long(i64::try_from(group.number).unwrap_or(i64::MAX))),
                    ("name", text(&group.name)),
                    ("security_suite", RestrictedExpression::new_long(i64::from(group.suite))),
                ];
                entities.push(entity(target.clone(), attributes)?);
                target
            }
            Resource::DeviceType(device_type) => {
                let target = uid("DeviceType", &device_type.name)?;
                let attributes = [
                    ("island", RestrictedExpression::new_entity_uid(uid("Island", island.as_str())?)),
                    ("name", text(&device_type.name)),
                    ("manufacturer", text(&device_type.manufacturer)),
                    ("device_profile", text(&device_type.device_profile)),
                ];
                entities.push(entity(target.clone(), attributes)?);
                target
            }
        };
        let entities = Entities::from_entities(entities, Some(&self.schema)).map_err(EvaluationError::new)?;
        let context = Context::from_pairs(action.context()).map_err(EvaluationError::new)?;
        let request = Request::new(caller, uid("Action", action.name())?, target, context, Some(&self.schema))
            .map_err(EvaluationError::new)?;
        let response = self.authorizer.is_authorized(&request, &self.policies, &entities);
        // I8: Cedar skips a policy that fails, an erroring `forbid` too. Here any failure denies.
        if let Some(error) = response.diagnostics().errors().next() {
            return Err(EvaluationError::new(error));
        }
        Ok(match response.decision() {
            cedar_policy::Decision::Allow => Decision::Permit,
            cedar_policy::Decision::Deny => Decision::Deny,
        })
    }
}

/// What the policies answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// A policy permits it and none forbids it.
    Permit,
    /// Everything else.
    Deny,
}

impl Decision {
    /// Whether it is a permit.
    pub const fn is_permit(self) -> bool {
        matches!(self, Self::Permit)
    }
}

/// What policies may know about a principal: its identity, and the revision of its sealed row. A
/// changed row makes earlier decisions about it unreachable.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PrincipalFacts {
    /// The principal.
    pub principal: PrincipalId,
    /// The generation of its sealed row.
    pub revision: u64,
}

impl PrincipalFacts {
    fn uid(&self) -> Result<EntityUid, EvaluationError> {
        uid(entity_type(self.principal.role()), &self.principal.to_string())
    }
}

/// On what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Resource<'a> {
    /// The island as a whole: the caller's own, since certificates of others do not get so far
    /// (I7).
    Island,
    /// Meters of this class.
    Meters(&'a MeterClass),
    /// A group of meters, as the owner of keys.
    Group(&'a GroupFacts),
    /// A device type, as the owner of keys.
    DeviceType(&'a DeviceTypeFacts),
}

/// What policies may know about a group of meters.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GroupFacts {
    /// The island's number for it.
    pub number: u64,
    /// Its name.
    pub name: String,
    /// The number of its members' security suite.
    pub suite: u8,
}

impl From<&Group> for GroupFacts {
    fn from(group: &Group) -> Self {
        Self { number: group.id.0, name: group.name.clone(), suite: group.suite.number() }
    }
}

/// What policies may know about a device type.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DeviceTypeFacts {
    /// Its name.
    pub name: String,
    /// The manufacturer's FLAG id.
    pub manufacturer: String,
    /// The name of its device profile.
    pub device_profile: String,
}

impl From<&DeviceType> for DeviceTypeFacts {
    fn from(device_type: &DeviceType) -> Self {
        Self {
            name: device_type.name.clone(),
            manufacturer: device_type.vendor.to_string(),
            device_profile: device_type.profile.to_string(),
        }
    }
}

/// What is asked, with what policies may know about it. The schema says which actions are on
/// meters, which on groups and device types, and which on the island; the wrong resource is denied.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// A key of one type, for a session with meters of a class.
    OpenSession {
        /// The key type.
        key_type: KeyType,
        /// What for.
        purpose: Purpose,
        /// How long the grant is wanted.
        lifetime_seconds: u32,
        /// Whether a dedicated key is asked for in the same session.
        dedicated_key: bool,
    },
    /// A key of one type of a group, for broadcasts.
    OpenGroupSession {
        /// The key type.
        key_type: KeyType,
        /// What for.
        purpose: Purpose,
        /// How long the grant is wanted.
        lifetime_seconds: u32,
        /// A version is named, which may be the one before the active one.
        named_version: bool,
    },
    /// A frame to be protected inside the HSM; once for each object that it names.
    ProtectFrame {
        /// What the plain APDU is.
        service: FrameService,
        /// The object, where the service names one.
        target: Option<CosemTarget>,
        /// What for.
        purpose: Purpose,
    },
    /// A frame of a meter to be opened inside the HSM.
    UnprotectFrame {
        /// What for.
        purpose: Purpose,
    },
    /// A new key for a meter, not its KEK.
    TransferKey {
        /// The key type.
        key_type: KeyType,
        /// Every request is ciphered in the HSM.
        in_frames: bool,
        /// Although it is in doubt which version the meter holds.
        urgent: bool,
        /// A task of a campaign.
        campaign: bool,
    },
    /// A new KEK for a meter, with the GUEK that proves it.
    TransferMasterKey {
        /// Every request is ciphered in the HSM.
        in_frames: bool,
        /// Although it is in doubt which version the meter holds.
        urgent: bool,
        /// A task of a campaign.
        campaign: bool,
    },
    /// Learning which keys a meter holds.
    ProbeKeys {
        /// A task of a campaign.
        campaign: bool,
    },
    /// Saying that a meter uses a new key, which the caller holds, instead of having it proven.
    AttestKey {
        /// The key type.
        key_type: KeyType,
    },
    /// Ending a transfer.
    WithdrawTransfer {
        /// The meter is assigned to the caller.
        own: bool,
    },
    /// One meter's state.
    ShowMeter,
    /// Assignment to a head-end.
    AssignMeters,
    /// Taking counters over.
    AdoptCounters,
    /// A counter that is raised further than the device profile's cap: proposed, and carried out.
    RaiseCounter,
    /// A version of a key that is compromised.
    ReportCompromise,
    /// Registering meters; the class is the one that they will have.
    EnrolMeters,
    /// The end of identities.
    RetireMeters,
    /// A new identity for an old one.
    ReplaceMeter,
    /// A list of meters.
    ListMeters {
        /// Only those assigned to the caller.
        own: bool,
    },
    /// All groups, and what keys they have.
    ListGroups,
    /// Version 1 of a group's key.
    CreateGroupKey {
        /// The key type.
        key_type: KeyType,
        /// The members hold it already, so it is active at once.
        held_by_meters: bool,
    },
    /// How far the rotation of a group's key is, and who is left behind.
    ShowGroupRotation,
    /// Broadcasts use the new version from then on.
    SwitchGroupKey {
        /// The key type.
        key_type: KeyType,
        /// Although fewer members have it than the group's threshold says.
        early: bool,
    },
    /// How many members must have a new version.
    SetSwitchThreshold,
    /// Putting meters into a group, or taking them out.
    ChangeGroupMembers {
        /// Putting in.
        add: bool,
    },
    /// All device types, and what keys they have.
    ListDeviceTypes,
    /// A new device type.
    AddDeviceType,
    /// Version 1 of a device type's key.
    CreateDeviceTypeKey {
        /// The key type.
        key_type: KeyType,
        /// As above.
        held_by_meters: bool,
    },
    /// Delivering a shipment.
    UploadShipment {
        /// The caller is the manufacturer whose key signs it.
        own: bool,
    },
    /// Importing a shipment.
    ImportShipment {
        /// As above.
        own: bool,
    },
    /// Shipments, their state, and the key that batch keys are encrypted to.
    ListShipments {
        /// Only the caller's own.
        own: bool,
    },
    /// Registering a principal.
    AddPrincipal {
        /// The role that it gets.
        role: Role,
    },
    /// Certifying a new TLS key.
    RenewPrincipal {
        /// The role of the principal.
        role: Role,
        /// It is the caller.
        own: bool,
    },
    /// Certifying a key of an officer or auditor by a proposal of other people: the proposal and
    /// its execution.
    RecertifyPrincipal {
        /// The role of the principal.
        role: Role,
        /// It is the caller.
        own: bool,
    },
    /// Ending one TLS certificate of a principal.
    EndCertificate {
        /// The role of the principal.
        role: Role,
        /// It is the caller.
        own: bool,
    },
    /// Certifying the caller's own transport key.
    RegisterTransportKey {
        /// The caller's role.
        role: Role,
    },
    /// Shutting a principal out.
    DisablePrincipal {
        /// The role of the principal.
        role: Role,
        /// It is the caller.
        own: bool,
    },
    /// All principals.
    ListPrincipals,
    /// Grants.
    ListGrants {
        /// Only the caller's own.
        own: bool,
    },
    /// The end of a grant.
    RevokeGrant {
        /// It is the caller's own.
        own: bool,
    },
    /// Audit records.
    ListAuditRecords,
    /// The check of all rows against the log.
    Scrub,
    /// The capability probe's table.
    CheckHsm,
    /// All objects of the tokens.
    InventoryHsm,
    /// A draft of a campaign, or a look at what it would touch.
    CreateCampaign,
    /// The approval of a campaign's content.
    ApproveCampaign,
    /// The beginning of an approved campaign.
    StartCampaign,
    /// A pause.
    PauseCampaign,
    /// The end of a pause.
    ResumeCampaign,
    /// The end of a campaign before its time.
    AbortCampaign,
    /// Campaigns, how far they are, and their reports.
    ListCampaigns,
    /// Proposals, their approvals and what became of them.
    ListProposals,
    /// The approval of a proposal's content.
    ApproveProposal,
    /// The end of a proposal, unused.
    WithdrawProposal,
    /// The act that was approved. What it does has an action of its own.
    CarryOutProposal,
    /// Roots: their versions, what uses them, and how far their rotation is.
    ListRoots,
    /// The rotation of a root to a version that was made.
    RotateRoot,
    /// The proposal to destroy a version of a root, and, once others have approved it, the
    /// destruction.
    DestroyRoot,
    /// Tasks of campaigns for meters of a class.
    LeaseTasks,
}

impl Action {
    /// The action's name in policies.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::OpenSession { .. } => "openSession",
            Self::OpenGroupSession { .. } => "openGroupSession",
            Self::ProtectFrame { .. } => "protectFrame",
            Self::UnprotectFrame { .. } => "unprotectFrame",
            Self::TransferKey { .. } => "transferKey",
            Self::TransferMasterKey { .. } => "transferMasterKey",
            Self::ProbeKeys { .. } => "probeKeys",
            Self::AttestKey { .. } => "attestKey",
            Self::WithdrawTransfer { .. } => "withdrawTransfer",
            Self::ShowMeter => "showMeter",
            Self::AssignMeters => "assignMeters",
            Self::AdoptCounters => "adoptCounters",
            Self::RaiseCounter => "raiseCounter",
            Self::ReportCompromise => "reportCompromise",
            Self::EnrolMeters => "enrolMeters",
            Self::RetireMeters => "retireMeters",
            Self::ReplaceMeter => "replaceMeter",
            Self::ListMeters { .. } => "listMeters",
            Self::ListGroups => "listGroups",
            Self::CreateGroupKey { .. } => "createGroupKey",
            Self::ShowGroupRotation => "showGroupRotation",
            Self::SwitchGroupKey { .. } => "switchGroupKey",
            Self::SetSwitchThreshold => "setSwitchThreshold",
            Self::ChangeGroupMembers { .. } => "changeGroupMembers",
            Self::ListDeviceTypes => "listDeviceTypes",
            Self::AddDeviceType => "addDeviceType",
            Self::CreateDeviceTypeKey { .. } => "createDeviceTypeKey",
            Self::UploadShipment { .. } => "uploadShipment",
            Self::ImportShipment { .. } => "importShipment",
            Self::ListShipments { .. } => "listShipments",
            Self::AddPrincipal { .. } => "addPrincipal",
            Self::RenewPrincipal { .. } => "renewPrincipal",
            Self::RecertifyPrincipal { .. } => "recertifyPrincipal",
            Self::EndCertificate { .. } => "endCertificate",
            Self::RegisterTransportKey { .. } => "registerTransportKey",
            Self::DisablePrincipal { .. } => "disablePrincipal",
            Self::ListPrincipals => "listPrincipals",
            Self::ListGrants { .. } => "listGrants",
            Self::RevokeGrant { .. } => "revokeGrant",
            Self::ListAuditRecords => "listAuditRecords",
            Self::Scrub => "scrub",
            Self::CheckHsm => "checkHsm",
            Self::InventoryHsm => "inventoryHsm",
            Self::CreateCampaign => "createCampaign",
            Self::ApproveCampaign => "approveCampaign",
            Self::StartCampaign => "startCampaign",
            Self::PauseCampaign => "pauseCampaign",
            Self::ResumeCampaign => "resumeCampaign",
            Self::AbortCampaign => "abortCampaign",
            Self::ListCampaigns => "listCampaigns",
            Self::ListProposals => "listProposals",
            Self::ApproveProposal => "approveProposal",
            Self::WithdrawProposal => "withdrawProposal",
            Self::CarryOutProposal => "carryOutProposal",
            Self::ListRoots => "listRoots",
            Self::RotateRoot => "rotateRoot",
            Self::DestroyRoot => "destroyRoot",
            Self::LeaseTasks => "leaseTasks",
        }
    }

    fn context(&self) -> Vec<(String, RestrictedExpression)> {
        let pairs = match self {
            Self::OpenSession { key_type, purpose, lifetime_seconds, dedicated_key } => vec![
                ("key_type", text(&key_type.to_string())),
                ("purpose", text(purpose.name())),
                ("lifetime_seconds", RestrictedExpression::new_long(i64::from(*lifetime_seconds))),
                ("dedicated_key", RestrictedExpression::new_bool(*dedicated_key)),
            ],
            Self::OpenGroupSession { key_type, purpose, lifetime_seconds, named_version } => vec![
                ("key_type", text(&key_type.to_string())),
                ("purpose", text(purpose.name())),
                ("lifetime_seconds", RestrictedExpression::new_long(i64::from(*lifetime_seconds))),
                ("named_version", RestrictedExpression::new_bool(*named_version)),
            ],
            Self::SwitchGroupKey { key_type, early } => {
                vec![("key_type", text(&key_type.to_string())), ("early", RestrictedExpression::new_bool(*early))]
            }
            Self::ChangeGroupMembers { add } => vec![("add", RestrictedExpression::new_bool(*add))],
            Self::CreateGroupKey { key_type, held_by_meters }
            | Self::CreateDeviceTypeKey { key_type, held_by_meters } => {
                vec![
                    ("key_type", text(&key_type.to_string())),
                    ("held_by_meters", RestrictedExpression::new_bool(*held_by_meters)),
                ]
            }
            Self::ProtectFrame { service, target, purpose } => {
                let mut pairs = vec![
                    ("service", text(service.name())),
                    ("criticality", text(Criticality::of(*service, target.as_ref()).name())),
                    ("purpose", text(purpose.name())),
                ];
                if let Some(target) = target {
                    pairs.push(("class_id", RestrictedExpression::new_long(i64::from(target.class_id))));
                    pairs.push(("obis", text(&target.obis_text())));
                    pairs.push(("member", RestrictedExpression::new_long(i64::from(target.member))));
                }
                pairs
            }
            Self::UnprotectFrame { purpose } => vec![("purpose", text(purpose.name()))],
            Self::TransferKey { key_type, in_frames, urgent, campaign } => vec![
                ("key_type", text(&key_type.to_string())),
                ("in_frames", RestrictedExpression::new_bool(*in_frames)),
                ("urgent", RestrictedExpression::new_bool(*urgent)),
                ("campaign", RestrictedExpression::new_bool(*campaign)),
            ],
            Self::TransferMasterKey { in_frames, urgent, campaign } => vec![
                ("in_frames", RestrictedExpression::new_bool(*in_frames)),
                ("urgent", RestrictedExpression::new_bool(*urgent)),
                ("campaign", RestrictedExpression::new_bool(*campaign)),
            ],
            Self::ProbeKeys { campaign } => vec![("campaign", RestrictedExpression::new_bool(*campaign))],
            Self::AttestKey { key_type } => vec![("key_type", text(&key_type.to_string()))],
            Self::AddPrincipal { role } => {
                vec![("role", text(role.name())), ("own", RestrictedExpression::new_bool(false))]
            }
            Self::RegisterTransportKey { role } => {
                vec![("role", text(role.name())), ("own", RestrictedExpression::new_bool(true))]
            }
            Self::RenewPrincipal { role, own }
            | Self::RecertifyPrincipal { role, own }
            | Self::EndCertificate { role, own }
            | Self::DisablePrincipal { role, own } => {
                vec![("role", text(role.name())), ("own", RestrictedExpression::new_bool(*own))]
            }
            Self::ListMeters { own }
            | Self::UploadShipment { own }
            | Self::ImportShipment { own }
            | Self::ListShipments { own }
            | Self::ListGrants { own }
            | Self::RevokeGrant { own }
            | Self::WithdrawTransfer { own } => vec![("own", RestrictedExpression::new_bool(*own))],
            Self::ShowMeter
            | Self::AssignMeters
            | Self::AdoptCounters
            | Self::RaiseCounter
            | Self::ReportCompromise
            | Self::EnrolMeters
            | Self::RetireMeters
            | Self::ReplaceMeter
            | Self::ListGroups
            | Self::ShowGroupRotation
            | Self::SetSwitchThreshold
            | Self::ListDeviceTypes
            | Self::AddDeviceType
            | Self::ListPrincipals
            | Self::ListAuditRecords
            | Self::Scrub
            | Self::CheckHsm
            | Self::CreateCampaign
            | Self::ApproveCampaign
            | Self::StartCampaign
            | Self::PauseCampaign
            | Self::ResumeCampaign
            | Self::AbortCampaign
            | Self::ListCampaigns
            | Self::ListProposals
            | Self::ApproveProposal
            | Self::WithdrawProposal
            | Self::CarryOutProposal
            | Self::ListRoots
            | Self::RotateRoot
            | Self::DestroyRoot
            | Self::LeaseTasks
            | Self::InventoryHsm => Vec::new(),
        };
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// What a refusal says was asked: the action, and what tells one such request from another.
impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OpenSession { key_type, purpose, lifetime_seconds, .. } => {
                write!(f, "openSession: {key_type} for {}, {lifetime_seconds} s", purpose.name())
            }
            Self::OpenGroupSession { key_type, purpose, lifetime_seconds, .. } => {
                write!(f, "openGroupSession: {key_type} for {}, {lifetime_seconds} s", purpose.name())
            }
            Self::CreateGroupKey { key_type, .. } | Self::CreateDeviceTypeKey { key_type, .. } => {
                write!(f, "{}: {key_type}", self.name())
            }
            Self::ProtectFrame { service, target, purpose } => {
                write!(f, "protectFrame: {}", service.name())?;
                if let Some(target) = target {
                    write!(f, " of class {} {} member {}", target.class_id, target.obis_text(), target.member)?;
                }
                write!(f, " for {}", purpose.name())
            }
            _ => f.write_str(self.name()),
        }
    }
}

/// What a key or frame is asked for (`meterkms.v1.Purpose`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Purpose {
    /// Reading registers, profiles and events.
    Read,
    /// Setting parameters, tariffs and clocks.
    Configure,
    /// Switching supply.
    Control,
    /// Firmware transfer and activation.
    Firmware,
    /// Work on site.
    FieldService,
}

impl Purpose {
    /// All purposes.
    pub const ALL: [Self; 5] = [Self::Read, Self::Configure, Self::Control, Self::Firmware, Self::FieldService];

    /// The purpose of a protobuf number.
    ///
    /// # Errors
    /// None given, or an unknown one.
    pub fn from_proto(number: i32) -> Result<Self, ParseError> {
        match v1::Purpose::try_from(number) {
            Ok(v1::Purpose::Read) => Ok(Self::Read),
            Ok(v1::Purpose::Configure) => Ok(Self::Configure),
            Ok(v1::Purpose::Control) => Ok(Self::Control),
            Ok(v1::Purpose::Firmware) => Ok(Self::Firmware),
            Ok(v1::Purpose::FieldService) => Ok(Self::FieldService),
            Ok(v1::Purpose::Unspecified) => Err(ParseError::new("purpose", "no purpose is given")),
            Err(_) => Err(ParseError::new("purpose", format!("`{number}` is not a purpose"))),
        }
    }

    /// The protobuf value.
    pub const fn to_proto(self) -> v1::Purpose {
        match self {
            Self::Read => v1::Purpose::Read,
            Self::Configure => v1::Purpose::Configure,
            Self::Control => v1::Purpose::Control,
            Self::Firmware => v1::Purpose::Firmware,
            Self::FieldService => v1::Purpose::FieldService,
        }
    }

    /// The name in policies.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Configure => "configure",
            Self::Control => "control",
            Self::Firmware => "firmware",
            Self::FieldService => "field-service",
        }
    }
}

/// What a plain APDU is that shall be protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FrameService {
    /// Any form of get-request.
    Get,
    /// Any form of set-request.
    Set,
    /// Any form of action-request.
    Action,
    /// InitiateRequest.
    Initiate,
    /// No APDU: f(StoC), the answer to the meter's challenge.
    HlsChallenge,
}

impl FrameService {
    /// The name in policies.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Set => "set",
            Self::Action => "action",
            Self::Initiate => "initiate",
            Self::HlsChallenge => "hls-challenge",
        }
    }
}

/// An attribute or method of a COSEM object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CosemTarget {
    /// The interface class.
    pub class_id: u16,
    /// The logical name, 6 octets.
    pub obis: [u8; 6],
    /// Attribute of get and set, method of action.
    pub member: i8,
}

impl CosemTarget {
    /// The logical name in dotted form.
    pub fn obis_text(&self) -> String {
        self.obis.map(|octet| octet.to_string()).join(".")
    }
}

/// What a frame could do to a meter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Criticality {
    /// No more than its purpose says.
    Ordinary,
    /// Switch supply, or make the meter do so later.
    SupplyControl,
    /// Change keys, certificates, passwords or access rights.
    SecuritySetup,
    /// Change the firmware.
    ImageTransfer,
}

impl Criticality {
    /// What can harm.
    pub const CRITICAL: [Self; 3] = [Self::SupplyControl, Self::SecuritySetup, Self::ImageTransfer];

    /// The criticality of a service on an object. Source: DLMS UA 1000-1 (Blue Book), interface
    /// classes. Besides the classes that switch supply themselves, those count that can run a
    /// script which does.
    pub const fn of(service: FrameService, target: Option<&CosemTarget>) -> Self {
        let Some(target) = target else { return Self::Ordinary };
        if target.class_id == 30 {
            // Data protection carries a request inside that cannot be read here, in a get-request
            // too.
            return Self::SecuritySetup;
        }
        if !matches!(service, FrameService::Set | FrameService::Action) {
            return Self::Ordinary;
        }
        match (target.class_id, target.member) {
            // reply_to_HLS_authentication: every association begins with it.
            (15, 1) if matches!(service, FrameService::Action) => Self::Ordinary,
            // Association SN and LN, security setup.
            (12 | 15 | 64, _) => Self::SecuritySetup,
            // M-Bus client, from data_send on: raw data to the child (a valve, say), and its keys.
            (72, 6..) if matches!(service, FrameService::Action) => Self::SecuritySetup,
            (18, _) => Self::ImageTransfer,
            // Script table, schedule, activity calendar, register monitor, single action schedule,
            // parameter monitor, sensor manager, arbitrator, disconnect control, limiter; account,
            // credit, charge and token gateway of prepayment.
            (9 | 10 | 20 | 21 | 22 | 65 | 67 | 68 | 70 | 71 | 111..=113 | 115, _) => Self::SupplyControl,
            _ => Self::Ordinary,
        }
    }

    /// The name in policies.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ordinary => "ordinary",
            Self::SupplyControl => "supply-control",
            Self::SecuritySetup => "security-setup",
            Self::ImageTransfer => "image-transfer",
        }
    }
}

/// Why policies cannot be used. The server does not start with them.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// A directory or file cannot be read.
    #[error("cannot read policies from `{path}`: {reason}")]
    Read {
        /// The path.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A policy is not well-formed or does not fit the schema.
    #[error("`{path}` line {line} column {column}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// From 1, in characters.
        column: usize,
        /// What is wrong.
        reason: String,
    },
    /// The quotas are not well-formed.
    #[error("`{path}` line {line}: {reason}")]
    Quotas {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A template is never linked here, so it would permit or forbid nothing.
    #[error("`{path}` has a policy template (`?principal` or `?resource`); write a policy for each case instead")]
    Template {
        /// The file.
        path: PathBuf,
    },
}

impl PolicyError {
    fn at(path: &Path, text: &str, error: &(impl Diagnostic + ?Sized)) -> Self {
        let offset = error.labels().and_then(|mut labels| labels.next()).map_or(0, |label| label.offset());
        let before = text.get(..offset).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let column = before.get(line_start..).unwrap_or_default().chars().count() + 1;
        let mut reason = error.to_string();
        if let Some(help) = error.help() {
            reason = format!("{reason}; {help}");
        }
        Self::Invalid { path: path.to_owned(), line: before.matches('\n').count() + 1, column, reason }
    }
}

/// A decision that could not be made: a denial, and a fault of a policy or of the server.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct EvaluationError(String);

impl EvaluationError {
    fn new(error: impl fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// Decisions that were made, found by a hash of the whole question and confirmed by comparing it.
/// Bounded: a full shard is emptied.
struct Decisions {
    hasher: RandomState,
    shards: [RwLock<HashMap<u64, Remembered>>; SHARDS],
}

struct Remembered {
    principal: PrincipalFacts,
    action: Action,
    resource: RememberedResource,
    decision: Decision,
}

/// A [`Resource`] of its own.
enum RememberedResource {
    Island,
    Meters(MeterClass),
    Group(GroupFacts),
    DeviceType(DeviceTypeFacts),
}

impl RememberedResource {
    fn of(resource: &Resource<'_>) -> Self {
        match *resource {
            Resource::Island => Self::Island,
            Resource::Meters(class) => Self::Meters(class.clone()),
            Resource::Group(group) => Self::Group(group.clone()),
            Resource::DeviceType(device_type) => Self::DeviceType(device_type.clone()),
        }
    }

    fn is(&self, resource: &Resource<'_>) -> bool {
        match (self, resource) {
            (Self::Island, Resource::Island) => true,
            (Self::Meters(known), Resource::Meters(class)) => known == *class,
            (Self::Group(known), Resource::Group(group)) => known == *group,
            (Self::DeviceType(known), Resource::DeviceType(device_type)) => known == *device_type,
            _ => false,
        }
    }
}

impl Default for Decisions {
    fn default() -> Self {
        Self { hasher: RandomState::new(), shards: std::array::from_fn(|_| RwLock::default()) }
    }
}

impl Decisions {
    fn of(
        &self,
        principal: &PrincipalFacts,
        action: &Action,
        resource: &Resource<'_>,
        decide: impl FnOnce() -> Decision,
    ) -> Decision {
        let hash = self.hasher.hash_one((principal, action, resource));
        let Some(shard) = self.shards.get(hash as usize % SHARDS) else { return decide() };
        if let Some(known) = shard.read().unwrap_or_else(PoisonError::into_inner).get(&hash)
            && known.resource.is(resource)
            && known.action == *action
            && known.principal == *principal
        {
            return known.decision;
        }
        let decision = decide();
        let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
        if shard.len() >= DECISIONS_PER_SHARD {
            shard.clear();
        }
        shard.insert(
            hash,
            Remembered {
                principal: principal.clone(),
                action: action.clone(),
                resource: RememberedResource::of(resource),
                decision,
            },
        );
        decision
    }
}

fn read_directory(directory: &Path) -> Result<Vec<(PathBuf, String)>, PolicyError> {
    let refuse =
        |path: &Path, error: std::io::Error| PolicyError::Read { path: path.to_owned(), reason: error.to_string() };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(|error| refuse(directory, error))? {
        let path = entry.map_err(|error| refuse(directory, error))?.path();
        if path.extension().is_some_and(|extension| extension == "cedar") {
            let text = std::fs::read_to_string(&path).map_err(|error| refuse(&path, error))?;
            files.push((PathBuf::from(path.file_name().unwrap_or_default()), text));
        }
    }
    if files.is_empty() {
        return Err(PolicyError::Read { path: directory.to_owned(), reason: "it holds no `*.cedar` file".to_owned() });
    }
    files.sort();
    Ok(files)
}

fn principal_entity(principal: &PrincipalId) -> Result<Entity, EvaluationError> {
    let island: &IslandName = principal.island();
    entity(
        uid(entity_type(principal.role()), &principal.to_string())?,
        [
            ("name", text(principal.name())),
            ("island", RestrictedExpression::new_entity_uid(uid("Island", island.as_str())?)),
        ],
    )
}

const fn entity_type(role: Role) -> &'static str {
    match role {
        Role::HeadEnd => "HeadEnd",
        Role::Officer => "Officer",
        Role::Auditor => "Auditor",
        Role::Handheld => "Handheld",
        Role::Manufacturer => "Manufacturer",
    }
}

fn entity(
    uid: EntityUid,
    attributes: impl IntoIterator<Item = (&'static str, RestrictedExpression)>,
) -> Result<Entity, EvaluationError> {
    let attributes = attributes.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Entity::new(uid, attributes, HashSet::new()).map_err(EvaluationError::new)
}

fn uid(entity_type: &str, id: &str) -> Result<EntityUid, EvaluationError> {
    let name = EntityTypeName::from_str(entity_type).map_err(EvaluationError::new)?;
    Ok(EntityUid::from_type_name_and_id(name, EntityId::new(id)))
}

fn text(value: &str) -> RestrictedExpression {
    RestrictedExpression::new_string(value.to_owned())
}

const SHARDS: usize = 16;
/// 16 × 1,024 decisions of about 500 octets: 8 MB at most.
const DECISIONS_PER_SHARD: usize = 1_024;

const SCHEMA: &str = include_str!("../../../policies/meterkms.cedarschema");
const SHIPPED: [(&str, &str); 7] = [
    ("auditors.cedar", include_str!("../../../policies/auditors.cedar")),
    ("everyone.cedar", include_str!("../../../policies/everyone.cedar")),
    ("groups.cedar", include_str!("../../../policies/groups.cedar")),
    ("guards.cedar", include_str!("../../../policies/guards.cedar")),
    ("head-ends.cedar", include_str!("../../../policies/head-ends.cedar")),
    ("manufacturers.cedar", include_str!("../../../policies/manufacturers.cedar")),
    ("officers.cedar", include_str!("../../../policies/officers.cedar")),
];

#[cfg(test)]
mod tests {
    use kms_domain::{DeviceProfileName, FlagId, GroupId, MeterStatus};

    use super::*;

    fn facts(role: Role, name: &str) -> PrincipalFacts {
        PrincipalFacts {
            principal: PrincipalId::new(IslandName::parse("north").unwrap(), role, name).unwrap(),
            revision: 1,
        }
    }

    fn class(status: MeterStatus, head_end: Option<&str>) -> MeterClass {
        MeterClass {
            vendor: FlagId::parse("KAM").unwrap(),
            profile: DeviceProfileName::parse("generic-suite0").unwrap(),
            status,
            groups: vec![GroupId(7)],
            head_end: head_end.map(|name| facts(Role::HeadEnd, name).principal),
        }
    }

    fn session(key_type: KeyType, purpose: Purpose, lifetime_seconds: u32) -> Action {
        Action::OpenSession { key_type, purpose, lifetime_seconds, dedicated_key: false }
    }

    fn from_text(text: &str) -> Result<Policy, PolicyError> {
        Policy::from_files(
            vec![("site.cedar".into(), text.to_owned())],
            (Quotas::FILE.into(), Quotas::SHIPPED.to_owned()),
        )
    }

    fn frame(service: FrameService, class_id: u16, member: i8, purpose: Purpose) -> Action {
        Action::ProtectFrame {
            service,
            target: Some(CosemTarget { class_id, obis: [0, 0, 96, 3, 10, 255], member }),
            purpose,
        }
    }

    #[test]
    fn the_shipped_policies_decide_as_documented() {
        use Decision::{Deny, Permit};
        let policy = Policy::load(None).unwrap();
        let hes = facts(Role::HeadEnd, "hes-1");
        let (officer, auditor, handheld, vendor) = (
            facts(Role::Officer, "ada"),
            facts(Role::Auditor, "bo"),
            facts(Role::Handheld, "hh-1"),
            facts(Role::Manufacturer, "kam"),
        );
        let own = class(MeterStatus::InService, Some("hes-1"));
        let foreign = class(MeterStatus::InService, Some("hes-2"));
        let unassigned = class(MeterStatus::InService, None);
        let stock = class(MeterStatus::InStock, Some("hes-1"));
        let quarantined = class(MeterStatus::Quarantined, Some("hes-1"));
        let retired = class(MeterStatus::Retired, Some("hes-1"));
        let read = |key_type| session(key_type, Purpose::Read, 900);
        let meters = [
            (&hes, read(KeyType::GUEK), &own, Permit),
            (&hes, read(KeyType::GAK), &own, Permit),
            (&hes, read(KeyType::DEDICATED), &own, Permit),
            (&hes, session(KeyType::GUEK, Purpose::Control, 3_600), &own, Permit),
            (&hes, session(KeyType::GUEK, Purpose::Read, 3_601), &own, Deny),
            (&hes, session(KeyType::GUEK, Purpose::FieldService, 900), &own, Deny),
            (&hes, read(KeyType::KEK), &own, Deny),
            (&hes, read(KeyType::GBEK), &own, Deny),
            (&hes, read(KeyType::LLS_SECRET), &own, Deny),
            (&hes, read(KeyType::GUEK), &foreign, Deny),
            (&hes, read(KeyType::GUEK), &unassigned, Deny),
            (&hes, read(KeyType::GUEK), &stock, Deny),
            (&hes, read(KeyType::GUEK), &quarantined, Deny),
            (&hes, read(KeyType::GUEK), &retired, Deny),
            (&officer, read(KeyType::GUEK), &own, Deny),
            (&auditor, read(KeyType::GUEK), &own, Deny),
            (&handheld, read(KeyType::GUEK), &own, Deny),
            (&vendor, read(KeyType::GUEK), &own, Deny),
            (&hes, frame(FrameService::Get, 3, 2, Purpose::Read), &own, Permit),
            (&hes, frame(FrameService::Get, 70, 2, Purpose::Read), &own, Permit),
            (&hes, frame(FrameService::Get, 3, 2, Purpose::Read), &foreign, Deny),
            (&hes, frame(FrameService::Action, 15, 1, Purpose::Read), &own, Permit),
            (&hes, frame(FrameService::Set, 8, 2, Purpose::Read), &own, Deny),
            (&hes, frame(FrameService::Set, 8, 2, Purpose::Configure), &own, Permit),
            (&hes, frame(FrameService::Action, 70, 1, Purpose::Configure), &own, Deny),
            (&hes, frame(FrameService::Action, 70, 1, Purpose::Control), &own, Permit),
            (&hes, frame(FrameService::Action, 70, 1, Purpose::Control), &stock, Deny),
            (&hes, frame(FrameService::Set, 22, 4, Purpose::Configure), &own, Deny),
            (&hes, frame(FrameService::Action, 64, 2, Purpose::Control), &own, Deny),
            (&hes, frame(FrameService::Action, 64, 2, Purpose::Configure), &own, Permit),
            (&hes, frame(FrameService::Action, 18, 1, Purpose::Configure), &own, Deny),
            (&hes, frame(FrameService::Action, 18, 1, Purpose::Firmware), &own, Permit),
            (&officer, frame(FrameService::Get, 3, 2, Purpose::Read), &own, Deny),
            (
                &hes,
                Action::ProtectFrame { service: FrameService::HlsChallenge, target: None, purpose: Purpose::Read },
                &own,
                Permit,
            ),
            (
                &hes,
                Action::ProtectFrame { service: FrameService::Set, target: None, purpose: Purpose::Read },
                &own,
                Deny,
            ),
            (&hes, Action::UnprotectFrame { purpose: Purpose::Read }, &own, Permit),
            (&hes, Action::UnprotectFrame { purpose: Purpose::Read }, &foreign, Deny),
            (&hes, Action::ShowMeter, &own, Permit),
            (&hes, Action::ShowMeter, &foreign, Deny),
            (&hes, Action::AssignMeters, &own, Deny),
            (&officer, Action::AssignMeters, &unassigned, Permit),
            (&officer, Action::RetireMeters, &own, Permit),
            (&auditor, Action::ShowMeter, &own, Permit),
            (&auditor, Action::RetireMeters, &own, Deny),
            (&handheld, Action::ShowMeter, &own, Deny),
        ];
        for (principal, action, class, expected) in meters {
            assert_eq!(
                policy.permits(principal, &action, &Resource::Meters(class)),
                expected,
                "{} {action} {class:?}",
                principal.principal
            );
        }
        let island = [
            (&hes, Action::ListMeters { own: true }, Permit),
            (&hes, Action::ListMeters { own: false }, Deny),
            (&hes, Action::ListGrants { own: true }, Permit),
            (&hes, Action::ListAuditRecords, Deny),
            (&hes, Action::AddPrincipal { role: Role::HeadEnd }, Deny),
            (&hes, Action::RenewPrincipal { role: Role::HeadEnd, own: true }, Permit),
            (&hes, Action::RenewPrincipal { role: Role::Officer, own: false }, Deny),
            (&hes, Action::RegisterTransportKey { role: Role::HeadEnd }, Permit),
            (&handheld, Action::RegisterTransportKey { role: Role::Handheld }, Permit),
            (&handheld, Action::ListMeters { own: true }, Deny),
            (&officer, Action::AddPrincipal { role: Role::Officer }, Permit),
            // I6: a person's key is renewed by the person.
            (&officer, Action::RenewPrincipal { role: Role::Officer, own: true }, Permit),
            (&officer, Action::RenewPrincipal { role: Role::Officer, own: false }, Deny),
            (&officer, Action::RenewPrincipal { role: Role::Auditor, own: false }, Deny),
            (&officer, Action::RenewPrincipal { role: Role::HeadEnd, own: false }, Permit),
            (&officer, Action::RecertifyPrincipal { role: Role::Officer, own: false }, Permit),
            (&auditor, Action::RecertifyPrincipal { role: Role::Officer, own: false }, Deny),
            (&officer, Action::EndCertificate { role: Role::HeadEnd, own: false }, Permit),
            (&hes, Action::EndCertificate { role: Role::HeadEnd, own: false }, Deny),
            (&officer, Action::DisablePrincipal { role: Role::HeadEnd, own: false }, Permit),
            (&officer, Action::InventoryHsm, Permit),
            (&auditor, Action::Scrub, Permit),
            (&auditor, Action::AddPrincipal { role: Role::Auditor }, Deny),
            (&auditor, Action::ImportShipment { own: false }, Deny),
            (&vendor, Action::UploadShipment { own: true }, Permit),
            (&vendor, Action::UploadShipment { own: false }, Deny),
            (&vendor, Action::ImportShipment { own: true }, Deny),
            // The resource must fit the action.
            (&officer, Action::ShowMeter, Deny),
        ];
        for (principal, action, expected) in island {
            assert_eq!(
                policy.permits(principal, &action, &Resource::Island),
                expected,
                "{} {action:?}",
                principal.principal
            );
        }
    }

    #[test]
    fn i8_a_forbid_that_fails_denies_although_a_permit_stands_beside_it() {
        let permit = r#"permit (principal is HeadEnd, action == Action::"openSession", resource);"#;
        // Strict validation cannot see an overflow.
        let forbid = r#"forbid (principal, action == Action::"openSession", resource) when { context.lifetime_seconds * 9223372036854775807 > 0 };"#;
        let load = |text: &str| from_text(text).unwrap();
        let own = class(MeterStatus::InService, Some("hes-1"));
        let (principal, action, resource) =
            (facts(Role::HeadEnd, "hes-1"), session(KeyType::GUEK, Purpose::Read, 900), Resource::Meters(&own));
        assert_eq!(load(permit).permits(&principal, &action, &resource), Decision::Permit);
        let both = load(&format!("{permit}\n{forbid}"));
        assert_eq!(both.permits(&principal, &action, &resource), Decision::Deny);
        // Remembered as a denial too.
        assert_eq!(both.permits(&principal, &action, &resource), Decision::Deny);
    }

    #[test]
    fn a_mistake_is_reported_with_file_line_and_column() {
        let mistakes = [
            ("permit (principal, action, resource)\nwhen { resource.statuss == \"x\" };", 2, 8),
            ("\n\npermit (principal, action == Action::\"openSesion\", resource);", 3, 30),
            ("permit (principal, action, resource) when {", 1, 44),
            (
                "permit (principal, action == Action::\"openSession\", resource)\nwhen { context.lifetime_seconds <= \"1\" };",
                2,
                36,
            ),
        ];
        for (text, line, column) in mistakes {
            match from_text(text) {
                Err(PolicyError::Invalid { path, line: found_line, column: found_column, reason }) => {
                    assert_eq!(
                        (path.as_path(), found_line, found_column),
                        (Path::new("site.cedar"), line, column),
                        "{reason}"
                    );
                }
                other => panic!("{text}: {:?}", other.err()),
            }
        }
    }

    #[test]
    fn a_directory_replaces_the_shipped_policies() {
        let directory = tempfile::tempdir().unwrap();
        assert!(
            matches!(Policy::load(Some(directory.path())), Err(PolicyError::Read { .. })),
            "an empty directory is refused"
        );
        std::fs::write(
            directory.path().join("a.cedar"),
            "permit (principal is Auditor, action == Action::\"scrub\", resource);",
        )
        .unwrap();
        let policy = Policy::load(Some(directory.path())).unwrap();
        assert!(policy.permits(&facts(Role::Auditor, "bo"), &Action::Scrub, &Resource::Island).is_permit());
        assert!(!policy.permits(&facts(Role::Officer, "ada"), &Action::Scrub, &Resource::Island).is_permit());
        assert_ne!(policy.digest(), Policy::load(None).unwrap().digest());
        // A folder may have quotas of its own.
        std::fs::write(
            directory.path().join(Quotas::FILE),
            Quotas::SHIPPED.replace("commands = 200,", "commands = 300,"),
        )
        .unwrap();
        assert_ne!(Policy::load(Some(directory.path())).unwrap().digest(), policy.digest());
        std::fs::write(directory.path().join(Quotas::FILE), "\nquota = 7").unwrap();
        assert!(matches!(Policy::load(Some(directory.path())), Err(PolicyError::Quotas { line: 2, .. })));
        std::fs::remove_file(directory.path().join(Quotas::FILE)).unwrap();
        std::fs::write(directory.path().join("b.cedar"), "permit (principal == ?principal, action, resource);")
            .unwrap();
        assert!(matches!(Policy::load(Some(directory.path())), Err(PolicyError::Template { .. })));
    }

    #[test]
    fn keys_of_groups_and_device_types_are_decided_on_by_themselves() {
        use Decision::{Deny, Permit};
        let shipped = Policy::load(None).unwrap();
        let group = GroupFacts { number: 7, name: "north".to_owned(), suite: 0 };
        let other = GroupFacts { number: 8, ..group.clone() };
        let device_type = DeviceTypeFacts {
            name: "meter-1".to_owned(),
            manufacturer: "KAM".to_owned(),
            device_profile: "gateway-suite0".to_owned(),
        };
        let broadcast = |key_type, purpose, lifetime_seconds| Action::OpenGroupSession {
            key_type,
            purpose,
            lifetime_seconds,
            named_version: false,
        };
        let create = Action::CreateGroupKey { key_type: KeyType::GBEK, held_by_meters: false };
        let create_firmware = Action::CreateDeviceTypeKey { key_type: KeyType::FIRMWARE, held_by_meters: true };
        let (hes, officer, auditor) =
            (facts(Role::HeadEnd, "hes-1"), facts(Role::Officer, "ada"), facts(Role::Auditor, "bo"));
        // I8: nobody gets a group's key as shipped, also not for a meter of the group.
        for principal in [&hes, &officer, &auditor] {
            assert_eq!(
                shipped.permits(principal, &broadcast(KeyType::GBEK, Purpose::Read, 900), &Resource::Group(&group)),
                Deny
            );
        }
        assert_eq!(shipped.permits(&officer, &create, &Resource::Group(&group)), Permit);
        assert_eq!(shipped.permits(&officer, &create, &Resource::Island), Deny, "the wrong resource");
        assert_eq!(shipped.permits(&officer, &create_firmware, &Resource::DeviceType(&device_type)), Permit);
        assert_eq!(shipped.permits(&officer, &Action::AddDeviceType, &Resource::DeviceType(&device_type)), Permit);
        for principal in [&hes, &auditor] {
            assert_eq!(shipped.permits(principal, &create, &Resource::Group(&group)), Deny);
            assert_eq!(shipped.permits(principal, &create_firmware, &Resource::DeviceType(&device_type)), Deny);
        }
        assert_eq!(shipped.permits(&auditor, &Action::ListGroups, &Resource::Island), Permit);

        // One head-end, one group; and the guards hold whatever else is permitted.
        let mut files: Vec<_> = SHIPPED.iter().map(|(name, text)| (PathBuf::from(name), (*text).to_owned())).collect();
        let all = "permit (principal, action == Action::\"openGroupSession\", resource == MeterGroup::\"7\");";
        files.push((PathBuf::from("site.cedar"), all.to_owned()));
        let policy = Policy::from_files(files, (Quotas::FILE.into(), Quotas::SHIPPED.to_owned())).unwrap();
        let of = |principal: &PrincipalFacts, key_type, lifetime, group| {
            policy.permits(principal, &broadcast(key_type, Purpose::Configure, lifetime), &Resource::Group(group))
        };
        assert_eq!(of(&hes, KeyType::GBEK, 900, &group), Permit);
        assert_eq!(of(&hes, KeyType::GBEK, 900, &other), Deny);
        assert_eq!(of(&hes, KeyType::KEK, 900, &group), Deny);
        assert_eq!(of(&hes, KeyType::GBEK, 86_401, &group), Deny);
        assert_eq!(of(&officer, KeyType::GBEK, 900, &group), Deny);
    }

    #[test]
    fn every_shipped_file_is_embedded() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../policies");
        let embedded: Vec<_> = SHIPPED.iter().map(|(name, text)| (PathBuf::from(name), (*text).to_owned())).collect();
        assert_eq!(read_directory(&directory).unwrap(), embedded);
    }

    #[test]
    fn what_can_harm_is_told_by_class_and_member() {
        use Criticality::{ImageTransfer, Ordinary, SecuritySetup, SupplyControl};
        let of = |service, class_id, member| {
            Criticality::of(service, Some(&CosemTarget { class_id, obis: [0, 0, 96, 3, 0, 255], member }))
        };
        for (class_id, member, expected) in [
            (70, 1, SupplyControl),
            (64, 2, SecuritySetup),
            (18, 4, ImageTransfer),
            (9, 1, SupplyControl),
            (72, 7, SecuritySetup),
        ] {
            assert_eq!(of(FrameService::Action, class_id, member), expected, "{class_id}");
        }
        for (class_id, member) in [(15, 1), (3, 1), (72, 1)] {
            assert_eq!(of(FrameService::Action, class_id, member), Ordinary, "{class_id}");
        }
        assert_eq!(of(FrameService::Set, 71, 3), SupplyControl);
        assert_eq!(of(FrameService::Get, 70, 2), Ordinary);
        assert_eq!(of(FrameService::Get, 30, 2), SecuritySetup);
    }

    #[test]
    fn remembered_decisions_are_told_apart_and_bounded() {
        let policy = Policy::load(None).unwrap();
        let own = class(MeterStatus::InService, Some("hes-1"));
        for lifetime in 0..40 {
            for _ in 0..2 {
                let expected = if lifetime <= 30 { Decision::Permit } else { Decision::Deny };
                let action = session(KeyType::GUEK, Purpose::Read, lifetime * 120);
                assert_eq!(policy.permits(&facts(Role::HeadEnd, "hes-1"), &action, &Resource::Meters(&own)), expected);
            }
        }
        let decisions = Decisions::default();
        for revision in 0..40_000 {
            let principal = PrincipalFacts { revision, ..facts(Role::Officer, "ada") };
            decisions.of(&principal, &Action::Scrub, &Resource::Island, || Decision::Deny);
        }
        let remembered: usize = decisions.shards.iter().map(|shard| shard.read().unwrap().len()).sum();
        assert!(remembered <= SHARDS * DECISIONS_PER_SHARD, "{remembered}");
    }
}
