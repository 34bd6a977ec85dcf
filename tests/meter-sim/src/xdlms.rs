//! The xDLMS APDUs in plaintext: initiate, GET, SET, ACTION and the exception response
//! (IEC 62056-5-3).

use zeroize::Zeroizing;

use crate::axdr::{Data, Reader, write_octet_string};
use crate::{Error, Obis, SymmetricKey};

pub use crate::results::{
    DataAccessResult, EXCEPTION_RESPONSE, ExceptionResponse, INVOCATION_COUNTER_ERROR, SERVICE_NOT_ALLOWED,
};

/// The initiate request, tag 01: what the client proposes, and the dedicated key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitiateRequest {
    /// The dedicated key of this association; only sent ciphered.
    pub dedicated_key: Option<SymmetricKey>,
    /// The services that the client wants to use: 24 bits, big endian.
    pub conformance: [u8; 3],
    /// The longest APDU that the client accepts, in bytes; 0 means no limit.
    pub client_max_receive_pdu_size: u16,
}

impl InitiateRequest {
    /// Reads a whole APDU.
    pub fn parse(apdu: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::new(apdu);
        expect(&mut reader, INITIATE_REQUEST, "initiate request")?;
        let dedicated_key = if reader.present()? { Some(SymmetricKey::new(reader.octet_string()?)?) } else { None };
        // response-allowed (default true) and proposed-quality-of-service: nothing depends on them.
        for _ in 0..2 {
            if reader.present()? {
                reader.u8()?;
            }
        }
        expect(&mut reader, DLMS_VERSION, "initiate request")?;
        let conformance = read_conformance(&mut reader)?;
        let client_max_receive_pdu_size = reader.u16()?;
        reader.finish()?;
        Ok(Self { dedicated_key, conformance, client_max_receive_pdu_size })
    }

    /// The whole APDU, in memory that is wiped: it may carry a key.
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        // Sized at once, so that no copy of the key stays behind in a buffer that grew.
        let mut out = Zeroizing::new(Vec::with_capacity(64));
        out.push(INITIATE_REQUEST);
        match &self.dedicated_key {
            Some(key) => {
                out.push(1);
                write_octet_string(key.expose(), &mut out);
            }
            None => out.push(0),
        }
        out.extend([0, 0, DLMS_VERSION]);
        out.extend(CONFORMANCE_HEADER);
        out.extend(self.conformance);
        out.extend(self.client_max_receive_pdu_size.to_be_bytes());
        out
    }
}

/// The initiate response, tag 08.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitiateResponse {
    /// The services that both sides support: 24 bits, big endian.
    pub conformance: [u8; 3],
    /// The longest APDU that the meter accepts, in bytes.
    pub server_max_receive_pdu_size: u16,
}

impl InitiateResponse {
    /// Reads a whole APDU.
    pub fn parse(apdu: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::new(apdu);
        expect(&mut reader, INITIATE_RESPONSE, "initiate response")?;
        if reader.present()? {
            reader.u8()?;
        }
        expect(&mut reader, DLMS_VERSION, "initiate response")?;
        let conformance = read_conformance(&mut reader)?;
        let server_max_receive_pdu_size = reader.u16()?;
        reader.u16()?;
        reader.finish()?;
        Ok(Self { conformance, server_max_receive_pdu_size })
    }

    /// The whole APDU.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![INITIATE_RESPONSE, 0, DLMS_VERSION];
        out.extend(CONFORMANCE_HEADER);
        out.extend(self.conformance);
        out.extend(self.server_max_receive_pdu_size.to_be_bytes());
        // The VAA name of logical name referencing.
        out.extend([0x00, 0x07]);
        out
    }
}

/// An attribute of an object: what GET and SET name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttributeDescriptor {
    /// The interface class, for example 3 for a register.
    pub class: u16,
    /// The object.
    pub instance: Obis,
    /// The attribute, from 1.
    pub attribute: i8,
}

/// A method of an object: what ACTION names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MethodDescriptor {
    /// The interface class, for example 64 for a security setup.
    pub class: u16,
    /// The object.
    pub instance: Obis,
    /// The method, from 1.
    pub method: i8,
}

/// A request for a service, in plaintext.
#[derive(Clone, Debug, PartialEq)]
pub enum ServiceRequest {
    /// `get-request-normal`, C0 01.
    Get {
        /// Invoke id and priority, echoed in the answer.
        invoke: u8,
        /// What to read.
        attribute: AttributeDescriptor,
        /// Whether the request carries an access selection.
        selective: bool,
    },
    /// `get-request-with-list`, C0 03.
    GetWithList {
        /// Invoke id and priority, echoed in the answer.
        invoke: u8,
        /// What to read, and whether each carries an access selection.
        attributes: Vec<(AttributeDescriptor, bool)>,
    },
    /// `set-request-normal`, C1 01.
    Set {
        /// Invoke id and priority, echoed in the answer.
        invoke: u8,
        /// What to write.
        attribute: AttributeDescriptor,
        /// The value.
        value: Data,
    },
    /// `action-request-normal`, C3 01.
    Action {
        /// Invoke id and priority, echoed in the answer.
        invoke: u8,
        /// What to call.
        method: MethodDescriptor,
        /// The argument.
        argument: Option<Data>,
    },
}

