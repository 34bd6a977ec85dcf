//! The seal that binds a row to its identity (I5), and the keys that are derived from the seal root
//! (docs/formats.md).

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::{digest, hmac};
use zeroize::Zeroizing;

use crate::{
    CampaignId, CounterDomainId, CounterJump, DeviceTypeId, GroupId, IslandName, ParseError, PrincipalId, ProposalId,
    RequestId, RootId, SystemTitle, Task, TaskWork, UnixMillis, WorkOrderId, WriterId,
};

/// The identity of a sealed row: kind and id. Both are part of the seal, so a row cannot be copied
/// to another identity.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum RowId {
    /// Kind 1: a meter.
    Meter(SystemTitle),
    /// Kind 2: a group of meters.
    Group(GroupId),
    /// Kind 3: a device type.
    DeviceType(DeviceTypeId),
    /// Kind 4: a principal.
    Principal(PrincipalId),
    /// Kind 5: a counter domain.
    CounterDomain(CounterDomainId),
    /// Kind 6: the island itself.
    Island(IslandName),
    /// Kind 7: what a principal has used of its quotas.
    QuotaUse(PrincipalId),
    /// Kind 8: a campaign.
    Campaign(CampaignId),
    /// Kind 12: a proposal.
    Proposal(ProposalId),
    /// Kind 9: the rotation to a version of a root.
    RootRotation(RootId),
    /// Kind 13: the last invitation of a handheld.
    Invitation(PrincipalId),
    /// Kind 14: a work order.
    WorkOrder(WorkOrderId),
}

impl RowId {
    /// The kind in the seal's input.
    pub const fn kind(&self) -> u8 {
        match self {
            Self::Meter(_) => 1,
            Self::Group(_) => 2,
            Self::DeviceType(_) => 3,
            Self::Principal(_) => 4,
            Self::CounterDomain(_) => 5,
            Self::Island(_) => 6,
            Self::QuotaUse(_) => 7,
            Self::Campaign(_) => 8,
            Self::Proposal(_) => 12,
            Self::RootRotation(_) => 9,
            Self::Invitation(_) => 13,
            Self::WorkOrder(_) => 14,
        }
    }

    /// Calls `read` with the id's octets: 8 (meter, group, device type), 16 (counter domain,
    /// campaign, proposal), 2 (root rotation), or a name in UTF-8 (at most 126).
    fn with_octets<T>(&self, read: impl FnOnce(&[u8]) -> T) -> T {
        match self {
            Self::Meter(title) => read(&title.octets()),
            Self::Group(GroupId(number)) | Self::DeviceType(DeviceTypeId(number)) => read(&number.to_be_bytes()),
            Self::Principal(principal) | Self::QuotaUse(principal) | Self::Invitation(principal) => {
                read(principal.to_string().as_bytes())
            }
            Self::CounterDomain(domain) => read(&domain.0),
            Self::Island(island) => read(island.as_str().as_bytes()),
            Self::Campaign(campaign) => read(&campaign.octets()),
            Self::Proposal(proposal) => read(&proposal.octets()),
            Self::RootRotation(root) => read(&root.octets()),
            Self::WorkOrder(order) => read(order.as_str().as_bytes()),
        }
    }
}

impl fmt::Display for RowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Meter(title) => write!(f, "meter {title}"),
            Self::Group(group) => write!(f, "group {}", group.0),
            Self::DeviceType(device_type) => write!(f, "device type {}", device_type.0),
            Self::Principal(principal) => write!(f, "principal {principal}"),
            Self::CounterDomain(domain) => write!(f, "counter domain {domain}"),
            Self::Island(island) => write!(f, "island {island}"),
            Self::QuotaUse(principal) => write!(f, "quota use of {principal}"),
            Self::Campaign(campaign) => write!(f, "campaign {campaign}"),
            Self::Proposal(proposal) => write!(f, "proposal {proposal}"),
            Self::RootRotation(root) => write!(f, "root rotation {root}"),
            Self::Invitation(handheld) => write!(f, "invitation of {handheld}"),
            Self::WorkOrder(order) => write!(f, "work order {order}"),
        }
    }
}

/// How often a row was written: from 1, one more each write. Writes compare and swap it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(u64);

impl Generation {
    /// The generation of a new row.
    pub const FIRST: Self = Self(1);

    /// The generation of a database column.
    ///
    /// # Errors
    /// The number is below 1.
    pub fn from_i64(number: i64) -> Result<Self, ParseError> {
        match u64::try_from(number) {
            Ok(number) if number > 0 => Ok(Self(number)),
            _ => Err(ParseError::new("generation", format!("`{number}` is below 1"))),
        }
    }

