//! Sample shipments, for trials: this module makes keys and writes shipments (docs/formats.md), as
//! a meter vendor would.
//!
//! The keys exist in plaintext in this process, and in the devices file where one is written: never
//! use them for real meters.

use std::{
    io::{self, Write},
    ops::Range,
};

use aes_kw::{KeyInit as _, KwAes256};
use aws_lc_rs::{
    digest, rand,
    rsa::{OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepAlgorithm, OaepPublicEncryptingKey, PublicEncryptingKey},
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
pub use kms_domain::{DeviceProfile, FlagId, OaepHash};
use kms_domain::{EncodedSecret, KeyShape, OwnerKind, ParseError, PrincipalId, SecuritySetupId, Shipped, SystemTitle};
use rustls_pki_types::{PrivateKeyDer, SubjectPublicKeyInfoDer, pem::PemObject};
use serde::Serialize;
use zeroize::Zeroizing;

use crate::transport_key::sha256;

/// What a sample shipment holds.
#[derive(Clone, Debug)]
pub struct SampleShipment {
    /// The batch's name, up to 64 characters.
    pub batch: String,
    /// The manufacturer's FLAG id; the first three octets of every system title.
    pub manufacturer: FlagId,
    /// The device profile: it says which keys a device has, and how long they are.
    pub device_profile: DeviceProfile,
    /// How many devices.
    pub devices: u64,
    /// The number of the first device; the last five octets of its system title.
    pub first_number: u64,
    /// The groups of every device.
    pub groups: Vec<String>,
    /// Counters of every device: what a head-end has used before.
    pub counters: Vec<SampleCounter>,
    /// The hash of RSA-OAEP.
    pub oaep_hash: OaepHash,
    /// The number of consecutive devices that have the same keys, as some vendors deliver them; 1:
    /// each device has its own.
    pub equal_keys: u64,
}

/// A counter that was in use before.
#[derive(Clone, Debug)]
pub struct SampleCounter {
    /// The security setup whose key it belongs to.
    pub security_setup: SecuritySetupId,
    /// The client system title.
    pub client_title: SystemTitle,
    /// The next counter that may be used.
    pub floor: u32,
    /// The head-end that keeps counting; `None`: the island counts from now on.
    pub owned_by: Option<PrincipalId>,
}

impl SampleShipment {
    /// A batch of meters with the keys that the device profile expects, numbered from 1, in no
    /// group, with counters that were never used.
    pub fn new(batch: impl Into<String>, manufacturer: FlagId, device_profile: DeviceProfile, devices: u64) -> Self {
        Self {
            batch: batch.into(),
            manufacturer,
            device_profile,
            devices,
            first_number: 1,
            groups: Vec::new(),
            counters: Vec::new(),
            oaep_hash: OaepHash::Sha256,
            equal_keys: 1,
        }
    }

    /// Writes the shipment, and returns its signature (DER, ECDSA with SHA-256 over the whole
    /// file). If `devices` is given, it gets the same devices with their keys in plaintext: JSON
    /// Lines, one device a line, `{"system_title", "security_suite", "security_setups":
    /// [{"logical_name", "kek", "guek", …}]}`, keys in hex. Memory does not grow with the number of
    /// devices. `progress` is called with the number of devices written, every [`PROGRESS_STEP`]
    /// and at the end.
    ///
    /// # Errors
    /// A name or number does not fit the format, a writer failed, or the cryptographic library did.
    pub fn write(
        &self,
        transport_key: &VendorTransportKey,
        vendor_key: &VendorKey,
        shipment: &mut dyn Write,
        mut devices: Option<&mut dyn Write>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Vec<u8>, SampleError> {
        self.check()?;
        let mut file = HashingWriter { inner: shipment, hash: digest::Context::new(&digest::SHA256) };
        let mut batch_key = Zeroizing::new([0; 32]);
        rand::fill(batch_key.as_mut_slice())?;
        file.line(&Header {
            format: "meterkms-shipment/1",
            batch: &self.batch,
            manufacturer: self.manufacturer.as_str(),
            device_profile: self.device_profile.name.as_str(),
            created: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            transport_key: hex::encode_upper(transport_key.fingerprint()),
            oaep_hash: self.oaep_hash.name(),
            batch_key: BASE64_STANDARD.encode(transport_key.encrypt(self.oaep_hash, batch_key.as_slice())?),
        })?;
        let wrapping = KwAes256::new_from_slice(batch_key.as_slice()).map_err(|_| SampleError::Cryptography)?;
        let mut line = Vec::with_capacity(2048);
        let mut keys = DeviceKeys::new(self);
        for written in 0..self.devices {
            let number = self.first_number + written;
            let title = hex::encode_upper(self.title(number));
            if written.is_multiple_of(self.equal_keys.max(1)) {
                keys.generate(&wrapping)?;
            }
            let device = Device {
                title: &title,
                serial: format!("{}", FIRST_SERIAL + number),
                groups: &self.groups,
                keys: &keys.shipped,
                counters: &keys.counters,
            };
            file.line_in(&mut line, &device)?;
            if let Some(devices) = devices.as_deref_mut() {
                keys.write_plain(&title, devices)?;
            }
            if (written + 1) % PROGRESS_STEP == 0 {
                progress(written + 1);
            }
        }
        let content = file.hash.clone().finish();
        file.line(&TrailerLine { trailer: Trailer { devices: self.devices, sha256: hex::encode_upper(content) } })?;
        file.inner.flush()?;
        if let Some(devices) = devices {
            devices.flush()?;
        }
        progress(self.devices);
        vendor_key.sign(&file.hash.finish())
    }

    /// The system title of a device: FLAG id and the number in 5 octets.
    fn title(&self, number: u64) -> [u8; 8] {
        let mut title = number.to_be_bytes();
        for (octet, letter) in title.iter_mut().zip(self.manufacturer.as_str().bytes()) {
            *octet = letter;
        }
        title
    }

    fn check(&self) -> Result<(), SampleError> {
        let well_named = |name: &str| {
            (1..=64).contains(&name.len())
                && name.bytes().all(|octet| octet.is_ascii_graphic() && !matches!(octet, b'"' | b'\\'))
        };
        if !well_named(&self.batch) {
            return Err(
                ParseError::new("batch", "not 1 to 64 printable ASCII characters without blanks and quotes").into()
            );
        }
        if self.devices == 0 || self.first_number == 0 || self.first_number.saturating_add(self.devices) > 1 << 40 {
            return Err(ParseError::new(
                "devices",
                "the numbers of the devices must lie between 1 and 2^40 - 1, and there must be one at least",
            )
            .into());
        }
        Ok(())
    }
}

/// An island's RSA public key that batch keys are encrypted to.
#[derive(Clone, Debug)]
pub struct VendorTransportKey {
    key: PublicEncryptingKey,
    fingerprint: [u8; 32],
}

impl VendorTransportKey {
    /// The key of a SubjectPublicKeyInfo, DER.
    ///
    /// # Errors
    /// Not an RSA public key.
    pub fn from_der(spki: &[u8]) -> Result<Self, SampleError> {
        let key = PublicEncryptingKey::from_der(spki).map_err(|_| SampleError::TransportKey)?;
        Ok(Self { key, fingerprint: sha256(spki) })
    }

    /// The key of a SubjectPublicKeyInfo, PEM (`-----BEGIN PUBLIC KEY-----`).
    ///
    /// # Errors
    /// Not an RSA public key in PEM.
    pub fn from_pem(spki: &[u8]) -> Result<Self, SampleError> {
        Self::from_der(&SubjectPublicKeyInfoDer::from_pem_slice(spki).map_err(|_| SampleError::TransportKey)?)
    }

    /// SHA-256 of the SubjectPublicKeyInfo, which shipments name.
    pub const fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    fn encrypt(&self, hash: OaepHash, octets: &[u8]) -> Result<Vec<u8>, SampleError> {
        let key = OaepPublicEncryptingKey::new(self.key.clone())?;
        let mut encrypted = vec![0; key.ciphertext_size()];
        let length = key.encrypt(oaep(hash), octets, &mut encrypted, None)?.len();
        encrypted.truncate(length);
        Ok(encrypted)
    }
}

/// The key that a vendor signs shipments with: ECDSA P-256.
pub struct VendorKey {
    pair: EcdsaKeyPair,
    pkcs8: Zeroizing<Vec<u8>>,
}

impl VendorKey {
    /// A new key.
    ///
    /// # Errors
    /// The cryptographic library failed.
    pub fn generate() -> Result<Self, SampleError> {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING)?;
        let pkcs8 = Zeroizing::new(pair.to_pkcs8v1()?.as_ref().to_vec());
        Ok(Self { pair, pkcs8 })
    }

    /// The key of a PEM file (PKCS#8 or SEC 1).
    ///
    /// # Errors
    /// Not a P-256 private key in PEM.
    pub fn from_pem(private_key: &[u8]) -> Result<Self, SampleError> {
        let der = PrivateKeyDer::from_pem_slice(private_key).map_err(|_| SampleError::VendorKey)?;
        let pair = EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_ASN1_SIGNING, der.secret_der())
            .map_err(|_| SampleError::VendorKey)?;
        let pkcs8 = Zeroizing::new(pair.to_pkcs8v1()?.as_ref().to_vec());
        Ok(Self { pair, pkcs8 })
    }

    /// The private key, PKCS#8 PEM.
    pub fn private_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(pem::encode(&pem::Pem::new("PRIVATE KEY", self.pkcs8.as_slice())))
    }

    /// The public key, SubjectPublicKeyInfo DER: what a manufacturer principal is registered with.
    ///
    /// # Errors
    /// The cryptographic library failed.
    pub fn public_der(&self) -> Result<Vec<u8>, SampleError> {
        use aws_lc_rs::encoding::AsDer as _;
        Ok(self.pair.public_key().as_der()?.as_ref().to_vec())
    }

    /// The public key, SubjectPublicKeyInfo PEM.
    ///
    /// # Errors
    /// The cryptographic library failed.
    pub fn public_pem(&self) -> Result<String, SampleError> {
        Ok(pem::encode(&pem::Pem::new("PUBLIC KEY", self.public_der()?)))
    }

    fn sign(&self, digest: &digest::Digest) -> Result<Vec<u8>, SampleError> {
        Ok(self.pair.sign_digest(digest)?.as_ref().to_vec())
    }
}

