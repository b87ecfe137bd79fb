//! `vm console`: the serial line of a VM on this terminal, on a pipe, or under a script.
//!
//! One stream both ways. Three ways to drive it: a person ([`interact`], raw terminal, ctrl-] detaches), a pipe ([`pipe`],
//! stdin is typed and its end does not detach), a script ([`follow_script`], `--send` and `--until` in the order typed).
//! Detaching never touches the VM.

mod script;

use std::{io::IsTerminal, time::Duration};

use clap::ArgMatches;
use serio_api::v1::{ConsoleInput, ConsoleOutput, vm_service_client::VmServiceClient};
use tokio::{
    io::AsyncReadExt,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use self::script::{Next, Script, Step};
use crate::{
    args::{ConsoleArgs, Global},
    client::Client,
    error::Failure,
    names, output,
    terminal::RawMode,
};

/// ctrl-].
const DETACH: u8 = 0x1d;
/// What a script gets when --timeout says nothing.
const SCRIPT_TIMEOUT: Duration = Duration::from_secs(60);
/// After a script that ends with a --send, the output is shown that long.
const LINGER: Duration = Duration::from_secs(1);
/// A very long time, where no limit was asked for.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 86_400);
/// Messages that wait for the network.
const INPUTS_MAX: usize = 16;

/// An attached console.
struct Console {
    client: Client,
    doing: String,
    input: mpsc::Sender<ConsoleInput>,
    output: Streaming<ConsoleOutput>,
}

impl Console {
    async fn attach(client: Client, args: &ConsoleArgs) -> Result<Self, Failure> {
        let doing = format!("attach to the console of vm {}", args.name);
        let (input, receiver) = mpsc::channel(INPUTS_MAX);
        let first = ConsoleInput {
            name: names::vm(&args.name),
            data: Default::default(),
            history_bytes: u32::try_from(args.history.bytes()).unwrap_or(u32::MAX),
        };
        // The channel is new and has room.
        let _ = input.try_send(first);
        let answer =
            VmServiceClient::new(client.channel()).attach_console(ReceiverStream::new(receiver)).await;
        let output = answer.map_err(|status| client.failure(&doing, status))?.into_inner();
        Ok(Self { client, doing, input, output })
    }

    /// What was printed next; `None` when the VM ended.
    async fn printed(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        match self.output.message().await {
            Ok(message) => Ok(message.map(|m| m.data)),
            Err(status) => Err(self.client.failure(&self.doing, status)),
        }
    }

    /// Types bytes; false when nobody listens any more.
    async fn type_bytes(&self, data: Vec<u8>) -> bool {
        self.input.send(ConsoleInput { data, ..ConsoleInput::default() }).await.is_ok()
    }
}

pub(super) async fn run(global: &Global, args: ConsoleArgs, matches: &ArgMatches) -> Result<(), Failure> {
    let steps = steps(&args, matches)?;
    let console = Console::attach(Client::connect(global).await?, &args).await?;
    if !steps.is_empty() {
        return follow_script(console, Script::new(steps), global.timeout().unwrap_or(SCRIPT_TIMEOUT)).await;
    }
    let deadline = Instant::now() + global.timeout().unwrap_or(FOREVER);
    if std::io::stdin().is_terminal() {
        interact(console, &args, deadline).await
    } else {
        pipe(console, deadline).await
    }
}

/// The steps in the order typed, which clap keeps as indices.
fn steps(args: &ConsoleArgs, matches: &ArgMatches) -> Result<Vec<Step>, Failure> {
    let typed = matches.subcommand_matches("vm").and_then(|vm| vm.subcommand_matches("console"));
    let indices =
        |flag: &str| -> Vec<usize> { typed.and_then(|m| m.indices_of(flag)).into_iter().flatten().collect() };
    let mut steps = Vec::new();
    for (index, text) in indices("send").into_iter().zip(&args.send) {
        steps.push((index, Step::Send(script::unescape(text).map_err(Failure::Usage)?)));
    }
    for (index, text) in indices("until").into_iter().zip(&args.until) {
        steps.push((index, Step::Until(script::pattern(text).map_err(Failure::Usage)?)));
    }
    steps.sort_by_key(|(index, _)| *index);
    Ok(steps.into_iter().map(|(_, step)| step).collect())
}

/// Types and waits as the script says; what is printed goes to stdout.
async fn follow_script(mut console: Console, mut script: Script, limit: Duration) -> Result<(), Failure> {
    let deadline = Instant::now() + limit;
    let mut sent_last = false;
    loop {
        let wanted = match script.next() {
            Next::Send(bytes) => {
                sent_last = true;
                if !console.type_bytes(bytes).await {
                    return Err(Failure::plain("the console closed before everything was typed"));
                }
                continue;
            }
            Next::Done if sent_last => {
                let until = deadline.min(Instant::now() + LINGER);
                return show_until(&mut console, until).await;
            }
            Next::Done => return Ok(()),
            Next::Wait(wanted) => wanted,
        };
        sent_last = false;
        match tokio::time::timeout_at(deadline, console.printed()).await {
            Ok(Ok(Some(data))) => {
                output::bytes(&data)?;
                script.printed(&data);
            }
            Ok(Ok(None)) => {
                return Err(Failure::plain(format!("\nthe VM ended before its console printed `{wanted}`")));
            }
            Ok(Err(failure)) => return Err(failure),
            Err(_) => {
                return Err(Failure::plain(format!(
                    "\nthe console did not print `{wanted}` within {} s: ask for more time with --timeout",
                    limit.as_secs_f64()
                )));
            }
        }
    }
}

/// Shows the output until the VM ends or the time is over.
async fn show_until(console: &mut Console, deadline: Instant) -> Result<(), Failure> {
    while let Ok(printed) = tokio::time::timeout_at(deadline, console.printed()).await {
        match printed? {
            Some(data) => output::bytes(&data)?,
            None => break,
        }
    }
    Ok(())
}

/// Types what stdin holds, and shows the output until the VM ends or the time is over.
async fn pipe(mut console: Console, deadline: Instant) -> Result<(), Failure> {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; 4096];
    let mut open = true;
    loop {
        tokio::select! {
            printed = console.printed() => match printed? {
                Some(data) => output::bytes(&data)?,
                None => return Ok(()),
            },
            read = stdin.read(&mut buffer), if open => {
                let length = read.map_err(|e| Failure::local("cannot read stdin", e))?;
                open = length > 0 && console.type_bytes(buffer.get(..length).unwrap_or_default().to_vec()).await;
            }
            () = tokio::time::sleep_until(deadline) => return Ok(()),
        }
    }
}

