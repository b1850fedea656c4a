"""Which files of a folder or of a table are whose images and masks: layouts, names, patients, tables."""

import os

import nibabel
import numpy as np
import pytest
from PIL import Image

import check_data
from config import BadInput
from datasets import load_sites, splits_of
from flower.site_rules import load_own_site, mark_of
from sites.across import unread
from sites.advice import DATA_KINDS, format_advice
from sites.layouts import IMAGE_KINDS, VOLUME_KINDS, list_files
from sites.patients import shared_names
from sites.readers import read_sample
from test_fedbcs import write_nuclei
from tests.helpers import nuclei_config, prostate_config, run_here, write_prostate


def touch(folder, *names):
    """Make empty files; returns the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def found(folder, task="images"):
    """{image: [masks]} below a site's folder, and the problems."""
    entries, problems = list_files(folder, task)
    return {str(entry.image.relative_to(folder / "a")): [
        str(mask.relative_to(folder / "a")) for mask in entry.masks]
        for entry in entries["a"]}, problems


# ---- Names ----

PAIRS = [("images/{}.png", f"{folder}/{{}}.tif") for folder in (
    "masks", "Mask", "LABELS", "gt", "GroundTruth", "Ground truth", "annotations", "segmentation")]
PAIRS += [("images/p{}.jpg", f"masks/p{{}}{ending}.png") for ending in (
    "_mask", "_gt", "_seg", "_Segmentation", "-label", " mask", ".seg", "_mask_1", "_GT")]
PAIRS += [("p{}.jpg", f"p{{}}{end}.png") for end in ("_mask", "_gt", "_SEG", "_segmentation", "_mask_1")]
PAIRS += [
    ("images/{}.jpg", "images/{}_mask.png"), ("image_{}.png", "mask_{}.png"),
    ("images/{}_img.png", "masks/{}_seg.png"),
    ("imagesTr/c_{}_0000.png", "labelsTr/c_{}.png"), ("images/v_000{}.jpg", "masks/v_000{}.png"),
    ("{}/images/{}.png", "{}/masks/8a{}f.png"), ("images/batch{}/{}.png", "masks/batch{}/{}.png"),
    ("images/batch{}/{}.png", "masks/{}.png"), ("pictures/{}.png", "masks/{}.png"),
    ("{}.png", "masks/{}.png"), ("P{}/{}.png", "P{}/{}_mask.png"), ("P{}/image.png", "P{}/mask.png"),
    ("images/x_label_{}.png", "masks/x_label_{}.png"), ("Slide_{}/{}_1.png", "GT_{}/{}_1.png"),
    ("P{}/x.png", "P{}/x_segmentation.png"), ("images/slide_{}/{}.png", "masks/slide_{}/{}.png"),
    ("images/{}.png", "masks/slide_{}/{}.png"), ("images/GT_{}/{}.png", "masks/GT_{}/{}.png"),
    ("images/slide/{}.png", "masks/slide/{}.png"), ("GT_{}/x.png", "GT_{}/x_mask.png")]
VOLUMES = [("imagesTr/c_{}_0000.nii.gz", "labelsTr/c_{}.nii.gz"), ("c{}.nii.gz", "c{}_seg.nii"),
           ("volume-{}.nii", "segmentation-{}.nii"),
           ("case_{}/imaging.nii.gz", "case_{}/segmentation.nii.gz")]


@pytest.mark.parametrize("image, mask", [*PAIRS, *VOLUMES])
def test_a_mask_is_found_by_the_names_that_people_use(tmp_path, image, mask):
    names = {image.replace("{}", k): [mask.replace("{}", k)] for k in "012"}
    for name, masks in names.items():
        touch(tmp_path / "a", name, *masks)
    task = "volumes" if ".nii" in image else "images"
    entries = list_files(tmp_path, task)[0]["a"]
    assert found(tmp_path, task) == (names, []) and unread(tmp_path, entries) == []
    assert len({entry.case for entry in entries}) == 3


@pytest.mark.parametrize("place, cases", [
    ("Slide_0{0}/{1}.png GT_0{0}/{1}.png", {"Slide_01", "Slide_02"}),
    ("images/slide_{0}/{1}.png masks/{1}.png", {"slide_1/1", "slide_1/2", "slide_2/3", "slide_2/4"}),
    ("GT_{0}/{1}.png GT_{0}/{1}_mask.png", {"GT_1/1", "GT_1/2", "GT_2/3", "GT_2/4"}),
    ("slide_images/{1}.png masks/{1}.png", {"1", "2", "3", "4"})])
