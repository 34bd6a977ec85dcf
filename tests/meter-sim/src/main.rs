//! Runs simulated meters from a JSON file, or from standard input: keys never stand on the command
//! line.
//!
//! ```text
//! meter-sim [FILE]
//! ```
//!
//! The JSON has the fields of [`Simulation`]. Each listener prints `ADDRESS` on a line of its own when
//! it is ready. Ctrl-C ends it.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{Read, Write};
use std::process::ExitCode;
use std::sync::Arc;

use meter_sim::{Meter, MeterConfig, MeterDirectory, ServeOptions, serve};
use serde::Deserialize;
use tokio::net::TcpListener;
use zeroize::Zeroizing;

/// The listeners of one process.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Simulation {
    listeners: Vec<ListenerConfig>,
}

/// One TCP port: either one `meter`, or many `meters` by the wrapper's destination port.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ListenerConfig {
    /// Address and port; port 0 takes a free one.
    address: String,
    /// The only meter.
    #[serde(default)]
    meter: Option<MeterConfig>,
    /// Meters by destination port.
    #[serde(default)]
    meters: BTreeMap<u16, MeterConfig>,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("meter-sim: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let mut text = Zeroizing::new(String::new());
    match (arguments.next(), arguments.next()) {
        (None, _) => std::io::stdin().read_to_string(&mut text)?,
        (Some(path), None) => std::fs::File::open(&path).map_err(|error| format!("cannot open `{}`: {error}", path.display()))?.read_to_string(&mut text)?,
        (Some(_), Some(_)) => return Err("usage: meter-sim [FILE]".into()),
    };
    let simulation: Simulation = serde_json::from_str(&text)?;
    drop(text);
    tokio::runtime::Runtime::new()?.block_on(simulate(simulation))
}

async fn simulate(simulation: Simulation) -> Result<(), Box<dyn Error>> {
    let mut tasks = tokio::task::JoinSet::new();
    for listener in simulation.listeners {
        let directory =
            match (listener.meter, listener.meters) {
                (Some(meter), meters) if meters.is_empty() => MeterDirectory::One(Meter::new(meter)?),
                (None, meters) if !meters.is_empty() => MeterDirectory::ByDestination(Arc::new(
                    meters.into_iter().map(|(destination, meter)| Ok((destination, Meter::new(meter)?))).collect::<Result<_, meter_sim::Error>>()?,
                )),
                _ => {
                    return Err(format!("listener `{}` needs either `meter` or `meters`", listener.address).into());
                }
            };
        let socket = TcpListener::bind(&listener.address).await.map_err(|error| format!("cannot listen on `{}`: {error}", listener.address))?;
        writeln!(std::io::stdout(), "{}", socket.local_addr()?)?;
        tasks.spawn(serve(socket, directory, ServeOptions::default()));
    }
    tokio::signal::ctrl_c().await?;
    Ok(())
}
