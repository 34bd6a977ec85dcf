//! Identifiers: each one that enters the system is parsed once, into a type of this file.

use std::{fmt, sync::Arc};

use crate::ParseError;

/// A DLMS system title: 8 octets, the first three the manufacturer's FLAG id (IEC 62056-5-3). A
/// meter's identity.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SystemTitle([u8; 8]);

impl SystemTitle {
    /// The title of these octets. All zeros are refused: meters and clients that were never
    /// personalised have that title.
    ///
    /// # Errors
    /// Not 8 octets, or all zero.
    pub fn from_octets(octets: &[u8]) -> Result<Self, ParseError> {
        let octets: [u8; 8] = octets
            .try_into()
            .map_err(|_| ParseError::new("system title", format!("{} octets instead of 8", octets.len())))?;
        if octets == [0; 8] {
            return Err(ParseError::new("system title", "all octets are zero: the device was never personalised"));
        }
        Ok(Self(octets))
    }

    /// The title of 16 hex digits.
    ///
    /// # Errors
    /// Not 16 hex digits, or all zero.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let octets = hex::decode(text)
            .map_err(|_| ParseError::new("system title", format!("`{}` is not 16 hex digits", excerpt(text))))?;
        Self::from_octets(&octets)
    }

    /// The 8 octets.
    pub const fn octets(self) -> [u8; 8] {
        self.0
    }

    /// The same bits as a signed integer: the database key.
    pub const fn as_i64(self) -> i64 {
        i64::from_be_bytes(self.0)
    }

    /// The title of a database key.
    ///
    /// # Errors
    /// The key is 0.
    pub fn from_i64(key: i64) -> Result<Self, ParseError> {
        Self::from_octets(&key.to_be_bytes())
    }
}

impl fmt::Display for SystemTitle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode_upper(self.0))
    }
}

impl fmt::Debug for SystemTitle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A manufacturer's FLAG id: three upper-case letters (DLMS UA, FLAG register).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlagId([u8; 3]);

impl FlagId {
    /// The id of three letters.
    ///
    /// # Errors
    /// Not three letters A–Z.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let octets: [u8; 3] = text
            .as_bytes()
            .try_into()
            .map_err(|_| ParseError::new("FLAG id", format!("`{}` is not three letters A to Z", excerpt(text))))?;
        if !octets.iter().all(u8::is_ascii_uppercase) {
            return Err(ParseError::new("FLAG id", format!("`{}` is not three letters A to Z", excerpt(text))));
        }
        Ok(Self(octets))
    }

    /// The letters in ASCII.
    pub const fn octets(self) -> [u8; 3] {
        self.0
    }

    /// The letters.
    pub fn as_str(&self) -> &str {
        // Only letters get in, so this never falls back.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl fmt::Display for FlagId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for FlagId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A security setup object of a meter, class 64, OBIS `0.b.43.0.e.255`: `b` and `e`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SecuritySetupId {
    b: u8,
    e: u8,
}

impl SecuritySetupId {
    /// The setup `0.0.43.0.0.255` that most meters have.
    pub const DEFAULT: Self = Self { b: 0, e: 0 };

    /// The setup of `b ‖ e`.
    pub const fn from_octets([b, e]: [u8; 2]) -> Self {
        Self { b, e }
    }

    /// The setup of an OBIS code in dotted form.
    ///
    /// # Errors
    /// Not `0.b.43.0.e.255`.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let refuse = || {
            ParseError::new(
                "security setup",
                format!("`{}` is not an OBIS code of the form 0.b.43.0.e.255", excerpt(text)),
            )
        };
        let parts = text.split('.').map(str::parse).collect::<Result<Vec<u8>, _>>().map_err(|_| refuse())?;
        match parts.as_slice() {
            [0, b, 43, 0, e, 255] => Ok(Self { b: *b, e: *e }),
            _ => Err(refuse()),
        }
    }

    /// `b ‖ e`.
    pub const fn octets(self) -> [u8; 2] {
        [self.b, self.e]
    }

    /// The OBIS code as 6 octets.
    pub const fn obis(self) -> [u8; 6] {
        [0, self.b, 43, 0, self.e, 255]
    }
}

impl fmt::Display for SecuritySetupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0.{}.43.0.{}.255", self.b, self.e)
    }
}

impl fmt::Debug for SecuritySetupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The kind of an owner of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OwnerKind {
    /// One meter.
    Meter,
    /// A group of meters: broadcast keys.
    Group,
    /// A device type: firmware keys.
    DeviceType,
}

impl OwnerKind {
    /// 0 meter, 1 group, 2 device type: the top two bits of a type octet.
    pub const fn number(self) -> u8 {
        match self {
            Self::Meter => 0,
            Self::Group => 1,
            Self::DeviceType => 2,
        }
    }
}

/// The owner of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    /// A meter, by its system title.
    Meter(SystemTitle),
    /// A group of meters.
    Group(GroupId),
    /// A device type.
    DeviceType(DeviceTypeId),
}

