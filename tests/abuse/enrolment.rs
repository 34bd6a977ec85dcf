//! A crowd of strangers at the enrolment door.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use kms_client::{
    KeyRequest,
    field::{EnrolmentCode, EnrolmentServer, OneTimeCode},
    proto::{EnrolRequest, InviteHandheldRequest, enrolment_service_client::EnrolmentServiceClient},
};
use kms_tests::DevServer;
use tokio::{
    net::{TcpSocket, TcpStream},
    task::JoinSet,
};

use crate::{
    scene::{Neighbour, percentiles, request_id},
    verdict::{Figure, Verdict},
};

/// Strangers hold connections, begin handshakes that they do not end, and guess codes, from many
/// addresses. Head-ends are served meanwhile as before, and a technician with a right code is
/// enrolled through the crowd.
pub(crate) async fn flood() -> Vec<Verdict> {
    let server = DevServer::start();
    let neighbour = Neighbour::settle(&server, "other", "4D4D4D0000000077", 40).await;
    let quiet = neighbour.ask_anew().await.unwrap().as_secs_f64() * 1_000.0;
    let (door, officer) = (server.enrolment_address(), server.connect("officer-1").await);
    let code = OneTimeCode::generate("h-17").unwrap();
    let request = InviteHandheldRequest {
        request_id: request_id(),
        name: "h-17".to_owned(),
        technician: "Tom Field".to_owned(),
        code: Some(code.digest()),
        ..InviteHandheldRequest::default()
    };
    let root = officer.handhelds().invite_handheld(request).await.unwrap().into_inner().root_certificate;
    let code = EnrolmentCode::parse(&code.text(&root).unwrap()).unwrap();

    let before = server.glance().await.store.audit_tails().await.unwrap().iter().map(|tail| tail.sequence).sum::<u64>();
    let mut crowd = JoinSet::new();
    for stranger in 0..STRANGERS {
        let from = IpAddr::V4(Ipv4Addr::new(127, 0, 1, stranger));
        crowd.spawn(async move {
            let mut held = Vec::new();
            loop {
                // Silent ones, and ones that begin a handshake.
                for speaks in [false, true, false, true] {
                    held.extend(knock(door, from, speaks).await);
                }
                if held.len() > 40 {
                    held.drain(..20);
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
    }
    // And somebody guesses, from the technician's own address: of no invitation, and of this name
    // without its public part.
    let (codes, address) = (["h-17", "h-99"].map(|name| another_code(name, &root)), door.to_string());
    crowd.spawn(async move {
        let server = EnrolmentServer::parse(&address, None).unwrap();
        for code in codes.iter().cycle() {
            if let Ok(connection) = server.connect(code).await {
                let guessed = EnrolmentServiceClient::new(connection.channel()).enrol(enrol(code)).await;
                assert!(guessed.is_err(), "a guess was right");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let (mut times, mut failed) = (Vec::new(), 0);
    for ask in 0..ASKS {
        // Some over a connection that is made for it.
        match if ask % 4 == 0 { neighbour.ask_anew().await } else { neighbour.ask().await } {
            Ok(time) => times.push(time),
            Err(_) => failed += 1,
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Through the crowd: a newcomer's address has fewer connections than the crowd's.
    let technician = EnrolmentServer::parse(&door.to_string(), None).unwrap();
    // The same keys again, if the answer is lost.
    let (mut attempts, asked) = (0, enrol(&code));
    let enrolled = loop {
        attempts += 1;
        if let Ok(connection) = technician.connect(&code).await
            && let Ok(answer) = EnrolmentServiceClient::new(connection.channel()).enrol(asked.clone()).await
        {
            break answer.into_inner().technician == "Tom Field";
        }
        if attempts == ATTEMPTS {
            break false;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    crowd.shutdown().await;
    let after = server.glance().await.store.audit_tails().await.unwrap().iter().map(|tail| tail.sequence).sum::<u64>();
    let grown = usize::try_from(after - before).unwrap().saturating_sub(times.len());
    let (p50, p99) = percentiles(&times);
    let held = failed == 0 && enrolled && grown < 60;
    let figure = Figure::of(p99, format!("ms p99 of a neighbour's grant beside {STRANGERS} strangers at the door"));
    vec![Verdict::new("flood", "enrolment door", held, figure).with(format!(
        "p50 {p50:.1} ms, {quiet:.1} ms without them; {failed} of {ASKS} failed; enrolled after {attempts} attempts; {grown} records"
    ))]
}

/// A connection from this address, with the first octets of a handshake.
async fn knock(door: SocketAddr, from: IpAddr, speaks: bool) -> Option<TcpStream> {
    let socket = TcpSocket::new_v4().ok()?;
    socket.bind(SocketAddr::new(from, 0)).ok()?;
    let stream = socket.connect(door).await.ok()?;
    if speaks {
        drop(stream.try_write(&[22, 3, 1, 0, 200, 1]));
    }
    Some(stream)
}

fn enrol(code: &EnrolmentCode) -> EnrolRequest {
    let request = || KeyRequest::for_device(code.name()).unwrap().certificate_request().to_vec().into();
    EnrolRequest {
        name: code.name().to_owned(),
        code_id: code.id().0.to_vec().into(),
        secret: code.secret().octets().to_vec().into(),
        certificate_request: request(),
        transport_certificate_request: request(),
        assurance: "software".to_owned(),
    }
}

/// A code that nobody was given.
fn another_code(name: &str, root: &[u8]) -> EnrolmentCode {
    EnrolmentCode::parse(&OneTimeCode::generate(name).unwrap().text(root).unwrap()).unwrap()
}

const STRANGERS: u8 = 40;
const ASKS: usize = 60;
const ATTEMPTS: u32 = 200;