def test_a_slide_is_a_case_only_beside_the_folder_of_its_masks(tmp_path, place, cases):
    for slide, name in ((1, 1), (1, 2), (2, 3), (2, 4)):
        touch(tmp_path / "a", *place.format(slide, name).split())
    entries, problems = list_files(tmp_path, "images")
    assert problems == [] and {entry.case for entry in entries["a"]} == cases
    if place.startswith("Slide"):
        touch(tmp_path / "a", "Slide_01/thumbs/9.png", "GT_01/thumbs/9.png")
        assert {entry.case for entry in list_files(tmp_path, "images")[0]["a"]} == cases


@pytest.mark.parametrize("image, mask, parts", [
    ("images/{}.png", "masks/{}_mask_{}.png", ["1", "2", "10"]),
    ("images/x{}.png", "masks/x{}_{}.png", ["0", "1"]),
    ("{}/images/{}.png", "{}/masks/{}f.png", ["00e", "1a"]), ("b ({}).png", "b ({})_mask{}.png", ["", "_1"])])
def test_several_masks_of_an_image_are_united(tmp_path, image, mask, parts):
    names = {image.replace("{}", k): [mask[::-1].replace("}{", part[::-1], 1)[::-1].replace("{}", k)
                                      for part in parts] for k in "34"}
    for name, masks in names.items():
        touch(tmp_path / "a", name, *masks)
    assert {image: sorted(masks) for image, masks in found(tmp_path)[0].items()} == {
        image: sorted(masks) for image, masks in names.items()} and found(tmp_path)[1] == []
    warning, = unread(tmp_path, list_files(tmp_path, "images")[0]["a"])
    assert f"its {len(parts)} masks are united" in warning and "those of 1 other images" in warning


@pytest.mark.parametrize("names, words", [
    (("images/1.png", "masks/1.png", "masks/1_mask.png"),
     "1_mask.png: masks/1.png is a second mask of images/1.png"),
    (("images/1.png", "masks/1.png", "masks/1_1.png"), "masks/1_1.png: masks/1.png is a second mask"),
    (("images/1.png", "masks/1.png", "labels/1.png"), "masks/1.png: labels/1.png is a second mask"),
    (("1.png", "1_mask.png", "1_seg.png"), "1_seg.png: a/1_mask.png is a second mask"),
    (("1.png", "1_mask_1.png", "1_seg_2.png"), "1_seg_2.png: a/1_mask_1.png is a second mask"),
    (("1.png", "1_mask_1.png", "1_mask_1.tif"), "1_mask_1.tif: a/1_mask_1.png is a second mask"),
    (("images/1.png", "masks/1.png", "masks/1.bmp"), "masks/1.png: masks/1.bmp is a second mask"),
    (("imagesTr/x_0000.png", "imagesTr/x_0001.png", "labelsTr/x.png"),
     "x_0001.png: imagesTr/x_0000.png is a second image"),
    (("images/21_training.tif", "1st_manual/21_manual1.tif"), "1st_manual/21_manual1.tif looks like it"),
    (("images/P1/1.png", "masks/P2/1.png"),
     "images/P1/1.png: has no mask of that name; masks/P2/1.png looks like it"),
    (("Slide_1/1.png", "GT_1/2.png"), "Slide_1/1.png: has no mask of that name; GT_1/2.png looks like it"),
    (("Slide_1/1.png", "GT_1/1.png", "images/2.png", "GT_1/2.png"), "GT_1/2.png: has no image of that name"),
    (("Slide_1/x.png", "GT_1/mask.png"), "GT_1/mask.png: has no image of that name"),
    (("images/1.png", "masks/1.gif"), "masks/1.gif may be it: GIF, which is not read; save it as .png"),
    (("images/1.png", "1.geojson"), "1.geojson may be it: a text of outlines"),
    (("1.dcm", "2.dcm"), "files such as 1.dcm: DICOM, which is not read; convert"),
    (("1.nii.gz", "1_seg.nii.gz"), "set task=volumes"), (("list.txt",), "list.txt is not read")])
def test_what_could_be_read_two_ways_or_not_at_all_names_file_and_remedy(tmp_path, names, words):
    _, problems = found(touch(tmp_path, *(f"a/{name}" for name in names)))
    assert any(words in text for text in problems), problems
    assert any("--write" in text for text in problems) == (" of that name; " in problems[0])


