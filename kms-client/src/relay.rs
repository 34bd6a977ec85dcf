//! A head-end that holds no keys. It carries the octets of transfers between the server and meters,
//! and executes the tasks of campaigns.
//!
//! docs/rotation.md, *What a head-end implements*, says what it must do. The HSM ciphers
//! everything, so this program learns no key.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use kms_domain::{KeyType, SystemTitle};
use kms_proto::v1::{self as proto, transfer_report::Answer, transfer_step::Next};
use tokio::{
    sync::Mutex,
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};
use tonic::{Response, Status, Streaming};

use crate::{Connection, RetryPolicy, ServerError, new_request_id};

/// A connection to one meter: the transport with its wrapper or framing.
pub trait MeterLine: Send {
    /// Sends a request and waits for the answer as long as the network may take. Returns the answer
    /// without the transport's wrapper. `None`: no answer came, or the request could not be sent.
    fn exchange(&mut self, request: MeterRequest) -> impl Future<Output = Option<Vec<u8>>> + Send;
}

/// The connections to all meters of a head-end.
pub trait MeterNetwork: Send + Sync + 'static {
    /// A connection to one meter.
    type Line: MeterLine;

    /// A connection to this meter; `None`: it cannot be reached now. Nothing is sent yet.
    fn line(&self, meter: SystemTitle) -> impl Future<Output = Option<Self::Line>> + Send;
}

/// A request for a meter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeterRequest {
    /// It opens an association, so it needs a new connection, or one whose association was
    /// released.
    pub opens_association: bool,
    /// The client's service access point; 0: the device profile names none.
    pub client_sap: u16,
    /// The APDU, ciphered if it must be.
    pub apdu: Bytes,
}

/// How a transfer or probe ended for its head-end.
#[derive(Clone, Debug)]
pub enum RelayEnd {
    /// The transfer has ended. Its outcome is one of `proven`, `acknowledged`, `attested`,
    /// `not-applied`, `probed`, `in-doubt`, `withdrawn`.
    Ended(proto::TransferEnd),
    /// The server refused the transfer or a report: google.rpc.Code and the server's text. If the
    /// answer to the report that ended the transfer was lost, its repetition is refused, too.
    Refused(proto::TransferRefusal),
    /// The task lease is lost: another head-end may work on the meter.
    LeaseLost,
    /// There is no connection to the meter. Nothing was begun.
    Unreachable,
    /// No server could be reached any more. A transfer that has begun stays as it is until its time
    /// is over.
    Failed(ServerError),
}

/// The settings of a [`Relay`].
#[derive(Clone, Debug)]
pub struct RelaySettings {
    /// The largest number of meters under work at once, 1–1,000.
    pub concurrency: u32,
    /// Seconds for which tasks are leased, 1–3,600. If this program ends, a meter waits this long.
    /// Leases are renewed after a third of this time.
    pub lease_seconds: u32,
    /// The time to wait if there is no task.
    pub idle: Duration,
    /// The longest time of a call to the server.
    pub call_timeout: Duration,
    /// The rules for repeating a call. With several servers, each attempt goes to the next one.
    pub retry: RetryPolicy,
}

impl Default for RelaySettings {
    fn default() -> Self {
        Self {
            concurrency: 32,
            lease_seconds: 120,
            idle: Duration::from_secs(5),
            call_timeout: Duration::from_secs(30),
            retry: RetryPolicy {
                attempts: 60,
                first_delay: Duration::from_millis(100),
                longest_delay: Duration::from_secs(5),
            },
        }
    }
}

/// Carries octets. Clones share the connections.
#[derive(Clone, Debug)]
pub struct Relay {
    servers: Arc<[Connection]>,
    /// The server that answered last.
    at: Arc<AtomicUsize>,
    client_title: SystemTitle,
    settings: RelaySettings,
}

