"""Reading a volume and its labels from NIfTI, checked to the end of the file."""

import gzip
import math
from pathlib import Path

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from config import BadInput
from sites.files import UNREADABLE, check_regular, why
from sites.images import scale
from sites.labels import as_classes, check_background, check_whole

MM = {"meter": 1000.0, "micron": 0.001}  # what a header's unit of length is, else 1
nibabel.imageglobals.logger.setLevel("CRITICAL")  # what it would say is said here, with the file's name
POSSIBLE = (0.01, 50.0)                  # mm, sides of a voxel


ORDER = (2, 1, 0)  # (x, y, z) -> (slice, row, column)


def read_volume_pair(image_file, mask_file, classes=2):
    """Return volume (S, 1, H, W) float32 in [0, 1], its classes (S, H, W) uint8, spacing in mm, warnings.

    Both are turned as their headers say; slices lie along the third axis (foot to head). With two classes
    labels are merged > 0. Source: paper; orientation, more classes: ours. Raises BadInput.
    """
    voxels, affine, spacing, found = read_nifti(image_file)
    labels, mask_affine, _, more = read_labels(mask_file, classes)
    if labels.shape != voxels.shape:
        raise BadInput(f"{mask_file}: its size {labels.shape} differs from its image's "
                       f"{voxels.shape}, export the mask again on the image's grid")
    if not np.allclose(affine, mask_affine, rtol=0, atol=0.1 * min(spacing)):
        raise BadInput(f"{mask_file}: its header places it elsewhere than its image's, "
                       "copy the image's header (affine) to the mask")
    truth = np.ascontiguousarray(as_classes(labels, mask_file, classes).transpose(ORDER))
    return prepared(voxels, image_file, found), truth, in_order(spacing), found + more


def read_volume(file):
    """Return a volume alone as `read_volume_pair` does, its spacing, and warnings; raises BadInput."""
    voxels, _, spacing, found = read_nifti(file)
    return prepared(voxels, file, found), in_order(spacing), found


def in_order(spacing):
    """Return the voxel sizes (x, y, z) as (slice, row, column)."""
    return tuple(float(spacing[axis]) for axis in ORDER)


def prepared(voxels, file, found):
    """Return voxels (X, Y, Z) as (S, 1, H, W), clipped at their 99 % quantile and scaled to [0, 1].

    Raises BadInput for a volume without contrast. Source: paper.
    """
    if voxels.min() == voxels.max():
        raise BadInput(f"{file}: has one value everywhere ({voxels.min():g}), export it again")
    clipped = np.minimum(voxels, np.quantile(voxels, 0.99))
    if clipped.min() == clipped.max():
        raise BadInput(f"{file}: fewer than 1 % of its voxels differ from the rest, nothing is left of it "
                       "after the clip at the 99 % quantile; crop or export it again")
    return np.ascontiguousarray(scale(clipped, file, found).transpose(ORDER))[:, None]


def read_labels(file, classes=2):
    """Return a mask's labels (X, Y, Z) as `read_nifti` does; raises BadInput for what are no labels."""
    labels, affine, spacing, found = read_nifti(file)
    check_whole(labels, file)
    check_background(labels, file, classes, found)
    if not labels.any():
        found.append(f"{file}: has no foreground at all; if the organ was not drawn, remove the case")
    return labels, affine, spacing, found


def read_nifti(file):
    """Return voxels (X, Y, Z), affine in mm, voxel sizes in mm and warnings, turned to left, posterior,
    superior. Raises BadInput.

    So rows run from front to back and columns to the patient's left, as radiologists look at it. The
    affine alone says where a voxel lies and how large it is.
    """
    check_regular(file)
    try:
        volume, found = load(file)
        check_shape(file, volume)
        volume = volume.slicer[(..., *[0] * (volume.ndim - 3))] if volume.ndim > 3 else volume
        found += contradictions(file, volume)
        turn = ornt_transform(io_orientation(volume.affine), axcodes2ornt("LPS"))
        volume = volume.as_reoriented(turn)
        voxels = np.asarray(volume.dataobj, dtype=np.float32)
    except UNREADABLE as problem:
        raise BadInput(f"{file}: {why(problem, 'NIfTI')}") from None
    if not np.isfinite(voxels).all():
        raise BadInput(f"{file}: has NaN or infinite voxels, replace them")
    affine = volume.affine * MM.get(volume.header.get_xyzt_units()[0], 1.0)
    return voxels, affine, tuple(voxel_sizes(affine)), found


