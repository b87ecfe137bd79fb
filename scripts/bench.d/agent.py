"""seriod itself, without guests' work: how fast it answers, what it takes when nothing happens, how fast it is back.

One seriod in a folder of its own on this disk, with stand-ins for VMMs (agent/node/examples/fake_agent.rs), so that the machine is not the
limit: GetVm, ListVms and create + delete of a VM without guest, one call after the other and 32 at a time, with so many VMs there;
processor time, wakeups and memory with 50 running VMs; from its start to its first answer with 500 VMs to take over. No peers: what a
number must stay below stands in the table's cases, and whether it did in the notes.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from _common import ROOT, TARGET, note, row, run, skip

PROFILE = os.environ.get("SERIO_PROFILE", "release")
BIN = TARGET / "x86_64-unknown-linux-gnu" / ("debug" if PROFILE == "dev" else PROFILE)
# What the numbers must stay below.
AIMS = {"idle processor time, 50 VMs": 0.2, "memory, 50 VMs": 64}


def build():
    if PROFILE != "release":
        return True
    note("building seriod and the examples as released (slow the first time)")
    examples = ("--example", "agent_load", "--example", "fake_agent")
    try:
        run("cargo", "build", "--quiet", "--release", "--workspace", "--bins", *examples, cwd=ROOT)
    except subprocess.CalledProcessError:
        skip("agent", "it does not build")
        return False
    return True


class Agent:
    """A seriod in a folder of its own; its VMs end with it."""

    def __init__(self):
        self.dir = Path(tempfile.mkdtemp(prefix="sa", dir="/tmp"))
        fake = self.dir / "fake_agent"
        shutil.copy(BIN / "examples/fake_agent", fake)
        (self.dir / "seriod.toml").write_text(f"""node_name = "bench"
state_dir = "{self.dir}/state"
run_dir = "{self.dir}/run"
vmm_path = "{fake}"
volumed_path = "{fake}"
[capacity]
overcommit_vcpu = 10000.0
""")
        self.log = open(self.dir / "log", "wb")
        self.process = None
        self.start()

    def start(self):
        """Seconds from its start until it serves."""
        began = time.monotonic()
        read, write = os.pipe()
        self.process = subprocess.Popen([BIN / "seriod", "--config", self.dir / "seriod.toml"], stdin=subprocess.DEVNULL,
                                        stderr=write, stdout=self.log)
        os.close(write)
        with os.fdopen(read, "rb") as lines:
            for line in lines:
                if b"serving gRPC" in line:
                    took = time.monotonic() - began
                    self.drain = subprocess.Popen(["cat"], stdin=lines, stdout=self.log)
                    return took
        raise RuntimeError("seriod does not serve")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.drain.wait()

    def load(self, *words):
        """What agent_load prints, by name."""
        # What it says of a failure goes to whoever runs this.
        done = run(BIN / "examples/agent_load", self.dir / "run/seriod.sock", *words, stdout=subprocess.PIPE)
        return {name: float(value) for name, value in (line.split() for line in done.stdout.splitlines())}

    def ticks(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    def wakeups(self):
        """How often its threads went to sleep by themselves, by the thread's name."""
        found = {}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            text = (task / "status").read_text()
            name = text.split("\n", 1)[0].split("\t")[1]
            found[name] = found.get(name, 0) + int(text.split("\nvoluntary_ctxt_switches:\t")[1].split("\n")[0])
        return found

    def memory_mib(self):
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0]) / 1024

    def end(self):
        self.kill()
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and (entry / "exe").readlink().is_relative_to(self.dir):
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                pass
        self.log.close()
        shutil.rmtree(self.dir, ignore_errors=True)


def case(rows, name, value, unit, higher=False):
    aim = AIMS.get(name)
    if aim is not None:
        note(f"{name}: {value:g} {unit}, aim below {aim}: {'met' if value < aim else 'MISSED'}")
        name = f"{name} (below {aim})"
    rows.append({**row(name, "seriod", round(value, 3), unit, higher), "peer": False})


def answers(agent, rows, count, seconds):
    for words, what in (("get", "GetVm"), ("list", f"ListVms of {count}"), ("create-delete", f"create + delete of a VM, {count} there")):
        found = agent.load(words, seconds)
        case(rows, f"{what}, p50", found["p50"] / 1000, "ms")
        case(rows, f"{what}, p99", found["p99"] / 1000, "ms")
        case(rows, f"{what}, 32 at a time", found["rate"], "a second", True)
    case(rows, f"memory after that, {count} VMs", agent.memory_mib(), "MiB")


def idle(agent, rows, seconds):
    time.sleep(5)
    ticks, before, began = agent.ticks(), agent.wakeups(), time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    share = (agent.ticks() - ticks) / os.sysconf("SC_CLK_TCK") / took * 100
    after = agent.wakeups()
    # Threads that have ended meanwhile took their numbers with them.
    woken = {name: max(0, number - before.get(name, 0)) / took for name, number in after.items()}
    note("wakeups a second: " + ", ".join(f"{name} {rate:.1f}" for name, rate in sorted(woken.items()) if rate > 0.05))
    case(rows, "idle processor time, 50 VMs", share, "% of a core")
    case(rows, "idle wakeups, 50 VMs", sum(woken.values()), "a second")
    case(rows, "memory, 50 VMs", agent.memory_mib(), "MiB")


def measure(quick):
    if not build():
        return []
    if not os.access("/dev/kvm", os.W_OK):
        skip("agent", "/dev/kvm cannot be opened")
        return []
    count, adopted, seconds, still = (100, 50, 1, 10) if quick else (1000, 500, 5, 60)
    rows = []
    agent = Agent()
    try:
        case(rows, "start, nothing to take over", 1000 * restarted(agent), "ms")
        agent.load("furnish")
        agent.load("create", 0, 50, "start")
        idle(agent, rows, still)
        agent.load("create", 50, adopted - 50, "start")
        case(rows, f"start, {adopted} VMs to take over", 1000 * restarted(agent), "ms")
        case(rows, f"memory, {adopted} running VMs", agent.memory_mib(), "MiB")
        agent.load("create", adopted, count - adopted)
        answers(agent, rows, count, seconds)
    finally:
        agent.end()
    return rows


def restarted(agent):
    agent.kill()
    return agent.start()
