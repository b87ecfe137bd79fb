"""The machine's devices and its life, with the mini guest on the machine's own KVM beside QEMU microvm (Firecracker and Cloud
Hypervisor too where FIRECRACKER and CLOUD_HYPERVISOR name their binaries): disks, network cards, vsock, starts, memory,
snapshot and restore.

The guest polls, at CPL3, where it is native also under a KVM without hardware virtualization: what is measured is the device and the way
to it, not an operating system. Disks lie in the page cache, cards on a tap in a network namespace of this run. All subjects take
turns.
"""

import concurrent.futures
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from _common import ROOT, TARGET, WORK, c_program, cargo_release, in_turn, note, resident_kib, row, run, skip

ONLY = ""
PROFILE = os.environ.get("SERIO_PROFILE", "release")
BIN = TARGET / "x86_64-unknown-linux-gnu" / ("debug" if PROFILE == "dev" else PROFILE)
SERIO = BIN / "serio-vmm"
MAC = "02:5e:10:00:00:07"
NAMESPACE = f"sb{os.getpid()}"
TAP = "tap0"
# Longer than any measurement; only a hang meets it.
DEADLINE = 120
# Its PCI configuration space stands in no table that the mini guest reads.
MICROVM_ECAM = f"mini.ecam={0xe0000000}"
MIB = 1 << 20
DISK_MIB = 256
GUEST_MIB = 256


class Subject:
    """A VMM, and how it is started with devices."""

    def __init__(self, name, program):
        self.name, self.program = name, program

    def command(self, kernel, cmdline, memory=GUEST_MIB, disk=None, tap=None, vsock=None):
        """Its command line; None: it has no such device here."""
        build = {"serio-vmm": serio, "qemu microvm": qemu, "cloud-hypervisor": cloud_hypervisor, "firecracker": firecracker}
        words = build[self.name](self.program, kernel, cmdline, memory, disk, tap, vsock)
        return words and [str(word) for word in words]


def serio(program, kernel, cmdline, memory, disk, tap, vsock):
    words = [program, "run", "--kernel", kernel, "--cmdline", cmdline, "--memory", f"{memory}MiB", "--cpus", "1"]
    words += ["--disk", disk] if disk else []
    words += ["--net", f"{tap},mac={MAC}"] if tap else []
    return words + (["--vsock", f"3,{vsock}"] if vsock else [])


def qemu(program, kernel, cmdline, memory, disk, tap, vsock):
    if vsock:
        return None  # vhost-vsock only, which has no Unix sockets.
    words = [program, "-M", "microvm,acpi=on,pcie=on,rtc=off,pit=off,pic=off", "-accel", "kvm", "-m", memory, "-nodefaults",
             "-no-user-config", "-display", "none", "-serial", "stdio", "-kernel", kernel, "-append", f"{cmdline} {MICROVM_ECAM}"]
    if disk:
        words += ["-object", "iothread,id=io", "-drive", f"file={disk},if=none,id=disk,format=raw,cache=writeback,aio=io_uring",
                  "-device", "virtio-blk-pci,drive=disk,disable-legacy=on,iothread=io"]
    if tap:
        words += ["-netdev", f"tap,id=net,ifname={tap},script=no,downscript=no",
                  "-device", f"virtio-net-pci,netdev=net,mac={MAC},disable-legacy=on,romfile="]
    return words


def cloud_hypervisor(program, kernel, cmdline, memory, disk, tap, vsock):
    words = [program, "--kernel", kernel, "--cmdline", cmdline, "--memory", f"size={memory}M", "--cpus", "boot=1", "--serial", "tty",
             "--console", "off"]
    words += ["--disk", f"path={disk}"] if disk else []
    words += ["--net", f"tap={tap},mac={MAC}"] if tap else []
    return words + (["--vsock", f"cid=3,socket={vsock}"] if vsock else [])


