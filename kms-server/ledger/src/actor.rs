//! Who acts: a caller, or the server itself under one of its own names.

use kms_authz::Caller;
use kms_domain::{PrincipalId, RequestId};

/// Who acts: what each audit record of the act names.
#[derive(Clone, Debug)]
pub struct Actor {
    /// The principal; `None` is the server itself.
    pub principal: Option<PrincipalId>,
    /// SHA-256 of the certificate that was used.
    pub certificate_sha256: Option<[u8; 32]>,
    /// The request that is executed.
    pub request: Option<RequestId>,
    /// What is attempted, as policy names it: refusals are recorded under it.
    pub action: &'static str,
}

impl Actor {
    /// The server itself.
    pub const fn server(ServerAct(action): ServerAct) -> Self {
        Self { principal: None, certificate_sha256: None, request: None, action }
    }

    /// A caller who asks for `action`.
    pub fn caller(caller: &Caller, request: Option<RequestId>, action: &'static str) -> Self {
        Self {
            principal: Some(caller.principal.clone()),
            certificate_sha256: Some(caller.certificate_sha256),
            request,
            action,
        }
    }

    /// The principal as records name it; empty for the server itself.
    pub(super) fn principal_text(&self) -> String {
        self.principal.as_ref().map(ToString::to_string).unwrap_or_default()
    }
}

/// An act of the server itself, without a caller. The constants are all such acts, with the names
/// under which their refusals are recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerAct(&'static str);

impl ServerAct {
    /// The chain of records continues with another audit key.
    pub const AUDIT_KEY: Self = Self("audit-key");
    /// The ceremony makes an island and its first principals.
    pub const CEREMONY: Self = Self("ceremony");
    /// Keys whose retention time has passed are destroyed.
    pub const DESTROY_KEYS: Self = Self("destroy-keys");
    /// A root whose destruction was decided is destroyed in the tokens of this server.
    pub const DESTROY_ROOT: Self = Self("destroy-root");
    /// An abandoned shipment is dropped.
    pub const DROP_SHIPMENT: Self = Self("dropShipment");
    /// A device is enrolled with the code of an invitation, or comes with a wrong code. The device
    /// is no principal yet: the invitation stands for the officer who made it.
    pub const ENROL: Self = Self("enrol");
    /// All tasks of a wave of a campaign have ended.
    pub const END_WAVE: Self = Self("endWave");
    /// The places of work orders that have been over for long are removed.
    pub const REMOVE_PLACES: Self = Self("remove-places");
    /// Members of a group have received a new version of its key.
    pub const FOLLOW_ROTATION: Self = Self("followRotation");
    /// The index of exposures was not what the sealed rows say.
    pub const INDEX_EXPOSURES: Self = Self("index-exposures");
    /// A version of a root is made, on the token's machine.
    pub const MAKE_ROOT: Self = Self("make-root");
    /// A campaign is paused, because its wave fails or its plan was changed.
    pub const PAUSE_CAMPAIGN: Self = Self("pauseCampaign");
    /// The tasks of a wave are made.
    pub const PLAN_WAVE: Self = Self("planWave");
    /// Custodians certify an officer's key, on the token's machine.
    pub const RECERTIFY_OFFICER: Self = Self("recertify-officer");
    /// The server renews its own TLS certificate.
    pub const RENEW_SERVER_CERTIFICATE: Self = Self("renew-server-certificate");
    /// The database was restored.
    pub const RESTORE: Self = Self("restore");
    /// A seal key is retired.
    pub const RETIRE_SEAL_KEY: Self = Self("retire-seal-key");
    /// Rows are stored or sealed under a new root.
    pub const ROTATE_ROOT: Self = Self("rotate-root");
    /// Rows and log are compared.
    pub const SCRUB: Self = Self("scrub");
    /// The exposures of a key value are noted in every slot that has this value.
    pub const SHARE_EXPOSURES: Self = Self("share-exposures");
    /// For tests only.
    #[doc(hidden)]
    pub const TEST: Self = Self("test");
}
