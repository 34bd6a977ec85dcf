//! Every act and its record, in one transaction (I2).

mod attempt;
mod chain;
mod committer;
mod history;
mod owner_row;
mod refusals;
mod view;

pub use chain::{AuditKey, AuditKeys, AuditLeaf};
pub(crate) use committer::event_kind;
pub use committer::{Committed, Committer, CommitterSettings, past_record, read_record};
pub use history::RestoreSettings;
pub use owner_row::OwnerRow;
pub(crate) use view::sealed_name;
pub use view::{Actor, CounterOf, LiveLease, View};
