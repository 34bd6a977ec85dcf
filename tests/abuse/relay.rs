//! A head-end without keys that carries octets between the server and a simulated meter.

use kms_client::{
    Connection,
    proto::{
        BeginTransfersRequest, ContinueTransfersRequest, TransferForm, TransferOrder, TransferReport, TransferStep,
        transfer_report::Answer, transfer_send::Kind, transfer_step::Next,
    },
};
use meter_sim::{Connection as MeterConnection, Meter};
use tonic::Status;

use crate::scene::{client_title, meter, request_id};

/// The order of a transfer; no key type is a probe.
pub(crate) fn order(number: u64, key_type: &str) -> TransferOrder {
    TransferOrder {
        meter: meter(number),
        key_type: key_type.to_owned(),
        client_title: client_title(),
        form: TransferForm::Frames.into(),
        ..TransferOrder::default()
    }
}

/// Begins one transfer.
pub(crate) async fn begin(connection: &Connection, order: TransferOrder) -> Result<TransferStep, Status> {
    let request = BeginTransfersRequest { request_id: request_id(), orders: vec![order] };
    Ok(connection.transfers().begin_transfers(request).await?.into_inner().steps.remove(0))
}

/// Where a transfer was left.
pub(crate) enum Left {
    /// It is over: the outcome.
    Ended(String),
    /// The order, or a step, was refused.
    Refused(String),
    /// Before a step of the kind that was not wanted any more.
    Before(TransferStep),
}

/// Carries a transfer on, until it ends or before the first step of this kind.
pub(crate) async fn carry(
    connection: &Connection,
    device: &Meter,
    begun: TransferStep,
    until: Option<Kind>,
) -> Result<Left, Status> {
    let mut line = MeterConnection::new(device.clone(), 1);
    let mut step = begun;
    loop {
        let send = match &step.next {
            Some(Next::End(end)) => return Ok(Left::Ended(end.outcome.clone())),
            Some(Next::Refusal(refusal)) => return Ok(Left::Refused(refusal.message.clone())),
            Some(Next::Send(send)) => send,
            None => return Ok(Left::Refused("an empty step".to_owned())),
        };
        if until.is_some_and(|kind| send.kind == i32::from(kind)) {
            return Ok(Left::Before(step));
        }
        if send.kind == i32::from(Kind::Associate) {
            line = MeterConnection::new(device.clone(), 1);
        }
        let answer = line.deliver(&send.apdu).await.answers.pop();
        let answer = answer.map_or(Answer::Nothing(true), |apdu| Answer::Apdu(apdu.into()));
        let report =
            TransferReport { meter: step.meter, transfer_id: step.transfer_id, step: step.step, answer: Some(answer) };
        let reports = ContinueTransfersRequest { reports: vec![report] };
        step = connection.transfers().continue_transfers(reports).await?.into_inner().steps.remove(0);
    }
}

/// A transfer from its order to its end: the outcome, or why it was refused.
pub(crate) async fn transfer(connection: &Connection, device: &Meter, order: TransferOrder) -> String {
    let carried = async { carry(connection, device, begin(connection, order).await?, None).await };
    match carried.await {
        Ok(Left::Ended(outcome)) => outcome,
        Ok(Left::Refused(reason)) => format!("refused: {reason}"),
        Ok(Left::Before(_)) => "left".to_owned(),
        Err(status) => format!("refused: {status}"),
    }
}

/// A transfer that is tried again after a probe, where the meter's challenge was one that is not
/// answered: the outcome of the last.
pub(crate) async fn transfer_at_last(connection: &Connection, device: &Meter, number: u64, key_type: &str) -> String {
    let mut outcome = String::new();
    for _ in 0..TRIES {
        outcome = transfer(connection, device, order(number, key_type)).await;
        if outcome == "proven" || (key_type.is_empty() && outcome == "probed") {
            break;
        }
        transfer(connection, device, order(number, "")).await;
    }
    outcome
}

const TRIES: usize = 4;
