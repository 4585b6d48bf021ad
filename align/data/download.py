"""Fetch public data sets over HTTP: resume after a broken connection, check the sha256, then rename.

Addresses are of one commit, so that an address and its sha256 belong together. Proxies come from the
environment (HTTPS_PROXY, NO_PROXY).
"""

import hashlib
import http.client
import sys
import urllib.error
import urllib.request
from pathlib import Path

from align import console
from align.errors import UserError

ATTEMPTS = 5  # connections of one file in one run
TIMEOUT_S = 60.0  # without a byte
BLOCK = 1 << 18  # bytes

HUB = "https://huggingface.co/datasets"
DOLLY = f"{HUB}/databricks/databricks-dolly-15k/resolve/bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a"
OASST1 = f"{HUB}/OpenAssistant/oasst1/resolve/fdf72ae0827c1cda404aff25b6603abec9e3399b"
GSM8K = (
    "https://raw.githubusercontent.com/openai/grade-school-math/"
    "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
)
HH = f"{HUB}/Anthropic/hh-rlhf/resolve/09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"

HH_SHA256 = {  # MIT; 79 MB in all. github.com/anthropics/hh-rlhf has the same files, helpful-* in Git LFS
    "harmless-base/train": "bf3e1ecd3db61bf21d190f69351d26670c67aababa0fd282fa008c17a7202217",
    "harmless-base/test": "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
    "helpful-base/train": "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
    "helpful-base/test": "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
    "helpful-online/train": "0994d18b82083f5c084ce04071b683958a724df8c7215ab1d851986642d36a2a",
    "helpful-online/test": "39a475cc7e0df972902f8e3a0972726fce826ac65369bda8c671de4330c60a10",
    "helpful-rejection-sampled/train": "0cea2d2ab2187624ec1314e8cc6fb579f0fa987b3a33e8102b7556ed4d255f64",
    "helpful-rejection-sampled/test": "abc35dbc56015db1dae0faa484514ccbc3eee0133bfcd557fc69250619b028bb",
}

PUBLIC: dict[str, tuple[str, str | None]] = {
    # CC BY-SA 3.0; 13,085,339 bytes, 15,011 rows
    "databricks-dolly-15k.jsonl": (
        f"{DOLLY}/databricks-dolly-15k.jsonl",
        "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec",
    ),
    # Apache 2.0; 66,497 trees. No sha256 is published: the program prints that of the download.
    "2023-04-12_oasst_all.trees.jsonl.gz": (f"{OASST1}/2023-04-12_oasst_all.trees.jsonl.gz", None),
    # MIT; 7,473 and 1,319 rows
    "gsm8k_train.jsonl": (
        f"{GSM8K}/train.jsonl",
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    ),
    "gsm8k_test.jsonl": (
        f"{GSM8K}/test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    ),
}
"""File name in the download directory -> address and sha256, None if none is published."""
for name, digest in HH_SHA256.items():
    PUBLIC[f"hh_{name.replace('/', '_')}.jsonl.gz"] = f"{HH}/{name}.jsonl.gz", digest


class DownloadError(UserError):
    """A public file that cannot be fetched, or whose sha256 differs from the table's."""


def fetch(name: str, directory: Path, flag: str = "--input") -> Path:
    """Return the path of a file of `PUBLIC` in `directory`; download it unless it exists.

    `flag` takes the file instead, where there is no network. Raises DownloadError.
    """
    url, expected = PUBLIC[name]
    path = directory / name
    if path.exists():
        advice = f"remove it to download it again, or give it as {flag} {path}"
        console.write(f"{path}: already there, {check(path, expected, str(path), advice)}")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        checked = fetch_new(url, expected, path, flag)
        console.write(f"{path}: downloaded {megabytes(path)}, {checked}")
    return path


def fetch_new(url: str, expected: str | None, path: Path, flag: str) -> str:
    """Download to PATH.part, which a later run continues, check it and rename it. Returns a phrase."""
    part = path.with_name(f"{path.name}.part")
    try:
        download(url, part)
    except DownloadError as error:
        by_hand = f"fetch this address by hand and save it as {path}, or give the file as {flag} FILE"
        raise DownloadError(f"{url}: {error}; {by_hand}") from None
    try:
        verdict = check(part, expected, url, f"it is deleted: try again, or give a good file as {flag} FILE")
    except DownloadError:
        part.unlink()
        raise
    part.replace(path)
    return verdict


def check(path: Path, expected: str | None, source: str, advice: str) -> str:
    """Compare the sha256 of a file and return a phrase for the log. Raises DownloadError with `advice`."""
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if expected is None:
        return f"sha256 {actual} not checked: no published one is known"
    if actual != expected:
        raise DownloadError(f"{source}: sha256 {actual}, expected {expected}; {advice}")
    return "sha256 as expected"


def download(url: str, part: Path) -> None:
    """Append to `part` until it is complete, over several connections if one breaks. Raises DownloadError."""
    for _ in range(ATTEMPTS):
        start = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except (OSError, http.client.HTTPException) as error:
            if start and isinstance(error, urllib.error.HTTPError) and error.code == 416:
                return  # the server has no byte beyond those of `part`
            raise DownloadError(error.reason if type(error) is urllib.error.URLError else error) from None
        with response:
            if receive(response, part):
                return
    advice = f"run the command again to continue {part}, {megabytes(part)}"
    raise DownloadError(f"the connection broke {ATTEMPTS} times; {advice}")


def receive(response: http.client.HTTPResponse, part: Path) -> bool:
    """Write a response to `part`, or append it if the server resumes. Returns True if `part` is complete."""
    resumes = response.status == http.client.PARTIAL_CONTENT
    length = response.headers["Content-Length"]
    with open(part, "ab" if resumes else "wb") as file:
        total = file.tell() + int(length) if length else None
        while block := read(response):
            file.write(block)
            show(part, file.tell(), total)
        show(part, file.tell(), total, end="\n")
        return block is not None and total in (None, file.tell())


def read(response: http.client.HTTPResponse) -> bytes | None:
    """Read the next block: empty at the end of the response, None if the connection breaks."""
    try:
        return response.read(BLOCK)
    except (OSError, http.client.HTTPException):
        return None


def show(part: Path, done: int, total: int | None, end: str = "") -> None:
    """Rewrite the progress line, if the error stream is a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        of_total = f" of {total / 1e6:.1f}" if total else ""
        console.write(f"\r{part.stem}: {done / 1e6:.1f}{of_total} MB", end, to="stderr")


def megabytes(path: Path) -> str:
    """Size of a file for a message."""
    return f"{path.stat().st_size / 1e6:.1f} MB"
