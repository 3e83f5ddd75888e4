"""Views of rows: what an equation shows of its operands' rows, and how ids go through it.

In: an equation, and the axes along which the rows of its output run.
Out: whether it reads rows; or the parts of its operands that its rows are, and where.
Never: a program, nor a derivative. Nothing is computed here until ids are given.
"""

from sparse_embed._views.reads import ReadIds as ReadIds
from sparse_embed._views.reads import RowRead as RowRead
from sparse_embed._views.row_reads import row_read as row_read
from sparse_embed._views.view import Ids as Ids
from sparse_embed._views.view import Part as Part
from sparse_embed._views.view import View as View
from sparse_embed._views.view import taken as taken
from sparse_embed._views.views import can_be_delayed as can_be_delayed
from sparse_embed._views.views import view_of as view_of
