//! Transfers and shared keys in rows.

use bytes::Bytes;

use super::{
    RowError,
    message::{SharedKeyRow, TransferKeyRow, TransferRow},
    octets,
    slot::Principals,
};
use crate::{
    Answer, CampaignId, CampaignTask, DeviceTypeId, ExchangePurpose, GroupId, KeyPair, KeyType, KeyVersionNumber,
    Owner, SecuritySetupId, SharedKey, Stage, SystemTitle, Transfer, TransferForm, TransferId, TransferKey, UnixMillis,
};

pub(super) fn transfer_from_row(
    title: SystemTitle,
    row: TransferRow,
    base: i64,
    principals: &Principals,
) -> Result<Transfer, RowError> {
    let pair = match (row.encryption, row.authentication) {
        (0, 0) => None,
        (encryption, authentication) => Some(KeyPair {
            encryption: KeyVersionNumber::new(encryption)?,
            authentication: KeyVersionNumber::new(authentication)?,
        }),
    };
    let with_pair = || pair.ok_or_else(|| RowError::new("an exchange without keys"));
    let purpose = || if row.stage % 2 == 1 { ExchangePurpose::Open } else { ExchangePurpose::Prove };
    let stage = match row.stage {
        1 | 2 => {
            Stage::Associate { purpose: purpose(), pair: with_pair()?, challenge: octets("challenge", &row.challenge)? }
        }
        3 | 4 => Stage::Authenticate {
            purpose: purpose(),
            pair: with_pair()?,
            challenge: octets("challenge", &row.challenge)?,
            meter_challenge: row.meter_challenge.to_vec(),
        },
        5 => Stage::Deliver { pair },
        other => return Err(RowError::new(format!("transfer stage {other} is unknown"))),
    };
    let keys = row
        .keys
        .into_iter()
        .map(|key| {
            Ok(TransferKey {
                owner: owner_from_numbers(key.group, key.device_type).unwrap_or(Owner::Meter(title)),
                key_type: key_type(key.key_type)?,
                version: KeyVersionNumber::new(key.version)?,
                kek: KeyVersionNumber::new(key.kek)?,
            })
        })
        .collect::<Result<Vec<_>, RowError>>()?;
    let delivered = usize::try_from(row.delivered).ok().filter(|delivered| *delivered <= keys.len());
    Ok(Transfer {
        id: TransferId::from_octets(&row.id)?,
        setup: setup(row.setup)?,
        head_end: principals.optional(row.head_end)?.ok_or_else(|| RowError::new("a transfer without a head-end"))?,
        client_title: SystemTitle::from_octets(&row.client_title.to_be_bytes())?,
        campaign: match row.campaign.as_ref() {
            [] => None,
            id => Some(CampaignTask { campaign: CampaignId::from_octets(id)?, fence: row.fence }),
        },
        form: match row.form {
            1 => TransferForm::WrappedKey,
            2 => TransferForm::Frames,
            other => return Err(RowError::new(format!("transfer form {other} is unknown"))),
        },
        delivered: delivered.ok_or_else(|| RowError::new("a transfer has delivered more keys than it has"))?,
        keys,
        stage,
        step: row.step,
        tried: row.tried,
        counters: row.counters,
        pinned: match row.pinned.as_ref() {
            [] => None,
            pinned => Some(octets("pinned", pinned)?),
        },
        retries: row.counter_retries,
        unfit: row.unfit,
        answer: match row.answer {
            0 => Answer::Silence,
            1 => Answer::Accepted,
            2 => Answer::Exception,
            result => Answer::Refused(
                u8::try_from(result.wrapping_sub(REFUSED)).map_err(|_| RowError::new("an unknown answer"))?,
            ),
        },
        not_after: UnixMillis(base.wrapping_add(row.not_after)),
    })
}

