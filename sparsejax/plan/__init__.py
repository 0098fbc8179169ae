"""Planning: the memory, the work and the traffic of a training step on devices that need not exist."""

from sparsejax.plan.compiled import Compiled
from sparsejax.plan.planner import DeviceAccount, Plan, Proposal, make_plan, propose, roofline, sweep_lengths
from sparsejax.plan.topologies import MACHINES, Machine, Topology

__all__ = [
    "MACHINES",
    "Compiled",
    "DeviceAccount",
    "Machine",
    "Plan",
    "Proposal",
    "Topology",
    "make_plan",
    "propose",
    "roofline",
    "sweep_lengths",
]
