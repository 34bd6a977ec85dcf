//! The methods of the contract, for decisions before the message of a call is read.

use std::collections::HashMap;
use std::sync::LazyLock;

use prost::Message as _;

use kms_base::bounds::Bound;

/// A method of the contract, of health or of reflection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Method {
    /// The bound of its messages.
    pub(crate) message: Bound,
    /// Whether the client sends a stream of messages.
    pub(crate) streaming: bool,
    /// Whether the answer is a stream of messages.
    pub(crate) answers_stream: bool,
}

/// The method of a path; none if this server does not have it.
pub(crate) fn of(path: &str) -> Option<Method> {
    METHODS.get(path).copied()
}

static METHODS: LazyLock<HashMap<String, Method>> = LazyLock::new(|| {
    let mut methods = HashMap::new();
    for descriptors in [
        kms_proto::FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
    ] {
        let files = prost_types::FileDescriptorSet::decode(descriptors).unwrap_or_default();
        for file in &files.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    let message = bound_of(service.name(), method.name());
                    methods.insert(
                        path,
                        Method {
                            message,
                            streaming: method.client_streaming(),
                            answers_stream: method.server_streaming(),
                        },
                    );
                }
            }
        }
    }
    methods
});

/// The bound of the messages of a method: enough for the largest message that its service accepts.
fn bound_of(service: &str, method: &str) -> Bound {
    match (service, method) {
        ("FrameService", _)
        | ("TransferService", "BeginTransfers" | "ContinueTransfers")
        | ("MeterService", "EnrolMeters" | "AdoptCounters")
        | ("CampaignService", "CreateCampaign")
        | ("ShipmentService", "UploadShipment")
        | ("WorkOrderService", "CreateWorkOrders") => Bound::LargeMessageOctets,
        ("GrantService", "OpenSessions")
        | ("TransferService", "WithdrawTransfers")
        | ("MeterService", "AssignMeters" | "RetireMeters")
        | ("GroupService", "ChangeGroupMembers")
        | ("TaskService", "HeartbeatTasks" | "ReleaseTasks")
        | ("WorkOrderService", "ChangeWorkOrder") => Bound::BatchMessageOctets,
        ("PrincipalService" | "EnrolmentService", _) => Bound::CertificateMessageOctets,
        _ => Bound::MessageOctets,
    }
}

#[cfg(test)]
mod tests {
    use kms_proto::v1;

    use super::*;
    use kms_base::bounds::Limits;

    #[test]
    fn every_method_has_a_bound_and_only_uploads_and_reflection_are_streams() {
        let streams: Vec<&String> =
            METHODS.iter().filter(|(_, method)| method.streaming).map(|(path, _)| path).collect();
        assert_eq!(streams.len(), 2, "{streams:?}");
        assert!(of("/meterkms.v1.ShipmentService/UploadShipment").unwrap().streaming);
        assert!(of("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo").unwrap().streaming);
        assert_eq!(
            of("/grpc.health.v1.Health/Check").unwrap(),
            Method { message: Bound::MessageOctets, streaming: false, answers_stream: false }
        );
        assert!(of("/meterkms.v1.GrantService/OpenSessions").unwrap().answers_stream);
        assert_eq!(of("/meterkms.v1.GrantService/NoSuchMethod"), None);
        assert!(METHODS.len() > 60);
    }

    /// Each pair names a method and the largest message that its service takes.
    #[test]
    fn the_largest_messages_fit() {
        let title = || bytes::Bytes::from_static(&[1; 8]);
        let id = || bytes::Bytes::from_static(&[2; 16]);
        let long = |octets: usize| "x".repeat(octets);
        let terms = v1::SessionTerms {
            key_types: vec![long(32); 64],
            client_title: title(),
            counters: u32::MAX,
            ..v1::SessionTerms::default()
        };
        let lease = v1::TaskLease { campaign_id: id(), meter: title(), fence: u64::MAX };
        let frame = v1::PlainFrame {
            meter: title(),
            apdu: vec![0; 1_200].into(),
            client_title: title(),
            ..v1::PlainFrame::default()
        };
        let piece = v1::UploadShipmentRequest { octets: vec![0; 1 << 20].into(), offset: u64::MAX, start: None };
        let (meters, reason) = (vec![title(); 10_000], long(256));
        let open = v1::OpenSessionRequest { request_id: id(), meter: title(), terms: Some(terms.clone()) };
        let open_many =
            v1::OpenSessionsRequest { request_id: id(), meters: meters.clone(), terms: Some(terms), first_chunk: 19 };
        let assign = v1::AssignMetersRequest {
            request_id: id(),
            meters: meters.clone(),
            head_end: long(256),
            ..Default::default()
        };
        let retire = v1::RetireMetersRequest { request_id: id(), meters, reason };
        let content = |meters| v1::WorkOrderContent {
            technician: long(64),
            meters: vec![title(); meters],
            tasks: vec![long(16); 6],
            from_ms: i64::MAX,
            until_ms: i64::MAX,
            place: long(256),
        };
        let mut orders = vec![v1::NewWorkOrder { work_order_id: long(64), content: Some(content(1)) }; 499];
        orders.push(v1::NewWorkOrder { work_order_id: long(64), content: Some(content(9_501)) });
        let change = v1::ChangeWorkOrderRequest {
            request_id: id(),
            work_order_id: long(64),
            revision: u32::MAX,
            content: Some(content(5_000)),
        };
        let enrol = v1::EnrolRequest {
            certificate_request: vec![0; 16_384].into(),
            transport_certificate_request: vec![0; 16_384].into(),
            ..Default::default()
        };
        let invite = v1::InviteHandheldRequest {
            request_id: id(),
            name: long(64),
            technician: long(64),
            client_titles: vec![title(); 64],
            ..Default::default()
        };
        let largest: [(&str, usize); 12] = [
            ("EnrolmentService/Enrol", enrol.encoded_len()),
            ("HandheldService/InviteHandheld", invite.encoded_len()),
            (
                "WorkOrderService/CreateWorkOrders",
                v1::CreateWorkOrdersRequest { request_id: id(), orders }.encoded_len(),
            ),
            ("WorkOrderService/ChangeWorkOrder", change.encoded_len()),
            ("GrantService/OpenSession", open.encoded_len()),
            ("GrantService/OpenSessions", open_many.encoded_len()),
            ("MeterService/AssignMeters", assign.encoded_len()),
            ("MeterService/RetireMeters", retire.encoded_len()),
            (
                "TaskService/HeartbeatTasks",
                v1::HeartbeatTasksRequest { leases: vec![lease; 1_000], lease_seconds: 1 }.encoded_len(),
            ),
            (
                "CampaignService/CreateCampaign",
                v1::CampaignSelection { meters: vec![title(); 100_000], ..Default::default() }.encoded_len(),
            ),
            ("ShipmentService/UploadShipment", piece.encoded_len()),
            (
                "FrameService/Protect",
                v1::ProtectRequest { frames: vec![frame; 1_000], ..Default::default() }.encoded_len(),
            ),
        ];
        let limits = Limits::default();
        for (method, octets) in largest {
            let most = limits.number(of(&format!("/meterkms.v1.{method}")).unwrap().message);
            assert!(octets <= most, "{method}: {octets} octets, and the bound is {most}");
        }
    }
}
