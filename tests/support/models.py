"""Random tiny models: the configurations of all families, and the tiny model of assets/."""

import copy
import json
import shutil
from pathlib import Path

import torch
import transformers

from tests.support.files import ROOT, TINY


def random_tiny(directory: Path, seed: int = 0) -> Path:
    """The tiny model with random weights, in a directory of its own."""
    config = transformers.AutoConfig.from_pretrained(ROOT / "assets/tiny")
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for file in (ROOT / "assets/tiny").iterdir():
        if file.name != "config.json":
            shutil.copy(file, directory)
    return directory


MEAN, STD = 0.25, 0.5  # of scores, as the directory of `save_reward_model` says


def save_reward_model(directory: Path) -> Path:
    """A random reward model with the policy's tokenizer, its scores of about 1 or -1."""
    config = copy.deepcopy(transformers.AutoConfig.from_pretrained(TINY))
    config.num_labels, config.initializer_range = 1, 0.2
    torch.manual_seed(9)
    transformers.LlamaForSequenceClassification(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, directory / name)
    (directory / "reward_statistics.json").write_text(json.dumps({"mean": MEAN, "std": STD}))
    return directory
