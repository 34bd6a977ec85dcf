//! Records refusals in the answers: every answer passes here, so no use case can forget to record a
//! refusal (I2).
//!
//! An act that is refused inside the writer's transaction is counted there, and its status is
//! marked. This module counts all other refusals of policy or of a certificate: those of calls that
//! only read, and of acts that are refused before the transaction. A refusal of a single item is
//! not the status of the call; the use cases count it with
//! [`View::refuse`](kms_ledger::View::refuse) or [`Committer::refused`].

use http::HeaderMap;
use kms_domain::PrincipalId;
use tonic::{Code, Status};

use kms_base::status::RECORDED;

use crate::peer::Peer;
use kms_ledger::Committer;

/// Counts the refusal in the status of the request's answer. Removes the mark of a refusal that is
/// counted already.
pub fn watch<B>(
    committer: &Committer,
    request: &http::Request<B>,
) -> impl FnOnce(&mut HeaderMap) + Send + 'static + use<B> {
    let committer = committer.clone();
    let peer = request.extensions().get::<Peer>().cloned();
    let path = request.uri().clone();
    move |headers| {
        if headers.remove(RECORDED).is_some() {
            return;
        }
        if let Some(reason) = refusal(headers) {
            let principal: Option<&PrincipalId> = peer.as_ref().map(|peer| &peer.certificate.principal);
            committer.refused(principal, &action(path.path()), reason);
        }
    }
}

/// The reason, if the answer with these headers or trailers is a refusal of policy or of a
/// certificate. It has no details that a caller can vary: a client that asks for many unknown
/// meters makes one line in the log, not thousands.
fn refusal(headers: &HeaderMap) -> Option<String> {
    let status = Status::from_header_map(headers)?;
    match status.code() {
        Code::PermissionDenied => {
            let message = status.message();
            Some(
                message
                    .split_once(" with ")
                    .map_or_else(|| message.to_owned(), |(asked, _)| format!("{asked}` is not permitted")),
            )
        }
        Code::Unauthenticated => Some(status.message().to_owned()),
        _ => None,
    }
}

/// The name of a method's action in policy: `disablePrincipal` for
/// `/meterkms.v1.PrincipalService/DisablePrincipal`. A method that does not exist is unimplemented
/// and not refused, so callers cannot choose the text of the log.
fn action(path: &str) -> String {
    let method = path.rsplit('/').next().unwrap_or_default();
    let mut letters = method.chars();
    letters.next().map(|first| first.to_lowercase().chain(letters).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kms_base::error::ServiceError;

    fn headers(error: ServiceError) -> HeaderMap {
        Status::from(error).into_http::<tonic::body::Body>().headers().clone()
    }

    #[test]
    fn refusals_of_policy_and_certificates_are_told_from_other_errors() {
        assert_eq!(
            refusal(&headers(ServiceError::denied("addPrincipal"))).as_deref(),
            Some("`addPrincipal` is not permitted")
        );
        let named = ServiceError::denied("replaceMeter with meter 4B414D0000000001");
        assert_eq!(refusal(&headers(named)).as_deref(), Some("`replaceMeter` is not permitted"));
        assert_eq!(
            refusal(&headers(ServiceError::unauthenticated("it has expired"))).as_deref(),
            Some("it has expired")
        );
        assert_eq!(refusal(&headers(ServiceError::unavailable("the token is gone"))), None);
        assert_eq!(refusal(&HeaderMap::new()), None);
    }

    #[test]
    fn what_an_act_counted_is_marked() {
        assert!(headers(ServiceError::denied("addPrincipal").recorded()).contains_key(RECORDED));
        assert!(headers(ServiceError::unauthenticated("no").recorded()).contains_key(RECORDED));
        assert!(!headers(ServiceError::denied("addPrincipal")).contains_key(RECORDED));
    }

    #[test]
    fn actions_are_named_as_policy_names_them() {
        assert_eq!(action("/meterkms.v1.PrincipalService/DisablePrincipal"), "disablePrincipal");
    }
}
