//! What a meter answers to a GET and to an ACTION (IEC 62056-5-3, 8: Get-Response-Normal and
//! Action-Response-Normal).

use std::fmt;

use crate::{Data, DlmsError, HlsGmac, LONGEST_APDU, reader::Reader};

/// A plain get-response-normal: `C4 01 ‖ invoke-id-and-priority ‖ Get-Data-Result`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GetResponse<'a> {
    /// That of the request: bits 0–3 the invoke id, 6 confirmed, 7 high priority.
    pub invoke_id_and_priority: u8,
    /// The value, or why there is none.
    pub result: Result<Data<'a>, DataAccessResult>,
}

impl<'a> GetResponse<'a> {
    /// Reads a get-response-normal, to its last octet.
    ///
    /// # Errors
    /// The octets are not such a response (blocks and lists are refused), are cut, others follow,
    /// or data cannot be read.
    pub fn parse(apdu: &'a [u8]) -> Result<Self, DlmsError> {
        const WHAT: &str = "get-response";
        let (mut reader, invoke_id_and_priority) = normal(apdu, GET_RESPONSE, WHAT)?;
        let result = get_data_result(&mut reader, WHAT)?;
        reader.end(WHAT)?;
        Ok(Self { invoke_id_and_priority, result })
    }
}

/// A plain action-response-normal: `C7 01 ‖ invoke-id-and-priority ‖ Action-Result ‖
/// [Get-Data-Result]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActionResponse<'a> {
    /// That of the request: bits 0–3 the invoke id, 6 confirmed, 7 high priority.
    pub invoke_id_and_priority: u8,
    /// How the method ended.
    pub result: ActionResult,
    /// What it returned, if anything: a value, or why there is none.
    pub return_parameters: Option<Result<Data<'a>, DataAccessResult>>,
}

impl<'a> ActionResponse<'a> {
    /// Reads an action-response-normal, to its last octet.
    ///
    /// # Errors
    /// The octets are not such a response (blocks and lists are refused), are cut, others follow,
    /// or data cannot be read.
    pub fn parse(apdu: &'a [u8]) -> Result<Self, DlmsError> {
        const WHAT: &str = "action-response";
        let (mut reader, invoke_id_and_priority) = normal(apdu, ACTION_RESPONSE, WHAT)?;
        let result = ActionResult(reader.octet(WHAT)?);
        let return_parameters =
            if reader.present("return parameters")? { Some(get_data_result(&mut reader, WHAT)?) } else { None };
        reader.end(WHAT)?;
        Ok(Self { invoke_id_and_priority, result, return_parameters })
    }

    /// The meter's answer f(CtoS) in the response to `reply_to_HLS_authentication`. It is not
    /// checked here: the HSM computes the GMAC over the client's challenge under the meter's system
    /// title and compares.
    ///
    /// # Errors
    /// The method failed, or returned something else than an octet-string of 17 octets with the
    /// security control of a GMAC.
    pub fn hls_gmac(&self) -> Result<HlsGmac, DlmsError> {
        const WHAT: &str = "answer to reply_to_HLS_authentication";
        if self.result != ActionResult::SUCCESS {
            return Err(DlmsError::invalid(WHAT, format!("the meter refused: {}", self.result)));
        }
        match self.return_parameters {
            Some(Ok(data)) => HlsGmac::parse(data.octet_string()?),
            Some(Err(error)) => Err(DlmsError::invalid(WHAT, format!("no answer to the client's challenge: {error}"))),
            None => Err(DlmsError::invalid(WHAT, "no answer to the client's challenge")),
        }
    }
}

/// An Action-Result, by its number. Meters send numbers that the standard does not know, so none is
/// refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ActionResult(pub u8);

impl ActionResult {
    /// 0.
    pub const SUCCESS: Self = Self(0);
}

impl fmt::Display for ActionResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            15 => "long-action-aborted",
            16 => "no-long-action-in-progress",
            number => common_name(number),
        };
        write!(f, "{name} ({})", self.0)
    }
}

/// A Data-Access-Result, by its number. Meters send numbers that the standard does not know, so
/// none is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DataAccessResult(pub u8);

impl fmt::Display for DataAccessResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            15 => "long-get-aborted",
            16 => "no-long-get-in-progress",
            17 => "long-set-aborted",
            18 => "no-long-set-in-progress",
            19 => "data-block-number-invalid",
            number => common_name(number),
        };
        write!(f, "{name} ({})", self.0)
    }
}

/// The tag, the choice `normal` and the invoke-id-and-priority.
fn normal<'a>(apdu: &'a [u8], tag: u8, what: &'static str) -> Result<(Reader<'a>, u8), DlmsError> {
    if apdu.len() > LONGEST_APDU {
        return Err(DlmsError::invalid(what, format!("{} octets, more than {LONGEST_APDU}", apdu.len())));
    }
    let mut reader = Reader::new(apdu);
    if reader.octet(what)? != tag {
        return Err(DlmsError::invalid(what, format!("the tag is not {tag:02X}")));
    }
    match reader.octet(what)? {
        NORMAL => {}
        other => {
            return Err(DlmsError::invalid(
                what,
                format!("choice {other} is not `normal` (1): blocks and lists are not read"),
            ));
        }
    }
    let invoke_id_and_priority = reader.octet(what)?;
    Ok((reader, invoke_id_and_priority))
}

fn get_data_result<'a>(
    reader: &mut Reader<'a>,
    what: &'static str,
) -> Result<Result<Data<'a>, DataAccessResult>, DlmsError> {
    match reader.octet(what)? {
        0 => Data::read(reader).map(Ok),
        1 => Ok(Err(DataAccessResult(reader.octet("data-access-result")?))),
        other => {
            Err(DlmsError::invalid(what, format!("choice {other} is neither data (0) nor data-access-result (1)")))
        }
    }
}

/// The names that Action-Result and Data-Access-Result share.
const fn common_name(number: u8) -> &'static str {
    match number {
        0 => "success",
        1 => "hardware-fault",
        2 => "temporary-failure",
        3 => "read-write-denied",
        4 => "object-undefined",
        9 => "object-class-inconsistent",
        11 => "object-unavailable",
        12 => "type-unmatched",
        13 => "scope-of-access-violated",
        14 => "data-block-unavailable",
        250 => "other-reason",
        _ => "unknown result",
    }
}

const GET_RESPONSE: u8 = 0xC4;
const ACTION_RESPONSE: u8 = 0xC7;
const NORMAL: u8 = 1;
