//! `kms work-order`.

mod file;
mod import;

use kms_proto::v1 as proto;
use serde_json::json;

use super::{PAGE, confirm, octets, read_titles, request_id, text};
use crate::{
    arguments::work_order::{ChangeWorkOrder, CreateWorkOrder, ListWorkOrders, WorkOrderCommand},
    context::Context,
    failure::Failure,
    json, output,
    output::{Rows, facts, plural},
    progress::waiting,
};

pub(crate) async fn run(command: WorkOrderCommand, context: &Context) -> Result<(), Failure> {
    match command {
        WorkOrderCommand::Import(arguments) => import::run(&arguments, context).await,
        WorkOrderCommand::Create(arguments) => create(arguments, context).await,
        WorkOrderCommand::List(arguments) => list(&arguments, context).await,
        WorkOrderCommand::Show { id } => {
            let mut client = context.connect().await?.work_orders();
            let request = proto::ShowWorkOrderRequest { work_order_id: id.to_string() };
            show(&waiting("reading the work order", client.show_work_order(request)).await?.into_inner(), context);
            Ok(())
        }
        WorkOrderCommand::Change(arguments) => change(arguments, context).await,
        WorkOrderCommand::Cancel { id, why, sure } => {
            confirm(&format!("work order {id} will be cancelled for good"), &sure)?;
            let request = proto::CancelWorkOrderRequest {
                request_id: request_id(),
                work_order_id: id.to_string(),
                reason: why.reason,
            };
            let mut client = context.connect().await?.work_orders();
            show(&waiting("cancelling", client.cancel_work_order(request)).await?.into_inner(), context);
            Ok(())
        }
        WorkOrderCommand::Complete { id } => {
            let request = proto::CompleteWorkOrderRequest { request_id: request_id(), work_order_id: id.to_string() };
            let mut client = context.connect().await?.work_orders();
            show(&waiting("completing", client.complete_work_order(request)).await?.into_inner(), context);
            Ok(())
        }
    }
}

async fn create(arguments: CreateWorkOrder, context: &Context) -> Result<(), Failure> {
    let mut meters: Vec<_> = arguments.meters.iter().map(|meter| octets(meter.octets())).collect();
    if let Some(file) = &arguments.meters_file {
        meters.extend(read_titles(file)?);
    }
    let content = proto::WorkOrderContent {
        technician: arguments.technician.as_str().to_owned(),
        meters,
        tasks: arguments.tasks.iter().map(ToString::to_string).collect(),
        from_ms: arguments.from.as_millisecond(),
        until_ms: arguments.until.as_millisecond(),
        place: arguments.place.as_str().to_owned(),
    };
    let order = proto::NewWorkOrder { work_order_id: arguments.id.to_string(), content: Some(content) };
    let request = proto::CreateWorkOrdersRequest { request_id: request_id(), orders: vec![order] };
    let mut client = context.connect().await?.work_orders();
    let answer = waiting("making the work order", client.create_work_orders(request)).await?.into_inner();
    let result = answer.results.into_iter().next().unwrap_or_default();
    context.output.show(
        || json::message("WorkOrderResult", &result),
        || match result.outcome() {
            proto::WorkOrderOutcome::Created => format!("work order {} is made\n", result.work_order_id),
            proto::WorkOrderOutcome::Unchanged => {
                format!("work order {} was made before, as it is here\n", result.work_order_id)
            }
            _ => problems_text(&result.problems),
        },
    );
    match result.outcome() {
        proto::WorkOrderOutcome::Created | proto::WorkOrderOutcome::Unchanged => Ok(()),
        _ => Err(Failure::failed(format!("work order {} is refused", arguments.id))),
    }
}

fn problems_text(problems: &[proto::WorkOrderProblem]) -> String {
    let mut rows = Rows::new(&["meter", "refused because"]).sentences(&[1]);
    for problem in problems {
        rows.row([output::octets(&problem.meter), problem.reason.clone()]);
    }
    rows.text_or("")
}

