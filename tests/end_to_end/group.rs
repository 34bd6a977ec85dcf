//! The broadcast key of a group, from its first version to one that a member which left does not
//! get: by officers with `kms`, and by a head-end that holds no keys of single meters.
#![expect(clippy::indexing_slicing, reason = "tests")]

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use kms_client::{
    KeyType, MeterLine, MeterNetwork, MeterRequest, Relay, RelaySettings, SessionError, SystemTitle, new_request_id,
    proto::{GroupRotation, ShowGroupRotationRequest},
};
use kms_tests::{CLIENT_TITLE, DevServer, SecondServer, TestModule, kms, meter_configs, policies_with, terms, uuid};
use meter_sim::{
    Connection as MeterConnection, Meter, Obis,
    behaviour::{Fault, ScriptedFault, Trigger},
};
use serde_json::Value;

#[tokio::test(flavor = "multi_thread")]
async fn a_broadcast_key_reaches_its_group_and_leaves_a_former_member_behind() {
    let mut dev = DevServer::start();
    // The shipped policies grant a broadcast key to nobody (I8).
    let policies = policies_with(dev.state(), PERMIT);
    dev.kill();
    let server = dev.second("broadcast", |text| format!("{text}\n[policies]\ndirectory = \"{policies}\"\n")).await;
    let shipment = dev.state().join("north.jsonl").display().to_string();
    let vendor_key = dev.state().join("vendor/signing.key").display().to_string();
    let sample = ["--devices", "12", "--device-profile", "two-setups-suite1", "--group", "north", "--first", "100"];
    officer(
        &server,
        &[&["shipment", "make-sample", "--vendor-key", &vendor_key, "--out", &shipment], &sample[..]].concat(),
    );
    let assign =
        ["--manufacturer", "urn:meterkms:dev:manufacturer:kam", "--head-end", "urn:meterkms:dev:head-end:head-end"];
    officer(&server, &[&["shipment", "import", &shipment], &assign[..]].concat());
    let meters = Arc::new(Members::new(
        meter_configs(&dev.state().join("north.jsonl.devices.jsonl"))
            .into_iter()
            .map(|config| Meter::new(config).unwrap()),
    ));
    let titles: Vec<SystemTitle> = meters.0.keys().copied().collect();
    // One takes no key at first, of one the answer is lost.
    meters.0[&titles[3]]
        .add_fault(ScriptedFault { at: Trigger::KeyTransfer(1), fault: Fault::RefusedWithoutApplying(250) });
    meters.0[&titles[4]].add_fault(ScriptedFault { at: Trigger::KeyTransfer(1), fault: Fault::LoseAnswer });

    // The first version: nobody may broadcast with it before enough members have it.
    officer(&server, &["group", "key", "create", "north", "--type", "GBEK"]);
    assert!(broadcast_key(&dev, &server).await.unwrap_err().to_string().contains("there is no active GBEK"));
    let switch = |to| ["group", "switch", "north", "--to", to, "--yes"];
    let early = kms(&dev.state().join("broadcast"), "officer-1", &switch("1"));
    assert!(!early.status.success() && String::from_utf8_lossy(&early.stderr).contains("95 %"), "{early:?}");
    rotate(&server, &meters).await;
    let told = rotation(&server).await;
    assert_eq!((told.version, told.members, told.acknowledged), (1, 12, 12));
    assert!(officer(&server, &["group", "rotation", "north"]).contains("may switch: enough members have it"));
    officer(&server, &switch("1"));
    let (version, first) = broadcast_key(&dev, &server).await.unwrap();
    assert_eq!(version, 1);
    assert!(
        titles.iter().all(|title| meters.gbek(title) == first),
        "every member holds the key that the head-end broadcasts with"
    );

    // A member leaves with the key. Everybody else gets another, which that one cannot know.
    let gone = titles[7].to_string();
    officer(
        &server,
        &[
            "group",
            "remove-members",
            "north",
            "--meter",
            &gone,
            "--compromised",
            "--reason",
            "stolen from its cabinet",
            "--yes",
        ],
    );
    assert!(officer(&server, &["audit", "list", "--limit", "5"]).contains("group-key-exposed"));
    assert_eq!(rotation(&server).await.wanted_because, ["member-compromised"]);
    rotate(&server, &meters).await;
    let told = rotation(&server).await;
    assert_eq!((told.version, told.members, told.acknowledged, told.wanted_because.len()), (2, 11, 11, 0));
    // Until the switch broadcasts use the former one.
    assert_eq!(broadcast_key(&dev, &server).await.unwrap(), (1, first.clone()));
    officer(&server, &switch("2"));
    let (version, second) = broadcast_key(&dev, &server).await.unwrap();
    assert!(version == 2 && second != first);
    for title in &titles {
        assert!(meters.gbek(title) == if *title == titles[7] { first.clone() } else { second.clone() }, "{title}");
    }
}

