//! A-XDR (IEC 61334-6) as far as COSEM uses it: a bounded reader, lengths, and the `Data` type.

use serde::{Deserialize, Serialize};

use crate::Error;

/// The type `Data` of IEC 62056-5-3: a self-describing value.
///
/// `compact-array` is not supported and is refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Data {
    /// `null-data`, tag 0.
    NullData,
    /// `array`, tag 1.
    Array(Vec<Data>),
    /// `structure`, tag 2.
    Structure(Vec<Data>),
    /// `boolean`, tag 3.
    Boolean(bool),
    /// `bit-string`, tag 4: the number of bits and the bytes that hold them, first bit first.
    BitString(u16, Vec<u8>),
    /// `double-long`, tag 5.
    DoubleLong(i32),
    /// `double-long-unsigned`, tag 6.
    DoubleLongUnsigned(u32),
    /// `octet-string`, tag 9.
    OctetString(Vec<u8>),
    /// `visible-string`, tag 10, its bytes unchecked.
    VisibleString(Vec<u8>),
    /// `utf8-string`, tag 12, its bytes unchecked.
    Utf8String(Vec<u8>),
    /// `bcd`, tag 13.
    Bcd(u8),
    /// `integer`, tag 15.
    Integer(i8),
    /// `long`, tag 16.
    Long(i16),
    /// `unsigned`, tag 17.
    Unsigned(u8),
    /// `long-unsigned`, tag 18.
    LongUnsigned(u16),
    /// `long64`, tag 20.
    Long64(i64),
    /// `long64-unsigned`, tag 21.
    Long64Unsigned(u64),
    /// `enum`, tag 22.
    Enum(u8),
    /// `float32`, tag 23, as its four bytes.
    Float32([u8; 4]),
    /// `float64`, tag 24, as its eight bytes.
    Float64([u8; 8]),
    /// `date-time`, tag 25.
    DateTime([u8; 12]),
    /// `date`, tag 26.
    Date([u8; 5]),
    /// `time`, tag 27.
    Time([u8; 4]),
    /// `dont-care`, tag 255.
    DontCare,
}

impl Data {
    /// Reads one value, and refuses values nested deeper than 16.
    pub fn read(reader: &mut Reader<'_>) -> Result<Self, Error> {
        Self::read_at_depth(reader, 0)
    }

    /// Reads `bytes`, which are one value and nothing else.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::new(bytes);
        let data = Self::read(&mut reader)?;
        reader.finish()?;
        Ok(data)
    }

    /// The value with its tag.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.write(&mut out);
        out
    }

    /// Appends the value with its tag.
    pub fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::NullData => out.push(0),
            Self::Array(items) => Self::write_items(1, items, out),
            Self::Structure(items) => Self::write_items(2, items, out),
            Self::Boolean(value) => out.extend([3, u8::from(*value)]),
            Self::BitString(bits, bytes) => {
                out.push(4);
                write_length(usize::from(*bits), out);
                out.extend(bytes);
            }
            Self::DoubleLong(value) => Self::write_fixed(5, &value.to_be_bytes(), out),
            Self::DoubleLongUnsigned(value) => Self::write_fixed(6, &value.to_be_bytes(), out),
            Self::OctetString(bytes) => Self::write_string(9, bytes, out),
            Self::VisibleString(bytes) => Self::write_string(10, bytes, out),
            Self::Utf8String(bytes) => Self::write_string(12, bytes, out),
            Self::Bcd(value) => out.extend([13, *value]),
            Self::Integer(value) => Self::write_fixed(15, &value.to_be_bytes(), out),
            Self::Long(value) => Self::write_fixed(16, &value.to_be_bytes(), out),
            Self::Unsigned(value) => out.extend([17, *value]),
            Self::LongUnsigned(value) => Self::write_fixed(18, &value.to_be_bytes(), out),
            Self::Long64(value) => Self::write_fixed(20, &value.to_be_bytes(), out),
            Self::Long64Unsigned(value) => Self::write_fixed(21, &value.to_be_bytes(), out),
            Self::Enum(value) => out.extend([22, *value]),
            Self::Float32(bytes) => Self::write_fixed(23, bytes, out),
            Self::Float64(bytes) => Self::write_fixed(24, bytes, out),
            Self::DateTime(bytes) => Self::write_fixed(25, bytes, out),
            Self::Date(bytes) => Self::write_fixed(26, bytes, out),
            Self::Time(bytes) => Self::write_fixed(27, bytes, out),
            Self::DontCare => out.push(255),
        }
    }

    fn read_at_depth(reader: &mut Reader<'_>, depth: usize) -> Result<Self, Error> {
        if depth > MAX_DEPTH {
            return Err(Error::malformed("data", "is nested deeper than 16"));
        }
        Ok(match reader.u8()? {
            0 => Self::NullData,
            1 => Self::Array(Self::read_items(reader, depth)?),
            2 => Self::Structure(Self::read_items(reader, depth)?),
            3 => Self::Boolean(reader.u8()? != 0),
            4 => {
                let bits = u16::try_from(reader.length()?)
                    .map_err(|_| Error::malformed("bit-string", "is longer than an APDU"))?;
                Self::BitString(bits, reader.take(usize::from(bits.div_ceil(8)))?.to_vec())
            }
            5 => Self::DoubleLong(i32::from_be_bytes(reader.array()?)),
            6 => Self::DoubleLongUnsigned(reader.u32()?),
            9 => Self::OctetString(reader.octet_string()?.to_vec()),
            10 => Self::VisibleString(reader.octet_string()?.to_vec()),
            12 => Self::Utf8String(reader.octet_string()?.to_vec()),
            13 => Self::Bcd(reader.u8()?),
            15 => Self::Integer(i8::from_be_bytes(reader.array()?)),
            16 => Self::Long(i16::from_be_bytes(reader.array()?)),
            17 => Self::Unsigned(reader.u8()?),
            18 => Self::LongUnsigned(reader.u16()?),
            20 => Self::Long64(i64::from_be_bytes(reader.array()?)),
            21 => Self::Long64Unsigned(u64::from_be_bytes(reader.array()?)),
            22 => Self::Enum(reader.u8()?),
            23 => Self::Float32(reader.array()?),
            24 => Self::Float64(reader.array()?),
            25 => Self::DateTime(reader.array()?),
            26 => Self::Date(reader.array()?),
            27 => Self::Time(reader.array()?),
            255 => Self::DontCare,
            _ => return Err(Error::malformed("data", "has an unknown tag")),
        })
    }

    fn read_items(reader: &mut Reader<'_>, depth: usize) -> Result<Vec<Self>, Error> {
        let count = reader.length()?;
        // Each item has one byte or more: a larger count is wrong, and must not reserve memory.
        if count > reader.remaining() {
            return Err(Error::malformed("array or structure", "ends too early"));
        }
        (0..count).map(|_| Self::read_at_depth(reader, depth + 1)).collect()
    }

    fn write_items(tag: u8, items: &[Self], out: &mut Vec<u8>) {
        out.push(tag);
        write_length(items.len(), out);
        for item in items {
            item.write(out);
        }
    }

    fn write_string(tag: u8, bytes: &[u8], out: &mut Vec<u8>) {
        out.push(tag);
        write_octet_string(bytes, out);
    }

    fn write_fixed(tag: u8, bytes: &[u8], out: &mut Vec<u8>) {
        out.push(tag);
        out.extend(bytes);
    }
}

