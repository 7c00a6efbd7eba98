"""Labels and features of other programs, on files made in their structure."""

import json
import os
import re
import shlex

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, run_inside
from PIL import Image
from pycocotools import mask as coco_mask

from core.data.finder import LABELS, Files
from core.data.labels import palette, read_label, write_label
from core.run.errors import UserError
from tools.exchange.arrays import class_maps, read_saved
from tools.exchange.names import match, read_names
from tools.exchange.sources import from_colours, from_label_maps, photograph_of, read_mask
from tools.import_features import as_grid, check_axes, common_reading, read_array
from tools.import_labels import report

NAMES = ("boat", "bird", "car")
SIZE = (40, 60)


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in ("one", "two"):
        picture = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8)
        cv2.imwrite(str(folder / f"{name}.jpg"), picture)
    return folder


def truth() -> np.ndarray:
    """A boat on the left and a car on the right."""
    label = np.zeros(SIZE, np.uint8)
    label[10:30, 5:25], label[5:35, 40:55] = 1, 3
    return label


def maps_of(label: np.ndarray, step: int = 1) -> np.ndarray:
    """(3, H / step, W / step) activations."""
    return np.stack([(label[::step, ::step] == k) * 0.9 for k in (1, 2, 3)]).astype(np.float32)


def imported(source, photographs, *options: str):
    output = photographs.parent / "labels"
    arguments = ("--images", photographs, "--output", output, "--workers", 1, *options)
    return run_inside("tools/import_labels.py", source, *arguments), output


def by_names(*names: str) -> tuple[str, str]:
    return "--classes", ",".join(names or NAMES)


def irnet(path):
    maps = torch.from_numpy(maps_of(truth()))[[0, 2]]
    small = maps[:, ::4, ::4].clone()
    content = {"keys": torch.tensor([0, 2]), "cam": small, "high_res": maps.numpy()}
    np.save(path, content)


def clip_es(path):
    maps = maps_of(truth())[[0, 2]]
    np.save(path, {"keys": np.array([0, 2]), "attn_highres": maps, "highres": maps * 0})


def psa(path):
    np.save(path, {0: maps_of(truth())[0], 2: maps_of(truth())[2]})


def activations(path):
    np.save(path, maps_of(truth()))


def probabilities(path):
    maps = maps_of(truth())
    np.savez(path.with_suffix(".npz"), np.concatenate([1 - maps.sum(0, keepdims=True), maps]))


def logits_last(path):
    maps = maps_of(truth())
    np.save(
        path, np.concatenate([0.5 - maps.sum(0, keepdims=True), maps * 9 - 1]).transpose(1, 2, 0)
    )


def weclip(path):
    maps = maps_of(truth())
    logits = np.concatenate([0.5 - maps.sum(0, keepdims=True), maps * 9 - 1])[None]
    np.save(path, {"segs": logits * 0, "msc_segs": logits})


def numbers(path):
    np.save(path, truth().astype(np.int64))


@pytest.mark.parametrize(
    "save", [irnet, clip_es, psa, weclip, activations, probabilities, logits_last, numbers]
)
def test_arrays_become_label_maps(photographs, tmp_path, save):
    folder = tmp_path / "arrays"
    folder.mkdir()
    for name in ("one", "two"):
        save(folder / f"{name}.npy")
    done, output = imported(folder, photographs, *by_names())
    assert done.returncode == 0, done.stderr
    assert "boat  ->  1 boat" in done.stdout and "2 label maps" in done.stdout
    assert np.array_equal(read_label(output / "one.png", 3, SIZE), truth())
    assert json.loads((output / "made_from.json").read_text())["classes"] == [*NAMES]
    (output / "one.png").unlink()
    done, _ = imported(folder, photographs, *by_names())  # goes on
    assert done.returncode == 0 and (output / "one.png").exists()
    done, _ = imported(folder, photographs, *by_names(), "--threshold", "0.5")
    assert done.returncode == 1 and "choose another --output" in done.stderr
    assert "threshold: 0.3 there, 0.5 now" in done.stderr


def test_maps_are_refined_by_the_crf(photographs, tmp_path):
    (tmp_path / "arrays").mkdir()
    psa(tmp_path / "arrays/one.npy")
    done, output = imported(tmp_path / "arrays", photographs, *by_names(), "--crf")
    assert done.returncode == 0 and "dense CRF" in done.stdout, done.stderr
    assert "left out: 1 photographs without a label" in done.stderr
    assert {*np.unique(read_label(output / "one.png"))} <= {0, 1, 3}


