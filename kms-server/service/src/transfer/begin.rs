//! Begins transfers: the HSM makes the new key versions, then each order is decided.

use async_recursion::async_recursion as boxed;
use std::{collections::HashMap, sync::Arc};

use aws_lc_rs::digest;
use futures::{StreamExt, TryStreamExt, stream};
use kms_domain::{
    CHALLENGE, ClassRoots, KeyOrigin, KeyShape, KeyState, KeyType, Meter, NewKeyOrigin, NewKeyVersion, OrderedKeys,
    Outcome, Owner, OwnerKind, RequestId, SecuritySetupId, Slot, SystemTitle, TaskWork, TransferId, TransferOrder,
    WrappedKey,
};
use kms_store::Reads;

use super::{
    TransferService,
    counters::allocate_counters,
    emit,
    error::refused,
    exposure::expose_delivered,
    permit::{permits_order, permits_step},
    record::{Advances, refuse_all},
    rows::{extend_by_tasks, group_row, own_meter},
    step::{Decided, DecidedStep, Order, StepAnswer},
    task::{is_lost, tell_task},
};
use crate::campaign::{begin_task, task_reads};
use crate::island::IslandContext;
use kms_authz::Caller;
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, AuditLeaf, Decision, Keys, Known, Permit, Request, View};

impl TransferService {
    /// Begins transfers. An error that concerns one meter is in its answer.
    ///
    /// # Errors
    /// Errors that concern all meters: the caller, the request id, the HSM or the database.
    #[boxed]
    pub async fn begin(
        &self,
        caller: &Caller,
        request: RequestId,
        digest: [u8; 32],
        orders: Vec<Order>,
    ) -> Result<(Vec<StepAnswer>, Option<AuditLeaf>), ServiceError> {
        let asker = self.island.asker(caller).await?;
        let known = self.meters(orders.iter().map(|order| order.meter)).await?;
        // Refused before the HSM makes a key.
        let permitted: Vec<bool> = orders
            .iter()
            .map(|order| known.get(&order.meter).is_some_and(|meter| permits_order(&asker, meter, order).is_ok()))
            .collect();
        let paid = self.paid_by(caller);
        let prepared = paid.prepare(&orders, &permitted, &known).await?;
        let groups =
            orders.iter().filter_map(|order| known.get(&order.meter)).flat_map(|meter| meter.class.groups.clone());
        let mut sealed = vec![self.island.row_name()];
        sealed.extend(groups.map(group_row));
        let mut reads = Reads { meters: orders.iter().map(|order| order.meter).collect(), sealed, ..Reads::default() };
        for (order, permitted) in orders.iter().zip(&permitted) {
            if let Some(task) = order.task.filter(|_| *permitted) {
                reads.extend(&task_reads(task.campaign, [order.meter]));
            }
        }
        extend_by_tasks(&mut reads, known.values());
        let act = Begin { island: self.island.clone(), request, orders, prepared, reads };
        let committed = self.island.door.act(caller, Request { id: request, digest }, act).await?;
        Ok((paid.answer(committed.value).await?, committed.leaves.first().copied()))
    }

    /// The new versions of each order, and its first challenge.
    async fn prepare(
        &self,
        orders: &[Order],
        permitted: &[bool],
        known: &HashMap<SystemTitle, Arc<Meter>>,
    ) -> Result<Vec<Prepared>, ServiceError> {
        let challenges = self.challenges(orders.len()).await?;
        let each: Vec<_> = orders
            .iter()
            .zip(permitted)
            .zip(challenges)
            .map(|((order, permitted), challenge)| {
                self.prepare_one(order.clone(), known.get(&order.meter).filter(|_| *permitted).cloned(), challenge)
            })
            .collect();
        stream::iter(each).buffered(KEYS_AT_ONCE).try_collect().await
    }

    async fn prepare_one(
        &self,
        order: Order,
        meter: Option<Arc<Meter>>,
        challenge: [u8; CHALLENGE],
    ) -> Result<Prepared, ServiceError> {
        let wanted = match order.key_type {
            Some(KeyType::KEK) => vec![KeyType::KEK, KeyType::GUEK],
            Some(one) => vec![one],
            None => Vec::new(),
        };
        let mut keys = Vec::with_capacity(wanted.len());
        if let Some(meter) = meter {
            for key_type in wanted {
                keys.extend(self.new_version(&meter, order.setup, key_type).await?);
            }
        }
        Ok(Prepared { keys, challenge })
    }

