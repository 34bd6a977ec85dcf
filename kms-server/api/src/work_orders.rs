//! `meterkms.v1.WorkOrderService`: messages to domain types and back.

use std::sync::Arc;

use kms_domain::{
    PersonName, Place, PrincipalId, SystemTitle, UnixMillis, WorkOrderContent, WorkOrderId, WorkOrderState,
    WorkOrderTask, WorkOrderTasks,
};
use kms_proto::v1::{self, work_order_service_server::WorkOrderService as Rpc};
use tonic::{Request, Response, Status};

use crate::parse::{self, parse_optional_reason};
use crate::peer::caller_of;
use kms_authz::Caller;
use kms_base::error::ServiceError;
use kms_service::island::IslandContext;
use kms_service::work_order::{NewWorkOrder, WorkOrderChange, WorkOrderQuery, WorkOrderService, content_field};

/// The service over gRPC.
pub(crate) struct WorkOrderApi {
    island: Arc<IslandContext>,
    service: WorkOrderService,
}

impl WorkOrderApi {
    /// The service of this island.
    pub(crate) fn new(island: Arc<IslandContext>) -> Self {
        Self { service: WorkOrderService::new(island.clone()), island }
    }

    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, ServiceError> {
        caller_of(request, self.island.name(), IslandContext::now())
    }
}

#[tonic::async_trait]
impl Rpc for WorkOrderApi {
    async fn create_work_orders(
        &self,
        request: Request<v1::CreateWorkOrdersRequest>,
    ) -> Result<Response<v1::CreateWorkOrdersResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::CreateWorkOrdersRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"CreateWorkOrders", &same)?;
        let orders = parse_orders(message.orders)?;
        Ok(Response::new(self.service.create(&caller, request, orders).await?))
    }

    async fn change_work_order(
        &self,
        request: Request<v1::ChangeWorkOrderRequest>,
    ) -> Result<Response<v1::WorkOrder>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::ChangeWorkOrderRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"ChangeWorkOrder", &same)?;
        let id = parse_id(&message.work_order_id)?;
        if message.revision == 0 {
            return Err(ServiceError::invalid("revision", "revisions start at 1").into());
        }
        let content = parse_content(message.content, "content")?;
        let change = WorkOrderChange::Content { revision: message.revision, content };
        Ok(Response::new(self.service.change(&caller, request, id, change).await?))
    }

    async fn cancel_work_order(
        &self,
        request: Request<v1::CancelWorkOrderRequest>,
    ) -> Result<Response<v1::WorkOrder>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::CancelWorkOrderRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"CancelWorkOrder", &same)?;
        let id = parse_id(&message.work_order_id)?;
        let change = WorkOrderChange::Cancel { reason: parse_optional_reason(message.reason)? };
        Ok(Response::new(self.service.change(&caller, request, id, change).await?))
    }

    async fn complete_work_order(
        &self,
        request: Request<v1::CompleteWorkOrderRequest>,
    ) -> Result<Response<v1::WorkOrder>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::CompleteWorkOrderRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"CompleteWorkOrder", &same)?;
        let id = parse_id(&message.work_order_id)?;
        Ok(Response::new(self.service.change(&caller, request, id, WorkOrderChange::Complete).await?))
    }

    async fn show_work_order(
        &self,
        request: Request<v1::ShowWorkOrderRequest>,
    ) -> Result<Response<v1::WorkOrder>, Status> {
        let caller = self.caller(&request)?;
        let id = parse_id(&request.into_inner().work_order_id)?;
        Ok(Response::new(self.service.show(&caller, &id).await?))
    }

    async fn list_work_orders(
        &self,
        request: Request<v1::ListWorkOrdersRequest>,
    ) -> Result<Response<v1::ListWorkOrdersResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let after = parse_page_token(&message.page_token)?;
        let limit = if message.page_size == 0 { DEFAULT_PAGE } else { message.page_size.min(LARGEST_PAGE) };
        let page = self.service.list(&caller, parse_query(&message)?, after, limit).await?;
        let next_page_token = page.next.map(|next| page_token(&next)).unwrap_or_default();
        Ok(Response::new(v1::ListWorkOrdersResponse { orders: page.orders, next_page_token }))
    }
}

