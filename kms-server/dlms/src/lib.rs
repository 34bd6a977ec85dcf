//! DLMS/COSEM octets that the server makes and reads, pure: no cipher (that is the HSM's), no I/O.
//!
//! - [`SecurityControl`], [`Nonce`] and [`CipheredApdu`]: the security header, what AES-GCM is fed
//!   with, and the frames around it (IEC 62056-5-3, ciphered APDUs);
//! - [`AssociationRequest`], [`AssociationResponse`] and [`ReleaseRequest`]: an association with
//!   HLS 5, opened and ended (ACSE);
//! - [`InitiateResponse`], [`GetResponse`] and [`ActionResponse`]: what a meter answers under its
//!   keys, and so what can prove that it holds them;
//! - [`ServiceRequest`]: what a plain request does to which objects, so that policy can decide on
//!   it;
//! - [`KeyTransfer`] and [`InitiateRequest`]: requests that carry keys;
//! - [`ExceptionResponse`]: what a meter answers, unauthenticated, when it refuses.
//!
//! Octets from outside are read with bounds everywhere: at most [`LONGEST_APDU`], nesting of data
//! at most 16 levels.

mod association;
mod carrier;
mod data;
mod error;
mod exception;
mod frame;
mod initiate;
mod initiate_response;
mod key_transfer;
mod reader;
mod request;
mod security;
mod service;
mod service_response;

pub use association::{
    ApplicationContext, AssociationInformation, AssociationRequest, AssociationResponse, AssociationResult,
    AuthenticationMechanism, Challenge, HlsChallenge, ReleaseRequest, SourceDiagnostic,
};
pub use carrier::KeyCarrier;
pub use data::Data;
pub use error::DlmsError;
pub use exception::{ExceptionResponse, ServiceError};
pub use frame::{CipheredApdu, CipheredTag, LONGEST_APDU};
pub use initiate::InitiateRequest;
pub use initiate_response::{ConfirmedServiceError, InitiateResponse};
pub use key_transfer::KeyTransfer;
pub use security::{AuthenticationTag, HlsGmac, KeySet, Nonce, Protection, SecurityControl};
pub use service::{ServiceKind, ServiceRequest, Target, resembles_request};
pub use service_response::{ActionResponse, ActionResult, DataAccessResult, GetResponse};
