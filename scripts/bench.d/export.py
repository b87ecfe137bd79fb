"""How fast a raw disk is served, over a Unix socket and over TLS, at what cost in processor and memory: serio-volumed (for
TLS with seriod's front before it), nbdkit, qemu-nbd and qemu-storage-daemon, in turn.

The disk lies on a tmpfs, so that the servers are measured and not a device. Clients: fio's nbd engine and nbdcopy.

Clients run on the same processors, and inside TLS reading has them do more than any server: a thread for each connection, which
decrypts. So no server can pass a certain rate, that of `a server that costs nothing`: as many of the client's threads as there are
processors, always busy, with the least processor time an operation that they needed with any of the servers. How often everybody is woken
counts as much as what everybody does: over one connection two processors are never both busy all the time.
"""

import json
import os
import shutil
import socket as sockets
import statistics
import subprocess
import time
from pathlib import Path

from _common import RELEASE, ROOT, WORK, cargo_release, note, row, run, skip

ONLY = ""
MIB = 1 << 20
DISK_MIB = 512
OURS = "serio-volumed"
# title, fio's words, connections; rates of the first kind are MB/s, of the others thousands a second.
CELLS = [
    (f"{title}, {jobs} connection{'s' if jobs > 1 else ''}", words, jobs)
    for title, words in (
        ("sequential read 256 KiB", ("--rw=read", "--bs=256k")),
        ("random read 4 KiB", ("--rw=randread", "--bs=4k")),
        ("random write 4 KiB", ("--rw=randwrite", "--bs=4k")),
    )
    for jobs in (1, 4)
]


class Server:
    """The processes that serve one disk, as long as the `with` lasts. `commands(place)` gives them in order; each is
    started when the one before listens."""

    def __init__(self, commands, where):
        self.commands, self.where = commands, where
        self.processes = []

    def __enter__(self):
        self.where.fresh()
        for command, ready in self.commands:
            out = subprocess.PIPE if ready == "port" else subprocess.DEVNULL
            process = subprocess.Popen([str(part) for part in command(self.where)], stdin=subprocess.DEVNULL,
                                       stdout=out, stderr=subprocess.DEVNULL)
            self.processes.append(process)
            self.wait(process, ready)
        return self

    def wait(self, process, ready):
        if ready == "port":
            self.where.port = int(process.stdout.readline())
            return
        until = time.monotonic() + 10
        while not self.where.listens(ready):
            if process.poll() is not None or time.monotonic() > until:
                self.__exit__()
                raise RuntimeError(f"{process.args[0]} does not listen")
            time.sleep(0.01)

    def __exit__(self, *_):
        for process in reversed(self.processes):
            process.terminate()
            process.wait()

    def cpu_us(self):
        ticks = 0
        for process in self.processes:
            words = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(words[11]) + int(words[12])
        return ticks * 1_000_000 // os.sysconf("SC_CLK_TCK")

    def peak_kib(self):
        """The most that they had resident, without the pages of the disk that they may have mapped."""
        total = 0
        for process in self.processes:
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            fields = {line.split(":")[0]: line.split()[1] for line in status if line.endswith("kB")}
            total += int(fields["VmHWM"]) - int(fields["RssShmem"])
        return total


class Where:
    """Where a disk is served: a Unix socket, and perhaps a TCP port with TLS."""

    def __init__(self, place, disk, tls):
        self.disk, self.socket = disk, place / "socket"
        self.pki = place / "pki" if tls else None
        self.port = None

    def fresh(self):
        self.socket.unlink(missing_ok=True)
        # Free a moment ago.
        with sockets.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def listens(self, ready):
        if ready == "socket":
            return self.socket.exists()
        with sockets.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    @property
    def uri(self):
        if self.pki:
            # The client finds its certificates by HOME: fio lets a URI name no files.
            return f"nbds://localhost:{self.port}/disk"
        return f"nbd+unix:///disk?socket={self.socket}"


