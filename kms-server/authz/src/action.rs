//! What callers can ask policy for. The table below has each action once, and the server knows no
//! other. A test of `kms-policy` compares it with the schema, the shipped policies and their
//! documentation.

use std::fmt;

use kms_domain::{KeyType, ParseError, PersonName, Role, WorkOrderTasks};
use kms_proto::v1;

use crate::criticality::Criticality;
use crate::frame::{CosemTarget, FrameService};

/// The kind of resource that an action is on.
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

/// One attribute of an action's context: what policies know of the action besides its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attribute {
    /// A Cedar `String`.
    Text(String),
    /// A Cedar `Long`.
    Number(i64),
    /// A Cedar `Bool`.
    Bool(bool),
    /// A Cedar `Set<String>`.
    Texts(Vec<String>),
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
        /// What is asked for, with what policies may know about it. The schema says which actions
        /// are on meters, which on groups and device types, and which on the island. The wrong
        /// resource is denied.
        #[derive(Clone, Debug, PartialEq, Eq, Hash)]
        pub enum Action {
            $( $(#[$doc])* $variant $({ $( $(#[$field_doc])* $field: $type, )* })?, )*
        }

        impl Action {
            /// The name of each action in policies, and its kind of resource.
            pub const ALL: &[(&str, ResourceKind)] = &[$( ($name, ResourceKind::$resource), )*];

            /// The action's name in policies.
            pub const fn name(&self) -> &'static str {
                match self {
                    $( Self::$variant { .. } => $name, )*
                }
            }

            /// Its kind of resource.
            pub const fn resource(&self) -> ResourceKind {
                match self {
                    $( Self::$variant { .. } => ResourceKind::$resource, )*
                }
            }

            /// Its attributes, by the names of the schema.
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
        /// The purpose.
        purpose: Purpose,
        /// The requested lifetime of the grant.
        lifetime_seconds: u32,
        /// The same session also asks for a dedicated key.
        dedicated_key: bool,
    }
    /// A key of one type of a group, for broadcasts.
    OpenGroupSession = "openGroupSession" on Group {
        /// The key type.
        key_type: KeyType,
        /// The purpose.
        purpose: Purpose,
        /// The requested lifetime of the grant.
        lifetime_seconds: u32,
        /// A version is named, which may be the one before the active one.
        named_version: bool,
    }
    /// A frame to be protected inside the HSM. Asked once for each object that the frame names.
    ProtectFrame = "protectFrame" on Meters {
        /// The service of the plain APDU.
        service: FrameService,
        /// The object, if the service names one.
        target: Option<CosemTarget>,
        /// The purpose.
        purpose: Purpose,
    }
    /// A frame of a meter to be opened inside the HSM.
    UnprotectFrame = "unprotectFrame" on Meters {
        /// The purpose.
        purpose: Purpose,
    }
    /// A new key for a meter, not its KEK.
    TransferKey = "transferKey" on Meters {
        /// The key type.
        key_type: KeyType,
        /// Every request is ciphered in the HSM.
        in_frames: bool,
        /// Even if it is in doubt which version the meter holds.
        urgent: bool,
        /// It is a task of a campaign.
        campaign: bool,
    }
    /// A new KEK for a meter, with the GUEK that proves it.
    TransferMasterKey = "transferMasterKey" on Meters {
        /// Every request is ciphered in the HSM.
        in_frames: bool,
        /// Even if it is in doubt which version the meter holds.
        urgent: bool,
        /// It is a task of a campaign.
        campaign: bool,
    }
    /// Finding out which keys a meter holds.
    ProbeKeys = "probeKeys" on Meters {
        /// It is a task of a campaign.
        campaign: bool,
    }
    /// Declaring, without a proof, that a meter uses a new key that the caller holds.
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
    /// Taking over counters from another system.
    AdoptCounters = "adoptCounters" on Meters
    /// Raising a counter beyond the device profile's cap: the proposal, and its execution.
    RaiseCounter = "raiseCounter" on Meters
    /// Reporting that a key version is compromised.
    ReportCompromise = "reportCompromise" on Meters
    /// Registering meters. The resource is the class that they will have.
    EnrolMeters = "enrolMeters" on Meters
    /// Retiring meters: their identities end.
    RetireMeters = "retireMeters" on Meters
    /// Replacing a meter by another one, with a new identity.
    ReplaceMeter = "replaceMeter" on Meters
    /// A list of meters.
    ListMeters = "listMeters" on Island {
        /// Only those assigned to the caller.
        own: bool,
    }
    /// All groups and their keys.
    ListGroups = "listGroups" on Island
    /// Version 1 of a group's key.
    CreateGroupKey = "createGroupKey" on Group {
        /// The key type.
        key_type: KeyType,
        /// The members hold it already, so it is active at once.
        held_by_meters: bool,
    }
    /// The progress of the rotation of a group's key, and the members that lack the new version.
    ShowGroupRotation = "showGroupRotation" on Group
    /// Switching a group's key: from then on broadcasts use the new version.
    SwitchGroupKey = "switchGroupKey" on Group {
        /// The key type.
        key_type: KeyType,
        /// Even if fewer members have it than the group's threshold requires.
        early: bool,
    }
    /// Setting how many members must have a new version before the switch.
    SetSwitchThreshold = "setSwitchThreshold" on Group
    /// Putting meters into a group, or taking them out.
    ChangeGroupMembers = "changeGroupMembers" on Group {
        /// Meters are added.
        add: bool,
    }
    /// All device types and their keys.
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
    /// Certifying a key of an officer or auditor by a proposal of other people: the proposal, and
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
    /// Disabling a principal.
    DisablePrincipal = "disablePrincipal" on Island {
        /// The role of the principal.
        role: Role,
        /// It is the caller.
        own: bool,
    }
    /// All principals.
    ListPrincipals = "listPrincipals" on Island
    /// Inviting a device to be enrolled as a handheld, and the enrolment with that invitation.
    InviteHandheld = "inviteHandheld" on Island
    /// Handing a handheld over to another technician: its keys end, and it is invited again.
    HandOverHandheld = "handOverHandheld" on Island
    /// Withdrawing the invitation of a handheld.
    WithdrawInvitation = "withdrawInvitation" on Island
    /// All handhelds and their invitations.
    ListHandhelds = "listHandhelds" on Island
    /// Grants.
    ListGrants = "listGrants" on Island {
        /// Only the caller's own.
        own: bool,
    }
    /// Revoking a grant.
    RevokeGrant = "revokeGrant" on Island {
        /// It is the caller's own.
        own: bool,
    }
    /// Who could know which keys.
    ListExposures = "listExposures" on Island
    /// Audit records.
    ListAuditRecords = "listAuditRecords" on Island
    /// The check of all rows against the log.
    Scrub = "scrub" on Island
    /// The capability probe's table.
    CheckHsm = "checkHsm" on Island
    /// All objects of the tokens.
    InventoryHsm = "inventoryHsm" on Island
    /// Drafting a campaign, or a preview of its meters.
    CreateCampaign = "createCampaign" on Island
    /// The approval of a campaign's content.
    ApproveCampaign = "approveCampaign" on Island
    /// Starting an approved campaign.
    StartCampaign = "startCampaign" on Island
    /// A pause.
    PauseCampaign = "pauseCampaign" on Island
    /// The end of a pause.
    ResumeCampaign = "resumeCampaign" on Island
    /// Aborting a campaign.
    AbortCampaign = "abortCampaign" on Island
    /// Campaigns, their progress and their reports.
    ListCampaigns = "listCampaigns" on Island
    /// Proposals, their approvals and their results.
    ListProposals = "listProposals" on Island
    /// The approval of a proposal's content.
    ApproveProposal = "approveProposal" on Island
    /// Withdrawing a proposal.
    WithdrawProposal = "withdrawProposal" on Island
    /// Executing an approved proposal. What it does has an action of its own.
    CarryOutProposal = "carryOutProposal" on Island
    /// Roots: their versions, their use, and the progress of their rotation.
    ListRoots = "listRoots" on Island
    /// Rotating a root to a version that was made.
    RotateRoot = "rotateRoot" on Island
    /// Destroying a version of a root: the proposal, and its execution.
    DestroyRoot = "destroyRoot" on Island
    /// Tasks of campaigns for meters of a class.
    LeaseTasks = "leaseTasks" on Meters
    /// Work at meters of a class, in a new work order or in a changed one.
    CreateWorkOrder = "createWorkOrder" on Meters {
        /// What is to be done.
        tasks: WorkOrderTasks,
        /// Who does it.
        technician: PersonName,
        /// The time of the order, begun hours.
        hours: u32,
    }
    /// Changing a work order. `createWorkOrder` is asked too, for the new content.
    ChangeWorkOrder = "changeWorkOrder" on Island {
        /// The caller made it.
        own: bool,
    }
    /// Cancelling a work order.
    CancelWorkOrder = "cancelWorkOrder" on Island {
        /// The caller made it.
        own: bool,
    }
    /// Saying that the work of an order was done.
    CompleteWorkOrder = "completeWorkOrder" on Island {
        /// The caller made it.
        own: bool,
        /// The caller is the handheld of its technician.
        assigned: bool,
    }
    /// One work order.
    ShowWorkOrder = "showWorkOrder" on Island {
        /// The caller made it.
        own: bool,
        /// The caller is the handheld of its technician.
        assigned: bool,
        /// With its place.
        place: bool,
    }
    /// A list of work orders, without their meters and places.
    ListWorkOrders = "listWorkOrders" on Island {
        /// Only those that the caller made.
        own: bool,
        /// Only those of the technician whose handheld the caller is.
        assigned: bool,
    }
}

