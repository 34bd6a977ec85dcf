//! Invitations of handhelds: who was invited for whom, until when, and how it ended. The code that
//! answers an invitation is in [`code`].

pub(crate) mod code;

use bytes::Bytes;

use self::code::{CodeId, CodeSecret, code_digest};
use crate::{ParseError, PersonName, PrincipalId, Role, SystemTitle, UnixMillis};

/// The last invitation of a handheld: one sealed row for each name (I5). A new invitation takes the
/// place of one that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invitation {
    /// The handheld that it makes.
    pub handheld: PrincipalId,
    /// The person who will carry it.
    pub technician: PersonName,
    /// Client system titles that the handheld may use.
    pub client_titles: Vec<SystemTitle>,
    /// Whether the handheld is new.
    pub occasion: Occasion,
    /// The public part of the code. A code with another one is about another invitation, and is not
    /// counted.
    pub code_id: CodeId,
    /// The digest of the code: [`code_digest`], 32 octets. The code itself is stored nowhere.
    pub code_sha256: [u8; 32],
    /// The officer who made it, under whose right the device is enrolled.
    pub invited_by: PrincipalId,
    /// When it was made.
    pub invited: UnixMillis,
    /// From this moment on the code is refused.
    pub expires: UnixMillis,
    /// How many wrong secrets came with the right public part.
    pub wrong_codes: u32,
    /// How it ended; `None`: it is pending, or its time is over.
    pub end: Option<InvitationEnd>,
}

/// Why a device is enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// The handheld is new.
    First,
    /// The handheld exists and was handed over: its earlier keys have ended.
    HandOver,
}

impl Occasion {
    /// The name in output and records: `first`, `hand-over`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::HandOver => "hand-over",
        }
    }
}

/// How an invitation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InvitationEnd {
    /// A device was enrolled with it.
    Used(EnrolledDevice),
    /// An officer withdrew it.
    Withdrawn(UnixMillis),
    /// Too many wrong codes.
    WrongCodes(UnixMillis),
}

/// What a device got. The same device gets the same again if its first answer was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnrolledDevice {
    /// When.
    pub time: UnixMillis,
    /// SHA-256 of the SubjectPublicKeyInfo (DER) of its TLS key.
    pub tls_key_sha256: [u8; 32],
    /// The same of its transport key.
    pub transport_key_sha256: [u8; 32],
    /// The certificate of its TLS key, DER.
    pub certificate: Bytes,
    /// The certificate of its transport key, DER.
    pub transport_certificate: Bytes,
}

/// What an invitation is at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvitationState {
    /// The code is accepted.
    Pending,
    /// Its time was over before anybody used it.
    Expired,
    /// A device was enrolled.
    Used,
    /// An officer withdrew it.
    Withdrawn,
    /// Too many wrong codes ended it.
    WrongCodes,
}

impl InvitationState {
    /// The name in output and records: `pending`, `expired`, `used`, `withdrawn`, `wrong-codes`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Expired => "expired",
            Self::Used => "used",
            Self::Withdrawn => "withdrawn",
            Self::WrongCodes => "wrong-codes",
        }
    }
}

impl Invitation {
    /// Its state.
    pub fn state(&self, now: UnixMillis) -> InvitationState {
        match &self.end {
            Some(InvitationEnd::Used(_)) => InvitationState::Used,
            Some(InvitationEnd::Withdrawn(_)) => InvitationState::Withdrawn,
            Some(InvitationEnd::WrongCodes(_)) => InvitationState::WrongCodes,
            None if now < self.expires => InvitationState::Pending,
            None => InvitationState::Expired,
        }
    }

    /// Whether this is the code's secret, compared in constant time. It says nothing of the state.
    pub fn is_answered_by(&self, secret: &CodeSecret) -> bool {
        let digest = code_digest(self.handheld.name(), self.code_id, secret);
        aws_lc_rs::constant_time::verify_slices_are_equal(&digest, &self.code_sha256).is_ok()
    }

    /// Counts a wrong secret. True: it was one too many, and has ended the invitation.
    pub fn count_wrong_code(&mut self, most: u32, now: UnixMillis) -> bool {
        self.wrong_codes = self.wrong_codes.saturating_add(1);
        let ended = self.wrong_codes >= most;
        if ended {
            self.end = Some(InvitationEnd::WrongCodes(now));
        }
        ended
    }

    /// Checks what is always true of an invitation.
    ///
    /// # Errors
    /// It is for another role than a handheld, or ends before it begins.
    pub fn check(&self) -> Result<(), ParseError> {
        if self.handheld.role() != Role::Handheld {
            return Err(ParseError::new("invitation", format!("`{}` is no handheld", self.handheld)));
        }
        if self.expires <= self.invited {
            return Err(ParseError::new("invitation", "it ends before it begins"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invitation() -> Invitation {
        let id = CodeId([1; 6]);
        Invitation {
            handheld: PrincipalId::parse("urn:meterkms:north:handheld:h-17").unwrap(),
            technician: PersonName::parse("Tom Field").unwrap(),
            client_titles: Vec::new(),
            occasion: Occasion::First,
            code_id: id,
            code_sha256: code_digest("h-17", id, &CodeSecret::new([2; 15])),
            invited_by: PrincipalId::parse("urn:meterkms:north:officer:ada").unwrap(),
            invited: UnixMillis(1_000),
            expires: UnixMillis(2_000),
            wrong_codes: 0,
            end: None,
        }
    }

    #[test]
    fn wrong_codes_end_it_and_time_does() {
        let mut it = invitation();
        assert!(it.is_answered_by(&CodeSecret::new([2; 15])) && !it.is_answered_by(&CodeSecret::new([3; 15])));
        assert_eq!(it.state(UnixMillis(1_999)), InvitationState::Pending);
        assert_eq!(it.state(UnixMillis(2_000)), InvitationState::Expired);
        assert!(!it.count_wrong_code(3, UnixMillis(1_100)) && !it.count_wrong_code(3, UnixMillis(1_100)));
        assert!(it.count_wrong_code(3, UnixMillis(1_100)));
        assert_eq!(it.state(UnixMillis(1_200)), InvitationState::WrongCodes);
    }

    #[test]
    fn the_code_of_another_name_answers_nothing() {
        let other = PrincipalId::parse("urn:meterkms:north:handheld:h-18").unwrap();
        assert!(!Invitation { handheld: other, ..invitation() }.is_answered_by(&CodeSecret::new([2; 15])));
        let officer = PrincipalId::parse("urn:meterkms:north:officer:h-17").unwrap();
        assert!(Invitation { handheld: officer, ..invitation() }.check().is_err());
        assert!(Invitation { expires: UnixMillis(1_000), ..invitation() }.check().is_err());
    }
}