impl std::fmt::Debug for VendorKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VendorKey").finish_non_exhaustive()
    }
}

/// Why a sample shipment could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// A name or number does not fit the format.
    #[error(transparent)]
    Parse(#[from] ParseError),
    /// Not a transport key.
    #[error("vendor transport key: not an RSA public key (SubjectPublicKeyInfo, in PEM or DER)")]
    TransportKey,
    /// Not a vendor key.
    #[error("vendor key: not an EC P-256 private key in PEM")]
    VendorKey,
    /// Writing failed.
    #[error("cannot write the shipment: {0}")]
    Write(#[from] io::Error),
    /// The cryptographic library failed.
    #[error("the cryptographic library failed, probably for lack of memory: try again")]
    Cryptography,
}

impl From<aws_lc_rs::error::Unspecified> for SampleError {
    fn from(_: aws_lc_rs::error::Unspecified) -> Self {
        Self::Cryptography
    }
}

/// The keys of the device that is being written. The next device uses the same buffers.
struct DeviceKeys {
    suite: u8,
    random: Zeroizing<Vec<u8>>,
    slots: Vec<KeyPlace>,
    shipped: Vec<ShippedKey>,
    counters: Vec<ShippedCounter>,
}

/// The place of a key: in the device, and in the random octets.
struct KeyPlace {
    setup: SecuritySetupId,
    /// The name in the devices file.
    plain_name: String,
    is_secret: bool,
    octets: Range<usize>,
}

impl DeviceKeys {
    fn new(sample: &SampleShipment) -> Self {
        let profile = &sample.device_profile;
        let (mut slots, mut shipped, mut end) = (Vec::new(), Vec::new(), 0);
        for (setup, key) in profile.setups.iter().flat_map(|setup| setup.keys.iter().map(|key| (setup.id, key))) {
            // A key of a group would have to be the same in all its devices. So it is omitted,
            // unless the device profile requires it.
            if key.shipped == Shipped::No || (key.shipped == Shipped::Optional && key.owner != OwnerKind::Meter) {
                continue;
            }
            let name = profile.key_type_name(key.key_type);
            let (is_secret, length) = match key.shape {
                KeyShape::Aes(length) => (false, length.octets()),
                KeyShape::Secret => (true, SECRET_LENGTH),
            };
            slots.push(KeyPlace {
                setup,
                plain_name: name.to_lowercase().replace('-', "_"),
                is_secret,
                octets: end..end + length,
            });
            shipped.push(ShippedKey { setup: setup.to_string(), key_type: name, wrapped: String::new() });
            end += length;
        }
        let counters = sample.counters.iter().map(|counter| ShippedCounter {
            setup: counter.security_setup.to_string(),
            client_title: counter.client_title.to_string(),
            floor: counter.floor,
            owned_by: counter.owned_by.as_ref().map(PrincipalId::to_string),
        });
        Self {
            suite: profile.suite.number(),
            random: Zeroizing::new(vec![0; end]),
            slots,
            shipped,
            counters: counters.collect(),
        }
    }

    fn generate(&mut self, wrapping: &KwAes256) -> Result<(), SampleError> {
        rand::fill(&mut self.random)?;
        for (slot, shipped) in self.slots.iter().zip(&mut self.shipped) {
            let key = self.random.get(slot.octets.clone()).unwrap_or_default();
            let mut buffer = [0; LONGEST_WRAPPED];
            let wrapped = if slot.is_secret {
                wrapping.wrap_key(EncodedSecret::encode(key)?.octets(), &mut buffer)
            } else {
                wrapping.wrap_key(key, &mut buffer)
            };
            shipped.wrapped.clear();
            push_hex(&mut shipped.wrapped, wrapped.map_err(|_| SampleError::Cryptography)?);
        }
        Ok(())
    }

    fn write_plain(&self, title: &str, devices: &mut dyn Write) -> Result<(), SampleError> {
        let mut line = Zeroizing::new(String::with_capacity(128 + self.slots.len() * 128));
        line.push_str("{\"system_title\":\"");
        line.push_str(title);
        line.push_str("\",\"security_suite\":");
        line.push(char::from(b'0' + self.suite));
        line.push_str(",\"security_setups\":[");
        let mut open = None;
        for slot in &self.slots {
            // The slots of a setup stand together, as in the profile.
            if open != Some(slot.setup) {
                line.push_str(if open.is_some() { "},{" } else { "{" });
                line.push_str("\"logical_name\":\"");
                line.push_str(&slot.setup.to_string());
                line.push('"');
                open = Some(slot.setup);
            }
            line.push_str(",\"");
            line.push_str(&slot.plain_name);
            line.push_str("\":\"");
            push_hex(&mut line, self.random.get(slot.octets.clone()).unwrap_or_default());
            line.push('"');
        }
        line.push_str(if open.is_some() { "}]}\n" } else { "]}\n" });
        devices.write_all(line.as_bytes())?;
        Ok(())
    }
}

const fn oaep(hash: OaepHash) -> &'static OaepAlgorithm {
    match hash {
        OaepHash::Sha256 => &OAEP_SHA256_MGF1SHA256,
        OaepHash::Sha1 => &OAEP_SHA1_MGF1SHA1,
    }
}

