//! The content of a genuine envelope: the keys of meters, their holder, and the time until which
//! they may be used.

use std::collections::HashSet;

use kms_domain::{
    EncodedSecret, GrantId, KeyType, KeyVersionNumber, PrincipalId, RequestId, SecuritySetupId, SecuritySuite,
    SystemTitle, UnixMillis,
};
use kms_proto::v1::{self as proto, Purpose};
use prost::Message as _;

use crate::{
    agreement::{Agreement, EnvelopeHeader},
    counters::Counters,
    opening::{OpenError, OpenOptions},
    secret_key::SecretKey,
};

/// An envelope that was opened: its seal, principal and expiry are verified, and every key is
/// unwrapped.
#[derive(Debug)]
pub struct OpenedEnvelope {
    /// The principal that the keys are for: that of the transport key.
    pub principal: PrincipalId,
    /// The grant.
    pub grant_id: GrantId,
    /// The request that it answers.
    pub request_id: RequestId,
    /// The number of this chunk in its batch, from 0.
    pub chunk_index: u32,
    /// The purpose of the keys; never unspecified.
    pub purpose: Purpose,
    /// When the grant was made.
    pub issued: UnixMillis,
    /// The time until which the keys may be used: the earlier one of header and manifest.
    pub not_after: UnixMillis,
    /// The keys, one entry for each meter and security setup.
    pub meters: Vec<OpenedMeter>,
    /// The keys of groups of meters, one entry for each group and security setup.
    pub groups: Vec<OpenedGroup>,
}

/// The keys of one security setup of a group of meters, for broadcasts.
#[derive(Debug)]
pub struct OpenedGroup {
    /// The island's number for the group, from 1.
    pub number: u64,
    /// Its name.
    pub name: String,
    /// The members' security setup that the keys are of.
    pub security_setup: SecuritySetupId,
    /// The suite that the members use them with.
    pub security_suite: SecuritySuite,
    /// The keys, in the server's order.
    pub keys: Vec<OpenedKey>,
    /// The counters, where a client title was given and the GBEK is among the keys.
    pub counters: Option<Counters>,
}

/// The keys of one security setup of a meter.
#[derive(Debug)]
pub struct OpenedMeter {
    /// The meter.
    pub meter: SystemTitle,
    /// The security setup that the keys are of.
    pub security_setup: SecuritySetupId,
    /// The suite that the meter uses them with.
    pub security_suite: SecuritySuite,
    /// The keys, in the server's order.
    pub keys: Vec<OpenedKey>,
    /// The counters, where a client title was given and the system owns its counter.
    pub counters: Option<Counters>,
}

/// One key.
#[derive(Debug)]
pub struct OpenedKey {
    /// Its use.
    pub key_type: KeyType,
    /// Its version; a dedicated key has none.
    pub version: Option<KeyVersionNumber>,
    /// Whether the meter may hold another version now, because a transfer is in doubt.
    pub in_doubt: bool,
    /// The octets: 16 or 32 of an AES key, 1–255 of a secret.
    pub key: SecretKey,
}

impl OpenedEnvelope {
    /// The first entry of a meter.
    pub fn meter(&self, meter: SystemTitle) -> Option<&OpenedMeter> {
        self.meters.iter().find(|entry| entry.meter == meter)
    }

    /// Parses and unwraps a manifest whose seal was verified.
    pub(crate) fn parse(
        header: &EnvelopeHeader,
        manifest: &[u8],
        agreement: &Agreement,
        own: &PrincipalId,
        options: &OpenOptions,
    ) -> Result<Self, OpenError> {
        let manifest = proto::Manifest::decode(manifest).map_err(|_| OpenError::manifest("not an encoded Manifest"))?;
        let principal = PrincipalId::parse(&manifest.principal)?;
        if principal != *own {
            return Err(OpenError::OtherPrincipal { named: principal, own: own.clone() });
        }
        let grant_id = GrantId::from_octets(&manifest.grant_id)?;
        let request_id = RequestId::from_octets(&manifest.request_id)?;
        if options.request_id.is_some_and(|expected| expected != request_id) {
            return Err(OpenError::OtherRequest { named: request_id, grant_id });
        }
        let purpose = match manifest.purpose() {
            Purpose::Unspecified => {
                return Err(OpenError::manifest(format!("purpose `{}` is unknown", manifest.purpose)));
            }
            known => known,
        };
        let issued = UnixMillis(manifest.issued_ms);
        let not_after = header.not_after.min(UnixMillis(manifest.not_after_ms));
        if issued.0 <= 0 || issued >= not_after {
            return Err(OpenError::manifest("issued_ms does not lie before not_after_ms"));
        }
        let now = options.now();
        if now >= not_after {
            return Err(OpenError::Expired { not_after, now });
        }
        let groups = manifest
            .groups
            .iter()
            .map(|keys| OpenedGroup::parse(keys, agreement, not_after))
            .collect::<Result<Vec<_>, _>>()?;
        let twice = |(at, group): (usize, &OpenedGroup)| {
            groups
                .iter()
                .take(at)
                .any(|earlier| (earlier.number, earlier.security_setup) == (group.number, group.security_setup))
        };
        if groups.iter().enumerate().any(twice) {
            return Err(OpenError::manifest("a group is in it twice"));
        }
        let mut known = HashSet::with_capacity(manifest.meters.len());
        let meters = manifest.meters.iter().map(|keys| {
            let meter = OpenedMeter::parse(keys, agreement, not_after)?;
            if !known.insert((meter.meter, meter.security_setup)) {
                return Err(OpenError::manifest(format!(
                    "meter {} setup {} is in it twice",
                    meter.meter, meter.security_setup
                )));
            }
            Ok(meter)
        });
        let meters = meters.collect::<Result<_, _>>()?;
        Ok(Self {
            principal,
            grant_id,
            request_id,
            chunk_index: manifest.chunk_index,
            purpose,
            issued,
            not_after,
            meters,
            groups,
        })
    }

