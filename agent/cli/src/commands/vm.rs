//! `vm`: virtual machines. The console has a file of its own.

use std::{fs, path::Path, time::Duration};

use serio_api::v1::{
    BootSource, CloudInit, CreateVmRequest, DeleteVmRequest, GetVmRequest, ListVmsRequest, ReadLogRequest,
    RebootVmRequest, StartVmRequest, StopVmRequest, Vm, VmSpec, VmState, VmStatus,
    vm_service_client::VmServiceClient,
};
use serio_types::{Name, VdcName};

use super::{machine, request_id, vm_archive, vm_plug, vm_snapshot};
use crate::{
    args::{Boot, Global, LogArgs, StopArgs, VmArgs, VmSnapshotArgs, VmVerb},
    client::Client,
    error::Failure,
    names, output,
    output::Output,
};

/// What a guest gets after the power button when nothing else is said; also the API's default.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);
/// The answer to a stop may come that much after the guest's time is over.
const STOP_MARGIN: Duration = Duration::from_secs(20);

pub(super) async fn run(
    client: &Client,
    global: &Global,
    verb: VmVerb,
    output: Output,
) -> Result<(), Failure> {
    match verb {
        VmVerb::Create(args) => create(client, *args, false, output).await,
        VmVerb::Run(args) => create(client, *args, true, output).await,
        VmVerb::List { vdc } => list(client, vdc, output).await,
        VmVerb::Show { name } => show(&get(client, &name).await?, output),
        VmVerb::Update(args) => {
            let vm = machine::update(client, *args).await?;
            output.done(&vm, &format!("updated vm {}", names::short(&vm.name)))
        }
        VmVerb::Disk { verb } => vm_plug::disk(client, global, verb, output).await,
        VmVerb::Nic { verb } => vm_plug::nic(client, global, verb, output).await,
        VmVerb::Start { name } => {
            let request =
                StartVmRequest { request_id: request_id(), name: names::vm(&name), ..Default::default() };
            let vm = client
                .call(&format!("start vm {name}"), request, |channel, request| async move {
                    VmServiceClient::new(channel).start_vm(request).await
                })
                .await?;
            output.done(&vm, &sentence(&vm))
        }
        VmVerb::Stop(args) => stop(client, global, &args, output).await,
        VmVerb::Reboot { name } => {
            let request =
                RebootVmRequest { request_id: request_id(), name: names::vm(&name), ..Default::default() };
            let vm = client
                .call(&format!("reboot vm {name}"), request, |channel, request| async move {
                    VmServiceClient::new(channel).reboot_vm(request).await
                })
                .await?;
            output.done(&vm, &format!("vm {name} was reset"))
        }
        VmVerb::Pause { name } => {
            let vm = machine::pause(client, &name).await?;
            output.done(&vm, &sentence(&vm))
        }
        VmVerb::Resume { name } => {
            let vm = machine::resume(client, &name).await?;
            output.done(&vm, &sentence(&vm))
        }
        VmVerb::Snapshot(VmSnapshotArgs { verb: Some(verb), .. }) => {
            vm_archive::run(client, verb, output).await
        }
        VmVerb::Snapshot(VmSnapshotArgs { vm: Some(vm), name, .. }) => {
            vm_snapshot::snapshot(client, vm, name, output).await
        }
        // The arguments ask for one of them.
        VmVerb::Snapshot(_) => Ok(()),
        VmVerb::Snapshots { name } => vm_snapshot::snapshots(client, &name, output).await,
        VmVerb::Restore(args) => {
            let vm = vm_snapshot::restore(client, args).await?;
            output.done(&vm, &sentence(&vm))
        }
        VmVerb::DeleteSnapshot { name, snapshot, wait } => {
            vm_snapshot::delete(client, (&name, &snapshot), wait, output).await
        }
        VmVerb::Log(args) => log(client, &args).await,
        VmVerb::Delete { name, keep_root_volume, force } => {
            delete(client, &name, keep_root_volume, force, output).await
        }
        VmVerb::Console(_) => Ok(()),
    }
}

