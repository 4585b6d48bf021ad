"""Make a Hugging Face directory of a NeMo archive, of a checkpoint of ours, or of a model and its adapter.

    python -m tools.prepare_model nemo --input GPT-2B-001_bf16_tp1.nemo --output models/gpt-2b-001
    python -m tools.prepare_model nemo --input llama3.nemo --tokenizer DIR --output models/llama3
    python -m tools.prepare_model export --checkpoint runs/sft/checkpoints/step_00000100 --output models/sft
    python -m tools.prepare_model merge --model models/base --adapter runs/sft/adapter --output models/sft

Nothing of the input is run, the output appears when it is complete, and weights keep their precision.
"""

import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
import tyro
from megatron.core import dist_checkpointing
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from align import console
from align.data import formats, jsonl, marker_chat, tokenizer_files
from align.data.formats import FormatConfig
from align.data.marker_chat import MarkerChat
from align.data.sentencepiece_tokenizer import SentencePieceTokenizer
from align.data.sft import TrainedFormat
from align.data.tokenizer import Tokenizer, load_tokenizer
from align.distributed import parallel
from align.distributed.parallel import ParallelConfig
from align.errors import UserError, one_line
from align.model import adapter_files, architecture, gpt, huggingface, lora
from align.model.config import ModelConfig
from align.model.lora import LoraConfig
from align.training import checkpoint as checkpoints
from align.training import checkpoint_files
from tools import nemo_config, nemo_weights
from tools.nemo_weights import Weights

Shapes = dict[str, tuple[int, ...]]
MARKERS = ("system_turn_start", "turn_start", "label_start", "end_of_turn", "end_of_name")  # --chat-tokens
DTYPES: dict[torch.dtype, Literal["fp32", "bf16"]] = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def main() -> None:
    """Run the subcommand named on the command line; a mistake of the user's is one line."""
    console.adapt()
    with one_line():
        tyro.extras.subcommand_cli_from_dict({"nemo": nemo, "export": export, "merge": merge})


def nemo(input: Path, output: Path, tokenizer: Path | None = None, ignore: tuple[str, ...] = ()) -> None:
    """NeMo archive of GPT-2B-001, Llama, Nemotron and their kin, or of a reward model, to Hugging Face.

    Args:
        input: .nemo file, or a directory with what was in one
        output: directory to write
        tokenizer: Hugging Face directory or SentencePiece model, where the archive holds none
        ignore: fields of model_config.yaml that are unknown here and change nothing that the model computes
    """
    if output.exists():
        raise UserError(f"--output {output} exists: remove it, or give another directory")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the rename at the end stays within one file system.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        unfinished = Path(scratch) / "model"
        unfinished.mkdir()
        archive = input if input.is_dir() else extract(input, Path(scratch) / "archive")
        jsonl.located(f"--input {input}", convert, archive, unfinished, tokenizer, ignore)
        os.replace(unfinished, output)
    print(f"the model is in {output}")


def extract(path: Path, folder: Path) -> Path:
    """Copy what is needed out of a tar, plain or compressed. Raises UserError if it is broken or unsafe."""
    folder.mkdir()
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                place = PurePosixPath(member.name)
                if place.is_absolute() or ".." in place.parts or not (member.isfile() or member.isdir()):
                    refused = f"{member.name!r} is a link, or leaves the directory"
                    raise UserError(f"--input {path}: {refused}: refused")
                if member.isfile() and is_needed(place):
                    (folder / place).parent.mkdir(parents=True, exist_ok=True)
                    source = archive.extractfile(member)
                    assert source is not None  # member.isfile()
                    with open(folder / place, "wb") as file:
                        shutil.copyfileobj(source, file, 2**24)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise UserError(f"--input {path} is no tar, or is cut short: {reason}") from error
    return folder


def is_needed(place: PurePosixPath) -> bool:
    """True for the configuration, the weights and a SentencePiece model."""
    is_file = place.name in ("model_config.yaml", "model_weights.ckpt") or place.suffix == ".model"
    return is_file or place.parts[0] == "model_weights"


