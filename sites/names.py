"""Names: which mask belongs to which image, by the names of files and folders that people use."""

import re
from collections import defaultdict

from sites.layouts import Entry, as_seen, look, stem_of

IMAGE_FOLDERS = {"image", "images", "img", "imgs", "imagestr"}
MASK_FOLDERS = {"mask", "masks", "gt", "gts", "groundtruth", "groundtruths", "label", "labels", "labelstr",
                "annotation", "annotations", "segmentation", "segmentations", "seg", "segs"}
OTHER_FOLDERS = {"imagests", "labelsts"}  # of nnU-Net's test images, which often have no masks
SLIDE = re.compile(r"(?is)((?:.+/)?)(slide|gt)_([^/]+)")  # Slide_01, GT_01: a patient's in the TNBC download
WORD = r"(?P<word>masks?|gt|seg|segmentations?|labels?|annotations?|ground[ _-]?truth)"
SUFFIX = re.compile(rf"(?is)(?:(?P<base>.*?)[ _.-]+)?{WORD}(?:[ _.-]*(?P<number>\d+))?")  # x_mask, x_mask_1
PREFIX = re.compile(rf"(?is){WORD}[ _.-]+(?P<base>.+)")           # mask_x
NUMBER = re.compile(r"(?s)(?P<base>.+?)[ _.-]+(?P<number>\d+)")  # x_1, in a folder of masks
IMAGE_WORD = re.compile(r"(?is)(?:images?|img|imaging|volume)[ _.-]+(.+)|(.+?)[ _.-]+"
                        r"(?:images?|img|imaging|volume|000\d)")        # image_x, x_image, nnU-Net's x_0000


def role_of(folders):
    """Return what the last telling name among `folders` says of their files: image, mask, other or None."""
    for name in reversed(folders):
        plain = re.sub(r"[\W_]", "", look(name))
        for role, names in (("image", IMAGE_FOLDERS), ("mask", MASK_FOLDERS), ("other", OTHER_FOLDERS)):
            if plain in names:
                return role
    return None


class Name:
    """What the place and the name of a file say; top: the folder below which folders count."""

    def __init__(self, path, top):
        folders = path.relative_to(top).parts[:-1]
        self.path, self.stem, self.role = path, stem_of(path), role_of(folders)
        self.folder = "/".join(as_seen(name) for name in folders if not role_of([name]))
        self.slide = None if self.role else SLIDE.fullmatch(self.folder)
        self.key, word = (look(self.folder), look(self.stem)), IMAGE_WORD.fullmatch(self.stem)
        self.short = look(word[1] or word[2]) if word else self.key[1]  # without a word for image


def sort_files(site, paths):
    """Return the Names of a site's images and of its masks. In a folder named images all are images, in one
    named masks all are masks. Where one is missing, the files beside them count, and a mask is called so."""
    names = [Name(path, site) for path in paths]
    words = {name: name.slide[2].lower() for name in names if name.slide}
    slides = "slide" in words.values()
    for name, word in words.items():
        if slides:
            name.role = "image" if word == "slide" else "mask"
            name.key = look(name.slide[1] + name.slide[3]), name.key[1]
        else:  # GT_450 is a scanner, or whatever
            name.slide = None
    images, masks, beside = ([name for name in names if name.role == role]
                             for role in ("image", "mask", None))
    if masks:
        return images or beside, masks
    called = [name for name in images + beside if SUFFIX.fullmatch(name.stem) or PREFIX.fullmatch(name.stem)]
    known = index_of([name for name in images or beside if name not in called])
    masks = [name for name in called if find_image(name, known) or
             (name.role is None and not images and SUFFIX.fullmatch(name.stem))]
    return [name for name in images or beside if name not in masks], masks


def index_of(images):
    """Return {key: [image]} of the keys under which `find_image` looks for images."""
    known = defaultdict(list)
    for image in images:
        folder, stem = image.key
        for key in {("exact", folder, stem), ("short", folder, image.short), ("any", stem),
                    ("any", image.short), ("only", folder)}:
            known[key].append(image)
    return known


def possible(name):
    """Return [(stem of the image, family, number)] that a mask may belong to, the likeliest first; masks of
    one family and of different numbers may belong to one image."""
    found = [(name.stem, "", "")] * (name.role == "mask")
    for pattern in (PREFIX, SUFFIX, *[NUMBER] * (name.role == "mask")):
        if match := pattern.fullmatch(name.stem):
            part = {"word": "", "number": ""} | match.groupdict("")
            found.append((part["base"], look(part["word"]), part["number"]))
    return found


def find_image(mask, known):
    """Return (image, family, number) of a mask, None if there is none. known: from `index_of`."""
    folder, only = mask.key[0], known.get(("only", mask.key[0]), [])
    only = only[0] if folder and len(only) == 1 and not mask.slide else None
    for base, family, number in possible(mask):
        stem = look(base)
        found = known.get(("exact", folder, stem)) or known.get(("short", folder, stem))
        elsewhere = [image for image in known.get(("any", stem), [])
                     if "" in (folder, image.key[0]) and not mask.slide]
        if found or len(elsewhere) == 1:  # a folder below images alone, or below masks alone
            return (found or elsewhere)[0], family, number
        if only and not base:  # x/image.png beside x/mask.png
            return only, family, number
    if only and mask.role == "mask" and only.key[1] in (folder.rpartition("/")[2], *IMAGE_FOLDERS):
        return only, "of the only image", mask.stem  # x/images/x.png beside x/masks/*.png
    return None


def pair_files(images, masks):
    """Return the entries of the Names of images and masks, problems, and [(image, None) or (None, mask)] of
    those without a partner. A case is an image's name, below a folder if there are several, or a slide."""
    known, of_image, problems, unpaired = index_of(images), defaultdict(list), [], []
    for mask in masks:
        image, *which = find_image(mask, known) or (None,)
        if image:
            of_image[image.path].append((*which, mask.path))
        else:
            unpaired.append((None, mask.path))
    entries, folders = [], {image.folder for image in images}
    slides = any(mask.slide for mask in masks)
    for image in images:
        first, found = known[("exact", *image.key)][0], sorted(of_image[image.path], key=lambda mask: mask[2])
        alike = known[("short", image.key[0], image.short)] if not found else []
        first = next((other for other in alike if of_image.get(other.path)), first)
        if first is not image:
            problems.append(f"{image.path}: {in_folder(first.path)} is a second image of that name, keep one")
        elif not found:
            unpaired.append((image.path, None))
        else:
            if two_ways(found):
                problems.append(f"{found[1][2]}: {in_folder(found[0][2])} is a second mask of "
                                f"{in_folder(image.path)}; keep one, or join them in a table")
                found = found[:1]
            case = [image.folder] * (len(folders) > 1 and image.folder != "") + [as_seen(image.stem)]
            case = image.folder if slides and image.slide else "/".join(case)
            entries.append(Entry(case, image.path, tuple(path for _, _, path in found)))
    return entries, problems, unpaired


def in_folder(path):
    """Return a file's name with its folder."""
    return f"{path.parent.name}/{path.name}"


def two_ways(found):
    """Return whether the masks (family, number, path) of one image could be something else than its parts:
    of two families or folders, of one number, or of a number beside one that is called as the image is."""
    families, numbers = {(family, path.parent) for family, _, path in found}, [mask[1] for mask in found]
    return len(families) > 1 or len(set(numbers)) < len(numbers) or (
        len(found) > 1 and "" in numbers and found[0][0] == "")
