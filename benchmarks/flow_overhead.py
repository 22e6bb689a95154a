"""What the whole flow costs on top of the training loop, by part.

In each round `nightshift train` (recipe quick, CIFAR-10, one epoch: 390 steps) runs as a process of its own. Its time,
from its start until it has ended, is divided without a gap at what can be seen from outside: the two lines it prints
before and after its imports, the start and end of the flow run and of its seven task runs as the Prefect server has
them, and `train_seconds` of the run record, which are the loop's alone. All clocks are this machine's.

The overhead is the command's time without the loop's. The same round measures the same steps on the same batches,
written plainly in PyTorch, in a process of their own (`throughput.plain`; only the loop's seconds, without its
imports). The overhead over that loop also contains how much slower nightshift's loop is. The time of `import torch,
prefect`, alone in a process, is shown for comparison: every flow that trains pays it.

With `--warm` it is the flow run of a deployment instead, as at night: from the moment the warm worker of
`nightshift up` takes it up until its process has ended.

The target is 5 s over the loop and the imports, and less than 3 % of a run whose loop takes 5 minutes. The overhead
does not grow with the length of training, but with the network and the data: it includes predicting the 10,000 test
images.

The Prefect server and the embedded S3 server are warm, as `nightshift up` leaves them, and so is the data cache. The
first round is not counted. 2 cores, n = 5: about 6 minutes.

    python benchmarks/flow_overhead.py [--warm] [--quick] [--json FILE]
"""

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer
from common import Summary, copy_data_cache, machine, show, tell, temporary_home, write_json
from crash_time import nightshift, wait_for
from resume_time import environment, import_seconds
from throughput import Batch, Task, plain, prepared

from nightshift.config.recipes import make_config
from nightshift.config.train import TrainConfig
from nightshift.data import batches
from nightshift.data.datasets import Dataset, open_dataset
from nightshift.local.prefect import PrefectServer, ask, chosen_server, local_prefect
from nightshift.local.s3 import embedded_s3
from nightshift.records.run import read_record
from nightshift.storage.s3 import S3
from nightshift.workspace import Workspace

Moments = dict[str, float]

_TASKS = ("download", "preprocess", "train", "evaluate", "publish", "promote", "report")
_RECORDED_SECONDS = 30
_LONG_RUN_SECONDS = 300
_COLUMNS = ("seconds", "n", "median", "min", "max", f"/ {_LONG_RUN_SECONDS} s")


