//! The bodies of sealed rows: protobuf messages, converted from and to the types of this crate.
//!
//! The encoding is deterministic: fields in order of their numbers, defaults left out, no maps.
//! There are many rows, so common values take no space: an active version is 0, a version number is
//! stored less one, moments are stored relative to the row's own, and each principal once in a row.
//! Reading refuses a row that breaks an invariant; the seal was verified before.

mod approval;
mod campaign;
mod invitation;
mod message;
mod owner;
mod principal;
mod proposal;
mod quota;
mod root;
mod slot;
mod transfer;
mod work_order;

use crate::{ParseError, SecuritySuite, UnixMillis};

/// A row that cannot be read although its seal fits: a fault of this program, or a row of a newer
/// version of the program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stored row cannot be read (a fault of the server, or a row of a newer version): {reason}")]
pub struct RowError {
    reason: String,
}

impl RowError {
    fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into() }
    }
}

macro_rules! from_errors {
    ($($error:ty),*) => {$(
        impl From<$error> for RowError {
            fn from(error: $error) -> Self {
                Self::new(error.to_string())
            }
        }
    )*};
}
from_errors!(prost::DecodeError, ParseError, crate::SlotError, crate::CounterError);

fn moment(milliseconds: i64) -> Result<UnixMillis, RowError> {
    match milliseconds {
        0 => Err(RowError::new("the row is cut: it has no time")),
        _ => Ok(UnixMillis(milliseconds)),
    }
}

fn suite(number: u32) -> Result<SecuritySuite, RowError> {
    Ok(SecuritySuite::from_number(u8::try_from(number).unwrap_or(u8::MAX))?)
}

fn version(what: &str, number: u32) -> Result<u8, RowError> {
    match u8::try_from(number) {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(RowError::new(format!("{what} version {number} is not 1 to 255"))),
    }
}

fn octets<const LENGTH: usize>(what: &str, octets: &[u8]) -> Result<[u8; LENGTH], RowError> {
    octets.try_into().map_err(|_| RowError::new(format!("{what}: {} octets instead of {LENGTH}", octets.len())))
}
