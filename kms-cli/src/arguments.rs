//! The command line. Every value is parsed here, before anything goes to the network.

mod campaign;
mod proposal;
mod roots;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, builder::NonEmptyStringValueParser};
use kms_client::{GrantId, KeyType, PrincipalId, SecuritySetupId, SystemTitle};
use kms_domain::{DeviceProfileName, FlagId, OaepHash, Quorum};
use kms_proto::v1::Purpose;

pub(crate) use self::{
    campaign::{ActionArguments, CampaignCommand, CreateCampaign, SelectionArguments, TermsArguments},
    proposal::ProposalCommand,
    roots::RootsCommand,
};
use crate::output::Format;

/// Manages smart meter keys: for security officers, auditors and field technicians. Every issue of
/// keys is audited.
#[derive(Debug, Parser)]
#[command(name = "kms", version, after_help = AFTER_HELP, max_term_width = 120)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: GlobalArguments,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Options for every command")]
pub(crate) struct GlobalArguments {
    /// Folder that contains the client profiles
    #[arg(long, global = true, value_name = "DIR", default_value = ".kms", env = "KMS_STATE")]
    pub(crate) state: PathBuf,
    /// Client profile to use [default: the name in DIR/default-profile]
    #[arg(long, global = true, value_name = "NAME", env = "KMS_PROFILE", value_parser = profile_name)]
    pub(crate) profile: Option<String>,
    /// Output format
    #[arg(long, global = true, value_name = "FORMAT", default_value = "table")]
    pub(crate) output: Format,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Get the keys of a meter for a session, or of a group for broadcasts
    #[command(subcommand)]
    Session(SessionCommand),
    /// Meters: identity, assignment, keys and counters
    #[command(subcommand)]
    Meter(MeterCommand),
    /// Groups of meters: their broadcast keys
    #[command(subcommand)]
    Group(GroupCommand),
    /// Device types: their firmware keys
    #[command(subcommand)]
    DeviceType(DeviceTypeCommand),
    /// Vendor shipments: import, watch, or make one for a trial
    #[command(subcommand)]
    Shipment(ShipmentCommand),
    /// Head-ends, officers, auditors, handhelds and manufacturers
    #[command(subcommand)]
    Principal(PrincipalCommand),
    /// Rotate keys of many meters: plan, approve, start, watch, report
    #[command(subcommand)]
    Campaign(CampaignCommand),
    /// Four-eyes approvals: list, approve, execute or withdraw pending proposals
    #[command(subcommand)]
    Proposal(ProposalCommand),
    /// The island's own root keys: versions, what uses them, rotation
    #[command(subcommand)]
    Roots(RootsCommand),
    /// Grants: who was issued which keys
    #[command(subcommand)]
    Grant(GrantCommand),
    /// The audit log
    #[command(subcommand)]
    Audit(AuditCommand),
    /// The HSM tokens of the server
    #[command(subcommand)]
    Hsm(HsmCommand),
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  kms completions bash > ~/.local/share/bash-completion/completions/kms")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum SessionCommand {
    /// Open a session with a meter: keys, and a lease of invocation counters
    #[command(
        after_help = "The keys are opened with the profile's transport key. They are never shown: --write-keys puts them into a file that only you can read.\n\n\
The shipped policies give keys to head-ends only, for meters that are assigned to them and in service.\n\n\
        Examples:\n  kms --profile head-end session open 4B414D0000000001 --client-title 4D4D4D0000000001\n  \
        kms --profile head-end session open 4B414D0000000001 --client-title 4D4D4D0000000001 --counters 500\n  \
        kms --profile head-end session open 4B414D0000000001 --write-keys session.json"
    )]
    Open(OpenSession),
    /// Get the keys of a group of meters for broadcasts, and a lease of invocation counters
    #[command(
        after_help = "A broadcast reaches every meter of the group, so policies name the head-ends that may have its keys, group by group. The shipped policies name none.\n\n\
        Example:\n  kms --profile head-end session open-group north --client-title 4D4D4D0000000001"
    )]
    OpenGroup(OpenGroupSession),
}

#[derive(Args, Debug)]
pub(crate) struct OpenSession {
    /// System title of the meter, 16 hex digits
    #[arg(value_name = "METER", value_parser = system_title)]
    pub(crate) meter: SystemTitle,
    /// Add a fresh dedicated key for the association
    #[arg(long)]
    pub(crate) dedicated_key: bool,
    #[command(flatten)]
    pub(crate) terms: Terms,
}

#[derive(Args, Debug)]
pub(crate) struct OpenGroupSession {
    /// Name of the group
    #[arg(value_name = "GROUP", value_parser = group_name)]
    pub(crate) group: String,
    /// Version of the GBEK [default: the active one]. The version before it is for members that a
    /// rotation has left behind
    #[arg(long = "key-version", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) key_version: Option<u32>,
    #[command(flatten)]
    pub(crate) terms: Terms,
}

