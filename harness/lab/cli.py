"""``kvm-harness lab ...``: the suite on a kernel under test, nested in an emulator."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from harness.lab import cache
from harness.lab.configurations import CONFIGURATIONS, Configuration, configuration
from harness.lab.errors import LabError, LabInputError
from harness.lab.planner import TIERS
from harness.options import minutes, positive

if TYPE_CHECKING:
    from harness.lab.hardware import Emulator
    from harness.lab.kernel import Kernel
    from harness.lab.session import Cell

DEFAULT_SERIES: Final = "newest"
SOURCE_SERIES: Final = "7.3"
"""Debian's kernel source for configurations that edit the kernel."""


class Verb(Protocol):
    """Makes one parser."""

    def __call__(
        self, name: str, function: Callable[[argparse.Namespace], int], /
    ) -> argparse.ArgumentParser: ...


def add_verbs(verb: Verb) -> None:
    """Add what comes after ``kvm-harness lab``; ``verb(name, function)`` makes one parser."""
    verb("list", _list)
    build, run, shell, peers = verb("build", _build), verb("run", _run), verb("shell", _shell), verb("peers", _peers)
    for made in (build, run, shell, peers):
        _add_kernel(made)
        made.add_argument(
            "--config", default="svm", metavar="A,B",
            help=f"configurations: {', '.join(CONFIGURATIONS)}; or all (default: svm)",
        )  # fmt: skip
    which = peers.add_mutually_exclusive_group()
    which.add_argument("--selftests", type=Path, metavar="DIR", help="built tools/testing/selftests/kvm, static")
    which.add_argument(
        "--build-selftests", action="store_true", help=f"build them: from --tree, or Debian's Linux {SOURCE_SERIES}"
    )
    peers.add_argument("--unit-tests", type=Path, metavar="DIR", help="built kvm-unit-tests")
    peers.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: a new one under out/)")
    peers.add_argument("-k", metavar="EXPR", help="only tests whose name matches, as in pytest: 'svm and not nested'")
    run.add_argument(
        "--tier", type=_tier, default="full", metavar="smoke,full",
        help="smoke: each access path once; full: all, smoke included (default: full)",
    )  # fmt: skip
    run.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: a new one under out/)")
    run.add_argument("-k", metavar="EXPR", help="only Cases whose name matches, as in pytest: 'gpr and long'")
    run.add_argument("--fail-fast", action="store_true", help="stop at the first mismatch")
    run.add_argument("--list", action="store_true", help="print the names of the Cases, one a line, and run none")
    run.add_argument("--cold", action="store_true", help="boot each machine, even where one was kept to go on from")
    run.add_argument("--machines", type=positive, default=2, metavar="N", help="machines side by side (default: 2)")
    run.add_argument(
        "--deadline", type=minutes, default=120.0, metavar="MINUTES", help="what a cell may take at most (default: 120)"
    )
    run.add_argument(
        "--write-profile", action="store_true", help="write what this cell's KVM can do to ci/qemu/profiles/, then run"
    )


def _add_kernel(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--debian", default=None, metavar="SERIES",
        help="stock kernels: 6.1, 6.12, 7.3, newest (the default); several with commas",
    )  # fmt: skip
    which.add_argument("--kernel", type=Path, metavar="BZIMAGE", help="a kernel of yours")
    which.add_argument("--tree", type=Path, metavar="DIR", help="a kernel tree: built in a private worktree")
    parser.add_argument("--modules", type=Path, metavar="DIR", help="its /lib/modules/RELEASE, with --kernel")
    parser.add_argument(
        "--variant", default="default", choices=("default", "debug"),
        help="debug: with lockdep, KASAN and the like, several times slower; with --tree",
    )  # fmt: skip
    parser.add_argument("--qemu", default="ours", choices=("ours", "system"), help="which emulator (default: ours)")


def _tier(text: str) -> str:
    """The widest of the tiers that are named."""
    named = text.split(",")
    if unknown := [name for name in named if name not in TIERS]:
        raise argparse.ArgumentTypeError(f"no tier {unknown[0]!r}: use {' or '.join(TIERS)}")
    return max(named, key=TIERS.index)


def _say(text: str) -> None:
    print(text, flush=True)


