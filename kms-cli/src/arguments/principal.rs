//! The command line of `kms principal`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use kms_client::{PrincipalId, SystemTitle};

use super::{
    shared::{Reason, Sure},
    values::{digest, profile_name, system_title},
};

#[derive(Debug, Subcommand)]
pub(crate) enum PrincipalCommand {
    /// Register a principal and certify its TLS key, which this command makes
    #[command(
        after_help = "Examples:\n  kms principal add urn:meterkms:dev:head-end:hes-2 --client-title 4D4D4D0000000002\n  \
        kms principal add urn:meterkms:dev:officer:ada --person \"Ada Example\"\n  \
        kms principal add urn:meterkms:dev:manufacturer:kam --shipment-key KAM.vendor-key.pub.pem\n  \
        kms principal add urn:meterkms:dev:service-account:wfm\n  \
        kms principal add urn:meterkms:dev:head-end:hes-3 --certificate-request hes-3.csr.pem --out hes-3.pem"
    )]
    Add(AddPrincipal),
    /// List principals
    #[command(visible_alias = "ls")]
    List,
    /// Certify a new TLS key: your own, which this command makes, or that of another principal's
    /// request
    #[command(
        after_help = "A proposal of two others certifies the key of another officer or auditor (propose-key).\n\n\
        Examples:\n  kms principal renew\n  kms principal renew urn:meterkms:dev:head-end:hes-3 --certificate-request hes-3.csr.pem --out hes-3.pem\n  \
        kms principal renew urn:meterkms:dev:officer:ada --certificate-request ada.csr.pem --out ada.pem --proposal 01939e7e-7c1b-7000-8000-000000000001"
    )]
    Renew(RenewPrincipal),
    /// Propose to certify the key of another officer or auditor, or to confirm it if one officer
    /// alone has certified it
    #[command(
        name = "propose-key",
        after_help = "Another officer approves it (kms proposal approve). Neither of you is the person whose key it is. Ask the person for the SHA-256 of the key, \
        over a channel that nobody else can use: openssl req -in ada.csr.pem -pubkey -noout | openssl pkey -pubin -outform DER | sha256sum\n\n\
        Examples:\n  kms principal propose-key urn:meterkms:dev:officer:ada --certificate-request ada.csr.pem --reason \"certificate lost, ticket 4714\"\n  \
        kms principal propose-key urn:meterkms:dev:officer:cy --key 9f2c…64 hex digits… --reason \"met in person\""
    )]
    ProposeKey(ProposeKey),
    /// End one certificate of another principal, at once
    #[command(
        name = "end-certificate",
        after_help = "Example:\n  kms principal end-certificate urn:meterkms:dev:head-end:hes-3 4f0c…hex digits… --reason \"not mine, ticket 4715\" --yes"
    )]
    EndCertificate {
        /// Principal URI
        #[arg(value_name = "URN", value_parser = PrincipalId::parse)]
        principal: PrincipalId,
        /// Serial number of the certificate, hex digits, from the principal's `kms principal
        /// whoami`, or `kms principal list --output json`
        #[arg(value_name = "SERIAL", value_parser = serial)]
        serial: Serial,
        #[command(flatten)]
        why: Reason,
        #[command(flatten)]
        sure: Sure,
    },
    /// Disable a principal, at once
    #[command(
        after_help = "Example:\n  kms principal disable urn:meterkms:dev:handheld:h-17 --reason \"lost, ticket 4713\" --yes"
    )]
    Disable {
        /// Principal URI
        #[arg(value_name = "URN", value_parser = PrincipalId::parse)]
        principal: PrincipalId,
        #[command(flatten)]
        why: Reason,
        #[command(flatten)]
        sure: Sure,
    },
    /// Show your principal, as the server identifies it, and its certificates
    Whoami,
    /// Make a transport key, which opens envelopes, and register it. The private key stays in the
    /// profile
    RegisterTransportKey,
}

#[derive(Args, Debug)]
pub(crate) struct AddPrincipal {
    /// Principal URI: urn:meterkms:ISLAND:ROLE:NAME
    #[arg(value_name = "URN", value_parser = PrincipalId::parse)]
    pub(crate) principal: PrincipalId,
    /// Person behind an officer's or auditor's certificate, or technician of a handheld
    #[arg(long, value_name = "TEXT")]
    pub(crate) person: Option<String>,
    /// Client system title that the principal may use, 16 hex digits; may be repeated
    #[arg(long = "client-title", value_name = "HEX", value_parser = system_title)]
    pub(crate) client_titles: Vec<SystemTitle>,
    /// For a manufacturer: public key that verifies its shipments, PEM
    #[arg(long, value_name = "FILE")]
    pub(crate) shipment_key: Option<PathBuf>,
    /// Name of the new profile [default: the principal's name]
    #[arg(long, value_name = "NAME", value_parser = profile_name, conflicts_with = "certificate_request")]
    pub(crate) new_profile: Option<String>,
    /// Certify this request (PKCS#10, PEM) and make no key
    #[arg(long, value_name = "FILE", requires = "out")]
    pub(crate) certificate_request: Option<PathBuf>,
    /// File to write the certificate to (PEM, with its issuers)
    #[arg(long, value_name = "FILE", requires = "certificate_request")]
    pub(crate) out: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct RenewPrincipal {
    /// Principal URI [default: yourself]
    #[arg(value_name = "URN", requires = "certificate_request", value_parser = PrincipalId::parse)]
    pub(crate) principal: Option<PrincipalId>,
    /// Certify this request (PKCS#10, PEM)
    #[arg(long, value_name = "FILE", requires_all = ["principal", "out"])]
    pub(crate) certificate_request: Option<PathBuf>,
    /// File to write the certificate to (PEM, with its issuers)
    #[arg(long, value_name = "FILE", requires = "certificate_request")]
    pub(crate) out: Option<PathBuf>,
    /// Approved proposal that permits it, for another officer or auditor
    #[arg(long, value_name = "PROPOSAL", requires = "principal", value_parser = kms_domain::ProposalId::parse)]
    pub(crate) proposal: Option<kms_domain::ProposalId>,
}

#[derive(Args, Debug)]
pub(crate) struct ProposeKey {
    /// Principal URI of an officer or auditor
    #[arg(value_name = "URN", value_parser = PrincipalId::parse)]
    pub(crate) principal: PrincipalId,
    /// Certificate request with the key (PKCS#10, PEM)
    #[arg(long, value_name = "FILE", conflicts_with = "key", required_unless_present = "key")]
    pub(crate) certificate_request: Option<PathBuf>,
    /// SHA-256 of the public key (SubjectPublicKeyInfo, DER), 64 hex digits
    #[arg(long, value_name = "HEX", value_parser = digest)]
    pub(crate) key: Option<[u8; 32]>,
    /// Number of people who must approve, beside you
    #[arg(long, value_name = "PEOPLE", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=9))]
    pub(crate) quorum: u32,
    #[command(flatten)]
    pub(crate) why: Reason,
}

/// The serial number of a certificate, 1–20 octets.
#[derive(Clone, Debug)]
pub(crate) struct Serial(pub(crate) Vec<u8>);

fn serial(text: &str) -> Result<Serial, String> {
    let octets = hex::decode(text).map_err(|_| "not hex digits".to_owned())?;
    if (1..=20).contains(&octets.len()) { Ok(Serial(octets)) } else { Err("not 1 to 20 octets".to_owned()) }
}
