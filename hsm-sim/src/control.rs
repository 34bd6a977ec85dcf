//! The failing HSM: a control file makes the running module slow, makes its calls fail, and removes
//! sessions and tokens.
//!
//! The README describes the format. Rules (`latency`, `fail`, `session-limit`) apply as long as
//! they are in the file. Commands (`drop-sessions`, …) are executed once: each has an `id`, and a
//! command that is in the file at the start counts as executed.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use cryptoki_sys::*;

use crate::crypto::random;
use crate::error::{Result, Rv};
use crate::function::Function;

/// Watches the control file.
pub(crate) struct Control {
    path: PathBuf,
    start: Instant,
    /// When to look at the file again, in nanoseconds after `start`.
    next_look: AtomicU64,
    rules: ArcSwap<Rules>,
    seen: Mutex<Seen>,
}

/// The state of the last reading.
#[derive(Default)]
struct Seen {
    stamp: Option<(u64, u64, i64, i64)>,
    commands: HashSet<String>,
    started: bool,
}

/// The rules in the file now.
#[derive(Default)]
struct Rules {
    latencies: Vec<(Scope, Latency)>,
    failures: Vec<Arc<Failure>>,
    session_limit: Option<usize>,
}

/// The functions that a rule applies to; `None` is all.
type Scope = Option<Function>;

/// The time that is added to a call.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Latency {
    Uniform { low: Duration, high: Duration },
    LogNormal { median: Duration, sigma: f64 },
}

/// Which calls fail, and how.
#[derive(Debug)]
struct Failure {
    line: String,
    scope: Scope,
    code: CK_RV,
    when: When,
    /// Number of calls of these functions since the rule appeared.
    calls: AtomicU64,
}

/// Which of the calls, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    Range { first: u64, last: u64 },
    Every(u64),
    Probability(f64),
}

/// A command, which the module executes once. A token is named by its slot number or its label.
#[derive(Debug, PartialEq)]
pub(crate) enum Command {
    /// Close all sessions.
    DropSessions,
    /// Remove the token from its slot.
    RemoveToken(String),
    /// Insert the token again.
    InsertToken(String),
    /// Destroy the content of the token.
    WipeToken(String),
}

enum Line {
    Latency(Scope, Latency),
    Failure(Failure),
    SessionLimit(usize),
    Command(String, Command),
}

impl Control {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            path,
            start: Instant::now(),
            next_look: AtomicU64::new(0),
            rules: ArcSwap::default(),
            seen: Mutex::default(),
        }
    }

    /// Applies the rules before a function does its work: the call may take longer, or fail.
    pub(crate) fn apply_rules(&self, function: Function) -> Result<()> {
        let rules = self.rules.load();
        let covers = |scope: Scope| scope.is_none_or(|scope| scope == function);
        for (_, latency) in rules.latencies.iter().filter(|(scope, _)| covers(*scope)) {
            std::thread::sleep(latency.sample());
        }
        for failure in rules.failures.iter().filter(|failure| covers(failure.scope)) {
            if failure.strikes() {
                return Err(Rv(failure.code));
            }
        }
        Ok(())
    }

    /// Reads the file again if it has changed, and returns the new commands. Looks at the file at
    /// most every few milliseconds.
    pub(crate) fn poll(&self) -> Vec<Command> {
        let now = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let due = self.next_look.load(Ordering::Relaxed);
        if now < due
            || self.next_look.compare_exchange(due, now + LOOK_EVERY, Ordering::AcqRel, Ordering::Relaxed).is_err()
        {
            return Vec::new();
        }
        self.read()
    }

    /// The largest number of sessions with one token.
    pub(crate) fn session_limit(&self) -> Option<usize> {
        self.rules.load().session_limit
    }

    fn read(&self) -> Vec<Command> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let first = !std::mem::replace(&mut seen.started, true);
        let Ok(metadata) = fs::metadata(&self.path) else {
            // No file, no rules.
            if seen.stamp.take().is_some() {
                self.rules.store(Arc::default());
            }
            return Vec::new();
        };
        let stamp = (metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec());
        if seen.stamp == Some(stamp) {
            return Vec::new();
        }
        let Ok(text) = fs::read_to_string(&self.path) else { return Vec::new() };
        seen.stamp = Some(stamp);
        let mut rules = Rules::default();
        let mut commands = Vec::new();
        let old = self.rules.load();
        for (number, text) in text.lines().enumerate() {
            match Line::parse(text) {
                Ok(None) => {}
                Ok(Some(Line::Latency(scope, latency))) => rules.latencies.push((scope, latency)),
                Ok(Some(Line::SessionLimit(limit))) => rules.session_limit = Some(limit),
                Ok(Some(Line::Failure(failure))) => {
                    // A rule that was there before continues to count.
                    let same = old.failures.iter().find(|old| old.line == failure.line);
                    rules.failures.push(same.map_or_else(|| Arc::new(failure), Arc::clone));
                }
                Ok(Some(Line::Command(id, command))) => {
                    if seen.commands.insert(id) && !first {
                        commands.push(command);
                    }
                }
                Err(reason) => {
                    eprintln!("hsm-sim: `{}` line {}: {reason}; the line is ignored", self.path.display(), number + 1)
                }
            }
        }
        self.rules.store(Arc::new(rules));
        commands
    }
}

