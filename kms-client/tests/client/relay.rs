//! The relay with a server that is away now and then, refuses, and takes leases back.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use kms_client::{
    Connection, KeyType, MeterLine, MeterNetwork, MeterRequest, Relay, RelayEnd, RelaySettings, RetryPolicy,
    SystemTitle, proto,
};
use proto::{
    task_service_server::{TaskService, TaskServiceServer},
    transfer_report::Answer,
    transfer_service_server::{TransferService, TransferServiceServer},
    transfer_step::Next,
};
use tokio::{net::TcpListener, sync::Notify};
use tonic::{Request, Response, Status};

use crate::sessions::ready::Steps;

/// A transfer here has three steps, whatever is reported; the meter with an odd number is refused.
#[derive(Default)]
struct Server {
    tasks: Mutex<Vec<proto::Task>>,
    /// So many calls answer UNAVAILABLE after they were executed.
    away: Mutex<u32>,
    takes_leases_back: bool,
    beaten: Arc<Notify>,
    begun: Mutex<Vec<proto::BeginTransfersRequest>>,
    reports: Mutex<Vec<proto::TransferReport>>,
    released: Mutex<Vec<proto::ReleaseTasksRequest>>,
}

impl Server {
    async fn start(self) -> (Arc<Self>, Relay) {
        let server = Arc::new(self);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let services = tonic::transport::Server::builder()
            .add_service(TransferServiceServer::from_arc(Arc::clone(&server)))
            .add_service(TaskServiceServer::from_arc(Arc::clone(&server)));
        tokio::spawn(services.serve_with_incoming(tonic::transport::server::TcpIncoming::from(listener)));
        let channel =
            tonic::transport::Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        let settings = RelaySettings {
            lease_seconds: 1,
            idle: Duration::from_millis(20),
            retry: RetryPolicy {
                attempts: 5,
                first_delay: Duration::from_millis(1),
                longest_delay: Duration::from_millis(9),
            },
            ..RelaySettings::default()
        };
        // One that never answers comes first: the relay goes on to the next.
        let nobody = tonic::transport::Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        (server, Relay::new(Connection::over(nobody), [Connection::over(channel)], title(0), settings))
    }

    fn answer(&self, steps: Vec<proto::TransferStep>) -> Result<Vec<proto::TransferStep>, Status> {
        let mut away = self.away.lock().unwrap();
        if *away > 0 {
            *away -= 1;
            return Err(Status::unavailable("killed before the answer left"));
        }
        Ok(steps)
    }
}

fn title(number: u8) -> SystemTitle {
    SystemTitle::from_octets(&[0x4B, 0x41, 0x4D, 0, 0, 0, 0, number]).unwrap()
}

fn task(number: u8) -> proto::Task {
    proto::Task {
        meter: title(number).octets().to_vec().into(),
        key_type: "GUEK".to_owned(),
        fence: 7,
        campaign_id: vec![9; 16].into(),
        ..Default::default()
    }
}

fn step(meter: &[u8], step: u32) -> proto::TransferStep {
    let kind = if step == 1 { proto::transfer_send::Kind::Associate } else { proto::transfer_send::Kind::Authenticate };
    let send =
        proto::TransferSend { kind: kind.into(), apdu: vec![step as u8].into(), client_sap: 1, ..Default::default() };
    let end = proto::TransferEnd { outcome: "proven".to_owned(), held: Vec::new() };
    let next = if step <= 3 { Next::Send(send) } else { Next::End(end) };
    proto::TransferStep { meter: meter.to_vec().into(), transfer_id: vec![5; 16].into(), step, next: Some(next) }
}

#[tonic::async_trait]
impl TransferService for Server {
    async fn begin_transfers(
        &self,
        request: Request<proto::BeginTransfersRequest>,
    ) -> Result<Response<proto::BeginTransfersResponse>, Status> {
        let request = request.into_inner();
        let meter = request.orders[0].meter.clone();
        self.begun.lock().unwrap().push(request);
        let refusal = proto::TransferRefusal { code: 9, message: "in doubt\nwhich GUEK".to_owned() };
        let refused =
            proto::TransferStep { meter: meter.clone(), next: Some(Next::Refusal(refusal)), ..Default::default() };
        let steps = self.answer(vec![if meter[7] % 2 == 1 { refused } else { step(&meter, 1) }])?;
        Ok(Response::new(proto::BeginTransfersResponse { steps, audit_leaf: Default::default() }))
    }

    async fn continue_transfers(
        &self,
        request: Request<proto::ContinueTransfersRequest>,
    ) -> Result<Response<proto::ContinueTransfersResponse>, Status> {
        let report = request.into_inner().reports.remove(0);
        let steps = vec![step(&report.meter, report.step + 1)];
        self.reports.lock().unwrap().push(report);
        Ok(Response::new(proto::ContinueTransfersResponse {
            steps: self.answer(steps)?,
            audit_leaf: Default::default(),
        }))
    }

    async fn withdraw_transfers(
        &self,
        _: Request<proto::WithdrawTransfersRequest>,
    ) -> Result<Response<proto::WithdrawTransfersResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[tonic::async_trait]
impl TaskService for Server {
    type LeaseTasksStream = Steps<proto::LeaseTasksResponse>;

    async fn lease_tasks(
        &self,
        _: Request<proto::LeaseTasksRequest>,
    ) -> Result<Response<Self::LeaseTasksStream>, Status> {
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap());
        Ok(Response::new(Steps(vec![Ok(proto::LeaseTasksResponse { tasks })].into_iter())))
    }

