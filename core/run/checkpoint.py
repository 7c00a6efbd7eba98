"""Saves and loads weights: atomic files, no pickled objects, nothing left random by accident."""

import pickle
import types
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from core.run import distributed
from core.run.errors import UserError
from core.run.files import atomic_write
from core.run.settings import check

PREFIXES = ("module.", "teacher.", "backbone.", "model.", "encoder.")
NO_CHECKPOINT = "it is not a checkpoint, or older than torch 1.6; save its state dict again"
NESTS = ("teacher", "student", "state_dict", "model", "network")
LEOPART = "model.prototypes.weight"  # its file: `model.` is the student, which its authors evaluate


def save(path: Path, content: Mapping[str, Any], keep: bool = False) -> None:
    """Saves tensors, numbers, strings and containers of them, completely or not at all.

    With several processes, only the first one saves. With `keep`, the previous file, if any, is
    renamed to `earlier(path)`.
    """
    if distributed.rank():
        return
    with atomic_write(path) as tmp:
        torch.save(dict(content), tmp)
        if keep and path.exists():
            path.replace(earlier(path))


def earlier(path: Path) -> Path:
    """Where `save` keeps the checkpoint before the last one."""
    return path.with_name(f"{path.stem}.earlier{path.suffix}")


def resume(path: Path) -> dict[str, Any] | None:
    """The newest intact checkpoint of a training; None if there is none.

    Raises:
        UserError: neither the last checkpoint nor the one before it can be read.
    """
    there = [p for p in (path, earlier(path)) if p.exists()]
    for candidate in there:
        try:
            return load(candidate)
        except UserError as error:
            if candidate == there[-1]:
                raise UserError(f"{error}. To train from the start, remove {candidate}") from None
            print(f"{error}; resuming from the one before, {there[-1]}")
    return None


