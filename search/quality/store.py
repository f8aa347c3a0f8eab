"""The evaluation store: scores sample by sample of every policy measured, for all runs that would measure the same.

A store is plain files, and there are no locks: each is written aside and renamed, so that any number of runs may share
a folder, over a network, too, and be killed at any moment. Two that measure one policy at once both do so. What is
measured once is never measured again as long as everything that scores depend on is the same, to the last bit:

TASK/about.json                     model, data, how the task judges, versions, device, what the float network answers
TASK/float/SPLIT.npz                the float network's scores, and how many of them each batch has
TASK/QUANTIZER/about.json           the quantizer's settings, repairs before the search, what a probe policy answers
TASK/QUANTIZER/SPLIT/POLICY.npz     scores of a policy, as far as it was measured, and the seconds that took

`TASK` and `QUANTIZER` are digests of what `about.json` says, `POLICY` is the policy's. Any part may be deleted at any
time. A file that cannot be read counts as missing: a warning says so, and it is measured again and replaced.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
from torch import nn

import search.quantize
from hwmodels import Precision
from search.files import replacing, write_json
from search.policy import Policy
from search.quality.dealing import bits
from search.quantize.settings import QuantizerSettings
from search.quantize.simulate import QuantizedModel, exact_inference
from search.tasks.task import Split, Task

PROBE = Precision.parse("int4/uint8")
"""What every layer gets in the policy whose answers tell one quantized network from another."""

DAMAGES = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)
"""How reading a file ends whose content is not what was written."""


class StoreWarning(UserWarning):
    """A file of the store is damaged: what it held is measured again."""


@dataclass(frozen=True)
class SampleScores:
    """What is known of a policy's scores on a split.

    Attributes:
        values: One per sample in the split's own order, shape `(samples,)`; NaN where not measured.
        measured: Where they were measured; a measured score may be NaN, too.
        seconds: Time that took.
        is_ordered: Whether somebody else has measured them for this very search, which did not know them before.
    """

    values: np.ndarray
    measured: np.ndarray
    seconds: float
    is_ordered: bool = False

    @classmethod
    def none(cls, samples: int) -> SampleScores:
        """Nothing is known yet."""
        return cls(np.full(samples, np.nan), np.zeros(samples, dtype=bool), 0.0)

    def seconds_for(self, places: np.ndarray) -> float:
        """The seconds that measuring these places took, as far as they were: their share of all measured."""
        known = self.measured[places].sum()
        return self.seconds * float(known / self.measured.sum()) if known else 0.0


@dataclass(frozen=True)
class Subject:
    """The network that scores are about, such that somebody else can make the same.

    Attributes:
        stage: `calibrated`, `repaired` before the search, or `tuned` under every policy.
        repair: The repair within the loop.
        digest: Name of its folder in the store: the same name, the same answers to the last bit.
    """

    stage: str
    repair: str
    digest: str


@dataclass(frozen=True)
class Order:
    """A measurement that will be asked for.

    Attributes:
        subject: What is measured.
        policy: The policy.
        split: On which data.
        part: What the store calls that data, measured in this way.
        fidelity: Share of the split that is asked for; what a race will look at is not known before.
        rivals: The policies that it is raced against, best first; None where it is not raced.
    """

    subject: Subject
    policy: Policy
    split: Split
    part: str
    fidelity: float = 1.0
    rivals: tuple[Policy, ...] | None = None

    @property
    def place(self) -> tuple[str, str, str]:
        """What tells its scores from all others of the task."""
        return self.subject.digest, self.part, self.policy.digest


class Helpers(Protocol):
    """Those who measure for a search what it is going to ask for."""

    @property
    def foresight(self) -> int:
        """How many of the measurements that come next are worth ordering; 1 where nobody helps."""

    def order(self, orders: Sequence[Order]) -> None:
        """Has somebody measure, if there is anybody."""

    def delivered(self, place: tuple[str, str, str]) -> bytes | None:
        """Waits for what was ordered; returns its file, or None where nobody has measured it or will."""


class Nobody:
    """No helpers at all."""

    foresight = 1

    def order(self, orders: Sequence[Order]) -> None:
        """Nobody measures."""

    def delivered(self, place: tuple[str, str, str]) -> bytes | None:
        """Nothing was ordered."""
        return None


class EvaluationStore:
    """Scores of policies of one task and network; see `open_store`.

    Attributes:
        folder: Where the files are.
        helpers: Who measures what is ordered.
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        repairs: Any = None,
        stage: str = "calibrated",
        helpers: Helpers | None = None,
    ) -> None:
        """Opens a folder that is about this very task and its network.

        Args:
            folder: Where the files are.
            task: The task.
            repairs: What was done to the network before anything is measured, as plain values.
            stage: What somebody else has to do to make the same network; see `Subject`.
            helpers: Who measures what is ordered.
        """
        self.folder = folder
        self.helpers = helpers or Nobody()
        self._task = task
        self._repairs = repairs
        self._stage = stage
        self._folders: dict[QuantizerSettings, Path] = {}

    def repaired(self, by: Any, stage: str = "repaired") -> EvaluationStore:
        """Returns the same store for the network after repairs, `by` being plain values that name them in full."""
        return EvaluationStore(self.folder, self._task, by, stage, self.helpers)

    @property
    def about(self) -> dict[str, Any]:
        """What the task's scores depend on; see `open_store`."""
        return dict(json.loads((self.folder / "about.json").read_text(encoding="utf-8")))

    def subject(self, simulated: QuantizedModel) -> Subject:
        """Says which network it is that would be measured, as it quantizes now."""
        return Subject(self._stage, simulated.settings.repair, self._network_folder(simulated).name)

    def floats(self, split: Split) -> tuple[np.ndarray, np.ndarray] | None:
        """The float network's scores, shape `(samples,)`, and how many each batch has, if they are known."""
        found = _read(self._float_file(split), "scores", "counts")
        return (found["scores"].astype(np.float64), found["counts"]) if found else None

    def keep_floats(self, split: Split, scores: np.ndarray, counts: np.ndarray) -> None:
        """Keeps what `floats` returns."""
        _write(self._float_file(split), scores=_narrowest(scores), counts=counts)

    def scores(self, simulated: QuantizedModel, policy: Policy, part: str, samples: int) -> SampleScores:
        """What is known of a policy's scores.

        Args:
            simulated: The network that would measure them, as it quantizes now.
            policy: The policy.
            part: The split; or a name for races whose scores are not those of the split's own batches.
            samples: How many scores the whole split has.
        """
        path = self.file(simulated, policy, part)
        file = self.helpers.delivered((path.parent.parent.name, part, policy.digest))
        if file is not None:
            ordered = _scores_in(file, path, samples)
            self.keep(simulated, policy, part, ordered)
        return replace(_scores_in(path, path, samples), is_ordered=file is not None)

    def keep(self, simulated: QuantizedModel, policy: Policy, part: str, scores: SampleScores) -> None:
        """Keeps scores, unless another run has measured more of them meanwhile."""
        path = self.file(simulated, policy, part)
        if _scores_in(path, path, len(scores.values)).measured.sum() < scores.measured.sum():
            values = _narrowest(scores.values[scores.measured])
            _write(path, scores=values, measured=scores.measured, seconds=np.array(scores.seconds))

    def known(self, simulated: QuantizedModel, policy: Policy, part: str, samples: int) -> SampleScores:
        """What is known of a policy's scores already, whatever was ordered."""
        path = self.file(simulated, policy, part)
        return _scores_in(path, path, samples)

    def _float_file(self, split: Split) -> Path:
        return self.folder / "float" / f"{split}.npz"

    def file(self, simulated: QuantizedModel, policy: Policy, part: str) -> Path:
        """Where a policy's scores are kept."""
        return self._network_folder(simulated) / part / f"{policy.digest}.npz"

    def _network_folder(self, simulated: QuantizedModel) -> Path:
        if simulated.settings not in self._folders:
            model = simulated.apply(Policy.uniform(simulated.network, PROBE))
            about = {
                "quantizer": asdict(simulated.settings),
                "repairs": self._repairs,
                "answers": answers_digest(self._task, model),
            }
            self._folders[simulated.settings] = _folder_about(about, self.folder)
        return self._folders[simulated.settings]


