"""tools/smollm2.py, without its download: names, row order, and what it does with an existing directory."""

import pytest
import torch

from align.errors import UserError
from tools.smollm2 import halves_together, huggingface_name, main


def test_names() -> None:
    assert huggingface_name("blk.12.attn_q.weight") == "model.layers.12.self_attn.q_proj.weight"
    assert huggingface_name("blk.0.ffn_norm.weight") == "model.layers.0.post_attention_layernorm.weight"
    assert huggingface_name("token_embd.weight") == "model.embed_tokens.weight"
    with pytest.raises(KeyError, match="rope_freqs"):
        huggingface_name("rope_freqs.weight")


def test_row_order_of_each_head() -> None:
    # Two heads of 6 rows. GGUF holds row 0 of the first half, row 0 of the second, row 1 of the first, ...
    gguf = torch.tensor([0, 3, 1, 4, 2, 5, 10, 13, 11, 14, 12, 15])
    expected = torch.tensor([0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15])
    weight = torch.stack([gguf, gguf + 100], dim=1)  # [heads * head_dim, hidden]
    assert torch.equal(halves_together(weight, heads=2), torch.stack([expected, expected + 100], dim=1))


def test_an_existing_model_is_left_alone(tmp_path, capsys) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    main(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
    assert "already there" in capsys.readouterr().out


def test_another_directory_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"--output .* holds no model.safetensors"):
        main(tmp_path)
    assert list(tmp_path.iterdir()) == []
