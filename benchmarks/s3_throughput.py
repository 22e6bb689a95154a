"""How fast one large object goes to S3 and back, compared with what else Python users have.

Each client sends the same random bytes from memory and reads them back into memory, one object at a time,
all with the same embedded S3 server:

    nightshift        `S3.upload` and `S3.download_bytes`, as checkpoints go
    unchecked         the same without a checksum of each part, by which the server refuses one that was damaged on
                      its way: `NIGHTSHIFT_S3__CHECKSUMS=when_required`
    boto3             `upload_fileobj` and `download_fileobj` as they are by default: 8 MiB parts, 10 at a time
    awscrt            AWS' Common Runtime behind s3transfer's `CRTTransferManager`, set up as the AWS CLI does it:
                      boto3's own way to it ignores `endpoint_url`
    obstore           `put` and `get` as they are by default: 5 MiB parts up, 12 at a time, one stream down
    s3torchconnector  `S3Checkpoint`'s writer and reader as they are by default: 8 MiB parts

An upload is timed until the server has acknowledged everything, a download until everything is in memory. sha256
is checked outside that time. A round is one upload and one download by each client, and each round begins with
another client. A server that holds 2 GiB is replaced by a fresh one at the next round, since it frees no space;
there each client first sends and reads 24 MiB that are not counted. A client is compared with the fastest:
ratio of the median speeds.

`--parts` also measures our client alone, with parts of 8, 16 and 64 MiB, and 1, 2, 4 and 8 parts at a time.

Client and server share the same cores. If awscrt is installed, all clients that are built on botocore sign and
compute checksums with it. 2 cores, n = 5: objects of 64 MiB and 1 GiB take an estimated 13 minutes and 6 GB in
the temporary directory, `--parts` another 25 minutes and at most 13 GB.

    python benchmarks/s3_throughput.py [--size MIB …] [--parts] [--quick] [--json FILE]
"""

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Protocol
from unittest.mock import patch

import boto3
import botocore.session
import typer
from boto3.s3.transfer import TransferConfig
from common import Summary, console, machine, show, tell, temporary_home, write_json

from nightshift.local.s3 import embedded_s3
from nightshift.settings import S3Settings
from nightshift.storage import s3
from nightshift.storage.s3 import MIB, S3, Credentials

_PEERS = ("awscrt", "obstore", "s3torchconnector")
_PART_SIZES = (8, 16, 64)
_AT_A_TIME = (1, 2, 4, 8)
_REGION = "us-east-1"
_TIMEOUT = "600s"
_FIRST = 24 * MIB
"""What each client sends before anything is counted: enough for several parts."""
_STORED = 2048 * MIB
"""A server that holds so much is replaced at the next round, because it frees no space."""


class Client(Protocol):
    """A way to store an object and to read it."""

    def upload(self, key: str, body: bytes) -> None: ...

    def download(self, key: str) -> bytes | memoryview: ...


class Nightshift:
    """This project's client, with its own settings or with others."""

    def __init__(self, store: S3, transfer: TransferConfig = s3._TRANSFER) -> None:
        self._store, self._transfer = store, transfer

    def upload(self, key: str, body: bytes) -> None:
        with patch.object(s3, "_TRANSFER", self._transfer):
            self._store.upload(key, io.BytesIO(body))

    def download(self, key: str) -> bytes:
        with patch.object(s3, "_TRANSFER", self._transfer):
            return self._store.download_bytes(key)


def unchecked(store: S3, credentials: Credentials) -> Nightshift:
    settings = S3Settings(endpoint_url=store.endpoint, bucket=store.bucket, checksums="when_required")
    return Nightshift(S3(settings, credentials))


class Boto3:
    def __init__(self, store: S3, credentials: Credentials) -> None:
        self._bucket = store.bucket
        # The classic client is the default, except on some of AWS' own machines.
        self._transfer = TransferConfig(preferred_transfer_client="classic")
        self._client = boto3.client(
            "s3",
            endpoint_url=store.endpoint,
            region_name=_REGION,
            aws_access_key_id=credentials.access_key,
            aws_secret_access_key=credentials.secret_key,
        )

    def upload(self, key: str, body: bytes) -> None:
        self._client.upload_fileobj(io.BytesIO(body), self._bucket, key, Config=self._transfer)

    def download(self, key: str) -> bytes:
        buffer = io.BytesIO()
        self._client.download_fileobj(self._bucket, key, buffer, Config=self._transfer)
        return buffer.getvalue()


