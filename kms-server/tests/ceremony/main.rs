//! A ceremony from its file to a server that serves: on SoftHSM2 a development island, on hsm-sim a
//! production island, on the database that `KMS_TEST_DATABASE` names (`sqlite`, `postgresql`). Both
//! modules are tried, whatever `KMS_TEST_MODULE` says: the two kinds of island differ.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod copies;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use aws_lc_rs::rsa::{OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, PrivateDecryptingKey};
use hyper_util::rt::TokioIo;
use kms_config::Config;
use kms_domain::{Generation, IslandName, PrincipalId, RootPurpose, RowId, RowSeal, SealKey, SealRootKey};
use kms_proto::v1::principal_service_client::PrincipalServiceClient;
use kms_proto::v1::{self, audit_record::Event, audit_service_client::AuditServiceClient};
use kms_server::server::{self, Server, ServerError};
use kms_service::escrow::{EscrowDocument, EscrowError};
use kms_service::init::{CeremonyPlan, InitError, Storage};
use kms_service::officers::Recertification;
use kms_service::root::make::NewRootSettings;
use kms_store::RowKind;
use kms_store_testing::TestDatabase;
use rcgen::{CertificateParams, KeyPair, PKCS_RSA_SHA256, PublicKeyData, RsaKeySize};
use rustls::RootCertStore;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::Code;
use tonic::transport::{Channel, Endpoint, Uri};
use zeroize::Zeroizing;

#[test]
fn an_island_on_softhsm() {
    on_module("an_island_on_softhsm", async |folder| story(folder, "development", &softhsm()).await);
}

#[test]
fn an_island_on_hsm_sim() {
    on_module("an_island_on_hsm_sim", async |folder| story(folder, "production", &hsm_sim()).await);
}

/// Modules read their settings from the environment once: each test runs in a child process.
fn on_module(test: &str, body: impl AsyncFnOnce(&Path)) {
    if let Some(folder) = std::env::var_os(CHILD) {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        return runtime.block_on(body(Path::new(&folder)));
    }
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    fs::create_dir(&tokens).unwrap();
    fs::write(
        folder.path().join("softhsm2.conf"),
        format!("directories.tokendir = {}\nlog.level = ERROR\n", tokens.display()),
    )
    .unwrap();
    fs::write(folder.path().join("hsm-sim.conf"), "directory = tokens\nargon2_memory_kib = 64\nargon2_passes = 1\n")
        .unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture"]).env(CHILD, folder.path());
    command
        .env("SOFTHSM2_CONF", folder.path().join("softhsm2.conf"))
        .env("HSM_SIM_CONF", folder.path().join("hsm-sim.conf"));
    if let Some(address) = TestDatabase::of_environment().create().unwrap() {
        command.env(POSTGRES, address);
    }
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

async fn story(folder: &Path, kind: &str, module: &Path) {
    let people = People::write(folder);
    let file = folder.join("ceremony.toml");
    fs::write(&file, people.ceremony_file(kind, module)).unwrap();
    let state = folder.join("state");

    // A database that cannot be opened: the ceremony stops after the roots are locked, and goes on
    // when it is run again.
    let blocked = state.join("island.db");
    fs::create_dir_all(&blocked).unwrap();
    let plan = || CeremonyPlan::read(&file, &state).unwrap();
    let mut first = plan();
    first.storage = Storage::sqlite(blocked.clone());
    assert!(first.hold(&state).await.is_err());
    fs::remove_dir(&blocked).unwrap();
    let escrow_before = fs::read(state.join("escrow.json")).unwrap();
    let held = plan().hold(&state).await.unwrap();
    assert_eq!(fs::read(state.join("escrow.json")).unwrap(), escrow_before, "the escrow of the first run is kept");
    assert!(held.summary.contains("2 of 3") && held.summary.contains("Ada Lovelace"), "{}", held.summary);
    assert!(matches!(plan().hold(&state).await, Err(InitError::Exists { .. })), "a ceremony is held once");

    escrow_restores_the_seal_root(&people, &state).await;
    another_root(&people, &state).await;
    if kind == "development" {
        let mut config = config(&held.configuration);
        config.allow_development_island = false;
        let server = Server::start(config).await.unwrap();
        assert!(matches!(server.serve(std::future::pending()).await, Err(ServerError::Development { .. })));
    }
    let server = Server::start(config(&held.configuration)).await.unwrap();
    let address = server.local_addr().unwrap();
    let mut opened = server.opened();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(server.serve(async move { drop(stopped.await) }));
    tokio::time::timeout(Duration::from_secs(60), opened.wait_for(Option::is_some)).await.unwrap().unwrap();

    principals(&people, &state, address).await;
    strangers(&people, &state, address).await;
    stop.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(30), serving).await.unwrap().unwrap().unwrap();
    custodians_bring_the_last_officer_back(folder, &people, &state).await;
}

