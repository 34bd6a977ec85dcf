//! What a party outside the HSM could open: the ledger of exposures, and what follows from it.
//!
//! An [`Exposure`] says that a party could know one key version. Three things follow:
//!
//! - *Equal keys.* Whoever knows the key of one slot knows it in every slot that has the same
//!   value: the row of the counter domain says who that is.
//! - *KEK.* Whoever knows a KEK and recorded the traffic knows each key that left wrapped under it
//!   (IEC 62056-5-3, `key_transfer`: AES key wrap, RFC 3394). What leaves later is noted when it
//!   leaves; what had left before the party came to know the KEK is derived here.
//! - *GUEK or GBEK.* Whoever knows the encryption key and recorded authenticated frames knows the
//!   GAK that these frames were authenticated with. The GAK is not sent: it stands in the
//!   associated data (IEC 62056-5-3, security control octet ‖ AK ‖ …). But the tag of AES-GCM is
//!   GHASH(H, associated data ‖ ciphertext) ⊕ AES(EK, J0) (NIST SP 800-38D, 7.1), both H = AES(EK,
//!   0) and AES(EK, J0) follow from EK and the nonce, and GHASH is linear in the associated data.
//!   DLMS keeps 96 bits of a tag, so two frames of different lengths determine 128 bits of a GAK.
//!   This is true for a GAK that was in use together with the encryption key, and for no other.
//!
//! Nothing follows from a GAK, from a secret, or from a key that was never in use.

use crate::{
    CounterDomain, CounterDomainId, DeviceType, Exposure, ExposureReason, Group, KeyState, KeyType, KeyVersion,
    KeyVersionNumber, Meter, Party, PrincipalId, SecuritySetupId, SharedExposures, Slot, Slots, UnixMillis,
};

/// A key version that a party could know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownKey {
    /// The security setup.
    pub setup: SecuritySetupId,
    /// The key type.
    pub key_type: KeyType,
    /// The version.
    pub version: KeyVersionNumber,
    /// Who could know it.
    pub party: Party,
    /// Since when: the first time counts. For a derived key it is the time of the key that it
    /// follows from, which is never too late.
    pub since: UnixMillis,
    /// How: at least one way, each once.
    pub ways: Vec<KnownBy>,
    /// Whether it still opens anything.
    pub reach: Reach,
}

/// How a party came to know a key version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KnownBy {
    /// The ledger of this version says so.
    Ledger(ExposureReason),
    /// It knows the same value by another slot, for this reason.
    EqualKey(ExposureReason),
    /// It knows this version of the KEK, under which the key left.
    Kek(KeyVersionNumber),
    /// It knows this encryption key, whose frames the GAK authenticated.
    Frames(KeyType, KeyVersionNumber),
}

impl KnownBy {
    /// The reason in output: that of the ledger, or why the key follows from another one.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Ledger(reason) | Self::EqualKey(reason) => reason.name(),
            Self::Kek(_) => ExposureReason::TransferUnderExposedKek.name(),
            Self::Frames(..) => "frames-under-exposed-key",
        }
    }

    /// The key of the same owner that this one follows from.
    pub const fn through(self) -> Option<(KeyType, KeyVersionNumber)> {
        match self {
            Self::Ledger(_) | Self::EqualKey(_) => None,
            Self::Kek(version) => Some((KeyType::KEK, version)),
            Self::Frames(key_type, version) => Some((key_type, version)),
        }
    }
}

/// Whether a key version that somebody knows still opens anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reach {
    /// The owner uses it, as far as is known, or may use it: it left and nothing was shown since.
    Open,
    /// Another version was shown since. The meter may go back to this one until the retention time
    /// has passed (I3).
    Replaced(UnixMillis),
    /// It is no candidate any more, it was never in use, or the identity of the meter has ended.
    Closed(UnixMillis),
}

