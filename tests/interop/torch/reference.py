"""The PyTorch process of `parity.py`, for a Python interpreter with torch and transformers.

It reads one JSON request per line of standard input, and writes one JSON response per line:

    {"do": "versions"}
    {"do": "make", "family": NAME, "seed": S, "number": N, "folder": PATH}
    {"do": "run", "family": NAME, "seed": S, "number": N, "folder": PATH}

`make` writes a random model with `save_pretrained`, its logits, streams and loss in `outputs.npz`, and its gradients in
the folder `gradients`, as a checkpoint with the same tensors. `run` loads a folder and writes its logits there, in
`logits.npy`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from torch.nn import functional

from benchmarks.harness import THREADS, serve
from tests.interop.torch.random_models import Case, draw_case, to_legacy

# A model whose rounding errors exceed these (logits absolute, gradients relative) is redrawn with a smaller gain.
LOGIT_NOISE, GRADIENT_NOISE = 5e-5, 2e-4
# Other tolerances by family. Rounding of scores of -1e5 in Reformer does not shrink with the weights.
NOISE = {"jamba": 1e-4, "qwen3_next": 1e-4, "reformer": 0.1}
GAIN_DECAY, MAX_TRIES = 0.7, 12

MASKED = ("bert", "big_bird", "longformer", "modernbert", "roberta")  # families with a masked language model head
OFFSET_NORMS = r"gemma|qwen3_next"  # families that store the scales of norms minus 1
UNUSED = r"pooler|predictions\.bias|lm_head\.bias|slope_rate|_decay$"  # tensors that logits do not depend on
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def make(family: str, seed: int, number: int, folder: str) -> dict[str, Any]:
    """Writes a folder; returns the differences between float32 and float64, and the gain of the weights."""
    case, path = draw_case(family, seed, number), Path(folder)
    gain = 1.0
    for attempt in range(MAX_TRIES):
        write_model(case, 1000 * seed + number + 10**6 * attempt, gain, path)
        model = load(case, path)
        actual, exact = measure(model, case), measure_exactly(model, case)
        noise, gradient_noise = compare(actual, exact, case)
        if noise <= NOISE.get(family, LOGIT_NOISE) and gradient_noise <= GRADIENT_NOISE:
            break
        gain *= GAIN_DECAY
    else:
        return {"error": f"float32 differs by {noise:.1e} and {gradient_noise:.1e} for any gain"}
    write_outputs(path, model, actual)
    return {"noise": noise, "gradient_noise": gradient_noise, "gain": gain}


def run(family: str, seed: int, number: int, folder: str) -> dict[str, Any]:
    """Loads a folder and writes its logits; returns the tensors that are missing or unknown."""
    case, path = draw_case(family, seed, number), Path(folder)
    model, loading = auto_class(case).from_pretrained(path, dtype=torch.float32, output_loading_info=True, **EAGER)
    inputs = {key: torch.from_numpy(value) for key, value in case.inputs.items() if key != "labels"}
    with torch.no_grad():
        logits = model.eval()(**inputs, use_cache=False).logits
    np.save(path / "logits.npy", logits.numpy())
    names = sorted({*loading["missing_keys"], *loading["unexpected_keys"]})
    return {"class": type(model).__name__, "names": [name for name in names if not re.search(UNUSED, name)]}


def write_model(case: Case, seed: int, gain: float, folder: Path) -> None:
    """Writes the checkpoint, with config.json in the current or the legacy format."""
    config = transformers.AutoConfig.for_model(case.family, **copy.deepcopy(case.config))
    model = auto_class(case).from_config(config, **EAGER)
    generator = torch.Generator().manual_seed(seed)
    biases = [(name, x) for name, x in model.named_buffers() if name.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *biases]:
            parameter.copy_(draw_parameter(case.family, name, parameter.shape, gain, generator))
    model.save_pretrained(folder)
    if case.legacy:
        path = folder / "config.json"
        current = json.loads(model.config.to_json_string(use_diff=True))
        path.write_text(json.dumps(to_legacy(case.family, current), indent=2))


def draw_parameter(family: str, name: str, shape: torch.Size, gain: float, generator: torch.Generator) -> torch.Tensor:
    """Draws a parameter such that every part of the model affects the output."""
    normal = torch.randn(shape, generator=generator)
    if name.endswith("A_log"):
        return torch.rand(shape, generator=generator) * 2.5
    if re.search(r"norm(_f|\d)?\.weight$", name, re.IGNORECASE):
        return 0.3 * normal + (0.0 if re.search(OFFSET_NORMS, family) and "linear_attn" not in name else 1.0)
    if name.endswith(".D"):
        return 1 + 0.5 * normal
    if len(shape) == 1 or name.endswith("bias"):
        return 0.4 * normal
    if "embed" in name:
        return 0.5 * normal
    return gain * normal / shape[-1] ** 0.5


def load(case: Case, folder: Path) -> torch.nn.Module:
    """Loads the model as a user of transformers does."""
    model = auto_class(case).from_pretrained(folder, dtype=torch.float32, **EAGER)
    model.config.use_cache = False
    return model.train(case.traits.plans)


def auto_class(case: Case) -> type:
    """Returns the auto class of the model with its head."""
    masked = case.family in MASKED or not case.config.get("is_decoder", True)
    return transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM


def measure(model: torch.nn.Module, case: Case) -> dict[str, Any]:
    """Computes logits, streams, loss and gradients, and records the random numbers of the forward pass."""
    inputs = {key: torch.from_numpy(value) for key, value in case.inputs.items()}
    labels, valid = inputs.pop("labels"), inputs["attention_mask"].bool()
    drawn = watch_plans(model) if case.traits.plans else []
    model.zero_grad()
    with torch.set_grad_enabled(case.traits.gradients), watch_rotations(case.family, drawn):
        out = model(**inputs, output_hidden_states=True)
        loss = functional.cross_entropy(out.logits[valid], labels[valid])
    gradients = {}
    if case.traits.gradients:
        loss.backward()
        parameters = model.named_parameters()
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters}
    for module in model.modules():  # RecurrentGemma keeps its last state, of which there is no copy in float64
        if hasattr(module, "recurrent_states"):
            module.recurrent_states = None
    length = valid.shape[1]
    return {
        "logits": out.logits.detach().numpy(),
        "streams": [x.detach().numpy()[:, :length] for x in out.hidden_states],
        "loss": loss.item(),
        "gradients": gradients,
        "drawn": drawn,
    }


def measure_exactly(model: torch.nn.Module, case: Case) -> dict[str, Any]:
    """Runs `measure` in float64, also where models request a float32 softmax, in which float64 masks would overflow."""
    softmax = functional.softmax
    wide = mock.patch.object(functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    with wide:
        return measure(copy.deepcopy(model).double(), case)


def watch_plans(model: torch.nn.Module) -> list[np.ndarray]:
    """Returns a list to which a forward pass of BigBird appends the random tiles of each layer, [h, tiles - 2, r]."""
    plans: list[np.ndarray] = []
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        make_mask = type(attention)._create_rand_mask_from_inputs

        def record(*arguments: Any, make_mask: Any = make_mask) -> Any:
            plans.append(arguments[2][0].numpy().copy())
            return make_mask(*arguments)

        attention._create_rand_mask_from_inputs = record
    return plans


@contextlib.contextmanager
def watch_rotations(family: str, drawn: list[np.ndarray]) -> Iterator[None]:
    """Records the hash rotations of Reformer, [h, d, hashes, buckets / 2]; all layers share a seed and so rotations."""
    randn = torch.randn

    def record(*arguments: Any, **options: Any) -> torch.Tensor:
        drawn.append(randn(*arguments, **options))
        return drawn[-1]

    with mock.patch.object(torch, "randn", record) if family == "reformer" else contextlib.nullcontext():
        yield


def compare(actual: dict[str, Any], exact: dict[str, Any], case: Case) -> tuple[float, float]:
    """Returns the largest difference of logits, and of gradients relative to their norms."""
    valid = case.inputs["attention_mask"].astype(bool)
    noise = float(np.abs(actual["logits"][valid] - exact["logits"][valid]).max())
    largest = max((g.norm().item() for g in exact["gradients"].values()), default=0.0)
    errors = [
        ((actual["gradients"][name] - g).norm() / (g.norm() + 1e-3 * largest)).item()
        for name, g in exact["gradients"].items()
    ]
    return noise, max(errors, default=0.0)


def write_outputs(folder: Path, model: torch.nn.Module, outputs: dict[str, Any]) -> None:
    """Writes the outputs, and the gradients under the names of the checkpoint."""
    arrays = {"logits": outputs["logits"], "loss": outputs["loss"]}
    arrays |= {f"stream_{i}": x for i, x in enumerate(outputs["streams"])}
    arrays |= {f"drawn_{i}": np.asarray(x, np.float32) for i, x in enumerate(outputs["drawn"])}
    np.savez(folder / "outputs.npz", **arrays)
    if not outputs["gradients"]:
        return
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(outputs["gradients"][name])
        for buffer in model.buffers():
            buffer.zero_()
    model.save_pretrained(folder / "gradients")


def report_versions() -> dict[str, str]:
    """Returns the versions of this process."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    serve({"versions": report_versions, "make": make, "run": run}, errors=(Exception,))
