//! Vendor shipments: made, sent and imported as a vendor and an officer do it.

use std::{
    fs::File,
    io::{BufWriter, Read as _, Write},
    path::Path,
    time::{Duration, Instant},
};

use aws_lc_rs::digest::{Context, SHA256};
use bytes::Bytes;
use futures::stream;
use kms_client::{
    proto::{
        GetVendorTransportKeyRequest, ImportShipmentRequest, Shipment, UploadShipmentRequest, UploadShipmentStart,
    },
    sample::{DeviceProfile, FlagId, OaepHash, SampleShipment, VendorTransportKey},
};

use crate::{
    Failure,
    island::{FLAG_ID, HEAD_END, Island, MANUFACTURER},
};

/// How long a shipment took, without the making of the file.
pub(crate) struct Imported {
    pub(crate) meters: u64,
    /// From the first octet sent to the last meter imported.
    pub(crate) time: Duration,
}

impl Island {
    /// Makes a shipment of so many meters from this number on and imports it, assigned to the
    /// head-end. With `devices`, the keys are written there in plaintext.
    pub(crate) async fn import(
        &self,
        first: u64,
        meters: u64,
        devices: Option<&mut dyn Write>,
    ) -> Result<Imported, Failure> {
        self.import_for(HEAD_END, first, meters, devices).await
    }

    /// The same, assigned to this head-end.
    pub(crate) async fn import_for(
        &self,
        head_end: &str,
        first: u64,
        meters: u64,
        devices: Option<&mut dyn Write>,
    ) -> Result<Imported, Failure> {
        let mut shipments = self.officer.shipments();
        let transport = shipments.get_vendor_transport_key(GetVendorTransportKeyRequest {}).await?.into_inner();
        let (_, profile) =
            DeviceProfile::SHIPPED.iter().find(|(name, _)| *name == PROFILE).ok_or("the device profile is missing")?;
        let mut sample = SampleShipment::new(
            format!("BENCH-{first}"),
            FlagId::parse(FLAG_ID)?,
            DeviceProfile::parse(profile)?,
            meters,
        );
        sample.first_number = first;
        if !transport.oaep_hashes.iter().any(|hash| hash == OaepHash::Sha256.name()) {
            sample.oaep_hash = OaepHash::Sha1;
        }
        let path = self.directory.join("shipment.jsonl");
        let mut file = BufWriter::with_capacity(1 << 20, File::create(&path)?);
        let signature = sample.write(
            &VendorTransportKey::from_der(&transport.spki)?,
            &self.vendor,
            &mut file,
            devices,
            &mut |_| {},
        )?;
        file.into_inner().map_err(|error| error.into_error())?.sync_all()?;
        let file_sha256 = digest(&path)?;

        let begun = Instant::now();
        let start = UploadShipmentStart {
            file_sha256: file_sha256.clone(),
            file_length: std::fs::metadata(&path)?.len(),
            signature: signature.into(),
            manufacturer: MANUFACTURER.to_owned(),
        };
        let reader = (File::open(&path)?, Some(start), 0);
        let messages = stream::unfold(reader, |(mut file, start, offset)| async move {
            let mut octets = Vec::with_capacity(UPLOAD_CHUNK);
            // A file that cannot be read ends the upload too early, which the server refuses.
            (&mut file).take(UPLOAD_CHUNK as u64).read_to_end(&mut octets).ok()?;
            if octets.is_empty() && start.is_none() {
                return None;
            }
            let next = offset + octets.len() as u64;
            Some((UploadShipmentRequest { start, offset, octets: octets.into() }, (file, None, next)))
        });
        shipments.upload_shipment(messages).await?;
        let mut answers = shipments
            .import_shipment(ImportShipmentRequest { file_sha256, head_end: head_end.to_owned() })
            .await?
            .into_inner();
        let mut last = Shipment::default();
        while let Some(answer) = answers.message().await? {
            last = answer.shipment.unwrap_or(last);
        }
        let time = begun.elapsed();
        std::fs::remove_file(&path)?;
        if last.state != "imported" || last.imported != meters {
            return Err(format!(
                "of {meters} meters {} were imported, {} refused; {}",
                last.imported, last.refused, last.refusal
            )
            .into());
        }
        Ok(Imported { meters, time })
    }
}

fn digest(path: &Path) -> Result<Bytes, Failure> {
    let (mut file, mut context, mut buffer) = (File::open(path)?, Context::new(&SHA256), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(context.finish().as_ref().to_vec().into()),
            read => context.update(buffer.get(..read).unwrap_or_default()),
        }
    }
}

/// One security setup with four keys, all shipped.
const PROFILE: &str = "generic-suite0";
const UPLOAD_CHUNK: usize = 256 << 10;
