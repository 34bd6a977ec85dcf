//! Proposals: a dangerous action that waits for the approval of other people (I6).
//!
//! The content names exactly what will run. It never changes; for another content, the proposal is
//! withdrawn and a new one is made. An approved proposal does not run by itself: an officer
//! executes it with a separate call, once. The execution checks again that the content still fits.

use std::fmt;

use aws_lc_rs::digest::{SHA256, digest};

use crate::{
    Approval, ApprovalError, ApprovalTerms, Approvals, KeyClass, KeyType, KeyVersionNumber, ParseError, PersonName,
    PrincipalId, ProposalId, Quorum, SecuritySetupId, SystemTitle, UnixMillis,
};

/// A proposal. One sealed row (I5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// Its id: the id of the request that made it.
    pub id: ProposalId,
    /// What is approved. It never changes.
    pub content: ProposalContent,
    /// Who approved it, in order.
    pub approvals: Approvals,
    /// How it ended; `None`: it is pending, or its time is over.
    pub end: Option<ProposalEnd>,
}

/// What people approve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProposalContent {
    /// What will run.
    pub action: ProposedAction,
    /// Why, for people: 1–256 octets.
    pub reason: String,
    /// The officer who made it.
    pub requester: PrincipalId,
    /// I6: the person behind the officer. This person cannot approve it.
    pub requester_person: PersonName,
    /// How many people must approve.
    pub quorum: Quorum,
    /// When it was made.
    pub created: UnixMillis,
    /// From this moment on it can be neither approved nor executed.
    pub expires: UnixMillis,
}

/// The action of a proposal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProposedAction {
    /// Moves an invocation counter further than the device profile's cap.
    RaiseCounter(RaiseCounter),
    /// Destroys a version of a root in the tokens, for good.
    DestroyRoot(DestroyRoot),
    /// Certifies a key of an officer or auditor. Their other certificates end.
    RecertifyPrincipal(RecertifyPrincipal),
}

impl ProposedAction {
    /// The name in output and records: `raise-counter`, `destroy-root`, `recertify-principal`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::RaiseCounter(_) => "raise-counter",
            Self::DestroyRoot(_) => "destroy-root",
            Self::RecertifyPrincipal(_) => "recertify-principal",
        }
    }

    /// The principal and the person that the action concerns, if it concerns one.
    pub const fn beneficiary(&self) -> Option<(&PrincipalId, &PersonName)> {
        match self {
            Self::RaiseCounter(_) | Self::DestroyRoot(_) => None,
            Self::RecertifyPrincipal(recertify) => Some((&recertify.principal, &recertify.person)),
        }
    }
}

impl fmt::Display for ProposedAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RaiseCounter(raise) => write!(
                f,
                "raise the invocation counter of client title {} under {} version {} of meter {}, security setup {}, to {}",
                raise.client_title, raise.key_type, raise.version, raise.meter, raise.setup, raise.to
            ),
            Self::DestroyRoot(root) => {
                f.write_str("destroy the root `")?;
                root.class.map_or(Ok(()), |class| write!(f, "{class}/"))?;
                write!(f, "{}/{}`", root.kind.name(), root.version)
            }
            Self::RecertifyPrincipal(RecertifyPrincipal { principal, person, key_sha256 }) => {
                write!(
                    f,
                    "certify the public key with SHA-256 {} for `{principal}` of person `{}`",
                    hex::encode(key_sha256),
                    person.as_str()
                )
            }
        }
    }
}

/// Raises a counter for a meter that is really ahead of it: afterwards nothing below `to` is
/// allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RaiseCounter {
    /// Of which meter.
    pub meter: SystemTitle,
    /// Of which security setup.
    pub setup: SecuritySetupId,
    /// Of which encryption key: GUEK, or GBEK.
    pub key_type: KeyType,
    /// Of which version.
    pub version: KeyVersionNumber,
    /// Of which client title.
    pub client_title: SystemTitle,
    /// The lowest counter that may be used afterwards.
    pub to: u32,
}

/// Gives a new certificate to an officer or auditor whose certificate has ended or is lost, or
/// confirms one whom one officer alone has added (I6).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RecertifyPrincipal {
    /// Whose key it is.
    pub principal: PrincipalId,
    /// The person behind the principal, who can neither propose nor approve it.
    pub person: PersonName,
    /// SHA-256 of the SubjectPublicKeyInfo (DER) that is certified, 32 octets.
    pub key_sha256: [u8; 32],
}

