//! The work orders of a server that the tests play.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use kms_proto::v1::*;
use tonic::{Request, Response, Status};

type Answer<T> = Result<Response<T>, Status>;

/// Remembers orders. Meter 9 is unknown, and `WO-HIDDEN` has a place that the caller may not see.
#[derive(Clone, Default)]
pub(crate) struct OrderMock {
    orders: Arc<Mutex<BTreeMap<String, WorkOrder>>>,
}

impl OrderMock {
    fn change(&self, id: &str, change: impl FnOnce(&mut WorkOrder) -> Result<(), Status>) -> Answer<WorkOrder> {
        let mut orders = self.orders.lock().unwrap();
        let order =
            orders.get_mut(id).ok_or_else(|| Status::permission_denied("`changeWorkOrder` is not permitted"))?;
        change(order)?;
        order.revision += 1;
        Ok(Response::new(order.clone()))
    }
}

#[tonic::async_trait]
impl work_order_service_server::WorkOrderService for OrderMock {
    async fn create_work_orders(&self, request: Request<CreateWorkOrdersRequest>) -> Answer<CreateWorkOrdersResponse> {
        let mut orders = self.orders.lock().unwrap();
        let results = request.into_inner().orders.into_iter().map(|new| {
            let content = new.content.unwrap();
            let unknown = content.meters.iter().filter(|meter| meter[7] == 9).map(|meter| WorkOrderProblem {
                meter: meter.clone(),
                reason: "it is unknown, or this work is not permitted with it".to_owned(),
                code: WorkOrderProblemCode::NotPermitted.into(),
            });
            let problems: Vec<_> = unknown.collect();
            let outcome = match orders.get(&new.work_order_id) {
                _ if !problems.is_empty() => WorkOrderOutcome::Refused,
                Some(_) => WorkOrderOutcome::Unchanged,
                None => WorkOrderOutcome::Created,
            };
            if outcome == WorkOrderOutcome::Created {
                let order = WorkOrder {
                    work_order_id: new.work_order_id.clone(),
                    revision: 1,
                    state: "planned".to_owned(),
                    maker: "urn:meterkms:dev:service-account:wfm".to_owned(),
                    meter_count: content.meters.len() as u32,
                    place_withheld: new.work_order_id == "WO-HIDDEN",
                    content: Some(content),
                    created_ms: 1_795_248_000_000,
                    ..WorkOrder::default()
                };
                orders.insert(new.work_order_id.clone(), order);
            }
            WorkOrderResult { work_order_id: new.work_order_id, outcome: outcome.into(), problems }
        });
        let results = results.collect();
        Ok(Response::new(CreateWorkOrdersResponse { results }))
    }

    async fn change_work_order(&self, request: Request<ChangeWorkOrderRequest>) -> Answer<WorkOrder> {
        let request = request.into_inner();
        self.change(&request.work_order_id, |order| {
            if order.revision != request.revision {
                return Err(Status::aborted("it changed since; look at it with `kms work-order show`"));
            }
            order.meter_count = request.content.as_ref().unwrap().meters.len() as u32;
            order.content = request.content;
            Ok(())
        })
    }

    async fn cancel_work_order(&self, request: Request<CancelWorkOrderRequest>) -> Answer<WorkOrder> {
        let request = request.into_inner();
        self.change(&request.work_order_id, |order| {
            assert!(!request.reason.is_empty());
            order.state = "cancelled".to_owned();
            Ok(())
        })
    }

    async fn complete_work_order(&self, request: Request<CompleteWorkOrderRequest>) -> Answer<WorkOrder> {
        self.change(&request.into_inner().work_order_id, |order| {
            order.state = "completed".to_owned();
            order.ended_by = "urn:meterkms:dev:officer:ada".to_owned();
            order.ended_ms = 1_795_248_060_000;
            Ok(())
        })
    }

    async fn show_work_order(&self, request: Request<ShowWorkOrderRequest>) -> Answer<WorkOrder> {
        let id = request.into_inner().work_order_id;
        let order = self.orders.lock().unwrap().get(&id).cloned();
        order.map(Response::new).ok_or_else(|| Status::permission_denied("`showWorkOrder` is not permitted"))
    }

    async fn list_work_orders(&self, request: Request<ListWorkOrdersRequest>) -> Answer<ListWorkOrdersResponse> {
        let request = request.into_inner();
        let orders = self.orders.lock().unwrap();
        let after = String::from_utf8(request.page_token.to_vec()).unwrap();
        let of_technician = |order: &&WorkOrder| {
            request.technician.is_empty() || order.content.as_ref().unwrap().technician == request.technician
        };
        // Without a filter, orders of the past do not matter.
        assert!(request.ends_after_ms != 0 || request.begins_before_ms != 0 || !request.state.is_empty());
        let found: Vec<_> = orders
            .values()
            .filter(|order| order.work_order_id > after)
            .filter(of_technician)
            .take(request.page_size.min(2) as usize)
            .cloned()
            .collect();
        let full = found.len() == request.page_size.min(2) as usize;
        let next = found.last().filter(|_| full).map(|order| Bytes::from(order.work_order_id.clone().into_bytes()));
        Ok(Response::new(ListWorkOrdersResponse { orders: found, next_page_token: next.unwrap_or_default() }))
    }
}
