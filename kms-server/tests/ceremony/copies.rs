//! An island with two tokens: the authority's with all roots, and one for a grant server, which
//! gets copies of the roots for sessions in the ceremony and grants from them.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use kms_client::proto::{self, InventoryHsmRequest, Purpose, SessionTerms};
use kms_client::{
    Connection, KeyRequest, KeyType, NewProfile, OpenOptions, PrincipalId, Profile, Session, SystemTitle,
    new_request_id,
};
use kms_domain::RootPurpose;
use kms_server::server::{self, Server};
use kms_service::init::CeremonyPlan;
use kms_service::root::make::NewRootSettings;
use tonic::Code;

use super::{People, config, hsm_sim, on_module, softhsm};

#[test]
fn a_grant_token_on_softhsm() {
    on_module("copies::a_grant_token_on_softhsm", async |folder| story(folder, "development", &softhsm()).await);
}

#[test]
fn a_grant_token_on_hsm_sim() {
    on_module("copies::a_grant_token_on_hsm_sim", async |folder| story(folder, "production", &hsm_sim()).await);
}

async fn story(folder: &Path, kind: &str, module: &Path) {
    let people = People::write(folder);
    let file = folder.join("ceremony.toml");
    fs::write(&file, people.ceremony_file(kind, module) + &copy(module)).unwrap();
    let state = folder.join("state");
    let held = CeremonyPlan::read(&file, &state).unwrap().hold(&state).await.unwrap();
    assert!(
        held.summary.contains("session/storage-kek/1 (copy in grants)")
            && !held.summary.contains("/kek/storage-kek/1 (copy"),
        "{}",
        held.summary
    );
    // The same roots: the check values of copy and original are equal. SoftHSM2 has none of an
    // unwrapped key; there the grants below are the proof.
    for (original, value) in held
        .fingerprints
        .iter()
        .filter_map(|print| Some((print.label.strip_suffix(" (copy in grants)")?, &print.value)))
    {
        assert!(value.is_empty() == (kind == "development"), "{original}");
        assert!(
            value.is_empty() || held.fingerprints.iter().any(|print| print.label == original && print.value == *value),
            "{original}"
        );
    }

    // The authority enrols a meter for a head-end.
    let meter = SystemTitle::parse("4B414D0000000001").unwrap();
    let options = if kind == "development" { OpenOptions::new().allow_cbc_expand() } else { OpenOptions::new() };
    let authority = Running::start(config(&held.configuration)).await;
    let ada = profile(
        folder,
        authority.address,
        "officer",
        "ada",
        &people.ada.serialize_pem(),
        &read(&state.join("principals/officer-ada.pem")),
    );
    let officer = Connection::connect(&ada).await.unwrap();
    let hes = add_head_end(folder, &state, &authority, &officer).await;
    enrol(&officer, meter).await;
    let before = open(&hes, meter, &options).await;
    authority.stop().await;

    // The grant server has the other token alone.
    let text = fs::read_to_string(&held.configuration).unwrap();
    let (common, _) = text.split_once("[[hsm.token]]").unwrap();
    let token = format!(
        "[[hsm.token]]\nname = \"grants\"\nmodule = \"{}\"\nlabel = \"grants\"\npin = {{ file = \"{}\" }}\n\n\
         [hsm.classes]\nsession = \"grants\"\nauthentication = \"grants\"\n",
        module.display(),
        folder.join("grants-pin").display()
    );
    let configuration = folder.join("grant-server.toml");
    fs::write(&configuration, format!("{common}{token}")).unwrap();
    // Another storage KEK, made while no server runs: a copy for the token of the grant server, and
    // for no other.
    let new = NewRootSettings {
        purpose: RootPurpose::parse("session/storage-kek").unwrap(),
        escrow: state.join("escrow.json"),
        copies: Vec::new(),
        no_copies: Vec::new(),
        lost: Vec::new(),
    };
    let forgotten = server::make_root(&config(&held.configuration), new.clone()).await.unwrap_err().to_string();
    assert!(forgotten.contains("`--copy 1`"), "{forgotten}");
    let new = NewRootSettings { copies: vec![1], ..new };
    let made = server::make_root(&config(&held.configuration), new).await.unwrap();
    assert_eq!(made.copies.len(), 1);
    let copies = &made.copies[0];
    assert!(
        server::install_roots(&config(&held.configuration), copies).await.is_err(),
        "the authority's token is not the one that it is for"
    );
    let installed = server::install_roots(&config(&configuration), copies).await.unwrap();
    assert_eq!(
        installed.iter().map(|print| print.label.as_str()).collect::<Vec<_>>(),
        ["meterkms/north/session/storage-kek/2"]
    );
    let grants = Running::start(config(&configuration)).await;
    for moved in [&hes, &ada] {
        moved.set_server(&grants.address.to_string()).unwrap();
    }
    let (hes, ada) = (Profile::load(hes.directory()).unwrap(), Profile::load(ada.directory()).unwrap());
    let after = open(&hes, meter, &options).await;
    let key = |session: &Session, key_type| session.keys.meters[0].key(key_type).unwrap().key.expose().to_vec();
    for key_type in [KeyType::GUEK, KeyType::GAK] {
        assert_eq!(key(&before, key_type), key(&after, key_type), "{key_type}: the copy is not the root");
    }
    let last = |session: &Session| {
        session.keys.meters[0]
            .counters
            .as_ref()
            .map(|lease| (lease.next().unwrap(), lease.next().unwrap() + lease.remaining() - 1))
            .unwrap()
    };
    assert!(last(&after).0 > last(&before).1, "I4: the other server's lease starts higher");

    // What is not in its token it cannot do: certify, or take a KEK in hand.
    let officer = Connection::connect(&ada).await.unwrap();
    let stranger = PrincipalId::parse("urn:meterkms:north:head-end:hes-2").unwrap();
    let request = KeyRequest::generate(&stranger).unwrap();
    let add = proto::AddPrincipalRequest {
        request_id: request_id(),
        principal: stranger.to_string(),
        certificate_request: request.certificate_request().to_vec().into(),
        ..Default::default()
    };
    let refused = officer.principals().add_principal(add).await.unwrap_err();
    assert!(matches!(refused.code(), Code::FailedPrecondition | Code::Unavailable), "{refused}");
    let objects = officer.hsm().inventory_hsm(InventoryHsmRequest {}).await.unwrap().into_inner().objects;
    assert!(objects.iter().any(|object| object.label == "meterkms/north/session/storage-kek/2"));
    for object in &objects {
        assert_eq!(object.objection, "", "{}", object.label);
        assert!(!object.label.contains("/kek/") && !object.label.contains("/ca/"), "{}", object.label);
    }
    assert!(objects.iter().any(|object| object.label == "meterkms/north/session/diversification/1"), "{objects:?}");
    grants.stop().await;
}

