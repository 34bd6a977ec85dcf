//! `kms-dev`: a whole development island on one machine. It simulates the meter, the vendor and the
//! PKCS#11 module. The server's own program contains none of these.

mod island;

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::Parser;
use kms_config::TelemetrySection;
use kms_server::{
    command_line::{run, stop_signal},
    telemetry::Telemetry,
};

use self::island::DevSettings;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Make a development island on this machine and serve it. It needs no other step, and is not for
/// real keys.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// Folder of the development island.
    #[arg(long, default_value = ".kms")]
    state: PathBuf,
    /// Address to listen on: of this machine only, unless `--expose` is given.
    #[arg(long, default_value = "127.0.0.1:7443")]
    listen: SocketAddr,
    /// Port of the same address for devices that enrol [default: one more than that of `--listen`]
    #[arg(long)]
    enrolment_port: Option<u16>,
    /// Permit a `--listen` address that other machines can reach. All secrets of a development
    /// island are in one folder.
    #[arg(long)]
    expose: bool,
    /// PostgreSQL database (`postgres://USER@HOST/DATABASE`) instead of SQLite in the folder.
    /// Used at the first start only.
    #[arg(long)]
    database: Option<String>,
    /// Number of meters of the sample shipment. Used at the first start only.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    meters: u64,
    /// Another PKCS#11 module than the embedded hsm-sim, for a trial. Configure it as its
    /// vendor says. Used at the first start only.
    #[arg(long)]
    module: Option<PathBuf>,
}

fn main() -> ExitCode {
    run("kms-dev", serve(Arguments::parse()))
}

async fn serve(arguments: Arguments) -> Result<(), Failure> {
    let Arguments { state, listen, enrolment_port, expose, database, meters, module } = arguments;
    if !(listen.ip().is_loopback() || expose) {
        let port = listen.port();
        return Err(format!(
            "`--listen {listen}` can be reached from other machines, and all secrets of a development island are in one folder: use 127.0.0.1:{port}, or add `--expose`"
        )
        .into());
    }
    let section = TelemetrySection { log: Some("warn".to_owned()), ..TelemetrySection::default() };
    let _telemetry = Telemetry::start(&section, "dev")?;
    // Port 0 is any free one.
    let port = enrolment_port.unwrap_or(if listen.port() == 0 { 0 } else { listen.port().wrapping_add(1) });
    let enrolment = SocketAddr::new(listen.ip(), port);
    island::run(DevSettings { state, listen, enrolment, database, meters, module }, stop_signal()).await
}
