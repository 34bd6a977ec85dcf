//! The command line of `kms-server`.
//!
//! It is in the library, and not in the binary, because futures are compiled where they are
//! awaited: otherwise the whole server would be compiled twice.

use std::{error::Error, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use clap::{Parser, Subcommand};
use kms_domain::RootPurpose;
use kms_hsm::ProcessPinMemory;
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

use crate::server::{self, Server, host_name};
use crate::telemetry::Telemetry;
use kms_config::{Config, TelemetrySection};
use kms_service::profiles::Profiles;
use kms_service::{init::CeremonyPlan, officers::Recertification, root::make::NewRootSettings};

/// A key management server for smart meters.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve an island.
    Run {
        /// The configuration file; docs/kms-server.toml is a commented example.
        #[arg(long)]
        config: PathBuf,
    },
    /// Run the ceremony that makes an island: tokens, roots, escrow, certificates, database. Run it
    /// again after an interruption.
    Init {
        /// The ceremony file.
        #[arg(long)]
        ceremony: PathBuf,
        /// Folder for what the ceremony makes.
        #[arg(long)]
        state: PathBuf,
    },
    /// Declare that the database was restored from a backup, with all servers of the island
    /// stopped. Every invocation counter is raised before it is allocated from again. A server
    /// notices most restores by itself (docs/operations.md, Restore).
    Restored {
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
    },
    /// Versions of the island's root keys (docs/roots.md).
    Roots {
        #[command(subcommand)]
        command: RootsCommand,
    },
    /// Recover the certificate of an officer, with the escrow's custodians.
    Officers {
        #[command(subcommand)]
        command: OfficersCommand,
    },
    /// Certificates of servers.
    Certificate {
        #[command(subcommand)]
        command: CertificateCommand,
    },
    /// Check configuration, policies, device profiles and HSM tokens, and print what the tokens can
    /// do. Does not serve.
    Check {
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
    },
}

#[derive(Subcommand)]
enum OfficersCommand {
    /// Certify the new key of an officer whose certificate has ended or is lost, with a quorum of
    /// the escrow's custodians. Use it if no two other officers are there, who could do it by a
    /// proposal. The officer's other certificates end. The command is audited (docs/operations.md).
    Recertify {
        /// Principal URI of the officer: urn:meterkms:ISLAND:officer:NAME
        #[arg(value_name = "URN", value_parser = kms_domain::PrincipalId::parse)]
        officer: kms_domain::PrincipalId,
        /// The configuration of a server that has a token for the CA. With SQLite, stop the server
        /// first.
        #[arg(long)]
        config: PathBuf,
        /// The request for the new key (PKCS#10, PEM), which the officer has made.
        #[arg(long, value_name = "FILE")]
        certificate_request: PathBuf,
        /// An escrow file of the island.
        #[arg(long, value_name = "FILE")]
        escrow: PathBuf,
        /// Share that its custodian has decrypted; repeat it for as many as the escrow needs.
        /// Destroy these files afterwards.
        #[arg(long = "share", value_name = "FILE", required = true)]
        shares: Vec<PathBuf>,
        /// File to write the certificate to, PEM.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
}

#[derive(Subcommand)]
enum CertificateCommand {
    /// Renew a server's TLS certificate for the names and the key that it has. A server with a
    /// token for the CA renews its own certificate automatically in the last third of its life.
    /// This command is for servers without one, and for an earlier renewal.
    Renew {
        /// The configuration of a server that has a token for the CA. With SQLite, stop the server
        /// first.
        #[arg(long)]
        config: PathBuf,
        /// Certificate of another server, PEM. Default: that of the configuration.
        #[arg(long, requires = "private_key")]
        certificate: Option<PathBuf>,
        /// The private key that belongs to it, PEM.
        #[arg(long, requires = "certificate")]
        private_key: Option<PathBuf>,
    },
}

#[derive(Subcommand)]
enum RootsCommand {
    /// Make another version of a root in the token, escrow it for the custodians of the ceremony,
    /// and note it in the island's row. Nothing uses it before an officer runs `kms roots rotate`.
    /// It can be run again after an interruption.
    New {
        /// The configuration of the server that has the ceremony's token. With SQLite, stop the
        /// server first.
        #[arg(long)]
        config: PathBuf,
        /// Root: CLASS/diversification, CLASS/storage-kek (classes: kek, session,
        /// authentication), seal, or vendor-transport.
        #[arg(value_parser = RootPurpose::parse)]
        root: RootPurpose,
        /// The newest escrow file of the island. The new root is added to it; give every custodian
        /// a copy of it afterwards.
        #[arg(long)]
        escrow: PathBuf,
        /// The number of a `[[copy]]` of the ceremony file, from 1, whose token gets a copy of the
        /// root. Repeat it for each such token that serves the class.
        #[arg(long = "copy", value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
        copies: Vec<u8>,
        /// The number of a `[[copy]]` whose token gets no copy, because it does not serve the
        /// class. Name each `[[copy]]` in one way or the other, because no copy can be made later.
        /// Not for `vendor-transport`, which is never copied.
        #[arg(long = "no-copy", value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
        no_copies: Vec<u8>,
        /// Label of a root that no escrow file has any more. It can be rotated, but not restored.
        #[arg(long, value_name = "LABEL")]
        lost: Vec<String>,
    },
    /// Install copies of roots in the token of a server: on every server with a token of its own,
    /// before the root is rotated.
    Install {
        /// The configuration of that server. With SoftHSM and some HSMs, stop the server first.
        #[arg(long)]
        config: PathBuf,
        /// The file that `kms-server roots new --copy` wrote. Destroy it afterwards.
        #[arg(long)]
        copies: PathBuf,
    },
}

/// Runs the command of the process's arguments. Prints the reason on standard error if it fails.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    run("kms-server", arguments.command.run())
}

