//! DLMS ciphering: the security control byte, protection by AES-GCM with 12-byte tags, GMAC, and
//! RFC 3394 key wrap. The primitives are the `aes-gcm` and `aes-kw` crates.

use aes_gcm::aead::consts::U12;
use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::aes::{Aes128, Aes256};
use aes_gcm::{AeadInOut, AesGcm, KeyInit, Tag};
use aes_kw::{KwAes128, KwAes256};
use zeroize::Zeroizing;

use crate::{Error, SecuritySuite, SymmetricKey, SystemTitle};

/// The security control byte (IEC 62056-5-3): bits 0–3 suite, 4 authenticated, 5 encrypted, 6
/// broadcast key, 7 compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SecurityControl(pub u8);

impl SecurityControl {
    /// Authenticated and encrypted under the unicast key.
    pub const fn authenticated_encrypted(suite: SecuritySuite) -> Self {
        Self(suite.id() | AUTHENTICATED | ENCRYPTED)
    }

    /// Authenticated only.
    pub const fn authenticated(suite: SecuritySuite) -> Self {
        Self(suite.id() | AUTHENTICATED)
    }

    /// Encrypted only. A meter refuses it: nothing proves who sent such an APDU.
    pub const fn encrypted(suite: SecuritySuite) -> Self {
        Self(suite.id() | ENCRYPTED)
    }

    /// The same, with the broadcast bit set.
    pub const fn broadcast(self) -> Self {
        Self(self.0 | BROADCAST)
    }

    /// The suite's number as it stands in the byte, 0 to 15.
    pub const fn suite_id(self) -> u8 {
        self.0 & 0x0F
    }

    /// Bit 4.
    pub const fn is_authenticated(self) -> bool {
        self.0 & AUTHENTICATED != 0
    }

    /// Bit 5.
    pub const fn is_encrypted(self) -> bool {
        self.0 & ENCRYPTED != 0
    }

    /// Bit 6: the key is the broadcast key.
    pub const fn is_broadcast(self) -> bool {
        self.0 & BROADCAST != 0
    }

    /// Bit 7: the plaintext was compressed.
    pub const fn is_compressed(self) -> bool {
        self.0 & COMPRESSED != 0
    }
}

/// The two keys that protect an APDU: an encryption key (GUEK, GBEK or dedicated) and the GAK.
#[derive(Clone, Debug)]
pub struct Ciphering {
    /// The block cipher key.
    pub encryption: SymmetricKey,
    /// The authentication key: a part of the associated data.
    pub authentication: SymmetricKey,
}

/// Ciphered content: `SC(1) ‖ IC(4) ‖ payload`, where the payload is the ciphertext or the
/// plaintext, and the tag where the content is authenticated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CipheredContent {
    /// The security control byte.
    pub control: SecurityControl,
    /// The sender's invocation counter.
    pub counter: u32,
    /// What follows.
    pub payload: Vec<u8>,
}

impl CipheredContent {
    /// Reads the bytes inside a ciphered APDU's octet string.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let mut reader = crate::axdr::Reader::new(bytes);
        Ok(Self {
            control: SecurityControl(reader.u8()?),
            counter: reader.u32()?,
            payload: reader.take_rest().to_vec(),
        })
    }

    /// The bytes inside a ciphered APDU's octet string.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![self.control.0];
        out.extend(self.counter.to_be_bytes());
        out.extend(&self.payload);
        out
    }

    /// The last 12 bytes: the tag, if the content is authenticated and long enough.
    pub fn tag(&self) -> Option<[u8; TAG_LENGTH]> {
        self.control.is_authenticated().then(|| self.payload.last_chunk().copied()).flatten()
    }
}

