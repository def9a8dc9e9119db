"""Downloads, against a server in this process that misbehaves as it is told."""

import base64
import builtins
import errno
import hashlib
import http.server
import random
import socket
import struct
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import model
import sft
from common.config import UserError
from conftest import load_model, random_gpt, read_log, same, weights
from common import download
from data.tokenizer import Tokenizer
from model import GPT

BODY = random.Random(0).randbytes(150_000)  # more than two of the blocks that are read at a time
SHA256 = hashlib.sha256(BODY).hexdigest()
MD5 = base64.b64encode(hashlib.md5(BODY).digest()).decode()
WRONG_MD5 = base64.b64encode(hashlib.md5(BODY[1:]).digest()).decode()


class Site:
    """A server of `files` {path: bytes}. Each request takes the next of `steps`, a dict of what goes wrong; where none is
    left, all goes well. `asked` keeps the Range of each request, `sent` how many bytes of the file it was answered with."""

    def __init__(self):
        self.files, self.steps, self.asked, self.sent, self.paths = {"/file": BODY}, [], [], [], []
        self.over = threading.Event()
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                site.asked.append(self.headers.get("Range"))
                site.paths.append(self.path)
                site.sent.append(0)
                site.answer(self, len(site.sent) - 1, **(site.steps.pop(0) if site.steps else {}))

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.root = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()

    def answer(self, handler, number, mute=False, status=None, to=None, cut=None, silent_after=None, reset=False,
               ranges=True, length=True, chunked=False, headers=None, then=None):
        """mute: close without a word; status: an error; to: a redirect there; cut: close after so many bytes; silent_after:
        say nothing more after so many; reset: close rudely; ranges: honour Range; length: declare Content-Length; chunked:
        in chunks, instead; then: the file's content after this answer."""
        if mute:
            return
        if status or to:
            handler.send_response(status or 302)
            for name, value in ({"Location": to} if to else {"Content-Length": "0"}).items():
                handler.send_header(name, value)
            return handler.end_headers()
        body, wanted = self.files[handler.path], self.asked[number]
        first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and ranges else 0
        if first >= len(body) and first:
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(body)}")
            return handler.end_headers()
        if chunked:
            handler.protocol_version = "HTTP/1.1"
            handler.close_connection = True
        handler.send_response(206 if first else 200)
        if first:
            handler.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if chunked:
            handler.send_header("Transfer-Encoding", "chunked")
        elif length:
            handler.send_header("Content-Length", str(len(body) - first))
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.end_headers()
        part = body[first:][:silent_after if cut is None else cut]
        self.sent[number] = len(part)
        if then is not None:
            self.files[handler.path] = then
        if chunked:
            handler.wfile.write(b"%x\r\n" % (len(body) - first) + part + (b"\r\n0\r\n\r\n" if cut is None else b""))
        else:
            handler.wfile.write(part)
        handler.wfile.flush()
        if silent_after is not None:
            self.over.wait(5)
        if reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()


@pytest.fixture
def site(monkeypatch):
    site = Site()
    site.naps = []
    monkeypatch.setattr(download.time, "sleep", site.naps.append)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield site
    site.over.set()
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture
def fetch(site, tmp_path):
    """fetch(**how) -> the bytes of the site's file, brought into tmp_path/new/file, which is all that stands there then."""
    def fetch(sha256=SHA256, **how):
        path = download.fetch(f"{site.root}/file", tmp_path / "new/file", sha256, **how)
        assert path == tmp_path / "new/file" and left(tmp_path) == ["file"]
        return path.read_bytes()
    return fetch


def left(tmp_path):
    return sorted(p.name for p in (tmp_path / "new").iterdir())


def leave_part(tmp_path, content):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/file.part").write_bytes(content)


# ---------------------------------------------------------------- what arrives

def test_a_whole_file_arrives_as_it_was_and_nothing_else_is_left(fetch, site):
    assert fetch() == BODY and site.asked == [None] and sum(site.sent) == len(BODY)


def test_an_existing_file_is_not_asked_for_again(fetch, site, tmp_path):
    fetch()
    assert fetch() == BODY and len(site.asked) == 1


