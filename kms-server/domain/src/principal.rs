//! What the island knows of a principal: a sealed row like that of a meter (I5).

use bytes::Bytes;

use crate::{ParseError, PrincipalId, Role, SystemTitle, UnixMillis};

/// A head-end, officer, auditor, handheld, manufacturer or service account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    /// The identity: the URI of its certificates.
    pub id: PrincipalId,
    /// Grows by one with each change. Caches of decisions use it as a part of their key.
    pub revision: u32,
    /// Whether it may do anything.
    pub status: PrincipalStatus,
    /// The TLS certificates that authenticate it.
    pub certificates: Vec<PrincipalCertificate>,
    /// The key that envelopes are sealed to.
    pub transport: Option<TransportCertificate>,
    /// The client system titles that it may use. One title, one counter: no two principals share
    /// one unless a profile allows it.
    pub client_titles: Vec<SystemTitle>,
    /// I6: the human behind an officer or auditor. Several certificates, and several principals,
    /// may belong to one person. Of a handheld: the technician who carries it, who does not count
    /// as a person where several people are needed.
    pub person: Option<PersonName>,
    /// Where a handheld has its keys, as the device said when it was enrolled. `None`: another
    /// role, or a handheld that was registered without an enrolment.
    pub assurance: Option<Assurance>,
    /// A manufacturer's key that signs its shipments: SubjectPublicKeyInfo (DER), EC P-256 or
    /// P-384.
    pub shipment_key: Option<Bytes>,
    /// When it was added.
    pub added: UnixMillis,
}

impl Principal {
    /// Checks what is always true of a principal.
    ///
    /// # Errors
    /// An officer or auditor has no person (I6), a service account has what keys need, or a client
    /// title or certificate occurs twice.
    pub fn check(&self) -> Result<(), ParseError> {
        if self.is_personal() && self.person.is_none() {
            return Err(ParseError::new(
                "person",
                format!("`{}` is an {} and needs the name of its person", self.id, self.id.role()),
            ));
        }
        if self.shipment_key.is_some() && self.id.role() != Role::Manufacturer {
            return Err(ParseError::new(
                "shipment key",
                format!("`{}` is not a manufacturer: only a manufacturer has one", self.id),
            ));
        }
        if self.id.role() == Role::ServiceAccount && (self.transport.is_some() || !self.client_titles.is_empty()) {
            return Err(ParseError::new(
                "service account",
                format!("`{}` gets no keys: it has no transport key and no client titles", self.id),
            ));
        }
        if self.assurance.is_some() && self.id.role() != Role::Handheld {
            return Err(ParseError::new("assurance", format!("`{}` is no handheld: only a handheld has one", self.id)));
        }
        if self
            .client_titles
            .iter()
            .enumerate()
            .any(|(at, title)| self.client_titles.iter().take(at).any(|earlier| earlier == title))
        {
            return Err(ParseError::new("client title", format!("one occurs twice in `{}`", self.id)));
        }
        if self
            .certificates
            .iter()
            .enumerate()
            .any(|(at, one)| self.certificates.iter().take(at).any(|earlier| earlier.serial == one.serial))
        {
            return Err(ParseError::new("certificate", format!("one occurs twice in `{}`", self.id)));
        }
        Ok(())
    }

    /// Whether the principal stands for a person: an officer or an auditor. I6: only that person
    /// alone certifies such a principal's key.
    pub const fn is_personal(&self) -> bool {
        self.id.role().is_personal()
    }

    /// The technician whose handheld this is.
    pub fn technician(&self) -> Option<&PersonName> {
        self.person.as_ref().filter(|_| self.id.role() == Role::Handheld)
    }

    /// The registered certificate with this SHA-256.
    pub fn certificate(&self, certificate_sha256: &[u8; 32]) -> Option<&PrincipalCertificate> {
        self.certificates.iter().find(|known| known.sha256 == *certificate_sha256)
    }

    /// The certificates that have not ended, in the order in which they were issued.
    pub fn live_certificates(&self, now: UnixMillis) -> impl Iterator<Item = &PrincipalCertificate> {
        self.certificates.iter().filter(move |certificate| now < certificate.not_after)
    }

    /// Whether somebody can act as this principal: it is enabled and one of its certificates has
    /// not ended.
    pub fn can_act(&self, now: UnixMillis) -> bool {
        self.status == PrincipalStatus::Enabled && self.live_certificates(now).next().is_some()
    }

    /// Whether this certificate authenticates the principal now: its digest is registered, it has
    /// not expired, and the principal is enabled.
    pub fn accepts(&self, certificate_sha256: &[u8; 32], now: UnixMillis) -> bool {
        self.status == PrincipalStatus::Enabled
            && self.certificates.iter().any(|known| known.sha256 == *certificate_sha256 && now < known.not_after)
    }
}

/// Where the private keys of a handheld are. The device says it, and the server cannot verify it:
/// it is worth as much as the officer's knowledge of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Assurance {
    /// In a file, encrypted under the technician's PIN: a copy can be attacked elsewhere.
    Software,
    /// In a token that does not let them leave.
    Hardware,
}

