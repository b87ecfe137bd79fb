//! Disk images of other formats through the API of a real seriod and real volume processes, and the copies that
//! `serio volume import` and `download` make over NBD.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use common::Seriod;
use serio_api::v1::{
    CreateVdcRequest, Image, ImageChunk, ImagePart, ImportImageHeader, ImportImageRequest,
    ListExportsRequest, ListImagesRequest, ListVolumesRequest, Quota,
    image_service_client::ImageServiceClient, import_image_request::What,
    vdc_service_client::VdcServiceClient, volume_service_client::VolumeServiceClient,
};
use tonic::{Code, Status, transport::Channel};

const MIB: usize = 1 << 20;

/// A node; `None` says why not.
async fn node() -> Option<(Seriod, Channel)> {
    let mut seriod = Seriod::new("");
    let volumed = Path::new(env!("CARGO_BIN_EXE_seriod")).with_file_name("serio-volumed");
    if fs::copy(&volumed, seriod.dir.path().join("serio-volumed")).is_err() {
        println!("skipped: {} is not built", volumed.display());
        return None;
    }
    if Command::new("qemu-img").arg("--version").output().is_err() {
        println!("skipped: qemu-img is not installed");
        return None;
    }
    seriod.start();
    let channel = seriod.connect().await.unwrap();
    let quota = Quota { vcpus: 1, memory_bytes: 64 << 20, storage_bytes: 64 << 20, ..Default::default() };
    let vdc = CreateVdcRequest { vdc_id: "ardesio".into(), quota: Some(quota), ..Default::default() };
    VdcServiceClient::new(channel.clone()).create_vdc(vdc).await.unwrap();
    Some((seriod, channel))
}

fn content() -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut noise = std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    });
    let mut content = vec![0; 12 * MIB];
    for range in [0..MIB, 5 * MIB + 700..5 * MIB + 70_000, 12 * MIB - 5000..12 * MIB] {
        content[range].iter_mut().for_each(|byte| *byte = noise.next().unwrap());
    }
    content
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The content as a raw file and as a file of a format.
fn image(dir: &Path, format: &str) -> (PathBuf, PathBuf) {
    let (raw, image) = (dir.join("disk.raw"), dir.join(format!("disk.{format}")));
    fs::write(&raw, content()).unwrap();
    let made =
        Command::new("qemu-img").args(["convert", "-O", format, text(&raw), text(&image)]).status().unwrap();
    assert!(made.success());
    (raw, image)
}

async fn import(
    channel: &Channel,
    id: &str,
    format: &str,
    disk: &[u8],
    blake3: &str,
) -> Result<Image, Status> {
    let header = ImportImageHeader {
        image_id: id.to_owned(),
        format: format.to_owned(),
        disk_bytes: disk.len() as u64,
        expected_blake3: blake3.to_owned(),
        ..Default::default()
    };
    let chunks = disk.chunks(MIB).enumerate().filter(|(_, data)| data.iter().any(|byte| *byte != 0));
    let chunks = chunks.map(|(i, data)| ImageChunk {
        part: ImagePart::Disk.into(),
        offset: (i * MIB) as u64,
        data: data.to_vec(),
    });
    let messages: Vec<ImportImageRequest> = std::iter::once(What::Header(header))
        .chain(chunks.map(What::Chunk))
        .map(|what| ImportImageRequest { what: Some(what) })
        .collect();
    let mut images = ImageServiceClient::new(channel.clone());
    images.import_image(tokio_stream::iter(messages)).await.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn images_of_other_formats_are_taken_whole_or_not_at_all() {
    let Some((seriod, channel)) = node().await else { return };
    let sum = blake3::hash(&content()).to_hex().to_string();
    for format in ["qcow2", "vmdk"] {
        let (_, file) = image(seriod.dir.path(), format);
        let bytes = fs::read(&file).unwrap();
        let taken = import(&channel, format, format, &bytes, &sum).await.unwrap();
        assert_eq!((taken.size_bytes, &taken.blake3), ((12 * MIB) as u64, &sum));
        // Nothing is left but the disk.
        let dir = seriod.dir.path().join("state/images").join(&taken.uid);
        let names: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["disk.raw"]);
        assert!(fs::read(dir.join("disk.raw")).unwrap() == content());

        let wrong = import(&channel, "wrong", format, &bytes, &"0".repeat(64)).await.unwrap_err();
        assert!(wrong.code() == Code::InvalidArgument && wrong.message().contains("meant"), "{wrong}");
        let short = import(&channel, "short", format, &bytes[..bytes.len() / 2], "").await.unwrap_err();
        assert_eq!(short.code(), Code::InvalidArgument, "{short}");
        let raw = import(&channel, "raw", format, &content(), "").await.unwrap_err();
        assert!(raw.code() == Code::InvalidArgument && raw.message().contains("does not start"), "{raw}");
    }
    let unknown = import(&channel, "unknown", "vhdx", b"x", "").await.unwrap_err();
    assert!(unknown.message().contains("raw, qcow2 and vmdk"), "{unknown}");
    let images = ImageServiceClient::new(channel).list_images(ListImagesRequest::default()).await.unwrap();
    assert_eq!(images.into_inner().images.len(), 2);
    assert_eq!(fs::read_dir(seriod.dir.path().join("state/images")).unwrap().count(), 2);
}

