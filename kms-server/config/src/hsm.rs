//! `[hsm]`: the tokens, and which key class is in which token.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use kms_base::bounds::{Bound, Limits};
use kms_domain::{IslandName, KeyClass};
use kms_hsm::{Hsm, HsmError, PinMemory, PinSource, Token, TokenSelector, TokenSettings};
use serde::Deserialize;

use crate::secret::SecretSource;

/// `[hsm]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HsmSection {
    /// `[[hsm.token]]`, one for each token that this server may log in to.
    #[serde(rename = "token")]
    pub tokens: Vec<TokenSection>,
    /// `[hsm.classes]`: which token holds which key class. Can be left out with one token.
    #[serde(default)]
    pub classes: Option<ClassesSection>,
    /// Permit the envelope algorithm `ecdh-p256-cbc-expand`, for a module that offers only
    /// CKD_NULL. Default: false; not for production.
    #[serde(default)]
    pub allow_cbc_expand: bool,
}

/// `[[hsm.token]]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenSection {
    /// A name within this file, for `[hsm.classes]`.
    pub name: String,
    /// Path of the PKCS#11 module.
    pub module: PathBuf,
    /// The token's label.
    pub label: String,
    /// The token's serial number, if several tokens have one label.
    pub serial: Option<String>,
    /// `pin = { file = "PATH" }` or `pin = { env = "NAME" }`. Never in this file or on the command
    /// line.
    pub pin: SecretSource,
    /// Worker threads. Default: the number that was measured to be best for the module.
    pub workers: Option<usize>,
}

impl TokenSection {
    /// The selector of the token in its module.
    pub fn selector(&self) -> TokenSelector {
        TokenSelector { label: self.label.clone(), serial: self.serial.clone() }
    }

    /// The settings of the token for kms-hsm.
    pub fn settings(&self, limits: &Limits, allow_cbc_expand: bool) -> TokenSettings {
        let pin = match &self.pin {
            SecretSource::File(path) => PinSource::File(path.clone()),
            SecretSource::Env(name) => PinSource::Environment(name.clone()),
        };
        let defaults = TokenSettings::new(self.module.clone(), self.label.clone(), pin);
        TokenSettings {
            selector: self.selector(),
            workers: self.workers,
            queue: limits.number(Bound::HsmJobs),
            queue_of_one: limits.number(Bound::HsmJobsPerPrincipal),
            allow_cbc_expand,
            ..defaults
        }
    }
}

/// `[hsm.classes]`: the name of a token for each class. A class that is left out is not served: a
/// server for grants names no token for `kek` and `ca`, so it cannot log in to these tokens.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassesSection {
    /// Master keys.
    pub kek: Option<String>,
    /// Encryption keys.
    pub session: Option<String>,
    /// Authentication keys, dedicated keys and secrets.
    pub authentication: Option<String>,
    /// The certification authority and the audit key.
    pub ca: Option<String>,
}

impl HsmSection {
    /// The token of a class; none if this server does not serve the class.
    pub fn token_of(&self, class: KeyClass) -> Option<&TokenSection> {
        let Some(classes) = &self.classes else {
            return self.tokens.first();
        };
        let name = match class {
            KeyClass::Kek => &classes.kek,
            KeyClass::Session => &classes.session,
            KeyClass::Authentication => &classes.authentication,
            KeyClass::Ca => &classes.ca,
        };
        let name = name.as_ref()?;
        self.tokens.iter().find(|token| token.name == *name)
    }

    /// Starts to use the tokens. Returns at once: a dead HSM does not delay the start. The first
    /// token in the file is the general one: it has the seal root.
    ///
    /// # Errors
    /// No token is configured, or the operating system cannot start a thread.
    pub fn start(&self, island: &IslandName, limits: &Limits, memory: Arc<dyn PinMemory>) -> Result<Hsm, HsmError> {
        let mut started = HashMap::new();
        let mut general = None;
        for section in &self.tokens {
            let token =
                Token::start(section.settings(limits, self.allow_cbc_expand), island.clone(), Arc::clone(&memory))?;
            general.get_or_insert_with(|| token.clone());
            started.insert(section.name.as_str(), token);
        }
        let general = general
            .ok_or_else(|| HsmError::InvalidInput { what: "hsm.token", reason: "no token is configured".to_owned() })?;
        let classes = [KeyClass::Kek, KeyClass::Session, KeyClass::Authentication, KeyClass::Ca];
        let tokens = classes
            .into_iter()
            .filter_map(|class| Some((class, started.get(self.token_of(class)?.name.as_str())?.clone())))
            .collect();
        Ok(Hsm::of_tokens(island.clone(), general, tokens))
    }

    /// Checks what TOML cannot express.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.tokens.is_empty() {
            return Err("[[hsm.token]]: at least one token is needed".to_owned());
        }
        for (at, token) in self.tokens.iter().enumerate() {
            if self.tokens.iter().take(at).any(|earlier| earlier.name == token.name) {
                return Err(format!("[[hsm.token]]: the name `{}` is used twice", token.name));
            }
            if token.workers == Some(0) {
                return Err(format!("[[hsm.token]] `{}`: workers is 0; leave it out for the best number", token.name));
            }
        }
        match &self.classes {
            None if self.tokens.len() > 1 => {
                Err("[hsm.classes]: it is missing; with several tokens, name the token of each class".to_owned())
            }
            None => Ok(()),
            Some(classes) => {
                let named = [
                    ("kek", &classes.kek),
                    ("session", &classes.session),
                    ("authentication", &classes.authentication),
                    ("ca", &classes.ca),
                ];
                match named.into_iter().find_map(|(class, name)| {
                    Some((class, name.as_ref().filter(|name| !self.tokens.iter().any(|token| token.name == **name))?))
                }) {
                    Some((class, name)) => {
                        Err(format!("[hsm.classes] {class}: there is no [[hsm.token]] with the name `{name}`"))
                    }
                    None => Ok(()),
                }
            }
        }
    }
}
