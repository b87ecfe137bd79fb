//! `vm update`, and what `vm` shows and says of machines.

use serio_api::v1::{
    Balloon, DeviceLimits, GuestMemory, IoLimits, PauseVmRequest, RestartPolicy, ResumeVmRequest,
    UpdateVmRequest, Vm, VmSpec, VmTrouble, WatchdogAction, vm_service_client::VmServiceClient,
};
use serio_types::{ByteSize, VdcName};

use super::request_id;
use crate::{
    args::{LimitArg, MachineArgs, OnWatchdog, Restart, Switch, VmUpdateArgs},
    client::Client,
    error::Failure,
    names, output,
};

/// A spec with the fields that were said, and their names as the API has them.
#[derive(Debug, Default)]
pub(super) struct Said {
    pub(super) spec: VmSpec,
    pub(super) fields: Vec<String>,
}

impl Said {
    fn set<T, U>(&mut self, field: &str, value: Option<T>, slot: impl FnOnce(&mut VmSpec) -> &mut U)
    where
        U: From<T>,
    {
        if let Some(value) = value {
            *slot(&mut self.spec) = value.into();
            self.fields.push(field.to_owned());
        }
    }

    fn bytes(&mut self, field: &str, size: Option<ByteSize>, slot: impl FnOnce(&mut VmSpec) -> &mut u64) {
        self.set(field, size.map(|size| size.bytes()), slot);
    }
}

fn balloon(spec: &mut VmSpec) -> &mut Balloon {
    spec.balloon.get_or_insert_default()
}

fn disk(spec: &mut VmSpec) -> &mut IoLimits {
    spec.disk_limits.get_or_insert_default()
}

fn nic(spec: &mut VmSpec) -> &mut IoLimits {
    spec.nic_limits.get_or_insert_default()
}

pub(super) fn restart(policy: Restart) -> RestartPolicy {
    match policy {
        Restart::Never => RestartPolicy::Never,
        Restart::OnFailure => RestartPolicy::OnFailure,
        Restart::Always => RestartPolicy::Always,
    }
}

/// What was said of a machine.
pub(super) fn said(args: MachineArgs) -> Said {
    let mut said = Said::default();
    let watchdog = args.watchdog.map(|action| match action {
        OnWatchdog::Reset => WatchdogAction::Reset,
        OnWatchdog::End => WatchdogAction::End,
    });
    said.set("vsock", args.vsock.map(|switch| switch == Switch::On), |s| &mut s.vsock);
    said.set("watchdog", watchdog, |s| &mut s.watchdog);
    said.bytes("page_bytes", args.hugepages, |s| &mut s.page_bytes);
    said.set("cpu_baseline", args.cpu, |s| &mut s.cpu_baseline);
    said.bytes("balloon.target_bytes", args.balloon, |s| &mut balloon(s).target_bytes);
    said.bytes("balloon.floor_bytes", args.balloon_floor, |s| &mut balloon(s).floor_bytes);
    said.bytes("disk_limits.bytes_per_second", args.disk_bandwidth, |s| &mut disk(s).bytes_per_second);
    said.bytes("disk_limits.bytes_burst", args.disk_burst, |s| &mut disk(s).bytes_burst);
    said.set("disk_limits.operations_per_second", args.disk_iops, |s| &mut disk(s).operations_per_second);
    said.set("disk_limits.operations_burst", args.disk_iops_burst, |s| &mut disk(s).operations_burst);
    said.bytes("nic_limits.bytes_per_second", args.nic_bandwidth, |s| &mut nic(s).bytes_per_second);
    said.bytes("nic_limits.bytes_burst", args.nic_burst, |s| &mut nic(s).bytes_burst);
    said.set("nic_limits.operations_per_second", args.nic_packets, |s| &mut nic(s).operations_per_second);
    said.set("nic_limits.operations_burst", args.nic_packets_burst, |s| &mut nic(s).operations_burst);
    said.set("mtu", args.mtu, |s| &mut s.mtu);
    if !args.limits.is_empty() {
        let single =
            args.limits.into_iter().map(|LimitArg { device, limits }| DeviceLimits { device, limits });
        said.spec.device_limits = single.collect();
        said.fields.push("device_limits".to_owned());
    }
    said
}

pub(super) async fn update(client: &Client, args: VmUpdateArgs) -> Result<Vm, Failure> {
    let name = args.name;
    let mut said = said(args.machine);
    said.set("vcpus", args.vcpus, |s| &mut s.vcpus);
    said.bytes("memory_bytes", args.memory, |s| &mut s.memory_bytes);
    said.set("cmdline", args.cmdline, |s| &mut s.cmdline);
    said.set("restart_policy", args.restart.map(restart), |s| &mut s.restart_policy);
    if said.fields.is_empty() {
        return Err(Failure::Usage("say what shall change: `serio vm update --help` lists it".to_owned()));
    }
    let request = UpdateVmRequest {
        request_id: request_id(),
        name: names::vm(&name),
        spec: Some(said.spec),
        fields: said.fields,
        ..UpdateVmRequest::default()
    };
    client
        .call(&format!("update vm {name}"), request, |channel, request| async move {
            VmServiceClient::new(channel).update_vm(request).await
        })
        .await
}

pub(super) async fn pause(client: &Client, name: &VdcName) -> Result<Vm, Failure> {
    let request = PauseVmRequest { request_id: request_id(), name: names::vm(name), ..Default::default() };
    client
        .call(&format!("pause vm {name}"), request, |channel, request| async move {
            VmServiceClient::new(channel).pause_vm(request).await
        })
        .await
}