/// What is requested.
#[derive(Args, Debug)]
pub(crate) struct Terms {
    /// Purpose of the keys
    #[arg(long, default_value = "read")]
    pub(crate) purpose: PurposeName,
    /// Client system title of the session, 16 hex digits. Without one no counters are allocated
    #[arg(long, value_name = "HEX", value_parser = system_title)]
    pub(crate) client_title: Option<SystemTitle>,
    /// Key types [default: GUEK,GAK of a meter, GBEK of a group]
    #[arg(long, value_name = "TYPES", value_delimiter = ',', value_parser = KeyType::parse)]
    pub(crate) key_types: Vec<KeyType>,
    /// Number of invocation counters, 1 to 1,000,000 [default: 1000]
    #[arg(long, value_name = "N", requires = "client_title", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) counters: Option<u32>,
    /// Lifetime of the grant in seconds [default: 900]; policy caps it
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) lifetime: Option<u32>,
    /// Security setup, 0.b.43.0.e.255 [default: the meter's first]
    #[arg(long, value_name = "OBIS", value_parser = SecuritySetupId::parse)]
    pub(crate) security_setup: Option<SecuritySetupId>,
    /// Write the keys into a new file (JSON, mode 0600)
    #[arg(long, value_name = "FILE")]
    pub(crate) write_keys: Option<PathBuf>,
    /// Accept envelopes with algorithm 2, which is not for production
    #[arg(long)]
    pub(crate) allow_cbc_expand: bool,
}

/// What a key is granted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PurposeName {
    Read,
    Configure,
    Control,
    Firmware,
    FieldService,
}

