//! The lines of a vendor's shipment (docs/formats.md), parsed one by one against the device
//! profile. This module does no cryptography: the caller checks signature, digest and count, and
//! the HSM unwraps the keys.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, de::DeserializeOwned};

use crate::{
    CounterKey, DeviceProfile, DeviceProfileName, FlagId, KeyType, ParseError, PrincipalId, Role, SecuritySetupId,
    Shipped, SystemTitle, UnixMillis,
    id::{excerpt, parse_name},
    meter::{check_batch, check_serial},
};

/// The longest line, in octets, without its line feed.
pub const LONGEST_SHIPMENT_LINE: usize = 16_384;

/// The header: line 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShipmentHeader {
    /// The vendor's name for the batch: 1–64 printable ASCII characters.
    pub batch: String,
    /// The manufacturer, which signs the shipment.
    pub manufacturer: FlagId,
    /// The device profile of all meters of the file.
    pub device_profile: DeviceProfileName,
    /// When the vendor made the file.
    pub created: UnixMillis,
    /// SHA-256 of the SubjectPublicKeyInfo of the transport key that the batch key is encrypted to.
    pub transport_key: [u8; 32],
    /// The hash of RSA-OAEP, for the label and for MGF1.
    pub oaep_hash: OaepHash,
    /// The encrypted batch key: as long as the RSA modulus, 256–1024 octets.
    pub batch_key: Vec<u8>,
}

impl ShipmentHeader {
    /// Parses the header.
    ///
    /// # Errors
    /// The line is no header; the error names the field.
    pub fn parse(line: &[u8]) -> Result<Self, ShipmentLineError> {
        let line: HeaderLine = read(line)?;
        if line.format != FORMAT {
            return Err(refuse("format", format!("`{}` is not `{FORMAT}`", excerpt(&line.format))));
        }
        if line.batch.is_empty() {
            return Err(refuse("batch", "it is empty"));
        }
        at("batch", check_batch(&line.batch))?;
        let created: jiff::Timestamp = line.created.parse().map_err(|_| {
            refuse("created", format!("`{}` is not an RFC 3339 time with an offset", excerpt(&line.created)))
        })?;
        let batch_key = STANDARD.decode(&line.batch_key).map_err(|_| refuse("batch_key", "it is not base64"))?;
        if !(256..=1024).contains(&batch_key.len()) {
            return Err(refuse("batch_key", format!("{} octets; an RSA modulus has 256 to 1024", batch_key.len())));
        }
        Ok(Self {
            manufacturer: at("manufacturer", FlagId::parse(&line.manufacturer))?,
            device_profile: at("device_profile", DeviceProfileName::parse(&line.device_profile))?,
            created: UnixMillis(created.as_millisecond()),
            transport_key: sha256("transport_key", &line.transport_key)?,
            oaep_hash: at("oaep_hash", OaepHash::parse(&line.oaep_hash))?,
            batch: line.batch,
            batch_key,
        })
    }
}

/// The hash of RSA-OAEP (RFC 8017, 7.1), used for both the label and MGF1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OaepHash {
    /// SHA-1: only for modules that have nothing else.
    Sha1,
    /// SHA-256.
    Sha256,
}

impl OaepHash {
    /// The name in shipments.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "SHA-1",
            Self::Sha256 => "SHA-256",
        }
    }

    /// The hash of this name.
    ///
    /// # Errors
    /// No hash has the name.
    pub fn parse(name: &str) -> Result<Self, ParseError> {
        [Self::Sha1, Self::Sha256]
            .into_iter()
            .find(|hash| hash.name() == name)
            .ok_or_else(|| ParseError::new("OAEP hash", format!("`{}` is neither SHA-256 nor SHA-1", excerpt(name))))
    }
}

/// A device's line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShipmentDevice {
    /// The meter.
    pub title: SystemTitle,
    /// The vendor's serial number.
    pub serial: String,
    /// Names of groups, each once: 1–64 octets of a–z, 0–9 and `-`.
    pub groups: Vec<String>,
    /// The keys: all that the profile requires, none that it does not expect, each once.
    pub keys: Vec<ShippedKey>,
    /// Counters in use before the meter came here, each client title once.
    pub counters: Vec<ShippedCounter>,
}

