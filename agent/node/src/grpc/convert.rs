//! Protobuf ⇄ inner types. Requests are checked whole: an answer names every wrong field at once.

use std::time::Duration;

use pbjson_types::{Duration as ProtoDuration, Timestamp};
use serio_api::v1;
use serio_store::record::{
    Encryption, EventRecord, ImageRecord, Made, Millis, OperationRecord, OperationState, PointClass,
};
use serio_types::{
    BootFrom, CloudInit, Name, NicSpec, Quota, RestartPolicy, VdcLimits, VdcName, VmSpec, VolumeSize,
    resource,
};

pub(super) use super::fields::request_of;
pub use super::fields::{Fields, field};
use super::machine;
use crate::{
    error::{Error, chain},
    state::command::{ExportView, SnapshotView, VdcSnapshotView, VdcView, VmState, VmView, VolumeView},
    supervise::Allocated,
};

/// The most bytes of user data: cloud-init's own limits are far above, the seed disk's are not.
const USER_DATA_BYTES_MAX: usize = 512 << 10;
/// The most keys of a VM, and bytes of one.
const SSH_KEYS_MAX: usize = 64;
const SSH_KEY_BYTES_MAX: usize = 16 << 10;

/// A quota; all of it must be given.
///
/// # Errors
/// It is missing, or a part is zero.
pub fn quota(quota: Option<v1::Quota>) -> Result<Quota, Error> {
    let quota = quota
        .ok_or_else(|| Error::invalid("quota", "is missing: give vcpus, memory_bytes and storage_bytes"))?;
    let mut fields = Fields::default();
    for (field, amount) in [
        ("quota.vcpus", u64::from(quota.vcpus)),
        ("quota.memory_bytes", quota.memory_bytes),
        ("quota.storage_bytes", quota.storage_bytes),
    ] {
        if amount == 0 {
            fields.wrong(field, "0: a vdc needs some of each resource");
        }
        if amount > i64::MAX.unsigned_abs() {
            fields.wrong(field, "more than this node can count");
        }
    }
    fields.done(Some(Quota {
        vcpus: u64::from(quota.vcpus),
        memory_bytes: quota.memory_bytes,
        storage_bytes: quota.storage_bytes,
    }))
}

/// `parent` and an id make a name in a vdc.
///
/// # Errors
/// Either is wrong.
pub fn in_vdc(parent: &str, id_field: &str, id: &str) -> Result<VdcName, Error> {
    let mut fields = Fields::default();
    let vdc = fields.take("parent", resource::parse_vdc(parent));
    let name = fields.take(id_field, id.parse::<Name>());
    fields.done(vdc.zip(name).map(|(vdc, name)| VdcName { vdc, name }))
}

/// A volume's size; none when 0.
pub fn volume_size(fields: &mut Fields, field: &str, bytes: u64) -> Option<VolumeSize> {
    if bytes == 0 { None } else { fields.take(field, VolumeSize::try_from(bytes)) }
}

/// A card of a request, which has it in `at`.
pub fn nic(fields: &mut Fields, at: &str, nic: &v1::NicSpec) -> NicSpec {
    let field = |name: &str| format!("{at}.{name}");
    let mut spec = NicSpec::default();
    if !nic.mac.is_empty() {
        spec.mac = fields.take(field("mac"), nic.mac.parse());
    }
    if !nic.address.is_empty() {
        spec.address = fields.take(field("address"), nic.address.parse());
    }
    if !nic.gateway.is_empty() {
        spec.gateway = match nic.gateway.parse() {
            Ok(gateway) => Some(gateway),
            Err(_) => {
                fields.wrong(
                    field("gateway"),
                    format!("`{}` is not an address: write for example 192.168.7.1", nic.gateway),
                );
                None
            }
        };
    }
    spec
}

