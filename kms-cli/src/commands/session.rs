//! `kms session`.

use std::{io::Write as _, path::Path};

use kms_client::{KeyType, OpenOptions, OpenedMeter, Session, new_request_id, proto::SessionTerms};
use kms_proto::v1::Purpose;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::{create, octets};
use crate::{
    Context, Failure,
    arguments::{OpenSession, SessionCommand},
    json, output,
    output::{Rows, facts},
    progress,
};

pub(crate) async fn run(command: SessionCommand, context: &Context) -> Result<(), Failure> {
    match command {
        SessionCommand::Open(arguments) => open(arguments, context).await,
    }
}

async fn open(arguments: OpenSession, context: &Context) -> Result<(), Failure> {
    if arguments.key_types.contains(&KeyType::DEDICATED) {
        return Err(Failure::usage("--key-types: a dedicated key is made for each session: ask with --dedicated-key"));
    }
    let profile = context.profile()?;
    let transport_key = match profile.transport_key() {
        Err(kms_client::ProfileError::NoTransportKey { directory }) => return Err(no_transport_key(&directory, context)),
        key => key?,
    };
    // Before anything is granted: keys that cannot be written would be exposed for nothing.
    let file = arguments.write_keys.as_deref().map(|path| create(path, true).map(|file| (path, file))).transpose()?;
    let result = grant(&arguments, &transport_key, context).await;
    let (session, written) = match (result, file) {
        (Ok(session), None) => (session, String::new()),
        (Ok(session), Some((path, mut file))) => {
            file.write_all(&key_file(&session)?).map_err(|error| Failure::failed(format!("cannot write `{}`: {error}", path.display())))?;
            (session, path.display().to_string())
        }
        (Err(failure), file) => {
            if let Some((path, _)) = file {
                let _ = std::fs::remove_file(path);
            }
            return Err(failure);
        }
    };
    let note = if written.is_empty() {
        "\nThe keys are not shown; --write-keys FILE puts them into a file that only you can read.\n".to_owned()
    } else {
        format!("\nThe keys are in `{written}`, in plaintext, readable by you only: remove it when the session ends.\n")
    };
    context.output.show(|| session_json(&session), || format!("{}{note}", session_text(&session)));
    Ok(())
}

/// Tells which profiles have a transport key: most often the right one was not chosen.
fn no_transport_key(directory: &Path, context: &Context) -> Failure {
    let state = context.state();
    let others: Vec<String> = state.profile_names().into_iter().filter(|name| state.profile(name).is_ok_and(|profile| profile.has_transport_key())).collect();
    let choose = if others.is_empty() { String::new() } else { format!("choose another --profile ({}), or ", others.join(", ")) };
    Failure::failed(format!("no transport key in `{}`; by the shipped policies only head-ends get keys", directory.display()))
        .with_hint(format!("{choose}make one with `kms principal register-transport-key`"))
}

async fn grant(arguments: &OpenSession, transport_key: &kms_client::TransportKey, context: &Context) -> Result<Session, Failure> {
    let connection = context.connect().await?;
    let terms = SessionTerms {
        purpose: Purpose::from(arguments.purpose).into(),
        security_setup: arguments.security_setup.map(|setup| octets(setup.obis())).unwrap_or_default(),
        key_types: arguments.key_types.iter().map(KeyType::to_string).collect(),
        client_title: arguments.client_title.map(|title| octets(title.octets())).unwrap_or_default(),
        counters: arguments.counters.unwrap_or_default(),
        dedicated_key: arguments.dedicated_key,
        lifetime_seconds: arguments.lifetime.unwrap_or_default(),
    };
    let options = if arguments.allow_cbc_expand { OpenOptions::new().allow_cbc_expand() } else { OpenOptions::new() };
    let session = connection.open_session(transport_key, new_request_id(), arguments.meter, terms, &options);
    Ok(progress::waiting("waiting for the grant", session).await?)
}