impl ShipmentDevice {
    /// Parses a device's line and checks it against the header and its device profile.
    ///
    /// # Errors
    /// The line is not a device line, or has keys that the profile does not expect. The error names
    /// the field.
    pub fn parse(line: &[u8], header: &ShipmentHeader, profile: &DeviceProfile) -> Result<Self, ShipmentLineError> {
        let line: DeviceLine = read(line)?;
        let title = at("title", SystemTitle::parse(&line.title))?;
        let octets = title.octets();
        let [first, second, third, ..] = octets;
        let flag_id = [first, second, third];
        if flag_id != header.manufacturer.octets()
            && !profile.other_flag_ids.iter().any(|other| other.octets() == flag_id)
        {
            return Err(refuse(
                "title",
                format!(
                    "{title} does not start with the FLAG id of {} or with another one of the device profile",
                    header.manufacturer
                ),
            ));
        }
        at("serial", check_serial(&line.serial))?;
        if line.groups.len() > LONGEST_LIST || line.keys.len() > LONGEST_LIST || line.counters.len() > LONGEST_LIST {
            return Err(refuse("groups, keys, counters", format!("a list has more than {LONGEST_LIST} entries")));
        }
        for (index, group) in line.groups.iter().enumerate() {
            at(&format!("groups[{index}]"), parse_name("group", group, 64))?;
            if line.groups.iter().take(index).any(|earlier| earlier == group) {
                return Err(refuse(format!("groups[{index}]"), "it occurs twice"));
            }
        }
        let device = Self {
            title,
            serial: line.serial,
            groups: line.groups,
            keys: line
                .keys
                .iter()
                .enumerate()
                .map(|(index, key)| key.read(index, profile))
                .collect::<Result<_, _>>()?,
            counters: line
                .counters
                .iter()
                .enumerate()
                .map(|(index, counter)| counter.read(index, profile))
                .collect::<Result<_, _>>()?,
        };
        device.check(profile)?;
        Ok(device)
    }

    fn check(&self, profile: &DeviceProfile) -> Result<(), ShipmentLineError> {
        for (index, key) in self.keys.iter().enumerate() {
            if self
                .keys
                .iter()
                .take(index)
                .any(|earlier| (earlier.setup, earlier.key_type) == (key.setup, key.key_type))
            {
                return Err(refuse(
                    format!("keys[{index}]"),
                    format!("{} {} occurs twice", key.setup, profile.key_type_name(key.key_type)),
                ));
            }
        }
        for (index, counter) in self.counters.iter().enumerate() {
            if self
                .counters
                .iter()
                .take(index)
                .any(|earlier| (earlier.setup, earlier.key) == (counter.setup, counter.key))
            {
                return Err(refuse(
                    format!("counters[{index}]"),
                    format!("{} {} occurs twice", counter.setup, counter.key),
                ));
            }
        }
        for setup in &profile.setups {
            for expected in setup.keys.iter().filter(|key| key.shipped == Shipped::Required) {
                if !self.keys.iter().any(|key| (key.setup, key.key_type) == (setup.id, expected.key_type)) {
                    return Err(refuse(
                        "keys",
                        format!("{} {} is missing", setup.id, profile.key_type_name(expected.key_type)),
                    ));
                }
            }
        }
        Ok(())
    }
}

/// A key of a device's line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShippedKey {
    /// The security setup.
    pub setup: SecuritySetupId,
    /// The type.
    pub key_type: KeyType,
    /// The key in its RFC 3394 wrap under the batch key, of a length that fits the profile.
    pub wrapped: Vec<u8>,
}

/// A counter of a device's line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShippedCounter {
    /// The security setup.
    pub setup: SecuritySetupId,
    /// Which counter: that of the client title, or that of the whole setup if the profile says that
    /// the meter has only one.
    pub key: CounterKey,
    /// The lowest counter that was never used.
    pub floor: u32,
    /// The head-end that continues to count by itself.
    pub owned_by: Option<PrincipalId>,
}

