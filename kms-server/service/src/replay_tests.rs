//! A replay gives the same octets or a refusal (I2, I4, I8): of every call that can be repeated,
//! whatever has changed in between, on the same server, on another one, and after a restart.

use std::{
    collections::{BTreeMap, HashMap},
    num::NonZeroU32,
    path::PathBuf,
    sync::Arc,
};

use aws_lc_rs::agreement::{ECDH_P256, PrivateKey};
use kms_dlms::Protection;
use kms_domain::{
    DeviceProfileName, Evidence, FlagId, KeyLength, KeyOrigin, KeyState, KeyType, KeyVersionNumber, NewKeyVersion,
    Outcome, Party, PersonName, Place, PrincipalId, ProposalId, Quorum, RequestId, Role, SecuritySetupId,
    SwitchThreshold, SystemTitle, TransferForm, TransferId, TransportCertificate, WorkOrderContent, WorkOrderId,
    WorkOrderTask, WrappedKey,
};
use kms_proto::v1::{self, AuditRecord, Manifest, MetersChanged, audit_record::Event};
use kms_store::{Changes, Decision, Reads, RequestKey, RequestPut, RequestRow};
use meter_sim::Connection;
use prost::Message as _;

use crate::island::IslandContext;
use crate::testing::{TestIsland, client_title, island_tests, meter, put_principal, sample};
use crate::{
    Request,
    approval::{ProposalChange, ProposalService},
    campaign::{self, CampaignService},
    certificate::signing::CA_KEY,
    certificate::{self, CertificateAuthority, Validity},
    frame::{FrameOutcome, FrameService, PlainContent, PlainFrame},
    grant::GrantService,
    grant::terms::{GrantChunk, GrantTargets, SessionTerms},
    handheld::{HandheldService, NewInvitation},
    meter::{
        Assignment, Compromise, CounterFloor, CounterRaise, Enrolment, Membership, MeterService, NewMeter, Selection,
    },
    owner::{NewOwnerKey, OwnerService},
    principal::{NewPrincipal, Principals},
    transfer::{NextStep, Order, Report, ReportedAnswer, SendingKind, StepAnswer, TransferService, tests::Field},
    work_order::{self, NewWorkOrder, WorkOrderService},
};
use kms_authz::{Caller, Policy, Purpose, Quotas};
use kms_base::error::ServiceError;
use kms_ledger::{Asking, Window};

const GET: &str = "C001C100030100010800FF0200";
/// remote_disconnect of the disconnect control.
const DISCONNECT: &str = "C301C10046000060030AFF01010F00";
const METERS: u64 = 6;
const QUARTER_MS: i64 = 15 * 60 * 1_000;

fn plain(number: u64, apdu: &str) -> PlainFrame {
    PlainFrame {
        meter: meter(number),
        setup: None,
        client_title: client_title(),
        protection: Protection::AuthenticatedEncrypted,
        content: PlainContent::Apdu { apdu: hex::decode(apdu).unwrap(), general: false },
    }
}

fn id() -> RequestId {
    RequestId::from_octets(uuid::Uuid::now_v7().as_bytes()).unwrap()
}

fn request() -> Request {
    Request { id: id(), digest: [1; 32] }
}

fn second_title() -> SystemTitle {
    SystemTitle::parse("4D4D4D0000000077").unwrap()
}

/// The shipped policies and another, with so many supply commands an hour.
fn policies(commands: u32, more: &str) -> Arc<Policy> {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../policies"));
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let cedar = entries.filter(|path| path.extension().is_some_and(|extension| extension == "cedar"));
    let mut files: Vec<(PathBuf, String)> =
        cedar.map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect();
    files.push((PathBuf::from("site.cedar"), more.to_owned()));
    let quotas = Quotas::SHIPPED.replacen("commands = 200, meters = 100", &format!("commands = {commands}"), 1);
    assert_ne!(quotas, Quotas::SHIPPED);
    Arc::new(kms_policy::from_files(files, (Quotas::FILE.into(), quotas)).unwrap())
}

async fn protect(
    server: &Arc<IslandContext>,
    caller: &Caller,
    request: RequestId,
    frames: &[PlainFrame],
    supersede: bool,
) -> Result<Vec<FrameOutcome>, ServiceError> {
    FrameService::new(server.clone())
        .protect(caller, request, [1; 32], Purpose::Control, frames.to_vec(), supersede)
        .await
        .map(|(outcomes, _)| outcomes)
}

/// The octets of frames, or that they were refused.
fn octets(outcomes: Vec<FrameOutcome>) -> Vec<Option<Vec<u8>>> {
    outcomes.into_iter().map(|outcome| outcome.octets.ok()).collect()
}