impl Owner {
    /// The owner's kind.
    pub const fn kind(self) -> OwnerKind {
        match self {
            Self::Meter(_) => OwnerKind::Meter,
            Self::Group(_) => OwnerKind::Group,
            Self::DeviceType(_) => OwnerKind::DeviceType,
        }
    }

    /// The owner's 8 octets within its kind.
    pub const fn id(self) -> [u8; 8] {
        match self {
            Self::Meter(title) => title.octets(),
            Self::Group(GroupId(number)) | Self::DeviceType(DeviceTypeId(number)) => number.to_be_bytes(),
        }
    }
}

/// The island's own number for a group of meters, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u64);

/// The island's own number for a device type, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceTypeId(pub u64);

/// A key version's number within its slot, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyVersionNumber(u32);

impl KeyVersionNumber {
    /// The first version of a slot.
    pub const FIRST: Self = Self(1);

    /// The version of this number.
    ///
    /// # Errors
    /// The number is 0.
    pub fn new(number: u32) -> Result<Self, ParseError> {
        if number == 0 {
            return Err(ParseError::new("key version", "versions start at 1"));
        }
        Ok(Self(number))
    }

    /// The number.
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The number after this one. It stops at the last number: no slot reaches 2³² versions.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The number as 4 octets.
    pub const fn octets(self) -> [u8; 4] {
        self.0.to_be_bytes()
    }
}

impl fmt::Display for KeyVersionNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An island's name: 1–32 octets of a–z, 0–9 and `-`, starting with a letter. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IslandName(Arc<str>);