    /// A new key version, made as the device profile says. `None` for keys that the meter does not
    /// own or does not take by `key_transfer`.
    async fn new_version(
        &self,
        meter: &Meter,
        setup: Option<SecuritySetupId>,
        key_type: KeyType,
    ) -> Result<Option<NewKeyVersion>, ServiceError> {
        let Ok(setup) = setup_of(meter, setup) else { return Ok(None) };
        if meter.slots.get(setup, key_type).is_none() || emit::key_id(&self.island, meter, setup, key_type).is_none() {
            return Ok(None);
        }
        let profile = self.island.profiles.get(&meter.class.profile).and_then(|profile| profile.key(setup, key_type));
        let length = match profile.map(|key| key.shape) {
            Some(KeyShape::Aes(length)) => length,
            _ => meter.suite.key_length(),
        };
        let root = self.island.row().roots(key_type.class()).and_then(ClassRoots::current);
        let (origin, wrapped) = match (profile.map(|key| key.origin), root) {
            (Some(NewKeyOrigin::Diversified), Some(root)) => {
                (KeyOrigin::Diversified { root_version: root.version, derivation: root.derivation, length }, None)
            }
            _ => {
                let stored = self.hsm.generate_stored(key_type, length).await?;
                let version = u8::try_from(stored.storage_kek_version.number()).unwrap_or_default();
                let wrapped = WrappedKey::new(key_type, version, stored.blob.into())
                    .map_err(|error| ServiceError::Internal(error.to_string()))?;
                (KeyOrigin::Generated, Some(wrapped))
            }
        };
        Ok(Some(NewKeyVersion { state: KeyState::PreActive, origin, wrapped, fingerprint: None }))
    }
}

/// What an order needs from the HSM.
struct Prepared {
    keys: Vec<NewKeyVersion>,
    challenge: [u8; CHALLENGE],
}

/// Transfers that a caller begins.
struct Begin {
    island: Arc<IslandContext>,
    request: RequestId,
    orders: Vec<Order>,
    prepared: Vec<Prepared>,
    reads: Reads,
}

impl Act for Begin {
    type Answer = Vec<Decided>;
    type Past = Known<Keys>;

    fn name(&self) -> &'static str {
        "beginTransfer"
    }

    fn reads(&self) -> Reads {
        self.reads.clone()
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        Ok(asker.each())
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Vec<Decided>>, ServiceError> {
        let mut advances = Advances::default();
        let mut decided: Vec<Decided> = Vec::with_capacity(self.orders.len());
        for (order, prepared) in self.orders.iter().zip(&self.prepared) {
            let begun = advances.attempt(view, |view, advances| {
                begin_one(view, &self.island, permit, order, prepared, self.request, advances)
            });
            decided.push((order.meter, begun.map(DecidedStep::going_on)));
        }
        refuse_all(view, &decided);
        advances.record(view);
        if decided.iter().all(|(_, step)| step.is_err()) {
            return Ok(Decision::forgotten(decided));
        }
        Ok(Decision::of(view.entry(), decided))
    }

    fn again(&self, _: Known<Keys>, permit: &Permit, view: &mut View<'_, '_>) -> Result<Vec<Decided>, ServiceError> {
        let mut decided: Vec<Decided> = Vec::with_capacity(self.orders.len());
        for order in &self.orders {
            let begun = began(view, permit, order, self.request);
            decided.push((order.meter, begun.map(DecidedStep::going_on)));
        }
        refuse_all(view, &decided);
        Ok(decided)
    }
}

fn begin_one(
    view: &mut View<'_, '_>,
    island: &IslandContext,
    permit: &Permit,
    order: &Order,
    prepared: &Prepared,
    request: RequestId,
    advances: &mut Advances,
) -> Result<Arc<Meter>, ServiceError> {
    let principal = permit.principal();
    if !principal.client_titles.contains(&order.client_title) {
        return Err(ServiceError::denied(format!("beginTransfer under client title {}", order.client_title)));
    }
    let mut meter = own_meter(view, order.meter)?;
    permits_order(permit.asker(), &meter, order)?;
    let setup = setup_of(&meter, order.setup)?;
    if let Some(key_type) = order.key_type.filter(|key_type| emit::key_id(island, &meter, setup, *key_type).is_none()) {
        return Err(ServiceError::FailedPrecondition {
            reason: format!("meters of device profile `{}` do not accept a {key_type} by key_transfer in security setup {setup}", meter.class.profile),
            next_step: "if the meter accepts this key by key_transfer, set the vendor's `key_id` in the device profile; if not, change the key on site".to_owned(),
        });
    }
    let keys = ordered_keys(view, island, &meter, setup, order, prepared)?;
    let transfer_order = TransferOrder {
        id: transfer_id(request, order.meter)?,
        setup,
        head_end: principal.id.clone(),
        campaign: order.task,
        client_title: order.client_title,
        form: order.form,
        keys,
        urgent: order.urgent,
        not_after: view.now().after(i64::from(order.lifetime_seconds) * 1_000),
        challenge: prepared.challenge,
    };
    if let Some(task) = order.task {
        // I8: policy permits more for tasks of campaigns than for other orders, so the task's row
        // is checked.
        begin_task(
            view,
            task,
            order.meter,
            &principal.id,
            setup,
            order.key_type.map_or(TaskWork::Probe, TaskWork::Rotate),
        )?;
    }
    let changed = Arc::make_mut(&mut meter);
    let earlier = changed.transfer.clone();
    if let Some(earlier) = &earlier
        && is_lost(view, earlier, order.meter)?
    {
        changed.withdraw_transfer(earlier.id, view.now()).map_err(|error| refused(&error))?;
    }
    changed.begin_transfer(transfer_order, view.now()).map_err(|error| refused(&error))?;
    expose_delivered(view, changed)?;
    let meter = allocate_counters(view, island, changed.clone())?;
    if let Some(earlier) = earlier {
        // The earlier transfer was given up: its lifetime had ended, or its task lease was lost.
        advances.push(&meter, &earlier, Outcome::Withdrawn.name(), 0, &[]);
        if earlier.campaign != order.task {
            tell_task(
                view,
                &earlier,
                meter.title,
                Outcome::Withdrawn,
                "another transfer was begun after its lifetime",
            )?;
        }
    }
    if let Some(transfer) = &meter.transfer {
        advances.push(&meter, transfer, transfer.stage.name(), transfer.step, &[]);
    }
    Ok(meter)
}

