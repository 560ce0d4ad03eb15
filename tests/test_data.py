"""Data: the crop against an independent one, packing that survives a kill, and bad inputs of every kind."""
import http.client
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, call, data, evaluate, images_of, said, sample, shell, train

def photo(seed=0, size=(40, 30), mode="RGB"):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)

def folder(root, classes=("cat", "dog"), count=6, splits=("train", "val"), **options):
    """Class folders of PNG files."""
    for split in splits or [""]:
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                photo(100 * c + i, **options).save(root / split / name / f"{i}.png")
    return root

def pack(*args):
    return call(data, "--source", "folder", "--root", "in", "--size", 16, "--name", "set", "--workers", 1, *args)

# ---- What is packed is right -----------------------------------------------------------------------------------------
def adm_crop(image, size):
    """ADM's center_crop_arr from its description, on the shape alone: halve with BOX, BICUBIC to the short side, cut."""
    w, h = image.size
    while min(w, h) >= 2 * size:
        w, h = w // 2, h // 2
        image = image.resize((w, h), resample=Image.Resampling.BOX)
    scale = size / min(w, h)
    w, h = round(w * scale), round(h * scale)
    image = image.resize((w, h), resample=Image.Resampling.BICUBIC)
    return np.array(image.crop(((w - size) // 2, (h - size) // 2, (w - size) // 2 + size, (h - size) // 2 + size)))

@pytest.mark.parametrize("shape", [(40, 30), (16, 16), (200, 33), (17, 90), (1, 1), (31, 64)])
def test_crop_is_adms(shape):
    image = photo(1, shape)
    assert np.array_equal(data.center_crop(image, 16), adm_crop(image, 16))

def test_shapes_depend_on_seed_and_index_alone(there):
    assert np.array_equal(data.draw_shape(3, 17, 32), data.draw_shape(3, 17, 32))
    assert not np.array_equal(data.draw_shape(3, 17, 32), data.draw_shape(4, 17, 32))
    assert [data.draw_shape(0, i, 16)[0, 0].tolist() for i in range(4)] == [[239, 207, 224], [44, 40, 33], [67, 76, 67], [52, 52, 53]]      # everybody's
    halves = [[image[:16].mean(), image[16:].mean()] for image in (data.draw_shape(1, i, 32) for i in range(10))]
    assert np.abs(np.array(halves) - [[37.2, 45.2], [53.7, 45.2], [75.5, 88.7], [192.8, 189.4], [92.3, 79.1], [194.5, 197.2], [190.6, 165.8], [80.9, 73.5], [76.3, 74.7], [96.6, 106.4]]).max() < 0.2
    assert call(data, "--size", 16, "--count", 100, "--workers", 2, "--name", "two") == 0
    _, arrays = data.open_data("data/two")
    assert np.array_equal(arrays["train"][0][13], data.draw_shape(0, 13, 16)) and arrays["train"][1][13] == 3
    assert len(data.SHAPES) >= 10 and len(np.unique(arrays["train"][0].reshape(100, -1), axis=0)) == 100

def test_shapes_can_be_seen_and_stand_upright():
    """Bright enough against the background, turned by 8 degrees at most, and what has a hole has one."""
    weights = (0.299, 0.587, 0.114)
    for index in range(200):
        image = data.draw_shape(0, index, 48).astype(float)
        difference = np.abs((image - image[0, 0]) @ weights)
        name, inside = list(data.SHAPES)[index % 10], difference > 0.5 * difference.max()
        assert 0.28 * 255 < difference.max()
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        box = inside[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
        if name == "square":
            assert box.mean() > 0.72                      # turned by 8 degrees 0.78, by 45 a half
        if name == "ring":
            assert not box[len(box) // 2, len(box[0]) // 2]
    assert not np.array_equal(data.draw_shape(0, 20, 16), data.draw_shape(10, 10, 16))             # seed and index, not their sum

def test_grids_name_their_columns():
    """--labels star,7: each column under its own name; a single class fills the rows; no other class's picture."""
    image = lambda i: np.full((8, 8, 3), i, np.uint8)
    drawn, real = [], data.picture
    try:
        data.picture = lambda rows, titles=(): drawn.append((rows, list(titles)))
        data.class_picture([3, 7, 3, 7, 3], [f"class {i}" for i in range(10)], image)
        data.class_picture([4] * 25, [f"class {i}" for i in range(10)], image)
        data.class_picture([5, 12], list("abcdef"), image)
    finally:
        data.picture = real
    (rows, titles), (many, none), (_, beyond) = drawn
    assert titles == ["class 3", "class 7"] and [[x if x is None else x[0, 0, 0] for x in row] for row in rows] == [[0, 1], [2, 3], [4, None]]
    assert [len(row) for row in many] == [10, 10, 10] and many[1][3][0, 0, 0] == 13 and set(none) == {""} and beyond == ["f", 12]

def test_shapes_are_their_own_mirror_images():
    """Training mirrors half of the images: no class may change by it."""
    for name, outlines in data.SHAPES.items():
        size = 200
        masks = []
        for flip in (1, -1):
            image = Image.new("L", (size, size))
            for points, level in zip(outlines, (255, 0)):
                data.ImageDraw.Draw(image).polygon([tuple(p) for p in points * [flip, 1] * 80 + 100], fill=level)
            masks.append(np.array(image) > 0)
        assert (masks[0] ^ masks[1]).mean() < 0.01, name

def test_folder_with_splits(there):
    folder(there / "in")
    assert pack() == 0
    meta, arrays = data.open_data("data/set")
    assert meta["classes"] == ["cat", "dog"] and meta["counts"] == {"train": 12, "val": 12}
    assert np.array_equal(arrays["train"][0][7], data.center_crop(Image.open("in/train/dog/1.png"), 16)) and arrays["train"][1].tolist() == [0] * 6 + [1] * 6
    assert Path("data/set/preview.png").exists() and not Path("data/.set.partial").exists()
    assert len(meta["id"]) == 32 and len(meta["recipe"]["files"]) == 8 and meta["recipe"]["classes"] == ["cat", "dog"]
    assert isinstance(arrays["train"][0], np.memmap) and not arrays["train"][0].flags.writeable

def test_flat_folder_holds_out_a_part_and_empties_no_class(there):
    folder(there / "in", classes=("a", "b", "c"), count=4, splits=())
    folder(there / "in", classes=("single",), count=1, splits=())
    assert pack("--val-fraction", 0.3) == 0
    meta, arrays = data.open_data("data/set")
    assert meta["counts"] == {"train": 9, "val": 4} and set(arrays["train"][1]) == {0, 1, 2, 3}

def test_unlabelled_folder_and_fraction(there):
    (there / "in").mkdir()
    for i in range(100):
        photo(i, (16, 16)).save(there / "in" / f"{i:03d}.png")
    assert pack("--fraction", 0.3, "--val-fraction", 0.1) == 0
    meta, arrays = data.open_data("data/set")
    assert meta["classes"] == [] and meta["counts"] == {"train": 27, "val": 10} and meta["recipe"]["fraction"] == 0.3
    first = arrays["train"][0].copy()
    assert Image.open("data/set/preview.png").size == (640, 16 + 3 * 64)       # 27 images
    assert pack("--fraction", 0.3, "--val-fraction", 0.1, "--overwrite") == 0
    assert np.array_equal(data.open_data("data/set")[1]["train"][0], first)
    from conftest import TINY_FLAGS
    assert call(train, *TINY_FLAGS, "--data", "set", "--steps", 2, "--run", "u") == 0   # becomes an unconditional network

def test_what_is_held_out(there):
    assert call(data, "--size", 16, "--count", 100, "--workers", 1) == 0
    train_set, val = (set(map(bytes, data.open_data("data/shapes")[1][split][0])) for split in ("train", "val"))
    assert len(train_set | val) == 200                    # held-out shapes are none of those trained on
    folder(there / "in", splits=())
    assert data.list_folder(there / "in", 0.3, 0)[1]["val"] != data.list_folder(there / "in", 0.3, 1)[1]["val"]
    assert [len(data.hold_out([(i, 0) for i in range(n)], 0.1, 0)["val"]) for n in (2, 4, 26)] == [1, 1, 3]

def test_one_percent_of_imagenet_is_12811_images():
    kept = data.keep_fraction(range(1_281_167), 0.01, 0)
    assert len(kept) == 12_811 and kept == sorted(set(kept)) and kept != data.keep_fraction(range(1_281_167), 0.01, 1)

def cifar_archive(path, break_it=None):
    """A tiny file in the form of the binary CIFAR-10."""
    with tarfile.open(path, "w:gz") as tar:
        for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
            body = b"".join(bytes([i % 10]) + images_of(1, 32, seed=100 * k + i).transpose(0, 3, 1, 2).tobytes() for i in range(20))
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))

def test_cifar10_binary_layout(there, monkeypatch):
    (there / "in").mkdir()
    cifar_archive(there / "in" / "cifar-10-binary.tar.gz")
    monkeypatch.setitem(data.ARCHIVES, "cifar10", (*data.ARCHIVES["cifar10"][:2], data.file_hash(there / "in" / "cifar-10-binary.tar.gz", "md5")))
    assert call(data, "--source", "cifar10", "--root", "in") == 0
    meta, arrays = data.open_data("data/cifar10")
    assert meta["counts"] == {"train": 100, "val": 20} and meta["classes"][3] == "cat"
    assert np.array_equal(arrays["train"][0][25], images_of(1, 32, seed=105)[0]) and arrays["train"][1][25] == 5
    assert np.array_equal(arrays["val"][0][3], images_of(1, 32, seed=503)[0]) and call(data, "--source", "cifar10", "--root", "in", "--size", 16, "--name", "x") == 2

def test_imagenette_is_unpacked_with_the_data_filter(there, monkeypatch):
    (there / "in/imagenette-160.part/imagenette2-160/val/n01440764").mkdir(parents=True)                # left there by a kill, with half a file
    (there / "in/imagenette-160.part/imagenette2-160/val/n01440764/0.png").write_bytes(b"half")
    folder(there / "imagenette2-160", classes=("n01440764", "n02102040"))
    with tarfile.open(there / "in" / "imagenette2-160.tgz", "w:gz") as tar:
        tar.add("imagenette2-160")
    monkeypatch.setitem(data.ARCHIVES, "imagenette-160", (*data.ARCHIVES["imagenette-160"][:2], data.file_hash(there / "in" / "imagenette2-160.tgz", "md5")))
    assert call(data, "--source", "imagenette-160", "--root", "in", "--size", 16, "--workers", 1) == 0
    assert data.open_data("data/imagenette-160")[0]["classes"] == ["tench", "springer"]
    assert call(data, "--source", "imagenette-160", "--root", "in", "--size", 8, "--workers", 1, "--name", "small") == 0              # it is there
    (there / "elsewhere").mkdir(), (there / "in").rename("elsewhere/downloads")
    assert call(data, "--source", "imagenette-160", "--out", "elsewhere", "--size", 16, "--workers", 1) == 0
    with tarfile.open("evil.tgz", "w:gz") as tar:
        info = tarfile.TarInfo("../escaped.txt")
        tar.addfile(info, io.BytesIO(b""))
    with pytest.raises(tarfile.TarError):
        data.unpack(Path("evil.tgz"), there / "deep" / "out")
    assert not (there / "deep" / "escaped.txt").exists() and not (there / "deep" / "out").exists()

# ---- Nothing lost ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number,victim", [(signal.SIGKILL, "process"), (signal.SIGTERM, "process"), (signal.SIGINT, "group")])
def test_packing_begins_anew_after_a_kill(there, number, victim):
    """Killed in the middle nothing is there; the same command makes the whole set.  Asked to stop, it stops between two blocks, in one line."""
    command = [sys.executable, ROOT / "01_data.py", "--size", "48", "--count", "3000", "--workers", "2", "--name", "killed"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))                # ignored if pytest runs in the background
    part = Path("data/.killed.partial/train_images.npy")
    while child.poll() is None and not (part.exists() and part.stat().st_size > 1000 * 48 * 48 * 3):
        time.sleep(0.005)
    os.killpg(child.pid, number) if victim == "group" else child.send_signal(number)
    error = child.communicate(timeout=30)[1]
    assert not Path("data/killed").exists()
    if number != signal.SIGKILL:
        assert child.returncode == 130 and error.count("\n") == 1 and "stopped" in error and not part.exists(), error
    assert subprocess.run([*command[:-1], "calm"]).returncode == 0 and subprocess.run(command).returncode == 0
    for split in ("train", "val"):
        for a, b in zip(*(data.open_data(f"data/{name}")[1][split] for name in ("killed", "calm"))):
            assert np.array_equal(a, b)
    with data.locked(Path("data/killed")):                # free again
        pass

def test_a_hunt_of_one_kill(there, monkeypatch):
    """The short form of tests/kill_test.py 50 01."""
    import kill_test
    monkeypatch.setitem(kill_test.STAGES, "01", ("01_data.py", "--size 16 --count 1500 --name NAME", "data/NAME", ()))
    assert kill_test.hunt(there, 1, "01") == 0
    Path("data/hunted/train_labels.npy").write_bytes(b"x")
    assert kill_test.content(Path("data/hunted")) != kill_test.content(Path("data/calm"))

def test_what_is_left_out_leaves_no_hole(there):
    """Rows follow each other, whatever could not be read."""
    make = lambda i: "bad" if i % 3 == 0 else np.full((2, 2, 3), i % 251, np.uint8)
    with ThreadPoolExecutor(2) as pool:
        labels, lines = data.pack(there / "train_images.npy", [(i, 10 * i) for i in range(3000)], make, (2, 2, 3), pool)
    images = np.load("train_images.npy")
    assert images.shape == (2000, 2, 2, 3) and (images[:, 0, 0, 0] == np.array(labels) // 10 % 251).all() and lines[:2] == ["0: bad\n", "3: bad\n"] and len(lines) == 1000
    data.save_rows(there / "none.npy", [], (2, 2, 3))
    assert np.load("none.npy").shape == (0, 2, 2, 3)

def test_a_mended_image_is_read_and_foreign_files_are_kept(there, capsys):
    folder(there / "in", classes=("a", "b"), count=1)
    good = (there / "in/train/b/0.png").read_bytes()
    (there / "in/train/b/0.png").write_bytes(b"x")
    assert pack() == 1 and "class b has no readable image" in capsys.readouterr().err and not Path("data/.set.partial").exists()
    (there / "in/train/b/0.png").write_bytes(good)
    assert pack() == 0
    for place, name in ((Path("data/.mine.partial"), "thesis.txt"), (Path("data/.mine.old"), ".notes")):
        place.mkdir(), (place / name).write_text("x")
        assert call(data, "--size", 16, "--count", 100, "--name", "mine") == 1 and "did not write" in capsys.readouterr().err and (place / name).exists()
        shutil.rmtree(place)

def test_two_at_once_are_refused(there, capsys):
    with data.locked(Path("data/shapes")):
        assert shell("01_data.py", "--size", 16, "--count", 100, cwd=there).stderr.count("another process is writing to data/shapes") == 1
    assert call(data, "--size", 16, "--count", 100, "--workers", 1) == 0

def test_a_folder_that_has_changed_is_not_already_there(there, capsys):
    folder(there / "in")
    assert pack() == 0 and pack() == 0 and "nothing to do" in capsys.readouterr().out
    photo(7).save("in/train/cat/new.png")
    assert pack() == 1 and "was made with other settings (files" in capsys.readouterr().err
    assert pack("--overwrite") == 0 and data.open_data("data/set")[0]["counts"]["train"] == 13
    for split in ("train", "val"):
        (there / "in" / split / "cat").rename(there / "in" / split / "lion")
    assert pack() == 1 and "was made with other settings (classes" in capsys.readouterr().err

def test_photographs_are_turned_as_their_exif_says(there):
    (there / "in").mkdir()
    upright = Image.fromarray(np.repeat(np.repeat(np.array([[[255, 0, 0]], [[0, 0, 255]]], np.uint8), 16, 0), 32, 1))     # red above blue
    exif = Image.Exif()
    exif[0x0112] = 6                                      # "turn me by 90 degrees clockwise to see me upright"
    for i in range(2):
        upright.rotate(90, expand=True).save(f"in/{i}.jpg", exif=exif, quality=95)
    assert pack() == 0
    image = data.open_data("data/set")[1]["train"][0][0].astype(int)
    assert (image[:6, :, 0] > 200).all() and (image[10:, :, 2] > 200).all()

def test_sixteen_bits_and_transparency(there):
    """A 16-bit ramp keeps its mean; a hidden colour does not show: transparency is white."""
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:, 16:] = (255, 0, 0, 255)                       # left half: black, invisible
    (there / "in").mkdir()
    Image.fromarray(ramp).save("in/a.png"), Image.fromarray(rgba).save("in/b.png"), Image.fromarray(rgba).save("in/c.png")
    assert abs(data.decode("in/a.png", 16).mean() - 127.5) < 1
    assert (np.asarray(data.to_rgb(Image.fromarray(np.full((4, 4), 257 * 200, np.uint16)))) == 200).all()
    image = data.decode("in/b.png", 16)
    assert (image[:, :7] == 255).all() and (image[:, 9:] == (255, 0, 0)).all()

def test_a_name_that_does_not_fit_is_cut_visibly(monkeypatch):
    drawn, real = [], data.ImageDraw.ImageDraw.text
    monkeypatch.setattr(data.ImageDraw.ImageDraw, "text", lambda self, place, text, **more: drawn.append(text) or real(self, place, text, **more))
    data.picture([[np.zeros((64, 64, 3), np.uint8)] * 2], ["cat", "a very long class name"])
    assert drawn[0] == "cat" and drawn[1].endswith("..") and "a very long class name".startswith(drawn[1][:-2]) and len(drawn[1]) > 5
    data.picture([[np.zeros((64, 64, 3), np.uint8)]], ["猫ü"])
    assert "\\u732b\\xfc" in drawn                   # in Pillow's font all letters that it lacks are one box

def test_existing_sets_are_neither_overwritten_nor_ignored(there, capsys):
    assert call(data, "--size", 16, "--count", 100, "--workers", 1) == 0
    assert call(data, "--size", 16, "--count", 100) == 0 and "nothing to do" in capsys.readouterr().out
    assert call(data, "--size", 32, "--count", 100) == 1 and "--overwrite" in capsys.readouterr().err
    assert data.open_data("data/shapes")[0]["size"] == 16
    for name in ("classifier-0123abcd.10.npz", "classifier-0123abcd.10.npz.jit-part", "statistics-train-0123abcd-01234567.npz"):           # what 05 keeps there
        Path("data/shapes", name).touch()
    assert call(data, "--size", 32, "--count", 100, "--workers", 1, "--overwrite") == 0 and data.open_data("data/shapes")[0]["size"] == 32
    assert call(data, "--size", 32, "--count", 100, "--seed", 5) == 1 and "seed 0, now 5" in capsys.readouterr().err
    Path("data/shapes/classifier-mine.txt").write_text("x")
    assert call(data, "--size", 16, "--count", 100, "--overwrite") == 1 and Path("data/shapes/classifier-mine.txt").exists()

def test_a_broken_download_leaves_nothing(there, monkeypatch, capsys):
    monkeypatch.setitem(data.ARCHIVES, "cifar10", (32, (there / "served" / "cifar-10-binary.tar.gz").as_uri(), "0" * 32))
    assert call(data, "--source", "cifar10") == 1 and "fetch it yourself" in capsys.readouterr().err
    (there / "served").mkdir()
    (there / "served" / "cifar-10-binary.tar.gz").write_bytes(b"half a file")
    assert call(data, "--source", "cifar10") == 1
    assert os.listdir("data/downloads") == [".cifar-10-binary.tar.gz.lock"] and not Path("data/cifar10").exists()

def test_a_damaged_archive_is_named(there, capsys):
    (there / "in").mkdir()
    (there / "in" / "cifar-10-binary.tar.gz").write_bytes(b"damaged")
    assert call(data, "--source", "cifar10", "--root", "in") == 1 and "is damaged" in capsys.readouterr().err

# ---- What people bring -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("splits", [("train", "val"), ("Train", "Test"), ("training", "testing"), ("train", "valid"), ("TRAIN", "Validation"), ("training_set", "test_set"), ("train-images", "val data"), ("seg_train", "seg_test"),
                                    ("train2017", "val2017"), ("trainset", "testset"), ("my_Train", "my_valid"), ("train_images", "VALIDATION")], ids="-".join)
