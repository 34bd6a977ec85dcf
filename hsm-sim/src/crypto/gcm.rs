//! AES-GCM (SP 800-38D) with every IV length and tag length that the standard allows, and in parts.
//!
//! The `aes-gcm` crate fixes both lengths at compile time and takes a message only as a whole. So
//! this file builds the mode from the parts that the `aes-gcm` crate uses, the `ghash` and `ctr`
//! crates.

use std::sync::OnceLock;

use cryptoki_sys::{CKR_DATA_LEN_RANGE, CKR_MECHANISM_PARAM_INVALID};
use ghash::GHash;
use ghash::universal_hash::UniversalHash;

use crate::crypto::aes::{AesKey, BLOCK, KeyStream};
use crate::error::{Result, Rv, fail};
use crate::nonces::{self, Note};

/// An AES key that is ready to use, with the GHASH key that is computed at the first use of GCM.
pub(crate) struct Schedule {
    /// The block cipher.
    pub(crate) cipher: AesKey,
    hash: OnceLock<GHash>,
    /// The key's name for the nonce watcher, if there is one.
    name: Option<[u8; 16]>,
}

impl Schedule {
    /// The schedule of a key of 16, 24 or 32 octets.
    pub(crate) fn new(key: &[u8]) -> Result<Self> {
        Ok(Self { cipher: AesKey::new(key)?, hash: OnceLock::new(), name: nonces::key_name(key) })
    }

    /// The GHASH key.
    pub(crate) fn hash(&self) -> &GHash {
        self.hash.get_or_init(|| hash_key(&self.cipher))
    }
}

fn hash_key(key: &AesKey) -> GHash {
    let mut subkey = [0; BLOCK];
    key.encrypt_block(&mut subkey);
    GHash::new((&subkey).into())
}

/// A message that is being encrypted or decrypted.
pub(crate) struct Gcm {
    stream: KeyStream,
    hash: Absorber,
    mask: [u8; BLOCK],
    aad_length: u64,
    data_length: u64,
    note: Option<Box<Note>>,
}

impl Gcm {
    /// Starts a message that is encrypted, or authenticated. The nonce watcher notes its nonce.
    pub(crate) fn to_encrypt(key: &Schedule, iv: &[u8], aad: &[u8]) -> Result<Self> {
        let mut gcm = Self::new(&key.cipher, key.hash(), iv, &[])?;
        gcm.note = Note::of(key.name, iv);
        gcm.authenticate(aad)?;
        Ok(gcm)
    }

    /// Starts a message. `hash` is the GHASH key of `key`; `iv` has any length but zero.
    pub(crate) fn new(key: &AesKey, hash: &GHash, iv: &[u8], aad: &[u8]) -> Result<Self> {
        let mut counter = [0; BLOCK];
        match iv.len() {
            0 => return fail(CKR_MECHANISM_PARAM_INVALID),
            12 => {
                if let Some((head, tail)) = counter.split_at_mut_checked(12) {
                    head.copy_from_slice(iv);
                    tail.copy_from_slice(&[0, 0, 0, 1]);
                }
            }
            _ => {
                let mut absorber = Absorber::new(hash);
                absorber.update(iv);
                counter = absorber.finish(0, bits(iv.len())?);
            }
        }
        let mut mask = [0; BLOCK];
        let mut stream = KeyStream::for_gcm(key, &counter);
        if !stream.apply(&mut mask) {
            return fail(CKR_DATA_LEN_RANGE);
        }
        let mut gcm = Self { stream, hash: Absorber::new(hash), mask, aad_length: 0, data_length: 0, note: None };
        gcm.authenticate(aad)?;
        Ok(gcm)
    }

    /// More associated data; only before the first part of the message.
    pub(crate) fn authenticate(&mut self, aad: &[u8]) -> Result<()> {
        self.aad_length = self.aad_length.checked_add(bits(aad.len())?).ok_or(Rv(CKR_DATA_LEN_RANGE))?;
        self.hash.update(aad);
        if let Some(note) = &mut self.note {
            note.authenticate(aad);
        }
        Ok(())
    }

    /// Encrypts the next part in place.
    pub(crate) fn encrypt(&mut self, data: &mut [u8]) -> Result<()> {
        self.count(data.len())?;
        if let Some(note) = &mut self.note {
            note.encrypt(data);
        }
        if !self.stream.apply(data) {
            return fail(CKR_DATA_LEN_RANGE);
        }
        self.hash.update(data);
        Ok(())
    }

    /// Decrypts the next part in place. The caller must not use it before the tag is checked.
    pub(crate) fn decrypt(&mut self, data: &mut [u8]) -> Result<()> {
        self.count(data.len())?;
        self.hash.update(data);
        if self.stream.apply(data) { Ok(()) } else { fail(CKR_DATA_LEN_RANGE) }
    }

    /// The full tag; shorter ones are its first bytes.
    pub(crate) fn tag(&self) -> [u8; BLOCK] {
        if let Some(note) = &self.note {
            note.leave();
        }
        let mut tag = self.hash.clone().finish(self.aad_length, self.data_length);
        for (byte, mask) in tag.iter_mut().zip(self.mask) {
            *byte ^= mask;
        }
        tag
    }

