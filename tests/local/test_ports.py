"""Nobody else is given the ports of our servers, neither before they start nor while they are started again."""

from pathlib import Path

import pytest

from nightshift.local import ports, prefect, s3


def given_by_the_kernel() -> range:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    return range(first, last + 1)


def test_no_connection_is_given_the_port_of_a_server_of_ours(tmp_path: Path) -> None:
    for number in range(20):
        home = tmp_path / str(number)
        home.mkdir()
        inner = s3._ports(home).values()
        for port in (prefect._port(home), *inner, *(port + s3._GRPC_OFFSET for port in inner)):
            assert port not in given_by_the_kernel()


def test_a_port_that_people_have_noted_stays_unless_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = prefect._port(tmp_path)
    assert prefect._port(tmp_path) == noted
    monkeypatch.setattr(prefect, "is_free", lambda port: port != noted and ports.is_free(port))
    assert prefect._port(tmp_path) != noted