def test_splits_are_known_by_their_names_in_any_case(there, splits):
    folder(Path("in"), splits=splits)
    assert pack() == 0 and {k: len(v[1]) for k, v in data.open_data("data/set")[1].items()} == {"train": 12, "val": 12}

@pytest.mark.parametrize("classes", [("bus", "car", "train"), ("Test", "cat"), ("val", "test"), ("cat", "seg_train", "seg_test"), ("train", "train_extra", "val"), ("train", "training", "val"), ("train station", "test tube", "val gardena"), ("train", "test rig", "val"),
                                     ("trainA", "trainB", "testA", "testB"), ("model train", "test print", "test rig")], ids="-".join)
def test_a_class_that_is_called_like_a_split_is_asked_about(there, capsys, classes):
    folder(Path("in"), classes, splits=None)
    assert pack() == 1 and all(word in capsys.readouterr().err for word in ("classes, or splits?",)) and not Path("data/set").exists()

def test_a_message_is_one_line(capsys):
    def main():
        raise ValueError("boo\nhoo")
    assert data.run(main) == 1 and capsys.readouterr().err.endswith(": error: boo hoo\n")

def test_a_list_of_classes_is_cut_between_names(there, capsys):
    folder(Path("in"), [f"class_{i:03d}" for i in range(30)], 1, splits=("train", "val"))
    assert pack() == 0 and "30 classes (class_000, class_001, class_002, class_003, class_004, class_005, class_006, [...]); look" in capsys.readouterr().out

@pytest.mark.parametrize("classes", [("train_station", "valley"), ("bullet train", "beach"), ("test_tube", "cat"), ("trainer", "tester", "vale")], ids="-".join)
def test_classes_that_only_sound_like_splits(there, classes):
    folder(Path("in"), classes, splits=None)
    assert pack() == 0 and data.open_data("data/set")[0]["classes"] == sorted(classes)

@pytest.mark.parametrize("place", ["in/data", "in/seg_train/seg_train"])
def test_a_folder_in_a_folder_is_asked_about(there, capsys, place):
    """As archives unpack: its sub-folders are the splits, or the classes."""
    folder(Path(place), splits=None)
    if "train" in place:
        folder(Path(place.replace("train", "test")), splits=None)
    assert pack() == 1 and f"Then give {place} as --root" in capsys.readouterr().err and not Path("data/set").exists()

def test_links_are_followed_but_not_in_circles(there, capsys):
    folder(Path("in"), splits=None)
    folder(Path("elsewhere"), ("more",), 3, splits=None)
    Path("in/cat/link").symlink_to(Path("elsewhere/more").resolve())
    Path("in/cat/circle").symlink_to(Path("in/cat").resolve())
    Path("in/all").symlink_to(Path("in").resolve())       # is no class
    assert pack() == 0 and sum(len(v[1]) for v in data.open_data("data/set")[1].values()) == 15 and "left out" not in capsys.readouterr().out

def test_a_folder_without_access_is_an_error(there, capsys, monkeypatch):
    folder(Path("in"), splits=None)
    real = os.scandir

    def refuses(place):
        if str(place).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)
    monkeypatch.setattr(os, "scandir", refuses)
    assert pack() == 1 and "Permission denied: 'in/dog'" in capsys.readouterr().err and not Path("data/set").exists()

def test_a_drives_own_folders_need_no_access(there, monkeypatch):
    folder(Path("in"), splits=None)
    for name in (".Trash", "lost+found", "System Volume Information"):
        Path("in", name).mkdir()
    real = os.scandir

    def refuses(place):
        if Path(place).name in (".Trash", "lost+found"):
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)
    monkeypatch.setattr(os, "scandir", refuses)
    assert pack() == 0 and data.open_data("data/set")[0]["classes"] == ["cat", "dog"]