impl From<PurposeName> for Purpose {
    fn from(name: PurposeName) -> Self {
        match name {
            PurposeName::Read => Self::Read,
            PurposeName::Configure => Self::Configure,
            PurposeName::Control => Self::Control,
            PurposeName::Firmware => Self::Firmware,
            PurposeName::FieldService => Self::FieldService,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum MeterCommand {
    /// List meters
    #[command(
        visible_alias = "ls",
        after_help = "Example:\n  kms meter list --manufacturer KAM --status in-service --limit 20"
    )]
    List {
        #[command(flatten)]
        filter: MeterFilter,
        #[command(flatten)]
        limit: Limit,
    },
    /// Show a meter: keys, versions, counters, and who could know a key. Never key octets
    #[command(after_help = "Example:\n  kms meter show 4B414D0000000001")]
    Show {
        /// System title, 16 hex digits
        #[arg(value_name = "METER", value_parser = system_title)]
        meter: SystemTitle,
    },
    /// Assign meters to a head-end, or unassign them
    #[command(
        after_help = "With a filter instead of a list it only counts the meters, until you add --yes.\n\nExamples:\n  \
        kms meter assign 4B414D0000000001 4B414D0000000002 --head-end urn:meterkms:dev:head-end:hes-1\n  \
        kms meter assign --batch KAM-2026-0041 --head-end urn:meterkms:dev:head-end:hes-1 --yes\n  \
        kms meter assign 4B414D0000000001 --to-nobody"
    )]
    Assign(AssignMeters),
    /// Take invocation counters over, or leave a client title with the head-end that counts it
    /// today
    #[command(
        after_help = "Examples:\n  kms meter adopt 4B414D0000000001 --client-title 4D4D4D0000000001 --floor 120000\n  kms meter adopt --file floors.jsonl\n\n\
        A line of the file: {\"meter\":\"4B414D0000000001\",\"client_title\":\"4D4D4D0000000001\",\"floor\":120000}\n\
        and optionally \"security_setup\":\"0.0.43.0.0.255\", \"owned_by\":\"urn:meterkms:dev:head-end:hes-1\"."
    )]
    Adopt(AdoptCounters),
    /// Propose to raise an invocation counter beyond the device profile's cap, where a meter is
    /// truly ahead
    #[command(
        after_help = "Read the counter at the meter first: what is skipped is lost, and a counter is never lowered. Another person approves it \
        (kms proposal approve), then an officer executes it (kms proposal carry-out).\n\n\
        Example:\n  kms meter raise-counter 4B414D0000000001 --client-title 4D4D4D0000000001 --to 3000000001 --reason \"read at the meter, ticket 4714\""
    )]
    RaiseCounter(RaiseCounter),
    /// Mark a key version as compromised: it is never granted again
    #[command(
        after_help = "If it is the active version, nothing of the key is granted until a new one is proven: rotate it. What left wrapped under a KEK is \
        exposed with it.\n\n\
        Example:\n  kms meter compromise 4B414D0000000001 --key-type GUEK --key-version 1 --reason \"found in a log, ticket 4715\" --yes"
    )]
    Compromise(CompromiseKey),
    /// Enrol meters whose keys this system makes
    #[command(
        after_help = "Examples:\n  kms meter enrol 4B414D00000F0001 --serial 10001001 --manufacturer KAM --device-profile generic-suite0 --batch lab\n  \
        kms meter enrol --file meters.jsonl --manufacturer KAM --device-profile generic-suite0 --batch lab\n\n\
        A line of the file: {\"meter\":\"4B414D00000F0001\",\"serial\":\"10001001\"} and optionally \"groups\":[\"north\"]."
    )]
    Enrol(EnrolMeters),
    /// End the identity of meters: their keys are not granted any more
    #[command(after_help = "Example:\n  kms meter retire 4B414D0000000001 --reason \"scrapped, ticket 4711\" --yes")]
    Retire {
        /// System titles, 16 hex digits each
        #[arg(value_name = "METER", required = true, value_parser = system_title)]
        meters: Vec<SystemTitle>,
        #[command(flatten)]
        why: Reason,
        #[command(flatten)]
        sure: Sure,
    },
    /// Retire a meter and replace it by another at the same place
    #[command(
        after_help = "Example:\n  kms meter replace 4B414D0000000001 4B414D0000000002 --reason \"lightning, ticket 4712\" --yes"
    )]
    Replace {
        /// System title of the meter that is removed
        #[arg(value_name = "OLD", value_parser = system_title)]
        old_meter: SystemTitle,
        /// System title of the meter that replaces it
        #[arg(value_name = "NEW", value_parser = system_title)]
        new_meter: SystemTitle,
        #[command(flatten)]
        why: Reason,
        #[command(flatten)]
        sure: Sure,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum GroupCommand {
    /// List groups. A group is created when a shipment or an enrolment names it
    #[command(visible_alias = "ls", after_help = "Example:\n  kms group list")]
    List {
        #[command(flatten)]
        limit: Limit,
    },
    /// Show a group: keys, versions, counters, who could know a key, and which version its members
    /// have. Never key octets
    #[command(after_help = "Example:\n  kms group show north")]
    Show {
        /// Name of the group
        #[arg(value_name = "GROUP", value_parser = group_name)]
        group: String,
    },
    /// Show the progress of the rotation of a group's key, and the members that are left behind
    #[command(
        after_help = "A campaign begins the rotation: kms campaign create NAME --rotate GBEK --group GROUP. When enough members have acknowledged the new version, broadcasts \
        may switch to it: kms group switch.\n\nExamples:\n  kms group rotation north\n  kms group rotation north --behind"
    )]
    Rotation {
        #[command(flatten)]
        key: GroupKeyName,
        /// List the members that have not acknowledged the new version
        #[arg(long)]
        behind: bool,
        #[command(flatten)]
        limit: Limit,
    },
    /// Switch broadcasts to the new version of a group's key
    #[command(
        after_help = "From then on the new version is issued. The former one is issued too, by --key-version, until every member has the new one: send each broadcast \
        under both if members that are left behind shall hear it.\n\nExamples:\n  kms group switch north --to 2\n  kms group switch north --to 2 --early --reason \"version 1 is stolen\""
    )]
    Switch {
        #[command(flatten)]
        key: GroupKeyName,
        /// Version that is being rolled out
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        to: u32,
        /// Switch although fewer members have the version than the group's threshold says
        #[arg(long, requires = "reason")]
        early: bool,
        /// Reason, for the audit record
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        #[command(flatten)]
        sure: Sure,
    },
    /// Set how many members must have a new version before broadcasts may switch to it
    #[command(after_help = "Example:\n  kms group set north --switch-at 98")]
    Set {
        /// Name of the group
        #[arg(value_name = "GROUP", value_parser = group_name)]
        group: String,
        /// Percentage of the members in stock and in service
        #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=100))]
        switch_at: u32,
    },
    /// Add meters to a group. They get its key by a transfer
    #[command(after_help = "Example:\n  kms group add-members north --meter 4B414D0000000001")]
    AddMembers {
        #[command(flatten)]
        members: Members,
    },
    /// Remove meters from a group. Its keys are then exposed, and must be rotated
    #[command(
        after_help = "A meter that has left may keep the key that it holds. The ledger says so, and `kms group show` asks for a rotation.\n\n\
        Example:\n  kms group remove-members north --meter 4B414D0000000001 --compromised --reason \"case opened\" --yes"
    )]
    RemoveMembers {
        #[command(flatten)]
        members: Members,
        /// The meters are compromised
        #[arg(long)]
        compromised: bool,
        #[command(flatten)]
        why: Reason,
        #[command(flatten)]
        sure: Sure,
    },
    /// Keys of groups
    #[command(subcommand)]
    Key(GroupKeyCommand),
}

/// A key of a group.
#[derive(Args, Debug)]
pub(crate) struct GroupKeyName {
    /// Name of the group
    #[arg(value_name = "GROUP", value_parser = group_name)]
    pub(crate) group: String,
    /// Key type
    #[arg(long = "type", value_name = "TYPE", default_value = "GBEK", value_parser = KeyType::parse)]
    pub(crate) key_type: KeyType,
    /// Security setup, 0.b.43.0.e.255 [default: the first that the group has the key in]
    #[arg(long, value_name = "OBIS", value_parser = SecuritySetupId::parse)]
    pub(crate) security_setup: Option<SecuritySetupId>,
}

