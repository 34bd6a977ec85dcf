//! The command line of `kms session`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use kms_client::{KeyType, SecuritySetupId, SystemTitle};
use kms_proto::v1::Purpose;

use super::values::{group_name, system_title};

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
