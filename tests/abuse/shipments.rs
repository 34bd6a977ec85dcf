//! A11: the spool of shipments, which is on the disk of the audit log.

use kms_client::{
    Connection,
    proto::{ListShipmentsRequest, Shipment, UploadShipmentRequest, UploadShipmentStart},
};
use kms_tests::DevServer;
use tokio::task::JoinSet;
use tokio_stream::iter;

use crate::{
    scene::{Neighbour, urn},
    verdict::{Figure, Verdict},
};

/// 40 uploads at the same moment, each announced with 32 GiB, of octets that nobody signed; then more octets for each.
pub(crate) async fn uploads() -> Vec<Verdict> {
    let server = DevServer::start();
    let neighbour = Neighbour::settle(&server, "other", "4D4D4D0000000077", 40).await;
    let officer = server.connect("officer-1").await;
    let mut uploading = JoinSet::new();
    for number in 0..UPLOADS {
        let connection = server.connect("officer-1").await;
        uploading.spawn(async move { upload(&connection, number, 0, PIECES).await });
    }
    let mut refusals = Vec::new();
    while let Some(uploaded) = uploading.join_next().await {
        refusals.extend(uploaded.unwrap().err());
    }
    let begun = spool(&officer).await;
    let figure = Figure::count(begun.len(), format!("of {UPLOADS} uploads at once begun (bound: {BOUND})"));
    refusals.sort();
    refusals.dedup();
    let reasons = refusals.first().map(|refusal| format!("; refused: {refusal}")).unwrap_or_default();
    let parallel = Verdict::new("A11", "parallel uploads", begun.len() <= BOUND, figure)
        .with(format!("{} unfinished{reasons}", begun.len()));

    // On with those that were begun: octets that no manufacturer signed.
    let mut refused = String::new();
    'all: for round in 1..=ROUNDS {
        for number in 0..UPLOADS {
            let Some(shipment) = begun.iter().find(|shipment| shipment.file_sha256 == sha256(number)) else { continue };
            let at = shipment.received + (round - 1) * PIECES * PIECE as u64;
            if let Err(error) = upload(&officer, number, at, PIECES).await {
                refused = error;
                if spool(&officer).await.iter().all(|shipment| shipment.file_sha256 != sha256(number)) {
                    continue;
                }
                break 'all;
            }
        }
    }
    let octets: u64 = spool(&officer).await.iter().map(|shipment| shipment.received).sum();
    let grant = neighbour.ask().await;
    let tried = (ROUNDS + 1) * begun.len() as u64 * PIECES * PIECE as u64;
    let unit = format!("MiB in the spool that nobody signed, of {} MiB tried", tried >> 20);
    let figure = Figure::count(usize::try_from(octets >> 20).unwrap(), unit);
    let held = (octets < tried || begun.is_empty()) && grant.is_ok();
    vec![parallel, Verdict::new("A11", "octets that nobody signed", held, figure).with(refused)]
}

/// Sends pieces of an upload that is announced with the longest length, and leaves it.
async fn upload(connection: &Connection, number: usize, offset: u64, pieces: u64) -> Result<(), String> {
    let start = UploadShipmentStart {
        file_sha256: sha256(number).into(),
        file_length: LONGEST,
        signature: vec![0x30; 70].into(),
        manufacturer: urn("manufacturer", "kam"),
    };
    let mut messages = vec![UploadShipmentRequest { start: Some(start), ..UploadShipmentRequest::default() }];
    for piece in 0..pieces {
        let offset = offset + piece * PIECE as u64;
        messages.push(UploadShipmentRequest { start: None, offset, octets: vec![b'x'; PIECE].into() });
    }
    connection
        .shipments()
        .upload_shipment(iter(messages))
        .await
        .map(drop)
        .map_err(|status| format!("{:?}: {}", status.code(), status.message()))
}

async fn spool(officer: &Connection) -> Vec<Shipment> {
    let listed = officer.shipments().list_shipments(ListShipmentsRequest {}).await.unwrap().into_inner();
    listed.shipments.into_iter().filter(|shipment| shipment.state == "uploading").collect()
}

fn sha256(number: usize) -> Vec<u8> {
    vec![u8::try_from(number + 1).unwrap(); 32]
}

const UPLOADS: usize = 40;
/// Unfinished uploads of one principal.
const BOUND: usize = 16;
/// What can be announced.
const LONGEST: u64 = 32 << 30;
const PIECE: usize = 1 << 20;
/// In one call.
const PIECES: u64 = 1;
const ROUNDS: u64 = 6;
