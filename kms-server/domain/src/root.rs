//! The versions of an island's roots, and the rotation from one version to the next.
//!
//! A version is *made* in the token, escrowed, and noted here. It becomes *current* when an officer
//! begins its rotation: from then on new keys and seals use it. What still uses an earlier version
//! is brought over by a pass over all rows ([`RootRotation`]), or by the meters' own rotation (what
//! is diversified). A version that nothing uses any more may be destroyed.

use std::fmt;

use crate::{
    ClassRoots, DiversificationRoot, Island, KeyClass, KeyDerivation, KeyMaterial, KeyOrigin, KeyType, KeyVersion,
    ParseError, PrincipalId, UnixMillis, WriterId,
};

/// What a root is for: the roots that have versions of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RootPurpose {
    /// AES-256: diversified keys of the class are derived from it.
    Diversification(KeyClass),
    /// AES-256: stored keys of the class are wrapped under it.
    StorageKek(KeyClass),
    /// HMAC key: sealed rows.
    Seal,
    /// RSA key pair: vendors encrypt batch keys to it.
    VendorTransport,
}

impl RootPurpose {
    /// All purposes, in the order of output.
    pub const ALL: [Self; 8] = [
        Self::Diversification(KeyClass::Kek),
        Self::Diversification(KeyClass::Session),
        Self::Diversification(KeyClass::Authentication),
        Self::StorageKek(KeyClass::Kek),
        Self::StorageKek(KeyClass::Session),
        Self::StorageKek(KeyClass::Authentication),
        Self::Seal,
        Self::VendorTransport,
    ];

    /// The purpose of this name, as labels in the token have it: `session/storage-kek`, `seal`.
    ///
    /// # Errors
    /// No purpose has the name.
    pub fn parse(name: &str) -> Result<Self, ParseError> {
        Self::ALL.into_iter().find(|purpose| purpose.to_string() == name).ok_or_else(|| {
            let names = Self::ALL.map(|purpose| purpose.to_string()).join(", ");
            ParseError::new("root", format!("`{name}` is none of {names}"))
        })
    }

    /// Its number in rows, from 1.
    pub fn number(self) -> u8 {
        match self {
            Self::Diversification(KeyClass::Kek) => 1,
            Self::Diversification(KeyClass::Session) => 2,
            Self::Diversification(_) => 3,
            Self::StorageKek(KeyClass::Kek) => 4,
            Self::StorageKek(KeyClass::Session) => 5,
            Self::StorageKek(_) => 6,
            Self::Seal => 7,
            Self::VendorTransport => 8,
        }
    }

    /// The purpose with this number.
    ///
    /// # Errors
    /// No purpose has the number.
    pub fn from_number(number: u32) -> Result<Self, ParseError> {
        Self::ALL
            .into_iter()
            .find(|purpose| u32::from(purpose.number()) == number)
            .ok_or_else(|| ParseError::new("root", format!("`{number}` is not 1 to 8")))
    }

    /// The class whose token holds it; none for roots of all classes.
    pub const fn class(self) -> Option<KeyClass> {
        match self {
            Self::Diversification(class) | Self::StorageKek(class) => Some(class),
            Self::Seal | Self::VendorTransport => None,
        }
    }

    /// Whether a pass over rows brings what uses an earlier version over to the current one. What
    /// is diversified follows as meters rotate, and a vendor's shipment is read once.
    pub const fn has_pass(self) -> bool {
        matches!(self, Self::StorageKek(_) | Self::Seal)
    }
}

impl fmt::Display for RootPurpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Diversification(class) => write!(f, "{class}/diversification"),
            Self::StorageKek(class) => write!(f, "{class}/storage-kek"),
            Self::Seal => f.write_str("seal"),
            Self::VendorTransport => f.write_str("vendor-transport"),
        }
    }
}

/// One version of one root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootId {
    /// What it is for.
    pub purpose: RootPurpose,
    /// Its version, from 1.
    pub version: u8,
}

