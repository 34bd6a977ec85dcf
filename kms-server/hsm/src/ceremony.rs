//! The ceremony: makes an island's roots in a token, lets each AES root leave once, wrapped for the
//! escrow key and for standby tokens, and then locks it for good.
//!
//! The order is what makes it safe to crash anywhere: all roots are made, all are wrapped, the
//! caller stores the wraps durably, and only then are the roots locked. Running it again finishes
//! what was begun. A root that is locked although no stored package has it can never be escrowed;
//! it is named, and the ceremony refuses to go on.

use aws_lc_rs::digest::{SHA256, digest};
use cryptoki::slot::Slot;
use cryptoki_sys::*;
use kms_domain::{IslandName, KeyClass, KeyDerivation, OaepHash};
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo;

use crate::envelope::{P256_OID, public_point};
use crate::error::HsmError;
use crate::label::{Purpose, TokenKey};
use crate::module::{Module, TokenSelector};
use crate::pin::Pin;
use crate::probe::{Capabilities, rsa_public_key_der};
use crate::raw::{Attribute, Mechanism, Object, Session};
use crate::template::Template;
use crate::worker::find_one;

/// What the ceremony makes in one token.
#[derive(Clone, Debug)]
pub struct CeremonyPlan {
    /// The island.
    pub island: IslandName,
    /// Classes whose roots the token gets; with [`KeyClass::Ca`], the CA's key pair.
    pub classes: Vec<KeyClass>,
    /// Whether the token gets the keys of no class: seal root, fingerprint KEK, audit signing key,
    /// vendor transport key.
    pub general: bool,
    /// The custodians' escrow key: DER of an RSA SubjectPublicKeyInfo, at least 3072 bits.
    pub escrow_public_key: Vec<u8>,
    /// Tokens that get copies of roots.
    pub standby: Vec<StandbyToken>,
}

/// A token that gets copies of roots.
#[derive(Clone, Debug)]
pub struct StandbyToken {
    /// Its transport key ([`create_standby_transport`]): DER of an RSA SubjectPublicKeyInfo, at
    /// least 3072 bits.
    pub public_key: Vec<u8>,
    /// Classes whose roots it gets. Seal root and fingerprint KEK, which belong to no class, it
    /// always gets.
    pub classes: Vec<KeyClass>,
}

impl StandbyToken {
    /// Whether the token gets this root.
    fn gets(&self, purpose: Purpose) -> bool {
        match purpose {
            Purpose::Diversification(class) | Purpose::StorageKek(class) => self.classes.contains(&class),
            // A server without the seal root could not read a row.
            other => other.is_root(),
        }
    }
}

/// A root as it left the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrappedRoot {
    /// Which root; its label names it in files.
    pub key: TokenKey,
    /// CKA_CHECK_VALUE, 3 octets; empty where the module has none.
    pub check_value: Vec<u8>,
    /// RSA-OAEP (the package's hash, MGF1 with the same, no label) of the 32 octets.
    pub wrapped: Vec<u8>,
}

/// The roots for one holder of an RSA key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrappedRoots {
    /// SHA-256 of the holder's SubjectPublicKeyInfo.
    pub recipient_sha256: [u8; 32],
    /// Hash of RSA-OAEP.
    pub oaep_hash: OaepHash,
    /// The roots.
    pub roots: Vec<WrappedRoot>,
}

/// What must be stored before the roots are locked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EscrowPackage {
    /// The island.
    pub island: IslandName,
    /// For the custodians.
    pub escrow: WrappedRoots,
    /// For the standby tokens, in the order of the plan.
    pub standby: Vec<WrappedRoots>,
}

/// A key that the ceremony made or found, for the printed record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyFingerprint {
    /// CKA_LABEL.
    pub label: String,
    /// `check value` (roots) or `SHA-256` (of a public key: EC point, RSA SubjectPublicKeyInfo).
    pub kind: &'static str,
    /// The fingerprint.
    pub value: Vec<u8>,
}

/// What came of a ceremony.
#[derive(Clone, Debug)]
pub struct CeremonyResult {
    /// As it was given to be stored.
    pub package: EscrowPackage,
    /// Every key, for the printed record.
    pub fingerprints: Vec<KeyFingerprint>,
    /// How the diversification roots derive keys, to be recorded with their version; none if the
    /// module cannot derive.
    pub derivation: Option<KeyDerivation>,
    /// What the module can do.
    pub capabilities: Capabilities,
}

