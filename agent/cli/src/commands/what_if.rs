//! `capacity what-if`: what would still fit if a site were gone, asked of a scheduler.

use serio_api::v1::{
    Fit, SiteCapacity, WhatFitsRequest, WhatFitsResponse, scheduler_service_client::SchedulerServiceClient,
};

use crate::{args::Format, client::Client, error::Failure, names, output, output::Output};

pub(super) async fn run(client: &Client, without: String, output: Output) -> Result<(), Failure> {
    let request = WhatFitsRequest { without_site: without.clone() };
    let answer = client
        .call("ask what fits", request, |channel, request| async move {
            SchedulerServiceClient::new(channel).what_fits(request).await
        })
        .await?;
    if output.format() == Format::Table {
        output::text(&tables(&without, &answer))?;
    } else {
        output.value(&answer)?;
    }
    Ok(())
}

fn tables(without: &str, answer: &WhatFitsResponse) -> String {
    let mut text = format!(
        "without {without}: {} of {} fit elsewhere\n\n",
        answer.fitting,
        answer.fitting.saturating_add(answer.not_fitting)
    );
    if !answer.fits.is_empty() {
        // What does not fit is what matters: first.
        let (nowhere, somewhere): (Vec<&Fit>, Vec<&Fit>) =
            answer.fits.iter().partition(|fit| fit.node.is_empty());
        let rows = nowhere.into_iter().chain(somewhere).map(|fit| {
            let to = if fit.node.is_empty() { fit.reason.clone() } else { names::short(&fit.node) };
            vec![
                names::short(&fit.resource),
                names::short(&fit.from_node),
                fit.vcpus.to_string(),
                output::size(fit.memory_bytes),
                to,
            ]
        });
        text.push_str(&output::table(&["PROMISED TO", "FROM", "VCPUS", "MEMORY", "WOULD GO TO"], rows));
        text.push('\n');
    }
    let of = |used: u64, all: u64| format!("{}/{}", output::size(used), output::size(all));
    let site = |site: &SiteCapacity| {
        vec![
            site.site.clone(),
            site.nodes.to_string(),
            format!("{}/{}", site.vcpus_allocated, site.vcpus_allocatable),
            of(site.memory_allocated, site.memory_allocatable),
            format!("{} vcpus, {}", site.vcpus_dr_held, output::size(site.memory_dr_held)),
        ]
    };
    text.push_str(&output::table(
        &["SITE", "NODES", "VCPUS", "MEMORY", "OF THAT HELD FOR RECOVERY"],
        answer.sites.iter().map(site),
    ));
    text
}
