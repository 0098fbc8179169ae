"""Gemma 3 4B, the text model: five layers with windows of 1,024 keys per layer of full attention.

    sparsejax show --config=preset:gemma3 --length=131072
    sparsejax train --config=preset:gemma3:tiny --workdir=runs/gemma3

Each branch has a norm before and after it; queries and keys are normalized as well. Rotary positions have base 10,000
in window layers, and base 1,000,000 with linear scaling by 8 in full layers. Sizes: arXiv:2503.19786 and the released
config.json. Published (table 1): 675M embedding and 3,209M other parameters, 3.88B in total; the 417M of the vision
encoder are not part of this model. The full size is for cost accounting and for loading released weights.

`:tiny` reduces the loss from 5.57 to 2.67 nats in 30 steps and 30 CPU seconds, with compilation and evaluation.
"""

from sparsejax.presets import recipe


def get_config(argument=""):
    norm = recipe.rms(1e-6, offset=True)

    def layer(pattern, rope):
        mixer = recipe.attention(pattern, 8, 4, 256, rope=rope, qk_norm=norm)
        return recipe.layer(mixer, recipe.gated(10_240, "gelu_tanh"), norm, "both")

    stretched = dict(base=1e6, scaling=dict(kind="linear", factor=8.0))
    full = recipe.model(
        vocab=262_208,
        width=2560,
        schedule="5x(5x(local) full) 4x(local)",
        layers=dict(
            local=layer("gemma_local(1024)", dict(base=10_000.0)),
            full=layer("causal", stretched),
        ),
        norm=norm,
        tied=True,
        embedding=dict(scale=2560**0.5),
    )
    return recipe.choose(
        argument,
        full,
        8192,
        schedule="5x(local) full",
        patterns=dict(local="gemma_local(16)"),
        embedding=dict(scale=64**0.5),
    )
