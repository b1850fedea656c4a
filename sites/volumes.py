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
from sites.labels import as_classes, check_background, check_whole

nibabel.imageglobals.logger.setLevel("CRITICAL")  # what it would say is said here, with the file's name

MM = {"meter": 1000.0, "micron": 0.001}  # what a header's unit of length is, else 1
POSSIBLE = (0.01, 50.0)                  # mm, sides of a voxel
ORDER = (2, 1, 0)                        # (x, y, z) -> (slice, row, column)


def read_pair(image_file, mask_file, classes=2):
    """Return volume (S, 1, H, W) float32 in [0, 1], its classes (S, H, W) uint8, spacing in mm, warnings;
    slices lie along the third axis (foot to head). Source: paper; orientation: ours. Raises BadInput."""
    voxels, affine, spacing, found = read_nifti(image_file)
    labels, mask_affine, _, more = read_labels(mask_file, classes)
    if labels.shape != voxels.shape:
        raise BadInput(f"{mask_file}: its size {labels.shape} differs from its image's "
                       f"{voxels.shape}, export the mask again on the image's grid")
    if not np.allclose(affine, mask_affine, rtol=0, atol=0.1 * min(spacing)):
        raise BadInput(f"{mask_file}: its header places it elsewhere than its image's, "
                       "copy the image's header (affine) to the mask")
    truth = np.ascontiguousarray(as_classes(labels, mask_file, classes).transpose(ORDER))
    return prepared(voxels, image_file, found), truth, spacing, found + more


def read_alone(file):
    """Return a volume without a mask as `read_pair` does: volume, spacing and warnings; raises BadInput."""
    voxels, _, spacing, found = read_nifti(file)
    return prepared(voxels, file, found), spacing, found


def prepared(voxels, file, found):
    """Return voxels (X, Y, Z) as (S, 1, H, W), clipped at their 99 % quantile and scaled to [0, 1]
    (paper); raises BadInput for a volume without contrast."""
    clipped = np.minimum(voxels, np.quantile(voxels, 0.99))
    if clipped.min() == clipped.max() < voxels.max():
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
    """Return voxels (X, Y, Z), affine in mm, the sides (slice, row, column) of a voxel in mm and warnings.

    They are turned as the affine says, to left, posterior, superior: rows run from front to back and columns
    to the patient's left. Raises BadInput."""
    with reading(file, "NIfTI"):
        volume, found = load(file)
        check_shape(file, volume)
        found += contradictions(file, volume)
        volume = volume.as_reoriented(ornt_transform(io_orientation(volume.affine), axcodes2ornt("LPS")))
        voxels = np.asarray(volume.dataobj, dtype=np.float32).reshape(volume.shape[:3])
    if not np.isfinite(voxels).all():
        raise BadInput(f"{file}: has NaN or infinite voxels, replace them")
    affine = volume.affine * MM.get(volume.header.get_xyzt_units()[0], 1.0)
    sizes = voxel_sizes(affine)
    if not (POSSIBLE[0] < sizes.min() and sizes.max() < POSSIBLE[1]):
        raise BadInput(f"{file}: its voxels would have sides of {listed(sizes)} mm, mend its header")
    return voxels, affine, tuple(sizes[list(ORDER)].tolist()), found


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
    """Raise BadInput unless a file holds one 3-D volume whose affine can be inverted."""
    if volume.ndim < 3 or any(n != 1 for n in volume.shape[3:]) or 0 in volume.shape:
        raise BadInput(f"{file}: is {volume.ndim}-D with shape {volume.shape}, give one 3-D volume a file")
    if not np.isfinite(volume.affine).all() or abs(np.linalg.det(volume.affine[:3, :3])) < 1e-12:
        raise BadInput(f"{file}: its header gives no possible place to its voxels, export it again")


def contradictions(file, volume):
    """Return a warning for each thing that a header says in two ways, and for axes that are askew."""
    found, header, sizes = [], volume.header, voxel_sizes(volume.affine)
    zooms = np.array(header.get_zooms()[:3], dtype=float)
    if not np.allclose(zooms, sizes, rtol=0.01, atol=1e-3):
        found.append(f"{file}: its header says voxels of {listed(zooms)} in one place and of "
                     f"{listed(sizes)} in its affine, which is used")
    (qform, q), (sform, s) = header.get_qform(coded=True), header.get_sform(coded=True)
    if q and s and not np.allclose(qform, sform, rtol=0, atol=0.1 * sizes.min()):
        found.append(f"{file}: its qform and its sform differ, the sform is used")
    axes = volume.affine[:3, :3] / sizes
    if (abs(axes).max(0) < 0.704).any():
        found.append(f"{file}: its axes are oblique by more than 45 degrees")
    if not np.allclose(axes.T @ axes, np.eye(3), atol=0.02):
        found.append(f"{file}: its axes are not at right angles, distances are only nearly right")
    return found


def listed(sizes):
    """Return the sides of a voxel for a message."""
    return " x ".join(f"{side:.3g}" for side in sizes)