/// Meters and a group.
#[derive(Args, Debug)]
pub(crate) struct Members {
    /// Name of the group
    #[arg(value_name = "GROUP", value_parser = group_name)]
    pub(crate) group: String,
    /// A meter, 16 hex digits; may be repeated
    #[arg(long = "meter", value_name = "METER", value_parser = system_title, required_unless_present = "meters_file")]
    pub(crate) meters: Vec<SystemTitle>,
    /// File with meters, one system title a line
    #[arg(long, value_name = "FILE")]
    pub(crate) meters_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum GroupKeyCommand {
    /// Make version 1 of a group's key, as the device profile of its members says
    #[command(
        after_help = "The new key is pre-active, and granted to nobody, until its members hold it: a rotation delivers it to them. With --held-by-meters it \
        is active at once and can be granted: use this if the members hold the key, or if someone who is granted the key installs it on site.\n\nExamples:\n  \
        kms group key create north --type GBEK\n  kms group key create north --type GBEK --held-by-meters"
    )]
    Create {
        /// Name of the group
        #[arg(value_name = "GROUP", value_parser = group_name)]
        group: String,
        #[command(flatten)]
        key: NewKey,
        /// Device profile that says how the key is made [default: all profiles that give groups
        /// this key, which must agree]
        #[arg(long, value_name = "NAME", value_parser = DeviceProfileName::parse)]
        device_profile: Option<DeviceProfileName>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum DeviceTypeCommand {
    /// List device types
    #[command(visible_alias = "ls", after_help = "Example:\n  kms device-type list")]
    List,
    /// Show a device type: keys, versions, and who could know a key. Never key octets
    #[command(after_help = "Example:\n  kms device-type show kam-gateway-3")]
    Show {
        /// Name of the device type
        #[arg(value_name = "NAME", value_parser = group_name)]
        device_type: String,
    },
    /// Add a device type
    #[command(
        after_help = "Example:\n  kms device-type add kam-gateway-3 --manufacturer KAM --device-profile gateway-suite0"
    )]
    Add {
        /// Name of the device type: 1 to 64 of a-z, 0-9 and `-`
        #[arg(value_name = "NAME", value_parser = group_name)]
        device_type: String,
        /// FLAG id, three letters
        #[arg(long, value_name = "FLAG", value_parser = FlagId::parse)]
        manufacturer: FlagId,
        /// Device profile of its meters
        #[arg(long, value_name = "NAME", value_parser = DeviceProfileName::parse)]
        device_profile: DeviceProfileName,
    },
    /// Keys of device types
    #[command(subcommand)]
    Key(DeviceTypeKeyCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum DeviceTypeKeyCommand {
    /// Make version 1 of a device type's key, as its device profile says
    #[command(after_help = "Example:\n  kms device-type key create kam-gateway-3 --type FIRMWARE")]
    Create {
        /// Name of the device type
        #[arg(value_name = "NAME", value_parser = group_name)]
        device_type: String,
        #[command(flatten)]
        key: NewKey,
    },
}

/// A key to be made.
#[derive(Args, Debug)]
pub(crate) struct NewKey {
    /// Key type, such as GBEK or FIRMWARE, or one that the device profile names
    #[arg(long = "type", value_name = "TYPE", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) key_type: String,
    /// Security setup of the meters, 0.b.43.0.e.255
    #[arg(long, value_name = "OBIS", default_value = "0.0.43.0.0.255", value_parser = SecuritySetupId::parse)]
    pub(crate) setup: SecuritySetupId,
    /// The meters hold the key already: make it active at once
    #[arg(long)]
    pub(crate) held_by_meters: bool,
}

#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "Filter")]
pub(crate) struct MeterFilter {
    /// FLAG id, three letters
    #[arg(long, value_name = "FLAG", value_parser = FlagId::parse)]
    pub(crate) manufacturer: Option<FlagId>,
    /// Device profile
    #[arg(long, value_name = "NAME", value_parser = device_profile_name)]
    pub(crate) device_profile: Option<DeviceProfileName>,
    /// Status, for example in-service
    #[arg(long)]
    pub(crate) status: Option<String>,
    /// Assigned to this head-end (principal URI)
    #[arg(long = "assigned-to", value_name = "URN", value_parser = PrincipalId::parse)]
    pub(crate) assigned_to: Option<PrincipalId>,
    /// Not assigned
    #[arg(long, conflicts_with = "assigned_to")]
    pub(crate) unassigned: bool,
    /// From this shipment or enrolment
    #[arg(long, value_name = "NAME")]
    pub(crate) batch: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Limit {
    /// Show at most this number; 0 shows all
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) limit: usize,
}

#[derive(Args, Debug)]
pub(crate) struct RaiseCounter {
    /// System title, 16 hex digits
    #[arg(value_name = "METER", value_parser = system_title)]
    pub(crate) meter: SystemTitle,
    /// Client system title of the counter, 16 hex digits
    #[arg(long, value_name = "HEX", value_parser = system_title)]
    pub(crate) client_title: SystemTitle,
    /// Lowest counter that may be used afterwards: one above the last that the meter accepted
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) to: u32,
    /// Encryption key: GUEK, or GBEK
    #[arg(long, value_name = "TYPE", default_value = "GUEK", value_parser = KeyType::parse)]
    pub(crate) key_type: KeyType,
    /// Version of the key [default: the one that the meter holds, as far as is known]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) key_version: Option<u32>,
    /// Security setup, 0.b.43.0.e.255 [default: the first that has the key]
    #[arg(long, value_name = "OBIS", value_parser = SecuritySetupId::parse)]
    pub(crate) security_setup: Option<SecuritySetupId>,
    /// Number of other people who must approve, 1 to 9
    #[arg(long, value_name = "N", default_value = "1", value_parser = self::campaign::quorum)]
    pub(crate) quorum: Quorum,
    #[command(flatten)]
    pub(crate) why: Reason,
}

