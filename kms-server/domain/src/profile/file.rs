//! The file of a device profile, field by field: TOML, in which an unknown or a missing field is
//! refused with its line.

use std::ops::Range;

use serde::Deserialize;
use toml::Spanned;

use super::{
    ClientProfile, CounterProfile, DeviceProfile, KeyProfile, NewKeyOrigin, OnNewKey, ProfileKeyType, SetupProfile,
    Shipped, key_type_of,
};
use crate::{
    CounterScope, DeviceProfileName, FlagId, KeyClass, KeyLength, KeyShape, KeyType, OwnerKind, ParseError,
    SecuritySetupId, SecuritySuite, SystemTitle, id::parse_name, meter::check_printable,
};

impl DeviceProfile {
    /// The files that come with the server: name and text.
    pub const SHIPPED: [(&'static str, &'static str); 5] = [
        ("generic-suite0", include_str!("../../../../policies/device-profiles/generic-suite0.toml")),
        ("generic-suite1", include_str!("../../../../policies/device-profiles/generic-suite1.toml")),
        ("generic-suite2", include_str!("../../../../policies/device-profiles/generic-suite2.toml")),
        ("two-setups-suite1", include_str!("../../../../policies/device-profiles/two-setups-suite1.toml")),
        ("gateway-suite0", include_str!("../../../../policies/device-profiles/gateway-suite0.toml")),
    ];

    /// Reads a profile from the text of its file.
    ///
    /// # Errors
    /// The text is not TOML, a field is unknown or missing, or a value is not valid. The error
    /// names the line.
    pub fn parse(text: &str) -> Result<Self, ProfileError> {
        let file: ProfileFile = toml::from_str(text).map_err(|error| ProfileError {
            line: error.span().map_or(0, |span| line_of(text, &span)),
            reason: error.message().to_owned(),
        })?;
        file.into_profile(text)
    }
}

