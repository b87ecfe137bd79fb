# The demo's node without a testbed: seriod on this machine itself (DEMO_DIRECT=1), for machines with vmx or svm. Sourced by demo-lib.sh.
# shellcheck shell=bash
#
# Owns: seriod and the scheduler of the demo, started here as root with state and run folders of their own.
# Never: touches a seriod that the machine runs.

RUN=/run/serio-demo

[ "$(id -u)" -eq 0 ] || die "DEMO_DIRECT=1 needs root: seriod makes cgroups, namespaces and network cards"
grep -qE '^flags.*\b(vmx|svm)\b' /proc/cpuinfo || die "DEMO_DIRECT=1: this processor offers no virtualization; leave it out to use the testbed"

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

node_start() {
	local grpc nbd scheduler
	grpc=$(free_port)
	nbd=$(free_port)
	scheduler=$(free_port)
	serio pki init "$WORK/pki" --name "demo CA"
	serio pki issue "$WORK/pki" "$NODE" --role node --host 127.0.0.1 --host localhost --host "$NODE"
	serio pki issue "$WORK/pki" scheduler --role control-plane --host 127.0.0.1 --host localhost
	serio pki issue "$WORK/pki" operator --role control-plane
	mkdir -p "$WORK/state" "$RUN" "$WORK/scheduler"
	cat >"$WORK/seriod.toml" <<-END
		node_name = "$NODE"
		state_dir = "$WORK/state"
		run_dir = "$RUN"
		vmm_path = "$BIN/serio-vmm"
		volumed_path = "$BIN/serio-volumed"
		[grpc]
		listen = "127.0.0.1:$grpc"
		tls_dir = "$WORK/pki/$NODE"
		[nbd]
		listen = "127.0.0.1:$nbd"
		[scheduler]
		url = "https://127.0.0.1:$scheduler"
	END
	cat >"$WORK/env" <<-END
		export SERIO_HOST=https://127.0.0.1:$grpc
		export SERIO_CA=$WORK/pki/operator/ca-cert.pem
		export SERIO_CERT=$WORK/pki/operator/client-cert.pem
		export SERIO_KEY=$WORK/pki/operator/client-key.pem
	END
	echo "https://127.0.0.1:$scheduler" >"$WORK/scheduler.url"
	scheduler_run "$scheduler"
	direct_service start
	(
		eval "$(node_env)"
		wait_for 30 "seriod to answer" serio node show
	)
}

scheduler_run() {
	setsid serio-scheduler --listen "127.0.0.1:$1" --tls-dir "$WORK/pki/scheduler" --state-dir "$WORK/scheduler" \
		>"$WORK/scheduler.log" 2>&1 </dev/null &
	echo $! >"$WORK/scheduler.pid"
}

# direct_service start|kill|status: what `service seriod …` is on a testbed host.
direct_service() {
	local pid
	pid=$(cat "$WORK/seriod.pid" 2>/dev/null || echo 0)
	case $1 in
	start)
		setsid "$BIN/seriod" --config "$WORK/seriod.toml" >>"$WORK/seriod.log" 2>&1 </dev/null &
		echo $! >"$WORK/seriod.pid"
		;;
	kill)
		kill -9 "$pid"
		while kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
		;;
	status) if kill -0 "$pid" 2>/dev/null; then echo "running $pid"; else echo stopped && return 3; fi ;;
	esac
}

node_stop() {
	local file
	(
		eval "$(node_env)"
		serio vm list -o json 2>/dev/null | grep -oE '"vdcs/[^"]*/vms/[^"]*"' | tr -d '"' | while read -r name; do
			serio vm stop "$name" --force || true
		done
	)
	for file in "$WORK/seriod.pid" "$WORK/scheduler.pid"; do
		[ ! -s "$file" ] || kill "$(cat "$file")" || true
	done
	rm -rf "$RUN" "$WORK/state"
}

node_env() { cat "$WORK/env"; }
node_health() { direct_service status; }
node_log() { tail -n 25 "$WORK/seriod.log"; }
scheduler_url() { cat "$WORK/scheduler.url"; }

in_host() {
	case "$1 ${2:-}" in
	'service seriod') direct_service "$3" ;;
	'serio doctor') SERIO_HOST=unix:$RUN/seriod.sock serio doctor --state-dir "$WORK/state" ;;
	*) "$@" ;;
	esac
}
