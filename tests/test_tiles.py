"""Pictures at their own size: crops for training, overlapping tiles for predictions, no seam."""


import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import predict
import train
from config import BadInput, load_config
from datasets import Site, load_sites, seeded
from methods.find import method_and_model
from rounds.reading import load_checkpoint
from scoring import tiled
from scoring.evaluate import logits_of, run_alone
from scoring.evaluate import predict as classes
from scoring.norm_statistics import norm_statistics, statistics_of
from scoring.norms import batch_norms, own_network
from scoring.pictures import outlined_tiles
from sites import images, tiles
from sites.layouts import Entry
from sites.readers import Sample, read_sample
from test_fedbcs import tiny_config, write_nuclei
from tests.helpers import CPU, a_config, a_model, assert_same, rows_of, without_seconds

S = 32


def picture(H, W, seed=0, tile=S, name="p.png"):
    """A Sample at its own size, some of it bright, with a mask of these parts."""
    rng = np.random.default_rng(seed)
    mask = (np.add.outer(np.arange(H), 2 * np.arange(W)) // 40 % 3 == 0).astype(np.uint8)[None]
    pixels = (rng.integers(0, 120, (1, 3, H, W)) + 100 * mask).astype(np.uint8)
    return Sample("a", name, name, torch.from_numpy(pixels), torch.from_numpy(mask), mask, (1., 1., 1.), tile=tile)


def part_of(sample, rows, columns):
    """The part of a picture that lies in these rows and columns, as a picture of its own."""
    return sample._replace(images=sample.images[..., rows, columns], masks=sample.masks[..., rows, columns],
                           truth=sample.truth[..., rows, columns])


def whole(sample, config, model):
    """The logits (C, H, W) of a picture, its strips under each other."""
    return torch.cat(list(logits_of(model, sample, config, CPU)), 2)[0]


def settings(**keys):
    return a_config(tiles=True, image_size=S, **keys)


NORMS = {"group": {"norm": "group"}, "site": {"test_stats": "site"}, "adaptive": {"norm": "group", "fsr": "adaptive"}}


@pytest.mark.parametrize("norm", NORMS)
def test_a_picture_cut_in_two_differs_near_the_cut_alone(norm):
    """Cut at a multiple of image_size / 2, what is as far from the cut as that is the same, in either part;
    nearer it differs. Rows and columns alike."""
    config, near = settings(width=8, **NORMS[norm]), S // 2
    model, sample = a_model(config), picture(112, 144)
    if norm == "site":
        model = own_network(model, norm_statistics(model, Site("a", [sample], [], []), config, CPU))
    logits = whole(sample, config, model)
    for cut in (48, 64):
        for axis in (0, 1):
            places = [(slice(0, cut), slice(None)), (slice(cut, None), slice(None))]
            for first, place in zip((True, False), places):
                rows, columns = place if axis == 0 else place[::-1]
                own, here = whole(part_of(sample, rows, columns), config, model), logits[:, rows, columns]
                far = slice(0, cut - near) if first else slice(near, None)
                far, close = [(slice(None),) * (axis + 1) + (at,) for at in (far, slice(-near, None) if first
                                                                              else slice(0, near))]
                torch.testing.assert_close(own[far], here[far], atol=1e-5, rtol=0)
                assert (own[close] - here[close]).abs().max() > 1e-2
    own = whole(part_of(sample, slice(None), slice(0, 57)), config, model)  # cut elsewhere
    torch.testing.assert_close(own[..., :57 - S], logits[..., :57 - S], atol=1e-5, rtol=0)
    assert (own[..., 57 - S:57] - logits[..., 57 - S:57]).abs().max() > 1e-2


def test_no_seam_shows():
    """Where tiles begin and end a prediction changes from pixel to pixel no more than elsewhere."""
    config, sample = settings(width=8, norm="group"), picture(96, 160)
    sample.images[:] = (torch.arange(160) + torch.arange(96)[:, None]) // 2 + sample.images // 16
    model = a_model(config)

    def at_lines(logits, lines):
        steps = (logits[1, :, 1:] - logits[1, :, :-1]).abs().mean(0)
        return steps[lines].mean() / steps.mean()
    assert at_lines(whole(sample, config, model), slice(S // 2 - 1, None, S // 2)) < 1.1
    apart = [whole(part_of(sample, slice(None), slice(i, i + S)), config, model) for i in range(0, 160, S)]
    assert at_lines(torch.cat(apart, 2), slice(S - 1, None, S)) > 1.5  # as tiles side by side would have them


def test_one_tile_is_the_network_itself_and_strips_come_one_by_one():
    """A picture of image_size passes once; of a larger one no part is higher than image_size."""
    config = settings(norm="group", width=8)
    model, sample = a_model(config), picture(S, S)
    torch.testing.assert_close(whole(sample, config, model)[None],
                               run_alone(model, sample.images / 255, config, CPU), atol=1e-6, rtol=0)
    parts = list(logits_of(model, picture(100, 70), config, CPU))
    assert [part.shape[2] for part in parts] == [16] * 4 + [4] + [32]
    assert {part.shape[3] for part in parts} == {70}


@pytest.mark.parametrize(("H", "W"), [(20, 50), (50, 9), (5, 7)])
def test_a_picture_smaller_than_a_tile_is_mirrored_and_its_own_pixels_alone_count(H, W):
    config, sample = settings(norm="group", width=8), picture(H, W)
    image, mask = tiles.crop(sample, (0, 0))
    padding = ((0, max(S - H, 0)), (0, max(S - W, 0)))
    assert torch.equal(mask, torch.from_numpy(np.pad(sample.truth[0], padding, "symmetric")[:S, :S]))
    expected = np.pad(sample.images[0].numpy(), ((0, 0), *padding), "symmetric")[:, :S, :S]
    assert (image * 255).round().byte().equal(torch.from_numpy(expected))
    assert classes(a_model(config), sample, config, CPU).shape == (1, H, W)


def test_random_crops_cover_a_picture_once_and_repeat():
    """ceil(H / S) ceil(W / S) of each picture an epoch; another epoch has others, the same one the same."""
    config, sample = settings(batch_size=4), picture(70, 33)
    site = Site("a", [sample, picture(S, S, name="q.png")], [], [])
    assert len(site.train_slices) == 3 * 2 + 1 and site.steps(config) == 2
    def epoch(t, e):
        return torch.cat([x for x, _ in site.batches(config, t, e, CPU)])
    first = epoch(1, 1)
    assert first.shape == (7, 3, S, S) and first.dtype == torch.float32 and first.max() <= 1
    assert torch.equal(first, epoch(1, 1)) and not torch.equal(first, epoch(1, 2))
    places, order = set(), seeded(0)
    for _ in range(300):
        image, mask = tiles.crop(sample, (0, 0), order)
        match = (sample.images[0].unfold(1, S, 1).unfold(2, S, 1) == (image * 255).round().byte()[
            :, None, None]).all(-1).all(-1).all(0).nonzero()
        places.add(tuple(match[0].tolist()))
        assert torch.equal(mask, tiles.window(sample.masks[0], match[0].tolist(), S))
    assert len(places) > 70 and {a for a, _ in places} >= {0, 38} and {b for _, b in places} == {0, 1}


def test_the_statistics_of_a_case_are_those_of_its_tiles():
    """All tiles of a picture by the same ones: of a blank part no tile is normalised by itself."""
    config = settings(test_stats="case", batch_size=4)
    model, sample = own_network(a_model(config), {}), picture(2 * S, 2 * S)
    sample.images[..., S:, S:] = 7
    own = statistics_of(model, [tiles.crop(sample, place)[0] for place in tiles.places(sample)], config, CPU)
    found = batch_norms(tiled.normalised(model, sample, config, CPU))
    for name, value in own.items():
        layer, kind = name.rsplit(".", 1)
        torch.testing.assert_close(getattr(found[layer], kind), value, atol=1e-5, rtol=1e-4)
    alone = run_alone(model, sample.images[..., S:, S:] / 255, config, CPU)
    assert (whole(sample, config, model)[:, -4:, -4:] - alone[0, :, -4:, -4:]).abs().max() > 1e-2
    site = Site("a", [sample], [], [])
    assert norm_statistics(model, site, config, CPU).keys() == own.keys()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "I;16", "F"])
def test_pixels_are_those_of_the_usual_reader(tmp_path, mode):
    """To 1/510 where they are kept as bytes, exactly where a file has more bits; masks at their own size."""
    rng, high = np.random.default_rng(0), 60000 if mode in ("I;16", "F") else 200
    values = rng.integers(20, high, (30, 41) + ((3,) if mode.startswith("RGB") else ()))
    image = Image.fromarray(values.astype({"I;16": np.uint16, "F": np.float32}.get(mode, np.uint8)))
    file = tmp_path / ("x.tif" if mode == "F" else "x.png")
    (image if mode in ("I;16", "F") else image.convert(mode)).save(file)
    Image.fromarray(np.uint8(255) * (values.reshape(30, 41, -1)[..., 0] > high / 2)).save(tmp_path / "m.png")
    entry = Entry("x", file, (tmp_path / "m.png",))
    sample = read_sample(entry, "a", "nuclei", S, tiles=True)
    wanted, truth, *_ = images.read_pair(file, tmp_path / "m.png")
    found = torch.cat([sample.images]).float() / (255 if sample.images.dtype == torch.uint8 else 1)
    assert sample.images.shape == (1, 3, 30, 41) and (sample.truth == truth).all()
    assert np.abs(found.numpy() - wanted).max() <= (1e-7 if mode in ("I;16", "F") else 1 / 510 + 1e-6)
    assert (sample.images.dtype == torch.uint8) == (mode not in ("I;16", "F"))
    assert sample.images.untyped_storage().nbytes() == {"L": 1230, "1": 1230, "I;16": 4920, "F": 4920}.get(mode, 3690)
    assert outlined_tiles(sample, sample.truth, 2, (255, 0, 0))[0].shape == (140, 192, 3)


def test_a_blank_picture_is_read_as_zeros(tmp_path):
    Image.new("RGB", (40, 40), (9, 9, 9)).save(tmp_path / "x.png")
    image, _, warnings = tiles.read_alone(tmp_path / "x.png")
    assert not image.any() and image.dtype == np.uint8 and "is blank" in warnings[0]


@pytest.mark.parametrize("stats", ["case", "site"])
def test_a_run_resumes_to_the_bit_and_is_scored_and_predicted_alike(tmp_path, program, stats):
    """Scores are counted on the whole picture; predict.py finds what eval.py scored, with probabilities."""
    data, words = write_nuclei(tmp_path / "d", size=50, cases=3), ["tiles=true", f"test_stats={stats}", "lr=0.2"]
    train.train(tiny_config(data, tmp_path / "whole", *words, "rounds=3"))
    train.train(tiny_config(data, tmp_path / "cut", *words))
    train.train(tiny_config(data, tmp_path / "cut", *words, "rounds=3", "resume=true"))
    states = [load_checkpoint(tmp_path / run / "last.pt") for run in ("whole", "cut")]
    assert_same(dict(states[0]["weights"]), dict(states[1]["weights"]))
    assert without_seconds(rows_of(tmp_path / "whole")) == without_seconds(rows_of(tmp_path / "cut"))
    before = (tmp_path / "whole" / "cases.csv").read_text()
    assert program(evaluation, tmp_path, "--run", "whole", "device=cpu")[0] == 0
    assert (tmp_path / "whole" / "cases.csv").read_text() == before
    own = ["site=a"] if stats == "site" else []
    code, _, err = program(predict, tmp_path, "--run", "whole", "d/a/images", "out=p", "probabilities=true", *own)
    assert (code, err) == (0, "")
    config = load_config(tmp_path / "whole" / "config.yaml")
    site, best = load_sites(config)[0], load_checkpoint(tmp_path / "whole" / "best.pt")
    model = method_and_model(config)[1]
    model.load_state_dict(best["weights"])
    model = own_network(model, best["statistics"].get("a", {}))
    for sample in (*site.train, *site.test):
        mask = np.asarray(Image.open(tmp_path / "p" / sample.name)) > 0
        p = np.load(tmp_path / "p" / f"{sample.name}.npz")["foreground"]
        assert mask.shape == p.shape[1:] == (50, 50)
        assert (mask == classes(model, sample, config, CPU)[0]).all()
        assert ((p[0] > .5) == mask)[abs(p[0].astype(float) - .5) > 1e-3].all()
    if stats == "site":  # statistics of the inputs themselves
        assert program(predict, tmp_path, "--run", "whole", "d/a/images", "out=q")[0] == 0


def test_volumes_have_no_tiles():
    with pytest.raises(BadInput, match="^tiles: true is for images, set it to false for task: prostate"):
        a_config(tiles=True, task="prostate")


def test_tiles_of_one_image_are_one_image():
    """A site that trains on a single picture sends nothing, however many tiles it has."""
    from flower.site_rules import check_images
    check_images(Site("a", [picture(100, 100), picture(90, 90)], [], []), {})
    with pytest.raises(BadInput, match="min_images: this site has 1 training images"):
        check_images(Site("a", [picture(100, 100)], [], []), {})
