//! `doctor`: can this machine be a node, and does its agent answer? One line a check: ok, warn or fail, and what to do.
//!
//! `machine` holds the checks of this machine. Nothing is changed by a check. With a remote `--host` only what that agent
//! says of itself is judged.

mod machine;

use serde::Serialize;
use serio_api::v1::{
    GetCapacityRequest, GetNodeRequest, Node, SchedulerLink, node_service_client::NodeServiceClient,
};

use crate::{
    args::{DoctorArgs, Format, Global},
    client::{Client, Target},
    error::Failure,
    output,
    output::Output,
};

/// How bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// As it should be.
    Ok,
    /// Works, less well.
    Warn,
    /// Does not work.
    Fail,
}

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    check: &'static str,
    level: Level,
    found: String,
    /// What to do; empty when all is well.
    remedy: String,
}

impl Check {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, found: found.into(), remedy: String::new() }
    }

    fn warn(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, level: Level::Warn, found: found.into(), remedy: remedy.into() }
    }

    fn fail(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, level: Level::Fail, found: found.into(), remedy: remedy.into() }
    }
}

pub(super) async fn run(global: &Global, args: DoctorArgs, output: Output) -> Result<(), Failure> {
    let target: Target = global.host.parse().map_err(Failure::Usage)?;
    let local = matches!(target, Target::Unix(_));
    let mut checks = if local { machine::all(&args.state_dir) } else { Vec::new() };
    checks.extend(agent(global, local).await);
    let failed = checks.iter().filter(|c| c.level == Level::Fail).count();
    match output.format() {
        Format::Table => output::text(&lines(&checks))?,
        _ => output.value(&checks)?,
    }
    if failed == 0 {
        return Ok(());
    }
    eprintln!("doctor: {failed} of {} checks failed", checks.len());
    Err(Failure::Silent(1))
}

fn lines(checks: &[Check]) -> String {
    let width = checks.iter().map(|c| c.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    for check in checks {
        let level = match check.level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "fail",
        };
        text.push_str(&format!("{level}  {:width$}  {}\n", check.check, check.found));
        if !check.remedy.is_empty() {
            text.push_str(&format!("      {:width$}  to do: {}\n", "", check.remedy));
        }
    }
    text
}

/// Whether the agent answers, and what it says.
async fn agent(global: &Global, local: bool) -> Vec<Check> {
    let asked = async {
        let client = Client::connect(global).await?;
        let node = client
            .call("ask the agent", GetNodeRequest {}, |channel, request| async move {
                NodeServiceClient::new(channel).get_node(request).await
            })
            .await?;
        let capacity = client
            .call("ask the agent", GetCapacityRequest {}, |channel, request| async move {
                NodeServiceClient::new(channel).get_capacity(request).await
            })
            .await?;
        Ok::<_, Failure>((client, node, capacity.scheduler.unwrap_or_default()))
    };
    match asked.await {
        Ok((client, node, link)) => {
            let mut checks = vec![answers(&client, &node), page_cache(&node), packets(&node)];
            if !local {
                checks.push(remote_kvm(&node.kvm));
            }
            checks.push(scheduler(&link));
            checks
        }
        Err(failure) => {
            let text = failure.render();
            let (found, remedy) = text
                .split_once("\n  to do: ")
                .unwrap_or((&text, "see the agent's log: journalctl -u seriod"));
            // "`serio doctor` looks closer" is no help to who reads it there.
            let remedy = remedy.trim_end_matches("; `serio doctor` looks closer");
            vec![Check::fail("seriod", found.trim_start_matches("error: "), remedy)]
        }
    }
}

fn answers(client: &Client, node: &Node) -> Check {
    let found = format!("{} answers at {}, version {}", node.name, client.target(), node.agent_version);
    let ours = env!("CARGO_PKG_VERSION");
    if node.agent_version.split(['-', '+']).next() != Some(ours) {
        return Check::warn(
            "seriod",
            found,
            format!("this command is version {ours}: install the same on both sides"),
        );
    }
    Check::ok("seriod", found)
}

