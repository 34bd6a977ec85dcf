//! What a plain request does: service, and class, object and member of everything that it touches. Policy decides on it before
//! the HSM protects a frame, so a request that cannot be read to its last octet is refused.

use std::fmt;

use crate::{DlmsError, InitiateRequest, LONGEST_APDU, data, reader::Reader};

/// An xDLMS or ACSE service that a client requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ServiceKind {
    /// GET: reads attributes.
    Get,
    /// SET: writes attributes.
    Set,
    /// ACTION: invokes methods.
    Action,
    /// InitiateRequest: opens an xDLMS association.
    Initiate,
}

impl ServiceKind {
    /// The name in policies and output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Set => "set",
            Self::Action => "action",
            Self::Initiate => "initiate",
        }
    }
}

impl fmt::Display for ServiceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An attribute or method of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// The interface class.
    pub class_id: u16,
    /// The logical name (OBIS code).
    pub obis: [u8; 6],
    /// The attribute of GET and SET (0 means all of them), the method of ACTION.
    pub member: i8,
}

/// A plain request of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRequest {
    /// The service.
    pub kind: ServiceKind,
    /// Everything that it touches. Empty for InitiateRequest, and for the next block of a request whose first block named it.
    pub targets: Vec<Target>,
    /// Whether it only continues an earlier request: the next block, which names nothing itself.
    pub continuation: bool,
}

impl ServiceRequest {
    /// Reads a plain APDU: get-, set- and action-request in all their forms, and InitiateRequest.
    ///
    /// # Errors
    /// Another APDU, one that is cut or goes on after its end, more than 256 targets, or data that cannot be read.
    pub fn parse(apdu: &[u8]) -> Result<Self, DlmsError> {
        if apdu.len() > LONGEST_APDU {
            return Err(DlmsError::invalid(WHAT, format!("{} octets, more than {LONGEST_APDU}", apdu.len())));
        }
        let mut reader = Reader::new(apdu);
        let request = match reader.octet(WHAT)? {
            0x01 => {
                InitiateRequest::parse(apdu)?;
                return Ok(Self { kind: ServiceKind::Initiate, targets: Vec::new(), continuation: false });
            }
            0xC0 => get(&mut reader)?,
            0xC1 => set(&mut reader)?,
            0xC3 => action(&mut reader)?,
            other => return Err(DlmsError::invalid(WHAT, format!("tag {other:#04X} is no get-, set-, action- or initiate-request"))),
        };
        reader.end(WHAT)?;
        Ok(request)
    }
}

// IEC 62056-5-3, 8: Get-Request, Set-Request and Action-Request, choice by choice.

fn get(reader: &mut Reader<'_>) -> Result<ServiceRequest, DlmsError> {
    match choice(reader)? {
        // normal
        1 => Ok(named(ServiceKind::Get, vec![attribute(reader)?])),
        // next
        2 => {
            reader.take(BLOCK_NUMBER, WHAT)?;
            Ok(continuation(ServiceKind::Get))
        }
        // with-list
        3 => Ok(named(ServiceKind::Get, list(reader, attribute)?)),
        other => Err(unknown("get-request", other)),
    }
}

fn set(reader: &mut Reader<'_>) -> Result<ServiceRequest, DlmsError> {
    let targets = match choice(reader)? {
        // normal
        1 => {
            let targets = vec![attribute(reader)?];
            data::skip(reader)?;
            targets
        }
        // with-first-datablock
        2 => {
            let targets = vec![attribute(reader)?];
            block(reader)?;
            targets
        }
        // with-datablock
        3 => {
            block(reader)?;
            return Ok(continuation(ServiceKind::Set));
        }
        // with-list
        4 => {
            let targets = list(reader, attribute)?;
            values(reader, targets.len())?;
            targets
        }
        // with-list-and-first-datablock
        5 => {
            let targets = list(reader, attribute)?;
            block(reader)?;
            targets
        }
        other => return Err(unknown("set-request", other)),
    };
    Ok(named(ServiceKind::Set, targets))
}

fn action(reader: &mut Reader<'_>) -> Result<ServiceRequest, DlmsError> {
    let targets = match choice(reader)? {
        // normal
        1 => {
            let targets = vec![target(reader)?];
            if reader.present(WHAT)? {
                data::skip(reader)?;
            }
            targets
        }
        // next-pblock
        2 => {
            reader.take(BLOCK_NUMBER, WHAT)?;
            return Ok(continuation(ServiceKind::Action));
        }
        // with-list
        3 => {
            let targets = list(reader, target)?;
            values(reader, targets.len())?;
            targets
        }
        // with-first-pblock
        4 => {
            let targets = vec![target(reader)?];
            block(reader)?;
            targets
        }
        // with-list-and-first-pblock
        5 => {
            let targets = list(reader, target)?;
            block(reader)?;
            targets
        }
        // with-pblock
        6 => {
            block(reader)?;
            return Ok(continuation(ServiceKind::Action));
        }
        other => return Err(unknown("action-request", other)),
    };
    Ok(named(ServiceKind::Action, targets))
}

const fn named(kind: ServiceKind, targets: Vec<Target>) -> ServiceRequest {
    ServiceRequest { kind, targets, continuation: false }
}

const fn continuation(kind: ServiceKind) -> ServiceRequest {
    ServiceRequest { kind, targets: Vec::new(), continuation: true }
}

/// The choice, and after it the invoke-id-and-priority.
fn choice(reader: &mut Reader<'_>) -> Result<u8, DlmsError> {
    let choice = reader.octet(WHAT)?;
    reader.octet(WHAT)?;
    Ok(choice)
}

fn target(reader: &mut Reader<'_>) -> Result<Target, DlmsError> {
    Ok(Target {
        class_id: u16::from_be_bytes(reader.array("class id")?),
        obis: reader.array("logical name")?,
        member: i8::from_be_bytes(reader.array("attribute or method")?),
    })
}

/// A target with its access selection.
fn attribute(reader: &mut Reader<'_>) -> Result<Target, DlmsError> {
    let target = target(reader)?;
    if reader.present("access selection")? {
        reader.octet("access selector")?;
        data::skip(reader)?;
    }
    Ok(target)
}

fn list(reader: &mut Reader<'_>, read: fn(&mut Reader<'_>) -> Result<Target, DlmsError>) -> Result<Vec<Target>, DlmsError> {
    let count = reader.length(WHAT)?;
    if !(1..=MOST_TARGETS).contains(&count) {
        return Err(DlmsError::invalid(WHAT, format!("a list of {count} targets, not 1 to {MOST_TARGETS}")));
    }
    (0..count).map(|_| read(reader)).collect()
}

/// One value for each target of a list.
fn values(reader: &mut Reader<'_>, targets: usize) -> Result<(), DlmsError> {
    let count = reader.length(WHAT)?;
    if count != targets {
        return Err(DlmsError::invalid(WHAT, format!("{count} values for {targets} targets")));
    }
    (0..count).try_for_each(|_| data::skip(reader))
}

/// A data block: last-block(1) ‖ block number(4) ‖ raw data.
fn block(reader: &mut Reader<'_>) -> Result<(), DlmsError> {
    reader.take(1 + BLOCK_NUMBER, WHAT)?;
    let length = reader.length(WHAT)?;
    reader.take(length, WHAT).map(drop)
}

fn unknown(what: &'static str, choice: u8) -> DlmsError {
    DlmsError::invalid(what, format!("choice {choice} is unknown"))
}

const BLOCK_NUMBER: usize = 4;
const MOST_TARGETS: usize = 256;
const WHAT: &str = "request";
