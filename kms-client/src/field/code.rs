//! A new one-time code, for the tool of an officer.

use aws_lc_rs::rand;
use kms_domain::{CodeSecret, EnrolmentCode, ParseError, code_digest};
use kms_proto::v1 as proto;
use zeroize::Zeroizing;

/// A new one-time code for a handheld. The officer's tool makes it and sends its digest, so the
/// server does not know it before the device comes.
pub struct OneTimeCode {
    name: String,
    random: Zeroizing<[u8; 21]>,
}

impl OneTimeCode {
    /// A code of 120 random bits for the handheld of this name.
    ///
    /// # Errors
    /// The operating system gives no random numbers.
    pub fn generate(name: &str) -> Result<Self, ParseError> {
        let mut random = Zeroizing::new([0; 21]);
        rand::fill(&mut *random)
            .map_err(|_| ParseError::new("enrolment code", "the operating system gives no random numbers"))?;
        Ok(Self { name: name.to_owned(), random })
    }

    /// What the server stores of it.
    pub fn digest(&self) -> proto::CodeDigest {
        let (id, secret) = CodeSecret::split(&self.random);
        let sha256 = code_digest(&self.name, id, &secret);
        proto::CodeDigest { code_id: id.0.to_vec().into(), sha256: sha256.to_vec().into() }
    }

    /// The code in its text form, for the island of this root certificate (DER).
    ///
    /// # Errors
    /// The name is not that of a handheld.
    pub fn text(&self, root: &[u8]) -> Result<Zeroizing<String>, ParseError> {
        Ok(EnrolmentCode::new(&self.name, &self.random, root)?.to_text())
    }
}

impl std::fmt::Debug for OneTimeCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OneTimeCode").field("name", &self.name).finish_non_exhaustive()
    }
}
