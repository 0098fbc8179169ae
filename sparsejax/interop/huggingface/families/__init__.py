"""One file for each family of models: from its config.json to a `ModelConfig` and the map of its tensors."""

from sparsejax.interop.huggingface.families import bigbird, gemma, longformer, mistral, modernbert

# A new family is one file and one line here: `model_type` of its config.json -> translate(fields).
FAMILIES = {
    "big_bird": bigbird.translate,
    "gemma2": gemma.translate_2,
    "gemma3_text": gemma.translate_3,
    "longformer": longformer.translate,
    "mistral": mistral.translate,
    "modernbert": modernbert.translate,
}
