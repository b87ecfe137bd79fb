"""The volume engine beside fio's io_uring engine on a bare file of the same content, at the same depth and through the same
page cache: a plain volume, one with a base layer below, and snapshots and clones of 1 TiB.

The directory is on the disk of the target directory; SERIO_BENCH_DIR names another. Ratios of volumes to the bare file are
what counts, not the disk's speed: all of it lies in the page cache. Before each measurement every file is written out, forgotten, and
read again in single pages, so that all subjects find the same cache. Without that the comparison is of how each file came to
be: the kernel caches what was written in large pieces in large folios, and a write of 4 KiB into one of them walks all its
blocks (some 50 µs of processor time in a folio of 2 MiB, 5 in one of a page). A volume with a base below is a fresh clone each time: its reads are answered by the
base, and its writes are the first ones into an empty head.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from _common import RELEASE, ROOT, WORK, cargo_release, note, row, run, skip

ONLY = ""
MIB = 1 << 20
SIZE_MIB = 512
CELLS = [
    ("random read 4 KiB, depth 32", "randread", 4096, 32),
    ("random write 4 KiB, depth 32", "randwrite", 4096, 32),
    ("sequential read 256 KiB, depth 8", "read", 256 << 10, 8),
    ("sequential write 256 KiB, depth 8", "write", 256 << 10, 8),
]
ENGINE = RELEASE / "examples/volume_bench"
VOLUMED = RELEASE / "serio-volumed"


def processor_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def bare(path, kind, block, depth, seconds):
    before = processor_of_children()
    done = run("fio", "--output-format=json", "--name=cell", "--ioengine=io_uring", f"--filename={path}", f"--rw={kind}",
               f"--bs={block}", f"--iodepth={depth}", "--time_based", f"--runtime={seconds}", f"--size={SIZE_MIB}m",
               "--norandommap", "--randrepeat=0", "--fsync_on_close=0", "--invalidate=0", "--thread", capture_output=True)
    job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    side = job["write" if "write" in kind else "read"]
    # Of the whole process: fio's own figure leaves the kernel's threads for its ring out.
    used = processor_of_children() - before
    return side["iops"], used * 1e6 / max(side["total_ios"], 1)


def engine(path, kind, block, depth, seconds):
    done = run(ENGINE, path, kind, block, depth, seconds, capture_output=True)
    operations, used = done.stdout.split()
    return float(operations), float(used)


def volumes(place):
    """The subjects: the same 512 MiB of noise as a file, as a volume, and as a base below an empty layer."""
    disk = place / "disk"
    with open(disk, "wb") as file:
        for _ in range(SIZE_MIB):
            file.write(os.urandom(MIB))
    for name in ("plain", "base"):
        run(VOLUMED, "import", place / name, disk, stdout=subprocess.DEVNULL)
    run(VOLUMED, "snapshot", place / "base", "point", stdout=subprocess.DEVNULL)
    return {
        "bare file (fio)": (bare, disk),
        "serio-volumed engine": (engine, place / "plain"),
        "serio-volumed engine, a base below": (engine, place / "based"),
    }


def prepare(path):
    """The same state for everyone: see the head of this file."""
    if path.name == "based":
        shutil.rmtree(path, ignore_errors=True)
        run(VOLUMED, "clone", f"{path.parent / 'base'}@point", path, stdout=subprocess.DEVNULL)
    for file in path.glob("*.data") if path.is_dir() else [path]:
        with open(file, "rb", buffering=0) as data:
            os.fsync(data.fileno())
            os.posix_fadvise(data.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(data.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            if os.fstat(data.fileno()).st_blocks:
                while data.read(4096):
                    pass


def cells(subjects, rounds, seconds):
    rows = []
    for case, kind, block, depth in CELLS:
        if ONLY not in case:
            continue
        rates, cpus = {name: [] for name in subjects}, {name: [] for name in subjects}
        for turn in range(rounds):
            names = list(subjects)
            for name in names[turn % len(names):] + names[:turn % len(names)]:
                measure_one, path = subjects[name]
                prepare(path)
                operations, used = measure_one(path, kind, block, depth, seconds)
                rates[name].append(operations / 1e3)
                cpus[name].append(used)
        rows += [row(case, name, round(statistics.median(values), 2), "k ops/s", True) for name, values in rates.items()]
        rows += [row(f"{case}: CPU", name, round(statistics.median(values), 2), "µs/op")
                 for name, values in cpus.items()]
        for line in rows[-2 * len(subjects):]:
            note(f"{line['case']}: {line['subject']}: {line['value']} {line['unit']}")
    return rows


def instants(place, rounds):
    """Snapshots and clones of a sparse 1 TiB; the aim is 100 ms."""
    volume, times = place / "huge", {"snapshot": [], "clone": []}
    run(VOLUMED, "create", volume, "--size", "1TiB", stdout=subprocess.DEVNULL)
    for turn in range(rounds):
        done = run(ENGINE, volume, "snapshot", f"s{turn}", capture_output=True)
        times["snapshot"].append(float(done.stdout))
        start = time.monotonic()
        run(VOLUMED, "clone", f"{volume}@s{turn}", place / f"clone{turn}", stdout=subprocess.DEVNULL)
        times["clone"].append((time.monotonic() - start) * 1e3)
    return [row(f"{what} of 1 TiB", "serio-volumed", round(statistics.median(values), 2), "ms")
            for what, values in times.items()]


def measure(quick):
    if not shutil.which("fio"):
        skip("volume", "fio is not installed")
        return []
    if not cargo_release("serio-volumed"):
        return []
    built = subprocess.run(["cargo", "build", "--quiet", "--release", "-p", "serio-volume", "--example", "volume_bench"],
                           cwd=ROOT, check=False)
    if built.returncode:
        skip("volume", "the example volume_bench does not build")
        return []
    place = Path(os.environ.get("SERIO_BENCH_DIR", WORK)) / f"volume-{os.getpid()}"
    place.mkdir(parents=True)
    rounds = 1 if quick else 5
    try:
        rows = cells(volumes(place), rounds, 1 if quick else 2)
        return rows + ([] if ONLY else instants(place, rounds))
    finally:
        shutil.rmtree(place, ignore_errors=True)