/// Makes, escrows and locks the roots of a token. Blocking; not while the token is in use in this
/// process, because it logs in as security officer and out again.
///
/// `persist` must store the package durably. If it fails, nothing is locked, and the ceremony can
/// be run again. `previous` is the package that an interrupted ceremony stored, if there is one.
///
/// # Errors
/// [`HsmError::Ceremony`] names what is in the way and what to do; other errors are the token's.
pub fn create_roots(
    module: &Module,
    token: &TokenSelector,
    so_pin: &Pin,
    user_pin: &Pin,
    plan: &CeremonyPlan,
    previous: Option<&EscrowPackage>,
    persist: impl FnOnce(&EscrowPackage) -> Result<(), String>,
) -> Result<CeremonyResult, HsmError> {
    let escrow = RsaPublicKey::parse(&plan.escrow_public_key)?;
    let standby =
        plan.standby.iter().map(|token| RsaPublicKey::parse(&token.public_key)).collect::<Result<Vec<_>, _>>()?;
    let slot = find_slot(module, token)?;
    let (capabilities, oaep_hash) = capabilities(module, slot, user_pin)?;

    let mut recipients = vec![(TokenKey::first(Purpose::Escrow), escrow)];
    recipients
        .extend((0..).zip(standby).map(|(number, key)| (TokenKey::first(Purpose::StandbyRecipient(number)), key)));
    let trusted =
        logged_in(module, slot, CKU_SO, so_pin, |session| install_recipients(session, &plan.island, &recipients))?;

    logged_in(module, slot, CKU_USER, user_pin, |session| {
        let ceremony = Ceremony {
            session,
            plan,
            capabilities: &capabilities,
            oaep_hash,
            trusted: trusted && capabilities.wrap_with_trusted,
        };
        let roots =
            ceremony.roots().into_iter().map(|key| ceremony.root(key, previous)).collect::<Result<Vec<_>, _>>()?;
        let mut fingerprints = ceremony.key_pairs()?;
        let mut wrapped = recipients
            .iter()
            .enumerate()
            .map(|(index, (key, recipient))| ceremony.wrap_all(*key, recipient, &roots, previous, index))
            .collect::<Result<Vec<_>, _>>()?;
        let package = EscrowPackage { island: plan.island.clone(), escrow: wrapped.remove(0), standby: wrapped };
        for root in &package.escrow.roots {
            fingerprints.push(KeyFingerprint {
                label: root.key.label(&plan.island),
                kind: "check value",
                value: root.check_value.clone(),
            });
        }
        persist(&package).map_err(|reason| HsmError::Ceremony {
            reason: format!("the escrow package could not be stored ({reason}); no root is locked"),
            next_step: "make room for the package and run the ceremony again".to_owned(),
        })?;
        for root in &roots {
            ceremony.lock(root)?;
        }
        let derives = plan.classes.iter().any(|class| *class != KeyClass::Ca);
        Ok(CeremonyResult {
            package,
            fingerprints,
            derivation: capabilities.key_derivation().filter(|_| derives),
            capabilities: capabilities.clone(),
        })
    })
}

/// A version of a root that is made after the ceremony.
#[derive(Clone, Debug)]
pub struct NewRoot {
    /// The island.
    pub island: IslandName,
    /// Purpose and version. A symmetric root, or [`Purpose::VendorTransport`].
    pub key: TokenKey,
    /// The escrow key of the ceremony, DER: it must be the one that the token holds.
    pub escrow_public_key: Vec<u8>,
    /// The standby tokens of the ceremony that get a copy, by their numbers, from 0.
    pub standby: Vec<u8>,
    /// Those that get none. Each must be in one list: the root leaves once, so a copy that was
    /// forgotten can never be made.
    pub without: Vec<u8>,
}

impl NewRoot {
    /// Whether it is said of every standby token that the ceremony knew if it gets a copy.
    fn names_all_standby_tokens(&self, session: &Session) -> Result<(), HsmError> {
        for number in 0..u8::MAX {
            match find_one(
                session,
                &TokenKey::first(Purpose::StandbyRecipient(number)).label(&self.island),
                CKO_PUBLIC_KEY,
            ) {
                // The ceremony numbers them without gaps.
                Err(HsmError::KeyMissing { .. }) => break,
                Err(error) => return Err(error),
                Ok(_) if self.standby.contains(&number) || self.without.contains(&number) => {}
                Ok(_) => {
                    let name = number + 1;
                    return Err(HsmError::Ceremony {
                        reason: format!(
                            "it is not said whether the standby token of `[[copy]]` {name} of the ceremony file gets a copy"
                        ),
                        next_step: format!(
                            "add `--copy {name}`, or `--no-copy {name}` if it does not serve the class; no copy can be made later"
                        ),
                    });
                }
            }
        }
        Ok(())
    }
}

