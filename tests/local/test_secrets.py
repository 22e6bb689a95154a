"""What only the user may read: made once, whole, in a directory that nobody else can enter."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

from nightshift.local.secrets import close_to_others, made_once


def test_a_directory_with_open_modes_is_closed(tmp_path: Path) -> None:
    (directory := tmp_path / "s3").mkdir(mode=0o755)
    close_to_others(directory)
    assert directory.stat().st_mode & 0o777 == 0o700


def test_a_secret_is_made_once_for_all_who_come_at_the_same_moment(tmp_path: Path) -> None:
    together = Barrier(8)

    def secret(number: int) -> str:
        together.wait()
        return made_once(tmp_path / "new" / "secret", lambda: f"number {number}")

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(secret, range(8)))
    assert len(found) == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["secret"]
    assert (tmp_path / "new" / "secret").stat().st_mode & 0o777 == 0o600
