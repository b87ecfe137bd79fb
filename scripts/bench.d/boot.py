"""How fast a machine starts and how little it takes: exec to the guest's first instruction, memory, sizes, userspace."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import _testbed
from _common import (ROOT, RELEASE, TARGET, WORK, c_program, cargo_release, in_turn, note, resident_kib, row, run, skip,
                     stripped_bytes)

MIB = 128


def peers(kernel, cmdline):
    """Peers that are here, as (name, binary, command)."""
    found = []
    qemu = shutil.which("qemu-system-x86_64")
    if qemu:
        found.append(("qemu microvm", qemu, [
            qemu, "-M", "microvm,acpi=on,pcie=on,rtc=off,pit=off,pic=off", "-accel", "kvm", "-m", str(MIB), "-nodefaults",
            "-no-user-config", "-display", "none", "-serial", "stdio", "-kernel", kernel, "-append", cmdline]))
    else:
        skip("qemu microvm", "qemu-system-x86_64 is not installed")
    firecracker = os.environ.get("FIRECRACKER")
    if firecracker:
        config = WORK / "firecracker.json"
        config.write_text(json.dumps({
            "boot-source": {"kernel_image_path": str(kernel), "boot_args": cmdline}, "drives": [],
            "machine-config": {"vcpu_count": 1, "mem_size_mib": MIB}}))
        found.append(("firecracker", firecracker, [firecracker, "--no-api", "--config-file", config]))
    cloud_hypervisor = os.environ.get("CLOUD_HYPERVISOR")
    if cloud_hypervisor:
        found.append(("cloud-hypervisor", cloud_hypervisor, [
            cloud_hypervisor, "--kernel", kernel, "--cmdline", cmdline, "--memory", f"size={MIB}M", "--cpus", "boot=1",
            "--serial", "tty", "--console", "off"]))
    return found


def first_instruction(subjects, first_output, rounds):
    def sample(command):
        done = subprocess.run([first_output, "", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            note(done.stderr.strip()[:400])
            return None
        return int(done.stdout) / 1e6

    medians = in_turn(subjects, rounds, sample)
    return [row("first instruction", name, round(value, 3), "ms") for name, value in medians.items()]


def resident(subjects, first_output):
    rows = []
    for name, command in subjects.items():
        keeper = subprocess.Popen([first_output, "", "-k", *command], stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, text=True)
        try:
            pid = keeper.stdout.readline().strip()
            if not pid:
                continue
            # Nothing tells from outside that a guest has halted: half a second is a thousand times what it needs.
            time.sleep(0.5)
            rows.append(row("resident over guest memory", name, resident_kib(pid, MIB << 20), "KiB"))
            os.kill(int(pid), 9)
        finally:
            keeper.kill()
            keeper.wait()
    return rows


def idle_seriod():
    if not cargo_release("serio-node"):
        return []
    folder = WORK / "seriod"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = folder / "seriod.toml"
    config.write_text(f'node_name = "bench"\nsite = "bench"\nfailure_domain = "bench"\nstate_dir = "{folder}/state"\n'
                      f'run_dir = "{folder}/run"\nvmm_path = "{RELEASE}/serio-vmm"\nvolumed_path = "{RELEASE}/serio-volumed"\n')
    with open(folder / "log", "w", encoding="utf-8") as log:
        daemon = subprocess.Popen([RELEASE / "seriod", "--config", config], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        socket, until = folder / "run/seriod.sock", time.monotonic() + 15
        while not socket.exists() and daemon.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        if not socket.exists():
            skip("idle seriod", f"it did not start: {(folder / 'log').read_text()[-300:].strip()}")
            return []
        time.sleep(3)
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
        return [row("idle daemon, resident", "seriod", kib, "KiB")]
    finally:
        daemon.kill()
        daemon.wait()


def measure(quick):
    WORK.mkdir(parents=True, exist_ok=True)
    rows = []
    first_output, floor = c_program("first_output"), c_program("floor")
    kernel = run(ROOT / "images/mini/build", capture_output=True).stdout.strip()
    cmdline = "mini.bench=first"
    serio = RELEASE / "serio-vmm"
    subjects, binaries = {}, {}
    if cargo_release("serio-vmm") and serio.exists():
        subjects["serio-vmm"] = [serio, "run", "--kernel", kernel, "--cmdline", cmdline, "--memory", f"{MIB}MiB", "--cpus", "1"]
        binaries["serio-vmm"] = serio
    for name, binary, command in peers(kernel, cmdline):
        subjects[name], binaries[name] = command, binary
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        with_floor = {"floor": [floor], **subjects}
        rows += first_instruction(with_floor, first_output, 5 if quick else 21)
        rows += resident(with_floor, first_output)
    else:
        skip("first instruction, resident", "no usable /dev/kvm")
    rows += [row("binary, stripped", name, stripped_bytes(binary) // 1024, "KiB") for name, binary in binaries.items()]
    for found in rows:
        note(f"{found['case']}: {found['subject']}: {found['value']} {found['unit']}")
    # Without a fresh build an older binary would be measured in its name.
    if not quick and "serio-vmm" in subjects:
        rows += _testbed.userspace(serio, first_output, TARGET / "images/tiny")
    return rows + idle_seriod()
