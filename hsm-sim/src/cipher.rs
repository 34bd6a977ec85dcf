//! Encryption and decryption, in one part or several.

use std::sync::Arc;

use cryptoki_sys::*;
use subtle::ConstantTimeEq;

use crate::attribute::Flags;
use crate::buffer::{Buffer, Output, Room};
use crate::crypto::aes::{BLOCK, KeyStream};
use crate::crypto::gcm::{Gcm, tag_length};
use crate::crypto::rsa::Padding;
use crate::error::{Result, Rv, fail};
use crate::mechanism::{Mechanism, Parameters};
use crate::object::{Material, Object};

/// An encryption or decryption that was begun.
pub(crate) struct CipherOperation {
    key: Arc<Object>,
    encrypt: bool,
    mode: Mode,
    in_parts: bool,
    /// The key requires the PIN before each use (`CKA_ALWAYS_AUTHENTICATE`).
    pub(crate) locked: bool,
}

enum Mode {
    Ecb { pending: Buffer },
    Cbc { iv: [u8; BLOCK], pending: Buffer, padded: bool },
    Counter { stream: KeyStream },
    Gcm { gcm: Box<Gcm>, tag: usize, held: Buffer },
    KeyWrap { padded: bool },
    Rsa { padding: Padding },
}

impl CipherOperation {
    /// Begins an operation, after checking that key and mechanism fit.
    pub(crate) fn new(key: Arc<Object>, mechanism: &Mechanism<'_>, encrypt: bool) -> Result<Self> {
        if !key.flags.has(if encrypt { Flags::ENCRYPT } else { Flags::DECRYPT }) {
            return fail(CKR_KEY_FUNCTION_NOT_PERMITTED);
        }
        key.allows(mechanism.kind)?;
        let mode = Mode::new(&key, mechanism, encrypt)?;
        let locked = key.flags.has(Flags::ALWAYS_AUTHENTICATE);
        Ok(Self { key, encrypt, mode, in_parts: false, locked })
    }

    /// Encrypts or decrypts everything at once. The operation itself does not change.
    pub(crate) fn all(&mut self, data: &[u8], room: Room) -> Result<Output> {
        if self.in_parts {
            return fail(CKR_OPERATION_NOT_INITIALIZED);
        }
        self.check_length(data.len())?;
        let bound = self.length_of_all(data.len())?;
        // The length of this plaintext is known only from its padding: it may fit although the
        // upper bound does not.
        let variable = !self.encrypt && self.variable();
        if (matches!(room, Room::Query) || !variable)
            && let Some(answer) = room.settle(bound)
        {
            return Ok(answer);
        }
        if self.locked {
            return fail(CKR_USER_NOT_LOGGED_IN);
        }
        let done = match &mut self.mode {
            Mode::Ecb { .. } => {
                let mut out = Buffer::copy_of(data);
                self.key.aes(CKR_KEY_TYPE_INCONSISTENT)?.cipher.ecb(self.encrypt, &mut out);
                out
            }
            Mode::Cbc { iv, padded, .. } => {
                let mut iv = *iv;
                let mut out = Buffer::copy_of(data);
                if *padded && self.encrypt {
                    pad(&mut out);
                }
                self.key.aes(CKR_KEY_TYPE_INCONSISTENT)?.cipher.cbc(self.encrypt, &mut iv, &mut out);
                if *padded && !self.encrypt {
                    unpad(&mut out)?;
                }
                out
            }
            Mode::Counter { stream } => {
                let mut out = Buffer::copy_of(data);
                if !stream.apply(&mut out) {
                    return fail(CKR_DATA_LEN_RANGE);
                }
                out
            }
            Mode::Gcm { gcm, tag, .. } => {
                let mut out = Buffer::copy_of(data);
                if self.encrypt {
                    gcm.encrypt(&mut out)?;
                    out.extend(gcm.tag().get(..*tag).unwrap_or_default());
                } else {
                    open(gcm, &mut out, *tag)?;
                }
                out
            }
            Mode::KeyWrap { padded } => {
                let key = &self.key.aes(CKR_KEY_TYPE_INCONSISTENT)?.cipher;
                match (self.encrypt, *padded) {
                    (true, false) => key.wrap(data)?,
                    (true, true) => key.wrap_padded(data)?,
                    (false, false) => key.unwrap(data).ok_or(Rv(CKR_ENCRYPTED_DATA_INVALID))?,
                    (false, true) => key.unwrap_padded(data).ok_or(Rv(CKR_ENCRYPTED_DATA_INVALID))?,
                }
            }
            Mode::Rsa { padding } => match &*self.key.material {
                Material::RsaPublic(key) => key.encrypt(padding, data)?,
                Material::RsaPrivate(key) => key.decrypt(padding, data, CKR_ENCRYPTED_DATA_INVALID)?,
                _ => return fail(CKR_KEY_TYPE_INCONSISTENT),
            },
        };
        Ok(room.settle(done.len()).unwrap_or(Output::Data(done)))
    }