def load(path: Path) -> dict[str, Any]:
    """Loads what `save` wrote, or any .pth or .safetensors file of tensors, onto the CPU.

    Raises:
        UserError: the file is missing, broken, or holds more than tensors and plain values.
    """
    check(path.is_file(), f"checkpoint {path} is missing; train this stage first or fix the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        broken = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
        if broken:  # torch compares no checksums
            raise ValueError(f"its part {broken} is not what was written")
        return _read(path, weights_only=True)
    except Exception as error:  # noqa: BLE001 (any exception type is possible)
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            raise UserError(
                f"checkpoint {path} holds more than tensors and is not loaded, because unpickling "
                "it could run code; save its state dict instead"
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's advice would be to unpickle it
            reason = NO_CHECKPOINT
        raise UserError(f"checkpoint {path} cannot be read: {reason}") from None


def _read(path: Path, **options: Any) -> dict[str, Any]:
    content = torch.load(path, map_location="cpu", **options)
    if not isinstance(content, Mapping):
        raise ValueError(f"it is not a state dict but a {type(content).__name__}")
    return dict(content)


def load_foreign(path: Path) -> dict[str, Any]:
    """Loads a checkpoint from elsewhere, such as Lightning's, that may hold more than tensors.

    What is not a tensor, a number, a string or a container of them is left out unread.

    Raises:
        UserError: the file is missing or broken.
    """
    try:
        return load(path)
    except UserError:
        if not path.is_file() or path.suffix == ".safetensors":
            raise
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # TorchScript is code
                if any(name.endswith("constants.pkl") for name in archive.namelist()):
                    raise UserError("it is a TorchScript program, not weights")
        # Unsafe by its flag alone: weights_only refuses the whole file for one foreign object. Here
        # `tensors_only` takes the place of pickle. It resolves tensors' own classes alone, so no
        # code of the file can run.
        return _read(path, weights_only=False, pickle_module=tensors_only)
    except Exception as error:  # noqa: BLE001 (any exception type is possible)
        raise UserError(f"checkpoint {path} cannot be read: {error}") from None


class _Ignored:
    """Stands for an object of a checkpoint that is not a tensor; it does nothing."""

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = _nothing

    def __call__(self, *args: Any, **kwargs: Any) -> "_Ignored":
        return self


class _TensorsOnly(pickle.Unpickler):
    """Builds tensors and plain containers; every other class is `_Ignored`: no code can run."""

    KNOWN = {("collections", "OrderedDict"), ("torch", "Size")}
    KNOWN |= {("torch._utils", f"_rebuild_{kind}") for kind in ("tensor_v2", "parameter")}

    def find_class(self, module: str, name: str) -> Any:
        storage = module in ("torch", "torch.storage") and name.endswith("Storage")
        storage = storage and "." not in name  # no attribute of an attribute
        if (module, name) in self.KNOWN or storage:
            return super().find_class(module, name)
        return _Ignored


def _refused(*args: Any, **kwargs: Any) -> None:
    raise UserError(NO_CHECKPOINT)


# The `pickle_module` of torch.load.
tensors_only = types.SimpleNamespace(Unpickler=_TensorsOnly, load=_refused, __name__="tensors")


def find_state_dict(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint of any common nesting, without common prefixes.

    Of a student and its teacher, the one that the method's authors evaluate: DINO's teacher,
    Leopart's student.
    """
    for nest in NESTS:
        if isinstance(content.get(nest), Mapping):
            return find_state_dict(content[nest])
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    for prefix in ("model.",) if LEOPART in state else PREFIXES:
        inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if inner:
            return find_state_dict(inner)
    return state


def load_weights(network: nn.Module, path: Path, names: Mapping[str, str] | None = None) -> None:
    """Loads pre-trained weights into `network`; further tensors of the file (a head) are ignored.

    `names`: names in the file, by those of the network's tensors; None: the same names.

    Raises:
        UserError: a tensor that the network needs is missing or has another shape.
    """
    found, wanted = find_state_dict(load_foreign(path)), network.state_dict()
    names = names or {k: k for k in wanted}
    state = {k: found[names[k]] for k in wanted if names[k] in found}
    missing, wrong = _misfits(state, wanted)
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of the {len(wanted)} tensors of this network, first: "
            f"{names[missing[0]]}; is it the file of another architecture?"
        )
    if wrong:
        name, shapes = next(iter(wrong.items()))
        raise UserError(
            f"{path}: {name} has shape {shapes}; the network's name or arguments differ from the "
            "file's"
        )
    network.load_state_dict(state, strict=False)


def _misfits(state: Mapping, wanted: Mapping) -> tuple[list[str], dict[str, str]]:
    """Names of the wanted tensors that `state` lacks; and shapes, by name, of those that differ."""
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    shapes = {k: (tuple(state[k].shape), tuple(wanted[k].shape)) for k in wanted if k in state}
    return missing, {k: f"{a}, expected {b}" for k, (a, b) in shapes.items() if a != b}


def load_published(network: nn.Module, path: Path, own: Collection[str] = ()) -> nn.Module:
    """Loads a released checkpoint of the whole network; returns it in evaluation mode.

    Some files hold a tensor under several names, or parts that labels do not need (IRNet's
    displacement branch, an ImageNet head), which are ignored; everything else must fit.

    Args:
        network: network of the same architecture. Its `RELEASED`, if any, lists pairs (prefix in
            the file, our prefix), of which the first that fits counts; our prefix None: ignored.
        path: the file.
        own: tensors of the network that the file need not contain.

    Raises:
        UserError: a tensor of the network is not in the file, one of the file is not in the
            network, or shapes differ; all of them are listed.
    """
    rules = getattr(network, "RELEASED", [("", "")])
    content = load_foreign(path)
    content = content.get("state_dict", content)
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    state, extra = {}, []
    for name, value in {k.removeprefix("module."): v for k, v in tensors.items()}.items():
        rule = next((r for r in rules if name.startswith(r[0])), None)
        if rule is None:
            extra.append(name)
        elif rule[1] is not None:
            state[rule[1] + name.removeprefix(rule[0])] = value
    wanted = network.state_dict()
    extra += [k for k in state if k not in wanted]
    missing, wrong = _misfits(state, wanted)
    found = {"missing": [k for k in missing if k not in own], "not known": extra}
    found["of another shape"] = [f"{name} {shapes}" for name, shapes in wrong.items()]
    problems = [f"  {title}: {', '.join(names)}" for title, names in found.items() if names]
    if problems:
        lines = "\n".join(problems)
        raise UserError(f"{path} is not a checkpoint of {type(network).__name__}:\n{lines}")
    network.load_state_dict(state, strict=False)
    return network.eval()


def restore(network: nn.Module, content: Mapping[str, Any], key: str, path: Path) -> nn.Module:
    """Loads `content[key]`, a network of a checkpoint of ours, into `network`; returns it in
    evaluation mode.

    Raises:
        UserError: the checkpoint, at `path`, holds a network of another configuration.
    """
    check(key in content, f"{path} is not a checkpoint of this kind: it has no {key!r}")
    try:
        network.load_state_dict(content[key])
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit this configuration ({str(error).splitlines()[0].rstrip(':')}); "
            "give the --config and options of the run that made it"
        ) from None
    return network.eval()
