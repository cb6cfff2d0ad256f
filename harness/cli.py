"""kvm-harness: the command line. Thin: every verb calls one function, and imports what it needs when it is called."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

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
_STATUSES: Final = (
    "exit status: 0 agrees, 1 mismatch, splat or regressed, 2 bad input or nothing selected, 3 no usable KVM, 4 lost "
    "(infrastructure), 130 interrupted"
)
_EXAMPLES: Final = """examples:
  kvm-harness run                         the register suite here; results go to a new folder under out/
  kvm-harness run -k 'mmio and not user'  a part of it
  kvm-harness replay alu/add_rr_b@long#0 --emit-c > x.c
  kvm-harness lab run --debian 6.12       the suite on that kernel, nested in QEMU
  kvm-harness series v7.3.. --tree ~/linux
                                          a verdict for every patch since v7.3
  kvm-harness compare out/before out/after  two runs side by side
  kvm-harness COMMAND --help              options and an example of each command"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (harness/verdict.py)."""
    try:
        signal.signal(signal.SIGINT, _interrupt)
        words = sys.argv[1:] if argv is None else list(argv)
        args = _parser(words[:1] == ["lab"]).parse_args(words)
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
        _discard_stdout()
        return 0
    except Exception as error:
        expected = _status_of(error)
        if expected is None:
            raise
        return fail(f"{error}", expected)