class CommonRuntime:
    def __init__(self, store: S3, credentials: Credentials) -> None:
        from s3transfer import crt

        session = botocore.session.Session()
        session.set_credentials(credentials.access_key, credentials.secret_key)
        provider = crt.BotocoreCRTCredentialsWrapper(session.get_credentials()).to_crt_credentials_provider()
        client = crt.create_s3_crt_client(_REGION, provider, use_ssl=False)
        serializer = crt.BotocoreCRTRequestSerializer(session, {"region_name": _REGION, "endpoint_url": store.endpoint})
        self._bucket, self._manager = store.bucket, crt.CRTTransferManager(client, serializer)

    def upload(self, key: str, body: bytes) -> None:
        self._manager.upload(io.BytesIO(body), self._bucket, key).result()

    def download(self, key: str) -> bytes:
        buffer = io.BytesIO()
        self._manager.download(self._bucket, key, buffer).result()
        return buffer.getvalue()


class Obstore:
    def __init__(self, store: S3, credentials: Credentials) -> None:
        from obstore.store import S3Store  # type: ignore[import-not-found]

        self._store = S3Store(
            store.bucket,
            endpoint=store.endpoint,
            region=_REGION,
            access_key_id=credentials.access_key,
            secret_access_key=credentials.secret_key,
            client_options={"allow_http": True, "timeout": _TIMEOUT},
        )

    def upload(self, key: str, body: bytes) -> None:
        self._store.put(key, body)

    def download(self, key: str) -> memoryview:
        return memoryview(self._store.get(key).bytes())


class S3TorchConnector:
    def __init__(self, store: S3, credentials: Credentials) -> None:
        from s3torchconnector import S3Checkpoint, S3ClientConfig  # type: ignore[import-not-found]

        # It takes credentials only from the environment.
        os.environ.update(AWS_ACCESS_KEY_ID=credentials.access_key, AWS_SECRET_ACCESS_KEY=credentials.secret_key)
        self._store = store
        self._checkpoint = S3Checkpoint(_REGION, store.endpoint, S3ClientConfig(force_path_style=True))

    def upload(self, key: str, body: bytes) -> None:
        with self._checkpoint.writer(self._store.url(key)) as writer:
            writer.write(body)

    def download(self, key: str) -> bytes:
        with self._checkpoint.reader(self._store.url(key)) as reader:
            body: bytes = reader.read()
        return body


Maker = Callable[[S3, Credentials], Client]
_CLIENTS: dict[str, Maker] = {
    "nightshift": lambda store, _: Nightshift(store),
    "unchecked": unchecked,
    "boto3": Boto3,
    "awscrt": CommonRuntime,
    "obstore": Obstore,
    "s3torchconnector": S3TorchConnector,
}


@dataclass(frozen=True)
class Transfer:
    """One object, up and down, in seconds."""

    client: str
    mib: int
    up: float
    down: float


