//! Deviations of real meters and real networks: settings of a meter, and faults at stated
//! exchanges.

use std::collections::BTreeSet;

use serde::Deserialize;

use crate::KeyId;

/// The behaviour of the meter where meters differ. The default is the most common behaviour.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Behaviour {
    /// `Action-Result` of a `key_transfer` whose wrapped key does not unwrap: 9 (seen most), 250,
    /// 3.
    pub wrong_kek_result: u8,
    /// What an array with a bad item does to the good ones before it.
    pub array: ArrayTransfer,
    /// What a new encryption key does to the counters.
    pub counter_on_new_key: CounterOnNewKey,
    /// The keys that return to the one before when the power fails.
    pub reverts_on_power_cycle: BTreeSet<KeyId>,
    /// The counter inside an HLS 5 answer.
    pub gmac_counter: GmacCounter,
    /// Length in bytes of the challenge StoC, 8 to 64.
    pub challenge_length: u8,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            wrong_kek_result: 9,
            array: ArrayTransfer::default(),
            counter_on_new_key: CounterOnNewKey::default(),
            reverts_on_power_cycle: BTreeSet::new(),
            gmac_counter: GmacCounter::default(),
            challenge_length: 16,
        }
    }
}

/// What `key_transfer` does with an array of which a later item is bad.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ArrayTransfer {
    /// Items before the bad one are applied, and the answer is an error all the same: seen in the
    /// field, and the reason to send one key at a time.
    #[default]
    ApplyUntilError,
    /// Nothing is applied.
    AllOrNothing,
}

/// What happens to the last accepted counters, and to the meter's own, with a new encryption key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CounterOnNewKey {
    /// The counters continue.
    #[default]
    KeepCounting,
    /// The counters start again: this is the next counter that the meter accepts, and that it uses.
    RestartAt(u32),
}

/// Which invocation counters are accepted inside an HLS 5 answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GmacCounter {
    /// Any above the last accepted one, the counter of the APDU around it included. Some clients
    /// use one counter for both, which repeats a nonce; the nonce log shows it.
    #[default]
    MayEqualApdu,
    /// Any above the last accepted one, except that of the APDU around it.
    MustDiffer,
}

/// A fault, and when it happens. It happens once.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScriptedFault {
    /// When.
    pub at: Trigger,
    /// What.
    pub fault: Fault,
}

/// Names one request among those that a client sends to a meter, over all its connections. Requests
/// that the network loses count too. Numbers start at 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trigger {
    /// The n-th request of any kind.
    Exchange(u64),
    /// The n-th request that carries a `key_transfer`, opened with the meter's current keys.
    KeyTransfer(u64),
    /// The n-th association request.
    AssociationRequest(u64),
}

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// The request never arrives; there is no answer.
    LoseRequest,
    /// The request is executed; the answer never arrives.
    LoseAnswer,
    /// The request arrives this many milliseconds late.
    DelayRequest(u32),
    /// The answer arrives this many milliseconds late.
    DelayAnswer(u32),
    /// The request is held back until this number of later requests (at least one) was executed.
    /// Then it arrives on the connection of the last of them. Its answer is lost.
    HoldRequest(u32),
    /// Like `hold-request`, and the late answer is sent too, after that of the later request.
    HoldRequestAndAnswer(u32),
    /// The request arrives twice; both answers are sent.
    DuplicateRequest,
    /// The answer arrives twice.
    DuplicateAnswer,
    /// This APDU, in hex, arrives instead of the answer.
    WrongAnswer(HexBytes),
    /// The answer before this one arrives again instead of the answer.
    RepeatPreviousAnswer,
    /// The lowest bit of the byte at this offset from the end of the answer is flipped: 0 is in the
    /// tag.
    CorruptAnswer(u16),
    /// The connection ends after the request was executed, without an answer.
    CloseConnection,
    /// The power fails before the request arrives: associations end, the request is lost.
    PowerCycleBefore,
    /// The power fails after the request was executed, before the answer leaves.
    PowerCycleBeforeAnswer,
    /// The power fails after the answer left.
    PowerCycleAfter,
    /// A `key_transfer` is applied, and answered with this `Action-Result`.
    AppliedButError(u8),
    /// A `key_transfer` is not applied, and answered with this `Action-Result`.
    RefusedWithoutApplying(u8),
    /// A `key_transfer` is not applied, and answered with success.
    SuccessWithoutApplying,
}

/// Bytes, in hex in the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HexBytes(pub Vec<u8>);

impl<'de> Deserialize<'de> for HexBytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        hex::decode(String::deserialize(deserializer)?).map(Self).map_err(serde::de::Error::custom)
    }
}
