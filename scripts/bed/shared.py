"""What all testbed hosts share: where things lie, the binaries' disk, the certificates, the wire between the hosts.

Never starts or stops a host: that is host.py.
"""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
BED = Path(os.environ.get("SERIO_TESTBED", TARGET / "testbed"))
SHARED = BED / ".shared"
TRIPLE = "x86_64-unknown-linux-gnu"
# What runs in a host, and the crate that makes it.
BINARIES = {"seriod": "serio-node", "serio-vmm": "serio-vmm", "serio-volumed": "serio-volumed",
            "serio-scheduler": "serio-scheduler", "serio": "serio-cli"}
TOOLS = {"testbed-agent": "serio-tests", "hold-kvm": "serio-tests"}


class Failure(Exception):
    """Said to the user without a trace."""


class HostDied(Failure):
    """The host's kernel died or hung by itself: nothing that Serio did."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def run(*command, **options):
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if result.returncode:
        raise Failure(f"{command[0]} failed ({result.returncode}): {result.stderr.strip()[-2000:]}")
    return result.stdout


@contextmanager
def lock():
    SHARED.mkdir(parents=True, exist_ok=True)
    with open(SHARED / "lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def profile_dir(profile):
    return TARGET / TRIPLE / ("debug" if profile == "dev" else profile)


def build(profile, bare):
    crates = set(TOOLS.values()) if bare else set(TOOLS.values()) | set(BINARIES.values())
    command = ["cargo", "build", "--quiet", "--bins", "--profile", profile]
    for crate in sorted(crates):
        command += ["-p", crate]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise Failure("the build failed")


def tools_disk(profile):
    """An ext4 image with the stripped binaries in bin/, made anew when one of them has changed."""
    found = {n: profile_dir(profile) / n for n in [*BINARIES, *TOOLS] if (profile_dir(profile) / n).exists()}
    key = json.dumps({n: [p.stat().st_mtime_ns, p.stat().st_size] for n, p in found.items()}, sort_keys=True)
    disk, keyfile = SHARED / f"tools-{profile}.raw", SHARED / f"tools-{profile}.key"
    if disk.exists() and keyfile.exists() and keyfile.read_text() == key:
        return disk
    tree = SHARED / f"tools-{profile}.tree"
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "bin").mkdir(parents=True)
    for name, path in found.items():
        run("strip", "--strip-debug", "-o", str(tree / "bin" / name), str(path))
    used = sum(f.stat().st_size for f in (tree / "bin").iterdir())
    new = disk.with_suffix(".new")
    new.unlink(missing_ok=True)
    run("truncate", "-s", str((used * 5 // 4 + (16 << 20)) & ~4095), str(new))
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(tree), str(new))
    shutil.rmtree(tree)
    new.rename(disk)  # A host that runs from the old one keeps it open.
    keyfile.write_text(key)
    return disk


def issue(profile, name, role, addresses):
    """The folder of the certificates of a name; made once with `serio pki`."""
    serio, pki = str(profile_dir(profile) / "serio"), SHARED / "pki"
    if not (pki / "ca-cert.pem").exists():
        run(serio, "pki", "init", str(pki), "--name", "testbed CA")
    if not (pki / name / "client-cert.pem").exists():
        hosts = [word for address in addresses for word in ["--host", address]]
        run(serio, "pki", "issue", str(pki), name, "--role", role, "--days", "3650", *hosts)
    return pki / name


# Where a service is reached: through a forwarded port, and from the hosts as the emulator's gateway.
NAMES = ["localhost", "127.0.0.1", "10.0.2.2"]


def hub():
    """Starts the wire between the hosts: datagrams on Unix sockets, relayed to all others."""
    net = SHARED / "net"
    net.mkdir(parents=True, exist_ok=True)
    pid = pid_of(SHARED / "hub.pid", "hub-daemon")
    if pid:
        return
    with open(SHARED / "hub.log", "ab") as log:
        process = subprocess.Popen([sys.executable, str(ROOT / "scripts/testbed"), "hub-daemon"], cwd=net, stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=log, start_new_session=True)
    (SHARED / "hub.pid").write_text(str(process.pid))
    deadline = time.monotonic() + 10
    while not (net / "hub").exists():
        if time.monotonic() > deadline:
            raise Failure("the wire between the hosts does not start")
        time.sleep(0.02)


def hub_daemon():
    """Ethernet frames from each host's socket to all the others. Lost frames are lost, as on a wire."""
    Path("hub").unlink(missing_ok=True)
    wire = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    wire.bind("hub")
    wire.setblocking(True)
    while True:
        frame, sender = wire.recvfrom(65536)
        for peer in os.listdir("."):
            # A host sends from NAME/wire.
            if peer not in ("hub", (sender or "").split("/")[0]):
                try:
                    wire.sendto(frame, socket.MSG_DONTWAIT, peer)
                except OSError:
                    pass


def pid_of(pidfile, marker):
    """The process in a pid file, if it still is what we started."""
    try:
        pid = int(pidfile.read_text())
        if marker.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    except (OSError, ValueError):
        pass
    return None


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
