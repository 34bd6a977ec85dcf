//! Every act and its record, in one transaction (I2).

mod attempt;
mod bounds;
mod chain;
mod clock;
mod committer;
mod growth;
mod history;
mod owner_row;
mod queue;
mod refusals;
mod replay;
mod view;

pub use chain::{AuditKey, AuditKeys, AuditLeaf};
pub(crate) use committer::{CLOCK_JUMPED, event_kind};
pub use committer::{Committed, Committer, CommitterSettings};
pub use history::RestoreSettings;
pub use owner_row::OwnerRow;
pub use replay::{
    Answered, Asked, Asking, PastRecord, RecordName, Replay, Window, overtaken, refused_before, used_for_another,
};
pub(crate) use view::sealed_name;
pub use view::{Actor, CounterOf, LiveLease, View};
