//! The messages. Field numbers are for ever; new fields get new numbers.

use bytes::Bytes;
use prost::Message;

#[derive(Clone, PartialEq, Message)]
pub(super) struct MeterRow {
    /// The three letters, as a big-endian number.
    #[prost(uint32, tag = "1")]
    pub(super) vendor: u32,
    #[prost(string, tag = "2")]
    pub(super) serial: String,
    #[prost(string, tag = "3")]
    pub(super) profile: String,
    #[prost(uint32, tag = "4")]
    pub(super) suite: u32,
    #[prost(uint32, tag = "5")]
    pub(super) status: u32,
    #[prost(uint64, repeated, tag = "6")]
    pub(super) groups: Vec<u64>,
    /// The principals that other fields name by position, from 1.
    #[prost(message, repeated, tag = "7")]
    pub(super) principals: Vec<PrincipalRef>,
    /// 0 for none.
    #[prost(uint32, tag = "8")]
    pub(super) head_end: u32,
    #[prost(string, tag = "9")]
    pub(super) batch: String,
    /// In order of setup, key type and number.
    #[prost(message, repeated, tag = "10")]
    pub(super) versions: Vec<VersionRow>,
    /// The last moment of the meter's own sequence.
    #[prost(uint32, tag = "11")]
    pub(super) sequence: u32,
    #[prost(message, optional, tag = "12")]
    pub(super) transfer: Option<TransferRow>,
    /// Keys of groups and device types that left for the meter, in order of owner, setup, key type
    /// and version.
    #[prost(message, repeated, tag = "13")]
    pub(super) shared: Vec<SharedKeyRow>,
    /// When the meter was retired, in milliseconds after `added`; only of a retired one.
    #[prost(sint64, optional, tag = "14")]
    pub(super) retired: Option<i64>,
    /// Unix milliseconds: what other moments of the row are relative to. Last and never 0, so that
    /// a cut row is refused.
    #[prost(int64, tag = "15")]
    pub(super) added: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SharedKeyRow {
    /// The number of the group, or of the device type.
    #[prost(uint64, tag = "1")]
    pub(super) group: u64,
    #[prost(uint64, tag = "2")]
    pub(super) device_type: u64,
    #[prost(uint32, tag = "3")]
    pub(super) setup: u32,
    #[prost(uint32, tag = "4")]
    pub(super) key_type: u32,
    #[prost(uint32, tag = "5")]
    pub(super) version: u32,
    #[prost(bool, tag = "6")]
    pub(super) acknowledged: bool,
    /// The version of the meter's KEK that it left under.
    #[prost(uint32, tag = "7")]
    pub(super) kek: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TransferRow {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) id: Bytes,
    #[prost(uint32, tag = "2")]
    pub(super) setup: u32,
    #[prost(uint32, tag = "3")]
    pub(super) head_end: u32,
    #[prost(fixed64, tag = "4")]
    pub(super) client_title: u64,
    /// 1 wrapped key, 2 frames.
    #[prost(uint32, tag = "5")]
    pub(super) form: u32,
    /// In the order in which they leave.
    #[prost(message, repeated, tag = "6")]
    pub(super) keys: Vec<TransferKeyRow>,
    /// How many of them have left.
    #[prost(uint32, tag = "7")]
    pub(super) delivered: u32,
    /// 1 and 2 associating (to open, to prove), 3 and 4 authenticating, 5 delivering.
    #[prost(uint32, tag = "8")]
    pub(super) stage: u32,
    #[prost(uint32, tag = "9")]
    pub(super) encryption: u32,
    #[prost(uint32, tag = "10")]
    pub(super) authentication: u32,
    #[prost(bytes = "bytes", tag = "11")]
    pub(super) challenge: Bytes,
    #[prost(bytes = "bytes", tag = "12")]
    pub(super) meter_challenge: Bytes,
    /// Pairs that were tried in this round.
    #[prost(uint32, tag = "13")]
    pub(super) tried: u32,
    #[prost(uint32, tag = "14")]
    pub(super) step: u32,
    #[prost(fixed32, repeated, tag = "15")]
    pub(super) counters: Vec<u32>,
    #[prost(sint64, tag = "16")]
    pub(super) not_after: i64,
    /// The meter's answer to the last delivery.
    #[prost(uint32, tag = "17")]
    pub(super) answer: u32,
    #[prost(uint32, tag = "18")]
    pub(super) counter_retries: u32,
    #[prost(bytes = "bytes", tag = "19")]
    pub(super) campaign: Bytes,
    /// The fencing token of the task's lease.
    #[prost(uint64, tag = "20")]
    pub(super) fence: u64,
    /// What the step's octets are made of besides the row: 16 octets, or none.
    #[prost(bytes = "bytes", tag = "21")]
    pub(super) pinned: Bytes,
    /// Challenges in a row that must not be answered.
    #[prost(uint32, tag = "22")]
    pub(super) unfit: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TransferKeyRow {
    #[prost(uint64, tag = "1")]
    pub(super) group: u64,
    #[prost(uint64, tag = "2")]
    pub(super) device_type: u64,
    #[prost(uint32, tag = "3")]
    pub(super) key_type: u32,
    #[prost(uint32, tag = "4")]
    pub(super) version: u32,
    #[prost(uint32, tag = "5")]
    pub(super) kek: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct GroupRow {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(uint32, tag = "2")]
    pub(super) suite: u32,
    #[prost(message, repeated, tag = "3")]
    pub(super) principals: Vec<PrincipalRef>,
    #[prost(message, repeated, tag = "4")]
    pub(super) versions: Vec<VersionRow>,
    /// Percent of the members; 0 for the default.
    #[prost(uint32, tag = "5")]
    pub(super) switch_at: u32,
    /// In order of setup and key type.
    #[prost(message, repeated, tag = "6")]
    pub(super) rotations: Vec<GroupRotationRow>,
    #[prost(int64, tag = "15")]
    pub(super) added: i64,
}

/// Moments are relative to the row's own.
#[derive(Clone, PartialEq, Message)]
pub(super) struct GroupRotationRow {
    /// `b × 256 + e`.
    #[prost(uint32, tag = "1")]
    pub(super) setup: u32,
    #[prost(uint32, tag = "2")]
    pub(super) key_type: u32,
    #[prost(uint32, tag = "3")]
    pub(super) version: u32,
    /// Empty for none.
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) campaign: Bytes,
    #[prost(sint64, tag = "5")]
    pub(super) begun: i64,
    #[prost(sint64, optional, tag = "6")]
    pub(super) reached: Option<i64>,
    #[prost(sint64, optional, tag = "7")]
    pub(super) switched: Option<i64>,
    #[prost(sint64, optional, tag = "8")]
    pub(super) completed: Option<i64>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct DeviceTypeRow {
    #[prost(string, tag = "1")]
    pub(super) vendor: String,
    #[prost(string, tag = "2")]
    pub(super) name: String,
    #[prost(string, tag = "3")]
    pub(super) profile: String,
    #[prost(message, repeated, tag = "4")]
    pub(super) principals: Vec<PrincipalRef>,
    #[prost(message, repeated, tag = "5")]
    pub(super) versions: Vec<VersionRow>,
    #[prost(int64, tag = "15")]
    pub(super) added: i64,
}

/// A principal of the row's island.
#[derive(Clone, PartialEq, Message)]
pub(super) struct PrincipalRef {
    /// 0 head-end, 1 officer, 2 auditor, 3 handheld, 4 manufacturer.
    #[prost(uint32, tag = "1")]
    pub(super) role: u32,
    #[prost(string, tag = "2")]
    pub(super) name: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct VersionRow {
    /// `b × 256 + e`.
    #[prost(uint32, tag = "1")]
    pub(super) setup: u32,
    #[prost(uint32, tag = "2")]
    pub(super) key_type: u32,
    /// The number less one.
    #[prost(uint32, tag = "3")]
    pub(super) earlier_numbers: u32,
    /// 0 active, 1 pre-active, 2 suspended, 3 deactivated, 4 compromised, 5 destroyed.
    #[prost(uint32, tag = "4")]
    pub(super) state: u32,
    /// Relative to the row's moment.
    #[prost(sint64, tag = "5")]
    pub(super) since: i64,
    /// 1 and 2 diversified with 16 octets (SP 800-108, AES-CBC), 3 and 4 with 32 octets, 5
    /// generated, 6 imported.
    #[prost(uint32, tag = "6")]
    pub(super) origin: u32,
    /// The version of the diversification root or, for a wrapped key, of the storage KEK.
    #[prost(uint32, tag = "7")]
    pub(super) root_version: u32,
    #[prost(bytes = "bytes", tag = "8")]
    pub(super) wrapped: Bytes,
    #[prost(bytes = "bytes", tag = "9")]
    pub(super) fingerprint: Bytes,
    #[prost(bool, tag = "10")]
    pub(super) candidate: bool,
    #[prost(message, repeated, tag = "11")]
    pub(super) exposures: Vec<ExposureRow>,
    #[prost(message, repeated, tag = "12")]
    pub(super) counters: Vec<CounterRow>,
    /// The fingerprint that names the domain.
    #[prost(bytes = "bytes", tag = "13")]
    pub(super) domain: Bytes,
    /// Moments of the meter's sequence; 0 for never.
    #[prost(uint32, tag = "14")]
    pub(super) left: u32,
    #[prost(uint32, tag = "15")]
    pub(super) confirmed: u32,
    /// 0 none, 1 attested, 2 acknowledged, 3 proven.
    #[prost(uint32, tag = "16")]
    pub(super) evidence: u32,
    /// The version of the KEK that it left under; 0 for none.
    #[prost(uint32, tag = "17")]
    pub(super) kek: u32,
    #[prost(uint32, tag = "18")]
    pub(super) meter_counter: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ExposureRow {
    /// 0 vendor, 1 anyone, else a principal: its position plus one.
    #[prost(uint32, tag = "1")]
    pub(super) party: u32,
    /// Relative to the row's moment.
    #[prost(sint64, tag = "2")]
    pub(super) since: i64,
    #[prost(uint32, tag = "3")]
    pub(super) reason: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct CounterRow {
    /// 0 for the one counter of all client titles.
    #[prost(fixed64, tag = "1")]
    pub(super) client_title: u64,
    #[prost(uint64, tag = "2")]
    pub(super) bound: u64,
    #[prost(bytes = "bytes", tag = "3")]
    pub(super) holder: Bytes,
    /// 0 for this system.
    #[prost(uint32, tag = "4")]
    pub(super) owned_by: u32,
    /// How much of the island's jump is in the bound.
    #[prost(uint64, tag = "5")]
    pub(super) jumped: u64,
    /// Leases were allocated from the chunk that ends at the bound.
    #[prost(bool, tag = "6")]
    pub(super) leased: bool,
    /// The lowest counter that the holder may still allocate; 0: all that is left of its chunk.
    #[prost(uint64, tag = "7")]
    pub(super) floor: u64,
    /// The hour of UTC of the last reservation, and the counters that were reserved in it.
    #[prost(uint32, tag = "8")]
    pub(super) hour: u32,
    #[prost(uint64, tag = "9")]
    pub(super) reserved: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct CounterDomainRow {
    #[prost(message, repeated, tag = "1")]
    pub(super) principals: Vec<PrincipalRef>,
    #[prost(message, repeated, tag = "2")]
    pub(super) counters: Vec<CounterRow>,
    /// Who could know the value; times since 1970.
    #[prost(message, repeated, tag = "3")]
    pub(super) exposures: Vec<ExposureRow>,
    /// At least 1.
    #[prost(uint64, tag = "15")]
    pub(super) members: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PrincipalRow {
    #[prost(uint32, tag = "1")]
    pub(super) revision: u32,
    /// 1 enabled, 2 disabled.
    #[prost(uint32, tag = "2")]
    pub(super) status: u32,
    #[prost(message, repeated, tag = "3")]
    pub(super) certificates: Vec<CertificateRow>,
    #[prost(message, optional, tag = "4")]
    pub(super) transport: Option<TransportRow>,
    #[prost(fixed64, repeated, tag = "5")]
    pub(super) client_titles: Vec<u64>,
    #[prost(string, tag = "6")]
    pub(super) person: String,
    /// SubjectPublicKeyInfo, DER; empty for none.
    #[prost(bytes = "bytes", tag = "7")]
    pub(super) shipment_key: Bytes,
    /// The number of an assurance; 0: none.
    #[prost(uint32, tag = "8")]
    pub(super) assurance: u32,
    #[prost(int64, tag = "15")]
    pub(super) added: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct InvitationRow {
    #[prost(string, tag = "1")]
    pub(super) technician: String,
    /// 1 first, 2 hand-over.
    #[prost(uint32, tag = "2")]
    pub(super) occasion: u32,
    #[prost(bytes = "bytes", tag = "3")]
    pub(super) code_id: Bytes,
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) code_sha256: Bytes,
    /// A URI.
    #[prost(string, tag = "5")]
    pub(super) invited_by: String,
    #[prost(int64, tag = "6")]
    pub(super) expires: i64,
    #[prost(uint32, tag = "7")]
    pub(super) wrong_codes: u32,
    /// 0 none, 1 used, 2 withdrawn, 3 wrong codes.
    #[prost(uint32, tag = "8")]
    pub(super) end: u32,
    /// 0 without an end.
    #[prost(int64, tag = "9")]
    pub(super) ended: i64,
    /// This and the following fields: of an invitation that was used.
    #[prost(bytes = "bytes", tag = "10")]
    pub(super) tls_key_sha256: Bytes,
    #[prost(bytes = "bytes", tag = "11")]
    pub(super) transport_key_sha256: Bytes,
    #[prost(bytes = "bytes", tag = "12")]
    pub(super) certificate: Bytes,
    #[prost(bytes = "bytes", tag = "13")]
    pub(super) transport_certificate: Bytes,
    #[prost(fixed64, repeated, tag = "14")]
    pub(super) client_titles: Vec<u64>,
    /// Last and never 0, so that a cut row is refused.
    #[prost(int64, tag = "15")]
    pub(super) invited: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct CertificateRow {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) serial: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) sha256: Bytes,
    #[prost(int64, tag = "3")]
    pub(super) not_after: i64,
    /// Empty: not recorded.
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) key_sha256: Bytes,
    /// The number of an enrolment.
    #[prost(uint32, tag = "5")]
    pub(super) enrolment: u32,
    /// A URI; empty: no other principal.
    #[prost(string, tag = "6")]
    pub(super) issued_by: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TransportRow {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) certificate: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) sha256: Bytes,
    #[prost(bytes = "bytes", tag = "3")]
    pub(super) public_point: Bytes,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct IslandRow {
    /// 1 development, 2 production.
    #[prost(uint32, tag = "1")]
    pub(super) kind: u32,
    #[prost(message, repeated, tag = "2")]
    pub(super) classes: Vec<ClassRow>,
    #[prost(uint32, tag = "3")]
    pub(super) seal_key_version: u32,
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) escrow_fingerprint: Bytes,
    #[prost(uint32, tag = "5")]
    pub(super) restores: u32,
    #[prost(uint64, tag = "6")]
    pub(super) jump: u64,
    #[prost(sfixed64, tag = "7")]
    pub(super) cluster: i64,
    /// 0: not known.
    #[prost(uint32, tag = "8")]
    pub(super) timeline: u32,
    /// Versions of roots made after the ceremony, and those destroyed.
    #[prost(message, repeated, tag = "9")]
    pub(super) made_roots: Vec<MadeRootRow>,
    /// 0: 1.
    #[prost(uint32, tag = "10")]
    pub(super) oldest_seal_key_version: u32,
    /// 0: 1.
    #[prost(uint32, tag = "11")]
    pub(super) vendor_transport_version: u32,
    /// 0: 1.
    #[prost(uint32, tag = "12")]
    pub(super) oldest_vendor_transport_version: u32,
    #[prost(uint64, tag = "13")]
    pub(super) principals_added: u64,
    /// Whether the index of exposures was complete once; rows of earlier versions do not say so.
    #[prost(bool, tag = "16")]
    pub(super) exposures_indexed: bool,
    #[prost(int64, tag = "15")]
    pub(super) created: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct MadeRootRow {
    /// Purpose and version, an octet each.
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) id: Bytes,
    /// 0 none, 1 SP 800-108, 2 AES-CBC.
    #[prost(uint32, tag = "2")]
    pub(super) derivation: u32,
    #[prost(int64, tag = "3")]
    pub(super) made: i64,
    #[prost(bytes = "vec", tag = "4")]
    pub(super) fingerprint: Vec<u8>,
    /// 0: not destroyed.
    #[prost(int64, tag = "5")]
    pub(super) destroyed: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RootRotationRow {
    /// 1 running, 2 paused, 3 finished.
    #[prost(uint32, tag = "1")]
    pub(super) state: u32,
    #[prost(int64, tag = "2")]
    pub(super) since: i64,
    #[prost(string, tag = "3")]
    pub(super) reason: String,
    #[prost(string, tag = "4")]
    pub(super) requested_by: String,
    #[prost(uint32, tag = "5")]
    pub(super) rows_per_second: u32,
    #[prost(uint64, tag = "6")]
    pub(super) rows: u64,
    #[prost(uint32, tag = "7")]
    pub(super) round: u32,
    #[prost(uint32, tag = "8")]
    pub(super) stage: u32,
    #[prost(bytes = "vec", tag = "9")]
    pub(super) after: Vec<u8>,
    #[prost(uint64, tag = "10")]
    pub(super) looked: u64,
    #[prost(uint64, tag = "11")]
    pub(super) changed: u64,
    #[prost(uint64, tag = "12")]
    pub(super) refused: u64,
    #[prost(uint64, tag = "13")]
    pub(super) all_changed: u64,
    #[prost(uint64, tag = "14")]
    pub(super) keys: u64,
    /// Empty: nobody.
    #[prost(bytes = "bytes", tag = "16")]
    pub(super) leader: Bytes,
    #[prost(int64, tag = "17")]
    pub(super) lead_until: i64,
    #[prost(int64, tag = "18")]
    pub(super) began: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ClassRow {
    /// 1 KEK, 2 session, 3 authentication.
    #[prost(uint32, tag = "1")]
    pub(super) class: u32,
    #[prost(message, repeated, tag = "2")]
    pub(super) roots: Vec<RootRow>,
    #[prost(uint32, tag = "3")]
    pub(super) storage_kek_version: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RootRow {
    #[prost(uint32, tag = "1")]
    pub(super) version: u32,
    /// 1 SP 800-108, 2 AES-CBC.
    #[prost(uint32, tag = "2")]
    pub(super) derivation: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct QuotaUseRow {
    /// Of this hour only.
    #[prost(message, repeated, tag = "1")]
    pub(super) used: Vec<UsedQuotaRow>,
    /// Hours since 1970-01-01T00:00Z. Last and never 0, so that a cut row is refused.
    #[prost(uint32, tag = "15")]
    pub(super) hour: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct UsedQuotaRow {
    #[prost(string, tag = "1")]
    pub(super) quota: String,
    #[prost(uint32, tag = "2")]
    pub(super) commands: u32,
    /// System titles in increasing order.
    #[prost(fixed64, repeated, tag = "3")]
    pub(super) meters: Vec<u64>,
}
