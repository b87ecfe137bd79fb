"""What a guest's disk notices of 1,000 clients a second that connect to the export listener: p99 of its single requests.

One seriod on this machine, with the mini guest as its VM: it measures, from inside, requests of 4 KiB to its disk, one at a time, reads and
writes in turn, for one second. In turn: nobody connects; the clients connect to a listener that does nothing, which is what the clients
themselves take from the machine; they connect to seriod's NBD listener and go after its greeting. The answer is the third beside the second
(and the first, where there is a processor to spare), round by round: the median of the ratios of neighbours in time, so that what else the
machine does at that minute is in both. One ratio means little, since p99 lives from the machine's other work: its spread is noted.
"""

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from _common import ROOT, TARGET, c_program, cargo_release, note, row, skip

RATE = 1000
PROFILE = os.environ.get("SERIO_PROFILE", "release")
BIN = TARGET / "x86_64-unknown-linux-gnu" / ("debug" if PROFILE == "dev" else PROFILE)
CASE = f"guest's disk, 4 KiB, depth 1, while {RATE} clients a second connect"
QUIET, NULL, OURS = "floor nobody connects", "floor a listener that does nothing", "seriod"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Node:
    """A seriod in a folder of its own, as long as the `with` lasts."""

    def __enter__(self):
        self.dir = Path(tempfile.mkdtemp(prefix="sb", dir="/tmp"))
        self.nbd, grpc = free_port(), free_port()
        self.serio("pki", "init", self.dir / "pki", "--name", "bench CA")
        self.serio("pki", "issue", self.dir / "pki", "node", "--role", "node", "--host", "127.0.0.1")
        (self.dir / "seriod.toml").write_text(f"""node_name = "bench"
state_dir = "{self.dir}/state"
run_dir = "{self.dir}/run"
vmm_path = "{BIN}/serio-vmm"
volumed_path = "{BIN}/serio-volumed"
[grpc]
listen = "127.0.0.1:{grpc}"
tls_dir = "{self.dir}/pki/node"
[nbd]
listen = "127.0.0.1:{self.nbd}"
""")
        self.log = open(self.dir / "log", "wb")
        self.process = subprocess.Popen([BIN / "seriod", "--config", self.dir / "seriod.toml"], stdin=subprocess.DEVNULL,
                                        stdout=self.log, stderr=self.log)
        until = time.monotonic() + 30
        while self.serio("node", "show", check=False).returncode:
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"seriod does not answer: {(self.dir / 'log').read_text()[-1000:]}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_):
        self.serio("vm", "stop", "bench/guest", "--force", check=False)
        self.process.terminate()
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.dir)

    def serio(self, *words, check=True):
        done = subprocess.run([BIN / "serio", "--host", f"unix:{self.dir}/run/seriod.sock", *map(str, words)], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise RuntimeError(f"serio {words}: {done.stderr.strip()}")
        return done

    def furnish(self, mini):
        disk = self.dir / "disk.raw"
        with open(disk, "wb") as file:
            file.truncate(64 << 20)
        self.serio("image", "import", "mini", "--disk", disk, "--format", "raw", "--kernel", mini, "--cmdline", "mini.bench=latency")
        self.serio("vdc", "create", "bench", "--vcpus", 1, "--memory", "64MiB", "--storage", "1GiB")
        self.serio("vm", "create", "bench/guest", "--image", "mini", "--memory", "32MiB", "--restart", "never")

    def state(self):
        return json.loads(self.serio("vm", "show", "bench/guest", "-o", "json").stdout)["status"].get("state", "")

    def measure(self):
        """One life of the guest: its figures by name, nanoseconds."""
        self.serio("vm", "start", "bench/guest")
        until = time.monotonic() + 60
        while self.state() != "VM_STATE_STOPPED":
            if time.monotonic() > until:
                raise RuntimeError("the guest does not end")
            time.sleep(0.2)
        log = self.serio("vm", "log", "bench/guest", "--tail", 12).stdout
        words = [line.split() for line in log.splitlines() if line.startswith("bench latency-")]
        return {found[1].removeprefix("latency-"): int(found[2]) for found in words[-5:]}


class Crowd:
    """The clients, and where there must be one, the listener that does nothing."""

    def __init__(self, program, node, subject):
        self.program, self.node, self.subject = program, node, subject
        self.processes = []

    def __enter__(self):
        if self.subject == QUIET:
            return self
        port = self.node.nbd
        if self.subject == NULL:
            port = free_port()
            self.processes.append(subprocess.Popen([self.program, "null", str(port)]))
            time.sleep(0.1)
        self.processes.append(subprocess.Popen([self.program, "storm", str(port), str(RATE)], stdout=subprocess.PIPE, text=True))
        return self

    def __exit__(self, *_):
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            if process.stdout:
                self.rate, self.whole, self.failed, self.late = map(int, process.communicate()[0].split())
                note(f"{self.subject}: {self.rate} clients a second were greeted, {self.failed} were not, {self.late} did not find room")
            else:
                process.kill()
                process.wait()


def resident_kib(pid):
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def measure(quick):
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        skip(CASE, "there is no usable /dev/kvm")
        return []
    if PROFILE == "release" and not cargo_release("serio-node", "serio-vmm", "serio-volumed", "serio-cli"):
        return []
    mini = subprocess.run([ROOT / "images/mini/build"], capture_output=True, text=True, check=True).stdout.strip()
    program = c_program("connects")
    figures = {subject: [] for subject in (QUIET, NULL, OURS)}
    with Node() as node:
        node.furnish(mini)
        node.measure()
        before = resident_kib(node.process.pid)
        order = list(figures)
        for turn in range(8 if quick else 40):
            for subject in order[turn % 3:] + order[:turn % 3]:
                with Crowd(program, node, subject):
                    found = node.measure()
                figures[subject].append(found)
                note(f"round {turn}, {subject}: p50 {found['p50'] / 1e3:.1f} µs, p99 {found['p99'] / 1e3:.1f} µs")
        after = resident_kib(node.process.pid)
    rows = []
    for share in ("p50", "p99"):
        rows += [row(f"{CASE}: {share}", subject, round(statistics.median(f[share] for f in found) / 1e3, 1), "µs")
                 for subject, found in figures.items()]
        for other, title in ((NULL, "the idle listener"), (QUIET, "nobody")):
            ratios = sorted(ours[share] / theirs[share] for ours, theirs in zip(figures[OURS], figures[other]))
            note(f"{share}, seriod beside {title}, round by round: {' '.join(f'{ratio:.2f}' for ratio in ratios)}")
            rows.append(row(f"{CASE}: {share} beside {title}'s", OURS, round(statistics.median(ratios), 3), "ratio"))
    rows.append(row("seriod's resident memory, after these clients and before", OURS, round(after / before, 3), "ratio"))
    return rows
