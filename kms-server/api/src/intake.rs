//! The intake of requests: it bounds what a caller can make the server hold before a use case sees
//! the call.
//!
//! The intake receives the whole message of a call before it calls the service. It compares the
//! length with the bound of the method as soon as the first five octets have arrived. The octets
//! count for connection, principal and server until the call is answered. The message must arrive
//! within a time. Each message of a stream has these bounds of its own. The intake refuses a
//! principal that is disabled or unknown before it reads an octet of the message, and closes the
//! connection.

use std::collections::HashMap;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use kms_store::Reads;
use tonic::Status;
use tonic::body::Body;
use tonic::service::Routes;
use tower::Service as _;

use crate::messages::{Message, Messages};
use crate::methods;
use crate::peer::Peer;
use crate::usage::{AnswerPlace, ConnectionUse, RequestBounds, Reservation, wide};
use kms_authz::Caller;
use kms_base::bounds::Limits;
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Never, Permit, View};
use kms_service::island::IslandContext;

/// A call of which only the caller is known. The door refuses it if the caller is no enabled
/// principal.
struct Call;

impl Act for Call {
    type Answer = ();
    type Past = Never;

    fn name(&self) -> &'static str {
        "call"
    }

    fn reads(&self) -> Reads {
        Reads::default()
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        Ok(asker.without_policy("it asks for nothing yet"))
    }

    fn decide(&self, _: &Permit, _: &mut View<'_, '_>) -> Result<Decision<()>, ServiceError> {
        Ok(Decision::unchanged(()))
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<(), ServiceError> {
        match never {}
    }
}

/// Receives requests for the services. Clones share what is counted.
#[derive(Clone)]
pub struct Intake {
    bounds: RequestBounds,
    known: Arc<Mutex<HashMap<[u8; 32], Known>>>,
}

/// What an earlier call has shown of a certificate.
#[derive(Clone, Copy)]
struct Known {
    accepted: bool,
    at: Instant,
}

impl Intake {
    /// With these bounds.
    pub fn new(limits: Arc<Limits>) -> Self {
        Self { bounds: RequestBounds::new(limits), known: Arc::default() }
    }

    /// Receives the request, calls the service, and ends the connection if the caller is no enabled
    /// principal. Without an island the caller is not checked: for health and reflection.
    pub async fn serve(
        self,
        request: http::Request<Body>,
        island: Option<Arc<IslandContext>>,
        mut routes: Routes,
    ) -> http::Response<Body> {
        let peer = request.extensions().get::<Peer>();
        let certificate = peer.map(|peer| peer.certificate.sha256);
        let connection = peer.map(|peer| Arc::clone(&peer.usage)).unwrap_or_default();
        connection.note_called();
        let streams = methods::of(request.uri().path()).is_some_and(|method| method.answers_stream);
        let mut place = None;
        let answer = match self.receive(request, island.as_deref(), &connection).await.and_then(|received| {
            place = streams.then(|| self.bounds.answer_stream(&connection)).transpose()?;
            Ok(received)
        }) {
            Ok((request, reserved)) => {
                let answer: Result<_, Infallible> = routes.call(request).await;
                drop(reserved);
                match answer {
                    Ok(answer) => answer,
                    Err(never) => match never {},
                }
            }
            Err(refusal) => refusal.into_http(),
        };
        if answer.headers().get("grpc-status").is_some_and(|status| status == UNAUTHENTICATED) {
            // A use case may have found it: then the next call must read the row again.
            if let Some(certificate) = certificate {
                let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
                if known.get(&certificate).is_some_and(|known| known.accepted) {
                    known.remove(&certificate);
                }
            }
            connection.cut();
        }
        match place {
            Some(place) => answer.map(|body| Body::new(Answer { body, _place: place })),
            None => answer,
        }
    }

