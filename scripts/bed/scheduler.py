"""The scheduler of a testbed: one serio-scheduler on this machine, which the hosts reach as 10.0.2.2."""

import os
import signal
import subprocess
import time

from bed.shared import NAMES, SHARED, Failure, free_ports, issue, pid_of, profile_dir

FOLDER = SHARED / "scheduler"


def port():
    """The port, the same as long as the folder is, so that hosts find it again after a restart."""
    path = FOLDER / "port"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        path.write_text(str(free_ports(1)[0]))
    return int(path.read_text())


def inside_url():
    return f"https://10.0.2.2:{port()}"


def url():
    return f"https://127.0.0.1:{port()}"


def pid():
    return pid_of(FOLDER / "pid", "serio-scheduler")


def up(profile):
    if pid():
        return
    certificates = issue(profile, "scheduler", "control-plane", NAMES)
    operator = issue(profile, "operator", "control-plane", [])
    binaries = profile_dir(profile)
    (FOLDER / "state").mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "log", "ab") as log:
        process = subprocess.Popen([str(binaries / "serio-scheduler"), "--listen", f"127.0.0.1:{port()}", "--tls-dir", str(certificates),
                                    "--state-dir", str(FOLDER / "state")], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   start_new_session=True)
    (FOLDER / "pid").write_text(str(process.pid))
    command = [str(binaries / "serio"), "--host", url(), "--ca", str(operator / "ca-cert.pem"), "--cert", str(operator / "client-cert.pem"),
               "--key", str(operator / "client-key.pem"), "node", "list"]
    deadline = time.monotonic() + 20
    while subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode:
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failure(f"the scheduler does not answer; its log ends:\n{(FOLDER / 'log').read_text()[-2000:]}")
        time.sleep(0.1)


def down():
    running = pid()
    if running:
        os.kill(running, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while pid() and time.monotonic() < deadline:
            time.sleep(0.05)
        if pid():
            os.kill(running, signal.SIGKILL)
