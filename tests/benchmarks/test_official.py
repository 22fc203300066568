"""Official files: found, or fetched from a real server on loopback that also misbehaves."""

import hashlib
import http.server
import io
import json
import re
import socket
import threading
import zipfile
from contextlib import contextmanager

import pytest

from benchmarks import official
from benchmarks.official import download, fetch
from benchmarks.official.files import OFFICIAL
from benchmarks.official.remote import Official, RemoteFile, Snapshot
from mmlm.cli import main
from mmlm.errors import InputError


def sha256(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def archive(files):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as opened:
        for name, text in files.items():
            opened.writestr(name, text)
    return packed.getvalue()


class Site:
    """What the server has, how often it breaks off, and what it was asked."""

    def __init__(self):
        self.files = {}
        self.etag = '"1"'
        self.cut = []  # for the next requests: after how many bytes the connection is dropped
        self.status = {}
        self.asked = []
        self.url = ""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        site = self.server.site
        site.asked.append((self.path, self.headers.get("Range")))
        if self.path in site.status:
            self.send_error(site.status[self.path])
            return
        if self.path not in site.files:
            self.send_error(404)
            return
        data, kind = site.files[self.path]
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and self.headers.get("If-Range") == site.etag else 0
        if wanted and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", site.etag)
        self.end_headers()
        cut = site.cut.pop(0) if site.cut else None
        self.wfile.write(data[start:] if cut is None else data[start : start + cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


@contextmanager
def serving(site):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.site = site
        site.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield site
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def site(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(Site()) as started:
        yield started


@pytest.fixture
def offer(site, monkeypatch):
    """Puts a file on the server and an entry `thing` into the table."""

    def put(data, *, checksum="right", unpack=None, kind="application/octet-stream", size=None):
        site.files["/thing.bin"] = (data, kind)
        if checksum == "right":
            checksum = sha256(data)
        part = RemoteFile("things/thing.bin", f"{site.url}/thing.bin", checksum, size, unpack)
        row = Official("a thing for tests", (part,), part.result, "CC0", "https://example.org")
        monkeypatch.setattr("benchmarks.official.OFFICIAL", {"thing": row})
        return part

    return put


CHUNK = download._CHUNK
DATA = bytes(range(256)) * 2000  # eight chunks


class TestFetch:
    def test_good_file(self, offer, tmp_path):
        offer(DATA)
        (one,) = fetch.fetch("thing", tmp_path)
        assert one.path.read_bytes() == DATA
        assert (one.state, one.evidence, one.digest) == ("downloaded", "published", sha256(DATA))
        assert official.locate("thing", tmp_path) == one.path
        left = {path.name for path in one.path.parent.iterdir()}
        assert left == {"thing.bin", "thing.bin.sha256", ".thing.bin.lock"}

    def test_present_file_is_checked_not_fetched(self, offer, site, tmp_path):
        offer(DATA)
        fetch.fetch("thing", tmp_path)
        (one,) = fetch.fetch("thing", tmp_path)
        assert (one.state, len(site.asked)) == ("present", 1)

    def test_md5(self, offer, tmp_path):
        offer(DATA, checksum="md5:" + hashlib.md5(DATA).hexdigest())
        (one,) = fetch.fetch("thing", tmp_path)
        assert (one.evidence, one.digest) == ("published", sha256(DATA))

    def test_progress_reaches_the_end(self, offer, tmp_path):
        seen = []
        offer(DATA)
        fetch.fetch("thing", tmp_path, progress=lambda *step: seen.append(step))
        assert ("thing.bin", len(DATA), len(DATA)) in seen

    def test_wrong_checksum_leaves_nothing(self, offer, tmp_path):
        part = offer(DATA, checksum=sha256(b"other"))
        with pytest.raises(InputError, match="not the official file") as caught:
            fetch.fetch("thing", tmp_path)
        assert hashlib.sha256(DATA).hexdigest() in str(caught.value)
        assert part.url in caught.value.advice
        assert [path.name for path in (tmp_path / "things").iterdir()] == [".thing.bin.lock"]

    def test_changed_file_on_disk_is_refused_and_kept(self, offer, tmp_path):
        part = offer(DATA)
        place = tmp_path / part.path
        place.parent.mkdir()
        place.write_bytes(b"my own")
        with pytest.raises(InputError, match="not the file that it should be"):
            fetch.fetch("thing", tmp_path)
        assert place.read_bytes() == b"my own"

    def test_unpublished_checksum_is_recorded_and_a_change_noticed(self, offer, tmp_path):
        offer(DATA, checksum=None)
        (first,) = fetch.fetch("thing", tmp_path)
        (second,) = fetch.fetch("thing", tmp_path)
        assert (first.evidence, second.evidence) == ("none", "recorded")
        record = first.path.with_name("thing.bin.sha256")
        assert record.read_text() == f"{hashlib.sha256(DATA).hexdigest()}  thing.bin\n"
        first.path.write_bytes(DATA[:-1])
        with pytest.raises(InputError, match="recorded when it was downloaded"):
            fetch.fetch("thing", tmp_path)
        # The server's file has changed since: what was recorded decides.
        first.path.unlink()
        offer(DATA + b"new", checksum=None)
        with pytest.raises(InputError, match="not the official file"):
            fetch.fetch("thing", tmp_path)

    def test_404(self, offer, site, tmp_path):
        part = offer(DATA)
        site.files.clear()
        with pytest.raises(InputError, match="answered: 404") as caught:
            fetch.fetch("thing", tmp_path, pause=0)
        assert str(tmp_path / part.path) in caught.value.advice
        assert len(site.asked) == 1

    def test_server_error_is_tried_again_then_given_up(self, offer, site, tmp_path):
        offer(DATA)
        site.status["/thing.bin"] = 503
        with pytest.raises(InputError, match="answered: 503"):
            fetch.fetch("thing", tmp_path, pause=0)
        assert len(site.asked) == download.ATTEMPTS

    def test_broken_off_download_goes_on(self, offer, site, tmp_path):
        offer(DATA)
        site.cut = [CHUNK + 9, 2 * CHUNK + 9]
        (one,) = fetch.fetch("thing", tmp_path, pause=0)
        assert one.path.read_bytes() == DATA
        assert [asked for _, asked in site.asked] == [
            None,
            f"bytes={CHUNK}-",
            f"bytes={3 * CHUNK}-",
        ]

    def test_any_number_of_breaks_is_survived_while_bytes_come(self, offer, site, tmp_path):
        offer(DATA)
        site.cut = [CHUNK + 9] * (download.ATTEMPTS + 2)
        (one,) = fetch.fetch("thing", tmp_path, pause=0)
        assert one.path.read_bytes() == DATA
        assert site.cut == []

    def test_given_up_download_goes_on_next_time(self, offer, site, tmp_path):
        part = offer(DATA)
        site.cut = [CHUNK + 9] + [0] * 20
        with pytest.raises(InputError, match="kept and continued next time"):
            fetch.fetch("thing", tmp_path, pause=0)
        assert (tmp_path / (part.path + ".part")).read_bytes() == DATA[:CHUNK]
        site.cut, site.asked = [], []
        (one,) = fetch.fetch("thing", tmp_path)
        assert one.path.read_bytes() == DATA
        assert site.asked == [("/thing.bin", f"bytes={CHUNK}-")]

    def test_parts_of_two_versions_are_not_joined(self, offer, site, tmp_path):
        offer(DATA)
        site.cut = [CHUNK + 9] + [0] * 20
        with pytest.raises(InputError):
            fetch.fetch("thing", tmp_path, pause=0)
        site.cut, site.etag = [], '"2"'
        other = DATA[::-1]
        offer(other)
        (one,) = fetch.fetch("thing", tmp_path)
        assert one.path.read_bytes() == other

    @pytest.mark.parametrize("extra", [b"", b"longer than the file"])
    def test_part_that_needs_no_more_bytes(self, offer, site, tmp_path, extra):
        part = offer(DATA)
        partial = tmp_path / (part.path + ".part")
        partial.parent.mkdir()
        partial.write_bytes(DATA + extra)
        partial.with_name(partial.name + ".etag").write_text(site.etag)
        (one,) = fetch.fetch("thing", tmp_path, pause=0)
        assert one.path.read_bytes() == DATA

    def test_no_server(self, offer, site, tmp_path):
        part = offer(DATA)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        gone = part.url.replace(site.url, f"http://127.0.0.1:{port}")
        with pytest.MonkeyPatch.context() as patch:
            row = Official("a", (RemoteFile(part.path, gone),), part.path, "CC0", "")
            patch.setattr("benchmarks.official.OFFICIAL", {"thing": row})
            with pytest.raises(InputError, match="cannot be reached") as caught:
                fetch.fetch("thing", tmp_path, pause=0)
        assert gone in caught.value.advice
        assert str(tmp_path / part.path) in caught.value.advice

    def test_web_page_instead_of_the_file(self, offer, tmp_path):
        offer(b"<html>Quota exceeded</html>", checksum=None, kind="text/html; charset=utf-8")
        with pytest.raises(InputError, match="web page instead of the file"):
            fetch.fetch("thing", tmp_path)

    def test_disk_too_small(self, offer, tmp_path, site):
        offer(DATA, size=10**18)
        with pytest.raises(InputError, match="are free"):
            fetch.fetch("thing", tmp_path)
        assert site.asked == []


class TestArchives:
    @pytest.mark.parametrize("wrapper", ["", "pictures/"])
    def test_unpacked_without_the_folder_around_everything(self, offer, tmp_path, wrapper):
        files = {"a.txt": "A", "deep/b.txt": "B"}
        packed = {wrapper + name: text for name, text in files.items()}
        offer(archive(packed | {"__MACOSX/a.txt": "x", wrapper + ".DS_Store": "x"}), unpack="it")
        (one,) = fetch.fetch("thing", tmp_path)
        assert one.result == tmp_path / "it" == official.locate("thing", tmp_path)
        found = {
            str(path.relative_to(one.result)): path.read_text() for path in one.result.rglob("*.*")
        }
        assert found == files

    def test_archive_may_be_deleted(self, offer, site, tmp_path):
        offer(archive({"a": "A"}), unpack="it")
        (one,) = fetch.fetch("thing", tmp_path)
        one.path.unlink()
        (again,) = fetch.fetch("thing", tmp_path)
        assert (again.state, again.evidence, len(site.asked)) == ("present", "published", 1)

    def test_own_unpacked_copy_is_taken_and_called_unchecked(self, offer, site, tmp_path):
        offer(archive({"a": "A"}), unpack="it")
        (tmp_path / "it").mkdir()
        (one,) = fetch.fetch("thing", tmp_path)
        assert (one.evidence, one.digest, site.asked) == ("unchecked", "", [])

    def test_interrupted_unpacking_starts_anew(self, offer, tmp_path):
        offer(archive({"a": "A"}), unpack="it")
        (tmp_path / ".it.part").mkdir()
        (tmp_path / ".it.part" / "half").write_text("h")
        (one,) = fetch.fetch("thing", tmp_path)
        assert [path.name for path in one.result.iterdir()] == ["a"]

    def test_no_archive(self, offer, tmp_path):
        offer(b"not a zip", unpack="it")
        with pytest.raises(InputError, match="no complete zip archive"):
            fetch.fetch("thing", tmp_path)
        assert not (tmp_path / "it").exists()

    def test_archive_that_writes_elsewhere(self, offer, tmp_path):
        offer(archive({"../evil": "x"}), unpack="things/it")
        with pytest.raises(InputError, match="leaves its folder"):
            fetch.fetch("thing", tmp_path)
        assert not (tmp_path / "evil").exists()


class TestSnapshot:
    def test_without_network(self, monkeypatch, tmp_path):
        row = Official("p", (Snapshot("set", "owner/set"),), "set", "CC0", "")
        monkeypatch.setattr("benchmarks.official.OFFICIAL", {"set": row})
        with pytest.raises(InputError, match="owner/set cannot be had") as caught:
            fetch.fetch("set", tmp_path)  # the tests run with HF_HUB_OFFLINE
        assert "https://huggingface.co/datasets/owner/set" in caught.value.advice

    @pytest.mark.parametrize(("pinned", "evidence"), [("a" * 40, "published"), (None, "none")])
    def test_commit_is_recorded(self, monkeypatch, tmp_path, pinned, evidence):
        asked = []

        class Hub:
            def dataset_info(self, repo, revision, timeout):
                asked.append(("info", repo, revision))
                return type("Info", (), {"sha": revision or "b" * 40})

        def download_files(repo, *, repo_type, revision, local_dir, allow_patterns):
            asked.append((repo_type, revision, allow_patterns))
            local_dir.mkdir()

        monkeypatch.setattr("huggingface_hub.HfApi", Hub)
        monkeypatch.setattr("huggingface_hub.snapshot_download", download_files)
        part = Snapshot("set", "owner/set", pinned, ("*.parquet",))
        row = Official("p", (part,), "set", "CC0", "")
        monkeypatch.setattr("benchmarks.official.OFFICIAL", {"set": row})
        commit = pinned or "b" * 40
        (first,) = fetch.fetch("set", tmp_path)
        (second,) = fetch.fetch("set", tmp_path)
        assert (first.state, first.evidence, first.digest) == ("downloaded", evidence, commit)
        assert (second.state, second.digest) == ("present", commit)
        assert second.evidence == ("published" if pinned else "recorded")
        assert asked == [("info", "owner/set", pinned), ("dataset", commit, ["*.parquet"])]

    def test_another_pinned_commit_is_fetched(self, monkeypatch, tmp_path):
        fetched = []

        class Hub:
            def dataset_info(self, repo, revision, timeout):
                return type("Info", (), {"sha": revision})

        def download_files(repo, *, revision, local_dir, **_):
            local_dir.mkdir(exist_ok=True)
            fetched.append(revision)

        monkeypatch.setattr("huggingface_hub.HfApi", Hub)
        monkeypatch.setattr("huggingface_hub.snapshot_download", download_files)
        for commit in ("a" * 40, "a" * 40, "b" * 40):
            row = Official("p", (Snapshot("set", "owner/set", commit),), "set", "CC0", "")
            monkeypatch.setattr("benchmarks.official.OFFICIAL", {"set": row})
            (one,) = fetch.fetch("set", tmp_path)
            assert one.digest == commit
        assert fetched == ["a" * 40, "b" * 40]

    def test_archives_are_unpacked_where_they_lie(self, monkeypatch, tmp_path):
        class Hub:
            def dataset_info(self, repo, revision, timeout):
                return type("Info", (), {"sha": "c" * 40})

        def download_files(repo, *, local_dir, **_):
            (local_dir / "video").mkdir(parents=True, exist_ok=True)
            (local_dir / "video" / "star.zip").write_bytes(archive({"clips/1.mp4": "1"}))

        monkeypatch.setattr("huggingface_hub.HfApi", Hub)
        monkeypatch.setattr("huggingface_hub.snapshot_download", download_files)
        row = Official("p", (Snapshot("set", "owner/set", archives=True),), "set", "CC0", "")
        monkeypatch.setattr("benchmarks.official.OFFICIAL", {"set": row})
        (tmp_path / "set" / "video" / "star").mkdir(parents=True)  # of an interrupted run
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("benchmarks.official.fetch.unpack", None)
            fetch.fetch("set", tmp_path)
        (tmp_path / "set.revision").unlink()
        (tmp_path / "set" / "video" / "star").rmdir()
        (one,) = fetch.fetch("set", tmp_path)
        files = [path for path in one.path.rglob("*") if path.is_file()]
        assert files == [one.path / "video" / "star" / "clips" / "1.mp4"]


class TestLocate:
    def test_places_in_order(self, offer, tmp_path, monkeypatch):
        offer(DATA)
        given, named = tmp_path / "given", tmp_path / "named"
        monkeypatch.setenv("MMLM_DATA_DIR", str(named))
        places = [named / "things/thing.bin", given / "thing.bin", given / "things/thing.bin"]
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(DATA)
            assert official.locate("thing", given) == place

    def test_missing_says_what_to_download_and_where_it_goes(self, offer, tmp_path, monkeypatch):
        part = offer(DATA)
        monkeypatch.setenv("MMLM_DATA_DIR", str(tmp_path))
        with pytest.raises(InputError, match="not on this machine") as caught:
            official.locate("thing")
        for told in ("mmlm data fetch thing", part.url, str(tmp_path / part.path), "CC0"):
            assert told in caught.value.advice

    def test_unknown_name(self):
        with pytest.raises(InputError, match="no official files 'coco-val2041'") as caught:
            official.locate("coco-val2041")
        assert caught.value.advice == "Did you mean 'coco-val2014'?"


class TestTable:
    def test_rows_are_whole(self):
        for name, row in OFFICIAL.items():
            assert re.fullmatch(r"[a-z0-9-]+", name)
            assert row.purpose
            assert row.licence
            assert row.source.startswith("https://")
            assert row.parts
            results = [part.result for part in row.parts]
            assert any(
                row.target == r or r.startswith(f"{row.target}/") or row.target.startswith(f"{r}/")
                for r in results
            )
            for part in row.parts:
                assert part.url.startswith(("https://", "http://images.cocodataset.org/"))
                assert re.fullmatch(r"(sha256:[0-9a-f]{64}|md5:[0-9a-f]{32})?", part.checksum or "")
                revision = getattr(part, "revision", None) or ""
                assert re.fullmatch(r"([0-9a-f]{40})?", revision)

    def test_no_two_files_share_a_place(self):
        paths = [part.path for row in OFFICIAL.values() for part in row.parts]
        assert len(paths) == len(set(paths))


class TestCommands:
    def test_fetch_and_list(self, offer, tmp_path, capsys):
        offer(DATA)
        assert main(["data", "fetch", "thing", "--data", str(tmp_path), "--json"]) == 0
        (one,) = json.loads(capsys.readouterr().out)["files"]
        assert (one["state"], one["digest"]) == ("downloaded", sha256(DATA))
        assert main(["data", "list", "--data", str(tmp_path), "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["files"]
        assert row["here"] == str(tmp_path / "things/thing.bin")

    def test_for_people(self, offer, tmp_path, capsys):
        part = offer(DATA, checksum=None)
        assert main(["data", "fetch", "thing", "--data", str(tmp_path)]) == 0
        shown = capsys.readouterr()
        assert shown.out == f"{tmp_path / part.path}\n"
        assert sha256(DATA) in shown.err
        assert "nobody published a checksum" in shown.err
        assert main(["data", "list", "thing", "--data", str(tmp_path)]) == 0
        assert "nothing published" in capsys.readouterr().out

    def test_whole_table(self, capsys):
        assert main(["data", "list"]) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in OFFICIAL)

    def test_errors(self, offer, site, tmp_path, capsys):
        offer(DATA)
        site.files.clear()
        assert main(["data", "fetch", "thing", "--data", str(tmp_path)]) == 2
        assert "404" in capsys.readouterr().err
        assert main(["data", "list", "nothing"]) == 2
