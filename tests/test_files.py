"""What a file stores is what is read, or it is refused in words: pixels, labels, millimetres, folders."""

import gzip
import io
import os
import struct
import zlib

import nibabel
import numpy as np
import pytest
from PIL import Image

import check_data
from config import BadInput
from datasets import load_sites
from sites import images, volumes
from sites.layouts import list_files
from test_fedbcs import write_nuclei
from tests.helpers import nuclei_config, prostate_config, run_here, write_prostate

Y, X = np.mgrid[:40, :40]
DISC = (Y - 12) ** 2 + (X - 20) ** 2 < 50  # off centre, so that a turn shows
WHITE = np.uint8(255) * DISC
TWO = np.uint8(1) * DISC + np.uint8(2) * (Y > 30)


def saved(folder, image, name="m.png", **options):
    image.save(folder / name, **options)
    return folder / name


def read_pixels(file):
    image, found = images.open_image(file)
    return images.pixels_of(file, image), found


def palette_mask(index, colours):
    image = Image.fromarray(index.astype(np.uint8), "P")
    image.putpalette([value for colour in colours for value in colour])
    return image


def png(width, height, depth, colour, rows):
    """A PNG file of any depth, 1 to 16 bits, which Pillow itself cannot write."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
            + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + chunk(b"IEND", b""))


# ---- Labels ----

BLACK, PAPER, RED, GREY = (0, 0, 0), (255, 255, 255), (200, 0, 0), (128, 128, 128)
MASKS = {  # name: (image, options of saving) that all show the disc
    "1": (Image.fromarray(DISC), {}), "L": (Image.fromarray(WHITE), {}),
    "label 1": (Image.fromarray(np.uint8(1) * DISC), {}),
    "I;16": (Image.fromarray(np.uint16(300) * DISC), {}),
    "I": (Image.fromarray(np.int32(70000) * DISC), {"name": "m.tif"}),
    "F": (Image.fromarray(np.float32(2) * DISC), {"name": "m.tif"}),
    "RGB": (Image.fromarray(WHITE).convert("RGB"), {}),
    "RGB red": (Image.fromarray(np.uint8(DISC)[..., None] * np.uint8(RED)), {}),
    "RGBA opaque": (Image.fromarray(WHITE).convert("RGBA"), {}),
    "LA opaque": (Image.fromarray(WHITE).convert("LA"), {}),
    "RGBA transparent ground": (Image.merge("RGBA", [Image.fromarray(WHITE)] * 4), {}),
    "P black first": (palette_mask(DISC, (BLACK, PAPER)), {}),
    "P white first": (palette_mask(~DISC, (PAPER, BLACK)), {}),
    "P quantized": (Image.fromarray(WHITE).convert("RGB").quantize(2), {}),
    "P label red": (palette_mask(DISC, (BLACK, RED)), {}),
    "jpg": (Image.fromarray(WHITE), {"name": "m.jpg", "quality": 60}),
    "jpg named png": (Image.fromarray(WHITE), {"format": "JPEG", "quality": 60}),
    "jpg in tif": (Image.fromarray(WHITE), {"name": "m.tif", "compression": "jpeg", "quality": 60}),
    "png named tif": (Image.fromarray(WHITE), {"name": "m.tif", "format": "PNG"}),
    "bmp": (Image.fromarray(WHITE), {"name": "m.bmp"}),
    "fax": (Image.fromarray(DISC), {"name": "m.tif", "compression": "group4"}),
    "white is zero": (Image.fromarray(WHITE), {"name": "m.tif", "tiffinfo": {262: 0}}),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_are_read_right(tmp_path, name):
    image, options = MASKS[name]
    labels, found = images.read_labels(saved(tmp_path, image, **options))
    limit = 0.02 if "jpg" in name else 0
    assert ((labels > 0) ^ DISC).mean() <= limit and found == []


REFUSED = {
    "alpha alone": (Image.merge("RGBA", [Image.new("L", (40, 40), 255)] * 3 + [Image.fromarray(WHITE)]),
                    "alpha"),
    "grey and alpha": (Image.merge("LA", [Image.new("L", (40, 40), 255), Image.fromarray(WHITE)]), "alpha"),
    "palette without black": (palette_mask(DISC, (RED, GREY)), "palette"),
    "palette ground last": (palette_mask(np.where(DISC, 0, 2), (GREY, RED, BLACK)), "palette"),
    "soft": (Image.fromarray(np.float32(0.4) * DISC), "whole numbers"),
    "negative": (Image.fromarray(np.int32(-1) * DISC), "negative"),
    "not a number": (Image.fromarray(np.where(DISC, np.nan, 0).astype(np.float32)), "NaN"),
    "1 and 2": (Image.fromarray(np.uint8(1) + DISC), "all of it is foreground"),
    "red on white": (Image.fromarray(np.where(DISC[..., None], np.uint8(RED), np.uint8(255))), "all of it"),
    "cmyk": (Image.fromarray(WHITE).convert("CMYK"), "CMYK"),
    "gif": (Image.fromarray(WHITE), "cannot be read as an image"),
    "webp": (Image.fromarray(WHITE), "cannot be read as an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_masks_that_could_be_read_two_ways_are_refused(tmp_path, name):
    image, words = REFUSED[name]
    kind = {"gif": "GIF", "webp": "WEBP"}.get(name)
    ending = ".png" if kind or image.mode in ("P", "RGBA", "LA", "L", "RGB") else ".tif"
    file = saved(tmp_path, image, f"m{ending}", **({"format": kind} if kind else {}))
    with pytest.raises(BadInput, match=words) as problem:
        images.read_labels(file)
    assert str(problem.value).startswith(str(file))


@pytest.mark.parametrize("depth, top", [(1, 1), (2, 3), (4, 15), (8, 255), (16, 65535)])
def test_grey_png_of_every_depth(tmp_path, depth, top):
    """Numbers are packed from the high bits on; the disc has the highest."""
    rows = []
    for row in DISC:
        bits = "".join(format(top * int(value), f"0{depth}b") for value in row)
        rows.append(int(bits, 2).to_bytes(len(bits) // 8, "big"))
    (tmp_path / "m.png").write_bytes(png(40, 40, depth, 0, rows))
    assert ((images.read_labels(tmp_path / "m.png")[0] > 0) == DISC).all()
    pixels = read_pixels(tmp_path / "m.png")[0][..., 0]
    assert ((pixels == pixels.max()) == DISC).all() and pixels.min() == 0


@pytest.mark.parametrize("colour, channels", [(2, 3), (4, 2), (6, 4)])
def test_16_bits_in_each_of_several_channels_are_refused(tmp_path, colour, channels):
    wide = np.broadcast_to((200 * DISC)[..., None], (40, 40, channels)).astype(">u2")
    (tmp_path / "m.png").write_bytes(png(40, 40, 16, colour, [row.tobytes() for row in wide]))
    for read in (read_pixels, images.read_labels):
        with pytest.raises(BadInput, match="m.png: has 16 bits in each of several channels"):
            read(tmp_path / "m.png")


PICTURES = {"L": "L", "RGB": "RGB", "RGBA": "RGBA", "LA": "LA", "P": "P", "1": "1", "CMYK": "CMYK", "I;16": "I;16"}


@pytest.mark.parametrize("mode", PICTURES)
def test_pictures_of_every_mode(tmp_path, mode):
    grey = (60 + 120 * DISC).astype(np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else \
        Image.fromarray(DISC) if mode == "1" else Image.fromarray(grey).convert("RGB").quantize(4) \
        if mode == "P" else Image.fromarray(grey).convert("RGB").convert(mode)
    pixels, found = read_pixels(saved(tmp_path, image, "m.tif"))
    values = pixels.mean(2)
    assert found == [] and values[DISC].min() > values[~DISC].max()
    expected = {"1": (255, 0), "I;16": (180 * 257, 60 * 257)}.get(mode, (180, 60))
    assert np.allclose((values[DISC].mean(), values[~DISC].mean()), expected, atol=2)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("wide", [40, 30])
def test_a_picture_is_turned_as_its_tag_says(tmp_path, turn, wide):
    """Stored in each of the 8 orientations, with a mask that is upright."""
    upright = Image.fromarray((60 + 120 * DISC[:, :wide]).astype(np.uint8))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that undoes the tag's turn
    stored = upright if turn == 1 else upright.transpose(Image.Transpose(back[turn]))
    exif = Image.Exif()
    exif[274] = turn
    image = saved(tmp_path, stored, "i.jpg", exif=exif, quality=95)
    mask = saved(tmp_path, Image.fromarray(WHITE[:, :wide]))
    picture, truth, _, found = images.read_pair(image, mask)
    assert picture[0, 0][truth[0] == 1].mean() > 0.9 and picture[0, 0][truth[0] == 0].mean() < 0.1
    assert len(found) == (turn != 1) and all("EXIF" in text for text in found)


def tiff(array, bits, kind, photometric=1, turn=1):
    """A grey TIFF file of any type: kind 1 without sign, 2 with sign, 3 floating point."""
    data, (h, w) = array.tobytes(), array.shape
    tags = ((256, w), (257, h), (258, bits), (259, 1), (262, photometric), (273, 8), (274, turn), (277, 1),
            (278, h), (279, len(data)), (339, kind))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


TYPES = {"uint8": (200, 8, 1), "int8": (100, 8, 2), "uint16": (60000, 16, 1), "int16": (-300, 16, 2),
         "uint32": (3_000_000_000, 32, 1), "int32": (-70000, 32, 2), "float32": (0.25, 32, 3),
         "float64": (None, 64, 3), "uint64": (None, 64, 1)}


@pytest.mark.parametrize("name", TYPES)
def test_tiff_of_every_type(tmp_path, name):
    """Its numbers, or a refusal."""
    top, bits, kind = TYPES[name]
    (tmp_path / "i.tif").write_bytes(tiff((DISC * (top or 1)).astype(name), bits, kind))
    if top is None:
        with pytest.raises(BadInput, match="i.tif: cannot be read as an image"):
            read_pixels(tmp_path / "i.tif")
    else:
        assert (read_pixels(tmp_path / "i.tif")[0][..., 0] == np.float32(top) * DISC).all()


def test_tiff_that_stores_white_as_zero_or_is_turned(tmp_path):
    for bits, name in ((8, "uint8"), (16, "uint16")):
        (tmp_path / "i.tif").write_bytes(tiff(np.where(DISC, 0, 2**bits - 1).astype(name), bits, 1, photometric=0))
        for read in (read_pixels, images.read_labels):
            if bits == 16:
                with pytest.raises(BadInput, match="stores white as 0"):
                    read(tmp_path / "i.tif")
            else:
                assert ((read(tmp_path / "i.tif")[0].reshape(40, 40) > 0) == DISC).all()
    (tmp_path / "i.tif").write_bytes(tiff(WHITE[::-1, ::-1].copy(), 8, 1, turn=3))
    labels, found = images.read_labels(tmp_path / "i.tif")
    assert ((labels > 0) == DISC).all() and "EXIF" in found[0]


@pytest.mark.parametrize("mode", ["LAB", "PPM"])
def test_other_colours_are_refused(tmp_path, mode):
    with pytest.raises(BadInput, match="save it as RGB or grey|cannot be read"):
        read_pixels(saved(tmp_path, Image.new("LAB", (40, 40)), "i.tif") if mode == "LAB"
                           else saved(tmp_path, Image.fromarray(WHITE), "i.png", format="PPM"))


def test_pictures_without_contrast(tmp_path):
    mask = saved(tmp_path, Image.fromarray(WHITE))
    for values, words in ((np.full((40, 40), 7, np.uint8), "one value everywhere"),
                          (np.where(Y + X == 0, 65535, 3 + DISC).astype(np.uint16), None)):
        image = saved(tmp_path, Image.fromarray(values), "i.png")
        if words:
            with pytest.raises(BadInput, match=words):
                images.read_pair(image, mask)
        else:
            assert "hardly any contrast" in images.read_pair(image, mask)[3][0]


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_a_picture_in_one_colour_alone_has_contrast(tmp_path, channel):
    for side in (200, 300, 512):
        pixels = np.zeros((side, side, 3), np.uint8)
        pixels[:side // 2, :, channel] = np.arange(side) % 256
        assert images.read_alone(saved(tmp_path, Image.fromarray(pixels), "i.png"))[2] == []


def test_suspicious_masks_are_named(tmp_path):
    smooth = WHITE.copy()
    smooth[12, 13:15] = 100
    nearly = np.full((40, 40), 255, np.uint8)
    nearly[0, :5] = 0
    for values, words in ((smooth, r"2 labels above 0 (100, 255), which all count"), (nearly, "% of it is foreground")):
        assert words in images.read_labels(saved(tmp_path, Image.fromarray(values)))[1][0]
    three = saved(tmp_path, Image.fromarray(np.uint8(127) * TWO), "m.jpg", quality=95)
    assert "more than two labels" in images.read_labels(three)[1][0]


# ---- Volumes ----

VOLUME = np.random.default_rng(0).integers(0, 200, (8, 9, 5)).astype(np.int16)
RAS = np.diag([0.5, 0.6, 3.0, 1])


def raw_header(image, **fields):
    """The bytes of a NIfTI file after header fields, {name: (offset, format, values)}, were overwritten."""
    content = bytearray(image.to_bytes())
    for offset, kind, *values in fields.values():
        struct.pack_into("<" + kind, content, offset, *values)
    return bytes(content)


def nifti(array=VOLUME, affine=RAS, kind=nibabel.Nifti1Image):
    image = kind(array, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    return image


@pytest.mark.parametrize("affine", [RAS, np.diag([-0.5, -0.6, 3.0, 1]), RAS[[2, 0, 1, 3]]])
@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_millimetres_come_from_the_affine(tmp_path, affine, name):
    """Whatever pixdim says, and however the rows are stored; the contradiction is a warning."""
    content = raw_header(nifti(affine=affine), zooms=(80, "3f", 1, 1, 1))
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    voxels, _, sizes, found = volumes.read_nifti(tmp_path / name)
    assert sorted(sizes) == pytest.approx([0.5, 0.6, 3.0])
    assert len(found) >= 1 and "in its affine, which is used" in found[0]
    assert volumes.read_nifti(write(tmp_path / "w.nii", nifti(affine=affine)))[3] == []
    assert np.sort(voxels.ravel()).tolist() == np.sort(VOLUME.ravel()).tolist()


def write(file, image):
    file.write_bytes(image.to_bytes())
    return file


def test_qform_against_sform(tmp_path):
    image = nifti()
    image.set_qform(np.diag([0.5, 0.6, 4.0, 1]), 1)
    found = volumes.read_nifti(write(tmp_path / "v.nii", image))[3]
    assert any("qform and its sform differ" in text for text in found)


@pytest.mark.parametrize("affine, words", [
    (np.diag([0, 0.6, 3, 1]), "no possible place"), (np.diag([np.nan, 0.6, 3, 1]), "no possible place"),
    (np.diag([500, 0.6, 3, 1]), "sides of"), (np.diag([0.5, 0.6, 1e-4, 1]), "sides of")])
def test_impossible_headers_are_refused(tmp_path, affine, words):
    content = raw_header(nifti(), sform=(280, "12f", *np.asarray(affine, float)[:3].ravel()))
    (tmp_path / "v.nii").write_bytes(content)
    with pytest.raises(BadInput, match=words):
        volumes.read_nifti(tmp_path / "v.nii")


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("axes", [0, 1, 3])
def test_trailing_axes_of_one(tmp_path, kind, axes):
    image = nifti(VOLUME.reshape(*VOLUME.shape, *[1] * axes), kind=kind)
    voxels, *_ = volumes.read_nifti(write(tmp_path / "v.nii", image))
    assert voxels.shape == VOLUME.shape


def test_every_flipped_bit_of_a_compressed_volume_is_seen(tmp_path):
    content = bytearray(gzip.compress(nifti().to_bytes(), mtime=0))
    random, seen = np.random.default_rng(1), 0
    for at in random.integers(10, len(content), 60):
        spoilt = content.copy()
        spoilt[at] ^= 1 << random.integers(8)
        (tmp_path / "v.nii.gz").write_bytes(spoilt)
        with pytest.raises(BadInput, match="v.nii.gz: cannot be read as NIfTI"):
            volumes.read_nifti(tmp_path / "v.nii.gz")
        seen += 1
    assert seen == 60


def test_a_second_volume_in_a_file_is_named(tmp_path):
    (tmp_path / "v.nii.gz").write_bytes(2 * gzip.compress(nifti().to_bytes()))
    voxels, _, _, found = volumes.read_nifti(tmp_path / "v.nii.gz")
    assert voxels.shape == VOLUME.shape and f"holds {352 + 2 * VOLUME.size} bytes behind its voxels" in found[0]


def test_every_flipped_or_missing_bit_of_a_png_is_seen(tmp_path):
    content = saved(tmp_path, Image.fromarray(WHITE)).read_bytes()
    for at in range(8 * 8, 8 * len(content), 5):
        spoilt = bytearray(content)
        spoilt[at // 8] ^= 1 << at % 8
        (tmp_path / "m.png").write_bytes(spoilt)
        with pytest.raises(BadInput, match="m.png: cannot be read as an image"):
            images.read_labels(tmp_path / "m.png")
    for length in range(len(content)):
        (tmp_path / "m.png").write_bytes(content[:length])
        with pytest.raises(BadInput, match="m.png: cannot be read as an image"):
            images.read_labels(tmp_path / "m.png")


@pytest.mark.parametrize("labels, words", [
    (np.float32(0.5), "not whole numbers"), (np.float32(1.1), "not whole numbers"),
    (np.int16(-1), "negative")])
def test_labels_that_are_none(tmp_path, labels, words):
    array = np.zeros(VOLUME.shape, labels.dtype)
    array[2:4] = labels
    with pytest.raises(BadInput, match=words):
        volumes.read_labels(write(tmp_path / "v.nii", nifti(array)))


def test_a_volume_without_contrast_or_organ(tmp_path):
    mask = write(tmp_path / "m.nii", nifti((VOLUME > 100).astype(np.uint8)))
    spot = np.zeros(VOLUME.shape, np.int16)
    spot[0, 0, 0] = 9
    for array, words in ((spot * 0 + 3, "one value everywhere"), (spot, "nothing is left")):
        with pytest.raises(BadInput, match=words):
            volumes.read_pair(write(tmp_path / "v.nii", nifti(array)), mask)
    empty = write(tmp_path / "m.nii", nifti(np.zeros(VOLUME.shape, np.uint8)))
    assert "no foreground at all" in volumes.read_pair(write(tmp_path / "v.nii", nifti()), empty)[3][0]
    with pytest.raises(BadInput, match="all of it is foreground"):
        volumes.read_labels(write(tmp_path / "m.nii", nifti(np.ones(VOLUME.shape, np.uint8))))


# ---- Folders ----

def test_warnings_are_one_line_a_site_and_listed_by_check_data(tmp_path, monkeypatch, capsys):
    folder = write_prostate(tmp_path / "d", cases=8)
    for case in (0, 1):
        file = folder / "a" / f"Case{case}_segmentation.nii.gz"
        mask = nibabel.load(file)
        nibabel.save(nibabel.Nifti1Image(np.asarray(mask.dataobj) * 0, mask.affine), file)
    load_sites(prostate_config(folder))
    err = capsys.readouterr().err
    assert err.startswith("warning: a: ") and "(2 warnings in all" in err and err.count("\n") == 1
    code, out, err = run_here(monkeypatch, capsys, check_data, tmp_path, "d", "--task", "prostate")
    assert code == 0 and err == "" and "\n2 warnings\n" in out and out.count("no foreground at all") == 2
    assert out.endswith("\n0 problems\n")


@pytest.mark.parametrize("place", ["more/x.tif", "x.jpg", "masks/x.dcm", "old/a.nii.gz", "list.txt"])
def test_nothing_that_could_be_data_vanishes(tmp_path, place, capsys):
    folder = write_nuclei(tmp_path / "d")
    file = folder / "a" / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x")
    load_sites(nuclei_config(folder))
    err = capsys.readouterr().err
    assert f"{file.parent}: 1 file that could be data is not read, such as {file.name}" in err
    (folder / "loose.png").write_bytes(b"x")
    load_sites(nuclei_config(folder))
    assert "2 warnings in all" in capsys.readouterr().err


@pytest.mark.parametrize("stray", ["slide_info.csv", "Slide_notes.txt", "GT_readme.txt", ".list.txt"])
def test_a_stray_file_does_not_change_the_layout(tmp_path, stray):
    folder = write_nuclei(tmp_path / "d")
    (folder / "a" / stray).write_text("x")
    assert [len(entries) for entries in list_files(folder, "nuclei")[0].values()] == [5, 5]
    assert list_files(folder, "nuclei")[1] == []


def test_names_match_as_a_person_sees_them(tmp_path):
    folder = write_nuclei(tmp_path / "d", cases=3)
    a = folder / "a"
    (a / "images" / "0.png").rename(a / "images" / "e\u0301t\u00e9.PNG")
    (a / "masks" / "0.png").rename(a / "masks" / "\u00c9te\u0301.png")
    (a / "images").rename(a / "Images")
    entries, problems = list_files(folder, "nuclei")
    assert problems == [] and {entry.case for entry in entries["a"]} == {"\u00e9t\u00e9", "1", "2"}


@pytest.mark.parametrize("place", ["a/images/0.png", "a/masks/0.png"])
def test_only_regular_files_are_opened(tmp_path, place):
    folder = write_nuclei(tmp_path / "d")
    (folder / place).unlink()
    os.mkfifo(folder / place)
    with pytest.raises(BadInput, match=r"0.png: is no regular file"):
        load_sites(nuclei_config(folder))


def test_names_in_any_encoding(tmp_path, monkeypatch, capsys):
    folder = write_nuclei(tmp_path / "d")
    os.rename(os.fsencode(folder / "b"), os.fsencode(folder) + b"/caf\xe9")
    os.rename(os.fsencode(folder / "a" / "images" / "0.png"), os.fsencode(folder / "a" / "images") + b"/\xff.png")
    os.rename(os.fsencode(folder / "a" / "masks" / "0.png"), os.fsencode(folder / "a" / "masks") + b"/\xff.png")
    entries, problems = list_files(folder, "nuclei")
    assert problems == [] and set(entries) == {"a", "caf\\xe9"} and "\\xff" in {e.case for e in entries["a"]}
    code, _, err = run_here(monkeypatch, capsys, check_data, tmp_path, "d", "--task", "nuclei")
    assert (code, err) == (0, "")


def test_two_layouts_in_one_site(tmp_path):
    folder = write_nuclei(tmp_path / "d")
    (folder / "a" / "Slide_01").mkdir()
    (folder / "a" / "images" / "0.png").rename(folder / "a" / "Slide_01" / "0.png")
    entries, problems = list_files(folder, "nuclei")
    assert problems == [] and len(entries["a"]) == 5
    assert all(entry.image.stem == entry.masks[0].stem for entry in entries["a"])


def test_memory_that_runs_out_names_the_file(tmp_path, monkeypatch):
    def no_memory(*_):
        raise MemoryError
    folder = write_nuclei(tmp_path / "d")
    monkeypatch.setattr(images, "scale", no_memory)
    with pytest.raises(BadInput, match=r"a/images/.*png: there is not enough memory"):
        load_sites(nuclei_config(folder))


def test_a_file_without_permission_says_so(tmp_path, monkeypatch):
    file = saved(tmp_path, Image.fromarray(WHITE))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(file))
    monkeypatch.setattr(images.Image, "open", refuse)
    with pytest.raises(BadInput, match="m.png: cannot be opened \\(Permission denied\\)"):
        images.read_labels(file)


def test_a_truncated_picture(tmp_path):
    content = io.BytesIO()
    Image.fromarray(WHITE).save(content, "png")
    (tmp_path / "m.png").write_bytes(content.getvalue()[:60])
    with pytest.raises(BadInput, match="m.png: cannot be read as an image"):
        images.read_labels(tmp_path / "m.png")
