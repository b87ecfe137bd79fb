//! Launching, finding again and ending, against the stand-in `examples/fake_agent.rs`.

use std::{fs, os::unix::fs::FileExt, path::PathBuf, time::Duration};

use bytes::Bytes;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
};
use uuid::Uuid;

use super::*;
use crate::direct::DirectIo;

struct Bench {
    dir: TempDir,
    settings: SupervisorSettings,
    supervisor: Supervisor,
}

/// The stand-in, built by cargo beside the tests.
fn fake_agent() -> Option<PathBuf> {
    let tests = std::env::current_exe().unwrap();
    let path = tests.parent()?.parent()?.join("examples/fake_agent");
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is not built (cargo build -p serio-node --examples)", path.display());
    None
}

fn bench() -> Option<Bench> {
    let fake = fake_agent()?;
    let dir = tempfile::Builder::new().prefix("srv").tempdir().unwrap();
    let settings = SupervisorSettings {
        state_dir: dir.path().join("state"),
        run_dir: dir.path().join("run"),
        vmm_path: fake.clone(),
        first_uid: 0,
        volumed_path: fake,
        merge_bytes_per_s: 0,
        direct_io: DirectIo::Auto,
        vhost_net: true,
        // None here: the tests of `cgroup` use a real one.
        cgroup_root: Some(dir.path().to_owned()),
    };
    let supervisor = Supervisor::new(settings.clone()).unwrap();
    fs::write(dir.path().join("kernel"), b"kernel").unwrap();
    Some(Bench { dir, settings, supervisor })
}

impl Bench {
    fn plan(&self, cmdline: &str) -> LaunchPlan {
        LaunchPlan {
            uid: Uuid::new_v4(),
            name: "ardesio/web".parse().unwrap(),
            generation: 7,
            vcpus: 1,
            memory_bytes: 64 << 20,
            boot: BootPlan::Files { kernel: self.dir.path().join("kernel"), initrd: None },
            cmdline: cmdline.to_owned(),
            disks: Vec::new(),
            nics: Vec::new(),
            machine: serio_types::MachineSpec::default(),
            limits: DevicePlan::default(),
            restore: Vec::new(),
        }
    }

    /// Another seriod on the same directories; the first is forgotten, its processes are not.
    fn again(&self) -> Supervisor {
        Supervisor::new(self.settings.clone()).unwrap()
    }

    fn nothing_left(&self) {
        for dir in ["run/vms", "run/jobs", "run/exports"] {
            let left: Vec<_> = names(&self.dir.path().join(dir)).unwrap();
            assert!(left.is_empty(), "{dir}: {left:?}");
        }
    }
}

fn kvm() -> bool {
    let there = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        eprintln!("skipped: /dev/kvm cannot be opened here");
    }
    there
}

#[tokio::test]
async fn a_vm_runs_is_found_again_and_ends() {
    let Some(bench) = bench().filter(|_| kvm()) else { return };
    let plan = bench.plan("");
    let uid = plan.uid;
    let first = bench.supervisor.launch(plan.clone()).await.unwrap();
    assert!(
        matches!(bench.supervisor.launch(plan).await, Err(LaunchError::Running { pid }) if pid == first.pid())
    );
    assert_eq!(bench.supervisor.found().unwrap(), [uid]);
    assert_eq!(bench.supervisor.end_record(uid), None);
    assert_eq!(first.status().await.unwrap().uptime, Duration::from_secs(5));

    let second = bench.again();
    let (adopted, paused) = second.adopt(uid).await.unwrap().unwrap();
    assert!(!paused);
    assert_eq!((adopted.pid(), adopted.generation()), (first.pid(), 7));
    let mut console = adopted.attach_console().await.unwrap();
    console.write_all(b"!").await.unwrap();
    assert_eq!(console.read_u8().await.unwrap(), b'!');
    assert_eq!(fs::read_to_string(adopted.log_path()).unwrap(), "Linux version\n");

    let end = adopted.stop().await;
    assert_eq!(end.kind, EndKind::Stopped);
    assert_eq!(first.ended().await, end);
    assert!(second.adopt(uid).await.unwrap().is_none());
    assert_eq!(second.end_record(uid), Some(end));
    second.clean(uid).await;
    assert_eq!(second.end_record(uid), None);
    bench.nothing_left();
}

