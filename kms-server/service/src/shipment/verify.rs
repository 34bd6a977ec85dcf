//! The first pass over a shipment: signature, digest, count and header. Nothing is imported before
//! all of these are right.

use std::sync::Arc;

use aws_lc_rs::{
    digest::{Context, Digest, SHA256, SHA384},
    signature::{ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, UnparsedPublicKey, VerificationAlgorithm},
};
use kms_domain::{DeviceProfile, OaepHash, Principal, ShipmentHeader, ShipmentLineError, ShipmentTrailer};
use kms_hsm::{BatchKey, HsmError};
use kms_store::ShipmentRow;
use x509_parser::{prelude::FromDer, x509::SubjectPublicKeyInfo};

use super::{
    error::no_shipment_key,
    spool::{Line, Lines, WindowDigest, Windows, digest_of},
    transport_key::{accepted_version, oaep_hashes},
};
use crate::island::IslandContext;
use kms_base::error::ServiceError;

/// A shipment whose manufacturer's signature was verified.
pub(super) struct Verified {
    pub(super) header: ShipmentHeader,
    pub(super) profile: DeviceProfile,
    pub(super) batch_key: BatchKey,
    /// Device lines: from line 2 to line `devices + 1`.
    pub(super) devices: u64,
    /// The first octet of the line that is imported next.
    pub(super) next_begin: u64,
    /// The digests that the second pass compares windows with.
    pub(super) windows: Arc<[WindowDigest]>,
}

/// Why a shipment is not imported.
pub(super) enum Rejection {
    /// The file is wrong: it is refused.
    File(String),
    /// Something else failed: the call can be repeated.
    Trouble(ServiceError),
}

impl<E: Into<ServiceError>> From<E> for Rejection {
    fn from(error: E) -> Self {
        Self::Trouble(error.into())
    }
}

/// Reads and verifies the whole file.
pub(super) async fn verify(
    island: &IslandContext,
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
        return Err(refuse("the uploaded octets are not the announced file: their SHA-256 differs"));
    }
    key.verify(scanned.sha384.as_ref().unwrap_or(&scanned.sha256), signature)?;
    let content = scanned.content?;
    let header = check_header(manufacturer, &content.header)?;
    let trailer = ShipmentTrailer::parse(&content.trailer).map_err(|error| of_line(content.trailer_line, &error))?;
    if trailer.sha256 != *content.before_trailer.as_ref() {
        return Err(refuse(format!(
            "line {}: trailer.sha256 is not the SHA-256 of the lines before the trailer",
            content.trailer_line
        )));
    }
    let devices = content.trailer_line.saturating_sub(FIRST_DEVICE_LINE);
    if trailer.devices != devices {
        return Err(refuse(format!(
            "line {}: trailer.devices is {}, but the file has {devices} device lines",
            content.trailer_line, trailer.devices
        )));
    }
    let profile = profile(island, &header)?;
    let batch_key = open_batch_key(island, &header).await?;
    Ok(Verified { header, profile, batch_key, devices, next_begin: content.next_begin, windows: scanned.windows })
}

/// Checks the first line alone, before the rest has arrived: whether the file can be a shipment of
/// this manufacturer to this island. The line is not authenticated yet: the import verifies it with
/// the whole file. A server that cannot reach its token, or whose token does not hold the transport
/// key, cannot check the key: the import does.
pub(super) async fn preview(island: &IslandContext, manufacturer: &Principal, line: &[u8]) -> Result<(), Rejection> {
    let header = check_header(manufacturer, line)?;
    profile(island, &header)?;
    match accepted_version(island, &header.transport_key).await {
        Ok(None) => Err(foreign_transport_key()),
        Ok(Some(_)) => oaep_hashes(island).await.map_or(Ok(()), |offered| check_hash(&header, &offered)),
        Err(_) => Ok(()),
    }
}

fn check_header(manufacturer: &Principal, line: &[u8]) -> Result<ShipmentHeader, Rejection> {
    let header = ShipmentHeader::parse(line).map_err(|error| of_line(1, &error))?;
    if !names(manufacturer, &header) {
        return Err(refuse(format!(
            "line 1: manufacturer: {} is not the manufacturer `{}` that signed the file",
            header.manufacturer, manufacturer.id
        )));
    }
    Ok(header)
}

fn profile(island: &IslandContext, header: &ShipmentHeader) -> Result<DeviceProfile, Rejection> {
    let known = island.profiles.get(&header.device_profile).cloned();
    known.ok_or_else(|| {
        refuse(format!("line 1: device_profile: `{}` is not a device profile of this server", header.device_profile))
    })
}

/// Whether the header's FLAG id is the signer's. The name of a manufacturer is its FLAG id in lower
/// case, or begins with the FLAG id and `-`.
fn names(manufacturer: &Principal, header: &ShipmentHeader) -> bool {
    let name = manufacturer.id.name();
    let flag_id = name.split_once('-').map_or(name, |(flag_id, _)| flag_id);
    flag_id.eq_ignore_ascii_case(header.manufacturer.as_str())
}

async fn open_batch_key(island: &IslandContext, header: &ShipmentHeader) -> Result<BatchKey, Rejection> {
    let Some(version) = accepted_version(island, &header.transport_key).await? else {
        return Err(foreign_transport_key());
    };
    let offered = oaep_hashes(island).await?;
    let hash = header.oaep_hash;
    check_hash(header, &offered)?;
    match island.hsm.paid_by(IMPORTS).open_batch_key(version, hash, header.batch_key.clone()).await {
        Ok(batch_key) => Ok(batch_key),
        Err(HsmError::WrappedKeyInvalid { .. }) => Err(refuse(
            "line 1: batch_key: it cannot be opened with the vendor transport key: it is damaged, or does not hold a 32-octet AES key",
        )),
        Err(error) => Err(error.into()),
    }
}

fn foreign_transport_key() -> Rejection {
    refuse("line 1: transport_key: it is not this island's vendor transport key; get that with `GetVendorTransportKey`")
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

/// A manufacturer's public key.
struct ShipmentKey {
    algorithm: &'static dyn VerificationAlgorithm,
    sha384: bool,
    point: Vec<u8>,
}

impl ShipmentKey {
    /// P-256 goes with SHA-256, P-384 with SHA-384.
    fn of(manufacturer: &Principal) -> Result<Self, Rejection> {
        let der = manufacturer.shipment_key.as_ref().ok_or_else(|| no_shipment_key(&manufacturer.id))?;
        let fault = || ServiceError::Internal(format!("the shipment key of `{}` cannot be read", manufacturer.id));
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
            .map_err(|_| refuse("the signature does not verify with the manufacturer's key"))
    }
}

/// Reads the file once: computes its hashes and finds its lines.
struct Scan {
    sha256: Context,
    sha384: Option<Context>,
    /// SHA-256 of all lines before the present one.
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
            _ if self.after_trailer => Err(refuse("the file has lines after the trailer")),
            (Some(header), Some((trailer_line, trailer, before_trailer))) => Ok(Content {
                header,
                trailer_line,
                trailer,
                before_trailer,
                next_begin: self.next_begin.unwrap_or_else(|| lines.begin()),
            }),
            _ => Err(refuse("the trailer is missing: the file is not complete")),
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

/// The number of the first device line.
pub(super) const FIRST_DEVICE_LINE: u64 = 2;
/// The name under which all imports wait in the queues of the tokens.
pub(super) const IMPORTS: &str = "imports";