async fn delete(
    client: &Client,
    name: &VdcName,
    keep_root_volume: bool,
    force: bool,
    output: Output,
) -> Result<(), Failure> {
    let request = DeleteVmRequest {
        request_id: request_id(),
        name: names::vm(name),
        keep_root_volume,
        force,
        ..Default::default()
    };
    let answer = client
        .call(&format!("delete vm {name}"), request, |channel, request| async move {
            VmServiceClient::new(channel).delete_vm(request).await
        })
        .await?;
    output.done(&answer, &format!("deleted vm {name}"))
}

async fn get(client: &Client, name: &VdcName) -> Result<Vm, Failure> {
    client
        .call(
            &format!("show vm {name}"),
            GetVmRequest { name: names::vm(name) },
            |channel, request| async move { VmServiceClient::new(channel).get_vm(request).await },
        )
        .await
}

async fn create(client: &Client, args: VmArgs, start: bool, output: Output) -> Result<(), Failure> {
    let name = args.name.clone();
    let request = CreateVmRequest {
        request_id: request_id(),
        parent: names::vdc(&name.vdc),
        vm_id: name.name.to_string(),
        root_volume: args.root_volume.as_ref().map(names::volume).unwrap_or_default(),
        reservation: args.reservation.clone().unwrap_or_default(),
        spec: Some(spec(args)?),
        start,
    };
    let doing = format!("{} vm {name}", if start { "run" } else { "create" });
    let vm = client
        .call(&doing, request, |channel, request| async move {
            VmServiceClient::new(channel).create_vm(request).await
        })
        .await?;
    let mut sentence = sentence(&vm);
    if start {
        sentence.push_str(&format!("\nconsole: serio vm console {name}"));
    }
    output.done(&vm, &sentence)
}

fn spec(args: VmArgs) -> Result<VmSpec, Failure> {
    let cloud_init = cloud_init(&args)?;
    let machine = machine::said(args.machine).spec;
    Ok(VmSpec {
        vcpus: args.vcpus,
        memory_bytes: args.memory.bytes(),
        image: names::image(&args.image),
        root_disk_bytes: args.disk_size.map_or(0, |size| size.bytes()),
        volumes: args.volumes.iter().map(names::volume).collect(),
        nics: args.nics.into_iter().map(vm_plug::nic_spec).collect(),
        cmdline: args.cmdline.unwrap_or_default(),
        cloud_init,
        restart_policy: machine::restart(args.restart).into(),
        boot: match args.boot {
            Boot::Auto => BootSource::Unspecified,
            Boot::Image => BootSource::Image,
            Boot::Disk => BootSource::Disk,
        }
        .into(),
        ..machine
    })
}

/// A seed is made when something was said that only a seed can carry.
fn cloud_init(args: &VmArgs) -> Result<Option<CloudInit>, Failure> {
    let has_address = args.nics.iter().any(|nic| !nic.address.is_empty());
    if args.ssh_keys.is_empty() && args.user_data.is_none() && args.hostname.is_none() && !has_address {
        return Ok(None);
    }
    let mut ssh_keys = Vec::new();
    for key in &args.ssh_keys {
        ssh_keys.extend(keys_of(key)?);
    }
    let user_data = args.user_data.as_deref().map(read_text).transpose()?.unwrap_or_default();
    Ok(Some(CloudInit { hostname: args.hostname.clone().unwrap_or_default(), ssh_keys, user_data }))
}

/// The keys of `--ssh-key`: the text itself if it looks like a key (RFC 4253 §6.6 names), else those of that file.
fn keys_of(text: &str) -> Result<Vec<String>, Failure> {
    if is_key(text) {
        return Ok(vec![text.trim().to_owned()]);
    }
    let content = read_text(Path::new(text))?;
    if content.contains("PRIVATE KEY") {
        return Err(Failure::Usage(format!(
            "--ssh-key {text} is a private key: give the public one, {text}.pub"
        )));
    }
    let keys: Vec<String> = content
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect();
    if keys.is_empty() {
        return Err(Failure::Usage(format!("--ssh-key {text} holds no key")));
    }
    Ok(keys)
}

fn is_key(text: &str) -> bool {
    ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-"].iter().any(|kind| text.starts_with(kind))
        && text.contains(' ')
}

fn read_text(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|e| Failure::local(format!("cannot read {}", path.display()), e))
}