def test_what_is_left_out_is_said(there, capsys):
    """Other kinds, hidden files and system folders, folders beside the splits' classes; .jfif is a JPEG."""
    folder(Path("in"), splits=None)
    photo(1).save("in/cat/windows.jfif", "JPEG")
    Path("in/cat/phone.heic").write_bytes(b"x")
    Path("in/@eaDir").mkdir()
    Path("in/__MACOSX/cat").mkdir(parents=True)
    for name in ("in/@eaDir/thumb.png", "in/cat/._0.png", "in/__MACOSX/cat/._0.png"):
        photo(2).save(name)
    assert pack() == 0 and sum(len(v[1]) for v in data.open_data("data/set")[1].values()) == 13
    line, = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert line == "4 files are left out, of other kinds, hidden, or in other folders, as in/cat/phone.heic"

def test_names_of_people_and_of_accents_are_classes(there, capsys):
    """As a Mac and as others write an e with an accent: one letter, or two; and names that begin with @ or #."""
    for split, accent in (("train", "cafe\u0301"), ("val", "caf\u00e9")):
        folder(Path("in"), (accent, "@alice", "#beach", "cafz"), splits=[split])
    assert pack() == 0 and data.open_data("data/set")[0]["classes"] == ["#beach", "@alice", "cafz", "caf\u00e9"]

@pytest.mark.parametrize("loose", [True, False])
def test_pictures_beside_what_the_scripts_wrote(there, capsys, loose):
    """The working directory itself is packed, twice: no picture of a run, and no set, becomes a part of it."""
    folder(there, () if loose else ("cat", "dog"), splits=None)
    Path("runs/r/preview").mkdir(parents=True)
    for name in ("runs/r/loss.png", "runs/r/preview/1.png", *(["a.png", "b.png"] if loose else [])):
        photo(3).save(name)
    for name, out in (("one", "data"), ("two", "data"), ("three", "."), ("four", ".")):
        assert call(data, "--source", "folder", "--root", ".", "--size", 16, "--name", name, "--out", out) == 0
        assert sum(data.open_data(Path(out) / name)[0]["counts"].values()) == (2 if loose else 12)
        assert "left out" not in capsys.readouterr().out.replace("1 files are left out, of other kinds, hidden, or in other folders, as .three.lock", "")

def test_a_link_to_a_folder_above_brings_nothing(there):
    folder(Path("in"), splits=None)
    Path("in/cat/up").symlink_to(there / "in")
    Path("in/dog/all").symlink_to(there)
    assert pack() == 0 and sum(data.open_data("data/set")[0]["counts"].values()) == 12

def test_originals_in_the_folder_of_data_sets(there):
    folder(Path("data"), splits=None)
    for name in ("one", "two"):
        assert call(data, "--source", "folder", "--root", "data", "--size", 16, "--name", name) == 0
        assert data.open_data(f"data/{name}")[0]["classes"] == ["cat", "dog"]

def test_the_scripts_own_folders_are_no_classes(there, capsys):
    folder(Path("."), splits=None)
    assert call(data, "--size", 16, "--count", 100, "--workers", 1) == 0
    Path("runs").mkdir()
    capsys.readouterr()
    assert call(data, "--source", "folder", "--root", ".", "--size", 16, "--name", "mine") == 0
    assert data.open_data("data/mine")[0]["classes"] == ["cat", "dog"]
    assert "(but not data/ and runs/ of the working directory, where these scripts write)" in capsys.readouterr().out

def test_classes_have_the_names_of_classes_txt(there, capsys):
    folder(Path("in"), ("n01", "n02", "n03"), splits=None)
    Path("in/classes.txt").write_text("\ufeffn02\tgoldfish, Carassius auratus\nn01 tench \n\nn99 unused\n", encoding="utf-8")
    assert pack() == 0 and data.open_data("data/set")[0]["classes"] == ["tench", "goldfish, Carassius auratus", "n03"]
    out = capsys.readouterr().out
    assert "names of classes are read from in/classes.txt, a text in UTF-8\n2 of 3 classes are named by a line FOLDER NAME of the list (of two for one folder the last counts)\n" in out and "left out" not in out
    Path("in/classes.txt").write_text("n01 tench\nn02 koi\n")
    assert pack() == 1 and "made with other settings (classes ['tench', 'goldfish" in capsys.readouterr().err
    Path("in/classes.txt").write_text("n01 crane\nn02 crane\n")
    assert pack("--name", "double") == 2 and "two classes are called crane: change or remove the line of one" in capsys.readouterr().err
    Path("in/n01/classes.txt").write_text("n01 tench\n"), Path("in/classes.txt").write_text("n01 a\n")
    assert pack("--name", "deep") == 0 and "1 files are left out, of other kinds, hidden, or in other folders, as in/n01/classes.txt" in capsys.readouterr().out
    Path("in/n01/classes.txt").unlink()
    assert data.called(["cat", "dog"], "cat\ndog\n") == ["cat", "dog"]          # names alone
    assert data.called([], "cat\ndog\n") == []           # images without class folders
    os.chdir("in")
    Path("classes.txt").unlink()
    assert call(data, "--source", "folder", "--root", ".", "--size", 16, "--name", "here") == 0 and "left out" not in capsys.readouterr().out

SIDE = np.zeros((48, 96), np.uint8)
SIDE[:, :20], SIDE[:12] = 255, 128                        # upright: a white bar on the left, grey above

@pytest.mark.parametrize("kind", ["L", "16", "CMYK", "RGB", "lzw"])
def test_tiff_files_are_turned_once(there, kind):
    image = Image.fromarray(SIDE.astype(np.uint16) * 257) if kind == "16" else Image.fromarray(SIDE).convert(kind if kind in ("CMYK", "RGB") else "L")
    image.transpose(Image.ROTATE_90).save("a.tif", tiffinfo={274: 6}, **({"compression": "tiff_lzw"} if kind == "lzw" else {}))
    assert np.array_equal(np.asarray(data.read_image("a.tif")), np.asarray(Image.fromarray(SIDE).convert("RGB")))

