"""Training of the language model: seeded, resumable, and learning something."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from search.tasks import text_training
from search.tasks.text import encode, load_model, load_tokenizer
from search.tasks.text_training import (
    TextRecipe,
    cosine,
    loss_of,
    new_model,
    perplexity,
    replace_some,
    train_text,
    train_tokenizer,
    windows,
)

TEXTS = {
    "train": "the cat sat on the mat, and the dog lay by the door.\n" * 60,
    "calibration": "and the dog sat on the mat. the cat lay by the door,\n" * 6,
}
TINY = TextRecipe(vocabulary=280, hidden=16, intermediate=16, layers=1, heads=2, key_value_heads=1, positions=32)
RECIPE = replace(TINY, epochs=3, batch_size=4, context=16, peak_rate=1e-2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    out, lines = tmp_path_factory.mktemp("training") / "text", []
    model = train_text(TEXTS, RECIPE, out, seed=5, log=lines.append)
    assert [line.split(" loss")[0] for line in lines] == [f"text epoch {i}/3" for i in (1, 2, 3)]
    assert not model.training
    kept = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == kept
    weights = load_file(out / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert all(torch.equal(weights[name].float(), value) for name, value in model.state_dict().items())
    return weights


class Killed(BaseException):
    pass


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("moment", ["after an epoch", "within an epoch"])
def test_training_killed_and_resumed_ends_with_the_same_weights(
    undisturbed, tmp_path: Path, epoch: int, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def log(line: str) -> None:
        seen.append(line)
        if moment == "after an epoch" and len(seen) == epoch:
            raise Killed

    def replace_until(*given):
        if moment == "within an epoch" and len(seen) + 1 == epoch:
            batches.append(1)
            if len(batches) == 2:
                raise Killed
        return replace_some(*given)

    batches: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(text_training, "replace_some", replace_until)
        with pytest.raises(Killed):
            train_text(TEXTS, RECIPE, tmp_path, seed=5, log=log)
    assert not (tmp_path / "model.safetensors").exists()
    torch.rand(7)  # whatever the global random state is by then
    train_text(TEXTS, RECIPE, tmp_path, seed=5, log=lambda _: None)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == undisturbed.keys()
    assert all(torch.equal(weights[name], undisturbed[name]) for name in weights)


def test_training_learns_and_depends_on_its_seed(undisturbed, tmp_path: Path) -> None:
    other = train_text(TEXTS, RECIPE, tmp_path, seed=6, log=lambda _: None)
    assert not torch.equal(other.lm_head.weight.half(), undisturbed["lm_head.weight"])
    held_out = windows(encode(load_tokenizer(str(tmp_path)), TEXTS["calibration"]), RECIPE.context)
    torch.manual_seed(0)
    assert perplexity(other, held_out) < 0.3 * perplexity(new_model(RECIPE).eval(), held_out)


def test_any_text_can_be_encoded(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS["train"], 280, tmp_path)
    read = load_tokenizer(str(tmp_path))
    for text in (TEXTS["calibration"], "Größe 漢字 \x00\x7f\n", ""):
        ids = encode(read, text)
        assert torch.equal(ids, encode(tokenizer, text))
        assert ids.dtype == torch.int64
        assert read.decode(ids) == text
    assert len(read) == 280
    assert len(encode(read, "the cat")) < len("the cat"), "frequent pairs of bytes are one token"


def test_loss_and_perplexity(tmp_path: Path) -> None:
    """Against a loop over every token."""
    model, batch = new_model(RECIPE).eval(), torch.randint(280, (3, 8))
    with torch.no_grad():
        logs = model(batch).logits.log_softmax(-1)
        total = sum(-logs[i, t, batch[i, t + 1]].item() for i in range(3) for t in range(7))
        assert loss_of(model, batch, batch).item() == pytest.approx(total / 21, rel=1e-5)
    assert perplexity(model, batch) == pytest.approx(math.exp(total / 21), rel=1e-5)


def test_windows() -> None:
    assert windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_replaced_tokens_are_a_share_of_all() -> None:
    batch = torch.full((100, 100), 7)
    found = replace_some(batch, replace(RECIPE, replaced=0.3), torch.Generator().manual_seed(0))
    assert found.min() >= 0
    assert found.max() < RECIPE.vocabulary
    assert (found != 7).float().mean().item() == pytest.approx(0.3 * 279 / 280, abs=0.02)
    assert torch.equal(replace_some(batch, replace(RECIPE, replaced=0.0), torch.Generator()), batch)


def test_schedule() -> None:
    rates = [cosine(100)(step) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 5)
    assert max(rates) == rates[4]
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(0)
    assert cosine(3)(0) == 1


def test_widths_suit_weight_groups() -> None:
    recipe = TextRecipe()
    assert recipe.hidden % 128 == recipe.intermediate % 128 == 0
    with torch.device("meta"):
        model = new_model(recipe)
    assert 2 * sum(value.numel() for value in model.state_dict().values()) < 7.9e6, "bytes in float16"


def test_a_finished_folder_is_read_back(undisturbed, tmp_path: Path) -> None:
    model = train_text(TEXTS, replace(RECIPE, epochs=1), tmp_path, log=lambda _: None)
    again = load_model(str(tmp_path))
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
