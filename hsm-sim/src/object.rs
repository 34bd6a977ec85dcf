//! Objects: their attributes, their key material, and the bytes in which token objects are stored.

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use cryptoki_sys::*;

use crate::attribute::{self, Classes, Flags, Shape};
use crate::buffer::Buffer;
use crate::crypto::digest::Hash;
use crate::crypto::ec::{Curve, EcPrivate, EcPublic};
use crate::crypto::gcm::Schedule;
use crate::crypto::rsa::{RsaPrivate, RsaPublic};
use crate::error::{Result, Rv, fail};
use crate::template::{Item, Nested, Value};

/// Names a token object on disk.
pub(crate) type ObjectId = [u8; 16];

/// An object. It never changes: C_SetAttributeValue replaces it by a new one, and operations under
/// way keep the old one.
#[derive(Clone)]
pub(crate) struct Object {
    /// The handle by which callers name it.
    pub(crate) handle: CK_OBJECT_HANDLE,
    /// Its class.
    pub(crate) class: CK_OBJECT_CLASS,
    /// Its key type; [`NO_KEY_TYPE`] when it is no key.
    pub(crate) key_type: CK_KEY_TYPE,
    /// Its truth values.
    pub(crate) flags: Flags,
    /// How it was generated; `CK_UNAVAILABLE_INFORMATION` when it was not.
    pub(crate) generated_by: CK_MECHANISM_TYPE,
    /// The other attributes that were given and are no secret.
    pub(crate) values: Vec<(CK_ATTRIBUTE_TYPE, Box<[u8]>)>,
    /// `CKA_WRAP_TEMPLATE` and the like.
    pub(crate) templates: Vec<(CK_ATTRIBUTE_TYPE, Nested)>,
    /// The key itself.
    pub(crate) material: Arc<Material>,
    /// The session with which it ends; 0 for a token object.
    pub(crate) session: CK_SESSION_HANDLE,
    /// Its name on disk, if it is a token object.
    pub(crate) id: Option<ObjectId>,
}

/// The `key_type` of objects that are no keys.
pub(crate) const NO_KEY_TYPE: CK_KEY_TYPE = CK_KEY_TYPE::MAX;

/// The key of an object.
pub(crate) enum Material {
    /// The object is no key.
    None,
    /// A secret key.
    Secret(Secret),
    /// An elliptic curve private key.
    EcPrivate(Box<EcPrivate>),
    /// An elliptic curve public key.
    EcPublic(Box<EcPublic>),
    /// An RSA private key.
    RsaPrivate(Box<RsaPrivate>),
    /// An RSA public key.
    RsaPublic(Box<RsaPublic>),
}

/// A secret key, with the AES key schedule that is made at its first use.
pub(crate) struct Secret {
    bytes: Buffer,
    schedule: OnceLock<Box<Schedule>>,
}

impl Secret {
    pub(crate) fn new(bytes: Buffer) -> Self {
        Self { bytes, schedule: OnceLock::new() }
    }

    /// The value.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The key schedule; the caller has checked that this is an AES key.
    pub(crate) fn schedule(&self) -> Result<&Schedule> {
        if let Some(schedule) = self.schedule.get() {
            return Ok(schedule);
        }
        let schedule = Schedule::new(&self.bytes)?;
        Ok(self.schedule.get_or_init(|| Box::new(schedule)))
    }
}