def test_depths(there):
    """Floats and 32 bits are refused; in 16 bits white may be zero, and one grey transparent."""
    grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for name, image in (("float", Image.fromarray(np.ones((9, 9), np.float32))), ("long", Image.fromarray(np.full((9, 9), 10**6, np.int32)))):
        image.save(f"{name}.tif")
        with pytest.raises(ValueError, match="must have 8 or 16 bits"):
            data.read_image(f"{name}.tif")
    Image.fromarray(grey).save("white.tif", tiffinfo={262: 0})
    assert np.abs(np.asarray(data.read_image("white.tif"))[..., 0] - (65535.0 - grey) / 257).max() <= 0.5
    Image.fromarray(grey.astype(">u2")).save("big.tif")
    assert np.abs(np.asarray(data.read_image("big.tif"))[..., 0] - grey / 257).max() <= 0.5
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in grey)
    Path("clear.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 256, 256, 16, 0, 0, 0, 0)) + chunk(b"tRNS", struct.pack(">H", 1000)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    found = np.asarray(data.read_image("clear.png"))[..., 0].ravel()
    assert found[1000] == 255 and found[999] == found[1001] == 4
    tags = [(256, 8), (257, 8), (258, 12), (259, 1), (262, 1), (273, 200), (277, 1), (278, 8), (279, 96)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    Path("twelve.tif").write_bytes((b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries).ljust(200, b"\0") + b"\x7f" * 96)
    with pytest.raises(ValueError, match="must have 8 or 16 bits"):                       # else nearly black
        data.read_image("twelve.tif")

def test_a_run_of_another_working_directory_is_no_class(there, capsys):
    folder(Path("in"), splits=None)
    Path("in/runs/shapes/samples").mkdir(parents=True), Path("in/runs/shapes/checkpoint.pt").touch(), Path("in/runs/shapes/config.json").touch()
    photo().save("in/runs/shapes/samples/0000000.png")
    assert pack() == 1 and "in/runs holds no images" in capsys.readouterr().err
    shutil.rmtree("in/runs")
    assert pack() == 0 and data.open_data("data/set")[0]["classes"] == ["cat", "dog"]

def test_signed_pixels_are_refused(there):
    tags = [(256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (273, 200), (277, 1), (278, 8), (279, 64), (339, 2)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    Path("signed.tif").write_bytes((b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries).ljust(200, b"\0") + np.arange(-32, 32, dtype=np.int8).tobytes())
    with pytest.raises(ValueError, match="must have 8 or 16 bits, no sign"):           # else -1 becomes 255
        data.read_image("signed.tif")

def test_a_class_may_hold_arrays_of_any_name(there, capsys):
    folder(Path("in"), splits=None)
    np.save("in/cat/train_images.npy", np.zeros(3))
    assert pack() == 0 and data.open_data("data/set")[0]["classes"] == ["cat", "dog"] and "1 files are left out" in capsys.readouterr().out

def test_an_odd_exif_entry_does_not_spoil_a_picture(there):
    photo(3).save("whole.png")
    png, chunk = Path("whole.png").read_bytes(), b"eXIfbroken"
    Path("odd.png").write_bytes(png[:33] + struct.pack(">I", 6) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:])
    assert np.array_equal(data.read_image("odd.png"), photo(3))

def test_what_is_called_like_an_image_and_is_none(there):
    """A pipe would never end; a class may be called st.gif; a packed data set is not a class of previews."""
    folder(Path("in"), ("cat", "st.gif"), splits=None)
    os.mkfifo("in/cat/pipe.png")
    assert pack() == 0 and data.open_data("data/set")[0]["classes"] == ["cat", "st.gif"]
    Path("data/set").rename("in/cat/packed")
    assert pack() == 0 and sum(data.open_data("data/set")[0]["counts"].values()) == 12

# ---- Bad images: skipped, counted, listed; readable oddities are read ------------------------------------------------
def huge_header():
    """A PNG whose header claims 60000 x 60000 pixels."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")

def as_bytes(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()

UNREADABLE = {
    "other.png": as_bytes(photo(1), "PCX"),               # Pillow could, and other kinds start other programs
    "empty.png": b"", "text.png": b"this is text", "html.jpg": b"<html>404</html>", "cut.jpg": as_bytes(photo(1, (200, 200)), "JPEG")[:2000],
    "cut.png": as_bytes(photo(1, (200, 200)), "PNG")[:3000], "huge.png": huge_header(), "zeros.jpg": bytes(5000), "thin.png": as_bytes(photo(1, (2000, 1)), "PNG"),
    "garbage.webp": b"RIFF1234WEBPgarbage", "header.gif": b"GIF89a", "bitmap.bmp": b"BM" + bytes(20), "broken.tif": b"II*\0" + bytes(8),
}
READABLE = {
    "cmyk.jpg": as_bytes(photo(1, mode="CMYK"), "JPEG"), "grey.png": as_bytes(photo(1, mode="L"), "PNG"), "binary.png": as_bytes(photo(1, mode="1"), "PNG"),
    "palette.png": as_bytes(photo(1).quantize(16), "PNG", transparency=0), "alpha.png": as_bytes(photo(1, mode="RGBA"), "PNG"), "pixel.png": as_bytes(photo(1, (1, 1)), "PNG"),
    "deep.png": as_bytes(Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30)), "PNG"), "moving.gif": as_bytes(photo(1), "GIF", save_all=True, append_images=[photo(2)]),
    "UPPER.JPEG": as_bytes(photo(1), "JPEG"), "spaß & more.png": as_bytes(photo(1), "PNG"),
}

@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_images_are_skipped_counted_and_listed(there, capsys, name):
    folder(there / "in")
    (there / "in" / "train" / "cat" / name).write_bytes(UNREADABLE[name])
    assert pack() == 0
    out = capsys.readouterr()
    assert "1 unreadable images left out" in out.out and "data/set: 12 training and 12 held-out images, 16 x 16, 2 classes (cat, dog)" in out.out and "Traceback" not in out.err
    assert name in Path("data/set/skipped.txt").read_text()
    meta, arrays = data.open_data("data/set")
    assert meta["counts"]["train"] == 12 and sorted(arrays["train"][1]) == [0] * 6 + [1] * 6
    assert pack("--overwrite") == 0

@pytest.mark.parametrize("name", READABLE)
def test_odd_images_are_read(there, name):
    folder(there / "in")
    (there / "in" / "train" / "cat" / name).write_bytes(READABLE[name])
    assert pack() == 0 and data.open_data("data/set")[0]["counts"]["train"] == 13

def test_an_argument_may_end_in_an_equals_sign(there, capsys):
    assert call(data, "--size", 16, "--count", 100, "--name", "a=") == call(data, "--size", 16, "--count", 100, "--name=b=") == 0
    assert call(data, "--size", 16, "--count", 100, "--name=") == 2 and "an argument is empty" in capsys.readouterr().err

def test_a_folder_of_data_sets_is_made_with_those_above_it(there):
    assert call(data, "--size", 16, "--count", 100, "--out", "deep/er/still") == 0 and Path("deep/er/still/shapes/meta.json").exists()

def damage(change):
    """A packed set with one thing changed."""
    def make():
        assert call(data, "--size", 16, "--count", 100, "--workers", 1, "--name", "set") == 0
        change(Path("data/set"))
    return make

def rewrite_labels(value):
    return damage(lambda path: np.save(path / "train_labels.npy", np.full(100, value)))

def reworded(old, new):
    return damage(lambda path: (path / "meta.json").write_text((path / "meta.json").read_text().replace(old, new)))

SETS = {
    "labels too few": (damage(lambda p: np.save(p / "train_labels.npy", np.zeros(50, np.int64))), "do not fit"), "labels of 32 bits": (damage(lambda p: np.save(p / "train_labels.npy", np.zeros(100, np.int32))), "do not fit"),
    "images of floats": (damage(lambda p: np.save(p / "train_images.npy", images_of(100).astype(np.float32))), "do not fit"), "one label too high": (damage(lambda p: np.save(p / "train_labels.npy", np.arange(100) // 99 * 10)), "outside 0..9"),
    "a count is missing": (reworded('"val": 100', '"other": 100'), "damaged"), "no id": (reworded('"id"', '"ID"'), "id is not of the type str"), "no recipe": (reworded('"recipe"', '"r"'), "recipe is not of the type dict"),
    "label too high": (rewrite_labels(10), "outside 0..9"), "label negative": (rewrite_labels(-1), "outside 0..9"),
    "images cut": (damage(lambda p: os.truncate(p / "train_images.npy", 5000)), "damaged"), "images empty": (damage(lambda p: os.truncate(p / "train_images.npy", 0)), "damaged"),
    "labels gone": (damage(lambda p: (p / "train_labels.npy").unlink()), "damaged"), "meta is no json": (damage(lambda p: (p / "meta.json").write_text("{")), "damaged"), "meta is a list": (damage(lambda p: (p / "meta.json").write_text("[]")), "damaged"), "meta is deep": (damage(lambda p: (p / "meta.json").write_text("[" * 10**5)), "damaged"), "counts are null": (damage(lambda p: (p / "meta.json").write_text((p / "meta.json").read_text().replace('"counts": {', '"counts": null, "x": {'))), "damaged"),
    "labels pickled": (damage(lambda p: np.save(p / "train_labels.npy", np.array([{}] * 100, dtype=object), allow_pickle=True)), "damaged"),
    "classes are numbers": (damage(lambda p: (p / "meta.json").write_text((p / "meta.json").read_text().replace('"circle"', "0"))), "expected str"),
    "other size": (damage(lambda p: np.save(p / "val_images.npy", images_of(100, 8))), "do not fit"), "no set": (lambda: None, "make it first"),
}

@pytest.mark.parametrize("name", SETS)
def test_damaged_sets_are_refused_in_one_line(there, capsys, name):
    SETS[name][0]()
    assert call(train, "--data", "set", "--steps", 1) == 1
    error = capsys.readouterr().err
    assert SETS[name][1] in error and len(error.strip().splitlines()) == 1 and not Path("runs").exists()

FOLDERS = {
    "missing": (lambda: None, "is not a folder", 2), "empty": (lambda: Path("in").mkdir(), "holds no images", 1),
    "text only": (lambda: (Path("in").mkdir(), Path("in/a.txt").write_text("x")), "holds no images", 1),
    "none readable": (lambda: (Path("in").mkdir(), [Path(f"in/{i}.png").write_bytes(b"x") for i in range(3)]), "in has no readable image", 1),
    "class empty": (lambda: (folder(Path("in")), Path("in/train/eel").mkdir(), Path("in/val/eel").mkdir()), "eel holds no images", 1),
    "class unreadable": (lambda: (folder(Path("in")), [Path(f"in/{s}/eel").mkdir() or Path(f"in/{s}/eel/a.png").write_bytes(b"x") for s in ("train", "val")]), "class eel has no readable", 1),
    "loose images": (lambda: (folder(Path("in")), Image.new("RGB", (9, 9)).save("in/train/a.png")), "1 loose images (in/train/a.png", 1),
    "splits differ": (lambda: (folder(Path("in")), Path("in/train/dog").rename("in/train/fox")), "dog is in one only", 1),
}

@pytest.mark.parametrize("name", FOLDERS)
def test_unusable_folders_are_refused_in_one_line(there, capsys, name):
    make, words, code = FOLDERS[name]
    make()
    assert pack() == code
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1 and not Path("data/set").exists()

def test_no_space_is_said_before_the_start(there, capsys, monkeypatch):
    folder(there / "in")
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert pack() == 1 and "are free: make room" in capsys.readouterr().err and not Path("data/set").exists()

@pytest.mark.parametrize("flags", [["--size", 3], ["--fraction", 0], ["--count", 5], ["--source", "mnist"], ["--source", "folder"], ["--val-fraction", 1], ["--workers", 0],
                                   ["--seed", -1], ["--name", "a/b"], ["--source", "cifar10", "--size", 64], ["--name", ".a"], ["--root", "photos"], ["--sise", 3], ["--siz", 16, "--coun", 100]])
def test_wrong_flags(there, capsys, flags):
    assert call(data, *flags) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and "error" in error and not Path("data").exists()

def test_a_folder_that_is_no_data_set_is_not_touched(there, capsys):
    """The photographs themselves, say, with --out . and their own name."""
    (there / "photos").mkdir()
    for i in range(3):
        Image.fromarray(images_of(1, 16, i)[0]).save(there / "photos" / f"{i}.png")
    for extra in ([], ["--overwrite"]):
        assert call(data, "--source", "folder", "--root", "photos", "--size", 16, "--name", "photos", "--out", ".", "--workers", 1, *extra) == 1
        assert "is not a packed data set" in capsys.readouterr().err and len(list((there / "photos").iterdir())) == 3

def test_a_picture_has_its_images_in_their_places():
    tiles = [np.full((64, 64, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = np.asarray(data.picture([[tiles[0], tiles[1]], [tiles[2], None], [None, tiles[0]]]))
    assert sheet[32::64, 32::64, 0].tolist() == [[10, 20], [30, 255], [255, 10]]
    sheet = np.asarray(data.picture([[tiles[0], tiles[1]]], ["a", "b"], ["r"]))            # beside the name, below the titles
    assert sheet.shape == (80, 208, 3) and (sheet[16:, 80:144] == 10).all() and (sheet[16:, 144:] == 20).all()
    small = images_of(1, 8)[0]                            # enlarged, a pixel stays a square of one colour
    assert np.array_equal(np.asarray(data.picture([[small]])), small.repeat(8, axis=0).repeat(8, axis=1))

def test_sixteen_bits_of_a_pgm_file(there):
    grey = np.arange(64).reshape(8, 8) * 1000
    Path("a.pgm").write_bytes(b"P5 8 8 65535\n" + grey.astype(">u2").tobytes())
    assert np.abs(np.asarray(data.read_image("a.pgm"))[..., 0] - grey / 257.0).max() <= 0.5

def test_a_tenth_of_the_shapes_is_held_out():
    splits = data.shapes_source(data.Options())[2]
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 20_000, "val": 2_000} and splits["val"][0] == (10**7, 0)               # beyond the largest --count
    assert data.shapes_source(options := data.Options(workers=8)) and options.workers == 1
    assert [data.Options(source=name).size for name in ("shapes", "folder", "cifar10", "imagenette-160", "imagenette-320")] == [64, 64, 32, 160, 320]

def test_a_script_that_is_asked_to_end_says_so():
    code = "import os, signal, sys, time; from importlib import import_module; sys.exit(import_module('01_data').run(lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(9)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr.count("\n") == 1 and "stopped; the same command" in done.stderr

def test_a_panorama_is_read(there):
    photo(1, (340, 17)).save("wide.png"), photo(1, (16, 1500)).save("tall.png")
    assert all(isinstance(data.decode(name, 16), np.ndarray) for name in ("wide.png", "tall.png"))         # up to 100 : 1

def test_a_change_of_the_held_out_images_is_another_set(there, capsys):
    folder(there / "in")
    assert pack() == 0
    photo(7).save("in/val/cat/new.png")
    assert pack() == 1 and "was made with other settings (files" in capsys.readouterr().err

def test_the_space_that_is_needed_counts_every_colour(there, monkeypatch):
    folder(there / "in")
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 24 * 16 * 16 * 3 - 1})())
    assert pack() == 1
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 24 * 16 * 16 * 3})())
    assert pack() == 0

def test_an_archive_is_kept_under_out(there, monkeypatch):
    Path("elsewhere/downloads").mkdir(parents=True)
    archive = Path("elsewhere/downloads/cifar-10-binary.tar.gz")
    cifar_archive(archive)
    monkeypatch.setitem(data.ARCHIVES, "cifar10", (32, (there / "nowhere" / archive.name).as_uri(), data.file_hash(archive, "md5")))
    assert call(data, "--source", "cifar10", "--out", "elsewhere") == 0 and not Path("data").exists()

def test_a_set_half_replaced_is_whole_all_the_same(there, monkeypatch):
    """Stopped before and after the old one is moved aside; and a lock takes nothing from the file that it is."""
    flags, real = ["--size", 16, "--workers", 1, "--name", "d"], Path.replace
    Path("data").mkdir(), Path("data/.d.lock").write_text("mine")
    for stopped in ("d", ".d.partial"):
        assert call(data, *flags, "--count", 100, "--overwrite") == 0

        def replace(path, new):
            if path.name == stopped:
                raise KeyboardInterrupt
            return real(path, new)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            assert call(data, *flags, "--count", 120, "--overwrite") == 130
        assert data.open_data("data/d")[0]["counts"]["train"] == 100 and {path.name for path in Path("data").iterdir()} == {"d", ".d.lock"}
        assert call(data, *flags, "--count", 120, "--overwrite") == 0 and data.open_data("data/d")[0]["counts"]["train"] == 120
    Path("data/d").rename("data/.d.old")                  # killed just there: it is the only copy until there is a new one
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(data, "pack", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        data.main([str(flag) for flag in [*flags, "--count", 120]])
    assert data.open_data("data/d")[0]["counts"]["train"] == 120
    Path("data/d").rename("data/.d.old")
    assert call(data, *flags, "--count", 120) == 0 and data.open_data("data/d") and not Path("data/.d.old").exists()
    assert Path("data/.d.lock").read_text() == "mine"

def test_a_set_behind_a_link_is_packed_where_it_lies(there):
    """On another disk, say."""
    flags = ["--size", 16, "--workers", 1]
    assert call(data, *flags, "--count", 100, "--out", "disk") == 0
    Path("data").mkdir(), Path("data/shapes").symlink_to("../disk/shapes")
    assert call(data, *flags, "--count", 120, "--overwrite") == 0
    assert Path("data/shapes").is_symlink() and data.open_data("disk/shapes")[0]["counts"]["train"] == 120

def test_a_transparent_colour_of_a_palette_is_white(there):
    image = Image.new("P", (8, 8))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (4, 0, 8, 8))
    image.save("a.png", transparency=1)
    found = np.asarray(data.read_image("a.png"))
    assert (found[:, :4] == (255, 0, 0)).all() and (found[:, 4:] == 255).all()

@pytest.mark.parametrize("turn", range(1, 9))
def test_every_turn_that_exif_knows(there, turn):
    from PIL import ImageOps
    exif = Image.Exif()
    exif[0x0112] = turn
    photo(1).save("a.png", exif=exif)
    with Image.open("a.png") as image:
        assert np.array_equal(np.asarray(data.read_image("a.png")), np.asarray(ImageOps.exif_transpose(image)))

def test_shapes_lie_beside_the_centre_in_any_direction():
    """By up to a twentieth of the side, across and down by chance of their own."""
    centres = []
    for index in range(0, 400, 10):                       # circles
        image = data.draw_shape(0, index, 48).astype(float)
        inside = np.abs(image - image[0, 0]).sum(-1) > 20
        centres.append([place.mean() / 47 - 0.5 for place in np.nonzero(inside)])
    down, across = np.array(centres).T
    assert 0.03 < np.abs(down).max() < 0.06 and 0.03 < np.abs(across).max() < 0.06 and abs(np.corrcoef(down, across)[0, 1]) < 0.5

def test_titles_stand_above_their_columns_also_beside_names(monkeypatch):
    placed = {}
    monkeypatch.setattr(data, "write", lambda draw, place, text, *more: placed.update({text: place[0]}))
    data.picture([[np.zeros((64, 64, 3), np.uint8)] * 2], ["a", "b"], ["row"])
    assert placed == {"a": 80 + 3, "b": 80 + 64 + 3, "row": 3}

def test_images_below_a_hidden_folder_are_read(there):
    """Hidden is what lies hidden in --root, not where --root lies."""
    folder(there / "home" / ".cache" / "@in")
    assert call(data, "--source", "folder", "--root", "home/.cache/@in", "--size", 16, "--name", "set", "--workers", 1) == 0

def test_another_programs_meta_is_no_permission(there, capsys):
    Path("data/shapes").mkdir(parents=True)
    Path("data/shapes/meta.json").write_text('{"title": "mine"}'), Path("data/shapes/preview.png").write_bytes(b"mine")
    assert call(data, "--size", 16, "--count", 100, "--workers", 1, "--overwrite") == 1 and "is not a packed data set: nothing is touched" in capsys.readouterr().err
    assert Path("data/shapes/preview.png").read_bytes() == b"mine"

def test_the_seed_reaches_the_pencil(there):
    assert call(data, "--size", 16, "--count", 100, "--workers", 1, "--seed", 3) == 0
    assert np.array_equal(data.open_data("data/shapes")[1]["train"][0][13], data.draw_shape(3, 13, 16))

def test_odd_class_names_are_said_and_drawn(there, capsys):
    """A line break in a name; and train/ within train/ becomes a class, which is said."""
    folder(there / "in" / "train", classes=("a\nb", "c"))
    assert call(data, "--source", "folder", "--root", "in/train/train", "--size", 16, "--name", "set", "--workers", 1) == 0
    assert call(data, "--source", "folder", "--root", "in", "--size", 16, "--name", "two", "--workers", 1) == 0
    assert "data/two: 22 training and 2 held-out images, 16 x 16, 2 classes (train, val); look at data/two/preview.png" in capsys.readouterr().out

def test_the_bar_counts_every_image(there, monkeypatch):
    bars, close = set(), data.Progress.close
    monkeypatch.setattr(data.Progress, "close", lambda bar: bars.add((bar.n, bar.total)) or close(bar))
    assert call(data, "--size", 16, "--count", 300, "--workers", 1) == 0
    assert {(300, 300), (100, 100)} <= bars                  # bars of other tests may go now, too

def test_a_row_of_another_number_of_colours_is_refused(there):
    for shape in ((4, 4), (4, 4, 1), (4, 4, 4), (4, 3, 3)):
        with pytest.raises(ValueError, match="row 1 of x.npy has the shape"):
            data.save_rows(Path("x.npy"), iter([np.zeros((4, 4, 3)), np.zeros(shape)]), (4, 4, 3))

def test_the_background_has_a_colour_of_its_own():
    """Of a shape its hue says nothing about the background's."""
    import colorsys
    hues = []
    for index in range(0, 1000, 10):                      # circles: one colour in the middle, the other in the corner
        image = data.draw_shape(0, index, 32) / 255
        hues.append([colorsys.rgb_to_hsv(*image[place, place])[0] for place in (0, 16)])
    apart = np.abs(np.diff(hues)) * 360
    assert (np.minimum(apart, 360 - apart) > 60).mean() > 0.4

def test_colours_of_a_shape_are_rounded():
    """Drawn a second time: the corner has the background's colour, the middle of a circle the other."""
    import colorsys
    for index in range(0, 200, 10):
        rng = np.random.default_rng((5, index))
        rng.uniform(0.34, 0.42), rng.uniform(-8, 8), rng.uniform(-0.05, 0.05, 2)
        contrast = 0
        while contrast <= 0.3:
            hues = rng.random(2)
            front = np.array(colorsys.hsv_to_rgb(hues[0], rng.uniform(0.55, 1), rng.uniform(0.6, 1)))
            back = np.array(colorsys.hsv_to_rgb(hues[1], rng.uniform(0, 0.25), rng.uniform(0.05, 1)))
            contrast = abs(np.dot(front - back, (0.299, 0.587, 0.114)))
        image = data.draw_shape(5, index, 32)
        assert np.array_equal(image[0, 0], np.floor(back * 255 + 0.5)) and np.array_equal(image[16, 16], np.floor(front * 255 + 0.5))

# ---- Mistakes that nothing had noticed -----------------------------------------------------------------------------------
@pytest.mark.parametrize("splits,flag,split", [(("train", "val"), "--fraction", "train"), ((), "--val-fraction", "val")])
def test_the_seed_reaches_what_is_drawn(there, splits, flag, split):
    folder(there / "in", splits=splits)
    for name, seed in (("a", 0), ("b", 1)):
        assert pack(flag, 0.5, "--name", name, "--seed", seed) == 0
    a, b = (data.open_data(f"data/{name}")[1][split][0] for name in "ab")
    assert a.shape == b.shape and not np.array_equal(a, b)

def test_an_empty_argument_of_the_command_line_is_refused(there, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["01_data.py", "--size", "16", "--count", "100", "--name", ""])
    assert data.run(data.main) == 2 and "an argument is empty" in capsys.readouterr().err
    assert data.parse([], "", data.Options) == {}         # not the command line's

def test_a_download_is_whole(there, monkeypatch):
    body, asked, real = os.urandom(3 << 20), [], data.urllib.request.urlopen
    Path("served").mkdir(), Path("served/a.tgz").write_bytes(body)
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda url, **how: asked.append(how) or real(url, **how))
    monkeypatch.setitem(data.ARCHIVES, "cifar10", (32, (there / "served/a.tgz").as_uri(), data.file_hash(Path("served/a.tgz"), "md5")))
    assert data.fetch(data.Options(source="cifar10", root=Path("kept"))) == data.fetch(data.Options(source="cifar10", root=Path("kept"))) == Path("kept/a.tgz")
    assert Path("kept/a.tgz").read_bytes() == body and asked == [{"timeout": 60}]

def test_a_download_that_breaks_off_is_one_line(there, monkeypatch, capsys):
    def breaks(*_):
        raise http.client.IncompleteRead(b"")             # is no OSError
    monkeypatch.setattr(data, "download", breaks)
    assert call(data, "--source", "cifar10") == 1 and "fetch it yourself" in capsys.readouterr().err

def test_each_imagenette_is_its_own(there, monkeypatch):
    (there / "in").mkdir()
    for size, classes in ((160, ("n01440764", "n02102040")), (320, ("n02979186", "n03000684"))):
        folder(Path(f"imagenette2-{size}"), classes=classes, count=2)
        archive, name = Path(f"in/imagenette2-{size}.tgz"), f"imagenette-{size}"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(f"imagenette2-{size}")
        monkeypatch.setitem(data.ARCHIVES, name, (*data.ARCHIVES[name][:2], data.file_hash(archive, "md5")))
    assert call(data, "--source", "imagenette-160", "--root", "in", "--size", 16, "--workers", 1) == 0
    assert call(data, "--source", "imagenette-320", "--root", "in", "--size", 16, "--workers", 1) == 0
    assert data.open_data("data/imagenette-320")[0]["classes"] == ["cassette", "chainsaw"]

@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_file_name_of_another_encoding(there):
    folder(Path("in"))
    Path(os.fsdecode(b"in/train/cat/caf\xe9.png")).write_bytes(b"x")
    assert pack() == 0 and "caf" in Path("data/set/skipped.txt").read_text()

def test_letters_that_a_terminal_lacks(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert data.run(lambda: print("猫")) == 0
    monkeypatch.setattr(sys, "stdout", io.StringIO())     # a notebook's cannot be reconfigured
    assert data.run(lambda: print("猫")) == 0

def test_a_grid_has_ten_columns_and_eight_rows(monkeypatch):
    drawn = []
    monkeypatch.setattr(data, "picture", lambda rows, titles: drawn.append((len(rows), len(rows[0]), list(titles))))
    data.class_picture(list(range(12)) * 9, [f"c{i}" for i in range(12)], lambda i: i)
    assert drawn == [(8, 10, [f"c{i}" for i in range(10)])]

def test_the_line_of_a_bar_off_a_terminal(capsys):
    bar = data.Progress(200, "x", " images")
    bar.display()
    bar.close()
    assert (bar.mininterval, bar.delay) == (30, 4)
    assert capsys.readouterr().err == "x: 0 of 200, ? images/s, ? left\n"

def test_a_fraction_that_leaves_a_class_empty_is_said(there, capsys):
    folder(there / "in")
    assert pack("--fraction", 0.05) == 1 and "class cat has no readable image to train on; --fraction and hold-out left 0" in capsys.readouterr().err

def test_memory_that_is_used_up_is_one_line(capsys):
    def main():
        raise MemoryError("no room")
    assert data.run(main) == 1 and "error: no room" in capsys.readouterr().err

def test_packing_holds_few_images_in_memory(tmp_path, monkeypatch):
    """A row is written before the next block is made."""
    written, ahead, makers = [], [], set()
    monkeypatch.setattr(data, "save_rows", lambda path, rows, shape: written.extend(row for row in rows))
    with ThreadPoolExecutor(1) as pool:
        data.pack(tmp_path / "x.npy", [(i, 0) for i in range(1000)], lambda job: ahead.append(job - len(written)) or makers.add(threading.current_thread()) or np.zeros(1), (1,), pool)
    assert len(written) == 1000 and max(ahead) <= 256 and makers and threading.current_thread() not in makers

def test_two_at_once_do_not_unpack_one_archive(there):
    with data.locked(there / "x"), pytest.raises(ValueError, match="another process is writing"):
        data.unpack(Path("gone.tgz"), there / "x")

def test_names_stay_whole_in_help(monkeypatch, capsys):
    for width in range(60, 118):
        monkeypatch.setenv("COLUMNS", str(width))
        with pytest.raises(SystemExit):
            call(train, "--help")
        assert "logit-\n" not in capsys.readouterr().out

def test_a_link_in_the_place_of_a_part_is_not_followed(there):
    Path("mine.txt").write_text("mine"), Path("a.json.jit-part").symlink_to("mine.txt")
    data.save_json(Path("a.json"), {"a": 1})
    assert Path("mine.txt").read_text() == "mine" and json.loads(Path("a.json").read_text()) == {"a": 1} and not Path("a.json").is_symlink()

# ---- Sources and folders, in particular -----------------------------------------------------------------------------
def test_the_shapes_are_everybodys():
    assert list(data.SHAPES) == ["circle", "square", "triangle", "star", "heart", "cross", "moon", "arrow", "ring", "drop"]
    assert [int(data.draw_shape(1, i, 32).sum()) for i in range(10)] == [126488, 151900, 252158, 587019, 263261, 601720, 547506, 237064, 232002, 311822]

def test_what_chance_draws_is_everybodys():
    pairs = [(i, 0) for i in range(10)]
    held = np.random.default_rng((4, 1)).permutation(range(1, 10))[:3]
    assert data.hold_out(pairs, 0.3, 4)["val"] == [(i, 0) for i in sorted(held)]
    kept = np.random.default_rng((4, 2)).permutation(10)[:5]
    assert data.keep_fraction(pairs, 0.5, 4) == [(i, 0) for i in sorted(kept)] and len(data.keep_fraction(pairs, 0.01, 4)) == 1

class Answer(io.BytesIO):
    """Of a server that does not say how much it sends."""
    headers = {}

def test_a_download_into_a_folder_that_is_there(there, monkeypatch, bars):
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda url, timeout: Answer(b"abc"))
    monkeypatch.setitem(data.ARCHIVES, "cifar10", (32, "https://host/a.tgz", "900150983cd24fb0d6963f7d28e17f72"))              # the md5 of abc
    for folder_there in (False, True):
        path = data.fetch(data.Options(source="cifar10", out=Path(".")))
        assert path == Path("downloads/a.tgz") and path.read_bytes() == b"abc" and bars[0] == (3, 0)
        path.unlink()
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"^downloads/a.tgz is damaged: its md5 is not 9001"):
        data.fetch(data.Options(source="cifar10", out=Path(".")))
    path.unlink()
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda url, timeout: Answer(b"abd"))
    with pytest.raises(ValueError, match=r"cannot download https://host/a.tgz .*: fetch it yourself and put it into downloads$"):
        data.fetch(data.Options(source="cifar10", out=Path(".")))