    /// The next part.
    pub(crate) fn update(&mut self, data: &[u8], room: Room) -> Result<Output> {
        if self.locked {
            return fail(CKR_USER_NOT_LOGGED_IN);
        }
        let length = match &self.mode {
            Mode::Ecb { pending } => whole_blocks(pending.len() + data.len()),
            Mode::Cbc { pending, padded: true, .. } if !self.encrypt => {
                whole_blocks((pending.len() + data.len()).saturating_sub(1))
            }
            Mode::Cbc { pending, .. } => whole_blocks(pending.len() + data.len()),
            Mode::Counter { .. } => data.len(),
            Mode::Gcm { .. } if self.encrypt => data.len(),
            // If the length is 0, a caller may pass no buffer. The caller would then ask for the
            // length again and again.
            Mode::Gcm { held, .. } if matches!(room, Room::Query) => held.len() + data.len(),
            Mode::Gcm { .. } => 0,
            Mode::KeyWrap { .. } | Mode::Rsa { .. } => return fail(CKR_FUNCTION_NOT_SUPPORTED),
        };
        if let Some(answer) = room.settle(length) {
            return Ok(answer);
        }
        self.in_parts = true;
        let mut out = match &mut self.mode {
            Mode::Ecb { pending } | Mode::Cbc { pending, .. } => {
                let mut out = std::mem::take(pending);
                out.extend(data);
                *pending = Buffer::copy_of(out.get(length..).unwrap_or_default());
                out.truncate(length);
                out
            }
            Mode::Gcm { held, .. } if !self.encrypt => {
                held.extend(data);
                return Ok(Output::Data(Buffer::default()));
            }
            _ => Buffer::copy_of(data),
        };
        match &mut self.mode {
            Mode::Ecb { .. } => self.key.aes(CKR_KEY_TYPE_INCONSISTENT)?.cipher.ecb(self.encrypt, &mut out),
            Mode::Cbc { iv, .. } => self.key.aes(CKR_KEY_TYPE_INCONSISTENT)?.cipher.cbc(self.encrypt, iv, &mut out),
            Mode::Counter { stream } => {
                if !stream.apply(&mut out) {
                    return fail(CKR_DATA_LEN_RANGE);
                }
            }
            Mode::Gcm { gcm, .. } => gcm.encrypt(&mut out)?,
            Mode::KeyWrap { .. } | Mode::Rsa { .. } => {}
        }
        Ok(Output::Data(out))
    }

