//! Every act and its record, in one transaction (I2).

mod chain;
mod committer;
mod refusals;
mod view;

pub use chain::{AuditKey, AuditLeaf};
pub use committer::{Committed, Committer, CommitterSettings};
pub(crate) use committer::{decode_reference, event_kind};
pub use view::{Actor, CounterOf, View};
