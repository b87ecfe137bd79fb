//! `place`: room for VMs, asked of a scheduler.

use serio_api::v1::{
    AllocationClass, CommitPlacementRequest, GetPlacementRequest, ListPlacementsRequest, PlaceRequest,
    Placement, ReleasePlacementRequest, scheduler_service_client::SchedulerServiceClient,
};
use serio_types::Name;

use super::request_id;
use crate::{
    args::{PlaceArgs, PlaceVerb},
    client::Client,
    error::Failure,
    names, output,
    output::Output,
};

/// Placements of one page.
const PAGE: i32 = 1000;

pub(super) async fn run(client: &Client, args: PlaceArgs, output: Output) -> Result<(), Failure> {
    match args.verb {
        None => place(client, args, output).await,
        Some(PlaceVerb::List { vdc }) => list(client, vdc, output).await,
        Some(PlaceVerb::Show { placement }) => {
            let request = GetPlacementRequest { name: full(placement.as_str()) };
            let found = client
                .call(&format!("show placement {placement}"), request, |channel, request| async move {
                    SchedulerServiceClient::new(channel).get_placement(request).await
                })
                .await?;
            show(&found, output)
        }
        Some(PlaceVerb::Commit { placement }) => {
            let found = commit(client, placement.as_str()).await?;
            output.done(&found, &format!("{} keeps it: token {}", names::short(&found.node), found.token))
        }
        Some(PlaceVerb::Release { placement }) => {
            let request = ReleasePlacementRequest { name: full(placement.as_str()) };
            let found = client
                .call(&format!("release placement {placement}"), request, |channel, request| async move {
                    SchedulerServiceClient::new(channel).release_placement(request).await
                })
                .await?;
            output.done(&found, &format!("placement {placement} is {}", state(&found)))
        }
    }
}

fn full(name: &str) -> String {
    format!("placements/{name}")
}

fn state(placement: &Placement) -> String {
    placement.state().as_str_name().trim_start_matches("PLACEMENT_STATE_").to_lowercase()
}

async fn place(client: &Client, args: PlaceArgs, output: Output) -> Result<(), Failure> {
    let vdc = args.vdc.map(|name| name.to_string()).unwrap_or_default();
    let request = PlaceRequest {
        request_id: args.request_id.map_or_else(request_id, |name| name.to_string()),
        resource: args.vm.map(|vm| format!("vdcs/{vdc}/vms/{vm}")).unwrap_or_default(),
        vcpus: args.vcpus.unwrap_or_default(),
        memory_bytes: args.memory.map(|size| size.bytes()).unwrap_or_default(),
        storage_bytes: args.storage.map(|size| size.bytes()).unwrap_or_default(),
        class: if args.dr_held { AllocationClass::DrHeld } else { AllocationClass::Normal }.into(),
        anti_affinity_group: args.group,
        site: args.site,
        cpu_baseline: args.baseline,
        image: args.image,
        ttl_ms: 0,
        vdc,
    };
    let mut placement = client
        .call("place it", request, |channel, request| async move {
            SchedulerServiceClient::new(channel).place(request).await
        })
        .await?;
    if args.commit {
        placement = commit(client, names::short(&placement.name).as_str()).await?;
    }
    show(&placement, output)
}

async fn commit(client: &Client, name: &str) -> Result<Placement, Failure> {
    let request = CommitPlacementRequest { name: full(name) };
    client
        .call(&format!("commit placement {name}"), request, |channel, request| async move {
            SchedulerServiceClient::new(channel).commit_placement(request).await
        })
        .await
}

async fn list(client: &Client, vdc: Option<Name>, output: Output) -> Result<(), Failure> {
    let vdc = vdc.map(|name| name.to_string()).unwrap_or_default();
    let mut placements = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = ListPlacementsRequest { vdc: vdc.clone(), page_size: PAGE, page_token };
        let page = client
            .call("list the placements", request, |channel, request| async move {
                SchedulerServiceClient::new(channel).list_placements(request).await
            })
            .await?;
        placements.extend(page.placements);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    output.list(
        &placements,
        &["NAME", "STATE", "NODE", "FOR", "VCPUS", "MEMORY", "STORAGE", "CREATED"],
        |placement| {
            let request = placement.request.clone().unwrap_or_default();
            vec![
                names::short(&placement.name),
                state(placement),
                names::short(&placement.node),
                names::short(&request.resource),
                request.vcpus.to_string(),
                output::size(request.memory_bytes),
                output::size(request.storage_bytes),
                output::time(placement.create_time.as_ref()),
            ]
        },
    )
}

fn show(placement: &Placement, output: Output) -> Result<(), Failure> {
    let filters: Vec<String> =
        placement.filters.iter().map(|count| format!("{} {}", count.filter, count.nodes)).collect();
    let mut fields = vec![
        ("name", names::short(&placement.name)),
        ("state", state(placement)),
        ("node", names::short(&placement.node)),
        ("token", placement.token.clone()),
        ("nodes left", filters.join(", ")),
    ];
    if !placement.vetoes.is_empty() {
        let vetoes: Vec<String> = placement
            .vetoes
            .iter()
            .map(|veto| format!("{}: {}", names::short(&veto.node), veto.message))
            .collect();
        fields.push(("refused by", vetoes.join("; ")));
    }
    if !placement.reason.is_empty() {
        fields.push(("reason", placement.reason.clone()));
    }
    output.one(placement, &fields)
}
