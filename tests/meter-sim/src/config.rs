//! The configuration of a simulated meter. All of it can be read from JSON, where keys are hex.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::axdr::Data;
use crate::behaviour::{Behaviour, HexBytes, ScriptedFault};
use crate::{Obis, Secret, SecuritySuite, SymmetricKey, SystemTitle};

/// A whole meter.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeterConfig {
    /// The server's system title.
    pub system_title: SystemTitle,
    /// Value of the COSEM logical device name, ASCII.
    #[serde(default = "default_logical_device_name")]
    pub logical_device_name: String,
    /// The suite that the meter uses.
    #[serde(default)]
    pub security_suite: SecuritySuite,
    /// The security setups with their keys. Logical names must differ.
    pub security_setups: Vec<SecuritySetupConfig>,
    /// The associations, one per client SAP.
    pub associations: Vec<AssociationConfig>,
    /// The other objects. The meter has its security setups, invocation counters, current
    /// association and logical device name without an entry here.
    #[serde(default)]
    pub objects: Vec<ObjectConfig>,
    /// The longest APDU that the meter accepts, in bytes.
    #[serde(default = "default_pdu_size")]
    pub max_receive_pdu_size: u16,
    /// How the challenges of HLS 5 are chosen.
    #[serde(default)]
    pub challenges: ChallengeSource,
    /// The deviations of the meter.
    #[serde(default)]
    pub behaviour: Behaviour,
    /// Faults that happen at stated exchanges.
    #[serde(default)]
    pub faults: Vec<ScriptedFault>,
}

impl MeterConfig {
    /// An ordinary single-phase meter: client SAP 1 with HLS 5 on the first security setup, public
    /// client SAP 16, a clock, an energy register and a disconnect control.
    pub fn ordinary(system_title: SystemTitle, security_suite: SecuritySuite, setup: SecuritySetupConfig) -> Self {
        Self {
            system_title,
            logical_device_name: default_logical_device_name(),
            security_suite,
            associations: vec![
                AssociationConfig {
                    client_sap: MANAGEMENT_CLIENT_SAP,
                    mechanism: MechanismConfig::HighGmac,
                    security_setup: Some(setup.logical_name),
                },
                AssociationConfig {
                    client_sap: PUBLIC_CLIENT_SAP,
                    mechanism: MechanismConfig::Lowest,
                    security_setup: None,
                },
            ],
            security_setups: vec![setup],
            objects: vec![
                ObjectConfig::Register {
                    logical_name: Obis::ACTIVE_ENERGY_IMPORT,
                    value: Data::DoubleLongUnsigned(123_456),
                    scaler: 0,
                    unit: WATT_HOUR,
                },
                ObjectConfig::Clock {
                    logical_name: Obis::CLOCK,
                    time: [0x07, 0xEA, 0x01, 0x01, 0x04, 0x0C, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00],
                },
                ObjectConfig::DisconnectControl { logical_name: Obis::DISCONNECT_CONTROL, connected: true },
            ],
            max_receive_pdu_size: default_pdu_size(),
            challenges: ChallengeSource::default(),
            behaviour: Behaviour::default(),
            faults: Vec::new(),
        }
    }
}

/// The source of the challenges StoC: a seed, the meter's title, and the number of earlier
/// challenges. So a run can be repeated. For simulation only: predictable challenges prove nothing.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ChallengeSource {
    /// The seed; by default that of [`challenge_seed`].
    pub seed: u64,
    /// Whether the meter avoids challenges that begin as a request does. By default one in 26 does,
    /// as with real meters, and then a key management system asks for another association. Set this
    /// if a test counts associations.
    pub answerable: bool,
    /// How the first challenges begin, one after another; the rest of each comes from the seed.
    pub chosen: Vec<HexBytes>,
}

impl Default for ChallengeSource {
    fn default() -> Self {
        Self { seed: challenge_seed(), answerable: false, chosen: Vec::new() }
    }
}

