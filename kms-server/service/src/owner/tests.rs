mod rotation;

use std::{num::NonZeroU32, path::PathBuf, sync::Arc};

use aws_lc_rs::agreement::{ECDH_P256, PrivateKey};
use kms_domain::{
    DeviceProfileName, ExposureReason, FlagId, GroupId, KeyType, Party, RequestId, SecuritySetupId,
    TransportCertificate,
};
use kms_proto::v1::{self, Manifest, audit_record::Event};
use kms_store::RowKind;
use prost::Message as _;

use super::{NewDeviceType, NewOwnerKey, OwnerService};
use crate::island::IslandContext;
use crate::testing::{TestIsland, client_title, island_tests, meter, put_principal};
use crate::{
    grant::GrantService,
    grant::deliver::Granted,
    grant::terms::{GrantChunk, GrantTargets, SessionTerms},
    meter::{Enrolment, MeterService, NewMeter, Request},
    scrub::Scrubber,
};
use kms_authz::{Caller, Purpose};
use kms_base::error::ServiceError;

impl TestIsland {
    fn owners(&self) -> OwnerService {
        OwnerService::new(self.island.clone())
    }

    /// Meters of a suite 1 profile that gives the GBEK to groups.
    async fn enrol_group(&self, number: u8, first: u64, group: &str) {
        self.enrol_group_of("two-setups-suite1", number, first, group).await;
    }

    async fn enrol_group_of(&self, profile: &str, number: u8, first: u64, group: &str) {
        let meters = (first..first + 3)
            .map(|number| NewMeter {
                title: meter(number),
                serial: format!("S{number}"),
                groups: vec![group.to_owned()],
            })
            .collect();
        let enrolment = Enrolment {
            manufacturer: FlagId::parse("KAM").unwrap(),
            device_profile: DeviceProfileName::parse(profile).unwrap(),
            batch: String::new(),
            meters,
        };
        let enrolled =
            MeterService::new(self.island.clone()).enrol(&self.officer, request(number), enrolment).await.unwrap();
        assert_eq!(enrolled.changed, 3);
    }

    async fn with_transport_key(&self, caller: &Caller) {
        let mut principal = (*self.island.principal(caller).await.unwrap()).clone();
        let public = PrivateKey::generate(&ECDH_P256).unwrap().compute_public_key().unwrap();
        principal.transport = Some(TransportCertificate {
            certificate: vec![1].into(),
            sha256: [9; 32],
            public_point: public.as_ref().try_into().unwrap(),
        });
        principal.revision += 1;
        put_principal(&self.island, principal).await;
    }

    /// The shipped policies and one more.
    fn permit(&self, policy: &str) {
        let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../policies"));
        let mut files: Vec<(PathBuf, String)> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "cedar"))
            .map(|path| (path.clone(), std::fs::read_to_string(path).unwrap()))
            .collect();
        files.push((PathBuf::from("site.cedar"), policy.to_owned()));
        self.island.policy.store(Arc::new(
            kms_policy::from_files(files, (kms_authz::Quotas::FILE.into(), kms_authz::Quotas::SHIPPED.to_owned()))
                .unwrap(),
        ));
    }

    /// The keys of groups and device types that were created, as the log says.
    async fn keys_created(&self) -> Vec<v1::KeyCreated> {
        self.recorded(|event| match event {
            Event::KeyCreated(event) => Some(event),
            _ => None,
        })
        .await
    }
}

fn request(number: u8) -> Request {
    Request { id: RequestId::from_octets(&[number; 16]).unwrap(), digest: [number; 32] }
}

fn new(key_type: &str, held_by_meters: bool) -> NewOwnerKey {
    NewOwnerKey { setup: SecuritySetupId::DEFAULT, key_type: key_type.to_owned(), held_by_meters }
}

