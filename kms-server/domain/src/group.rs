//! Groups of meters: the broadcast keys that their members share, and the rotation of these keys.
//!
//! Each member gets a group's key by its own transfer, and acknowledges it; no exchange could prove
//! it. A meter holds one GBEK: the new one replaces the old one. So while a version is *rolled
//! out*, some members receive broadcasts under the old version, and the others under the new one.
//! The new version is pre-active, and issued to nobody, until an officer *switches*. From then on
//! it is the version to use. During the *overlap* the former version can still be issued, for
//! members without the new one. The overlap ends when every member has acknowledged the new
//! version.

use std::fmt;

use crate::{
    CampaignId, ExposureReason, GroupId, KeyState, KeyType, KeyVersion, KeyVersionNumber, NewKeyVersion, Owner,
    ParseError, Party, SecuritySetupId, SecuritySuite, SharedKey, Slot, SlotError, Slots, UnixMillis,
};

/// A group of meters that share broadcast keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The island's number for it.
    pub id: GroupId,
    /// Its name: 1–64 octets of a–z, 0–9 and `-`, starting with a letter.
    pub name: String,
    /// The security suite of its members.
    pub suite: SecuritySuite,
    /// When it was made.
    pub added: UnixMillis,
    /// Its keys.
    pub slots: Slots,
    /// How many of its members must have acknowledged a new version before broadcasts may switch to
    /// it.
    pub switch_at: SwitchThreshold,
    /// The last rotation of each key, in order of security setup and key type.
    pub rotations: Vec<GroupRotation>,
}

/// The rotation of a group's key to one version, under way or past.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupRotation {
    /// The security setup.
    pub setup: SecuritySetupId,
    /// The key type.
    pub key_type: KeyType,
    /// The version.
    pub version: KeyVersionNumber,
    /// The campaign that delivers it.
    pub campaign: Option<CampaignId>,
    /// When it began.
    pub begun: UnixMillis,
    /// When enough members had acknowledged it for the switch.
    pub reached: Option<UnixMillis>,
    /// When broadcasts switched.
    pub switched: Option<UnixMillis>,
    /// When every member had acknowledged it, after the switch: the end of the overlap.
    pub completed: Option<UnixMillis>,
}

impl GroupRotation {
    /// How far it is.
    pub const fn stage(&self) -> RotationStage {
        match (self.completed, self.switched, self.reached) {
            (Some(_), ..) => RotationStage::Complete,
            (None, Some(_), _) => RotationStage::Switched,
            (None, None, Some(_)) => RotationStage::MaySwitch,
            (None, None, None) => RotationStage::RollingOut,
        }
    }
}

/// How far the rotation of a group's key is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RotationStage {
    /// Too few members have acknowledged the new version.
    RollingOut,
    /// Enough have.
    MaySwitch,
    /// Broadcasts use the new version; the former one is for members without it.
    Switched,
    /// Every member has the new version.
    Complete,
}

impl RotationStage {
    /// The name in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RollingOut => "rolling-out",
            Self::MaySwitch => "may-switch",
            Self::Switched => "switched",
            Self::Complete => "complete",
        }
    }
}

/// How many percent of a group's members must have acknowledged a new version before broadcasts may
/// switch to it: 1–100.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SwitchThreshold(u8);

impl SwitchThreshold {
    /// 95 percent: in a large group a few meters are always unreachable.
    pub const DEFAULT: Self = Self(95);

    /// The threshold of this many percent.
    ///
    /// # Errors
    /// Not 1 to 100.
    pub fn new(percent: u32) -> Result<Self, ParseError> {
        match u8::try_from(percent) {
            Ok(percent @ 1..=100) => Ok(Self(percent)),
            _ => Err(ParseError::new("switch threshold", format!("`{percent}` is not 1 to 100 percent"))),
        }
    }

    /// The percent.
    pub const fn percent(self) -> u8 {
        self.0
    }

    /// Whether enough members have acknowledged. Never true for a group without members.
    pub const fn is_reached(self, counts: MemberCounts) -> bool {
        counts.members > 0 && counts.acknowledged as u128 * 100 >= counts.members as u128 * self.0 as u128
    }
}

impl fmt::Display for SwitchThreshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} %", self.0)
    }
}

/// How many members of a group have a version of its key. Members that are quarantined or retired
/// do not count: nothing is delivered to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemberCounts {
    /// All members.
    pub members: u64,
    /// Members that have acknowledged it.
    pub acknowledged: u64,
    /// Members for which it left, and which have not acknowledged it.
    pub unacknowledged: u64,
}

/// How a rotation of a group's key began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BegunRotation {
    /// The version that is delivered to the members.
    pub version: KeyVersionNumber,
    /// It was made now; false: it was being rolled out already, and this continues.
    pub made: bool,
    /// A version whose roll-out was given up, because a former member knows it.
    pub given_up: Option<KeyVersionNumber>,
}

