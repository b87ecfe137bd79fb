//! A guest that counts: it writes rounds to its disk and says each on its console.

use std::time::{Duration, Instant};

use serio_api::v1::{
    CreateVdcRequest, CreateVmRequest, Quota, Vm, VmSpec, vdc_service_client::VdcServiceClient,
    vm_service_client::VmServiceClient,
};
use tonic::transport::Channel;

use super::{Seriod, import_image, mini_guest};

/// A node with the mini guest's image, that writes rounds to its disk and counts them on the console; and a vdc.
pub async fn guest_node(more: &str) -> Result<(Seriod, Channel), String> {
    let mut seriod = Seriod::new(more);
    let channel = furnish(&mut seriod).await?;
    Ok((seriod, channel))
}

/// Starts a node and furnishes it so.
pub async fn furnish(seriod: &mut Seriod) -> Result<Channel, String> {
    seriod.with_programs()?;
    let kernel = mini_guest()?;
    seriod.start();
    let channel = seriod.connect().await.unwrap();
    import_image(channel.clone(), "mini", "mini.test=writer", &kernel, &[]).await;
    let (memory_bytes, storage_bytes) = (2 << 30, 1 << 30);
    let quota = Quota { vcpus: 32, memory_bytes, storage_bytes, ..Quota::default() };
    let vdc = CreateVdcRequest { vdc_id: "ardesio".to_owned(), quota: Some(quota), ..Default::default() };
    VdcServiceClient::new(channel.clone()).create_vdc(vdc).await.unwrap();
    Ok(channel)
}

/// A small one.
pub fn spec() -> VmSpec {
    VmSpec {
        vcpus: 1,
        memory_bytes: 32 << 20,
        image: "images/mini".to_owned(),
        root_disk_bytes: 1 << 20,
        ..VmSpec::default()
    }
}

/// Makes and starts one.
pub async fn run(client: &mut VmServiceClient<Channel>, name: &str, spec: VmSpec) -> Vm {
    let request = CreateVmRequest {
        parent: "vdcs/ardesio".to_owned(),
        vm_id: name.to_owned(),
        spec: Some(spec),
        start: true,
        ..CreateVmRequest::default()
    };
    client.create_vm(request).await.unwrap().into_inner()
}

/// The rounds that a guest says, in order.
pub fn all_rounds(seriod: &Seriod, uid: &str) -> Vec<u64> {
    let log = seriod.dir.path().join("state/vms").join(uid).join("serial.log");
    let log = std::fs::read_to_string(log).unwrap_or_default();
    assert!(!log.contains("damaged"), "{log}");
    let whole = log.rfind('\n').map_or("", |end| &log[..end]);
    let counted = |line: &str| {
        let number = line.strip_prefix("writer: ").or_else(|| line.strip_prefix("heartbeat "))?;
        number.split(' ').next()?.parse().ok()
    };
    whole.lines().filter_map(counted).collect()
}

/// The last of them.
pub fn rounds(seriod: &Seriod, uid: &str) -> u64 {
    all_rounds(seriod, uid).pop().unwrap_or(0)
}

/// Waits until a guest has counted beyond that.
pub async fn counts_beyond(seriod: &Seriod, uid: &str, before: u64) -> u64 {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        match rounds(seriod, uid) {
            now if now > before => return now,
            now => assert!(Instant::now() < deadline, "{now} rounds"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
