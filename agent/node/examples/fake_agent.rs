//! A stand-in for `serio-vmm` and `serio-volumed` in the tests of `supervise`: it speaks their protocol and does
//! the least that can be seen from outside.
//!
//! As a VMM it is told by the kernel command line how to misbehave: `refuse`, `die`, `hang` (never answers Launch),
//! `deaf` (runs, then answers nothing). As a volume process it writes `head` or `sealed NAME` into the map files.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test program: a panic is a finding")]

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    os::{fd::OwnedFd, unix::net::UnixListener},
    process,
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use prost::Message;
use serio_control::{
    Channel, LAUNCH_WAIT,
    message::{
        Body, Code, Empty, EndKind, EndRecord, Failed, JobStatus, Launch, SnapshotInfo, VmState, VmStatus,
        VolumeInfo,
    },
};

/// What a VMM keeps.
#[derive(Default)]
struct Vm {
    exit: Option<File>,
    /// The map of the newest layer of the only volume.
    map: Option<File>,
    deaf: bool,
    launching: bool,
}

static VM: Mutex<Option<Vm>> = Mutex::new(None);

fn main() {
    let number = std::env::args().nth(3).unwrap().parse().unwrap();
    let me =
        rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty()).unwrap();
    let socket = rustix::process::pidfd_getfd(me, number, rustix::process::PidfdGetfdFlags::empty()).unwrap();
    let listener = UnixListener::from(socket);
    eprintln!("fake agent {} listens", process::id());
    thread::spawn(|| {
        thread::sleep(LAUNCH_WAIT);
        if VM.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            process::exit(4);
        }
    });
    for stream in listener.incoming() {
        let channel = Channel::new(stream.unwrap());
        thread::spawn(move || serve(channel));
    }
}

fn serve(mut channel: Channel) {
    while let Ok((frame, fds)) = channel.receive() {
        let reply = answer(frame.body.unwrap(), fds);
        if channel.send(frame.id, reply, &[]).is_err() {
            return;
        }
    }
}

fn done() -> Body {
    Body::Done(Empty {})
}

fn refuse(message: &str) -> Body {
    Body::Failed(Failed {
        code: Code::Precondition.into(),
        message: message.to_owned(),
        field: "cmdline".to_owned(),
    })
}

fn answer(body: Body, fds: Vec<OwnedFd>) -> Body {
    if matches!(body, Body::Launch(_) | Body::Export(_)) {
        VM.lock().unwrap().get_or_insert_default().launching = true;
    }
    let deaf = VM.lock().unwrap().as_ref().is_some_and(|vm| vm.deaf);
    if deaf {
        thread::sleep(Duration::from_secs(3600));
    }
    match body {
        Body::Launch(launch) => start(&launch, fds),
        Body::Status(_) => status(),
        Body::PowerButton(_) => end(EndKind::PowerOff, "the guest powered off"),
        Body::Stop(_) => end(EndKind::Stopped, "stopped"),
        Body::Reset(_) => done(),
        Body::SnapshotVolume(ask) => {
            let mut maps = fds.into_iter().map(File::from);
            seal(
                VM.lock().unwrap().as_mut().unwrap().map.replace(maps.nth(1).unwrap()).as_mut(),
                &ask.snapshot,
            );
            write(VM.lock().unwrap().as_mut().unwrap().map.as_mut().unwrap(), "head");
            done()
        }
        Body::CreateVolume(ask) => create(ask.size_bytes, fds),
        Body::InspectVolume(_) => inspect(fds),
        Body::CloneVolume(_) => {
            let mut files: Vec<File> = fds.into_iter().map(File::from).collect();
            write(files.last_mut().unwrap(), "head");
            leave_after(done())
        }
        Body::SnapshotStopped(ask) => {
            let mut files: Vec<File> = fds.into_iter().map(File::from).collect();
            let (new, old) = (files.len() - 1, files.len() - 3);
            seal(files.get_mut(old), &ask.snapshot);
            write(&mut files[new], "head");
            leave_after(done())
        }
        Body::ImportImage(_) => import(fds),
        Body::Export(_) => export(fds),
        _ => refuse("not played"),
    }
}

