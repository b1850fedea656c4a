"""Generated scenes, and how each generated site shows them: nuclei, prostates, and discs with a cup. A scene
is what is in the picture, a style how a site's scanner shows it; a scene can be rendered in every style."""

from collections import namedtuple

import nibabel
import numpy as np
import torch
from PIL import Image
from torch.nn import functional

SIZE = 128  # pixels, side of a generated image

# How a site shows a scene, after the number of its cases:
#   hematoxylin, eosin  optical density of the nuclei, and of what lies between them, per RGB channel
#   contrast, light     of the densities; of the background (1 = white), or the strength of a camera's light
#   colour              of a camera's light, RGB
#   spacing, bias       mm (x, y, z); strength of the bias field
#   blur, noise         Gaussian sigma in pixels; standard deviation, of 255, for volumes of their range
Stain = namedtuple("Stain", "cases hematoxylin eosin contrast light blur noise")
Camera = namedtuple("Camera", "cases colour light blur noise")
Scanner = namedtuple("Scanner", "cases spacing gamma bias noise blur")

NUCLEI = {
    "north": Stain(16, (0.65, 0.70, 0.29), (0.07, 0.45, 0.20), 1.3, 0.97, 0.5, 4),
    "east": Stain(12, (0.55, 0.85, 0.15), (0.15, 0.60, 0.05), 0.8, 0.90, 1.1, 8),
    "south": Stain(20, (0.80, 0.55, 0.40), (0.25, 0.35, 0.30), 1.0, 0.80, 0.8, 12),
    "west": Stain(10, (0.45, 0.60, 0.55), (0.05, 0.25, 0.25), 0.6, 0.99, 1.5, 6),
}
DISCS = {
    "lens": Camera(20, (1.0, 0.62, 0.35), 1.0, 0.6, 4),
    "field": Camera(16, (0.95, 0.80, 0.45), 0.65, 1.4, 7),
    "flash": Camera(24, (0.85, 0.70, 0.75), 1.25, 1.0, 10),
}
PROSTATE = {
    "site1": Scanner(6, (0.6, 0.6, 3.0), 1.0, 0.2, 0.03, 0.4),
    "site2": Scanner(6, (0.8, 0.8, 4.0), 0.7, 0.5, 0.05, 0.8),
    "site3": Scanner(5, (0.5, 0.5, 3.6), 1.5, 0.3, 0.08, 0.6),
    "site4": Scanner(5, (0.7, 0.7, 3.0), 1.2, 0.8, 0.04, 1.2),
    "site5": Scanner(4, (0.6, 0.6, 2.5), 0.8, 0.1, 0.10, 0.4),
    "site6": Scanner(4, (0.9, 0.9, 3.3), 1.8, 0.6, 0.06, 1.0),
}


# ---- Nuclei ----

def nuclei_scene(rng, style=None, size=SIZE):
    """Return two density maps (size, size), of nuclei and of the tissue between, and the labels 0, 255."""
    y, x = np.mgrid[:size, :size]
    nuclei = np.zeros((size, size))
    for _ in range(rng.integers(18, 40)):
        (cy, cx), angle = rng.uniform(0, size, 2), rng.uniform(0, np.pi)
        long, ratio = rng.uniform(4, 10), rng.uniform(0.55, 1)
        u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        inside = (u / long) ** 2 + (v / (long * ratio)) ** 2 < 1
        nuclei[inside] = rng.uniform(0.45, 1)
    chromatin = 1 + 0.35 * smooth_noise(rng, (size, size), 1.2)
    tissue = 0.5 + 0.3 * smooth_noise(rng, (size, size), 6) + 0.15 * smooth_noise(rng, (size, size), 1.5)
    return (nuclei * chromatin.clip(0.3), tissue.clip(0.05)), np.uint8(255) * (nuclei > 0)


