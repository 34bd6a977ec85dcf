//! Traces and metrics of calls: one span for each call, and a histogram by method and status. The
//! names are those of the OpenTelemetry semantic conventions for gRPC.
//!
//! A caller's `traceparent` (W3C Trace Context) makes the span part of its trace.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, LazyLock},
    task::{Context, Poll},
    time::Instant,
};

use http_body::{Frame, SizeHint};
use opentelemetry::{
    StringValue,
    propagation::{Extractor, TextMapPropagator as _},
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use prost::Message as _;
use tonic::{Status, body::Body};
use tracing::{Span, field};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use kms_base::{is_server_error, status_name};

/// A call under way. If it is dropped without an answer, it was cancelled.
pub struct Call {
    method: StringValue,
    began: Instant,
    span: Span,
    ended: bool,
    watch: Option<Watch>,
}

/// Gets the headers or trailers with an answer's status, and may change them.
type Watch = Box<dyn FnOnce(&mut http::HeaderMap) + Send>;

impl Call {
    /// Begins a call, with the request's headers.
    pub fn begin<B>(request: &http::Request<B>) -> Self {
        let method = METHODS.get(request.uri().path()).unwrap_or(&OTHER).clone();
        let span = tracing::debug_span!(
            "rpc",
            otel.name = method.as_str(),
            otel.kind = "server",
            otel.status_code = field::Empty,
            rpc.system.name = "grpc",
            rpc.method = method.as_str(),
            rpc.response.status_code = field::Empty,
        );
        if !span.is_disabled() {
            // Without a valid context, this begins a new trace.
            drop(span.set_parent(TraceContextPropagator::new().extract(&Headers(request.headers()))));
        }
        Self { method, began: Instant::now(), span, ended: false, watch: None }
    }

    /// Calls `watch` with the status of the answer.
    pub fn watched(mut self, watch: impl FnOnce(&mut http::HeaderMap) + Send + 'static) -> Self {
        self.watch = Some(Box::new(watch));
        self
    }

    /// The span of the call's work.
    pub fn span(&self) -> Span {
        self.span.clone()
    }

    /// Ends the call with this answer. The status is in the headers if the call failed at once;
    /// otherwise it follows the body.
    pub fn answered(mut self, mut response: http::Response<Body>) -> http::Response<Body> {
        if let Some(status) = Status::from_header_map(response.headers()) {
            self.end(i32::from(status.code()));
            self.show(response.headers_mut());
            return response;
        }
        response.map(|body| Body::new(Observed { body, call: self }))
    }

    fn show(&mut self, headers: &mut http::HeaderMap) {
        if let Some(watch) = self.watch.take() {
            watch(headers);
        }
    }

    fn end(&mut self, code: i32) {
        if self.ended {
            return;
        }
        self.ended = true;
        let status = status_name(code);
        self.span.record("rpc.response.status_code", status);
        if is_server_error(status) {
            self.span.record("otel.status_code", "ERROR");
        }
        kms_base::metrics().rpc(self.method.clone(), status, self.began.elapsed());
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.end(CANCELLED);
    }
}

/// A response's body, watched for its trailers.
struct Observed {
    body: Body,
    call: Call,
}

impl http_body::Body for Observed {
    type Data = bytes::Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let Self { body, call } = self.get_mut();
        let mut polled = call.span.in_scope(|| Pin::new(body).poll_frame(context));
        match &mut polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(trailers) = frame.trailers_mut() {
                    call.end(Status::from_header_map(trailers).map_or(UNKNOWN, |status| i32::from(status.code())));
                    call.show(trailers);
                }
            }
            Poll::Ready(Some(Err(status))) => call.end(i32::from(status.code())),
            Poll::Ready(None) => call.end(UNKNOWN),
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The request's headers, as the propagator reads them.
struct Headers<'a>(&'a http::HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

/// The names of the methods of this server, by path. A call of any other method is `_OTHER`, so
/// that clients cannot choose attributes.
static METHODS: LazyLock<HashMap<String, StringValue>> = LazyLock::new(|| {
    let files = prost_types::FileDescriptorSet::decode(kms_proto::FILE_DESCRIPTOR_SET).unwrap_or_default();
    let mut methods = HashMap::new();
    for file in &files.file {
        for service in &file.service {
            for method in &service.method {
                let name = format!("{}.{}/{}", file.package(), service.name(), method.name());
                methods.insert(format!("/{name}"), StringValue::from(Arc::<str>::from(name)));
            }
        }
    }
    methods
});

static OTHER: LazyLock<StringValue> = LazyLock::new(|| "_OTHER".into());

const CANCELLED: i32 = 1;
const UNKNOWN: i32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_those_of_the_contract_and_no_others() {
        assert_eq!(
            METHODS.get("/meterkms.v1.GrantService/OpenSession").map(StringValue::as_str),
            Some("meterkms.v1.GrantService/OpenSession")
        );
        assert!(METHODS.len() > 20);
        let request =
            http::Request::builder().uri("https://kms/meterkms.v1.GrantService/4B414D0000000001").body(()).unwrap();
        assert_eq!(Call::begin(&request).method.as_str(), "_OTHER");
    }

    #[test]
    fn names_of_codes_are_those_of_grpc() {
        for code in 0..=16 {
            // `Code` has no names, so its description's first word must at least differ for each.
            assert_eq!(status_name(code) == "UNKNOWN", code == 2, "{code}");
        }
        assert!(is_server_error("UNAVAILABLE") && !is_server_error("PERMISSION_DENIED"));
    }
}
