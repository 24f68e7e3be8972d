"""Cells of Arrow rows: Python's values, and arrays in the dtype of their column."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from diffusers_ddpm_ext.training.data.array_images import UnreadableImage, UnsupportedImage, array_of_arrow


def cells_of_rows(table: Any, arrays: Collection[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the cells of each row.

    Args:
        table: a `pyarrow.Table` or `pyarrow.RecordBatch`.
        arrays: columns whose cells are arrays; one that is none is left in lists, and fails when it is decoded.
    """
    others = [name for name in table.schema.names if name not in arrays]
    plain = table.select(others).to_pylist() if others else [{} for _ in range(table.num_rows)]
    for number, cells in enumerate(plain):
        for name in arrays:
            cell = table.column(name).slice(number, 1)
            try:
                cells[name] = array_of_arrow(cell)
            except (UnreadableImage, UnsupportedImage):
                cells[name] = cell.to_pylist()[0]
        yield cells
