//! Every bound of the server in one place: its name, default, range, unit, scope and reason.
//!
//! The table below is the `[limits]` section of the configuration, the value that the code reads,
//! the name that refusals and the metric `kms.bounds.met` carry, and the table of docs/security.md,
//! which a test compares. A new bound is one entry of `bounds!` and one row there.

use std::fmt;
use std::time::Duration;

use kms_domain::CounterCap;
use serde::Deserialize;

use crate::error::ServiceError;
use crate::metrics::metrics;

/// What has a count of its own under a bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// One call, or one message of a stream.
    Call,
    /// One connection.
    Connection,
    /// One network address (IPv6: its /64), before a principal is known.
    Address,
    /// One principal on one server, on all its connections.
    Principal,
    /// One server process.
    Server,
    /// All servers of an island, counted in the database.
    Island,
    /// One shipment file.
    File,
    /// One HSM token, on one server.
    Token,
    /// One invocation counter: a client title under one version of a key.
    Counter,
    /// One invitation of a handheld.
    Invitation,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Call => "call",
            Self::Connection => "connection",
            Self::Address => "address",
            Self::Principal => "principal",
            Self::Server => "server",
            Self::Island => "island",
            Self::File => "file",
            Self::Token => "token",
            Self::Counter => "counter",
            Self::Invitation => "invitation",
        })
    }
}

/// The description of a bound.
#[derive(Clone, Copy, Debug)]
pub struct BoundRow {
    /// Its name in the configuration, in refusals and in metrics.
    pub name: &'static str,
    /// Its value where the configuration says nothing.
    pub default: u64,
    /// The least value that the configuration may give it.
    pub least: u64,
    /// The greatest one.
    pub most: u64,
    /// What the number counts.
    pub unit: &'static str,
    /// What has a count of its own.
    pub scope: Scope,
    /// Why the bound exists, and why it is so high.
    pub reason: &'static str,
}

macro_rules! bounds {
    ($($bound:ident $name:ident = $default:expr, $least:expr => $most:expr, $unit:literal, $scope:ident, $reason:literal;)*) => {
        /// A bound, by name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Bound {
            $(#[doc = $reason] $bound,)*
        }

        impl Bound {
            /// All bounds, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$bound,)*];

            /// Its description.
            pub const fn row(self) -> BoundRow {
                match self {
                    $(Self::$bound => BoundRow {
                        name: stringify!($name), default: $default, least: $least, most: $most, unit: $unit, scope: Scope::$scope, reason: $reason,
                    },)*
                }
            }
        }

        /// `[limits]` of the configuration: the values of all bounds.
        #[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct Limits {
            $(#[doc = $reason] pub $name: u64,)*
        }

        impl Default for Limits {
            fn default() -> Self {
                Self { $($name: $default,)* }
            }
        }

        impl Limits {
            /// The value of a bound.
            pub const fn of(&self, bound: Bound) -> u64 {
                match bound {
                    $(Bound::$bound => self.$name,)*
                }
            }
        }
    };
}

