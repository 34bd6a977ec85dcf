//! What makes each diversified key different from all others (docs/formats.md, *Diversified keys*).

use crate::{KeyLength, KeyType, KeyVersionNumber, Owner, ParseError, SecuritySetupId};

/// How a diversification root derives keys; recorded with the root's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyDerivation {
    /// NIST SP 800-108r1, counter mode, AES-CMAC (CKM_SP800_108_COUNTER_KDF).
    Sp800108Cmac,
    /// CKM_AES_CBC_ENCRYPT_DATA with a zero IV.
    AesCbcEncryptData,
}

impl KeyDerivation {
    /// The name in configuration and rows.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sp800108Cmac => "sp800-108-cmac",
            Self::AesCbcEncryptData => "aes-cbc-encrypt-data",
        }
    }

    /// The derivation of this name.
    ///
    /// # Errors
    /// No derivation has the name.
    pub fn parse(name: &str) -> Result<Self, ParseError> {
        [Self::Sp800108Cmac, Self::AesCbcEncryptData]
            .into_iter()
            .find(|derivation| derivation.name() == name)
            .ok_or_else(|| {
                ParseError::new(
                    "key derivation",
                    format!("`{name}` is neither sp800-108-cmac nor aes-cbc-encrypt-data"),
                )
            })
    }
}

/// The injective context of one diversified key version: no two keys of an island and class share
/// one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DiversificationContext {
    /// Whose key it is.
    pub owner: Owner,
    /// The security setup of the meter that uses it.
    pub setup: SecuritySetupId,
    /// The key's type.
    pub key_type: KeyType,
    /// The key's version.
    pub version: KeyVersionNumber,
    /// The key's length.
    pub length: KeyLength,
}

impl DiversificationContext {
    /// Block 1 of `aes-cbc-encrypt-data`: `owner id(8) ‖ setup(2) ‖ type octet(1) ‖ version(4) ‖
    /// key length(1)`.
    pub fn block(&self) -> [u8; 16] {
        let mut block = [0; 16];
        let parts: [&[u8]; 5] = [
            &self.owner.id(),
            &self.setup.octets(),
            &[self.type_octet()],
            &self.version.octets(),
            &[self.length_octet()],
        ];
        fill(&mut block, &parts);
        block
    }

    /// The data of `aes-cbc-encrypt-data`: [`Self::block`], and for 32-octet keys a constant second
    /// block.
    pub fn cbc_data(&self) -> Vec<u8> {
        let mut data = self.block().to_vec();
        if self.length == KeyLength::Aes256 {
            data.extend_from_slice(BLOCK_2);
        }
        data
    }

    /// The label of SP 800-108: the type octet.
    pub fn label(&self) -> [u8; 1] {
        [self.type_octet()]
    }

    /// The context of SP 800-108: `owner id(8) ‖ setup(2) ‖ version(4) ‖ key length(1)`.
    pub fn context(&self) -> [u8; 15] {
        let mut context = [0; 15];
        let parts: [&[u8]; 4] =
            [&self.owner.id(), &self.setup.octets(), &self.version.octets(), &[self.length_octet()]];
        fill(&mut context, &parts);
        context
    }

    fn type_octet(&self) -> u8 {
        self.owner.kind().number() * 64 + self.key_type.number()
    }

    fn length_octet(&self) -> u8 {
        match self.length {
            KeyLength::Aes128 => 16,
            KeyLength::Aes256 => 32,
        }
    }
}

fn fill(target: &mut [u8], parts: &[&[u8]]) {
    for (octet, value) in target.iter_mut().zip(parts.iter().flat_map(|part| part.iter())) {
        *octet = *value;
    }
}

const BLOCK_2: &[u8; 16] = b"meterkms-block-2";
