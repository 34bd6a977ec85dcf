//! An act in the queue: who pays for it, what it costs, and how its caller gets the outcome.

use kms_domain::PrincipalId;
use kms_store::Reads;
use tokio::sync::oneshot;

use super::{
    actor::Actor,
    chain::AuditLeaf,
    decision::{Decision, Kind},
    shares::WORK_OF_AN_ACT,
    view::View,
};
use kms_base::error::ServiceError;

/// The answer of a committed act, and the leaf hashes of its records, in order.
#[derive(Clone, Debug)]
pub struct Committed<T> {
    /// The answer of the act.
    pub value: T,
    /// The leaves of its audit records.
    pub leaves: Vec<AuditLeaf>,
}

/// How an act ended.
pub(super) type ActOutcome<T> = Result<Committed<T>, ServiceError>;

/// An act in the queue, whatever the type of its answer.
pub(super) trait Queued: Send {
    fn actor(&self) -> Actor;
    /// Whose lane it waits in. None: the server's own.
    fn payer(&self) -> Option<PrincipalId>;
    fn reads(&self) -> &Reads;
    fn decide(&mut self, view: &mut View<'_, '_>) -> Result<Kind, ServiceError>;
    fn finish(self: Box<Self>, outcome: Result<Vec<AuditLeaf>, ServiceError>);

    /// How much of the writer's time it takes, in rows of meters. A fingerprint costs less: it is
    /// looked up and not opened.
    fn cost(&self) -> u64 {
        let reads = self.reads();
        let rows = reads.meters.len() + reads.tasks.len() + reads.sealed.len() + reads.fingerprints.len() / 4;
        u64::try_from(rows).unwrap_or(u64::MAX).saturating_add(WORK_OF_AN_ACT)
    }
}

/// An act whose answer has the type `T`.
pub(super) struct TypedAct<T, F> {
    actor: Actor,
    reads: Reads,
    decide: F,
    value: Option<T>,
    reply: Option<oneshot::Sender<ActOutcome<T>>>,
}

impl<T, F> TypedAct<T, F> {
    /// The act, and where its outcome arrives.
    pub(super) fn new(actor: Actor, reads: Reads, decide: F) -> (Box<Self>, oneshot::Receiver<ActOutcome<T>>) {
        let (reply, outcome) = oneshot::channel();
        (Box::new(Self { actor, reads, decide, value: None, reply: Some(reply) }), outcome)
    }
}

impl<T, F> Queued for TypedAct<T, F>
where
    T: Send,
    F: FnMut(&mut View<'_, '_>) -> Result<Decision<T>, ServiceError> + Send,
{
    fn actor(&self) -> Actor {
        self.actor.clone()
    }

    fn payer(&self) -> Option<PrincipalId> {
        self.actor.principal.clone()
    }

    fn reads(&self) -> &Reads {
        &self.reads
    }

    fn decide(&mut self, view: &mut View<'_, '_>) -> Result<Kind, ServiceError> {
        self.value = None;
        let (value, kind) = (self.decide)(view)?.into_parts();
        self.value = Some(value);
        Ok(kind)
    }

    fn finish(mut self: Box<Self>, outcome: Result<Vec<AuditLeaf>, ServiceError>) {
        let outcome = match (outcome, self.value.take()) {
            (Ok(leaves), Some(value)) => Ok(Committed { value, leaves }),
            (Ok(_), None) => Err(ServiceError::Internal("an act was committed without a decision".to_owned())),
            (Err(error), _) => Err(error),
        };
        if let Some(reply) = self.reply.take() {
            // A caller that has gone loses its answer. What was committed stays, and a replay finds
            // it.
            let _ = reply.send(outcome);
        }
    }
}
