"""Sites: splitting their cases, and feeding their images to training."""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from config import BadInput
from sites import demo_data
from sites.files import warn
from sites.layouts import is_table, list_files
from sites.readers import SPLITS, read_sample, slice_of, slices_of


class Site:
    """One site's samples per split, and the slices it trains on (every image; of volumes those with organ,
    all if none has): `train_slices`, pairs (sample, slice). `undrawn`: classes that no site's masks have."""

    def __init__(self, name, train, val, test, undrawn=frozenset()):
        self.name, self.train, self.val, self.test, self.undrawn = name, train, val, test, undrawn
        slices = [(sample, s) for sample in train for s in slices_of(sample)]
        self.train_slices = [(sample, s) for sample, s in slices
                             if len(sample.masks) == 1 or sample.masks[s].any()] or slices

    def steps(self, config):
        """Return the number of batches of a local epoch."""
        return -(-len(self.train_slices) // config.batch_size)

    def batches(self, config, t, epoch, device):
        """Yield x (B, 3, h, w) and y (B, h, w) of a local epoch of round t, augmented, on a device."""
        torch.manual_seed(seeded(config.seed, self.name, t, epoch, "draws").initial_seed())  # such as dropout
        for pair in batches(self.train_slices, config.batch_size, seeded(config.seed, self.name, t, epoch)):
            if device.type == "cuda" and not pair[0].is_cuda:
                pair = [part.pin_memory() for part in pair]  # so it is copied while the host goes on
            yield [part.to(device, non_blocking=True) for part in pair]


def load_sites(config, splits=None, strict=True):
    """Return the Sites of config.data, sorted by name, decoded and split; prints their size. splits: {site:
    {split: [case]}}; None: the file in config.splits, or else made from the seed. strict=False is for other
    data than a run's own: a case unknown to splits counts as test."""
    folder = demo_data.ensure(config.task) if config.data == "demo" else Path(config.data)
    left_out = config.leave_out or []
    entries, problems = list_files(folder, config.task, config.case_pattern, left_out)
    unknown = [name for name in left_out if folder.is_dir() and not os.path.lexists(folder / name)]
    if strict and unknown:
        problems.append(f"leave_out: {folder} has no site {unknown[0]}, take it out of that list")
    if problems:
        raise BadInput(problems[0])
    if left_out:
        print(f"left out: {', '.join(left_out)}")
    if strict and config.hold_out not in (None, *entries):
        raise BadInput(f"hold_out: {folder} has no site {config.hold_out}, name one of {', '.join(entries)}")
    if splits is None and (config.splits or is_table(folder)):
        from sites.given_splits import given_splits  # a run that makes its splits does not load it
        splits = given_splits(config)
    if config.data != "demo":  # a run on generated sites does not load it
        from sites.across import look_at_files
        look_at_files(folder, folder, entries, splits, config)
    sites = [load_site(name, entries[name], splits, config, strict) for name in entries]
    missing = (splits or {}).keys() - entries.keys()
    if strict and missing:
        raise BadInput(f"{folder}: lacks the site {min(missing)} of the splits, restore it")
    samples = [sample for site in sites for sample in samples_of(site)]
    if strict and not any(sample.truth.any() for sample in samples):
        raise BadInput(f"{folder}: no mask of any site has foreground, which has to be > 0; mend the masks")
    if config.data != "demo" or config.classes > 2:
        from sites.across import compare
        warn(folder, compare(sites, config))
    cases = {(sample.site, sample.case) for sample in samples}
    size = sum(sample.images.untyped_storage().nbytes() + sample.truth.nbytes
               + sample.masks.nbytes * (not sample.tile) for sample in samples) / 2**20  # tiles: the truth
    print(f"{folder}: {len(sites)} sites, {len(cases)} cases, {len(samples)} images, {size:.0f} MB in memory")
    return sites


def store_on(sites, device):
    """Return the sites with their images and masks on the device, unless that is the CPU or more than half of
    its free memory would be taken."""
    size = sum(part.nbytes for site in sites for sample in samples_of(site) for part in sample[3:5])
    if device.type == "cpu" or 2 * size > torch.cuda.mem_get_info(device)[0]:
        return sites
    return [Site(site.name, *([sample._replace(images=sample.images.to(device), masks=sample.masks.to(device))
                               for sample in getattr(site, part)] for part in SPLITS), site.undrawn)
            for site in sites]


def load_site(name, entries, splits, config, strict=True):
    """Return one Site with its samples split and decoded, and warn of what is suspicious about them."""
    split = split_of(name, {entry.case for entry in entries}, splits, config, strict)
    given = config.task, config.image_size, config.classes, config.window, config.tiles
    at_once = 1 if config.tiles else torch.get_num_threads()  # a whole slide alone fills the memory
    with ThreadPoolExecutor(at_once) as threads:  # most of the time is decoding
        samples = {part: list(threads.map(lambda entry: read_sample(entry, name, *given), [
            entry for entry in entries if entry.case in split[part]])) for part in SPLITS}
    site = Site(name, **samples)
    warn(name, warnings_on(samples_of(site), site.train, entries))
    return site


def warnings_on(samples, train, entries):
    """Return what is suspicious about the samples of a site, of which some train, as texts; entries: where
    they lie."""
    by_name = sorted(samples, key=lambda sample: sample.name)
    texts = [text for sample in by_name for text in sample.warnings]
    if by_name and not any(sample.truth.any() for sample in train or by_name):
        whose = "its training cases" if train else "its cases"
        texts.insert(0, f"{entries[0].masks[0].parent}: no mask of {whose} has foreground (> 0), so this "
                        "site shows background alone; mend the masks, or set leave_out")
    return texts


def samples_of(site):
    """Return all samples of a site, whatever their split."""
    return [*site.train, *site.val, *site.test]


# ---- Splits ----

def split_of(site, cases, splits, config, strict=True):
    """Return {train, val, test: [case]} of a site: as `splits` has it, made if that is None, and of a site
    that is held out test cases only."""
    if strict and site == config.hold_out:
        return {"train": [], "val": [], "test": sorted(cases)}
    if splits is None:
        return split_cases(site, cases, config)
    from sites.given_splits import known_split
    return known_split(site, cases, splits, strict, config.folds)


def split_cases(site, cases, config):
    """Return {train, val, test: [case]} of one site, after a shuffle seeded by seed and site. Of n cases
    max(1, round(n / 5)) test and as many validate. Of two cases one trains and one tests, a single one
    trains. With folds fold k tests and fold k + 1 validates; some may be empty."""
    cases = sorted(cases)
    random.Random(f"{config.seed}:{site}:split").shuffle(cases)
    n, K = len(cases), config.folds
    if n <= 2:
        what = "by turns it trains and tests" if K else "it trains alone" if n == 1 else \
            "one trains and one tests, without validation"
        print(f"{site}: has {n} case{'s' * (n > 1)}, so {what}; leave_out leaves a site out")
    if K:
        folds = [cases[k::K] for k in range(K)]
        test, val = folds.pop(config.fold), folds.pop(config.fold % (K - 1))
        return {"train": [case for fold in folds for case in fold], "val": val, "test": test}
    if n <= 2:
        return {"train": cases[:1], "val": [], "test": cases[1:]}
    k = max(1, round(n / 5))
    return {"train": cases[2 * k:], "val": cases[k:2 * k], "test": cases[:k]}


def splits_of(sites):
    """Return {site: {train|val|test: [case]}} of loaded sites, for splits.json."""
    return {site.name: {part: sorted({sample.case for sample in getattr(site, part)})
                        for part in SPLITS} for site in sites}


# ---- Rounds and batches ----

def sites_of_round(sites, config, t):
    """Return the sites (or their names) that train in round t, in their order: `sites_per_round` of them,
    a choice seeded by the seed and the round; all with none, or if there are fewer."""
    chosen = torch.randperm(len(sites), generator=seeded(config.seed, "sites", t))[:config.sites_per_round]
    return [sites[i] for i in sorted(chosen.tolist())]


def seeded(*words):
    """Return a torch.Generator for these words (seed, site, round, ...), the same in every process. With one
    for each purpose no state is needed in a checkpoint, so a resumed run repeats exactly."""
    bits = random.Random(":".join(str(word) for word in words)).getrandbits(63)
    return torch.Generator().manual_seed(bits)


def stack(slices, generator=None):
    """Return x (B, 3, h, w) float32 and y (B, h, w) int64 of pairs (sample, slice); with a generator every
    image is turned by quarters and flipped at random, its mask alike."""
    pairs = [slice_of(sample, s, generator) for sample, s in slices]
    if generator is not None:
        turns = torch.randint(8, (len(pairs),), generator=generator).tolist()
        pairs = [tuple(turned(t, turn) for t in images) for images, turn in zip(pairs, turns)]
    x, y = zip(*pairs)
    return torch.stack(x), torch.stack(y).long()


def turned(x, turn):
    """Return (..., h, w) under one of the 8 symmetries of the square, turn 0 to 7."""
    x = torch.rot90(x, turn % 4, (-2, -1))
    return x.flip(-1) if turn >= 4 else x


def batches(slices, batch_size, generator):
    """Yield augmented (x, y) of all slices once, shuffled; the last batch may be smaller."""
    order = torch.randperm(len(slices), generator=generator).tolist()
    for i in range(0, len(order), batch_size):
        yield stack([slices[j] for j in order[i:i + batch_size]], generator)
