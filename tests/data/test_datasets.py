"""Folders, splits and class names."""

import numpy as np
import pytest
from PIL import Image

from visformer.config import TrainConfig
from visformer.data import FolderSource, ImageError, class_mapping, open_data, open_evaluation
from visformer.data.folders import check_classes
from visformer.data.sources import stratified
from visformer.errors import UsageError


def write_folders(root, counts: dict[str, int], size: int = 8):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (size, size), (i, i, i)).save(root / name / f"{i}.png")
    return root


def config(root, **options) -> TrainConfig:
    return TrainConfig(data_dir=str(root), **options)


def test_folder_source(tmp_path):
    root = write_folders(tmp_path, {"dog": 2, "cat": 3})
    (root / "cat" / "deep").mkdir()
    Image.new("L", (4, 4)).save(root / "cat" / "deep" / "x.PNG")
    for ignored in (".hidden.png", "notes.txt", "deep/.DS_Store"):
        (root / "cat" / ignored).write_text("no image")
    (root / ".git").mkdir()
    (root / "README.md").write_text("no class")
    source = FolderSource(root)
    assert source.class_names == ["cat", "dog"] and len(source) == 6
    assert [source.target(i) for i in range(6)] == [0, 0, 0, 0, 1, 1]
    assert source.key(0) == "cat/0.png" and source.name(5) == str(root / "dog" / "1.png")
    assert source.key(3) == "cat/deep/x.PNG"
    assert source.load(3).mode == "RGB" and FolderSource(root, channels=1).load(0).mode == "L"


def test_unusual_file_names(tmp_path):
    names = ["späte Äpfel", "日本", "a'b\"c"]
    root = write_folders(tmp_path, dict.fromkeys(names, 1))
    source = FolderSource(root)
    assert source.class_names == sorted(names)
    assert all(source.load(i).size == (8, 8) for i in range(3))


def test_train_and_val_folders(tmp_path):
    write_folders(tmp_path / "train", {"a": 2, "b": 2, "c": 2})
    write_folders(tmp_path / "val", {"c": 1, "a": 2})
    data = open_data(config(tmp_path))
    assert data.class_names == ["a", "b", "c"] and data.split is None and data.val is not None
    assert [data.val.target(i) for i in range(3)] == [0, 0, 2]


def test_unknown_class_in_val_is_named(tmp_path):
    write_folders(tmp_path / "train", {"cats": 2, "dogs": 2})
    write_folders(tmp_path / "val", {"cat": 1})
    with pytest.raises(UsageError, match="unknown class 'cat'; did you mean cats"):
        open_data(config(tmp_path))


@pytest.mark.parametrize("name", ["validation", "valid", "eval"])
def test_other_names_of_the_validation_folder(tmp_path, name):
    write_folders(tmp_path / "train", {"a": 2})
    write_folders(tmp_path / name, {"a": 1})
    data = open_data(config(tmp_path))
    assert data.val is not None and len(data.val) == 1 and len(open_evaluation("imagenet", str(tmp_path))) == 1


@pytest.mark.parametrize("with_train_folder", [False, True])
def test_split_on_the_spot(tmp_path, with_train_folder):
    folder = tmp_path / "train" if with_train_folder else tmp_path
    write_folders(folder, {"a": 10, "b": 5, "c": 1})
    data = open_data(config(tmp_path, seed=3))
    assert data.val is not None and data.split is not None
    assert (len(data.train), len(data.val)) == (13, 3)
    assert sorted(data.split["train"] + data.split["val"]) == sorted(FolderSource(folder).key(i) for i in range(16))
    assert data.split["seed"] == 3 and data.split["val_fraction"] == 0.2 and data.split["data_dir"] == str(tmp_path)
    again = open_data(config(tmp_path, seed=3))
    assert again.split == data.split
    assert open_data(config(tmp_path, seed=4)).split["val"] != data.split["val"]
    recorded = open_data(config(tmp_path, seed=4), record=data.split)
    assert recorded.split == data.split
    evaluation = open_evaluation("imagenet", str(tmp_path), record=data.split)
    assert [evaluation.key(i) for i in range(3)] == data.split["val"]


