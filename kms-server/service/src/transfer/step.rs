//! A step of a transfer: the order that begins the transfer, the report of a head-end, and the
//! answer that says what to do next.

use std::sync::Arc;

use kms_domain::{
    CampaignTask, Finding, KeyType, KeyVersionNumber, Meter, Outcome, SecuritySetupId, SystemTitle, TransferForm,
    TransferId,
};

use kms_base::error::ServiceError;

/// What a head-end orders for one meter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// The meter.
    pub meter: SystemTitle,
    /// The security setup; `None` is the meter's first.
    pub setup: Option<SecuritySetupId>,
    /// The key; `None` is a probe.
    pub key_type: Option<KeyType>,
    /// The client title that the requests are sent under.
    pub client_title: SystemTitle,
    /// Who ciphers the delivery.
    pub form: TransferForm,
    /// Begin although the slot is in doubt.
    pub urgent: bool,
    /// For how many seconds nobody else may begin a transfer of the meter.
    pub lifetime_seconds: u32,
    /// The campaign's task, with its fencing token.
    pub task: Option<CampaignTask>,
}

/// What a head-end reports of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The meter.
    pub meter: SystemTitle,
    /// The transfer.
    pub id: TransferId,
    /// The step that it answers.
    pub step: u32,
    /// The answer.
    pub answer: ReportedAnswer,
}

/// The meter's answer, as the head-end reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReportedAnswer {
    /// These octets.
    Apdu(Vec<u8>),
    /// Nothing.
    Nothing,
    /// No octets: a head-end that holds the new key states whether the meter uses it.
    Attested(bool),
}

/// The present step of a transfer, for its head-end.
#[derive(Debug)]
pub struct StepAnswer {
    /// The meter.
    pub meter: SystemTitle,
    /// The transfer, and the number of its step.
    pub transfer: Option<(TransferId, u32)>,
    /// What to do.
    pub next: Result<NextStep, ServiceError>,
}

/// What to do next.
#[derive(Debug)]
pub enum NextStep {
    /// Send something.
    Send(Box<Sending>),
    /// The transfer is over.
    End {
        /// How it ended.
        outcome: Outcome,
        /// What the meter showed in this step.
        findings: Vec<Finding>,
    },
}

/// What is to be sent to the meter.
#[derive(Debug)]
pub struct Sending {
    /// Which kind of request.
    pub kind: SendingKind,
    /// The request; empty if the head-end makes it.
    pub apdu: Vec<u8>,
    /// The client's service access point.
    pub client_sap: u16,
    /// What is delivered.
    pub delivery: Option<Delivery>,
}

/// Kinds of requests of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendingKind {
    /// An association request.
    Associate,
    /// The answer to the meter's challenge.
    Authenticate,
    /// A key.
    Deliver,
}

/// A key that leaves for a meter.
#[derive(Debug)]
pub struct Delivery {
    /// Its type.
    pub key_type: KeyType,
    /// Its version.
    pub version: KeyVersionNumber,
    /// The key, wrapped under the meter's KEK (RFC 3394): 24 or 40 octets.
    pub wrapped: Vec<u8>,
    /// The argument of `key_transfer`, A-XDR.
    pub argument: Vec<u8>,
}

/// A `key_transfer` request that the head-end ciphers itself.
#[derive(Debug)]
pub(crate) struct Brought {
    /// The transfer, and its step.
    pub(crate) transfer: TransferId,
    pub(crate) step: u32,
    /// The plain action-request, with an invoke id of the server.
    pub(crate) request: Vec<u8>,
}

/// A decided step of one meter.
pub(super) type Decided = (SystemTitle, Result<DecidedStep, ServiceError>);

/// The meter after a step, and the end of the transfer if it is over.
pub(super) struct DecidedStep {
    pub(super) meter: Arc<Meter>,
    pub(super) end: Option<(Outcome, Vec<Finding>)>,
}

impl DecidedStep {
    pub(super) const fn going_on(meter: Arc<Meter>) -> Self {
        Self { meter, end: None }
    }

    pub(super) const fn over(meter: Arc<Meter>, outcome: Outcome, findings: Vec<Finding>) -> Self {
        Self { meter, end: Some((outcome, findings)) }
    }
}