def open_store(
    root: Path | None,
    task: Task,
    simulated: QuantizedModel,
    model: str,
    on_none: Callable[[str], None] = lambda reason: None,
    own: Path | None = None,
) -> EvaluationStore | None:
    """Opens the store of a task and its network, or none where nobody can tell what scores depend on.

    They depend on what a network computes and on how its outputs are judged. Code is compared by its text, where it
    can be seen, and by what it does: the bits of outputs and scores on the first batch of the selection split, which
    tell other code that the text does not show, other kernels, and other machines.

    Args:
        root: Folder of the stores of all tasks; None keeps scores in `own` alone.
        task: The task.
        simulated: Its network, calibrated, nothing in it repaired.
        model: Fingerprint of the model as it was given.
        on_none: Called with the reason where there is no store for other runs.
        own: Folder of a store for a single search, for tasks of which nobody can tell how they judge; None gives those
            no store.
    """
    if task.judgement is None:
        on_none(
            f"how task {task.name} judges cannot be told from its source, so its scores are not kept for other runs; "
            "give it a `judgement` to change that"
        )
        root = None
    folder = root or own
    if folder is None:
        return None
    network = simulated.apply({})
    answers = {answers_digest(task, network) for _ in range(2)}
    if len(answers) > 1:
        on_none(f"the network of task {task.name} answers differently every time: its scores are not kept")
        return None
    about = {
        "task": task.name,
        "model": model,
        "data": task.fingerprint,
        "judgement": task.judgement,
        "versions": {name: version(name) for name in ("bitplan", "torch")},
        "quantizer_code": _quantizer_code(),
        "device": next(network.parameters()).device.type,
        "answers": answers.pop(),
    }
    return EvaluationStore(_folder_about(about, folder), task)


