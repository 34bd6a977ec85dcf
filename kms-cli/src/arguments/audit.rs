//! The command line of `kms audit`.

use clap::{Args, Subcommand};
use kms_client::{PrincipalId, SystemTitle};

use super::{shared::Limit, values::system_title};

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
