//! A new one-time code, for the tool of an officer.

use aws_lc_rs::rand;
use kms_domain::{CodeId, CodeSecret, EnrolmentCode, ParseError, code_digest};
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
        let (mut id, mut secret) = ([0; 6], Zeroizing::new([0; 15]));
        let (first, second) = self.random.split_at(id.len());
        id.copy_from_slice(first);
        secret.copy_from_slice(second);
        let sha256 = code_digest(&self.name, CodeId(id), &CodeSecret::new(*secret));
        proto::CodeDigest { code_id: id.to_vec().into(), sha256: sha256.to_vec().into() }
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