fn copy(module: &Path) -> String {
    format!(
        r#"
[[copy]]
classes = ["session", "authentication"]
[copy.token]
module = "{}"
label = "grants"
pin = {{ file = "grants-pin" }}
so_pin = {{ file = "grants-so-pin" }}
initialise = true
"#,
        module.display()
    )
}

/// A server in this process.
struct Running {
    address: SocketAddr,
    stop: tokio::sync::oneshot::Sender<()>,
    serving: tokio::task::JoinHandle<Result<(), kms_server::server::ServerError>>,
}

impl Running {
    async fn start(config: kms_config::Config) -> Self {
        let server = Server::start(config).await.unwrap();
        let address = server.local_addr().unwrap();
        let mut opened = server.opened();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let serving = tokio::spawn(server.serve(async move { drop(stopped.await) }));
        tokio::time::timeout(Duration::from_secs(60), opened.wait_for(Option::is_some)).await.unwrap().unwrap();
        Self { address, stop, serving }
    }

    async fn stop(self) {
        self.stop.send(()).unwrap();
        tokio::time::timeout(Duration::from_secs(30), self.serving).await.unwrap().unwrap().unwrap();
    }
}

fn profile(folder: &Path, server: SocketAddr, role: &str, name: &str, key_pem: &str, certificate_pem: &str) -> Profile {
    let principal = PrincipalId::parse(&format!("urn:meterkms:north:{role}:{name}")).unwrap();
    let ca_pem = read(&folder.join("state/root.pem"));
    let new = NewProfile {
        server: &server.to_string(),
        server_name: "localhost",
        principal: &principal,
        ca_pem: &ca_pem,
        certificate_pem,
        key_pem,
    };
    Profile::create(folder.join("profiles").join(name), &new).unwrap()
}

async fn add_head_end(folder: &Path, state: &Path, server: &Running, officer: &Connection) -> Profile {
    assert!(state.join("root.pem").exists());
    let principal = PrincipalId::parse("urn:meterkms:north:head-end:hes-1").unwrap();
    let request = KeyRequest::generate(&principal).unwrap();
    let add = proto::AddPrincipalRequest {
        request_id: request_id(),
        principal: principal.to_string(),
        certificate_request: request.certificate_request().to_vec().into(),
        client_titles: vec![hex::decode(CLIENT_TITLE).unwrap().into()],
        ..Default::default()
    };
    let issued = officer.principals().add_principal(add).await.unwrap().into_inner();
    let hes = profile(folder, server.address, "head-end", "hes-1", request.key_pem(), &KeyRequest::chain_pem(&issued));
    let transport = KeyRequest::generate(&principal).unwrap();
    let register = proto::RegisterTransportKeyRequest {
        request_id: request_id(),
        certificate_request: transport.certificate_request().to_vec().into(),
    };
    let issued = Connection::connect(&hes)
        .await
        .unwrap()
        .principals()
        .register_transport_key(register)
        .await
        .unwrap()
        .into_inner();
    hes.set_transport_key(transport.key_pem(), &KeyRequest::certificate_pem(&issued)).unwrap();
    hes
}

async fn enrol(officer: &Connection, meter: SystemTitle) {
    let title = || bytes::Bytes::from(meter.octets().to_vec());
    let new = proto::NewMeter { meter: title(), serial: "S1".to_owned(), groups: Vec::new() };
    let enrol = proto::EnrolMetersRequest {
        request_id: request_id(),
        manufacturer: "KAM".to_owned(),
        device_profile: "generic-suite0".to_owned(),
        batch: "E-1".to_owned(),
        meters: vec![new],
    };
    assert_eq!(officer.meters().enrol_meters(enrol).await.unwrap().into_inner().changed, 1);
    let assign = proto::AssignMetersRequest {
        request_id: request_id(),
        meters: vec![title()],
        head_end: "urn:meterkms:north:head-end:hes-1".to_owned(),
        ..Default::default()
    };
    assert_eq!(officer.meters().assign_meters(assign).await.unwrap().into_inner().changed, 1);
}

async fn open(head_end: &Profile, meter: SystemTitle, options: &OpenOptions) -> Session {
    let terms = SessionTerms {
        purpose: Purpose::Read.into(),
        client_title: hex::decode(CLIENT_TITLE).unwrap().into(),
        counters: 10,
        ..SessionTerms::default()
    };
    let connection = Connection::connect(head_end).await.unwrap();
    connection.open_session(&head_end.transport_key().unwrap(), new_request_id(), meter, terms, options).await.unwrap()
}

fn request_id() -> bytes::Bytes {
    new_request_id().octets().to_vec().into()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

const CLIENT_TITLE: &str = "4D4D4D0000000001";
