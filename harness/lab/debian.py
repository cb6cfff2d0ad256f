"""Packages of any Debian suite, fetched by apt with its signature checks on, beside the machine's own apt.

Everything lives in the cache directory (`~/.cache/kvm-harness`, or `KVM_HARNESS_CACHE`), under `debian/`:

    apt/<suite>[.source]/    a private apt: its lists, its configuration, its lock
    deb/<sha256>/<file>      one package (or one source package with its tarballs), never changed once there
    by-suite/<suite>/        links into deb/, by package and version: what is here without asking any mirror
    unpacked/<sha256>/       packages unpacked by `unpack(deb)`

The mirror is the one that the machine's own apt uses (or `KVM_HARNESS_DEBIAN_MIRROR`); the machine's apt settings for
proxies and certificates hold, its sources, lists and package state are neither read by the private apt nor written.
Any number of processes may fetch at once: a file lock guards each suite, and a package appears by one rename.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import fnmatch
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.cachedir import cache_directory

ARCHITECTURE: Final = "amd64"
KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
LISTS_LIFETIME: Final = 24 * 3600.0  # seconds after which a suite's package lists are fetched anew

_PROBLEM_LINES: Final = re.compile(r"^(?:[EW]|Err).*", re.MULTILINE)
_BAD_SIGNATURE: Final = re.compile(
    r"NO_PUBKEY|BADSIG|EXPKEYSIG|REVKEYSIG|is not signed|signatures? (?:were|was|couldn't)|GPG error|Clearsigned file"
    r"|Hash Sum mismatch|unexpected size|not valid yet|is expired"
)


class FetchError(Exception):
    """A package could not be had; the text says what to do next."""


class NetworkError(FetchError):
    """The mirror does not answer, or does not serve a file of its own lists, and the cache has nothing that fits."""


class PackageNotFoundError(FetchError):
    """The suite, or the package in that suite, does not exist."""


class SignatureError(FetchError):
    """Something that was fetched does not carry the signature or the checksum that it must."""


class _Kind(enum.Enum):
    BINARY = "deb"
    SOURCE = "deb-src"


@dataclass(frozen=True)
class _Candidate:
    """One version of one package, as the suite's signed lists describe it."""

    package: str
    version: str
    sha256: str  # of the .deb, or of the .dsc
    filename: str  # base name of the .deb or .dsc


def fetch_package(name_or_glob: str, suite: str, *, version: str = "*") -> Path:
    """Path of the newest binary package (.deb) that matches in a suite such as `bookworm-backports`.

    Both `name_or_glob` and `version` are shell patterns. The suite's lists are fetched when they are older than a day,
    or when they do not have the package; without a network, or once the mirror has dropped the version, what the cache
    has is good enough. Raises FetchError: NetworkError, PackageNotFoundError or SignatureError.
    """
    return _fetch(name_or_glob, suite, version, _Kind.BINARY)


def fetch_source(name_or_glob: str, suite: str, *, version: str = "*") -> Path:
    """Path of the .dsc of the newest source package that matches; its tarballs are beside it. See `fetch_package`."""
    return _fetch(name_or_glob, suite, version, _Kind.SOURCE)


def unpack(deb: Path, dest: Path | None = None) -> Path:
    """Unpack a .deb (files only: no maintainer script runs) and return the directory.

    Without `dest` into the cache, once for ever: do not change what is in there. With `dest` into that directory, which
    may exist and have other packages in it already. Raises FetchError if the package cannot be read.
    """
    if dest is not None:
        dest.mkdir(parents=True, exist_ok=True)
        _dpkg_extract(deb, dest)
        return dest
    target = _area("unpacked") / _sha256(deb)
    if not target.is_dir():
        with _scratch_beside(target) as scratch:
            _dpkg_extract(deb, scratch)
            _publish(scratch, target)
    return target


def mirror(suite: str) -> str:
    """URI of the Debian archive that has `suite`, as this machine's own apt configuration names it.

    `KVM_HARNESS_DEBIAN_MIRROR` overrides it (needed where the machine is not a Debian). Raises FetchError.
    """
    if override := os.environ.get("KVM_HARNESS_DEBIAN_MIRROR"):
        return override.rstrip("/")
    configured = _configured_suites()
    security = suite.endswith("-security")
    codename = _debian_codename()
    # Best the archive that already serves this very suite, then the one this Debian came from, then any Debian archive.
    choices = [
        *(uri for uri, known in configured if known == suite),
        *(uri for uri, known in configured if codename and known == codename + ("-security" if security else "")),
        *(uri for uri, _ in configured if uri.rsplit("/", 1)[-1] == ("debian-security" if security else "debian")),
    ]
    if not choices:
        raise FetchError(
            f"this machine's apt has no Debian archive to get {suite} from: set KVM_HARNESS_DEBIAN_MIRROR to the URI "
            "of one (the directory that holds dists/ and pool/)"
        )
    return choices[0]


