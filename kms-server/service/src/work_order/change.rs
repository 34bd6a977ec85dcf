//! Changes, cancels and completes a work order.

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::{PlaceSalt, WorkOrder, WorkOrderContent, WorkOrderError, WorkOrderId};
use kms_proto::v1::{self, WorkOrderChanged, WorkOrderEnded, WorkOrderProblemCode as Code, audit_record::Event};
use kms_store::Reads;

use super::{
    Request, WorkOrderService, content_field,
    judge::{Judge, bound_orders},
    message::{Shown, message, recorded},
    new_salt,
    show::{missing, standing},
};
use kms_authz::{Action, Caller, Resource};
use kms_base::{bounds::Limits, error::ServiceError};
use kms_ledger::{Act, Asker, Decision, Entry, Known, Permit, View, work_order_row};

/// A change of a work order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkOrderChange {
    /// Other content.
    Content {
        /// The revision that it was made for.
        revision: u32,
        /// All of the new content.
        content: WorkOrderContent,
    },
    /// The work is not to be done.
    Cancel {
        /// Why; may be empty.
        reason: String,
    },
    /// The work was done.
    Complete,
}

impl WorkOrderChange {
    const fn action(&self, own: bool, assigned: bool) -> Action {
        match self {
            Self::Content { .. } => Action::ChangeWorkOrder { own },
            Self::Cancel { .. } => Action::CancelWorkOrder { own },
            Self::Complete => Action::CompleteWorkOrder { own, assigned },
        }
    }
}

impl WorkOrderService {
    /// Changes or ends an order.
    ///
    /// # Errors
    /// Not permitted, alike for an unknown order and for one that is not the caller's; it has
    /// ended; somebody else changed it; or the database cannot be reached.
    #[boxed]
    pub async fn change(
        &self,
        caller: &Caller,
        request: Request,
        id: WorkOrderId,
        change: WorkOrderChange,
    ) -> Result<v1::WorkOrder, ServiceError> {
        let act = ChangeOrder { id, change, salt: new_salt()?, limits: Arc::clone(&self.island.limits) };
        Ok(self.island.door.act(caller, request, act).await?.value)
    }
}

/// The act that changes an order.
struct ChangeOrder {
    id: WorkOrderId,
    change: WorkOrderChange,
    /// For another place.
    salt: PlaceSalt,
    limits: Arc<Limits>,
}

impl Act for ChangeOrder {
    type Answer = v1::WorkOrder;
    type Past = Known;

    fn name(&self) -> &'static str {
        self.change.action(false, false).name()
    }

    fn reads(&self) -> Reads {
        let meters = match &self.change {
            WorkOrderChange::Content { content, .. } => content.meters().to_vec(),
            WorkOrderChange::Cancel { .. } | WorkOrderChange::Complete => Vec::new(),
        };
        Reads { meters, sealed: vec![work_order_row(&self.id)], ..Reads::default() }
    }

    fn permit(&self, asker: Asker, view: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        let of_any = self.change.action(false, false);
        let Some(order) = view.work_order(&self.id)? else { return Err(missing(&asker, &of_any, &self.id)) };
        let (own, assigned) = standing(asker.principal(), &order);
        asker.require(&self.change.action(own, assigned), &Resource::Island)
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<v1::WorkOrder>, ServiceError> {
        let order = view.work_order(&self.id)?.ok_or_else(|| ServiceError::denied(self.name()))?;
        let mut changed = (*order).clone();
        let now = view.now();
        let entry = match &self.change {
            WorkOrderChange::Content { revision, content } => {
                if !changed.change(*revision, content.clone(), self.salt.clone(), now).map_err(refused)? {
                    return Ok(Decision::unchanged(shown(view, permit, &order)));
                }
                self.judge(view, permit, &order, content)?;
                view.append(Event::WorkOrderChanged(WorkOrderChanged {
                    work_order_id: self.id.to_string(),
                    revision: changed.revision,
                    work: Some(recorded(content)),
                }))
            }
            WorkOrderChange::Cancel { reason } => {
                changed.end(false, permit.principal().id.clone(), now).map_err(refused)?;
                self.ended(view, &changed, reason)
            }
            WorkOrderChange::Complete => {
                changed.end(true, permit.principal().id.clone(), now).map_err(refused)?;
                self.ended(view, &changed, "")
            }
        };
        let answer = shown(view, permit, &changed);
        view.put_work_order(changed)?;
        Ok(Decision::recorded(entry, answer))
    }

    fn again(&self, _: Known, permit: &Permit, view: &mut View<'_, '_>) -> Result<v1::WorkOrder, ServiceError> {
        let order = view.work_order(&self.id)?.ok_or_else(|| ServiceError::denied(self.name()))?;
        Ok(shown(view, permit, &order))
    }
}

impl ChangeOrder {
    /// Whether the caller may order the new content, and whether there is room for one more order:
    /// one that did not count any more counts again.
    fn judge(
        &self,
        view: &mut View<'_, '_>,
        permit: &Permit,
        order: &WorkOrder,
        content: &WorkOrderContent,
    ) -> Result<(), ServiceError> {
        match Judge::new(permit).refused_meters(view, content, order.content.meters()).first() {
            None => {}
            Some((meter, Code::Retired)) => {
                return Err(ServiceError::FailedPrecondition {
                    reason: format!("meter {meter} is retired"),
                    next_step: "leave it out of the work order".to_owned(),
                });
            }
            Some((meter, _)) => return Err(ServiceError::denied(format!("{} with meter {meter}", self.name()))),
        }
        if order.content.until.after(WorkOrder::COUNTED_MS) <= view.now() {
            bound_orders(view, &order.maker, &self.limits)?;
        }
        Ok(())
    }

    fn ended(&self, view: &mut View<'_, '_>, order: &WorkOrder, reason: &str) -> Entry {
        view.append(Event::WorkOrderEnded(WorkOrderEnded {
            work_order_id: self.id.to_string(),
            revision: order.revision,
            change: order.state(view.now()).name().to_owned(),
            reason: reason.to_owned(),
        }))
    }
}

/// The order for its caller: with the place, if policy lets the caller see it.
fn shown(view: &View<'_, '_>, permit: &Permit, order: &WorkOrder) -> v1::WorkOrder {
    let (own, assigned) = standing(permit.principal(), order);
    let place = permit.permits(&Action::ShowWorkOrder { own, assigned, place: true }, &Resource::Island);
    message(order, if place { Shown::All } else { Shown::WithoutPlace }, view.now())
}

/// Why an order does not change, and the next step.
fn refused(error: WorkOrderError) -> ServiceError {
    match error {
        WorkOrderError::Ended(_) => ServiceError::FailedPrecondition {
            reason: error.to_string(),
            next_step: "make a new work order".to_owned(),
        },
        WorkOrderError::OtherRevision { .. } => ServiceError::Aborted {
            reason: error.to_string(),
            next_step: "look at it with `kms work-order show`, and change it again if that is still right".to_owned(),
        },
        WorkOrderError::Content(error) => {
            ServiceError::invalid(format!("content.{}", content_field(&error)), error.reason().to_owned())
        }
    }
}
