"""kvm-harness: the command line. Thin: every verb calls one function."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.case import Case, CaseError, load_case
from harness.guest import GuestError
from harness.host import Host
from harness.journal import JournalError, read_journal
from harness.known import KnownError
from harness.verdict import BAD_INPUT, INTERRUPTED, NO_KVM, Verdict, exit_status
from harness.vm import DEFAULT_DEVICE, Kvm, KvmUnusableError

if TYPE_CHECKING:
    import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
MAX_WORKERS: Final = 4 * (os.cpu_count() or 1)
OUT: Final = Path("out")
_STATUSES: Final = (
    "exit status: 0 agrees, 1 mismatch or splat, 2 bad input or nothing selected, 3 no usable KVM, 4 lost "
    "(infrastructure), 130 interrupted"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (harness/verdict.py)."""
    try:
        args = _parser().parse_args(argv)
        status: int = args.function(args)
        sys.stdout.flush()
        return status
    except KvmUnusableError as error:
        return _fail(str(error), NO_KVM)
    except JournalError as error:
        return _fail(str(error), error.status)
    except (CaseError, KnownError, GuestError) as error:
        return _fail(str(error), BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _fail(f"{error.strerror}: make room, or send the output elsewhere", Verdict.LOST.status)


def _fail(text: str, status: int) -> int:
    print(f"kvm-harness: {text}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvm-harness",
        description="Runs tiny guests on real KVM and compares every register with an independent model.",
        epilog=_STATUSES,
    )
    verbs = parser.add_subparsers(required=True, metavar="command")

    def verb(name: str, function: object, text: str, example: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name, help=text, description=text, epilog=f"example: {example}\n\n{_STATUSES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        made.set_defaults(function=function)
        made.add_argument("--kvm-device", type=Path, default=DEFAULT_DEVICE, metavar="PATH", help="default: /dev/kvm")
        return made

    probe = verb("probe", _probe, "What this host's KVM can do, found by trying it.", "kvm-harness probe --json")
    probe.add_argument("--json", action="store_true", help="everything, for programs")

    run = verb(
        "run", _run, "The register suite on this machine's KVM.", "kvm-harness run -k 'mmio and not real' -n 2"
    )
    run.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: a new one under out/)")
    run.add_argument("-k", metavar="EXPR", help="only Cases whose name matches, as in pytest: 'gpr and long'")
    run.add_argument("-n", type=int, default=0, metavar="N", help="worker processes (default: this one only)")
    run.add_argument("--fail-fast", action="store_true", help="stop at the first mismatch")

    replay = verb(
        "replay", _replay, "One Case again, in full detail; or as one self-contained C file.",
        "kvm-harness replay 3f2a9c17b0de --emit-c > reproducer.c",
    )  # fmt: skip
    replay.add_argument("case", metavar="ID_OR_FILE", help="a Case's id (12 hex digits), name, or file")
    replay.add_argument("--emit-c", action="store_true", help="print a C program that shows the same with no harness")

    report = verb("report", _report, "A view of a run's journal.", "kvm-harness report out/20261123-120000")
    report.add_argument("folder", type=Path, metavar="DIR")
    return parser


def _probe(args: argparse.Namespace) -> int:
    with Kvm(args.kvm_device) as kvm:
        host = Host(kvm)
        try:
            found = host.to_json()
        finally:
            host.close()
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"host          {host.describe()}")
    print(f"device        {found['device']}, {len(found['capabilities'])} capabilities")
    print(f"guest CPU     {found['vendor']}, {len(found['features'])} known features, APX: {_yes(found['apx'])}")
    for mode, bad in found["modes"].items():
        step = bad or f"single step: {_yes(found['single_step'][mode])}"
        print(f"mode          {mode:12s} {'runs' if not bad else 'no'}; {step}")
    for mode, odd in found["exception_delivery"].items():
        print(f"exceptions    {mode:12s} {odd or 'delivered'}")
    for name, modes in found["emulator_lacks"].items():
        print(f"lacks         {name:12s} in {', '.join(modes)}")
    for name, bad in found["traits"].items():
        print(f"trait         {name}: {bad or 'yes'}")
    return 0


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _run(args: argparse.Namespace) -> int:
    import pytest

    Kvm(args.kvm_device).close()
    out = args.out or _new_folder()
    options = [
        str(ROOT / "tests" / "kvm" / "test_registers.py"), "-c", str(ROOT / "pyproject.toml"), "--tb=short",
        "--no-header", "-p", "no:cacheprovider", "-p", "no:logging", "--capture=no", "-p", "no:unraisableexception",
        "-p", "no:threadexception", f"--kvm-device={args.kvm_device}", f"--kvm-out={out}",
    ]  # fmt: skip
    if args.k is not None:
        options.append(f"-k={args.k}")
    if not 0 <= args.n <= MAX_WORKERS:
        return _fail(f"-n {args.n}: give 0 (no workers) to {MAX_WORKERS}", BAD_INPUT)
    if args.n:
        options += ["-n", str(args.n)]
    if args.fail_fast:
        options.append("-x")
    ending = _Ending()
    status = int(pytest.main(options, plugins=[ending]))
    if ending.problem is not None:
        return _fail(*ending.problem)
    if ending.interrupted:
        return _fail(f"interrupted; finished results are in {out}", INTERRUPTED)
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        return _fail(f"no Case matches -k {args.k!r}; names look like gpr/mov_r32_rcx@long#0", BAD_INPUT)
    if status == pytest.ExitCode.USAGE_ERROR:
        return BAD_INPUT
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return Verdict.LOST.status  # pytest's own internal error
    print(f"results: {out}")
    records = [r for r in read_journal(out) if "case" in r]
    decided = exit_status(Verdict(r["verdict"]) for r in records)
    if status == pytest.ExitCode.TESTS_FAILED and decided == 0:
        return Verdict.LOST.status  # a Case ended without a verdict: the harness itself failed
    return decided


