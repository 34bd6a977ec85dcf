//! Rows of campaigns. The content is a message of its own, so that what people approved is exactly
//! these octets.

use std::num::{NonZeroU8, NonZeroU32};

use bytes::Bytes;
use prost::Message;

use super::{RowError, approval::ApprovalRow, moment, octets};
use crate::{
    Approvals, Campaign, CampaignAction, CampaignContent, CampaignId, CampaignName, CampaignSelection, CampaignState,
    CampaignTerms, DeviceProfileName, ExposureReason, FlagId, GroupId, KeyType, MaintenanceWindow, MaintenanceWindows,
    Party, PersonName, Plan, PlannedWave, PrincipalId, Quorum, SecuritySetupId, TaskState, UnixMillis, WaveResult,
    WaveSize, WaveTally, Weekdays,
};

#[derive(Clone, PartialEq, Message)]
struct CampaignRow {
    /// A [`ContentRow`].
    #[prost(bytes = "bytes", tag = "1")]
    content: Bytes,
    #[prost(message, repeated, tag = "2")]
    approvals: Vec<ApprovalRow>,
    #[prost(uint32, tag = "3")]
    state: u32,
    #[prost(string, tag = "4")]
    reason: String,
    #[prost(int64, tag = "5")]
    since: i64,
    #[prost(uint32, tag = "6")]
    wave: u32,
    #[prost(int64, tag = "7")]
    wave_started: i64,
    #[prost(uint64, tag = "8")]
    expanded: u64,
    #[prost(uint64, tag = "9")]
    accepted_failures: u64,
    #[prost(message, repeated, tag = "10")]
    results: Vec<ResultRow>,
    /// 0: not started.
    #[prost(int64, tag = "11")]
    started: i64,
}

