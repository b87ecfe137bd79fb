"""The scheduler with a fleet: 2,000 simulated agents with real streams (lease 2 s, usage 10 s), 50 placements a second.

Its processor time, its memory for each node, how long Place takes, and how long until all agents are back after all streams
were cut at once. No peers: what these numbers must stay below stands in the table's cases.
"""

import json
import subprocess

from _common import ROOT, RELEASE, cargo_release, note, row, run, skip

LIMITS = {
    "Place, p99": 20, "scheduler's share of a core": 50, "all back after a storm": 30,
}


def measure(quick):
    if not cargo_release("serio-scheduler"):
        return []
    agents, seconds = (200, 5) if quick else (2000, 30)
    try:
        done = run(RELEASE / "serio-scheduler", "simulate", "--nodes", agents, "--duration", seconds, "--place-rate", 50,
                   "--storm", "--json", capture_output=True, cwd=ROOT)
    except subprocess.CalledProcessError as error:
        skip("scheduler", error.stderr[-500:])
        return []
    note(done.stderr.strip())
    rows = []
    for line in json.loads(done.stdout):
        limit = LIMITS.get(line["case"])
        case = line["case"] if limit is None else f"{line['case']} (below {limit})"
        rows.append({**row(case, "serio-scheduler", round(line["value"], 2), line["unit"]), "peer": False})
    return rows