def run_command(home: Path, run_id: str, overrides: Mapping[str, Any]) -> Moments:
    """Start `nightshift train` and wait for its end. Returns when it reached which point, in seconds since 1970."""
    settings = [f"--set={name}={value}" for name, value in overrides.items()]
    moments = {"start": time.time()}
    with subprocess.Popen(
        [sys.executable, "-c", "from nightshift.cli import program; program()", "train", "--run-id", run_id, *settings],
        env=environment(home),
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr
        printed = []
        for line in process.stderr:
            if line.strip() == "· starting":
                moments["imports"] = time.time()
            elif line.startswith(f"· run {run_id},"):
                moments["imported"] = time.time()
            printed.append(line)
    if process.returncode:
        raise RuntimeError(f"nightshift train has failed:\n{''.join(printed)}")
    return moments | {"end": time.time()}


def run_deployed(home: Path, store: S3, prefect: PrefectServer, run_id: str, overrides: Mapping[str, Any]) -> Moments:
    """Submit the same to the worker and wait until its process has ended. It starts when the worker takes it up."""
    settings = [f"--set={name}={value}" for name, value in overrides.items()]
    nightshift(home, "submit", "train-cifar/adhoc", f"--run-id={run_id}", *settings)
    process = Path("/proc") / wait_for(store, run_id, lambda record: True).lease.owner.split("/")[1]
    while process.exists():
        time.sleep(0.01)
    ended = time.time()
    record, _ = read_record(store, run_id)
    states = ask(prefect, f"flow_run_states/?flow_run_id={record.origin.flow_run_id}")
    taken = next(seconds(state["timestamp"]) for state in states if state["type"] == "PENDING")
    return {"start": taken, "end": ended}


def recorded(prefect: PrefectServer, flow_run_id: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The flow run and its task runs. Waits for them, as the server records the tasks' states a little later."""
    deadline, wanted = time.monotonic() + _RECORDED_SECONDS, {"flow_runs": {"id": {"any_": [flow_run_id]}}}
    while time.monotonic() < deadline:
        runs = ask(prefect, "task_runs/filter", wanted)
        if len(runs) == len(_TASKS) and all(run["end_time"] for run in runs):
            return ask(prefect, f"flow_runs/{flow_run_id}"), runs
        time.sleep(0.1)
    raise RuntimeError(f"the Prefect server has not recorded the {len(_TASKS)} tasks of flow run {flow_run_id}")


def flow_parts(store: S3, prefect: PrefectServer, run_id: str, moments: Moments) -> dict[str, float]:
    """The seconds of a flow that has ended, by part, in order."""
    record, _ = read_record(store, run_id)
    assert record.origin.flow_run_id
    flow, runs = recorded(prefect, record.origin.flow_run_id)
    tasks = {run["name"].rpartition("-")[0]: (seconds(run["start_time"]), seconds(run["end_time"])) for run in runs}
    begun, ended = seconds(flow["start_time"]), seconds(flow["end_time"])
    parts = {}
    if "imports" in moments:
        parts["process, until its imports"] = moments["imports"] - moments["start"]
        parts["imports"] = moments["imported"] - moments["imports"]
    parts["until the flow starts"] = begun - moments.get("imported", moments["start"])
    parts["the flow, until its first task"] = tasks[_TASKS[0]][0] - begun
    for name in _TASKS:
        parts[name] = tasks[name][1] - tasks[name][0]
    parts["train"] -= record.train_seconds
    return {
        **parts,
        "between the tasks": sum(tasks[after][0] - tasks[before][1] for before, after in pairwise(_TASKS)),
        "the flow, after its last task": ended - tasks[_TASKS[-1]][1],
        "process, after the flow": moments["end"] - ended,
        "loop": record.train_seconds,
    }


def seconds(time_text: str) -> float:
    return datetime.fromisoformat(time_text).timestamp()


def bare_loop(home: Path, config: TrainConfig) -> float:
    """Seconds of a plain loop over the same batches, in the process that calls it."""
    with embedded_s3(home) as store:
        workspace = Workspace(store, home, lease_seconds=60, save_retry_seconds=60)
        dataset = open_dataset(workspace, prepared(workspace, config))
    task = Task.of(config, dataset)
    started = time.perf_counter()
    plain(task, training_batches(task, dataset), lambda: False)
    return time.perf_counter() - started


def training_batches(task: Task, dataset: Dataset) -> Iterator[Batch]:
    """What nightshift's loop trains on."""
    plan, device = batches.make_plan(task.config, dataset), task.device
    scale, shift = (part.to(device) for part in batches.normalizer(dataset, task.config))
    for step in range(plan.total_steps):
        images, labels = batches.training_batch(dataset, task.config, plan, step)
        yield batches.to_input(images.to(device), scale, shift), labels.to(device)


def bare_loop_apart(home: Path, config: TrainConfig) -> float:
    """`bare_loop` in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(bare_loop, home, config).result()


@contextmanager
def servers(home: Path, warm: bool) -> Iterator[PrefectServer]:
    """A Prefect server, with the workers of `nightshift up` if it is to have a warm one."""
    if not warm:
        with local_prefect(home) as (prefect, wait_for_prefect):
            wait_for_prefect()
            yield prefect
        return
    nightshift(home, "up")
    try:
        found = chosen_server(home)
        assert found
        yield found
    finally:
        nightshift(home, "down")


def main(
    recipe: Annotated[str, typer.Option(help="What is trained.")] = "quick",
    rounds: Annotated[int, typer.Option(help="Flows, and loops to compare them with.")] = 5,
    warm: Annotated[bool, typer.Option("--warm", help="Flow runs of a warm worker.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Only see that it works: one round of 40 steps.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")] = None,
) -> None:
    """What the whole flow costs over the training loop alone, by part."""
    overrides: dict[str, Any] = {"epochs": 1}
    if quick:
        rounds, overrides = 1, {"epochs": 1, "max_train_images": 5120}
    config, facts = make_config(recipe, overrides), machine()
    flows: list[dict[str, float]] = []
    loops: list[float] = []
    imports: list[float] = []
    with temporary_home() as home, embedded_s3(home) as store, servers(home, warm) as prefect:
        copy_data_cache(home)
        for number in range(rounds + 1):
            tell(f"round {number} of {rounds}" if number else "once before, not counted")
            run_id = f"flow-overhead-{number}"
            if warm:
                moments = run_deployed(home, store, prefect, run_id, overrides)
            else:
                moments = run_command(home, run_id, overrides)
            parts = flow_parts(store, prefect, run_id, moments)
            if number:
                flows.append(parts)
                loops.append(bare_loop_apart(home, config))
                imports.append(import_seconds(home))
    report(flows, loops, imports, {"recipe": recipe, "rounds": rounds, "warm": warm, **overrides}, facts, json_file)


def table_rows(summaries: Mapping[str, Summary]) -> list[list[str]]:
    return [
        [
            name,
            str(of.n),
            *(f"{value:.2f}" for value in (of.median, of.min, of.max)),
            f"{of.median / _LONG_RUN_SECONDS:.2%}",
        ]
        for name, of in summaries.items()
    ]


def report(
    flows: list[dict[str, float]],
    loops: list[float],
    imports: list[float],
    parameters: dict[str, Any],
    facts: dict[str, Any],
    json_file: Path | None,
) -> None:
    parts = {name: Summary.of([flow[name] for flow in flows]) for name in flows[0]}
    walls = [sum(flow.values()) for flow in flows]
    overheads = {
        "over its own loop": Summary.of([wall - flow["loop"] for wall, flow in zip(walls, flows, strict=True)]),
        "over the bare loop": Summary.of([wall - loop for wall, loop in zip(walls, loops, strict=True)]),
    }
    whole = {"whole process": Summary.of(walls), "bare loop": Summary.of(loops)}
    alone = {"import torch, prefect": Summary.of(imports)}
    show(
        "The flow by part; train is without its loop",
        {**parameters, **facts},
        _COLUMNS,
        table_rows(parts | whole),
    )
    show(f"Overhead, and its share of a loop of {_LONG_RUN_SECONDS} s", {}, _COLUMNS, table_rows(overheads | alone))
    write_json(
        json_file,
        {
            "benchmark": "flow_overhead",
            "machine": facts,
            "parameters": parameters,
            "part_seconds": parts,
            "command_seconds": whole["whole process"],
            "bare_loop_seconds": whole["bare loop"],
            "import_seconds": alone["import torch, prefect"],
            "overhead_seconds": overheads,
            "share_of_long_run": {name: overhead.median / _LONG_RUN_SECONDS for name, overhead in overheads.items()},
            "samples": {"flow": flows, "bare_loop": loops, "import": imports},
        },
    )


if __name__ == "__main__":
    typer.run(main)
