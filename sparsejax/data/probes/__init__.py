"""Probes: synthetic tasks that test one ability each, with their source papers and published results.

    probe = PROBES["mqar"](length=128, pairs=8)
    probe.example(seed=0, index=5)  # inputs, targets, weights: always the same

An example is a pure function of its seed and index; `Probe.example` describes its arrays.
"""

from sparsejax.data.probes.copying import Duplication, SelectiveCopying
from sparsejax.data.probes.documents import TextClassification, TextRetrieval
from sparsejax.data.probes.example import Example, Probe
from sparsejax.data.probes.images import Digits, Pathfinder
from sparsejax.data.probes.listops import ListOps
from sparsejax.data.probes.needle import KeyValue, Passkey, grid
from sparsejax.data.probes.recall import InductionHeads, Mqar
from sparsejax.data.probes.ruler import CommonWords, FrequentWords, Needles, VariableTracking
from sparsejax.data.probes.state_tracking import StateTracking

# Values of `data.task` -> the class whose fields are the section `data.probe`.
PROBES: dict[str, type[Probe]] = {
    "mqar": Mqar,
    "induction_heads": InductionHeads,
    "selective_copying": SelectiveCopying,
    "duplication": Duplication,
    "passkey": Passkey,
    "key_value": KeyValue,
    "needles": Needles,
    "variable_tracking": VariableTracking,
    "common_words": CommonWords,
    "frequent_words": FrequentWords,
    "listops": ListOps,
    "pathfinder": Pathfinder,
    "digits": Digits,
    "state_tracking": StateTracking,
    "text_classification": TextClassification,
    "text_retrieval": TextRetrieval,
}

__all__ = [
    "PROBES",
    "CommonWords",
    "Digits",
    "Duplication",
    "Example",
    "FrequentWords",
    "InductionHeads",
    "KeyValue",
    "ListOps",
    "Mqar",
    "Needles",
    "Passkey",
    "Pathfinder",
    "Probe",
    "SelectiveCopying",
    "StateTracking",
    "TextClassification",
    "TextRetrieval",
    "VariableTracking",
    "grid",
]