impl Latency {
    fn sample(self) -> Duration {
        match self {
            Self::Uniform { low, high } if low == high => low,
            Self::Uniform { low, high } => low + high.saturating_sub(low).mul_f64(uniform()),
            Self::LogNormal { median, sigma } => {
                // Box-Muller: two uniform numbers make a normal one.
                let normal =
                    (-2.0 * uniform().max(f64::MIN_POSITIVE).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
                median.mul_f64((sigma * normal).exp().min(1000.0))
            }
        }
    }

    /// `5ms`, `1ms..3ms` or `lognormal MEDIAN SIGMA`.
    fn parse(words: &[&str]) -> std::result::Result<Self, String> {
        match words {
            ["lognormal", median, sigma] => {
                let sigma = sigma
                    .parse()
                    .ok()
                    .filter(|sigma| (0.0..=10.0).contains(sigma))
                    .ok_or(format!("`{sigma}` is no sigma from 0 to 10"))?;
                Ok(Self::LogNormal { median: duration(median)?, sigma })
            }
            [range] => match range.split_once("..") {
                Some((low, high)) => {
                    let (low, high) = (duration(low)?, duration(high)?);
                    if low > high {
                        Err(format!("`{range}` ends before it begins"))
                    } else {
                        Ok(Self::Uniform { low, high })
                    }
                }
                None => duration(range).map(|time| Self::Uniform { low: time, high: time }),
            },
            _ => Err("expected a time, a range of times, or `lognormal MEDIAN SIGMA`".to_owned()),
        }
    }
}

impl Failure {
    /// Counts a call. True: it fails.
    fn strikes(&self) -> bool {
        let call = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        match self.when {
            When::Range { first, last } => (first..=last).contains(&call),
            When::Every(step) => call.is_multiple_of(step),
            When::Probability(probability) => uniform() < probability,
        }
    }
}

impl Line {
    fn parse(text: &str) -> std::result::Result<Option<Self>, String> {
        let text = text.split('#').next().unwrap_or_default().trim();
        let words: Vec<&str> = text.split_whitespace().collect();
        match words.as_slice() {
            [] => Ok(None),
            ["latency", name, latency @ ..] => Ok(Some(Self::Latency(scope(name)?, Latency::parse(latency)?))),
            ["fail", name, conditions @ .., code] => {
                let (scope, code, when) = (scope(name)?, code_of(code)?, When::parse(conditions)?);
                Ok(Some(Self::Failure(Failure { line: text.to_owned(), scope, code, when, calls: AtomicU64::new(0) })))
            }
            ["session-limit", limit] => limit
                .parse()
                .map(|limit| Some(Self::SessionLimit(limit)))
                .map_err(|_| format!("`{limit}` is no number")),
            [name @ ("drop-sessions" | "remove-token" | "insert-token" | "wipe-token"), target @ .., id] => {
                let id = id
                    .strip_prefix("id=")
                    .ok_or("a command ends with `id=` and a value that no earlier one had".to_owned())?;
                let target = target.join(" ");
                let command = match (*name, target.is_empty()) {
                    ("drop-sessions", true) => Command::DropSessions,
                    ("remove-token", false) => Command::RemoveToken(target),
                    ("insert-token", false) => Command::InsertToken(target),
                    ("wipe-token", false) => Command::WipeToken(target),
                    (_, true) => return Err(format!("`{name}` needs a slot number or a token label")),
                    _ => return Err(format!("`{name}` takes nothing but its id")),
                };
                Ok(Some(Self::Command(format!("{name} {id}"), command)))
            }
            [word, ..] => Err(format!("`{word}` is no rule and no command, or something is missing after it")),
        }
    }
}

impl When {
    /// `nth=` or `count=` or both; or `every=`; or `probability=`. An `id=` has no effect but to
    /// make a line differ from an earlier one.
    fn parse(conditions: &[&str]) -> std::result::Result<Self, String> {
        let mut given = HashMap::new();
        for condition in conditions {
            let (key, value) = condition.split_once('=').ok_or(format!("`{condition}` is no condition"))?;
            given.insert(key, value);
        }
        given.remove("id");
        let mut number = |key: &str| match given.remove(key) {
            None => Ok(None),
            Some(value) => value
                .parse()
                .ok()
                .filter(|number| *number > 0)
                .map(Some)
                .ok_or(format!("`{key}={value}` is no positive number")),
        };
        let (nth, count, every): (Option<u64>, Option<u64>, Option<u64>) =
            (number("nth")?, number("count")?, number("every")?);
        let probability = given.remove("probability");
        if let Some(key) = given.keys().next() {
            return Err(format!("`{key}` is no condition"));
        }
        match (nth, count, every, probability) {
            (first, count, None, None) => {
                let length = count.unwrap_or(if first.is_some() { 1 } else { u64::MAX });
                let first = first.unwrap_or(1);
                Ok(Self::Range { first, last: first.saturating_add(length - 1) })
            }
            (None, None, Some(step), None) => Ok(Self::Every(step)),
            (None, None, None, Some(value)) => {
                let probability = value.parse().ok().filter(|value| (0.0..=1.0).contains(value));
                probability.map(Self::Probability).ok_or(format!("`{value}` is no probability from 0 to 1"))
            }
            _ => Err("`every` and `probability` stand alone".to_owned()),
        }
    }
}

fn scope(name: &str) -> std::result::Result<Scope, String> {
    if name == "*" {
        return Ok(None);
    }
    let function = Function::ALL.iter().find(|function| function.name() == name);
    function.map(|function| Some(*function)).ok_or(format!("`{name}` is no function that can be controlled"))
}

/// A time: a number and `us`, `ms` or `s`.
fn duration(text: &str) -> std::result::Result<Duration, String> {
    let units = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0)];
    let number = units.iter().find_map(|(unit, factor)| Some(text.strip_suffix(unit)?.parse::<f64>().ok()? * factor));
    let number = number.filter(|seconds| (0.0..=3600.0).contains(seconds));
    number
        .map(Duration::from_secs_f64)
        .ok_or(format!("`{text}` is no time: write it as `5ms`, `200us` or `1.5s`, up to an hour"))
}

