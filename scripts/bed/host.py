"""One testbed host: its files, its QEMU process, how to talk to it, and how to tell that its kernel died by itself."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from pathlib import Path

from bed import scheduler
from bed.shared import BED, NAMES, SHARED, TARGET, Failure, HostDied, free_ports, issue, pid_of, profile_dir, run

BOOT_SECONDS_MAX = 90
READY_SECONDS_MAX = 60
STATE_BYTES = 16 << 30
# What a kernel prints when it dies; `panic=1 oops=panic -no-reboot` then ends QEMU.
DEATH = re.compile(r"Kernel panic|Oops:|BUG: unable|rcu: INFO: .* stall|soft lockup|double fault")


class Host:
    def __init__(self, name):
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,30}", name):
            raise Failure(f"a bad host name: {name!r} (small letters, digits, dashes)")
        self.name = name
        self.dir = BED / name
        self.log = self.dir / "serial.log"

    def load(self):
        try:
            return json.loads((self.dir / "host.json").read_text())
        except OSError:
            raise Failure(f"there is no host {self.name}: scripts/testbed up {self.name}") from None

    def pid(self):
        return pid_of(self.dir / "qemu.pid", str(self.dir))

    def number(self):
        """N of 10.77.0.N, kept as long as the shared folder is."""
        path = SHARED / "numbers.json"
        numbers = json.loads(path.read_text()) if path.exists() else {}
        if self.name not in numbers:
            numbers[self.name] = max(numbers.values(), default=10) + 1
            path.write_text(json.dumps(numbers))
        return numbers[self.name]

    def prepare(self, options):
        self.dir.mkdir(parents=True, exist_ok=True)
        state = self.dir / "state.raw"
        if options.fresh:
            state.unlink(missing_ok=True)
        if not state.exists():
            with open(state, "wb") as file:
                file.truncate(STATE_BYTES)
            run("mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(state))
        number = self.number()
        grpc, nbd, agent = free_ports(3)
        url = scheduler.inside_url() if options.scheduler == "machine" else options.scheduler
        host = {"name": self.name, "number": number, "grpc": grpc, "nbd": nbd, "agent": agent,
                "token": secrets.token_hex(16), "bare": options.bare, "profile": options.profile, "scheduler": url}
        (self.dir / "host.json").write_text(json.dumps(host, indent=1))
        (self.dir / "host.json").chmod(0o600)
        self.write_env(host)
        self.write_initrd(host)
        return host

    def write_env(self, host):
        client = SHARED / "pki/operator"
        values = {"SERIO_HOST": f"https://127.0.0.1:{host['grpc']}", "SERIO_CA": client / "ca-cert.pem",
                  "SERIO_CERT": client / "client-cert.pem", "SERIO_KEY": client / "client-key.pem"}
        lines = [f"export {key}={value}" for key, value in values.items()]
        (self.dir / "env").write_text("\n".join(lines) + "\n")

    def config(self, host):
        text = f"""node_name = "{self.name}"
