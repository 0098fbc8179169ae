"""`show`, with every number computed by hand for the recipe of the tests."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from sparsejax import config as configs
from sparsejax.cli import USAGE_ERROR, main
from sparsejax.errors import InputError
from sparsejax.interop import huggingface
from sparsejax.show import show
from tests.messages import check_message, rejects
from tests.train import recipe

pytestmark = pytest.mark.quick

LENGTH = 64
# Width 16. Every layer has two norms of 16 and an MLP of 16 x 16 and back: 544 parameters, 1,024 FLOPs.
MLP = 2 * 16 + 2 * 16 * 16, 2 * 2 * 16 * 16
# Two heads of 8 that share one head of keys and values: query and output 16 x 16, key and value 16 x 8.
ATTENTION = 2 * 16 * 16 + 2 * 16 * 8, 2 * (2 * 16 * 16 + 2 * 16 * 8)
# window(5): 1 to 6 keys for the first six queries, 6 for the others, and the 2 sinks once they are out of it.
LOCAL = 2 * (21 + 58 * 6 + 1 + 57 * 2)
FULL = 2 * 64 * 65 // 2
EXPECTED = {
    # parameters, pairs, FLOPs per token, bytes of cache; every head has a single tile
    "ssm": (
        # input, gate, out; convolution of 3 with bias; dt 2, B 4, C 4; dt from 2, with bias; decay; skip
        3 * 16 * 16 + 4 * 16 + 16 * 10 + 2 * 16 + 16 + 16 * 4 + 16 + MLP[0],
        0,
        2 * (3 * 16 * 16 + 16 * 10 + 2 * 16) + 16 * (2 * 3 + 7 * 4) + MLP[1],
        4 * (2 * 16 + 16 * 4),
    ),
    # 6 slots in the ring and 2 for the sinks, each a key and a value
    "local": (ATTENTION[0] + MLP[0], LOCAL, ATTENTION[1] + 4 * 8 * LOCAL // 64 + MLP[1], 8 * 4 * 2 * 8),
    "full": (ATTENTION[0] + MLP[0], FULL, ATTENTION[1] + 4 * 8 * FULL // 64 + MLP[1], 64 * 4 * 2 * 8),
}
SCHEDULE = ["ssm", "local", "ssm", "local", "full"]


def shown(length=LENGTH, **model):
    out, settings = io.StringIO(), recipe.get_config()
    settings.model.update(model)
    config = configs.check(settings)
    show(config.model, length, Console(file=out, width=160))
    return out.getvalue().splitlines()


@pytest.fixture
def table():
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in shown()]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_no_width_cuts_a_number(width):
    def cells(width):
        out = io.StringIO()
        show(configs.check(configs.load("preset:jamba_1_5_large")).model, 262_144, Console(file=out, width=width))
        lines = [line for line in out.getvalue().splitlines() if line[:1] in "│┃┏└├┡"]
        assert max(map(len, lines)) <= width
        return {
            cell.strip() for line in lines for cell in line.split("│") if "," in cell and cell.strip()[:1].isdigit()
        }

    wide = cells(400)
    assert len(wide) > 10
    assert cells(width) == wide


def test_long_patterns_are_folded():
    text = f"per_head({', '.join(f'causal & window({n})' for n in range(1, 5))})"
    layers = recipe.get_config().model.layers.to_dict()
    layers["full"]["mixer"] |= {"heads": 4, "kv_heads": 4, "head_width": 4, "pattern": text}
    rows = [line for line in shown(schedule="full", layers=layers) if line.startswith("│")]
    assert len(rows) <= 5  # of the layer at most three, then those outside of the layers and the total
    assert any("per_head(" in row for row in rows)


def numbers(cells):
    return tuple(int(cell.replace(",", "")) for cell in cells)


def test_every_layer_has_a_row_with_its_costs(table):
    rows = [row for row in table if row[0].isdigit()]
    assert [row[1] for row in rows] == SCHEDULE
    assert [numbers(row[4:8]) for row in rows] == [EXPECTED[name] for name in SCHEDULE]
    assert [row[8] for row in rows] == ["-", "100.00%", "-", "100.00%", "100.00%"]
    assert rows[0][2:4] == ["mamba 16 x 4", "-"]
    assert rows[1][2:4] == ["attention 2/1 x 8", "causal & (window(5) | sink(2))"]
    assert rows[4][2:4] == ["attention 2/1 x 8", "causal"]


def test_the_total_adds_the_embedding_and_the_head(table):
    (total,) = [row for row in table if "total" in row]
    layers = [sum(column) for column in zip(*(EXPECTED[name] for name in SCHEDULE), strict=True)]
    embedding, norm, head = 256 * 16, 16, 2 * 16 * 256
    assert numbers(total[-5:-1]) == (layers[0] + embedding + norm, layers[1], layers[2] + head, layers[3])
    assert total[-1] == "100.00%"


def test_unselected_experts_are_not_active():
    experts = {"kind": "experts", "experts": 4, "top_k": 1, "width": 16, "activation": "silu"}
    layers = recipe.get_config().model.layers.to_dict()
    layers["full"]["mlp"] = experts
    lines = shown(schedule="ssm full", layers=layers)
    (heading,) = [line for line in lines if "FLOPs/token" in line]
    assert "active" in heading
    assert "active" not in shown()[1]
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines if "│" in line]
    dense = EXPECTED["ssm"][0]
    routed = EXPECTED["full"][0] - MLP[0] + 2 * 16 + 16 * 4 + 4 * 3 * 16 * 16  # two norms, router, gate, up and down
    outside = 256 * 16 + 16
    assert [numbers(row[-6:-4]) for row in rows] == [
        (dense, dense),
        (routed, routed - 3 * 3 * 16 * 16),
        (outside, outside),
        (dense + routed + outside, dense + routed + outside - 3 * 3 * 16 * 16),
    ]


def test_live_tiles_are_a_fraction_of_all_tiles():
    (row,) = [line.split("│") for line in shown(512, schedule="local") if "attention" in line]
    assert row[-2].strip() == "56.25%"  # of 4 x 4 tiles 4 on the diagonal, 3 beside it, 2 more with sinks


def test_the_summary_has_the_costs_of_a_sequence():
    forward = 64 * (sum(EXPECTED[name][2] for name in SCHEDULE) + 2 * 16 * 256)
    scores = 4 * sum(EXPECTED[name][1] for name in SCHEDULE)
    (line,) = [line for line in shown() if line.startswith("one sequence")]
    assert line.startswith(f"one sequence: {forward:,.0f} FLOPs forward, {3 * forward:,.0f} in training; {scores:,} ")


def test_the_choice_of_keys_is_in_a_line():
    """An indexer with two heads of 8 in the full layer: queries, a key and weights from the stream."""
    layers = recipe.get_config().model.layers.to_dict()
    layers["full"]["mixer"]["indexer"] = {"heads": 2, "width": 8, "top_k": 8, "loss_weight": 1.0}
    index = 2 * 16 * (2 * 8 + 8 + 2) + 2 * 65 * 8  # projections, and 65 scored pairs per token on average
    kept = 2 * (sum(range(9)) + 8 * 56)  # of both heads of attention
    losses = 2 * kept * (8 + 3 * 8) / 64
    (line,) = [line for line in shown(schedule="ssm full", layers=layers) if line.startswith("choice")]
    assert line == (
        f"choice of keys: {64 * 65:,} scored pairs, {index:,} FLOPs/token, {64 * 8 * 4:,} cache bytes;"
        f" losses: {losses:,.0f} FLOPs/token in training"
    )
    assert not any(line.startswith("choice") for line in shown())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("2x(ssm local) full", "64 after layer 0; unchanged up to layer 4"),
        # Windows do not reach the two sinks: 5 + 2 inputs are new, then those of the next window.
        ("4x(local) full", "8 after layer 0; +5 per layer to 23 after layer 3; 64 after layer 4"),
        ("local", "8 after layer 0"),
    ],
    ids=["hybrid", "windows", "window"],
)
def test_the_receptive_field_is_one_line(schedule, expected):
    (line,) = [line for line in shown(schedule=schedule) if line.startswith("receptive field")]
    assert line == f"receptive field of the last position, of 64 inputs: {expected}"


def test_warnings_come_last():
    assert not [line for line in shown() if "warning" in line]
    warning = shown(schedule="2x(local)")[-1]
    assert warning.startswith("warning: layers 0-1 (local): ")
    check_message(warning)


def test_a_length_below_one_is_rejected():
    with rejects(InputError, "length"):
        show(configs.check(recipe.get_config()).model, 0, Console(file=io.StringIO()))


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("path", ["jamba", "jamba/config.json"])
def test_a_checkpoint_is_described(path, capsys):
    assert main(["show", f"--hf={GOLDEN / path}", "--length=100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "2x(ssm ssm_experts full ssm_experts), 100 tokens"
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines]
    full = next(row for row in rows if row[1:2] == ["full"])
    # Four heads of 6, two of keys and values; an MLP of 20; two norms. All keys and values are kept, in float32.
    parameters = 2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 20 + 2 * 24
    assert (full[2:4], numbers(full[4:6]), numbers(full[6:7])) == (
        ["attention 4/2 x 6", "causal"],
        (parameters, parameters),
        (4 * 100 * 101 // 2,),
    )
    assert numbers(full[8:9]) == (2 * 100 * 12 * 4,)
    assert any(
        line.startswith("receptive field of the last position, of 100 inputs: 100 after layer 0") for line in lines
    )


def test_a_checkpoint_has_the_length_and_dtype_of_its_file(tmp_path):
    source = json.loads((GOLDEN / "mistral_sliding" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(source | {"dtype": "bfloat16", "max_position_embeddings": 777}))
    model, length = huggingface.describe(tmp_path)
    assert (model.dtype, length) == ("bfloat16", 777)
    assert huggingface.describe(GOLDEN / "longformer")[1] == 140 - 2  # positions of RoBERTa start behind padding


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--hf=nowhere"], "nowhere"),
        (["--hf=a", "--config=b"], "--hf"),
        (["--hf=a", "--complexity"], "--complexity"),
        (["--hf=a", "--config.model.width=8"], "--config.model.width"),
        (["--complexity", "--config.model.width=8"], "--config.model.width"),
        (["--complexity", "--length=0"], "--length"),
        (["--complexity=timed"], "--complexity"),
        (["--complexity", "--ignore=mtp"], "--ignore"),
        ([], "--config"),
    ],
)
def test_options_that_cannot_be_combined(arguments, named, capsys):
    assert main(["show", *arguments]) == USAGE_ERROR
    line = capsys.readouterr().err
    assert named in line
    check_message(line.rstrip("\n"))