def test_a_folder_at_the_wrong_level_and_links_to_folders(tmp_path):
    touch(tmp_path / "b", "__MACOSX/x.png", ".hidden/x.png")
    touch(tmp_path / "d", "images/1.png", "masks/1.png")
    assert "is the folder of one site" in list_files(tmp_path / "d", "images")[1][0]
    assert "has no site folders" in list_files(tmp_path / "b", "images")[1][0]
    (tmp_path / "c" / "a").mkdir(parents=True)
    (tmp_path / "c" / "a" / "images").symlink_to(tmp_path / "d" / "images")
    (tmp_path / "c" / "a" / "masks").symlink_to(tmp_path / "d" / "masks")
    (tmp_path / "d" / "masks" / "loop").symlink_to(tmp_path / "c" / "a" / "masks")
    assert found(tmp_path / "c") == ({"images/1.png": ["masks/1.png"]}, [])


def test_dicom_without_an_ending_and_every_format_has_advice(tmp_path):
    touch(tmp_path, "a/IM0001")
    (tmp_path / "a" / "IM0001").write_bytes(bytes(128) + b"DICM")
    assert "IM0001: DICOM" in list_files(tmp_path, "volumes")[1][0]
    read = {*IMAGE_KINDS, *VOLUME_KINDS}
    assert all((format_advice(f"x{kind}") is None) == (kind in read) for kind in DATA_KINDS)
    assert len(DATA_KINDS) > 35


# ---- Patients ----

def cases_of(folder, pattern=None):
    """The number of cases of each site."""
    entries, problems = list_files(folder, "images", pattern)
    assert problems == []
    return {site: len({entry.case for entry in of_site}) for site, of_site in entries.items()}


@pytest.mark.parametrize("names, cases", [
    (["TCGA-B0-5698_q0", "TCGA-B0-5698_q1", "TCGA-B0-5710_q0", "TCGA-B0-5710_q1"], 2),
    (["t_01_1", "t_01_2", "t_02_1", "t_02_10", "t_03_1"], 3), (["P00_L", "P00_R", "P01_L"], 2),
    (["P0.L", "P0.R", "P1.left"], 2), (["P0L", "P0R", "P1L"], 2), (["P1/1", "P1/2", "P2/1"], 2),
    (["P1_frame001", "P1_frame002", "P2_frame001"], 2)])
def test_patients_that_the_names_show_are_said_with_the_pattern_that_joins_them(tmp_path, names, cases):
    for name in names:
        touch(tmp_path, f"a/images/{name}.png", f"a/masks/{name}.png")
    text, = shared_names(list_files(tmp_path, "images")[0]).values()
    pattern = text.split("case_pattern='")[1].split("'")[0]
    assert f"which makes {cases} cases of {len(names)} images" in text
    assert cases_of(tmp_path) == {"a": len(names)} and cases_of(tmp_path, pattern) == {"a": cases}
    assert shared_names(list_files(tmp_path, "images", pattern)[0]) == {}


@pytest.mark.parametrize("names", [
    ["Case00", "Case01", "Case02"], ["alpha000", "alpha001"], ["img_1", "img_2", "img_3"], ["1", "2", "10"],
    ["P1_1", "P1_2", "P1_3"],
    ["TCGA-G9-6336-01Z-00-DX1", "TCGA-G9-6348-01Z-00-DX1"], ["benign_1", "benign_2", "malignant_1"],
    ["train/1", "train/2", "test/1"], ["b1/1", "2", "b1/3"]])
def test_names_that_are_only_numbered_are_no_patients(tmp_path, names):
    for name in names:
        touch(tmp_path, f"a/images/{name}.png", f"a/masks/{name}.png")
    assert shared_names(list_files(tmp_path, "images")[0]) == {}


