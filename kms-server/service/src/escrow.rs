//! The escrow of an island's roots: what the ceremony gives to the custodians, and how a quorum of
//! custodians opens it again.
//!
//! The HSM wraps each AES root for an RSA-3072 *escrow key* (RSA-OAEP). The escrow key's private
//! half is encrypted with AES-256-GCM under a fresh key, and that key is split by Shamir's scheme
//! over GF(256) into N shares of which M are needed. Each share is encrypted to its custodian's RSA
//! key (RSA-OAEP, SHA-256). One JSON file holds all of it: it can be copied and stored anywhere,
//! and opens only with M custodians' keys.

use std::fmt;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rsa::{
    KeySize, OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, OaepPublicEncryptingKey,
    PrivateDecryptingKey, PublicEncryptingKey,
};
use kms_domain::OaepHash;
use kms_domain::{IslandName, ParseError};
use kms_hsm::{TokenKey, WrappedRoot, WrappedRoots};
use serde::{Deserialize, Serialize};
use vsss_rs::Gf256;
use zeroize::Zeroizing;

/// M of N. I6: fewer than two people are no quorum. With M of M, one lost key loses the roots: this
/// is allowed, but the ceremony warns about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quorum {
    needed: u8,
    custodians: u8,
}

impl Quorum {
    /// `needed` of `custodians`.
    ///
    /// # Errors
    /// Fewer than 2 needed, more needed than there are, or more than 32 custodians.
    pub fn new(needed: usize, custodians: usize) -> Result<Self, ParseError> {
        let refuse = |reason: String| ParseError::new("escrow quorum", reason);
        if needed < 2 {
            return Err(refuse(format!("{needed} needed custodians: at least 2 must act together")));
        }
        if needed > custodians {
            return Err(refuse(format!("{needed} custodians are needed, but there are {custodians}")));
        }
        match (u8::try_from(needed), u8::try_from(custodians)) {
            (Ok(needed), Ok(custodians)) if custodians <= 32 => Ok(Self { needed, custodians }),
            _ => Err(refuse(format!("{custodians} custodians: at most 32"))),
        }
    }

    /// How many must act together.
    pub const fn needed(self) -> usize {
        self.needed as usize
    }

    /// How many there are.
    pub const fn custodians(self) -> usize {
        self.custodians as usize
    }
}

impl fmt::Display for Quorum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.needed, self.custodians)
    }
}

/// A custodian: a name, and the RSA key that only this person can use.
#[derive(Clone)]
pub struct Custodian {
    name: String,
    key: PublicEncryptingKey,
    spki: Vec<u8>,
}