impl IslandName {
    /// The island of this name.
    ///
    /// # Errors
    /// The name is empty, longer than 32 octets, or has other characters.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        parse_name("island", text, 32)?;
        Ok(Self(text.into()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for IslandName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The role of a principal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A head-end system.
    HeadEnd,
    /// A security officer.
    Officer,
    /// An auditor.
    Auditor,
    /// A field handheld.
    Handheld,
    /// A meter manufacturer.
    Manufacturer,
    /// A program that serves the island, such as a workforce system. It gets no keys and no frames.
    ServiceAccount,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 6] =
        [Self::HeadEnd, Self::Officer, Self::Auditor, Self::Handheld, Self::Manufacturer, Self::ServiceAccount];

    /// The name in URIs, policies and output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::HeadEnd => "head-end",
            Self::Officer => "officer",
            Self::Auditor => "auditor",
            Self::Handheld => "handheld",
            Self::Manufacturer => "manufacturer",
            Self::ServiceAccount => "service-account",
        }
    }

    /// Whether a principal of this role stands for a person (I6).
    pub const fn is_personal(self) -> bool {
        matches!(self, Self::Officer | Self::Auditor)
    }

    /// The role of this name.
    ///
    /// # Errors
    /// No role has the name.
    pub fn parse(name: &str) -> Result<Self, ParseError> {
        Self::ALL.into_iter().find(|role| role.name() == name).ok_or_else(|| {
            ParseError::new(
                "role",
                format!(
                    "`{}` is not head-end, officer, auditor, handheld, manufacturer or service-account",
                    excerpt(name)
                ),
            )
        })
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The identity of a principal: `urn:meterkms:ISLAND:ROLE:NAME`, the URI subjectAltName (RFC 5280,
/// 4.2.1.6) of its certificates. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PrincipalId {
    island: IslandName,
    role: Role,
    name: Arc<str>,
}

impl PrincipalId {
    /// A principal of `island` in `role`, named with 1–64 octets of a–z, 0–9 and `-`, starting with
    /// a letter.
    ///
    /// # Errors
    /// The name has another form.
    pub fn new(island: IslandName, role: Role, name: &str) -> Result<Self, ParseError> {
        Self::check_name(name)?;
        Ok(Self { island, role, name: name.into() })
    }

    /// Whether a principal of any island and role can have this name.
    ///
    /// # Errors
    /// It has another form.
    pub fn check_name(name: &str) -> Result<(), ParseError> {
        parse_name("principal", name, 64)
    }

    /// The principal of a URI.
    ///
    /// # Errors
    /// The URI has another form.
    pub fn parse(uri: &str) -> Result<Self, ParseError> {
        let refuse = || {
            ParseError::new("principal", format!("`{}` is not of the form urn:meterkms:ISLAND:ROLE:NAME", excerpt(uri)))
        };
        let mut parts = uri.strip_prefix("urn:meterkms:").ok_or_else(refuse)?.split(':');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(island), Some(role), Some(name), None) => {
                Self::new(IslandName::parse(island)?, Role::parse(role)?, name)
            }
            _ => Err(refuse()),
        }
    }

    /// The island that issued the certificate.
    pub const fn island(&self) -> &IslandName {
        &self.island
    }

    /// The role.
    pub const fn role(&self) -> Role {
        self.role
    }

    /// The name within island and role.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for PrincipalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "urn:meterkms:{}:{}:{}", self.island, self.role, self.name)
    }
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 16]);

        impl $name {
            /// The id of these octets.
            ///
            /// # Errors
            /// Not 16 octets, or all zero.
            pub fn from_octets(octets: &[u8]) -> Result<Self, ParseError> {
                match <[u8; 16]>::try_from(octets) {
                    Ok(octets) if octets != [0; 16] => Ok(Self(octets)),
                    Ok(_) => Err(ParseError::new($what, "all octets are zero")),
                    Err(_) => Err(ParseError::new($what, format!("{} octets instead of 16", octets.len()))),
                }
            }

            /// The id of a UUID in text form.
            ///
            /// # Errors
            /// Not a UUID, or all zero.
            pub fn parse(text: &str) -> Result<Self, ParseError> {
                let id = uuid::Uuid::parse_str(text).map_err(|_| ParseError::new($what, format!("`{}` is not a UUID", excerpt(text))))?;
                Self::from_octets(id.as_bytes())
            }

            /// The 16 octets.
            pub const fn octets(self) -> [u8; 16] {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&uuid::Uuid::from_bytes(self.0), f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

uuid_id! {
    /// A grant's id: a UUID version 7 (RFC 9562), so that ids made together are stored together.
    GrantId, "grant id"
}
uuid_id! {
    /// The id that a caller gives to a mutating request: a UUID. A second request with the same id
    /// does nothing again.
    RequestId, "request id"
}
uuid_id! {
    /// A campaign's id: the id of the request that made it.
    CampaignId, "campaign id"
}
uuid_id! {
    /// A proposal's id: the id of the request that made it.
    ProposalId, "proposal id"
}
uuid_id! {
    /// A transfer's id: the id of the request that began it.
    TransferId, "transfer id"
}
uuid_id! {
    /// One run of one server process: the writer of an audit chain and the holder of counter
    /// chunks. Random, never reused.
    WriterId, "writer id"
}

/// A work order's id: the text by which the workforce system knows it, 1–64 octets of UTF-8 without
/// control characters and without white space at the ends. It is unique within the island, and its
/// octets name the order's row. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkOrderId(Arc<str>);

impl WorkOrderId {
    /// The id of this text.
    ///
    /// # Errors
    /// The text has another form.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        if !(1..=64).contains(&text.len()) || text.trim() != text || text.chars().any(char::is_control) {
            return Err(ParseError::new(
                "work order id",
                "not 1 to 64 octets without control characters, and without white space at the ends",
            ));
        }
        Ok(Self(text.into()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkOrderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A counter domain: named by the fingerprint (16 octets) of the key value that several slots share
/// (I4).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CounterDomainId(pub [u8; 16]);

impl fmt::Display for CounterDomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for CounterDomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Checks a name of 1 to `longest` octets.
pub(crate) fn parse_name(what: &'static str, text: &str, longest: usize) -> Result<(), ParseError> {
    let well_formed = text.starts_with(|first: char| first.is_ascii_lowercase())
        && text.len() <= longest
        && text.bytes().all(|octet| octet.is_ascii_lowercase() || octet.is_ascii_digit() || octet == b'-');
    if !well_formed {
        return Err(ParseError::new(
            what,
            format!("`{}` is not 1 to {longest} of a-z, 0-9 and `-`, starting with a letter", excerpt(text)),
        ));
    }
    Ok(())
}

/// The first 64 characters, so that an error never repeats megabytes of input.
pub(crate) fn excerpt(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn titles_setups_and_principals_come_back_from_their_text() {
        for title in ["4D4D4D0000BC614E", "FFFFFFFFFFFFFFFF"] {
            let parsed = SystemTitle::parse(title).unwrap();
            assert_eq!(parsed.to_string(), title);
            assert_eq!(SystemTitle::from_i64(parsed.as_i64()), Ok(parsed));
        }
        for refused in ["", "4D4D4D0000BC61", "4D4D4D0000BC614E00", "0000000000000000", "4D4D4D0000BC614G"] {
            assert!(SystemTitle::parse(refused).is_err(), "{refused}");
        }
        let setup = SecuritySetupId::parse("0.1.43.0.7.255").unwrap();
        assert_eq!((setup.octets(), setup.to_string().as_str()), ([1, 7], "0.1.43.0.7.255"));
        for refused in ["0.1.43.0.7.254", "1.1.43.0.7.255", "0.1.43.0.7", "0.256.43.0.7.255", "0.1.43.0.7.255.0"] {
            assert!(SecuritySetupId::parse(refused).is_err(), "{refused}");
        }
        let uri = "urn:meterkms:north:head-end:hes-1";
        assert_eq!(PrincipalId::parse(uri).unwrap().to_string(), uri);
        for refused in [
            "urn:meterkms:north:head-end",
            "urn:meterkms:north:king:hes",
            "urn:meterkms:North:head-end:hes",
            "urn:meterkms:n:head-end:h:x",
        ] {
            assert!(PrincipalId::parse(refused).is_err(), "{refused}");
        }
    }
}
