//! Approvals (I6): distinct people, none of them the requester, over the exact content, until a
//! moment.

use std::num::NonZeroU8;

use crate::{ParseError, PersonName, PrincipalId, UnixMillis};

/// The approvals of one content, in order. They are counted against [`ApprovalTerms`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Approvals(Vec<Approval>);

impl Approvals {
    /// Those of a sealed row.
    pub(crate) const fn from_row(approvals: Vec<Approval>) -> Self {
        Self(approvals)
    }

    /// Each approval, the oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Approval> {
        self.0.iter()
    }

    /// How many there are.
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds an approval of the content with this digest.
    ///
    /// # Errors
    /// It is too late, the digest is of another content, or the person is the requester, the
    /// beneficiary, or has approved it already.
    // I6: distinct people, none of them the requester, over the exact content.
    pub fn add(
        &mut self,
        terms: &ApprovalTerms<'_>,
        approval: Approval,
        content_sha256: &[u8; 32],
    ) -> Result<(), ApprovalError> {
        if terms.expires.is_some_and(|expires| expires <= approval.time) {
            return Err(ApprovalError::Expired);
        }
        if terms.content_sha256 != *content_sha256 {
            return Err(ApprovalError::OtherContent);
        }
        if terms.is_requester(&approval) {
            return Err(ApprovalError::OwnRequest { person: approval.person });
        }
        if terms.is_beneficiary(&approval) {
            return Err(ApprovalError::Beneficiary { person: approval.person });
        }
        if self.0.iter().any(|known| known.person.is_same(&approval.person)) {
            return Err(ApprovalError::ApprovedAlready { person: approval.person });
        }
        self.0.push(approval);
        Ok(())
    }

    /// I6: whether enough people have approved. Every use counts the approvals again, not only the
    /// last approval.
    pub fn suffice(&self, terms: &ApprovalTerms<'_>) -> bool {
        self.missing(terms) == 0
    }

    /// How many approvals are missing.
    pub fn missing(&self, terms: &ApprovalTerms<'_>) -> usize {
        let counted = self.0.iter().enumerate().filter(|(at, approval)| {
            let again = self.0.iter().take(*at).any(|earlier| earlier.person.is_same(&approval.person));
            !again && !terms.is_requester(approval) && !terms.is_beneficiary(approval)
        });
        usize::from(terms.quorum.number()).saturating_sub(counted.count())
    }
}

/// The terms that approvals must meet.
#[derive(Clone, Copy, Debug)]
pub struct ApprovalTerms<'a> {
    /// SHA-256 of the content's octets: what is approved.
    pub content_sha256: [u8; 32],
    /// Who asked for it.
    pub requester: &'a PrincipalId,
    /// The person behind the requester.
    pub requester_person: &'a PersonName,
    /// The principal and the person that the content concerns, who cannot approve it; `None`: it
    /// concerns no person.
    pub beneficiary: Option<(&'a PrincipalId, &'a PersonName)>,
    /// How many people must approve.
    pub quorum: Quorum,
    /// An approval at this moment or later does not count; `None`: there is no such limit.
    pub expires: Option<UnixMillis>,
}

impl ApprovalTerms<'_> {
    /// I6: the same person with another certificate or under another principal is still the
    /// requester.
    fn is_requester(&self, approval: &Approval) -> bool {
        approval.person.is_same(self.requester_person) || approval.principal == *self.requester
    }

    /// I6: nobody approves what concerns themselves.
    fn is_beneficiary(&self, approval: &Approval) -> bool {
        self.beneficiary
            .is_some_and(|(principal, person)| approval.person.is_same(person) || approval.principal == *principal)
    }
}

/// An approval by one person.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Approval {
    /// The officer.
    pub principal: PrincipalId,
    /// I6: the person. Each person counts once, with any number of certificates.
    pub person: PersonName,
    /// When.
    pub time: UnixMillis,
}

/// I6: how many people must approve, 1–9. A quorum of 0 does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Quorum(NonZeroU8);

impl Quorum {
    /// One person beside the requester.
    pub const ONE: Self = Self(NonZeroU8::MIN);

    /// The quorum of a number.
    ///
    /// # Errors
    /// The number is not 1 to 9.
    pub fn new(number: u32) -> Result<Self, ParseError> {
        let quorum = u8::try_from(number).ok().filter(|number| *number <= 9).and_then(NonZeroU8::new);
        quorum.map(Self).ok_or_else(|| ParseError::new("quorum", format!("`{number}` is not 1 to 9")))
    }

    /// The number.
    pub const fn number(self) -> u8 {
        self.0.get()
    }
}

/// Why an approval does not count.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApprovalError {
    /// Its time is over.
    #[error("the time for approvals is over")]
    Expired,
    /// The digest is not that of the content.
    #[error("the digest is not the digest of this content")]
    OtherContent,
    /// I6: nobody approves what they asked for themselves.
    #[error("`{}` requested this: another person must approve it", person.as_str())]
    OwnRequest {
        /// The person.
        person: PersonName,
    },
    /// I6: nobody approves what concerns themselves.
    #[error("this concerns `{}`: other people must approve it", person.as_str())]
    Beneficiary {
        /// The person.
        person: PersonName,
    },
    /// I6: each person counts once.
    #[error("`{}` has approved this already: another person must approve it", person.as_str())]
    ApprovedAlready {
        /// The person.
        person: PersonName,
    },
}

impl ApprovalError {
    /// The next step after this refusal.
    pub const fn next_step(&self) -> &'static str {
        match self {
            Self::Expired => "request it again",
            Self::OtherContent => "show the content again, and approve with the digest that you see there",
            Self::OwnRequest { .. } | Self::Beneficiary { .. } | Self::ApprovedAlready { .. } => {
                "ask a colleague to approve it"
            }
        }
    }
}
