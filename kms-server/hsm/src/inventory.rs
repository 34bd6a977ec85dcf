//! What a token holds, and which of its secrets can be read, or used beyond their purpose.

use cryptoki::mechanism::MechanismType;
use cryptoki_sys::*;
use kms_domain::IslandName;

use crate::capabilities::Capabilities;
use crate::error::HsmError;
use crate::label::{Purpose, TokenKey};
use crate::raw::{Object, Session};
use crate::template::Template;

/// One object of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InventoryObject {
    /// CKA_CLASS in words: `secret key`, `private key`, `public key`, `certificate`, `data`, or the
    /// number.
    pub class: String,
    /// CKA_KEY_TYPE in words: `AES`, `generic secret`, `EC`, `RSA`, or the number; empty for what
    /// is no key.
    pub key_type: String,
    /// CKA_LABEL.
    pub label: String,
    /// CKA_ID, hex.
    pub id: String,
    /// CKA_CHECK_VALUE, hex; empty where the module has none.
    pub check_value: String,
    /// The attributes that the object has, by PKCS#11 name without `CKA_`, for example `SENSITIVE`.
    pub flags: Vec<(&'static str, bool)>,
    /// CKA_ALLOWED_MECHANISMS by PKCS#11 name, or as a number in hex; empty where the object or the
    /// module has no such list.
    pub allowed_mechanisms: Vec<String>,
    /// Whether the secret value (CKA_VALUE, or CKA_PRIVATE_EXPONENT) could be read. It was not
    /// kept.
    pub value_readable: bool,
}

impl InventoryObject {
    /// An attribute, if the object has it.
    pub fn flag(&self, name: &str) -> Option<bool> {
        self.flags.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
    }

    /// Whether it is a secret or private key.
    pub fn is_secret(&self) -> bool {
        self.class == "secret key" || self.class == "private key"
    }

    /// What is wrong with a secret object: it is readable, extractable, usable beyond its purpose,
    /// or of no known purpose. Empty: nothing is wrong. Public objects have no findings.
    pub fn findings(&self, island: &IslandName, capabilities: &Capabilities) -> Vec<String> {
        if !self.is_secret() {
            return Vec::new();
        }
        let mut findings = Vec::new();
        let mut expect = |holds: bool, text: String| {
            if !holds {
                findings.push(text);
            }
        };
        expect(!self.value_readable, "its value can be read".to_owned());
        expect(self.flag("SENSITIVE") == Some(true), "CKA_SENSITIVE is not true".to_owned());
        if self.flag("TOKEN") == Some(false) {
            // Session objects live in agreements and batch keys only; granted keys are gone before
            // the next job runs.
            expect(
                self.flag("EXTRACTABLE") == Some(false),
                "a session object that outlives its call is extractable".to_owned(),
            );
            return findings;
        }
        expect(
            self.flag("EXTRACTABLE") == Some(false),
            "CKA_EXTRACTABLE is not false: the ceremony's lock is missing".to_owned(),
        );
        expect(self.flag("PRIVATE") != Some(false), "CKA_PRIVATE is false: it can be used without a login".to_owned());
        match TokenKey::of_label(&self.label, island).map(|key| key.purpose) {
            None => expect(false, "its label is none of this island's".to_owned()),
            Some(purpose) => {
                let allowed = usages(purpose);
                for name in USAGE_NAMES {
                    if self.flag(name) == Some(true) {
                        expect(allowed.contains(&name), format!("CKA_{name} is true, which `{purpose}` does not need"));
                    }
                }
                if capabilities.wrap_with_trusted && purpose.is_root() {
                    expect(
                        self.flag("WRAP_WITH_TRUSTED") == Some(true),
                        "CKA_WRAP_WITH_TRUSTED is not true".to_owned(),
                    );
                }
            }
        }
        findings
    }
}

/// Every object that the session sees.
pub(crate) fn inventory(session: &Session) -> Result<Vec<InventoryObject>, HsmError> {
    if !session.is_logged_in() {
        // Without a login the token leaves out private objects silently.
        return Err(HsmError::call("C_FindObjects", CKR_USER_NOT_LOGGED_IN));
    }
    let mut objects = Vec::new();
    for object in session.find(Template::empty().as_slice())? {
        match describe(session, object) {
            Ok(described) => objects.push(described),
            // Another session has destroyed its object meanwhile.
            Err(error) if error.code() == Some(cryptoki::error::RvError::ObjectHandleInvalid) => {}
            Err(error) => return Err(error),
        }
    }
    objects.sort_by(|a, b| (&a.label, &a.class).cmp(&(&b.label, &b.class)));
    Ok(objects)
}

