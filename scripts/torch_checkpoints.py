"""The PyTorch side of `check_huggingface.py`: a process of its own, run by a Python that has torch and transformers.

It answers one request for each line of standard input (JSON), with one line (JSON):

    {"do": "versions"}
    {"do": "make", "family": NAME, "seed": S, "number": N, "folder": PATH}

`make` writes a random model as `save_pretrained` does, `outputs.npz` with what it computes (logits, streams, loss) and
a folder `gradients`: the same checkpoint with the gradient of each tensor in its place.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from contest import THREADS
from random_models import Case, draw_case, write_old
from torch.nn import functional

# A model that amplifies rounding beyond these (logits absolute, gradients relative) is drawn anew, with less gain.
FLOOR, GRADIENT_NOISE = 5e-5, 2e-4
# Where the tolerance is another; Reformer's noise is that of scores of -1e5, and no smaller for smaller weights.
NOISE = {"jamba": 1e-4, "qwen3_next": 1e-4, "reformer": 0.1}
SMALLER, TRIES = 0.7, 12

MASKED = ("longformer", "big_bird", "modernbert")  # families whose head is that of a masked language model
LESS_ONE = r"gemma|qwen3_next"  # families that store the scales of norms less 1
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def make(family: str, seed: int, number: int, folder: str) -> dict[str, Any]:
    """Writes a folder: how far float32 is from float64 there, and the size of its weights."""
    case, place = draw_case(family, seed, number), Path(folder)
    gain = 1.0
    for attempt in range(TRIES):
        write_model(case, 1000 * seed + number + 10**6 * attempt, gain, place)
        model = load(case, place)
        found, exact = measure(model, case), measure_exactly(model, case)
        noise, gradient_noise = compare(found, exact, case)
        if noise <= NOISE.get(family, FLOOR) and gradient_noise <= GRADIENT_NOISE:
            break
        gain *= SMALLER
    else:
        return {"error": f"float32 is off by {noise:.1e} and {gradient_noise:.1e} for any size of weights"}
    write_outputs(place, model, found)
    return {"noise": noise, "gradient_noise": gradient_noise, "gain": gain}


def write_model(case: Case, seed: int, gain: float, folder: Path) -> None:
    """The checkpoint, with config.json as today or as it was."""
    kind = transformers.AutoConfig.for_model(case.family, **copy.deepcopy(case.config))
    model = auto_class(case).from_config(kind, **EAGER)
    generator = torch.Generator().manual_seed(seed)
    biases = [(name, x) for name, x in model.named_buffers() if name.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *biases]:
            parameter.copy_(draw_parameter(case.family, name, parameter.shape, gain, generator))
    model.save_pretrained(folder)
    if case.old:
        path = folder / "config.json"
        held = json.loads(model.config.to_json_string(use_diff=True))
        path.write_text(json.dumps(write_old(case.family, held), indent=2))


def draw_parameter(family: str, name: str, shape: torch.Size, gain: float, generator: torch.Generator) -> torch.Tensor:
    """Numbers that make every detail matter."""
    normal = torch.randn(shape, generator=generator)
    if name.endswith("A_log"):
        return torch.rand(shape, generator=generator) * 2.5
    if re.search(r"norm(_f|\d)?\.weight$", name, re.IGNORECASE):
        return 0.3 * normal + (0.0 if re.search(LESS_ONE, family) and "linear_attn" not in name else 1.0)
    if name.endswith(".D"):
        return 1 + 0.5 * normal
    if len(shape) == 1 or name.endswith("bias"):
        return 0.4 * normal
    if "embed" in name:
        return 0.5 * normal
    return gain * normal / shape[-1] ** 0.5


def load(case: Case, folder: Path) -> torch.nn.Module:
    """The model as a reader of the folder gets it."""
    model = auto_class(case).from_pretrained(folder, dtype=torch.float32, **EAGER)
    model.config.use_cache = False
    return model.train(case.traits.plans)


def auto_class(case: Case) -> type:
    """What makes a model with its head."""
    masked = case.family in MASKED or not case.config.get("is_decoder", True)
    return transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM


def measure(model: torch.nn.Module, case: Case) -> dict[str, Any]:
    """Logits, streams, loss, gradients, and what the forward pass drew at random."""
    inputs = {key: torch.from_numpy(value) for key, value in case.inputs.items()}
    labels, shown = inputs.pop("labels"), inputs["attention_mask"].bool()
    drawn = watch_plans(model) if case.traits.plans else []
    model.zero_grad()
    with torch.set_grad_enabled(case.traits.gradients), watch_rotations(case.family, drawn):
        out = model(**inputs, output_hidden_states=True)
        loss = functional.cross_entropy(out.logits[shown], labels[shown])
    gradients = {}
    if case.traits.gradients:
        loss.backward()
        found = ((name, p, p.grad) for name, p in model.named_parameters())
        gradients = {name: torch.zeros_like(p) if grad is None else grad.clone() for name, p, grad in found}
    length = shown.shape[1]
    return {
        "logits": out.logits.detach().numpy(),
        "streams": [x.detach().numpy()[:, :length] for x in out.hidden_states],
        "loss": loss.item(),
        "gradients": gradients,
        "drawn": drawn,
    }


def measure_exactly(model: torch.nn.Module, case: Case) -> dict[str, Any]:
    """As `measure`, in float64; softmaxes too, which models ask for in float32, where their masks would be infinite."""
    softmax = functional.softmax
    wide = mock.patch.object(functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    with wide:
        return measure(copy.deepcopy(model).double(), case)


def watch_plans(model: torch.nn.Module) -> list[np.ndarray]:
    """A list that the forward pass of BigBird fills with the random tiles of each layer, [h, tiles - 2, r]."""
    plans: list[np.ndarray] = []
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        make_mask = type(attention)._create_rand_mask_from_inputs

        def note(*arguments: Any, make_mask: Any = make_mask) -> Any:
            plans.append(arguments[2][0].numpy().copy())
            return make_mask(*arguments)

        attention._create_rand_mask_from_inputs = note
    return plans


@contextlib.contextmanager
def watch_rotations(family: str, drawn: list[np.ndarray]) -> Iterator[None]:
    """Notes what Reformer hashes with, [h, d, hashes, buckets / 2]: the same in all layers, as they share a seed."""
    randn = torch.randn

    def note(*arguments: Any, **options: Any) -> torch.Tensor:
        drawn.append(randn(*arguments, **options))
        return drawn[-1]

    with mock.patch.object(torch, "randn", note) if family == "reformer" else contextlib.nullcontext():
        yield


def compare(found: dict[str, Any], exact: dict[str, Any], case: Case) -> tuple[float, float]:
    """Largest differences of logits, and of gradients relative to their norms."""
    shown = case.inputs["attention_mask"].astype(bool)
    noise = float(np.abs(found["logits"][shown] - exact["logits"][shown]).max())
    top = max((g.norm().item() for g in exact["gradients"].values()), default=0.0)
    errors = [
        ((found["gradients"][name] - g).norm() / (g.norm() + 1e-3 * top)).item()
        for name, g in exact["gradients"].items()
    ]
    return noise, max(errors, default=0.0)


def write_outputs(folder: Path, model: torch.nn.Module, found: dict[str, Any]) -> None:
    """What the model computes; gradients by the names that a checkpoint has."""
    arrays = {"logits": found["logits"], "loss": found["loss"]}
    arrays |= {f"stream_{i}": x for i, x in enumerate(found["streams"])}
    arrays |= {f"drawn_{i}": np.asarray(x, np.float32) for i, x in enumerate(found["drawn"])}
    np.savez(folder / "outputs.npz", **arrays)
    if not found["gradients"]:
        return
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found["gradients"][name])
        for buffer in model.buffers():
            buffer.zero_()
    model.save_pretrained(folder / "gradients")


def report_versions() -> dict[str, str]:
    """What answers here."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Answers until standard input ends."""
    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    answers = functools.partial(print, file=sys.stdout, flush=True)
    sys.stdout = sys.stderr  # what a library prints is no answer
    actions = {"versions": report_versions, "make": make}
    for line in sys.stdin:
        request = json.loads(line)
        action = actions[request.pop("do")]
        try:
            answer = action(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers(json.dumps(answer))


if __name__ == "__main__":
    main()