impl Custodian {
    /// A custodian with this SubjectPublicKeyInfo (DER): RSA of 3072 bits or more.
    ///
    /// # Errors
    /// No name, or another key.
    pub fn new(name: &str, spki: &[u8]) -> Result<Self, ParseError> {
        let refuse = |reason: &str| ParseError::new("custodian", format!("`{name}`: {reason}"));
        if name.is_empty() || name.len() > 64 || name.chars().any(char::is_control) {
            return Err(refuse("the name is not 1 to 64 octets without control characters"));
        }
        let key = PublicEncryptingKey::from_der(spki)
            .map_err(|_| refuse("the key is no RSA public key (SubjectPublicKeyInfo)"))?;
        if key.key_size_bits() < 3072 {
            return Err(refuse("the RSA key has fewer than 3072 bits"));
        }
        Ok(Self { name: name.to_owned(), key, spki: spki.to_vec() })
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// SHA-256 of the SubjectPublicKeyInfo, 32 octets.
    pub fn key_sha256(&self) -> [u8; 32] {
        sha256(&self.spki)
    }
}

/// The escrow key pair of a ceremony, with its private half already split.
///
/// I1: this is the exception of the ceremony. During [`Self::make`] the private half exists in this
/// process, in memory of aws-lc that is zeroized on drop. It is never written as a whole.
pub struct EscrowKey {
    spki: Vec<u8>,
    private_key: SealedPrivateKey,
    quorum: Quorum,
    shares: Vec<EscrowShare>,
}

impl EscrowKey {
    /// Makes a key pair and splits its private half among the custodians.
    ///
    /// # Errors
    /// Two custodians with one key, a number of custodians that is not the quorum's, or a failure
    /// of cryptography.
    pub fn make(island: &IslandName, quorum: Quorum, custodians: &[Custodian]) -> Result<Self, EscrowError> {
        if custodians.len() != quorum.custodians() {
            return Err(EscrowError::Custodians(format!("{} are named, but the quorum is {quorum}", custodians.len())));
        }
        // I6: distinct people. One key named twice would be one person with two shares.
        for (at, custodian) in custodians.iter().enumerate() {
            if custodians
                .iter()
                .take(at)
                .any(|earlier| earlier.spki == custodian.spki || earlier.name == custodian.name)
            {
                return Err(EscrowError::Custodians(format!(
                    "`{}` is named twice, or shares a key with another",
                    custodian.name
                )));
            }
        }
        let pair = PrivateDecryptingKey::generate(KeySize::Rsa3072).map_err(failed("making the escrow key pair"))?;
        let public: PublicKeyX509Der<'_> =
            pair.public_key().as_der().map_err(failed("encoding the escrow public key"))?;
        let spki = public.as_ref().to_vec();
        let mut key = Zeroizing::new([0; 32]);
        aws_lc_rs::rand::fill(key.as_mut_slice()).map_err(failed("random octets"))?;
        let private: Pkcs8V1Der<'_> = pair.as_der().map_err(failed("encoding the escrow private key"))?;
        let private = Zeroizing::new(private.as_ref().to_vec());
        let private_key = SealedPrivateKey::seal(&key, island, &spki, private)?;
        let rng = getrandom::rand_core::UnwrapErr(getrandom::SysRng);
        let shares = Gf256::split_bytes(quorum.needed(), quorum.custodians(), key.as_slice(), rng)
            .map_err(|error| EscrowError::Cryptography(format!("splitting: {error}")))?;
        let shares = shares
            .into_iter()
            .map(Zeroizing::new)
            .zip(custodians)
            .map(|(share, custodian)| EscrowShare::encrypt(island, &share, custodian))
            .collect::<Result<_, _>>()?;
        Ok(Self { spki, private_key, quorum, shares })
    }

    /// DER of the public half's SubjectPublicKeyInfo, for the HSM.
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// The file to store, without roots yet.
    pub fn document(self, island: &IslandName) -> EscrowDocument {
        EscrowDocument {
            format: FORMAT.to_owned(),
            island: island.to_string(),
            needed: self.quorum.needed,
            escrow_key: Hex(self.spki),
            private_key: self.private_key,
            shares: self.shares,
            oaep_hash: OaepHash::Sha256.name().to_owned(),
            roots: Vec::new(),
        }
    }
}

/// The escrow file, `meterkms-escrow/1`. Octets are hex digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EscrowDocument {
    format: String,
    island: String,
    needed: u8,
    /// DER of the escrow key's SubjectPublicKeyInfo.
    escrow_key: Hex,
    private_key: SealedPrivateKey,
    shares: Vec<EscrowShare>,
    /// SHA-256 or SHA-1: the hash of RSA-OAEP that the HSM used for the roots.
    oaep_hash: String,
    roots: Vec<EscrowedRoot>,
}

impl EscrowDocument {
    /// The same file with the roots that the HSM wrapped for the escrow key.
    #[must_use]
    pub fn with_roots(mut self, island: &IslandName, roots: &WrappedRoots) -> Self {
        self.oaep_hash = roots.oaep_hash.name().to_owned();
        self.roots = roots
            .roots
            .iter()
            .map(|root| EscrowedRoot {
                label: root.key.label(island),
                check_value: Hex(root.check_value.clone()),
                wrapped: Hex(root.wrapped.clone()),
            })
            .collect();
        self
    }