    fn count(&mut self, length: usize) -> Result<()> {
        if self.data_length == 0 {
            self.hash.pad();
        }
        self.data_length += bits(length)?;
        // SP 800-38D, 5.2.1.1: at most 2^39 - 256 bits.
        if self.data_length > (1 << 39) - 256 { fail(CKR_DATA_LEN_RANGE) } else { Ok(()) }
    }
}

/// The tag lengths of SP 800-38D (5.2.1.2), in bits, to bytes.
pub(crate) fn tag_length(bits: u64) -> Result<usize> {
    match bits {
        32 => Ok(4),
        64 => Ok(8),
        96 => Ok(12),
        104 => Ok(13),
        112 => Ok(14),
        120 => Ok(15),
        128 => Ok(16),
        _ => fail(CKR_MECHANISM_PARAM_INVALID),
    }
}

fn bits(bytes: usize) -> Result<u64> {
    u64::try_from(bytes).ok().and_then(|bytes| bytes.checked_mul(8)).ok_or(Rv(CKR_DATA_LEN_RANGE))
}

/// GHASH over bytes that come in pieces of any length.
#[derive(Clone)]
struct Absorber {
    hash: GHash,
    pending: [u8; BLOCK],
    filled: usize,
}

impl Absorber {
    fn new(hash: &GHash) -> Self {
        Self { hash: hash.clone(), pending: [0; BLOCK], filled: 0 }
    }

    fn update(&mut self, mut data: &[u8]) {
        if self.filled > 0 {
            let (now, rest) = data.split_at(data.len().min(BLOCK - self.filled));
            for (place, byte) in self.pending.iter_mut().skip(self.filled).zip(now) {
                *place = *byte;
            }
            self.filled += now.len();
            data = rest;
            if self.filled < BLOCK {
                return;
            }
            self.pad();
        }
        let (blocks, rest) = ghash::Block::slice_as_chunks(data);
        self.hash.update(blocks);
        for (place, byte) in self.pending.iter_mut().zip(rest) {
            *place = *byte;
        }
        self.filled = rest.len();
    }

    /// Fills up the block with zeros.
    fn pad(&mut self) {
        if self.filled > 0 {
            self.pending.iter_mut().skip(self.filled).for_each(|byte| *byte = 0);
            self.hash.update(core::slice::from_ref((&self.pending).into()));
            self.filled = 0;
        }
    }

    /// Ends with the two lengths in bits.
    fn finish(mut self, first: u64, second: u64) -> [u8; BLOCK] {
        self.pad();
        let lengths = (u128::from(first) << 64 | u128::from(second)).to_be_bytes();
        self.hash.update(core::slice::from_ref((&lengths).into()));
        self.hash.finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seal(key: &[u8], iv: &[u8], aad: &[u8], data: &[u8], step: usize) -> (Vec<u8>, [u8; 16]) {
        let key = AesKey::new(key).unwrap();
        let mut gcm = Gcm::new(&key, &hash_key(&key), iv, aad).unwrap();
        let mut data = data.to_vec();
        for part in data.chunks_mut(step) {
            gcm.encrypt(part).unwrap();
        }
        (data, gcm.tag())
    }

    fn bytes(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    /// McGrew and Viega, "The Galois/Counter Mode of Operation", test cases 4 (96-bit IV), 5
    /// (64-bit IV) and 6 (480-bit IV).
    #[test]
    fn known_answers_with_short_and_long_ivs() {
        let key = bytes("feffe9928665731c6d6a8f9467308308");
        let data = bytes(
            "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39",
        );
        let aad = bytes("feedfacedeadbeeffeedfacedeadbeefabaddad2");
        let long = "9313225df88406e555909c5aff5269aa6a7a9538534f7da1e4c303d2a318a728c3c0c95156809539fcf0e2429a6b525416aedbf5a0de6a57a637b39b";
        for (iv, tag) in [
            ("cafebabefacedbaddecaf888", "5bc94fbc3221a5db94fae95ae7121a47"),
            ("cafebabefacedbad", "3612d2e79e3b0785561be14aaca2fccb"),
            (long, "619cc5aefffe0bfa462af43c1699d050"),
        ] {
            for step in [1, 7, 16, 17, 60] {
                assert_eq!(
                    seal(&key, &bytes(iv), &aad, &data, step).1.to_vec(),
                    bytes(tag),
                    "IV {iv}, parts of {step}"
                );
            }
        }
    }

    #[test]
    fn decryption_undoes_encryption_and_gives_the_same_tag() {
        let key = AesKey::new(&[7; 32]).unwrap();
        let (mut data, tag) = seal(&[7; 32], b"iv", b"aad", b"some plaintext of 35 bytes, no block", 5);
        let mut gcm = Gcm::new(&key, &hash_key(&key), b"iv", b"aad").unwrap();
        gcm.decrypt(&mut data).unwrap();
        assert_eq!((data.as_slice(), gcm.tag()), (b"some plaintext of 35 bytes, no block".as_slice(), tag));
    }
}
