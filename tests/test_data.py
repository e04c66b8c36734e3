import gc
import io
import os
import shutil
import subprocess
import sys

import datasets
import huggingface_hub.constants
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from lipcert import sources
from lipcert.data import DIGITS, Dataset, Split, from_tensors, load, split_validation
from lipcert.errors import LipcertError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Every test has its own empty cache, and no way to the network."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def encode(array, mode=None, form="png"):
    picture = PIL.Image.fromarray(np.asarray(array))
    stream = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(stream, form)
    return {"bytes": stream.getvalue(), "path": None}


def noise(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def write(path, images, labels, columns=("image", "label"), names=("cat", "dog", "eel"), **more):
    """Writes a parquet file as the hub serves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = {columns[0]: datasets.Image(), columns[1]: label}
    features |= {name: datasets.Value("int64") for name in more}
    rows = {columns[0]: list(images), columns[1]: list(labels), **more}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
    return path.parent


@pytest.fixture
def folder(tmp_path):
    """Six colour pictures to train on, three to evaluate on; also their pixels."""
    pixels = noise(9, 4, 5, 3)
    pictures = [encode(p) for p in pixels]
    write(tmp_path / "toy/train-00000-of-00001.parquet", pictures[:6], [0, 1, 2, 2, 1, 0])
    write(tmp_path / "toy/test-00000-of-00001.parquet", pictures[6:], [2, 0, 1])
    return tmp_path / "toy", torch.from_numpy(pixels).permute(0, 3, 1, 2)


# ---- the embedded digits


def test_digits_are_the_published_ones():
    train, test = load(DIGITS, Split.TRAIN), load(DIGITS, Split.EVALUATION)
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape[1:] == (1, 8, 8)
    assert train.classes == tuple("0123456789")
    assert (train.split, test.split) == ("train", "test")
    counts = torch.cat([train.labels, test.labels]).bincount()  # as the UCI page counts them
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    levels = torch.cat([train.images, test.images]).unique()
    assert levels.tolist() == [round(v * 255 / 16) for v in range(17)]
    first_line = [0, 0, 5, 13, 9, 1, 0, 0]  # of the first picture, on the original scale
    assert train.images[0, 0, 0].tolist() == [round(v * 255 / 16) for v in first_line]


@pytest.mark.parametrize("source", ["./digits", "path"])
def test_a_folder_called_digits_is_not_the_embedded_data(folder, monkeypatch, source):
    os.rename(folder[0], folder[0].parent / "digits")
    monkeypatch.chdir(folder[0].parent)
    source = type(folder[0])("digits") if source == "path" else source
    assert load(source, Split.TRAIN).classes == ("cat", "dog", "eel")


def test_the_module_is_quick_to_import():
    code = (
        "import sys, lipcert.data;"
        "print([m for m in ('datasets', 'pyarrow', 'PIL', 'safetensors') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# ---- layouts, columns and splits


def test_a_parquet_folder_gives_every_byte_in_order(folder):
    for split, rows in ((Split.TRAIN, slice(6)), (Split.EVALUATION, slice(6, None))):
        data = load(folder[0], split)
        assert torch.equal(data.images, folder[1][rows])
    assert data.labels.tolist() == [2, 0, 1]
    assert data.labels.dtype == torch.int64
    assert data.source == str(folder[0])


def test_shards_are_joined_in_their_order(tmp_path):
    pixels = noise(4, 3, 3)
    for shard in (1, 0):
        rows = slice(2 * shard, 2 * shard + 2)
        name = f"plain_text/train-0000{shard}-of-00002.parquet"
        write(tmp_path / "toy" / name, map(encode, pixels[rows]), [shard, 2])
    data = load(tmp_path / "toy", Split.TRAIN)  # the nested folder is found as well
    assert torch.equal(data.images[:, 0], torch.from_numpy(pixels))
    assert data.labels.tolist() == [0, 2, 1, 2]


@pytest.mark.parametrize("image", ["image", "img", "pixel_values"])
@pytest.mark.parametrize("label", ["label", "fine_label", "labels"])
def test_the_columns_are_found_under_their_usual_names(tmp_path, image, label):
    pictures = map(encode, noise(3, 2, 2))
    write(
        tmp_path / "toy/train-0.parquet", pictures, [2, 0, 1], (image, label), coarse_label=[0] * 3
    )
    assert load(tmp_path / "toy", Split.TRAIN).labels.tolist() == [2, 0, 1]


def test_coarse_labels_are_taken_on_request_only(tmp_path):
    pictures = map(encode, noise(2, 2, 2))
    write(tmp_path / "toy/train-0.parquet", pictures, [0, 1], ("image", "coarse_label"))
    refused(tmp_path / "toy", "'fine_label'", "it has: image, coarse_label", "label_column=")
    data = load(tmp_path / "toy", Split.TRAIN, label_column="coarse_label")
    assert data.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("files", "split"),
    [
        (["test"], "test"),
        (["valid"], "validation"),
        (["validation", "test"], "test"),
        (["val"], "validation"),
    ],
)
def test_the_evaluation_split_has_aliases_and_keeps_its_real_name(tmp_path, files, split):
    for name in ("train", *files):
        write(tmp_path / f"toy/{name}-0.parquet", [encode(noise(1, 2, 2)[0])], [len(name) % 3])
    data = load(tmp_path / "toy", Split.EVALUATION)
    assert data.split == split
    assert data.labels.tolist() == [len(files[-1]) % 3]


def test_a_split_called_valid_by_the_data_card_is_found(folder):
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    card += "  - {split: train, path: train-*}\n  - {split: valid, path: test-*}\n---\n"
    (folder[0] / "README.md").write_text(card)
    data = load(folder[0], Split.EVALUATION)
    assert data.split == "valid"
    assert torch.equal(data.images, folder[1][6:])


def test_parquet_without_the_hubs_metadata_has_numbers_for_classes(tmp_path):
    (tmp_path / "raw").mkdir()
    for name, labels in (("train", [0, 4]), ("test", [1, 2])):
        rows = {"image": [encode(p) for p in noise(2, 3, 3)], "label": labels}
        pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / f"raw/{name}.parquet")
    test = load(tmp_path / "raw", Split.EVALUATION)
    assert torch.equal(test.images[:, 0], torch.from_numpy(noise(2, 3, 3)))
    assert test.classes == tuple("01234")  # the split itself never shows class 4


def test_an_image_folder(tmp_path):
    pixels = noise(4, 3, 3)
    for i, place in enumerate(["train/cat", "train/dog", "test/cat", "test/dog"]):
        (tmp_path / "toy" / place).mkdir(parents=True)
        PIL.Image.fromarray(pixels[i]).save(tmp_path / "toy" / place / "x.png")
    data = load(str(tmp_path / "toy"), Split.EVALUATION)
    assert torch.equal(data.images[:, 0], torch.from_numpy(pixels[2:]))
    assert (data.labels.tolist(), data.classes) == ([0, 1], ("cat", "dog"))


# ---- pixels


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [0, 2, 1]])
def test_one_colour_picture_makes_the_split_rgb(tmp_path, order):
    grey, colour, bits = noise(1, 3, 4)[0], noise(1, 3, 4, 3)[0], noise(1, 3, 4)[0] > 99
    pictures = [encode(grey), encode(colour), encode(bits)]
    expected = [
        np.stack([grey] * 3),
        colour.transpose(2, 0, 1),
        np.stack([bits * np.uint8(255)] * 3),
    ]
    write(tmp_path / "toy/train-0.parquet", [pictures[i] for i in order], [0, 1, 2])
    data = load(tmp_path / "toy", Split.TRAIN)
    assert torch.equal(data.images, torch.from_numpy(np.stack([expected[i] for i in order])))


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("P", 3), ("RGBA", 3)])
def test_every_8_bit_mode_becomes_grey_or_rgb(tmp_path, mode, channels):
    value = 255  # white: the same in every mode
    pictures = [encode(np.full((3, 4), value, np.uint8), mode)] * 2
    data = load(write(tmp_path / "toy/train-0.parquet", pictures, [0, 1]), Split.TRAIN)
    assert data.images.shape == (2, channels, 3, 4)
    assert (data.images == value).all()


def test_pixels_are_in_the_unit_interval_and_not_rounded():
    data = from_tensors(torch.arange(256).to(torch.uint8).view(4, 1, 8, 8), torch.zeros(4).long())
    assert data.pixels().dtype == torch.float32
    exact = torch.arange(256).double() / 255
    assert torch.equal(data.pixels(dtype=torch.float64).flatten(), exact)
    assert torch.equal(data.pixels().flatten(), exact.float())
    rows = torch.tensor([3, 0])
    assert torch.equal(data.pixels(rows), data.pixels()[rows])
    assert torch.equal(data.pixels(slice(1, 3)), data.pixels()[1:3])
    assert torch.equal(data.pixels(torch.tensor([True, False, False, True])), data.pixels()[[0, 3]])
    assert data.pixels(device="meta").device.type == "meta"


def test_a_subset_keeps_rows_together():
    data = from_tensors(torch.rand(5, 1, 2, 2), torch.arange(5), classes=tuple("abcde"))
    part = data.subset(torch.tensor([4, 1]))
    assert len(part) == 2
    assert torch.equal(part.images, data.images[[4, 1]])
    assert (part.labels.tolist(), part.classes) == ([4, 1], data.classes)


# ---- the cache of decoded pictures


def forbid(monkeypatch):
    def decode(*args):
        raise AssertionError("decoded again")

    monkeypatch.setattr(sources, "_decode", decode)


def test_the_second_call_does_not_decode(folder, monkeypatch):
    first = load(folder[0], Split.TRAIN)
    forbid(monkeypatch)
    assert torch.equal(load(folder[0], Split.TRAIN).images, first.images)
    with pytest.raises(AssertionError, match="decoded again"):
        load(folder[0], Split.EVALUATION)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "name", "rows", "type"])
def test_a_damaged_cache_file_is_made_anew(folder, cache, monkeypatch, damage):
    load(folder[0], Split.TRAIN)
    (file,) = (cache / "lipcert-decoded").iterdir()
    good = file.read_bytes()
    if damage in ("name", "rows", "type"):
        tensor = torch.zeros(6, 3, 4, 5, dtype=torch.uint8)
        wrong = {"rows": tensor[1:], "type": tensor.long()}.get(damage, tensor)
        save_file({"other" if damage == "name" else "images": wrong}, file)
    else:
        file.write_bytes({"cut": good[:-9], "garbage": bytes(len(good)), "empty": b""}[damage])
    assert torch.equal(load(folder[0], Split.TRAIN).images, folder[1][:6])
    assert file.read_bytes() == good
    forbid(monkeypatch)
    load(folder[0], Split.TRAIN)


def test_changed_data_are_not_served_from_the_cache(folder):
    load(folder[0], Split.TRAIN)
    file = folder[0] / "train-00000-of-00001.parquet"
    times = file.stat()
    pixels = noise(6, 4, 5, 3, seed=1)
    write(file, map(encode, pixels), [0] * 6)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1_000_000_000))
    data = load(folder[0], Split.TRAIN)
    assert torch.equal(data.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert data.labels.tolist() == [0] * 6


def test_folders_of_one_name_and_one_age_do_not_share_a_cache(tmp_path):
    for seed in (0, 1):
        file = tmp_path / f"{seed}/toy/train-0.parquet"
        write(file, [encode(noise(1, 2, 2, seed=seed)[0])], [seed])
        os.utime(file, (1e9, 1e9))
    for seed in (0, 1):
        data = load(tmp_path / f"{seed}/toy", Split.TRAIN)
        assert torch.equal(data.images[0, 0], torch.from_numpy(noise(1, 2, 2, seed=seed)[0]))
        assert data.labels.tolist() == [seed]


def test_two_columns_of_pictures_do_not_share_a_cache(tmp_path):
    pixels = noise(2, 2, 2)
    features = {"image": datasets.Image(), "img": datasets.Image(), "label": datasets.Value("int8")}
    rows = {"image": [encode(pixels[0])], "img": [encode(pixels[1])], "label": [0]}
    (tmp_path / "toy").mkdir()
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(tmp_path / "toy/train-0.parquet")
    for i, column in ((0, None), (1, "img")):
        data = load(tmp_path / "toy", Split.TRAIN, image_column=column)
        assert torch.equal(data.images[0, 0], torch.from_numpy(pixels[i]))


def test_without_room_for_the_cache_the_data_are_given_with_a_warning(folder, cache):
    cache.mkdir()
    (cache / "lipcert-decoded").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="not kept for the next call"):
        data = load(folder[0], Split.TRAIN)
    assert torch.equal(data.images, folder[1][:6])


@pytest.mark.parametrize("disabled", [False, True])
def test_nothing_is_printed_and_the_librarys_settings_come_back(folder, capfd, disabled):
    was = datasets.are_progress_bars_disabled()
    level = datasets.logging.get_verbosity()
    try:
        datasets.disable_progress_bars() if disabled else datasets.enable_progress_bars()
        datasets.logging.set_verbosity_info()
        load(folder[0], Split.TRAIN)
        (folder[0] / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
        with pytest.raises(LipcertError):
            load(folder[0], Split.TRAIN)
        assert datasets.are_progress_bars_disabled() == disabled
        assert datasets.logging.get_verbosity() == datasets.logging.INFO
    finally:
        datasets.disable_progress_bars() if was else datasets.enable_progress_bars()
        datasets.logging.set_verbosity(level)
    assert capfd.readouterr() == ("", "")


# ---- what is refused, and the words that must be in the message


def refused(source, *words, split=Split.TRAIN, **options):
    with pytest.raises(LipcertError) as caught:
        load(source, split, **options)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


def test_a_missing_folder(tmp_path):
    for source in (tmp_path / "absent", str(tmp_path / "absent"), "absent", "./absent/toy"):
        refused(source, "no folder", repr(str(source)), "--data", "train-*.parquet")


def test_a_file_instead_of_a_folder(folder):
    file = folder[0] / "test-00000-of-00001.parquet"
    refused(file, "not a folder", str(file), "--data")


def test_an_empty_name_is_not_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder[0])
    refused("", "''", "--data")
    assert len(load(".", Split.TRAIN)) == 6


def test_a_folder_without_readable_data(tmp_path):
    (tmp_path / "toy").mkdir()
    refused(tmp_path / "toy", str(tmp_path / "toy"), "train-*.parquet", "train/CLASS/x.png")
    (tmp_path / "toy/notes.bin").write_bytes(b"?")
    refused(tmp_path / "toy", str(tmp_path / "toy"), "train-*.parquet", "train/CLASS/x.png")


def test_the_hub_out_of_reach():
    refused("nobody/nothing", "nobody/nothing", "hub", "--data DIR", "train-*.parquet")


def test_a_split_that_is_not_there(folder):
    (folder[0] / "test-00000-of-00001.parquet").unlink()
    refused(folder[0], "test", "valid", "it has: train", split=Split.EVALUATION)


def test_columns_that_are_not_there(folder):
    refused(folder[0], "'x'", "it has: image, label", "image_column=", image_column="x")
    refused(folder[0], "'x'", "it has: image, label", "label_column=", label_column="x")


def test_columns_that_hold_something_else(folder, tmp_path):
    refused(folder[0], "'label'", "not pictures", "image_column=", image_column="label")
    refused(folder[0], "'image'", "not class numbers", "label_column=", label_column="image")


@pytest.mark.parametrize("name", ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"])
@pytest.mark.parametrize("damage", ["cut", "empty", "page"])
def test_a_damaged_parquet_file_is_named(folder, name, damage):
    file = folder[0] / name
    good = file.read_bytes()
    page = good[:4] + bytes(60) + good[64:]  # the footer is sound, the first page's header is not
    file.write_bytes({"cut": good[:-20], "empty": b"", "page": page}[damage])
    refused(folder[0], str(file), "fetch it again")


def test_an_empty_split_is_refused_and_does_not_spoil_the_other(folder):
    write(folder[0] / "test-00000-of-00001.parquet", [], [])
    refused(folder[0], "'test'", "empty", split=Split.EVALUATION)
    assert len(load(folder[0], Split.TRAIN)) == 6


@pytest.mark.parametrize(("label", "word"), [(-1, "hidden"), (None, "no label")])
def test_hidden_labels(tmp_path, label, word):
    pictures = [encode(p) for p in noise(3, 2, 2)]
    folder = write(tmp_path / "toy/train-0.parquet", pictures, [1, label, 0])
    refused(folder, "'train'", word, "published")


def test_labels_beyond_the_classes(tmp_path):
    # Only a file of another tool can hold these: plain numbers beside the hub's class names.
    pictures = [encode(p) for p in noise(3, 2, 2)]
    folder = write(tmp_path / "toy/train-0.parquet", pictures, [0, 1, 2])
    table = pyarrow.parquet.read_table(folder / "train-0.parquet")
    table = table.set_column(1, "label", pyarrow.array([0, 1, 3]))
    pyarrow.parquet.write_table(table, folder / "train-0.parquet")
    refused(folder, "row 2", "label 3", "3 classes")


def test_pictures_of_several_sizes(tmp_path):
    pictures = [encode(np.zeros((3, 4), np.uint8)), encode(np.zeros((4, 3), np.uint8))]
    folder = write(tmp_path / "toy/train-0.parquet", pictures, [0, 1])
    refused(folder, "row 1", "4 x 3", "3 x 4")


def test_pictures_with_16_bits(tmp_path):
    folder = write(tmp_path / "toy/train-0.parquet", [encode(np.zeros((2, 2), np.uint16))], [0])
    refused(folder, "row 0", "I;16", "8 bits")


@pytest.mark.parametrize("bad", [None, {"bytes": b"\x89PNG\r\n\x1a\n", "path": None}, "cut"])
def test_an_unreadable_picture_is_named_by_its_row(tmp_path, bad):
    good = encode(noise(1, 9, 9)[0])
    bad = {"bytes": good["bytes"][:60], "path": None} if bad == "cut" else bad
    folder = write(tmp_path / "toy/train-0.parquet", [good, good, bad], [0, 1, 2])
    refused(folder, "'train'", "row 2", "unreadable")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Pillow leaves a damaged file open
def test_an_unreadable_picture_file_is_named(tmp_path):
    for place in ("cat", "dog"):
        (tmp_path / "toy/train" / place).mkdir(parents=True)
        (tmp_path / "toy/train" / place / "x.png").write_bytes(encode(noise(1, 9, 9)[0])["bytes"])
    file = tmp_path / "toy/train/dog/x.png"
    file.write_bytes(file.read_bytes()[:60])
    refused(tmp_path / "toy", "row 1", str(file))
    gc.collect()  # so that the warning falls into this test


def test_several_data_sets_in_one_folder_are_not_joined(folder, tmp_path):
    shutil.copytree(folder[0], tmp_path / "all/a")
    shutil.copytree(folder[0], tmp_path / "all/b")
    refused(tmp_path / "all", str(tmp_path / "all/a"), str(tmp_path / "all/b"), "one of them")
    assert len(load(tmp_path / "all/a", Split.TRAIN)) == 6


def test_several_configurations_are_listed(folder):
    card = "---\nconfigs:\n"
    card += "".join(f"- {{config_name: {c}, data_files: 'train-*'}}\n" for c in ("big", "small"))
    (folder[0] / "README.md").write_text(card + "---\n")
    refused(folder[0], "big", "small")


# ---- tensors


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_tensors_are_kept_bit_for_bit(dtype):
    images = (torch.rand(4, 2, 3, 3) * (255 if dtype == torch.uint8 else 1)).to(dtype)
    data = from_tensors(images, torch.tensor([0, 2, 1, 0], dtype=torch.int32))
    assert torch.equal(data.images, images)
    assert data.images.dtype == dtype
    assert data.labels.dtype == torch.int64
    assert data.classes == ("0", "1", "2")
    if dtype != torch.uint8:
        assert torch.equal(data.pixels(dtype=dtype), images)


@pytest.mark.parametrize(
    ("images", "labels", "word"),
    [
        (torch.rand(3, 8, 8), torch.zeros(3).long(), "(3, 8, 8)"),
        (torch.rand(3, 1, 8, 8), torch.zeros(3, 1).long(), "(3, 1)"),
        (torch.rand(3, 1, 8, 8), torch.zeros(2).long(), "(2,)"),
        (torch.rand(3, 1, 8, 8) * 255, torch.zeros(3).long(), "[0, 1]"),
        (torch.rand(3, 1, 8, 8) - 1, torch.zeros(3).long(), "[0, 1]"),
        (torch.full((3, 1, 8, 8), torch.nan), torch.zeros(3).long(), "not a number"),
        (torch.zeros(3, 1, 8, 8).long(), torch.zeros(3).long(), "int64"),
        (torch.rand(3, 1, 8, 8), torch.zeros(3), "integers"),
        (torch.rand(3, 1, 8, 8), torch.zeros(3).bool(), "integers"),
        (torch.rand(0, 1, 8, 8), torch.zeros(0).long(), "empty"),
        (torch.rand(3, 1, 8, 8), torch.tensor([0, 1, -1]), "row 2"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(images, labels, word):
    with pytest.raises(LipcertError) as caught:
        from_tensors(images, labels)
    assert word in str(caught.value)


def test_labels_must_be_among_the_given_classes():
    with pytest.raises(LipcertError, match="row 1 has the label 2, outside the 2 classes"):
        from_tensors(torch.rand(2, 1, 2, 2), torch.tensor([0, 2]), classes=("a", "b"))


# ---- holding out


def numbered(labels):
    """Pictures that carry their own row number."""
    n = len(labels)
    return from_tensors((torch.arange(n) / n).view(n, 1, 1, 1), torch.tensor(labels))


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("counts", [[40, 40, 40], [7, 90, 3], [1, 1, 1, 20]])
def test_held_out_rows_are_a_stratified_part(counts, fraction):
    labels = [c for c, count in enumerate(counts) for _ in range(count)][::-1]
    data = numbered(labels)
    train, held = split_validation(data, fraction, seed=3)
    assert len(held) == round(fraction * len(data))
    rows = [(part.images.flatten() * len(data)).round().long() for part in (train, held)]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(len(data)))
    for part, row in zip((train, held), rows, strict=True):
        assert torch.equal(part.labels, data.labels[row])
        assert (row.diff() > 0).all()
    for label, count in enumerate(counts):
        assert abs(int((held.labels == label).sum()) - len(held) * count / len(data)) < 1


def test_the_choice_is_random_and_set_by_the_seed_alone():
    data = numbered([0, 1] * 50)
    chosen = []
    for seed in (0, 0, 1):
        torch.rand(seed + 1)  # the global random state must not matter
        chosen.append(split_validation(data, 0.5, seed)[1].images)
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])
    state = torch.get_rng_state()
    split_validation(data, 0.5, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_row_is_held_out_as_often_as_any_other():
    data = numbered([0] * 4 + [1] * 6)
    hits = torch.zeros(10)
    for seed in range(600):
        rows = (split_validation(data, 0.3, seed)[1].images.flatten() * 10).round().long()
        hits[rows] += 1
    assert (hits / 600 - 0.3).abs().max() < 0.08  # four standard deviations


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1.5, 0.01, 0.99, float("nan")])
def test_an_empty_part_is_refused(fraction):
    with pytest.raises(LipcertError, match="validation fraction"):
        split_validation(numbered([0, 1, 0, 1]), fraction, seed=0)


def test_a_data_set_cannot_be_changed():
    data = numbered([0, 1])
    assert isinstance(data, Dataset)
    with pytest.raises(AttributeError):
        data.labels = data.labels
