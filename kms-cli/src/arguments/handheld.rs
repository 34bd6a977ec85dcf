//! The command line of `kms handheld`.

use clap::{Args, Subcommand, builder::NonEmptyStringValueParser};
use kms_client::SystemTitle;

use super::{
    shared::{Reason, Sure},
    values::{handheld_name, system_title},
};

#[derive(Debug, Subcommand)]
pub(crate) enum HandheldCommand {
    /// Invite a device to be enrolled as a new handheld: prints a one-time code
    #[command(
        after_help = "The code is shown once, and stored nowhere. Give it to the technician, who enrols the device with\n\
        `kms field enrol`.\n\nExamples:\n  kms handheld invite h-17 --technician \"Tom Field\"\n  \
        kms handheld invite h-18 --technician \"Tom Field\" --client-title 4D4D4D0000000012 --minutes 15"
    )]
    Invite {
        #[command(flatten)]
        who: WhichHandheld,
        #[command(flatten)]
        code: CodeTerms,
        /// Client system title that it may use (16 hex digits); may be given several times
        #[arg(long = "client-title", value_name = "TITLE", value_parser = system_title)]
        client_titles: Vec<SystemTitle>,
    },
    /// Hand a handheld over to a technician: its keys end at once, and a one-time code for new keys
    /// is printed. Also for a forgotten PIN, or certificates that have ended
    #[command(
        after_help = "A technician could have copied the keys of the device, so they end, and the device makes new ones.\n\n\
        Example:\n  kms handheld hand-over h-17 --technician \"Una Field\" --yes"
    )]
    HandOver {
        #[command(flatten)]
        who: WhichHandheld,
        #[command(flatten)]
        code: CodeTerms,
        #[command(flatten)]
        sure: Sure,
    },
    /// End an invitation that nobody has used
    #[command(after_help = "Example:\n  kms handheld withdraw-invitation h-17 --reason \"wrong technician\"")]
    WithdrawInvitation {
        #[command(flatten)]
        who: WhichHandheld,
        #[command(flatten)]
        why: Reason,
    },
    /// List handhelds: technician, assurance, certificate, invitation
    #[command(visible_alias = "ls", after_help = "Example:\n  kms handheld list --output json")]
    List,
}

#[derive(Args, Debug)]
pub(crate) struct WhichHandheld {
    /// Name of the handheld: a-z, 0-9 and `-`
    #[arg(value_name = "NAME", value_parser = handheld_name)]
    pub(crate) name: String,
}

#[derive(Args, Debug)]
pub(crate) struct CodeTerms {
    /// Person who will carry the handheld
    #[arg(long, value_name = "PERSON", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) technician: String,
    /// How long the code is accepted [default: as long as the server permits, an hour unless
    /// configured]
    #[arg(long, value_name = "MINUTES", value_parser = clap::value_parser!(u32).range(1..=1_440))]
    pub(crate) minutes: Option<u32>,
}