fn parse_orders(orders: Vec<v1::NewWorkOrder>) -> Result<Vec<NewWorkOrder>, ServiceError> {
    let (most, most_meters) = (WorkOrderService::MOST_ORDERS, WorkOrderService::MOST_METERS);
    if orders.is_empty() || orders.len() > most {
        return Err(ServiceError::invalid("orders", format!("{} orders; a request has 1 to {most}", orders.len())));
    }
    let meters = orders.iter().map(|order| order.content.as_ref().map_or(0, |content| content.meters.len()));
    let meters: usize = meters.sum();
    if meters > most_meters {
        return Err(ServiceError::invalid(
            "orders",
            format!("they have {meters} meters together; the orders of a request have at most {most_meters}"),
        ));
    }
    let orders = orders.into_iter().enumerate().map(|(number, order)| {
        let field = format!("orders[{number}]");
        let id =
            WorkOrderId::parse(&order.work_order_id).map_err(ServiceError::parse(format!("{field}.work_order_id")))?;
        Ok(NewWorkOrder { id, content: parse_content(order.content, &format!("{field}.content"))? })
    });
    orders.collect()
}

fn parse_id(id: &str) -> Result<WorkOrderId, ServiceError> {
    WorkOrderId::parse(id).map_err(ServiceError::parse("work_order_id"))
}

fn parse_content(content: Option<v1::WorkOrderContent>, field: &str) -> Result<WorkOrderContent, ServiceError> {
    let content = content.ok_or_else(|| ServiceError::invalid(field, "it is missing"))?;
    let technician =
        PersonName::parse(&content.technician).map_err(ServiceError::parse(format!("{field}.technician")))?;
    let titles = content.meters.iter().enumerate().map(|(number, title)| {
        SystemTitle::from_octets(title).map_err(ServiceError::parse(format!("{field}.meters[{number}]")))
    });
    let meters = titles.collect::<Result<Vec<_>, _>>()?;
    let tasks = content.tasks.iter().enumerate().map(|(number, name)| {
        WorkOrderTask::parse(name).map_err(ServiceError::parse(format!("{field}.tasks[{number}]")))
    });
    let tasks = tasks.collect::<Result<WorkOrderTasks, _>>()?;
    let place = Place::parse(&content.place).map_err(ServiceError::parse(format!("{field}.place")))?;
    let time = (moment(content.from_ms, field, "from_ms")?, moment(content.until_ms, field, "until_ms")?);
    WorkOrderContent::new(technician, meters, tasks, time, place)
        .map_err(|error| ServiceError::invalid(format!("{field}.{}", content_field(&error)), error.reason().to_owned()))
}

fn moment(milliseconds: i64, field: &str, name: &str) -> Result<UnixMillis, ServiceError> {
    if milliseconds <= 0 {
        return Err(ServiceError::invalid(format!("{field}.{name}"), "it is missing: milliseconds of Unix time"));
    }
    Ok(UnixMillis(milliseconds))
}

fn parse_query(message: &v1::ListWorkOrdersRequest) -> Result<WorkOrderQuery, ServiceError> {
    let some = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
    let time = |milliseconds: i64| Some(UnixMillis(milliseconds)).filter(|time| time.0 != 0);
    let technician = some(&message.technician).map(|name| PersonName::parse(&name)).transpose();
    let maker = some(&message.maker).map(|uri| PrincipalId::parse(&uri)).transpose();
    let state = some(&message.state).map(|name| WorkOrderState::parse(&name)).transpose();
    Ok(WorkOrderQuery {
        technician: technician.map_err(ServiceError::parse("technician"))?,
        maker: maker.map_err(ServiceError::parse("maker"))?,
        state: state.map_err(ServiceError::parse("state"))?,
        ends_after: time(message.ends_after_ms),
        begins_before: time(message.begins_before_ms),
    })
}

/// Begin and id of an order: 8 octets and the id.
fn page_token((from, id): &(UnixMillis, WorkOrderId)) -> bytes::Bytes {
    [from.0.to_be_bytes().as_slice(), id.as_str().as_bytes()].concat().into()
}

fn parse_page_token(token: &[u8]) -> Result<Option<(UnixMillis, WorkOrderId)>, ServiceError> {
    if token.is_empty() {
        return Ok(None);
    }
    let parsed = token.split_first_chunk().and_then(|(from, id)| {
        let id = std::str::from_utf8(id).ok().and_then(|id| WorkOrderId::parse(id).ok())?;
        Some((UnixMillis(i64::from_be_bytes(*from)), id))
    });
    parsed.map(Some).ok_or_else(|| ServiceError::invalid("page_token", "it is not from an answer of this method"))
}