/// A version of a root that nothing refers to any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DestroyRoot {
    /// What the root is for.
    pub kind: RootKind,
    /// Of which class; `None` for roots without a class.
    pub class: Option<KeyClass>,
    /// Which version, from 1.
    pub version: u8,
    /// The moment of the oldest backup that may still be restored, as the requester states. Such a
    /// backup refers to no root that was replaced before this moment.
    pub oldest_backup: UnixMillis,
}

impl DestroyRoot {
    /// The destruction of a version.
    ///
    /// # Errors
    /// The version is 0, a class is missing, or the kind of root has no class.
    pub fn new(
        kind: RootKind,
        class: Option<KeyClass>,
        version: u8,
        oldest_backup: UnixMillis,
    ) -> Result<Self, ParseError> {
        if version == 0 {
            return Err(ParseError::new("root version", "versions start at 1"));
        }
        let fits = match class {
            Some(class) => kind.has_class() && KeyClass::WITH_ROOTS.contains(&class),
            None => !kind.has_class(),
        };
        if !fits {
            return Err(ParseError::new(
                "key class",
                format!(
                    "a {} root has {}",
                    kind.name(),
                    if kind.has_class() { "one of kek, session, authentication" } else { "no class" }
                ),
            ));
        }
        Ok(Self { kind, class, version, oldest_backup })
    }
}

/// What a root is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RootKind {
    /// Diversified keys of a class are derived from it.
    Diversification,
    /// It wraps the stored keys of a class.
    StorageKek,
    /// The seal key and the audit chain key come from it.
    Seal,
    /// It signs checkpoints of the audit log.
    AuditSign,
    /// Vendors encrypt batch keys to it.
    VendorTransport,
}

impl RootKind {
    /// All kinds.
    pub const ALL: [Self; 5] =
        [Self::Diversification, Self::StorageKek, Self::Seal, Self::AuditSign, Self::VendorTransport];

    /// The number in rows, from 1.
    pub const fn number(self) -> u32 {
        match self {
            Self::Diversification => 1,
            Self::StorageKek => 2,
            Self::Seal => 3,
            Self::AuditSign => 4,
            Self::VendorTransport => 5,
        }
    }

    /// The kind with this number.
    ///
    /// # Errors
    /// No kind has the number.
    pub fn from_number(number: u32) -> Result<Self, ParseError> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.number() == number)
            .ok_or_else(|| ParseError::new("kind of root", format!("`{number}` is not 1 to 5")))
    }

    /// The kind of this name.
    ///
    /// # Errors
    /// No kind has the name.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| {
            ParseError::new(
                "kind of root",
                format!(
                    "`{}` is unknown; known are {}",
                    crate::id::excerpt(text),
                    Self::ALL.map(Self::name).join(", ")
                ),
            )
        })
    }

    /// The name in output, and in labels of token keys.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Diversification => "diversification",
            Self::StorageKek => "storage-kek",
            Self::Seal => "seal",
            Self::AuditSign => "audit-sign",
            Self::VendorTransport => "vendor-transport",
        }
    }

    /// Whether each key class has its own root of this kind.
    pub const fn has_class(self) -> bool {
        matches!(self, Self::Diversification | Self::StorageKek)
    }
}

/// How a proposal ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProposalEnd {
    /// It was executed; otherwise withdrawn.
    pub executed: bool,
    /// By whom.
    pub principal: PrincipalId,
    /// When.
    pub time: UnixMillis,
}

/// The state of a proposal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProposalState {
    /// Approvals are missing.
    Waiting,
    /// Enough people have approved it: it can be executed.
    Approved,
    /// It was executed.
    CarriedOut,
    /// It was withdrawn.
    Withdrawn,
    /// Its time is over, and it was not executed.
    Expired,
}

impl ProposalState {
    /// The name in output and records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Approved => "approved",
            Self::CarriedOut => "carried-out",
            Self::Withdrawn => "withdrawn",
            Self::Expired => "expired",
        }
    }
}

impl fmt::Display for ProposalState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Proposal {
    /// How long a proposal can be approved and executed, in milliseconds: a week.
    pub const LIFETIME_MS: i64 = 7 * 24 * 3_600 * 1_000;

