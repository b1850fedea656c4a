"""Reading a volume and its labels from NIfTI, checked to the end of the file."""

import gzip
import math
from pathlib import Path

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from config import BadInput
from sites.files import reading
from sites.images import scale
from sites.labels import as_classes, as_whole, look_at

nibabel.imageglobals.logger.setLevel("CRITICAL")  # what it would say is said here, with the file's name

MM = {"meter": 1000.0, "micron": 0.001}  # what a header's unit of length is, else 1
POSSIBLE = (0.01, 50.0)                  # mm, sides of a voxel
PLANES = ("sagittal ", "coronal ", "")   # of slices across x, y, z; axial is what nobody has to be told


def read_pair(image_file, mask_file, classes=2, window=None, facts=None):
    """Return volume (S, 1, H, W) float32 in [0, 1], its classes (S, H, W) uint8, spacing in mm, warnings.
    Source: paper; orientation, `window` (low, high; None) and `slice_order`: ours. facts: a dict that takes
    what the files hold, for a report. Raises BadInput."""
    voxels, affine, spacing, found = read_nifti(image_file)
    labels, mask_affine, _, more = read_labels(mask_file, classes, facts)
    if labels.shape != voxels.shape:
        raise BadInput(f"{mask_file}: its size {labels.shape} differs from its image's "
                       f"{voxels.shape}, export the mask again on the image's grid")
    if not np.allclose(affine, mask_affine, rtol=0, atol=0.1 * min(spacing)):
        raise BadInput(f"{mask_file}: its header places it elsewhere than its image's, "
                       "copy the image's header (affine) to the mask")
    order = slice_order(voxel_sizes(affine))
    if facts is not None:
        S, H, W = (voxels.shape[axis] for axis in order)
        facts |= {"size": f"{W} x {H} x {S} {PLANES[order[0]]}slices", "channels": 1,
                  "spacing": f"{listed(spacing[::-1])} mm",
                  "low": float(voxels.min()), "high": float(voxels.max())}
    truth = np.ascontiguousarray(as_classes(labels, mask_file, classes).transpose(order))
    return prepared(voxels, image_file, found, order, window), truth, spacing, found + more


def read_alone(file, window=None):
    """Return a volume without a mask as `read_pair` does: volume, spacing and warnings; raises BadInput."""
    voxels, affine, spacing, found = read_nifti(file)
    return prepared(voxels, file, found, slice_order(voxel_sizes(affine)), window), spacing, found


def read_labels(file, classes=2, facts=None):
    """Return a mask's labels (X, Y, Z) as `read_nifti` does; raises BadInput for what are no labels."""
    labels, affine, spacing, found = read_nifti(file)
    labels, values = look_at(as_whole(labels, file, found), file, classes, found)
    if not labels.any():
        found.append(f"{file}: has no foreground at all; if the organ was not drawn, remove the case")
    if facts is not None:
        facts["labels"] = values.tolist()
    return labels, affine, spacing, found


def prepared(voxels, file, found, order, window=None):
    """Return voxels (X, Y, Z) as (S, 1, H, W) in [0, 1]: of a window (low, high), or without one clipped at
    their 99 % quantile (paper). Raises BadInput for a volume without contrast."""
    if window:
        low, high = window
        scaled = ((voxels - low) / (high - low)).clip(0, 1).astype(np.float32, copy=False)
        if scaled.min() == scaled.max():
            raise BadInput(f"{file}: its values, {voxels.min():g} to {voxels.max():g}, show nothing between "
                           f"{low:g} and {high:g}; set another window, or none")
    else:
        clipped = np.minimum(voxels, np.quantile(voxels, 0.99))
        if clipped.min() == clipped.max() < voxels.max():
            raise BadInput(f"{file}: fewer than 1 % of its voxels differ from the rest, nothing is left of "
                           "it after the clip at the 99 % quantile; crop or export it again")
        check_darkest(clipped, file, found)
        scaled = scale(clipped, file, found)
    return np.ascontiguousarray(scaled.transpose(order))[:, None]


