"""Does a run fit its devices? The account of its training step, what the compiler says, and the changes that help."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax.config import Config
from sparsejax.errors import InputError
from sparsejax.overrides import Overrides
from sparsejax.plan.compiled import Compiled, OutOfMemory, compile_program
from sparsejax.plan.program import ShardedProgram, Work, shard_program, sum_received
from sparsejax.plan.topologies import CompilerMissing, Topology
from sparsejax.plan.training import Training, describe_training
from sparsejax.runs.phases import Phase, plan_phases
from sparsejax.sharding import MESH_AXES, resolve_axes

REMAT = ("none", "attention", "full")  # policies that a search tries, by the memory that they take
PROPOSALS = 3  # that a search returns
TRIALS = 16  # candidates with the same number of changes that a search accounts for


@dataclasses.dataclass(frozen=True)
class DeviceAccount:
    """The predicted memory and work of a training step on a device.

    Attributes:
      parameters: Bytes of the parameters.
      optimizer: Bytes of the state of the optimizer.
      batch: Bytes of the batch and of counters.
      teacher: Bytes of the parameters of the teacher.
      activations: Bytes that the forward pass keeps for the backward pass.
      temporaries: Bytes of everything else at the peak, gradients among them.
      work: FLOPs, moved bytes and received bytes by layer.
    """

    parameters: int
    optimizer: int
    batch: int
    teacher: int
    activations: int
    temporaries: int
    work: Mapping[str, Work]

    @property
    def arguments(self) -> int:
        """Bytes of the arguments of the step."""
        return self.parameters + self.optimizer + self.batch + self.teacher

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return self.arguments + self.activations + self.temporaries

    @property
    def received(self) -> Counter[str]:
        """Bytes that arrive from other devices, by collective."""
        return sum_received(self.work)

    def seconds(self, topology: Topology) -> dict[str, float]:
        """The time of a step by layer, at the peaks of a device; see `roofline`."""
        return {name: roofline(part, topology) for name, part in self.work.items()}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training step on a topology.

    Attributes:
      topology: The devices.
      phase: The phase with the largest peak; None for a run without phases.
      length: Tokens per row.
      axes: Size of each axis of the mesh.
      account: The prediction.
      compiled: The compiler's word; None if it was not asked, or `problem` says why.
      problem: Why there is no compiled program: no compiler, or the program exceeds the memory.
      exceeds: Whether the compiler says that it exceeds the memory.
    """

    topology: Topology
    phase: str | None
    length: int
    axes: tuple[int, ...]
    account: DeviceAccount
    compiled: Compiled | None = None
    problem: str = ""
    exceeds: bool = False

    @property
    def compiler_missing(self) -> bool:
        """Whether the compiler was asked and is not there."""
        return bool(self.problem) and not self.exceeds

    @property
    def peak(self) -> int:
        """Bytes at the peak, by the compiler if it was asked."""
        return self.account.peak if self.compiled is None else self.compiled.peak

    @property
    def fits(self) -> bool:
        """Whether the peak is within the memory of a device."""
        return not self.exceeds and self.peak <= self.topology.capacity


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Changes with which a run fits.

    Attributes:
      overrides: The changes.
      plan: The plan with them.
    """

    overrides: Overrides
    plan: Plan


def roofline(work: Work, topology: Topology) -> float:
    """Seconds of some work on a device at its peaks; 0 for a device without known peaks.

    The largest of FLOPs / peak, moved bytes / bandwidth and received bytes / interconnect: they overlap at best.
    """
    machine = topology.machine
    if not machine.flops:
        return 0.0
    received = sum(work.received.values())
    return max(work.flops / machine.flops, work.moved / machine.bandwidth, received / machine.interconnect)


def make_plan(settings: ConfigDict, topology: Topology, compile_step: bool) -> Plan:
    """Plans the phase of a run whose account has the largest peak.

    Args:
      settings: The configuration.
      topology: The devices.
      compile_step: Whether to compile the step of that phase.

    Raises:
      ConfigError: The configuration is invalid, or does not fit the topology.
    """
    phases = plan_phases(settings)
    steps = phases[-1].stop
    accounts = [predict(describe_training(p, steps, abstract := _abstract(p, topology)), abstract) for p in phases]
    number = max(range(len(phases)), key=lambda i: accounts[i].peak)
    phase = phases[number]
    axes = resolve_axes(phase.config.sharding, topology.count)
    plan = Plan(topology, phase.name, phase.config.data.length, axes, accounts[number])
    return _compile(plan, phase, steps) if compile_step else plan


def _abstract(phase: Phase, topology: Topology) -> AbstractMesh:
    return topology.abstract_mesh(phase.config.sharding)


def _compile(plan: Plan, phase: Phase, steps: int) -> Plan:
    """The plan with the compiler's word."""
    try:
        mesh = plan.topology.mesh(phase.config.sharding)
        training = describe_training(phase, steps, mesh)
        return dataclasses.replace(plan, compiled=compile_program(training.step, training.arguments, mesh))
    except CompilerMissing as error:
        return dataclasses.replace(plan, problem=str(error))
    except OutOfMemory as error:
        return dataclasses.replace(plan, problem=str(error), exceeds=True)


