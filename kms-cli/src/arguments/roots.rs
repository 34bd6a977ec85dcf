//! The command line of `kms roots`.

use clap::{Args, Subcommand};
use kms_domain::{ProposalId, Quorum, RootPurpose};

use super::{
    shared::{Reason, Sure},
    values::quorum,
};

#[derive(Debug, Subcommand)]
pub(crate) enum RootsCommand {
    /// Show all versions of all roots, and how far rotations are
    #[command(
        after_help = "made: nothing uses it yet. current: new keys and seals use it. replaced: what was made with it may still use it. retired: not \
        accepted any more.\n\nExamples:\n  kms roots show\n  kms roots show --count"
    )]
    Show {
        /// Read all rows, and count the references to each version
        #[arg(long)]
        count: bool,
    },
    /// Rotate a root to its newest version
    #[command(
        after_help = "`kms-server roots new` makes a version. Storage KEKs and the seal root: the servers move all rows to it. Diversification roots: new \
        versions of keys are derived from it, as meters rotate. vendor-transport: vendors get it; `kms roots retire` ends the old one.\n\n\
        Examples:\n  kms roots rotate session/storage-kek\n  kms roots rotate seal --rows-per-second 5000 --yes"
    )]
    Rotate {
        #[command(flatten)]
        root: WhichRoot,
        /// Most rows that the pass reads in a second [default: 1000]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        rows_per_second: Option<u32>,
        #[command(flatten)]
        sure: Sure,
    },
    /// Watch the progress of a pass until it has ended
    #[command(after_help = "Example:\n  kms roots watch session/storage-kek")]
    Watch {
        #[command(flatten)]
        root: WhichRoot,
        /// Show the progress once, and end
        #[arg(long)]
        once: bool,
    },
    /// Pause a pass
    #[command(after_help = "Example:\n  kms roots pause session/storage-kek --reason \"busy hour\"")]
    Pause {
        #[command(flatten)]
        root: WhichRoot,
        #[command(flatten)]
        reason: Reason,
    },
    /// Resume a pass that was paused
    #[command(after_help = "Example:\n  kms roots resume session/storage-kek --rows-per-second 200")]
    Resume {
        #[command(flatten)]
        root: WhichRoot,
        /// Most rows that the pass reads in a second [default: as before]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        rows_per_second: Option<u32>,
    },
    /// End earlier versions of the vendor transport key: shipments under them are refused
    #[command(after_help = "Example:\n  kms roots retire vendor-transport")]
    Retire {
        #[command(flatten)]
        root: WhichRoot,
        #[command(flatten)]
        sure: Sure,
    },
    /// Propose to destroy a version that nothing uses any more, or to give up one that was never
    /// used
    #[command(
        after_help = "Another person approves it (kms proposal approve), then an officer executes it (kms roots destroy). A backup from before the root's \
        last use cannot be read afterwards: so state when the oldest backup was taken that you may still restore.\n\n\
        Example:\n  kms roots propose-destruction session/storage-kek --version 1 --oldest-backup 2026-11-01T00:00:00Z --reason \"yearly rotation\""
    )]
    ProposeDestruction {
        #[command(flatten)]
        root: WhichRoot,
        /// Version of the root
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
        version: u8,
        /// Time of the oldest database backup that may still be restored
        #[arg(long, value_name = "TIME")]
        oldest_backup: jiff::Timestamp,
        /// Number of other people who must approve, 1 to 9
        #[arg(long, value_name = "N", default_value = "1", value_parser = quorum)]
        quorum: Quorum,
        #[command(flatten)]
        why: Reason,
    },
    /// Destroy a root in all tokens, by an approved proposal. It cannot be undone
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
