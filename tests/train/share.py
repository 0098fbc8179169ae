"""One of several processes that read the global batches of a data set: prints a digest of all of them."""

import hashlib
import sys

import jax
import numpy as np


def main(port: str, index: int, count: int, files: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4 // count)
    if count > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=count, process_id=index)
    from jax.experimental import multihost_utils

    from sparsejax import sharding
    from sparsejax.config import ShardingConfig
    from sparsejax.data import DataConfig, load_dataset
    from sparsejax.inference.evaluation import shard_batch, share_rows

    mesh = sharding.make_mesh(ShardingConfig(data=2, fsdp=2, tensor=1))
    dataset = load_dataset(DataConfig("text", files, 32, objective="masked"))
    batches, digest = dataset.train_batches(8, 5, **share_rows(mesh, 8)), hashlib.sha256()
    for _ in range(5):
        for name, array in sorted(shard_batch(next(batches), mesh).items()):
            whole = array if count == 1 else multihost_utils.process_allgather(array, tiled=True)
            digest.update(name.encode() + np.asarray(whole).tobytes())
    print(sharding.local_rows(mesh, 8), digest.hexdigest())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
