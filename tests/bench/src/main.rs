//! Measures the key management system as its users would feel it, in one run, and prints one table
//! (docs/performance.md).
//!
//! For each PKCS#11 module: cycles against the module itself; then an island on it, made and served
//! by the release binaries, with a load generator on the same machine that speaks gRPC with mTLS.
//! Goals are printed beside the figures; missing one is no error.

mod conditions;
mod fairness;
mod figure;
mod frames;
mod grants;
mod island;
mod measure;
mod module;
mod raw;
mod report;
mod shipment;
mod transfers;
mod unfinished;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand, ValueEnum};

use self::{
    conditions::Conditions,
    fairness::{FLOOD_CALLS, FLOOD_METERS, Fairness, NEIGHBOUR_PACE},
    figure::shown,
    frames::Frames,
    grants::Grants,
    island::{FLOODER, Island},
    measure::{Random, Run, memory_mib, per_second},
    module::Module,
    raw::{Rates, Raw},
    report::{Goal, Report},
};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Measures the key management system and prints one table.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Internal>,
    /// Meters of the island on hsm-sim, with four keys each.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(2_000..))]
    meters: u64,
    /// Meters of the island on SoftHSM2, which is slower at everything.
    #[arg(long, default_value_t = 50_000, value_parser = clap::value_parser!(u64).range(2_000..))]
    softhsm_meters: u64,
    /// Seconds that each rate is measured for.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// 20,000 meters, or 5,000 on SoftHSM2, and two seconds: shows that it works, not how fast it
    /// is.
    #[arg(long)]
    quick: bool,
    /// Only this module.
    #[arg(long)]
    module: Option<Module>,
    /// Only these groups of figures, and the import, which all of them need. Each group finds what
    /// those before it left: compare runs of the same groups only.
    #[arg(long, value_enum, value_name = "GROUP", value_delimiter = ',')]
    only: Vec<Group>,
    /// Where the islands are made; on the kind of disk that a server would have.
    #[arg(long)]
    directory: Option<PathBuf>,
    /// The load average before the programs were built, for the table.
    #[arg(long, hide = true)]
    load_before: Option<f64>,
    /// What is printed.
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Subcommand)]
enum Internal {
    /// Measures a module in this process, and prints JSON.
    #[command(hide = true)]
    Raw { path: PathBuf, milliseconds: u64 },
}

/// Figures that are measured together, in the order in which they are measured.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// Cycles against the module itself.
    Raw,
    /// Sessions in batches and single ones.
    Grants,
    /// Single sessions beside another head-end's flood.
    Fairness,
    /// Frames in the HSM.
    Frames,
    /// A campaign's plan, and key transfers.
    Rotation,
    /// Memory that unfinished requests hold.
    Unfinished,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    Table,
    Json,
}

/// One thread: the load generator shall not take more of the machine than it needs.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match Arguments::parse().run().await {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("kms-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

impl Arguments {
    async fn run(mut self) -> Result<String, Failure> {
        if let Some(Internal::Raw { path, milliseconds }) = &self.command {
            return Ok(serde_json::to_string(&Raw::in_process(path, Duration::from_millis(*milliseconds))?)?);
        }
        if self.quick {
            (self.meters, self.softhsm_meters, self.seconds) = (20_000, 5_000, 2);
        }
        let directory = match &self.directory {
            Some(directory) => tempfile::tempdir_in(directory)?,
            None => tempfile::tempdir()?,
        };
        let modules: Vec<Module> =
            self.module.map_or_else(|| vec![Module::HsmSim, Module::Softhsm2], |module| vec![module]);
        // What is missing is said before the first minute is spent.
        modules.iter().try_for_each(|module| module.path().map(drop))?;
        let mut conditions = Conditions::now(directory.path(), self.load_before).await?;
        for module in &modules {
            conditions.sizes.push(format!("{} meters on {}", shown(self.meters_of(*module) as f64), module.name()));
        }
        conditions
            .sizes
            .push(format!("{} s each; batches of {BATCH} meters, two in flight, two keys a meter", self.seconds));
        if !self.only.is_empty() {
            let groups: Vec<String> = self
                .only
                .iter()
                .filter_map(Group::to_possible_value)
                .map(|group| group.get_name().to_owned())
                .collect();
            conditions.sizes.push(format!("only {}", groups.join(", ")));
        }
        let time = Duration::from_secs(self.seconds);

        // All direct cycles first, while nothing else of this program runs.
        let mut raws = Vec::new();
        for module in modules {
            let raw = if self.measures(Group::Raw) {
                let folder = directory.path().join(format!("raw-{}", module.name()));
                let raw = Raw::measure(module, &folder, time.min(LONGEST_RAW))?;
                conditions.modules.push(format!("{} ({})", module.name(), raw.library));
                Some(raw)
            } else {
                conditions.modules.push(module.name().to_owned());
                None
            };
            raws.push((module, raw));
        }
        let mut report = Report::new(conditions);
        for (module, raw) in raws {
            if let Some(raw) = &raw {
                report_raw(&mut report, module, raw);
            }
            let folder = directory.path().join(module.name());
            std::fs::create_dir(&folder)?;
            eprintln!("  {:<8} holding the ceremony", module.name());
            let island = Island::make(module, &folder).await?;
            Measuring {
                island: &island,
                report: &mut report,
                module,
                meters: self.meters_of(module),
                time,
                raw: &raw.map(|raw| raw.rates).unwrap_or_default(),
            }
            .all(|group| self.measures(group))
            .await?;
            drop(island);
            std::fs::remove_dir_all(&folder)?;
            if self.measures(Group::Unfinished) {
                report_unfinished(&mut report, module, &folder).await?;
            }
        }
        Ok(match self.output {
            Output::Table => report.to_text(),
            Output::Json => report.to_json()?,
        })
    }

