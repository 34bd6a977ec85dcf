use kms_domain::{IslandName, PrincipalStatus, ProposalId, Quorum, Role};
use kms_hsm::Hsm;
use kms_proto::v1::AuditRecord;

use super::{key::ProposedKey, *};
use crate::testing::{TestIsland, island_tests, put_principal, sha256};
use crate::{
    Request,
    approval::{ProposalChange, ProposalService},
    certificate::signing::CA_KEY,
};

const DAY: i64 = 86_400_000;
const INVALID_ARGUMENT: i32 = 3;
const NOT_FOUND: i32 = 5;
const PERMISSION_DENIED: i32 = 7;
const FAILED_PRECONDITION: i32 = 9;
const UNAUTHENTICATED: i32 = 16;

/// An island with its authority, and officers that the ceremony could have enrolled: Ada and Bo.
struct Scene {
    t: TestIsland,
    authority: CertificateAuthority,
    ada: Caller,
    bo: Caller,
}

async fn authority(hsm: &Hsm, island: &IslandName) -> CertificateAuthority {
    let point = hsm.public_key(CA_KEY).await.unwrap();
    let root = CertificateAuthority::root(island, point, Validity::days(IslandContext::now(), 3_000))
        .unwrap()
        .sign(hsm)
        .await
        .unwrap();
    CertificateAuthority::from_der(&root.der).unwrap()
}

impl Scene {
    async fn new(t: TestIsland) -> Self {
        let authority = authority(&t.island.hsm, t.island.name()).await;
        let (ada, bo) = (t.officer.clone(), t.colleague().await);
        Self { t, authority, ada, bo }
    }

    fn principals(&self) -> Principals {
        self.principals_of(&self.t.island)
    }

    fn principals_of(&self, island: &Arc<IslandContext>) -> Principals {
        Principals::new(Arc::clone(island), self.authority.clone(), 30)
    }

    fn id(&self, role: Role, name: &str) -> PrincipalId {
        PrincipalId::new(self.t.island.name().clone(), role, name).unwrap()
    }

    /// `by` adds an officer with this key.
    async fn add_officer(
        &self,
        by: &Caller,
        name: &str,
        person: &str,
        key: &rcgen::KeyPair,
    ) -> Result<Caller, ServiceError> {
        let new = NewPrincipal {
            request: request_id(),
            id: self.id(Role::Officer, name),
            certification: Some(certification(key)),
            person: Some(PersonName::parse(person).unwrap()),
            client_titles: Vec::new(),
            shipment_key: None,
        };
        let issued = self.principals().add(by, new).await?;
        Ok(caller(&self.id(Role::Officer, name), &issued))
    }

    async fn add_head_end(
        &self,
        on: &Arc<IslandContext>,
        name: &str,
        titles: &[SystemTitle],
    ) -> Result<v1::PrincipalCertificate, ServiceError> {
        let new = NewPrincipal {
            request: request_id(),
            id: self.id(Role::HeadEnd, name),
            certification: Some(certification(&key())),
            person: None,
            client_titles: titles.to_vec(),
            shipment_key: None,
        };
        self.principals_of(on).add(&self.ada, new).await
    }

    async fn renew(&self, by: &Caller, id: &PrincipalId, key: &rcgen::KeyPair) -> Result<Caller, ServiceError> {
        let issued = self.principals().renew(by, request_id(), id.clone(), &certification(key), None).await?;
        Ok(caller(id, &issued))
    }

    /// An officer whose certificate has ended already.
    async fn expired_officer(&self, name: &str, person: &str) -> PrincipalId {
        let id = self.id(Role::Officer, name);
        let principal = Principal {
            id: id.clone(),
            revision: 1,
            status: PrincipalStatus::Enabled,
            certificates: vec![PrincipalCertificate::unrecorded(
                vec![77].into(),
                [77; 32],
                IslandContext::now().after(-DAY),
            )],
            transport: None,
            client_titles: Vec::new(),
            person: Some(PersonName::parse(person).unwrap()),
            assurance: None,
            shipment_key: None,
            added: UnixMillis(1),
        };
        put_principal(&self.t.island, principal).await;
        id
    }