bounds! {
    MessageOctets message_octets = 16 << 10, 4 << 10 => 1 << 20, "octets", Call,
        "The message of a method that names few objects. A longer message is refused before it is received";
    CertificateMessageOctets certificate_message_octets = 64 << 10, 20 << 10 => 1 << 20, "octets", Call,
        "Methods of principals: a certificate request has up to 16 KiB, and more in PEM";
    BatchMessageOctets batch_message_octets = 256 << 10, 128 << 10 => 4 << 20, "octets", Call,
        "Methods that name up to 10,000 meters or 1,000 tasks: 10,000 titles have 100 KiB";
    LargeMessageOctets large_message_octets = 2 << 20, 1_100_000 => 4 << 20, "octets", Call,
        "Frames, steps of transfers, pieces of a shipment (1 MiB), campaigns (100,000 meters: 1 MiB), and changes that say more of each meter than its title";
    HeaderOctets header_octets = 8 << 10, 4 << 10 => 64 << 10, "octets", Call,
        "The headers of a call, with 32 octets for each (RFC 9113, 6.5.2): they are held during the whole call";
    RequestSeconds request_seconds = 10, 1 => 300, "seconds", Call,
        "From the headers of a call to the last octet of its message: a slower sender occupies memory";
    UploadPauseSeconds upload_pause_seconds = 30, 1 => 600, "seconds", Call,
        "From one message of an upload to the end of the next: the sender can continue later, after the last octet that arrived";
    Connections connections = 2_048, 4 => 65_536, "connections", Server,
        "Each has buffers and a file descriptor. Fewer where the limit of open files allows fewer";
    DescriptorsReserve descriptors_reserve = 128, 64 => 4_096, "files", Server,
        "Open files that connections never take: database, watermark, log and HSM need them to write records";
    Handshakes handshakes = 256, 4 => 4_096, "handshakes", Server,
        "Connections that are not authenticated yet; each costs a signature. If all places are taken, the connection that has been silent longest is closed";
    ConnectionsPerAddress connections_per_address = 1_024, 4 => 65_536, "connections", Address,
        "One host does not take all connections, whatever certificates it has. Raise it if a proxy hides the addresses of clients";
    HandshakesPerAddress handshakes_per_address = 64, 4 => 4_096, "handshakes", Address,
        "One host without a certificate does not take all places for handshakes. Raise it if a proxy hides the addresses of clients";
    FirstOctetSeconds first_octet_seconds = 2, 1 => 60, "seconds", Connection,
        "From the connection to its first octet: in TLS the client sends first";
    HandshakeSeconds handshake_seconds = 10, 1 => 60, "seconds", Connection,
        "From the first octet to the end of the handshake";
    FirstCallSeconds first_call_seconds = 60, 5 => 3_600, "seconds", Connection,
        "From the handshake to the first call: a connection that the network has lost, or that never calls, occupies a place. If all places are taken, it is closed earlier";
    ConnectionsPerPrincipal connections_per_principal = 64, 1 => 65_536, "connections", Principal,
        "A program needs one for each of its processes. One certificate does not take all connections: further ones end with GOAWAY and this name";
    StreamsPerConnection streams_per_connection = 256, 1 => 4_096, "calls", Connection,
        "Calls at a time (SETTINGS_MAX_CONCURRENT_STREAMS): further ones wait at the client";
    RequestOctetsPerConnection request_octets_per_connection = 8 << 20, 4 << 20 => 256 << 20, "octets", Connection,
        "Requests that are not answered yet: a connection occupies this and its HTTP/2 window of 512 KiB, however many calls it begins";
    RequestOctetsPerPrincipal request_octets_per_principal = 16 << 20, 4 << 20 => 1 << 30, "octets", Principal,
        "The same for all connections of a principal together: more connections do not occupy more memory";
    AnswerStreamsPerPrincipal answer_streams_per_principal = 64, 1 => 65_536, "calls", Principal,
        "Calls that are answered by a stream: for a caller that reads slowly, each occupies up to three parts of its answer, 1.5 MiB";
    RequestOctets request_octets = 256 << 20, 16 << 20 => 16 << 30, "octets", Server,
        "The same for all principals together: many principals do not fill the memory either";
    ActsWaiting acts_waiting = 8_192, 256 => 1_000_000, "acts", Server,
        "Acts that wait for the writer: if the database is slow, callers are refused at once and do not wait";
    ActsWaitingPerPrincipal acts_waiting_per_principal = 1_024, 16 => 65_536, "acts", Principal,
        "Acts that wait for the writer: a head-end with 256 calls on each of four connections has this many";
    MetersInFlightPerPrincipal meters_in_flight_per_principal = 50_000, 10_000 => 1_000_000, "meters", Principal,
        "Meters that the waiting acts name: five calls of the largest size. A principal that sends more waits for its own calls";
    LogOctetsPerPrincipalAndHour log_octets_per_principal_and_hour = 4 << 30, 1 << 20 => 1 << 40, "octets", Principal,
        "Records that the acts of one principal add to the log in an hour on one server. A head-end that opens a session with each of 25 million meters every 15 minutes writes half of it. A quarter more is kept for transfers, revocations and acts of officers";
    BatchMetersPerPrincipal batch_meters_per_principal = 1_000_000, 10_000 => 1_000_000_000, "meters", Principal,
        "Meters in the batches that are not answered yet: 100 calls of the largest size. Two keep the server busy";
    BatchChunksPerPrincipal batch_chunks_per_principal = 6, 1 => 256, "chunks", Principal,
        "Chunks of batches, 500 meters each, that are decided and wrapped at the same time: two calls use all of them. Further chunks wait";
    HsmJobs hsm_jobs = 4_096, 1 => 1_000_000, "jobs", Token,
        "Jobs that wait for an HSM token: if the HSM is slow, callers are refused at once and do not wait. A batch is one job for each 64 meters";
    HsmJobsPerPrincipal hsm_jobs_per_principal = 1_024, 1 => 1_000_000, "jobs", Principal,
        "Jobs of one principal that wait for one token: a quarter of the queue";
    CountersPerHour counters_per_hour = 4_000_000, 1_000_000 => 4_294_967_295, "counters", Counter,
        "Invocation counters that sessions and frames reserve in an hour of UTC: to use up 2³² counters takes at least 44 days. It does not apply to transfers and probes";
    ScrubsPerPrincipal scrubs_per_principal = 4, 1 => 64, "calls", Principal,
        "Calls that watch a scrub: one scrub runs for all of them. One call is enough; a second one replaces a call whose connection broke";
    UploadsPerPrincipal uploads_per_principal = 16, 1 => 1_024, "files", Principal,
        "Shipments that are uploaded and not imported yet, on all servers: counted in the transaction that adds one";
    SpoolOctetsPerPrincipal spool_octets_per_principal = 4 << 30, 1 << 20 => 1 << 40, "octets", Principal,
        "The announced length of those files: 4 GiB are 5 million meters with four keys. Nothing of a file is verified before it is complete";
    SpoolOctets spool_octets = 16 << 30, 1 << 20 => 1 << 42, "octets", Island,
        "The same for all principals together: the spool is in the database, on the disk of the audit log";
    UploadHours upload_hours = 24, 1 => 720, "hours", File,
        "From the first octet of an upload to the last. An unfinished upload is then dropped. A complete file that nobody imports is dropped a week after its last change";
    DiskReserveOctets disk_reserve_octets = 1 << 30, 0 => 1 << 40, "octets", Server,
        "Free space that uploads leave to the log (I2) if the database is embedded; at most a tenth of the disk";
    WorkOrdersPerPrincipal work_orders_per_principal = 100_000, 10 => 1_000_000, "orders", Principal,
        "Work orders of one maker whose time is not over for a week, whether they ended or not, on all servers: counted in the transaction that adds one. They are never deleted. A workforce system that orders 3,000 a day and plans two weeks ahead has 63,000; half as many again are for orders that last long";
    WorkOrderPlaceDays work_order_place_days = 90, 1 => 3_650, "days", Island,
        "From the end of a work order, or of its time, to the removal of its place: it often is a person's home. The rest of the order stays for the audit";
    PrincipalCertificateDays principal_certificate_days = 365, 1 => 3_650, "days", Principal,
        "The validity of certificates of principals";
    HandheldCertificateDays handheld_certificate_days = 7, 1 => 90, "days", Principal,
        "The validity of certificates of handhelds: a lost device that nobody reports opens no connection after this time. A device renews in the second half of it, so half of it is the longest time without a connection";
    InvitationMinutes invitation_minutes = 60, 1 => 1_440, "minutes", Invitation,
        "How long the one-time code of a handheld is accepted at most";
    WrongCodesPerInvitation wrong_codes_per_invitation = 5, 1 => 100, "codes", Invitation,
        "Wrong codes with the right public part: they end the invitation. A code has 120 random bits, so this is for the typist";
    EnrolmentConnections enrolment_connections = 64, 4 => 1_024, "connections", Server,
        "Connections to the enrolment door, with their handshakes. They are strangers: they take no place of the other bounds, and one call at a time each";
    EnrolmentConnectionsPerAddress enrolment_connections_per_address = 8, 1 => 1_024, "connections", Address,
        "One host does not take all places of the enrolment door. Raise it if a proxy hides the addresses of devices";
    EnrolmentSeconds enrolment_seconds = 30, 5 => 300, "seconds", Connection,
        "From the connection of a device to its end: an enrolment takes two seconds";
    EnrolmentCallsPerAddressAndHour enrolment_calls_per_address_and_hour = 120, 1 => 1_000_000, "calls", Address,
        "Attempts to enrol, right or wrong. Raise it if a proxy hides the addresses of devices";
    ServerCertificateDays server_certificate_days = 365, 1 => 3_650, "days", Server,
        "The validity of the server's own certificate, which it renews in the last third of that time";
}