def firecracker(program, kernel, cmdline, memory, disk, tap, vsock):
    config = {"boot-source": {"kernel_image_path": str(kernel), "boot_args": cmdline}, "drives": [],
              "machine-config": {"vcpu_count": 1, "mem_size_mib": memory}}
    if disk:
        config["drives"] = [{"drive_id": "disk", "path_on_host": str(disk), "is_root_device": False, "is_read_only": False,
                             "cache_type": "Writeback", "io_engine": "Async"}]
    if tap:
        config["network-interfaces"] = [{"iface_id": "net", "guest_mac": MAC, "host_dev_name": tap}]
    if vsock:
        config["vsock"] = {"guest_cid": 3, "uds_path": str(vsock)}
    path = WORK / "firecracker-machine.json"
    path.write_text(json.dumps(config))
    return [program, "--no-api", "--enable-pci", "--config-file", path]


def subjects():
    found = [Subject("serio-vmm", SERIO)]
    program = shutil.which("qemu-system-x86_64")
    if program:
        found.append(Subject("qemu microvm", program))
    else:
        skip("qemu microvm", "qemu-system-x86_64 is not installed")
    for name in ("firecracker", "cloud-hypervisor"):
        program = os.environ.get(name.upper().replace("-", "_"))
        if program:
            found.append(Subject(name, program))
    return found


def life(command, heard=None):
    """Runs a guest to its end; what it measured, by name. `heard` gets each line as it comes."""
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             errors="replace")
    watchdog = threading.Timer(DEADLINE, child.kill)
    watchdog.start()
    found, lines = {}, []
    try:
        for line in child.stdout:
            lines.append(line.strip())
            if heard:
                heard(lines[-1])
            words = re.fullmatch(r"bench (\S+) (\d+) \S+", lines[-1])
            if words:
                found[words[1]] = int(words[2])
            if lines[-1] == "mini: power off":
                break
    finally:
        watchdog.cancel()
        child.kill()
        child.wait()
    if not found:
        note(f"{command[0]} measured nothing: {' | '.join(lines[-4:])[:400]}")
    return found


def rows_of(cells, samples):
    """Medians by case: `samples` is {subject: [{name: value}]}."""
    rows = []
    for name, (title, unit, scale) in cells.items():
        for subject, lives in samples.items():
            values = sorted(found[name] for found in lives if name in found)
            if values:
                rows.append(row(title, subject, float(f"{values[len(values) // 2] / scale:.4g}"), unit, True))
    return rows


def each_in_turn(all_of, rounds, sample):
    samples = {subject.name: [] for subject in all_of}
    order = list(all_of)
    for _ in range(rounds):
        for subject in order:
            samples[subject.name].append(sample(subject))
        order = order[1:] + order[:1]
    return samples


def disks(all_of, kernel, ms, rounds):
    cells = {}
    for depth in (1, 32):
        for kind in ("read", "write"):
            cells[f"seq-{kind}-256k-{depth}"] = (f"disk, sequential {kind} 256 KiB, depth {depth}", "MB/s", 1e6 / (256 << 10))
            cells[f"rand-{kind}-4k-{depth}"] = (f"disk, random {kind} 4 KiB, depth {depth}", "kIOPS", 1e3)
    disk = WORK / "machine.raw"

    def sample(subject):
        disk.unlink(missing_ok=True)
        with open(disk, "wb") as file:
            file.truncate(DISK_MIB * MIB)
        return life(subject.command(kernel, f"mini.bench=disk mini.bench_ms={ms} mini.wait_ms=60000", disk=disk))

    try:
        return rows_of(cells, each_in_turn(all_of, rounds, sample))
    finally:
        disk.unlink(missing_ok=True)


def namespace():
    """A network of this run with a tap; None, and why, where that cannot be."""
    inside = ["ip", "netns", "exec", NAMESPACE]
    for words in (["ip", "netns", "add", NAMESPACE], [*inside, "ip", "tuntap", "add", TAP, "mode", "tap", "vnet_hdr"],
                  [*inside, "sysctl", "-qw", f"net.ipv6.conf.{TAP}.disable_ipv6=1"],
                  [*inside, "ip", "link", "set", TAP, "up"], [*inside, "ip", "address", "add", "10.99.0.1/24", "dev", TAP]):
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode and "sysctl" not in words:
            skip("network cards", f"{' '.join(words)}: {done.stderr.strip()}")
            return None
    return inside


