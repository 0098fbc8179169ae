from types import SimpleNamespace

import pytest

from sparsejax import schedule
from sparsejax.schedule import ScheduleError
from sparsejax.sweep import place_layers, repeat_period, suggest_period, suggest_placement
from tests.messages import rejects

pytestmark = pytest.mark.quick


class Draws(SimpleNamespace):
    """A trial that draws fixed values, and records the choices."""

    def __init__(self, **values):
        super().__init__(values=values, choices={})

    def suggest_categorical(self, name, choices):
        self.choices[name] = choices
        return self.values[name.replace(".", "_")]


@pytest.mark.parametrize(
    ("placement", "count", "expected"),
    [
        ("early", 2, "FF......"),
        ("late", 2, "......FF"),
        ("periodic", 2, "...F...F"),
        ("periodic", 3, ".F..F..F"),
        ("periodic", 8, "FFFFFFFF"),
        ("first-middle-last", 1, "....F..."),
        ("first-middle-last", 2, "F......F"),
        ("first-middle-last", 3, "F...F..F"),
        ("early", 0, "........"),
        ("periodic", 0, "........"),
        ("first-middle-last", 0, "........"),
    ],
)
def test_placements(placement, count, expected):
    text = place_layers("ssm", "full", 8, count, placement)
    assert "".join({"ssm": ".", "full": "F"}[name] for name in schedule.parse(text)) == expected


def test_every_count_is_kept():
    for layers in range(1, 14):
        for count in range(layers + 1):
            for placement in ("early", "late", "periodic", "first-middle-last"):
                names = schedule.parse(place_layers("a", "b", layers, count, placement))
                assert (len(names), names.count("b")) == (layers, count)


def test_invalid_placements():
    with rejects(ScheduleError, "place_layers"):
        place_layers("ssm", "full", 8, 9, "early")
    with rejects(ScheduleError, "placement"):
        place_layers("ssm", "full", 8, 2, "middle")


def test_periods():
    assert repeat_period(("ssm", "ssm", "local"), 6) == "2x(2x(ssm) local)"
    assert schedule.parse(repeat_period(("a", "b", "c"), 5)) == ("a", "b", "c", "a", "b")


def test_draws():
    trial = Draws(schedule_0="ssm", schedule_1="full")
    assert suggest_period(trial, ("ssm", "full"), layers=4, period=2) == "2x(ssm full)"
    assert trial.choices == {"schedule.0": ["ssm", "full"], "schedule.1": ["ssm", "full"]}
    trial = Draws(deep_count=1, deep_placement="late")
    assert suggest_placement(trial, "ssm", "full", 4, (0, 1, 2), key="deep") == "3x(ssm) full"
    trial = Draws(schedule_count=0)
    assert suggest_placement(trial, "ssm", "full", 4, (0, 1, 2)) == "4x(ssm)"
    assert list(trial.choices) == ["schedule.count"]  # without layers there is no placement
