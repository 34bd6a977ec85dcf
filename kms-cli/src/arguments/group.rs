//! The command line of `kms group`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use kms_client::{KeyType, SecuritySetupId, SystemTitle};
use kms_domain::DeviceProfileName;

use super::{
    shared::{Limit, NewKey, Reason, Sure},
    values::{group_name, system_title},
};

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
