//! `kms device-type`.

use kms_proto::v1 as proto;
use serde_json::json;

use super::{meter::setups_text, new_key::created, octets, request_id};
use crate::{
    arguments::device_type::{DeviceTypeCommand, DeviceTypeKeyCommand},
    context::Context,
    failure::Failure,
    json,
    output::{Rows, facts},
    progress::waiting,
};

pub(crate) async fn run(command: DeviceTypeCommand, context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.device_types();
    match command {
        DeviceTypeCommand::List => {
            let all = waiting("reading device types", client.list_device_types(proto::ListDeviceTypesRequest {}))
                .await?
                .into_inner()
                .device_types;
            context.output.show(
                || json!({"device_types": all.iter().map(|one| json::message("DeviceType", one)).collect::<Vec<_>>()}),
                || {
                    let mut rows =
                        Rows::new(&["device type", "number", "manufacturer", "device profile"]).numbers(&[1]);
                    for one in &all {
                        rows.row([
                            one.name.clone(),
                            one.number.to_string(),
                            one.manufacturer.clone(),
                            one.device_profile.clone(),
                        ]);
                    }
                    rows.text_or("no device types")
                },
            );
        }
        DeviceTypeCommand::Show { device_type } => {
            let request = proto::ShowDeviceTypeRequest { device_type };
            let device_type = waiting("reading the device type", client.show_device_type(request)).await?.into_inner();
            context.output.show(
                || json::message("DeviceType", &device_type),
                || {
                    let heading = facts(device_type_facts(&device_type));
                    format!("{heading}{}", setups_text(&device_type.security_setups))
                },
            );
        }
        DeviceTypeCommand::Add { device_type, manufacturer, device_profile } => {
            let request = proto::AddDeviceTypeRequest {
                request_id: request_id(),
                name: device_type,
                manufacturer: manufacturer.to_string(),
                device_profile: device_profile.to_string(),
            };
            let added = waiting("adding the device type", client.add_device_type(request)).await?.into_inner();
            context.output.show(|| json::message("DeviceType", &added), || facts(device_type_facts(&added)));
        }
        DeviceTypeCommand::Key(DeviceTypeKeyCommand::Create { device_type, key }) => {
            let request = proto::CreateDeviceTypeKeyRequest {
                request_id: request_id(),
                device_type: device_type.clone(),
                security_setup: octets(key.setup.obis()),
                key_type: key.key_type.clone(),
                held_by_meters: key.held_by_meters,
            };
            created(
                &device_type,
                &key,
                waiting("making the key", client.create_device_type_key(request)).await?.into_inner(),
                context,
            );
        }
    }
    Ok(())
}

fn device_type_facts(device_type: &proto::DeviceType) -> [(&'static str, String); 4] {
    [
        ("device type", device_type.name.clone()),
        ("number", device_type.number.to_string()),
        ("manufacturer", device_type.manufacturer.clone()),
        ("device profile", device_type.device_profile.clone()),
    ]
}
