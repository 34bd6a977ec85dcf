//! Rows with keys: what is the same for meters, groups and device types.

use std::sync::Arc;

use kms_domain::{DeviceType, Group, Meter, Owner, Slots};

/// A row with keys, of any owner.
#[derive(Clone, Debug)]
pub enum OwnerRow {
    /// A meter.
    Meter(Arc<Meter>),
    /// A group of meters.
    Group(Arc<Group>),
    /// A device type.
    DeviceType(Arc<DeviceType>),
}

impl OwnerRow {
    /// The owner.
    pub fn owner(&self) -> Owner {
        match self {
            Self::Meter(meter) => meter.owner(),
            Self::Group(group) => group.owner(),
            Self::DeviceType(device_type) => device_type.owner(),
        }
    }

    /// Its keys.
    pub fn slots(&self) -> &Slots {
        match self {
            Self::Meter(meter) => &meter.slots,
            Self::Group(group) => &group.slots,
            Self::DeviceType(device_type) => &device_type.slots,
        }
    }

    /// Its keys, to be changed. [`crate::View::put_owner`] writes them.
    pub fn slots_mut(&mut self) -> &mut Slots {
        match self {
            Self::Meter(meter) => &mut Arc::make_mut(meter).slots,
            Self::Group(group) => &mut Arc::make_mut(group).slots,
            Self::DeviceType(device_type) => &mut Arc::make_mut(device_type).slots,
        }
    }
}
