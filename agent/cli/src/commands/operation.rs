//! `operation`: long work that goes on without the command that began it; and the waiting of those that do wait.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use serio_api::v1::{
    CancelOperationRequest, GetOperationRequest, ListOperationsRequest, Operation, OperationState,
    WatchOperationRequest, operation_service_client::OperationServiceClient,
};
use tonic::{Code, Status};

use crate::{args::OperationVerb, client::Client, error::Failure, names, output, output::Output};

/// The exit code of a command that ctrl-C ended, as shells have it.
const INTERRUPTED: u8 = 130;
/// A host that went away while its operation is watched is asked again so often, and after so long.
const AGAIN_MAX: u32 = 20;
const AGAIN_AFTER: Duration = Duration::from_millis(500);

pub(super) async fn run(client: &Client, verb: OperationVerb, output: Output) -> Result<(), Failure> {
    match verb {
        OperationVerb::List { running, volume } => {
            let target_prefix = volume.as_ref().map(names::volume).unwrap_or_default();
            let request =
                ListOperationsRequest { target_prefix, running_only: running, ..Default::default() };
            let mut answer = client
                .call("list the operations", request, |channel, request| async move {
                    OperationServiceClient::new(channel).list_operations(request).await
                })
                .await?;
            if let Some(volume) = &volume {
                // The host compares beginnings: `web` is one of `web-root`.
                let (whole, within) = (names::volume(volume), format!("{}/", names::volume(volume)));
                answer.operations.retain(|o| o.target == whole || o.target.starts_with(&within));
            }
            output.list(&answer.operations, &["ID", "KIND", "TARGET", "STATE", "DONE", "BEGUN"], |o| {
                vec![
                    names::short(&o.name),
                    o.kind.clone(),
                    names::with_noun(&o.target),
                    state(o).to_owned(),
                    percent(o),
                    output::time(o.create_time.as_ref()),
                ]
            })
        }
        OperationVerb::Show { id } => show(&get(client, &full(&id)).await?, output),
        OperationVerb::Watch { id } => {
            let operation = get(client, &full(&id)).await?;
            let sentence = format!("{} of {} is done", operation.kind, names::with_noun(&operation.target));
            wait(client, operation, &sentence, output).await
        }
        OperationVerb::Cancel { id } => {
            let request = CancelOperationRequest { name: full(&id) };
            let operation = client
                .call(&format!("cancel operation {id}"), request, |channel, request| async move {
                    OperationServiceClient::new(channel).cancel_operation(request).await
                })
                .await?;
            let sentence = match operation.state() {
                OperationState::Running => "asked the operation to end",
                OperationState::Cancelled => "the operation was cancelled",
                _ => "the operation had ended already",
            };
            output.done(&operation, sentence)
        }
    }
}

/// The API's name.
fn full(id: &str) -> String {
    format!("operations/{}", id.strip_prefix("operations/").unwrap_or(id))
}

async fn get(client: &Client, name: &str) -> Result<Operation, Failure> {
    let request = GetOperationRequest { name: name.to_owned() };
    let doing = format!("show operation {}", names::short(name));
    client
        .call(&doing, request, |channel, request| async move {
            OperationServiceClient::new(channel).get_operation(request).await
        })
        .await
}

fn state(operation: &Operation) -> &'static str {
    match operation.state() {
        OperationState::Unspecified => "unknown",
        OperationState::Running => "running",
        OperationState::Done => "done",
        OperationState::Failed => "failed",
        OperationState::Cancelled => "cancelled",
    }
}

fn percent(operation: &Operation) -> String {
    match operation.done_bytes.saturating_mul(100).checked_div(operation.total_bytes) {
        Some(percent) => format!("{percent}%"),
        None => String::new(),
    }
}

