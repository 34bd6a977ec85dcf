//! Campaigns over 200 meters that two officers lead and a head-end without keys executes, over a
//! network and with meters that do everything which real ones were seen to do, while servers are
//! killed at random points.
#![expect(clippy::indexing_slicing, reason = "tests")]

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use kms_client::{
    Connection, KeyType, MeterLine, MeterNetwork, MeterRequest, Relay, RelayEnd, RelaySettings, RetryPolicy, Session,
    SystemTitle, new_request_id,
    proto::{
        BeginTransfersRequest, Campaign, MeterAcceptance, ReportAcceptanceRequest, ReportCampaignRequest, SessionTerms,
        ShowCampaignRequest, Task, TransferForm, TransferOrder, WhoAmIRequest, transfer_step::Next,
    },
};
use kms_store::DatabaseLocation;
use kms_tests::{
    CLIENT_TITLE, DevServer, SecondServer, TestModule, meter_configs, policies_with, put_on_line, read_energy, terms,
    uuid,
};
use meter_sim::{
    Connection as MeterConnection, KeyId, Meter, MeterConfig, Obis,
    axdr::Data,
    behaviour::{Behaviour, CounterOnNewKey, Fault, GmacCounter, HexBytes, ScriptedFault, Trigger},
    config::CounterScope,
    nonces::RepeatedNonce,
    security::unwrap_key,
};
use serde_json::Value;
use tokio::sync::{Mutex as AsyncMutex, watch};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn campaigns_over_a_bad_network_and_killed_servers_lose_no_meter() {
    let seed = std::env::var("KMS_TEST_SEED").map_or_else(
        |_| u64::from_be_bytes(new_request_id().octets()[8..].try_into().unwrap()),
        |seed| seed.parse().unwrap(),
    );
    println!("KMS_TEST_SEED={seed}");
    let began = Instant::now();
    let mut random = Random(seed);
    let scale = Scale::of_environment();
    let island = Island::start(scale, &mut random).await;
    println!(
        "{:>5.1} s: {} meters, {} servers",
        began.elapsed().as_secs_f64(),
        island.fleet.meters.len(),
        island.servers.lock().await.len()
    );
    let killer = island.killer(Random(seed ^ 0x6B69_6C6C));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let relay = island.relay().await;
    let (network, ends) = (Arc::clone(&island.fleet), Arc::clone(&island.ends));
    let working = tokio::spawn(async move {
        let stop = async { drop(stopped.await) };
        relay.work(network, stop, |task, end| ends.lock().unwrap().note(task, end)).await.unwrap();
    });

    // Keys of our own for those that the vendor knows: KEK and GUEK together, GAK, GBEK. Then half
    // of the meters get a new GUEK, and the others a new GAK.
    let all: Vec<SystemTitle> = island.fleet.meters.keys().copied().collect();
    let (one_half, other_half) = all.split_at(all.len() / 2);
    let take_over =
        ["take over", "--take-over", "--imported", "--manufacturer", "KAM", "--canary", "10", "--wave", "100%"];
    island.lead(&[&take_over]).await;
    println!("{:>5.1} s: taken over, {} kills", began.elapsed().as_secs_f64(), island.kills());
    let (one_file, other_file) = (island.meters_file("one", one_half), island.meters_file("other", other_half));
    let guek = ["new GUEK", "--rotate", "GUEK", "--meters-file", &one_file, "--canary", "5", "--wave", "100%"];
    let gak = ["new GAK", "--rotate", "GAK", "--meters-file", &other_file, "--canary", "0", "--wave", "50"];
    island.lead(&[&guek, &gak]).await;
    println!("{:>5.1} s: rotated, {} kills", began.elapsed().as_secs_f64(), island.kills());
    while island.kills() < scale.kills {
        island.lead(&[&["once more", "--rotate", "GUEK", "--whole-island", "--canary", "0", "--wave", "100%"]]).await;
    }
    killer.abort();
    let _ = killer.await;
    println!(
        "{:>5.1} s: {} kills, {} exchanges with meters",
        began.elapsed().as_secs_f64(),
        island.kills(),
        *island.fleet.exchanges.borrow()
    );

    // What officers do: look which keys the meters hold, and replace those that are in doubt, not
    // the active ones or still the vendor's, until nothing is left.
    let mut faults_are_over = false;
    for round in 1.. {
        assert!(
            round <= 8,
            "meters are still in doubt, hold an earlier key or the vendor's: {:?}",
            island.ends.lock().unwrap()
        );
        {
            let mut ends = island.ends.lock().unwrap();
            ends.earlier_held.clear();
            ends.probed.clear();
        }
        let mut left =
            island.lead(&[&["which keys", "--probe", "--whole-island", "--canary", "0", "--wave", "100%"]]).await;
        let mut behind = std::mem::take(&mut island.ends.lock().unwrap().earlier_held);
        island.not_accepted(&mut behind).await;
        for key_type in ["KEK", "GUEK", "GAK"] {
            let Some(meters) = behind.get(key_type) else { continue };
            let file = island.meters_file(&format!("{key_type}-{round}"), &meters.iter().copied().collect::<Vec<_>>());
            left += island
                .lead(&[&["mend", "--rotate", key_type, "--meters-file", &file, "--canary", "0", "--wave", "100%"]])
                .await;
        }
        let counts: Vec<_> = behind.iter().map(|(key_type, meters)| (key_type, meters.len())).collect();
        println!(
            "{:>5.1} s: round {round}: replaced {counts:?}; {left} tasks failed or are in doubt",
            began.elapsed().as_secs_f64()
        );
        // An end whose answer was lost has told nobody what the meter holds: that meter is looked
        // at again.
        let unseen = island.fleet.meters.len() - island.ends.lock().unwrap().probed.len();
        if left == 0 && behind.is_empty() && unseen == 0 {
            // No exchange shows a GBEK, so those whose answer was lost are brought again: else too
            // few would be left to compare.
            let accepted = island.accepted_gbeks().await;
            if accepted.len() <= island.fleet.meters.len() / 2 {
                let lost = island.fleet.meters.keys().filter(|meter| !accepted.contains_key(meter));
                let file = island.meters_file(&format!("GBEK-{round}"), &lost.copied().collect::<Vec<_>>());
                let mend = ["mend", "--rotate", "GBEK", "--meters-file", &file, "--canary", "0", "--wave", "100%"];
                island.lead(&[&mend]).await;
                continue;
            }
            if faults_are_over {
                break;
            }
            // A meter whose power failed after its last answer has gone back to an earlier key
            // since: it is looked at once more.
            island.fleet.meters.values().for_each(Meter::clear_faults);
            faults_are_over = true;
        }
    }
    drop(stop);
    working.await.unwrap();
    island.compare().await;
    island.compare_gbeks().await;
    island.compare_keks().await;
    assert!(island.kills() >= scale.kills, "{} kills", island.kills());
    let meters: Vec<Meter> = island.fleet.meters.values().cloned().collect();
    assert_eq!(RepeatedNonce::find(&meters), [], "I4");
    println!("{:>5.1} s: every meter holds the keys that the server grants, and talks", began.elapsed().as_secs_f64());
}

