//! Attributes: a table of the object classes that have each attribute, and of the functions that
//! may set or change it (PKCS#11 section 4).

use cryptoki_sys::*;

/// A row of the table: one attribute.
#[derive(Debug)]
pub(crate) struct Rule {
    /// The attribute.
    pub(crate) kind: CK_ATTRIBUTE_TYPE,
    /// The shape of its value.
    pub(crate) shape: Shape,
    /// The classes that have it: a set of [`Classes`] bits.
    pub(crate) classes: u8,
    /// The functions that may set it when they make an object: a set of [`MAY_CREATE`],
    /// [`MAY_GENERATE`], [`MAY_UNWRAP`].
    pub(crate) at_birth: u8,
    /// The changes that are permitted afterwards.
    pub(crate) later: Later,
}

/// The shape of an attribute's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// A `CK_BBOOL`, kept as this bit of [`Flags`].
    Flag(Flags),
    /// A `CK_ULONG`.
    Number,
    /// Any bytes.
    Bytes,
    /// A `CK_DATE`, or nothing.
    Date,
    /// An array of `CK_MECHANISM_TYPE`.
    Mechanisms,
    /// An array of `CK_ATTRIBUTE`.
    Template,
}

/// The changes that C_SetAttributeValue and C_CopyObject may make to an attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Later {
    /// Nothing.
    Never,
    /// Only C_CopyObject may change it.
    Copy,
    /// Both may change it.
    Free,
    /// Both may set it to true, never back.
    OnlyTrue,
    /// Both may set it to false, never back.
    OnlyFalse,
}

/// The truth values of an object, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flags(pub(crate) u32);

impl Flags {
    pub(crate) const TOKEN: Self = Self(1);
    pub(crate) const PRIVATE: Self = Self(1 << 1);
    pub(crate) const MODIFIABLE: Self = Self(1 << 2);
    pub(crate) const COPYABLE: Self = Self(1 << 3);
    pub(crate) const DESTROYABLE: Self = Self(1 << 4);
    pub(crate) const SENSITIVE: Self = Self(1 << 5);
    pub(crate) const ALWAYS_SENSITIVE: Self = Self(1 << 6);
    pub(crate) const EXTRACTABLE: Self = Self(1 << 7);
    pub(crate) const NEVER_EXTRACTABLE: Self = Self(1 << 8);
    pub(crate) const LOCAL: Self = Self(1 << 9);
    pub(crate) const TRUSTED: Self = Self(1 << 10);
    pub(crate) const WRAP_WITH_TRUSTED: Self = Self(1 << 11);
    pub(crate) const ALWAYS_AUTHENTICATE: Self = Self(1 << 12);
    pub(crate) const ENCRYPT: Self = Self(1 << 13);
    pub(crate) const DECRYPT: Self = Self(1 << 14);
    pub(crate) const SIGN: Self = Self(1 << 15);
    pub(crate) const SIGN_RECOVER: Self = Self(1 << 16);
    pub(crate) const VERIFY: Self = Self(1 << 17);
    pub(crate) const VERIFY_RECOVER: Self = Self(1 << 18);
    pub(crate) const WRAP: Self = Self(1 << 19);
    pub(crate) const UNWRAP: Self = Self(1 << 20);
    pub(crate) const DERIVE: Self = Self(1 << 21);

    /// Whether all bits of `other` are set.
    pub(crate) const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both sets together.
    pub(crate) const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// This set, with the bits of `other` all set or all cleared.
    #[must_use]
    pub(crate) const fn set(self, other: Self, value: bool) -> Self {
        if value { self.with(other) } else { Self(self.0 & !other.0) }
    }
}

/// The object classes that this module has, one bit each.
pub(crate) struct Classes;

impl Classes {
    const DATA: u8 = 1;
    const CERTIFICATE: u8 = 2;
    const PUBLIC: u8 = 4;
    const PRIVATE: u8 = 8;
    const SECRET: u8 = 16;
    const ALL: u8 = 31;
    const KEYS: u8 = Self::PUBLIC | Self::PRIVATE | Self::SECRET;
    const HIDDEN: u8 = Self::PRIVATE | Self::SECRET;
    const OPEN_AND_SECRET: u8 = Self::PUBLIC | Self::SECRET;

    /// The bit of `class`; `None` for a class that this module does not have.
    pub(crate) fn bit(class: CK_OBJECT_CLASS) -> Option<u8> {
        match class {
            CKO_DATA => Some(Self::DATA),
            CKO_CERTIFICATE => Some(Self::CERTIFICATE),
            CKO_PUBLIC_KEY => Some(Self::PUBLIC),
            CKO_PRIVATE_KEY => Some(Self::PRIVATE),
            CKO_SECRET_KEY => Some(Self::SECRET),
            _ => None,
        }
    }
}

/// C_CreateObject may set the attribute.
pub(crate) const MAY_CREATE: u8 = 1;
/// C_GenerateKey and C_GenerateKeyPair may set it.
pub(crate) const MAY_GENERATE: u8 = 2;
/// C_UnwrapKey and C_DeriveKey may set it.
pub(crate) const MAY_UNWRAP: u8 = 4;