    /// The last part of the answer.
    pub(crate) fn finish(&mut self, room: Room) -> Result<Output> {
        if self.locked {
            return fail(CKR_USER_NOT_LOGGED_IN);
        }
        let range = if self.encrypt { CKR_DATA_LEN_RANGE } else { CKR_ENCRYPTED_DATA_LEN_RANGE };
        match &mut self.mode {
            Mode::Counter { .. } => Ok(room.settle(0).unwrap_or(Output::Data(Buffer::default()))),
            Mode::Ecb { pending } | Mode::Cbc { pending, padded: false, .. } => {
                if !pending.is_empty() {
                    return fail(range);
                }
                Ok(room.settle(0).unwrap_or(Output::Data(Buffer::default())))
            }
            Mode::Cbc { iv, pending, .. } => {
                if !self.encrypt && pending.len() != BLOCK {
                    return fail(range);
                }
                if (self.encrypt || matches!(room, Room::Query))
                    && let Some(answer) = room.settle(BLOCK)
                {
                    return Ok(answer);
                }
                let mut iv = *iv;
                let mut out = pending.clone();
                if self.encrypt {
                    pad(&mut out);
                }
                self.key.aes(CKR_KEY_TYPE_INCONSISTENT)?.cipher.cbc(self.encrypt, &mut iv, &mut out);
                if !self.encrypt {
                    unpad(&mut out)?;
                }
                Ok(room.settle(out.len()).unwrap_or(Output::Data(out)))
            }
            Mode::Gcm { gcm, tag, held } => {
                let length = if self.encrypt { *tag } else { held.len().checked_sub(*tag).ok_or(Rv(range))? };
                if let Some(answer) = room.settle(length) {
                    return Ok(answer);
                }
                if self.encrypt {
                    return Ok(Output::Data(Buffer::copy_of(gcm.tag().get(..*tag).unwrap_or_default())));
                }
                let mut plain = std::mem::take(held);
                open(gcm, &mut plain, *tag).map(|()| Output::Data(plain))
            }
            Mode::KeyWrap { .. } | Mode::Rsa { .. } => fail(CKR_FUNCTION_NOT_SUPPORTED),
        }
    }

    fn variable(&self) -> bool {
        matches!(self.mode, Mode::Cbc { padded: true, .. } | Mode::KeyWrap { padded: true } | Mode::Rsa { .. })
    }

    fn check_length(&self, length: usize) -> Result<()> {
        let fits = match &self.mode {
            Mode::Ecb { .. } | Mode::Cbc { padded: false, .. } => length.is_multiple_of(BLOCK),
            Mode::Cbc { .. } => self.encrypt || (length > 0 && length.is_multiple_of(BLOCK)),
            Mode::Gcm { tag, .. } => self.encrypt || length >= *tag,
            Mode::KeyWrap { padded: false } => length.is_multiple_of(8) && length >= if self.encrypt { 16 } else { 24 },
            Mode::KeyWrap { .. } if self.encrypt => length > 0,
            Mode::KeyWrap { .. } => length.is_multiple_of(8) && length >= 16,
            Mode::Counter { .. } | Mode::Rsa { .. } => true,
        };
        if fits { Ok(()) } else { fail(if self.encrypt { CKR_DATA_LEN_RANGE } else { CKR_ENCRYPTED_DATA_LEN_RANGE }) }
    }

    /// The length of the answer to `length` bytes. For padded plaintexts it is an upper bound.
    fn length_of_all(&self, length: usize) -> Result<usize> {
        Ok(match &self.mode {
            Mode::Ecb { .. } | Mode::Cbc { padded: false, .. } | Mode::Counter { .. } => length,
            Mode::Cbc { .. } => {
                if self.encrypt {
                    whole_blocks(length) + BLOCK
                } else {
                    length
                }
            }
            Mode::Gcm { tag, .. } => {
                if self.encrypt {
                    length + tag
                } else {
                    length - tag
                }
            }
            Mode::KeyWrap { .. } => {
                if self.encrypt {
                    length.next_multiple_of(8) + 8
                } else {
                    length - 8
                }
            }
            Mode::Rsa { .. } => match &*self.key.material {
                Material::RsaPublic(key) => key.modulus().len(),
                Material::RsaPrivate(key) => key.modulus().len(),
                _ => return fail(CKR_KEY_TYPE_INCONSISTENT),
            },
        })
    }
}