    /// Adds the content of another envelope of the same answer.
    pub(crate) fn join(&mut self, other: Self) -> Result<(), OpenError> {
        let same = self.grant_id == other.grant_id
            && self.request_id == other.request_id
            && self.chunk_index == other.chunk_index
            && self.purpose == other.purpose;
        if !same {
            return Err(OpenError::manifest("the envelopes of one answer belong to different grants"));
        }
        self.not_after = self.not_after.min(other.not_after);
        for entry in other.meters {
            match self
                .meters
                .iter_mut()
                .find(|own| own.meter == entry.meter && own.security_setup == entry.security_setup)
            {
                Some(own) => own.join(entry)?,
                None => self.meters.push(entry),
            }
        }
        for entry in other.groups {
            match self
                .groups
                .iter_mut()
                .find(|own| own.number == entry.number && own.security_setup == entry.security_setup)
            {
                Some(own) => own.join(entry)?,
                None => self.groups.push(entry),
            }
        }
        Ok(())
    }
}

impl OpenedMeter {
    /// The key of a type that the meter holds as far as is known: the one that is not in doubt, or
    /// else the newest.
    pub fn key(&self, key_type: KeyType) -> Option<&OpenedKey> {
        self.keys_of(key_type).max_by_key(|key| (!key.in_doubt, key.version))
    }

    /// All keys of a type: more than one where a transfer is in doubt.
    pub fn keys_of(&self, key_type: KeyType) -> impl Iterator<Item = &OpenedKey> {
        self.keys.iter().filter(move |key| key.key_type == key_type)
    }

    fn parse(entry: &proto::MeterKeys, agreement: &Agreement, not_after: UnixMillis) -> Result<Self, OpenError> {
        let meter = SystemTitle::from_octets(&entry.meter)?;
        let refuse = |reason: &str| OpenError::manifest(format!("meter {meter}: {reason}"));
        let security_setup = match entry.security_setup.as_ref() {
            [0, b, 43, 0, e, 255] => SecuritySetupId::from_octets([*b, *e]),
            _ => return Err(refuse("security_setup is not the 6 octets 0.b.43.0.e.255")),
        };
        let security_suite = SecuritySuite::from_number(u8::try_from(entry.security_suite).unwrap_or(u8::MAX))?;
        let mut result =
            Self { meter, security_setup, security_suite, keys: Vec::with_capacity(entry.keys.len()), counters: None };
        for granted in &entry.keys {
            let key = OpenedKey::parse(granted, &format!("meter {meter}"), security_suite, agreement)?;
            result.add(key)?;
        }
        if let Some(lease) = &entry.lease {
            let client_title = SystemTitle::from_octets(&lease.client_title)?;
            let key_version = KeyVersionNumber::new(lease.key_version)?;
            // The counters belong to a version of the encryption key. If the envelope has the key,
            // it must be this version.
            if result.keys_of(KeyType::GUEK).next().is_some()
                && !result.keys_of(KeyType::GUEK).any(|key| key.version == Some(key_version))
            {
                return Err(refuse("the counter lease is for a version of the GUEK that is not in the envelope"));
            }
            result.counters = Some(
                Counters::new(client_title, key_version, lease.first, lease.count, not_after)
                    .ok_or_else(|| refuse("the counter lease is empty or runs past 32 bits"))?,
            );
        }
        Ok(result)
    }

    fn add(&mut self, key: OpenedKey) -> Result<(), OpenError> {
        if self.keys_of(key.key_type).any(|known| known.version == key.version) {
            return Err(OpenError::manifest(format!(
                "meter {}: the same version of {} is in it twice",
                self.meter, key.key_type
            )));
        }
        self.keys.push(key);
        Ok(())
    }

    fn join(&mut self, other: Self) -> Result<(), OpenError> {
        if other.security_suite != self.security_suite || (self.counters.is_some() && other.counters.is_some()) {
            return Err(OpenError::manifest(format!(
                "meter {}: the envelopes of one answer contradict each other",
                self.meter
            )));
        }
        self.counters = self.counters.take().or(other.counters);
        other.keys.into_iter().try_for_each(|key| self.add(key))
    }
}

