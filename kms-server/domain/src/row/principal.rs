//! Rows of principals and of the island.

use bytes::Bytes;
use prost::Message;

use super::{
    RowError,
    message::{CertificateRow, ClassRow, IslandRow, PrincipalRow, RootRow, TransportRow},
    moment, octets,
    root::{made_roots, made_roots_rows},
    slot::derivation_number,
    version,
};
use crate::{
    Assurance, ClassRoots, CounterJump, DatabaseHistory, DiversificationRoot, Enrolment, Island, IslandKind,
    IslandName, KeyClass, KeyDerivation, PersonName, Principal, PrincipalCertificate, PrincipalId, PrincipalStatus,
    RootLedger, SystemTitle, Timeline, TransportCertificate, UnixMillis,
};

impl Principal {
    /// Reads the body of the row of principal `id`.
    ///
    /// # Errors
    /// The body is no principal row, or breaks an invariant.
    pub fn from_row(id: PrincipalId, body: Bytes) -> Result<Self, RowError> {
        let row = PrincipalRow::decode(body)?;
        let status = match row.status {
            1 => PrincipalStatus::Enabled,
            2 => PrincipalStatus::Disabled,
            other => return Err(RowError::new(format!("principal status {other} is unknown"))),
        };
        let certificates = row
            .certificates
            .into_iter()
            .map(|row| {
                if !(1..=20).contains(&row.serial.len()) {
                    return Err(RowError::new("a certificate serial number has not 1 to 20 octets"));
                }
                let enrolment = Enrolment::ALL.into_iter().find(|enrolment| enrolment.number() == row.enrolment);
                Ok(PrincipalCertificate {
                    serial: row.serial,
                    sha256: octets("SHA-256 of the certificate", &row.sha256)?,
                    not_after: UnixMillis(row.not_after),
                    key_sha256: if row.key_sha256.is_empty() {
                        None
                    } else {
                        Some(octets("SHA-256 of a certificate's key", &row.key_sha256)?)
                    },
                    enrolment: enrolment
                        .ok_or_else(|| RowError::new(format!("enrolment {} is unknown", row.enrolment)))?,
                    issued_by: if row.issued_by.is_empty() { None } else { Some(PrincipalId::parse(&row.issued_by)?) },
                })
            })
            .collect::<Result<_, _>>()?;
        let transport = row.transport.map(TransportCertificate::try_from).transpose()?;
        let client_titles = row
            .client_titles
            .into_iter()
            .map(|title| SystemTitle::from_octets(&title.to_be_bytes()))
            .collect::<Result<_, _>>()?;
        let person = if row.person.is_empty() { None } else { Some(PersonName::parse(&row.person)?) };
        let assurance = match row.assurance {
            0 => None,
            number => Some(
                Assurance::ALL
                    .into_iter()
                    .find(|assurance| assurance.number() == number)
                    .ok_or_else(|| RowError::new(format!("assurance {number} is unknown")))?,
            ),
        };
        let shipment_key = Some(row.shipment_key).filter(|key| !key.is_empty());
        let principal = Self {
            id,
            revision: row.revision,
            status,
            certificates,
            transport,
            client_titles,
            person,
            assurance,
            shipment_key,
            added: moment(row.added)?,
        };
        principal.check()?;
        Ok(principal)
    }

    /// The body of the principal's row.
    ///
    /// # Errors
    /// [`Principal::check`] refuses it.
    pub fn to_row(&self) -> Result<Vec<u8>, RowError> {
        self.check()?;
        let row = PrincipalRow {
            revision: self.revision,
            status: match self.status {
                PrincipalStatus::Enabled => 1,
                PrincipalStatus::Disabled => 2,
            },
            certificates: self
                .certificates
                .iter()
                .map(|certificate| CertificateRow {
                    serial: certificate.serial.clone(),
                    sha256: Bytes::copy_from_slice(&certificate.sha256),
                    not_after: certificate.not_after.0,
                    key_sha256: certificate
                        .key_sha256
                        .map(|digest| Bytes::copy_from_slice(&digest))
                        .unwrap_or_default(),
                    enrolment: certificate.enrolment.number(),
                    issued_by: certificate.issued_by.as_ref().map(ToString::to_string).unwrap_or_default(),
                })
                .collect(),
            transport: self.transport.as_ref().map(|transport| TransportRow {
                certificate: transport.certificate.clone(),
                sha256: Bytes::copy_from_slice(&transport.sha256),
                public_point: Bytes::copy_from_slice(&transport.public_point),
            }),
            client_titles: self.client_titles.iter().map(|title| u64::from_be_bytes(title.octets())).collect(),
            person: self.person.as_ref().map(|person| person.as_str().to_owned()).unwrap_or_default(),
            shipment_key: self.shipment_key.clone().unwrap_or_default(),
            assurance: self.assurance.map_or(0, Assurance::number),
            added: self.added.0,
        };
        Ok(row.encode_to_vec())
    }
}

