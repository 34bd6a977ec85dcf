//! What one caller, with a certificate or without, can make the server hold.

use std::{
    net::{IpAddr, Ipv4Addr},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use attacker::{Attacker, HeldConnection};
use bytes::Bytes;
use http_body::Frame;
use kms_client::{ConnectError, Connection, proto};
use kms_tests::{DevServer, open, title};
use tokio::{io::AsyncReadExt as _, net::TcpStream, sync::mpsc};
use tonic::{Code, Status, body::Body, client::GrpcService, codegen::http, transport::Channel};

/// Sends these octets and never ends.
struct Unfinished(Option<Bytes>);

impl http_body::Body for Unfinished {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match self.0.take() {
            Some(octets) => Poll::Ready(Some(Ok(Frame::data(octets)))),
            None => Poll::Pending,
        }
    }
}

/// Begins a call whose message has `announced` octets, of which `sent` are sent: how it was
/// answered, or that the connection ended.
async fn unfinished(mut channel: Channel, path: &str, announced: u32, sent: usize) -> Result<Status, String> {
    let mut octets = vec![0];
    octets.extend(announced.to_be_bytes());
    octets.resize(5 + sent, 0);
    let request = http::Request::post(path).header("content-type", "application/grpc").header("te", "trailers");
    let request = request.body(Body::new(Unfinished(Some(octets.into())))).unwrap();
    std::future::poll_fn(|context| GrpcService::<Body>::poll_ready(&mut channel, context))
        .await
        .map_err(|error| error.to_string())?;
    let answer = GrpcService::<Body>::call(&mut channel, request).await.map_err(|error| format!("{error:?}"))?;
    Status::from_header_map(answer.headers()).ok_or_else(|| "no status in the headers".to_owned())
}

/// The longest that a test waits for what must happen.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), what).await.unwrap()
}

const PROTECT: &str = "/meterkms.v1.FrameService/Protect";
const OPEN_SESSION: &str = "/meterkms.v1.GrantService/OpenSession";

/// A6: 500 MiB a connection before.
#[tokio::test(flavor = "multi_thread")]
async fn two_connections_with_250_unfinished_requests_each_hold_little_memory() {
    let mut server = DevServer::start();
    server.restart_with_limits("request_seconds = 300");
    let connections = [server.connect("head-end").await, server.connect("head-end").await];
    for connection in &connections {
        connection.principals().who_am_i(proto::WhoAmIRequest {}).await.unwrap();
    }
    let before = server.resident_octets();
    let (answered, mut answers) = mpsc::unbounded_channel();
    for connection in &connections {
        for _ in 0..250 {
            let (channel, answered) = (connection.channel(), answered.clone());
            tokio::spawn(async move { answered.send(unfinished(channel, PROTECT, 1_900_000, 1_000_000).await) });
        }
    }
    // Four such messages are within 8 MiB: they are waited for, and the others are refused.
    for _ in 0..2 * 246 {
        let status = soon(answers.recv()).await.unwrap().unwrap();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        assert!(
            status.message().contains("`request_octets_per_connection` is 8388608 octets for each connection"),
            "{status}"
        );
    }
    let held = server.resident_octets().saturating_sub(before);
    eprintln!("500 unfinished requests on two connections hold {} KiB", held >> 10);
    assert!(held < 32 << 20, "{held} octets");
    // They are still open, and a neighbour is served.
    assert!(answers.is_empty());
    server.connect("officer-1").await.principals().who_am_i(proto::WhoAmIRequest {}).await.unwrap();
    connections[0].principals().who_am_i(proto::WhoAmIRequest {}).await.unwrap();
}

/// A6.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_refused_by_its_length_and_by_its_time() {
    let mut server = DevServer::start();
    server.restart_with_limits("request_seconds = 1");
    let channel = server.connect("head-end").await.channel();
    for (path, announced, bound) in [
        (OPEN_SESSION, 16_385, "`message_octets` is 16384 octets for each call"),
        ("/meterkms.v1.GrantService/OpenSessions", 262_145, "`batch_message_octets`"),
        (PROTECT, 2_097_153, "`large_message_octets`"),
        ("/meterkms.v1.ShipmentService/UploadShipment", 2_097_153, "`large_message_octets`"),
        (OPEN_SESSION, 16_384, "`request_seconds` is 1 seconds for each call"),
        (PROTECT, 2_097_152, "`request_seconds`"),
    ] {
        let status = soon(unfinished(channel.clone(), path, announced, 1)).await.unwrap();
        assert_eq!(status.code(), Code::ResourceExhausted, "{path} {announced}: {status}");
        assert!(status.message().contains(bound), "{path} {announced}: {status}");
    }
}

