//! Arguments that several commands have.

use clap::{Args, builder::NonEmptyStringValueParser};
use kms_client::SecuritySetupId;

#[derive(Args, Debug)]
pub(crate) struct Limit {
    /// Show at most this number; 0 shows all
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) limit: usize,
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