#[derive(Args, Debug)]
pub(crate) struct CompromiseKey {
    /// System title, 16 hex digits
    #[arg(value_name = "METER", value_parser = system_title)]
    pub(crate) meter: SystemTitle,
    /// Key type
    #[arg(long, value_name = "TYPE", value_parser = KeyType::parse)]
    pub(crate) key_type: KeyType,
    /// Version of the key
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) key_version: u32,
    /// Security setup, 0.b.43.0.e.255 [default: the first that has the key]
    #[arg(long, value_name = "OBIS", value_parser = SecuritySetupId::parse)]
    pub(crate) security_setup: Option<SecuritySetupId>,
    /// Who knows the key: vendor, anyone, or a principal URI
    #[arg(long, value_name = "WHO", default_value = "anyone", value_parser = self::campaign::party)]
    pub(crate) known_to: String,
    #[command(flatten)]
    pub(crate) why: Reason,
    #[command(flatten)]
    pub(crate) sure: Sure,
}

#[derive(Args, Debug)]
pub(crate) struct Reason {
    /// Reason, for the audit record
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) reason: String,
}

#[derive(Args, Debug)]
pub(crate) struct Sure {
    /// Do not ask for confirmation
    #[arg(long)]
    pub(crate) yes: bool,
}

#[derive(Args, Debug)]
pub(crate) struct AssignMeters {
    /// System titles, 16 hex digits each
    #[arg(value_name = "METER", value_parser = system_title)]
    pub(crate) meters: Vec<SystemTitle>,
    /// Head-end (principal URI)
    #[arg(long, value_name = "URN", required_unless_present = "to_nobody", value_parser = PrincipalId::parse)]
    pub(crate) head_end: Option<PrincipalId>,
    /// Unassign the meters
    #[arg(long, conflicts_with = "head_end")]
    pub(crate) to_nobody: bool,
    /// Only count the meters
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) sure: Sure,
    #[command(flatten)]
    pub(crate) filter: MeterFilter,
}

#[derive(Args, Debug)]
pub(crate) struct AdoptCounters {
    /// System title of the meter, 16 hex digits
    #[arg(value_name = "METER", required_unless_present = "file", requires_all = ["client_title", "floor"], value_parser = system_title)]
    pub(crate) meter: Option<SystemTitle>,
    /// Client system title, 16 hex digits
    #[arg(long, value_name = "HEX", value_parser = system_title)]
    pub(crate) client_title: Option<SystemTitle>,
    /// Lowest counter that may be used next
    #[arg(long, value_name = "N")]
    pub(crate) floor: Option<u32>,
    /// Security setup, 0.b.43.0.e.255
    #[arg(long, value_name = "OBIS", default_value = "0.0.43.0.0.255", value_parser = SecuritySetupId::parse)]
    pub(crate) security_setup: SecuritySetupId,
    /// Head-end that continues to count (principal URI) [default: none, this system counts from now
    /// on]
    #[arg(long, value_name = "URN", value_parser = PrincipalId::parse)]
    pub(crate) owned_by: Option<PrincipalId>,
    /// File with many entries: JSON Lines
    #[arg(long, value_name = "FILE", conflicts_with_all = ["meter", "client_title", "floor", "owned_by"])]
    pub(crate) file: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct EnrolMeters {
    /// System title of the meter, 16 hex digits
    #[arg(value_name = "METER", required_unless_present = "file", requires = "serial", value_parser = system_title)]
    pub(crate) meter: Option<SystemTitle>,
    /// Serial number of the meter, 1 to 32 printable ASCII characters
    #[arg(long, value_name = "TEXT", conflicts_with = "file", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) serial: Option<String>,
    /// FLAG id, three letters
    #[arg(long, value_name = "FLAG", value_parser = FlagId::parse)]
    pub(crate) manufacturer: FlagId,
    /// Device profile
    #[arg(long, value_name = "NAME", value_parser = device_profile_name)]
    pub(crate) device_profile: DeviceProfileName,
    /// Name of the batch
    #[arg(long, value_name = "NAME")]
    pub(crate) batch: String,
    /// Group of all these meters; may be repeated
    #[arg(long = "group", value_name = "NAME")]
    pub(crate) groups: Vec<String>,
    /// File with many entries: JSON Lines
    #[arg(long, value_name = "FILE", conflicts_with = "meter")]
    pub(crate) file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ShipmentCommand {
    /// Import a vendor's shipment
    #[command(
        after_help = "Nothing is imported from a file whose signature, digest or count is wrong. Lines that are refused are reported, the others are \
        imported (exit code 5). Keys that another meter has too are imported and listed (exit code 5 as well). Run the same command again after \
        an interruption: it continues where it stopped, and imports nothing twice.\n\nExample:\n  \
        kms shipment import KAM-2026-0041.jsonl --manufacturer urn:meterkms:dev:manufacturer:kam --report refused.jsonl"
    )]
    Import(ImportShipment),
    /// List shipments
    #[command(visible_alias = "ls")]
    List,
    /// Show a shipment
    Show {
        /// SHA-256 of the file, or a unique prefix of at least 8 hex digits, or the file itself
        #[arg(value_name = "SHA256|FILE")]
        shipment: String,
    },
    /// Simulate a vendor: make a shipment with new keys, for trials
    #[command(
        after_help = "The devices file has the keys in plaintext, for meter simulators. Never use these keys for real meters.\n\nExample:\n  \
        kms shipment make-sample --devices 1000 --manufacturer KAM --batch KAM-2026-0041 --out KAM-2026-0041.jsonl"
    )]
    MakeSample(MakeSample),
}

