"""`sparsejax plan`."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from sparsejax.cli.arguments import add_config
from sparsejax.errors import InputError

EXAMPLE = "sparsejax plan --config=preset:mistral_7b --config.sharding.fsdp=8 --on=h100:8"
OVERRIDES = ("config",)
EXIT_CODES: dict[type[Exception], int] = {}
LONGEST = 2**24  # tokens per row at which a sweep of lengths ends


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    add_config(parser)
    parser.add_argument(
        "--on",
        required=True,
        metavar="DEVICE:TOPOLOGY",
        help="devices to plan for: v5e:4x4, v5p:2x2x1, v6e:4x4, tpu7x:2x2x1, h100:8, h200:8 or cpu:8",
    )
    parser.add_argument(
        "--length",
        nargs="?",
        type=int,
        const=LONGEST,
        metavar="N",
        help="instead of one plan: double the tokens per row, up to N, until the run no longer fits",
    )
    parser.add_argument(
        "--account-only", action="store_true", help="do not compile; the account takes seconds, compilers take minutes"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(options: argparse.Namespace, console: Console) -> None:
    """Plans a run."""
    from sparsejax.plan.topologies import Topology

    topology = Topology.parse(options.on)
    if options.length is not None and options.length < 1:
        raise InputError("length", f"{options.length} is below 1")
    topology.stay_on_cpu()
    from sparsejax import config as configs
    from sparsejax.plan import display, planner

    settings, compile_step = configs.load(options.config, options.overrides["config"]), not options.account_only
    with console.status("planning", spinner="line") as status:
        if options.length is not None:
            plans = planner.sweep_lengths(settings, topology, options.length, compile_step)
            done = list(plans) if options.json else display.print_lengths(plans, console)
            if options.json:
                print(json.dumps([display.record(plan) for plan in done], indent=2))
            return
        plan = planner.make_plan(settings, topology, compile_step)
        if not options.json:
            display.print_plan(plan, console)
        proposals = []
        if not plan.fits:
            compiles = compile_step and not plan.compiler_missing
            proposals = planner.propose(settings, topology, compiles, report=status.update)
    if options.json:
        changes = [{"overrides": p.overrides, "plan": display.record(p.plan)} for p in proposals]
        print(json.dumps(display.record(plan) | {"proposals": changes}, indent=2))
    elif not plan.fits:
        display.print_proposals(proposals, console)