def cards(all_of, kernel, ms, rounds):
    cells = {"send-60": ("network, packets of 60 bytes from the guest", "kpackets/s", 1e3),
             "send-1514": ("network, packets of 1514 bytes from the guest", "kpackets/s", 1e3),
             "send-stream": ("network, stream from the guest", "MB/s", 1e6 / 65000),
             "receive-60": ("network, packets of 60 bytes to the guest", "kpackets/s", 1e3),
             "receive-1514": ("network, packets of 1514 bytes to the guest", "kpackets/s", 1e3)}
    packets = c_program("packets")
    try:
        inside = namespace()
        if not inside:
            return []

        def sample(subject):
            sender = []

            def heard(line):
                if line.startswith("bench: receive-"):
                    sender.append(subprocess.Popen([*inside, packets, TAP, line.rsplit("-", 1)[1]], stdin=subprocess.DEVNULL))
                elif sender:
                    ended = sender.pop()
                    ended.kill()
                    ended.wait()
            try:
                return life([*inside, *subject.command(kernel, f"mini.bench=net mini.bench_ms={ms}", tap=TAP)], heard)
            finally:
                heard("")

        return rows_of(cells, each_in_turn(all_of, rounds, sample))
    finally:
        subprocess.run(["ip", "netns", "del", NAMESPACE], capture_output=True, check=False)


class Sockets:
    """The host's side of vsock: port 5000 takes everything, 5001 sends all the time."""

    def __init__(self, path):
        self.listeners = []
        for port, serve in ((5000, self.take), (5001, self.give)):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"{path}_{port}")
            listener.listen()
            self.listeners.append(listener)
            threading.Thread(target=self.accept, args=(listener, serve), daemon=True).start()

    @staticmethod
    def accept(listener, serve):
        try:
            peer, _ = listener.accept()
            with peer:
                serve(peer)
        except OSError:
            pass

    @staticmethod
    def take(peer):
        room = bytearray(MIB)
        while peer.recv_into(room):
            pass

    @staticmethod
    def give(peer):
        data = bytes(MIB)
        while True:
            peer.sendall(data)


def vsock(all_of, kernel, ms, rounds):
    cells = {"vsock-send": ("vsock, stream from the guest", "MB/s", 1e6), "vsock-receive": ("vsock, stream to the guest", "MB/s", 1e6)}
    able = [subject for subject in all_of if subject.command(kernel, "", vsock="x")]

    def sample(subject):
        with tempfile.TemporaryDirectory(prefix="sb", dir="/tmp") as folder:
            path = Path(folder) / "vsock"
            sockets = Sockets(path)
            try:
                return life(subject.command(kernel, f"mini.bench=vsock mini.bench_ms={ms}", vsock=path))
            finally:
                for listener in sockets.listeners:
                    listener.close()

    return rows_of(cells, each_in_turn(able, rounds, sample))


