"""Boots of a stock kernel to userspace, inside one testbed host: serio-vmm and QEMU microvm, in turn."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from _common import ROOT, WORK, in_turn, note, row, skip

TESTBED = ROOT / "scripts/testbed"
NAME = "bench"
ROUNDS = 3
# A folder of its own, on the host's disk: its memory is for guests.
PLACE = "/var/lib/serio/bench"


def testbed(*arguments, **options):
    environment = {**os.environ, "SERIO_TESTBED": str(WORK / "testbed")}
    return subprocess.run([str(TESTBED), *map(str, arguments)], env=environment, check=False, text=True, **options)


def qemu_with_libraries(archive):
    """QEMU as one archive: the program, every library it names, the loader, and the firmware that microvm needs."""
    qemu = shutil.which("qemu-system-x86_64")
    if not qemu:
        return False
    listing = subprocess.run(["ldd", qemu], capture_output=True, text=True, check=True).stdout
    libraries = {word for line in listing.splitlines() for word in line.split() if word.startswith("/")}
    with tarfile.open(archive, "w", dereference=True) as tar:
        tar.add(qemu, "qemu/qemu")
        for library in libraries:
            tar.add(library, f"qemu/lib/{Path(library).name}")
        for name in ("bios-microvm.bin", "linuxboot_dma.bin", "pvh.bin", "linuxboot.bin", "qboot.rom"):
            for folder in ("/usr/share/qemu", "/usr/share/seabios", "/usr/share/kvm"):
                if Path(folder, name).exists():
                    tar.add(Path(folder, name), f"qemu/share/{name}")
                    break
    return True


def commands(place):
    kernel, initrd = f"{place}/vmlinux", f"{place}/initrd.img"
    cmdline = "console=ttyS0 quiet"
    return {
        "serio-vmm": [f"{place}/serio-vmm", "run", "--kernel", kernel, "--initrd", initrd, "--cmdline", cmdline,
                      "--memory", "256MiB", "--cpus", "1"],
        "qemu microvm": [
            f"{place}/qemu/lib/ld-linux-x86-64.so.2", "--library-path", f"{place}/qemu/lib", f"{place}/qemu/qemu",
            "-L", f"{place}/qemu/share", "-M", "microvm,acpi=on,pcie=on,rtc=off", "-accel", "kvm", "-cpu", "host", "-m", "256",
            "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-kernel", kernel, "-initrd", initrd,
            "-append", cmdline],
    }


def prepare(serio, first_output, tiny):
    bundle = WORK / "bench.tar"
    if not qemu_with_libraries(bundle):
        return "qemu-system-x86_64 is not installed"
    with tarfile.open(bundle, "a", dereference=True) as tar:
        for path, name in ((serio, "serio-vmm"), (first_output, "first_output"), (tiny / "vmlinux", "vmlinux"),
                           (tiny / "initrd.img", "initrd.img")):
            tar.add(path, name)
    if testbed("up", NAME, "--bare", "--profile", "release").returncode:
        return "the testbed host does not come up"
    with open(bundle, "rb") as file:
        done = testbed("exec", NAME, "--", "sh", "-c", f"mkdir -p {PLACE} && tar -x -C {PLACE}", stdin=file)
    bundle.unlink()
    return None if done.returncode == 0 else "the files do not fit into the host"


def userspace(serio, first_output, tiny):
    """Rows of exec → `tiny: ready`; empty, with a note, where that cannot be measured."""
    title = "userspace in a testbed host"
    if not serio.exists() or not TESTBED.exists():
        skip(title, "serio-vmm or scripts/testbed is not there")
        return []
    if subprocess.run([ROOT / "images/tiny/build"], stdin=subprocess.DEVNULL, check=False).returncode:
        skip(title, "the image tiny cannot be made")
        return []
    try:
        problem = prepare(serio, first_output, tiny)
        if problem:
            skip(title, problem)
            return []

        def sample(command):
            done = testbed("exec", NAME, "--", f"{PLACE}/first_output", "tiny: ready", *command, capture_output=True,
                           stdin=subprocess.DEVNULL)
            if done.returncode:
                note(f"{command[0]}: {done.stderr.strip()[:600]}")
                return None
            return int(done.stdout) / 1e9

        medians = in_turn(commands(PLACE), ROUNDS, sample)
        return [row(title, name, round(value, 2), "s") for name, value in medians.items()]
    finally:
        testbed("down", NAME)