async fn stop(client: &Client, global: &Global, args: &StopArgs, output: Output) -> Result<(), Failure> {
    let name = &args.name;
    let patience = global.timeout().unwrap_or(STOP_TIMEOUT);
    let request = StopVmRequest {
        request_id: request_id(),
        name: names::vm(name),
        force: args.force,
        timeout: Some(pbjson_types::Duration::from(patience)),
        ..Default::default()
    };
    // The agent keeps the guest's time; this side only guards against an agent that never answers.
    let vm = client
        .clone()
        .with_timeout(Some(patience.saturating_add(STOP_MARGIN)))
        .call(&format!("stop vm {name}"), request, |channel, request| async move {
            VmServiceClient::new(channel).stop_vm(request).await
        })
        .await?;
    output.done(&vm, &sentence(&vm))
}

async fn list(client: &Client, vdc: Option<Name>, output: Output) -> Result<(), Failure> {
    let request =
        ListVmsRequest { parent: vdc.as_ref().map(names::vdc).unwrap_or_default(), ..Default::default() };
    let answer = client
        .call("list the vms", request, |channel, request| async move {
            VmServiceClient::new(channel).list_vms(request).await
        })
        .await?;
    output.list(&answer.vms, &["NAME", "STATE", "VCPUS", "MEMORY", "IMAGE", "UPTIME", "RESTARTS"], |vm| {
        let spec = vm.spec.as_ref();
        vec![
            names::short(&vm.name),
            state(vm),
            spec.map_or(0, |s| s.vcpus).to_string(),
            output::size(spec.map_or(0, |s| s.memory_bytes)),
            spec.map(|s| names::short(&s.image)).unwrap_or_default(),
            uptime(vm),
            vm.status.as_ref().map_or(0, |s| s.restarts).to_string(),
        ]
    })
}

fn show(vm: &Vm, output: Output) -> Result<(), Failure> {
    let spec = vm.spec.clone().unwrap_or_default();
    let status = vm.status.clone().unwrap_or_default();
    let end = status
        .last_end
        .as_ref()
        .map(|end| format!("{} {}: {}", output::time(end.time.as_ref()), end.kind, end.reason));
    let nics =
        status.nics.iter().map(|nic| [nic.mac.as_str(), nic.address.as_str()].join(" ").trim().to_owned());
    let volumes = spec.volumes.iter().map(|name| names::short(name));
    output.one(
        vm,
        &[
            ("name", names::short(&vm.name)),
            ("uid", vm.uid.clone()),
            ("generation", vm.generation.to_string()),
            ("created", output::time(vm.create_time.as_ref())),
            ("state", state(vm)),
            ("uptime", uptime(vm)),
            ("pid", if status.pid == 0 { String::new() } else { status.pid.to_string() }),
            ("vcpus", spec.vcpus.to_string()),
            ("memory", output::size(spec.memory_bytes)),
            ("balloon", machine::balloon_line(status.memory.as_ref(), &spec)),
            ("guest memory", machine::memory_line(status.memory.as_ref())),
            ("machine", machine::machine(&spec)),
            ("image", names::short(&spec.image)),
            ("kernel", kernel(&status)),
            ("root volume", names::short(&status.root_volume)),
            ("volumes", volumes.collect::<Vec<_>>().join(", ")),
            ("nics", nics.collect::<Vec<_>>().join(", ")),
            ("disk limits", machine::limits(spec.disk_limits.as_ref())),
            ("nic limits", machine::limits(spec.nic_limits.as_ref())),
            ("own limits", machine::device_limits(&spec)),
            ("vsock", status.vsock_path.clone()),
            (
                "restart",
                spec.restart_policy()
                    .as_str_name()
                    .trim_start_matches("RESTART_POLICY_")
                    .to_lowercase()
                    .replace('_', "-"),
            ),
            ("restarts", status.restarts.to_string()),
            ("troubles", machine::troubles(&status.troubles)),
            ("last end", end.unwrap_or_default()),
        ],
    )
}

/// What it booted from its root disk: "/boot/vmlinuz-6.1 (6.1), from /boot/grub/grub.cfg".
fn kernel(status: &VmStatus) -> String {
    let Some(kernel) = &status.kernel else { return String::new() };
    let version = if kernel.version.is_empty() { String::new() } else { format!(" ({})", kernel.version) };
    let place = match kernel.partition {
        0 => String::new(),
        number => format!(" on partition {number} of the root disk"),
    };
    format!("{}{version}, by {}{place}", kernel.path, kernel.source)
}