impl OpenedGroup {
    /// The key of a type that the members hold as far as is known.
    pub fn key(&self, key_type: KeyType) -> Option<&OpenedKey> {
        self.keys.iter().filter(|key| key.key_type == key_type).max_by_key(|key| (!key.in_doubt, key.version))
    }

    fn parse(entry: &proto::GroupKeys, agreement: &Agreement, not_after: UnixMillis) -> Result<Self, OpenError> {
        let owner = format!("group {}", entry.group);
        let refuse = |reason: &str| OpenError::manifest(format!("{owner}: {reason}"));
        if entry.group == 0 {
            return Err(refuse("groups are numbered from 1"));
        }
        let well_formed = |octet: u8| octet.is_ascii_lowercase() || octet.is_ascii_digit() || octet == b'-';
        if !(1..=64).contains(&entry.name.len()) || !entry.name.bytes().all(well_formed) {
            return Err(refuse("name is not 1 to 64 of a-z, 0-9 and `-`"));
        }
        let security_setup = match entry.security_setup.as_ref() {
            [0, b, 43, 0, e, 255] => SecuritySetupId::from_octets([*b, *e]),
            _ => return Err(refuse("security_setup is not the 6 octets 0.b.43.0.e.255")),
        };
        let security_suite = SecuritySuite::from_number(u8::try_from(entry.security_suite).unwrap_or(u8::MAX))?;
        let mut result = Self {
            number: entry.group,
            name: entry.name.clone(),
            security_setup,
            security_suite,
            keys: Vec::with_capacity(entry.keys.len()),
            counters: None,
        };
        for granted in &entry.keys {
            result.add(OpenedKey::parse(granted, &owner, security_suite, agreement)?)?;
        }
        if let Some(lease) = &entry.lease {
            let client_title = SystemTitle::from_octets(&lease.client_title)?;
            let key_version = KeyVersionNumber::new(lease.key_version)?;
            // The counters belong to a version of the broadcast key. If the envelope has the key,
            // it must be this version.
            if result.key(KeyType::GBEK).is_some()
                && !result.keys.iter().any(|key| key.key_type == KeyType::GBEK && key.version == Some(key_version))
            {
                return Err(refuse("the counter lease is for a version of the GBEK that is not in the envelope"));
            }
            result.counters = Some(
                Counters::new(client_title, key_version, lease.first, lease.count, not_after)
                    .ok_or_else(|| refuse("the counter lease is empty or runs past 32 bits"))?,
            );
        }
        Ok(result)
    }

    fn add(&mut self, key: OpenedKey) -> Result<(), OpenError> {
        if key.version.is_none()
            || self.keys.iter().any(|known| known.key_type == key.key_type && known.version == key.version)
        {
            return Err(OpenError::manifest(format!(
                "group {}: {} without a version, or the same version twice",
                self.number, key.key_type
            )));
        }
        self.keys.push(key);
        Ok(())
    }

    fn join(&mut self, other: Self) -> Result<(), OpenError> {
        if other.security_suite != self.security_suite
            || other.name != self.name
            || (self.counters.is_some() && other.counters.is_some())
        {
            return Err(OpenError::manifest(format!(
                "group {}: the envelopes of one answer contradict each other",
                self.number
            )));
        }
        self.counters = self.counters.take().or(other.counters);
        other.keys.into_iter().try_for_each(|key| self.add(key))
    }
}

impl OpenedKey {
    fn parse(
        granted: &proto::GrantedKey,
        owner: &str,
        suite: SecuritySuite,
        agreement: &Agreement,
    ) -> Result<Self, OpenError> {
        let key_type = KeyType::parse(&granted.key_type)?;
        let version = match (key_type, granted.version) {
            (KeyType::DEDICATED, 0) => None,
            (KeyType::DEDICATED, _) => {
                return Err(OpenError::manifest(format!("{owner}: a dedicated key has no version")));
            }
            (_, number) => Some(KeyVersionNumber::new(number)?),
        };
        let refuse = || OpenError::Unwrap { owner: owner.to_owned(), key_type };
        let key = agreement.unwrap(&granted.wrapped).ok_or_else(refuse)?;
        let key = if key_type.is_aes() {
            // Keys that the suite's cipher uses have its length; those of other devices (M-Bus,
            // firmware) may have the other one.
            let fits = if SUITE_KEYS.contains(&key_type) {
                key.len() == suite.key_length().octets()
            } else {
                matches!(key.len(), 16 | 32)
            };
            if !fits {
                return Err(refuse());
            }
            SecretKey::copy_of(&key)
        } else {
            SecretKey::copy_of(EncodedSecret::from_octets(key).map_err(|_| refuse())?.secret())
        };
        Ok(Self { key_type, version, in_doubt: granted.in_doubt, key })
    }
}

const SUITE_KEYS: [KeyType; 5] = [KeyType::KEK, KeyType::GUEK, KeyType::GBEK, KeyType::GAK, KeyType::DEDICATED];
