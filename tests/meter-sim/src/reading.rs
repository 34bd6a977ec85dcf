//! GET: the attributes that a client may read, of the security objects and of the others.

use crate::axdr::Data;
use crate::config::MechanismConfig;
use crate::key_transfer::{POLICY_AUTHENTICATED, POLICY_AUTHENTICATED_ENCRYPTED};
use crate::meter::MeterState;
use crate::objects::{CLASS_ASSOCIATION, CLASS_CLOCK, CLASS_DATA, CLASS_SECURITY_SETUP, check, name_data};
use crate::xdlms::{AttributeDescriptor, DataAccessResult};
use crate::{Obis, SystemTitle};

/// The client that reads.
pub(crate) struct ReaderContext<'a> {
    pub(crate) mechanism: &'a MechanismConfig,
    pub(crate) setup: Option<Obis>,
    pub(crate) client_title: Option<SystemTitle>,
}

impl MeterState {
    /// GET.
    pub(crate) fn get(
        &self,
        attribute: &AttributeDescriptor,
        reader: &ReaderContext<'_>,
    ) -> Result<Data, DataAccessResult> {
        let name = attribute.instance;
        if let Some(setup) = self.setups.iter().find(|setup| setup.invocation_counter_object == name) {
            check(CLASS_DATA, attribute.class)?;
            return match attribute.attribute {
                1 => Ok(name_data(name)),
                2 => Ok(Data::DoubleLongUnsigned(setup.guek.current().received.highest().unwrap_or(0))),
                _ => Err(DataAccessResult::OBJECT_UNAVAILABLE),
            };
        }
        if name == Obis::LOGICAL_DEVICE_NAME {
            check(CLASS_DATA, attribute.class)?;
            return match attribute.attribute {
                1 => Ok(name_data(name)),
                2 => Ok(Data::OctetString(self.config.logical_device_name.clone().into_bytes())),
                _ => Err(DataAccessResult::OBJECT_UNAVAILABLE),
            };
        }
        if name == Obis::CURRENT_ASSOCIATION {
            check(CLASS_ASSOCIATION, attribute.class)?;
            return match (attribute.attribute, reader.setup) {
                (1, _) => Ok(name_data(name)),
                (9, Some(setup)) => Ok(name_data(setup)),
                _ => Err(DataAccessResult::OBJECT_UNAVAILABLE),
            };
        }
        let is_public = matches!(reader.mechanism, MechanismConfig::Lowest);
        if let Some(setup) = self.setup(name) {
            check(CLASS_SECURITY_SETUP, attribute.class)?;
            if is_public {
                return Err(DataAccessResult::READ_WRITE_DENIED);
            }
            return match attribute.attribute {
                1 => Ok(name_data(name)),
                2 => Ok(Data::Enum(if setup.accept_authenticated_only {
                    POLICY_AUTHENTICATED
                } else {
                    POLICY_AUTHENTICATED_ENCRYPTED
                })),
                3 => Ok(Data::Enum(self.suite().id())),
                4 => {
                    Ok(Data::OctetString(reader.client_title.map_or_else(Vec::new, |title| title.as_bytes().to_vec())))
                }
                5 => Ok(Data::OctetString(self.config.system_title.as_bytes().to_vec())),
                _ => Err(DataAccessResult::OBJECT_UNAVAILABLE),
            };
        }
        if is_public && attribute.class != CLASS_CLOCK {
            return Err(DataAccessResult::READ_WRITE_DENIED);
        }
        self.objects.get(attribute)
    }
}