impl Bound {
    /// Its name in the configuration, in refusals and in metrics.
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// Counts that the bound was met.
    pub fn count(self) {
        metrics().bound_met(self.name());
    }

    /// Counts that the bound was met, and makes the refusal: RESOURCE_EXHAUSTED, with the bound's
    /// name and value in its text. `retry_after` is when to try again; zero if time does not help.
    pub fn met(self, limits: &Limits, what: &str, retry_after: Duration) -> ServiceError {
        self.count();
        let BoundRow { name, unit, scope, .. } = self.row();
        ServiceError::ResourceExhausted {
            reason: format!("{what}: the bound `{name}` is {} {unit} for each {scope}", limits.of(self)),
            retry_after,
        }
    }
}

impl Limits {
    /// Compares each value with its range, and values with each other.
    ///
    /// # Errors
    /// The first value that does not fit, by its name in the configuration.
    pub fn check(&self) -> Result<(), String> {
        for bound in Bound::ALL {
            let BoundRow { name, least, most, unit, .. } = bound.row();
            let value = self.of(*bound);
            if !(least..=most).contains(&value) {
                return Err(format!(
                    "[limits] {name}: `{value}` is not {} to {} {unit}",
                    grouped(least),
                    grouped(most)
                ));
            }
        }
        // A call that can never fit would be refused for ever.
        let largest = [
            self.message_octets,
            self.certificate_message_octets,
            self.batch_message_octets,
            self.large_message_octets,
        ]
        .into_iter()
        .max();
        for (less, more) in [
            (
                ("message octets with headers", largest.unwrap_or_default().saturating_add(self.header_octets)),
                Bound::RequestOctetsPerConnection,
            ),
            (("request_octets_per_connection", self.request_octets_per_connection), Bound::RequestOctetsPerPrincipal),
            (("request_octets_per_principal", self.request_octets_per_principal), Bound::RequestOctets),
            (("spool_octets_per_principal", self.spool_octets_per_principal), Bound::SpoolOctets),
        ] {
            if less.1 > self.of(more) {
                return Err(format!("[limits] {}: it is less than {}, {}", more.name(), less.0, grouped(less.1)));
            }
        }
        Ok(())
    }