def test_archives_are_unpacked_with_the_data_filter(there, monkeypatch):
    asked = []
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda self, path, **how: asked.append(how) or Path(path).mkdir())
    tarfile.open("a.tar", "w").close()
    data.unpack(Path("a.tar"), there / "a")
    assert asked == [{"filter": "data"}]

def test_with_splits_what_is_left_out_is_said(there, capsys):
    folder(Path("in"))
    assert pack() == 0 and "left out" not in capsys.readouterr().out
    Path("in/val/cat/notes.txt").write_text("x")
    assert pack("--name", "more") == 0 and "1 files are left out, of other kinds, hidden, or in other folders, as in/val/cat/notes.txt" in capsys.readouterr().out

def test_of_val_and_test_val_is_held_out(there, capsys):
    for train, val, test in (("train", "val", "test"), ("Train", "Val", "test"), ("training", "VALID", "testing")):
        folder(Path("of", train), splits=(train, val, test))
        assert data.split_folders(Path("of", train)) == (Path("of", train, train), Path("of", train, val))
    assert pack("--root", "of/train") == 0 and "12 files are left out" in capsys.readouterr().out

def test_a_class_of_one_split_is_named(there, capsys):
    folder(Path("in"))
    shutil.rmtree("in/val/dog")
    assert pack() == 1 and "dog is in one only" in capsys.readouterr().err
    shutil.rmtree("in/val/cat")
    photo().save("in/val/ILSVRC2012_val_00000001.png")
    assert pack() == 1 and "cat is in one only (ImageNet's val/ comes without: sort it; a contest's test/, too: move it away)" in capsys.readouterr().err