def cells(args: argparse.Namespace) -> list[Cell]:
    """The cells that the options name, everything they need built. LabError."""
    from harness.lab.boot import outer_acceleration
    from harness.lab.image import base_image
    from harness.lab.session import Cell

    chosen = _configurations(args)
    emulator = hardware(chosen, args.qemu)
    image = base_image(_say)
    stock = kernels(args) if any(not config.edits for config in chosen) else []
    return [
        Cell(config, kernel, emulator, image, "tcg" if config.needs else outer_acceleration(config.extension))
        for config in chosen
        for kernel in ([_edited(args, config)] if config.edits else stock)
    ]


def _configurations(args: argparse.Namespace) -> list[Configuration]:
    """Those that the options name. LabInputError, too, where the options for the kernel do not go with them."""
    names = list(CONFIGURATIONS) if args.config == "all" else args.config.split(",")
    chosen = [configuration(name) for name in names]
    if args.debian and all(config.edits for config in chosen):
        raise LabInputError(f"{args.config}: its kernel is edited source, not a stock one: give --tree DIR, or nothing")
    if args.variant != "default" and not args.tree and not any(config.edits for config in chosen):
        raise LabInputError(f"--variant {args.variant} is for kernels that are built here: give --tree DIR")
    if args.modules and not args.kernel:
        raise LabInputError("--modules goes with --kernel BZIMAGE")
    return chosen


def case_names(args: argparse.Namespace) -> list[str]:
    """The names of the Cases that a run with these options would select, as the checked-in profiles have them.

    Nothing is built, fetched or run. SelectionError when there is none, LabInputError.
    """
    from harness.lab.planner import cell_cases
    from harness.lab.profile import load_profile
    from harness.selection import selected

    names: dict[str, None] = {}
    for config in _configurations(args):
        for series in _series(args, config):
            profile = load_profile(config.name, series)
            if profile is None:
                raise LabInputError(f"{config.name} has no profile for Linux {series}: its Cases are known once it ran")
            names |= dict.fromkeys(case.name for case in cell_cases(config, profile, args.tier))
    return selected(args.k, [*names], "kvm-harness lab run --list")


def _series(args: argparse.Namespace, config: Configuration) -> list[str]:
    """The kernel series that the options name, "7.3" and the like, found without the kernels. LabInputError."""
    from harness.lab import bzimage, ksource
    from harness.lab.kernel import STOCK

    if args.tree:
        return ["{}.{}".format(*ksource.release_of(args.tree)[1])]
    if config.edits:
        return [SOURCE_SERIES]
    if args.kernel:
        return [".".join(re.findall(r"\d+", bzimage.release_of(args.kernel))[:2])]
    named = (args.debian or DEFAULT_SERIES).split(",")
    if unknown := [name for name in named if name not in STOCK]:
        raise LabInputError(f"no stock kernel {unknown[0]!r}: there are {', '.join(STOCK)}")
    newest = [name for name in STOCK if name != DEFAULT_SERIES][-1]  # a later one has its profile, too
    return [newest if name == DEFAULT_SERIES else name for name in named]


def hardware(chosen: Sequence[Configuration], which: str) -> Emulator:
    """The emulator (``ours`` or ``system``) for these configurations, built and checked. LabError."""
    emulator = _emulator(which)
    for config in chosen:
        if lacking := config.needs - emulator.features:
            raise LabInputError(f"{config.name}: {emulator.name} has no {', '.join(sorted(lacking))}")
    if any("apx" in config.needs for config in chosen):
        _check_apx(emulator)
    return emulator


def _check_apx(hardware: Emulator) -> None:
    """The bare self-test of APX, before anything is said about KVM. LabError when the hardware is broken."""
    from harness.lab.selftest import apx_selftest

    found = apx_selftest(hardware, _say)
    _say(f"APX self-test of {hardware.name}: {found.passed} passed, {found.failed} failed")
    if found.failed:
        raise LabError(f"{hardware.name}: its APX is broken, nothing is said about KVM:\n{found.output}")


def _edited(args: argparse.Namespace, config: Configuration) -> Kernel:
    """The kernel of a configuration that edits it: from the user's tree, or else from Debian's newest source."""
    from harness.lab.edits import named
    from harness.lab.kbuild import kernel_from_tree
    from harness.lab.ksource import debian_source

    if args.kernel:
        raise LabInputError(f"{config.name} edits the kernel: give --tree DIR, or nothing for Debian's source")
    tree = args.tree or debian_source(SOURCE_SERIES, _say)
    edits = [named(name) for name in config.edits]
    return kernel_from_tree(tree, variant=args.variant, edits=edits, progress=_say).kernel