/// `running`.
fn state(vm: &Vm) -> String {
    let state = vm.status.as_ref().map_or(VmState::Unspecified, |s| s.state());
    state.as_str_name().trim_start_matches("VM_STATE_").to_lowercase()
}

fn uptime(vm: &Vm) -> String {
    let running = vm.status.as_ref().filter(|s| s.pid != 0).and_then(|s| s.uptime);
    running.and_then(|d| u64::try_from(d.seconds).ok()).map(output::span).unwrap_or_default()
}

/// "vm ardesio/web is running".
fn sentence(vm: &Vm) -> String {
    let status = vm.status.clone().unwrap_or_default();
    let mut text = format!("vm {} is {}", names::short(&vm.name), state(vm));
    if matches!(status.state(), VmState::Stopped | VmState::Failed)
        && let Some(end) = &status.last_end
        && !end.reason.is_empty()
    {
        text.push_str(&format!(" ({})", end.reason));
    }
    text
}

async fn log(client: &Client, args: &LogArgs) -> Result<(), Failure> {
    let Some(lines) = args.tail else {
        return stream_log(client, args, 0, &mut |data| output::bytes(data)).await;
    };
    // The API counts bytes: read what is kept (it is bounded), and count the lines here.
    let mut whole = Vec::new();
    let once = LogArgs { name: args.name.clone(), follow: false, tail: None };
    stream_log(client, &once, 0, &mut |data| {
        whole.extend_from_slice(data);
        Ok(())
    })
    .await?;
    let tail = tail(&whole, lines);
    if !args.follow {
        return output::bytes(tail);
    }
    if tail.is_empty() {
        // 0 would ask for everything.
        return stream_log(client, args, 1, &mut skip_first(1)).await;
    }
    stream_log(client, args, tail.len() as u64, &mut |data| output::bytes(data)).await
}

/// A printer that leaves out the first bytes.
fn skip_first(mut bytes: usize) -> impl FnMut(&[u8]) -> Result<(), Failure> {
    move |data| {
        let skipped = bytes.min(data.len());
        bytes -= skipped;
        output::bytes(data.get(skipped..).unwrap_or_default())
    }
}

async fn stream_log(
    client: &Client,
    args: &LogArgs,
    tail_bytes: u64,
    print: &mut impl FnMut(&[u8]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let doing = format!("read the log of vm {}", args.name);
    let request = ReadLogRequest { name: names::vm(&args.name), follow: args.follow, tail_bytes };
    let answer = VmServiceClient::new(client.channel()).read_log(request).await;
    let mut stream = answer.map_err(|status| client.failure(&doing, status))?.into_inner();
    while let Some(piece) = stream.message().await.map_err(|status| client.failure(&doing, status))? {
        print(&piece.data)?;
    }
    Ok(())
}

/// The last lines; an unfinished one counts.
fn tail(whole: &[u8], lines: usize) -> &[u8] {
    if lines == 0 {
        return &[];
    }
    let body = whole.strip_suffix(b"\n").unwrap_or(whole);
    let ends = body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at);
    let start = ends.take(lines).nth(lines - 1).map_or(0, |at| at + 1);
    whole.get(start..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_lines() {
        assert_eq!(tail(b"a\nb\nc\n", 2), b"b\nc\n");
        assert_eq!(tail(b"a\nb\nc", 2), b"b\nc");
        assert_eq!(tail(b"a\n", 9), b"a\n");
        assert_eq!(tail(b"a\n", 0), b"");
        assert_eq!(tail(b"", 1), b"");
        assert_eq!(tail(b"\n\n", 1), b"\n");
    }

    #[test]
    fn keys_from_texts_and_files() {
        assert_eq!(keys_of("ssh-ed25519 AAAA me").unwrap(), ["ssh-ed25519 AAAA me"]);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("k.pub");
        fs::write(&file, "# mine\nssh-rsa A a\n\nssh-rsa B b\n").unwrap();
        assert_eq!(keys_of(file.to_str().unwrap()).unwrap(), ["ssh-rsa A a", "ssh-rsa B b"]);
        fs::write(&file, "-----BEGIN OPENSSH PRIVATE KEY-----\n").unwrap();
        assert!(keys_of(file.to_str().unwrap()).unwrap_err().render().contains("public one"));
        assert_eq!(keys_of("/nowhere/k.pub").unwrap_err().exit_code(), 1);
    }
}
