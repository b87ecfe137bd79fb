//! `node`: the host that answers, and the hosts that a scheduler knows.

use serio_api::v1::{
    Condition, DeleteNodeRecordRequest, DrainNodeRequest, FenceNodeRecordRequest, GetNodeRecordRequest,
    GetNodeRequest, ListNodesRequest, Node, NodeRecord, UndrainNodeRequest,
    node_service_client::NodeServiceClient, scheduler_service_client::SchedulerServiceClient,
};

use super::request_id;
use crate::{args::NodeVerb, client::Client, error::Failure, names, output, output::Output};

pub(super) async fn run(client: &Client, verb: NodeVerb, output: Output) -> Result<(), Failure> {
    match verb {
        NodeVerb::Show { name: None } => {
            let node = client
                .call("show the node", GetNodeRequest {}, |channel, request| async move {
                    NodeServiceClient::new(channel).get_node(request).await
                })
                .await?;
            show(&node, output)
        }
        NodeVerb::Show { name: Some(name) } => {
            let request = GetNodeRecordRequest { name: format!("nodes/{name}") };
            let record = client
                .call(&format!("show node {name}"), request, |channel, request| async move {
                    SchedulerServiceClient::new(channel).get_node_record(request).await
                })
                .await?;
            show_record(&record, output)
        }
        NodeVerb::List { site } => {
            let request = ListNodesRequest { site: site.unwrap_or_default() };
            let answer = client
                .call("list the nodes", request, |channel, request| async move {
                    SchedulerServiceClient::new(channel).list_nodes(request).await
                })
                .await?;
            output.list(
                &answer.nodes,
                &["NAME", "STATE", "SITE", "VMS", "VCPUS", "MEMORY", "STORAGE", "VERSION", "LAST SEEN"],
                row,
            )
        }
        NodeVerb::Drain { reason } => drain(client, reason, output).await,
        NodeVerb::Undrain => {
            let answer =
                client
                    .call(
                        "end the drain of the node",
                        UndrainNodeRequest { request_id: request_id() },
                        |channel, request| async move {
                            NodeServiceClient::new(channel).undrain_node(request).await
                        },
                    )
                    .await?;
            output.done(&answer, "the node takes new VMs and starts again")
        }
        NodeVerb::Fence { name, proof } => fence(client, &name, proof, output).await,
        NodeVerb::Delete { name } => {
            let request = DeleteNodeRecordRequest { name: format!("nodes/{name}") };
            let answer = client
                .call(&format!("forget node {name}"), request, |channel, request| async move {
                    SchedulerServiceClient::new(channel).delete_node_record(request).await
                })
                .await?;
            output.done(&answer, &format!("the scheduler has forgotten node {name}"))
        }
    }
}

async fn drain(client: &Client, reason: String, output: Output) -> Result<(), Failure> {
    let answer = client
        .call(
            "drain the node",
            DrainNodeRequest { reason, request_id: request_id() },
            |channel, request| async move { NodeServiceClient::new(channel).drain_node(request).await },
        )
        .await?;
    let text = match answer.blocking.as_slice() {
        [] => "the node takes nothing new, and nothing runs on it".to_owned(),
        blocking => {
            format!("the node takes nothing new; still on it: {}", blocking.join(", "))
        }
    };
    output.done(&answer, &text)
}

async fn fence(
    client: &Client,
    name: &serio_types::Name,
    proof: String,
    output: Output,
) -> Result<(), Failure> {
    let request = FenceNodeRecordRequest { name: format!("nodes/{name}"), proof };
    let record = client
        .call(&format!("fence node {name}"), request, |channel, request| async move {
            SchedulerServiceClient::new(channel).fence_node_record(request).await
        })
        .await?;
    let generation = record.fence.as_ref().map_or(0, |fence| fence.generation);
    output.done(
        &record,
        &format!("node {name} is fenced at generation {generation}: what it had may be placed anew"),
    )
}

/// Lines of what is wrong.
fn conditions(node: &Node) -> Vec<(&'static str, String)> {
    if node.conditions.is_empty() {
        return vec![("health", "well".to_owned())];
    }
    let line = |condition: &Condition| {
        let severity = condition.severity().as_str_name().trim_start_matches("SEVERITY_").to_lowercase();
        let Condition { kind, reason, remedy, .. } = condition;
        let since = output::time(condition.since.as_ref());
        ("health", format!("{severity}, {kind} since {since}: {reason}; to do: {remedy}"))
    };
    node.conditions.iter().map(line).collect()
}

