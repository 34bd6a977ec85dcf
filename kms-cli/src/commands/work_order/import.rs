//! `kms work-order import`: sends the orders of a file, many at a time.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use kms_client::RetryPolicy;
use kms_proto::v1 as proto;
use serde_json::{Value, json};

use super::file::{BadLine, OrderFile, OrderLine};
use crate::{
    arguments::work_order::{FileFormat, ImportWorkOrders},
    commands::{read, request_id},
    context::Context,
    failure::Failure,
    json, output,
    output::{Rows, number, plural},
    progress,
};

/// What became of a file.
#[derive(Default)]
struct Outcome {
    created: u64,
    unchanged: u64,
    refused: Vec<Refused>,
}

/// An order that was not made.
struct Refused {
    line: u64,
    id: String,
    reasons: Vec<String>,
    /// What the server said; none: the line is no order.
    problems: Vec<proto::WorkOrderProblem>,
}

pub(super) async fn run(arguments: &ImportWorkOrders, context: &Context) -> Result<(), Failure> {
    let path = &arguments.file;
    let format = match arguments.format {
        Some(format) => format,
        None => format_of(path)?,
    };
    let file = OrderFile::parse(&read(path)?, format, path)?;
    let mut outcome = Outcome { refused: file.bad.into_iter().map(Refused::from).collect(), ..Outcome::default() };
    if arguments.dry_run {
        let meters: usize = file.orders.iter().map(|order| order.meters).sum();
        let checked = file.orders.len() as u64;
        context.output.show(
            || json!({"orders": checked, "meters": meters, "refused": outcome.refused_json()}),
            || {
                let orders = plural(checked, "work order");
                format!("{orders} for {} can be sent\n{}", plural(meters as u64, "meter"), outcome.refused_text())
            },
        );
        return outcome.verdict(checked, "would not be made");
    }
    let sent = send(file.orders, &mut outcome, context).await;
    outcome.refused.sort_by_key(|refused| refused.line);
    let done = outcome.created + outcome.unchanged;
    if sent.is_ok() || done > 0 || !outcome.refused.is_empty() {
        context.output.show(
            || json!({"created": outcome.created, "unchanged": outcome.unchanged, "refused": outcome.refused_json()}),
            || {
                let before = match outcome.unchanged {
                    0 => String::new(),
                    unchanged => format!(", {} made before", number(unchanged)),
                };
                format!("{} made{before}\n{}", plural(outcome.created, "work order"), outcome.refused_text())
            },
        );
    }
    // An import that broke off can be run again as it is.
    sent.map_err(|failure| failure.while_doing(&format!("the import ended after {}", plural(done, "work order"))))?;
    outcome.verdict(done, "not made")
}

fn format_of(path: &Path) -> Result<FileFormat, Failure> {
    match path.extension().and_then(|extension| extension.to_str()).map(str::to_ascii_lowercase).as_deref() {
        Some("csv") => Ok(FileFormat::Csv),
        Some("jsonl" | "ndjson") => Ok(FileFormat::Jsonl),
        _ => Err(Failure::usage(format!("`{}` ends neither in .csv nor in .jsonl: add --format", path.display()))),
    }
}

