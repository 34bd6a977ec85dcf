//! The messages of a request while they arrive: the one message of a call as a whole, or the
//! messages of a stream one after the other. Each has its bounds of octets and time.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use http_body::{Body as _, Frame, SizeHint};
use kms_base::bounds::Bound;
use kms_base::error::ServiceError;
use tokio::time::Sleep;
use tonic::Status;
use tonic::body::Body;

use crate::methods::Method;
use crate::usage::{COME_BACK, ConnectionUse, RequestBounds, Reservation, wide};

/// The one message of a call, while it is received.
pub(crate) struct Message<'a> {
    bounds: &'a RequestBounds,
    connection: &'a Arc<ConnectionUse>,
    method: Method,
    reserved: Reservation,
    octets: BytesMut,
    /// Octets of the message with its prefix.
    wanted: Option<usize>,
}

impl<'a> Message<'a> {
    /// A message of which nothing has arrived. Its octets join `reserved`.
    pub(crate) fn new(
        bounds: &'a RequestBounds,
        connection: &'a Arc<ConnectionUse>,
        method: Method,
        reserved: Reservation,
    ) -> Self {
        Self { bounds, connection, method, reserved, octets: BytesMut::new(), wanted: None }
    }

    /// Receives the message within its time, as a body of one frame.
    ///
    /// # Errors
    /// A bound is met, the body fails, or octets follow the message.
    pub(crate) async fn receive(mut self, body: Body) -> Result<(Body, Reservation), Status> {
        let octets = tokio::time::timeout(self.bounds.time(Bound::RequestSeconds), self.collect(body)).await;
        let octets = octets
            .map_err(|_| self.bounds.met(Bound::RequestSeconds, "the request did not arrive in time", COME_BACK))??;
        Ok((Body::new(Whole(octets)), self.reserved))
    }

    async fn collect(&mut self, mut body: Body) -> Result<Bytes, Status> {
        loop {
            let Some(frame) =
                std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await.transpose()?
            else {
                return Ok(std::mem::take(&mut self.octets).freeze());
            };
            // Trailers of a request have no meaning.
            let Ok(data) = frame.into_data() else { continue };
            if data.is_empty() {
                continue;
            }
            // Copied: a frame's octets keep a whole read buffer of the connection in memory.
            self.octets.extend_from_slice(&data);
            if self.wanted.is_none()
                && let Some(prefix) = self.octets.first_chunk::<PREFIX>()
            {
                let (more, whole) = reserve_message(self.bounds, self.connection, self.method, *prefix)?;
                self.reserved.join(more);
                self.wanted = Some(whole);
                self.octets.reserve(whole.saturating_sub(self.octets.len()));
            }
            if self.octets.len() > self.wanted.unwrap_or(PREFIX) {
                return Err(ServiceError::invalid("request", "octets follow its one message").into());
            }
        }
    }
}

/// A message that has arrived.
struct Whole(Bytes);

impl http_body::Body for Whole {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let octets = std::mem::take(&mut self.0);
        Poll::Ready((!octets.is_empty()).then_some(Ok(Frame::data(octets))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(wide(self.0.len()))
    }
}

/// The messages of a stream, each within its bounds of octets and time.
pub(crate) struct Messages {
    bounds: RequestBounds,
    connection: Arc<ConnectionUse>,
    method: Method,
    body: Body,
    /// The prefix of the message that is being received, as far as it has arrived.
    prefix: Vec<u8>,
    /// How many octets of that message follow.
    to_come: usize,
    reserved: Option<Reservation>,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Messages {
    /// The messages of this body. Each message counts until the next one begins to arrive.
    pub(crate) fn new(bounds: RequestBounds, connection: Arc<ConnectionUse>, method: Method, body: Body) -> Self {
        Self {
            bounds,
            connection,
            method,
            body,
            prefix: Vec::with_capacity(PREFIX),
            to_come: 0,
            reserved: None,
            deadline: None,
        }
    }

    /// Counts the messages in octets that have arrived. True if one of them ended.
    fn follow(&mut self, mut octets: &[u8]) -> Result<bool, Status> {
        let mut ended = false;
        while !octets.is_empty() {
            if self.to_come > 0 {
                let taken = self.to_come.min(octets.len());
                octets.advance(taken);
                self.to_come -= taken;
                ended |= self.to_come == 0;
                continue;
            }
            let taken = (PREFIX - self.prefix.len()).min(octets.len());
            self.prefix.extend_from_slice(octets.get(..taken).unwrap_or_default());
            octets.advance(taken);
            if let Some(prefix) = self.prefix.first_chunk::<PREFIX>().copied() {
                self.prefix.clear();
                // The service has taken the message before when the next one begins to arrive.
                self.reserved = None;
                let (reserved, whole) = reserve_message(&self.bounds, &self.connection, self.method, prefix)?;
                self.reserved = Some(reserved);
                self.to_come = whole - PREFIX;
                ended |= self.to_come == 0;
            }
        }
        Ok(ended)
    }
}

impl http_body::Body for Messages {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        match Pin::new(&mut this.body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(octets) = frame.data_ref() {
                    match this.follow(octets) {
                        // The next message has its own time.
                        Ok(true) => this.deadline = None,
                        Ok(false) => {}
                        Err(status) => return Poll::Ready(Some(Err(status))),
                    }
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(other) => Poll::Ready(other),
            Poll::Pending => {
                let time = this.bounds.time(Bound::UploadPauseSeconds);
                let deadline = this.deadline.get_or_insert_with(|| Box::pin(tokio::time::sleep(time)));
                match deadline.as_mut().poll(context) {
                    Poll::Ready(()) => {
                        let status = this.bounds.met(
                            Bound::UploadPauseSeconds,
                            "the next message did not arrive in time",
                            COME_BACK,
                        );
                        Poll::Ready(Some(Err(status)))
                    }
                    Poll::Pending => Poll::Pending,
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Reserves the octets of a message whose first five octets say how long it is. Also returns the
/// length with these five.
///
/// # Errors
/// The message is compressed or too long, or there is no room for it.
fn reserve_message(
    bounds: &RequestBounds,
    connection: &Arc<ConnectionUse>,
    method: Method,
    prefix: [u8; PREFIX],
) -> Result<(Reservation, usize), Status> {
    let [compressed, a, b, c, d] = prefix;
    if compressed != 0 {
        return Err(Status::unimplemented("compressed messages are not supported: send them uncompressed"));
    }
    let length = u32::from_be_bytes([a, b, c, d]);
    if u64::from(length) > bounds.of(method.message) {
        return Err(bounds.met(method.message, &format!("the message has {length} octets"), Duration::ZERO));
    }
    let whole = usize::try_from(length).unwrap_or(usize::MAX).saturating_add(PREFIX);
    Ok((bounds.reserve(connection, wide(whole))?, whole))
}

/// The prefix of a gRPC message: one octet for compression, four for the length.
pub(crate) const PREFIX: usize = 5;
