//! A PKCS#11 module: the embedded default HSM of the key management system, and the one that fails
//! on demand.
//!
//! It offers the function lists 2.40 and 3.0 of the standard (`C_GetFunctionList`,
//! `C_GetInterface`). The README says how it is configured, what it can do, and what it does not
//! protect against: it is software, and a process that can read its memory can read its keys.
//!
//! Modules, from the outside in:
//! - `abi`: the C functions, and all `unsafe` code
//! - `module`: slots and sessions
//! - `creation`, `generation`, `wrapping`, `derivation`, `operations`, `cipher`, `signature`,
//!   `message`: the work of a session
//! - `token`, `store`: tokens in memory and on disk
//! - `object`, `attribute`, `template`: what an object is
//! - `crypto`: the algorithms
//! - `control`: failures on demand
//! - `nonces`: a watcher of nonces, for tests

#![deny(unsafe_code)]

pub mod abi;

mod attribute;
mod buffer;
mod cache;
mod cipher;
mod control;
mod creation;
mod crypto;
mod derivation;
mod error;
mod function;
mod generation;
mod hex;
mod mechanism;
mod message;
mod module;
mod nonces;
mod object;
mod operations;
mod pin;
mod session;
mod settings;
mod signature;
mod store;
mod table;
mod template;
mod token;
mod wrapping;

pub use nonces::{Notes, RepeatedNonce};
