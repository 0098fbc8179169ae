"""One file for each family of models: from its config.json to a `ModelConfig` and the map of its tensors."""

from sparsejax.interop.huggingface.families import mistral

# A new family is one file and one line here: `model_type` of its config.json -> translate(fields).
FAMILIES = {"mistral": mistral.translate}
