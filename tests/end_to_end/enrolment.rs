//! Handhelds enrol themselves at a door of their own, which offers nothing else.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use kms_client::{
    Connection, PrincipalId, ServerError,
    field::{Device, EnrolmentCode, EnrolmentServer, FieldError, Pin, VaultError},
    proto,
};
use kms_store_testing::TestDatabase;
use kms_tests::{DevServer, TestModule, kms};
use prost::Message as _;
use proto::audit_record::Event;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
};
use tonic::{Code, body::Body};
use tower::ServiceExt as _;

const PIN: &str = "correct horse battery staple";

/// The output of a command, which must end well.
fn run(server: &DevServer, identity: &str, arguments: &[&str]) -> String {
    let output = kms(server.state(), identity, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn invite(server: &DevServer, arguments: &[&str]) -> String {
    let shown = run(server, "officer-1", &[&["--output", "json", "handheld"], arguments].concat());
    serde_json::from_str::<serde_json::Value>(&shown).unwrap().get("code").unwrap().as_str().unwrap().to_owned()
}

/// A file with the PIN, as `--pin-file` takes it.
fn pin_file(folder: &Path) -> PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let path = folder.join("pin");
    std::fs::write(&path, format!("{PIN}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    path
}

fn door(server: &DevServer) -> EnrolmentServer {
    EnrolmentServer::parse(&server.enrolment_address().to_string(), None).unwrap()
}

async fn who_am_i(connection: &Connection) -> Result<proto::Principal, tonic::Status> {
    connection.principals().who_am_i(proto::WhoAmIRequest {}).await.map(tonic::Response::into_inner)
}

/// The records of a kind that `pick` takes.
async fn recorded<T>(server: &DevServer, pick: impl Fn(Event) -> Option<T>) -> Vec<T> {
    let auditor = server.connect("auditor").await;
    let request = proto::ListAuditRecordsRequest { page_size: 1_000, ..Default::default() };
    let page = auditor.audit().list_audit_records(request).await.unwrap().into_inner();
    page.records.into_iter().filter_map(|record| pick(record.event?)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_enrols_itself_works_and_is_handed_over() {
    let server = DevServer::start();
    let folder = tempfile::tempdir().unwrap();
    let (pin, address) = (pin_file(folder.path()), server.enrolment_address().to_string());
    let pin = pin.to_str().unwrap();
    let code = invite(&server, &["invite", "h-17", "--technician", "Tom Field"]);
    let enrolled = run(&server, "officer-1", &["field", "enrol", &address, &code, "--pin-file", pin]);
    for words in ["urn:meterkms:dev:handheld:h-17", "Tom Field", "software", "certificate until"] {
        assert!(enrolled.contains(words), "{words}: {enrolled}");
    }
    let listed = run(&server, "auditor", &["handheld", "list"]);
    assert!(listed.contains("h-17") && listed.contains("used") && listed.contains("software"), "{listed}");
    assert!(run(&server, "officer-1", &["principal", "list"]).contains("software"));
    // The profile is the device's.
    assert!(run(&server, "h-17", &["field", "status", "--pin-file", pin]).contains("Tom Field"));
    assert!(run(&server, "h-17", &["field", "renew", "--pin-file", pin]).contains("not renewed"));
    let again = kms(server.state(), "officer-1", &["field", "enrol", &address, &code, "--pin-file", pin]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("not overwritten"));

    // The library opens it as well, and it calls as the handheld.
    let directory = server.state().join("profiles/h-17");
    let wrong = Device::unlock(&directory, &Pin::new("correct horse battery stapler").unwrap());
    assert!(matches!(wrong, Err(FieldError::Vault(VaultError::Wrong))));
    let mut device = Device::unlock(&directory, &Pin::new(PIN).unwrap()).unwrap();
    let connection = device.connect().await.unwrap();
    let known = who_am_i(&connection).await.unwrap();
    assert_eq!((known.person.as_str(), known.assurance.as_str()), ("Tom Field", "software"));
    assert!(known.has_transport_key);
    let own = device.transport_key().unwrap();
    assert_eq!(own.principal(), &PrincipalId::parse("urn:meterkms:dev:handheld:h-17").unwrap());
    // Renewed before its time by a tool that does so anyway: two certificates, and no third.
    device.renew().await.unwrap();
    let known = who_am_i(&device.connect().await.unwrap()).await.unwrap();
    assert_eq!(known.certificates.len(), 2);
    assert!(matches!(device.renew().await, Err(FieldError::Server(error)) if error.code() == Code::FailedPrecondition));
    let mut device = Device::unlock(&directory, &Pin::new(PIN).unwrap()).unwrap();
    assert!(who_am_i(&device.connect().await.unwrap()).await.unwrap().certificates.last().unwrap().in_use);

    // Handed over: the open connection ends with its keys, and the next code makes others.
    let code = invite(&server, &["hand-over", "h-17", "--technician", "Una Field", "--yes"]);
    assert_eq!(who_am_i(&connection).await.unwrap_err().code(), Code::Unauthenticated);
    assert!(device.renew().await.is_err());
    let next = folder.path().join("next");
    let code = EnrolmentCode::parse(&code).unwrap();
    let device = Device::enrol(&next, &door(&server), &code, &Pin::new(PIN).unwrap()).await.unwrap();
    let known = who_am_i(&device.connect().await.unwrap()).await.unwrap();
    assert_eq!((known.person.as_str(), known.certificates.len()), ("Una Field", 1));
    // The code is used up.
    let third = Device::enrol(folder.path().join("third"), &door(&server), &code, &Pin::new(PIN).unwrap()).await;
    assert!(matches!(third, Err(FieldError::Server(error)) if error.code() == Code::Unauthenticated));
    assert!(!Device::is_in(&folder.path().join("third")));
    let enrolled = recorded(&server, |event| match event {
        Event::HandheldEnrolled(event) => Some((event.technician, event.occasion)),
        _ => None,
    });
    let expected = [("Tom Field", "first"), ("Una Field", "hand-over")];
    assert_eq!(enrolled.await, expected.map(|(person, occasion)| (person.to_owned(), occasion.to_owned())));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_of_another_island_is_refused_before_anything_is_sent() {
    let server = DevServer::start();
    // Copies of the template have one root; this one has a ceremony of its own.
    let other = DevServer::start_afresh(TestModule::of_environment(), TestDatabase::of_environment());
    let folder = tempfile::tempdir().unwrap();
    let pin = Pin::new(PIN).unwrap();
    let code = EnrolmentCode::parse(&invite(&server, &["invite", "h-17", "--technician", "Tom Field"])).unwrap();
    let refused = Device::enrol(folder.path().join("one"), &door(&other), &code, &pin).await.unwrap_err();
    assert!(matches!(refused, FieldError::AnotherIsland { .. }), "{refused}");
    assert!(refused.to_string().contains("nothing was sent"));
    let heard = recorded(&other, |event| match event {
        Event::WrongEnrolmentCode(_) | Event::HandheldEnrolled(_) => Some(()),
        Event::Refused(event) if event.action == "enrol" => Some(()),
        _ => None,
    });
    assert_eq!(heard.await.len(), 0);
    // The ordinary listener of the right island sends no root, and wants a certificate.
    let ordinary = EnrolmentServer::parse(&server.address(), None).unwrap();
    let refused = ordinary.connect(&code).await.unwrap_err();
    assert!(matches!(refused, FieldError::AnotherIsland { .. }), "{refused}");
    // A name that its certificate does not have.
    let address = server.enrolment_address().to_string();
    let misnamed = EnrolmentServer::parse(&address, Some("kms.example")).unwrap();
    assert!(matches!(misnamed.connect(&code).await, Err(FieldError::Connect(_))));
    // The code is as good as before.
    let named = EnrolmentServer::parse(&address, Some("localhost")).unwrap();
    Device::enrol(folder.path().join("one"), &named, &code, &pin).await.unwrap();
}

/// Forwards connections to the door. It holds back what the server sends after its part of the
/// handshake, so the answer never comes. Ends with the task.
fn lose_answers(listener: TcpListener, door: SocketAddr) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((client, _)) = listener.accept().await {
            connections.spawn(async move {
                let server = TcpStream::connect(door).await.unwrap();
                let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                    (client.into_split(), server.into_split());
                // The first octets of the client, and what the server says to them.
                let mut octets = Vec::with_capacity(64 << 10);
                from_client.read_buf(&mut octets).await.unwrap();
                to_server.write_all(&octets).await.unwrap();
                octets.clear();
                let forwards = async { tokio::io::copy(&mut from_server, &mut to_client).await };
                let speaks = from_client.read_buf(&mut octets);
                tokio::select! { read = speaks => drop(read.unwrap()), _ = forwards => {} }
                to_server.write_all(&octets).await.unwrap();
                drop(tokio::io::copy(&mut from_client, &mut to_server).await);
                drop((from_server, to_client));
            });
        }
    })
}

async fn wait_for_enrolled(server: &DevServer, number: usize) {
    let enrolled = || recorded(server, |event| matches!(event, Event::HandheldEnrolled(_)).then_some(()));
    let waiting = async {
        while enrolled().await.len() < number {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), waiting).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_costs_neither_the_code_nor_an_alarm() {
    let server = DevServer::start();
    let (folder, pin) = (tempfile::tempdir().unwrap(), Pin::new(PIN).unwrap());
    let code =
        |name: &str| EnrolmentCode::parse(&invite(&server, &["invite", name, "--technician", "Tom Field"])).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let through = EnrolmentServer::parse(&address.to_string(), None).unwrap();
    let mut losing = lose_answers(listener, server.enrolment_address());

    // The device goes off before the answer comes.
    let first = code("h-17");
    let directory = folder.path().join("one");
    tokio::select! {
        enrolled = Device::enrol(&directory, &through, &first, &pin) => panic!("{enrolled:?}"),
        () = wait_for_enrolled(&server, 1) => {}
    }
    assert!(!Device::is_in(&directory));
    let another = Device::enrol(&directory, &door(&server), &first, &Pin::new("another one").unwrap()).await;
    assert!(matches!(another, Err(FieldError::Vault(VaultError::Pending { .. }))), "{another:?}");
    let device = Device::enrol(&directory, &door(&server), &first, &pin).await.unwrap();
    assert_eq!(who_am_i(&device.connect().await.unwrap()).await.unwrap().certificates.len(), 1);

    // The server goes away with the answer, and nothing listens for a while.
    let (second, directory) = (code("h-18"), folder.path().join("two"));
    let asked = Device::enrol(&directory, &through, &second, &pin);
    let interrupted = async {
        wait_for_enrolled(&server, 2).await;
        losing.abort();
        assert!((&mut losing).await.unwrap_err().is_cancelled());
        tokio::time::sleep(Duration::from_secs(1)).await;
        let listener = TcpListener::bind(address).await.unwrap();
        let target = server.enrolment_address();
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let mut server = TcpStream::connect(target).await.unwrap();
                drop(tokio::io::copy_bidirectional(&mut client, &mut server).await);
            }
        });
    };
    let (device, ()) = tokio::join!(asked, interrupted);
    assert_eq!(device.unwrap().handheld(), "urn:meterkms:dev:handheld:h-18");
    let alarms = recorded(&server, |event| match event {
        Event::SecurityEvent(event) => Some(event.kind),
        _ => None,
    });
    assert!(!alarms.await.contains(&"enrolment-code-twice".to_owned()));
}

/// Every path of the contract, of health and of reflection.
fn paths() -> BTreeSet<String> {
    let files = prost_types::FileDescriptorSet::decode(kms_proto::FILE_DESCRIPTOR_SET).unwrap();
    let mut paths = BTreeSet::from(
        [
            "/grpc.health.v1.Health/Check",
            "/grpc.health.v1.Health/Watch",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            "/",
            "/meterkms.v1.EnrolmentService/",
            "/meterkms.v1.EnrolmentService/Enrol/",
            "//meterkms.v1.EnrolmentService/Enrol",
            "/meterkms.v1.PrincipalService/Enrol",
        ]
        .map(str::to_owned),
    );
    for file in files.file {
        for service in &file.service {
            for method in &service.method {
                paths.insert(format!("/{}.{}/{}", file.package(), service.name(), method.name()));
            }
        }
    }
    paths
}

/// The status of an empty message to this path.
async fn status(connection: &Connection, path: &str) -> Code {
    let request = http::Request::post(format!("http://kms{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::empty())
        .unwrap();
    let answer = connection.channel().oneshot(request).await.unwrap();
    tonic::Status::from_header_map(answer.headers()).map_or(Code::Ok, |status| status.code())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_enrolment_door_offers_one_method_and_the_ordinary_one_all_others() {
    const ENROL: &str = "/meterkms.v1.EnrolmentService/Enrol";
    let server = DevServer::start();
    let code = EnrolmentCode::parse(&invite(&server, &["invite", "h-17", "--technician", "Tom Field"])).unwrap();
    let stranger = door(&server).connect(&code).await.unwrap();
    let paths = paths();
    assert!(paths.len() > 70 && paths.contains(ENROL));
    for path in paths.iter().filter(|path| *path != ENROL) {
        assert_eq!(status(&stranger, path).await, Code::Unimplemented, "{path}");
    }
    assert_ne!(status(&stranger, ENROL).await, Code::Unimplemented);
    let officer = server.connect("officer-1").await;
    assert_eq!(status(&officer, ENROL).await, Code::Unimplemented);
}

#[tokio::test(flavor = "multi_thread")]
async fn attempts_of_an_address_are_counted_and_messages_are_bounded() {
    let mut server = DevServer::start();
    server.restart_with_limits("enrolment_calls_per_address_and_hour = 3\nwrong_codes_per_invitation = 2");
    let code = EnrolmentCode::parse(&invite(&server, &["invite", "h-17", "--technician", "Tom Field"])).unwrap();
    let connection = door(&server).connect(&code).await.unwrap();
    let mut client = proto::enrolment_service_client::EnrolmentServiceClient::new(connection.channel());
    let key = || kms_client::KeyRequest::for_device("h-17").unwrap().certificate_request().to_vec().into();
    let wrong = || proto::EnrolRequest {
        name: "h-17".to_owned(),
        code_id: code.id().0.to_vec().into(),
        secret: vec![7; 15].into(),
        certificate_request: key(),
        transport_certificate_request: key(),
        assurance: "software".to_owned(),
    };
    for _ in 0..2 {
        assert_eq!(client.enrol(wrong()).await.unwrap_err().code(), Code::Unauthenticated);
    }
    // The invitation has ended, and looks as before.
    let ended = client.enrol(wrong()).await.unwrap_err();
    assert_eq!(ended.code(), Code::Unauthenticated);
    assert!(run(&server, "officer-1", &["handheld", "list"]).contains("wrong-codes"));
    let met = ServerError::from(client.enrol(wrong()).await.unwrap_err());
    assert!(met.message().contains("`enrolment_calls_per_address_and_hour`"), "{}", met.message());
    assert!(met.retry_after().is_some());
    // A message that is longer than two requests for certificates can be.
    server.restart();
    let connection = door(&server).connect(&code).await.unwrap();
    let mut client = proto::enrolment_service_client::EnrolmentServiceClient::new(connection.channel());
    let long = proto::EnrolRequest { certificate_request: vec![0x30; 100_000].into(), ..wrong() };
    let refused = client.enrol(long).await.unwrap_err();
    assert!(refused.message().contains("`certificate_message_octets`"), "{refused}");
}
