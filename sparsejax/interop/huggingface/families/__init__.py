"""Model families: modules that translate a config.json and map its tensors."""

from collections.abc import Callable
from typing import Any

from sparsejax.interop.huggingface.families import (
    bamba,
    bert,
    bigbird,
    cohere,
    deepseek,
    deepseek_v4,
    falcon_h1,
    gemma,
    gpt2,
    gpt_oss,
    granite,
    jamba,
    kimi,
    lfm2,
    llama,
    llama4,
    longformer,
    mamba,
    minimax,
    minimax_m3,
    modernbert,
    nemotron_h,
    olmo,
    qwen3_next,
    qwen4,
    recurrent_gemma,
    reformer,
    zamba2,
)
from sparsejax.interop.huggingface.translation import Translation

# `model_type` of a config.json -> its translation.
FAMILIES: dict[str, Callable[..., Translation]] = {
    "bamba": bamba.translate,
    "bert": bert.translate,
    "big_bird": bigbird.translate,
    "cohere2": cohere.translate,
    "deepseek_v32": deepseek.translate,
    "deepseek_v4": deepseek_v4.translate,
    "falcon_h1": falcon_h1.translate,
    "gemma2": gemma.translate_2,
    "gemma3": gemma.translate_multimodal,
    "gemma3_text": gemma.translate_3,
    "glm_moe_dsa": deepseek.translate_glm,
    "gpt2": gpt2.translate,
    "gpt_oss": gpt_oss.translate,
    "granitemoehybrid": granite.translate,
    "jamba": jamba.translate,
    "kimi_linear": kimi.translate,
    "lfm2": lfm2.translate,
    "llama": llama.translate_llama,
    "llama4": llama4.translate_multimodal,
    "llama4_text": llama4.translate,
    "longformer": longformer.translate,
    "mamba": mamba.translate,
    "mamba2": mamba.translate_2,
    "mamba_ssm": mamba.translate_original,
    "minimax": minimax.translate,
    "minimax_m3_vl": minimax_m3.translate_multimodal,
    "minimax_m3_vl_text": minimax_m3.translate,
    "mistral": llama.translate_mistral,
    "mixtral": llama.translate_mixtral,
    "modernbert": modernbert.translate,
    "nemotron_h": nemotron_h.translate,
    "olmo3": olmo.translate,
    "olmo_hybrid": olmo.translate_hybrid,
    "qwen2": llama.translate_qwen2,
    "qwen3": llama.translate_qwen3,
    "qwen3_next": qwen3_next.translate,
    "qwen4_exp_text": qwen4.translate,
    "recurrent_gemma": recurrent_gemma.translate,
    "reformer": reformer.translate,
    "roberta": bert.translate_roberta,
    "zamba2": zamba2.translate,
}


def read_model_type(hf_config: dict[str, Any]) -> Any:
    """Returns the `model_type` of a config.json; that of the original Mamba, which has none, is "mamba_ssm"."""
    return hf_config.get("model_type", "mamba_ssm" if "ssm_cfg" in hf_config else None)
