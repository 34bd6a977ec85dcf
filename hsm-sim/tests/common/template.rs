//! Attribute templates that own their values.

use cryptoki_sys::*;

/// Attributes in order. Nested templates are kept as such.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Template(Vec<(CK_ATTRIBUTE_TYPE, Value)>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Bytes(Vec<u8>),
    Nested(Template),
}

impl Template {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn bytes(mut self, kind: CK_ATTRIBUTE_TYPE, value: impl AsRef<[u8]>) -> Self {
        self.0.retain(|(known, _)| *known != kind);
        self.0.push((kind, Value::Bytes(value.as_ref().to_vec())));
        self
    }

    pub(crate) fn bool(self, kind: CK_ATTRIBUTE_TYPE, value: bool) -> Self {
        self.bytes(kind, [u8::from(value)])
    }

    pub(crate) fn ulong(self, kind: CK_ATTRIBUTE_TYPE, value: CK_ULONG) -> Self {
        self.bytes(kind, value.to_ne_bytes())
    }

    pub(crate) fn nested(mut self, kind: CK_ATTRIBUTE_TYPE, value: Template) -> Self {
        self.0.retain(|(known, _)| *known != kind);
        self.0.push((kind, Value::Nested(value)));
        self
    }

    pub(crate) fn without(mut self, kind: CK_ATTRIBUTE_TYPE) -> Self {
        self.0.retain(|(known, _)| *known != kind);
        self
    }

    /// These attributes, replaced and followed by the others.
    pub(crate) fn with(mut self, more: Template) -> Self {
        for (kind, value) in more.0 {
            self.0.retain(|(known, _)| *known != kind);
            self.0.push((kind, value));
        }
        self
    }

    /// These attributes followed by the others, whether they are there already or not.
    pub(crate) fn and(mut self, more: Template) -> Self {
        self.0.extend(more.0);
        self
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Views of the values for one C call. They live as long as `self` stays untouched; a nested
    /// template's view is leaked, which is a few bytes in a test.
    pub(crate) fn attributes(&self) -> Vec<CK_ATTRIBUTE> {
        let view = |(kind, value): &(CK_ATTRIBUTE_TYPE, Value)| match value {
            Value::Bytes(bytes) => CK_ATTRIBUTE {
                type_: *kind,
                pValue: bytes.as_ptr().cast_mut().cast(),
                ulValueLen: bytes.len() as CK_ULONG,
            },
            Value::Nested(template) => {
                let nested = template.attributes().leak();
                CK_ATTRIBUTE {
                    type_: *kind,
                    pValue: nested.as_mut_ptr().cast(),
                    ulValueLen: size_of_val(nested) as CK_ULONG,
                }
            }
        };
        self.0.iter().map(view).collect()
    }

    /// A session object of class secret key, readable, all uses.
    pub(crate) fn secret(key_type: CK_KEY_TYPE) -> Self {
        [CKA_ENCRYPT, CKA_DECRYPT, CKA_SIGN, CKA_VERIFY, CKA_WRAP, CKA_UNWRAP, CKA_DERIVE, CKA_EXTRACTABLE]
            .into_iter()
            .fold(Self::new().ulong(CKA_CLASS, CKO_SECRET_KEY).ulong(CKA_KEY_TYPE, key_type), |template, kind| {
                template.bool(kind, true)
            })
            .bool(CKA_SENSITIVE, false)
            .bool(CKA_TOKEN, false)
    }

    pub(crate) fn aes(value: &[u8]) -> Self {
        Self::secret(CKK_AES).bytes(CKA_VALUE, value)
    }

    pub(crate) fn generic(value: &[u8]) -> Self {
        Self::secret(CKK_GENERIC_SECRET).bytes(CKA_VALUE, value)
    }

    /// For a key that a call makes: AES, readable, of so many bytes.
    pub(crate) fn new_aes(length: usize) -> Self {
        Self::secret(CKK_AES).ulong(CKA_VALUE_LEN, length as CK_ULONG)
    }

    pub(crate) fn new_generic(length: usize) -> Self {
        Self::secret(CKK_GENERIC_SECRET).ulong(CKA_VALUE_LEN, length as CK_ULONG)
    }

    /// An EC public key: `parameters` is the DER of the curve, `point` the uncompressed point (04 ‖
    /// X ‖ Y).
    pub(crate) fn ec_public(parameters: &[u8], point: &[u8]) -> Self {
        Self::new()
            .ulong(CKA_CLASS, CKO_PUBLIC_KEY)
            .ulong(CKA_KEY_TYPE, CKK_EC)
            .bool(CKA_TOKEN, false)
            .bool(CKA_VERIFY, true)
            .bytes(CKA_EC_PARAMS, parameters)
            .bytes(CKA_EC_POINT, octet_string(point))
    }

    pub(crate) fn ec_private(parameters: &[u8], d: &[u8]) -> Self {
        Self::new()
            .ulong(CKA_CLASS, CKO_PRIVATE_KEY)
            .ulong(CKA_KEY_TYPE, CKK_EC)
            .bool(CKA_TOKEN, false)
            .bool(CKA_SIGN, true)
            .bool(CKA_DERIVE, true)
            .bool(CKA_SENSITIVE, false)
            .bool(CKA_EXTRACTABLE, true)
            .bytes(CKA_EC_PARAMS, parameters)
            .bytes(CKA_VALUE, d)
    }
}

/// DER OCTET STRING of up to 65,535 bytes.
pub(crate) fn octet_string(content: &[u8]) -> Vec<u8> {
    let length = content.len();
    let mut der = match length {
        0..=127 => vec![4, length as u8],
        128..=255 => vec![4, 0x81, length as u8],
        _ => vec![4, 0x82, (length >> 8) as u8, length as u8],
    };
    der.extend(content);
    der
}

/// DER of the curves' object identifiers (RFC 5480 section 2.1.1.1).
pub(crate) const P256: &[u8] = &[6, 8, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 3, 1, 7];
pub(crate) const P384: &[u8] = &[6, 5, 0x2B, 0x81, 4, 0, 0x22];
pub(crate) const P521: &[u8] = &[6, 5, 0x2B, 0x81, 4, 0, 0x23];
