//! What a plain request does: service, and class, object and member of everything that it touches.
//! Policy decides on it before the HSM protects a frame, so a request that cannot be read to its
//! last octet is refused.

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
    /// Everything that it touches. Empty for InitiateRequest, and for the next block of a request
    /// whose first block named it.
    pub targets: Vec<Target>,
    /// Whether it only continues an earlier request: the next block, which names nothing itself.
    pub continuation: bool,
    /// Whether its first block carries the values, which cannot be read before the others have
    /// come.
    pub in_blocks: bool,
    /// Whether it is an InitiateRequest that brings a dedicated key.
    pub dedicated_key: bool,
}

impl ServiceRequest {
    /// Reads a plain APDU: get-, set- and action-request in all their forms, and InitiateRequest.
    ///
    /// There is one reading only of what is accepted: each length is in its shortest form, each
    /// presence octet is 00 or 01, and nothing follows. So what is decided on is what the meter
    /// executes.
    ///
    /// # Errors
    /// The APDU is of another kind, is cut, or octets follow it; a length is not in its shortest
    /// form, there are more than 256 targets, or data cannot be read.
    pub fn parse(apdu: &[u8]) -> Result<Self, DlmsError> {
        if apdu.len() > LONGEST_APDU {
            return Err(DlmsError::invalid(WHAT, format!("{} octets, more than {LONGEST_APDU}", apdu.len())));
        }
        let mut reader = Reader::strict(apdu);
        let request = match reader.octet(WHAT)? {
            0x01 => {
                let dedicated_key = InitiateRequest::parse(apdu)?.dedicated_key.is_some();
                return Ok(Self { dedicated_key, ..named(ServiceKind::Initiate, Vec::new()) });
            }
            0xC0 => get(&mut reader)?,
            0xC1 => set(&mut reader)?,
            0xC3 => action(&mut reader)?,
            other => {
                return Err(DlmsError::invalid(
                    WHAT,
                    format!("tag {other:#04X} is not a get-, set-, action- or initiate-request"),
                ));
            }
        };
        reader.end(WHAT)?;
        Ok(request)
    }
}

/// Whether these octets, a challenge that a meter has sent, could be a request to a meter in the
/// clear.
///
/// An answer f(StoC) to a challenge and the tag of an APDU that is authenticated only are the same
/// computation (IEC 62056-5-3, HLS mechanism 5, and security control 10): who chooses the challenge
/// gets a tag for these octets. So each service that a meter acts upon is told by its first octet
/// alone. A meter chooses the service by it, and what the meter makes of the rest, such as a
/// lenient encoding, or octets that follow, is known to its firmware only. Ten of 256 first octets
/// are refused, which is one random challenge in 26.
pub const fn resembles_request(challenge: &[u8]) -> bool {
    matches!(
        challenge,
        [
            // InitiateRequest; read, write and unconfirmed write by short names; confirmation of a
            // push
            0x01 | 0x05 | 0x06 | 0x16 | 0x10
            // get, set, action; access; general block transfer, which carries any of them
            | 0xC0 | 0xC1 | 0xC3 | 0xD9 | 0xE0,
            ..
        ]
    )
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
            return Ok(in_blocks(ServiceKind::Set, targets));
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
            return Ok(in_blocks(ServiceKind::Set, targets));
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
            return Ok(in_blocks(ServiceKind::Action, targets));
        }
        // with-list-and-first-pblock
        5 => {
            let targets = list(reader, target)?;
            block(reader)?;
            return Ok(in_blocks(ServiceKind::Action, targets));
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
    ServiceRequest { kind, targets, continuation: false, in_blocks: false, dedicated_key: false }
}

fn in_blocks(kind: ServiceKind, targets: Vec<Target>) -> ServiceRequest {
    ServiceRequest { in_blocks: true, ..named(kind, targets) }
}

fn continuation(kind: ServiceKind) -> ServiceRequest {
    ServiceRequest { continuation: true, ..named(kind, Vec::new()) }
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

fn list(
    reader: &mut Reader<'_>,
    read: fn(&mut Reader<'_>) -> Result<Target, DlmsError>,
) -> Result<Vec<Target>, DlmsError> {
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
