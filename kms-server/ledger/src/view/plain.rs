//! Rows without a seal, as an act sees and changes them: grants, fingerprints, and shipments in the
//! spool.

use std::collections::HashMap;

use kms_domain::GrantId;
use kms_store::{
    FingerprintOwner, FingerprintPrefix, GrantRevocation, GrantRow, Lookup, ShipmentRefusal, ShipmentRow,
    ShipmentState, SpooledFile, UploadId,
};

use super::{View, not_read};
use crate::staged::StagedChange;
use kms_base::error::ServiceError;

impl View<'_, '_> {
    /// A grant's row.
    ///
    /// # Errors
    /// The row was not read yet.
    pub fn grant(&mut self, id: GrantId) -> Result<Option<GrantRow>, ServiceError> {
        match self.draft.read.grant(id) {
            Lookup::Present(row) => {
                // An earlier act of the same transaction may have revoked it.
                let revoked = self
                    .draft
                    .revocations
                    .iter()
                    .chain(&self.staged.revocations)
                    .find(|revocation| revocation.id == id);
                Ok(Some(GrantRow {
                    revoked: row.revoked.or_else(|| revoked.map(|revocation| revocation.revoked)),
                    ..row.clone()
                }))
            }
            Lookup::Absent => Ok(None),
            Lookup::NotRead => {
                self.draft.missing.grants.push(id);
                Err(not_read())
            }
        }
    }

    /// Writes a new grant. The reference to the act's first event becomes the row's audit
    /// reference.
    pub fn put_grant(&mut self, row: GrantRow) {
        self.staged.grants.push(row);
    }

    /// Revokes a grant.
    pub fn revoke_grant(&mut self, revocation: GrantRevocation) {
        self.staged.revocations.push(revocation);
    }

    /// The key versions with this fingerprint prefix.
    ///
    /// # Errors
    /// It was not read yet.
    pub fn fingerprint_owners(&mut self, prefix: FingerprintPrefix) -> Result<Vec<FingerprintOwner>, ServiceError> {
        let Some(owners) = self.draft.read.fingerprint_owners(prefix) else {
            self.draft.missing.fingerprints.push(prefix);
            return Err(not_read());
        };
        let staged = [&self.draft.fingerprints, &self.staged.fingerprints]
            .into_iter()
            .filter_map(|staged| staged.get(&prefix))
            .flatten();
        Ok(owners.iter().chain(staged).copied().collect())
    }

    /// Stores the fingerprint of a new key.
    pub fn put_fingerprint(&mut self, prefix: FingerprintPrefix, owner: FingerprintOwner) {
        self.staged.fingerprints.entry(prefix).or_default().push(owner);
        self.staged.log.push(StagedChange::Fingerprint(prefix));
    }

    /// A shipment in the spool.
    ///
    /// # Errors
    /// The row was not read yet.
    pub fn shipment(&mut self, upload: UploadId) -> Result<Option<ShipmentRow>, ServiceError> {
        if let Some(row) = self.draft.shipments.get(&upload) {
            return Ok(Some(row.clone()));
        }
        match self.draft.read.shipment(upload) {
            Lookup::Present(row) => Ok(Some(row.clone())),
            Lookup::Absent => Ok(None),
            Lookup::NotRead => {
                self.draft.missing.shipments.push(upload);
                Err(not_read())
            }
        }
    }

    /// Every file in the spool, as it will be when the transaction commits. An act that has read
    /// them is the only one, on all servers, that adds a file.
    ///
    /// # Errors
    /// They were not read yet.
    pub fn spool(&mut self) -> Result<Vec<SpooledFile>, ServiceError> {
        let Some(stored) = self.draft.read.spool() else {
            self.draft.missing.spool = true;
            return Err(not_read());
        };
        let mut files: HashMap<UploadId, SpooledFile> = stored.iter().map(|file| (file.upload, file.clone())).collect();
        for row in self.draft.shipments.values().chain(&self.staged.shipments) {
            if matches!(row.state, ShipmentState::Imported | ShipmentState::Refused) {
                files.remove(&row.upload);
            } else {
                files.insert(
                    row.upload,
                    SpooledFile {
                        upload: row.upload,
                        principal: row.principal.clone(),
                        size: row.size,
                        received: row.received,
                    },
                );
            }
        }
        Ok(files.into_values().collect())
    }

    /// Writes the progress of a shipment. Its generation is one above the generation that was read.
    pub fn put_shipment(&mut self, row: ShipmentRow) {
        self.staged.shipments.push(row);
    }

    /// Stores a refused line of a shipment.
    pub fn put_refused_line(&mut self, refusal: ShipmentRefusal) {
        self.staged.refused_lines.push(refusal);
    }
}