/// Appends a length: one byte below 128, else `81`, `82` … and the bytes of the length. BER and
/// A-XDR write it alike.
pub fn write_length(length: usize, out: &mut Vec<u8>) {
    if length < 0x80 {
        out.push(length as u8);
        return;
    }
    let bytes = length.to_be_bytes();
    let significant = bytes.iter().skip_while(|byte| **byte == 0);
    out.push(0x80 | significant.clone().count() as u8);
    out.extend(significant);
}

/// Appends a length and the bytes.
pub fn write_octet_string(bytes: &[u8], out: &mut Vec<u8>) {
    write_length(bytes.len(), out);
    out.extend(bytes);
}

/// Reads untrusted bytes from front to back. It never reads past the end and never panics.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts at the front of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// How many bytes are left.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// The next `count` bytes.
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], Error> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(Error::malformed("APDU", "ends too early"))?;
        self.rest = rest;
        Ok(taken)
    }

    /// All that is left.
    pub fn take_rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// The next `N` bytes as an array.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(Error::malformed("APDU", "ends too early"))?;
        self.rest = rest;
        Ok(*taken)
    }

    /// The next byte.
    pub fn u8(&mut self) -> Result<u8, Error> {
        let [byte] = self.array()?;
        Ok(byte)
    }

    /// The next two bytes, big endian.
    pub fn u16(&mut self) -> Result<u16, Error> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    /// The next four bytes, big endian.
    pub fn u32(&mut self) -> Result<u32, Error> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    /// A length as [`write_length`] writes it, of at most four bytes.
    pub fn length(&mut self) -> Result<usize, Error> {
        let first = self.u8()?;
        if first < 0x80 {
            return Ok(usize::from(first));
        }
        match first & 0x7F {
            count @ 1..=4 => {
                Ok(self.take(usize::from(count))?.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)))
            }
            _ => Err(Error::malformed("length", "is indefinite or too long")),
        }
    }

    /// A length and that many bytes.
    pub fn octet_string(&mut self) -> Result<&'a [u8], Error> {
        let length = self.length()?;
        self.take(length)
    }

    /// A presence octet: 0 absent, anything else present.
    pub fn present(&mut self) -> Result<bool, Error> {
        Ok(self.u8()? != 0)
    }

    /// Refuses bytes that are left over.
    pub fn finish(&self) -> Result<(), Error> {
        if self.rest.is_empty() { Ok(()) } else { Err(Error::malformed("APDU", "has bytes after its end")) }
    }
}

const MAX_DEPTH: usize = 16;
