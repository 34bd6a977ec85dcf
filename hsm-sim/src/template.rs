//! Templates: the attributes that a caller gives, read once and checked.

use cryptoki_sys::*;
use smallvec::SmallVec;

use crate::attribute::{self, Classes, Flags, Later, MAY_CREATE, Rule, Shape};
use crate::error::{Result, Rv, fail};

/// The attributes of a call, in the caller's order.
pub(crate) type Template<'a> = SmallVec<[Item<'a>; 12]>;

/// One attribute of a template.
#[derive(Clone)]
pub(crate) struct Item<'a> {
    /// Which one.
    pub(crate) kind: CK_ATTRIBUTE_TYPE,
    /// Its value.
    pub(crate) value: Value<'a>,
}

/// The value of an attribute in a template.
#[derive(Clone)]
pub(crate) enum Value<'a> {
    /// Plain bytes.
    Bytes(&'a [u8]),
    /// An array of attributes.
    Template(Nested),
}

/// An array of attributes with plain values: what `CKA_WRAP_TEMPLATE` and the like hold.
pub(crate) type Nested = Vec<(CK_ATTRIBUTE_TYPE, Box<[u8]>)>;

impl<'a> Item<'a> {
    /// An attribute with a plain value.
    pub(crate) fn bytes(kind: CK_ATTRIBUTE_TYPE, value: &'a [u8]) -> Self {
        Self { kind, value: Value::Bytes(value) }
    }

    /// The value, if it is plain.
    pub(crate) fn plain(&self) -> Result<&'a [u8]> {
        match self.value {
            Value::Bytes(bytes) => Ok(bytes),
            Value::Template(_) => fail(CKR_ATTRIBUTE_VALUE_INVALID),
        }
    }
}

/// A template for a new object, checked against the table: every attribute is known, fits the
/// class, may be set by this call, has a value of its shape, and comes once (or again with the same
/// value).
pub(crate) struct Draft<'a> {
    /// The class of the object.
    pub(crate) class: CK_OBJECT_CLASS,
    /// The values of the flags that are given.
    pub(crate) flags: Flags,
    /// Which flags are given.
    pub(crate) given: Flags,
    /// The other plain values.
    pub(crate) values: SmallVec<[(CK_ATTRIBUTE_TYPE, &'a [u8]); 8]>,
    /// The nested templates.
    pub(crate) templates: Vec<(CK_ATTRIBUTE_TYPE, Nested)>,
}

impl<'a> Draft<'a> {
    /// Checks `template`. `implied` is the class when the call itself fixes it; `origin` is one of
    /// the `MAY_` bits.
    pub(crate) fn new(template: &[Item<'a>], implied: Option<CK_OBJECT_CLASS>, origin: u8) -> Result<Self> {
        let class = match template.iter().find(|item| item.kind == CKA_CLASS) {
            Some(item) => number(item.plain()?)?,
            None => implied.ok_or(Rv(CKR_TEMPLATE_INCOMPLETE))?,
        };
        if implied.is_some_and(|implied| implied != class) {
            return fail(CKR_TEMPLATE_INCONSISTENT);
        }
        let bit = Classes::bit(class).ok_or(Rv(CKR_ATTRIBUTE_VALUE_INVALID))?;
        let mut draft = Self {
            class,
            flags: Flags::default(),
            given: Flags::default(),
            values: SmallVec::new(),
            templates: Vec::new(),
        };
        for item in template {
            // Only the token makes unique identifiers: a caller cannot give this attribute.
            let rule = attribute::rule(item.kind)
                .filter(|rule| rule.kind != CKA_UNIQUE_ID)
                .ok_or(Rv(CKR_ATTRIBUTE_TYPE_INVALID))?;
            if rule.classes & bit == 0 {
                return fail(if origin == MAY_CREATE { CKR_ATTRIBUTE_TYPE_INVALID } else { CKR_TEMPLATE_INCONSISTENT });
            }
            if rule.at_birth & origin == 0 {
                return fail(if rule.at_birth == 0 { CKR_ATTRIBUTE_READ_ONLY } else { CKR_TEMPLATE_INCONSISTENT });
            }
            draft.add(rule, item)?;
        }
        Ok(draft)
    }

    fn add(&mut self, rule: &Rule, item: &Item<'a>) -> Result<()> {
        match (rule.shape, &item.value) {
            (Shape::Flag(bit), _) => {
                let value = truth(item.plain()?)?;
                if self.given.has(bit) && self.flags.has(bit) != value {
                    return fail(CKR_TEMPLATE_INCONSISTENT);
                }
                self.flags = self.flags.set(bit, value);
                self.given = self.given.with(bit);
            }
            (Shape::Template, Value::Template(nested)) => {
                match self.templates.iter().find(|(kind, _)| *kind == item.kind) {
                    Some((_, given)) if given == nested => {}
                    Some(_) => return fail(CKR_TEMPLATE_INCONSISTENT),
                    None => self.templates.push((item.kind, nested.clone())),
                }
            }
            (Shape::Template, Value::Bytes([])) => self.templates.push((item.kind, Vec::new())),
            (Shape::Template, Value::Bytes(_)) | (_, Value::Template(_)) => return fail(CKR_ATTRIBUTE_VALUE_INVALID),
            (shape, Value::Bytes(bytes)) => {
                check_shape(shape, bytes)?;
                match self.bytes(item.kind) {
                    Some(given) if given == *bytes => {}
                    Some(_) => return fail(CKR_TEMPLATE_INCONSISTENT),
                    None => self.values.push((item.kind, bytes)),
                }
            }
        }
        Ok(())
    }

    /// The plain value of `kind`, if it is given.
    pub(crate) fn bytes(&self, kind: CK_ATTRIBUTE_TYPE) -> Option<&'a [u8]> {
        self.values.iter().find(|(given, _)| *given == kind).map(|(_, value)| *value)
    }

    /// The plain value of `kind`, which must be there.
    pub(crate) fn required(&self, kind: CK_ATTRIBUTE_TYPE) -> Result<&'a [u8]> {
        self.bytes(kind).ok_or(Rv(CKR_TEMPLATE_INCOMPLETE))
    }

    /// The number `kind`, if it is given.
    pub(crate) fn number(&self, kind: CK_ATTRIBUTE_TYPE) -> Result<Option<CK_ULONG>> {
        self.bytes(kind).map(number).transpose()
    }

    /// The flag, or `default` when the template does not give it.
    pub(crate) fn flag(&self, bit: Flags, default: bool) -> bool {
        if self.given.has(bit) { self.flags.has(bit) } else { default }
    }
}

