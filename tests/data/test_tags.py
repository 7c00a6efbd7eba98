"""Image-level tags from tables, annotations and sub-folders."""

import numpy as np
import pytest
from PIL import Image

from core.data.finder import image_id
from core.data.lists import read_split
from core.data.settings import VOC_CLASSES, DataConfig
from core.data.tags import (
    find_images,
    folder_tags,
    read_annotation,
    read_table,
)
from core.run import log
from core.run.errors import UserError
from tools.common.tables import write_table


@pytest.fixture
def table(tmp_path):
    """Writes a table and reads it."""

    def read(content: str | bytes, *arguments, **options):
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / "tags.csv").write_bytes(data)
        return read_table(tmp_path / "tags.csv", *arguments, **options)

    return read


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize("cell", ["dog;cat", '"dog, cat"', "dog | cat", "dog;;cat;dog"])
def test_every_separator_gives_the_same_tags(table, cell):
    assert table(f"image,tags\na.jpg,{cell}\n") == {"a.jpg": ["dog", "cat"]}


def test_spaces_belong_to_a_name_unless_all_words_are_known_classes(table):
    content = "image,tags\na.jpg,traffic light;person\nb.jpg,traffic light\n"
    assert table(content) == {"a.jpg": ["traffic light", "person"], "b.jpg": ["traffic light"]}
    content = "image,tags\na.jpg,traffic light\nb.jpg,dog person\n"
    assert table(content) == {"a.jpg": ["traffic light"], "b.jpg": ["dog person"]}
    expected = {"a.jpg": ["traffic light"], "b.jpg": ["dog", "person"]}
    assert table(content, ("traffic light", "dog", "person")) == expected


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfimage,tags\na.jpg,dog\n",
        b"image,tags\r\na.jpg,dog\r\n",
        b"tags,size,image\ndog,12,a.jpg\n",
        b"image, tags\n a.jpg , dog \n",
        b'"image","tags"\n"a.jpg","dog"\n',
        b"image,tags\na.jpg,dog\n\n",
    ],
    ids=["byte-order mark", "Windows lines", "other columns", "spaces", "quotes", "empty line"],
)
def test_what_spreadsheets_write_is_read(table, content):
    assert table(content) == {"a.jpg": ["dog"]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("file_name,label\na,dog\nb,cat\n", "with the columns 'file_name' and 'label'"),
        ("File Name;Class\na;dog\nb;cat\n", "separated by semicolons, with the columns"),
        ("sep=;\nimage;tags\na;dog\nb;cat\n", "separated by semicolons"),
        ("image\ttags\r\na\tdog\r\nb\tcat\r\n".encode("utf-16"), "separated by tabs"),
        ("Image Index|Finding Labels\na|dog\nb|cat\n", "separated by vertical bars"),
        (",image,dog,cat\n0,a,1,0\n1,b,,1.0\n", "with a column for each class (dog, cat)"),
        ("id;dog; cat\na;TRUE;FALSE\nb;False;True\n", "a column for each class (dog, cat)"),
        ("Unnamed: 0,image,tags\n5,a,['dog']\n6,b,\"['cat']\"\n", "with lists in brackets"),
        ("image,tags\na,dog\na,dog\nb,cat\n", "with one line per tag of an image"),
        ("filename,width,class,xmin\na,9,dog,1\na,9,dog,2\nb,9,cat,1\n", "'class', with one line"),
        ("image,tags,,\na,dog,,\nb,cat,,\n,,,\n", ""),
        ("image,tags\ra,dog\rb,cat\r", ""),
        ("Image, TAGS \na,dog\nb,cat\n", ""),
        ("image,tags\na,dog\u200b\nb,\u00a0cat\n", "without invisible characters"),
    ],
)
def test_what_programs_export_is_read_and_told(table, monkeypatch, content, told):
    monkeypatch.setattr(log, "printed", {})
    assert table(content) == {"a": ["dog"], "b": ["cat"]}
    assert len(log.printed) == bool(told) and told in "".join(log.printed.values())


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("\"['dog', 'cat']\"", ["dog", "cat"]),
        ("['dog' 'cat']", ["dog", "cat"]),  # NumPy's has no commas
        ("\"['dog'\n 'cat']\"", ["dog", "cat"]),
        ('"[""dog"", ""M\\u00f6we""]"', ["dog", "Möwe"]),
        ('"[""dog\'s bowl"", None]"', ["dog's bowl"]),
        ('"[""\\ud83d\\ude00"", ""\\x""]"', ["😀", "\\x"]),
        ('"{dog,traffic light}"', ["dog", "traffic light"]),
        ("\"('dog', 'cat')\"", ["dog", "cat"]),
        *((text, []) for text in ("[]", "nan", "NaN", "None", "<NA>", "null", "['nan']")),
        ("(dog)", ["(dog)"]),
    ],
)
def test_cell_may_be_a_list_or_nothing(table, cell, expected):
    assert table(f"image,tags\na,{cell}\nb,dog\n") == {"a": expected, "b": ["dog"]}