/// The last line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShipmentTrailer {
    /// How many device lines the file has.
    pub devices: u64,
    /// SHA-256 of all octets before the trailer's line.
    pub sha256: [u8; 32],
}

impl ShipmentTrailer {
    /// Whether a line is the trailer: its first member is `trailer`. A device line with such a
    /// member does not parse.
    pub fn recognise(line: &[u8]) -> bool {
        line.trim_ascii_start()
            .strip_prefix(b"{")
            .is_some_and(|rest| rest.trim_ascii_start().starts_with(b"\"trailer\""))
    }

    /// Parses the trailer.
    ///
    /// # Errors
    /// The line is no trailer; the error names the field.
    pub fn parse(line: &[u8]) -> Result<Self, ShipmentLineError> {
        let TrailerLine { trailer } = read(line)?;
        Ok(Self { devices: trailer.devices, sha256: sha256("trailer.sha256", &trailer.sha256)? })
    }
}

/// Why a line is refused. The text never repeats key material.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct ShipmentLineError {
    /// The field, for example `keys[2].wrapped`; `line` if the line as a whole is wrong.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}

// The lines as JSON. All of them are strict: an unknown member is refused.

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HeaderLine {
    format: String,
    batch: String,
    manufacturer: String,
    device_profile: String,
    created: String,
    transport_key: String,
    oaep_hash: String,
    batch_key: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceLine {
    title: String,
    serial: String,
    #[serde(default)]
    groups: Vec<String>,
    keys: Vec<KeyMember>,
    #[serde(default)]
    counters: Vec<CounterMember>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyMember {
    setup: String,
    #[serde(rename = "type")]
    key_type: String,
    wrapped: String,
}

impl KeyMember {
    fn read(&self, index: usize, profile: &DeviceProfile) -> Result<ShippedKey, ShipmentLineError> {
        let field = |name| format!("keys[{index}].{name}");
        let setup = at(&field("setup"), SecuritySetupId::parse(&self.setup))?;
        let key_type = at(&field("type"), profile.parse_key_type(&self.key_type))?;
        let expected = profile.key(setup, key_type).filter(|key| key.shipped != Shipped::No).ok_or_else(|| {
            refuse(
                field("type"),
                format!(
                    "the device profile `{}` expects no {setup} {} in a shipment",
                    profile.name,
                    excerpt(&self.key_type)
                ),
            )
        })?;
        let wrapped = hex::decode(&self.wrapped).map_err(|_| refuse(field("wrapped"), "it is not hex"))?;
        if !expected.accepts_wrapped(wrapped.len()) {
            return Err(refuse(
                field("wrapped"),
                format!("{} octets are not the length of a wrapped {}", wrapped.len(), profile.key_type_name(key_type)),
            ));
        }
        Ok(ShippedKey { setup, key_type, wrapped })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CounterMember {
    setup: String,
    client_title: String,
    floor: u32,
    owned_by: Option<String>,
}

impl CounterMember {
    fn read(&self, index: usize, profile: &DeviceProfile) -> Result<ShippedCounter, ShipmentLineError> {
        let field = |name| format!("counters[{index}].{name}");
        let setup = at(&field("setup"), SecuritySetupId::parse(&self.setup))?;
        let setup_profile = profile.setup(setup).ok_or_else(|| {
            refuse(field("setup"), format!("the device profile `{}` has no security setup {setup}", profile.name))
        })?;
        let title = at(&field("client_title"), SystemTitle::parse(&self.client_title))?;
        let owned_by = self.owned_by.as_ref().map(|uri| at(&field("owned_by"), PrincipalId::parse(uri))).transpose()?;
        if let Some(owner) = owned_by.as_ref().filter(|owner| owner.role() != Role::HeadEnd) {
            return Err(refuse(field("owned_by"), format!("`{owner}` is not a head-end")));
        }
        Ok(ShippedCounter { setup, key: setup_profile.counter.scope.key(title), floor: self.floor, owned_by })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TrailerLine {
    trailer: TrailerMember,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TrailerMember {
    devices: u64,
    sha256: String,
}

fn read<T: DeserializeOwned>(line: &[u8]) -> Result<T, ShipmentLineError> {
    if line.len() > LONGEST_SHIPMENT_LINE {
        return Err(refuse("line", format!("{} octets; at most {LONGEST_SHIPMENT_LINE}", line.len())));
    }
    // serde names the member. A quoted value is cut, and is never a secret: keys are wrapped.
    serde_json::from_slice(line)
        .map_err(|error| refuse("line", error.to_string().chars().take(200).collect::<String>()))
}

fn sha256(field: &str, text: &str) -> Result<[u8; 32], ShipmentLineError> {
    hex::decode(text)
        .ok()
        .and_then(|octets| octets.try_into().ok())
        .ok_or_else(|| refuse(field, "it is not a SHA-256 digest in 64 hex digits"))
}

fn at<T>(field: &str, result: Result<T, ParseError>) -> Result<T, ShipmentLineError> {
    result.map_err(|error| refuse(field, error.reason()))
}

fn refuse(field: impl Into<String>, reason: impl Into<String>) -> ShipmentLineError {
    ShipmentLineError { field: field.into(), reason: reason.into() }
}

const FORMAT: &str = "meterkms-shipment/1";
const LONGEST_LIST: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn header_line() -> String {
        format!(
            r#"{{"format":"meterkms-shipment/1","batch":"KAM-2026-0041","manufacturer":"KAM","device_profile":"generic-suite0","created":"2026-11-20T09:00:00Z","transport_key":"{}","oaep_hash":"SHA-256","batch_key":"{}"}}"#,
            "ab".repeat(32),
            STANDARD.encode([7; 256])
        )
    }

    fn header() -> ShipmentHeader {
        ShipmentHeader::parse(header_line().as_bytes()).unwrap()
    }

    fn profile(name: &str) -> DeviceProfile {
        DeviceProfile::parse(DeviceProfile::SHIPPED.iter().find(|(known, _)| *known == name).unwrap().1).unwrap()
    }

    fn device_line() -> String {
        let key =
            |name: &str| format!(r#"{{"setup":"0.0.43.0.0.255","type":"{name}","wrapped":"{}"}}"#, "5a".repeat(24));
        format!(
            r#"{{"title":"4B414D0000000001","serial":"10000001","groups":["north"],"keys":[{},{},{},{}],"counters":[{{"setup":"0.0.43.0.0.255","client_title":"4D4D4D0000000001","floor":1200,"owned_by":"urn:meterkms:dev:head-end:hes"}}]}}"#,
            key("KEK"),
            key("GUEK"),
            key("GBEK"),
            key("GAK")
        )
    }

    fn device(line: &str) -> Result<ShipmentDevice, ShipmentLineError> {
        ShipmentDevice::parse(line.as_bytes(), &header(), &profile("generic-suite0"))
    }

    #[test]
    fn a_shipment_is_read() {
        let header = header();
        assert_eq!(
            (header.batch.as_str(), header.created, header.batch_key.len()),
            ("KAM-2026-0041", UnixMillis(1_795_165_200_000), 256)
        );
        let device = device(&device_line()).unwrap();
        assert_eq!(device.keys.len(), 4);
        let counter = device.counters.first().unwrap();
        assert_eq!(counter.key, CounterKey::ClientTitle(SystemTitle::parse("4D4D4D0000000001").unwrap()));
        assert_eq!((counter.floor, counter.owned_by.as_ref().unwrap().name()), (1200, "hes"));
        let trailer = format!(r#" {{ "trailer" : {{"devices":1000,"sha256":"{}"}}}}"#, "0f".repeat(32));
        assert!(
            ShipmentTrailer::recognise(trailer.as_bytes()) && !ShipmentTrailer::recognise(device_line().as_bytes())
        );
        assert_eq!(ShipmentTrailer::parse(trailer.as_bytes()), Ok(ShipmentTrailer { devices: 1000, sha256: [15; 32] }));
    }

    #[test]
    fn a_wrong_device_is_refused_with_its_field() {
        for (from, to, field) in [
            ("4B414D0000000001", "4B414D00000001", "title"),
            ("4B414D0000000001", "0000000000000000", "title"),
            ("4B414D0000000001", "4C414D0000000001", "title"),
            ("\"serial\":\"10000001\"", "\"serial\":\"\"", "serial"),
            ("\"serial\":\"10000001\"", "\"serial\":7", "line"),
            ("\"serial\":\"10000001\"", "\"serial\":\"1\",\"colour\":\"red\"", "line"),
            ("[\"north\"]", "[\"north\",\"north\"]", "groups[1]"),
            ("[\"north\"]", "[\"North\"]", "groups[0]"),
            ("\"type\":\"GAK\"", "\"type\":\"GUEK\"", "keys[3]"),
            ("\"type\":\"GAK\"", "\"type\":\"FIRMWARE\"", "keys[3].type"),
            ("\"type\":\"GAK\"", "\"type\":\"?\"", "keys[3].type"),
            ("\"KEK\",\"wrapped\":\"5a", "\"KEK\",\"wrapped\":\"", "keys[0].wrapped"),
            ("\"KEK\",\"wrapped\":\"5a", "\"KEK\",\"wrapped\":\"zz", "keys[0].wrapped"),
            ("\"setup\":\"0.0.43.0.0.255\",\"client", "\"setup\":\"0.0.43.0.5.255\",\"client", "counters[0].setup"),
            ("\"floor\":1200", "\"floor\":4294967296", "line"),
            (":head-end:", ":officer:", "counters[0].owned_by"),
        ] {
            let error = device(&device_line().replacen(from, to, 1)).expect_err(to);
            assert_eq!(error.field, field, "{to}: {error}");
            assert!(!error.to_string().contains("5a5a"), "{error}");
        }
        let missing = device(&device_line().replacen(
            r#"{"setup":"0.0.43.0.0.255","type":"KEK","wrapped":"5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a"},"#,
            "",
            1,
        ));
        assert_eq!(missing.unwrap_err().to_string(), "keys: 0.0.43.0.0.255 KEK is missing");
        let too_long = device(&device_line().replacen("10000001", &"1".repeat(LONGEST_SHIPMENT_LINE), 1)).unwrap_err();
        assert_eq!(too_long.field, "line");
    }

    #[test]
    fn a_wrong_header_is_refused_with_its_field() {
        for (from, to, field) in [
            ("meterkms-shipment/1", "meterkms-shipment/2", "format"),
            ("KAM-2026-0041", "", "batch"),
            ("\"KAM\"", "\"kam\"", "manufacturer"),
            ("generic-suite0", "Generic", "device_profile"),
            ("2026-11-20T09:00:00Z", "2026-11-20", "created"),
            ("abab", "ab", "transport_key"),
            ("SHA-256", "MD5", "oaep_hash"),
            ("BwcHBwcH", "", "batch_key"),
            ("\"batch\"", "\"batches\"", "line"),
        ] {
            let error = ShipmentHeader::parse(header_line().replacen(from, to, 1).as_bytes()).expect_err(to);
            assert_eq!(error.field, field, "{to}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn a_damaged_line_never_panics(at: proptest::sample::Index, value: u8, length: proptest::sample::Index) {
            let mut line = device_line().into_bytes();
            *at.get_mut(&mut line) = value;
            let _ = ShipmentDevice::parse(&line, &header(), &profile("generic-suite0"));
            line.truncate(length.index(line.len()));
            assert!(ShipmentDevice::parse(&line, &header(), &profile("generic-suite0")).is_err());
        }
    }

    #[test]
    fn one_counter_for_the_whole_setup_where_the_profile_says_so() {
        let gateway = profile("gateway-suite0");
        let line = device_line().replacen(
            r#"{"setup":"0.0.43.0.0.255","type":"GBEK","wrapped":"5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a"},"#,
            "",
            1,
        );
        let device = ShipmentDevice::parse(line.as_bytes(), &header(), &gateway).unwrap();
        assert_eq!(device.counters.first().unwrap().key, CounterKey::Setup);
    }
}