def fail(text: str, status: int) -> int:
    """Say why on stderr; returns ``status``."""
    print(f"kvm-harness: {text}", file=sys.stderr)
    return status


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The first Ctrl-C ends things in order, a second one at once. (Journals have whole lines at any moment.)"""
    signal.signal(signal.SIGINT, _interrupt_again)
    raise KeyboardInterrupt


def _interrupt_again(number: int, frame: FrameType | None) -> None:
    os.write(2, b"kvm-harness: interrupted\n")
    os._exit(INTERRUPTED)


def _discard_stdout() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
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
        description="Runs tiny guests on real KVM and compares every register with an independent model.",
        epilog=f"{_EXAMPLES}\n\n{_STATUSES}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
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
    text: str,
    example: str,
) -> argparse.ArgumentParser:
    """A verb whose ``--help`` has an example and the exit statuses; ``function`` returns the status."""
    made = verbs.add_parser(
        name, help=text, description=text, epilog=f"example: {example}\n\n{_STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.set_defaults(function=function)
    return made


def _add_device(parser: argparse.ArgumentParser) -> None:
    default = Path("/dev/kvm")
    parser.add_argument("--kvm-device", type=Path, default=default, metavar="PATH", help="default: /dev/kvm")


def _add_probe(verbs: Verbs[argparse.ArgumentParser]) -> None:
    probe = add_verb(
        verbs, "probe", _probe, "What this host's KVM can do, found by trying it.", "kvm-harness probe --json"
    )
    _add_device(probe)
    probe.add_argument("--json", action="store_true", help="everything, for programs")


def _add_run(verbs: Verbs[argparse.ArgumentParser]) -> None:
    run = add_verb(
        verbs, "run", _run, "The register suite on this machine's KVM.", "kvm-harness run -k 'mmio and not @real#' -n 2"
    )
    _add_device(run)
    run.add_argument("names", nargs="*", help=argparse.SUPPRESS)  # there are none: _run says what was meant
    run.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: a new one under out/)")
    run.add_argument(
        "-k", metavar="EXPR",
        help="only Cases whose name matches, as in pytest: 'gpr and long'; whole names too: alu/add_rr_b@long#0",
    )  # fmt: skip
    run.add_argument("-n", type=_workers, default=0, metavar="N", help="worker processes (default: this one only)")
    run.add_argument("--fail-fast", action="store_true", help="stop at the first mismatch")


def _workers(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"{text}: give 0 (no workers) to {MAX_WORKERS}")
    return int(text)


def _add_replay(verbs: Verbs[argparse.ArgumentParser]) -> None:
    replay = add_verb(
        verbs, "replay", _replay, "One Case again, in full detail; or as one self-contained C file.",
        "kvm-harness replay 3f2a9c17b0de --emit-c > reproducer.c",
    )  # fmt: skip
    _add_device(replay)
    replay.add_argument("case", metavar="ID_OR_FILE", help="a Case's id (12 hex digits), name, or file")
    replay.add_argument("--emit-c", action="store_true", help="print a C program that shows the same with no harness")


def _add_report(verbs: Verbs[argparse.ArgumentParser]) -> None:
    report = add_verb(
        verbs, "report", _report, "Views of a run's journal.",
        "kvm-harness report out/20261123-120000 --format junit > junit.xml",
    )  # fmt: skip
    report.add_argument("folder", type=Path, metavar="DIR", help="the --out folder of a run")
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
    compare = add_verb(
        verbs, "compare", _compare, "Two runs side by side; status 1 if a Case that agreed in A does not in B.",
        "kvm-harness compare out/before out/after",
    )  # fmt: skip
    compare.add_argument("a", type=Path, metavar="DIR_A", help="the --out folder of the first run")
    compare.add_argument("b", type=Path, metavar="DIR_B", help="that of the second")


def _add_layout(verbs: Verbs[argparse.ArgumentParser]) -> None:
    layout = add_verb(
        verbs, "layout", _layout,
        "KVM's register map (enum kvm_reg, struct kvm_vcpu_arch) from BTF or DWARF, checked; 1 if a rule is broken.",
        "kvm-harness layout ~/linux/vmlinux",
    )  # fmt: skip
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

    add_series(
        add_verb(
            verbs, "series", _series, "A verdict for every patch of a kernel series: BASE..TIP, or a mailbox.",
            "kvm-harness series v7.3..my-branch --tree ~/linux --config svm,svm-emul",
        )
    )  # fmt: skip
    add_bisect_run(
        add_verb(
            verbs, "bisect-run", _bisect_run, "Is the kernel that is checked out good? For git bisect run.",
            "git bisect run kvm-harness bisect-run",
        )
    )  # fmt: skip


def _series(args: argparse.Namespace) -> int:
    from harness.series.cli import series

    return series(args)


def _bisect_run(args: argparse.Namespace) -> int:
    from harness.series.bisect import bisect_run

    return bisect_run(args)


def _add_mutants(verbs: Verbs[argparse.ArgumentParser]) -> None:
    mutants = add_verb(
        verbs, "mutants", _mutants,
        "Seeded kernel bugs, one after the other, in the lab: which ones the suite catches. The proof of its verdicts.",
        "kvm-harness mutants --only 23,cr2-stale --config svm",
    )  # fmt: skip
    mutants.epilog = (
        "example: kvm-harness mutants --only 23,cr2-stale --config svm\n\n"
        "exit status: 0 all caught or equivalent, 1 one survived, 2 one does not fit the tree, does not compile or has "
        "no Case, or none was tried, 4 one was lost, 130 interrupted"
    )
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
    mutants.add_argument("--selftests", type=Path, metavar="DIR", help="built KVM selftests (default: the tree's)")
    mutants.add_argument("--unit-tests", type=Path, metavar="DIR", help="built kvm-unit-tests (default: none)")


def _mutants(args: argparse.Namespace) -> int:
    from harness.lab.mutants_cli import mutants

    return mutants(args)


def _add_lab(verbs: Verbs[argparse.ArgumentParser], whole: bool) -> None:
    text = "The suite on a kernel under test, nested in an emulator: list, build, run, shell, peers."
    epilog = f"example: kvm-harness lab run --debian 6.12 --tier smoke\n\n{_STATUSES}"
    lab = verbs.add_parser(
        "lab", help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if whole:
        from harness.lab.cli import add_verbs

        inner = lab.add_subparsers(metavar="command", required=True)
        add_verbs(lambda name, function, text, example: add_verb(inner, name, function, text, example))


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
    from harness.run import Request, run_suite

    if args.names:
        meant = shlex.quote(" or ".join(args.names))
        return fail(f"run takes no {args.names[0]!r}: to select Cases by name, use -k {meant}", BAD_INPUT)
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
    return 0 if args.emit_c or verdict is Verdict.UNSUPPORTED else exit_status([verdict])


def _report(args: argparse.Namespace) -> int:
    from harness.journal import read_run
    from harness.report.views import verdict_of

    run = read_run(args.folder)
    if len(args.format) == 1:
        print(_view(run, args.format[0]), end="")
    else:
        for name in args.format:
            path = run.folder / FORMATS[name]
            try:
                path.write_text(_view(run, name), encoding="utf-8")
            except PermissionError as error:
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
