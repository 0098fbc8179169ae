"""Plans of small models on devices that are not there."""

import dataclasses
import json
import math
import subprocess
import sys

import jax
import pytest

from sparsejax import config as configs
from sparsejax.cli import main
from sparsejax.config import ConfigError
from sparsejax.model import Functional
from sparsejax.plan import MACHINES, Topology, make_plan, propose, roofline, sweep_lengths

SMALL = {"train.batch": 8, "eval.batch": 8, "data.length": 128}


def load(source="preset:window", **overrides):
    return configs.load(source, SMALL | overrides)


def with_capacity(capacity, devices=4):
    """Devices with so much memory."""
    machine = dataclasses.replace(MACHINES["h100"], capacity=capacity)
    return Topology(machine, (devices,))


def test_the_state_is_counted_to_the_byte():
    settings = load(**{"sharding.fsdp": 1})
    account = make_plan(settings, with_capacity(math.inf), compile_step=False).account
    shapes = jax.tree.leaves(Functional(configs.check(settings).model).shapes)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes)
    assert account.parameters == size
    assert 2 * size <= account.optimizer <= 2 * size + 64
    assert account.peak == account.arguments + account.activations + account.temporaries


def test_sharding_divides_the_account():
    whole = make_plan(load(), with_capacity(math.inf, 1), compile_step=False).account
    split = make_plan(load(**{"sharding.fsdp": 4}), with_capacity(math.inf), compile_step=False).account
    assert split.parameters < 0.3 * whole.parameters
    assert split.activations < 0.3 * whole.activations
    assert split.received["all-gather"] > 0
    assert not whole.received
    flops = [sum(part.flops for part in account.work.values()) for account in (whole, split)]
    assert flops[1] == pytest.approx(flops[0] / 4, rel=1e-6)


def test_a_halo_is_counted_once():
    """The exchange of a sharded sequence is that of `show`."""
    from sparsejax.traffic import count_traffic

    settings = load(**{"sharding.sequence": 4})
    account = make_plan(settings, with_capacity(math.inf), compile_step=False).account
    traffic = count_traffic(configs.check(settings).model, 128, 4)
    expected = 8 * sum(layer.received.get("collective-permute", 0) for layer in traffic)
    assert account.received["collective-permute"] == pytest.approx(expected)


def test_the_roofline_is_its_slowest_part():
    topology = Topology.parse("v5e:2x2")
    account = make_plan(load(), topology, compile_step=False).account
    for name, seconds in account.seconds(topology).items():
        part = account.work[name]
        parts = part.flops / 197e12, part.moved / 819e9, sum(part.received.values()) / 200e9
        assert seconds == roofline(part, topology) == max(parts)


def test_a_kernel_counts_the_products_of_its_tiles():
    """About as many as plain JAX multiplies; it moves fewer bytes, because no scores leave the chip."""
    changes = {"model.schedule": "full", "data.length": 4096, "train.batch": 1, "eval.batch": 1}
    kernel, plain = (
        make_plan(
            configs.load("preset:dense", changes | {"model.layers.full.mixer.impl": impl}),
            Topology.parse("v5e:1x1"),
            compile_step=False,
        ).account.work["full"]
        for impl in ("tpu", "gather")
    )
    assert plain.flops < kernel.flops < 1.2 * plain.flops
    assert kernel.moved < plain.moved / 4


def test_recomputation_takes_fewer_activations():
    def activations(policy):
        layers = configs.check(load()).model.layers
        settings = load(**{f"model.layers.{name}.remat": policy for name in layers})
        return make_plan(settings, with_capacity(math.inf), compile_step=False).account.activations

    assert activations("full") < activations("attention") < activations("none")


def test_the_smallest_change_comes_first():
    plan = make_plan(load(), with_capacity(math.inf, 2), compile_step=False)
    topology = with_capacity(0.9 * plan.peak, 2)
    assert not make_plan(load(), topology, compile_step=False).fits
    proposals = propose(load(), topology, compile_step=False)
    assert proposals
    for proposal in proposals:
        again = make_plan(load(**proposal.overrides), topology, compile_step=False)
        assert again.fits
        assert again.peak == proposal.plan.peak
        assert len({key.partition(".")[0] for key in proposal.overrides}) == 1
    times = [sum(proposal.plan.account.seconds(topology).values()) for proposal in proposals]
    assert times == sorted(times)


@pytest.mark.nightly
def test_changes_are_combined_if_none_is_enough():
    settings = load(**{"train.batch": 2, "eval.batch": 2})
    peak = make_plan(settings, with_capacity(math.inf, 2), compile_step=False).peak
    single = propose(settings, with_capacity(0.99 * peak, 2), compile_step=False)
    least = min(proposal.plan.peak for proposal in single)
    for proposal in propose(settings, with_capacity(0.9 * least, 2), compile_step=False):
        assert proposal.plan.peak <= 0.9 * least
        assert len({key.partition(".")[0] for key in proposal.overrides}) > 1
    assert propose(settings, with_capacity(1000, 2), compile_step=False) == []


def test_lengths_double_until_they_do_not_fit():
    peak = make_plan(load(), with_capacity(math.inf), compile_step=False).peak
    plans = list(sweep_lengths(load(), with_capacity(3 * peak), 4096, compile_step=False))
    assert [plan.length for plan in plans] == [128 * 2**i for i in range(len(plans))]
    assert [plan.fits for plan in plans] == [True] * (len(plans) - 1) + [False]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="cannot be split evenly over 3 devices"):
        make_plan(load(), with_capacity(math.inf, 3), compile_step=False)


def test_without_a_compiler_the_account_remains(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["plan", "--config=preset:window", "--on=v5e:2x2", "--config.train.batch=8", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["compiled"] is None
    assert "pip install 'sparsejax[tpu]'" in plan["problem"]
    assert plan["account"]["peak"] > 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--on=v9:4x4"], "no device to plan for"),
        (["--on=h100:8", "--length=0"], "0 is below 1"),
        (["--on=h100:8", "--config.sharding.fsdp=3"], "is not the number of devices, 8"),
        (["--on=h100:4", "--config.sharding.sequence=4", "--config.data.length=126"], "use 124 or 128"),
    ],
)
def test_bad_input_is_one_line(arguments, problem, capsys):
    assert main(["plan", "--config=preset:window", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert problem in error


def test_the_compiler_agrees_on_devices_of_the_cpu():
    """The account of the arguments is exact; those of the peak and of the collectives are near."""
    command = [sys.executable, "-m", "sparsejax", "plan", "--config=preset:window", "--on=cpu:4", "--json"]
    overrides = [f"--config.{key}={value}" for key, value in (SMALL | {"sharding.tensor": 2}).items()]
    result = subprocess.run([*command, *overrides], capture_output=True, text=True, check=True)
    plan = json.loads(result.stdout)
    assert plan["problem"] == ""
    account, compiled = plan["account"], plan["compiled"]
    arguments = account["parameters"] + account["optimizer"] + account["batch"]
    assert compiled["arguments"] == pytest.approx(arguments, abs=256)
    assert account["peak"] == pytest.approx(compiled["peak"], rel=0.05)
    assert sum(account["received"].values()) == pytest.approx(sum(compiled["received"].values()), rel=0.05)
