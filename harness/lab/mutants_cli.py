"""``kvm-harness mutants``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from harness.journal import results_folder
from harness.lab.boot import outer_acceleration
from harness.lab.catalogue import choose
from harness.lab.cli import SOURCE_SERIES, hardware
from harness.lab.configurations import CONFIGURATIONS
from harness.lab.edits import Edit
from harness.lab.image import base_image
from harness.lab.ksource import debian_source
from harness.lab.mutant_peers import SECONDS, PeerCampaign, PeerTrial, Suites
from harness.lab.mutant_text import LeftOut, list_table, peer_line, peers_table, trial_line, trials_table, write_results
from harness.lab.mutants import OUT, Bench, Campaign, exit_status
from harness.lab.peer_build import built_selftests


def mutants(args: argparse.Namespace) -> int:
    """Do what the command line says; the exit status. LabError."""
    only, names = ((value or "").split(",") if value else [] for value in (args.only, args.config))
    chosen = choose(only, names)
    if args.list:
        print(*list_table(chosen), sep="\n")
        return 0
    return _try(args, chosen)


def _say(text: str) -> None:
    print(text, flush=True)


def _try(args: argparse.Namespace, chosen: Sequence[Edit]) -> int:
    out = results_folder(args.out or OUT)  # before anything is built
    configs = {name: CONFIGURATIONS[name] for m in chosen if not m.equivalent for name in m.configurations}
    emulator = hardware(list(configs.values()), "ours")
    tree = args.tree or debian_source(SOURCE_SERIES, _say)
    accel = {name: "tcg" if c.needs else outer_acceleration(c.extension) for name, c in configs.items()}
    campaign = Campaign(tree, out, Bench(emulator, base_image(_say), accel.__getitem__), _say)
    trials, peers = [], dict[str, PeerTrial]()
    left_out: LeftOut = {}
    for trial in campaign.run(chosen, again=args.again):
        _say(trial_line(trial))
        trials.append(trial)
        write_results(out, tree, trials, peers, left_out)
    if args.peers:
        suites = Suites(args.selftests or built_selftests(tree, _say), args.unit_tests, args.peer_seconds or SECONDS)
        theirs = PeerCampaign(campaign, suites)
        for peer in theirs.run(chosen, again=args.again):
            _say(peer_line(peer))
            peers[peer.name] = peer
            left_out = theirs.left_out()
            write_results(out, tree, trials, peers, left_out)
    for line in (*trials_table(trials), *(peers_table(trials, peers, left_out) if peers else ())):
        _say(line)
    _say(f"results: {out}")
    return exit_status([t.fate for t in trials])
