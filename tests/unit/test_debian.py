"""Packages of any suite: which version is taken, what the cache answers, what is refused. A signed archive of two
packages on disk stands in for a mirror; nothing here needs a network."""

import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from harness.cachedir import cache_directory
from harness.lab import debian
from harness.lab.debian import (
    FetchError,
    NetworkError,
    PackageNotFoundError,
    SignatureError,
    fetch_package,
    mirror,
    unpack,
)

TOOLS = ("apt-get", "dpkg-deb", "gpg", "gpgv")
needs_tools = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in TOOLS), reason=f"needs {', '.join(TOOLS)} (apt-get install apt gnupg gpgv)"
)
SUITE = "toy"


def run(*command, **more):
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True, **more).stdout


class Archive:
    """A Debian archive with one suite, signed with a key of its own."""

    def __init__(self, root, home):
        self.root, self.home = root, home
        self.env = {**os.environ, "GNUPGHOME": str(home)}
        home.mkdir(mode=0o700)
        run("gpg", "--batch", "--passphrase", "", "--quick-generate-key", "toy <toy@example.org>", "ed25519", "sign",
            "never", env=self.env)  # fmt: skip
        self.keyring = home / "keyring.gpg"
        run("gpg", "--batch", "--output", self.keyring, "--export", env=self.env)

    def add(self, name, version):
        tree = self.root / "tree"
        (tree / "DEBIAN").mkdir(parents=True)
        control = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: x <x@example.org>\n"
        (tree / "DEBIAN" / "control").write_text(f"{control}Description: x\n more of it\n")
        (tree / "usr").mkdir()
        (tree / "usr" / name).write_text(version)
        pool = self.root / "pool"
        pool.mkdir(exist_ok=True)
        deb = pool / f"{name}_{version.replace(':', '%3a')}_amd64.deb"
        run("dpkg-deb", "--root-owner-group", "--build", tree, deb)
        shutil.rmtree(tree)
        return deb

    def publish(self, *, sign=True):
        stanzas = []
        for deb in sorted((self.root / "pool").glob("*.deb")):
            sha256 = hashlib.sha256(deb.read_bytes()).hexdigest()
            stanzas.append(
                f"{run('dpkg-deb', '--field', deb)}Filename: pool/{deb.name}\nSize: {deb.stat().st_size}\n"
                f"SHA256: {sha256}\n"
            )
        folder = self.root / "dists" / SUITE
        packages = folder / "main" / "binary-amd64" / "Packages"
        packages.parent.mkdir(parents=True, exist_ok=True)
        packages.write_text("\n".join(stanzas))
        data = packages.read_bytes()
        now = time.strftime("%a, %d %b %Y %H:%M:%S UTC", time.gmtime())
        (folder / "Release").write_text(
            f"Suite: {SUITE}\nCodename: {SUITE}\nDate: {now}\nArchitectures: amd64\nComponents: main\nSHA256:\n"
            f" {hashlib.sha256(data).hexdigest()} {len(data)} main/binary-amd64/Packages\n"
        )
        (folder / "InRelease").unlink(missing_ok=True)
        if sign:
            run("gpg", "--batch", "--clearsign", "--output", folder / "InRelease", folder / "Release", env=self.env)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVM_HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    archive = Archive(folder / "debian", folder / "gnupg")
    archive.root.mkdir()
    for version in ("1.9-1", "1.10-1", "1.10~rc1-1"):
        archive.add("little", version)
    archive.add("little-dbg", "1.10-1")
    archive.publish()
    yield archive
    subprocess.run(["gpgconf", "--kill", "all"], env=archive.env, capture_output=True, check=False)


@pytest.fixture
def archive(made, cache, tmp_path, monkeypatch):
    """A copy of the archive that a test may damage, set up as the mirror."""
    copy = object.__new__(Archive)
    copy.__dict__.update(made.__dict__)
    copy.root = tmp_path / "debian"
    shutil.copytree(made.root, copy.root)
    monkeypatch.setenv("KVM_HARNESS_DEBIAN_MIRROR", f"copy:{copy.root}")
    monkeypatch.setattr(debian, "KEYRING", made.keyring)
    return copy


def unplug(monkeypatch):
    """Nothing listens there: as without a network."""
    monkeypatch.setenv("KVM_HARNESS_DEBIAN_MIRROR", "http://127.0.0.1:9/debian")


def age_lists(cache):
    for stamp in cache.glob("debian/apt/*/updated"):
        os.utime(stamp, (0, 0))