def convert(archive: Path, output: Path, tokenizer_path: Path | None, ignore: tuple[str, ...]) -> None:
    """Write the Hugging Face directory of an extracted archive."""
    fields = nemo_config.read(archive / "model_config.yaml", ignore)
    config = nemo_config.huggingface_config(fields)
    tokenizer = find_tokenizer(archive, fields.get("tokenizer") or {}, tokenizer_path)
    weights = nemo_weights.read(archive, fields)
    config |= {"vocab_size": vocab_size(weights, fields, tokenizer)}
    config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
    is_reward_model = "rm_head.weight" in weights
    if is_reward_model:
        config = nemo_config.as_reward_model(config, reward_head(weights, fields))
    if is_reward_model or config["tie_word_embeddings"]:
        weights.pop("output_layer.weight", None)  # a reward model has one that it does not use
    trained_format = prompt_format(fields.get("data") or {})
    if trained_format and trained_format.chat:
        tokenizer.follow(trained_format.chat)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.stop_ids)}
    jsonl.write_object(output / "generation_config.json", ids)
    tokenizer.save(output)
    write_weights(weights, fields, config, output)
    if trained_format:
        trained_format.save(output)
    if is_reward_model:
        tokenizer_files.save_pad_token(output)


def find_tokenizer(archive: Path, fields: dict, path: Path | None) -> Tokenizer:
    """The tokenizer of --tokenizer, or the SentencePiece model that the archive holds."""
    if path is not None:
        return load_tokenizer(path)
    inside = archive / Path(str(fields.get("model")).removeprefix("nemo:")).name
    if fields.get("library") != "sentencepiece" and fields.get("type") != "GPTSentencePieceTokenizer":
        name = fields.get("type") or fields.get("library")
        raise UserError(f"the tokenizer is {name}, which the archive does not hold: give --tokenizer DIR")
    if not inside.is_file():
        raise UserError(f"the tokenizer {inside.name} is missing: give --tokenizer FILE")
    if fields.get("sentencepiece_legacy") and fields.get("special_tokens"):
        raise UserError("tokenizer.special_tokens are not in the SentencePiece model: give --tokenizer DIR")
    return SentencePieceTokenizer(inside)


def vocab_size(weights: Weights, fields: dict, tokenizer: Tokenizer) -> int:
    """Rows of the embedding without those that only make its size a multiple."""
    if "embedding.word_embeddings.weight" not in weights:
        raise UserError("the archive is incomplete: embedding.word_embeddings.weight is missing")
    rows, ids = len(weights["embedding.word_embeddings.weight"]()), tokenizer.vocab_size
    ranks = fields.get("tensor_model_parallel_size") or 1
    multiple = (fields.get("make_vocab_size_divisible_by") or 128) * ranks
    if rows < ids:
        raise UserError(f"the tokenizer has {ids} ids, the model {rows}: it is another model's")
    if rows >= ids + multiple:
        print(f"the tokenizer has {ids} ids, the model {rows}, more than padding to {multiple}: all are kept")
        return rows
    return ids


def reward_head(weights: Weights, fields: dict) -> int:
    """Leave a head without bias, [labels, H], in the weights: how many labels it has."""
    head, settings = weights["rm_head.weight"](), fields.get("regression") or {}
    bias = weights.pop("rm_head.bias", lambda: torch.zeros(len(head)))().float()
    shares = torch.tensor(settings.get("attribute_weights") or [1 / len(head)] * len(head))
    if settings.get("merge_attributes"):
        head, bias = (shares @ head.float()).to(head.dtype)[None], (shares @ bias)[None]
    if bias.any():
        print(f"Hugging Face's heads have no bias: rewards are lower than NeMo's by {bias.tolist()}")
    standard = fields.get("reward_standardization") or {}
    if standard.get("enable"):
        mean = standard["mean"] - bias.mean().item()
        print(f"NeMo standardises these rewards: give --reward-mean {mean} --reward-std {standard['std']}")
    weights["rm_head.weight"] = lambda: head
    return len(head)


def write_weights(weights: Weights, fields: dict, config: dict, output: Path) -> None:
    """config.json and safetensors files, which must be what transformers expects of this configuration."""
    dtype = weights["embedding.word_embeddings.weight"]().dtype
    config |= {"dtype": str(dtype).removeprefix("torch.")}
    jsonl.write_object(output / "config.json", config)
    # StableLM's norms have the factor w, Nemotron's w + 1.
    add_one = nemo_config.normalization(fields) == "layernorm1p" and config["model_type"] == "stablelm"
    tensors = checked(nemo_weights.tensors(weights, config, add_one), expected_shapes(output))
    huggingface.write_index(output, huggingface.write_files(tensors, output))


