//! Reading octets with bounds.

use crate::DlmsError;

/// What is left of an APDU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
    /// Whether a length must be in its shortest form.
    shortest_lengths: bool,
}

impl<'a> Reader<'a> {
    pub(crate) const fn new(octets: &'a [u8]) -> Self {
        Self { rest: octets, shortest_lengths: false }
    }

    /// A reader that refuses a length in a longer form than it needs. A request is decided on by
    /// what it says, so there must be one way only to read it: parsers of meters differ in what
    /// they make of a longer form.
    pub(crate) const fn strict(octets: &'a [u8]) -> Self {
        Self { rest: octets, shortest_lengths: true }
    }

    pub(crate) fn octet(&mut self, what: &'static str) -> Result<u8, DlmsError> {
        let [octet] = self.array(what)?;
        Ok(octet)
    }

    pub(crate) fn array<const LENGTH: usize>(&mut self, what: &'static str) -> Result<[u8; LENGTH], DlmsError> {
        let (array, rest) = self.rest.split_first_chunk().ok_or(DlmsError::Short { what })?;
        self.rest = rest;
        Ok(*array)
    }

    pub(crate) fn take(&mut self, length: usize, what: &'static str) -> Result<&'a [u8], DlmsError> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(DlmsError::Short { what })?;
        self.rest = rest;
        Ok(taken)
    }

    /// A length in A-XDR, and a definite one in BER: one octet below 128, else the number of octets
    /// that follow with it. At most two are read: no APDU here is longer.
    pub(crate) fn length(&mut self, what: &'static str) -> Result<usize, DlmsError> {
        let (length, shortest_for): (usize, _) = match self.octet(what)? {
            short @ 0..=0x7F => (short.into(), 0),
            0x81 => (self.octet(what)?.into(), 0x80),
            0x82 => (u16::from_be_bytes(self.array(what)?).into(), 0x100),
            _ => return Err(DlmsError::invalid(what, "the length is longer than 65,535")),
        };
        if self.shortest_lengths && length < shortest_for {
            return Err(DlmsError::invalid(what, format!("length {length} is not in its shortest form")));
        }
        Ok(length)
    }

    /// A BER element of definite length: its tag, of one octet, and its content.
    pub(crate) fn element(&mut self, what: &'static str) -> Result<(u8, Self), DlmsError> {
        let tag = self.octet(what)?;
        if tag & TAG_NUMBER == TAG_NUMBER {
            return Err(DlmsError::invalid(what, format!("a tag of more than one octet ({tag:02X} ..)")));
        }
        let length = self.length(what)?;
        Ok((tag, Self { rest: self.take(length, what)?, ..*self }))
    }

    /// The content of the one BER element that is left, which must have this tag.
    pub(crate) fn only_element(mut self, tag: u8, what: &'static str) -> Result<Self, DlmsError> {
        let (found, content) = self.element(what)?;
        if found != tag {
            return Err(DlmsError::invalid(what, format!("the tag is {found:02X}, not {tag:02X}")));
        }
        self.end(what)?;
        Ok(content)
    }

    /// The presence octet of an OPTIONAL field.
    pub(crate) fn present(&mut self, what: &'static str) -> Result<bool, DlmsError> {
        match self.octet(what)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(DlmsError::invalid(what, format!("presence octet {other:#04X} is neither 00 nor 01"))),
        }
    }

    pub(crate) const fn is_empty(self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) const fn rest(self) -> &'a [u8] {
        self.rest
    }

    pub(crate) const fn end(self, what: &'static str) -> Result<(), DlmsError> {
        match self.rest.len() {
            0 => Ok(()),
            count => Err(DlmsError::Trailing { what, count }),
        }
    }
}

/// Writes a BER element.
///
/// # Errors
/// The content is longer than 65,535 octets.
pub(crate) fn write_element(
    octets: &mut Vec<u8>,
    tag: u8,
    content: &[u8],
    what: &'static str,
) -> Result<(), DlmsError> {
    octets.push(tag);
    write_length(octets, content.len(), what)?;
    octets.extend_from_slice(content);
    Ok(())
}

/// Writes a length in A-XDR, and in BER: shortest form.
///
/// # Errors
/// The length is above 65,535.
pub(crate) fn write_length(octets: &mut Vec<u8>, length: usize, what: &'static str) -> Result<(), DlmsError> {
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(short @ 0..=0x7F), _) => octets.push(short),
        (Ok(long), _) => octets.extend_from_slice(&[0x81, long]),
        (_, Ok(long)) => {
            octets.push(0x82);
            octets.extend_from_slice(&long.to_be_bytes());
        }
        _ => return Err(DlmsError::invalid(what, "the length is longer than 65,535")),
    }
    Ok(())
}

/// The number in a BER tag of one octet; all bits set announce further octets.
pub(crate) const TAG_NUMBER: u8 = 0x1F;
