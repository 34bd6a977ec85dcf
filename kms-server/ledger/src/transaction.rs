//! One transaction: the acts decide one after the other, and what they decided becomes the writes
//! of the transaction, each act with its records (I2).

use std::{collections::HashMap, time::Instant};

use kms_domain::{RowId, SealKeys};
use kms_proto::v1::{AuditRecord, RowWrite};
use kms_store::{AuditReference, Changes, Decision, FingerprintPut, RequestPut};

use super::{
    actor::Actor,
    chain::{AuditKeys, AuditLeaf, ChainHead},
    chunks::{ChunkName, HeldChunk},
    draft::TransactionDraft,
    exposure_rows::changed_exposure_rows,
    growth::{Grown, Growth},
    queued::Queued,
    records::{append, refusal_of},
    refusals::Refusals,
    replay::RecordName,
    sealed::put_row,
    view::View,
};
use kms_base::error::ServiceError;

/// What one attempt at a transaction has decided, to be kept if it commits.
pub(super) struct Decided {
    pub(super) head: ChainHead,
    pub(super) outcomes: Vec<Result<(), ServiceError>>,
    pub(super) leaves: Vec<Vec<AuditLeaf>>,
    pub(super) fresh_chunks: HashMap<ChunkName, HeldChunk>,
    pub(super) written: Vec<(RowId, u64)>,
    /// Set where refusals were counted or are written.
    pub(super) refusals: Option<Refusals>,
    /// How many refusals were counted, and how many security events.
    pub(super) refused: (u64, u64),
    pub(super) grown: Grown,
}

/// Runs the decision of each act that `permit` allows, on the rows as the acts before it left them.
pub(super) fn decide_all(
    acts: &mut [Box<dyn Queued>],
    actors: &[Actor],
    draft: &mut TransactionDraft<'_>,
    permit: impl Fn(&Actor) -> Result<(), ServiceError>,
) -> Vec<Result<(), ServiceError>> {
    let mut outcomes = Vec::with_capacity(acts.len());
    for (number, (act, actor)) in acts.iter_mut().zip(actors).enumerate() {
        if let Err(refusal) = permit(actor) {
            outcomes.push(Err(refusal));
            continue;
        }
        let mut view = View::new(draft, actor);
        let outcome = view.attempt(|view| act.decide(view));
        let staged = view.into_staged();
        outcomes.push(outcome.and_then(|kind| draft.accept(number, actor, staged, kind)));
    }
    outcomes
}

/// Turns the decisions of the acts into the writes of the transaction.
#[expect(clippy::too_many_arguments, reason = "the one place where all of a transaction comes together")]
pub(super) fn finish(
    draft: TransactionDraft<'_>,
    mut outcomes: Vec<Result<(), ServiceError>>,
    mut head: ChainHead,
    opening: Vec<AuditRecord>,
    keys: &AuditKeys,
    refusals: &Refusals,
    (growth, bound): (&Growth, u64),
    actors: &[Actor],
    seal: &SealKeys,
    at: Instant,
) -> (Decision, Decided) {
    let now = draft.now;
    let mut changes = Changes::default();
    let mut written = Vec::new();
    let mut row_writes: HashMap<RowId, RowWrite> = HashMap::new();
    for (id, opened) in draft.rows.into_iter().filter(|(_, opened)| opened.changed) {
        if let Some(value) = &opened.value {
            changes.exposures.extend(changed_exposure_rows(opened.original.as_ref(), value));
        }
        match put_row(&id, opened, seal.current(), &mut changes) {
            Ok(row_write) => {
                written.push((id.clone(), row_write.generation));
                row_writes.insert(id, row_write);
            }
            Err(error) => {
                // A row that cannot be encoded is a fault of this program: nothing of the
                // transaction is written.
                outcomes.iter_mut().for_each(|outcome| *outcome = Err(error.clone()));
                let leaves = vec![Vec::new(); outcomes.len()];
                return (
                    Decision::Abandon,
                    Decided {
                        head,
                        outcomes,
                        leaves,
                        fresh_chunks: HashMap::new(),
                        written: Vec::new(),
                        refusals: None,
                        refused: (0, 0),
                        grown: Grown::default(),
                    },
                );
            }
        }
    }

    let mut noted = None;
    let mut refused = (0, 0);
    let denials = outcomes.iter().zip(actors).filter_map(|(outcome, actor)| refusal_of(outcome.as_ref().err()?, actor));
    for refusal in denials.chain(draft.refusals) {
        let (others, security_events) = &mut refused;
        *if refusal.security_event { security_events } else { others } += 1;
        noted.get_or_insert_with(|| refusals.clone()).note(refusal, now);
    }
    let due = noted.as_ref().unwrap_or(refusals).due(at);
    if !due.is_empty() {
        noted.get_or_insert_with(|| refusals.clone());
    }

    let mut leaves = vec![Vec::new(); outcomes.len()];
    let mut references = Vec::with_capacity(draft.events.len());
    for opening in opening {
        changes.audit.push(append(&mut head, keys, opening, now).1);
    }
    let mut grown = Grown::default();
    for event in draft.events {
        let mut record = event.record;
        record.row_writes = event.written.iter().filter_map(|id| row_writes.get(id).cloned()).collect();
        let (leaf, appended) = append(&mut head, keys, record, now);
        references.push((AuditReference { writer: appended.writer, sequence: appended.sequence }, leaf));
        if let Some(of_act) = leaves.get_mut(event.act) {
            of_act.push(leaf);
        }
        if let Some(principal) = actors.get(event.act).and_then(|actor| actor.principal.as_ref()) {
            grown.add(principal, &appended.record);
        }
        changes.audit.push(appended);
    }
    for record in due.into_iter().chain(growth.alarms(&mut grown, bound, at)) {
        changes.audit.push(append(&mut head, keys, record, now).1);
    }

    for (mut grant, event) in draft.grants {
        if let Some((reference, _)) = references.get(event) {
            grant.audit = *reference;
        }
        changes.grants.push(grant);
    }
    for (key, mut row) in draft.requests {
        // An empty outcome stands for the record itself.
        if let (true, Some(reference)) =
            (row.outcome.is_empty(), draft.request_events.get(&key).and_then(|event| references.get(*event)))
        {
            let (reference, leaf) = *reference;
            row.outcome = RecordName { reference, leaf }.encode();
        }
        let seal =
            seal.current().seal_request(&key.principal, key.request, key.chunk, &row.digest, row.expires, &row.outcome);
        row.outcome.splice(..0, seal);
        changes.requests.push(RequestPut { key, row });
    }
    changes.revocations = draft.revocations;
    changes.fingerprints = draft
        .fingerprints
        .into_iter()
        .flat_map(|(prefix, owners)| owners.into_iter().map(move |owner| FingerprintPut { prefix, owner }))
        .collect();
    changes.shipments = draft.shipments.into_values().collect();
    changes.refusals = draft.refused_lines;
    changes.tasks = draft.tasks.into_values().collect();

    let nothing = changes.audit.is_empty()
        && changes.requests.is_empty()
        && changes.shipments.is_empty()
        && changes.refusals.is_empty()
        && changes.tasks.is_empty();
    let decision = if nothing { Decision::Abandon } else { Decision::Commit(Box::new(changes)) };
    (
        decision,
        Decided { head, outcomes, leaves, fresh_chunks: draft.fresh_chunks, written, refusals: noted, refused, grown },
    )
}