    /// A bound in seconds as a time.
    pub const fn time(&self, bound: Bound) -> Duration {
        Duration::from_secs(self.of(bound))
    }

    /// A bound as a number of things in memory.
    pub fn number(&self, bound: Bound) -> usize {
        usize::try_from(self.of(bound)).unwrap_or(usize::MAX)
    }

    /// How many counters sessions and frames may reserve of one invocation counter in an hour (I4).
    pub fn counter_cap(&self) -> CounterCap {
        // A value out of range was refused with the configuration.
        u32::try_from(self.counters_per_hour)
            .ok()
            .and_then(|counters| CounterCap::new(counters).ok())
            .unwrap_or_default()
    }

    /// Days for which principals' certificates are issued.
    pub fn principal_days(&self) -> u16 {
        u16::try_from(self.principal_certificate_days).unwrap_or(u16::MAX)
    }

    /// Days for which handhelds' certificates are issued.
    pub fn handheld_days(&self) -> u16 {
        u16::try_from(self.handheld_certificate_days).unwrap_or(u16::MAX)
    }

    /// Days for which server certificates are issued.
    pub fn server_days(&self) -> u16 {
        u16::try_from(self.server_certificate_days).unwrap_or(u16::MAX)
    }
}

/// The table of docs/security.md.
pub fn table() -> String {
    let mut table = "| bound | default | unit | for each | why |\n|---|---|---|---|---|\n".to_owned();
    for bound in Bound::ALL {
        let BoundRow { name, default, unit, scope, reason, .. } = bound.row();
        table.push_str(&format!("| `{name}` | {} | {unit} | {scope} | {reason} |\n", grouped(default)));
    }
    table
}

/// A number with its digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_has_this_table() {
        let documentation = include_str!("../../../docs/security.md");
        assert!(
            documentation.contains(&table()),
            "docs/security.md, Bounds, does not have the table of the code:\n\n{}",
            table()
        );
    }

    #[test]
    fn each_bound_has_a_default_within_its_range_and_a_name_of_its_own() {
        let mut names = std::collections::HashSet::new();
        for bound in Bound::ALL {
            let row = bound.row();
            assert!((row.least..=row.most).contains(&row.default), "{row:?}");
            assert!(names.insert(row.name), "{row:?}");
            assert!(row.reason.len() > 20 && !row.reason.ends_with('.') && !row.reason.contains('|'), "{row:?}");
        }
        Limits::default().check().unwrap();
    }

    #[test]
    fn the_configuration_is_checked() {
        let parsed = |text: &str| {
            toml::from_str::<Limits>(text)
                .map_err(|error| error.to_string())
                .and_then(|limits| limits.check().map(|()| limits))
        };
        assert_eq!(parsed("request_seconds = 20").unwrap().request_seconds, 20);
        for (text, expected) in [
            ("request_seconds = 0", "request_seconds: `0` is not 1 to 300 seconds"),
            ("request_secs = 5", "request_secs"),
            ("request_seconds = -1", "request_seconds"),
            ("request_octets_per_principal = 4194304", "request_octets_per_principal: it is less than"),
        ] {
            let refusal = parsed(text).unwrap_err();
            assert!(refusal.contains(expected), "{text}: {refusal}");
        }
    }

    #[test]
    fn a_refusal_names_the_bound() {
        let refusal =
            Bound::RequestSeconds.met(&Limits::default(), "the request took too long", Duration::from_secs(1));
        assert_eq!(
            refusal.to_string(),
            "the request took too long: the bound `request_seconds` is 10 seconds for each call"
        );
    }
}
