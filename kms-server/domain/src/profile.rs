//! Device profiles: what the server must know about a type of meters. They are TOML files, to which
//! users add their own (`policies/device-profiles/`; `generic-suite0.toml` explains every field).

pub(crate) mod file;

use serde::Deserialize;

use crate::{
    CounterScope, DeviceProfileName, FlagId, KeyShape, KeyType, OwnerKind, ParseError, SecuritySetupId, SecuritySuite,
    SystemTitle, id::excerpt,
};

/// A type of meters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceProfile {
    /// Its name.
    pub name: DeviceProfileName,
    /// One line for people, at most 200 printable ASCII characters.
    pub description: String,
    /// The security suite that its meters are delivered with.
    pub suite: SecuritySuite,
    /// FLAG ids that system titles may start with, besides the vendor's.
    pub other_flag_ids: Vec<FlagId>,
    /// The security setups, at least one, each once.
    pub setups: Vec<SetupProfile>,
    /// The clients of the meter.
    pub clients: Vec<ClientProfile>,
    /// Key types that only this profile has.
    pub key_types: Vec<ProfileKeyType>,
}

impl DeviceProfile {
    /// The security setup with this id.
    pub fn setup(&self, id: SecuritySetupId) -> Option<&SetupProfile> {
        self.setups.iter().find(|setup| setup.id == id)
    }

    /// What the profile says about a key.
    pub fn key(&self, setup: SecuritySetupId, key_type: KeyType) -> Option<&KeyProfile> {
        self.setup(setup)?.keys.iter().find(|key| key.key_type == key_type)
    }

    /// The key type of this name: one of [`KeyType::parse`], or one of the profile's own.
    ///
    /// # Errors
    /// No type has the name.
    pub fn parse_key_type(&self, name: &str) -> Result<KeyType, ParseError> {
        key_type_of(&self.key_types, name)
    }

    /// The name of a key type, the profile's own where it has one.
    pub fn key_type_name(&self, key_type: KeyType) -> String {
        self.key_types
            .iter()
            .find(|own| own.key_type == key_type)
            .map_or_else(|| key_type.to_string(), |own| own.name.clone())
    }
}

/// A security setup of a type of meters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetupProfile {
    /// The security setup.
    pub id: SecuritySetupId,
    /// Its keys, each type once.
    pub keys: Vec<KeyProfile>,
    /// How its meters count.
    pub counter: CounterProfile,
}

/// A key of a type of meters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyProfile {
    /// The type.
    pub key_type: KeyType,
    /// Where new versions come from.
    pub origin: NewKeyOrigin,
    /// AES with its length, or a secret.
    pub shape: KeyShape,
    /// Whether a shipment carries it.
    pub shipped: Shipped,
    /// Who owns it.
    pub owner: OwnerKind,
    /// The id that `key_transfer` has for it in these meters; `None`: it is not transferred over
    /// the air.
    pub key_id: Option<u8>,
}

impl KeyProfile {
    /// Whether a key in its RFC 3394 wrap may have this length: 24 or 40 octets, or for secrets a
    /// multiple of 8 from 24 to 264.
    pub const fn accepts_wrapped(&self, length: usize) -> bool {
        match self.shape {
            KeyShape::Aes(key) => length == key.wrapped_octets(),
            KeyShape::Secret => length >= 24 && length <= 264 && length.is_multiple_of(8),
        }
    }
}

/// Where a new key version comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NewKeyOrigin {
    /// Derived from the root of its class; generated if the module cannot derive keys.
    Diversified,
    /// Random.
    Generated,
    /// Brought by a shipment, not made by this system. This is so for all secrets and for no AES
    /// key. Modules cannot make a random key of the form length octet, random octets and zeros
    /// (docs/formats.md, *Secrets*), and no secret is made outside an HSM (I1).
    Imported,
}

/// Whether a vendor's shipment carries a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shipped {
    /// A device without it is refused.
    #[default]
    Required,
    /// A device may have it.
    Optional,
    /// A device with it is refused.
    No,
}

/// How meters count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CounterProfile {
    /// What one counter covers.
    pub scope: CounterScope,
    /// What the counter does when the key changes.
    pub on_new_key: OnNewKey,
    /// How far the server lets a counter jump for an unauthenticated answer.
    pub jump_cap: u32,
}

/// What a meter's invocation counter does when its key changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnNewKey {
    /// It continues.
    Continue,
    /// It starts again: this is the first counter for the new key.
    Reset(u32),
}

/// A client (association) of a type of meters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientProfile {
    /// Its name: 1–32 of a–z, 0–9 and `-`.
    pub name: String,
    /// The client's service access point, 1–16383.
    pub sap: u16,
    /// Its system title, if the meter accepts only one.
    pub system_title: Option<SystemTitle>,
    /// The security setup that protects the association.
    pub security_setup: SecuritySetupId,
}

/// A key type that one profile adds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProfileKeyType {
    /// The type; its number gives its class ([`KeyType::class`]).
    pub key_type: KeyType,
    /// Its name: 1–32 of A–Z, 0–9 and `-`.
    pub name: String,
}

fn key_type_of(own: &[ProfileKeyType], name: &str) -> Result<KeyType, ParseError> {
    match own.iter().find(|known| known.name == name) {
        Some(known) => Ok(known.key_type),
        None => KeyType::parse(name).map_err(|error| match own {
            [] => error,
            _ => ParseError::new(
                "key type",
                format!("`{}` is neither a known key type nor one of [[key_types]]", excerpt(name)),
            ),
        }),
    }
}
