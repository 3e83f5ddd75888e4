"""What `audit` reports."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ArrayReport:
    """What becomes of one table-sized array that is passed to the step.

    Attributes:
      name: as the step calls it: `params['user']`.
      array: dtype and shape.
      status: `"in place"`, `"read only"` or `"copied"`.
      reason: for a copy, what makes it necessary.
    """

    name: str
    array: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class OperationReport:
    """One operation of the compiled step that makes a table-sized array.

    Attributes:
      operation: XLA's operation and jax's name of it.
      array: dtype and shape of what it makes.
      line: the user's line.
    """

    operation: str
    array: str
    line: str


@dataclass(frozen=True)
class AuditReport:
    """What `audit` found. `print` it, or look at `ok`.

    Attributes:
      arrays: the table-sized arrays that are passed in.
      operations: the operations that make another one.
      temp_bytes: XLA's temporary memory for one step.
      skipped: tables with no more rows than a step looks up, which cannot be told from its rows.

    Example:
      >>> import sparse_embed as se
      >>> print(se.AuditReport([], [], 96, []))
      row-sparse: yes; temporaries 96 bytes
    """

    arrays: list[ArrayReport]
    operations: list[OperationReport]
    temp_bytes: int
    skipped: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing table-sized is made or copied."""
        return not self.operations and all(a.status != "copied" for a in self.arrays)

    def __str__(self) -> str:
        verdict = "yes" if self.ok else "NO"
        if self.skipped and not self.arrays:
            verdict = "yes, as far as can be told"
        lines = [f"row-sparse: {verdict}; temporaries {self.temp_bytes:,} bytes"]
        for a in self.arrays:
            reason = f": {a.reason}" if a.reason else ""
            lines.append(f"  {a.status:9} {a.name} {a.array}{reason}")
        lines += [f"  makes     {o.array} by {o.operation} at {o.line}" for o in self.operations]
        lines += [f"  skipped   {s}: no more rows than a step looks up" for s in self.skipped]
        return "\n".join(lines)
