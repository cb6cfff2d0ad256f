"""kvm-harness: the command line. Thin: every verb calls one function, and imports what it needs when it is called."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final, TextIO

from harness.manual import PAGES
from harness.options import positive
from harness.verdict import BAD_INPUT, INTERRUPTED, NO_KVM, Verdict, exit_status

if TYPE_CHECKING:
    from harness.journal import RunResults
    from harness.replay import Replay

Verbs = argparse._SubParsersAction  # argparse has no public name for what add_subparsers() returns
ABORT_BISECT: Final = 128
"""What tells `git bisect run` to stop."""
MAX_WORKERS: Final = 4 * (os.cpu_count() or 1)
FORMATS: Final = {"text": "report.txt", "html": "report.html", "junit": "junit.xml", "ktap": "report.ktap"}
"""Views of a journal, with the file that each becomes beside it when several are asked for."""
_STATUSES: Final = """exit status, unless the command's own --help says otherwise:
  0 agrees, 1 mismatch, splat or regressed, 2 bad input or nothing selected,
  3 no usable KVM, 4 lost (infrastructure), 130 interrupted"""
_EXAMPLES: Final = """examples:
  kvm-harness run                           the register suite here
  kvm-harness run -k 'mmio and not user'    a part of it
  kvm-harness replay 'alu/add_rr_b@long#0'  one case again, in full detail
  kvm-harness lab run --debian 6.12         on that kernel, nested in QEMU
  kvm-harness series v7.3.. --tree ~/linux  a verdict for every patch since v7.3
  kvm-harness compare out/before out/after  two runs side by side
  kvm-harness COMMAND --help                what a command does, with examples"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (harness/verdict.py)."""
    try:
        signal.signal(signal.SIGINT, _interrupt)
        words = sys.argv[1:] if argv is None else list(argv)
        args, rest = _parser(words[:1] == ["lab"]).parse_known_args(words)
        if rest:
            args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
        if not hasattr(args, "function"):
            return fail("give a command, for example: kvm-harness run (kvm-harness --help lists them all)", BAD_INPUT)
        status: int = args.function(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except SystemExit as error:  # argparse's: to git bisect, its 2 would mean a bad commit
        if error.code == BAD_INPUT and words[:1] == ["bisect-run"]:
            return ABORT_BISECT
        raise
    except BrokenPipeError:
        _discard(sys.stdout)
        _discard(sys.stderr)
        return ABORT_BISECT if words[:1] == ["bisect-run"] else 0  # which would mean a good commit
    except Exception as error:
        expected = _status_of(error)
        if words[:1] == ["bisect-run"]:  # nothing of ours may look like a bad commit
            if expected is None:
                traceback.print_exc()
            return fail(f"{error}", ABORT_BISECT)
        if expected is None:
            raise
        return fail(f"{error}", expected)


def fail(text: str, status: int) -> int:
    """Say why on stderr, if anybody listens there; returns ``status``."""
    try:
        print(f"kvm-harness: {text}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        _discard(sys.stderr)
    return status


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The first Ctrl-C ends things in order, a second one at once. (Journals have whole lines at any moment.)"""
    signal.signal(signal.SIGINT, _interrupt_again)
    raise KeyboardInterrupt


def _interrupt_again(number: int, frame: FrameType | None) -> None:
    os.write(2, b"kvm-harness: interrupted\n")
    os._exit(INTERRUPTED)


def _discard(stream: TextIO) -> None:
    """Nobody reads any more: what is left to be written goes nowhere, or Python would end with a status of its own."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _status_of(error: Exception) -> int | None:
    """The exit status of an error whose text is all that the user needs, None for a defect of the harness."""
    from harness.case import CaseError
    from harness.guest import GuestError
    from harness.journal import JournalError
    from harness.known import KnownError
    from harness.lab.debian import FetchError
    from harness.lab.errors import LabError
    from harness.reference.cpu import ModelError
    from harness.report.emit_c import EmitError
    from harness.selection import SelectionError
    from harness.vm import KvmUnusableError

    match error:
        case KvmUnusableError():
            return NO_KVM
        case JournalError() | LabError():
            return error.status
        case FetchError():
            return Verdict.LOST.status
        case CaseError() | KnownError() | GuestError() | SelectionError() | ModelError() | EmitError():
            return BAD_INPUT
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            error.args = (f"{error.strerror}: make room, or send the output elsewhere",)
            return Verdict.LOST.status
        case _:
            status = getattr(error, "status", None)
            return status if isinstance(status, int) else None


# --- verbs ------------------------------------------------------------------------------------------------------------


def _parser(with_lab: bool = True) -> argparse.ArgumentParser:
    """``with_lab`` False leaves out the verbs of ``lab``: what they are made of takes time to load."""
    parser = argparse.ArgumentParser(
        prog="kvm-harness",
        description="Runs tiny guests on real KVM and compares every register with a model.",
        epilog=f"{_EXAMPLES}\n\n{_STATUSES}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(parser=parser)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    verbs = parser.add_subparsers(metavar="command")
    for register in (
        _add_probe, _add_run, _add_replay, _add_report, _add_compare, _add_layout, _add_series, _add_mutants,
    ):  # fmt: skip
        register(verbs)
    _add_lab(verbs, with_lab)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"kvm-harness {version('kvm-harness')}")
        parser.exit()


def add_verb(
    verbs: Verbs[argparse.ArgumentParser],
    name: str,
    function: Callable[[argparse.Namespace], int],
    group: str = "",
) -> argparse.ArgumentParser:
    """A verb with its page of the manual (harness/manual.py); ``function`` returns the exit status."""
    page = PAGES[f"{group} {name}".lstrip()]
    made = verbs.add_parser(
        name, help=page.text, description=page.description, epilog=page.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.set_defaults(function=function, parser=made)
    return made


def _add_device(parser: argparse.ArgumentParser) -> None:
    default = Path("/dev/kvm")
    parser.add_argument("--kvm-device", type=Path, default=default, metavar="PATH", help="default: /dev/kvm")


def _add_probe(verbs: Verbs[argparse.ArgumentParser]) -> None:
    probe = add_verb(verbs, "probe", _probe)
    _add_device(probe)
    probe.add_argument("--json", action="store_true", help="everything, for programs")


def _add_run(verbs: Verbs[argparse.ArgumentParser]) -> None:
    run = add_verb(verbs, "run", _run)
    _add_device(run)
    run.add_argument("names", nargs="*", help=argparse.SUPPRESS)  # there are none: _run says what was meant
    run.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: a new one under out/)")
    run.add_argument(
        "-k", metavar="EXPR",
        help="only Cases whose name matches, as in pytest: 'gpr and long'; whole names too: alu/add_rr_b@long#0",
    )  # fmt: skip
    run.add_argument(
        "-n", type=_workers, default=0, metavar="N",
        help="run in N processes side by side. Worth it for the whole suite, on processors that are idle; each process "
        "first makes all the Cases for itself, so that a small -k is slower with it (default: this process only)",
    )  # fmt: skip
    run.add_argument("--fail-fast", action="store_true", help="stop at the first mismatch")
    run.add_argument("--list", action="store_true", help="print the names of the Cases, one a line, and run none")


def _workers(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"{text}: give 0 (no workers) to {MAX_WORKERS}")
    return int(text)


def _add_replay(verbs: Verbs[argparse.ArgumentParser]) -> None:
    replay = add_verb(verbs, "replay", _replay)
    _add_device(replay)
    replay.add_argument("case", metavar="ID_OR_FILE", help="a Case's id (12 hex digits), name, or file")
    replay.add_argument("--emit-c", action="store_true", help="print a C program that shows the same with no harness")


def _add_report(verbs: Verbs[argparse.ArgumentParser]) -> None:
    report = add_verb(verbs, "report", _report)
    report.add_argument("folder", type=Path, metavar="DIR", help="the --out folder of a run, or of a series")
    report.add_argument(
        "--format", type=_formats, default=("text",), metavar="NAMES",
        help=f"{', '.join(FORMATS)} (default: text); one is printed, several (html,junit) become files in DIR",
    )  # fmt: skip


def _formats(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if wrong := [name for name in names if name not in FORMATS]:
        raise argparse.ArgumentTypeError(f"no format {wrong[0]!r}: give {', '.join(FORMATS)}, or several with commas")
    return names


def _add_compare(verbs: Verbs[argparse.ArgumentParser]) -> None:
    compare = add_verb(verbs, "compare", _compare)
    compare.add_argument("a", type=Path, metavar="DIR_A", help="the --out folder of the first run")
    compare.add_argument("b", type=Path, metavar="DIR_B", help="that of the second")


def _add_layout(verbs: Verbs[argparse.ArgumentParser]) -> None:
    layout = add_verb(verbs, "layout", _layout)
    layout.add_argument(
        "file", type=Path, nargs="?", metavar="VMLINUX",
        help="a vmlinux, bzImage, kvm.ko or object with BTF or DWARF (default: the running kernel)",
    )  # fmt: skip
    layout.add_argument(
        "--base", type=Path, metavar="VMLINUX",
        help="the kernel of a kvm.ko (default: the running one, or one installed with it)",
    )  # fmt: skip
    layout.add_argument("--json", action="store_true", help="everything, for programs")


def _add_series(verbs: Verbs[argparse.ArgumentParser]) -> None:
    from harness.series.cli import add_bisect_run, add_series

    add_series(add_verb(verbs, "series", _series))
    add_bisect_run(add_verb(verbs, "bisect-run", _bisect_run))


def _series(args: argparse.Namespace) -> int:
    from harness.series.cli import series

    return series(args)


def _bisect_run(args: argparse.Namespace) -> int:
    from harness.series.bisect import bisect_run

    return bisect_run(args)


def _add_mutants(verbs: Verbs[argparse.ArgumentParser]) -> None:
    mutants = add_verb(verbs, "mutants", _mutants)
    mutants.add_argument("--list", action="store_true", help="show the catalogue (ci/qemu/mutants/), and stop there")
    mutants.add_argument("--only", metavar="A,B", help="names, numbers of bug classes, or files of the catalogue")
    mutants.add_argument("--config", metavar="A,B", help="only in these configurations of the lab")
    mutants.add_argument("--tree", type=Path, metavar="DIR", help="a kernel tree (default: Debian's Linux 7.3)")
    mutants.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for the results (default: out/mutants); what is there and still true is not run again",
    )  # fmt: skip
    mutants.add_argument("--again", action="store_true", help="run all of them again")
    mutants.add_argument("--peers", action="store_true", help="upstream's own tests on the same kernels, too")
    mutants.add_argument(
        "--peer-seconds", type=positive, metavar="N",
        help="with --peers: tests that the unmodified kernel does not pass within N seconds do not count (default: 5)",
    )  # fmt: skip
    mutants.add_argument("--selftests", type=Path, metavar="DIR", help="built KVM selftests (default: the tree's)")
    mutants.add_argument("--unit-tests", type=Path, metavar="DIR", help="built kvm-unit-tests (default: none)")


def _mutants(args: argparse.Namespace) -> int:
    from harness.lab.mutants_cli import mutants

    return mutants(args)


def _add_lab(verbs: Verbs[argparse.ArgumentParser], whole: bool) -> None:
    lab = add_verb(verbs, "lab", _lab)
    if whole:
        from harness.lab.cli import add_verbs

        inner = lab.add_subparsers(metavar="command")
        add_verbs(lambda name, function: add_verb(inner, name, function, "lab"))


def _lab(args: argparse.Namespace) -> int:
    return fail("lab: give a command: list, build, run, shell or peers (kvm-harness lab --help)", BAD_INPUT)


def _probe(args: argparse.Namespace) -> int:
    from harness.host import Host
    from harness.report.probe import probe_text
    from harness.vm import Kvm

    with Kvm(args.kvm_device) as kvm:
        host = Host(kvm)
        try:
            found = host.to_json()
        finally:
            host.close()
        print(json.dumps(found, indent=1) if args.json else probe_text(host.describe(), found))
    return 0


def _run(args: argparse.Namespace) -> int:
    from harness.report.progress import Progress
    from harness.run import Request, case_names, run_suite

    if args.names:
        meant = shlex.quote(" or ".join(args.names))
        return fail(f"run takes no {args.names[0]!r}: to select Cases by name, use -k {meant}", BAD_INPUT)
    if args.list:
        print("\n".join(case_names(args.kvm_device, args.k)))
        return 0
    return run_suite(Request(args.kvm_device, args.out, args.k, args.n, args.fail_fast), Progress())


def _replay(args: argparse.Namespace) -> int:
    from harness.replay import replay

    def show(found: Replay) -> None:
        if not args.emit_c:
            print(found.text())
            return
        if found.result.verdict is Verdict.UNSUPPORTED:
            print(f"kvm-harness: note: no defect, a limit of this host: {found.result.summary}", file=sys.stderr)
        print(found.c_source(), end="")

    verdict = replay(args.case, args.kvm_device, show).verdict
    return 0 if args.emit_c else exit_status([verdict])


def _report(args: argparse.Namespace) -> int:
    from harness.journal import read_run
    from harness.report.views import verdict_of
    from harness.series.state import holds_series

    if holds_series(args.folder):
        from harness.series.cli import report

        return report(args.folder, args.format)
    run = read_run(args.folder)
    if len(args.format) == 1:
        print(_view(run, args.format[0]), end="")
    else:
        for name in args.format:
            path = run.folder / FORMATS[name]
            try:
                path.write_text(_view(run, name), encoding="utf-8")
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                return fail(f"{path}: {error.strerror}: ask for one format alone, which is printed", BAD_INPUT)
            print(path)
    sys.stdout.flush()  # before what is said on stderr
    for line in run.incomplete_because():
        fail(line, Verdict.LOST.status)
    return exit_status(verdict_of(r) for r in run.records) if run.complete else Verdict.LOST.status


def _view(run: RunResults, name: str) -> str:
    from harness.report.html import html_report
    from harness.report.junit import junit_report
    from harness.report.ktap import ktap_report
    from harness.report.text import text_report

    return {"text": text_report, "html": html_report, "junit": junit_report, "ktap": ktap_report}[name](run)


def _compare(args: argparse.Namespace) -> int:
    from harness.journal import read_run
    from harness.report.compare import compare_runs, comparison_text

    found = compare_runs(read_run(args.a), read_run(args.b))
    print(comparison_text(found), end="")
    sys.stdout.flush()
    for name, run in (("A", found.a), ("B", found.b)):
        for line in run.incomplete_because():
            fail(f"{name}: {line}", Verdict.LOST.status)
    return found.status


def _layout(args: argparse.Namespace) -> int:
    from harness.series.layout import check, layout_json, layout_text, violated
    from harness.series.typeinfo import file_layout, running_layout

    if args.base and not args.file:
        return fail("--base goes with a kvm.ko: give that too", BAD_INPUT)
    found = file_layout(args.file, args.base) if args.file else running_layout()
    print(json.dumps(layout_json(found), indent=1) if args.json else layout_text(found))
    return Verdict.MISMATCH.status if violated(check(found)) else 0


if __name__ == "__main__":
    sys.exit(main())