impl Reach {
    /// The name in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Replaced(_) => "replaced",
            Self::Closed(_) => "closed",
        }
    }

    /// When it was replaced, at the latest; `None` while it is open. The row of a version that was
    /// destroyed or reported since does not say exactly when it was replaced.
    pub const fn until(self) -> Option<UnixMillis> {
        match self {
            Self::Open => None,
            Self::Replaced(at) | Self::Closed(at) => Some(at),
        }
    }
}

/// What the index of exposures repeats of one row, for one party. It says what the row itself says,
/// without what other rows add.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexedExposure {
    /// The party.
    pub party: IndexedParty,
    /// How many slots have a version that it could know.
    pub slots: u32,
    /// In how many of them such a version is [`Reach::Open`].
    pub open: u32,
    /// When it last came to know one.
    pub newest: UnixMillis,
}

/// A party of the index. The vendor is missing: it knows the keys that it made, and the search
/// columns of meters say which these are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum IndexedParty {
    /// [`Party::Anyone`].
    Anyone,
    /// [`Party::Principal`].
    Principal(PrincipalId),
    /// Whoever knows a key value that several slots share: this is how these slots are found.
    KeyValue(CounterDomainId),
}

impl IndexedParty {
    /// The party, if the index has it.
    pub fn of(party: &Party) -> Option<Self> {
        match party {
            Party::Vendor => None,
            Party::Anyone => Some(Self::Anyone),
            Party::Principal(principal) => Some(Self::Principal(principal.clone())),
        }
    }
}

impl Meter {
    /// What somebody could know of the meter's own keys: all parties, or one. `shared` says who
    /// knows values that the meter shares with other owners. In order of parties, security setups,
    /// key types and versions.
    pub fn known_keys(&self, party: Option<&Party>, shared: &SharedExposures) -> Vec<KnownKey> {
        self.slots.known_keys(party, shared, self.reach())
    }

    /// What the index of exposures repeats of the row.
    pub fn indexed_exposures(&self) -> Vec<IndexedExposure> {
        self.slots.indexed(&self.reach())
    }

    /// What the index repeats of this row and not of an earlier one. Nobody forgets a key, so no
    /// entry goes. Most writes of a row change counters only, or add a party: then no other party's
    /// entry is made.
    pub fn indexed_changes(&self, before: &Self) -> Vec<IndexedExposure> {
        if self.retired == before.retired && self.slots.differ_by_exposures_only(&before.slots) {
            self.slots.indexed_of(self.slots.parties_exposed_since(&before.slots), &self.reach())
        } else {
            let known = before.indexed_exposures();
            self.indexed_exposures().into_iter().filter(|entry| !known.contains(entry)).collect()
        }
    }

    fn reach(&self) -> impl Fn(&Slot, &KeyVersion) -> Reach {
        let retired = self.retired;
        move |slot, version| match retired {
            // No server speaks to it again, under whichever key.
            Some(retired) => Reach::Closed(retired),
            None => slot.reach(version),
        }
    }
}

impl Group {
    /// As [`Meter::known_keys`].
    pub fn known_keys(&self, party: Option<&Party>, shared: &SharedExposures) -> Vec<KnownKey> {
        self.slots.known_keys(party, shared, group_reach)
    }

    /// What the index of exposures repeats of the row.
    pub fn indexed_exposures(&self) -> Vec<IndexedExposure> {
        self.slots.indexed(&group_reach)
    }
}

impl DeviceType {
    /// As [`Meter::known_keys`].
    pub fn known_keys(&self, party: Option<&Party>, shared: &SharedExposures) -> Vec<KnownKey> {
        self.slots.known_keys(party, shared, Slot::reach)
    }

    /// What the index of exposures repeats of the row.
    pub fn indexed_exposures(&self) -> Vec<IndexedExposure> {
        self.slots.indexed(&Slot::reach)
    }
}