fn code_of(name: &str) -> std::result::Result<CK_RV, String> {
    if let Some(digits) = name.strip_prefix("0x") {
        return CK_RV::from_str_radix(digits, 16).map_err(|_| format!("`{name}` is no number"));
    }
    let known = CODES.iter().find(|(known, _)| *known == name);
    known.map(|(_, code)| *code).ok_or(format!("`{name}` is no return code known here: write it as a number, `0x30`"))
}

/// A number from 0 to 1.
fn uniform() -> f64 {
    let mut bytes = [0; 4];
    if random(&mut bytes).is_err() {
        return 0.5;
    }
    f64::from(u32::from_ne_bytes(bytes)) / (f64::from(u32::MAX) + 1.0)
}

macro_rules! codes {
    ($($name:ident),+ $(,)?) => { &[$((stringify!($name), $name)),+] };
}

static CODES: &[(&str, CK_RV)] = codes![
    CKR_CANCEL,
    CKR_HOST_MEMORY,
    CKR_SLOT_ID_INVALID,
    CKR_GENERAL_ERROR,
    CKR_FUNCTION_FAILED,
    CKR_ARGUMENTS_BAD,
    CKR_CANT_LOCK,
    CKR_ATTRIBUTE_READ_ONLY,
    CKR_ATTRIBUTE_SENSITIVE,
    CKR_ATTRIBUTE_TYPE_INVALID,
    CKR_ATTRIBUTE_VALUE_INVALID,
    CKR_ACTION_PROHIBITED,
    CKR_DATA_INVALID,
    CKR_DATA_LEN_RANGE,
    CKR_DEVICE_ERROR,
    CKR_DEVICE_MEMORY,
    CKR_DEVICE_REMOVED,
    CKR_ENCRYPTED_DATA_INVALID,
    CKR_ENCRYPTED_DATA_LEN_RANGE,
    CKR_FUNCTION_CANCELED,
    CKR_FUNCTION_NOT_SUPPORTED,
    CKR_KEY_HANDLE_INVALID,
    CKR_KEY_SIZE_RANGE,
    CKR_KEY_TYPE_INCONSISTENT,
    CKR_KEY_FUNCTION_NOT_PERMITTED,
    CKR_KEY_NOT_WRAPPABLE,
    CKR_KEY_UNEXTRACTABLE,
    CKR_MECHANISM_INVALID,
    CKR_MECHANISM_PARAM_INVALID,
    CKR_OBJECT_HANDLE_INVALID,
    CKR_OPERATION_ACTIVE,
    CKR_OPERATION_NOT_INITIALIZED,
    CKR_PIN_INCORRECT,
    CKR_PIN_INVALID,
    CKR_PIN_LEN_RANGE,
    CKR_PIN_EXPIRED,
    CKR_PIN_LOCKED,
    CKR_SESSION_CLOSED,
    CKR_SESSION_COUNT,
    CKR_SESSION_HANDLE_INVALID,
    CKR_SESSION_READ_ONLY,
    CKR_SESSION_EXISTS,
    CKR_SIGNATURE_INVALID,
    CKR_SIGNATURE_LEN_RANGE,
    CKR_TEMPLATE_INCOMPLETE,
    CKR_TEMPLATE_INCONSISTENT,
    CKR_TOKEN_NOT_PRESENT,
    CKR_TOKEN_NOT_RECOGNIZED,
    CKR_TOKEN_WRITE_PROTECTED,
    CKR_UNWRAPPING_KEY_HANDLE_INVALID,
    CKR_USER_ALREADY_LOGGED_IN,
    CKR_USER_NOT_LOGGED_IN,
    CKR_USER_PIN_NOT_INITIALIZED,
    CKR_USER_ANOTHER_ALREADY_LOGGED_IN,
    CKR_WRAPPED_KEY_INVALID,
    CKR_WRAPPED_KEY_LEN_RANGE,
    CKR_WRAPPING_KEY_HANDLE_INVALID,
    CKR_RANDOM_NO_RNG,
    CKR_BUFFER_TOO_SMALL,
    CKR_CRYPTOKI_NOT_INITIALIZED,
    CKR_TOKEN_RESOURCE_EXCEEDED,
    CKR_FUNCTION_REJECTED,
    CKR_VENDOR_DEFINED,
];

