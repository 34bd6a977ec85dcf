//! The configuration: a file of `key = value` lines, and the environment variables that name it.

use std::path::{Path, PathBuf};

/// The settings of the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    /// The folder that holds one folder per slot.
    pub(crate) directory: PathBuf,
    /// The number of slots.
    pub(crate) slots: u32,
    /// The control file of the failing HSM.
    pub(crate) control: Option<PathBuf>,
    /// The folder of the nonce watcher's notes, for tests.
    pub(crate) nonce_watch: Option<PathBuf>,
    /// The number of wrong PINs in a row that locks the PIN.
    pub(crate) attempts: u32,
    /// Argon2id: memory in KiB.
    pub(crate) memory: u32,
    /// Argon2id: passes.
    pub(crate) passes: u32,
}

impl Settings {
    /// Reads the configuration that the environment names. An error says which line is wrong.
    pub(crate) fn from_environment() -> Result<Self, String> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let mut settings = Self {
            directory: PathBuf::new(),
            slots: 8,
            control: None,
            nonce_watch: None,
            attempts: 10,
            memory: 19 * 1024,
            passes: 2,
        };
        if let Some(path) = variable("HSM_SIM_CONF").map(PathBuf::from) {
            let text =
                std::fs::read_to_string(&path).map_err(|error| format!("cannot read `{}`: {error}", path.display()))?;
            settings.read(&text, path.parent().unwrap_or(Path::new(".")))?;
        }
        if let Some(folder) = variable("HSM_SIM_NONCE_WATCH") {
            settings.nonce_watch = Some(folder.into());
        }
        if settings.directory.as_os_str().is_empty() {
            let data = || variable("XDG_DATA_HOME").map(PathBuf::from);
            let home = || variable("HOME").map(|home| PathBuf::from(home).join(".local/share"));
            settings.directory = match variable("HSM_SIM_DIR") {
                Some(directory) => PathBuf::from(directory),
                None => {
                    data().or_else(home).ok_or("none of HSM_SIM_CONF, HSM_SIM_DIR and HOME is set")?.join("hsm-sim")
                }
            };
        }
        Ok(settings)
    }

    /// Reads the lines of a configuration file. Relative paths start at the file's folder.
    fn read(&mut self, text: &str, folder: &Path) -> Result<(), String> {
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let place = number + 1;
            let (key, value) = line.split_once('=').ok_or(format!("line {place}: expected `key = value`"))?;
            let value = value.trim();
            let value = value.strip_prefix('"').and_then(|inner| inner.strip_suffix('"')).unwrap_or(value);
            let within = |low: u32, high: u32| {
                value
                    .parse()
                    .ok()
                    .filter(|number| (low..=high).contains(number))
                    .ok_or(format!("line {place}: `{value}` is no number from {low} to {high}"))
            };
            match key.trim() {
                "directory" => self.directory = folder.join(value),
                "control" => self.control = Some(folder.join(value)),
                "nonce_watch" => self.nonce_watch = Some(folder.join(value)),
                "slots" => self.slots = within(1, 1024)?,
                "pin_attempts" => self.attempts = within(1, 1000)?,
                "argon2_memory_kib" => self.memory = within(8, 4 * 1024 * 1024)?,
                "argon2_passes" => self.passes = within(1, 1000)?,
                other => return Err(format!("line {place}: unknown key `{other}`")),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Settings, String> {
        let mut settings = Settings {
            directory: PathBuf::new(),
            slots: 8,
            control: None,
            nonce_watch: None,
            attempts: 10,
            memory: 19 * 1024,
            passes: 2,
        };
        settings.read(text, Path::new("/etc/hsm")).map(|()| settings)
    }

    #[test]
    fn lines_are_read_and_wrong_ones_named() {
        let settings = read(
            "# comment\ndirectory = tokens\nslots=3\ncontrol = \"/run/control\"\nnonce_watch = n\npin_attempts = 5\n",
        )
        .unwrap();
        assert_eq!(settings.directory, Path::new("/etc/hsm/tokens"));
        assert_eq!(settings.control.as_deref(), Some(Path::new("/run/control")));
        assert_eq!(settings.nonce_watch.as_deref(), Some(Path::new("/etc/hsm/n")));
        assert_eq!((settings.slots, settings.attempts), (3, 5));
        assert_eq!(read("slots = 0").unwrap_err(), "line 1: `0` is no number from 1 to 1024");
        assert_eq!(read("\nslot = 1").unwrap_err(), "line 2: unknown key `slot`");
    }
}