    /// The number as a database column.
    pub const fn as_i64(self) -> i64 {
        // Never above i64::MAX, by `from_i64` and `next`.
        self.0.cast_signed()
    }

    /// The number.
    pub const fn number(self) -> u64 {
        self.0
    }

    /// The generation of the next write.
    pub const fn next(self) -> Self {
        // 2⁶³ writes of one row never happen; the bound keeps the column's type.
        if self.0 == i64::MAX as u64 { self } else { Self(self.0 + 1) }
    }
}

/// The column `seal`: `format(1) ‖ seal key version(1) ‖ MAC(16)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowSeal([u8; 18]);

impl RowSeal {
    /// The seal of a database column.
    ///
    /// # Errors
    /// Not 18 octets, or another format than 1.
    pub fn from_octets(octets: &[u8]) -> Result<Self, ParseError> {
        let seal: [u8; 18] = octets
            .try_into()
            .map_err(|_| ParseError::new("row seal", format!("{} octets instead of 18", octets.len())))?;
        match seal {
            [FORMAT, _, ..] => Ok(Self(seal)),
            [format, ..] => Err(ParseError::new(
                "row seal",
                format!("format {format} is unknown: a newer version of the server wrote it"),
            )),
        }
    }

    /// The 18 octets.
    pub const fn octets(&self) -> &[u8; 18] {
        &self.0
    }

    /// The version of the seal key that made it.
    pub const fn key_version(&self) -> u8 {
        let [_, version, ..] = self.0;
        version
    }

    fn mac(&self) -> &[u8] {
        self.0.get(2..).unwrap_or_default()
    }
}

/// The key that seals rows, in the server's memory. aws-lc zeroizes it when it is dropped.
pub struct SealKey {
    version: u8,
    key: hmac::Key,
}

impl SealKey {
    /// The seal key that the HSM derived from the seal root for this version, 32 octets.
    pub fn new(version: u8, key: &Zeroizing<[u8; 32]>) -> Self {
        Self { version, key: hmac::Key::new(hmac::HMAC_SHA256, key.as_slice()) }
    }

    /// The version.
    pub const fn version(&self) -> u8 {
        self.version
    }

    /// Seals a row: its identity, its generation and its body.
    pub fn seal(&self, id: &RowId, generation: Generation, body: &[u8]) -> RowSeal {
        let mut context = hmac::Context::with_key(&self.key);
        write_input(self.version, id, generation, body, |part| context.update(part));
        let mut seal = [0; 18];
        for (octet, value) in seal.iter_mut().zip([FORMAT, self.version].iter().chain(context.sign().as_ref())) {
            *octet = *value;
        }
        RowSeal(seal)
    }

    /// Checks a row read from the database, in constant time. The generation must be the row's own
    /// column.
    ///
    /// # Errors
    /// The seal is of another key version, or does not fit: the row was edited, swapped or copied.
    pub fn verify(&self, id: &RowId, generation: Generation, body: &[u8], seal: &RowSeal) -> Result<(), SealError> {
        if seal.key_version() != self.version {
            return Err(SealError::KeyVersion { id: id.clone(), expected: self.version, found: seal.key_version() });
        }
        let expected = self.seal(id, generation, body);
        aws_lc_rs::constant_time::verify_slices_are_equal(expected.mac(), seal.mac())
            .map_err(|_| SealError::Mismatch { id: id.clone() })
    }

    /// Binds the answer to a request to its caller, its content, and the time until which it can be
    /// repeated (I4, I5): `HMAC-SHA-256(seal key, "meterkms/answered-request" ‖ len(principal)(1) ‖
    /// principal ‖ request(16) ‖ chunk(4) ‖ digest(32) ‖ expires(8) ‖ outcome)[0..16]`.
    pub fn seal_request(
        &self,
        principal: &PrincipalId,
        request: RequestId,
        chunk: u32,
        digest: &[u8; 32],
        expires: UnixMillis,
        outcome: &[u8],
    ) -> [u8; 16] {
        let (principal, expires) = (principal.to_string(), expires.0.to_be_bytes());
        let length = [u8::try_from(principal.len()).unwrap_or(u8::MAX)];
        let label = b"meterkms/answered-request";
        self.short_seal(&[
            label,
            &length,
            principal.as_bytes(),
            &request.octets(),
            &chunk.to_be_bytes(),
            digest,
            &expires,
            outcome,
        ])
    }

