"""``kvm-harness series`` and ``kvm-harness bisect-run``: options, and everything that a run needs made ready."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.lab.configurations import CONFIGURATIONS, Configuration, configuration
from harness.lab.errors import LabInputError
from harness.options import positive
from harness.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Executor

    from harness.series.git import PatchRange, Repository
    from harness.series.line import CellLine
    from harness.series.verdict import SeriesReport

DEFAULT_CONFIGS: Final = "svm,svm-shadow,svm-emul"
TIERS: Final = ("auto", "smoke", "full")
VIEWS: Final = {"text": "report.txt", "html": "report.html", "ktap": "report.ktap"}
"""What ``kvm-harness report`` shows of a series, and where that is in its folder."""
_MACHINES: Final = 2


def add_series(parser: argparse.ArgumentParser) -> None:
    """Options of ``series``."""
    parser.add_argument("range", nargs="?", metavar="BASE..TIP", help="the commits to validate, one after the other")
    parser.add_argument("--mbox", type=Path, metavar="FILE", help="the series as it was mailed, instead of a range")
    parser.add_argument("--base", metavar="REV", help="the commit that the patches of --mbox apply to")
    add_common(parser)
    parser.add_argument(
        "--config", default=None, metavar="A,B",
        help=f"configurations: {', '.join(CONFIGURATIONS)}; or all (default: {DEFAULT_CONFIGS})",
    )  # fmt: skip
    parser.add_argument(
        "--tier", choices=TIERS, default=None,
        help="auto: full in configurations that reach changed code, smoke in the others (default); or one for all",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help="for the impatient: --config svm --tier smoke, unless given otherwise; hardly reaches KVM's emulator "
        "(--config svm,svm-emul does)",
    )
    parser.add_argument(
        "--second-config", action="store_true",
        help="compare the code of the debug variant too, and run the smoke tier on it (lockdep, KASAN)",
    )  # fmt: skip
    parser.add_argument("--allow-dirty", action="store_true", help="leave uncommitted changes aside, without an error")
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for results (default: one under out/ for this series); the same command goes on where it was",
    )  # fmt: skip


def add_bisect_run(parser: argparse.ArgumentParser) -> None:
    """Options of ``bisect-run``."""
    add_common(parser)
    parser.add_argument("--config", default="svm", metavar="A,B", help="configurations (default: svm)")
    parser.add_argument("--tier", choices=TIERS[1:], default="smoke", help="default: smoke")
    parser.add_argument("-k", metavar="EXPR", help="only Cases whose name matches, as in pytest: 'gpr and long'")
    parser.add_argument("--base", metavar="REV", help="a good commit: what fails there too does not count")
    parser.add_argument(
        "--same-behaviour", action="store_true", help="with --base: other behaviour is bad even where it is allowed"
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of both verbs."""
    parser.add_argument("--tree", type=Path, default=Path(), metavar="DIR", help="git checkout of Linux (default: .)")
    parser.add_argument(
        "--machines", type=positive, default=_MACHINES, metavar="N",
        help=f"emulators of one cell (default: {_MACHINES})",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=positive, default=None, metavar="N", help="compilers side by side (default: one a processor)"
    )
    parser.add_argument("--qemu", default="ours", choices=("ours", "system"), help="which emulator (default: ours)")


def say(text: str) -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)


def chosen_configurations(text: str) -> list[Configuration]:
    """Configurations by the words of ``--config``. LabInputError."""
    names = list(CONFIGURATIONS) if text == "all" else text.split(",")
    return [configuration(name) for name in dict.fromkeys(names)]


def series(args: argparse.Namespace) -> int:
    """The verb."""
    from harness.series.git import Repository

    default = "svm" if args.quick else DEFAULT_CONFIGS
    configs = chosen_configurations(default if args.config is None else args.config)
    if args.mbox is None:
        if args.base is not None:
            raise LabInputError("--base goes with --mbox: a range names its base itself, as in BASE..TIP")
        if args.range is None:
            raise LabInputError("give the series: a range BASE..TIP, or --mbox FILE --base REV")
        repository = Repository(args.tree)
        patches, title = repository.range(args.range), args.range
    else:
        if args.range is not None or args.base is None:
            raise LabInputError("--mbox FILE goes with --base REV, the commit that its patches apply to, and no range")
        repository, patches, lacking = _mailed(args)
        title = f"{args.mbox.name}{f' ({lacking})' if lacking else ''} on {args.base}"
    if not args.allow_dirty and args.mbox is None:
        repository.check_clean()
    return _validate(args, patches, title, configs)