impl Action {
    /// Whether decisions about it are remembered for later acts. Callers choose the name, the hours
    /// and the tasks of a work order freely: such decisions would take the places of all others.
    pub const fn is_remembered(&self) -> bool {
        !matches!(self, Self::CreateWorkOrder { .. })
    }

    /// Attributes that follow from the others.
    fn put_implied(&self, to: &mut Vec<(&'static str, Attribute)>) {
        match self {
            Self::ProtectFrame { service, target, .. } => {
                Criticality::of(*service, target.as_ref()).name().put("criticality", to);
            }
            // A caller never adds itself, and registers only its own transport key.
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

/// Folded, as the code compares names: a policy holds for every way to write one.
impl Attributes for PersonName {
    fn put(&self, name: &'static str, to: &mut Vec<(&'static str, Attribute)>) {
        self.folded().as_str().put(name, to);
    }
}

impl Attributes for WorkOrderTasks {
    fn put(&self, name: &'static str, to: &mut Vec<(&'static str, Attribute)>) {
        to.push((name, Attribute::Texts(self.names())));
    }
}

impl Attributes for FrameService {
    fn put(&self, name: &'static str, to: &mut Vec<(&'static str, Attribute)>) {
        self.name().put(name, to);
    }
}

/// The attributes of the object. Without an object there are none.
impl Attributes for Option<CosemTarget> {
    fn put(&self, _: &'static str, to: &mut Vec<(&'static str, Attribute)>) {
        if let Some(target) = self {
            u32::from(target.class_id).put("class_id", to);
            target.obis_text().as_str().put("obis", to);
            to.push(("member", Attribute::Number(i64::from(target.member))));
        }
    }
}

/// What a refusal names: the action, and what distinguishes this request from others.
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

/// The reason for which keys or frames are requested (`meterkms.v1.Purpose`).
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
    /// No purpose, or an unknown one.
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
