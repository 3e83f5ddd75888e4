"""`train_step`: the usual step, jitted and donated.

In: a loss and an optimizer of `se.lazy` or `se.exact`.
Out: one compiled step that reads, differentiates, updates and writes in place.
Never: anything that cannot be written by hand with the verbs of the other rooms.
"""

from sparse_embed._step.train_step import train_step as train_step
