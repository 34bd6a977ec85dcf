//! The first pass over a shipment: signature, digest, count and header. Nothing is imported before
//! all of them are right.

use std::sync::Arc;

use aws_lc_rs::{
    digest::{Context, Digest, SHA256, SHA384, digest},
    signature::{ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, UnparsedPublicKey, VerificationAlgorithm},
};
use kms_domain::{DeviceProfile, OaepHash, Principal, ShipmentHeader, ShipmentLineError, ShipmentTrailer};
use kms_hsm::{BatchKey, HsmError, RootVersion};
use kms_store::ShipmentRow;
use x509_parser::{prelude::FromDer, x509::SubjectPublicKeyInfo};

use super::batch::IMPORTS;
use super::spool::{Line, Lines, WindowDigest, Windows, digest_of};
use crate::island::Island;
use kms_base::error::ServiceError;

/// A shipment that is what its manufacturer signed.
pub(super) struct Verified {
    pub(super) header: ShipmentHeader,
    pub(super) profile: DeviceProfile,
    pub(super) batch_key: BatchKey,
    /// Device lines: from line 2 to line `devices + 1`.
    pub(super) devices: u64,
    /// Where the line begins that is imported next.
    pub(super) next_begin: u64,
    /// What the second pass checks each window against.
    pub(super) windows: Arc<[WindowDigest]>,
}

/// Why a shipment is not imported.
pub(super) enum Rejection {
    /// The file is wrong: it is refused for good.
    File(String),
    /// The island is in trouble, or the caller: to be tried again.
    Trouble(ServiceError),
}

impl<E: Into<ServiceError>> From<E> for Rejection {
    fn from(error: E) -> Self {
        Self::Trouble(error.into())
    }
}

/// Reads the whole file and checks all of it.
pub(super) async fn verify(
    island: &Island,
    row: &ShipmentRow,
    signature: &[u8],
    manufacturer: &Principal,
) -> Result<Verified, Rejection> {
    let key = ShipmentKey::of(manufacturer)?;
    let mut scan = Scan::new(key.uses_sha384(), row.next_line.max(FIRST_DEVICE_LINE));
    let mut windows = Windows::new(island.store.clone(), row.upload, row.size);
    while let Some(window) = windows.next().await? {
        scan.take(&window);
        tokio::task::yield_now().await;
    }
    let scanned = scan.finish();

    if scanned.sha256.as_ref() != row.sha256 {
        return Err(refuse("the octets that arrived are not the file that was announced: its SHA-256 is another"));
    }
    key.verify(scanned.sha384.as_ref().unwrap_or(&scanned.sha256), signature)?;
    let content = scanned.content?;
    let header = check_header(manufacturer, &content.header)?;
    let trailer = ShipmentTrailer::parse(&content.trailer).map_err(|error| of_line(content.trailer_line, &error))?;
    if trailer.sha256 != *content.before_trailer.as_ref() {
        return Err(refuse(format!(
            "line {}: trailer.sha256 is not that of the lines before it",
            content.trailer_line
        )));
    }
    let devices = content.trailer_line.saturating_sub(FIRST_DEVICE_LINE);
    if trailer.devices != devices {
        return Err(refuse(format!(
            "line {}: trailer.devices is {} and the file has {devices} device lines",
            content.trailer_line, trailer.devices
        )));
    }
    let profile = profile(island, &header)?;
    let batch_key = open_batch_key(island, &header).await?;
    Ok(Verified { header, profile, batch_key, devices, next_begin: content.next_begin, windows: scanned.windows })
}

/// Looks at the first line alone, before the rest has arrived: whether it can be a shipment of this
/// manufacturer to this island. What this says is proven only when the whole file is. A server
/// whose token is away, or does not hold the transport key, cannot tell whose key it is: the import
/// can.
pub(super) async fn preview(island: &Island, manufacturer: &Principal, line: &[u8]) -> Result<(), Rejection> {
    let header = check_header(manufacturer, line)?;
    profile(island, &header)?;
    match transport_version(island, &header.transport_key).await {
        Ok(None) => Err(foreign_transport_key()),
        Ok(Some(_)) => super::oaep_hashes(island).await.map_or(Ok(()), |offered| check_hash(&header, &offered)),
        Err(_) => Ok(()),
    }
}