    async fn receive(
        &self,
        request: http::Request<Body>,
        island: Option<&IslandContext>,
        connection: &Arc<ConnectionUse>,
    ) -> Result<(http::Request<Body>, Option<Reservation>), Status> {
        if let Some(island) = island {
            self.check_caller(island, request.extensions()).await?;
            connection.note_known();
        }
        let (parts, body) = request.into_parts();
        let Some(method) = methods::of(parts.uri.path()) else {
            // The routes answer UNIMPLEMENTED and read no message.
            return Ok((http::Request::from_parts(parts, Body::empty()), None));
        };
        let headers =
            parts.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + HEADER_COST).sum::<usize>()
                + parts.uri.path().len();
        let mut reserved = self.bounds.reserve(connection, wide(headers))?;
        if method.streaming {
            // What the service collects between messages: of an upload, a piece of 1 MiB.
            reserved.join(self.bounds.reserve(connection, self.bounds.of(method.message) / 2)?);
            let messages = Messages::new(self.bounds.clone(), Arc::clone(connection), method, body);
            return Ok((http::Request::from_parts(parts, Body::new(messages)), Some(reserved)));
        }
        let (body, reserved) = Message::new(&self.bounds, connection, method, reserved).receive(body).await?;
        Ok((http::Request::from_parts(parts, body), Some(reserved)))
    }

    /// Refuses callers that are not enabled principals, before their message is read. Other faults
    /// of a principal's row, and a database that does not answer, are found and recorded by the use
    /// case.
    async fn check_caller(&self, island: &IslandContext, extensions: &http::Extensions) -> Result<(), ServiceError> {
        let caller =
            Caller::of(extensions.get::<Peer>().map(|peer| &*peer.certificate), island.name(), IslandContext::now())?;
        let known = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known
                .get(&caller.certificate_sha256)
                .filter(|known| known.at.elapsed() < KNOWN_FOR)
                .map(|known| known.accepted)
        };
        match known {
            Some(true) => return Ok(()),
            Some(false) => return Err(nobody()),
            None => {}
        }
        match island.principal(&caller).await {
            Err(refusal @ ServiceError::Unauthenticated { .. }) => {
                self.learn(&caller, false);
                // I2: the refusal is recorded, as a use case records its own. A flood of them costs
                // one act a second.
                let recorded = island.door.act(&caller, None, Call).await;
                match recorded {
                    // An officer has enabled the principal meanwhile.
                    Ok(_) => {
                        self.learn(&caller, true);
                        Ok(())
                    }
                    Err(_) => Err(refusal),
                }
            }
            Err(_) => Ok(()),
            Ok(_) => {
                self.learn(&caller, true);
                Ok(())
            }
        }
    }

    fn learn(&self, caller: &Caller, accepted: bool) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST_KNOWN {
            known.retain(|_, known| known.at.elapsed() < KNOWN_FOR);
        }
        if known.len() < MOST_KNOWN {
            known.insert(caller.certificate_sha256, Known { accepted, at: Instant::now() });
        }
    }
}

/// A streamed answer, which holds its place until it has ended.
struct Answer {
    body: Body,
    _place: AnswerPlace,
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn nobody() -> ServiceError {
    ServiceError::unauthenticated(
        "the certificate is not one of an enabled principal of this island; ask a security officer",
    )
}

/// What a header counts beyond its octets (RFC 9113, 6.5.2).
const HEADER_COST: usize = 32;
/// google.rpc.Code.
const UNAUTHENTICATED: &str = "16";
/// How long the intake remembers whether a certificate is accepted. Each use case reads the row of
/// the principal again, so every answer rests on the row (I5).
const KNOWN_FOR: Duration = Duration::from_secs(1);
/// Certificates that are remembered.
const MOST_KNOWN: usize = 4_096;

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use http_body::Body as _;

    use super::*;
    use crate::messages::PREFIX;
    use crate::usage::PrincipalUse;

    /// Frames, then the end; or, without one, nothing more.
    struct Frames {
        octets: VecDeque<Vec<u8>>,
        ends: bool,
    }