/// An island with its servers, its meters, and what happens to them.
struct Island {
    server: DevServer,
    /// One with SQLite, two with PostgreSQL. Locked while one is killed and started again, and
    /// while an officer works.
    servers: Arc<AsyncMutex<Vec<SecondServer>>>,
    head_end: Vec<Connection>,
    officer: Vec<Connection>,
    fleet: Arc<Fleet>,
    kills: Arc<AtomicU32>,
    ends: Arc<Mutex<Ends>>,
    /// The campaigns so far.
    led: Mutex<Vec<String>>,
}

impl Island {
    async fn start(scale: Scale, random: &mut Random) -> Self {
        let mut server = DevServer::start_sized(
            TestModule::of_environment(),
            kms_store_testing::TestDatabase::of_environment(),
            scale.own_keys,
        );
        // It has done its part: from here on servers keep their addresses.
        server.kill();
        let names: &[&str] =
            if matches!(server.database(), DatabaseLocation::Sqlite(_)) { &["north"] } else { &["north", "south"] };
        let mut servers = Vec::new();
        // The shipped policies grant a GBEK to nobody (I8).
        let policies = policies_with(server.state(), PERMIT_GBEK);
        for name in names {
            servers.push(server.second(name, |text| format!("{text}\n[policies]\ndirectory = \"{policies}\"\n")).await);
        }
        let shipment = server.state().join("equal.jsonl").display().to_string();
        let vendor_key = server.state().join("vendor/signing.key").display().to_string();
        let (devices, first) = (scale.equal_keys.to_string(), (scale.own_keys + 1).to_string());
        let sample = [
            "shipment",
            "make-sample",
            "--devices",
            &devices,
            "--first",
            &first,
            "--equal-keys",
            "2",
            "--vendor-key",
            &vendor_key,
            "--out",
            &shipment,
        ];
        servers[0].kms("officer-1", &sample);
        let assign =
            ["--manufacturer", "urn:meterkms:dev:manufacturer:kam", "--head-end", "urn:meterkms:dev:head-end:head-end"];
        // All is imported, and equal keys are reported.
        servers[0].kms_ends("officer-1", &[&["shipment", "import", &shipment], &assign[..]].concat(), 5);
        let own = meter_configs(&server.state().join("vendor/devices.jsonl"));
        let equal = meter_configs(&server.state().join("equal.jsonl.devices.jsonl"));
        let fleet = Arc::new(Fleet::new(own.into_iter().chain(equal), random));
        let (mut head_end, mut officer) = (Vec::new(), Vec::new());
        for server in &servers {
            head_end.push(server.connect("head-end").await);
            officer.push(server.connect("officer-1").await);
        }
        Self {
            server,
            servers: Arc::new(AsyncMutex::new(servers)),
            head_end,
            officer,
            fleet,
            kills: Arc::default(),
            ends: Arc::default(),
            led: Mutex::default(),
        }
    }