impl CounterDomain {
    /// What the index of exposures repeats of the row: who knows the value. Which slots have it is
    /// repeated of their own rows.
    pub fn indexed_exposures(&self) -> Vec<IndexedExposure> {
        let mut entries: Vec<IndexedExposure> = Vec::new();
        for exposure in &self.exposures {
            let Some(party) = IndexedParty::of(&exposure.party) else { continue };
            match entries.iter_mut().find(|entry| entry.party == party) {
                Some(entry) => entry.newest = entry.newest.max(exposure.since),
                None => entries.push(IndexedExposure { party, slots: 0, open: 0, newest: exposure.since }),
            }
        }
        entries
    }
}

impl Slots {
    fn known_keys(
        &self,
        party: Option<&Party>,
        shared: &SharedExposures,
        reach: impl Fn(&Slot, &KeyVersion) -> Reach,
    ) -> Vec<KnownKey> {
        let parties = party.map_or_else(|| self.parties(shared), |party| vec![party]);
        let mut result = Vec::new();
        for party in parties {
            for found in self.found_by(party, shared) {
                result.push(KnownKey {
                    setup: found.slot.setup(),
                    key_type: found.slot.key_type(),
                    version: found.version.number(),
                    party: party.clone(),
                    since: found.since,
                    ways: found.ways,
                    reach: reach(found.slot, found.version),
                });
            }
        }
        result
    }

    /// Everybody who could know one of these keys, each once.
    fn parties<'a>(&'a self, shared: &'a SharedExposures) -> Vec<&'a Party> {
        let mut parties = Vec::new();
        for version in self.iter().flat_map(Slot::versions) {
            for exposure in version.exposures().iter().chain(of_value(version, shared)) {
                if !parties.contains(&&exposure.party) {
                    parties.push(&exposure.party);
                }
            }
        }
        parties
    }

