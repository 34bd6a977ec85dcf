//! The ledger, under an island.

mod attempt;
mod door;
mod queue;
