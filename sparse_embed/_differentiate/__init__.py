"""Value and gradient of a user's function, row-sparse for its tables.

In: a function and its arguments. It is traced, walked for row reads, and run again with taps.
Out: the value, and for each table what its reads list; or, for `touched`, the rows read.
Never: an optimizer, nor a change of the value: it is the function's own, to the bit.
"""

from sparse_embed._differentiate.grad import grad as grad
from sparse_embed._differentiate.grad import gradients as gradients
from sparse_embed._differentiate.grad import value_and_grad as value_and_grad
from sparse_embed._differentiate.program import Program as Program
from sparse_embed._differentiate.program import Tables as Tables
from sparse_embed._differentiate.program import trace as trace
from sparse_embed._differentiate.taps import value_and_listed as value_and_listed
from sparse_embed._differentiate.touched import check_ids as check_ids
from sparse_embed._differentiate.touched import distinct_rows as distinct_rows
from sparse_embed._differentiate.touched import is_reads as is_reads
from sparse_embed._differentiate.touched import reads_of as reads_of
from sparse_embed._differentiate.touched import touched as touched
from sparse_embed._differentiate.walk import Walk as Walk
