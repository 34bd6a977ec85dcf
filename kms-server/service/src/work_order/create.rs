//! Makes work orders: each as a whole or not at all.

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::{PlaceSalt, PrincipalId, SystemTitle, WorkOrder, WorkOrderContent};
use kms_proto::v1::{
    self, WorkOrderCreated, WorkOrderOutcome as Outcome, WorkOrderProblemCode as Code, audit_record::Event,
};
use kms_store::Reads;

use super::{
    NewWorkOrder, Request, WorkOrderService,
    judge::{Judge, bound_orders, problem},
    message::recorded,
    new_salt,
};
use kms_authz::Caller;
use kms_base::{bounds::Limits, error::ServiceError};
use kms_ledger::{Act, Asker, Decision, Permit, Remembered, View, work_order_row};

impl WorkOrderService {
    /// Makes orders. The results are in the order of the request.
    ///
    /// # Errors
    /// Unknown caller, a request id that was used for another request, or the database cannot be
    /// reached. What is wrong with single orders is in the answer.
    #[boxed]
    pub async fn create(
        &self,
        caller: &Caller,
        request: Request,
        orders: Vec<NewWorkOrder>,
    ) -> Result<v1::CreateWorkOrdersResponse, ServiceError> {
        let mut response = v1::CreateWorkOrdersResponse::default();
        for (index, orders) in (0..).zip(chunks(orders)) {
            let (limits, maker) = (Arc::clone(&self.island.limits), caller.principal.clone());
            let salted = orders.into_iter().map(|order| Ok((order, new_salt()?)));
            let orders = salted.collect::<Result<_, ServiceError>>()?;
            let act = CreateOrders { orders, limits, maker };
            let chunk = self.island.door.act(caller, request.chunk(index), act).await?.value;
            response.results.extend(chunk.results);
        }
        Ok(response)
    }
}

/// Divides orders into transactions. The same request is always divided alike.
fn chunks(orders: Vec<NewWorkOrder>) -> Vec<Vec<NewWorkOrder>> {
    let mut chunks: Vec<Vec<NewWorkOrder>> = Vec::new();
    let mut meters = 0;
    for order in orders {
        let more = order.content.meters().len();
        match chunks.last_mut() {
            Some(chunk) if chunk.len() < CHUNK_ORDERS && meters + more <= CHUNK_METERS => {
                meters += more;
                chunk.push(order);
            }
            _ => {
                meters = more;
                chunks.push(vec![order]);
            }
        }
    }
    chunks
}

/// Some orders of a request, as one act.
struct CreateOrders {
    /// Each with random octets for its place.
    orders: Vec<(NewWorkOrder, PlaceSalt)>,
    limits: Arc<Limits>,
    maker: PrincipalId,
}

impl Act for CreateOrders {
    type Answer = v1::CreateWorkOrdersResponse;
    type Past = Remembered<v1::CreateWorkOrdersResponse>;

    fn name(&self) -> &'static str {
        NAME
    }

    fn reads(&self) -> Reads {
        Reads {
            meters: self.orders.iter().flat_map(|(order, _)| order.content.meters()).copied().collect(),
            sealed: self.orders.iter().map(|(order, _)| work_order_row(&order.id)).collect(),
            work_orders_of: vec![self.maker.clone()],
            ..Reads::default()
        }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        Ok(asker.each())
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Self::Answer>, ServiceError> {
        let mut judge = Judge::new(permit);
        let mut results = Vec::with_capacity(self.orders.len());
        for (order, salt) in &self.orders {
            let (outcome, problems) = match create(view, &mut judge, &self.limits, order, salt)? {
                Ok(outcome) => (outcome, Vec::new()),
                Err(problems) => (Outcome::Refused, problems),
            };
            let work_order_id = order.id.to_string();
            results.push(v1::WorkOrderResult { work_order_id, outcome: outcome.into(), problems });
        }
        Ok(Decision::of(view.entry(), v1::CreateWorkOrdersResponse { results }))
    }

    /// I8: a caller that has lost the permission does not get the answer again. Orders that the
    /// answer refuses are not checked, because it says nothing of them.
    fn again(
        &self,
        Remembered(response): Self::Past,
        permit: &Permit,
        view: &mut View<'_, '_>,
    ) -> Result<Self::Answer, ServiceError> {
        let mut judge = Judge::new(permit);
        for ((order, _), _) in
            self.orders.iter().zip(&response.results).filter(|(_, result)| result.outcome() != Outcome::Refused)
        {
            let refused = judge.refused_meters(view, &order.content, order.content.meters());
            if !refused.is_empty() {
                return Err(ServiceError::denied(NAME));
            }
        }
        Ok(response)
    }
}

