"""Reformer (arXiv:2001.04451): chunked local attention and LSH attention in a reversible stream."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from sparsejax import schedule
from sparsejax.config import AxialConfig, EmbeddingConfig, HeadConfig, ModelConfig
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import TensorMap, identity, linear, linears, norm, reshaped, transposed
from sparsejax.interop.huggingface.translation import ACTIVATIONS, Translation, name_layers, pre_norm_layer
from sparsejax.layers import AttentionConfig, LshConfig, MixerConfig, MlpConfig, NormConfig


def translate(fields: Fields, lsh_rotations: np.ndarray | None = None) -> Translation:
    """Translates a `ReformerConfig` with a language model head.

    Args:
      fields: The config.json.
      lsh_rotations: Hash rotations of all LSH layers, [h, d, hashes, buckets / 2]. They are drawn from `hash_seed` by
        default, but differ from those that PyTorch draws.
    """
    fields.ignore("axial_norm_std", "chunk_size_lm_head", "num_hidden_layers")
    fields.ignore("lsh_attention_probs_dropout_prob", "local_attention_probs_dropout_prob")
    fields.require("tie_word_embeddings", False)
    width, types = fields.take("hidden_size", 256), fields.take("attn_layers", ["local", "lsh"] * 3)
    for layer_type in types:
        if layer_type not in ("local", "lsh"):
            raise fields.unsupported("attn_layers", layer_type, ["local", "lsh"])
    chunks = {layer_type: fields.take(f"{layer_type}_attn_chunk_length", 64) for layer_type in ("local", "lsh")}
    causal = fields.take("is_decoder", False)
    layer_norm = NormConfig(kind="layer", eps=fields.take("layer_norm_eps", 1e-12))
    local, neighbours = _read_local(fields, causal), _read_neighbours(fields, "local")
    lsh, buckets = _read_lsh(fields, chunks["lsh"], causal), _read_buckets(fields)
    mlp = MlpConfig(
        kind="plain",
        width=fields.take("feed_forward_size", 512),
        activation=fields.choose("hidden_act", ACTIVATIONS, "relu"),
        bias=True,
    )
    max_length = fields.take("max_position_embeddings", 4096)
    embedding = _read_embedding(fields, width, max_length)
    vocab, multiple = fields.take("vocab_size", 320), math.lcm(*(chunks[layer_type] for layer_type in set(types)))
    shortest_chunk = min(chunks[layer_type] for layer_type in types)

    @functools.cache  # called in every forward pass
    def at_length(length: int) -> tuple[ModelConfig, int]:
        padded = -(-length // multiple) * multiple if length > shortest_chunk else length
        pattern = _write_pattern(chunks["local"], *neighbours, causal, padded)
        mixers: dict[str, MixerConfig] = {
            "local": dataclasses.replace(local, pattern=pattern),
            "lsh": dataclasses.replace(lsh, buckets=buckets or _choose_buckets(chunks["lsh"], padded, max_length)),
        }
        named = [(layer_type, pre_norm_layer(mixers[layer_type], mlp, layer_norm)) for layer_type in types]
        names, layers = name_layers(named)
        model = ModelConfig(
            vocab=vocab,
            width=width,
            schedule=schedule.write(names),
            layers=layers,
            norm=layer_norm,
            tied=False,
            dtype="float32",
            scan=True,
            causal=causal,
            embedding=embedding,
            head=HeadConfig(),
            reversible=True,
            allow_leaks="lsh" in types,  # causal LSH attention is not strictly causal in the released model either
        )
        return model, multiple if padded != length else 1

    model, _ = at_length(min(max_length, embedding.axial.length if embedding.axial else max_length))
    maps = [
        identity("reformer.embeddings.word_embeddings.weight", "embedding.tokens"),
        *_position_tensors(embedding),
        *norm("reformer.encoder.layer_norm", "norm", bias=True),
        transposed("lm_head.decoder.weight", "head.weight"),
    ]
    for i, layer_type in enumerate(types):
        maps += _layer_tensors(f"reformer.encoder.layers.{i}", f"layers.{i}", layer_type)
    # The bias of the head is stored but not added.
    unused = (r"lm_head\.bias", r"lm_head\.decoder\.bias")
    return Translation(model, maps, unused=unused, at_length=at_length, rotations=lsh_rotations)


def _read_neighbours(fields: Fields, layer_type: str) -> tuple[int, int]:
    """Reads the numbers of neighbouring chunks before and after."""
    return fields.take(f"{layer_type}_num_chunks_before", 1), fields.take(f"{layer_type}_num_chunks_after", 0)


def _read_local(fields: Fields, causal: bool) -> AttentionConfig:
    heads = fields.take("num_attention_heads", 12)
    return AttentionConfig(
        pattern="causal" if causal else "full",
        heads=heads,
        kv_heads=heads,
        head_width=fields.take("attention_head_size", 64),
        rope=None,
        qk_norm=None,
        impl="auto",
    )


def _read_lsh(fields: Fields, chunk: int, causal: bool) -> LshConfig:
    before, after = _read_neighbours(fields, "lsh")
    return LshConfig(
        heads=fields.take("num_attention_heads", 12),
        head_width=fields.take("attention_head_size", 64),
        chunk=chunk,
        buckets=(2,),  # replaced by `num_buckets`, or by a function of the length
        hashes=fields.take("num_hashes", 1),
        causal=causal,
        seed=fields.take("hash_seed", None, int) or 0,
        before=before,
        after=after,
    )


def _read_buckets(fields: Fields) -> tuple[int, ...]:
    """Reads the factors of the number of buckets; empty if it depends on the length."""
    buckets = fields.take("num_buckets", None) or ()
    return (buckets,) if isinstance(buckets, int) else tuple(buckets)


def _choose_buckets(chunk: int, length: int, max_length: int) -> tuple[int, ...]:
    """About two buckets per chunk, a power of 2, in two factors if there are many for the maximum length."""
    power = (2 * max(length // chunk, 1)).bit_length() - 1
    if 2**power > 2 * max(int((max_length // chunk) ** 0.5), chunk):
        return 2 ** (power // 2), 2 ** (power - power // 2)
    return (2**power,)


def _write_pattern(chunk: int, before: int, after: int, causal: bool, length: int) -> str:
    """Pattern of local attention: a query attends to its chunk and the neighbouring chunks.

    Neighbours wrap around, and a chunk that is a neighbour twice counts twice in the softmax. The pattern without
    wrapping is equal, and used, if attention is causal or no query has a wrapped neighbour.
    """
    count, start = max(-(-length // chunk), 1), "causal & " if causal else ""
    if count == 1:
        return "causal" if causal else "full"
    offsets = range(-before, after + 1)
    wrapped = [[key % count for key in range(query - before, query + after + 1)] for query in range(count)]
    wrapped = [[key for key in keys if not causal or key <= query] for query, keys in enumerate(wrapped)]
    plain = [list(range(max(query - before, 0), min(query + after, count - 1) + 1)) for query in range(count)]
    if wrapped == [[key for key in keys if not causal or key <= query] for query, keys in enumerate(plain)]:
        shifted = [f"shift(chunk({chunk}), {-offset * chunk})" if offset else f"chunk({chunk})" for offset in offsets]
        return f"{start}({' | '.join(shifted)})"
    tiles = [[[(query + offset) % count] for query in range(count)] for offset in offsets]
    return f"{start}multiset({', '.join(f'tiles({keys}, tile={chunk})' for keys in tiles)})"


def _read_embedding(fields: Fields, width: int, max_length: int) -> EmbeddingConfig:
    shape, widths = fields.take("axial_pos_shape", [64, 64]), fields.take("axial_pos_embds_dim", [64, 192])
    if not fields.take("axial_pos_embds", True):
        return EmbeddingConfig(positions=max_length)
    if len(shape) != 2 or len(widths) != 2:
        raise fields.error("axial_pos_shape", f"{shape} with widths {widths}: only two axes are supported")
    if sum(widths) != width:
        raise fields.error("axial_pos_embds_dim", f"{widths} do not add up to hidden_size = {width}")
    return EmbeddingConfig(axial=AxialConfig(tuple(shape), tuple(widths)))


def _position_tensors(embedding: EmbeddingConfig) -> list[TensorMap]:
    source = "reformer.embeddings.position_embeddings"
    if embedding.axial is None:
        return [identity(f"{source}.embedding.weight", "embedding.positions")]
    (rows, columns), (a, b) = embedding.axial.shape, embedding.axial.widths
    return [
        reshaped(f"{source}.weights.0", "embedding.axial.0", (rows, 1, a), (rows, a)),
        reshaped(f"{source}.weights.1", "embedding.axial.1", (1, columns, b), (columns, b)),
    ]


def _layer_tensors(source: str, target: str, layer_type: str) -> list[TensorMap]:
    attention, feed_forward = f"{source}.attention", f"{source}.feed_forward"
    projections = {"local": ("query", "key", "value"), "lsh": ("query_key", "value")}[layer_type]
    return [
        *linears(f"{attention}.self_attention", f"{target}.mixer", {name: name for name in projections}),
        *linear(f"{attention}.output.dense", f"{target}.mixer.out"),
        *norm(f"{attention}.layer_norm", f"{target}.mixer_residual.before", bias=True),
        *linear(f"{feed_forward}.dense.dense", f"{target}.mlp.up", bias=True),
        *linear(f"{feed_forward}.output.dense", f"{target}.mlp.down", bias=True),
        *norm(f"{feed_forward}.layer_norm", f"{target}.mlp_residual.before", bias=True),
    ]