const DEFAULT_PAGE: u32 = 100;
const LARGEST_PAGE: u32 = 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn content() -> v1::WorkOrderContent {
        v1::WorkOrderContent {
            technician: "Ida Berg".to_owned(),
            meters: vec![vec![2; 8].into(), vec![1; 8].into()],
            tasks: vec!["read".to_owned(), "firmware".to_owned()],
            from_ms: 1_000,
            until_ms: 2_000,
            place: String::new(),
        }
    }

    fn orders(content: v1::WorkOrderContent) -> Vec<v1::NewWorkOrder> {
        let order = |id: &str, content| v1::NewWorkOrder { work_order_id: id.to_owned(), content: Some(content) };
        vec![order("WO-1", self::content()), order("WO-2", content)]
    }

    #[test]
    fn every_field_is_named_when_it_is_wrong() {
        assert_eq!(parse_orders(orders(content())).unwrap().len(), 2);
        type Break = fn(&mut v1::WorkOrderContent);
        let cases: [(&str, Break); 12] = [
            ("orders[1].content.technician", |content| content.technician = " ".to_owned()),
            ("orders[1].content.meters", |content| content.meters.clear()),
            ("orders[1].content.meters[1]", |content| content.meters[1] = vec![1; 7].into()),
            ("orders[1].content.meters", |content| content.meters[1] = content.meters[0].clone()),
            ("orders[1].content.tasks", |content| content.tasks.clear()),
            ("orders[1].content.tasks[0]", |content| content.tasks[0] = "dance".to_owned()),
            ("orders[1].content.from_ms", |content| content.from_ms = 0),
            ("orders[1].content.until_ms", |content| content.until_ms = -1),
            ("orders[1].content.until_ms", |content| content.until_ms = 1_000),
            ("orders[1].content.until_ms", |content| content.until_ms = 32 * 86_400_000),
            ("orders[1].content.place", |content| content.place = "a\nb".to_owned()),
            ("orders", |content| content.meters = vec![vec![1; 8].into(); 9_999]),
        ];
        for (expected, break_it) in cases {
            let mut content = content();
            break_it(&mut content);
            match parse_orders(orders(content)) {
                Err(ServiceError::InvalidArgument { field, .. }) => assert_eq!(field, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
        for orders in [Vec::new(), vec![v1::NewWorkOrder::default(); 501]] {
            assert!(
                matches!(parse_orders(orders), Err(ServiceError::InvalidArgument { field, .. }) if field == "orders")
            );
        }
        let unnamed = vec![v1::NewWorkOrder { content: Some(content()), ..Default::default() }];
        assert!(parse_orders(unnamed).unwrap_err().to_string().starts_with("orders[0].work_order_id"));
        let empty = vec![v1::NewWorkOrder { work_order_id: "WO-1".to_owned(), content: None }];
        assert!(parse_orders(empty).unwrap_err().to_string().starts_with("orders[0].content"));
    }

    #[test]
    fn pages_and_filters_come_back() {
        let next = (UnixMillis(-7), WorkOrderId::parse("WO 1").unwrap());
        assert_eq!(parse_page_token(&page_token(&next)).unwrap(), Some(next));
        assert_eq!(parse_page_token(&[]).unwrap(), None);
        for token in [&[0; 8][..], &[0; 7], &[0, 0, 0, 0, 0, 0, 0, 1, 0xFF]] {
            assert!(parse_page_token(token).is_err(), "{token:?}");
        }
        let some = v1::ListWorkOrdersRequest { state: "open".to_owned(), ends_after_ms: 5, ..Default::default() };
        let query = WorkOrderQuery {
            state: Some(WorkOrderState::Open),
            ends_after: Some(UnixMillis(5)),
            ..WorkOrderQuery::default()
        };
        assert_eq!(parse_query(&some).unwrap(), query);
        for wrong in [
            v1::ListWorkOrdersRequest { state: "done".to_owned(), ..Default::default() },
            v1::ListWorkOrdersRequest { maker: "wfm".to_owned(), ..Default::default() },
            v1::ListWorkOrdersRequest { technician: " ".to_owned(), ..Default::default() },
        ] {
            assert!(parse_query(&wrong).is_err());
        }
    }
}
