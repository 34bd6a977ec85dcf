//! Compares the keys' fingerprints with the list of fingerprints. The list is not sealed. An import
//! looks a key value up in it, so a deleted entry would let two meters with one key use separate
//! counters and repeat nonces (I4).
//!
//! The list holds the first key version with a value. Later ones are found through it, because all
//! of them name one counter domain.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use kms_domain::{CounterDomainId, Meter, Owner, SystemTitle};
use kms_proto::v1::ScrubFinding;
use kms_store::{FingerprintOwner, FingerprintPrefix, MeterFilter, MeterRow};

use super::finding::{Name, finding};
use crate::island::IslandContext;
use kms_base::error::ServiceError;

/// The walk over all imported keys, then over the list.
pub(super) struct Fingerprints<'a> {
    island: &'a IslandContext,
    after_meter: Option<SystemTitle>,
    meters_done: bool,
    after_entry: Option<(FingerprintPrefix, FingerprintOwner)>,
    findings: Vec<ScrubFinding>,
}

/// An imported key version.
#[derive(Clone, Copy)]
struct ImportedKey {
    owner: FingerprintOwner,
    fingerprint: [u8; 16],
    domain: Option<CounterDomainId>,
}

impl<'a> Fingerprints<'a> {
    pub(super) const fn new(island: &'a IslandContext) -> Self {
        Self { island, after_meter: None, meters_done: false, after_entry: None, findings: Vec::new() }
    }

    /// Checks one more page; false after the last page, and when the number of findings has reached
    /// its limit.
    pub(super) async fn step(&mut self) -> Result<bool, ServiceError> {
        if self.findings.len() >= MOST_FINDINGS {
            return Ok(false);
        }
        if self.meters_done {
            return self.entries().await;
        }
        let page = self.island.store.meter_page(&MeterFilter::default(), self.after_meter, PAGE).await?;
        self.after_meter = page.last().map(|row| row.title);
        self.meters_done = page.is_empty();
        let suspects: Vec<SystemTitle> = self.judge(&page).await?.into_iter().map(|(title, _)| title).collect();
        if !suspects.is_empty() {
            // An import may have joined two of them to one domain while they were read.
            let again = self.island.store.meters(&suspects).await?;
            let findings = self.judge(&again).await?;
            self.findings.extend(findings.into_iter().map(|(_, finding)| finding));
        }
        Ok(true)
    }

    pub(super) fn finish(self) -> Vec<ScrubFinding> {
        self.findings
    }

    /// Checks of each key of these meters whether its value is in the list, and whether all keys
    /// with this value share a counter domain.
    async fn judge(&self, rows: &[MeterRow]) -> Result<Vec<(SystemTitle, ScrubFinding)>, ServiceError> {
        let mut meters = HashMap::new();
        self.open(&mut meters, rows);
        let keys: Vec<ImportedKey> =
            rows.iter().filter_map(|row| meters.get(&row.title)).flat_map(|meter| imported_keys(meter)).collect();
        let mut prefixes: Vec<FingerprintPrefix> =
            keys.iter().map(|key| FingerprintPrefix::of(&key.fingerprint)).collect();
        prefixes.sort_unstable();
        prefixes.dedup();
        let mut entries: HashMap<FingerprintPrefix, Vec<FingerprintOwner>> = HashMap::new();
        for (prefix, owner) in self.island.store.fingerprints(&prefixes).await? {
            entries.entry(prefix).or_default().push(owner);
        }
        let others: HashSet<SystemTitle> =
            entries.values().flatten().filter_map(title_of).filter(|title| !meters.contains_key(title)).collect();
        let others: Vec<SystemTitle> = others.into_iter().collect();
        self.open(&mut meters, &self.island.store.meters(&others).await?);

        let mut findings = Vec::new();
        for key in &keys {
            let listed = entries.get(&FingerprintPrefix::of(&key.fingerprint)).map(Vec::as_slice).unwrap_or_default();
            let equal: Vec<ImportedKey> = listed
                .iter()
                .filter(|owner| **owner != key.owner)
                .filter_map(|owner| {
                    imported_key(meters.get(&title_of(owner)?)?, owner)
                        .filter(|other| other.fingerprint == key.fingerprint)
                })
                .collect();
            let Some(title) = title_of(&key.owner) else { continue };
            let what =
                format!("{} version {} of security setup {}", key.owner.key_type, key.owner.version, key.owner.setup);
            let mut found =
                |kind: &str, detail: String| findings.push((title, finding(&name_of(&key.owner), kind, detail)));
            if equal.is_empty() && !listed.contains(&key.owner) {
                found(
                    "fingerprint-missing",
                    format!(
                        "{what} is not in the list of fingerprints, so an equal key would not be found at its import (I4)"
                    ),
                );
            }
            let domain = Some(CounterDomainId(key.fingerprint));
            if let Some(other) = equal.iter().find(|other| key.domain != domain || other.domain != domain) {
                let other = title_of(&other.owner).map(|title| title.to_string()).unwrap_or_default();
                found(
                    "domain-not-shared",
                    format!("{what} equals a key of {other}, and they do not count in one domain (I4): rotate both"),
                );
            }
        }
        Ok(findings)
    }

