//! Transfers and campaigns: new keys prepared for meters in batches, and the planning of a campaign
//! over all of them.

use std::{
    cell::{Cell, RefCell},
    time::{Duration, Instant},
};

use kms_client::proto::{
    BeginTransfersRequest, CampaignAction, CampaignPlan, CampaignSelection, CreateCampaignRequest, TransferForm,
    TransferOrder, transfer_step::Next,
};

use crate::{
    Failure,
    island::{Island, request_id, title},
    measure::{Run, memory_mib},
};

/// What planning came to.
pub(crate) struct Planned {
    pub(crate) meters: u64,
    pub(crate) time: Duration,
    /// By how much the server's memory was above what it had before, at its highest, in MiB.
    pub(crate) memory_mib: f64,
}

impl Island {
    /// Orders a new GUEK for each meter from 1 to `meters` in batches, until `time` is over or
    /// every meter has one: the new version is derived in the HSM, durable as a candidate, on the
    /// record, and has left wrapped under the meter's KEK. A unit is one meter.
    pub(crate) async fn prepare_transfers(&self, time: Duration, meters: u64) -> Result<Run, Failure> {
        let next = RefCell::new(1);
        let turn = Cell::new(0);
        let batch = || {
            let first = *next.borrow();
            let end = (first + MOST_ORDERS).min(meters + 1);
            *next.borrow_mut() = end;
            let turn = turn.replace(turn.get() + 1);
            async move { if first == end { Ok(None) } else { self.begin(turn, first..end).await.map(Some) } }
        };
        self.load.in_flight(CALLS, time, batch).await
    }

    async fn begin(&self, turn: u64, numbers: std::ops::Range<u64>) -> Result<u64, Failure> {
        let count = numbers.end - numbers.start;
        let order = |number| TransferOrder {
            meter: title(number).to_vec().into(),
            key_type: "GUEK".to_owned(),
            client_title: self.head_end.client_title.octets().to_vec().into(),
            form: TransferForm::WrappedKey.into(),
            ..TransferOrder::default()
        };
        let request = BeginTransfersRequest { request_id: request_id(), orders: numbers.map(order).collect() };
        let steps = self.head_end.connection(turn)?.transfers().begin_transfers(request).await?.into_inner().steps;
        for step in &steps {
            match &step.next {
                Some(Next::Send(send)) if send.wrapped_key.len() == 24 && !send.key_transfer_argument.is_empty() => {}
                other => return Err(format!("no wrapped key for meter {}: {other:?}", hex::encode(&step.meter)).into()),
            }
        }
        if steps.len() as u64 == count {
            Ok(count)
        } else {
            Err(format!("{} steps for {count} orders", steps.len()).into())
        }
    }

    /// Plans a campaign over every meter of the island and stores it as a draft.
    pub(crate) async fn plan_campaign(&self) -> Result<Planned, Failure> {
        let server = self.load.server.to_string();
        // Since proc(5), Linux 4.0: forgets the highest memory so far. Where that is not permitted,
        // the figure counts from the highest ever.
        let _ = std::fs::write(format!("/proc/{server}/clear_refs"), "5");
        let before = memory_mib(&server, "VmRSS");
        let plan = CampaignPlan {
            name: "all meters".to_owned(),
            action: CampaignAction::Rotate.into(),
            key_type: "GUEK".to_owned(),
            selection: Some(CampaignSelection { whole_island: true, ..CampaignSelection::default() }),
            ..CampaignPlan::default()
        };
        let begun = Instant::now();
        let request = CreateCampaignRequest { request_id: request_id(), plan: Some(plan), commit: true };
        let answer = self.officer.campaigns().create_campaign(request).await?.into_inner();
        let time = begun.elapsed();
        let meters = answer.campaign.ok_or("no campaign was stored")?.meters;
        Ok(Planned { meters, time, memory_mib: memory_mib(&server, "VmHWM") - before })
    }
}

/// Orders of one call.
const MOST_ORDERS: u64 = 1_000;
/// Calls in flight.
const CALLS: usize = 4;
