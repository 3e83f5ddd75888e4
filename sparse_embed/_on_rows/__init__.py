"""Runs a program that was written for whole tables on some rows of them.

In: a jaxpr at the true shapes, and the touched rows in place of each table.
Out: the touched rows of whatever it makes; or `Refused`, with the reason.
Never: optax. It knows equations, whoever wrote them.
"""

from sparse_embed._on_rows.engine import OnRows as OnRows
from sparse_embed._on_rows.reductions import Reduction as Reduction
from sparse_embed._on_rows.staged import Flow as Flow
from sparse_embed._on_rows.staged import Listing as Listing
from sparse_embed._on_rows.staged import Path as Path
from sparse_embed._on_rows.staged import Reached as Reached
from sparse_embed._on_rows.staged import Stopping as Stopping
from sparse_embed._on_rows.values import PerRow as PerRow
from sparse_embed._on_rows.values import Refused as Refused
from sparse_embed._on_rows.values import Rows as Rows