impl Mode {
    fn new(key: &Object, mechanism: &Mechanism<'_>, encrypt: bool) -> Result<Self> {
        let aes = || key.aes(CKR_KEY_TYPE_INCONSISTENT);
        match (mechanism.kind, &mechanism.parameters) {
            (CKM_AES_ECB, Parameters::None) => aes().map(|_| Self::Ecb { pending: Buffer::default() }),
            (CKM_AES_CBC | CKM_AES_CBC_PAD, Parameters::Iv(iv)) => {
                aes()?;
                Ok(Self::Cbc { iv: *iv, pending: Buffer::default(), padded: mechanism.kind == CKM_AES_CBC_PAD })
            }
            (CKM_AES_CTR, Parameters::Counter { bits, block }) => {
                let stream = KeyStream::new(&aes()?.cipher, *bits, block).ok_or(Rv(CKR_MECHANISM_PARAM_INVALID))?;
                Ok(Self::Counter { stream })
            }
            (CKM_AES_GCM, Parameters::Gcm { iv, aad, tag_bits }) => {
                let schedule = aes()?;
                let gcm = if encrypt {
                    Gcm::to_encrypt(schedule, iv, aad)?
                } else {
                    Gcm::new(&schedule.cipher, schedule.hash(), iv, aad)?
                };
                Ok(Self::Gcm { gcm: Box::new(gcm), tag: tag_length(*tag_bits)?, held: Buffer::default() })
            }
            (CKM_AES_KEY_WRAP | CKM_AES_KEY_WRAP_KWP, Parameters::None) => {
                aes().map(|_| Self::KeyWrap { padded: mechanism.kind == CKM_AES_KEY_WRAP_KWP })
            }
            (CKM_RSA_PKCS | CKM_RSA_PKCS_OAEP, parameters) => {
                let fits = match &*key.material {
                    Material::RsaPublic(_) => encrypt,
                    Material::RsaPrivate(_) => !encrypt,
                    _ => false,
                };
                if !fits {
                    return fail(CKR_KEY_TYPE_INCONSISTENT);
                }
                Ok(Self::Rsa { padding: Padding::for_encryption(mechanism.kind, parameters)? })
            }
            (
                CKM_AES_ECB | CKM_AES_CBC | CKM_AES_CBC_PAD | CKM_AES_CTR | CKM_AES_GCM | CKM_AES_KEY_WRAP
                | CKM_AES_KEY_WRAP_KWP,
                _,
            ) => fail(CKR_MECHANISM_PARAM_INVALID),
            _ => fail(CKR_MECHANISM_INVALID),
        }
    }
}

/// Decrypts `data` (ciphertext ‖ tag of `length` bytes) in place. If the tag is wrong, `data` is
/// overwritten.
pub(crate) fn open(gcm: &mut Gcm, data: &mut Buffer, length: usize) -> Result<()> {
    let at = data.len().checked_sub(length).ok_or(Rv(CKR_ENCRYPTED_DATA_LEN_RANGE))?;
    let tag = Buffer::copy_of(data.get(at..).unwrap_or_default());
    data.truncate(at);
    gcm.decrypt(data)?;
    if bool::from(gcm.tag().get(..length).unwrap_or_default().ct_eq(&tag)) {
        Ok(())
    } else {
        data.clear();
        fail(CKR_ENCRYPTED_DATA_INVALID)
    }
}

/// PKCS#7 padding to whole blocks.
pub(crate) fn pad(data: &mut Buffer) {
    let count = BLOCK - data.len() % BLOCK;
    let padding = [u8::try_from(count).unwrap_or(0); BLOCK];
    data.extend(padding.get(..count).unwrap_or_default());
}

/// Removes PKCS#7 padding.
pub(crate) fn unpad(data: &mut Buffer) -> Result<()> {
    let invalid = Rv(CKR_ENCRYPTED_DATA_INVALID);
    let count = usize::from(*data.last().ok_or(invalid)?);
    let start = data.len().checked_sub(count).filter(|_| (1..=BLOCK).contains(&count)).ok_or(invalid)?;
    let wrong =
        data.get(start..).unwrap_or_default().iter().fold(0, |wrong, byte| wrong | (usize::from(*byte) ^ count));
    if wrong != 0 {
        return Err(invalid);
    }
    data.truncate(start);
    Ok(())
}

fn whole_blocks(length: usize) -> usize {
    length - length % BLOCK
}