    impl http_body::Body for Frames {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            match self.octets.pop_front() {
                Some(octets) => Poll::Ready(Some(Ok(Frame::data(octets.into())))),
                None if self.ends => Poll::Ready(None),
                None => Poll::Pending,
            }
        }
    }

    fn frames(octets: &[&[u8]], ends: bool) -> Body {
        Body::new(Frames { octets: octets.iter().map(|octets| octets.to_vec()).collect(), ends })
    }

    fn message(announced: u32, sent: usize) -> Vec<u8> {
        let mut octets = vec![0];
        octets.extend(announced.to_be_bytes());
        octets.resize(PREFIX + sent, 7);
        octets
    }

    fn request(path: &str, body: Body) -> http::Request<Body> {
        http::Request::post(format!("https://kms/{path}")).body(body).unwrap()
    }

    async fn octets(mut body: Body) -> Result<Vec<u8>, Status> {
        let mut octets = Vec::new();
        while let Some(frame) = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
            octets.extend(frame?.into_data().unwrap_or_default());
        }
        Ok(octets)
    }

    const OPEN: &str = "meterkms.v1.GrantService/OpenSession";
    const UPLOAD: &str = "meterkms.v1.ShipmentService/UploadShipment";

    #[tokio::test]
    async fn a_message_comes_whole_however_it_is_cut_and_counts_until_it_is_answered() {
        let (intake, connection) = (Intake::new(Arc::default()), Arc::new(ConnectionUse::default()));
        let whole = message(300, 300);
        for cut in [1, 4, 5, 6, 304] {
            let (first, second) = whole.split_at(cut);
            let (taken, reserved) =
                intake.receive(request(OPEN, frames(&[first, &[], second], true)), None, &connection).await.unwrap();
            assert_eq!(octets(taken.into_body()).await.unwrap(), whole, "cut at {cut}");
            let held = intake.bounds.held();
            assert!((305..400).contains(&held), "{held}");
            drop(reserved);
            assert_eq!(intake.bounds.held(), 0);
        }
        for (body, expected) in [
            (frames(&[&message(16_385, 0)], false), "`message_octets`"),
            (frames(&[&message(3, 4)], false), "octets follow"),
            (frames(&[&[1, 0, 0, 0, 1, 7]], true), "compressed"),
        ] {
            let refused = intake.receive(request(OPEN, body), None, &connection).await.err().unwrap();
            assert!(refused.message().contains(expected), "{refused}");
        }
        assert_eq!(intake.bounds.held(), 0, "a refusal gives everything back");
    }

    #[tokio::test]
    async fn each_message_of_a_stream_has_its_bound_and_counts_alone() {
        let (intake, connection) = (Intake::new(Arc::default()), Arc::new(ConnectionUse::default()));
        let pieces: Vec<Vec<u8>> = (0..20).map(|_| message(1 << 20, 1 << 20)).collect();
        let all = pieces.concat();
        let body = Body::new(Frames { octets: all.chunks(300_001).map(<[u8]>::to_vec).collect(), ends: true });
        let (taken, reserved) = intake.receive(request(UPLOAD, body), None, &connection).await.unwrap();
        // 20 MiB in all, and 8 MiB for the connection.
        assert_eq!(octets(taken.into_body()).await.unwrap(), all);
        drop(reserved);
        assert_eq!(intake.bounds.held(), 0);
        let (taken, _) = intake
            .receive(request(UPLOAD, frames(&[&message(3, 3), &message(3 << 20, 1)], true)), None, &connection)
            .await
            .unwrap();
        let refused = octets(taken.into_body()).await.unwrap_err();
        assert!(
            refused.code() == tonic::Code::ResourceExhausted && refused.message().contains("`large_message_octets`"),
            "{refused}"
        );
    }

    #[tokio::test]
    async fn requests_that_are_not_answered_have_a_bound_for_each_connection_and_principal() {
        let limits =
            Limits { request_octets_per_connection: 1_000, request_octets_per_principal: 1_500, ..Limits::default() };
        let (intake, principal) = (Intake::new(Arc::new(limits)), Arc::new(PrincipalUse::default()));
        let connections = [(); 2].map(|()| Arc::new(ConnectionUse::new(Arc::clone(&principal))));
        let ask = async |connection: &Arc<ConnectionUse>, length: u32| {
            let whole = message(length, usize::try_from(length).unwrap());
            intake.receive(request(OPEN, frames(&[&whole], true)), None, connection).await.map(|(_, reserved)| reserved)
        };
        let first = ask(&connections[0], 800).await.unwrap();
        let refused = ask(&connections[0], 800).await.unwrap_err();
        assert!(refused.message().contains("`request_octets_per_connection`"), "{refused}");
        let refused = ask(&connections[1], 800).await.unwrap_err();
        assert!(refused.message().contains("`request_octets_per_principal`"), "{refused}");
        drop(first);
        ask(&connections[1], 800).await.unwrap();
        let streams: Vec<AnswerPlace> =
            (0..64).map(|number| intake.bounds.answer_stream(&connections[number % 2]).unwrap()).collect();
        let refused = intake.bounds.answer_stream(&connections[0]).err().unwrap();
        assert!(refused.message().contains("`answer_streams_per_principal` is 64"), "{refused}");
        drop(streams);
        intake.bounds.answer_stream(&connections[0]).unwrap();
    }
}
