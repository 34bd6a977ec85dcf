//! `kms shipment`: import, list, show.

use std::{
    collections::HashSet,
    fs,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use aws_lc_rs::digest;
use indicatif::ProgressBar;
use kms_client::{Connection, RetryPolicy, ServerError};
use kms_proto::v1 as proto;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::Code;

use super::{create, octets, read, sample, with_suffix};
use crate::{
    arguments::shipment::{ImportShipment, ShipmentCommand},
    context::Context,
    failure::Failure,
    json, output,
    output::{Rows, facts, number, plural},
    progress,
};

pub(crate) async fn run(command: ShipmentCommand, context: &Context) -> Result<(), Failure> {
    match command {
        ShipmentCommand::Import(arguments) => import(arguments, context).await,
        ShipmentCommand::List => list(context).await,
        ShipmentCommand::Show { shipment } => show(&shipment, context).await,
        ShipmentCommand::MakeSample(arguments) => sample::make(arguments, context).await,
    }
}

async fn import(arguments: ImportShipment, context: &Context) -> Result<(), Failure> {
    let signature_file = arguments.signature.clone().unwrap_or_else(|| with_suffix(&arguments.file, ".sig"));
    let signature = read(&signature_file).map_err(|failure| failure.while_doing("signature"))?;
    let file = LocalFile::open(&arguments.file)?;
    // Before anything is imported: a report that cannot be written would be lost.
    let mut report = arguments
        .report
        .as_deref()
        .map(|path| create(path, false).map(|file| (path, io::BufWriter::new(file))))
        .transpose()?;
    let connection = context.connect().await?;
    let start = proto::UploadShipmentStart {
        file_sha256: octets(file.sha256),
        file_length: file.length,
        signature: signature.into(),
        manufacturer: arguments.manufacturer.to_string(),
    };
    file.upload(&connection, &start).await?;

    let (mut shown, mut shown_duplicates) = (Vec::new(), Vec::new());
    let mut told = Told::default();
    let shipment = import_uploaded(&connection, &file, &arguments, &mut |step| {
        // A call that continues a broken one repeats what the broken one has reported.
        let refused_lines: Vec<_> = step.refused_lines.iter().filter(|line| told.refused.insert(line.line)).collect();
        let duplicate_keys: Vec<_> = step
            .duplicate_keys
            .iter()
            .filter(|key| told.duplicates.insert((key.line, key.security_setup.clone(), key.key_type.clone())))
            .collect();
        let room = LINES_SHOWN.saturating_sub(shown_duplicates.len());
        shown_duplicates.extend(duplicate_keys.iter().take(room).map(|key| (*key).clone()));
        let room = LINES_SHOWN.saturating_sub(shown.len());
        shown.extend(refused_lines.iter().take(room).map(|line| (*line).clone()));
        if let Some((path, report)) = &mut report {
            let refused = refused_lines.iter().map(|line| json!({"refused_line": json::message("RefusedLine", *line)}));
            let duplicates =
                duplicate_keys.iter().map(|key| json!({"duplicate_key": json::message("DuplicateKey", *key)}));
            for line in refused.chain(duplicates) {
                writeln!(report, "{line}")
                    .map_err(|error| Failure::failed(format!("cannot write `{}`: {error}", path.display())))?;
            }
        }
        Ok(())
    })
    .await?;
    if let Some((path, mut report)) = report {
        report.flush().map_err(|error| Failure::failed(format!("cannot write `{}`: {error}", path.display())))?;
    }
    context.output.show(
        || {
            let refused: Vec<_> = shown.iter().map(|line| json::message("RefusedLine", line)).collect();
            let duplicates: Vec<_> = shown_duplicates.iter().map(|key| json::message("DuplicateKey", key)).collect();
            json!({"shipment": json::message("Shipment", &shipment), "refused_lines": refused, "duplicate_keys": duplicates})
        },
        || {
            let mut text = shipment_text(&shipment);
            if !shown.is_empty() {
                let mut rows = Rows::new(&["line", "field", "refused because"]).numbers(&[0]).sentences(&[2]);
                for line in &shown {
                    rows.row([line.line.to_string(), line.field.clone(), line.reason.clone()]);
                }
                text.push('\n');
                text.push_str(&rows.text_or(""));
                if told.refused.len() > shown.len() {
                    text.push_str(&format!("and {} more", number((told.refused.len() - shown.len()) as u64)));
                    text.push_str(if arguments.report.is_some() { ", all in the report file\n" } else { "; --report FILE writes them all\n" });
                }
            }
            if !shown_duplicates.is_empty() {
                text.push_str("\nkeys that another meter has too: a mistake of the vendor, and a person who knows the key of one meter knows that of the other\n");
                text.push_str(&duplicates_text(&shown_duplicates));
                let more = shipment.duplicates.saturating_sub(shown_duplicates.len() as u64);
                if more > 0 {
                    text.push_str(&format!("and {} more", number(more)));
                    text.push_str(if arguments.report.is_some() { ", in the report file\n" } else { "; --report FILE writes them all\n" });
                }
            }
            text
        },
    );
    match shipment.state.as_str() {
        "imported" if shipment.refused == 0 && shipment.duplicates == 0 => Ok(()),
        "imported" if shipment.refused == 0 => {
            Err(Failure::partly(format!("all meters are imported, but {}", duplicates_of(&shipment))).with_hint(
                "ask the vendor for new keys, or rotate them: `kms campaign create NAME --rotate GUEK --batch BATCH`",
            ))
        }
        "imported" => {
            let duplicates =
                if shipment.duplicates == 0 { String::new() } else { format!("; {}", duplicates_of(&shipment)) };
            Err(Failure::partly(format!(
                "{} refused, the others are imported{duplicates}",
                plural(shipment.refused, "line")
            )))
        }
        "refused" => Err(Failure::failed(format!(
            "the shipment was refused as a whole, nothing was imported: {}",
            shipment.refusal
        ))),
        state => {
            Err(Failure::failed(format!("the import ended in state `{state}`: run the same command again to continue")))
        }
    }
}

fn duplicates_of(shipment: &proto::Shipment) -> String {
    match shipment.duplicates {
        1 => "1 key is equal to a key of another meter".to_owned(),
        more => format!("{} keys are equal to keys of other meters", number(more)),
    }
}

fn duplicates_text(duplicates: &[proto::DuplicateKey]) -> String {
    let mut rows = Rows::new(&["line", "meter", "setup", "key", "as meter"]).numbers(&[0]);
    for key in duplicates {
        rows.row([
            key.line.to_string(),
            output::octets(&key.meter),
            output::obis(&key.security_setup),
            key.key_type.clone(),
            output::octets(&key.other_meter),
        ]);
    }
    rows.text_or("")
}

/// What the server has reported of the import: refused lines, and duplicate keys by line, security
/// setup and key type.
#[derive(Default)]
struct Told {
    refused: HashSet<u64>,
    duplicates: HashSet<(u64, bytes::Bytes, String)>,
}

/// A shipment on this machine.
struct LocalFile {
    path: PathBuf,
    length: u64,
    sha256: [u8; 32],
}

impl LocalFile {
    /// Reads the file once, for its digest.
    fn open(path: &Path) -> Result<Self, Failure> {
        let refuse = |error: io::Error| Failure::failed(format!("cannot read `{}`: {error}", path.display()));
        let mut file = fs::File::open(path).map_err(refuse)?;
        let total = file.metadata().map_err(refuse)?.len();
        let bar = progress::octets("reading  ", total);
        let mut hash = digest::Context::new(&digest::SHA256);
        let mut buffer = vec![0; 1 << 20];
        let mut length = 0;
        loop {
            match file.read(&mut buffer).map_err(refuse)? {
                0 => break,
                read => {
                    hash.update(buffer.get(..read).unwrap_or_default());
                    length += read as u64;
                    bar.set_position(length);
                }
            }
        }
        bar.finish_and_clear();
        if length == 0 {
            return Err(Failure::usage(format!("`{}` is empty", path.display())));
        }
        let mut sha256 = [0; 32];
        sha256.copy_from_slice(hash.finish().as_ref());
        Ok(Self { path: path.to_owned(), length, sha256 })
    }

    /// Sends the octets that the server does not have yet. It continues where an earlier attempt
    /// stopped.
    async fn upload(&self, connection: &Connection, start: &proto::UploadShipmentStart) -> Result<(), Failure> {
        let retry = RetryPolicy::default();
        let bar = progress::octets("uploading", self.length);
        let mut failures = 0;
        loop {
            let error = match self.upload_rest(connection, start, &bar).await {
                Ok(()) => {
                    bar.finish_and_clear();
                    return Ok(());
                }
                Err(error) => error,
            };
            failures += 1;
            let UploadError::Server(error) = error else {
                bar.finish_and_clear();
                return Err(error.into());
            };
            match retry.delay_after(failures, &error) {
                Some(delay) => tokio::time::sleep(delay).await,
                None => {
                    bar.finish_and_clear();
                    return Err(Failure::from(error).while_doing("upload"));
                }
            }
        }
    }

    async fn upload_rest(
        &self,
        connection: &Connection,
        start: &proto::UploadShipmentStart,
        bar: &ProgressBar,
    ) -> Result<(), UploadError> {
        let known =
            connection.shipments().get_shipment(proto::GetShipmentRequest { file_sha256: octets(self.sha256) }).await;
        let received = match known {
            // An upload that ended is complete, unless the file was refused: it can be sent again
            // with the right signature.
            Ok(shipment) if !matches!(shipment.get_ref().state.as_str(), "" | "uploading" | "refused") => return Ok(()),
            Ok(shipment) => shipment.get_ref().received,
            Err(status) if status.code() == Code::NotFound => 0,
            Err(status) => return Err(ServerError::from(status).into()),
        };
        if received > self.length {
            return Err(UploadError::File(format!(
                "the server has {received} octets of this file, which has {}: it has changed since the upload began",
                self.length
            )));
        }
        bar.set_position(received);
        bar.reset_eta();
        let (sender, receiver) = mpsc::channel(4);
        let reading = {
            let (path, start, bar) = (self.path.clone(), start.clone(), bar.clone());
            tokio::task::spawn_blocking(move || send_octets(&path, received, start, &sender, &bar))
        };
        let answer = connection.shipments().upload_shipment(ReceiverStream::new(receiver)).await;
        // The reader ends by itself when its channel closes. Its own error tells more than that of
        // the broken stream.
        match reading.await {
            Ok(Err(error)) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(UploadError::File(format!("cannot read `{}`: {error}", self.path.display())));
            }
            _ => {}
        }
        let shipment = answer.map_err(ServerError::from)?.into_inner();
        if shipment.received < self.length && matches!(shipment.state.as_str(), "" | "uploading") {
            return Err(ServerError::from(tonic::Status::unavailable("the upload ended too early")).into());
        }
        Ok(())
    }
}