def test_classes_are_matched_by_name(photographs, tmp_path):
    (tmp_path / "arrays").mkdir()
    numbers(tmp_path / "arrays/one.npy")
    theirs = ("--source-classes", "Boats,tree,airplane")
    ours = ("--classes", "aeroplane,boat")
    done, _ = imported(tmp_path / "arrays", photographs, *theirs, *ours)
    assert done.returncode == 1 and "'tree' is none of ours" in done.stderr
    done, output = imported(tmp_path / "arrays", photographs, *theirs, *ours, "--map", "tree=")
    assert done.returncode == 0 and "left out" in done.stdout, done.stderr
    label = read_label(output / "one.png")
    assert (label[truth() == 1] == 2).all() and (label[truth() == 3] == 1).all()


def test_names_that_fit_several_or_none_are_refused():
    assert match(["tv", "couch", "person"], ["tvmonitor", "person", "sofa"]) == [1, 3, 2]
    with pytest.raises(UserError, match="'Boats' may be boat or BOAT"):
        match(["Boats"], ["boat", "BOAT"])
    with pytest.raises(UserError, match="no class 'ship'; there are boat"):
        match(["boat"], ["boat"], {"ship": "boat"})
    with pytest.raises(UserError, match="no class 'ship'; there are bird"):
        match(["boat"], ["bird"], {"boat": "ship"})
    assert match(["a", "b"], ["a"], {"b": ""}) == [1, 0]


def test_names_come_from_a_list_or_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("boat\nbird\n\n \n")
    assert read_names(str(tmp_path / "names.txt")) == ("boat", "bird") == read_names("boat, bird")
    for text, said in (
        ("boat,boat", "twice"),
        (str(tmp_path / "no.txt"), "missing"),
        (str(tmp_path / "names"), "missing"),
        (",", "none"),
        ("boat,,bird", "name 2 is empty"),
        (",".join(f"c{k}" for k in range(254)), "can hold 253"),
    ):
        with pytest.raises(UserError, match=said):
            read_names(text)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("boat\n\nbird\n", "name 2 is empty"),
        ("0 background\n1 boat\n2 bird\n", "without numbers"),
        ("1: boat\n3: bird\n", "without numbers"),
    ],
)
def test_names_whose_numbers_would_shift_are_refused(tmp_path, content, said):
    (tmp_path / "names.txt").write_text(content)
    with pytest.raises(UserError, match=said) as error:
        read_names(str(tmp_path / "names.txt"))
    assert "names.txt" in str(error.value)


def test_names_may_contain_numbers():
    assert read_names("7 up,3 series") == ("7 up", "3 series")
    assert read_names("0,1,2") == ("0", "1", "2")


@pytest.mark.parametrize("layout", ["{c}/{i}", "{i}/{c}", "{i}_{c}"])
def test_one_mask_a_class(photographs, tmp_path, layout):
    for name in ("one", "two"):
        for number, class_name in ((1, "boat"), (3, "car")):
            path = tmp_path / "masks" / (layout.format(c=class_name, i=name) + ".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), (truth() == number) * np.uint8(255))
    done, output = imported(tmp_path / "masks", photographs, *by_names())
    assert done.returncode == 0 and "one mask per class" in done.stdout, done.stderr
    assert np.array_equal(read_label(output / "two.png"), truth())


def test_colours_of_a_table(photographs, tmp_path):
    table = tmp_path / "labelmap.txt"
    table.write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:9,8,7::\nboat:1,2,3::\n"
    )
    picture = np.zeros((*SIZE, 3), np.uint8)
    picture[truth() == 1], picture[truth() == 3] = (3, 2, 1), (7, 8, 9)  # OpenCV's order
    (tmp_path / "masks").mkdir()
    cv2.imwrite(str(tmp_path / "masks/one.png"), picture)
    done, output = imported(tmp_path / "masks", photographs, *by_names(), "--colours", str(table))
    assert done.returncode == 0 and "car   ->  3 car" in done.stdout, done.stderr
    assert np.array_equal(read_label(output / "one.png"), truth())
    picture[0, 0] = 200
    cv2.imwrite(str(tmp_path / "masks/two.png"), picture)
    done, _ = imported(tmp_path / "masks", photographs, *by_names(), "--colours", str(table))
    assert done.returncode == 1 and "colour (200, 200, 200), which" in done.stderr
    table.write_text("background:::\ncar:::\nboat:::\n")  # Datumaro's, for VOC's own colours
    done, _ = imported(tmp_path / "masks", photographs, *by_names(), "--colours", str(table))
    assert done.returncode == 1 and "leave out --colours" in done.stderr


