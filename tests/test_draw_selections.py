"""`sparsejax draw --prompt`: the painted pairs against a selection in NumPy, files, and invalid input."""

import shlex
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from sparsejax import draw
from sparsejax.cli import USAGE_ERROR, main
from sparsejax.data.tokenizers import Bytes
from sparsejax.draw import MAX_LABEL, MAX_SELECTION, Selected, draw_selections, label_token
from sparsejax.loaded import LoadedModel, Source
from sparsejax.model import Functional
from sparsejax.patterns import parse
from sparsejax.patterns.drawing import CHOSEN, DEAD, FORCED, FULL, LEFT_OUT
from tests.check.models import NORM
from tests.messages import check_message

TEXT, HEADS, WIDTH, BLOCK, COUNT = "a cat, a mat", 2, 3, 3, 2
CONFIG = """
from sparsejax.presets import quickstart


def get_config():
    config = quickstart.get_config()
    attention = dict(kind="attention", pattern="causal", heads=2, kv_heads=2, head_width=3, rope=None, qk_norm=None)
    attention["impl"] = "auto"
    section = dict(mlp=None, norm=config.model.norm, norm_position="pre", remat="none")
    near = attention | dict(pattern="causal & window(2)")
    moba = attention | dict(select=dict(kind="moba", count=2, block=3))
    layers = dict(moba=section | dict(mixer=moba), near=section | dict(mixer=near))
    config.model.update(width=6, schedule="near moba", layers=layers, scan=False)
    return config
"""


class TextSource(Source):
    def load_tokenizer(self):
        return Bytes()


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The path of a config whose layer 1 selects."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moba.py").write_text(CONFIG)
    return "moba.py"


def set_by_hand(config):
    """A model with random parameters."""
    random, functional = np.random.default_rng(0), Functional(config.model)
    parameters = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), functional.shapes)
    return LoadedModel(config.model, parameters, TextSource())


def choose_blocks(q, k):
    """MoBA by loops: the block of a query, and the others with the largest product with their mean key."""
    t = len(q)
    states = np.full((t, t), DEAD)
    for query in range(t):
        current = query // BLOCK
        scores = {block: q[query] @ k[block * BLOCK : (block + 1) * BLOCK].mean(axis=0) for block in range(current)}
        best = sorted(scores, key=lambda block: (-scores[block], block))[: COUNT - 1]
        for key in range(query + 1):
            block = key // BLOCK
            states[query, key] = FORCED if block == current else CHOSEN if block in best else LEFT_OUT
    return states


def test_the_painted_pairs_are_those_of_the_selection(config, monkeypatch, capsys):
    panels, models = [], []
    monkeypatch.setattr(draw, "draw_panels", lambda drawn, console, out: panels.extend(drawn))
    monkeypatch.setattr(
        "sparsejax.init.model.start_model", lambda config: models.append(set_by_hand(config)) or models[-1]
    )
    assert main(["draw", f"--config={config}", f"--prompt={TEXT}", "--config.model.schedule=moba near"]) == 0
    static, *selected = panels
    assert static.title == "layer 1: near\ncausal & window(2)"
    np.testing.assert_array_equal(static.states, FULL * parse("causal & window(2)").dense(len(TEXT)))
    parameters = models[0].parameters
    ids = np.frombuffer(TEXT.encode(), np.uint8)
    x = np.asarray(parameters["embedding"]["tokens"], np.float64)[ids]
    layer = parameters["before"][0] if "before" in parameters else parameters["after"][0]
    norm = np.asarray(layer["mixer_residual"]["before"]["scale"], np.float64)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + NORM["eps"]) * norm
    q, k = (x @ np.asarray(layer["mixer"][name]["weight"], np.float64) for name in ("query", "key"))
    assert [panel.title.splitlines()[0] for panel in selected] == ["layer 0: moba, head 0", "layer 0: moba, head 1"]
    for head, panel in enumerate(selected):
        features = slice(head * WIDTH, (head + 1) * WIDTH)
        np.testing.assert_array_equal(panel.states, choose_blocks(q[:, features], k[:, features]))
        assert panel.labels == tuple(TEXT.replace(" ", "␣"))


