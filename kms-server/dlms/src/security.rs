//! The security header, the nonce and the associated data of ciphered APDUs (IEC 62056-5-3, 5.3.7;
//! Green Book, AES-GCM).

use kms_domain::{SecuritySuite, SystemTitle};
use zeroize::Zeroizing;

use crate::{DlmsError, reader::Reader};

/// The security control octet: bits 0–3 suite, 4 authenticated, 5 encrypted, 6 broadcast key, 7
/// compressed.
///
/// Encryption without authentication is refused (the authentication key would protect nothing), and
/// so is compression, because policy could not read what is inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SecurityControl {
    /// The security suite.
    pub suite: SecuritySuite,
    /// How the content is protected.
    pub protection: Protection,
    /// Which encryption key.
    pub key_set: KeySet,
}

/// How a ciphered APDU is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protection {
    /// Readable, with an authentication tag.
    Authenticated,
    /// Encrypted, with an authentication tag.
    AuthenticatedEncrypted,
}

/// Which global encryption key protects a ciphered APDU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeySet {
    /// GUEK, or the dedicated key in ded-APDUs.
    Unicast,
    /// GBEK: no acknowledgement, and no authenticity of the single meter.
    Broadcast,
}

impl SecurityControl {
    /// Reads the octet.
    ///
    /// # Errors
    /// An unknown suite, compression, or no authentication.
    pub fn from_octet(octet: u8) -> Result<Self, DlmsError> {
        const WHAT: &str = "security control";
        let suite =
            SecuritySuite::from_number(octet & SUITE).map_err(|error| DlmsError::invalid(WHAT, error.to_string()))?;
        if octet & COMPRESSED != 0 {
            return Err(DlmsError::invalid(WHAT, "compressed content cannot be checked"));
        }
        let protection = match (octet & AUTHENTICATED != 0, octet & ENCRYPTED != 0) {
            (true, true) => Protection::AuthenticatedEncrypted,
            (true, false) => Protection::Authenticated,
            (false, true) => {
                return Err(DlmsError::invalid(WHAT, "encrypted without authentication: use authenticated encryption"));
            }
            (false, false) => return Err(DlmsError::invalid(WHAT, "neither authenticated nor encrypted")),
        };
        let key_set = if octet & BROADCAST == 0 { KeySet::Unicast } else { KeySet::Broadcast };
        Ok(Self { suite, protection, key_set })
    }

    /// The octet.
    pub const fn octet(self) -> u8 {
        let protection = match self.protection {
            Protection::Authenticated => AUTHENTICATED,
            Protection::AuthenticatedEncrypted => AUTHENTICATED | ENCRYPTED,
        };
        let key_set = match self.key_set {
            KeySet::Unicast => 0,
            KeySet::Broadcast => BROADCAST,
        };
        self.suite.number() | protection | key_set
    }

    /// The associated data of AES-GCM: `SC ‖ GAK`, and for authentication only `SC ‖ GAK ‖
    /// content`; the GCM plaintext is then empty. `gak` has 16 octets, or 32 in suite 2.
    ///
    /// I1: this is where the GAK passes through server memory, in a zeroizing buffer for one call.
    pub fn associated_data(self, gak: &[u8], content: &[u8]) -> Zeroizing<Vec<u8>> {
        let content = match self.protection {
            Protection::Authenticated => content,
            Protection::AuthenticatedEncrypted => &[],
        };
        // The capacity is the whole length, so that no copy of the key is left behind by a growing
        // vector.
        let mut data = Zeroizing::new(Vec::with_capacity(1 + gak.len() + content.len()));
        data.push(self.octet());
        data.extend_from_slice(gak);
        data.extend_from_slice(content);
        data
    }
}

/// The nonce of AES-GCM: the *sender's* system title (8) ‖ invocation counter (4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Nonce([u8; 12]);

impl Nonce {
    /// The nonce of a sender's counter. // I4: who makes one has reserved the counter, or received
    /// the frame.
    pub fn new(sender: SystemTitle, counter: u32) -> Self {
        let mut nonce = [0; 12];
        for (octet, value) in nonce.iter_mut().zip(sender.octets().into_iter().chain(counter.to_be_bytes())) {
            *octet = value;
        }
        Self(nonce)
    }

    /// The 12 octets.
    pub const fn octets(&self) -> &[u8; 12] {
        &self.0
    }
}

/// The authentication tag of DLMS: AES-GCM's, truncated to 12 octets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AuthenticationTag(pub [u8; 12]);

/// The answer to a challenge in HLS authentication mechanism 5: `SC ‖ IC ‖ GMAC(SC ‖ GAK ‖
/// challenge)`, 17 octets.
///
/// It uses up an invocation counter of its own, besides that of the APDU that carries it (I4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HlsGmac {
    /// The security suite.
    pub suite: SecuritySuite,
    /// The invocation counter.
    pub counter: u32,
    /// The tag: AES-GCM of nothing, with [`Self::control`]'s associated data over the challenge.
    pub tag: AuthenticationTag,
}

impl HlsGmac {
    /// The security control of every GMAC of a suite.
    pub const fn control(suite: SecuritySuite) -> SecurityControl {
        SecurityControl { suite, protection: Protection::Authenticated, key_set: KeySet::Unicast }
    }

    /// The 17 octets.
    pub fn octets(&self) -> [u8; 17] {
        let mut octets = [0; 17];
        let parts = [Self::control(self.suite).octet()].into_iter().chain(self.counter.to_be_bytes()).chain(self.tag.0);
        for (octet, value) in octets.iter_mut().zip(parts) {
            *octet = value;
        }
        octets
    }

    /// Reads the 17 octets.
    ///
    /// # Errors
    /// Another length, or a security control that is not that of a GMAC.
    pub fn parse(octets: &[u8]) -> Result<Self, DlmsError> {
        const WHAT: &str = "HLS GMAC";
        let mut reader = Reader::new(octets);
        let control = SecurityControl::from_octet(reader.octet(WHAT)?)?;
        if control != Self::control(control.suite) {
            return Err(DlmsError::invalid(WHAT, "the security control is not `authenticated`"));
        }
        let counter = u32::from_be_bytes(reader.array(WHAT)?);
        let tag = AuthenticationTag(reader.array(WHAT)?);
        reader.end(WHAT)?;
        Ok(Self { suite: control.suite, counter, tag })
    }
}

const SUITE: u8 = 0x0F;
const AUTHENTICATED: u8 = 0x10;
const ENCRYPTED: u8 = 0x20;
const BROADCAST: u8 = 0x40;
const COMPRESSED: u8 = 0x80;
