"""Other programs that make the step: each is a process of its own, and waits for its turn."""

import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
LIMITED = ("sgd", "adagrad", "row-wise adagrad", "adam")
SPARSE = {  # what `_peers.py` knows
    "torch": ("sgd", "adagrad", "adam"),
    "fbgemm": ("sgd", "adagrad", "row-wise adagrad"),
}


class Program:
    """A process that answers each line with a line."""

    def __init__(self, *command: Any):
        self.command = [str(part) for part in command]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(self.command, text=True, **pipes)

    def ask(self, line: Any) -> str:
        print(line, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> str:
        if not (line := self.process.stdout.readline()):
            ended = f"{Path(self.command[0]).name} ended with {self.process.wait()}"
            raise RuntimeError(f"{ended}; what it said is above")
        return line

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Turn:
    """A way of `_measure.in_turns` whose batches are numbers."""

    def __init__(self, run: Callable[[int], float]):
        self.run = run


class Others:
    """The programs that this machine has. `with` ends them, and their tables go.

    Args:
      python: where torch and FBGEMM are installed; without it they are left out.

    Attributes:
      facts: the version of each, or that it is left out.
      left_out: a line for each that is left out.
    """

    def __init__(self, python: Path):
        self.python, self.left_out = python, []
        self.facts = dict.fromkeys(("torch", "fbgemm", "g++"), "left out")
        if python.exists():
            program = Program(python, HERE / "_peers.py")
            with contextlib.suppress(RuntimeError):  # half installed: it said what is missing
                self.facts |= json.loads(program.answer())
            program.close()
        if compiler := shutil.which("g++"):
            asked = [compiler, "-dumpfullversion"]
            self.facts["g++"] = subprocess.check_output(asked, text=True).strip()
        why = {"g++": "needed for limit.cc"}
        for name in (name for name, fact in self.facts.items() if fact == "left out"):
            self.left_out.append(f"Left out: {name}, {why.get(name, 'see `make bench`')}.")

    def __enter__(self) -> "Others":
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self.running: dict[str, Program] = {}
        return self

    def __exit__(self, *args: object) -> None:
        self.close()
        self._folder.cleanup()

    def close(self) -> None:
        """Ends the programs that run; another turn starts them again."""
        for program in self.running.values():
            program.close()
        self.running.clear()

    def _program(self, name: str, *command: Any) -> Program:
        if name not in self.running:
            self.running[name] = Program(*command)
        return self.running[name]

    def file(self, name: str, batches: Sequence[Any]) -> Path:
        """The batches where all programs can read them."""
        path = self.folder / f"{name}.int32"
        np.stack(batches).astype(np.int32).tofile(path)
        return path

    def peers(
        self, shape: Sequence[int], bags: Sequence[int], ids: Path, pooled: bool = True
    ) -> dict[tuple[str, str], Turn]:
        """Torch, and FBGEMM where rows are pooled: `(optimizer, step) -> way`."""
        found = {}
        for library, optimizers in SPARSE.items():
            if self.facts[library] == "left out" or (library == "fbgemm" and not pooled):
                continue
            for optimizer in optimizers:
                asked = dict(library=library, optimizer=optimizer, shape=shape, bags=bags)
                asked |= dict(pooled=pooled, ids=str(ids))
                found[optimizer, _label(library, optimizer, pooled)] = Turn(self._peer(asked))
        return found

    def _peer(self, asked: dict[str, Any]) -> Callable[[int], float]:
        def run(batch: int) -> float:
            program = self.running.get("peers")
            if program is None:
                program = self._program("peers", self.python, HERE / "_peers.py")
                program.answer()
            return float(program.ask(json.dumps(asked | {"batch": int(batch)})))

        return run

    def limit(
        self, shape: Sequence[int], bags: Sequence[int], ids: Path, start: Path | None = None
    ) -> dict[tuple[str, str], Turn]:
        """The program of `limit.cc`: `(optimizer, step) -> way`."""
        if self.facts["g++"] == "left out":
            return {}
        binary = self.compiled(shape[1])
        return {
            (name, "limit.cc"): Turn(self._limited(name, binary, shape, bags, ids, start))
            for name in LIMITED
        }

    def compiled(self, d: int) -> Path:
        """`limit.cc` for rows of `d` features."""
        binary = self.folder / f"limit-{d}"
        options = "-std=c++20 -O3 -march=native -ffast-math -pthread".split()
        files = [HERE / "limit.cc", "-o", binary]
        subprocess.run(["g++", *options, f"-DFEATURES={d}", *files], check=True)
        return binary

    def _limited(self, name: str, binary: Path, shape: Any, bags: Any, ids: Path, start: Any):
        command = [binary, name, shape[0], *bags, ids, *([start] if start else [])]

        def run(batch: int) -> float:
            seconds, loss = self._program(name, *command).ask(batch).split()
            assert np.isfinite(float(loss)), name
            return float(seconds)

        return run

    def save_limit(self, name: str, path: Path) -> None:
        """Writes table and w of `limit.cc` as they are now."""
        self.running[name].ask(f"save {path}")


def _label(library: str, optimizer: str, pooled: bool) -> str:
    if library == "fbgemm":
        return "FBGEMM, fused"
    optimizer = "SparseAdam" if optimizer == "adam" else optimizer
    kind = "EmbeddingBag" if pooled else "Embedding"
    return f"torch {kind}, {optimizer}" if optimizer == "SparseAdam" else f"torch {kind}"