fn status() -> Body {
    let vm = VM.lock().unwrap();
    let state = match vm.as_ref() {
        None => VmState::Waiting,
        Some(vm) if vm.exit.is_none() && vm.launching => VmState::Waiting,
        Some(_) => VmState::Running,
    };
    Body::VmStatus(VmStatus { state: state.into(), uptime_ns: 5_000_000_000, ..Default::default() })
}

fn start(launch: &Launch, fds: Vec<OwnedFd>) -> Body {
    match launch.cmdline.as_str() {
        "refuse" => return refuse("the kernel is of an unknown format"),
        "die" => {
            eprintln!("something broke");
            process::exit(3)
        }
        "hang" => thread::sleep(Duration::from_secs(3600)),
        _ => {}
    }
    let mut fds: Vec<Option<OwnedFd>> = fds.into_iter().map(Some).collect();
    let mut take = |number: u32| fds[number as usize].take().unwrap();
    let console = UnixListener::from(take(launch.console_fd));
    thread::spawn(move || {
        for stream in console.incoming() {
            let mut stream = stream.unwrap();
            let mut byte = [0];
            while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
        }
    });
    File::from(take(launch.log_fd)).write_all(b"Linux version\n").unwrap();
    let layer = launch.disks.first().and_then(|disk| disk.layers.last()).and_then(|layer| layer.map_fd);
    let mut vm = VM.lock().unwrap();
    let vm = vm.get_or_insert_default();
    vm.map = layer.map(|number| take(number).into());
    vm.exit = Some(take(launch.exit_fd).into());
    vm.deaf = launch.cmdline == "deaf";
    done()
}

fn end(kind: EndKind, reason: &str) -> ! {
    if let Some(exit) = VM.lock().unwrap().as_mut().and_then(|vm| vm.exit.as_mut()) {
        let record = EndRecord { kind: kind.into(), reason: reason.to_owned() };
        exit.write_all(&record.encode_to_vec()).unwrap();
    }
    process::exit(0)
}

fn write(map: &mut File, text: &str) {
    map.set_len(0).unwrap();
    map.seek(SeekFrom::Start(0)).unwrap();
    map.write_all(text.as_bytes()).unwrap();
}

fn seal(map: Option<&mut File>, name: &str) {
    write(map.unwrap(), &format!("sealed {name}"));
}

fn create(size_bytes: u64, fds: Vec<OwnedFd>) -> Body {
    let mut files: Vec<File> = fds.into_iter().map(File::from).collect();
    if size_bytes == 13 {
        process::exit(5);
    }
    if let [data, _, image] = files.as_mut_slice() {
        std::io::copy(image, data).unwrap();
    }
    files[0].set_len(size_bytes).unwrap();
    write(&mut files[1], "head");
    leave_after(done())
}

fn inspect(fds: Vec<OwnedFd>) -> Body {
    let mut info = VolumeInfo { size_bytes: 1, ..Default::default() };
    for (number, map) in fds.into_iter().skip(1).step_by(2).enumerate() {
        let mut text = String::new();
        File::from(map).read_to_string(&mut text).unwrap();
        info.layers += 1;
        info.chain.push(number as u64);
        match text.strip_prefix("sealed ") {
            Some(name) => info.snapshots.push(SnapshotInfo { name: name.to_owned(), ..Default::default() }),
            None => break,
        }
    }
    leave_after(Body::VolumeInfo(info))
}

fn import(fds: Vec<OwnedFd>) -> Body {
    let mut files = fds.into_iter().map(File::from);
    let (mut from, mut to) = (files.next().unwrap(), files.next().unwrap());
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).unwrap();
    to.write_all(&bytes).unwrap();
    let blake3 = blake3::hash(&bytes).as_bytes().to_vec();
    leave_after(Body::JobStatus(JobStatus { size_bytes: bytes.len() as u64, blake3, ..Default::default() }))
}

fn export(fds: Vec<OwnedFd>) -> Body {
    let listener = UnixListener::from(fds.into_iter().next().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            stream.unwrap().write_all(b"NBDMAGIC").unwrap();
        }
    });
    done()
}

/// A job's process ends soon after its answer.
fn leave_after(reply: Body) -> Body {
    thread::spawn(|| {
        thread::sleep(Duration::from_millis(20));
        process::exit(0);
    });
    reply
}
