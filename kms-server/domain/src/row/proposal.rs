//! Rows of proposals. The content is a message of its own, so that what people approved is exactly
//! these octets.

use bytes::Bytes;
use prost::{Message, Oneof};

use super::{RowError, approval::ApprovalRow, moment, octets, version};
use crate::{
    Approvals, DestroyRoot, KeyClass, KeyType, KeyVersionNumber, PersonName, PrincipalId, Proposal, ProposalContent,
    ProposalEnd, ProposalId, ProposedAction, Quorum, RaiseCounter, RecertifyPrincipal, RootKind, SecuritySetupId,
    SystemTitle,
};

#[derive(Clone, PartialEq, Message)]
struct ProposalRow {
    /// A [`ContentRow`].
    #[prost(bytes = "bytes", tag = "1")]
    content: Bytes,
    #[prost(message, repeated, tag = "2")]
    approvals: Vec<ApprovalRow>,
    #[prost(message, optional, tag = "3")]
    end: Option<EndRow>,
}

#[derive(Clone, PartialEq, Message)]
struct EndRow {
    #[prost(bool, tag = "1")]
    executed: bool,
    #[prost(string, tag = "2")]
    principal: String,
    #[prost(int64, tag = "3")]
    time: i64,
}

#[derive(Clone, PartialEq, Message)]
struct ContentRow {
    #[prost(string, tag = "1")]
    reason: String,
    #[prost(string, tag = "2")]
    requester: String,
    #[prost(string, tag = "3")]
    requester_person: String,
    #[prost(uint32, tag = "4")]
    quorum: u32,
    #[prost(int64, tag = "5")]
    created: i64,
    #[prost(int64, tag = "6")]
    expires: i64,
    #[prost(oneof = "ActionRow", tags = "16, 17, 18")]
    action: Option<ActionRow>,
}

#[derive(Clone, PartialEq, Oneof)]
enum ActionRow {
    #[prost(message, tag = "16")]
    RaiseCounter(RaiseCounterRow),
    #[prost(message, tag = "17")]
    DestroyRoot(DestroyRootRow),
    #[prost(message, tag = "18")]
    RecertifyPrincipal(RecertifyPrincipalRow),
}

#[derive(Clone, PartialEq, Message)]
struct RecertifyPrincipalRow {
    #[prost(string, tag = "1")]
    principal: String,
    #[prost(string, tag = "2")]
    person: String,
    #[prost(bytes = "bytes", tag = "3")]
    key_sha256: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct RaiseCounterRow {
    #[prost(fixed64, tag = "1")]
    meter: u64,
    /// b × 256 + e.
    #[prost(uint32, tag = "2")]
    setup: u32,
    #[prost(uint32, tag = "3")]
    key_type: u32,
    #[prost(uint32, tag = "4")]
    version: u32,
    #[prost(fixed64, tag = "5")]
    client_title: u64,
    #[prost(uint32, tag = "6")]
    to: u32,
}

#[derive(Clone, PartialEq, Message)]
struct DestroyRootRow {
    #[prost(uint32, tag = "1")]
    kind: u32,
    /// The class's name; empty: none.
    #[prost(string, tag = "2")]
    class: String,
    #[prost(uint32, tag = "3")]
    version: u32,
    #[prost(int64, tag = "4")]
    oldest_backup: i64,
}

impl Proposal {
    /// Reads the body of the row of proposal `id`.
    ///
    /// # Errors
    /// The body is no proposal row, or breaks an invariant.
    pub fn from_row(id: ProposalId, body: Bytes) -> Result<Self, RowError> {
        let row = ProposalRow::decode(body)?;
        let end = |row: EndRow| {
            Ok::<_, RowError>(ProposalEnd {
                executed: row.executed,
                principal: PrincipalId::parse(&row.principal)?,
                time: moment(row.time)?,
            })
        };
        let proposal = Self {
            id,
            content: content_from_row(ContentRow::decode(row.content)?)?,
            approvals: Approvals::from_rows(row.approvals)?,
            end: row.end.map(end).transpose()?,
        };
        proposal.check()?;
        Ok(proposal)
    }