impl RootId {
    /// The octets in seals and names of rows: purpose(1) ‖ version(1).
    pub fn octets(self) -> [u8; 2] {
        [self.purpose.number(), self.version]
    }

    /// The version of these octets.
    ///
    /// # Errors
    /// Not two octets, an unknown purpose, or version 0.
    pub fn from_octets(octets: &[u8]) -> Result<Self, ParseError> {
        match octets {
            [purpose, version @ 1..=255] => {
                Ok(Self { purpose: RootPurpose::from_number(u32::from(*purpose))?, version: *version })
            }
            _ => Err(ParseError::new("root version", format!("`{octets:02x?}` is no purpose with a version"))),
        }
    }

    /// The root that a key needs: the storage KEK that it is wrapped under, or the diversification
    /// root that it is derived from. None for a version that is destroyed.
    pub fn needed_by(key_type: KeyType, version: &KeyVersion) -> Option<Self> {
        let class = key_type.class();
        match (version.material(), version.origin()) {
            (KeyMaterial::Wrapped(wrap), _) => {
                Some(Self { purpose: RootPurpose::StorageKek(class), version: wrap.storage_kek_version() })
            }
            (KeyMaterial::Derived, KeyOrigin::Diversified { root_version, .. }) => {
                Some(Self { purpose: RootPurpose::Diversification(class), version: root_version })
            }
            _ => None,
        }
    }
}

impl fmt::Display for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.purpose, self.version)
    }
}

/// What is noted of one version: of each that was made after the ceremony, and of those that were
/// destroyed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootEntry {
    /// Which.
    pub id: RootId,
    /// How it derives keys; for diversification roots only.
    pub derivation: Option<KeyDerivation>,
    /// When it was made.
    pub made: UnixMillis,
    /// Its fingerprint: the CKA_CHECK_VALUE of a symmetric root (3 octets; empty where the module
    /// has none), or SHA-256 of a public key.
    pub fingerprint: Vec<u8>,
    /// When its destruction was decided.
    pub destroyed: Option<UnixMillis>,
}

/// The versions of an island's roots beside those of the ceremony, and which are in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootLedger {
    /// In order, each once.
    pub entries: Vec<RootEntry>,
    /// The oldest version of the seal key that is accepted in rows.
    pub oldest_seal_key_version: u8,
    /// The version of the vendor transport key that vendors are given.
    pub vendor_transport_version: u8,
    /// The oldest version of the vendor transport key that shipments may be encrypted to.
    pub oldest_vendor_transport_version: u8,
}

impl Default for RootLedger {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            oldest_seal_key_version: 1,
            vendor_transport_version: 1,
            oldest_vendor_transport_version: 1,
        }
    }
}

/// How one version stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RootStanding {
    /// Made and escrowed; nothing uses it yet.
    Made,
    /// New keys and seals use it.
    Current,
    /// Replaced by a later one, and still accepted: what was made with it may still use it.
    Replaced,
    /// Not accepted any more: a seal root or vendor transport key after its retirement.
    Retired,
    /// Its destruction was decided.
    Destroyed,
}

impl RootStanding {
    /// The name in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Made => "made",
            Self::Current => "current",
            Self::Replaced => "replaced",
            Self::Retired => "retired",
            Self::Destroyed => "destroyed",
        }
    }
}