/// The rule for `kind`; `None` when no object of this module has such an attribute.
pub(crate) fn rule(kind: CK_ATTRIBUTE_TYPE) -> Option<&'static Rule> {
    let place = RULES.binary_search_by_key(&kind, |rule| rule.kind).ok()?;
    RULES.get(place)
}

const ANY: u8 = MAY_CREATE | MAY_GENERATE | MAY_UNWRAP;
const NONE: u8 = 0;

const fn row(kind: CK_ATTRIBUTE_TYPE, shape: Shape, classes: u8, at_birth: u8, later: Later) -> Rule {
    Rule { kind, shape, classes, at_birth, later }
}

const fn flag(kind: CK_ATTRIBUTE_TYPE, bit: Flags, classes: u8, at_birth: u8, later: Later) -> Rule {
    row(kind, Shape::Flag(bit), classes, at_birth, later)
}

/// Sorted by attribute type, for the binary search.
static RULES: [Rule; 61] = [
    row(CKA_CLASS, Shape::Number, Classes::ALL, ANY, Later::Never),
    flag(CKA_TOKEN, Flags::TOKEN, Classes::ALL, ANY, Later::Copy),
    flag(CKA_PRIVATE, Flags::PRIVATE, Classes::ALL, ANY, Later::Copy),
    row(CKA_LABEL, Shape::Bytes, Classes::ALL, ANY, Later::Free),
    row(CKA_UNIQUE_ID, Shape::Bytes, Classes::ALL, NONE, Later::Never),
    row(CKA_APPLICATION, Shape::Bytes, Classes::DATA, ANY, Later::Free),
    row(CKA_VALUE, Shape::Bytes, Classes::DATA | Classes::CERTIFICATE | Classes::HIDDEN, MAY_CREATE, Later::Never),
    row(CKA_OBJECT_ID, Shape::Bytes, Classes::DATA, ANY, Later::Free),
    row(CKA_CERTIFICATE_TYPE, Shape::Number, Classes::CERTIFICATE, ANY, Later::Never),
    row(CKA_ISSUER, Shape::Bytes, Classes::CERTIFICATE, ANY, Later::Free),
    row(CKA_SERIAL_NUMBER, Shape::Bytes, Classes::CERTIFICATE, ANY, Later::Free),
    flag(CKA_TRUSTED, Flags::TRUSTED, Classes::CERTIFICATE | Classes::OPEN_AND_SECRET, ANY, Later::Free),
    row(CKA_CERTIFICATE_CATEGORY, Shape::Number, Classes::CERTIFICATE, ANY, Later::Free),
    row(CKA_JAVA_MIDP_SECURITY_DOMAIN, Shape::Number, Classes::CERTIFICATE, ANY, Later::Never),
    row(CKA_URL, Shape::Bytes, Classes::CERTIFICATE, ANY, Later::Never),
    row(CKA_HASH_OF_SUBJECT_PUBLIC_KEY, Shape::Bytes, Classes::CERTIFICATE, ANY, Later::Never),
    row(CKA_HASH_OF_ISSUER_PUBLIC_KEY, Shape::Bytes, Classes::CERTIFICATE, ANY, Later::Never),
    row(CKA_NAME_HASH_ALGORITHM, Shape::Number, Classes::CERTIFICATE, ANY, Later::Never),
    row(CKA_CHECK_VALUE, Shape::Bytes, Classes::CERTIFICATE | Classes::SECRET, ANY, Later::Never),
    row(CKA_KEY_TYPE, Shape::Number, Classes::KEYS, ANY, Later::Never),
    row(CKA_SUBJECT, Shape::Bytes, Classes::CERTIFICATE | Classes::PUBLIC | Classes::PRIVATE, ANY, Later::Free),
    row(CKA_ID, Shape::Bytes, Classes::KEYS | Classes::CERTIFICATE, ANY, Later::Free),
    flag(CKA_SENSITIVE, Flags::SENSITIVE, Classes::HIDDEN, ANY, Later::OnlyTrue),
    flag(CKA_ENCRYPT, Flags::ENCRYPT, Classes::OPEN_AND_SECRET, ANY, Later::Free),
    flag(CKA_DECRYPT, Flags::DECRYPT, Classes::HIDDEN, ANY, Later::Free),
    flag(CKA_WRAP, Flags::WRAP, Classes::OPEN_AND_SECRET, ANY, Later::Free),
    flag(CKA_UNWRAP, Flags::UNWRAP, Classes::HIDDEN, ANY, Later::Free),
    flag(CKA_SIGN, Flags::SIGN, Classes::HIDDEN, ANY, Later::Free),
    flag(CKA_SIGN_RECOVER, Flags::SIGN_RECOVER, Classes::PRIVATE, ANY, Later::Free),
    flag(CKA_VERIFY, Flags::VERIFY, Classes::OPEN_AND_SECRET, ANY, Later::Free),
    flag(CKA_VERIFY_RECOVER, Flags::VERIFY_RECOVER, Classes::PUBLIC, ANY, Later::Free),
    flag(CKA_DERIVE, Flags::DERIVE, Classes::KEYS, ANY, Later::Free),
    row(CKA_START_DATE, Shape::Date, Classes::KEYS | Classes::CERTIFICATE, ANY, Later::Free),
    row(CKA_END_DATE, Shape::Date, Classes::KEYS | Classes::CERTIFICATE, ANY, Later::Free),
    row(CKA_MODULUS, Shape::Bytes, Classes::PUBLIC | Classes::PRIVATE, MAY_CREATE, Later::Never),
    row(CKA_MODULUS_BITS, Shape::Number, Classes::PUBLIC, MAY_GENERATE, Later::Never),
    row(CKA_PUBLIC_EXPONENT, Shape::Bytes, Classes::PUBLIC | Classes::PRIVATE, MAY_CREATE | MAY_GENERATE, Later::Never),
    row(CKA_PRIVATE_EXPONENT, Shape::Bytes, Classes::PRIVATE, MAY_CREATE, Later::Never),
    row(CKA_PRIME_1, Shape::Bytes, Classes::PRIVATE, MAY_CREATE, Later::Never),
    row(CKA_PRIME_2, Shape::Bytes, Classes::PRIVATE, MAY_CREATE, Later::Never),
    row(CKA_EXPONENT_1, Shape::Bytes, Classes::PRIVATE, MAY_CREATE, Later::Never),
    row(CKA_EXPONENT_2, Shape::Bytes, Classes::PRIVATE, MAY_CREATE, Later::Never),
    row(CKA_COEFFICIENT, Shape::Bytes, Classes::PRIVATE, MAY_CREATE, Later::Never),
    row(
        CKA_PUBLIC_KEY_INFO,
        Shape::Bytes,
        Classes::CERTIFICATE | Classes::PUBLIC | Classes::PRIVATE,
        ANY,
        Later::Never,
    ),
    // For unwrapping and derivation it states the expected length. The standard requires it for
    // derivation.
    row(CKA_VALUE_LEN, Shape::Number, Classes::SECRET, MAY_GENERATE | MAY_UNWRAP, Later::Never),
    flag(CKA_EXTRACTABLE, Flags::EXTRACTABLE, Classes::HIDDEN, ANY, Later::OnlyFalse),
    flag(CKA_LOCAL, Flags::LOCAL, Classes::KEYS, NONE, Later::Never),
    flag(CKA_NEVER_EXTRACTABLE, Flags::NEVER_EXTRACTABLE, Classes::HIDDEN, NONE, Later::Never),
    flag(CKA_ALWAYS_SENSITIVE, Flags::ALWAYS_SENSITIVE, Classes::HIDDEN, NONE, Later::Never),
    row(CKA_KEY_GEN_MECHANISM, Shape::Number, Classes::KEYS, NONE, Later::Never),
    flag(CKA_MODIFIABLE, Flags::MODIFIABLE, Classes::ALL, ANY, Later::Copy),
    flag(CKA_COPYABLE, Flags::COPYABLE, Classes::ALL, ANY, Later::OnlyFalse),
    flag(CKA_DESTROYABLE, Flags::DESTROYABLE, Classes::ALL, ANY, Later::Free),
    row(CKA_EC_PARAMS, Shape::Bytes, Classes::PUBLIC | Classes::PRIVATE, MAY_CREATE | MAY_GENERATE, Later::Never),
    row(CKA_EC_POINT, Shape::Bytes, Classes::PUBLIC | Classes::PRIVATE, MAY_CREATE, Later::Never),
    flag(CKA_ALWAYS_AUTHENTICATE, Flags::ALWAYS_AUTHENTICATE, Classes::PRIVATE, ANY, Later::Never),
    flag(CKA_WRAP_WITH_TRUSTED, Flags::WRAP_WITH_TRUSTED, Classes::HIDDEN, ANY, Later::OnlyTrue),
    row(CKA_WRAP_TEMPLATE, Shape::Template, Classes::OPEN_AND_SECRET, ANY, Later::Never),
    row(CKA_UNWRAP_TEMPLATE, Shape::Template, Classes::HIDDEN, ANY, Later::Never),
    row(CKA_DERIVE_TEMPLATE, Shape::Template, Classes::HIDDEN, ANY, Later::Never),
    row(CKA_ALLOWED_MECHANISMS, Shape::Mechanisms, Classes::KEYS, ANY, Later::Never),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_no_two_flags_share_a_bit() {
        assert!(RULES.is_sorted_by(|left, right| left.kind < right.kind));
        let bits = RULES.iter().filter_map(|rule| if let Shape::Flag(bit) = rule.shape { Some(bit.0) } else { None });
        assert_eq!(bits.clone().fold(0, |all, bit| all | bit).count_ones() as usize, bits.count());
    }
}