/// The certificate of the last officer has ended, or is lost, and no other officer is left: the
/// custodians stand behind a new key. The ones who are too few, the custodians of another escrow,
/// and the wrong officer are refused, and nothing changes.
async fn custodians_bring_the_last_officer_back(folder: &Path, people: &People, state: &Path) {
    let mut config = config(&state.join("kms-server.toml"));
    config.limits.principal_certificate_days = 1;
    let document: EscrowDocument = serde_json::from_slice(&fs::read(state.join("escrow.json")).unwrap()).unwrap();
    let shares: Vec<PathBuf> = document
        .shares()
        .map(|(name, encrypted)| {
            let path = folder.join(format!("{name}.share"));
            fs::write(&path, people.decrypt_share(name, encrypted)).unwrap();
            path
        })
        .collect();
    let new_key = KeyPair::generate().unwrap();
    let request = folder.join("ada-2.csr");
    fs::write(&request, CertificateParams::default().serialize_request(&new_key).unwrap().pem().unwrap()).unwrap();
    let recertification = |officer: &str, escrow: &str, shares: &[PathBuf]| Recertification {
        officer: PrincipalId::parse(officer).unwrap(),
        certificate_request: request.clone(),
        escrow: state.join(escrow),
        shares: shares.to_vec(),
        days: config.limits.principal_days(),
    };
    let (ada, bo, head_end) =
        ("urn:meterkms:north:officer:ada", "urn:meterkms:north:officer:bo", "urn:meterkms:north:head-end:hes-1");
    for (wrong, reason) in [
        (recertification(ada, "escrow.json", &shares[..1]), "shares"),
        (recertification(ada, "escrow.json", &[shares[0].clone(), shares[0].clone()]), "shares"),
        (recertification(ada, "other.json", &shares[..2]), "not the escrow of the island"),
        (recertification(ada, "kms-server.toml", &shares[..2]), "no escrow file"),
        (recertification(bo, "escrow.json", &shares[..2]), "no enabled officer"),
        (recertification(head_end, "escrow.json", &shares[..2]), "no officer"),
    ] {
        let refusal = server::recertify_officer(&config, wrong).await.unwrap_err().to_string();
        assert!(refusal.contains(reason), "{refusal}");
    }
    let issued = server::recertify_officer(&config, recertification(ada, "escrow.json", &shares[1..])).await.unwrap();

    let server = Server::start(config).await.unwrap();
    let address = server.local_addr().unwrap();
    let mut opened = server.opened();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(server.serve(async move { drop(stopped.await) }));
    tokio::time::timeout(Duration::from_secs(60), opened.wait_for(Option::is_some)).await.unwrap().unwrap();
    let root = fs::read(state.join("root.pem")).unwrap();
    let before = Identity {
        key: people.ada.clone_key(),
        chain: pem_chain(&fs::read(state.join("principals/officer-ada.pem")).unwrap()),
    };
    assert!(call(connect(address, &root, Some(&before)).await).await.is_none(), "the certificate before has ended");
    let after = Identity { key: new_key.clone_key(), chain: vec![issued.der.to_vec()] };
    let me = call(connect(address, &root, Some(&after)).await).await.unwrap();
    assert!(
        matches!(&me.certificates[..], [one] if one.enrolment == "custodians" && one.counts && one.in_use),
        "{me:?}"
    );
    let mut audit = AuditServiceClient::new(connect(address, &root, Some(&after)).await.unwrap());
    let list = v1::ListAuditRecordsRequest { page_size: 100, newest_first: true, ..Default::default() };
    let records = audit.list_audit_records(list).await.unwrap().into_inner().records;
    let told = |record: &v1::AuditRecord| matches!(&record.event, Some(Event::SecurityEvent(event)) if event.kind == "principal-recertified");
    assert_eq!(records.iter().filter(|record| told(record)).count(), 1);
    stop.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(30), serving).await.unwrap().unwrap().unwrap();
}

