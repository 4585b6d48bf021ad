"""Models and data sets of the Hugging Face Hub, named as there, kept in its cache (HF_HOME, HF_HUB_OFFLINE).

`org/name` and `org/name@revision` are models, `org/name[/config][@revision][:split]` the rows of a data set.
A path that exists, or whose first part is a directory here, is never looked up.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

NAME = r"[A-Za-z0-9][\w.-]*"
MODEL = re.compile(rf"(?P<name>{NAME}/{NAME})(@(?P<revision>[\w./-]+))?")
DATA = re.compile(
    rf"(?P<name>{NAME}/{NAME})(/(?P<config>{NAME}))?(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.\[\]:%-]+))?"
)
FILES = re.compile(r"\.(json|jsonl|gz|parquet|model)(:|$)")  # names of files, which a typing error hides
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
OTHERS = ("*/*", "consolidated*")  # other formats of the same weights
BATCH = 1000  # rows of a data set that are made at a time


def is_data(path: Path) -> bool:
    """True if a path names a data set of the Hub."""
    return DATA.fullmatch(str(path)) is not None and not is_local(path)


def is_local(path: Path) -> bool:
    """True if a path is one of this machine, there or mistyped."""
    return path.exists() or Path(path.parts[0]).is_dir() or FILES.search(path.name) is not None


def split_of(path: Path) -> str | None:
    """The split that the name of a data set ends with."""
    return DATA.fullmatch(str(path))["split"]


@functools.cache
def local_model(path: Path) -> Path:
    """The directory of a model: `path`, or of a model of the Hub its snapshot in the cache.

    Raises ValueError if the Hub, or the cache without a network, has no such model.
    """
    match = MODEL.fullmatch(str(path))
    if match is None or is_local(path):
        return path
    from huggingface_hub import snapshot_download  # only where it is needed
    from huggingface_hub.errors import HfHubHTTPError

    try:
        snapshot = snapshot_download(
            match["name"],
            revision=match["revision"],
            allow_patterns=list(PATTERNS),
            ignore_patterns=list(OTHERS),
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(
            f"{path} is no directory here, and the Hub gives no such model: {one_line(error)}. Without a "
            f"network: run `hf download {match['name']} --local-dir DIR` elsewhere and give DIR"
        ) from error
    return Path(snapshot)


def data_rows(path: Path) -> Iterator[dict]:
    """The rows of a data set of the Hub, of its split "train" if none is named. Raises ValueError."""
    match = DATA.fullmatch(str(path))
    import datasets  # slow to import, and only needed here
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = datasets.load_dataset(
            match["name"],
            match["config"],
            split=match["split"] or "train",
            revision=match["revision"],
        )
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{path} is no file here, and the Hub gives no such rows: {one_line(error)}. Without a network: "
            f"run `hf download --repo-type dataset {match['name']} --local-dir DIR` elsewhere and give its "
            "jsonl or Parquet files"
        ) from error
    for batch in found.with_format("arrow").iter(BATCH):  # as stored: no image is decoded
        yield from batch.to_pylist()


def one_line(error: Exception) -> str:
    """The message of an error without line ends."""
    return " ".join(str(error).split()).rstrip(".")