def test_one_pattern_for_all_sites_where_there_is_one(tmp_path, monkeypatch, capsys):
    """Training says it once a site, unless splits are given; check_data.py lists it."""
    write_nuclei(tmp_path / "d", ("a", "b", "c"), cases=4)
    for site, names in (("a", ["x1_q0", "x1_q1", "x2_q0", "x2_q1"]),
                        ("b", ["y1_1", "y1_2", "y2_1", "y3_1"])):
        for kind in ("images", "masks"):
            folder = tmp_path / "d" / site / kind
            for k, name in enumerate(names):
                (folder / f"{k}.png").rename(folder / f"{name}.png")
    splits = splits_of(load_sites(nuclei_config(tmp_path / "d")))
    lines = [line for line in capsys.readouterr().err.splitlines() if "one patient" in line]
    assert [line.split(":")[1] for line in lines] == [" a", " b"]
    assert all(r"case_pattern='^(.+?)(_\d+|_q\d+)?\.'" in line for line in lines)
    load_own_site("a", nuclei_config(tmp_path / "d" / "a"))
    assert "warning: a: 4 images share" in capsys.readouterr().err
    load_sites(nuclei_config(tmp_path / "d"), splits)
    assert capsys.readouterr().err == ""
    code, out, _ = run_here(monkeypatch, capsys, check_data, tmp_path, "d", "--task", "nuclei",
                            "image_size=32", r"case_pattern=^(.+?)(_q\d+)?\.")
    assert code == 0 and out.count("one patient would train and test") == 1
    assert "a\n  images    4 of 4 readable\n  cases     2\n" in out


# ---- Tables ----

HEADER = "image,mask,site,case\n"
LINES = "".join(f"d/a/images/{k}.png,d/a/masks/{k}.png,a,c{k}\n" for k in range(4))
PLAIN = HEADER + LINES
NAMED = {f"c{k}" for k in range(4)}


