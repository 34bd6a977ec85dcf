//! What a meter answers instead of data (IEC 62056-5-3).

use std::fmt;

/// `Data-Access-Result` (IEC 62056-5-3). `Action-Result` has the same numbers up to 250.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataAccessResult(pub u8);

impl DataAccessResult {
    /// 0.
    pub const SUCCESS: Self = Self(0);
    /// 3.
    pub const READ_WRITE_DENIED: Self = Self(3);
    /// 4.
    pub const OBJECT_UNDEFINED: Self = Self(4);
    /// 9.
    pub const OBJECT_CLASS_INCONSISTENT: Self = Self(9);
    /// 11.
    pub const OBJECT_UNAVAILABLE: Self = Self(11);
    /// 12.
    pub const TYPE_UNMATCHED: Self = Self(12);
    /// 13.
    pub const SCOPE_OF_ACCESS_VIOLATED: Self = Self(13);
    /// 250.
    pub const OTHER_REASON: Self = Self(250);
}

/// The exception response, tag D8, always in plaintext: so anyone can make one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExceptionResponse {
    /// `state-error`: 1 service not allowed, 2 service unknown.
    pub state: u8,
    /// `service-error`: 1 operation not possible, 2 service not supported, 3 other reason, 4 PDU
    /// too long, 5 deciphering error, 6 invocation counter error.
    pub service: u8,
    /// With an invocation counter error: the last accepted counter.
    pub last_accepted_counter: Option<u32>,
}

impl ExceptionResponse {
    /// An exception without a counter.
    pub const fn new(state: u8, service: u8) -> Self {
        Self { state, service, last_accepted_counter: None }
    }

    /// `D8 01 06` and the last accepted counter.
    pub const fn invocation_counter(last_accepted: u32) -> Self {
        Self {
            state: SERVICE_NOT_ALLOWED,
            service: INVOCATION_COUNTER_ERROR,
            last_accepted_counter: Some(last_accepted),
        }
    }

    /// The whole APDU.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![EXCEPTION_RESPONSE, self.state, self.service];
        if let Some(counter) = self.last_accepted_counter {
            out.extend(counter.to_be_bytes());
        }
        out
    }
}

impl fmt::Display for ExceptionResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode_upper(self.encode()))
    }
}

/// Tag of the exception response.
pub const EXCEPTION_RESPONSE: u8 = 0xD8;
/// `state-error` 1.
pub const SERVICE_NOT_ALLOWED: u8 = 1;
/// `service-error` 6.
pub const INVOCATION_COUNTER_ERROR: u8 = 6;