def predict(training: Training, mesh: Mesh | AbstractMesh) -> DeviceAccount:
    """Returns the account of a training step, traced for a mesh that needs no devices."""
    program = trace(training, mesh)
    state = training.state
    parameters, optimizer = count_local_bytes(state.parameters), count_local_bytes(state.optimizer)
    return DeviceAccount(
        parameters=parameters,
        optimizer=optimizer,
        batch=count_local_bytes((training.batch, state)) - parameters - optimizer,
        teacher=count_local_bytes(training.teacher),
        activations=program.memory.activations,
        temporaries=program.memory.peak - program.memory.activations,
        work=program.work,
    )


def trace(training: Training, mesh: Mesh | AbstractMesh) -> ShardedProgram:
    """Returns the program of a device."""
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), training.arguments)
    with jax.sharding.use_abstract_mesh(abstract):
        traced = jax.make_jaxpr(training.step)(*shapes)
    leaves = jax.tree.leaves(training.arguments)
    parameters = [(leaf.shape, leaf.sharding) for leaf in jax.tree.leaves(training.state.parameters)]
    donated = len(jax.tree.leaves(training.state))
    device = getattr(abstract, "abstract_device", None)
    platform = "" if device is None else device.platform
    return shard_program(traced, [leaf.sharding for leaf in leaves], parameters, donated, platform)


def count_local_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on a device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def sweep_lengths(settings: ConfigDict, topology: Topology, longest: int, compile_step: bool) -> Iterator[Plan]:
    """Plans with twice as many tokens per row each time, until the run no longer fits or `longest` is exceeded."""
    length = configs.check(settings).data.length
    while length <= longest:
        plan = make_plan(_override(settings, {"data.length": length}), topology, compile_step)
        yield plan
        if not plan.fits:
            return
        length *= 2


def propose(
    settings: ConfigDict, topology: Topology, compile_step: bool, report: Callable[[str], None] = lambda text: None
) -> list[Proposal]:
    """Returns the smallest changes with which a run fits, the fastest first; empty if none of those tried is enough.

    A change sets the axes of the mesh, `remat` of all layers, or `train.accumulate`. Single changes come first, then
    two and three of them. The account decides; the compiler has the last word on those that are returned.

    Args:
      settings: The configuration.
      topology: The devices.
      compile_step: Whether to compile the steps that are returned.
      report: Receives what is tried.
    """
    config = configs.check(settings)
    for number, group in itertools.groupby(_list_changes(config, topology), key=len):
        fitting: list[Proposal] = []
        changes = [dict(itertools.chain.from_iterable(x.items() for x in parts)) for parts in group]
        for trial, overrides in enumerate(_most_promising(changes, config, topology)):
            report(f"{number} change{'s' * (number > 1)}, trial {trial + 1}: {describe_overrides(overrides)}")
            plan = _try(settings, overrides, topology, compile_step=False)
            if plan is not None and plan.fits:
                fitting.append(Proposal(overrides, plan))
        fitting.sort(key=lambda proposal: (sum(proposal.plan.account.seconds(topology).values()), proposal.plan.peak))
        proposals: list[Proposal] = []
        for proposal in fitting:
            if compile_step:
                report(f"compiling {describe_overrides(proposal.overrides)}")
                plan = _try(settings, proposal.overrides, topology, compile_step=True)
                if plan is None or not plan.fits:
                    continue
                proposal = Proposal(proposal.overrides, plan)
            proposals.append(proposal)
            if len(proposals) == PROPOSALS:
                break
        if proposals:
            return proposals
    return []