enum UploadError {
    Server(ServerError),
    File(String),
}

impl From<ServerError> for UploadError {
    fn from(error: ServerError) -> Self {
        Self::Server(error)
    }
}

impl From<UploadError> for Failure {
    fn from(error: UploadError) -> Self {
        match error {
            UploadError::Server(error) => error.into(),
            UploadError::File(text) => Self::failed(text),
        }
    }
}

fn send_octets(
    path: &Path,
    mut offset: u64,
    start: proto::UploadShipmentStart,
    sender: &mpsc::Sender<proto::UploadShipmentRequest>,
    bar: &ProgressBar,
) -> io::Result<()> {
    let mut file = fs::File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut start = Some(start);
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        (&mut file).take(CHUNK as u64).read_to_end(&mut chunk)?;
        if chunk.is_empty() && start.is_none() {
            return Ok(());
        }
        let length = chunk.len() as u64;
        let message = proto::UploadShipmentRequest { start: start.take(), offset, octets: chunk.into() };
        sender.blocking_send(message).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        offset += length;
        bar.set_position(offset);
    }
}

async fn import_uploaded(
    connection: &Connection,
    file: &LocalFile,
    arguments: &ImportShipment,
    each: &mut dyn FnMut(&proto::ImportShipmentResponse) -> Result<(), Failure>,
) -> Result<proto::Shipment, Failure> {
    let retry = RetryPolicy::default();
    let request = proto::ImportShipmentRequest {
        file_sha256: octets(file.sha256),
        head_end: super::text(arguments.head_end.as_ref()),
    };
    let mut bar = progress::spinner("verifying signature, digest and count");
    let (mut counting, mut failures) = (false, 0);
    let mut last = proto::Shipment::default();
    loop {
        let outcome = async {
            let mut steps = connection.shipments().import_shipment(request.clone()).await?.into_inner();
            while let Some(step) = steps.next().await {
                let step = step?;
                each(&step)?;
                if let Some(shipment) = step.shipment {
                    if !counting && shipment.devices > 0 {
                        bar.finish_and_clear();
                        bar = progress::count("importing", shipment.devices);
                        counting = true;
                    }
                    bar.set_position(shipment.imported + shipment.unchanged + shipment.refused);
                    last = shipment;
                    failures = 0;
                }
            }
            Ok::<(), ImportError>(())
        }
        .await;
        let error = match outcome {
            Ok(()) if matches!(last.state.as_str(), "imported" | "refused") => {
                bar.finish_and_clear();
                return Ok(last);
            }
            Ok(()) => ServerError::from(tonic::Status::unavailable("the import stopped before its end")),
            Err(ImportError::Server(error)) => error,
            Err(ImportError::Local(failure)) => {
                bar.finish_and_clear();
                return Err(failure);
            }
        };
        failures += 1;
        match retry.delay_after(failures, &error) {
            Some(delay) => tokio::time::sleep(delay.max(Duration::from_millis(10))).await,
            None => {
                bar.finish_and_clear();
                let may_go_on = error.is_unavailable();
                let failure = Failure::from(error).while_doing("import");
                return Err(if may_go_on {
                    failure.with_hint("run the same command again: it continues where it stopped")
                } else {
                    failure
                });
            }
        }
    }
}