    /// The same file with one more version of a root, wrapped for the same escrow key. The others
    /// stay as they are.
    ///
    /// # Errors
    /// The wrap is for another escrow key, or the file's roots are wrapped with another hash.
    pub fn with_another_root(mut self, island: &IslandName, wrapped: &WrappedRoots) -> Result<Self, EscrowError> {
        if wrapped.recipient_sha256 != sha256(&self.escrow_key.0) {
            return Err(EscrowError::Document("the root was wrapped for another escrow key".to_owned()));
        }
        if wrapped.oaep_hash.name() != self.oaep_hash {
            return Err(EscrowError::Document(format!(
                "its roots are wrapped with OAEP and {}, the new one with {}",
                self.oaep_hash,
                wrapped.oaep_hash.name()
            )));
        }
        for root in &wrapped.roots {
            let label = root.key.label(island);
            self.roots.retain(|known| known.label != label);
            self.roots.push(EscrowedRoot {
                label,
                check_value: Hex(root.check_value.clone()),
                wrapped: Hex(root.wrapped.clone()),
            });
        }
        Ok(self)
    }

    /// Whether it is a file of this format and of this island.
    pub fn is_of(&self, island: &IslandName) -> bool {
        self.format == FORMAT && self.island == island.as_str()
    }

    /// The roots in the form of kms-hsm; `None` before they are in the file.
    ///
    /// # Errors
    /// A root that no ceremony makes, or an unknown hash.
    pub fn wrapped_roots(&self, island: &IslandName) -> Result<Option<WrappedRoots>, EscrowError> {
        if self.roots.is_empty() {
            return Ok(None);
        }
        let damaged = |what: &str| EscrowError::Document(what.to_owned());
        let roots = self.roots.iter().map(|root| {
            let key = TokenKey::of_label(&root.label, island)
                .filter(|key| key.purpose.is_root())
                .ok_or_else(|| damaged("it names a root that no ceremony makes"))?;
            Ok(WrappedRoot { key, check_value: root.check_value.0.clone(), wrapped: root.wrapped.0.clone() })
        });
        Ok(Some(WrappedRoots {
            recipient_sha256: sha256(&self.escrow_key.0),
            oaep_hash: OaepHash::parse(&self.oaep_hash).map_err(|_| damaged("its OAEP hash is not known"))?,
            roots: roots.collect::<Result<_, EscrowError>>()?,
        }))
    }

    /// Whether it belongs to a ceremony with this island, quorum and custodians.
    pub fn is_for(&self, island: &IslandName, quorum: Quorum, custodians: &[Custodian]) -> bool {
        self.format == FORMAT
            && self.island == island.as_str()
            && self.needed == quorum.needed
            && self.shares.len() == custodians.len()
            && self.shares.iter().zip(custodians).all(|(share, custodian)| {
                share.custodian == custodian.name && share.key_sha256.0 == custodian.key_sha256()
            })
    }

