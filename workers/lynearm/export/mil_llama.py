"""A llama decoder as a Core ML program: one function, dynamic lengths, a key-value cache held in states.

The contract is the one that swift-transformers drives:

* inputs `inputIds` [1, q] int32 and `fullAttentionMask` [1, 1, q, e] float16, added to the attention scores;
  e is the number of tokens in the cache after this call, so the q new ones stand at positions e - q to e - 1;
* states `keyCache` and `valueCache` [L, 1, KV, N, D] float16; zeros start a conversation;
* output `logits` [1, q, V] float16, row i predicting the token after input i.

Invariant: each state is read once, and each layer goes on from the value that its own update returned. Reads
per layer would be merged by a later pass, and every layer but the last would lose what it wrote: prefill
would be right and each decode step wrong.
"""

# L = layers, H = query heads, KV = key-value heads, D = head dim, N = context length, q = tokens given,
# e = end position, V = vocabulary, M = hidden size

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lynearm.export.checkpoint import EMBEDDING, FINAL_NORM, LM_HEAD, Architecture
from lynearm.export.coreml_library import ct, get_new_symbol, mb, types

# Any: coremltools ships no types; a MIL value is opaque to us.
MilValue: TypeAlias = Any
MilProgram: TypeAlias = Any

INPUT_IDS = "inputIds"
ATTENTION_MASK = "fullAttentionMask"
KEY_CACHE = "keyCache"
VALUE_CACHE = "valueCache"
LOGITS = "logits"


@dataclass(frozen=True, slots=True)
class BlockQuantised:
    """A matrix as Core ML stores it: weight = scale · code, one scale per row and block of columns."""

    codes_RC: npt.NDArray[np.int8]
    scales_RG: npt.NDArray[np.float16]
    bits: int
    """4 or 8; codes of 4 bits are in -8 to 7, one per byte here and two per byte in the file."""


StoredWeight: TypeAlias = npt.NDArray[np.float16] | BlockQuantised


def build_program(
    architecture: Architecture, weights: Mapping[str, StoredWeight], context_length: int
) -> MilProgram:
    """The program, ready for `coremltools.convert`.

    Args:
        architecture: Shapes and constants.
        weights: By Hugging Face name; a tied head is left out. Norms must be plain arrays.
        context_length: N, tokens that the cache holds.
    """
    tokens, end = get_new_symbol(), get_new_symbol()
    cache_shape = (
        architecture.num_layers,
        1,
        architecture.num_kv_heads,
        context_length,
        architecture.head_dim,
    )
    specs = [
        mb.TensorSpec((1, tokens), dtype=types.int32),
        mb.TensorSpec((1, 1, tokens, end), dtype=types.fp16),
        mb.StateTensorSpec(cache_shape, dtype=types.fp16),
        mb.StateTensorSpec(cache_shape, dtype=types.fp16),
    ]

    # The parameters' names become those of inputs and states.
    def describe(
        inputIds: MilValue, fullAttentionMask: MilValue, keyCache: MilValue, valueCache: MilValue
    ) -> MilValue:
        graph = _Decoder(architecture, weights, context_length)
        return graph.build(inputIds, fullAttentionMask, keyCache, valueCache)

    program: MilProgram = mb.program(input_specs=specs, opset_version=ct.target.iOS18)(describe)
    token_range, end_range = (ct.RangeDim(1, context_length, default=1) for _ in range(2))
    token_range.symbol, end_range.symbol = tokens, end
    program.functions["main"].input_types = [
        ct.TensorType(INPUT_IDS, shape=(1, token_range), dtype=np.int32),
        ct.TensorType(ATTENTION_MASK, shape=(1, 1, token_range, end_range), dtype=np.float16),
    ]
    return program