#[derive(Args, Debug)]
pub(crate) struct ImportShipment {
    /// The shipment (docs/formats.md)
    pub(crate) file: PathBuf,
    /// Its detached signature [default: FILE.sig]
    #[arg(long, value_name = "FILE")]
    pub(crate) signature: Option<PathBuf>,
    /// Manufacturer that signed (principal URI)
    #[arg(long, value_name = "URN", value_parser = PrincipalId::parse)]
    pub(crate) manufacturer: PrincipalId,
    /// Assign the meters to this head-end (principal URI)
    #[arg(long, value_name = "URN", value_parser = PrincipalId::parse)]
    pub(crate) head_end: Option<PrincipalId>,
    /// Write every refused line and duplicate key into this file (JSON Lines)
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct MakeSample {
    /// Number of devices
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..1 << 40))]
    pub(crate) devices: u64,
    /// FLAG id, three letters
    #[arg(long, value_name = "FLAG", default_value = "KAM", value_parser = FlagId::parse)]
    pub(crate) manufacturer: FlagId,
    /// Device profile: the name of one that the system includes, or a file
    #[arg(long, value_name = "NAME|FILE", default_value = "generic-suite0")]
    pub(crate) device_profile: String,
    /// Name of the batch [default: the file's name]
    #[arg(long, value_name = "NAME")]
    pub(crate) batch: Option<String>,
    /// Number of the first device: the end of its system title
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..1 << 40))]
    pub(crate) first: u64,
    /// Number of consecutive devices that have the same keys, as some vendors deliver them
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..1 << 40))]
    pub(crate) equal_keys: u64,
    /// Group of all devices; may be repeated
    #[arg(long = "group", value_name = "NAME")]
    pub(crate) groups: Vec<String>,
    /// The island's vendor transport key, PEM [default: requested from the server]
    #[arg(long, value_name = "FILE")]
    pub(crate) transport_key: Option<PathBuf>,
    /// Hash of RSA-OAEP: sha256, or sha1 for HSM modules without sha256 [default: what the server
    /// prefers, sha256]
    #[arg(long, value_name = "HASH", value_parser = oaep_hash)]
    pub(crate) oaep_hash: Option<OaepHash>,
    /// The vendor's signing key, PEM; made if it does not exist [default: OUT.vendor-key.pem]
    #[arg(long, value_name = "FILE")]
    pub(crate) vendor_key: Option<PathBuf>,
    /// The shipment to write. OUT.sig, OUT.vendor-key.pem and OUT.vendor-key.pub.pem are written
    /// beside it
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Write no file with plaintext keys (OUT.devices.jsonl)
    #[arg(long)]
    pub(crate) no_devices_file: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PrincipalCommand {
    /// Register a principal and certify its TLS key, which this command makes
    #[command(
        after_help = "Examples:\n  kms principal add urn:meterkms:dev:head-end:hes-2 --client-title 4D4D4D0000000002\n  \
        kms principal add urn:meterkms:dev:officer:ada --person \"Ada Example\"\n  \
        kms principal add urn:meterkms:dev:manufacturer:kam --shipment-key KAM.vendor-key.pub.pem\n  \
        kms principal add urn:meterkms:dev:head-end:hes-3 --certificate-request hes-3.csr.pem --out hes-3.pem"
    )]
    Add(AddPrincipal),
    /// List principals
    #[command(visible_alias = "ls")]
    List,
    /// Certify a new TLS key: your own, which this command makes, or that of another principal's
    /// request
    #[command(
        after_help = "A proposal of two others certifies the key of another officer or auditor (propose-key).\n\n\
        Examples:\n  kms principal renew\n  kms principal renew urn:meterkms:dev:head-end:hes-3 --certificate-request hes-3.csr.pem --out hes-3.pem\n  \
        kms principal renew urn:meterkms:dev:officer:ada --certificate-request ada.csr.pem --out ada.pem --proposal 01939e7e-7c1b-7000-8000-000000000001"
    )]
    Renew(RenewPrincipal),
    /// Propose to certify the key of another officer or auditor, or to confirm it if one officer
    /// alone has certified it
    #[command(
        name = "propose-key",
        after_help = "Another officer approves it (kms proposal approve). Neither of you is the person whose key it is. Ask the person for the SHA-256 of the key, \
        over a channel that nobody else can use: openssl req -in ada.csr.pem -pubkey -noout | openssl pkey -pubin -outform DER | sha256sum\n\n\
        Examples:\n  kms principal propose-key urn:meterkms:dev:officer:ada --certificate-request ada.csr.pem --reason \"certificate lost, ticket 4714\"\n  \
        kms principal propose-key urn:meterkms:dev:officer:cy --key 9f2c…64 hex digits… --reason \"met in person\""
    )]
    ProposeKey(ProposeKey),
    /// End one certificate of another principal, at once
    #[command(
        name = "end-certificate",
        after_help = "Example:\n  kms principal end-certificate urn:meterkms:dev:head-end:hes-3 4f0c…hex digits… --reason \"not mine, ticket 4715\" --yes"
    )]
    EndCertificate {
        /// Principal URI
        #[arg(value_name = "URN", value_parser = PrincipalId::parse)]
        principal: PrincipalId,
        /// Serial number of the certificate, hex digits, from the principal's `kms principal
        /// whoami`, or `kms principal list --output json`
        #[arg(value_name = "SERIAL", value_parser = serial)]
        serial: Serial,
        #[command(flatten)]
        why: Reason,
        #[command(flatten)]
        sure: Sure,
    },
    /// Disable a principal, at once
    #[command(
        after_help = "Example:\n  kms principal disable urn:meterkms:dev:handheld:h-17 --reason \"lost, ticket 4713\" --yes"
    )]
    Disable {
        /// Principal URI
        #[arg(value_name = "URN", value_parser = PrincipalId::parse)]
        principal: PrincipalId,
        #[command(flatten)]
        why: Reason,
        #[command(flatten)]
        sure: Sure,
    },
    /// Show your principal, as the server identifies it, and its certificates
    Whoami,
    /// Make a transport key, which opens envelopes, and register it. The private key stays in the
    /// profile
    RegisterTransportKey,
}