/// A6: before an octet of the message is there; what is open ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_principal_is_cut_at_its_first_call() {
    let mut server = DevServer::start();
    server.restart_with_limits("request_seconds = 300");
    let connection = server.connect("head-end").await;
    connection.principals().who_am_i(proto::WhoAmIRequest {}).await.unwrap();
    let open = tokio::spawn(unfinished(connection.channel(), PROTECT, 1_000, 10));
    let who = connection.principals().who_am_i(proto::WhoAmIRequest {}).await.unwrap().into_inner();
    let request_id = kms_client::new_request_id().octets().to_vec().into();
    let disable = proto::DisablePrincipalRequest { request_id, principal: who.principal, reason: "a test".to_owned() };
    server.connect("officer-1").await.principals().disable_principal(disable).await.unwrap();
    let refused = connection.principals().who_am_i(proto::WhoAmIRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
    // The connection ends, and with it the call that was open.
    let ended = soon(open).await.unwrap();
    assert!(ended.is_err(), "{ended:?}");
    // On another connection, nothing of a message is waited for.
    let again = server.connect("head-end").await.channel();
    let status = soon(unfinished(again, PROTECT, 1_000, 10)).await.unwrap();
    assert_eq!(status.code(), Code::Unauthenticated, "{status}");
}

/// A8.
#[tokio::test(flavor = "multi_thread")]
async fn one_principal_does_not_take_all_connections() {
    let mut server = DevServer::start();
    server.restart_with_limits("connections = 8\nconnections_per_principal = 2");
    let ask = async |connection: Result<Connection, ConnectError>| match connection {
        Ok(connection) => match connection.principals().who_am_i(proto::WhoAmIRequest {}).await {
            Ok(_) => Ok(connection),
            Err(status) => Err(format!("{status:?}")),
        },
        Err(error) => Err(format!("{error:?}")),
    };
    let handheld = server.profile("handheld");
    let mut open = Vec::new();
    for _ in 0..2 {
        open.push(ask(Connection::connect(&handheld).await).await.unwrap());
    }
    for _ in 0..20 {
        let refused = ask(Connection::connect(&handheld).await).await.unwrap_err();
        assert!(refused.contains("connections_per_principal"), "{refused}");
    }
    ask(Connection::connect(&server.profile("head-end")).await).await.unwrap();
    // A place that is given up is free again.
    open.clear();
    soon(async { while ask(Connection::connect(&handheld).await).await.is_err() {} }).await;
}

/// A8: connections on which nobody calls held all places, also those of principals that were
/// disabled, and for ever.
#[tokio::test(flavor = "multi_thread")]
async fn connections_without_a_call_hold_up_nobody_and_end() {
    let mut server = DevServer::start();
    server.restart_with_limits("connections = 4\nfirst_call_seconds = 5");
    let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let attacker = Attacker::of(&server.profile("handheld")).unwrap();
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(attacker.hold(local).await.unwrap());
    }
    // All places are taken, and far within the time of those that hold them somebody who calls
    // comes in.
    let caller = server.connect("officer-1").await;
    caller.principals().who_am_i(proto::WhoAmIRequest {}).await.unwrap();
    let mut looking = tokio::time::interval(Duration::from_millis(20));
    soon(async {
        while held.iter().any(HeldConnection::is_open) {
            looking.tick().await;
        }
    })
    .await;
    // The connection with a call continues.
    caller.principals().who_am_i(proto::WhoAmIRequest {}).await.unwrap();
}

/// A17: idle connections held all places for as long as a handshake may take.
#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_of_strangers_hold_up_no_handshake() {
    let mut server = DevServer::start();
    server.restart_with_limits(
        "handshakes = 32\nhandshakes_per_address = 16\nfirst_octet_seconds = 60\nhandshake_seconds = 60",
    );
    let address = server.address();
    let mut idle = Vec::new();
    for _ in 0..200 {
        idle.push(TcpStream::connect(&address).await.unwrap());
    }
    // Far within the time of the idle ones.
    server.connect("officer-1").await.principals().who_am_i(proto::WhoAmIRequest {}).await.unwrap();
    // The oldest gave their places up.
    for stream in idle.iter_mut().take(100) {
        let ended = soon(stream.read(&mut [0; 1])).await;
        assert!(!matches!(ended, Ok(octets) if octets > 0), "{ended:?}");
    }
}

/// A8: accepting stopped, and the watermark could not be written.
#[tokio::test(flavor = "multi_thread")]
async fn connections_take_no_descriptor_that_the_log_needs() {
    let mut server = DevServer::start_on_sqlite();
    server.restart_with_open_files(256);
    let watermark = server.state().join("island.db.watermark");
    let handheld = server.profile("handheld");
    // As many as descriptors, at once, and held.
    let mut connecting = tokio::task::JoinSet::new();
    for _ in 0..300 {
        let handheld = handheld.clone();
        connecting.spawn(async move { Connection::connect(&handheld).await });
    }
    let held: Vec<Connection> = connecting.join_all().await.into_iter().filter_map(Result::ok).collect();
    eprintln!("{} of 300 connections of one principal are open", held.len());
    let before = std::fs::read(&watermark).ok();
    open(&server.connect("head-end").await, &server.profile("head-end"), title(1), 10).await.unwrap();
    assert!(server.interrupt(), "the server does not end well");
    assert_ne!(std::fs::read(&watermark).ok(), before);
    drop(held);
}