/// The seed of challenges: the environment variable `METER_SIM_SEED`, or 1. A test that fails
/// prints it.
pub fn challenge_seed() -> u64 {
    std::env::var(SEED).ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

const SEED: &str = "METER_SIM_SEED";

/// One security setup object (class 64) and what belongs to it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecuritySetupConfig {
    /// The object's name, `0.b.43.0.e.255`.
    #[serde(default = "default_security_setup")]
    pub logical_name: Obis,
    /// The name of the class 1 object that shows the invocation counter, `0.b.43.1.e.255`.
    #[serde(default = "default_invocation_counter")]
    pub invocation_counter_object: Obis,
    /// Global unicast encryption key.
    pub guek: SymmetricKey,
    /// Global authentication key.
    pub gak: SymmetricKey,
    /// Global broadcast encryption key, where the meter has one.
    #[serde(default)]
    pub gbek: Option<SymmetricKey>,
    /// Master key.
    pub kek: SymmetricKey,
    /// Keys of the vendor's, by their id in `key_transfer`: 4 to 255.
    #[serde(default)]
    pub vendor_keys: BTreeMap<u8, SymmetricKey>,
    /// The client titles that may associate; absent means any.
    #[serde(default)]
    pub client_titles: Option<Vec<SystemTitle>>,
    /// Whether each client title has a counter of its own.
    #[serde(default)]
    pub counter_scope: CounterScope,
    /// The last accepted invocation counter per client title, from before the simulation.
    #[serde(default)]
    pub counter_floors: BTreeMap<SystemTitle, u32>,
    /// The first invocation counter that the meter itself uses.
    #[serde(default)]
    pub server_counter: u32,
    /// Whether APDUs that are authenticated but not encrypted are accepted.
    #[serde(default)]
    pub accept_authenticated_only: bool,
}

impl SecuritySetupConfig {
    /// The first security setup (`0.0.43.0.0.255`) with these keys and every default.
    pub fn new(guek: SymmetricKey, gak: SymmetricKey, kek: SymmetricKey) -> Self {
        Self {
            logical_name: default_security_setup(),
            invocation_counter_object: default_invocation_counter(),
            guek,
            gak,
            gbek: None,
            kek,
            vendor_keys: BTreeMap::new(),
            client_titles: None,
            counter_scope: CounterScope::default(),
            counter_floors: BTreeMap::new(),
            server_counter: 0,
            accept_authenticated_only: false,
        }
    }
}

/// The clients that share one last accepted invocation counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CounterScope {
    /// Each client title has its own.
    #[default]
    PerClientTitle,
    /// All clients of the security setup share one.
    PerSecuritySetup,
}

/// One association of the meter.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AssociationConfig {
    /// The client's SAP: the wrapper's source port.
    pub client_sap: u16,
    /// How the client authenticates.
    pub mechanism: MechanismConfig,
    /// The security setup whose keys protect this association; needed for `high-gmac`.
    #[serde(default)]
    pub security_setup: Option<Obis>,
}

/// How a client authenticates.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MechanismConfig {
    /// No authentication: the public client. It reads the clock, the name and the invocation
    /// counters.
    Lowest,
    /// By a password, in plaintext.
    Low(Secret),
    /// By HLS 5 (GMAC), with ciphering.
    HighGmac,
}

/// A COSEM object.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "class", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ObjectConfig {
    /// Class 1.
    Data {
        /// Its name.
        logical_name: Obis,
        /// Attribute 2; may be written.
        value: Data,
    },
    /// Class 3.
    Register {
        /// Its name.
        logical_name: Obis,
        /// Attribute 2.
        value: Data,
        /// Power of ten in attribute 3.
        scaler: i8,
        /// Unit in attribute 3, for example 30 for Wh.
        unit: u8,
    },
    /// Class 8.
    Clock {
        /// Its name.
        logical_name: Obis,
        /// Attribute 2, a `date-time`. The clock stands still, and may be written.
        time: [u8; 12],
    },
    /// Class 70.
    DisconnectControl {
        /// Its name.
        logical_name: Obis,
        /// Attribute 2; methods 1 and 2 change it.
        connected: bool,
    },
}

/// The client SAP of the management client in [`MeterConfig::ordinary`].
pub const MANAGEMENT_CLIENT_SAP: u16 = 1;
/// The client SAP of the public client.
pub const PUBLIC_CLIENT_SAP: u16 = 16;

const WATT_HOUR: u8 = 30;

fn default_logical_device_name() -> String {
    "SIM0000000000001".to_owned()
}

const fn default_pdu_size() -> u16 {
    1024
}

const fn default_security_setup() -> Obis {
    Obis::SECURITY_SETUP
}

const fn default_invocation_counter() -> Obis {
    Obis::INVOCATION_COUNTER
}
