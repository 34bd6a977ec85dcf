//! Runs simulated meters from a JSON file, or from standard input: keys are never on the command
//! line.
//!
//! ```text
//! meter-sim [FILE]
//! ```
//!
//! The JSON has the fields of [`Simulation`]. Each listener prints `ADDRESS` on a line of its own
//! when it is ready, and the seed of challenges (`METER_SIM_SEED`) on standard error. Ctrl-C ends
//! it; where the JSON names a `memory_file`, it then writes what the meters remember, for tests to
//! compare with.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use meter_sim::nonces::RepeatedNonce;
use meter_sim::{Meter, MeterConfig, MeterDirectory, Obis, ServeOptions, SymmetricKey, serve};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use zeroize::Zeroizing;

/// The listeners of one process.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Simulation {
    listeners: Vec<ListenerConfig>,
    /// The file for [`Memory`] as JSON, with keys in plaintext, written at the end.
    #[serde(default)]
    memory_file: Option<PathBuf>,
}

/// What all meters remember at the end.
#[derive(Serialize)]
struct Memory {
    meters: Vec<MeterMemory>,
    /// The number of nonces that served two different messages, in any meter.
    repeated_nonces: usize,
}

/// The keys of a meter's first security setup, in hex.
#[derive(Serialize)]
struct MeterMemory {
    system_title: String,
    guek: String,
    gak: String,
    kek: String,
    gbek: Option<String>,
}

impl MeterMemory {
    fn of(meter: &Meter) -> Option<Self> {
        let keys = meter.keys_for_inspection(Obis::SECURITY_SETUP)?;
        let text = |key: &SymmetricKey| hex::encode_upper(key.expose());
        Some(Self {
            system_title: hex::encode_upper(meter.system_title().as_bytes()),
            guek: text(&keys.guek),
            gak: text(&keys.gak),
            kek: text(&keys.kek),
            gbek: keys.gbek.as_ref().map(text),
        })
    }
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
        (Some(path), None) => std::fs::File::open(&path)
            .map_err(|error| format!("cannot open `{}`: {error}", path.display()))?
            .read_to_string(&mut text)?,
        (Some(_), Some(_)) => return Err("usage: meter-sim [FILE]".into()),
    };
    let simulation: Simulation = serde_json::from_str(&text)?;
    drop(text);
    eprintln!("meter-sim: the seed of challenges is METER_SIM_SEED={}", meter_sim::challenge_seed());
    tokio::runtime::Runtime::new()?.block_on(simulate(simulation))
}

async fn simulate(simulation: Simulation) -> Result<(), Box<dyn Error>> {
    let mut tasks = tokio::task::JoinSet::new();
    let mut all = Vec::new();
    for listener in simulation.listeners {
        let directory = match (listener.meter, listener.meters) {
            (Some(meter), meters) if meters.is_empty() => {
                let meter = Meter::new(meter)?;
                all.push(meter.clone());
                MeterDirectory::One(meter)
            }
            (None, meters) if !meters.is_empty() => {
                let meters: BTreeMap<u16, Meter> = meters
                    .into_iter()
                    .map(|(destination, meter)| Ok((destination, Meter::new(meter)?)))
                    .collect::<Result<_, meter_sim::Error>>()?;
                all.extend(meters.values().cloned());
                MeterDirectory::ByDestination(Arc::new(meters))
            }
            _ => {
                return Err(format!("listener `{}` needs either `meter` or `meters`", listener.address).into());
            }
        };
        let socket = TcpListener::bind(&listener.address)
            .await
            .map_err(|error| format!("cannot listen on `{}`: {error}", listener.address))?;
        writeln!(std::io::stdout(), "{}", socket.local_addr()?)?;
        tasks.spawn(serve(socket, directory, ServeOptions::default()));
    }
    tokio::signal::ctrl_c().await?;
    if let Some(path) = simulation.memory_file {
        let memory = Memory {
            meters: all.iter().filter_map(MeterMemory::of).collect(),
            repeated_nonces: RepeatedNonce::find(&all).len(),
        };
        std::fs::write(path, serde_json::to_vec(&memory)?)?;
    }
    Ok(())
}
