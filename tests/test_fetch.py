import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from genmed.data import fetch as module
from genmed.data.fetch import RECORD, SETS, PublicSet, download, fetch, fetch_set
from genmed.errors import GenMedError

FILES = {
    "Toy/dataset.json": b"{}",
    "Toy/imagesTr/a.nii.gz": bytes(range(256)) * 40,
    "Toy/imagesTr/._a.nii.gz": b"macOS leaves these",
}


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@dataclass
class Server:
    """A local file server whose answers a test can spoil."""

    address: str
    content: bytes = tar(FILES)
    cut_after: int | None = None      # promise everything, send this many bytes
    ranges: list[str | None] = field(default_factory=list)  # the Range header of every request

    def toy(self) -> PublicSet:
        digest = hashlib.md5(self.content).hexdigest()
        return PublicSet("Toy", f"{self.address}/toy.tar", "md5", digest, "a toy")


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            served.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            if self.path != "/toy.tar" or start >= len(served.content):
                self.send_error(404 if self.path != "/toy.tar" else 416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(served.content) - start))
            self.end_headers()
            self.wfile.write(served.content[start : served.cut_after])

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Server(f"http://127.0.0.1:{http.server_port}")
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield served
    http.shutdown()
    http.server_close()


def test_a_good_archive_becomes_a_folder_and_nothing_else_stays(server: Server, tmp_path: Path) -> None:
    folder = fetch_set(server.toy(), tmp_path)
    assert folder == tmp_path / "Toy"
    assert (folder / "imagesTr/a.nii.gz").read_bytes() == FILES["Toy/imagesTr/a.nii.gz"]
    assert sorted(path.name for path in folder.rglob("*")) == ["a.nii.gz", "dataset.json", RECORD, "imagesTr"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_verified_folder_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    fetch_set(server.toy(), tmp_path)
    assert fetch_set(server.toy(), tmp_path) == tmp_path / "Toy"
    assert len(server.ranges) == 1


def test_a_folder_that_is_not_ours_or_incomplete_is_left_alone(server: Server, tmp_path: Path) -> None:
    fetch_set(server.toy(), tmp_path)
    (tmp_path / "Toy/dataset.json").write_text("{ }")
    with pytest.raises(GenMedError, match="not a complete fetch"):
        fetch_set(server.toy(), tmp_path)
    assert (tmp_path / "Toy/dataset.json").read_text() == "{ }"
    (tmp_path / "Toy" / RECORD).unlink()
    with pytest.raises(GenMedError, match="not a complete fetch"):
        fetch_set(server.toy(), tmp_path)


def test_a_truncated_download_is_told_and_resumed(server: Server, tmp_path: Path) -> None:
    server.cut_after = 5000
    with pytest.raises(GenMedError, match=rf"stopped at 5000 of {len(server.content)} bytes"):
        fetch_set(server.toy(), tmp_path)
    assert not (tmp_path / "Toy").exists()
    server.cut_after = None
    fetch_set(server.toy(), tmp_path)
    assert server.ranges == [None, "bytes=5000-"]


def test_a_part_that_is_already_whole_is_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "toy.part").write_bytes(server.content)
    download(server.toy().url, tmp_path / "toy")
    assert (tmp_path / "toy").read_bytes() == server.content
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_an_altered_archive_is_removed(server: Server, tmp_path: Path) -> None:
    toy = server.toy()
    server.content = server.content.replace(b"{}", b"[]")
    with pytest.raises(GenMedError, match=r"md5 is .* not the recorded"):
        fetch_set(toy, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../escaped", "Toy/../../escaped", "/tmp/genmed-escaped"])
def test_an_archive_that_reaches_out_of_the_folder_is_refused(
    server: Server, tmp_path: Path, name: str
) -> None:
    server.content = tar({**FILES, name: b"evil"})
    out = tmp_path / "out"
    if name.startswith("/"):  # tarfile's data filter strips the leading slash: it lands inside, or is refused
        fetch_set(server.toy(), out)
    else:
        with pytest.raises(GenMedError, match="cannot be unpacked"):
            fetch_set(server.toy(), out)
        assert not (out / "Toy").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not Path(name).exists()


def test_an_archive_without_the_promised_folder_is_refused(server: Server, tmp_path: Path) -> None:
    server.content = tar({"Other/a": b"a"})
    with pytest.raises(GenMedError, match=r"Toy\.archive: has no folder Toy"):
        fetch_set(server.toy(), tmp_path)
    server.content = b"no tar at all"
    (tmp_path / "Toy.archive").unlink()
    with pytest.raises(GenMedError, match="cannot be unpacked"):
        fetch_set(server.toy(), tmp_path)


def test_chosen_members_are_taken_under_their_new_names(server: Server, tmp_path: Path) -> None:
    toy = replace(server.toy(), folder="pair", members={"Toy/imagesTr/a.nii.gz": "ct.nii.gz"})
    folder = fetch_set(toy, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["ct.nii.gz", RECORD]
    with pytest.raises(GenMedError, match="Toy/b is not in the archive"):
        fetch_set(replace(toy, folder="other", members={"Toy/b": "b"}), tmp_path)


def test_no_network_and_refusals_are_one_line(server: Server, tmp_path: Path) -> None:
    with pytest.raises(GenMedError, match="404"):
        download(f"{server.address}/absent.tar", tmp_path / "x")
    with pytest.raises(GenMedError, match="cannot be reached") as error:
        download("http://127.0.0.1:9/x.tar", tmp_path / "x")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_are_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(GenMedError, match="ct-mr-pair, hippocampus"):
        fetch("liver", tmp_path)


def test_pip_failures_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(GenMedError, match=r"pip cannot download totalsegmentator==2\.18\.0") as error:
        fetch("ct-mr-pair", tmp_path)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SETS)
def test_every_public_set_has_a_pinned_hash(name: str) -> None:
    source = SETS[name]
    assert len(source.digest) == 2 * hashlib.new(source.algorithm).digest_size
