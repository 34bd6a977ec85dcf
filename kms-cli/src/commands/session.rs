//! `kms session`.

use std::{io::Write as _, path::Path};

use kms_client::{
    Counters, KeyType, OpenOptions, OpenedEnvelope, OpenedGroup, OpenedKey, OpenedMeter, SecuritySetupId, Session,
    SystemTitle, new_request_id, proto::SessionTerms,
};
use kms_domain::SecuritySuite;
use kms_proto::v1::Purpose;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::{create, octets};
use crate::{
    arguments::session::{OpenGroupSession, OpenSession, SessionCommand, Terms},
    context::Context,
    failure::Failure,
    json, output,
    output::{Rows, facts},
    progress,
};

pub(crate) async fn run(command: SessionCommand, context: &Context) -> Result<(), Failure> {
    match command {
        SessionCommand::Open(OpenSession { meter, dedicated_key, terms }) => {
            open(Target::Meter(meter), dedicated_key, terms, context).await
        }
        SessionCommand::OpenGroup(OpenGroupSession { group, key_version, terms }) => {
            open(Target::Group(group, key_version), false, terms, context).await
        }
    }
}

/// The owner of the requested keys.
enum Target {
    Meter(SystemTitle),
    Group(String, Option<u32>),
}

async fn open(target: Target, dedicated_key: bool, arguments: Terms, context: &Context) -> Result<(), Failure> {
    if arguments.key_types.contains(&KeyType::DEDICATED) {
        return Err(Failure::usage(
            "--key-types: a dedicated key is made for each session: request it with --dedicated-key",
        ));
    }
    let profile = context.profile()?;
    let transport_key = match profile.transport_key() {
        Err(kms_client::ProfileError::NoTransportKey { directory }) => {
            return Err(no_transport_key(&directory, context));
        }
        key => key?,
    };
    // Before the request: if the file could not be written, keys would be exposed for nothing.
    let file = arguments.write_keys.as_deref().map(|path| create(path, true).map(|file| (path, file))).transpose()?;
    let result = grant(&target, dedicated_key, &arguments, &transport_key, context).await;
    let (session, written) = match (result, file) {
        (Ok(session), None) => (session, String::new()),
        (Ok(session), Some((path, mut file))) => {
            file.write_all(&key_file(&session)?)
                .map_err(|error| Failure::failed(format!("cannot write `{}`: {error}", path.display())))?;
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

/// The failure names the profiles that have a transport key: usually another profile was meant.
fn no_transport_key(directory: &Path, context: &Context) -> Failure {
    let state = context.state();
    let others: Vec<String> = state
        .profile_names()
        .into_iter()
        .filter(|name| state.profile(name).is_ok_and(|profile| profile.has_transport_key()))
        .collect();
    let choose = if others.is_empty() {
        String::new()
    } else {
        format!("choose another --profile ({}), or ", others.join(", "))
    };
    Failure::failed(format!(
        "no transport key in `{}`; by the shipped policies only head-ends get keys",
        directory.display()
    ))
    .with_hint(format!("{choose}make one with `kms principal register-transport-key`"))
}

async fn grant(
    target: &Target,
    dedicated_key: bool,
    arguments: &Terms,
    transport_key: &kms_client::TransportKey,
    context: &Context,
) -> Result<Session, Failure> {
    let connection = context.connect().await?;
    let terms = SessionTerms {
        purpose: Purpose::from(arguments.purpose).into(),
        security_setup: arguments.security_setup.map(|setup| octets(setup.obis())).unwrap_or_default(),
        key_types: arguments.key_types.iter().map(KeyType::to_string).collect(),
        client_title: arguments.client_title.map(|title| octets(title.octets())).unwrap_or_default(),
        counters: arguments.counters.unwrap_or_default(),
        dedicated_key,
        lifetime_seconds: arguments.lifetime.unwrap_or_default(),
    };
    let options = if arguments.allow_cbc_expand { OpenOptions::new().allow_cbc_expand() } else { OpenOptions::new() };
    let granted = async {
        match target {
            Target::Meter(meter) => {
                connection.open_session(transport_key, new_request_id(), *meter, terms, &options).await
            }
            Target::Group(group, version) => {
                connection.open_group_session(transport_key, new_request_id(), group, *version, terms, &options).await
            }
        }
    };
    Ok(progress::waiting("waiting for the grant", granted).await?)
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
        text.push_str(&keys_text(vec![("meter", meter.meter.to_string())], &Keys::of_meter(meter)));
    }
    for group in &keys.groups {
        text.push('\n');
        text.push_str(&keys_text(
            vec![("group", group.name.clone()), ("number", group.number.to_string())],
            &Keys::of_group(group),
        ));
    }
    let rotation = session.rotation.iter().filter_map(rotation_note);
    rotation.for_each(|note| text.push_str(&format!("\n{note}\n")));
    text
}

/// A note for the sender of broadcasts about a rotation under way.
fn rotation_note(rotation: &kms_proto::v1::GroupRotation) -> Option<String> {
    let (group, key, version) = (&rotation.group, &rotation.key_type, rotation.version);
    match rotation.stage.as_str() {
        "rolling-out" => Some(format!(
            "{key} version {version} is being rolled out: too few members have it to switch broadcasts to it (kms group rotation {group})"
        )),
        "may-switch" => Some(format!(
            "{key} version {version} is being rolled out, and broadcasts may switch to it: kms group switch {group} --to {version}"
        )),
        "switched" => {
            let former = rotation.former_version;
            Some(format!(
                "not every member has {key} version {version}: members that are left behind accept version {former} only (--key-version {former})"
            ))
        }
        _ => None,
    }
}

/// The granted keys of one owner.
struct Keys<'a> {
    setup: SecuritySetupId,
    suite: SecuritySuite,
    keys: &'a [OpenedKey],
    counters: Option<&'a Counters>,
    /// The key type that the counters are used with.
    counted: KeyType,
}

impl<'a> Keys<'a> {
    const fn of_meter(meter: &'a OpenedMeter) -> Self {
        Self {
            setup: meter.security_setup,
            suite: meter.security_suite,
            keys: meter.keys.as_slice(),
            counters: meter.counters.as_ref(),
            counted: KeyType::GUEK,
        }
    }

    const fn of_group(group: &'a OpenedGroup) -> Self {
        Self {
            setup: group.security_setup,
            suite: group.security_suite,
            keys: group.keys.as_slice(),
            counters: group.counters.as_ref(),
            counted: KeyType::GBEK,
        }
    }
}

fn keys_text(mut heading: Vec<(&str, String)>, granted: &Keys<'_>) -> String {
    let (client_title, counters) = granted.counters.map_or_else(Default::default, |counters| {
        let first = counters.next().unwrap_or_default();
        let last = u64::from(first) + u64::from(counters.remaining()).saturating_sub(1);
        let range =
            format!("{first} to {last}, each once, with {} version {}", granted.counted, counters.key_version());
        (counters.client_title().to_string(), range)
    });
    heading.extend([
        ("security setup", granted.setup.to_string()),
        ("security suite", granted.suite.number().to_string()),
        ("client title", client_title),
        ("counters", counters),
    ]);
    let mut text = facts(heading);
    let mut rows = Rows::new(&["key", "version", "octets", "check value", "in doubt"]).numbers(&[1, 2]);
    for key in granted.keys {
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
        "meters": meters_json(keys, &check_value),
        "groups": groups_json(keys, &check_value),
        "audit_leaf": json::octets(&session.audit_leaf),
        "rotation": session.rotation.as_ref().map(|rotation| json::message("GroupRotation", rotation)),
    })
}

