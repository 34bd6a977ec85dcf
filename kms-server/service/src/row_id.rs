//! The id of a sealed row, from its kind and octets in the store.

use kms_domain::{
    CampaignId, CounterDomainId, DeviceTypeId, GroupId, IslandName, PrincipalId, ProposalId, RootId, RowId,
    SystemTitle, WorkOrderId,
};

/// The id of a row of this kind; `None` where the octets are no id of the kind.
pub(crate) fn row_id(kind: u8, id: &[u8], island: &IslandName) -> Option<RowId> {
    let text = || std::str::from_utf8(id).ok();
    let number = || id.try_into().ok().map(u64::from_be_bytes);
    match kind {
        1 => SystemTitle::from_octets(id).ok().map(RowId::Meter),
        2 => number().map(|number| RowId::Group(GroupId(number))),
        3 => number().map(|number| RowId::DeviceType(DeviceTypeId(number))),
        4 => PrincipalId::parse(text()?).ok().map(RowId::Principal),
        5 => id.try_into().ok().map(|octets| RowId::CounterDomain(CounterDomainId(octets))),
        6 => text().filter(|name| *name == island.as_str()).map(|_| RowId::Island(island.clone())),
        7 => PrincipalId::parse(text()?).ok().map(RowId::QuotaUse),
        8 => CampaignId::from_octets(id).ok().map(RowId::Campaign),
        12 => ProposalId::from_octets(id).ok().map(RowId::Proposal),
        13 => PrincipalId::parse(text()?).ok().map(RowId::Invitation),
        14 => WorkOrderId::parse(text()?).ok().map(RowId::WorkOrder),
        9 => RootId::from_octets(id).ok().map(RowId::RootRotation),
        _ => None,
    }
}
