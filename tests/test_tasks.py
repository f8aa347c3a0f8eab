"""Built-in tasks: their splits, the files they read, and training that survives being killed."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from search.errors import ConfigError, DataError
from search.tasks import training
from search.tasks.classification import Classification, stratified_splits
from search.tasks.digits import SIZES, Digits
from search.tasks.fashion_mnist import PIXEL_MEAN, PIXEL_STD, FashionMNIST, read_idx, read_images, read_labels
from search.tasks.function import FunctionTask
from search.tasks.networks import digits_net, mobilenetv2, resnet20
from search.tasks.task import call, main_output, tensors_in
from search.tasks.training import Recipe, augment, train


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def test_digits_splits(digits: Digits) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    everything = sorted(image.tobytes() for image in (data.images / 16).astype(np.float32))
    found = []
    for split, size in SIZES.items():
        images, labels = digits.load(split)
        assert images.shape == (size, 1, 8, 8)
        assert images.dtype == torch.float32
        assert 0 <= images.min() < images.max() <= 1
        share = np.bincount(data.target) / 1797 * size
        assert np.abs(np.bincount(labels) - share).max() <= 1, "classes in proportion"
        found += [image.numpy().tobytes() for image in images]
    assert sorted(found) == everything, "each image exactly once"


def test_digits_network_is_trained(digits: Digits) -> None:
    accuracy = training.top1(digits.model, digits)
    assert accuracy > 0.95
    assert digits.example_input.shape == (2, 1, 8, 8)
    assert not digits.model.training


def test_digits_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no checkpoint at .*none.safetensors; train it with `python -m"):
        _ = Digits(tmp_path / "none.safetensors").model


@pytest.mark.parametrize("sizes", [{"a": 10, "b": 40}, {"a": 20, "b": 10, "c": 20}])
def test_stratified_splits(sizes: dict[str, int]) -> None:
    labels = torch.arange(50) % 5
    splits = stratified_splits(labels, sizes, seed=3)
    assert {name: len(index) for name, index in splits.items()} == sizes
    assert torch.equal(torch.cat(list(splits.values())).sort().values, torch.arange(50))
    for name, index in splits.items():
        assert labels[index].bincount().tolist() == [sizes[name] // 5] * 5
    again = stratified_splits(labels, sizes, seed=3)
    assert all(torch.equal(again[name], splits[name]) for name in sizes)


def idx(values: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["raw", "gz"])
@pytest.mark.parametrize("shape", [(7,), (3, 28, 28)])
def test_idx_files_come_back(tmp_path: Path, pack: Callable, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape)
    (tmp_path / ("x.gz" if pack is gzip.compress else "x")).write_bytes(pack(idx(values)))
    found = read_idx(tmp_path, "x")
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), values)


GOOD = idx(np.arange(12).reshape(3, 4))


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        GOOD[:3],
        GOOD[:9],
        GOOD[:-1],
        GOOD + b"\0",
        b"\x01" + GOOD[1:],
        GOOD[:2] + b"\x0d" + GOOD[3:],
        GOOD[:3] + b"\x03" + GOOD[4:],
    ],
)
def test_damaged_idx_files(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "x").write_bytes(damaged)
    with pytest.raises(DataError, match=r"x is not a whole IDX file of unsigned bytes .*fetch it again"):
        read_idx(tmp_path, "x")


def test_damaged_gzip_files(tmp_path: Path) -> None:
    whole = gzip.compress(idx(np.arange(200).reshape(10, 20)), mtime=0)
    path = tmp_path / "x.gz"
    for position in range(len(whole)):
        path.write_bytes(whole[:position])
        with pytest.raises(DataError, match=r"x.gz is"):
            read_idx(tmp_path, "x")
        flipped = bytearray(whole)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        with suppress(DataError):  # anything else would be a crash; some bits of the header mean nothing
            assert torch.equal(read_idx(tmp_path, "x").view(-1), torch.arange(200).to(torch.uint8))


def test_missing_files_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither train-images-idx3-ubyte nor .*apt-get install.*task\.root=DIR"):
        FashionMNIST(root=tmp_path).load("calibration")


@pytest.fixture(scope="module")
def fashion_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the right form: 60 training images, and the 10,000 test images that the splits need."""
    root, rng = tmp_path_factory.mktemp("fashion"), np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 10_000)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images), 1))
        (root / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))
    return root


