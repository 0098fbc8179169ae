"""One file for each family of models: from its config.json to a `ModelConfig` and the map of its tensors."""

from sparsejax.interop.huggingface.families import (
    bamba,
    bigbird,
    deepseek,
    falcon_h1,
    gemma,
    gpt_oss,
    jamba,
    kimi,
    longformer,
    mamba,
    minimax,
    mistral,
    modernbert,
    nemotron_h,
    qwen3_next,
    reformer,
    zamba2,
)

# A new family is one file and one line here: `model_type` of its config.json -> translate(fields).
FAMILIES = {
    "bamba": bamba.translate,
    "big_bird": bigbird.translate,
    "deepseek_v32": deepseek.translate,
    "falcon_h1": falcon_h1.translate,
    "gemma2": gemma.translate_2,
    "gemma3_text": gemma.translate_3,
    "gpt_oss": gpt_oss.translate,
    "jamba": jamba.translate,
    "kimi_linear": kimi.translate,
    "longformer": longformer.translate,
    "mamba": mamba.translate,
    "mamba2": mamba.translate_2,
    "minimax": minimax.translate,
    "mistral": mistral.translate,
    "modernbert": modernbert.translate,
    "nemotron_h": nemotron_h.translate,
    "qwen3_next": qwen3_next.translate,
    "reformer": reformer.translate,
    "zamba2": zamba2.translate,
}
