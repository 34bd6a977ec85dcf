//! Maintenance windows: times of the week, in one time zone, at which tasks may be begun.

use jiff::{
    Timestamp,
    civil::Weekday,
    tz::{TimeZone, TimeZoneDatabase},
};

use crate::{ParseError, UnixMillis};

/// Windows in one time zone. Without windows it is always open.
///
/// The rules of the zone are built into the program, so all servers of one version decide alike,
/// whatever is installed on their hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaintenanceWindows {
    zone: String,
    rules: TimeZone,
    windows: Vec<MaintenanceWindow>,
}

/// A window: days of the week, and from one minute of the day to another. If the second is not
/// later, it is on the next day.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MaintenanceWindow {
    /// On which days it begins.
    pub days: Weekdays,
    /// The first minute of the day, 0–1439.
    pub from: u16,
    /// The minute of the day after its last, 0–1440.
    pub to: u16,
}

/// Days of the week: bit 0 is Monday.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Weekdays(u8);

impl Weekdays {
    /// Every day.
    pub const ALL: Self = Self(0x7F);

    /// The days of a number whose bit 0 is Monday.
    ///
    /// # Errors
    /// It is not 1 to 127.
    pub fn from_number(number: u32) -> Result<Self, ParseError> {
        match u8::try_from(number) {
            Ok(days @ 1..=0x7F) => Ok(Self(days)),
            _ => Err(ParseError::new("weekdays", format!("`{number}` is not 1 to 127"))),
        }
    }

    /// The number, bit 0 is Monday.
    pub const fn number(self) -> u8 {
        self.0
    }

    fn has(self, weekday: Weekday) -> bool {
        self.0 & (1 << weekday.to_monday_zero_offset()) != 0
    }
}

impl MaintenanceWindow {
    /// The window of this text: `HH:MM-HH:MM`, with or without days before it: `mon-fri
    /// 22:00-05:00`, `sat,sun 08:00-20:00`.
    ///
    /// # Errors
    /// The text has another form.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let refuse =
            || ParseError::new("maintenance window", format!("`{text}` is not of the form `mon-fri 22:00-05:00`"));
        let (days, times) = match text.trim().split_once(' ') {
            Some((days, times)) => (parse_days(days).ok_or_else(refuse)?, times.trim()),
            None => (Weekdays::ALL, text.trim()),
        };
        let (from, to) = times.split_once('-').ok_or_else(refuse)?;
        let window =
            Self { days, from: parse_minute(from).ok_or_else(refuse)?, to: parse_minute(to).ok_or_else(refuse)? };
        window.check()?;
        Ok(window)
    }

    fn check(self) -> Result<(), ParseError> {
        if self.from >= DAY || self.to > DAY || self.from == self.to {
            return Err(ParseError::new(
                "maintenance window",
                format!("from minute {} to minute {} is not a part of a day", self.from, self.to),
            ));
        }
        Ok(())
    }

    fn is_open(self, weekday: Weekday, minute: u16) -> bool {
        if self.from < self.to {
            return self.days.has(weekday) && (self.from..self.to).contains(&minute);
        }
        (self.days.has(weekday) && minute >= self.from) || (self.days.has(weekday.previous()) && minute < self.to)
    }
}

impl std::fmt::Display for MaintenanceWindow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.days != Weekdays::ALL {
            let days: Vec<&str> =
                NAMES.iter().zip(0..).filter(|(_, bit)| self.days.0 & (1 << bit) != 0).map(|(name, _)| *name).collect();
            write!(f, "{} ", days.join(","))?;
        }
        write!(f, "{:02}:{:02}-{:02}:{:02}", self.from / 60, self.from % 60, self.to / 60, self.to % 60)
    }
}

impl MaintenanceWindows {
    /// Always open.
    pub fn always() -> Self {
        Self { zone: "UTC".to_owned(), rules: TimeZone::UTC, windows: Vec::new() }
    }

    /// Windows in an IANA time zone, such as `Europe/Berlin`.
    ///
    /// # Errors
    /// The zone is unknown, a window is not a part of a day, or there are more than 100.
    pub fn new(zone: &str, windows: Vec<MaintenanceWindow>) -> Result<Self, ParseError> {
        let rules = TimeZoneDatabase::bundled().get(zone).map_err(|_| {
            ParseError::new(
                "time zone",
                format!("`{}` is not an IANA time zone, such as Europe/Berlin", zone.escape_debug()),
            )
        })?;
        if windows.len() > 100 {
            return Err(ParseError::new("maintenance windows", format!("{} windows; at most 100", windows.len())));
        }
        windows.iter().try_for_each(|window| window.check())?;
        // The name as the time zone database writes it, so that one zone has one name.
        let zone = rules.iana_name().unwrap_or(zone).to_owned();
        Ok(Self { zone, rules, windows })
    }

    /// The IANA name of the time zone.
    pub fn zone(&self) -> &str {
        &self.zone
    }

    /// The windows.
    pub fn windows(&self) -> &[MaintenanceWindow] {
        &self.windows
    }