    /// As [`Self::seal_request`], of earlier versions, which did not seal the time:
    /// `HMAC-SHA-256(seal key, "meterkms/request" ‖ len(principal)(1) ‖ principal ‖ request(16) ‖
    /// chunk(4) ‖ digest(32) ‖ outcome)[0..16]`. Such a request is known, and its answer is never
    /// repeated.
    pub fn seal_untimed_request(
        &self,
        principal: &PrincipalId,
        request: RequestId,
        chunk: u32,
        digest: &[u8; 32],
        outcome: &[u8],
    ) -> [u8; 16] {
        let principal = principal.to_string();
        let length = [u8::try_from(principal.len()).unwrap_or(u8::MAX)];
        self.short_seal(&[
            b"meterkms/request",
            &length,
            principal.as_bytes(),
            &request.octets(),
            &chunk.to_be_bytes(),
            digest,
            outcome,
        ])
    }

    /// Marks what was protected under a counter (I4): `HMAC-SHA-256(seal key, "meterkms/content" ‖
    /// content)[0..16]`. Without the seal key the mark tells nothing.
    pub fn mark_content(&self, content: &[u8]) -> [u8; 16] {
        self.short_seal(&[b"meterkms/content", content])
    }

    fn short_seal(&self, parts: &[&[u8]]) -> [u8; 16] {
        let mut context = hmac::Context::with_key(&self.key);
        for part in parts {
            context.update(part);
        }
        let mut seal = [0; 16];
        for (octet, value) in seal.iter_mut().zip(context.sign().as_ref()) {
            *octet = *value;
        }
        seal
    }

    /// Seals a server's watermark file: `HMAC-SHA-256(seal key, "meterkms/watermark" ‖
    /// len(island)(1) ‖ island ‖ writer(16) ‖ sequence(8) ‖ jump(8) ‖ oldest)`, 32 octets. `oldest`
    /// is the oldest seal key version that is accepted in rows, 1 octet; nothing for version 1, as
    /// before there were others.
    pub fn seal_watermark(
        &self,
        island: &IslandName,
        writer: WriterId,
        sequence: u64,
        jump: CounterJump,
        oldest: u8,
    ) -> [u8; 32] {
        let name = island.as_str().as_bytes();
        let mut context = hmac::Context::with_key(&self.key);
        context.update(b"meterkms/watermark");
        context.update(&[u8::try_from(name.len()).unwrap_or(u8::MAX)]);
        for part in [name, &writer.octets(), &sequence.to_be_bytes(), &jump.counters().to_be_bytes()] {
            context.update(part);
        }
        if oldest > 1 {
            context.update(&[oldest]);
        }
        let mut seal = [0; 32];
        for (octet, value) in seal.iter_mut().zip(context.sign().as_ref()) {
            *octet = *value;
        }
        seal
    }

    /// Binds a task's row (I5, I6), with all that decides what a head-end may do and when:
    /// `HMAC-SHA-256(seal key, "meterkms/task-row" ‖ campaign(16) ‖ meter(8) ‖ generation(8) ‖
    /// wave(4) ‖ setup(2) ‖ key type(1) ‖ version before(4) ‖ state(1) ‖ probe(1) ‖ attempts(4) ‖
    /// due(8) ‖ fence(8) ‖ leased(8) ‖ ended(8) ‖ head-end)[0..16]`. The key type of a probe is 0.
    /// Vendor and reason, which are for reports, are not bound.
    pub fn seal_task(
        &self,
        campaign: CampaignId,
        meter: SystemTitle,
        wave: u32,
        generation: u64,
        head_end: &str,
        task: &Task,
    ) -> [u8; 16] {
        let key_type = match task.step.work {
            TaskWork::Probe => 0,
            TaskWork::Rotate(key_type) => key_type.number(),
        };
        let state = u8::try_from(task.state.number()).unwrap_or(u8::MAX);
        let mut context = hmac::Context::with_key(&self.key);
        for part in [
            b"meterkms/task-row".as_slice(),
            &campaign.octets(),
            &meter.octets(),
            &generation.to_be_bytes(),
            &wave.to_be_bytes(),
            &task.step.setup.octets(),
            &[key_type],
            &task.step.from.to_be_bytes(),
            &[state, u8::from(task.probe)],
            &task.attempts.to_be_bytes(),
            &task.due.0.to_be_bytes(),
            &task.fence.to_be_bytes(),
            &task.leased.0.to_be_bytes(),
            &task.ended.0.to_be_bytes(),
            head_end.as_bytes(),
        ] {
            context.update(part);
        }
        first_octets(context.sign().as_ref())
    }

