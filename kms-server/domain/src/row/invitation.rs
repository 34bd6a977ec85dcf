//! Rows of invitations.

use bytes::Bytes;
use prost::Message;

use super::{RowError, message::InvitationRow, moment, octets};
use crate::{
    CodeId, EnrolledDevice, Invitation, InvitationEnd, Occasion, PersonName, PrincipalId, SystemTitle, UnixMillis,
};

impl Invitation {
    /// Reads the body of the row of the invitation of `handheld`.
    ///
    /// # Errors
    /// The body is no invitation row, or breaks an invariant.
    pub fn from_row(handheld: PrincipalId, body: Bytes) -> Result<Self, RowError> {
        let row = InvitationRow::decode(body)?;
        let end = match row.end {
            0 => None,
            1 => Some(InvitationEnd::Used(EnrolledDevice {
                time: moment(row.ended)?,
                tls_key_sha256: octets("SHA-256 of the TLS key", &row.tls_key_sha256)?,
                transport_key_sha256: octets("SHA-256 of the transport key", &row.transport_key_sha256)?,
                certificate: row.certificate,
                transport_certificate: row.transport_certificate,
            })),
            2 => Some(InvitationEnd::Withdrawn(moment(row.ended)?)),
            3 => Some(InvitationEnd::WrongCodes(moment(row.ended)?)),
            other => return Err(RowError::new(format!("end {other} of an invitation is unknown"))),
        };
        let invitation = Self {
            handheld,
            technician: PersonName::parse(&row.technician)?,
            client_titles: row
                .client_titles
                .iter()
                .map(|title| SystemTitle::from_octets(&title.to_be_bytes()))
                .collect::<Result<_, _>>()?,
            occasion: match row.occasion {
                1 => Occasion::First,
                2 => Occasion::HandOver,
                other => return Err(RowError::new(format!("occasion {other} of an invitation is unknown"))),
            },
            code_id: CodeId(octets("public part of the code", &row.code_id)?),
            code_sha256: octets("digest of the code", &row.code_sha256)?,
            invited_by: PrincipalId::parse(&row.invited_by)?,
            invited: moment(row.invited)?,
            expires: moment(row.expires)?,
            wrong_codes: row.wrong_codes,
            end,
        };
        invitation.check()?;
        Ok(invitation)
    }

    /// The body of the row.
    ///
    /// # Errors
    /// [`Invitation::check`] refuses it.
    pub fn to_row(&self) -> Result<Vec<u8>, RowError> {
        self.check()?;
        let mut row = InvitationRow {
            technician: self.technician.as_str().to_owned(),
            client_titles: self.client_titles.iter().map(|title| u64::from_be_bytes(title.octets())).collect(),
            occasion: match self.occasion {
                Occasion::First => 1,
                Occasion::HandOver => 2,
            },
            code_id: Bytes::copy_from_slice(&self.code_id.0),
            code_sha256: Bytes::copy_from_slice(&self.code_sha256),
            invited_by: self.invited_by.to_string(),
            expires: self.expires.0,
            wrong_codes: self.wrong_codes,
            invited: self.invited.0,
            ..InvitationRow::default()
        };
        match &self.end {
            None => {}
            Some(InvitationEnd::Used(device)) => {
                let EnrolledDevice {
                    time: UnixMillis(time),
                    tls_key_sha256,
                    transport_key_sha256,
                    certificate,
                    transport_certificate,
                } = device;
                (row.end, row.ended) = (1, *time);
                row.tls_key_sha256 = Bytes::copy_from_slice(tls_key_sha256);
                row.transport_key_sha256 = Bytes::copy_from_slice(transport_key_sha256);
                row.certificate = certificate.clone();
                row.transport_certificate = transport_certificate.clone();
            }
            Some(InvitationEnd::Withdrawn(UnixMillis(time))) => (row.end, row.ended) = (2, *time),
            Some(InvitationEnd::WrongCodes(UnixMillis(time))) => (row.end, row.ended) = (3, *time),
        }
        Ok(row.encode_to_vec())
    }
}
