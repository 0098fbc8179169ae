"""The study of a search, as Optuna keeps it in the search's folder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsejax.sweep.axes import SweepError
from sparsejax.sweep.front import COMPLETE, FAILED, PRUNED, Outcome
from sparsejax.sweep.search import Search

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial

STUDY = "study.journal"
POPULATION = 16  # of a generation of NSGA-II; Optuna's own 50 are for objectives that take no training
REDUCTION = 3  # one in so many of the trials that came as far goes on


def require_packages() -> None:
    """Raises SweepError where Optuna, or what draws the results, is not installed."""
    try:
        import matplotlib  # noqa: F401
        import optuna  # noqa: F401
    except ImportError as error:
        raise SweepError(f"--search: needs {error.name}; pip install 'sparsejax[search]'") from None


def open_study(search: Search, folder: Path, first_rung: int) -> Study:
    """The study in a folder, or a new one. Only one process may do this at a time, which `run_search` sees to.

    `first_rung`: steps after which trials are compared for the first time.
    """
    import optuna
    from optuna.pruners import NopPruner, SuccessiveHalvingPruner
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    journal = (folder / STUDY).resolve()  # the backend's lock is a link to it, and only an absolute one is found
    journal.with_name(f"{STUDY}.lock").unlink(missing_ok=True)  # of a launcher that was killed
    _drop_half_line(journal)
    one = len(search.objectives) == 1
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))),
        study_name="search",
        load_if_exists=True,
        directions=["maximize" if objective.most else "minimize" for objective in search.objectives],
        pruner=SuccessiveHalvingPruner(first_rung, REDUCTION) if one else NopPruner(),
    )


def read_outcomes(trials: Sequence[FrozenTrial]) -> list[Outcome]:
    """What became of the trials of a study; those that are under way are left out."""
    from optuna.trial import TrialState

    states = {TrialState.COMPLETE: COMPLETE, TrialState.PRUNED: PRUNED, TrialState.FAIL: FAILED}
    return [
        Outcome(
            number=trial.number,
            state=states[trial.state],
            values=tuple(trial.values) if trial.state is TrialState.COMPLETE else (),
            reports=dict(trial.intermediate_values),
            overrides=trial.user_attrs.get("overrides", {}),
            run=trial.user_attrs.get("run", ""),
        )
        for trial in trials
        if trial.state in states
    ]


def build_sampler(search: Search, number: int) -> BaseSampler:
    """The sampler of one trial. Each has a seed of its own, so that a search that goes on draws what it would have."""
    from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler

    seed = random.Random(f"{search.seed} {number}").getrandbits(32)
    if search.sampler == "nsga2":
        return NSGAIISampler(population_size=POPULATION, seed=seed)
    return TPESampler(seed=seed) if search.sampler == "tpe" else RandomSampler(seed=seed)


def _drop_half_line(journal: Path) -> None:
    """Cuts off a last line that a crash has left unfinished, as Optuna would write the next one behind it."""
    if journal.exists():
        text = journal.read_bytes()
        if whole := len(text) - (text.rfind(b"\n") + 1):
            with journal.open("r+b") as file:
                file.truncate(len(text) - whole)