impl ServiceRequest {
    /// Reads a whole APDU. Block transfer and other services are refused.
    pub fn parse(apdu: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::new(apdu);
        let service = (reader.u8()?, reader.u8()?);
        let invoke = reader.u8()?;
        let request = match service {
            (GET_REQUEST, NORMAL) => {
                let attribute = read_attribute(&mut reader)?;
                let selective = read_selection(&mut reader)?;
                Self::Get { invoke, attribute, selective }
            }
            (GET_REQUEST, WITH_LIST) => {
                let count = reader.length()?;
                if count > reader.remaining() {
                    return Err(Error::malformed("attribute list", "ends too early"));
                }
                let attributes = (0..count)
                    .map(|_| Ok((read_attribute(&mut reader)?, read_selection(&mut reader)?)))
                    .collect::<Result<_, Error>>()?;
                Self::GetWithList { invoke, attributes }
            }
            (SET_REQUEST, NORMAL) => {
                let attribute = read_attribute(&mut reader)?;
                if read_selection(&mut reader)? {
                    return Err(Error::malformed("set request", "has an access selection"));
                }
                Self::Set { invoke, attribute, value: Data::read(&mut reader)? }
            }
            (ACTION_REQUEST, NORMAL) => Self::Action {
                invoke,
                method: MethodDescriptor {
                    class: reader.u16()?,
                    instance: Obis(reader.array()?),
                    method: i8::from_be_bytes(reader.array()?),
                },
                argument: if reader.present()? { Some(Data::read(&mut reader)?) } else { None },
            },
            _ => return Err(Error::malformed("service request", "is not supported")),
        };
        reader.finish()?;
        Ok(request)
    }

    /// The whole APDU. Access selections are not written.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Get { invoke, attribute, .. } => {
                out.extend([GET_REQUEST, NORMAL, *invoke]);
                write_attribute(attribute, &mut out);
                out.push(0);
            }
            Self::GetWithList { invoke, attributes } => {
                out.extend([GET_REQUEST, WITH_LIST, *invoke]);
                crate::axdr::write_length(attributes.len(), &mut out);
                for (attribute, _) in attributes {
                    write_attribute(attribute, &mut out);
                    out.push(0);
                }
            }
            Self::Set { invoke, attribute, value } => {
                out.extend([SET_REQUEST, NORMAL, *invoke]);
                write_attribute(attribute, &mut out);
                out.push(0);
                value.write(&mut out);
            }
            Self::Action { invoke, method, argument } => {
                out.extend([ACTION_REQUEST, NORMAL, *invoke]);
                out.extend(method.class.to_be_bytes());
                out.extend(method.instance.0);
                out.extend(method.method.to_be_bytes());
                match argument {
                    Some(argument) => {
                        out.push(1);
                        argument.write(&mut out);
                    }
                    None => out.push(0),
                }
            }
        }
        out
    }
}

/// The answer to a [`ServiceRequest`], in plaintext.
#[derive(Clone, Debug, PartialEq)]
pub enum ServiceResponse {
    /// `get-response-normal`, C4 01.
    Get {
        /// Of the request.
        invoke: u8,
        /// The value, or why there is none.
        result: Result<Data, DataAccessResult>,
    },
    /// `get-response-with-list`, C4 03.
    GetWithList {
        /// Of the request.
        invoke: u8,
        /// The values in the order of the request.
        results: Vec<Result<Data, DataAccessResult>>,
    },
    /// `set-response-normal`, C5 01.
    Set {
        /// Of the request.
        invoke: u8,
        /// Success is 0.
        result: DataAccessResult,
    },
    /// `action-response-normal`, C7 01.
    Action {
        /// Of the request.
        invoke: u8,
        /// `Action-Result`: success is 0.
        result: u8,
        /// What the method returned.
        returned: Option<Data>,
    },
}

impl ServiceResponse {
    /// Reads a whole APDU.
    pub fn parse(apdu: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::new(apdu);
        let service = (reader.u8()?, reader.u8()?);
        let invoke = reader.u8()?;
        let response = match service {
            (GET_RESPONSE, NORMAL) => Self::Get { invoke, result: read_get_result(&mut reader)? },
            (GET_RESPONSE, WITH_LIST) => {
                let count = reader.length()?;
                if count > reader.remaining() {
                    return Err(Error::malformed("result list", "ends too early"));
                }
                Self::GetWithList {
                    invoke,
                    results: (0..count).map(|_| read_get_result(&mut reader)).collect::<Result<_, Error>>()?,
                }
            }
            (SET_RESPONSE, NORMAL) => Self::Set { invoke, result: DataAccessResult(reader.u8()?) },
            (ACTION_RESPONSE, NORMAL) => Self::Action {
                invoke,
                result: reader.u8()?,
                returned: if reader.present()? { read_get_result(&mut reader)?.ok() } else { None },
            },
            _ => return Err(Error::malformed("service response", "is not supported")),
        };
        reader.finish()?;
        Ok(response)
    }