/// The present step of the transfer that the same request began before.
fn began(
    view: &mut View<'_, '_>,
    permit: &Permit,
    order: &Order,
    request: RequestId,
) -> Result<Arc<Meter>, ServiceError> {
    let meter = own_meter(view, order.meter)?;
    let id = transfer_id(request, order.meter)?;
    match meter.transfer.as_ref().filter(|transfer| transfer.id == id) {
        Some(transfer) => permits_step(view, permit, &meter, transfer).map(|()| meter.clone()),
        // If the order was refused then, its replay begins nothing either.
        None => Err(ServiceError::Aborted {
            reason: "the transfer that this request began has ended, or the request began none".to_owned(),
            next_step: "check the meter with `kms meter show`, then begin another transfer with a new request id"
                .to_owned(),
        }),
    }
}

fn ordered_keys(
    view: &mut View<'_, '_>,
    island: &IslandContext,
    meter: &Meter,
    setup: SecuritySetupId,
    order: &Order,
    prepared: &Prepared,
) -> Result<OrderedKeys, ServiceError> {
    let changed = || ServiceError::Aborted {
        reason: "the meter has changed since the keys of this request were made".to_owned(),
        next_step: "repeat the request".to_owned(),
    };
    match (order.key_type, prepared.keys.as_slice()) {
        (None, _) => Ok(OrderedKeys::Probe),
        (Some(KeyType::KEK), [kek, guek]) => Ok(OrderedKeys::Compound { kek: kek.clone(), guek: guek.clone() }),
        (Some(KeyType::KEK), _) => Err(changed()),
        (Some(key_type), [new]) => Ok(OrderedKeys::Own { key_type, new: new.clone() }),
        (Some(key_type), _) => {
            let owned_by_group = island
                .profiles
                .get(&meter.class.profile)
                .and_then(|profile| profile.key(setup, key_type))
                .is_some_and(|key| key.owner == OwnerKind::Group);
            // A campaign rotates the key of one group. Another order delivers the key of the first
            // group that has one.
            let campaign = order.task.map(|task| view.campaign(task.campaign)).transpose()?.flatten();
            let asked = campaign.and_then(|campaign| campaign.content.selection.group);
            for group in meter
                .class
                .groups
                .iter()
                .copied()
                .filter(|group| owned_by_group && asked.is_none_or(|asked| asked == *group))
            {
                let Some(found) = view.group(group)? else { continue };
                // The version that a rotation brings to the members; the active one if there is
                // none.
                if let Some(version) = found.newest(setup, key_type) {
                    return Ok(OrderedKeys::Shared { owner: Owner::Group(group), key_type, version: version.number() });
                }
            }
            Err(ServiceError::FailedPrecondition {
                reason: format!("the meter has no {key_type} in security setup {setup}"),
                next_step: "check its slots and groups with `kms meter show`".to_owned(),
            })
        }
    }
}

/// The id of the transfer that a request begins for a meter. A replay gets the same id.
fn transfer_id(request: RequestId, meter: SystemTitle) -> Result<TransferId, ServiceError> {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(b"meterkms/transfer");
    context.update(&request.octets());
    context.update(&meter.octets());
    let digest = context.finish();
    TransferId::from_octets(digest.as_ref().get(..16).unwrap_or_default())
        .map_err(|error| ServiceError::Internal(error.to_string()))
}

fn setup_of(meter: &Meter, setup: Option<SecuritySetupId>) -> Result<SecuritySetupId, ServiceError> {
    setup.or_else(|| meter.slots.iter().next().map(Slot::setup)).ok_or_else(|| ServiceError::FailedPrecondition {
        reason: "the meter has no keys".to_owned(),
        next_step: "import its shipment".to_owned(),
    })
}

const KEYS_AT_ONCE: usize = 16;