def starts(all_of, kernel, rounds):
    """VMs a second: so many one after the other on each processor, from exec to the first instruction of the guest."""
    first_output, count, at_once = c_program("first_output"), 24, os.cpu_count() or 1

    def sample(command):
        def one(_):
            return subprocess.run([first_output, "", *command], stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            failed = sum(map(bool, pool.map(one, range(count))))
        return None if failed else count / (time.monotonic() - began)

    commands = {subject.name: subject.command(kernel, "mini.bench=first", 128) for subject in all_of}
    found = in_turn(commands, rounds, sample)
    return [row(f"starts, {at_once} at a time", name, round(value, 1), "VMs/s", True) for name, value in found.items()]


def memory(all_of, kernel):
    """What a VM of 1 GiB takes beside its guest's memory, with a disk."""
    first_output, rows = c_program("first_output"), []
    disk = WORK / "machine.raw"
    with open(disk, "wb") as file:
        file.truncate(DISK_MIB * MIB)
    for subject in all_of:
        command = subject.command(kernel, "mini.test=writer", 1024, disk=disk)
        keeper = subprocess.Popen([first_output, "writer: 20", "-k", *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                  text=True)
        try:
            pid = keeper.stdout.readline().strip()
            if pid:
                rows.append(row("memory over the guest's 1 GiB, with a disk at work", subject.name, resident_kib(pid, 1 << 30), "KiB"))
                os.kill(int(pid), 9)
        finally:
            keeper.kill()
            keeper.wait()
    disk.unlink()
    return rows


class Node:
    """A seriod in a folder of its own, as long as the `with` lasts."""

    def __enter__(self):
        self.dir = Path(tempfile.mkdtemp(prefix="sm", dir=WORK))
        self.run = Path(tempfile.mkdtemp(prefix="sm", dir="/tmp"))
        (self.dir / "seriod.toml").write_text(f"""node_name = "bench"
state_dir = "{self.dir}/state"
run_dir = "{self.run}/run"
vmm_path = "{SERIO}"
volumed_path = "{BIN}/serio-volumed"
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
        shutil.rmtree(self.run)

    def serio(self, *words, check=True):
        done = subprocess.run([BIN / "serio", "--host", f"unix:{self.run}/run/seriod.sock", *map(str, words)],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise RuntimeError(f"serio {words}: {done.stderr.strip()}")
        return done

    def timed(self, *words):
        began = time.monotonic()
        self.serio(*words)
        return (time.monotonic() - began) * 1000


def snapshots(kernel, rounds):
    """A VM of 1 GiB that has used all its memory: saved, and restored; over the API, so with all that belongs to it."""
    try:
        with Node() as node:
            disk = node.dir / "disk.raw"
            with open(disk, "wb") as file:
                file.truncate(MIB)
            node.serio("image", "import", "mini", "--disk", disk, "--format", "raw", "--kernel", kernel,
                       "--cmdline", "mini.test=memory mini.pace_ms=0")
            node.serio("vdc", "create", "bench", "--vcpus", 2, "--memory", "2GiB", "--storage", "8GiB")
            node.serio("vm", "create", "bench/guest", "--image", "mini", "--memory", "1GiB", "--restart", "never")
            node.serio("vm", "start", "bench/guest")
            until = time.monotonic() + DEADLINE
            while "memory: all" not in node.serio("vm", "log", "bench/guest", "--tail", 3).stdout:
                if time.monotonic() > until:
                    raise RuntimeError("the guest does not take its memory")
                time.sleep(0.1)
            saves, restores, paused = [], [], []
            for number in range(rounds):
                began = time.monotonic()
                said = node.serio("vm", "snapshot", "bench/guest", "--name", f"p{number}").stdout
                saves.append((time.monotonic() - began) * 1000)
                paused += [int(ms) for ms in re.findall(r"still for (\d+) ms", said)]
                node.serio("vm", "stop", "bench/guest", "--force")
                restores.append(node.timed("vm", "restore", "bench/guest", f"p{number}"))
            middle = lambda values: round(sorted(values)[len(values) // 2], 1)
            rows = [row("snapshot of a VM of 1 GiB, all of it used", "seriod", middle(saves), "ms"),
                    row("restore of it, until its guest runs", "seriod", middle(restores), "ms")]
            if paused:
                rows.append(row("how long it stands still for the snapshot", "seriod", middle(paused), "ms"))
            return rows
    except (RuntimeError, OSError) as error:
        skip("snapshot and restore", error)
        return []


def measure(quick):
    WORK.mkdir(parents=True, exist_ok=True)
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        skip("machine", "there is no usable /dev/kvm")
        return []
    if PROFILE == "release" and not cargo_release("serio-vmm", "seriod", "serio", "serio-volumed"):
        return []
    kernel = run(ROOT / "images/mini/build", capture_output=True).stdout.strip()
    all_of, ms, rounds = subjects(), 300 if quick else 1000, 1 if quick else 5
    parts = {
        "disk": lambda: disks(all_of, kernel, ms, rounds),
        "network": lambda: cards(all_of, kernel, ms, rounds),
        "vsock": lambda: vsock(all_of, kernel, ms, rounds),
        "starts": lambda: starts(all_of, kernel, rounds),
        "memory": lambda: memory(all_of, kernel),
        "snapshot": lambda: snapshots(kernel, rounds),
    }
    rows = []
    for name, part in parts.items():
        if ONLY in name:
            found = part()
            for one in found:
                note(f"{one['case']}: {one['subject']}: {one['value']} {one['unit']}")
            rows += found
    return rows
