//! Message-based encryption (PKCS#11 3.0, section 5.9 and 5.11): one key, many AES-GCM messages,
//! each with its own IV.

use std::sync::Arc;

use cryptoki_sys::*;
use subtle::ConstantTimeEq;

use crate::attribute::Flags;
use crate::buffer::{Buffer, Output, Room};
use crate::crypto::gcm::{Gcm, tag_length};
use crate::crypto::random;
use crate::error::{Result, Rv, fail};
use crate::object::Object;

/// A message operation under way. It keeps its key until C_MessageEncryptFinal or
/// C_MessageDecryptFinal.
pub(crate) struct MessageOperation {
    key: Arc<Object>,
    encrypt: bool,
    counter: u64,
    open: Option<Open>,
}

/// A message that comes in parts.
struct Open {
    gcm: Gcm,
    held: Buffer,
}

/// The parameters of one message.
pub(crate) struct MessageParameters<'a> {
    /// The IV as the caller gave it.
    pub(crate) iv: &'a [u8],
    /// The number of its first bits that stay when the token makes the rest.
    pub(crate) fixed_bits: u64,
    /// `CKG_NO_GENERATE`, or how the token makes the IV.
    pub(crate) generator: CK_GENERATOR_FUNCTION,
    /// The tag of a message to be decrypted; otherwise empty.
    pub(crate) tag: &'a [u8],
    /// The length of the tag.
    pub(crate) tag_bits: u64,
}

impl MessageOperation {
    pub(crate) fn new(key: Arc<Object>, mechanism: CK_MECHANISM_TYPE, encrypt: bool) -> Result<Self> {
        if !key.flags.has(if encrypt { Flags::ENCRYPT } else { Flags::DECRYPT }) {
            return fail(CKR_KEY_FUNCTION_NOT_PERMITTED);
        }
        key.allows(mechanism)?;
        if mechanism != CKM_AES_GCM {
            return fail(CKR_MECHANISM_INVALID);
        }
        key.aes(CKR_KEY_TYPE_INCONSISTENT)?;
        Ok(Self { key, encrypt, counter: 0, open: None })
    }

    /// Encrypts one message. The second value is the IV that was used, the third the tag.
    pub(crate) fn encrypt(
        &mut self,
        parameters: &MessageParameters<'_>,
        aad: &[u8],
        data: &[u8],
        room: Room,
    ) -> Result<(Output, Buffer, Buffer)> {
        self.check_idle()?;
        let length = tag_length(parameters.tag_bits)?;
        if let Some(answer) = room.settle(data.len()) {
            return Ok((answer, Buffer::default(), Buffer::default()));
        }
        let iv = self.iv(parameters)?;
        let mut gcm = self.start(&iv, aad)?;
        let mut out = Buffer::copy_of(data);
        gcm.encrypt(&mut out)?;
        Ok((Output::Data(out), iv, Buffer::copy_of(gcm.tag().get(..length).unwrap_or_default())))
    }

    /// Decrypts one message.
    pub(crate) fn decrypt(
        &mut self,
        parameters: &MessageParameters<'_>,
        aad: &[u8],
        data: &[u8],
        room: Room,
    ) -> Result<Output> {
        self.check_idle()?;
        if let Some(answer) = room.settle(data.len()) {
            return Ok(answer);
        }
        let mut gcm = self.start(parameters.iv, aad)?;
        let mut out = Buffer::copy_of(data);
        gcm.decrypt(&mut out)?;
        check_tag(&gcm, parameters)?;
        Ok(Output::Data(out))
    }

    /// Begins a message in parts. The answer is the IV.
    pub(crate) fn begin(&mut self, parameters: &MessageParameters<'_>, aad: &[u8]) -> Result<Buffer> {
        self.check_idle()?;
        tag_length(parameters.tag_bits)?;
        let iv = if self.encrypt { self.iv(parameters)? } else { Buffer::copy_of(parameters.iv) };
        self.open = Some(Open { gcm: self.start(&iv, aad)?, held: Buffer::default() });
        Ok(iv)
    }

