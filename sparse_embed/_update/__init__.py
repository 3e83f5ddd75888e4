"""One optax update of a tree that mixes dense leaves and tables.

In: gradients, the leaves of an optimizer's state, parameters.
Out: updates, or updated parameters, and new state: all rows at once, or a block at a time.
Never: what an optimizer computes. That is traced from its own `update` and run by `_on_rows`.
"""

from sparse_embed._update.at_once import Update as Update
from sparse_embed._update.at_once import arguments as arguments
from sparse_embed._update.at_once import engine_of as engine_of
from sparse_embed._update.at_once import refusal as refusal
from sparse_embed._update.at_once import run_update as run_update
from sparse_embed._update.at_once import struct as struct
from sparse_embed._update.at_once import traced as traced
from sparse_embed._update.block_program import BlockProgram as BlockProgram
from sparse_embed._update.flat import Flat as Flat
from sparse_embed._update.in_blocks import APPLY as APPLY
from sparse_embed._update.in_blocks import DEFER as DEFER
from sparse_embed._update.in_blocks import LIST as LIST
from sparse_embed._update.in_blocks import run_in_blocks as run_in_blocks
from sparse_embed._update.layout import ELSEWHERE as ELSEWHERE
from sparse_embed._update.layout import Layouts as Layouts
from sparse_embed._update.layout import StateLayout as StateLayout
from sparse_embed._update.layout import check_state as check_state
from sparse_embed._update.layout import state_layout as state_layout
