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

/// 40 uploads at the same moment, of small and of the largest files; then octets that no
/// manufacturer signed.
pub(crate) async fn uploads() -> Vec<Verdict> {
    let server = DevServer::start();
    let neighbour = Neighbour::settle(&server, "other", "4D4D4D0000000077", 40).await;
    let refusals = begin_all(&server, "officer-1", SMALL, 1).await;
    let officer = server.connect("officer-1").await;
    let begun = spool(&officer, SMALL).await;
    let figure = Figure::count(begun.len(), format!("of {UPLOADS} uploads at once begun (bound: {BOUND})"));
    let parallel = Verdict::new("A11", "parallel uploads", begun.len() <= BOUND, figure).with(refusals);

    // Octets for those that were begun, less than announced.
    for shipment in &begun {
        let octets = vec![UploadShipmentRequest { start: None, offset: 0, octets: vec![b'x'; PIECE].into() }];
        // It may be refused by an error, or in the answer.
        let _ = upload(&officer, &shipment.file_sha256, SMALL, octets).await;
    }
    let octets: u64 = spool(&officer, SMALL).await.iter().map(|shipment| shipment.received).sum();
    let tried = begun.len() * PIECE;
    let unit = format!("MiB in the spool that nobody signed, of {} MiB sent", tried >> 20);
    let held = (octets < tried as u64 || begun.is_empty()) && neighbour.ask().await.is_ok();
    let unsigned = Verdict::new(
        "A11",
        "octets that nobody signed",
        held,
        Figure::count(usize::try_from(octets >> 20).unwrap(), unit),
    );

    let refusals = begin_all(&server, "officer-2", LARGEST, 101).await;
    let announced: u64 = spool(&officer, LARGEST).await.iter().map(|shipment| shipment.file_length).sum();
    let unit = format!("GiB announced by one principal, in {UPLOADS} uploads of {} GiB", LARGEST >> 30);
    let figure = Figure::count(usize::try_from(announced >> 30).unwrap(), unit);
    let large = Verdict::new("A11", "uploads of the largest files", announced <= MOST_ANNOUNCED, figure).with(refusals);
    vec![parallel, unsigned, large]
}

/// Begins all uploads at once, each over a connection of its own, and leaves them: why one was
/// refused.
async fn begin_all(server: &DevServer, officer: &str, length: u64, first: u8) -> String {
    let mut uploading = JoinSet::new();
    for number in 0..UPLOADS {
        let connection = server.connect(officer).await;
        uploading.spawn(async move { upload(&connection, &[first + number; 32], length, Vec::new()).await });
    }
    let mut refusals = Vec::new();
    while let Some(uploaded) = uploading.join_next().await {
        refusals.extend(uploaded.unwrap().err());
    }
    refusals.sort();
    refusals.pop().map(|refusal| format!("refused: {refusal}")).unwrap_or_default()
}

/// Announces a file, sends pieces of it, and leaves it.
async fn upload(
    connection: &Connection,
    sha256: &[u8],
    length: u64,
    pieces: Vec<UploadShipmentRequest>,
) -> Result<(), String> {
    let start = UploadShipmentStart {
        file_sha256: sha256.to_vec().into(),
        file_length: length,
        signature: vec![0x30; 70].into(),
        manufacturer: urn("manufacturer", "kam"),
    };
    let first = UploadShipmentRequest { start: Some(start), ..UploadShipmentRequest::default() };
    let messages: Vec<_> = std::iter::once(first).chain(pieces).collect();
    let answer = connection.shipments().upload_shipment(iter(messages)).await;
    answer.map(drop).map_err(|status| format!("{:?}: {}", status.code(), status.message()))
}

/// Unfinished uploads of files of this length.
async fn spool(officer: &Connection, length: u64) -> Vec<Shipment> {
    let listed = officer.shipments().list_shipments(ListShipmentsRequest {}).await.unwrap().into_inner();
    let unfinished = |shipment: &Shipment| shipment.state == "uploading" && shipment.file_length == length;
    listed.shipments.into_iter().filter(unfinished).collect()
}

const UPLOADS: u8 = 40;
/// Unfinished uploads of one principal.
const BOUND: usize = 16;
/// The longest file that can be announced to a server without a bound of the spool.
const LARGEST: u64 = 32 << 30;
const SMALL: u64 = 4 << 20;
const PIECE: usize = 1 << 20;
/// A disk of a server takes this.
const MOST_ANNOUNCED: u64 = 64 << 30;
