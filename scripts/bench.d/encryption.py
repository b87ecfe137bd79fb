"""Encryption at rest: the engine's own queue on a plain and on an encrypted volume, in turn: on the disk past the page cache and
through it, and in memory.

The aim is a cost of at most 15 % where the disk decides. Processor time is said beside it, since that is what is really paid. The
ratio of neighbours in time is noted, since disks change their speed from one minute to the next.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from _common import ROOT, TARGET, WORK, note, row, run, skip


def measure(quick):
    try:
        run("cargo", "build", "--quiet", "--release", "-p", "serio-volume", "--example", "encryption", cwd=ROOT)
    except subprocess.CalledProcessError:
        skip("encryption", "the example does not build")
        return []
    program = TARGET / "x86_64-unknown-linux-gnu/release/examples/encryption"
    WORK.mkdir(parents=True, exist_ok=True)
    rows = []
    for place, parent, more in (("disk, direct", WORK, ["direct"]), ("disk", WORK, []), ("tmpfs", Path("/dev/shm"), [])):
        if not parent.is_dir():
            skip(place, f"{parent} is not there")
            continue
        directory = tempfile.mkdtemp(prefix="encryption.", dir=parent)
        try:
            note(f"on {place}")
            said = run(program, directory, 1 if quick else 7, *more, capture_output=True).stdout
        except subprocess.CalledProcessError as error:
            skip(place, (error.stderr or "it failed").strip().splitlines()[-1])
            continue
        finally:
            shutil.rmtree(directory)
        for line in said.splitlines():
            case, subject, rate, cost = line.split("\t")
            if subject == "pairs":
                note(f"{place}: {case}: encrypted takes {rate} of the time and {cost} of the processor")
                continue
            # `plain` is the peer: the ratio says what encryption costs.
            peer = {"peer": subject == "plain"}
            rows.append({**row(f"{place}: {case}", subject, float(rate), "MB/s", higher_is_better=True), **peer})
            rows.append({**row(f"{place}: {case}: processor", subject, float(cost), "ns/KiB"), **peer})
    return rows