pub(super) async fn resume(client: &Client, name: &VdcName) -> Result<Vm, Failure> {
    let request = ResumeVmRequest { request_id: request_id(), name: names::vm(name), ..Default::default() };
    client
        .call(&format!("resume vm {name}"), request, |channel, request| async move {
            VmServiceClient::new(channel).resume_vm(request).await
        })
        .await
}

/// "100MiB/s, 2000/s".
pub(super) fn limits(limits: Option<&IoLimits>) -> String {
    let Some(limits) = limits else { return String::new() };
    let burst =
        |text: String| if text == "0" || text == "0B" { String::new() } else { format!(" (burst {text})") };
    let mut parts = Vec::new();
    if limits.bytes_per_second > 0 {
        let rate = output::size(limits.bytes_per_second);
        parts.push(format!("{rate}/s{}", burst(output::size(limits.bytes_burst))));
    }
    if limits.operations_per_second > 0 {
        let rate = limits.operations_per_second;
        parts.push(format!("{rate} a second{}", burst(limits.operations_burst.to_string())));
    }
    parts.join(", ")
}

/// "root 100 a second; ardesio/data none".
pub(super) fn device_limits(spec: &VmSpec) -> String {
    let one = |one: &DeviceLimits| {
        let device =
            if one.device.starts_with("vdcs/") { names::short(&one.device) } else { one.device.clone() };
        let text = limits(one.limits.as_ref());
        format!("{device} {}", if text.is_empty() { "none" } else { &text })
    };
    spec.device_limits.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// "vsock, watchdog end, pages 2MiB, cpu x86-64-v3".
pub(super) fn machine(spec: &VmSpec) -> String {
    let mut parts = Vec::new();
    if spec.vsock {
        parts.push("vsock".to_owned());
    }
    if spec.watchdog() == WatchdogAction::End {
        parts.push("watchdog end".to_owned());
    }
    if spec.page_bytes != 0 {
        parts.push(format!("pages {}", output::size(spec.page_bytes)));
    }
    if !spec.cpu_baseline.is_empty() {
        parts.push(format!("cpu {}", spec.cpu_baseline));
    }
    if spec.mtu != 0 {
        parts.push(format!("mtu {}", spec.mtu));
    }
    parts.join(", ")
}

/// "64MiB of 128MiB given up".
pub(super) fn balloon_line(memory: Option<&GuestMemory>, spec: &VmSpec) -> String {
    let asked = spec.balloon.as_ref().map_or(0, |balloon| balloon.target_bytes);
    match memory {
        Some(memory) if memory.target_bytes > 0 || memory.balloon_bytes > 0 => {
            let (given, target) = (output::size(memory.balloon_bytes), output::size(memory.target_bytes));
            format!("{given} of {target} given up")
        }
        _ if asked > 0 => format!("{} at its next start", output::size(asked)),
        _ => String::new(),
    }
}

/// "ardesio/web-root: held: the host's disk is full …".
pub(super) fn troubles(troubles: &[VmTrouble]) -> String {
    let lines =
        troubles.iter().map(|trouble| format!("{}: {}", names::short(&trouble.device), trouble.reason));
    lines.collect::<Vec<_>>().join("; ")
}

/// "180MiB of 245MiB available, 20MiB caches".
pub(super) fn memory_line(memory: Option<&GuestMemory>) -> String {
    let Some(memory) = memory.filter(|memory| memory.age.is_some()) else { return String::new() };
    let (available, total) = (output::size(memory.available_bytes), output::size(memory.total_bytes));
    format!("{available} of {total} available, {} free", output::size(memory.free_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_single_devices_are_read_and_shown() {
        let typed = [
            "root,iops=100,burst=1MiB,bandwidth=2MiB",
            "ardesio/data",
            "nics/1,packets=5,default",
            "nics/1,default",
        ];
        let [root, data, both, like_others] = typed.map(str::parse::<LimitArg>);
        assert!(both.is_err());
        let args = MachineArgs { limits: vec![root.unwrap(), data.unwrap()], ..MachineArgs::default() };
        let said = said(args);
        assert_eq!(said.fields, ["device_limits"]);
        assert_eq!(device_limits(&said.spec), "root 2MiB/s (burst 1MiB), 100 a second; ardesio/data none");
        let like_others = like_others.unwrap();
        assert_eq!((like_others.device.as_str(), like_others.limits), ("nics/1", None));
        for wrong in ["disk", "root,iops", "root,iops=x", "root,speed=1", ""] {
            assert!(wrong.parse::<LimitArg>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_what_was_said_is_asked() {
        let nothing = said(MachineArgs::default());
        assert_eq!((nothing.spec, nothing.fields), (VmSpec::default(), Vec::new()));
        let args = MachineArgs {
            vsock: Some(Switch::Off),
            disk_iops: Some(7),
            nic_bandwidth: Some(ByteSize::from_bytes(1 << 20)),
            ..MachineArgs::default()
        };
        let said = said(args);
        assert_eq!(
            said.fields,
            ["vsock", "disk_limits.operations_per_second", "nic_limits.bytes_per_second"]
        );
        assert_eq!(limits(said.spec.disk_limits.as_ref()), "7 a second");
        assert_eq!(limits(said.spec.nic_limits.as_ref()), "1MiB/s");
    }
}