    /// The seal of a task in earlier versions: `HMAC-SHA-256(seal key, "meterkms/task" ‖
    /// campaign(16) ‖ meter(8) ‖ wave(4))[0..16]`. It does not contain the step of the task: see
    /// [`crate::Campaign::plans_for`].
    pub fn seal_former_task(&self, campaign: CampaignId, meter: SystemTitle, wave: u32) -> [u8; 16] {
        let mut context = hmac::Context::with_key(&self.key);
        for part in [b"meterkms/task".as_slice(), &campaign.octets(), &meter.octets(), &wave.to_be_bytes()] {
            context.update(part);
        }
        first_octets(context.sign().as_ref())
    }

    /// The digest of a row that audit records carry. It needs no secret; the version is part of the
    /// sealed input.
    pub fn row_digest(&self, id: &RowId, generation: Generation, body: &[u8]) -> [u8; 16] {
        row_digest(self.version, id, generation, body)
    }
}

fn first_octets(mac: &[u8]) -> [u8; 16] {
    mac.first_chunk().copied().unwrap_or_default()
}

/// The seal keys of an island in a server's memory: the one that seals, and those of other versions
/// whose seals are accepted. Cheap to clone.
#[derive(Clone)]
pub struct SealKeys {
    keys: Vec<Arc<SealKey>>,
    current: Arc<SealKey>,
    oldest: u8,
}

impl From<SealKey> for SealKeys {
    fn from(key: SealKey) -> Self {
        let current = Arc::new(key);
        Self { oldest: 1, keys: vec![Arc::clone(&current)], current }
    }
}

impl SealKeys {
    /// With one more key, whose seals are accepted from now on if its version is not below the
    /// oldest.
    #[must_use]
    pub fn with(mut self, key: SealKey) -> Self {
        if !self.has(key.version) {
            self.keys.push(Arc::new(key));
        }
        self
    }

    /// Seals with the key of version `current` from now on, and accepts no rows with seals of
    /// versions below `oldest`. Without a key of the version nothing is changed.
    #[must_use]
    pub fn using(mut self, current: u8, oldest: u8) -> Self {
        if let Some(key) = self.key(current) {
            self.current = Arc::clone(key);
            return self.not_below(oldest);
        }
        self
    }

    /// Accepts no rows with seals of versions below `oldest` any more. A version that was refused
    /// once stays refused (I5): a lower number changes nothing.
    #[must_use]
    pub fn not_below(self, oldest: u8) -> Self {
        Self { oldest: self.oldest.max(oldest), ..self }
    }

    /// Whether there is a key of this version.
    pub fn has(&self, version: u8) -> bool {
        self.key(version).is_some()
    }

    /// The key that seals.
    pub const fn current(&self) -> &Arc<SealKey> {
        &self.current
    }

    /// The oldest version whose seals of rows are accepted.
    pub const fn oldest(&self) -> u8 {
        self.oldest
    }

    /// Checks a row by the key that it names, see [`SealKey::verify`].
    ///
    /// # Errors
    /// The key is not known or not accepted any more, or the seal does not fit.
    pub fn verify(&self, id: &RowId, generation: Generation, body: &[u8], seal: &RowSeal) -> Result<(), SealError> {
        match self.key(seal.key_version()).filter(|key| key.version >= self.oldest) {
            Some(key) => key.verify(id, generation, body, seal),
            None => {
                Err(SealError::KeyVersion { id: id.clone(), expected: self.current.version, found: seal.key_version() })
            }
        }
    }

    /// Whether an accepted key makes this seal, which does not name its key. `make` seals the
    /// content with a key.
    pub fn accept<const OCTETS: usize>(&self, seal: &[u8], make: impl Fn(&SealKey) -> [u8; OCTETS]) -> bool {
        self.made_by(seal, self.oldest, make)
    }

    /// As [`Self::accept`], with any key of the island that is still known: for files that servers
    /// keep outside the database.
    pub fn recognise<const OCTETS: usize>(&self, seal: &[u8], make: impl Fn(&SealKey) -> [u8; OCTETS]) -> bool {
        self.made_by(seal, 0, make)
    }