/// What came of a new version of a root.
#[derive(Clone, Debug)]
pub struct NewRootResult {
    /// Its fingerprint.
    pub fingerprint: KeyFingerprint,
    /// How a diversification root derives.
    pub derivation: Option<KeyDerivation>,
    /// As it was given to be stored; none for a key pair, which never leaves.
    pub package: Option<EscrowPackage>,
}

/// Makes another version of a root: a symmetric one is wrapped for the escrow key and for standby
/// tokens, stored by `persist`, and then locked, as in [`create_roots`]; a key pair is made and
/// never leaves. Run again after an interruption with the package that was stored then, it goes on.
/// Blocking; not while the token is in use in this process.
///
/// No security officer is needed: the keys that roots may leave under are in the token since the
/// ceremony, and none is added here.
///
/// # Errors
/// [`HsmError::Ceremony`] names what is in the way and what to do; other errors are the token's.
pub fn create_root_version(
    module: &Module,
    token: &TokenSelector,
    user_pin: &Pin,
    new: &NewRoot,
    previous: Option<&EscrowPackage>,
    persist: impl FnOnce(&EscrowPackage) -> Result<(), String>,
) -> Result<NewRootResult, HsmError> {
    let escrow = RsaPublicKey::parse(&new.escrow_public_key)?;
    let slot = find_slot(module, token)?;
    let (capabilities, oaep_hash) = capabilities(module, slot, user_pin)?;
    logged_in(module, slot, CKU_USER, user_pin, |session| {
        if new.key.purpose == Purpose::VendorTransport {
            let public = rsa_pair(session, &new.island, new.key)?;
            let value = digest(&SHA256, &rsa_public_key_der(session, public)?.unwrap_or_default()).as_ref().to_vec();
            let fingerprint = KeyFingerprint { label: new.key.label(&new.island), kind: "SHA-256", value };
            return Ok(NewRootResult { fingerprint, derivation: None, package: None });
        }
        let class = match new.key.purpose {
            Purpose::Diversification(class) | Purpose::StorageKek(class) => Some(class),
            Purpose::Seal => None,
            other => return Err(HsmError::invalid("root", format!("`{other}` has no versions"))),
        };
        new.names_all_standby_tokens(session)?;
        let mut recipients = vec![(TokenKey::first(Purpose::Escrow), escrow)];
        for number in &new.standby {
            let key = TokenKey::first(Purpose::StandbyRecipient(*number));
            let object = find_one(session, &key.label(&new.island), CKO_PUBLIC_KEY)?;
            recipients.push((key, RsaPublicKey::parse(&rsa_public_key_der(session, object)?.unwrap_or_default())?));
        }
        let trusted = known_recipients(session, &new.island, &recipients)?;
        let classes: Vec<KeyClass> = class.into_iter().collect();
        let standby =
            new.standby.iter().map(|_| StandbyToken { public_key: Vec::new(), classes: classes.clone() }).collect();
        let plan = CeremonyPlan {
            island: new.island.clone(),
            classes,
            general: false,
            escrow_public_key: new.escrow_public_key.clone(),
            standby,
        };
        let ceremony = Ceremony {
            session,
            plan: &plan,
            capabilities: &capabilities,
            oaep_hash,
            trusted: trusted && capabilities.wrap_with_trusted,
        };
        let root = ceremony.root(new.key, previous)?;
        let mut wrapped = recipients
            .iter()
            .enumerate()
            .map(|(index, (key, recipient))| {
                ceremony.wrap_all(*key, recipient, std::slice::from_ref(&root), previous, index)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let package = EscrowPackage { island: new.island.clone(), escrow: wrapped.remove(0), standby: wrapped };
        persist(&package).map_err(|reason| HsmError::Ceremony {
            reason: format!("the escrow package could not be stored ({reason}); the new root is not locked"),
            next_step: "make room for the package and run the command again".to_owned(),
        })?;
        ceremony.lock(&root)?;
        let fingerprint =
            KeyFingerprint { label: new.key.label(&new.island), kind: "check value", value: root.check_value };
        let derivation =
            capabilities.key_derivation().filter(|_| matches!(new.key.purpose, Purpose::Diversification(_)));
        Ok(NewRootResult { fingerprint, derivation, package: Some(package) })
    })
}

/// Makes the key pair under which a standby token receives roots: DER of its SubjectPublicKeyInfo,
/// for the plan of the ceremony. Run again, it gives the same key. Blocking; not while the token is
/// in use in this process.
///
/// # Errors
/// The token's.
pub fn create_standby_transport(
    module: &Module,
    token: &TokenSelector,
    user_pin: &Pin,
    island: &IslandName,
) -> Result<Vec<u8>, HsmError> {
    let slot = find_slot(module, token)?;
    logged_in(module, slot, CKU_USER, user_pin, |session| {
        let public = rsa_pair(session, island, TokenKey::first(Purpose::StandbyTransport))?;
        rsa_public_key_der(session, public)?
            .ok_or_else(|| HsmError::invalid("standby transport key", "the token's public key has no modulus"))
    })
}

/// Installs copies of roots in a standby token, locked from the start. Roots that are there already
/// are left alone if their check values agree. Blocking; not while the token is in use in this
/// process.
///
/// # Errors
/// The copies are for another token, do not unwrap, or a different root is there.
pub fn install_wrapped_roots(
    module: &Module,
    token: &TokenSelector,
    user_pin: &Pin,
    island: &IslandName,
    copies: &WrappedRoots,
) -> Result<Vec<KeyFingerprint>, HsmError> {
    let slot = find_slot(module, token)?;
    let (capabilities, _) = capabilities(module, slot, user_pin)?;
    logged_in(module, slot, CKU_USER, user_pin, |session| {
        let transport = TokenKey::first(Purpose::StandbyTransport);
        let public = find_one(session, &transport.label(island), CKO_PUBLIC_KEY)?;
        let own = rsa_public_key_der(session, public)?.unwrap_or_default();
        if digest(&SHA256, &own).as_ref() != copies.recipient_sha256 {
            return Err(HsmError::Ceremony {
                reason: "the copies of roots are for another standby token".to_owned(),
                next_step: "choose the copies whose recipient is the SHA-256 of this token's transport key".to_owned(),
            });
        }
        let private = find_one(session, &transport.label(island), CKO_PRIVATE_KEY)?;
        copies
            .roots
            .iter()
            .map(|root| install_root(session, island, private, copies.oaep_hash, root, &capabilities))
            .collect()
    })
}

struct Ceremony<'a> {
    session: &'a Session,
    plan: &'a CeremonyPlan,
    capabilities: &'a Capabilities,
    oaep_hash: OaepHash,
    /// Whether the recipients' keys are trusted and the module enforces CKA_WRAP_WITH_TRUSTED.
    trusted: bool,
}

struct Root {
    key: TokenKey,
    object: Object,
    locked: bool,
    check_value: Vec<u8>,
}

impl Ceremony<'_> {
    fn roots(&self) -> Vec<TokenKey> {
        let mut purposes = Vec::new();
        for class in KeyClass::WITH_ROOTS.into_iter().filter(|class| self.plan.classes.contains(class)) {
            if self.capabilities.key_derivation().is_some() {
                purposes.push(Purpose::Diversification(class));
            }
            purposes.push(Purpose::StorageKek(class));
        }
        if self.plan.general {
            purposes.extend([Purpose::Seal, Purpose::FingerprintKek]);
        }
        purposes.into_iter().map(TokenKey::first).collect()
    }

    /// Finds or makes a root.
    fn root(&self, key: TokenKey, previous: Option<&EscrowPackage>) -> Result<Root, HsmError> {
        let label = key.label(&self.plan.island);
        let object = match find_one(self.session, &label, CKO_SECRET_KEY) {
            Ok(object) => object,
            Err(HsmError::KeyMissing { .. }) => {
                let octets = ROOT_OCTETS;
                let id = key.id(&self.plan.island);
                let mechanism = if key.purpose == Purpose::Seal { CKM_GENERIC_SECRET_KEY_GEN } else { CKM_AES_KEY_GEN };
                with_root_template(key, &label, &id, self.capabilities, |template| {
                    let template = template
                        .flag(CKA_EXTRACTABLE, true)
                        .flag(CKA_WRAP_WITH_TRUSTED, self.trusted)
                        .number(CKA_VALUE_LEN, &octets);
                    self.session.generate(mechanism, template.as_slice())
                })?
            }
            Err(error) => return Err(error),
        };
        let locked = self.session.flag(object, CKA_EXTRACTABLE)? == Some(false);
        let escrowed = previous.is_some_and(|package| package.escrow.roots.iter().any(|root| root.key == key));
        if locked && !escrowed {
            return Err(HsmError::Ceremony {
                reason: format!("the root `{label}` is locked, and no escrow package that was given holds it, so it can never be escrowed"),
                next_step: "give the package that the earlier ceremony stored; if there is none, remove this root (or wipe the token, if no key was made from it) and run the ceremony again".to_owned(),
            });
        }
        let check_value =
            self.session.attribute(object, CKA_CHECK_VALUE)?.map(|value| value.to_vec()).unwrap_or_default();
        Ok(Root { key, object, locked, check_value })
    }

    /// Wraps the roots that one recipient gets; what is locked already is taken from the stored
    /// package. The recipients are the escrow key, which gets all roots, and then the standby
    /// tokens in the order of the plan.
    fn wrap_all(
        &self,
        recipient: TokenKey,
        public: &RsaPublicKey,
        roots: &[Root],
        previous: Option<&EscrowPackage>,
        index: usize,
    ) -> Result<WrappedRoots, HsmError> {
        let token = index.checked_sub(1).and_then(|number| self.plan.standby.get(number));
        let stored = previous.and_then(|package| match index {
            0 => Some(&package.escrow),
            _ => package.standby.get(index - 1),
        });
        let recipient_object = find_one(self.session, &recipient.label(&self.plan.island), CKO_PUBLIC_KEY)?;
        let mut wrapped = Vec::with_capacity(roots.len());
        // I1: a root of another class never leaves for this token, not even wrapped: its transport
        // key would open it at any later time.
        for root in roots.iter().filter(|root| token.is_none_or(|token| token.gets(root.key.purpose))) {
            if root.locked {
                let known = stored
                    .filter(|stored| stored.recipient_sha256 == public.sha256)
                    .and_then(|stored| stored.roots.iter().find(|known| known.key == root.key));
                wrapped.push(known.cloned().ok_or_else(|| HsmError::Ceremony {
                    reason: format!(
                        "the root `{}` is locked, and the stored package has no copy of it for `{}`",
                        root.key.label(&self.plan.island),
                        recipient.purpose
                    ),
                    next_step: "run the ceremony with the same escrow and standby keys as before; a recipient cannot be added later".to_owned(),
                })?);
                continue;
            }
            let mut buffer = [0; 1024];
            let written =
                self.session.wrap(&Mechanism::Oaep(self.oaep_hash), recipient_object, root.object, &mut buffer)?;
            let octets = buffer.get(..written.min(public.octets())).unwrap_or_default().to_vec();
            wrapped.push(WrappedRoot { key: root.key, check_value: root.check_value.clone(), wrapped: octets });
        }
        let oaep_hash =
            stored.filter(|_| roots.iter().all(|root| root.locked)).map_or(self.oaep_hash, |stored| stored.oaep_hash);
        Ok(WrappedRoots { recipient_sha256: public.sha256, oaep_hash, roots: wrapped })
    }

    /// Takes CKA_EXTRACTABLE away and proves that it stays away.
    fn lock(&self, root: &Root) -> Result<(), HsmError> {
        let label = root.key.label(&self.plan.island);
        if !root.locked {
            self.session.set_attributes(root.object, &[Attribute::flag(CKA_EXTRACTABLE, false)])?;
        }
        let open = |what: &str| HsmError::Ceremony {
            reason: format!("the root `{label}` is not locked: {what}"),
            next_step: "do not use this token; the module does not keep CKA_EXTRACTABLE=false".to_owned(),
        };
        if self.session.flag(root.object, CKA_EXTRACTABLE)? != Some(false) {
            return Err(open("CKA_EXTRACTABLE still reads true"));
        }
        let escrow =
            find_one(self.session, &TokenKey::first(Purpose::Escrow).label(&self.plan.island), CKO_PUBLIC_KEY)?;
        if self.session.wrap(&Mechanism::Oaep(self.oaep_hash), escrow, root.object, &mut [0; 1024]).is_ok() {
            return Err(open("it can still be wrapped"));
        }
        if self.session.set_attributes(root.object, &[Attribute::flag(CKA_EXTRACTABLE, true)]).is_ok() {
            return Err(open("CKA_EXTRACTABLE could be set back"));
        }
        let copy = Template::empty().flag(CKA_TOKEN, false).flag(CKA_EXTRACTABLE, true);
        if let Ok(copy) = self.session.copy(root.object, copy.as_slice()) {
            self.session.destroy(copy)?;
            return Err(open("a copy of it can be extractable"));
        }
        Ok(())
    }

    fn key_pairs(&self) -> Result<Vec<KeyFingerprint>, HsmError> {
        let island = &self.plan.island;
        let mut fingerprints = Vec::new();
        let mut add = |key: TokenKey, public: &[u8]| {
            fingerprints.push(KeyFingerprint {
                label: key.label(island),
                kind: "SHA-256",
                value: digest(&SHA256, public).as_ref().to_vec(),
            })
        };
        let mut signing = Vec::new();
        if self.plan.general {
            signing.push(TokenKey::first(Purpose::AuditSign));
        }
        if self.plan.classes.contains(&KeyClass::Ca) {
            signing.push(TokenKey::first(Purpose::Ca));
        }
        for key in signing {
            let public = p256_pair(self.session, island, key)?;
            add(key, &public_point(self.session, public)?);
        }
        if self.plan.general {
            let key = TokenKey::first(Purpose::VendorTransport);
            let public = rsa_pair(self.session, island, key)?;
            add(key, &rsa_public_key_der(self.session, public)?.unwrap_or_default());
        }
        Ok(fingerprints)
    }
}

