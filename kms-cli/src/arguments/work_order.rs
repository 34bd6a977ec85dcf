//! The command line of `kms work-order`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use jiff::Timestamp;
use kms_client::{PrincipalId, SystemTitle};
use kms_domain::{PersonName, Place, WorkOrderId, WorkOrderState, WorkOrderTask};

use super::{
    shared::{Limit, Reason, Sure},
    values::system_title,
};

#[derive(Debug, Subcommand)]
pub(crate) enum WorkOrderCommand {
    /// Make the work orders of a file: CSV or JSON Lines
    #[command(
        after_help = "Each order is made as a whole or not at all. Lines that are refused are named, and the others are done. Run the command again after \
        you have corrected them: orders that exist already, as they stand in the file, are left as they are.\n\n\
        Examples:\n  kms work-order import orders.csv\n  kms work-order import orders.jsonl --dry-run\n\n\
        CSV, with a line of headings; `place` may be missing, and lists are separated by spaces:\n  \
        id,technician,meters,tasks,from,until,place\n  \
        WO-4711,Ida Berg,4B414D0000000001 4B414D0000000002,read firmware,2026-12-01T07:00:00Z,2026-12-01T17:00:00Z,Harbour Street 7\n\n\
        JSON Lines, an order a line:\n  \
        {\"id\":\"WO-4711\",\"technician\":\"Ida Berg\",\"meters\":[\"4B414D0000000001\"],\"tasks\":[\"read\"],\"from\":\"2026-12-01T07:00:00Z\",\"until\":\"2026-12-01T17:00:00Z\"}\n\n\
        Tasks: read, configure, control-supply, replace, firmware, commission."
    )]
    Import(ImportWorkOrders),
    /// Make one work order
    #[command(
        after_help = "Example:\n  kms work-order create WO-4711 --technician \"Ida Berg\" --task read --task firmware --meter 4B414D0000000001 \\\n    \
        --from 2026-12-01T07:00:00Z --until 2026-12-01T17:00:00Z --place \"Harbour Street 7\""
    )]
    Create(CreateWorkOrder),
    /// List work orders, in the order of their begin
    #[command(
        visible_alias = "ls",
        after_help = "Unless you name a time or a state it lists orders whose time is not over.\n\nExamples:\n  kms work-order list\n  kms work-order list --technician \"Ida Berg\" --in-state open\n  \
        kms work-order list --ends-after 2026-11-01T00:00:00Z --begins-before 2026-12-01T00:00:00Z --limit 0"
    )]
    List(ListWorkOrders),
    /// Show a work order: technician, meters, tasks, time and place
    #[command(after_help = "Example:\n  kms work-order show WO-4711")]
    Show {
        /// Id of the work order
        #[arg(value_name = "ID", value_parser = WorkOrderId::parse)]
        id: WorkOrderId,
    },
    /// Change a work order that has not ended
    #[command(
        after_help = "What you do not name stays. If somebody else changes the order at the same time, one change is made, and the other is refused.\n\n\
        Examples:\n  kms work-order change WO-4711 --technician \"Bo Lind\"\n  \
        kms work-order change WO-4711 --add-meter 4B414D0000000003 --remove-meter 4B414D0000000001\n  \
        kms work-order change WO-4711 --from 2026-12-02T07:00:00Z --until 2026-12-02T17:00:00Z"
    )]
    Change(ChangeWorkOrder),
    /// Cancel a work order: the work is not to be done
    #[command(after_help = "Example:\n  kms work-order cancel WO-4711 --reason \"customer not at home\" --yes")]
    Cancel {
        /// Id of the work order
        #[arg(value_name = "ID", value_parser = WorkOrderId::parse)]
        id: WorkOrderId,
        #[command(flatten)]
        why: Reason,
        #[command(flatten)]
        sure: Sure,
    },
    /// Complete a work order: the work was done
    #[command(after_help = "Example:\n  kms work-order complete WO-4711")]
    Complete {
        /// Id of the work order
        #[arg(value_name = "ID", value_parser = WorkOrderId::parse)]
        id: WorkOrderId,
    },
}

#[derive(Args, Debug)]
pub(crate) struct ImportWorkOrders {
    /// File with the orders
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Format of the file [default: by its name, .csv or .jsonl]
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<FileFormat>,
    /// Only check the file, and send nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// The format of a file of work orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FileFormat {
    /// Comma or semicolon separated values, with a line of headings
    Csv,
    /// A JSON object a line
    Jsonl,
}