impl Island {
    /// Reads the body of the island's row.
    ///
    /// # Errors
    /// The body is no island row, or breaks an invariant.
    pub fn from_row(name: IslandName, body: Bytes) -> Result<Self, RowError> {
        let row = IslandRow::decode(body)?;
        let kind = match row.kind {
            1 => IslandKind::Development,
            2 => IslandKind::Production,
            other => return Err(RowError::new(format!("island kind {other} is unknown"))),
        };
        let classes = row.classes.into_iter().map(ClassRoots::try_from).collect::<Result<Vec<_>, _>>()?;
        if classes
            .iter()
            .enumerate()
            .any(|(at, roots)| classes.iter().take(at).any(|earlier| earlier.class == roots.class))
        {
            return Err(RowError::new("a key class has its roots twice"));
        }
        let escrow_fingerprint = if row.escrow_fingerprint.is_empty() {
            None
        } else {
            Some(octets("escrow fingerprint", &row.escrow_fingerprint)?)
        };
        let timeline = (row.timeline != 0).then_some(Timeline { cluster: row.cluster, number: row.timeline });
        let history = DatabaseHistory { timeline, restores: row.restores, jump: CounterJump::new(row.jump) };
        let seal_key_version = version("seal key", row.seal_key_version)?;
        let ledger = RootLedger {
            entries: made_roots(row.made_roots)?,
            oldest_seal_key_version: version("oldest seal key", row.oldest_seal_key_version.max(1))?,
            vendor_transport_version: version("vendor transport key", row.vendor_transport_version.max(1))?,
            oldest_vendor_transport_version: version(
                "oldest vendor transport key",
                row.oldest_vendor_transport_version.max(1),
            )?,
        };
        let (principals_added, created) = (row.principals_added, moment(row.created)?);
        Ok(Self {
            name,
            kind,
            classes,
            seal_key_version,
            escrow_fingerprint,
            history,
            ledger,
            principals_added,
            exposures_indexed: row.exposures_indexed,
            created,
        })
    }

    /// The body of the island's row.
    pub fn to_row(&self) -> Vec<u8> {
        let classes = self.classes.iter().map(|roots| ClassRow {
            class: class_number(roots.class),
            roots: roots
                .diversification
                .iter()
                .map(|root| RootRow { version: root.version.into(), derivation: derivation_number(root.derivation) })
                .collect(),
            storage_kek_version: roots.storage_kek_version.into(),
        });
        IslandRow {
            kind: match self.kind {
                IslandKind::Development => 1,
                IslandKind::Production => 2,
            },
            classes: classes.collect(),
            seal_key_version: self.seal_key_version.into(),
            escrow_fingerprint: self
                .escrow_fingerprint
                .map(|fingerprint| Bytes::copy_from_slice(&fingerprint))
                .unwrap_or_default(),
            restores: self.history.restores,
            jump: self.history.jump.counters(),
            cluster: self.history.timeline.map_or(0, |timeline| timeline.cluster),
            timeline: self.history.timeline.map_or(0, |timeline| timeline.number),
            made_roots: made_roots_rows(&self.ledger.entries),
            oldest_seal_key_version: unless_first(self.ledger.oldest_seal_key_version),
            vendor_transport_version: unless_first(self.ledger.vendor_transport_version),
            oldest_vendor_transport_version: unless_first(self.ledger.oldest_vendor_transport_version),
            principals_added: self.principals_added,
            exposures_indexed: self.exposures_indexed,
            created: self.created.0,
        }
        .encode_to_vec()
    }
}

impl TryFrom<TransportRow> for TransportCertificate {
    type Error = RowError;

    fn try_from(row: TransportRow) -> Result<Self, RowError> {
        let public_point: [u8; 65] = octets("transport public point", &row.public_point)?;
        if public_point.first() != Some(&4) {
            return Err(RowError::new("the transport public point is not uncompressed"));
        }
        Ok(Self {
            certificate: row.certificate,
            sha256: octets("SHA-256 of the transport certificate", &row.sha256)?,
            public_point,
        })
    }
}

impl TryFrom<ClassRow> for ClassRoots {
    type Error = RowError;

    fn try_from(row: ClassRow) -> Result<Self, RowError> {
        let class = KeyClass::WITH_ROOTS
            .into_iter()
            .find(|class| class_number(*class) == row.class)
            .ok_or_else(|| RowError::new(format!("key class {} is unknown", row.class)))?;
        let diversification = row
            .roots
            .into_iter()
            .map(|root| {
                let derivation = match root.derivation {
                    1 => KeyDerivation::Sp800108Cmac,
                    2 => KeyDerivation::AesCbcEncryptData,
                    other => return Err(RowError::new(format!("key derivation {other} is unknown"))),
                };
                Ok(DiversificationRoot { version: version("diversification root", root.version)?, derivation })
            })
            .collect::<Result<Vec<_>, _>>()?;
        if !diversification.is_sorted_by(|root, next| root.version < next.version) {
            return Err(RowError::new("the versions of the diversification roots do not increase"));
        }
        Ok(Self { class, diversification, storage_kek_version: version("storage KEK", row.storage_kek_version)? })
    }
}

/// Nearly always version 1, which takes no space.
const fn unless_first(version: u8) -> u32 {
    if version == 1 { 0 } else { version as u32 }
}

const fn class_number(class: KeyClass) -> u32 {
    match class {
        KeyClass::Kek => 1,
        KeyClass::Session => 2,
        KeyClass::Authentication => 3,
        KeyClass::Ca => 4,
    }
}