/// Appends upper-case hex, in place: growing strings would leave copies of keys behind.
fn push_hex(text: &mut String, octets: &[u8]) {
    for octet in octets {
        for digit in [octet >> 4, octet & 15] {
            text.push(char::from(if digit < 10 { b'0' + digit } else { b'A' - 10 + digit }));
        }
    }
}

/// Hashes what is written.
struct HashingWriter<'a> {
    inner: &'a mut dyn Write,
    hash: digest::Context,
}

impl HashingWriter<'_> {
    fn line(&mut self, value: &impl Serialize) -> Result<(), SampleError> {
        self.line_in(&mut Vec::new(), value)
    }

    fn line_in(&mut self, line: &mut Vec<u8>, value: &impl Serialize) -> Result<(), SampleError> {
        line.clear();
        serde_json::to_writer(&mut *line, value).map_err(io::Error::from)?;
        line.push(b'\n');
        self.hash.update(line);
        self.inner.write_all(line)?;
        Ok(())
    }
}

#[derive(Serialize)]
struct Header<'a> {
    format: &'static str,
    batch: &'a str,
    manufacturer: &'a str,
    device_profile: &'a str,
    created: String,
    transport_key: String,
    oaep_hash: &'static str,
    batch_key: String,
}

#[derive(Serialize)]
struct Device<'a> {
    title: &'a str,
    serial: String,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    groups: &'a [String],
    keys: &'a [ShippedKey],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    counters: &'a [ShippedCounter],
}

