# Shared by the commands in scripts/ and the recipes in images/. Sourced, never run.
# shellcheck shell=bash
#
# Owns: where things lie (ROOT, TARGET, CACHE), steps with progress and time, installing Debian packages.
# Never: builds or boots anything by itself.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}
# Downloads and built images that a fresh clone may reuse.
CACHE=${SERIO_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/serio}
TRIPLE=x86_64-unknown-linux-gnu
mkdir -p "$TARGET" "$CACHE"
export ROOT TARGET CACHE TRIPLE

die() {
	printf '%s: %s\n' "${0##*/}" "$*" >&2
	exit 1
}

note() { printf '    %s\n' "$*" >&2; }

# now_ms: milliseconds since the epoch, without a process.
now_ms() {
	local t=${EPOCHREALTIME/[.,]/}
	printf '%s' "${t%???}"
}

# seconds_since START_MS: "12.3 s"
seconds_since() {
	local d=$(($(now_ms) - $1))
	printf '%d.%d s' $((d / 1000)) $((d % 1000 / 100))
}

# step TITLE COMMAND…: runs it, says what is going on and how long it took. Its output goes to a log under
# target/logs, which is shown when it fails (VERBOSE=1: shown always).
step() {
	local title=$1 start log rc=0
	shift
	start=$(now_ms)
	mkdir -p "$TARGET/logs"
	log=$TARGET/logs/$(printf '%s' "$title" | tr -c 'a-zA-Z0-9' '-').log
	# Whole lines only: steps may run side by side.
	printf '==> %s\n' "$title" >&2
	if [ -n "${VERBOSE:-}" ]; then
		"$@" || rc=$?
	else
		"$@" >"$log" 2>&1 || rc=$?
	fi
	if [ "$rc" -eq 0 ]; then
		printf '    %s: done (%s)\n' "$title" "$(seconds_since "$start")" >&2
	else
		printf '    %s: FAILED after %s (exit %d)\n' "$title" "$(seconds_since "$start")" "$rc" >&2
		[ -n "${VERBOSE:-}" ] || tail -n 60 "$log" >&2
	fi
	return "$rc"
}

# need PACKAGE…: installs those Debian packages that are missing. Without root: says the line to run.
need() {
	local missing=() p
	for p in "$@"; do
		dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null | grep -qx installed || missing+=("$p")
	done
	[ ${#missing[@]} -eq 0 ] && return 0
	if [ "$(id -u)" -ne 0 ]; then
		printf 'missing Debian packages; run this and try again:\n    sudo apt-get install -y --no-install-recommends %s\n' \
			"${missing[*]}" >&2
		exit 1
	fi
	step "install ${missing[*]}" apt_install "${missing[@]}"
}

apt_lists() {
	# An old list names files that the archive has dropped: refresh it once a day, and on a fresh machine.
	if [ -z "$(find /var/lib/apt/lists -name '*_Packages*' -mtime -1 -print -quit 2>/dev/null)" ]; then
		apt-get update -q
	fi
}

apt_install() {
	# Without --no-remove apt makes room for one of them by removing another that was there before.
	local options=(-y -q --no-install-recommends --no-remove) p extra=()
	export DEBIAN_FRONTEND=noninteractive
	apt_lists
	apt-get install "${options[@]}" "$@" && return 0
	# A qemu-utils from backports conflicts with the release's qemu-system-x86: take the same version of it.
	for p in "$@"; do
		if [ "$p" = qemu-system-x86 ] || [ "$p" = qemu-utils ]; then
			extra=("qemu-utils=$(apt-cache policy qemu-system-x86 | awk '/Candidate:/ {print $2}')")
		fi
	done
	[ ${#extra[@]} -gt 0 ] || return 1
	apt-get install "${options[@]}" --allow-downgrades "$@" "${extra[@]}"
}

need_cargo() {
	command -v cargo >/dev/null || PATH=$PATH:$HOME/.cargo/bin
	command -v cargo >/dev/null ||
		die "cargo is missing: install Rust 1.89 or newer with rustup (https://rustup.rs), then run this again"
	# cc links the binaries and builds SQLite and ring.
	need gcc libc6-dev
}

# hash_files FILE…: one short hash over names and contents, the key of a cache.
hash_files() {
	(cd "$ROOT" && sha256sum "$@") | sha256sum | cut -c1-16
}

# profile_dir PROFILE: where cargo leaves the binaries of a profile.
profile_dir() {
	case $1 in
	dev) printf '%s/%s/debug' "$TARGET" "$TRIPLE" ;;
	*) printf '%s/%s/%s' "$TARGET" "$TRIPLE" "$1" ;;
	esac
}
