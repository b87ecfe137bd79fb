//! Runs commands in a testbed host for the tester: the far and the near end of `scripts/testbed exec`.
//!
//! `testbed-agent serve PORT` listens in the host; `testbed-agent exec ADDRESS -- COMMAND…` runs on the tester's machine and
//! behaves like the command: standard input goes there, both outputs and the exit code come back. `testbed-agent put
//! ADDRESS MODE PATH` writes standard input to a file, in one rename. The environment variable TESTBED_TOKEN holds the
//! word that both ends must know: the port is forwarded to the loopback of the machine, where others may be logged in.
//!
//! Wire: the near end sends one line (the token), then frames; a frame is one byte of kind, four bytes of length (big
//! endian), and that many bytes. Kinds towards the host: `a` argument (in order), `g` go, `i` input (empty: end of input).
//! Kinds back: `o` output, `e` error output, `x` exit code as text (the last frame).
//!
//! Threads: one a connection, and two for its outputs. It never keeps state: a broken connection kills its command.
#![forbid(unsafe_code)]
#![allow(clippy::disallowed_methods, reason = "flush is meant for pipes and terminals here, never for files")]

use std::{
    io::{self, BufReader, ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

/// The largest frame that either end accepts.
const FRAME_BYTES_MAX: u32 = 1 << 20;
const CHUNK_BYTES: usize = 64 * 1024;

fn main() -> ExitCode {
    // 255: neither the command's exit code nor a shell's.
    run().unwrap_or_else(|error| {
        eprintln!("testbed-agent: {error:#}");
        ExitCode::from(255)
    })
}

fn run() -> anyhow::Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let token = std::env::var("TESTBED_TOKEN").context("TESTBED_TOKEN is not set")?;
    match args.as_slice() {
        ["serve", port] => serve(&token, port.parse().context("the port must be a number")?),
        ["exec", address, "--", command @ ..] if !command.is_empty() => exec(&token, address, command),
        ["put", address, mode, path] => {
            let script = format!("cat > {path}.new && chmod {mode} {path}.new && mv {path}.new {path}");
            exec(&token, address, &["/bin/sh", "-c", &script])
        }
        _ => bail!("usage: testbed-agent serve PORT | exec ADDRESS -- COMMAND… | put ADDRESS MODE PATH"),
    }
}

fn write_frame(out: &mut impl Write, kind: u8, data: &[u8]) -> io::Result<()> {
    let length = u32::try_from(data.len()).map_err(|_| io::Error::from(ErrorKind::InvalidInput))?;
    let mut frame = Vec::with_capacity(data.len().saturating_add(5));
    frame.push(kind);
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(data);
    out.write_all(&frame)?;
    out.flush()
}

fn read_frame(input: &mut impl Read) -> io::Result<(u8, Vec<u8>)> {
    let (mut kind, mut length) = ([0], [0; 4]);
    input.read_exact(&mut kind)?;
    input.read_exact(&mut length)?;
    let length = u32::from_be_bytes(length);
    if length > FRAME_BYTES_MAX {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("a frame of {length} bytes")));
    }
    let mut data = vec![0; length as usize];
    input.read_exact(&mut data)?;
    Ok((kind[0], data))
}

// ---- the host's end

fn serve(token: &str, port: u16) -> anyhow::Result<ExitCode> {
    let listener =
        TcpListener::bind(("0.0.0.0", port)).with_context(|| format!("cannot listen on port {port}"))?;
    for stream in listener.incoming() {
        let (stream, token) = (stream.context("cannot accept")?, token.to_owned());
        thread::spawn(move || {
            if let Err(error) = serve_one(&token, stream) {
                eprintln!("testbed-agent: {error:#}");
            }
        });
    }
    Ok(ExitCode::SUCCESS)
}

fn serve_one(token: &str, stream: TcpStream) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let mut input = BufReader::new(stream.try_clone()?);
    let mut line = vec![0; token.len() + 1];
    input.read_exact(&mut line)?;
    ensure!(line == format!("{token}\n").as_bytes(), "a connection with a wrong token was refused");
    let mut args = Vec::new();
    loop {
        match read_frame(&mut input)? {
            (b'a', data) => args.push(String::from_utf8(data)?),
            (b'g', _) => break,
            (kind, _) => bail!("an unexpected frame of kind {kind}"),
        }
    }
    let (program, rest) = args.split_first().context("no command")?;
    let output = Arc::new(Mutex::new(stream));
    let spawned = Command::new(program)
        .args(rest)
        .current_dir("/root")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            send(&output, b'e', format!("cannot run {program}: {error}\n").as_bytes())?;
            send(&output, b'x', b"127")?;
            // Closed with input unread, the connection would be reset and the answer lost.
            io::copy(&mut input, &mut io::sink())?;
            return Ok(());
        }
    };
    let status = attend(&mut child, input, &output)?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(send(&output, b'x', code.to_string().as_bytes())?)
}

