"""How fast a raw disk is served over a Unix socket, and at what cost: serio-volumed, nbdkit and qemu-nbd, in turn.

The disk lies on a tmpfs, so that the servers are measured and not a device. Clients: fio's nbd engine and nbdcopy.
"""

import json
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from _common import RELEASE, WORK, cargo_release, note, row, run, skip

MIB = 1 << 20
DISK_MIB = 512
# title, fio's words, connections, seconds; rates of the first kind are MB/s, of the others thousands a second.
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
    """One server of one disk, as long as the `with` lasts."""

    def __init__(self, command, socket):
        self.command, self.socket = command, socket
        self.process = None

    def __enter__(self):
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen([str(part) for part in self.command], stdin=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        until = time.monotonic() + 10
        while not self.socket.exists():
            if self.process.poll() is not None or time.monotonic() > until:
                self.__exit__()
                raise RuntimeError(f"{self.command[0]} does not listen")
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def cpu_us(self):
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) * 1_000_000 // os.sysconf("SC_CLK_TCK")

    def peak_kib(self):
        """The most that it had resident, without the pages of the disk that it may have mapped."""
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        fields = {line.split(":")[0]: line.split()[1] for line in status if line.endswith("kB")}
        return int(fields["VmHWM"]) - int(fields["RssShmem"])


def servers(disk, socket):
    found = {}
    if cargo_release("serio-volumed"):
        found["serio-volumed"] = [RELEASE / "serio-volumed", "serve", disk, "--socket", socket]
    peers = {
        "nbdkit": ["nbdkit", "--foreground", "--unix", socket, "file", disk],
        "qemu-nbd": ["qemu-nbd", "--format=raw", "--persistent", "--shared=16", "--cache=writeback", "--aio=io_uring",
                     "--discard=unmap", f"--socket={socket}", disk],
    }
    for name, command in peers.items():
        if shutil.which(name):
            found[name] = command
        else:
            skip(name, "it is not installed")
    return found


def fio(words, jobs, socket, seconds):
    """(operations a second, bytes a second) in all."""
    done = run("fio", "--output-format=json", "--name=cell", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={socket}",
               "--iodepth=32", f"--numjobs={jobs}", "--group_reporting", "--time_based", f"--runtime={seconds}",
               "--ramp_time=0", f"--size={DISK_MIB}m", "--thread", *words, capture_output=True)
    job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    side = job["write" if job["write"]["total_ios"] else "read"]
    return side["iops"], side["bw_bytes"], side["total_ios"]


def cells(subjects, socket, rounds, seconds):
    rows = []
    for case, words, jobs in CELLS:
        rates, cpus = {name: [] for name in subjects}, {name: [] for name in subjects}
        for turn in range(rounds):
            names = list(subjects)
            for name in names[turn % len(names):] + names[:turn % len(names)]:
                with Server(subjects[name], socket) as server:
                    before = server.cpu_us()
                    operations, speed, total = fio(words, jobs, socket, seconds)
                    cpus[name].append((server.cpu_us() - before) / max(total, 1))
                    rates[name].append(speed / 1e6 if "256k" in words[1] else operations / 1e3)
        unit = "MB/s" if "256k" in words[1] else "k ops/s"
        rows += [row(case, name, round(statistics.median(values), 1), unit, True) for name, values in rates.items()]
        rows += [row(f"{case}: server's CPU", name, round(statistics.median(values), 2), "µs/op")
                 for name, values in cpus.items()]
        for found in rows[-2 * len(subjects):]:
            note(f"{found['case']}: {found['subject']}: {found['value']} {found['unit']}")
    return rows


def copies(subjects, socket, rounds):
    times, peaks = {name: [] for name in subjects}, {name: [] for name in subjects}
    for _ in range(rounds):
        for name, command in subjects.items():
            with Server(command, socket) as server:
                start = time.monotonic()
                run("nbdcopy", "--connections=4", f"nbd+unix:///?socket={socket}", "null:")
                times[name].append(time.monotonic() - start)
                peaks[name].append(server.peak_kib())
    return ([row("copy of a half-empty 2 GiB disk", name, round(statistics.median(values), 3), "s")
             for name, values in times.items()]
            + [row("resident at most, that copy", name, max(values), "KiB") for name, values in peaks.items()])


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
    try:
        socket, disk = place / "socket", place / "disk"
        disk_of(disk, DISK_MIB, lambda _: True)
        rows = cells(servers(disk, socket), socket, 1 if quick else 3, 1 if quick else 2)
        disk_of(disk, 2048, lambda i: i // 8 % 2)
        return rows + copies(servers(disk, socket), socket, 1 if quick else 3)
    finally:
        shutil.rmtree(place, ignore_errors=True)