/// A campaign of the group's key, from draft to end, executed by the head-end.
async fn rotate(server: &SecondServer, meters: &Arc<Members>) {
    let terms = [
        "--success-threshold",
        "1",
        "--failure-limit",
        "100",
        "--attempts",
        "3",
        "--back-off",
        "1",
        "--commit",
        "--output",
        "json",
    ];
    let made = server.kms(
        "officer-1",
        &[&["campaign", "create", "broadcast", "--rotate", "GBEK", "--group", "north", "--wave", "100%"], &terms[..]]
            .concat(),
    );
    let made: Value = serde_json::from_str(&made).unwrap();
    let (id, content) =
        (uuid(made["campaign"]["campaign_id"].as_str().unwrap()), made["campaign"]["content_sha256"].as_str().unwrap());
    server.kms("officer-2", &["campaign", "approve", &id, "--content", content, "--yes"]);
    officer(server, &["campaign", "start", &id, "--yes"]);
    let settings = RelaySettings { idle: Duration::from_millis(50), ..RelaySettings::default() };
    let relay = Relay::new(server.connect("head-end").await, [], SystemTitle::parse(CLIENT_TITLE).unwrap(), settings);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let network = Arc::clone(meters);
    let working =
        tokio::spawn(async move { relay.work(network, async { drop(stopped.await) }, |_, _| ()).await.unwrap() });
    // Ends by itself when the campaign does.
    let report = tokio::task::block_in_place(|| officer(server, &["campaign", "watch", &id, "--output", "json"]));
    drop(stop);
    working.await.unwrap();
    assert!(report.contains("finished"), "{report}");
}

/// The members, on lines that lose nothing by themselves.
struct Members(BTreeMap<SystemTitle, Meter>);

impl Members {
    fn new(meters: impl Iterator<Item = Meter>) -> Self {
        Self(meters.map(|meter| (SystemTitle::from_octets(meter.system_title().as_bytes()).unwrap(), meter)).collect())
    }

    fn gbek(&self, meter: &SystemTitle) -> Vec<u8> {
        let keys = self.0[meter].keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
        keys.gbek.map(|key| key.expose().to_vec()).unwrap_or_default()
    }
}

impl MeterNetwork for Members {
    type Line = Line;

    async fn line(&self, meter: SystemTitle) -> Option<Line> {
        let meter = self.0.get(&meter)?.clone();
        Some(Line { connection: MeterConnection::new(meter.clone(), 1), meter })
    }
}

struct Line {
    meter: Meter,
    connection: MeterConnection,
}

impl MeterLine for Line {
    async fn exchange(&mut self, request: MeterRequest) -> Option<Vec<u8>> {
        if request.opens_association {
            self.connection = MeterConnection::new(self.meter.clone(), request.client_sap);
        }
        self.connection.deliver(&request.apdu).await.answers.pop()
    }
}

fn officer(server: &SecondServer, arguments: &[&str]) -> String {
    server.kms("officer-1", arguments)
}

async fn rotation(server: &SecondServer) -> GroupRotation {
    let request = ShowGroupRotationRequest { group: "north".to_owned(), ..ShowGroupRotationRequest::default() };
    server.connect("auditor").await.groups().show_group_rotation(request).await.unwrap().into_inner()
}

/// The version and the octets of the key that the head-end broadcasts with.
async fn broadcast_key(dev: &DevServer, server: &SecondServer) -> Result<(u32, Vec<u8>), SessionError> {
    let key = dev.profile("head-end").transport_key().unwrap();
    let options = TestModule::of_environment().open_options();
    let session = server
        .connect("head-end")
        .await
        .open_group_session(&key, new_request_id(), "north", None, terms(10), &options)
        .await?;
    let granted = session.keys.groups[0].key(KeyType::GBEK).unwrap();
    Ok((granted.version.unwrap().number(), granted.key.expose().to_vec()))
}

const PERMIT: &str = "permit (principal is HeadEnd, action == Action::\"openGroupSession\", resource == MeterGroup::\"1\") \
                      when { context.key_type == \"GBEK\" && context.lifetime_seconds <= 3600 };\n";