def describe_overrides(overrides: Overrides) -> str:
    """The overrides as options of the command line."""
    return " ".join(f"--config.{key}={value}" for key, value in overrides.items())


def _override(settings: ConfigDict, overrides: Overrides) -> ConfigDict:
    changed = settings.copy_and_resolve_references()
    configs.override(changed, overrides)
    return changed


def _try(settings: ConfigDict, overrides: Overrides, topology: Topology, compile_step: bool) -> Plan | None:
    """The plan with overrides; None if they do not fit the model or the batch."""
    try:
        return make_plan(_override(settings, overrides), topology, compile_step)
    except InputError:
        return None


def _list_changes(config: Config, topology: Topology) -> Iterator[tuple[Overrides, ...]]:
    """Single changes, then pairs of them, then triples."""
    options = (_list_meshes(config, topology), _list_policies(config), _list_microbatches(config))
    for number in (1, 2, 3):
        for kinds in itertools.combinations(options, number):
            yield from itertools.product(*kinds)


def _list_meshes(config: Config, topology: Topology) -> list[Overrides]:
    """Other meshes of all devices."""
    devices, current = topology.count, resolve_axes(config.sharding, topology.count)
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    heads = [
        getattr(layer.mixer, "kv_heads", 0) or getattr(layer.mixer, "heads", 0)
        for layer in config.model.layers.values()
    ]
    meshes = []
    for axes in itertools.product(divisors, repeat=len(MESH_AXES)):
        data, fsdp, sequence, tensor = axes
        rows = config.train.batch // config.train.accumulate
        if math.prod(axes) != devices or axes == current or rows % (data * fsdp) or config.data.length % sequence:
            continue
        if all(number % tensor == 0 for number in heads if number):  # heads that it does not divide are replicated
            changed = zip(MESH_AXES, axes, current, strict=True)
            meshes.append({f"sharding.{axis}": new for axis, new, old in changed if new != old})
    return meshes


def _list_policies(config: Config) -> list[Overrides]:
    """Policies for all layers that keep less than the layers do."""
    layers = config.model.layers
    least = max((REMAT.index(layer.remat) if layer.remat in REMAT else 0 for layer in layers.values()), default=0)
    return [{f"model.layers.{name}.remat": policy for name in layers} for policy in REMAT[least + 1 :]]


def _list_microbatches(config: Config) -> list[Overrides]:
    """More microbatches."""
    batch, current = config.train.batch, config.train.accumulate
    counts = [n for n in range(current + 1, batch + 1) if batch % n == 0 and n % current == 0]
    return [{"train.accumulate": n} for n in counts]


def _most_promising(changes: list[Overrides], config: Config, topology: Topology) -> list[Overrides]:
    """The changes that keep the least of parameters and tokens per device, of each kind of mesh."""
    current = dict(zip(MESH_AXES, resolve_axes(config.sharding, topology.count), strict=True))

    def size(overrides: Overrides) -> float:
        axes = {axis: overrides.get(f"sharding.{axis}", current[axis]) for axis in MESH_AXES}
        rows = max(1, config.train.batch / overrides.get("train.accumulate", config.train.accumulate))
        tokens = rows * config.data.length / (axes["data"] * axes["fsdp"] * axes["sequence"])
        state = 1 / (axes["fsdp"] * axes["tensor"])
        policy = next((value for key, value in overrides.items() if key.endswith(".remat")), "none")
        return state * tokens / axes["tensor"] ** 0.5 / (1 + REMAT.index(policy))

    return sorted(changes, key=size)[:TRIALS]
