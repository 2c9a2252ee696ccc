# SPDX-License-Identifier: BSD-3-Clause
"""Programs that move files: openssh, rsync, git, apt."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.programs.conftest import Done
from tests.e2e.programs.house import HOST, House, digests, sha256
from tests.e2e.programs.web import web_of_the_host

IN, OUT = "host to guest", "guest to host"
MIB = 1 << 20

# ---- openssh

SSHD = """
Port {port}
ListenAddress {address}
HostKey {home}/host_key
AuthorizedKeysFile {home}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
Subsystem sftp internal-sftp
"""


@pytest.fixture(scope="module")
def keys(programs: House) -> Path:
    """A folder of keys made now, the same on both sides: of the user, and of the server, which clients check."""
    home = programs.folder / "ssh"
    home.mkdir()
    for name in ("key", "host_key"):
        programs.host(f"ssh-keygen -q -t ed25519 -N '' -f {home}/{name}")
    programs.give(home)
    return home


def known(keys: Path, address: str, port: int) -> str:
    return f"[{address}]:{port} {(keys / 'host_key.pub').read_text()}"


def options(home: Path | str) -> str:
    return f"-i {home}/key -o BatchMode=yes -o StrictHostKeyChecking=yes -o UserKnownHostsFile={home}/known"


@pytest.mark.program(
    "openssh-client", OUT, "ssh with a command, scp up and down", "the host's key, SHA-256 of both files, the exit status"
)
def test_ssh_to_the_host(programs: House, keys: Path, done: Done) -> None:
    port, size = programs.port(), programs.pick(2, 64) * MIB
    (keys / "sshd_config").write_text(SSHD.format(port=port, address=programs.here, home=keys))
    down = programs.random_file("ssh/down", size)
    programs.guest("cat >ssh/known", input=known(keys, HOST, port).encode())
    with programs.host_server("sshd", f"/usr/sbin/sshd -D -e -f {keys}/sshd_config", port):
        ssh, scp = f"ssh -p {port} {options('ssh')} root@{HOST}", f"scp -q -P {port} {options('ssh')}"
        assert programs.guest(f"{ssh} 'cat; exit 7' </etc/passwd; echo $?").splitlines()[-1] == "7"
        programs.guest(f"{scp} root@{HOST}:{down} got && head -c {size} /dev/urandom >sent && {scp} sent root@{HOST}:{keys}/up")
    assert programs.guest_sha256("got") == sha256(down)
    assert programs.guest_sha256("sent") == sha256(keys / "up")
    done(f"2 times {size} bytes")


@pytest.mark.program(
    "openssh-server",
    IN,
    "scp down and up, three commands on one connection (ControlMaster)",
    "the guest's key, SHA-256 of both files, the output",
)
def test_ssh_to_the_guest(programs: House, keys: Path, done: Done) -> None:
    port, size = programs.port(), programs.pick(2, 64) * MIB
    programs.guest("cat >ssh/sshd_config", input=SSHD.format(port=port, address="0.0.0.0", home="/var/tmp/ssh").encode())
    (keys / "known").write_text(known(keys, programs.there, port))
    up = programs.random_file("ssh/up", size)
    with programs.guest_server("sshd", "/usr/sbin/sshd -D -e -f ssh/sshd_config", port):
        scp = f"scp -q -P {port} {options(keys)}"
        programs.host(
            f"{scp} {up} root@{programs.there}:/var/tmp/ssh/up && {scp} root@{programs.there}:/var/tmp/ssh/up {keys}/back"
        )
        assert sha256(keys / "back") == sha256(up) == programs.guest_sha256("ssh/up")
        master = f"ssh -p {port} {options(keys)} -o ControlPath=/tmp/%C root@{programs.there}"
        say = " && ".join(f"{master} echo {n}" for n in range(3))
        assert programs.host(f"{master} -o ControlMaster=yes -f -N && {say} && {master} -O exit").split() == ["0", "1", "2"]
    done(f"2 times {size} bytes")


# ---- rsync

RSYNC = """
use chroot = no
uid = root
gid = root
[files]
  path = {path}
  read only = no