impl Ciphering {
    /// Protects `plaintext` as `control` says. The nonce is `title ‖ counter`: the caller must
    /// never use a pair twice with one key.
    pub fn protect(
        &self,
        control: SecurityControl,
        title: &SystemTitle,
        counter: u32,
        plaintext: &[u8],
    ) -> Result<CipheredContent, Error> {
        let nonce = nonce(title, counter);
        let mut payload = plaintext.to_vec();
        match (control.is_authenticated(), control.is_encrypted()) {
            (true, true) => {
                let tag = seal(&self.encryption, &nonce, &self.associated_data(control, &[]), &mut payload)?;
                payload.extend(tag);
            }
            (true, false) => {
                let aad = self.associated_data(control, plaintext);
                payload.extend(seal(&self.encryption, &nonce, &aad, &mut [])?);
            }
            (false, true) => {
                seal(&self.encryption, &nonce, &[], &mut payload)?;
            }
            (false, false) => return Err(Error::NotProtected),
        }
        Ok(CipheredContent { control, counter, payload })
    }

    /// Opens what `title` protected. Content that is not authenticated is refused
    /// ([`Error::NotProtected`]): anyone could have made it. A wrong tag is [`Error::Deciphering`].
    pub fn open(&self, title: &SystemTitle, content: &CipheredContent) -> Result<Zeroizing<Vec<u8>>, Error> {
        if !content.control.is_authenticated() {
            return Err(Error::NotProtected);
        }
        let (text, tag) = content.payload.split_last_chunk::<TAG_LENGTH>().ok_or(Error::Deciphering)?;
        let nonce = nonce(title, content.counter);
        let mut plaintext = Zeroizing::new(text.to_vec());
        if content.control.is_encrypted() {
            let aad = self.associated_data(content.control, &[]);
            unseal(&self.encryption, &nonce, &aad, &mut plaintext, tag)?;
        } else {
            let aad = self.associated_data(content.control, text);
            unseal(&self.encryption, &nonce, &aad, &mut [], tag)?;
        }
        Ok(plaintext)
    }

    /// The HLS 5 answer to a challenge: `SC ‖ IC ‖ GMAC(SC ‖ GAK ‖ challenge)`, 17 bytes. It uses
    /// up the nonce `title ‖ counter` like an APDU does.
    pub fn answer_challenge(
        &self,
        suite: SecuritySuite,
        title: &SystemTitle,
        counter: u32,
        challenge: &[u8],
    ) -> Result<Vec<u8>, Error> {
        let control = SecurityControl::authenticated(suite);
        let aad = self.associated_data(control, challenge);
        let tag = seal(&self.encryption, &nonce(title, counter), &aad, &mut [])?;
        Ok(CipheredContent { control, counter, payload: tag.to_vec() }.encode())
    }

    /// Checks an answer that `title` made to `challenge`, and returns its invocation counter and
    /// tag.
    pub fn verify_challenge_answer(
        &self,
        suite: SecuritySuite,
        title: &SystemTitle,
        challenge: &[u8],
        answer: &[u8],
    ) -> Result<(u32, [u8; TAG_LENGTH]), Error> {
        let content = CipheredContent::parse(answer)?;
        let tag: [u8; TAG_LENGTH] = content
            .payload
            .as_slice()
            .try_into()
            .map_err(|_| Error::malformed("HLS answer", "is not 17 bytes long"))?;
        if content.control != SecurityControl::authenticated(suite) {
            return Err(Error::malformed("HLS answer", "has a security control byte of another suite or protection"));
        }
        let aad = self.associated_data(content.control, challenge);
        unseal(&self.encryption, &nonce(title, content.counter), &aad, &mut [], &tag)?;
        Ok((content.counter, tag))
    }

    fn associated_data(&self, control: SecurityControl, rest: &[u8]) -> Zeroizing<Vec<u8>> {
        let authentication = self.authentication.expose();
        // Sized at once, so that no copy of the key stays behind in a buffer that grew.
        let mut aad = Zeroizing::new(Vec::with_capacity(1 + authentication.len() + rest.len()));
        aad.push(control.0);
        aad.extend_from_slice(authentication);
        aad.extend_from_slice(rest);
        aad
    }
}

