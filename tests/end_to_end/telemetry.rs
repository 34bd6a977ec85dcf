//! Traces and metrics of a real grant, as an OTLP collector receives them: that they are there, and
//! that nothing secret is in them.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use kms_client::{
    new_request_id,
    proto::{OpenSessionRequest, Purpose, SessionTerms},
};
use kms_tests::{CLIENT_TITLE, DevServer, title};
use opentelemetry_proto::tonic::{
    collector::{
        metrics::v1::{
            ExportMetricsServiceRequest, ExportMetricsServiceResponse,
            metrics_service_server::{MetricsService, MetricsServiceServer},
        },
        trace::v1::{
            ExportTraceServiceRequest, ExportTraceServiceResponse,
            trace_service_server::{TraceService, TraceServiceServer},
        },
    },
    common::v1::{KeyValue, any_value},
    metrics::v1::{Metric, metric::Data, number_data_point},
    trace::v1::Span,
};
use prost::Message as _;
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

/// A collector in this process.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Received>>);

#[derive(Default)]
struct Received {
    traces: Vec<ExportTraceServiceRequest>,
    metrics: Vec<ExportMetricsServiceRequest>,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().unwrap().traces.push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Collector {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        self.0.lock().unwrap().metrics.push(request.into_inner());
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

impl Collector {
    /// Serves, and tells where.
    fn start(&self) -> String {
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = incoming.local_addr().unwrap();
        let server = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(self.clone()))
            .add_service(MetricsServiceServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(incoming));
        format!("http://{address}")
    }

    fn spans(&self) -> Vec<Span> {
        let received = self.0.lock().unwrap();
        let resources = received.traces.iter().flat_map(|export| &export.resource_spans);
        resources.flat_map(|resource| &resource.scope_spans).flat_map(|scope| scope.spans.clone()).collect()
    }

    /// The newest state of every metric.
    fn metrics(&self) -> Vec<Metric> {
        let received = self.0.lock().unwrap();
        let Some(export) = received.metrics.last() else { return Vec::new() };
        export
            .resource_metrics
            .iter()
            .flat_map(|resource| &resource.scope_metrics)
            .flat_map(|scope| scope.metrics.clone())
            .collect()
    }

    async fn until<T>(&self, what: &str, find: impl Fn(&Self) -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(found) = find(self) {
                return found;
            }
            assert!(began.elapsed() < Duration::from_secs(300), "no {what} within 300 s: {:?}", self.names());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn names(&self) -> (Vec<String>, Vec<String>) {
        (
            self.spans().into_iter().map(|span| span.name).collect(),
            self.metrics().into_iter().map(|metric| metric.name).collect(),
        )
    }
}

/// The attributes of all points of a metric.
fn attributes(metric: &Metric) -> Vec<KeyValue> {
    match metric.data.as_ref().unwrap() {
        Data::Sum(sum) => sum.data_points.iter().flat_map(|point| point.attributes.clone()).collect(),
        Data::Gauge(gauge) => gauge.data_points.iter().flat_map(|point| point.attributes.clone()).collect(),
        Data::Histogram(histogram) => histogram.data_points.iter().flat_map(|point| point.attributes.clone()).collect(),
        other => panic!("{other:?}"),
    }
}

fn total(metric: &Metric) -> i64 {
    let value = |value: &Option<number_data_point::Value>| match value {
        Some(number_data_point::Value::AsInt(number)) => *number,
        other => panic!("{other:?}"),
    };
    match metric.data.as_ref().unwrap() {
        Data::Sum(sum) => sum.data_points.iter().map(|point| value(&point.value)).sum(),
        Data::Gauge(gauge) => gauge.data_points.iter().map(|point| value(&point.value)).sum(),
        other => panic!("{other:?}"),
    }
}

fn text<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a str> {
    match attributes.iter().find(|attribute| attribute.key == key)?.value.as_ref()?.value.as_ref()? {
        any_value::Value::StringValue(text) => Some(text),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_receives_a_grant_and_no_secret() {
    let collector = Collector::default();
    let endpoint = collector.start();
    let first = DevServer::start_on_postgresql();
    let more = format!("[telemetry]\notlp_endpoint = \"{endpoint}\"\ntrace_ratio = 0.0\nmetrics_seconds = 1\n");
    let server = first.second("observed", |text| format!("{text}\n{more}")).await;
    let connection = server.connect("head-end").await;

    // A caller's trace: its sampled flag is heeded although the server would take none by itself.
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let mut request = Request::new(OpenSessionRequest {
        request_id: new_request_id().octets().to_vec().into(),
        meter: title(7).octets().to_vec().into(),
        terms: Some(SessionTerms {
            purpose: Purpose::Read.into(),
            client_title: hex::decode(CLIENT_TITLE).unwrap().into(),
            ..SessionTerms::default()
        }),
    });
    request.metadata_mut().insert("traceparent", format!("00-{trace}-00f067aa0ba902b7-01").parse().unwrap());
    let answer = connection.grants().open_session(request).await.unwrap().into_inner();
    assert_eq!(answer.envelopes.len(), 1);
    // And one that is refused: a meter that does not exist.
    let mut refused = Request::new(OpenSessionRequest {
        request_id: new_request_id().octets().to_vec().into(),
        meter: title(4_000).octets().to_vec().into(),
        terms: Some(SessionTerms { purpose: Purpose::Read.into(), ..SessionTerms::default() }),
    });
    refused.metadata_mut().insert("traceparent", format!("00-{trace}-00f067aa0ba902b7-01").parse().unwrap());
    connection.grants().open_session(refused).await.unwrap_err();

    let method = "meterkms.v1.GrantService/OpenSession";
    let span = |collector: &Collector, name: &str| collector.spans().into_iter().find(|span| span.name == name);
    let rpc = collector.until("span of the call", |collector| span(collector, method)).await;
    assert_eq!(
        (hex::encode(&rpc.trace_id).as_str(), hex::encode(&rpc.parent_span_id).as_str()),
        (trace, "00f067aa0ba902b7")
    );
    for (name, parent) in [("grant", method), ("commit", "grant"), ("hsm.envelope", "grant")] {
        let child = collector.until(name, |collector| span(collector, name)).await;
        let parents: Vec<Vec<u8>> =
            collector.spans().into_iter().filter(|span| span.name == parent).map(|span| span.span_id).collect();
        assert!(parents.contains(&child.parent_span_id), "{name} is not below {parent}");
    }
    assert!(collector.spans().iter().all(|span| hex::encode(&span.trace_id) == trace), "nothing else was sampled");

    let metric = |collector: &Collector, name: &str| collector.metrics().into_iter().find(|metric| metric.name == name);
    for (name, unit, expected) in [
        ("kms.grants", "{grant}", Some(1)),
        ("kms.grant.keys", "{key}", Some(2)),
        ("kms.grant.meters", "{meter}", Some(2)),
        ("kms.ready", "1", Some(1)),
    ] {
        let found = collector
            .until(name, |collector| {
                metric(collector, name).filter(|found| expected.is_none_or(|expected| total(found) == expected))
            })
            .await;
        assert_eq!(found.unit, unit, "{name}");
    }
    assert!(
        attributes(&metric(&collector, "kms.grant.meters").unwrap())
            .iter()
            .any(|attribute| attribute.key == "error.type")
    );
    for name in [
        "rpc.server.call.duration",
        "kms.commit.duration",
        "kms.commit.acts",
        "kms.hsm.job.duration",
        "kms.counter.chunks",
        "kms.refusals",
    ] {
        collector.until(name, |collector| metric(collector, name)).await;
    }
    let duration = metric(&collector, "rpc.server.call.duration").unwrap();
    assert_eq!((duration.unit.as_str(), text(&attributes(&duration), "rpc.system.name")), ("s", Some("grpc")));
    assert!(attributes(&duration).iter().any(|attribute| attribute.key == "rpc.response.status_code"));

    // I1: no key of the sample is in anything that was sent, nor any wrapped key; and no metric
    // names a meter or a principal.
    let received = collector.0.lock().unwrap();
    let mut octets = Vec::new();
    received.traces.iter().for_each(|export| octets.extend(export.encode_to_vec()));
    let traces = octets.len();
    received.metrics.iter().for_each(|export| octets.extend(export.encode_to_vec()));
    let holds =
        |octets: &[u8], needle: &[u8]| octets.windows(needle.len()).any(|window| window.eq_ignore_ascii_case(needle));
    for key in first.plaintext_keys() {
        assert!(
            !holds(&octets, &key) && !holds(&octets, hex::encode(&key).as_bytes()),
            "a key was sent to the collector"
        );
    }
    let manifest = &answer.envelopes[0].manifest;
    for piece in manifest.windows(24).step_by(8) {
        assert!(
            !holds(&octets, piece) && !holds(&octets, hex::encode(piece).as_bytes()),
            "a wrapped key was sent to the collector"
        );
    }
    for name in [title(7).to_string(), title(4_000).to_string(), "urn:meterkms".to_owned(), CLIENT_TITLE.to_owned()] {
        assert!(!holds(&octets[traces..], name.as_bytes()), "`{name}` is in a metric");
    }
}