    async fn propose_key(
        &self,
        by: &Caller,
        id: &PrincipalId,
        key: &rcgen::KeyPair,
    ) -> Result<v1::Proposal, ServiceError> {
        let new = ProposedKey {
            id: id.clone(),
            key_sha256: certification(key).spki_sha256(),
            reason: "ticket 4714".to_owned(),
            quorum: Quorum::ONE,
        };
        self.principals().propose_key(by, request(), new).await
    }

    async fn change(
        &self,
        by: &Caller,
        proposal: &v1::Proposal,
        change: ProposalChange,
    ) -> Result<v1::Proposal, ServiceError> {
        ProposalService::new(Arc::clone(&self.t.island)).change(by, request(), proposal_id(proposal), change).await
    }

    async fn approve(&self, by: &Caller, proposal: &v1::Proposal) -> Result<v1::Proposal, ServiceError> {
        self.change(
            by,
            proposal,
            ProposalChange::Approve { content_sha256: proposal.content_sha256.as_ref().try_into().unwrap() },
        )
        .await
    }

    async fn row(&self, id: &PrincipalId) -> Arc<Principal> {
        let (kind, name) = principal_row(id);
        let row = self.t.island.store.sealed(kind, &name).await.unwrap().unwrap();
        self.t.island.committer.open_principal(id, &row).unwrap()
    }

    async fn events(&self, kind: &str) -> Vec<SecurityEvent> {
        let rows = self.t.island.store.audit_page(&kms_store::AuditFilter::default(), None, 500).await.unwrap();
        let events = rows
            .iter()
            .filter_map(|row| <AuditRecord as prost::Message>::decode(row.record.record.as_slice()).unwrap().event);
        events
            .filter_map(|event| if let Event::SecurityEvent(event) = event { Some(event) } else { None })
            .filter(|event| event.kind == kind)
            .collect()
    }

    /// Waits until a refusal of this action is on the record: one outside of an act is written with
    /// the next transaction.
    async fn recorded_refusal(&self, action: &str) -> String {
        let refusal = async {
            loop {
                let rows = self.t.island.store.audit_page(&kms_store::AuditFilter::default(), None, 500).await.unwrap();
                let events = rows.iter().filter_map(|row| {
                    <AuditRecord as prost::Message>::decode(row.record.record.as_slice()).unwrap().event
                });
                let refused =
                    events.filter_map(|event| if let Event::Refused(refused) = event { Some(refused) } else { None });
                if let Some(refused) = refused.into_iter().find(|refused| refused.action == action) {
                    return refused.reason;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(60), refusal)
            .await
            .unwrap_or_else(|_| panic!("no refusal of {action} is on the record"))
    }

    /// A policy of somebody who permits everything.
    fn permit_everything(&self) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("all.cedar"), "permit (principal, action, resource);").unwrap();
        self.t.island.policy.store(Arc::new(kms_policy::load(Some(folder.path())).unwrap()));
    }
}

fn key() -> rcgen::KeyPair {
    rcgen::KeyPair::generate().unwrap()
}

fn certification(key: &rcgen::KeyPair) -> CertificationRequest {
    CertificationRequest::parse(rcgen::CertificateParams::default().serialize_request(key).unwrap().der()).unwrap()
}

fn caller(id: &PrincipalId, issued: &v1::PrincipalCertificate) -> Caller {
    Caller {
        principal: id.clone(),
        certificate_sha256: sha256(&issued.certificate),
        not_after: IslandContext::now().after(DAY),
    }
}

fn request_id() -> RequestId {
    RequestId::from_octets(uuid::Uuid::now_v7().as_bytes()).unwrap()
}

fn request() -> Request {
    Request { id: request_id(), digest: [1; 32] }
}

fn proposal_id(proposal: &v1::Proposal) -> ProposalId {
    ProposalId::from_octets(&proposal.proposal_id).unwrap()
}

fn code(outcome: Result<impl std::fmt::Debug, ServiceError>) -> i32 {
    outcome.map_or_else(|error| error.code(), |value| panic!("{value:?}"))
}

fn text(outcome: Result<impl std::fmt::Debug, ServiceError>) -> String {
    outcome.map_or_else(|error| error.to_string(), |value| panic!("{value:?}"))
}