    fn made_by<const OCTETS: usize>(&self, seal: &[u8], oldest: u8, make: impl Fn(&SealKey) -> [u8; OCTETS]) -> bool {
        let fits = |key: &SealKey| aws_lc_rs::constant_time::verify_slices_are_equal(&make(key), seal).is_ok();
        // Nearly all seals are of the current key, so it is tried first.
        fits(&self.current)
            || self.keys.iter().any(|key| key.version >= oldest && key.version != self.current.version && fits(key))
    }

    fn key(&self, version: u8) -> Option<&Arc<SealKey>> {
        self.keys.iter().find(|key| key.version == version)
    }
}

/// The digest of a row that was sealed with this seal key version: `SHA-256(input)[0..16]`.
pub fn row_digest(seal_key_version: u8, id: &RowId, generation: Generation, body: &[u8]) -> [u8; 16] {
    let mut context = digest::Context::new(&digest::SHA256);
    write_input(seal_key_version, id, generation, body, |part| context.update(part));
    let mut truncated = [0; 16];
    for (octet, value) in truncated.iter_mut().zip(context.finish().as_ref()) {
        *octet = *value;
    }
    truncated
}

/// Why a row is not used (I5).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// Another version of the seal key made it.
    #[error(
        "the row of {id} was sealed with seal key version {found}, which this server does not have or does not accept; it seals with version {expected}"
    )]
    KeyVersion {
        /// Whose row.
        id: RowId,
        /// The version of the key at hand.
        expected: u8,
        /// The version that the row names.
        found: u8,
    },
    /// The MAC is wrong.
    #[error(
        "the seal of the row of {id} does not fit its content: the row was edited, swapped or copied in the database; run `kms audit scrub`"
    )]
    Mismatch {
        /// Whose row.
        id: RowId,
    },
}

/// A key that the HSM computes from the seal root at start: HMAC-SHA-256 over [`Self::message`], 32
/// octets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealRootKey {
    /// Seals rows.
    Seal,
    /// Chains audit records.
    AuditChain,
    /// Makes fingerprints of keys.
    Fingerprint,
}

impl SealRootKey {
    /// The message: name ‖ version(1) ‖ island.
    pub fn message(self, version: u8, island: &IslandName) -> Vec<u8> {
        let name = match self {
            Self::Seal => "meterkms/seal-key",
            Self::AuditChain => "meterkms/audit-chain-key",
            Self::Fingerprint => "meterkms/fingerprint-key",
        };
        [name.as_bytes(), &[version], island.as_str().as_bytes()].concat()
    }
}

/// The key that makes fingerprints of key values, in the server's memory. aws-lc zeroizes it when
/// it is dropped.
pub struct FingerprintKey(hmac::Key);

impl FingerprintKey {
    /// The fingerprint key that the HSM derived from the seal root, 32 octets.
    pub fn new(key: &Zeroizing<[u8; 32]>) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key.as_slice()))
    }

    /// The fingerprint of a key: the MAC of its RFC 3394 wrap under the fingerprint KEK, truncated
    /// to 16 octets.
    pub fn fingerprint(&self, wrapped: &[u8]) -> [u8; 16] {
        let mut truncated = [0; 16];
        for (octet, value) in truncated.iter_mut().zip(hmac::sign(&self.0, wrapped).as_ref()) {
            *octet = *value;
        }
        truncated
    }
}

/// `"meterkms/row" ‖ format ‖ seal key version ‖ kind ‖ len(id) ‖ id ‖ generation(8) ‖ body`.
fn write_input(seal_key_version: u8, id: &RowId, generation: Generation, body: &[u8], mut update: impl FnMut(&[u8])) {
    id.with_octets(|octets| {
        // One short piece and the body: two calls of the hash.
        let mut head = [0; 160];
        let length = u8::try_from(octets.len()).unwrap_or(u8::MAX);
        let parts: [&[u8]; 4] = [
            b"meterkms/row",
            &[FORMAT, seal_key_version, id.kind(), length],
            octets,
            &generation.number().to_be_bytes(),
        ];
        let mut used = 0;
        for (octet, value) in head.iter_mut().zip(parts.iter().flat_map(|part| part.iter())) {
            *octet = *value;
            used += 1;
        }
        update(head.get(..used).unwrap_or_default());
    });
    update(body);
}