fn cloud_init(fields: &mut Fields, init: v1::CloudInit) -> CloudInit {
    let hostname = (!init.hostname.is_empty()).then_some(init.hostname);
    if let Some(Err(error)) = hostname.as_ref().map(|name| name.parse::<Name>()) {
        fields.wrong("spec.cloud_init.hostname", chain(&error));
    }
    if init.ssh_keys.len() > SSH_KEYS_MAX {
        fields.wrong(
            "spec.cloud_init.ssh_keys",
            format!("{} keys: at most {SSH_KEYS_MAX}", init.ssh_keys.len()),
        );
    }
    for (index, key) in init.ssh_keys.iter().enumerate() {
        if key.len() > SSH_KEY_BYTES_MAX || key.chars().any(char::is_control) || key.trim().is_empty() {
            fields.wrong(format!("spec.cloud_init.ssh_keys[{index}]"), "is not a line of authorized_keys");
        }
    }
    if init.user_data.len() > USER_DATA_BYTES_MAX {
        let problem = format!("{} bytes: at most {USER_DATA_BYTES_MAX}", init.user_data.len());
        fields.wrong("spec.cloud_init.user_data", problem);
    }
    CloudInit {
        hostname,
        ssh_keys: init.ssh_keys,
        user_data: (!init.user_data.is_empty()).then_some(init.user_data),
    }
}

/// What to do when it ends.
pub fn restart_policy(fields: &mut Fields, policy: i32) -> RestartPolicy {
    match v1::RestartPolicy::try_from(policy) {
        Ok(v1::RestartPolicy::Unspecified | v1::RestartPolicy::OnFailure) => RestartPolicy::OnFailure,
        Ok(v1::RestartPolicy::Never) => RestartPolicy::Never,
        Ok(v1::RestartPolicy::Always) => RestartPolicy::Always,
        Err(_) => {
            fields.wrong("spec.restart_policy", format!("{policy} is unknown"));
            RestartPolicy::Never
        }
    }
}

/// Where the kernel comes from.
pub fn boot(fields: &mut Fields, boot: i32) -> BootFrom {
    match v1::BootSource::try_from(boot) {
        Ok(v1::BootSource::Unspecified) => BootFrom::Auto,
        Ok(v1::BootSource::Image) => BootFrom::Image,
        Ok(v1::BootSource::Disk) => BootFrom::Disk,
        Err(_) => {
            fields.wrong("spec.boot", format!("{boot} is unknown"));
            BootFrom::Auto
        }
    }
}

/// What is wanted of a VM.
///
/// # Errors
/// All wrong fields.
pub fn vm_spec(vdc: &Name, spec: Option<v1::VmSpec>) -> Result<VmSpec, Error> {
    let spec = spec.ok_or_else(|| Error::invalid("spec", "is missing"))?;
    let mut fields = Fields::default();
    let restart_policy = restart_policy(&mut fields, spec.restart_policy);
    let boot = boot(&mut fields, spec.boot);
    let vcpus = fields.take("spec.vcpus", spec.vcpus.try_into());
    let memory = fields.take("spec.memory_bytes", spec.memory_bytes.try_into());
    let image = fields.take("spec.image", resource::parse_image(&spec.image));
    let machine = machine::from_proto(&mut fields, vdc, &spec, memory);
    let root_disk = volume_size(&mut fields, "spec.root_disk_bytes", spec.root_disk_bytes);
    let volumes = spec.volumes.iter().enumerate().filter_map(|(index, name)| {
        let volume = fields.take(format!("spec.volumes[{index}]"), resource::parse_volume(name))?;
        if volume.vdc != *vdc {
            fields.wrong(
                format!("spec.volumes[{index}]"),
                format!("is of vdc {}: a VM has volumes of its own vdc only", volume.vdc),
            );
        }
        Some(volume.name)
    });
    let volumes = volumes.collect();
    let nics =
        (0..).zip(&spec.nics).map(|(at, one)| nic(&mut fields, &format!("spec.nics[{at}]"), one)).collect();
    let cmdline =
        if spec.cmdline.is_empty() { None } else { fields.take("spec.cmdline", spec.cmdline.try_into()) };
    let cloud_init = spec.cloud_init.map(|init| cloud_init(&mut fields, init));
    let whole = vcpus.zip(memory).zip(image).map(|((vcpus, memory), image)| VmSpec {
        vcpus,
        memory,
        image,
        root_disk,
        volumes,
        nics,
        cmdline,
        cloud_init,
        restart_policy,
        boot,
        machine,
    });
    fields.done(whole)
}