/// Sends all orders. What was sent before a failure is in the outcome.
async fn send(orders: Vec<OrderLine>, outcome: &mut Outcome, context: &Context) -> Result<(), Failure> {
    if orders.is_empty() {
        return Ok(());
    }
    let (client, policy) = (context.connect().await?.work_orders(), RetryPolicy::default());
    let (total, began) = (orders.len() as u64, Instant::now());
    let (mut bar, mut sent) = (None, 0);
    for part in parts(orders) {
        let request = proto::CreateWorkOrdersRequest {
            request_id: request_id(),
            orders: part.iter().map(|line| line.order.clone()).collect(),
        };
        // The same request id: what was done before the connection broke is not done again.
        let call = policy.run(|| {
            let (mut client, request) = (client.clone(), request.clone());
            async move { client.create_work_orders(request).await }
        });
        let answer = call.await?.into_inner();
        for (line, result) in part.into_iter().zip(answer.results) {
            outcome.add(&line, result);
        }
        sent += request.orders.len() as u64;
        if began.elapsed() > UNSEEN {
            bar.get_or_insert_with(|| progress::count("making work orders", total)).set_position(sent);
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(())
}

/// Divides orders into requests.
fn parts(orders: Vec<OrderLine>) -> Vec<Vec<OrderLine>> {
    let mut parts: Vec<Vec<OrderLine>> = Vec::new();
    let mut meters = 0;
    for order in orders {
        match parts.last_mut() {
            Some(part) if part.len() < ORDERS_A_REQUEST && meters + order.meters <= METERS_A_REQUEST => {
                meters += order.meters;
                part.push(order);
            }
            _ => {
                meters = order.meters;
                parts.push(vec![order]);
            }
        }
    }
    parts
}

impl From<BadLine> for Refused {
    fn from(bad: BadLine) -> Self {
        Self { line: bad.line, id: bad.id, reasons: vec![bad.reason], problems: Vec::new() }
    }
}

impl Outcome {
    fn add(&mut self, line: &OrderLine, result: proto::WorkOrderResult) {
        match result.outcome() {
            proto::WorkOrderOutcome::Created => self.created += 1,
            proto::WorkOrderOutcome::Unchanged => self.unchanged += 1,
            _ => {
                let reason = |problem: &proto::WorkOrderProblem| match problem.meter.as_ref() {
                    [] => problem.reason.clone(),
                    meter => format!("{}: {}", output::octets(meter), problem.reason),
                };
                self.refused.push(Refused {
                    line: line.line,
                    id: result.work_order_id.clone(),
                    reasons: result.problems.iter().map(reason).collect(),
                    problems: result.problems,
                });
            }
        }
    }

    fn refused_json(&self) -> Vec<Value> {
        let problem = |problem: &proto::WorkOrderProblem| json::message("WorkOrderProblem", problem);
        let refused = self.refused.iter().map(|refused| {
            json!({
                "line": refused.line,
                "work_order_id": refused.id,
                "reasons": refused.reasons,
                "problems": refused.problems.iter().map(problem).collect::<Vec<_>>(),
            })
        });
        refused.collect()
    }

    fn refused_text(&self) -> String {
        if self.refused.is_empty() {
            return String::new();
        }
        let mut rows = Rows::new(&["line", "work order", "refused because"]).numbers(&[0]).sentences(&[2]);
        for refused in self.refused.iter().take(LINES_SHOWN) {
            let mut reasons = refused.reasons.clone();
            let more = reasons.len().saturating_sub(REASONS_SHOWN);
            reasons.truncate(REASONS_SHOWN);
            if more > 0 {
                reasons.push(format!("and {} more", number(more as u64)));
            }
            rows.row([number(refused.line), refused.id.clone(), reasons.join("\n")]);
        }
        let more = match self.refused.len().saturating_sub(LINES_SHOWN) as u64 {
            0 => String::new(),
            more => format!("and {} more; --output json names them all\n", number(more)),
        };
        format!("\n{}{more}", rows.text_or(""))
    }

    /// Exit code 5: a part was refused; 1: all of it.
    fn verdict(&self, done: u64, not: &str) -> Result<(), Failure> {
        match self.refused.len() as u64 {
            0 => Ok(()),
            refused if done > 0 => Err(Failure::partly(format!("{} {not}", plural(refused, "work order")))),
            refused => Err(Failure::failed(format!("{} {not}", plural(refused, "work order")))),
        }
    }
}

/// Orders and meters of one request: the server takes 500 and 10,000.
const ORDERS_A_REQUEST: usize = 250;
const METERS_A_REQUEST: usize = 5_000;
/// An import that is done within this time shows no progress.
const UNSEEN: Duration = Duration::from_secs(1);
const LINES_SHOWN: usize = 50;
const REASONS_SHOWN: usize = 5;