    fn measures(&self, group: Group) -> bool {
        self.only.is_empty() || self.only.contains(&group)
    }

    const fn meters_of(&self, module: Module) -> u64 {
        match module {
            Module::HsmSim => self.meters,
            Module::Softhsm2 => self.softhsm_meters,
        }
    }
}

/// On an island of its own, which holds nothing else.
async fn report_unfinished(report: &mut Report, module: Module, folder: &std::path::Path) -> Result<(), Failure> {
    std::fs::create_dir(folder)?;
    let held = unfinished::hold(&Island::make(module, folder).await?).await?;
    std::fs::remove_dir_all(folder)?;
    let name = format!("2 connections × {} unfinished requests, above that before", unfinished::REQUESTS);
    report.add(MEMORY, &name, "MiB", module, held);
    report.goal(MEMORY, &name, None, Goal::Below(32.0));
    Ok(())
}

fn report_raw(report: &mut Report, module: Module, Raw { rates, octets_left, .. }: &Raw) {
    for (name, rate) in rates {
        report.add(RAW, name, "cycles/s", module, *rate);
    }
    let rate = |name: &str| rates.get(name).copied().unwrap_or(f64::NAN);
    report.add(RAW, TWO_THREADS, "", module, rate(raw::STORED_TWO) / rate(raw::STORED));
    report.add(RAW, "the stored cycle with one C_WrapKey, computed", "cycles/s", module, one_call_rate(rates));
    report.add(RAW, "memory that a cycle leaves behind", "octets", module, *octets_left);
    report.goal(RAW, raw::STORED, Some(Module::HsmSim), Goal::AtLeast(250_000.0));
    report.goal(RAW, TWO_THREADS, Some(Module::HsmSim), Goal::AtLeast(1.6));
}

/// The crate asks for the length before it wraps: two calls of C_WrapKey for each wrap. A second
/// wrap takes twice what one call takes, so half of that is what a program saves that knows the
/// length.
fn one_call_rate(rates: &Rates) -> f64 {
    let seconds = |name: &str| rates.get(name).map_or(f64::NAN, |rate| rate.recip());
    let (once, twice) = (seconds(raw::STORED), seconds(raw::STORED_WRAPPED_TWICE));
    (once - (twice - once) / 2.0).recip()
}

/// The measurements of one island.
struct Measuring<'a> {
    island: &'a Island,
    report: &'a mut Report,
    module: Module,
    meters: u64,
    time: Duration,
    raw: &'a Rates,
}

