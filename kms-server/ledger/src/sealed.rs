//! Sealed rows: what they hold, how the store names them, and how they are opened and sealed (I5).

use std::{fmt, sync::Arc};

use kms_domain::{
    Campaign, CampaignId, CounterDomain, CounterDomainId, DeviceType, DeviceTypeId, Generation, Group, GroupId,
    Invitation, Island, IslandName, Meter, Principal, PrincipalId, Proposal, ProposalId, QuotaUse, RootId,
    RootRotation, RowId, RowSeal, SealKey, SealKeys, Slots, SystemTitle, WorkOrder, WorkOrderEnd, WorkOrderId,
};
use kms_proto::v1::RowWrite;
use kms_store::{Changes, MeterProjection, MeterPut, RowKind, SealedPut, SealedRow, WorkOrderColumns, WorkOrderEnding};

use super::seen::Seen;
use kms_base::error::ServiceError;

/// A type that one kind of sealed row holds.
pub(super) trait RowContent: Sized {
    /// What names a row of this kind.
    type Key;

    /// The row that this key names.
    fn row(key: Self::Key) -> RowId;
    /// The row that holds this value.
    fn own_row(&self) -> RowId;
    /// The value, if it is of this type.
    fn of(value: Value) -> Option<Arc<Self>>;
    /// The value of any type.
    fn value(self: Arc<Self>) -> Value;
}

/// One line for each kind of sealed row: its type, the field that names it, and that field's type.
macro_rules! contents {
    ($($content:ident by $field:ident: $key:ty;)*) => {
        /// What a sealed row holds.
        #[derive(Clone)]
        pub(super) enum Value {
            $($content(Arc<$content>),)*
        }

        $(impl RowContent for $content {
            type Key = $key;

            fn row(key: $key) -> RowId {
                RowId::$content(key)
            }

            fn own_row(&self) -> RowId {
                RowId::$content(ToOwned::to_owned(&self.$field))
            }

            fn of(value: Value) -> Option<Arc<Self>> {
                match value {
                    Value::$content(content) => Some(content),
                    _ => None,
                }
            }

            fn value(self: Arc<Self>) -> Value {
                Value::$content(self)
            }
        })*
    };
}

contents! {
    Meter by title: SystemTitle;
    Principal by id: PrincipalId;
    Group by id: GroupId;
    DeviceType by id: DeviceTypeId;
    CounterDomain by id: CounterDomainId;
    Island by name: IslandName;
    QuotaUse by principal: PrincipalId;
    Campaign by id: CampaignId;
    Proposal by id: ProposalId;
    RootRotation by to: RootId;
    Invitation by handheld: PrincipalId;
    WorkOrder by id: WorkOrderId;
}

impl Value {
    /// The keys in the row, if the row belongs to an owner of keys.
    pub(super) fn slots(&self) -> Option<&Slots> {
        match self {
            Self::Meter(meter) => Some(&meter.slots),
            Self::Group(group) => Some(&group.slots),
            Self::DeviceType(device_type) => Some(&device_type.slots),
            _ => None,
        }
    }
}

/// A row as it stands within the transaction.
#[derive(Clone)]
pub(super) struct Opened {
    /// As in the database; `None`: absent.
    pub(super) generation: Option<Generation>,
    pub(super) value: Option<Value>,
    /// The content as in the database: the index of exposures changes by the difference.
    pub(super) original: Option<Value>,
    pub(super) changed: bool,
    /// The search columns of a meter are written too.
    pub(super) reprojected: bool,
}

/// Opens a row that was read, inside or outside a transaction. The seal must fit, and the row must
/// be at least as new as this server has seen it (I5).
///
/// # Errors
/// Why the row is refused.
pub(super) fn open_row(
    id: &RowId,
    row: Option<&SealedRow>,
    seal: &SealKeys,
    seen: &Seen,
    island: &IslandName,
) -> Result<Opened, String> {
    let opened = look_at_row(id, row, seal, seen, island)?;
    if let Some(generation) = opened.generation {
        seen.note(id, generation.number());
    }
    Ok(opened)
}