def render_nuclei(scene, stain, rng):
    """Return a scene in a site's stain, uint8 (H, W, 3): Beer-Lambert absorption, blur, noise.

        I = light exp(-contrast (hematoxylin nuclei + eosin tissue))
    """
    nuclei, tissue = (density[:, :, None] for density in scene)
    # A section's thickness varies; dark tissue looks like pale nuclei, as in a real slide.
    density = stain.hematoxylin * (nuclei + 0.35 * (tissue > 0.85)) + stain.eosin * tissue
    light = stain.light * np.exp(-stain.contrast * density * rng.uniform(0.8, 1.2))
    light = blurred(light.transpose(2, 0, 1), stain.blur).transpose(1, 2, 0)
    noisy = 255 * light + stain.noise * rng.standard_normal(light.shape)
    return noisy.clip(0, 255).astype(np.uint8)


# ---- Discs with a cup: three classes ----

def disc_scene(rng, style=None, size=SIZE):
    """Return brightness (size, size) in [0, 1] of a round disc with a brighter cup in it, and labels uint8:
    1 disc, 2 cup. Dark vessels cross both, so that brightness alone does not tell the classes."""
    y, x = np.mgrid[:size, :size]
    centre, radius = rng.uniform(0.35, 0.65, 2) * size, rng.uniform(0.16, 0.24) * size
    inner, shift = radius * rng.uniform(0.35, 0.65), rng.uniform(-0.15, 0.15, 2) * radius

    def inside(at, r):
        return ((y - at[0]) / r) ** 2 + ((x - at[1]) / (r * rng.uniform(0.9, 1.1))) ** 2 < 1

    labels = inside(centre, radius).astype(np.uint8)
    labels[inside(centre + shift, inner) & (labels == 1)] = 2
    scene = np.array((0.35, 0.62, 0.88))[labels] + 0.05 * smooth_noise(rng, (size, size), 8)
    for _ in range(rng.integers(4, 8)):
        angle, bend = rng.uniform(0, 2 * np.pi), rng.uniform(-0.01, 0.01)
        along = (x - centre[1]) * np.cos(angle) + (y - centre[0]) * np.sin(angle)
        across = (y - centre[0]) * np.cos(angle) - (x - centre[1]) * np.sin(angle) + bend * along**2
        scene[(abs(across) < rng.uniform(0.8, 1.8)) & (along > 0)] *= 0.55
    return scene.clip(0, 1), labels


def render_disc(scene, camera, rng):
    """Return a scene as a site's camera shows it, uint8 (H, W, 3): coloured light, blur, noise."""
    shown = blurred(scene[None], camera.blur)[0]
    light = np.array(camera.colour) * camera.light * rng.uniform(0.85, 1.15)
    image = shown[:, :, None] ** (1 / np.array((1.0, 0.8, 0.6))) * light
    noisy = 255 * image.clip(0, 1) + camera.noise * rng.standard_normal(image.shape)
    return noisy.clip(0, 255).astype(np.uint8)


# ---- Prostate ----

def prostate_scene(rng, style, size=96, slices=12):
    """Return tissue brightness (S, H, W) in [0, 1] of a pelvis and its prostate's mask, uint8."""
    spacing = style.spacing
    z, y, x = np.mgrid[:slices, :size, :size]
    mm = [(z - slices / 2) * spacing[2], (y - size / 2) * spacing[1], (x - size / 2) * spacing[0]]

    def ellipsoid(centre, radii):
        return sum(((a - c) / r) ** 2 for a, c, r in zip(mm, centre, radii))

    half = size / 2 * spacing[0]
    scene = 0.25 + 0.1 * smooth_noise(rng, z.shape, 3)
    scene[ellipsoid((0, 0, 0), (200, 0.85 * half, 0.95 * half)) > 1] = 0.02  # air around the body
    for side in (-1, 1):                                                     # femoral heads
        scene[ellipsoid((0, 0, side * 0.75 * half), (40, 7, 6)) < 1] = 0.5
    centre = np.array([0, 1, 0]) + rng.uniform(-3, 3, 3)
    radii = rng.uniform((11, 8, 10), (15, 11, 13))
    scene[ellipsoid(centre + (10, -9, 0), (10, 6, 9)) < 1] = 0.85            # bladder
    scene[ellipsoid(centre + (0, radii[1] + 6, 0), (200, 5, 6)) < 1] = 0.12  # rectum
    distance = ellipsoid(centre, radii) * (1 + 0.15 * smooth_noise(rng, z.shape[1:], 6))
    mask = distance < 1
    gland = np.where(distance < 0.45, 0.4, 0.62) + 0.08 * smooth_noise(rng, z.shape, 1.5)
    return np.where(mask, gland, scene), mask.astype(np.uint8)