#[derive(Serialize)]
struct ShippedKey {
    setup: String,
    #[serde(rename = "type")]
    key_type: String,
    wrapped: String,
}

#[derive(Serialize)]
struct ShippedCounter {
    setup: String,
    client_title: String,
    floor: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    owned_by: Option<String>,
}

#[derive(Serialize)]
struct TrailerLine {
    trailer: Trailer,
}

#[derive(Serialize)]
struct Trailer {
    devices: u64,
    sha256: String,
}

/// The number of devices between two calls of `progress`.
pub const PROGRESS_STEP: u64 = 1_000;
/// Device 1 has serial number 10000001.
const FIRST_SERIAL: u64 = 10_000_000;
/// Secrets that are no AES keys.
const SECRET_LENGTH: usize = 16;
/// A key of 32 octets is the longest: a secret of 16 has 24 in its encoding.
const LONGEST_WRAPPED: usize = 40;

#[cfg(test)]
mod tests {
    use aws_lc_rs::{
        encoding::{AsDer as _, PublicKeyX509Der},
        rsa::{KeySize, OaepPrivateDecryptingKey, PrivateDecryptingKey},
        signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey},
    };
    use kms_domain::{ShipmentDevice, ShipmentHeader, ShipmentTrailer};
    use serde_json::Value;

    use super::*;

    fn transport_key() -> (PrivateDecryptingKey, VendorTransportKey) {
        let private = PrivateDecryptingKey::generate(KeySize::Rsa2048).unwrap();
        let spki: PublicKeyX509Der<'_> = private.public_key().as_der().unwrap();
        let public = VendorTransportKey::from_der(spki.as_ref()).unwrap();
        (private, public)
    }

    #[test]
    fn a_shipment_can_be_opened_as_the_format_says() {
        let (private, public) = transport_key();
        let vendor_key = VendorKey::from_pem(VendorKey::generate().unwrap().private_pem().as_bytes()).unwrap();
        for (oaep_hash, (_, profile)) in
            [OaepHash::Sha256, OaepHash::Sha1].into_iter().cycle().zip(DeviceProfile::SHIPPED)
        {
            let mut sample = SampleShipment::new(
                "KAM-2026-0041",
                FlagId::parse("KAM").unwrap(),
                DeviceProfile::parse(profile).unwrap(),
                1_500,
            );
            sample.oaep_hash = oaep_hash;
            sample.counters.push(SampleCounter {
                security_setup: SecuritySetupId::DEFAULT,
                client_title: SystemTitle::parse("4D4D4D0000000001").unwrap(),
                floor: 1200,
                owned_by: None,
            });
            let (mut file, mut plain, mut steps) = (Vec::new(), Vec::new(), Vec::new());
            let signature = sample
                .write(&public, &vendor_key, &mut file, Some(&mut plain), &mut |written| steps.push(written))
                .unwrap();
            assert_eq!(steps, [1_000, 1_500]);
            UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, vendor_key.public_der().unwrap())
                .verify(&file, &signature)
                .unwrap();

            let lines: Vec<Value> = file
                .split_inclusive(|octet| *octet == b'\n')
                .map(|line| serde_json::from_slice(line).unwrap())
                .collect();
            assert_eq!(lines.len(), 1_502);
            let content: Vec<&[u8]> = file.split(|octet| *octet == b'\n').collect();
            let parsed = ShipmentHeader::parse(content[0]).unwrap();
            for line in &content[1..1_501] {
                ShipmentDevice::parse(line, &parsed, &sample.device_profile).unwrap();
            }
            assert_eq!(ShipmentTrailer::parse(content[1_501]).unwrap().devices, 1_500);
            let header = &lines[0];
            assert_eq!(header["transport_key"], hex::encode_upper(public.fingerprint()));
            let encrypted = BASE64_STANDARD.decode(header["batch_key"].as_str().unwrap()).unwrap();
            let mut buffer = vec![0; 256];
            let opened = OaepPrivateDecryptingKey::new(private.clone())
                .unwrap()
                .decrypt(oaep(oaep_hash), &encrypted, &mut buffer, None)
                .unwrap()
                .to_vec();
            let batch_key = KwAes256::new_from_slice(&opened).unwrap();

            let plain: Vec<Value> = plain
                .split_inclusive(|octet| *octet == b'\n')
                .map(|line| serde_json::from_slice(line).unwrap())
                .collect();
            assert_eq!(lines[1]["title"], "4B414D0000000001");
            assert_eq!(lines[1500]["title"], "4B414D00000005DC");
            assert_eq!(lines[1]["counters"][0]["floor"], 1200);
            for (device, plain) in lines[1..].iter().zip(&plain) {
                assert_eq!(device["title"], plain["system_title"]);
                for key in device["keys"].as_array().unwrap() {
                    let wrapped = hex::decode(key["wrapped"].as_str().unwrap()).unwrap();
                    let mut buffer = [0; 64];
                    let opened = batch_key.unwrap_key(&wrapped, &mut buffer).unwrap();
                    let name = key["type"].as_str().unwrap().to_lowercase().replace('-', "_");
                    let setup = plain["security_setups"]
                        .as_array()
                        .unwrap()
                        .iter()
                        .find(|setup| setup["logical_name"] == key["setup"])
                        .unwrap();
                    let expected = hex::decode(setup[&name].as_str().unwrap()).unwrap();
                    let opened = if name.ends_with("secret") {
                        opened[1..=opened[0] as usize].to_vec()
                    } else {
                        opened.to_vec()
                    };
                    assert_eq!(opened, expected);
                }
            }
            let before = file.len() - file.split_inclusive(|octet| *octet == b'\n').next_back().unwrap().len();
            assert_eq!(lines[1501]["trailer"]["sha256"], hex::encode_upper(sha256(&file[..before])));
            assert_eq!(lines[1501]["trailer"]["devices"], 1_500);
        }
    }

    #[test]
    fn what_does_not_fit_the_format_is_refused() {
        let (_, public) = transport_key();
        let vendor_key = VendorKey::generate().unwrap();
        let good = SampleShipment::new(
            "B-1",
            FlagId::parse("KAM").unwrap(),
            DeviceProfile::parse(DeviceProfile::SHIPPED[0].1).unwrap(),
            1,
        );
        let mut refused = vec![good.clone(), good.clone(), good.clone()];
        refused[0].batch = "a\"b".into();
        refused[1].devices = 0;
        refused[2].first_number = 1 << 40;
        for sample in refused {
            assert!(matches!(
                sample.write(&public, &vendor_key, &mut Vec::new(), None, &mut |_| ()),
                Err(SampleError::Parse(_))
            ));
        }
        assert!(VendorTransportKey::from_der(b"no key").is_err() && VendorKey::from_pem(b"no key").is_err());
    }
}