def test_an_existing_file_of_another_checksum_is_fetched_again(fetch, site, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/file").write_bytes(BODY[:100])
    assert fetch() == BODY and len(site.asked) == 1
    assert fetch(None) == BODY and len(site.asked) == 1


def test_an_empty_file_arrives_too(fetch, site):
    site.files["/file"] = b""
    assert fetch(hashlib.sha256(b"").hexdigest()) == b"" and len(site.asked) == 1


@pytest.mark.parametrize("cuts", [[1], [70_001], [100_000, 1, 20_000, 7, 1, 1, 1], [len(BODY) - 1]])
def test_after_a_cut_only_the_missing_bytes_are_sent(fetch, site, cuts):
    site.steps = [dict(cut=n) for n in cuts]
    assert fetch() == BODY and sum(site.sent) == len(BODY)
    stops = [sum(cuts[:i]) for i in range(len(cuts) + 1)]
    assert site.asked == [None, *[f"bytes={n}-" for n in stops[1:]]]


def test_a_connection_that_is_reset_is_made_again(fetch, site):
    site.steps = [dict(cut=90_000, reset=True), dict(cut=0, reset=True), dict(cut=10, reset=True)]
    assert fetch() == BODY and len(site.asked) == 4


def test_a_connection_closed_before_any_answer_is_made_again(fetch, site):
    site.steps = [dict(mute=True), dict(cut=50_000), dict(mute=True)]
    assert fetch() == BODY and site.asked == [None, None, "bytes=50000-", "bytes=50000-"]


def test_a_server_that_knows_no_ranges_sends_all_of_it_again(fetch, site):
    site.steps = [dict(cut=100_000), dict(ranges=False)]
    assert fetch() == BODY and site.sent == [100_000, len(BODY)]


def test_a_server_that_knows_no_ranges_and_cuts_ever_earlier_is_still_not_believed(fetch, site):
    site.steps = [dict(cut=100_000), dict(ranges=False, cut=60_000), dict(ranges=False, cut=80_000)]
    assert fetch() == BODY and site.asked == [None, "bytes=100000-", "bytes=60000-", "bytes=80000-"]


def test_without_a_declared_length_the_end_of_the_answer_is_the_end(fetch, site):
    site.steps = [dict(length=False)]
    assert fetch() == BODY and len(site.asked) == 1


def test_chunks_arrive_whole_and_a_cut_between_them_is_noticed(fetch, site):
    site.steps = [dict(chunked=True, cut=140_000), dict(chunked=True)]
    assert fetch() == BODY and len(site.asked) == 2


def test_a_redirect_is_followed_and_told_where_to_go_on(fetch, site):
    site.files["/elsewhere"] = BODY
    to = f"{site.root}/elsewhere"
    site.steps = [dict(to=to), dict(cut=40_000), dict(to=to), dict()]
    assert fetch() == BODY and site.paths == ["/file", "/elsewhere"] * 2
    assert site.asked == [None, None, "bytes=40000-", "bytes=40000-"] and sum(site.sent) == len(BODY)


# ---------------------------------------------------------------- a network that fails

def test_without_progress_it_gives_up_keeps_what_came_and_goes_on_next_time(fetch, site, tmp_path):
    site.steps = [dict(cut=100_000)] + [dict(cut=0)] * 5
    with pytest.raises(UserError, match=f"^{site.root}/file: the connection was cut; .*goes on from there$"):
        fetch(patience=5)
    assert len(site.asked) == 6 and left(tmp_path) == ["file.part"]
    assert (tmp_path / "new/file.part").read_bytes() == BODY[:100_000]
    assert fetch() == BODY and site.asked[6:] == ["bytes=100000-"]


def test_patience_starts_anew_with_every_new_byte_and_waits_ever_longer(fetch, site):
    site.steps = ([dict(cut=0)] * 4 + [dict(cut=1)]) * 3
    assert fetch(patience=5) == BODY and len(site.asked) == 16
    assert max(site.naps) > 1 and all(nap <= 10 for nap in site.naps)


@pytest.mark.parametrize("code", [500, 502, 503, 429])
def test_a_server_that_is_busy_is_asked_again(fetch, site, code):
    site.steps = [dict(status=code), dict(cut=50_000), dict(status=code)]
    assert fetch() == BODY and site.asked == [None, None, "bytes=50000-", "bytes=50000-"]


def test_a_server_that_stays_busy_is_named_with_its_code(fetch, site):
    site.steps = [dict(status=503)] * 5
    with pytest.raises(UserError, match=f"^{site.root}/file: 503 Service Unavailable"):
        fetch(patience=5)
    assert len(site.asked) == 5


@pytest.mark.parametrize("code, reason", [(404, "Not Found"), (403, "Forbidden"), (401, "Unauthorized"), (410, "Gone")])
def test_a_server_that_refuses_is_not_asked_again(fetch, site, tmp_path, code, reason):
    site.steps = [dict(cut=10), dict(status=code)]
    with pytest.raises(UserError, match=f"^{site.root}/file: {code} {reason}$"):
        fetch()
    assert len(site.asked) == 2 and left(tmp_path) == ["file.part"]


def test_a_silent_server_is_asked_again_from_where_it_fell_silent(fetch, site):
    site.steps = [dict(silent_after=1 << 16)]
    assert fetch(timeout=0.3) == BODY and site.asked == [None, f"bytes={1 << 16}-"] and sum(site.sent) == len(BODY)


@pytest.mark.parametrize("sent", [40_000, (1 << 16) + 500])
def test_what_came_before_the_silence_is_kept_to_the_byte(fetch, site, sent):
    site.steps = [dict(silent_after=sent)]
    assert fetch(timeout=0.3) == BODY and site.asked == [None, f"bytes={sent}-"] and sum(site.sent) == len(BODY)


def test_a_server_that_stays_silent_is_given_up(fetch, site, tmp_path):
    site.steps = [dict(silent_after=1 << 16), dict(silent_after=0), dict(silent_after=0)]
    with pytest.raises(UserError, match=f"{site.root}/file: .*timed out; what has come is kept"):
        fetch(patience=2, timeout=0.3)
    assert len(site.asked) == 3 and (tmp_path / "new/file.part").read_bytes() == BODY[:1 << 16]
    assert fetch() == BODY


def test_nobody_at_the_address_is_a_user_error(tmp_path, site):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/file"
    with pytest.raises(UserError, match=f"{url}: .*refused"):
        download.fetch(url, tmp_path / "new/file")
    assert left(tmp_path) == []


@pytest.mark.parametrize("url", ["", "nonsense", "/etc/passwd", "http:///file", "http://127.0.0.1:port/file",
                                 "http://127.0.0.1/a b", "gopher://127.0.0.1/file"])
def test_an_address_that_is_none_is_a_user_error(tmp_path, site, url):
    with pytest.raises(UserError):
        download.fetch(url, tmp_path / "new/file")
    assert left(tmp_path) == []


def test_a_full_disk_is_not_taken_for_the_network(fetch, site, tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, block):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "open", lambda *rest: Full(builtins.open(*rest)), raising=False)
    with pytest.raises(OSError, match="No space left") as error:
        fetch()
    assert error.value.errno == errno.ENOSPC and len(site.asked) == 1 and left(tmp_path) == ["file.part"]


