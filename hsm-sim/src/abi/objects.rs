//! Objects, their attributes, and the search for them: the chapter on object management.

use cryptoki_sys::*;

use super::calls::{check_target, on_session};
use super::memory::{fill, size, template, write};
use crate::error::fail;
use crate::function::Function;
use crate::object::ulong;
use crate::session::Session;

pub(super) unsafe extern "C" fn C_CreateObject(
    session: CK_SESSION_HANDLE,
    attributes: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
    object: *mut CK_OBJECT_HANDLE,
) -> CK_RV {
    on_session(Function::C_CreateObject, session, |session| {
        check_target(object)?;
        // SAFETY: the caller's pointers, by the standard.
        unsafe { write(object, session.create_object(&template(attributes, count)?)?) }
    })
}

pub(super) unsafe extern "C" fn C_CopyObject(
    session: CK_SESSION_HANDLE,
    object: CK_OBJECT_HANDLE,
    attributes: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
    copy: *mut CK_OBJECT_HANDLE,
) -> CK_RV {
    on_session(Function::C_CopyObject, session, |session| {
        check_target(copy)?;
        // SAFETY: the caller's pointers, by the standard.
        unsafe { write(copy, session.copy_object(object, &template(attributes, count)?)?) }
    })
}

pub(super) unsafe extern "C" fn C_DestroyObject(session: CK_SESSION_HANDLE, object: CK_OBJECT_HANDLE) -> CK_RV {
    on_session(Function::C_DestroyObject, session, |session| session.destroy_object(object))
}

pub(super) unsafe extern "C" fn C_GetObjectSize(
    session: CK_SESSION_HANDLE,
    object: CK_OBJECT_HANDLE,
    length: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_GetObjectSize, session, |session| {
        let object = session.object(object, CKR_OBJECT_HANDLE_INVALID)?;
        // SAFETY: the caller's pointer, by the standard.
        unsafe { write(length, ulong(object.size())) }
    })
}

pub(super) unsafe extern "C" fn C_GetAttributeValue(
    session: CK_SESSION_HANDLE,
    object: CK_OBJECT_HANDLE,
    attributes: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
) -> CK_RV {
    on_session(Function::C_GetAttributeValue, session, |session| {
        let mut found = session.object(object, CKR_OBJECT_HANDLE_INVALID)?;
        if found.id.is_some() {
            // Another process may have changed it.
            session.token.refresh()?;
            found = session.object(object, CKR_OBJECT_HANDLE_INVALID)?;
        }
        // SAFETY: the caller's pointer, by the standard.
        unsafe { fill(&found, attributes, count) }
    })
}

pub(super) unsafe extern "C" fn C_SetAttributeValue(
    session: CK_SESSION_HANDLE,
    object: CK_OBJECT_HANDLE,
    attributes: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
) -> CK_RV {
    on_session(Function::C_SetAttributeValue, session, |session| {
        // SAFETY: the caller's pointer, by the standard.
        session.set_attributes(object, &unsafe { template(attributes, count) }?)
    })
}

pub(super) unsafe extern "C" fn C_FindObjectsInit(
    session: CK_SESSION_HANDLE,
    attributes: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
) -> CK_RV {
    on_session(Function::C_FindObjectsInit, session, |session| {
        // SAFETY: the caller's pointer, by the standard.
        session.find_init(&unsafe { template(attributes, count) }?)
    })
}

pub(super) unsafe extern "C" fn C_FindObjects(
    session: CK_SESSION_HANDLE,
    objects: *mut CK_OBJECT_HANDLE,
    limit: CK_ULONG,
    count: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_FindObjects, session, |session| {
        check_target(count)?;
        if objects.is_null() && limit > 0 {
            return fail(CKR_ARGUMENTS_BAD);
        }
        let found = session.find(size(limit)?)?;
        for (place, handle) in found.iter().enumerate() {
            // SAFETY: the caller's array has room for `limit` handles.
            unsafe { write(objects.add(place), *handle) }?;
        }
        // SAFETY: the caller's pointer, by the standard.
        unsafe { write(count, ulong(found.len())) }
    })
}

pub(super) unsafe extern "C" fn C_FindObjectsFinal(session: CK_SESSION_HANDLE) -> CK_RV {
    on_session(Function::C_FindObjectsFinal, session, Session::find_final)
}