def coco(form: str) -> dict:
    """COCO's instances of `truth`, whose category ids have gaps."""
    annotations = []
    for number, category in ((1, 9), (3, 4)):
        mask = truth() == number
        encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        flat = mask.T.reshape(-1)
        edges = np.flatnonzero(np.diff(flat, prepend=False, append=False))
        y, x = np.nonzero(mask)
        x0, y0, x1, y1 = (int(v) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1))
        segmentation = {
            "polygon": [[x0, y0, x1, y0, x1, y1, x0, y1]],
            "text": {"size": [*SIZE], "counts": encoded["counts"].decode()},
            "numbers": {"size": [*SIZE], "counts": np.diff([0, *edges, flat.size]).tolist()},
        }[form]
        annotation = {"id": number, "image_id": 7, "category_id": category, "iscrowd": 0}
        annotations.append({**annotation, "segmentation": segmentation, "area": int(mask.sum())})
    image = {"id": 7, "file_name": "photos/one.jpg", "height": SIZE[0], "width": SIZE[1]}
    categories = [{"id": 9, "name": "boat"}, {"id": 4, "name": "car"}]
    return {"images": [image], "annotations": annotations, "categories": categories}


@pytest.mark.parametrize("form", ["polygon", "text", "numbers"])
def test_instances_of_coco(photographs, tmp_path, form):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco(form)))
    done, output = imported(path, photographs, *by_names())
    assert done.returncode == 0, done.stderr
    assert np.array_equal(read_label(output / "one.png"), truth())


def test_classes_of_coco_are_taken_if_none_are_given(photographs, tmp_path):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco("polygon")))
    done, output = imported(path, photographs)
    assert done.returncode == 0 and '\'["car", "boat"]\'' in done.stdout, done.stderr
    assert (read_label(output / "one.png")[truth() == 3] == 1).all()


def test_unused_category_of_the_same_name_is_left_out(photographs, tmp_path):
    content = coco("polygon")
    content["categories"].insert(0, {"id": 0, "name": "boat"})  # Roboflow's project
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    done, output = imported(path, photographs, *by_names())
    assert done.returncode == 0, done.stderr
    assert np.array_equal(read_label(output / "one.png"), truth())


def test_names_with_folders_are_those_of_the_photographs(photographs, tmp_path):
    (photographs / "photos").mkdir()
    for name in ("one", "two"):
        (photographs / f"{name}.jpg").rename(photographs / f"photos/{name}.jpg")
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco("polygon")))
    done, output = imported(path, photographs, *by_names())
    assert done.returncode == 0, done.stderr
    assert np.array_equal(read_label(output / "photos/one.png"), truth())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("one.jpg", "one"),
        ("photos/one.jpg", "one"),
        ("album/my boat+1.jpg", "album/my boat+1"),
        ("/data/local-files/?d=album/my%20boat%2B1.jpg", "album/my boat+1"),
        ("/data/local-files/?d=photos%2Fone.jpg", "one"),
        ("images/0a1b2c3d-one.jpg", "one"),
        ("0a1b2c3d-two.jpg", "0a1b2c3d-two"),  # the photograph's own name
        ("photos/three.jpg", "three"),  # no photograph of this name; said later
    ],
)
def test_names_of_annotation_tools_are_understood(name, expected):
    photographs = {"one", "album/my boat+1", "0a1b2c3d-two"}
    assert photograph_of(name, photographs) == expected