    /// The file's text.
    pub fn to_json(&self) -> String {
        // Strings and numbers only: encoding them does not fail.
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// The escrow key's SubjectPublicKeyInfo (DER).
    pub fn escrow_key(&self) -> &[u8] {
        &self.escrow_key.0
    }

    /// Each custodian's name and encrypted share.
    pub fn shares(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.shares.iter().map(|share| (share.custodian.as_str(), share.encrypted.0.as_slice()))
    }

    /// The names of the roots.
    pub fn labels(&self) -> impl Iterator<Item = &str> {
        self.roots.iter().map(|root| root.label.as_str())
    }

    /// Opens the escrow with shares that custodians have decrypted: RSA-OAEP with SHA-256 for hash
    /// and MGF1, label `meterkms/escrow-share/ISLAND`.
    ///
    /// # Errors
    /// Too few shares, one twice, or shares that do not belong to this file.
    pub fn open(&self, shares: &[Zeroizing<Vec<u8>>]) -> Result<OpenedEscrow, EscrowError> {
        if self.format != FORMAT {
            return Err(EscrowError::Document(format!("the format is `{}`, not `{FORMAT}`", self.format)));
        }
        let island = IslandName::parse(&self.island).map_err(|error| EscrowError::Document(error.to_string()))?;
        if shares.len() < usize::from(self.needed) {
            return Err(EscrowError::Shares(format!("{} shares are given, {} are needed", shares.len(), self.needed)));
        }
        let combined = Gf256::combine_bytes(shares.iter().map(|share| share.to_vec()).collect::<Vec<_>>())
            .map_err(|error| EscrowError::Shares(error.to_string()))?;
        let combined = Zeroizing::new(combined);
        let key: Zeroizing<[u8; 32]> = Zeroizing::new(
            combined
                .as_slice()
                .try_into()
                .map_err(|_| EscrowError::Shares("they are not of an escrow file".to_owned()))?,
        );
        let private = self.private_key.open(&key, &island, &self.escrow_key.0)?;
        let pair = PrivateDecryptingKey::from_pkcs8(&private)
            .map_err(|error| EscrowError::Document(format!("the private key: {error}")))?;
        Ok(OpenedEscrow { key: OaepPrivateDecryptingKey::new(pair).map_err(failed("the private key"))? })
    }

    /// I6: proves that a quorum of custodians agrees to an act: their shares open the private half
    /// of the escrow key that the island's row names. No root is opened. I1: the private half is in
    /// zeroizing memory and only during this function.
    ///
    /// # Errors
    /// The file is of another island or another escrow key, or as [`Self::open`].
    pub fn prove(
        &self,
        island: &IslandName,
        escrow_fingerprint: &[u8; 32],
        shares: &[Zeroizing<Vec<u8>>],
    ) -> Result<(), EscrowError> {
        if !self.is_of(island) || sha256(&self.escrow_key.0) != *escrow_fingerprint {
            return Err(EscrowError::Document(format!("it is not the escrow of the island `{island}`")));
        }
        let opened = self.open(shares)?;
        // A forged file can contain the island's public key beside another private key.
        let mut challenge = Zeroizing::new([0; 32]);
        aws_lc_rs::rand::fill(challenge.as_mut_slice()).map_err(failed("random octets"))?;
        let public = PublicEncryptingKey::from_der(&self.escrow_key.0)
            .map_err(|_| EscrowError::Document("the escrow key is no RSA key".to_owned()))?;
        let public = OaepPublicEncryptingKey::new(public).map_err(failed("the escrow key"))?;
        let mut encrypted = vec![0; public.ciphertext_size()];
        public
            .encrypt(&OAEP_SHA256_MGF1SHA256, challenge.as_slice(), &mut encrypted, None)
            .map_err(failed("encrypting a challenge"))?;
        let mut answer = Zeroizing::new(vec![0; opened.key.min_output_size()]);
        let answered = opened
            .key
            .decrypt(&OAEP_SHA256_MGF1SHA256, &encrypted, &mut answer, None)
            .is_ok_and(|answer| *answer == *challenge.as_slice());
        if answered {
            Ok(())
        } else {
            Err(EscrowError::Document("its private key does not belong to the island's escrow key".to_owned()))
        }
    }

    /// A root's octets, in zeroizing memory, for the restore of a token.
    ///
    /// # Errors
    /// No root has the label, or it does not open.
    pub fn root(&self, opened: &OpenedEscrow, label: &str) -> Result<Zeroizing<Vec<u8>>, EscrowError> {
        let root = self
            .roots
            .iter()
            .find(|root| root.label == label)
            .ok_or_else(|| EscrowError::Document(format!("there is no root `{label}`")))?;
        let hash = match self.oaep_hash.as_str() {
            "SHA-256" => &OAEP_SHA256_MGF1SHA256,
            "SHA-1" => &OAEP_SHA1_MGF1SHA1,
            other => return Err(EscrowError::Document(format!("the OAEP hash `{other}` is not known"))),
        };
        let mut buffer = Zeroizing::new(vec![0; opened.key.min_output_size()]);
        let length =
            opened.key.decrypt(hash, &root.wrapped.0, &mut buffer, None).map_err(failed("opening a root"))?.len();
        buffer.truncate(length);
        Ok(buffer)
    }
}

/// The escrow's private key, restored from the shares of a quorum of custodians.
pub struct OpenedEscrow {
    key: OaepPrivateDecryptingKey,
}

/// The escrow private key, PKCS#8, under AES-256-GCM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SealedPrivateKey {
    /// 12 octets.
    nonce: Hex,
    /// Ciphertext and 16 octets of tag. The associated data is `meterkms/escrow-key/ISLAND/` and
    /// the escrow key's SubjectPublicKeyInfo.
    ciphertext: Hex,
}