/// Runs a program that holds secrets. Prints the reason on standard error if it fails.
pub fn run(name: &str, program: impl Future<Output = Result<(), Box<dyn Error + Send + Sync>>>) -> ExitCode {
    // I1: key material in this process must not reach a core file or another process of the same
    // user.
    if let Err(error) = forbid_dumps() {
        eprintln!("{name}: cannot switch off core dumps: {error}");
        return ExitCode::FAILURE;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("{name}: cannot start threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(program);
    // A thread that hangs in an HSM module must not delay the end.
    runtime.shutdown_timeout(Duration::from_secs(2));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}

impl Command {
    async fn run(self) -> Result<(), Box<dyn Error + Send + Sync>> {
        match self {
            Self::Run { config } => {
                let config = Config::load(&config)?;
                let server_name = config.server_name.clone().unwrap_or_else(host_name);
                let _telemetry = Telemetry::start(&config.telemetry, &server_name)?;
                if config.allow_development_island {
                    // An error, so that no log filter hides it.
                    tracing::error!(
                        island = %config.island,
                        "the configuration allows a development island (`allow_development_island`): NOT FOR REAL KEYS; its secrets and people are in one folder"
                    );
                }
                let server = Server::start(config).await?;
                tracing::info!(address = %server.local_addr()?, "listening");
                server.serve(stop_signal()).await?;
                tracing::info!("stopped");
                Ok(())
            }
            Self::Init { ceremony, state } => {
                let _telemetry = Telemetry::start(
                    &TelemetrySection { log: Some("warn".to_owned()), ..TelemetrySection::default() },
                    "ceremony",
                )?;
                let held = CeremonyPlan::read(&ceremony, &state)?.hold(&state).await?;
                println!("{}", held.summary);
                println!(
                    "Read the fingerprints aloud, compare them, and sign a print of `{}`.",
                    state.join("ceremony.txt").display()
                );
                println!("Give every custodian a copy of `{}`.", state.join("escrow.json").display());
                println!("Then start the server:\n\n    kms-server run --config {}", held.configuration.display());
                Ok(())
            }
            Self::Restored { config } => {
                let config = Config::load(&config)?;
                let _telemetry = Telemetry::start(
                    &TelemetrySection { log: Some("warn".to_owned()), ..TelemetrySection::default() },
                    "restored",
                )?;
                let history = server::declare_restored(&config).await?;
                println!(
                    "The island `{}` counts as restored, {} in all. Every invocation counter is raised before it is allocated",
                    config.island,
                    times(history.restores)
                );
                println!("from again: by {} since the ceremony. Now start the servers.", history.jump.counters());
                Ok(())
            }
            Self::Roots { command: RootsCommand::New { config, root, escrow, copies, no_copies, lost } } => {
                let config = Config::load(&config)?;
                let _telemetry = Telemetry::start(
                    &TelemetrySection { log: Some("warn".to_owned()), ..TelemetrySection::default() },
                    "roots",
                )?;
                let made =
                    server::make_root(&config, NewRootSettings { purpose: root, escrow, copies, no_copies, lost })
                        .await?;
                println!(
                    "made `{}`: {} {}",
                    made.fingerprint.label,
                    made.fingerprint.kind,
                    hex::encode(&made.fingerprint.value)
                );
                if let Some(escrow) = &made.escrow {
                    println!(
                        "It was added to `{}`: give every custodian a copy, and replace the earlier ones.",
                        escrow.display()
                    );
                }
                for copy in &made.copies {
                    println!(
                        "Install `{}` on its server with `kms-server roots install`, and destroy the file.",
                        copy.display()
                    );
                }
                println!("Then an officer runs `kms roots rotate {root}`.");
                Ok(())
            }
            Self::Roots { command: RootsCommand::Install { config, copies } } => {
                for installed in server::install_roots(&Config::load(&config)?, &copies).await? {
                    println!("installed `{}`: {} {}", installed.label, installed.kind, hex::encode(&installed.value));
                }
                Ok(())
            }
            Self::Officers {
                command: OfficersCommand::Recertify { officer, config, certificate_request, escrow, shares, out },
            } => {
                let config = Config::load(&config)?;
                let _telemetry = Telemetry::start(
                    &TelemetrySection { log: Some("warn".to_owned()), ..TelemetrySection::default() },
                    "officers",
                )?;
                let days = config.limits.principal_days();
                let recertification =
                    Recertification { officer: officer.clone(), certificate_request, escrow, shares, days };
                let issued = server::recertify_officer(&config, recertification).await?;
                kms_base::files::replace(&out, issued.pem().as_bytes(), 0o644).map_err(|error| {
                    format!("the key is certified, but `{}` cannot be written: {error}; run the command again with another --out", out.display())
                })?;
                println!(
                    "certified the new key of `{officer}`: serial number {}, valid for {days} days.",
                    hex::encode(&issued.serial)
                );
                println!(
                    "It is in `{}`. The officer's other certificates have ended. Destroy the files with the shares.",
                    out.display()
                );
                Ok(())
            }
            Self::Certificate { command: CertificateCommand::Renew { config, certificate, private_key } } => {
                let config = Config::load(&config)?;
                let _telemetry = Telemetry::start(
                    &TelemetrySection { log: Some("warn".to_owned()), ..TelemetrySection::default() },
                    "certificate",
                )?;
                let renewed = certificate.clone().unwrap_or_else(|| config.tls.certificate.clone());
                let issued = server::renew_certificate(&config, certificate.zip(private_key)).await?;
                println!(
                    "renewed `{}`: serial number {}, valid for {} days.",
                    renewed.display(),
                    hex::encode(&issued.serial),
                    config.limits.server_days()
                );
                println!("A server that runs reads it again by itself.");
                Ok(())
            }
            Self::Check { config } => check(&Config::load(&config)?).await,
        }
    }
}

async fn check(config: &Config) -> Result<(), Box<dyn Error + Send + Sync>> {
    let policy = kms_policy::load(config.policies.directory.as_deref())?;
    println!("policies: well-formed and valid; SHA-256 {}", hex::encode(policy.digest()));
    let profiles = Profiles::load(config.device_profiles.directory.as_deref())?;
    println!("device profiles: well-formed");
    for profile in profiles.all() {
        let clients: Vec<String> =
            profile.clients.iter().map(|client| format!("{} (SAP {})", client.name, client.sap)).collect();
        println!("  {}: {}; clients: {}", profile.name, profile.description, clients.join(", "));
    }
    let hsm = config.hsm.start(&config.island, &config.limits, Arc::new(ProcessPinMemory::default()))?;
    let mut missing = Vec::new();
    for token in hsm.all_tokens() {
        let usable = token.usable(Duration::from_secs(60)).await;
        // Also for a token that lacks something essential: the table says what.
        if let Some(capabilities) = token.capabilities() {
            println!("\ntoken `{}` ({}):", token.label(), capabilities.module);
            let mut table = comfy_table::Table::new();
            table.load_style(comfy_table::presets::ASCII_MARKDOWN).set_header([
                "capability",
                "needed for",
                "found",
                "used instead",
                "cost of its absence",
            ]);
            for row in capabilities.table() {
                let instead = if row.found { ["yes", "", ""] } else { ["no", row.instead, row.cost] };
                table.add_row([row.name, row.needed_for].into_iter().chain(instead));
            }
            println!("{table}");
        }
        if let Err(error) = usable {
            missing.push(error.to_string());
        }
    }
    tokio::task::spawn_blocking(move || hsm.close()).await?;
    if missing.is_empty() {
        println!("everything that is needed was found");
        return Ok(());
    }
    Err(format!("the HSM cannot be used: {}", missing.join("; ")).into())
}

fn times(number: u32) -> String {
    if number == 1 { "once".to_owned() } else { format!("{number} times") }
}

/// SIGINT or SIGTERM.
pub async fn stop_signal() {
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        tracing::error!("signals cannot be received; end the server with SIGKILL");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

fn forbid_dumps() -> rustix::io::Result<()> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
}