/// M shares open the escrow, fewer do not, and what it holds is the root that sealed the database.
async fn escrow_restores_the_seal_root(people: &People, state: &Path) {
    let document: EscrowDocument = serde_json::from_slice(&fs::read(state.join("escrow.json")).unwrap()).unwrap();
    let shares: Vec<_> = document.shares().map(|(name, encrypted)| people.decrypt_share(name, encrypted)).collect();
    assert!(matches!(document.open(&shares[..1]), Err(EscrowError::Shares(_))));
    let opened = document.open(&shares[1..]).unwrap();
    let root = document.root(&opened, "meterkms/north/seal/1").unwrap();

    let island = IslandName::parse("north").unwrap();
    let mac = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &root), &SealRootKey::Seal.message(1, &island));
    let seal = SealKey::new(1, &Zeroizing::new(mac.as_ref().try_into().unwrap()));
    let store = kms_store::open(&config(&state.join("kms-server.toml")).storage.store().unwrap()).await.unwrap();
    let row = store.sealed(RowKind::Island, b"north").await.unwrap().unwrap();
    seal.verify(&RowId::Island(island), Generation::FIRST, &row.body, &RowSeal::from_octets(&row.seal).unwrap())
        .unwrap();
    store.close().await;
}

/// Another version of a root: noted and recorded, and in the custodians' hands; only the ceremony's
/// own escrow file is taken.
async fn another_root(people: &People, state: &Path) {
    let path = state.join("escrow.json");
    let before = fs::read_to_string(&path).unwrap();
    let config = config(&state.join("kms-server.toml"));
    let purpose = RootPurpose::parse("kek/storage-kek").unwrap();
    let settings = |escrow: PathBuf| NewRootSettings {
        purpose,
        escrow,
        copies: Vec::new(),
        no_copies: Vec::new(),
        lost: Vec::new(),
    };
    let document: serde_json::Value = serde_json::from_str(&before).unwrap();
    let key = document["escrow_key"].as_str().unwrap();
    let other = format!(
        "{}{}",
        &key[..key.len() - 12],
        if &key[key.len() - 12..] == "ffffffffffff" { "eeeeeeeeeeee" } else { "ffffffffffff" }
    );
    fs::write(state.join("other.json"), before.replace(key, &other)).unwrap();
    let refused = server::make_root(&config, settings(state.join("other.json"))).await.unwrap_err();
    assert!(refused.to_string().contains("not the escrow file"), "{refused}");
    assert_eq!(fs::read_to_string(&path).unwrap(), before);

    let made = server::make_root(&config, settings(path.clone())).await.unwrap();
    assert_eq!((made.id.version, made.fingerprint.label.as_str()), (2, "meterkms/north/kek/storage-kek/2"));
    // One that was made and is not in use stands in the way of another.
    assert!(server::make_root(&config, settings(path.clone())).await.unwrap_err().to_string().contains("made"));
    let document: EscrowDocument = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let earlier: EscrowDocument = serde_json::from_str(&before).unwrap();
    assert_eq!(document.labels().count(), earlier.labels().count() + 1);
    let shares: Vec<_> = document.shares().map(|(name, encrypted)| people.decrypt_share(name, encrypted)).collect();
    let opened = document.open(&shares[..2]).unwrap();
    let (first, second) = (
        document.root(&opened, "meterkms/north/kek/storage-kek/1").unwrap(),
        document.root(&opened, "meterkms/north/kek/storage-kek/2").unwrap(),
    );
    assert!(first != second && second.len() == 32);

    // An earlier escrow file lacks the root that was made since: two files with a part of the roots
    // each would restore no token. It is taken for a root that nobody has any more only where
    // somebody says so.
    let earlier_path = state.join("earlier.json");
    fs::write(&earlier_path, &before).unwrap();
    let other = RootPurpose::parse("authentication/storage-kek").unwrap();
    let settings = |lost: Vec<String>| NewRootSettings {
        purpose: other,
        escrow: earlier_path.clone(),
        copies: Vec::new(),
        no_copies: Vec::new(),
        lost,
    };
    let refused = server::make_root(&config, settings(Vec::new())).await.unwrap_err().to_string();
    assert!(refused.contains("lacks meterkms/north/kek/storage-kek/2") && refused.contains("--lost"), "{refused}");
    assert_eq!(fs::read_to_string(&earlier_path).unwrap(), before);
    let made = server::make_root(&config, settings(vec!["meterkms/north/kek/storage-kek/2".to_owned()])).await.unwrap();
    assert_eq!(made.fingerprint.label, "meterkms/north/authentication/storage-kek/2");
}

