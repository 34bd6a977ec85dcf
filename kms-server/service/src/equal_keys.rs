//! Key values that several slots have: whoever could know one of these keys could know all of them.
//!
//! The row of a counter domain says who could know its value. No list says which slots have the
//! value. Therefore the functions here read all meters, and only where such values exist.

use std::sync::Arc;

use kms_domain::{CounterDomainId, ExposureReason, KeyType, Meter, SharedExposures, SharedKey, Slot, SystemTitle};
use kms_proto::v1::{MetersChanged, audit_record::Event};
use kms_store::{MeterFilter, Reads, RowKind};

use crate::island::IslandContext;
use crate::keys::exposure::expose_to_who_knows_a_kek;
use kms_base::error::ServiceError;
use kms_ledger::{Decision, ServerAct};

/// Adds exposures that only the rows of meters have to the rows of their counter domains: earlier
/// versions of the server kept them in each meter's row alone. Returns how many meters had more
/// exposures. Without counter domains no meter is read.
///
/// # Errors
/// The database cannot be reached, or the server is busy.
pub(crate) async fn share_exposures(island: &Arc<IslandContext>) -> Result<u64, ServiceError> {
    let known = shared_values(island).await?;
    let (mut told, mut after) = (0, None);
    while !known.is_empty() {
        let page = island.store.meter_page(&MeterFilter::default(), after, PAGE).await?;
        let Some(last) = page.last() else { break };
        after = Some(last.title);
        let meters =
            page.iter().filter_map(|row| Meter::from_row(row.title, island.name(), row.row.body.clone().into()).ok());
        let says_more = |meter: &Meter| {
            let mut versions = meter
                .slots
                .iter()
                .flat_map(Slot::versions)
                .filter_map(|version| Some((version, known.get(&version.domain()?)?)));
            versions.any(|(version, known)| {
                version.exposures().iter().any(|exposure| {
                    !known.iter().any(|one| (&one.party, one.reason) == (&exposure.party, exposure.reason))
                })
            })
        };
        let due: Vec<SystemTitle> = meters.filter(says_more).map(|meter| meter.title).collect();
        if due.is_empty() {
            continue;
        }
        told += due.len() as u64;
        let reads = Reads { meters: due.clone(), ..Reads::default() };
        let act = island.committer.act(ServerAct::SHARE_EXPOSURES, reads, move |view| {
            let mut meters = Vec::new();
            for title in &due {
                if let Some(meter) = view.meter(*title)?
                    && view.share_exposures_of(&meter)?
                {
                    meters.push(title.octets().to_vec().into());
                }
            }
            if meters.is_empty() {
                return Ok(Decision::unchanged(()));
            }
            let entry = view.append(Event::MetersChanged(MetersChanged {
                change: "exposures-shared".to_owned(),
                meters,
                ..MetersChanged::default()
            }));
            Ok(Decision::recorded(entry, ()))
        });
        act.await?;
    }
    Ok(told)
}

/// Exposes keys of groups that left under a KEK which several meters have, if an officer reported
/// that somebody knows it. Whoever knows that value knows what left under it for every meter that
/// has it, not only for the reported meter. The rows of the groups say so afterwards. For the
/// meters' own keys the counter domain says it. No meter is read if no such value was reported.
///
/// # Errors
/// The database cannot be reached, or the server is busy. What was changed before is committed and
/// recorded.
pub(crate) async fn expose_groups_under_equal_keks(island: &Arc<IslandContext>) -> Result<(), ServiceError> {
    let mut reported = shared_values(island).await?;
    reported.retain(|_, exposures| exposures.iter().any(|exposure| exposure.reason == ExposureReason::Reported));
    let mut after = None;
    while !reported.is_empty() {
        let page = island.store.meter_page(&MeterFilter::default(), after, PAGE).await?;
        let Some(last) = page.last() else { break };
        after = Some(last.title);
        // The seals are not checked here: this only chooses rows, which the act reads again and
        // verifies (I5).
        let meters =
            page.iter().filter_map(|row| Meter::from_row(row.title, island.name(), row.row.body.clone().into()).ok());
        let concerned = |meter: &Meter| {
            keks_of_domains(meter)
                .into_iter()
                .any(|(id, delivered)| reported.contains_key(&id) && !delivered.is_empty())
        };
        let due: Vec<SystemTitle> = meters.filter(concerned).map(|meter| meter.title).collect();
        if due.is_empty() {
            continue;
        }
        let reads = Reads { meters: due.clone(), ..Reads::default() };
        let act = island.committer.act(ServerAct::SHARE_EXPOSURES, reads, move |view| {
            for title in &due {
                let meter = match view.meter(*title) {
                    Ok(Some(meter)) => meter,
                    // I5: its row was refused, which is recorded.
                    Ok(None) | Err(ServiceError::PermissionDenied { .. }) => continue,
                    Err(error) => return Err(error),
                };
                for (id, delivered) in keks_of_domains(&meter) {
                    let exposures = view.domain(id)?.map(|domain| domain.exposures.clone()).unwrap_or_default();
                    for exposure in exposures.iter().filter(|exposure| exposure.reason == ExposureReason::Reported) {
                        expose_to_who_knows_a_kek(view, &meter, &delivered, &exposure.party)?;
                    }
                }
            }
            Ok(Decision::of(view.entry(), ()))
        });
        act.await?;
    }
    Ok(())
}

/// Who could know the values that several slots have, as the rows of counter domains say.
async fn shared_values(island: &IslandContext) -> Result<SharedExposures, ServiceError> {
    let (mut known, mut after) = (SharedExposures::new(), None);
    loop {
        let page = island.store.sealed_page(RowKind::CounterDomain, after.as_deref(), PAGE).await?;
        let Some((last, _)) = page.last() else { return Ok(known) };
        after = Some(last.clone());
        let opened = page.iter().filter_map(|(id, row)| {
            island.committer.open_domain(id.as_slice().try_into().map(CounterDomainId).ok()?, row).ok()
        });
        known.extend(opened.map(|domain| (domain.id, domain.exposures.clone())));
    }
}

/// The counter domains of a meter's KEKs, with the keys of groups that left under each.
fn keks_of_domains(meter: &Meter) -> Vec<(CounterDomainId, Vec<SharedKey>)> {
    let keks = meter.slots.iter().filter(|slot| slot.key_type() == KeyType::KEK);
    let versions = keks.flat_map(|slot| slot.versions().iter().map(|version| (slot.setup(), version)));
    versions
        .filter_map(|(setup, version)| Some((version.domain()?, meter.shared_under(setup, version.number()))))
        .collect()
}

/// Rows that are read, and at most written, at once.
const PAGE: u32 = 256;
