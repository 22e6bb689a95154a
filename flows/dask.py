"""Reading the images of a snapshot on a Dask cluster, by Prefect's own task runner for Dask."""

from collections.abc import Iterator

import pyarrow as pa

from nightshift.data.decode import Shape
from nightshift.data.parts import Reader, in_parts
from nightshift.data.sources.listed import Source
from nightshift.storage.store import Store
from tasks.read import read_part


def on_dask(scheduler: str) -> Reader:
    """What reads each part on whichever worker of a Dask cluster is free; a part whose worker is lost goes to another.

    Args:
        scheduler: the address of the cluster, such as tcp://10.0.0.5:8786.
    """

    def read(store: Store, name: str, source: Source, shape: Shape, new: pa.Table) -> Iterator[pa.Table]:
        from prefect_dask.task_runners import DaskTaskRunner  # here, because the package is an extra

        with DaskTaskRunner(address=scheduler) as runner:
            given = {"store": store, "name": name, "source": source, "shape": shape}
            futures = [runner.submit(read_part, {**given, "part": part}) for part in in_parts(new, shape)]
            for future in futures:
                yield future.result()

    return read
