//! `kms` against a server that this test plays, over real mTLS: tables, JSON, files and exit codes.

use std::{
    path::PathBuf,
    process::{Command, Output},
    sync::{Arc, Mutex},
};

use aws_lc_rs::{agreement, digest, hmac};
use bytes::Bytes;
use kms_client::{KeyRequest, NewProfile, PrincipalId, Profile, StateDirectory};
use kms_proto::v1::{self as proto, *};
use prost::Message as _;
use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair};
use serde_json::Value;
use tokio_stream::{StreamExt as _, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::work_order_mock::OrderMock;

type Answer<T> = Result<Response<T>, Status>;
type Steps<T> = tokio_stream::Iter<std::vec::IntoIter<Result<T, Status>>>;

const METER: &str = "4B414D0000000001";
const CAMPAIGN: &str = "01939E7E7C1B70008000000000000001";
const PRINCIPAL: &str = "urn:meterkms:dev:officer:ada";

#[test]
fn tables_and_json_show_meters() {
    let server = Server::start();
    let output = server.kms(&["meter", "list"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let table = text(&output.stdout);
    for words in ["meter", "head-end", METER, "generic-suite0", "1 of 1 meter", "rotation: a key is compromised"] {
        assert!(table.contains(words), "{table}");
    }
    assert!(!table.contains('\u{1b}'), "colours without a terminal");
    let json: Value = serde_json::from_slice(&server.kms(&["meter", "list", "--output", "json"]).stdout).unwrap();
    assert_eq!((&json["total"], &json["meters"][0]["meter"]), (&Value::from(1), &Value::from(METER)));

    let shown = text(&server.kms(&["meter", "show", METER]).stdout);
    let words =
        ["GUEK", "active", "diversified", "hes-1 since 2026-11-21T08:00:00Z", "4D4D4D0000000001", "this system"];
    let states = [
        "GUEK version 2, has left",
        "3: deliver",
        "in doubt: the meter holds GUEK version 1 or 2",
        "compromised, rotation needed",
    ];
    for words in words.into_iter().chain(states) {
        assert!(shown.contains(words), "{shown}");
    }
}

#[test]
fn exposures_are_streamed_and_summed_up() {
    let server = Server::start();
    let output = server.kms(&["exposure", "show", "--handheld", "urn:meterkms:dev:handheld:hh-7"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let table = text(&output.stdout);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines[0].split_whitespace().collect::<Vec<_>>(), ["owner", "key", "version", "since", "until", "how"]);
    assert!(lines[2].starts_with(METER) && lines[2].ends_with("open   bundle"), "{table}");
    assert!(lines[3].ends_with("its frames, from GUEK 1"), "{table}");
    assert!(lines[4].starts_with("4B414D0000000002") && lines[4].contains(", may go back"), "{table}");
    assert!(
        table.contains("3 slots of 2 owners were open to urn:meterkms:dev:handheld:hh-7, 2 still are\n"),
        "{table}"
    );
    assert!(table.contains("1 slot was replaced"), "{table}");

    let some = text(
        &server.kms(&["exposure", "show", "--principal", "urn:meterkms:dev:handheld:hh-7", "--limit", "1"]).stdout,
    );
    assert!(
        some.contains("by the index, 3 slots of 2 owners") && some.contains("1 line shown; there are more"),
        "{some}"
    );
    let open =
        text(&server.kms(&["exposure", "show", "--principal", "urn:meterkms:dev:handheld:hh-7", "--open"]).stdout);
    assert!(!open.contains("may go back"), "{open}");

    let json = server.kms(&["exposure", "show", "--handheld", "urn:meterkms:dev:handheld:hh-7", "--output", "json"]);
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["keys"].as_array().unwrap().len(), 3);
    assert_eq!(
        (&json["keys"][1]["ways"][0]["through_version"], &json["totals"]["open"]),
        (&Value::from(1), &Value::from(2))
    );
    assert_eq!((&json["shown"]["slots"], &json["complete"], &json["more"]), (&3.into(), &true.into(), &false.into()));

    let meter = text(&server.kms(&["exposure", "show", "--meter", METER]).stdout);
    assert!(meter.contains("known by") && meter.contains("vendor") && meter.contains("open to 2 parties"), "{meter}");
    let nobody = server.kms(&["exposure", "show", "--group", "north"]);
    assert_eq!((nobody.status.code(), text(&nobody.stdout).trim()), (Some(0), "no exposures"));
    let empty = server.kms(&["exposure", "show", "--group", "north", "--output", "json"]);
    assert_eq!(serde_json::from_slice::<Value>(&empty.stdout).unwrap()["keys"], Value::Array(Vec::new()));

    // An answer that lacks something says so, with the exit code of a part.
    let unreadable = server.kms(&["exposure", "show", "--vendor", "KAM"]);
    assert_eq!(unreadable.status.code(), Some(5));
    assert!(text(&unreadable.stdout).contains("4B414D0000000009: its row does not verify: the seal does not fit"));
    let incomplete = server.kms(&["exposure", "show", "--anyone"]);
    assert_eq!(incomplete.status.code(), Some(5));
    assert!(text(&incomplete.stderr).contains("not indexed all rows"), "{}", text(&incomplete.stderr));
    // The line that a server logs when it is.
    assert!(text(&incomplete.stderr).contains("`the index of exposures is complete`"), "{}", text(&incomplete.stderr));
}

#[test]
fn refusals_and_outages_have_their_exit_codes() {
    let server = Server::start();
    // The mock refuses every other meter, and is unavailable for retiring.
    let output = server.kms(&["meter", "show", "4B414D0000000009"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("refused by policy"), "{}", text(&output.stderr));
    let output = server.kms(&["meter", "retire", METER, "--reason", "gone", "--yes"]);
    assert_eq!(output.status.code(), Some(4));
    assert!(text(&output.stderr).contains("try again in 2.0 s"), "{}", text(&output.stderr));
    let output =
        server.kms(&["meter", "assign", METER, "4B414D0000000002", "--head-end", "urn:meterkms:dev:head-end:hes-1"]);
    assert_eq!(output.status.code(), Some(5));
    assert!(text(&output.stdout).contains("no such meter for you"), "{}", text(&output.stdout));
    let output = server.kms(&["meter", "assign", "--batch", "B-1", "--to-nobody"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("add --yes"), "{}", text(&output.stderr));
    assert_eq!(server.kms(&["hsm", "check"]).status.code(), Some(1));
    let output = server.kms(&["audit", "scrub"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("stale"));
    // Nothing listens.
    drop(std::fs::write(
        server.profile().directory().join("profile.toml"),
        "server = '127.0.0.1:1'\nserver_name = 'localhost'\n",
    ));
    let output = server.kms(&["principal", "whoami"]);
    assert_eq!(output.status.code(), Some(4));
    assert!(text(&output.stderr).contains("nothing listens there"), "{}", text(&output.stderr));
}

#[test]
fn a_campaign_is_looked_at_before_it_is_stored_and_approved_by_its_content() {
    let server = Server::start();
    let create = [
        "campaign",
        "create",
        "spring",
        "--rotate",
        "GUEK",
        "--batch",
        "B-1",
        "--meter",
        METER,
        "--window",
        "mon-fri 22:00-05:00",
    ];
    let output = server.kms(&create);
    let shown = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    for words in ["1 have no head-end", "2, 18", "(none)", "hes-1", METER, "nothing was stored: --commit"] {
        assert!(shown.contains(words), "{words}: {shown}");
    }
    let stored = text(&server.kms(&[&create[..], &["--commit"]].concat()).stdout);
    assert!(stored.contains("rotate GUEK") && stored.contains("another person approves it"), "{stored}");

    let id = "01939e7e-7c1b-7000-8000-000000000001";
    let content = "c5".repeat(32);
    let listed = text(&server.kms(&["campaign", "list"]).stdout);
    assert!(listed.contains(id) && listed.contains("1 of 2"), "{listed}");
    assert!(text(&server.kms(&["campaign", "show", id]).stdout).contains(&content));
    // Without a terminal nobody is asked: the content must be named.
    assert_eq!(server.kms(&["campaign", "approve", id]).status.code(), Some(2));
    assert_eq!(server.kms(&["campaign", "approve", id, "--yes"]).status.code(), Some(2));
    assert!(text(&server.kms(&["campaign", "approve", id, "--content", &content]).stdout).contains("approved"));
    assert_ne!(server.kms(&["campaign", "approve", id, "--content", &"00".repeat(32)]).status.code(), Some(0));
    assert_eq!(server.kms(&["campaign", "start", id]).status.code(), Some(2));
    assert!(text(&server.kms(&["campaign", "start", id, "--yes"]).stdout).contains("running"));
    assert!(text(&server.kms(&["campaign", "pause", id, "--reason", "storm"]).stdout).contains("storm"));
    let aborted = text(&server.kms(&["campaign", "abort", id, "--reason", "wrong", "--yes"]).stdout);
    assert!(aborted.contains("1 meter in doubt") && aborted.contains(METER), "{aborted}");
}

#[test]
fn a_campaign_is_watched_and_reported() {
    let server = Server::start();
    let id = "01939e7e-7c1b-7000-8000-000000000001";
    let watched = text(&server.kms(&["campaign", "watch", id]).stdout);
    for words in ["running: 0 of 20", "finished: 2 of 20", "4 a minute", "2 minutes left", "no answer: 1", "under way"]
    {
        assert!(watched.contains(words), "{words}: {watched}");
    }
    let once = text(&server.kms(&["campaign", "watch", id, "--once"]).stdout);
    assert!(once.contains("running: 0 of 20") && !once.contains("finished"), "{once}");
    let lines = text(&server.kms(&["campaign", "watch", id, "--output", "json"]).stdout);
    let last: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!((lines.lines().count(), &last["campaign"]["state"]), (3, &Value::from("finished")));

    let report = text(&server.kms(&["campaign", "report", id]).stdout);
    assert!(report.contains("KAM") && report.contains(METER), "{report}");
    let output = server.kms(&["campaign", "report", id, "--html", "report.html", "--json", "report.json"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let page = std::fs::read_to_string(server.directory.path().join("report.html")).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.contains("<svg") && page.contains(METER));
    let json: Value =
        serde_json::from_slice(&std::fs::read(server.directory.path().join("report.json")).unwrap()).unwrap();
    assert_eq!(json["tasks"][0]["meter"], Value::from(METER));
    // What a take-over came to, by batch.
    let accepted = text(&server.kms(&["campaign", "report", id, "--acceptance"]).stdout);
    for words in
        ["1 of 2 meters have only keys", "B-1", "1 by a local visit", "not healed against recorded traffic", "vendor"]
    {
        assert!(accepted.contains(words), "{words}: {accepted}");
    }
    let accepted = server.kms(&["--output", "json", "campaign", "report", id, "--acceptance"]);
    let accepted: Value = serde_json::from_slice(&accepted.stdout).unwrap();
    assert_eq!(
        (&accepted["acceptance"]["healed"], &accepted["acceptance"]["batches"][0]["keys"]["not_healed"]),
        (&Value::from(1), &Value::from(1))
    );
    // What is there already is not overwritten.
    assert_eq!(server.kms(&["campaign", "report", id, "--html", "report.html"]).status.code(), Some(1));
}

#[test]
fn a_server_or_client_that_is_not_accepted_is_said_to_be() {
    let (server, other) = (Server::start(), Server::start());
    let ca = other.profile().directory().join("ca.pem");
    std::fs::copy(server.profile().directory().join("ca.pem"), &ca).unwrap();
    let output = other.kms(&["principal", "whoami"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("the server's certificate is not acceptable"), "{}", text(&output.stderr));
    // A certificate of another island.
    for file in ["certificate.pem", "key.pem"] {
        std::fs::copy(other.profile().directory().join(file), server.profile().directory().join(file)).unwrap();
    }
    let output = server.kms(&["principal", "whoami"]);
    assert!(text(&output.stderr).contains("did not accept"), "{}", text(&output.stderr));
    assert_eq!(output.status.code(), Some(1));
}

#[test]
#[cfg(unix)]
fn a_session_shows_no_key_and_writes_them_only_where_asked() {
    use std::os::unix::fs::PermissionsExt as _;
    let server = Server::start();
    assert!(text(&server.kms(&["session", "open", METER]).stderr).contains("register-transport-key"));
    let output = server.kms(&["principal", "register-transport-key"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));

    let output = server.kms(&["session", "open", METER, "--client-title", "4D4D4D0000000001"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    for words in ["GUEK", "GAK", "check value", "1001 to 2000, each once", "The keys are not shown"] {
        assert!(shown.contains(words), "{shown}");
    }
    let json = server.kms(&["--output", "json", "session", "open", METER, "--write-keys", "session.json"]);
    assert_eq!(json.status.code(), Some(0), "{}", text(&json.stderr));
    let written = server.directory.path().join("session.json");
    assert_eq!(std::fs::metadata(&written).unwrap().permissions().mode() & 0o777, 0o600);
    let written: Value = serde_json::from_slice(&std::fs::read(written).unwrap()).unwrap();
    assert_eq!(written["meters"][0]["keys"][0]["key"], hex::encode_upper(GUEK));
    for output in [&output, &json] {
        let all = (text(&output.stdout) + &text(&output.stderr)).to_uppercase();
        assert!(!all.contains(&hex::encode_upper(GUEK)) && !all.contains(&hex::encode_upper(GAK)));
    }
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(
        (&json["meters"][0]["lease"]["first"], &json["meters"][0]["meter"]),
        (&Value::from(1001), &Value::from(METER))
    );
    // A file that is there is not overwritten, and nothing is granted for it.
    let granted = server.recorded("open_session");
    assert_eq!(server.kms(&["session", "open", METER, "--write-keys", "session.json"]).status.code(), Some(1));
    assert_eq!(server.recorded("open_session"), granted);
}

#[test]
fn a_shipment_is_uploaded_imported_and_its_refused_lines_are_reported() {
    let server = Server::start();
    let content: Vec<u8> = (0..700_000_u32).flat_map(u32::to_be_bytes).collect();
    std::fs::write(server.directory.path().join("B-1.jsonl"), &content).unwrap();
    std::fs::write(server.directory.path().join("B-1.jsonl.sig"), b"signature").unwrap();
    // A part has arrived before.
    server.shared.lock().unwrap().uploaded = content[..1_000_000].to_vec();
    let arguments = [
        "shipment",
        "import",
        "B-1.jsonl",
        "--manufacturer",
        "urn:meterkms:dev:manufacturer:kam",
        "--report",
        "report.jsonl",
    ];
    let output = server.kms(&arguments);
    assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));
    assert!(server.shared.lock().unwrap().uploaded == content);
    let shown = text(&output.stdout);
    let of_keys = ["keys that another meter has too", "4B414D0000000032", "0.0.43.0.0.255", "4B414D0000000007"];
    for words in
        ["keys[0].wrapped", "refused lines", "and 10 more, all in the report file", "999"].into_iter().chain(of_keys)
    {
        assert!(shown.contains(words), "{shown}");
    }
    assert!(text(&output.stderr).contains("1 key is equal to a key of another meter"), "{}", text(&output.stderr));
    let report = std::fs::read_to_string(server.directory.path().join("report.jsonl")).unwrap();
    assert_eq!(report.lines().count(), 31);
    let first: Value = serde_json::from_str(report.lines().next().unwrap()).unwrap();
    assert_eq!(first["refused_line"]["line"], 2);
    let output = server.kms(&[
        "--output",
        "json",
        "shipment",
        "import",
        "B-1.jsonl",
        "--manufacturer",
        "urn:meterkms:dev:manufacturer:kam",
    ]);
    let answer: Value = serde_json::from_str(&text(&output.stdout)).unwrap();
    assert_eq!(
        (&answer["duplicate_keys"][0]["line"], &answer["duplicate_keys"][0]["key_type"]),
        (&Value::from(50), &Value::from("GUEK")),
        "{answer}"
    );
}

#[test]
fn adding_a_principal_makes_its_key_here_and_a_profile_that_works() {
    let server = Server::start();
    let output = server.kms(&["principal", "add", "urn:meterkms:dev:officer:bob", "--person", "Bob Example"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let output = server.kms(&["--profile", "bob", "principal", "whoami"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let output = server.kms(&["principal", "add", "urn:meterkms:dev:officer:bob"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("not overwritten"));
}

#[test]
fn a_code_is_made_here_and_names_the_root_of_the_officers_profile() {
    let server = Server::start();
    let output = server.kms(&["handheld", "invite", "h-15", "--technician", "Tom Field", "--minutes", "15"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    for words in ["h-15", "Tom Field", "pending until 2026-", "kms field enrol HOST:PORT -\n"] {
        assert!(shown.contains(words), "{words}: {shown}");
    }
    // Not in a command, whose arguments other programs can read.
    assert_eq!(shown.matches("h-15/").count(), 1, "{shown}");
    let output = server.kms(&["--output", "json", "handheld", "invite", "h-17", "--technician", "Tom Field"]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let code = kms_client::field::EnrolmentCode::parse(json["code"].as_str().unwrap()).unwrap();
    let root = rustls_pki_types::pem::PemObject::from_pem_file(server.profile().directory().join("ca.pem"));
    let root: rustls_pki_types::CertificateDer<'_> = root.unwrap();
    assert!(code.is_root(&root) && code.name() == "h-17");
    let again = server.kms(&["--output", "json", "handheld", "invite", "h-17", "--technician", "Tom Field"]);
    assert_ne!(serde_json::from_slice::<Value>(&again.stdout).unwrap()["code"], json["code"]);
    // A server that names a root of its own.
    let output = server.kms(&["handheld", "invite", "h-66", "--technician", "Tom Field"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("another root certificate") && !text(&output.stdout).contains("h-66/"));

    assert_eq!(server.kms(&["handheld", "hand-over", "h-17", "--technician", "Una"]).status.code(), Some(2));
    let handed = text(&server.kms(&["handheld", "hand-over", "h-17", "--technician", "Una Field", "--yes"]).stdout);
    assert!(handed.contains("Una Field") && handed.contains("h-17/"), "{handed}");
    let withdrawn = server.kms(&["handheld", "withdraw-invitation", "h-18", "--reason", "wrong person"]);
    assert!(text(&withdrawn.stdout).contains("withdrawn"));
    let listed = text(&server.kms(&["handheld", "list"]).stdout);
    for words in [
        "h-17",
        "Tom Field",
        "software",
        "used",
        "h-18",
        "not enrolled",
        "Una Field",
        "2 wrong codes",
        "does not verify",
    ] {
        assert!(listed.contains(words), "{words}: {listed}");
    }
}

#[test]
fn groups_and_device_types_have_keys_of_their_own() {
    let server = Server::start();
    let shown = |arguments: &[&str]| {
        let output = server.kms(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", text(&output.stderr));
        text(&output.stdout)
    };
    assert!(shown(&["group", "list"]).contains("north"));
    let group = shown(&["group", "show", "north"]);
    assert!(group.contains("GBEK") && group.contains("pre-active"), "{group}");
    let rotation = shown(&["group", "rotation", "north", "--behind"]);
    for words in ["rolling out", "1,000   25 %", "[##########", "95 %", "member-left", METER, "in-service", "not begun"]
    {
        assert!(rotation.contains(words), "{words}: {rotation}");
    }
    let json = shown(&["--output", "json", "group", "rotation", "north"]);
    assert!(json.contains("\"acknowledged\": 1000") && json.contains("\"stage\": \"rolling-out\""), "{json}");
    assert!(
        shown(&["group", "switch", "north", "--to", "2", "--early", "--reason", "stolen", "--yes"])
            .contains("switched: the former version")
    );
    assert_eq!(server.kms(&["group", "switch", "north", "--to", "2", "--yes"]).status.code(), Some(1));
    assert_eq!(
        server.kms(&["group", "switch", "north", "--to", "2", "--early", "--yes"]).status.code(),
        Some(2),
        "without a reason"
    );
    assert!(shown(&["group", "set", "north", "--switch-at", "98"]).contains("98 % of its members"));
    assert!(shown(&["group", "add-members", "north", "--meter", METER]).contains("1 meter added to the group"));
    let gone =
        shown(&["group", "remove-members", "north", "--meter", METER, "--compromised", "--reason", "opened", "--yes"]);
    assert!(gone.contains("1 meter removed from the group"), "{gone}");
    let made = shown(&["group", "key", "create", "north", "--type", "GBEK"]);
    assert!(made.contains("pre-active, generated") && made.contains("rotation"), "{made}");
    let made =
        shown(&["group", "key", "create", "north", "--type", "GBEK", "--setup", "0.0.43.0.0.255", "--held-by-meters"]);
    assert!(made.contains("active, generated") && !made.contains("rotation"), "{made}");
    let json = shown(&["--output", "json", "group", "key", "create", "north", "--type", "GBEK"]);
    assert_eq!(serde_json::from_str::<Value>(&json).unwrap()["version"]["state"], "pre-active");
    assert_eq!(server.kms(&["group", "show", "North"]).status.code(), Some(2));

    let added =
        shown(&["device-type", "add", "kam-gateway", "--manufacturer", "KAM", "--device-profile", "gateway-suite0"]);
    assert!(added.contains("kam-gateway") && added.contains("gateway-suite0"), "{added}");
    assert!(shown(&["device-type", "list"]).contains("no device types"));
    assert_eq!(server.kms(&["device-type", "show", "kam-gateway"]).status.code(), Some(1));
    assert!(
        shown(&["device-type", "key", "create", "kam-gateway", "--type", "FIRMWARE"])
            .contains("FIRMWARE version 1 of kam-gateway")
    );

    assert_eq!(server.kms(&["principal", "register-transport-key"]).status.code(), Some(0));
    let refused = server.kms(&["session", "open-group", "north"]);
    assert_eq!(refused.status.code(), Some(3), "{}", text(&refused.stderr));
}

pub(crate) fn text(octets: &[u8]) -> String {
    String::from_utf8(octets.to_vec()).unwrap()
}

/// A server with a CA and a profile of its own.
pub(crate) struct Server {
    directory: tempfile::TempDir,
    shared: Arc<Mutex<Shared>>,
    _runtime: tokio::runtime::Runtime,
}

#[derive(Default)]
struct Shared {
    calls: Vec<&'static str>,
    uploaded: Vec<u8>,
    transport_certificate: Vec<u8>,
    transport_public: Vec<u8>,
}

impl Server {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_certificate = ca.self_signed(&ca_key).unwrap();
        let authority = Arc::new(Authority { issuer: Issuer::new(ca, ca_key), root: ca_certificate.der().to_vec() });
        let server_key = KeyPair::generate().unwrap();
        let server_certificate = CertificateParams::new(["localhost".to_owned()])
            .unwrap()
            .signed_by(&server_key, &authority.issuer)
            .unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(ca_certificate.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let clients =
            rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                .build()
                .unwrap();
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(clients)
            .with_single_cert(
                vec![server_certificate.der().clone()],
                rustls_pki_types::PrivateKeyDer::try_from(server_key.serialize_der()).unwrap(),
            )
            .unwrap();
        tls.alpn_protocols = vec![b"h2".to_vec()];

        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
        let incoming = TcpListenerStream::new(listener).then(move |stream| {
            let acceptor = acceptor.clone();
            async move { acceptor.accept(stream?).await }
        });
        // A failed handshake ends one connection, not the server.
        let incoming = incoming.filter(Result::is_ok);
        let shared = Arc::<Mutex<Shared>>::default();
        let mock = Mock { shared: Arc::clone(&shared), authority: Arc::clone(&authority) };
        let router = tonic::transport::Server::builder()
            .add_service(meter_service_server::MeterServiceServer::new(mock.clone()))
            .add_service(principal_service_server::PrincipalServiceServer::new(mock.clone()))
            .add_service(shipment_service_server::ShipmentServiceServer::new(mock.clone()))
            .add_service(hsm_service_server::HsmServiceServer::new(mock.clone()))
            .add_service(group_service_server::GroupServiceServer::new(mock.clone()))
            .add_service(device_type_service_server::DeviceTypeServiceServer::new(mock.clone()))
            .add_service(audit_service_server::AuditServiceServer::new(mock.clone()))
            .add_service(exposure_service_server::ExposureServiceServer::new(mock.clone()))
            .add_service(campaign_service_server::CampaignServiceServer::new(mock.clone()))
            .add_service(work_order_service_server::WorkOrderServiceServer::new(OrderMock::default()))
            .add_service(handheld_service_server::HandheldServiceServer::new(mock.clone()))
            .add_service(grant_service_server::GrantServiceServer::new(mock));
        runtime.spawn(router.serve_with_incoming(incoming));

        let principal = PrincipalId::parse(PRINCIPAL).unwrap();
        let made = KeyRequest::generate(&principal).unwrap();
        let issued = authority.certify(&principal.to_string(), made.certificate_request());
        let state = StateDirectory::new(directory.path().join(".kms"));
        let new = NewProfile {
            server: &address.to_string(),
            server_name: "localhost",
            principal: &principal,
            ca_pem: &ca_certificate.pem(),
            certificate_pem: &KeyRequest::chain_pem(&issued),
            key_pem: made.key_pem(),
        };
        Profile::create(state.profile_directory("ada"), &new).unwrap();
        state.set_default_profile("ada").unwrap();
        Self { directory, shared, _runtime: runtime }
    }

    pub(crate) fn kms(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kms"));
        command
            .args(arguments)
            .current_dir(self.directory.path())
            .env_remove("KMS_PROFILE")
            .env_remove("KMS_STATE")
            .output()
            .unwrap()
    }

    /// The folder in which `kms` runs.
    pub(crate) fn folder(&self) -> &std::path::Path {
        self.directory.path()
    }

    fn profile(&self) -> Profile {
        let directory: PathBuf = self.directory.path().join(".kms");
        StateDirectory::new(directory).profile("ada").unwrap()
    }

    fn recorded(&self, call: &str) -> usize {
        self.shared.lock().unwrap().calls.iter().filter(|made| **made == call).count()
    }
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: Vec<u8>,
}

impl Authority {
    fn certify(&self, principal: &str, request: &[u8]) -> PrincipalCertificate {
        let request = CertificateSigningRequestParams::from_der(&request.to_vec().into()).unwrap();
        let certificate = request.signed_by(&self.issuer).unwrap();
        PrincipalCertificate {
            principal: Some(Principal { principal: principal.into(), status: "enabled".into(), ..Default::default() }),
            certificate: certificate.der().to_vec().into(),
            chain: vec![self.root.clone().into()],
        }
    }
}

#[derive(Clone)]
struct Mock {
    shared: Arc<Mutex<Shared>>,
    authority: Arc<Authority>,
}

fn nothing<T>() -> Answer<T> {
    Err(Status::unimplemented("the mock has no answer"))
}

#[tonic::async_trait]
impl meter_service_server::MeterService for Mock {
    async fn list_meters(&self, _: Request<ListMetersRequest>) -> Answer<ListMetersResponse> {
        Ok(Response::new(ListMetersResponse { meters: vec![summary()], total: 1, ..Default::default() }))
    }

    async fn show_meter(&self, request: Request<ShowMeterRequest>) -> Answer<Meter> {
        if hex::encode_upper(&request.get_ref().meter) != METER {
            return Err(Status::permission_denied("showMeter is not permitted"));
        }
        let exposure = Exposure { party: "hes-1".into(), since_ms: 1_795_248_000_000, reason: "grant".into() };
        let version = KeyVersion {
            number: 1,
            state: "active".into(),
            origin: "diversified".into(),
            candidate: true,
            exposures: vec![exposure],
            ..Default::default()
        };
        let counter = Counter {
            client_title: hex::decode("4D4D4D0000000001").unwrap().into(),
            key_version: 1,
            reserved_below: 2001,
            ..Default::default()
        };
        let setup = SecuritySetup {
            obis: vec![0, 0, 43, 0, 0, 255].into(),
            slots: vec![KeySlot {
                key_type: "GUEK".into(),
                versions: vec![version, KeyVersion { number: 2, candidate: true, ..new_version("pre-active") }],
                in_doubt: true,
                compromised: true,
            }],
            counters: vec![counter],
        };
        let transfer = MeterTransfer {
            transfer_id: vec![7; 16].into(),
            security_setup: vec![0, 0, 43, 0, 0, 255].into(),
            keys: vec![TransferredKey { key_type: "GUEK".into(), version: 2, left: true }],
            head_end: "urn:meterkms:north:head-end:hes-1".into(),
            step: 3,
            stage: "deliver".into(),
            not_after_ms: 1_795_248_000_000,
            ..Default::default()
        };
        let meter = Meter {
            summary: Some(summary()),
            security_setups: vec![setup],
            generation: 3,
            transfer: Some(transfer),
            ..Default::default()
        };
        Ok(Response::new(meter))
    }

    async fn assign_meters(&self, _: Request<AssignMetersRequest>) -> Answer<ChangeMetersResponse> {
        let problem = MeterProblem {
            meter: hex::decode("4B414D0000000002").unwrap().into(),
            reason: "no such meter for you".into(),
            code: MeterProblemCode::NotPermitted.into(),
        };
        Ok(Response::new(ChangeMetersResponse { changed: 1, problems: vec![problem], ..Default::default() }))
    }

    async fn adopt_counters(&self, _: Request<AdoptCountersRequest>) -> Answer<ChangeMetersResponse> {
        nothing()
    }

    async fn report_compromise(&self, _: Request<ReportCompromiseRequest>) -> Answer<Meter> {
        nothing()
    }

    async fn propose_counter_raise(&self, _: Request<ProposeCounterRaiseRequest>) -> Answer<Proposal> {
        nothing()
    }

    async fn enrol_meters(&self, _: Request<EnrolMetersRequest>) -> Answer<ChangeMetersResponse> {
        nothing()
    }

    async fn retire_meters(&self, _: Request<RetireMetersRequest>) -> Answer<ChangeMetersResponse> {
        let details = ErrorDetails::with_retry_info(Some(std::time::Duration::from_secs(2)));
        Err(Status::with_error_details(tonic::Code::Unavailable, "the database does not answer", details))
    }

    async fn replace_meter(&self, _: Request<ReplaceMeterRequest>) -> Answer<ChangeMetersResponse> {
        nothing()
    }
}

fn summary() -> MeterSummary {
    MeterSummary {
        meter: hex::decode(METER).unwrap().into(),
        manufacturer: "KAM".into(),
        serial: "10000001".into(),
        device_profile: "generic-suite0".into(),
        status: "in-service".into(),
        compromised: true,
        ..Default::default()
    }
}

#[tonic::async_trait]
impl principal_service_server::PrincipalService for Mock {
    async fn add_principal(&self, request: Request<AddPrincipalRequest>) -> Answer<PrincipalCertificate> {
        let request = request.into_inner();
        Ok(Response::new(self.authority.certify(&request.principal, &request.certificate_request)))
    }

    async fn renew_principal(&self, _: Request<RenewPrincipalRequest>) -> Answer<PrincipalCertificate> {
        nothing()
    }

    async fn register_transport_key(
        &self,
        request: Request<RegisterTransportKeyRequest>,
    ) -> Answer<PrincipalCertificate> {
        let issued = self.authority.certify(PRINCIPAL, &request.get_ref().certificate_request);
        let mut shared = self.shared.lock().unwrap();
        shared.transport_certificate = issued.certificate.to_vec();
        // The point stands at the end of the SubjectPublicKeyInfo, after its bit string's header.
        let marker = [0x03, 0x42, 0x00, 0x04];
        let start = issued.certificate.windows(4).position(|window| window == marker).unwrap() + 3;
        shared.transport_public = issued.certificate[start..start + 65].to_vec();
        drop(shared);
        Ok(Response::new(issued))
    }

    async fn propose_principal_key(&self, _: Request<ProposePrincipalKeyRequest>) -> Answer<Proposal> {
        nothing()
    }

    async fn end_certificate(&self, _: Request<EndCertificateRequest>) -> Answer<Principal> {
        nothing()
    }

    async fn disable_principal(&self, _: Request<DisablePrincipalRequest>) -> Answer<Principal> {
        nothing()
    }

    async fn list_principals(&self, _: Request<ListPrincipalsRequest>) -> Answer<ListPrincipalsResponse> {
        nothing()
    }

    async fn who_am_i(&self, _: Request<WhoAmIRequest>) -> Answer<Principal> {
        Ok(Response::new(Principal { principal: PRINCIPAL.into(), status: "enabled".into(), ..Default::default() }))
    }
}

impl Mock {
    fn invitation(&self, name: &str, technician: String, code: Option<CodeDigest>) -> Answer<Invitation> {
        let code = code.unwrap();
        assert_eq!((code.code_id.len(), code.sha256.len()), (6, 32));
        Ok(Response::new(Invitation {
            handheld: format!("urn:meterkms:dev:handheld:{name}"),
            technician,
            state: "pending".into(),
            occasion: "first".into(),
            code_id: code.code_id,
            invited_by: PRINCIPAL.into(),
            expires_ms: 1_795_165_200_000,
            // A server that names another root wants devices to trust another server.
            root_certificate: if name == "h-66" { vec![1; 300].into() } else { self.authority.root.clone().into() },
            ..Default::default()
        }))
    }
}

#[tonic::async_trait]
impl handheld_service_server::HandheldService for Mock {
    async fn invite_handheld(&self, request: Request<InviteHandheldRequest>) -> Answer<Invitation> {
        let message = request.into_inner();
        assert_eq!(message.lifetime_seconds, if message.name == "h-15" { 900 } else { 0 });
        self.invitation(&message.name, message.technician, message.code)
    }

    async fn hand_over_handheld(&self, request: Request<HandOverHandheldRequest>) -> Answer<Invitation> {
        let message = request.into_inner();
        self.invitation(&message.name, message.technician, message.code)
    }

    async fn withdraw_invitation(&self, request: Request<WithdrawInvitationRequest>) -> Answer<Invitation> {
        let message = request.into_inner();
        let handheld = format!("urn:meterkms:dev:handheld:{}", message.name);
        Ok(Response::new(Invitation { handheld, state: "withdrawn".into(), ..Default::default() }))
    }

    async fn list_handhelds(&self, _: Request<ListHandheldsRequest>) -> Answer<ListHandheldsResponse> {
        let principal = Principal {
            principal: "urn:meterkms:dev:handheld:h-17".into(),
            status: "enabled".into(),
            person: "Tom Field".into(),
            assurance: "software".into(),
            ..Default::default()
        };
        let invitation = |state: &str, wrong_codes| Invitation {
            technician: "Una Field".into(),
            state: state.into(),
            expires_ms: 1_795_165_200_000,
            wrong_codes,
            ..Default::default()
        };
        let handhelds = vec![
            Handheld {
                handheld: principal.principal.clone(),
                principal: Some(principal),
                invitation: Some(invitation("used", 0)),
                ..Default::default()
            },
            Handheld {
                handheld: "urn:meterkms:dev:handheld:h-18".into(),
                invitation: Some(invitation("pending", 2)),
                ..Default::default()
            },
            Handheld { handheld: "urn:meterkms:dev:handheld:h-19".into(), unreadable: true, ..Default::default() },
        ];
        Ok(Response::new(ListHandheldsResponse { handhelds }))
    }
}

#[tonic::async_trait]
impl shipment_service_server::ShipmentService for Mock {
    async fn upload_shipment(&self, request: Request<Streaming<UploadShipmentRequest>>) -> Answer<Shipment> {
        let mut parts = request.into_inner();
        let mut first = true;
        while let Some(part) = parts.next().await {
            let part = part?;
            assert_eq!(part.start.is_some(), first);
            first = false;
            let mut shared = self.shared.lock().unwrap();
            assert_eq!(part.offset, shared.uploaded.len() as u64);
            shared.uploaded.extend_from_slice(&part.octets);
        }
        let received = self.shared.lock().unwrap().uploaded.len() as u64;
        Ok(Response::new(Shipment { received, file_length: received, state: "uploaded".into(), ..Default::default() }))
    }

    type ImportShipmentStream = Steps<ImportShipmentResponse>;

    async fn import_shipment(&self, _: Request<ImportShipmentRequest>) -> Answer<Self::ImportShipmentStream> {
        let shipment = |imported, refused, state: &str| Shipment {
            devices: 1029,
            imported,
            refused,
            duplicates: 1,
            state: state.into(),
            batch: "B-1".into(),
            ..Default::default()
        };
        let line = |line| RefusedLine {
            line,
            field: "keys[0].wrapped".into(),
            reason: "does not open under the batch key".into(),
        };
        let duplicate = DuplicateKey {
            line: 50,
            meter: vec![0x4B, 0x41, 0x4D, 0, 0, 0, 0, 0x32].into(),
            key_type: "GUEK".into(),
            other_meter: vec![0x4B, 0x41, 0x4D, 0, 0, 0, 0, 0x07].into(),
            security_setup: vec![0, 0, 43, 0, 0, 255].into(),
        };
        let steps = [
            ImportShipmentResponse {
                shipment: Some(shipment(500, 15, "importing")),
                refused_lines: (2..17).map(line).collect(),
                duplicate_keys: vec![duplicate],
            },
            ImportShipmentResponse {
                shipment: Some(shipment(999, 30, "imported")),
                refused_lines: (600..615).map(line).collect(),
                ..Default::default()
            },
        ];
        Ok(Response::new(tokio_stream::iter(steps.map(Ok).to_vec())))
    }

    async fn get_shipment(&self, _: Request<GetShipmentRequest>) -> Answer<Shipment> {
        match self.shared.lock().unwrap().uploaded.len() as u64 {
            0 => Err(Status::not_found("no such shipment")),
            received => Ok(Response::new(Shipment { received, state: "uploading".into(), ..Default::default() })),
        }
    }

    async fn list_shipments(&self, _: Request<ListShipmentsRequest>) -> Answer<ListShipmentsResponse> {
        nothing()
    }

    async fn get_vendor_transport_key(&self, _: Request<GetVendorTransportKeyRequest>) -> Answer<VendorTransportKey> {
        nothing()
    }
}

#[tonic::async_trait]
impl group_service_server::GroupService for Mock {
    async fn list_groups(&self, _: Request<ListGroupsRequest>) -> Answer<ListGroupsResponse> {
        Ok(Response::new(ListGroupsResponse {
            groups: vec![Group { number: 7, name: "north".into(), ..Default::default() }],
            ..Default::default()
        }))
    }

    async fn show_group(&self, request: Request<ShowGroupRequest>) -> Answer<Group> {
        let setup = SecuritySetup {
            obis: vec![0, 0, 43, 0, 0, 255].into(),
            slots: vec![KeySlot {
                key_type: "GBEK".into(),
                versions: vec![new_version("pre-active")],
                ..Default::default()
            }],
            ..Default::default()
        };
        Ok(Response::new(Group {
            number: 7,
            name: request.into_inner().group,
            security_setups: vec![setup],
            generation: 2,
            ..Default::default()
        }))
    }

    async fn create_group_key(&self, request: Request<CreateGroupKeyRequest>) -> Answer<CreateKeyResponse> {
        let request = request.into_inner();
        assert_eq!(
            (request.group.as_str(), request.key_type.as_str(), request.request_id.len()),
            ("north", "GBEK", 16)
        );
        let state = if request.held_by_meters { "active" } else { "pre-active" };
        Ok(Response::new(CreateKeyResponse { version: Some(new_version(state)) }))
    }

    async fn show_group_rotation(&self, request: Request<ShowGroupRotationRequest>) -> Answer<GroupRotation> {
        let request = request.into_inner();
        assert_eq!((request.group.as_str(), request.key_type.as_str()), ("north", "GBEK"));
        Ok(Response::new(rotation("rolling-out")))
    }

    async fn list_members_behind(&self, _: Request<ListMembersBehindRequest>) -> Answer<ListMembersBehindResponse> {
        let member = MemberBehind {
            meter: octets(METER),
            status: "in-service".into(),
            acknowledged_version: 1,
            delivered: true,
            ..Default::default()
        };
        Ok(Response::new(ListMembersBehindResponse { members: vec![member], ..Default::default() }))
    }

    async fn switch_group_key(&self, request: Request<SwitchGroupKeyRequest>) -> Answer<GroupRotation> {
        let request = request.into_inner();
        match (request.version, request.early, request.reason.as_str()) {
            (2, true, "stolen") => Ok(Response::new(rotation("switched"))),
            _ => Err(Status::failed_precondition("fewer than 95 % of the members have acknowledged the new version")),
        }
    }

    async fn set_switch_threshold(&self, request: Request<SetSwitchThresholdRequest>) -> Answer<Group> {
        let request = request.into_inner();
        Ok(Response::new(Group {
            number: 7,
            name: request.group,
            switch_threshold_percent: request.percent,
            ..Default::default()
        }))
    }

    async fn change_group_members(&self, request: Request<ChangeGroupMembersRequest>) -> Answer<ChangeMetersResponse> {
        let request = request.into_inner();
        let needs_reason = request.change() != MembershipChange::Add;
        assert_eq!((request.meters.as_slice(), request.reason.is_empty()), ([octets(METER)].as_slice(), !needs_reason));
        Ok(Response::new(ChangeMetersResponse { changed: 1, ..Default::default() }))
    }
}

fn rotation(stage: &str) -> GroupRotation {
    GroupRotation {
        group: "north".into(),
        security_setup: vec![0, 0, 43, 0, 0, 255].into(),
        key_type: "GBEK".into(),
        active_version: 1,
        version: 2,
        stage: stage.into(),
        threshold_percent: 95,
        members: 4_000,
        acknowledged: 1_000,
        unacknowledged: 20,
        wanted_because: vec!["member-left".into()],
        ..Default::default()
    }
}

fn octets(hex: &str) -> Bytes {
    hex::decode(hex).unwrap().into()
}

fn new_version(state: &str) -> KeyVersion {
    KeyVersion { number: 1, state: state.into(), origin: "generated".into(), ..Default::default() }
}

#[tonic::async_trait]
impl device_type_service_server::DeviceTypeService for Mock {
    async fn add_device_type(&self, request: Request<AddDeviceTypeRequest>) -> Answer<DeviceType> {
        let AddDeviceTypeRequest { name, manufacturer, device_profile, .. } = request.into_inner();
        Ok(Response::new(DeviceType { number: 3, name, manufacturer, device_profile, ..Default::default() }))
    }

    async fn list_device_types(&self, _: Request<ListDeviceTypesRequest>) -> Answer<ListDeviceTypesResponse> {
        Ok(Response::new(ListDeviceTypesResponse::default()))
    }

    async fn show_device_type(&self, _: Request<ShowDeviceTypeRequest>) -> Answer<DeviceType> {
        Err(Status::not_found("device type `kam-gateway` does not exist"))
    }

    async fn create_device_type_key(&self, _: Request<CreateDeviceTypeKeyRequest>) -> Answer<CreateKeyResponse> {
        Ok(Response::new(CreateKeyResponse { version: Some(new_version("active")) }))
    }
}

#[tonic::async_trait]
impl hsm_service_server::HsmService for Mock {
    async fn check_hsm(&self, _: Request<CheckHsmRequest>) -> Answer<CheckHsmResponse> {
        let token = TokenCheck {
            label: "dev".into(),
            state: "unusable".into(),
            reason: "wrong PIN".into(),
            ..Default::default()
        };
        Ok(Response::new(CheckHsmResponse { tokens: vec![token] }))
    }

    async fn inventory_hsm(&self, _: Request<InventoryHsmRequest>) -> Answer<InventoryHsmResponse> {
        nothing()
    }
}

#[tonic::async_trait]
impl exposure_service_server::ExposureService for Mock {
    /// Two pages of a handheld; a meter that is known to two; for the rest an answer that lacks
    /// something.
    async fn list_exposures(&self, request: Request<ListExposuresRequest>) -> Answer<ListExposuresResponse> {
        use list_exposures_request::Subject;
        let request = request.into_inner();
        let meter = |number: u8| Bytes::from([b"KAM\0\0\0\0".as_slice(), &[number]].concat());
        let key = |number: u8, key_type: &str, reach: &str, way: ExposureWay| ExposedKey {
            meter: meter(number),
            security_setup: vec![0, 0, 43, 0, 0, 255].into(),
            key_type: key_type.into(),
            version: 1,
            known_to: "urn:meterkms:dev:handheld:hh-7".into(),
            since_ms: 1_795_165_200_000,
            ways: vec![way],
            reach: reach.into(),
            until_ms: if reach == "open" { 0 } else { 1_795_251_600_000 },
            meter_status: "in-service".into(),
            ..Default::default()
        };
        let bundle = || ExposureWay { reason: "bundle".into(), ..Default::default() };
        let frames = || ExposureWay {
            reason: "frames-under-exposed-key".into(),
            through_key_type: "GUEK".into(),
            through_version: 1,
            ..Default::default()
        };
        let answer = match (request.subject.unwrap(), request.page_token.as_ref()) {
            (Subject::Principal(uri), []) if uri == "urn:meterkms:dev:handheld:hh-7" => ListExposuresResponse {
                keys: vec![key(1, "GUEK", "open", bundle()), key(1, "GAK", "open", frames())],
                next_page_token: vec![1].into(),
                totals: Some(ExposureTotals { owners: 2, slots: 3, open: 2, equal_keys: 0 }),
                complete: true,
                ..Default::default()
            },
            (Subject::Principal(_), _) => ListExposuresResponse {
                keys: vec![key(2, "GUEK", "replaced", bundle())],
                complete: true,
                ..Default::default()
            },
            (Subject::Meter(_), _) => ListExposuresResponse {
                keys: vec![
                    key(1, "GUEK", "open", bundle()),
                    ExposedKey { known_to: "vendor".into(), ..key(1, "KEK", "closed", bundle()) },
                ],
                complete: true,
                ..Default::default()
            },
            (Subject::Group(_), _) => ListExposuresResponse { complete: true, ..Default::default() },
            (Subject::Anyone(_), _) => ListExposuresResponse::default(),
            _ => ListExposuresResponse {
                complete: true,
                unreadable: vec![UnreadableOwner {
                    meter: meter(9),
                    reason: "the seal does not fit".into(),
                    ..Default::default()
                }],
                ..Default::default()
            },
        };
        Ok(Response::new(answer))
    }
}

#[tonic::async_trait]
impl audit_service_server::AuditService for Mock {
    async fn list_audit_records(&self, _: Request<ListAuditRecordsRequest>) -> Answer<ListAuditRecordsResponse> {
        nothing()
    }

    type ScrubStream = Steps<ScrubResponse>;

    async fn scrub(&self, _: Request<ScrubRequest>) -> Answer<Self::ScrubStream> {
        let finding = ScrubFinding {
            kind: 1,
            id: hex::decode(METER).unwrap().into(),
            finding: "stale".into(),
            detail: "generation 3, the log has 4".into(),
        };
        let step = ScrubResponse { records_read: 10, rows_read: 5, findings: vec![finding], finished: true };
        Ok(Response::new(tokio_stream::iter(vec![Ok(step)])))
    }
}

fn campaign(state: &str) -> Campaign {
    Campaign {
        campaign_id: hex::decode(CAMPAIGN).unwrap().into(),
        plan: Some(CampaignPlan {
            name: "spring".into(),
            action: CampaignAction::Rotate.into(),
            key_type: "GUEK".into(),
            selection: Some(CampaignSelection { batch: "B-1".into(), ..Default::default() }),
            terms: Some(CampaignTerms {
                success_threshold: 95,
                failure_limit: Some(10),
                quorum: Some(1),
                ..Default::default()
            }),
            ..Default::default()
        }),
        state: state.into(),
        content_sha256: vec![0xC5; 32].into(),
        requester_person: "Ada".into(),
        meters: 20,
        waves: vec![2, 18],
        wave: 1,
        window_open: true,
        ..Default::default()
    }
}

fn progress(state: &str, succeeded: u64) -> CampaignProgress {
    let wave = WaveProgress { wave: 1, planned: 2, succeeded, pending: 2 - succeeded, ..Default::default() };
    let reasons = vec![NamedCount { name: "no answer".into(), count: 1 }];
    CampaignProgress { campaign: Some(campaign(state)), waves: vec![wave], per_minute: 4.0, eta_seconds: 90, reasons }
}

#[tonic::async_trait]
impl campaign_service_server::CampaignService for Mock {
    async fn create_campaign(&self, request: Request<CreateCampaignRequest>) -> Answer<CreateCampaignResponse> {
        let request = request.into_inner();
        let head_ends =
            vec![NamedCount { name: String::new(), count: 1 }, NamedCount { name: "hes-1".into(), count: 19 }];
        let preview = CampaignPreview {
            meters: 20,
            head_ends,
            waves: vec![2, 18],
            not_reachable: 1,
            sample: request.plan.unwrap().selection.unwrap().meters,
            ..Default::default()
        };
        Ok(Response::new(CreateCampaignResponse {
            preview: Some(preview),
            campaign: request.commit.then(|| campaign("draft")),
        }))
    }

    async fn list_campaigns(&self, _: Request<ListCampaignsRequest>) -> Answer<ListCampaignsResponse> {
        Ok(Response::new(ListCampaignsResponse { campaigns: vec![campaign("running")], ..Default::default() }))
    }

    async fn show_campaign(&self, _: Request<ShowCampaignRequest>) -> Answer<Campaign> {
        Ok(Response::new(campaign("draft")))
    }

    async fn approve_campaign(&self, request: Request<ApproveCampaignRequest>) -> Answer<Campaign> {
        if request.get_ref().content_sha256.as_ref() != [0xC5; 32] {
            return Err(Status::failed_precondition("the digest is not that of the campaign's content"));
        }
        Ok(Response::new(campaign("approved")))
    }

    async fn start_campaign(&self, _: Request<ChangeCampaignRequest>) -> Answer<Campaign> {
        Ok(Response::new(campaign("running")))
    }

    async fn pause_campaign(&self, request: Request<ChangeCampaignRequest>) -> Answer<Campaign> {
        Ok(Response::new(Campaign { reason: request.into_inner().reason, ..campaign("paused") }))
    }

    async fn resume_campaign(&self, _: Request<ChangeCampaignRequest>) -> Answer<Campaign> {
        Ok(Response::new(campaign("running")))
    }

    async fn abort_campaign(&self, _: Request<ChangeCampaignRequest>) -> Answer<Campaign> {
        Ok(Response::new(campaign("aborted")))
    }

    type WatchCampaignStream = Steps<CampaignProgress>;

    async fn watch_campaign(&self, _: Request<WatchCampaignRequest>) -> Answer<Self::WatchCampaignStream> {
        Ok(Response::new(tokio_stream::iter(vec![
            Ok(progress("running", 0)),
            Ok(progress("running", 1)),
            Ok(progress("finished", 2)),
        ])))
    }

    async fn report_acceptance(&self, _: Request<ReportAcceptanceRequest>) -> Answer<AcceptanceReport> {
        let key = |key_type: &str, verdict: &str, remedy: &str| KeyAcceptance {
            key_type: key_type.into(),
            version: 2,
            evidence: "proven".into(),
            verdict: verdict.into(),
            known_to: if remedy.is_empty() { Vec::new() } else { vec!["vendor".into()] },
            remedy: remedy.into(),
            ..Default::default()
        };
        let meter = |keys| MeterAcceptance {
            meter: hex::decode(METER).unwrap().into(),
            batch: "B-1".into(),
            keys,
            ..Default::default()
        };
        let meters = vec![
            meter(vec![key("KEK", "healed", ""), key("GUEK", "healed", "")]),
            meter(vec![key("KEK", "not-healed", "local-visit"), key("GUEK", "not-healed", "local-visit")]),
        ];
        Ok(Response::new(AcceptanceReport { meters, ..Default::default() }))
    }

    async fn report_campaign(&self, request: Request<ReportCampaignRequest>) -> Answer<CampaignReport> {
        let request = request.into_inner();
        let task = |state: &str| Task {
            meter: hex::decode(METER).unwrap().into(),
            state: state.into(),
            reason: "no answer".into(),
            ..Default::default()
        };
        let tasks = match (request.state.as_str(), request.in_doubt) {
            ("failed", false) => vec![task("failed")],
            ("", true) => vec![task("in-doubt")],
            _ => Vec::new(),
        };
        let outcome = OutcomeCount {
            wave: 1,
            manufacturer: "KAM".into(),
            state: "failed".into(),
            reason: "no answer".into(),
            count: 1,
        };
        Ok(Response::new(CampaignReport {
            progress: Some(progress("aborted", 1)),
            outcomes: vec![outcome],
            tasks,
            ..Default::default()
        }))
    }
}

const GUEK: [u8; 16] = [0xA1; 16];
const GAK: [u8; 16] = [0xA2; 16];

#[tonic::async_trait]
impl grant_service_server::GrantService for Mock {
    async fn open_session(&self, request: Request<OpenSessionRequest>) -> Answer<OpenSessionResponse> {
        let request = request.into_inner();
        let mut shared = self.shared.lock().unwrap();
        shared.calls.push("open_session");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as i64;
        let envelope = seal(&shared, &request, now);
        Ok(Response::new(OpenSessionResponse {
            envelopes: vec![envelope],
            audit_leaf: vec![7; 32].into(),
            rotation: None,
        }))
    }

    async fn open_group_session(&self, request: Request<OpenGroupSessionRequest>) -> Answer<OpenSessionResponse> {
        Err(Status::permission_denied(format!(
            "openGroupSession with group {} is not permitted",
            request.get_ref().group
        )))
    }

    type OpenSessionsStream = Steps<OpenSessionsResponse>;

    async fn open_sessions(&self, _: Request<OpenSessionsRequest>) -> Answer<Self::OpenSessionsStream> {
        nothing()
    }

    async fn list_grants(&self, _: Request<ListGrantsRequest>) -> Answer<ListGrantsResponse> {
        nothing()
    }

    async fn revoke_grant(&self, _: Request<RevokeGrantRequest>) -> Answer<RevokeGrantResponse> {
        nothing()
    }
}

/// An envelope with GUEK and GAK, as docs/formats.md says.
fn seal(shared: &Shared, request: &OpenSessionRequest, now: i64) -> proto::Envelope {
    let sha256 = |octets: &[u8]| digest::digest(&digest::SHA256, octets).as_ref().to_vec();
    let ephemeral = agreement::PrivateKey::generate(&agreement::ECDH_P256).unwrap();
    let ephemeral_public = ephemeral.compute_public_key().unwrap().as_ref().to_vec();
    let expiry = now + 900_000;
    let digest = sha256(&shared.transport_certificate);
    let derive = |key_use: u8| -> Vec<u8> {
        let info = [
            &b"meterkms/envelope"[..],
            &[1, 1, key_use],
            &ephemeral_public,
            &shared.transport_public,
            &digest,
            &[3],
            b"dev",
            &expiry.to_be_bytes(),
        ];
        let peer = agreement::UnparsedPublicKey::new(&agreement::ECDH_P256, &shared.transport_public);
        agreement::agree(&ephemeral, peer, (), |z| Ok(sha256(&[z, &[0, 0, 0, 1], &sha256(&info.concat())].concat())))
            .unwrap()
    };
    let kek = derive(1);
    let wrap = |key: &[u8]| {
        use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrap as _};
        let mut wrapped = vec![0; key.len() + 8];
        AesKek::new(&AES_256, &kek).unwrap().wrap(key, &mut wrapped).unwrap();
        Bytes::from(wrapped)
    };
    let key = |name: &str, octets: &[u8]| GrantedKey {
        key_type: name.into(),
        version: 1,
        wrapped: wrap(octets),
        in_doubt: false,
    };
    let lease = CounterLease {
        client_title: hex::decode("4D4D4D0000000001").unwrap().into(),
        key_version: 1,
        first: 1001,
        count: 1000,
    };
    let meter = MeterKeys {
        meter: request.meter.clone(),
        security_setup: vec![0, 0, 43, 0, 0, 255].into(),
        security_suite: 0,
        keys: vec![key("GUEK", &GUEK), key("GAK", &GAK)],
        lease: Some(lease),
    };
    let manifest = Manifest {
        principal: PRINCIPAL.into(),
        grant_id: vec![5; 16].into(),
        request_id: request.request_id.clone(),
        purpose: request.terms.as_ref().unwrap().purpose,
        issued_ms: now,
        not_after_ms: expiry,
        meters: vec![meter],
        ..Default::default()
    };
    let header = EnvelopeHeader {
        algorithm: EnvelopeAlgorithm::EcdhP256X963Sha256.into(),
        island: "dev".into(),
        ephemeral_public: ephemeral_public.clone().into(),
        transport_certificate_sha256: digest.clone().into(),
        not_after_ms: expiry,
    };
    let (header, manifest) = (header.encode_to_vec(), manifest.encode_to_vec());
    let key = hmac::Key::new(hmac::HMAC_SHA256, &derive(2));
    let seal = hmac::sign(&key, &[&(header.len() as u32).to_be_bytes()[..], &header, &manifest].concat());
    proto::Envelope { header: header.into(), manifest: manifest.into(), seal: seal.as_ref().to_vec().into() }
}