#[derive(Args, Debug)]
pub(crate) struct AddPrincipal {
    /// Principal URI: urn:meterkms:ISLAND:ROLE:NAME
    #[arg(value_name = "URN", value_parser = PrincipalId::parse)]
    pub(crate) principal: PrincipalId,
    /// Person behind an officer's or auditor's certificate
    #[arg(long, value_name = "TEXT")]
    pub(crate) person: Option<String>,
    /// Client system title that the principal may use, 16 hex digits; may be repeated
    #[arg(long = "client-title", value_name = "HEX", value_parser = system_title)]
    pub(crate) client_titles: Vec<SystemTitle>,
    /// For a manufacturer: public key that verifies its shipments, PEM
    #[arg(long, value_name = "FILE")]
    pub(crate) shipment_key: Option<PathBuf>,
    /// Name of the new profile [default: the principal's name]
    #[arg(long, value_name = "NAME", value_parser = profile_name, conflicts_with = "certificate_request")]
    pub(crate) new_profile: Option<String>,
    /// Certify this request (PKCS#10, PEM) and make no key
    #[arg(long, value_name = "FILE", requires = "out")]
    pub(crate) certificate_request: Option<PathBuf>,
    /// File to write the certificate to (PEM, with its issuers)
    #[arg(long, value_name = "FILE", requires = "certificate_request")]
    pub(crate) out: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct RenewPrincipal {
    /// Principal URI [default: yourself]
    #[arg(value_name = "URN", requires = "certificate_request", value_parser = PrincipalId::parse)]
    pub(crate) principal: Option<PrincipalId>,
    /// Certify this request (PKCS#10, PEM)
    #[arg(long, value_name = "FILE", requires_all = ["principal", "out"])]
    pub(crate) certificate_request: Option<PathBuf>,
    /// File to write the certificate to (PEM, with its issuers)
    #[arg(long, value_name = "FILE", requires = "certificate_request")]
    pub(crate) out: Option<PathBuf>,
    /// Approved proposal that permits it, for another officer or auditor
    #[arg(long, value_name = "PROPOSAL", requires = "principal", value_parser = kms_domain::ProposalId::parse)]
    pub(crate) proposal: Option<kms_domain::ProposalId>,
}

#[derive(Args, Debug)]
pub(crate) struct ProposeKey {
    /// Principal URI of an officer or auditor
    #[arg(value_name = "URN", value_parser = PrincipalId::parse)]
    pub(crate) principal: PrincipalId,
    /// Certificate request with the key (PKCS#10, PEM)
    #[arg(long, value_name = "FILE", conflicts_with = "key", required_unless_present = "key")]
    pub(crate) certificate_request: Option<PathBuf>,
    /// SHA-256 of the public key (SubjectPublicKeyInfo, DER), 64 hex digits
    #[arg(long, value_name = "HEX", value_parser = campaign::digest)]
    pub(crate) key: Option<[u8; 32]>,
    /// Number of people who must approve, beside you
    #[arg(long, value_name = "PEOPLE", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=9))]
    pub(crate) quorum: u32,
    #[command(flatten)]
    pub(crate) why: Reason,
}

/// The serial number of a certificate, 1–20 octets.
#[derive(Clone, Debug)]
pub(crate) struct Serial(pub(crate) Vec<u8>);

fn serial(text: &str) -> Result<Serial, String> {
    let octets = hex::decode(text).map_err(|_| "not hex digits".to_owned())?;
    if (1..=20).contains(&octets.len()) { Ok(Serial(octets)) } else { Err("not 1 to 20 octets".to_owned()) }
}

#[derive(Debug, Subcommand)]
pub(crate) enum GrantCommand {
    /// List grants, newest first
    #[command(
        visible_alias = "ls",
        after_help = "Example:\n  kms grant list --live --principal urn:meterkms:dev:head-end:hes-1"
    )]
    List {
        /// Only grants of this principal (URI)
        #[arg(long, value_name = "URN", value_parser = PrincipalId::parse)]
        principal: Option<PrincipalId>,
        /// Only grants that have neither expired nor been revoked
        #[arg(long)]
        live: bool,
        #[command(flatten)]
        limit: Limit,
    },
    /// End a grant. What its holder has learned stays known until a rotation
    Revoke {
        /// The grant's id, a UUID
        #[arg(value_name = "GRANT", value_parser = GrantId::parse)]
        grant: GrantId,
        #[command(flatten)]
        why: Reason,
        #[command(flatten)]
        sure: Sure,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum AuditCommand {
    /// List audit records, newest first
    #[command(
        visible_alias = "ls",
        after_help = "Example:\n  kms audit list --meter 4B414D0000000001 --from 2026-11-01T00:00:00Z"
    )]
    List(ListAudit),
    /// Read the whole log and every sealed row, and report what does not fit
    #[command(after_help = "Exit code 1 if something was found.")]
    Scrub,
}