    /// The body of the proposal's row.
    pub fn to_row(&self) -> Vec<u8> {
        let end = |end: &ProposalEnd| EndRow {
            executed: end.executed,
            principal: end.principal.to_string(),
            time: end.time.0,
        };
        ProposalRow {
            content: self.content.to_octets().into(),
            approvals: self.approvals.to_rows(),
            end: self.end.as_ref().map(end),
        }
        .encode_to_vec()
    }
}

impl ProposalContent {
    /// The content as it stands in the sealed row: what approvals are over.
    pub fn to_octets(&self) -> Vec<u8> {
        let title = |title: SystemTitle| u64::from_be_bytes(title.octets());
        let action = match &self.action {
            ProposedAction::RaiseCounter(raise) => ActionRow::RaiseCounter(RaiseCounterRow {
                meter: title(raise.meter),
                setup: u16::from_be_bytes(raise.setup.octets()).into(),
                key_type: raise.key_type.number().into(),
                version: raise.version.number(),
                client_title: title(raise.client_title),
                to: raise.to,
            }),
            ProposedAction::DestroyRoot(root) => ActionRow::DestroyRoot(DestroyRootRow {
                kind: root.kind.number(),
                class: root.class.map(KeyClass::name).unwrap_or_default().to_owned(),
                version: root.version.into(),
                oldest_backup: root.oldest_backup.0,
            }),
            ProposedAction::RecertifyPrincipal(recertify) => ActionRow::RecertifyPrincipal(RecertifyPrincipalRow {
                principal: recertify.principal.to_string(),
                person: recertify.person.as_str().to_owned(),
                key_sha256: Bytes::copy_from_slice(&recertify.key_sha256),
            }),
        };
        let row = ContentRow {
            reason: self.reason.clone(),
            requester: self.requester.to_string(),
            requester_person: self.requester_person.as_str().to_owned(),
            quorum: self.quorum.number().into(),
            created: self.created.0,
            expires: self.expires.0,
            action: Some(action),
        };
        row.encode_to_vec()
    }
}

fn content_from_row(row: ContentRow) -> Result<ProposalContent, RowError> {
    let title = |number: u64| SystemTitle::from_octets(&number.to_be_bytes());
    let action = match row.action {
        Some(ActionRow::RaiseCounter(row)) => ProposedAction::RaiseCounter(RaiseCounter {
            meter: title(row.meter)?,
            setup: SecuritySetupId::from_octets(
                u16::try_from(row.setup)
                    .map_err(|_| RowError::new("a security setup has more than two octets"))?
                    .to_be_bytes(),
            ),
            key_type: KeyType::from_number(u8::try_from(row.key_type).unwrap_or_default())?,
            version: KeyVersionNumber::new(row.version)?,
            client_title: title(row.client_title)?,
            to: row.to,
        }),
        Some(ActionRow::DestroyRoot(row)) => {
            let class = KeyClass::WITH_ROOTS.into_iter().find(|class| class.name() == row.class);
            if class.is_none() && !row.class.is_empty() {
                return Err(RowError::new(format!("key class `{}` is unknown", row.class)));
            }
            let root = DestroyRoot::new(
                RootKind::from_number(row.kind)?,
                class,
                version("root", row.version)?,
                moment(row.oldest_backup)?,
            )?;
            ProposedAction::DestroyRoot(root)
        }
        Some(ActionRow::RecertifyPrincipal(row)) => ProposedAction::RecertifyPrincipal(RecertifyPrincipal {
            principal: PrincipalId::parse(&row.principal)?,
            person: PersonName::parse(&row.person)?,
            key_sha256: octets("SHA-256 of a key", &row.key_sha256)?,
        }),
        None => {
            return Err(RowError::new(
                "a proposal of nothing, or of something that a newer version of the server knows",
            ));
        }
    };
    Ok(ProposalContent {
        action,
        reason: row.reason,
        requester: PrincipalId::parse(&row.requester)?,
        requester_person: PersonName::parse(&row.requester_person)?,
        quorum: Quorum::new(row.quorum)?,
        created: moment(row.created)?,
        expires: moment(row.expires)?,
    })
}
