//! `kms`: the tool of security officers, auditors and field technicians. Everything goes through
//! the server's gRPC interface.

mod arguments;
mod commands;
mod failure;
mod json;
mod output;
mod progress;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use kms_client::{Connection, Profile, StateDirectory};

use crate::{
    arguments::{Arguments, Command, GlobalArguments},
    failure::Failure,
    output::Output,
};

fn main() -> ExitCode {
    // clap's own `arg_required_else_help` takes a variable such as KMS_STATE for an argument.
    if std::env::args_os().len() < 2 {
        let _ = Arguments::command().print_help();
        return ExitCode::from(2);
    }
    let arguments = Arguments::parse();
    let output = Output::new(arguments.global.output);
    let result = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(run(arguments.command, Context { global: arguments.global, output })),
        Err(error) => Err(Failure::failed(format!("cannot start: {error}"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("kms: {failure}");
            failure.exit_code()
        }
    }
}

/// What every command needs: who asks, whom, and how the answer is shown.
struct Context {
    global: GlobalArguments,
    output: Output,
}

impl Context {
    fn state(&self) -> StateDirectory {
        StateDirectory::new(&self.global.state)
    }

    /// The profile of `--profile`, KMS_PROFILE or the state folder's default.
    fn profile(&self) -> Result<Profile, Failure> {
        let state = self.state();
        let folder = self.global.state.display();
        let Some(name) = self.global.profile.clone().or_else(|| state.default_profile()) else {
            let names = state.profile_names();
            return Err(Failure::usage(if names.is_empty() {
                format!(
                    "no profile in `{folder}`: start a server with `kms-dev`, get a profile from an officer, or name the folder with --state"
                )
            } else {
                format!(
                    "no profile is selected: give --profile NAME, or write a name into `{folder}/default-profile`; profiles: {}",
                    names.join(", ")
                )
            }));
        };
        state.profile(&name).map_err(|error| {
            let names = state.profile_names();
            if names.contains(&name) || names.is_empty() {
                error.into()
            } else {
                Failure::usage(format!("no profile `{name}` in `{folder}`; profiles: {}", names.join(", ")))
            }
        })
    }

    async fn connect(&self) -> Result<Connection, Failure> {
        let profile = self.profile()?;
        // Who sees it here is in time: one that has ended comes back by other people only.
        if let Some(warning) = profile
            .certificate_not_after_ms()
            .and_then(|end| output::ends_soon(end, jiff::Timestamp::now().as_millisecond()))
        {
            eprintln!("warning: your certificate {warning}: kms principal renew");
        }
        Ok(progress::waiting(&format!("connecting to {}", profile.server()), Connection::connect(&profile)).await?)
    }
}

async fn run(command: Command, context: Context) -> Result<(), Failure> {
    match command {
        Command::Session(command) => commands::session::run(command, &context).await,
        Command::Meter(command) => commands::meter::run(command, &context).await,
        Command::Group(command) => commands::owner::group(command, &context).await,
        Command::DeviceType(command) => commands::owner::device_type(command, &context).await,
        Command::Shipment(command) => commands::shipment::run(command, &context).await,
        Command::Principal(command) => commands::principal::run(command, &context).await,
        Command::Campaign(command) => commands::campaign::run(command, &context).await,
        Command::Proposal(command) => commands::proposal::run(command, &context).await,
        Command::Roots(command) => commands::roots::run(command, &context).await,
        Command::Grant(command) => commands::grant::run(command, &context).await,
        Command::Audit(command) => commands::audit::run(command, &context).await,
        Command::Hsm(command) => commands::hsm::run(command, &context).await,
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "kms", &mut std::io::stdout());
            Ok(())
        }
    }
}