class _Ending:
    """Plugin: how pytest ended, where its exit status does not tell (4 is its usage error, and our "lost")."""

    def __init__(self) -> None:
        self.problem: tuple[str, int] | None = None
        self.interrupted = False

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        self.interrupted = isinstance(excinfo.value, KeyboardInterrupt)

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        from harness.pytest_plugin import ending_key

        self.problem = config.stash.get(ending_key, None)


def _new_folder() -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = OUT / stamp
    number = 1
    while folder.exists():
        number += 1
        folder = OUT / f"{stamp}-{number}"
    return folder


def _find_case(text: str, host: Host) -> Case:
    """A Case by file, by id or by name."""
    from harness.paths import all_cases

    path = Path(text)
    if path.is_dir():
        raise CaseError(f"{path}: is a folder; give one of its .json files")
    if path.suffix == ".json" or path.is_file():
        return load_case(path)
    for kept in sorted(OUT.glob(f"*/cases/{text}*.json")):
        return load_case(kept)
    found = [c for c in all_cases(host.profile) if c.name == text]
    if not found:
        found = [c for c in all_cases(host.profile) if len(text) >= 4 and c.id.startswith(text)]
    if not found:
        raise CaseError(f"no Case with id or name {text!r} on this host; a run's --out folder has all in journal.jsonl")
    return found[0]


def _replay(args: argparse.Namespace) -> int:
    from harness.judge import Runner
    from harness.known import load_known
    from harness.machine import KvmMachine
    from harness.reference.cpu import ModelError
    from harness.reference.machine import ReferenceMachine
    from harness.report.emit_c import EmitError, emit_c
    from harness.report.failure import failure_text

    with Kvm(args.kvm_device) as kvm, KvmMachine(kvm) as machine:
        host = Host(kvm)
        case = _find_case(args.case, host)
        try:
            result = Runner(machine, host, load_known()).run(case, ReferenceMachine())
        except ModelError as error:
            return _fail(f"{case.name}: the model cannot run this guest: {error}", BAD_INPUT)
        where = host.describe()
        host.close()
    if args.emit_c:
        if result.verdict is Verdict.UNSUPPORTED:
            print(f"kvm-harness: note: no defect, a limit of this host: {result.summary}", file=sys.stderr)
        try:
            print(emit_c(case, result.difference, where), end="")
        except EmitError as error:
            return _fail(str(error), BAD_INPUT)
        return 0
    print(f"{case.name} {case.id}: {result.verdict.value}, {result.checks} checks {result.summary}".rstrip())
    if result.difference is not None:
        print(failure_text(case, result.difference, where))
    return exit_status([result.verdict]) if result.verdict is not Verdict.UNSUPPORTED else 0


def _report(args: argparse.Namespace) -> int:
    from harness.pytest_plugin import summary_lines

    header, *lines = read_journal(args.folder)
    records = [r for r in lines if "case" in r]
    print(f"{header['host']}, started {header['started']}")
    for record in records:
        if Verdict(record["verdict"]) not in (Verdict.AGREE, Verdict.UNSUPPORTED):
            print(f"{record['verdict']:10s} {record['id']} {record['case']}: {record['summary']}")
    for line in summary_lines(records):
        print(line)
    if not any("finished" in r for r in lines):
        return _fail("incomplete: the run was interrupted or lost before its end", Verdict.LOST.status)
    return exit_status(Verdict(r["verdict"]) for r in records)


if __name__ == "__main__":
    sys.exit(main())
