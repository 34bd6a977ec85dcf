//! The encoding of secrets that are not AES keys (docs/formats.md). It keeps the length, because
//! PKCS#11 modules pad silently and do not store it.

use zeroize::Zeroizing;

use crate::ParseError;

/// An LLS or HLS secret in its encoding: `length(1) ‖ secret(1–255) ‖ zeros` up to a multiple of 8
/// octets, at least 16, at most 256.
pub struct EncodedSecret(Zeroizing<Vec<u8>>);

impl EncodedSecret {
    /// Encodes a secret of 1–255 octets.
    ///
    /// # Errors
    /// The secret is empty or longer than 255 octets.
    pub fn encode(secret: &[u8]) -> Result<Self, ParseError> {
        let length = match u8::try_from(secret.len()) {
            Ok(length) if length > 0 => length,
            _ => return Err(ParseError::new("secret", format!("{} octets instead of 1 to 255", secret.len()))),
        };
        let encoded_length = (secret.len() + 1).next_multiple_of(8).max(16);
        // The capacity is the whole length, so that no growing vector leaves a copy in memory.
        let mut encoded = Zeroizing::new(Vec::with_capacity(encoded_length));
        encoded.push(length);
        encoded.extend_from_slice(secret);
        encoded.resize(encoded_length, 0);
        Ok(Self(encoded))
    }

    /// Checks octets that should be an encoded secret.
    ///
    /// # Errors
    /// The length is wrong, or the padding has octets other than zero.
    pub fn from_octets(encoded: Zeroizing<Vec<u8>>) -> Result<Self, ParseError> {
        let refuse = || ParseError::new("secret", "not in the encoding length ‖ secret ‖ zeros");
        let (length, rest) = encoded.split_first().ok_or_else(refuse)?;
        let length = usize::from(*length);
        let padding = rest.get(length..).ok_or_else(refuse)?;
        if length == 0
            || encoded.len() != (length + 1).next_multiple_of(8).max(16)
            || padding.iter().any(|octet| *octet != 0)
        {
            return Err(refuse());
        }
        Ok(Self(encoded))
    }

    /// The encoding.
    pub fn octets(&self) -> &[u8] {
        &self.0
    }

    /// The secret itself, 1–255 octets.
    pub fn secret(&self) -> &[u8] {
        let length = self.0.first().copied().map_or(0, usize::from);
        self.0.get(1..=length).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_of_every_length_come_back() {
        for length in 1..=255 {
            let secret = vec![0xA5; length];
            let encoded = EncodedSecret::encode(&secret).unwrap();
            assert!(
                encoded.octets().len() >= 16
                    && encoded.octets().len().is_multiple_of(8)
                    && encoded.octets().len() <= 256
            );
            let decoded = EncodedSecret::from_octets(Zeroizing::new(encoded.octets().to_vec())).unwrap();
            assert_eq!(decoded.secret(), secret);
        }
        assert!(EncodedSecret::encode(&[]).is_err() && EncodedSecret::encode(&[0; 256]).is_err());
    }

    #[test]
    fn other_octets_are_refused() {
        let refused: [&[u8]; 6] = [b"", &[0; 16], &[1, 1, 0, 0, 0, 0, 0, 0], &[1; 16], &[15; 15], &[16; 16]];
        for octets in refused {
            assert!(EncodedSecret::from_octets(Zeroizing::new(octets.to_vec())).is_err(), "{octets:?}");
        }
    }
}
