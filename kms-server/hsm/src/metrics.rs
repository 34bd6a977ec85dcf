//! Metrics of a token's queue and workers (docs/operations.md, *Metrics*). Without a meter provider
//! nothing is measured.

use std::{sync::Arc, time::Instant};

use opentelemetry::{
    KeyValue, StringValue, global,
    metrics::{Counter, Histogram, UpDownCounter},
};

/// The instruments of one token.
pub(crate) struct Metrics {
    waiting: UpDownCounter<i64>,
    duration: Histogram<f64>,
    reopened: Counter<u64>,
    token: [KeyValue; 1],
}

impl Metrics {
    /// For the token of this label.
    pub(crate) fn of(token: &str) -> Self {
        let meter = global::meter("kms-hsm");
        Self {
            waiting: meter
                .i64_up_down_counter("kms.hsm.queue.length")
                .with_unit("{job}")
                .with_description("Jobs that wait for a worker of the token")
                .build(),
            duration: meter
                .f64_histogram("kms.hsm.job.duration")
                .with_unit("s")
                .with_description("Time that a job takes in the HSM; a batch is one job")
                .with_boundaries(SECONDS.to_vec())
                .build(),
            reopened: meter
                .u64_counter("kms.hsm.session.reopened")
                .with_unit("{session}")
                .with_description("Sessions that were lost and opened again")
                .build(),
            // Reference-counted, so that a job costs no allocation.
            token: [KeyValue::new("kms.hsm.token", StringValue::from(Arc::<str>::from(token)))],
        }
    }

    pub(crate) fn queued(&self) {
        self.waiting.add(1, &self.token);
    }

    pub(crate) fn taken(&self) {
        self.waiting.add(-1, &self.token);
    }

    pub(crate) fn done(&self, job: &'static str, began: Instant) {
        let [token] = &self.token;
        self.duration.record(began.elapsed().as_secs_f64(), &[KeyValue::new("kms.hsm.job", job), token.clone()]);
    }

    pub(crate) fn reopened(&self) {
        self.reopened.add(1, &self.token);
    }
}

/// From a single key in a software module to a batch in a slow HSM.
const SECONDS: [f64; 15] =
    [0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];