impl Group {
    /// A group without keys.
    pub fn new(id: GroupId, name: String, suite: SecuritySuite, added: UnixMillis) -> Self {
        Self {
            id,
            name,
            suite,
            added,
            slots: Slots::default(),
            switch_at: SwitchThreshold::DEFAULT,
            rotations: Vec::new(),
        }
    }

    /// The group as an owner of keys.
    pub const fn owner(&self) -> Owner {
        Owner::Group(self.id)
    }

    /// The last rotation of a key.
    pub fn rotation(&self, setup: SecuritySetupId, key_type: KeyType) -> Option<&GroupRotation> {
        self.rotations.iter().find(|rotation| (rotation.setup, rotation.key_type) == (setup, key_type))
    }

    /// The version that members should have: the one that is rolled out, or else the active one.
    pub fn newest(&self, setup: SecuritySetupId, key_type: KeyType) -> Option<&KeyVersion> {
        newest(self.slots.get(setup, key_type)?)
    }

    /// The version that can be issued: the active one if none is named. A named version must be
    /// active, or the former one during the overlap. Never a pre-active (I3), suspended or
    /// compromised one.
    pub fn issuable(
        &self,
        setup: SecuritySetupId,
        key_type: KeyType,
        named: Option<KeyVersionNumber>,
    ) -> Option<&KeyVersion> {
        let slot = self.slots.get(setup, key_type)?;
        let active = slot.active();
        let Some(named) = named.filter(|named| active.is_none_or(|active| active.number() != *named)) else {
            return active;
        };
        let overlap =
            self.rotation(setup, key_type).is_some_and(|rotation| rotation.stage() == RotationStage::Switched);
        slot.grantable().map(|grantable| grantable.version).find(|version| overlap && version.number() == named)
    }

    /// Why a key must be rotated: somebody who is not a member holds the version that members
    /// should have. Each reason once.
    pub fn rotation_wanted(&self, setup: SecuritySetupId, key_type: KeyType) -> Vec<ExposureReason> {
        self.newest(setup, key_type).map(known_to_former_members).unwrap_or_default()
    }

    /// Begins to roll out a new version of a key, or continues with the version that is rolled out
    /// already: another campaign makes no further version. A version that a former member knows is
    /// given up: it becomes compromised, and `new` replaces it.
    ///
    /// # Errors
    /// The group has no such key, or the new version does not fit the slot.
    pub fn begin_rotation(
        &mut self,
        setup: SecuritySetupId,
        key_type: KeyType,
        new: &NewKeyVersion,
        campaign: Option<CampaignId>,
        now: UnixMillis,
    ) -> Result<BegunRotation, GroupError> {
        let slot = self.slots.get_mut(setup, key_type)?;
        let pending = newest(slot).filter(|version| version.state() == KeyState::PreActive);
        let (pending, known) = (
            pending.map(KeyVersion::number),
            pending.is_some_and(|version| !known_to_former_members(version).is_empty()),
        );
        let (version, given_up) = match pending {
            Some(pending) if !known => (pending, None),
            Some(pending) => {
                slot.transition(pending, KeyState::Compromised, now)?;
                (slot.add_pre_active(new, now)?, Some(pending))
            }
            None => (slot.add_pre_active(new, now)?, None),
        };
        let made = Some(version) != pending;
        self.roll_out(setup, key_type, version, campaign, now);
        Ok(BegunRotation { version, made, given_up })
    }

    /// Notes that this version is delivered to the members. An entry for the same version stays.
    pub fn roll_out(
        &mut self,
        setup: SecuritySetupId,
        key_type: KeyType,
        version: KeyVersionNumber,
        campaign: Option<CampaignId>,
        now: UnixMillis,
    ) {
        match self.rotations.iter_mut().find(|rotation| (rotation.setup, rotation.key_type) == (setup, key_type)) {
            Some(rotation) if rotation.version == version => rotation.campaign = campaign.or(rotation.campaign),
            known => {
                let rotation = GroupRotation {
                    setup,
                    key_type,
                    version,
                    campaign,
                    begun: now,
                    reached: None,
                    switched: None,
                    completed: None,
                };
                match known {
                    Some(known) => *known = rotation,
                    None => self.rotations.push(rotation),
                }
                self.rotations.sort_unstable_by_key(|rotation| (rotation.setup, rotation.key_type));
            }
        }
    }

    /// Notes how many members have acknowledged the version of a rotation. Returns whether that
    /// changes its stage.
    pub fn note_members(
        &mut self,
        setup: SecuritySetupId,
        key_type: KeyType,
        version: KeyVersionNumber,
        counts: MemberCounts,
        now: UnixMillis,
    ) -> bool {
        let threshold = self.switch_at;
        let mut rotations = self.rotations.iter_mut();
        let Some(rotation) = rotations
            .find(|rotation| (rotation.setup, rotation.key_type, rotation.version) == (setup, key_type, version))
        else {
            return false;
        };
        let before = rotation.stage();
        if rotation.reached.is_none() && threshold.is_reached(counts) {
            rotation.reached = Some(now);
        }
        if rotation.completed.is_none() && rotation.switched.is_some() && counts.members == counts.acknowledged {
            rotation.completed = Some(now);
        }
        rotation.stage() != before
    }

