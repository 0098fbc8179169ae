"""Times Hugging Face: `generate CONFIG PROMPT TOKENS` prints the seconds of each `prefill` or `decode` on its input.

The model has random weights and runs in float32. Decoding is `generate` of TOKENS + 1 tokens less that of one.
"""

from __future__ import annotations

import os
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

path, prompt, generated = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(len(os.sched_getaffinity(0)))
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).eval().float()
tokens = torch.randint(0, model.config.vocab_size, (1, prompt))


def timed(count: int) -> float:
    """Seconds of `generate` for `count` tokens."""
    start = time.perf_counter()
    options = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 0}
    with torch.inference_mode():
        model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return time.perf_counter() - start


timed(2)
for line in sys.stdin:
    first = min(timed(1) for _ in range(2))  # the first may page memory in
    print(first if line.strip() == "prefill" else timed(generated + 1) - first, flush=True)