fn session_text(session: &Session) -> String {
    let keys = &session.keys;
    let mut text = facts([
        ("grant", keys.grant_id.to_string()),
        ("principal", keys.principal.to_string()),
        ("purpose", output::purpose(keys.purpose)),
        ("issued", output::time(keys.issued.0)),
        ("expires", output::time(keys.not_after.0)),
        ("audit leaf", hex::encode_upper(&session.audit_leaf)),
    ]);
    for meter in &keys.meters {
        text.push('\n');
        text.push_str(&meter_text(meter));
    }
    text
}

fn meter_text(meter: &OpenedMeter) -> String {
    let (client_title, counters) = meter.counters.as_ref().map_or_else(Default::default, |counters| {
        let first = counters.next().unwrap_or_default();
        let last = u64::from(first) + u64::from(counters.remaining()).saturating_sub(1);
        let range = format!("{first} to {last}, each once, with GUEK version {}", counters.key_version());
        (counters.client_title().to_string(), range)
    });
    let mut text = facts([
        ("meter", meter.meter.to_string()),
        ("security setup", meter.security_setup.to_string()),
        ("security suite", meter.security_suite.number().to_string()),
        ("client title", client_title),
        ("counters", counters),
    ]);
    let mut rows = Rows::new(&["key", "version", "octets", "check value", "in doubt"]).numbers(&[1, 2]);
    for key in &meter.keys {
        rows.row([
            key.key_type.to_string(),
            key.version.map_or_else(|| "-".into(), |version| version.to_string()),
            key.key.expose().len().to_string(),
            key.key.check_value().map_or_else(|| "-".into(), hex::encode_upper),
            output::yes(key.in_doubt),
        ]);
    }
    text.push('\n');
    text.push_str(&rows.text_or("no keys"));
    text
}

fn session_json(session: &Session) -> Value {
    let keys = &session.keys;
    json!({
        "grant_id": json::octets(&keys.grant_id.octets()),
        "request_id": json::octets(&keys.request_id.octets()),
        "principal": keys.principal.to_string(),
        "purpose": keys.purpose.as_str_name().trim_start_matches("PURPOSE_"),
        "issued": json::time(keys.issued.0),
        "not_after": json::time(keys.not_after.0),
        "meters": keys.meters.iter().map(|meter| meter_json(meter, &|key| json!({"check_value": key.check_value().map(hex::encode_upper)}))).collect::<Vec<_>>(),
        "audit_leaf": json::octets(&session.audit_leaf),
    })
}

fn meter_json(meter: &OpenedMeter, content: &dyn Fn(&kms_client::SecretKey) -> Value) -> Value {
    let keys = meter.keys.iter().map(|key| {
        let mut entry = json!({
            "key_type": key.key_type.to_string(), "version": key.version.map_or(0, kms_client::KeyVersionNumber::number), "in_doubt": key.in_doubt,
        });
        if let (Some(entry), Value::Object(more)) = (entry.as_object_mut(), content(&key.key)) {
            entry.extend(more);
        }
        entry
    });
    let lease = meter.counters.as_ref().map(|counters| {
        json!({
            "client_title": counters.client_title().to_string(), "key_version": counters.key_version().number(),
            "first": counters.next(), "count": counters.remaining(),
        })
    });
    json!({
        "meter": meter.meter.to_string(),
        "security_setup": json::octets(&meter.security_setup.obis()),
        "security_suite": meter.security_suite.number(),
        "keys": keys.collect::<Vec<_>>(),
        "lease": lease,
    })
}

/// The session with its keys in plaintext, for the one file that was asked for.
fn key_file(session: &Session) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let keys = &session.keys;
    // The JSON value and its text are freed without being wiped: the file itself holds the keys in plaintext.
    let value = json!({
        "warning": "keys in plaintext: remove this file when the session ends",
        "grant_id": json::octets(&keys.grant_id.octets()),
        "not_after": json::time(keys.not_after.0),
        "meters": keys.meters.iter().map(|meter| meter_json(meter, &|key| json!({"key": hex::encode_upper(key.expose())}))).collect::<Vec<_>>(),
    });
    let mut text = serde_json::to_vec_pretty(&value).map_err(|error| Failure::failed(error.to_string()))?;
    text.push(b'\n');
    Ok(Zeroizing::new(text))
}
