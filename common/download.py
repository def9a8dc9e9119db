"""Files from the network: fetched once into a cache, with a progress bar; what was cut off goes on where it stopped, and
nothing is used that is not whole and right.
"""

import base64
import hashlib
import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from common.config import UserError
from common.files import digest

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")  # or a mirror of it
# The published weights: revision and SHA-256 of model.safetensors.
GPT2 = {
    "gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e", "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
                    "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519",
                   "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce"),
    "gpt2-xl": ("15ea56dee5df4983c59b2538573817e1667135e2",
                "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
}


def cache():
    """The folder for what is downloaded: instructgpt in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "instructgpt"


def weights(init, tokenizer):
    """`gpt2` and its sisters -> the path of the published weights, fetched if need be. Anything else stays as it is."""
    if init not in GPT2:
        return init
    if tokenizer.vocab_size != 50257:
        raise UserError(f"{init} has a vocabulary of 50257, the dataset's tokenizer.json one of {tokenizer.vocab_size}")
    revision, sha256 = GPT2[init]
    return str(fetch(f"{HUB}/openai-community/{init}/resolve/{revision}/model.safetensors",
                     cache() / init / "model.safetensors", sha256))


def fetch(url, path, sha256=None, patience=5, timeout=30):
    """The file at `url` -> `path`, which is returned once it is whole and right.

    What arrives is kept in `path`.part; a connection that broke or said nothing for `timeout` seconds is made again from
    there, up to `patience` times in a row without a new byte. The checksum is `sha256` or, where none is known, the
    Content-MD5 that the server declares. UserError where the server refuses, the network fails or the checksum differs."""
    path = Path(path)
    if path.is_file() and (not sha256 or digest(path) == sha256):  # nothing gets this name before it was checked
        return path
    part = path.with_name(f"{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    failures, problem, total, md5 = 0, "", None, None
    with tqdm(desc=path.name, unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True) as bar:
        while total is None or part.stat().st_size < total:
            if failures == patience:
                raise UserError(f"{url}: {problem}; what has come is kept, and the same command goes on from there")
            before = part.stat().st_size if part.is_file() else 0
            try:
                with ask(url, before, timeout) as answer:
                    resumed = answer.status == 206  # else the server sends all of it again
                    length = answer.headers.get("Content-Length", "")
                    total = int(length) + before * resumed if length.isdigit() else None
                    md5 = answer.headers.get("x-ms-blob-content-md5" if resumed else "Content-MD5", md5)
                    bar.total, bar.n = total, before * resumed
                    with open(part, "ab" if resumed else "wb") as file:
                        while block := answer.read1(1 << 16):
                            file.write(block)
                            bar.update(len(block))
                if total is None:  # no length was declared: the end of the answer is the end of the file
                    total = part.stat().st_size
                problem = "the connection was cut"
            except urllib.error.HTTPError as error:
                if error.code == 416 and before:  # nothing stands behind what has come
                    whole = error.headers.get("Content-Range", "").rpartition("/")[2]
                    if whole in ("", "*", str(before)):
                        break
                    part.unlink()  # it is longer than the file: of something else
                    total = None
                elif error.code < 500 and error.code != 429:
                    raise UserError(f"{url}: {error.code} {error.reason}") from None
                problem = f"{error.code} {error.reason}"
            except (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            failures = 0 if part.is_file() and part.stat().st_size > before else failures + 1
            time.sleep(max(0, failures - 1))
    check(url, part, sha256, md5)
    os.replace(part, path)
    return path


def ask(url, first, timeout):
    """The server's answer to a request for the file from byte `first` on."""
    headers = {"User-Agent": "instructgpt"} | ({"Range": f"bytes={first}-"} if first else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except ValueError as error:
        raise UserError(f"{url!r} is no address ({error})") from None


def check(url, part, sha256, md5):
    """Compare with the checksum that is known; what differs is deleted."""
    with open(part, "rb") as file:
        if sha256:
            right = hashlib.file_digest(file, "sha256").hexdigest() == sha256
        elif md5:
            right = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode() == md5.strip()
        else:
            return print(f"{url} comes without a checksum: only its length was checked")
    if not right:
        part.unlink()
        raise UserError(f"{url}: the checksum differs from the published one; the file was deleted")