impl Relay {
    /// A head-end that uses `client_title` towards meters, with connections to one or more servers
    /// of the island: `first`, and `others` for the time when it is unavailable. The title must be
    /// registered for the head-end. While a transfer of a meter is under way, nothing else may use
    /// the title with this meter.
    pub fn new(
        first: Connection,
        others: impl IntoIterator<Item = Connection>,
        client_title: SystemTitle,
        settings: RelaySettings,
    ) -> Self {
        let servers = [first].into_iter().chain(others).collect();
        Self { servers, at: Arc::default(), client_title, settings }
    }

    /// Executes a transfer of a new `key_type` to its end; without one, a probe. An `urgent`
    /// transfer is executed although it is in doubt which version the meter holds.
    ///
    /// # Errors
    /// The server refused the call, or no server could be reached.
    pub async fn transfer(
        &self,
        meter: SystemTitle,
        key_type: Option<KeyType>,
        urgent: bool,
        line: &mut impl MeterLine,
    ) -> Result<RelayEnd, ServerError> {
        let key_type = key_type.map(|key_type| key_type.to_string()).unwrap_or_default();
        let order = proto::TransferOrder { meter: octets(meter), key_type, urgent, ..proto::TransferOrder::default() };
        self.carry(order, line, &AtomicBool::new(false)).await
    }

    /// Executes tasks of campaigns until `stop` ends. Then it leases no more tasks, and finishes
    /// those under way. It calls `finished` with the end of each. Leases are renewed. The task of a
    /// meter that cannot be reached is returned as `unreachable`, which counts as an attempt.
    ///
    /// # Errors
    /// The server refuses to lease tasks, or no server can be reached any more. Tasks under way are
    /// finished first.
    pub async fn work<N: MeterNetwork>(
        &self,
        network: Arc<N>,
        stop: impl Future<Output = ()>,
        mut finished: impl FnMut(&proto::Task, &RelayEnd),
    ) -> Result<(), ServerError> {
        let mut held: HashMap<SystemTitle, Held> = HashMap::new();
        let mut working: JoinSet<(proto::Task, RelayEnd)> = JoinSet::new();
        let mut beat = tokio::time::interval(Duration::from_secs(self.settings.lease_seconds.into()) / 3);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut outcome = Ok(());
        let (mut stopping, mut lease_at) = (false, Instant::now());
        tokio::pin!(stop);
        while !stopping || !working.is_empty() {
            // In portions: each call is one transaction, of any size.
            let has_room = working.len() <= usize::try_from(self.settings.concurrency / 2).unwrap_or(usize::MAX);
            tokio::select! {
                () = &mut stop, if !stopping => stopping = true,
                Some(done) = working.join_next(), if !working.is_empty() => {
                    // A task that panicked reports nothing; its lease ends by time.
                    if let Ok((task, end)) = done {
                        held.retain(|_, held| !held.is_for(&lease_of(&task)));
                        finished(&task, &end);
                    }
                }
                _ = beat.tick(), if !held.is_empty() => self.heartbeat(&held).await,
                () = tokio::time::sleep_until(lease_at), if !stopping && has_room => match self.lease().await {
                    Ok(tasks) => {
                        lease_at = Instant::now() + if tasks.is_empty() { self.settings.idle } else { Duration::ZERO };
                        for task in tasks {
                            let Ok(meter) = SystemTitle::from_octets(&task.meter) else { continue };
                            let entry = held.entry(meter).or_insert_with(|| Held::new(task.clone()));
                            entry.take_over(task.clone());
                            working.spawn(self.clone().task(task, meter, entry.clone(), Arc::clone(&network)));
                        }
                    }
                    Err(error) => (stopping, outcome) = (true, Err(error)),
                },
            }
        }
        outcome
    }