def table(folder, content):
    """A table beside a data folder d of two sites; returns its path."""
    write_nuclei(folder / "d", cases=4)
    (folder / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / "t.csv"


@pytest.mark.parametrize("content", [
    PLAIN, b"\xef\xbb\xbf" + PLAIN.encode(), PLAIN.encode("utf-16"), PLAIN.replace("\n", "\r\n"),
    PLAIN.replace(",", ";"), "sep=;\r\n" + PLAIN.replace(",", ";"), PLAIN.replace(",", "\t"),
    PLAIN.replace("/", "\\"), "sep=;\n" + PLAIN, '"sep=,"\r\n' + PLAIN.replace(",", "\t"),
    "\nSEP=;\r\n\n" + PLAIN,
    "\n" + PLAIN.replace("image,mask", " Image ,MASK").replace(",", " , ") + "\n,,,\n",
    PLAIN.replace("d/a/images/0.png", '"d/a/images/0.png"').replace("\n", ",\n"),
    PLAIN.replace("d/a/masks/0.png", '"d/a/masks/0.png;d/b/masks/0.png"').replace(",", ";")])
def test_a_table_as_programs_write_it(tmp_path, content):
    entries, problems = list_files(table(tmp_path, content), "nuclei")
    assert problems == [] and {entry.case for entry in entries["a"]} == NAMED and len(entries) == 1
    assert [entry.image.name for entry in entries["a"]] == ["0.png", "1.png", "2.png", "3.png"]


@pytest.mark.parametrize("content, words", [
    ("", "has no column image"), (HEADER, "has no line below its header"), (LINES, "has no column image"),
    ("image,mask\nx,y\n", "has no column site"), ("image,site\nx,a\n", "has no column mask"),
    ("image,mask,mask,site\n", "two columns mask"),
    ("image,mask,mask_1,site\n", "the columns mask and mask_1"),
    ("image,mask,site,spilt\n", "a column spilt; call it split"),
    ("image,mask,site,patient\n", "call it case"),
    (PLAIN + "d/b/images/0.png,,a,c\n", "line 6: its mask is empty"),
    (PLAIN + ",x,a,c\n", "line 6: its image is empty"),
    (PLAIN + "d/b/images/0.png,d/b/masks/0.png,,c\n", "its site is empty"),
    (PLAIN + "d/b/images/0.png,d/b/masks/0.png,a,\n", "its case is empty"),
    (PLAIN + "d/b/images/0.png,d/b/masks/0.png,a/b,c\n", "its site 'a/b' cannot be"),
    (PLAIN + LINES, "line 6: names the image of line 2 again"),
    (PLAIN.replace("masks/1", "images/1"), "line 3: names one file twice"),
    (PLAIN + "../x.png,d/b/masks/0.png,a,c\n", "leads out of"),
    (PLAIN + "d/7.png,d/b/masks/0.png,a,c\n", "d/7.png does not exist"),
    (PLAIN + "sep=7.png,d/b/masks/0.png,a,c\n", "sep=7.png does not exist"),
    (PLAIN + "d/b/images,d/b/masks/0.png,a,c\n", "is no regular file"),
    (PLAIN + "x\0.png,x,a,c\n", r"x\0.png does not exist"),
    (PLAIN + "x.mha,d/b/masks/0.png,a,c\n", "x.mha is MetaImage, which is not read; convert"),
    (PLAIN + "x.nii,d/b/masks/0.png,a,c\n", "x.nii is of task volumes, which is not read; set task=volumes"),
    (PLAIN + "x,y,a,c,d,e\n", "line 6: has 6 cells"), (PLAIN + '"x,y\n', "cannot be read as a table"),
    ("image,mask,site\nd/a/images/0.png,d/a/masks/0.png,a\nd/b/images/0.png,d/b/masks/0.png,a\n",
     "line 3: has an image called 0, as line 2 has")])
def test_a_table_that_is_wrong_names_line_and_remedy(tmp_path, content, words):
    touch(tmp_path, "x.mha", "x.nii")
    file = table(tmp_path, content)
    with pytest.raises(BadInput, match=r"t\.csv: ") as problem:
        load_sites(nuclei_config(file))
    assert words in str(problem.value) and "\n" not in str(problem.value)


def test_a_table_splits_and_names_what_contradicts(tmp_path, capsys):
    def rows(*splits, case="c{}"):
        lines = zip(LINES.splitlines(), splits)
        return "image,mask,site,case,split\n" + "".join(
            f"{line.rpartition(',')[0]},{case.format(k)},{split}\n" for k, (line, split) in enumerate(lines))

    file = table(tmp_path, rows("train", "Training", "VAL", "test"))
    assert splits_of(load_sites(nuclei_config(file))) == {
        "a": {"train": ["c0", "c1"], "val": ["c2"], "test": ["c3"]}}
    assert load_own_site("a", nuclei_config(file)).test[0].case == "c3"
    for override, words in (("folds=3", "folds: contradicts the column split"),
                            ("case_pattern=(.)", "has the column case")):
        with pytest.raises(BadInput, match=words):
            load_sites(nuclei_config(file, override))
    with pytest.raises(BadInput, match=r"t\.csv: has no site b"):
        load_own_site("b", nuclei_config(file))
    for content, words in (
            (rows("train", "", "val", "test"), "line 3: its split is empty"),
            (rows("train", "fold1", "val", "test"), "line 3: its split is fold1"),
            (rows("train", "train", "val", "test", case="c"), "line 4: its split is val, that of line 2")):
        file.write_text(content)
        with pytest.raises(BadInput, match=words):
            load_sites(nuclei_config(file))
    file.write_text(rows(*[""] * 4).replace("image,", "age,image,").replace("\nd/", "\n7,d/"))
    capsys.readouterr()
    assert len(load_sites(nuclei_config(file))[0].train) == 2
    assert "its column age is not read" in capsys.readouterr().err
    file.write_text(PLAIN.replace("masks/1", "masks/0"))
    entries, _ = list_files(file, "nuclei")
    assert ["masks/0.png is the mask of 2 images" in text for text in unread(file, entries["a"])] == [True]


def test_masks_of_a_table_are_united_or_are_classes(tmp_path):
    file = table(tmp_path, "image,mask,site\nd/a/images/0.png,d/a/masks/0.png;d/a/masks/1.png,a\n")
    masks = [np.asarray(Image.open(tmp_path / "d" / "a" / "masks" / f"{k}.png")) > 0 for k in (0, 1, 2)]

    def truth(classes=2):
        entries, problems = list_files(file, "nuclei")
        sample = read_sample(entries["a"][0], "a", "nuclei", 32, classes)
        assert problems == [] and {*sample.facts["labels"], 0} == set(range(classes))
        return sample.truth[0]

    assert (truth() == (masks[0] | masks[1])).all()
    other = np.uint8(255) * ~(masks[0] | masks[1])
    Image.fromarray(other).save(tmp_path / "d" / "a" / "masks" / "o.png")
    file.write_text("image,mask_1,mask_2,site\n"
                    "d/a/images/0.png,d/a/masks/0.png; d/a/masks/1.png,d/a/masks/o.png,a\n")
    assert (truth(3) == np.where(other > 0, 2, masks[0] | masks[1])).all()
    with pytest.raises(BadInput, match="o.png: stands in the column mask_2, but classes: 2.*set classes=3"):
        truth()
    file.write_text("image,mask_1,mask_2,site\nd/a/images/0.png,d/a/masks/0.png,d/a/masks/o0.png,a\n")
    both = np.maximum(other, np.uint8(255) * masks[0])
    Image.fromarray(both).save(tmp_path / "d" / "a" / "masks" / "o0.png")
    with pytest.raises(BadInput, match="o0.png: draws class 2 where another mask of 0.png draws class 1"):
        truth(3)


def test_volumes_with_a_mask_for_each_lobe(tmp_path):
    folder = write_prostate(tmp_path / "d", ("a",), cases=1) / "a"
    image = nibabel.load(folder / "Case0_segmentation.nii.gz")
    whole = np.asarray(image.dataobj)
    left = (np.arange(32) < 14)[:, None, None]
    for name, part in (("left", whole * left), ("right", whole * ~left)):
        nibabel.save(nibabel.Nifti1Image(part, image.affine), folder / f"{name}.nii.gz")
    for name, mask in (("t.csv", "d/a/left.nii.gz;d/a/right.nii.gz"),
                       ("u.csv", "d/a/Case0_segmentation.nii.gz")):
        (tmp_path / name).write_text(f"image,mask,site\nd/a/Case0.nii.gz,{mask},a\n")
    two, one = (read_sample(list_files(tmp_path / name, "volumes")[0]["a"][0], "a", "volumes", 32)
                for name in ("t.csv", "u.csv"))
    assert (two.truth == one.truth).all() and two.spacing == one.spacing


def test_check_data_writes_a_table_that_reads_the_same(tmp_path, monkeypatch, capsys):
    """Also where masks are joined, with a pattern, with what lacks a mask, and for a table elsewhere."""
    a = write_nuclei(tmp_path / "d", cases=4) / "a"
    (a / "masks" / "0.png").rename(a / "masks" / "0_mask_1.png")
    (a / "masks" / "0_mask_2.png").write_bytes((a / "masks" / "1.png").read_bytes())
    (tmp_path / "far").mkdir()
    arguments = monkeypatch, capsys, check_data, tmp_path, "d", "--task", "nuclei", "--write"
    for name in ("t.csv", "far/t.csv"):
        code, out, _ = run_here(*arguments, name)
        assert code == 0 and f"table of 8 lines: {name}; data={name} reads it" in out
        entries = {site: [entry._replace(image=os.path.realpath(entry.image)) for entry in of_site]
                   for site, of_site in list_files(tmp_path / name, "nuclei")[0].items()}
        assert {site: [(entry.case, entry.image, len(entry.masks)) for entry in of_site]
                for site, of_site in entries.items()} == {
            site: [(entry.case, os.path.realpath(entry.image), len(entry.masks)) for entry in of_site]
            for site, of_site in list_files(tmp_path / "d", "nuclei")[0].items()}
    line = "d/a/images/0.png,d/a/masks/0_mask_1.png;d/a/masks/0_mask_2.png,a,0\n"
    assert line in (tmp_path / "t.csv").read_text()
    code, _, err = run_here(*arguments, "t.csv")
    assert code == 2 and "t.csv: cannot be written (File exists)" in err
    (a / "masks" / "3.png").unlink()
    code, out, _ = run_here(*arguments, "u.csv")
    assert code == 1 and "table of 8 lines: u.csv; fill in the 1 empty cells" in out
    assert "d/a/images/3.png,,a,3" in (tmp_path / "u.csv").read_text()
    code, out, _ = run_here(monkeypatch, capsys, check_data, tmp_path, "u.csv", "--task", "nuclei")
    assert code == 1 and "u.csv: line 5: its mask is empty" in out


def test_a_run_with_a_table_equals_one_on_its_folder(tmp_path):
    file = table(tmp_path, "image,mask,site\n" + "".join(
        f"d/{site}/images/{k}.png,d/{site}/masks/{k}.png,{site}\n" for site in "ab" for k in range(4)))
    by_folder, by_table = (load_sites(nuclei_config(data)) for data in (tmp_path / "d", file))
    assert splits_of(by_folder) == splits_of(by_table)
    assert all((x.images == y.images).all()
               for a, b in zip(by_folder, by_table) for x, y in zip(a.train, b.train))
    with pytest.raises(BadInput, match="no.csv: there is no such file"):
        load_sites(prostate_config(tmp_path / "no.csv"))


def test_a_site_of_flower_sees_that_a_file_of_its_table_changed(tmp_path):
    file = table(tmp_path, PLAIN)
    first = mark_of(nuclei_config(file))
    assert mark_of(nuclei_config(file)) == first
    masks = tmp_path / "d" / "a" / "masks"
    (masks / "3.png").write_bytes((masks / "2.png").read_bytes())
    assert mark_of(nuclei_config(file)) != first