#[derive(Clone, PartialEq, Message)]
struct ResultRow {
    #[prost(int64, tag = "1")]
    started: i64,
    #[prost(int64, tag = "2")]
    ended: i64,
    #[prost(message, repeated, tag = "3")]
    tallies: Vec<TallyRow>,
    /// Relative to the start, in order; as many as counts.
    #[prost(sint64, repeated, tag = "4")]
    times: Vec<i64>,
    #[prost(uint64, repeated, tag = "5")]
    counts: Vec<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct TallyRow {
    #[prost(string, tag = "1")]
    vendor: String,
    #[prost(uint32, tag = "2")]
    state: u32,
    #[prost(string, tag = "3")]
    reason: String,
    #[prost(uint64, tag = "4")]
    tasks: u64,
}

#[derive(Clone, PartialEq, Message)]
struct ContentRow {
    #[prost(string, tag = "1")]
    name: String,
    /// 1 rotate, 2 probe, 3 take-over.
    #[prost(uint32, tag = "2")]
    action: u32,
    #[prost(uint32, tag = "3")]
    key_type: u32,
    /// b × 256 + e, plus 1; 0 for none.
    #[prost(uint32, tag = "4")]
    setup: u32,
    #[prost(message, optional, tag = "5")]
    selection: Option<SelectionRow>,
    #[prost(message, optional, tag = "6")]
    terms: Option<TermsRow>,
    #[prost(string, tag = "7")]
    requester: String,
    #[prost(string, tag = "8")]
    requester_person: String,
    #[prost(message, optional, tag = "9")]
    plan: Option<PlanRow>,
    #[prost(int64, tag = "15")]
    created: i64,
}

#[derive(Clone, PartialEq, Message)]
struct SelectionRow {
    #[prost(bool, tag = "1")]
    whole_island: bool,
    #[prost(string, tag = "2")]
    vendor: String,
    #[prost(string, tag = "3")]
    profile: String,
    #[prost(uint64, optional, tag = "4")]
    group: Option<u64>,
    #[prost(string, tag = "5")]
    head_end: String,
    #[prost(string, optional, tag = "6")]
    batch: Option<String>,
    #[prost(int64, optional, tag = "7")]
    active_before: Option<i64>,
    /// 1 vendor, 2 anyone, 3 the principal.
    #[prost(uint32, tag = "8")]
    exposed_to: u32,
    #[prost(string, tag = "9")]
    exposed_principal: String,
    #[prost(uint32, tag = "10")]
    exposed_by: u32,
    #[prost(bool, tag = "11")]
    imported: bool,
    #[prost(uint64, tag = "12")]
    named: u64,
    /// Percent; 0: no such condition.
    #[prost(uint32, tag = "13")]
    counter_used: u32,
}

#[derive(Clone, PartialEq, Message)]
struct TermsRow {
    #[prost(uint32, tag = "1")]
    quorum: u32,
    #[prost(uint32, tag = "2")]
    canary: u32,
    /// Meters × 2, or percent × 2 + 1.
    #[prost(uint64, repeated, tag = "3")]
    waves: Vec<u64>,
    #[prost(uint32, tag = "4")]
    success_threshold: u32,
    #[prost(uint64, tag = "5")]
    failure_limit: u64,
    #[prost(string, tag = "6")]
    zone: String,
    #[prost(message, repeated, tag = "7")]
    windows: Vec<WindowRow>,
    #[prost(uint32, tag = "8")]
    starts_per_minute: u32,
    #[prost(uint32, tag = "9")]
    in_flight: u32,
    #[prost(uint32, tag = "10")]
    attempts: u32,
    #[prost(uint32, tag = "11")]
    back_off_seconds: u32,
}

#[derive(Clone, PartialEq, Message)]
struct WindowRow {
    #[prost(uint32, tag = "1")]
    days: u32,
    #[prost(uint32, tag = "2")]
    from: u32,
    #[prost(uint32, tag = "3")]
    to: u32,
}

#[derive(Clone, PartialEq, Message)]
struct PlanRow {
    #[prost(uint64, tag = "1")]
    meters: u64,
    #[prost(uint64, tag = "2")]
    chunks: u64,
    #[prost(bytes = "bytes", tag = "3")]
    digest: Bytes,
    #[prost(message, repeated, tag = "4")]
    waves: Vec<WaveRow>,
}

#[derive(Clone, PartialEq, Message)]
struct WaveRow {
    #[prost(uint64, tag = "1")]
    meters: u64,
    #[prost(uint32, tag = "2")]
    below: u32,
}

impl Campaign {
    /// Reads the body of the row of campaign `id`.
    ///
    /// # Errors
    /// The body is no campaign row, or breaks an invariant.
    pub fn from_row(id: CampaignId, body: Bytes) -> Result<Self, RowError> {
        let row = CampaignRow::decode(body)?;
        Ok(Self {
            id,
            content: content_from_row(ContentRow::decode(row.content)?)?,
            approvals: Approvals::from_rows(row.approvals)?,
            state: CampaignState::from_number(row.state)?,
            reason: row.reason,
            since: moment(row.since)?,
            wave: row.wave,
            wave_started: UnixMillis(row.wave_started),
            expanded: row.expanded,
            accepted_failures: row.accepted_failures,
            results: row.results.into_iter().map(result_from_row).collect::<Result<_, _>>()?,
            started: Some(UnixMillis(row.started)).filter(|started| started.0 != 0),
        })
    }

