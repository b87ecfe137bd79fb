//! The seed, read back by strangers' tools where they are installed, and by the library.

use std::{fs, io::Read, process::Command};

use super::*;

fn spec() -> SeedSpec {
    SeedSpec {
        instance_id: "0190-7".into(),
        hostname: "web".into(),
        ssh_keys: vec!["ssh-ed25519 AAAA \"me\": [x]\n- y".into()],
        user_data: String::new(),
        nics: vec![
            SeedNic { mac: [0x52, 0x54, 0, 0, 0, 1], address: None, gateway: None },
            SeedNic {
                mac: [0x52, 0x54, 0, 0, 0, 2],
                address: Some("192.168.7.10/24".into()),
                gateway: Some("192.168.7.1".into()),
            },
        ],
    }
}

fn read(image: &[u8], name: &str) -> String {
    let volume = FileSystem::new(Cursor::new(image.to_vec()), FsOptions::new()).unwrap();
    let mut text = String::new();
    volume.root_dir().open_file(name).unwrap().read_to_string(&mut text).unwrap();
    text
}

#[test]
fn the_seed_says_what_was_asked() {
    let image = build(&spec()).unwrap();
    assert_eq!((image.len(), &image), (SEED_BYTES, &build(&spec()).unwrap()));
    let meta: Value = serde_json::from_str(&read(&image, "meta-data")).unwrap();
    assert_eq!((&meta["instance-id"], &meta["local-hostname"]), (&json!("0190-7"), &json!("web")));
    let user = read(&image, "user-data");
    let user: Value = serde_json::from_str(user.strip_prefix("#cloud-config\n").unwrap()).unwrap();
    assert_eq!(user["ssh_authorized_keys"], json!(spec().ssh_keys));
    let net: Value = serde_json::from_str(&read(&image, "network-config")).unwrap();
    assert_eq!(net["ethernets"]["nic0"]["dhcp4"], json!(true));
    assert_eq!(net["ethernets"]["nic1"]["match"]["macaddress"], json!("52:54:00:00:00:02"));
    assert_eq!(net["ethernets"]["nic1"]["routes"], json!([{ "to": "0.0.0.0/0", "via": "192.168.7.1" }]));
}

#[test]
fn user_data_goes_as_it_is_and_has_a_limit() {
    let text = format!("#!/bin/sh\n{}", "x".repeat(USER_DATA_BYTES_MAX - 10));
    let full = SeedSpec { user_data: text.clone(), nics: Vec::new(), ..spec() };
    let image = build(&full).unwrap();
    assert_eq!(read(&image, "user-data"), text);
    let volume = FileSystem::new(Cursor::new(image), FsOptions::new()).unwrap();
    assert!(volume.root_dir().open_file("network-config").is_err());
    let over = SeedSpec { user_data: text + "x", ..full };
    assert!(matches!(build(&over), Err(SeedError::TooLong { what: "user-data", .. })));
    let over = SeedSpec { ssh_keys: vec!["k".repeat(MADE_BYTES_MAX)], ..spec() };
    assert!(matches!(build(&over), Err(SeedError::TooLong { what: "meta-data", .. })));
}

#[test]
fn strangers_read_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("seed.img");
    fs::write(&path, build(&spec()).unwrap()).unwrap();
    match Command::new("blkid").args(["-p", "-o", "export"]).arg(&path).output() {
        Ok(output) => {
            let said = String::from_utf8(output.stdout).unwrap();
            assert!(said.contains("LABEL=CIDATA") && said.contains("TYPE=vfat"), "{said}");
        }
        Err(error) => eprintln!("skipped: blkid cannot be run ({error})"),
    }
    match Command::new("mtype").arg("-i").arg(&path).arg("::meta-data").output() {
        Ok(output) => assert!(String::from_utf8(output.stdout).unwrap().contains("0190-7")),
        Err(error) => eprintln!("skipped: mtools cannot be run ({error})"),
    }
    match Command::new("fsck.vfat").arg("-n").arg(&path).output() {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout)),
        Err(error) => eprintln!("skipped: fsck.vfat cannot be run ({error})"),
    }
}