def test_fashion_mnist_splits(fashion_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASHION_MNIST_ROOT", str(fashion_root))
    task = FashionMNIST(calibration_samples=20)
    test_images, train_images = read_images(fashion_root, "t10k"), read_images(fashion_root, "train")
    assert torch.equal(task.load("train")[0], train_images)
    assert read_labels(fashion_root, "train").tolist() == [i % 10 for i in range(60)]
    raw = read_idx(fashion_root, "train-images-idx3-ubyte").float() / 255
    torch.testing.assert_close(train_images[:, 0] * PIXEL_STD + PIXEL_MEAN, raw)
    sizes = {"calibration": 20, "selection": 5000, "report": 5000}
    keys = {}
    for split, size in sizes.items():
        images, labels = task.load(split)
        assert images.shape == (size, 1, 28, 28)
        assert labels.bincount().tolist() == [size // 10] * 10
        keys[split] = {image.numpy().tobytes() for image in images}
    assert keys["calibration"] < {image.numpy().tobytes() for image in train_images}
    assert keys["selection"] | keys["report"] == {image.numpy().tobytes() for image in test_images}
    assert not keys["selection"] & keys["report"]


def test_fashion_mnist_settings() -> None:
    assert FashionMNIST("mobilenetv2").name == "fashion_mnist_mobilenetv2"
    with pytest.raises(ConfigError, match=r"task\.model=resnet is unknown.*did you mean 'resnet20'.*mobilenetv2"):
        FashionMNIST("resnet")
    with pytest.raises(ConfigError, match=r"task\.calibration_samples=5 must be from 10 to 59999"):
        FashionMNIST(calibration_samples=5)


@pytest.mark.parametrize(
    ("make", "size", "parameters"),
    [(digits_net, 8, (15e3, 25e3)), (resnet20, 28, (265e3, 280e3)), (mobilenetv2, 28, (2e5, 2.6e5))],
)
def test_networks(make: Callable[[], nn.Module], size: int, parameters: tuple[float, float]) -> None:
    network = make().eval()
    assert network(torch.randn(2, 1, size, size)).shape == (2, 10)
    assert parameters[0] < sum(parameter.numel() for parameter in network.parameters()) < parameters[1]


class Blobs(Classification):
    """Ten images a class, told apart by where they are bright."""

    name, batch_size = "blobs", 16

    def load(self, split):
        generator = torch.Generator().manual_seed(len(split))
        labels = torch.arange(40) % 4
        images = torch.randn(40, 1, 4, 4, generator=generator) * 0.3
        images[torch.arange(40), 0, labels, labels] += 2
        return images, labels

    def network(self):
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4))


