//! What somebody with a valid certificate tries, and what the others notice of it: each attack is
//! played over loopback against a real server, and printed as *held* or *not held* with its figure.
//! One that is not held fails the run.
//!
//! Attacks are played one after another, so that no figure is disturbed by another attack. Each is
//! bounded in count and time. A verdict never depends on a time that was measured: times are
//! figures only.
//!
//!     cargo test --release --workspace --test abuse               all
//!     cargo test --release --workspace --test abuse -- a1_ a10_   these words in the name
//!
//! `KMS_TEST_MODULE` and `KMS_TEST_DATABASE` choose module and database as for the other tests;
//! `KMS_TEST_SEED` repeats a random mix.
#![expect(clippy::indexing_slicing, clippy::unwrap_used, reason = "tests")]

mod bodies;
mod campaigns;
mod challenges;
mod connections;
mod counters;
mod enrolment;
mod fairness;
mod floods;
mod people;
mod relay;
mod replays;
mod scene;
mod shipments;
mod transfers;
mod verdict;

use std::{
    io::Write as _,
    process::ExitCode,
    time::{Duration, Instant},
};

use crate::verdict::{Verdict, table};

/// An attack: the name that chooses it, and what plays it.
type Attack = (&'static str, fn() -> Played);
type Played = std::pin::Pin<Box<dyn Future<Output = Vec<Verdict>> + Send>>;

/// In the order in which they are played.
const ATTACKS: &[Attack] = &[
    ("a1_replays_of_frames", || Box::pin(replays::of_frames())),
    ("a2_replays_after_a_new_gak", || Box::pin(replays::after_a_new_gak())),
    ("a3_floors", || Box::pin(counters::floors())),
    ("a3_floors_on_two_servers", || Box::pin(counters::floors_on_two_servers())),
    ("a3_meters_that_are_ahead", || Box::pin(counters::meters_that_are_ahead())),
    ("a4_one_officer_is_two", || Box::pin(people::one_officer_is_two())),
    ("a5_edited_tasks", || Box::pin(campaigns::edited_tasks())),
    ("a6_unfinished_requests", || Box::pin(bodies::unfinished_requests())),
    ("a7_urgent_transfers", || Box::pin(transfers::urgent())),
    ("a8_connections_of_one", || Box::pin(connections::of_one_principal())),
    ("a8_few_descriptors", || Box::pin(connections::few_descriptors())),
    ("a9_batches", || Box::pin(fairness::batches())),
    ("a10_initiate_requests", || Box::pin(challenges::initiate_requests())),
    ("a11_uploads", || Box::pin(shipments::uploads())),
    ("a12_counters_used_up", || Box::pin(counters::used_up())),
    ("a12_forged_counters", || Box::pin(counters::forged())),
    ("a13_stolen_key", || Box::pin(people::stolen_key())),
    ("a15_recorded_key", || Box::pin(challenges::recorded_key())),
    ("floods_idle_connections", || Box::pin(floods::idle_connections())),
    ("floods_refused_calls", || Box::pin(floods::refused_calls())),
    ("floods_enrolment_door", || Box::pin(enrolment::flood())),
    ("floods_scrubs", || Box::pin(floods::scrubs())),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let chosen: Vec<&Attack> = ATTACKS.iter().filter(|(name, _)| is_chosen(name, &arguments)).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        chosen.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    let began = Instant::now();
    let mut verdicts = Vec::new();
    println!("\nplaying {} attacks", chosen.len());
    for (name, play) in chosen {
        let began = Instant::now();
        let played = runtime.block_on(async { tokio::time::timeout(LONGEST, tokio::spawn(play())).await });
        let found = match played {
            Ok(Ok(verdicts)) => verdicts,
            Ok(Err(_)) => vec![Verdict::not_played(name, "it could not be played: its panic is above")],
            Err(_) => vec![Verdict::not_played(name, "it did not end in time")],
        };
        println!("{name} ({:.1} s)", began.elapsed().as_secs_f64());
        found.iter().for_each(|verdict| println!("{verdict}"));
        let _ = std::io::stdout().flush();
        verdicts.extend(found);
    }
    println!("\n{}", table(&verdicts));
    let failed = verdicts.iter().filter(|verdict| !verdict.held).count();
    println!("\n{} held, {failed} not held, {:.0} s\n", verdicts.len() - failed, began.elapsed().as_secs_f64());
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// As the test runner of the standard library chooses: words of which one must be in the name, and
/// `--skip` words.
fn is_chosen(name: &str, arguments: &[String]) -> bool {
    let (mut words, mut found) = (false, false);
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--skip" => {
                if arguments.next().is_some_and(|word| name.contains(word.as_str())) {
                    return false;
                }
            }
            flag if flag.starts_with('-') => {}
            word => {
                words = true;
                found |= name.contains(word);
            }
        }
    }
    found || !words
}

/// No attack takes nearly as long; one that hangs is reported.
const LONGEST: Duration = Duration::from_secs(240);