fn chunk(number: u8, targets: GrantTargets, key_types: &[KeyType]) -> GrantChunk {
    let terms = SessionTerms {
        purpose: Purpose::Configure,
        setup: None,
        key_types: key_types.to_vec(),
        client_title: Some(client_title()),
        counters: NonZeroU32::new(100).unwrap(),
        dedicated_key: false,
        lifetime_seconds: 900,
    };
    GrantChunk {
        request: RequestId::from_octets(&[number; 16]).unwrap(),
        index: 0,
        digest: [number; 32],
        targets,
        terms: Arc::new(terms),
    }
}

async fn open(island: &Arc<IslandContext>, caller: &Caller, number: u8, group: &str) -> Result<Granted, ServiceError> {
    GrantService::new(island.clone())
        .open(caller, chunk(number, GrantTargets::Group { name: group.to_owned(), version: None }, &[KeyType::GBEK]))
        .await
}

fn group_keys(granted: &Granted) -> v1::GroupKeys {
    let [envelope] = granted.envelopes.as_slice() else { panic!("{} envelopes", granted.envelopes.len()) };
    let manifest = Manifest::decode(envelope.manifest.clone()).unwrap();
    assert!(manifest.meters.is_empty() && manifest.groups.len() == 1, "{manifest:?}");
    manifest.groups[0].clone()
}

const PERMIT_GROUP_1: &str = "permit (principal == HeadEnd::\"urn:meterkms:north:head-end:hes-1\", action == Action::\"openGroupSession\", \
                              resource == MeterGroup::\"1\") when { context.key_type == \"GBEK\" };";

