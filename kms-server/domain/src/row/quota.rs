//! Rows of what principals have used of their quotas.

use bytes::Bytes;
use prost::Message;

use super::{
    RowError,
    message::{QuotaUseRow, UsedQuotaRow},
};
use crate::{PrincipalId, QuotaHour, QuotaName, QuotaUse, SystemTitle, quota::UsedQuota};

impl QuotaUse {
    /// Reads the body of the row of `principal`'s use.
    ///
    /// # Errors
    /// The body is no such row, or breaks an invariant.
    pub fn from_row(principal: PrincipalId, body: Bytes) -> Result<Self, RowError> {
        let row = QuotaUseRow::decode(body)?;
        if row.hour == 0 {
            return Err(RowError::new("the row has no hour: it is cut"));
        }
        let used = row
            .used
            .into_iter()
            .map(|row| {
                let meters = row
                    .meters
                    .iter()
                    .map(|title| SystemTitle::from_octets(&title.to_be_bytes()))
                    .collect::<Result<Vec<_>, _>>()?;
                if !meters.is_sorted_by(|meter, next| meter < next) {
                    return Err(RowError::new("the meters of a quota are not in increasing order"));
                }
                Ok(UsedQuota { quota: QuotaName::parse(&row.quota)?, commands: row.commands, meters })
            })
            .collect::<Result<_, RowError>>()?;
        Ok(Self { principal, hour: QuotaHour::from_number(row.hour), used })
    }

    /// The body of the row. A use that counted nothing has none.
    pub fn to_row(&self) -> Vec<u8> {
        let used = self.used.iter().map(|used| UsedQuotaRow {
            quota: used.quota.as_str().to_owned(),
            commands: used.commands,
            meters: used.meters.iter().map(|title| u64::from_be_bytes(title.octets())).collect(),
        });
        QuotaUseRow { used: used.collect(), hour: self.hour.number() }.encode_to_vec()
    }
}
