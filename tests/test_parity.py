"""Against transformers, in fp32, for every family and split: logits, three steps of AdamW, export."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.conftest import FAMILIES, torchrun
from tests.parity_data import LR, STEPS, examples


@pytest.fixture(scope="module", params=[(1, 1, ""), (2, 1, ""), (1, 2, ""), (2, 2, "sp")], ids=str)
def ours(request, models, tmp_path_factory):
    """(results of the worker by family, directory of the exports) in one layout."""
    tp, pp, sequence_parallel = request.param
    output = tmp_path_factory.mktemp("parity")
    torchrun(tp * pp, "tests/parity_worker.py", models, output, tp, pp, sequence_parallel or "no")
    return torch.load(output / "results.pt", weights_only=True), output


@pytest.fixture(scope="module")
def reference(models):
    """What a plain loop over transformers and torch.optim gives."""
    return {name: plain_loop(models / name) for name in FAMILIES}


def plain_loop(directory: Path) -> dict:
    """One row at a time: no packing, no padding, no micro-batches."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor(row.ids[None, :-1]).long()).logits[0] for row in examples(0)])
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.98),
    )
    history = []
    for step in range(STEPS):
        rows = examples(step)
        trained = sum(int(row.trained.sum()) for row in rows)
        loss = 0.0
        for row in rows:
            ids, mask = torch.tensor(row.ids[None]).long(), torch.tensor(row.trained[1:])
            logprobs = model(ids[:, :-1]).logits[0].log_softmax(-1)
            part = -logprobs.gather(1, ids[0, 1:, None])[:, 0][mask].sum() / trained
            part.backward()
            loss += float(part.detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append([loss, float(norm)])
    return {"logits": logits, "history": history}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(ours, reference, family):
    results, _ = ours
    difference = (results[family]["logits"] - reference[family]["logits"]).abs().max()
    assert difference <= 1e-4, difference


@pytest.mark.parametrize("family", FAMILIES)
def test_training(ours, reference, family):
    results, _ = ours
    found, expected = torch.tensor(results[family]["history"]), torch.tensor(reference[family]["history"])
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[:, 1], expected[:, 1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_is_byte_identical(ours, models, family):
    _, output = ours
    source = load_file(models / family / "model.safetensors")
    exported = {}
    for file in (output / family).glob("*.safetensors"):
        exported |= load_file(file)
    assert exported.keys() == source.keys()
    for name, tensor in source.items():
        assert exported[name].dtype == tensor.dtype
        assert torch.equal(exported[name].view(torch.int32), tensor.view(torch.int32)), name


def test_transformers_loads_the_export(ours, reference):
    """Sharded or not, transformers reads the export and computes the same."""
    _, output = ours
    for family in FAMILIES:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            output / family, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            logits = model(torch.tensor(examples(0)[0].ids[None, :-1]).long()).logits[0]
        torch.testing.assert_close(logits, reference[family]["logits"][: len(logits)])
