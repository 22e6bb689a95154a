"""`nightshift …` that also says, in a line on standard error, when its first training step was done.

The step is observed from outside: `nightshift.training.loop` is wrapped when the command imports it, and not
before, so that nothing is imported earlier or in another order than without.
"""

import json
import sys
import time
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

MARK = "first step: "


def observe(loop_module: ModuleType) -> None:
    """Wrap the step, and the one function that decides which images a step sees."""
    batches, loop_class = loop_module.batches, loop_module.Loop
    batch_indices, train_step = batches.batch_indices, loop_class._train_step
    asked: list[tuple[int, int]] = []

    def observed_indices(plan: Any, seed: int, step: int) -> Any:
        indices = batch_indices(plan, seed, step)
        asked.append((step, len(indices)))
        return indices

    def observed_step(loop: Any, *arguments: Any) -> None:
        train_step(loop, *arguments)
        float(loop._state.epoch_loss)  # on a GPU this waits until the step is done
        facts = {"done_at": time.monotonic(), "step": loop._state.step, "asked": asked}
        print(MARK + json.dumps(facts), file=sys.stderr, flush=True)
        batches.batch_indices, loop_class._train_step = batch_indices, train_step

    batches.batch_indices, loop_class._train_step = observed_indices, observed_step


class _Hook(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "nightshift.training.loop":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec
        assert spec.loader
        execute = spec.loader.exec_module

        def execute_and_observe(module: ModuleType) -> None:
            execute(module)
            observe(module)

        spec.loader.exec_module = execute_and_observe  # type: ignore[method-assign]
        return spec


if __name__ == "__main__":
    from nightshift.cli import main

    sys.meta_path.insert(0, _Hook())
    main()
