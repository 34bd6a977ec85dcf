//! The command line of `kms meter`.

use std::path::PathBuf;

use clap::{Args, Subcommand, builder::NonEmptyStringValueParser};
use kms_client::{KeyType, PrincipalId, SecuritySetupId, SystemTitle};
use kms_domain::{DeviceProfileName, FlagId, Quorum};

use super::{
    shared::{Limit, Reason, Sure},
    values::{party, quorum, system_title},
};

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

#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "Filter")]
pub(crate) struct MeterFilter {
    /// FLAG id, three letters
    #[arg(long, value_name = "FLAG", value_parser = FlagId::parse)]
    pub(crate) manufacturer: Option<FlagId>,
    /// Device profile
    #[arg(long, value_name = "NAME", value_parser = DeviceProfileName::parse)]
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
    #[arg(long, value_name = "N", default_value = "1", value_parser = quorum)]
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
    #[arg(long, value_name = "WHO", default_value = "anyone", value_parser = party)]
    pub(crate) known_to: String,
    #[command(flatten)]
    pub(crate) why: Reason,
    #[command(flatten)]
    pub(crate) sure: Sure,
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
    #[arg(long, value_name = "NAME", value_parser = DeviceProfileName::parse)]
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