def test_hidden_folders_within_a_class_hold_no_pictures(there, capsys):
    folder(Path("in"), splits=None)
    for name in ("@eaDir", ".thumbnails"):
        Path("in/cat", name).mkdir()
        photo(9).save(f"in/cat/{name}/0.png")
    assert len(data.list_images(Path("in/cat"))) == 6

def test_a_gallerys_own_record_hides_nothing(there):
    folder(Path("in"), splits=None)
    Path("in/cat/meta.json").write_text("{}")
    assert len(data.list_images(Path("in/cat"))) == 6

def test_links_to_the_scripts_folders_and_to_the_root(there, capsys):
    """data/ on a bigger disk is still data/; a root that is a link is not met again by way of a link in it."""
    folder(Path("work"), ("cat",), splits=None), folder(Path("disk"), ("set",), splits=None)
    Path("work/data").symlink_to("../disk"), Path("link").symlink_to("work"), Path("work/cat/up").symlink_to("..")
    names, splits = data.list_folder(Path("link"), 0.1, 0)
    assert names == ["cat", "data"] and len(splits["train"] + splits["val"]) == 12             # from elsewhere data/ is a folder as any other
    os.chdir("work")
    Path("data/preview.png").write_bytes(Path("cat/0.png").read_bytes())
    capsys.readouterr()
    names, splits = data.list_folder(Path("."), 0.1, 0)
    assert names == ["cat"] and len(splits["train"] + splits["val"]) == 6

# ---- Images, in particular ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape,size", [((300, 200), 16), ((1500, 1000), 64)])
def test_large_photographs_are_halved_again_and_again(shape, size):
    image = photo(1, shape)
    assert np.array_equal(data.center_crop(image, size), adm_crop(image, size))

@pytest.mark.parametrize("shape,good", [((20, 2000), True), ((2000, 20), True), ((20, 2020), False), ((2020, 20), False)])
def test_strips(there, shape, good):
    Image.new("RGB", shape).save("a.png")
    made = data.decode("a.png", 8)
    assert made.shape == (8, 8, 3) if good else made == f"{shape[0]} x {shape[1]} is too long and thin"

@pytest.mark.parametrize("mode,colour,extra", [("LA", (0, 0), {}), ("RGB", (1, 2, 3), {"transparency": (1, 2, 3)}), ("L", 7, {"transparency": 7})], ids=["LA", "RGB", "L"])
def test_what_is_transparent_is_white(there, mode, colour, extra):
    Image.new(mode, (4, 4), colour).save("a.png", **extra)
    assert (np.asarray(data.read_image("a.png")) == 255).all()

def test_deep_png_files_lie_as_their_exif_says_with_any_pillow(there):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(8, dtype=np.uint16).reshape(2, 4) * 8000).save("a.png", exif=exif)
    assert data.read_image("a.png").size == (2, 4)
    old = Image.new("I", (2, 2), 65535)                   # what Pillow before 11.3 made of a PNG of 16 bits
    old.format = "PNG"
    assert (np.asarray(data.to_rgb(old)) == 255).all()

@pytest.mark.parametrize("kind", [struct.error, KeyError, TypeError, IndexError, EOFError, RuntimeError], ids=lambda kind: kind.__name__)
def test_whatever_pillow_raises(there, monkeypatch, kind):
    """In an EXIF entry it does not matter; anywhere else the file is left out, in one line."""
    def raises(*_, **__):
        raise kind("odd\nindeed")
    photo().save("line\nbreak.png")
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "getexif", raises)
        assert data.read_image("line\nbreak.png").size == (40, 30)
    monkeypatch.setattr(data, "to_rgb", raises)
    made = data.decode("line\nbreak.png", 8)
    assert made.startswith("line\nbreak.png is not a readable image (") and made.count("\n") == 1 and made.endswith(")")

# ---- Packing and flags, in particular -------------------------------------------------------------------------------
def test_blocks_keep_many_threads_busy(tmp_path):
    class Pool:
        def map(self, make, jobs):
            sizes.append(len(jobs))
            return map(make, jobs)
    sizes = []
    data.pack(tmp_path / "a.npy", [(i, 0) for i in range(300)], lambda i: np.zeros((1, 1, 3), np.uint8), (1, 1, 3), Pool())
    assert sizes == [256, 44]

def test_nothing_pickled_is_opened(there, monkeypatch):
    assert call(data, "--size", 8, "--count", 100, "--workers", 1) == 0
    asked, real = [], np.load
    monkeypatch.setattr(np, "load", lambda path, **how: asked.append(how["allow_pickle"]) or real(path, **how))
    data.open_data("data/shapes")
    assert asked == [False] * 4
    with pytest.raises(ValueError, match=r"no data set at data/cats: make it first \(python 01_data.py draws data/shapes,"):
        data.open_data("data/cats")

def test_a_refusal_is_a_line_of_some_length():
    with pytest.raises(ValueError) as error:
        data.refuse_other({"classes": ["old"] * 1000}, {"classes": ["new"] * 1000}, "data/x", "choose --name")
    assert len(str(error.value)) < 200 and str(error.value).endswith("): choose --name")
    with pytest.raises(ValueError, match=r"\(seed None, now 0\)"):
        data.refuse_other({}, {"seed": 0}, "data/x", "choose --name")          # what an older one lacks is no agreement

def test_the_space_is_that_of_the_place(there, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: asked.append(path) or type("Usage", (), {"free": 2.5e9})())
    Path("big").mkdir()
    assert call(data, "--size", 4096, "--count", 100, "--out", "big") == 1 and asked == [Path("big")]
    assert "big/shapes needs 10.1 GB, 2.5 GB are free: make room, or pass --out" in capsys.readouterr().err

class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal

@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_for_the_stream_that_it_goes_to(monkeypatch, terminal):
    monkeypatch.setattr(sys, "stderr", Stream(terminal)), monkeypatch.setattr(sys, "stdout", Stream(not terminal))
    with data.Progress(7, "x", " steps") as bar:
        bar.set_postfix(refresh=False, loss="0.5")
        bar.display()
        assert bar.lines == (not terminal)
    assert "0 of 7" in sys.stderr.getvalue() or terminal
    assert ", loss=0.5" in sys.stderr.getvalue()

def test_texts_of_a_picture_can_be_read(monkeypatch):
    """Black, in their places, and no wider than their column."""
    white = np.full((64, 64, 3), 255, np.uint8)
    sheet = np.asarray(data.picture([[white, white]], ["W" * 20, "title"], ["name"]))
    assert sheet[:16, 80:144].min() < 60 and sheet[:16, 144:].min() < 60 and sheet[16:, :80].min() < 60 and sheet[:16, 140:147].min() > 200
    placed, drawn, real = [], [], data.write
    monkeypatch.setattr(data, "write", lambda draw, place, text, width, anchor="la", fill="black": placed.append((text, place, width, anchor)) or real(draw, place, text, width, anchor, fill))
    monkeypatch.setattr(data.ImageDraw.ImageDraw, "text", lambda self, place, text, **how: drawn.append((place, how["anchor"], how["fill"])))
    data.picture([[white], [white]], ["a"], ["x", "y"])
    assert placed == [("a", (83, 1), 60, "la"), ("x", (3, 48), 74, "lm"), ("y", (3, 112), 74, "lm")]
    assert drawn == [((83, 1), "la", "black"), ((3, 48), "lm", "black"), ((3, 112), "lm", "black")]

def test_a_text_that_is_cut_is_as_wide_as_its_place(monkeypatch):
    drawn, sheet = [], Image.new("RGB", (200, 20))
    draw = data.ImageDraw.Draw(sheet)
    monkeypatch.setattr(draw, "text", lambda place, text, font, **more: drawn.append(draw.textlength(text, font)))
    for width in (30, 60, 90):
        data.write(draw, (0, 0), "m" * 40, width)
        assert drawn[-1] <= width

@pytest.mark.parametrize("size,side", [(8, 64), (24, 48), (28, 56), (40, 40), (48, 48), (100, 100)])
def test_images_are_enlarged_by_whole_numbers(size, side):
    assert data.picture([[np.zeros((size, size, 3), np.uint8)]]).size == (side, side)

def test_scores_beside_a_data_set_are_ours_and_others_are_not(there, capsys):
    flags = ["--size", 8, "--count", 100, "--workers", 1]
    assert call(data, *flags) == 0
    Path("data/shapes/statistics-val-0123abcd-01234567.npz").touch(), Path("data/shapes/.DS_Store").touch()          # a Mac's
    assert call(data, *flags, "--overwrite") == 0
    for name in ("classifier-mine.npz", "statistics-imagenet.npz", "x.jit-part", "preview.png"):
        place = Path("data/shapes", name)
        place.unlink() if place.exists() else None
        place.mkdir() if "npz" not in name else place.touch()
        assert call(data, *flags, "--overwrite") == 1 and f"holds {name}, which this script did not write" in capsys.readouterr().err
        assert place.exists()
        place.rmdir() if place.is_dir() else place.unlink()

def test_a_damaged_set_is_not_already_packed(there, capsys):
    flags = ["--size", 8, "--count", 100, "--workers", 1]
    assert call(data, *flags) == 0
    os.truncate("data/shapes/train_images.npy", 500)
    assert call(data, *flags) == 1 and "cannot be read" in capsys.readouterr().err

def test_a_foreign_meta_with_an_id_is_no_permission(there, capsys):
    Path("data/shapes").mkdir(parents=True)
    Path("data/shapes/meta.json").write_text('{"id": "mine"}'), Path("data/shapes/preview.png").write_bytes(b"mine")
    assert call(data, "--size", 16, "--count", 100, "--workers", 1, "--overwrite") == 1 and "is not a packed data set: nothing is touched" in capsys.readouterr().err
    assert Path("data/shapes/preview.png").read_bytes() == b"mine"