const LOOK_EVERY: u64 = 2_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn failing_calls(line: &str, calls: u64) -> Vec<u64> {
        let Ok(Some(Line::Failure(failure))) = Line::parse(line) else { panic!("`{line}` is a failure") };
        (1..=calls).filter(|_| failure.strikes()).collect()
    }

    #[test]
    fn conditions_choose_the_calls() {
        assert_eq!(failing_calls("fail C_Sign nth=3 CKR_DEVICE_ERROR", 6), [3]);
        assert_eq!(failing_calls("fail C_Sign nth=3 count=2 CKR_DEVICE_ERROR", 6), [3, 4]);
        assert_eq!(failing_calls("fail C_Sign count=2 id=x CKR_DEVICE_ERROR", 6), [1, 2]);
        assert_eq!(failing_calls("fail * every=2 0x30", 6), [2, 4, 6]);
        assert_eq!(failing_calls("fail * CKR_DEVICE_ERROR", 3), [1, 2, 3]);
        assert_eq!(failing_calls("fail * probability=0 CKR_DEVICE_ERROR", 3), [0; 0]);
    }

    #[test]
    fn wrong_lines_say_what_is_wrong() {
        for (line, part) in [
            ("latency C_Nothing 5ms", "`C_Nothing` is no function"),
            ("latency * 5", "`5` is no time"),
            ("latency * 3ms..1ms", "ends before it begins"),
            ("fail C_Sign nth=0 CKR_DEVICE_ERROR", "`nth=0` is no positive number"),
            ("fail C_Sign every=2 count=1 CKR_DEVICE_ERROR", "stand alone"),
            ("fail C_Sign CKR_NONSENSE", "`CKR_NONSENSE` is no return code"),
            ("drop-sessions", "`drop-sessions` is no rule"),
            ("remove-token id=1", "needs a slot number"),
            ("explode", "`explode` is no rule"),
        ] {
            let reason = Line::parse(line).err().unwrap_or_default();
            assert!(reason.contains(part), "`{line}` gives `{reason}`");
        }
    }

    #[test]
    fn latencies_stay_in_their_range() {
        let Ok(Some(Line::Latency(None, latency))) = Line::parse("latency * 1ms..3ms # slow") else {
            panic!("a latency")
        };
        for _ in 0..100 {
            assert!((Duration::from_millis(1)..=Duration::from_millis(3)).contains(&latency.sample()));
        }
    }
}