impl SealedPrivateKey {
    fn seal(
        key: &[u8; 32],
        island: &IslandName,
        spki: &[u8],
        mut private: Zeroizing<Vec<u8>>,
    ) -> Result<Self, EscrowError> {
        let mut nonce = [0; 12];
        aws_lc_rs::rand::fill(&mut nonce).map_err(failed("random octets"))?;
        let sealing = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).map_err(failed("the escrow's AES key"))?);
        // Encrypted in place with a separate tag: a growing buffer would leave copies of the
        // plaintext in memory.
        let tag = sealing
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(associated_data(island, spki)),
                &mut private,
            )
            .map_err(failed("encrypting the escrow private key"))?;
        Ok(Self { nonce: Hex(nonce.to_vec()), ciphertext: Hex([private.as_slice(), tag.as_ref()].concat()) })
    }

    fn open(&self, key: &[u8; 32], island: &IslandName, spki: &[u8]) -> Result<Zeroizing<Vec<u8>>, EscrowError> {
        let nonce = Nonce::try_assume_unique_for_key(&self.nonce.0)
            .map_err(|_| EscrowError::Document("the nonce is not 12 octets".to_owned()))?;
        let opening = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).map_err(failed("the escrow's AES key"))?);
        let mut private = Zeroizing::new(self.ciphertext.0.clone());
        let length = opening
            .open_in_place(nonce, Aad::from(associated_data(island, spki)), &mut private)
            .map_err(|_| EscrowError::Shares("too few, or not of this escrow file".to_owned()))?
            .len();
        private.truncate(length);
        Ok(private)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EscrowShare {
    custodian: String,
    /// SHA-256 of the custodian's SubjectPublicKeyInfo.
    key_sha256: Hex,
    /// RSA-OAEP (SHA-256, label `meterkms/escrow-share/ISLAND`) of the share: its number (1), then
    /// 32 octets.
    encrypted: Hex,
}

