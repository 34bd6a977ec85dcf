//! The ledger, under an island.

mod attempt;
mod queue;