fn check_header(manufacturer: &Principal, line: &[u8]) -> Result<ShipmentHeader, Rejection> {
    let header = ShipmentHeader::parse(line).map_err(|error| of_line(1, &error))?;
    if !names(manufacturer, &header) {
        return Err(refuse(format!(
            "line 1: manufacturer: {} is not the manufacturer `{}` that signed",
            header.manufacturer, manufacturer.id
        )));
    }
    Ok(header)
}

fn profile(island: &Island, header: &ShipmentHeader) -> Result<DeviceProfile, Rejection> {
    let known = island.profiles.get(&header.device_profile).cloned();
    known.ok_or_else(|| refuse(format!("line 1: device_profile: `{}` is not known here", header.device_profile)))
}

/// The line of the first device.
pub(super) const FIRST_DEVICE_LINE: u64 = 2;

/// Whether the header's FLAG id is the signer's: a manufacturer's name is its FLAG id in lower
/// case, or begins with it and `-`.
fn names(manufacturer: &Principal, header: &ShipmentHeader) -> bool {
    let name = manufacturer.id.name();
    let flag_id = name.split_once('-').map_or(name, |(flag_id, _)| flag_id);
    flag_id.eq_ignore_ascii_case(header.manufacturer.as_str())
}

async fn open_batch_key(island: &Island, header: &ShipmentHeader) -> Result<BatchKey, Rejection> {
    let Some(version) = transport_version(island, &header.transport_key).await? else {
        return Err(foreign_transport_key());
    };
    let offered = super::oaep_hashes(island).await?;
    let hash = header.oaep_hash;
    check_hash(header, &offered)?;
    match island.hsm.paid_by(IMPORTS).open_batch_key(version, hash, header.batch_key.clone()).await {
        Ok(batch_key) => Ok(batch_key),
        Err(HsmError::WrappedKeyInvalid { .. }) => Err(refuse(
            "line 1: batch_key: it cannot be opened with the vendor transport key: damaged, or no 32-octet AES key inside",
        )),
        Err(error) => Err(error.into()),
    }
}

fn foreign_transport_key() -> Rejection {
    refuse("line 1: transport_key: it is not this island's vendor transport key; `GetVendorTransportKey` tells that")
}

fn check_hash(header: &ShipmentHeader, offered: &[OaepHash]) -> Result<(), Rejection> {
    if offered.contains(&header.oaep_hash) {
        return Ok(());
    }
    let names: Vec<&str> = offered.iter().map(|hash| hash.name()).collect();
    Err(refuse(format!(
        "line 1: oaep_hash: {} is not accepted here; use {}",
        header.oaep_hash.name(),
        names.join(" or ")
    )))
}

/// The accepted version of the vendor transport key that has this digest, the newest first.
async fn transport_version(island: &Island, wanted: &[u8]) -> Result<Option<RootVersion>, ServiceError> {
    let row = island.row();
    for version in (row.ledger.oldest_vendor_transport_version..=row.ledger.vendor_transport_version).rev() {
        let version = root_version(version)?;
        if digest(&SHA256, &island.hsm.transport_key_spki(version).await?).as_ref() == wanted {
            return Ok(Some(version));
        }
    }
    Ok(None)
}

/// The version of the vendor transport key that vendors are given.
pub(super) fn offered_transport_version(island: &Island) -> Result<RootVersion, ServiceError> {
    root_version(island.row().ledger.vendor_transport_version)
}

fn root_version(version: u8) -> Result<RootVersion, ServiceError> {
    RootVersion::new(u32::from(version)).map_err(|error| ServiceError::Internal(error.to_string()))
}

/// A manufacturer's public key.
struct ShipmentKey {
    algorithm: &'static dyn VerificationAlgorithm,
    sha384: bool,
    point: Vec<u8>,
}