class Hostile:
    """Unpickled, it would make a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return type(self.mark).touch, (self.mark,)


def test_hostile_pickle_is_refused_and_not_run(photographs, tmp_path):
    (tmp_path / "arrays").mkdir()
    mark = tmp_path / "ran"
    # A pickle on purpose: the test needs the hostile file that the tool must refuse.
    np.save(tmp_path / "arrays/one.npy", {0: Hostile(mark)}, allow_pickle=True)
    done, _ = imported(tmp_path / "arrays", photographs, *by_names())
    assert done.returncode == 1 and "nothing of it was run" in done.stderr and not mark.exists()
    assert done.stderr.count("error") == 1 and "Traceback" not in done.stderr
    with pytest.raises(UserError, match="nothing of it was run"):
        read_saved(tmp_path / "arrays/one.npy")
    # Unsafe on purpose: only this shows that the file, made above, was hostile at all.
    np.load(tmp_path / "arrays/one.npy", allow_pickle=True)
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({5: np.zeros(SIZE)}, "a map of class 5; with 3 classes, they are 0..2"),
        ({"a": 1, "b": 2}, "has the entries a, b"),
        ({"keys": [0, 1], "cam": np.zeros((1, 4, 4))}, "has 2 classes and maps"),
        ({0: np.full(SIZE, np.nan)}, "not finite"),
        (np.zeros((7, *SIZE), "f4"), "an array of shape"),
        (np.full(SIZE, 9), "contains label 9"),
        (np.array(["x"]), "not numbers"),
        ({0: np.zeros((60, 40))}, "another shape"),
        (np.zeros((4, 60, 40), "f4"), "another shape"),
    ],
)
def test_wrong_arrays_are_refused_with_the_file(photographs, tmp_path, content, said):
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays/one.npy", content)
    done, _ = imported(tmp_path / "arrays", photographs, *by_names())
    assert done.returncode == 1 and said in done.stderr and "one.npy" in done.stderr
    assert "Traceback" not in done.stderr


def test_files_that_are_no_arrays_or_have_no_names_are_refused(photographs, tmp_path):
    (tmp_path / "arrays").mkdir()
    (tmp_path / "arrays/one.npy").write_bytes(b"nothing")
    done, _ = imported(tmp_path / "arrays", photographs, *by_names())
    assert done.returncode == 1 and "not saved by numpy.save" in done.stderr
    done, _ = imported(tmp_path / "arrays", photographs)
    assert done.returncode == 1 and "give --classes" in done.stderr
    done, _ = imported(tmp_path / "none", photographs, *by_names())
    assert done.returncode == 1 and "is missing" in done.stderr
    (tmp_path / "arrays/one.npy").rename(tmp_path / "arrays/other.npy")
    done, _ = imported(tmp_path / "arrays", photographs, *by_names())
    assert done.returncode == 1 and "no photograph has the name of a label" in done.stderr


def test_label_maps_of_another_size_are_refused(photographs, tmp_path):
    (tmp_path / "maps").mkdir()
    cv2.imwrite(str(tmp_path / "maps/one.png"), np.zeros((20, 30), np.uint8))
    done, _ = imported(tmp_path / "maps", photographs, *by_names())
    assert done.returncode == 1 and "30x20 pixels, its photograph 60x40" in done.stderr


def test_activations_beyond_one_are_scaled(tmp_path):
    keys, maps = class_maps({1: np.array([[-3.0, 8.0]])}, tmp_path, 2)
    assert keys.tolist() == [1] and maps.tolist() == [[[0, 1]]]


GRID = np.random.default_rng(0).normal(size=(24, 12, 18)).astype("f4")  # of 40 x 60 pixels
SQUARE = np.random.default_rng(0).normal(size=(24, 14, 14)).astype("f4")


def tokens(grid: np.ndarray, special: int) -> np.ndarray:
    flat = grid.reshape(len(grid), -1).T
    return np.concatenate([np.zeros((special, len(grid)), "f4"), flat])


@pytest.mark.parametrize("grid", [GRID, SQUARE])
@pytest.mark.parametrize("special", [0, 1, 5])
def test_features_are_told_by_their_shape(tmp_path, grid, special):
    path = tmp_path / "a.npy"
    for array in (grid, grid[None], grid.transpose(1, 2, 0), tokens(grid, special)[None]):
        np.save(path, array)
        assert np.array_equal(as_grid(read_array(path), SIZE, path)[0], grid)


def test_tokens_are_read_alike_in_all_files(tmp_path):
    """261 are a class token and 13 x 20, or that, four registers and a square of 16."""
    wide, high, other = (333, 500), (500, 333), (375, 500)
    with pytest.raises(UserError, match="several ways to read its tokens, such as 261"):
        common_reading([(261, wide), (261, high)], tmp_path)
    assert common_reading([(261, wide), (261, other)], tmp_path) == (5, True)
    assert common_reading([(261, wide), (1 + 15 * 20, other)], tmp_path) == (1, False)
    assert common_reading([(197, other)], tmp_path) == (1, True)  # nor 5 and 12 x 16
    assert common_reading([(201, (224, 224))], tmp_path) == (5, True)
    with pytest.raises(UserError, match="no way to read"):
        common_reading([(262, wide), (261, wide)], tmp_path)


@pytest.mark.parametrize("shape", [(384, 196), (768, 1200), (256, 196), (400, 196)])
def test_channels_are_not_taken_for_tokens(tmp_path, shape):
    told = "seems to be (D, tokens)" if shape[0] == 384 else "may be (tokens, D) or"
    with pytest.raises(UserError, match=re.escape(told)):
        check_axes(shape, (375, 500), tmp_path)
    check_axes((197, 768), (375, 500), tmp_path)


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (1e6 * GRID, "do not fit into float16"),
        (1e-7 * GRID, "do not fit into float16"),
        (0 * GRID, "nothing but zeros"),
        (GRID[:0], "is empty"),
    ],
)
def test_features_that_would_be_lost_are_refused(photographs, tmp_path, array, told):
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features/one.npy", array)
    arguments = ("--images", photographs, "--output", tmp_path / "ours")
    done = run_inside("tools/import_features.py", tmp_path / "features", *arguments)
    assert done.returncode == 1 and told in done.stderr
    assert not [*tmp_path.glob("ours/*.npy")]


def test_features_of_another_source_are_refused(photographs, tmp_path):
    arguments = ("--images", photographs, "--output", tmp_path / "ours")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "one.npy", GRID)
    assert not run_inside("tools/import_features.py", tmp_path / "first", *arguments).returncode
    done = run_inside("tools/import_features.py", tmp_path / "second", *arguments)
    assert done.returncode == 1 and "features made from something else" in done.stderr
    times = (tmp_path / "first/one.npy").stat()
    np.save(tmp_path / "first/one.npy", 2 * GRID)
    os.utime(tmp_path / "first/one.npy", ns=(0, times.st_mtime_ns - 10**9))  # as rsync sets it
    done = run_inside("tools/import_features.py", tmp_path / "first", *arguments)
    assert done.returncode == 1 and "another content, first one" in done.stderr
    arguments = ("--images", photographs, "--output", tmp_path / "first")
    done = run_inside("tools/import_features.py", tmp_path / "first", *arguments)
    assert done.returncode == 1 and "would be read as input" in done.stderr


def test_tokens_of_turned_photographs_are_refused(photographs, tmp_path):
    picture, exif = Image.new("RGB", SIZE), Image.Exif()
    exif[0x0112] = 6
    picture.save(photographs / "one.jpg", exif=exif)
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features/one.npy", tokens(GRID[:22], 1))
    arguments = ("--images", photographs, "--output", tmp_path / "ours")
    done = run_inside("tools/import_features.py", tmp_path / "features", *arguments)
    assert done.returncode == 1 and "is turned by EXIF" in done.stderr


def test_tensors_with_gradients_are_read_and_sparse_ones_refused(tmp_path):
    path = tmp_path / "a.PT"
    torch.save(torch.from_numpy(GRID).requires_grad_(), path)
    assert np.array_equal(read_array(path), GRID)
    torch.save(torch.from_numpy(GRID).to_sparse(), path)
    with pytest.raises(UserError, match="sparse|cannot be read"):
        read_array(path)


@pytest.mark.parametrize("shape", [(14, 14, 14), (4, 6, 4, 6), (7,), (11, 24)])
def test_features_of_an_unclear_shape_are_refused(tmp_path, shape):
    with pytest.raises(UserError, match="no grid, or more than one, fits|no way to read"):
        as_grid(np.zeros(shape, np.float32), SIZE, tmp_path)


def test_features_become_files_for_stage_3(photographs, tmp_path):
    (tmp_path / "features").mkdir()
    torch.save(torch.from_numpy(GRID), tmp_path / "features/one.pt")
    np.savez(tmp_path / "features/two.npz", GRID.transpose(1, 2, 0))
    arguments = ("--images", photographs, "--output", tmp_path / "ours", "--workers", 1)
    done = run_inside("tools/import_features.py", tmp_path / "features", *arguments)
    assert done.returncode == 0, done.stderr
    assert "1 files read as (D, h, w)" in done.stdout and "(h, w, D)" in done.stdout
    for name in ("one", "two"):
        assert np.array_equal(np.load(tmp_path / f"ours/{name}.npy"), GRID.astype(np.float16))
    torch.save({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "features/one.pt")
    (tmp_path / "ours/one.npy").unlink()
    done = run_inside("tools/import_features.py", tmp_path / "features", *arguments)
    assert done.returncode == 1 and "contains the entries a, b" in done.stderr


def label_maps(path):
    write_label(path.with_suffix(".png"), truth())


def voc_colours(path):
    cv2.imwrite(str(path.with_suffix(".png")), palette()[truth()][..., ::-1])


def instances(path):
    path.with_name("instances.json").write_text(json.dumps(coco("polygon")))


def cvat(path):
    lines = ("background:0,0,0::", "boat:128,0,0::", "bird:0,128,0::", "car:128,128,0::")
    path.parent.parent.joinpath("labelmap.txt").write_text("\n".join(lines))
    voc_colours(path)


PAGE = (ROOT / "docs/import.md").read_text()
SOURCES = {  # heading of the page: what its code writes
    "IRNet, AdvCAM and their descendants": irnet,
    "SEAM, PSA, MCTformer": psa,
    "CLIP-ES": clip_es,
    "WeCLIP, ToCo, AFA": weclip,
    "DHR, and any other published label maps": label_maps,
    "CVAT": cvat,
    "Label Studio": instances,
    "Roboflow": instances,
}
BLOCKS = re.findall(r"^### (.+?)\n.*?```\n(python tools/import_labels.*?)\n```", PAGE, re.M | re.S)


def test_every_source_of_the_page_has_files_to_try_it_on():
    assert [heading for heading, _ in BLOCKS] == [*SOURCES]


@pytest.mark.parametrize(("heading", "command"), BLOCKS)
def test_commands_of_the_page_do_what_it_says(photographs, tmp_path, heading, command):
    words = shlex.split(command.replace("\\\n", " "))[1:]
    folder = tmp_path / "theirs"
    folder.mkdir()
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    SOURCES[heading](folder / "one.npy")
    places = {"THEIRS": folder, "PHOTOGRAPHS": photographs, "LABELS": tmp_path / "ours"}
    places |= {"names.txt": tmp_path / "names.txt", "labelmap.txt": tmp_path / "labelmap.txt"}
    places["THEIRS/instances.json"] = folder / "instances.json"
    done = run_inside(*(places.get(word, word) for word in words))
    assert done.returncode == 0, done.stderr
    label = read_label(tmp_path / "ours/one.png", 3, SIZE)
    assert (label == truth()).mean() > (0.5 if "--crf" in words else 0.999)


def test_class_list_may_begin_with_the_background(capsys):
    assert read_names("background,boat,bird") == ("boat", "bird")
    assert "label 1 is the second" in capsys.readouterr().err
    assert read_names("boat,background") == ("boat", "background")  # a class, as in CVAT's tables


def test_import_says_which_classes_never_occur(photographs, tmp_path):
    folder = tmp_path / "arrays"
    folder.mkdir()
    psa(folder / "one.npy")
    done, _ = imported(folder, photographs, *by_names(*NAMES, "lorry"))
    assert done.returncode == 0, done.stderr
    assert "no label map contains bird, lorry" in done.stderr
    assert "1 photographs without a label, such as two" in done.stderr
    assert "threshold of activation maps: 0.3" in done.stdout
    labelled = (truth() > 0).mean()
    assert f"{labelled:.0%} of their pixels labelled" in done.stdout


def test_unfinished_import_is_not_used(photographs, tmp_path):
    folder = tmp_path / "arrays"
    folder.mkdir()
    psa(folder / "one.npy")
    (folder / "two.npy").write_bytes((folder / "one.npy").read_bytes()[:-200])
    done, output = imported(folder, photographs, *by_names())
    assert done.returncode == 1 and "two.npy" in done.stderr and (output / "one.png").exists()
    export = ("tools/export_masks.py", output, "--images", photographs, "--to", "yolo", "--output")
    refused = run_inside(*export, tmp_path / "yolo")
    assert refused.returncode == 1 and "is not finished" in refused.stderr
    psa(folder / "two.npy")
    done, _ = imported(folder, photographs, *by_names())
    assert done.returncode == 0, done.stderr
    (output / "two.png").unlink()
    done = run_inside(*export, tmp_path / "yolo")
    assert done.returncode == 0 and "without a label map, left out: 1, such as two" in done.stderr


@pytest.mark.parametrize("change", ["overwritten", "removed"])
def test_labels_are_not_kept_after_their_source_has_changed(photographs, tmp_path, change):
    folder = tmp_path / "maps"
    for name in ("one", "two"):
        write_label(folder / f"{name}.png", truth())
    done, output = imported(folder, photographs, *by_names())
    assert done.returncode == 0, done.stderr
    done, _ = imported(folder, photographs, *by_names())
    assert done.returncode == 0, done.stderr
    if change == "overwritten":
        write_label(folder / "two.png", truth()[:, ::-1].copy())
    else:
        (folder / "two.png").unlink()
    for _ in range(2):
        done, _ = imported(folder, photographs, *by_names())
        assert done.returncode == 1 and "has changed" in done.stderr and "two.png" in done.stderr
        assert "choose another --output" in done.stderr
    (output / "inputs.json").unlink()
    done, _ = imported(folder, photographs, *by_names())
    assert done.returncode == 1 and "not known, or differ" in done.stderr


def test_added_mask_of_a_class_is_a_change(photographs, tmp_path):
    folder = tmp_path / "masks/boat"
    folder.mkdir(parents=True)
    cv2.imwrite(str(folder / "one.png"), (truth() == 1) * np.uint8(255))
    done, _ = imported(folder.parent, photographs, *by_names())
    assert done.returncode == 0, done.stderr
    (folder.parent / "car").mkdir()
    cv2.imwrite(str(folder.parent / "car/one.png"), (truth() == 3) * np.uint8(255))
    done, _ = imported(folder.parent, photographs, *by_names())
    assert done.returncode == 1 and "car/one.png" in done.stderr


def test_photographs_of_an_import_may_come_and_go(photographs, tmp_path):
    write_label(tmp_path / "maps/one.png", truth())
    done, _ = imported(tmp_path / "maps", photographs, *by_names())
    assert done.returncode == 0, done.stderr
    write_label(tmp_path / "maps/two.png", truth())
    done, output = imported(tmp_path / "maps", photographs, *by_names())
    assert done.returncode == 0 and (output / "two.png").exists(), done.stderr
    (photographs / "one.jpg").unlink()
    done, _ = imported(tmp_path / "maps", photographs, *by_names())
    assert done.returncode == 0, done.stderr


def test_changed_table_or_instances_are_refused(photographs, tmp_path):
    (tmp_path / "masks").mkdir()
    cvat(tmp_path / "masks/one.npy")
    table = tmp_path / "labelmap.txt"
    colours = ("--colours", str(table))
    done, output = imported(tmp_path / "masks", photographs, *by_names(), *colours)
    assert done.returncode == 0, done.stderr
    assert "sha256" in json.loads((output / "made_from.json").read_text())["inputs"]["source"]
    table.write_text("background:0,0,0::\nboat:128,128,0::\nbird:0,128,0::\ncar:128,0,0::")
    done, _ = imported(tmp_path / "masks", photographs, *by_names(), *colours)
    assert done.returncode == 1 and "labelmap.txt" in done.stderr


def test_unfinished_import_of_unchanged_instances_continues(photographs, tmp_path):
    content, path = coco("polygon"), tmp_path / "coco.JSON"
    path.write_text(json.dumps(content))
    done, output = imported(path, photographs)
    assert done.returncode == 0, done.stderr
    (output / "one.png").unlink()
    done, _ = imported(path, photographs)
    assert done.returncode == 0 and (output / "one.png").exists(), done.stderr
    content["annotations"].pop()
    path.write_text(json.dumps(content))
    done, _ = imported(path, photographs)
    assert done.returncode == 1 and "coco.JSON" in done.stderr


def picture_of(values) -> Image.Image:
    """A mask of the boat with these values outside and inside."""
    return Image.fromarray(np.where((truth() == 1)[..., None], *values[::-1]).squeeze())


def alpha(path):
    picture_of((np.uint8([0, 0, 0, 0]), np.uint8([0, 0, 0, 255]))).save(path)


def deep(path):
    picture_of((np.uint16([0]), np.uint16([1]))).save(path)


def jpeg(path):
    picture_of((np.uint8([0]), np.uint8([255]))).save(path, "JPEG")


def smooth(path):
    mask = cv2.GaussianBlur((truth() == 1) * np.uint8(255), (5, 5), 0)
    cv2.imwrite(str(path), mask)


def without_black(path):
    picture_of((np.uint8([50]), np.uint8([200]))).save(path)


@pytest.mark.parametrize(
    ("save", "said"),
    [
        (alpha, "has transparent pixels"),
        (deep, "has 16 bits"),
        (jpeg, "is a JPEG picture"),
        (smooth, "values"),
        (without_black, "neither of them black"),
    ],
)
def test_masks_of_unclear_values_are_refused(tmp_path, save, said):
    save(tmp_path / "one_boat.png")
    with pytest.raises(UserError, match=said) as error:
        read_mask(tmp_path / "one_boat.png")
    assert "one_boat.png" in str(error.value) and "black outside" in str(error.value)


@pytest.mark.parametrize("inside", [[1], [255], [9, 8, 7], [255, 255, 255, 255]])
def test_masks_of_two_values_are_read(tmp_path, inside):
    outside = [0, 0, 0, 255][: len(inside)]
    picture_of((np.uint8(outside), np.uint8(inside))).save(tmp_path / "one.png")
    assert np.array_equal(read_mask(tmp_path / "one.png"), truth() == 1)


def test_masks_that_seem_inverted_are_warned_of(photographs, tmp_path):
    (tmp_path / "masks").mkdir()
    for name, inside in (("one", truth() == 1), ("two", np.ones(SIZE))):
        cv2.imwrite(str(tmp_path / f"masks/{name}_boat.png"), inside * np.uint8(255))
    done, _ = imported(tmp_path / "masks", photographs, *by_names())
    assert done.returncode == 0 and "warning: over 90%" in done.stderr and "two" in done.stderr


def test_maps_with_background_last_are_warned_of(photographs, tmp_path, capsys):
    for name in ("one", "two"):  # 0 is bird, which is nowhere, and 3 is background
        write_label(tmp_path / f"maps/{name}.png", np.array([3, 1, 0, 2], np.uint8)[truth()])
    done, _ = imported(tmp_path / "maps", photographs, *by_names())
    assert done.returncode == 0 and "100% of the pixels in" in done.stderr
    assert "is background last?" in done.stderr
    counts = np.zeros((3, 256), int)
    counts[:2, 3], counts[2, 0] = 9, 9
    source = from_label_maps(Files(tmp_path / "maps", LABELS), NAMES)
    report(source, ["a", "b", "c"], NAMES, counts, tmp_path)
    assert "labelled in 2 of 3 label maps, such as a; " in capsys.readouterr().err


def test_name_of_a_colour_may_contain_colons(tmp_path):
    (tmp_path / "labelmap.txt").write_text("sky:0,0,0\nroad: wet:1, 2, 3::\na::4,5,6:b,c,d:\n")
    names = from_colours(tmp_path, tmp_path / "labelmap.txt").names
    assert names == ["sky", "road: wet", "a:"]


@pytest.mark.parametrize(("value", "said"), [(0, "nothing is labelled"), (1, "100% of the pixels")])
def test_labels_of_nothing_or_nearly_everything_are_warned_of(photographs, tmp_path, value, said):
    write_label(tmp_path / "maps/one.png", np.full(SIZE, value, np.uint8))
    done, _ = imported(tmp_path / "maps", photographs, *by_names())
    assert done.returncode == 0 and "warning: " + said in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("background:0,0,0::\nboat:1,2,3::\nboat:4,5,6::\n", "the name 'boat' twice"),
        ("background:0,0,0::\nboat:1,2,3::\ncar:1,2,3::\n", "the colour (1, 2, 3) twice"),
        ("background:0,0,0::\n", "there is none"),
        ("\n", "there is none"),
        ("boat:1,2,300::\n", "each 0 to 255"),
        ("boat:blue\n", "is not `name:red,green,blue`"),
    ],
)
def test_unclear_tables_of_colours_are_refused(photographs, tmp_path, content, said):
    (tmp_path / "masks").mkdir()
    voc_colours(tmp_path / "masks/one.npy")
    (tmp_path / "labelmap.txt").write_text(content)
    table = ("--colours", str(tmp_path / "labelmap.txt"))
    done, _ = imported(tmp_path / "masks", photographs, *table)
    assert done.returncode == 1 and said in done.stderr and "labelmap.txt" in done.stderr


@pytest.mark.parametrize(
    ("categories", "said"),
    [
        ([(4, "boat"), (9, "boat")], "'boat' is there twice"),
        ([(4, "boat"), (9, "car"), (9, "bird")], "two categories with the id 9"),
        ([(4, "boat"), (9, 7)], "7 is not a class name"),
        ([(k, f"c{k}") for k in range(254)], "254 classes, and label maps can hold 253"),
    ],
)
def test_unclear_categories_are_refused(photographs, tmp_path, categories, said):
    content = coco("polygon")
    content["categories"] = [{"id": k, "name": name} for k, name in categories]
    (tmp_path / "coco.json").write_text(json.dumps(content))
    done, output = imported(tmp_path / "coco.json", photographs)
    assert done.returncode == 1 and said in done.stderr and "coco.json" in done.stderr
    assert not output.exists()


def test_class_given_twice_is_refused(photographs, tmp_path):
    write_label(tmp_path / "maps/one.png", truth())
    maps = ("--map", "boat=car", "--map", "boat=bird")
    done, _ = imported(tmp_path / "maps", photographs, *by_names(), *maps)
    assert done.returncode == 1 and "--map: 'boat' is given twice" in done.stderr


def test_results_inside_what_is_read_are_refused(photographs, tmp_path):
    write_label(tmp_path / "maps/one.png", truth())
    for output in (tmp_path / "maps/out", photographs / "labels", photographs):
        arguments = ("--images", photographs, "--output", output, *by_names())
        done = run_inside("tools/import_labels.py", tmp_path / "maps", *arguments)
        assert done.returncode == 1 and f"--output {output} is inside" in done.stderr
