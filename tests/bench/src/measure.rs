//! Load: so many calls in flight, or so many a second, and how long each took.

use std::{
    fs,
    future::Future,
    time::{Duration, Instant},
};

use futures::{StreamExt as _, future, stream::FuturesUnordered};

use crate::Failure;

/// What a measurement came to.
pub(crate) struct Run {
    /// Units of work: keys, meters or frames.
    pub(crate) units: u64,
    pub(crate) calls: u64,
    pub(crate) elapsed: Duration,
    latencies: Vec<Duration>,
    /// Cores that the server used on average.
    pub(crate) server_cores: f64,
    /// Cores that this program used on average.
    pub(crate) client_cores: f64,
    /// Cores that everything else on the machine used on average: what disturbs the measurement.
    pub(crate) other_cores: f64,
}

impl Run {
    /// Units a second.
    pub(crate) fn rate(&self) -> f64 {
        per_second(self.units, self.elapsed)
    }

    /// The latency that this share of the calls stays within, in milliseconds.
    pub(crate) fn latency_ms(&self, share: f64) -> f64 {
        let at = (self.latencies.len() as f64 * share) as usize;
        self.latencies.get(at.min(self.latencies.len().saturating_sub(1))).map_or(f64::NAN, Duration::as_secs_f64)
            * 1_000.0
    }
}

/// A measurement of the server with this process id.
pub(crate) struct Load {
    pub(crate) server: u32,
}

impl Load {
    /// Keeps `lanes` calls in flight for `time`, or until every lane has been told that there is no
    /// more. A call gives the units that it did.
    pub(crate) async fn in_flight<Call>(
        &self,
        lanes: usize,
        time: Duration,
        call: impl Fn() -> Call,
    ) -> Result<Run, Failure>
    where
        Call: Future<Output = Result<Option<u64>, Failure>>,
    {
        let (begun, cpu) = (Instant::now(), self.cpu());
        let call = &call;
        let lane = || async move {
            let (mut units, mut latencies) = (0, Vec::new());
            while begun.elapsed() < time {
                let asked = Instant::now();
                let Some(done) = call().await? else { break };
                latencies.push(asked.elapsed());
                units += done;
            }
            Ok::<_, Failure>((units, latencies))
        };
        let lanes = future::try_join_all((0..lanes).map(|_| lane())).await?;
        let units = lanes.iter().map(|(units, _)| units).sum();
        Ok(self.run(units, lanes.into_iter().flat_map(|(_, latencies)| latencies).collect(), begun, cpu))
    }

    /// Sends `rate` calls a second for `time`, whatever comes back. A call's latency counts from
    /// when it should have been sent, so that calls that wait for a stalled sender are not
    /// forgotten.
    pub(crate) async fn paced<Call>(&self, rate: u32, time: Duration, call: impl Fn() -> Call) -> Result<Run, Failure>
    where
        Call: Future<Output = Result<Option<u64>, Failure>>,
    {
        let (begun, cpu) = (Instant::now(), self.cpu());
        let pause = Duration::from_secs(1) / rate;
        let mut next = begun;
        let (mut units, mut latencies, mut waiting) = (0, Vec::new(), FuturesUnordered::new());
        loop {
            while next <= Instant::now() && next - begun < time {
                let (due, call) = (next, call());
                waiting.push(async move { call.await.map(|done| (done.unwrap_or_default(), due.elapsed())) });
                next += pause;
            }
            let ended = next - begun >= time;
            if ended && waiting.is_empty() {
                break;
            }
            tokio::select! {
                Some(answered) = waiting.next(), if !waiting.is_empty() => {
                    let (done, latency) = answered?;
                    units += done;
                    latencies.push(latency);
                }
                () = tokio::time::sleep_until(next.into()), if !ended => {}
            }
        }
        Ok(self.run(units, latencies, begun, cpu))
    }

    fn run(&self, units: u64, mut latencies: Vec<Duration>, begun: Instant, before: ProcessorTime) -> Run {
        let elapsed = begun.elapsed();
        latencies.sort_unstable();
        let now = self.cpu();
        let cores = |of: fn(&ProcessorTime) -> f64| (of(&now) - of(&before)) / elapsed.as_secs_f64();
        let (server_cores, client_cores) = (cores(|time| time.server), cores(|time| time.client));
        let other_cores = (cores(|time| time.machine) - server_cores - client_cores).max(0.0);
        Run { units, calls: latencies.len() as u64, elapsed, latencies, server_cores, client_cores, other_cores }
    }

    fn cpu(&self) -> ProcessorTime {
        ProcessorTime {
            server: cpu_seconds(&self.server.to_string()),
            client: cpu_seconds("self"),
            machine: busy_seconds(),
        }
    }
}

/// Processor seconds so far.
struct ProcessorTime {
    server: f64,
    client: f64,
    machine: f64,
}

/// So many in this time, a second.
pub(crate) fn per_second(count: u64, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64()
}

/// User and system time of a process, from /proc/PID/stat (proc(5), fields 14 and 15, in hundredths
/// of a second on Linux).
fn cpu_seconds(process: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // The second field, in parentheses, may have blanks in it.
    let fields = text.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Time that the processors of the machine were not idle, from /proc/stat (proc(5): user, nice,
/// system, idle, iowait, irq, softirq, steal).
fn busy_seconds() -> f64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks: Vec<f64> = text
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .take(8)
        .filter_map(|ticks| ticks.parse().ok())
        .collect();
    ticks.iter().enumerate().filter(|(field, _)| !matches!(field, 3 | 4)).map(|(_, ticks)| ticks).sum::<f64>() / 100.0
}

/// A field of /proc/PID/status in KiB, such as `VmRSS`, as MiB.
pub(crate) fn memory_mib(process: &str, field: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).map_or(f64::NAN, |kib| kib / 1024.0)
}

/// Numbers that look random, the same in every run (SplitMix64).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number from 1 to `most`.
    pub(crate) fn up_to(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (value ^ (value >> 31)) % most + 1
    }

    /// So many different numbers from 1 to `most`.
    pub(crate) fn distinct(&mut self, count: usize, most: u64) -> Vec<u64> {
        let mut chosen = std::collections::HashSet::with_capacity(count);
        while chosen.len() < count && (chosen.len() as u64) < most {
            chosen.insert(self.up_to(most));
        }
        chosen.into_iter().collect()
    }
}
