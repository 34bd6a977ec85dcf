//! Reading from and writing to the caller's memory.

use cryptoki_sys::*;

use crate::buffer::{Output, Room};
use crate::error::{Result, Rv, fail};
use crate::object::{Object, Read, ulong};
use crate::template::{Item, Template, Value};

/// The caller's bytes. `NULL` is fine when the length is 0.
pub(super) unsafe fn bytes<'a>(pointer: *const u8, length: CK_ULONG) -> Result<&'a [u8]> {
    let length = size(length)?;
    match (pointer.is_null(), length) {
        (_, 0) => Ok(&[]),
        (true, _) => fail(CKR_ARGUMENTS_BAD),
        // SAFETY: not NULL, valid for `length` by the standard, and `length` fits an isize.
        (false, _) => Ok(unsafe { core::slice::from_raw_parts(pointer, length) }),
    }
}

/// The octets of a PIN. The module has no other way to enter one: `NULL` is refused.
pub(super) unsafe fn pin_bytes<'a>(pointer: *const u8, length: CK_ULONG) -> Result<&'a [u8]> {
    if pointer.is_null() {
        return fail(CKR_ARGUMENTS_BAD);
    }
    // SAFETY: the caller's pointer, by the standard.
    unsafe { bytes(pointer, length) }
}

/// A value behind a pointer that may be unaligned.
pub(super) unsafe fn read<T: Copy>(pointer: *const T) -> Result<T> {
    if pointer.is_null() {
        return fail(CKR_ARGUMENTS_BAD);
    }
    // SAFETY: not NULL, and valid by the standard.
    Ok(unsafe { pointer.read_unaligned() })
}

/// Writes a value behind a pointer that may be unaligned.
pub(super) unsafe fn write<T: Copy>(pointer: *mut T, value: T) -> Result<()> {
    if pointer.is_null() {
        return fail(CKR_ARGUMENTS_BAD);
    }
    // SAFETY: not NULL, and valid by the standard.
    unsafe { pointer.write_unaligned(value) };
    Ok(())
}

/// Copies `bytes` to where the caller has room for them: the length was checked.
pub(super) unsafe fn copy(bytes: &[u8], pointer: *mut u8) {
    if !bytes.is_empty() && !pointer.is_null() {
        // SAFETY: not NULL; the caller of this function compared the lengths. `bytes` is never the
        // caller's memory.
        unsafe { core::ptr::copy(bytes.as_ptr(), pointer, bytes.len()) };
    }
}

/// The room that a pair of pointers offers (PKCS#11 2.40, section 5.2).
pub(super) unsafe fn room(pointer: *const u8, length: *const CK_ULONG) -> Result<Room> {
    // SAFETY: as for this function.
    let length = unsafe { read(length) }?;
    Ok(if pointer.is_null() { Room::Query } else { Room::Bytes(usize::try_from(length).unwrap_or(usize::MAX)) })
}

/// Writes an answer to the caller's memory.
pub(super) unsafe fn deliver(output: &Output, pointer: *mut u8, length: *mut CK_ULONG) -> Result<()> {
    match output {
        // SAFETY: as for this function.
        Output::Length(needed) => unsafe { write(length, ulong(*needed)) },
        Output::TooSmall(needed) => {
            // SAFETY: as for this function.
            unsafe { write(length, ulong(*needed)) }?;
            fail(CKR_BUFFER_TOO_SMALL)
        }
        Output::Data(bytes) => {
            // SAFETY: the length was compared with the room before the work was done.
            unsafe { copy(bytes, pointer) };
            // SAFETY: as for this function.
            unsafe { write(length, ulong(bytes.len())) }
        }
    }
}

/// A length that memory can have.
pub(super) fn size(length: CK_ULONG) -> Result<usize> {
    usize::try_from(length).ok().filter(|length| isize::try_from(*length).is_ok()).ok_or(Rv(CKR_ARGUMENTS_BAD))
}

/// The attributes of a template.
pub(super) unsafe fn template<'a>(pointer: *const CK_ATTRIBUTE, count: CK_ULONG) -> Result<Template<'a>> {
    let count = attribute_count(pointer, count)?;
    let mut template = Template::new();
    for place in 0..count {
        // SAFETY: `place` is below the count that the caller gave; a NULL array was refused.
        let attribute = unsafe { read(pointer.add(place)) }?;
        let value = if is_array(attribute.type_) {
            // SAFETY: the value of such an attribute is an array of attributes.
            Value::Template(unsafe { nested(&attribute) }?)
        } else {
            // SAFETY: the value is valid for its length by the standard.
            Value::Bytes(
                unsafe { bytes(attribute.pValue.cast(), attribute.ulValueLen) }
                    .map_err(|_| Rv(CKR_ATTRIBUTE_VALUE_INVALID))?,
            )
        };
        template.push(Item { kind: attribute.type_, value });
    }
    Ok(template)
}

