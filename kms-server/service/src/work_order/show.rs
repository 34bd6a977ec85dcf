//! Work orders as their readers see them: one, and lists.

use async_recursion::async_recursion as boxed;

use kms_domain::{PersonName, Principal, PrincipalId, UnixMillis, WorkOrder, WorkOrderId, WorkOrderState};
use kms_proto::v1;
use kms_store::{RowKind, WorkOrderFilter};

use super::{
    WorkOrderService,
    message::{Shown, message},
};
use crate::island::IslandContext;
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::Asker;

/// Which orders a list has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkOrderQuery {
    /// Of this technician.
    pub technician: Option<PersonName>,
    /// Made by this principal.
    pub maker: Option<PrincipalId>,
    /// In this state now.
    pub state: Option<WorkOrderState>,
    /// Whose time ends after this moment.
    pub ends_after: Option<UnixMillis>,
    /// Whose time begins before this moment.
    pub begins_before: Option<UnixMillis>,
}

/// A page of orders.
#[derive(Clone, Debug, Default)]
pub struct WorkOrderPage {
    /// The orders, in the order of their begin.
    pub orders: Vec<v1::WorkOrder>,
    /// Begin and id of the last order that was looked at, if more may follow.
    pub next: Option<(UnixMillis, WorkOrderId)>,
}

impl WorkOrderQuery {
    /// The query of a caller who sees only orders of this technician; `None`: it asks for others.
    fn of_technician(self, technician: &PersonName) -> Option<Self> {
        match &self.technician {
            Some(other) if !other.is_same(technician) => None,
            _ => Some(Self { technician: Some(technician.clone()), ..self }),
        }
    }

    /// The query of a caller who sees only orders that it made; `None`: it asks for others.
    fn of_maker(self, maker: &PrincipalId) -> Option<Self> {
        match &self.maker {
            Some(other) if other != maker => None,
            _ => Some(Self { maker: Some(maker.clone()), ..self }),
        }
    }

    fn columns(&self, now: UnixMillis) -> WorkOrderFilter {
        WorkOrderFilter {
            technician: self.technician.as_ref().map(PersonName::folded),
            maker: self.maker.clone(),
            state: self.state.map(|state| (state, now)),
            ends_after: self.ends_after,
            begins_before: self.begins_before,
        }
    }

    /// Whether the order, by its sealed row, is one of those (I5).
    fn matches(&self, order: &WorkOrder, now: UnixMillis) -> bool {
        self.technician.as_ref().is_none_or(|technician| order.is_of(technician))
            && self.maker.as_ref().is_none_or(|maker| order.maker == *maker)
            && self.state.is_none_or(|state| order.state(now) == state)
            && self.ends_after.is_none_or(|time| order.content.until > time)
            && self.begins_before.is_none_or(|time| order.content.from < time)
    }
}

impl WorkOrderService {
    /// One order.
    ///
    /// # Errors
    /// Not permitted, alike for an unknown order and for one that the caller may not see; or the
    /// database cannot be reached.
    #[boxed]
    pub async fn show(&self, caller: &Caller, id: &WorkOrderId) -> Result<v1::WorkOrder, ServiceError> {
        let asker = self.island.asker(caller).await?;
        let row = self.island.store.sealed(RowKind::WorkOrder, id.as_str().as_bytes()).await?;
        let order = match row.map(|row| self.island.committer.open_work_order(id, &row)).transpose() {
            // Another server may have written the row after it was read here. So it is read once
            // more. To a caller, a row that does not verify is absent (I5).
            Err(ServiceError::FailedPrecondition { .. }) => {
                let row = self.island.store.sealed(RowKind::WorkOrder, id.as_str().as_bytes()).await?;
                row.and_then(|row| self.island.committer.open_work_order(id, &row).ok())
            }
            other => other?,
        };
        let of_any = Action::ShowWorkOrder { own: false, assigned: false, place: false };
        let Some(order) = order else { return Err(missing(&asker, &of_any, id)) };
        let (own, assigned) = standing(asker.principal(), &order);
        let shown = [(true, Shown::All), (false, Shown::WithoutPlace)].into_iter().find(|(place, _)| {
            asker.permits(&Action::ShowWorkOrder { own, assigned, place: *place }, &Resource::Island)
        });
        let (_, shown) = shown.ok_or_else(|| ServiceError::denied(of_any.name()))?;
        Ok(message(&order, shown, IslandContext::now()))
    }

    /// A page of the orders that the caller may see.
    ///
    /// # Errors
    /// Not permitted, or the database cannot be reached.
    #[boxed]
    pub async fn list(
        &self,
        caller: &Caller,
        query: WorkOrderQuery,
        after: Option<(UnixMillis, WorkOrderId)>,
        limit: u32,
    ) -> Result<WorkOrderPage, ServiceError> {
        let asker = self.island.asker(caller).await?;
        let permits = |own, assigned| asker.permits(&Action::ListWorkOrders { own, assigned }, &Resource::Island);
        let query = match asker.principal().technician() {
            _ if permits(false, false) => Some(query),
            Some(technician) if permits(false, true) => query.of_technician(technician),
            _ if permits(true, false) => query.of_maker(&caller.principal),
            _ => return Err(ServiceError::denied(Action::ListWorkOrders { own: true, assigned: false }.name())),
        };
        let Some(query) = query else { return Ok(WorkOrderPage::default()) };
        let now = IslandContext::now();
        let rows = self.island.store.work_order_page(&query.columns(now), after, limit).await?;
        let full = rows.len() == usize::try_from(limit).unwrap_or(usize::MAX);
        let next = rows.last().map(|row| (row.from, row.id.clone())).filter(|_| full);
        // I5: the columns found these orders, and the sealed rows decide. A row that was tampered
        // with is left out; the scrub reports it.
        let orders = rows
            .iter()
            .filter_map(|row| self.island.committer.open_work_order(&row.id, &row.row).ok())
            .filter(|order| query.matches(order, now));
        Ok(WorkOrderPage { orders: orders.map(|order| message(&order, Shown::Listed, now)).collect(), next })
    }
}

/// Whether the principal made the order, and whether it is its technician's handheld.
pub(super) fn standing(principal: &Principal, order: &WorkOrder) -> (bool, bool) {
    let assigned = principal.technician().is_some_and(|technician| order.is_of(technician));
    (order.maker == principal.id, assigned)
}

/// The error for an order that does not exist. Only a caller that may see all orders learns that.
pub(super) fn missing(asker: &Asker, of_any: &Action, id: &WorkOrderId) -> ServiceError {
    if asker.permits(of_any, &Resource::Island) {
        ServiceError::NotFound { what: format!("work order {id}") }
    } else {
        ServiceError::denied(of_any.name())
    }
}