def render_prostate(scene, scanner, rng):
    """Return a scene as a scanner shows it, int16 (S, H, W): gamma, bias field, blur, noise."""
    field = np.exp(scanner.bias * smooth_noise(rng, scene.shape[1:], 20))
    image = blurred(scene.clip(0) ** scanner.gamma * field, scanner.blur)
    image = image + scanner.noise * rng.standard_normal(scene.shape)
    return (1000 * image).clip(0).astype(np.int16)


# ---- All ----

def write_sites(task, folder):
    """Write every generated site of a task, as its layout in docs/data.md."""
    styles, seed, _, _, _ = TASKS[task]
    for number, (site, style) in enumerate(styles.items()):
        for case in range(style.cases):
            rng = np.random.default_rng([seed, number, case])
            name = f"Case{case:02}" if "spacing" in style._fields else f"{site}_{case:02}"
            write_case(task, folder / site, name, style, rng, rng)


def write_case(task, site, name, style, of_scene, of_style):
    """Write a scene as a site's style shows it, and its labels, to the site's folder; the random numbers of
    the scene and of the style may be of two generators."""
    _, _, draw, render, save = TASKS[task]
    scene, labels = draw(of_scene, style)
    save(site, name, render(scene, style, of_style), labels, style)


def save_image(site, name, image, labels, style=None):
    """Write an image uint8 (H, W, 3) and its labels uint8 (H, W) to a site's images/ and masks/ as png."""
    for kind, array in (("images", image), ("masks", labels)):
        (site / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(site / kind / f"{name}.png")


def save_prostate(site, name, volume, mask, style):
    """Write NAME.nii.gz and NAME_segmentation.nii.gz (S, H, W), the style's spacing in their headers."""
    x, y, z = style.spacing
    site.mkdir(parents=True, exist_ok=True)
    for suffix, array in (("", volume), ("_segmentation", mask)):
        image = nibabel.Nifti1Image(array.transpose(2, 1, 0), np.diag([-x, -y, z, 1]))
        nibabel.save(image, site / f"{name}{suffix}.nii.gz")


def blurred(x, sigma):
    """Return (N, H, W) after a Gaussian blur of sigma pixels within each of the N images."""
    reach = np.arange(-int(3 * sigma + 1), int(3 * sigma + 1) + 1)
    kernel = np.exp(-(reach / sigma) ** 2 / 2)
    kernel = torch.from_numpy(kernel / kernel.sum())
    padded = functional.pad(torch.from_numpy(x)[:, None], [len(reach) // 2] * 4, mode="replicate")
    rows = functional.conv2d(padded, kernel.view(1, 1, -1, 1))
    return functional.conv2d(rows, kernel.view(1, 1, 1, -1))[:, 0].numpy()


def smooth_noise(rng, shape, scale):
    """Return noise of unit deviation that varies over `scale` pixels in the last two axes."""
    *_, h, w = shape
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None])
    low_pass = np.exp(-2 * (np.pi * scale * frequency) ** 2)
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * low_pass, s=(h, w))
    return noise / noise.std()


OF_PROSTATE = (PROSTATE, 2, prostate_scene, render_prostate, save_prostate)
TASKS = {  # task: (styles of its sites, seed, what draws a scene, renders it in a style, writes it)
    "nuclei": (NUCLEI, 1, nuclei_scene, render_nuclei, save_image), "prostate": OF_PROSTATE,
    "images": (DISCS, 4, disc_scene, render_disc, save_image), "volumes": OF_PROSTATE}