fn describe(session: &Session, object: Object) -> Result<InventoryObject, HsmError> {
    let octets =
        |kind| Ok::<_, HsmError>(session.attribute(object, kind)?.map(|value| value.to_vec()).unwrap_or_default());
    let number = |kind| Ok::<_, HsmError>(octets(kind)?.try_into().ok().map(CK_ULONG::from_ne_bytes));
    let class = number(CKA_CLASS)?;
    let key_type = number(CKA_KEY_TYPE)?;
    let mut flags = Vec::new();
    for (name, kind) in FLAGS {
        if let Some(value) = session.flag(object, kind)? {
            flags.push((name, value));
        }
    }
    let secret_value = match class {
        Some(CKO_SECRET_KEY) => session.attribute(object, CKA_VALUE)?,
        Some(CKO_PRIVATE_KEY) if key_type == Some(CKK_RSA) => session.attribute(object, CKA_PRIVATE_EXPONENT)?,
        Some(CKO_PRIVATE_KEY) => session.attribute(object, CKA_VALUE)?,
        _ => None,
    };
    Ok(InventoryObject {
        class: named(
            class,
            &[
                (CKO_SECRET_KEY, "secret key"),
                (CKO_PRIVATE_KEY, "private key"),
                (CKO_PUBLIC_KEY, "public key"),
                (CKO_CERTIFICATE, "certificate"),
                (CKO_DATA, "data"),
            ],
        ),
        key_type: named(
            key_type,
            &[(CKK_AES, "AES"), (CKK_GENERIC_SECRET, "generic secret"), (CKK_EC, "EC"), (CKK_RSA, "RSA")],
        ),
        label: String::from_utf8_lossy(&octets(CKA_LABEL)?).into_owned(),
        id: hex::encode(octets(CKA_ID)?),
        check_value: hex::encode(octets(CKA_CHECK_VALUE)?),
        flags,
        allowed_mechanisms: octets(CKA_ALLOWED_MECHANISMS)?
            .chunks_exact(size_of::<CK_MECHANISM_TYPE>())
            .map(mechanism_name)
            .collect(),
        value_readable: secret_value.is_some_and(|value| !value.is_empty()),
    })
}

fn named(value: Option<CK_ULONG>, names: &[(CK_ULONG, &str)]) -> String {
    match value {
        None => String::new(),
        Some(value) => names
            .iter()
            .find(|(known, _)| *known == value)
            .map_or_else(|| format!("{value:#x}"), |(_, name)| (*name).to_owned()),
    }
}

/// A CK_MECHANISM_TYPE as the module writes it: the machine's byte order.
fn mechanism_name(octets: &[u8]) -> String {
    let number = octets.try_into().map(CK_MECHANISM_TYPE::from_ne_bytes).unwrap_or_default();
    MechanismType::try_from(number).map_or_else(|_| format!("{number:#x}"), |known| known.to_string())
}

/// The usages that a purpose needs.
fn usages(purpose: Purpose) -> &'static [&'static str] {
    match purpose {
        Purpose::Diversification(_) => &["DERIVE"],
        Purpose::StorageKek(_) => &["WRAP", "UNWRAP"],
        Purpose::FingerprintKek => &["WRAP"],
        Purpose::Seal | Purpose::AuditSign | Purpose::Ca => &["SIGN"],
        Purpose::VendorTransport | Purpose::StandbyTransport => &["UNWRAP"],
        Purpose::Escrow | Purpose::StandbyRecipient(_) => &["WRAP"],
    }
}

const USAGE_NAMES: [&str; 8] = ["ENCRYPT", "DECRYPT", "SIGN", "VERIFY", "WRAP", "UNWRAP", "DERIVE", "SIGN_RECOVER"];

const FLAGS: [(&str, CK_ATTRIBUTE_TYPE); 17] = [
    ("TOKEN", CKA_TOKEN),
    ("PRIVATE", CKA_PRIVATE),
    ("MODIFIABLE", CKA_MODIFIABLE),
    ("SENSITIVE", CKA_SENSITIVE),
    ("ALWAYS_SENSITIVE", CKA_ALWAYS_SENSITIVE),
    ("EXTRACTABLE", CKA_EXTRACTABLE),
    ("NEVER_EXTRACTABLE", CKA_NEVER_EXTRACTABLE),
    ("WRAP_WITH_TRUSTED", CKA_WRAP_WITH_TRUSTED),
    ("TRUSTED", CKA_TRUSTED),
    ("ENCRYPT", CKA_ENCRYPT),
    ("DECRYPT", CKA_DECRYPT),
    ("SIGN", CKA_SIGN),
    ("SIGN_RECOVER", CKA_SIGN_RECOVER),
    ("VERIFY", CKA_VERIFY),
    ("WRAP", CKA_WRAP),
    ("UNWRAP", CKA_UNWRAP),
    ("DERIVE", CKA_DERIVE),
];
