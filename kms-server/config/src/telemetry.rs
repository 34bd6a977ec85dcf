//! `[telemetry]`: logs, traces and metrics.

use std::time::Duration;

use serde::Deserialize;

/// `[telemetry]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TelemetrySection {
    /// The filter for log lines on stderr, in the syntax of `tracing`. Default: `info`. The
    /// environment variable `KMS_LOG` overrides it.
    pub log: Option<String>,
    /// An OTLP (gRPC) endpoint for traces and metrics, such as `http://127.0.0.1:4317`. Default:
    /// none are sent.
    pub otlp_endpoint: Option<String>,
    /// The part of the calls that is traced, 0 to 1. Default: 0.01. A call with a sampled
    /// `traceparent` is always traced.
    #[serde(default)]
    pub trace_ratio: TraceRatio,
    /// The seconds between two exports of metrics, 1 to 3,600. Default: 60.
    #[serde(default)]
    pub metrics_seconds: MetricsSeconds,
}

/// A part of the whole, 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(try_from = "f64")]
pub struct TraceRatio(f64);

impl TraceRatio {
    /// The number.
    pub const fn get(self) -> f64 {
        self.0
    }
}

impl Default for TraceRatio {
    fn default() -> Self {
        Self(0.01)
    }
}

impl TryFrom<f64> for TraceRatio {
    type Error = String;

    fn try_from(ratio: f64) -> Result<Self, String> {
        if (0.0..=1.0).contains(&ratio) { Ok(Self(ratio)) } else { Err(format!("`{ratio}` is not 0 to 1")) }
    }
}

/// Seconds between two exports of metrics, 1 to 3,600.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u16")]
pub struct MetricsSeconds(u16);

impl MetricsSeconds {
    /// The time between two exports.
    pub fn period(self) -> Duration {
        Duration::from_secs(u64::from(self.0))
    }
}

impl Default for MetricsSeconds {
    fn default() -> Self {
        Self(60)
    }
}

impl TryFrom<u16> for MetricsSeconds {
    type Error = String;

    fn try_from(seconds: u16) -> Result<Self, String> {
        if (1..=3_600).contains(&seconds) {
            Ok(Self(seconds))
        } else {
            Err(format!("`{seconds}` is not 1 to 3,600 seconds"))
        }
    }
}
