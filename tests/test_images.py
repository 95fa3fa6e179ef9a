"""Image files as phones, screenshots, scanners and design tools write them; class folders as people name them."""
import errno
import io
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from datasets.build_dataset import build_dataset
from datasets.data import DataError
from datasets.images import load_image
from modelzoo import Zoo
from tests.conftest import CONV, write_yaml
from utils.command import command
from utils.run_net import make_generator

# 2 rows of 3: red, green, blue; white, grey, black. Compressed without loss in every format below.
PICTURE = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255] * 3, [128] * 3, [0] * 3]], np.uint8)


def read(image, form="PNG", shape=(3, 2, 3), **options):
    """What `load_image` makes of a picture saved in a format."""
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return load_image(file, shape)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation, turn", [
    (1, lambda x: x), (2, ImageOps.mirror), (3, lambda x: x.rotate(180)), (4, ImageOps.flip),
    (5, lambda x: ImageOps.mirror(x.rotate(270, expand=True))), (6, lambda x: x.rotate(90, expand=True)),
    (7, lambda x: ImageOps.mirror(x.rotate(90, expand=True))), (8, lambda x: x.rotate(270, expand=True)),
])
def test_a_picture_stands_as_its_exif_says(form, orientation, turn):
    """`turn` is what the camera did: orientation 6 is undone by a quarter turn clockwise."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if form == "WEBP" else {}
    assert read(turn(Image.fromarray(PICTURE)), form, exif=exif, **lossless).tolist() == PICTURE.tolist()


def test_damaged_exif_leaves_the_picture_as_it_stands():
    assert read(Image.fromarray(PICTURE), exif=b"Exif\0\0nonsense").tolist() == PICTURE.tolist()


def test_what_is_transparent_is_white():
    """Whatever colour hides there, fully or by half: 255 - (255 - 0) / 2."""
    alpha = np.array([[0, 255, 128], [255, 255, 0]], np.uint8)
    seen = read(Image.fromarray(np.dstack([PICTURE, alpha])))
    assert seen.tolist() == [[[255] * 3, [0, 255, 0], [127, 127, 255]], [[255] * 3, [128] * 3, [255] * 3]]
    grey = read(Image.fromarray(np.dstack([np.zeros((2, 3), np.uint8), alpha]), "LA"), shape=(1, 2, 3))
    assert grey[..., 0].tolist() == [[255, 0, 127], [0, 0, 255]]
    palette = Image.fromarray(np.array([[0, 1, 0], [1, 1, 0]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert read(palette, transparency=0).tolist() == [[[255] * 3 if x == 0 else [0, 0, 255] for x in row]
                                                      for row in ([0, 1, 0], [1, 1, 0])]
    assert read(palette, "GIF", transparency=0)[0, 0].tolist() == [255] * 3


def test_of_16_bits_the_upper_8_are_shown():
    deep = np.array([[0, 257, 32896], [65535, 1000, 65278]], np.uint16)
    for form in ("PNG", "TIFF", "PPM"):
        assert read(Image.fromarray(deep), form, shape=(1, 2, 3))[..., 0].tolist() == [[0, 1, 128], [255, 3, 254]]


def test_a_scan_of_two_colours_and_a_print_in_four():
    scan = read(Image.fromarray(PICTURE).convert("1", dither=0), "TIFF", shape=(1, 2, 3))
    assert scan[1, :, 0].tolist()[::2] == [255, 0]
    assert read(Image.fromarray(PICTURE).convert("CMYK"), "TIFF").tolist() == PICTURE.tolist()


def test_colours_are_those_of_the_profile():
    """linear.icc, of sRGB's primaries: half the light, 128 of 255, is 188 in sRGB."""
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    grey = read(Image.fromarray(PICTURE), icc_profile=srgb.tobytes())
    assert grey.tolist() == PICTURE.tolist()  # sRGB is what is shown without a profile
    assert read(Image.fromarray(PICTURE), icc_profile=b"nonsense").tolist() == PICTURE.tolist()
    assert read(Image.fromarray(PICTURE), icc_profile=lab.tobytes()).tolist() == PICTURE.tolist()  # not one of RGB
    linear = Path(__file__).parent / "linear.icc"
    shown = read(Image.fromarray(PICTURE), icc_profile=linear.read_bytes())
    assert np.abs(shown[1, :, 0].astype(int) - [255, 188, 0]).max() <= 1


