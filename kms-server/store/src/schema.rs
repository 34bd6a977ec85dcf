//! The versions of the schema. A released version is never edited: the next change is the next
//! version.

use crate::StoreError;

/// One step of the schema.
pub(crate) struct Migration {
    /// From 1, without gaps.
    pub(crate) version: i64,
    /// What it does, in a few words.
    pub(crate) name: &'static str,
    /// The statements.
    pub(crate) sql: &'static str,
}

impl Migration {
    /// SHA-256 of the statements, in lower-case hex. It shows that a version was edited.
    pub(crate) fn digest(&self) -> String {
        hex::encode(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, self.sql.as_bytes()))
    }
}

/// The steps that a database with these versions and digests lacks.
///
/// # Errors
/// The database is newer than this server, or the digest of a step differs.
pub(crate) fn missing(
    known: &'static [Migration],
    applied: &[(i64, String)],
) -> Result<impl Iterator<Item = &'static Migration>, StoreError> {
    let newest = known.iter().map(|migration| migration.version).max().unwrap_or_default();
    if let Some((found, _)) = applied.iter().find(|(version, _)| *version > newest) {
        return Err(StoreError::NewerSchema { found: *found, known: newest });
    }
    let done = applied.iter().map(|(version, _)| *version).max().unwrap_or_default();
    for migration in known.iter().filter(|migration| migration.version <= done) {
        if !applied.iter().any(|(version, digest)| *version == migration.version && *digest == migration.digest()) {
            return Err(StoreError::corrupt(format!(
                "schema version {} is not the one that this server knows",
                migration.version
            )));
        }
    }
    Ok(known.iter().filter(move |migration| migration.version > done))
}
