//! `capacity`: what the node reports.

use serio_api::v1::{Capacity, GetCapacityRequest, Inventory, Usage, node_service_client::NodeServiceClient};

use crate::{args::Format, client::Client, error::Failure, names, output, output::Output};

pub(super) async fn run(client: &Client, output: Output) -> Result<(), Failure> {
    let capacity = client
        .call("read the capacity", GetCapacityRequest {}, |channel, request| async move {
            NodeServiceClient::new(channel).get_capacity(request).await
        })
        .await?;
    if output.format() != Format::Table {
        return output.value(&capacity);
    }
    output::text(&tables(&capacity))
}

fn tables(capacity: &Capacity) -> String {
    let inventory = capacity.inventory.clone().unwrap_or_default();
    let mut text = resources(&inventory);
    let promised = capacity.allocations.as_ref().map(|a| a.allocations.as_slice()).unwrap_or_default();
    if !promised.is_empty() {
        text.push('\n');
        text.push_str(&output::table(
            &["PROMISED TO", "VCPUS", "MEMORY", "STATE"],
            promised.iter().map(|a| {
                let state = a.state().as_str_name().trim_start_matches("ALLOCATION_STATE_").to_lowercase();
                vec![names::short(&a.resource), a.vcpus.to_string(), output::size(a.memory_bytes), state]
            }),
        ));
    }
    text.push('\n');
    text.push_str(&lines(capacity, &inventory));
    text
}

/// One row a resource: NUMA nodes, then pools.
fn resources(inventory: &Inventory) -> String {
    let mut rows = Vec::new();
    for numa in &inventory.numa_nodes {
        let amounts =
            [("cpus", numa.cpus, false), ("memory", numa.memory, true), ("hugepages", numa.hugepages, true)];
        for (what, amount, is_bytes) in amounts {
            let amount = amount.unwrap_or_default();
            if amount.total == 0 {
                continue;
            }
            let show = |n: u64| if is_bytes { output::size(n) } else { n.to_string() };
            rows.push(vec![
                format!("numa{} {what}", numa.id),
                show(amount.total),
                show(amount.reserved),
                show(amount.allocatable),
                show(amount.allocated),
            ]);
        }
    }
    for pool in &inventory.storage_pools {
        rows.push(vec![
            format!("pool {}", pool.name),
            output::size(pool.physical_bytes),
            String::new(),
            format!("{} used", output::size(pool.used_bytes)),
            output::size(pool.provisioned_bytes),
        ]);
    }
    output::table(&["RESOURCE", "TOTAL", "RESERVED", "ALLOCATABLE", "ALLOCATED"], rows.into_iter())
}

fn lines(capacity: &Capacity, inventory: &Inventory) -> String {
    let mut text = format!("cpu        {} ({})\n", inventory.cpu_model, inventory.cpu_baseline);
    if let Some(usage) = &capacity.usage {
        text.push_str(&format!("usage      {}\n", usage_text(usage)));
    }
    let link = capacity.scheduler.clone().unwrap_or_default();
    let state = match (link.url.is_empty(), link.connected) {
        (true, _) => "none configured".to_owned(),
        (false, true) => format!("{}, connected since {}", link.url, output::time(link.since.as_ref())),
        (false, false) => format!("{}, not connected: {}", link.url, link.last_error),
    };
    text.push_str(&format!("scheduler  {state}\n"));
    text
}

fn usage_text(usage: &Usage) -> String {
    let mut parts = vec![
        format!("cpu {:.0}% busy", usage.cpu_busy * 100.0),
        format!("{} memory available", output::size(usage.memory_available_bytes)),
        format!("{} vms running", usage.vms_running),
    ];
    let pressures =
        [("cpu", usage.cpu_pressure), ("memory", usage.memory_pressure), ("io", usage.io_pressure)];
    parts.extend(
        pressures.iter().filter_map(|(what, value)| value.map(|v| format!("{what} pressure {v:.1}%"))),
    );
    parts.extend(usage.steal.map(|steal| format!("steal {:.1}%", steal * 100.0)));
    parts.join(", ")
}
