//! The delivery of a recorded grant: its keys are wrapped for the grantee inside the HSM.

use std::sync::{Arc, Mutex};

use futures::future;
use kms_domain::Owner;
use kms_hsm::{Agreement, HsmError, KeySource, Recipient, WrappedKey};
use kms_proto::v1;
use prost::Message as _;
use tracing::Instrument as _;

use super::plan::GrantPlan;
use crate::island::IslandContext;
use kms_authz::Caller;
use kms_base::error::ServiceError;
use kms_base::metrics;
use kms_ledger::AuditLeaf;

/// The answer to a chunk.
#[derive(Debug)]
pub struct Granted {
    /// One envelope or more for each token that keys came from.
    pub envelopes: Vec<v1::Envelope>,
    /// The meters, or the group, whose keys were refused.
    pub refusals: Vec<(Owner, ServiceError)>,
    /// The leaf of the grant's audit record, if anything was granted.
    pub leaf: Option<AuditLeaf>,
    /// The state of the rotation of the group's GBEK; only for a group.
    pub rotation: Option<v1::GroupRotation>,
}

/// Wraps the keys of a recorded grant for the grantee, and seals the manifest.
///
/// # Errors
/// The HSM fails for the whole grant.
pub(super) async fn deliver(
    island: &IslandContext,
    caller: &Caller,
    plan: GrantPlan,
    leaf: Option<AuditLeaf>,
) -> Result<Granted, ServiceError> {
    let GrantPlan { entries, refusals, .. } = &plan;
    let rotation = entries.first().and_then(|entry| entry.rotation.clone());
    let mut granted = Granted { envelopes: Vec::new(), refusals: refusals.clone(), leaf, rotation };
    if entries.is_empty() {
        metrics().grant_refused(granted.refusals.iter().map(|(_, error)| error));
        return Ok(granted);
    }
    let replayed = plan.leaf.is_some();
    // Grants that end in the same minute share a key agreement: the expiry is part of its
    // derivation.
    let expiry = (plan.not_after.0 + 59_999) / 60_000 * 60_000;
    let transport = &plan.transport;
    let recipient =
        Recipient::new(&transport.public_point, transport.sha256, u64::try_from(expiry).unwrap_or_default())
            .map_err(ServiceError::from)?;
    let sources: Vec<KeySource> =
        entries.iter().flat_map(|entry| entry.keys.iter().map(|key| key.source.clone())).collect();
    let places: Vec<(usize, usize)> = entries
        .iter()
        .enumerate()
        .flat_map(|(entry, planned)| (0..planned.keys.len()).map(move |key| (entry, key)))
        .collect();
    let hsm = island.hsm_for(caller);
    let groups = hsm.split_by_token(&sources)?;
    let plan = Arc::new(plan);
    // One envelope for each token and each part of a chunk: no worker of a token is busy with one
    // caller's chunk for long.
    let mut envelopes = Vec::new();
    for group in groups.iter().flat_map(|group| parts(group, &places)) {
        let keys: Vec<KeySource> = group.iter().filter_map(|index| sources.get(*index).cloned()).collect();
        let places: Vec<(usize, usize)> = group.iter().filter_map(|index| places.get(*index).copied()).collect();
        let (island, digest) = (island.name().to_string(), transport_digest(&plan));
        let header = move |agreement: &Agreement| {
            let header = v1::EnvelopeHeader {
                algorithm: i32::from(agreement.algorithm.number()),
                island: island.clone(),
                ephemeral_public: agreement.ephemeral_public.to_vec().into(),
                transport_certificate_sha256: digest.clone(),
                not_after_ms: expiry,
            };
            header.encode_to_vec()
        };
        let failed = Arc::new(Mutex::new(Vec::new()));
        let (planned, failures) = (plan.clone(), failed.clone());
        let manifest = move |wrapped: &[Result<WrappedKey, HsmError>]| {
            let (manifest, missing) = planned.manifest(&places, wrapped);
            if let Ok(mut failures) = failures.lock() {
                *failures = missing;
            }
            manifest.encode_to_vec()
        };
        let span = tracing::debug_span!("hsm.envelope", kms.keys = keys.len());
        let (hsm, recipient) = (hsm.clone(), recipient.clone());
        envelopes.push(async move {
            hsm.envelope(recipient, keys, header, manifest).instrument(span).await.map(|envelope| (envelope, failed))
        });
    }
    for (envelope, failed) in future::try_join_all(envelopes).await? {
        granted.envelopes.push(v1::Envelope {
            header: envelope.header.into(),
            manifest: envelope.manifest.into(),
            seal: envelope.seal.to_vec().into(),
        });
        if let Ok(mut failures) = failed.lock() {
            granted.refusals.append(&mut failures);
        }
    }
    // All or nothing for a meter: if one of its keys could not be wrapped, the meter is refused.
    let refused = |owner: Owner| granted.refusals.iter().any(|(refused, _)| *refused == owner);
    let given = plan.entries.iter().filter(|entry| granted.refusals.is_empty() || !refused(entry.owner));
    let (count, keys) = given.fold((0, 0), |(entries, keys), entry| (entries + 1, keys + entry.keys.len()));
    metrics().granted(replayed, count, keys);
    metrics().grant_refused(granted.refusals.iter().map(|(_, error)| error));
    Ok(granted)
}

/// Divides the keys of one token into envelopes and keeps each meter's keys together. `group` holds
/// indices of `places`.
fn parts(group: &[usize], places: &[(usize, usize)]) -> Vec<Vec<usize>> {
    let entry = |index: &usize| places.get(*index).map(|(entry, _)| *entry);
    let mut parts: Vec<Vec<usize>> = Vec::new();
    for of_meter in group.chunk_by(|one, next| entry(one) == entry(next)) {
        match parts.last_mut().filter(|part| part.len() + of_meter.len() <= PART) {
            Some(part) => part.extend_from_slice(of_meter),
            None => parts.push(of_meter.to_vec()),
        }
    }
    parts
}

fn transport_digest(plan: &GrantPlan) -> bytes::Bytes {
    plan.transport.sha256.to_vec().into()
}

/// Keys of one envelope. A worker of a token wraps them in a few milliseconds, or in 0.4 s where
/// each call of the HSM takes 1 ms.
const PART: usize = 128;
