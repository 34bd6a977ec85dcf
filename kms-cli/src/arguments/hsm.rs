//! The command line of `kms hsm`.

use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(crate) enum HsmCommand {
    /// Show what the HSM modules can do: needed, found, what is used instead, what is missing, and
    /// the cost of that
    #[command(after_help = "Exit code 1 if a token is not usable.")]
    Check,
    /// List every object of every token with its attributes, and what is wrong with it
    #[command(after_help = "Exit code 1 if an object is readable or usable beyond its purpose.")]
    Inventory,
}
