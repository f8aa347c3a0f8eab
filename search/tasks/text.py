"""The text task: how well a causal language model predicts English text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from search.errors import ConfigError, DataError, UnsupportedError, closest
from search.quiet import quietly
from search.tasks.classification import CHECKPOINTS
from search.tasks.task import SPLITS, Split, Task
from search.tasks.topics import file_texts, topic_texts

BUNDLED = CHECKPOINTS / "text"
TRAINING_BATCH = 8  # sequences
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Text(Task):
    """Perplexity per token of a causal language model, by default of a small Llama on Python's own documentation.

    Each split is one stream of tokens, cut into sequences of `context` tokens. A sequence is one sample: tokens within
    it depend on one another, whole sequences hardly do, so that intervals over sequences are honest. Its score is the
    mean negative log-likelihood in nats of its tokens, each given those before it. All sequences are equally long, so
    `reduce`, the exponential of the mean score, is the perplexity over all tokens predicted. Tokens are the
    model's own: perplexities of models with different tokenizers cannot be compared.

    The default text is described in `search.tasks.topics`: the splits are held-out topics, and hold no paragraph of the
    topics the shipped model was trained on. That was with Python 3.11, whose topics differ a little from those of 3.13.
    """

    metric = "perplexity"
    higher_is_better = False

    def __init__(
        self,
        path: str | Path | None = None,
        text: str | Path | None = None,
        context: int = 128,
        batch_size: int = 16,
        calibration_samples: int | None = None,
        selection_samples: int | None = None,
        report_samples: int | None = None,
        dtype: str = "float32",
    ) -> None:
        """Creates the task; model and text are read when first needed.

        Args:
            path: Folder of a Hugging Face causal language model with its tokenizer, or the id of one that is in the
                local cache; nothing is downloaded. Default: the model shipped with the package.
            text: A UTF-8 text file: its first quarter becomes calibration, the second selection, the rest report.
                Default: the topics of the standard library's `pydoc_data`.
            context: Tokens in a sequence.
            batch_size: Sequences in a batch.
            calibration_samples: At most so many sequences, the first ones; None for all.
            selection_samples: Likewise.
            report_samples: Likewise.
            dtype: Type the model's weights are read as: `float32`, `bfloat16` or `float16`.

        Raises:
            ConfigError: If a number is out of range or `dtype` is unknown.
        """
        limits = {
            "calibration_samples": calibration_samples,
            "selection_samples": selection_samples,
            "report_samples": report_samples,
        }
        for key, value, least in (
            ("context", context, 2),
            ("batch_size", batch_size, 1),
            *((key, value, 1) for key, value in limits.items() if value is not None),
        ):
            if value < least:
                raise ConfigError(f"task.{key}={value} must be at least {least}")
        if dtype not in DTYPES:
            raise ConfigError(f"task.dtype={dtype} is unknown{closest(dtype, DTYPES)}; allowed: {', '.join(DTYPES)}")
        self.path = str(path or BUNDLED)
        self.name = f"text_{Path(path).name}" if path else "text"
        self.context = context
        self.batch_size = batch_size
        self._text = Path(text) if text else None
        self._limits = {split: limits[f"{split}_samples"] for split in SPLITS}
        self._dtype = DTYPES[dtype]

    @cached_property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The language model in evaluation mode, without a cache of keys and values.

        Raises:
            ConfigError: If `context` is more than the model has positions for.
        """
        model: nn.Module = load_model(self.path, self._dtype)
        positions = getattr(model.config, "max_position_embeddings", None) or math.inf
        if self.context > positions:
            raise ConfigError(
                f"task.context={self.context} is more than {self.path} has positions for; "
                f"it must be at most {positions}"
            )
        return model

    @cached_property
    def example_input(self) -> Tensor:
        """Two calibration sequences, so that nothing specialises to a batch of one."""
        return self.sequences("calibration")[:2]

    def batches(self, split: Split) -> Iterator[Tensor]:
        """Yields token ids, int64 of shape `(sequences, context)`."""
        return iter(torch.split(self.sequences(split), self.batch_size))

    def training_batches(self, epoch: int) -> Iterable[Tensor]:
        """Yields windows of the text that the shipped model was trained on, cut and shuffled anew in every epoch.

        With a text of the user's own, the sequences of its calibration split.
        """
        if self._text:
            return super().training_batches(epoch)
        generator = torch.Generator().manual_seed(epoch)
        tokens, length = self._training_tokens, self.context - len(self._start)
        cut = int(torch.randint(length, (), generator=generator))
        count = (len(tokens) - cut) // length
        windows = tokens[cut : cut + count * length].view(count, length)
        windows = torch.cat([self._start.expand(count, -1), windows], 1)
        return torch.split(windows[torch.randperm(count, generator=generator)], TRAINING_BATCH)

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        """Returns the mean negative log-likelihood in nats, as `score` does."""
        return self.score(outputs, batch)

    def score(self, outputs: Tensor, batch: Tensor) -> Tensor:
        """Returns the mean negative log-likelihood in nats of each sequence's tokens but the first.

        Args:
            outputs: Logits, shape `(sequences, context, vocabulary)`.
            batch: Token ids, shape `(sequences, context)`.
        """
        predicted, actual = outputs[:, :-1].float(), batch[:, 1:].to(outputs.device)
        return F.cross_entropy(predicted.transpose(1, 2), actual, reduction="none").double().mean(1)

    def targets(self, batch: Tensor, outputs: Tensor) -> Tensor:
        """Returns the token after each one, shape `(sequences, context)`; -1 after the last, which predicts none."""
        return F.pad(batch[:, 1:], (0, 1), value=-1).to(outputs.device)

    def reduce(self, scores: np.ndarray) -> float:
        """Returns the perplexity, the exponential of the mean score."""
        return float(np.exp(scores.mean()))

    def sequences(self, split: Split) -> Tensor:
        """Returns the token ids of a split, int64 of shape `(sequences, context)`.

        Every sequence starts with the token that the tokenizer itself puts before a text, if any; what is left over at
        the end of the split is not used.

        Raises:
            DataError: If the split is shorter than one sequence.
        """
        tokens, start = self._tokens[split], self._start
        length = self.context - len(start)
        count = min(len(tokens) // length, self._limits[split] or len(tokens))
        if not count:
            raise DataError(
                f"the {split} split holds {len(tokens)} tokens, too few for one sequence of "
                f"task.context={self.context}; give a longer task.text or a smaller task.context"
            )
        return torch.cat([start.expand(count, -1), tokens[: count * length].view(count, length)], 1)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    @cached_property
    def _start(self) -> Tensor:
        first = self._tokenizer.bos_token_id
        return torch.tensor([token for token in self._tokenizer("").input_ids if token == first], dtype=torch.int64)

    @cached_property
    def _training_tokens(self) -> Tensor:
        return encode(self._tokenizer, topic_texts()["train"])

    @cached_property
    def _tokens(self) -> dict[str, Tensor]:
        texts = file_texts(self._text) if self._text else topic_texts()
        return {split: encode(self._tokenizer, texts[split]) for split in SPLITS}


def encode(tokenizer: Any, text: str) -> Tensor:
    """Returns the token ids of a text of any length, int64 of shape `(tokens,)`, without any added around it."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)


def load_tokenizer(path: str) -> Any:
    """Reads the tokenizer of a Hugging Face model from a folder or the local cache.

    Raises:
        DataError: If there is none.
        UnsupportedError: If transformers is not installed.
    """
    return _from_pretrained("AutoTokenizer", path)


def load_model(path: str, dtype: torch.dtype = torch.float32) -> Any:
    """Reads a Hugging Face causal language model from a folder or the local cache, in evaluation mode.

    transformers' `Conv1D` (GPT and GPT-2), a linear layer whose weight is stored transposed, becomes `nn.Linear`.

    Raises:
        DataError: If there is none, or weights are missing.
        UnsupportedError: If transformers is not installed.
    """
    model, loading = _from_pretrained("AutoModelForCausalLM", path, dtype=dtype, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise DataError(
            f"{path} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}; "
            "it must be a complete causal language model"
        )
    model.config.use_cache = False  # keys and values kept for generating text are no output of the network
    _untranspose(model)
    return model.eval()


@contextmanager
def transformers_quietly() -> Iterator[Any]:
    """Yields the package transformers, without its progress bars and the remarks of what it imports.

    Raises:
        UnsupportedError: If it is not installed.
    """
    with quietly("torchao", "torch.utils._pytree"):
        try:
            import transformers
        except ImportError as error:
            raise UnsupportedError(
                "task=text needs transformers; install with `pip install 'bitplan[transformers]'`"
            ) from error
        from transformers.utils import logging

        has_bar = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            yield transformers
        finally:
            if has_bar:
                logging.enable_progress_bar()


def _from_pretrained(kind: str, path: str, **options: Any) -> Any:
    with transformers_quietly() as transformers:
        try:
            return getattr(transformers, kind).from_pretrained(path, local_files_only=True, **options)
        except (OSError, ValueError, SafetensorError) as error:
            raise DataError(
                f"task.path={path} holds no causal language model that can be read: {_first_sentence(error)}; "
                "it must be a folder with config.json, weights and tokenizer, or the id of a model in the local cache, "
                "where `hf download ID` puts it"
            ) from error


def _first_sentence(error: Exception) -> str:
    return str(error).splitlines()[0].partition(". ")[0].rstrip(".")


def _untranspose(model: nn.Module) -> None:
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf, device="meta")
            linear.weight, linear.bias = nn.Parameter(module.weight.detach().T.contiguous()), module.bias
            model.set_submodule(name, linear)