/// A duration, or what it is when absent.
///
/// # Errors
/// Negative, or beyond `max`.
pub fn duration(
    name: &str,
    value: Option<&ProtoDuration>,
    absent: Duration,
    max: Duration,
) -> Result<Duration, Error> {
    let Some(value) = value else { return Ok(absent) };
    let whole = u64::try_from(value.seconds).ok().zip(u32::try_from(value.nanos).ok());
    let given = whole.map(|(seconds, nanos)| {
        Duration::from_secs(seconds).saturating_add(Duration::from_nanos(nanos.into()))
    });
    given
        .filter(|d| *d <= max)
        .ok_or_else(|| Error::invalid(name, format!("{}s: give 0s to {}s", value.seconds, max.as_secs())))
}

/// To the wire.
#[must_use]
pub fn timestamp(time: Millis) -> Timestamp {
    let nanos = i32::try_from(time.0.rem_euclid(1000)).unwrap_or(0).saturating_mul(1_000_000);
    Timestamp { seconds: time.0.div_euclid(1000), nanos }
}

/// To the wire; the caps are a vdc's own.
fn proto_quota(quota: &Quota, limits: &VdcLimits) -> v1::Quota {
    v1::Quota {
        vcpus: u32::try_from(quota.vcpus).unwrap_or(u32::MAX),
        memory_bytes: quota.memory_bytes,
        storage_bytes: quota.storage_bytes,
        iops: limits.iops,
        bandwidth_bytes_per_second: limits.bandwidth_bytes,
        snapshots: limits.snapshots,
    }
}

/// To the wire.
#[must_use]
pub fn vdc(view: &VdcView) -> v1::Vdc {
    let limits = &view.record.limits;
    let snapshots = u32::try_from(view.snapshots).unwrap_or(u32::MAX);
    v1::Vdc {
        name: resource::vdc(&view.record.name),
        uid: view.record.uid.to_string(),
        generation: view.record.generation.0,
        create_time: Some(timestamp(view.record.create_time)),
        quota: Some(proto_quota(&view.record.quota, limits)),
        used: Some(proto_quota(&view.used, &VdcLimits { snapshots, ..VdcLimits::default() })),
        share: Some(v1::Share {
            weight: limits.weight_of(view.record.quota.vcpus),
            burst_percent: limits.burst_percent,
        }),
        encryption: match view.record.encryption {
            Encryption::Plain => v1::Encryption::Plain,
            Encryption::Encrypted => v1::Encryption::Encrypted,
            Encryption::Erased => v1::Encryption::Erased,
        }
        .into(),
    }
}

fn proto_nic(nic: &NicSpec) -> v1::NicSpec {
    v1::NicSpec {
        mac: nic.mac.map(|m| m.to_string()).unwrap_or_default(),
        address: nic.address.map(|a| a.to_string()).unwrap_or_default(),
        gateway: nic.gateway.map(|g| g.to_string()).unwrap_or_default(),
    }
}

pub(super) fn proto_spec(vdc: &Name, spec: &VmSpec) -> v1::VmSpec {
    let policy = match spec.restart_policy {
        RestartPolicy::Never => v1::RestartPolicy::Never,
        RestartPolicy::OnFailure => v1::RestartPolicy::OnFailure,
        RestartPolicy::Always => v1::RestartPolicy::Always,
    };
    let volume = |name: &Name| resource::volume(&VdcName { vdc: vdc.clone(), name: name.clone() });
    v1::VmSpec {
        vcpus: spec.vcpus.get(),
        memory_bytes: spec.memory.bytes(),
        image: resource::image(&spec.image),
        root_disk_bytes: spec.root_disk.map_or(0, VolumeSize::bytes),
        volumes: spec.volumes.iter().map(volume).collect(),
        nics: spec.nics.iter().map(proto_nic).collect(),
        cmdline: spec.cmdline.clone().map(String::from).unwrap_or_default(),
        cloud_init: spec.cloud_init.clone().map(|init| v1::CloudInit {
            hostname: init.hostname.unwrap_or_default(),
            ssh_keys: init.ssh_keys,
            user_data: init.user_data.unwrap_or_default(),
        }),
        restart_policy: policy.into(),
        boot: match spec.boot {
            BootFrom::Auto => v1::BootSource::Unspecified,
            BootFrom::Image => v1::BootSource::Image,
            BootFrom::Disk => v1::BootSource::Disk,
        }
        .into(),
        ..machine::to_proto(vdc, &spec.machine)
    }
}

