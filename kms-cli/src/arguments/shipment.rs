//! The command line of `kms shipment`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use kms_client::PrincipalId;
use kms_domain::{FlagId, OaepHash};

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

fn oaep_hash(name: &str) -> Result<OaepHash, String> {
    match name {
        "sha256" => Ok(OaepHash::Sha256),
        "sha1" => Ok(OaepHash::Sha1),
        _ => Err("neither sha256 nor sha1".to_owned()),
    }
}
