"""Models and data sets of the Hugging Face Hub, in its local cache (HF_HOME, HF_HUB_OFFLINE).

`org/name` and `org/name@revision` are models, `org/name[/config][@revision][:split]` the rows of a data set.
A path that exists, or whose first part is a directory here, is never looked up.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from align.errors import UserError

NAME = r"[A-Za-z0-9][\w.-]*"
MODEL = re.compile(rf"(?P<name>{NAME}/{NAME})(@(?P<revision>[\w./-]+))?")
DATA = re.compile(
    rf"(?P<name>{NAME}/{NAME})(/(?P<config>{NAME}))?(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.\[\]:%-]+))?"
)
FILES = re.compile(r"\.(json|jsonl|gz|parquet|model)(:|$)")  # file names, also mistyped, are never looked up
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
OTHERS = ("*/*", "consolidated*")  # other formats of the same weights
BATCH = 1000  # rows of a data set converted at a time


def is_data(path: Path) -> bool:
    """True if a path names a data set of the Hub."""
    return DATA.fullmatch(str(path)) is not None and not is_local(path)


def is_local(path: Path) -> bool:
    """True if a path is on this machine, or is a mistyped file name."""
    return path.exists() or Path(path.parts[0]).is_dir() or FILES.search(path.name) is not None


def split_of(path: Path) -> str | None:
    """The split in a data set's name, or None."""
    return DATA.fullmatch(str(path))["split"]


@functools.cache
def local_model(path: Path) -> Path:
    """The directory of a model: `path`, or the cached snapshot of a model of the Hub.

    Raises UserError if the Hub, or the cache without a network, has no such model.
    """
    match = MODEL.fullmatch(str(path))
    if match is None or is_local(path):
        return path
    from huggingface_hub import snapshot_download  # only where it is needed

    try:
        snapshot = snapshot_download(
            match["name"],
            revision=match["revision"],
            allow_patterns=list(PATTERNS),
            ignore_patterns=list(OTHERS),
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        advice = f"`hf download {match['name']} --local-dir DIR` elsewhere and give DIR"
        raise UserError(
            f"{path} is no directory here, and no model of the Hub: {one_line(error)}{offline(error, advice)}"
        ) from error
    return Path(snapshot)


def data_rows(path: Path) -> Iterator[dict]:
    """Yield the rows of a data set of the Hub, by default of its split "train". Raises UserError."""
    match = DATA.fullmatch(str(path))
    import datasets  # slow to import, and only needed here

    try:
        dataset = datasets.load_dataset(
            match["name"], match["config"], split=match["split"] or "train", revision=match["revision"]
        )
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        advice = (
            f"`hf download --repo-type dataset {match['name']} --local-dir DIR` elsewhere and give its files"
        )
        raise UserError(
            f"{path} is no file here, and no data set of the Hub: {one_line(error)}{offline(error, advice)}"
        ) from error
    for batch in dataset.with_format("arrow").iter(BATCH):  # as stored: no image is decoded
        yield from batch.to_pylist()


def offline(error: Exception, advice: str) -> str:
    """Advice for a machine without a network if the network caused the error, else ""."""
    causes, cause = [], error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(getattr(getattr(cause, "response", None), "status_code", None) for cause in causes):
        return ""  # the Hub has responded
    is_network = any(isinstance(cause, ConnectionError | LocalEntryNotFoundError) for cause in causes)
    return f". Without a network run {advice}" if is_network else ""


def one_line(error: Exception) -> str:
    """The first sentence of an error's message."""
    return re.split(r"(?<=\w)\.? *\n|(?<=\w)\. ", str(error).strip())[0].rstrip(".")
