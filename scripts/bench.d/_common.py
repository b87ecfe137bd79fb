"""What measurements share: rows, notes, building, processes and their memory."""

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
RELEASE = TARGET / "x86_64-unknown-linux-gnu/release"
WORK = TARGET / "bench"


def note(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def skip(what, why):
    note(f"skipped: {what}: {why}")


def row(case, subject, value, unit, higher_is_better=False):
    return {"case": case, "subject": subject, "value": value, "unit": unit, "higher_is_better": higher_is_better,
            "peer": subject.split()[0] not in ("serio-vmm", "serio-volumed", "seriod", "floor")}


def run(*command, **options):
    return subprocess.run([str(part) for part in command], check=True, text=True, stdin=subprocess.DEVNULL, **options)


def cargo_release(*packages):
    """Builds binaries as they are shipped, all of them at once: other sets would be built with other features, each anew.
    False and a note if that fails."""
    note(f"building {' '.join(packages)} as released (slow the first time)")
    try:
        run("cargo", "build", "--quiet", "--release", "--workspace", "--bins", cwd=ROOT)
    except subprocess.CalledProcessError:
        skip(" ".join(packages), "it does not build")
        return False
    return True


def c_program(name, *flags):
    """Compiles one of the small C programs beside this file."""
    WORK.mkdir(parents=True, exist_ok=True)
    source, program = Path(__file__).with_name(f"{name}.c"), WORK / name
    run("cc", "-O2", "-Wall", "-static", *flags, "-o", program, source)
    return program


def in_turn(subjects, rounds, sample):
    """Runs `sample(command)` for each subject, in turn, so that a slow minute is everyone's; medians by subject."""
    values = {name: [] for name in subjects}
    order = list(subjects)
    for _ in range(rounds):
        for name in order:
            value = sample(subjects[name])
            if value is not None:
                values[name].append(value)
        order = order[1:] + order[:1]
    return {name: statistics.median(all_of) for name, all_of in values.items() if all_of}


def resident_kib(pid, guest_bytes):
    """Resident memory of a process without its guest memory: mappings of that very size, and memfds."""
    total, counted = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and ":" not in words[0]:
            start, end = (int(part, 16) for part in words[0].split("-"))
            name = words[5] if len(words) > 5 else ""
            counted = not (end - start == guest_bytes or name.startswith("/memfd:") and end - start >= guest_bytes // 2)
        elif words[0] == "Rss:" and counted:
            total += int(words[1])
    return total


def stripped_bytes(binary):
    WORK.mkdir(parents=True, exist_ok=True)
    copy = WORK / "stripped"
    shutil.copy(binary, copy)
    subprocess.run(["strip", "--strip-all", str(copy)], check=False)
    size = copy.stat().st_size
    copy.unlink()
    return size