/// As [`open_row`], for a walk over all rows: what this server has seen does not grow by it.
///
/// # Errors
/// As there.
pub(super) fn look_at_row(
    id: &RowId,
    row: Option<&SealedRow>,
    seal: &SealKeys,
    seen: &Seen,
    island: &IslandName,
) -> Result<Opened, String> {
    let known = seen.generation(id);
    let Some(row) = row else {
        // I5: a row that this server has seen does not vanish.
        if known.is_some() {
            return Err(format!("the row of {id} was deleted"));
        }
        return Ok(Opened { generation: None, value: None, original: None, changed: false, reprojected: false });
    };
    let generation = i64::try_from(row.generation)
        .map_err(|_| "generation out of range".to_owned())
        .and_then(|number| Generation::from_i64(number).map_err(text))?;
    let stored = RowSeal::from_octets(&row.seal).map_err(text)?;
    seal.verify(id, generation, &row.body, &stored).map_err(text)?;
    // I5: an older row was put back.
    if known.is_some_and(|known| generation.number() < known) {
        return Err(format!("the row of {id} is older than this server has seen"));
    }
    let value = decode(id, island, bytes::Bytes::copy_from_slice(&row.body))?;
    Ok(Opened {
        generation: Some(generation),
        original: Some(value.clone()),
        value: Some(value),
        changed: false,
        reprojected: false,
    })
}

fn decode(id: &RowId, island: &IslandName, body: bytes::Bytes) -> Result<Value, String> {
    fn value<T: RowContent, E: fmt::Display>(decoded: Result<T, E>) -> Result<Value, String> {
        decoded.map(|content| Arc::new(content).value()).map_err(text)
    }
    match id {
        RowId::Meter(title) => value(Meter::from_row(*title, island, body)),
        RowId::Principal(principal) => value(Principal::from_row(principal.clone(), body)),
        RowId::Group(group) => value(Group::from_row(*group, island, body)),
        RowId::DeviceType(device_type) => value(DeviceType::from_row(*device_type, island, body)),
        RowId::CounterDomain(domain) => value(CounterDomain::from_row(*domain, island, body)),
        RowId::Island(name) => value(Island::from_row(name.clone(), body)),
        RowId::QuotaUse(principal) => value(QuotaUse::from_row(principal.clone(), body)),
        RowId::Campaign(campaign) => value(Campaign::from_row(*campaign, body)),
        RowId::Proposal(proposal) => value(Proposal::from_row(*proposal, body)),
        RowId::RootRotation(to) => value(RootRotation::from_row(*to, body)),
        RowId::Invitation(handheld) => value(Invitation::from_row(handheld.clone(), body)),
        RowId::WorkOrder(order) => value(WorkOrder::from_row(order.clone(), body)),
    }
}

/// Seals a changed row in its next generation and adds it to the changes. Returns what the audit
/// record says of it.
///
/// # Errors
/// The row cannot be encoded: a fault of this program.
pub(super) fn put_row(
    id: &RowId,
    opened: Opened,
    seal: &SealKey,
    changes: &mut Changes,
) -> Result<RowWrite, ServiceError> {
    let fault = |error: String| ServiceError::Internal(format!("the row of {id} cannot be written: {error}"));
    let generation = opened.generation.map_or(Generation::FIRST, Generation::next);
    let value = opened.value.ok_or_else(|| fault("it is absent".to_owned()))?;
    let body = encode(&value).map_err(fault)?;
    let digest = seal.row_digest(id, generation, &body);
    let row = SealedRow { generation: generation.number(), seal: *seal.seal(id, generation, &body).octets(), body };
    let row_write = RowWrite {
        kind: u32::from(id.kind()),
        id: id_octets(id).into(),
        generation: row.generation,
        digest: digest.to_vec().into(),
    };
    match value {
        Value::Meter(meter) => changes.meters.push(match (opened.generation, opened.reprojected) {
            (None, _) => MeterPut::insert(meter.title, row, projection(&meter)),
            (Some(_), true) => MeterPut::update_projection(meter.title, row, projection(&meter)),
            (Some(_), false) => MeterPut::update(meter.title, row),
        }),
        other => {
            if let Value::WorkOrder(order) = other {
                changes.work_orders.push(work_order_columns(&order));
            }
            let (kind, octets) = sealed_name(id);
            changes.sealed.push(SealedPut { kind, id: octets, row });
        }
    }
    Ok(row_write)
}