/// To the wire.
#[must_use]
pub const fn vm_state(state: VmState) -> v1::VmState {
    match state {
        VmState::Stopped => v1::VmState::Stopped,
        VmState::Starting => v1::VmState::Starting,
        VmState::Running => v1::VmState::Running,
        VmState::Paused => v1::VmState::Paused,
        VmState::Stopping => v1::VmState::Stopping,
        VmState::Failed => v1::VmState::Failed,
    }
}

/// To the wire; `now` gives the uptime.
#[must_use]
pub fn vm(view: &VmView, now: Millis) -> v1::Vm {
    let record = &view.record;
    let state = vm_state(view.state);
    let up = record
        .start_time
        .filter(|_| matches!(view.state, VmState::Running | VmState::Paused | VmState::Stopping));
    let uptime = up.map(|start| {
        let ms = now.0.saturating_sub(start.0).max(0);
        ProtoDuration {
            seconds: ms / 1000,
            nanos: i32::try_from(ms % 1000).unwrap_or(0).saturating_mul(1_000_000),
        }
    });
    let status = v1::VmStatus {
        state: state.into(),
        pid: view.pid.unwrap_or(0),
        start_time: up.map(timestamp),
        uptime,
        last_end: record.last_end.as_ref().map(|end| v1::VmEnd {
            time: Some(timestamp(end.time)),
            kind: end.kind.as_str().to_owned(),
            reason: end.reason.clone(),
        }),
        restarts: record.restarts,
        root_volume: view.root_volume.as_ref().map(resource::volume).unwrap_or_default(),
        nics: record.spec.nics.iter().map(proto_nic).collect(),
        kernel: record.kernel.clone().map(|kernel| v1::BootedKernel {
            path: kernel.path,
            version: kernel.version,
            title: kernel.title,
            source: kernel.source,
            partition: kernel.partition,
            cmdline: kernel.cmdline,
        }),
        troubles: view.troubles.iter().map(machine::trouble).collect(),
        // Asked of the VMM by the caller.
        ..v1::VmStatus::default()
    };
    v1::Vm {
        name: resource::vm(&view.name),
        uid: record.uid.to_string(),
        generation: record.generation.0,
        create_time: Some(timestamp(record.create_time)),
        spec: Some(proto_spec(&view.name.vdc, &record.spec)),
        status: Some(status),
    }
}

/// To the wire; what its files take is looked up by the caller.
#[must_use]
pub fn volume(view: &VolumeView, allocated: Allocated) -> v1::Volume {
    v1::Volume {
        name: resource::volume(&view.name),
        uid: view.record.uid.to_string(),
        generation: view.record.generation.0,
        create_time: Some(timestamp(view.record.create_time)),
        size_bytes: view.record.size_bytes,
        allocated_bytes: allocated.own_bytes,
        shared_bytes: allocated.shared_bytes,
        source_image: view.record.source_image.as_ref().map(resource::image).unwrap_or_default(),
        attached_to: view.attached_to.as_ref().map(resource::vm).unwrap_or_default(),
        snapshots: view.snapshots.iter().map(Name::to_string).collect(),
        source_snapshot: view.record.source_snapshot.clone().unwrap_or_default(),
        last_check: None,
        last_scrub: None,
    }
}

fn point_class(class: PointClass) -> v1::PointClass {
    match class {
        PointClass::Crash => v1::PointClass::Crash,
        PointClass::App => v1::PointClass::App,
    }
}

