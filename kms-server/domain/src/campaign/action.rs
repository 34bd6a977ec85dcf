//! What a campaign does to a meter, step by step.

use std::fmt;

use crate::{KeyType, KeyVersion, Meter, ParseError, SecuritySetupId};

/// What is done to each meter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CampaignAction {
    /// A new version of one key. A KEK is a compound transfer with the GUEK that proves it.
    Rotate(KeyType),
    /// An exchange that shows which keys the meter holds. No key leaves.
    Probe,
    /// Take-over: the KEK (compound), then the GAK, then the other imported keys of DLMS.
    TakeOver,
}

impl CampaignAction {
    /// The name in output: `rotate`, `probe`, `take-over`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rotate(_) => "rotate",
            Self::Probe => "probe",
            Self::TakeOver => "take-over",
        }
    }

    /// The rotation of one type of key.
    ///
    /// # Errors
    /// `key_transfer` of class 64 cannot carry a key of this type ([`KeyType::is_transferable`]).
    /// Of the types other than KEK, GUEK, GBEK and GAK, the device profile says which ones a meter
    /// accepts.
    pub fn rotate(key_type: KeyType) -> Result<Self, ParseError> {
        if key_type.is_transferable() {
            Ok(Self::Rotate(key_type))
        } else {
            Err(ParseError::new(
                "key type",
                format!("a {key_type} cannot be rotated over the air: `key_transfer` carries wrapped AES keys only"),
            ))
        }
    }

    /// The first step for a meter; `None` if the meter has no such key.
    pub fn first_step(self, meter: &Meter, setup: Option<SecuritySetupId>) -> Option<TaskStep> {
        match self {
            Self::Rotate(key_type) => {
                let slot = meter
                    .slots
                    .iter()
                    .find(|slot| slot.key_type() == key_type && setup.is_none_or(|setup| slot.setup() == setup));
                let of_group = key_type == KeyType::GBEK && !meter.class.groups.is_empty();
                match slot {
                    Some(slot) => Some(TaskStep {
                        setup: slot.setup(),
                        work: TaskWork::Rotate(key_type),
                        from: active_number(slot),
                    }),
                    None if of_group => Some(TaskStep {
                        setup: setup.or_else(|| first_setup(meter))?,
                        work: TaskWork::Rotate(key_type),
                        from: 0,
                    }),
                    None => None,
                }
            }
            Self::Probe => {
                Some(TaskStep { setup: setup.or_else(|| first_setup(meter))?, work: TaskWork::Probe, from: 0 })
            }
            Self::TakeOver => take_over_steps(meter, setup).next(),
        }
    }

    /// The step after a step that succeeded; `None` if the meter is done.
    pub fn next_step(self, meter: &Meter, setup: Option<SecuritySetupId>, done: TaskStep) -> Option<TaskStep> {
        match self {
            Self::Rotate(_) | Self::Probe => None,
            Self::TakeOver => {
                // Only later keys in the order: a key that could not be replaced is not tried
                // again.
                let place = |step: &TaskStep| {
                    (step.setup, TAKE_OVER_ORDER.iter().position(|key_type| step.work == TaskWork::Rotate(*key_type)))
                };
                take_over_steps(meter, setup).find(|step| place(step) > place(&done))
            }
        }
    }

    /// Whether a campaign of this action, limited to `setup` if it names one, contains this step.
    pub(super) fn plans(self, setup: Option<SecuritySetupId>, step: &TaskStep) -> bool {
        let work = match (self, step.work) {
            (Self::Rotate(approved), TaskWork::Rotate(key_type)) => approved == key_type,
            (Self::TakeOver, TaskWork::Rotate(key_type)) => TAKE_OVER_ORDER.contains(&key_type),
            (Self::Probe, TaskWork::Probe) => true,
            _ => false,
        };
        work && setup.is_none_or(|setup| setup == step.setup)
    }
}

impl fmt::Display for CampaignAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rotate(key_type) => write!(f, "rotate {key_type}"),
            _ => f.write_str(self.name()),
        }
    }
}

/// One step of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TaskStep {
    /// The security setup.
    pub setup: SecuritySetupId,
    /// What is done.
    pub work: TaskWork,
    /// The number of the version that was active before; 0 for none.
    pub from: u32,
}

impl TaskStep {
    /// Whether the step concerns keys of the meter itself. If not: a key of its group.
    pub fn is_own(&self, meter: &Meter) -> bool {
        match self.work {
            TaskWork::Probe => true,
            TaskWork::Rotate(key_type) => meter.slots.get(self.setup, key_type).is_some(),
        }
    }
}

/// What a head-end does in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TaskWork {
    /// An exchange that shows which keys the meter holds.
    Probe,
    /// A transfer of a new version. A KEK goes together with a GUEK.
    Rotate(KeyType),
}

impl std::fmt::Display for TaskWork {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Probe => f.write_str("probe"),
            Self::Rotate(key_type) => write!(f, "rotate {key_type}"),
        }
    }
}

fn first_setup(meter: &Meter) -> Option<SecuritySetupId> {
    meter.slots.iter().next().map(crate::Slot::setup)
}

fn active_number(slot: &crate::Slot) -> u32 {
    slot.active().map_or(0, |version| version.number().number())
}

/// The imported keys of a meter that `key_transfer` can replace, in the order of a take-over.
fn take_over_steps(meter: &Meter, setup: Option<SecuritySetupId>) -> impl Iterator<Item = TaskStep> {
    let mut setups: Vec<SecuritySetupId> =
        meter.slots.iter().map(crate::Slot::setup).filter(|one| setup.is_none_or(|setup| *one == setup)).collect();
    setups.sort_unstable();
    setups.dedup();
    setups.into_iter().flat_map(|setup| TAKE_OVER_ORDER.into_iter().map(move |key_type| (setup, key_type))).filter_map(
        |(setup, key_type)| {
            let slot = meter.slots.get(setup, key_type)?;
            let imported =
                slot.active().or_else(|| slot.held()).map(KeyVersion::origin) == Some(crate::KeyOrigin::Imported);
            imported.then(|| TaskStep { setup, work: TaskWork::Rotate(key_type), from: active_number(slot) })
        },
    )
}

/// A new KEK brings a new GUEK with it; the other imported keys follow.
const TAKE_OVER_ORDER: [KeyType; 4] = [KeyType::KEK, KeyType::GAK, KeyType::GUEK, KeyType::GBEK];