# --- which version, and where from -----------------------------------------------------------------------------------


def _fetch(pattern: str, suite: str, version: str, kind: _Kind) -> Path:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", suite):
        raise FetchError(f"{suite!r} is no name of a Debian suite: expected one such as bookworm or trixie-backports")
    apt = _PrivateApt(suite, kind)
    with apt.locked():
        problem: FetchError | None = None
        candidate = None if apt.stale() else apt.newest(pattern, version)
        if candidate is None and (apt.stale() or not _kept(pattern, suite, version, kind)):
            try:
                apt.update()
            except NetworkError as error:
                problem = error
            candidate = apt.newest(pattern, version)
        if candidate is not None and (stored := _stored(candidate)):
            _remember(suite, candidate, stored)
            return stored
        if candidate is not None and problem is None:
            try:
                return apt.download(candidate)
            except NetworkError as error:
                problem = error
            # Lists of a few hours may name a version that the mirror has replaced since.
            with contextlib.suppress(NetworkError):
                apt.update()
                newer = apt.newest(pattern, version)
                if newer is not None and newer != candidate:
                    return _stored(newer) or apt.download(newer)
        if kept := _kept(pattern, suite, version, kind):
            return kept
        raise problem or apt.not_found(pattern, version)


def _area(name: str) -> Path:
    return cache_directory() / "debian" / name


def _stored(candidate: _Candidate) -> Path | None:
    """The file of that candidate, if the cache has it."""
    path = _area("deb") / candidate.sha256 / candidate.filename
    return path if path.is_file() else None


def _kept(pattern: str, suite: str, version: str, kind: _Kind) -> Path | None:
    """The newest matching file that this suite once had and the cache still has."""
    suffix = ".deb" if kind is _Kind.BINARY else ".dsc"
    found: list[tuple[str, Path]] = []
    for link in _area("by-suite").joinpath(suite).glob(f"*{suffix}"):
        package, known = map(urllib.parse.unquote, link.name.removesuffix(suffix).split("_", 1))
        if fnmatch.fnmatchcase(package, pattern) and fnmatch.fnmatchcase(known, version) and link.is_file():
            found.append((known, link.resolve()))
    return max(found, key=lambda pair: _version_key(pair[0]))[1] if found else None


def _remember(suite: str, candidate: _Candidate, stored: Path) -> None:
    directory = _area("by-suite") / suite
    directory.mkdir(parents=True, exist_ok=True)
    link = directory / f"{candidate.package}_{urllib.parse.quote(candidate.version, safe='~+')}{stored.suffix}"
    if link.is_symlink() and link.resolve() == stored.resolve():
        return
    fresh = directory / f".{link.name}.{os.getpid()}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(stored, directory))
    fresh.replace(link)