impl Assurance {
    /// All kinds.
    pub const ALL: [Self; 2] = [Self::Software, Self::Hardware];

    /// The number in rows, from 1; 0 is no assurance.
    pub const fn number(self) -> u32 {
        match self {
            Self::Software => 1,
            Self::Hardware => 2,
        }
    }

    /// The name in output, records and policies: `software`, `hardware`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Software => "software",
            Self::Hardware => "hardware",
        }
    }
}

/// Whether a principal may do anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PrincipalStatus {
    /// It may do what policy permits.
    Enabled,
    /// It may do nothing.
    Disabled,
}

/// A TLS certificate that authenticates a principal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PrincipalCertificate {
    /// The serial number, 1–20 octets (RFC 5280, 4.1.2.2).
    pub serial: Bytes,
    /// SHA-256 of the certificate (DER).
    pub sha256: [u8; 32],
    /// The end of its validity.
    pub not_after: UnixMillis,
    /// SHA-256 of the SubjectPublicKeyInfo (DER) that it certifies; `None`: an earlier version of
    /// the server, which did not record it, issued the certificate.
    pub key_sha256: Option<[u8; 32]>,
    /// I6: who stood behind its issue.
    pub enrolment: Enrolment,
    /// The other principal whose call issued it; `None`: the principal itself, or it is not
    /// recorded.
    pub issued_by: Option<PrincipalId>,
}

impl PrincipalCertificate {
    /// A certificate of an earlier version of the server, which did not record key and enrolment.
    pub const fn unrecorded(serial: Bytes, sha256: [u8; 32], not_after: UnixMillis) -> Self {
        Self { serial, sha256, not_after, key_sha256: None, enrolment: Enrolment::Unrecorded, issued_by: None }
    }
}

/// I6: who stood behind the issue of a certificate. If several people are needed, a person counts
/// only with a certificate that was enrolled by the ceremony, by two other people, by the
/// custodians, or by the person with such a certificate. A principal that one other principal
/// certified alone could be the same person.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Enrolment {
    /// It was issued before enrolments were recorded. It counts, so that an island can be upgraded.
    #[default]
    Unrecorded,
    /// The ceremony.
    Ceremony,
    /// The principal's own renewal, by a certificate that counts.
    OwnRenewal,
    /// A proposal that two people made and approved, neither of them the principal's own person.
    Proposal,
    /// A quorum of the escrow's custodians, on the token's machine.
    Custodians,
    /// One other principal alone, or a renewal by such a certificate.
    OnePerson,
}

impl Enrolment {
    /// All enrolments.
    pub const ALL: [Self; 6] =
        [Self::Unrecorded, Self::Ceremony, Self::OwnRenewal, Self::Proposal, Self::Custodians, Self::OnePerson];

    /// Whether the person behind the certificate counts where several people are needed (I6).
    pub const fn counts(self) -> bool {
        !matches!(self, Self::OnePerson)
    }

    /// The enrolment of a certificate that a principal gets for itself by a certificate of this
    /// enrolment.
    #[must_use]
    pub const fn renewed(self) -> Self {
        if self.counts() { Self::OwnRenewal } else { Self::OnePerson }
    }

    /// The number in rows, from 0.
    pub const fn number(self) -> u32 {
        match self {
            Self::Unrecorded => 0,
            Self::Ceremony => 1,
            Self::OwnRenewal => 2,
            Self::Proposal => 3,
            Self::Custodians => 4,
            Self::OnePerson => 5,
        }
    }

    /// The name in output: `unrecorded`, `ceremony`, `own-renewal`, `proposal`, `custodians`,
    /// `one-person`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unrecorded => "unrecorded",
            Self::Ceremony => "ceremony",
            Self::OwnRenewal => "own-renewal",
            Self::Proposal => "proposal",
            Self::Custodians => "custodians",
            Self::OnePerson => "one-person",
        }
    }
}

/// A registered transport key: EC P-256, keyAgreement.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TransportCertificate {
    /// The certificate, DER.
    pub certificate: Bytes,
    /// SHA-256 of the DER.
    pub sha256: [u8; 32],
    /// The public point, uncompressed: `04 ‖ x ‖ y`.
    pub public_point: [u8; 65],
}

/// A human's name: 1–64 octets of UTF-8 without control characters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PersonName(String);

impl PersonName {
    /// The person of this name.
    ///
    /// # Errors
    /// The name is empty, longer than 64 octets, starts or ends with white space, or has control
    /// characters.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        if !(1..=64).contains(&text.len()) || text.trim() != text || text.chars().any(char::is_control) {
            return Err(ParseError::new(
                "person",
                "not 1 to 64 octets without control characters, and without white space at the ends",
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether both name the same person. Case and the number of spaces do not matter (I6).
    pub fn is_same(&self, other: &Self) -> bool {
        self.folded() == other.folded()
    }

    /// The name by which the same person is found: lower case, and one space between words. At most
    /// 192 octets.
    pub fn folded(&self) -> String {
        self.0.split_whitespace().map(str::to_lowercase).collect::<Vec<_>>().join(" ")
    }
}
