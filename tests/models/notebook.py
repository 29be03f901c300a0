"""Runs the examples of a document as a notebook runs its cells: in one namespace, in a running event loop.

`python -m models.notebook DOCUMENT OLD=NEW...` replaces texts, then checks what each block of Python prints
against the block of text that follows it, if one does.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import re
import sys
import warnings
from pathlib import Path

_CELL = re.compile(r"^```python\n(.*?)^```\n(?:\n^```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


async def run_document(path: Path, replacements: dict[str, str]) -> int:
    """How many cells there were; raises if one fails or prints something else."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    text = path.read_text()
    cells = list(_CELL.finditer(text))
    for match in cells:
        source, expected = match.groups()
        for old, new in replacements.items():
            source = source.replace(old, new)
        line = text.count("\n", 0, match.start()) + 1
        code = compile(
            "\n" * line + source, str(path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
        )
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            result = eval(code, namespace)
            if inspect.iscoroutine(result):
                await result
        if printed.getvalue() != (expected or ""):
            raise AssertionError(f"{path}, line {line}: printed\n{printed.getvalue()}, expected\n{expected}")
    return len(cells)


if __name__ == "__main__":
    warnings.simplefilter("error")
    # torchdata 0.11 calls what torch 2.13 has deprecated.
    warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)
    replacing = dict(argument.split("=", 1) for argument in sys.argv[2:])
    print(asyncio.run(run_document(Path(sys.argv[1]), replacing)), "cells")