    async fn relay(&self) -> Relay {
        let settings = RelaySettings {
            concurrency: 48,
            lease_seconds: 4,
            idle: Duration::from_millis(100),
            call_timeout: Duration::from_secs(10),
            retry: RetryPolicy {
                attempts: 400,
                first_delay: Duration::from_millis(20),
                longest_delay: Duration::from_secs(1),
            },
        };
        let title = SystemTitle::parse(CLIENT_TITLE).unwrap();
        Relay::new(self.head_end[0].clone(), self.head_end[1..].iter().cloned(), title, settings)
    }

    /// Kills a server after every few exchanges with meters, a moment later, and starts it again at
    /// once.
    fn killer(&self, mut random: Random) -> tokio::task::JoinHandle<()> {
        let (servers, kills, mut exchanges) =
            (Arc::clone(&self.servers), Arc::clone(&self.kills), self.fleet.exchanges.subscribe());
        let officers = self.officer.clone();
        tokio::spawn(async move {
            loop {
                let next = *exchanges.borrow_and_update() + 1 + random.below(KILL_EVERY);
                exchanges.wait_for(|count| *count >= next).await.unwrap();
                tokio::time::sleep(Duration::from_millis(random.below(20))).await;
                let mut servers = servers.lock().await;
                let at = usize::try_from(random.below(servers.len() as u64)).unwrap();
                // SoftHSM2 writes the token's file in place at each login, and has lost the token
                // when it is killed meanwhile. hsm-sim has not.
                while TestModule::of_environment() == TestModule::SoftHsm2 && !is_open(&officers[at]).await {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                tokio::task::block_in_place(|| servers[at].restart());
                kills.fetch_add(1, Ordering::Relaxed);
            }
        })
    }

    fn kills(&self) -> u32 {
        self.kills.load(Ordering::Relaxed)
    }

    /// Campaigns from draft to end: made by one officer, approved by another, watched. How many
    /// tasks ended in failure or doubt.
    async fn lead(&self, campaigns: &[&[&str]]) -> u64 {
        let mut ids = Vec::new();
        for arguments in campaigns {
            let servers = self.servers.lock().await;
            // An officer's command is repeated by an officer: here a server that was just started
            // opens its island first.
            self.answering().await;
            let terms = [
                "--success-threshold",
                "1",
                "--failure-limit",
                "1000",
                "--attempts",
                "3",
                "--back-off",
                "1",
                "--commit",
                "--output",
                "json",
            ];
            let server = &servers[0];
            let made: Value = serde_json::from_str(
                &server.kms("officer-1", &[&["campaign", "create"], *arguments, &terms[..]].concat()),
            )
            .unwrap();
            let id = made["campaign"]["campaign_id"].as_str().unwrap();
            server.kms(
                "officer-2",
                &[
                    "campaign",
                    "approve",
                    &uuid(id),
                    "--content",
                    made["campaign"]["content_sha256"].as_str().unwrap(),
                    "--yes",
                ],
            );
            server.kms("officer-1", &["campaign", "start", &uuid(id), "--yes"]);
            self.led.lock().unwrap().push(id.to_owned());
            ids.push(id.to_owned());
        }
        let mut unfinished = 0;
        for id in ids {
            let mut ended = self.ended(&id).await;
            if ended.state == "paused" {
                // Of a few meters all can fail: it pauses by itself then, and an officer who has
                // looked at the reasons lets it go on.
                let servers = self.servers.lock().await;
                self.answering().await;
                servers[0].kms(
                    "officer-1",
                    &["campaign", "resume", &uuid(&id), "--reason", "the meters are probed next", "--yes"],
                );
                drop(servers);
                ended = self.ended(&id).await;
            }
            assert_eq!(ended.state, "finished", "{}: {}", uuid(&id), ended.reason);
            let servers = self.servers.lock().await;
            self.answering().await;
            let report: Value = serde_json::from_str(
                &servers[0].kms("auditor", &["campaign", "report", &uuid(&id), "--output", "json"]),
            )
            .unwrap();
            let waves = report["progress"]["waves"].as_array().unwrap();
            let count = |name: &str| waves.iter().map(|wave| wave[name].as_u64().unwrap()).sum::<u64>();
            assert_eq!(
                count("succeeded") + count("failed") + count("in_doubt") + count("skipped"),
                count("planned"),
                "{report:#}"
            );
            unfinished += count("failed") + count("in_doubt");
        }
        unfinished
    }

    /// Waits until a campaign has ended, whichever server tells.
    async fn ended(&self, id: &str) -> Campaign {
        let request = ShowCampaignRequest { campaign_id: hex::decode(id).unwrap().into() };
        let began = Instant::now();
        loop {
            for connection in &self.officer {
                match connection.campaigns().show_campaign(request.clone()).await.map(tonic::Response::into_inner) {
                    Ok(campaign) if matches!(campaign.state.as_str(), "finished" | "paused" | "aborted") => {
                        return campaign;
                    }
                    _ => {}
                }
            }
            if began.elapsed() > CAMPAIGN_WITHIN {
                self.answering().await;
                let request =
                    ReportCampaignRequest { campaign_id: request.campaign_id, ..ReportCampaignRequest::default() };
                let report = self.officer[0].campaigns().report_campaign(request).await.unwrap().into_inner();
                let waves = report.progress.unwrap().waves;
                panic!(
                    "campaign {} does not end, {} kills: {waves:#?} {:#?} {:#?}",
                    uuid(id),
                    self.kills(),
                    report.tasks,
                    self.ends.lock().unwrap()
                );
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits until every server has opened its island.
    async fn answering(&self) {
        let began = Instant::now();
        for connection in &self.officer {
            while !is_open(connection).await {
                assert!(began.elapsed() < CAMPAIGN_WITHIN, "a server does not open its island");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    fn meters_file(&self, name: &str, meters: &[SystemTitle]) -> String {
        let path = self.server.state().join(format!("{name}.txt"));
        let lines: String = meters.iter().map(|meter| format!("{meter}\n")).collect();
        std::fs::write(&path, lines).unwrap();
        path.display().to_string()
    }

    /// How the keys of the first campaign's meters stand: its acceptance report.
    async fn acceptance(&self) -> Vec<MeterAcceptance> {
        self.answering().await;
        let campaign = hex::decode(&self.led.lock().unwrap()[0]).unwrap();
        let request = ReportAcceptanceRequest {
            campaign_id: campaign.into(),
            page_size: 1_000,
            ..ReportAcceptanceRequest::default()
        };
        let meters = self.officer[0].campaigns().report_acceptance(request).await.unwrap().into_inner().meters;
        assert_eq!(meters.len(), self.fleet.meters.len());
        assert!(meters.iter().all(|meter| meter.problem.is_empty()), "{meters:?}");
        meters
    }

    /// Adds the meters of the first campaign of which a KEK, GUEK or GAK is in doubt or not
    /// replaced, as its acceptance report has it.
    async fn not_accepted(&self, behind: &mut BTreeMap<String, BTreeSet<SystemTitle>>) {
        for meter in self.acceptance().await {
            for key in meter.keys.iter().filter(|key| ["KEK", "GUEK", "GAK"].contains(&key.key_type.as_str())) {
                match (key.verdict.as_str(), key.remedy.as_str()) {
                    // It came under the vendor's KEK, and in suite 0 only somebody at the meter can
                    // heal that.
                    ("not-healed", "local-visit") => assert_eq!(key.known_to.len(), 1),
                    ("not-replaced" | "in-doubt", "rotation" | "probe") => {
                        behind
                            .entry(key.key_type.clone())
                            .or_default()
                            .insert(SystemTitle::from_octets(&meter.meter).unwrap());
                    }
                    other => panic!("{other:?}: the vendor could open everything that came under its KEK"),
                }
            }
        }
    }

    /// The server has the KEK that is in each meter's memory: what the HSM wraps for a meter opens
    /// under that. RFC 3394 proves it by its integrity check.
    async fn compare_keks(&self) {
        let titles: Vec<SystemTitle> = self.fleet.meters.keys().copied().collect();
        let order = |title: &SystemTitle| TransferOrder {
            meter: title.octets().to_vec().into(),
            key_type: "GUEK".to_owned(),
            client_title: hex::decode(CLIENT_TITLE).unwrap().into(),
            form: TransferForm::WrappedKey.into(),
            ..TransferOrder::default()
        };
        let request = BeginTransfersRequest {
            request_id: new_request_id().octets().to_vec().into(),
            orders: titles.iter().map(order).collect(),
        };
        let steps = self.head_end[0].transfers().begin_transfers(request).await.unwrap().into_inner().steps;
        assert_eq!(steps.len(), titles.len());
        for (title, step) in titles.iter().zip(steps) {
            let Some(Next::Send(send)) = step.next else { panic!("{title}: {:?}", step.next) };
            let memory = self.fleet.meters[title].keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
            unwrap_key(&memory.kek, &send.wrapped_key).unwrap_or_else(|error| panic!("KEK of {title}: {error}"));
        }
    }

    /// The meters that have accepted their GBEK, as the record has it, with its version. A meter
    /// that says that it took one, and did not, is left out.
    async fn accepted_gbeks(&self) -> BTreeMap<SystemTitle, u32> {
        let mut accepted = BTreeMap::new();
        for meter in self.acceptance().await {
            let title = SystemTitle::from_octets(&meter.meter).unwrap();
            let gbek = meter.keys.iter().find(|key| key.key_type == "GBEK").unwrap();
            let is_accepted = gbek.verdict != "in-doubt" && matches!(gbek.evidence.as_str(), "acknowledged" | "proven");
            if is_accepted && !self.fleet.liars.contains(&title) {
                accepted.insert(title, gbek.version);
            }
        }
        accepted
    }

    /// Where the record says that a meter has accepted its GBEK, the one that the server grants is
    /// that in the meter's memory, octet by octet.
    async fn compare_gbeks(&self) {
        let accepted = self.accepted_gbeks().await;
        assert!(
            accepted.len() > self.fleet.meters.len() / 2,
            "only {} meters have accepted their GBEK",
            accepted.len()
        );
        let (profile, options) = (self.server.profile("head-end"), TestModule::of_environment().open_options());
        let (key, titles) = (profile.transport_key().unwrap(), accepted.keys().copied().collect::<Vec<_>>());
        // Without counters: nothing is sent under it.
        let terms = SessionTerms { key_types: vec!["GBEK".to_owned()], client_title: Default::default(), ..terms(0) };
        let mut batch = self.head_end[0].open_sessions(&key, new_request_id(), &titles, terms, &options);
        let mut compared = 0;
        while let Some(chunk) = batch.next().await.unwrap() {
            assert!(chunk.refusals.is_empty(), "{:?}", chunk.refusals);
            for granted in &chunk.sessions.unwrap().meters {
                let memory = self.fleet.meters[&granted.meter].keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
                let gbek = granted.key(KeyType::GBEK).unwrap();
                assert_eq!(
                    gbek.version.map(|version| version.number()),
                    Some(accepted[&granted.meter]),
                    "GBEK of {}",
                    granted.meter
                );
                assert!(
                    !gbek.in_doubt && memory.gbek.is_some_and(|held| held.expose() == gbek.key.expose()),
                    "GBEK of {}",
                    granted.meter
                );
                compared += 1;
            }
        }
        assert_eq!(compared, titles.len());
    }

    /// The keys that the server grants are those in the meters' memories, octet by octet, and the
    /// meters answer to them.
    async fn compare(&self) {
        self.answering().await;
        let (profile, options) = (self.server.profile("head-end"), TestModule::of_environment().open_options());
        let (key, titles) = (profile.transport_key().unwrap(), self.fleet.meters.keys().copied().collect::<Vec<_>>());
        let mut batch = self.head_end[0].open_sessions(&key, new_request_id(), &titles, terms(10), &options);
        let mut compared = 0;
        while let Some(chunk) = batch.next().await.unwrap() {
            assert!(chunk.refusals.is_empty(), "{:?}", chunk.refusals);
            let session = Session { keys: chunk.sessions.unwrap(), audit_leaf: Vec::new(), rotation: None };
            for granted in &session.keys.meters {
                let meter = &self.fleet.meters[&granted.meter];
                let memory = meter.keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
                for (key_type, octets) in [(KeyType::GUEK, memory.guek.expose()), (KeyType::GAK, memory.gak.expose())] {
                    let key = granted.key(key_type).unwrap();
                    let same = key.key.expose() == octets;
                    if !same || key.in_doubt {
                        let shown = self.servers.lock().await[0]
                            .kms("officer-1", &["meter", "show", &granted.meter.to_string()]);
                        panic!(
                            "{key_type} of {}: version {:?}, in doubt: {}, the meter's own: {same}\n{shown}",
                            granted.meter, key.version, key.in_doubt
                        );
                    }
                }
                let address = put_on_line(meter).await;
                assert_eq!(
                    read_energy(address, &session, granted.meter).await.unwrap(),
                    Data::DoubleLongUnsigned(123_456)
                );
                compared += 1;
            }
        }
        assert_eq!(compared, titles.len());
    }
}

/// Whether a server has opened its island.
async fn is_open(connection: &Connection) -> bool {
    connection.principals().who_am_i(WhoAmIRequest {}).await.is_ok()
}

/// How tasks ended, as the server told the head-end.
#[derive(Debug, Default)]
struct Ends {
    /// Keys that meters were seen to hold although they are not the active ones, by type.
    earlier_held: BTreeMap<String, BTreeSet<SystemTitle>>,
    /// Meters whose probe was seen to end.
    probed: BTreeSet<SystemTitle>,
    outcomes: BTreeMap<String, u32>,
}

impl Ends {
    fn note(&mut self, task: &Task, end: &RelayEnd) {
        let outcome = match end {
            RelayEnd::Ended(end) => end.outcome.clone(),
            RelayEnd::Refused(refusal) => refusal.message.clone(),
            other => format!("{other:?}"),
        };
        *self.outcomes.entry(format!("{}: {outcome}", task.key_type)).or_default() += 1;
        if let RelayEnd::Ended(end) = end {
            if end.outcome == "probed" {
                self.probed.insert(SystemTitle::from_octets(&task.meter).unwrap());
            }
            for held in end.held.iter().filter(|held| !held.active) {
                self.earlier_held
                    .entry(held.key_type.clone())
                    .or_default()
                    .insert(SystemTitle::from_octets(&task.meter).unwrap());
            }
        }
    }
}

/// The meters, and the network to them.
struct Fleet {
    meters: BTreeMap<SystemTitle, Meter>,
    /// Not reached at the first attempt.
    absent: Mutex<HashSet<SystemTitle>>,
    /// Say at one delivery that they took the key, and did not.
    liars: HashSet<SystemTitle>,
    exchanges: watch::Sender<u64>,
}

impl Fleet {
    fn new(configs: impl Iterator<Item = MeterConfig>, random: &mut Random) -> Self {
        let (mut meters, mut absent, mut liars) = (BTreeMap::new(), HashSet::new(), HashSet::new());
        for (number, mut config) in (0..).zip(configs) {
            let title = SystemTitle::from_octets(config.system_title.as_bytes()).unwrap();
            vary(&mut config, number, random);
            if random.below(20) == 0 {
                absent.insert(title);
            }
            if config.faults.iter().any(|scripted| scripted.fault == Fault::SuccessWithoutApplying) {
                liars.insert(title);
            }
            meters.insert(title, Meter::new(config).unwrap());
        }
        Self { meters, absent: Mutex::new(absent), liars, exchanges: watch::Sender::new(0) }
    }
}

/// Meters differ, and each meets faults of its own: one at a delivery, and one at an association or
/// anywhere.
fn vary(config: &mut MeterConfig, number: usize, random: &mut Random) {
    let delivery = &DELIVERY_FAULTS[number % DELIVERY_FAULTS.len()];
    // A take-over has four deliveries at least: KEK, GUEK, GAK, GBEK.
    config
        .faults
        .extend(delivery.clone().map(|fault| ScriptedFault { at: Trigger::KeyTransfer(1 + random.below(4)), fault }));
    let forged = ["D80105", "D80106FFFFFFFF", "C701C10000", "D80106000003E8"][random.below(4) as usize];
    config.faults.push(match number % 3 {
        0 => ScriptedFault {
            at: Trigger::AssociationRequest(1 + random.below(8)),
            fault: random.one_of(ANY_FAULTS).clone(),
        },
        1 => ScriptedFault { at: Trigger::Exchange(1 + random.below(30)), fault: random.one_of(ANY_FAULTS).clone() },
        _ => ScriptedFault {
            at: Trigger::Exchange(1 + random.below(30)),
            fault: Fault::WrongAnswer(HexBytes(hex::decode(forged).unwrap())),
        },
    });
    config.challenges.seed = random.below(u64::MAX);
    config.behaviour = Behaviour {
        wrong_kek_result: [9, 250, 3][number % 3],
        counter_on_new_key: [
            CounterOnNewKey::KeepCounting,
            CounterOnNewKey::RestartAt(0),
            CounterOnNewKey::RestartAt(250),
        ][random.below(3) as usize],
        reverts_on_power_cycle: [
            &[][..],
            &[KeyId::GlobalUnicastEncryption],
            &[KeyId::GlobalAuthentication],
            &[KeyId::Master, KeyId::GlobalUnicastEncryption],
        ][random.below(4) as usize]
            .iter()
            .copied()
            .collect(),
        gmac_counter: if number.is_multiple_of(2) { GmacCounter::MustDiffer } else { GmacCounter::MayEqualApdu },
        challenge_length: [8, 16, 33, 64][random.below(4) as usize],
        ..Behaviour::default()
    };
    for setup in &mut config.security_setups {
        setup.counter_scope =
            if number.is_multiple_of(5) { CounterScope::PerSecuritySetup } else { CounterScope::PerClientTitle };
        if number.is_multiple_of(7) {
            // Another head-end has talked to it before, and nobody told the server.
            let title = meter_sim::SystemTitle::new(hex::decode(CLIENT_TITLE).unwrap().try_into().unwrap());
            setup.counter_floors.insert(title, 5_000);
        }
    }
}

impl MeterNetwork for Fleet {
    type Line = Line;

    async fn line(&self, meter: SystemTitle) -> Option<Line> {
        if self.absent.lock().unwrap().remove(&meter) {
            return None;
        }
        let meter = self.meters.get(&meter)?.clone();
        let connection = Arc::new(AsyncMutex::new(MeterConnection::new(meter.clone(), 1)));
        Some(Line { hears_the_last: meter.exchanges() % 2 == 0, meter, connection, exchanges: self.exchanges.clone() })
    }
}

struct Line {
    meter: Meter,
    connection: Arc<AsyncMutex<MeterConnection>>,
    exchanges: watch::Sender<u64>,
    /// Of two answers.
    hears_the_last: bool,
}

impl MeterLine for Line {
    async fn exchange(&mut self, request: MeterRequest) -> Option<Vec<u8>> {
        self.exchanges.send_modify(|count| *count += 1);
        if request.opens_association {
            self.connection = Arc::new(AsyncMutex::new(MeterConnection::new(self.meter.clone(), request.client_sap)));
        }
        let connection = Arc::clone(&self.connection);
        // A request that is late goes on when nobody waits for its answer any more: it arrives
        // after those that follow.
        let delivery = tokio::spawn(async move { connection.lock().await.deliver(&request.apdu).await });
        let mut answers = tokio::time::timeout(PATIENCE, delivery).await.ok()?.unwrap().answers;
        if self.hears_the_last { answers.pop() } else { answers.into_iter().next() }
    }
}

/// Pseudo-random numbers from a seed (SplitMix64): a run can be repeated, apart from the order in
/// which tasks run.
struct Random(u64);

impl Random {
    /// A number below `end`.
    const fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % end
    }

    fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[usize::try_from(self.below(all.len() as u64)).unwrap()]
    }
}

/// At a `key_transfer`.
const DELIVERY_FAULTS: &[Option<Fault>] = &[
    None,
    Some(Fault::LoseRequest),
    Some(Fault::LoseAnswer),
    Some(Fault::DelayRequest(500)),
    Some(Fault::DelayAnswer(500)),
    Some(Fault::HoldRequest(2)),
    Some(Fault::HoldRequestAndAnswer(1)),
    Some(Fault::DuplicateRequest),
    Some(Fault::DuplicateAnswer),
    Some(Fault::RepeatPreviousAnswer),
    Some(Fault::CorruptAnswer(0)),
    Some(Fault::AppliedButError(9)),
    Some(Fault::RefusedWithoutApplying(250)),
    Some(Fault::SuccessWithoutApplying),
    Some(Fault::PowerCycleBefore),
    Some(Fault::PowerCycleBeforeAnswer),
    Some(Fault::PowerCycleAfter),
];

/// At any request.
const ANY_FAULTS: &[Fault] = &[
    Fault::LoseRequest,
    Fault::LoseAnswer,
    Fault::DelayRequest(500),
    Fault::HoldRequest(3),
    Fault::DuplicateRequest,
    Fault::RepeatPreviousAnswer,
    Fault::CorruptAnswer(9),
    Fault::CloseConnection,
    Fault::PowerCycleBefore,
    Fault::PowerCycleAfter,
];

/// How much of everything there is.
#[derive(Clone, Copy)]
struct Scale {
    /// Meters with keys of their own.
    own_keys: u64,
    /// Meters of which two each have the same keys.
    equal_keys: u64,
    /// Kills at least.
    kills: u32,
}

impl Scale {
    /// The whole test runs on the embedded module, with one server on SQLite and with two on
    /// PostgreSQL. SoftHSM2, which is slower, gets a part of it.
    fn of_environment() -> Self {
        match TestModule::of_environment() {
            TestModule::HsmSim => Self { own_keys: 184, equal_keys: 16, kills: 50 },
            TestModule::SoftHsm2 => Self { own_keys: 40, equal_keys: 4, kills: 10 },
        }
    }
}

/// Lets the head-end see the GBEKs of its meters, to compare them.
const PERMIT_GBEK: &str = "permit (principal is HeadEnd, action == Action::\"openSession\", resource) \
                           when { resource has head_end && resource.head_end == principal && \
                           context.key_type == \"GBEK\" && context.lifetime_seconds <= 3600 };\n";
/// After how many exchanges with meters a server is killed, at most: about 25 are needed for each
/// meter.
const KILL_EVERY: u64 = 125;
/// How long the head-end waits for a meter.
const PATIENCE: Duration = Duration::from_millis(250);
const CAMPAIGN_WITHIN: Duration = Duration::from_secs(900);