fn show(operation: &Operation, output: Output) -> Result<(), Failure> {
    output.one(
        operation,
        &[
            ("id", names::short(&operation.name)),
            ("kind", operation.kind.clone()),
            ("target", names::with_noun(&operation.target)),
            ("state", state(operation).to_owned()),
            ("done", output::size(operation.done_bytes)),
            ("total", output::size(operation.total_bytes)),
            ("error", operation.error.clone()),
            ("begun", output::time(operation.create_time.as_ref())),
            ("ended", output::time(operation.end_time.as_ref())),
        ],
    )
}

/// What follows a call that has begun an operation: its end is waited for, unless that is not wanted.
pub(super) async fn follow(
    client: &Client,
    operation: Operation,
    no_wait: bool,
    sentence: &str,
    output: Output,
) -> Result<(), Failure> {
    if no_wait {
        let begun = format!("began operation {}", names::short(&operation.name));
        return output.done(&operation, &begun);
    }
    wait(client, operation, sentence, output).await
}

/// Waits for the end, with a bar on a terminal. ctrl-C and --timeout end the waiting, not the operation.
async fn wait(client: &Client, begun: Operation, sentence: &str, output: Output) -> Result<(), Failure> {
    told(&ended(client, begun).await?, sentence, output)
}

/// Waits for the end; see [`wait`].
pub(super) async fn ended(client: &Client, begun: Operation) -> Result<Operation, Failure> {
    let bar = bar(&begun);
    let patience = async {
        match client.timeout() {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    let ended = tokio::select! {
        ended = watch(client, begun.clone(), &bar) => ended,
        _ = tokio::signal::ctrl_c() => Err(goes_on(&begun, &bar)),
        () = patience => Err(goes_on(&begun, &bar)),
    };
    bar.finish_and_clear();
    ended
}

/// Tells how an operation ended.
pub(super) fn told(ended: &Operation, sentence: &str, output: Output) -> Result<(), Failure> {
    match ended.state() {
        OperationState::Done => output.done(ended, sentence),
        _ if output.format() != crate::args::Format::Table => {
            output.value(ended)?;
            Err(Failure::Silent(1))
        }
        OperationState::Cancelled => Err(Failure::plain(format!("{} was cancelled", ended.name))),
        _ => Err(Failure::plain(format!("{} failed: {}", ended.name, ended.error))),
    }
}

fn goes_on(operation: &Operation, bar: &ProgressBar) -> Failure {
    bar.finish_and_clear();
    let id = names::short(&operation.name);
    eprintln!(
        "{} goes on; follow it with\n  serio operation watch {id}\nor end it with\n  serio operation cancel {id}",
        operation.name
    );
    Failure::Silent(INTERRUPTED)
}

fn bar(operation: &Operation) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style =
        ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}");
    let bar = ProgressBar::new(operation.total_bytes);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(operation.kind.clone());
    bar
}

/// Follows an operation to its end; a host that restarts meanwhile goes on with it, so it is asked again.
async fn watch(client: &Client, begun: Operation, bar: &ProgressBar) -> Result<Operation, Failure> {
    let doing = format!("watch operation {}", names::short(&begun.name));
    let mut latest = begun;
    let mut again = 0;
    while latest.state() == OperationState::Running {
        match watch_once(client, &mut latest, bar).await {
            Ok(()) => again = 0,
            Err(status) if again < AGAIN_MAX && is_passing(&status) => {
                again += 1;
                tokio::time::sleep(AGAIN_AFTER).await;
            }
            Err(status) => return Err(client.failure(&doing, status)),
        }
    }
    Ok(latest)
}

fn is_passing(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal)
}

async fn watch_once(client: &Client, latest: &mut Operation, bar: &ProgressBar) -> Result<(), Status> {
    let request = WatchOperationRequest { name: latest.name.clone() };
    let answer = OperationServiceClient::new(client.channel()).watch_operation(request).await?;
    let mut stream = answer.into_inner();
    while let Some(operation) = stream.message().await? {
        bar.set_length(operation.total_bytes);
        bar.set_position(operation.done_bytes);
        *latest = operation;
    }
    if latest.state() == OperationState::Running {
        return Err(Status::unavailable("the host ended the stream"));
    }
    Ok(())
}