/// Why a profile is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct ProfileError {
    /// The line, from 1; 0 if unknown.
    pub line: usize,
    /// What is wrong, naming the field.
    pub reason: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProfileFile {
    name: Spanned<String>,
    description: Spanned<String>,
    suite: Spanned<u8>,
    #[serde(default)]
    other_flag_ids: Vec<Spanned<String>>,
    #[serde(default)]
    key_types: Vec<KeyTypeTable>,
    security_setups: Vec<SetupTable>,
    #[serde(default)]
    clients: Vec<ClientTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyTypeTable {
    number: Spanned<u8>,
    name: Spanned<String>,
    class: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetupTable {
    obis: Spanned<String>,
    class_version: Spanned<u8>,
    keys: Vec<KeyTable>,
    counter: CounterTable,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyTable {
    #[serde(rename = "type")]
    key_type: Spanned<String>,
    origin: Spanned<NewKeyOrigin>,
    #[serde(default)]
    shipped: Shipped,
    #[serde(default)]
    owner: OwnerName,
    octets: Option<Spanned<usize>>,
    key_id: Option<Spanned<u8>>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum OwnerName {
    #[default]
    Meter,
    Group,
    DeviceType,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CounterTable {
    scope: ScopeName,
    on_new_key: Spanned<OnNewKeyName>,
    reset_to: Option<u32>,
    jump_cap: u32,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ScopeName {
    ClientTitle,
    Setup,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum OnNewKeyName {
    Continue,
    Reset,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClientTable {
    name: Spanned<String>,
    sap: Spanned<u16>,
    system_title: Option<Spanned<String>>,
    security_setup: Spanned<String>,
}

impl ProfileFile {
    fn into_profile(self, text: &str) -> Result<DeviceProfile, ProfileError> {
        let file = File(text);
        let suite = file.at(&self.suite, SecuritySuite::from_number(*self.suite.get_ref()))?;
        file.at(&self.description, check_printable("description", self.description.get_ref(), 1, 200))?;
        let key_types = self.key_types(&file)?;
        let setups = self
            .security_setups
            .iter()
            .map(|table| table.read(&file, suite, &key_types))
            .collect::<Result<Vec<_>, _>>()?;
        if setups.is_empty() {
            return Err(ProfileError { line: 0, reason: "security_setups: at least one is needed".to_owned() });
        }
        for (at, table) in self.security_setups.iter().enumerate() {
            if self.security_setups.iter().take(at).any(|earlier| earlier.obis.get_ref() == table.obis.get_ref()) {
                return Err(file.refuse(&table.obis, "obis: this security setup occurs twice"));
            }
        }
        let clients = self.clients.iter().map(|table| table.read(&file, &setups)).collect::<Result<_, _>>()?;
        Ok(DeviceProfile {
            name: file.at(&self.name, DeviceProfileName::parse(self.name.get_ref()))?,
            description: self.description.into_inner(),
            suite,
            other_flag_ids: self
                .other_flag_ids
                .iter()
                .map(|id| file.at(id, FlagId::parse(id.get_ref())))
                .collect::<Result<_, _>>()?,
            setups,
            clients,
            key_types,
        })
    }

    fn key_types(&self, file: &File<'_>) -> Result<Vec<ProfileKeyType>, ProfileError> {
        let mut own: Vec<ProfileKeyType> = Vec::new();
        for table in &self.key_types {
            let number = *table.number.get_ref();
            let key_type = file.at(&table.number, KeyType::from_number(number))?;
            if number < KeyType::FIRST_OF_PROFILES {
                return Err(file.refuse(&table.number, "number: a profile may use 32 to 63"));
            }
            let name = table.name.get_ref();
            let well_formed = (1..=32).contains(&name.len())
                && name.starts_with(|first: char| first.is_ascii_uppercase())
                && name.bytes().all(|octet| octet.is_ascii_uppercase() || octet.is_ascii_digit() || octet == b'-');
            if !well_formed {
                return Err(file.refuse(&table.name, "name: not 1 to 32 of A-Z, 0-9 and `-`, starting with a letter"));
            }
            if KeyType::parse(name).is_ok()
                || own.iter().any(|earlier| earlier.name == *name || earlier.key_type == key_type)
            {
                return Err(file.refuse(&table.name, "name, number: another key type has this name or number"));
            }
            if *table.class.get_ref() != key_type.class().name() {
                let (session, authentication) = (KeyClass::Session, KeyClass::Authentication);
                let reason = format!(
                    "class: numbers 32 to 55 are in class {session}, 56 to 63 in class {authentication}: `{number}` is in {}",
                    key_type.class()
                );
                return Err(file.refuse(&table.class, reason));
            }
            own.push(ProfileKeyType { key_type, name: name.clone() });
        }
        Ok(own)
    }
}

impl SetupTable {
    fn read(
        &self,
        file: &File<'_>,
        suite: SecuritySuite,
        key_types: &[ProfileKeyType],
    ) -> Result<SetupProfile, ProfileError> {
        if *self.class_version.get_ref() > 1 {
            return Err(file.refuse(&self.class_version, "class_version: class 64 has versions 0 and 1"));
        }
        if *self.class_version.get_ref() == 0 && suite != SecuritySuite::Suite0 {
            return Err(
                file.refuse(&self.class_version, "class_version: version 0 of class 64 has security suite 0 only")
            );
        }
        let mut keys: Vec<KeyProfile> = Vec::with_capacity(self.keys.len());
        for table in &self.keys {
            let key = table.read(file, suite, key_types)?;
            if keys.iter().any(|earlier| earlier.key_type == key.key_type) {
                return Err(file.refuse(&table.key_type, "type: the security setup has this key twice"));
            }
            if let Some(key_id) = &table.key_id
                && keys.iter().any(|earlier| earlier.key_id == key.key_id)
            {
                return Err(file.refuse(key_id, "key_id: another key of the security setup has it"));
            }
            keys.push(key);
        }
        if keys.is_empty() {
            return Err(file.refuse(&self.obis, "keys: the security setup has no key"));
        }
        Ok(SetupProfile {
            id: file.at(&self.obis, SecuritySetupId::parse(self.obis.get_ref()))?,
            keys,
            counter: self.counter.read(file)?,
        })
    }
}

impl KeyTable {
    fn read(
        &self,
        file: &File<'_>,
        suite: SecuritySuite,
        key_types: &[ProfileKeyType],
    ) -> Result<KeyProfile, ProfileError> {
        let key_type = file.at(&self.key_type, key_type_of(key_types, self.key_type.get_ref()))?;
        if key_type == KeyType::DEDICATED {
            return Err(file.refuse(&self.key_type, "type: a dedicated key belongs to an association and has no slot"));
        }
        let shape = match (&self.octets, key_type.is_aes()) {
            (None, true) => KeyShape::Aes(suite.key_length()),
            (None, false) => KeyShape::Secret,
            (Some(octets), true) => KeyShape::Aes(file.at(octets, KeyLength::from_octets(*octets.get_ref()))?),
            (Some(octets), false) => return Err(file.refuse(octets, "octets: a secret has no fixed length")),
        };
        let origin = *self.origin.get_ref();
        match (origin, key_type.is_aes()) {
            (NewKeyOrigin::Diversified | NewKeyOrigin::Generated, false) => {
                return Err(file.refuse(
                    &self.origin,
                    "origin: this system makes no secrets; a shipment brings them, so this must be `imported`",
                ));
            }
            (NewKeyOrigin::Imported, true) => {
                return Err(
                    file.refuse(&self.origin, "origin: an AES key is `diversified` or `generated`; `shipped` says whether a shipment brings the first one")
                );
            }
            (NewKeyOrigin::Imported, false) if self.shipped == Shipped::No => {
                return Err(
                    file.refuse(&self.key_type, "shipped: only a shipment brings a secret, so this cannot be `no`")
                );
            }
            _ => {}
        }
        let owner = match self.owner {
            OwnerName::Meter => OwnerKind::Meter,
            OwnerName::Group => OwnerKind::Group,
            OwnerName::DeviceType => OwnerKind::DeviceType,
        };
        if owner != OwnerKind::Meter && self.shipped != Shipped::No {
            return Err(
                file.refuse(&self.key_type, "shipped: a shipment carries keys of meters only, so this must be `no`")
            );
        }
        let key_id = match (&self.key_id, key_type.standard_key_id()) {
            (None, standard) => standard,
            (Some(id), Some(_)) => {
                return Err(
                    file.refuse(id, format!("key_id: the id of a {key_type} is fixed by the standard; leave it out"))
                );
            }
            (Some(id), None) if *id.get_ref() < 4 => {
                return Err(file.refuse(id, "key_id: 0 to 3 are the ids of GUEK, GBEK, GAK and KEK"));
            }
            (Some(id), None) if !key_type.is_transferable() => {
                return Err(file.refuse(
                    id,
                    "key_id: `key_transfer` carries AES keys only; a secret would travel in plaintext inside the request (I1)",
                ));
            }
            (Some(id), None) if owner == OwnerKind::DeviceType => {
                return Err(file.refuse(
                    id,
                    "key_id: the system does not record the device type of a meter, so a key of a device type is not transferred",
                ));
            }
            (Some(id), None) => Some(*id.get_ref()),
        };
        Ok(KeyProfile { key_type, origin, shape, shipped: self.shipped, owner, key_id })
    }
}

impl CounterTable {
    fn read(&self, file: &File<'_>) -> Result<CounterProfile, ProfileError> {
        let on_new_key = match (*self.on_new_key.get_ref(), self.reset_to) {
            (OnNewKeyName::Continue, None) => OnNewKey::Continue,
            (OnNewKeyName::Reset, Some(first)) => OnNewKey::Reset(first),
            (OnNewKeyName::Continue, Some(_)) => {
                return Err(file.refuse(&self.on_new_key, "reset_to: permitted only with on_new_key = \"reset\""));
            }
            (OnNewKeyName::Reset, None) => {
                return Err(file.refuse(&self.on_new_key, "reset_to: needed with on_new_key = \"reset\""));
            }
        };
        let scope = match self.scope {
            ScopeName::ClientTitle => CounterScope::ClientTitle,
            ScopeName::Setup => CounterScope::Setup,
        };
        Ok(CounterProfile { scope, on_new_key, jump_cap: self.jump_cap })
    }
}

impl ClientTable {
    fn read(&self, file: &File<'_>, setups: &[SetupProfile]) -> Result<ClientProfile, ProfileError> {
        let name = self.name.get_ref();
        file.at(&self.name, parse_name("client name", name, 32))?;
        let sap = *self.sap.get_ref();
        if !(1..=0x3FFF).contains(&sap) {
            return Err(file.refuse(&self.sap, "sap: not 1 to 16383"));
        }
        let security_setup = file.at(&self.security_setup, SecuritySetupId::parse(self.security_setup.get_ref()))?;
        if !setups.iter().any(|setup| setup.id == security_setup) {
            return Err(file.refuse(&self.security_setup, "security_setup: not one of [[security_setups]]"));
        }
        let system_title =
            self.system_title.as_ref().map(|title| file.at(title, SystemTitle::parse(title.get_ref()))).transpose()?;
        Ok(ClientProfile { name: name.clone(), sap, system_title, security_setup })
    }
}

/// The text of the file, to find lines.
struct File<'a>(&'a str);

impl File<'_> {
    fn refuse<T>(&self, place: &Spanned<T>, reason: impl Into<String>) -> ProfileError {
        ProfileError { line: line_of(self.0, &place.span()), reason: reason.into() }
    }

    fn at<P, T>(&self, place: &Spanned<P>, result: Result<T, ParseError>) -> Result<T, ProfileError> {
        result.map_err(|error| self.refuse(place, error.to_string()))
    }
}

fn line_of(text: &str, span: &Range<usize>) -> usize {
    text.bytes().take(span.start).filter(|octet| *octet == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shipped(name: &str) -> &'static str {
        DeviceProfile::SHIPPED.iter().find(|(known, _)| *known == name).unwrap().1
    }

    #[test]
    fn every_shipped_profile_is_right_and_named_as_its_file() {
        for (name, text) in DeviceProfile::SHIPPED {
            let profile = DeviceProfile::parse(text).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(profile.name.as_str(), name);
        }
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../policies/device-profiles");
        assert_eq!(
            std::fs::read_dir(folder).unwrap().count(),
            DeviceProfile::SHIPPED.len(),
            "a file is not in SHIPPED"
        );
    }

    #[test]
    fn the_gateway_has_what_its_file_says() {
        let profile = DeviceProfile::parse(shipped("gateway-suite0")).unwrap();
        let setup = profile.setup(SecuritySetupId::DEFAULT).unwrap();
        assert_eq!(
            setup.counter,
            CounterProfile { scope: CounterScope::Setup, on_new_key: OnNewKey::Reset(250), jump_cap: 50_000 }
        );
        let own = profile.parse_key_type("SERVICE-CODE").unwrap();
        assert_eq!((own.number(), own.class()), (56, KeyClass::Authentication));
        assert_eq!(profile.key_type_name(own), "SERVICE-CODE");
        assert_eq!(profile.key_type_name(KeyType::GUEK), "GUEK");
        let secret = profile.key(SecuritySetupId::DEFAULT, KeyType::LLS_SECRET).unwrap();
        assert_eq!((secret.shape, secret.shipped), (KeyShape::Secret, Shipped::Optional));
        assert!(
            secret.accepts_wrapped(24)
                && secret.accepts_wrapped(264)
                && !secret.accepts_wrapped(25)
                && !secret.accepts_wrapped(16)
        );
        assert_eq!(profile.key(SecuritySetupId::DEFAULT, KeyType::FIRMWARE).unwrap().owner, OwnerKind::DeviceType);
        let key_id = |key_type| profile.key(SecuritySetupId::DEFAULT, key_type).unwrap().key_id;
        assert_eq!(
            [KeyType::KEK, KeyType::OPTICAL_PORT, KeyType::M_BUS_CHILD, KeyType::FIRMWARE].map(key_id),
            [Some(3), Some(16), None, None]
        );
    }

    #[test]
    fn suite_2_has_long_keys() {
        let profile = DeviceProfile::parse(shipped("generic-suite2")).unwrap();
        let key = profile.key(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
        assert!(key.accepts_wrapped(40) && !key.accepts_wrapped(24));
    }

    #[test]
    fn a_suite_needs_the_class_version_that_has_it() {
        for name in ["generic-suite1", "generic-suite2", "two-setups-suite1"] {
            let error =
                DeviceProfile::parse(&shipped(name).replacen("class_version = 1", "class_version = 0", 1)).unwrap_err();
            assert!(error.reason.contains("suite 0 only"), "{error}");
        }
        assert!(
            DeviceProfile::parse(&shipped("generic-suite0").replacen("class_version = 0", "class_version = 1", 1))
                .is_ok()
        );
    }

    #[test]
    fn a_wrong_file_is_refused_with_its_line() {
        let right = shipped("generic-suite0");
        let line = |needle: &str| right.lines().position(|line| line.contains(needle)).unwrap() + 1;
        for (from, to, reason) in [
            ("suite = 0", "suite = 3", "suite"),
            ("class_version = 0", "class_version = 2", "class_version"),
            ("class_version = 0", "class_versoin = 0", "class_versoin"),
            ("{ type = \"GUEK\"", "{ type = \"GEK\"", "key type"),
            ("{ type = \"GUEK\"", "{ type = \"KEK\"", "twice"),
            ("{ type = \"GUEK\"", "{ type = \"DEDICATED\"", "association"),
            ("{ type = \"GUEK\"", "{ type = \"LLS-SECRET\"", "imported"),
            ("{ type = \"GBEK\", origin = \"generated\"", "{ type = \"GBEK\", origin = \"imported\"", "diversified"),
            (
                "{ type = \"GBEK\", origin = \"generated\"",
                "{ type = \"HLS-SECRET\", origin = \"generated\"",
                "imported",
            ),
            (
                "{ type = \"GBEK\", origin = \"generated\"",
                "{ type = \"HLS-SECRET\", origin = \"imported\", shipped = \"no\"",
                "shipped",
            ),
            (
                "{ type = \"GBEK\", origin = \"generated\"",
                "{ type = \"GBEK\", origin = \"generated\", key_id = 9",
                "fixed by the standard",
            ),
            (
                "{ type = \"GBEK\", origin = \"generated\"",
                "{ type = \"OPTICAL-PORT\", origin = \"generated\", key_id = 3",
                "0 to 3",
            ),
            (
                "{ type = \"GBEK\", origin = \"generated\"",
                "{ type = \"HLS-SECRET\", origin = \"imported\", key_id = 9",
                "I1",
            ),
            (
                "{ type = \"GBEK\", origin = \"generated\"",
                "{ type = \"FIRMWARE\", origin = \"generated\", owner = \"device-type\", shipped = \"no\", key_id = 9",
                "device type",
            ),
            (
                "{ type = \"GBEK\", origin = \"generated\"",
                "{ type = \"OPTICAL-PORT\", origin = \"generated\", key_id = 9 }, { type = \"M-BUS-CHILD\", origin = \"generated\", key_id = 9",
                "another key",
            ),
            ("on_new_key = \"continue\"", "on_new_key = \"reset\"", "reset_to"),
            ("scope = \"client-title\"", "scope = \"title\"", "title"),
            ("sap = 1", "sap = 0", "sap"),
            ("jump_cap = 100000", "jump_cap = -1", "integer"),
        ] {
            let error = DeviceProfile::parse(&right.replacen(from, to, 1)).expect_err(to);
            assert_eq!(error.line, line(from), "{to}: {error}");
            assert!(error.reason.contains(reason), "{to}: {error}");
        }
        for (from, to) in [
            ("name = \"generic-suite0\"\n", ""),
            ("obis = \"0.0.43.0.0.255\"", "obis = \"0.0.43.0.9.255\""),
            ("suite = 0", "suite = 0\nsuit = 1"),
        ] {
            assert!(DeviceProfile::parse(&right.replacen(from, to, 1)).is_err(), "{to}");
        }
    }

    #[test]
    fn a_key_type_of_a_profile_keeps_the_class_of_its_number() {
        let error = DeviceProfile::parse(&shipped("gateway-suite0").replacen(
            "class = \"session\"",
            "class = \"authentication\"",
            1,
        ))
        .unwrap_err();
        assert!(error.reason.contains("class"), "{error}");
        assert!(DeviceProfile::parse(&shipped("gateway-suite0").replacen("LOCAL-DISPLAY", "GUEK", 1)).is_err());
        assert!(DeviceProfile::parse(&shipped("gateway-suite0").replacen("number = 32", "number = 56", 1)).is_err());
        assert!(DeviceProfile::parse(&shipped("gateway-suite0").replacen("number = 32", "number = 10", 1)).is_err());
    }
}