def expected_shapes(directory: Path) -> Shapes:
    """Names and shapes of the tensors that transformers has for the config.json of a directory."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    is_classifier = architecture.is_classifier(config.to_dict())
    kind = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    with torch.device("meta"):
        state = kind.from_config(config).state_dict()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name not in tied}


def checked(tensors: Iterable[tuple[str, Tensor]], shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors. Raises UserError unless their names and shapes are `shapes`."""
    rest = dict(shapes)
    for name, tensor in tensors:
        if name not in rest:
            raise UserError(f"the archive holds {name}, which a model of this configuration does not have")
        if (shape := rest.pop(name)) != tuple(tensor.shape):
            raise UserError(f"{name} is {tuple(tensor.shape)}, model_config.yaml means {shape}")
        yield name, tensor
    if rest:
        raise UserError(f"the archive is incomplete: {min(rest)} is the first of {len(rest)} missing tensors")


def prompt_format(fields: dict) -> TrainedFormat | None:
    """The format that `data` of the configuration names, None if the model was not tuned on prompts."""
    rows = fields.get("train_ds") or {}
    template = rows.get("prompt_template") or fields.get("prompt_template") or ""
    if not fields.get("chat") and not template:
        return None
    try:
        if rows.get("add_sep"):
            raise UserError("data.train_ds.add_sep = true is not implemented")
        add_bos = None if rows.get("add_bos") is None else bool(rows["add_bos"])
        if fields.get("chat"):
            markers = fields.get("chat_prompt_tokens") or {}
            defaults = dict(zip(MARKERS, FormatConfig.chat_tokens, strict=True))
            system, turn, label, end_of_turn, end_of_name = (
                escape(markers[name]) if name in markers else defaults[name] for name in MARKERS
            )
            tokens = system, turn, label, end_of_turn, end_of_name
            FormatConfig(chat_tokens=tokens)  # checks them
            chat = MarkerChat(tuple(map(formats.unescape, tokens)), bos=bool(add_bos))
            return TrainedFormat("conversations", FormatConfig.prompt_template, tokens, add_bos, chat)
        formats.template_pieces(escape(template))
        return TrainedFormat("template", escape(template), FormatConfig.chat_tokens, add_bos, None)
    except ValueError as error:
        print(f"no prompt_format.json is written: {error}")
        return None


def escape(text: str) -> str:
    """Text as it is typed for a flag: `data.unescape` gives it back."""
    return text.encode("unicode_escape").decode()


def export(checkpoint: Path, output: Path, tp: int = 1, pp: int = 1) -> None:
    """Checkpoint of a run, of any layout, to what the run leaves in OUTPUT/hf when it is complete.

    A model that one process has no memory for needs torchrun, and --tp or --pp.

    Args:
        checkpoint: OUTPUT/checkpoints/step_XXXXXXXX
        output: directory to write
        tp: tensor parallel size
        pp: pipeline parallel size
    """
    if output.exists():
        raise UserError(f"--output {output} exists: remove it, or give another directory")
    if not checkpoints.is_checkpoint(checkpoint):
        raise UserError(f"--checkpoint {checkpoint} is no checkpoint of ours: there is no state.json")
    flags = checkpoints.run_flags(checkpoint)
    start = ModelConfig(model=flags["model"]).path
    if not (start / "config.json").is_file():
        rule = "start this command where it was started"
        raise UserError(f"the run began with --model {flags['model']}: {rule}")
    layout = ParallelConfig(tp=tp, pp=pp)
    with parallel.start(layout):
        checkpoint_files.verify(checkpoint)
        trained, companions = build(checkpoint, start, flags, layout)
        checkpoints.load_weights(checkpoint, trained)
        huggingface.save(trained, start, output, companions)
        if parallel.is_main():
            print(f"the model is in {output}")


