"""Models and data sets of the Hugging Face Hub, in its local cache (HF_HOME, HF_HUB_OFFLINE).

`org/name` and `org/name@revision` are models, `org/name[/config][@revision][:split]` the rows of a data set.
A path that exists, or whose first part is a directory here, is never looked up.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from align.errors import UserError, summary

NAME = r"[A-Za-z0-9][\w.-]*"
MODEL = re.compile(rf"(?P<name>{NAME}/{NAME})(@(?P<revision>[\w./-]+))?")
DATA = re.compile(
    rf"(?P<name>{NAME}/{NAME})(/(?P<config>{NAME}))?(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.\[\]:%-]+))?"
)
FILES = re.compile(r"\.(json|jsonl|gz|parquet|model)(:|$)")  # file names, also mistyped, are never looked up
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
OTHERS = ["*/*", "consolidated*"]  # other formats of the same weights
BATCH = 1000  # rows of a data set converted at a time


def is_data(path: Path) -> bool:
    """True if a path names a data set of the Hub."""
    return DATA.fullmatch(str(path)) is not None and not is_local(path)


def is_local(path: Path) -> bool:
    """True if a path is on this machine, or is a mistyped file name."""
    return path.exists() or Path(path.parts[0]).is_dir() or FILES.search(path.name) is not None


def split_of(path: Path) -> str | None:
    """The split in a data set's name, or None."""
    match = DATA.fullmatch(str(path))
    return match and match["split"]


@functools.cache
def local_model(path: Path) -> Path:
    """The directory of a model: `path`, or the cached snapshot of a model of the Hub (UserError)."""
    match = MODEL.fullmatch(str(path))
    if match is None or is_local(path):
        return path
    from huggingface_hub import snapshot_download  # only where it is needed

    download = functools.partial(snapshot_download, allow_patterns=PATTERNS, ignore_patterns=OTHERS)
    try:
        return Path(download(match["name"], revision=match["revision"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = reason_of(error, f"`hf download {match['name']} --local-dir DIR` elsewhere and give DIR")
        raise UserError(f"{path} is no directory here, and no model of the Hub: {reason}") from error


def data_rows(path: Path) -> Iterator[dict]:
    """Yield the rows of a data set of the Hub, by default of its split "train". Raises UserError."""
    match = DATA.fullmatch(str(path))
    assert match is not None  # is_data(path)
    import datasets  # slow to import, and only needed here

    split, revision = match["split"] or "train", match["revision"]
    try:
        dataset = datasets.load_dataset(match["name"], match["config"], split=split, revision=revision)
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        command = f"`hf download --repo-type dataset {match['name']} --local-dir DIR`"
        reason = reason_of(error, f"{command} elsewhere and give its files")
        raise UserError(f"{path} is no file here, and no data set of the Hub: {reason}") from error
    for batch in dataset.with_format("arrow").iter(BATCH):  # as stored: no image is decoded
        yield from batch.to_pylist()


def reason_of(error: Exception, advice: str) -> str:
    """The first sentence of an error's message, and the `advice` if the network caused it."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    has_response = any(getattr(getattr(cause, "response", None), "status_code", None) for cause in causes)
    is_network = any(isinstance(cause, ConnectionError | LocalEntryNotFoundError) for cause in causes)
    reason = summary(error)
    return f"{reason}. Without a network run {advice}" if is_network and not has_response else reason