/// To the wire.
#[must_use]
pub fn vdc_snapshot(view: &VdcSnapshotView) -> v1::VdcSnapshot {
    let app = !view.parts.is_empty() && view.parts.iter().all(|p| p.record.class == PointClass::App);
    v1::VdcSnapshot {
        name: resource::vdc_snapshot(&view.name),
        uid: view.record.uid.to_string(),
        create_time: Some(timestamp(view.record.create_time)),
        snapshots: view.parts.iter().map(snapshot).collect(),
        class: point_class(if app { PointClass::App } else { PointClass::Crash }).into(),
        deleting: view.record.state == Made::Deleting,
    }
}

/// To the wire.
#[must_use]
pub fn vm_snapshot(view: &VdcSnapshotView) -> v1::VmSnapshot {
    let saved = view.record.saved.as_ref();
    let part = |part: &SnapshotView| resource::snapshot(&part.volume, &part.record.name);
    v1::VmSnapshot {
        name: view.resource.clone(),
        uid: view.record.uid.to_string(),
        create_time: Some(timestamp(view.record.create_time)),
        spec: saved.map(|saved| proto_spec(&view.name.vdc, &saved.spec)),
        memory_bytes: saved.map_or(0, |saved| saved.memory_bytes),
        pause: saved.map(|saved| Duration::from_nanos(saved.paused_ns).into()),
        volume_snapshots: view.parts.iter().map(part).collect(),
        deleting: view.record.state == Made::Deleting,
        incremental: saved.is_some_and(|saved| !saved.bases.is_empty()),
        parent: view.base.clone().unwrap_or_default(),
    }
}

/// To the wire.
#[must_use]
pub fn operation(record: &OperationRecord) -> v1::Operation {
    let state = match record.state {
        OperationState::Running => v1::OperationState::Running,
        OperationState::Done => v1::OperationState::Done,
        OperationState::Failed => v1::OperationState::Failed,
        OperationState::Cancelled => v1::OperationState::Cancelled,
    };
    v1::Operation {
        name: format!("operations/{}", record.uid),
        kind: record.kind.as_str().to_owned(),
        target: record.target.clone(),
        state: state.into(),
        done_bytes: record.done_bytes,
        total_bytes: record.total_bytes,
        error: record.error.clone(),
        create_time: Some(timestamp(record.create_time)),
        end_time: record.end_time.map(timestamp),
    }
}

/// To the wire.
#[must_use]
pub fn snapshot(view: &SnapshotView) -> v1::Snapshot {
    v1::Snapshot {
        name: resource::snapshot(&view.volume, &view.record.name),
        create_time: Some(timestamp(view.record.create_time)),
        size_bytes: view.record.size_bytes,
        class: point_class(view.record.class).into(),
        class_reason: view.record.reason.clone(),
        vdc_snapshot: view.group.as_ref().map(resource::vdc_snapshot).unwrap_or_default(),
    }
}

/// To the wire; where it is served is known to the caller.
#[must_use]
pub fn export(view: &ExportView, unix_uri: String, tls_uri: String, clients: u32) -> v1::Export {
    v1::Export {
        name: format!("exports/{}", view.record.id),
        volume: resource::volume(&view.volume),
        snapshot: view.record.snapshot.as_ref().map(Name::to_string).unwrap_or_default(),
        read_only: !view.record.writable,
        unix_uri,
        tls_uri,
        expire_time: Some(timestamp(view.record.expire_time)),
        clients,
    }
}

/// To the wire.
#[must_use]
pub fn image(record: &ImageRecord) -> v1::Image {
    v1::Image {
        name: resource::image(&record.name),
        uid: record.uid.to_string(),
        generation: record.generation.0,
        create_time: Some(timestamp(record.create_time)),
        size_bytes: record.size_bytes,
        has_kernel: record.has_kernel,
        has_initrd: record.has_initrd,
        cmdline: record.cmdline.clone(),
        blake3: record.blake3.clone(),
    }
}

/// To the wire.
#[must_use]
pub fn event(record: EventRecord) -> v1::Event {
    v1::Event {
        number: record.number,
        time: Some(timestamp(record.time)),
        resource: record.resource,
        kind: record.kind,
        message: record.message,
    }
}
