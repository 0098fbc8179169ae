"""Model families: modules that translate a config.json and map its tensors."""

from collections.abc import Callable

from sparsejax.interop.huggingface.families import (
    bamba,
    bert,
    bigbird,
    deepseek,
    falcon_h1,
    gemma,
    gpt2,
    gpt_oss,
    jamba,
    kimi,
    llama,
    longformer,
    mamba,
    minimax,
    modernbert,
    nemotron_h,
    qwen3_next,
    reformer,
    zamba2,
)
from sparsejax.interop.huggingface.translation import Translation

# `model_type` of a config.json -> its translation.
FAMILIES: dict[str, Callable[..., Translation]] = {
    "bamba": bamba.translate,
    "bert": bert.translate,
    "big_bird": bigbird.translate,
    "deepseek_v32": deepseek.translate,
    "falcon_h1": falcon_h1.translate,
    "gemma2": gemma.translate_2,
    "gemma3": gemma.translate_multimodal,
    "gemma3_text": gemma.translate_3,
    "gpt2": gpt2.translate,
    "gpt_oss": gpt_oss.translate,
    "jamba": jamba.translate,
    "kimi_linear": kimi.translate,
    "llama": llama.translate_llama,
    "longformer": longformer.translate,
    "mamba": mamba.translate,
    "mamba2": mamba.translate_2,
    "minimax": minimax.translate,
    "mistral": llama.translate_mistral,
    "mixtral": llama.translate_mixtral,
    "modernbert": modernbert.translate,
    "nemotron_h": nemotron_h.translate,
    "qwen2": llama.translate_qwen2,
    "qwen3": llama.translate_qwen3,
    "qwen3_next": qwen3_next.translate,
    "reformer": reformer.translate,
    "roberta": bert.translate_roberta,
    "zamba2": zamba2.translate,
}