island_tests! {
    async fn i6_nobody_certifies_the_key_of_another_person(t) {
        let scene = Scene::new(t).await;
        let auditor = scene.t.auditor.principal.clone();
        let before = scene.row(&scene.bo.principal).await;
        for shipped in [true, false] {
            if !shipped {
                scene.permit_everything();
            }
            for target in [&scene.bo.principal, &auditor] {
                // The attack: Ada gets a certificate that speaks for Bo.
                assert_eq!(code(scene.renew(&scene.ada, target, &key()).await), FAILED_PRECONDITION);
            }
            // A machine does not either, whatever policies say.
            let expected = if shipped { PERMISSION_DENIED } else { FAILED_PRECONDITION };
            assert_eq!(code(scene.renew(&scene.t.head_end, &scene.bo.principal, &key()).await), expected);
        }
        assert_eq!(scene.row(&scene.bo.principal).await, before);
        let refusal = text(scene.renew(&scene.ada, &scene.bo.principal, &key()).await);
        assert!(refusal.contains("propose-key") && refusal.contains("kms-server officers recertify"), "{refusal}");
        // Each of them renews the own one.
        scene.renew(&scene.bo, &scene.bo.principal, &key()).await.unwrap();
        scene.renew(&scene.t.auditor, &auditor, &key()).await.unwrap();
    }

    async fn i6_an_officer_whom_one_officer_added_is_nobody_until_two_others_confirm(t) {
        let scene = Scene::new(t).await;
        let (lost, eves) = (scene.expired_officer("cy", "Cy").await, key());
        let eve = scene.add_officer(&scene.ada, "eve", "Eve", &eves).await.unwrap();
        assert_eq!(scene.events("person-added-by-one").await.len(), 1);
        // She reads and administers; she neither approves what Ada asked for, nor asks for what Ada
        // approves.
        scene.principals().list(&eve).await.unwrap();
        let wanted = scene.propose_key(&scene.ada, &lost, &key()).await.unwrap();
        assert_eq!(code(scene.approve(&eve, &wanted).await), FAILED_PRECONDITION);
        assert_eq!(code(scene.propose_key(&eve, &lost, &key()).await), FAILED_PRECONDITION);
        // A renewal by such a key is such a key.
        let again = scene.renew(&eve, &eve.principal, &key()).await.unwrap();
        assert_eq!(code(scene.approve(&again, &wanted).await), FAILED_PRECONDITION);
        assert!(!scene.principals().who_am_i(&again).await.unwrap().certificates.iter().any(|certificate| certificate.counts));

        // Ada and Bo stand behind her key, and neither Ada nor Eve alone.
        let confirm = scene.propose_key(&scene.ada, &eve.principal, &eves).await.unwrap();
        assert_eq!(code(scene.approve(&scene.ada, &confirm).await), FAILED_PRECONDITION);
        assert_eq!(code(scene.approve(&eve, &confirm).await), FAILED_PRECONDITION);
        assert_eq!(code(scene.change(&scene.ada, &confirm, ProposalChange::Execute).await), FAILED_PRECONDITION);
        scene.approve(&scene.bo, &confirm).await.unwrap();
        assert_eq!(scene.change(&scene.ada, &confirm, ProposalChange::Execute).await.unwrap().state, "carried-out");
        // The key that they confirmed counts, and not the other one.
        assert_eq!(code(scene.approve(&again, &wanted).await), FAILED_PRECONDITION);
        assert_eq!(scene.approve(&eve, &wanted).await.unwrap().state, "approved");
    }

    async fn i6_one_key_stands_for_one_principal(t) {
        let scene = Scene::new(t).await;
        let (own, lost) = (key(), scene.expired_officer("cy", "Cy").await);
        let ada = scene.renew(&scene.ada, &scene.ada.principal, &own).await.unwrap();
        assert_eq!(code(scene.add_officer(&ada, "eve", "Eve", &own).await), FAILED_PRECONDITION);
        let head_end = scene.t.head_end.principal.clone();
        assert_eq!(code(scene.renew(&ada, &head_end, &own).await), FAILED_PRECONDITION);
        assert_eq!(code(scene.renew(&scene.bo, &scene.bo.principal, &own).await), FAILED_PRECONDITION);
        let proposal = scene.propose_key(&scene.bo, &lost, &own).await.unwrap();
        scene.approve(&ada, &proposal).await.unwrap();
        let renewal = scene.principals().renew(&ada, request_id(), lost, &certification(&own), Some(proposal_id(&proposal))).await;
        assert!(text(renewal).contains("the key is that of a certificate of `urn:meterkms:north:officer:ada`"));
    }

    async fn a_lost_certificate_comes_back_by_two_others(t) {
        let scene = Scene::new(t).await;
        let (lost, new, other) = (scene.expired_officer("cy", "Cy").await, key(), key());
        // Not for machines, and not alone.
        assert_eq!(code(scene.propose_key(&scene.ada, &scene.t.head_end.principal, &new).await), INVALID_ARGUMENT);
        assert_eq!(code(scene.propose_key(&scene.t.auditor, &lost, &new).await), PERMISSION_DENIED);
        let proposal = scene.propose_key(&scene.ada, &lost, &new).await.unwrap();
        assert!(proposal.description.contains(lost.name()) && proposal.description.contains(&hex::encode(certification(&new).spki_sha256())));
        let execute = async |by: &Caller, key: &rcgen::KeyPair| {
            scene.principals().renew(by, request_id(), lost.clone(), &certification(key), Some(proposal_id(&proposal))).await
        };
        assert_eq!(code(execute(&scene.ada, &new).await), FAILED_PRECONDITION);
        scene.approve(&scene.bo, &proposal).await.unwrap();
        assert_eq!(code(execute(&scene.ada, &other).await), FAILED_PRECONDITION, "another key than the approved one");
        assert_eq!(code(scene.change(&scene.ada, &proposal, ProposalChange::Execute).await), FAILED_PRECONDITION, "there is nothing to confirm");
        let cy = caller(&lost, &execute(&scene.ada, &new).await.unwrap());
        assert_eq!(code(execute(&scene.bo, &new).await), FAILED_PRECONDITION, "once");
        assert_eq!(scene.row(&lost).await.certificates.len(), 1, "what was lost has ended");
        assert_eq!(scene.events("principal-recertified").await.len(), 1);
        let shown = scene.principals().who_am_i(&cy).await.unwrap().certificates;
        assert!(matches!(&shown[..], [one] if one.counts && one.in_use && one.enrolment == "proposal" && one.issued_by.ends_with("officer:ada")), "{shown:?}");
        // Cy counts again, also after a renewal.
        let cy = scene.renew(&cy, &lost, &other).await.unwrap();
        let next = scene.propose_key(&scene.ada, &scene.bo.principal, &key()).await.unwrap();
        assert_eq!(scene.approve(&cy, &next).await.unwrap().state, "approved");
    }

    async fn where_officers_are_too_few_the_refusal_tells_the_way_out(t) {
        let scene = Scene::new(t).await;
        let refusal = text(scene.propose_key(&scene.ada, &scene.bo.principal, &key()).await);
        assert!(refusal.contains("kms-server officers recertify urn:meterkms:north:officer:bo"), "{refusal}");
        // Nobody proposes the own key, under whatever principal.
        let alias = scene.add_officer(&scene.ada, "ada-2", "ADA", &key()).await.unwrap();
        scene.expired_officer("cy", "Cy").await;
        assert_eq!(code(scene.propose_key(&scene.ada, &alias.principal, &key()).await), INVALID_ARGUMENT);
    }

    async fn a_thief_who_renews_does_not_push_the_owner_out(t) {
        let scene = Scene::new(t).await;
        let (owner, id) = (scene.t.head_end.clone(), scene.t.head_end.principal.clone());
        let first = request_id();
        let stolen = certification(&key());
        let issued = scene.principals().renew(&owner, first, id.clone(), &stolen, None).await.unwrap();
        let thief = caller(&id, &issued);
        for by in [&owner, &thief, &owner, &thief] {
            let refusal = text(scene.renew(by, &id, &key()).await);
            assert!(refusal.contains("the bound is 2") && refusal.contains("end-certificate"), "{refusal}");
        }
        // An officer drops none either, and the same request again gets its answer.
        assert_eq!(code(scene.renew(&scene.ada, &id, &key()).await), FAILED_PRECONDITION);
        assert_eq!(scene.principals().renew(&owner, first, id.clone(), &stolen, None).await.unwrap(), issued);
        let shown = scene.principals().who_am_i(&owner).await.unwrap().certificates;
        assert!(matches!(&shown[..], [one, two] if one.in_use && !two.in_use && two.enrolment == "own-renewal"), "{shown:?}");

        // Neither ends the other's, nor the own one: an officer does.
        let end = async |by: &Caller, serial: &bytes::Bytes| {
            scene.principals().end_certificate(by, request_id(), id.clone(), serial.to_vec(), String::new()).await
        };
        let serials: Vec<bytes::Bytes> = shown.iter().map(|one| one.serial.clone()).collect();
        for by in [&thief, &owner] {
            for serial in &serials {
                assert_eq!(code(end(by, serial).await), FAILED_PRECONDITION);
            }
        }
        assert!(scene.recorded_refusal("endCertificate").await.contains("would shut the owner out"));
        assert_eq!(code(end(&scene.t.other_head_end, &serials[1]).await), PERMISSION_DENIED);
        assert_eq!(code(end(&scene.ada, &vec![9].into()).await), NOT_FOUND);
        assert_eq!(scene.row(&id).await.certificates.len(), 2);
        end(&scene.ada, &serials[1]).await.unwrap();
        assert_eq!(code(scene.principals().who_am_i(&thief).await), UNAUTHENTICATED);
        scene.principals().who_am_i(&owner).await.unwrap();
        assert_eq!(scene.events("renewal-beyond-bound").await.len(), 2, "once for each who asked");
        // An officer makes a new one, which the owner is told of.
        end(&scene.ada, &serials[0]).await.unwrap();
        assert_eq!(code(scene.principals().who_am_i(&owner).await), UNAUTHENTICATED);
        let owner = scene.renew(&scene.ada, &id, &key()).await.unwrap();
        assert_eq!(scene.events("certificate-made-by-another").await.len(), 1);
        let shown = scene.principals().who_am_i(&owner).await.unwrap().certificates;
        assert!(matches!(&shown[..], [one] if one.issued_by.ends_with("officer:ada") && one.enrolment == "one-person"), "{shown:?}");
    }

    async fn a_row_that_does_not_verify_is_named(t) {
        let scene = Scene::new(t).await;
        let (store, id) = (&scene.t.island.store, scene.t.other_head_end.principal.clone());
        let (kind, name) = principal_row(&id);
        let mut row = store.sealed(kind, &name).await.unwrap().unwrap();
        (row.generation, row.seal[2]) = (row.generation + 1, row.seal[2] ^ 1);
        let sealed = vec![kms_store::SealedPut { kind, id: name, row }];
        let changes = kms_store::Changes { sealed, ..kms_store::Changes::default() };
        let mut put = |_: &kms_store::ReadSet| kms_store::Decision::Commit(Box::new(changes.clone()));
        store.transact(Reads::default(), &mut put).await.unwrap();
        // I6: whether it has the same key cannot be told, so nobody gets one; and the refusal says
        // why.
        let head_end = scene.t.head_end.clone();
        for refusal in [text(scene.renew(&head_end, &head_end.principal, &key()).await), text(scene.principals().list(&scene.ada).await)] {
            assert!(refusal.contains(&format!("the row of `{id}` does not verify")), "{refusal}");
        }
        assert_eq!(scene.row(&head_end.principal).await.certificates.len(), 1);
    }

    async fn an_officer_who_can_act_always_remains(t) {
        let scene = Scene::new(t).await;
        let (other, id) = (scene.t.another_server().await, |caller: &Caller| caller.principal.clone());
        // One who cannot call any more is no officer that remains.
        scene.expired_officer("cy", "Cy").await;
        let (one, two) = (scene.principals(), scene.principals_of(&other));
        let (first, second) = tokio::join!(
            one.disable(&scene.ada, request_id(), id(&scene.ada), "at the same moment".to_owned()),
            two.disable(&scene.bo, request_id(), id(&scene.bo), "at the same moment".to_owned()),
        );
        assert!(first.is_ok() != second.is_ok(), "{first:?} {second:?}");
        let (remaining, refusal) = if first.is_ok() { (&scene.bo, second) } else { (&scene.ada, first) };
        assert!(text(refusal).contains("the last enabled officer"));
        // Its last certificate stays, too, whatever policies say.
        scene.permit_everything();
        let serial = scene.row(&remaining.principal).await.certificates[0].serial.to_vec();
        let end = one.end_certificate(&scene.t.head_end, request_id(), id(remaining), serial, String::new());
        assert!(text(end.await).contains("the last enabled officer"));
        assert_eq!(code(one.disable(remaining, request_id(), id(remaining), String::new()).await), FAILED_PRECONDITION);
    }

    async fn two_officers_who_disable_each_other_leave_one(t) {
        let scene = Scene::new(t).await;
        let other = scene.t.another_server().await;
        let (one, two) = (scene.principals(), scene.principals_of(&other));
        let (first, second) = tokio::join!(
            one.disable(&scene.ada, request_id(), scene.bo.principal.clone(), String::new()),
            two.disable(&scene.bo, request_id(), scene.ada.principal.clone(), String::new()),
        );
        assert!(first.is_ok() != second.is_ok(), "{first:?} {second:?}");
    }

    async fn two_principals_that_are_added_at_once_share_no_title_and_no_key(t) {
        let scene = Scene::new(t).await;
        let other = scene.t.another_server().await;
        for round in 0..8 {
            let title = [SystemTitle::from_octets(&[b'T', b'T', b'T', 0, 0, 0, 0, round]).unwrap()];
            let names = [format!("one-{round}"), format!("two-{round}")];
            let (first, second) = tokio::join!(scene.add_head_end(&scene.t.island, &names[0], &title), scene.add_head_end(&other, &names[1], &title));
            assert!(first.is_ok() != second.is_ok(), "{first:?} {second:?}");
            assert!(text(if first.is_ok() { second } else { first }).contains("belongs to"));
            let shared = key();
            let renew = async |on: &Arc<IslandContext>, by: &Caller| {
                scene.principals_of(on).renew(by, request_id(), by.principal.clone(), &certification(&shared), None).await
            };
            if round == 0 {
                let (first, second) = tokio::join!(renew(&scene.t.island, &scene.t.head_end), renew(&other, &scene.t.other_head_end));
                assert!(first.is_ok() != second.is_ok(), "{first:?} {second:?}");
            }
        }
    }

    /// Officers add and renew it as they do machines; and whatever policies permit, it has nothing
    /// that keys need.
    async fn a_service_account_is_a_machine_without_keys(t) {
        let scene = Scene::new(t).await;
        let id = scene.id(Role::ServiceAccount, "wfm");
        let new = |titles: Vec<SystemTitle>| NewPrincipal {
            request: request_id(),
            id: id.clone(),
            certification: Some(certification(&key())),
            person: None,
            client_titles: titles,
            shipment_key: None,
        };
        let title = SystemTitle::parse("4D4D4D0000000055").unwrap();
        assert!(text(scene.principals().add(&scene.ada, new(vec![title])).await).contains("gets no keys"));
        let issued = scene.principals().add(&scene.ada, new(Vec::new())).await.unwrap();
        let account = caller(&id, &issued);
        scene.renew(&scene.ada, &id, &key()).await.unwrap();
        let transport = async || {
            scene.principals().register_transport_key(&account, request_id(), &certification(&key())).await
        };
        assert_eq!(code(transport().await), PERMISSION_DENIED);
        scene.permit_everything();
        assert_eq!(code(transport().await), INVALID_ARGUMENT);
        assert!(scene.row(&id).await.transport.is_none());
        scene.principals().disable(&scene.ada, request_id(), id.clone(), "stolen".to_owned()).await.unwrap();
        assert_eq!(code(scene.principals().who_am_i(&account).await), UNAUTHENTICATED);
    }

    /// I6: the person of a handheld is its technician, and is nobody where people are counted.
    async fn i6_a_technician_is_no_person(t) {
        let scene = Scene::new(t).await;
        let handheld = scene.t.member(Role::Handheld, "hh-1", Some("Ida Berg"), 60).await;
        scene.permit_everything();
        let cy = scene.add_officer(&scene.ada, "cy", "Cy", &key()).await.unwrap();
        let proposal = scene.propose_key(&handheld, &cy.principal, &key()).await;
        assert_eq!(code(proposal), PERMISSION_DENIED);
    }
}
