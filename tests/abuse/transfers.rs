//! A7: urgent transfers in a row on a meter of one's own, each of which adds a candidate.

use std::time::Duration;

use kms_client::proto::{TransferOrder, WithdrawTransfersRequest, WithdrawnTransfer, transfer_send::Kind};
use kms_tests::{DevServer, policies_with};

use crate::{
    relay::{Left, begin, carry, order, transfer_at_last},
    scene::{Neighbour, percentiles, request_id},
    verdict::{Figure, Verdict},
};

/// Under the shipped policies, and under one that permits urgent transfers: there is a bound, a way
/// out of it, and a neighbour that does not wait.
pub(crate) async fn urgent() -> Vec<Verdict> {
    let mut server = DevServer::start();
    let shipped = in_a_row(&server, 20, "urgent transfers, shipped policies").await;
    let policies = policies_with(server.state(), PERMIT_URGENT);
    let configuration = server.state().join("island/kms-server.toml");
    let text = std::fs::read_to_string(&configuration).unwrap();
    std::fs::write(&configuration, format!("{text}\n[policies]\ndirectory = \"{policies}\"\n")).unwrap();
    server.restart();
    vec![shipped, in_a_row(&server, 21, "urgent transfers, permitted by policy").await]
}

/// The delivery of each is left unsent, so that the meter may hold the key.
async fn in_a_row(server: &DevServer, number: u64, attack: &str) -> Verdict {
    let name = format!("other-{number}");
    let neighbour = Neighbour::settle(server, &name, &format!("4D4D4D00000000{number}"), 40).await;
    let head_end = server.connect("head-end").await;
    let device = server.meter(usize::try_from(number).unwrap());
    let (mut times, mut accepted, mut refusal) = (Vec::<Duration>::new(), 0, None);
    while accepted < MOST && refusal.is_none() {
        match begin(&head_end, TransferOrder { urgent: true, ..order(number, "GUEK") }).await {
            Err(status) => refusal = Some(status.message().to_owned()),
            Ok(step) => match carry(&head_end, &device, step, Some(Kind::Deliver)).await.unwrap() {
                Left::Refused(reason) => refusal = Some(reason),
                Left::Ended(_) => accepted += 1,
                Left::Before(step) => {
                    accepted += 1;
                    let transfers = vec![WithdrawnTransfer { meter: step.meter, transfer_id: step.transfer_id }];
                    let withdraw =
                        WithdrawTransfersRequest { request_id: request_id(), transfers, reason: "a test".to_owned() };
                    head_end.transfers().withdraw_transfers(withdraw).await.unwrap();
                }
            },
        }
        times.push(neighbour.ask().await.unwrap());
    }
    let way_out = transfer_at_last(&head_end, &device, number, "").await;
    let (p50, p99) = percentiles(&times);
    let bounded = refusal.is_some();
    let figure = if bounded {
        Figure::count(accepted, "of one slot, then refused")
    } else {
        Figure::count(accepted, format!("of {MOST} of one slot accepted"))
    };
    let reason = refusal.unwrap_or_default();
    let detail = format!("a probe then: {way_out}; a neighbour's grant: {p50:.1} ms, p99 {p99:.1} ms; {reason}");
    Verdict::new("A7", attack, bounded && way_out == "probed", figure).with(detail)
}

const PERMIT_URGENT: &str = r#"
permit (principal is HeadEnd, action == Action::"transferKey", resource)
when { resource has head_end && resource.head_end == principal };
"#;
/// Twice as many as pairs of keys are tried for a meter.
const MOST: usize = 24;
