//! Rows of work orders.

use bytes::Bytes;
use prost::Message;

use super::{RowError, moment};
use crate::{
    PersonName, Place, PlaceSalt, PrincipalId, SystemTitle, WorkOrder, WorkOrderContent, WorkOrderEnd, WorkOrderId,
    WorkOrderTasks,
};

#[derive(Clone, PartialEq, Message)]
struct WorkOrderRow {
    #[prost(uint32, tag = "1")]
    revision: u32,
    #[prost(string, tag = "2")]
    maker: String,
    #[prost(string, tag = "3")]
    technician: String,
    /// 8 octets a meter, ascending.
    #[prost(bytes = "bytes", tag = "4")]
    meters: Bytes,
    /// [`WorkOrderTasks::bits`].
    #[prost(uint32, tag = "5")]
    tasks: u32,
    #[prost(int64, tag = "6")]
    from: i64,
    #[prost(int64, tag = "7")]
    until: i64,
    /// Empty: none, or removed.
    #[prost(string, tag = "8")]
    place: String,
    #[prost(int64, tag = "9")]
    created: i64,
    #[prost(message, optional, tag = "10")]
    end: Option<EndRow>,
    /// [`PlaceSalt`]; empty: there is no place.
    #[prost(bytes = "bytes", tag = "11")]
    salt: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct EndRow {
    #[prost(bool, tag = "1")]
    completed: bool,
    #[prost(string, tag = "2")]
    principal: String,
    #[prost(int64, tag = "3")]
    time: i64,
}

impl WorkOrder {
    /// Reads the body of the row of work order `id`.
    ///
    /// # Errors
    /// The body is no work order's row, or breaks an invariant.
    pub fn from_row(id: WorkOrderId, body: Bytes) -> Result<Self, RowError> {
        let row = WorkOrderRow::decode(body)?;
        let titles = row.meters.chunks_exact(TITLE);
        if !titles.remainder().is_empty() {
            return Err(RowError::new("a system title is cut"));
        }
        let end = |row: EndRow| {
            Ok::<_, RowError>(WorkOrderEnd {
                completed: row.completed,
                principal: PrincipalId::parse(&row.principal)?,
                time: moment(row.time)?,
            })
        };
        let order = Self {
            id,
            revision: row.revision,
            maker: PrincipalId::parse(&row.maker)?,
            content: WorkOrderContent {
                technician: PersonName::parse(&row.technician)?,
                meters: titles.map(SystemTitle::from_octets).collect::<Result<_, _>>()?,
                tasks: WorkOrderTasks::from_bits(row.tasks)?,
                from: moment(row.from)?,
                until: moment(row.until)?,
                place: Place::parse(&row.place)?,
            },
            salt: PlaceSalt::from_octets(&row.salt)?,
            created: moment(row.created)?,
            end: row.end.map(end).transpose()?,
        };
        order.check()?;
        Ok(order)
    }

    /// The body of the order's row.
    pub fn to_row(&self) -> Vec<u8> {
        let content = &self.content;
        let end = |end: &WorkOrderEnd| EndRow {
            completed: end.completed,
            principal: end.principal.to_string(),
            time: end.time.0,
        };
        WorkOrderRow {
            revision: self.revision,
            maker: self.maker.to_string(),
            technician: content.technician.as_str().to_owned(),
            meters: content.meters().iter().flat_map(|title| title.octets()).collect(),
            tasks: content.tasks.bits(),
            from: content.from.0,
            until: content.until.0,
            place: content.place.as_str().to_owned(),
            created: self.created.0,
            end: self.end.as_ref().map(end),
            salt: self.salt.as_ref().map_or_else(Bytes::new, |salt| Bytes::copy_from_slice(salt.octets())),
        }
        .encode_to_vec()
    }
}

const TITLE: usize = 8;