    /// A pending proposal.
    ///
    /// # Errors
    /// The reason is missing or too long, its time ends before it begins, or the requester is the
    /// beneficiary.
    pub fn new(id: ProposalId, content: ProposalContent) -> Result<Self, ParseError> {
        let proposal = Self { id, content, approvals: Approvals::default(), end: None };
        proposal.check()?;
        Ok(proposal)
    }

    /// Checks what is always true of a proposal.
    pub(crate) fn check(&self) -> Result<(), ParseError> {
        if self.content.reason.trim().is_empty() || self.content.reason.len() > 256 {
            return Err(ParseError::new("reason", "not 1 to 256 octets: the approvers must know why"));
        }
        if self.content.expires <= self.content.created {
            return Err(ParseError::new("expiry", "it is not after the time of the proposal"));
        }
        // I6: two people stand behind it, the requester and an approver, and the beneficiary is
        // neither.
        if let Some((principal, person)) = self.content.action.beneficiary()
            && (*principal == self.content.requester || person.is_same(&self.content.requester_person))
        {
            return Err(ParseError::new(
                "principal",
                format!("this concerns `{}`: another person must propose it", person.as_str()),
            ));
        }
        Ok(())
    }

    /// I6: what approvals are given to. SHA-256 of `"meterkms/proposal" ‖ id(16) ‖ content`, the
    /// content as it stands in the sealed row.
    pub fn content_digest(&self) -> [u8; 32] {
        let octets = [b"meterkms/proposal".as_slice(), &self.id.octets(), &self.content.to_octets()].concat();
        let mut result = [0; 32];
        result.copy_from_slice(digest(&SHA256, &octets).as_ref());
        result
    }

    /// Its state.
    pub fn state(&self, now: UnixMillis) -> ProposalState {
        match &self.end {
            Some(ProposalEnd { executed: true, .. }) => ProposalState::CarriedOut,
            Some(_) => ProposalState::Withdrawn,
            None if self.content.expires <= now => ProposalState::Expired,
            None if self.approvals.suffice(&self.terms()) => ProposalState::Approved,
            None => ProposalState::Waiting,
        }
    }

    /// Approves the content with this digest.
    ///
    /// # Errors
    /// It has ended, has another content, or the person has made or approved it.
    pub fn approve(&mut self, approval: Approval, content_sha256: &[u8; 32]) -> Result<(), ProposalError> {
        if self.end.is_some() {
            return Err(self.wrong_state("approved", approval.time));
        }
        let mut approvals = self.approvals.clone();
        approvals.add(&self.terms(), approval, content_sha256)?;
        self.approvals = approvals;
        Ok(())
    }

    /// Withdraws it.
    ///
    /// # Errors
    /// It has ended.
    pub fn withdraw(&mut self, principal: PrincipalId, now: UnixMillis) -> Result<(), ProposalError> {
        if self.end.is_some() {
            return Err(self.wrong_state("withdrawn", now));
        }
        self.end = Some(ProposalEnd { executed: false, principal, time: now });
        Ok(())
    }

    /// Executes it: the caller does the returned action, in the same transaction.
    ///
    /// # Errors
    /// It was executed or withdrawn already, is not approved, or its time is over.
    // I6: the approvals are counted here, over the present content.
    pub fn execute(&mut self, principal: PrincipalId, now: UnixMillis) -> Result<ProposedAction, ProposalError> {
        if self.state(now) != ProposalState::Approved {
            return Err(self.wrong_state("executed", now));
        }
        self.end = Some(ProposalEnd { executed: true, principal, time: now });
        Ok(self.content.action.clone())
    }

    /// The terms that approvals are counted against.
    pub fn terms(&self) -> ApprovalTerms<'_> {
        ApprovalTerms {
            content_sha256: self.content_digest(),
            requester: &self.content.requester,
            requester_person: &self.content.requester_person,
            beneficiary: self.content.action.beneficiary(),
            quorum: self.content.quorum,
            expires: Some(self.content.expires),
        }
    }

    fn wrong_state(&self, wanted: &'static str, now: UnixMillis) -> ProposalError {
        ProposalError::State { state: self.state(now), wanted, missing: self.approvals.missing(&self.terms()) }
    }
}

/// Why a proposal refuses a change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposalError {
    /// Its state forbids it.
    #[error("the proposal is {state} and cannot be {wanted}{}", hint(*state, *missing))]
    State {
        /// Its state.
        state: ProposalState,
        /// What was asked for.
        wanted: &'static str,
        /// Approvals that are missing.
        missing: usize,
    },
    /// The approval is refused.
    #[error(transparent)]
    Approval(#[from] ApprovalError),
}

