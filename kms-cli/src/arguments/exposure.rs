//! The command line of `kms exposure`.

use clap::{Args, Subcommand, builder::NonEmptyStringValueParser};
use kms_client::{PrincipalId, SystemTitle};

use super::values::{group_name, handheld, system_title};

#[derive(Debug, Subcommand)]
pub(crate) enum ExposureCommand {
    /// Show who could know which key versions: since when, until when, and how
    #[command(after_help = SHOW_HELP)]
    Show(ShowExposure),
}

#[derive(Args, Debug)]
pub(crate) struct ShowExposure {
    #[command(flatten)]
    pub(crate) subject: Subject,
    /// Only keys that became known at this time or later, RFC 3339
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<jiff::Timestamp>,
    /// Only key versions that are still open
    #[arg(long)]
    pub(crate) open: bool,
    /// Show at most this number of lines; 0 shows all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) limit: u64,
}

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub(crate) struct Subject {
    /// Everybody who could know keys of this meter, 16 hex digits
    #[arg(long, value_name = "METER", value_parser = system_title)]
    pub(crate) meter: Option<SystemTitle>,
    /// Everybody who could know keys of this group
    #[arg(long, value_name = "GROUP", value_parser = group_name)]
    pub(crate) group: Option<String>,
    /// What this principal (URI) could know
    #[arg(long, value_name = "URN", value_parser = PrincipalId::parse)]
    pub(crate) principal: Option<PrincipalId>,
    /// What this handheld could know: its name, or its URI
    #[arg(long, value_name = "NAME", value_parser = handheld)]
    pub(crate) handheld: Option<String>,
    /// What the vendor of these meters could know: FLAG id, three letters
    #[arg(long, value_name = "FLAG", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) vendor: Option<String>,
    /// What the vendor could know of the meters of this batch
    #[arg(long, value_name = "BATCH", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) batch: Option<String>,
    /// What anyone could know
    #[arg(long)]
    pub(crate) anyone: bool,
}

const SHOW_HELP: &str = "\
A key version is `open` as long as the meter uses it, as far as is known, or may use it. After a
rotation `until` says when it was replaced; `may go back` as long as the meter may go back to it.

Examples:
  kms exposure show --handheld hh-7 --open
  kms exposure show --meter 4B414D0000000001
  kms exposure show --principal urn:meterkms:dev:head-end:hes-1 --since 2026-11-01T00:00:00Z
  kms exposure show --batch KAM-2026-0001 --output json

Exit code 5 if the answer lacks something: rows that do not verify, or an index that is not complete.";