/// An RSA public key from outside.
struct RsaPublicKey {
    modulus: Vec<u8>,
    exponent: Vec<u8>,
    sha256: [u8; 32],
}

impl RsaPublicKey {
    fn parse(der: &[u8]) -> Result<Self, HsmError> {
        let refuse = |reason: &str| HsmError::invalid("escrow or standby public key", reason.to_owned());
        let (rest, spki) = SubjectPublicKeyInfo::from_der(der)
            .map_err(|_| refuse("it is no DER SubjectPublicKeyInfo (`openssl pkey -pubout -outform DER`)"))?;
        if !rest.is_empty() {
            return Err(refuse("octets follow the SubjectPublicKeyInfo"));
        }
        let Ok(PublicKey::RSA(key)) = spki.parsed() else { return Err(refuse("it is no RSA key")) };
        let trimmed = |octets: &[u8]| octets.iter().copied().skip_while(|octet| *octet == 0).collect::<Vec<u8>>();
        let (modulus, exponent) = (trimmed(key.modulus), trimmed(key.exponent));
        if !(SHORTEST_RSA..=LONGEST_RSA).contains(&modulus.len()) {
            return Err(refuse("it has not 3072 to 8192 bits"));
        }
        let mut sha256 = [0; 32];
        sha256.iter_mut().zip(digest(&SHA256, der).as_ref()).for_each(|(place, octet)| *place = *octet);
        Ok(Self { modulus, exponent, sha256 })
    }