    /// What a party could know: what the ledgers say, and what follows from it.
    fn found_by<'a>(&'a self, party: &Party, shared: &SharedExposures) -> Vec<Found<'a>> {
        let mut found: Vec<Found<'a>> = Vec::new();
        for slot in self.iter() {
            found.extend(slot.versions().iter().filter_map(|version| noted(slot, version, party, shared)));
        }
        let mut at = 0;
        // Each version is added once, so this loop ends.
        while let Some(one) = found.get(at).cloned() {
            at += 1;
            for new in self.following(&one) {
                if !found.iter().any(|known| known.is_same(&new)) {
                    found.push(new);
                }
            }
        }
        found.sort_by_key(|one| (one.slot.setup(), one.slot.key_type(), one.version.number()));
        found
    }

    /// What follows from one known key, in the same security setup.
    fn following<'a>(&'a self, known: &Found<'a>) -> Vec<Found<'a>> {
        let number = known.version.number();
        let following =
            |slot: &'a Slot, version: &'a KeyVersion, way| Found { slot, version, since: known.since, ways: vec![way] };
        let mut result = Vec::new();
        match known.slot.key_type() {
            KeyType::KEK => {
                for slot in self.of_setup(known.slot.setup()) {
                    let left = slot.versions().iter().filter(|version| version.transport().kek == Some(number));
                    result.extend(left.map(|version| following(slot, version, KnownBy::Kek(number))));
                }
            }
            key_type @ (KeyType::GUEK | KeyType::GBEK) => {
                if let Some(slot) = self.get(known.slot.setup(), KeyType::GAK) {
                    let used = slot.versions().iter().filter(|gak| used_together(known, slot, gak));
                    result.extend(used.map(|gak| following(slot, gak, KnownBy::Frames(key_type, number))));
                }
            }
            _ => {}
        }
        result
    }

    /// What the index repeats: of all parties, and of key values that several slots share.
    fn indexed(&self, reach: &impl Fn(&Slot, &KeyVersion) -> Reach) -> Vec<IndexedExposure> {
        let mut entries = self.indexed_of(self.parties(&SharedExposures::new()), reach);
        let of_parties = entries.len();
        for slot in self.iter() {
            let mut values: Vec<CounterDomainId> = slot.versions().iter().filter_map(KeyVersion::domain).collect();
            values.sort_unstable();
            values.dedup();
            for party in values.into_iter().map(IndexedParty::KeyValue) {
                match entries.iter_mut().skip(of_parties).find(|entry| entry.party == party) {
                    Some(entry) => entry.slots += 1,
                    None => {
                        entries.push(IndexedExposure { party, slots: 1, open: 0, newest: UnixMillis::default() });
                    }
                }
            }
        }
        entries
    }

    /// What the index repeats of these parties.
    fn indexed_of(&self, parties: Vec<&Party>, reach: &impl Fn(&Slot, &KeyVersion) -> Reach) -> Vec<IndexedExposure> {
        let nothing_shared = SharedExposures::new();
        let entry = |party: &Party| {
            let indexed = IndexedParty::of(party)?;
            let found = self.found_by(party, &nothing_shared);
            let newest = found.iter().map(|one| one.since).max()?;
            let (mut slots, mut open) = (0, 0);
            // The versions of one slot follow each other.
            let same_slot = |one: &Found<'_>, other: &Found<'_>| {
                (one.slot.setup(), one.slot.key_type()) == (other.slot.setup(), other.slot.key_type())
            };
            for of_slot in found.chunk_by(same_slot) {
                slots += 1;
                open += u32::from(of_slot.iter().any(|one| reach(one.slot, one.version) == Reach::Open));
            }
            Some(IndexedExposure { party: indexed, slots, open, newest })
        };
        parties.into_iter().filter_map(entry).collect()
    }

    /// The parties of exposures that one of two rows has and the other has not. The rows have the
    /// same versions.
    fn parties_exposed_since<'a>(&'a self, before: &'a Self) -> Vec<&'a Party> {
        let mut parties = Vec::new();
        let versions = self.iter().flat_map(Slot::versions).zip(before.iter().flat_map(Slot::versions));
        for (version, before) in versions {
            let (now, then) = (version.exposures(), before.exposures());
            if now == then {
                continue;
            }
            let differ = now.iter().filter(|one| !then.contains(one));
            for one in differ.chain(then.iter().filter(|one| !now.contains(one))) {
                if !parties.contains(&&one.party) {
                    parties.push(&one.party);
                }
            }
        }
        parties
    }

    /// Whether all is the same that decides what the index repeats, but exposures.
    fn differ_by_exposures_only(&self, before: &Self) -> bool {
        let mut slots = self.iter().zip(before.iter());
        self.iter().count() == before.iter().count()
            && slots.all(|(slot, before)| {
                let mut versions = slot.versions().iter().zip(before.versions());
                (slot.setup(), slot.key_type()) == (before.setup(), before.key_type())
                    && slot.versions().len() == before.versions().len()
                    && versions.all(|(version, before)| {
                        let (now, then) = (version.transport(), before.transport());
                        (version.number(), version.state(), version.since(), version.candidate(), version.domain())
                            == (before.number(), before.state(), before.since(), before.candidate(), before.domain())
                            && version.is_blank() == before.is_blank()
                            && (now.left, now.confirmed, now.kek) == (then.left, then.confirmed, then.kek)
                    })
            })
    }
}

/// A version that is rolled out is open: members hold it already.
fn group_reach(slot: &Slot, version: &KeyVersion) -> Reach {
    match version.state() {
        KeyState::PreActive => Reach::Open,
        _ => slot.reach(version),
    }
}

