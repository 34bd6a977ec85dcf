//! The command line of `kms campaign`.

use std::path::PathBuf;

use clap::{Args, Subcommand, builder::NonEmptyStringValueParser};
use kms_client::{KeyType, ParseError, PrincipalId, SecuritySetupId, SystemTitle};
use kms_domain::{
    CampaignAction, CampaignId, CampaignName, DeviceProfileName, ExposureReason, FlagId, MaintenanceWindow,
    MaintenanceWindows, Quorum, TaskState, WaveSize,
};

use super::{
    shared::{Limit, Reason, Sure},
    values::{digest, party, quorum, system_title},
};

#[derive(Debug, Subcommand)]
pub(crate) enum CampaignCommand {
    /// Show what a campaign would touch; with --commit, store it as a draft
    #[command(
        after_help = "Without --commit nothing is stored. A draft needs the approval of another person before it can be started.\n\n\
        Examples:\n  kms campaign create \"GUEK of KAM, spring\" --rotate GUEK --manufacturer KAM --older-than-days 365\n  \
        kms campaign create \"take over B-0041\" --take-over --batch KAM-2026-0041 --imported --commit\n  \
        kms campaign create \"lost handheld h-17\" --rotate GUEK --exposed-to urn:meterkms:dev:handheld:h-17 --canary 5 --commit\n  \
        kms campaign create \"night work\" --rotate GAK --meters-file meters.txt --time-zone Europe/Berlin --window \"mon-fri 22:00-05:00\" \\\n    \
        --wave 500 --wave 20% --starts-per-minute 60 --commit"
    )]
    Create(Box<CreateCampaign>),
    /// List campaigns, newest first
    #[command(visible_alias = "ls", after_help = "Example:\n  kms campaign list --limit 20")]
    List {
        #[command(flatten)]
        limit: Limit,
    },
    /// Show a campaign: what it does to which meters, its terms, approvals and state
    #[command(after_help = "Example:\n  kms campaign show 01939e7e-7c1b-7000-8000-000000000001")]
    Show {
        #[command(flatten)]
        campaign: WhichCampaign,
    },
    /// Approve the content of a campaign that another person made
    #[command(
        after_help = "You approve the content with the digest that `kms campaign show` tells: any other is refused.\n\n\
        Examples:\n  kms campaign approve 01939e7e-7c1b-7000-8000-000000000001\n  \
        kms campaign approve 01939e7e-7c1b-7000-8000-000000000001 --content 9f2c…64 hex digits… --yes"
    )]
    Approve {
        #[command(flatten)]
        campaign: WhichCampaign,
        /// SHA-256 of the content that you have reviewed, 64 hex digits [default: it is shown, and
        /// you are asked]
        #[arg(long, value_name = "HEX", value_parser = digest)]
        content: Option<[u8; 32]>,
        #[command(flatten)]
        sure: Sure,
    },
    /// Start an approved campaign
    #[command(after_help = "Example:\n  kms campaign start 01939e7e-7c1b-7000-8000-000000000001 --yes")]
    Start {
        #[command(flatten)]
        campaign: WhichCampaign,
        #[command(flatten)]
        sure: Sure,
    },
    /// Pause a campaign: no more tasks are issued; what is under way ends
    #[command(
        after_help = "Example:\n  kms campaign pause 01939e7e-7c1b-7000-8000-000000000001 --reason \"storm, ticket 4720\""
    )]
    Pause {
        #[command(flatten)]
        campaign: WhichCampaign,
        #[command(flatten)]
        why: Reason,
    },
    /// Resume a campaign; the failures of the wave so far are accepted
    #[command(
        after_help = "Example:\n  kms campaign resume 01939e7e-7c1b-7000-8000-000000000001 --reason \"firmware 1.4 excluded\" --yes"
    )]
    Resume {
        #[command(flatten)]
        campaign: WhichCampaign,
        #[command(flatten)]
        why: Reason,
        #[command(flatten)]
        sure: Sure,
    },
    /// End a campaign for good, and list the meters that are in doubt
    #[command(
        after_help = "Example:\n  kms campaign abort 01939e7e-7c1b-7000-8000-000000000001 --reason \"wrong batch\" --yes"
    )]
    Abort {
        #[command(flatten)]
        campaign: WhichCampaign,
        #[command(flatten)]
        why: Reason,
        #[command(flatten)]
        sure: Sure,
    },
    /// Watch a campaign until it ends: waves, rate, time left, reasons of failure
    #[command(after_help = "With --output json each change is a line. Ctrl-C ends the view, not the campaign.\n\n\
        Examples:\n  kms campaign watch 01939e7e-7c1b-7000-8000-000000000001\n  kms campaign watch 01939e7e-7c1b-7000-8000-000000000001 --once")]
    Watch {
        #[command(flatten)]
        campaign: WhichCampaign,
        /// Show the present state, and end
        #[arg(long)]
        once: bool,
    },
    /// Report all figures, and the meters that failed: as a table, as JSON, or as an HTML page
    #[command(after_help = "The page is one file, with its plots; it loads nothing.\n\n\
        Examples:\n  kms campaign report 01939e7e-7c1b-7000-8000-000000000001\n  \
        kms campaign report 01939e7e-7c1b-7000-8000-000000000001 --html report.html --json report.json\n  \
        kms campaign report 01939e7e-7c1b-7000-8000-000000000001 --tasks in-doubt --limit 0")]
    Report {
        #[command(flatten)]
        campaign: WhichCampaign,
        /// Write an HTML page into this new file
        #[arg(long, value_name = "FILE")]
        html: Option<PathBuf>,
        /// Write JSON into this new file
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// List tasks in this state: pending, leased, under-way, failed, in-doubt, skipped
        /// [default: failed, then in-doubt]
        #[arg(long, value_name = "STATE", value_parser = TaskState::parse)]
        tasks: Option<TaskState>,
        /// Report by batch which keys nobody else could know, and what heals the others [default:
        /// for take-overs only]
        #[arg(long)]
        acceptance: bool,
        #[command(flatten)]
        limit: Limit,
    },
}