    /// Executes one task, after the work under an earlier lease of the same meter has stopped.
    async fn task<N: MeterNetwork>(
        self,
        task: proto::Task,
        meter: SystemTitle,
        held: Held,
        network: Arc<N>,
    ) -> (proto::Task, RelayEnd) {
        let _turn = held.turn.lock().await;
        let end = match network.line(meter).await {
            None => RelayEnd::Unreachable,
            Some(mut line) => {
                self.carry(self.order(&task), &mut line, &held.lost).await.unwrap_or_else(RelayEnd::Failed)
            }
        };
        match &end {
            RelayEnd::Unreachable => self.release(&task, "unreachable").await,
            RelayEnd::Refused(refusal) => self.release(&task, &reason(&refusal.message)).await,
            // The server knows how the transfer of the task ended. Other leases end by time.
            RelayEnd::Ended(_) | RelayEnd::LeaseLost | RelayEnd::Failed(_) => {}
        }
        (task, end)
    }

    fn order(&self, task: &proto::Task) -> proto::TransferOrder {
        proto::TransferOrder {
            meter: task.meter.clone(),
            security_setup: task.security_setup.clone(),
            key_type: task.key_type.clone(),
            campaign_id: task.campaign_id.clone(),
            fence: task.fence,
            // If this program ends, the next holder of the task waits no longer than for the lease.
            lifetime_seconds: self.settings.lease_seconds,
            ..proto::TransferOrder::default()
        }
    }

    async fn carry(
        &self,
        order: proto::TransferOrder,
        line: &mut impl MeterLine,
        lost: &AtomicBool,
    ) -> Result<RelayEnd, ServerError> {
        let order = proto::TransferOrder {
            client_title: octets(self.client_title),
            form: proto::TransferForm::Frames.into(),
            ..order
        };
        // One request id for all attempts, so that nothing begins twice.
        let request =
            proto::BeginTransfersRequest { request_id: new_request_id().octets().to_vec().into(), orders: vec![order] };
        let begin = |server: Connection| {
            let request = request.clone();
            async move { server.transfers().begin_transfers(request).await }
        };
        let mut steps = self.call(begin).await?.steps;
        loop {
            let step = steps.pop().ok_or_else(|| unexpected("no step of the transfer"))?;
            let send = match step.next {
                Some(Next::Send(send)) => send,
                Some(Next::End(end)) => return Ok(RelayEnd::Ended(end)),
                Some(Next::Refusal(refusal)) => return Ok(RelayEnd::Refused(refusal)),
                None => return Err(unexpected("a step with nothing to do")),
            };
            if lost.load(Ordering::Relaxed) {
                return Ok(RelayEnd::LeaseLost);
            }
            let request = MeterRequest {
                opens_association: send.kind == i32::from(proto::transfer_send::Kind::Associate),
                client_sap: u16::try_from(send.client_sap).unwrap_or_default(),
                apdu: send.apdu,
            };
            let answer = line.exchange(request).await.map_or(Answer::Nothing(true), |apdu| Answer::Apdu(apdu.into()));
            let report = proto::TransferReport {
                meter: step.meter,
                transfer_id: step.transfer_id,
                step: step.step,
                answer: Some(answer),
            };
            let request = proto::ContinueTransfersRequest { reports: vec![report] };
            let proceed = |server: Connection| {
                let request = request.clone();
                async move { server.transfers().continue_transfers(request).await }
            };
            steps = self.call(proceed).await?.steps;
        }
    }

    async fn lease(&self) -> Result<Vec<proto::Task>, ServerError> {
        let request = proto::LeaseTasksRequest {
            most: self.settings.concurrency,
            lease_seconds: self.settings.lease_seconds,
            ..proto::LeaseTasksRequest::default()
        };
        let lease = |server: Connection| {
            let request = request.clone();
            async move {
                let mut answers: Streaming<proto::LeaseTasksResponse> =
                    server.tasks().lease_tasks(request).await?.into_inner();
                Ok(Response::new(answers.message().await?.unwrap_or_default()))
            }
        };
        Ok(self.call(lease).await?.tasks)
    }

