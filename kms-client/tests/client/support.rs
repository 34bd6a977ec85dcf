//! The worked vector of docs/examples, and envelopes that are sealed with its keys.

use std::{collections::HashMap, path::PathBuf};

use aws_lc_rs::hmac;
use kms_client::{OpenOptions, TransportKey, UnixMillis, proto};
use prost::Message as _;

/// `vector.properties` or its sibling.
pub(crate) struct Vector(HashMap<String, String>);

impl Vector {
    pub(crate) fn load(name: &str) -> Self {
        let text = std::fs::read_to_string(examples().join(name)).unwrap();
        Self(
            text.lines()
                .filter(|line| !line.starts_with('#'))
                .map(|line| line.split_once('=').unwrap())
                .map(|(key, value)| (key.into(), value.into()))
                .collect(),
        )
    }

    pub(crate) fn octets(&self, name: &str) -> Vec<u8> {
        hex::decode(&self.0[name]).unwrap()
    }

    pub(crate) fn envelope(&self) -> proto::Envelope {
        proto::Envelope::decode(self.octets("envelope").as_slice()).unwrap()
    }

    pub(crate) fn manifest(&self) -> proto::Manifest {
        proto::Manifest::decode(self.octets("manifest").as_slice()).unwrap()
    }

    /// An envelope with this manifest and a genuine seal.
    pub(crate) fn sealed(&self, manifest: &proto::Manifest) -> proto::Envelope {
        self.sealed_octets(manifest.encode_to_vec())
    }

    pub(crate) fn sealed_octets(&self, manifest: Vec<u8>) -> proto::Envelope {
        let header = self.octets("header");
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.octets("seal_key"));
        let seal = hmac::sign(&key, &[&(header.len() as u32).to_be_bytes()[..], &header, &manifest].concat());
        proto::Envelope { header: header.into(), manifest: manifest.into(), seal: seal.as_ref().to_vec().into() }
    }
}

pub(crate) fn examples() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/examples")
}

pub(crate) fn transport_key() -> TransportKey {
    let read = |name: &str| std::fs::read(examples().join(name)).unwrap();
    TransportKey::from_pem(&read("transport-key.pem"), &read("transport-certificate.pem")).unwrap()
}

/// A time at which the worked vector is valid.
pub(crate) fn options() -> OpenOptions {
    OpenOptions::new().at(UnixMillis(1_795_248_000_500))
}
