//! Exception responses (IEC 62056-5-3, ExceptionResponse): how a meter refuses an APDU.

use crate::{DlmsError, reader::Reader};

/// An exception response: `D8 ‖ state error ‖ service error [‖ counter(4)]`.
///
/// It is sent in the clear and not authenticated: anyone can forge one. It proves nothing (I3), and
/// a counter in it is believed only within the device profile's cap (I4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExceptionResponse {
    /// 1 service-not-allowed, 2 service-unknown.
    pub state_error: u8,
    /// The service error.
    pub service_error: ServiceError,
}

/// The service error of an exception response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ServiceError {
    /// 1: operation-not-possible.
    OperationNotPossible,
    /// 2: service-not-supported.
    ServiceNotSupported,
    /// 3: other-reason.
    OtherReason,
    /// 4: pdu-too-long.
    PduTooLong,
    /// 5: deciphering-error. Another key, or a damaged frame.
    DecipheringError,
    /// 6: invocation-counter-error, with the last counter that the meter says it accepted.
    InvocationCounterError {
        /// That counter.
        last_accepted: u32,
    },
}

impl ExceptionResponse {
    /// Whether octets begin like an exception response.
    pub fn recognise(octets: &[u8]) -> bool {
        octets.first() == Some(&TAG)
    }

    /// Reads an exception response, to its last octet.
    ///
    /// # Errors
    /// The octets are not an exception response, are cut, others follow, or the error is unknown.
    pub fn parse(octets: &[u8]) -> Result<Self, DlmsError> {
        let mut reader = Reader::new(octets);
        if reader.octet(WHAT)? != TAG {
            return Err(DlmsError::invalid(WHAT, "the tag is not D8"));
        }
        let state_error = reader.octet(WHAT)?;
        if !matches!(state_error, 1 | 2) {
            return Err(DlmsError::invalid(WHAT, format!("state error {state_error} is unknown")));
        }
        let service_error = match reader.octet(WHAT)? {
            1 => ServiceError::OperationNotPossible,
            2 => ServiceError::ServiceNotSupported,
            3 => ServiceError::OtherReason,
            4 => ServiceError::PduTooLong,
            5 => ServiceError::DecipheringError,
            6 => ServiceError::InvocationCounterError {
                last_accepted: u32::from_be_bytes(reader.array("last accepted counter")?),
            },
            other => return Err(DlmsError::invalid(WHAT, format!("service error {other} is unknown"))),
        };
        reader.end(WHAT)?;
        Ok(Self { state_error, service_error })
    }
}

const TAG: u8 = 0xD8;
const WHAT: &str = "exception response";