/// The result of reading an attribute.
pub(crate) enum Read<'a> {
    /// The value.
    Bytes(Cow<'a, [u8]>),
    /// The value of an array of attributes.
    Template(&'a Nested),
    /// The value must not be revealed.
    Sensitive,
    /// The object has no such attribute.
    Unknown,
}

impl Object {
    /// The value of an attribute.
    pub(crate) fn read(&self, kind: CK_ATTRIBUTE_TYPE) -> Read<'_> {
        let Some(rule) = attribute::rule(kind) else { return Read::Unknown };
        if rule.classes & Classes::bit(self.class).unwrap_or(0) == 0 {
            return Read::Unknown;
        }
        if let Shape::Flag(bit) = rule.shape {
            return Read::Bytes(Cow::Borrowed(if self.flags.has(bit) { &[CK_TRUE] } else { &[CK_FALSE] }));
        }
        if rule.shape == Shape::Template {
            return Read::Template(self.template(kind).unwrap_or(const { &Vec::new() }));
        }
        match kind {
            CKA_CLASS => self.number(self.class),
            CKA_KEY_TYPE => self.number(self.key_type),
            CKA_KEY_GEN_MECHANISM => self.number(self.generated_by),
            CKA_UNIQUE_ID => Read::Bytes(Cow::Owned(self.unique_id().into_bytes())),
            _ => match self.read_material(kind) {
                Some(read) => read,
                None => self.read_stored(kind, rule.shape),
            },
        }
    }

    /// The nested template, if it was given.
    pub(crate) fn template(&self, kind: CK_ATTRIBUTE_TYPE) -> Option<&Nested> {
        self.templates.iter().find(|(given, _)| *given == kind).map(|(_, nested)| nested)
    }

    /// The stored value of an attribute, if it was given.
    pub(crate) fn stored(&self, kind: CK_ATTRIBUTE_TYPE) -> Option<&[u8]> {
        self.values.iter().find(|(given, _)| *given == kind).map(|(_, value)| &**value)
    }

    /// Whether the object has all attributes of `template` with these values. Hidden values match
    /// nothing.
    pub(crate) fn matches(&self, template: &[Item<'_>]) -> bool {
        template.iter().all(|item| match (self.read(item.kind), &item.value) {
            (Read::Bytes(value), Value::Bytes(wanted)) => *value == **wanted,
            (Read::Template(value), Value::Template(wanted)) => value == wanted,
            (Read::Template(value), Value::Bytes(wanted)) => value.is_empty() && wanted.is_empty(),
            _ => false,
        })
    }

    /// Whether the object has all attributes of a nested template.
    pub(crate) fn matches_nested(&self, template: &Nested) -> bool {
        template.iter().all(|(kind, wanted)| matches!(self.read(*kind), Read::Bytes(value) if *value == **wanted))
    }

    /// `CKR_MECHANISM_INVALID` unless `CKA_ALLOWED_MECHANISMS` is empty or names the mechanism.
    pub(crate) fn allows(&self, mechanism: CK_MECHANISM_TYPE) -> Result<()> {
        let (allowed, _) = self.stored(CKA_ALLOWED_MECHANISMS).unwrap_or_default().as_chunks();
        if allowed.is_empty() || allowed.iter().any(|bytes| CK_MECHANISM_TYPE::from_ne_bytes(*bytes) == mechanism) {
            Ok(())
        } else {
            fail(CKR_MECHANISM_INVALID)
        }
    }

    /// The secret key, or `wrong`.
    pub(crate) fn secret(&self, wrong: CK_RV) -> Result<&Secret> {
        match &*self.material {
            Material::Secret(secret) => Ok(secret),
            _ => fail(wrong),
        }
    }

    /// The AES key, or `wrong`.
    pub(crate) fn aes(&self, wrong: CK_RV) -> Result<&Schedule> {
        if self.key_type == CKK_AES { self.secret(wrong)?.schedule() } else { fail(wrong) }
    }

    /// Replaces or adds a stored value.
    pub(crate) fn store(&mut self, kind: CK_ATTRIBUTE_TYPE, value: &[u8]) {
        match self.values.iter_mut().find(|(given, _)| *given == kind) {
            Some((_, place)) => *place = value.into(),
            None => self.values.push((kind, value.into())),
        }
    }

    /// A rough size in bytes, for C_GetObjectSize.
    pub(crate) fn size(&self) -> usize {
        let values: usize = self.values.iter().map(|(_, value)| value.len() + 8).sum();
        let material = self.material.encode().map_or(0, |(_, bytes)| bytes.len());
        size_of::<Self>() + values + material
    }

    fn number(&self, value: CK_ULONG) -> Read<'_> {
        Read::Bytes(Cow::Owned(value.to_ne_bytes().to_vec()))
    }

    fn unique_id(&self) -> String {
        match self.id {
            Some(id) => id.iter().map(|byte| format!("{byte:02x}")).collect(),
            None => format!("session-{:x}", self.handle),
        }
    }

    /// Attributes that come from the key; `None` when the attribute is no such thing.
    fn read_material(&self, kind: CK_ATTRIBUTE_TYPE) -> Option<Read<'_>> {
        let hidden = self.flags.has(Flags::SENSITIVE) || !self.flags.has(Flags::EXTRACTABLE);
        let reveal = |bytes| if hidden { Read::Sensitive } else { Read::Bytes(Cow::Borrowed(bytes)) };
        match (&*self.material, kind) {
            (Material::Secret(secret), CKA_VALUE) => Some(reveal(secret.bytes())),
            (Material::Secret(secret), CKA_VALUE_LEN) => Some(self.number(ulong(secret.bytes().len()))),
            (Material::Secret(secret), CKA_CHECK_VALUE) if self.stored(CKA_CHECK_VALUE).is_none() => {
                Some(Read::Bytes(Cow::Owned(check_value(self.key_type, secret))))
            }
            (Material::EcPrivate(key), CKA_VALUE) => Some(reveal(key.scalar())),
            (Material::EcPrivate(key), CKA_EC_PARAMS) => Some(Read::Bytes(Cow::Borrowed(key.curve.parameters()))),
            (Material::EcPublic(key), CKA_EC_POINT) => {
                Some(Read::Bytes(Cow::Owned(crate::crypto::ec::encoded_point(key.point()))))
            }
            (Material::RsaPrivate(key), _) => {
                if let Some(bytes) = key.public_component(kind) {
                    return Some(Read::Bytes(Cow::Borrowed(bytes)));
                }
                key.private_component(kind).map(reveal)
            }
            (Material::RsaPublic(key), CKA_MODULUS) => Some(Read::Bytes(Cow::Borrowed(key.modulus()))),
            (Material::RsaPublic(key), CKA_PUBLIC_EXPONENT) => Some(Read::Bytes(Cow::Borrowed(key.exponent()))),
            (Material::RsaPublic(key), CKA_MODULUS_BITS) => Some(self.number(ulong(key.bits()))),
            _ => None,
        }
    }

    fn read_stored(&self, kind: CK_ATTRIBUTE_TYPE, shape: Shape) -> Read<'_> {
        if let Some(value) = self.stored(kind) {
            return Read::Bytes(Cow::Borrowed(value));
        }
        match (kind, shape) {
            // Components that this kind of key does not have.
            (
                CKA_MODULUS | CKA_MODULUS_BITS | CKA_PUBLIC_EXPONENT | CKA_PRIVATE_EXPONENT | CKA_PRIME_1 | CKA_PRIME_2
                | CKA_EXPONENT_1 | CKA_EXPONENT_2 | CKA_COEFFICIENT | CKA_EC_PARAMS | CKA_EC_POINT,
                _,
            ) => Read::Unknown,
            (CKA_VALUE, _) if self.class == CKO_PRIVATE_KEY => Read::Unknown,
            (CKA_NAME_HASH_ALGORITHM, _) => self.number(CKM_SHA_1),
            (_, Shape::Number) => self.number(0),
            _ => Read::Bytes(Cow::Borrowed(&[])),
        }
    }
}

