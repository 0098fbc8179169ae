"""The PyTorch side of `check_huggingface.py`: a process of its own, run by a Python that has torch and transformers.

It answers one request for each line of standard input (JSON), with one line (JSON):

    {"do": "versions"}
    {"do": "make", "family": NAME, "seed": S, "number": N, "folder": PATH}

`make` writes a random model as `save_pretrained` does, `outputs.npz` with what it computes (logits, streams, loss) and
a folder `gradients`: the same checkpoint with the gradient of each tensor in its place.
"""

from __future__ import annotations

import copy
import functools
import json
import platform
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from contest import THREADS
from random_models import Case, draw_case, write_old
from torch.nn import functional

# A model that amplifies rounding beyond these (logits absolute, gradients relative) gets smaller weights.
NOISE, GRADIENT_NOISE = 5e-5, 2e-4
SMALLER, TRIES = 0.7, 12

MASKED = ("longformer", "big_bird", "modernbert")  # families whose head is that of a masked language model
STARTS_AT_ZERO = r"gemma|qwen3_next"  # families that store the scales of norms less 1


def make(family: str, seed: int, number: int, folder: str) -> dict[str, Any]:
    """Writes a folder: how far float32 is from float64 there, and the size of its weights."""
    case, place = draw_case(family, seed, number), Path(folder)
    gain = 1.0
    for _ in range(TRIES):
        write_model(case, seed, number, gain, place)
        model = load(case, place)
        found, exact = measure(model, case), measure_exactly(model, case)
        noise, gradient_noise = compare(found, exact, case)
        if noise <= NOISE and gradient_noise <= GRADIENT_NOISE:
            break
        gain *= SMALLER
    else:
        return {"error": f"float32 is off by {noise:.1e} and {gradient_noise:.1e} for any size of weights"}
    write_outputs(place, model, found)
    return {"noise": noise, "gradient_noise": gradient_noise, "gain": gain}


def write_model(case: Case, seed: int, number: int, gain: float, folder: Path) -> None:
    """The checkpoint, with config.json as today or as it was."""
    kind = transformers.AutoConfig.for_model(case.family, **copy.deepcopy(case.config))
    model = auto_class(case.family).from_config(kind, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1000 * seed + number)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
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
    if name.endswith(("norm.weight", "Norm.weight", "norm_f.weight")) or re.search(r"norm\d?\.weight$", name):
        return 0.3 * normal + (0.0 if re.search(STARTS_AT_ZERO, family) else 1.0)
    if name.endswith(".D"):
        return 1 + 0.5 * normal
    if len(shape) == 1:
        return 0.4 * normal
    if "embed" in name:
        return 0.5 * normal
    return gain * normal / np.sqrt(np.prod(shape[1:]))


def load(case: Case, folder: Path) -> torch.nn.Module:
    """The model as a reader of the folder gets it."""
    model = auto_class(case.family).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    model.config.use_cache = False
    return model.train(case.traits.plans)


def auto_class(family: str) -> type:
    """What makes a model with its head."""
    return transformers.AutoModelForMaskedLM if family in MASKED else transformers.AutoModelForCausalLM


def measure(model: torch.nn.Module, case: Case) -> dict[str, Any]:
    """Logits, streams, loss, gradients, and the random tiles that training drew."""
    inputs = {key: torch.from_numpy(value) for key, value in case.inputs.items()}
    labels, shown = inputs.pop("labels"), inputs["attention_mask"].bool()
    plans = watch_plans(model) if case.traits.plans else []
    model.zero_grad()
    out = model(**inputs, output_hidden_states=True)
    loss = functional.cross_entropy(out.logits[shown], labels[shown])
    loss.backward()
    length = shown.shape[1]
    return {
        "logits": out.logits.detach().numpy(),
        "streams": [x.detach().numpy()[:, :length] for x in out.hidden_states],
        "loss": loss.item(),
        "gradients": {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
        },
        "plans": plans,
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


def compare(found: dict[str, Any], exact: dict[str, Any], case: Case) -> tuple[float, float]:
    """Largest differences of logits, and of gradients relative to their norms."""
    shown = case.inputs["attention_mask"].astype(bool)
    noise = float(np.abs(found["logits"][shown] - exact["logits"][shown]).max())
    top = max(g.norm().item() for g in exact["gradients"].values())
    errors = [
        ((found["gradients"][name] - g).norm() / (g.norm() + 1e-3 * top)).item()
        for name, g in exact["gradients"].items()
    ]
    return noise, max(errors)


def write_outputs(folder: Path, model: torch.nn.Module, found: dict[str, Any]) -> None:
    """What the model computes; gradients by the names that a checkpoint has."""
    arrays = {"logits": found["logits"], "loss": found["loss"]}
    arrays |= {f"stream_{i}": x for i, x in enumerate(found["streams"])}
    arrays |= {f"plan_{i}": plan for i, plan in enumerate(found["plans"])}
    np.savez(folder / "outputs.npz", **arrays)
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