    /// Makes the version that is rolled out the active one. The former one, whose number is
    /// returned, can still be issued until every member has the new one. With `early` the number of
    /// members that have it does not matter.
    ///
    /// # Errors
    /// The version is not the one that is rolled out, or too few members have acknowledged it.
    pub fn switch(
        &mut self,
        setup: SecuritySetupId,
        key_type: KeyType,
        version: KeyVersionNumber,
        early: bool,
        now: UnixMillis,
    ) -> Result<Option<KeyVersionNumber>, GroupError> {
        let threshold = self.switch_at;
        let mut rotations = self.rotations.iter_mut();
        let rotation = rotations.find(|rotation| (rotation.setup, rotation.key_type) == (setup, key_type));
        let rotation = rotation
            .filter(|rotation| rotation.version == version && rotation.switched.is_none())
            .ok_or(GroupError::NotRolledOut { version })?;
        if rotation.reached.is_none() && !early {
            return Err(GroupError::TooFew { threshold });
        }
        let former = self.slots.get_mut(setup, key_type)?.switch_to(version, now)?;
        rotation.switched = Some(now);
        Ok(former)
    }

    /// Exposes the keys that left for a member under a compromised KEK: `party` knows them if it
    /// recorded the traffic. Returns the versions for which this exposure is new.
    pub fn expose_to_who_knows_a_kek(
        &mut self,
        delivered: &[SharedKey],
        party: &Party,
        now: UnixMillis,
    ) -> Vec<(SecuritySetupId, KeyType, KeyVersionNumber)> {
        let owner = self.owner();
        let mut exposed = Vec::new();
        for key in delivered.iter().filter(|key| key.owner == owner) {
            let version = self.slots.get_mut(key.setup, key.key_type).and_then(|slot| slot.version_mut(key.version));
            if version.is_ok_and(|version| version.expose(party.clone(), ExposureReason::MemberCompromised, now)) {
                exposed.push((key.setup, key.key_type, key.version));
            }
        }
        exposed
    }

    /// Exposes the keys that a former member may hold: every version that is in use or may still be
    /// issued, and the one that is rolled out, if it left for the member. For versions that members
    /// were set up with, it is not known which ones the member really holds. Returns the versions
    /// for which this exposure is new.
    pub fn expose_to_former_member(
        &mut self,
        delivered: &[SharedKey],
        reason: ExposureReason,
        now: UnixMillis,
    ) -> Vec<(SecuritySetupId, KeyType, KeyVersionNumber)> {
        let owner = self.owner();
        let mut exposed = Vec::new();
        for slot in self.slots.iter_mut() {
            let (setup, key_type) = (slot.setup(), slot.key_type());
            let left = |number| {
                delivered
                    .iter()
                    .any(|key| (key.owner, key.setup, key.key_type, key.version) == (owner, setup, key_type, number))
            };
            let known: Vec<KeyVersionNumber> = slot
                .versions()
                .iter()
                .filter(|version| match version.state() {
                    KeyState::Active | KeyState::Suspended => true,
                    KeyState::Deactivated => version.candidate(),
                    KeyState::PreActive => left(version.number()),
                    KeyState::Compromised | KeyState::Destroyed => false,
                })
                .map(KeyVersion::number)
                .collect();
            for number in known {
                if slot.version_mut(number).is_ok_and(|version| version.expose(Party::Anyone, reason, now)) {
                    exposed.push((setup, key_type, number));
                }
            }
        }
        exposed
    }
}

/// Why a rotation of a group's key does not begin or go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// It is not the version that is rolled out.
    #[error("version {version} is not being rolled out to the members")]
    NotRolledOut {
        /// The version.
        version: KeyVersionNumber,
    },
    /// Broadcasts would not reach enough members.
    #[error("fewer than {threshold} of the members have acknowledged the new version: wait, or switch early")]
    TooFew {
        /// The group's threshold.
        threshold: SwitchThreshold,
    },
    /// The slot refuses.
    #[error(transparent)]
    Slot(#[from] SlotError),
}

fn newest(slot: &Slot) -> Option<&KeyVersion> {
    slot.versions().iter().rev().find(|version| matches!(version.state(), KeyState::PreActive | KeyState::Active))
}

fn known_to_former_members(version: &KeyVersion) -> Vec<ExposureReason> {
    let known = |reason: &ExposureReason| version.exposures().iter().any(|exposure| exposure.reason == *reason);
    ExposureReason::OF_MEMBERS.into_iter().filter(known).collect()
}
