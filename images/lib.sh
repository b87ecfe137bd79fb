# Shared by the recipes: stock Debian kernels without installing them, and small initrds. Sourced, never run.
# shellcheck shell=bash
#
# Owns: the kernel cache ($CACHE/kernels), the choice of modules, the packing of an initrd.
# Never: changes the machine's own kernel, modules or initrd.

# shellcheck source=../scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"

# kernel_fetch VERSION…: prints the folder of the newest stock Debian cloud kernel whose version starts with the first
# VERSION that the archive has (an empty one: any). The folder holds boot/vmlinuz, boot/vmlinux and lib/modules/KVER.
kernel_fetch() {
	local package='' version cached
	apt_lists >&2 || note "the package lists are not fresh"
	for version in "$@"; do
		package=$(apt-cache search --names-only "^linux-image-${version}[0-9.+a-z-]*-cloud-amd64\$" |
			awk '{print $1}' | grep '^linux-image-[0-9][0-9.]*[0-9][+-]' | sort -V | tail -n 1)
		[ -n "$package" ] && break
	done
	if [ -n "$package" ] && kernel_download "$package" >&2; then
		printf '%s' "$CACHE/kernels/$package"
		return 0
	fi
	for version in "$@"; do
		cached=$(find "$CACHE/kernels" -maxdepth 1 -name 'linux-image-*-cloud-amd64' 2>/dev/null |
			grep -E "/linux-image-$version" | sort -V | tail -n 1)
		if [ -n "$cached" ]; then
			note "cannot download a kernel: using $(basename "$cached")"
			printf '%s' "$cached"
			return 0
		fi
	done
	die "no Debian cloud kernel ($*) can be had: check that apt-get update works"
}

# kernel_download PACKAGE: into the cache, unless it is there.
kernel_download() {
	local package=$1 dir=$CACHE/kernels/$1 kver=${1#linux-image-}
	[ -e "$dir/complete" ] && return 0
	rm -rf "$dir" "$dir.new"
	mkdir -p "$dir.new"
	# Debian 13 has /usr/lib/modules.
	(cd "$dir.new" && apt-get download -q "$package" && dpkg-deb -x ./*.deb . && rm ./*.deb &&
		{ [ -d lib ] || ln -s usr/lib lib; } &&
		mv "boot/vmlinuz-$kver" boot/vmlinuz && kernel_unpack boot/vmlinuz boot/vmlinux && depmod -b . "$kver" &&
		touch complete) || return 1
	mv "$dir.new" "$dir"
}

# kernel_version DIR: the version as in lib/modules.
kernel_version() { basename "$1"/lib/modules/*; }

# kernel_unpack BZIMAGE ELF: takes the compressed kernel out of a bzImage (boot protocol 2.08: payload_offset and
# payload_length of the setup header).
kernel_unpack() {
	local sectors offset length
	sectors=$(od -An -tu1 -j $((0x1f1)) -N1 "$1")
	offset=$(od -An -tu4 -j $((0x248)) -N4 "$1")
	length=$(od -An -tu4 -j $((0x24c)) -N4 "$1")
	[ "$sectors" -eq 0 ] && sectors=4
	offset=$((offset + (sectors + 1) * 512))
	# The last four bytes of the payload are its unpacked size.
	tail -c +$((offset + 1)) "$1" | head -c $((length - 4)) >"$2.packed"
	case $(od -An -tx1 -N4 "$2.packed" | tr -d ' ') in
	02214c18) lz4 -dcq "$2.packed" >"$2" ;;
	28b52ffd) zstd -dcq "$2.packed" >"$2" ;;
	fd377a58) xz -dcq "$2.packed" >"$2" ;;
	1f8b*) gzip -dcq "$2.packed" >"$2" ;;
	*) die "unknown compression of the kernel in $1" ;;
	esac
	rm "$2.packed"
}

# modules_install KERNEL_DIR ROOT_FS MODULE…: copies modules and what they depend on, unpacked, and writes
# ROOT_FS/lib/modules.load: one path a line, in the order in which insmod works. Built-in ones are left out.
modules_install() {
	local kernel=$1 rootfs=$2 kver module path name
	shift 2
	kver=$(kernel_version "$kernel")
	mkdir -p "$rootfs/lib/modules"
	touch "$rootfs/lib/modules.load"
	for module in "$@"; do
		modprobe -d "$kernel" -S "$kver" --show-depends "$module" | awk '$1 == "insmod" {print $2}' |
			while read -r path; do
				name=$(basename "$path")
				name=${name%.xz}
				grep -qx "/lib/modules/$name" "$rootfs/lib/modules.load" && continue
				case $path in
				*.xz) xz -dc "$path" >"$rootfs/lib/modules/$name" ;;
				*) cp "$path" "$rootfs/lib/modules/$name" ;;
				esac
				strip --strip-debug "$rootfs/lib/modules/$name"
				echo "/lib/modules/$name" >>"$rootfs/lib/modules.load"
			done
	done
}

# busybox_install ROOT_FS: the static busybox under all its names.
busybox_install() {
	local applet
	mkdir -p "$1"/{bin,dev,proc,sys,run,tmp,etc,root,var/lib,usr/local/bin}
	cp /bin/busybox "$1/bin/busybox"
	for applet in $(/bin/busybox --list); do
		[ "$applet" = busybox ] || ln -sf busybox "$1/bin/$applet"
	done
}

# initrd_pack ROOT_FS FILE: a cpio, unpacked: copying is quicker than unpacking in an emulated machine.
initrd_pack() {
	(cd "$1" && find . -print0 | sort -z | cpio --null --quiet -R 0:0 -o -H newc) >"$2.new"
	mv "$2.new" "$2"
}