"""


def tree(programs: House, name: str) -> Path:
    for n in range(programs.pick(60, 3000)):
        programs.random_file(f"{name}/{n % 7}/{n}", 1 + n * 997 % 40000)
    programs.random_file(f"{name}/large", programs.pick(2, 64) * MIB)
    return programs.folder / name


@pytest.mark.program(
    "rsync", OUT, "a tree pulled from a daemon, changed, and pushed back (deltas)", "SHA-256 of every file, both times"
)
def test_rsync_with_the_host(programs: House, done: Done) -> None:
    port, files = programs.port(), tree(programs, "tree")
    (programs.folder / "rsyncd.conf").write_text(RSYNC.format(path=files))
    daemon = f"rsync --daemon --no-detach --config={programs.folder}/rsyncd.conf --address={programs.here} --port={port}"
    with programs.host_server("rsyncd", daemon, port):
        programs.guest(f"rsync -a rsync://{HOST}:{port}/files/ pulled/")
        assert programs.guest_digests("pulled") == digests(files)
        programs.guest("echo more >>pulled/large; echo new >pulled/new; rm -r pulled/3")
        programs.guest(f"rsync -a --delete --no-whole-file pulled/ rsync://{HOST}:{port}/files/")
        assert programs.guest_digests("pulled") == digests(files)
    done(f"{len(digests(files))} files, {sum(path.stat().st_size for path in files.rglob('*') if path.is_file())} bytes")


@pytest.mark.program("rsync", IN, "a tree pushed to a daemon and pulled again", "SHA-256 of every file, both times")
def test_rsync_with_the_guest(programs: House, done: Done) -> None:
    port, files = programs.port(), tree(programs, "other")
    programs.guest("mkdir served && cat >rsyncd.conf", input=RSYNC.format(path="/var/tmp/served").encode())
    with programs.guest_server("rsyncd", f"rsync --daemon --no-detach --config=/var/tmp/rsyncd.conf --port={port}", port):
        url = f"rsync://{programs.there}:{port}/files/"
        programs.host(f"rsync -a {files}/ {url} && rsync -a {url} {programs.folder}/back/")
        assert programs.guest_digests("served") == digests(programs.folder / "back") == digests(files)
    done(f"{len(digests(files))} files")


# ---- git

GIT = "git -c user.name=somebody -c user.email=somebody@host.test -c init.defaultBranch=main -c safe.directory='*'"


def repository(programs: House, bare: Path) -> str:
    """A bare repository at ``bare`` with some history; its head."""
    work = programs.folder / f"work-{bare.name}"
    work.mkdir()
    programs.host(
        f"{GIT} init -q --bare {bare} && {GIT} -C {bare} config http.receivepack true && {GIT} clone -q {bare} {work}"
    )
    for commit in range(programs.pick(3, 100)):
        for n in range(40):
            programs.random_file(f"{work.name}/{n}/{commit}", 5000)
        programs.host(f"{GIT} -C {work} add . && {GIT} -C {work} commit -q -m {commit}")
    programs.host(f"{GIT} -C {work} push -q origin HEAD:main")
    return programs.host(f"{GIT} -C {work} rev-parse HEAD")


CHANGE = f"echo changed >changed && {GIT} add changed && {GIT} commit -q -m changed && {GIT} push -q origin HEAD:main"


@pytest.mark.program(
    "git", OUT, "clone and push over git:// and over smart HTTP (nginx)", "fsck of the clone, heads on both sides"
)
def test_git_with_the_host(programs: House, done: Done) -> None:
    port = programs.port()
    with contextlib.ExitStack() as stack:
        web = stack.enter_context(web_of_the_host(programs, "git-web"))
        bare = web.home / "git" / "repo"
        head = repository(programs, bare)
        options = (
            f"--base-path={bare.parent} --export-all --enable=receive-pack --listen={programs.here} --port={port} --reuseaddr"
        )
        stack.enter_context(programs.host_server("git-daemon", f"{GIT} daemon {options}", port))
        for name, url in (("over-git", f"git://{HOST}:{port}/repo"), ("over-http", f"{web.url}/git/repo")):
            assert programs.guest(f"git clone -q {url} {name} && cd {name} && git fsck --strict && git rev-parse HEAD") == head
            head = programs.guest(f"cd {name} && {CHANGE.replace('changed', name)} && git rev-parse HEAD")
            assert programs.host(f"{GIT} -C {bare} rev-parse main && {GIT} -C {bare} fsck --strict") == head
    done("2 clones, 2 pushes")


@pytest.mark.program("git", IN, "clone from and push to git daemon", "fsck of the clone, heads on both sides")
def test_git_with_the_guest(programs: House, done: Done) -> None:
    port, bare = programs.port(), programs.folder / "guest-repo"
    head = repository(programs, bare)
    programs.give(bare)
    daemon = f"{GIT} daemon --base-path=/var/tmp --export-all --enable=receive-pack --port={port} --reuseaddr"
    with programs.guest_server("git-daemon", daemon, port):
        clone = programs.folder / "clone"
        assert (
            programs.host(
                f"git clone -q git://{programs.there}:{port}/guest-repo {clone} && cd {clone} && git fsck && git rev-parse HEAD"
            )
            == head
        )
        head = programs.host(f"cd {clone} && {CHANGE} && git rev-parse HEAD")
        assert programs.guest(f"{GIT} -C guest-repo rev-parse main && {GIT} -C guest-repo fsck --strict") == head
    done("1 clone, 1 push")


# ---- apt


def packages_file(deb: Path, programs: House) -> str:
    """A flat repository's index, as apt-ftparchive writes it (Debian's RepositoryFormat)."""
    fields = programs.host(f"dpkg-deb -f {deb}")
    return f"{fields}\nFilename: ./{deb.name}\nSize: {deb.stat().st_size}\nSHA256: {sha256(deb)}\n"


@pytest.mark.program("apt", OUT, "update and download from a mirror on the host", "apt's own hashes, SHA-256 of the package")
def test_apt_updates(programs: House, done: Done) -> None:
    count = programs.pick(2, 50)
    with web_of_the_host(programs, "mirror") as web:
        mirror = web.home / "www" / "debian"
        mirror.mkdir()
        index = []
        for n in range(count):
            made = programs.random_file(f"deb{n}/usr/share/probe{n}", 300000).parents[2]
            (made / "DEBIAN").mkdir()
            control = (
                f"Package: probe{n}\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@host.test>\nDescription: probe\n"
            )
            (made / "DEBIAN" / "control").write_text(control)
            programs.host(f"dpkg-deb -b {made} {mirror}/probe{n}.deb")
            index.append(packages_file(mirror / f"probe{n}.deb", programs))
        (mirror / "Packages").write_text("\n".join(index))
        digest = hashlib.sha256((mirror / "Packages").read_bytes()).hexdigest()
        (mirror / "Release").write_text(f"Suite: test\nSHA256:\n {digest} {(mirror / 'Packages').stat().st_size} Packages\n")
        programs.guest(
            f"mkdir -p apt/lists/partial apt/parts && echo 'deb [trusted=yes] {web.url}/debian ./' >apt/sources.list"
        )
        where = "-o Dir::Etc::sourcelist=/var/tmp/apt/sources.list -o Dir::Etc::sourceparts=/var/tmp/apt/parts"
        where += " -o Dir::State::lists=/var/tmp/apt/lists -o Dir::State::status=/dev/null -o APT::Sandbox::User=root"
        names = " ".join(f"probe{n}" for n in range(count))
        programs.guest(f"apt-get {where} -q update && cd apt && apt-get {where} -q download {names}")
        got = sorted(programs.guest("sha256sum apt/*.deb | cut -d' ' -f1").split())
        assert got == sorted(sha256(path) for path in mirror.glob("*.deb"))
    done(f"{count} packages")


@pytest.fixture(autouse=True)
def _tidy(programs: House) -> Iterator[None]:
    """The guest's disk is not large."""
    yield
    programs.guest("rm -rf got sent pulled served over-git over-http apt")
