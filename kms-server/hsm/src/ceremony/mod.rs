//! The ceremony makes an island's roots in a token, lets each symmetric root leave once, wrapped
//! for the escrow key and for standby tokens, and then locks it for good.
//!
//! The order of the steps makes a crash harmless at every point: all roots are made, all are
//! wrapped, the caller stores the wrapped roots durably, and only then are the roots locked. A
//! second run finishes what the first one began. A root that is locked and in no stored package can
//! never be escrowed: the ceremony names it and refuses to continue.

pub(crate) mod create;
mod login;
mod objects;
pub(crate) mod package;
pub(crate) mod plan;
mod recipients;
pub(crate) mod standby;
mod steps;
pub(crate) mod version;
