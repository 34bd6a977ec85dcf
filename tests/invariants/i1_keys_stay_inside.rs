//! I1: no key in plaintext outside the token.

use std::{fs, path::Path};

use kms_client::proto::InventoryHsmRequest;
use kms_tests::{DevServer, open, title};

#[tokio::test(flavor = "multi_thread")]
async fn no_object_of_the_token_is_readable_or_usable_beyond_its_purpose() {
    let server = DevServer::start();
    // After real work, not on an untouched token.
    open(&server.connect("head-end").await, &server.profile("head-end"), title(2), 10).await.unwrap();
    let objects = server
        .connect("officer-1")
        .await
        .hsm()
        .inventory_hsm(InventoryHsmRequest {})
        .await
        .unwrap()
        .into_inner()
        .objects;
    assert!(objects.len() > 10, "{} objects", objects.len());
    for object in objects {
        assert_eq!(object.objection, "", "{}", object.label);
        if object.object_class == "secret-key" || object.object_class == "private-key" {
            assert!(
                object.attributes.iter().any(|name| name == "SENSITIVE"),
                "{} is not sensitive: {:?}",
                object.label,
                object.attributes
            );
            assert!(
                !object.attributes.iter().any(|name| name == "EXTRACTABLE"),
                "{} can leave: {:?}",
                object.label,
                object.attributes
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_key_of_a_meter_stands_in_any_file_of_the_server() {
    let mut server = DevServer::start();
    open(&server.connect("head-end").await, &server.profile("head-end"), title(2), 10).await.unwrap();
    server.kill();
    let keys = server.plaintext_keys();
    assert!(keys.len() >= 150);
    let mut files = 0;
    walk(server.state(), &mut |path, octets| {
        // The vendor's own list is what this test takes the keys from.
        if path.starts_with(server.state().join("vendor")) {
            return;
        }
        files += 1;
        for key in &keys {
            assert!(!contains(octets, key), "a meter's key stands in `{}`", path.display());
            let printed = [hex::encode(key), hex::encode_upper(key)];
            assert!(
                printed.iter().all(|text| !contains(octets, text.as_bytes())),
                "a meter's key stands in hex in `{}`",
                path.display()
            );
        }
    });
    assert!(files > 5, "{files} files were looked at");
}

fn contains(octets: &[u8], part: &[u8]) -> bool {
    octets.windows(part.len()).any(|window| window == part)
}

fn walk(folder: &Path, look: &mut dyn FnMut(&Path, &[u8])) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            walk(&path, look);
        } else {
            look(&path, &fs::read(&path).unwrap());
        }
    }
}
