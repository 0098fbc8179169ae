"""Peak memory of a prefill: `prefill CONFIG PROMPT` generates a token after a random prompt, and prints JSON."""

from __future__ import annotations

import json
import resource
import sys
import time

import jax
import numpy as np

from sparsejax.inference.generation import Decoder
from sparsejax.interop.huggingface import read_config
from sparsejax.model import Functional

config, prompt = read_config(sys.argv[1]).model, int(sys.argv[2])
model = Functional(config)
tokens = np.random.default_rng(0).integers(0, config.vocab, (1, prompt))
decoder = Decoder(model, model.init(jax.random.key(0)), tokens, 1)
start = time.perf_counter()
decoder.advance()
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak, MB": peak / 1e6, "seconds with compilation": seconds}))