    /// Whether a task may be begun at this moment.
    pub fn is_open_at(&self, now: UnixMillis) -> bool {
        if self.windows.is_empty() {
            return true;
        }
        let Ok(time) = Timestamp::from_millisecond(now.0) else { return false };
        let local = time.to_zoned(self.rules.clone());
        let minute = u16::from(local.hour().unsigned_abs()) * 60 + u16::from(local.minute().unsigned_abs());
        self.windows.iter().any(|window| window.is_open(local.weekday(), minute))
    }

    /// When a task may be begun next: now, or the next whole minute within 8 days at which a window
    /// opens.
    pub fn next_opening(&self, now: UnixMillis) -> Option<UnixMillis> {
        if self.is_open_at(now) {
            return Some(now);
        }
        // Minute by minute: at most 11,520 checks. This is exact at clock changes, and only people
        // ask for it.
        let first = now.0.div_euclid(60_000) + 1;
        (first..first + 8 * 24 * 60).map(|minute| UnixMillis(minute * 60_000)).find(|time| self.is_open_at(*time))
    }
}

fn parse_days(text: &str) -> Option<Weekdays> {
    let day = |name: &str| NAMES.iter().position(|known| known.eq_ignore_ascii_case(name));
    let mut days = 0;
    for part in text.split(',') {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (day(first)?, day(last)?),
            None => (day(part)?, day(part)?),
        };
        // `fri-mon` crosses the end of the week.
        let length = (last + 7 - first) % 7;
        (0..=length).for_each(|offset| days |= 1 << ((first + offset) % 7));
    }
    Some(Weekdays(days))
}

fn parse_minute(text: &str) -> Option<u16> {
    let (hour, minute) = text.split_once(':')?;
    if hour.len() != 2 || minute.len() != 2 {
        return None;
    }
    let (hour, minute): (u16, u16) = (hour.parse().ok()?, minute.parse().ok()?);
    (minute < 60 && hour * 60 + minute <= DAY).then_some(hour * 60 + minute)
}

const DAY: u16 = 24 * 60;
const NAMES: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> UnixMillis {
        UnixMillis(text.parse::<Timestamp>().unwrap().as_millisecond())
    }

    #[test]
    fn windows_follow_the_clock_of_their_place() {
        let windows =
            MaintenanceWindows::new("europe/berlin", vec![MaintenanceWindow::parse("mon-fri 22:00-05:00").unwrap()])
                .unwrap();
        assert_eq!(windows.zone(), "Europe/Berlin");
        // Winter: UTC+1. 2026-11-20 is a Friday.
        for (time, open) in [
            ("2026-11-20T20:59:59Z", false),
            ("2026-11-20T21:00:00Z", true),
            ("2026-11-21T03:59:59Z", true),
            ("2026-11-21T04:00:00Z", false),
            ("2026-11-21T22:00:00Z", false),
            ("2026-11-22T23:30:00Z", false),
            ("2026-11-23T21:30:00Z", true),
            // Summer: UTC+2. 2026-07-03 is a Friday.
            ("2026-07-03T20:00:00Z", true),
            ("2026-07-03T19:59:00Z", false),
        ] {
            assert_eq!(windows.is_open_at(at(time)), open, "{time}");
        }
        assert_eq!(windows.next_opening(at("2026-11-21T12:00:30Z")), Some(at("2026-11-23T21:00:00Z")));
        assert_eq!(windows.next_opening(at("2026-11-20T21:00:30Z")), Some(at("2026-11-20T21:00:30Z")));
        assert!(MaintenanceWindows::always().is_open_at(at("2026-11-21T12:00:00Z")));
    }

    #[test]
    fn a_window_in_the_hour_that_does_not_exist_stays_shut_that_night() {
        let windows =
            MaintenanceWindows::new("Europe/Berlin", vec![MaintenanceWindow::parse("02:00-03:00").unwrap()]).unwrap();
        // The clock goes from 02:00 to 03:00 on 2026-03-29.
        let opening = windows.next_opening(at("2026-03-29T00:00:00Z")).unwrap();
        assert_eq!(opening, at("2026-03-30T00:00:00Z"));
    }

    #[test]
    fn texts_and_windows_stand_for_each_other() {
        for text in ["22:00-05:00", "mon,tue,wed 08:00-12:30", "sun 00:00-24:00"] {
            assert_eq!(MaintenanceWindow::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(MaintenanceWindow::parse("fri-mon 01:00-02:00").unwrap().days.number(), 0b111_0001);
        for text in [
            "",
            "22-5",
            "22:00",
            "25:00-26:00",
            "10:00-10:00",
            "xyz 10:00-11:00",
            "10:61-11:00",
            "24:00-01:00",
            "1:00-2:00",
        ] {
            assert!(MaintenanceWindow::parse(text).is_err(), "{text}");
        }
        assert!(MaintenanceWindows::new("Europe/Atlantis", Vec::new()).is_err());
    }
}