RECIPE = Recipe(epochs=6, batch_size=16, peak_rate=0.1, mirror=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("training") / "blobs.safetensors"
    lines: list[str] = []
    model = train(Blobs(), RECIPE, out, seed=5, log=lines.append)
    assert len(lines) == 6
    assert not model.training
    assert [path.name for path in out.parent.iterdir()] == ["blobs.safetensors"]
    weights = load_file(out)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    return weights


class Killed(BaseException):
    pass


@pytest.mark.parametrize("epoch", [1, 3, 6])
@pytest.mark.parametrize("moment", ["after an epoch", "within an epoch"])
def test_training_killed_and_resumed_ends_with_the_same_weights(
    undisturbed, tmp_path: Path, epoch: int, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, steps = tmp_path / "blobs.safetensors", []

    def count(*_: object) -> None:
        steps.append(1)
        if len(steps) == epoch:
            raise Killed

    def augment_until(*given):
        if len(steps) + 1 == epoch:
            calls.append(1)
            if len(calls) == 2:  # the second batch of the epoch
                raise Killed
        return augment(*given)

    calls: list[int] = []
    with monkeypatch.context() as patched:
        log = count
        if moment == "within an epoch":
            patched.setattr(training, "augment", augment_until)
            log = steps.append
        with pytest.raises(Killed):
            train(Blobs(), RECIPE, out, seed=5, log=log)
    assert not out.exists()
    torch.rand(7)  # whatever the global random state is by then
    train(Blobs(), RECIPE, out, seed=5, log=lambda _: None)
    weights = load_file(out)
    assert weights.keys() == undisturbed.keys()
    assert all(torch.equal(weights[name], undisturbed[name]) for name in weights)


def test_training_learns_and_depends_on_its_seed(undisturbed, tmp_path: Path) -> None:
    task = Blobs()
    other = train(task, RECIPE, tmp_path / "other.safetensors", seed=6, log=lambda _: None)
    assert not torch.equal(other[0].weight, undisturbed["0.weight"])
    recipe = Recipe(epochs=12, batch_size=8, peak_rate=0.1, mirror=False, shift=0)
    assert training.top1(train(task, recipe, tmp_path / "long.safetensors", log=lambda _: None), task) > 0.9


def test_augmentation_shifts_and_mirrors() -> None:
    image = torch.zeros(200, 1, 5, 5)
    image[:, 0, 2, 3] = 1
    for mirror, columns in ((False, {2, 3, 4}), (True, {0, 1, 2, 3, 4})):
        recipe = Recipe(1, 1, 0.1, mirror=mirror)
        found = augment(image, recipe, torch.Generator().manual_seed(0))
        assert found.shape == image.shape
        positions = found[:, 0].nonzero()
        assert set(positions[:, 1].tolist()) == {1, 2, 3}
        assert set(positions[:, 2].tolist()) == columns
    still = Recipe(1, 1, 0.1, mirror=False, shift=0)
    assert torch.equal(augment(image, still, torch.Generator()), image)


def test_unknown_network_to_train(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["training", "mnist"])
    with pytest.raises(SystemExit):
        training.main()
    assert "digits" in capsys.readouterr().err


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


def test_main_output() -> None:
    x, ids = torch.randn(2, 3), torch.tensor([1, 2])
    assert main_output(x) is x
    assert main_output({"logits": x, "hidden": x + 1}) is x
    assert main_output(Output(x, x + 1)) is x
    assert main_output((x, ids)) is x
    assert main_output([{"only": x}]) is x
    with pytest.raises(TypeError, match=r"returns dict with keys \['a', 'b'\] holding 2 .*override `Task.outputs`"):
        main_output({"a": x, "b": x})


def test_tensors_in_and_call() -> None:
    x, y = torch.ones(1), torch.zeros(1)
    assert [t.item() for t in tensors_in({"a": [x, (y, None)], "b": Output(x, y), "c": "text", "d": 3})] == [1, 0, 1, 0]
    assert call(lambda a: a + 1, x) == 2
    assert call(lambda a, b: a - b, (x, y)) == 1
    assert call(lambda a, b: a - b, {"b": x, "a": y}) == -1


def make_function_task(**options) -> FunctionTask:
    batch = torch.randn(4, 3)
    return FunctionTask(nn.Linear(3, 2), batch, [batch], lambda m, s: {"selection": 1.0}.get(s, 2.0), **options)


def test_function_task() -> None:
    task = make_function_task(metric="error", higher_is_better=False, divergence="squared_error")
    assert [float(task.outputs(task.model, batch)) for batch in task.batches("report")] == [2.0]
    p, q = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    assert torch.allclose(task.divergence(p, q), (p - q).double().square().mean((1, 2)))
    assert make_function_task().divergence(p, q).shape == (4,)
    with pytest.raises(ConfigError, match=r"divergence='kld' is unknown.*did you mean 'kl'"):
        make_function_task(divergence="kld")
    with pytest.raises(ConfigError, match="`calibration` is empty"):
        FunctionTask(task.model, None, [], lambda m, s: 0.0)