#[tokio::test]
async fn the_power_button_and_a_violent_death_are_told_apart() {
    let Some(bench) = bench().filter(|_| kvm()) else { return };
    let vm = bench.supervisor.launch(bench.plan("")).await.unwrap();
    // The stand-in ends instead of answering.
    let _ = vm.power_button().await;
    assert_eq!(vm.ended().await.kind, EndKind::PowerOff);

    let plan = bench.plan("");
    let uid = plan.uid;
    let vm = bench.supervisor.launch(plan).await.unwrap();
    let pid = rustix::process::Pid::from_raw(vm.pid() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let end = vm.ended().await;
    assert_eq!(end.kind, EndKind::Died);
    assert!(end.reason.contains("signal 9"), "{}", end.reason);
    assert_eq!(bench.supervisor.end_record(uid).unwrap().kind, EndKind::Died);
}

#[tokio::test]
async fn a_deaf_vmm_is_killed_and_counts_as_stopped() {
    let Some(bench) = bench().filter(|_| kvm()) else { return };
    let plan = bench.plan("deaf");
    let uid = plan.uid;
    let vm = bench.supervisor.launch(plan).await.unwrap();
    assert!(matches!(bench.again().adopt(uid).await, Err(AdoptError::Silent { pid, .. }) if pid == vm.pid()));
    assert_eq!(vm.stop().await.kind, EndKind::Stopped);
    bench.supervisor.clean(uid).await;
    bench.nothing_left();
}

#[tokio::test]
async fn a_failed_launch_leaves_nothing() {
    let Some(bench) = bench().filter(|_| kvm()) else { return };
    let error = bench.supervisor.launch(bench.plan("refuse")).await.unwrap_err();
    assert_eq!(error.refusal().unwrap().field, "cmdline");
    let error = bench.supervisor.launch(bench.plan("die")).await.unwrap_err();
    assert!(
        error.to_string().contains("status 3") && error.to_string().contains("something broke"),
        "{error}"
    );
    let none = LaunchPlan {
        boot: BootPlan::Files { kernel: "/nonexistent".into(), initrd: None },
        ..bench.plan("")
    };
    assert!(matches!(bench.supervisor.launch(none).await, Err(LaunchError::Kernel(_))));
    let disk = DiskPlan { source: DiskSource::Volume(Uuid::new_v4()), read_only: false };
    let none = LaunchPlan { disks: vec![disk], ..bench.plan("") };
    assert!(matches!(bench.supervisor.launch(none).await, Err(LaunchError::Disk { index: 0, .. })));
    bench.nothing_left();
}

#[tokio::test]
async fn a_missing_program_is_named() {
    let Some(mut bench) = bench().filter(|_| kvm()) else { return };
    bench.settings.vmm_path = "/nonexistent/serio-vmm".into();
    let error = bench.again().launch(bench.plan("")).await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent/serio-vmm"), "{error}");
    bench.nothing_left();
}

#[tokio::test]
async fn a_vmm_without_launch_is_not_adopted() {
    let Some(bench) = bench().filter(|_| kvm()) else { return };
    let plan = bench.plan("hang");
    let uid = plan.uid;
    let supervisor = bench.supervisor.clone();
    let launching = tokio::spawn(async move { supervisor.launch(plan).await.map(drop) });
    let run = bench.supervisor.inner.run_of(uid);
    while rundir::read_meta(&run.meta()).is_none() {
        tokio::task::yield_now().await;
    }
    let second = bench.again();
    assert!(second.adopt(uid).await.unwrap().is_none());
    assert!(launching.await.unwrap().is_err());
    bench.nothing_left();
}

#[tokio::test]
async fn a_run_directory_without_a_process_is_cleaned() {
    let Some(bench) = bench() else { return };
    let uid = Uuid::new_v4();
    let run = bench.supervisor.inner.run_of(uid);
    rundir::make_dir(run.path()).unwrap();
    assert!(bench.supervisor.adopt(uid).await.unwrap().is_none());
    assert_eq!(bench.supervisor.end_record(uid).unwrap().kind, EndKind::Died);
    bench.supervisor.clean(uid).await;
    bench.supervisor.clean(uid).await;
    bench.nothing_left();
}

#[tokio::test]
async fn volumes_are_whole_or_not_there() {
    let Some(bench) = bench() else { return };
    let supervisor = &bench.supervisor;
    let uid = Uuid::new_v4();
    supervisor.create_volume(uid, 8192, Some(bench.dir.path().join("kernel"))).await.unwrap();
    assert!(matches!(supervisor.create_volume(uid, 8192, None).await, Err(JobError::Exists(_))));
    let data = fs::File::open(bench.dir.path().join(format!("state/volumes/{uid}/00000000.data"))).unwrap();
    let mut start = [0; 6];
    data.read_exact_at(&mut start, 0).unwrap();
    assert_eq!((&start, data.metadata().unwrap().len()), (b"kernel", 8192));

    supervisor.snapshot_stopped(uid, "before").await.unwrap();
    supervisor.snapshot_stopped(uid, "after").await.unwrap();
    let info = supervisor.volume_info(uid).await.unwrap();
    let names: Vec<_> = info.snapshots.iter().map(|point| point.name.as_str()).collect();
    assert_eq!((names.as_slice(), info.chain), (["before", "after"].as_slice(), vec![0, 1, 2]));

    let broken = Uuid::new_v4();
    let error = supervisor.create_volume(broken, 13, None).await.unwrap_err();
    assert!(matches!(error, JobError::Died { .. }), "{error}");
    assert_eq!(supervisor.found_volumes().unwrap(), [uid]);
    supervisor.delete_volume(uid).await.unwrap();
    supervisor.delete_volume(uid).await.unwrap();
    assert!(matches!(
        supervisor.volume_info(uid).await,
        Err(JobError::Volume(VolumeFilesError::Missing { .. }))
    ));
    bench.nothing_left();
}

#[tokio::test]
async fn a_running_vm_seals_its_volume() {
    let Some(bench) = bench().filter(|_| kvm()) else { return };
    let uid = Uuid::new_v4();
    bench.supervisor.create_volume(uid, 4096, None).await.unwrap();
    let disk = DiskPlan { source: DiskSource::Volume(uid), read_only: false };
    let vm = bench.supervisor.launch(LaunchPlan { disks: vec![disk], ..bench.plan("") }).await.unwrap();
    vm.snapshot_volume(uid, "one").await.unwrap();
    // A leftover of a snapshot that did not happen is overwritten.
    fs::write(bench.dir.path().join(format!("state/volumes/{uid}/00000002.map")), b"").unwrap();
    vm.snapshot_volume(uid, "two").await.unwrap();
    assert_eq!(bench.supervisor.volume_info(uid).await.unwrap().chain, [0, 1, 2]);
    vm.stop().await;
}

async fn import(
    bench: &Bench,
    expected: u64,
    chunks: &[(u64, &'static [u8])],
) -> Result<ImportedImage, JobError> {
    let (sender, receiver) = mpsc::channel(1);
    let dest = bench.dir.path().join("state/images/disk.raw");
    let importing = bench.supervisor.import_image(&dest, "raw", expected, receiver);
    let sending = async move {
        for (offset, bytes) in chunks {
            if sender.send((*offset, Bytes::from_static(bytes))).await.is_err() {
                break;
            }
        }
    };
    tokio::join!(importing, sending).0
}

#[tokio::test]
async fn an_image_arrives_with_its_gaps_or_not_at_all() {
    let Some(bench) = bench() else { return };
    let dest = bench.dir.path().join("state/images/disk.raw");
    assert!(matches!(import(&bench, 10, &[(0, b"ab")]).await, Err(JobError::BrokenOff { received: 2, .. })));
    assert!(!dest.exists());
    assert!(matches!(import(&bench, 10, &[(4, b"ab"), (5, b"x")]).await, Err(JobError::Order { .. })));
    assert!(matches!(import(&bench, 10, &[(9, b"ab")]).await, Err(JobError::Order { .. })));
    assert!(matches!(import(&bench, 10, &[(u64::MAX, b"ab")]).await, Err(JobError::Order { .. })));
    assert!(!dest.exists());
    let image = import(&bench, 200_000, &[(0, b"ab"), (100_000, b"cd"), (200_000, b"")]).await.unwrap();
    let mut expected = vec![0; 200_000];
    expected[..2].copy_from_slice(b"ab");
    expected[100_000..100_002].copy_from_slice(b"cd");
    assert_eq!(fs::read(&dest).unwrap(), expected);
    assert_eq!((image.size_bytes, image.blake3), (200_000, blake3::hash(&expected).to_hex().to_string()));
    bench.nothing_left();
}

#[tokio::test]
async fn an_export_survives_and_is_found_again() {
    let Some(bench) = bench() else { return };
    let uid = Uuid::new_v4();
    bench.supervisor.create_volume(uid, 4096, None).await.unwrap();
    let plan = ExportPlan {
        id: "e1".into(),
        volume: uid,
        export_name: "token".into(),
        snapshot: None,
        writable: false,
        once: false,
        release: false,
    };
    let bad = ExportPlan { id: "../e1".into(), ..plan.clone() };
    assert!(matches!(bench.supervisor.start_export(bad).await, Err(JobError::ExportId(_))));
    let export = bench.supervisor.start_export(plan).await.unwrap();
    let second = bench.again();
    assert_eq!(second.found_exports().unwrap(), ["e1"]);
    let adopted = second.adopt_export("e1").await.unwrap().unwrap();
    assert_eq!(adopted.pid(), export.pid());
    let mut greeting = [0; 8];
    let mut client = tokio::net::UnixStream::connect(adopted.socket()).await.unwrap();
    client.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"NBDMAGIC");
    second.clean_export("e1").await;
    assert!(export.ended().await.contains("serio-volumed"));
    assert!(second.adopt_export("e1").await.unwrap().is_none());
    bench.nothing_left();
}