/// Which disks go past the page cache there; an older agent does not say.
fn page_cache(node: &Node) -> Check {
    let which = match node.direct_io.as_str() {
        "" => return Check::ok("page_cache", "all disks go through it"),
        "on" => "all disks shall go past it",
        "off" => "all disks go through it",
        _ => "disks of encrypted volumes shall go past it",
    };
    let found = format!("{which} (volumes.direct_io = {:?})", node.direct_io);
    if node.direct_io_refused.is_empty() {
        return Check::ok("page_cache", found);
    }
    let found = format!("{found}, and none does: {}", node.direct_io_refused);
    let remedy = "they work, slower: put state_dir on ext4 or XFS";
    Check::warn("page_cache", found, format!("{remedy}, or set volumes.direct_io = \"off\" in seriod.toml"))
}

/// Who moves the packets of VMs' cards there; an older agent does not say.
fn packets(node: &Node) -> Check {
    let threads = "through threads of the VMs";
    match node.vhost_net.as_str() {
        "" => Check::ok("packets", threads),
        "used" => Check::ok("packets", "moved by the kernel (vhost-net), but for cards with limits"),
        "off" => Check::ok("packets", format!("{threads} (network.vhost_net = false)")),
        why => Check::warn(
            "packets",
            format!("{threads}: {why}"),
            "they work, with more processor time: modprobe vhost_net, or set network.vhost_net = false in seriod.toml",
        ),
    }
}

/// As the agent says it: "svm", "vmx", "software (pvm)", or why not.
fn remote_kvm(kvm: &str) -> Check {
    match kvm {
        "svm" | "vmx" => Check::ok("kvm", format!("{kvm}, says the node")),
        _ if kvm.starts_with("software") => Check::warn("kvm", kvm, machine::SOFTWARE_KVM),
        _ => Check::fail("kvm", kvm, "run `serio doctor` on that host"),
    }
}

fn scheduler(link: &SchedulerLink) -> Check {
    if link.url.is_empty() {
        return Check::ok("scheduler", "none configured, the node works alone");
    }
    if link.connected {
        return Check::ok(
            "scheduler",
            format!("{}, connected since {}", link.url, output::time(link.since.as_ref())),
        );
    }
    let found = format!("{}, not connected: {}", link.url, link.last_error);
    Check::warn(
        "scheduler",
        found,
        "the node goes on alone and tries again; check the scheduler, and [scheduler] in seriod.toml",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_has_its_remedy_below() {
        let text =
            lines(&[Check::ok("kvm", "svm"), Check::warn("vhost_net", "not loaded", "modprobe vhost_net")]);
        assert_eq!(
            text,
            "ok    kvm        svm\nwarn  vhost_net  not loaded\n                 to do: modprobe vhost_net\n"
        );
    }

    #[test]
    fn a_remote_node_is_judged_by_what_it_says() {
        assert_eq!(remote_kvm("svm").level, Level::Ok);
        assert_eq!(remote_kvm("software (pvm)").level, Level::Warn);
        assert_eq!(remote_kvm("no /dev/kvm").level, Level::Fail);
    }

    #[test]
    fn what_goes_past_the_page_cache_is_what_was_asked_for() {
        let mut node = Node { direct_io: "auto".into(), ..Node::default() };
        assert!(page_cache(&node).found.contains("encrypted"));
        node.direct_io_refused = "the file system has no O_DIRECT".into();
        let check = page_cache(&node);
        assert!(check.level == Level::Warn && check.found.ends_with("has no O_DIRECT"), "{check:?}");
        assert_eq!(page_cache(&Node::default()).level, Level::Ok);
    }

    #[test]
    fn who_moves_packets_is_what_the_node_says() {
        let node = |vhost_net: &str| Node { vhost_net: vhost_net.into(), ..Node::default() };
        assert_eq!(packets(&node("used")).level, Level::Ok);
        assert_eq!(packets(&node("off")).level, Level::Ok);
        assert_eq!(packets(&node("")).level, Level::Ok);
        let check = packets(&node("/dev/vhost-net: No such file or directory (os error 2)"));
        assert!(check.level == Level::Warn && check.found.contains("No such file"), "{check:?}");
    }

    #[test]
    fn the_link_to_the_scheduler() {
        let mut link = SchedulerLink::default();
        assert_eq!(scheduler(&link).level, Level::Ok);
        link.url = "https://s".into();
        assert_eq!(scheduler(&link).level, Level::Warn);
        link.connected = true;
        assert_eq!(scheduler(&link).level, Level::Ok);
    }
}
