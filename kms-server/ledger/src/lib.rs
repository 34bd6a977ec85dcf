//! Every act and its record, in one transaction (I2).

mod attempt;
mod bounds;
mod chain;
mod clock;
mod committer;
mod decision;
mod door;
mod growth;
mod history;
mod names;
mod owner_row;
mod queue;
mod refusals;
mod replay;
mod view;

pub use chain::{AuditKey, AuditKeys, AuditLeaf};
pub use committer::{CLOCK_JUMPED, event_kind};
pub use committer::{Committed, Committer, CommitterSettings};
pub use decision::{Decision, Entry};
pub use door::{
    Act, Administration, Asker, ByRecord, Door, Found, Keep, Keys, Known, Never, Past, Permit, Remembered, Request,
    RequestChunk,
};
pub use history::RestoreSettings;
pub use names::{principal_row, quota_use_row};
pub use owner_row::OwnerRow;
pub use replay::{
    Answered, Asked, Asking, PastRecord, RecordName, Window, overtaken, refused_before, used_for_another,
};
#[doc(hidden)]
pub use view::Actor;
pub use view::sealed_name;
pub use view::{CounterOf, LiveLease, ServerAct, View};