/// Wraps `key` under `kek` (RFC 3394): 24 bytes for a key of 16, 40 for one of 32.
pub fn wrap_key(kek: &SymmetricKey, key: &SymmetricKey) -> Result<Vec<u8>, Error> {
    let mut wrapped = vec![0; key.expose().len() + WRAP_OVERHEAD];
    match kek.expose().len() {
        16 => {
            KwAes128::new_from_slice(kek.expose()).map_err(|_| Error::KeyLength)?.wrap_key(key.expose(), &mut wrapped)
        }
        _ => KwAes256::new_from_slice(kek.expose()).map_err(|_| Error::KeyLength)?.wrap_key(key.expose(), &mut wrapped),
    }
    .map_err(|_| Error::KeyLength)?;
    Ok(wrapped)
}

/// Unwraps `wrapped` under `kek` (RFC 3394). A wrong KEK is [`Error::Unwrap`].
pub fn unwrap_key(kek: &SymmetricKey, wrapped: &[u8]) -> Result<SymmetricKey, Error> {
    let length = match wrapped.len() {
        24 | 40 => wrapped.len() - WRAP_OVERHEAD,
        _ => {
            return Err(Error::malformed("wrapped key", "is not 24 or 40 bytes long"));
        }
    };
    let mut key = Zeroizing::new(vec![0; length]);
    match kek.expose().len() {
        16 => KwAes128::new_from_slice(kek.expose()).map_err(|_| Error::KeyLength)?.unwrap_key(wrapped, &mut key),
        _ => KwAes256::new_from_slice(kek.expose()).map_err(|_| Error::KeyLength)?.unwrap_key(wrapped, &mut key),
    }
    .map_err(|_| Error::Unwrap)?;
    SymmetricKey::new(&key)
}

/// Bytes of a tag on the wire.
pub const TAG_LENGTH: usize = 12;

fn nonce(title: &SystemTitle, counter: u32) -> [u8; 12] {
    let mut nonce = [0; 12];
    let (front, back) = nonce.split_at_mut(SystemTitle::LENGTH);
    front.copy_from_slice(title.as_bytes());
    back.copy_from_slice(&counter.to_be_bytes());
    nonce
}

fn seal(key: &SymmetricKey, nonce: &[u8; 12], aad: &[u8], buffer: &mut [u8]) -> Result<[u8; TAG_LENGTH], Error> {
    let buffer = InOutBuf::from(buffer);
    let tag: Tag<U12> = match key.expose().len() {
        16 => Gcm128::new_from_slice(key.expose()).map_err(|_| Error::KeyLength)?.encrypt_inout_detached(
            &(*nonce).into(),
            aad,
            buffer,
        ),
        _ => Gcm256::new_from_slice(key.expose()).map_err(|_| Error::KeyLength)?.encrypt_inout_detached(
            &(*nonce).into(),
            aad,
            buffer,
        ),
    }
    .map_err(|_| Error::Deciphering)?;
    Ok(tag.into())
}

fn unseal(
    key: &SymmetricKey,
    nonce: &[u8; 12],
    aad: &[u8],
    buffer: &mut [u8],
    tag: &[u8; TAG_LENGTH],
) -> Result<(), Error> {
    let buffer = InOutBuf::from(buffer);
    let tag = Tag::<U12>::from(*tag);
    match key.expose().len() {
        16 => Gcm128::new_from_slice(key.expose()).map_err(|_| Error::KeyLength)?.decrypt_inout_detached(
            &(*nonce).into(),
            aad,
            buffer,
            &tag,
        ),
        _ => Gcm256::new_from_slice(key.expose()).map_err(|_| Error::KeyLength)?.decrypt_inout_detached(
            &(*nonce).into(),
            aad,
            buffer,
            &tag,
        ),
    }
    .map_err(|_| Error::Deciphering)
}

type Gcm128 = AesGcm<Aes128, U12, U12>;
type Gcm256 = AesGcm<Aes256, U12, U12>;

const AUTHENTICATED: u8 = 0x10;
const ENCRYPTED: u8 = 0x20;
const BROADCAST: u8 = 0x40;
const COMPRESSED: u8 = 0x80;
const WRAP_OVERHEAD: usize = 8;