def certificates(pki):
    """An authority, a server and a client, with the names that all these servers look for, and where libnbd does."""
    pki.mkdir()
    (pki.parent / ".pki").mkdir()
    (pki.parent / ".pki/libnbd").symlink_to(pki)
    new = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    quiet = {"stderr": subprocess.DEVNULL}
    run(*new, "-keyout", pki / "ca-key.pem", "-out", pki / "ca-cert.pem", "-subj", "/CN=bench", **quiet)
    for name in ("server", "client"):
        run(*new, "-CA", pki / "ca-cert.pem", "-CAkey", pki / "ca-key.pem", "-keyout", pki / f"{name}-key.pem", "-out",
            pki / f"{name}-cert.pem", "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "-addext", "basicConstraints=CA:FALSE", **quiet)
    for key in pki.glob("*-key.pem"):
        key.chmod(0o644)


def our_commands(tls):
    if not cargo_release(OURS):
        return None
    unix = (lambda w: [RELEASE / OURS, "serve", w.disk, "--socket", w.socket, "--export-name", "disk"], "socket")
    if not tls:
        return [unix]
    note("building the NBD front of seriod as released (slow the first time)")
    built = subprocess.run(["cargo", "build", "--quiet", "--release", "-p", "serio-node", "--example", "nbd_front"],
                           cwd=ROOT, check=False)
    if built.returncode:
        skip("TLS", "the front does not build")
        return None
    return [unix, (lambda w: [RELEASE / "examples/nbd_front", w.pki, w.socket], "port")]


def nbdkit(w):
    where = ["--port", w.port, "--tls=require", f"--tls-certificates={w.pki}", "--tls-verify-peer"] if w.pki else [
        "--unix", w.socket]
    return ["nbdkit", "--foreground", "--threads=16", *where, "file", w.disk]


def qemu_nbd(w):
    where = [f"--socket={w.socket}"]
    if w.pki:
        where = [f"--port={w.port}", "--bind=127.0.0.1", "--tls-creds=t", "--object",
                 f"tls-creds-x509,id=t,endpoint=server,dir={w.pki},verify-peer=yes"]
    return ["qemu-nbd", "--format=raw", "--persistent", "--shared=16", "--cache=writeback", "--aio=io_uring",
            "--discard=unmap", "--export-name=disk", *where, w.disk]


def storage_daemon(w):
    where, tls = f"addr.type=unix,addr.path={w.socket}", []
    if w.pki:
        where = f"addr.type=inet,addr.host=127.0.0.1,addr.port={w.port},tls-creds=t"
        tls = ["--object", f"tls-creds-x509,id=t,endpoint=server,dir={w.pki},verify-peer=yes"]
    return ["qemu-storage-daemon", *tls, "--nbd-server", f"{where},max-connections=16", "--blockdev",
            f"driver=file,node-name=f,filename={w.disk},aio=io_uring,discard=unmap", "--export",
            "type=nbd,id=e,node-name=f,name=disk,writable=on"]


def subjects(tls):
    found = {}
    ours = our_commands(tls)
    if ours:
        found[OURS] = ours
    for name, command in (("nbdkit", nbdkit), ("qemu-nbd", qemu_nbd), ("qemu-storage-daemon", storage_daemon)):
        if shutil.which(name):
            found[name] = [(command, "tcp" if tls else "socket")]
        else:
            skip(name, "it is not installed")
    return found


def client(where):
    """What stands before a client's command: root's would look for its certificates in /etc."""
    if not where.pki:
        return []
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    return [*user, "env", f"HOME={where.pki.parent}"]


def fio(words, jobs, where, seconds):
    """(operations a second, bytes a second, operations, the client's µs of processor time for each) in all."""
    done = run(*client(where), "fio", "--output-format=json", "--name=cell", "--ioengine=nbd", f"--uri={where.uri}", "--iodepth=32",
               f"--numjobs={jobs}", "--group_reporting", "--time_based", f"--runtime={seconds}", "--ramp_time=0",
               f"--size={DISK_MIB}m", "--thread", *words, capture_output=True)
    job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    side = job["write" if job["write"]["total_ios"] else "read"]
    # Of the threads that do I/O, in per cent of their time: what fio needs to start is not in it.
    busy = (job["usr_cpu"] + job["sys_cpu"]) / 100 * jobs
    return side["iops"], side["bw_bytes"], side["total_ios"], busy * 1e6 / max(side["iops"], 1)


def in_turn(names, turn):
    return names[turn % len(names):] + names[:turn % len(names)]


def cells(found, where, prefix, rounds, seconds):
    rows = []
    for title, words, jobs in CELLS:
        case = prefix + title
        if ONLY not in case:
            continue
        rates, cpus, clients = ({name: [] for name in found} for _ in range(3))
        for turn in range(rounds):
            for name in in_turn(list(found), turn):
                with Server(found[name], where) as server:
                    before = server.cpu_us()
                    operations, speed, total, clients_us = fio(words, jobs, where, seconds)
                    cpus[name].append((server.cpu_us() - before) / max(total, 1))
                    clients[name].append(clients_us)
                    rates[name].append(speed / 1e6 if "256k" in words[1] else operations / 1e3)
        unit, of_one = ("MB/s", 256 * 1024 / 1e6) if "256k" in words[1] else ("k ops/s", 1e-3)
        threads = min(jobs, len(os.sched_getaffinity(0)))
        least = min(statistics.median(values) for values in clients.values())
        first = len(rows)
        rows += [row(case, name, round(statistics.median(values), 1), unit, True) for name, values in rates.items()]
        rows += [row(case, "floor a server that costs nothing", round(threads * 1e6 / least * of_one, 1), unit, True)]
        for who, used in (("server", cpus), ("client", clients)):
            rows += [row(f"{case}: {who}'s CPU", name, round(statistics.median(values), 2), "µs/op")
                     for name, values in used.items()]
        for line in rows[first:]:
            note(f"{line['case']}: {line['subject']}: {line['value']} {line['unit']}")
    return rows


def copies(found, where, prefix, rounds):
    case = f"{prefix}copy of a half-empty 2 GiB disk"
    if ONLY not in case:
        return []
    times, peaks = {name: [] for name in found}, {name: [] for name in found}
    for turn in range(rounds):
        for name in in_turn(list(found), turn):
            with Server(found[name], where) as server:
                start = time.monotonic()
                run(*client(where), "nbdcopy", "--connections=4", where.uri, "null:")
                times[name].append(time.monotonic() - start)
                peaks[name].append(server.peak_kib())
    return ([row(case, name, round(statistics.median(values), 3), "s") for name, values in times.items()]
            + [row(f"{prefix}resident at most, that copy", name, max(values), "KiB") for name, values in peaks.items()])


def disk_of(path, mib, filled):
    """Noise in the chunks of 1 MiB that `filled(i)` picks, holes elsewhere."""
    with open(path, "wb") as file:
        for i in range(mib):
            if filled(i):
                file.seek(i * MIB)
                file.write(os.urandom(MIB))
        file.truncate(mib * MIB)


def measure(quick):
    for tool in ("fio", "nbdcopy"):
        if not shutil.which(tool):
            skip("export", f"{tool} is not installed")
            return []
    if "nbd" not in run("fio", "--enghelp", capture_output=True).stdout:
        skip("export", "this fio has no nbd engine")
        return []
    place = Path("/dev/shm") / f"serio-bench-{os.getpid()}"
    place.mkdir(parents=True)
    WORK.mkdir(parents=True, exist_ok=True)
    rounds, rows = (1 if quick else 3), []
    try:
        full, half = place / "full", place / "half"
        disk_of(full, DISK_MIB, lambda _: True)
        disk_of(half, 2048, lambda i: i // 8 % 2)
        ways = [("", False)]
        if shutil.which("openssl"):
            certificates(place / "pki")
            ways.append(("TLS, ", True))
        else:
            skip("TLS", "openssl is not installed")
        for prefix, tls in ways:
            if tls and "TLS" not in ONLY and ONLY:
                continue
            found = subjects(tls)
            rows += cells(found, Where(place, full, tls), prefix, rounds, 1 if quick else 2)
            rows += copies(found, Where(place, half, tls), prefix, rounds)
        return rows
    finally:
        shutil.rmtree(place, ignore_errors=True)
