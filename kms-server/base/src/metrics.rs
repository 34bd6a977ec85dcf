//! The server's metrics. Each is explained in docs/operations.md.
//!
//! Attributes have few values: results, actions, methods. They never name a meter, a principal or a
//! key. A batch is counted with one call, so a key costs nothing.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

use kms_hsm::HsmError;
use opentelemetry::{
    KeyValue, StringValue, global,
    metrics::{Counter, Gauge, Histogram, UpDownCounter},
};

use crate::error::ServiceError;

/// All instruments. Without a meter provider they keep nothing.
pub struct Metrics {
    rpc_duration: Histogram<f64>,
    grants: Counter<u64>,
    granted_meters: Counter<u64>,
    granted_keys: Counter<u64>,
    frames: Counter<u64>,
    hsm_errors: Counter<u64>,
    commit_duration: Histogram<f64>,
    commit_acts: Histogram<u64>,
    acts_waiting: UpDownCounter<i64>,
    refusals: Counter<u64>,
    bounds_met: Counter<u64>,
    counter_chunks: Counter<u64>,
    ready: Gauge<u64>,
}

/// Which way a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameDirection {
    /// To a meter.
    Protect,
    /// From a meter.
    Unprotect,
}

/// The instruments of this process. Made at the first use, which must come after
/// `Telemetry::start` of kms-server.
pub fn metrics() -> &'static Metrics {
    static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);
    &METRICS
}

impl Metrics {
    fn new() -> Self {
        let meter = global::meter("kms-server");
        let counter = |name: &'static str, unit: &'static str, description: &'static str| {
            meter.u64_counter(name).with_unit(unit).with_description(description).build()
        };
        let seconds = |name: &'static str, description: &'static str| {
            meter
                .f64_histogram(name)
                .with_unit("s")
                .with_description(description)
                .with_boundaries(SECONDS.to_vec())
                .build()
        };
        Self {
            rpc_duration: seconds("rpc.server.call.duration", "Time from a call's headers to its last octet"),
            grants: counter(
                "kms.grants",
                "{grant}",
                "Grants that were answered with keys: a session, or a chunk of a batch",
            ),
            granted_meters: counter("kms.grant.meters", "{meter}", "Meters that keys were asked for"),
            granted_keys: counter("kms.grant.keys", "{key}", "Keys that left wrapped for a grantee"),
            frames: counter("kms.frames", "{frame}", "Frames to be protected or opened in the HSM"),
            hsm_errors: counter("kms.hsm.errors", "{error}", "Errors of the HSM that reached a use case"),
            commit_duration: seconds("kms.commit.duration", "Time of a transaction of the writer, with its attempts"),
            commit_acts: meter
                .u64_histogram("kms.commit.acts")
                .with_unit("{act}")
                .with_description("Acts that were committed together")
                .with_boundaries(vec![0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0])
                .build(),
            acts_waiting: meter
                .i64_up_down_counter("kms.commit.queue.length")
                .with_unit("{act}")
                .with_description("Acts that wait for the writer")
                .build(),
            refusals: counter(
                "kms.refusals",
                "{refusal}",
                "Acts and parts of acts that were refused, as the audit log counts them",
            ),
            bounds_met: counter(
                "kms.bounds.met",
                "{refusal}",
                "Times that a bound of the server was met, by its name in the configuration",
            ),
            counter_chunks: counter(
                "kms.counter.chunks",
                "{chunk}",
                "Chunks of invocation counters that were reserved",
            ),
            ready: meter
                .u64_gauge("kms.ready")
                .with_unit("1")
                .with_description("1 while tokens and database can be used, else 0")
                .build(),
        }
    }

    /// A call was answered.
    pub fn rpc(&self, method: StringValue, status: &'static str, took: Duration) {
        let (method, system) = (KeyValue::new("rpc.method", method), KeyValue::new("rpc.system.name", "grpc"));
        let code = KeyValue::new("rpc.response.status_code", status);
        let took = took.as_secs_f64();
        if is_server_error(status) {
            self.rpc_duration.record(took, &[method, system, code, KeyValue::new("error.type", status)]);
        } else {
            self.rpc_duration.record(took, &[method, system, code]);
        }
    }

    /// A grant was answered, with this many meters and keys.
    pub fn granted(&self, replayed: bool, meters: usize, keys: usize) {
        self.grants.add(1, &[KeyValue::new("kms.grant.replayed", replayed)]);
        self.granted_meters.add(wide(meters), &[]);
        self.granted_keys.add(wide(keys), &[]);
    }

    /// Meters of a request got nothing.
    pub fn grant_refused<'a>(&self, errors: impl Iterator<Item = &'a ServiceError>) {
        for (status, count) in by_status(errors).into_iter() {
            self.granted_meters.add(count, &[KeyValue::new("error.type", status)]);
        }
    }

    /// Frames were protected or opened, or not.
    pub fn frames<'a, T: 'a>(
        &self,
        direction: FrameDirection,
        outcomes: impl Iterator<Item = &'a Result<T, ServiceError>> + Clone,
    ) {
        let direction = || {
            let direction = match direction {
                FrameDirection::Protect => "protect",
                FrameDirection::Unprotect => "unprotect",
            };
            KeyValue::new("kms.frame.direction", direction)
        };
        let done = outcomes.clone().filter(|outcome| outcome.is_ok()).count();
        self.frames.add(wide(done), &[direction()]);
        for (status, count) in by_status(outcomes.filter_map(|outcome| outcome.as_ref().err())) {
            self.frames.add(count, &[direction(), KeyValue::new("error.type", status)]);
        }
    }

    /// An error of the HSM reached a use case.
    pub fn hsm_error(&self, error: &HsmError) {
        self.hsm_errors.add(1, &[KeyValue::new("error.type", error.name().into_owned())]);
    }

    /// An act joined the queue of the writer.
    pub fn act_queued(&self) {
        self.acts_waiting.add(1, &[]);
    }

    /// The writer has taken acts from its queue.
    pub fn acts_taken(&self, acts: usize) {
        self.acts_waiting.add(-i64::try_from(acts).unwrap_or(i64::MAX), &[]);
    }

    /// A transaction of the writer ended.
    pub fn committed(&self, acts: usize, began: Instant, succeeded: bool) {
        let took = began.elapsed().as_secs_f64();
        if succeeded {
            self.commit_duration.record(took, &[]);
        } else {
            self.commit_duration.record(took, &[KeyValue::new("error.type", "store")]);
        }
        self.commit_acts.record(wide(acts), &[]);
    }

    /// Refusals were counted.
    pub fn refused(&self, refusals: u64, security_events: u64) {
        for (count, security_event) in [(refusals, false), (security_events, true)] {
            if count > 0 {
                self.refusals.add(count, &[KeyValue::new("kms.security_event", security_event)]);
            }
        }
    }

    /// The bound with this name was met.
    pub(crate) fn bound_met(&self, name: &'static str) {
        self.bounds_met.add(1, &[KeyValue::new("kms.bound", name)]);
    }

    /// Chunks of counters were reserved.
    pub fn chunks_reserved(&self, chunks: usize) {
        if chunks > 0 {
            self.counter_chunks.add(wide(chunks), &[]);
        }
    }

    /// Whether the server can work.
    pub fn ready(&self, ready: bool) {
        self.ready.record(u64::from(ready), &[]);
    }
}

