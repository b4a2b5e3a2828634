"""Fetches two real corpora to measure curation on: Debian's documentation, and the source archives of Python projects.

  python benchmarks/corpora.py debian data/corpora/debian     # needs apt-get and dpkg-deb, but no root
  python benchmarks/corpora.py python data/corpora/python     # from PyPI, by version and SHA-256

The lists are corpora/debian.txt and corpora/python.txt. Debian's packages are unpacked to `html/`, `man/` (made HTML by
mandoc, which is fetched too), `pdf/` and `text/`; Python's archives stay as they are, since curation reads archives.
`manifest.json` says what was fetched. What is there already is not fetched again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gzip
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator

LISTS = pathlib.Path(__file__).parent / "corpora"
PYPI = "https://pypi.org/pypi/{name}/json"
KINDS = {
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}


def listed(name: str) -> list[str]:
    """Returns the lines of a list without comments."""
    lines = (LISTS / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def sha256(file: pathlib.Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch_python(folder: pathlib.Path) -> list[dict[str, object]]:
    """Fetches the source archive of every project on the list; returns a row for each."""
    folder.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda line: _source_archive(folder, line), listed("python")))


def _source_archive(folder: pathlib.Path, line: str) -> dict[str, object]:
    requirement, expected = line.split()
    name, version = requirement.split("==")
    row = {"name": name, "version": version, "sha256": expected}
    there = [file for file in folder.glob("*") if file.name.startswith(f"{name}--")]
    if not there:
        index = PYPI.format(name=name)
        with urllib.request.urlopen(index, timeout=120) as answer:
            files = json.load(answer)["releases"].get(version, [])
        archive = next((entry for entry in files if entry["digests"]["sha256"] == expected), None)
        if archive is None:
            raise SystemExit(
                f"corpora: PyPI has no file of {requirement} with SHA-256 {expected}; mend corpora/python.txt"
            )
        with (
            tempfile.NamedTemporaryFile(dir=folder, prefix=".part-", delete=False) as part,
            urllib.request.urlopen(urllib.parse.urljoin(index, archive["url"]), timeout=120) as answer,
        ):
            shutil.copyfileobj(answer, part)
        file = folder / f"{name}--{archive['filename']}"
        found = sha256(pathlib.Path(part.name))
        if found != expected:
            os.unlink(part.name)
            raise SystemExit(f"corpora: {archive['url']} has SHA-256 {found}, not {expected}; try again")
        os.replace(part.name, file)
        print(f"corpora: {file.name}", flush=True)
        there = [file]
    return row | {"bytes": there[0].stat().st_size}


def fetch_debian(folder: pathlib.Path) -> list[dict[str, object]]:
    """Fetches and unpacks the documentation of every package on the list; returns a row for each."""
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    names = ["mandoc", *listed("debian")]
    missing = [name for name in names if not list(packages.glob(f"{name}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "-q", "download", *missing], cwd=packages, check=True)
    debs = {name: next(packages.glob(f"{name}_*.deb")) for name in names}
    with tempfile.TemporaryDirectory() as tools:
        subprocess.run(["dpkg-deb", "-x", debs.pop("mandoc"), tools], check=True)
        mandoc = pathlib.Path(tools) / "usr/bin/mandoc"
        return [_unpacked(name, deb, folder, mandoc) for name, deb in debs.items()]


def _unpacked(name: str, deb: pathlib.Path, folder: pathlib.Path, mandoc: pathlib.Path) -> dict[str, object]:
    """Unpacks the documents of one package, each kind into its folder."""
    row = {"name": name, "version": deb.name.split("_")[1], "sha256": sha256(deb), "bytes": deb.stat().st_size}
    done = folder / "packages" / f"{name}.done"
    if not done.exists():
        counts: dict[str, int] = {}
        with tempfile.TemporaryDirectory(dir=folder) as unpacked:
            subprocess.run(["dpkg-deb", "-x", deb, unpacked], check=True)
            for file, kind in _documents(pathlib.Path(unpacked)):
                relative = file.relative_to(unpacked)
                target = folder / kind / name / relative.with_name(relative.name.removesuffix(".gz"))
                target.parent.mkdir(parents=True, exist_ok=True)
                raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
                if kind == "man":
                    target = target.with_name(f"{target.name}.html")
                    raw = subprocess.run([mandoc, "-T", "html"], input=raw, stdout=subprocess.PIPE, check=False).stdout
                target.write_bytes(raw)
                counts[kind] = counts.get(kind, 0) + len(raw)
        done.write_text(json.dumps(counts))
        print(f"corpora: {name}: {counts}", flush=True)
    return row | {"documents": json.loads(done.read_text())}


def _documents(unpacked: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
    """Yields the documents of an unpacked package with their kind; links are left out."""
    for file in sorted(unpacked.rglob("*")):
        if file.is_symlink() or not file.is_file():
            continue
        kind = KINDS.get(pathlib.Path(file.name.removesuffix(".gz")).suffix)
        if "usr/share/man" in file.as_posix():
            yield file, "man"
        elif kind:
            yield file, kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", choices=("debian", "python"))
    parser.add_argument("folder", type=pathlib.Path)
    given = parser.parse_args()
    rows = {"debian": fetch_debian, "python": fetch_python}[given.corpus](given.folder)
    (given.folder / "manifest.json").write_text(json.dumps(rows, indent=1) + "\n")
    size = sum(int(row["bytes"]) for row in rows)
    print(f"corpora: {len(rows)} packages, {size / 1e6:.0f} MB, in {given.folder}")


if __name__ == "__main__":
    main()
