//! Key derivation: SP 800-108 in counter mode, ANSI X9.63, the one-step KDF of SP 800-56C, and HKDF
//! (RFC 5869).

use aws_lc_rs::{hkdf, hmac};
use cryptoki_sys::{CKR_FUNCTION_FAILED, CKR_MECHANISM_PARAM_INVALID};

use crate::buffer::Buffer;
use crate::crypto::aes::AesKey;
use crate::crypto::digest::Hash;
use crate::error::{Result, Rv, fail};

/// The pseudorandom function of SP 800-108, with its key.
pub(crate) enum Prf {
    /// AES-CMAC.
    Cmac(Box<AesKey>),
    /// HMAC.
    Hmac(Box<hmac::Key>),
}

impl Prf {
    /// The length of one block of output in bytes.
    pub(crate) fn length(&self) -> usize {
        match self {
            Self::Cmac(_) => 16,
            Self::Hmac(key) => key.algorithm().tag_len(),
        }
    }

    fn block(&self, parts: &[&[u8]]) -> Buffer {
        match self {
            Self::Cmac(key) => Buffer::copy_of(&key.cmac(parts)),
            Self::Hmac(key) => {
                let mut context = hmac::Context::with_key(key);
                for part in parts {
                    context.update(part);
                }
                Buffer::copy_of(context.sign().as_ref())
            }
        }
    }
}

/// One field of the input of each round (PKCS#11 3.0, section 2.42).
#[derive(Debug, Clone)]
pub(crate) enum Field {
    /// The counter.
    Counter(Integer),
    /// The length of the derived keying material in bits, of this many bytes.
    Length(Integer, LengthOf),
    /// Fixed bytes.
    Bytes(Vec<u8>),
}

/// How a number is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Integer {
    /// Its width in bytes, 1 to 8.
    pub(crate) width: usize,
    /// The least significant byte comes first.
    pub(crate) little_endian: bool,
}

/// What the length field counts when several keys are derived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LengthOf {
    /// The keys.
    Keys,
    /// The blocks of output that the keys use.
    Segments,
}

impl Integer {
    /// The low bytes of `value`, in the width of the number.
    fn write(self, value: u64, out: &mut Vec<u8>) {
        if self.little_endian {
            out.extend(value.to_le_bytes().iter().take(self.width));
        } else {
            out.extend(value.to_be_bytes().iter().skip(8 - self.width.min(8)));
        }
    }
}

/// SP 800-108r1, 4.1: KDF in counter mode. The result is cut into keys of `lengths` bytes. Of
/// several keys each starts at a new block, as PKCS#11 requires.
pub(crate) fn counter_mode(prf: &Prf, fields: &[Field], lengths: &[usize]) -> Result<Vec<Buffer>> {
    let counters =
        fields.iter().filter_map(|field| if let Field::Counter(integer) = field { Some(*integer) } else { None });
    let (Some(counter), 1) = (counters.clone().next(), counters.count()) else {
        return fail(CKR_MECHANISM_PARAM_INVALID);
    };
    if fields.iter().filter(|field| matches!(field, Field::Length(..))).count() > 1 {
        return fail(CKR_MECHANISM_PARAM_INVALID);
    }
    let rounds: usize = lengths.iter().map(|length| length.div_ceil(prf.length())).sum();
    let rounds = u64::try_from(rounds).map_err(|_| Rv(CKR_MECHANISM_PARAM_INVALID))?;
    // A counter that repeats would repeat key material.
    if counter.width < 8 && rounds >= 1 << (8 * counter.width) {
        return fail(CKR_MECHANISM_PARAM_INVALID);
    }
    let bits = |of| match of {
        LengthOf::Keys => lengths.iter().map(|length| 8 * length).sum::<usize>(),
        LengthOf::Segments => lengths.iter().map(|length| 8 * length.next_multiple_of(prf.length())).sum(),
    };
    let mut round = 0_u64;
    let mut keys = Vec::with_capacity(lengths.len());
    let mut input = Vec::new();
    for length in lengths {
        let mut key = Buffer::default();
        while key.len() < *length {
            round += 1;
            input.clear();
            for field in fields {
                match field {
                    Field::Counter(integer) => integer.write(round, &mut input),
                    Field::Length(integer, of) => {
                        integer.write(u64::try_from(bits(*of)).unwrap_or(u64::MAX), &mut input)
                    }
                    Field::Bytes(bytes) => input.extend_from_slice(bytes),
                }
            }
            key.extend(&prf.block(&[&input]));
        }
        key.truncate(*length);
        keys.push(key);
    }
    Ok(keys)
}

/// ANSI X9.63 (SEC 1, 3.6.1): Hash(Z ‖ counter ‖ shared info).
pub(crate) fn x963(hash: Hash, secret: &[u8], shared: &[u8], length: usize) -> Buffer {
    expand(length, |counter| hash.digest(&[secret, counter, shared]))
}

/// The one-step KDF with a hash (SP 800-56C, 4.1): Hash(counter ‖ Z ‖ fixed info).
pub(crate) fn one_step(hash: Hash, secret: &[u8], info: &[u8], length: usize) -> Buffer {
    expand(length, |counter| hash.digest(&[counter, secret, info]))
}

/// The first half of HKDF: from `salt` (none is zeros) and `secret` to a pseudorandom key as long
/// as the hash.
pub(crate) fn hkdf_extract(hash: Hash, salt: &[u8], secret: &[u8]) -> Buffer {
    Buffer::copy_of(hmac::sign(&hmac::Key::new(hash.hmac_algorithm(), salt), secret).as_ref())
}

/// The second half of HKDF: `length` bytes (at most 255 times the hash) from a pseudorandom key.
pub(crate) fn hkdf_expand(hash: Hash, key: &[u8], info: &[u8], length: usize) -> Result<Buffer> {
    struct Length(usize);
    impl hkdf::KeyType for Length {
        fn len(&self) -> usize {
            self.0
        }
    }
    let algorithm = match hash {
        Hash::Sha1 => hkdf::HKDF_SHA1_FOR_LEGACY_USE_ONLY,
        Hash::Sha256 => hkdf::HKDF_SHA256,
        Hash::Sha384 => hkdf::HKDF_SHA384,
        Hash::Sha512 => hkdf::HKDF_SHA512,
        Hash::Sha224 => return fail(CKR_MECHANISM_PARAM_INVALID),
    };
    let mut out = Buffer::zeros(length);
    let prk = hkdf::Prk::new_less_safe(algorithm, key);
    let info = [info];
    let okm = prk.expand(&info, Length(length)).map_err(|_| Rv(CKR_MECHANISM_PARAM_INVALID))?;
    okm.fill(&mut out).map_err(|_| Rv(CKR_FUNCTION_FAILED))?;
    Ok(out)
}

fn expand(length: usize, block: impl Fn(&[u8]) -> aws_lc_rs::digest::Digest) -> Buffer {
    let mut out = Buffer::default();
    let mut counter = 0_u32;
    while out.len() < length {
        counter = counter.wrapping_add(1);
        out.extend(block(&counter.to_be_bytes()).as_ref());
    }
    out.truncate(length);
    out
}