fn send(output: &Mutex<TcpStream>, kind: u8, data: &[u8]) -> io::Result<()> {
    write_frame(&mut *output.lock().expect("no holder of this lock panics"), kind, data)
}

/// Moves bytes between the connection and the child until it has ended and its outputs are drained.
fn attend(
    child: &mut Child,
    input: BufReader<TcpStream>,
    output: &Arc<Mutex<TcpStream>>,
) -> anyhow::Result<ExitStatus> {
    let out = copy_out(b'o', child.stdout.take().expect("it is piped"), output);
    let err = copy_out(b'e', child.stderr.take().expect("it is piped"), output);
    let (stdin, group) =
        (child.stdin.take().expect("it is piped"), Pid::from_raw(i32::try_from(child.id())?));
    // Ends with the connection; the process of this thread outlives the command by at most that.
    thread::spawn(move || feed(input, stdin, group));
    let status = child.wait()?;
    // A command may leave a daemon behind that holds the pipes: what it prints later is not the command's.
    for _ in 0..50 {
        if out.is_finished() && err.is_finished() {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(status)
}

fn copy_out(
    kind: u8,
    mut from: impl Read + Send + 'static,
    to: &Arc<Mutex<TcpStream>>,
) -> thread::JoinHandle<()> {
    let to = to.clone();
    thread::spawn(move || {
        let mut chunk = vec![0; CHUNK_BYTES];
        while let Ok(length @ 1..) = from.read(&mut chunk) {
            if send(&to, kind, &chunk[..length]).is_err() {
                break;
            }
        }
    })
}

/// Input for the child; when the tester is gone, the command's process group is killed.
fn feed(mut input: BufReader<TcpStream>, stdin: std::process::ChildStdin, group: Pid) {
    let mut stdin = Some(stdin);
    loop {
        match read_frame(&mut input) {
            Ok((b'i', data)) if data.is_empty() => stdin = None,
            Ok((b'i', data)) => {
                // A child that reads no more is no reason to stop listening for the end of the connection.
                if stdin.as_mut().is_some_and(|pipe| pipe.write_all(&data).is_err()) {
                    stdin = None;
                }
            }
            Ok((b'd', _)) => return,
            _ => {
                let _ = killpg(group, Signal::SIGKILL);
                return;
            }
        }
    }
}

// ---- the tester's end

fn exec(token: &str, address: &str, command: &[&str]) -> anyhow::Result<ExitCode> {
    let mut stream =
        TcpStream::connect(address).with_context(|| format!("cannot reach the testbed host at {address}"))?;
    stream.set_nodelay(true)?;
    stream.write_all(format!("{token}\n").as_bytes())?;
    for argument in command {
        write_frame(&mut stream, b'a', argument.as_bytes())?;
    }
    write_frame(&mut stream, b'g', b"")?;
    let mut to_host = stream.try_clone()?;
    thread::spawn(move || -> io::Result<()> {
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut stdin = io::stdin().lock();
        while let Ok(length @ 1..) = stdin.read(&mut chunk) {
            write_frame(&mut to_host, b'i', &chunk[..length])?;
        }
        write_frame(&mut to_host, b'i', b"")
    });
    let mut input = BufReader::new(stream.try_clone()?);
    loop {
        match read_frame(&mut input).context("the testbed host closed the connection")? {
            (b'o', data) => relay(&mut io::stdout().lock(), &data)?,
            (b'e', data) => relay(&mut io::stderr().lock(), &data)?,
            (b'x', code) => {
                // Says that the command's leftovers (a daemon) may live on.
                let _ = write_frame(&mut stream, b'd', b"");
                return Ok(ExitCode::from(String::from_utf8(code)?.parse::<u8>()?));
            }
            (kind, _) => bail!("an unexpected frame of kind {kind}"),
        }
    }
}

fn relay(out: &mut impl Write, data: &[u8]) -> io::Result<()> {
    out.write_all(data)?;
    out.flush()
}