fn aborted(error: &ServiceError) -> &str {
    match error {
        ServiceError::Aborted { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

/// A new version of a key, as if the meter had shown that it holds it.
async fn rotate(server: &Arc<IslandContext>, title: SystemTitle, key_type: KeyType) {
    let stored = server.hsm.generate_stored(key_type, KeyLength::Aes128).await.unwrap();
    let wrapped =
        WrappedKey::new(key_type, u8::try_from(stored.storage_kek_version.number()).unwrap(), stored.blob.into())
            .unwrap();
    let act = server.committer.act_in_test(
        kms_ledger::Actor::server(kms_ledger::ServerAct::TEST),
        Reads { meters: vec![title], ..Reads::default() },
        move |view| {
            let mut row = (*view.meter(title)?.unwrap()).clone();
            row.sequence += 1;
            let (moment, now) = (row.sequence, view.now());
            let slot = row.slots.get_mut(SecuritySetupId::DEFAULT, key_type).unwrap();
            let new = NewKeyVersion {
                state: KeyState::PreActive,
                origin: KeyOrigin::Generated,
                wrapped: Some(wrapped.clone()),
                fingerprint: None,
            };
            let number = slot.add_version(new, now).unwrap();
            slot.mark_left(number, moment, KeyVersionNumber::FIRST).unwrap();
            slot.confirm(number, moment, Evidence::Proven, now).unwrap();
            view.append(Event::MetersChanged(MetersChanged { change: "test".to_owned(), ..MetersChanged::default() }));
            view.put_meter(row, false)
        },
    );
    act.await.unwrap();
}

async fn change_principal(
    server: &Arc<IslandContext>,
    caller: &Caller,
    change: impl FnOnce(&mut kms_domain::Principal),
) {
    let mut row = (*server.principal(caller).await.unwrap()).clone();
    change(&mut row);
    row.revision += 1;
    put_principal(server, row).await;
}

async fn assign(server: &Arc<IslandContext>, officer: &Caller, title: SystemTitle, head_end: &Caller) {
    let assignment = Assignment {
        selection: Selection::Meters(vec![title]),
        head_end: Some(head_end.principal.clone()),
        dry_run: false,
    };
    MeterService::new(server.clone()).assign(officer, request(), assignment).await.unwrap();
}

/// A request's row as it is in the database.
async fn stored(server: &Arc<IslandContext>, key: RequestKey) -> Option<RequestRow> {
    let mut found = None;
    let reads = Reads { requests: vec![key.clone()], ..Reads::default() };
    let mut decide = |read: &kms_store::ReadSet| {
        found = read.request(&key).present().cloned();
        Decision::Abandon
    };
    server.store.transact(reads, &mut decide).await.unwrap();
    found
}

/// Writes a request's row past the server.
async fn put_back(server: &Arc<IslandContext>, key: &RequestKey, row: RequestRow) {
    let changes = Changes { requests: vec![RequestPut { key: key.clone(), row }], ..Changes::default() };
    server
        .store
        .transact(Reads::default(), &mut |_: &kms_store::ReadSet| Decision::Commit(Box::new(changes.clone())))
        .await
        .unwrap();
}

/// Removes all rows of requests.
async fn purge(server: &Arc<IslandContext>) {
    while server.store.purge_requests(kms_domain::UnixMillis(i64::MAX), 1_000).await.unwrap() > 0 {}
}

fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut value = *state;
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// Watches everything that leaves: a counter of a meter and a client title with two contents, or of
/// two leases, is I4 broken. Counters go on with a new key in the profile of these meters, so the
/// key is not told apart: that is stricter.
#[derive(Default)]
struct Watcher {
    contents: HashMap<(u64, u64, u32), Vec<u8>>,
    leases: Vec<(u64, u64, u32, u32)>,
    steps: HashMap<([u8; 16], u32), Vec<u8>>,
    /// Up to where the log of each writer was read.
    read: HashMap<kms_domain::WriterId, u64>,
}

impl Watcher {
    fn saw(&mut self, meter: u64, title: u64, counter: u32, content: &[u8]) {
        let in_lease = self
            .leases
            .iter()
            .any(|(of, under, first, last)| (*of, *under) == (meter, title) && (*first..=*last).contains(&counter));
        assert!(!in_lease, "I4: counter {counter} of meter {meter:016X} is in a lease too");
        let known = self.contents.entry((meter, title, counter)).or_insert_with(|| content.to_vec());
        assert_eq!(known, content, "I4: counter {counter} of meter {meter:016X} with two contents");
    }

    fn leased(&mut self, meter: u64, title: u64, first: u32, count: u32) {
        let last = first + (count - 1);
        let lies_in =
            |of: u64, under: u64, from: u32, to: u32| (of, under) == (meter, title) && from <= last && first <= to;
        assert!(
            self.leases.iter().all(|(of, under, from, to)| !lies_in(*of, *under, *from, *to)),
            "I4: two leases of meter {meter:016X} overlap"
        );
        assert!(
            self.contents.keys().all(|(of, under, counter)| !lies_in(*of, *under, *counter, *counter)),
            "I4: a lease of used counters"
        );
        self.leases.push((meter, title, first, last));
    }

    /// A step that left: always the same octets.
    fn step(&mut self, id: TransferId, step: u32, apdu: &[u8]) {
        let known = self.steps.entry((id.octets(), step)).or_insert_with(|| apdu.to_vec());
        assert_eq!(known, apdu, "I4: step {step} of transfer {id} with two contents");
    }

    /// The new records of acts; refusals, security events, beginnings of chains and what a server
    /// notices of its clock are none.
    async fn records(&mut self, server: &Arc<IslandContext>) -> Vec<Event> {
        let mut events = Vec::new();
        for tail in server.store.audit_tails().await.unwrap() {
            let from = self.read.get(&tail.writer).copied().unwrap_or(0);
            let rows = server.store.audit_of_writer(tail.writer, from, 1_000).await.unwrap();
            for row in rows {
                self.read.insert(tail.writer, row.sequence + 1);
                match AuditRecord::decode(row.record.as_slice()).unwrap().event {
                    None
                    | Some(
                        Event::Refused(_) | Event::SecurityEvent(_) | Event::WriterOpened(_) | Event::ClockJumped(_),
                    ) => {}
                    Some(event) => events.push(event),
                }
            }
        }
        events
    }

    /// Reads what was recorded since the last time. What left in frames is `octets`, by place.
    async fn look(&mut self, server: &Arc<IslandContext>, octets: &[Option<Vec<u8>>]) -> Vec<Event> {
        let events = self.records(server).await;
        for event in &events {
            match event {
                Event::FramesProtected(event) => {
                    for frame in &event.frames {
                        let title = u64::from_be_bytes(frame.client_title.as_ref().try_into().unwrap());
                        let Some(content) = octets.get(frame.place as usize - 1).cloned().flatten() else { continue };
                        self.saw(frame.meter, title, frame.invocation_counter, &content);
                    }
                }
                Event::KeysGranted(event) => {
                    for granted in event.meters.iter().filter(|granted| granted.lease_count > 0) {
                        let title = u64::from_be_bytes(event.client_title.as_ref().try_into().unwrap());
                        self.leased(granted.meter, title, granted.lease_first, granted.lease_count);
                    }
                }
                Event::TransfersAdvanced(event) => {
                    for advance in event.advances.iter().filter(|advance| advance.step > 0) {
                        let title = u64::from_be_bytes(advance.client_title.as_ref().try_into().unwrap());
                        let step = (advance.transfer_id.as_ref().try_into().unwrap(), advance.step);
                        let Some(apdu) = self.steps.get(&step).cloned() else { continue };
                        for counter in &advance.invocation_counters {
                            self.saw(advance.meter, title, *counter, &apdu);
                        }
                    }
                }
                _ => {}
            }
        }
        events
    }
}

/// The island of the property test: three servers, simulated meters, and what was seen.
struct World {
    field: Field,
    servers: Vec<Arc<IslandContext>>,
    ordinary: Arc<Policy>,
    others: Vec<Arc<Policy>>,
    seed: u64,
    watcher: Watcher,
    /// The clock was moved on since the last call: its answer may be forgotten.
    aged: bool,
}

impl World {
    fn below(&mut self, bound: u64) -> u64 {
        splitmix(&mut self.seed) % bound
    }

    fn server(&mut self) -> Arc<IslandContext> {
        let at = self.below(self.servers.len() as u64);
        self.servers[usize::try_from(at).unwrap()].clone()
    }

    fn island(&self) -> &TestIsland {
        &self.field.island
    }

    fn policy(&self, policy: &Arc<Policy>) {
        self.servers.iter().for_each(|server| server.policy.store(policy.clone()));
    }

    async fn restart(&mut self) {
        let server = Arc::new(self.field.island.restarted().await);
        server.policy.store(self.ordinary.clone());
        self.servers[2] = server;
    }

    /// Everything as it was, as far as it can be.
    async fn mend(&mut self) {
        let (ordinary, server) = (self.ordinary.clone(), self.servers[0].clone());
        self.policy(&ordinary);
        let head_end = self.island().head_end.clone();
        change_principal(&server, &head_end, |row| row.client_titles = vec![client_title(), second_title()]).await;
        for number in 1..=METERS {
            assign(&server, &self.island().officer.clone(), meter(number), &head_end).await;
        }
        self.watcher.look(&server, &[]).await;
        self.aged = false;
    }

    /// Something that changes between a request and its repetition.
    async fn disturb(&mut self) {
        let (server, number) = (self.server(), 1 + self.below(METERS));
        let (head_end, officer) = (self.island().head_end.clone(), self.island().officer.clone());
        match self.below(13) {
            // Quota used up or freed; policy changed.
            0 | 1 => {
                let at = usize::try_from(self.below(self.others.len() as u64)).unwrap();
                let other = self.others[at].clone();
                self.policy(&other);
            }
            2 => {
                let ordinary = self.ordinary.clone();
                self.policy(&ordinary);
            }
            3 => {
                let titles = [vec![], vec![second_title()], vec![client_title()], vec![client_title(), second_title()]];
                let at = usize::try_from(self.below(4)).unwrap();
                change_principal(&server, &head_end, |row| row.client_titles.clone_from(&titles[at])).await;
            }
            4 => {
                let to = if self.below(2) == 0 { self.island().other_head_end.clone() } else { head_end };
                assign(&server, &officer, meter(number), &to).await;
            }
            // A newer lease, and one that is superseded.
            5 => drop(self.grant_of(&server, id(), &[number], false).await),
            6 => {
                let outcomes = protect(&server, &head_end, id(), &[plain(number, GET)], true).await;
                let octets = outcomes.map(octets).unwrap_or_default();
                self.watcher.look(&server, &octets).await;
            }
            7 => rotate(&server, meter(number), KeyType::GUEK).await,
            8 | 9 => rotate(&server, meter(number), KeyType::GAK).await,
            10 => drop(
                MeterService::new(server.clone())
                    .retire(&officer, request(), vec![meter(1)], String::new())
                    .await
                    .unwrap(),
            ),
            11 => {
                let purged = self.below(2) == 0;
                kms_base::clock::testing::advance(if purged { QUARTER_MS + 60_000 } else { QUARTER_MS - 60_000 });
                self.aged = true;
            }
            _ => self.restart().await,
        }
        self.watcher.look(&server, &[]).await;
    }

    async fn disturb_some(&mut self) {
        for _ in 0..self.below(4) {
            self.disturb().await;
        }
    }

    fn frame(&mut self) -> PlainFrame {
        // Meter 99 is nobody's; the get is always within the quota.
        let number = [1, 2, 2, 3, 4, 5, 6, 99][usize::try_from(self.below(8)).unwrap()];
        let mut frame = plain(number, if self.below(2) == 0 { GET } else { DISCONNECT });
        match self.below(8) {
            0 => frame.client_title = SystemTitle::parse("4D4D4D0000000009").unwrap(),
            1 => frame.client_title = second_title(),
            2 => frame.protection = Protection::Authenticated,
            3 => frame.content = PlainContent::Challenge(vec![0x11; 16]),
            4 => frame.content = PlainContent::Apdu { apdu: hex::decode(GET).unwrap(), general: true },
            _ => {}
        }
        frame
    }

    async fn frames(&mut self) {
        let frames: Vec<PlainFrame> = (0..1 + self.below(6)).map(|_| self.frame()).collect();
        let (head_end, request, supersede) = (self.island().head_end.clone(), id(), self.below(2) == 0);
        let at = usize::try_from(self.below(self.others.len() as u64 + 2)).unwrap();
        if let Some(policy) = self.others.get(at).cloned() {
            self.policy(&policy);
        }
        let server = self.server();
        let mut first = octets(protect(&server, &head_end, request, &frames, supersede).await.unwrap());
        self.watcher.look(&server, &first).await;
        self.disturb_some().await;
        for server in self.servers.clone() {
            let Ok(outcomes) = protect(&server, &head_end, request, &frames, supersede).await else { continue };
            let again = octets(outcomes);
            let recorded = self.watcher.look(&server, &again).await;
            if !recorded.is_empty() {
                // Nothing was remembered, or it was forgotten: a new answer, which the watcher has
                // seen.
                assert!(first.iter().all(Option::is_none) || self.aged, "a repetition was recorded: {recorded:?}");
                first = again;
                continue;
            }
            for (again, first) in again.iter().zip(&first) {
                assert!(again.is_none() || again == first, "other octets, or some for a frame that was refused");
            }
        }
    }

    async fn grant_of(
        &mut self,
        server: &Arc<IslandContext>,
        request: RequestId,
        meters: &[u64],
        dedicated_key: bool,
    ) -> Result<Granted, ServiceError> {
        let terms = SessionTerms {
            purpose: Purpose::Read,
            setup: None,
            key_types: vec![KeyType::GUEK, KeyType::GAK],
            client_title: Some(client_title()),
            counters: NonZeroU32::new(50).unwrap(),
            dedicated_key,
            lifetime_seconds: 900,
        };
        let targets = GrantTargets::Meters(meters.iter().map(|number| meter(*number)).collect());
        let chunk = GrantChunk { request, index: 0, digest: [2; 32], targets, terms: Arc::new(terms) };
        let head_end = self.island().head_end.clone();
        let answered = GrantService::new(server.clone()).open(&head_end, chunk).await?;
        let mut granted = Granted::new();
        for envelope in answered.envelopes {
            let manifest = Manifest::decode(envelope.manifest).unwrap();
            for mut keys in manifest.meters {
                for key in &mut keys.keys {
                    // Wrapped anew each time; and in doubt or not is how the meter stands now.
                    key.wrapped = bytes::Bytes::new();
                    key.in_doubt = false;
                }
                granted.insert(keys.meter.to_vec(), (manifest.grant_id.to_vec(), manifest.not_after_ms, keys));
            }
        }
        Ok(granted)
    }

    async fn grants(&mut self) {
        let numbers: Vec<u64> = [1, 2, 3, 4, 99].into_iter().filter(|_| self.below(2) == 0).chain([5]).collect();
        let (request, dedicated) = (id(), self.below(4) == 0);
        let server = self.server();
        let mut first = self.grant_of(&server, request, &numbers, dedicated).await.unwrap_or_default();
        self.watcher.look(&server, &[]).await;
        self.disturb_some().await;
        for server in self.servers.clone() {
            let Ok(again) = self.grant_of(&server, request, &numbers, dedicated).await else { continue };
            let recorded = self.watcher.look(&server, &[]).await;
            if !recorded.is_empty() {
                assert!(first.is_empty() || self.aged, "a repetition was recorded: {recorded:?}");
                first = again;
                continue;
            }
            assert!(again.is_empty() || !dedicated, "another dedicated key under the same grant");
            assert!(again.iter().all(|(meter, keys)| first.get(meter) == Some(keys)), "{again:?} for {first:?}");
        }
    }

    fn note(&mut self, steps: &[StepAnswer]) {
        for step in steps {
            if let (Some((id, at)), Ok(NextStep::Send(sending))) = (step.transfer, &step.next) {
                self.watcher.step(id, at, &sending.apdu);
            }
        }
    }

    async fn begin(&mut self, server: &Arc<IslandContext>, request: RequestId, orders: &[Order]) -> Vec<StepAnswer> {
        let head_end = self.island().head_end.clone();
        let steps = TransferService::new(server.clone()).begin(&head_end, request, [3; 32], orders.to_vec()).await;
        let steps = steps.map(|(steps, _)| steps).unwrap_or_default();
        self.note(&steps);
        steps
    }

    async fn report(&mut self, server: &Arc<IslandContext>, report: Report) -> Option<StepAnswer> {
        let head_end = self.island().head_end.clone();
        let mut steps = TransferService::new(server.clone()).proceed(&head_end, vec![report]).await.ok()?.0;
        self.note(&steps);
        Some(steps.remove(0))
    }

    async fn transfers(&mut self) {
        let (mut orders, request) = (Vec::new(), id());
        for number in 0..METERS {
            if self.below(3) == 0 {
                let key_type = [None, Some(KeyType::GUEK), Some(KeyType::GAK)][usize::try_from(self.below(3)).unwrap()];
                orders.push(order(meter(number + 1), key_type));
            }
        }
        if orders.is_empty() {
            return;
        }
        let server = self.server();
        let first = self.begin(&server, request, &orders).await;
        self.watcher.look(&server, &[]).await;
        let mut began: Vec<SystemTitle> =
            first.iter().filter(|step| step.next.is_ok()).map(|step| step.meter).collect();
        if self.below(2) == 0 {
            self.disturb_some().await;
        }
        for server in self.servers.clone() {
            let again = self.begin(&server, request, &orders).await;
            let recorded = self.watcher.look(&server, &[]).await;
            if !recorded.is_empty() {
                assert!(began.is_empty() || self.aged, "a repetition was recorded: {recorded:?}");
                began = again.iter().filter(|step| step.next.is_ok()).map(|step| step.meter).collect();
                continue;
            }
            assert!(
                again.iter().all(|step| step.next.is_err() || began.contains(&step.meter)),
                "a repetition began a transfer"
            );
        }
        // One is led on, each report twice and at two servers.
        let Some(StepAnswer { meter: title, transfer: Some((id, mut at)), next: Ok(NextStep::Send(mut sending)) }) =
            first.into_iter().find(|step| step.next.is_ok())
        else {
            return;
        };
        let number = (0..self.field.meters.len()).find(|number| self.field.title(*number) == title).unwrap();
        let mut connection = Connection::new(self.field.meters[number].clone(), 1);
        for _ in 0..30 {
            if sending.kind == SendingKind::Associate {
                connection = Connection::new(self.field.meters[number].clone(), 1);
            }
            let answer = connection.deliver(&sending.apdu).await.answers.into_iter().next_back();
            let answer = answer.map_or(ReportedAnswer::Nothing, ReportedAnswer::Apdu);
            let report = Report { meter: title, id, step: at, answer };
            let server = self.server();
            let next = self.report(&server, report.clone()).await;
            self.watcher.look(&server, &[]).await;
            let Some(StepAnswer { transfer: Some((_, next)), next: Ok(NextStep::Send(following)), .. }) = next else {
                break;
            };
            if self.below(8) == 0 {
                self.disturb().await;
            }
            let other = self.server();
            self.report(&other, report).await;
            self.begin(&other, request, &orders).await;
            let recorded = self.watcher.look(&other, &[]).await;
            assert!(recorded.is_empty() || self.aged, "a repetition was recorded: {recorded:?}");
            (at, sending) = (next, following);
        }
        // What is left is withdrawn, so that the next round can begin.
        self.mend().await;
        let open: Vec<_> = self.open_transfers().await;
        let head_end = self.island().head_end.clone();
        let service = TransferService::new(server.clone());
        for _ in 0..2 {
            service.withdraw(&head_end, request, open.clone(), "test".to_owned()).await.unwrap();
        }
        self.watcher.look(&server, &[]).await;
    }

    async fn open_transfers(&self) -> Vec<(SystemTitle, TransferId)> {
        let mut open = Vec::new();
        for number in 0..self.field.meters.len() {
            open.extend(self.field.row(number).await.transfer.map(|transfer| (self.field.title(number), transfer.id)));
        }
        open
    }
}

/// What was granted: by meter, the grant, its end, and the keys.
type Granted = BTreeMap<Vec<u8>, (Vec<u8>, i64, v1::MeterKeys)>;

fn order(meter: SystemTitle, key_type: Option<KeyType>) -> Order {
    Order {
        meter,
        setup: None,
        key_type,
        client_title: client_title(),
        form: TransferForm::Frames,
        urgent: false,
        lifetime_seconds: 3_600,
        task: None,
    }
}

async fn with_transport_key(server: &Arc<IslandContext>, caller: &Caller) {
    let public = PrivateKey::generate(&ECDH_P256).unwrap().compute_public_key().unwrap();
    let public_point = public.as_ref().try_into().unwrap();
    change_principal(server, caller, |row| {
        row.transport = Some(TransportCertificate { certificate: vec![1].into(), sha256: [9; 32], public_point })
    })
    .await;
}

const FORBID_FRAMES: &str =
    "forbid (principal, action == Action::\"protectFrame\", resource) when { context.service == \"get\" };";
const FORBID_KEYS: &str = "forbid (principal, action in [Action::\"openSession\", Action::\"transferKey\"], resource);";

type Answer = std::pin::Pin<Box<dyn Future<Output = Result<Vec<u8>, ServiceError>>>>;

/// A call of administration, by its name, with what it is asked on any server under any request.
type Call = (&'static str, Box<dyn Fn(Arc<IslandContext>, Request) -> Answer>);

/// `call!("name", caller, |service: Service, by, request| …)`, where the answer is a message.
macro_rules! call {
    ($name:literal, $service:ident, $by:expr, |$bound:ident, $caller:ident, $request:ident| $asked:expr) => {{
        let by = $by.clone();
        let ask: Box<dyn Fn(Arc<IslandContext>, Request) -> Answer> = Box::new(move |server, $request| {
            let ($bound, $caller) = ($service::new(server), by.clone());
            let asked = $asked;
            Box::pin(async move { Ok(prost::Message::encode_to_vec(&asked.await?)) })
        });
        ($name, ask)
    }};
}

/// Principals are added and disabled: the certificate is the one of the first answer.
async fn principals(island: &TestIsland) -> Vec<Call> {
    let hsm = &island.island.hsm;
    let point = hsm.public_key(CA_KEY).await.unwrap();
    let root = CertificateAuthority::root(island.island.name(), point, Validity::days(IslandContext::now(), 3_000))
        .unwrap()
        .sign(hsm)
        .await
        .unwrap();
    let (authority, officer) = (CertificateAuthority::from_der(&root.der).unwrap(), island.officer.clone());
    let id = PrincipalId::new(island.island.name().clone(), Role::HeadEnd, "new").unwrap();
    let service = move |server: Arc<IslandContext>| Principals::new(server, authority.clone(), 90);
    let certification = certificate::tests::request(&rcgen::KeyPair::generate().unwrap());
    let (added, by, adding) = (id.clone(), officer.clone(), service.clone());
    let add: Box<dyn Fn(Arc<IslandContext>, Request) -> Answer> = Box::new(move |server, request| {
        let new = NewPrincipal {
            request: request.id,
            id: added.clone(),
            certification: Some(certification.clone()),
            person: None,
            // The digest is over what is asked.
            client_titles: if request.digest == [9; 32] { vec![second_title()] } else { Vec::new() },
            shipment_key: None,
        };
        let (service, by) = (adding(server), by.clone());
        Box::pin(async move { Ok(service.add(&by, new).await?.encode_to_vec()) })
    });
    let disable: Box<dyn Fn(Arc<IslandContext>, Request) -> Answer> = Box::new(move |server, request| {
        let (service, by, id, reason) = (service(server), officer.clone(), id.clone(), hex::encode(request.digest));
        Box::pin(async move { Ok(service.disable(&by, request.id, id, reason).await?.encode_to_vec()) })
    });
    vec![("add a principal", add), ("disable a principal", disable)]
}

/// Invitations: the code is not in the answer, so the answer can be given again.
async fn handhelds(island: &TestIsland) -> Vec<Call> {
    let hsm = &island.island.hsm;
    let point = hsm.public_key(CA_KEY).await.unwrap();
    let validity = Validity::days(IslandContext::now(), 3_000);
    let root = CertificateAuthority::root(island.island.name(), point, validity).unwrap().sign(hsm).await.unwrap();
    let authority = CertificateAuthority::from_der(&root.der).unwrap();
    let id = PrincipalId::new(island.island.name().clone(), Role::Handheld, "h-17").unwrap();
    let new = NewInvitation {
        handheld: id.clone(),
        technician: kms_domain::PersonName::parse("Tom Field").unwrap(),
        code_id: kms_domain::CodeId([1; 6]),
        code_sha256: [2; 32],
        lifetime_seconds: None,
        client_titles: vec![second_title()],
    };
    let existing = kms_domain::Principal {
        id: PrincipalId::new(island.island.name().clone(), Role::Handheld, "h-18").unwrap(),
        revision: 1,
        status: kms_domain::PrincipalStatus::Enabled,
        certificates: Vec::new(),
        transport: None,
        client_titles: Vec::new(),
        person: None,
        assurance: None,
        shipment_key: None,
        added: IslandContext::now(),
    };
    put_principal(&island.island, existing.clone()).await;
    let other = NewInvitation { handheld: existing.id, client_titles: Vec::new(), ..new.clone() };
    let service = move |server: Arc<IslandContext>| HandheldService::new(server, &authority);
    let (by, serve) = (island.officer.clone(), service.clone());
    let invite: Box<dyn Fn(Arc<IslandContext>, Request) -> Answer> = Box::new(move |server, request| {
        let (service, by, new) = (serve(server), by.clone(), new.clone());
        Box::pin(async move { Ok(service.invite(&by, request, new).await?.encode_to_vec()) })
    });
    let (by, serve) = (island.officer.clone(), service.clone());
    let hand_over: Box<dyn Fn(Arc<IslandContext>, Request) -> Answer> = Box::new(move |server, request| {
        let (service, by, other) = (serve(server), by.clone(), other.clone());
        Box::pin(async move { Ok(service.hand_over(&by, request, other).await?.encode_to_vec()) })
    });
    let by = island.officer.clone();
    let withdraw: Box<dyn Fn(Arc<IslandContext>, Request) -> Answer> = Box::new(move |server, request| {
        let (service, by, id) = (service(server), by.clone(), id.clone());
        Box::pin(async move { Ok(service.withdraw(&by, request, id, "test".to_owned()).await?.encode_to_vec()) })
    });
    vec![("invite", invite), ("hand over", hand_over), ("withdraw an invitation", withdraw)]
}

fn administration(island: &TestIsland, colleague: &Caller) -> Vec<Call> {
    let head_end = island.head_end.principal.clone();
    let (manufacturer, profile) =
        (FlagId::parse("KAM").unwrap(), DeviceProfileName::parse("two-setups-suite1").unwrap());
    let new =
        move |number| NewMeter { title: meter(number), serial: format!("S{number}"), groups: vec!["north".to_owned()] };
    vec![
        call!("enrol", MeterService, island.officer, |service, by, request| {
            let enrolment = Enrolment {
                manufacturer,
                device_profile: profile.clone(),
                batch: String::new(),
                meters: vec![new(50), new(51), new(52)],
            };
            async move { service.enrol(&by, request, enrolment).await }
        }),
        call!("create group key", OwnerService, island.officer, |service, by, request| async move {
            let key =
                NewOwnerKey { setup: SecuritySetupId::DEFAULT, key_type: "GBEK".to_owned(), held_by_meters: true };
            service.create_group_key(&by, request, "north", key, None).await
        }),
        call!("change members", MeterService, island.officer, |service, by, request| async move {
            service
                .change_members(
                    &by,
                    request,
                    "north",
                    vec![meter(50), meter(99)],
                    Membership::Remove,
                    "sold".to_owned(),
                )
                .await
        }),
        call!("set switch threshold", OwnerService, island.officer, |service, by, request| async move {
            service.set_switch_threshold(&by, request.id, "north", SwitchThreshold::new(80).unwrap()).await
        }),
        call!("assign", MeterService, island.officer, |service, by, request| {
            let assignment = Assignment {
                selection: Selection::Meters(vec![meter(51), meter(99)]),
                head_end: Some(head_end.clone()),
                dry_run: false,
            };
            async move { service.assign(&by, request, assignment).await }
        }),
        call!("adopt", MeterService, island.officer, |service, by, request| async move {
            let floor = |number| CounterFloor {
                meter: meter(number),
                setup: SecuritySetupId::DEFAULT,
                client_title: client_title(),
                floor: 5_000,
                owned_by: None,
            };
            service.adopt(&by, request, vec![floor(2), floor(99)]).await
        }),
        call!("report compromise", MeterService, island.officer, |service, by, request| async move {
            let report = Compromise {
                meter: meter(3),
                setup: None,
                key_type: KeyType::GUEK,
                version: KeyVersionNumber::FIRST,
                known_to: Party::Anyone,
                reason: "test".to_owned(),
            };
            service.report_compromise(&by, request, report).await
        }),
        call!("retire", MeterService, island.officer, |service, by, request| async move {
            service.retire(&by, request, vec![meter(4), meter(99)], "broken".to_owned()).await
        }),
        call!("replace", MeterService, island.officer, |service, by, request| async move {
            service.replace(&by, request, meter(5), meter(6), "broken".to_owned()).await
        }),
        call!("propose a raise", MeterService, island.officer, |service, by, request| async move {
            service.propose_raise(&by, request, raise()).await
        }),
        call!("create work orders", WorkOrderService, island.officer, |service, by, request| async move {
            let orders = [("WO-1", 1), ("WO-2", 99), ("WO-3", 2)]
                .map(|(id, number)| NewWorkOrder { id: WorkOrderId::parse(id).unwrap(), content: work(number) });
            service.create(&by, request, orders.to_vec()).await
        }),
        call!("change a work order", WorkOrderService, island.officer, |service, by, request| async move {
            let change = work_order::WorkOrderChange::Content { revision: 1, content: work(3) };
            service.change(&by, request, WorkOrderId::parse("WO-1").unwrap(), change).await
        }),
        call!("cancel a work order", WorkOrderService, island.officer, |service, by, request| async move {
            let change = work_order::WorkOrderChange::Cancel { reason: "not at home".to_owned() };
            service.change(&by, request, WorkOrderId::parse("WO-1").unwrap(), change).await
        }),
        call!("complete a work order", WorkOrderService, island.officer, |service, by, request| async move {
            let change = work_order::WorkOrderChange::Complete;
            service.change(&by, request, WorkOrderId::parse("WO-3").unwrap(), change).await
        }),
        call!("approve", ProposalService, colleague, |service, by, request| async move {
            let mut proposals = service.list(&by, None, 9).await?;
            let proposal = proposals.remove(0);
            let change =
                ProposalChange::Approve { content_sha256: proposal.content_sha256.as_ref().try_into().unwrap() };
            service.change(&by, request, ProposalId::from_octets(&proposal.proposal_id).unwrap(), change).await
        }),
        call!("carry out", ProposalService, island.officer, |service, by, request| async move {
            let mut proposals = service.list(&by, None, 9).await?;
            service
                .change(
                    &by,
                    request,
                    ProposalId::from_octets(&proposals.remove(0).proposal_id).unwrap(),
                    ProposalChange::Execute,
                )
                .await
        }),
        call!("create a campaign", CampaignService, island.officer, |service, by, request| async move {
            // The preview is of the first answer alone.
            let created = service.create(&by, request, campaign::tests::new(campaign::tests::terms()), true).await;
            created.map(|answer| answer.campaign.unwrap())
        }),
        call!("approve a campaign", CampaignService, colleague, |service, by, request| async move {
            let draft = service.list(&by, None, 9).await?.remove(0);
            service.change(&by, request, campaign::tests::id(&draft), campaign::tests::approval(&draft)).await
        }),
        call!("abort a campaign", CampaignService, island.officer, |service, by, request| async move {
            let draft = service.list(&by, None, 9).await?.remove(0);
            service
                .change(
                    &by,
                    request,
                    campaign::tests::id(&draft),
                    campaign::CampaignChange::Abort { reason: "test".to_owned() },
                )
                .await
        }),
    ]
}

/// Work at a meter, in a week around now.
fn work(number: u64) -> WorkOrderContent {
    let day = kms_domain::UnixMillis(IslandContext::now().0 / 86_400_000 * 86_400_000);
    let (technician, tasks) = (PersonName::parse("Ida Berg").unwrap(), [WorkOrderTask::Read].into_iter().collect());
    let (time, place) = ((day, day.after(7 * 86_400_000)), Place::parse("Harbour Street 7").unwrap());
    WorkOrderContent::new(technician, vec![meter(number)], tasks, time, place).unwrap()
}

fn raise() -> CounterRaise {
    CounterRaise {
        meter: meter(2),
        setup: None,
        key_type: KeyType::GUEK,
        version: None,
        client_title: client_title(),
        to: 1_000_000,
        reason: "read at the meter".to_owned(),
        quorum: Quorum::ONE,
    }
}

island_tests! {
    /// A1: [disconnect over quota, get] twice.
    async fn i4_a_frame_that_was_refused_takes_no_counter_in_a_repetition(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        let (server, other) = (island.island.clone(), island.another_server().await);
        let (one, none) = (policies(1, ""), policies(200, ""));
        server.policy.store(one);
        assert!(octets(protect(&server, &island.head_end, id(), &[plain(1, DISCONNECT)], false).await.unwrap())[0].is_some());
        let (request, frames) = (id(), [plain(1, DISCONNECT), plain(1, GET)]);
        let first = octets(protect(&server, &island.head_end, request, &frames, false).await.unwrap());
        assert!(first[0].is_none() && first[1].is_some());
        let restarted = Arc::new(island.restarted().await);
        for server in [&server, &other, &restarted] {
            // Whether the quota is used up or free makes no difference.
            server.policy.store(none.clone());
            let again = protect(server, &island.head_end, request, &frames, false).await.unwrap();
            assert!(aborted(again[0].octets.as_ref().unwrap_err()).contains("refused when the request was answered first"));
            assert_eq!(octets(again), first);
        }
        // Two frames to one meter, of which the second was refused.
        let (request, frames) = (id(), [plain(1, GET), PlainFrame { client_title: second_title(), ..plain(1, DISCONNECT) }, plain(1, DISCONNECT)]);
        let first = octets(protect(&server, &island.head_end, request, &frames, false).await.unwrap());
        assert_eq!(first.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false, true]);
        change_principal(&server, &island.head_end, |row| row.client_titles.push(second_title())).await;
        assert_eq!(octets(protect(&server, &island.head_end, request, &frames, false).await.unwrap()), first);
    }

    /// A2: a new GAK, or a new GUEK, between.
    async fn i4_a_frame_is_not_repeated_under_other_keys(island) {
        island.deliver(&sample("generic-suite0", 3)).await;
        let server = island.island.clone();
        for (number, key_type) in [(1, KeyType::GAK), (2, KeyType::GUEK)] {
            let (request, frames) = (id(), [plain(number, GET), plain(3, GET)]);
            let first = octets(protect(&server, &island.head_end, request, &frames, false).await.unwrap());
            assert_eq!(octets(protect(&server, &island.head_end, request, &frames, false).await.unwrap()), first);
            rotate(&server, meter(number), key_type).await;
            let again = protect(&server, &island.head_end, request, &frames, false).await.unwrap();
            assert!(aborted(again[0].octets.as_ref().unwrap_err()).contains("the key was rotated"), "{key_type}");
            assert!(again[1].octets.as_ref().ok() == first[1].as_ref());
        }
        // Another suite.
        let (request, frames) = (id(), [plain(3, GET)]);
        protect(&server, &island.head_end, request, &frames, false).await.unwrap();
        let act = server.committer.act_in_test(kms_ledger::Actor::server(kms_ledger::ServerAct::TEST), Reads { meters: vec![meter(3)], ..Reads::default() }, |view| {
            let mut row = (*view.meter(meter(3))?.unwrap()).clone();
            row.suite = kms_domain::SecuritySuite::Suite1;
            view.append(Event::MetersChanged(MetersChanged { change: "test".to_owned(), ..MetersChanged::default() }));
            view.put_meter(row, false)
        });
        act.await.unwrap();
        let again = protect(&server, &island.head_end, request, &frames, false).await.unwrap();
        assert!(aborted(again[0].octets.as_ref().unwrap_err()).contains("the meter has changed"));
    }

    async fn a_request_of_which_all_was_refused_is_decided_anew(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        let server = island.island.clone();
        let (request, frames) = (id(), [plain(1, DISCONNECT), plain(99, GET)]);
        server.policy.store(policies(1, FORBID_FRAMES));
        protect(&server, &island.head_end, id(), &[plain(1, DISCONNECT)], false).await.unwrap();
        let first = octets(protect(&server, &island.head_end, request, &frames, false).await.unwrap());
        assert_eq!(first, [None, None]);
        server.policy.store(policies(200, ""));
        let now = octets(protect(&server, &island.head_end, request, &frames, false).await.unwrap());
        assert!(now[0].is_some() && now[1].is_none());
        assert_eq!(octets(protect(&server, &island.head_end, request, &frames, false).await.unwrap()), now, "and from then on it is remembered");
    }

    async fn i5_an_answer_that_is_put_back_is_as_old_as_it_was(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        let (server, caller, frames) = (island.island.clone(), island.head_end.clone(), [plain(1, GET)]);
        let key = |request| RequestKey { principal: caller.principal.clone(), request, chunk: 0 };
        let again = async |request| protect(&server, &caller, request, &frames, false).await.map(octets);

        // Within its time it is what it was.
        let request = id();
        let first = again(request).await.unwrap();
        let row = stored(&server, key(request)).await.unwrap();
        purge(&server).await;
        put_back(&server, &key(request), row.clone()).await;
        assert_eq!(again(request).await.unwrap(), first);
        // Its time is sealed: a longer one is a forgery, and reported.
        purge(&server).await;
        put_back(&server, &key(request), RequestRow { expires: row.expires.after(QUARTER_MS), ..row.clone() }).await;
        assert!(matches!(again(request).await, Err(ServiceError::PermissionDenied { .. })));
        // One of a version that did not seal it is known, and not repeated.
        let outcome = row.outcome[16..].to_vec();
        let seal = server.committer.seal_key().seal_untimed_request(&caller.principal, request, 0, &row.digest, &outcome);
        purge(&server).await;
        put_back(&server, &key(request), RequestRow { outcome: [seal.to_vec(), outcome.clone()].concat(), ..row.clone() }).await;
        assert!(aborted(&again(request).await.unwrap_err()).contains("too long ago"));
        // After its time. The server removes such rows every second, so that one may be gone before
        // it is asked for: then it is asked for again.
        let mut refused = false;
        for _ in 0..100 {
            let (request, expires) = (id(), IslandContext::now().after(-1));
            let seal = server.committer.seal_key().seal_request(&caller.principal, request, 0, &row.digest, expires, &outcome);
            put_back(&server, &key(request), RequestRow { outcome: [seal.to_vec(), outcome.clone()].concat(), expires, ..row.clone() }).await;
            match again(request).await {
                Err(error) => refused = aborted(&error).contains("too long ago"),
                Ok(octets) => assert_ne!(octets, first, "I4"),
            }
            if refused {
                break;
            }
        }
        assert!(refused);
    }

    async fn what_an_earlier_version_recorded_is_not_repeated(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        let (server, caller, request) = (island.island.clone(), island.head_end.clone(), id());
        let asking = Asking::new(&caller, request, [1; 32], Window::Keys);
        let act = server.committer.act_in_test(kms_ledger::Actor::caller(&caller, Some(request), "protectFrame"), Reads::default(), move |view| {
            let frame = v1::ProtectedFrame { meter: u64::from_be_bytes(meter(1).octets()), invocation_counter: 7, key_version: 1, ..v1::ProtectedFrame::default() };
            view.append(Event::FramesProtected(v1::FramesProtected { purpose: Purpose::Control.to_proto().into(), frames: vec![frame] }));
            view.answered(&asking);
            Ok(())
        });
        act.await.unwrap();
        assert!(aborted(&protect(&server, &caller, request, &[plain(1, GET)], false).await.unwrap_err()).contains("upgraded"));
    }

    /// Keys of a group: the same version and lease again, or a refusal.
    async fn a_groups_keys_are_repeated_or_refused(island) {
        let server = island.island.clone();
        with_transport_key(&server, &island.head_end).await;
        let mut calls = administration(&island, &island.colleague().await).into_iter();
        for (name, ask) in calls.by_ref().take(2) {
            ask(server.clone(), request()).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        let permit = "permit (principal, action == Action::\"openGroupSession\", resource == MeterGroup::\"1\");";
        server.policy.store(policies(200, permit));
        let terms = SessionTerms {
            purpose: Purpose::Configure,
            setup: None,
            key_types: vec![KeyType::GBEK],
            client_title: Some(client_title()),
            counters: NonZeroU32::new(100).unwrap(),
            dedicated_key: false,
            lifetime_seconds: 900,
        };
        let terms = Arc::new(terms);
        let open = async |request| {
            let targets = GrantTargets::Group { name: "north".to_owned(), version: None };
            let chunk = GrantChunk { request, index: 0, digest: [4; 32], targets, terms: terms.clone() };
            let granted = GrantService::new(server.clone()).open(&island.head_end, chunk).await?;
            let mut keys = Manifest::decode(granted.envelopes[0].manifest.clone()).unwrap().groups.remove(0);
            keys.keys.iter_mut().for_each(|key| key.wrapped = bytes::Bytes::new());
            Ok::<_, ServiceError>((granted.leaf, keys))
        };
        let request = id();
        let first = open(request).await.unwrap();
        assert_eq!(open(request).await.unwrap(), first);
        open(id()).await.unwrap();
        assert!(aborted(&open(request).await.unwrap_err()).contains("newer lease"));
        server.policy.store(policies(200, ""));
        assert!(matches!(open(request).await, Err(ServiceError::PermissionDenied { .. })));
    }

    async fn a_dedicated_key_is_not_made_twice(island) {
        let field = Field::of(island, &sample("generic-suite0", 2)).await;
        with_transport_key(&field.island.island, &field.island.head_end).await;
        let mut world = World::of(field, 1).await;
        let (server, request) = (world.servers[0].clone(), id());
        assert_eq!(world.grant_of(&server, request, &[1], true).await.unwrap().len(), 1);
        assert!(aborted(&world.grant_of(&server, request, &[1], true).await.unwrap_err()).contains("dedicated key"));
    }

    /// I4: the device profile of one server names another key id than when the step was sent.
    async fn i4_a_step_is_made_again_only_of_what_it_was_made_of(island) {
        let field = Field::of(island, &sample("generic-suite0", 2)).await;
        let (server, head_end) = (field.island.island.clone(), field.island.head_end.clone());
        let service = TransferService::new(server.clone());
        let request = id();
        let begin = async || service.begin(&head_end, request, [3; 32], vec![order(meter(1), Some(KeyType::GUEK))]).await.unwrap().0.remove(0);
        let sent = |step: StepAnswer| match step.next {
            Ok(NextStep::Send(sending)) => Ok(sending.apdu),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error),
        };
        let first = sent(begin().await).unwrap();
        assert_eq!(sent(begin().await).unwrap(), first);
        for pinned in [Some([7; 16]), None] {
            let act = server.committer.act_in_test(kms_ledger::Actor::server(kms_ledger::ServerAct::TEST), Reads { meters: vec![meter(1)], ..Reads::default() }, move |view| {
                let mut row = (*view.meter(meter(1))?.unwrap()).clone();
                row.transfer.as_mut().unwrap().pinned = pinned;
                view.append(Event::MetersChanged(MetersChanged { change: "test".to_owned(), ..MetersChanged::default() }));
                view.put_meter(row, false)
            });
            act.await.unwrap();
            assert!(aborted(&sent(begin().await).unwrap_err()).contains("device profile"));
        }
        // The way out: the next step has counters of its own.
        let transfer = field.row(0).await.transfer.unwrap();
        let report = Report { meter: meter(1), id: transfer.id, step: transfer.step, answer: ReportedAnswer::Nothing };
        let (mut steps, _) = service.proceed(&head_end, vec![report]).await.unwrap();
        let outcome = steps.remove(0).next;
        assert!(matches!(outcome, Ok(NextStep::Send(_) | NextStep::End { outcome: Outcome::InDoubt, .. })), "{outcome:?}");
    }

    async fn administration_is_repeated_with_the_same_answer_or_refused(island) {
        island.deliver(&sample("generic-suite0", METERS)).await;
        let colleague = island.colleague().await;
        let servers = [island.island.clone(), island.another_server().await, Arc::new(island.restarted().await)];
        let (ordinary, forbidden) = (policies(200, ""), policies(200, "forbid (principal, action, resource);"));
        let mut watcher = Watcher::default();
        let calls = administration(&island, &colleague).into_iter();
        for (name, ask) in calls.chain(principals(&island).await).chain(handhelds(&island).await) {
            let request = request();
            let first = ask(servers[0].clone(), request).await.unwrap_or_else(|error| panic!("{name}: {error}"));
            watcher.records(&servers[0]).await;
            for server in &servers {
                assert_eq!(ask(server.clone(), request).await.as_ref(), Ok(&first), "{name}");
                // I8: whoever has lost the right is told nothing.
                server.policy.store(forbidden.clone());
                let refused = ask(server.clone(), request).await.unwrap_err();
                assert_eq!(refused.code(), PERMISSION_DENIED, "{name}: {refused}");
                server.policy.store(ordinary.clone());
                if name != "set switch threshold" {
                    let another = ask(server.clone(), Request { digest: [9; 32], ..request }).await.unwrap_err();
                    assert!(matches!(another, ServiceError::InvalidArgument { .. }), "{name}: {another}");
                }
            }
            assert!(watcher.records(&servers[0]).await.is_empty(), "{name}: a repetition did something");
        }
    }

    async fn a_replay_gives_the_same_octets_or_a_refusal(island) {
        let seed = std::env::var("KMS_TEST_SEED").map_or_else(|_| u64::from_be_bytes(id().octets()[8..].try_into().unwrap()), |seed| seed.parse().unwrap());
        println!("KMS_TEST_SEED={seed}");
        let field = Field::of(island, &sample("generic-suite0", METERS)).await;
        with_transport_key(&field.island.island, &field.island.head_end).await;
        let mut world = World::of(field, seed).await;
        let rounds = std::env::var("KMS_TEST_ROUNDS").map_or(60, |rounds| rounds.parse().unwrap());
        for _ in 0..rounds {
            world.mend().await;
            match world.below(4) {
                0 | 1 => world.frames().await,
                2 => world.grants().await,
                _ => world.transfers().await,
            }
        }
        let watcher = &world.watcher;
        println!("{} counters, {} leases, {} steps", watcher.contents.len(), watcher.leases.len(), watcher.steps.len());
    }
}

impl World {
    async fn of(field: Field, seed: u64) -> Self {
        let servers = vec![
            field.island.island.clone(),
            field.island.another_server().await,
            Arc::new(field.island.restarted().await),
        ];
        let others = vec![policies(1, ""), policies(3, ""), policies(200, FORBID_FRAMES), policies(200, FORBID_KEYS)];
        let mut world = Self {
            field,
            servers,
            ordinary: policies(200, ""),
            others,
            seed,
            watcher: Watcher::default(),
            aged: false,
        };
        world.watcher.records(&world.servers[0]).await;
        world
    }
}

const PERMISSION_DENIED: i32 = 7;