def _emulator(which: str) -> Emulator:
    from harness.lab.hardware import pinned_qemu, system_qemu

    if which not in ("ours", "system"):
        raise LabInputError(f"--qemu {which}: use ours or system")
    return pinned_qemu(_say) if which == "ours" else system_qemu()


def kernels(args: argparse.Namespace) -> list[Kernel]:
    """The kernels that the options name. LabError."""
    from harness.lab.kernel import debian_kernel, kernel_from_file

    if args.kernel:
        return [kernel_from_file(args.kernel, args.modules)]
    if args.tree:
        from harness.lab.kbuild import kernel_from_tree

        return [kernel_from_tree(args.tree, variant=args.variant, progress=_say).kernel]
    return [debian_kernel(series, _say) for series in (args.debian or DEFAULT_SERIES).split(",")]


def _list(args: argparse.Namespace) -> int:
    from harness.lab.kernel import STOCK
    from harness.lab.profile import FOLDER

    print("configurations:")
    for config in CONFIGURATIONS.values():
        known = sorted(p.stem.partition("@")[2] for p in FOLDER.glob(f"{config.name}@*.json"))
        print(f"  {config.name:12s} {config.about}")
        edits = f"; edits: {', '.join(config.edits)}" if config.edits else ""
        print(f"  {'':12s} {' '.join((config.cpu, *config.parameters))}{edits}; profiles: {', '.join(known) or 'none'}")
    print("stock kernels (--debian):")
    for series, (suite, *_) in STOCK.items():
        print(f"  {series:12s} Debian {suite}")
    sizes = cache.sizes()
    whole = sum(size for _, size in sizes.values())
    print(f"in the cache ({whole:,} MB in all; what is deleted there is made or fetched again):")
    for folder, (entries, size) in sizes.items():
        print(f"  {folder.name:12s} {entries:3d} of {size:7,d} MB in {folder}")
    return 0


def _build(args: argparse.Namespace) -> int:
    for cell in cells(args):
        print(f"{cell.name}: {cell.emulator.binary}, {cell.kernel.image}, {cell.image.root}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from harness.journal import new_folder, results_folder
    from harness.lab.run import Options, run_cells
    from harness.selection import check

    check(args.k)  # before anything is built or fetched
    if args.list:
        print("\n".join(case_names(args)))
        return 0
    options = Options(
        args.tier, args.k, args.fail_fast, args.machines, args.write_profile, 60 * args.deadline, args.cold,
        reduce=True,
    )
    out = results_folder(args.out) if args.out else new_folder()
    return run_cells(cells(args), out, options, partial(command_again, args), _say, sys.stderr)


def command_again(args: argparse.Namespace, cell: Cell) -> str:
    """The command that runs a Case of a cell again, up to its name."""
    words = ["kvm-harness", "lab", "run", "--config", cell.configuration.name]
    for option in ("tree", "kernel", "modules"):
        if path := getattr(args, option):
            words += [f"--{option}", str(path.expanduser().absolute())]
    if not (args.tree or args.kernel or cell.configuration.edits):
        named = (args.debian or DEFAULT_SERIES).split(",")
        words += ["--debian", cell.kernel.series if cell.kernel.series in named else named[-1]]
    words += ["--variant", args.variant] if args.variant != "default" else []
    words += ["--qemu", args.qemu] if args.qemu != "ours" else []
    return shlex.join([*words, "-k"])


def _peers(args: argparse.Namespace) -> int:
    from harness.journal import new_folder, results_folder
    from harness.lab.ksource import debian_source
    from harness.lab.peer_build import built_selftests
    from harness.lab.peers import run_peers
    from harness.selection import check

    if not (args.selftests or args.build_selftests or args.unit_tests):
        raise LabInputError("nothing to run: give --selftests DIR or --build-selftests, and --unit-tests DIR")
    check(args.k)
    out = results_folder(args.out) if args.out else new_folder()
    found = args.selftests
    if args.build_selftests:
        found = built_selftests(args.tree or debian_source(SOURCE_SERIES, _say), _say)
    return run_peers(cells(args), found, args.unit_tests, out, args.k, _say)


def _shell(args: argparse.Namespace) -> int:
    from harness.lab.shell import check_terminal, interactive

    check_terminal()  # before anything is built or fetched
    return interactive(cells(args)[0])