enum ImportError {
    Server(ServerError),
    Local(Failure),
}

impl From<tonic::Status> for ImportError {
    fn from(status: tonic::Status) -> Self {
        Self::Server(status.into())
    }
}

impl From<Failure> for ImportError {
    fn from(failure: Failure) -> Self {
        Self::Local(failure)
    }
}

async fn list(context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.shipments();
    let answer = progress::waiting("reading shipments", client.list_shipments(proto::ListShipmentsRequest {}))
        .await?
        .into_inner();
    context.output.show(
        || json::message("ListShipmentsResponse", &answer),
        || {
            let mut rows = Rows::new(&[
                "SHA-256",
                "batch",
                "manufacturer",
                "state",
                "devices",
                "imported",
                "unchanged",
                "refused",
                "duplicates",
            ])
            .numbers(&[4, 5, 6, 7, 8]);
            for shipment in &answer.shipments {
                // The digest in the length that `kms shipment show` needs. The name is enough to
                // tell the manufacturers apart.
                let manufacturer = shipment.manufacturer.rsplit(':').next().unwrap_or_default();
                rows.row([
                    output::octets(shipment.file_sha256.get(..SHOWN_OF_DIGEST).unwrap_or(&shipment.file_sha256)),
                    shipment.batch.clone(),
                    manufacturer.to_owned(),
                    shipment.state.clone(),
                    number(shipment.devices),
                    number(shipment.imported),
                    number(shipment.unchanged),
                    number(shipment.refused),
                    number(shipment.duplicates),
                ]);
            }
            rows.text_or("no shipments")
        },
    );
    Ok(())
}