async fn principals(people: &People, state: &Path, address: SocketAddr) {
    let root = fs::read(state.join("root.pem")).unwrap();
    let ada = Identity {
        key: people.ada.clone_key(),
        chain: pem_chain(&fs::read(state.join("principals/officer-ada.pem")).unwrap()),
    };
    let bo = Identity {
        key: people.bo.clone_key(),
        chain: pem_chain(&fs::read(state.join("principals/officer-bo.pem")).unwrap()),
    };
    let mut officer = PrincipalServiceClient::new(connect(address, &root, Some(&ada)).await.unwrap());
    let me = officer.who_am_i(v1::WhoAmIRequest {}).await.unwrap().into_inner();
    assert_eq!(
        (me.principal.as_str(), me.person.as_str(), me.status.as_str()),
        ("urn:meterkms:north:officer:ada", "Ada Lovelace", "enabled")
    );

    // A head-end is added; the same request has the same answer, another one under its id none.
    let key = KeyPair::generate().unwrap();
    let request = v1::AddPrincipalRequest {
        request_id: id(1),
        principal: "urn:meterkms:north:head-end:hes-1".to_owned(),
        certificate_request: csr(&key),
        client_titles: vec![b"MMM\0\0\0\0\x01".to_vec().into()],
        ..Default::default()
    };
    let added = officer.add_principal(request.clone()).await.unwrap().into_inner();
    assert_eq!(officer.add_principal(request.clone()).await.unwrap().into_inner(), added);
    let other =
        v1::AddPrincipalRequest { principal: "urn:meterkms:north:head-end:hes-2".to_owned(), ..request.clone() };
    let taken = v1::AddPrincipalRequest {
        request_id: id(9),
        certificate_request: csr(&KeyPair::generate().unwrap()),
        ..other.clone()
    };
    assert_eq!(
        officer.add_principal(taken).await.unwrap_err().code(),
        Code::FailedPrecondition,
        "the client title is taken"
    );
    let taken = v1::AddPrincipalRequest { request_id: id(10), client_titles: Vec::new(), ..other.clone() };
    assert_eq!(officer.add_principal(taken).await.unwrap_err().code(), Code::FailedPrecondition, "the key is taken");
    let other = v1::AddPrincipalRequest { client_titles: Vec::new(), ..other };
    assert_eq!(officer.add_principal(other).await.unwrap_err().code(), Code::InvalidArgument, "the request id is used");
    let again = v1::AddPrincipalRequest { request_id: id(2), ..request };
    assert_eq!(officer.add_principal(again).await.unwrap_err().code(), Code::FailedPrecondition);

    // It looks after its own identity, and nothing else.
    let hes = Identity { key: key_der(&key), chain: vec![added.certificate.to_vec()] };
    let mut head_end = PrincipalServiceClient::new(connect(address, &root, Some(&hes)).await.unwrap());
    let transport = KeyPair::generate().unwrap();
    let registered = head_end
        .register_transport_key(v1::RegisterTransportKeyRequest {
            request_id: id(3),
            certificate_request: csr(&transport),
        })
        .await
        .unwrap()
        .into_inner();
    assert!(head_end.who_am_i(v1::WhoAmIRequest {}).await.unwrap().into_inner().has_transport_key);
    assert_eq!(
        head_end.list_principals(v1::ListPrincipalsRequest {}).await.unwrap_err().code(),
        Code::PermissionDenied
    );
    let disable = |principal: &str, number| v1::DisablePrincipalRequest {
        request_id: id(number),
        principal: principal.to_owned(),
        reason: "test".to_owned(),
    };
    assert_eq!(
        head_end.disable_principal(disable("urn:meterkms:north:officer:ada", 4)).await.unwrap_err().code(),
        Code::PermissionDenied
    );
    // A transport certificate is no TLS certificate.
    let wrong = Identity { key: key_der(&transport), chain: vec![registered.certificate.to_vec()] };
    assert!(call(connect(address, &root, Some(&wrong)).await).await.is_none());
    // A renewed certificate serves beside the earlier one.
    let renewed_key = KeyPair::generate().unwrap();
    let renew = v1::RenewPrincipalRequest {
        request_id: id(5),
        principal: "urn:meterkms:north:head-end:hes-1".to_owned(),
        certificate_request: csr(&renewed_key),
        ..Default::default()
    };
    let renewed = head_end.renew_principal(renew).await.unwrap().into_inner();
    let renewed = Identity { key: key_der(&renewed_key), chain: vec![renewed.certificate.to_vec()] };
    assert!(call(connect(address, &root, Some(&renewed)).await).await.is_some());

    // I5: shut out at once, in the connection that is open.
    officer.disable_principal(disable("urn:meterkms:north:head-end:hes-1", 6)).await.unwrap();
    assert_eq!(head_end.who_am_i(v1::WhoAmIRequest {}).await.unwrap_err().code(), Code::Unauthenticated);
    assert!(call(connect(address, &root, Some(&renewed)).await).await.is_none());

    // Somebody must be left who can administer.
    officer.disable_principal(disable("urn:meterkms:north:officer:bo", 7)).await.unwrap();
    assert!(call(connect(address, &root, Some(&bo)).await).await.is_none());
    assert_eq!(
        officer.disable_principal(disable("urn:meterkms:north:officer:ada", 8)).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    let all = officer.list_principals(v1::ListPrincipalsRequest {}).await.unwrap().into_inner().principals;
    let seen: Vec<_> = all.iter().map(|one| (one.principal.rsplit(':').next().unwrap(), one.status.as_str())).collect();
    assert_eq!(seen, [("hes-1", "disabled"), ("ada", "enabled"), ("bo", "disabled")]);

    let mut health =
        tonic_health::pb::health_client::HealthClient::new(connect(address, &root, Some(&ada)).await.unwrap());
    let mut watch =
        health.watch(tonic_health::pb::HealthCheckRequest { service: String::new() }).await.unwrap().into_inner();
    let serving = tonic_health::pb::health_check_response::ServingStatus::Serving as i32;
    while watch.message().await.unwrap().unwrap().status != serving {}
}

/// Who has no certificate of the island does not get as far as HTTP/2, and older TLS is not spoken.
async fn strangers(people: &People, state: &Path, address: SocketAddr) {
    let root = fs::read(state.join("root.pem")).unwrap();
    assert!(call(connect(address, &root, None).await).await.is_none());
    let foreign = CertificateParams::default().self_signed(&people.ada).unwrap();
    let foreign = Identity { key: people.ada.clone_key(), chain: vec![foreign.der().to_vec()] };
    assert!(call(connect(address, &root, Some(&foreign)).await).await.is_none());
    let old = Command::new("openssl")
        .args(["s_client", "-tls1_2", "-connect", &address.to_string()])
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    assert!(!old.status.success());
}

/// Whether the principal service answers over this connection as to a principal.
async fn call(channel: Result<Channel, tonic::transport::Error>) -> Option<v1::Principal> {
    let answer = PrincipalServiceClient::new(channel.ok()?).who_am_i(v1::WhoAmIRequest {}).await;
    answer.ok().map(tonic::Response::into_inner)
}

struct Identity {
    key: PrivateKeyDer<'static>,
    chain: Vec<Vec<u8>>,
}

async fn connect(
    address: SocketAddr,
    root: &[u8],
    identity: Option<&Identity>,
) -> Result<Channel, tonic::transport::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(root).unwrap()).unwrap();
    let builder = rustls::ClientConfig::builder_with_provider(Arc::new(kms_api::tls::provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match identity {
        Some(identity) => {
            let chain = identity.chain.iter().map(|der| CertificateDer::from(der.clone())).collect();
            builder.with_client_auth_cert(chain, identity.key.clone_key()).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let connect = move |_: Uri| {
        let connector = connector.clone();
        async move {
            let tcp = TcpStream::connect(address).await?;
            let stream = connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await?;
            let group = stream.get_ref().1.negotiated_key_exchange_group().map(|group| group.name());
            assert_eq!(group, Some(rustls::NamedGroup::X25519MLKEM768));
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    };
    Endpoint::from_static("http://localhost").connect_with_connector(tower::service_fn(connect)).await
}

/// Officers and custodians with their keys, as files in a folder.
struct People {
    ada: KeyPair,
    bo: KeyPair,
    custodians: Vec<(&'static str, PrivateDecryptingKey)>,
}

impl People {
    fn write(folder: &Path) -> Self {
        let officer = |name: &str| {
            let key = KeyPair::generate().unwrap();
            fs::write(
                folder.join(format!("{name}.csr")),
                CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap(),
            )
            .unwrap();
            key
        };
        let custodian = |name: &'static str| {
            let key = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_3072).unwrap();
            fs::write(folder.join(format!("{name}.pem")), key.public_key_pem()).unwrap();
            assert!(!key.subject_public_key_info().is_empty());
            (name, PrivateDecryptingKey::from_pkcs8(key.serialized_der()).unwrap())
        };
        Self {
            ada: officer("ada"),
            bo: officer("bo"),
            custodians: ["cy", "di", "ed"].into_iter().map(custodian).collect(),
        }
    }

    fn ceremony_file(&self, kind: &str, module: &Path) -> String {
        // With SQLite, `island.db` in the state folder is what a ceremony takes without being told.
        let storage = std::env::var(POSTGRES)
            .map(|address| format!("[storage.postgres]\nurl = \"{address}\"\n"))
            .unwrap_or_default();
        format!(
            r#"
island = "north"
kind = "{kind}"

[server]
names = ["localhost", "127.0.0.1"]

[token]
module = "{module}"
label = "north"
pin = {{ file = "pin" }}
so_pin = {{ file = "so-pin" }}
initialise = true

[escrow]
needed = 2
[[escrow.custodian]]
name = "cy"
public_key = "cy.pem"
[[escrow.custodian]]
name = "di"
public_key = "di.pem"
[[escrow.custodian]]
name = "ed"
public_key = "ed.pem"

[[officer]]
name = "ada"
person = "Ada Lovelace"
certificate_request = "ada.csr"
[[officer]]
name = "bo"
person = "Bo Larsson"
certificate_request = "bo.csr"

{storage}"#,
            module = module.display()
        )
    }

    fn decrypt_share(&self, name: &str, encrypted: &[u8]) -> Zeroizing<Vec<u8>> {
        let (_, key) = self.custodians.iter().find(|(known, _)| *known == name).unwrap();
        let key = OaepPrivateDecryptingKey::new(key.clone()).unwrap();
        let mut share = vec![0; key.min_output_size()];
        let length = key
            .decrypt(&OAEP_SHA256_MGF1SHA256, encrypted, &mut share, Some(b"meterkms/escrow-share/north"))
            .unwrap()
            .len();
        share.truncate(length);
        Zeroizing::new(share)
    }
}

trait CloneKey {
    fn clone_key(&self) -> PrivateKeyDer<'static>;
}

impl CloneKey for KeyPair {
    fn clone_key(&self) -> PrivateKeyDer<'static> {
        key_der(self)
    }
}

fn key_der(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::try_from(key.serialize_der()).unwrap()
}

fn pem_chain(pem: &[u8]) -> Vec<Vec<u8>> {
    CertificateDer::pem_slice_iter(pem).map(|der| der.unwrap().to_vec()).collect()
}

fn csr(key: &KeyPair) -> bytes::Bytes {
    CertificateParams::default().serialize_request(key).unwrap().der().to_vec().into()
}

fn id(number: u8) -> bytes::Bytes {
    vec![number; 16].into()
}

fn config(path: &Path) -> Config {
    let mut config = Config::load(path).unwrap();
    config.listen = "127.0.0.1:0".parse().unwrap();
    config
}

fn hsm_sim() -> PathBuf {
    // Cargo builds the cdylib of a dependency beside the test executable.
    let module = std::env::var_os("HSM_SIM_MODULE")
        .map_or_else(|| std::env::current_exe().unwrap().with_file_name("libhsm_sim.so"), PathBuf::from);
    assert!(
        module.exists(),
        "`{}` is missing: build with `cargo test -p kms-server`, or set HSM_SIM_MODULE",
        module.display()
    );
    module
}

fn softhsm() -> PathBuf {
    let module = PathBuf::from("/usr/lib/softhsm/libsofthsm2.so");
    assert!(module.exists(), "SoftHSM is not installed: run `apt-get install softhsm2`");
    module
}

const CHILD: &str = "KMS_SERVER_TEST_FOLDER";
const POSTGRES: &str = "KMS_SERVER_TEST_POSTGRES";
