//! `kms`: the tool of security officers, auditors and field technicians. Everything goes through
//! the server's gRPC interface.

mod arguments;
mod commands;
mod context;
mod failure;
mod json;
mod output;
mod progress;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use crate::{
    arguments::{Arguments, Command},
    context::Context,
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
        Err(error) => Err(Failure::failed(format!("cannot start, the operating system refuses: {error}"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("kms: {failure}");
            failure.exit_code()
        }
    }
}

async fn run(command: Command, context: Context) -> Result<(), Failure> {
    match command {
        Command::Session(command) => commands::session::run(command, &context).await,
        Command::Meter(command) => commands::meter::run(command, &context).await,
        Command::Group(command) => commands::group::run(command, &context).await,
        Command::DeviceType(command) => commands::device_type::run(command, &context).await,
        Command::Shipment(command) => commands::shipment::run(command, &context).await,
        Command::Principal(command) => commands::principal::run(command, &context).await,
        Command::Handheld(command) => commands::handheld::run(command, &context).await,
        Command::Field(command) => commands::field::run(command, &context).await,
        Command::Campaign(command) => commands::campaign::run(command, &context).await,
        Command::WorkOrder(command) => commands::work_order::run(command, &context).await,
        Command::Proposal(command) => commands::proposal::run(command, &context).await,
        Command::Roots(command) => commands::roots::run(command, &context).await,
        Command::Grant(command) => commands::grant::run(command, &context).await,
        Command::Exposure(command) => commands::exposure::run(command, &context).await,
        Command::Audit(command) => commands::audit::run(command, &context).await,
        Command::Hsm(command) => commands::hsm::run(command, &context).await,
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "kms", &mut std::io::stdout());
            Ok(())
        }
    }
}
