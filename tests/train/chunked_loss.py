"""The loss of a vocabulary that is sharded over the devices of the axis `tensor`, in chunks of tokens, as JSON."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import config as configs
from sparsejax import sharding
from sparsejax.inference.evaluation import shard_batch
from sparsejax.model import Functional
from sparsejax.train.step import build_gradient
from tests.train import recipe

LOSSES = {"z_loss": 1e-2, "label_smoothing": 0.1}


def main(mesh_sizes: dict[str, int]) -> None:
    settings = recipe.get_config()
    settings.model.update(schedule="local", vocab=1024)
    settings.train.update(LOSSES)
    settings.sharding.update(mesh_sizes)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 1024, (4, 33)).astype(np.int32)
    weights = rng.integers(0, 2, (4, 32)).astype(np.float32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    config = configs.check(settings)
    model, mesh = Functional(config.model), sharding.make_mesh(config.sharding)
    placement = sharding.parameter_shardings(mesh, model.shapes, model.axes)
    parameters = jax.jit(model.init, out_shardings=placement)(jax.random.key(0))
    table = parameters["embedding"]["tokens"]
    assert table.addressable_shards[0].data.shape[0] == 1024 // mesh.shape["tensor"]
    # The plain form, in float64 outside of the model: all logits of one device.
    features = jax.jit(lambda p, x: model.bind(p).forward(x).features)(parameters, batch["inputs"])
    logits = np.asarray(features, np.float64) @ np.asarray(table, np.float64).T
    normalizer = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    plain = {"loss": normalizer - picked, "z_loss": LOSSES["z_loss"] * normalizer**2}
    plain["label_smoothing"] = LOSSES["label_smoothing"] * (picked - logits.mean(-1))
    results = {"plain": {name: float((x * weights).sum() / weights.sum()) for name, x in plain.items()}}
    frozen, gradients = jax.tree.map(lambda _: False, model.shapes), {}
    for chunk in (32, 8, 5):
        settings.train.loss_chunk = chunk
        train = configs.check(settings).train
        with jax.set_mesh(mesh):
            run = jax.jit(lambda p, b, train=train: build_gradient(model, train, mesh, frozen, None)(p, b, None, None))
            objective, gradients[chunk] = run(parameters, shard_batch(batch, mesh))
        results[str(chunk)] = {"loss": float(objective.loss)} | {k: float(x) for k, x in objective.auxiliary.items()}
    results["gradient error"] = max(
        float(jnp.abs(a - b).max() / jnp.abs(b).max())
        for chunk in (8, 5)
        for a, b in zip(jax.tree.leaves(gradients[chunk]), jax.tree.leaves(gradients[32]), strict=True)
    )
    results["gradient"] = [float(np.linalg.norm(x)) for x in jax.tree.leaves(gradients[8])]
    print("RESULT" + json.dumps(results))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