fn hint(state: ProposalState, missing: usize) -> String {
    match (state, missing) {
        (ProposalState::Waiting, 1) => ": one approval is missing".to_owned(),
        (ProposalState::Waiting, missing) if missing > 1 => format!(": {missing} approvals are missing"),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{IslandName, Role};

    const NOW: UnixMillis = UnixMillis(1_780_000_000_000);

    fn officer(name: &str) -> PrincipalId {
        PrincipalId::new(IslandName::parse("dev").unwrap(), Role::Officer, name).unwrap()
    }

    fn approval(principal: &str, person: &str, at: UnixMillis) -> Approval {
        Approval { principal: officer(principal), person: PersonName::parse(person).unwrap(), time: at }
    }

    fn proposal(quorum: u32) -> Proposal {
        let content = ProposalContent {
            action: ProposedAction::RaiseCounter(RaiseCounter {
                meter: SystemTitle::parse("4B414D0000000001").unwrap(),
                setup: SecuritySetupId::DEFAULT,
                key_type: KeyType::GUEK,
                version: KeyVersionNumber::FIRST,
                client_title: SystemTitle::parse("4D4D4D0000000001").unwrap(),
                to: 3_000_000_000,
            }),
            reason: "read at the meter, ticket 4711".to_owned(),
            requester: officer("ada"),
            requester_person: PersonName::parse("Ada").unwrap(),
            quorum: Quorum::new(quorum).unwrap(),
            created: NOW,
            expires: NOW.after(Proposal::LIFETIME_MS),
        };
        Proposal::new(ProposalId::from_octets(&[7; 16]).unwrap(), content).unwrap()
    }

    #[test]
    fn two_people_and_the_content_that_they_saw() {
        let mut proposal = proposal(2);
        let digest = proposal.content_digest();
        assert!(matches!(
            proposal.execute(officer("ada"), NOW),
            Err(ProposalError::State { state: ProposalState::Waiting, missing: 2, .. })
        ));
        // The requester under another principal, and another person under the requester's
        // principal.
        for (principal, person) in [("ada", "Ada"), ("ada-2", "Ada"), ("ada", "Bo")] {
            assert!(matches!(
                proposal.approve(approval(principal, person, NOW), &digest),
                Err(ProposalError::Approval(ApprovalError::OwnRequest { .. }))
            ));
        }
        assert_eq!(proposal.approve(approval("bo", "Bo", NOW), &[0; 32]), Err(ApprovalError::OtherContent.into()));
        proposal.approve(approval("bo", "Bo", NOW), &digest).unwrap();
        assert!(matches!(
            proposal.approve(approval("bo-2", "Bo", NOW), &digest),
            Err(ProposalError::Approval(ApprovalError::ApprovedAlready { .. }))
        ));
        assert_eq!(proposal.state(NOW), ProposalState::Waiting);
        proposal.approve(approval("cy", "Cy", NOW), &digest).unwrap();
        assert_eq!(proposal.state(NOW), ProposalState::Approved);
        assert_eq!(proposal.execute(officer("ada"), NOW).unwrap(), proposal.content.action);
        // Once only.
        assert!(proposal.execute(officer("ada"), NOW).is_err() && proposal.withdraw(officer("ada"), NOW).is_err());
    }

    #[test]
    fn a_row_cannot_make_up_people() {
        // Whoever could seal such a row: the same person twice, and the requester, are counted as
        // nobody.
        let mut proposal = proposal(2);
        proposal.approvals = Approvals::from_row(vec![
            approval("bo", "Bo", NOW),
            approval("bo-2", "Bo", NOW),
            approval("ada-2", "Ada", NOW),
        ]);
        assert!(matches!(proposal.execute(officer("cy"), NOW), Err(ProposalError::State { missing: 1, .. })));
    }

    #[test]
    fn its_time_ends() {
        let mut proposal = proposal(1);
        let digest = proposal.content_digest();
        let late = NOW.after(Proposal::LIFETIME_MS);
        assert_eq!(proposal.approve(approval("bo", "Bo", late), &digest), Err(ApprovalError::Expired.into()));
        proposal.approve(approval("bo", "Bo", NOW), &digest).unwrap();
        assert!(matches!(
            proposal.execute(officer("ada"), late),
            Err(ProposalError::State { state: ProposalState::Expired, .. })
        ));
        proposal.withdraw(officer("ada"), late).unwrap();
        assert_eq!(proposal.state(late), ProposalState::Withdrawn);
    }

    #[test]
    fn who_is_certified_anew_neither_asks_for_it_nor_approves_it() {
        let recertify = |principal: &str, person: &str| {
            let mut content = proposal(1).content;
            let person = PersonName::parse(person).unwrap();
            content.action = ProposedAction::RecertifyPrincipal(RecertifyPrincipal {
                principal: officer(principal),
                person,
                key_sha256: [1; 32],
            });
            Proposal::new(ProposalId::from_octets(&[8; 16]).unwrap(), content)
        };
        // Ada asks: neither for herself, nor for another principal of hers.
        assert!(
            recertify("ada", "Ada").is_err() && recertify("ada-2", "ada").is_err() && recertify("ada", "Eve").is_err()
        );
        let mut proposal = recertify("cy", "Cy").unwrap();
        let digest = proposal.content_digest();
        for (principal, person) in [("cy", "Cy"), ("cy-2", "cy"), ("cy", "Eve")] {
            let refusal = proposal.approve(approval(principal, person, NOW), &digest);
            assert!(matches!(refusal, Err(ProposalError::Approval(ApprovalError::Beneficiary { .. }))), "{refusal:?}");
        }
        assert!(matches!(proposal.execute(officer("ada"), NOW), Err(ProposalError::State { missing: 1, .. })));
        proposal.approve(approval("bo", "Bo", NOW), &digest).unwrap();
        assert!(matches!(proposal.execute(officer("ada"), NOW), Ok(ProposedAction::RecertifyPrincipal(_))));
    }

    #[test]
    fn a_quorum_of_nobody_does_not_parse() {
        assert!(Quorum::new(0).is_err() && Quorum::new(10).is_err());
    }

    #[test]
    fn rows_come_back_and_every_field_counts() {
        let mut raise = proposal(1);
        raise.approve(approval("bo", "Bo", NOW), &raise.content_digest()).unwrap();
        raise.execute(officer("cy"), NOW).unwrap();
        let destroy = |class, version| {
            ProposedAction::DestroyRoot(DestroyRoot::new(RootKind::StorageKek, Some(class), version, NOW).unwrap())
        };
        let mut digests = vec![raise.content_digest()];
        let mut proposals = vec![raise];
        let recertify = |name: &str, person: &str, key| {
            let person = PersonName::parse(person).unwrap();
            ProposedAction::RecertifyPrincipal(RecertifyPrincipal {
                principal: officer(name),
                person,
                key_sha256: [key; 32],
            })
        };
        for action in [
            destroy(KeyClass::Session, 1),
            destroy(KeyClass::Session, 2),
            destroy(KeyClass::Kek, 1),
            recertify("cy", "Cy", 1),
            recertify("cy", "Cy", 2),
            recertify("di", "Cy", 1),
            recertify("cy", "Di", 1),
        ] {
            let mut other = proposal(1);
            other.content.action = action;
            proposals.push(other);
        }
        for proposal in &proposals {
            assert_eq!(&Proposal::from_row(proposal.id, Bytes::from(proposal.to_row())).unwrap(), proposal);
            digests.push(proposal.content_digest());
        }
        let mut sooner = proposal(1);
        sooner.content.expires = NOW.after(1);
        let mut for_more = proposal(1);
        for_more.content.quorum = Quorum::new(2).unwrap();
        let mut further = proposal(1);
        if let ProposedAction::RaiseCounter(raise) = &mut further.content.action {
            raise.to += 1;
        }
        digests.extend([sooner, for_more, further].map(|proposal| proposal.content_digest()));
        digests.remove(0);
        digests.sort_unstable();
        let count = digests.len();
        digests.dedup();
        assert_eq!(digests.len(), count);
        assert!(
            DestroyRoot::new(RootKind::Seal, Some(KeyClass::Kek), 1, NOW).is_err()
                && DestroyRoot::new(RootKind::StorageKek, None, 1, NOW).is_err()
        );
        assert!(
            DestroyRoot::new(RootKind::Seal, None, 0, NOW).is_err()
                && DestroyRoot::new(RootKind::StorageKek, Some(KeyClass::Ca), 1, NOW).is_err()
        );
    }
}