# ---------------------------------------------------------------- what an earlier process left

@pytest.mark.parametrize("size", [1, 65_536, len(BODY) - 1])
def test_what_an_earlier_process_left_is_gone_on_from(fetch, site, tmp_path, size):
    leave_part(tmp_path, BODY[:size])
    assert fetch() == BODY and site.asked == [f"bytes={size}-"] and sum(site.sent) == len(BODY) - size


def test_a_process_killed_in_the_middle_leaves_what_the_next_goes_on_from(fetch, site, tmp_path, monkeypatch):
    class Killed(download.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download, "tqdm", Killed)
        fetch()
    assert left(tmp_path) == ["file.part"]
    came = (tmp_path / "new/file.part").read_bytes()
    assert came and BODY.startswith(came)
    assert fetch() == BODY and site.asked == [None, f"bytes={len(came)}-"]


def test_a_part_that_is_complete_is_checked_and_used(fetch, site, tmp_path):
    leave_part(tmp_path, BODY)
    assert fetch() == BODY and sum(site.sent) == 0


@pytest.mark.parametrize("size", [10, len(BODY)])
def test_a_part_of_garbage_is_refused_and_the_next_call_starts_over(fetch, site, tmp_path, size):
    leave_part(tmp_path, b"?" * size)
    with pytest.raises(UserError, match=f"{site.root}/file: the checksum differs from the published one; .* deleted"):
        fetch()
    assert left(tmp_path) == []
    assert fetch() == BODY and site.asked == [f"bytes={size}-", None]


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_a_part_longer_than_the_file_is_of_something_else_and_is_thrown_away(fetch, site, tmp_path, sha256):
    leave_part(tmp_path, BODY + b"?")
    assert fetch(sha256) == BODY and site.asked == [f"bytes={len(BODY) + 1}-", None]


