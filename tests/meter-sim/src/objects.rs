//! The configured COSEM objects of a meter: all that GET, SET and ACTION reach but the security
//! objects.

use crate::Obis;
use crate::axdr::Data;
use crate::config::ObjectConfig;
use crate::xdlms::{AttributeDescriptor, DataAccessResult, MethodDescriptor};

/// The configured objects with their present values.
pub(crate) struct Objects(Vec<ObjectConfig>);

impl Objects {
    pub(crate) fn new(objects: Vec<ObjectConfig>) -> Self {
        Self(objects)
    }

    pub(crate) fn is_connected(&self, name: Obis) -> Option<bool> {
        self.0.iter().find_map(|object| match object {
            ObjectConfig::DisconnectControl { logical_name, connected } if *logical_name == name => Some(*connected),
            _ => None,
        })
    }

    /// GET on a configured object.
    pub(crate) fn get(&self, attribute: &AttributeDescriptor) -> Result<Data, DataAccessResult> {
        let object = self
            .0
            .iter()
            .find(|object| object.logical_name() == attribute.instance)
            .ok_or(DataAccessResult::OBJECT_UNDEFINED)?;
        object.check_class(attribute.class)?;
        match (object, attribute.attribute) {
            (_, 1) => Ok(name_data(attribute.instance)),
            (ObjectConfig::Data { value, .. } | ObjectConfig::Register { value, .. }, 2) => Ok(value.clone()),
            (ObjectConfig::Register { scaler, unit, .. }, 3) => {
                Ok(Data::Structure(vec![Data::Integer(*scaler), Data::Enum(*unit)]))
            }
            (ObjectConfig::Clock { time, .. }, 2) => Ok(Data::OctetString(time.to_vec())),
            (ObjectConfig::DisconnectControl { connected, .. }, 2) => Ok(Data::Boolean(*connected)),
            (ObjectConfig::DisconnectControl { connected, .. }, 3) => Ok(Data::Enum(u8::from(*connected))),
            (ObjectConfig::DisconnectControl { .. }, 4) => Ok(Data::Enum(1)),
            _ => Err(DataAccessResult::OBJECT_UNAVAILABLE),
        }
    }

    /// SET on a configured object.
    pub(crate) fn set(&mut self, attribute: &AttributeDescriptor, new: Data) -> DataAccessResult {
        let Some(object) = self.0.iter_mut().find(|object| object.logical_name() == attribute.instance) else {
            return DataAccessResult::OBJECT_UNDEFINED;
        };
        if let Err(error) = object.check_class(attribute.class) {
            return error;
        }
        match (object, attribute.attribute, new) {
            (ObjectConfig::Data { value, .. }, 2, new) => *value = new,
            (ObjectConfig::Clock { time, .. }, 2, Data::OctetString(new)) => match new.try_into() {
                Ok(new) => *time = new,
                Err(_) => return DataAccessResult::TYPE_UNMATCHED,
            },
            (ObjectConfig::Clock { time, .. }, 2, Data::DateTime(new)) => *time = new,
            (ObjectConfig::Clock { .. }, 2, _) => return DataAccessResult::TYPE_UNMATCHED,
            _ => return DataAccessResult::READ_WRITE_DENIED,
        }
        DataAccessResult::SUCCESS
    }

    /// ACTION on a configured object; the result is an `Action-Result`.
    pub(crate) fn act(&mut self, method: &MethodDescriptor) -> u8 {
        let Some(object) = self.0.iter_mut().find(|object| object.logical_name() == method.instance) else {
            return DataAccessResult::OBJECT_UNDEFINED.0;
        };
        if let Err(error) = object.check_class(method.class) {
            return error.0;
        }
        match (object, method.method) {
            (ObjectConfig::DisconnectControl { connected, .. }, 1) => *connected = false,
            (ObjectConfig::DisconnectControl { connected, .. }, 2) => *connected = true,
            _ => return DataAccessResult::READ_WRITE_DENIED.0,
        }
        DataAccessResult::SUCCESS.0
    }
}

impl ObjectConfig {
    fn logical_name(&self) -> Obis {
        match self {
            Self::Data { logical_name, .. }
            | Self::Register { logical_name, .. }
            | Self::Clock { logical_name, .. }
            | Self::DisconnectControl { logical_name, .. } => *logical_name,
        }
    }

    fn check_class(&self, class: u16) -> Result<(), DataAccessResult> {
        let own = match self {
            Self::Data { .. } => CLASS_DATA,
            Self::Register { .. } => CLASS_REGISTER,
            Self::Clock { .. } => CLASS_CLOCK,
            Self::DisconnectControl { .. } => CLASS_DISCONNECT_CONTROL,
        };
        check(own, class)
    }
}

/// Interface class `Data`.
pub const CLASS_DATA: u16 = 1;
/// Interface class `Register`.
pub const CLASS_REGISTER: u16 = 3;
/// Interface class `Clock`.
pub const CLASS_CLOCK: u16 = 8;
/// Interface class `Association LN`.
pub const CLASS_ASSOCIATION: u16 = 15;
/// Interface class `Security setup`.
pub const CLASS_SECURITY_SETUP: u16 = 64;
/// Interface class `Disconnect control`.
pub const CLASS_DISCONNECT_CONTROL: u16 = 70;

/// The value of attribute 1 of every object.
pub(crate) fn name_data(name: Obis) -> Data {
    Data::OctetString(name.0.to_vec())
}

/// Refuses a request that names another class than the object's own.
pub(crate) fn check(own: u16, asked: u16) -> Result<(), DataAccessResult> {
    if own == asked { Ok(()) } else { Err(DataAccessResult::OBJECT_CLASS_INCONSISTENT) }
}