    /// The whole APDU.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Get { invoke, result } => {
                out.extend([GET_RESPONSE, NORMAL, *invoke]);
                write_get_result(result, &mut out);
            }
            Self::GetWithList { invoke, results } => {
                out.extend([GET_RESPONSE, WITH_LIST, *invoke]);
                crate::axdr::write_length(results.len(), &mut out);
                for result in results {
                    write_get_result(result, &mut out);
                }
            }
            Self::Set { invoke, result } => {
                out.extend([SET_RESPONSE, NORMAL, *invoke, result.0]);
            }
            Self::Action { invoke, result, returned } => {
                out.extend([ACTION_RESPONSE, NORMAL, *invoke, *result]);
                match returned {
                    Some(data) => {
                        out.extend([1, 0]);
                        data.write(&mut out);
                    }
                    None => out.push(0),
                }
            }
        }
        out
    }
}

impl ExceptionResponse {
    /// Reads a whole APDU.
    pub fn parse(apdu: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::new(apdu);
        expect(&mut reader, EXCEPTION_RESPONSE, "exception response")?;
        let (state, service) = (reader.u8()?, reader.u8()?);
        let last_accepted_counter = if service == INVOCATION_COUNTER_ERROR { Some(reader.u32()?) } else { None };
        reader.finish()?;
        Ok(Self { state, service, last_accepted_counter })
    }
}

/// Tag of the initiate request.
pub const INITIATE_REQUEST: u8 = 0x01;
/// Tag of the initiate response.
pub const INITIATE_RESPONSE: u8 = 0x08;
/// Tag of GET requests.
pub const GET_REQUEST: u8 = 0xC0;
/// Tag of SET requests.
pub const SET_REQUEST: u8 = 0xC1;
/// Tag of ACTION requests.
pub const ACTION_REQUEST: u8 = 0xC3;
/// Tag of GET responses.
pub const GET_RESPONSE: u8 = 0xC4;
/// Tag of SET responses.
pub const SET_RESPONSE: u8 = 0xC5;
/// Tag of ACTION responses.
pub const ACTION_RESPONSE: u8 = 0xC7;
/// `state-error` 2.
pub const SERVICE_UNKNOWN: u8 = 2;
/// `service-error` 1.
pub const OPERATION_NOT_POSSIBLE: u8 = 1;
/// `service-error` 2.
pub const SERVICE_NOT_SUPPORTED: u8 = 2;
/// `service-error` 3.
pub const OTHER_REASON: u8 = 3;
/// `service-error` 4.
pub const PDU_TOO_LONG: u8 = 4;
/// `service-error` 5.
pub const DECIPHERING_ERROR: u8 = 5;

fn expect(reader: &mut Reader<'_>, byte: u8, what: &'static str) -> Result<(), Error> {
    if reader.u8()? == byte { Ok(()) } else { Err(Error::malformed(what, "has an unexpected tag or version")) }
}

fn read_conformance(reader: &mut Reader<'_>) -> Result<[u8; 3], Error> {
    if reader.array()? != CONFORMANCE_HEADER {
        return Err(Error::malformed("conformance", "is not a bit string of 24"));
    }
    reader.array()
}

fn read_attribute(reader: &mut Reader<'_>) -> Result<AttributeDescriptor, Error> {
    Ok(AttributeDescriptor {
        class: reader.u16()?,
        instance: Obis(reader.array()?),
        attribute: i8::from_be_bytes(reader.array()?),
    })
}

fn write_attribute(attribute: &AttributeDescriptor, out: &mut Vec<u8>) {
    out.extend(attribute.class.to_be_bytes());
    out.extend(attribute.instance.0);
    out.extend(attribute.attribute.to_be_bytes());
}

fn read_selection(reader: &mut Reader<'_>) -> Result<bool, Error> {
    let present = reader.present()?;
    if present {
        reader.u8()?;
        Data::read(reader)?;
    }
    Ok(present)
}

fn read_get_result(reader: &mut Reader<'_>) -> Result<Result<Data, DataAccessResult>, Error> {
    match reader.u8()? {
        0 => Ok(Ok(Data::read(reader)?)),
        1 => Ok(Err(DataAccessResult(reader.u8()?))),
        _ => Err(Error::malformed("result", "is neither data nor an error")),
    }
}

fn write_get_result(result: &Result<Data, DataAccessResult>, out: &mut Vec<u8>) {
    match result {
        Ok(data) => {
            out.push(0);
            data.write(out);
        }
        Err(error) => out.extend([1, error.0]),
    }
}

const NORMAL: u8 = 1;
const WITH_LIST: u8 = 3;
const DLMS_VERSION: u8 = 6;
const CONFORMANCE_HEADER: [u8; 4] = [0x5F, 0x1F, 0x04, 0x00];