    /// The next part of a message to be encrypted. The tag comes with the last one.
    pub(crate) fn encrypt_next(
        &mut self,
        parameters: &MessageParameters<'_>,
        data: &[u8],
        last: bool,
        room: Room,
    ) -> Result<(Output, Option<Buffer>)> {
        let length = tag_length(parameters.tag_bits)?;
        let open = self.open.as_mut().ok_or(Rv(CKR_OPERATION_NOT_INITIALIZED))?;
        if let Some(answer) = room.settle(data.len()) {
            return Ok((answer, None));
        }
        let mut out = Buffer::copy_of(data);
        open.gcm.encrypt(&mut out)?;
        let tag = last.then(|| Buffer::copy_of(open.gcm.tag().get(..length).unwrap_or_default()));
        if last {
            self.open = None;
        }
        Ok((Output::Data(out), tag))
    }

    /// The next part of a message to be decrypted. It returns no plaintext before the last part,
    /// when the tag is checked.
    pub(crate) fn decrypt_next(
        &mut self,
        parameters: &MessageParameters<'_>,
        data: &[u8],
        last: bool,
        room: Room,
    ) -> Result<Output> {
        let open = self.open.as_mut().ok_or(Rv(CKR_OPERATION_NOT_INITIALIZED))?;
        // As with decryption in parts: if the length is 0, a caller may pass no buffer, and would
        // ask again and again.
        let length = if last || matches!(room, Room::Query) { open.held.len() + data.len() } else { 0 };
        if let Some(answer) = room.settle(length) {
            return Ok(answer);
        }
        open.held.extend(data);
        if !last {
            return Ok(Output::Data(Buffer::default()));
        }
        let Some(Open { mut gcm, mut held }) = self.open.take() else { return fail(CKR_OPERATION_NOT_INITIALIZED) };
        gcm.decrypt(&mut held)?;
        check_tag(&gcm, parameters)?;
        Ok(Output::Data(held))
    }

    fn check_idle(&self) -> Result<()> {
        if self.open.is_some() { fail(CKR_OPERATION_ACTIVE) } else { Ok(()) }
    }

    fn start(&self, iv: &[u8], aad: &[u8]) -> Result<Gcm> {
        let schedule = self.key.aes(CKR_KEY_TYPE_INCONSISTENT)?;
        if self.encrypt {
            Gcm::to_encrypt(schedule, iv, aad)
        } else {
            Gcm::new(&schedule.cipher, schedule.hash(), iv, aad)
        }
    }

    /// The IV of the next message: the caller's, or one whose last bits the token makes.
    fn iv(&mut self, parameters: &MessageParameters<'_>) -> Result<Buffer> {
        let mut iv = Buffer::copy_of(parameters.iv);
        let fixed = usize::try_from(parameters.fixed_bits).map_err(|_| Rv(CKR_MECHANISM_PARAM_INVALID))?;
        if parameters.generator == CKG_NO_GENERATE {
            return Ok(iv);
        }
        // Whole bytes only: at least 4 of them, or the IVs would soon be used up.
        if !fixed.is_multiple_of(8) || fixed / 8 + 4 > iv.len() {
            return fail(CKR_MECHANISM_PARAM_INVALID);
        }
        let made = iv.get_mut(fixed / 8..).unwrap_or_default();
        match parameters.generator {
            CKG_GENERATE | CKG_GENERATE_COUNTER => {
                let width = 8 * made.len();
                if width < 64 && self.counter >> width != 0 {
                    return fail(CKR_KEY_EXHAUSTED);
                }
                made.fill(0);
                for (place, byte) in made.iter_mut().rev().zip(self.counter.to_le_bytes()) {
                    *place = byte;
                }
                self.counter = self.counter.checked_add(1).ok_or(Rv(CKR_KEY_EXHAUSTED))?;
            }
            CKG_GENERATE_RANDOM => random(made)?,
            CKG_GENERATE_COUNTER_XOR => {
                let width = 8 * made.len();
                if width < 64 && self.counter >> width != 0 {
                    return fail(CKR_KEY_EXHAUSTED);
                }
                for (place, byte) in made.iter_mut().rev().zip(self.counter.to_le_bytes()) {
                    *place ^= byte;
                }
                self.counter = self.counter.checked_add(1).ok_or(Rv(CKR_KEY_EXHAUSTED))?;
            }
            _ => return fail(CKR_MECHANISM_PARAM_INVALID),
        }
        Ok(iv)
    }
}

fn check_tag(gcm: &Gcm, parameters: &MessageParameters<'_>) -> Result<()> {
    let length = tag_length(parameters.tag_bits)?;
    if bool::from(gcm.tag().get(..length).unwrap_or_default().ct_eq(parameters.tag)) {
        Ok(())
    } else {
        fail(CKR_AEAD_DECRYPT_FAILED)
    }
}
