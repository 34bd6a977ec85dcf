//! Key octets in memory.

use std::fmt;

use aws_lc_rs::{cmac, constant_time};
use zeroize::Zeroizing;

/// A key or secret in plaintext: 16 or 32 octets of an AES key, or 1–255 of a secret. Wiped when
/// dropped.
///
/// The content is never printed. Comparing takes the same time wherever two keys differ.
pub struct SecretKey(Zeroizing<Box<[u8]>>);

impl SecretKey {
    /// Takes a copy of these octets.
    pub(crate) fn copy_of(octets: &[u8]) -> Self {
        Self(Zeroizing::new(octets.into()))
    }

    /// The octets. A caller that copies them must wipe the copy.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// The key check value of an AES key, 5 octets: AES-CMAC of one block of zeros, leftmost octets
    /// (ANSI X9.24-1:2017, Annex A). With it, two people can see that they hold the same key.
    /// `None` for a secret: a password could be guessed from it.
    ///
    /// The older check value, AES of a block of zeros, would disclose a part of the GCM hash key of
    /// a GUEK.
    pub fn check_value(&self) -> Option<[u8; 5]> {
        let algorithm = match self.0.len() {
            16 => cmac::AES_128,
            32 => cmac::AES_256,
            _ => return None,
        };
        let key = cmac::Key::new(algorithm, &self.0).ok()?;
        cmac::sign(&key, &[0; 16]).ok()?.as_ref().first_chunk().copied()
    }
}

impl PartialEq for SecretKey {
    fn eq(&self, other: &Self) -> bool {
        constant_time::verify_slices_are_equal(&self.0, &other.0).is_ok()
    }
}

impl Eq for SecretKey {}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretKey({} octets)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_key_is_printed_and_equality_is_by_content() {
        let key = SecretKey::copy_of(&[0xAB; 16]);
        assert_eq!(format!("{key:?}"), "SecretKey(16 octets)");
        assert!(
            key == SecretKey::copy_of(&[0xAB; 16])
                && key != SecretKey::copy_of(&[0xAC; 16])
                && key != SecretKey::copy_of(&[0xAB; 32])
        );
    }

    #[test]
    fn the_check_value_is_the_cmac_of_a_zero_block() {
        // Computed with OpenSSL: openssl mac -cipher AES-128-CBC -macopt hexkey:… CMAC over 16 zero
        // octets.
        let key = SecretKey::copy_of(&hex::decode("2b7e151628aed2a6abf7158809cf4f3c").unwrap());
        assert_eq!(key.check_value().map(hex::encode).as_deref(), Some(CHECK_VALUE));
        assert_eq!(SecretKey::copy_of(b"password").check_value(), None);
    }

    const CHECK_VALUE: &str = "7ad386c376";
}