@pytest.fixture
def folder(tmp_path):
    """Two classes that differ in which half is bright, 12 images each for training and 4 for testing."""
    for split, n in (("train", 12), ("test", 4)):
        for i, name in enumerate(("left", "right")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for j in range(n):
                pixels = np.zeros((24, 24), np.uint8)
                pixels[:, :12] = 255 - 255 * i
                pixels[j % 24, j % 24] = 99
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{j}.png")
    write_yaml(tmp_path / "hp.yaml", CONV | {"epochs": 4, "batch": 4, "lr": 0.01})
    return tmp_path


def learn(folder, tasks, *more):
    data = {"dataset": "image_folder", "path": ".", "size": 24, "tasks": tasks}
    write_yaml(folder / "data.yaml", data)
    from modelzoo import run

    return command("modelzoo.py", "modelzoo", run, [
        "--data_config", str(folder / "data.yaml"), "--hp_config", str(folder / "hp.yaml"), "--data_dir",
        str(folder / "data"), "--out", str(folder / "runs"), "--name", "a", "--continual", "--device", "cpu", *more])


def test_photographs_that_lie_on_their_side_are_classified_upright(folder):
    """The issue's example: 0 % before; in the folders, and through `Zoo.predict`."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for file in (folder / "data" / "test").glob("*/*"):
        Image.open(file).rotate(90, expand=True).save(file, exif=exif)
    assert learn(folder, [["left", "right"]], "--save_nets") == 0
    result = json.loads((folder / "runs/a/result.json").read_text())
    assert result["accuracy"] == [1.0] and result["class_names"] == [["left", "right"]]
    zoo = Zoo.load(folder / "runs/a", "cpu")
    files = sorted((folder / "data/test/left").iterdir())
    assert (zoo.predict(files, 0).argmax(1) == 0).all() and zoo.class_names == [["left", "right"]]


def build(folder, tasks):
    return build_dataset("image_folder", tasks, folder, make_generator(0, 0, "data"), path="data", size=24)


def add_class(folder, name, copy="left"):
    for split in ("train", "test"):
        (folder / "data" / split / name).mkdir()
        for file in (folder / "data" / split / copy).glob("*.png"):
            (folder / "data" / split / name / file.name).write_bytes(file.read_bytes())


def test_an_index_that_is_another_folders_name_is_refused(folder):
    for name in range(12):
        add_class(folder, str(name))
    # Sorted as texts: 0, 1, 10, 11, 2, ...
    train, _ = build(folder, [(0, 1), ("10", "2")])
    assert train.class_names == (("0", "1"), ("10", "2"))
    for label, place in ((2, "the index of the class 10"), (10, "the index of the class 8"), (3, "of the class 11")):
        with pytest.raises(DataError, match=f"lists {label}, which is .*{place}, and there is a class {label}; write"):
            build(folder, [(0, label)])


def test_an_index_beyond_all_and_names_with_zeros_in_front(folder):
    add_class(folder, "07")
    with pytest.raises(DataError, match="lists 7, which is no index, and there is a class 07; write '07' in quotes"):
        build(folder, [(0, 7)])
    assert build(folder, [("07", "left")])[0].class_names == (("07", "left"),)
    assert build(folder, [(0, 2)])[0].class_names == (("07", "right"),)


@pytest.mark.parametrize("written, asked", [
    (unicodedata.normalize("NFD", "bébé"), unicodedata.normalize("NFC", "bébé")),
    (unicodedata.normalize("NFC", "ガラス"), unicodedata.normalize("NFD", "ガラス")),
    ("great\u00a0tit", "great tit"), ("10\u202fPM", "10 PM"), ("soft\u00adware", "software"), (" ant", "ant"),
])
def test_names_are_compared_as_people_see_them(folder, written, asked):
    add_class(folder, written)
    train, test = build(folder, [("left", asked)])
    assert train.class_names == test.class_names and train.labels.tolist() == [0] * 12 + [1] * 12
    assert unicodedata.is_normalized("NFC", train.class_names[0][1])
    for split in ("train", "test"):  # each split by whatever wrote it
        twin = folder / "data" / split / asked
        if split == "test":
            (folder / "data" / split / written).rename(twin)
    assert len(build(folder, [("left", asked)])[1].labels) == 8


def test_folders_that_look_alike_are_refused(folder):
    add_class(folder, "bébé")
    add_class(folder, unicodedata.normalize("NFD", "bébé"))
    with pytest.raises(DataError, match=r"the folders 'b\\xe9b\\xe9' and 'be\\u0301be\\u0301' look alike|look alike"):
        build(folder, [("left", "right")])


def test_files_that_are_no_images_are_passed_over_and_counted(folder, capsys):
    (folder / "data/train/left/notes.txt").write_text("taken in May")
    (folder / "data/train/right/labels.csv").write_text("1,2")
    (folder / "data/test/right/.DS_Store").write_text("x")
    (folder / "data/test/right/._1.png").write_text("x")
    (folder / "data/train/left/more").mkdir()
    (folder / "data/train/left/0.png").rename(folder / "data/train/left/more/0.png")  # as torchvision's folders
    (folder / "data/train/left/1.png").rename(folder / "data/train/left/no ending")
    train, test = build(folder, [("left", "right")])
    assert len(train.labels) == 24 and len(test.labels) == 8
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "2 files that are no images were passed over, such as" in err and "notes.txt" in err
    for name in ("a.jpg", "b.HEIC", "c.tif"):
        broken = folder / "data/train/left" / name
        broken.write_bytes(b"nonsense")
        with pytest.raises(DataError, match=f"{name}: not a readable image"):
            build(folder, [("left", "right")])
        broken.unlink()


@pytest.mark.parametrize("link, to, named", [("all", ".", "left"), ("all", "..", "left"), ("more", "sub", "sub|more")])
def test_a_folder_that_a_link_leads_to_again_is_refused(folder, link, to, named):
    """Once: its images counted up to 41 times, and with two such links the walk had no end."""
    left = folder / "data/train/left"
    (left / "sub").mkdir()
    (left / "0.png").rename(left / "sub/0.png")
    (left / link).symlink_to(to)
    with pytest.raises(DataError, match=f"the same folder as .*({named}), whose images would count twice; take"):
        build(folder, [("left", "right")])


def test_a_folder_that_is_a_link_serves_several_classes(folder):
    """A class made of others: tasks may ask for it, and for these."""
    for split in ("train", "test"):
        (folder / "data" / split / "any").mkdir()
        for name in ("left", "right"):
            (folder / "data" / split / "any" / name).symlink_to(f"../{name}")
    train, _ = build(folder, [("left", "right"), ("any", "left")])
    assert [len(train.rows(t)) for t in range(2)] == [24, 36]


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    """Once: it was left out without a word."""
    (folder / "data/train/left/more").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("more"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="train/left/more: cannot be read .Permission denied."):
        build(folder, [("left", "right")])


def test_a_pipe_among_the_images_is_not_waited_for(folder, capsys):
    """Once: the run waited for ever for somebody to write into it."""
    os.mkfifo(folder / "data/train/left/pipe")
    train, _ = build(folder, [("left", "right")])
    assert len(train.labels) == 24 and "1 files that are no images were passed over" in capsys.readouterr().err
    os.mkfifo(folder / "data/train/left/pipe.png")
    with pytest.raises(DataError, match="pipe.png: not a readable image .it is no file."):
        build(folder, [("left", "right")])


@pytest.mark.parametrize("name", ["val", "valid"])
def test_val_serves_where_there_is_no_test(folder, name):
    (folder / "data/test").rename(folder / "data" / name)
    assert len(build(folder, [("left", "right")])[1].labels) == 8
    (folder / "data/test").mkdir()  # both: test
    with pytest.raises(DataError, match="test/left: no such folder, though"):
        build(folder, [("left", "right")])


def test_truncated_and_huge_images_are_named(folder):
    file = folder / "data/train/left/0.png"
    whole = file.read_bytes()
    for cut in (0, 8, len(whole) // 2):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="0.png: not a readable image"):
            build(folder, [("left", "right")])
    Image.new("1", (20_000, 20_000)).save(file)
    with pytest.raises(DataError, match="0.png: not a readable image .Image size"):
        build(folder, [("left", "right")])