def report(folder: Path, formats: Sequence[str]) -> int:
    """``kvm-harness report`` of a series' folder: as it was last written; one is printed, of several the files named.

    Returns the series' exit status. LabInputError for a view that a series does not have, or where there is none yet.
    """
    from harness.series.state import read

    if missing := [name for name in formats if name not in VIEWS]:
        raise LabInputError(
            f"{folder} holds a series, which has no {missing[0]} view: give {', '.join(VIEWS)}; of one cell there is "
            f"one: kvm-harness report {shlex.quote(str(folder))}/patches/NNNN/CELL --format {missing[0]}"
        )
    found = read(folder / "report.json")
    if found is None:
        raise LabInputError(f"{folder}: no report yet: BASE's runs are not finished; give the series' command again")
    paths = [folder / VIEWS[name] for name in formats]
    if gone := [path.name for path in paths if not path.is_file()] or _lacking(found):
        raise LabInputError(f"{folder}: {gone[0]} is missing: give the series' command again, which writes it anew")
    for path in paths:
        print(path if len(formats) > 1 else path.read_text(encoding="utf-8"), end="\n" if len(formats) > 1 else "")
    sys.stdout.flush()
    if not found["complete"]:
        planned = counted(found["planned"], "patch", "patches")
        say(f"kvm-harness: incomplete: {len(found['patches'])} of {planned} judged so far")
    return int(found["status"])


def _lacking(report: object) -> list[str]:
    """What a series' report.json does not say and should."""
    keys = ("complete", "planned", "patches", "status")
    return [f"{key!r} of report.json" for key in keys if not isinstance(report, dict) or key not in report]


def _mailed(args: argparse.Namespace) -> tuple[Repository, PatchRange, str]:
    """A series by mail: where its commits are, which they are, and what is missing of it."""
    from harness.lab.kbuild import workspace
    from harness.series.git import Repository
    from harness.series.mbox import apply_mbox, read_mailbox

    mailbox = read_mailbox(args.mbox)  # what is wrong with it is told before another run's build ends
    base = Repository(args.tree).commit(args.base)
    with workspace(args.tree, progress=say) as work:
        tip = apply_mbox(work.copy, args.mbox, base, say)
        repository = Repository(args.tree, work.copy.environment())
        return repository, repository.range(f"{base.id}..{tip.id}"), str(mailbox)


def _validate(
    args: argparse.Namespace, patches: PatchRange, title: str, configs: Sequence[Configuration]
) -> int:
    from harness.lab.cli import hardware
    from harness.lab.image import base_image
    from harness.series.live import Live
    from harness.series.report import text_report
    from harness.series.run import SeriesRun, Setup
    from harness.series.state import Folder, default_folder

    tier = args.tier or ("smoke" if args.quick else "auto")
    cells = _cells(configs, args.second_config)
    about = {
        "tree": str(args.tree.expanduser().resolve()), "base": patches.base.id,
        "commits": [c.id for c in patches.commits], "cells": [c.name for c in cells], "tier": tier, "qemu": args.qemu,
    }  # fmt: skip
    with Folder(args.out or default_folder(about), about) as folder:
        say(f"{title}: {counted(len(patches.commits), 'patch', 'patches')} on {patches.base}; results: {folder.path}")
        emulator = hardware(configs, args.qemu)
        setup = Setup(
            args.tree, title, patches, cells, emulator, base_image(say), _acceleration(cells), tier,
            args.machines, args.jobs,
        )  # fmt: skip
        live = Live(patches.commits, [c.name for c in cells])
        try:
            with _pool(setup.machines) as pool:
                report = SeriesRun(setup, folder, pool, live).run()
        except BaseException:
            live.leave()
            say("what is finished is kept; the same command goes on from there")
            raise
        live.close()
        print(text_report(report), end="")
        _tell_files(folder.path, report)
    return report.status


def _cells(configs: Sequence[Configuration], second: bool) -> list[CellLine]:
    from harness.series.builds import Flavour
    from harness.series.line import CellLine

    cells = [CellLine(c.name, c, Flavour("default", c.edits)) for c in configs]
    if second:
        cells += [CellLine(f"{c.name}-debug", c, Flavour("debug", c.edits)) for c in configs]
    return cells


def _acceleration(cells: Sequence[CellLine]) -> Mapping[str, str]:
    from harness.lab.boot import outer_acceleration

    return {
        c.name: "tcg" if c.configuration.needs else outer_acceleration(c.configuration.extension) for c in cells
    }


@contextmanager
def _pool(machines: int) -> Iterator[Executor]:
    """The local pool; whatever ends the run ends its workers."""
    from harness.series.cells import LocalPool, workers_for

    pool = LocalPool(workers_for(machines))
    try:
        yield pool
    except BaseException:
        pool.stop()
        raise
    pool.shutdown()


def _tell_files(folder: Path, report: SeriesReport) -> None:
    names = ", ".join(f"report.{kind}" for kind in ("txt", "json", "ktap", "html"))
    print(f"{names} in {folder}")