/// The first three bytes of an encrypted zero block for AES, of the SHA-1 of the value for other
/// keys (PKCS#11 2.40, 4.8).
pub(crate) fn check_value(key_type: CK_KEY_TYPE, secret: &Secret) -> Vec<u8> {
    let mut value = match (key_type, secret.schedule()) {
        (CKK_AES, Ok(schedule)) => {
            let mut block = [0; 16];
            schedule.cipher.encrypt_block(&mut block);
            block.to_vec()
        }
        _ => Hash::Sha1.digest(&[secret.bytes()]).as_ref().to_vec(),
    };
    value.truncate(3);
    value
}

/// A length as the standard writes it.
pub(crate) fn ulong(value: usize) -> CK_ULONG {
    CK_ULONG::try_from(value).unwrap_or(CK_UNAVAILABLE_INFORMATION)
}

/// The stored form: little-endian numbers, byte strings with a length of four bytes before them.
impl Object {
    /// The bytes of a token object, without its handle.
    pub(crate) fn encode(&self) -> Result<Buffer> {
        let mut out = Buffer::default();
        out.extend(&[FORMAT]);
        out.extend(&self.class.to_le_bytes());
        out.extend(&self.key_type.to_le_bytes());
        out.extend(&self.generated_by.to_le_bytes());
        out.extend(&self.flags.0.to_le_bytes());
        put_pairs(&mut out, &self.values)?;
        out.extend(&count(self.templates.len())?);
        for (kind, nested) in &self.templates {
            out.extend(&kind.to_le_bytes());
            put_pairs(&mut out, nested)?;
        }
        let (tag, bytes) = self.material.encode()?;
        out.extend(&[tag]);
        put_bytes(&mut out, &bytes)?;
        Ok(out)
    }

