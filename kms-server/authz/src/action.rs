//! What callers can ask for, each once: the table below is all that the server knows of actions. A
//! test of `kms-policy` compares it with the schema, with the shipped policies and with their
//! documentation.

use std::fmt;

use kms_domain::{KeyType, ParseError, Role};
use kms_proto::v1;

use crate::criticality::Criticality;

/// On what an action is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResourceKind {
    /// The island as a whole.
    Island,
    /// A class of meters.
    Meters,
    /// A group of meters, as the owner of keys.
    Group,
    /// A device type, as the owner of keys.
    DeviceType,
}

/// What policies know of an action besides its name: one attribute of its context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attribute {
    /// A Cedar `String`.
    Text(String),
    /// A Cedar `Long`.
    Number(i64),
    /// A Cedar `Bool`.
    Bool(bool),
}

/// A field of an action, as attributes of its context.
trait Attributes {
    fn put(&self, name: &'static str, to: &mut Vec<(&'static str, Attribute)>);
}

macro_rules! actions {
    ($(
        $(#[$doc:meta])*
        $variant:ident = $name:literal on $resource:ident $({ $( $(#[$field_doc:meta])* $field:ident: $type:ty, )* })?
    )*) => {
        /// What is asked, with what policies may know about it. The schema says which actions are
        /// on meters, which on groups and device types, and which on the island; the wrong resource
        /// is denied.
        #[derive(Clone, Debug, PartialEq, Eq, Hash)]
        pub enum Action {
            $( $(#[$doc])* $variant $({ $( $(#[$field_doc])* $field: $type, )* })?, )*
        }

        impl Action {
            /// The name of each action in policies, and on what it is.
            pub const ALL: &[(&str, ResourceKind)] = &[$( ($name, ResourceKind::$resource), )*];

            /// The action's name in policies.
            pub const fn name(&self) -> &'static str {
                match self {
                    $( Self::$variant { .. } => $name, )*
                }
            }

            /// On what it is.
            pub const fn resource(&self) -> ResourceKind {
                match self {
                    $( Self::$variant { .. } => ResourceKind::$resource, )*
                }
            }

            /// What policies know of it, by the names of the schema.
            pub fn attributes(&self) -> Vec<(&'static str, Attribute)> {
                let mut attributes = Vec::new();
                match self {
                    $( Self::$variant $({ $( $field, )* })? => { $($( $field.put(stringify!($field), &mut attributes); )*)? } )*
                }
                self.put_implied(&mut attributes);
                attributes
            }
        }
    };
}

actions! {
    /// A key of one type, for a session with meters of a class.
    OpenSession = "openSession" on Meters {
        /// The key type.
        key_type: KeyType,
        /// What for.
        purpose: Purpose,
        /// How long the grant is wanted.
        lifetime_seconds: u32,
        /// Whether a dedicated key is asked for in the same session.
        dedicated_key: bool,
    }
    /// A key of one type of a group, for broadcasts.
    OpenGroupSession = "openGroupSession" on Group {
        /// The key type.
        key_type: KeyType,
        /// What for.
        purpose: Purpose,
        /// How long the grant is wanted.
        lifetime_seconds: u32,
        /// A version is named, which may be the one before the active one.
        named_version: bool,
    }
    /// A frame to be protected inside the HSM; once for each object that it names.
    ProtectFrame = "protectFrame" on Meters {
        /// What the plain APDU is.
        service: FrameService,
        /// The object, where the service names one.
        target: Option<CosemTarget>,
        /// What for.
        purpose: Purpose,
    }
    /// A frame of a meter to be opened inside the HSM.
    UnprotectFrame = "unprotectFrame" on Meters {
        /// What for.
        purpose: Purpose,
    }
    /// A new key for a meter, not its KEK.
    TransferKey = "transferKey" on Meters {
        /// The key type.
        key_type: KeyType,
        /// Every request is ciphered in the HSM.
        in_frames: bool,
        /// Although it is in doubt which version the meter holds.
        urgent: bool,
        /// A task of a campaign.
        campaign: bool,
    }
    /// A new KEK for a meter, with the GUEK that proves it.
    TransferMasterKey = "transferMasterKey" on Meters {
        /// Every request is ciphered in the HSM.
        in_frames: bool,
        /// Although it is in doubt which version the meter holds.
        urgent: bool,
        /// A task of a campaign.
        campaign: bool,
    }
    /// Learning which keys a meter holds.
    ProbeKeys = "probeKeys" on Meters {
        /// A task of a campaign.
        campaign: bool,
    }
    /// Saying that a meter uses a new key, which the caller holds, instead of having it proven.
    AttestKey = "attestKey" on Meters {
        /// The key type.
        key_type: KeyType,
    }
    /// Ending a transfer.
    WithdrawTransfer = "withdrawTransfer" on Meters {
        /// The meter is assigned to the caller.
        own: bool,
    }
    /// One meter's state.
    ShowMeter = "showMeter" on Meters
    /// Assignment to a head-end.
    AssignMeters = "assignMeters" on Meters
    /// Taking counters over.
    AdoptCounters = "adoptCounters" on Meters
    /// A counter that is raised further than the device profile's cap: proposed, and executed.
    RaiseCounter = "raiseCounter" on Meters
    /// A version of a key that is compromised.
    ReportCompromise = "reportCompromise" on Meters
    /// Registering meters; the class is the one that they will have.
    EnrolMeters = "enrolMeters" on Meters
    /// The end of identities.
    RetireMeters = "retireMeters" on Meters
    /// A new identity for an old one.
    ReplaceMeter = "replaceMeter" on Meters
    /// A list of meters.
    ListMeters = "listMeters" on Island {
        /// Only those assigned to the caller.
        own: bool,
    }
    /// All groups, and what keys they have.
    ListGroups = "listGroups" on Island
    /// Version 1 of a group's key.
    CreateGroupKey = "createGroupKey" on Group {
        /// The key type.
        key_type: KeyType,
        /// The members hold it already, so it is active at once.
        held_by_meters: bool,
    }
    /// How far the rotation of a group's key is, and who is left behind.
    ShowGroupRotation = "showGroupRotation" on Group
    /// Broadcasts use the new version from then on.
    SwitchGroupKey = "switchGroupKey" on Group {
        /// The key type.
        key_type: KeyType,
        /// Although fewer members have it than the group's threshold says.
        early: bool,
    }
    /// How many members must have a new version.
    SetSwitchThreshold = "setSwitchThreshold" on Group
    /// Putting meters into a group, or taking them out.
    ChangeGroupMembers = "changeGroupMembers" on Group {
        /// Putting in.
        add: bool,
    }
    /// All device types, and what keys they have.
    ListDeviceTypes = "listDeviceTypes" on Island
    /// A new device type.
    AddDeviceType = "addDeviceType" on DeviceType
    /// Version 1 of a device type's key.
    CreateDeviceTypeKey = "createDeviceTypeKey" on DeviceType {
        /// The key type.
        key_type: KeyType,
        /// As above.
        held_by_meters: bool,
    }
    /// Delivering a shipment.
    UploadShipment = "uploadShipment" on Island {
        /// The caller is the manufacturer whose key signs it.
        own: bool,
    }
    /// Importing a shipment.
    ImportShipment = "importShipment" on Island {
        /// As above.
        own: bool,
    }
    /// Shipments, their state, and the key that batch keys are encrypted to.
    ListShipments = "listShipments" on Island {
        /// Only the caller's own.
        own: bool,
    }
    /// Registering a principal.
    AddPrincipal = "addPrincipal" on Island {
        /// The role that it gets.
        role: Role,
    }
    /// Certifying a new TLS key.
    RenewPrincipal = "renewPrincipal" on Island {
        /// The role of the principal.
        role: Role,
        /// It is the caller.
        own: bool,
    }
    /// Certifying a key of an officer or auditor by a proposal of other people: the proposal and
    /// its execution.
    RecertifyPrincipal = "recertifyPrincipal" on Island {
        /// The role of the principal.
        role: Role,
        /// It is the caller.
        own: bool,
    }
    /// Ending one TLS certificate of a principal.
    EndCertificate = "endCertificate" on Island {
        /// The role of the principal.
        role: Role,
        /// It is the caller.
        own: bool,
    }
    /// Certifying the caller's own transport key.
    RegisterTransportKey = "registerTransportKey" on Island {
        /// The caller's role.
        role: Role,
    }
    /// Shutting a principal out.
    DisablePrincipal = "disablePrincipal" on Island {
        /// The role of the principal.
        role: Role,
        /// It is the caller.
        own: bool,
    }
    /// All principals.
    ListPrincipals = "listPrincipals" on Island
    /// Grants.
    ListGrants = "listGrants" on Island {
        /// Only the caller's own.
        own: bool,
    }
    /// The end of a grant.
    RevokeGrant = "revokeGrant" on Island {
        /// It is the caller's own.
        own: bool,
    }
    /// Audit records.
    ListAuditRecords = "listAuditRecords" on Island
    /// The check of all rows against the log.
    Scrub = "scrub" on Island
    /// The capability probe's table.
    CheckHsm = "checkHsm" on Island
    /// All objects of the tokens.
    InventoryHsm = "inventoryHsm" on Island
    /// A draft of a campaign, or a look at what it would touch.
    CreateCampaign = "createCampaign" on Island
    /// The approval of a campaign's content.
    ApproveCampaign = "approveCampaign" on Island
    /// The beginning of an approved campaign.
    StartCampaign = "startCampaign" on Island
    /// A pause.
    PauseCampaign = "pauseCampaign" on Island
    /// The end of a pause.
    ResumeCampaign = "resumeCampaign" on Island
    /// The end of a campaign before its time.
    AbortCampaign = "abortCampaign" on Island
    /// Campaigns, how far they are, and their reports.
    ListCampaigns = "listCampaigns" on Island
    /// Proposals, their approvals and what became of them.
    ListProposals = "listProposals" on Island
    /// The approval of a proposal's content.
    ApproveProposal = "approveProposal" on Island
    /// The end of a proposal, unused.
    WithdrawProposal = "withdrawProposal" on Island
    /// The act that was approved. What it does has an action of its own.
    CarryOutProposal = "carryOutProposal" on Island
    /// Roots: their versions, what uses them, and how far their rotation is.
    ListRoots = "listRoots" on Island
    /// The rotation of a root to a version that was made.
    RotateRoot = "rotateRoot" on Island
    /// The proposal to destroy a version of a root, and, once others have approved it, the
    /// destruction.
    DestroyRoot = "destroyRoot" on Island
    /// Tasks of campaigns for meters of a class.
    LeaseTasks = "leaseTasks" on Meters
}

impl Action {
    /// What follows from the rest.
    fn put_implied(&self, to: &mut Vec<(&'static str, Attribute)>) {
        match self {
            Self::ProtectFrame { service, target, .. } => {
                Criticality::of(*service, target.as_ref()).name().put("criticality", to);
            }
            // Nobody adds themselves, and the transport key that is registered is the caller's own.
            Self::AddPrincipal { .. } => false.put("own", to),
            Self::RegisterTransportKey { .. } => true.put("own", to),
            _ => {}
        }
    }
}

impl Attributes for bool {
    fn put(&self, name: &'static str, to: &mut Vec<(&'static str, Attribute)>) {
        to.push((name, Attribute::Bool(*self)));
    }
}

impl Attributes for u32 {
    fn put(&self, name: &'static str, to: &mut Vec<(&'static str, Attribute)>) {
        to.push((name, Attribute::Number(i64::from(*self))));
    }
}

impl Attributes for str {
    fn put(&self, name: &'static str, to: &mut Vec<(&'static str, Attribute)>) {
        to.push((name, Attribute::Text(self.to_owned())));
    }
}

impl Attributes for KeyType {
    fn put(&self, name: &'static str, to: &mut Vec<(&'static str, Attribute)>) {
        self.to_string().as_str().put(name, to);
    }
}

impl Attributes for Role {
    fn put(&self, name: &'static str, to: &mut Vec<(&'static str, Attribute)>) {
        self.name().put(name, to);
    }
}

impl Attributes for Purpose {
    fn put(&self, name: &'static str, to: &mut Vec<(&'static str, Attribute)>) {
        self.name().put(name, to);
    }
}

impl Attributes for FrameService {
    fn put(&self, name: &'static str, to: &mut Vec<(&'static str, Attribute)>) {
        self.name().put(name, to);
    }
}

/// An object has attributes of its own; where the service names none, there are none.
impl Attributes for Option<CosemTarget> {
    fn put(&self, _: &'static str, to: &mut Vec<(&'static str, Attribute)>) {
        if let Some(target) = self {
            u32::from(target.class_id).put("class_id", to);
            target.obis_text().as_str().put("obis", to);
            to.push(("member", Attribute::Number(i64::from(target.member))));
        }
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
