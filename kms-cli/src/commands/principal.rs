//! `kms principal`. Key pairs are made here, and private keys never leave this machine.

use std::path::Path;

use kms_client::{KeyRequest, NewProfile, PrincipalId, Role};
use kms_proto::v1 as proto;
use rustls_pki_types::{SubjectPublicKeyInfoDer, pem::PemObject};
use serde_json::json;

use super::{confirm, octets, proposal::show_made, read, request_id, write};
use crate::{
    arguments::principal::{AddPrincipal, PrincipalCommand, ProposeKey, RenewPrincipal},
    context::Context,
    failure::Failure,
    json, output,
    output::{Rows, facts},
    progress::waiting,
};

pub(crate) async fn run(command: PrincipalCommand, context: &Context) -> Result<(), Failure> {
    match command {
        PrincipalCommand::Add(arguments) => add(arguments, context).await,
        PrincipalCommand::List => list(context).await,
        PrincipalCommand::Renew(arguments) => renew(arguments, context).await,
        PrincipalCommand::ProposeKey(arguments) => propose_key(arguments, context).await,
        PrincipalCommand::EndCertificate { principal, serial, why, sure } => {
            confirm(&format!("the certificate {} of {principal} ends at once", hex::encode(&serial.0)), &sure)?;
            let mut client = context.connect().await?.principals();
            let request = proto::EndCertificateRequest {
                request_id: request_id(),
                principal: principal.to_string(),
                serial: octets(serial.0),
                reason: why.reason,
            };
            let answer = waiting("ending the certificate", client.end_certificate(request)).await?.into_inner();
            show(&answer, context);
            Ok(())
        }
        PrincipalCommand::Disable { principal, why, sure } => {
            confirm(&format!("{principal} will be disabled at once"), &sure)?;
            let mut client = context.connect().await?.principals();
            let request = proto::DisablePrincipalRequest {
                request_id: request_id(),
                principal: principal.to_string(),
                reason: why.reason,
            };
            let answer = waiting("disabling", client.disable_principal(request)).await?.into_inner();
            show(&answer, context);
            Ok(())
        }
        PrincipalCommand::Whoami => {
            let answer = who_am_i(context).await?;
            show(&answer, context);
            for warning in warnings(&answer) {
                eprintln!("warning: {warning}");
            }
            Ok(())
        }
        PrincipalCommand::RegisterTransportKey => register_transport_key(context).await,
    }
}

async fn add(arguments: AddPrincipal, context: &Context) -> Result<(), Failure> {
    let principal = &arguments.principal;
    let is_manufacturer = principal.role() == Role::Manufacturer;
    if is_manufacturer != arguments.shipment_key.is_some() {
        return Err(Failure::usage(if is_manufacturer {
            "--shipment-key is needed for a manufacturer"
        } else {
            "--shipment-key is for manufacturers"
        }));
    }
    let profile = context.profile()?;
    let shipment_key = arguments.shipment_key.as_deref().map(public_key).transpose()?.unwrap_or_default();
    let certificate_request = arguments.certificate_request.as_deref().map(certificate_request).transpose()?;
    // A manufacturer that only signs shipments needs no certificate.
    let made =
        if is_manufacturer || certificate_request.is_some() { None } else { Some(KeyRequest::generate(principal)?) };
    let name = arguments.new_profile.clone().unwrap_or_else(|| principal.name().to_owned());
    let directory = context.state().profile_directory(&name);
    if made.is_some() && directory.exists() {
        return Err(Failure::failed(format!(
            "`{}` exists and is not overwritten: choose another --new-profile",
            directory.display()
        )));
    }
    let request = proto::AddPrincipalRequest {
        request_id: request_id(),
        principal: principal.to_string(),
        certificate_request: made
            .as_ref()
            .map(|made| octets(made.certificate_request()))
            .or(certificate_request.map(octets))
            .unwrap_or_default(),
        person: arguments.person.clone().unwrap_or_default(),
        client_titles: arguments.client_titles.iter().map(|title| octets(title.octets())).collect(),
        shipment_key: octets(shipment_key),
    };
    let mut client = context.connect().await?.principals();
    let issued = waiting("registering", client.add_principal(request)).await?.into_inner();
    let mut written = String::new();
    if let Some(made) = made {
        let new = NewProfile {
            server: profile.server(),
            server_name: profile.server_name_text(),
            principal,
            ca_pem: &profile.ca_pem()?,
            certificate_pem: &KeyRequest::chain_pem(&issued),
            key_pem: made.key_pem(),
        };
        kms_client::Profile::create(&directory, &new)?;
        written = directory.display().to_string();
    } else if let Some(out) = &arguments.out {
        write(out, false, KeyRequest::chain_pem(&issued).as_bytes())?;
        written = out.display().to_string();
    }
    show_issued(&issued, &written, context);
    Ok(())
}