impl Measuring<'_> {
    async fn all(mut self, measures: impl Fn(Group) -> bool) -> Result<(), Failure> {
        let devices = self.import().await?;
        if measures(Group::Grants) {
            self.first_touch().await?;
            self.batches().await?;
            self.singles().await?;
        }
        if measures(Group::Fairness) {
            self.fairness().await?;
        }
        if measures(Group::Frames) {
            self.frames(&devices).await?;
        }
        if measures(Group::Rotation) {
            self.campaign().await?;
            self.transfers().await?;
        }
        self.memory("after all measurements", "VmRSS");
        self.memory("at its highest", "VmHWM");
        Ok(())
    }

    /// All meters in a few shipments; the plaintext keys of the last, small one.
    async fn import(&mut self) -> Result<Vec<u8>, Failure> {
        self.memory("idle, without meters", "VmRSS");
        let (small, large) = (self.meters / 20, self.meters / 5);
        let mut next = 1;
        let mut imported = Vec::new();
        let mut before_last_ones = (0, f64::NAN);
        while next <= self.meters {
            let meters = if next == 1 { small } else { large.min(self.meters - next + 1) };
            imported.push(self.island.import(next, meters, None).await?);
            match imported.len() {
                1 => self.memory("at its highest, importing 5 % of the meters in one shipment", "VmHWM"),
                2 => {
                    self.memory("at its highest, importing 20 % of the meters in one shipment", "VmHWM");
                    before_last_ones = (next + meters, self.memory_mib("VmRSS"));
                }
                _ => {}
            }
            next += meters;
        }
        self.memory("after the import of all", "VmRSS");
        // What stays is the newest generation of each row (I5); the rest was there after the first
        // two shipments.
        let (meters, memory) = (next - before_last_ones.0, self.memory_mib("VmRSS") - before_last_ones.1);
        self.report.add(
            MEMORY,
            "growth for each meter of the other shipments",
            "octets",
            self.module,
            memory * 1_048_576.0 / meters as f64,
        );
        let (meters, time) =
            imported.iter().fold((0, Duration::ZERO), |(meters, time), one| (meters + one.meters, time + one.time));
        let rate = per_second(meters, time);
        let name = "upload, verification and import, four keys a meter";
        self.report.add(IMPORT, name, "meters/s", self.module, rate);
        self.report.goal(IMPORT, name, Some(Module::HsmSim), Goal::AtLeast(5_000.0));
        let last = imported.last().map_or(f64::NAN, |one| per_second(one.meters, one.time));
        self.report.add(IMPORT, "the last shipment alone", "meters/s", self.module, last);
        // Each key is unwrapped, wrapped for storage and for its fingerprint, destroyed: the cycle
        // with two wraps.
        self.report.add(
            IMPORT,
            "keys ÷ direct cycles with two wraps",
            "",
            self.module,
            4.0 * rate / self.raw_rate(raw::STORED_WRAPPED_TWICE),
        );
        let size = self.island.database_size().await?;
        self.report.add(DATABASE, "after the import: pages in use", "octets/key", self.module, size.used / self.keys());
        let mut devices = Vec::new();
        self.island.import(self.meters + 1, KNOWN_METERS, Some(&mut devices)).await?;
        Ok(devices)
    }

    /// The first grant of each key to the head-end writes the meter's row.
    async fn first_touch(&mut self) -> Result<(), Failure> {
        let mut random = Random::new(4);
        let mut left = usize::try_from(self.meters)? / 20;
        let run = Grants::new(self.island)
            .batches(UNLIMITED, || {
                let size = BATCH.min(left);
                left -= size;
                random.distinct(size, self.meters)
            })
            .await?;
        self.report.add(BATCHES, "first touch, random meters", "keys/s", self.module, run.rate());
        let mut next = 1;
        let run = Grants::new(self.island)
            .batches(UNLIMITED, || {
                let first = next;
                next = (next + BATCH as u64).min(self.meters + 1);
                (first..next).collect()
            })
            .await?;
        self.report.add(BATCHES, "first touch, neighbours", "keys/s", self.module, run.rate());
        self.report.processor(self.module, "first touch, neighbours", &run);
        let size = self.island.database_size().await?;
        let name = "after one grant of every meter: the file";
        self.report.add(DATABASE, name, "octets/key", self.module, size.file / self.keys());
        self.report.goal(DATABASE, name, None, Goal::Below(400.0));
        self.report.add(
            DATABASE,
            "after one grant of every meter: pages in use",
            "octets/key",
            self.module,
            size.used / self.keys(),
        );
        Ok(())
    }

    async fn batches(&mut self) -> Result<(), Failure> {
        let before = self.island.database_size().await?;
        let mut random = Random::new(5);
        let run = Grants::new(self.island).batches(self.time, || random.distinct(BATCH, self.meters)).await?;
        let after = self.island.database_size().await?;
        self.batch("random meters", &run, 60_000.0);
        let meters = (run.units / grants::KEYS) as f64;
        self.report.add(
            DATABASE,
            "growth for each meter of a batch grant",
            "octets",
            self.module,
            (after.used - before.used) / meters,
        );
        let mut random = Random::new(6);
        let most = self.meters.saturating_sub(BATCH as u64).max(1);
        let run = Grants::new(self.island)
            .batches(self.time, || {
                let first = random.up_to(most);
                (first..first + BATCH as u64).collect()
            })
            .await?;
        self.batch("neighbours", &run, 100_000.0);
        Ok(())
    }

    fn batch(&mut self, which: &str, run: &Run, goal: f64) {
        let (name, ratio, strict) = (
            format!("steady state, {which}"),
            format!("{which}: keys ÷ direct stored cycles"),
            format!("{which}: keys ÷ direct stored cycles with one C_WrapKey, computed"),
        );
        self.report.add(BATCHES, &name, "keys/s", self.module, run.rate());
        self.report.goal(BATCHES, &name, Some(Module::HsmSim), Goal::AtLeast(goal));
        self.report.add(BATCHES, &ratio, "", self.module, run.rate() / self.raw_rate(raw::STORED));
        self.report.goal(BATCHES, &ratio, Some(Module::Softhsm2), Goal::AtLeast(0.7));
        self.report.add(BATCHES, &strict, "", self.module, run.rate() / one_call_rate(self.raw));
        self.report.processor(self.module, &format!("batches, {which}"), run);
    }

    async fn singles(&mut self) -> Result<(), Failure> {
        let before = self.island.database_size().await?;
        let run = Grants::new(self.island).singles(IN_FLIGHT, self.time, self.meters).await?;
        let after = self.island.database_size().await?;
        let name = format!("{IN_FLIGHT} in flight");
        self.report.add(SINGLES, &name, "grants/s", self.module, per_second(run.calls, run.elapsed));
        self.report.goal(SINGLES, &name, Some(Module::HsmSim), Goal::AtLeast(5_000.0));
        self.latencies(SINGLES, &name, &run);
        self.report.processor(self.module, "single grants, 32 in flight", &run);
        self.report.add(
            DATABASE,
            "growth for each single grant",
            "octets",
            self.module,
            (after.used - before.used) / run.calls as f64,
        );

        let run = Grants::new(self.island).paced(PACE, self.time, self.meters).await?;
        let name = format!("{} a second", shown(f64::from(PACE)));
        self.latencies(SINGLES, &name, &run);
        self.report.goal(SINGLES, &format!("{name}: p99 of a call"), Some(Module::HsmSim), Goal::Below(10.0));
        self.report.processor(self.module, "single grants, 1,000 a second", &run);
        Ok(())
    }

    /// What another head-end sees while one floods.
    async fn fairness(&mut self) -> Result<(), Failure> {
        let first = self.meters + KNOWN_METERS + 1;
        self.island.import_for(FLOODER, first, FLOOD_METERS, None).await?;
        let Fairness { quiet, flooded, flood_rate } =
            Fairness::measure(self.island, self.time, self.meters, first).await?;
        let name = format!("{NEIGHBOUR_PACE} a second");
        self.latencies(FAIRNESS, &format!("{name}, quiet"), &quiet);
        let flood = format!("{name}, beside {FLOOD_CALLS} batches of {} meters", shown(FLOOD_METERS as f64));
        self.latencies(FAIRNESS, &flood, &flooded);
        for (which, share, most) in [("p50", 0.5, 5.0), ("p99", 0.99, 10.0)] {
            let ratio = format!("{which} beside the flood ÷ {which} in the quiet");
            self.report.add(FAIRNESS, &ratio, "", self.module, flooded.latency_ms(share) / quiet.latency_ms(share));
            self.report.goal(FAIRNESS, &ratio, None, Goal::Below(most));
        }
        self.report.add(FAIRNESS, "what the flood gets meanwhile", "keys/s", self.module, flood_rate);
        self.report.processor(self.module, "single grants beside a flood", &flooded);
        Ok(())
    }

    async fn frames(&mut self, devices: &[u8]) -> Result<(), Failure> {
        let frames = Frames::prepare(self.island, self.meters, self.meters + 1, devices).await?;
        for (lanes, size) in [(IN_FLIGHT, 1), (2, 100), (2, 1_000)] {
            let how = if size == 1 {
                format!("one a call, {lanes} in flight")
            } else {
                format!("{} a call, {lanes} in flight", shown(size as f64))
            };
            let run = frames.protect(lanes, size, self.time / 2).await?;
            self.report.add(FRAMES, format!("protect, {how}"), "frames/s", self.module, run.rate());
            self.latencies(FRAMES, &format!("protect, {how}"), &run);
            self.report.processor(self.module, &format!("protect, {how}"), &run);
            let run = frames.unprotect(lanes, size, self.time / 2).await?;
            self.report.add(FRAMES, format!("unprotect, {how}"), "frames/s", self.module, run.rate());
            self.latencies(FRAMES, &format!("unprotect, {how}"), &run);
            self.report.processor(self.module, &format!("unprotect, {how}"), &run);
        }
        Ok(())
    }

    /// The plan of a rotation over every meter.
    async fn campaign(&mut self) -> Result<(), Failure> {
        let planned = self.island.plan_campaign().await?;
        let name = format!("planning of {} slots", shown(planned.meters as f64));
        self.report.add(TRANSFERS, &name, "s", self.module, planned.time.as_secs_f64());
        self.report.add(TRANSFERS, "slots planned", "slots/s", self.module, per_second(planned.meters, planned.time));
        self.report.add(
            TRANSFERS,
            "memory at its highest while planning, above that before",
            "MiB",
            self.module,
            planned.memory_mib,
        );
        Ok(())
    }

    /// New keys for meters. Last: each meter has one transfer under way then.
    async fn transfers(&mut self) -> Result<(), Failure> {
        let run = self.island.prepare_transfers(self.time, self.meters).await?;
        self.report.add(
            TRANSFERS,
            "key_transfer prepared, 1,000 a call, 4 in flight",
            "keys/s",
            self.module,
            run.rate(),
        );
        self.report.processor(self.module, "key_transfer prepared", &run);
        // The server derives by SP 800-108 where the module has it.
        let raw =
            if self.raw.contains_key(raw::TRANSFER_SP800_108) { raw::TRANSFER_SP800_108 } else { raw::TRANSFER_CBC };
        let ratio = "key_transfer prepared ÷ direct cycles of a new key for a meter";
        self.report.add(TRANSFERS, ratio, "", self.module, run.rate() / self.raw_rate(raw));
        self.report.goal(TRANSFERS, ratio, Some(Module::Softhsm2), Goal::AtLeast(0.7));
        Ok(())
    }

    fn latencies(&mut self, group: &'static str, name: &str, run: &Run) {
        self.report.add(group, format!("{name}: p50 of a call"), "ms", self.module, run.latency_ms(0.5));
        self.report.add(group, format!("{name}: p99 of a call"), "ms", self.module, run.latency_ms(0.99));
    }

    fn memory(&mut self, when: &str, field: &str) {
        self.report.add(MEMORY, when, "MiB", self.module, self.memory_mib(field));
    }

    fn memory_mib(&self, field: &str) -> f64 {
        memory_mib(&self.island.load.server.to_string(), field)
    }

    fn raw_rate(&self, name: &str) -> f64 {
        self.raw.get(name).copied().unwrap_or(f64::NAN)
    }

    /// Key versions in the database.
    fn keys(&self) -> f64 {
        self.meters as f64 * 4.0
    }
}

const TWO_THREADS: &str = "unwrap + wrap + destroy: 2 threads ÷ 1 thread";
const RAW: &str = "PKCS#11 cycles against the module itself";
const IMPORT: &str = "shipment import";
const BATCHES: &str = "session grants in batches";
const SINGLES: &str = "single session grants";
const FAIRNESS: &str = "single session grants of one head-end while another floods";
const FRAMES: &str = "frames in the HSM";
const TRANSFERS: &str = "rotation";
const MEMORY: &str = "memory of the server";
const DATABASE: &str = "database";
/// Meters of one batch call.
const BATCH: usize = 2_000;
const IN_FLIGHT: usize = 32;
/// Single grants a second.
const PACE: u32 = 1_000;
/// Simulated meters, whose keys the load generator knows.
const KNOWN_METERS: u64 = 1_000;
/// For work that ends by itself.
const UNLIMITED: Duration = Duration::from_secs(24 * 3_600);
const LONGEST_RAW: Duration = Duration::from_secs(3);