def test_class_may_be_called_none_where_it_is_asked_for(table):
    assert table("image,tags\na,none\nb,nan\n", ("none",)) == {"a": ["none"], "b": []}


def test_an_image_has_a_line_for_each_tag(table):
    content = "image,tags\na,dog\nb,cat\na,traffic light\n"
    assert table(content) == {"a": ["dog", "traffic light"], "b": ["cat"]}


def test_class_columns_are_picked_by_the_known_classes(table):
    content = "image,width,dog,cat\na,640,1,0\nb,480,0,1\n"
    assert table(content, ("cat", "dog")) == {"a": ["dog"], "b": ["cat"]}
    with pytest.raises(UserError, match="column 'width' holds '640', not 0 or 1"):
        table(content)


def test_image_without_tags_keeps_its_place(table):
    assert table("image,tags\na.jpg,\nb.jpg,dog\nc.jpg\n") == {
        "a.jpg": [],
        "b.jpg": ["dog"],
        "c.jpg": [],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,tags\na.jpg,dog;cow\na.jpg,cat\n", "line 3: image a.jpg is listed twice"),
        ("image,tags\na.jpg,dog, cat\n", r"line 2.*put tags that hold commas in quotes"),
        ("image,tags\n,dog\n", "line 2: expected one image"),
        ("image,breed\na.jpg,dog\n", "first line must be: image,tags.*'breed' holds 'dog'"),
        ("a.jpg,dog\n", "first line must be: image,tags"),
        ("", "not a table of tags"),
        ("image,tags\na.jpg,Bär\n".encode("latin-1"), "in line 2.*save the table as CSV in UTF-8"),
        (b"PK\3\4\x14\0\6\0", "is not text.*save the table as CSV"),
        ('image,tags\na.jpg,"dog\nb.jpg,cat\n', "a quote is not closed"),
        ("file_name,path,tags\na.jpg,b,dog\n", "rename the right one to image"),
        ("image,label,class\na.jpg,1,dog\n", "rename the right one to tags"),
        ("image,dog,cat\na.jpg,1,0.7\n", "'cat' holds '0.7', not 0 or 1"),
        ("image,dog\na.jpg,0\n", "there is no 1"),
        ('x,"image\na.jpg,dog\n', "not a table of tags"),
    ],
)
def test_what_is_no_table_is_refused(table, content, message):
    with pytest.raises(UserError, match=message):
        table(content)


def test_all_bad_lines_are_told_together_or_handed_back(table):
    content = "image,tags\na.jpg,dog;cat\na.jpg,dog;cat\nb.jpg,dog,cat\n"
    with pytest.raises(UserError, match=r"(?s)2 problems.*line 4.*line 3"):
        table(content)
    problems = []
    assert table(content, problems=problems) == {"a.jpg": ["dog", "cat"]} and len(problems) == 2


def test_missing_table_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.csv are missing; set data.tags"):
        read_table(tmp_path / "gone.csv")


def test_written_table_is_read_back(tmp_path):
    rows = {'odd, "name".jpg': ["traffic light", "dog"], "b.jpg": [], "c.jpg": ["dog"]}
    write_table(tmp_path / "tags.csv", rows)
    assert read_table(tmp_path / "tags.csv") == rows