    /// Checks of a page of the list whether each owner has a key with the listed fingerprint.
    async fn entries(&mut self) -> Result<bool, ServiceError> {
        let page = self.island.store.fingerprint_page(self.after_entry, PAGE).await?;
        self.after_entry = page.last().copied();
        let titles: HashSet<SystemTitle> = page.iter().filter_map(|(_, owner)| title_of(owner)).collect();
        let rows = self.island.store.meters(&titles.into_iter().collect::<Vec<_>>()).await?;
        let mut meters = HashMap::new();
        self.open(&mut meters, &rows);
        for (prefix, owner) in &page {
            let present = title_of(owner).is_some_and(|title| rows.iter().any(|row| row.title == title));
            let fits = match title_of(owner).and_then(|title| meters.get(&title)) {
                Some(meter) => {
                    imported_key(meter, owner).is_some_and(|key| FingerprintPrefix::of(&key.fingerprint) == *prefix)
                }
                // A row that does not verify is a finding already.
                None => present,
            };
            if !fits {
                let detail = format!(
                    "the list of fingerprints names {} version {} of it, which is no imported key with this value",
                    owner.key_type, owner.version
                );
                self.findings.push(finding(&name_of(owner), "fingerprint-stray", detail));
            }
        }
        Ok(!page.is_empty())
    }

    /// Adds the meters that verify. The walk over sealed rows reports the others.
    fn open(&self, meters: &mut HashMap<SystemTitle, Arc<Meter>>, rows: &[MeterRow]) {
        meters.extend(
            rows.iter()
                .filter_map(|row| Some((row.title, self.island.committer.open_meter(row.title, &row.row).ok()?))),
        );
    }
}

fn imported_keys(meter: &Meter) -> impl Iterator<Item = ImportedKey> {
    meter.slots.iter().flat_map(move |slot| {
        slot.versions().iter().filter_map(move |version| {
            let owner = FingerprintOwner {
                owner: meter.owner(),
                setup: slot.setup(),
                key_type: slot.key_type(),
                version: version.number(),
            };
            Some(ImportedKey { owner, fingerprint: version.fingerprint()?, domain: version.domain() })
        })
    })
}

fn imported_key(meter: &Meter, owner: &FingerprintOwner) -> Option<ImportedKey> {
    let version = meter.slots.get(owner.setup, owner.key_type)?.version(owner.version)?;
    Some(ImportedKey { owner: *owner, fingerprint: version.fingerprint()?, domain: version.domain() })
}

const fn title_of(owner: &FingerprintOwner) -> Option<SystemTitle> {
    match owner.owner {
        Owner::Meter(title) => Some(title),
        Owner::Group(_) | Owner::DeviceType(_) => None,
    }
}

fn name_of(owner: &FingerprintOwner) -> Name {
    // Kinds of sealed rows are numbered from 1, kinds of owners from 0.
    (owner.owner.kind().number() + 1, owner.owner.id().into())
}

/// With more findings than this, the list as a whole is lost.
const MOST_FINDINGS: usize = 10_000;
/// Rows of one page.
const PAGE: u32 = 1_000;
