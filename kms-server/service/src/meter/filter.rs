//! Which meters a call selects.

use kms_domain::{DeviceProfileName, FlagId, Meter, MeterStatus, PrincipalId, SystemTitle};
use kms_store::{Assigned, MeterFilter};

/// Selects meters by what is known of them. An empty filter selects all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Of this manufacturer.
    pub manufacturer: Option<FlagId>,
    /// With this device profile.
    pub device_profile: Option<DeviceProfileName>,
    /// In this status.
    pub status: Option<MeterStatus>,
    /// Assigned to this head-end; `None`: to any or none; `Some(None)`: to none.
    pub head_end: Option<Option<PrincipalId>>,
    /// Of this batch.
    pub batch: Option<String>,
}

/// The meters of a request: named, or selected by a filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// These.
    Meters(Vec<SystemTitle>),
    /// All that match.
    Filter(Filter),
}

impl Filter {
    /// The same filter for the meters of one head-end only; `None` if it selects those of another.
    pub(super) fn only_of(self, head_end: &PrincipalId) -> Option<Self> {
        match &self.head_end {
            None => Some(Self { head_end: Some(Some(head_end.clone())), ..self }),
            Some(Some(asked)) if asked == head_end => Some(self),
            Some(_) => None,
        }
    }

    /// The search columns that find the meters.
    pub(super) fn columns(&self) -> MeterFilter {
        MeterFilter {
            vendor: self.manufacturer.map(|manufacturer| manufacturer.to_string()),
            profile: self.device_profile.as_ref().map(ToString::to_string),
            status: self.status.and_then(|status| u8::try_from(status.number()).ok()),
            head_end: match &self.head_end {
                None => Assigned::Any,
                Some(None) => Assigned::ToNone,
                Some(Some(head_end)) => Assigned::To(head_end.to_string()),
            },
            batch: self.batch.clone(),
            group: None,
        }
    }

    /// I5: whether a meter matches by its sealed row. The search columns only find rows.
    pub(super) fn matches(&self, meter: &Meter) -> bool {
        self.manufacturer.is_none_or(|manufacturer| meter.class.vendor == manufacturer)
            && self.device_profile.as_ref().is_none_or(|profile| meter.class.profile == *profile)
            && self.status.is_none_or(|status| meter.class.status == status)
            && self.head_end.as_ref().is_none_or(|head_end| meter.class.head_end == *head_end)
            && self.batch.as_ref().is_none_or(|batch| meter.batch == *batch)
    }
}
