"""Dice, HD95 and ASSD of two masks in plain numpy, their averages, and words that define them."""

import math

import numpy as np

MEASURES = ("dice", "hd95", "assd", "misses", "cases")  # of a site


def border(mask):
    """Return mask minus its erosion with the cross of 4 (2-D) or 6 (3-D) neighbours, bool.

    What lies outside the image counts as background, so a mask at the edge has its border there.
    """
    padded = np.pad(mask, 1)
    inner = mask.copy()
    for axis in range(mask.ndim):
        for start in (0, 2):
            window = [slice(1, -1)] * mask.ndim
            window[axis] = slice(start, start + mask.shape[axis])
            inner &= padded[tuple(window)]
    return mask & ~inner


def squared_along(mask, axis, step):
    """Return the squared distance to the nearest True on the same line of `axis`, else inf."""
    mask = np.moveaxis(mask, axis, 0)
    at = np.arange(len(mask), dtype=float).reshape(-1, *[1] * (mask.ndim - 1))
    before = np.maximum.accumulate(np.where(mask, at, -np.inf))
    after = np.minimum.accumulate(np.where(mask, at, np.inf)[::-1])[::-1]
    return np.moveaxis((step * np.minimum(at - before, after - at)) ** 2, 0, axis)


def spread(squared, axis, step):
    """Return min_d squared[x + d] + (step d)^2 along `axis` at every voxel, d ascending."""
    old = np.moveaxis(squared, axis, 0)
    best = old.copy()
    for d in range(1, len(old)):
        cost = (step * d) ** 2
        if best.max() <= cost:  # nothing further away can be nearer
            break
        np.minimum(best[d:], old[:-d] + cost, out=best[d:])
        np.minimum(best[:-d], old[d:] + cost, out=best[:-d])
    return np.moveaxis(best, 0, axis)


def spread_to(points, squared, axis, step):
    """Return what `spread` gives, but at `points` alone: (N,); points: one index array an axis."""
    lines = np.moveaxis(squared, axis, -1)
    length, values = lines.shape[-1], lines.ravel()
    home = points[axis]
    first = np.ravel_multi_index([*np.delete(points, axis, 0), np.zeros_like(home)], lines.shape)
    best = values[first + home]
    searching = np.arange(len(best))
    for d in range(1, length):
        cost = (step * d) ** 2
        searching = searching[best[searching] > cost]
        if not searching.size:
            break
        x, start = home[searching], first[searching]
        # An index cut to the edge names a voxel nearer than d: its cost is only too high.
        near = np.minimum(values[start + np.maximum(x - d, 0)],
                          values[start + np.minimum(x + d, length - 1)])
        best[searching] = np.minimum(best[searching], near + cost)
    return best


def nearest_distance(at, to, spacing):
    """Return the exact Euclidean distance from each True of `at` to the nearest True of `to`.

    at, to: bool masks of one shape, 2-D or 3-D; spacing: one step an axis, the unit of the result.
    Returns (number of True in at,) float64 in the order of np.nonzero; inf where `to` is empty.
    The squared distance is separable, min_x (x - a)^2 + min_y (y - b)^2 + ..., one axis at a time:
    the longest by two scans, the shortest (a volume's slices) by shifts, the last at `at` alone.
    """
    points = np.nonzero(at | to)
    if not len(points[0]):
        return np.zeros(0)
    box = tuple(slice(index.min(), index.max() + 1) for index in points)
    at, to = at[box], to[box]
    *between, last, first = sorted(range(at.ndim), key=lambda axis: at.shape[axis])
    squared = squared_along(to, first, spacing[first])
    for axis in between:
        squared = spread(squared, axis, spacing[axis])
    return np.sqrt(spread_to(np.nonzero(at), squared, last, spacing[last]))


def dice(prediction, truth):
    """Return 2 |P and T| / (|P| + |T|) of two bool masks; 1 when both are empty."""
    total = int(prediction.sum()) + int(truth.sum())
    return 2 * int((prediction & truth).sum()) / total if total else 1.0


def surface_distances(prediction, truth, spacing):
    """Return (HD95, ASSD) of two masks that are not empty, in the unit of `spacing`.

    HD95 = max of both directed 95th percentiles (linear interpolation); ASSD = mean of the
    distances of both directions pooled; from border to border.
    """
    p, t = border(prediction), border(truth)
    there, back = nearest_distance(p, t, spacing), nearest_distance(t, p, spacing)
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    return float(hd95), float(np.concatenate([there, back]).mean())