/// Why a root version is not made, used or destroyed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RootError {
    /// The island has no such root.
    #[error("the island has no root `{purpose}`")]
    NoSuchRoot {
        /// What was asked for.
        purpose: RootPurpose,
    },
    /// There is no such version.
    #[error("there is no root `{id}`")]
    NoSuchVersion {
        /// What was asked for.
        id: RootId,
    },
    /// 255 versions were made.
    #[error("the root `{purpose}` has had 255 versions, and cannot have more")]
    NoMoreVersions {
        /// Which root.
        purpose: RootPurpose,
    },
    /// It was made already, or out of turn.
    #[error("the root `{id}` cannot be added: the next version is another")]
    NotNext {
        /// Which version.
        id: RootId,
    },
    /// It is current, or was.
    #[error("the root `{id}` is {}: there is no newer version to rotate to", standing.name())]
    NotMade {
        /// Which version.
        id: RootId,
        /// How it stands.
        standing: RootStanding,
    },
    /// It was made a moment ago.
    #[error("the root `{id}` was made {seconds} s ago; every server knows it after {settling} s")]
    NotSettled {
        /// Which version.
        id: RootId,
        /// How long ago it was made.
        seconds: i64,
        /// How long it must be.
        settling: i64,
    },
    /// It was destroyed before.
    #[error("the root `{id}` is destroyed already")]
    Destroyed {
        /// Which version.
        id: RootId,
    },
    /// It is in use, or will be.
    #[error("the root `{id}` is needed: it is {}", standing.name())]
    Needed {
        /// Which version.
        id: RootId,
        /// How it stands.
        standing: RootStanding,
    },
}

impl Island {
    /// All versions of a root that were ever made, oldest first.
    pub fn root_versions(&self, purpose: RootPurpose) -> Vec<RootId> {
        let first = match purpose {
            RootPurpose::Diversification(class) => {
                self.roots(class).is_some_and(|roots| roots.diversification.iter().any(|root| root.version == 1))
            }
            RootPurpose::StorageKek(class) => self.roots(class).is_some(),
            RootPurpose::Seal | RootPurpose::VendorTransport => true,
        };
        let later =
            self.ledger.entries.iter().map(|entry| entry.id).filter(|id| id.purpose == purpose && id.version > 1);
        first.then_some(RootId { purpose, version: 1 }).into_iter().chain(later).collect()
    }

    /// The version that new keys and seals use.
    pub fn current_root(&self, purpose: RootPurpose) -> Option<u8> {
        match purpose {
            RootPurpose::Diversification(class) => {
                self.roots(class).and_then(ClassRoots::current).map(|root| root.version)
            }
            RootPurpose::StorageKek(class) => self.roots(class).map(|roots| roots.storage_kek_version),
            RootPurpose::Seal => Some(self.seal_key_version),
            RootPurpose::VendorTransport => Some(self.ledger.vendor_transport_version),
        }
    }

    /// What is noted of a version.
    pub fn root_entry(&self, id: RootId) -> Option<&RootEntry> {
        self.ledger.entries.iter().find(|entry| entry.id == id)
    }

    /// How a version stands; none if it was never made.
    pub fn root_standing(&self, id: RootId) -> Option<RootStanding> {
        if !self.root_versions(id.purpose).contains(&id) {
            return None;
        }
        if self.root_entry(id).is_some_and(|entry| entry.destroyed.is_some()) {
            return Some(RootStanding::Destroyed);
        }
        let current = self.current_root(id.purpose).unwrap_or_default();
        let oldest = match id.purpose {
            RootPurpose::Seal => self.ledger.oldest_seal_key_version,
            RootPurpose::VendorTransport => self.ledger.oldest_vendor_transport_version,
            _ => 1,
        };
        Some(match id.version {
            version if version > current => RootStanding::Made,
            version if version == current => RootStanding::Current,
            version if version < oldest => RootStanding::Retired,
            _ => RootStanding::Replaced,
        })
    }

    /// Whether a key may be stored that needs this version: it was made, and its destruction was
    /// not decided (I3).
    pub fn may_store_under(&self, id: RootId) -> bool {
        !matches!(self.root_standing(id), None | Some(RootStanding::Destroyed))
    }

