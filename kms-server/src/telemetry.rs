//! Logs to stderr, and traces and metrics to an OTLP collector if one is configured. Log lines
//! carry names of principals, actions and rows; never keys, PINs, wrapped keys or frames. Spans and
//! metrics carry no names at all.
//!
//! Spans have level `debug`: without a collector nothing records them, and a span costs one
//! comparison of a number.

use std::io::IsTerminal;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt};

use kms_config::TelemetrySection;

/// Telemetry in use. When it is dropped, it sends what is left.
pub struct Telemetry {
    traces: Option<SdkTracerProvider>,
    metrics: Option<SdkMeterProvider>,
}

impl Telemetry {
    /// Starts to log, trace and count. `KMS_LOG` overrides the configured filter. Called once,
    /// inside the tokio runtime.
    ///
    /// # Errors
    /// The filter or the endpoint is malformed, or telemetry was started already.
    pub fn start(section: &TelemetrySection, server_name: &str) -> Result<Self, TelemetryError> {
        let directives =
            std::env::var("KMS_LOG").ok().or_else(|| section.log.clone()).unwrap_or_else(|| DEFAULT_FILTER.to_owned());
        let filter = EnvFilter::try_new(&directives)
            .map_err(|error| TelemetryError::Filter { directives, reason: error.to_string() })?;
        let lines =
            fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal()).with_target(false);
        let registry = tracing_subscriber::registry().with(lines.with_filter(filter));
        let Some(endpoint) = &section.otlp_endpoint else {
            registry.try_init().map_err(|error| TelemetryError::Start(error.to_string()))?;
            return Ok(Self { traces: None, metrics: None });
        };
        let refuse = |error: opentelemetry_otlp::ExporterBuildError| TelemetryError::Endpoint {
            endpoint: endpoint.clone(),
            reason: error.to_string(),
        };
        let resource = Resource::builder()
            .with_service_name("kms-server")
            .with_attribute(opentelemetry::KeyValue::new("service.instance.id", server_name.to_owned()))
            .build();
        let spans =
            opentelemetry_otlp::SpanExporter::builder().with_tonic().with_endpoint(endpoint).build().map_err(refuse)?;
        let traces = SdkTracerProvider::builder()
            .with_resource(resource.clone())
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(section.trace_ratio.get()))))
            .with_batch_exporter(spans)
            .build();
        let counts = opentelemetry_otlp::MetricExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .build()
            .map_err(refuse)?;
        let metrics = SdkMeterProvider::builder()
            .with_resource(resource)
            .with_reader(PeriodicReader::builder(counts).with_interval(section.metrics_seconds.period()).build())
            .build();
        opentelemetry::global::set_meter_provider(metrics.clone());
        // Spans only: log lines name rows, and are not sent.
        let own_spans = filter_fn(|metadata| metadata.is_span() && metadata.target().starts_with("kms_"))
            .with_max_level_hint(LevelFilter::DEBUG);
        let layer = tracing_opentelemetry::layer()
            .with_tracer(traces.tracer("kms-server"))
            .with_location(false)
            .with_threads(false);
        registry
            .with(layer.with_tracked_inactivity(false).with_filter(own_spans))
            .try_init()
            .map_err(|error| TelemetryError::Start(error.to_string()))?;
        Ok(Self { traces: Some(traces), metrics: Some(metrics) })
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        let traces = self.traces.take().map_or(Ok(()), |traces| traces.shutdown());
        let metrics = self.metrics.take().map_or(Ok(()), |metrics| metrics.shutdown());
        if let Err(error) = traces.and(metrics) {
            tracing::warn!(%error, "the last traces or metrics could not be sent");
        }
    }
}

/// Why telemetry cannot start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is malformed.
    #[error("the log filter `{directives}` is malformed: {reason}; write for example `info,kms_service=debug`")]
    Filter {
        /// The filter.
        directives: String,
        /// Why.
        reason: String,
    },
    /// The endpoint cannot be used.
    #[error("[telemetry] otlp_endpoint: `{endpoint}` cannot be used: {reason}")]
    Endpoint {
        /// The endpoint.
        endpoint: String,
        /// Why.
        reason: String,
    },
    /// Telemetry was started already.
    #[error("telemetry cannot start: {0}")]
    Start(String),
}

const DEFAULT_FILTER: &str = "info";
