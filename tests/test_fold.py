"""Folding batch norm, against the formula, the unfolded model, and structures that must stay as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from search.errors import DataError, UnsupportedError
from search.quantize.fold import Fold, fold_batch_norm
from search.tasks.networks import digits_net, mobilenetv2, resnet20


def trained(model: nn.Module) -> nn.Module:
    """Gives every batch norm statistics and an affine map of its own."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.2, 3, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, -1, 2, generator=generator)
                nn.init.normal_(module.bias, generator=generator)
    return model


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


class Of(nn.Module):
    """A model with parts of any kind and any forward."""

    def __init__(self, body, **parts: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)
        trained(self)

    def forward(self, x):
        return self.body(self, x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_the_formula_channel_by_channel(bias, affine):
    conv, norm = nn.Conv2d(2, 3, 2, bias=bias), nn.BatchNorm2d(3, affine=affine, eps=0.1)
    model, folds = fold_batch_norm(trained(nn.Sequential(conv, norm)), torch.randn(2, 2, 4, 4))
    assert folds == (Fold("0", "1"),)
    for channel in range(3):
        gamma, beta = (norm.weight[channel], norm.bias[channel]) if affine else (1, 0)
        gain = gamma / (norm.running_var[channel] + 0.1) ** 0.5
        shift = conv.bias[channel] if bias else 0
        torch.testing.assert_close(model[0].weight[channel], conv.weight[channel] * gain)
        torch.testing.assert_close(model[0].bias[channel], (shift - norm.running_mean[channel]) * gain + beta)


@pytest.mark.parametrize("make", [digits_net, resnet20, mobilenetv2])
def test_whole_networks_compute_the_same(make):
    torch.manual_seed(0)
    model, example = trained(make()), torch.randn(2, 1, 28, 28)
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    folded, folds = fold_batch_norm(model, example)
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert [fold.norm for fold in folds] == norms
    assert not any(isinstance(module, nn.BatchNorm2d) or module.training for module in folded.modules())
    fresh = torch.randn(4, 1, 28, 28)
    expected, found = outputs(model, fresh), outputs(folded, fresh)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    before = {value.data_ptr() for value in model.state_dict().values()}
    assert not before & {value.data_ptr() for value in folded.state_dict().values()}


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 8)),
        (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 4, 4, 4)),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4), (2, 4, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 8)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4), (2, 4, 5, 5)),
        (nn.ConvTranspose3d(2, 4, 2, groups=2), nn.BatchNorm3d(4), (2, 2, 3, 3, 3)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4)),
        (nn.Linear(4, 6, bias=False), nn.SyncBatchNorm(6), (3, 4)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_kind_of_layer(layer, norm, shape, dtype):
    torch.manual_seed(0)
    model = trained(nn.Sequential(layer, norm, nn.ReLU())).to(dtype)
    folded, folds = fold_batch_norm(model, torch.randn(shape, dtype=dtype))
    assert folds == (("0", "1"),)
    fresh = torch.randn(shape, dtype=dtype)
    torch.testing.assert_close(outputs(folded, fresh), outputs(model, fresh))
    assert folded[0].weight.dtype == folded[0].bias.dtype == dtype


def test_views_between_layer_and_norm_do_not_matter():
    model = Of(lambda m, x: m.norm(m.fc(x).transpose(1, 2).contiguous()), fc=nn.Linear(4, 5), norm=nn.BatchNorm1d(5))
    folded, folds = fold_batch_norm(model, torch.randn(2, 3, 4))
    assert folds == (("fc", "norm"),)
    fresh = torch.randn(2, 3, 4)
    torch.testing.assert_close(outputs(folded, fresh), outputs(model, fresh))


def two_readers(model, x):
    x = model.conv(x)
    return model.norm(x) + x


def returned_too(model, x):
    x = model.conv(x)
    return model.norm(x), x


def called_twice(model, x):
    return model.norm(model.conv(x)) + model.norm(model.other(x))


def conv_called_twice(model, x):
    return model.norm(model.conv(x)) + model.other_norm(model.conv(x + 1))


class Activated(nn.BatchNorm2d):
    """A norm with an activation inside, as image model libraries have."""

    def forward(self, x):
        return F.relu(super().forward(x))


class Standardized(nn.Conv2d):
    """A convolution that normalizes its weight in every call, so that scaling it has no effect."""

    def forward(self, x):
        weight = self.weight / self.weight.square().sum((1, 2, 3), keepdim=True).sqrt()
        return F.conv2d(x, weight, self.bias, padding=1)


def tied() -> nn.Module:
    model = Of(called_separately, conv=conv(), other=conv(), norm=nn.BatchNorm2d(2), other_norm=nn.BatchNorm2d(2))
    model.other.weight = model.conv.weight
    return model


def called_separately(model, x):
    return model.norm(model.conv(x)) * model.other_norm(model.other(x))


def conv() -> nn.Conv2d:
    return nn.Conv2d(2, 2, 3, padding=1)


def plain(model, x):
    return model.norm(model.conv(x))


@pytest.mark.parametrize(
    "model",
    [
        Of(two_readers, conv=conv(), norm=nn.BatchNorm2d(2)),
        Of(returned_too, conv=conv(), norm=nn.BatchNorm2d(2)),
        Of(called_twice, conv=conv(), other=conv(), norm=nn.BatchNorm2d(2)),
        Of(conv_called_twice, conv=conv(), norm=nn.BatchNorm2d(2), other_norm=nn.BatchNorm2d(2)),
        tied(),
        Of(plain, conv=conv(), norm=nn.BatchNorm2d(2, track_running_stats=False)),
        Of(plain, conv=conv(), norm=Activated(2)),
        Of(plain, conv=Standardized(2, 2, 3), norm=nn.BatchNorm2d(2)),
        Of(lambda m, x: m.norm(F.relu(m.conv(x))), conv=conv(), norm=nn.BatchNorm2d(2)),
        Of(lambda m, x: m.conv(m.norm(x)), conv=conv(), norm=nn.BatchNorm2d(2)),
        Of(lambda m, x: m.norm(m.conv(x)) * m.norm.weight.sum(), conv=conv(), norm=nn.BatchNorm2d(2)),
        Of(lambda m, x: m.norm(m.conv(x)) + m.conv.weight.sum(), conv=conv(), norm=nn.BatchNorm2d(2)),
        # The norm's channels are the second axis, here of equal length, while the layer's are the last.
        Of(lambda m, x: m.norm(m.fc(x[:, :, 0])), fc=nn.Linear(4, 2), norm=nn.BatchNorm1d(2)),
        Of(lambda m, x: m.norm(m.fc(x)), fc=nn.Linear(4, 2), norm=nn.BatchNorm2d(2)),
    ],
    ids=lambda model: "",
)
def test_what_must_not_be_folded_is_not(model):
    torch.manual_seed(0)
    folded, folds = fold_batch_norm(model, torch.randn(3, 2, 2, 4))
    assert folds == ()
    fresh = torch.randn(3, 2, 2, 4)
    torch.testing.assert_close(outputs(folded, fresh), outputs(model, fresh), rtol=0, atol=0)


def test_one_wrong_fold_does_not_stop_the_others():
    parts = {"fc": nn.Linear(4, 2), "norm": nn.BatchNorm1d(2), "head": nn.Linear(2, 3), "head_norm": nn.BatchNorm1d(3)}
    model = Of(lambda m, x: m.head_norm(m.head(m.norm(m.fc(x)).mean(1))), **parts)
    folded, folds = fold_batch_norm(model, torch.randn(3, 2, 4))
    assert folds == (("head", "head_norm"),)
    assert isinstance(folded.norm, nn.BatchNorm1d)
    fresh = torch.randn(3, 2, 4)
    torch.testing.assert_close(outputs(folded, fresh), outputs(model, fresh))


def test_a_fold_is_judged_at_the_norm_even_where_the_output_hides_it():
    model = Of(lambda m, x: m.norm(m.fc(x)).sign() * 0 + x[..., :2], fc=nn.Linear(4, 2), norm=nn.BatchNorm1d(2))
    assert fold_batch_norm(model, torch.randn(3, 2, 4)).folds == ()


def test_a_norm_with_two_names_is_replaced_under_both():
    model = Of(lambda m, x: m.second(m.conv(x)), conv=conv(), norm=nn.BatchNorm2d(2))
    model.second = model.norm
    folded, folds = fold_batch_norm(model, torch.randn(1, 2, 4, 4))
    assert folds == (("conv", "norm"),)
    assert isinstance(folded.second, nn.Identity)


def test_a_model_that_cannot_be_copied():
    model = nn.Sequential(nn.Linear(2, 2))
    model.kept = model[0](torch.zeros(1, 2))  # a tensor with a history
    with pytest.raises(UnsupportedError, match="Sequential cannot be copied"):
        fold_batch_norm(model, torch.zeros(1, 2))


def test_an_example_that_does_not_fit():
    with pytest.raises(DataError, match="does not run on the example input"):
        fold_batch_norm(nn.Sequential(conv(), nn.BatchNorm2d(2)), torch.zeros(1, 3, 4, 4))


def test_an_all_zero_example_is_enough():
    model = trained(digits_net())
    assert len(fold_batch_norm(model, torch.zeros(1, 1, 8, 8)).folds) == 9


def test_noise_uncovers_what_an_all_zero_example_hides():
    model = Of(plain, conv=Standardized(2, 2, 3, bias=False), norm=nn.BatchNorm2d(2))
    assert fold_batch_norm(model, torch.zeros(1, 2, 4, 4)).folds == ()