    /// The body of the campaign's row.
    pub fn to_row(&self) -> Vec<u8> {
        let row = CampaignRow {
            content: self.content.to_octets().into(),
            approvals: self.approvals.to_rows(),
            state: self.state.number(),
            reason: self.reason.clone(),
            since: self.since.0,
            wave: self.wave,
            wave_started: self.wave_started.0,
            expanded: self.expanded,
            accepted_failures: self.accepted_failures,
            results: self.results.iter().map(result_to_row).collect(),
            started: self.started.map_or(0, |started| started.0),
        };
        row.encode_to_vec()
    }
}

impl CampaignContent {
    /// The content as it stands in the sealed row: what approvals are over.
    pub fn to_octets(&self) -> Vec<u8> {
        let (action, key_type) = match self.action {
            CampaignAction::Rotate(key_type) => (1, key_type.number().into()),
            CampaignAction::Probe => (2, 0),
            CampaignAction::TakeOver => (3, 0),
        };
        let row = ContentRow {
            name: self.name.as_str().to_owned(),
            action,
            key_type,
            setup: self.setup.map_or(0, |setup| u32::from(u16::from_be_bytes(setup.octets())) + 1),
            selection: Some(selection_to_row(&self.selection)),
            terms: Some(terms_to_row(&self.terms)),
            requester: self.requester.to_string(),
            requester_person: self.requester_person.as_str().to_owned(),
            plan: Some(PlanRow {
                meters: self.plan.meters,
                chunks: self.plan.chunks,
                digest: Bytes::copy_from_slice(&self.plan.digest),
                waves: self.plan.waves.iter().map(|wave| WaveRow { meters: wave.meters, below: wave.below }).collect(),
            }),
            created: self.created.0,
        };
        row.encode_to_vec()
    }
}

fn content_from_row(row: ContentRow) -> Result<CampaignContent, RowError> {
    let action = match row.action {
        1 => CampaignAction::rotate(KeyType::from_number(u8::try_from(row.key_type).unwrap_or_default())?)?,
        2 => CampaignAction::Probe,
        3 => CampaignAction::TakeOver,
        other => return Err(RowError::new(format!("campaign action {other} is unknown"))),
    };
    let setup = match row.setup.checked_sub(1).map(u16::try_from) {
        None => None,
        Some(Ok(number)) => Some(SecuritySetupId::from_octets(number.to_be_bytes())),
        Some(Err(_)) => return Err(RowError::new("a security setup has more than two octets")),
    };
    let plan = row.plan.ok_or_else(|| RowError::new("a campaign without a plan"))?;
    let terms = terms_from_row(row.terms.ok_or_else(|| RowError::new("a campaign without terms"))?)?;
    terms.check()?;
    Ok(CampaignContent {
        name: CampaignName::parse(&row.name)?,
        action,
        setup,
        selection: selection_from_row(row.selection.unwrap_or_default())?,
        terms,
        requester: PrincipalId::parse(&row.requester)?,
        requester_person: PersonName::parse(&row.requester_person)?,
        created: moment(row.created)?,
        plan: Plan {
            meters: plan.meters,
            chunks: plan.chunks,
            digest: octets("digest of the plan", &plan.digest)?,
            waves: plan.waves.into_iter().map(|row| PlannedWave { meters: row.meters, below: row.below }).collect(),
        },
    })
}

fn selection_to_row(selection: &CampaignSelection) -> SelectionRow {
    let (exposed_to, exposed_principal) = match &selection.exposed_to {
        None => (0, String::new()),
        Some(Party::Vendor) => (1, String::new()),
        Some(Party::Anyone) => (2, String::new()),
        Some(Party::Principal(principal)) => (3, principal.to_string()),
    };
    SelectionRow {
        whole_island: selection.whole_island,
        vendor: selection.vendor.map(|vendor| vendor.to_string()).unwrap_or_default(),
        profile: selection.profile.as_ref().map(ToString::to_string).unwrap_or_default(),
        group: selection.group.map(|group| group.0),
        head_end: selection.head_end.as_ref().map(ToString::to_string).unwrap_or_default(),
        batch: selection.batch.clone(),
        active_before: selection.active_before.map(|before| before.0),
        exposed_to,
        exposed_principal,
        exposed_by: selection.exposed_by.map_or(0, ExposureReason::number),
        imported: selection.imported,
        named: selection.named,
        counter_used: selection.counter_used.unwrap_or_default().into(),
    }
}

fn selection_from_row(row: SelectionRow) -> Result<CampaignSelection, RowError> {
    let given = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    Ok(CampaignSelection {
        whole_island: row.whole_island,
        vendor: given(&row.vendor).map(|vendor| FlagId::parse(&vendor)).transpose()?,
        profile: given(&row.profile).map(|profile| DeviceProfileName::parse(&profile)).transpose()?,
        group: row.group.map(GroupId),
        head_end: given(&row.head_end).map(|head_end| PrincipalId::parse(&head_end)).transpose()?,
        batch: row.batch,
        active_before: row.active_before.map(UnixMillis),
        exposed_to: match row.exposed_to {
            0 => None,
            1 => Some(Party::Vendor),
            2 => Some(Party::Anyone),
            3 => Some(Party::Principal(PrincipalId::parse(&row.exposed_principal)?)),
            other => return Err(RowError::new(format!("party {other} is unknown"))),
        },
        exposed_by: if row.exposed_by == 0 { None } else { Some(ExposureReason::from_number(row.exposed_by)?) },
        imported: row.imported,
        named: row.named,
        counter_used: match u8::try_from(row.counter_used) {
            Ok(0) => None,
            Ok(percent) if percent <= 100 => Some(percent),
            _ => return Err(RowError::new("a part of counters above 100 percent")),
        },
    })
}

fn terms_to_row(terms: &CampaignTerms) -> TermsRow {
    TermsRow {
        quorum: terms.quorum.number().into(),
        canary: terms.canary,
        waves: terms
            .waves
            .iter()
            .map(|size| match size {
                WaveSize::Meters(meters) => u64::from(*meters) * 2,
                WaveSize::Percent(percent) => u64::from(*percent) * 2 + 1,
            })
            .collect(),
        success_threshold: terms.success_threshold.into(),
        failure_limit: terms.failure_limit,
        zone: terms.windows.zone().to_owned(),
        windows: terms
            .windows
            .windows()
            .iter()
            .map(|window| WindowRow {
                days: window.days.number().into(),
                from: window.from.into(),
                to: window.to.into(),
            })
            .collect(),
        starts_per_minute: terms.starts_per_minute.map_or(0, NonZeroU32::get),
        in_flight: terms.in_flight.get(),
        attempts: terms.attempts.get().into(),
        back_off_seconds: terms.back_off_seconds,
    }
}

fn terms_from_row(row: TermsRow) -> Result<CampaignTerms, RowError> {
    let small = |what: &str, number: u32| {
        u8::try_from(number).map_err(|_| RowError::new(format!("{what} {number} is too large")))
    };
    let minute =
        |number: u32| u16::try_from(number).map_err(|_| RowError::new(format!("minute {number} is not of a day")));
    let windows = row
        .windows
        .into_iter()
        .map(|row| {
            Ok(MaintenanceWindow {
                days: Weekdays::from_number(row.days)?,
                from: minute(row.from)?,
                to: minute(row.to)?,
            })
        })
        .collect::<Result<Vec<_>, RowError>>()?;
    let waves = row.waves.into_iter().map(|number| match number % 2 {
        0 => u32::try_from(number / 2).ok().map(WaveSize::Meters),
        _ => u8::try_from(number / 2).ok().filter(|percent| *percent <= 100).map(WaveSize::Percent),
    });
    Ok(CampaignTerms {
        quorum: Quorum::new(row.quorum)?,
        canary: row.canary,
        waves: waves
            .map(|size| size.ok_or_else(|| RowError::new("a wave size is out of range")))
            .collect::<Result<_, _>>()?,
        success_threshold: small("success threshold", row.success_threshold)?,
        failure_limit: row.failure_limit,
        windows: MaintenanceWindows::new(&row.zone, windows)?,
        starts_per_minute: NonZeroU32::new(row.starts_per_minute),
        in_flight: NonZeroU32::new(row.in_flight).ok_or_else(|| RowError::new("no task may be in flight"))?,
        attempts: NonZeroU8::new(small("attempts", row.attempts)?)
            .ok_or_else(|| RowError::new("no attempt is allowed"))?,
        back_off_seconds: row.back_off_seconds,
    })
}

fn result_to_row(result: &WaveResult) -> ResultRow {
    ResultRow {
        started: result.started.0,
        ended: result.ended.0,
        tallies: result
            .tallies
            .iter()
            .map(|tally| TallyRow {
                vendor: tally.vendor.clone(),
                state: tally.state.number(),
                reason: tally.reason.clone(),
                tasks: tally.tasks,
            })
            .collect(),
        times: result.timeline.iter().map(|(time, _)| time.0.wrapping_sub(result.started.0)).collect(),
        counts: result.timeline.iter().map(|(_, count)| *count).collect(),
    }
}

fn result_from_row(row: ResultRow) -> Result<WaveResult, RowError> {
    if row.times.len() != row.counts.len() {
        return Err(RowError::new("a timeline has not one count for each moment"));
    }
    let tallies = row
        .tallies
        .into_iter()
        .map(|row| {
            Ok(WaveTally {
                vendor: row.vendor,
                state: TaskState::from_number(row.state)?,
                reason: row.reason,
                tasks: row.tasks,
            })
        })
        .collect::<Result<_, RowError>>()?;
    Ok(WaveResult {
        started: moment(row.started)?,
        ended: moment(row.ended)?,
        tallies,
        timeline: row
            .times
            .iter()
            .zip(row.counts)
            .map(|(time, count)| (UnixMillis(row.started.wrapping_add(*time)), count))
            .collect(),
    })
}
