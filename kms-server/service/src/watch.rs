//! Streams of how something stands: at once, at each change, and when it has ended.

use std::time::Duration;

use tokio::sync::mpsc;

use kms_authz::Caller;
use kms_base::clock;
use kms_base::error::ServiceError;

/// Something that is looked at again and again.
pub(super) trait Watched: Send + 'static {
    /// How it stands.
    type Standing: Clone + Send;

    /// Looks, if the caller still may (I5: revocation acts in open streams too).
    fn look(&mut self) -> impl Future<Output = Result<Self::Standing, ServiceError>> + Send;

    /// Whether nothing worth telling lies between the two.
    fn is_alike(known: &Self::Standing, now: &Self::Standing) -> bool;

    /// Whether nothing comes after it.
    fn has_ended(standing: &Self::Standing) -> bool;
}

/// The first look is the caller's; the stream ends with the end of what is watched, with an error,
/// or when nobody reads it any more.
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
                    break Err(ServiceError::unauthenticated("the client certificate has expired"));
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
