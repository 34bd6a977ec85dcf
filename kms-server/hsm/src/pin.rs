//! PINs: the places that they are read from, and the memory of wrong ones, which are tried only
//! once.

use std::fmt;
use std::path::PathBuf;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use zeroize::Zeroizing;

/// A PIN in zeroizing memory. It has no text form.
#[derive(Clone)]
pub struct Pin(Zeroizing<String>);

impl Pin {
    /// A PIN of these characters.
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The PIN's octets (UTF-8), for the module and for [`PinMemory`].
    pub fn octets(&self) -> &[u8] {
        self.0.as_bytes()
    }

    pub(crate) fn is_same(&self, other: &Self) -> bool {
        verify_slices_are_equal(self.octets(), other.octets()).is_ok()
    }

    /// The form that the cryptoki crate takes; it zeroizes its copy too.
    pub(crate) fn for_cryptoki(&self) -> cryptoki::types::AuthPin {
        cryptoki::types::AuthPin::new(self.0.as_str().into())
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pin(…)")
    }
}

/// Where a PIN is read from, each time that it is needed. Never the command line: other users of
/// the machine see that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PinSource {
    /// A file that only its owner can read (mode 0600 or stricter); one trailing line end is
    /// dropped.
    File(PathBuf),
    /// An environment variable.
    Environment(String),
}

impl PinSource {
    /// Reads the PIN.
    ///
    /// # Errors
    /// A text that says what is wrong with the source and what to do; it contains nothing of the
    /// PIN.
    pub fn read(&self) -> Result<Pin, String> {
        let text =
            match self {
                Self::File(path) => {
                    check_mode(path)?;
                    Zeroizing::new(
                        std::fs::read_to_string(path)
                            .map_err(|error| format!("the PIN file `{}` cannot be read: {error}", path.display()))?,
                    )
                }
                Self::Environment(name) => Zeroizing::new(std::env::var(name).map_err(|_| {
                    format!("the environment variable `{name}` with the PIN is not set, or is not UTF-8")
                })?),
            };
        let pin = text.strip_suffix('\n').map_or(text.as_str(), |line| line.strip_suffix('\r').unwrap_or(line));
        if pin.is_empty() {
            return Err(format!("the PIN of {self} is empty"));
        }
        Ok(Pin::new(pin.to_owned()))
    }
}

impl fmt::Display for PinSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "the file `{}`", path.display()),
            Self::Environment(name) => write!(f, "the environment variable `{name}`"),
        }
    }
}

/// The memory of refused PINs. It outlives restarts and is shared by servers (as Argon2id with a
/// random salt, per token serial number).
///
/// A token locks after a few wrong PINs; a server that restarts in a loop would lock it. Both
/// methods may block: they are called from a thread of the token, never from an async task.
pub trait PinMemory: Send + Sync {
    /// Whether the token of this serial number has refused this PIN before.
    fn was_refused(&self, token_serial: &str, pin: &Pin) -> bool;

    /// Remembers that the token of this serial number refused this PIN.
    fn remember_refused(&self, token_serial: &str, pin: &Pin);
}

/// A memory that ends with the process: for tools that try a PIN once, and for tests.
#[derive(Default)]
pub struct ProcessPinMemory(std::sync::Mutex<Vec<(String, Pin)>>);

impl PinMemory for ProcessPinMemory {
    fn was_refused(&self, token_serial: &str, pin: &Pin) -> bool {
        let refused = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        refused.iter().any(|(serial, refused)| serial == token_serial && refused.is_same(pin))
    }

    fn remember_refused(&self, token_serial: &str, pin: &Pin) {
        if !self.was_refused(token_serial, pin) {
            self.0
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .push((token_serial.to_owned(), pin.clone()));
        }
    }
}

#[cfg(unix)]
fn check_mode(path: &std::path::Path) -> Result<(), String> {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(path)
        .map_err(|error| format!("the PIN file `{}` cannot be read: {error}", path.display()))?
        .permissions()
        .mode();
    if mode & 0o077 != 0 {
        return Err(format!(
            "the PIN file `{}` has mode {:04o}, so others can read it; run `chmod 600` on it and change the PIN",
            path.display(),
            mode & 0o7777
        ));
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_mode(_path: &std::path::Path) -> Result<(), String> {
    Ok(())
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_pin_file_that_others_can_read_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "4711\n").unwrap();
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o640)).unwrap();
        let source = PinSource::File(file.path().to_owned());
        let reason = source.read().unwrap_err();
        assert!(reason.contains("0640") && !reason.contains("4711"), "{reason}");
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(source.read().unwrap().octets(), b"4711");
    }
}