/// One change that C_SetAttributeValue or C_CopyObject asks for, checked against the table.
pub(crate) fn check_change(
    item: &Item<'_>,
    class: CK_OBJECT_CLASS,
    flags: Flags,
    copying: bool,
) -> Result<&'static Rule> {
    let rule = attribute::rule(item.kind).ok_or(Rv(CKR_ATTRIBUTE_TYPE_INVALID))?;
    if rule.classes & Classes::bit(class).unwrap_or(0) == 0 {
        return fail(CKR_ATTRIBUTE_TYPE_INVALID);
    }
    match (rule.shape, &item.value) {
        (Shape::Flag(_), Value::Bytes(bytes)) => truth(bytes).map(|_| ())?,
        (Shape::Template, Value::Template(_)) => {}
        (Shape::Template, _) | (_, Value::Template(_)) => return fail(CKR_ATTRIBUTE_VALUE_INVALID),
        (shape, Value::Bytes(bytes)) => check_shape(shape, bytes)?,
    }
    let later = if class == CKO_DATA && item.kind == CKA_VALUE { Later::Free } else { rule.later };
    let allowed = match (later, rule.shape) {
        (Later::Never, _) => false,
        (Later::Copy, _) => copying,
        (Later::Free, _) => true,
        // A template may repeat the present value.
        (Later::OnlyTrue, Shape::Flag(bit)) => truth(item.plain()?)? || !flags.has(bit),
        (Later::OnlyFalse, Shape::Flag(bit)) => !truth(item.plain()?)? || flags.has(bit),
        (Later::OnlyTrue | Later::OnlyFalse, _) => false,
    };
    if allowed { Ok(rule) } else { fail(CKR_ATTRIBUTE_READ_ONLY) }
}

/// The number in the bytes of a `CK_ULONG`.
pub(crate) fn number(bytes: &[u8]) -> Result<CK_ULONG> {
    bytes.try_into().map(CK_ULONG::from_ne_bytes).map_err(|_| Rv(CKR_ATTRIBUTE_VALUE_INVALID))
}

/// The truth value in the byte of a `CK_BBOOL`.
pub(crate) fn truth(bytes: &[u8]) -> Result<bool> {
    match bytes {
        [0] => Ok(false),
        [_] => Ok(true),
        _ => fail(CKR_ATTRIBUTE_VALUE_INVALID),
    }
}

fn check_shape(shape: Shape, bytes: &[u8]) -> Result<()> {
    let fits = match shape {
        Shape::Flag(_) => bytes.len() == 1,
        Shape::Number => bytes.len() == size_of::<CK_ULONG>(),
        Shape::Date => bytes.is_empty() || (bytes.len() == 8 && bytes.iter().all(u8::is_ascii_digit)),
        Shape::Mechanisms => bytes.len().is_multiple_of(size_of::<CK_MECHANISM_TYPE>()),
        Shape::Bytes | Shape::Template => true,
    };
    if fits { Ok(()) } else { fail(CKR_ATTRIBUTE_VALUE_INVALID) }
}
