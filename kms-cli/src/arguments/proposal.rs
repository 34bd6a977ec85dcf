//! The command line of `kms proposal`.

use clap::{Args, Subcommand};
use kms_domain::ProposalId;

use super::{
    shared::{Limit, Reason, Sure},
    values::digest,
};

#[derive(Debug, Subcommand)]
pub(crate) enum ProposalCommand {
    /// List proposals, newest first
    #[command(visible_alias = "ls", after_help = "Example:\n  kms proposal list --limit 20")]
    List {
        #[command(flatten)]
        limit: Limit,
    },
    /// Show a proposal: exactly what will run, who asked for it and why, who approved it
    #[command(after_help = "Example:\n  kms proposal show 01939e7e-7c1b-7000-8000-000000000001")]
    Show {
        #[command(flatten)]
        proposal: WhichProposal,
    },
    /// Approve the content of a proposal that another person made
    #[command(
        after_help = "You approve the content with the digest that `kms proposal show` tells: any other is refused.\n\n\
        Examples:\n  kms proposal approve 01939e7e-7c1b-7000-8000-000000000001\n  \
        kms proposal approve 01939e7e-7c1b-7000-8000-000000000001 --content 9f2c…64 hex digits… --yes"
    )]
    Approve {
        #[command(flatten)]
        proposal: WhichProposal,
        /// SHA-256 of the content that you have reviewed, 64 hex digits [default: it is shown, and
        /// you are asked]
        #[arg(long, value_name = "HEX", value_parser = digest)]
        content: Option<[u8; 32]>,
        #[command(flatten)]
        sure: Sure,
    },
    /// Execute an approved proposal, once
    #[command(after_help = "Example:\n  kms proposal carry-out 01939e7e-7c1b-7000-8000-000000000001 --yes")]
    CarryOut {
        #[command(flatten)]
        proposal: WhichProposal,
        #[command(flatten)]
        sure: Sure,
    },
    /// End a proposal that has not been executed
    #[command(
        after_help = "Example:\n  kms proposal withdraw 01939e7e-7c1b-7000-8000-000000000001 --reason \"wrong meter\""
    )]
    Withdraw {
        #[command(flatten)]
        proposal: WhichProposal,
        #[command(flatten)]
        why: Reason,
    },
}

#[derive(Args, Debug)]
pub(crate) struct WhichProposal {
    /// The proposal's id, a UUID
    #[arg(value_name = "PROPOSAL", value_parser = ProposalId::parse)]
    pub(crate) proposal: ProposalId,
}