# ---------------------------------------------------------------- checksums

def refused(fetch, site, tmp_path, *rest):
    with pytest.raises(UserError, match=f"{site.root}/file: the checksum differs"):
        fetch(*rest)
    assert left(tmp_path) == []


def test_another_content_than_the_published_one_is_refused(fetch, site, tmp_path):
    refused(fetch, site, tmp_path, hashlib.sha256(BODY[:-1]).hexdigest())
    assert fetch() == BODY  # the next one starts over


def test_a_file_that_changed_between_two_parts_is_refused(fetch, site, tmp_path):
    site.steps = [dict(cut=70_000)] + [dict(cut=0)] * 5
    with pytest.raises(UserError, match="was cut"):
        fetch()
    site.files["/file"] = bytes(len(BODY))
    refused(fetch, site, tmp_path, SHA256)


def test_a_file_that_shrank_between_two_parts_is_fetched_anew(fetch, site):
    site.steps = [dict(cut=70_000, then=BODY[:50_000])]
    assert fetch(hashlib.sha256(BODY[:50_000]).hexdigest()) == BODY[:50_000] and site.asked == [None, "bytes=70000-", None]


def test_nothing_has_its_final_name_before_it_was_checked(fetch, site, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download.hashlib, "file_digest", killed)
        fetch()
    assert left(tmp_path) == ["file.part"]
    assert fetch() == BODY and sum(site.sent) == len(BODY)


def test_the_servers_md5_counts_where_no_checksum_is_known(fetch, site, tmp_path, capsys):
    site.steps = [dict(headers={"Content-MD5": WRONG_MD5}), dict(headers={"Content-MD5": MD5})]
    refused(fetch, site, tmp_path, None)
    assert fetch(None) == BODY and "without a checksum" not in capsys.readouterr().out


def test_the_published_checksum_goes_before_the_servers(fetch, site, tmp_path):
    site.steps = [dict(headers={"Content-MD5": WRONG_MD5}), dict(headers={"Content-MD5": MD5})]
    assert fetch() == BODY
    (tmp_path / "new/file").unlink()
    refused(fetch, site, tmp_path, "0" * 64)


def test_the_md5_of_a_part_is_not_taken_for_that_of_the_file(fetch, site, tmp_path):
    of_part = base64.b64encode(hashlib.md5(BODY[50_000:]).digest()).decode()
    site.steps = [dict(cut=50_000), dict(headers={"Content-MD5": of_part, "x-ms-blob-content-md5": MD5})]
    assert fetch(None) == BODY
    (tmp_path / "new/file").unlink()
    site.steps = [dict(cut=50_000), dict(headers={"x-ms-blob-content-md5": WRONG_MD5})]
    refused(fetch, site, tmp_path, None)


def test_the_md5_declared_before_the_cut_still_counts_after_it(fetch, site, tmp_path):
    site.steps = [dict(cut=50_000, headers={"Content-MD5": WRONG_MD5})]
    refused(fetch, site, tmp_path, None)


def test_without_any_checksum_it_says_so(fetch, site, capsys):
    assert fetch(None) == BODY
    assert f"{site.root}/file comes without a checksum: only its length was checked" in capsys.readouterr().out