/// Why a person's session ended.
enum End {
    Detached,
    Gone,
    TimeOver,
}

/// A person at a terminal.
async fn interact(mut console: Console, args: &ConsoleArgs, deadline: Instant) -> Result<(), Failure> {
    let failed = |e| Failure::local("cannot make the terminal raw", e);
    eprintln!("attached to {}; ctrl-] detaches", args.name);
    let raw = RawMode::enter().map_err(failed)?;
    let result = session(&mut console, deadline).await;
    // Back to normal before anything else is printed.
    drop(raw);
    match result? {
        End::Detached => eprintln!("\ndetached from {}", args.name),
        End::Gone => eprintln!("\n{} has ended", args.name),
        End::TimeOver => eprintln!("\ndetached from {}: the time is over", args.name),
    }
    Ok(())
}

async fn session(console: &mut Console, deadline: Instant) -> Result<End, Failure> {
    let watch = |kind| signal(kind).map_err(|e| Failure::local("cannot watch for signals", e));
    let (mut terminate, mut hangup) = (watch(SignalKind::terminate())?, watch(SignalKind::hangup())?);
    let mut interrupt = watch(SignalKind::interrupt())?;
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; 4096];
    loop {
        tokio::select! {
            printed = console.printed() => match printed? {
                Some(data) => output::bytes(&data)?,
                None => return Ok(End::Gone),
            },
            read = stdin.read(&mut buffer) => {
                let length = read.map_err(|e| Failure::local("cannot read the terminal", e))?;
                let keys = buffer.get(..length).unwrap_or_default();
                let typed = keys.split(|key| *key == DETACH).next().unwrap_or_default();
                if !typed.is_empty() && !console.type_bytes(typed.to_vec()).await {
                    return Ok(End::Gone);
                }
                if typed.len() < keys.len() || keys.is_empty() {
                    return Ok(End::Detached);
                }
            }
            _ = terminate.recv() => return Ok(End::Detached),
            _ = hangup.recv() => return Ok(End::Detached),
            _ = interrupt.recv() => return Ok(End::Detached),
            () = tokio::time::sleep_until(deadline) => return Ok(End::TimeOver),
        }
    }
}
