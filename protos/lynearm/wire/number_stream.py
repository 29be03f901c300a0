"""A block's numbers, read one column after the other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lynearm.wire.code_tables import CodeTables, DrawContext, LevelRule, NumberContext, plain_draw_bits
from lynearm.wire.errors import CorruptBlockError
from lynearm.wire.grids import MAX_GRID_LEVEL, Grid
from lynearm.wire.number_kernels import read_fixed, read_numbers, read_numbers_by_level
from lynearm.wire.traces import Float32Array
from lynearm.wire.value_kernels import read_grid_values

Uint8Array = npt.NDArray[np.uint8]
Uint32Array = npt.NDArray[np.uint32]


class NumberStream:
    """The numbers of a block, read one column after the other.

    Every method that reads moves on behind what it read.

    Args:
        stream: The bytes, readable for `LOOKAHEAD_BYTES` behind their end.
        end_bit: Where the numbers end.
        tables: Their codes.

    Raises:
        CorruptBlockError: from every method, if the numbers do not decode or end too early.
    """

    def __init__(self, stream: Uint8Array, end_bit: int, tables: CodeTables) -> None:
        self.stream = stream
        self._end_bit = end_bit
        self._tables = tables
        self._table = tables.number_table
        self._bit = 0

    @property
    def bit(self) -> int:
        """Where the next column begins."""
        return self._bit

    def move_to(self, bit: int) -> None:
        """Go on behind what others have read of the stream."""
        self._bit = bit

    def read(self, context: NumberContext, count: int) -> Uint32Array:
        """Numbers of one context."""
        return self.read_contexts(np.full(count, context, np.uint8))

    def read_contexts(self, contexts: Uint8Array) -> Uint32Array:
        """A number of each context."""
        numbers = np.empty(contexts.size, np.uint32)
        self._move(read_numbers(self.stream, self._bit, self._end_bit, contexts, self._table, numbers))
        return numbers

    def read_by_level(self, context: NumberContext, levels: Uint32Array) -> Uint32Array:
        """Numbers whose contexts begin at one, by the binary digits of a level each."""
        numbers = np.empty(levels.size, np.uint32)
        end = self._end_bit
        self._move(
            read_numbers_by_level(self.stream, self._bit, end, int(context), levels, self._table, numbers)
        )
        return numbers

    def read_grid_values(
        self, grid: Grid, rule: LevelRule, levels: Uint32Array, kept: Uint32Array, last_levels: Uint32Array
    ) -> tuple[Float32Array, Float32Array]:
        """Logprobs of the levels, in their memory, and the tail masses."""
        # Levels do not fall along a row, so that its last one is its highest.
        count = int(last_levels.max(initial=0)) + 1
        logprobs = levels.view(np.float32)
        tail_levels = np.empty(kept.size, np.int64)
        bit, lowest, highest = read_grid_values(
            self.stream,
            self._bit,
            self._end_bit,
            self._table,
            int(NumberContext.TAIL),
            levels,
            kept,
            last_levels,
            rule.numbers,
            grid.masses(count),
            grid.table(count),
            grid.scale,
            logprobs,
            tail_levels,
        )
        self._move(bit)
        if lowest < 0 or highest > MAX_GRID_LEVEL:
            raise CorruptBlockError("a tail mass is outside its grid")
        # No tail's level, −1, finds the last one's mass.
        masses = np.append(np.exp(grid.table(highest + 1)), np.float32(0))
        return logprobs, masses[tail_levels]

    def read_draws(self, context: DrawContext, count: int, vocab_size: int) -> Uint32Array:
        """Numbers of draws from tails, in the codes that are theirs, or as they are where there are none."""
        # Every number costs a bit at least: it proves that there are so many.
        if count > self._end_bit - self._bit:
            raise CorruptBlockError("the numbers of the block end too early")
        table = self._tables.draw_table
        if table is None:
            return self.read_fixed(count, plain_draw_bits(vocab_size))
        contexts, numbers = np.full(count, context, np.uint8), np.empty(count, np.uint32)
        self._move(read_numbers(self.stream, self._bit, self._end_bit, contexts, table, numbers))
        return numbers

    def read_fixed(self, count: int, width: int) -> Uint32Array:
        """Numbers of so many plain bits each."""
        if self._bit + count * width > self._end_bit:
            raise CorruptBlockError("the numbers of the block end too early")
        numbers = np.empty(count, np.uint32)
        self._move(read_fixed(self.stream, self._bit, self._end_bit, width, numbers))
        return numbers

    def expect_end(self) -> None:
        """Refuse what follows in more than the last byte."""
        if (self._bit + 7) // 8 * 8 != self._end_bit:
            raise CorruptBlockError("bytes follow the numbers of the block")

    def _move(self, bit: int) -> None:
        if bit < 0:
            raise CorruptBlockError("the numbers of the block do not decode")
        self._bit = bit
