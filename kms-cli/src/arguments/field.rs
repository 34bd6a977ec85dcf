//! The command line of `kms field`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::values::profile_name;

#[derive(Debug, Subcommand)]
pub(crate) enum FieldCommand {
    /// Enrol this machine as a handheld, with the one-time code of an officer
    #[command(
        after_help = "The keys are made here and stay here, encrypted under the PIN. The server is verified with the code\n\
        before anything is sent. Other programs of the machine can read arguments: rather give `-`, and\n\
        type the code when you are asked.\n\nExamples:\n  kms field enrol kms.example:7444 -\n  \
        kms field enrol kms.example:7444 - --pin-file /dev/fd/3 < code\n  \
        kms field enrol kms.example:7444 h-17/7H2K-…"
    )]
    Enrol {
        /// Enrolment address of the server, HOST:PORT
        #[arg(value_name = "SERVER")]
        server: String,
        /// One-time code; `-` asks for it at a terminal, and else reads standard input
        #[arg(value_name = "CODE")]
        code: String,
        /// Name in the server's certificate [default: HOST]
        #[arg(long, value_name = "NAME")]
        server_name: Option<String>,
        /// Profile to make [default: the name of the handheld]
        #[arg(long, value_name = "NAME", value_parser = profile_name)]
        new_profile: Option<String>,
        #[command(flatten)]
        pin: PinSource,
    },
    /// Show the handheld of this machine: technician, server, certificate
    #[command(after_help = "Example:\n  kms --profile h-17 field status")]
    Status {
        #[command(flatten)]
        pin: PinSource,
    },
    /// Renew the certificate, if the second half of its validity has begun
    #[command(after_help = "Example:\n  kms --profile h-17 field renew")]
    Renew {
        #[command(flatten)]
        pin: PinSource,
    },
}

/// Where the PIN comes from. It is never an argument, which other users of the machine can read.
#[derive(Args, Debug)]
pub(crate) struct PinSource {
    /// File with the PIN, its first line; /dev/fd/3 is an inherited pipe [default: you are asked]
    #[arg(long, value_name = "FILE")]
    pub(crate) pin_file: Option<PathBuf>,
}
