//! Key versions: their states by NIST SP 800-57 part 1, their origin, and their stored form.

use std::fmt;

use bytes::Bytes;

use crate::{
    CounterDomainId, CounterError, CounterState, Counters, Exposure, ExposureReason, KeyDerivation, KeyLength,
    KeyShape, KeyType, KeyVersionNumber, ParseError, Party, UnixMillis,
};

/// The state of a key version (NIST SP 800-57 part 1 revision 5, 7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyState {
    /// Made and not in use: granted to nobody (I3).
    PreActive,
    /// In use.
    Active,
    /// Temporarily out of use.
    Suspended,
    /// No longer used to protect anything new. The meter may still hold it.
    Deactivated,
    /// Known to someone who must not know it. Never granted again.
    Compromised,
    /// No copy exists any more.
    Destroyed,
}

impl KeyState {
    /// All states.
    pub const ALL: [Self; 6] =
        [Self::PreActive, Self::Active, Self::Suspended, Self::Deactivated, Self::Compromised, Self::Destroyed];

    /// Whether a key may change from this state to the other. A compromised key can only be
    /// destroyed, and a destroyed one stays destroyed.
    pub const fn may_become(self, next: Self) -> bool {
        matches!(
            (self, next),
            (Self::PreActive, Self::Active | Self::Compromised | Self::Destroyed)
                | (Self::Active, Self::Suspended | Self::Deactivated | Self::Compromised)
                | (Self::Suspended, Self::Active | Self::Deactivated | Self::Compromised)
                | (Self::Deactivated, Self::Compromised | Self::Destroyed)
                | (Self::Compromised, Self::Destroyed)
        )
    }

    /// The name in output, as SP 800-57 writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PreActive => "pre-active",
            Self::Active => "active",
            Self::Suspended => "suspended",
            Self::Deactivated => "deactivated",
            Self::Compromised => "compromised",
            Self::Destroyed => "destroyed",
        }
    }

    /// The state of this name.
    ///
    /// # Errors
    /// No state has the name.
    pub fn parse(name: &str) -> Result<Self, ParseError> {
        Self::ALL.into_iter().find(|state| state.name() == name).ok_or_else(|| {
            ParseError::new(
                "key state",
                format!("`{name}` is not pre-active, active, suspended, deactivated, compromised or destroyed"),
            )
        })
    }
}

impl fmt::Display for KeyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The origin of a key version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyOrigin {
    /// Derived from a diversification root of its class, and not stored.
    Diversified {
        /// The version of the root, from 1.
        root_version: u8,
        /// How that root derives.
        derivation: KeyDerivation,
        /// The length of the derived key. It stays the same if the meter changes its suite.
        length: KeyLength,
    },
    /// Made at random in the HSM.
    Generated,
    /// Brought by a vendor or taken over from a head-end.
    Imported,
}

/// The stored form of a key version.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum KeyMaterial {
    /// Nothing: the HSM derives it.
    Derived,
    /// The key, wrapped.
    Wrapped(WrappedKey),
    /// Nothing: the version is destroyed.
    Destroyed,
}

/// A key wrapped by RFC 3394 under the storage KEK of its class.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WrappedKey {
    storage_kek_version: u8,
    shape: KeyShape,
    blob: Bytes,
}

impl WrappedKey {
    /// A wrapped key of `key_type`: 24 or 40 octets for AES keys, a multiple of 8 between 24 and
    /// 264 for secrets.
    ///
    /// # Errors
    /// The blob has another length, or the version of the storage KEK is 0.
    pub fn new(key_type: KeyType, storage_kek_version: u8, blob: Bytes) -> Result<Self, ParseError> {
        if storage_kek_version == 0 {
            return Err(ParseError::new("storage KEK version", "versions start at 1"));
        }
        let shape = match (key_type.is_aes(), blob.len()) {
            (true, 24) => KeyShape::Aes(KeyLength::Aes128),
            (true, 40) => KeyShape::Aes(KeyLength::Aes256),
            (false, length) if (24..=264).contains(&length) && length.is_multiple_of(8) => KeyShape::Secret,
            (_, length) => {
                return Err(ParseError::new(
                    "wrapped key",
                    format!("{length} octets are not the length of an RFC 3394 wrap of a {key_type}"),
                ));
            }
        };
        Ok(Self { storage_kek_version, shape, blob })
    }

