//! COSEM data in A-XDR (IEC 62056-5-3, `Data`). Most values are skipped, to find their end; the
//! server reads only a few types.

use std::fmt;

use crate::{DlmsError, reader::Reader};

/// One COSEM value in A-XDR, checked to its end. `Debug` prints only its length: an attribute may
/// hold a secret.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Data<'a>(&'a [u8]);

impl<'a> Data<'a> {
    /// The octets: the type's tag, then the value.
    pub const fn octets(self) -> &'a [u8] {
        self.0
    }

    /// The content of an octet-string (type 9).
    ///
    /// # Errors
    /// Another type.
    pub fn octet_string(self) -> Result<&'a [u8], DlmsError> {
        let mut reader = Reader::new(self.0);
        match reader.octet(WHAT)? {
            9 => {
                let length = reader.length(WHAT)?;
                let content = reader.take(length, WHAT)?;
                reader.end(WHAT)?;
                Ok(content)
            }
            other => Err(DlmsError::invalid(WHAT, format!("type {other} instead of an octet-string (9)"))),
        }
    }

    /// The number in an unsigned (type 17), long-unsigned (18), double-long-unsigned (6) or
    /// long64-unsigned (21).
    ///
    /// # Errors
    /// Another type.
    pub fn unsigned(self) -> Result<u64, DlmsError> {
        let mut reader = Reader::new(self.0);
        let number = match reader.octet(WHAT)? {
            17 => reader.octet(WHAT)?.into(),
            18 => u16::from_be_bytes(reader.array(WHAT)?).into(),
            6 => u32::from_be_bytes(reader.array(WHAT)?).into(),
            21 => u64::from_be_bytes(reader.array(WHAT)?),
            other => {
                return Err(DlmsError::invalid(
                    WHAT,
                    format!("type {other} instead of an unsigned number (17, 18, 6 or 21)"),
                ));
            }
        };
        reader.end(WHAT)?;
        Ok(number)
    }

    /// Reads one value. Octets after it stay in the reader.
    pub(crate) fn read(reader: &mut Reader<'a>) -> Result<Self, DlmsError> {
        let mut after = *reader;
        skip(&mut after)?;
        let length = reader.rest().len() - after.rest().len();
        reader.take(length, WHAT).map(Self)
    }
}

impl fmt::Debug for Data<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Data({} octets)", self.0.len())
    }
}

/// Skips one value.
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
        // array, structure. Each item takes at least one octet, so a forged count runs out of
        // octets.
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
        // double-long, double-long-unsigned, float32, time, delta-double-long,
        // delta-double-long-unsigned
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
