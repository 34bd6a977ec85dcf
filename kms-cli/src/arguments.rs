//! The command line. Every value is parsed here, before anything goes to the network.

pub(crate) mod audit;
pub(crate) mod campaign;
pub(crate) mod device_type;
pub(crate) mod exposure;
pub(crate) mod field;
pub(crate) mod grant;
pub(crate) mod group;
pub(crate) mod handheld;
pub(crate) mod hsm;
pub(crate) mod meter;
pub(crate) mod principal;
pub(crate) mod proposal;
pub(crate) mod roots;
pub(crate) mod session;
pub(crate) mod shared;
pub(crate) mod shipment;
mod values;
pub(crate) mod work_order;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use self::{
    audit::AuditCommand, campaign::CampaignCommand, device_type::DeviceTypeCommand, exposure::ExposureCommand,
    field::FieldCommand, grant::GrantCommand, group::GroupCommand, handheld::HandheldCommand, hsm::HsmCommand,
    meter::MeterCommand, principal::PrincipalCommand, proposal::ProposalCommand, roots::RootsCommand,
    session::SessionCommand, shipment::ShipmentCommand, values::profile_name, work_order::WorkOrderCommand,
};
use crate::output::Format;

/// Manages smart meter keys: for security officers, auditors and field technicians. Every issue of
/// keys is audited.
#[derive(Debug, Parser)]
#[command(name = "kms", version, after_help = AFTER_HELP, max_term_width = 120)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: GlobalArguments,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Options for every command")]
pub(crate) struct GlobalArguments {
    /// Folder that contains the client profiles
    #[arg(long, global = true, value_name = "DIR", default_value = ".kms", env = "KMS_STATE")]
    pub(crate) state: PathBuf,
    /// Client profile to use [default: the name in DIR/default-profile]
    #[arg(long, global = true, value_name = "NAME", env = "KMS_PROFILE", value_parser = profile_name)]
    pub(crate) profile: Option<String>,
    /// Output format
    #[arg(long, global = true, value_name = "FORMAT", default_value = "table")]
    pub(crate) output: Format,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Get the keys of a meter for a session, or of a group for broadcasts
    #[command(subcommand)]
    Session(SessionCommand),
    /// Meters: identity, assignment, keys and counters
    #[command(subcommand)]
    Meter(MeterCommand),
    /// Groups of meters: their broadcast keys
    #[command(subcommand)]
    Group(GroupCommand),
    /// Device types: their firmware keys
    #[command(subcommand)]
    DeviceType(DeviceTypeCommand),
    /// Vendor shipments: import, watch, or make one for a trial
    #[command(subcommand)]
    Shipment(ShipmentCommand),
    /// Head-ends, officers, auditors, handhelds, manufacturers and service accounts
    #[command(subcommand)]
    Principal(PrincipalCommand),
    /// Handhelds: invite a device, hand it over, list
    #[command(subcommand)]
    Handheld(HandheldCommand),
    /// This machine as a handheld: enrol it, renew its certificate
    #[command(subcommand)]
    Field(FieldCommand),
    /// Rotate keys of many meters: plan, approve, start, watch, report
    #[command(subcommand)]
    Campaign(CampaignCommand),
    /// Work orders of technicians: who works at which meters, for which tasks, and when
    #[command(subcommand)]
    WorkOrder(WorkOrderCommand),
    /// Four-eyes approvals: list, approve, execute or withdraw pending proposals
    #[command(subcommand)]
    Proposal(ProposalCommand),
    /// The island's own root keys: versions, what uses them, rotation
    #[command(subcommand)]
    Roots(RootsCommand),
    /// Grants: who was issued which keys
    #[command(subcommand)]
    Grant(GrantCommand),
    /// Exposures: who could know which keys
    #[command(subcommand)]
    Exposure(ExposureCommand),
    /// The audit log
    #[command(subcommand)]
    Audit(AuditCommand),
    /// The HSM tokens of the server
    #[command(subcommand)]
    Hsm(HsmCommand),
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  kms completions bash > ~/.local/share/bash-completion/completions/kms")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

const AFTER_HELP: &str = "\
Exit codes:
  0  done
  1  failed
  2  wrong command line or bad request
  3  refused by policy
  4  server, HSM or database not available: try again
  5  partly done, or with something to look at: the output tells what was refused, or which keys several meters share

Examples:
  kms principal whoami
  kms meter list
  kms meter show 4B414D0000000001 --output json
  kms audit list --limit 20
  kms --profile head-end session open 4B414D0000000001 --client-title 4D4D4D0000000001";
