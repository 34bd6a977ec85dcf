//! I6: who counts as a person where several people are needed.

use kms_domain::{PersonName, Principal};

use kms_base::error::ServiceError;
use kms_ledger::View;

/// The person behind the caller of an act, for acts that need several people (I6): a proposal or
/// campaign, and its approval.
///
/// `principal` is the caller's row as [`View::caller`] gave it; `action` names what is asked.
///
/// # Errors
/// Permission denied: the principal is not a person's. Failed precondition: one other principal
/// alone certified the key of this call, so the person may not exist.
pub fn counted_person(view: &View<'_, '_>, principal: &Principal, action: &str) -> Result<PersonName, ServiceError> {
    // The person who carries a handheld does not act as a person with it.
    let person = principal.person.clone().filter(|_| principal.is_personal());
    let person = person.ok_or_else(|| ServiceError::denied(action))?;
    let certificate = view.acting_certificate().and_then(|digest| principal.certificate(&digest));
    if certificate.is_some_and(|certificate| certificate.enrolment.counts()) {
        return Ok(person);
    }
    Err(ServiceError::FailedPrecondition {
        reason: format!(
            "one officer alone certified the key of `{}`, so `{}` does not count as a person yet (I6)",
            principal.id,
            person.as_str()
        ),
        next_step: format!(
            "two other officers confirm the key: one with `kms principal propose-key {}`, another approves the proposal",
            principal.id
        ),
    })
}