fn energy(node: &Node) -> String {
    let energy = node.energy.clone().unwrap_or_default();
    let Some(joules) = energy.joules else { return "not measured".to_owned() };
    let mut text = format!("{joules:.0} J since the agent's start");
    if let Some(watts) = energy.watts {
        text.push_str(&format!(", {watts:.1} W"));
    }
    if let (Some(idle), true) = (energy.idle_joules, joules > 0.0) {
        text.push_str(&format!(", {:.0}% idle", idle / joules * 100.0));
    }
    if let Some(grams) = energy.carbon_grams_per_kwh {
        text.push_str(&format!(", {grams} g CO2 for a kWh"));
    }
    format!("{text} ({})", energy.method)
}

fn show(node: &Node, output: Output) -> Result<(), Failure> {
    let mut rows = facts(node);
    rows.extend(conditions(node));
    rows.push(("energy", energy(node)));
    output.one(node, &rows)
}

fn facts(node: &Node) -> Vec<(&'static str, String)> {
    vec![
        ("name", names::short(&node.name)),
        ("uid", node.uid.clone()),
        ("site", node.site.clone()),
        ("failure domain", node.failure_domain.clone()),
        ("agent", node.agent_version.clone()),
        ("started", output::time(node.start_time.as_ref())),
        ("boot id", node.boot_id.clone()),
        ("kernel", node.kernel_version.clone()),
        ("kvm", node.kvm.clone()),
        ("vms", format!("{} running of {}", node.vms_running, node.vms_total)),
        (
            "takes new",
            match node.drain_reason.as_str() {
                "" => "yes".to_owned(),
                reason => format!("no, drained: {reason}"),
            },
        ),
    ]
}

/// What a node has and has promised.
struct Totals {
    vcpus: (u64, u64),
    memory: (u64, u64),
    storage: (u64, u64),
}

fn totals(record: &NodeRecord) -> Totals {
    let mut totals = Totals { vcpus: (0, 0), memory: (0, 0), storage: (0, 0) };
    let inventory = record.inventory.clone().unwrap_or_default();
    for numa in &inventory.numa_nodes {
        let (cpus, memory) = (numa.cpus.unwrap_or_default(), numa.memory.unwrap_or_default());
        totals.vcpus.1 = totals.vcpus.1.saturating_add(cpus.allocatable);
        totals.memory.1 = totals.memory.1.saturating_add(memory.allocatable);
    }
    for pool in &inventory.storage_pools {
        totals.storage.0 = totals.storage.0.saturating_add(pool.provisioned_bytes);
        totals.storage.1 = totals.storage.1.saturating_add(pool.physical_bytes);
    }
    // The list itself is newer than the sums in the inventory.
    for allocation in record.allocations.iter().flat_map(|a| &a.allocations) {
        totals.vcpus.0 = totals.vcpus.0.saturating_add(u64::from(allocation.vcpus));
        totals.memory.0 = totals.memory.0.saturating_add(allocation.memory_bytes);
    }
    totals
}

fn freshness(record: &NodeRecord) -> String {
    let text = record.freshness().as_str_name().trim_start_matches("NODE_FRESHNESS_").to_lowercase();
    let fenced = record.fence.as_ref().is_some_and(|fence| !fence.applied);
    let draining = record.inventory.as_ref().is_some_and(|inventory| inventory.draining);
    match (fenced, draining) {
        (true, _) => format!("{text}, fenced"),
        (false, true) => format!("{text}, draining"),
        (false, false) => text,
    }
}

fn row(record: &NodeRecord) -> Vec<String> {
    let hello = record.hello.clone().unwrap_or_default();
    let totals = totals(record);
    let of = |(used, all): (u64, u64)| format!("{}/{}", output::size(used), output::size(all));
    vec![
        names::short(&record.name),
        freshness(record),
        hello.site,
        record.allocations.as_ref().map_or(0, |a| a.allocations.len()).to_string(),
        format!("{}/{}", totals.vcpus.0, totals.vcpus.1),
        of(totals.memory),
        of(totals.storage),
        hello.agent_version,
        output::time(record.last_seen.as_ref()),
    ]
}

fn show_record(record: &NodeRecord, output: Output) -> Result<(), Failure> {
    let hello = record.hello.clone().unwrap_or_default();
    let [name, state, site, vms, vcpus, memory, storage, version, last_seen] =
        row(record).try_into().unwrap_or_default();
    output.one(
        record,
        &[
            ("name", name),
            ("state", state),
            ("last seen", last_seen),
            ("uid", hello.node_uid),
            ("site", site),
            ("failure domain", hello.failure_domain),
            ("agent", version),
            ("boot id", hello.boot_id),
            ("cpu", record.inventory.as_ref().map(|i| i.cpu_model.clone()).unwrap_or_default()),
            ("vms", vms),
            ("vcpus", format!("{vcpus} promised")),
            ("memory", format!("{memory} promised")),
            ("storage", format!("{storage} provisioned")),
            ("images", record.inventory.as_ref().map(|i| i.images.join(", ")).unwrap_or_default()),
        ],
    )
}
