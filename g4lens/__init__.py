"""A faithful, hookable Gemma 4: open its activations on text, pictures and sound."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .analysis import tasks as tasks
from .cache import ActivationCache as ActivationCache
from .config import Gemma4Config as Gemma4Config
from .errors import CacheError as CacheError
from .errors import ConfigError as ConfigError
from .errors import G4LensError as G4LensError
from .errors import HookError as HookError
from .errors import HookNameError as HookNameError
from .errors import HubError as HubError
from .errors import InputError as InputError
from .errors import WeightsError as WeightsError
from .inputs.image import Image as Image
from .inputs.sound import Audio as Audio
from .load import load as load
from .model.gemma4 import Gemma4 as Gemma4
from .resources import sample as sample

if TYPE_CHECKING:
    from . import plots as plots

__version__ = "0.1.0"

_ON_FIRST_USE = ("plots",)  # they import matplotlib


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})
