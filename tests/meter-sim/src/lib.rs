//! A simulated DLMS/COSEM meter, for tests of a key management system.
//!
//! It speaks xDLMS with logical names over the DLMS wrapper on TCP: AARQ and AARE with lowest, low
//! and high level security (HLS 5), GET, SET and ACTION under global and dedicated keys in both
//! forms, and `key_transfer` as meters in the field execute it ([`behaviour`]). It has its own
//! codec, which shares no code with the server's, so that each can check the other.
//!
//! - [`Meter`] is a meter; [`Connection`] talks to it without a transport; [`serve`] puts any
//!   number of meters on TCP.
//! - [`client`] is a small head-end that holds plaintext keys.
//! - [`inspect`] shows tests what a real meter never shows: keys, counters, every nonce.
//!
//! It is a test tool: it holds keys in plaintext, and key agreement (suites 1 and 2), block
//! transfer and certificates are not simulated.

mod connection;
mod error;
mod meter;
mod network;
mod objects;
mod protection;
mod reading;
mod results;
mod server;
mod types;

pub mod acse;
pub mod axdr;
pub mod behaviour;
pub mod ciphered;
pub mod client;
pub mod config;
pub mod inspect;
pub mod key_transfer;
pub mod nonces;
pub mod security;
pub mod wrapper;
pub mod xdlms;

pub use config::{ChallengeSource, MeterConfig, challenge_seed};
pub use connection::Connection;
pub use error::Error;
pub use meter::{Meter, REQUESTS};
pub use network::Delivery;
pub use objects::{
    CLASS_ASSOCIATION, CLASS_CLOCK, CLASS_DATA, CLASS_DISCONNECT_CONTROL, CLASS_REGISTER, CLASS_SECURITY_SETUP,
};
pub use server::{MeterDirectory, ServeOptions, serve};
pub use types::{KeyId, Obis, Secret, SecuritySuite, SymmetricKey, SystemTitle};