const FORMAT: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Role;

    fn key(version: u8) -> SealKey {
        SealKey::new(version, &Zeroizing::new([7; 32]))
    }

    #[test]
    fn a_seal_holds_for_its_row_only() {
        let meter = RowId::Meter(SystemTitle::parse("4D4D4D0000BC614E").unwrap());
        let seal = key(1).seal(&meter, Generation::FIRST, b"body");
        let read = RowSeal::from_octets(seal.octets()).unwrap();
        assert_eq!(key(1).verify(&meter, Generation::FIRST, b"body", &read), Ok(()));

        let swapped = RowId::Meter(SystemTitle::parse("4D4D4D0000BC614F").unwrap());
        let other_kind = RowId::Group(GroupId(0x4D4D_4D00_00BC_614E));
        for (id, generation, body) in [
            (&swapped, Generation::FIRST, b"body".as_slice()),
            (&other_kind, Generation::FIRST, b"body"),
            (&meter, Generation::FIRST.next(), b"body"),
            (&meter, Generation::FIRST, b"bodY"),
            (&meter, Generation::FIRST, b"bod"),
        ] {
            assert_eq!(key(1).verify(id, generation, body, &read), Err(SealError::Mismatch { id: id.clone() }));
        }
        assert!(matches!(key(2).verify(&meter, Generation::FIRST, b"body", &read), Err(SealError::KeyVersion { .. })));
        assert!(RowSeal::from_octets(&[2; 18]).is_err() && RowSeal::from_octets(&[1; 17]).is_err());
    }

    #[test]
    fn seals_of_earlier_versions_are_accepted_until_they_are_retired() {
        let key = |version: u8| SealKey::new(version, &Zeroizing::new([version; 32]));
        let meter = RowId::Meter(SystemTitle::parse("4D4D4D0000BC614E").unwrap());
        let (old, new) =
            (key(1).seal(&meter, Generation::FIRST, b"body"), key(2).seal(&meter, Generation::FIRST, b"body"));
        let keys = SealKeys::from(key(1));
        let verify = |keys: &SealKeys, seal| keys.verify(&meter, Generation::FIRST, b"body", seal);
        assert!(matches!(verify(&keys, &new), Err(SealError::KeyVersion { .. })));
        // Known before it is used: another server may be faster.
        let keys = keys.with(key(2));
        assert_eq!((verify(&keys, &old), verify(&keys, &new), keys.current().version()), (Ok(()), Ok(()), 1));
        let keys = keys.using(2, 1);
        assert_eq!((verify(&keys, &old), verify(&keys, &new), keys.current().version()), (Ok(()), Ok(()), 2));
        // A seal of one version says nothing under the number of another.
        let mut forged = *old.octets();
        forged[1] = 2;
        let forged = RowSeal::from_octets(&forged).unwrap();
        assert!(matches!(verify(&keys, &forged), Err(SealError::Mismatch { .. })));
        let keys = keys.using(2, 2);
        assert!(matches!(verify(&keys, &old), Err(SealError::KeyVersion { expected: 2, found: 1, .. })));
        assert_eq!(verify(&keys, &new), Ok(()));
        assert_eq!(keys.clone().using(7, 7).current().version(), 2);
        // I5: what was retired stays so, whatever an older row of the island says.
        assert!(matches!(verify(&keys.clone().using(2, 1), &old), Err(SealError::KeyVersion { .. })));
        assert!(verify(&SealKeys::from(key(1)).with(key(2)).not_below(2).using(1, 1), &old).is_err());

        let (campaign, title) =
            (CampaignId::from_octets(&[7; 16]).unwrap(), SystemTitle::parse("4D4D4D0000BC614E").unwrap());
        let mark = |key: &SealKey| key.seal_former_task(campaign, title, 1);
        let before = mark(&key(1));
        assert!(!keys.accept(&before, mark) && keys.recognise(&before, mark) && keys.accept(&mark(&key(2)), mark));
        assert!(
            SealKeys::from(key(1)).with(key(2)).using(2, 1).accept(&before, mark)
                && !keys.recognise(&mark(&key(3)), mark)
        );
    }

    #[test]
    fn the_longest_id_fits_and_every_octet_of_it_counts() {
        let island = IslandName::parse(&"i".repeat(32)).unwrap();
        let long = |last: &str| {
            RowId::Principal(
                PrincipalId::new(island.clone(), Role::ServiceAccount, &format!("{}{last}", "p".repeat(63))).unwrap(),
            )
        };
        let digest = |id: &RowId, generation| row_digest(1, id, generation, b"");
        assert_ne!(digest(&long("a"), Generation::FIRST), digest(&long("b"), Generation::FIRST));
        assert_ne!(digest(&long("a"), Generation::FIRST), digest(&long("a"), Generation::FIRST.next()));
    }
}