class _Cache:
    """One state's running value; `update` chains instead of reading again."""

    def __init__(self, state: MilValue) -> None:
        self._state = state
        self._value = mb.read_state(input=state)

    def update(self, layer: int, new: MilValue, begin: MilValue, end: MilValue) -> MilValue:
        """Writes [1, KV, q, D] at [begin, end) of a layer; returns its rows up to end, [1, KV, e, D]."""
        zero, this, following = (np.array([i], np.int32) for i in (0, layer, layer + 1))
        first = mb.concat(values=[this, zero, zero, begin, zero], axis=0)
        last = mb.concat(values=[following, zero, zero, end, zero], axis=0)
        written = mb.slice_update(
            x=self._value,
            update=mb.expand_dims(x=new, axes=[0]),
            begin=first,
            end=last,
            begin_mask=[False, True, True, False, True],
            end_mask=[False, True, True, False, True],
        )
        self._value = mb.coreml_update_state(state=self._state, value=written)
        return mb.slice_by_index(
            x=self._value,
            begin=np.array([layer, 0, 0, 0, 0], np.int32),
            end=last,
            begin_mask=[False, True, True, True, True],
            end_mask=[False, True, True, False, True],
            squeeze_mask=[True, False, False, False, False],
        )


class _Decoder:
    """Emits the graph; holds what every layer shares."""

    def __init__(
        self, architecture: Architecture, weights: Mapping[str, StoredWeight], context_length: int
    ) -> None:
        self._a = architecture
        self._weights = weights
        self._context_length = context_length

    def build(self, ids: MilValue, mask: MilValue, key_state: MilValue, value_state: MilValue) -> MilValue:
        a = self._a
        embedding = self._matrix(EMBEDDING)
        hidden = mb.gather(x=embedding, indices=ids, axis=0, name="embedding")
        self._end = _length(mask, 3)
        self._begin = mb.sub(x=self._end, y=_length(ids, 1), name="begin")
        self._cos, self._sin = self._rotary_rows()
        # Queries that share a key head are stacked as rows, so the mask's rows repeat per group.
        self._mask = mb.tile(x=mask, reps=[1, 1, a.num_heads // a.num_kv_heads, 1], name="mask_rows")
        keys, values = _Cache(key_state), _Cache(value_state)
        for layer in range(a.num_layers):
            hidden = self._layer(layer, hidden, keys, values)
        hidden = self._norm(hidden, FINAL_NORM)
        head = embedding if a.tied else self._matrix(LM_HEAD)
        return mb.linear(x=hidden, weight=head, name=LOGITS)

    def _layer(self, layer: int, hidden: MilValue, keys: _Cache, values: _Cache) -> MilValue:
        prefix = f"model.layers.{layer}."
        attended = self._attention(layer, self._norm(hidden, f"{prefix}input_layernorm.weight"), keys, values)
        hidden = mb.add(x=hidden, y=self._linear(attended, f"{prefix}self_attn.o_proj.weight"))
        normed = self._norm(hidden, f"{prefix}post_attention_layernorm.weight")
        gate = mb.silu(x=self._linear(normed, f"{prefix}mlp.gate_proj.weight"))
        gated = mb.mul(x=gate, y=self._linear(normed, f"{prefix}mlp.up_proj.weight"))
        return mb.add(x=hidden, y=self._linear(gated, f"{prefix}mlp.down_proj.weight"))

    def _attention(self, layer: int, normed: MilValue, keys: _Cache, values: _Cache) -> MilValue:
        a, prefix = self._a, f"model.layers.{layer}.self_attn."
        query = self._rotate(self._heads(normed, f"{prefix}q_proj.weight", a.num_heads))
        key = self._rotate(self._heads(normed, f"{prefix}k_proj.weight", a.num_kv_heads))
        value = self._heads(normed, f"{prefix}v_proj.weight", a.num_kv_heads)
        all_keys = keys.update(layer, key, self._begin, self._end)
        all_values = values.update(layer, value, self._begin, self._end)
        # Head h uses key head h // (H / KV): [1, H, q, D] folds to [1, KV, H / KV · q, D], keys uncopied.
        rows = mb.reshape(x=query, shape=[1, a.num_kv_heads, -1, a.head_dim])
        mixed = mb.scaled_dot_product_attention(
            query=rows, key=all_keys, value=all_values, attn_mask=self._mask
        )
        mixed = mb.reshape(x=mixed, shape=[1, a.num_heads, -1, a.head_dim])
        mixed = mb.transpose(x=mixed, perm=[0, 2, 1, 3])
        return mb.reshape(x=mixed, shape=[1, -1, a.num_heads * a.head_dim])

    def _heads(self, normed: MilValue, name: str, heads: int) -> MilValue:
        split = mb.reshape(x=self._linear(normed, name), shape=[1, -1, heads, self._a.head_dim])
        return mb.transpose(x=split, perm=[0, 2, 1, 3])

    def _rotary_rows(self) -> tuple[MilValue, MilValue]:
        """Cosines and sines of positions begin to end, [q, D] each."""
        zero, width = np.array([0], np.int32), np.array([self._a.head_dim], np.int32)
        first = mb.concat(values=[self._begin, zero], axis=0)
        last = mb.concat(values=[self._end, width], axis=0)
        tables = rotary_tables(self._a, self._context_length)
        cos, sin = (mb.slice_by_index(x=table, begin=first, end=last) for table in tables)
        return cos, sin

    def _rotate(self, x: MilValue) -> MilValue:
        half = self._a.head_dim // 2
        left = mb.slice_by_index(
            x=x, begin=[0, 0, 0, 0], end=[0, 0, 0, half], end_mask=[True, True, True, False]
        )
        right = mb.slice_by_index(x=x, begin=[0, 0, 0, half], end=[0, 0, 0, 0], end_mask=[True] * 4)
        turned = mb.concat(values=[mb.mul(x=right, y=np.float16(-1)), left], axis=-1)
        return mb.add(x=mb.mul(x=x, y=self._cos), y=mb.mul(x=turned, y=self._sin))

    def _norm(self, x: MilValue, name: str) -> MilValue:
        # Squares of float16 activations overflow at 256: RMSNorm computes in float32.
        wide = mb.cast(x=x, dtype="fp32")
        mean = mb.reduce_mean(x=mb.mul(x=wide, y=wide), axes=[-1], keep_dims=True)
        scale = mb.rsqrt(x=mean, epsilon=np.float32(self._a.rms_norm_eps))
        return mb.mul(x=mb.cast(x=mb.mul(x=wide, y=scale), dtype="fp16"), y=self._weights[name])

    def _linear(self, x: MilValue, name: str) -> MilValue:
        return mb.linear(x=x, weight=self._matrix(name))

    def _matrix(self, name: str) -> MilValue:
        stored, label = self._weights[name], name.replace(".", "_")
        if not isinstance(stored, BlockQuantised):
            return mb.const(val=stored, name=label)
        codes = stored.codes_RC
        if stored.bits == 4:
            codes = codes.astype(types.np_int4_dtype)
        return mb.constexpr_blockwise_shift_scale(data=codes, scale=stored.scales_RG, name=label)


def rotary_tables(
    architecture: Architecture, context_length: int
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """Cosines and sines of the rotary angles, shape [N, D] each, both halves of D alike."""
    exponents = np.arange(0, architecture.head_dim, 2, dtype=np.float64) / architecture.head_dim
    angles = np.arange(context_length)[:, None] * architecture.rope_theta**-exponents
    angles_ND = np.concatenate([angles, angles], axis=-1)
    return np.cos(angles_ND).astype(np.float16), np.sin(angles_ND).astype(np.float16)


def _length(x: MilValue, axis: int) -> MilValue:
    return mb.slice_by_size(x=mb.shape(x=x), begin=np.array([axis], np.int32), size=np.array([1], np.int32))