def score(prediction, truth, spacing, distances=True):
    """Return {dice, hd95, assd, miss} of two bool masks of one shape, 2-D or 3-D.

    Both empty: 1, 0, 0. One empty: Dice 0, both distances the diagonal sqrt(sum (N_i s_i)^2) of the
    image, and miss = 1. distances=False leaves hd95 and assd None, which is much faster.
    """
    empty = (not prediction.any()) + (not truth.any())
    if not distances:
        hd95 = assd = None
    elif empty == 2:
        hd95 = assd = 0.0
    elif empty == 1:
        hd95 = assd = math.hypot(*(n * s for n, s in zip(truth.shape, spacing)))
    else:
        hd95, assd = surface_distances(prediction, truth, spacing)
    return {"dice": dice(prediction, truth), "hd95": hd95, "assd": assd, "miss": int(empty == 1)}


def mean_of(rows, name):
    """Return the mean of rows' `name`; None without rows or where the value is missing."""
    values = [row[name] for row in rows]
    return None if not values or None in values else float(np.mean(values))


def site_scores(cases):
    """Return {dice, hd95, assd, misses, cases} of a site's scored cases; without cases all None."""
    means = {name: mean_of(cases, name) for name in ("dice", "hd95", "assd")}
    misses = sum(case["miss"] for case in cases) if cases else None
    return means | {"misses": misses, "cases": len(cases)}


def mean_scores(sites):
    """Return {dice, hd95, assd, misses}: unweighted mean of sites with cases, summed misses."""
    scored = [row for row in sites.values() if row["cases"]]
    means = {name: mean_of(scored, name) for name in ("dice", "hd95", "assd")}
    return means | {"misses": sum(row["misses"] for row in scored) if scored else None}


def format_table(scores, unit):
    """Return `evaluate`'s result as aligned lines: every site, the mean, the site of lowest Dice.

    unit: of the distances, "px" or "mm".
    """
    sites, mean = scores["sites"], scores["mean"]
    scored = [name for name in sites if sites[name]["cases"]]
    rows = [(name, sites[name]) for name in sites]
    rows.append(("mean of sites", mean | {"cases": sum(sites[name]["cases"] for name in scored)}))
    if scored:
        worst = min(scored, key=lambda name: sites[name]["dice"])
        rows.append((f"worst: {worst}", sites[worst]))
    wide = max(len(label) for label, _ in rows)
    lines = [f"{'site':{wide}}  cases    Dice  HD95 {unit}  ASSD {unit}  misses"]
    for label, row in rows:
        numbers = ["-" if row[name] is None else f"{row[name]:.{digits}f}"
                   for name, digits in (("dice", 4), ("hd95", 2), ("assd", 2), ("misses", 0))]
        cells = [f"{value:>{width}}" for value, width in zip(numbers, (6, 7, 7, 6))]
        lines.append("  ".join([f"{label:{wide}}", f"{row['cases']:5}", *cells]))
    return "\n".join(lines)


def units(config):
    """Return the unit of each number of a result: distances are in mm only where files say mm."""
    distance = "mm" if config.task == "prostate" else "px"
    return {"dice": "1", "hd95": distance, "assd": distance, "misses": "cases", "cases": "1",
            "peak_mb": "MiB", "seconds": "s"}


def definitions(config, foreign_sites=()):
    """Return what every number of a result means; foreign_sites: those that took no part."""
    case = "one image" if config.task == "nuclei" else "one volume, in 3-D"
    if config.eval_slices == "foreground":
        case = "one slice with organ in its truth, in 2-D"
    kind = {"site": "site: batch-norm mean and variance of up to 64 training images of the case's "
                    "own site, cumulative over batches, never sent or averaged",
            "case": "case: batch-norm mean and variance of the case, at most 32 slices at once"}
    words = {
        "dice": "foreground Dice 2|P and T|/(|P|+|T|) on the file's grid; both empty 1, one 0",
        "hd95": "larger of the two directed 95th percentiles (linear interpolation) of border "
                "distances; both masks empty 0, one empty the diagonal of the image",
        "assd": "mean of the border distances of both directions pooled; empty masks as for hd95",
        "misses": "cases with exactly one of prediction and truth empty; in 'mean' their total",
        "case": case,
        "mean": "sites: mean over a site's cases; mean: unweighted mean over the sites with cases",
        "test_stats": kind[config.test_stats],
        "eval_slices": f"{config.eval_slices}: a case is {case}",
        "best": "the round of the best validation mean Dice, the last round if no site validates",
        "last": "the last round",
        "peak_mb": "largest resident memory of the process, plus the largest allocation on a GPU"}
    if foreign_sites:
        own = (": they used statistics of their own unlabelled images"
               if config.test_stats == "site" else "")
        words["foreign_sites"] = f"{', '.join(foreign_sites)} took no part in training{own}"
    return words
