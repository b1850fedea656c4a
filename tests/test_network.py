"""Tests of the network: its initial weights, what is in its state dict, FSR's place, the skips."""

import json

import pytest
import torch
from torch import nn

import eval as scoring
import train
from config import BadInput, load_config
from scoring.norms import batch_norms, one_by_one, own_network
from tests.helpers import run_here
from unet import UNet


def test_unet_proper_is_the_same_for_one_seed():
    states = []
    for fsr, levels in (("none", []), ("adaptive", [0, 1, 2]), ("global", [1])):
        torch.manual_seed(5)
        states.append(UNet(4, fsr=fsr, levels=levels).state_dict())
    bare = states[0]
    assert not any(name.startswith(("fsr", "fusion")) for name in bare)
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in bare.items())


def test_fsr_stands_behind_encoder_blocks_2_to_4():
    """A layer's shift moves its own map by just that, and no map above it."""
    model, x = UNet(2, fsr="global", levels=[]), torch.rand(2, 3, 32, 32)
    before = model.features(x)[1]["encoder"]
    for k in (1, 2, 3):
        model.fsr[k - 1].shift.data += 5
        after = model.features(x)[1]["encoder"]
        torch.testing.assert_close(after[k], before[k] + 5)
        assert all(torch.equal(after[i], before[i]) for i in range(k))
        model.fsr[k - 1].shift.data -= 5


def test_gradients_pass_through_the_skips():
    model = UNet(2, levels=[])
    for up in model.up:
        up.weight.data.zero_()  # so that the skips alone lead down
    model(torch.rand(2, 3, 32, 32)).square().sum().backward()
    assert model.encoder[0][0].weight.grad.abs().max() > 0


def test_state_dict_holds_no_statistics():
    """Nor weights of a norm layer, which has no affine map."""
    model = UNet(4, levels=[])
    convolutions, up, head, of_fsr = 18, 4, 1, 3
    model.features(torch.rand(2, 3, 32, 32))
    weights = sum(name.endswith(".weight") for name in model.state_dict())
    assert weights == convolutions + up + head + of_fsr
    assert model.state_dict().keys() == {name for name, _ in model.named_parameters()}
    assert not any("running" in name or "num_batches" in name for name in model.state_dict())


def test_group_norm_equals_the_formula_and_needs_no_batch():
    """(x - mean) / sqrt(variance + 1e-5) over 8 groups of one image's channels; nothing to send."""
    torch.manual_seed(0)
    model, x = UNet(8, levels=[], norm="group"), torch.rand(2, 3, 32, 32)
    z = model.encoder[0][0](x).double()
    groups = z.reshape(2, 8, -1)
    sigma = (groups.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    wanted = (groups - groups.mean(2, keepdim=True)) / sigma
    # torch rounds more where maps lie channels last
    for layout, atol in ((torch.contiguous_format, 2e-6), (torch.channels_last, 3e-5)):
        found = model.encoder[0][1](z.float().contiguous(memory_format=layout)).double()
        torch.testing.assert_close(found, wanted.reshape(z.shape), rtol=0, atol=atol)
    assert sum(isinstance(layer, nn.GroupNorm) for layer in model.modules()) == 18
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    assert model.state_dict().keys() == UNet(8, levels=[]).state_dict().keys()
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=0, atol=1e-5)


def test_images_together_are_normalised_one_by_one():
    """Also by a batch norm with an affine map, in either order in memory."""
    torch.manual_seed(0)
    model = own_network(UNet(4, 3, "adaptive", [], nn.BatchNorm2d), {})
    for norm in batch_norms(model).values():
        norm.weight.data, norm.bias.data = torch.rand_like(norm.weight) + 0.5, torch.randn_like(norm.bias)
    x = torch.rand(3, 3, 32, 32) * torch.tensor([1, 5, 0.1]).view(3, 1, 1, 1)
    with torch.no_grad():
        alone, together = torch.cat([model(one) for one in x.split(1)]), one_by_one(model)
        for order in (torch.contiguous_format, torch.channels_last):
            found = together(x.contiguous(memory_format=order))
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_group_norm_has_no_test_stats(workplace, monkeypatch, capsys):
    """The run writes, reads and scores `none`; setting the key, or none with batch norms, is an error."""
    start = {"task": "nuclei", "data": "demo", "out": "o"}
    assert load_config(start | {"norm": "group"}).test_stats is None
    # the file's goes with its norm
    assert load_config(start | {"test_stats": "site"}, ["norm=group"]).test_stats is None
    with pytest.raises(BadInput, match="test_stats: "):
        load_config(start, ["norm=group", "test_stats=case"])
    for wrong in ({"norm": "group", "test_stats": "case"}, {"test_stats": "none"}):
        with pytest.raises(BadInput, match="test_stats: "):
            load_config(start | wrong)
    code, out, _ = run_here(monkeypatch, capsys, train, workplace, "--config", "c.yaml", "norm=group",
                            "test_stats=none", "width=8", "out=run")
    assert code == 0 and "no batch-norm statistics" in out
    cases = (workplace / "run" / "cases.csv").read_bytes()
    assert cases.splitlines()[1].endswith(b",none")
    code, out, _ = run_here(monkeypatch, capsys, scoring, workplace, "--run", "run")
    assert code == 0 and (workplace / "run" / "cases.csv").read_bytes() == cases
    result = json.loads((workplace / "run" / "result_eval.json").read_text())
    assert result["definitions"]["test_stats"] == "none: the network has no batch norm"
    code, _, err = run_here(monkeypatch, capsys, scoring, workplace, "--run", "run", "test_stats=case")
    assert code == 2 and err.startswith("error: test_stats: means nothing with norm: group")