#[derive(Args, Debug)]
pub(crate) struct WhichCampaign {
    /// The campaign's id, a UUID
    #[arg(value_name = "CAMPAIGN", value_parser = CampaignId::parse)]
    pub(crate) campaign: CampaignId,
}

#[derive(Args, Debug)]
pub(crate) struct CreateCampaign {
    /// Name of the campaign, for people
    #[arg(value_name = "NAME", value_parser = CampaignName::parse)]
    pub(crate) name: CampaignName,
    /// Store it as a draft
    #[arg(long)]
    pub(crate) commit: bool,
    #[command(flatten)]
    pub(crate) action: ActionArguments,
    #[command(flatten)]
    pub(crate) selection: SelectionArguments,
    #[command(flatten)]
    pub(crate) terms: TermsArguments,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "What is done to each meter")]
#[group(required = true, multiple = true)]
pub(crate) struct ActionArguments {
    /// Deliver a new version of this key: KEK (with a GUEK that proves it), GUEK, GBEK, GAK, or a
    /// vendor's key that the device profile gives a `key_id`
    #[arg(long, value_name = "KEY", conflicts_with_all = ["probe", "take_over"], value_parser = rotatable)]
    pub(crate) rotate: Option<KeyType>,
    /// Only find out which keys the meters hold
    #[arg(long, conflicts_with = "take_over")]
    pub(crate) probe: bool,
    /// Replace all imported keys by keys of this system: KEK, then GAK, then the rest
    #[arg(long)]
    pub(crate) take_over: bool,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Which meters")]
pub(crate) struct SelectionArguments {
    /// Every meter of the island
    #[arg(long)]
    pub(crate) whole_island: bool,
    /// FLAG id, three letters
    #[arg(long, value_name = "FLAG", value_parser = FlagId::parse)]
    pub(crate) manufacturer: Option<FlagId>,
    /// Device profile
    #[arg(long, value_name = "NAME", value_parser = DeviceProfileName::parse)]
    pub(crate) device_profile: Option<DeviceProfileName>,
    /// Members of this group
    #[arg(long, value_name = "NAME")]
    pub(crate) group: Option<String>,
    /// Assigned to this head-end (principal URI)
    #[arg(long = "assigned-to", value_name = "URN", value_parser = PrincipalId::parse)]
    pub(crate) head_end: Option<PrincipalId>,
    /// From this shipment or enrolment
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) batch: Option<String>,
    /// Whose key has been active for more than this number of days
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=36_500))]
    pub(crate) older_than_days: Option<u32>,
    /// Whose key this party could know: vendor, anyone, or a principal URI
    #[arg(long, value_name = "PARTY", value_parser = party)]
    pub(crate) exposed_to: Option<String>,
    /// Whose key was exposed in this way: shipment, plain-shipment, grant, bundle,
    /// transfer-under-exposed-kek, reported
    #[arg(long, value_name = "REASON", value_parser = exposure)]
    pub(crate) exposed_by: Option<ExposureReason>,
    /// Whose key was imported
    #[arg(long)]
    pub(crate) imported: bool,
    /// Whose key has used at least this percentage of an invocation counter: at 80 a key needs a
    /// rotation
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) counter_used: Option<u32>,
    /// Only this meter, 16 hex digits; may be repeated
    #[arg(long = "meter", value_name = "METER", value_parser = system_title)]
    pub(crate) meters: Vec<SystemTitle>,
    /// Only the meters of this file, one system title a line
    #[arg(long, value_name = "FILE")]
    pub(crate) meters_file: Option<PathBuf>,
    /// Security setup, 0.b.43.0.e.255 [default: the meter's first that has the key]
    #[arg(long, value_name = "OBIS", value_parser = SecuritySetupId::parse)]
    pub(crate) security_setup: Option<SecuritySetupId>,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Terms")]