impl ShipmentKey {
    /// P-256 goes with SHA-256, P-384 with SHA-384.
    fn of(manufacturer: &Principal) -> Result<Self, Rejection> {
        let der = manufacturer.shipment_key.as_ref().ok_or_else(|| super::no_shipment_key(&manufacturer.id))?;
        let fault = || ServiceError::Internal(format!("the shipment key of `{}` is not readable", manufacturer.id));
        let (_, info) = SubjectPublicKeyInfo::from_der(der).map_err(|_| fault())?;
        let curve = info
            .algorithm
            .parameters
            .as_ref()
            .and_then(|parameters| parameters.as_oid().ok())
            .map(|oid| oid.to_id_string());
        let (algorithm, sha384): (&'static dyn VerificationAlgorithm, bool) = match curve.as_deref() {
            Some("1.2.840.10045.3.1.7") => (&ECDSA_P256_SHA256_ASN1, false),
            Some("1.3.132.0.34") => (&ECDSA_P384_SHA384_ASN1, true),
            _ => return Err(fault().into()),
        };
        Ok(Self { algorithm, sha384, point: info.subject_public_key.data.to_vec() })
    }

    const fn uses_sha384(&self) -> bool {
        self.sha384
    }

    fn verify(&self, digest: &Digest, signature: &[u8]) -> Result<(), Rejection> {
        UnparsedPublicKey::new(self.algorithm, &self.point)
            .verify_digest(digest, signature)
            .map_err(|_| refuse("the signature is not the manufacturer's over this file"))
    }
}

/// Walks over the file once: hashes, and where its lines are.
struct Scan {
    sha256: Context,
    sha384: Option<Context>,
    /// SHA-256 up to the line that is being read.
    at_begin: Context,
    lines: Lines,
    windows: Vec<WindowDigest>,
    next_line: u64,
    next_begin: Option<u64>,
    header: Option<Vec<u8>>,
    trailer: Option<(u64, Vec<u8>, Digest)>,
    after_trailer: bool,
}

struct Scanned {
    sha256: Digest,
    sha384: Option<Digest>,
    windows: Arc<[WindowDigest]>,
    content: Result<Content, Rejection>,
}

struct Content {
    header: Vec<u8>,
    trailer_line: u64,
    trailer: Vec<u8>,
    before_trailer: Digest,
    next_begin: u64,
}

impl Scan {
    fn new(sha384: bool, next_line: u64) -> Self {
        Self {
            sha256: Context::new(&SHA256),
            sha384: sha384.then(|| Context::new(&SHA384)),
            at_begin: Context::new(&SHA256),
            lines: Lines::default(),
            windows: Vec::new(),
            next_line,
            next_begin: None,
            header: None,
            trailer: None,
            after_trailer: false,
        }
    }

    fn take(&mut self, window: &[u8]) {
        self.windows.push(digest_of(window));
        if let Some(sha384) = &mut self.sha384 {
            sha384.update(window);
        }
        let mut lines = std::mem::take(&mut self.lines);
        let pushed = lines.push(window, |line| {
            self.line(&line);
            Ok::<_, std::convert::Infallible>(())
        });
        let rest = match pushed {
            Ok(rest) => rest,
            Err(never) => match never {},
        };
        self.sha256.update(rest);
        self.lines = lines;
    }

    fn line(&mut self, line: &Line<'_>) {
        if line.number == 1 {
            self.header = Some(line.octets.to_vec());
        }
        if line.number == self.next_line {
            self.next_begin = Some(line.begin);
        }
        if self.trailer.is_some() {
            self.after_trailer = true;
        } else if line.number > 1 && ShipmentTrailer::recognise(line.octets) {
            self.trailer = Some((line.number, line.octets.to_vec(), self.at_begin.clone().finish()));
        }
        self.sha256.update(line.tail);
        self.at_begin = self.sha256.clone();
    }

    fn finish(mut self) -> Scanned {
        let lines = std::mem::take(&mut self.lines);
        if let Some(line) = lines.last() {
            self.line(&line);
        }
        let content = match (self.header, self.trailer) {
            _ if self.after_trailer => Err(refuse("there are lines after the trailer")),
            (Some(header), Some((trailer_line, trailer, before_trailer))) => Ok(Content {
                header,
                trailer_line,
                trailer,
                before_trailer,
                next_begin: self.next_begin.unwrap_or_else(|| lines.begin()),
            }),
            _ => Err(refuse("the trailer is missing: the file was cut")),
        };
        Scanned {
            sha256: self.sha256.finish(),
            sha384: self.sha384.map(Context::finish),
            windows: self.windows.into(),
            content,
        }
    }
}

fn refuse(reason: impl Into<String>) -> Rejection {
    Rejection::File(reason.into())
}

fn of_line(line: u64, error: &ShipmentLineError) -> Rejection {
    refuse(format!("line {line}: {error}"))
}