async fn list(arguments: &ListWorkOrders, context: &Context) -> Result<(), Failure> {
    let time = |time: Option<jiff::Timestamp>| time.map_or(0, jiff::Timestamp::as_millisecond);
    // If neither time nor state is named, the orders that matter are those that are not over.
    let ends_after = match (arguments.ends_after, arguments.begins_before, arguments.in_state) {
        (None, None, None) => Some(jiff::Timestamp::now()),
        (ends_after, ..) => ends_after,
    };
    let mut client = context.connect().await?.work_orders();
    let (mut orders, mut page_token) = (Vec::new(), bytes::Bytes::new());
    let limit = arguments.limit.limit;
    let more = loop {
        let wanted = if limit == 0 { PAGE } else { PAGE.min(limit - orders.len()) };
        let request = proto::ListWorkOrdersRequest {
            technician: arguments.technician.as_ref().map(|name| name.as_str().to_owned()).unwrap_or_default(),
            maker: text(arguments.maker.as_ref()),
            state: text(arguments.in_state.as_ref()),
            ends_after_ms: time(ends_after),
            begins_before_ms: time(arguments.begins_before),
            page_size: u32::try_from(wanted).unwrap_or(u32::MAX),
            page_token,
        };
        let page = waiting("reading work orders", client.list_work_orders(request)).await?.into_inner();
        orders.extend(page.orders);
        page_token = page.next_page_token;
        if page_token.is_empty() || (limit > 0 && orders.len() >= limit) {
            break !page_token.is_empty();
        }
    };
    context.output.show(
        || json!({"orders": orders.iter().map(|order| json::message("WorkOrder", order)).collect::<Vec<_>>()}),
        || {
            let headings = ["work order", "state", "technician", "tasks", "meters", "from", "until", "made by"];
            let mut rows = Rows::new(&headings).numbers(&[4]);
            for order in &orders {
                let content = order.content.clone().unwrap_or_default();
                rows.row([
                    order.work_order_id.clone(),
                    order.state.clone(),
                    content.technician,
                    content.tasks.join(", "),
                    output::number(order.meter_count.into()),
                    output::time(content.from_ms),
                    output::time(content.until_ms),
                    short(&order.maker),
                ]);
            }
            let rest = if more { " (--limit shows more)" } else { "" };
            let count = match orders.len() as u64 {
                0 => String::new(),
                count => format!("\n{}{rest}\n", plural(count, "work order")),
            };
            format!("{}{count}", rows.text_or("no work orders"))
        },
    );
    Ok(())
}

async fn change(arguments: ChangeWorkOrder, context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.work_orders();
    let request = proto::ShowWorkOrderRequest { work_order_id: arguments.id.to_string() };
    let seen = waiting("reading the work order", client.show_work_order(request)).await?.into_inner();
    let mut content = seen.content.unwrap_or_default();
    let change = arguments.change;
    if seen.place_withheld && change.place.is_none() {
        return Err(Failure::usage(
            "you may not see the place of this order, and a change writes it: add --place TEXT",
        ));
    }
    if let Some(technician) = change.technician {
        technician.as_str().clone_into(&mut content.technician);
    }
    if !change.tasks.is_empty() {
        content.tasks = change.tasks.iter().map(ToString::to_string).collect();
    }
    for meter in &change.remove_meters {
        let before = content.meters.len();
        content.meters.retain(|known| *known != meter.octets().as_slice());
        if content.meters.len() == before {
            return Err(Failure::usage(format!("--remove-meter {meter}: the work order is not for this meter")));
        }
    }
    for meter in &change.add_meters {
        if !content.meters.iter().any(|known| *known == meter.octets().as_slice()) {
            content.meters.push(octets(meter.octets()));
        }
    }
    content.from_ms = change.from.map_or(content.from_ms, jiff::Timestamp::as_millisecond);
    content.until_ms = change.until.map_or(content.until_ms, jiff::Timestamp::as_millisecond);
    if let Some(place) = change.place {
        place.as_str().clone_into(&mut content.place);
    }
    let request = proto::ChangeWorkOrderRequest {
        request_id: request_id(),
        work_order_id: arguments.id.to_string(),
        revision: arguments.revision.unwrap_or(seen.revision),
        content: Some(content),
    };
    show(&waiting("changing", client.change_work_order(request)).await?.into_inner(), context);
    Ok(())
}

fn show(order: &proto::WorkOrder, context: &Context) {
    context.output.show(|| json::message("WorkOrder", order), || order_text(order));
}

fn order_text(order: &proto::WorkOrder) -> String {
    let content = order.content.clone().unwrap_or_default();
    let ended = match order.ended_ms {
        0 => String::new(),
        time => format!("{} by {}", output::time(time), order.ended_by),
    };
    let mut text = facts([
        ("work order", order.work_order_id.clone()),
        ("state", order.state.clone()),
        ("technician", content.technician),
        ("tasks", content.tasks.join(", ")),
        ("from", output::time(content.from_ms)),
        ("until", output::time(content.until_ms)),
        ("place", if order.place_withheld { "not for you to see".to_owned() } else { content.place }),
        ("made", format!("{} by {}", output::time(order.created_ms), order.maker)),
        ("ended", ended),
        ("revision", order.revision.to_string()),
    ]);
    text.push_str(&format!("\n{}\n\n", plural(u64::from(order.meter_count), "meter")));
    for line in content.meters.chunks(METERS_A_LINE) {
        let titles: Vec<_> = line.iter().map(|title| output::octets(title)).collect();
        text.push_str(&titles.join("  "));
        text.push('\n');
    }
    text
}

/// A principal's role and name: the island is the same for all.
fn short(principal: &str) -> String {
    principal.splitn(4, ':').nth(3).unwrap_or(principal).to_owned()
}

/// Four titles and the gaps between them fit into 80 columns.
const METERS_A_LINE: usize = 4;
