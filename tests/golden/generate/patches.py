"""What released code needs on a computer without a GPU and with today's libraries, and what records its runs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # before the stand-ins, which it would take for the libraries
import yaml
from torch import Tensor, nn

from mpscl_ray.networks.deeplab import DeepLabV2


class Attributes(dict[str, Any]):
    """Stands in for easydict: a dictionary with attributes, nested, with lists for tuples."""

    def __init__(self, content: dict[str, Any] | None = None) -> None:
        super().__init__()
        for name, value in (content or {}).items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        value = Attributes(value) if type(value) is dict else list(value) if isinstance(value, tuple) else value
        self[name] = value

    def __getattr__(self, name: str) -> Any:
        return self[name]


def prepare(*folders: Path) -> None:
    """Double precision, no GPU, stand-ins for libraries, and the released folders in front of all others."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    changed: Any = torch.Tensor
    changed.cuda = lambda self, *_: self
    changed.get_device = lambda self: "cpu"
    torch.FloatTensor = torch.DoubleTensor  # type: ignore[misc]
    nn.Module.cuda = lambda self, *_: self  # type: ignore[assignment, return-value, method-assign]
    yaml.load = partial(yaml.load, Loader=yaml.SafeLoader)  # type: ignore[assignment]
    stand_ins: dict[str, dict[str, Any]] = {
        "easydict": {"EasyDict": Attributes},
        "imageio": {},
        "scipy.misc": {},
        "sklearn": {},
        "sklearn.manifold": {"TSNE": None},
        "sklearn.decomposition": {"PCA": None},
        "torchvision": {},
        "torchvision.utils": {"make_grid": None},
        "torchvision.transforms": {},
        "torchvision.transforms.functional": {},
    }
    for name, content in stand_ins.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(importlib.import_module(parent), child, module)
    sys.path[:0] = [str(folder) for folder in folders]


def load(file: Path, *arguments: str) -> Any:
    """A released script as a module that was started with these arguments and prints nothing."""
    sys.argv = [str(file), *arguments]
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    module.print = lambda *_: None
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


class Segmenter(DeepLabV2):
    """The network of this package with the interface of the released ones; each parameter stands in one place once."""

    def forward(self, x: Tensor) -> Any:
        output = super().forward(x)
        return output.aux, output.main

    def optim_parameters(self, rate: Any) -> list[dict[str, Any]]:
        """Backbone and heads, at the released rates."""
        rate = getattr(rate, "learning_rate", rate)
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        heads = [p for name, p in named if name.startswith(("layer5.", "layer6."))]
        backbone = [p for name, p in named if not name.startswith(("layer5.", "layer6."))]
        return [{"params": backbone, "lr": rate}, {"params": heads, "lr": 10 * rate}]


def recording(note: Callable[[dict[str, Any]], None], loop_variable: str = "i_iter") -> Any:
    """torch.optim with an SGD that first shows ``note`` the variables of the loop that calls its step."""

    class Recording(torch.optim.SGD):
        def step(self, *_: Any) -> None:  # type: ignore[override]
            frame = sys._getframe()
            while loop_variable not in frame.f_locals:
                assert frame.f_back is not None
                frame = frame.f_back
            note(dict(frame.f_locals))
            super().step()

    return types.SimpleNamespace(SGD=Recording, Adam=torch.optim.Adam)