def test_threads_and_locks_are_those_asked_for(there, monkeypatch):
    folder(Path("in")), Path("disk").mkdir(), Path("data").mkdir()
    threads, places, pool, lock = [], [], data.ThreadPoolExecutor, data.locked
    monkeypatch.setattr(data, "ThreadPoolExecutor", lambda *count: threads.append(count) or pool(*count))
    monkeypatch.setattr(data, "locked", lambda path: places.append(path) or lock(path))
    assert pack("--workers", 3) == 0 and (threads, places) == ([(3,)], [Path("data/set")])
    Path("data/set").rename("disk/set"), Path("data/set").symlink_to("../disk/set")
    assert pack("--overwrite") == 0 and places[1] == there.resolve() / "disk/set" and Path("data/set").is_symlink() and data.open_data("disk/set")[0]["recipe"]["source"] == "folder"
    assert data.Options().workers == os.cpu_count() and next(entry for entry in data.fields(data.Options) if entry.name == "workers").default == os.cpu_count()

def test_a_disk_without_locks_is_named_as_such(there, monkeypatch, capsys):
    def none(*_):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(data, "flock", none)
    assert call(data, "--size", 8, "--count", 100) == 1 and "No locks available" in capsys.readouterr().err

def test_a_preview_names_the_classes(there, monkeypatch):
    named, real = [], data.class_picture
    monkeypatch.setattr(data, "class_picture", lambda labels, names, image_of: named.append(names) or real(labels, names, image_of))
    folder(Path("in"))
    assert pack() == 0 and named == [["cat", "dog"]]

def test_any_name_can_be_recorded(there):
    data.save_json(Path("a.json"), {"classes": ["caf\udce9", "猫"]})
    assert Path("a.json").read_bytes().isascii() and data.load_json(Path("a.json"), classes=list) == {"classes": ["caf\udce9", "猫"]}

def test_what_help_says(capsys):
    """What the script does, titles, defaults of zero and of tuples, and nothing of what is no flag."""
    text_of = {}
    for module in (data, train, sample):
        with pytest.raises(SystemExit):
            call(module, "--help")
        text_of[module] = " ".join(capsys.readouterr().out.split())
    assert "Pack images into memory-mapped arrays." in text_of[data] and "of drawing, --fraction and hold-out (default: 0)" in text_of[data] and "03_train.py then needs --data OUT/NAME" in text_of[data]
    assert "Defaults shown are the paper's, or those of --preset and --experiment." in text_of[train] and "(default: 0.998)" in text_of[train] and "of AdamW (default: 0.0)" in text_of[train]
    assert all(f"{title}: --" in text_of[train] for title in ("what to train on", "objective", "optimizer", "hardware", "keeping", "network"))
    places = [text_of[train].index(words) for words in ("what to train on: --preset", "--steps STEPS", "objective: --loss", "optimizer: --batch-size", "hardware: --amp", "keeping: --resume", "network: --patch-size", "--aux AUX")]
    assert places == sorted(places)                       # in the order of the fields
    assert not any(f"{word} " in text_of[train] for word in ("--sampling", "--image-size", "--in-channels", "--record", "--objective", "--classes", "--data-id", "--coder"))
    assert "--trajectory only draw z_t over time and what the network predicts" in text_of[sample]
    given = train.read_flags(["--no-flip", "--no-rope", "--no-qk-norm", "--no-compile"])
    assert given == {"flip": False, "rope": False, "qk_norm": False, "compile": False}

def test_an_empty_function_of_a_kit_is_one_line(capsys):
    def main():
        raise NotImplementedError("exercise 3: write me")
    assert data.run(main) == 1 and capsys.readouterr().err.endswith(": error: exercise 3: write me\n")

def test_a_terminals_own_letters_stay(monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "latin-1"))
    assert data.run(lambda: print("ü猫", flush=True)) == 0 and out.getvalue() == b"\xfc?\n"

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_signals_are_only_noted(number):
    before = signal.signal(number, signal.default_int_handler)                 # ignored if pytest runs in the background
    try:
        with data.asked_to_stop() as asked:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            assert asked == [1]
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, before)

def test_rows_are_stored_in_the_type_of_the_file(tmp_path):
    """A source of your own may return other numbers."""
    data.save_rows(tmp_path / "a.npy", iter([np.full((2, 2, 3), 7), np.full((2, 2, 3), 9.0)]), (2, 2, 3))
    rows = np.load(tmp_path / "a.npy")
    assert rows.dtype == np.uint8 and rows.tolist() == [np.full((2, 2, 3), 7).tolist(), np.full((2, 2, 3), 9).tolist()] and (tmp_path / "a.npy").stat().st_size == 128 + 24

def test_a_download_says_how_much_there_is(tmp_path, monkeypatch):
    totals, real = [], data.Progress
    monkeypatch.setattr(data, "Progress", lambda total, *more, **how: totals.append(total) or real(total, *more, **how))
    answer = Answer(b"abc")
    answer.headers = {"Content-Length": "3"}
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda url, timeout: answer)
    data.download("https://host/a", tmp_path / "a")
    assert totals == [3]

def test_a_system_without_hangups_and_locks(tmp_path, monkeypatch):
    """As Windows is."""
    monkeypatch.delattr(signal, "SIGHUP"), monkeypatch.setattr(data, "flock", None)
    with data.asked_to_stop() as asked, data.locked(tmp_path / "a"):
        assert asked == []

def test_what_a_recipe_holds():
    options = data.Options(size=16)
    assert data.recipe_of(options, ["a"], {"train": [(3, 0)], "val": []}) == {"source": "shapes", "size": 16, "fraction": 1.0, "val_fraction": 0.1, "seed": 0, "classes": ["a"], "files": "%08x" % zlib.crc32(b"['3']")}

def test_a_process_that_waits_for_the_first_to_speak_ends_at_once(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(data, "RANK", "3"), monkeypatch.setattr(data.time, "sleep", lambda seconds: handlers.append(signal.getsignal(signal.SIGTERM)))
    handlers = []

    def main():
        raise ValueError("out of luck")
    try:
        assert data.run(main) == 1 and handlers == [signal.SIG_DFL]
    finally:
        signal.signal(signal.SIGTERM, before)

def test_a_name_that_just_fits_is_whole(monkeypatch):
    drawn, draw = [], data.ImageDraw.Draw(Image.new("RGB", (200, 20)))
    monkeypatch.setattr(draw, "text", lambda place, text, **more: drawn.append(text))
    width = draw.textlength("parachute", data.ImageFont.load_default(12))
    data.write(draw, (0, 0), "parachute", width), data.write(draw, (0, 0), "parachute", width - 1)
    assert drawn == ["parachute", "parach.."]

def test_two_names_that_no_folder_has_may_be_alike():
    assert data.called(["n01"], "n01 tench\nn98 crane\nn99 crane\n") == ["tench"]

def test_the_class_that_is_empty_names_a_file_of_its_own(there, capsys):
    folder(Path("in"), ("a", "b", "c"), splits=None)
    Path("in/a/bad.png").write_bytes(b"x")
    for file in Path("in/c").iterdir():
        file.write_bytes(b"x")
    assert pack() == 1
    error = capsys.readouterr().err
    assert "class c has no readable image to train on; --fraction and hold-out left " in error and " in/c/" in error and "is not a readable image" in error and "in/a/bad.png" not in error and error.count("\n") == 1

def test_a_list_of_names_in_another_form_is_seen_to_say_nothing(there, capsys):
    folder(Path("in"), ("0", "1"), splits=None)
    Path("in/classes.txt").write_text("cat\ndog\n")
    assert pack() == 0 and "0 of 2 classes are named by a line FOLDER NAME of the list" in capsys.readouterr().out

# ---- What refusals say, whole ----------------------------------------------------------------------------------------
def test_whole_lines_about_data_sets(there, capsys):
    assert said(data.open_data, "data/cats") == ("no data set at data/cats: make it first (python 01_data.py draws data/shapes, with --source cifar10 it makes data/cifar10, imagenette alike; of your own images: --source folder --root IMAGES --name NAME; latents: tests/experiments/), or give its place: NAME means data/NAME, with a slash it is a path")
    assert call(data, "--size", 16, "--count", 100, "--workers", 1, "--name", "set") == 0
    assert capsys.readouterr().out == "data/set: 100 training and 100 held-out images, 16 x 16, 10 classes (circle, square, triangle, star, heart, cross, moon, arrow, ring, drop); look at data/set/preview.png\n"
    assert call(data, "--size", 16, "--count", 100, "--workers", 1, "--name", "set") == 0
    assert capsys.readouterr().out == "data/set is there, made with these settings of files with these names; nothing to do (--overwrite packs it again)\n"
    why = "the data set at data/set cannot be read ({}): if it is damaged or outdated, move the folder away, and pack it again"
    labels = np.load("data/set/val_labels.npy")
    np.save("data/set/val_labels.npy", np.full(100, 10))
    assert said(data.open_data, "data/set") == why.format("val_labels.npy has a label outside 0..9, or a class has no image")
    np.save("data/set/val_labels.npy", labels), np.save("data/set/val_images.npy", images_of(100, 8))
    assert said(data.open_data, "data/set") == why.format("the val arrays do not fit meta.json")
    Path("data/set/notes.txt").touch()
    assert call(data, "--size", 16, "--count", 100, "--name", "set", "--overwrite") == 1
    assert capsys.readouterr().err.endswith("error: data/set holds notes.txt, which this script did not write: nothing is touched; move it away, or choose --name or --out\n")
    Path("data/set/train_images.npy").unlink()
    assert call(data, "--size", 16, "--count", 100, "--name", "set") == 1
    assert capsys.readouterr().err.endswith("error: data/set exists and is not a packed data set: nothing is touched; choose --name or --out\n")
    assert said(data.refuse_other, {}, {"seed": 0}, "data/x", "choose --name") == "data/x was made with other settings (seed None, now 0): choose --name"
    Path("deep").mkdir(), Path("deep/a.json").write_text("[]")
    assert pytest.raises(ValueError, data.load_json, Path("deep/a.json"), a=int).value.args[0] == "deep/a.json is damaged, or not ours (a is not of the type int)"
    assert said(data.load_json, Path(os.devnull)) == "/dev/null is damaged, or not ours (it is not there, or is no file)"
    with pytest.raises(data.UsageError, match=r"^\.: give this folder by its name, as \.\./NAME$"):
        with data.locked(Path(".")):
            pass

def test_whole_lines_about_folders(there, capsys):
    folder(Path("in"), ("cat", "dog"), count=2)
    Path("in/train/eel").mkdir()
    assert said(data.list_classes, Path("in/train")) == ("in/train/eel holds no images (JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM, by their suffixes; what is hidden, packed data sets, runs, data/ and runs/ of the working directory "
                                                         "do not count): add some, or move it")
    photo().save("in/train/a.png")
    assert said(data.list_classes, Path("in/train")) == "in/train holds class folders (cat, ...) and 1 loose images (in/train/a.png, ...): put them into a class, or elsewhere"
    assert said(data.list_folder, Path("gone/x"), 0.1, 0) == "--root gone/x is not a folder"
    folder(Path("odd"), ("cat",), splits=("Train", "Test")), folder(Path("odd/Train"), ("fox",), splits=None)
    assert said(data.list_folder, Path("odd"), 0.1, 0) == "odd/Train and odd/Test must hold the same class folders; fox is in one only (ImageNet's val/ comes without: sort it; a contest's test/, too: move it away)"
    folder(Path("bus"), ("bus", "car", "train"), splits=None)
    assert said(data.list_folder, Path("bus"), 0.1, 0) == ("bus holds bus, car, train: are they classes, or splits? Rename a class that is called like a split; "
                                                         "of splits, leave train/ and one of val/ and test/ there, nothing else")
    capsys.readouterr()
    data.folder_source(data.Options(source="folder", root=Path("in/val"), size=16))
    assert capsys.readouterr().out == ("folders in in/val, or in its train/, are classes, with all that lies in them (but not data/ and runs/ of the working directory, "
                                       "where these scripts write); every image is cropped and scaled to 16 x 16, small ones enlarged; of 16 bits, 65535 is white\n")
    for name, root, words in (("folder", None, "--source folder needs --root, its folder"), ("shapes", Path("in"), "--root: shapes are drawn, they have no folder; images in one need --source folder")):
        assert said(data.SOURCES[name], data.Options(source=name, root=root)) == words
    assert said(data.cifar10_source, data.Options(source="cifar10", size=16)) == "--size: cifar10 is 32 pixels" and said(lambda: data.Options(name="a/b")) == "--name a/b: give a name, not a path"

def test_whole_lines_about_images(there, monkeypatch, capsys):
    assert said(data.to_rgb, Image.new("F", (2, 2))) == "its pixels must have 8 or 16 bits, no sign, and no planes of 16 bits (F)"
    folder(Path("in"), ("cat",), splits=None)
    for name in ("1.png", "3.png"):
        Path("in/cat", name).write_bytes(b"x")
    assert said(data.read_image, "in/cat/1.png").startswith("in/cat/1.png is not a readable image (UnidentifiedImageError: ")
    assert pack("--val-fraction", 0.01) == 0
    out = capsys.readouterr().out
    assert "2 unreadable images left out, listed in skipped.txt; first: in/cat/" in out
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda url, timeout: Answer(b"abd"))
    monkeypatch.setitem(data.ARCHIVES, "cifar10", (32, "https://host/a.tgz", "9" * 32))
    assert said(data.fetch, data.Options(source="cifar10", out=Path("."))) == f"cannot download https://host/a.tgz (OSError: its md5 is not {'9' * 32}): fetch it yourself and put it into downloads"
    Path("downloads/a.tgz").write_bytes(b"x")
    assert said(data.fetch, data.Options(source="cifar10", out=Path("."))) == f"downloads/a.tgz is damaged: its md5 is not {'9' * 32}; remove it and run again"
    assert data.help_text({"text": "x", "default": None, "choices": None}, None) == data.help_text({"text": "x", "default": False, "choices": None}, False) == "x"

