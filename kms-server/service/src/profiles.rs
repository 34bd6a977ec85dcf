//! The device profiles of this server: the shipped ones and those of a folder.

use std::{collections::HashMap, path::Path};

use kms_domain::{DeviceProfile, DeviceProfileName};

/// Device profiles by name.
#[derive(Clone, Debug, Default)]
pub struct Profiles(HashMap<DeviceProfileName, DeviceProfile>);

impl Profiles {
    /// The shipped profiles and all `*.toml` files of `folder`. A file there replaces a shipped
    /// profile of the same name.
    ///
    /// # Errors
    /// The folder or a file cannot be read, or a file is not a profile: the text names the file and
    /// line.
    pub fn load(folder: Option<&Path>) -> Result<Self, String> {
        let mut profiles = HashMap::new();
        for (file, text) in DeviceProfile::SHIPPED {
            let profile = DeviceProfile::parse(text).map_err(|error| format!("{file}: {error}"))?;
            profiles.insert(profile.name.clone(), profile);
        }
        if let Some(folder) = folder {
            let entries = std::fs::read_dir(folder).map_err(|error| {
                format!("cannot read the folder of device profiles `{}`: {error}", folder.display())
            })?;
            let mut paths: Vec<_> = entries
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
                .collect();
            paths.sort();
            for path in paths {
                let text = std::fs::read_to_string(&path)
                    .map_err(|error| format!("cannot read `{}`: {error}", path.display()))?;
                let profile = DeviceProfile::parse(&text).map_err(|error| format!("{}: {error}", path.display()))?;
                profiles.insert(profile.name.clone(), profile);
            }
        }
        Ok(Self(profiles))
    }

    /// The profile of this name.
    pub fn get(&self, name: &DeviceProfileName) -> Option<&DeviceProfile> {
        self.0.get(name)
    }

    /// All profiles, in order of their names.
    pub fn all(&self) -> Vec<&DeviceProfile> {
        let mut all: Vec<_> = self.0.values().collect();
        all.sort_by(|one, other| one.name.cmp(&other.name));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every field of a device profile, and the code outside of tests that acts on it.
    const FIELDS: &[(&str, &str, &str)] = &[
        ("name", include_str!("shipment/record.rs"), "device_profile"),
        ("description", include_str!("../../src/command_line.rs"), "profile.description"),
        ("suite", include_str!("shipment/record.rs"), "profile.suite"),
        ("other_flag_ids", include_str!("../../domain/src/shipment.rs"), "profile.other_flag_ids"),
        ("key_types.number", include_str!("../../domain/src/key_type.rs"), "FIRST_OF_PROFILES"),
        ("key_types.name", include_str!("shipment/known.rs"), "profile.key_type_name"),
        (
            "key_types.class",
            include_str!("../../domain/src/profile/file.rs"),
            "*table.class.get_ref() != key_type.class().name()",
        ),
        ("security_setups.obis", include_str!("meter/counter.rs"), "profile.setup(floor.setup)"),
        (
            "security_setups.class_version",
            include_str!("../../domain/src/profile/file.rs"),
            "*self.class_version.get_ref() == 0 && suite",
        ),
        ("security_setups.keys.type", include_str!("transfer/begin.rs"), "profile.key(setup, key_type)"),
        ("security_setups.keys.origin", include_str!("transfer/begin.rs"), "profile.map(|key| key.origin)"),
        (
            "security_setups.keys.shipped",
            include_str!("../../domain/src/shipment.rs"),
            "key.shipped == Shipped::Required",
        ),
        ("security_setups.keys.owner", include_str!("transfer/begin.rs"), "key.owner == OwnerKind::Group"),
        ("security_setups.keys.octets", include_str!("keys/recipe.rs"), "key.shape"),
        ("security_setups.keys.key_id", include_str!("campaign/survey.rs"), ".key(setup, key_type)?.key_id"),
        ("security_setups.counter.scope", include_str!("meter/counter.rs"), "counter.scope.key("),
        ("security_setups.counter.on_new_key", include_str!("keys/counter.rs"), "profile.counter.on_new_key"),
        (
            "security_setups.counter.reset_to",
            include_str!("../../ledger/src/view/counters.rs"),
            "OnNewKey::Reset(first) =>",
        ),
        ("security_setups.counter.jump_cap", include_str!("transfer/counters.rs"), "setup.counter.jump_cap"),
        ("clients.name", include_str!("../../src/command_line.rs"), "client.name"),
        ("clients.sap", include_str!("transfer/emit.rs"), "client.sap"),
        ("clients.system_title", include_str!("transfer/emit.rs"), "client.system_title.is_none_or"),
        ("clients.security_setup", include_str!("transfer/emit.rs"), "client.security_setup == transfer.setup"),
    ];

    /// What the parser takes in a table: it names the fields when it refuses another one.
    fn accepted(text: &str) -> Vec<String> {
        let error = DeviceProfile::parse(text).unwrap_err().reason;
        let fields: Vec<String> = error.split('`').skip(1).step_by(2).map(ToOwned::to_owned).collect();
        assert_eq!(fields[0], "unknown", "{error}");
        fields[1..].to_vec()
    }

    #[test]
    fn every_field_of_a_device_profile_does_something() {
        let text = DeviceProfile::SHIPPED.iter().find(|(name, _)| *name == "gateway-suite0").unwrap().1;
        let tables = [
            ("", text.replacen("suite = 0", "suite = 0\nunknown = 1", 1)),
            ("key_types.", text.replacen("number = 32", "unknown = 1\nnumber = 32", 1)),
            ("security_setups.", text.replacen("class_version = 0", "class_version = 0\nunknown = 1", 1)),
            ("security_setups.keys.", text.replacen("{ type = \"KEK\"", "{ unknown = 1, type = \"KEK\"", 1)),
            ("security_setups.counter.", text.replacen("scope = \"setup\"", "unknown = 1\nscope = \"setup\"", 1)),
            ("clients.", text.replacen("sap = 1", "unknown = 1\nsap = 1", 1)),
        ];
        let nested = ["key_types", "security_setups", "security_setups.keys", "security_setups.counter", "clients"];
        let mut taken: Vec<String> = tables
            .iter()
            .flat_map(|(table, text)| accepted(text).into_iter().map(move |field| format!("{table}{field}")))
            .collect();
        taken.retain(|field| !nested.contains(&field.as_str()));
        taken.sort();
        let mut known: Vec<String> = FIELDS.iter().map(|(field, ..)| (*field).to_owned()).collect();
        known.sort();
        assert_eq!(taken, known, "a field that the parser takes and no code is known to act on, or the reverse");
        for (field, code, reads) in FIELDS {
            let code = code.split("#[cfg(test)]\nmod tests").next().unwrap();
            assert!(code.contains(reads), "`{field}`: no code has `{reads}` any more");
        }
    }

    #[test]
    fn the_shipped_profiles_load_and_a_broken_one_is_named() {
        assert!(Profiles::load(None).unwrap().all().len() >= 5);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("broken.toml"), "name = 7").unwrap();
        let error = Profiles::load(Some(folder.path())).unwrap_err();
        assert!(error.contains("broken.toml"), "{error}");
    }
}