def check_darkest(voxels, file, found):
    """Add a warning to `found` where the darkest value, as a scanner's padding, takes the contrast from the
    others: it lies far below their first percentile, or their brighter half has a tenth of the range."""
    low, high = voxels.min(), voxels.max()
    some = voxels.ravel()[::max(1, voxels.size // 10000)]
    first, middle = np.quantile(some[some > low], (0.01, 0.5)) if (some > low).any() else (low, low)
    if first - low > (high - first) / 2 or high - middle < 0.1 * (high - low):
        found.append(f"{file}: its darkest value, {low:g}, lies far below the others (half of them lie "
                     f"from {middle:g} to {high:g}), leaving them little contrast; set window: [low, high]")


def shape_of(file):
    """Return the shape (S, C, H, W) that a volume has by its header alone; raises what nibabel does."""
    volume = nibabel.load(file)
    shape = np.array(volume.shape[:3])[np.argsort(turn_to_lps(volume.affine)[:, 0])]
    S, H, W = shape[list(slice_order(lps_sizes(volume.affine)))]
    return S, 1, H, W


def slice_order(sizes):
    """Return the axes of (x, y, z) that are slice, row and column: slices are cut across the axis with the
    largest spacing, as they were scanned. Where no axis has 10 % more than each other one, they are axial."""
    axis = int(np.argmax(sizes)) if max(sizes) > 1.1 * sorted(sizes)[1] else 2
    return axis, *(other for other in (2, 1, 0) if other != axis)


def turn_to_lps(affine):
    """Return nibabel's orientation that turns voxels of an affine to left, posterior, superior."""
    return ornt_transform(io_orientation(affine), axcodes2ornt("LPS"))


def lps_sizes(affine):
    """Return the sides of a voxel along x, y, z of voxels that `turn_to_lps` turned, in the header's unit."""
    return voxel_sizes(affine)[np.argsort(turn_to_lps(affine)[:, 0])]


def read_nifti(file):
    """Return voxels (X, Y, Z), affine in mm, the sides (slice, row, column) of a voxel in mm and warnings.
    They are turned as the affine says, to left, posterior, superior: rows run from front to back and columns
    to the patient's left. Raises BadInput."""
    with reading(file, "NIfTI"):
        volume, found = load(file)
        volume = volume.as_reoriented(turn_to_lps(volume.affine))
        voxels = np.asarray(volume.dataobj, dtype=np.float32).reshape(volume.shape[:3])
    if not np.isfinite(voxels).all():
        raise BadInput(f"{file}: has NaN or infinite voxels, replace them")
    affine = volume.affine * MM.get(volume.header.get_xyzt_units()[0], 1.0)
    sizes = voxel_sizes(affine)
    if not (POSSIBLE[0] < sizes.min() and sizes.max() < POSSIBLE[1]):
        raise BadInput(f"{file}: its voxels would have sides of {listed(sizes)} mm, mend its header")
    return voxels, affine, tuple(sizes[list(slice_order(sizes))].tolist()), found


def load(file):
    """Return the NIfTI image in a file that is read to its end, so that gzip's checksum counts, and a warning
    for each thing that it says in two ways. Raises BadInput unless it is one 3-D volume with a place."""
    content, found = Path(file).read_bytes(), []
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    size = [int.from_bytes(content[:4], order) for order in ("little", "big")]
    volume = (nibabel.Nifti2Image if 540 in size else nibabel.Nifti1Image).from_bytes(content)
    if volume.get_data_dtype().kind not in "iuf":
        raise ValueError(f"voxels of type {volume.get_data_dtype()}")
    if volume.ndim < 3 or any(n != 1 for n in volume.shape[3:]) or 0 in volume.shape:
        raise BadInput(f"{file}: is {volume.ndim}-D with shape {volume.shape}, give one 3-D volume a file")
    affine = volume.affine
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise BadInput(f"{file}: its header gives no possible place to its voxels, export it again")
    sizes, zooms = voxel_sizes(affine), np.array(volume.header.get_zooms()[:3], dtype=float)
    if not np.allclose(zooms, sizes, rtol=0.01, atol=1e-3):
        found.append(f"{file}: its header says voxels of {listed(zooms)} in one place and of "
                     f"{listed(sizes)} in its affine, which is used")
    (qform, q), (sform, s) = (form(coded=True) for form in (volume.header.get_qform, volume.header.get_sform))
    if q and s and not np.allclose(qform, sform, rtol=0, atol=0.1 * sizes.min()):
        found.append(f"{file}: its qform and its sform differ, the sform is used")
    rest = len(content) - volume.dataobj.offset - volume.dataobj.dtype.itemsize * math.prod(volume.shape)
    if rest > 0:
        found.append(f"{file}: holds {rest} bytes behind its voxels, which are not read")
    return volume, found


def listed(sizes):
    """Return the sides of a voxel for a message."""
    return " x ".join(f"{side:.3g}" for side in sizes)