pub(super) fn transfer_to_row(transfer: &Transfer, base: UnixMillis, principals: &mut Principals) -> TransferRow {
    let [b, e] = transfer.setup.octets();
    let pair = transfer.pair();
    let number = |purpose: ExchangePurpose, first| match purpose {
        ExchangePurpose::Open => first,
        ExchangePurpose::Prove => first + 1,
    };
    let (stage, challenge, meter_challenge) = match &transfer.stage {
        Stage::Associate { purpose, challenge, .. } => {
            (number(*purpose, 1), Bytes::copy_from_slice(challenge), Bytes::new())
        }
        Stage::Authenticate { purpose, challenge, meter_challenge, .. } => {
            (number(*purpose, 3), Bytes::copy_from_slice(challenge), Bytes::copy_from_slice(meter_challenge))
        }
        Stage::Deliver { .. } => (5, Bytes::new(), Bytes::new()),
    };
    TransferRow {
        id: Bytes::copy_from_slice(&transfer.id.octets()),
        setup: u32::from_be_bytes([0, 0, b, e]),
        head_end: principals.reference(&transfer.head_end),
        client_title: u64::from_be_bytes(transfer.client_title.octets()),
        campaign: transfer.campaign.map(|task| Bytes::copy_from_slice(&task.campaign.octets())).unwrap_or_default(),
        fence: transfer.campaign.map_or(0, |task| task.fence),
        form: match transfer.form {
            TransferForm::WrappedKey => 1,
            TransferForm::Frames => 2,
        },
        keys: transfer
            .keys
            .iter()
            .map(|key| {
                let (group, device_type) = owner_numbers(key.owner);
                TransferKeyRow {
                    group,
                    device_type,
                    key_type: key.key_type.number().into(),
                    version: key.version.number(),
                    kek: key.kek.number(),
                }
            })
            .collect(),
        delivered: u32::try_from(transfer.delivered).unwrap_or(u32::MAX),
        stage,
        encryption: pair.map_or(0, |pair| pair.encryption.number()),
        authentication: pair.map_or(0, |pair| pair.authentication.number()),
        challenge,
        meter_challenge,
        tried: transfer.tried,
        step: transfer.step,
        counters: transfer.counters.clone(),
        pinned: transfer.pinned.map(|pinned| Bytes::copy_from_slice(&pinned)).unwrap_or_default(),
        not_after: transfer.not_after.0.wrapping_sub(base.0),
        answer: match transfer.answer {
            Answer::Silence => 0,
            Answer::Accepted => 1,
            Answer::Exception => 2,
            Answer::Refused(result) => REFUSED + u32::from(result),
        },
        counter_retries: transfer.retries,
        unfit: transfer.unfit,
    }
}

pub(super) fn shared_from_rows(rows: Vec<SharedKeyRow>) -> Result<Vec<SharedKey>, RowError> {
    let keys = rows
        .into_iter()
        .map(|row| {
            Ok(SharedKey {
                owner: owner_from_numbers(row.group, row.device_type)
                    .ok_or_else(|| RowError::new("a shared key without an owner"))?,
                setup: setup(row.setup)?,
                key_type: key_type(row.key_type)?,
                version: KeyVersionNumber::new(row.version)?,
                kek: KeyVersionNumber::new(row.kek)?,
                acknowledged: row.acknowledged,
            })
        })
        .collect::<Result<Vec<_>, RowError>>()?;
    if !keys.is_sorted() {
        return Err(RowError::new("the shared keys are not in order"));
    }
    Ok(keys)
}

pub(super) fn shared_to_rows(keys: &[SharedKey]) -> Vec<SharedKeyRow> {
    keys.iter()
        .map(|key| {
            let (group, device_type) = owner_numbers(key.owner);
            let [b, e] = key.setup.octets();
            SharedKeyRow {
                group,
                device_type,
                setup: u32::from_be_bytes([0, 0, b, e]),
                key_type: key.key_type.number().into(),
                version: key.version.number(),
                acknowledged: key.acknowledged,
                kek: key.kek.number(),
            }
        })
        .collect()
}

/// The numbers of the group and the device type; both 0 for the meter itself.
const fn owner_numbers(owner: Owner) -> (u64, u64) {
    match owner {
        Owner::Meter(_) => (0, 0),
        Owner::Group(group) => (group.0, 0),
        Owner::DeviceType(device_type) => (0, device_type.0),
    }
}

const fn owner_from_numbers(group: u64, device_type: u64) -> Option<Owner> {
    match (group, device_type) {
        (0, 0) => None,
        (0, number) => Some(Owner::DeviceType(DeviceTypeId(number))),
        (number, _) => Some(Owner::Group(GroupId(number))),
    }
}

pub(super) fn setup(number: u32) -> Result<SecuritySetupId, RowError> {
    match number.to_be_bytes() {
        [0, 0, b, e] => Ok(SecuritySetupId::from_octets([b, e])),
        _ => Err(RowError::new("a security setup has more than two octets")),
    }
}

pub(super) fn key_type(number: u32) -> Result<KeyType, RowError> {
    Ok(KeyType::from_number(u8::try_from(number).unwrap_or_default())?)
}

/// What a refusal's action-result is added to.
const REFUSED: u32 = 16;
