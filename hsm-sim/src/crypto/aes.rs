//! AES (FIPS 197) with a key schedule that is made once per key, and the modes that work on whole
//! blocks.

use ::aes::cipher::common::{BlockSizeUser, InnerInit};
use ::aes::cipher::consts::U16;
use ::aes::cipher::{
    Block, BlockCipherDecrypt, BlockCipherEncrypt, BlockModeDecrypt, BlockModeEncrypt, InnerIvInit, KeyInit,
    StreamCipher, StreamCipherCoreWrapper,
};
use ::aes::{Aes128, Aes192, Aes256};
use aes_kw::{AesKw, AesKwp};
use cmac::{Cmac, Mac};
use cryptoki_sys::{CKR_FUNCTION_FAILED, CKR_KEY_SIZE_RANGE};
use ctr::flavors::{Ctr32BE, Ctr128BE};
use ctr::{CtrCore, CtrFlavor};

use crate::buffer::Buffer;
use crate::error::{Result, Rv, fail};

/// The block length in bytes.
pub(crate) const BLOCK: usize = 16;

/// An AES key, ready to use in both directions. Its memory is overwritten on drop.
#[derive(Clone)]
pub(crate) enum AesKey {
    /// 16 bytes.
    Short(Aes128),
    /// 24 bytes.
    Middle(Aes192),
    /// 32 bytes.
    Long(Aes256),
}

/// Runs one expression with the cipher, for each key size.
macro_rules! with_cipher {
    ($key:expr, $cipher:ident => $body:expr) => {
        match $key {
            AesKey::Short($cipher) => $body,
            AesKey::Middle($cipher) => $body,
            AesKey::Long($cipher) => $body,
        }
    };
}

impl AesKey {
    /// The key in `bytes` (16, 24 or 32), else `CKR_KEY_SIZE_RANGE`.
    pub(crate) fn new(bytes: &[u8]) -> Result<Self> {
        let wrong = |_| Rv(CKR_KEY_SIZE_RANGE);
        match bytes.len() {
            16 => Aes128::new_from_slice(bytes).map(Self::Short).map_err(wrong),
            24 => Aes192::new_from_slice(bytes).map(Self::Middle).map_err(wrong),
            32 => Aes256::new_from_slice(bytes).map(Self::Long).map_err(wrong),
            _ => fail(CKR_KEY_SIZE_RANGE),
        }
    }

    /// Encrypts one block.
    pub(crate) fn encrypt_block(&self, block: &mut [u8; BLOCK]) {
        with_cipher!(self, cipher => cipher.encrypt_block(block.into()));
    }

    /// ECB in place; `data` is whole blocks.
    pub(crate) fn ecb(&self, encrypt: bool, data: &mut [u8]) {
        let (blocks, _) = Block::<Aes128>::slice_as_chunks_mut(data);
        with_cipher!(self, cipher => if encrypt { cipher.encrypt_blocks(blocks) } else { cipher.decrypt_blocks(blocks) });
    }

    /// CBC in place; `data` is whole blocks. `iv` becomes the chaining value for what follows.
    pub(crate) fn cbc(&self, encrypt: bool, iv: &mut [u8; BLOCK], data: &mut [u8]) {
        let mut last = [0; BLOCK];
        if let Some(block) = data.last_chunk::<BLOCK>() {
            last = *block;
        }
        let (blocks, _) = Block::<Aes128>::slice_as_chunks_mut(data);
        if blocks.is_empty() {
            return;
        }
        with_cipher!(self, cipher => if encrypt {
            cbc::Encryptor::inner_iv_init(cipher, (&*iv).into()).encrypt_blocks(blocks);
        } else {
            cbc::Decryptor::inner_iv_init(cipher, (&*iv).into()).decrypt_blocks(blocks);
        });
        if encrypt {
            if let Some(block) = data.last_chunk::<BLOCK>() {
                *iv = *block;
            }
        } else {
            *iv = last;
        }
    }

    /// Wraps `key` (RFC 3394). The length must be a multiple of 8 and at least 16: the caller has
    /// checked it.
    pub(crate) fn wrap(&self, key: &[u8]) -> Result<Buffer> {
        let mut wrapped = Buffer::zeros(key.len() + 8);
        let done = with_cipher!(self, cipher => AesKw::inner_init(cipher).wrap_key(key, &mut wrapped).is_ok());
        if done { Ok(wrapped) } else { fail(CKR_FUNCTION_FAILED) }
    }

    /// Opens `wrapped` (RFC 3394). `None`: it was changed, or wrapped under another key, or its
    /// length is impossible.
    pub(crate) fn unwrap(&self, wrapped: &[u8]) -> Option<Buffer> {
        let mut key = Buffer::zeros(wrapped.len().checked_sub(8)?);
        with_cipher!(self, cipher => AesKw::inner_init(cipher).unwrap_key(wrapped, &mut key).is_ok()).then_some(key)
    }

    /// Wraps `key` of any length (RFC 5649).
    pub(crate) fn wrap_padded(&self, key: &[u8]) -> Result<Buffer> {
        let mut wrapped = Buffer::zeros(key.len().next_multiple_of(8) + 8);
        let done = with_cipher!(self, cipher => AesKwp::inner_init(cipher).wrap_key(key, &mut wrapped).is_ok());
        if done { Ok(wrapped) } else { fail(CKR_FUNCTION_FAILED) }
    }