def build(
    path: Path, start: Path, flags: dict, layout: ParallelConfig
) -> tuple[gpt.Decoder, list[Callable[[Path], None]]]:
    """The model of a checkpoint, its trained weights not filled, and what its run writes beside it."""
    shapes = dist_checkpointing.load_tensors_metadata(str(path))
    precision = DTYPES[next(x.dtype for name, x in shapes.items() if not name.startswith("optimizer."))]
    config = ModelConfig(model=flags["model"], precision=precision)
    arch, tokenizer = architecture.read_config(start), load_tokenizer(start)
    labels = shapes["score.weight"].global_shape[0] if "score.weight" in shapes else 0
    arch = replace(arch, labels=labels)
    adapters = adapter_files.read(lora_config(flags), arch)
    if labels:
        weights = flags.get("attribute_weights") or (1 / labels,) * labels
        scorer = gpt.build_scorer(arch, config, layout, weights, adapters)
        load_base(scorer, start, flags)
        return scorer, [tokenizer.save, tokenizer_files.save_pad_token]
    companions: list[Callable[[Path], None]] = [tokenizer.save]
    run = path.parent.parent
    if (run / "prompt_format.json").is_file():  # its rows had a format of their own
        if chat := marker_chat.read(run):
            tokenizer.follow(chat)

        def copy_format(directory: Path) -> None:
            shutil.copy(run / "prompt_format.json", directory)

        companions.append(copy_format)
    policy = gpt.build_policy(arch, config, layout, adapters=adapters)
    load_base(policy, start, flags)
    return policy, companions


def lora_config(flags: dict) -> LoraConfig:
    """The flags of a run's adapters; earlier versions had none."""
    values = {name: flags[name] for name in vars(LoraConfig()) if name in flags}
    if values.get("adapter"):
        values["adapter"] = Path(values["adapter"])
    return LoraConfig(**values | {"lora_targets": tuple(values.get("lora_targets", ()))})


def load_base(model: gpt.Decoder, start: Path, flags: dict) -> None:
    """Fill the frozen weights of a model with adapters, which a checkpoint does not hold."""
    if model.adapters:
        arch = architecture.read_config(start)
        source = huggingface.open_source(start, arch, flags["seed"])
        if model.arch.labels and not arch.labels:
            source = huggingface.FreshHead(source, model.arch, flags["seed"])  # the checkpoint has the head
        huggingface.load(model, source)


def merge(model: Path, adapter: Path, output: Path, tp: int = 1, pp: int = 1) -> None:
    """Merge an adapter, of this project or of peft, into its model.

    The sum is computed in fp32 and written in the model's precision. A model that one process has no memory
    for needs torchrun, and --tp or --pp.

    Args:
        model: Hugging Face directory of the base model
        adapter: directory of the adapter
        output: directory to write
        tp: tensor parallel size
        pp: pipeline parallel size
    """
    if output.exists():
        raise UserError(f"--output {output} exists: remove it, or give another directory")
    start = architecture.read_config(model)
    arch = replace(start, labels=adapter_files.num_labels(adapter) or start.labels)
    if arch.labels > 1:
        raise UserError(f"--model {model} has {arch.labels} labels: give a reward model with one")
    adapters, tokenizer = adapter_files.read_config(adapter, arch), load_tokenizer(model)
    companions, layout = [tokenizer.save], ParallelConfig(tp=tp, pp=pp)
    source = huggingface.open_source(model, start, 0)
    if not isinstance(source, huggingface.SafetensorsSource):
        raise UserError(f"--model {model} is random: merge into a model with weights, or take OUTPUT/hf")
    config = ModelConfig(model=str(model), precision=precision_of(source, model))
    with parallel.start(layout):
        if arch.labels:
            merged: gpt.Decoder = gpt.build_scorer(arch, config, layout, adapters=adapters)
            source = source if start.labels else huggingface.FreshHead(source, arch, 0)
            companions.append(tokenizer_files.save_pad_token)
        else:
            merged = gpt.build_policy(arch, config, layout, adapters=adapters)
        huggingface.load(merged, source)
        for module in lora.modules(merged):  # the adapter's own precision may be higher
            module.lora_A.data, module.lora_B.data = module.lora_A.data.float(), module.lora_B.data.float()
        adapter_files.load(merged, 0)
        huggingface.save(merged, model, output, companions)
        if parallel.is_main():
            print(f"the model is in {output}")


def precision_of(source: huggingface.Source, model: Path) -> Literal["fp32", "bf16"]:
    """Precision of a model's weights. Raises UserError for one that none is trained in."""
    dtype = source.read("model.norm.weight").dtype
    if dtype not in DTYPES:
        raise UserError(f"--model {model} is stored in {dtype}: convert it to bfloat16 or float32 first")
    return DTYPES[dtype]


if __name__ == "__main__":
    main()