# --- fetching -------------------------------------------------------------------------------------------------------


@needs_tools
def test_the_newest_version_is_taken_and_stored_by_its_checksum(archive, cache):
    deb = fetch_package("little", SUITE)
    assert deb.name == "little_1.10-1_amd64.deb"
    assert deb.parent.name == hashlib.sha256(deb.read_bytes()).hexdigest()
    assert deb.is_relative_to(cache)


@needs_tools
def test_a_version_pattern_chooses(archive):
    assert fetch_package("little", SUITE, version="1.9*").name == "little_1.9-1_amd64.deb"
    assert fetch_package("little", SUITE, version="*rc*").name == "little_1.10~rc1-1_amd64.deb"


@needs_tools
def test_a_glob_that_fits_two_packages_is_refused(archive):
    with pytest.raises(PackageNotFoundError, match=r"ambiguous.*little, little-dbg"):
        fetch_package("little*", SUITE)
    assert fetch_package("little-*", SUITE).name.startswith("little-dbg")


@needs_tools
def test_what_is_not_there_is_named_with_what_is(archive):
    with pytest.raises(PackageNotFoundError, match="no package of that name"):
        fetch_package("nosuch", SUITE)
    with pytest.raises(PackageNotFoundError, match=r"it has little 1\.10-1, little 1\.10~rc1-1, little 1\.9-1"):
        fetch_package("little", SUITE, version="9*")


@needs_tools
def test_a_second_fetch_asks_no_mirror(archive, monkeypatch):
    deb = fetch_package("little", SUITE)
    unplug(monkeypatch)
    assert fetch_package("little", SUITE) == deb


@needs_tools
def test_without_a_network_the_cache_is_good_enough(archive, cache, monkeypatch):
    deb = fetch_package("little", SUITE)
    unplug(monkeypatch)
    age_lists(cache)
    assert fetch_package("little", SUITE) == deb
    assert fetch_package("lit*e", SUITE, version="1.10-*") == deb


@needs_tools
def test_what_the_mirror_has_dropped_stays_in_the_cache(archive, cache):
    old = fetch_package("little", SUITE, version="1.9-1")
    (archive.root / "pool" / "little_1.9-1_amd64.deb").unlink()
    archive.publish()
    age_lists(cache)
    assert fetch_package("little", SUITE, version="1.9-1") == old


@needs_tools
def test_a_newer_version_is_seen_once_the_lists_are_a_day_old(archive, cache):
    fetch_package("little", SUITE)
    archive.add("little", "2.0-1")
    archive.publish()
    assert fetch_package("little", SUITE).name == "little_1.10-1_amd64.deb"
    age_lists(cache)
    assert fetch_package("little", SUITE).name == "little_2.0-1_amd64.deb"


@needs_tools
def test_no_network_and_an_empty_cache_is_an_error_that_says_what_to_do(archive, monkeypatch):
    unplug(monkeypatch)
    with pytest.raises(NetworkError, match="check the network"):
        fetch_package("little", SUITE)


@needs_tools
def test_a_suite_that_the_mirror_does_not_have_is_named(archive):
    with pytest.raises(PackageNotFoundError, match="no suite of that name"):
        fetch_package("little", "toys")


@needs_tools
def test_lists_signed_by_somebody_else_are_refused(archive, tmp_path, monkeypatch):
    other = Archive(tmp_path / "unused", tmp_path / "other")
    monkeypatch.setattr(debian, "KEYRING", other.keyring)
    with pytest.raises(SignatureError, match="debian-archive-keyring"):
        fetch_package("little", SUITE)
    subprocess.run(["gpgconf", "--kill", "all"], env=other.env, capture_output=True, check=False)


@needs_tools
def test_unsigned_lists_are_refused(archive):
    archive.publish(sign=False)
    with pytest.raises(FetchError):
        fetch_package("little", SUITE)


@needs_tools
def test_a_package_that_is_not_what_the_lists_say_is_refused(archive, cache):
    deb = archive.root / "pool" / "little_1.10-1_amd64.deb"
    data = bytearray(deb.read_bytes())
    data[-1] ^= 1
    deb.write_bytes(data)
    with pytest.raises(SignatureError):
        fetch_package("little", SUITE)
    assert not list(cache.glob("debian/deb/*/*.deb"))


