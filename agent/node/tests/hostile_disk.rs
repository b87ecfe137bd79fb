//! The disk under the state of a real seriod, with a guest beside it: full, and with a database that somebody has damaged.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use common::{
    Seriod,
    disk::Disk,
    guest::{counts_beyond, furnish, rounds, spec},
    rig::Rig,
};
use serio_api::v1::{
    CreateVdcRequest, GetVmRequest, ListVdcsRequest, Quota, VmSpec, VmState,
    vdc_service_client::VdcServiceClient, vm_service_client::VmServiceClient,
};
use tonic::{Code, transport::Channel};

async fn create_vdc(channel: &Channel, name: &str) -> Result<(), tonic::Status> {
    let quota = Some(Quota { vcpus: 1, memory_bytes: 1 << 20, storage_bytes: 1 << 20, ..Quota::default() });
    let request = CreateVdcRequest { vdc_id: name.to_owned(), quota, ..Default::default() };
    VdcServiceClient::new(channel.clone()).create_vdc(request).await.map(drop)
}

async fn vdcs(channel: &Channel) -> Vec<String> {
    let list = VdcServiceClient::new(channel.clone()).list_vdcs(ListVdcsRequest::default()).await.unwrap();
    list.into_inner().vdcs.into_iter().map(|vdc| vdc.name).collect()
}

async fn state(channel: &Channel) -> (VmState, u32) {
    let request = GetVmRequest { name: "vdcs/ardesio/vms/web".to_owned() };
    let vm = VmServiceClient::new(channel.clone()).get_vm(request).await.unwrap().into_inner();
    let status = vm.status.unwrap();
    (status.state(), status.pid)
}

#[tokio::test]
async fn a_full_disk() {
    let mut seriod = Seriod::new("[health]\ndisk_floor = \"0\"\n");
    let disk = match Disk::mount(&seriod.dir.path().join("state"), 48) {
        Ok(disk) => disk,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let channel = match furnish(&mut seriod).await {
        Ok(channel) => channel,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    // What a guest writes anew needs room, as everywhere; this one writes nothing.
    let quiet = VmSpec { cmdline: "mini.test=heartbeat".to_owned(), ..spec() };
    let mut rig = Rig::with(seriod, channel, quiet).await;
    let runs = state(&rig.channel).await;
    create_vdc(&rig.channel, "before").await.unwrap();
    let fill = disk.fill();
    // Some room may be left in pages that are written already.
    let mut made = Vec::new();
    let refused = loop {
        let name = format!("more{}", made.len());
        match create_vdc(&rig.channel, &name).await {
            Ok(()) => made.push(format!("vdcs/{name}")),
            Err(refused) => break refused,
        }
        assert!(made.len() < 5000, "the disk is not full");
    };
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    assert!(refused.message().contains("full"), "{refused}");
    rig.is_healthy("with a full disk").await;
    assert_eq!(state(&rig.channel).await, runs);
    let known = vdcs(&rig.channel).await;
    assert_eq!(known.len(), made.len() + 2, "{known:?}");
    // With a full disk it can be started too.
    rig.seriod.kill();
    rig.seriod.start();
    rig.channel = rig.seriod.connect().await.unwrap();
    assert_eq!((state(&rig.channel).await, vdcs(&rig.channel).await), (runs, known.clone()));
    assert!(create_vdc(&rig.channel, "still").await.is_err());
    fs::remove_file(fill).unwrap();
    create_vdc(&rig.channel, "after").await.unwrap();
    assert_eq!(vdcs(&rig.channel).await.len(), known.len() + 1);
    assert_eq!(state(&rig.channel).await, runs);
    rig.is_fine("when there is room again").await;
}

#[tokio::test]
async fn a_damaged_database() {
    let Some(mut rig) = Rig::start("").await else { return };
    create_vdc(&rig.channel, "before").await.unwrap();
    rig.seriod.kill();
    // The first copy is made at the start.
    rig.seriod.start();
    let state_dir = rig.seriod.dir.path().join("state");
    let copy = state_dir.join("copies/state-000001.db");
    let deadline = Instant::now() + Duration::from_secs(30);
    while serio_store::copies::list(&state_dir.join("state.db")).is_empty() {
        assert!(Instant::now() < deadline, "there is no copy");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    rig.channel = rig.seriod.connect().await.unwrap();
    let runs = state(&rig.channel).await;
    create_vdc(&rig.channel, "lost").await.unwrap();
    rig.seriod.terminate();
    let newest = serio_store::copies::list(&state_dir.join("state.db")).remove(0);

    let path = state_dir.join("state.db");
    // What is newest is in the log beside it, of which SQLite leaves out what it cannot read, without a word.
    let log = OpenOptions::new().write(true).open(state_dir.join("state.db-wal")).unwrap();
    log.write_all_at(&[0x5a; 64], 0).unwrap();
    let damaged = fs::read(&path).unwrap();
    let counted = rounds(&rig.seriod, &rig.uid);
    let refused = rig.seriod.command().output().unwrap();
    assert!(!refused.status.success());
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("state.db is "), "{said}");
    assert!(said.contains("seriod --restore-state") && said.contains(newest.to_str().unwrap()), "{said}");
    assert_eq!(fs::read(&path).unwrap(), damaged, "it was touched");
    // Nobody tells the guest.
    let counted = counts_beyond(&rig.seriod, &rig.uid, counted).await;
    let restored = rig.seriod.command().arg("--restore-state").output().unwrap();
    let said = String::from_utf8(restored.stdout).unwrap();
    assert!(restored.status.success() && said.contains(newest.to_str().unwrap()), "{said}");
    assert_eq!(fs::read(state_dir.join("state.db.damaged-1")).unwrap(), damaged);
    assert!(copy.exists());

    rig.seriod.start();
    rig.channel = rig.seriod.connect().await.unwrap();
    assert_eq!(state(&rig.channel).await, runs, "the same process");
    let known = vdcs(&rig.channel).await;
    assert!(known.contains(&"vdcs/before".to_owned()), "{known:?}");
    counts_beyond(&rig.seriod, &rig.uid, counted).await;
    rig.is_fine("with the copy").await;
}
