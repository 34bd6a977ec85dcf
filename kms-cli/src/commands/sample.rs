//! `kms shipment make-sample`: makes a shipment as a vendor would, for trials.

use std::{
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use kms_client::sample::{DeviceProfile, OaepHash, SampleShipment, VendorKey, VendorTransportKey};
use kms_proto::v1 as proto;
use serde_json::json;

use super::{create, read, with_suffix, write};
use crate::{
    arguments::shipment::MakeSample,
    context::Context,
    failure::Failure,
    output::{facts, number, octets},
    progress,
};

pub(crate) async fn make(arguments: MakeSample, context: &Context) -> Result<(), Failure> {
    let out = &arguments.out;
    let batch =
        arguments.batch.clone().unwrap_or_else(|| out.file_stem().unwrap_or_default().to_string_lossy().into_owned());
    let mut sample = SampleShipment::new(
        batch,
        arguments.manufacturer,
        device_profile(&arguments.device_profile)?,
        arguments.devices,
    );
    sample.first_number = arguments.first;
    sample.groups = arguments.groups.clone();
    sample.equal_keys = arguments.equal_keys;

    let (transport_key, offered) = match &arguments.transport_key {
        Some(path) => (
            VendorTransportKey::from_pem(&read(path)?)
                .map_err(|error| Failure::from(error).while_doing(&format!("`{}`", path.display())))?,
            vec![OaepHash::Sha256],
        ),
        None => from_server(context).await?,
    };
    sample.oaep_hash = match arguments.oaep_hash {
        Some(hash) if arguments.transport_key.is_none() && !offered.contains(&hash) => {
            return Err(Failure::usage(format!("--oaep-hash: the server's HSM does not open {}", hash.name())));
        }
        Some(hash) => hash,
        None if offered.contains(&OaepHash::Sha256) => OaepHash::Sha256,
        None => OaepHash::Sha1,
    };

    let vendor_key_file = arguments.vendor_key.clone().unwrap_or_else(|| with_suffix(out, ".vendor-key.pem"));
    let vendor_key = vendor_key(&vendor_key_file)?;
    let (public_file, signature_file, devices_file) =
        (with_suffix(&vendor_key_file, ".pub.pem"), with_suffix(out, ".sig"), with_suffix(out, ".devices.jsonl"));
    let public_file = if vendor_key_file.extension().is_some_and(|extension| extension == "pem") {
        vendor_key_file.with_extension("pub.pem")
    } else {
        public_file
    };
    if !public_file.exists() {
        write(&public_file, false, vendor_key.public_pem()?.as_bytes())?;
    }

    let mut shipment = BufWriter::with_capacity(1 << 20, create(out, false)?);
    let mut devices = (!arguments.no_devices_file)
        .then(|| create(&devices_file, true).map(|file| BufWriter::with_capacity(1 << 20, file)))
        .transpose()?;
    let bar = progress::count("writing  ", arguments.devices);
    let started = std::time::Instant::now();
    let signature = sample.write(
        &transport_key,
        &vendor_key,
        &mut shipment,
        devices.as_mut().map(|writer| writer as &mut dyn Write),
        &mut |written| bar.set_position(written),
    )?;
    bar.finish_and_clear();
    let rate = arguments.devices as f64 / started.elapsed().as_secs_f64();
    write(&signature_file, false, &signature)?;

    if devices.is_some() {
        eprintln!(
            "WARNING: `{}` has the keys of all {} devices in PLAINTEXT, for meter simulators.",
            devices_file.display(),
            number(arguments.devices)
        );
        eprintln!("WARNING: these keys are known to this machine: never put them into real meters.");
    }
    let shown = |path: &PathBuf| path.display().to_string();
    context.output.show(
        || {
            json!({
                "shipment": shown(out), "signature": shown(&signature_file), "vendor_key": shown(&vendor_key_file), "vendor_public_key": shown(&public_file),
                "devices_file": devices.is_some().then(|| shown(&devices_file)), "devices": arguments.devices, "oaep_hash": sample.oaep_hash.name(),
                "transport_key": octets(&transport_key.fingerprint()),
            })
        },
        || {
            let facts = facts([
                ("shipment", format!("{} ({} devices, {:.0} a second)", shown(out), number(arguments.devices), rate)),
                ("signature", shown(&signature_file)),
                ("vendor key", shown(&vendor_key_file)),
                ("vendor public key", shown(&public_file)),
                ("plaintext keys", if devices.is_some() { shown(&devices_file) } else { String::new() }),
                ("for", format!("transport key {}, {}", octets(&transport_key.fingerprint()), sample.oaep_hash.name())),
            ]);
            let urn = format!("urn:meterkms:ISLAND:manufacturer:{}", arguments.manufacturer.to_string().to_lowercase());
            format!(
                "{facts}\nNext:\n  kms principal add {urn} --shipment-key {}\n  kms shipment import {} --manufacturer {urn}\n",
                shown(&public_file),
                shown(out)
            )
        },
    );
    Ok(())
}

/// A profile that comes with the system, or a file.
fn device_profile(name: &str) -> Result<DeviceProfile, Failure> {
    let shipped = DeviceProfile::SHIPPED.iter().find(|(known, _)| *known == name).map(|(_, text)| (*text).to_owned());
    let text = match shipped {
        Some(text) => text,
        None if Path::new(name).exists() => String::from_utf8(read(Path::new(name))?)
            .map_err(|_| Failure::usage(format!("--device-profile: `{name}` is not UTF-8 text")))?,
        None => {
            let names: Vec<_> = DeviceProfile::SHIPPED.iter().map(|(known, _)| *known).collect();
            return Err(Failure::usage(format!(
                "--device-profile: `{name}` is neither a file nor one of {}",
                names.join(", ")
            )));
        }
    };
    DeviceProfile::parse(&text).map_err(|error| Failure::usage(format!("--device-profile: `{name}`, {error}")))
}

async fn from_server(context: &Context) -> Result<(VendorTransportKey, Vec<OaepHash>), Failure> {
    let mut client = context.connect().await?.shipments();
    let key = progress::waiting(
        "requesting the transport key",
        client.get_vendor_transport_key(proto::GetVendorTransportKeyRequest {}),
    )
    .await?
    .into_inner();
    let hashes: Vec<_> = key.oaep_hashes.iter().filter_map(|name| OaepHash::parse(name).ok()).collect();
    if hashes.is_empty() {
        return Err(Failure::failed(
            "the server's HSM opens neither RSA-OAEP with SHA-256 nor with SHA-1: no shipment can be made for it",
        ));
    }
    Ok((VendorTransportKey::from_der(&key.spki)?, hashes))
}

/// The vendor's key: read, or made and written.
fn vendor_key(path: &Path) -> Result<VendorKey, Failure> {
    if path.exists() {
        return VendorKey::from_pem(&read(path)?)
            .map_err(|error| Failure::from(error).while_doing(&format!("`{}`", path.display())));
    }
    let key = VendorKey::generate()?;
    write(path, true, key.private_pem().as_bytes())?;
    Ok(key)
}