def test_the_first_of_the_files_left_out_is_named(there, capsys):
    folder(Path("in"), ("cat", "dog"))
    for file in ("train/cat/1.png", "train/dog/2.png", "val/dog/2.png"):
        Path("in", file).write_bytes(b"x")
    assert pack() == 0 and "3 unreadable images left out, listed in skipped.txt; first: in/train/cat/1.png: " in capsys.readouterr().out
    for file in Path("in/train/dog").iterdir():
        file.write_bytes(b"x")
    assert pack("--name", "b") == 1 and "class dog has no readable image to train on; --fraction and hold-out left 6 in/train/dog/0.png: " in (error := capsys.readouterr().err) and "in/train/dog/0.png is not a readable image" in error

def test_what_texts_of_options_state():
    """Facts that the code decides."""
    texts = {cls: {e.name: e.metadata.get("text") for e in data.fields(cls)} for cls in (data.Options, train.Options, train.model.JiTConfig, sample.Options, sample.Settings)}
    assert texts[data.Options]["root"].endswith("(default: OUT/downloads)") and texts[data.Options]["size"] == "height and width in pixels (default: 64; cifar10 32; imagenette 160, 320)"
    wanted = {"steps": "optimizer steps; they take precedence over --epochs", "batch_size": "GLOBAL: images per optimizer step", "warmup": "steps (default: 5 epochs, at most 1/20 of the run)",
              "resume": "go on with a run that exists; steps, epochs, lr and amp may change", "lr": "learning rate (default: 5e-5 x batch size / 256)",
              "shift": "t -> t/(t + A(1-t)): above 1, more time near the noise (default: 1, or what the data set recommends)", "overwrite": "start the run anew; the old one is moved aside, to NAME.old",
              "preview_every": "steps between two previews; 0: only at the end", "save_minutes": "between checkpoints; the first after one minute at most", "label_drop": "share of labels replaced by the null class, for guidance"}
    assert {name: texts[train.Options][name] for name in wanted} == wanted and all(f"{name}, " in texts[train.Options]["experiment"] for name in train.EXPERIMENTS)
    assert texts[train.model.JiTConfig]["in_context_start"] == "the block before which they are put there" and texts[sample.Options]["ema"] == "which averaged weights, 0 = the first; -1 = the raw ones"
    assert texts[sample.Settings]["cfg"] == "guidance, 1 = off" and texts[sample.Settings]["shift"] == "t -> t/(t + A(1-t)): above 1, more steps near the noise"

def test_what_stopped_a_script_is_said(capsys):
    def main():
        raise KeyboardInterrupt("stopped at step 7; the same command goes on there")
    assert data.run(main) == 130 and capsys.readouterr().err.endswith(": error: stopped at step 7; the same command goes on there\n")

@pytest.mark.parametrize("damage_", [b"PK\x03\x04junk", b"\x93NUMPY\x01\x006\x00{'descr", b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (9999999999999999,)}".ljust(117) + b"\n"], ids=["zip", "header", "endless"])
def test_whatever_numpy_raises(there, damage_):
    assert call(data, "--size", 8, "--count", 100, "--workers", 1) == 0
    Path("data/shapes/val_labels.npy").write_bytes(damage_)
    assert said(data.open_data, "data/shapes").startswith("the data set at data/shapes cannot be read (")

def test_a_file_that_comes_while_a_set_is_packed_stays(there):
    assert call(data, "--size", 16, "--count", 100, "--workers", 1) == 0
    before = Path("data/shapes/train_images.npy").read_bytes()
    with pytest.raises(ValueError, match="data/shapes holds notes.txt, which this script did not write"), data.new_set(Path("data/shapes")) as part:
        (part / "meta.json").write_text("{}"), Path("data/shapes/notes.txt").write_text("mine")
    assert Path("data/shapes/notes.txt").read_text() == "mine" and Path("data/shapes/train_images.npy").read_bytes() == before and not part.exists()

def test_a_set_that_may_only_be_read_is_there(there, monkeypatch, capsys):
    """As a course's, which students link to."""
    assert call(data, "--size", 16, "--count", 100, "--workers", 1) == 0
    Path("data/.shapes.lock").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: path not in (Path("data"), Path("data/shapes")))
    assert call(data, "--size", 16, "--count", 100, "--workers", 1) == 0 and "nothing to do" in capsys.readouterr().out
    assert not Path("data/.shapes.lock").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "data")        # its folder alone may not be written to
    with data.locked(Path("data/shapes")):
        assert Path("data/.shapes.lock").exists()

def test_flags_of_other_sources_are_refused(capsys):
    for flags, words in ((["--source", "folder", "--count", 500], "--count is for shapes; others have --fraction"), (["--val-fraction", 0.2], "--val-fraction is for folders"),
                         (["--source", "cifar10", "--val-fraction", 0.2], "--val-fraction is for folders")):
        assert call(data, *flags) == 2 and capsys.readouterr().err.endswith(f"error: {words}\n")

def test_every_class_of_a_set_has_an_image(there):
    assert call(data, "--size", 16, "--count", 100, "--workers", 1) == 0
    path = Path("data/shapes/meta.json")
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"classes": [*meta["classes"], "hexagon"]}))         # by hand
    assert "train_labels.npy has a label outside 0..10, or a class has no image" in said(data.open_data, "data/shapes")
    path.write_text(json.dumps(meta | {"size": float("inf")}))
    assert "meta.json is damaged, or not ours (Out of range float values" in said(data.open_data, "data/shapes")

def test_a_set_on_a_disk_of_its_own_stays(there, monkeypatch, capsys):
    assert call(data, "--size", 16, "--count", 100, "--workers", 1) == 0
    before = Path("data/shapes/train_images.npy").read_bytes()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == Path("data/shapes"))
    assert call(data, "--size", 16, "--count", 100, "--seed", 1, "--workers", 1, "--overwrite") == 2
    assert "data/shapes cannot be replaced, a disk is mounted there: choose --name or --out" in capsys.readouterr().err
    assert data.open_data("data/shapes") and Path("data/shapes/train_images.npy").read_bytes() == before and not list(Path("data").glob(".*partial"))
    with monkeypatch.context() as patch:                  # what ismount does not see, a bind mount
        real = Path.replace
        patch.setattr(os.path, "ismount", lambda path: False)
        patch.setattr(Path, "replace", lambda path, new: real(path, new) if path != Path("data/shapes") else (_ for _ in ()).throw(OSError(16, "Device or resource busy")))
        assert call(data, "--size", 16, "--count", 100, "--seed", 1, "--workers", 1, "--overwrite") == 1 and "resource busy" in capsys.readouterr().err
    assert data.open_data("data/shapes") and Path("data/shapes/train_images.npy").read_bytes() == before and not list(Path("data").glob(".*partial"))
    assert call(data, "--size", 16, "--count", 100, "--workers", 1, "--name", "new") == 0

@pytest.mark.parametrize("terminal", [False, True])
def test_a_full_disk_under_the_screens_log_ends_nothing(monkeypatch, terminal):
    class Full(io.StringIO):
        def isatty(self):
            return terminal
        def write(self, text):
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(data.sys, "stderr", Full())
    bar = data.Progress(3, "x", " images", delay=1e-9)
    assert bar.lines is not terminal
    bar.fp = Full()
    bar.display()

def planar_tiff(path, image):
    """(H,W,3) uint16 -> an uncompressed TIFF file whose colours lie one after the other, as astronomers write it."""
    H, W, _ = image.shape
    planes = image.transpose(2, 0, 1).astype("<u2").tobytes()
    entries = [(256, 3, 1, W), (257, 3, 1, H), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 3, 208), (277, 3, 1, 3), (278, 3, 1, H), (279, 4, 3, 220), (284, 3, 1, 2)]
    head = struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + struct.pack("<I", 0)
    size = 2 * H * W
    more = struct.pack("<4H", 16, 16, 16, 0) + struct.pack("<3I", *(240 + k * size for k in range(3))) + struct.pack("<3I", *[size] * 3) + bytes(8)
    path.write_bytes(head.ljust(200, b"\0") + more + planes)

def test_planes_of_sixteen_bits_are_left_out(there):
    """Pillow reads them as planes of eight."""
    image = images_of(1, 8)[0].astype(np.uint16) * 257
    planar_tiff(Path("a.tif"), image)
    with Image.open("a.tif") as opened:
        assert opened.size == (8, 8) and opened.tag_v2[284] == 2
    with pytest.raises(ValueError, match="a.tif is not a readable image .*planes of 16 bits"):
        data.read_image(Path("a.tif"))

def test_two_downloads_of_one_archive(there, monkeypatch, capsys):
    """The second is refused, and takes nothing from the first."""
    cifar_archive(there / "served.tar.gz")
    monkeypatch.setitem(data.ARCHIVES, "cifar10", (32, (there / "served.tar.gz").as_uri(), data.file_hash(there / "served.tar.gz", "md5")))
    real = data.download

    def meanwhile(url, path):
        real(url, path)
        monkeypatch.setattr(data, "download", real)
        assert call(data, "--source", "cifar10", "--name", "other") == 1
        assert capsys.readouterr().err.endswith("error: another process is writing to data/downloads/served.tar.gz: wait for it, or stop it\n")
    monkeypatch.setattr(data, "download", meanwhile)
    assert call(data, "--source", "cifar10") == 0 and data.open_data("data/cifar10")

def test_grey_sets_made_by_hand_are_refused(packed, there):
    shutil.copytree(packed / "data/shapes", "grey")
    for split in ("train", "val"):
        np.save(f"grey/{split}_images.npy", np.load(f"grey/{split}_images.npy")[..., :1])
    meta = json.loads(Path("grey/meta.json").read_text())
    Path("grey/meta.json").write_text(json.dumps(meta | {"channels": 1}))
    with pytest.raises(ValueError, match="the train arrays do not fit meta.json"):
        data.open_data("grey")

def test_what_others_call_a_checkpoint_or_meta_json_hides_no_pictures(there, capsys):
    folder(Path("in"), splits=None)
    Path("in/cat/checkpoint.pt").touch(), Path("in/meta.json").write_text('{"classes": [{"title": "cat"}]}')
    assert pack() == 0 and sum(data.open_data("data/set")[0]["counts"].values()) == 12
    assert evaluate.ImageSet("in").images.shape[2] == 3
    with pytest.raises(ValueError, match="no data set at in"):
        data.open_data("in")