def as_labels_of(file, found):
    """Return labels found (S, H, W) as a NIfTI image on the grid of the volume in `file`, uint8."""
    volume = load(file)[0]
    three = volume.slicer[(..., *[0] * (volume.ndim - 3))] if volume.ndim > 3 else volume
    here = io_orientation(three.affine)
    there = axcodes2ornt("LPS")
    turned = nibabel.orientations.apply_orientation(found.transpose(ORDER), ornt_transform(there, here))
    labels = type(volume)(turned.astype(np.uint8).reshape(volume.shape), volume.affine, volume.header)
    labels.header.set_data_dtype(np.uint8)
    labels.header.set_slope_inter(1, 0)
    labels.header["cal_max"] = labels.header["cal_min"] = 0
    return labels


def load(file):
    """Return the NIfTI image in a file that is read to its end, so that gzip's checksum counts, and
    warnings."""
    content = Path(file).read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    size = [int.from_bytes(content[:4], order) for order in ("little", "big")]
    kind = nibabel.Nifti2Image if 540 in size else nibabel.Nifti1Image
    volume = kind.from_bytes(content)
    if volume.get_data_dtype().kind not in "iuf":
        raise ValueError(f"voxels of type {volume.get_data_dtype()}")
    rest = len(content) - volume.dataobj.offset - volume.dataobj.dtype.itemsize * math.prod(volume.shape)
    return volume, [f"{file}: holds {rest} bytes behind its voxels, which are not read"] if rest > 0 else []


def check_shape(file, volume):
    """Raise BadInput unless a file holds one 3-D volume whose affine is possible."""
    if volume.ndim < 3 or any(n != 1 for n in volume.shape[3:]) or 0 in volume.shape:
        raise BadInput(f"{file}: is {volume.ndim}-D with shape {volume.shape}, "
                       "give one 3-D volume a file")
    unit = MM.get(volume.header.get_xyzt_units()[0], 1.0)
    if not np.isfinite(volume.affine).all() or abs(np.linalg.det(volume.affine[:3, :3])) < 1e-12:
        raise BadInput(f"{file}: its header gives no possible place to its voxels, export it again")
    sizes = voxel_sizes(volume.affine) * unit
    if not (sizes > POSSIBLE[0]).all() or not (sizes < POSSIBLE[1]).all():
        raise BadInput(f"{file}: its voxels would have sides of "
                       f"{' x '.join(f'{side:.3g}' for side in sizes)} mm, mend its header")


def contradictions(file, volume):
    """Return a warning for each thing that a header says in two ways."""
    found, header, sizes = [], volume.header, voxel_sizes(volume.affine)
    zooms = np.array(header.get_zooms()[:3], dtype=float)
    if not np.allclose(zooms, sizes, rtol=0.01, atol=1e-3):
        found.append(f"{file}: its header says voxels of {listed(zooms)} in one place and of "
                     f"{listed(sizes)} in its affine, which is used")
    (qform, q), (sform, s) = header.get_qform(coded=True), header.get_sform(coded=True)
    if q and s and not np.allclose(qform, sform, rtol=0, atol=0.1 * sizes.min()):
        found.append(f"{file}: its qform and its sform differ, the sform is used")
    unit = sizes / np.abs(volume.affine[:3, :3]).max(0)
    if (unit > 1.42).any():  # more than 45 degrees between an axis and its nearest
        found.append(f"{file}: its axes are oblique by more than 45 degrees")
    axes = volume.affine[:3, :3] / sizes
    if not np.allclose(axes.T @ axes, np.eye(3), atol=0.02):
        found.append(f"{file}: its axes are not at right angles, distances are only nearly right")
    return found


def listed(sizes):
    """Return the sides of a voxel for a message."""
    return " x ".join(f"{side:.3g}" for side in sizes)
