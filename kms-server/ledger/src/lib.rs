//! Every act and its record, in one transaction (I2). From the top to the bottom:
//!
//! - [`Door`] checks what all acts of callers have in common: caller, policy, repetition, record
//!   (`door`, `replay`).
//! - [`Committer`] queues acts for the writing task (`committer`, `queue`, `queued`, `shares`).
//! - The writing task has them decided in turn, and commits them together (`writer`, `transaction`,
//!   `draft`, `records`). Beside it stand the bounds on what it records (`growth`, `refusals`), the
//!   watch over the clock (`clock_watch`), the chains of other writers (`chain_ends`), and restored
//!   mode (`history`, `watermark`).
//! - [`View`] is what an act sees and changes (`view`, `staged`, `decision`): sealed rows
//!   (`sealed`, `seen`, `owner_row`), the index of exposures that repeats them (`exposure_rows`,
//!   `exposure_repair`), counters (`chunks`), tasks and rows without a seal.

mod actor;
mod chain;
mod chain_ends;
mod chunks;
mod clock_watch;
mod committer;
mod decision;
mod door;
mod draft;
mod exposure_repair;
mod exposure_rows;
mod growth;
mod history;
mod maintenance;
mod owner_row;
mod queue;
mod queued;
mod records;
mod refusals;
mod replay;
mod sealed;
mod seen;
mod shared;
mod shares;
mod staged;
mod transaction;
mod view;
mod watermark;
mod writer;

#[doc(hidden)]
pub use actor::Actor;

pub use actor::ServerAct;
pub use chain::{AuditKey, AuditKeys, AuditLeaf};
pub use committer::Committer;
pub use decision::{Decision, Entry};
pub use door::{
    Act, Administration, Asker, ByRecord, Door, Found, Keep, Keys, Known, Never, Past, Permit, Remembered, Request,
    RequestChunk,
};
pub use owner_row::OwnerRow;
pub use queued::Committed;
pub use records::{CLOCK_JUMPED, event_kind};
pub use replay::{
    Answered, Asked, Asking, PastRecord, RecordName, Window, overtaken, refused_before, used_for_another,
};
pub use sealed::{invitation_row, principal_row, quota_use_row, sealed_name, work_order_columns, work_order_row};
pub use shared::CommitterSettings;
pub use view::View;
pub use view::counters::{CounterOf, LiveLease};
pub use watermark::RestoreSettings;
