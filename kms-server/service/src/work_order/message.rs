//! Work orders as messages and as records. Only messages have a place.

use kms_domain::{UnixMillis, WorkOrder, WorkOrderContent};
use kms_proto::v1::{self, OrderedWork};

/// How much of an order a message tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shown {
    /// All of it.
    All,
    /// All but the place.
    WithoutPlace,
    /// One of a list: neither meters nor place.
    Listed,
}

/// An order as a message.
pub(super) fn message(order: &WorkOrder, shown: Shown, now: UnixMillis) -> v1::WorkOrder {
    let content = &order.content;
    let has_place = !content.place.as_str().is_empty();
    let meters = match shown {
        Shown::All | Shown::WithoutPlace => content.meters(),
        Shown::Listed => &[],
    };
    v1::WorkOrder {
        work_order_id: order.id.to_string(),
        revision: order.revision,
        state: order.state(now).name().to_owned(),
        maker: order.maker.to_string(),
        content: Some(v1::WorkOrderContent {
            technician: content.technician.as_str().to_owned(),
            meters: meters.iter().map(|title| title.octets().to_vec().into()).collect(),
            tasks: content.tasks.names(),
            from_ms: content.from.0,
            until_ms: content.until.0,
            place: if shown == Shown::All { content.place.as_str().to_owned() } else { String::new() },
        }),
        meter_count: u32::try_from(content.meters().len()).unwrap_or(u32::MAX),
        place_withheld: has_place && shown == Shown::WithoutPlace,
        created_ms: order.created.0,
        ended_by: order.end.as_ref().map(|end| end.principal.to_string()).unwrap_or_default(),
        ended_ms: order.end.as_ref().map_or(0, |end| end.time.0),
    }
}

/// What the log says of an order (I2): all but the place.
pub(super) fn recorded(content: &WorkOrderContent) -> OrderedWork {
    OrderedWork {
        technician: content.technician.as_str().to_owned(),
        meters: content.meters().iter().map(|title| u64::from_be_bytes(title.octets())).collect(),
        tasks: content.tasks.names(),
        from_ms: content.from.0,
        until_ms: content.until.0,
    }
}