    /// The version that is to be made next. One that was made and is not current yet stands in the
    /// way of another.
    ///
    /// # Errors
    /// The island has no such root, it has had 255 versions, or the newest is not current yet.
    pub fn next_root(&self, purpose: RootPurpose) -> Result<RootId, RootError> {
        let newest = self
            .root_versions(purpose)
            .into_iter()
            .map(|id| id.version)
            .max()
            .ok_or(RootError::NoSuchRoot { purpose })?;
        let newest = RootId { purpose, version: newest };
        if self.root_standing(newest) == Some(RootStanding::Made) {
            return Err(RootError::Needed { id: newest, standing: RootStanding::Made });
        }
        let version = newest.version.checked_add(1).ok_or(RootError::NoMoreVersions { purpose })?;
        Ok(RootId { purpose, version })
    }

    /// Notes a version that was made and escrowed.
    ///
    /// # Errors
    /// It is not [`Self::next_root`].
    pub fn add_root(&mut self, entry: RootEntry) -> Result<(), RootError> {
        if self.next_root(entry.id.purpose)? != entry.id {
            return Err(RootError::NotNext { id: entry.id });
        }
        self.ledger.entries.push(entry);
        self.ledger.entries.sort_by_key(|entry| entry.id);
        Ok(())
    }

    /// Makes a version current: the one that was current before. `settling_ms` is how long ago it
    /// must have been made, so that every server knows it.
    ///
    /// # Errors
    /// It is not a version that was made and is not in use yet, or it was made a moment ago.
    pub fn activate_root(&mut self, id: RootId, settling_ms: i64, now: UnixMillis) -> Result<u8, RootError> {
        let standing = self.root_standing(id).ok_or(RootError::NoSuchVersion { id })?;
        let (RootStanding::Made, Some(entry), Some(from)) =
            (standing, self.root_entry(id).cloned(), self.current_root(id.purpose))
        else {
            return Err(RootError::NotMade { id, standing });
        };
        if entry.made.after(settling_ms) > now {
            return Err(RootError::NotSettled {
                id,
                seconds: (now.0 - entry.made.0) / 1_000,
                settling: settling_ms / 1_000,
            });
        }
        match id.purpose {
            RootPurpose::Seal => self.seal_key_version = id.version,
            RootPurpose::VendorTransport => self.ledger.vendor_transport_version = id.version,
            RootPurpose::Diversification(class) | RootPurpose::StorageKek(class) => {
                let roots = self
                    .classes
                    .iter_mut()
                    .find(|roots| roots.class == class)
                    .ok_or(RootError::NoSuchRoot { purpose: id.purpose })?;
                match (id.purpose, entry.derivation) {
                    (RootPurpose::Diversification(_), Some(derivation)) => {
                        roots.diversification.push(DiversificationRoot { version: id.version, derivation })
                    }
                    (RootPurpose::Diversification(_), None) => return Err(RootError::NotMade { id, standing }),
                    _ => roots.storage_kek_version = id.version,
                }
            }
        }
        Ok(from)
    }

    /// Accepts no version of the seal key or of the vendor transport key before the current one any
    /// more.
    ///
    /// # Errors
    /// The root is of another purpose: its versions are needed until nothing refers to them.
    pub const fn retire_roots(&mut self, purpose: RootPurpose) -> Result<(), RootError> {
        match purpose {
            RootPurpose::Seal => self.ledger.oldest_seal_key_version = self.seal_key_version,
            RootPurpose::VendorTransport => {
                self.ledger.oldest_vendor_transport_version = self.ledger.vendor_transport_version
            }
            RootPurpose::Diversification(_) | RootPurpose::StorageKek(_) => {
                return Err(RootError::NoSuchRoot { purpose });
            }
        }
        Ok(())
    }