    /// The version of the storage KEK that wraps it, from 1.
    pub const fn storage_kek_version(&self) -> u8 {
        self.storage_kek_version
    }

    /// What the key is in the HSM.
    pub const fn shape(&self) -> KeyShape {
        self.shape
    }

    /// The wrapped octets: 8 more than the key has.
    pub const fn blob(&self) -> &Bytes {
        &self.blob
    }
}

/// Where the invocation counters of a key version are kept.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CounterPlace {
    /// In this version. Empty for keys that protect no frames.
    Own(Counters),
    /// In a counter domain, together with all other slots that have the same key value (I4).
    Domain(CounterDomainId),
}

/// One key version. Its fields change only through its [`Slot`](crate::Slot), which keeps the rules
/// between versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyVersion {
    pub(crate) number: KeyVersionNumber,
    pub(crate) state: KeyState,
    pub(crate) since: UnixMillis,
    pub(crate) origin: KeyOrigin,
    pub(crate) material: KeyMaterial,
    pub(crate) fingerprint: Option<[u8; 16]>,
    pub(crate) candidate: bool,
    pub(crate) exposures: Vec<Exposure>,
    pub(crate) counters: CounterPlace,
    pub(crate) transport: Transport,
}

/// When and how a version left for the meter and was shown by it. The numbers are moments of the
/// meter's own sequence ([`crate::Meter::sequence`]), from 1, because clocks of several servers
/// give no order; 0 means never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Transport {
    /// When its wrapped form left last.
    pub left: u32,
    /// When the meter last showed that it holds it.
    pub confirmed: u32,
    /// The strongest evidence with which the meter showed it.
    pub evidence: Evidence,
    /// Under which version of the meter's KEK its wrapped form left. A version leaves under one KEK
    /// only, so a meter that holds it has shown the KEK too.
    pub kek: Option<KeyVersionNumber>,
    /// The highest invocation counter that the meter itself used with it, in an answer that the HSM
    /// could open.
    pub meter_counter: u32,
}

/// The evidence that a meter holds a key version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Evidence {
    /// Nothing was shown.
    #[default]
    None,
    /// A party that holds the key states it.
    Attested,
    /// The meter accepted its transfer, authenticated under other keys. The key itself was not
    /// used.
    Acknowledged,
    /// The meter answered a fresh challenge of the HSM under this key.
    Proven,
}

impl Evidence {
    /// All kinds, the weakest first.
    pub const ALL: [Self; 4] = [Self::None, Self::Attested, Self::Acknowledged, Self::Proven];