def test_record_of_a_file_that_is_gone(tmp_path):
    write_folders(tmp_path, {"a": 5, "b": 5})
    data = open_data(config(tmp_path))
    (tmp_path / data.split["val"][0]).unlink()
    with pytest.raises(UsageError, match="no longer there"):
        open_data(config(tmp_path), record=data.split)


def test_nothing_is_held_out_without_validation(tmp_path):
    write_folders(tmp_path, {"a": 5, "b": 5})
    data = open_data(config(tmp_path, val_while_train=False))
    assert data.val is None and data.split is None and len(data.train) == 10


def test_stratified_holds_out_of_each_class(tmp_path):
    source = FolderSource(write_folders(tmp_path, {"a": 50, "b": 10, "c": 2, "d": 1}))
    train, val = stratified(source, 0.1, seed=0)
    held_out = np.bincount([val.target(i) for i in range(len(val))], minlength=4)
    assert held_out.tolist() == [5, 1, 1, 0]
    assert len(train) + len(val) == 63 and not set(train.indices) & set(val.indices)


def test_missing_folder(tmp_path):
    with pytest.raises(UsageError, match=r"data_dir: .*nowhere does not exist"):
        open_data(config(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        open_data(config(tmp_path / "file"))


def test_no_class_folders(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "loose.png")
    with pytest.raises(UsageError, match="no class folders"):
        open_data(config(tmp_path))


def test_val_without_train_is_not_taken_for_a_class(tmp_path):
    write_folders(tmp_path / "val", {"a": 2})
    with pytest.raises(UsageError, match="no folder 'train'"):
        open_data(config(tmp_path))


def test_named_split_that_is_not_there(tmp_path):
    write_folders(tmp_path / "train", {"a": 2})
    with pytest.raises(UsageError, match="no folder 'holdout'"):
        open_data(config(tmp_path, val_split="holdout"))
    with pytest.raises(UsageError, match="no folder 'test'; it has train"):
        open_evaluation("imagenet", str(tmp_path), split="test")


def test_empty_class_is_named(tmp_path):
    write_folders(tmp_path, {"a": 2, "empty": 0})
    (tmp_path / "empty" / "notes.txt").write_text("")
    with pytest.raises(UsageError, match="empty: no image in this class folder"):
        open_data(config(tmp_path))


def test_no_image_at_all(tmp_path):
    write_folders(tmp_path, {"a": 0, "b": 0})
    with pytest.raises(UsageError, match="no image"):
        open_data(config(tmp_path))


def test_class_in_which_nothing_decodes_is_named(tmp_path):
    write_folders(tmp_path, {"a": 2, "b": 2})
    for path in (tmp_path / "b").iterdir():
        path.write_text("not an image")
    with pytest.raises(UsageError, match=r"b: none of the 2 images of this class can be read .*0.png: not an image"):
        open_data(config(tmp_path))


def test_a_broken_image_among_good_ones_is_no_error(tmp_path):
    write_folders(tmp_path, {"a": 3})
    (tmp_path / "a" / "0.png").write_text("broken")
    source = FolderSource(tmp_path)
    check_classes(source)
    assert len(source) == 3
    with pytest.raises(ImageError):
        source.load(0)


def test_evaluation_takes_data_dir_itself_and_passes_over_empty_folders(tmp_path):
    write_folders(tmp_path, {"a": 2, "nothing": 0})
    source = open_evaluation("imagenet", str(tmp_path))
    assert source.class_names == ["a"] and len(source) == 2


def test_class_mapping():
    assert class_mapping(["b", "a"], ["a", "b", "c"]) == [1, 0]
    with pytest.raises(UsageError, match=r"class 'catz' of the data .* did you mean cats"):
        class_mapping(["catz"], ["cats", "dogs"])


def test_classes_without_names_go_by_their_order():
    assert class_mapping(["ant", "bee", "cat"], ["0", "1", "2"]) == [0, 1, 2]
    assert class_mapping(["2", "0"], ["0", "1", "2"]) == [2, 0]  # by name where the data has these names
    with pytest.raises(UsageError, match="class 'ant'"):
        class_mapping(["ant", "bee"], ["0", "1", "2"])


def test_unknown_dataset():
    with pytest.raises(UsageError, match="unknown 'cifar11'; did you mean cifar10"):
        open_data(TrainConfig(dataset="cifar11"))
