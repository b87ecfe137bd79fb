# The machinery of scripts/demo: a node to talk to, steps that are shown and counted, and what a step may expect. Sourced, never run.
# shellcheck shell=bash
#
# Owns: the demo's work folder, its node (a testbed host, or seriod on this machine), its scheduler. All are gone at the end.
# Never: the steps themselves.

NODE=demo
PROFILE=${SERIO_PROFILE:-dev}
BIN=$(profile_dir "$PROFILE")
export IMAGES=$TARGET/images
WORK=$TARGET/demo
OUTPUT=$WORK/output
STEPS=0
PASSED=0
STEP_TITLE=
export SERIO_TESTBED=$TARGET/testbed-demo
export SERIO_PROFILE=$PROFILE
rm -rf "$WORK"
mkdir -p "$WORK"
# So that the commands stand there as they are typed.
PATH=$BIN:$PATH

# shellcheck source=demo-direct.sh
[ -z "${DEMO_DIRECT:-}" ] || . "$ROOT/scripts/demo-direct.sh"

say() { printf '    %s\n' "$*"; }

build_binaries() {
	[ -z "${SERIO_NO_BUILD:-}" ] || return 0
	(cd "$ROOT" && cargo build --locked --bins --profile "$PROFILE" -p serio-node -p serio-vmm -p serio-volumed -p serio-scheduler \
		-p serio-cli -p serio-tests)
}

if ! declare -F node_start >/dev/null; then
	node_start() {
		"$ROOT/scripts/testbed" down
		"$ROOT/scripts/testbed" scheduler up --no-build
		"$ROOT/scripts/testbed" up "$NODE" --no-build --scheduler machine
	}
	node_stop() { "$ROOT/scripts/testbed" down; }
	node_env() { "$ROOT/scripts/testbed" env "$NODE"; }
	node_log() { in_host tail -n 25 /var/log/seriod.log; }
	in_host() { "$ROOT/scripts/testbed" exec "$NODE" -- "$@" </dev/null; }
	# node_health: fails, and says so, when the host itself died: that is no failure of Serio.
	node_health() { "$ROOT/scripts/testbed" health "$NODE"; }
	scheduler_url() { "$ROOT/scripts/testbed" scheduler url; }
fi

demo_cleanup() {
	local rc=$?
	trap - EXIT
	if [ "$rc" -ne 0 ] && [ -n "$STEP_TITLE" ]; then
		printf '\n    this step failed: %s\n' "$STEP_TITLE"
		node_health || true
		printf '    the end of the node log:\n'
		node_log 2>&1 | sed 's/^/    | /' || true
	fi
	[ -n "${DEMO_KEEP:-}" ] || node_stop >/dev/null 2>&1 || true
	if [ "$rc" -ne 0 ]; then printf 'demo: %d of %d steps passed, then one failed\n' "$PASSED" "$STEPS"; fi
	exit "$rc"
}
trap demo_cleanup EXIT

# demo_step TITLE FUNCTION: one counted step.
demo_step() {
	local start
	STEP_TITLE=$1
	if [ "$STEPS" -eq 0 ]; then
		eval "$(node_env)"
		SCHEDULER=$(scheduler_url)
	fi
	STEPS=$((STEPS + 1))
	start=$(now_ms)
	printf '\n── %d. %s\n' "$STEPS" "$1"
	"$2"
	PASSED=$((PASSED + 1))
	printf '    passed (%s)\n' "$(seconds_since "$start")"
	STEP_TITLE=
}

demo_end() {
	printf '\ndemo: %d of %d steps passed\n' "$PASSED" "$STEPS"
}

fail() {
	printf '    EXPECTED OTHERWISE: %s\n' "$*"
	exit 1
}

# quoted WORD…: a command as one would type it here.
quoted() {
	local word text=
	for word in "$@"; do
		case $word in
		*[!a-zA-Z0-9/._=:,@+-]*) word="'$word'" ;;
		esac
		text="$text $word"
	done
	printf '%s' "${text# }"
}

# run_shown PROMPT COMMAND…: prints the command and, as it comes, its output; keeps the latter in $OUTPUT.
run_shown() {
	local prompt=$1 rc=0
	shift
	printf '    %s %s\n' "$prompt" "$(quoted "$@" | sed "s#$ROOT/##g")"
	"${RUNNER[@]}" "$@" </dev/null 2>&1 | tr -d '\r' | tee "$OUTPUT" | sed 's/^/    │ /' || rc=${PIPESTATUS[0]}
	return "$rc"
}

# shown COMMAND…: runs it here; it must succeed.
shown() {
	local rc=0 RUNNER=()
	run_shown '$' "$@" || rc=$?
	[ "$rc" -eq 0 ] || fail "exit code 0, not $rc"
}

# shown_any COMMAND…: runs it here; any exit code below 4 will do (e2fsck says 1 for a journal that it replayed).
shown_any() {
	local rc=0 RUNNER=()
	run_shown '$' "$@" || rc=$?
	[ "$rc" -lt 4 ] || fail "an exit code below 4, not $rc"
}

# shown_in_host COMMAND…: the same, on the node.
shown_in_host() {
	local rc=0 RUNNER=(in_host)
	run_shown "$NODE#" "$@" || rc=$?
	return "$rc"
}

# refused CODE COMMAND…: it must fail with that exit code.
refused() {
	local code=$1 rc=0 RUNNER=()
	shift
	run_shown '$' "$@" || rc=$?
	[ "$rc" -eq "$code" ] || fail "exit code $code, not $rc"
	say "exit code $rc"
}

expect() { grep -qiE -- "$1" "$OUTPUT" || fail "output that matches $1"; }
expect_not() { ! grep -qiE -- "$1" "$OUTPUT" || fail "no output that matches $1"; }

# wait_for SECONDS WHAT COMMAND…
wait_for() {
	local deadline=$(($(now_ms) + $1 * 1000)) what=$2
	shift 2
	until "$@" >/dev/null 2>&1; do
		[ "$(now_ms)" -lt "$deadline" ] || fail "$what, in time"
		sleep 0.2
	done
}

# json FILE EXPRESSION: a Python expression over the document `d`.
json() { python3 -c 'import json, sys; d = json.load(open(sys.argv[1])); print(eval(sys.argv[2]))' "$1" "$2"; }

# vm_field pid|kind: of ardesio/web.
vm_field() {
	serio vm show ardesio/web -o json >"$WORK/vm.json"
	case $1 in
	pid) json "$WORK/vm.json" 'd["status"]["pid"]' ;;
	kind) json "$WORK/vm.json" 'd["status"].get("lastEnd", {}).get("kind")' ;;
	esac
}

# guest_uptime: seconds, asked of the guest's kernel over its console.
guest_uptime() {
	serio vm console ardesio/web --history 0B --send 'cat /proc/uptime\n' --until '^[0-9]+\.[0-9]+ [0-9]+\.[0-9]+' --timeout 60s |
		tr -d '\r' | grep -oE '^[0-9]+\.[0-9]+ [0-9]' | tail -n 1 | cut -d' ' -f1
}

scheduler_view() { serio --host "$SCHEDULER" node list -o json; }

# allocated_memory FILE: bytes promised to VMs on the node, as the scheduler knows it.
allocated_memory() {
	json "$1" "sum(int(a.get('memoryBytes', 0)) for n in d if n['name'].endswith('$NODE') for a in n.get('allocations', {}).get('allocations', []))"
}

scheduler_changed() {
	scheduler_view >"$WORK/after.json"
	[ "$(allocated_memory "$WORK/after.json")" != "$1" ]
}
