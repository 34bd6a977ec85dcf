//! Keys replaced over the air by a head-end that holds none, over a network that loses, repeats and
//! reorders, while the server is killed.

use kms_client::{
    Connection, new_request_id,
    proto::{
        BeginTransfersRequest, ContinueTransfersRequest, TransferForm, TransferOrder, TransferReport, TransferStep,
        transfer_report::Answer, transfer_send::Kind, transfer_step::Next,
    },
};
use kms_domain::SystemTitle;
use kms_tests::{CLIENT_TITLE, DevServer, open, put_on_line, read_energy, title};
use meter_sim::{
    Connection as MeterConnection, Meter, Obis,
    axdr::Data,
    behaviour::{Fault, ScriptedFault, Trigger},
    nonces::RepeatedNonce,
};

/// A head-end that relays octets. The server may die at any call: it is started again, and what was
/// asked is asked again.
struct Relay {
    server: DevServer,
    connection: Connection,
    /// Kill the server before this call, counted from now.
    kill_in: Option<u32>,
    kills: u32,
}

impl Relay {
    async fn new(server: DevServer) -> Self {
        let connection = server.connect("head-end").await;
        Self { server, connection, kill_in: None, kills: 0 }
    }

    /// Carries a transfer out to its end: how it ended.
    async fn transfer(&mut self, meter: &Meter, number: u64, key_type: &str) -> String {
        let order = TransferOrder {
            meter: title(number).octets().to_vec().into(),
            key_type: key_type.to_owned(),
            client_title: hex::decode(CLIENT_TITLE).unwrap().into(),
            form: TransferForm::Frames.into(),
            ..TransferOrder::default()
        };
        let request =
            BeginTransfersRequest { request_id: new_request_id().octets().to_vec().into(), orders: vec![order] };
        let mut line = MeterConnection::new(meter.clone(), 1);
        let mut step = self.begin(request).await;
        loop {
            match step.next.unwrap() {
                Next::End(end) => return end.outcome,
                Next::Refusal(refusal) => return refusal.message,
                Next::Send(send) => {
                    if send.kind == i32::from(Kind::Associate) {
                        line = MeterConnection::new(meter.clone(), 1);
                    }
                    let answer = line.deliver(&send.apdu).await.answers.pop();
                    let answer = answer.map_or(Answer::Nothing(true), |apdu| Answer::Apdu(apdu.into()));
                    let report = TransferReport {
                        meter: step.meter,
                        transfer_id: step.transfer_id,
                        step: step.step,
                        answer: Some(answer),
                    };
                    step = self.report(report).await;
                }
            }
        }
    }

    async fn begin(&mut self, request: BeginTransfersRequest) -> TransferStep {
        loop {
            self.perhaps_kill();
            match self.connection.transfers().begin_transfers(request.clone()).await {
                Ok(answer) => return answer.into_inner().steps.remove(0),
                Err(status) => self.revive(&status).await,
            }
        }
    }

    async fn report(&mut self, report: TransferReport) -> TransferStep {
        loop {
            self.perhaps_kill();
            match self
                .connection
                .transfers()
                .continue_transfers(ContinueTransfersRequest { reports: vec![report.clone()] })
                .await
            {
                Ok(answer) => return answer.into_inner().steps.remove(0),
                Err(status) => self.revive(&status).await,
            }
        }
    }

    fn perhaps_kill(&mut self) {
        match &mut self.kill_in {
            Some(0) => {
                self.kill_in = None;
                self.kills += 1;
                self.server.kill();
            }
            Some(calls) => *calls -= 1,
            None => {}
        }
    }

    async fn revive(&mut self, status: &impl std::fmt::Display) {
        assert!(self.kills > 0, "{status}");
        self.server.restart();
        self.connection = self.server.connect("head-end").await;
    }

    /// The keys that the server grants are those in the meter's memory, octet by octet, and the
    /// meter answers to them.
    async fn compare(&self, meter: &Meter, title: SystemTitle) {
        let profile = self.server.profile("head-end");
        let session = open(&self.connection, &profile, title, 10).await.unwrap();
        let keys = session.keys.meter(title).unwrap();
        let memory = meter.keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
        let granted = |key_type| keys.key(key_type).unwrap().key.expose().to_vec();
        assert!(granted(kms_client::KeyType::GUEK) == memory.guek.expose(), "GUEK of {title}");
        assert!(granted(kms_client::KeyType::GAK) == memory.gak.expose(), "GAK of {title}");
        let address = put_on_line(meter).await;
        assert_eq!(read_energy(address, &session, title).await.unwrap(), Data::DoubleLongUnsigned(123_456));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_meter_talks_after_rotation_over_a_bad_network_and_killed_servers() {
    let server = DevServer::start();
    let meters: Vec<Meter> = (0..FAULTS.len()).map(|number| server.meter(number)).collect();
    let mut relay = Relay::new(server).await;
    for ((number, meter), fault) in (0..).zip(&meters).zip(FAULTS) {
        if let Some(fault) = fault {
            meter.add_fault(ScriptedFault { at: Trigger::KeyTransfer(1), fault });
        }
        // Challenges that could be requests, at an opening and at a proof: they cost an
        // association, and no attempt.
        meter.choose_challenges([
            vec![meter_sim::REQUESTS[usize::try_from(number).unwrap() % meter_sim::REQUESTS.len()]],
            vec![b'A'],
            vec![0x01, 0x01],
        ]);
        // Each meter meets a kill -9 before another call of its first transfer.
        relay.kill_in = Some(u32::try_from(number % 6).unwrap());
        for key_type in ["GUEK", "GAK"] {
            for attempt in 0.. {
                let outcome = relay.transfer(meter, number, key_type).await;
                if outcome == "proven" {
                    break;
                }
                assert!(attempt < 6, "meter {number}: {key_type} is {outcome}");
                // What is in doubt is probed before it is tried again.
                relay.transfer(meter, number, "").await;
            }
        }
        relay.kill_in = None;
        relay.compare(meter, title(number)).await;
    }
    assert!(relay.kills >= 8, "{} kills", relay.kills);
    assert_eq!(RepeatedNonce::find(&meters), []);
}

/// One for each meter, at its first `key_transfer`.
const FAULTS: [Option<Fault>; 10] = [
    None,
    Some(Fault::LoseRequest),
    Some(Fault::LoseAnswer),
    Some(Fault::HoldRequest(2)),
    Some(Fault::DuplicateRequest),
    Some(Fault::AppliedButError(9)),
    Some(Fault::RefusedWithoutApplying(250)),
    Some(Fault::SuccessWithoutApplying),
    Some(Fault::PowerCycleBeforeAnswer),
    Some(Fault::CorruptAnswer(0)),
];
