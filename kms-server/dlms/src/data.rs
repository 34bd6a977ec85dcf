//! COSEM data in A-XDR (IEC 62056-5-3, `Data`): skipped, to know where it ends.

use crate::{DlmsError, reader::Reader};

/// Reads over one value.
///
/// # Errors
/// It is cut, of an unknown type, a compact array, or nested deeper than 16 levels.
pub(crate) fn skip(reader: &mut Reader<'_>) -> Result<(), DlmsError> {
    skip_nested(reader, DEEPEST)
}

fn skip_nested(reader: &mut Reader<'_>, depth: u8) -> Result<(), DlmsError> {
    let length = match reader.octet(WHAT)? {
        // null-data, don't-care
        0 | 255 => 0,
        // array, structure. Each item takes at least one octet, so a forged count runs out of octets.
        1 | 2 => {
            let depth = depth.checked_sub(1).ok_or_else(|| DlmsError::invalid(WHAT, "nested deeper than 16 levels"))?;
            for _ in 0..reader.length(WHAT)? {
                skip_nested(reader, depth)?;
            }
            0
        }
        // bit-string: its length is in bits
        4 => reader.length(WHAT)?.div_ceil(8),
        // octet-string, visible-string, utf8-string
        9 | 10 | 12 => reader.length(WHAT)?,
        // boolean, bcd, integer, unsigned, enum, delta-integer, delta-unsigned
        3 | 13 | 15 | 17 | 22 | 28 | 31 => 1,
        // long, long-unsigned, delta-long, delta-long-unsigned
        16 | 18 | 29 | 32 => 2,
        // double-long, double-long-unsigned, float32, time, delta-double-long, delta-double-long-unsigned
        5 | 6 | 23 | 27 | 30 | 33 => 4,
        // date
        26 => 5,
        // long64, long64-unsigned, float64
        20 | 21 | 24 => 8,
        // date-time
        25 => 12,
        other => return Err(DlmsError::invalid(WHAT, format!("type {other} is unknown or not handled"))),
    };
    reader.take(length, WHAT).map(drop)
}

const DEEPEST: u8 = 16;
const WHAT: &str = "data";