    /// The name in output and records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Attested => "attested",
            Self::Acknowledged => "acknowledged",
            Self::Proven => "proven",
        }
    }

    /// The number in rows, from 0.
    pub const fn number(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Attested => 1,
            Self::Acknowledged => 2,
            Self::Proven => 3,
        }
    }

    /// The evidence with this number.
    ///
    /// # Errors
    /// No evidence has the number.
    pub fn from_number(number: u32) -> Result<Self, ParseError> {
        Self::ALL
            .into_iter()
            .find(|evidence| evidence.number() == number)
            .ok_or_else(|| ParseError::new("evidence", format!("`{number}` is not 0 to 3")))
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl KeyVersion {
    /// The number within the slot.
    pub const fn number(&self) -> KeyVersionNumber {
        self.number
    }

    /// The state.
    pub const fn state(&self) -> KeyState {
        self.state
    }

    /// When it entered this state.
    pub const fn since(&self) -> UnixMillis {
        self.since
    }

    /// Its origin.
    pub const fn origin(&self) -> KeyOrigin {
        self.origin
    }

    /// Its stored form.
    pub const fn material(&self) -> &KeyMaterial {
        &self.material
    }

    /// What the key is in the HSM; `None` when it is destroyed.
    pub const fn shape(&self) -> Option<KeyShape> {
        match (&self.material, self.origin) {
            (KeyMaterial::Wrapped(wrapped), _) => Some(wrapped.shape),
            (KeyMaterial::Derived, KeyOrigin::Diversified { length, .. }) => Some(KeyShape::Aes(length)),
            _ => None,
        }
    }

    /// The fingerprint of the value (docs/formats.md), if one was taken: imported keys have one.
    pub const fn fingerprint(&self) -> Option<[u8; 16]> {
        self.fingerprint
    }

    /// I3: whether the meter may hold this version.
    pub const fn candidate(&self) -> bool {
        self.candidate
    }

    /// Whether it is destroyed and has nothing but its number: it never left, has no counters, was
    /// not imported, and nobody knows it.
    pub(crate) fn is_blank(&self) -> bool {
        self.state == KeyState::Destroyed
            && self.transport == Transport::default()
            && self.exposures.is_empty()
            && self.fingerprint.is_none()
            && self.counters == CounterPlace::Own(Counters::default())
    }

    /// When and how it left for the meter and was shown by it.
    pub const fn transport(&self) -> Transport {
        self.transport
    }

    /// Who could know it.
    pub fn exposures(&self) -> &[Exposure] {
        &self.exposures
    }

    /// Where its invocation counters are.
    pub const fn counters(&self) -> &CounterPlace {
        &self.counters
    }

    /// Its own invocation counters, to be changed by the rules of [`Counters`].
    ///
    /// # Errors
    /// They are in a domain.
    pub const fn counters_mut(&mut self) -> Result<&mut Counters, CounterError> {
        match &mut self.counters {
            CounterPlace::Own(counters) => Ok(counters),
            CounterPlace::Domain(domain) => Err(CounterError::InDomain { domain: *domain }),
        }
    }

    /// Whether 80 % of one of its counters are used. Of counters in a domain, ask the domain.
    pub fn rotation_due(&self) -> bool {
        match &self.counters {
            CounterPlace::Own(counters) => counters.states().iter().any(CounterState::rotation_due),
            CounterPlace::Domain(_) => false,
        }
    }

    /// The domain that keeps its counters.
    pub const fn domain(&self) -> Option<CounterDomainId> {
        match self.counters {
            CounterPlace::Domain(domain) => Some(domain),
            CounterPlace::Own(_) => None,
        }
    }

    /// Records that `party` could know this version. Returns whether that is new: the row is
    /// written only then.
    pub fn expose(&mut self, party: Party, reason: ExposureReason, now: UnixMillis) -> bool {
        let known = self.exposures.iter().any(|exposure| exposure.party == party && exposure.reason == reason);
        if !known {
            self.exposures.push(Exposure { party, since: now, reason });
        }
        !known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_transitions_of_sp_800_57() {
        let allowed: Vec<_> = KeyState::ALL
            .into_iter()
            .flat_map(|from| KeyState::ALL.into_iter().filter(move |to| from.may_become(*to)).map(move |to| (from, to)))
            .collect();
        assert_eq!(allowed.len(), 12);
        assert!(
            KeyState::ALL
                .into_iter()
                .all(|state| !state.may_become(KeyState::PreActive) && !KeyState::Destroyed.may_become(state))
        );
        assert!(KeyState::ALL.into_iter().all(|state| KeyState::parse(state.name()) == Ok(state)));
    }

    #[test]
    fn a_wrapped_key_has_the_length_of_its_type() {
        assert!(WrappedKey::new(KeyType::GUEK, 1, Bytes::from_static(&[0; 32])).is_err());
        assert!(WrappedKey::new(KeyType::LLS_SECRET, 1, Bytes::from_static(&[0; 32])).is_ok());
        assert!(WrappedKey::new(KeyType::GUEK, 0, Bytes::from_static(&[0; 24])).is_err());
    }
}
