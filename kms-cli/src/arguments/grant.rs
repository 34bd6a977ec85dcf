//! The command line of `kms grant`.

use clap::Subcommand;
use kms_client::{GrantId, PrincipalId};

use super::shared::{Limit, Reason, Sure};

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