    async fn heartbeat_tasks(
        &self,
        request: Request<proto::HeartbeatTasksRequest>,
    ) -> Result<Response<proto::HeartbeatTasksResponse>, Status> {
        let leases = request.into_inner().leases;
        self.beaten.notify_one();
        let lost = if self.takes_leases_back { leases } else { Vec::new() };
        Ok(Response::new(proto::HeartbeatTasksResponse { lease_expires_ms: 0, lost }))
    }

    async fn release_tasks(
        &self,
        request: Request<proto::ReleaseTasksRequest>,
    ) -> Result<Response<proto::ReleaseTasksResponse>, Status> {
        self.released.lock().unwrap().push(request.into_inner());
        Ok(Response::new(proto::ReleaseTasksResponse::default()))
    }
}

/// A meter that answers a request of one octet with twice that octet, and the second one not at
/// all.
#[derive(Clone, Default)]
struct Line {
    requests: Arc<Mutex<Vec<MeterRequest>>>,
    /// What to wait for before the first answer.
    after: Option<Arc<Notify>>,
}

impl MeterLine for Line {
    async fn exchange(&mut self, request: MeterRequest) -> Option<Vec<u8>> {
        let octet = request.apdu[0];
        self.requests.lock().unwrap().push(request);
        if let Some(after) = self.after.take() {
            // The second heartbeat leaves when the answer to the first has been read.
            after.notified().await;
            after.notified().await;
        }
        (octet != 2).then(|| vec![octet, octet])
    }
}

struct Network(Line);

impl MeterNetwork for Network {
    type Line = Line;

    async fn line(&self, meter: SystemTitle) -> Option<Line> {
        (meter != title(4)).then(|| self.0.clone())
    }
}

/// Works until so many tasks are finished: how each ended.
async fn work(relay: &Relay, network: Network, count: usize) -> Vec<(u8, RelayEnd)> {
    let (mut ended, all) = (Vec::new(), Notify::new());
    relay
        .work(Arc::new(network), all.notified(), |task, end| {
            ended.push((task.meter[7], end.clone()));
            if ended.len() == count {
                all.notify_one();
            }
        })
        .await
        .unwrap();
    ended.sort_by_key(|(number, _)| *number);
    ended
}

#[tokio::test]
async fn a_transfer_is_carried_octet_by_octet_and_asked_for_again_under_one_request_id() {
    let (server, relay) = Server { away: Mutex::new(3), ..Server::default() }.start().await;
    let mut line = Line::default();
    let end = relay.transfer(title(2), Some(KeyType::GAK), false, &mut line).await.unwrap();
    assert!(matches!(end, RelayEnd::Ended(end) if end.outcome == "proven"));
    let begun = server.begun.lock().unwrap().clone();
    assert!(begun.len() == 4 && begun.iter().all(|request| *request == begun[0]), "{begun:?}");
    let order = &begun[0].orders[0];
    assert_eq!(
        (order.key_type.as_str(), order.form(), order.client_title.as_ref()),
        ("GAK", proto::TransferForm::Frames, &title(0).octets()[..])
    );
    let sent: Vec<_> = line
        .requests
        .lock()
        .unwrap()
        .iter()
        .map(|request| (request.opens_association, request.client_sap, request.apdu[0]))
        .collect();
    assert_eq!(sent, [(true, 1, 1), (false, 1, 2), (false, 1, 3)]);
    let reported: Vec<_> =
        server.reports.lock().unwrap().iter().map(|report| (report.step, report.answer.clone().unwrap())).collect();
    assert_eq!(
        reported,
        [(1, Answer::Apdu(vec![1, 1].into())), (2, Answer::Nothing(true)), (3, Answer::Apdu(vec![3, 3].into()))]
    );

    // A server that stays away is given up, not asked for ever.
    *server.away.lock().unwrap() = 99;
    assert!(relay.transfer(title(2), None, false, &mut line).await.unwrap_err().is_unavailable());
    assert_eq!(server.begun.lock().unwrap().last().unwrap().orders[0].key_type, "");
}

#[tokio::test]
async fn tasks_are_worked_off_and_those_that_cannot_be_done_are_given_back_with_a_reason() {
    let (server, relay) =
        Server { tasks: Mutex::new(vec![task(2), task(3), task(4)]), ..Server::default() }.start().await;
    let ended = work(&relay, Network(Line::default()), 3).await;
    assert!(matches!(&ended[0], (2, RelayEnd::Ended(end)) if end.outcome == "proven"), "{ended:?}");
    assert!(
        matches!(ended[1], (3, RelayEnd::Refused(_))) && matches!(ended[2], (4, RelayEnd::Unreachable)),
        "{ended:?}"
    );
    let begun = server
        .begun
        .lock()
        .unwrap()
        .iter()
        .map(|request| request.orders[0].clone())
        .find(|order| order.meter[7] == 2)
        .unwrap();
    assert_eq!((begun.fence, begun.campaign_id.len(), begun.lifetime_seconds), (7, 16, 1));
    let mut released: Vec<_> = server
        .released
        .lock()
        .unwrap()
        .iter()
        .map(|request| (request.leases[0].meter[7], request.reason.clone()))
        .collect();
    released.sort_unstable();
    assert_eq!(released, [(3, "in doubt which GUEK".to_owned()), (4, "unreachable".to_owned())]);
}

#[tokio::test]
async fn who_has_lost_a_lease_sends_nothing_more_to_the_meter() {
    let (server, relay) =
        Server { tasks: Mutex::new(vec![task(2)]), takes_leases_back: true, ..Server::default() }.start().await;
    let line = Line { after: Some(Arc::clone(&server.beaten)), ..Line::default() };
    let ended = work(&relay, Network(line.clone()), 1).await;
    assert!(matches!(ended[0], (2, RelayEnd::LeaseLost)), "{ended:?}");
    assert_eq!(line.requests.lock().unwrap().len(), 1);
    assert!(server.released.lock().unwrap().is_empty());
}