#[derive(Args, Debug)]
pub(crate) struct CreateWorkOrder {
    /// Id of the work order in the workforce system, 1 to 64 octets
    #[arg(value_name = "ID", value_parser = WorkOrderId::parse)]
    pub(crate) id: WorkOrderId,
    /// Person who does the work
    #[arg(long, value_name = "NAME", value_parser = PersonName::parse)]
    pub(crate) technician: PersonName,
    /// Task: read, configure, control-supply, replace, firmware or commission; may be repeated
    #[arg(long = "task", value_name = "TASK", required = true, value_parser = WorkOrderTask::parse)]
    pub(crate) tasks: Vec<WorkOrderTask>,
    /// System title of a meter, 16 hex digits; may be repeated
    #[arg(long = "meter", value_name = "METER", required_unless_present = "meters_file", value_parser = system_title)]
    pub(crate) meters: Vec<SystemTitle>,
    /// File with many meters, one system title a line
    #[arg(long, value_name = "FILE")]
    pub(crate) meters_file: Option<PathBuf>,
    /// Begin, RFC 3339
    #[arg(long, value_name = "TIME")]
    pub(crate) from: Timestamp,
    /// End, RFC 3339: at most 31 days after the begin
    #[arg(long, value_name = "TIME")]
    pub(crate) until: Timestamp,
    /// Place, at most 256 octets; it is in no audit record
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true, value_parser = Place::parse)]
    pub(crate) place: Place,
}

#[derive(Args, Debug)]
pub(crate) struct ListWorkOrders {
    /// Of this technician
    #[arg(long, value_name = "NAME", value_parser = PersonName::parse)]
    pub(crate) technician: Option<PersonName>,
    /// Made by this principal (URI)
    #[arg(long = "made-by", value_name = "URN", value_parser = PrincipalId::parse)]
    pub(crate) maker: Option<PrincipalId>,
    /// In this state: planned, open, expired, completed or cancelled
    #[arg(long, value_name = "STATE", value_parser = WorkOrderState::parse)]
    pub(crate) in_state: Option<WorkOrderState>,
    /// Whose time ends after this, RFC 3339
    #[arg(long, value_name = "TIME")]
    pub(crate) ends_after: Option<Timestamp>,
    /// Whose time begins before this, RFC 3339
    #[arg(long, value_name = "TIME")]
    pub(crate) begins_before: Option<Timestamp>,
    #[command(flatten)]
    pub(crate) limit: Limit,
}

#[derive(Args, Debug)]
pub(crate) struct ChangeWorkOrder {
    /// Id of the work order
    #[arg(value_name = "ID", value_parser = WorkOrderId::parse)]
    pub(crate) id: WorkOrderId,
    #[command(flatten)]
    pub(crate) change: WorkOrderChange,
    /// Revision that you have seen: the change is refused if the order has another one [default:
    /// the present one]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) revision: Option<u32>,
}

/// What a change names.
#[derive(Args, Debug)]
#[group(required = true, multiple = true)]
pub(crate) struct WorkOrderChange {
    /// Person who does the work
    #[arg(long, value_name = "NAME", value_parser = PersonName::parse)]
    pub(crate) technician: Option<PersonName>,
    /// Task, instead of the present ones; may be repeated
    #[arg(long = "task", value_name = "TASK", value_parser = WorkOrderTask::parse)]
    pub(crate) tasks: Vec<WorkOrderTask>,
    /// System title of a further meter, 16 hex digits; may be repeated
    #[arg(long = "add-meter", value_name = "METER", value_parser = system_title)]
    pub(crate) add_meters: Vec<SystemTitle>,
    /// System title of a meter that is left out, 16 hex digits; may be repeated
    #[arg(long = "remove-meter", value_name = "METER", value_parser = system_title)]
    pub(crate) remove_meters: Vec<SystemTitle>,
    /// Begin, RFC 3339
    #[arg(long, value_name = "TIME")]
    pub(crate) from: Option<Timestamp>,
    /// End, RFC 3339
    #[arg(long, value_name = "TIME")]
    pub(crate) until: Option<Timestamp>,
    /// Place; empty removes it
    #[arg(long, value_name = "TEXT", value_parser = Place::parse)]
    pub(crate) place: Option<Place>,
}