#[derive(Args, Debug)]
pub(crate) struct ListAudit {
    /// Only records of this principal (URI)
    #[arg(long, value_name = "URN", value_parser = PrincipalId::parse)]
    pub(crate) principal: Option<PrincipalId>,
    /// Only records that name this meter, 16 hex digits
    #[arg(long, value_name = "METER", value_parser = system_title)]
    pub(crate) meter: Option<SystemTitle>,
    /// From this time on, RFC 3339
    #[arg(long, value_name = "TIME")]
    pub(crate) from: Option<jiff::Timestamp>,
    /// Before this time, RFC 3339
    #[arg(long, value_name = "TIME")]
    pub(crate) to: Option<jiff::Timestamp>,
    /// Oldest first
    #[arg(long)]
    pub(crate) oldest_first: bool,
    #[command(flatten)]
    pub(crate) limit: Limit,
}

#[derive(Debug, Subcommand)]
pub(crate) enum HsmCommand {
    /// Show what the HSM modules can do: needed, found, what is used instead, what is missing, and
    /// the cost of that
    #[command(after_help = "Exit code 1 if a token is not usable.")]
    Check,
    /// List every object of every token with its attributes, and what is wrong with it
    #[command(after_help = "Exit code 1 if an object is readable or usable beyond its purpose.")]
    Inventory,
}

fn system_title(text: &str) -> Result<SystemTitle, String> {
    if text.len() != 16 || !text.bytes().all(|octet| octet.is_ascii_hexdigit()) {
        return Err("not 16 hex digits".to_owned());
    }
    SystemTitle::parse(text).map_err(|error| error.to_string())
}

fn group_name(name: &str) -> Result<String, String> {
    let well_formed = (1..=64).contains(&name.len())
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.bytes().all(|octet| octet.is_ascii_lowercase() || octet.is_ascii_digit() || octet == b'-');
    if well_formed {
        Ok(name.to_owned())
    } else {
        Err("not 1 to 64 of a-z, 0-9 and `-`, starting with a letter".to_owned())
    }
}

fn profile_name(name: &str) -> Result<String, String> {
    let well_formed = !name.is_empty()
        && !name.starts_with('.')
        && name.bytes().all(|octet| octet.is_ascii_alphanumeric() || matches!(octet, b'-' | b'_' | b'.'));
    if well_formed { Ok(name.to_owned()) } else { Err("not a name of letters, digits, `-`, `_` and `.`".to_owned()) }
}

fn device_profile_name(name: &str) -> Result<DeviceProfileName, kms_client::ParseError> {
    DeviceProfileName::parse(name)
}

fn oaep_hash(name: &str) -> Result<OaepHash, String> {
    match name {
        "sha256" => Ok(OaepHash::Sha256),
        "sha1" => Ok(OaepHash::Sha1),
        _ => Err("neither sha256 nor sha1".to_owned()),
    }
}

const AFTER_HELP: &str = "\
Exit codes:
  0  done
  1  failed
  2  wrong command line or bad request
  3  refused by policy
  4  server, HSM or database not available: try again
  5  partly done, or with something to look at: the output tells what was refused, or which keys several meters share

Examples:
  kms principal whoami
  kms meter list
  kms meter show 4B414D0000000001 --output json
  kms audit list --limit 20
  kms --profile head-end session open 4B414D0000000001 --client-title 4D4D4D0000000001";
