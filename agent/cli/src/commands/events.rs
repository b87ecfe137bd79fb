//! `events`: what happened on the node.

use serio_api::v1::{Event, WatchEventsRequest, node_service_client::NodeServiceClient};

use crate::{args::EventsArgs, client::Client, error::Failure, names, output, output::Output};

pub(super) async fn run(client: &Client, args: EventsArgs, output: Output) -> Result<(), Failure> {
    let doing = "read the events";
    let request = WatchEventsRequest { from: args.from, follow: args.follow, ..Default::default() };
    let answer = NodeServiceClient::new(client.channel()).watch_events(request).await;
    let mut stream = answer.map_err(|status| client.failure(doing, status))?.into_inner();
    let mut kept = Vec::new();
    while let Some(event) = stream.message().await.map_err(|status| client.failure(doing, status))? {
        if args.follow {
            output.item(&event, || line(&event))?;
        } else {
            kept.push(event);
        }
    }
    if args.follow {
        return Ok(());
    }
    output.list(&kept, &["NUMBER", "TIME", "KIND", "RESOURCE", "MESSAGE"], row)
}

/// A row whose columns are as wide as most events want: what comes later is not known.
fn line(event: &Event) -> String {
    let [number, time, kind, resource, message] = row(event).try_into().unwrap_or_default();
    output::clean(&format!("{number:<6}  {time}  {kind:<10}  {resource:<24}  {message}"))
}

fn row(event: &Event) -> Vec<String> {
    vec![
        event.number.to_string(),
        output::time(event.time.as_ref()),
        event.kind.clone(),
        names::with_noun(&event.resource),
        event.message.clone(),
    ]
}
