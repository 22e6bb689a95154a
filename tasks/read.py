"""Task: read a part of a snapshot, on a machine of a Dask cluster."""

import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from nightshift.data.decode import Shape
from nightshift.data.parts import read_parts
from nightshift.data.sources.listed import Source
from nightshift.storage.store import Store
from tasks import worth_another_try


# Rows are no JSON; what is to outlive the task, it stores itself.
@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[2, 20], retry_condition_fn=worth_another_try)
def read_part(store: Store, name: str, source: Source, shape: Shape, part: pa.Table) -> pa.Table:
    """Read and decode the images of one part, and store its shard and its rows."""
    (rows,) = read_parts(store, name, source, shape, part)
    return rows