/// Errors counted by the name of their status; there are few.
fn by_status<'a>(errors: impl Iterator<Item = &'a ServiceError>) -> Vec<(&'static str, u64)> {
    let mut counts: Vec<(&'static str, u64)> = Vec::new();
    for error in errors {
        let status = status_name(error.code());
        match counts.iter_mut().find(|(known, _)| *known == status) {
            Some((_, count)) => *count += 1,
            None => counts.push((status, 1)),
        }
    }
    counts
}

fn wide(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

/// The name of a gRPC status code.
pub const fn status_name(code: i32) -> &'static str {
    match code {
        0 => "OK",
        1 => "CANCELLED",
        3 => "INVALID_ARGUMENT",
        4 => "DEADLINE_EXCEEDED",
        5 => "NOT_FOUND",
        6 => "ALREADY_EXISTS",
        7 => "PERMISSION_DENIED",
        8 => "RESOURCE_EXHAUSTED",
        9 => "FAILED_PRECONDITION",
        10 => "ABORTED",
        11 => "OUT_OF_RANGE",
        12 => "UNIMPLEMENTED",
        13 => "INTERNAL",
        14 => "UNAVAILABLE",
        15 => "DATA_LOSS",
        16 => "UNAUTHENTICATED",
        _ => "UNKNOWN",
    }
}

/// Whether a status is a fault of the server, by the conventions of OpenTelemetry. The others are
/// answers.
pub fn is_server_error(status: &str) -> bool {
    matches!(status, "UNKNOWN" | "DEADLINE_EXCEEDED" | "UNIMPLEMENTED" | "INTERNAL" | "UNAVAILABLE" | "DATA_LOSS")
}

/// From a call that reads one row to an import of a whole shipment.
const SECONDS: [f64; 15] =
    [0.000_5, 0.001, 0.002_5, 0.005, 0.007_5, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0];