    /// The object in `bytes`, or `CKR_DEVICE_ERROR`: the file is no object of this version.
    pub(crate) fn decode(bytes: &[u8], handle: CK_OBJECT_HANDLE, id: ObjectId) -> Result<Self> {
        let mut reader = Reader(bytes);
        if reader.take::<1>()? != [FORMAT] {
            return fail(CKR_DEVICE_ERROR);
        }
        let class = reader.number()?;
        let key_type = reader.number()?;
        let generated_by = reader.number()?;
        let flags = Flags(u32::from_le_bytes(reader.take()?));
        let values = reader.pairs()?;
        let mut templates = Vec::new();
        for _ in 0..reader.count()? {
            templates.push((reader.number()?, reader.pairs()?));
        }
        let [tag] = reader.take()?;
        let material = Material::decode(tag, reader.bytes()?, &values)?;
        Ok(Self {
            handle,
            class,
            key_type,
            flags,
            generated_by,
            values,
            templates,
            material: Arc::new(material),
            session: 0,
            id: Some(id),
        })
    }
}

impl Material {
    fn encode(&self) -> Result<(u8, Buffer)> {
        Ok(match self {
            Self::None => (0, Buffer::default()),
            Self::Secret(secret) => (1, secret.bytes.clone()),
            Self::EcPrivate(key) => (2, Buffer::copy_of(key.scalar())),
            Self::EcPublic(key) => (3, Buffer::copy_of(key.point())),
            Self::RsaPrivate(key) => (4, key.to_der()?),
            Self::RsaPublic(key) => (5, key.to_der()?),
        })
    }

    fn decode(tag: u8, bytes: &[u8], values: &[(CK_ATTRIBUTE_TYPE, Box<[u8]>)]) -> Result<Self> {
        let curve = || {
            let parameters = values.iter().find(|(kind, _)| *kind == CKA_EC_PARAMS).map(|(_, value)| &**value);
            Curve::from_parameters(parameters.unwrap_or_default())
        };
        match tag {
            0 => Ok(Self::None),
            1 => Ok(Self::Secret(Secret::new(Buffer::copy_of(bytes)))),
            2 => Ok(Self::EcPrivate(Box::new(EcPrivate::from_scalar(curve()?, bytes)?))),
            3 => Ok(Self::EcPublic(Box::new(EcPublic::new(curve()?, bytes)?))),
            4 => Ok(Self::RsaPrivate(Box::new(RsaPrivate::from_der(bytes)?))),
            5 => Ok(Self::RsaPublic(Box::new(RsaPublic::from_der(bytes)?))),
            _ => fail(CKR_DEVICE_ERROR),
        }
    }
}

