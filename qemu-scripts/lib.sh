# SPDX-License-Identifier: BSD-3-Clause
# shellcheck shell=bash
# lib.sh - what the scripts of this folder share; sourced, never run.
#
# Rules they all keep: everything fetched or built lies in the cache ($VHOSTSOCK_CACHE, else .cache/ of the repository) and may be
# removed at any time; a second run finds it there and downloads nothing; a result is built under a temporary name and moved into place
# when complete, so an interrupted run leaves nothing half done behind; results (paths) go to stdout, talk to stderr.

# -e holds in $(...) too
shopt -s inherit_errexit

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=$(realpath -m "${VHOSTSOCK_CACHE:-$repo/.cache}")
mirror=${VHOSTSOCK_MIRROR:-http://deb.debian.org}

say() { printf '%s\n' "$*" >&2; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# usage: prints the comment block at the top of the calling script (up to the first line that is no comment) as its help
usage() { sed -n '/^#!/d; /^# SPDX/d; /^#/!q; s/^# \{0,1\}//p' "$0"; }

# need TOOL PACKAGE WHY: makes sure TOOL can be run; installs Debian's PACKAGE when we are root, else says the command that would
need() {
	command -v "$1" >/dev/null || install_packages "$3" "$2"
	command -v "$1" >/dev/null || die "$1 is still missing although package $2 is installed; check PATH ($PATH)"
}

# install_packages WHY PACKAGE...: apt-get install into this system, with the full log in the cache
install_packages() {
	local why=$1 log=$cache/log/apt.log
	shift
	command -v apt-get >/dev/null || die "needs $* ($why), and this system has no apt-get: install it by the means of this system"
	((EUID == 0)) || die "needs $* ($why). Install with:  sudo apt-get install --no-install-recommends $*"
	mkdir -p "$cache/log"
	say "    installing $* ($why); log: $log"
	local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300)
	if ! "${apt[@]}" install --no-install-recommends "$@" >>"$log" 2>&1 </dev/null; then
		# the usual reason on a fresh machine: the package lists are missing or too old
		"${apt[@]}" update >>"$log" 2>&1 </dev/null || die "apt-get update failed; the end of $log says why"
		"${apt[@]}" install --no-install-recommends "$@" >>"$log" 2>&1 </dev/null ||
			die "apt-get install $* failed; the end of $log says why"
	fi
}

# apt_of SUITE TOOL ARGS...: runs apt-get or apt-cache on the packages of a Debian suite (bookworm, trixie, trixie-backports, sid) with
# lists and state of its own in the cache: independent of the suite this machine runs and of its sources, and needs no root
apt_of() {
	local dir=$cache/apt/$1 tool=$2
	locked "apt-$1" _apt_lists "$1" "$dir"
	shift 2
	APT_CONFIG=$dir/apt.conf "$tool" "$@" </dev/null
}

_apt_lists() {
	local suite=$1 dir=$2 base=${1%-backports} key=/usr/share/keyrings/debian-archive-keyring.gpg s
	[[ ! -e $dir/ready ]] || return 0
	[[ -e $key ]] || install_packages "the keys that Debian's package lists are signed with" debian-archive-keyring
	need apt-get apt "downloads packages of $suite"
	say "    reading the package lists of Debian $suite"
	rm -rf "$dir"
	mkdir -p "$dir"/{lists/partial,archives/partial,parts} "$cache/log"
	: >"$dir/status"
	{
		for s in "$base" "$([[ $suite == "$base" ]] || echo "$suite")" "$([[ $base == sid ]] || echo "$base-updates")"; do
			[[ -z $s ]] || echo "deb [signed-by=$key] $mirror/debian $s main"
		done
		[[ $base == sid ]] || echo "deb [signed-by=$key] $mirror/debian-security $base-security main"
	} >"$dir/sources.list"
	printf '%s "%s";\n' Dir::State "$dir" Dir::State::status "$dir/status" Dir::State::lists "$dir/lists" Dir::Cache "$dir" \
		Dir::Cache::archives "$dir/archives" Dir::Etc::sourcelist "$dir/sources.list" Dir::Etc::sourceparts "$dir/parts" \
		APT::Architecture amd64 APT::Architectures amd64 APT::Install-Recommends false APT::Get::List-Cleanup false \
		Acquire::Languages none APT::Sandbox::User "$(id -un)" Acquire::Retries 3 \
		>"$dir/apt.conf"
	[[ $suite == "$base" ]] || printf 'APT::Default-Release "%s";\n' "$suite" >>"$dir/apt.conf"
	APT_CONFIG=$dir/apt.conf apt-get -q update >>"$cache/log/apt-$suite.log" 2>&1 </dev/null ||
		die "cannot read the package lists of $suite from $mirror; $cache/log/apt-$suite.log says why (VHOSTSOCK_MIRROR chooses another mirror)"
	touch "$dir/ready"
}

# unpack_debs SUITE DIR PACKAGE...: downloads these packages (not what they depend on) and unpacks them below DIR
unpack_debs() {
	local suite=$1 dir=$2 debs deb
	shift 2
	need dpkg-deb dpkg "unpacks packages"
	mkdir -p "$dir" "$cache/tmp"
	debs=$(mktemp -d "$cache/tmp/debs.XXXXXX")
	apt_of "$suite" true
	(cd "$debs" && apt_of "$suite" apt-get -q download "$@" >>"$cache/log/apt-$suite.log" 2>&1) ||
		die "cannot download $*; $cache/log/apt-$suite.log says why. If the lists are out of date: rm -r $cache/apt/$suite"
	for deb in "$debs"/*.deb; do dpkg-deb -x "$deb" "$dir"; done
	rm -rf "$debs"
}

# busybox_path: fetches Debian's static busybox (the guest's userland; its depmod and cpio also serve us) and prints its path
busybox_path() {
	locked busybox _fetch_busybox "$cache/busybox" >&2
	printf '%s\n' "$cache/busybox/busybox"
}

_fetch_busybox() {
	local dir=$1
	[[ ! -x $dir/busybox ]] || return 0
	say "fetching busybox-static"
	rm -rf "$dir" "$dir.tmp"
	unpack_debs bookworm "$dir.tmp" busybox-static
	find "$dir.tmp" -path '*bin/busybox' -type f -exec mv {} "$dir.tmp/busybox" \;
	[[ -x $dir.tmp/busybox ]] || die "package busybox-static holds no busybox"
	mv "$dir.tmp" "$dir"
}

# unpack_closure SUITE DIR PACKAGE...: downloads these packages and all they depend on and unpacks them below DIR (no scripts run)
unpack_closure() {
	local suite=$1 dir=$2 names
	shift 2
	apt_of "$suite" true
	names=$(apt_of "$suite" apt-get -q --simulate install "$@" | sed -n 's/^Inst \([^ ]*\) .*/\1/p') && [[ -n $names ]] ||
		die "cannot work out what $* of $suite needs; if the lists are out of date: rm -r $cache/apt/$suite"
	# shellcheck disable=SC2086  # a list of words
	unpack_debs "$suite" "$dir" $names
	merge_usr "$dir"
}

# merge_usr DIR: lib, lib64, bin and sbin of an unpacked system become links to those of usr, as every Debian since 12 installs them. Its
# packages may still hold them as folders: Debian 12's do, 13's do not.
merge_usr() {
	local dir=$1 name loader=$1/usr/lib64/ld-linux-x86-64.so.2
	for name in bin sbin lib lib64; do
		mkdir -p "$dir/usr/$name"
		if [[ -d $dir/$name && ! -L $dir/$name ]]; then
			cp -a "$dir/$name/." "$dir/usr/$name/"
			rm -rf "${dir:?}/$name"
		fi
		ln -sfn "usr/$name" "$dir/$name"
	done
	# an absolute link would lead to this machine's loader, which may be of another C library
	[[ ! -L $loader || $(readlink "$loader") != /* ]] || ln -sfn "..$(readlink "$loader" | sed 's,^/usr,,')" "$loader"
}

# in_root ROOT FOLDER... -- COMMAND...: runs COMMAND with ROOT (made by unpack_closure) as its root folder, where the FOLDERs of this system are
# seen under their own names; /proc and /dev, too, and a /tmp of its own. Mounts are the command's own and go with it. Without root it takes
# a user namespace.
in_root() { (exec_in_root "$@"); }

# exec_in_root: the same, in place of the calling script
exec_in_root() {
	local root=$1
	local -a folders=() how=(--mount --propagation private)
	shift
	while [[ $1 != -- ]]; do folders+=("$(realpath "$1")"); shift; done
	shift
	need unshare util-linux "runs programs of another Debian suite"
	need mount mount "shows them folders of this system"
	((EUID == 0)) || how+=(--user --map-root-user)
	# shellcheck disable=SC2016  # for the inner shell
	exec unshare "${how[@]}" bash -c '
		set -e
		root=$1 n=$2
		shift 2
		mount -t tmpfs tmp "$root/tmp"
		for folder in "${@:1:n}" /proc /dev; do
			mkdir -p "$root$folder"
			mount --rbind "$folder" "$root$folder"
		done
		shift "$n"
		exec chroot "$root" /usr/bin/env -i PATH=/usr/bin:/usr/sbin HOME=/ LC_ALL=C "$@"
	' in_root "$root" "${#folders[@]}" "${folders[@]}" "$@"
}

# locked NAME COMMAND...: runs it while nobody else runs one under the same name with this cache
locked() {
	local name=$1
	shift
	mkdir -p "$cache/lock"
	(
		flock 9
		"$@" 9>&-
	) 9>"$cache/lock/$name"
}

# project_venv [EXTRA]: makes or updates a virtual environment in the cache with this project installed (from a copy: the checkout is only
# read) and, with EXTRA, what pyproject.toml lists under it. Prints its folder. Does nothing when all is as before.
project_venv() {
	locked venv _project_venv "$@" >&2
	printf '%s\n' "$cache/venv"
}

_project_venv() {
	local extra=${1:-} venv=$cache/venv src=$cache/src log=$cache/log/pip.log deps sum
	export PIP_CACHE_DIR=$cache/pip
	need python3 python3 "runs the back-end"
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "needs Python 3.11 or newer; python3 here is $(python3 -V)"
	mkdir -p "$cache/log"
	if ! "$venv/bin/python" -m pip -V &>/dev/null; then
		python3 -c 'import ensurepip' 2>/dev/null || install_packages "makes the virtual environment" python3-venv
		say "making a virtual environment in $venv"
		rm -rf "$venv"
		python3 -m venv "$venv"
	fi
	deps=$("$venv/bin/python" - "$repo/pyproject.toml" "$extra" <<-'END'
		import sys, tomllib
		config = tomllib.load(open(sys.argv[1], "rb"))
		extras = config["project"]["optional-dependencies"]
		print(*config["build-system"]["requires"], "wheel", *config["project"]["dependencies"], *(extras[sys.argv[2]] if sys.argv[2] else []), sep="\n")
	END
	)
	sum=$(sha256sum <<<"$deps" | cut -c1-16)
	if [[ ! -e $venv/.deps-$sum ]]; then
		say "    installing from PyPI: $(tr '\n' ' ' <<<"$deps")"
		# shellcheck disable=SC2086  # a list of words
		"$venv/bin/pip" install -q --disable-pip-version-check $deps >>"$log" 2>&1 </dev/null || die "pip install failed; the end of $log says why"
		touch "$venv/.deps-$sum"
	fi
	sum=$(cd "$repo" && find csrc/core csrc/engine csrc/include vhostsock setup.py pyproject.toml README.md LICENSE* -type f \
		! -name '*.so' ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -c1-16)
	[[ ! -e $venv/.built-$sum ]] || return 0
	need gcc gcc "compiles the virtqueue core"
	[[ -e $(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]] ||
		install_packages "Python's headers, to compile the virtqueue core" python3-dev
	[[ -e /usr/include/unistd.h ]] || install_packages "the C library's headers, to compile the virtqueue core" libc6-dev
	say "    building vhostsock"
	rm -rf "$src"
	mkdir -p "$src/csrc"
	cp -rp "$repo"/{vhostsock,setup.py,pyproject.toml,README.md} "$repo"/LICENSE* "$src/"
	cp -rp "$repo"/csrc/{core,engine,include} "$src/csrc/"
	find "$src" \( -name '*.so' -o -name '_core.c' -o -name __pycache__ \) -prune -exec rm -rf {} +
	"$venv/bin/pip" install -q --disable-pip-version-check --no-deps --no-index --no-build-isolation --force-reinstall "$src" \
		>>"$log" 2>&1 </dev/null || die "vhostsock does not build; the end of $log says why"
	rm -f "$venv"/.built-*
	touch "$venv/.built-$sum"
}
