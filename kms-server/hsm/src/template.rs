//! Templates of objects: few attributes for objects that live for one call, every usage stated for
//! those that live longer.

use cryptoki_sys::*;
use kms_domain::KeyShape;

use crate::raw::Attribute;

/// A template on the stack: no allocation per key. Its methods are inlined, since each call would
/// copy all of it.
pub(crate) struct Template<'a> {
    attributes: [Attribute<'a>; CAPACITY],
    length: usize,
}

impl<'a> Template<'a> {
    /// A secret key that is a session object.
    #[inline]
    pub(crate) fn session_secret(key_type: &'a CK_KEY_TYPE) -> Self {
        Self::empty().number(CKA_CLASS, &CKO_SECRET_KEY).number(CKA_KEY_TYPE, key_type).flag(CKA_TOKEN, false)
    }

    /// A secret key of this shape that is a session object.
    #[inline]
    pub(crate) fn session_key(shape: KeyShape) -> Self {
        Self::session_secret(match shape {
            KeyShape::Aes(_) => &CKK_AES,
            KeyShape::Secret => &CKK_GENERIC_SECRET,
        })
    }

    /// Nothing yet.
    #[inline]
    pub(crate) fn empty() -> Self {
        Self { attributes: [Attribute::flag(CKA_TOKEN, false); CAPACITY], length: 0 }
    }

    /// Adds a CK_BBOOL.
    #[inline]
    pub(crate) fn flag(self, kind: CK_ATTRIBUTE_TYPE, value: bool) -> Self {
        self.with(Attribute::flag(kind, value))
    }

    /// Adds a CK_ULONG.
    #[inline]
    pub(crate) fn number(self, kind: CK_ATTRIBUTE_TYPE, value: &'a CK_ULONG) -> Self {
        self.with(Attribute::number(kind, value))
    }

    /// Adds octets.
    #[inline]
    pub(crate) fn octets(self, kind: CK_ATTRIBUTE_TYPE, value: &'a [u8]) -> Self {
        self.with(Attribute::octets(kind, value))
    }

    /// Adds an attribute.
    #[inline]
    pub(crate) fn with(mut self, attribute: Attribute<'a>) -> Self {
        // The capacity is above the longest template of this crate; a template cut short would be
        // refused by the module.
        if let Some(place) = self.attributes.get_mut(self.length) {
            *place = attribute;
            self.length += 1;
        }
        debug_assert!(self.length < CAPACITY, "a template is longer than its capacity");
        self
    }

    /// Adds CKA_SENSITIVE=true and CKA_EXTRACTABLE.
    #[inline]
    pub(crate) fn sensitive(self, extractable: bool) -> Self {
        self.flag(CKA_SENSITIVE, true).flag(CKA_EXTRACTABLE, extractable)
    }

    /// States every usage of a secret key: true for those named, false for the others. For many
    /// usages, the default of modules is true.
    pub(crate) fn usage(self, allowed: &[CK_ATTRIBUTE_TYPE]) -> Self {
        SECRET_KEY_USAGES.iter().fold(self, |template, usage| template.flag(*usage, allowed.contains(usage)))
    }

    /// States every usage of a private key: true for those named, false for the others.
    pub(crate) fn private_usage(self, allowed: &[CK_ATTRIBUTE_TYPE]) -> Self {
        PRIVATE_KEY_USAGES.iter().fold(self, |template, usage| template.flag(*usage, allowed.contains(usage)))
    }

    /// The attributes.
    pub(crate) fn as_slice(&self) -> &[Attribute<'a>] {
        self.attributes.get(..self.length).unwrap_or_default()
    }
}

/// Whether a key may be used like this: what becomes of a meter key in the HSM for the length of
/// one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Handling {
    /// It is wrapped for a grantee or for storage.
    Wrap,
    /// It wraps keys for the meter (a KEK).
    WrapOthers,
    /// It encrypts a frame.
    Encrypt,
    /// It decrypts a frame.
    Decrypt,
    /// It is read as associated data (the GAK; I1).
    Read,
}

impl Handling {
    /// Adds the attributes of this handling.
    #[inline]
    pub(crate) fn apply(self, template: Template<'_>) -> Template<'_> {
        match self {
            Self::Wrap => template.sensitive(true),
            Self::WrapOthers => template.sensitive(false).flag(CKA_WRAP, true),
            Self::Encrypt => template.sensitive(false).flag(CKA_ENCRYPT, true),
            Self::Decrypt => template.sensitive(false).flag(CKA_DECRYPT, true),
            // I1: the one session object that is not sensitive, for one call. Only GAKs come here,
            // see `Worker::readable_gak`.
            Self::Read => template.flag(CKA_SENSITIVE, false).flag(CKA_EXTRACTABLE, true),
        }
    }
}

/// The usages of secret keys (PKCS#11 2.40, 4.10).
const SECRET_KEY_USAGES: [CK_ATTRIBUTE_TYPE; 7] =
    [CKA_ENCRYPT, CKA_DECRYPT, CKA_SIGN, CKA_VERIFY, CKA_WRAP, CKA_UNWRAP, CKA_DERIVE];

/// The usages of private keys (PKCS#11 2.40, 4.9).
const PRIVATE_KEY_USAGES: [CK_ATTRIBUTE_TYPE; 5] = [CKA_DECRYPT, CKA_SIGN, CKA_SIGN_RECOVER, CKA_UNWRAP, CKA_DERIVE];

const CAPACITY: usize = 24;