    fn octets(&self) -> usize {
        self.modulus.len()
    }
}

/// As security officer: creates the public keys that roots may leave under, trusted if the module
/// can. Whether all are trusted.
fn install_recipients(
    session: &Session,
    island: &IslandName,
    recipients: &[(TokenKey, RsaPublicKey)],
) -> Result<bool, HsmError> {
    let mut all_trusted = true;
    for (key, public) in recipients {
        let label = key.label(island);
        match find_one(session, &label, CKO_PUBLIC_KEY) {
            Ok(object) => {
                let modulus = session.attribute(object, CKA_MODULUS)?.unwrap_or_default();
                if !modulus.ends_with(&public.modulus) {
                    return Err(HsmError::Ceremony {
                        reason: format!("the token already holds another key labelled `{label}`"),
                        next_step:
                            "use the key of the ceremony that was begun, or remove that object as security officer"
                                .to_owned(),
                    });
                }
                all_trusted &= session.flag(object, CKA_TRUSTED)? == Some(true);
            }
            Err(HsmError::KeyMissing { .. }) => {
                let id = key.id(island);
                let template = |trusted: bool| {
                    let template = Template::empty()
                        .number(CKA_CLASS, &CKO_PUBLIC_KEY)
                        .number(CKA_KEY_TYPE, &CKK_RSA)
                        .flag(CKA_TOKEN, true)
                        .flag(CKA_PRIVATE, false)
                        .octets(CKA_LABEL, label.as_bytes())
                        .octets(CKA_ID, &id)
                        .octets(CKA_MODULUS, &public.modulus)
                        .octets(CKA_PUBLIC_EXPONENT, &public.exponent)
                        .flag(CKA_WRAP, true)
                        .flag(CKA_ENCRYPT, false)
                        .flag(CKA_VERIFY, false);
                    if trusted { template.flag(CKA_TRUSTED, true) } else { template }
                };
                if session.create(template(true).as_slice()).is_err() {
                    // A module without CKA_TRUSTED: the lock after the ceremony is what remains.
                    session.create(template(false).as_slice())?;
                    all_trusted = false;
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(all_trusted)
}

/// Checks that the token holds these keys, which the security officer put there in the ceremony.
/// Whether all are trusted.
fn known_recipients(
    session: &Session,
    island: &IslandName,
    recipients: &[(TokenKey, RsaPublicKey)],
) -> Result<bool, HsmError> {
    let mut all_trusted = true;
    for (key, public) in recipients {
        let label = key.label(island);
        let object = find_one(session, &label, CKO_PUBLIC_KEY)?;
        if !session.attribute(object, CKA_MODULUS)?.unwrap_or_default().ends_with(&public.modulus) {
            return Err(HsmError::Ceremony {
                reason: format!("the key `{label}` in the token is not that of the escrow file"),
                next_step: "give the newest escrow file of this island's ceremony".to_owned(),
            });
        }
        all_trusted &= session.flag(object, CKA_TRUSTED)? == Some(true);
    }
    Ok(all_trusted)
}

fn install_root(
    session: &Session,
    island: &IslandName,
    private: Object,
    hash: OaepHash,
    root: &WrappedRoot,
    capabilities: &Capabilities,
) -> Result<KeyFingerprint, HsmError> {
    let label = root.key.label(island);
    let object = match find_one(session, &label, CKO_SECRET_KEY) {
        Ok(object) => object,
        Err(HsmError::KeyMissing { .. }) => {
            let id = root.key.id(island);
            with_root_template(root.key, &label, &id, capabilities, |template| {
                let mut template = template.flag(CKA_EXTRACTABLE, false);
                if capabilities.wrap_with_trusted {
                    template = template.flag(CKA_WRAP_WITH_TRUSTED, true);
                }
                session.unwrap(&Mechanism::Oaep(hash), private, &root.wrapped, template.as_slice())
            })?
        }
        Err(error) => return Err(error),
    };
    let check_value = session.attribute(object, CKA_CHECK_VALUE)?.map(|value| value.to_vec()).unwrap_or_default();
    if !check_value.is_empty() && !root.check_value.is_empty() && check_value != root.check_value {
        return Err(HsmError::Ceremony {
            reason: format!("the root `{label}` in this token is not the one of the copies (check values differ)"),
            next_step: "remove the object from this token if it was never used, and install again".to_owned(),
        });
    }
    Ok(KeyFingerprint { label, kind: "check value", value: check_value })
}

/// Calls `make` with all attributes of a root but EXTRACTABLE, WRAP_WITH_TRUSTED and VALUE_LEN.
fn with_root_template<R>(
    key: TokenKey,
    label: &str,
    id: &[u8],
    capabilities: &Capabilities,
    make: impl FnOnce(Template<'_>) -> R,
) -> R {
    let sensitive_only = [Attribute::flag(CKA_SENSITIVE, true)];
    // I1: GAKs and secrets may be read as session objects for one call, so their roots have no such
    // template; all others have.
    let class_is_read = |class| class == KeyClass::Authentication;
    let (usages, mechanisms): (&[CK_ATTRIBUTE_TYPE], &[CK_MECHANISM_TYPE]) = match key.purpose {
        Purpose::Diversification(_) if capabilities.key_derivation() == Some(KeyDerivation::Sp800108Cmac) => {
            (&[CKA_DERIVE], &[CKM_SP800_108_COUNTER_KDF])
        }
        Purpose::Diversification(_) => (&[CKA_DERIVE], &[CKM_AES_CBC_ENCRYPT_DATA]),
        Purpose::StorageKek(_) => (&[CKA_WRAP, CKA_UNWRAP], &[CKM_AES_KEY_WRAP]),
        Purpose::FingerprintKek => (&[CKA_WRAP], &[CKM_AES_KEY_WRAP]),
        _ => (&[CKA_SIGN], &[CKM_SHA256_HMAC]),
    };
    let mut template = Template::empty()
        .number(CKA_CLASS, &CKO_SECRET_KEY)
        .number(CKA_KEY_TYPE, if key.purpose == Purpose::Seal { &CKK_GENERIC_SECRET } else { &CKK_AES })
        .flag(CKA_TOKEN, true)
        .flag(CKA_PRIVATE, true)
        .flag(CKA_SENSITIVE, true)
        .octets(CKA_LABEL, label.as_bytes())
        .octets(CKA_ID, id)
        .usage(usages);
    if capabilities.allowed_mechanisms {
        template = template.with(Attribute::numbers(CKA_ALLOWED_MECHANISMS, mechanisms));
    }
    match key.purpose {
        Purpose::StorageKek(class) if capabilities.unwrap_template && !class_is_read(class) => {
            template = template.with(Attribute::template(CKA_UNWRAP_TEMPLATE, &sensitive_only))
        }
        Purpose::Diversification(class) if capabilities.derive_template && !class_is_read(class) => {
            template = template.with(Attribute::template(CKA_DERIVE_TEMPLATE, &sensitive_only))
        }
        _ => {}
    }
    make(template)
}

/// Finds or makes a P-256 signing key pair: the public key.
fn p256_pair(session: &Session, island: &IslandName, key: TokenKey) -> Result<Object, HsmError> {
    find_or_make_pair(session, island, key, |label, id| {
        let public = public_template(label, id).octets(CKA_EC_PARAMS, P256_OID).flag(CKA_VERIFY, true);
        let private = private_template(label, id).private_usage(&[CKA_SIGN]);
        session.generate_pair(CKM_EC_KEY_PAIR_GEN, public.as_slice(), private.as_slice())
    })
}

/// Finds or makes an RSA-3072 unwrapping key pair: the public key.
fn rsa_pair(session: &Session, island: &IslandName, key: TokenKey) -> Result<Object, HsmError> {
    let bits = 3072 as CK_ULONG;
    find_or_make_pair(session, island, key, |label, id| {
        let public = public_template(label, id)
            .number(CKA_MODULUS_BITS, &bits)
            .octets(CKA_PUBLIC_EXPONENT, &[1, 0, 1])
            .flag(CKA_WRAP, true)
            .flag(CKA_ENCRYPT, false)
            .flag(CKA_VERIFY, false);
        let private = private_template(label, id).private_usage(&[CKA_UNWRAP]);
        session.generate_pair(CKM_RSA_PKCS_KEY_PAIR_GEN, public.as_slice(), private.as_slice())
    })
}

fn find_or_make_pair(
    session: &Session,
    island: &IslandName,
    key: TokenKey,
    make: impl FnOnce(&str, &[u8]) -> Result<(Object, Object), HsmError>,
) -> Result<Object, HsmError> {
    let (label, id) = (key.label(island), key.id(island));
    match (find_one(session, &label, CKO_PUBLIC_KEY), find_one(session, &label, CKO_PRIVATE_KEY)) {
        (Ok(public), Ok(_)) => Ok(public),
        (Err(HsmError::KeyMissing { .. }), Err(HsmError::KeyMissing { .. })) => {
            make(&label, &id).map(|(public, _)| public)
        }
        (Err(HsmError::KeyMissing { .. }), Ok(_)) | (Ok(_), Err(HsmError::KeyMissing { .. })) => {
            Err(HsmError::Ceremony {
                reason: format!("only one half of the key pair `{label}` is in the token"),
                next_step: "remove that object (it was left by an interrupted ceremony) and run the ceremony again"
                    .to_owned(),
            })
        }
        (Err(error), _) | (_, Err(error)) => Err(error),
    }
}

fn public_template<'a>(label: &'a str, id: &'a [u8]) -> Template<'a> {
    Template::empty()
        .flag(CKA_TOKEN, true)
        .flag(CKA_PRIVATE, false)
        .octets(CKA_LABEL, label.as_bytes())
        .octets(CKA_ID, id)
}

fn private_template<'a>(label: &'a str, id: &'a [u8]) -> Template<'a> {
    Template::empty()
        .flag(CKA_TOKEN, true)
        .flag(CKA_PRIVATE, true)
        .sensitive(false)
        .flag(CKA_MODIFIABLE, false)
        .octets(CKA_LABEL, label.as_bytes())
        .octets(CKA_ID, id)
}

fn find_slot(module: &Module, token: &TokenSelector) -> Result<Slot, HsmError> {
    module.find(token)?.map(|found| found.slot).ok_or_else(|| HsmError::Ceremony {
        reason: format!("no slot of `{}` has a token labelled `{}`", module.path().display(), token.label),
        next_step: "initialise the token first, or correct the label".to_owned(),
    })
}

fn capabilities(module: &Module, slot: Slot, user_pin: &Pin) -> Result<(Capabilities, OaepHash), HsmError> {
    let mechanisms = module.mechanisms(slot)?;
    let capabilities = logged_in(module, slot, CKU_USER, user_pin, |session| {
        Capabilities::probe(session, module.description(), &mechanisms, None)
    })?;
    let hash = capabilities.oaep_hash().ok_or(HsmError::Unsupported {
        what: "RSA-OAEP",
        instead: "roots cannot be escrowed with this module; use another",
    })?;
    Ok((capabilities, hash))
}

/// Runs `work` in a session of its own as `user`, and logs out.
fn logged_in<R>(
    module: &Module,
    slot: Slot,
    user: CK_USER_TYPE,
    pin: &Pin,
    work: impl FnOnce(&Session) -> Result<R, HsmError>,
) -> Result<R, HsmError> {
    let session = module.open(slot)?;
    let result = session.login(user, pin.octets()).and_then(|()| {
        let result = work(&session);
        let logout = session.inner().logout().map_err(|error| module.error(&error));
        result.and_then(|value| logout.map(|()| value))
    });
    session.close();
    result
}

const ROOT_OCTETS: CK_ULONG = 32;
const SHORTEST_RSA: usize = 3072 / 8;
const LONGEST_RSA: usize = 8192 / 8;