    /// Opens `wrapped` (RFC 5649). `None` as for [`AesKey::unwrap`].
    pub(crate) fn unwrap_padded(&self, wrapped: &[u8]) -> Option<Buffer> {
        let mut key = Buffer::zeros(wrapped.len().checked_sub(8)?);
        let length = with_cipher!(self, cipher => AesKwp::inner_init(cipher).unwrap_key(wrapped, &mut key).map(<[u8]>::len).ok())?;
        key.truncate(length);
        Some(key)
    }

    /// The CMAC of `data` (SP 800-38B) in one go.
    pub(crate) fn cmac(&self, data: &[&[u8]]) -> [u8; BLOCK] {
        let mut mac = CmacState::new(self);
        for part in data {
            mac.update(part);
        }
        mac.finish()
    }
}

/// A CMAC that is being computed.
#[derive(Clone)]
pub(crate) enum CmacState {
    /// With a 16-byte key.
    Short(Cmac<Aes128>),
    /// With a 24-byte key.
    Middle(Cmac<Aes192>),
    /// With a 32-byte key.
    Long(Cmac<Aes256>),
}

impl CmacState {
    pub(crate) fn new(key: &AesKey) -> Self {
        match key {
            AesKey::Short(cipher) => Self::Short(Cmac::inner_init(cipher.clone())),
            AesKey::Middle(cipher) => Self::Middle(Cmac::inner_init(cipher.clone())),
            AesKey::Long(cipher) => Self::Long(Cmac::inner_init(cipher.clone())),
        }
    }

    pub(crate) fn update(&mut self, data: &[u8]) {
        match self {
            Self::Short(mac) => mac.update(data),
            Self::Middle(mac) => mac.update(data),
            Self::Long(mac) => mac.update(data),
        }
    }

    pub(crate) fn finish(self) -> [u8; BLOCK] {
        match self {
            Self::Short(mac) => mac.finalize().into_bytes().into(),
            Self::Middle(mac) => mac.finalize().into_bytes().into(),
            Self::Long(mac) => mac.finalize().into_bytes().into(),
        }
    }
}

/// A key stream of AES in counter mode (SP 800-38A, 6.5), xored into data.
pub(crate) struct KeyStream {
    stream: Box<dyn Apply + Send>,
    /// How many bytes are left before the counter would repeat.
    remaining: u128,
}

impl KeyStream {
    /// A key stream whose first counter block is `block` and whose counter is the last `bits` (1 to
    /// 128) bits of it.
    pub(crate) fn new(key: &AesKey, bits: u64, block: &[u8; BLOCK]) -> Option<Self> {
        let mask = match bits {
            1..=127 => (1_u128 << bits) - 1,
            128 => u128::MAX,
            _ => return None,
        };
        // The counter never wraps, so the wider counter of the cipher makes no difference.
        let blocks = (mask - (u128::from_be_bytes(*block) & mask)).saturating_add(1);
        Some(Self { stream: Self::boxed::<Ctr128BE>(key, block), remaining: blocks.saturating_mul(16) })
    }

    /// The key stream of GCM: the counter is 32 bits wide and may wrap (SP 800-38D, 6.2).
    pub(crate) fn for_gcm(key: &AesKey, block: &[u8; BLOCK]) -> Self {
        Self { stream: Self::boxed::<Ctr32BE>(key, block), remaining: 1 << 36 }
    }

    /// Encrypts or decrypts in place. False: the counter would repeat.
    #[must_use]
    pub(crate) fn apply(&mut self, data: &mut [u8]) -> bool {
        let Some(remaining) = u128::try_from(data.len()).ok().and_then(|length| self.remaining.checked_sub(length))
        else {
            return false;
        };
        self.remaining = remaining;
        self.stream.apply(data)
    }

    fn boxed<F: CtrFlavor<U16> + Send + 'static>(key: &AesKey, block: &[u8; BLOCK]) -> Box<dyn Apply + Send>
    where
        F::CtrNonce: Send,
    {
        fn wrap<C, F>(cipher: &C, block: &[u8; BLOCK]) -> Box<dyn Apply + Send>
        where
            C: BlockCipherEncrypt + BlockSizeUser<BlockSize = U16> + Clone + Send + 'static,
            F: CtrFlavor<U16> + Send + 'static,
            F::CtrNonce: Send,
        {
            Box::new(StreamCipherCoreWrapper::from_core(CtrCore::<C, F>::inner_iv_init(cipher.clone(), block.into())))
        }
        match key {
            AesKey::Short(cipher) => wrap::<_, F>(cipher, block),
            AesKey::Middle(cipher) => wrap::<_, F>(cipher, block),
            AesKey::Long(cipher) => wrap::<_, F>(cipher, block),
        }
    }
}

trait Apply {
    fn apply(&mut self, data: &mut [u8]) -> bool;
}

impl<C: StreamCipher> Apply for C {
    fn apply(&mut self, data: &mut [u8]) -> bool {
        self.try_apply_keystream(data).is_ok()
    }
}