impl Slot {
    /// Whether somebody who knows this version can use it.
    fn reach(&self, version: &KeyVersion) -> Reach {
        let held = self.held();
        let shown = held.map_or(0, |held| held.transport().confirmed);
        // A meter that went back to an earlier version may return to the active one at any time.
        if version.state() == KeyState::Active
            || held.is_some_and(|held| held.number() == version.number())
            || version.candidate() && version.transport().left > shown
        {
            return Reach::Open;
        }
        let successor = self.active().filter(|active| active.number() > version.number()).map(KeyVersion::since);
        let at = match version.state() {
            KeyState::Destroyed => successor.map_or(version.since(), |since| since.min(version.since())),
            KeyState::Compromised => successor.unwrap_or_else(|| version.since()),
            _ => version.since(),
        };
        if version.candidate() { Reach::Replaced(at) } else { Reach::Closed(at) }
    }

    /// Whether a later version of this slot was in use, and this one not any more, when `other`
    /// came into use. Both moments are of the meter's own sequence; groups and device types have
    /// none, so there the times decide.
    fn is_past(&self, version: &KeyVersion, other: &KeyVersion) -> bool {
        let came = other.transport().left;
        let shown_since = version.transport().confirmed >= came;
        let mut later = self.versions().iter().filter(|later| later.number() > version.number());
        let by_moments = came > 0
            && !shown_since
            && later.any(|later| {
                let transport = later.transport();
                (1..came).contains(&transport.left) && transport.confirmed > 0
            });
        let by_times = !version.candidate()
            && version.state() != KeyState::PreActive
            && other.state() == KeyState::Active
            && version.since() <= other.since();
        by_moments || by_times
    }
}

/// A version that a party could know.
#[derive(Clone)]
struct Found<'a> {
    slot: &'a Slot,
    version: &'a KeyVersion,
    since: UnixMillis,
    ways: Vec<KnownBy>,
}

impl Found<'_> {
    fn is_same(&self, other: &Self) -> bool {
        (self.slot.setup(), self.slot.key_type(), self.version.number())
            == (other.slot.setup(), other.slot.key_type(), other.version.number())
    }
}

/// What the ledgers of a version and of its value say of a party.
fn noted<'a>(slot: &'a Slot, version: &'a KeyVersion, party: &Party, shared: &SharedExposures) -> Option<Found<'a>> {
    let mut found: Option<Found<'a>> = None;
    let own = version.exposures().iter().map(|exposure| (exposure, KnownBy::Ledger(exposure.reason)));
    let by_value = of_value(version, shared).map(|exposure| (exposure, KnownBy::EqualKey(exposure.reason)));
    for (exposure, way) in own.chain(by_value).filter(|(exposure, _)| exposure.party == *party) {
        match &mut found {
            None => found = Some(Found { slot, version, since: exposure.since, ways: vec![way] }),
            Some(found) => {
                found.since = found.since.min(exposure.since);
                // The value's ledger repeats that of the version.
                if !found.ways.contains(&KnownBy::Ledger(exposure.reason)) {
                    found.ways.push(way);
                }
            }
        }
    }
    found
}

/// Who could know the value of a version, as the row of its counter domain says.
fn of_value<'a>(version: &KeyVersion, shared: &'a SharedExposures) -> impl Iterator<Item = &'a Exposure> {
    version.domain().and_then(|domain| shared.get(&domain)).into_iter().flatten()
}

/// Whether frames may have been protected by both keys.
fn used_together(encryption: &Found<'_>, authentication: &Slot, gak: &KeyVersion) -> bool {
    was_in_use(encryption.version)
        && was_in_use(gak)
        && !encryption.slot.is_past(encryption.version, gak)
        && !authentication.is_past(gak, encryption.version)
}

/// Whether the version may ever have protected a frame: it was not only made.
fn was_in_use(version: &KeyVersion) -> bool {
    let moved = version.candidate() || version.transport().left > 0;
    match version.state() {
        KeyState::PreActive | KeyState::Compromised => moved,
        KeyState::Active | KeyState::Suspended | KeyState::Deactivated => true,
        KeyState::Destroyed => !version.is_blank(),
    }
}
