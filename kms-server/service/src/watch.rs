//! Streams of a state: the first state at once, then each change, until the watched process has
//! ended.

use std::time::Duration;

use tokio::sync::mpsc;

use kms_authz::Caller;
use kms_base::clock;
use kms_base::error::ServiceError;

/// Something whose state is read periodically.
pub(super) trait Watched: Send + 'static {
    /// The state that the stream sends.
    type Standing: Clone + Send;

    /// Reads the state, if the caller is still permitted to (I5: a revocation also ends open
    /// streams).
    fn look(&mut self) -> impl Future<Output = Result<Self::Standing, ServiceError>> + Send;

    /// Whether the two states are equal for the reader.
    fn is_alike(known: &Self::Standing, now: &Self::Standing) -> bool;

    /// Whether the state is the last one.
    fn has_ended(standing: &Self::Standing) -> bool;
}

/// Starts a stream with the state `first`. The stream ends with the last state, with an error, or
/// when its reader is gone.
pub(super) fn watch<W: Watched>(
    caller: &Caller,
    mut watched: W,
    first: W::Standing,
    every: Duration,
) -> mpsc::Receiver<Result<W::Standing, ServiceError>> {
    let (answers, receiver) = mpsc::channel(1);
    let not_after = caller.not_after;
    tokio::spawn(async move {
        let mut last = first.clone();
        let mut next = Ok(first);
        loop {
            let ended = next.as_ref().map_or(true, W::has_ended);
            if answers.send(next).await.is_err() || ended {
                return;
            }
            next = loop {
                tokio::select! {
                    () = answers.closed() => return,
                    () = tokio::time::sleep(every) => {}
                }
                if not_after <= clock::now() {
                    break Err(ServiceError::unauthenticated(
                        "the client certificate has expired; renew it and connect again",
                    ));
                }
                match watched.look().await {
                    Ok(standing) if W::is_alike(&last, &standing) => {}
                    Ok(standing) => {
                        last = standing.clone();
                        break Ok(standing);
                    }
                    Err(error) => break Err(error),
                }
            };
        }
    });
    receiver
}
