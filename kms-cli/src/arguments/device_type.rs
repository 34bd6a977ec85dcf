//! The command line of `kms device-type`.

use clap::Subcommand;
use kms_domain::{DeviceProfileName, FlagId};

use super::{shared::NewKey, values::group_name};

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