    /// Renews all leases, and marks those that are lost. If no server can be reached, leases may
    /// end: the next heartbeat tells.
    async fn heartbeat(&self, held: &HashMap<SystemTitle, Held>) {
        let leases = held.values().map(|held| lease_of(&held.task)).collect();
        let request = proto::HeartbeatTasksRequest { leases, lease_seconds: self.settings.lease_seconds };
        let renew = |server: Connection| {
            let request = request.clone();
            async move { server.tasks().heartbeat_tasks(request).await }
        };
        let Ok(answer) = self.call(renew).await else { return };
        for lease in answer.lost {
            let held = SystemTitle::from_octets(&lease.meter).ok().and_then(|meter| held.get(&meter));
            if let Some(held) = held.filter(|held| held.is_for(&lease)) {
                held.lost.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Returns a lease. If that fails, it ends by time.
    async fn release(&self, task: &proto::Task, reason: &str) {
        let request = proto::ReleaseTasksRequest { leases: vec![lease_of(task)], reason: reason.to_owned() };
        let release = |server: Connection| {
            let request = request.clone();
            async move { server.tasks().release_tasks(request).await }
        };
        drop(self.call(release).await);
    }

    /// Repeats a call until a server answers it. After an unavailable server it tries the next one
    /// at once.
    async fn call<T, Call>(&self, call: impl Fn(Connection) -> Call) -> Result<T, ServerError>
    where
        Call: Future<Output = Result<Response<T>, Status>>,
    {
        let count = self.servers.len();
        let (mut attempt, mut in_turn) = (1, 1);
        loop {
            let at = self.at.load(Ordering::Relaxed);
            let server = self.servers.get(at % count.max(1)).ok_or_else(|| unexpected("no connection"))?;
            let error = match tokio::time::timeout(self.settings.call_timeout, call(server.clone())).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => ServerError::from(status),
                Err(_) => ServerError::from(Status::deadline_exceeded("the server did not answer in time")),
            };
            let Some(delay) = self.settings.retry.delay_after(attempt, &error) else { return Err(error) };
            // Another call may have found a server that answers meanwhile.
            let _ = self.at.compare_exchange(at, at.wrapping_add(1), Ordering::Relaxed, Ordering::Relaxed);
            if in_turn % count == 0 {
                tokio::time::sleep(delay).await;
                attempt += 1;
            }
            in_turn += 1;
        }
    }
}

/// A task whose lease this program holds.
#[derive(Clone)]
struct Held {
    task: proto::Task,
    lost: Arc<AtomicBool>,
    /// The work on the meter that is under way.
    turn: Arc<Mutex<()>>,
}

impl Held {
    fn new(task: proto::Task) -> Self {
        Self { task, lost: Arc::default(), turn: Arc::default() }
    }

    /// A newer lease of the same meter: the work under the older one stops first.
    fn take_over(&mut self, task: proto::Task) {
        if !self.is_for(&lease_of(&task)) {
            self.lost.store(true, Ordering::Relaxed);
            self.lost = Arc::default();
            self.task = task;
        }
    }

    fn is_for(&self, lease: &proto::TaskLease) -> bool {
        lease_of(&self.task) == *lease
    }
}

fn lease_of(task: &proto::Task) -> proto::TaskLease {
    proto::TaskLease { campaign_id: task.campaign_id.clone(), meter: task.meter.clone(), fence: task.fence }
}

/// The server's text as a reason: at most 128 octets, without control characters.
fn reason(message: &str) -> String {
    let mut reason: String = message.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
    while reason.len() > LONGEST_REASON {
        reason.pop();
    }
    if reason.is_empty() { "refused".to_owned() } else { reason }
}

fn octets(title: SystemTitle) -> Bytes {
    title.octets().to_vec().into()
}

fn unexpected(what: &str) -> ServerError {
    Status::internal(format!("the server answered with {what}")).into()
}

const LONGEST_REASON: usize = 128;