/// Makes one order, or says why not. An order that is refused stages nothing.
fn create(
    view: &mut View<'_, '_>,
    judge: &mut Judge<'_>,
    limits: &Limits,
    new: &NewWorkOrder,
    salt: &PlaceSalt,
) -> Result<Result<Outcome, Vec<v1::WorkOrderProblem>>, ServiceError> {
    // An error means that the row does not verify (I5), or that it is read for the next attempt.
    // Its id is in use all the same.
    let known = view.work_order(&new.id);
    let maker = judge.caller();
    if let Ok(Some(known)) = &known
        && known.maker == *maker
    {
        return Ok(sent_again(view, judge, known, &new.content));
    }
    // What costs no question to policy comes first.
    if let Err(error) = new.content.check_new(view.now()) {
        return Ok(Err(of_order(Code::Time, error.reason().to_owned())));
    }
    let refused = judge.refused_meters(view, &new.content, &[]);
    if !refused.is_empty() {
        return Ok(Err(of_meters(refused)));
    }
    if !matches!(known, Ok(None)) {
        return Ok(Err(of_order(Code::IdInUse, "a work order of this id exists".to_owned())));
    }
    match bound_orders(view, maker, limits) {
        Ok(()) => {}
        Err(ServiceError::ResourceExhausted { reason, .. }) => return Ok(Err(of_order(Code::Exhausted, reason))),
        Err(error) => return Err(error),
    }
    let order = match WorkOrder::new(new.id.clone(), maker.clone(), new.content.clone(), salt.clone(), view.now()) {
        Ok(order) => order,
        Err(error) => return Ok(Err(of_order(Code::Time, error.reason().to_owned()))),
    };
    view.append(Event::WorkOrderCreated(WorkOrderCreated {
        work_order_id: order.id.to_string(),
        work: Some(recorded(&order.content)),
    }));
    view.put_work_order(order)?;
    Ok(Ok(Outcome::Created))
}

/// What becomes of an order that its maker has made before. I8: nothing is told of it to a maker
/// that has lost the permission. Meters that were retired since stay in it.
fn sent_again(
    view: &mut View<'_, '_>,
    judge: &mut Judge<'_>,
    known: &WorkOrder,
    content: &WorkOrderContent,
) -> Result<Outcome, Vec<v1::WorkOrderProblem>> {
    let refused = judge.refused_meters(view, content, known.content.meters());
    if !refused.is_empty() {
        return Err(of_meters(refused));
    }
    if known.end.is_some() {
        let state = known.state(view.now());
        return Err(of_order(Code::Ended, format!("your work order of this id is {state}")));
    }
    if known.content.is_same(content) {
        return Ok(Outcome::Unchanged);
    }
    let reason = "you have made a work order of this id that says something else: change it".to_owned();
    Err(of_order(Code::IdInUse, reason))
}

/// The first problems of an order's meters.
fn of_meters(refused: Vec<(SystemTitle, Code)>) -> Vec<v1::WorkOrderProblem> {
    refused.into_iter().take(MOST_PROBLEMS).map(|(meter, code)| problem(meter, code)).collect()
}

/// The problem of an order as a whole.
fn of_order(code: Code, reason: String) -> Vec<v1::WorkOrderProblem> {
    vec![v1::WorkOrderProblem { meter: bytes::Bytes::new(), reason, code: code.into() }]
}

const NAME: &str = "createWorkOrder";
/// Orders and meters of one transaction. An order with more meters has a transaction of its own.
const CHUNK_ORDERS: usize = 100;
const CHUNK_METERS: usize = 500;
/// Problems that the result of one order names at most.
const MOST_PROBLEMS: usize = 100;
