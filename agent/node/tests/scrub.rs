//! Checks of a real seriod and serio-volumed: rot is found when it is looked for, and by the scrubber by itself.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{fs, os::unix::fs::FileExt, path::Path, time::Duration};

use common::Seriod;
use serio_api::v1::{
    CheckVolumeRequest, CreateSnapshotRequest, CreateVdcRequest, CreateVolumeRequest, GetVolumeRequest,
    Operation, OperationState, Quota, Volume, WatchEventsRequest, WatchOperationRequest,
    node_service_client::NodeServiceClient, operation_service_client::OperationServiceClient,
    vdc_service_client::VdcServiceClient, volume_service_client::VolumeServiceClient,
};

const VOLUME: &str = "vdcs/ardesio/volumes/data";

async fn volume(seriod: &Seriod) -> Volume {
    let request = GetVolumeRequest { name: VOLUME.to_owned() };
    let channel = seriod.connect().await.unwrap();
    VolumeServiceClient::new(channel).get_volume(request).await.unwrap().into_inner()
}

async fn check(seriod: &Seriod, data: bool) -> Operation {
    let channel = seriod.connect().await.unwrap();
    let request =
        CheckVolumeRequest { name: VOLUME.to_owned(), data, bytes_per_second: 0, ..Default::default() };
    let begun = VolumeServiceClient::new(channel.clone()).check_volume(request).await.unwrap().into_inner();
    assert_eq!((begun.kind.as_str(), begun.target.as_str()), ("check-volume", VOLUME));
    let watch = WatchOperationRequest { name: begun.name };
    let mut stream = OperationServiceClient::new(channel).watch_operation(watch).await.unwrap().into_inner();
    let mut last = None;
    while let Some(operation) = stream.message().await.unwrap() {
        last = Some(operation);
    }
    last.unwrap()
}

/// The messages of the first event of that kind.
async fn event(seriod: &Seriod, kind: &str) -> String {
    let channel = seriod.connect().await.unwrap();
    let request = WatchEventsRequest { follow: true, ..Default::default() };
    let mut stream = NodeServiceClient::new(channel).watch_events(request).await.unwrap().into_inner();
    let found = async {
        loop {
            let event = stream.message().await.unwrap().expect("it follows");
            if event.kind == kind {
                return format!("{} {}", event.resource, event.message);
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), found).await.unwrap()
}

fn flip(seriod: &Seriod, uid: &str, at: u64) {
    let path = seriod.dir.path().join("state/volumes").join(uid).join("00000000.data");
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}

/// A seriod that scrubs all the time; none, and why is said, where it cannot.
fn start(pace: &str) -> Option<Seriod> {
    let volumed = Path::new(env!("CARGO_BIN_EXE_seriod")).with_file_name("serio-volumed");
    if !volumed.is_file() {
        println!("skipped: {} is not built", volumed.display());
        return None;
    }
    let mut seriod = Seriod::new(&format!("[volumes]\nscrub_interval = \"1s\"\nscrub_pace = \"{pace}\"\n"));
    fs::copy(&volumed, seriod.dir.path().join("serio-volumed")).unwrap();
    seriod.start();
    Some(seriod)
}

/// Makes the volume; its uid.
async fn create(seriod: &Seriod, size_bytes: u64) -> String {
    let channel = seriod.connect().await.unwrap();
    let quota = Quota { vcpus: 1, memory_bytes: 1 << 30, storage_bytes: 1 << 30, ..Default::default() };
    let vdc = CreateVdcRequest { vdc_id: "ardesio".to_owned(), quota: Some(quota), ..Default::default() };
    VdcServiceClient::new(channel.clone()).create_vdc(vdc).await.unwrap();
    let create = CreateVolumeRequest {
        parent: "vdcs/ardesio".to_owned(),
        volume_id: "data".to_owned(),
        size_bytes,
        ..Default::default()
    };
    VolumeServiceClient::new(channel).create_volume(create).await.unwrap().into_inner().uid
}

async fn seal(seriod: &Seriod) {
    let snapshot = CreateSnapshotRequest {
        volume: VOLUME.to_owned(),
        snapshot_id: "monday".to_owned(),
        ..Default::default()
    };
    let channel = seriod.connect().await.unwrap();
    VolumeServiceClient::new(channel).create_snapshot(snapshot).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrub_goes_on_after_seriod_was_killed() {
    let Some(mut seriod) = start("1MiB") else { return };
    let uid = create(&seriod, 130 << 20).await;
    // A second's work in the first 64 MiB, some more in the next.
    for chunk in [0, 1, 128, 129, 130, 131, 132, 133] {
        flip(&seriod, &uid, chunk << 19);
    }
    seal(&seriod).await;
    let kept = seriod.dir.path().join("state/volumes").join(&uid).join("scrub.json");
    let until = async |what: &str, is_so: &dyn Fn(&serde_json::Value) -> bool| {
        let looks = async {
            loop {
                // It is replaced whole; at first there is none.
                let record = fs::read(&kept).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
                if record.is_some_and(|record| is_so(&record)) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        assert!(tokio::time::timeout(Duration::from_secs(60), looks).await.is_ok(), "{what}");
    };
    until("it comes to the second page", &|record| record["under_way"]["page"] == 1).await;
    seriod.kill();
    seriod.start();
    let went_on = |record: &serde_json::Value| {
        record["under_way"].is_null()
            && record["scrub"]["notes"].to_string().contains("it went on at byte 67108864 of layer 0")
    };
    until("it goes on there, and ends", &went_on).await;
    assert_eq!(volume(&seriod).await.last_scrub.unwrap().problem_count, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn rot_is_found_when_asked_and_by_the_scrubber() {
    let Some(mut seriod) = start("0") else { return };
    let uid = create(&seriod, 8 << 20).await;
    flip(&seriod, &uid, 1 << 20);
    seal(&seriod).await;

    assert_eq!(check(&seriod, false).await.state(), OperationState::Done);
    let now = volume(&seriod).await;
    assert_eq!(now.last_check.unwrap().problem_count, 0);
    assert!(now.last_scrub.is_none());
    assert_eq!(check(&seriod, true).await.state(), OperationState::Done);
    let scrub = volume(&seriod).await.last_scrub.unwrap();
    assert_eq!((scrub.problem_count, scrub.added_bytes), (0, 512 << 10), "{scrub:?}");

    // Nobody looks: the scrubber does.
    flip(&seriod, &uid, (1 << 20) + 9);
    seriod.terminate();
    seriod.start();
    let message = event(&seriod, "damaged").await;
    assert!(
        message.starts_with(&format!("{VOLUME} bytes 1048576+524288 of layer 0 are not what was sealed")),
        "{message}"
    );
    let scrub = volume(&seriod).await.last_scrub.unwrap();
    let problem = &scrub.problems[0];
    assert_eq!((scrub.problem_count, problem.offset_bytes, problem.length_bytes), (1, 1 << 20, 512 << 10));
    assert_eq!(problem.points, ["monday", ""]);

    // Put right again, a check says so.
    flip(&seriod, &uid, (1 << 20) + 9);
    assert_eq!(check(&seriod, true).await.state(), OperationState::Done);
    assert_eq!(volume(&seriod).await.last_scrub.unwrap().problem_count, 0);
}