class _PrivateApt:
    """An apt of our own for one suite: its own sources, lists and package state."""

    def __init__(self, suite: str, kind: _Kind) -> None:
        self.suite = suite
        self.kind = kind
        self.root = _area("apt") / (suite if kind is _Kind.BINARY else f"{suite}.source")
        self.configuration = self.root / "apt.conf"
        self.sources = self.root / "sources.list"
        self.stamp = self.root / "updated"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this suite for this process; others wait."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise FetchError(
                f"{error.filename}: {error.strerror}: set KVM_HARNESS_CACHE to a directory of yours"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def stale(self) -> bool:
        try:
            age = time.time() - self.stamp.stat().st_mtime
        except FileNotFoundError:
            return True
        return not 0 <= age < LISTS_LIFETIME

    def update(self) -> None:
        """Fetch the suite's signed lists. Where that fails apt keeps those it has, so they are still good to search."""
        signed_by = f" signed-by={KEYRING}" if KEYRING.is_file() else ""
        options = f"[arch={ARCHITECTURE}{signed_by}]"
        self._configure()
        self.sources.write_text(f"{self.kind.value} {options} {mirror(self.suite)} {self.suite} main\n")
        self._run("apt-get", "update", "--quiet=2", "--option=Acquire::Retries=1")
        self.stamp.touch()

    def newest(self, pattern: str, version: str) -> _Candidate | None:
        """The newest matching package of the lists that are here. Raises FetchError where the pattern is ambiguous."""
        if not self.sources.is_file():
            return None
        self._configure()
        found = [
            candidate
            for candidate in self._candidates()
            if fnmatch.fnmatchcase(candidate.package, pattern) and fnmatch.fnmatchcase(candidate.version, version)
        ]
        if not found:
            return None
        best = max(found, key=lambda candidate: _version_key(candidate.version))
        names = sorted({candidate.package for candidate in found if candidate.version == best.version})
        if len(names) > 1:
            shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            raise PackageNotFoundError(
                f"{pattern!r} is ambiguous in {self.suite}: version {best.version} of {shown} all match; name one"
            )
        return best

    def download(self, candidate: _Candidate) -> Path:
        """Fetch one package, which apt checks against the signed lists, into the cache."""
        what = f"{candidate.package}={candidate.version}"
        target = _area("deb") / candidate.sha256
        with _scratch_beside(target) as scratch:
            if self.kind is _Kind.BINARY:
                self._run("apt-get", "download", "--quiet=2", what, cwd=scratch)
            else:
                self._run("apt-get", "source", "--download-only", "--only-source", "--quiet=2", what, cwd=scratch)
            suffix = ".deb" if self.kind is _Kind.BINARY else ".dsc"
            files = [path for path in scratch.iterdir() if path.suffix == suffix]
            if len(files) != 1:
                raise NetworkError(f"apt said it fetched {what} of {self.suite}, but left no {suffix} file: try again")
            if (got := _sha256(files[0])) != candidate.sha256:
                raise SignatureError(
                    f"{what} of {self.suite} has sha256 {got}, its signed list says {candidate.sha256}: do not use it; "
                    "try again, and if it stays so, the mirror or a proxy is at fault"
                )
            files[0].rename(scratch / candidate.filename)
            _publish(scratch, target)
        stored = target / candidate.filename
        _remember(self.suite, candidate, stored)
        return stored

    def not_found(self, pattern: str, version: str) -> FetchError:
        wanted = repr(pattern) + ("" if version == "*" else f" in a version like {version!r}")
        here = sorted(
            {f"{c.package} {c.version}" for c in self._candidates() if fnmatch.fnmatchcase(c.package, pattern)}
        )
        if here:
            hint = "it has " + ", ".join(here[:6]) + (", ..." if len(here) > 6 else "")
        else:
            hint = f"no {'package' if self.kind is _Kind.BINARY else 'source package'} of that name is in its lists"
        return PackageNotFoundError(
            f"{wanted} is not in Debian's {self.suite}: {hint}. Ask for another version or suite, or take the file "
            "from a cache that has it (KVM_HARNESS_CACHE)"
        )

    def _configure(self) -> None:
        """Write the configuration, which apt reads after the machine's own; each time, for a cache may be moved."""
        for name in ("lists/partial", "archives/partial", "parts"):
            self.root.joinpath(name).mkdir(parents=True, exist_ok=True)
        self.root.joinpath("status").touch()
        quoted = {
            "Dir::State": self.root,
            "Dir::State::lists": self.root / "lists",
            "Dir::State::status": self.root / "status",
            "Dir::Cache": self.root,
            "Dir::Cache::archives": self.root / "archives",
            "Dir::Etc::sourcelist": self.sources,
            "Dir::Etc::sourceparts": self.root / "parts",
            "Dir::Etc::preferences": self.root / "parts" / "none",
            "Dir::Etc::preferencesparts": self.root / "parts",
            "APT::Architecture": ARCHITECTURE,
            "APT::Update::Error-Mode": "any",
            # The cache may be in a home that apt's own user cannot enter.
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Acquire::http::Timeout": "30",
            "Acquire::https::Timeout": "30",
            # Signatures are checked whatever the machine's own apt allows itself.
            "APT::Get::AllowUnauthenticated": "false",
            "Acquire::AllowInsecureRepositories": "false",
            "Acquire::AllowWeakRepositories": "false",
            "Acquire::AllowDowngradeToInsecureRepositories": "false",
        }
        # The machine's hooks tell its desktop of new packages, and its other architectures are not ours.
        cleared = ("APT::Architectures", "APT::Update", "DPkg::Pre-Invoke", "DPkg::Post-Invoke")
        text = "".join(f"#clear {name};\n" for name in cleared)
        text += "".join(f'{name} "{value}";\n' for name, value in quoted.items())
        self.configuration.write_text(text)

    def _run(self, tool: str, *arguments: str, cwd: Path | None = None) -> str:
        command = [tool, f"--config-file={self.configuration}", *arguments]
        done = _command(command, cwd=cwd)
        if done.returncode == 0:
            return done.stdout
        said = done.stderr + done.stdout
        problem = "; ".join(dict.fromkeys(line.strip() for line in _PROBLEM_LINES.findall(said))) or said.strip()
        about = f"apt could not get {' '.join(arguments[-1:])} for Debian's {self.suite}: {problem}"
        if arguments[0] == "update":
            about = f"apt could not get the package lists of Debian's {self.suite}: {problem}"
        if _BAD_SIGNATURE.search(said):
            raise SignatureError(
                f"{about}\nA signature, checksum or date is not good: try again (the mirror may be changing), check "
                "this machine's clock, install a newer debian-archive-keyring, or look for a proxy that alters it"
            )
        if "does not have a Release file" in said and "Failed to fetch" not in said:
            raise PackageNotFoundError(f"{about}\nThe mirror has no suite of that name: check its spelling")
        raise NetworkError(
            f"{about}\nNothing in {cache_directory()} fits either: check the network (and apt's proxy settings), or "
            "set KVM_HARNESS_CACHE to a cache that was filled before"
        )

    def _candidates(self) -> Iterator[_Candidate]:
        created_by = "Packages" if self.kind is _Kind.BINARY else "Sources"
        listed = self._run("apt-get", "indextargets", "--format", "$(FILENAME)", f"Created-By: {created_by}")
        for filename in listed.split():
            # apt may keep its lists compressed; this is its own way to read them.
            text = _command([str(_apt_helper()), "cat-file", filename]).stdout
            for stanza in text.split("\n\n"):
                fields = _fields(stanza)
                if self.kind is _Kind.BINARY and "SHA256" in fields:
                    yield _Candidate(
                        fields["Package"], fields["Version"], fields["SHA256"], fields["Filename"].rsplit("/", 1)[-1]
                    )
                elif self.kind is _Kind.SOURCE:
                    for line in fields.get("Checksums-Sha256", "").splitlines():
                        if line.endswith(".dsc"):
                            sha256, _, filename = line.split()
                            yield _Candidate(fields["Package"], fields["Version"], sha256, filename)