async fn renew(arguments: RenewPrincipal, context: &Context) -> Result<(), Failure> {
    if let (Some(principal), Some(file), Some(out)) =
        (&arguments.principal, &arguments.certificate_request, &arguments.out)
    {
        let request = proto::RenewPrincipalRequest {
            request_id: request_id(),
            principal: principal.to_string(),
            certificate_request: octets(certificate_request(file)?),
            proposal_id: arguments.proposal.map(|proposal| octets(proposal.octets())).unwrap_or_default(),
        };
        let mut client = context.connect().await?.principals();
        let issued = waiting("certifying", client.renew_principal(request)).await?.into_inner();
        write(out, false, KeyRequest::chain_pem(&issued).as_bytes())?;
        show_issued(&issued, &out.display().to_string(), context);
        return Ok(());
    }
    let profile = context.profile()?;
    let principal = own_principal(context).await?;
    let made = KeyRequest::generate(&principal)?;
    let request = proto::RenewPrincipalRequest {
        request_id: request_id(),
        principal: principal.to_string(),
        certificate_request: octets(made.certificate_request()),
        ..proto::RenewPrincipalRequest::default()
    };
    let mut client = context.connect().await?.principals();
    let issued = waiting("certifying", client.renew_principal(request)).await?.into_inner();
    profile.renew(made.key_pem(), &KeyRequest::chain_pem(&issued))?;
    show_issued(&issued, &profile.directory().display().to_string(), context);
    Ok(())
}

async fn propose_key(arguments: ProposeKey, context: &Context) -> Result<(), Failure> {
    let key_sha256 = match (&arguments.key, &arguments.certificate_request) {
        (Some(key), _) => *key,
        (None, Some(file)) => KeyRequest::key_sha256(&certificate_request(file)?).ok_or_else(|| {
            Failure::usage(format!("--certificate-request: `{}` is not a PKCS#10 request in PEM", file.display()))
        })?,
        (None, None) => return Err(Failure::usage("add --certificate-request FILE or --key HEX: the key to certify")),
    };
    let request = proto::ProposePrincipalKeyRequest {
        request_id: request_id(),
        principal: arguments.principal.to_string(),
        key_sha256: octets(key_sha256),
        reason: arguments.why.reason,
        quorum: Some(arguments.quorum),
    };
    let mut client = context.connect().await?.principals();
    show_made(&waiting("proposing", client.propose_principal_key(request)).await?.into_inner(), context);
    Ok(())
}

async fn register_transport_key(context: &Context) -> Result<(), Failure> {
    let profile = context.profile()?;
    let principal = own_principal(context).await?;
    let made = KeyRequest::generate(&principal)?;
    let mut client = context.connect().await?.principals();
    let request = proto::RegisterTransportKeyRequest {
        request_id: request_id(),
        certificate_request: octets(made.certificate_request()),
    };
    let issued = waiting("registering", client.register_transport_key(request)).await?.into_inner();
    profile.set_transport_key(made.key_pem(), &KeyRequest::certificate_pem(&issued))?;
    // The new files must open envelopes: a mismatch shows now and not at the first grant.
    profile.transport_key()?;
    show_issued(&issued, &profile.directory().display().to_string(), context);
    Ok(())
}

async fn list(context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.principals();
    let answer =
        waiting("reading principals", client.list_principals(proto::ListPrincipalsRequest {})).await?.into_inner();
    context.output.show(
        || json::message("ListPrincipalsResponse", &answer),
        || {
            let mut rows = Rows::new(&[
                "principal",
                "status",
                "person",
                "client titles",
                "certificate until",
                "transport key",
                "assurance",
            ])
            .sentences(&[6]);
            for principal in &answer.principals {
                rows.row([
                    principal.principal.clone(),
                    principal.status.clone(),
                    principal.person.clone(),
                    titles(principal),
                    output::end(principal.certificate_not_after_ms),
                    output::yes(principal.has_transport_key),
                    principal.assurance.clone(),
                ]);
            }
            rows.text_or("no principals")
        },
    );
    Ok(())
}

async fn who_am_i(context: &Context) -> Result<proto::Principal, Failure> {
    let mut client = context.connect().await?.principals();
    Ok(waiting("asking", client.who_am_i(proto::WhoAmIRequest {})).await?.into_inner())
}

async fn own_principal(context: &Context) -> Result<PrincipalId, Failure> {
    let principal = who_am_i(context).await?.principal;
    PrincipalId::parse(&principal)
        .map_err(|error| Failure::failed(format!("the server's answer does not name a valid principal: {error}")))
}

fn show(principal: &proto::Principal, context: &Context) {
    context.output.show(|| json::message("Principal", principal), || principal_text(principal));
}

fn show_issued(issued: &proto::PrincipalCertificate, written: &str, context: &Context) {
    context.output.show(
        || json!({"principal": issued.principal.as_ref().map(|principal| json::message("Principal", principal)), "certificate": json::octets(&issued.certificate), "written": written}),
        || {
            let principal = issued.principal.clone().unwrap_or_default();
            let mut named = principal_facts(&principal);
            named.push(("written to", written.to_owned()));
            format!("{}{}", facts(named), next_step(&principal, written))
        },
    );
}

fn principal_text(principal: &proto::Principal) -> String {
    facts(principal_facts(principal))
}