def answers_digest(task: Task, model: nn.Module) -> str:
    """SHA-256 over the outputs and scores of the first batch of the selection split, to the last bit."""
    batch = next(iter(task.batches("selection")))
    digest = hashlib.sha256()
    with exact_inference():
        outputs = task.outputs(model, batch)
        for tensor in (outputs, task.score(outputs, batch)):
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(bits(tensor.reshape(1, -1)).tobytes())
    return digest.hexdigest()


def _quantizer_code() -> str:
    """SHA-256 over the source of the simulation, which changes more often than the package's version does."""
    digest = hashlib.sha256()
    for file in sorted(Path(search.quantize.__path__[0]).rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _folder_about(about: Mapping[str, Any], parent: Path) -> Path:
    """The folder inside `parent` that is named by what it is about, and says so."""
    folder = parent / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    if not (folder / "about.json").is_file():
        write_json(folder / "about.json", about)
    return folder


def _narrowest(values: np.ndarray) -> np.ndarray:
    """The same values in the smallest type that holds each of them to the last bit."""
    with np.errstate(over="ignore"):
        for kind in (np.bool_, np.float32):
            narrowed = values.astype(kind)
            if narrowed.astype(np.float64).tobytes() == values.tobytes():
                return narrowed
    return values


def _write(path: Path, **arrays: np.ndarray) -> None:
    with replacing(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, **cast("dict[str, Any]", arrays))


def _scores_in(content: Path | bytes, path: Path, samples: int) -> SampleScores:
    """The scores in a file, or in one that somebody sent and that will lie at `path`; none where there are none."""
    found = _read(path, "scores", "measured", "seconds", content=content if isinstance(content, bytes) else None)
    if not found:
        return SampleScores.none(samples)
    values, measured = np.full(samples, np.nan), found["measured"]
    try:
        values[measured] = found["scores"]
    except (IndexError, ValueError) as error:
        _warn(path, error)
        return SampleScores.none(samples)
    return SampleScores(values, measured, float(found["seconds"]))


def _read(path: Path, *names: str, content: bytes | None = None) -> dict[str, np.ndarray] | None:
    """The arrays in a file, or in its content; None where it is missing, or damaged."""
    try:
        opened: BinaryIO = path.open("rb") if content is None else BytesIO(content)
        with opened as file, np.load(file) as arrays:
            return {name: arrays[name] for name in names}
    except FileNotFoundError:
        return None
    except DAMAGES as error:
        _warn(path, error)
        return None


def _warn(path: Path, error: Exception) -> None:
    warnings.warn(f"{path} is damaged ({error}); what it held is measured again", StoreWarning, stacklevel=2)