def test_files_show_the_tokens(config, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["draw", f"--config={config}", "--data=text.txt", "--layers=1", "--heads=1", "--length=7"]
    for ending in (".svg", ".png"):
        files = [tmp_path / f"{name}{ending}" for name in ("first", "second")]
        for file in files:
            assert main([*arguments, f"--out={file}"]) == 0
        assert files[0].read_bytes() == files[1].read_bytes()
    words = [element.text.strip() for element in ElementTree.parse(tmp_path / "first.svg").iter() if element.text]
    assert {"layer 1: moba, head 1", "selected", "always selected", "left out", "masked"} <= set(words)
    assert [word for word in words if len(word) == 1] == [letter for letter in "a␣cat,␣" for _ in range(2)]
    assert main([*arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-9:-2]] == ["@", "@", "@", *[line.split()[0] for line in lines[-6:-2]]]


def test_equal_heads_share_a_panel_and_cells_of_tiles_show_their_last_state():
    random, panels, t = np.random.default_rng(0), [], 70
    chosen = random.random((2, t, t)) < 0.1
    forced = chosen & (random.random((2, t, t)) < 0.2)
    selection = Selected("layer 3: name", "four heads", parse("causal"), chosen, forced, heads=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "draw_panels", lambda drawn, console, out: panels.extend(drawn))
        draw_selections([], [selection], ["word"] * t, Console(width=200), tile=4, out="figure.svg")
    assert [panel.title for panel in panels] == [f"layer 3: name, heads {n}\nfour heads" for n in ("0-1", "2-3")]
    for scope, panel in enumerate(panels):
        assert panel.labels == ()
        for row, column in np.ndindex(panel.states.shape):
            cell = slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)
            causal = np.tri(t, dtype=bool)[cell]
            expected = LEFT_OUT if causal.any() else DEAD
            expected = CHOSEN if (chosen[scope][cell] & causal).any() else expected
            assert panel.states[row, column] == (FORCED if (forced[scope][cell] & causal).any() else expected)


def test_labels_of_tokens():
    assert label_token(" the\n") == "␣the⏎"
    assert label_token("\x00") == "\ufffd"
    assert len(label_token("internationalization")) == MAX_LABEL


BAD = {
    "no layer selects": ("--config=moba.py --config.model.schedule=near --prompt=text", "config"),
    "none of these layers": ("--config=moba.py --layers=0 --prompt=text", "config"),
    "layer": ("--config=moba.py --layers=0,2 --prompt=text", "--layers"),
    "layer of patterns": ("--config=moba.py --layers=-1", "--layers"),
    "not a layer": ("--config=moba.py --layers=x", "--layers"),
    "head": ("--config=moba.py --prompt=text --heads=2", "--heads"),
    "heads of patterns": ("--config=moba.py --heads=1", "--heads"),
    "missing file": ("--config=moba.py --data=absent.txt", "--data"),
    "two texts": ("--config=moba.py --prompt=text --data=moba.py", "--prompt"),
    "empty": ("--config=moba.py --prompt=", "--prompt"),
    "long": (f"--config=moba.py --prompt={'a' * (MAX_SELECTION + 1)}", "--length"),
    "beyond the text": ("--config=moba.py --prompt=text --length=5", "--length"),
    "positions": (f"--config=moba.py --prompt={'a' * 301} --config.model.embedding.positions=300", "--length"),
    "patterns": ("causal --prompt=text", "--prompt"),
    "layers of patterns": ("causal --layers=1", "--layers"),
    "receptive field": ("--config=moba.py --prompt=text --receptive-field", "--receptive-field"),
    "layers of a receptive field": ("--config=moba.py --layers=1 --receptive-field", "--layers"),
    "titles": ("--config=moba.py --prompt=text --titles=A,B", "--titles"),
    "probe": ("--config=probe.py --prompt=text", "data.task"),
    "trained tokenizer": ("--config=moba.py --config.data.tokenizer=bpe:300 --prompt=text", "data.tokenizer"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_input(case, config, tmp_path, capsys):
    (tmp_path / "probe.py").write_text(
        CONFIG.replace("    return", '    config.data.update(task="passkey", probe=dict(length=256))\n    return')
    )
    flags, argument = BAD[case]
    assert main(["draw", *shlex.split(flags)]) == USAGE_ERROR
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert argument in err
    check_message(err.strip())