def transferred(client: Client, name: str, body: bytes, sha256: bytes) -> Transfer:
    key = f"{name}/{len(body)}"
    started = time.perf_counter()
    client.upload(key, body)
    sent = time.perf_counter()
    received = client.download(key)
    done = time.perf_counter()
    if hashlib.sha256(received).digest() != sha256:
        raise RuntimeError(f"{name} has read other bytes than it was given")
    return Transfer(name, len(body) // MIB, sent - started, done - sent)


@contextmanager
def opened(makers: Mapping[str, Maker]) -> Iterator[dict[str, Client]]:
    """The clients of a new server, after each has sent and read something."""
    body = os.urandom(_FIRST)
    with temporary_home() as home, embedded_s3(home) as store:
        credentials = Credentials(**json.loads((home / "s3" / "credentials.json").read_text()))
        clients = {name: make(store, credentials) for name, make in makers.items()}
        for name, client in clients.items():
            transferred(client, name, body, hashlib.sha256(body).digest())
        yield clients


def measure(makers: Mapping[str, Maker], sizes: Sequence[int], rounds: int) -> list[Transfer]:
    """`rounds` transfers of every client and size in MiB."""
    names, transfers = list(makers), []
    for mib in sizes:
        body = os.urandom(mib * MIB)
        sha256 = hashlib.sha256(body).digest()
        rounds_a_server = max(1, _STORED // (len(body) * len(names)))
        for first in range(0, rounds, rounds_a_server):
            with opened(makers) as clients:
                for number in range(first, min(first + rounds_a_server, rounds)):
                    tell(f"{mib:,} MiB, round {number + 1} of {rounds}")
                    for place in range(len(names)):
                        name = names[(number + place) % len(names)]
                        transfers.append(transferred(clients[name], name, body, sha256))
    return transfers


def settings() -> dict[str, Maker]:
    """Our client with every part size and number of parts at a time."""

    def make(part_size: int, at_a_time: int) -> Maker:
        transfer = TransferConfig(
            multipart_threshold=s3._TRANSFER.multipart_threshold,
            multipart_chunksize=part_size * MIB,
            max_concurrency=at_a_time,
            preferred_transfer_client="classic",
        )
        return lambda store, _: Nightshift(store, transfer)

    return {
        f"{part_size} MiB × {at_a_time}": make(part_size, at_a_time)
        for part_size in _PART_SIZES
        for at_a_time in _AT_A_TIME
    }


def installed() -> list[str]:
    """The names of the clients whose packages are installed. Prints what to do about the others."""
    absent = [name for name in _PEERS if find_spec(name) is None]
    for name in absent:
        console.print(
            f"[yellow]![/] {name} is left out: it is not installed. In an environment of its own: "
            "uv pip install --group bench"
        )
    return [name for name in _CLIENTS if name not in absent]


def main(
    size: Annotated[list[int] | None, typer.Option(help="MiB per object; may be repeated. 64 and 1024.")] = None,
    rounds: Annotated[int, typer.Option(help="Transfers per client, size and direction.")] = 5,
    parts: Annotated[bool, typer.Option("--parts", help="Our client with other parts, too.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="64 MiB, 10 rounds: of 3, one fast one decides.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")] = None,
) -> None:
    """How fast one large object goes to S3 and back."""
    sizes = size or [64, 1024]
    if quick:
        sizes, rounds = [64], 10
    facts, names = machine(), installed()
    result = {
        "clients": report("client", measure({name: _CLIENTS[name] for name in names}, sizes, rounds), facts),
    }
    if parts:
        result["parts"] = report("part size and parts at a time", measure(settings(), sizes, rounds), facts)
    write_json(
        json_file,
        {
            "benchmark": "s3_throughput",
            "machine": facts,
            "parameters": {"sizes_mib": sizes, "rounds": rounds},
            "left_out": [name for name in _CLIENTS if name not in names],
            **result,
        },
    )


def report(what: str, transfers: list[Transfer], facts: dict[str, Any]) -> dict[str, Any]:
    """Show the transfers, one table per size. Returns what is written as JSON."""
    result: dict[str, Any] = {"samples": transfers}
    for mib in dict.fromkeys(transfer.mib for transfer in transfers):
        of_size = [transfer for transfer in transfers if transfer.mib == mib]
        names = list(dict.fromkeys(transfer.client for transfer in of_size))
        up = {name: Summary.of([mib / one.up for one in of_size if one.client == name]) for name in names}
        down = {name: Summary.of([mib / one.down for one in of_size if one.client == name]) for name in names}
        columns = ("median", "min", "max", "/ fastest")
        show(
            f"An object of {mib:,} MiB, by {what}",
            facts,
            ["MiB/s", "n", *(f"{way} {column}" for way in ("up", "down") for column in columns)],
            [[name, str(up[name].n), *cells(name, up), *cells(name, down)] for name in names],
        )
        result[f"{mib} MiB"] = {
            way: {"mib_per_second": rates, "over_fastest": {name: over_fastest(name, rates) for name in names}}
            for way, rates in (("up", up), ("down", down))
        }
    return result


def cells(name: str, rates: Mapping[str, Summary]) -> list[str]:
    rate = rates[name]
    return [*(f"{value:.0f}" for value in (rate.median, rate.min, rate.max)), f"{over_fastest(name, rates):.0%}"]


def over_fastest(name: str, rates: Mapping[str, Summary]) -> float:
    return rates[name].median / max(rate.median for rate in rates.values())


if __name__ == "__main__":
    typer.run(main)
