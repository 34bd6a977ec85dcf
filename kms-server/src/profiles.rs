//! The device profiles that this server knows: the shipped ones, and those of a folder.

use std::{collections::HashMap, path::Path};

use kms_domain::{DeviceProfile, DeviceProfileName};

/// Device profiles by name.
#[derive(Clone, Debug, Default)]
pub struct Profiles(HashMap<DeviceProfileName, DeviceProfile>);

impl Profiles {
    /// The shipped profiles, and all `*.toml` files of `folder`; one there replaces a shipped one of the same name.
    ///
    /// # Errors
    /// The folder or a file cannot be read, or a file is no profile: the text names file and line.
    pub fn load(folder: Option<&Path>) -> Result<Self, String> {
        let mut profiles = HashMap::new();
        for (file, text) in DeviceProfile::SHIPPED {
            let profile = DeviceProfile::parse(text).map_err(|error| format!("{file}: {error}"))?;
            profiles.insert(profile.name.clone(), profile);
        }
        if let Some(folder) = folder {
            let entries = std::fs::read_dir(folder).map_err(|error| format!("cannot read the folder of device profiles `{}`: {error}", folder.display()))?;
            let mut paths: Vec<_> =
                entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.extension().is_some_and(|extension| extension == "toml")).collect();
            paths.sort();
            for path in paths {
                let text = std::fs::read_to_string(&path).map_err(|error| format!("cannot read `{}`: {error}", path.display()))?;
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

    #[test]
    fn the_shipped_profiles_load_and_a_broken_one_is_named() {
        assert!(Profiles::load(None).unwrap().all().len() >= 5);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("broken.toml"), "name = 7").unwrap();
        let error = Profiles::load(Some(folder.path())).unwrap_err();
        assert!(error.contains("broken.toml"), "{error}");
    }
}