site = "site-{self.name}"
failure_domain = "rack-1"
vmm_path = "/usr/local/bin/serio-vmm"
volumed_path = "/usr/local/bin/serio-volumed"
[grpc]
listen = "0.0.0.0:7440"
tls_dir = "/etc/serio/tls"
[nbd]
listen = "0.0.0.0:10809"
advertise = "127.0.0.1:{host['nbd']}"
[keys]
source = "file:/etc/serio/kek"
[metrics]
listen = "127.0.0.1:7441"
"""
        if host["scheduler"]:
            text += f'[scheduler]\nurl = "{host["scheduler"]}"\ntls_dir = "/etc/serio/tls"\n'
        return text

    def write_initrd(self, host):
        """The common initrd, and behind it an archive with what only this host has: an initrd may have several."""
        tree = self.dir / "initrd.tree"
        shutil.rmtree(tree, ignore_errors=True)
        (tree / "etc/testbed").mkdir(parents=True)
        (tree / "etc/serio").mkdir(parents=True)
        (tree / "etc/testbed/host").write_text(
            f"NAME={self.name}\nTOKEN={host['token']}\nSHARED_ADDRESS=10.77.0.{host['number']}/24\n")
        if not host["bare"]:
            (tree / "etc/serio/seriod.toml").write_text(self.config(host))
            kek = self.dir / "kek"
            if not kek.exists():
                kek.write_text(secrets.token_hex(32))
            (tree / "etc/serio/kek").write_text(kek.read_text())
            (tree / "etc/serio/kek").chmod(0o600)
            issue(host["profile"], "operator", "control-plane", [])
            certificates = issue(host["profile"], self.name, "node", [*NAMES, self.name, f"10.77.0.{host['number']}"])
            shutil.copytree(certificates, tree / "etc/serio/tls")
        files = run("find", ".", cwd=tree)
        archive = subprocess.run(["cpio", "--quiet", "-R", "0:0", "-o", "-H", "newc"], cwd=tree, input=files.encode(),
                                 capture_output=True, check=True).stdout
        common = (TARGET / "images/host/initrd.img").read_bytes()
        padding = b"\0" * (-len(common) % 512)
        (self.dir / "initrd.img").write_bytes(common + padding + archive)
        shutil.rmtree(tree)

    def command(self, host, options, tools):
        hardware = re.search(r"^flags.*\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text(), re.M) and os.access("/dev/kvm", os.R_OK | os.W_OK)
        accel = ["-accel", "kvm", "-cpu", "host"] if hardware else ["-accel", "tcg,thread=multi", "-cpu", "max,+svm"]
        forwards = ",".join(f"hostfwd=tcp:127.0.0.1:{host[key]}-:{port}"
                            for key, port in [("grpc", 7440), ("nbd", 10809), ("agent", 7000)])
        images = TARGET / "images/host"
        wire = self.dir.relative_to(BED) / "wire"
        mac = f"{host['number']:02x}"
        return ["qemu-system-x86_64", "-name", str(self.dir), "-nodefaults", "-no-user-config", "-machine", "q35,graphics=off",
                *accel, "-smp", str(options.cpus), "-m", str(options.memory), "-display", "none", "-no-reboot",
                "-pidfile", str(self.dir / "qemu.pid"), "-serial", f"file:{self.log}",
                "-kernel", str(images / "vmlinux"), "-initrd", str(self.dir / "initrd.img"),
                "-append", "console=ttyS0 quiet loglevel=4 panic=1 oops=panic mitigations=off nokaslr random.trust_cpu=on no_timer_check "
                "tsc=reliable i8042.nokbd i8042.noaux cryptomgr.notests",
                "-drive", f"if=none,id=tools,format=raw,readonly=on,file={tools}", "-device", "virtio-blk-pci,drive=tools",
                "-drive", f"if=none,id=state,format=raw,discard=unmap,file={self.dir / 'state.raw'}", "-device", "virtio-blk-pci,drive=state",
                "-netdev", f"user,id=outside,{forwards}", "-device", f"virtio-net-pci,romfile=,netdev=outside,mac=52:54:00:77:00:{mac}",
                "-netdev", f"dgram,id=shared,local.type=unix,local.path={wire},remote.type=unix,remote.path=.shared/net/hub",
                "-device", f"virtio-net-pci,romfile=,netdev=shared,mac=52:54:00:77:01:{mac}",
                "-device", "virtio-rng-pci"]

    def start(self, host, options, tools):
        self.log.write_text("")
        (self.dir / "killed").unlink(missing_ok=True)
        link, wire = SHARED / "net" / self.name, self.dir / "wire"
        wire.unlink(missing_ok=True)
        # Not -daemonize: it changes the working folder, and the wire's paths are relative to stay short.
        (self.dir / "qemu.pid").unlink(missing_ok=True)
        with open(self.dir / "qemu.log", "wb") as output:
            process = subprocess.Popen(self.command(host, options, tools), cwd=BED, stdin=subprocess.DEVNULL, stdout=output,
                                       stderr=output, start_new_session=True)
        while not (self.dir / "qemu.pid").exists():
            if process.poll() is not None:
                raise Failure(f"QEMU does not start: {(self.dir / 'qemu.log').read_text().strip()}")
            time.sleep(0.02)
        link.unlink(missing_ok=True)
        link.symlink_to(f"../../{self.name}/wire")

    def death(self):
        """Why the host's kernel died by itself, or None."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        match = DEATH.search(text)
        if match:
            return next(line for line in text.splitlines() if match.group(0) in line).strip()
        if not self.pid() and not (self.dir / "killed").exists():
            return "the emulator ended without a word"
        return None

    def agent_command(self, host, *command):
        agent = profile_dir(host["profile"]) / "testbed-agent"
        return [str(agent), *command], {**os.environ, "TESTBED_TOKEN": host["token"]}

    def execute(self, *command, timeout=None, **options):
        host = self.load()
        argv, env = self.agent_command(host, "exec", f"127.0.0.1:{host['agent']}", "--", *command)
        return subprocess.run(argv, env=env, timeout=timeout, check=False, **options)

    def answers(self):
        try:
            return self.execute("true", timeout=10, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def wait(self, seconds, what, ready):
        deadline = time.monotonic() + seconds
        while not ready():
            death = self.death()
            if death:
                raise HostDied(f"{self.name}: the host's kernel died by itself: {death}")
            if time.monotonic() > deadline:
                raise HostDied(f"{self.name}: {what} after {seconds} s (see {self.log})")
            time.sleep(0.1)

    def seriod_answers(self, host):
        serio = profile_dir(host["profile"]) / "serio"
        env = dict(os.environ)
        for line in (self.dir / "env").read_text().splitlines():
            key, value = line.removeprefix("export ").split("=", 1)
            env[key] = value
        try:
            return subprocess.run([str(serio), "node", "show"], env=env, timeout=10, check=False, stdin=subprocess.DEVNULL,
                                  capture_output=True).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def wait_ready(self, host):
        self.wait(BOOT_SECONDS_MAX, "no sign of life", lambda: "testbed: host" in self.log.read_text(errors="replace"))
        self.wait(READY_SECONDS_MAX, "no answer from the exec agent", self.answers)
        if not host["bare"]:
            try:
                self.wait(READY_SECONDS_MAX, "no answer from seriod", lambda: self.seriod_answers(host))
            except HostDied as error:
                if self.death() or not self.answers():
                    raise
                tail = self.execute("tail", "-n", "20", "/var/log/seriod.log", capture_output=True, text=True).stdout
                raise Failure(f"{self.name}: seriod does not answer; its log ends:\n{tail}") from error

    def kill(self):
        pid = self.pid()
        if not pid:
            return
        (self.dir / "killed").touch()
        os.kill(pid, signal.SIGKILL)
        while self.pid():
            time.sleep(0.02)