    /// Decides that a version is destroyed. That nothing refers to it, and that people approved it
    /// (I6), is for the caller to know. One that was made and never used is given up by this, and
    /// another can be made in its place.
    ///
    /// # Errors
    /// It does not exist, or is current or accepted still.
    pub fn destroy_root(&mut self, id: RootId, now: UnixMillis) -> Result<(), RootError> {
        let standing = self.root_standing(id).ok_or(RootError::NoSuchVersion { id })?;
        if standing == RootStanding::Destroyed {
            return Err(RootError::Destroyed { id });
        }
        let replaced = matches!(id.purpose, RootPurpose::Diversification(_) | RootPurpose::StorageKek(_));
        if !(matches!(standing, RootStanding::Made | RootStanding::Retired)
            || (standing == RootStanding::Replaced && replaced))
        {
            return Err(RootError::Needed { id, standing });
        }
        match self.ledger.entries.iter_mut().find(|entry| entry.id == id) {
            Some(entry) => entry.destroyed = Some(now),
            None => {
                // Of the ceremony.
                let entry = RootEntry {
                    id,
                    derivation: None,
                    made: self.created,
                    fingerprint: Vec::new(),
                    destroyed: Some(now),
                };
                self.ledger.entries.push(entry);
                self.ledger.entries.sort_by_key(|entry| entry.id);
            }
        }
        Ok(())
    }
}

/// Where a pass is on its way over all rows. Meters come first, then rows of other kinds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct RowPlace {
    /// Which kind of rows: 0 meters, then the kinds that the pass looks at, in order.
    pub stage: u32,
    /// The id of the last row that was looked at; empty: none of this kind.
    pub after: Vec<u8>,
}

/// How a rotation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RootRotationState {
    /// The pass goes on.
    Running,
    /// An officer stopped it, or rows were refused.
    Paused,
    /// A whole round found nothing left to do.
    Finished,
}

impl RootRotationState {
    /// All states.
    pub const ALL: [Self; 3] = [Self::Running, Self::Paused, Self::Finished];

    /// The number in rows, from 1.
    pub const fn number(self) -> u32 {
        match self {
            Self::Running => 1,
            Self::Paused => 2,
            Self::Finished => 3,
        }
    }

    /// The state with this number.
    ///
    /// # Errors
    /// No state has the number.
    pub fn from_number(number: u32) -> Result<Self, ParseError> {
        Self::ALL
            .into_iter()
            .find(|state| state.number() == number)
            .ok_or_else(|| ParseError::new("root rotation state", format!("`{number}` is not 1 to 3")))
    }

    /// The name in output and records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Finished => "finished",
        }
    }
}

/// The pass that brings all rows to a version of a storage KEK or of the seal root. It is a row
/// that every server can go on from.
///
/// A pass goes in rounds. A round that found nothing to change and nothing that it had to leave is
/// the proof that nothing uses earlier versions, and ends it; after any other comes one more. So
/// what a server that did not know the new version yet wrote behind the pass is found too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootRotation {
    /// To which version.
    pub to: RootId,
    /// How it stands.
    pub state: RootRotationState,
    /// Since when.
    pub since: UnixMillis,
    /// Why it is paused; of one that has finished, why the old seal key is accepted still.
    pub reason: String,
    /// Who began it.
    pub requested_by: PrincipalId,
    /// When.
    pub began: UnixMillis,
    /// The rows that are looked at in a second, at most.
    pub rows_per_second: u32,
    /// How many rows there were when it began.
    pub rows: u64,
    /// The number of the round, from 1.
    pub round: u32,
    /// Where the round is.
    pub place: RowPlace,
    /// Rows that this round has looked at.
    pub looked: u64,
    /// Rows that this round has written.
    pub changed: u64,
    /// Rows that this round had to leave: they did not verify, or the HSM refused what they hold.
    pub refused: u64,
    /// Rows that all rounds have written.
    pub all_changed: u64,
    /// Keys that all rounds have wrapped anew.
    pub keys: u64,
    /// Which run of a server goes on with it, and until when others leave it to that one.
    pub lead: Option<(WriterId, UnixMillis)>,
}

/// What came of one page of a pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PassPage {
    /// Where it began: what the row must say.
    pub from: RowPlace,
    /// Where it ended; none: behind the last row of the last kind.
    pub next: Option<RowPlace>,
    /// Rows that were looked at.
    pub looked: u64,
    /// Rows that were written.
    pub changed: u64,
    /// Rows that had to be left.
    pub refused: u64,
    /// Keys that were wrapped anew.
    pub keys: u64,
}