fn count(value: usize) -> Result<[u8; 4]> {
    u32::try_from(value).map(u32::to_le_bytes).map_err(|_| Rv(CKR_DEVICE_MEMORY))
}

fn put_bytes(out: &mut Buffer, bytes: &[u8]) -> Result<()> {
    out.extend(&count(bytes.len())?);
    out.extend(bytes);
    Ok(())
}

fn put_pairs(out: &mut Buffer, pairs: &[(CK_ATTRIBUTE_TYPE, Box<[u8]>)]) -> Result<()> {
    out.extend(&count(pairs.len())?);
    for (kind, value) in pairs {
        out.extend(&kind.to_le_bytes());
        put_bytes(out, value)?;
    }
    Ok(())
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk().ok_or(Rv(CKR_DEVICE_ERROR))?;
        self.0 = rest;
        Ok(*head)
    }

    fn number(&mut self) -> Result<CK_ULONG> {
        Ok(CK_ULONG::from_le_bytes(self.take()?))
    }

    fn count(&mut self) -> Result<usize> {
        usize::try_from(u32::from_le_bytes(self.take()?)).map_err(|_| Rv(CKR_DEVICE_ERROR))
    }

    fn bytes(&mut self) -> Result<&'a [u8]> {
        let length = self.count()?;
        let (head, rest) = self.0.split_at_checked(length).ok_or(Rv(CKR_DEVICE_ERROR))?;
        self.0 = rest;
        Ok(head)
    }

    fn pairs(&mut self) -> Result<Nested> {
        let mut pairs = Vec::new();
        for _ in 0..self.count()? {
            pairs.push((self.number()?, self.bytes()?.into()));
        }
        Ok(pairs)
    }
}

const FORMAT: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_survive_their_stored_form_and_damage_is_noticed() {
        let object = Object {
            handle: 7,
            class: CKO_SECRET_KEY,
            key_type: CKK_AES,
            flags: Flags::TOKEN.with(Flags::EXTRACTABLE),
            generated_by: CKM_AES_KEY_GEN,
            values: vec![(CKA_LABEL, (*b"label").into())],
            templates: vec![(CKA_UNWRAP_TEMPLATE, vec![(CKA_SENSITIVE, [1].into())])],
            material: Arc::new(Material::Secret(Secret::new(Buffer::copy_of(&[3; 16])))),
            session: 0,
            id: None,
        };
        let bytes = object.encode().unwrap();
        let again = Object::decode(&bytes, 8, [5; 16]).unwrap();
        assert_eq!(
            (again.handle, again.id, again.flags, again.generated_by),
            (8, Some([5; 16]), object.flags, CKM_AES_KEY_GEN)
        );
        assert_eq!((again.values, again.templates), (object.values, object.templates));
        assert!(matches!(&*again.material, Material::Secret(secret) if secret.bytes() == [3; 16]));
        for length in 0..bytes.len() {
            assert!(Object::decode(&bytes[..length], 8, [5; 16]).is_err(), "{length} of {} bytes", bytes.len());
        }
    }

    /// FIPS 197 key of zeros: the first bytes of the encrypted zero block.
    #[test]
    fn check_values_are_those_of_the_standard() {
        let secret = Secret::new(Buffer::zeros(16));
        assert_eq!(check_value(CKK_AES, &secret), [0x66, 0xE9, 0x4B]);
        assert_eq!(check_value(CKK_GENERIC_SECRET, &secret), Hash::Sha1.digest(&[&[0; 16]]).as_ref()[..3]);
    }
}
