"""`audit`: what a compiled step does with its tables.

In: a step and its arguments, and the text that XLA made of them.
Out: for each table-sized array whether it is in place, and what else is table-sized.
Never: a run of the step, nor a change of how it is compiled.
"""

from sparse_embed._audit.audit import assert_row_sparse as assert_row_sparse
from sparse_embed._audit.audit import audit as audit
from sparse_embed._audit.report import AuditReport as AuditReport
