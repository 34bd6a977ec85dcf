//! What policy sees of a frame: the DLMS service, and the COSEM object that it names.

/// The service of a plain APDU that is to be protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FrameService {
    /// Any form of get-request.
    Get,
    /// Any form of set-request.
    Set,
    /// Any form of action-request.
    Action,
    /// InitiateRequest.
    Initiate,
    /// No APDU: f(StoC), the response to the meter's challenge.
    HlsChallenge,
}

impl FrameService {
    /// The name in policies.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Set => "set",
            Self::Action => "action",
            Self::Initiate => "initiate",
            Self::HlsChallenge => "hls-challenge",
        }
    }
}

/// An attribute or method of a COSEM object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CosemTarget {
    /// The interface class.
    pub class_id: u16,
    /// The logical name, 6 octets.
    pub obis: [u8; 6],
    /// Attribute of get and set, method of action.
    pub member: i8,
}

impl CosemTarget {
    /// The logical name in dotted form.
    pub fn obis_text(&self) -> String {
        self.obis.map(|octet| octet.to_string()).join(".")
    }
}
