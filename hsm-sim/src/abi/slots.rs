//! Slots and tokens, and C_GetInfo: the chapters on general-purpose functions and on slot and token
//! management.

use std::sync::atomic::Ordering;
use std::time::Duration;

use cryptoki_sys::*;

use super::calls::{Void, check_target};
use super::memory::{bytes, pin_bytes, read, write};
use super::state::{guard, is_current};
use crate::error::{Result, fail};
use crate::function::Function;
use crate::mechanism;
use crate::object::ulong;
use crate::token::{MAX_PIN, MIN_PIN};

pub(super) unsafe extern "C" fn C_GetInfo(info: *mut CK_INFO) -> CK_RV {
    guard(Function::C_GetInfo, |_| {
        let value = CK_INFO {
            cryptokiVersion: CK_VERSION { major: 3, minor: 0 },
            manufacturerID: padded(MANUFACTURER),
            flags: 0,
            libraryDescription: padded("hsm-sim"),
            libraryVersion: VERSION,
        };
        // SAFETY: the caller's pointer, by the standard.
        unsafe { write(info, value) }
    })
}

pub(super) unsafe extern "C" fn C_GetSlotList(
    present: CK_BBOOL,
    slots: *mut CK_SLOT_ID,
    count: *mut CK_ULONG,
) -> CK_RV {
    guard(Function::C_GetSlotList, |module| {
        let wanted = module.tokens().iter().filter(|token| present == CK_FALSE || token.check_present().is_ok());
        let wanted: Vec<_> = wanted.map(|token| token.slot).collect();
        // SAFETY: the caller's pointers, by the standard.
        unsafe { deliver_list(&wanted, slots, count) }
    })
}

pub(super) unsafe extern "C" fn C_GetSlotInfo(slot: CK_SLOT_ID, info: *mut CK_SLOT_INFO) -> CK_RV {
    guard(Function::C_GetSlotInfo, |module| {
        let token = module.slot(slot)?;
        let present = if token.check_present().is_ok() { CKF_TOKEN_PRESENT } else { 0 };
        let value = CK_SLOT_INFO {
            slotDescription: padded(&format!("hsm-sim slot {slot}")),
            manufacturerID: padded(MANUFACTURER),
            flags: present | if module.has_control() { CKF_REMOVABLE_DEVICE } else { 0 },
            hardwareVersion: VERSION,
            firmwareVersion: VERSION,
        };
        // SAFETY: the caller's pointer, by the standard.
        unsafe { write(info, value) }
    })
}

pub(super) unsafe extern "C" fn C_GetTokenInfo(slot: CK_SLOT_ID, info: *mut CK_TOKEN_INFO) -> CK_RV {
    guard(Function::C_GetTokenInfo, |module| {
        let token = module.slot(slot)?;
        token.check_present()?;
        let record = token.record()?;
        let value = CK_TOKEN_INFO {
            label: record.as_ref().map_or_else(|| padded(""), |record| record.label),
            manufacturerID: padded(MANUFACTURER),
            model: padded("hsm-sim"),
            serialNumber: padded(record.as_ref().map_or("", |record| &record.serial)),
            flags: token.flags(record.as_ref()),
            ulMaxSessionCount: CK_EFFECTIVELY_INFINITE,
            ulSessionCount: ulong(token.sessions.load(Ordering::Acquire)),
            ulMaxRwSessionCount: CK_EFFECTIVELY_INFINITE,
            ulRwSessionCount: ulong(token.read_write_sessions.load(Ordering::Acquire)),
            ulMaxPinLen: ulong(MAX_PIN),
            ulMinPinLen: ulong(MIN_PIN),
            ulTotalPublicMemory: CK_UNAVAILABLE_INFORMATION,
            ulFreePublicMemory: CK_UNAVAILABLE_INFORMATION,
            ulTotalPrivateMemory: CK_UNAVAILABLE_INFORMATION,
            ulFreePrivateMemory: CK_UNAVAILABLE_INFORMATION,
            hardwareVersion: VERSION,
            firmwareVersion: VERSION,
            utcTime: padded(""),
        };
        // SAFETY: the caller's pointer, by the standard.
        unsafe { write(info, value) }
    })
}