impl RootRotation {
    /// A rotation that begins.
    pub fn new(to: RootId, requested_by: PrincipalId, rows_per_second: u32, rows: u64, now: UnixMillis) -> Self {
        Self {
            to,
            state: RootRotationState::Running,
            since: now,
            reason: String::new(),
            requested_by,
            began: now,
            rows_per_second,
            rows,
            round: 1,
            place: RowPlace::default(),
            looked: 0,
            changed: 0,
            refused: 0,
            all_changed: 0,
            keys: 0,
            lead: None,
        }
    }

    /// Whether this run of a server may go on now, or leaves it to another.
    pub fn may_lead(&self, writer: WriterId, now: UnixMillis) -> bool {
        self.lead.is_none_or(|(leader, until)| leader == writer || until <= now)
    }

    /// Takes a page in, in the act that writes its rows. False: another server was faster, and
    /// nothing may be written.
    pub fn advance(&mut self, page: &PassPage, writer: WriterId, lead_ms: i64, now: UnixMillis) -> bool {
        if self.state != RootRotationState::Running || self.place != page.from {
            return false;
        }
        self.lead = Some((writer, now.after(lead_ms)));
        self.looked += page.looked;
        self.changed += page.changed;
        self.refused += page.refused;
        self.all_changed += page.changed;
        self.keys += page.keys;
        match &page.next {
            Some(next) => self.place = next.clone(),
            None => self.end_round(now),
        }
        true
    }

    fn end_round(&mut self, now: UnixMillis) {
        self.place = RowPlace::default();
        self.lead = None;
        if self.refused > 0 {
            let rows = if self.refused == 1 { "1 row".to_owned() } else { format!("{} rows", self.refused) };
            self.move_to(RootRotationState::Paused, format!("{rows} had to be left"), now);
        } else if self.changed == 0 {
            self.move_to(RootRotationState::Finished, String::new(), now);
            return;
        }
        self.round += 1;
        (self.looked, self.changed, self.refused) = (0, 0, 0);
    }

    /// Stops it.
    ///
    /// # Errors
    /// It does not run.
    pub fn pause(&mut self, reason: String, now: UnixMillis) -> Result<(), RootRotationState> {
        if self.state != RootRotationState::Running {
            return Err(self.state);
        }
        self.move_to(RootRotationState::Paused, reason, now);
        Ok(())
    }

    /// Goes on where it stopped, at this rate; one that has finished looks at all rows once more.
    ///
    /// # Errors
    /// It runs.
    pub fn resume(&mut self, rows_per_second: Option<u32>, now: UnixMillis) -> Result<(), RootRotationState> {
        match self.state {
            RootRotationState::Running => return Err(self.state),
            RootRotationState::Paused => {}
            RootRotationState::Finished => {
                self.round += 1;
                (self.looked, self.changed, self.refused) = (0, 0, 0);
            }
        }
        self.rows_per_second = rows_per_second.unwrap_or(self.rows_per_second);
        self.move_to(RootRotationState::Running, String::new(), now);
        Ok(())
    }

    fn move_to(&mut self, state: RootRotationState, reason: String, now: UnixMillis) {
        self.state = state;
        self.reason = reason;
        self.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DatabaseHistory, IslandKind, IslandName, Role};

    const NOW: UnixMillis = UnixMillis(1_000_000);
    const STORAGE: RootPurpose = RootPurpose::StorageKek(KeyClass::Session);

    fn island() -> Island {
        let roots = |class| ClassRoots {
            class,
            diversification: vec![DiversificationRoot { version: 1, derivation: KeyDerivation::Sp800108Cmac }],
            storage_kek_version: 1,
        };
        Island {
            name: IslandName::parse("north").unwrap(),
            kind: IslandKind::Development,
            classes: KeyClass::WITH_ROOTS.map(roots).to_vec(),
            seal_key_version: 1,
            escrow_fingerprint: None,
            history: DatabaseHistory::default(),
            ledger: RootLedger::default(),
            principals_added: 0,
            created: NOW,
        }
    }

