"""Reformer (arXiv:2001.04451): chunks of neighbours and chunks of equal hash in turn, in a reversible stream."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from sparsejax.config import AxialConfig, EmbeddingConfig, HeadConfig, ModelConfig
from sparsejax.interop.huggingface.fields import Fields
from sparsejax.interop.huggingface.tensors import Piece, linear, reshaped, same, transposed
from sparsejax.interop.huggingface.translation import ACTIVATIONS, Translation, name_layers
from sparsejax.layers import AttentionConfig, LayerConfig, LshConfig, MlpConfig, NormConfig


def translate(fields: Fields, lsh_rotations: np.ndarray | None = None) -> Translation:
    """From the keys of a `ReformerConfig`, with the head of its language model.

    Args:
      fields: config.json.
      lsh_rotations: what all LSH layers hash with, [h, d, hashes, buckets / 2]; drawn from `hash_seed`, but not as
        PyTorch draws, if not given.
    """
    fields.ignore("axial_norm_std", "chunk_size_lm_head", "num_hidden_layers")
    fields.ignore("lsh_attention_probs_dropout_prob", "local_attention_probs_dropout_prob")
    fields.require("tie_word_embeddings", False)
    width, kinds = fields.take("hidden_size", 256), fields.take("attn_layers", ["local", "lsh"] * 3)
    for kind in kinds:
        if kind not in ("local", "lsh"):
            raise fields.error("attn_layers", f"{kind!r} is not supported; only local, lsh")
    chunks = {kind: fields.take(f"{kind}_attn_chunk_length", 64) for kind in ("local", "lsh")}
    norm, causal = NormConfig("layer", fields.take("layer_norm_eps", 1e-12)), fields.take("is_decoder", False)
    local, look = _read_local(fields, causal), _read_look(fields, "local")
    lsh, buckets = _read_lsh(fields, chunks["lsh"], causal), _read_buckets(fields)
    mlp = MlpConfig(
        "plain", fields.take("feed_forward_size", 512), fields.choose("hidden_act", ACTIVATIONS, "relu"), bias=True
    )
    most = fields.take("max_position_embeddings", 4096)
    embedding = _read_embedding(fields, width, most)
    vocab, multiple = fields.take("vocab_size", 320), math.lcm(*(chunks[kind] for kind in set(kinds)))
    shortest = min(chunks[kind] for kind in kinds)

    @functools.cache  # it is asked for in every call of the model
    def at_length(length: int) -> tuple[ModelConfig, int]:
        padded = -(-length // multiple) * multiple if length > shortest else length
        mixers = {
            "local": dataclasses.replace(local, pattern=_write_pattern(chunks["local"], *look, causal, padded)),
            "lsh": dataclasses.replace(lsh, buckets=buckets or _choose_buckets(chunks["lsh"], padded, most)),
        }
        layers = [(kind, LayerConfig(mixers[kind], mlp, norm, "pre", remat=False)) for kind in kinds]
        model = ModelConfig(
            vocab=vocab,
            width=width,
            **name_layers(layers),
            norm=norm,
            tied=False,
            dtype="float32",
            scan=True,
            causal=causal,
            embedding=embedding,
            head=HeadConfig(),
            reversible=True,
        )
        return model, multiple if padded != length else 1

    model, _ = at_length(min(most, embedding.axial.length if embedding.axial else most))
    pieces = [
        same("reformer.embeddings.word_embeddings.weight", "embedding.tokens"),
        *_pieces_of_positions(embedding),
        same("reformer.encoder.layer_norm.weight", "norm.scale"),
        same("reformer.encoder.layer_norm.bias", "norm.bias"),
        transposed("lm_head.decoder.weight", "head.weight"),
    ]
    for i, kind in enumerate(kinds):
        pieces += _pieces_of_layer(f"reformer.encoder.layers.{i}", f"layers.{i}", kind)
    # The bias of the head is stored, but nothing adds it.
    unused = (r"lm_head\.bias", r"lm_head\.decoder\.bias")
    return Translation(model, pieces, unused=unused, at_length=at_length, rotations=lsh_rotations)


def _read_look(fields: Fields, kind: str) -> tuple[int, int]:
    return fields.take(f"{kind}_num_chunks_before", 1), fields.take(f"{kind}_num_chunks_after", 0)


def _read_local(fields: Fields, causal: bool) -> AttentionConfig:
    heads = fields.take("num_attention_heads", 12)
    return AttentionConfig(
        pattern="causal" if causal else "full",
        heads=heads,
        kv_heads=heads,
        head_width=fields.take("attention_head_size", 64),
        rope=None,
        qk_norm=NormConfig("none", 1e-6),
        impl="auto",
    )


def _read_lsh(fields: Fields, chunk: int, causal: bool) -> LshConfig:
    before, after = _read_look(fields, "lsh")
    return LshConfig(
        heads=fields.take("num_attention_heads", 12),
        head_width=fields.take("attention_head_size", 64),
        chunk=chunk,
        buckets=(2,),  # as many as `_read_buckets` says, or as the length asks for
        hashes=fields.take("num_hashes", 1),
        causal=causal,
        seed=fields.take("hash_seed", None) or 0,
        before=before,
        after=after,
    )


def _read_buckets(fields: Fields) -> tuple[int, ...]:
    """None if their number follows from the length."""
    buckets = fields.take("num_buckets", None) or ()
    return (buckets,) if isinstance(buckets, int) else tuple(buckets)


def _choose_buckets(chunk: int, length: int, most: int) -> tuple[int, ...]:
    """About two buckets a chunk, a power of 2; two factors if they are many for the longest sequence."""
    power = (2 * max(length // chunk, 1)).bit_length() - 1
    if 2**power > 2 * max(int((most // chunk) ** 0.5), chunk):
        return 2 ** (power // 2), 2 ** (power - power // 2)
    return (2**power,)


def _write_pattern(chunk: int, before: int, after: int, causal: bool, length: int) -> str:
    """What a token sees: its chunk and those beside it.

    The first chunk is beside the last one, and a chunk that is met twice counts twice in the softmax: that matters if
    tokens see ahead, or where there are few chunks.
    """
    count, start = max(-(-length // chunk), 1), "causal & " if causal else ""
    if count == 1:
        return "causal" if causal else "full"
    offsets = range(-before, after + 1)
    met = [[key % count for key in range(query - before, query + after + 1)] for query in range(count)]
    met = [[key for key in keys if not causal or key <= query] for query, keys in enumerate(met)]
    beside = [list(range(max(query - before, 0), min(query + after, count - 1) + 1)) for query in range(count)]
    if met == [[key for key in keys if not causal or key <= query] for query, keys in enumerate(beside)]:
        parts = [f"shift(chunk({chunk}), {-o * chunk})" if o else f"chunk({chunk})" for o in offsets]
        return f"{start}({' | '.join(parts)})"
    rows = [[[(query + o) % count] for query in range(count)] for o in offsets]
    return f"{start}multiset({', '.join(f'tiles({row}, tile={chunk})' for row in rows)})"


def _read_embedding(fields: Fields, width: int, most: int) -> EmbeddingConfig:
    shape, widths = fields.take("axial_pos_shape", [64, 64]), fields.take("axial_pos_embds_dim", [64, 192])
    if not fields.take("axial_pos_embds", True):
        return EmbeddingConfig(positions=most)
    if len(shape) != 2 or len(widths) != 2:
        raise fields.error("axial_pos_shape", f"only two axes are supported, got {shape} and {widths}")
    if sum(widths) != width:
        raise fields.error("axial_pos_embds_dim", f"{widths} do not add up to hidden_size = {width}")
    return EmbeddingConfig(axial=AxialConfig(tuple(shape), tuple(widths)))


def _pieces_of_positions(embedding: EmbeddingConfig) -> list[Piece]:
    theirs = "reformer.embeddings.position_embeddings"
    if embedding.axial is None:
        return [same(f"{theirs}.embedding.weight", "embedding.positions")]
    (rows, columns), (a, b) = embedding.axial.shape, embedding.axial.widths
    return [
        reshaped(f"{theirs}.weights.0", "embedding.axial.0", (rows, 1, a), (rows, a)),
        reshaped(f"{theirs}.weights.1", "embedding.axial.1", (1, columns, b), (columns, b)),
    ]


def _pieces_of_layer(theirs: str, ours: str, kind: str) -> list[Piece]:
    attention, feed = f"{theirs}.attention", f"{theirs}.feed_forward"
    names = {"local": ("query", "key", "value"), "lsh": ("query_key", "value")}[kind]
    return [
        *(piece for n in names for piece in linear(f"{attention}.self_attention.{n}", f"{ours}.mixer.{n}")),
        *linear(f"{attention}.output.dense", f"{ours}.mixer.out"),
        *_pieces_of_norm(f"{attention}.layer_norm", f"{ours}.mixer_residual.before"),
        *linear(f"{feed}.dense.dense", f"{ours}.mlp.up", bias=True),
        *linear(f"{feed}.output.dense", f"{ours}.mlp.down", bias=True),
        *_pieces_of_norm(f"{feed}.layer_norm", f"{ours}.mlp_residual.before"),
    ]


def _pieces_of_norm(theirs: str, ours: str) -> list[Piece]:
    return [same(f"{theirs}.weight", f"{ours}.scale"), same(f"{theirs}.bias", f"{ours}.bias")]
