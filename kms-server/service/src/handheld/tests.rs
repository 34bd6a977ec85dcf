use kms_domain::{Assurance, CodeSecret, code_digest};
use kms_proto::v1::SecurityEvent;
use kms_store::SealedRow;
use kms_store_testing::{Damage, damage};

use super::enrol::{EnrolRequest, EnrolmentService};
use super::*;
use crate::certificate::Validity;
use crate::certificate::request::CertificationRequest;
use crate::certificate::signing::CA_KEY;
use crate::certificate::tests::request as certification;
use crate::principal::Principals;
use crate::testing::{TestIsland, client_title, database, island_tests, meter, put_principal, sample, sha256};

const MINUTE: i64 = 60_000;
const UNAUTHENTICATED: i32 = 16;
const FAILED_PRECONDITION: i32 = 9;

/// An island with its authority.
struct Scene {
    t: TestIsland,
    authority: CertificateAuthority,
}

/// A device with its keys, and the code that it was given.
#[derive(Clone)]
struct TestDevice {
    name: String,
    code_id: CodeId,
    secret: [u8; 15],
    tls: CertificationRequest,
    transport: CertificationRequest,
}

impl TestDevice {
    fn new(name: &str) -> Self {
        let [code_id, secret] = [(); 2].map(|()| uuid::Uuid::new_v4().into_bytes());
        let key = || certification(&rcgen::KeyPair::generate().unwrap());
        Self {
            name: name.to_owned(),
            code_id: CodeId(code_id[..6].try_into().unwrap()),
            secret: secret[..15].try_into().unwrap(),
            tls: key(),
            transport: key(),
        }
    }

    /// Another device with the same code.
    fn thief(&self) -> Self {
        Self { tls: Self::new("x").tls, transport: Self::new("x").transport, ..self.clone() }
    }

    fn guess(&self, guess: u8) -> Self {
        let mut secret = self.secret;
        secret[14] ^= guess;
        Self { secret, ..self.clone() }
    }
}

impl Scene {
    async fn new(t: TestIsland) -> Self {
        let point = t.island.hsm.public_key(CA_KEY).await.unwrap();
        let validity = Validity::days(IslandContext::now(), 3_000);
        let root = CertificateAuthority::root(t.island.name(), point, validity).unwrap();
        let root = root.sign(&t.island.hsm).await.unwrap();
        Self { authority: CertificateAuthority::from_der(&root.der).unwrap(), t }
    }

    fn service(&self) -> HandheldService {
        HandheldService::new(Arc::clone(&self.t.island), &self.authority)
    }

    fn id(&self, name: &str) -> PrincipalId {
        PrincipalId::new(self.t.island.name().clone(), Role::Handheld, name).unwrap()
    }

    fn invitation(&self, device: &TestDevice, technician: &str) -> NewInvitation {
        NewInvitation {
            handheld: self.id(&device.name),
            technician: PersonName::parse(technician).unwrap(),
            code_id: device.code_id,
            code_sha256: code_digest(&device.name, device.code_id, &CodeSecret::new(device.secret)),
            lifetime_seconds: None,
            client_titles: Vec::new(),
        }
    }

    async fn invite(&self, device: &TestDevice) -> Result<v1::Invitation, ServiceError> {
        self.service().invite(&self.t.officer, request(), self.invitation(device, "Tom Field")).await
    }

    async fn hand_over(&self, device: &TestDevice, technician: &str) -> Result<v1::Invitation, ServiceError> {
        self.service().hand_over(&self.t.officer, request(), self.invitation(device, technician)).await
    }

    async fn enrol(&self, device: &TestDevice) -> Result<v1::EnrolResponse, ServiceError> {
        self.enrol_at(&self.t.island, device).await
    }

    async fn enrol_at(
        &self,
        server: &Arc<IslandContext>,
        device: &TestDevice,
    ) -> Result<v1::EnrolResponse, ServiceError> {
        let asked = EnrolRequest {
            handheld: self.id(&device.name),
            code_id: device.code_id,
            secret: CodeSecret::new(device.secret),
            tls: device.tls.clone(),
            transport: device.transport.clone(),
            assurance: Assurance::Software,
        };
        EnrolmentService::new(Arc::clone(server), self.authority.clone()).enrol(asked).await
    }