pub(super) unsafe extern "C" fn C_WaitForSlotEvent(
    flags: CK_FLAGS,
    slot: *mut CK_SLOT_ID,
    reserved: *mut Void,
) -> CK_RV {
    guard(Function::C_WaitForSlotEvent, |module| {
        if !reserved.is_null() {
            return fail(CKR_ARGUMENTS_BAD);
        }
        check_target(slot)?;
        loop {
            if let Some(token) = module.tokens().iter().find(|token| token.changed.swap(false, Ordering::AcqRel)) {
                // SAFETY: the caller's pointer, by the standard.
                return unsafe { write(slot, token.slot) };
            }
            if flags & CKF_DONT_BLOCK != 0 {
                return fail(CKR_NO_EVENT);
            }
            std::thread::sleep(EVENT_POLL);
            if !is_current(module) {
                return fail(CKR_CRYPTOKI_NOT_INITIALIZED);
            }
            module.poll_control();
        }
    })
}

pub(super) unsafe extern "C" fn C_GetMechanismList(
    slot: CK_SLOT_ID,
    list: *mut CK_MECHANISM_TYPE,
    count: *mut CK_ULONG,
) -> CK_RV {
    guard(Function::C_GetMechanismList, |module| {
        module.slot(slot)?.check_present()?;
        let all: Vec<_> = mechanism::all().collect();
        // SAFETY: the caller's pointers, by the standard.
        unsafe { deliver_list(&all, list, count) }
    })
}

pub(super) unsafe extern "C" fn C_GetMechanismInfo(
    slot: CK_SLOT_ID,
    kind: CK_MECHANISM_TYPE,
    info: *mut CK_MECHANISM_INFO,
) -> CK_RV {
    guard(Function::C_GetMechanismInfo, |module| {
        module.slot(slot)?.check_present()?;
        match mechanism::info(kind) {
            // SAFETY: the caller's pointer, by the standard.
            Some(value) => unsafe { write(info, value) },
            None => fail(CKR_MECHANISM_INVALID),
        }
    })
}

pub(super) unsafe extern "C" fn C_InitToken(slot: CK_SLOT_ID, pin: *mut u8, length: CK_ULONG, label: *mut u8) -> CK_RV {
    guard(Function::C_InitToken, |module| {
        // SAFETY: the caller's pointers, by the standard: a label has 32 bytes.
        let (pin, label) = unsafe { (pin_bytes(pin, length)?, bytes(label, 32)?) };
        let label: [u8; 32] = label.try_into().unwrap_or([b' '; 32]);
        module.initialise_token(slot, pin, label)
    })
}

pub(super) unsafe extern "C" fn C_InitPIN(session: CK_SESSION_HANDLE, pin: *mut u8, length: CK_ULONG) -> CK_RV {
    // SAFETY: the caller's pointer, by the standard.
    guard(Function::C_InitPIN, |module| module.initialise_pin(session, unsafe { pin_bytes(pin, length) }?))
}

pub(super) unsafe extern "C" fn C_SetPIN(
    session: CK_SESSION_HANDLE,
    old: *mut u8,
    old_length: CK_ULONG,
    new: *mut u8,
    new_length: CK_ULONG,
) -> CK_RV {
    guard(Function::C_SetPIN, |module| {
        // SAFETY: the caller's pointers, by the standard.
        let (old, new) = unsafe { (pin_bytes(old, old_length)?, pin_bytes(new, new_length)?) };
        module.set_pin(session, old, new)
    })
}

/// Writes a list by the two-call convention.
unsafe fn deliver_list(list: &[CK_ULONG], target: *mut CK_ULONG, count: *mut CK_ULONG) -> Result<()> {
    // SAFETY: the caller's pointers, by the standard.
    let available = unsafe { read(count) }?;
    // SAFETY: as above.
    unsafe { write(count, ulong(list.len())) }?;
    if target.is_null() {
        return Ok(());
    }
    if available < ulong(list.len()) {
        return fail(CKR_BUFFER_TOO_SMALL);
    }
    for (place, value) in list.iter().enumerate() {
        // SAFETY: the array has room: its length was compared.
        unsafe { write(target.add(place), *value) }?;
    }
    Ok(())
}

/// Text as the standard wants it: cut or filled with blanks.
fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [b' '; N];
    for (place, byte) in field.iter_mut().zip(text.bytes()) {
        *place = byte;
    }
    field
}

const MANUFACTURER: &str = "meterkms";
const VERSION: CK_VERSION = CK_VERSION { major: 0, minor: 1 };
const EVENT_POLL: Duration = Duration::from_millis(10);