async fn show(name: &str, context: &Context) -> Result<(), Failure> {
    let is_hex = name.bytes().all(|octet| octet.is_ascii_hexdigit());
    let whole = match hex::decode(name) {
        Ok(digest) if digest.len() == 32 => Some(digest),
        _ if Path::new(name).exists() => Some(LocalFile::open(Path::new(name))?.sha256.to_vec()),
        _ if is_hex && (FEWEST_DIGITS..64).contains(&name.len()) => None,
        _ => {
            return Err(Failure::usage(format!(
                "SHA256|FILE: `{name}` is neither {FEWEST_DIGITS} to 64 hex digits nor a file"
            )));
        }
    };
    let mut client = context.connect().await?.shipments();
    let file_sha256 = match whole {
        Some(digest) => digest.into(),
        None => {
            let known = progress::waiting("reading shipments", client.list_shipments(proto::ListShipmentsRequest {}))
                .await?
                .into_inner()
                .shipments;
            let mut matching = known
                .into_iter()
                .map(|shipment| shipment.file_sha256)
                .filter(|digest| output::octets(digest).starts_with(&name.to_uppercase()));
            match (matching.next(), matching.next()) {
                (Some(digest), None) => digest,
                (None, _) => {
                    return Err(Failure::failed(format!(
                        "no shipment whose SHA-256 begins with `{name}`: `kms shipment list` shows them"
                    )));
                }
                (Some(_), Some(_)) => {
                    return Err(Failure::usage(format!(
                        "more than one shipment begins with `{name}`: give more digits"
                    )));
                }
            }
        }
    };
    let request = proto::GetShipmentRequest { file_sha256 };
    let shipment = progress::waiting("reading the shipment", client.get_shipment(request)).await?.into_inner();
    context.output.show(|| json::message("Shipment", &shipment), || shipment_text(&shipment));
    Ok(())
}

fn shipment_text(shipment: &proto::Shipment) -> String {
    let received = if shipment.received == shipment.file_length {
        plural(shipment.file_length, "octet")
    } else {
        format!("{} of {} octets received", number(shipment.received), number(shipment.file_length))
    };
    facts([
        ("batch", shipment.batch.clone()),
        ("manufacturer", shipment.manufacturer.clone()),
        ("state", shipment.state.clone()),
        ("refused because", shipment.refusal.clone()),
        ("file", received),
        ("SHA-256", output::octets(&shipment.file_sha256)),
        ("devices", number(shipment.devices)),
        ("imported", number(shipment.imported)),
        ("already there", number(shipment.unchanged)),
        ("refused lines", number(shipment.refused)),
        ("duplicate keys", number(shipment.duplicates)),
    ])
}

const CHUNK: usize = 256 << 10;
const LINES_SHOWN: usize = 20;
/// Octets of a digest in lists.
const SHOWN_OF_DIGEST: usize = 8;
/// The fewest hex digits of a digest that `kms shipment show` accepts.
const FEWEST_DIGITS: usize = 8;