# --- small tools -----------------------------------------------------------------------------------------------------


def _command(command: Sequence[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, cwd=cwd, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise FetchError(
            f"{command[0]} is not on this machine: Debian's packages are fetched with apt and dpkg, install them"
        ) from error


def _fields(stanza: str) -> dict[str, str]:
    """The fields of one stanza of a control file; continuation lines are joined with newlines."""
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line[:1] in (" ", "\t"):
            fields[name] = f"{fields.get(name, '')}\n{line.strip()}"
        else:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    return fields


@functools.cmp_to_key
def _version_key(left: str, right: str) -> int:
    """Debian's order of versions, by the tool that defines it."""
    if left == right:
        return 0
    older = _command(["dpkg", "--compare-versions", left, "lt", right]).returncode == 0
    return -1 if older else 1


def _configured_suites() -> list[tuple[str, str]]:
    """(archive URI, suite) of each archive of the machine's apt, whose lists need not have been fetched."""
    printed = _command(["apt-get", "update", "--print-uris"]).stdout
    return re.findall(r"^'(\S+?)/+dists/(\S+)/InRelease'", printed, re.MULTILINE)


def _debian_codename() -> str:
    try:
        release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    except OSError:
        return ""
    return release.get("VERSION_CODENAME", "").strip('"') if release.get("ID", "").strip('"') == "debian" else ""


def _apt_helper() -> Path:
    shown = _command(["apt-config", "shell", "directory", "Dir::Bin::methods/d"]).stdout
    methods = shown.partition("=")[2].strip().strip("'")
    return Path(methods or "/usr/lib/apt/methods").parent / "apt-helper"


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FetchError(f"{path}: {error.strerror}: fetch the package again") from error


def _dpkg_extract(deb: Path, dest: Path) -> None:
    done = _command(["dpkg-deb", "--extract", str(deb), str(dest)])
    if done.returncode:
        raise FetchError(
            f"{deb} cannot be unpacked: {done.stderr.strip()}: if the cache has it, remove it there and fetch it again"
        )


@contextlib.contextmanager
def _scratch_beside(target: Path) -> Iterator[Path]:
    """An empty directory on the target's file system, gone afterwards unless it was published."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(scratch: Path, target: Path) -> None:
    """Make a finished directory appear under its name, unless another process was faster."""
    scratch.chmod(0o755)
    try:
        scratch.rename(target)
    except OSError:
        if not target.is_dir():
            raise
