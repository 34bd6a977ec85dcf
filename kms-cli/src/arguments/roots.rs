//! The command line of `kms roots`.

use clap::{Args, Subcommand};
use kms_domain::{ProposalId, Quorum, RootPurpose};

use super::{Reason, Sure, campaign::quorum};

#[derive(Debug, Subcommand)]
pub(crate) enum RootsCommand {
    /// Show all versions of all roots, and how far rotations are
    #[command(
        after_help = "made: nothing uses it yet. current: new keys and seals use it. replaced: what was made with it may still use it. retired: not\n\
        accepted any more.\n\nExamples:\n  kms roots show\n  kms roots show --count"
    )]
    Show {
        /// Read all rows, and count what uses which version
        #[arg(long)]
        count: bool,
    },
    /// Rotate a root to the version that was made last
    #[command(
        after_help = "`kms-server roots new` makes a version. Storage KEKs and the seal root: the servers bring all rows over. Diversification roots: new\n\
        versions of keys are derived from it, as meters rotate. vendor-transport: vendors are given it; `kms roots retire` ends the old one.\n\n\
        Examples:\n  kms roots rotate session/storage-kek\n  kms roots rotate seal --rows-per-second 5000 --yes"
    )]
    Rotate {
        #[command(flatten)]
        root: WhichRoot,
        /// Rows that the pass looks at in a second, at most [default: 1000]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        rows_per_second: Option<u32>,
        #[command(flatten)]
        sure: Sure,
    },
    /// See how far a pass is, until it has ended
    #[command(after_help = "Example:\n  kms roots watch session/storage-kek")]
    Watch {
        #[command(flatten)]
        root: WhichRoot,
        /// Show it once, and end
        #[arg(long)]
        once: bool,
    },
    /// Stop a pass
    #[command(after_help = "Example:\n  kms roots pause session/storage-kek --reason \"busy hour\"")]
    Pause {
        #[command(flatten)]
        root: WhichRoot,
        #[command(flatten)]
        reason: Reason,
    },
    /// Go on with a pass that was stopped
    #[command(after_help = "Example:\n  kms roots resume session/storage-kek --rows-per-second 200")]
    Resume {
        #[command(flatten)]
        root: WhichRoot,
        /// Rows that the pass looks at in a second, at most [default: as before]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        rows_per_second: Option<u32>,
    },
    /// Accept no shipments under earlier versions of the vendor transport key any more
    #[command(after_help = "Example:\n  kms roots retire vendor-transport")]
    Retire {
        #[command(flatten)]
        root: WhichRoot,
        #[command(flatten)]
        sure: Sure,
    },
    /// Propose to destroy a version that nothing uses any more, or to give up one that was only
    /// made
    #[command(
        after_help = "Another person approves it (kms proposal approve), then somebody carries it out (kms roots destroy). A backup from before its\n\
        last use could not be read any more: so say how old the oldest is that you may still restore.\n\n\
        Example:\n  kms roots propose-destruction session/storage-kek --version 1 --oldest-backup 2026-11-01T00:00:00Z --reason \"yearly rotation\""
    )]
    ProposeDestruction {
        #[command(flatten)]
        root: WhichRoot,
        /// Which version
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
        version: u8,
        /// When the oldest backup of the database was taken that may still be restored
        #[arg(long, value_name = "TIME")]
        oldest_backup: jiff::Timestamp,
        /// How many other people must approve, 1 to 9
        #[arg(long, value_name = "N", default_value = "1", value_parser = quorum)]
        quorum: Quorum,
        #[command(flatten)]
        why: Reason,
    },
    /// Destroy a root in all tokens, as others have approved. It cannot be undone
    #[command(after_help = "Example:\n  kms roots destroy 01939e7e-7c1b-7000-8000-000000000001")]
    Destroy {
        /// The proposal's id, a UUID
        #[arg(value_name = "PROPOSAL", value_parser = ProposalId::parse)]
        proposal: ProposalId,
        #[command(flatten)]
        sure: Sure,
    },
}

#[derive(Args, Debug)]
pub(crate) struct WhichRoot {
    /// CLASS/diversification, CLASS/storage-kek (classes: kek, session, authentication), seal, or
    /// vendor-transport
    #[arg(value_name = "ROOT", value_parser = RootPurpose::parse)]
    pub(crate) root: RootPurpose,
}
