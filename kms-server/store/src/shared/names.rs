//! Numbers for names that are repeated in many rows: terms of the dictionary, and writers.

use std::{
    borrow::Cow,
    collections::{BTreeSet, HashMap},
    sync::{PoisonError, RwLock},
};

use kms_domain::WriterId;
use sqlx::Row as _;

use super::{Connection, Database};
use crate::{Changes, ExposureParty, StoreError, batch::RowBatch, error::Failure};

/// What a term names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum TermKind {
    Vendor,
    Profile,
    HeadEnd,
    Batch,
    Principal,
    Purpose,
}

impl TermKind {
    /// The number in the database.
    pub(super) const fn number(self) -> i64 {
        match self {
            Self::Vendor => 1,
            Self::Profile => 2,
            Self::HeadEnd => 3,
            Self::Batch => 4,
            Self::Principal => 5,
            Self::Purpose => 6,
        }
    }
}

/// Numbers that are known to be in the database. Terms and writers are never removed, so these
/// never become wrong.
#[derive(Default)]
pub(in super::super) struct Names {
    known: RwLock<Numbers>,
}

/// The numbers of names.
#[derive(Clone, Default)]
pub(super) struct Numbers {
    terms: HashMap<TermKind, HashMap<String, i64>>,
    writers: HashMap<WriterId, i64>,
}

impl Names {
    /// The numbers of all names in the changes. New names are added within the caller's
    /// transaction.
    pub(super) async fn resolve(&self, connection: &mut Connection, changes: &Changes) -> Result<Numbers, Failure> {
        let mut numbers = Numbers::default();
        let (mut terms, mut writers) = (BTreeSet::new(), BTreeSet::new());
        {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            for (kind, text) in terms_of(changes) {
                match known.terms.get(&kind).and_then(|terms| terms.get(text.as_ref())) {
                    Some(number) if numbers.lacks(kind, &text) => numbers.add(kind, text.into_owned(), *number),
                    Some(_) => {}
                    None => {
                        terms.insert((kind, text));
                    }
                }
            }
            for writer in changes
                .audit
                .iter()
                .map(|record| record.writer)
                .chain(changes.grants.iter().map(|grant| grant.audit.writer))
            {
                match known.writers.get(&writer) {
                    Some(number) => {
                        numbers.writers.insert(writer, *number);
                    }
                    None => {
                        writers.insert(writer);
                    }
                }
            }
        }
        if !terms.is_empty() {
            let batch = |terms: &BTreeSet<(TermKind, Cow<'_, str>)>| {
                RowBatch::of(terms, |row, (kind, text)| {
                    row.int(kind.number()).text(text);
                })
                .into_parameters()
                .0
            };
            sqlx::query::<Database>(INSERT_TERMS).bind(batch(&terms)).execute(&mut *connection).await?;
            for row in sqlx::query::<Database>(SELECT_TERMS).bind(batch(&terms)).fetch_all(&mut *connection).await? {
                let (number, kind, text): (i64, i64, String) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
                if let Some((kind, _)) = terms.iter().find(|(known, _)| known.number() == kind) {
                    numbers.add(*kind, text, number);
                }
            }
        }
        for writer in writers {
            let number: Option<i64> =
                sqlx::query_scalar::<Database, i64>("SELECT CAST(number AS BIGINT) FROM server WHERE writer = $1")
                    .bind(writer.octets().as_slice())
                    .fetch_optional(&mut *connection)
                    .await?;
            let number = number.ok_or_else(|| StoreError::Invalid {
                what: "writer id",
                reason: format!("`{writer}` was never registered"),
            })?;
            numbers.writers.insert(writer, number);
        }
        Ok(numbers)
    }

    /// Remembers the numbers that a committed transaction used.
    pub(super) fn learn(&self, numbers: Numbers) {
        let unknown = {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            numbers.writers.keys().any(|writer| !known.writers.contains_key(writer))
                || numbers.terms.iter().any(|(kind, terms)| terms.keys().any(|text| known.lacks(*kind, text)))
        };
        if unknown {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            known.writers.extend(numbers.writers);
            for (kind, terms) in numbers.terms {
                known.terms.entry(kind).or_default().extend(terms);
            }
        }
    }
}

impl Numbers {
    /// The number of a term that [`Names::resolve`] found; 0 stands for no name.
    pub(super) fn term(&self, kind: TermKind, text: &str) -> i64 {
        self.terms.get(&kind).and_then(|terms| terms.get(text)).copied().unwrap_or_default()
    }

    /// The number of a term, or 0 for none.
    pub(super) fn optional_term(&self, kind: TermKind, text: Option<&str>) -> i64 {
        text.map(|text| self.term(kind, text)).unwrap_or_default()
    }

    /// The number of a writer that [`Names::resolve`] found.
    pub(super) fn writer(&self, writer: WriterId) -> i64 {
        self.writers.get(&writer).copied().unwrap_or_default()
    }

    fn lacks(&self, kind: TermKind, text: &str) -> bool {
        !self.terms.get(&kind).is_some_and(|terms| terms.contains_key(text))
    }

    fn add(&mut self, kind: TermKind, text: String, number: i64) {
        self.terms.entry(kind).or_default().insert(text, number);
    }
}

fn terms_of(changes: &Changes) -> impl Iterator<Item = (TermKind, Cow<'_, str>)> {
    let meters = changes.meters.iter().filter_map(|put| put.projection.as_ref()).flat_map(|projection| {
        let names = [
            Some((TermKind::Vendor, projection.vendor.as_str())),
            Some((TermKind::Profile, projection.profile.as_str())),
            projection.head_end.as_deref().map(|text| (TermKind::HeadEnd, text)),
            projection.batch.as_deref().map(|text| (TermKind::Batch, text)),
        ];
        names.into_iter().flatten().map(|(kind, text)| (kind, Cow::from(text)))
    });
    let requests = changes.requests.iter().map(|put| (TermKind::Principal, Cow::from(put.key.principal.to_string())));
    let grants = changes.grants.iter().flat_map(|grant| {
        [
            (TermKind::Principal, Cow::from(grant.principal.to_string())),
            (TermKind::Purpose, Cow::from(grant.purpose.as_str())),
        ]
    });
    let tasks = changes.tasks.iter().flat_map(|row| {
        let head_end = row.head_end.as_deref().map(|text| (TermKind::HeadEnd, Cow::from(text)));
        [Some((TermKind::Vendor, Cow::from(row.vendor.as_str()))), head_end].into_iter().flatten()
    });
    let makers = changes.work_orders.iter().map(|row| (TermKind::Principal, Cow::from(row.maker.to_string())));
    let exposures = changes.exposures.iter().filter_map(|row| match &row.party {
        ExposureParty::Principal(principal) => Some((TermKind::Principal, Cow::from(principal.to_string()))),
        ExposureParty::Anyone | ExposureParty::KeyValue(_) => None,
    });
    meters.chain(requests).chain(grants).chain(tasks).chain(makers).chain(exposures)
}

const INSERT_TERMS: &str = concat!(
    "INSERT INTO term (kind, text) SELECT ",
    int!(0),
    ", ",
    text!(1),
    " FROM ",
    rows!(),
    " WHERE true ON CONFLICT (kind, text) DO NOTHING"
);

const SELECT_TERMS: &str = concat!(
    "SELECT CAST(t.id AS BIGINT), CAST(t.kind AS BIGINT), t.text FROM ",
    rows!(),
    join!(),
    "term AS t ON t.kind = ",
    int!(0),
    " AND t.text = ",
    text!(1)
);