fn encode(value: &Value) -> Result<Vec<u8>, String> {
    match value {
        Value::Meter(meter) => meter.to_row().map_err(text),
        Value::Principal(principal) => principal.to_row().map_err(text),
        Value::Group(group) => group.to_row().map_err(text),
        Value::DeviceType(device_type) => device_type.to_row().map_err(text),
        Value::CounterDomain(domain) => Ok(domain.to_row()),
        Value::Island(island) => Ok(island.to_row()),
        Value::QuotaUse(used) => Ok(used.to_row()),
        Value::Campaign(campaign) => Ok(campaign.to_row()),
        Value::Proposal(proposal) => Ok(proposal.to_row()),
        Value::RootRotation(rotation) => Ok(rotation.to_row()),
        Value::Invitation(invitation) => invitation.to_row().map_err(text),
        Value::WorkOrder(order) => Ok(order.to_row()),
    }
}

/// What the search columns show of a meter.
fn projection(meter: &Meter) -> MeterProjection {
    MeterProjection {
        vendor: meter.class.vendor.to_string(),
        profile: meter.class.profile.to_string(),
        status: u8::try_from(meter.class.status.number()).unwrap_or_default(),
        head_end: meter.class.head_end.as_ref().map(ToString::to_string),
        batch: Some(meter.batch.clone()).filter(|batch| !batch.is_empty()),
        groups: meter.class.groups.iter().map(|group| group.0).collect(),
    }
}

/// What the search columns show of a work order.
pub fn work_order_columns(order: &WorkOrder) -> WorkOrderColumns {
    WorkOrderColumns {
        id: order.id.clone(),
        maker: order.maker.clone(),
        technician: order.content.technician.folded(),
        end: match &order.end {
            None => WorkOrderEnding::None,
            Some(WorkOrderEnd { completed: true, .. }) => WorkOrderEnding::Completed,
            Some(_) => WorkOrderEnding::Cancelled,
        },
        from: order.content.from,
        until: order.content.until,
    }
}

/// The name in the store of a sealed row other than a meter's.
pub fn sealed_name(id: &RowId) -> (RowKind, Vec<u8>) {
    match id {
        RowId::Meter(title) => (RowKind::Island, title.octets().to_vec()),
        RowId::Group(group) => (RowKind::Group, group.0.to_be_bytes().to_vec()),
        RowId::DeviceType(device_type) => (RowKind::DeviceType, device_type.0.to_be_bytes().to_vec()),
        RowId::Principal(principal) => principal_row(principal),
        RowId::CounterDomain(domain) => (RowKind::CounterDomain, domain.0.to_vec()),
        RowId::Island(island) => (RowKind::Island, island.as_str().as_bytes().to_vec()),
        RowId::QuotaUse(principal) => quota_use_row(principal),
        RowId::Campaign(campaign) => (RowKind::Campaign, campaign.octets().to_vec()),
        RowId::Proposal(proposal) => (RowKind::Proposal, proposal.octets().to_vec()),
        RowId::RootRotation(to) => (RowKind::RootRotation, to.octets().to_vec()),
        RowId::Invitation(handheld) => invitation_row(handheld),
        RowId::WorkOrder(order) => work_order_row(order),
    }
}

/// The name in the store of the row that counts what a principal has used of its quotas.
pub fn quota_use_row(id: &PrincipalId) -> (RowKind, Vec<u8>) {
    (RowKind::QuotaUse, id.to_string().into_bytes())
}

/// The name in the store of a work order's row.
pub fn work_order_row(id: &WorkOrderId) -> (RowKind, Vec<u8>) {
    (RowKind::WorkOrder, id.as_str().as_bytes().to_vec())
}

/// The name in the store of a principal's row.
pub fn principal_row(id: &PrincipalId) -> (RowKind, Vec<u8>) {
    (RowKind::Principal, id.to_string().into_bytes())
}

/// The name in the store of the row of a handheld's last invitation.
pub fn invitation_row(handheld: &PrincipalId) -> (RowKind, Vec<u8>) {
    (RowKind::Invitation, handheld.to_string().into_bytes())
}

fn id_octets(id: &RowId) -> Vec<u8> {
    match id {
        RowId::Meter(title) => title.octets().to_vec(),
        other => sealed_name(other).1,
    }
}

fn text(error: impl fmt::Display) -> String {
    error.to_string()
}