@needs_tools
def test_the_machines_own_apt_is_left_alone(archive, cache):
    def lists():
        return {p: p.stat().st_mtime_ns for p in (Path("/var/lib/apt/lists"), Path("/var/cache/apt"), Path("/etc/apt"))}

    before = lists()
    fetch_package("little", SUITE)
    assert lists() == before


@pytest.mark.parametrize("suite", ["", "Bookworm", "a b", "../x", "bookworm; true"])
def test_what_is_no_suite_is_refused(cache, suite):
    with pytest.raises(FetchError, match="is no name of a Debian suite"):
        fetch_package("little", suite)


# --- unpacking ------------------------------------------------------------------------------------------------------


@needs_tools
def test_unpacking_into_the_cache_is_done_once(archive):
    deb = fetch_package("little", SUITE)
    first = unpack(deb)
    assert (first / "usr" / "little").read_text() == "1.10-1"
    assert unpack(deb) == first


@needs_tools
def test_several_packages_may_share_a_directory(archive, tmp_path):
    dest = tmp_path / "root"
    for name in ("little", "little-dbg"):
        assert unpack(fetch_package(name, SUITE), dest) == dest
    assert sorted(p.name for p in (dest / "usr").iterdir()) == ["little", "little-dbg"]


@needs_tools
def test_a_damaged_package_is_said_and_leaves_nothing(cache, tmp_path):
    (tmp_path / "x.deb").write_bytes(b"no package")
    with pytest.raises(FetchError, match="cannot be unpacked"):
        unpack(tmp_path / "x.deb")
    assert not [p for p in (cache / "debian" / "unpacked").iterdir() if not p.name.startswith(".new")]
    with pytest.raises(FetchError, match="fetch the package again"):
        unpack(tmp_path / "none.deb")


# --- small tools ----------------------------------------------------------------------------------------------------


def test_cache_directory(monkeypatch):
    monkeypatch.setenv("KVM_HARNESS_CACHE", "/a/b")
    assert cache_directory() == Path("/a/b")
    monkeypatch.delenv("KVM_HARNESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_directory() == Path("/x/kvm-harness")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert cache_directory() == Path("/h/.cache/kvm-harness")


def test_stanzas():
    fields = debian._fields("Package: x\nChecksums-Sha256:\n aa 1 x.dsc\n bb 2 x.tar.xz\nVersion: 1:2.3-4")
    assert fields["Package"] == "x"
    assert fields["Version"] == "1:2.3-4"
    assert fields["Checksums-Sha256"].split("\n")[1:] == ["aa 1 x.dsc", "bb 2 x.tar.xz"]


@pytest.mark.skipif(not shutil.which("dpkg"), reason="no dpkg")
def test_versions_are_in_debians_order():
    versions = ["1.10-1", "1.9-1", "1:0.1-1", "1.10~rc1-1", "1.10-1~bpo12+1", "1.10-1+b1"]
    assert sorted(versions, key=debian._version_key) == [
        "1.9-1", "1.10~rc1-1", "1.10-1~bpo12+1", "1.10-1", "1.10-1+b1", "1:0.1-1"
    ]  # fmt: skip


def configured(monkeypatch, *pairs, codename="bookworm"):
    monkeypatch.delenv("KVM_HARNESS_DEBIAN_MIRROR", raising=False)
    monkeypatch.setattr(debian, "_configured_suites", lambda: list(pairs))
    monkeypatch.setattr(debian, "_debian_codename", lambda: codename)


def test_the_mirror_is_the_one_that_the_machine_uses(monkeypatch):
    main, security = ("http://a/debian", "bookworm"), ("http://a/debian-security", "bookworm-security")
    backports = ("http://b/debian", "bookworm-backports")
    configured(monkeypatch, main, security, backports)
    assert mirror("bookworm-backports") == "http://b/debian"
    assert mirror("trixie") == "http://a/debian"
    assert mirror("trixie-security") == "http://a/debian-security"


def test_a_foreign_machine_takes_any_debian_archive_or_says_what_to_set(monkeypatch):
    configured(monkeypatch, ("http://u/ubuntu", "noble"), ("http://d/debian", "sid"), codename="")
    assert mirror("bookworm") == "http://d/debian"
    configured(monkeypatch, ("http://u/ubuntu", "noble"), codename="")
    with pytest.raises(FetchError, match="KVM_HARNESS_DEBIAN_MIRROR"):
        mirror("bookworm")
    monkeypatch.setenv("KVM_HARNESS_DEBIAN_MIRROR", "http://mine/debian/")
    assert mirror("bookworm") == "http://mine/debian"