island_tests! {
    async fn a_groups_key_is_made_once_and_on_the_record(island) {
        island.enrol_group(1, 1, "north").await;
        let service = island.owners();
        let north = |number, key: NewOwnerKey| { let (service, officer) = (service.clone(), island.officer.clone()); async move { service.create_group_key(&officer, request(number), "north", key, None).await } };
        let made = north(2, new("GBEK", false)).await.unwrap().version.unwrap();
        assert_eq!((made.number, made.state.as_str(), made.origin.as_str(), made.candidate), (1, "pre-active", "generated", false));
        // The same request again is the same key; another one makes no second.
        assert_eq!(north(2, new("GBEK", false)).await.unwrap().version.unwrap(), made);
        assert!(matches!(north(3, new("GBEK", true)).await, Err(ServiceError::FailedPrecondition { reason, .. }) if reason.contains("already")));
        assert!(matches!(north(2, NewOwnerKey { setup: SecuritySetupId::from_octets([0, 1]), ..new("GBEK", true) }).await, Err(ServiceError::FailedPrecondition { .. })));
        // A key of the meters, and what no profile gives to groups.
        for key_type in ["GUEK", "FIRMWARE"] {
            assert!(matches!(north(4, new(key_type, false)).await, Err(ServiceError::FailedPrecondition { reason, .. }) if reason.contains("groups")), "{key_type}");
        }
        assert!(matches!(north(4, new("GBEX", false)).await, Err(ServiceError::InvalidArgument { field, .. }) if field == "key_type"));
        let suite_0 = DeviceProfileName::parse("gateway-suite0").unwrap();
        assert!(matches!(service.create_group_key(&island.officer, request(5), "north", new("GBEK", false), Some(&suite_0)).await, Err(ServiceError::FailedPrecondition { .. })));
        // I8: only who may; and an unknown group is refused like a forbidden one.
        for caller in [&island.head_end, &island.auditor] {
            assert!(matches!(service.create_group_key(caller, request(6), "north", new("GBEK", false), None).await, Err(ServiceError::PermissionDenied { .. })));
        }
        assert!(matches!(service.create_group_key(&island.officer, request(6), "south", new("GBEK", false), None).await, Err(ServiceError::PermissionDenied { .. })));

        let shown = service.group(&island.auditor, "north").await.unwrap();
        assert_eq!((shown.number, shown.security_suite, shown.security_setups.len(), shown.security_setups[0].slots[0].versions.len()), (1, 1, 1, 1));
        assert!(matches!(service.group(&island.officer, "south").await, Err(ServiceError::NotFound { .. })));
        assert!(matches!(service.groups(&island.head_end, None, 10).await, Err(ServiceError::PermissionDenied { .. })));
        island.enrol_group(7, 10, "south").await;
        let first = service.groups(&island.auditor, None, 1).await.unwrap();
        let rest = service.groups(&island.auditor, first.next, 10).await.unwrap();
        assert_eq!((first.groups[0].name.as_str(), rest.groups[0].name.as_str(), rest.groups.len(), rest.next), ("north", "south", 1, None));

        // I2: one record, which names the row; and the scrubber agrees.
        let events = island.keys_created().await;
        assert!(matches!(events.as_slice(), [event] if event.owner_name == "north" && event.owner_kind == u32::from(RowKind::Group.number()) && event.state == "pre-active"), "{events:?}");
        assert_eq!(Scrubber::new(island.island.clone()).scrub(|_| true).await.unwrap().findings, []);
    }

    async fn a_groups_key_is_issued_by_what_policy_says_of_the_group(island) {
        island.enrol_group(1, 1, "north").await;
        island.enrol_group(2, 10, "south").await;
        let service = island.owners();
        for (number, name) in [(3, "north"), (4, "south")] {
            service.create_group_key(&island.officer, request(number), name, new("GBEK", true), None).await.unwrap();
        }
        for caller in [&island.head_end, &island.other_head_end] {
            island.with_transport_key(caller).await;
        }
        let assignment = crate::meter::Assignment {
            selection: crate::meter::Selection::Meters((1..4).map(meter).collect()),
            head_end: Some(island.head_end.principal.clone()),
            dry_run: false,
        };
        MeterService::new(island.island.clone()).assign(&island.officer, request(5), assignment).await.unwrap();
        // I8: to have all members assigned gives no broadcast key, neither as a group's nor as a
        // meter's.
        assert!(matches!(open(&island.island, &island.head_end, 10, "north").await, Err(ServiceError::PermissionDenied { .. })));
        let as_meter = chunk(11, GrantTargets::Meters(vec![meter(1)]), &[KeyType::GBEK]);
        assert!(matches!(GrantService::new(island.island.clone()).open(&island.head_end, as_meter).await, Err(ServiceError::PermissionDenied { .. })));

        island.permit(PERMIT_GROUP_1);
        let granted = open(&island.island, &island.head_end, 12, "north").await.unwrap();
        let keys = group_keys(&granted);
        assert_eq!((keys.group, keys.name.as_str(), keys.security_suite, keys.keys.len()), (1, "north", 1, 1));
        assert_eq!((keys.keys[0].key_type.as_str(), keys.keys[0].version, keys.keys[0].wrapped.len()), ("GBEK", 1, 24));
        let lease = keys.lease.clone().unwrap();
        assert_eq!((lease.client_title.as_ref(), lease.key_version, lease.first, lease.count), (&client_title().octets()[..], 1, 1, 100));
        // The record, and the ledger: once, however often it is issued.
        let events = island.recorded(|event| match event { Event::KeysGranted(event) => Some(event), _ => None }).await;
        assert!(matches!(events.last(), Some(event) if event.meters[0].group == 1 && event.meters[0].meter == 0 && event.meters[0].lease_first == 1), "{events:?}");
        // The same request again is the same grant with the same lease.
        assert_eq!(group_keys(&open(&island.island, &island.head_end, 12, "north").await.unwrap()).lease, keys.lease);
        // I4: leases follow each other on all servers; the older one is overtaken then.
        let other = island.another_server().await;
        other.policy.store(island.island.policy.load_full());
        let mut last = lease.first + lease.count - 1;
        for (number, server) in [(13, &island.island), (14, &other), (15, &island.island), (16, &other)] {
            let next = group_keys(&open(server, &island.head_end, number, "north").await.unwrap()).lease.unwrap();
            assert!(next.first > last, "{next:?} after {last}");
            last = next.first + next.count - 1;
        }
        assert!(matches!(open(&island.island, &island.head_end, 12, "north").await, Err(ServiceError::Aborted { .. })));
        let row = island.island.store.sealed(RowKind::Group, &1_u64.to_be_bytes()).await.unwrap().unwrap();
        let group = island.island.committer.open_group(GroupId(1), &row).unwrap();
        let version = group.slots.get(SecuritySetupId::DEFAULT, KeyType::GBEK).unwrap().active().unwrap();
        let [exposure] = version.exposures() else { panic!("{:?}", version.exposures()) };
        assert_eq!((&exposure.party, exposure.reason), (&Party::Principal(island.head_end.principal.clone()), ExposureReason::Grant));

        // Another group, another head-end, a foreign client title, a group that nobody knows: all
        // the same answer.
        assert!(matches!(open(&island.island, &island.head_end, 20, "south").await, Err(ServiceError::PermissionDenied { .. })));
        assert!(matches!(open(&island.island, &island.head_end, 21, "west").await, Err(ServiceError::PermissionDenied { .. })));
        assert!(matches!(open(&island.island, &island.other_head_end, 22, "north").await, Err(ServiceError::PermissionDenied { .. })));
        assert_eq!(Scrubber::new(island.island.clone()).scrub(|_| true).await.unwrap().findings, []);
    }

    async fn a_diversified_key_of_a_group_is_its_own_and_profiles_must_agree(island) {
        island.enrol_group_of("diversified-broadcast", 1, 1, "north").await;
        island.enrol_group_of("diversified-broadcast", 2, 10, "south").await;
        let service = island.owners();
        let diversified = DeviceProfileName::parse("diversified-broadcast").unwrap();
        let undecided = service.create_group_key(&island.officer, request(3), "north", new("GBEK", true), None).await;
        assert!(matches!(undecided, Err(ServiceError::InvalidArgument { field, .. }) if field == "device_profile"), "one is generated, one diversified");
        let mut fingerprints = Vec::new();
        for (number, group) in [(1, "north"), (2, "south")] {
            let made = service.create_group_key(&island.officer, request(3 + number), group, new("GBEK", true), Some(&diversified)).await.unwrap();
            assert_eq!(made.version.unwrap().origin, "diversified");
            let row = island.island.store.sealed(RowKind::Group, &u64::from(number).to_be_bytes()).await.unwrap().unwrap();
            let group = island.island.committer.open_group(GroupId(number.into()), &row).unwrap();
            let slot = group.slots.get(SecuritySetupId::DEFAULT, KeyType::GBEK).unwrap();
            let source = crate::keys::source::source(group.owner(), slot, slot.active().unwrap()).unwrap();
            fingerprints.push(island.island.hsm.rewrap_stored(source).await.unwrap().fingerprint_wrap);
        }
        // Equal keys have equal wraps: two groups have two keys, and none of them is a meter's.
        let meter = island.island.meter(meter(1)).await.unwrap().unwrap();
        let guek = meter.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
        let source = crate::keys::source::source(meter.owner(), guek, guek.active().unwrap()).unwrap();
        fingerprints.push(island.island.hsm.rewrap_stored(source).await.unwrap().fingerprint_wrap);
        fingerprints.sort();
        fingerprints.dedup();
        assert_eq!(fingerprints.len(), 3);
        // And it is issued like any other.
        island.with_transport_key(&island.head_end).await;
        island.permit(PERMIT_GROUP_1);
        assert_eq!(group_keys(&open(&island.island, &island.head_end, 9, "north").await.unwrap()).lease.unwrap().first, 1);
    }

    async fn a_key_that_its_members_do_not_hold_yet_is_issued_to_nobody(island) {
        island.enrol_group(1, 1, "north").await;
        island.owners().create_group_key(&island.officer, request(2), "north", new("GBEK", false), None).await.unwrap();
        island.with_transport_key(&island.head_end).await;
        island.permit(PERMIT_GROUP_1);
        // I3: pre-active.
        assert!(matches!(open(&island.island, &island.head_end, 3, "north").await, Err(ServiceError::FailedPrecondition { reason, .. }) if reason.contains("no active GBEK")));
    }

    async fn device_types_own_firmware_keys(island) {
        let service = island.owners();
        let gateway = |name: &str, profile: &str| NewDeviceType {
            name: name.to_owned(), manufacturer: FlagId::parse("KAM").unwrap(), device_profile: DeviceProfileName::parse(profile).unwrap(),
        };
        let id = |number: u8| RequestId::from_octets(&[number; 16]).unwrap();
        let added = service.add_device_type(&island.officer, id(1), gateway("kam-gateway", "gateway-suite0")).await.unwrap();
        assert_eq!((added.number, added.device_profile.as_str()), (1, "gateway-suite0"));
        assert_eq!(service.add_device_type(&island.officer, id(2), gateway("kam-gateway", "gateway-suite0")).await.unwrap(), added);
        assert!(matches!(service.add_device_type(&island.officer, id(3), gateway("kam-gateway", "generic-suite0")).await, Err(ServiceError::FailedPrecondition { .. })));
        assert!(matches!(service.add_device_type(&island.officer, id(4), gateway("other", "unheard-of")).await, Err(ServiceError::InvalidArgument { .. })));
        assert!(matches!(service.add_device_type(&island.head_end, id(5), gateway("other", "gateway-suite0")).await, Err(ServiceError::PermissionDenied { .. })));
        assert_eq!(service.add_device_type(&island.officer, id(6), gateway("kam-plain", "generic-suite0")).await.unwrap().number, 2);

        let made = service.create_device_type_key(&island.officer, request(7), "kam-gateway", new("FIRMWARE", true)).await.unwrap().version.unwrap();
        assert_eq!((made.number, made.state.as_str(), made.origin.as_str()), (1, "active", "generated"));
        assert!(matches!(service.create_device_type_key(&island.officer, request(8), "kam-gateway", new("FIRMWARE", true)).await, Err(ServiceError::FailedPrecondition { .. })));
        assert!(matches!(service.create_device_type_key(&island.officer, request(9), "kam-gateway", new("GBEK", true)).await, Err(ServiceError::FailedPrecondition { .. })));
        assert!(matches!(service.create_device_type_key(&island.officer, request(10), "kam-plain", new("FIRMWARE", true)).await, Err(ServiceError::FailedPrecondition { .. })));
        assert!(matches!(service.create_device_type_key(&island.auditor, request(11), "kam-gateway", new("FIRMWARE", true)).await, Err(ServiceError::PermissionDenied { .. })));
        assert_eq!(service.device_types(&island.auditor).await.unwrap().len(), 2);
        let shown = service.device_type(&island.auditor, "kam-gateway").await.unwrap();
        assert_eq!(shown.security_setups[0].slots[0].key_type, "FIRMWARE");
        // Another server knows them too, and numbers go on.
        let other = OwnerService::new(island.another_server().await);
        assert_eq!(other.add_device_type(&island.officer, id(12), gateway("kam-third", "generic-suite1")).await.unwrap().number, 3);
        assert!(matches!(island.keys_created().await.as_slice(), [event] if event.owner_kind == u32::from(RowKind::DeviceType.number()) && event.key_type == "FIRMWARE"));
        assert_eq!(island.recorded(|event| matches!(event, Event::DeviceTypeAdded(_)).then_some(())).await.len(), 3);
        assert_eq!(Scrubber::new(island.island.clone()).scrub(|_| true).await.unwrap().findings, []);
    }
}
