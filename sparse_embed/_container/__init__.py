"""`RowSparse`, and the arithmetic of listed rows under it.

In: `[n]` indices and the `[n, *features]` rows that belong to them, repeats and all.
Out: each row once, repeats summed in at least float32; rows gathered, added, set in place.
Never: an array with as many rows as the table, but where a user asks for a dense one.
"""

from sparse_embed._container.apart import hashable as hashable
from sparse_embed._container.apart import slots_of_each as slots_of_each
from sparse_embed._container.coalesce import coalesce as coalesce
from sparse_embed._container.each_block import Block as Block
from sparse_embed._container.each_block import add_rows as add_rows
from sparse_embed._container.each_block import blocks as blocks
from sparse_embed._container.each_block import each_block as each_block
from sparse_embed._container.each_block import put as put
from sparse_embed._container.form import Form as Form
from sparse_embed._container.indices import PADDED as PADDED
from sparse_embed._container.indices import Slots as Slots
from sparse_embed._container.indices import as_integers as as_integers
from sparse_embed._container.indices import distinct as distinct
from sparse_embed._container.indices import flat_indices as flat_indices
from sparse_embed._container.indices import slots_among as slots_among
from sparse_embed._container.indices import widened as widened
from sparse_embed._container.listed import Listed as Listed
from sparse_embed._container.listed import Part as Part
from sparse_embed._container.listed import as_listed as as_listed
from sparse_embed._container.row_sparse import RowSparse as RowSparse
from sparse_embed._container.row_sparse import is_row_sparse as is_row_sparse
from sparse_embed._container.row_sparse import summed as summed
from sparse_embed._container.row_sparse import unsummed as unsummed
from sparse_embed._container.segments import gather_rows as gather_rows
from sparse_embed._container.segments import loosely as loosely
from sparse_embed._container.segments import nan_where as nan_where
from sparse_embed._container.segments import old_rows as old_rows
from sparse_embed._container.segments import segment_count as segment_count
from sparse_embed._container.segments import segment_sum as segment_sum
from sparse_embed._container.segments import set_rows as set_rows
from sparse_embed._container.segments import sum_dtype as sum_dtype