    async fn refuses(&self, device: &TestDevice) {
        let refusal = self.enrol(device).await.unwrap_err();
        assert_eq!(refusal.code(), UNAUTHENTICATED, "{refusal}");
        // One text for all.
        assert!(refusal.to_string().starts_with("the enrolment code is not accepted"), "{refusal}");
    }

    fn caller(&self, device: &TestDevice, answer: &v1::EnrolResponse) -> Caller {
        Caller {
            principal: self.id(&device.name),
            certificate_sha256: sha256(&answer.certificate),
            not_after: IslandContext::now().after(86_400_000),
        }
    }

    async fn alarms(&self, kind: &str) -> Vec<SecurityEvent> {
        let of_kind = |event| match event {
            Event::SecurityEvent(event) if event.kind == kind => Some(event),
            _ => None,
        };
        self.t.recorded(of_kind).await
    }

    async fn enrolled(&self) -> usize {
        self.t.recorded(|event| matches!(event, Event::HandheldEnrolled(_)).then_some(())).await.len()
    }
}

fn request() -> Request {
    let id = kms_domain::RequestId::from_octets(uuid::Uuid::now_v7().as_bytes()).unwrap();
    Request { id, digest: [1; 32] }
}

island_tests! {
    async fn a_device_is_enrolled_once_and_the_record_names_its_invitation(island) {
        let scene = Scene::new(island).await;
        let device = TestDevice::new("h-17");
        let invited = scene.invite(&device).await.unwrap();
        assert_eq!((invited.state.as_str(), invited.technician.as_str()), ("pending", "Tom Field"));
        assert_eq!(&invited.root_certificate[..], scene.authority.certificate().as_ref());
        let answer = scene.enrol(&device).await.unwrap();
        assert_eq!((answer.technician.as_str(), answer.chain.len()), ("Tom Field", 1));

        // The principal can call, for some days, and policy sees what it is.
        let caller = scene.caller(&device, &answer);
        let row = scene.t.island.principal(&caller).await.unwrap();
        let facts = kms_authz::facts(&row);
        assert_eq!((facts.technician.as_deref(), facts.assurance), (Some("tom field"), Some(Assurance::Software)));
        let days = (row.certificates[0].not_after.0 - IslandContext::now().0) / 86_400_000;
        assert!((6..=7).contains(&days), "{days}");
        assert!(row.transport.is_some() && row.certificates[0].enrolment == kms_domain::Enrolment::OnePerson);
        assert!(scene.t.island.asker(&caller).await.unwrap().permits(
            &Action::RenewPrincipal { role: Role::Handheld, own: true }, &Resource::Island));

        // Nobody acted but the server; the record says for whom.
        let log = scene.t.log().await;
        let record = log.iter().find(|record| matches!(record.event, Some(Event::HandheldEnrolled(_)))).unwrap();
        let Some(Event::HandheldEnrolled(event)) = &record.event else { unreachable!() };
        assert_eq!((record.principal.as_str(), event.invited_by.as_str()), ("", &*scene.t.officer.principal.to_string()));
        assert_eq!((event.assurance.as_str(), event.occasion.as_str()), ("software", "first"));
        // I5: principal, invitation and the count of principals are in the record.
        let kinds: Vec<u32> = record.row_writes.iter().map(|row| row.kind).collect();
        assert!([4, 6, 13].iter().all(|kind| kinds.contains(kind)), "{kinds:?}");
        assert!(log.iter().all(|record| !format!("{record:?}").contains(&hex::encode(device.secret))));

        // The answer was lost: the same again, on every server, and nothing is recorded twice.
        let another = scene.t.another_server().await;
        for server in [&scene.t.island, &another] {
            assert_eq!(scene.enrol_at(server, &device).await.unwrap(), answer);
        }
        assert_eq!(scene.enrolled().await, 1);
        // A second device with the same code: one of the two stole it.
        scene.refuses(&device.thief()).await;
        assert_eq!(scene.alarms("enrolment-code-twice").await.len(), 1);
        // After its time the code gets nothing, not even the same.
        kms_base::clock::testing::advance(61 * MINUTE);
        scene.refuses(&device).await;
        assert_eq!(scene.enrolled().await, 1);
        let listed = scene.service().list(&scene.t.auditor).await.unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0].invitation.as_ref().unwrap().state, "used");
        assert_eq!(listed[0].principal.as_ref().unwrap().assurance, "software");
    }

    async fn codes_that_are_guessed_withdrawn_or_late_enrol_nobody(island) {
        let scene = Scene::new(island).await;
        // No such invitation, name or public part.
        let device = TestDevice::new("h-17");
        scene.refuses(&device).await;
        scene.invite(&device).await.unwrap();
        scene.refuses(&TestDevice { code_id: CodeId([9; 6]), ..device.clone() }).await;
        scene.refuses(&TestDevice { name: "h-18".to_owned(), ..device.clone() }).await;
        // A stranger who knows the name ends nothing, with more guesses than the bound.
        for guess in 1..=6 {
            let stranger = TestDevice { code_id: CodeId([guess; 6]), ..device.guess(guess) };
            let asked = scene.enrol(&stranger);
            assert!(tokio::time::timeout(std::time::Duration::from_secs(30), asked).await.unwrap().is_err());
        }
        assert_eq!(scene.service().list(&scene.t.officer).await.unwrap()[0].invitation.as_ref().unwrap().wrong_codes, 0);
        // Five wrong secrets do.
        for guess in 1..=5 {
            scene.refuses(&device.guess(guess)).await;
        }
        scene.refuses(&device).await;
        let wrong = scene.t.recorded(|event| match event {
            Event::WrongEnrolmentCode(event) => Some((event.wrong_codes, event.ended)),
            _ => None,
        }).await;
        assert_eq!(wrong, [(1, false), (2, false), (3, false), (4, false), (5, true)]);
        assert_eq!(scene.alarms("enrolment-wrong-codes").await.len(), 1);

        // Ended: the name can be invited again, and the earlier code stays worthless.
        let second = TestDevice::new("h-17");
        scene.invite(&second).await.unwrap();
        scene.refuses(&device).await;
        let pending = scene.invite(&TestDevice::new("h-17")).await.unwrap_err();
        assert!(pending.to_string().contains("withdraw-invitation"), "{pending}");
        let withdraw = |device: &TestDevice| {
            let (service, officer, id) = (scene.service(), scene.t.officer.clone(), scene.id(&device.name));
            async move { service.withdraw(&officer, request(), id, "wrong person".to_owned()).await }
        };
        assert_eq!(withdraw(&second).await.unwrap().state, "withdrawn");
        assert_eq!(withdraw(&second).await.unwrap_err().code(), FAILED_PRECONDITION);
        scene.refuses(&second).await;

        // Late.
        let third = TestDevice::new("h-17");
        let short = NewInvitation { lifetime_seconds: Some(60), ..scene.invitation(&third, "Tom Field") };
        scene.service().invite(&scene.t.officer, request(), short.clone()).await.unwrap();
        let long = NewInvitation { lifetime_seconds: Some(3_601), ..short };
        let refusal = scene.service().invite(&scene.t.officer, request(), long).await.unwrap_err();
        assert!(refusal.to_string().contains("`invitation_minutes`"), "{refusal}");
        kms_base::clock::testing::advance(MINUTE + 1_000);
        scene.refuses(&third).await;
        assert_eq!(scene.enrolled().await, 0);
        // The refusals of ended, withdrawn and late codes are on the record, in few records: those
        // of one reason are counted together. The API records those without an invitation.
        let refused = scene.t.recorded(|event| match event {
            Event::Refused(event) if event.action == "enrol" => Some(event.reason),
            _ => None,
        });
        let refused = refused.await;
        assert!(refused.iter().any(|reason| reason.contains("the enrolment code is not accepted")), "{refused:?}");
        assert!(scene.t.log().await.len() < 40);
    }

    async fn one_code_enrols_one_of_two_devices_that_come_at_once(island) {
        let scene = Scene::new(island).await;
        let another = scene.t.another_server().await;
        for round in 0..3 {
            let device = TestDevice::new(&format!("h-{round}"));
            scene.invite(&device).await.unwrap();
            let thief = device.thief();
            let (one, two) = tokio::join!(scene.enrol(&device), scene.enrol_at(&another, &thief));
            assert!(one.is_ok() != two.is_ok(), "{one:?} {two:?}");
        }
        assert_eq!(scene.enrolled().await, 3);
    }

    async fn an_invitation_is_worth_what_its_officer_may_do_now(island) {
        let scene = Scene::new(island).await;
        let colleague = scene.t.colleague().await;
        let device = TestDevice::new("h-17");
        scene.service().invite(&colleague, request(), scene.invitation(&device, "Tom Field")).await.unwrap();
        // Policy has changed.
        let ordinary = scene.t.island.policy.load_full();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(
            folder.path().join("site.cedar"),
            "permit (principal, action, resource) unless { action == Action::\"inviteHandheld\" };",
        ).unwrap();
        scene.t.island.policy.store(Arc::new(kms_policy::load(Some(folder.path())).unwrap()));
        scene.refuses(&device).await;
        scene.t.island.policy.store(ordinary);
        // The officer was disabled: their card is stolen.
        let mut row = (*scene.t.island.principal(&colleague).await.unwrap()).clone();
        row.status = PrincipalStatus::Disabled;
        row.revision += 1;
        put_principal(&scene.t.island, row.clone()).await;
        scene.refuses(&device).await;
        row.status = PrincipalStatus::Enabled;
        row.revision += 1;
        put_principal(&scene.t.island, row.clone()).await;
        scene.enrol(&device).await.unwrap();
        // What a second device says of the code does not depend on the officer.
        row.status = PrincipalStatus::Disabled;
        row.revision += 1;
        put_principal(&scene.t.island, row).await;
        scene.refuses(&device).await;
        assert!(scene.alarms("enrolment-code-twice").await.is_empty());
        scene.refuses(&device.thief()).await;
        assert_eq!(scene.alarms("enrolment-code-twice").await.len(), 1);
        // Who may not invite, hand over, withdraw or list does not.
        let another = TestDevice::new("h-18");
        for caller in [&scene.t.auditor, &scene.t.head_end, &scene.t.manufacturer] {
            let service = scene.service();
            let new = scene.invitation(&another, "Tom Field");
            service.invite(caller, request(), new.clone()).await.unwrap_err();
            service.hand_over(caller, request(), scene.invitation(&device, "Una")).await.unwrap_err();
            service.withdraw(caller, request(), scene.id("h-17"), String::new()).await.unwrap_err();
            assert_eq!(service.list(caller).await.is_ok(), *caller == scene.t.auditor);
        }
    }

    async fn a_hand_over_ends_all_keys_of_the_device(island) {
        let scene = Scene::new(island).await;
        let device = TestDevice::new("h-17");
        scene.invite(&device).await.unwrap();
        let answer = scene.enrol(&device).await.unwrap();
        let before = scene.caller(&device, &answer);
        // It exists and is enabled.
        let refusal = scene.invite(&TestDevice::new("h-17")).await.unwrap_err();
        assert!(refusal.to_string().contains("hand-over h-17"), "{refusal}");

        let next = TestDevice::new("h-17");
        assert_eq!(scene.hand_over(&next, "Una Field").await.unwrap().occasion, "hand-over");
        // At once, and before anybody has enrolled it again.
        assert!(scene.t.island.principal(&before).await.is_err());
        // Who carried it cannot use the code of the first time, nor enrol with the keys of then.
        scene.refuses(&device).await;
        let row = scene.service().list(&scene.t.officer).await.unwrap().remove(0).principal.unwrap();
        assert_eq!((row.has_transport_key, row.certificates.len(), row.assurance.as_str()), (false, 0, ""));
        assert_eq!(row.person, "Una Field");
        let answer = scene.enrol(&next).await.unwrap();
        let after = scene.caller(&next, &answer);
        assert!(scene.t.island.principal(&after).await.is_ok() && scene.t.island.principal(&before).await.is_err());
        let handed = scene.t.recorded(|event| match event {
            Event::HandheldHandedOver(event) => Some((event.from, event.to, event.ended.len())),
            _ => None,
        }).await;
        assert_eq!(handed, [("Tom Field".to_owned(), "Una Field".to_owned(), 1)]);
        // A later hand-over replaces one whose code nobody used.
        let (lost, found) = (TestDevice::new("h-17"), TestDevice::new("h-17"));
        scene.hand_over(&lost, "Una Field").await.unwrap();
        scene.hand_over(&found, "Una Field").await.unwrap();
        scene.refuses(&lost).await;
        scene.enrol(&found).await.unwrap();

        // A lost device is never enabled again.
        let principals = Principals::new(Arc::clone(&scene.t.island), scene.authority.clone(), 90);
        principals.disable(&scene.t.officer, request().id, scene.id("h-17"), "lost".to_owned()).await.unwrap();
        for refusal in [
            scene.invite(&TestDevice::new("h-17")).await.unwrap_err(),
            scene.hand_over(&TestDevice::new("h-17"), "Una Field").await.unwrap_err(),
        ] {
            assert_eq!(refusal.code(), FAILED_PRECONDITION, "{refusal}");
        }
        let unknown = scene.hand_over(&TestDevice::new("h-99"), "Una Field").await.unwrap_err();
        assert!(matches!(unknown, ServiceError::NotFound { .. }), "{unknown}");
    }

    async fn what_was_handed_over_and_then_disabled_is_not_enrolled(island) {
        let scene = Scene::new(island).await;
        let (device, next) = (TestDevice::new("h-17"), TestDevice::new("h-17"));
        scene.invite(&device).await.unwrap();
        scene.enrol(&device).await.unwrap();
        scene.hand_over(&next, "Una Field").await.unwrap();
        let principals = Principals::new(Arc::clone(&scene.t.island), scene.authority.clone(), 90);
        principals.disable(&scene.t.officer, request().id, scene.id("h-17"), "lost".to_owned()).await.unwrap();
        assert!(scene.enrol(&next).await.is_err());
        assert_eq!(scene.enrolled().await, 1);
    }

    async fn keys_and_titles_of_others_are_refused(island) {
        let scene = Scene::new(island).await;
        scene.t.deliver(&sample("generic-suite0", 1)).await;
        // I4: titles of meters, and of other principals.
        for title in [meter(1), client_title()] {
            let new = NewInvitation {
                client_titles: vec![title],
                ..scene.invitation(&TestDevice::new("h-17"), "Tom Field")
            };
            let refusal = scene.service().invite(&scene.t.officer, request(), new).await.unwrap_err();
            assert!(refusal.to_string().contains("client title"), "{refusal}");
        }
        let title = SystemTitle::parse("4D4D4D0000000012").unwrap();
        let (one, two) = (TestDevice::new("h-17"), TestDevice::new("h-18"));
        for device in [&one, &two] {
            let new = NewInvitation { client_titles: vec![title], ..scene.invitation(device, "Tom Field") };
            scene.service().invite(&scene.t.officer, request(), new).await.unwrap();
        }
        // Both were free when they were invited: the transaction that uses the title decides.
        let answer = scene.enrol(&one).await.unwrap();
        assert_eq!(answer.client_titles, [Bytes::copy_from_slice(&title.octets())]);
        assert_eq!(scene.enrol(&two).await.unwrap_err().code(), FAILED_PRECONDITION);
        // I6: one key, one principal.
        let three = TestDevice { tls: one.tls.clone(), ..TestDevice::new("h-19") };
        scene.invite(&three).await.unwrap();
        assert!(scene.enrol(&three).await.unwrap_err().to_string().contains("make a key pair"));
        assert_eq!(scene.enrolled().await, 1);
    }

    async fn i5_an_invitation_that_was_edited_enrols_nobody(island) {
        let scene = Scene::new(island).await;
        let device = TestDevice::new("h-17");
        scene.invite(&device).await.unwrap();
        let store = &scene.t.island.store;
        let (kind, name) = invitation_row(&scene.id("h-17"));
        let row = store.sealed(kind, &name).await.unwrap().unwrap();
        let put = async |id: &[u8], row: SealedRow| {
            let put = Damage::PutSealed(kind, id.to_vec(), row);
            assert_eq!(damage(&database().database, &put).await.unwrap(), 1);
        };
        // For another name, which has an invitation too.
        let other = TestDevice { name: "h-18".to_owned(), ..device.clone() };
        scene.invite(&TestDevice::new("h-18")).await.unwrap();
        put(&invitation_row(&scene.id("h-18")).1, row.clone()).await;
        scene.refuses(&other).await;
        // With another technician, and as if it had never been used.
        let mut body = row.body.clone();
        let at = body.windows(3).position(|window| window == b"Tom").unwrap();
        body[at] = b'R';
        put(&name, SealedRow { generation: 2, body, seal: row.seal }).await;
        scene.refuses(&device).await;
        // The list names it, and has all others.
        scene.invite(&TestDevice::new("h-19")).await.unwrap();
        let listed = scene.service().list(&scene.t.auditor).await.unwrap();
        let shown = listed.iter().map(|handheld| (handheld.unreadable, handheld.invitation.is_some()));
        assert_eq!(shown.collect::<Vec<_>>(), [(true, false), (true, false), (false, true)]);
        put(&name, SealedRow { generation: 3, ..row.clone() }).await;
        scene.refuses(&device).await;
        assert_eq!(scene.enrolled().await, 0);
    }
}