/// C_GetAttributeValue: answers every attribute before it reports what went wrong with one.
pub(super) unsafe fn fill(object: &Object, pointer: *mut CK_ATTRIBUTE, count: CK_ULONG) -> Result<()> {
    let count = attribute_count(pointer, count)?;
    let mut outcome = Ok(());
    for place in 0..count {
        // SAFETY: `place` is below the count that the caller gave; a NULL array was refused.
        let target = unsafe { pointer.add(place) };
        // SAFETY: as above.
        let mut attribute = unsafe { read(target) }?;
        let answer = match object.read(attribute.type_) {
            // SAFETY: the attribute's buffer is valid for its length by the standard.
            Read::Bytes(value) => unsafe { answer_bytes(&mut attribute, &value) },
            // SAFETY: as above.
            Read::Template(nested) => unsafe { answer_nested(&mut attribute, nested) },
            Read::Sensitive => {
                attribute.ulValueLen = CK_UNAVAILABLE_INFORMATION;
                fail(CKR_ATTRIBUTE_SENSITIVE)
            }
            Read::Unknown => {
                attribute.ulValueLen = CK_UNAVAILABLE_INFORMATION;
                fail(CKR_ATTRIBUTE_TYPE_INVALID)
            }
        };
        // SAFETY: as above.
        unsafe { write(target, attribute) }?;
        outcome = outcome.and(answer);
    }
    outcome
}

unsafe fn answer_bytes(attribute: &mut CK_ATTRIBUTE, value: &[u8]) -> Result<()> {
    let available = attribute.ulValueLen;
    if attribute.pValue.is_null() {
        attribute.ulValueLen = ulong(value.len());
        return Ok(());
    }
    if available < ulong(value.len()) {
        attribute.ulValueLen = CK_UNAVAILABLE_INFORMATION;
        return fail(CKR_BUFFER_TOO_SMALL);
    }
    // SAFETY: the buffer is long enough.
    unsafe { copy(value, attribute.pValue.cast()) };
    attribute.ulValueLen = ulong(value.len());
    Ok(())
}

unsafe fn answer_nested(attribute: &mut CK_ATTRIBUTE, nested: &[(CK_ATTRIBUTE_TYPE, Box<[u8]>)]) -> Result<()> {
    let needed = ulong(nested.len() * size_of::<CK_ATTRIBUTE>());
    if attribute.pValue.is_null() {
        attribute.ulValueLen = needed;
        return Ok(());
    }
    if attribute.ulValueLen < needed {
        attribute.ulValueLen = CK_UNAVAILABLE_INFORMATION;
        return fail(CKR_BUFFER_TOO_SMALL);
    }
    attribute.ulValueLen = needed;
    let first: *mut CK_ATTRIBUTE = attribute.pValue.cast();
    let mut outcome = Ok(());
    for (place, (kind, value)) in nested.iter().enumerate() {
        // SAFETY: the caller's array holds all entries: its length was compared.
        let target = unsafe { first.add(place) };
        // SAFETY: as above.
        let mut inner = unsafe { read(target) }?;
        inner.type_ = *kind;
        // SAFETY: the entry's buffer is valid for its length by the standard.
        outcome = outcome.and(unsafe { answer_bytes(&mut inner, value) });
        // SAFETY: as above.
        unsafe { write(target, inner) }?;
    }
    outcome
}

unsafe fn nested(attribute: &CK_ATTRIBUTE) -> Result<Vec<(CK_ATTRIBUTE_TYPE, Box<[u8]>)>> {
    let length = size(attribute.ulValueLen)?;
    let first: *const CK_ATTRIBUTE = attribute.pValue.cast();
    if !length.is_multiple_of(size_of::<CK_ATTRIBUTE>()) || (length > 0 && first.is_null()) {
        return fail(CKR_ATTRIBUTE_VALUE_INVALID);
    }
    let mut entries = Vec::new();
    for place in 0..length / size_of::<CK_ATTRIBUTE>() {
        // SAFETY: within the length that the caller gave.
        let inner = unsafe { read(first.add(place)) }?;
        // Templates in templates have no use; refusing them keeps callers from deep recursion.
        if is_array(inner.type_) {
            return fail(CKR_ATTRIBUTE_VALUE_INVALID);
        }
        // SAFETY: the value is valid for its length by the standard.
        let value =
            unsafe { bytes(inner.pValue.cast(), inner.ulValueLen) }.map_err(|_| Rv(CKR_ATTRIBUTE_VALUE_INVALID))?;
        entries.push((inner.type_, value.into()));
    }
    Ok(entries)
}

fn attribute_count(pointer: *const CK_ATTRIBUTE, count: CK_ULONG) -> Result<usize> {
    let count = size(count)?;
    if pointer.is_null() && count > 0 {
        return fail(CKR_ARGUMENTS_BAD);
    }
    if count > MAX_ATTRIBUTES { fail(CKR_ARGUMENTS_BAD) } else { Ok(count) }
}

fn is_array(kind: CK_ATTRIBUTE_TYPE) -> bool {
    matches!(kind, CKA_WRAP_TEMPLATE | CKA_UNWRAP_TEMPLATE | CKA_DERIVE_TEMPLATE)
}

/// More attributes than all that exist, several times over: a count above it is a mistake.
const MAX_ATTRIBUTES: usize = 1024;