def test_an_md5_that_is_none_is_a_user_error(fetch, site, tmp_path):
    site.steps = [dict(headers={"Content-MD5": "abc"})]
    refused(fetch, site, tmp_path, None)


# ---------------------------------------------------------------- GPT-2 by name

@pytest.fixture
def hub(site, tmp_path, monkeypatch):
    """hub(content): the site has it as the published weights of gpt2."""
    def hub(content, sha256=None):
        site.files["/openai-community/gpt2/resolve/abc123/model.safetensors"] = content
        monkeypatch.setitem(download.GPT2, "gpt2", ("abc123", sha256 or hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(download, "HUB", site.root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return hub


LARGE = SimpleNamespace(vocab_size=50257)


def test_gpt2_is_fetched_by_name_once_and_checked(hub, site, tmp_path):
    hub(BODY)
    path = tmp_path / "cache/instructgpt/gpt2/model.safetensors"
    assert [download.weights("gpt2", LARGE) for _ in range(2)] == [str(path)] * 2
    assert path.read_bytes() == BODY and len(site.asked) == 1
    path.unlink()
    hub(BODY, "0" * 64)
    with pytest.raises(UserError, match="the checksum differs"):
        download.weights("gpt2", LARGE)
    assert not path.exists()


def test_what_is_no_size_of_gpt2_comes_back_as_it_is(hub, site, letters):
    for init in ("scratch", "out/base/model.pt", "gpt2/", "./gpt2", "gpt3", "", "GPT2"):
        assert download.weights(init, letters.tokenizer) == download.weights(init, LARGE) == init
    assert site.asked == []


def test_nothing_is_fetched_for_a_dataset_of_another_vocabulary(hub, site, letters):
    hub(BODY)
    with pytest.raises(UserError, match="gpt2 has a vocabulary of 50257, the dataset's tokenizer.json one of 9"):
        sft.main(letters.sft(init="gpt2"))
    assert site.asked == []


def test_the_sizes_of_gpt2_are_those_of_the_presets_and_each_has_its_own_checksum():
    assert download.GPT2.keys() == {name for name in model.PRESETS if name.startswith("gpt2")}
    for revision, sha256 in download.GPT2.values():
        assert len(revision) == 40 and len(sha256) == 64 and int(revision + sha256, 16)
    assert len({part for pair in download.GPT2.values() for part in pair}) == 2 * len(download.GPT2)


@pytest.fixture
def tiny(hub, letters, tmp_path, monkeypatch):
    """A model of 2 layers with as many tokens as GPT-2, published as gpt2; and the letters in a vocabulary of that size."""
    start = random_gpt(vocab_size=50257, seed=4)
    start.save_gpt2(tmp_path / "published")
    hub((tmp_path / "published/model.safetensors").read_bytes())
    monkeypatch.setitem(model.PRESETS, "tiny", dict(layers=2, heads=2, width=16, context=64))
    byte = [bytes([i]) for i in range(256)]
    Tokenizer("large", byte + [a + b for a in byte for b in byte][:50_000]).save(letters.data)
    letters.sft = partial(letters.sft, init="gpt2", pretrain_mix=0.0, batch_size=12, epochs=2)
    return start.state_dict()


def test_sft_starts_from_gpt2_by_name(tiny, site, letters, tmp_path):
    for out in ("still", "again"):  # without config.json, its shape is found among the presets
        sft.main(letters.sft(epochs=1, lr=0.0, out=str(tmp_path / out)))
        assert same(weights(tmp_path / out / "model.pt"), tiny)
    assert len(site.asked) == 1
    sft.main(letters.sft(epochs=1, out=str(tmp_path / "tuned")))
    assert not torch.equal(weights(tmp_path / "tuned/model.pt")["positions.weight"], tiny["positions.weight"])
    assert load_model(GPT, tmp_path / "tuned/model.pt").config.heads == 2


def test_a_stopped_run_from_gpt2_goes_on_without_the_network(tiny, site, letters, stop_and_go_on, tmp_path):
    stop_and_go_on(sft.main, letters.sft(), 2)
    assert len(site.asked) == 1 and [line["step"] for line in read_log(tmp_path / "sft")] == [0, 1, 2, 3]