def test_tag_is_the_first_of_nested_folders(tmp_path):
    touch(tmp_path / "traffic light/2020/May/a.jpg", tmp_path / "dog/b.PNG", tmp_path / "c.webp")
    touch(tmp_path / "dog/notes.txt", tmp_path / "dog/.hidden.jpg", tmp_path / ".cache/d.jpg")
    assert find_images(tmp_path) == {
        "c.webp": [],
        "dog/b.PNG": ["dog"],
        "traffic light/2020/May/a.jpg": ["traffic light"],
    }


def test_masks_below_the_root_are_no_images(tmp_path):
    touch(tmp_path / "dog/a.jpg", tmp_path / "masks/dog/a.png", tmp_path / "masks.old/b.png")
    assert [*folder_tags(tmp_path, None, "masks")] == ["dog/a.jpg", "masks.old/b.png"]


@pytest.mark.parametrize("root", ["", "nowhere"])
def test_folder_without_images_is_refused(tmp_path, root):
    with pytest.raises(UserError, match="no image .* was found below"):
        find_images(tmp_path / root)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dog/a.JPG", "dog/a"),
        ("a.b.jpeg", "a.b"),
        ("a.v1", "a.v1"),
        ("./dog//a.png", "dog/a"),
        ("2007_000032", "2007_000032"),
    ],
)
def test_id_is_the_path_without_an_image_suffix(name, expected):
    assert image_id(name) == expected


def annotation(*names: str) -> str:
    objects = (
        f"<object><name>{n}</name><difficult>1</difficult><part><name>head</name></part></object>"
        for n in names
    )
    return f"<annotation><filename>x</filename>{''.join(objects)}</annotation>"


def test_annotation_names_objects_once_without_their_parts(tmp_path):
    (tmp_path / "x.xml").write_text(annotation("person", "dog", "person"))
    assert read_annotation(tmp_path / "x.xml") == ["person", "dog"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "<annotation><obj",
        '<?xml version="1.0" encoding="unheard-of"?><annotation/>',
        '<?xml version="1.0" encoding="utf-32"?><annotation/>',
    ],
)
def test_broken_annotation_is_named(tmp_path, content):
    (tmp_path / "x.xml").write_text(content)
    with pytest.raises(UserError, match="x.xml cannot be read"):
        read_annotation(tmp_path / "x.xml")


def test_table_and_annotations_give_the_same_split(tmp_path):
    tags = {"a": ["dog", "person"], "b": ["train"], "c": ["person", "sofa", "dog"]}
    for name, names in tags.items():
        touch(tmp_path / f"JPEGImages/{name}.jpg", tmp_path / f"Annotations/{name}.xml")
        (tmp_path / f"Annotations/{name}.xml").write_text(annotation(*names))
    touch(tmp_path / "ImageSets/Segmentation/train.txt")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("b\na\nc\n")
    write_table(tmp_path / "tags.csv", tags)
    data = DataConfig(root=str(tmp_path)).with_classes()
    from_xml = read_split(data, "train")
    data.tags = "tags.csv"
    from_table = read_split(data, "train")
    assert from_xml.ids == from_table.ids == ("b", "a", "c")
    assert np.array_equal(from_xml.tags, from_table.tags) and from_xml.tags.sum() == 6


def test_derived_classes_are_sorted_and_leave_masks_out(tmp_path):
    for name in ("zebra", "ant", "masks"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (2, 2)).save(tmp_path / name / "a.png")
    data = DataConfig(format="folder", root=str(tmp_path), masks="masks")
    assert data.with_classes().classes == ("ant", "zebra")
    write_table(tmp_path / "tags.csv", {"ant/a.png": ["b", "c"], "zebra/a.png": ["a"]})
    data.tags = "tags.csv"
    assert data.with_classes().classes == ("a", "b", "c")


def test_tags_of_a_data_set_are_read_whole(voc_photos):
    table = read_table(voc_photos / "tags.csv", VOC_CLASSES)
    names = {name for tags in table.values() for name in tags}
    assert len(table) == len([*voc_photos.glob("JPEGImages/*")]) and names == set(VOC_CLASSES)