pub(crate) struct TermsArguments {
    /// Number of people who must approve, beside you
    #[arg(long, value_name = "N", default_value = "1", value_parser = quorum)]
    pub(crate) quorum: Quorum,
    /// Number of meters of the canary cohort, which is the first wave; 0 for none
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    pub(crate) canary: u32,
    /// Size of a wave, 500 or 10%; may be repeated, the last is used for all that follow [default:
    /// 10%]
    #[arg(long = "wave", value_name = "SIZE", value_parser = WaveSize::parse)]
    pub(crate) waves: Vec<WaveSize>,
    /// Percentage of a wave's meters that must succeed
    #[arg(long, value_name = "PERCENT", default_value_t = 95, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) success_threshold: u32,
    /// Number of meters of a wave that may fail or stay in doubt
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) failure_limit: u64,
    /// IANA time zone of the windows
    #[arg(long, value_name = "ZONE", default_value = "UTC", value_parser = time_zone)]
    pub(crate) time_zone: String,
    /// When tasks may be begun, such as "mon-fri 22:00-05:00"; may be repeated [default: always]
    #[arg(long = "window", value_name = "TIMES", value_parser = MaintenanceWindow::parse)]
    pub(crate) windows: Vec<MaintenanceWindow>,
    /// Most tasks that a head-end gets within a minute [default: no limit]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) starts_per_minute: Option<u32>,
    /// Most tasks that a head-end has at once
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) in_flight: u32,
    /// Number of attempts for each meter
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=20))]
    pub(crate) attempts: u32,
    /// Seconds until the second attempt, doubled with each further one
    #[arg(long = "back-off", value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub(crate) back_off_seconds: u32,
}

fn rotatable(name: &str) -> Result<KeyType, ParseError> {
    let key_type = KeyType::parse(name)?;
    CampaignAction::rotate(key_type).map(|_| key_type)
}

fn time_zone(name: &str) -> Result<String, ParseError> {
    MaintenanceWindows::new(name, Vec::new()).map(|windows| windows.zone().to_owned())
}

fn exposure(name: &str) -> Result<ExposureReason, String> {
    ExposureReason::ALL.into_iter().find(|reason| reason.name() == name).ok_or_else(|| {
        let names: Vec<&str> = ExposureReason::ALL.iter().map(|reason| reason.name()).collect();
        format!("not one of {}", names.join(", "))
    })
}
