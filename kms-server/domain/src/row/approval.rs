//! Approvals in rows.

use prost::Message;

use super::{RowError, moment};
use crate::{Approval, Approvals, PersonName, PrincipalId};

#[derive(Clone, PartialEq, Message)]
pub(super) struct ApprovalRow {
    #[prost(string, tag = "1")]
    principal: String,
    #[prost(string, tag = "2")]
    person: String,
    #[prost(int64, tag = "3")]
    time: i64,
}

impl Approvals {
    pub(super) fn to_rows(&self) -> Vec<ApprovalRow> {
        let row = |approval: &Approval| ApprovalRow {
            principal: approval.principal.to_string(),
            person: approval.person.as_str().to_owned(),
            time: approval.time.0,
        };
        self.iter().map(row).collect()
    }

    pub(super) fn from_rows(rows: Vec<ApprovalRow>) -> Result<Self, RowError> {
        let approval = |row: ApprovalRow| {
            Ok(Approval {
                principal: PrincipalId::parse(&row.principal)?,
                person: PersonName::parse(&row.person)?,
                time: moment(row.time)?,
            })
        };
        Ok(Self::from_row(rows.into_iter().map(approval).collect::<Result<_, RowError>>()?))
    }
}