    fn entry(purpose: RootPurpose, version: u8) -> RootEntry {
        let derivation = matches!(purpose, RootPurpose::Diversification(_)).then_some(KeyDerivation::Sp800108Cmac);
        RootEntry {
            id: RootId { purpose, version },
            derivation,
            made: NOW,
            fingerprint: vec![1, 2, 3],
            destroyed: None,
        }
    }

    #[test]
    fn names_and_numbers_are_those_of_labels_and_rows() {
        assert_eq!(RootPurpose::parse("session/storage-kek"), Ok(STORAGE));
        assert!(RootPurpose::parse("session/seal").is_err());
        for purpose in RootPurpose::ALL {
            assert_eq!(RootPurpose::parse(&purpose.to_string()), Ok(purpose));
            let id = RootId { purpose, version: 255 };
            assert_eq!(RootId::from_octets(&id.octets()), Ok(id));
        }
        for wrong in [[0, 1].as_slice(), &[9, 1], &[1, 0], &[1], &[1, 1, 1]] {
            assert!(RootId::from_octets(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_version_is_made_becomes_current_is_replaced_and_destroyed() {
        for purpose in RootPurpose::ALL {
            let mut island = island();
            let (first, second) = (RootId { purpose, version: 1 }, RootId { purpose, version: 2 });
            assert_eq!(island.root_standing(first), Some(RootStanding::Current));
            assert_eq!(island.activate_root(second, 0, NOW), Err(RootError::NoSuchVersion { id: second }));
            assert_eq!(
                island.add_root(entry(purpose, 3)),
                Err(RootError::NotNext { id: RootId { purpose, version: 3 } })
            );
            island.add_root(entry(purpose, 2)).unwrap();
            assert_eq!(island.root_standing(second), Some(RootStanding::Made));
            // A version that was made and is not in use stands in the way of another.
            assert!(island.next_root(purpose).is_err());
            assert!(matches!(island.activate_root(second, 5_000, NOW.after(4_999)), Err(RootError::NotSettled { .. })));
            assert_eq!(island.activate_root(second, 5_000, NOW.after(5_000)), Ok(1));
            assert_eq!(
                (island.current_root(purpose), island.root_standing(first)),
                (Some(2), Some(RootStanding::Replaced))
            );
            assert!(island.activate_root(second, 0, NOW.after(5_000)).is_err());

            assert!(
                matches!(island.destroy_root(second, NOW), Err(RootError::Needed { .. })),
                "{purpose}: the current one"
            );
            if matches!(purpose, RootPurpose::Seal | RootPurpose::VendorTransport) {
                assert!(
                    matches!(island.destroy_root(first, NOW), Err(RootError::Needed { .. })),
                    "{purpose}: it is accepted still"
                );
                island.retire_roots(purpose).unwrap();
                assert_eq!(island.root_standing(first), Some(RootStanding::Retired));
            } else {
                assert!(island.retire_roots(purpose).is_err());
            }
            island.destroy_root(first, NOW).unwrap();
            assert_eq!(island.root_standing(first), Some(RootStanding::Destroyed));
            assert!(island.destroy_root(first, NOW).is_err());
            assert_eq!(island.next_root(purpose), Ok(RootId { purpose, version: 3 }));
            assert_eq!(Island::from_row(island.name.clone(), island.to_row().into()).unwrap(), island);
        }
    }

    #[test]
    fn a_module_that_derives_nothing_has_no_diversification_roots() {
        let mut island = island();
        island.classes.iter_mut().for_each(|roots| roots.diversification.clear());
        let purpose = RootPurpose::Diversification(KeyClass::Kek);
        assert_eq!(island.next_root(purpose), Err(RootError::NoSuchRoot { purpose }));
    }

    #[test]
    fn a_version_that_was_never_used_is_given_up_and_the_next_takes_its_place() {
        for purpose in RootPurpose::ALL {
            let mut island = island();
            let (second, third) = (RootId { purpose, version: 2 }, RootId { purpose, version: 3 });
            assert!(!island.may_store_under(second));
            island.add_root(entry(purpose, 2)).unwrap();
            assert!(island.may_store_under(second));
            island.destroy_root(second, NOW).unwrap();
            assert_eq!(
                (island.root_standing(second), island.current_root(purpose)),
                (Some(RootStanding::Destroyed), Some(1))
            );
            assert!(!island.may_store_under(second) && island.may_store_under(RootId { purpose, version: 1 }));
            assert!(island.activate_root(second, 0, NOW).is_err());
            island.add_root(entry(purpose, 3)).unwrap();
            assert_eq!(island.activate_root(third, 0, NOW), Ok(1));
            assert!(
                matches!(island.destroy_root(third, NOW), Err(RootError::Needed { .. })),
                "{purpose}: the current one"
            );
        }
    }

    fn writer(number: u8) -> WriterId {
        WriterId::from_octets(&[number; 16]).unwrap()
    }

    fn rotation() -> RootRotation {
        let officer = PrincipalId::new(IslandName::parse("north").unwrap(), Role::Officer, "ada").unwrap();
        RootRotation::new(RootId { purpose: STORAGE, version: 2 }, officer, 500, 10, NOW)
    }

    fn at(number: u8) -> RowPlace {
        RowPlace { stage: 0, after: vec![number] }
    }

    #[test]
    fn a_pass_ends_after_a_round_that_found_nothing() {
        let mut rotation = rotation();
        let first = PassPage { next: Some(at(5)), looked: 5, changed: 5, keys: 20, ..PassPage::default() };
        assert!(rotation.advance(&first, writer(1), 1_000, NOW));
        // The same page again, by a server that was slower or after a crash: nothing is counted
        // twice.
        assert!(!rotation.advance(&first, writer(2), 1_000, NOW));
        assert!(
            rotation.may_lead(writer(1), NOW)
                && !rotation.may_lead(writer(2), NOW)
                && rotation.may_lead(writer(2), NOW.after(1_000))
        );
        assert!(rotation.advance(&PassPage { from: at(5), looked: 5, ..PassPage::default() }, writer(2), 1_000, NOW));
        assert_eq!(
            (rotation.state, rotation.round, rotation.all_changed, rotation.keys),
            (RootRotationState::Running, 2, 5, 20)
        );
        assert!(rotation.advance(&PassPage { looked: 10, ..PassPage::default() }, writer(2), 1_000, NOW));
        assert_eq!((rotation.state, rotation.round, rotation.looked), (RootRotationState::Finished, 2, 10));
        assert!(!rotation.advance(&PassPage { looked: 10, ..PassPage::default() }, writer(2), 1_000, NOW));
        // Something was found afterwards that uses an earlier version: all rows are looked at once
        // more.
        rotation.resume(None, NOW).unwrap();
        assert_eq!((rotation.state, rotation.round, rotation.looked), (RootRotationState::Running, 3, 0));
        assert_eq!(rotation.resume(None, NOW), Err(RootRotationState::Running));
    }

    #[test]
    fn rows_that_had_to_be_left_pause_it() {
        let mut rotation = rotation();
        assert!(rotation.advance(&PassPage { looked: 10, refused: 1, ..PassPage::default() }, writer(1), 1_000, NOW));
        assert_eq!((rotation.state, rotation.reason.as_str()), (RootRotationState::Paused, "1 row had to be left"));
        assert_eq!(rotation.pause("again".to_owned(), NOW), Err(RootRotationState::Paused));
        rotation.resume(Some(9), NOW).unwrap();
        assert_eq!(
            (rotation.state, rotation.round, rotation.rows_per_second, rotation.refused),
            (RootRotationState::Running, 2, 9, 0)
        );
    }
}
