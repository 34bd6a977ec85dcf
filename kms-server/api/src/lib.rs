//! gRPC: the listener, and the conversion of protobuf messages to domain types and back. This crate
//! makes no decisions.

mod audit;
mod campaigns;
mod doorway;
pub mod enrolment_door;
mod enrolment_places;
pub mod enrolments;
mod exposures;
mod frames;
mod grants;
mod handhelds;
mod hsm;
pub mod intake;
pub mod listener;
mod messages;
mod meters;
mod methods;
mod owners;
mod parse;
mod peer;
mod principals;
mod proposals;
pub mod refusals;
mod roots;
mod shipments;
pub mod telemetry;
pub mod tls;
mod transfers;
mod usage;
mod work_orders;

use std::sync::Arc;

use kms_proto::v1::audit_service_server::AuditServiceServer;
use kms_proto::v1::campaign_service_server::CampaignServiceServer;
use kms_proto::v1::device_type_service_server::DeviceTypeServiceServer;
use kms_proto::v1::exposure_service_server::ExposureServiceServer;
use kms_proto::v1::frame_service_server::FrameServiceServer;
use kms_proto::v1::grant_service_server::GrantServiceServer;
use kms_proto::v1::group_service_server::GroupServiceServer;
use kms_proto::v1::handheld_service_server::HandheldServiceServer;
use kms_proto::v1::hsm_service_server::HsmServiceServer;
use kms_proto::v1::meter_service_server::MeterServiceServer;
use kms_proto::v1::principal_service_server::PrincipalServiceServer;
use kms_proto::v1::proposal_service_server::ProposalServiceServer;
use kms_proto::v1::root_service_server::RootServiceServer;
use kms_proto::v1::shipment_service_server::ShipmentServiceServer;
use kms_proto::v1::task_service_server::TaskServiceServer;
use kms_proto::v1::transfer_service_server::TransferServiceServer;
use kms_proto::v1::work_order_service_server::WorkOrderServiceServer;
use tonic::service::Routes;

use kms_base::bounds::{Bound, Limits};
use kms_service::certificate::CertificateAuthority;
use kms_service::handheld::HandheldService;
use kms_service::island::IslandContext;
use kms_service::principal::Principals;

/// All services of an island.
pub fn routes(island: Arc<IslandContext>, authority: CertificateAuthority, limits: &Limits) -> Routes {
    // `intake` compares each message with the bound of its method. This bound is the second line.
    let most = limits.number(Bound::LargeMessageOctets);
    let handhelds = HandheldService::new(Arc::clone(&island), &authority);
    let principals = Arc::new(Principals::new(Arc::clone(&island), authority, limits.principal_days()));
    let owners = owners::OwnerApi::new(Arc::clone(&island));
    let campaigns = campaigns::CampaignApi::new(Arc::clone(&island));
    Routes::new(PrincipalServiceServer::new(principals::PrincipalApi::new(principals)).max_decoding_message_size(most))
        .add_service(
            GrantServiceServer::new(grants::GrantApi::new(Arc::clone(&island))).max_decoding_message_size(most),
        )
        .add_service(
            FrameServiceServer::new(frames::FrameApi::new(Arc::clone(&island))).max_decoding_message_size(most),
        )
        .add_service(
            TransferServiceServer::new(transfers::TransferApi::new(Arc::clone(&island)))
                .max_decoding_message_size(most),
        )
        .add_service(
            ShipmentServiceServer::new(shipments::ShipmentApi::new(Arc::clone(&island)))
                .max_decoding_message_size(most),
        )
        .add_service(
            MeterServiceServer::new(meters::MeterApi::new(Arc::clone(&island))).max_decoding_message_size(most),
        )
        .add_service(GroupServiceServer::new(owners.clone()).max_decoding_message_size(most))
        .add_service(DeviceTypeServiceServer::new(owners).max_decoding_message_size(most))
        .add_service(CampaignServiceServer::new(campaigns.clone()).max_decoding_message_size(most))
        .add_service(TaskServiceServer::new(campaigns).max_decoding_message_size(most))
        .add_service(
            ProposalServiceServer::new(proposals::ProposalApi::new(Arc::clone(&island)))
                .max_decoding_message_size(most),
        )
        .add_service(
            WorkOrderServiceServer::new(work_orders::WorkOrderApi::new(Arc::clone(&island)))
                .max_decoding_message_size(most),
        )
        .add_service(RootServiceServer::new(roots::RootApi::new(Arc::clone(&island))).max_decoding_message_size(most))
        .add_service(
            ExposureServiceServer::new(exposures::ExposureApi::new(Arc::clone(&island)))
                .max_decoding_message_size(most),
        )
        .add_service(HandheldServiceServer::new(handhelds::HandheldApi::new(handhelds)).max_decoding_message_size(most))
        .add_service(AuditServiceServer::new(audit::AuditApi::new(Arc::clone(&island))).max_decoding_message_size(most))
        .add_service(HsmServiceServer::new(hsm::HsmApi::new(island)).max_decoding_message_size(most))
        .prepare()
}
