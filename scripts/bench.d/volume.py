"""The volume engine beside fio's io_uring engine on a bare file of the same content, at the same depth and through the same
page cache: a plain volume, one with a base layer below, and snapshots and clones of 1 TiB.

The directory is on the disk of the target directory; SERIO_BENCH_DIR names another. Ratios of volumes to the bare file are
what counts, not the disk's speed: all of it lies in the page cache. Before each measurement every file that was written since is
written out, forgotten, and read again in single pages, so that all subjects find the same cache. Without that the comparison is of
how each file came to be: the kernel caches what was written in large pieces in large folios, and a write of 4 KiB into one of them walks
all its blocks (some 50 µs of processor time in a folio of 2 MiB, 5 in one of a page).

A volume with a base below is a fresh clone each time. Its reads are answered by the base. Its writes are the first ones into an
empty head, so they are cases of their own, and their bare file is an empty one, too: the file system has to find room for each
block in both, which costs it several times as much as a write over what is there, and no map or copy has a part in that.
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
    """The subjects: the same 512 MiB of noise as a file, as a volume, and as a base below an empty layer; and an empty file."""
    disk = place / "disk"
    with open(disk, "wb") as file:
        for _ in range(SIZE_MIB):
            file.write(os.urandom(MIB))
    for name in ("plain", "base"):
        run(VOLUMED, "import", place / name, disk, stdout=subprocess.DEVNULL)
    run(VOLUMED, "snapshot", place / "base", "point", stdout=subprocess.DEVNULL)
    for path in (disk, place / "plain", place / "base"):
        settle(path)
    return {
        "bare file (fio)": (bare, disk),
        "bare empty file (fio)": (bare, place / "empty"),
        "serio-volumed engine": (engine, place / "plain"),
        "serio-volumed engine, a base below": (engine, place / "based"),
    }


def cases(subjects):
    """(title, fio's kind, block, depth, those whom it concerns)."""
    for title, kind, block, depth in CELLS:
        if "read" in kind:
            yield title, kind, block, depth, [name for name in subjects if "empty" not in name]
        else:
            first = [name for name in subjects if "empty" in name or "base" in name]
            yield title, kind, block, depth, [name for name in subjects if name not in first]
            yield f"{title}, the first to each block", kind, block, depth, first


def files(path):
    return list(path.glob("*.data")) if path.is_dir() else [path]


def settle(path):
    """The next one shall not wait for a disk that writes what this one has left."""
    for file in files(path):
        with open(file, "rb") as data:
            os.fsync(data.fileno())


def remove(place):
    """What was made for one measurement, when its case is over and not before: a file system that discards what it frees is
    at that for a while, and what is measured meanwhile waits for its journal."""
    for path in [*place.glob("based*"), *place.glob("empty*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    here = os.open(place, os.O_RDONLY)
    os.fsync(here)
    os.close(here)


def prepare(path, written):
    """The same state for everyone: see the head of this file. `written`: when each file was last, as it was prepared."""
    if path.name.startswith("based"):
        run(VOLUMED, "clone", f"{path.parent / 'base'}@point", path, stdout=subprocess.DEVNULL)
    elif path.name.startswith("empty"):
        with open(path, "wb") as file:
            file.truncate(SIZE_MIB * MIB)
    for file in files(path):
        with open(file, "rb", buffering=0) as data:
            state = os.fstat(data.fileno())
            if not state.st_blocks:
                continue
            if written.get(state.st_ino) != state.st_mtime_ns:
                os.posix_fadvise(data.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(data.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            while data.read(4096):
                pass
            written[state.st_ino] = os.fstat(data.fileno()).st_mtime_ns


def cells(subjects, rounds, seconds):
    rows, written = [], {}
    for case, kind, block, depth, names in cases(subjects):
        if ONLY not in case:
            continue
        rates, cpus = {name: [] for name in names}, {name: [] for name in names}
        for turn in range(rounds):
            for name in names[turn % len(names):] + names[:turn % len(names)]:
                measure_one, path = subjects[name]
                if path.name in ("based", "empty"):
                    path = path.with_name(f"{path.name}{turn}")
                prepare(path, written)
                operations, used = measure_one(path, kind, block, depth, seconds)
                settle(path)
                rates[name].append(operations / 1e3)
                cpus[name].append(used)
        remove(path.parent)
        rows += [row(case, name, round(statistics.median(values), 2), "k ops/s", True) for name, values in rates.items()]
        rows += [row(f"{case}: CPU", name, round(statistics.median(values), 2), "µs/op")
                 for name, values in cpus.items()]
        for line in rows[-2 * len(names):]:
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
