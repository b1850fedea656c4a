"""Dice, HD95 and ASSD of two masks in plain numpy, their averages, and words that define them."""

import math

import numpy as np

AVERAGED = ("dice", "hd95", "assd")
MEASURES = (*AVERAGED, "misses", "images")  # of a site
POINTS_AT_ONCE = 2**20  # points that are looked at together: a whole slide has many


def border(mask):
    """Return mask minus its erosion with the cross of 4 (2-D) or 6 (3-D) neighbours, bool. What lies outside
    the image counts as background, so a mask at the edge has its border there."""
    padded = np.pad(mask, 1)
    inner = mask.copy()
    for axis in range(mask.ndim):
        for start in (0, 2):
            window = [slice(1, -1)] * mask.ndim
            window[axis] = slice(start, start + mask.shape[axis])
            inner &= padded[tuple(window)]
    return mask & ~inner


def squared_along(mask, axis, step):
    """Return the squared distance to the nearest True on the same line of `axis`, else inf.

    Two passes, there and back: a place is one further away than the one before it."""
    lines = np.ascontiguousarray(np.moveaxis(mask, axis, 0))
    steps = np.where(lines, np.float32(0), np.float32(np.inf))  # whole numbers, exact up to 2^24
    for i in range(1, len(steps)):
        np.minimum(steps[i], steps[i - 1] + 1, out=steps[i])
    for i in reversed(range(len(steps) - 1)):
        np.minimum(steps[i], steps[i + 1] + 1, out=steps[i])
    away = np.multiply(steps, step, dtype=float)
    return np.moveaxis(np.square(away, out=away), 0, axis)


def spread(squared, axis, step):
    """Return min_a squared[a] + (step (x - a))^2 at every x along `axis`; squared: 3-D."""
    lines = np.moveaxis(squared, axis, 0)
    at = step * np.arange(len(lines))
    best = [(lines + ((x - at) ** 2)[:, None, None]).min(0) for x in at]
    return np.moveaxis(np.stack(best), 0, axis)


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
    the longest by two passes, the shortest (a volume's slices) by shifts, the last at `at` alone."""
    if not at.any():
        return np.zeros(0)
    both = at | to
    filled = [both.any(tuple({*range(at.ndim)} - {axis})).nonzero()[0] for axis in range(at.ndim)]
    box = tuple(slice(index[0], index[-1] + 1) for index in filled)
    at, to = at[box], to[box]
    *between, last, first = sorted(range(at.ndim), key=lambda axis: at.shape[axis])
    squared = squared_along(to, first, spacing[first])
    for axis in between:
        squared = spread(squared, axis, spacing[axis])
    points = np.nonzero(at)
    parts = zip(*(np.array_split(index, -(-len(index) // POINTS_AT_ONCE) or 1) for index in points))
    return np.sqrt(np.concatenate([spread_to(part, squared, last, spacing[last]) for part in parts]))


def overlap_scores(both, p, t):
    """Return Dice 2 |P and T| / (|P| + |T|), precision |P and T| / |P| and recall |P and T| / |T| of numbers
    of pixels, 1 when both masks are empty, 0 when one is; and whether one is."""
    return {"dice": 2 * both / (p + t) if p + t else 1.0, "precision": both / p if p else float(not t),
            "recall": both / t if t else float(not p), "miss": int((p > 0) != (t > 0))}


def surface_distances(prediction, truth, spacing):
    """Return (HD95, ASSD) of two masks that are not empty, from border to border: the larger directed 95th
    percentile (linear interpolation), and the mean of the distances of both directions pooled."""
    p, t = border(prediction), border(truth)
    there, back = nearest_distance(p, t, spacing), nearest_distance(t, p, spacing)
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    return float(hd95), float(np.concatenate([there, back]).mean())


def score(prediction, truth, spacing):
    """Return {dice, precision, recall, hd95, assd, miss} of two bool masks of one shape, 2-D or 3-D.

    Both empty: 1, 1, 1, 0, 0, 0. One empty: 0, 0, 0, twice the image's diagonal sqrt(sum (N_i s_i)^2), 1."""
    both, p, t = (int(mask.sum()) for mask in (prediction & truth, prediction, truth))
    if p and t:
        hd95, assd = surface_distances(prediction, truth, spacing)
    else:
        hd95 = assd = math.hypot(*(n * s for n, s in zip(truth.shape, spacing))) if p or t else 0.0
    return overlap_scores(both, p, t) | {"hd95": hd95, "assd": assd}


def site_scores(cases):
    """Return {dice, hd95, assd, misses, images} of a site from {class: [scores of each image]}, None
    without images. With several foreground classes `classes` holds each one's, the rest is their mean or
    total."""
    found = {j: mean_of_all([row | {"misses": row["miss"], "images": 1} for row in rows])
             for j, rows in cases.items()}
    first, *others = found.values()
    images = max(row["images"] for row in found.values())  # a class that is not scored has none
    return mean_of_all(found.values()) | {"images": images, "classes": found} if others else first


def in_mean(sites, foreign=()):
    """Return the names of the sites that the mean is over: those with images, but of sites that took no part
    in training, `foreign`, only if no other has any."""
    with_images = [name for name, row in sites.items() if row["images"]]
    return [name for name in with_images if name not in foreign] or with_images


def mean_scores(sites, foreign=()):
    """Return {dice, hd95, assd, misses, images}: unweighted mean of the sites `in_mean`, and totals. With
    several foreground classes `classes` holds the same of each."""
    scored = [sites[name] for name in in_mean(sites, foreign)]
    classes = {j: mean_of_all([row["classes"][j] for row in scored])
               for row in sites.values() for j in row.get("classes", {})}
    return mean_of_all(scored) | ({"classes": classes} if classes else {})


def mean_of_all(rows):
    """Return {dice, hd95, assd, misses, images}: the rows' means, and the totals of misses and images;
    without rows None, and 0 images. A mean of which a value is missing is None."""
    rows = [row for row in rows if row["misses"] is not None]
    values = {name: [row.get(name) for row in rows] for name in AVERAGED}
    means = {name: float(np.mean(of_name)) if rows and None not in of_name else None
             for name, of_name in values.items()}
    return means | {"misses": sum(row["misses"] for row in rows) if rows else None,
                    "images": sum(row["images"] for row in rows)}