impl EscrowShare {
    fn encrypt(island: &IslandName, share: &[u8], custodian: &Custodian) -> Result<Self, EscrowError> {
        let key = OaepPublicEncryptingKey::new(custodian.key.clone()).map_err(failed("a custodian's key"))?;
        let mut encrypted = vec![0; key.ciphertext_size()];
        let label = share_label(island);
        key.encrypt(&OAEP_SHA256_MGF1SHA256, share, &mut encrypted, Some(label.as_bytes()))
            .map_err(failed("encrypting a share"))?;
        Ok(Self {
            custodian: custodian.name.clone(),
            key_sha256: Hex(custodian.key_sha256().to_vec()),
            encrypted: Hex(encrypted),
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EscrowedRoot {
    /// CKA_LABEL of the root.
    label: String,
    /// CKA_CHECK_VALUE, 3 octets.
    check_value: Hex,
    /// RSA-OAEP of the root under the escrow key.
    wrapped: Hex,
}

/// Why an escrow cannot be made or opened. Never says anything of a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EscrowError {
    /// The custodians are not a quorum of distinct people.
    #[error("custodians: {0}")]
    Custodians(String),
    /// The shares do not open the escrow.
    #[error("shares: {0}")]
    Shares(String),
    /// The file is not what it should be.
    #[error("escrow file: {0}")]
    Document(String),
    /// A cryptographic operation failed.
    #[error("{0} failed")]
    Cryptography(String),
}

/// Octets as lower-case hex digits in JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hex(Vec<u8>);

impl Serialize for Hex {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        hex::decode(String::deserialize(deserializer)?).map(Self).map_err(serde::de::Error::custom)
    }
}

fn share_label(island: &IslandName) -> String {
    format!("meterkms/escrow-share/{island}")
}

fn associated_data(island: &IslandName, spki: &[u8]) -> Vec<u8> {
    [b"meterkms/escrow-key/", island.as_str().as_bytes(), b"/", spki].concat()
}

fn sha256(octets: &[u8]) -> [u8; 32] {
    let mut value = [0; 32];
    value.copy_from_slice(digest(&SHA256, octets).as_ref());
    value
}

fn failed<E>(what: &'static str) -> impl FnOnce(E) -> EscrowError {
    move |_| EscrowError::Cryptography(what.to_owned())
}

const FORMAT: &str = "meterkms-escrow/1";

#[cfg(test)]
mod tests {
    use kms_hsm::Purpose;
    use rustls_pki_types::PrivatePkcs8KeyDer;

    use super::*;

    struct Person {
        name: &'static str,
        key: PrivateDecryptingKey,
    }

    impl Person {
        fn new(name: &'static str) -> Self {
            Self { name, key: PrivateDecryptingKey::generate(KeySize::Rsa3072).unwrap() }
        }

        fn custodian(&self) -> Custodian {
            let spki: PublicKeyX509Der<'_> = self.key.public_key().as_der().unwrap();
            Custodian::new(self.name, spki.as_ref()).unwrap()
        }

        /// What a custodian does with `openssl pkeyutl -decrypt -pkeyopt rsa_padding_mode:oaep …`.
        fn decrypt(&self, document: &EscrowDocument, folder: &std::path::Path) -> Zeroizing<Vec<u8>> {
            let pkcs8: Pkcs8V1Der<'_> = self.key.as_der().unwrap();
            let key = folder.join(format!("{}.pem", self.name));
            std::fs::write(
                &key,
                super::super::certificate::signing::pem(
                    "PRIVATE KEY",
                    PrivatePkcs8KeyDer::from(pkcs8.as_ref()).secret_pkcs8_der(),
                ),
            )
            .unwrap();
            let encrypted = folder.join("share");
            std::fs::write(&encrypted, document.shares().find(|(name, _)| *name == self.name).unwrap().1).unwrap();
            let output = std::process::Command::new("openssl")
                .args([
                    "pkeyutl",
                    "-decrypt",
                    "-pkeyopt",
                    "rsa_padding_mode:oaep",
                    "-pkeyopt",
                    "rsa_oaep_md:sha256",
                    "-pkeyopt",
                    "rsa_mgf1_md:sha256",
                ])
                .args(["-pkeyopt", &format!("rsa_oaep_label:{}", hex::encode("meterkms/escrow-share/north"))])
                .arg("-inkey")
                .arg(&key)
                .arg("-in")
                .arg(&encrypted)
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Zeroizing::new(output.stdout)
        }
    }

    #[test]
    fn m_custodians_open_the_escrow_and_fewer_do_not() {
        let island = IslandName::parse("north").unwrap();
        let people = [Person::new("ada"), Person::new("bo"), Person::new("cy")];
        let custodians = people.each_ref().map(Person::custodian);
        let escrow = EscrowKey::make(&island, Quorum::new(2, 3).unwrap(), &custodians).unwrap();
        // What the HSM does with a root.
        let public = OaepPublicEncryptingKey::new(PublicEncryptingKey::from_der(escrow.spki()).unwrap()).unwrap();
        let mut wrapped = vec![0; public.ciphertext_size()];
        public.encrypt(&OAEP_SHA256_MGF1SHA256, &[42; 32], &mut wrapped, None).unwrap();
        let key = TokenKey::first(Purpose::Seal);
        let roots = WrappedRoots {
            recipient_sha256: sha256(escrow.spki()),
            oaep_hash: OaepHash::Sha256,
            roots: vec![WrappedRoot { key, check_value: vec![1, 2, 3], wrapped }],
        };
        let text = escrow.document(&island).with_roots(&island, &roots).to_json();

        let document: EscrowDocument = serde_json::from_str(&text).unwrap();
        assert_eq!(document.wrapped_roots(&island).unwrap(), Some(roots));
        assert!(document.is_for(&island, Quorum::new(2, 3).unwrap(), &custodians));
        assert!(!document.is_for(&island, Quorum::new(3, 3).unwrap(), &custodians));
        let folder = tempfile::tempdir().unwrap();
        let shares = people.each_ref().map(|person| person.decrypt(&document, folder.path()));
        let label = document.labels().next().unwrap().to_owned();
        for (one, other) in [(0, 1), (0, 2), (2, 1)] {
            let opened = document.open(&[shares[one].clone(), shares[other].clone()]).unwrap();
            assert_eq!(document.root(&opened, &label).unwrap().as_slice(), [42; 32]);
        }
        let all = document.open(&shares).unwrap();
        assert!(document.root(&all, "another").is_err());
        for too_few in [vec![], vec![shares[0].clone()], vec![shares[0].clone(), shares[0].clone()]] {
            assert!(matches!(document.open(&too_few), Err(EscrowError::Shares(_))));
        }
        // What proves that custodians take part: enough shares, of this island's escrow key.
        let fingerprint = sha256(document.escrow_key());
        document.prove(&island, &fingerprint, &shares[1..]).unwrap();
        assert!(matches!(document.prove(&island, &fingerprint, &shares[..1]), Err(EscrowError::Shares(_))));
        assert!(matches!(document.prove(&island, &[1; 32], &shares), Err(EscrowError::Document(_))));
        assert!(document.prove(&IslandName::parse("south").unwrap(), &fingerprint, &shares).is_err());
        // A file whose shares the forger has, with the island's public key: the private key is
        // another.
        let forger = EscrowKey::make(&island, Quorum::new(2, 3).unwrap(), &custodians).unwrap();
        let key = Zeroizing::new([7; 32]);
        let pair = PrivateDecryptingKey::generate(KeySize::Rsa3072).unwrap();
        let pkcs8: Pkcs8V1Der<'_> = pair.as_der().unwrap();
        let private_key =
            SealedPrivateKey::seal(&key, &island, document.escrow_key(), Zeroizing::new(pkcs8.as_ref().to_vec()))
                .unwrap();
        let rng = getrandom::rand_core::UnwrapErr(getrandom::SysRng);
        let forged_shares: Vec<_> =
            Gf256::split_bytes(2, 3, key.as_slice(), rng).unwrap().into_iter().map(Zeroizing::new).collect();
        let forged =
            EscrowDocument { escrow_key: document.escrow_key.clone(), private_key, ..forger.document(&island) };
        assert!(forged.open(&forged_shares).is_ok());
        assert!(matches!(forged.prove(&island, &fingerprint, &forged_shares), Err(EscrowError::Document(_))));
        // A lowered number in the file helps nobody: the mathematics asks for two.
        let lowered: EscrowDocument = serde_json::from_str(&text.replace("\"needed\": 2", "\"needed\": 1")).unwrap();
        assert!(matches!(lowered.open(&[shares[0].clone()]), Err(EscrowError::Shares(_))));
    }

    #[test]
    fn i6_a_quorum_of_fewer_than_two_does_not_parse() {
        for (needed, custodians) in [(0, 0), (0, 3), (1, 1), (1, 3), (4, 3), (2, 33)] {
            assert!(Quorum::new(needed, custodians).is_err(), "{needed} of {custodians}");
        }
        assert_eq!(Quorum::new(2, 3).unwrap().to_string(), "2 of 3");
        assert!(Quorum::new(2, 2).is_ok());
    }

    #[test]
    fn i6_custodians_are_distinct() {
        let island = IslandName::parse("north").unwrap();
        let ada = Person::new("ada").custodian();
        let same_key = Custodian { name: "bo".to_owned(), ..ada.clone() };
        assert!(matches!(
            EscrowKey::make(&island, Quorum::new(2, 2).unwrap(), &[ada.clone(), same_key]),
            Err(EscrowError::Custodians(_))
        ));
        assert!(matches!(
            EscrowKey::make(&island, Quorum::new(2, 3).unwrap(), &[ada]),
            Err(EscrowError::Custodians(_))
        ));
    }
}