/// The command line, if it is built; it says why it fails.
fn serio(seriod: &Seriod, args: &[&str]) -> Option<Output> {
    let program = Path::new(env!("CARGO_BIN_EXE_seriod")).with_file_name("serio");
    if !program.is_file() {
        println!("skipped: {} is not built", program.display());
        return None;
    }
    let host = format!("unix:{}", seriod.dir.path().join("run/seriod.sock").display());
    Some(Command::new(program).args(["--host", &host]).args(args).output().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_goes_into_a_volume_and_comes_back() {
    let Some((seriod, channel)) = node().await else { return };
    let dir = seriod.dir.path();
    let (raw, qcow2) = image(dir, "qcow2");
    let sum = blake3::hash(&content()).to_hex().to_string();
    let run = |args: &[&str]| tokio::task::block_in_place(|| serio(&seriod, args));
    let said = |output: &Output| {
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    };
    let import = ["volume", "import", "ardesio/data", text(&qcow2), "--format", "qcow2", "--size", "16MiB"];
    let Some(done) = run(&import) else { return };
    assert!(done.status.success() && said(&done).contains(&sum), "{}", said(&done));
    let (back, again) = (dir.join("back.qcow2"), dir.join("back.raw"));
    let done = run(&["volume", "download", "ardesio/data", text(&back), "--format", "qcow2"]).unwrap();
    assert!(done.status.success(), "{}", said(&done));
    for args in
        [&["check", "-f", "qcow2", text(&back)][..], &["compare", "-f", "qcow2", text(&back), text(&raw)]]
    {
        let output = Command::new("qemu-img").args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", said(&output));
    }
    let done = run(&["volume", "snapshot", "ardesio/data", "--name", "one"]).unwrap();
    assert!(done.status.success(), "{}", said(&done));
    let done = run(&["volume", "download", "ardesio/data@one", text(&again)]).unwrap();
    assert!(done.status.success(), "{}", said(&done));
    assert!(fs::read(&again).unwrap()[..content().len()] == content());
    let done = run(&["volume", "download", "ardesio/data@one", "-"]).unwrap();
    assert!(done.stdout[..content().len()] == content());

    // What the quota does not allow, and what is no image, leaves nothing.
    let large = run(&["volume", "import", "ardesio/large", text(&raw), "--size", "1GiB"]).unwrap();
    assert_eq!(large.status.code(), Some(4), "{}", said(&large));
    let wrong = run(&["volume", "import", "ardesio/wrong", text(&raw), "--format", "qcow2"]).unwrap();
    assert!(said(&wrong).contains("does not start with QFI"), "{}", said(&wrong));
    let image =
        run(&["image", "import", "base", text(&qcow2), "--format", "qcow2", "--blake3", &sum]).unwrap();
    assert!(image.status.success() && said(&image).contains(&sum), "{}", said(&image));
    let mut volumes = VolumeServiceClient::new(channel);
    let exports = volumes.list_exports(ListExportsRequest::default()).await.unwrap().into_inner().exports;
    assert!(exports.is_empty(), "{exports:?}");
    let list = volumes.list_volumes(ListVolumesRequest::default()).await.unwrap().into_inner().volumes;
    assert_eq!(list.iter().map(|v| v.name.as_str()).collect::<Vec<_>>(), ["vdcs/ardesio/volumes/data"]);
}