fn check_value(key: &kms_client::SecretKey) -> Value {
    json!({"check_value": key.check_value().map(hex::encode_upper)})
}

fn meters_json(keys: &OpenedEnvelope, content: &dyn Fn(&kms_client::SecretKey) -> Value) -> Value {
    keys.meters
        .iter()
        .map(|meter| keys_json(json!({"meter": meter.meter.to_string()}), &Keys::of_meter(meter), content))
        .collect()
}

fn groups_json(keys: &OpenedEnvelope, content: &dyn Fn(&kms_client::SecretKey) -> Value) -> Value {
    keys.groups
        .iter()
        .map(|group| keys_json(json!({"group": group.name, "number": group.number}), &Keys::of_group(group), content))
        .collect()
}

fn keys_json(mut owner: Value, granted: &Keys<'_>, content: &dyn Fn(&kms_client::SecretKey) -> Value) -> Value {
    let keys = granted.keys.iter().map(|key| {
        let mut entry = json!({
            "key_type": key.key_type.to_string(), "version": key.version.map_or(0, kms_client::KeyVersionNumber::number), "in_doubt": key.in_doubt,
        });
        if let (Some(entry), Value::Object(more)) = (entry.as_object_mut(), content(&key.key)) {
            entry.extend(more);
        }
        entry
    });
    let lease = granted.counters.map(|counters| {
        json!({
            "client_title": counters.client_title().to_string(), "key_version": counters.key_version().number(),
            "first": counters.next(), "count": counters.remaining(),
        })
    });
    let entry = json!({
        "security_setup": json::octets(&granted.setup.obis()),
        "security_suite": granted.suite.number(),
        "keys": keys.collect::<Vec<_>>(),
        "lease": lease,
    });
    if let (Some(owner), Value::Object(entry)) = (owner.as_object_mut(), entry) {
        owner.extend(entry);
    }
    owner
}

/// The session with its keys in plaintext, for the one file that was asked for.
fn key_file(session: &Session) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let keys = &session.keys;
    // The JSON value and its text are freed without being wiped: the file itself holds the keys in
    // plaintext.
    let value = json!({
        "warning": "keys in plaintext: remove this file when the session ends",
        "grant_id": json::octets(&keys.grant_id.octets()),
        "not_after": json::time(keys.not_after.0),
        "meters": meters_json(keys, &|key| json!({"key": hex::encode_upper(key.expose())})),
        "groups": groups_json(keys, &|key| json!({"key": hex::encode_upper(key.expose())})),
    });
    let mut text = serde_json::to_vec_pretty(&value).map_err(|error| Failure::failed(error.to_string()))?;
    text.push(b'\n');
    Ok(Zeroizing::new(text))
}
