"""Rows added to a table, wherever in its array they lie."""

from jax import Array

from sparse_embed._container.each_block import add_rows, put
from sparse_embed._container.form import Form
from sparse_embed._container.segments import old_rows


def add_to(table: Array, form: Form, indices: Array, rows: Array) -> Array:
    """`table` of this form with `rows` `[n, *features]` added at ascending, distinct `indices`.

    Indices `>= num_rows` are padding. The sum is rounded once to the table's dtype.
    """
    if form.plain:
        return add_rows(table, indices, rows)
    flat = table.reshape(form.flat)
    if form.leading:
        return add_rows(flat, indices, rows).reshape(table.shape)
    entries, values = form.entries(indices).reshape(-1), rows.reshape(-1)
    new = (old_rows(flat, entries) + values).astype(table.dtype)
    return put(flat, entries, new).reshape(table.shape)