fn principal_facts(principal: &proto::Principal) -> Vec<(&'static str, String)> {
    let transport_key = match (principal.has_transport_key, is_grantee(principal)) {
        (true, _) => "registered",
        (false, true) => "none yet",
        (false, false) => "",
    };
    let mut facts = vec![
        ("principal", principal.principal.clone()),
        ("status", principal.status.clone()),
        (if is_handheld(principal) { "technician" } else { "person" }, principal.person.clone()),
        ("assurance", principal.assurance.clone()),
        ("client titles", titles(principal)),
        ("certificate until", output::time(principal.certificate_not_after_ms)),
        ("transport key", transport_key.to_owned()),
    ];
    facts.extend(principal.certificates.iter().map(|certificate| ("certificate", certificate_text(certificate))));
    facts
}

fn certificate_text(certificate: &proto::RegisteredCertificate) -> String {
    let by = if certificate.issued_by.is_empty() { String::new() } else { format!(" by {}", certificate.issued_by) };
    let in_use = if certificate.in_use { ", in use" } else { "" };
    format!(
        "{} until {}: {}{by}{in_use}",
        hex::encode(&certificate.serial),
        output::time(certificate.not_after_ms),
        certificate.enrolment
    )
}

/// Warnings for the owner of a key: certificates that another person made, or that are newer than
/// the one in use.
fn warnings(principal: &proto::Principal) -> Vec<String> {
    let mut warnings = Vec::new();
    let in_use = principal.certificates.iter().position(|certificate| certificate.in_use);
    for (at, certificate) in principal.certificates.iter().enumerate() {
        let serial = hex::encode(&certificate.serial);
        if in_use.is_some_and(|in_use| at > in_use) {
            let by = match certificate.issued_by.as_str() {
                "" => "with a key of yours".to_owned(),
                other => format!("by {other}"),
            };
            warnings.push(format!(
                "the certificate {serial} was made after the one in use, {by}: if you do not know it, tell an officer at once, \
                 who runs: kms principal end-certificate {} {serial} --reason TEXT",
                principal.principal
            ));
        } else if !certificate.issued_by.is_empty() {
            warnings.push(format!("the certificate {serial} was made for you by {}", certificate.issued_by));
        }
        if !certificate.counts && certificate.in_use && is_person(principal) {
            warnings.push(format!(
                "one officer alone certified your key, so you neither propose nor approve; two others confirm it: kms principal propose-key {} --key {}",
                principal.principal,
                hex::encode(&certificate.key_sha256)
            ));
        }
    }
    warnings
}

fn is_person(principal: &proto::Principal) -> bool {
    PrincipalId::parse(&principal.principal).is_ok_and(|id| matches!(id.role(), Role::Officer | Role::Auditor))
}

fn is_handheld(principal: &proto::Principal) -> bool {
    PrincipalId::parse(&principal.principal).is_ok_and(|id| id.role() == Role::Handheld)
}

/// Head-ends and handhelds get keys, and need a transport key for it.
fn is_grantee(principal: &proto::Principal) -> bool {
    PrincipalId::parse(&principal.principal).is_ok_and(|id| matches!(id.role(), Role::HeadEnd | Role::Handheld))
}

/// What a new grantee still lacks.
fn next_step(principal: &proto::Principal, written: &str) -> String {
    let profile = Path::new(written).file_name().unwrap_or_default().to_string_lossy();
    if principal.has_transport_key || !is_grantee(principal) || !Path::new(written).is_dir() {
        return String::new();
    }
    format!(
        "\nNext:\n  kms --profile {profile} principal register-transport-key\n  kms meter assign METER... --head-end {}\n",
        principal.principal
    )
}

fn titles(principal: &proto::Principal) -> String {
    principal.client_titles.iter().map(|title| output::octets(title)).collect::<Vec<_>>().join(", ")
}

fn public_key(path: &Path) -> Result<Vec<u8>, Failure> {
    SubjectPublicKeyInfoDer::from_pem_slice(&read(path)?).map(|key| key.to_vec()).map_err(|_| {
        Failure::usage(format!(
            "--shipment-key: `{}` is not a public key in PEM (SubjectPublicKeyInfo)",
            path.display()
        ))
    })
}

fn certificate_request(path: &Path) -> Result<Vec<u8>, Failure> {
    rustls_pki_types::CertificateSigningRequestDer::from_pem_slice(&read(path)?)
        .map(|request| request.to_vec())
        .map_err(|_| {
            Failure::usage(format!("--certificate-request: `{}` is not a PKCS#10 request in PEM", path.display()))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_person_of_a_handheld_is_its_technician_however_it_was_registered() {
        let named = |role: &str| {
            let principal = format!("urn:meterkms:dev:{role}:one");
            let principal =
                proto::Principal { principal, person: "Ida Berg".to_owned(), ..proto::Principal::default() };
            principal_facts(&principal).into_iter().find(|(_, value)| value == "Ida Berg").map(|(label, _)| label)
        };
        assert_eq!((named("handheld"), named("officer")), (Some("technician"), Some("person")));
    }
}
