"""What every room stands on: jaxprs, row-wise primitives, messages, tuning.

In: equations and programs of whatever jax version is installed; numbers a user tuned.
Out: what an equation is and whether it is row-wise; three-part messages; huge pages.
Never: a table, a gradient or an optimizer. Whatever depends on the jax version is in `jaxpr`.
"""

from sparse_embed._core.arguments import argument_numbers as argument_numbers
from sparse_embed._core.arguments import check_function as check_function
from sparse_embed._core.arguments import check_scalar as check_scalar
from sparse_embed._core.arguments import check_transformation as check_transformation
from sparse_embed._core.arguments import whole_number as whole_number
from sparse_embed._core.errors import describe as describe
from sparse_embed._core.errors import is_concrete as is_concrete
from sparse_embed._core.errors import message as message
from sparse_embed._core.errors import path_name as path_name
from sparse_embed._core.jaxpr import CALLS as CALLS
from sparse_embed._core.jaxpr import CHECKPOINTS as CHECKPOINTS
from sparse_embed._core.jaxpr import CUSTOM_RULES as CUSTOM_RULES
from sparse_embed._core.jaxpr import PACKAGE as PACKAGE
from sparse_embed._core.jaxpr import JaxprEqn as JaxprEqn
from sparse_embed._core.jaxpr import Literal as Literal
from sparse_embed._core.jaxpr import as_jaxpr as as_jaxpr
from sparse_embed._core.jaxpr import bind as bind
from sparse_embed._core.jaxpr import called_jaxpr as called_jaxpr
from sparse_embed._core.jaxpr import is_float as is_float
from sparse_embed._core.jaxpr import manual_axes as manual_axes
from sparse_embed._core.jaxpr import open_jaxpr as open_jaxpr
from sparse_embed._core.jaxpr import scan_split as scan_split
from sparse_embed._core.jaxpr import source_line as source_line
from sparse_embed._core.jaxpr import trace_state as trace_state
from sparse_embed._core.jaxpr import transform_name as transform_name
from sparse_embed._core.jaxpr import used_inputs as used_inputs
from sparse_embed._core.jaxpr import varying_axes as varying_axes
from sparse_embed._core.jaxpr import while_tracing as while_tracing
from sparse_embed._core.jaxpr import without_calls as without_calls
from sparse_embed._core.pages import ask_for_huge_pages as ask_for_huge_pages
from sparse_embed._core.platforms import made_for as made_for
from sparse_embed._core.platforms import platform as platform
from sparse_embed._core.platforms import platform_of as platform_of
from sparse_embed._core.rowwise import ELEMENTWISE as ELEMENTWISE
from sparse_embed._core.rowwise import REDUCTIONS as REDUCTIONS
from sparse_embed._core.rowwise import ROW_WISE as ROW_WISE
from sparse_embed._core.rowwise import Axes as Axes
from sparse_embed._core.rowwise import as_block as as_block
from sparse_embed._core.rowwise import bind_on_rows as bind_on_rows
from sparse_embed._core.rowwise import is_row_wise as is_row_wise
from sparse_embed._core.rowwise import operand_axes as operand_axes
from sparse_embed._core.rowwise import rows_of as rows_of
from sparse_embed._core.signature import signature as signature
from sparse_embed._core.tuning import Tuning as Tuning
from sparse_embed._core.tuning import in_blocks as in_blocks
from sparse_embed._core.tuning import tuning as tuning
