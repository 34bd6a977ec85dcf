//! Whether policy permits what an order says, meter by meter (I8).

use std::{collections::HashMap, time::Duration};

use kms_domain::{MeterClass, MeterStatus, PrincipalId, SystemTitle, WorkOrder, WorkOrderContent};
use kms_proto::v1::{self, WorkOrderProblemCode as Code};

use kms_authz::{Action, Resource};
use kms_base::bounds::{Bound, Limits};
use kms_base::error::ServiceError;
use kms_ledger::{Permit, View};

/// Asks policy about the work of an act, once for each class of meters: policy does not remember
/// these decisions for other acts ([`Action::is_remembered`]).
pub(super) struct Judge<'a> {
    permit: &'a Permit,
    decisions: HashMap<Action, HashMap<MeterClass, bool>>,
}

impl<'a> Judge<'a> {
    /// For an act with this permit.
    pub(super) fn new(permit: &'a Permit) -> Self {
        Self { permit, decisions: HashMap::new() }
    }

    /// The principal that orders.
    pub(super) fn caller(&self) -> &'a PrincipalId {
        &self.permit.principal().id
    }

    /// The meters of an order at which the work is refused. For a caller who may not order this
    /// work, a meter is like an unknown one. `known` are meters that the order had before: they
    /// stay although they were retired since.
    pub(super) fn refused_meters(
        &mut self,
        view: &mut View<'_, '_>,
        content: &WorkOrderContent,
        known: &[SystemTitle],
    ) -> Vec<(SystemTitle, Code)> {
        let action = Action::CreateWorkOrder {
            tasks: content.tasks,
            technician: content.technician.clone(),
            hours: hours(content),
        };
        let decisions = self.decisions.entry(action.clone()).or_default();
        let mut permits = |class: &MeterClass| match decisions.get(class) {
            Some(decision) => *decision,
            None => {
                let decision = self.permit.permits(&action, &Resource::Meters(class));
                decisions.insert(class.clone(), decision);
                decision
            }
        };
        let mut refused = Vec::new();
        for title in content.meters() {
            // An error means that the row does not verify and counts as absent (I5), or that it is
            // read for the next attempt.
            let meter = view.meter(*title).ok().flatten().filter(|meter| permits(&meter.class));
            match meter {
                None => refused.push((*title, Code::NotPermitted)),
                Some(meter) if meter.class.status == MeterStatus::Retired && known.binary_search(title).is_err() => {
                    refused.push((*title, Code::Retired));
                }
                Some(_) => {}
            }
        }
        if refused.iter().any(|(_, code)| *code == Code::NotPermitted) {
            view.refuse("not permitted for a meter of the request".to_owned());
        }
        refused
    }
}

/// Whether the principal may have one more order. Those that have ended count too: the rows of
/// orders are never deleted, and one that lasts a second or is cancelled at once costs as much.
///
/// # Errors
/// The bound `work_orders_per_principal` is met, or the number was not read yet.
pub(super) fn bound_orders(view: &mut View<'_, '_>, maker: &PrincipalId, limits: &Limits) -> Result<(), ServiceError> {
    let bound = Bound::WorkOrdersPerPrincipal;
    let count = view.work_orders_of(maker)?;
    if count.orders < limits.of(bound) {
        return Ok(());
    }
    let days = WorkOrder::COUNTED_MS / DAY_MS;
    let what = format!("{maker} has {} work orders whose time is not over for {days} days yet", count.orders);
    // Without one in the database, all are of this call.
    let now = view.now();
    let frees = count.first_until.unwrap_or(now).after(WorkOrder::COUNTED_MS);
    let moment = jiff::Timestamp::from_millisecond(frees.0).map(|moment| moment.to_string()).unwrap_or_default();
    let what = format!("{what}; the first of them counts until {moment}");
    let wait = u64::try_from(frees.0.saturating_sub(now.0)).unwrap_or_default();
    Err(bound.met(limits, &what, Duration::from_millis(wait)))
}

/// A problem of a meter, in words.
pub(super) fn problem(meter: SystemTitle, code: Code) -> v1::WorkOrderProblem {
    v1::WorkOrderProblem {
        meter: meter.octets().to_vec().into(),
        reason: if code == Code::Retired { RETIRED } else { NOT_PERMITTED }.to_owned(),
        code: code.into(),
    }
}

fn hours(content: &WorkOrderContent) -> u32 {
    let time = content.until.0.saturating_sub(content.from.0).saturating_add(HOUR_MS - 1) / HOUR_MS;
    u32::try_from(time).unwrap_or(u32::MAX)
}

/// The same text for an unknown meter and for one that the caller may not order work at.
const NOT_PERMITTED: &str = "it is unknown, or this work is not permitted with it";
const RETIRED: &str = "it is retired";
const HOUR_MS: i64 = 3_600_000;
const DAY_MS: i64 = 24 * HOUR_MS;
